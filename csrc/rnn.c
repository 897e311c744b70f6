/* Recurrent layers over a sequence. The product of the input with its weights comes ready in `gates`; each step adds that
 * of the state, then applies the gates while they are in cache.
 *
 * All of them: parallel over samples, in groups that each walk the whole sequence alone, so that no step waits for another
 * thread; the recurrent weights are packed once. A group's rows of `gates` are the product's result and the gates' place:
 * per step and sample G H values read and written, H written to y. */
#include "gemm.h"
#include "vmath.h"

/* Samples that share a pass over the packed weights. 16 rows halve the traffic from the second cache against 8, and two
 * threads still have a group each from 32 samples on. */
enum { GROUP = 16 };

static inline int64_t group_size(int64_t N) { return N >= 2 * GROUP ? GROUP : N > GROUP ? (N + 1) / 2 : N; }

static inline vreal load_n(const real *p, int64_t n) { return n == LANES ? load(p) : load_part(p, n, (real)0); }
static inline void store_n(real *p, int64_t n, vreal v)
{
    if (n == LANES) store(p, v);
    else store_part(p, n, v);
}
/* 0 where there is no array. */
static inline vreal load_or_0(const real *p, int64_t j, int64_t n) { return p ? load_n(p + j, n) : splat((real)0); }

static inline vreal limited(vreal x, vreal clip)
{
    vreal low = blend(x < -clip, -clip, x);
    return blend(low > clip, clip, low);
}
/* 1 where the argument of the gate was within the clip: strictly between the function's values at its ends. */
static inline vreal inside(vreal gate, vreal low, vreal high)
{
    return blend((gate > low) & (gate < high), splat((real)1), splat((real)0));
}

/* Is step t of a sample of `length` steps one that counts; the sizes of a walk. */
typedef struct {
    int64_t T, N, H, reverse;
    const int64_t *lengths;
} walk;

static inline int counts(const walk *w, int64_t n, int64_t t) { return !w->lengths || t < w->lengths[n]; }
static inline int64_t step(const walk *w, int64_t k) { return w->reverse ? w->T - 1 - k : k; }
/* The state before step t of sample n, of states kept by step. */
static inline const real *before(const walk *w, const real *states, const real *first, int64_t t, int64_t n)
{
    int64_t last = w->lengths ? w->lengths[n] : w->T;
    int has = w->reverse ? t + 1 < last : t > 0;
    return has ? states + ((w->reverse ? t + 1 : t - 1) * w->N + n) * w->H : first + n * w->H;
}

static void copy_rows(real *to, const real *from, int64_t count)
{
    if (count) memcpy(to, from, (size_t)count * sizeof(real));
}
static void clear(real *to, int64_t count)
{
    if (to && count) memset(to, 0, (size_t)count * sizeof(real));
}
static void copy_or_clear(real *to, const real *from, int64_t count)
{
    if (from) copy_rows(to, from, count);
    else clear(to, count);
}

/* c[rows, columns] (+)= state[rows, H] W^T from the packed weights. */
static int product(int64_t rows, int64_t columns, int64_t depth, const real *a, int64_t a_row, const real *packed,
                   real *c, int64_t c_row, int accumulate)
{
    gemm_call call = {.M = rows,
                      .N = columns,
                      .K = depth,
                      .a = a,
                      .a_row = a_row,
                      .a_col = 1,
                      .packed_b = packed,
                      .c = c,
                      .c_row = c_row,
                      .accumulate = accumulate};
    return gemm(&call);
}

/* Packs w[rows_out, depth] as the right side of a product: transposed (state W^T) or as it is (gradient W). */
static real *packed_weights(const real *w, int64_t rows, int64_t columns, int transposed)
{
    int64_t K = transposed ? columns : rows, N = transposed ? rows : columns;
    real *packed = hl_take((size_t)gemm_packed_b_size(K, N) * sizeof(real));
    if (packed) gemm_pack_b(K, N, w, transposed ? 1 : columns, transposed ? columns : 1, packed);
    return packed;
}

/* ---- lstm ---- */

typedef struct {
    walk w;
    real *gates;
    const real *packed, *b_hh, *peephole, *h0, *c0;
    real *y, *hn, *cn, *cells, *previous, clip;
} lstm_job;

/* The gates of one sample at one step: reads and writes a[4H], updates c and h. */
static void lstm_gates(const lstm_job *j, real *a, real *c, real *h)
{
    int64_t H = j->w.H;
    const real *p = j->peephole, *b = j->b_hh;
    vreal clip = splat(j->clip);
    for (int64_t k = 0; k < H; k += LANES) {
        int64_t n = min64(LANES, H - k);
        vreal a_i = load_n(a + k, n) + load_or_0(b, k, n);
        vreal a_f = load_n(a + H + k, n) + load_or_0(b, H + k, n);
        vreal a_g = load_n(a + 2 * H + k, n) + load_or_0(b, 2 * H + k, n);
        vreal a_o = load_n(a + 3 * H + k, n) + load_or_0(b, 3 * H + k, n);
        vreal cell = load_n(c + k, n);
        if (p) {
            a_i += load_n(p + k, n) * cell;
            a_f += load_n(p + 2 * H + k, n) * cell;
        }
        if (j->clip > 0) {
            a_i = limited(a_i, clip);
            a_f = limited(a_f, clip);
            a_g = limited(a_g, clip);
        }
        vreal i = vsigmoid(a_i), f = vsigmoid(a_f), g = vtanh(a_g);
        cell = f * cell + i * g;
        if (p) a_o += load_n(p + H + k, n) * cell;
        if (j->clip > 0) a_o = limited(a_o, clip);
        vreal o = vsigmoid(a_o);
        store_n(a + k, n, i);
        store_n(a + H + k, n, f);
        store_n(a + 2 * H + k, n, g);
        store_n(a + 3 * H + k, n, o);
        store_n(c + k, n, cell);
        store_n(h + k, n, o * vtanh(cell));
    }
}

static int lstm_group(int64_t begin, int64_t end, void *context)
{
    const lstm_job *j = context;
    const walk *w = &j->w;
    int64_t N = w->N, H = w->H, rows = end - begin;
    real *h = j->hn + begin * H, *c = j->cn + begin * H;
    copy_rows(h, j->h0 + begin * H, rows * H);
    copy_rows(c, j->c0 + begin * H, rows * H);
    for (int64_t k = 0; k < w->T; k++) {
        int64_t t = step(w, k), first = t * N + begin;
        real *a = j->gates + first * 4 * H;
        int status = product(rows, 4 * H, H, h, H, j->packed, a, 4 * H, 1);
        if (status != HL_OK) return status;
        for (int64_t r = 0; r < rows; r++) {
            int64_t at = (first + r) * H;
            if (!counts(w, begin + r, t)) {
                clear(a + r * 4 * H, 4 * H);
                clear(j->y + at, H);
                clear(j->cells ? j->cells + at : NULL, H);
                clear(j->previous ? j->previous + at : NULL, H);
                continue;
            }
            if (j->previous) copy_rows(j->previous + at, h + r * H, H);
            lstm_gates(j, a + r * 4 * H, c + r * H, h + r * H);
            copy_rows(j->y + at, h + r * H, H);
            if (j->cells) copy_rows(j->cells + at, c + r * H, H);
        }
    }
    return HL_OK;
}

/* Source: Hochreiter and Schmidhuber (1997). */
int HL(lstm_sequence)(const hl_lstm_sequence_plan *p, real *gates, const real *h0, const real *c0, const real *w_hh,
                      const real *b_hh, const real *peephole, const int64_t *lengths, real *y, real *hn, real *cn,
                      real *cells, real *previous)
{
    real *packed = packed_weights(w_hh, 4 * p->H, p->H, 1);
    if (!packed) return HL_NOMEM;
    lstm_job job = {{p->T, p->N, p->H, p->reverse, lengths},
                    gates,
                    packed,
                    b_hh,
                    peephole,
                    h0,
                    c0,
                    y,
                    hn,
                    cn,
                    cells,
                    previous,
                    (real)p->clip};
    int status = hl_parallel_for(p->N, group_size(p->N), lstm_group, &job);
    hl_give(packed);
    return status;
}

typedef struct {
    walk w;
    const real *gy, *ghn, *gcn, *gates, *cells, *c0, *packed, *peephole;
    real *gpre, *gh0, *gc0, clip, sigmoid_edge[2], tanh_edge[2];
} lstm_back_job;

/* One sample at one step: from the gradients of h (dh) and of the cell after the step (gc) to those of the gates'
 * arguments and of the cell before it (gc). */
static void lstm_gates_back(const lstm_back_job *j, const real *gate, const real *cell, const real *earlier,
                            const real *dh, const real *gy, real *gc, real *gpre)
{
    int64_t H = j->w.H;
    const real *p = j->peephole;
    vreal one = splat((real)1);
    vreal s_low = splat(j->sigmoid_edge[0]), s_high = splat(j->sigmoid_edge[1]);
    vreal t_low = splat(j->tanh_edge[0]), t_high = splat(j->tanh_edge[1]);
    for (int64_t k = 0; k < H; k += LANES) {
        int64_t n = min64(LANES, H - k);
        vreal i = load_n(gate + k, n), f = load_n(gate + H + k, n);
        vreal g = load_n(gate + 2 * H + k, n), o = load_n(gate + 3 * H + k, n);
        vreal tanh_c = vtanh(load_n(cell + k, n)), was = load_n(earlier + k, n);
        vreal d = load_n(dh + k, n) + load_or_0(gy, k, n);
        vreal d_o = d * tanh_c * o * (one - o);
        if (j->clip > 0) d_o *= inside(o, s_low, s_high);
        vreal dc = load_n(gc + k, n) + d * o * (one - tanh_c * tanh_c);
        if (p) dc += d_o * load_n(p + H + k, n);
        vreal d_i = dc * g * i * (one - i), d_f = dc * was * f * (one - f), d_g = dc * i * (one - g * g);
        if (j->clip > 0) {
            d_i *= inside(i, s_low, s_high);
            d_f *= inside(f, s_low, s_high);
            d_g *= inside(g, t_low, t_high);
        }
        vreal back = dc * f;
        if (p) back += d_i * load_n(p + k, n) + d_f * load_n(p + 2 * H + k, n);
        store_n(gpre + k, n, d_i);
        store_n(gpre + H + k, n, d_f);
        store_n(gpre + 2 * H + k, n, d_g);
        store_n(gpre + 3 * H + k, n, d_o);
        store_n(gc + k, n, back);
    }
}

static int lstm_group_back(int64_t begin, int64_t end, void *context)
{
    const lstm_back_job *j = context;
    const walk *w = &j->w;
    int64_t N = w->N, H = w->H, rows = end - begin;
    real *gh = j->gh0 + begin * H, *gc = j->gc0 + begin * H;
    copy_or_clear(gh, j->ghn ? j->ghn + begin * H : NULL, rows * H);
    copy_or_clear(gc, j->gcn ? j->gcn + begin * H : NULL, rows * H);
    for (int64_t k = w->T; k-- > 0;) {
        int64_t t = step(w, k), first = t * N + begin;
        real *gpre = j->gpre + first * 4 * H;
        for (int64_t r = 0; r < rows; r++) {
            int64_t n = begin + r, at = (first + r) * H;
            if (!counts(w, n, t)) clear(gpre + r * 4 * H, 4 * H);
            else
                lstm_gates_back(j, j->gates + at * 4, j->cells + at, before(w, j->cells, j->c0, t, n), gh + r * H,
                                j->gy ? j->gy + at : NULL, gc + r * H, gpre + r * 4 * H);
        }
        for (int64_t r = 0, run; r < rows; r += run) { /* the state of a sample that does not take this step stays */
            int live = counts(w, begin + r, t);
            for (run = 1; r + run < rows && counts(w, begin + r + run, t) == live;) run++;
            if (!live) continue;
            int status = product(run, H, 4 * H, gpre + r * 4 * H, 4 * H, j->packed, gh + r * H, H, 0);
            if (status != HL_OK) return status;
        }
    }
    return HL_OK;
}

/* Source: backpropagation through time. */
int HL(lstm_sequence_backward)(const hl_lstm_sequence_backward_plan *p, const real *gy, const real *ghn,
                               const real *gcn, const real *gates, const real *cells, const real *c0, const real *w_hh,
                               const real *peephole, const int64_t *lengths, real *gpre, real *gh0, real *gc0)
{
    real *packed = packed_weights(w_hh, 4 * p->H, p->H, 0);
    if (!packed) return HL_NOMEM;
    lstm_back_job job = {{p->T, p->N, p->H, p->reverse, lengths},
                         gy,
                         ghn,
                         gcn,
                         gates,
                         cells,
                         c0,
                         packed,
                         peephole,
                         gpre,
                         gh0,
                         gc0,
                         (real)p->clip,
                         {0},
                         {0}};
    for (int side = 0; side < 2; side++) {
        vreal edge = splat((real)(side ? p->clip : -p->clip));
        job.sigmoid_edge[side] = vsigmoid(edge)[0];
        job.tanh_edge[side] = vtanh(edge)[0];
    }
    int status = hl_parallel_for(p->N, group_size(p->N), lstm_group_back, &job);
    hl_give(packed);
    return status;
}

typedef struct {
    walk w;
    const real *gpre, *cells, *c0;
    real *gp;
} peephole_job;

static int peephole_units(int64_t begin, int64_t end, void *context)
{
    const peephole_job *j = context;
    const walk *w = &j->w;
    int64_t N = w->N, H = w->H;
    for (int gate = 0; gate < 3; gate++) clear(j->gp + gate * H + begin, end - begin);
    for (int64_t t = 0; t < w->T; t++)
        for (int64_t n = 0; n < N; n++) {
            if (!counts(w, n, t)) continue;
            const real *g = j->gpre + (t * N + n) * 4 * H, *now = j->cells + (t * N + n) * H;
            const real *earlier = before(w, j->cells, j->c0, t, n);
            for (int64_t k = begin; k < end; k++) {
                j->gp[k] += g[k] * earlier[k];
                j->gp[H + k] += g[3 * H + k] * now[k];
                j->gp[2 * H + k] += g[H + k] * earlier[k];
            }
        }
    return HL_OK;
}

/* Parallel over hidden units; walks the steps in memory order. Reads 5 H values per step and sample, gp stays in cache.
 * Source: the derivative of the peephole terms. */
int HL(lstm_peephole_grad)(const hl_lstm_peephole_grad_plan *p, const real *gpre, const real *cells, const real *c0,
                           const int64_t *lengths, real *gp)
{
    peephole_job job = {{p->T, p->N, p->H, p->reverse, lengths}, gpre, cells, c0, gp};
    return hl_parallel_for(p->H, max64(64, hl_grain(6.0 * (double)p->T * (double)p->N)), peephole_units, &job);
}

/* ---- gru ---- */

typedef struct {
    walk w;
    real *gates;
    const real *packed, *packed_new, *b_hh, *h0;
    real *y, *hn, *hidden, *previous;
    int64_t reset_after;
} gru_job;

/* r and z of one sample, in place of their arguments; u[2H] is the state's share. */
static void gru_r_z(const gru_job *j, real *a, const real *u)
{
    int64_t width = 2 * j->w.H;
    for (int64_t k = 0; k < width; k += LANES) {
        int64_t n = min64(LANES, width - k);
        store_n(a + k, n, vsigmoid(load_n(a + k, n) + (load_n(u + k, n) + load_or_0(j->b_hh, k, n))));
    }
}

/* n and the new state of one sample; u[H] is the state's share of n's argument, `factor` what multiplies it (r or NULL). */
static void gru_new(const gru_job *j, real *a, real *u, const real *factor, real *h)
{
    int64_t H = j->w.H;
    const real *b = j->b_hh ? j->b_hh + 2 * H : NULL;
    vreal one = splat((real)1);
    for (int64_t k = 0; k < H; k += LANES) {
        int64_t n = min64(LANES, H - k);
        vreal share = load_n(u + k, n) + load_or_0(b, k, n), z = load_n(a + H + k, n);
        store_n(u + k, n, share);
        if (factor) share *= load_n(factor + k, n);
        vreal new = vtanh(load_n(a + 2 * H + k, n) + share);
        store_n(a + 2 * H + k, n, new);
        store_n(h + k, n, (one - z) * new + z * load_n(h + k, n));
    }
}

static void multiply(real *to, const real *a, const real *b, int64_t count)
{
    for (int64_t k = 0; k < count; k++) to[k] = a[k] * b[k];
}

static int gru_steps(const gru_job *j, int64_t begin, int64_t end, real *share)
{
    const walk *w = &j->w;
    int64_t N = w->N, H = w->H, rows = end - begin;
    real *h = j->hn + begin * H, *reset = share + rows * 3 * H;
    copy_rows(h, j->h0 + begin * H, rows * H);
    for (int64_t k = 0; k < w->T; k++) {
        int64_t t = step(w, k), first = t * N + begin;
        real *a = j->gates + first * 3 * H;
        int64_t together = j->reset_after ? 3 * H : 2 * H; /* columns that multiply the state as it is */
        int status = product(rows, together, H, h, H, j->packed, share, 3 * H, 0);
        if (status != HL_OK) return status;
        for (int64_t r = 0; r < rows; r++) {
            gru_r_z(j, a + r * 3 * H, share + r * 3 * H);
            multiply(reset + r * H, a + r * 3 * H, h + r * H, H);
        }
        if (!j->reset_after) status = product(rows, H, H, reset, H, j->packed_new, share + 2 * H, 3 * H, 0);
        if (status != HL_OK) return status;
        for (int64_t r = 0; r < rows; r++) {
            int64_t at = (first + r) * H;
            real *mine = a + r * 3 * H, *u = share + r * 3 * H + 2 * H;
            if (!counts(w, begin + r, t)) {
                clear(mine, 3 * H);
                clear(j->y + at, H);
                clear(j->hidden ? j->hidden + at : NULL, H);
                clear(j->previous ? j->previous + at : NULL, H);
                continue;
            }
            if (j->previous) copy_rows(j->previous + at, h + r * H, H);
            gru_new(j, mine, u, j->reset_after ? mine : NULL, h + r * H);
            if (j->hidden) copy_rows(j->hidden + at, j->reset_after ? u : reset + r * H, H);
            copy_rows(j->y + at, h + r * H, H);
        }
    }
    return HL_OK;
}

static int gru_group(int64_t begin, int64_t end, void *context)
{
    const gru_job *j = context;
    real *share = hl_take((size_t)((end - begin) * 4 * j->w.H) * sizeof(real));
    if (!share) return HL_NOMEM;
    int status = gru_steps(j, begin, end, share);
    hl_give(share);
    return status;
}

/* Source: Cho et al. (2014); with reset_after cuDNN's form. */
int HL(gru_sequence)(const hl_gru_sequence_plan *p, real *gates, const real *h0, const real *w_hh, const real *b_hh,
                     const int64_t *lengths, real *y, real *hn, real *hidden, real *previous)
{
    int64_t H = p->H;
    real *packed = packed_weights(w_hh, p->reset_after ? 3 * H : 2 * H, H, 1);
    real *packed_new = p->reset_after ? NULL : packed_weights(w_hh + 2 * H * H, H, H, 1);
    int status = HL_NOMEM;
    if (packed && (packed_new || p->reset_after)) {
        gru_job job = {{p->T, p->N, H, p->reverse, lengths},
                       gates,
                       packed,
                       packed_new,
                       b_hh,
                       h0,
                       y,
                       hn,
                       hidden,
                       previous,
                       p->reset_after};
        status = hl_parallel_for(p->N, group_size(p->N), gru_group, &job);
    }
    hl_give(packed);
    hl_give(packed_new);
    return status;
}

typedef struct {
    walk w;
    const real *gy, *ghn, *gates, *hidden, *previous, *packed, *packed_new;
    real *gpre, *ghidden, *gh0;
    int64_t reset_after;
} gru_back_job;

/* One sample at one step with the reset after the product: gh becomes dh z, the rest comes from the product of ghidden. */
static void gru_back_after(int64_t H, const real *gate, const real *hidden, const real *previous, const real *gy,
                           real *gh, real *gpre, real *ghidden)
{
    vreal one = splat((real)1);
    for (int64_t k = 0; k < H; k += LANES) {
        int64_t n = min64(LANES, H - k);
        vreal r = load_n(gate + k, n), z = load_n(gate + H + k, n), new = load_n(gate + 2 * H + k, n);
        vreal d = load_n(gh + k, n) + load_or_0(gy, k, n);
        vreal d_n = d * (one - z) * (one - new * new), d_z = d * (load_n(previous + k, n) - new) * z * (one - z);
        vreal d_r = d_n * load_n(hidden + k, n) * r * (one - r);
        store_n(gpre + k, n, d_r);
        store_n(gpre + H + k, n, d_z);
        store_n(gpre + 2 * H + k, n, d_n);
        store_n(ghidden + k, n, d_r);
        store_n(ghidden + H + k, n, d_z);
        store_n(ghidden + 2 * H + k, n, d_n * r);
        store_n(gh + k, n, d * z);
    }
}

/* With the reset before the product, first part: d_z and d_n; second part, with the gradient of r h: d_r. */
static void gru_back_new(int64_t H, const real *gate, const real *previous, const real *gy, real *gh, real *gpre,
                         real *ghidden)
{
    for (int64_t k = 0; k < H; k++) {
        real z = gate[H + k], new = gate[2 * H + k], d = gh[k] + (gy ? gy[k] : 0);
        gpre[H + k] = ghidden[H + k] = d * (previous[k] - new) * z * (1 - z);
        gpre[2 * H + k] = ghidden[2 * H + k] = d * (1 - z) * (1 - new * new);
        gh[k] = d * z;
    }
}
static void gru_back_reset(int64_t H, const real *gate, const real *previous, const real *kept, real *gh, real *gpre,
                           real *ghidden)
{
    for (int64_t k = 0; k < H; k++) {
        gpre[k] = ghidden[k] = kept[k] * previous[k] * gate[k] * (1 - gate[k]);
        gh[k] += kept[k] * gate[k];
    }
}

static int gru_group_back(int64_t begin, int64_t end, void *context)
{
    const gru_back_job *j = context;
    const walk *w = &j->w;
    int64_t N = w->N, H = w->H;
    real *kept = hl_take((size_t)(H + 1) * sizeof(real));
    if (!kept) return HL_NOMEM;
    int status = HL_OK;
    copy_or_clear(j->gh0 + begin * H, j->ghn ? j->ghn + begin * H : NULL, (end - begin) * H);
    for (int64_t k = w->T; k-- > 0 && status == HL_OK;) {
        int64_t t = step(w, k);
        int64_t live = begin; /* the first of a run of samples that take this step */
        for (int64_t n = begin; n <= end && status == HL_OK; n++) {
            int64_t at = (t * N + n) * H;
            if (n < end && counts(w, n, t)) {
                const real *gy = j->gy ? j->gy + at : NULL, *gate = j->gates + 3 * at, *previous = j->previous + at;
                real *gh = j->gh0 + n * H, *gpre = j->gpre + 3 * at, *ghidden = j->ghidden + 3 * at;
                if (j->reset_after) gru_back_after(H, gate, j->hidden + at, previous, gy, gh, gpre, ghidden);
                else {
                    gru_back_new(H, gate, previous, gy, gh, gpre, ghidden);
                    status = product(1, H, H, gpre + 2 * H, 3 * H, j->packed_new, kept, H, 0);
                    gru_back_reset(H, gate, previous, kept, gh, gpre, ghidden);
                }
                continue;
            }
            if (n > live && status == HL_OK) {
                int64_t depth = j->reset_after ? 3 * H : 2 * H;
                status = product(n - live, H, depth, j->ghidden + (t * N + live) * 3 * H, 3 * H, j->packed,
                                 j->gh0 + live * H, H, 1);
            }
            live = n + 1;
            if (n < end) {
                clear(j->gpre + 3 * at, 3 * H);
                clear(j->ghidden + 3 * at, 3 * H);
            }
        }
    }
    hl_give(kept);
    return status;
}

/* Source: backpropagation through time. */
int HL(gru_sequence_backward)(const hl_gru_sequence_backward_plan *p, const real *gy, const real *ghn,
                              const real *gates, const real *hidden, const real *previous, const real *w_hh,
                              const int64_t *lengths, real *gpre, real *ghidden, real *gh0)
{
    int64_t H = p->H;
    real *packed = packed_weights(w_hh, p->reset_after ? 3 * H : 2 * H, H, 0);
    real *packed_new = p->reset_after ? NULL : packed_weights(w_hh + 2 * H * H, H, H, 0);
    int status = HL_NOMEM;
    if (packed && (packed_new || p->reset_after)) {
        gru_back_job job = {{p->T, p->N, H, p->reverse, lengths},
                            gy,
                            ghn,
                            gates,
                            hidden,
                            previous,
                            packed,
                            packed_new,
                            gpre,
                            ghidden,
                            gh0,
                            p->reset_after};
        status = hl_parallel_for(p->N, group_size(p->N), gru_group_back, &job);
    }
    hl_give(packed);
    hl_give(packed_new);
    return status;
}

/* ---- rnn ---- */

typedef struct {
    walk w;
    real *gates;
    const real *packed, *b_hh, *h0;
    real *y, *hn, *previous;
    int64_t relu;
} rnn_job;

static void rnn_gate(const rnn_job *j, real *a, real *h)
{
    int64_t H = j->w.H;
    vreal zero = splat((real)0);
    for (int64_t k = 0; k < H; k += LANES) {
        int64_t n = min64(LANES, H - k);
        vreal x = load_n(a + k, n) + load_or_0(j->b_hh, k, n);
        x = j->relu ? vmax(x, zero) : vtanh(x);
        store_n(a + k, n, x);
        store_n(h + k, n, x);
    }
}

static int rnn_group(int64_t begin, int64_t end, void *context)
{
    const rnn_job *j = context;
    const walk *w = &j->w;
    int64_t N = w->N, H = w->H, rows = end - begin;
    real *h = j->hn + begin * H;
    copy_rows(h, j->h0 + begin * H, rows * H);
    for (int64_t k = 0; k < w->T; k++) {
        int64_t t = step(w, k), at = (t * N + begin) * H;
        int status = product(rows, H, H, h, H, j->packed, j->gates + at, H, 1);
        if (status != HL_OK) return status;
        for (int64_t r = 0; r < rows; r++, at += H) {
            if (!counts(w, begin + r, t)) {
                clear(j->gates + at, H);
                clear(j->y + at, H);
                clear(j->previous ? j->previous + at : NULL, H);
                continue;
            }
            if (j->previous) copy_rows(j->previous + at, h + r * H, H);
            rnn_gate(j, j->gates + at, h + r * H);
            copy_rows(j->y + at, h + r * H, H);
        }
    }
    return HL_OK;
}

/* Source: Elman (1990). */
int HL(rnn_sequence)(const hl_rnn_sequence_plan *p, real *gates, const real *h0, const real *w_hh, const real *b_hh,
                     const int64_t *lengths, real *y, real *hn, real *previous)
{
    real *packed = packed_weights(w_hh, p->H, p->H, 1);
    if (!packed) return HL_NOMEM;
    rnn_job job = {{p->T, p->N, p->H, p->reverse, lengths}, gates, packed, b_hh, h0, y, hn, previous, p->relu};
    int status = hl_parallel_for(p->N, group_size(p->N), rnn_group, &job);
    hl_give(packed);
    return status;
}

typedef struct {
    walk w;
    const real *gy, *ghn, *gates, *packed;
    real *gpre, *gh0;
    int64_t relu;
} rnn_back_job;

static int rnn_group_back(int64_t begin, int64_t end, void *context)
{
    const rnn_back_job *j = context;
    const walk *w = &j->w;
    int64_t N = w->N, H = w->H;
    copy_or_clear(j->gh0 + begin * H, j->ghn ? j->ghn + begin * H : NULL, (end - begin) * H);
    for (int64_t k = w->T; k-- > 0;) {
        int64_t t = step(w, k);
        for (int64_t n = begin, run; n < end; n += run) {
            int live = counts(w, n, t);
            for (run = 1; n + run < end && counts(w, n + run, t) == live;) run++;
            int64_t at = (t * N + n) * H;
            real *gpre = j->gpre + at, *gh = j->gh0 + n * H;
            if (!live) {
                clear(gpre, run * H);
                continue;
            }
            for (int64_t i = 0; i < run * H; i++) {
                real h = j->gates[at + i], d = gh[i] + (j->gy ? j->gy[at + i] : 0);
                gpre[i] = j->relu ? d * (real)(h > 0) : d * (1 - h * h);
            }
            int status = product(run, H, H, gpre, H, j->packed, gh, H, 0);
            if (status != HL_OK) return status;
        }
    }
    return HL_OK;
}

/* Source: backpropagation through time. */
int HL(rnn_sequence_backward)(const hl_rnn_sequence_backward_plan *p, const real *gy, const real *ghn,
                              const real *gates, const real *w_hh, const int64_t *lengths, real *gpre, real *gh0)
{
    real *packed = packed_weights(w_hh, p->H, p->H, 0);
    if (!packed) return HL_NOMEM;
    rnn_back_job job = {{p->T, p->N, p->H, p->reverse, lengths}, gy, ghn, gates, packed, gpre, gh0, p->relu};
    int status = hl_parallel_for(p->N, group_size(p->N), rnn_group_back, &job);
    hl_give(packed);
    return status;
}
