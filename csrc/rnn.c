/* Recurrent layers over a sequence. A block of units is taken through a step for all its gates: the product of the state
 * with its weights, then the gates, while the sums are in the nearest caches. What the input gives comes from a product
 * over a few steps ahead, at once as many rows as fill a register tile, into memory that stays in the cache: so nothing
 * per gate goes to memory and back but what a gradient asked for. Both weights are packed once.
 *
 * Parallel over blocks of units and groups of samples inside each step; a thread keeps its blocks over all steps, so that
 * their weights stay in its own cache. Where the weights are small, over groups of samples inside several steps. Reads x
 * once, the weights once per step (from the cache, as long as they fit); writes y once, and gates, cells and states where
 * they are kept. */
#include "gemm.h"
#include "prepack.h"
#include "vmath.h"

/* Samples that share a pass over the packed weights, and steps' samples that share one over the input's weights: four
 * register tiles hide what starting and ending one costs, and their sums stay in the second cache. */
enum { GROUP = 32 };

/* Threads with groups of their own wait for each other only after so many passes, but each reads all weights in every one:
 * from its second cache, where they take at most half of 1 MiB. Above, what waiting costs is small beside the products. */
enum { APART = 16, NEAR_WEIGHTS = (512 << 10) / (int)sizeof(real) };

/* Samples of a group of the way back: 16 rows halve the traffic from the second cache against 8. Fewer samples go to the threads
 * in groups that are half of a register tile at least, if there are as many; but not where samples end early: a group that is
 * cut may leave a single row, which products sum in another order. `work`: of a sample, all steps. */
enum { GROUP_BACK = 16 };

static inline double work_back(int64_t T, int64_t H, int64_t gates)
{
    return (double)T * (double)gates * (double)H * ((double)H / 16 + 4); /* 16 multiplications, or a fourth of a gate */
}
static inline int64_t group_size(int64_t N, double work, const int64_t *lengths)
{
    if (N >= 2 * GROUP_BACK) return GROUP_BACK;
    int64_t groups = N > GROUP_BACK ? 2 : lengths ? 1 : max64(min64(hl_num_threads(0), N / (GEMM_ROWS / 2)), 1);
    int64_t size = (N + groups - 1) / groups;
    return size < hl_grain(work) ? max64(N, 1) : size;
}

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

/* ---- forward ---- */

typedef struct { int64_t begin, end; } range;

/* A step has two passes when a product needs all units of what another one gave: the first `early` gates, then the rest. */
typedef struct layer layer;
struct layer {
    walk w;
    int64_t D, count, early; /* inputs; gates of a unit; early = count: one pass */
    int64_t apart; /* the gate of which the sum over the state stays apart, with its bias; or -1 */
    const real *x, *w_ih, *b_ih, *w_hh, *b_hh;
    /* From the sums u[rows][gates of the pass][units] over the state and in[rows][gates][units] over the input of a block
     * of units, rows filled up to whole vectors, and the state h[N,H], to the gates, y and next[N,H]. */
    void (*apply)(const layer *, int64_t t, int pass, range rows, range units, real *u, const real *in, const real *h,
                  real *next);
    const real *h0;
    real *hn, *gates, *y;
    const real *also[2]; /* what else is kept, [T,N,H], or NULL */
    const real *middle; /* [N,H], the left side of the second pass's product */

    /* Made by run_layer. */
    int64_t blocks, groups, ahead; /* of units, of samples; steps of one product over the input */
    int past_cache; /* what is kept for a gradient does not stay in the caches, and lies in whole lines */
    real *other; /* [N,H], the state by turns with hn */
    hl_pack ih, hh; /* per block what pack_gates makes of its rows, the passes one after the other */
    int ih_lies, hh_lies; /* or they are read where they lie */
    real *bias; /* [gates][units] per block, filled up like the sums */
    real *input; /* [ahead * rows][gates][units] per block and group */
};

/* Units of a block: a whole number of vectors, enough columns to keep register tiles busy, and 8 blocks to share from 256
 * units on. */
enum { UNITS = 32 };
/* Of few samples up to four times as many, as far as all threads have some and the second cache holds the weights of a block from
 * one step to the next: there it shows what a block costs by itself. */
static int64_t most_units(int64_t N, int64_t H, int64_t threads)
{
    int64_t most = min64(4 * UNITS, 8 * UNITS / N), near = NEAR_WEIGHTS / (4 * max64(H, 1));
    return max64(UNITS, min64(min64(most, near), H / threads));
}

static range block_units(const layer *l, int64_t b)
{
    int64_t vectors = (l->w.H + LANES - 1) / LANES;
    return (range){vectors * b / l->blocks * LANES, min64(vectors * (b + 1) / l->blocks * LANES, l->w.H)};
}
static range group_rows(const layer *l, int64_t g)
{
    return (range){l->w.N * g / l->groups, l->w.N * (g + 1) / l->groups};
}

/* The columns of a product that gives some gates of a block: only the last block has units that fill no vector, and its
 * gates lie side by side. */
static int64_t columns_of(int64_t gates, range units) { return round_up(gates * (units.end - units.begin), LANES); }

/* Packs for a gemm of depth K the rows of some gates' units of w[gates * H, K]. */
static void pack_gates(const real *w, int64_t H, int64_t K, range gates, range units, real *packed)
{
    int64_t width = units.end - units.begin, count = (gates.end - gates.begin) * width, N = round_up(count, LANES);
    int64_t depth_max = gemm_depth(K);
    for (int64_t k = 0; k < K; k += depth_max) {
        int64_t depth = min64(depth_max, K - k);
        for (int64_t n = 0, step; n < N; n += step) {
            step = gemm_columns(N - n);
            real *panel = packed + k * N + n * depth;
            int64_t here = min64(step, count - n);
            for (int64_t i = 0, run; i < here; i += run) {
                int64_t gate = gates.begin + (n + i) / width, unit = (n + i) % width;
                run = min64(width - unit, here - i);
                gemm_transpose(run, depth, w + (gate * H + units.begin + unit) * K + k, K, panel + i, step);
            }
            for (int64_t d = 0; d < depth && here < step; d++) clear(panel + d * step + here, step - here);
        }
    }
}

static int pack_blocks(int64_t begin, int64_t end, void *context)
{
    const layer *l = context;
    int64_t H = l->w.H, D = l->D;
    range all = {0, l->count}, early = {0, l->early}, late = {l->early, l->count};
    for (int64_t b = begin; b < end; b++) {
        range units = block_units(l, b);
        int64_t width = units.end - units.begin, before = l->count * units.begin;
        if (!l->ih.ready) pack_gates(l->w_ih, H, D, all, units, (real *)l->ih.data + before * D);
        if (!l->hh.ready) {
            real *packed = (real *)l->hh.data + before * H;
            pack_gates(l->w_hh, H, H, early, units, packed);
            pack_gates(l->w_hh, H, H, late, units, packed + columns_of(l->early, units) * H);
        }
        clear(l->bias + before, columns_of(l->count, units));
        for (int64_t gate = 0; gate < l->count; gate++)
            for (int64_t u = units.begin; u < units.end; u++) {
                real bias = l->b_ih ? l->b_ih[gate * H + u] : 0;
                if (l->b_hh && gate != l->apart) bias += l->b_hh[gate * H + u];
                l->bias[before + gate * width + u - units.begin] = bias;
            }
    }
    return HL_OK;
}

/* A line that is written in parts would go to memory in parts: vectors must be whole lines. */
static int is_past_cache(const layer *l)
{
    const real *kept[] = {l->gates, l->y, l->also[0], l->also[1]};
    for (int i = 0; i < 4; i++)
        if ((uintptr_t)kept[i] % HL_VLEN) return 0;
    double each = (double)l->w.T * (double)l->w.N * (double)l->w.H * sizeof(real);
    return HL_VLEN == 64 && l->gates && l->w.H % LANES == 0 && each * (double)l->count > CACHE_BYTES;
}
/* What is kept for a gradient. Through the caches it would push out the weights, which each step reads. */
static inline __attribute__((always_inline)) void keep(const layer *l, real *p, int64_t n, vreal v)
{
    if (l->past_cache) stream(p, v);
    else store_n(p, n, v);
}

/* The product of call.a with the weights of some gates' units: packed, or each gate's as they lie. */
static int gates_product(gemm_call call, range gates, range units, const real *packed, const real *w, int64_t H)
{
    int64_t width = units.end - units.begin;
    call.N = call.c_row = columns_of(gates.end - gates.begin, units);
    call.packed_b = packed;
    if (packed) return gemm(&call);
    call.b_row = 1, call.b_col = call.K, call.N = width;
    int status = HL_OK;
    for (int64_t gate = gates.begin; gate < gates.end && status == HL_OK; gate++) {
        call.b = w + (gate * H + units.begin) * call.K;
        status = gemm(&call);
        call.c += width;
        if (call.column_bias) call.column_bias += width;
    }
    return status;
}

/* Pass `pass` of step k for one group of samples and one block of units. */
static int advance(const layer *l, int64_t k, int pass, int64_t b, int64_t g)
{
    int64_t N = l->w.N, H = l->w.H, t = step(&l->w, k);
    range units = block_units(l, b), rows = group_rows(l, g);
    int64_t before = l->count * units.begin, n = rows.end - rows.begin;
    int64_t row = columns_of(l->count, units); /* of the input's sums; the group's come after those of the others */
    real *input = l->input + (before * N + rows.begin * row) * l->ahead;
    int64_t turn = k % l->ahead, steps = min64(l->ahead, l->w.T - (k - turn)); /* of the product over the input */
    int status = HL_OK;
    if (turn == 0 && pass == 0) {
        gemm_call call = {.a_col = 1, .M = n * steps, .K = l->D, .a_row = l->D, .c = input};
        call.a = l->x + ((l->w.reverse ? t - (steps - 1) : t) * N + rows.begin) * l->D;
        call.column_bias = l->bias + before;
        const real *packed = l->ih_lies ? NULL : (real *)l->ih.data + before * l->D;
        status = gates_product(call, (range){0, l->count}, units, packed, l->w_ih, H);
        if (status != HL_OK) return status;
    }
    real *next = (l->w.T - k) % 2 ? l->hn : l->other;
    const real *h = k == 0 ? l->h0 : next == l->hn ? l->other : l->hn;
    real u[GROUP * 4 * UNITS] __attribute__((aligned(64)));
    gemm_call call = {.a_col = 1, .M = n, .K = H, .a_row = H, .c = u};
    call.a = (pass ? l->middle : h) + rows.begin * H;
    range gates = {pass ? l->early : 0, pass ? l->count : l->early};
    const real *packed =
        l->hh_lies ? NULL : (real *)l->hh.data + (before + (pass ? columns_of(l->early, units) : 0)) * H;
    status = gates_product(call, gates, units, packed, l->w_hh, H);
    l->apply(l, t, pass, rows, units, u, input + (l->w.reverse ? steps - 1 - turn : turn) * n * row, h, next);
    if (l->past_cache) stream_end();
    return status;
}

static int64_t passes(const layer *l) { return l->early < l->count ? 2 : 1; }

static int one_item(int64_t turn, int64_t item, void *context)
{
    const layer *l = context;
    return advance(l, turn / passes(l), (int)(turn % passes(l)), item / l->groups, item % l->groups);
}

/* APART passes of a group over all blocks; each begins with the weights that the one before has left in the caches. */
static int one_group(int64_t part, int64_t group, void *context)
{
    const layer *l = context;
    for (int64_t turn = part * APART; turn < min64((part + 1) * APART, l->w.T * passes(l)); turn++)
        for (int64_t i = 0; i < l->blocks; i++) {
            int64_t block = turn % 2 ? l->blocks - 1 - i : i;
            int status = one_item(turn, block * l->groups + group, context);
            if (status != HL_OK) return status;
        }
    return HL_OK;
}

/* Memory for the packed w[count * H, K], the gates from `early` on apart. */
static hl_pack begin_gates(const layer *l, const real *w, int64_t K, int64_t early)
{
    const int64_t key[] = {HL_PACK_GATES, sizeof(real), LANES, l->count, early, l->w.H, K};
    int64_t columns = columns_of(early, (range){0, l->w.H}) + columns_of(l->count - early, (range){0, l->w.H});
    return hl_pack_begin(w, (size_t)(columns * K) * sizeof(real), key, sizeof key / sizeof *key);
}

/* Packing the weights costs what some steps do: a step or two of one sample read them where they lie, prepacked ones, too, as
 * another order of sums would give other bits. */
enum { FEW_STEPS = 2 };
static int lies(const layer *l, int64_t K) { return l->w.N == 1 && l->w.T <= FEW_STEPS && K >= GEMM_DOT_DEPTH; }

/* Walks the whole sequence. */
static int run_layer(layer *l)
{
    int64_t N = l->w.N, H = l->w.H, T = l->w.T, D = l->D, G = l->count;
    if (T == 0 || N == 0) return copy_rows(l->hn, l->h0, N * H), HL_OK;
    int64_t columns = columns_of(G, (range){0, H}), threads = hl_num_threads(0);
    int apart = threads > 1 && N >= threads * GEMM_ROWS && columns * (D + H) <= NEAR_WEIGHTS;
    l->groups = round_up((N + GROUP - 1) / GROUP, apart ? threads : 1);
    l->ahead = l->groups > 1 ? 1 : min64(T, max64(GROUP / N, 1)); /* steps of all samples follow each other in x */
    int64_t units = most_units(N, H, threads);
    l->blocks = (H + units - 1) / units;
    l->past_cache = is_past_cache(l);
    int64_t sizes[] = {N * columns * l->ahead, columns, N * H}, total = 0;
    for (int i = 0; i < 3; i++) total += round_up(sizes[i], LANES);
    real *scratch = hl_take((size_t)total * sizeof(real)), **parts[] = {&l->input, &l->bias, &l->other};
    l->ih_lies = lies(l, D);
    l->hh_lies = lies(l, H);
    l->ih = l->ih_lies ? (hl_pack){.ready = 1} : begin_gates(l, l->w_ih, D, G);
    l->hh = l->hh_lies ? (hl_pack){.ready = 1} : begin_gates(l, l->w_hh, H, l->early);
    int status = scratch && (l->ih.data || l->ih_lies) && (l->hh.data || l->hh_lies) ? HL_OK : HL_NOMEM;
    if (status == HL_OK) {
        for (int64_t i = 0, at = 0; i < 3; at += round_up(sizes[i++], LANES)) *parts[i] = scratch + at;
        int64_t reads = 1 + (l->ih.ready ? 0 : D) + (l->hh.ready ? 0 : H);
        status = parallel_even(l->blocks, (double)(columns * reads / l->blocks), pack_blocks, l);
    }
    if (status == HL_OK) {
        if (!l->ih.ready) hl_pack_ready(&l->ih);
        if (!l->hh.ready) hl_pack_ready(&l->hh);
        /* 16 multiplications cost what counts as one operation; of few samples reading the weights costs more. */
        double work = (double)max64(N, 4) / 16 * (double)columns * (double)H;
        int64_t turns = T * passes(l), items = apart ? l->groups : l->blocks * l->groups;
        if (apart)
            status = hl_parallel_steps((turns + APART - 1) / APART, items,
                                       work * (double)min64(T, APART) / (double)items, one_group, l);
        else status = hl_parallel_steps(turns, items, work / (double)items, one_item, l);
    }
    hl_pack_end(&l->ih);
    hl_pack_end(&l->hh);
    hl_give(scratch);
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
        for (int64_t g = 0; g < l->count && l->gates; g++)
            clear(l->gates + (row * l->count + g) * H + units.begin, count);
        clear(l->y + at, count);
        clear(kept ? kept + at : NULL, count);
        clear(previous ? previous + at : NULL, count);
        copy_rows(next + state, h + state, count);
    }
}

/* ---- lstm ---- */

typedef struct {
    layer l;
    const real *peephole;
    real *cn, *cells, *previous, clip;
} lstm_job;

/* Units [k, k + n) of a block whose first unit is `begin`, for all rows: first the cells, then the states, since one row
 * from end to end is a chain too long to overlap with the next one's. */
static inline __attribute__((always_inline)) void lstm_units(const lstm_job *j, int64_t t, range rows, range units,
                                                             int64_t k, int64_t n, real *u, const real *in,
                                                             const real *h, real *next)
{
    const layer *l = &j->l;
    int64_t H = l->w.H, width = units.end - units.begin, row_width = columns_of(4, units);
    int64_t first = t * l->w.N, unit = units.begin + k;
    const real *p = j->peephole ? j->peephole + unit : NULL;
    vreal clip = splat(j->clip);
    u += k - rows.begin * row_width;
    in += k - rows.begin * row_width;
    for (int64_t row = rows.begin; row < rows.end; row++) {
        if (!counts(&l->w, row, t)) continue;
        real *ur = u + row * row_width;
        const real *ir = in + row * row_width;
        vreal cell = load_n(j->cn + row * H + unit, n), i = load_n(ur, n) + load_n(ir, n);
        vreal f = load_n(ur + width, n) + load_n(ir + width, n);
        vreal g = load_n(ur + 2 * width, n) + load_n(ir + 2 * width, n);
        vreal o = load_n(ur + 3 * width, n) + load_n(ir + 3 * width, n);
        if (p) {
            i += load_n(p, n) * cell;
            f += load_n(p + 2 * H, n) * cell;
        }
        if (j->clip > 0) {
            i = limited(i, clip);
            f = limited(f, clip);
            g = limited(g, clip);
        }
        i = vsigmoid_gate(i);
        f = vsigmoid_gate(f);
        g = vtanh_gate(g);
        cell = f * cell + i * g;
        if (p) o += load_n(p + H, n) * cell;
        if (j->clip > 0) o = limited(o, clip);
        store_n(ur + 3 * width, n, o);
        store_n(j->cn + row * H + unit, n, cell);
        if (l->gates) {
            real *gates = l->gates + (first + row) * 4 * H + unit;
            keep(l, gates, n, i);
            keep(l, gates + H, n, f);
            keep(l, gates + 2 * H, n, g);
        }
    }
    for (int64_t row = rows.begin; row < rows.end; row++) {
        if (!counts(&l->w, row, t)) continue;
        int64_t state = row * H + unit, at = (first + row) * H + unit;
        vreal cell = load_n(j->cn + state, n), o = vsigmoid_gate(load_n(u + row * row_width + 3 * width, n));
        vreal after = o * vtanh_gate(cell);
        store_n(next + state, n, after);
        keep(l, l->y + at, n, after);
        if (l->gates) keep(l, l->gates + (first + row) * 4 * H + 3 * H + unit, n, o);
        if (j->cells) keep(l, j->cells + at, n, cell);
        if (j->previous) keep(l, j->previous + at, n, load_n(h + state, n));
    }
}

static void lstm_apply(const layer *l, int64_t t, int pass, range rows, range units, real *u, const real *in,
                       const real *h, real *next)
{
    const lstm_job *j = (const lstm_job *)l;
    int64_t count = units.end - units.begin, k = 0;
    (void)pass;
    for (; k + LANES <= count; k += LANES) lstm_units(j, t, rows, units, k, LANES, u, in, h, next);
    if (k < count) lstm_units(j, t, rows, units, k, count - k, u, in, h, next);
    skip(l, t, rows, units, h, next, j->cells, j->previous);
}

/* Source: Hochreiter and Schmidhuber (1997). */
int HL(lstm_sequence)(const hl_lstm_sequence_plan *p, const real *x, const real *w_ih, const real *b_ih, const real *h0,
                      const real *c0, const real *w_hh, const real *b_hh, const real *peephole, const int64_t *lengths,
                      real *y, real *hn, real *cn, real *gates, real *cells, real *previous)
{
    lstm_job job = {
        .l = {.w = {p->T, p->N, p->H, p->reverse, lengths},
              .D = p->D,
              .count = 4,
              .early = 4,
              .apart = -1,
              .x = x,
              .w_ih = w_ih,
              .b_ih = b_ih,
              .w_hh = w_hh,
              .b_hh = b_hh,
              .apply = lstm_apply,
              .h0 = h0,
              .hn = hn,
              .gates = gates,
              .y = y,
              .also = {cells, previous}},
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
        job.sigmoid_edge[side] = vsigmoid_gate(edge)[0];
        job.tanh_edge[side] = vtanh_gate(edge)[0];
    }
    int status = hl_parallel_for(p->N, group_size(p->N, work_back(p->T, p->H, 4), lengths), lstm_group_back, &job);
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
    real *hidden, *previous;
    real *reset, *update; /* r h and z [N,H], with the reset before the product */
} gru_job;

/* As lstm_units: first r and z, then n and the state, or those in a pass of their own with the reset before the product. */
static inline __attribute__((always_inline)) void gru_r_z(const gru_job *j, int64_t t, range rows, range units,
                                                          int64_t k, int64_t n, real *u, const real *in, const real *h)
{
    const layer *l = &j->l;
    int64_t H = l->w.H, width = units.end - units.begin, unit = units.begin + k;
    int64_t u_row = columns_of(l->early, units), in_row = columns_of(3, units);
    for (int64_t row = rows.begin; row < rows.end; row++, u += u_row, in += in_row) {
        if (!counts(&l->w, row, t)) continue;
        int64_t state = row * H + unit;
        vreal r = vsigmoid_gate(load_n(u + k, n) + load_n(in + k, n));
        vreal z = vsigmoid_gate(load_n(u + width + k, n) + load_n(in + width + k, n));
        if (l->early == 3) {
            store_n(u + k, n, r);
            store_n(u + width + k, n, z);
        } else {
            store_n(j->reset + state, n, r * load_n(h + state, n));
            store_n(j->update + state, n, z);
        }
        if (!l->gates) continue;
        keep(l, l->gates + (t * l->w.N + row) * 3 * H + unit, n, r);
        keep(l, l->gates + (t * l->w.N + row) * 3 * H + H + unit, n, z);
    }
}
static inline __attribute__((always_inline)) void gru_new(const gru_job *j, int64_t t, range rows, range units,
                                                          int64_t k, int64_t n, const real *u, const real *in,
                                                          const real *h, real *next)
{
    const layer *l = &j->l;
    int64_t H = l->w.H, width = units.end - units.begin, unit = units.begin + k;
    int64_t u_row = columns_of(l->early == 3 ? 3 : 1, units), in_row = columns_of(3, units);
    vreal b_n = load_or_0(l->early == 3 ? l->b_hh : NULL, 2 * H + unit, n), one = splat((real)1);
    for (int64_t row = rows.begin; row < rows.end; row++, u += u_row, in += in_row) {
        if (!counts(&l->w, row, t)) continue;
        int64_t state = row * H + unit, at = (t * l->w.N + row) * H + unit;
        vreal before = load_n(h + state, n), z, new, kept;
        if (l->early == 3) {
            z = load_n(u + width + k, n);
            kept = load_n(u + 2 * width + k, n) + b_n;
            new = vtanh_gate(load_n(in + 2 * width + k, n) + load_n(u + k, n) * kept);
        } else {
            z = load_n(j->update + state, n);
            kept = load_n(j->reset + state, n);
            new = vtanh_gate(load_n(in + 2 * width + k, n) + load_n(u + k, n));
        }
        vreal after = (one - z) * new + z * before;
        store_n(next + state, n, after);
        keep(l, l->y + at, n, after);
        if (l->gates) keep(l, l->gates + (t * l->w.N + row) * 3 * H + 2 * H + unit, n, new);
        if (j->hidden) keep(l, j->hidden + at, n, kept);
        if (j->previous) keep(l, j->previous + at, n, before);
    }
}

static void gru_apply(const layer *l, int64_t t, int pass, range rows, range units, real *u, const real *in,
                      const real *h, real *next)
{
    const gru_job *j = (const gru_job *)l;
    int64_t count = units.end - units.begin, k = 0;
    int late = l->early == 3 || pass;
    for (; k + LANES <= count; k += LANES) {
        if (!pass) gru_r_z(j, t, rows, units, k, LANES, u, in, h);
        if (late) gru_new(j, t, rows, units, k, LANES, u, in, h, next);
    }
    if (k < count && !pass) gru_r_z(j, t, rows, units, k, count - k, u, in, h);
    if (k < count && late) gru_new(j, t, rows, units, k, count - k, u, in, h, next);
    if (late) skip(l, t, rows, units, h, next, j->hidden, j->previous);
}

/* Source: Cho et al. (2014); with reset_after cuDNN's form. */
int HL(gru_sequence)(const hl_gru_sequence_plan *p, const real *x, const real *w_ih, const real *b_ih, const real *h0,
                     const real *w_hh, const real *b_hh, const int64_t *lengths, real *y, real *hn, real *gates,
                     real *hidden, real *previous)
{
    int after = p->reset_after != 0;
    real *reset = after ? NULL : hl_take((size_t)(2 * p->N * p->H) * sizeof(real));
    if (!reset && !after) return HL_NOMEM;
    gru_job job = {
        .l = {.w = {p->T, p->N, p->H, p->reverse, lengths},
              .D = p->D,
              .count = 3,
              .early = after ? 3 : 2,
              .apart = after ? 2 : -1,
              .x = x,
              .w_ih = w_ih,
              .b_ih = b_ih,
              .w_hh = w_hh,
              .b_hh = b_hh,
              .apply = gru_apply,
              .h0 = h0,
              .hn = hn,
              .gates = gates,
              .y = y,
              .also = {hidden, previous},
              .middle = reset},
        .hidden = hidden,
        .previous = previous,
        .reset = reset,
        .update = reset ? reset + p->N * p->H : NULL,
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
        status = hl_parallel_for(p->N, group_size(p->N, work_back(p->T, p->H, 3), lengths), gru_group_back, &job);
    }
    hl_give(packed);
    hl_give(packed_new);
    return status;
}

/* ---- rnn ---- */

typedef struct {
    layer l;
    real *previous;
    int64_t relu;
} rnn_job;

static inline __attribute__((always_inline)) void rnn_units(const rnn_job *j, int64_t t, range rows, range units,
                                                            int64_t k, int64_t n, const real *u, const real *in,
                                                            const real *h, real *next)
{
    const layer *l = &j->l;
    int64_t row_width = columns_of(1, units), unit = units.begin + k;
    for (int64_t row = rows.begin; row < rows.end; row++, u += row_width, in += row_width) {
        if (!counts(&l->w, row, t)) continue;
        int64_t state = row * l->w.H + unit, at = (t * l->w.N + row) * l->w.H + unit;
        vreal x = load_n(u + k, n) + load_n(in + k, n);
        x = j->relu ? vmax(x, splat((real)0)) : vtanh_gate(x);
        if (l->gates) keep(l, l->gates + at, n, x);
        keep(l, l->y + at, n, x);
        store_n(next + state, n, x);
        if (j->previous) keep(l, j->previous + at, n, load_n(h + state, n));
    }
}

static void rnn_apply(const layer *l, int64_t t, int pass, range rows, range units, real *u, const real *in,
                      const real *h, real *next)
{
    const rnn_job *j = (const rnn_job *)l;
    int64_t count = units.end - units.begin, k = 0;
    (void)pass;
    for (; k + LANES <= count; k += LANES) rnn_units(j, t, rows, units, k, LANES, u, in, h, next);
    if (k < count) rnn_units(j, t, rows, units, k, count - k, u, in, h, next);
    skip(l, t, rows, units, h, next, NULL, j->previous);
}

/* Source: Elman (1990). */
int HL(rnn_sequence)(const hl_rnn_sequence_plan *p, const real *x, const real *w_ih, const real *b_ih, const real *h0,
                     const real *w_hh, const real *b_hh, const int64_t *lengths, real *y, real *hn, real *gates,
                     real *previous)
{
    rnn_job job = {
        .l = {.w = {p->T, p->N, p->H, p->reverse, lengths},
              .D = p->D,
              .count = 1,
              .early = 1,
              .apart = -1,
              .x = x,
              .w_ih = w_ih,
              .b_ih = b_ih,
              .w_hh = w_hh,
              .b_hh = b_hh,
              .apply = rnn_apply,
              .h0 = h0,
              .hn = hn,
              .gates = gates,
              .y = y,
              .also = {previous}},
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
    int status = hl_parallel_for(p->N, group_size(p->N, work_back(p->T, p->H, 1), lengths), rnn_group_back, &job);
    hl_give(packed);
    return status;
}
