/* What this machine can do at most, with the same vectors and threads as the kernels: the roofs of the benchmarks. */
#include "simd.h"

/* Enough independent sums to keep every multiplier busy (latency 4, two a cycle), named one by one: an array of them
 * would be kept in memory. */
#define SUMS_12(F, p) F(p##0) F(p##1) F(p##2) F(p##3) F(p##4) F(p##5) F(p##6) F(p##7) F(p##8) F(p##9) F(p##x) F(p##y)
#if HL_REGISTERS == 32
#define SUMS(F) SUMS_12(F, a) SUMS_12(F, b)
enum { SUM_COUNT = 24 };
#else
#define SUMS(F) SUMS_12(F, a)
enum { SUM_COUNT = 12 };
#endif
#define START(s) vreal s = splat(first += (real)1); /* each from another number, else they are all the same sum */
#define STEP(s) s = s * factor + term;
#define TOTAL(s) total += s;

typedef struct {
    int64_t count;
    real *sums;
} fma_job;

static int fma_chunks(int64_t begin, int64_t end, void *context)
{
    const fma_job *j = context;
    for (int64_t chunk = begin; chunk < end; chunk++) {
        vreal factor = splat((real)0.999 - (real)1e-6 * (real)chunk), term = splat((real)1e-3);
        real first = (real)0;
        SUMS(START)
        for (int64_t k = 0; k < j->count; k += SUM_COUNT * LANES) {
            SUMS(STEP)
        }
        vreal total = splat((real)0);
        SUMS(TOTAL)
        j->sums[chunk] = sum_lanes(total);
    }
    return HL_OK;
}

/* Parallel over chunks; nothing but registers inside. */
int HL(peak_fma)(int64_t chunks, int64_t count, real *sums)
{
    fma_job job = {count, sums};
    return hl_parallel_for(chunks, 1, fma_chunks, &job);
}

enum { BLOCK = 1 << 14 }; /* elements of a chunk */

typedef struct {
    int64_t n;
    const real *x;
    real *y, *sums;
    int past_cache;
} stream_job;

/* Eight loads in flight, each into its own sum. */
static int read_blocks(int64_t begin, int64_t end, void *context)
{
    const stream_job *j = context;
    for (int64_t b = begin; b < end; b++) {
        const real *x = j->x + b * BLOCK;
        vreal s0 = splat((real)0), s1 = s0, s2 = s0, s3 = s0, s4 = s0, s5 = s0, s6 = s0, s7 = s0;
        for (int64_t i = 0; i < BLOCK; i += 8 * LANES) {
            s0 += load(x + i), s1 += load(x + i + LANES), s2 += load(x + i + 2 * LANES), s3 += load(x + i + 3 * LANES);
            s4 += load(x + i + 4 * LANES), s5 += load(x + i + 5 * LANES), s6 += load(x + i + 6 * LANES);
            s7 += load(x + i + 7 * LANES);
        }
        j->sums[b] = sum_lanes(((s0 + s1) + (s2 + s3)) + ((s4 + s5) + (s6 + s7)));
    }
    return HL_OK;
}

static int copy_blocks(int64_t begin, int64_t end, void *context)
{
    const stream_job *j = context;
    for (int64_t b = begin; b < end; b++) {
        const real *x = j->x + b * BLOCK;
        real *y = j->y + b * BLOCK;
        if (j->past_cache)
            for (int64_t i = 0; i < BLOCK; i += LANES) stream(y + i, load(x + i));
        else
            for (int64_t i = 0; i < BLOCK; i += LANES) store(y + i, load(x + i));
    }
    stream_end();
    return HL_OK;
}

/* Parallel over blocks of 2^14 elements in the order of memory; one read an element. */
int HL(peak_read)(int64_t blocks, const real *x, real *sums)
{
    stream_job job = {blocks, x, NULL, sums, 0};
    return hl_parallel_for(blocks, 4, read_blocks, &job);
}

/* Parallel over blocks of 2^14 elements in the order of memory; one read and one write an element, the write past the
 * cache where asked for and where y lies on a vector. */
int HL(peak_copy)(int64_t blocks, int64_t past_cache, const real *x, real *y)
{
    stream_job job = {blocks, x, y, NULL, past_cache && (uintptr_t)y % HL_VLEN == 0};
    return hl_parallel_for(blocks, 4, copy_blocks, &job);
}
