/* Winograd F(4x4, 3x3): sixteen outputs of a 3x3 kernel from 36 products instead of 144, float32 only.
 *
 * A tile is 6x6 inputs (36 points) and 4x4 outputs. With lanes over channels (inputs) and over filters (weights, outputs)
 * the transforms are whole-vector sums for any size of image; between them stand 36 matrix products [tiles, C] x [C, F].
 * The points are 0, +-sqrt(1/2), +-sqrt(2) and infinity: a quarter of the rounding error of 0, +-1, +-2.
 * Source: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks (2016); the points, Alam et al., Winograd
 * Convolution for Deep Neural Networks: Efficient Point Selection (2022). */
#ifndef HL_WINOGRAD_H
#define HL_WINOGRAD_H

enum { POINTS = 36, OUT = 4, PATCH = 6 };

typedef struct {
    const conv_job *j;
    conv_job tiles; /* only images and axes[].outputs: so that make_grid cuts tiles */
    grid grid;
    int64_t T;                            /* tiles of a box at most, rounded up to half a register tile */
    int64_t C, chunk;                     /* channels rounded up to LANES; so many at a time */
    int64_t filter_block, splits;         /* filters at a time; tasks that share one box */
    int64_t box_size, group_size;         /* elements of V of one box, of U of one group */
    real *shared_v, *shared_u;            /* made before, or NULL: each task makes its own */
} winograd;

#define ROOT_HALF 0.70710678f
#define ROOT_TWO 1.41421356f

/* ---- transforms of one dimension ---- */

static inline __attribute__((always_inline)) void transform_input(const vreal *d, vreal *t)
{
    vreal even1 = d[4] - splat(2) * d[2], odd1 = d[3] - splat(2) * d[1];
    vreal even2 = d[4] - splat(0.5f) * d[2], odd2 = d[3] - splat(0.5f) * d[1];
    t[0] = (d[0] - splat(2.5f) * d[2]) + d[4];
    t[1] = even1 + splat(ROOT_HALF) * odd1;
    t[2] = even1 - splat(ROOT_HALF) * odd1;
    t[3] = even2 + splat(ROOT_TWO) * odd2;
    t[4] = even2 - splat(ROOT_TWO) * odd2;
    t[5] = (d[1] - splat(2.5f) * d[3]) + d[5];
}
static inline __attribute__((always_inline)) void transform_weight(const vreal *g, vreal *t)
{
    vreal even1 = splat(-2.0f / 3) * g[0] - splat(1.0f / 3) * g[2];
    vreal even2 = splat(1.0f / 6) * g[0] + splat(1.0f / 3) * g[2];
    t[0] = g[0];
    t[1] = even1 - splat(ROOT_TWO / 3) * g[1];
    t[2] = even1 + splat(ROOT_TWO / 3) * g[1];
    t[3] = even2 + splat(ROOT_TWO / 6) * g[1];
    t[4] = even2 - splat(ROOT_TWO / 6) * g[1];
    t[5] = g[2];
}
static inline __attribute__((always_inline)) void transform_output(const vreal *m, vreal *t)
{
    vreal sum1 = m[1] + m[2], difference1 = m[1] - m[2], sum2 = m[3] + m[4], difference2 = m[3] - m[4];
    t[0] = m[0] + sum1 + sum2;
    t[1] = splat(ROOT_HALF) * difference1 + splat(ROOT_TWO) * difference2;
    t[2] = splat(0.5f) * sum1 + splat(2) * sum2;
    t[3] = (m[5] + splat(ROOT_HALF / 2) * difference1) + splat(2 * ROOT_TWO) * difference2;
}

/* ---- V = B^T d B of a box: [chunk][point][channels / LANES][T][LANES] ---- */

/* A row of points is one vector longer than it need be: powers of two apart they would fall on one set of the cache. */
static int64_t v_point(const winograd *t, int64_t channels) { return channels * t->T + LANES; }
static int64_t u_point(int64_t channels, int64_t filters) { return channels * round_up(filters, LANES) + LANES; }
static int64_t v_size(const winograd *t) { return POINTS * (t->C * t->T + ceil_div(t->C, t->chunk) * LANES); }

/* The rows [top, bottom) and columns [left, right) of the input that a box of tiles reads. */
typedef struct { int64_t top, bottom, left, right; } region;
static region region_of(const conv_job *j, const box *b)
{
    const axis *h = &j->axes[1], *w = &j->axes[2];
    region r = {max64(b->first[1] * OUT - h->pad, 0), min64((b->first[1] + b->size[1]) * OUT + 2 - h->pad, h->inputs),
                max64(b->first[2] * OUT - w->pad, 0), min64((b->first[2] + b->size[2]) * OUT + 2 - w->pad, w->inputs)};
    r.bottom = max64(r.bottom, r.top);
    r.right = max64(r.right, r.left);
    return r;
}

/* `stage` takes the region of LANES channels of one image as [row][column][LANES]. */
static void make_v(const winograd *t, const box *b, int64_t group, real *stage, real *v)
{
    const conv_job *j = t->j;
    int64_t H = j->axes[1].inputs, W = j->axes[2].inputs, T = t->T, tiles = positions_of(b);
    region g = region_of(j, b);
    int64_t pitch = g.right - g.left, rows = g.bottom - g.top;
    for (int64_t c0 = 0, channels; c0 < t->C; c0 += channels) {
        channels = min64(t->chunk, t->C - c0);
        int64_t point = v_point(t, channels);
        for (int64_t c = 0; c < channels; c += LANES) {
            real *to = v + c * T;
            for (int64_t n = 0; n < b->images; n++) {
                const real *x =
                    j->x + (((b->image + n) * j->groups + group) * j->channels + c0 + c) * H * W + g.top * W + g.left;
                int64_t width = min64(LANES, j->channels - c0 - c);
                if (pitch == W) gemm_pack_panel(width, LANES, rows * W, x, H * W, 1, stage);
                else
                    for (int64_t r = 0; r < rows; r++)
                        gemm_pack_panel(width, LANES, pitch, x + r * W, H * W, 1, stage + r * pitch * LANES);
                for (int64_t th = 0; th < b->size[1]; th++)
                    for (int64_t tw = 0; tw < b->size[2]; tw++, to += LANES) {
                        int64_t top = (b->first[1] + th) * OUT - j->axes[1].pad - g.top;
                        int64_t left = (b->first[2] + tw) * OUT - j->axes[2].pad - g.left;
                        vreal half[PATCH][PATCH];
                        int inside = top >= 0 && top + PATCH <= rows && left >= 0 && left + PATCH <= pitch;
                        for (int64_t w = 0; w < PATCH; w++) {
                            vreal d[PATCH], e[PATCH];
                            const real *from = stage + (top * pitch + left + w) * LANES;
                            if (inside) {
#pragma GCC unroll 6
                                for (int h = 0; h < PATCH; h++) d[h] = load(from + h * pitch * LANES);
                            } else {
                                for (int h = 0; h < PATCH; h++)
                                    d[h] = top + h >= 0 && top + h < rows && left + w >= 0 && left + w < pitch
                                               ? load(from + h * pitch * LANES)
                                               : splat(0);
                            }
                            transform_input(d, e);
#pragma GCC unroll 6
                            for (int h = 0; h < PATCH; h++) half[h][w] = e[h];
                        }
                        for (int64_t h = 0; h < PATCH; h++) {
                            vreal e[PATCH];
                            transform_input(half[h], e);
#pragma GCC unroll 6
                            for (int w = 0; w < PATCH; w++) store(to + (h * PATCH + w) * point, e[w]);
                        }
                    }
            }
            for (int p = 0; p < POINTS; p++) /* the tiles that fill up T */
                memset(to + p * point, 0, (size_t)((T - tiles) * LANES) * sizeof(real));
        }
        v += POINTS * point;
    }
}

/* ---- U = G g G^T of some filters and channels: [point][filter panel][channels][panel] ---- */

/* `stage` takes LANES filters of all those channels as [channel][tap][LANES]. */
static void make_u(const winograd *t, int64_t group, int64_t f0, int64_t filters, int64_t c0, int64_t channels,
                   real *stage, real *u)
{
    const conv_job *j = t->j;
    int flip = j->w_tap[2] < 0; /* taps from the last to the first */
    const real *w =
        j->w + group * j->w_group + f0 * j->w_filter + c0 * j->w_channel + (flip ? 2 * (j->w_tap[1] + j->w_tap[2]) : 0);
    int64_t real_channels = min64(channels, j->channels - c0), point = u_point(channels, filters);
    for (int64_t f = 0, step; f < filters; f += step) {
        step = gemm_columns(filters - f);
        for (int64_t v = 0; v < step; v += LANES) {
            const real *from = w + (f + v) * j->w_filter;
            int64_t width = min64(LANES, filters - f - v);
            if (j->w_channel == 9) gemm_pack_panel(width, LANES, real_channels * 9, from, j->w_filter, 1, stage);
            else
                for (int64_t c = 0; c < real_channels; c++)
                    gemm_pack_panel(width, LANES, 9, from + c * j->w_channel, j->w_filter, 1, stage + c * 9 * LANES);
            for (int64_t c = 0; c < channels; c++) {
                real *to = u + f * channels + c * step + v;
                if (c >= real_channels) {
                    for (int p = 0; p < POINTS; p++) store(to + p * point, splat(0));
                    continue;
                }
                vreal half[PATCH][3];
                for (int kw = 0; kw < 3; kw++) {
                    vreal g[3], e[PATCH];
                    for (int kh = 0; kh < 3; kh++) {
                        int tap = kh * 3 + kw;
                        g[kh] = load(stage + (c * 9 + (flip ? 8 - tap : tap)) * LANES);
                    }
                    transform_weight(g, e);
#pragma GCC unroll 6
                    for (int h = 0; h < PATCH; h++) half[h][kw] = e[h];
                }
                for (int h = 0; h < PATCH; h++) {
                    vreal e[PATCH];
                    transform_weight(half[h], e);
#pragma GCC unroll 6
                    for (int q = 0; q < PATCH; q++) store(to + (h * PATCH + q) * point, e[q]);
                }
            }
        }
    }
}

/* ---- M[point][T][filters] = V U ---- */

static inline __attribute__((always_inline)) void point_tile(const int rows, const int vectors, int64_t channels,
                                                             int64_t T, const real *v, const real *u, real *m,
                                                             int64_t m_row, int add)
{
    vreal sum[GEMM_ROWS][GEMM_VECTORS];
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 3
        for (int k = 0; k < vectors; k++) sum[i][k] = splat((real)0);
    for (int64_t c = 0; c < channels; c += LANES, v += T * LANES)
        for (int64_t lane = 0; lane < LANES; lane++, u += vectors * LANES) {
            vreal uc[GEMM_VECTORS];
#pragma GCC unroll 3
            for (int k = 0; k < vectors; k++) uc[k] = load(u + k * LANES);
#pragma GCC unroll 8
            for (int i = 0; i < rows; i++)
#pragma GCC unroll 3
                for (int k = 0; k < vectors; k++) sum[i][k] += splat(v[i * LANES + lane]) * uc[k];
        }
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 3
        for (int k = 0; k < vectors; k++) {
            real *to = m + i * m_row + k * LANES;
            store(to, add ? sum[i][k] + load(to) : sum[i][k]);
        }
}

static void multiply_points(const winograd *t, int64_t tiles, int64_t channels, int64_t filters, const real *v,
                            const real *u, real *m, int add)
{
    int64_t T = t->T, m_row = round_up(filters, LANES), m_point = T * m_row + LANES;
    for (int p = 0; p < POINTS; p++, v += v_point(t, channels), u += u_point(channels, filters), m += m_point)
        for (int64_t f = 0, step; f < filters; f += step) {
            step = gemm_columns(filters - f);
            for (int64_t i = 0, rows; i < tiles; i += rows) {
                rows = tiles - i > GEMM_ROWS / 2 ? GEMM_ROWS : GEMM_ROWS / 2;
#define POINT_TILE(r, k) point_tile(r, k, channels, T, v + i * LANES, u + f * channels, m + i * m_row + f, m_row, add)
                if (rows == GEMM_ROWS) {
                    if (step == LANES) POINT_TILE(GEMM_ROWS, 1);
                    else if (step == 2 * LANES) POINT_TILE(GEMM_ROWS, 2);
                    else POINT_TILE(GEMM_ROWS, GEMM_VECTORS);
                } else {
                    if (step == LANES) POINT_TILE(GEMM_ROWS / 2, 1);
                    else if (step == 2 * LANES) POINT_TILE(GEMM_ROWS / 2, 2);
                    else POINT_TILE(GEMM_ROWS / 2, GEMM_VECTORS);
                }
            }
        }
}

/* ---- y = A^T m A ---- */

/* `stage` takes the outputs of LANES filters of one image as [row][column][LANES]. */
static void make_y(const winograd *t, const box *b, int64_t group, int64_t f0, int64_t filters, const real *m,
                   real *stage)
{
    const conv_job *j = t->j;
    int64_t H = j->axes[1].outputs, W = j->axes[2].outputs, m_row = round_up(filters, LANES),
            point = t->T * m_row + LANES;
    int64_t top = b->first[1] * OUT, rows = min64(b->size[1] * OUT, H - top);
    int64_t left = b->first[2] * OUT, pitch = min64(b->size[2] * OUT, W - left);
    for (int64_t f = 0; f < filters; f += LANES) {
        int64_t filter = group * j->filters + f0 + f, width = min64(LANES, filters - f);
        vreal bias = j->bias ? load_part(j->bias + filter, width, 0) : splat(0);
        const real *from = m + f;
        for (int64_t n = 0; n < b->images; n++) {
            for (int64_t th = 0; th < b->size[1]; th++)
                for (int64_t tw = 0; tw < b->size[2]; tw++, from += m_row) {
                    vreal half[OUT][PATCH];
                    for (int64_t w = 0; w < PATCH; w++) {
                        vreal e[PATCH], o[OUT];
#pragma GCC unroll 6
                        for (int h = 0; h < PATCH; h++) e[h] = load(from + (h * PATCH + w) * point);
                        transform_output(e, o);
#pragma GCC unroll 4
                        for (int h = 0; h < OUT; h++) half[h][w] = o[h];
                    }
                    real *to = stage + (th * OUT * pitch + tw * OUT) * LANES;
                    int64_t high = min64(OUT, rows - th * OUT), wide = min64(OUT, pitch - tw * OUT);
                    for (int64_t h = 0; h < high; h++) {
                        vreal o[OUT];
                        transform_output(half[h], o);
                        if (wide == OUT) {
#pragma GCC unroll 4
                            for (int w = 0; w < OUT; w++) store(to + (h * pitch + w) * LANES, o[w] + bias);
                        } else
                            for (int64_t w = 0; w < wide; w++) store(to + (h * pitch + w) * LANES, o[w] + bias);
                    }
                }
            real *y = j->y + ((b->image + n) * j->groups * j->filters + filter) * H * W + top * W + left;
            if (pitch == W) gemm_transpose(rows * W, width, stage, LANES, y, H * W);
            else
                for (int64_t r = 0; r < rows; r++)
                    gemm_transpose(pitch, width, stage + r * pitch * LANES, LANES, y + r * W, H * W);
        }
    }
}

/* ---- tasks ---- */

static int64_t stage_size(const winograd *t)
{
    box b = box_at(&t->tiles, &t->grid, 0);
    int64_t in = (b.size[1] * OUT + 2) * (b.size[2] * OUT + 2) * LANES;
    return max64(in, t->chunk * 9 * LANES);
}

/* V of one (group, box). */
static int winograd_inputs(int64_t begin, int64_t end, void *context)
{
    const winograd *t = context;
    real *stage = hl_take((size_t)stage_size(t) * sizeof(real));
    if (!stage) return HL_NOMEM;
    for (int64_t i = begin; i < end; i++) {
        box b = box_at(&t->tiles, &t->grid, i / t->j->groups);
        make_v(t, &b, i % t->j->groups, stage, t->shared_v + i * t->box_size);
    }
    hl_give(stage);
    return HL_OK;
}

/* U of one (group, block of filters). */
static int winograd_weights(int64_t begin, int64_t end, void *context)
{
    const winograd *t = context;
    int64_t F = t->j->filters, blocks = ceil_div(F, t->filter_block);
    real *stage = hl_take((size_t)stage_size(t) * sizeof(real));
    if (!stage) return HL_NOMEM;
    for (int64_t i = begin; i < end; i++) {
        int64_t f0 = i % blocks * t->filter_block, filters = min64(t->filter_block, F - f0);
        real *u = t->shared_u + i / blocks * t->group_size + i % blocks * (t->group_size / blocks);
        for (int64_t c = 0, channels; c < t->C; c += channels) {
            channels = min64(t->chunk, t->C - c);
            make_u(t, i / blocks, f0, filters, c, channels, stage, u);
            u += POINTS * u_point(channels, filters);
        }
    }
    hl_give(stage);
    return HL_OK;
}

static int winograd_tasks(int64_t begin, int64_t end, void *context)
{
    const winograd *t = context;
    const conv_job *j = t->j;
    int64_t F = j->filters, blocks = ceil_div(F, t->filter_block);
    size_t stage = (size_t)stage_size(t), v_part = t->shared_v ? 0 : (size_t)v_size(t);
    size_t u_part = t->shared_u ? 0 : (size_t)(POINTS * u_point(t->chunk, t->filter_block));
    size_t m_part = (size_t)(POINTS * (t->T * round_up(t->filter_block, LANES) + LANES));
    real *scratch = hl_take((stage + v_part + u_part + m_part) * sizeof(real));
    if (!scratch) return HL_NOMEM;
    real *own_v = scratch + stage, *own_u = own_v + v_part, *m = own_u + u_part;
    for (int64_t i = begin; i < end; i++) {
        int64_t split = i % t->splits, group = i / t->splits % j->groups, at = i / t->splits;
        box b = box_at(&t->tiles, &t->grid, at / j->groups);
        const real *v = t->shared_v ? t->shared_v + at * t->box_size : own_v;
        if (!t->shared_v) make_v(t, &b, group, scratch, own_v);
        for (int64_t block = blocks * split / t->splits; block < blocks * (split + 1) / t->splits; block++) {
            int64_t f0 = block * t->filter_block, filters = min64(t->filter_block, F - f0);
            const real *u =
                t->shared_u ? t->shared_u + group * t->group_size + block * (t->group_size / blocks) : own_u;
            const real *vc = v;
            for (int64_t c = 0, channels; c < t->C; c += channels) {
                channels = min64(t->chunk, t->C - c);
                if (!t->shared_u) make_u(t, group, f0, filters, c, channels, scratch, own_u);
                multiply_points(t, positions_of(&b), channels, filters, vc, u, m, c > 0);
                vc += POINTS * v_point(t, channels);
                if (t->shared_u) u += POINTS * u_point(channels, filters);
            }
            make_y(t, &b, group, f0, filters, m, scratch);
        }
    }
    hl_give(scratch);
    return HL_OK;
}

/* Whether it applies, and pays: fewer products, transforms included. */
static int is_winograd(const conv_job *j)
{
    const axis *d = &j->axes[0], *h = &j->axes[1], *w = &j->axes[2];
    if (d->outputs != 1 || d->inputs != 1 || d->taps != 1 || d->stride != 1 || d->pad || !is_dense(j)) return 0;
    if (h->taps != 3 || w->taps != 3 || h->stride != 1 || w->stride != 1 || h->dilation != 1 || w->dilation != 1)
        return 0;
    if (j->channels < 16 || j->filters < 16) return 0;
    /* Multiply-adds of a vector, and vectors moved or summed by the transforms (250 a tile and channel, 30 a weight). */
    double tiles = (double)j->images * (double)(ceil_div(h->outputs, OUT) * ceil_div(w->outputs, OUT));
    double C = (double)j->channels, F = (double)j->filters;
    double direct = (double)j->images * (double)h->outputs * (double)w->outputs * 9 * C * F;
    return (tiles + 2) * (POINTS * C * F + 250 * (C + F)) + 100 * C * F < 0.9 * direct;
}

/* Parallel over (box of tiles, group, split of the filters). A box of tiles goes through all its channels and filters in
 * one task, so that V and M stay in cache; what several tasks need (V when the filters are split, U when there are several
 * boxes) is made once before.
 * x is read once per box (1.3 to 1.7 times with the rims), w once, y is written once. */
static int conv_winograd(const conv_job *j)
{
    hl_note("winograd f4x4");
    winograd t = {.j = j, .tiles = {.images = j->images}, .C = round_up(j->channels, LANES)};
    t.tiles.axes[0].outputs = 1;
    for (int a = 1; a < 3; a++) t.tiles.axes[a].outputs = ceil_div(j->axes[a].outputs, OUT);
    /* 32 tiles x 64 channels or filters x 36 points are 288 KiB: V, M and the panels of U share a second-level cache of
     * 1 MiB. */
    t.grid = make_grid(&t.tiles, 32);
    box largest = box_at(&t.tiles, &t.grid, 0);
    t.T = round_up(positions_of(&largest), GEMM_ROWS / 2);
    t.filter_block = min64(64, j->filters);
    t.chunk = min64(64, t.C);
    int64_t blocks = ceil_div(j->filters, t.filter_block), boxes = t.grid.boxes * j->groups;
    t.splits = boxes >= 16 ? 1 : min64(blocks, ceil_div(16, boxes));
    t.box_size = v_size(&t);
    t.group_size = blocks * POINTS * (t.C * round_up(t.filter_block, LANES) + ceil_div(t.C, t.chunk) * LANES);
    if (t.splits > 1) t.shared_v = hl_take((size_t)(boxes * t.box_size) * sizeof(real));
    if (t.grid.boxes > 1) t.shared_u = hl_take((size_t)(j->groups * t.group_size) * sizeof(real));
    int status = (t.splits > 1 && !t.shared_v) || (t.grid.boxes > 1 && !t.shared_u) ? HL_NOMEM : HL_OK;
    if (status == HL_OK && t.shared_v) status = parallel_even(boxes, (double)t.box_size / 4, winograd_inputs, &t);
    if (status == HL_OK && t.shared_u)
        status = parallel_even(j->groups * blocks, (double)t.group_size / (double)blocks / 4, winograd_weights, &t);
    double work = (double)t.T * POINTS * (double)t.C * (double)j->filters / (double)t.splits / 16;
    if (status == HL_OK) status = parallel_even(boxes * t.splits, work, winograd_tasks, &t);
    hl_give(t.shared_v);
    hl_give(t.shared_u);
    return status;
}
#endif
