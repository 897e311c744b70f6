/* Softmax and its kin over the middle axis of [M, K, I]; functions of single elements. */
#include "activate.h"
#include "gemm.h"
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

/* Vectors that are walked down side by side: long reads, of which memory can tell the next. */
enum { ACROSS = 4096 / HL_VLEN };

/* The j-th vector of n values. */
static inline vreal across(const real *p, int64_t j, int64_t n)
{
    return take(p + j * LANES, min64(n - j * LANES, LANES), (real)0);
}
static inline __attribute__((always_inline)) void put_across(real *p, int64_t j, int64_t n, vreal v)
{
    put(p + j * LANES, min64(n - j * LANES, LANES), v);
}

/* Over the vectors of n values; a single one is kept in registers. */
#define EACH(j) for (int64_t j = 0; one ? j < 1 : j * LANES < n; j++)
#define COLUMNS(name) \
    static void name##_column(pointers p, int64_t K, int64_t stride, int64_t n) { name##_down(p, K, stride, n, 1); } \
    static void name##_columns(pointers p, int64_t K, int64_t stride, int64_t n) { name##_down(p, K, stride, n, 0); }

static inline __attribute__((always_inline)) void column_max(const real *x, int64_t K, int64_t stride, int64_t n,
                                                             int one, vreal top[ACROSS])
{
    EACH(j) top[j] = across(x, j, n);
    for (int64_t k = 1; k < K; k++) EACH(j) top[j] = vmax(top[j], across(x + k * stride, j, n));
}

static inline __attribute__((always_inline)) void softmax_down(pointers p, int64_t K, int64_t stride, int64_t n,
                                                               int one)
{
    vreal top[ACROSS], sum[ACROSS];
    column_max(p.a, K, stride, n, one, top);
    EACH(j) sum[j] = splat((real)0);
    for (int64_t k = 0; k < K; k++) EACH(j)
        {
            vreal e = vexp_below(across(p.a + k * stride, j, n) - top[j]);
            put_across(p.y + k * stride, j, n, e);
            sum[j] += e;
        }
    EACH(j) sum[j] = splat((real)1) / sum[j];
    for (int64_t k = 0; k < K; k++) EACH(j)
    put_across(p.y + k * stride, j, n, across(p.y + k * stride, j, n) * sum[j]);
}
COLUMNS(softmax)

static inline __attribute__((always_inline)) void log_softmax_down(pointers p, int64_t K, int64_t stride, int64_t n,
                                                                   int one)
{
    vreal top[ACROSS], sum[ACROSS];
    column_max(p.a, K, stride, n, one, top);
    EACH(j) sum[j] = splat((real)0);
    for (int64_t k = 0; k < K; k++) EACH(j) sum[j] += vexp_below(across(p.a + k * stride, j, n) - top[j]);
    EACH(j) sum[j] = vlog(sum[j]);
    for (int64_t k = 0; k < K; k++) EACH(j)
    put_across(p.y + k * stride, j, n, (across(p.a + k * stride, j, n) - top[j]) - sum[j]);
}
COLUMNS(log_softmax)

/* For slices whose maximum may be infinite: base(top) is 0 then, and what lies above it counts as 1, like every maximum. */
static inline vreal base(vreal top) { return blend(vabs(top) == splat((real)INFINITY), splat((real)0), top); }
static inline __attribute__((always_inline)) vreal bounded_exp(vreal x, vreal base)
{
    return vexp_below(vmin(x - base, splat((real)0)));
}

static inline __attribute__((always_inline)) void logsumexp_down(pointers p, int64_t K, int64_t stride, int64_t n,
                                                                 int one)
{
    vreal top[ACROSS], sum[ACROSS];
    if (K) column_max(p.a, K, stride, n, one, top);
    EACH(j)
    {
        if (!K) top[j] = splat((real)-INFINITY);
        sum[j] = splat((real)0);
    }
    for (int64_t k = 0; k < K; k++) EACH(j) sum[j] += bounded_exp(across(p.a + k * stride, j, n), base(top[j]));
    EACH(j) put_across(p.y, j, n, top[j] + vlog(sum[j]));
}
COLUMNS(logsumexp)

static inline __attribute__((always_inline)) void softmax_backward_down(pointers p, int64_t K, int64_t stride,
                                                                        int64_t n, int one)
{
    vreal sum[ACROSS];
    EACH(j) sum[j] = splat((real)0);
    for (int64_t k = 0; k < K; k++) EACH(j)
    sum[j] += across(p.a + k * stride, j, n) * across(p.b + k * stride, j, n);
    for (int64_t k = 0; k < K; k++) EACH(j)
        {
            vreal y = across(p.b + k * stride, j, n);
            put_across(p.y + k * stride, j, n, y * (across(p.a + k * stride, j, n) - sum[j]));
        }
}
COLUMNS(softmax_backward)

static inline __attribute__((always_inline)) void log_softmax_backward_down(pointers p, int64_t K, int64_t stride,
                                                                            int64_t n, int one)
{
    vreal sum[ACROSS];
    EACH(j) sum[j] = splat((real)0);
    for (int64_t k = 0; k < K; k++) EACH(j) sum[j] += across(p.a + k * stride, j, n);
    for (int64_t k = 0; k < K; k++) EACH(j)
        {
            vreal y = vexp(across(p.b + k * stride, j, n));
            put_across(p.y + k * stride, j, n, across(p.a + k * stride, j, n) - y * sum[j]);
        }
}
COLUMNS(log_softmax_backward)

/* ---- rows: K values side by side ---- */

/* n rows one after the other. */
typedef void (*rows_fn)(pointers p, int64_t K, int64_t n);

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

/* What a pass over a row leaves in y: exp(x - top), x - top, or nothing, where `top` may be infinite (see bounded_exp). */
enum pass { EXPONENTIALS, DIFFERENCES, BOUNDED };

static inline __attribute__((always_inline)) vreal pass_over(vreal x, vreal top, enum pass pass, real *y, int64_t n)
{
    if (pass == BOUNDED) return bounded_exp(x, top);
    vreal t = x - top, e = vexp_below(t);
    put(y, n, pass == EXPONENTIALS ? e : t);
    return e;
}

/* The sum of exp(x - top) over a row. The lanes that a last vector lacks count as -inf: they add 0, but for a `top` of -inf,
 * and then the row is NaN already. Sums of pieces, so that rounding does not grow with the row. */
static inline __attribute__((always_inline)) real row_sum_as(const real *x, int64_t K, vreal top, enum pass pass,
                                                             real *y, int64_t ahead)
{
    vreal sum = splat((real)0);
    int64_t i = 0;
    while (i < K) {
        int64_t stop = min64(K, i + PIECE);
        vreal s[2] = {splat((real)0), splat((real)0)};
        for (; i + 2 * LANES <= stop; i += 2 * LANES)
#pragma GCC unroll 2
            for (int j = 0; j < 2; j++) {
                fetch(x + i + j * LANES, ahead);
                if (pass != BOUNDED) fetch_to_write(y + i + j * LANES, ahead / 2);
                s[j] += pass_over(load(x + i + j * LANES), top, pass, y + i + j * LANES, LANES);
            }
        for (; i < stop; i += LANES) {
            int64_t n = min64(stop - i, LANES);
            s[0] += pass_over(take(x + i, n, (real)-INFINITY), top, pass, y + i, n);
        }
        sum += s[0] + s[1];
    }
    return sum_lanes(sum);
}
/* Without a branch inside where nothing is fetched: that would cost a tenth. */
static inline __attribute__((always_inline)) real row_sum(const real *x, int64_t K, vreal top, enum pass pass, real *y)
{
    return hl_ahead ? row_sum_as(x, K, top, pass, y, hl_ahead) : row_sum_as(x, K, top, pass, y, 0);
}

static inline __attribute__((always_inline)) vreal finished(vreal v, vreal by, int logarithm)
{
    return logarithm ? v - by : v * by;
}

/* The next row's maximum is found between the two passes over a row: the second waits for the sum of the first, lane after
 * lane, and for a division. */
static inline __attribute__((always_inline)) void softmax_over(pointers p, int64_t K, int64_t n, int logarithm)
{
    vreal next = row_max(p.a, K);
    for (; n > 0; n--, p.a += K, p.y += K) {
        real sum = row_sum(p.a, K, next, logarithm ? DIFFERENCES : EXPONENTIALS, p.y);
        vreal by = logarithm ? vlog(splat(sum)) : splat((real)1 / sum);
        if (n > 1) next = row_max(p.a + K, K);
        int64_t i = 0;
#pragma GCC unroll 4
        for (; i + LANES <= K; i += LANES) store(p.y + i, finished(load(p.y + i), by, logarithm));
        if (i < K) put(p.y + i, K - i, finished(take(p.y + i, K - i, (real)0), by, logarithm));
    }
}

/* A result that is written past the cache, whole vectors of memory at a time: what a row leaves of its last one waits for
 * the next row. */
typedef struct {
    real *y;         /* the vector that comes next */
    int64_t have;    /* elements that lie in it already */
    vreal rest;      /* with these in front */
    int64_t foreign; /* elements in it that are not of this result */
} vectors_out;

/* A row of K > 2 LANES elements behind LANES unused ones. `aligned`: as all before it, it begins and ends with a vector. */
static inline __attribute__((always_inline)) void write_row(vectors_out *out, const real *row, int64_t K, vreal by,
                                                            int logarithm, const int aligned)
{
    int64_t begin = aligned ? 0 : out->have, end = begin + K, i = 0;
    real *y = out->y;
    row -= begin;
    if (!aligned) {
        vreal first = blend(lanes_before(begin), out->rest, finished(load(row), by, logarithm));
        if (out->foreign) {
            for (int64_t k = out->foreign; k < LANES; k++) y[k] = first[k];
            out->foreign = 0;
        } else stream(y, first);
        i = LANES;
    }
#pragma GCC unroll 4
    for (; i + LANES <= end; i += LANES) stream(y + i, finished(load(row + i), by, logarithm));
    if (!aligned) out->rest = finished(load(row + i), by, logarithm);
    out->y = y + i;
    out->have = end - i;
}

/* Elements of a row; of rows of which several wait; how many those are at most. */
enum { ROW = 4096, WAITING = 2048, LATE = 16 };

/* As softmax_over, for a result that goes to memory: it passes through a row in the first cache, so that no line of y is
 * fetched before it is overwritten. A vector of y may have to be read from two of a row's. Just after they were stored, that
 * would wait for them: such rows are written some rows later. */
static inline __attribute__((always_inline)) void softmax_past_cache(pointers p, int64_t K, int64_t n, int logarithm,
                                                                     const int aligned)
{
    real rows[ROW + 2 * LANES] __attribute__((aligned(HL_VLEN))), by[LATE];
    int64_t have = (int64_t)((uintptr_t)p.y % HL_VLEN / sizeof(real)), pitch = round_up(K, LANES) + 2 * LANES, late = 0;
    while (!aligned && 2 * (late + 1) <= LATE && 2 * (late + 1) * pitch <= WAITING + 4 * LANES) late = 2 * late + 1;
    for (int64_t r = 0; r <= late; r++) { /* around a row, no numbers that take long to multiply */
        real *end = rows + (r + 1) * pitch;
        store(rows + r * pitch, splat((real)0));
        store(end - 2 * LANES, splat((real)0));
        store(end - LANES, splat((real)0));
    }
    vectors_out out = {p.y - have, have, splat((real)0), have};
    vreal next = row_max(p.a, K);
    for (int64_t r = 0; r < n + late; r++) {
        if (r < n) {
            const real *x = p.a + r * K;
            real sum = row_sum(x, K, next, logarithm ? DIFFERENCES : EXPONENTIALS, rows + (r & late) * pitch + LANES);
            by[r & late] = logarithm ? vlog(splat(sum))[0] : (real)1 / sum;
            if (r + 1 < n) next = row_max(x + K, K);
        }
        int64_t done = (r - late) & late;
        if (r >= late) write_row(&out, rows + done * pitch + LANES, K, splat(by[done]), logarithm, aligned);
    }
    if (out.have) put(out.y, out.have, out.rest);
    stream_end();
}
static inline __attribute__((always_inline)) void softmax_past(pointers p, int64_t K, int64_t n, int logarithm)
{
    if (K % LANES == 0 && (uintptr_t)p.y % HL_VLEN == 0) softmax_past_cache(p, K, n, logarithm, 1);
    else softmax_past_cache(p, K, n, logarithm, 0);
}
static void softmax_rows(pointers p, int64_t K, int64_t n) { softmax_over(p, K, n, 0); }
static void softmax_rows_past_cache(pointers p, int64_t K, int64_t n) { softmax_past(p, K, n, 0); }
static void log_softmax_rows(pointers p, int64_t K, int64_t n) { softmax_over(p, K, n, 1); }
static void log_softmax_rows_past_cache(pointers p, int64_t K, int64_t n) { softmax_past(p, K, n, 1); }

static void logsumexp_rows(pointers p, int64_t K, int64_t n)
{
    for (; n > 0; n--, p.a += K, p.y++) {
        vreal top = row_max(p.a, K);
        p.y[0] = (top + vlog(splat(row_sum(p.a, K, base(top), BOUNDED, NULL))))[0];
    }
}

static void softmax_backward_rows(pointers p, int64_t K, int64_t n)
{
    for (; n > 0; n--, p.a += K, p.b += K, p.y += K) {
        vreal sum = splat((real)0);
        for (int64_t i = 0; i < K; i += LANES) {
            int64_t m = min64(K - i, LANES);
            sum += take(p.a + i, m, (real)0) * take(p.b + i, m, (real)0);
        }
        sum = splat(sum_lanes(sum));
        for (int64_t i = 0; i < K; i += LANES) {
            int64_t m = min64(K - i, LANES);
            vreal y = take(p.b + i, m, (real)0);
            put(p.y + i, m, y * (take(p.a + i, m, (real)0) - sum));
        }
    }
}

static void log_softmax_backward_rows(pointers p, int64_t K, int64_t n)
{
    for (; n > 0; n--, p.a += K, p.b += K, p.y += K) {
        vreal sum = splat((real)0);
        for (int64_t i = 0; i < K; i += LANES) sum += take(p.a + i, min64(K - i, LANES), (real)0);
        sum = splat(sum_lanes(sum));
        for (int64_t i = 0; i < K; i += LANES) {
            int64_t m = min64(K - i, LANES);
            put(p.y + i, m, take(p.a + i, m, (real)0) - vexp(take(p.b + i, m, (real)0)) * sum);
        }
    }
}

/* ---- all slices ---- */

typedef struct {
    int64_t M, K, I;
    pointers p;
    int reduces; /* y is [M, I] */
    rows_fn rows, past_cache; /* the second for long rows of a y that is written past the cache, else NULL */
    column_fn column, columns; /* a vector, or as many as ACROSS */
    int64_t width;             /* positions i that are walked down together */
} slices_job;

/* Rows up to this long are turned, LANES of them at a time, so that a vector holds one value of each: transposing a vector
 * costs less than a step across the lanes, and the wait for it, do in a row of a vector or two. */
enum { SHORT = 40 };

static pointers pointers_at(const slices_job *j, int64_t m)
{
    int64_t at = m * j->K * j->I;
    return (pointers){j->p.a + at, j->p.b ? j->p.b + at : NULL, j->p.y + (j->reduces ? m * j->I : at)};
}

static int short_rows(int64_t begin, int64_t end, void *context)
{
    const slices_job *j = context;
    int64_t K = j->K, KY = j->reduces ? 1 : K;
    real a[SHORT * LANES], b[SHORT * LANES], y[SHORT * LANES];
    for (int64_t block = begin; block < end; block++) {
        int64_t n = min64(LANES, j->M - block * LANES);
        pointers p = pointers_at(j, block * LANES);
        if (n < LANES / 2) {
            j->rows(p, K, n);
            continue;
        }
        gemm_transpose(n, K, p.a, K, a, LANES);
        if (p.b) gemm_transpose(n, K, p.b, K, b, LANES);
        j->column((pointers){a, b, y}, K, LANES, n);
        gemm_transpose(KY, n, y, LANES, p.y, KY);
    }
    return HL_OK;
}

static int long_rows(int64_t begin, int64_t end, void *context)
{
    const slices_job *j = context;
    (j->past_cache ? j->past_cache : j->rows)(pointers_at(j, begin), j->K, end - begin);
    return HL_OK;
}

static int columns(int64_t begin, int64_t end, void *context)
{
    const slices_job *j = context;
    int64_t per_slice = (j->I + j->width - 1) / j->width;
    for (int64_t block = begin; block < end; block++) {
        int64_t i = block % per_slice * j->width;
        pointers p = pointers_at(j, block / per_slice);
        (j->width > LANES ? j->columns : j->column)((pointers){p.a + i, p.b ? p.b + i : NULL, p.y + i}, j->K, j->I,
                                                    min64(j->width, j->I - i));
    }
    return HL_OK;
}

/* Parallel over rows (I = 1; LANES short ones together) or over `width` positions i of a slice. A slice is read once from
 * memory, then from the nearest caches; each result is written once. Source: the shifted exponential, Goodfellow et al., Deep
 * Learning (2016), section 4.1. */
static int slices(slices_job *j)
{
    double work = 8.0 * (double)j->K;
    if (j->I == 1 && j->K > SHORT) return hl_parallel_for(j->M, hl_grain(work), long_rows, j);
    if (j->I == 1 && j->K) return hl_parallel_for((j->M + LANES - 1) / LANES, hl_grain(work * LANES), short_rows, j);
    j->width = j->I > ACROSS * LANES / 4 ? ACROSS * LANES : LANES; /* one after the other reads every cache line, too */
    while (j->width > 4 * LANES && j->M * (j->I / j->width) < 16) j->width /= 2; /* something for every thread */
    return hl_parallel_for(j->M * ((j->I + j->width - 1) / j->width), hl_grain(work * (double)j->width), columns, j);
}

/* `fn` for rows that fit into its buffer, of a result that the last cache cannot hold: exponentials take so long that below
 * that, one thread would be 10 % slower. */
static rows_fn past_cache(int64_t M, int64_t K, int64_t I, rows_fn fn)
{
    return I == 1 && K > SHORT && K <= ROW && M * K > 4 * CACHE_BYTES / (int64_t)sizeof(real) ? fn : NULL;
}

int HL(softmax)(const hl_softmax_plan *p, const real *x, real *y)
{
    rows_fn past = past_cache(p->M, p->K, p->I, softmax_rows_past_cache);
    return slices(
        &(slices_job){p->M, p->K, p->I, {x, NULL, y}, 0, softmax_rows, past, softmax_column, softmax_columns, LANES});
}

int HL(log_softmax)(const hl_log_softmax_plan *p, const real *x, real *y)
{
    rows_fn past = past_cache(p->M, p->K, p->I, log_softmax_rows_past_cache);
    return slices(&(slices_job){
        p->M, p->K, p->I, {x, NULL, y}, 0, log_softmax_rows, past, log_softmax_column, log_softmax_columns, LANES});
}

int HL(logsumexp)(const hl_logsumexp_plan *p, const real *x, real *y)
{
    return slices(&(slices_job){
        p->M, p->K, p->I, {x, NULL, y}, 1, logsumexp_rows, NULL, logsumexp_column, logsumexp_columns, LANES});
}

int HL(softmax_backward)(const hl_softmax_backward_plan *p, const real *gy, const real *y, real *gx)
{
    return slices(&(slices_job){p->M,
                                p->K,
                                p->I,
                                {gy, y, gx},
                                0,
                                softmax_backward_rows,
                                NULL,
                                softmax_backward_column,
                                softmax_backward_columns,
                                LANES});
}

int HL(log_softmax_backward)(const hl_log_softmax_backward_plan *p, const real *gy, const real *y, real *gx)
{
    return slices(&(slices_job){p->M,
                                p->K,
                                p->I,
                                {gy, y, gx},
                                0,
                                log_softmax_backward_rows,
                                NULL,
                                log_softmax_backward_column,
                                log_softmax_backward_columns,
                                LANES});
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

/* ---- element by element ---- */

enum { RELU = 1, RELU6, SIGMOID, TANH, SILU, GELU };

/* The value, and in *slope the derivative. A NaN stays NaN; what multiplies an infinity by 0 is 0. */
static inline __attribute__((always_inline)) vreal activated(const int function, vreal x, vreal *slope)
{
    const vreal zero = splat((real)0), one = splat((real)1), six = splat((real)6);
    vreal y = x, d = one;
    if (function == RELU || function == RELU6) {
        y = vmax(x, zero);
        d = blend(x > zero, one, zero);
        if (function == RELU6) {
            y = vmin(y, six);
            d = blend(x < six, d, zero);
        }
    } else if (function == TANH) {
        vreal e = vexp(splat((real)-2) * vabs(x));
        y = vtanh(x);
        d = splat((real)4) * e / ((one + e) * (one + e)); /* 1 - y * y would lose its digits */
    } else if (function == GELU) {
        vreal share = splat((real)0.5) * (one + verf(x * splat((real)0.70710678118654752440)));
        y = blend(share == zero, zero, x * share);
        vreal bell = vexp(splat((real)-0.5) * x * x) * splat((real)0.39894228040143267794);
        d = share + blend(bell == zero, zero, x * bell);
    } else if (function != 0) {
        vreal share = vsigmoid(x), change = share * vsigmoid(-x);
        y = function == SIGMOID ? share : blend(share == zero, zero, x * share);
        d = function == SIGMOID ? change : share + blend(change == zero, zero, x * change);
    }
    *slope = function ? blend((vint)(x == x), d, x) : one;
    return blend((vint)(x == x), y, x);
}

/* With gy: the derivative times gy. */
static inline __attribute__((always_inline)) void activate_loop(const int function, int64_t n, const real *x,
                                                                const real *gy, real *y)
{
    for (int64_t i = 0; i < n; i += LANES) {
        int64_t width = min64(LANES, n - i);
        vreal slope, value = activated(function, take(x + i, width, (real)0), &slope);
        put(y + i, width, gy ? slope * take(gy + i, width, (real)0) : value);
    }
}
static void activate_any(int64_t function, int64_t n, const real *x, const real *gy, real *y)
{
    switch (function) {
#define FUNCTION(f) \
    case f: gy ? activate_loop(f, n, x, gy, y) : activate_loop(f, n, x, NULL, y); break;
        FUNCTION(RELU)
        FUNCTION(RELU6)
        FUNCTION(SIGMOID)
        FUNCTION(TANH)
        FUNCTION(SILU)
        FUNCTION(GELU)
    default: gy ? activate_loop(0, n, x, gy, y) : activate_loop(0, n, x, NULL, y);
    }
}

void activate_row(int64_t function, int64_t n, const real *x, real *y) { activate_any(function, n, x, NULL, y); }
void activate_rows(int64_t function, int64_t rows, int64_t n, real *y, int64_t pitch)
{
    for (int64_t r = 0; r < rows && function; r++) activate_any(function, n, y + r * pitch, NULL, y + r * pitch);
}

typedef struct {
    int64_t function;
    const real *x, *gy;
    real *y;
} activate_job;
static int activate_range(int64_t begin, int64_t end, void *context)
{
    const activate_job *j = context;
    activate_any(j->function, end - begin, j->x + begin, j->gy ? j->gy + begin : NULL, j->y + begin);
    return HL_OK;
}

/* Parallel over elements. Reads x once, writes y once. */
int HL(activate)(const hl_activate_plan *p, const real *x, real *y)
{
    activate_job job = {p->function, x, NULL, y};
    return hl_parallel_for(p->N, round_up(hl_grain(4), LANES), activate_range, &job);
}

/* As activate; reads gy, too. */
int HL(activate_backward)(const hl_activate_backward_plan *p, const real *x, const real *gy, real *gx)
{
    activate_job job = {p->function, x, gy, gx};
    return hl_parallel_for(p->N, round_up(hl_grain(4), LANES), activate_range, &job);
}
