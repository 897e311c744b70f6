/* Softmax and its kin over the middle axis of [M, K, I]. */
#include "vmath.h"

/* ---- columns: LANES neighbouring positions i, K values each, `stride` apart; the lanes from n on are not there ---- */

static inline __attribute__((always_inline)) vreal take(const real *p, int64_t n, real fill)
{
    return n == LANES ? load(p) : load_part(p, n, fill);
}
static inline __attribute__((always_inline)) void put(real *p, int64_t n, vreal v)
{
    if (n == LANES) store(p, v);
    else store_part(p, n, v);
}

typedef struct {
    const real *a, *b;
    real *y;
} pointers;
typedef void (*column_fn)(pointers p, int64_t K, int64_t stride, int64_t n);

static inline vreal column_max(const real *x, int64_t K, int64_t stride, int64_t n)
{
    vreal top = take(x, n, (real)0);
    for (int64_t k = 1; k < K; k++) top = vmax(top, take(x + k * stride, n, (real)0));
    return top;
}

static void softmax_column(pointers p, int64_t K, int64_t stride, int64_t n)
{
    vreal top = column_max(p.a, K, stride, n), sum = splat((real)0);
    for (int64_t k = 0; k < K; k++) {
        vreal e = vexp_below(take(p.a + k * stride, n, (real)0) - top);
        put(p.y + k * stride, n, e);
        sum += e;
    }
    vreal scale = splat((real)1) / sum;
    for (int64_t k = 0; k < K; k++) put(p.y + k * stride, n, take(p.y + k * stride, n, (real)0) * scale);
}

static void log_softmax_column(pointers p, int64_t K, int64_t stride, int64_t n)
{
    vreal top = column_max(p.a, K, stride, n), sum = splat((real)0);
    for (int64_t k = 0; k < K; k++) sum += vexp_below(take(p.a + k * stride, n, (real)0) - top);
    sum = vlog(sum);
    for (int64_t k = 0; k < K; k++) put(p.y + k * stride, n, (take(p.a + k * stride, n, (real)0) - top) - sum);
}

static void logsumexp_column(pointers p, int64_t K, int64_t stride, int64_t n)
{
    vreal top = K ? column_max(p.a, K, stride, n) : splat((real)-INFINITY), sum = splat((real)0);
    vreal base = blend(vabs(top) == splat((real)INFINITY), splat((real)0), top);
    for (int64_t k = 0; k < K; k++) sum += vexp(take(p.a + k * stride, n, (real)0) - base);
    put(p.y, n, base + vlog(sum));
}

static void softmax_backward_column(pointers p, int64_t K, int64_t stride, int64_t n)
{
    vreal sum = splat((real)0);
    for (int64_t k = 0; k < K; k++) sum += take(p.a + k * stride, n, (real)0) * take(p.b + k * stride, n, (real)0);
    for (int64_t k = 0; k < K; k++) {
        vreal y = take(p.b + k * stride, n, (real)0);
        put(p.y + k * stride, n, y * (take(p.a + k * stride, n, (real)0) - sum));
    }
}

static void log_softmax_backward_column(pointers p, int64_t K, int64_t stride, int64_t n)
{
    vreal sum = splat((real)0);
    for (int64_t k = 0; k < K; k++) sum += take(p.a + k * stride, n, (real)0);
    for (int64_t k = 0; k < K; k++) {
        vreal y = vexp(take(p.b + k * stride, n, (real)0));
        put(p.y + k * stride, n, take(p.a + k * stride, n, (real)0) - y * sum);
    }
}

/* ---- rows: K values side by side ---- */

/* A row is written past the cache when `past` says so: through `row`, K elements of scratch, as long as the row needs
 * another pass. */
typedef void (*row_fn)(pointers p, int64_t K, real *row, int past);

enum { PIECE = 64 * LANES };

static inline vreal row_max(const real *x, int64_t K)
{
    /* Four maxima at a time; a NaN that they pass over comes back in the sum. */
    vreal m[4];
    for (int j = 0; j < 4; j++) m[j] = splat((real)-INFINITY);
    int64_t i = 0;
    for (; i + 4 * LANES <= K; i += 4 * LANES)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) m[j] = vmax(m[j], load(x + i + j * LANES));
    for (; i + LANES <= K; i += LANES) m[0] = vmax(m[0], load(x + i));
    if (i < K) m[0] = vmax(m[0], load_part(x + i, K - i, (real)-INFINITY));
    return splat(max_lanes(vmax(vmax(m[0], m[1]), vmax(m[2], m[3]))));
}

/* How many elements of y come before one that `stream` may write at. */
static inline int64_t before_aligned(const real *y, int64_t K)
{
    return min64(K, (int64_t)((HL_VLEN - (uintptr_t)y % HL_VLEN) % HL_VLEN / sizeof(real)));
}

static void softmax_row(pointers p, int64_t K, real *row, int past)
{
    const real *x = p.a;
    real *e = past ? row : p.y;
    vreal top = row_max(x, K), sum = splat((real)0);
    int64_t i = 0;
    while (i < K) { /* sums of pieces, so that rounding does not grow with the row */
        int64_t stop = min64(K, i + PIECE);
        vreal s[2] = {splat((real)0), splat((real)0)};
        for (; i + 2 * LANES <= stop; i += 2 * LANES)
#pragma GCC unroll 2
            for (int j = 0; j < 2; j++) {
                vreal v = vexp_below(load(x + i + j * LANES) - top);
                store(e + i + j * LANES, v);
                s[j] += v;
            }
        for (; i < stop; i += LANES) {
            int64_t n = min64(stop - i, LANES);
            vreal v = vexp_below(take(x + i, n, (real)-INFINITY) - top);
            put(e + i, n, v);
            s[0] += n == LANES ? v : load_part(e + i, n, (real)0);
        }
        sum += s[0] + s[1];
    }
    vreal scale = splat((real)1 / sum_lanes(sum));
    i = 0;
    if (past) {
        i = before_aligned(p.y, K);
        if (i) store_part(p.y, i, take(row, i, (real)0) * scale);
        for (; i + LANES <= K; i += LANES) stream(p.y + i, load(row + i) * scale);
    }
    for (; i + LANES <= K; i += LANES) store(p.y + i, load(e + i) * scale);
    if (i < K) store_part(p.y + i, K - i, load_part(e + i, K - i, (real)0) * scale);
}

static inline vreal row_exp_sum(const real *x, int64_t K, vreal top)
{
    vreal sum = splat((real)0);
    int64_t i = 0;
    while (i < K) {
        int64_t stop = min64(K, i + PIECE);
        vreal s[2] = {splat((real)0), splat((real)0)};
        for (; i + 2 * LANES <= stop; i += 2 * LANES)
#pragma GCC unroll 2
            for (int j = 0; j < 2; j++) s[j] += vexp(load(x + i + j * LANES) - top);
        for (; i < stop; i += LANES) s[0] += vexp(take(x + i, min64(stop - i, LANES), (real)-INFINITY) - top);
        sum += s[0] + s[1];
    }
    return splat(sum_lanes(sum));
}

/* The lanes that a last vector lacks hold exp(-inf - top) = 0 there, except where top is -inf: the row is NaN already. */
static void log_softmax_row(pointers p, int64_t K, real *row, int past)
{
    (void)row;
    const real *x = p.a;
    vreal top = row_max(x, K), rest = vlog(row_exp_sum(x, K, top));
    int64_t i = 0;
    if (past) {
        i = before_aligned(p.y, K);
        if (i) store_part(p.y, i, (load_part(x, i, (real)0) - top) - rest);
        for (; i + LANES <= K; i += LANES) stream(p.y + i, (load(x + i) - top) - rest);
    }
    for (; i < K; i += LANES) {
        int64_t n = min64(K - i, LANES);
        put(p.y + i, n, (take(x + i, n, (real)0) - top) - rest);
    }
}

static void logsumexp_row(pointers p, int64_t K, real *row, int past)
{
    (void)row, (void)past;
    vreal top = row_max(p.a, K);
    vreal base = blend(vabs(top) == splat((real)INFINITY), splat((real)0), top);
    vreal y = base + vlog(row_exp_sum(p.a, K, base));
    p.y[0] = y[0];
}

static void softmax_backward_row(pointers p, int64_t K, real *row, int past)
{
    (void)row, (void)past;
    vreal sum = splat((real)0);
    int64_t i = 0;
    for (; i < K; i += LANES) {
        int64_t n = min64(K - i, LANES);
        sum += take(p.a + i, n, (real)0) * take(p.b + i, n, (real)0);
    }
    sum = splat(sum_lanes(sum));
    for (i = 0; i < K; i += LANES) {
        int64_t n = min64(K - i, LANES);
        vreal y = take(p.b + i, n, (real)0);
        put(p.y + i, n, y * (take(p.a + i, n, (real)0) - sum));
    }
}

static void log_softmax_backward_row(pointers p, int64_t K, real *row, int past)
{
    (void)row, (void)past;
    vreal sum = splat((real)0);
    int64_t i = 0;
    for (; i < K; i += LANES) sum += take(p.a + i, min64(K - i, LANES), (real)0);
    sum = splat(sum_lanes(sum));
    for (i = 0; i < K; i += LANES) {
        int64_t n = min64(K - i, LANES);
        put(p.y + i, n, take(p.a + i, n, (real)0) - vexp(take(p.b + i, n, (real)0)) * sum);
    }
}

/* ---- all slices ---- */

typedef struct {
    int64_t M, K, I;
    pointers p;
    int reduces; /* y is [M, I] */
    row_fn row;
    column_fn column;
    int past;
} slices_job;

/* Rows this short are turned, LANES of them at a time, so that a vector holds one value of each. */
enum { SHORT = 16 };

static int short_rows(int64_t begin, int64_t end, void *context)
{
    const slices_job *j = context;
    int64_t K = j->K, KY = j->reduces ? 1 : K;
    real a[SHORT * LANES], b[SHORT * LANES], y[SHORT * LANES];
    for (int64_t block = begin; block < end; block++) {
        int64_t r = block * LANES, n = min64(LANES, j->M - r);
        for (int64_t i = 0; i < n; i++)
            for (int64_t k = 0; k < K; k++) a[k * LANES + i] = j->p.a[(r + i) * K + k];
        for (int64_t i = 0; i < n && j->p.b; i++)
            for (int64_t k = 0; k < K; k++) b[k * LANES + i] = j->p.b[(r + i) * K + k];
        j->column((pointers){a, b, y}, K, LANES, n);
        for (int64_t i = 0; i < n; i++)
            for (int64_t k = 0; k < KY; k++) j->p.y[(r + i) * KY + k] = y[k * LANES + i];
    }
    return HL_OK;
}

static int long_rows(int64_t begin, int64_t end, void *context)
{
    const slices_job *j = context;
    int64_t K = j->K, KY = j->reduces ? 1 : K;
    real *row = j->past ? hl_take((size_t)K * sizeof(real)) : NULL;
    if (j->past && !row) return HL_NOMEM;
    for (int64_t r = begin; r < end; r++)
        j->row((pointers){j->p.a + r * K, j->p.b ? j->p.b + r * K : NULL, j->p.y + r * KY}, K, row, j->past);
    if (j->past) stream_end();
    hl_give(row);
    return HL_OK;
}

static int columns(int64_t begin, int64_t end, void *context)
{
    const slices_job *j = context;
    int64_t per_slice = (j->I + LANES - 1) / LANES, KY = j->reduces ? 1 : j->K;
    for (int64_t block = begin; block < end; block++) {
        int64_t m = block / per_slice, i = block % per_slice * LANES, from = m * j->K * j->I + i;
        pointers p = {j->p.a + from, j->p.b ? j->p.b + from : NULL, j->p.y + m * KY * j->I + i};
        j->column(p, j->K, j->I, min64(LANES, j->I - i));
    }
    return HL_OK;
}

/* Results from here on are written past the cache: they would not stay in it, and a line need not be read to be written. */
enum { PAST_CACHE = 8 << 20 };

/* Parallel over rows (I = 1; LANES short ones together) or over LANES positions i of a slice. A slice is read once from
 * memory, then from the nearest caches; each result is written once. Source: the shifted exponential, Goodfellow et al., Deep
 * Learning (2016), section 4.1. */
static int slices(slices_job *j)
{
    double work = 8.0 * (double)j->K;
    if (j->I == 1 && j->K <= SHORT && j->K)
        return hl_parallel_for((j->M + LANES - 1) / LANES, hl_grain(work * LANES), short_rows, j);
    if (j->I == 1 && j->K) {
        j->past = !j->reduces && j->M * j->K * (int64_t)sizeof(real) >= PAST_CACHE;
        return hl_parallel_for(j->M, hl_grain(work), long_rows, j);
    }
    return hl_parallel_for(j->M * ((j->I + LANES - 1) / LANES), hl_grain(work * LANES), columns, j);
}

int HL(softmax)(const hl_softmax_plan *p, const real *x, real *y)
{
    return slices(&(slices_job){p->M, p->K, p->I, {x, NULL, y}, 0, softmax_row, softmax_column, 0});
}

int HL(log_softmax)(const hl_log_softmax_plan *p, const real *x, real *y)
{
    return slices(&(slices_job){p->M, p->K, p->I, {x, NULL, y}, 0, log_softmax_row, log_softmax_column, 0});
}

int HL(logsumexp)(const hl_logsumexp_plan *p, const real *x, real *y)
{
    return slices(&(slices_job){p->M, p->K, p->I, {x, NULL, y}, 1, logsumexp_row, logsumexp_column, 0});
}

int HL(softmax_backward)(const hl_softmax_backward_plan *p, const real *gy, const real *y, real *gx)
{
    return slices(&(slices_job){p->M, p->K, p->I, {gy, y, gx}, 0, softmax_backward_row, softmax_backward_column, 0});
}

int HL(log_softmax_backward)(const hl_log_softmax_backward_plan *p, const real *gy, const real *y, real *gx)
{
    return slices(
        &(slices_job){p->M, p->K, p->I, {gy, y, gx}, 0, log_softmax_backward_row, log_softmax_backward_column, 0});
}

typedef struct {
    const hl_logsumexp_backward_plan *p;
    const real *gy, *x, *y;
    real *gx;
} logsumexp_backward_job;

static int logsumexp_backward_rows(int64_t begin, int64_t end, void *context)
{
    const logsumexp_backward_job *j = context;
    int64_t K = j->p->K, I = j->p->I;
    for (int64_t row = begin; row < end; row++) { /* of x, I long; with I = 1 there are K of them in one */
        int64_t m = I == 1 ? row : row / K, length = I == 1 ? K : I;
        const real *x = j->x + row * length, *gy = j->gy + m * I, *y = j->y + m * I;
        for (int64_t i = 0; i < length; i += LANES) {
            int64_t n = min64(LANES, length - i);
            vreal g = I == 1 ? splat(gy[0]) : take(gy + i, n, (real)0),
                  low = I == 1 ? splat(y[0]) : take(y + i, n, (real)0);
            put(j->gx + row * length + i, n, g * vexp(take(x + i, n, (real)0) - low));
        }
    }
    return HL_OK;
}

/* Parallel over rows of x. Reads x once, writes gx once. */
int HL(logsumexp_backward)(const hl_logsumexp_backward_plan *p, const real *gy, const real *x, const real *y, real *gx)
{
    logsumexp_backward_job job = {p, gy, x, y, gx};
    int64_t length = p->I == 1 ? p->K : p->I;
    return hl_parallel_for(p->I == 1 ? p->M : p->M * p->K, hl_grain(6.0 * (double)length), logsumexp_backward_rows,
                           &job);
}
