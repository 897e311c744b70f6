/* Convolutions of one channel to a group: by rows of a channel, or, where rows do not fit, with lanes over channels. */
#ifndef HL_DEPTHWISE_H
#define HL_DEPTHWISE_H

/* The inputs that so many outputs span, padding among them. */
static int64_t span(const axis *x, int64_t outputs)
{
    return (outputs - 1) * x->stride + (x->taps - 1) * x->dilation + 1;
}

enum { WIDEST = 256, TALLEST = 64 }; /* windows go in the nearest caches */

/* Outputs that with what they read fill a fourth of the second cache, all of the first, in float32. */
enum { SECOND = 32768, FIRST = 4096 };

/* ---- by rows ---- */

/* Some vectors of each row of outputs of one channel, and the lines of inputs that they read, in x or in a copy of it. */
typedef struct {
    const real *line; /* the first, at the first of the columns */
    int64_t above, below; /* of the lines from there on, the first and the end of those in the image */
    int64_t pitch; /* from a line to the next */
    const real *zeros; /* what lines outside the image are */
    const int64_t *offsets; /* of the taps of a row, from the output's first column */
    const vint *inside; /* [vector][KW]: which lanes of a vector of outputs read an input, and not the padding */
    int64_t taps; /* KW */
    const real *w;
    real bias, *y, *end; /* of y: from here on nothing is written */
    int64_t rows, W, left; /* W from a row of y to the next, `left` outputs in it from these columns on */
    const ptrdiff_t *next; /* what to fetch, from the line and from y; NULL: nothing */
} strip;

/* Which taps of a vector are masked: all, or of `narrow` strips the first tap of the first one and the last tap of the last. */
static inline __attribute__((always_inline)) int is_masked(const int narrow, int64_t KW, int64_t kw, int64_t v,
                                                           int64_t vectors)
{
    return !narrow || (v == 0 && kw == 0) || (v == vectors - 1 && kw == KW - 1);
}

/* Each line is loaded once for all rows that it belongs to, of which sum[0] is the last. */
static inline __attribute__((always_inline)) void rows_strip(const int narrow, const int KH, const int64_t KW,
                                                             const int stride, const int vectors, const strip *s)
{
    const int open = (KH + stride - 1) / stride; /* rows that a line belongs to */
    /* How much stays in registers: all that belongs to few taps; of some more, all but the weights. */
    const int some = __builtin_constant_p(KW) && KW <= 5,
              few = some && KW <= 3 && (HL_REGISTERS == 32 || open * vectors <= 6);
    const ptrdiff_t *next = s->next;
    const real *line = s->line, *w = s->w, *zeros = s->zeros;
    const int64_t pitch = s->pitch, W = s->W, safe = s->end - s->y - vectors * LANES;
    const int64_t whole = safe < 0 ? 0 : safe / W + 1; /* rows whose vectors end before the end */
    const uint64_t lines = (uint64_t)(s->below - s->above);
    uint64_t at = (uint64_t)-s->above; /* from the first line in the image */
    real *y = s->y - (open - 1) * W;
    vreal sum[8 * 3], weights[9], bias = splat(s->bias);
    vint masks[10];
    int64_t offsets[5];
#pragma GCC unroll 24
    for (int i = 0; i < open * vectors; i++) sum[i] = bias;
    if (some)
#pragma GCC unroll 5
        for (int kw = 0; kw < KW; kw++) {
            offsets[kw] = s->offsets[kw];
#pragma GCC unroll 3
            for (int v = 0; v < vectors; v++)
                if (is_masked(narrow, KW, kw, v, vectors)) masks[v * KW + kw] = s->inside[v * KW + kw];
        }
    if (few)
#pragma GCC unroll 9
        for (int k = 0; k < KH * KW; k++) weights[k] = splat(w[k]);
    for (int64_t r = 1 - open; r < s->rows; r++, y += W) {
#pragma GCC unroll 2
        for (int phase = 0; phase < stride; phase++, line += pitch) {
            const real *from = at++ < lines ? line : zeros;
#pragma GCC unroll 5
            for (int64_t kw = 0; kw < KW; kw++) {
                const real *tap = from + (some ? offsets[kw] : s->offsets[kw]);
                vreal in[3];
#pragma GCC unroll 3
                for (int v = 0; v < vectors; v++) {
                    vreal all = load(tap + v * LANES * stride);
                    if (stride == 2) all = evens(all, load(tap + v * LANES * stride + LANES));
                    if (is_masked(narrow, KW, kw, v, vectors))
                        all = (vreal)((some ? masks[v * KW + kw] : s->inside[v * KW + kw]) & (vint)all);
                    in[v] = kept(all);
                }
#pragma GCC unroll 7
                for (int kh = phase; kh < KH; kh += stride) {
                    const int row = kh / stride * vectors;
                    if (!few && vectors == 1) {
                        sum[row] = add_splat(sum[row], w + kh * KW + kw, in[0]);
                        continue;
                    }
                    vreal wk = few ? weights[kh * KW + kw] : kept(splat(w[kh * KW + kw]));
#pragma GCC unroll 3
                    for (int v = 0; v < vectors; v++)
                        sum[row + v] = some ? add_product(sum[row + v], wk, in[v]) : sum[row + v] + wk * in[v];
                }
            }
            if (next)
#pragma GCC unroll 6
                for (int v = 0; v < vectors * LANES * stride; v += LINE) /* lines of the cache */
                    __builtin_prefetch(line + next[0] + v);
        }
        if (next)
#pragma GCC unroll 3
            for (int v = 0; v < vectors * LANES; v += LINE) __builtin_prefetch(y + next[1] + v, 1);
        if (r >= 0) {
            const vreal *done = sum + (open - 1) * vectors;
#pragma GCC unroll 3
            for (int v = 0; v < vectors; v++) {
                if (r < whole) store(y + v * LANES, done[v]);
                else store_before(y + v * LANES, s->end, s->left - v * LANES, done[v]);
            }
        }
#pragma GCC unroll 24
        for (int i = open * vectors - 1; i >= 0; i--) sum[i] = i >= vectors ? sum[i - vectors] : bias;
    }
}

/* [stride - 1][taps: narrow 3x3, 3x3, 3 rows, 5x5, 5, 7 rows][vectors - 1]; three vectors where the sums of all open rows fit
 * in registers with what is best kept beside them. */
typedef void strip_rows(const strip *s);
#define STRIP(KH, kw, narrow, KW, stride, vectors) \
    static void strip_##KH##x##kw##_##stride##_##vectors(const strip *s) \
    { \
        rows_strip(narrow, KH, KW, stride, vectors, s); \
    }
#define STRIPS(KH, kw, narrow, KW) \
    STRIP(KH, kw, narrow, KW, 1, 1) \
    STRIP(KH, kw, narrow, KW, 1, 2) STRIP(KH, kw, narrow, KW, 2, 1) STRIP(KH, kw, narrow, KW, 2, 2)
STRIPS(3, 3n, 1, 3)
STRIP(3, 3n, 1, 3, 2, 3)
STRIPS(3, 3, 0, 3)
STRIP(3, 3, 0, 3, 2, 3)
STRIPS(3, k, 0, s->taps)
STRIP(3, k, 0, s->taps, 2, 3)
STRIPS(5, 5, 0, 5)
STRIPS(5, k, 0, s->taps)
STRIPS(7, k, 0, s->taps)
#if HL_REGISTERS == 32
STRIP(3, 3n, 1, 3, 1, 3)
STRIP(3, 3, 0, 3, 1, 3)
STRIP(3, k, 0, s->taps, 1, 3)
#else
#define strip_3x3n_1_3 NULL
#define strip_3x3_1_3 NULL
#define strip_3xk_1_3 NULL
#endif
static strip_rows *const strips[2][6][3] = {
    {{strip_3x3n_1_1, strip_3x3n_1_2, strip_3x3n_1_3},
     {strip_3x3_1_1, strip_3x3_1_2, strip_3x3_1_3},
     {strip_3xk_1_1, strip_3xk_1_2, strip_3xk_1_3},
     {strip_5x5_1_1, strip_5x5_1_2},
     {strip_5xk_1_1, strip_5xk_1_2},
     {strip_7xk_1_1, strip_7xk_1_2}},
    {{strip_3x3n_2_1, strip_3x3n_2_2, strip_3x3n_2_3},
     {strip_3x3_2_1, strip_3x3_2_2, strip_3x3_2_3},
     {strip_3xk_2_1, strip_3xk_2_2, strip_3xk_2_3},
     {strip_5x5_2_1, strip_5x5_2_2},
     {strip_5xk_2_1, strip_5xk_2_2},
     {strip_7xk_2_1, strip_7xk_2_2}},
};

/* Lines of channels. Vectors reach beyond them: they are read where they lie, or, at the ends of the array, in a copy between
 * margins. */
typedef struct {
    const real *x;
    int64_t channels, lines, pitch; /* of x */
    int64_t outputs, stride, taps; /* of a row of outputs, which are `stride` inputs apart */
    int64_t offsets[WIDEST]; /* of the taps, from the first output's column */
    int64_t before, reach; /* elements that may be touched before a line, and from its beginning on */
    int narrow; /* no padding but what strips of that name mask */
    vint *inside;
    real *zeros, *copy;
} reader;

/* Up to so many lines are copied at a time. */
static int begin_lines(reader *t, int64_t copied)
{
    int64_t low = 0, high = 0, masks = ceil_div(t->outputs, LANES) * t->taps;
    for (int64_t kw = 0; kw < t->taps; kw++) low = min64(low, t->offsets[kw]), high = max64(high, t->offsets[kw]);
    t->before = -low;
    t->reach = round_up(t->outputs, LANES) * t->stride + high;
    t->inside =
        hl_take((size_t)masks * sizeof(vint) + (size_t)(2 * (t->before + t->reach) + copied * t->pitch) * sizeof(real));
    if (!t->inside) return HL_NOMEM;
    t->zeros = (real *)(t->inside + masks) + t->before;
    t->copy = t->zeros + t->reach + t->before;
    memset(t->zeros - t->before, 0, (size_t)(t->before + t->reach) * sizeof(real));
    vint *inside = t->inside;
    int64_t vectors = ceil_div(t->outputs, LANES);
    t->narrow = t->taps == 3;
    for (int64_t v = 0; v < vectors; v++)
        for (int64_t kw = 0; kw < t->taps; kw++) {
            int64_t from = v * LANES * t->stride + t->offsets[kw], count = min64(t->outputs - v * LANES, LANES);
            int64_t left = ceil_div(max64(-from, 0), t->stride), right = ceil_div(max64(t->pitch - from, 0), t->stride);
            if (!is_masked(1, t->taps, kw, v, vectors) && (left > 0 || right < count)) t->narrow = 0;
            *inside++ = ~lanes_before(min64(left, LANES)) & lanes_before(min64(right, count));
        }
    return HL_OK;
}
static void end_lines(reader *t) { hl_give(t->inside); }

static int in_place(const reader *t, int64_t channel)
{
    int64_t size = t->lines * t->pitch;
    return channel * size >= t->before && (t->channels - 1 - channel) * size + t->pitch >= t->reach;
}

/* Lines of a channel, some of them outside the image. What was read before may be copied over. */
static strip read_lines(const reader *t, int64_t channel, int64_t first, int64_t count)
{
    const real *x = t->x + channel * t->lines * t->pitch;
    strip s = {.line = x + first * t->pitch,
               .above = -first,
               .below = t->lines - first,
               .pitch = t->pitch,
               .zeros = t->zeros,
               .offsets = t->offsets,
               .inside = t->inside,
               .taps = t->taps};
    if (in_place(t, channel)) return s;
    int64_t low = min64(max64(first, 0), t->lines), high = max64(min64(first + count, t->lines), low);
    memcpy(t->copy, x + low * t->pitch, (size_t)((high - low) * t->pitch) * sizeof(real));
    s.line = t->copy + (first - low) * t->pitch;
    return s;
}

/* Whether a strip can be read: images of one channel to a group, windows that are not far apart. */
static int is_readable(const conv_job *j)
{
    const axis *D = &j->axes[0], *H = &j->axes[1], *W = &j->axes[2];
    return j->channels == 1 && D->taps == 1 && D->outputs == 1 && D->inputs == 1 && !D->pad && H->stride == W->stride &&
           W->stride <= 2 && H->dilation == 1 && span(W, 1) <= WIDEST && W->pad <= WIDEST && W->pad >= -WIDEST;
}

/* The lines that a convolution reads, some rows of outputs at a time where they are copied. */
static int begin_rows(reader *t, const conv_job *j, int64_t rows)
{
    const axis *H = &j->axes[1], *W = &j->axes[2];
    *t = (reader){.x = j->x,
                  .channels = j->images * j->groups,
                  .lines = H->inputs,
                  .pitch = W->inputs,
                  .taps = W->taps,
                  .stride = W->stride,
                  .outputs = W->outputs};
    for (int64_t kw = 0; kw < W->taps; kw++) t->offsets[kw] = kw * W->dilation - W->pad;
    return begin_lines(t, (rows - 1) * H->stride + H->taps);
}
static strip read_rows(const reader *t, const conv_job *j, int64_t channel, int64_t first, int64_t rows)
{
    const axis *H = &j->axes[1];
    strip s = read_lines(t, channel, first * H->stride - H->pad, (rows - 1) * H->stride + H->taps);
    s.rows = rows;
    s.W = j->axes[2].outputs;
    return s;
}

/* Some rows of one channel of one image, given as its first strip. Strips go from the right to the left: what a vector
 * writes beyond its row is written again by the strip on the left; only at the end is part of a vector stored. A plane for
 * which the second cache is small goes by bands of rows that stay in the first with what they read. With `fetch` each strip
 * fetches what the next one reads and writes: lines so far apart are not fetched by the machine itself. */
static void rows_of_channel(const conv_job *j, const reader *x, const strip *all, int fetch)
{
    int64_t KH = j->axes[1].taps, stride = j->axes[2].stride, W = all->W, pitch = all->pitch, rows = all->rows;
    int64_t open = ceil_div(KH, stride), columns = ceil_div(W, LANES);
    int kernel = KH == 7 ? 5 : KH == 5 ? 3 + (all->taps != 5) : all->taps != 3 ? 2 : !x->narrow;
    strip_rows *const *kernels = strips[stride - 1][kernel];
    /* Both of two bands multiply the lines between them. */
    int64_t band = rows * W > SECOND ? max64(FIRST / W, 3 * (open - 1)) : rows;
    for (int64_t top = 0; top < rows; top += band)
        for (int64_t vectors = columns, take; vectors > 0; vectors -= take) {
            take = vectors % 2 == 0 ? 2 : vectors > 1 && kernels[2] ? 3 : 1;
            int64_t left = vectors - take, line = top * stride;
            strip s = *all;
            s.line += line * pitch + left * LANES * stride;
            s.above -= line, s.below -= line;
            s.inside += left * s.taps;
            s.y += top * W + left * LANES;
            s.rows = min64(band, rows - top);
            s.left = W - left * LANES;
            /* Where the next strip lies from here: on the left, or at the right end of the next band or plane. y is as many
             * rows behind the lines as are open. */
            ptrdiff_t next[2] = {-2 * LANES * stride, (open - 1) * W - 2 * LANES};
            if (!left) {
                int64_t right = (columns - take) * LANES, last = top + band >= rows;
                next[0] = (last ? inputs_of(j) - line * pitch : band * stride * pitch) + right * stride;
                next[1] = (open - 1) * W + (last ? j->y_channel - top * W : band * W) + right;
            }
            s.next = fetch || band < rows ? next : NULL;
            kernels[take - 1](&s);
        }
}

typedef struct {
    const conv_job *j;
    grid grid;
    int fetch; /* x and y do not stay in the caches */
    const real *w; /* of all filters, one after the other */
} by_rows;

static int row_tasks(int64_t begin, int64_t end, void *context)
{
    const by_rows *t = context;
    const conv_job *j = t->j;
    int64_t taps = taps_of(j), W = j->axes[2].outputs, copied = min64(max64(FIRST / W, 16), j->axes[1].outputs);
    reader x;
    int status = begin_rows(&x, j, copied);
    if (status != HL_OK) return status;
    box b = {0};
    for (int64_t i = begin; i < end; i++) {
        int64_t group = i % j->groups;
        if (i == begin || group == 0) b = box_at(j, &t->grid, i / j->groups);
        int64_t channel = b.image * j->groups + group, ready = in_place(&x, channel);
        for (int64_t h = 0, rows; h < b.size[1]; h += rows) {
            rows = ready ? b.size[1] : min64(copied, b.size[1] - h);
            strip all = read_rows(&x, j, channel, b.first[1] + h, rows);
            for (int64_t f = group * j->filters; f < (group + 1) * j->filters; f++) {
                all.w = t->w + f * taps;
                all.bias = j->bias ? j->bias[f] : 0;
                all.y = j->y + row_target(j, &b, h) + f * j->y_channel;
                all.end = all.y + rows * W;
                rows_of_channel(j, &x, &all, t->fetch);
                activate_rows(j->activation, 1, rows * W, all.y, 0);
            }
        }
    }
    end_lines(&x);
    return HL_OK;
}

/* Whether it applies, and rows are long enough and fill their vectors: the more taps, the less the transposes below cost. */
static int is_by_rows(const conv_job *j)
{
    const axis *H = &j->axes[1], *W = &j->axes[2];
    int64_t lanes = round_up(W->outputs, LANES);
    return j->filters <= DIRECT_FILTERS && is_readable(j) && (H->taps == 3 || H->taps == 5 || H->taps == 7) &&
           is_dense(j) && W->outputs > 8 && (H->taps == 3 ? W->outputs * 2 >= lanes : W->outputs * 4 >= lanes * 3);
}

/* The weights of all filters, one after the other, as they lie or in a pack. */
static int begin_rows_of_weights(const conv_job *j, const real **all, hl_pack *pack)
{
    int64_t taps = taps_of(j), filters = j->groups * j->filters;
    *pack = (hl_pack){0};
    if (in_order(j) && j->w_filter == taps && j->w_group == j->filters * taps) return HL_OK;
    *pack = begin_weights(j, HL_PACK_CONV_ROWS, filters * taps, 0);
    if (!pack->data) return HL_NOMEM;
    *all = pack->data;
    real *to = pack->data;
    for (int64_t f = 0; f < filters && !pack->ready; f++) {
        const real *w = j->w + f / j->filters * j->w_group + f % j->filters * j->w_filter;
        for (int64_t kh = 0; kh < j->axes[1].taps; kh++, w += j->w_tap[1])
            for (int64_t kw = 0; kw < j->axes[2].taps; kw++) *to++ = w[kw * j->w_tap[2]];
    }
    if (!pack->ready) hl_pack_ready(pack);
    return HL_OK;
}

/* Parallel over (box of one image, group). Lines are read where they lie, once to a strip of vectors; y is written once.
 * Source: Zhang et al., High Performance Depthwise and Pointwise Convolutions (2020), section 3. */
static int conv_by_rows(const conv_job *j)
{
    hl_note(j->groups > 1 ? "depthwise" : "direct");
    int64_t taps = taps_of(j), positions = outputs_of(j);
    /* Rows that are not copied are best read on and on, where there are channels enough for all threads. */
    if (j->images * j->groups < 2 * enough_tasks()) positions = max64(4096, 16 * j->axes[2].outputs);
    /* Strips of narrow vectors, one line of the cache wide, wait for the third cache, too. */
    double bytes = (double)(j->images * j->groups) * sizeof(real) * (double)(inputs_of(j) + j->filters * outputs_of(j));
    by_rows t = {.j = j,
                 .grid = make_grid(j, positions),
                 .fetch = bytes > (sizeof(vreal) == 64 ? 16 : 8) * 1048576.0,
                 .w = j->w};
    if (t.grid.split < 0) { /* one image a box */
        t.grid.per = 1;
        t.grid.ranges = t.grid.boxes = j->images;
    }
    hl_pack weights;
    if (begin_rows_of_weights(j, &t.w, &weights) != HL_OK) return HL_NOMEM;
    /* A multiply-add of a vector costs about four of what hl_grain counts. */
    double work = (double)(j->images * outputs_of(j)) / (double)max64(t.grid.boxes, 1) * (double)j->filters *
                  (double)(taps + 4) * 4 / LANES;
    int status = parallel_even(t.grid.boxes * j->groups, work, row_tasks, &t);
    hl_pack_end(&weights);
    return status;
}

/* ---- small maps ---- */

/* Rows of at most 8 outputs are one short vector each, and a plane is a few dozen instructions: it is walked line by line,
 * each of which is loaded once for all rows that it belongs to. */
enum { SHORT = 8 };
typedef real vshort __attribute__((vector_size(SHORT * sizeof(real))));
typedef real vshort_u __attribute__((vector_size(SHORT * sizeof(real)), aligned(sizeof(real)), may_alias));
typedef ireal vshort_int __attribute__((vector_size(SHORT * sizeof(real))));

typedef struct {
    const conv_job *j;
    const real *w; /* of all filters, one after the other */
    int64_t offsets[7]; /* of the taps of a row */
    vshort_int inside[7]; /* which outputs of a row read an input by this tap, and not the padding */
    const real *zeros; /* what lines outside are, where weights are not finite; else NULL: they add nothing */
} by_planes;

/* From the lines of one plane to one filter's outputs; nothing is written from `end` on. As in rows_strip sum[0] is of the last
 * of the rows that a line belongs to. */
static inline __attribute__((always_inline)) void short_plane(const int K, const int stride, const by_planes *t,
                                                              const real *x, const real *w, real bias, real *y,
                                                              const real *end)
{
    const axis *H = &t->j->axes[1];
    const int open = (K + stride - 1) / stride;
    const int64_t lines = H->inputs, rows = H->outputs, W = t->j->axes[2].outputs, pitch = t->j->axes[2].inputs;
    const vshort first = bias - (vshort){0};
    vshort sum[7], weights[9];
    vshort_int inside[7];
    int64_t offsets[7], l = -H->pad;
#pragma GCC unroll 7
    for (int k = 0; k < K; k++) sum[k] = first, inside[k] = t->inside[k], offsets[k] = t->offsets[k];
#pragma GCC unroll 9
    for (int k = 0; k < 9 && K == 3; k++) weights[k] = w[k] - (vshort){0};
    const real *line = x + l * pitch, *zeros = t->zeros;
    y += (1 - open) * W;
    for (int64_t row = 1 - open; row < rows; row++, y += W) {
#pragma GCC unroll 2
        for (int phase = 0; phase < stride; phase++, l++, line += pitch) {
            if ((l < 0 || l >= lines) && !zeros) continue;
            const real *from = l < 0 || l >= lines ? zeros : line;
#pragma GCC unroll 7
            for (int kw = 0; kw < K; kw++) {
                vshort in = *(const vshort_u *)(from + offsets[kw]);
                if (stride == 2)
                    in = SHUFFLE(in, *(const vshort_u *)(from + offsets[kw] + SHORT), 0, 2, 4, 6, 8, 10, 12, 14);
                in = (vshort)(inside[kw] & (vshort_int)in);
#pragma GCC unroll 7
                for (int kh = phase; kh < K; kh += stride)
                    sum[kh / stride] += in * (K == 3 ? weights[kh * K + kw] : w[kh * K + kw] - (vshort){0});
            }
        }
        if (row >= 0) {
            if (end - y >= SHORT) *(vshort_u *)y = sum[open - 1];
            else
                for (int64_t i = 0; i < W; i++) y[i] = sum[open - 1][i];
        }
#pragma GCC unroll 7
        for (int k = open - 1; k > 0; k--) sum[k] = sum[k - 1];
        sum[0] = first;
    }
}

typedef void plane_kernel(const by_planes *t, const real *x, const real *w, real bias, real *y, const real *end);
#define PLANE(K, stride) \
    static void plane_##K##_##stride(const by_planes *t, const real *x, const real *w, real bias, real *y, \
                                     const real *end) \
    { \
        short_plane(K, stride, t, x, w, bias, y, end); \
    }
PLANE(3, 1)
PLANE(3, 2)
PLANE(5, 1)
PLANE(5, 2)
PLANE(7, 1)
PLANE(7, 2)
/* [taps: 3, 5, 7][stride - 1] */
static plane_kernel *const plane_kernels[3][2] = {
    {plane_3_1, plane_3_2},
    {plane_5_1, plane_5_2},
    {plane_7_1, plane_7_2},
};

static int plane_tasks(int64_t begin, int64_t end, void *context)
{
    const by_planes *t = context;
    const conv_job *j = t->j;
    int64_t in = inputs_of(j), out = outputs_of(j), K = j->axes[1].taps, taps = K * K, all = j->images * j->groups;
    int64_t stride = j->axes[2].stride;
    plane_kernel *kernel = plane_kernels[K / 2 - 1][stride - 1];
    int64_t before = max64(-t->offsets[0], 0), after = max64(t->offsets[K - 1], 0) + SHORT * stride;
    real *copy = hl_take((size_t)(before + in + after) * sizeof(real));
    if (!copy) return HL_NOMEM;
    memset(copy, 0, (size_t)(before + in + after) * sizeof(real));
    real *limit = j->y + end * j->filters * out;
    for (int64_t i = begin; i < end; i++) {
        const real *x = j->x + i * in;
        if (i * in < before || (all - i) * in < in + after) x = memcpy(copy + before, x, (size_t)in * sizeof(real));
        for (int64_t f = 0; f < j->filters; f++) {
            int64_t filter = i % j->groups * j->filters + f;
            const real *w = t->w + filter * taps;
            real bias = j->bias ? j->bias[filter] : 0, *y = j->y + (i * j->filters + f) * out;
            kernel(t, x, w, bias, y, limit);
        }
    }
    activate_rows(j->activation, 1, (end - begin) * j->filters * out, j->y + begin * j->filters * out, 0);
    hl_give(copy);
    return HL_OK;
}

static int is_by_planes(const conv_job *j)
{
    const axis *H = &j->axes[1], *W = &j->axes[2];
    return HL_VLEN >= SHORT * (int)sizeof(real) && is_readable(j) && W->outputs <= SHORT && W->outputs * 2 > SHORT &&
           H->taps == W->taps && (H->taps == 3 || H->taps == 5 || H->taps == 7) && H->pad >= 0 && H->pad <= WIDEST &&
           j->filters <= DIRECT_FILTERS && is_dense(j) && j->y_channel == outputs_of(j) &&
           inputs_of(j) <= SECOND; /* a thread takes whole planes: some ten microseconds each */
}

/* Parallel over channels of images. x and y are read and written once. */
static int conv_by_planes(const conv_job *j)
{
    const axis *W = &j->axes[2];
    hl_note(j->groups > 1 ? "depthwise" : "direct");
    by_planes t = {.j = j, .w = j->w};
    for (int64_t k = 0; k < W->taps; k++) {
        t.offsets[k] = k * W->dilation - W->pad;
        for (int64_t o = 0; o < W->outputs; o++)
            t.inside[k][o] = -(o * W->stride + t.offsets[k] >= 0 && o * W->stride + t.offsets[k] < W->inputs);
    }
    const real nothing[3 * WIDEST + 3 * SHORT] = {0};
    hl_pack weights;
    int status = begin_rows_of_weights(j, &t.w, &weights);
    if (status == HL_OK && has_nonfinite(t.w, j->groups * j->filters * taps_of(j))) t.zeros = nothing + WIDEST;
    if (status == HL_OK)
        status = parallel_even(j->images * j->groups, (double)(j->filters * (taps_of(j) + 4) * outputs_of(j)) / 4,
                               plane_tasks, &t);
    hl_pack_end(&weights);
    return status;
}

/* ---- lanes over channels ---- */

/* Whatever the image's width, the stride and the dilation, each load is a whole vector and none is wasted. The price is to
 * transpose x and y, about one multiply-add an element. */
typedef struct {
    const conv_job *j;
    grid grid;
    int64_t rows, pitch; /* of the plane of the largest box */
    const real *packed; /* w: [LANES groups][filter of the group][tap][LANES] */
} by_channels;

/* Whether it applies: planes of the nearest caches, few inputs beside them, and lanes that are mostly taken. */
static int is_by_channels(const conv_job *j)
{
    const axis *D = &j->axes[0], *H = &j->axes[1], *W = &j->axes[2];
    return j->channels == 1 && D->outputs == 1 && D->inputs == 1 && D->taps == 1 && !D->pad && is_dense(j) &&
           j->groups * 2 > LANES && span(W, W->outputs) <= WIDEST && W->inputs <= 2 * WIDEST && span(H, 1) <= TALLEST &&
           H->stride <= TALLEST;
}

static by_channels make_by_channels(const conv_job *j)
{
    const axis *H = &j->axes[1], *W = &j->axes[2];
    by_channels t = {.j = j, .pitch = span(W, W->outputs)};
    /* Planes of 64 KiB in float32, and tall enough that boxes do not share most of their rows. */
    int64_t rows = max64(1024 / t.pitch, 2 * span(H, 1));
    t.grid = make_grid(j, max64((rows - span(H, 1)) / H->stride + 1, 1) * W->outputs);
    if (t.grid.split < 0) { /* one image a box */
        t.grid.per = 1;
        t.grid.ranges = t.grid.boxes = j->images;
    }
    t.rows = span(H, t.grid.split < 0 ? H->outputs : t.grid.per);
    return t;
}

/* LANES groups from g on of an image as plane[row][column][LANES], zero where no input lies. */
static void fill_lanes(const by_channels *t, const box *b, int64_t g, int64_t width, real *stage, real *plane)
{
    const conv_job *j = t->j;
    const axis *H = &j->axes[1], *W = &j->axes[2];
    int64_t rows = span(H, b->size[1]), origin = b->first[1] * H->stride - H->pad;
    int64_t top = min64(max64(origin, 0), H->inputs), bottom = max64(min64(origin + rows, H->inputs), top);
    int64_t left = max64(W->pad, 0), right = max64(min64(W->pad + W->inputs, t->pitch), left), line = t->pitch * LANES;
    gemm_pack_panel(width, LANES, (bottom - top) * W->inputs,
                    j->x + (b->image * j->groups + g) * inputs_of(j) + top * W->inputs, inputs_of(j), 1, stage);
    for (int64_t r = 0; r < rows; r++, plane += line) {
        int64_t row = origin + r - top; /* of the stage */
        if (row < 0 || row >= bottom - top) {
            memset(plane, 0, (size_t)line * sizeof(real));
            continue;
        }
        const real *from = stage + (row * W->inputs - W->pad) * LANES;
        for (int64_t c = left * LANES; c < right * LANES; c += LANES) store(plane + c, load(from + c));
    }
}

/* Some outputs of a row for LANES channels. */
static inline __attribute__((always_inline)) void lanes_tile(const int outputs, const conv_job *j, const real *plane,
                                                             int64_t line, const real *w, vreal bias, real *to)
{
    int64_t step = j->axes[2].stride * LANES, tap = j->axes[2].dilation * LANES;
    vreal sum[8];
#pragma GCC unroll 8
    for (int i = 0; i < outputs; i++) sum[i] = bias;
    for (int64_t kh = 0; kh < j->axes[1].taps; kh++, plane += j->axes[1].dilation * line) {
        const real *from = plane;
        for (int64_t kw = 0; kw < j->axes[2].taps; kw++, from += tap, w += LANES) {
            vreal wk = load(w);
#pragma GCC unroll 8
            for (int i = 0; i < outputs; i++) sum[i] += load(from + i * step) * wk;
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < outputs; i++) store(to + i * LANES, sum[i]);
}

static void lanes_row(const conv_job *j, const real *plane, int64_t line, const real *w, vreal bias, real *to)
{
    int64_t step = j->axes[2].stride * LANES;
    for (int64_t left = j->axes[2].outputs, n; left > 0; left -= n, plane += n * step, to += n * LANES) {
        n = min64(left, 8);
#define LANES_TILE(k) \
    case k: lanes_tile(k, j, plane, line, w, bias, to); break;
        switch (n) {
            LANES_TILE(1)
            LANES_TILE(2)
            LANES_TILE(3)
            LANES_TILE(4)
            LANES_TILE(5)
            LANES_TILE(6)
            LANES_TILE(7)
            LANES_TILE(8)
        }
    }
}

/* Memory of a task: the plane, what it is filled by, the outputs of a box as lanes, and `more` elements. */
typedef struct { real *plane, *stage, *outputs, *more; } lanes_memory;

static int take_lanes(const by_channels *t, int64_t more, lanes_memory *m)
{
    const conv_job *j = t->j;
    box largest = box_at(j, &t->grid, 0);
    int64_t plane = t->rows * t->pitch * LANES, stage = t->rows * j->axes[2].inputs * LANES;
    int64_t outputs = positions_of(&largest) * LANES;
    m->plane = hl_take((size_t)(plane + stage + outputs + more) * sizeof(real));
    if (!m->plane) return HL_NOMEM;
    m->stage = m->plane + plane;
    m->outputs = m->stage + stage;
    m->more = m->outputs + outputs;
    memset(m->plane, 0, (size_t)plane * sizeof(real)); /* what is left and right of the image stays so */
    return HL_OK;
}

static int lanes_tasks(int64_t begin, int64_t end, void *context)
{
    const by_channels *t = context;
    const conv_job *j = t->j;
    int64_t blocks = ceil_div(j->groups, LANES), taps = taps_of(j), W = j->axes[2].outputs, line = t->pitch * LANES;
    lanes_memory m;
    if (take_lanes(t, 0, &m)) return HL_NOMEM;
    for (int64_t i = begin; i < end; i++) {
        box b = box_at(j, &t->grid, i / blocks);
        int64_t g = i % blocks * LANES, width = min64(LANES, j->groups - g);
        fill_lanes(t, &b, g, width, m.stage, m.plane);
        for (int64_t f = 0; f < j->filters; f++) {
            const real *w = t->packed + (i % blocks * j->filters + f) * taps * LANES;
            real biases[LANES] = {0};
            for (int64_t lane = 0; lane < width && j->bias; lane++) biases[lane] = j->bias[(g + lane) * j->filters + f];
            for (int64_t h = 0; h < b.size[1]; h++)
                lanes_row(j, m.plane + h * j->axes[1].stride * line, line, w, load(biases), m.outputs + h * W * LANES);
            activate_rows(j->activation, 1, b.size[1] * W * LANES, m.outputs, 0);
            gemm_transpose(b.size[1] * W, width, m.outputs, LANES,
                           j->y + row_target(j, &b, 0) + (g * j->filters + f) * j->y_channel,
                           j->filters * j->y_channel);
        }
    }
    hl_give(m.plane);
    return HL_OK;
}

/* Parallel over (box of rows of an image, LANES channels). x is read once (rows that two boxes need, twice) and y written
 * once, both through the nearest caches. Source: the blocked layouts of Georganas et al., Anatomy of High-Performance Deep
 * Learning Convolutions on SIMD Architectures (2018). */
static int conv_by_channels(const conv_job *j)
{
    const axis *H = &j->axes[1], *W = &j->axes[2];
    hl_note("depthwise, lanes over channels");
    by_channels t = make_by_channels(j);
    int64_t blocks = ceil_div(j->groups, LANES), taps = taps_of(j);
    hl_pack weights = begin_weights(j, HL_PACK_CONV_LANES, blocks * j->filters * taps * LANES, 0);
    if (!weights.data) return HL_NOMEM;
    if (!weights.ready) {
        real *to = weights.data;
        memset(to, 0, (size_t)(blocks * j->filters * taps * LANES) * sizeof(real));
        for (int64_t g = 0; g < j->groups; g++)
            for (int64_t f = 0; f < j->filters; f++) {
                real *lane = to + (g / LANES * j->filters + f) * taps * LANES + g % LANES;
                const real *w = j->w + g * j->w_group + f * j->w_filter;
                for (int64_t kh = 0; kh < H->taps; kh++, w += j->w_tap[1])
                    for (int64_t kw = 0; kw < W->taps; kw++, lane += LANES) *lane = w[kw * j->w_tap[2]];
            }
        hl_pack_ready(&weights);
    }
    t.packed = weights.data;
    double work = (double)(t.rows * t.pitch * LANES) +
                  (double)(j->filters * (taps + 4) * outputs_of(j)) * (double)j->images / (double)t.grid.boxes;
    int status = parallel_even(t.grid.boxes * blocks, work, lanes_tasks, &t);
    hl_pack_end(&weights);
    return status;
}
#endif
