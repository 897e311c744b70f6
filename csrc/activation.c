/* Softmax and its kin over the middle axis of [M, K, I]. */
#include "vmath.h"

typedef struct {
    const hl_softmax_plan *p;
    const real *x;
    real *y;
} softmax_job;

/* One row of n contiguous values. */
static void softmax_row(const real *x, real *y, int64_t n)
{
    vreal m = splat((real)-INFINITY), s = splat((real)0);
    int64_t i = 0, tail = n % LANES, body = n - tail;
    for (; i < body; i += LANES) m = vmax(m, load(x + i));
    if (tail) m = vmax(m, load_part(x + i, tail, (real)-INFINITY));
    vreal top = splat(max_lanes(m));
    for (i = 0; i < body; i += LANES) {
        vreal e = vexp(load(x + i) - top);
        store(y + i, e);
        s += e;
    }
    if (tail) {
        vreal e = vexp(load_part(x + i, tail, (real)-INFINITY) - top);
        store_part(y + i, tail, e);
        s += load_part(y + i, tail, (real)0);
    }
    vreal scale = splat((real)1 / sum_lanes(s));
    for (i = 0; i < body; i += LANES) store(y + i, load(y + i) * scale);
    if (tail) store_part(y + i, tail, load_part(y + i, tail, (real)0) * scale);
}

static int softmax_rows(int64_t begin, int64_t end, void *context)
{
    const softmax_job *j = context;
    for (int64_t r = begin; r < end; r++) softmax_row(j->x + r * j->p->K, j->y + r * j->p->K, j->p->K);
    return HL_OK;
}

/* Parallel over rows. A row is read twice and written twice while it sits in cache.
 * Source: the usual shifted exponential (Goodfellow et al., Deep Learning, 4.1). */
int HL(softmax)(const hl_softmax_plan *p, const real *x, real *y)
{
    softmax_job job = {p, x, y};
    return hl_parallel_for(p->M, hl_grain((double)p->K * 8), softmax_rows, &job);
}
