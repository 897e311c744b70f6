/* Threads and scratch memory, once. */
#ifndef HL_PARALLEL_H
#define HL_PARALLEL_H
#include <stddef.h>
#include <stdint.h>

/* One chunk [begin, end) of the loop; returns a status: HL_OK, HL_NOMEM or HL_INTERRUPTED. */
typedef int (*hl_chunk)(int64_t begin, int64_t end, void *context);

/* Runs fn over [0, n) in chunks of `grain` items. The chunks depend on n and grain alone, never on the number of
 * threads, so a result cannot either. One chunk, a nested call, or a pool that another thread uses: runs on the calling
 * thread. Returns the first status that is not HL_OK. */
int hl_parallel_for(int64_t n, int64_t grain, hl_chunk fn, void *context);

/* One item of one step; returns a status as a chunk does. */
typedef int (*hl_step)(int64_t step, int64_t item, void *context);

/* Runs fn for the items [0, n) of step 0, then of step 1 and so on: a step begins when all items of the one before are
 * done. A thread takes the same items in every step, in alternating order, so that what they read stays in its caches. */
int hl_parallel_steps(int64_t steps, int64_t n, double work_per_item, hl_step fn, void *context);

/* How many items make a chunk worth handing to another thread (about 20 microseconds), from the work of one item in
 * elementary operations (a float read, written or multiplied). */
static inline int64_t hl_grain(double work_per_item)
{
    double g = 131072.0 / (work_per_item > 1.0 ? work_per_item : 1.0);
    return g < 1.0 ? 1 : (int64_t)g;
}

/* What the kernel picked ("direct"), for hl.explain; kept by the calling thread, a literal. */
void hl_note(const char *algorithm);

/* How far ahead, in bytes, a loop that streams through memory asks for what it reads. Intel's own prefetchers end at each
 * page, and its third cache is far: sums of columns, softmax and pooling wait for memory without. AMD's (Zen 4) do better
 * alone: 0. */
extern int64_t hl_ahead;

/* Whether the processor adds in other units than it multiplies in (AMD's), so that what only adds runs beside products. */
extern int hl_adds_beside;

/* Asked every 50 ms by the thread that called; set by the extension module, NULL in plain C programs. */
extern int (*hl_poll)(void);
#endif
