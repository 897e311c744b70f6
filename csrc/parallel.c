/* A small fork-safe thread pool, and the cache of scratch blocks.
 *
 * A job is (generation, chunks, next chunk) in one 64-bit ticket. Whoever claims a chunk runs it; the caller claims too
 * and waits only for chunks already claimed, so that a worker asleep or descheduled never delays a job. Nested or
 * concurrent callers find the pool busy and run their job alone. Workers spin for a bounded time, then sleep. */
#define _GNU_SOURCE
#include "parallel.h"
#include "hotloops.h"
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { MAX_THREADS = 256, SPIN = 2000, MAX_CHUNKS = 0x7fff };

int (*hl_poll)(void);
int64_t hl_ahead;
int hl_adds_beside;

static pthread_mutex_t job_lock = PTHREAD_MUTEX_INITIALIZER, sleep_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER;
static int started, sleepers;
static _Thread_local int inside; /* this thread holds job_lock (a signal handler that forks in a poll must not wait) */
static atomic_int wanted, done, status;
static _Atomic uint64_t ticket; /* generation:32 | chunks:16 | next:16 */
static struct {
    hl_chunk fn;
    void *context;
    int64_t n, grain;
} job;

static inline void relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static double seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int run_chunk(hl_chunk fn, void *context, int64_t i, int64_t n, int64_t grain)
{
    int64_t begin = i * grain, end = n - begin < grain ? n : begin + grain;
    return fn(begin, end, context);
}

/* Claims and runs chunks until none is left; the caller also looks for Ctrl-C. */
static void drain(int is_caller)
{
    double last = is_caller && hl_poll ? seconds() : 0.0;
    uint64_t t = atomic_load_explicit(&ticket, memory_order_acquire);
    for (;;) {
        int next = (int)(t & 0xffff), chunks = (int)(t >> 16 & 0xffff);
        if (next >= chunks) return;
        if (!atomic_compare_exchange_weak_explicit(&ticket, &t, t + 1, memory_order_acq_rel, memory_order_acquire))
            continue;
        /* The job cannot end before this chunk does, so its fields stand still. */
        if (atomic_load_explicit(&status, memory_order_relaxed) == HL_OK) {
            int s = run_chunk(job.fn, job.context, next, job.n, job.grain);
            if (is_caller && hl_poll && s == HL_OK && seconds() - last > 0.05) {
                s = hl_poll();
                last = seconds();
            }
            if (s != HL_OK) atomic_store_explicit(&status, s, memory_order_relaxed);
        }
        atomic_fetch_add_explicit(&done, 1, memory_order_release);
        t = atomic_load_explicit(&ticket, memory_order_acquire);
    }
}

static inline uint32_t generation(void)
{
    return (uint32_t)(atomic_load_explicit(&ticket, memory_order_acquire) >> 32);
}

static void *worker(void *argument)
{
    int index = (int)(intptr_t)argument; /* from 0; those past the number of threads asked for now stay idle */
    uint32_t seen = 0;
    for (;;) {
        for (int s = 0; generation() == seen && s < SPIN; s++) relax();
        if (generation() == seen) {
            pthread_mutex_lock(&sleep_lock);
            sleepers++;
            while (generation() == seen) pthread_cond_wait(&wake, &sleep_lock);
            sleepers--;
            pthread_mutex_unlock(&sleep_lock);
        }
        seen = generation();
        if (index < atomic_load(&wanted) - 1) drain(0);
    }
    return NULL;
}

int hl_num_threads(int n)
{
    if (n > 0) atomic_store(&wanted, n < MAX_THREADS ? n : MAX_THREADS);
    int w = atomic_load(&wanted);
    if (!w) {
        cpu_set_t set;
        w = sched_getaffinity(0, sizeof set, &set) ? 1 : CPU_COUNT(&set);
        w = w < 1 ? 1 : w > MAX_THREADS ? MAX_THREADS : w;
        atomic_store(&wanted, w);
    }
    return w;
}

static int run_alone(int64_t n, int64_t grain, hl_chunk fn, void *context)
{
    double last = hl_poll ? seconds() : 0.0;
    for (int64_t i = 0; i * grain < n; i++) {
        int s = run_chunk(fn, context, i, n, grain);
        if (s != HL_OK) return s;
        if (hl_poll && seconds() - last > 0.05) {
            s = hl_poll();
            if (s != HL_OK) return s;
            last = seconds();
        }
    }
    return HL_OK;
}

int hl_parallel_for(int64_t n, int64_t grain, hl_chunk fn, void *context)
{
    if (n <= 0) return HL_OK;
    if (grain < 1) grain = 1;
    if (grain >= n) return fn(0, n, context);
    if ((n - 1) / grain + 1 > MAX_CHUNKS) grain = (n - 1) / MAX_CHUNKS + 1;
    int chunks = (int)((n - 1) / grain + 1), threads = hl_num_threads(0);
    if (threads <= 1 || pthread_mutex_trylock(&job_lock)) return run_alone(n, grain, fn, context);

    inside = 1;
    uint32_t now = generation();
    while (started < threads - 1) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, worker, (void *)(intptr_t)started)) break;
        pthread_detach(thread);
        started++;
    }
    job.fn = fn;
    job.context = context;
    job.n = n;
    job.grain = grain;
    atomic_store_explicit(&done, 0, memory_order_relaxed);
    atomic_store_explicit(&status, HL_OK, memory_order_relaxed);
    atomic_store_explicit(&ticket, (uint64_t)(now + 1) << 32 | (uint64_t)chunks << 16, memory_order_release);
    pthread_mutex_lock(&sleep_lock);
    int asleep = sleepers;
    pthread_mutex_unlock(&sleep_lock);
    if (asleep) pthread_cond_broadcast(&wake);
    drain(1);
    for (int k = 0; atomic_load_explicit(&done, memory_order_acquire) < chunks; k++) {
        if (k < SPIN) relax();
        else sched_yield();
    }
    int result = atomic_load_explicit(&status, memory_order_relaxed);
    inside = 0;
    pthread_mutex_unlock(&job_lock);
    return result;
}

/* ---- steps ----
 *
 * Every thread that takes part walks all steps. In each it runs its share of the items, then waits for the others; what
 * nobody has begun after PATIENCE it runs too, so that a thread that is late, or never comes, does not hold the others
 * up. It only ever waits for items that a running thread has claimed. Where others want its core, too (a BLAS whose threads
 * still spin), it had better lose it between steps than with an item in hand: it offers it there, sooner than it is taken. */

enum { PATIENCE = 100 };
#define OFFER 2e-3 /* seconds; Linux takes a core away after about 3 milliseconds */

typedef struct {
    hl_step fn;
    void *context;
    int64_t steps, n;
    pthread_t caller;
    atomic_int joined, status;
    _Atomic int64_t done; /* items, of all steps */
    struct { _Alignas(64) _Atomic int64_t steps; } *claim; /* of each item: the steps claimed so far */
} step_job;

/* Runs those of the items [begin, end) that nobody has claimed. */
static void run_items(step_job *j, int64_t step, int64_t begin, int64_t end)
{
    int64_t ran = 0;
    for (int64_t i = begin; i < end; i++) {
        int64_t item = step % 2 ? end - 1 - (i - begin) : i, unclaimed = step;
        if (!atomic_compare_exchange_strong(&j->claim[item].steps, &unclaimed, step + 1)) continue;
        int s = atomic_load_explicit(&j->status, memory_order_relaxed);
        if (s == HL_OK) s = j->fn(step, item, j->context);
        if (s != HL_OK) atomic_store_explicit(&j->status, s, memory_order_relaxed);
        ran++;
    }
    if (ran) atomic_fetch_add_explicit(&j->done, ran, memory_order_release);
}

static int walk_steps(int64_t begin, int64_t end, void *context)
{
    step_job *j = context;
    int64_t me = atomic_fetch_add(&j->joined, 1);
    int polls = hl_poll && pthread_equal(j->caller, pthread_self());
    double polled = seconds(), offered = polled;
    (void)begin, (void)end;
    for (int64_t step = atomic_load(&j->done) / j->n; step < j->steps; step++) {
        int64_t all = atomic_load_explicit(&j->joined, memory_order_relaxed);
        run_items(j, step, j->n * me / all, j->n * (me + 1) / all);
        for (int k = 0; atomic_load_explicit(&j->done, memory_order_acquire) < (step + 1) * j->n; k++) {
            if (k == PATIENCE) run_items(j, step, 0, j->n);
            if (k < SPIN) relax();
            else sched_yield();
        }
        double now = seconds();
        if (now - offered > OFFER) {
            sched_yield();
            offered = seconds();
        }
        if (polls && now - polled > 0.05) {
            int s = hl_poll();
            if (s != HL_OK) atomic_store_explicit(&j->status, s, memory_order_relaxed);
            polled = seconds();
        }
        if (atomic_load_explicit(&j->status, memory_order_relaxed) != HL_OK) break;
    }
    return atomic_load_explicit(&j->status, memory_order_relaxed);
}

/* Elementary operations of a step for each thread that takes part: 2 microseconds, twice what waiting for each other costs. */
#define STEP_WORK 13000.0

int hl_parallel_steps(int64_t steps, int64_t n, double work_per_item, hl_step fn, void *context)
{
    if (steps <= 0 || n <= 0) return HL_OK;
    step_job j = {.fn = fn, .context = context, .steps = steps, .n = n, .caller = pthread_self()};
    j.claim = hl_take((size_t)n * sizeof j.claim[0]);
    if (!j.claim) return HL_NOMEM;
    for (int64_t i = 0; i < n; i++) atomic_init(&j.claim[i].steps, 0);
    double worth = (double)n * work_per_item / STEP_WORK;
    int64_t threads = hl_num_threads(0);
    if (threads > n) threads = n;
    if ((double)threads > worth) threads = worth < 1.0 ? 1 : (int64_t)worth;
    int status = hl_parallel_for(threads, 1, walk_steps, &j);
    hl_give(j.claim);
    return status;
}

/* ---- blocks of memory: 64 bytes before each hold its size; the cache keeps those that were given back last ---- */

/* Large blocks begin a page, as NumPy's do but for 16 bytes. A kernel that reads x and writes y in step would wait at each
 * load of x that lies, modulo a page, where y was written just before; where y lies a little further on, that is each one. */
enum { KEPT = 64, HEADER = 64, PAGE = 4096, LARGE = 1 << 18 };
static size_t keep_bytes = (size_t)256 << 20;
#define HUGE_PAGE ((size_t)2 << 20)
static pthread_mutex_t block_lock = PTHREAD_MUTEX_INITIALIZER;
static struct block { size_t bytes; } *kept[KEPT]; /* the oldest first */
static int kept_count;
static size_t kept_bytes;

/* How far into an allocation its block begins. */
static size_t offset_of(size_t bytes) { return bytes >= LARGE ? PAGE : HEADER; }
static void free_block(struct block *block) { free((char *)block + HEADER - offset_of(block->bytes)); }

/* Takes block i out of the cache; the caller holds the lock. */
static struct block *take_out(int i)
{
    struct block *block = kept[i];
    kept_count--;
    memmove(kept + i, kept + i + 1, (size_t)(kept_count - i) * sizeof kept[0]);
    kept_bytes -= block->bytes;
    return block;
}

void *hl_take(size_t bytes)
{
    if (bytes > SIZE_MAX / 2) return NULL;
    pthread_mutex_lock(&block_lock);
    int best = -1;
    for (int i = 0; i < kept_count; i++) /* the smallest that fits and is not more than twice as large; */
        if (kept[i]->bytes >= bytes && kept[i]->bytes / 2 <= bytes + 4096 &&
            (best < 0 || kept[i]->bytes <= kept[best]->bytes)) /* the last given back, which caches may hold */
            best = i;
    struct block *found = best >= 0 ? take_out(best) : NULL;
    pthread_mutex_unlock(&block_lock);
    if (!found) {
        size_t size = (bytes + 63) & ~(size_t)63; /* no more: a sanitizer then sees a write past the end */
        size_t whole = size + offset_of(size);
        void *start;
        if (size >= 2 * HUGE_PAGE) { /* huge pages: a fifth of the page faults' time of a fresh result */
            whole = (whole + HUGE_PAGE - 1) & ~(HUGE_PAGE - 1);
            if (posix_memalign(&start, HUGE_PAGE, whole)) return NULL;
            madvise(start, whole, MADV_HUGEPAGE);
        } else if (posix_memalign(&start, offset_of(size), whole)) return NULL;
        found = (struct block *)((char *)start + offset_of(size) - HEADER);
        found->bytes = size;
    }
    return (char *)found + HEADER;
}

/* Frees the oldest blocks until `room` more bytes and one more block fit; the caller holds the lock. */
static void make_room(size_t room)
{
    while (kept_count && (kept_count == KEPT || kept_bytes + room > keep_bytes)) free_block(take_out(0));
}

void hl_give(void *memory)
{
    if (!memory) return;
    struct block *block = (struct block *)((char *)memory - HEADER);
    pthread_mutex_lock(&block_lock);
    int keep = block->bytes <= keep_bytes;
    if (keep) {
        make_room(block->bytes);
        kept[kept_count++] = block;
        kept_bytes += block->bytes;
    }
    pthread_mutex_unlock(&block_lock);
    if (!keep) free_block(block);
}

void hl_keep(size_t bytes)
{
    pthread_mutex_lock(&block_lock);
    keep_bytes = bytes;
    make_room(0);
    pthread_mutex_unlock(&block_lock);
}

static _Thread_local const char *note = "";
void hl_note(const char *algorithm) { note = algorithm; }
const char *hl_algorithm(void)
{
    const char *n = note;
    note = "";
    return n;
}

/* ---- fork: the child starts with no workers and open locks ---- */

static void before(void)
{
    if (!inside) pthread_mutex_lock(&job_lock);
    pthread_mutex_lock(&sleep_lock);
    pthread_mutex_lock(&block_lock);
}
static void in_parent(void)
{
    pthread_mutex_unlock(&block_lock);
    pthread_mutex_unlock(&sleep_lock);
    if (!inside) pthread_mutex_unlock(&job_lock);
}
static void in_child(void)
{
    pthread_mutex_init(&block_lock, NULL);
    pthread_mutex_init(&sleep_lock, NULL);
    pthread_mutex_init(&job_lock, NULL);
    pthread_cond_init(&wake, NULL);
    started = sleepers = 0;
}
__attribute__((constructor)) static void init(void)
{
    pthread_atfork(before, in_parent, in_child);
#if defined(__x86_64__)
    __builtin_cpu_init();
    hl_ahead = __builtin_cpu_is("intel") ? 2 * PAGE : 0;
    hl_adds_beside = __builtin_cpu_is("amd");
#endif
}
