/* Convolutions of one channel to a group with lanes over channels: whatever the image's width, the stride and the dilation,
 * each load is a whole vector and none is wasted. The price is to transpose x and y, about one multiply-add an element. */
#ifndef HL_DEPTHWISE_H
#define HL_DEPTHWISE_H

typedef struct {
    const conv_job *j;
    grid grid;
    int64_t rows, pitch; /* of the plane of the largest box */
    const real *packed; /* w: [LANES groups][filter of the group][tap][LANES] */
} by_channels;

/* The inputs that so many outputs span, padding among them. */
static int64_t span(const axis *x, int64_t outputs)
{
    return (outputs - 1) * x->stride + (x->taps - 1) * x->dilation + 1;
}

/* Whether it applies: planes of the nearest caches, few inputs beside them, and lanes that are mostly taken. */
enum { WIDEST = 256, TALLEST = 64 };
static int is_by_channels(const conv_job *j)
{
    const axis *D = &j->axes[0], *H = &j->axes[1], *W = &j->axes[2];
    return j->channels == 1 && D->outputs == 1 && D->inputs == 1 && D->taps == 1 && !D->pad && is_dense(j) &&
           j->groups * 2 > LANES && span(W, W->outputs) <= WIDEST && W->inputs <= 2 * WIDEST && span(H, 1) <= TALLEST &&
           H->stride <= TALLEST;
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

static int lanes_tasks(int64_t begin, int64_t end, void *context)
{
    const by_channels *t = context;
    const conv_job *j = t->j;
    int64_t blocks = ceil_div(j->groups, LANES), taps = taps_of(j), W = j->axes[2].outputs, line = t->pitch * LANES;
    box largest = box_at(j, &t->grid, 0);
    int64_t plane_size = t->rows * line, stage_size = t->rows * j->axes[2].inputs * LANES;
    real *plane = hl_take((size_t)(plane_size + stage_size + positions_of(&largest) * LANES) * sizeof(real));
    if (!plane) return HL_NOMEM;
    real *stage = plane + plane_size, *sums = stage + stage_size;
    memset(plane, 0, (size_t)plane_size * sizeof(real)); /* what is left and right of the image stays so */
    for (int64_t i = begin; i < end; i++) {
        box b = box_at(j, &t->grid, i / blocks);
        int64_t g = i % blocks * LANES, width = min64(LANES, j->groups - g);
        fill_lanes(t, &b, g, width, stage, plane);
        for (int64_t f = 0; f < j->filters; f++) {
            const real *w = t->packed + (i % blocks * j->filters + f) * taps * LANES;
            real biases[LANES] = {0};
            for (int64_t lane = 0; lane < width && j->bias; lane++) biases[lane] = j->bias[(g + lane) * j->filters + f];
            for (int64_t h = 0; h < b.size[1]; h++)
                lanes_row(j, plane + h * j->axes[1].stride * line, line, w, load(biases), sums + h * W * LANES);
            activate_rows(j->activation, 1, b.size[1] * W * LANES, sums, 0);
            gemm_transpose(b.size[1] * W, width, sums, LANES,
                           j->y + row_target(j, &b, 0) + (g * j->filters + f) * j->y_channel,
                           j->filters * j->y_channel);
        }
    }
    hl_give(plane);
    return HL_OK;
}

/* Parallel over (box of rows of an image, LANES channels). x is read once (rows that two boxes need, twice) and y written
 * once, both through the nearest caches. Source: the blocked layouts of Georganas et al., Anatomy of High-Performance Deep
 * Learning Convolutions on SIMD Architectures (2018). */
static int conv_by_channels(const conv_job *j)
{
    const axis *H = &j->axes[1], *W = &j->axes[2];
    hl_note("depthwise, lanes over channels");
    by_channels t = {.j = j, .pitch = span(W, W->outputs)};
    /* Planes of 64 KiB in float32, and tall enough that boxes do not share most of their rows. */
    int64_t rows = max64(1024 / t.pitch, 2 * span(H, 1));
    t.grid = make_grid(j, max64((rows - span(H, 1)) / H->stride + 1, 1) * W->outputs);
    if (t.grid.split < 0) { /* one image a box */
        t.grid.per = 1;
        t.grid.ranges = t.grid.boxes = j->images;
    }
    t.rows = span(H, t.grid.split < 0 ? H->outputs : t.grid.per);
    int64_t blocks = ceil_div(j->groups, LANES), taps = taps_of(j);
    hl_pack weights = begin_weights(j, HL_PACK_CONV_LANES, blocks * j->filters * taps * LANES, 0);
    if (!weights.data) return HL_NOMEM;
    if (!weights.ready) {
        real *to = weights.data;
        for (int64_t i = 0; i < blocks * j->filters; i++)
            for (int64_t k = 0; k < taps; k++)
                for (int64_t lane = 0; lane < LANES; lane++) {
                    int64_t g = i / j->filters * LANES + lane;
                    *to++ = g < j->groups ? j->w[g * j->w_group + i % j->filters * j->w_filter +
                                                 k / W->taps * j->w_tap[1] + k % W->taps * j->w_tap[2]]
                                          : 0;
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
