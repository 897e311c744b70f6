/* Recurrent layers over a sequence. The product of the input with its weights comes ready in `gates`; each step adds that
 * of the state, a block of units at a time for all their gates, and applies the gates while the sums are in the nearest
 * cache. The recurrent weights are packed once.
 *
 * Many samples: parallel over groups of them that each walk the whole sequence alone, so that no step waits for another
 * thread. Few samples: parallel over blocks of units inside each step, where a thread keeps its blocks, so that their
 * weights stay in its own cache. Per step and sample G H values of `gates` are read and written in place, H written to y. */
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

/* c[rows, columns] = a[rows, depth] times the packed weights + add (or nothing). */
static int product(int64_t rows, int64_t columns, int64_t depth, const real *a, int64_t a_row, const real *packed,
                   real *c, int64_t c_row, const real *add, int64_t add_row)
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
                      .add = add,
                      .add_row = add_row};
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

typedef struct { int64_t begin, end; } range;

/* Units of a block: whole register tiles for many samples; two vectors of float32 for few, so that two threads share 256
 * units evenly. The sums of GROUP samples take 12 KiB at most in float32. */
static inline int64_t block_units(int64_t gates, int64_t N)
{
    int64_t units = N >= GROUP ? 48 : 32;
    return gates > 1 ? units : 2 * units;
}
enum { SUMS = 192 }; /* the most values of a block for one sample */

/* A step has two passes when a product needs all units of what another one gave: the first `early` gates, then the rest. */
typedef struct layer layer;
struct layer {
    walk w;
    int64_t count, early; /* gates of a unit; early = count: one pass */
    int64_t alone; /* the gate whose sum stays apart from the input's share; or -1 */
    const real *w_hh;
    /* From the sums u[rows][gates of the pass][width] of a block of units and the state h[N,H] to the gates, y and
     * next[N,H]. */
    void (*apply)(const layer *, int64_t t, int pass, range rows, range units, const real *u, int64_t width,
                  const real *h, real *next);
    const real *h0;
    real *hn, *gates, *y;
    const real *middle; /* [N,H], the left side of the second pass's product */
    real *other; /* [N,H], the state by turns with hn */
    real *packed; /* per block and pass what gemm_pack_b makes of its rows of w_hh, each gate's filled up to LANES */
};

static range block_range(const layer *l, int64_t b)
{
    int64_t units = block_units(l->count, l->w.N);
    return (range){b * units, min64(l->w.H, (b + 1) * units)};
}
static int64_t block_count(const layer *l)
{
    return (l->w.H + block_units(l->count, l->w.N) - 1) / block_units(l->count, l->w.N);
}
static real *packed_gate(const layer *l, range units, int64_t gate)
{
    int64_t H = l->w.H, size = gemm_packed_b_size(H, units.end - units.begin);
    return l->packed + l->count * gemm_packed_b_size(H, units.begin) + gate * size;
}

static int pack_blocks(int64_t begin, int64_t end, void *context)
{
    const layer *l = context;
    int64_t H = l->w.H;
    for (int64_t b = begin; b < end; b++)
        for (int64_t gate = 0; gate < l->count; gate++) {
            range units = block_range(l, b);
            gemm_pack_b(H, units.end - units.begin, l->w_hh + (gate * H + units.begin) * H, 1, H,
                        packed_gate(l, units, gate));
        }
    return HL_OK;
}

/* Sets on their way what a product of the next step adds: a whole step is long enough for lines from memory. */
static inline void fetch(const layer *l, int64_t k, int64_t gate, range rows, range units)
{
    enum { LINE = 64 / (int)sizeof(real) };
    if (k + 1 == l->w.T) return;
    for (int64_t n = rows.begin; n < rows.end; n++)
        for (int64_t u = units.begin; u < units.end; u += LINE)
            __builtin_prefetch(l->gates + ((step(&l->w, k + 1) * l->w.N + n) * l->count + gate) * l->w.H + u, 1, 2);
}

/* Pass `pass` of step k for some samples and one block of units. */
static int advance(const layer *l, int64_t k, int pass, range rows, int64_t b)
{
    int64_t H = l->w.H, t = step(&l->w, k), width = block_units(l->count, l->w.N);
    range units = block_range(l, b);
    real *next = (l->w.T - k) % 2 ? l->hn : l->other;
    const real *h = k == 0 ? l->h0 : next == l->hn ? l->other : l->hn, *left = pass ? l->middle : h;
    real u[GROUP * SUMS] __attribute__((aligned(64)));
    int64_t first = pass ? l->early : 0, last = pass ? l->count : l->early, u_row = (last - first) * width;
    for (int64_t n = rows.begin; n < rows.end; n += GROUP) {
        range part = {n, min64(n + GROUP, rows.end)};
        for (int64_t gate = first; gate < last; gate++) {
            fetch(l, k, gate, part, units);
            const real *input = l->gates + ((t * l->w.N + n) * l->count + gate) * H + units.begin;
            int status = product(part.end - n, units.end - units.begin, H, left + n * H, H, packed_gate(l, units, gate),
                                 u + (gate - first) * width, u_row, gate == l->alone ? NULL : input, l->count * H);
            if (status != HL_OK) return status;
        }
        l->apply(l, t, pass, part, units, u, width, h, next);
    }
    return HL_OK;
}

static int group_walk(int64_t begin, int64_t end, void *context)
{
    const layer *l = context;
    int64_t blocks = block_count(l);
    range rows = {begin, end};
    for (int64_t k = 0; k < l->w.T; k++)
        for (int pass = 0; pass < (l->early < l->count ? 2 : 1); pass++)
            for (int64_t i = 0; i < blocks; i++) { /* to and fro: the weights read last are still in the cache */
                int status = advance(l, k, pass, rows, k % 2 ? blocks - 1 - i : i);
                if (status != HL_OK) return status;
            }
    return HL_OK;
}

static int one_block(int64_t turn, int64_t b, void *context)
{
    const layer *l = context;
    int passes = l->early < l->count ? 2 : 1;
    return advance(l, turn / passes, (int)(turn % passes), (range){0, l->w.N}, b);
}

/* Below this many multiply-adds a step, waiting for each other costs the threads more than they save. */
#define STEP_WORK ((int64_t)1 << 17)

/* Walks the whole sequence. What is summed in which order does not depend on the way taken. */
static int run_layer(layer *l)
{
    int64_t N = l->w.N, H = l->w.H, T = l->w.T, blocks = block_count(l);
    if (T == 0) return copy_rows(l->hn, l->h0, N * H), HL_OK;
    l->packed = hl_take((size_t)(l->count * round_up(H, LANES) * H) * sizeof(real));
    l->other = hl_take((size_t)(N * H + 1) * sizeof(real));
    int status = HL_NOMEM;
    if (l->packed && l->other) {
        parallel_even(blocks, (double)(l->count * H * H / blocks), pack_blocks, l);
        int64_t groups = (N + group_size(N) - 1) / max64(group_size(N), 1);
        if (groups >= hl_num_threads(0) || N * l->count * H * H < STEP_WORK)
            status = hl_parallel_for(N, group_size(N), group_walk, l);
        else status = hl_parallel_steps(T * (l->early < l->count ? 2 : 1), blocks, one_block, l);
    }
    hl_give(l->other);
    hl_give(l->packed);
    return status;
}

/* What the samples that do not take this step leave: their state as it was, zeros elsewhere. */
static void skip(const layer *l, int64_t t, range rows, range units, const real *h, real *next, real *kept,
                 real *previous)
{
    int64_t H = l->w.H, count = units.end - units.begin;
    for (int64_t n = rows.begin; n < rows.end; n++) {
        if (counts(&l->w, n, t)) continue;
        int64_t row = t * l->w.N + n, at = row * H + units.begin, state = n * H + units.begin;
        for (int64_t g = 0; g < l->count; g++) clear(l->gates + (row * l->count + g) * H + units.begin, count);
        clear(l->y + at, count);
        clear(kept ? kept + at : NULL, count);
        clear(previous ? previous + at : NULL, count);
        copy_rows(next + state, h + state, count);
    }
}

/* ---- lstm ---- */

typedef struct {
    layer l;
    const real *b_hh, *peephole;
    real *cn, *cells, *previous, clip;
} lstm_job;

/* Units [k, k + n) of a block whose first unit is `begin`, for all rows; the biases stay in registers. */
static inline __attribute__((always_inline)) void lstm_units(const lstm_job *j, int64_t t, range rows, int64_t begin,
                                                             int64_t k, int64_t n, const real *u, int64_t width,
                                                             const real *h, real *next)
{
    const layer *l = &j->l;
    int64_t H = l->w.H;
    const real *b = j->b_hh ? j->b_hh + begin + k : NULL, *p = j->peephole ? j->peephole + begin + k : NULL;
    vreal b_i = load_or_0(b, 0, n), b_f = load_or_0(b, H, n), b_g = load_or_0(b, 2 * H, n);
    vreal b_o = load_or_0(b, 3 * H, n), clip = splat(j->clip);
    for (int64_t row = rows.begin; row < rows.end; row++, u += 4 * width) {
        if (!counts(&l->w, row, t)) continue;
        int64_t state = row * H + begin + k, at = (t * l->w.N + row) * H + begin + k;
        real *a = l->gates + (t * l->w.N + row) * 4 * H + begin + k;
        vreal cell = load_n(j->cn + state, n), a_i = load_n(u + k, n) + b_i, a_f = load_n(u + width + k, n) + b_f;
        vreal a_g = load_n(u + 2 * width + k, n) + b_g, a_o = load_n(u + 3 * width + k, n) + b_o;
        if (p) {
            a_i += load_n(p, n) * cell;
            a_f += load_n(p + 2 * H, n) * cell;
        }
        if (j->clip > 0) {
            a_i = limited(a_i, clip);
            a_f = limited(a_f, clip);
            a_g = limited(a_g, clip);
        }
        vreal i = vsigmoid_gate(a_i), f = vsigmoid_gate(a_f), g = vtanh_gate(a_g);
        cell = f * cell + i * g;
        if (p) a_o += load_n(p + H, n) * cell;
        if (j->clip > 0) a_o = limited(a_o, clip);
        vreal o = vsigmoid_gate(a_o), after = o * vtanh_gate(cell);
        store_n(a, n, i);
        store_n(a + H, n, f);
        store_n(a + 2 * H, n, g);
        store_n(a + 3 * H, n, o);
        store_n(j->cn + state, n, cell);
        store_n(next + state, n, after);
        store_n(l->y + at, n, after);
        if (j->cells) store_n(j->cells + at, n, cell);
        if (j->previous) store_n(j->previous + at, n, load_n(h + state, n));
    }
}

static void lstm_apply(const layer *l, int64_t t, int pass, range rows, range units, const real *u, int64_t width,
                       const real *h, real *next)
{
    const lstm_job *j = (const lstm_job *)l;
    int64_t begin = units.begin, count = units.end - begin, k = 0;
    (void)pass;
    for (; k + LANES <= count; k += LANES) lstm_units(j, t, rows, begin, k, LANES, u, width, h, next);
    if (k < count) lstm_units(j, t, rows, begin, k, count - k, u, width, h, next);
    skip(l, t, rows, units, h, next, j->cells, j->previous);
}

/* Source: Hochreiter and Schmidhuber (1997). */
int HL(lstm_sequence)(const hl_lstm_sequence_plan *p, real *gates, const real *h0, const real *c0, const real *w_hh,
                      const real *b_hh, const real *peephole, const int64_t *lengths, real *y, real *hn, real *cn,
                      real *cells, real *previous)
{
    lstm_job job = {
        .l = {{p->T, p->N, p->H, p->reverse, lengths}, 4, 4, -1, w_hh, lstm_apply, h0, hn, gates, y},
        .b_hh = b_hh,
        .peephole = peephole,
        .cn = cn,
        .cells = cells,
        .previous = previous,
        .clip = (real)p->clip,
    };
    copy_rows(cn, c0, p->N * p->H);
    return run_layer(&job.l);
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
        vreal tanh_c = vtanh_gate(load_n(cell + k, n)), was = load_n(earlier + k, n);
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
            int status = product(run, H, 4 * H, gpre + r * 4 * H, 4 * H, j->packed, gh + r * H, H, NULL, 0);
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
        job.sigmoid_edge[side] = vsigmoid_gate(edge)[0];
        job.tanh_edge[side] = vtanh_gate(edge)[0];
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
    const real *b_hh;
    real *hidden, *previous;
    real *reset; /* r h [N,H], with the reset before the product */
} gru_job;

/* As lstm_units. With the reset before the product the first pass gives r and z, and r h for the second. */
static inline __attribute__((always_inline)) void gru_units(const gru_job *j, int64_t t, int pass, range rows,
                                                            int64_t begin, int64_t k, int64_t n, const real *u,
                                                            int64_t width, const real *h, real *next)
{
    const layer *l = &j->l;
    int64_t H = l->w.H, u_row = (l->early == 3 ? 3 : pass ? 1 : 2) * width;
    const real *b = j->b_hh ? j->b_hh + begin + k : NULL;
    vreal b_r = load_or_0(b, 0, n), b_z = load_or_0(b, H, n), b_n = load_or_0(b, 2 * H, n), one = splat((real)1);
    for (int64_t row = rows.begin; row < rows.end; row++, u += u_row) {
        if (!counts(&l->w, row, t)) continue;
        int64_t state = row * H + begin + k, at = (t * l->w.N + row) * H + begin + k;
        real *a = l->gates + (t * l->w.N + row) * 3 * H + begin + k;
        vreal before = load_n(h + state, n), z, new;
        if (pass) {
            z = load_n(a + H, n);
            new = vtanh_gate(load_n(u + k, n) + b_n);
            if (j->hidden) store_n(j->hidden + at, n, load_n(j->reset + state, n));
        } else {
            vreal r = vsigmoid_gate(load_n(u + k, n) + b_r);
            z = vsigmoid_gate(load_n(u + width + k, n) + b_z);
            store_n(a, n, r);
            store_n(a + H, n, z);
            if (j->previous) store_n(j->previous + at, n, before);
            if (l->early < 3) {
                store_n(j->reset + state, n, r * before);
                continue;
            }
            vreal share = load_n(u + 2 * width + k, n) + b_n;
            new = vtanh_gate(load_n(a + 2 * H, n) + r * share);
            if (j->hidden) store_n(j->hidden + at, n, share);
        }
        vreal after = (one - z) * new + z * before;
        store_n(a + 2 * H, n, new);
        store_n(next + state, n, after);
        store_n(l->y + at, n, after);
    }
}

static void gru_apply(const layer *l, int64_t t, int pass, range rows, range units, const real *u, int64_t width,
                      const real *h, real *next)
{
    const gru_job *j = (const gru_job *)l;
    int64_t begin = units.begin, count = units.end - begin, k = 0;
    for (; k + LANES <= count; k += LANES) gru_units(j, t, pass, rows, begin, k, LANES, u, width, h, next);
    if (k < count) gru_units(j, t, pass, rows, begin, k, count - k, u, width, h, next);
    if (l->early == 3 || pass) skip(l, t, rows, units, h, next, j->hidden, j->previous);
}

/* Source: Cho et al. (2014); with reset_after cuDNN's form. */
int HL(gru_sequence)(const hl_gru_sequence_plan *p, real *gates, const real *h0, const real *w_hh, const real *b_hh,
                     const int64_t *lengths, real *y, real *hn, real *hidden, real *previous)
{
    real *reset = p->reset_after ? NULL : hl_take((size_t)(p->N * p->H + 1) * sizeof(real));
    if (!reset && !p->reset_after) return HL_NOMEM;
    gru_job job = {
        .l = {{p->T, p->N, p->H, p->reverse, lengths},
              3,
              p->reset_after ? 3 : 2,
              p->reset_after ? 2 : -1,
              w_hh,
              gru_apply,
              h0,
              hn,
              gates,
              y,
              reset},
        .b_hh = b_hh,
        .hidden = hidden,
        .previous = previous,
        .reset = reset,
    };
    int status = run_layer(&job.l);
    hl_give(reset);
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
                    status = product(1, H, H, gpre + 2 * H, 3 * H, j->packed_new, kept, H, NULL, 0);
                    gru_back_reset(H, gate, previous, kept, gh, gpre, ghidden);
                }
                continue;
            }
            if (n > live && status == HL_OK) {
                int64_t depth = j->reset_after ? 3 * H : 2 * H;
                status = product(n - live, H, depth, j->ghidden + (t * N + live) * 3 * H, 3 * H, j->packed,
                                 j->gh0 + live * H, H, j->gh0 + live * H, H);
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
    const real *b_hh;
    real *previous;
    int64_t relu;
} rnn_job;

static inline __attribute__((always_inline)) void rnn_units(const rnn_job *j, int64_t t, range rows, int64_t begin,
                                                            int64_t k, int64_t n, const real *u, int64_t width,
                                                            const real *h, real *next)
{
    const layer *l = &j->l;
    vreal b = load_or_0(j->b_hh, begin + k, n);
    for (int64_t row = rows.begin; row < rows.end; row++, u += width) {
        if (!counts(&l->w, row, t)) continue;
        int64_t state = row * l->w.H + begin + k, at = (t * l->w.N + row) * l->w.H + begin + k;
        vreal x = load_n(u + k, n) + b;
        x = j->relu ? vmax(x, splat((real)0)) : vtanh_gate(x);
        store_n(l->gates + at, n, x);
        store_n(l->y + at, n, x);
        store_n(next + state, n, x);
        if (j->previous) store_n(j->previous + at, n, load_n(h + state, n));
    }
}

static void rnn_apply(const layer *l, int64_t t, int pass, range rows, range units, const real *u, int64_t width,
                      const real *h, real *next)
{
    const rnn_job *j = (const rnn_job *)l;
    int64_t begin = units.begin, count = units.end - begin, k = 0;
    (void)pass;
    for (; k + LANES <= count; k += LANES) rnn_units(j, t, rows, begin, k, LANES, u, width, h, next);
    if (k < count) rnn_units(j, t, rows, begin, k, count - k, u, width, h, next);
    skip(l, t, rows, units, h, next, NULL, j->previous);
}

/* Source: Elman (1990). */
int HL(rnn_sequence)(const hl_rnn_sequence_plan *p, real *gates, const real *h0, const real *w_hh, const real *b_hh,
                     const int64_t *lengths, real *y, real *hn, real *previous)
{
    rnn_job job = {
        .l = {{p->T, p->N, p->H, p->reverse, lengths}, 1, 1, -1, w_hh, rnn_apply, h0, hn, gates, y},
        .b_hh = b_hh,
        .previous = previous,
        .relu = p->relu,
    };
    return run_layer(&job.l);
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
            int status = product(run, H, H, gpre, H, j->packed, gh, H, NULL, 0);
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
