/* Gradients of convolutions of one channel to a group, by rows as in depthwise.h. */
#ifndef HL_DEPTHWISE_GRAD_H
#define HL_DEPTHWISE_GRAD_H

/* ---- gradient of 3x3 weights ---- */

/* sum[9] += the products of the lines that row r of gy is the last to meet with the rows[row][vector] that they belong to,
 * of which row r is the first. Rows that are not there meet no line, as it may be infinite; `whole`: all are there. */
static inline __attribute__((always_inline)) void line_products(const int stride, const int vectors, const int whole,
                                                                const strip *s, int64_t r, const vint *masks,
                                                                const vreal *rows, vreal *sum)
{
#pragma GCC unroll 2
    for (int phase = 0; phase < stride; phase++) {
        int64_t at = r * stride + phase;
        const real *from = at < s->above || at >= s->below ? s->zeros : s->line + at * s->pitch;
#pragma GCC unroll 3
        for (int kw = 0; kw < 3; kw++)
#pragma GCC unroll 2
            for (int v = 0; v < vectors; v++) {
                const real *tap = from + s->offsets[kw] + v * LANES * stride;
                vreal in = load(tap);
                if (stride == 2) in = evens(in, load(tap + LANES));
                in = kept((vreal)(masks[v * 3 + kw] & (vint)in));
#pragma GCC unroll 3
                for (int kh = phase; kh < 3; kh += stride)
                    if (whole || (r - kh / stride >= 0 && r - kh / stride < s->rows))
                        sum[kh * 3 + kw] += in * rows[kh / stride * vectors + v];
            }
    }
}

/* sums[9] += the products of some vectors of each row of gy with what each tap read. g is the first row at the first of the
 * columns; what is read of gy ends at `end`. */
static inline __attribute__((always_inline)) void rows_products(const int stride, const int vectors, const strip *s,
                                                                const real *g, const real *end, vreal *sums)
{
    const int open = (3 + stride - 1) / stride; /* rows that a line belongs to */
    vreal sum[9], rows[3 * 2];
    vint masks[3 * 2], columns[2];
#pragma GCC unroll 9
    for (int k = 0; k < 9; k++) sum[k] = sums[k];
#pragma GCC unroll 6
    for (int i = 0; i < 3 * vectors; i++) {
        masks[i] = s->inside[i];
        rows[i] = splat((real)0);
    }
#pragma GCC unroll 2
    for (int v = 0; v < vectors; v++) columns[v] = lanes_before(min64(s->left - v * LANES, LANES));
    for (int64_t r = 0; r < s->rows + open - 1; r++, g += s->W) {
#pragma GCC unroll 6
        for (int i = open * vectors - 1; i >= vectors; i--) rows[i] = rows[i - vectors];
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++)
            rows[v] = r < s->rows ? (vreal)(columns[v] & (vint)load_before(g + v * LANES, end)) : splat((real)0);
        if (r >= open - 1 && r < s->rows) line_products(stride, vectors, 1, s, r, masks, rows, sum);
        else line_products(stride, vectors, 0, s, r, masks, rows, sum);
    }
#pragma GCC unroll 9
    for (int k = 0; k < 9; k++) sums[k] = sum[k];
}

typedef struct {
    const conv_job *j;
    const real *gy;
    real *gw;
} weight_rows_job;

/* Filter by filter. A channel goes by bands of rows that stay in the first cache. */
static int weight_row_tasks(int64_t begin, int64_t end, void *context)
{
    const weight_rows_job *t = context;
    const conv_job *j = t->j;
    int64_t H = j->axes[1].outputs, W = j->axes[2].outputs, band = min64(max64(FIRST / W, 16), H);
    reader x;
    int status = begin_rows(&x, j, band);
    if (status != HL_OK) return status;
    for (int64_t f = begin; f < end; f++) {
        vreal sums[9];
        memset(sums, 0, sizeof sums);
        for (int64_t n = 0; n < j->images; n++)
            for (int64_t top = 0; top < H; top += band) {
                const real *gy = t->gy + ((n * j->groups * j->filters + f) * H + top) * W;
                strip all = read_rows(&x, j, n * j->groups + f / j->filters, top, min64(band, H - top));
                const real *gy_end = gy + all.rows * W;
                for (int64_t left = 0; left < W;) {
                    strip s = all;
                    s.line += left * j->axes[2].stride;
                    s.inside += left / LANES * 3;
                    s.left = W - left;
                    int two = s.left > LANES;
#define ROWS_PRODUCTS(stride, vectors) rows_products(stride, vectors, &s, gy + left, gy_end, sums)
                    if (j->axes[2].stride == 1) two ? ROWS_PRODUCTS(1, 2) : ROWS_PRODUCTS(1, 1);
                    else two ? ROWS_PRODUCTS(2, 2) : ROWS_PRODUCTS(2, 1);
                    left += two ? 2 * LANES : LANES;
                }
            }
        for (int k = 0; k < 9; k++) t->gw[f * 9 + k] = sum_lanes(sums[k]);
    }
    end_lines(&x);
    return HL_OK;
}

static int is_weight_by_rows(const conv_job *j)
{
    return is_readable(j) && j->axes[1].taps == 3 && j->axes[2].taps == 3;
}

/* Parallel over filters. x and gy are read once, x where it lies.
 * Source: as conv_by_rows. */
static int weight_by_rows(const conv_job *j, const real *gy, real *gw)
{
    hl_note(j->groups > 1 ? "depthwise" : "direct");
    weight_rows_job t = {j, gy, gw};
    double work = (double)(j->images * outputs_of(j)) * 9 * 4 / LANES;
    return parallel_even(j->groups * j->filters, work, weight_row_tasks, &t);
}

/* ---- gradient of weights, lanes over channels ---- */

typedef struct {
    by_channels planes; /* of x */
    const real *gy;
    real *gw;
} weight_lanes_job;

/* sums[kh][kw][LANES] += the products of `rows` rows of gy, as [row][column][LANES], with what `high` x `wide` taps read, the
 * first of them from the plane on; `pitch` from a tap's row of sums to the next. The sums of a box are added as one, so that
 * rounding does not grow with the images. */
static inline __attribute__((always_inline)) void lanes_products(const int high, const int wide, const conv_job *j,
                                                                 int64_t rows, const real *gy, const real *plane,
                                                                 int64_t line, real *sums, int64_t pitch)
{
    const axis *H = &j->axes[1], *W = &j->axes[2];
    const int64_t down = H->dilation * line, across = W->dilation * LANES, step = W->stride * LANES;
    vreal sum[9];
#pragma GCC unroll 9
    for (int k = 0; k < high * wide; k++) sum[k] = splat((real)0);
    for (int64_t h = 0; h < rows; h++, plane += H->stride * line) {
        const real *x = plane;
        for (int64_t w = 0; w < W->outputs; w++, x += step, gy += LANES) {
            vreal g = load(gy);
#pragma GCC unroll 9
            for (int k = 0; k < high * wide; k++) sum[k] += g * load(x + k / wide * down + k % wide * across);
        }
    }
#pragma GCC unroll 9
    for (int k = 0; k < high * wide; k++) {
        real *to = sums + k / wide * pitch + k % wide * LANES;
        store(to, load(to) + sum[k]);
    }
}

/* All taps, as many at a time as there are sums to keep several multiply-adds under way. */
static void lanes_sums(const conv_job *j, int64_t rows, const real *gy, const real *plane, int64_t line, real *sums)
{
    int64_t KH = j->axes[1].taps, KW = j->axes[2].taps, pitch = KW * LANES;
    if (KH == 3 && KW == 3) {
        lanes_products(3, 3, j, rows, gy, plane, line, sums, pitch);
        return;
    }
    for (int64_t kh = 0; kh < KH; kh++, plane += j->axes[1].dilation * line)
        for (int64_t kw = 0, n; kw < KW; kw += n, sums += n * LANES) {
            n = KW - kw >= 16 || KW - kw <= 8 ? min64(KW - kw, 8) : (KW - kw + 1) / 2;
            const real *from = plane + kw * j->axes[2].dilation * LANES;
#define LANES_PRODUCTS(n) \
    case n: lanes_products(1, n, j, rows, gy, from, line, sums, pitch); break;
            switch (n) {
                LANES_PRODUCTS(1)
                LANES_PRODUCTS(2)
                LANES_PRODUCTS(3)
                LANES_PRODUCTS(4)
                LANES_PRODUCTS(5)
                LANES_PRODUCTS(6)
                LANES_PRODUCTS(7)
                LANES_PRODUCTS(8)
            }
        }
}

/* LANES channels after LANES channels, over all images. */
static int weight_lanes_tasks(int64_t begin, int64_t end, void *context)
{
    const weight_lanes_job *t = context;
    const by_channels *p = &t->planes;
    const conv_job *j = p->j;
    int64_t taps = taps_of(j), W = j->axes[2].outputs, S = outputs_of(j), line = p->pitch * LANES;
    int64_t sums_size = j->filters * taps * LANES;
    lanes_memory m;
    if (take_lanes(p, sums_size, &m)) return HL_NOMEM;
    real *gy = m.outputs, *sums = m.more;
    for (int64_t i = begin; i < end; i++) {
        int64_t g = i * LANES, width = min64(LANES, j->groups - g);
        memset(sums, 0, (size_t)sums_size * sizeof(real));
        for (int64_t k = 0; k < p->grid.boxes; k++) {
            box b = box_at(j, &p->grid, k);
            fill_lanes(p, &b, g, width, m.stage, m.plane);
            for (int64_t f = 0; f < j->filters; f++) {
                const real *from = t->gy + ((b.image * j->groups + g) * j->filters + f) * S + b.first[1] * W;
                gemm_pack_panel(width, LANES, b.size[1] * W, from, j->filters * S, 1, gy);
                lanes_sums(j, b.size[1], gy, m.plane, line, sums + f * taps * LANES);
            }
        }
        for (int64_t lane = 0; lane < width; lane++)
            for (int64_t k = 0; k < j->filters * taps; k++)
                t->gw[(g + lane) * j->filters * taps + k] = sums[k * LANES + lane];
    }
    hl_give(m.plane);
    return HL_OK;
}

/* Where it applies and lanes are mostly taken, but for 3x3 weights with long rows of outputs: these are faster row by row. */
static int is_weight_by_channels(const conv_job *j)
{
    int64_t longest = HL_REGISTERS == 32 ? LANES * 3 / 4 : 24;
    return j->filters * 4 <= LANES && is_by_channels(j) && j->groups * 8 >= round_up(j->groups, LANES) * 5 &&
           !(is_weight_by_rows(j) && j->axes[2].outputs > longest);
}

/* Parallel over LANES channels. x and gy are read once (rows of x that two boxes need, twice), through the nearest caches.
 * Source: as conv_by_channels. */
static int weight_by_channels(const conv_job *j, const real *gy, real *gw)
{
    hl_note("depthwise, lanes over channels");
    weight_lanes_job t = {.planes = make_by_channels(j), .gy = gy, .gw = gw};
    int64_t blocks = ceil_div(j->groups, LANES);
    double work = (double)(t.planes.rows * t.planes.pitch * LANES) * (double)t.planes.grid.boxes +
                  (double)(j->filters * (taps_of(j) + 4) * outputs_of(j)) * (double)j->images;
    return parallel_even(blocks, work, weight_lanes_tasks, &t);
}

/* ---- gradient of the input, stride 2 ---- */

enum { SCATTER_TAPS = 7 };

typedef struct {
    const hl_conv_grad_input_plan *p;
    const real *gy, *w, *bias;
    real *gx;
    int64_t band, bands; /* lines of gx, and how many bands a channel has */
} scatter_job;

/* A line of gx: its even and odd columns are summed apart, over the `rows` of gy that reach it, which begin at `from`, and
 * their taps w. Taps kw with an even kw + odd reach the even columns. Vectors go from the left to the right; what the last
 * one writes beyond its line is written again by the next; only before `end` is part of a vector stored. */
static inline __attribute__((always_inline)) void scatter_line(const int64_t KW, const int odd, const strip *gy,
                                                               int64_t rows, const real *const *from,
                                                               const real *const *w, real *y, const real *end)
{
    const vint *inside = gy->inside;
    for (int64_t column = 0; column < gy->W; column += 2 * LANES, y += 2 * LANES, inside += KW) {
        vreal sum[2] = {splat(gy->bias), splat(gy->bias)};
        for (int64_t k = 0; k < rows; k++)
#pragma GCC unroll 8
            for (int64_t kw = 0; kw < KW; kw++)
                sum[(kw + odd) & 1] +=
                    (vreal)(inside[kw] & (vint)load(from[k] + gy->offsets[kw] + column / 2)) * splat(w[k][kw]);
        vreal both[2] = {zip_low(sum[0], sum[1]), zip_high(sum[0], sum[1])};
#pragma GCC unroll 2
        for (int v = 0; v < 2; v++) {
            int64_t left = gy->W - column - v * LANES;
            if (left > 0) store_before(y + v * LANES, end, left, both[v]);
        }
    }
}

static int scatter_tasks(int64_t begin, int64_t end, void *context)
{
    const scatter_job *t = context;
    const hl_conv_grad_input_plan *p = t->p;
    reader gy = {.x = t->gy,
                 .channels = p->N * p->C,
                 .lines = p->OH,
                 .pitch = p->OW,
                 .taps = p->KW,
                 .stride = 1,
                 .outputs = ceil_div(p->W, 2)};
    for (int64_t kw = 0; kw < p->KW; kw++) gy.offsets[kw] = (((kw + p->pad_w) & 1) + p->pad_w - kw) / 2;
    int64_t most = (t->band + p->KH) / 2 + 1; /* rows of gy to a band */
    int status = begin_lines(&gy, most);
    if (status != HL_OK) return status;
    for (int64_t i = begin; i < end; i++) {
        int64_t channel = i / t->bands, top = i % t->bands * t->band, bottom = min64(top + t->band, p->H);
        int64_t first = (top + p->pad_h - p->KH + 2) >> 1, last = (bottom - 1 + p->pad_h) >> 1, c = channel % p->C;
        strip rows = read_lines(&gy, channel, first, last - first + 1);
        real *gx = t->gx + channel * p->H * p->W;
        rows.bias = t->bias ? t->bias[c] : 0;
        rows.W = p->W;
        for (int64_t h = top; h < bottom; h++) {
            const real *from[SCATTER_TAPS], *w[SCATTER_TAPS];
            int64_t count = 0;
            for (int64_t kh = (h + p->pad_h) & 1; kh < p->KH; kh += 2, count++) {
                int64_t r = (h + p->pad_h - kh) / 2 - first;
                from[count] = r < rows.above || r >= rows.below ? rows.zeros : rows.line + r * rows.pitch;
                w[count] = t->w + (c * p->KH + kh) * p->KW;
            }
            real *y = gx + h * p->W, *y_end = gx + bottom * p->W;
#define SCATTER_LINE(KW) \
    (p->pad_w & 1 ? scatter_line(KW, 1, &rows, count, from, w, y, y_end) \
                  : scatter_line(KW, 0, &rows, count, from, w, y, y_end))
            switch (p->KW) {
            case 2: SCATTER_LINE(2); break;
            case 3: SCATTER_LINE(3); break;
            case 4: SCATTER_LINE(4); break;
            case 5: SCATTER_LINE(5); break;
            case 6: SCATTER_LINE(6); break;
            case 7: SCATTER_LINE(7); break;
            }
        }
    }
    end_lines(&gy);
    return HL_OK;
}

static int is_scatter(const hl_conv_grad_input_plan *p)
{
    return p->CG == 1 && p->F == p->C && p->C == max64(p->groups, 1) && p->D == 1 && p->OD == 1 && p->KD == 1 &&
           !p->pad_d && p->stride_h == 2 && p->stride_w == 2 && p->dilation_h == 1 && p->dilation_w == 1 &&
           p->KW >= 2 && p->KW <= SCATTER_TAPS && p->KH <= SCATTER_TAPS && p->pad_h <= WIDEST && p->pad_w <= WIDEST &&
           p->OH > 0 && p->OW > 0;
}

/* Parallel over (image, channel, band of lines of gx). gy is read where it lies, from the caches for all but one of its
 * taps; gx is written once, in memory order. Source: the convolutions by residues below, side by side. */
static int grad_input_scatter(const hl_conv_grad_input_plan *p, const real *gy, const real *w, const real *b, real *gx)
{
    hl_note("depthwise");
    scatter_job t = {.p = p, .gy = gy, .w = w, .bias = b, .gx = gx, .band = p->H};
    if (p->H * p->W > SECOND || p->N * p->C < 2 * enough_tasks()) t.band = min64(max64(FIRST / p->W, 16), p->H);
    t.bands = ceil_div(p->H, t.band);
    double work = (double)(t.band * p->W) * (double)(p->KH * p->KW + 4) / LANES;
    return parallel_even(p->N * p->C * t.bands, work, scatter_tasks, &t);
}
#endif
