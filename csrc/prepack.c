/* The table of weights that hl_prepack knows, by address, each with what kernels made of it.
 *
 * A pack stands still from the moment it is in the table until its weights leave it; who takes weights out promises that
 * no kernel reads them, so a kernel holds no lock while it uses a pack. Of two calls that make the same pack at once one
 * throws its own away. */
#include "prepack.h"
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

typedef struct made {
    struct made *next;
    size_t bytes;
    void *data;
    int64_t key[HL_PACK_KEY];
} made;
typedef struct entry {
    struct entry *next;
    const void *weights;
    int holders; /* hl_prepack less hl_unprepack */
    made *packs;
} entry;

enum { BUCKETS = 1024 };
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static entry *buckets[BUCKETS];
static atomic_int known; /* most programs prepack nothing: their kernels do not take the lock */

static entry **bucket_of(const void *weights) { return &buckets[((uintptr_t)weights >> 6) * 0x9e3779b1u % BUCKETS]; }

/* Where the pointer to the entry of these weights is or would be; the caller holds the lock. */
static entry **find(const void *weights)
{
    entry **e = bucket_of(weights);
    while (*e && (*e)->weights != weights) e = &(*e)->next;
    return e;
}

int hl_prepack(const void *weights)
{
    pthread_mutex_lock(&lock);
    entry **e = find(weights);
    if (!*e && (*e = calloc(1, sizeof **e))) {
        (*e)->weights = weights;
        atomic_fetch_add(&known, 1);
    }
    int status = *e ? HL_OK : HL_NOMEM;
    if (*e) (*e)->holders++;
    pthread_mutex_unlock(&lock);
    return status;
}

void hl_unprepack(const void *weights)
{
    pthread_mutex_lock(&lock);
    entry **e = find(weights), *gone = *e;
    if (gone && --gone->holders == 0) {
        *e = gone->next;
        atomic_fetch_sub(&known, 1);
    } else gone = NULL;
    pthread_mutex_unlock(&lock);
    while (gone && gone->packs) {
        made *m = gone->packs;
        gone->packs = m->next;
        hl_give(m->data);
        free(m);
    }
    free(gone);
}

size_t hl_prepacked_bytes(const void *weights)
{
    size_t bytes = 0;
    pthread_mutex_lock(&lock);
    const entry *e = *find(weights);
    for (const made *m = e ? e->packs : NULL; m; m = m->next) bytes += m->bytes;
    pthread_mutex_unlock(&lock);
    return bytes;
}

int hl_is_prepacked(const void *weights)
{
    if (!atomic_load_explicit(&known, memory_order_relaxed)) return 0;
    pthread_mutex_lock(&lock);
    int is = *find(weights) != NULL;
    pthread_mutex_unlock(&lock);
    return is;
}

/* The pack of that key, NULL without; the caller holds the lock. */
static made *pack_of(const entry *e, const int64_t *key)
{
    made *m = e ? e->packs : NULL;
    while (m && memcmp(m->key, key, sizeof m->key)) m = m->next;
    return m;
}

hl_pack hl_pack_begin(const void *weights, size_t bytes, const int64_t *key, int count)
{
    hl_pack pack = {.weights = weights, .bytes = bytes};
    memcpy(pack.key, key, (size_t)count * sizeof *key);
    if (atomic_load_explicit(&known, memory_order_relaxed)) {
        pthread_mutex_lock(&lock);
        const made *m = pack_of(*find(weights), pack.key);
        pthread_mutex_unlock(&lock);
        if (m) pack.data = m->data;
        pack.ready = pack.kept = m != NULL;
    }
    if (!pack.data) pack.data = hl_take(bytes);
    return pack;
}

void hl_pack_ready(hl_pack *pack)
{
    pack->ready = 1;
    if (!atomic_load_explicit(&known, memory_order_relaxed)) return;
    made *m = malloc(sizeof *m); /* without memory nothing is kept */
    pthread_mutex_lock(&lock);
    entry *e = *find(pack->weights);
    if (m && e && !pack_of(e, pack->key)) {
        *m = (made){.next = e->packs, .bytes = pack->bytes, .data = pack->data};
        memcpy(m->key, pack->key, sizeof m->key);
        e->packs = m;
        pack->kept = 1;
        m = NULL;
    }
    pthread_mutex_unlock(&lock);
    free(m);
}

void hl_pack_end(hl_pack *pack)
{
    if (!pack->kept) hl_give(pack->data);
}

/* ---- fork: the child finds the lock open and the table whole ---- */

static void before(void) { pthread_mutex_lock(&lock); }
static void in_parent(void) { pthread_mutex_unlock(&lock); }
static void in_child(void) { pthread_mutex_init(&lock, NULL); }
__attribute__((constructor)) static void init(void) { pthread_atfork(before, in_parent, in_child); }
