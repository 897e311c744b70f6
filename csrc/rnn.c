/* Recurrent layers over a sequence. The product of the input with its weights comes ready in `gates`; each step adds that
 * of the state, then applies the gates while they are in cache.
 *
 * Many samples: parallel over groups of them that each walk the whole sequence alone, so that no step waits for another
 * thread. Few samples of many hidden units: parallel over blocks of units inside each step. The recurrent weights are
 * packed once. Per step and sample G H values of `gates` are read and written in place, H written to y. */
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

/* Packs w[rows, columns] as the right side of a product: transposed (state W^T) or as it is (gradient W). */
static real *packed_weights(const real *w, int64_t rows, int64_t columns, int transposed)
{
    int64_t K = transposed ? columns : rows, N = transposed ? rows : columns;
    real *packed = hl_take((size_t)gemm_packed_b_size(K, N) * sizeof(real));
    if (packed) gemm_pack_b(K, N, w, transposed ? 1 : columns, transposed ? columns : 1, packed);
    return packed;
}

/* ---- forward: the two ways through a sequence ---- */

/* A layer's job begins with this. `advance` takes step t for the samples [rows) and the hidden units [units): from the
 * state h[N,H] to next[N,H], which may be h itself when all units are taken. */
typedef struct layer layer;
typedef struct { int64_t begin, end; } range;
struct layer {
    walk w;
    int64_t gates_per_unit, block; /* units of a block */
    const real *w_hh;
    real *packed; /* per block of units and per gate, what gemm_pack_b makes of its rows of w_hh */
    int (*advance)(const layer *, int64_t t, range rows, range units, const real *h, real *next);
    const real *h0;
    real *hn;
};

/* Below this many multiply-adds a step, handing blocks to other threads costs more than it saves. */
#define STEP_WORK ((int64_t)1 << 18)
/* Units of a block when units are split: a whole number of vectors, and two blocks at least from 128 units on. */
enum { UNITS = 64 };

static int64_t packed_block(const layer *l, int64_t units) { return gemm_packed_b_size(l->w.H, units); }
static const real *packed_gate(const layer *l, int64_t gate, range units)
{
    const real *start = l->packed + units.begin / l->block * l->gates_per_unit * packed_block(l, l->block);
    return start + gate * packed_block(l, units.end - units.begin);
}

/* c[rows, units] (+)= h[rows, H] times the weights of one gate; c is the row of sample 0, unit 0. */
static int gate_product(const layer *l, int64_t gate, range rows, range units, const real *h, real *c, int64_t c_row,
                        int accumulate)
{
    return product(rows.end - rows.begin, units.end - units.begin, l->w.H, h + rows.begin * l->w.H, l->w.H,
                   packed_gate(l, gate, units), c + rows.begin * c_row + units.begin, c_row, accumulate);
}

static int group_walk(int64_t begin, int64_t end, void *context)
{
    const layer *l = context;
    range rows = {begin, end}, units = {0, l->w.H};
    copy_rows(l->hn + begin * l->w.H, l->h0 + begin * l->w.H, (end - begin) * l->w.H);
    int status = HL_OK;
    for (int64_t k = 0; k < l->w.T && status == HL_OK; k++)
        status = l->advance(l, step(&l->w, k), rows, units, l->hn, l->hn);
    return status;
}

typedef struct {
    const layer *l;
    int64_t t;
    const real *h;
    real *next;
} block_step;

static int unit_blocks(int64_t begin, int64_t end, void *context)
{
    const block_step *s = context;
    const layer *l = s->l;
    range rows = {0, l->w.N};
    for (int64_t b = begin; b < end; b++) {
        range units = {b * l->block, min64(l->w.H, (b + 1) * l->block)};
        int status = l->advance(l, s->t, rows, units, s->h, s->next);
        if (status != HL_OK) return status;
    }
    return HL_OK;
}

static int walk_by_units(const layer *l)
{
    int64_t count = l->w.N * l->w.H, blocks = (l->w.H + l->block - 1) / l->block;
    real *other = hl_take((size_t)(count + 1) * sizeof(real));
    if (!other) return HL_NOMEM;
    real *h = l->hn, *next = other;
    copy_rows(h, l->h0, count);
    int status = HL_OK;
    for (int64_t k = 0; k < l->w.T && status == HL_OK; k++) {
        block_step s = {l, step(&l->w, k), h, next};
        status = hl_parallel_for(blocks, 1, unit_blocks, &s);
        real *swap = h;
        h = next;
        next = swap;
    }
    if (h != l->hn) copy_rows(l->hn, h, count);
    hl_give(other);
    return status;
}

/* Walks the whole sequence; `by_units` says whether a step may be split between blocks of units. */
static int run_layer(layer *l, int by_units)
{
    int64_t N = l->w.N, H = l->w.H, G = l->gates_per_unit;
    int split = by_units && N < GROUP && H >= 2 * UNITS && N * G * H * H >= STEP_WORK;
    l->block = split ? UNITS : H;
    l->packed = hl_take((size_t)((H + l->block - 1) / l->block * G * packed_block(l, l->block)) * sizeof(real));
    if (!l->packed) return HL_NOMEM;
    for (int64_t begin = 0; begin < H; begin += l->block)
        for (int64_t gate = 0; gate < G; gate++) {
            range units = {begin, min64(H, begin + l->block)};
            gemm_pack_b(H, units.end - begin, l->w_hh + (gate * H + begin) * H, 1, H,
                        (real *)packed_gate(l, gate, units));
        }
    int status = split ? walk_by_units(l) : hl_parallel_for(N, group_size(N), group_walk, l);
    hl_give(l->packed);
    return status;
}

/* ---- lstm ---- */

typedef struct {
    layer l;
    real *gates;
    const real *b_hh, *peephole;
    real *y, *cn, *cells, *previous, clip;
} lstm_job;

/* The gates of some units of one sample at one step: reads and writes a[4H], updates c, writes h. */
static void lstm_gates(const lstm_job *j, range units, real *a, real *c, real *h)
{
    int64_t H = j->l.w.H;
    const real *p = j->peephole, *b = j->b_hh;
    vreal clip = splat(j->clip);
    for (int64_t k = units.begin; k < units.end; k += LANES) {
        int64_t n = min64(LANES, units.end - k);
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

/* What a sample that does not take this step leaves: its state as it was, zeros elsewhere. */
static void skip(const layer *l, int64_t t, int64_t n, range units, real *gates, const real *h, real *next, real *y,
                 real *kept, real *previous)
{
    int64_t H = l->w.H, at = (t * l->w.N + n) * H + units.begin, count = units.end - units.begin;
    for (int64_t g = 0; g < l->gates_per_unit; g++)
        clear(gates + (t * l->w.N + n) * l->gates_per_unit * H + g * H + units.begin, count);
    clear(y + at, count);
    clear(kept ? kept + at : NULL, count);
    clear(previous ? previous + at : NULL, count);
    if (next != h) copy_rows(next + n * H + units.begin, h + n * H + units.begin, count);
}

static int lstm_advance(const layer *l, int64_t t, range rows, range units, const real *h, real *next)
{
    const lstm_job *j = (const lstm_job *)l;
    int64_t N = l->w.N, H = l->w.H, count = units.end - units.begin;
    real *a = j->gates + t * N * 4 * H;
    for (int gate = 0; gate < 4; gate++) {
        int status = gate_product(l, gate, rows, units, h, a + gate * H, 4 * H, 1);
        if (status != HL_OK) return status;
    }
    for (int64_t n = rows.begin; n < rows.end; n++) {
        int64_t at = (t * N + n) * H + units.begin, state = n * H + units.begin;
        if (!counts(&l->w, n, t)) {
            skip(l, t, n, units, j->gates, h, next, j->y, j->cells, j->previous);
            continue;
        }
        if (j->previous) copy_rows(j->previous + at, h + state, count);
        lstm_gates(j, units, a + n * 4 * H, j->cn + n * H, next + n * H);
        copy_rows(j->y + at, next + state, count);
        if (j->cells) copy_rows(j->cells + at, j->cn + state, count);
    }
    return HL_OK;
}

/* Source: Hochreiter and Schmidhuber (1997). */
int HL(lstm_sequence)(const hl_lstm_sequence_plan *p, real *gates, const real *h0, const real *c0, const real *w_hh,
                      const real *b_hh, const real *peephole, const int64_t *lengths, real *y, real *hn, real *cn,
                      real *cells, real *previous)
{
    lstm_job job = {
        .l = {{p->T, p->N, p->H, p->reverse, lengths}, 4, 0, w_hh, NULL, lstm_advance, h0, hn},
        .gates = gates,
        .b_hh = b_hh,
        .peephole = peephole,
        .y = y,
        .cn = cn,
        .cells = cells,
        .previous = previous,
        .clip = (real)p->clip,
    };
    copy_rows(cn, c0, p->N * p->H);
    return run_layer(&job.l, 1);
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
    layer l;
    real *gates;
    const real *b_hh;
    real *y, *hidden, *previous;
    real *share; /* [N,H]: the state's share of n's argument; with the reset before the product 2 [N,H], r h first */
    int64_t reset_after;
} gru_job;

/* r and z of some units of one sample, in place of their arguments. */
static void gru_r_z(const gru_job *j, range units, real *a)
{
    for (int64_t gate = 0; gate < 2; gate++)
        for (int64_t k = units.begin; k < units.end; k += LANES) {
            int64_t n = min64(LANES, units.end - k), at = gate * j->l.w.H + k;
            store_n(a + at, n, vsigmoid(load_n(a + at, n) + load_or_0(j->b_hh, at, n)));
        }
}

/* n and the new state of some units of one sample; u[H] is the state's share of n's argument, without its bias on the way
 * in and with it on the way out; `factor` is what multiplies it (r, or NULL). */
static void gru_new(const gru_job *j, range units, real *a, real *u, const real *factor, const real *h, real *next)
{
    int64_t H = j->l.w.H;
    const real *b = j->b_hh ? j->b_hh + 2 * H : NULL;
    vreal one = splat((real)1);
    for (int64_t k = units.begin; k < units.end; k += LANES) {
        int64_t n = min64(LANES, units.end - k);
        vreal share = load_n(u + k, n) + load_or_0(b, k, n), z = load_n(a + H + k, n);
        store_n(u + k, n, share);
        if (factor) share *= load_n(factor + k, n);
        vreal new = vtanh(load_n(a + 2 * H + k, n) + share);
        store_n(a + 2 * H + k, n, new);
        store_n(next + k, n, (one - z) * new + z * load_n(h + k, n));
    }
}

static int gru_advance(const layer *l, int64_t t, range rows, range units, const real *h, real *next)
{
    const gru_job *j = (const gru_job *)l;
    int64_t N = l->w.N, H = l->w.H, count = units.end - units.begin;
    real *a = j->gates + t * N * 3 * H, *reset = j->share, *share = j->reset_after ? j->share : j->share + N * H;
    int status = gate_product(l, 0, rows, units, h, a, 3 * H, 1);
    if (status == HL_OK) status = gate_product(l, 1, rows, units, h, a + H, 3 * H, 1);
    for (int64_t n = rows.begin; n < rows.end && status == HL_OK; n++) {
        gru_r_z(j, units, a + n * 3 * H);
        if (!j->reset_after)
            for (int64_t k = 0; k < H; k++) reset[n * H + k] = a[n * 3 * H + k] * h[n * H + k];
    }
    if (status == HL_OK) status = gate_product(l, 2, rows, units, j->reset_after ? h : reset, share, H, 0);
    if (status != HL_OK) return status;
    for (int64_t n = rows.begin; n < rows.end; n++) {
        int64_t at = (t * N + n) * H + units.begin, state = n * H + units.begin;
        if (!counts(&l->w, n, t)) {
            skip(l, t, n, units, j->gates, h, next, j->y, j->hidden, j->previous);
            continue;
        }
        real *mine = a + n * 3 * H;
        if (j->previous) copy_rows(j->previous + at, h + state, count);
        gru_new(j, units, mine, share + n * H, j->reset_after ? mine : NULL, h + n * H, next + n * H);
        if (j->hidden) copy_rows(j->hidden + at, j->share + state, count);
        copy_rows(j->y + at, next + state, count);
    }
    return HL_OK;
}

/* Source: Cho et al. (2014); with reset_after cuDNN's form. */
int HL(gru_sequence)(const hl_gru_sequence_plan *p, real *gates, const real *h0, const real *w_hh, const real *b_hh,
                     const int64_t *lengths, real *y, real *hn, real *hidden, real *previous)
{
    int64_t states = p->N * p->H;
    real *share = hl_take((size_t)((p->reset_after ? 1 : 2) * states + 1) * sizeof(real));
    if (!share) return HL_NOMEM;
    gru_job job = {
        .l = {{p->T, p->N, p->H, p->reverse, lengths}, 3, 0, w_hh, NULL, gru_advance, h0, hn},
        .gates = gates,
        .b_hh = b_hh,
        .y = y,
        .hidden = hidden,
        .previous = previous,
        .share = share,
        .reset_after = p->reset_after,
    };
    int status = run_layer(&job.l, p->reset_after != 0); /* r h must be whole before its product */
    hl_give(share);
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
    layer l;
    real *gates;
    const real *b_hh;
    real *y, *previous;
    int64_t relu;
} rnn_job;

static int rnn_advance(const layer *l, int64_t t, range rows, range units, const real *h, real *next)
{
    const rnn_job *j = (const rnn_job *)l;
    int64_t N = l->w.N, H = l->w.H, count = units.end - units.begin;
    vreal zero = splat((real)0);
    int status = gate_product(l, 0, rows, units, h, j->gates + t * N * H, H, 1);
    if (status != HL_OK) return status;
    for (int64_t n = rows.begin; n < rows.end; n++) {
        int64_t row = (t * N + n) * H, at = row + units.begin, state = n * H + units.begin;
        if (!counts(&l->w, n, t)) {
            skip(l, t, n, units, j->gates, h, next, j->y, NULL, j->previous);
            continue;
        }
        if (j->previous) copy_rows(j->previous + at, h + state, count);
        for (int64_t k = units.begin; k < units.end; k += LANES) {
            int64_t m = min64(LANES, units.end - k);
            vreal x = load_n(j->gates + row + k, m) + load_or_0(j->b_hh, k, m);
            x = j->relu ? vmax(x, zero) : vtanh(x);
            store_n(j->gates + row + k, m, x);
            store_n(j->y + row + k, m, x);
            store_n(next + n * H + k, m, x);
        }
    }
    return HL_OK;
}

/* Source: Elman (1990). */
int HL(rnn_sequence)(const hl_rnn_sequence_plan *p, real *gates, const real *h0, const real *w_hh, const real *b_hh,
                     const int64_t *lengths, real *y, real *hn, real *previous)
{
    rnn_job job = {
        .l = {{p->T, p->N, p->H, p->reverse, lengths}, 1, 0, w_hh, NULL, rnn_advance, h0, hn},
        .gates = gates,
        .b_hh = b_hh,
        .y = y,
        .previous = previous,
        .relu = p->relu,
    };
    return run_layer(&job.l, 1);
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
