/* Convolutions over three spatial dimensions and their gradients; 1-D and 2-D come with sizes of 1.
 *
 * One idea carries all of them: the rows of the input that a box of outputs needs are copied into planes, padded with
 * zeros and split into the phases of the stride. In the planes the inputs of neighbouring outputs are neighbours, so
 * input(output, tap) = base(output) + offset(tap) with no test and no division, and every load is a whole vector. */
#include "activate.h"
#include "gemm.h"
#include "prepack.h"

/* One spatial dimension: input = output * stride - pad + tap * dilation, zero outside [0, inputs). */
typedef struct { int64_t outputs, inputs, taps, stride, pad, dilation; } axis;

/* A convolution: y[image, filter, output] = bias[filter] + sum over channels, taps of w * x[image, channel, input]. The
 * gradient of the input is such convolutions too, with other strides through w and y. */
typedef struct {
    int64_t images, groups, channels, filters; /* channels and filters of one group */
    axis axes[3];                              /* D, H, W */
    const real *x;                             /* [images, groups, channels, inputs...] */
    const real *w;
    int64_t w_group, w_filter, w_channel, w_tap[3]; /* element strides of w, of any sign */
    const real *weights;                            /* the array that w points into */
    const real *bias;                               /* [groups * filters] or NULL */
    real *y;
    int64_t y_channel, y_step[3]; /* elements from a channel, an output to the next */
    int64_t activation;           /* the number of a function (activate.h), 0: none */
} conv_job;

static int64_t outputs_of(const conv_job *j) { return j->axes[0].outputs * j->axes[1].outputs * j->axes[2].outputs; }
static int64_t inputs_of(const conv_job *j) { return j->axes[0].inputs * j->axes[1].inputs * j->axes[2].inputs; }
static int64_t taps_of(const conv_job *j) { return j->axes[0].taps * j->axes[1].taps * j->axes[2].taps; }

/* One tap on each input: the image is one long row, and x is its own plane. */
static int is_pointwise(const conv_job *j)
{
    for (int a = 0; a < 3; a++) {
        const axis *x = &j->axes[a];
        if (x->taps != 1 || x->stride != 1 || x->pad || x->inputs != x->outputs) return 0;
    }
    return 1;
}
static int is_flat(const conv_job *j) { return is_pointwise(j) && j->axes[0].outputs == 1 && j->axes[1].outputs == 1; }

/* Windows side by side: each input is read once at most, and patches are rows of x turned. */
static int is_tiled(const conv_job *j)
{
    for (int a = 0; a < 3; a++) {
        const axis *x = &j->axes[a];
        if (x->taps != x->stride || x->pad || (x->taps > 1 && x->dilation != 1)) return 0;
        if (x->inputs < x->outputs * x->stride) return 0;
    }
    return j->axes[2].taps > 1;
}

/* ---- boxes of outputs ---- */

/* Some whole images, or a range of one dimension of one image with all of the dimensions inside it. */
typedef struct { int64_t image, images, first[3], size[3]; } box;

typedef struct {
    int split;           /* the dimension cut into ranges; -1: the images */
    int64_t per, ranges; /* its outputs in a range, the ranges */
    int64_t boxes;
} grid;

static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* Boxes of about `positions` outputs, as even as can be. */
static grid make_grid(const conv_job *j, int64_t positions)
{
    int64_t inside = outputs_of(j), outside = 1, extent = j->images;
    grid g = {.split = -1};
    while (inside > positions && g.split < 2) {
        outside *= extent;
        extent = j->axes[++g.split].outputs;
        inside /= extent;
    }
    g.ranges = ceil_div(extent, max64(positions / max64(inside, 1), 1));
    g.per = ceil_div(extent, g.ranges);
    g.ranges = ceil_div(extent, g.per);
    g.boxes = outside * g.ranges;
    return g;
}

/* Tasks that even out among the threads. */
static int64_t enough_tasks(void)
{
    int64_t threads = hl_num_threads(0);
    return threads > 1 ? 4 * threads : 1;
}

/* Where `tasks` boxes of groups do not go round the threads evenly, the filters are cut too: each block packs the patches again,
 * which costs as much as the products of so many filters. Blocks are of at least four tiles and two million products. */
typedef struct {
    int64_t blocks;
    double waiting; /* the time that it takes over that of threads which are never idle */
} cut;
static cut cut_filters(const conv_job *j, int64_t tasks)
{
    const int64_t threads = hl_num_threads(0);
    const int64_t packing = is_flat(j) ? 16 : 16 + 16 * j->axes[1].stride * j->axes[2].stride;
    double work =
        (double)(outputs_of(j) * j->images * j->groups) * (double)j->filters * (double)(j->channels * taps_of(j) + 4);
    cut best = {1, 0};
    for (int64_t n = 1; n <= 4 * threads; n++) {
        if (n > 1 && (j->filters / n < 4 * GEMM_ROWS || work / (double)(tasks * n) < 2e6)) break;
        double time = (double)(ceil_div(tasks * n, threads) * (j->filters / n + packing));
        time *= (double)threads / (double)(max64(tasks, 1) * (j->filters + packing));
        if (best.waiting > 0 && time >= best.waiting) continue;
        best = (cut){n, time};
    }
    return best;
}

/* What a grid with `per` outputs in a range does: whole vectors of outputs, and rows of the input, of which boxes side by side
 * both read some. To copy a vector costs as much as a tenth of its products by common numbers of filters. */
static double work_of(const conv_job *j, const grid *g, int64_t extent, int64_t inside, int64_t per)
{
    int64_t ranges = ceil_div(extent, per), last = extent - (ranges - 1) * per;
    double vectors = (double)((ranges - 1) * ceil_div(per * inside, LANES) + ceil_div(last * inside, LANES));
    const axis *x = g->split < 0 ? NULL : &j->axes[g->split];
    double rim = x ? (double)(ranges * (x->taps - 1) * x->dilation) / (double)(extent * x->stride) : 0;
    return vectors * (1 + 0.1 * rim);
}

/* Of the grids with boxes of at most 16 full panels, and small enough for all threads where that leaves four, the one that
 * does least; or one with a few boxes more that go round the threads. 8 panels where x is read with no planes between: the
 * next box is fetched during the products of one, and the second cache holds both. */
static grid make_product_grid(const conv_job *j)
{
    int64_t total = j->images * outputs_of(j), most = (is_flat(j) ? 8 : 16) * GEMM_COLUMNS;
    most = min64(most, max64(total / enough_tasks(), 4 * GEMM_COLUMNS));
    grid g = make_grid(j, most);
    int64_t outside = g.boxes / max64(g.ranges, 1), extent = g.split < 0 ? j->images : j->axes[g.split].outputs;
    int64_t inside = total / max64(outside * extent, 1);
    double least = 0;
    for (int64_t per = g.per, from = per; per > 0 && per * inside * 4 >= most; per--) {
        double work = work_of(j, &g, extent, inside, per);
        if (per < from && work >= least) continue;
        least = work;
        g.per = per;
    }
    g.ranges = g.per ? ceil_div(extent, g.per) : 0;
    int64_t threads = hl_num_threads(0), even = g.ranges;
    double waiting = cut_filters(j, outside * g.ranges * j->groups).waiting;
    while (even < extent && outside * even * j->groups % threads) even++;
    int64_t per = even ? ceil_div(extent, even) : 0;
    if (per && work_of(j, &g, extent, inside, per) < least * waiting) g.per = per;
    g.ranges = g.per ? ceil_div(extent, g.per) : 0;
    g.boxes = outside * g.ranges;
    return g;
}

static box box_at(const conv_job *j, const grid *g, int64_t i)
{
    box b = {.images = 1};
    for (int a = 0; a < 3; a++) b.size[a] = a < g->split ? 1 : j->axes[a].outputs;
    int64_t range = i % g->ranges * g->per;
    i /= g->ranges;
    if (g->split < 0) {
        b.image = range;
        b.images = min64(g->per, j->images - range);
        return b;
    }
    b.first[g->split] = range;
    b.size[g->split] = min64(g->per, j->axes[g->split].outputs - range);
    for (int a = g->split - 1; a >= 0; a--) {
        b.first[a] = i % j->axes[a].outputs;
        i /= j->axes[a].outputs;
    }
    b.image = i;
    return b;
}
static int64_t positions_of(const box *b) { return b->images * b->size[0] * b->size[1] * b->size[2]; }

/* ---- planes ---- */

/* In each dimension the plane holds either all inputs between the first and the last that a box needs, split into the
 * phases of the stride (taps share them), or, where stride or dilation leave gaps, those of each tap apart: whichever is
 * less. A phase of all three dimensions is a volume, in which the next output is one element (row, plane) on. */
typedef struct {
    int64_t phases[3], pitch[3];
    int apart[3];
    int64_t volume, channel, image; /* elements */
} planes;

static planes make_planes(const conv_job *j, const box *b, int64_t channels)
{
    planes p = {0};
    for (int a = 0; a < 3; a++) {
        const axis *x = &j->axes[a];
        int64_t reach = (x->taps - 1) * x->dilation;
        p.phases[a] = min64(x->stride, reach + 1);
        p.pitch[a] = b->size[a] + reach / x->stride;
        p.apart[a] = b->size[a] * x->taps < p.phases[a] * p.pitch[a];
        if (p.apart[a]) {
            p.phases[a] = x->taps;
            p.pitch[a] = b->size[a];
        }
    }
    p.volume = p.pitch[0] * p.pitch[1] * p.pitch[2];
    p.channel = p.phases[0] * p.phases[1] * p.phases[2] * p.volume;
    p.image = p.channel * channels;
    return p;
}
/* With what a whole vector may touch behind the last element. */
static size_t planes_size(const box *b, const planes *p)
{
    return (size_t)round_up(b->images * p->image + LANES, LANES);
}

/* The input that lies first in a phase; the next is `stride` on. */
static int64_t phase_start(const conv_job *j, const box *b, const planes *p, int a, int64_t phase)
{
    const axis *x = &j->axes[a];
    return b->first[a] * x->stride - x->pad + phase * (p->apart[a] ? x->dilation : 1);
}

/* At most LANES of the elements before `end`, zeros after them; no `end`: all of them are there. */
static inline __attribute__((always_inline)) vreal load_before(const real *from, const real *end)
{
    return !end || end - from >= LANES ? load(from) : load_part(from, max64(end - from, 0), (real)0);
}

/* A vector of a row that has `left` elements from here on. What is written beyond them is written again later; only before
 * `end` is part of it stored. */
static inline __attribute__((always_inline)) void store_before(real *to, const real *end, int64_t left, vreal v)
{
    if (end - to >= LANES) store(to, v);
    else store_part(to, left, v);
}

/* to[i] = from[i * stride] for i < n, and zeros up to the end of the last vector, whose lanes before n are `inside`. */
static inline __attribute__((always_inline)) void copy_row(const real *from, int64_t n, const int64_t stride,
                                                           vint inside, const real *end, real *to)
{
    for (int64_t i = 0; i < n; i += LANES, from += stride * LANES) {
        vreal v = load_before(from, end);
        if (stride == 2) v = evens(v, load_before(from + LANES, end));
        store(to + i, i + LANES <= n ? v : blend(inside, v, splat((real)0)));
    }
}

/* Rows of a channel, `step` apart, to copy; the next channel's, `channel` on, are fetched meanwhile. */
typedef struct {
    const real *from;
    int64_t step, channel, columns, rows;
    vint inside;     /* lanes of the last vector */
    const real *end; /* of memory, or NULL where no copy comes near it */
} lines_copy;

static inline __attribute__((always_inline)) void copy_rows(const lines_copy *c, const int64_t stride,
                                                            const int bounded, real *to, int64_t pitch)
{
    const real *from = c->from, *end = bounded ? c->end : NULL;
    for (int64_t r = 0; r < c->rows; r++, from += c->step, to += pitch) {
        for (int64_t i = 0; i < c->columns * stride; i += 64 / (int64_t)sizeof(real))
            __builtin_prefetch(from + c->channel + i);
        if (c->columns <= LANES) copy_row(from, 1, stride, c->inside, end, to);
        else copy_row(from, c->columns, stride, c->inside, end, to);
    }
}

/* Copies channels into planes that are zero where no input lies: all of them, the first time. Rows go up in memory, so
 * that the zeros behind a row are there before the next row. */
static void fill_planes(const conv_job *j, const box *b, const planes *p, int64_t group, int64_t first,
                        int64_t channels, real *to)
{
    const axis *D = &j->axes[0], *H = &j->axes[1], *W = &j->axes[2];
    int64_t x_channel = inputs_of(j), stride = W->stride;
    const real *end = j->x + j->images * j->groups * j->channels * x_channel;
    for (int64_t n = 0; n < b->images; n++)
        for (int64_t c = 0; c < channels; c++) {
            const real *x = j->x + (((b->image + n) * j->groups + group) * j->channels + first + c) * x_channel;
            real *row = to + n * p->image + c * p->channel;
            for (int64_t q = 0; q < p->phases[0] * p->phases[1] * p->phases[2]; q++) {
                int64_t d0 = phase_start(j, b, p, 0, q / p->phases[2] / p->phases[1]);
                int64_t h0 = phase_start(j, b, p, 1, q / p->phases[2] % p->phases[1]);
                int64_t w = phase_start(j, b, p, 2, q % p->phases[2]);
                int64_t low = w < 0 ? min64(ceil_div(-w, stride), p->pitch[2]) : 0;
                int64_t high = w < W->inputs ? min64((W->inputs - 1 - w) / stride + 1, p->pitch[2]) : 0;
                int64_t columns = high - low, touched = round_up(columns, LANES) * min64(stride, 2); /* by copy_row */
                vint inside = lanes_before((columns - 1) % LANES + 1);
                int64_t above = h0 < 0 ? min64(ceil_div(-h0, H->stride), p->pitch[1]) : 0;
                int64_t below = h0 < H->inputs ? min64((H->inputs - 1 - h0) / H->stride + 1, p->pitch[1]) : 0;
                for (int64_t rd = 0; rd < p->pitch[0]; rd++, row += p->pitch[1] * p->pitch[2]) {
                    int64_t d = d0 + rd * D->stride, rows = below - above;
                    if (d < 0 || d >= D->inputs || rows <= 0 || columns <= 0) continue;
                    const real *from = x + (d * H->inputs + h0 + above * H->stride) * W->inputs + w + low * stride;
                    int64_t step = H->stride * W->inputs;
                    lines_copy c = {from,
                                    step,
                                    x_channel,
                                    columns,
                                    rows,
                                    inside,
                                    end - (from + (rows - 1) * step) >= touched ? NULL : end};
                    real *to = row + above * p->pitch[2] + low;
                    if (stride == 1 && !c.end) copy_rows(&c, 1, 0, to, p->pitch[2]);
                    else if (stride == 2 && !c.end) copy_rows(&c, 2, 0, to, p->pitch[2]);
                    else if (stride == 1) copy_rows(&c, 1, 1, to, p->pitch[2]);
                    else if (stride == 2) copy_rows(&c, 2, 1, to, p->pitch[2]);
                    else
                        for (int64_t r = 0; r < rows; r++)
                            for (int64_t i = 0; i < columns; i++) to[r * p->pitch[2] + i] = from[r * step + i * stride];
                }
            }
        }
}

/* offset(tap) in the planes for k in [begin, end) of the order channel, kd, kh, kw; channel `first` lies at 0. */
static void fill_offsets(const conv_job *j, const planes *p, int64_t begin, int64_t end, int64_t first,
                         int64_t *offsets)
{
    const axis *x = j->axes;
    int64_t taps = taps_of(j);
    for (int64_t k = begin; k < end; k++, offsets++) {
        if (k - begin >= taps) { /* the same tap of the next channel */
            *offsets = offsets[-taps] + p->channel;
            continue;
        }
        int64_t tap[3] = {k / x[2].taps / x[1].taps % x[0].taps, k / x[2].taps % x[1].taps, k % x[2].taps};
        int64_t phase = 0, shift = 0;
        for (int a = 0; a < 3; a++) {
            int64_t t = tap[a] * x[a].dilation;
            phase = phase * p->phases[a] + (p->apart[a] ? tap[a] : t % x[a].stride);
            shift = shift * p->pitch[a] + (p->apart[a] ? 0 : t / x[a].stride);
        }
        *offsets = (k / taps - first) * p->channel + phase * p->volume + shift;
    }
}

/* base(output) of the first column of row r (rows of outputs counted through the whole box). */
static int64_t row_base(const box *b, const planes *p, int64_t r)
{
    int64_t h = r % b->size[1], d = r / b->size[1] % b->size[0], n = r / b->size[1] / b->size[0];
    return n * p->image + (d * p->pitch[1] + h) * p->pitch[2];
}

/* Where row r of the box begins in channel 0 of y. */
static int64_t row_target(const conv_job *j, const box *b, int64_t r)
{
    int64_t h = r % b->size[1] + b->first[1], d = r / b->size[1] % b->size[0] + b->first[0];
    int64_t n = r / b->size[1] / b->size[0] + b->image;
    return n * j->groups * j->filters * j->y_channel + d * j->y_step[0] + h * j->y_step[1] + b->first[2] * j->y_step[2];
}

/* Whether the outputs of a box of one image lie one after the other in y. */
static int is_dense(const conv_job *j)
{
    return j->y_step[2] == 1 && j->y_step[1] == j->axes[2].outputs && j->y_step[0] == j->axes[1].outputs * j->y_step[1];
}

/* Whether the weights of a filter lie as the inputs that they meet: channel, D, H, W. */
static int in_order(const conv_job *j)
{
    return j->w_tap[2] == 1 && j->w_tap[1] == j->axes[2].taps && j->w_tap[0] == j->axes[1].taps * j->w_tap[1] &&
           j->w_channel == taps_of(j);
}

/* One output whose taps are all of the inputs. */
static int is_whole(const conv_job *j)
{
    for (int a = 0; a < 3; a++) {
        const axis *x = &j->axes[a];
        if (x->outputs != 1 || x->taps != x->inputs || x->pad || (x->taps > 1 && x->dilation != 1)) return 0;
    }
    return in_order(j);
}

/* Fewer axes where the sums stay the same. */
static void flatten(conv_job *j)
{
    if (is_whole(j)) {
        j->channels *= taps_of(j);
        j->w_channel = 1;
        for (int a = 0; a < 3; a++) j->axes[a] = (axis){1, 1, 1, 1, 0, 1};
    } else if (is_dense(j) && is_pointwise(j)) {
        int64_t S = outputs_of(j);
        j->axes[0] = j->axes[1] = (axis){1, 1, 1, 1, 0, 1};
        j->axes[2] = (axis){S, S, 1, 1, 0, 1};
        j->y_step[0] = j->y_step[1] = S;
    }
}

/* From [filters, positions of the box] into y. */
static void scatter(const conv_job *j, const box *b, int64_t group, int64_t first, int64_t filters, const real *from,
                    int64_t from_row)
{
    int64_t rows = b->images * b->size[0] * b->size[1], columns = b->size[2];
    for (int64_t r = 0; r < rows; r++) {
        real *to = j->y + row_target(j, b, r) + (group * j->filters + first) * j->y_channel;
        for (int64_t f = 0; f < filters; f++, to += j->y_channel) {
            const real *row = from + f * from_row + r * columns;
            for (int64_t i = 0; i < columns; i++) to[i * j->y_step[2]] = row[i];
        }
    }
}

/* ---- implicit matrix product ---- */

typedef struct {
    const conv_job *j;
    grid grid;
    int64_t filter_blocks, depth, tasks;
    int flat;     /* one tap on each input: x is its own plane */
    int tiled;    /* the same of windows side by side */
    int past_cache; /* y does not stay in the caches, and is written once */
    real *packed; /* w: [group][part of K][row panels], or NULL: it is read where it lies */
} product;

/* Memory for what an algorithm makes of all of w; `block`: how many filters it takes at a time, where that is a choice. */
static hl_pack begin_weights(const conv_job *j, enum hl_packer algorithm, int64_t elements, int64_t block)
{
    const int64_t key[] = {
        algorithm,   sizeof(real),    LANES,           block,           j->groups,         j->channels,
        j->filters,  j->axes[0].taps, j->axes[1].taps, j->axes[2].taps, j->w - j->weights, j->w_group,
        j->w_filter, j->w_channel,    j->w_tap[0],     j->w_tap[1],     j->w_tap[2],
    };
    return hl_pack_begin(j->weights, (size_t)elements * sizeof(real), key, sizeof key / sizeof *key);
}

/* K = channels * taps is cut where a channel ends if a part holds one, else anywhere. A panel of patches is used once by each
 * filter, right after it was made: parts that are shorter than other products' keep it nearer. */
enum { PATCH_DEPTH = 256 };
static int64_t part_depth(int64_t channels, int64_t taps)
{
    if (taps > PATCH_DEPTH) return gemm_depth(channels * taps);
    int64_t most = taps == 1 ? GEMM_DEPTH : PATCH_DEPTH / taps;
    return ceil_div(channels, ceil_div(max64(channels, 1), most)) * taps;
}

/* Panels of K from k0 on, where what a filter is multiplied with does not lie in order: some columns of all filters at a
 * time, so that w is read in pieces that go on, and panels are written in pieces of some length. */
static void pack_columns_of_weights(const conv_job *j, const real *w, int64_t k0, int64_t depth, real *panels)
{
    enum { TOGETHER = 64 };
    const axis *x = j->axes;
    int64_t taps = taps_of(j), offsets[TOGETHER];
    for (int64_t k = 0, n; k < depth; k += n) {
        n = min64(depth - k, TOGETHER);
        for (int64_t i = 0; i < n; i++) {
            int64_t c = (k0 + k + i) / taps, tap = (k0 + k + i) % taps;
            offsets[i] = c * j->w_channel + tap / x[2].taps / x[1].taps * j->w_tap[0] +
                         tap / x[2].taps % x[1].taps * j->w_tap[1] + tap % x[2].taps * j->w_tap[2];
        }
        for (int64_t f = 0, rows; f < j->filters; f += rows) {
            rows = gemm_rows(j->filters - f);
            const real *from = w + f * j->w_filter;
            real *panel = panels + f * depth + k * rows;
            for (int64_t i = 0; i < n; i++, panel += rows)
                if (j->w_filter == 1) memcpy(panel, from + offsets[i], (size_t)rows * sizeof(real));
                else
                    for (int64_t r = 0; r < rows; r++) panel[r] = from[offsets[i] + r * j->w_filter];
        }
    }
}

/* Parallel over (group, part of K). w is read once, in its memory order. */
static int pack_weights(int64_t begin, int64_t end, void *context)
{
    const product *t = context;
    const conv_job *j = t->j;
    int64_t K = j->channels * taps_of(j), parts = ceil_div(K, t->depth);
    for (int64_t i = begin; i < end; i++) {
        int64_t group = i / parts, k0 = i % parts * t->depth, depth = min64(t->depth, K - k0);
        const real *w = j->w + group * j->w_group;
        real *panels = t->packed + (group * K + k0) * j->filters;
        if (!in_order(j)) pack_columns_of_weights(j, w, k0, depth, panels);
        else
            for (int64_t f = 0, rows; f < j->filters; f += rows) {
                rows = gemm_rows(j->filters - f);
                gemm_pack_panel(rows, rows, depth, w + f * j->w_filter + k0, j->w_filter, 1, panels + f * depth);
            }
    }
    return HL_OK;
}

/* All of w in panels for parts of K of that depth; data is NULL without memory. */
static int begin_panels(const conv_job *j, int64_t depth, hl_pack *pack)
{
    int64_t K = j->channels * taps_of(j);
    *pack = begin_weights(j, HL_PACK_CONV, j->groups * K * j->filters, 0);
    if (!pack->data) return HL_NOMEM;
    if (pack->ready) return HL_OK;
    product t = {.j = j, .depth = depth, .packed = pack->data};
    int status = parallel_even(K ? j->groups * ceil_div(K, depth) : 0, (double)(depth * j->filters), pack_weights, &t);
    if (status == HL_OK) hl_pack_ready(pack);
    return status;
}

/* The vectors to copy from the planes for `width` positions from s on. The last of a row copies beyond it; what follows
 * in the panel is written later. */
typedef struct { int64_t from, to; } copy;
static int64_t base_of(const box *b, const planes *p, int64_t s)
{
    return row_base(b, p, s / b->size[2]) + s % b->size[2];
}
static int64_t list_copies(const box *b, const planes *p, int64_t s, int64_t width, copy *copies)
{
    int64_t n = 0, done = 0, row = s / b->size[2], column = s % b->size[2];
    while (done < width) {
        int64_t run = min64(b->size[2] - column, width - done), base = row_base(b, p, row) + column;
        for (int64_t i = 0; i < run; i += LANES) copies[n++] = (copy){base + i, done + i};
        done += run;
        row++;
        column = 0;
    }
    return n;
}
/* `end`: of what may be read. */
static void pack_patches(int64_t depth, const int64_t *offsets, const copy *copies, int64_t n, const real *from,
                         const real *end, int64_t step, real *panel)
{
    for (int64_t k = 0; k < depth; k++, panel += step) {
        const real *source = from + offsets[k];
        if (end - source >= copies[n - 1].from + LANES)
            for (int64_t i = 0; i < n; i++) store(panel + copies[i].to, load(source + copies[i].from));
        else
            for (int64_t i = 0; i < n; i++) store(panel + copies[i].to, load_before(source + copies[i].from, end));
    }
}

/* The positions of a panel that lie in one row of outputs: where their windows begin in channel 0, and their column. */
typedef struct { int64_t from, to, count; } stretch;
static int64_t list_runs(const conv_job *j, const box *b, int64_t group, int64_t s, int64_t width, stretch *runs)
{
    const axis *D = &j->axes[0], *H = &j->axes[1], *W = &j->axes[2];
    int64_t n = 0;
    for (int64_t done = 0; done < width; done += runs[n++].count) {
        int64_t row = (s + done) / b->size[2], column = (s + done) % b->size[2], slice = row / b->size[1];
        int64_t image = b->image + slice / b->size[0], d = b->first[0] + slice % b->size[0];
        int64_t h = b->first[1] + row % b->size[1], w = b->first[2] + column;
        int64_t at = (image * j->groups + group) * j->channels * D->inputs + d * D->stride;
        at = (at * H->inputs + h * H->stride) * W->inputs + w * W->stride;
        runs[n] = (stretch){at, done, min64(b->size[2] - column, width - done)};
    }
    return n;
}
/* The rows [k, k + depth) of a panel of windows side by side: what the windows of a run read of a row of x, turned. */
static void pack_tiles(const conv_job *j, int64_t k, int64_t depth, const stretch *runs, int64_t n, int64_t step,
                       real *panel)
{
    const axis *H = &j->axes[1], *W = &j->axes[2];
    const real *end = j->x + j->images * j->groups * j->channels * inputs_of(j);
    int64_t taps = W->taps;
    for (int64_t last = k + depth, count; k < last; k += count, panel += count * step) {
        int64_t kw = k % taps, kh = k / taps % H->taps, slice = k / taps / H->taps; /* of all channels */
        int64_t kd = slice % j->axes[0].taps, c = slice / j->axes[0].taps;
        const real *x = j->x + ((c * j->axes[0].inputs + kd) * H->inputs + kh) * W->inputs + kw;
        count = min64(taps - kw, last - k);
        for (int64_t r = 0; r < n; r++) {
            const real *from = x + runs[r].from;
            real *to = panel + runs[r].to;
            if (count == 2 && W->stride == 2)
                for (int64_t i = 0; i < runs[r].count; i += LANES, from += 2 * LANES, to += LANES) {
                    vreal first = load_before(from, end), second = load_before(from + LANES, end);
                    /* What is written behind a run is written again by the next one; nothing behind the row is. */
                    const real *row_end = panel + step;
                    store_before(to, row_end, runs[r].count - i, evens(first, second));
                    store_before(to + step, row_end + step, runs[r].count - i, odds(first, second));
                }
            else gemm_transpose(runs[r].count, count, from, W->stride, to, step);
        }
    }
}

static int64_t filter_cut(const product *t, int64_t i)
{
    int64_t F = t->j->filters;
    return i == t->filter_blocks ? F : F / t->filter_blocks * i / GEMM_ROWS * GEMM_ROWS;
}

/* The inputs of a channel of the box of a task, from the first to the last, are x[channel * inputs + first] and on. */
typedef struct {
    const real *first;
    int64_t count;
} source;
static source source_of(const product *t, int64_t task)
{
    const conv_job *j = t->j;
    int64_t group = task / t->filter_blocks % j->groups, first = 0, last = 0;
    box b = box_at(j, &t->grid, task / t->filter_blocks / j->groups);
    for (int a = 0; a < 3; a++) {
        const axis *x = &j->axes[a];
        int64_t at = b.first[a] * x->stride - x->pad;
        int64_t reach = (b.size[a] - 1) * x->stride + (x->taps - 1) * x->dilation;
        first = first * x->inputs + min64(max64(at, 0), x->inputs - 1);
        last = last * x->inputs + min64(max64(at + reach, 0), x->inputs - 1);
    }
    return (source){j->x + (b.image * j->groups + group) * j->channels * inputs_of(j) + first, last - first + 1};
}

static int product_tasks(int64_t begin, int64_t end, void *context)
{
    const product *t = context;
    const conv_job *j = t->j;
    int64_t taps = taps_of(j), K = j->channels * taps, S = inputs_of(j);
    const real *x_end = j->x + j->images * j->groups * j->channels * S;
    box largest = box_at(j, &t->grid, 0);
    int64_t channels_max = taps > PATCH_DEPTH ? t->depth / taps + 2 : t->depth / taps;
    int has_planes = !t->flat && !t->tiled;
    planes p = has_planes ? make_planes(j, &largest, channels_max) : (planes){.image = j->groups * j->channels * S};
    int dense = is_dense(j) && (t->grid.split >= 0 || t->grid.per == 1); /* in one image */
    int64_t positions = positions_of(&largest), filters_max = j->filters / t->filter_blocks + 2 * GEMM_ROWS;
    size_t plane_size = has_planes ? planes_size(&largest, &p) : 0;
    size_t panel_size = (size_t)(t->depth * GEMM_COLUMNS + LANES);
    size_t result_size = dense ? 0 : (size_t)round_up(filters_max * positions, LANES);
    real *scratch =
        hl_take((plane_size + panel_size + result_size) * sizeof(real) + (size_t)t->depth * sizeof(int64_t));
    if (!scratch) return HL_NOMEM;
    real *panel = scratch + plane_size, *result = panel + panel_size;
    int64_t *offsets = (int64_t *)(result + result_size);
    for (int64_t k = 0; k < t->depth && t->flat; k++) offsets[k] = k * S;
    copy copies[GEMM_COLUMNS + GEMM_VECTORS];
    stretch runs[GEMM_COLUMNS];
    for (int64_t i = begin; i < end; i++) {
        int64_t group = i / t->filter_blocks % j->groups, f0 = filter_cut(t, i % t->filter_blocks);
        int64_t filters = filter_cut(t, i % t->filter_blocks + 1) - f0;
        box b = box_at(j, &t->grid, i / t->filter_blocks / j->groups);
        positions = positions_of(&b);
        real *y = dense ? j->y + row_target(j, &b, 0) + (group * j->filters + f0) * j->y_channel : result;
        int64_t y_row = dense ? j->y_channel : positions;
        const real *bias = j->bias ? j->bias + group * j->filters + f0 : NULL;
        source here = source_of(t, i);
        /* What this thread is most likely to take next: chunks go round the threads. */
        int64_t next = i + 1 < end ? i + 1 : i + 1 + (hl_num_threads(0) - 1) * (end - begin);
        if (has_planes) {
            p = make_planes(j, &b, channels_max);
            memset(scratch, 0, planes_size(&b, &p) * sizeof(real));
        }
        int64_t k = 0;
        do { /* once for K = 0 */
            int64_t depth = min64(t->depth, K - k), c0 = k / taps, channels = ceil_div(k + depth, taps) - c0;
            const real *a = t->packed ? t->packed + (group * K + k) * j->filters + f0 * depth
                                      : j->w + group * j->w_group + f0 * j->w_filter + k;
            int64_t a_row = t->packed ? 0 : j->w_filter;
            const real *from = t->flat ? here.first + k * S : scratch, *stop = t->flat ? x_end : panel;
            source soon = {0};
            if (k + depth < K) soon = (source){here.first + (k + depth) / taps * S, here.count};
            else if (next < t->tasks) soon = source_of(t, next);
            if (has_planes) {
                fill_planes(j, &b, &p, group, c0, channels, scratch);
                fill_offsets(j, &p, k, k + depth, c0, offsets);
            }
            for (int64_t s = 0, step; s < positions; s += step) {
                step = gemm_columns(positions - s);
                int64_t width = min64(step, positions - s);
                /* The rows of a panel that lie in x, in one image, are packed by its first tile. */
                int whole = t->flat && width == step && s % b.size[2] + width <= b.size[2];
                if (t->tiled) {
                    int64_t n = list_runs(j, &b, group, s, width, runs);
                    pack_tiles(j, k, depth, runs, n, step, panel);
                } else {
                    int64_t n = list_copies(&b, &p, s, width, copies);
                    if (!whole) pack_patches(depth, offsets, copies, n, from, stop, step, panel);
                }
                int aligned = ((uintptr_t)(y + s) | (uintptr_t)y_row * sizeof(real)) % HL_VLEN == 0;
                gemm_out out = {.c = y + s, .c_row = y_row, .past_cache = t->past_cache && dense && aligned};
                int64_t strip = gemm_next_strip(s);
                if (t->flat && strip < positions)
                    out.ahead =
                        gemm_fetch_strip(from + base_of(&b, &p, strip), positions - strip, S, depth, s, positions);
                else if (t->flat) out.ahead = gemm_fetch_strip(soon.first, soon.count, S, depth, s, positions);
                else
                    out.ahead = (gemm_ahead){soon.first, depth / taps,     S,
                                             soon.count, s / GEMM_COLUMNS, ceil_div(positions, GEMM_COLUMNS)};
                if (k) {
                    out.add = out.c;
                    out.add_row = y_row;
                } else out.row_bias = bias;
                if (whole) gemm_block(filters, width, depth, a, a_row, from + copies[0].from, S, panel, &out);
                else gemm_block(filters, width, depth, a, a_row, panel, 0, NULL, &out);
                if (k + depth >= K) activate_rows(j->activation, filters, width, y + s, y_row);
            }
            k += depth;
        } while (k < K);
        if (!dense) scatter(j, &b, group, f0, filters, result, y_row);
    }
    if (t->past_cache) stream_end();
    hl_give(scratch);
    return HL_OK;
}

/* Parallel over (box of outputs, group, block of filters); y = w[filters, K] patches[K, positions].
 * A part of K at a time: the planes of its channels, then panels of patches out of them, each multiplied with all filters
 * while it is in cache. The whole column matrix never exists.
 * x is read once per box that needs it, w once per panel (from cache), y is written once per part of K.
 * Source: Chetlur et al., cuDNN: Efficient Primitives for Deep Learning (2014), section 3. */
static int conv_product(const conv_job *j)
{
    int64_t taps = taps_of(j), K = j->channels * taps;
    /* Fewer terms than a part of other products has are not cut: C is written once. */
    int64_t depth = K <= GEMM_DEPTH ? K : part_depth(j->channels, taps);
    product t = {.j = j, .filter_blocks = 1, .grid = make_product_grid(j), .depth = depth};
    t.flat = is_flat(j);
    t.tiled = !t.flat && is_tiled(j);
    /* Less than three lines of a row at a time are slower written so. */
    t.past_cache = K <= t.depth && !j->activation && GEMM_COLUMNS * sizeof(real) >= 192 &&
                   j->images * j->groups * j->filters * outputs_of(j) > CACHE_BYTES / (int64_t)sizeof(real);
    hl_note(t.flat ? "matrix product" : "implicit gemm");
    hl_pack weights = {0};
    /* So few products of a weight do not repay packing it. Where tiles pack x, too, it is slower to read. */
    int64_t few = t.flat ? 256 : 512;
    int in_place = in_order(j) && j->images * outputs_of(j) <= few && !hl_is_prepacked(j->weights);
    int status = in_place ? HL_OK : begin_panels(j, t.depth, &weights);
    if (status == HL_OK) {
        t.packed = weights.data;
        double work =
            (double)outputs_of(j) * (double)j->images * (double)j->groups * (double)j->filters * (double)(K + 4);
        t.filter_blocks = cut_filters(j, t.grid.boxes * j->groups).blocks;
        t.tasks = t.grid.boxes * j->groups * t.filter_blocks;
        /* 16 products cost what hl_grain counts as one operation. */
        status = parallel_even(t.tasks, work / (double)t.tasks / 16, product_tasks, &t);
    }
    hl_pack_end(&weights);
    return status;
}

/* ---- direct: few filters to a group ---- */

/* Up to this many filters of a group: more repay panels of patches, unless they fill vectors. */
enum { DIRECT_FILTERS = 16 };

typedef struct {
    const conv_job *j;
    grid grid;
    int64_t depth;
    real *packed; /* w: [group][part of K][row panels] or, with lanes over filters, [group][K][width] */
    int past_cache; /* y */
    int64_t width; /* of a line of sums where lanes are over filters: these in whole vectors; else 0 */
} direct;

/* sums[rows][vectors] = (bias or what they are) + the sum over taps, straight from the planes: the outputs are taken as if they went on behind the end of a
 * row, where the planes hold something too; nobody reads those sums. */
static inline __attribute__((always_inline)) void direct_tile(const int rows, const int vectors, int64_t K,
                                                              const int64_t *offsets, const real *w, const real *from,
                                                              const real *bias, real *sums, int64_t sums_row)
{
    vreal sum[GEMM_ROWS * 3];
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++)
            sum[i * vectors + v] = bias ? splat(bias[i]) : load(sums + i * sums_row + v * LANES);
    for (int64_t k = 0; k < K; k++, w += rows) {
        const real *f = from + offsets[k];
        vreal fk[8];
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) fk[v] = load(f + v * LANES);
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++)
#pragma GCC unroll 8
            for (int v = 0; v < vectors; v++) sum[i * vectors + v] += splat(w[i]) * fk[v];
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) store(sums + i * sums_row + v * LANES, sum[i * vectors + v]);
}

/* All sums of `rows` filters; enough vectors at a time to keep several multiply-adds under way. */
static void direct_block(int64_t rows, int64_t vectors, int64_t K, const int64_t *offsets, const real *w,
                         const real *from, const real *bias, real *sums, int64_t sums_row)
{
    int64_t v = 0;
#define DIRECT_WIDE(r, wide) \
    for (; v + wide <= vectors; v += wide) \
    direct_tile(r, wide, K, offsets, w, from + v * LANES, bias, sums + v * LANES, sums_row)
#define DIRECT_TILES(r, wide) \
    DIRECT_WIDE(r, wide); \
    DIRECT_WIDE(r, 1)
    switch (rows) {
    case 1:
        DIRECT_WIDE(1, 8);
        DIRECT_WIDE(1, 4);
        DIRECT_TILES(1, 2);
        break;
    case 2:
        DIRECT_WIDE(2, 4);
        DIRECT_TILES(2, 2);
        break;
    case 3: DIRECT_TILES(3, GEMM_VECTORS); break;
    case 4: DIRECT_TILES(4, GEMM_VECTORS); break;
    case 5: DIRECT_TILES(5, GEMM_VECTORS); break;
    case 6: DIRECT_TILES(6, GEMM_VECTORS); break;
#if HL_REGISTERS == 32
    case 7: DIRECT_TILES(7, GEMM_VECTORS); break;
    default: DIRECT_TILES(8, GEMM_VECTORS);
#endif
    }
}

/* sums[GEMM_ROWS][vectors] = first + the products, over n runs of `length` elements, of what lies from each of the rows' `bases`
 * on, one broadcast each, with the vectors of a panel. */
static inline __attribute__((always_inline)) void gathered_tile(const int vectors, const real *from,
                                                                const int64_t *bases, const int64_t *runs, int64_t n,
                                                                int64_t length, const real *panel, const real *first,
                                                                int64_t first_row, real *sums, int64_t sums_row)
{
    vreal sum[GEMM_ROWS][GEMM_VECTORS];
    const real *a[GEMM_ROWS];
#pragma GCC unroll 8
    for (int i = 0; i < GEMM_ROWS; i++) {
        a[i] = from + bases[i];
#pragma GCC unroll 3
        for (int v = 0; v < vectors; v++) sum[i][v] = load(first + i * first_row + v * LANES);
    }
    for (int64_t r = 0; r < n; r++)
        for (int64_t s = 0; s < length; s++, panel += vectors * LANES) {
            vreal b[GEMM_VECTORS];
#pragma GCC unroll 3
            for (int v = 0; v < vectors; v++) b[v] = load(panel + v * LANES);
#pragma GCC unroll 8
            for (int i = 0; i < GEMM_ROWS; i++) add_row(i, vectors, a[i] + runs[r] + s, b, sum[i]);
        }
#pragma GCC unroll 8
    for (int i = 0; i < GEMM_ROWS; i++)
#pragma GCC unroll 3
        for (int v = 0; v < vectors; v++) store(sums + i * sums_row + v * LANES, sum[i][v]);
}

/* sums[outputs][width] = (bias or what they are) + the sum over taps, with lanes over filters; inputs begin at `bases`. */
static void filters_block(int64_t width, int64_t outputs, int64_t K, const int64_t *offsets, const real *w,
                          const real *from, const int64_t *bases, const real *bias, real *sums)
{
#define FILTERS_TILES(vectors) \
    for (int64_t i = 0; i < outputs; i += GEMM_ROWS, sums += GEMM_ROWS * width) \
    gathered_tile(vectors, from, bases + i, offsets, K, 1, w, bias ? bias : sums, bias ? 0 : width, sums, width)
    if (width == LANES) FILTERS_TILES(1);
    else if (width == 2 * LANES) FILTERS_TILES(2);
    else FILTERS_TILES(GEMM_VECTORS);
}
/* From these sums into all filters of y. */
static void write_filters(const conv_job *j, const box *b, int64_t group, const real *sums, int64_t width)
{
    int64_t W = b->size[2], rows = b->size[0] * b->size[1], run = is_dense(j) && W == j->axes[2].outputs ? rows : 1;
    for (int64_t r = 0; r < rows; r += run)
        gemm_transpose(run * W, j->filters, sums + r * W * width, width,
                       j->y + row_target(j, b, r) + group * j->filters * j->y_channel, j->y_channel);
}

/* From sums by plane position into one filter of y. Where rows of y follow each other, whole vectors are written and what
 * lies beyond a row is written again by the next; only at the end of the box is part of a vector stored. */
static int write_rows(const direct *t, const box *b, const planes *p, const real *sums, real *y)
{
    const conv_job *j = t->j;
    int64_t W = b->size[2], left = b->size[0] * b->size[1] * W;
    const int dense = is_dense(j) && W == j->axes[2].outputs, flows = dense && t->past_cache;
    outflow out = {0};
    if (flows && outflow_begin(&out, y, W, 1)) return HL_NOMEM;
    for (int64_t d = 0; d < b->size[0]; d++)
        for (int64_t h = 0; h < b->size[1]; h++, left -= W) {
            const real *from = sums + (d * p->pitch[1] + h) * p->pitch[2];
            real *to = flows ? outflow_place(&out) : y + d * j->y_step[0] + h * j->y_step[1];
            const real *end = to + (flows ? W + LANES : dense ? left : W);
            if (j->y_step[2] == 1)
                for (int64_t w = 0; w < W; w += LANES) store_before(to + w, end, W - w, load(from + w));
            else
                for (int64_t w = 0; w < W; w++) to[w * j->y_step[2]] = from[w];
            if (flows) outflow_added(&out, W);
        }
    if (flows) outflow_end(&out);
    return HL_OK;
}

static int direct_tasks(int64_t begin, int64_t end, void *context)
{
    const direct *t = context;
    const conv_job *j = t->j;
    int64_t taps = taps_of(j), K = j->channels * taps, width = t->width;
    box largest = box_at(j, &t->grid, 0), b = {.image = -1};
    int64_t channels_max = taps > PATCH_DEPTH ? t->depth / taps + 2 : t->depth / taps;
    planes p = make_planes(j, &largest, channels_max);
    int64_t longest = round_up(p.volume, LANES), outputs_max = width ? round_up(positions_of(&largest), GEMM_ROWS) : 0;
    size_t plane_size = planes_size(&largest, &p) + (size_t)LANES;
    size_t sums_size = (size_t)(width ? outputs_max * width : GEMM_ROWS * longest + LANES);
    real *scratch =
        hl_take((plane_size + sums_size) * sizeof(real) + (size_t)(t->depth + outputs_max) * sizeof(int64_t));
    if (!scratch) return HL_NOMEM;
    real *sums = scratch + plane_size;
    int64_t *offsets = (int64_t *)(sums + sums_size), *bases = offsets + t->depth;
    int status = HL_OK;
    for (int64_t i = begin; i < end; i++) {
        int64_t group = i % j->groups;
        if (i == begin || group == 0) { /* the planes of one box serve all groups */
            box before = b;
            b = box_at(j, &t->grid, i / j->groups);
            memset(scratch, 0, plane_size * sizeof(real));
            if (i == begin || memcmp(b.size, before.size, sizeof b.size)) { /* boxes of a size have planes alike */
                p = make_planes(j, &b, channels_max);
                fill_offsets(j, &p, 0, min64(t->depth, K), 0, offsets);
                int64_t s = 0;
                for (int64_t r = 0; r < b.size[0] * b.size[1] && outputs_max; r++)
                    for (int64_t base = row_base(&b, &p, r), c = 0; c < b.size[2]; c++) bases[s++] = base + c;
                for (; s < outputs_max; s++) bases[s] = bases[s - 1]; /* what is missing to a last tile */
            }
        }
        int64_t W = b.size[2], rows = b.size[0] * b.size[1];
        int64_t length = row_base(&b, &p, rows - 1) + W, vectors = ceil_div(length, LANES);
        for (int64_t f = 0, height; f < j->filters; f += height) {
            height = width ? j->filters : gemm_rows(j->filters - f);
            real bias[GEMM_COLUMNS + LANES] = {0};
            for (int64_t r = 0; r < height && j->bias; r++) bias[r] = j->bias[group * j->filters + f + r];
            int64_t k = 0;
            do { /* once for K = 0 */
                int64_t depth = min64(t->depth, K - k);
                int64_t c0 = k / taps;
                if (f == 0 || K > t->depth) fill_planes(j, &b, &p, group, c0, ceil_div(k + depth, taps) - c0, scratch);
                if (K > t->depth) fill_offsets(j, &p, k, k + depth, c0, offsets);
                const real *first = k ? NULL : bias;
                if (width)
                    filters_block(width, rows * W, depth, offsets, t->packed + (group * K + k) * width, scratch, bases,
                                  first, sums);
                else
                    direct_block(height, vectors, depth, offsets, t->packed + (group * K + k) * j->filters + f * depth,
                                 scratch, first, sums, longest);
                k += depth;
            } while (k < K);
            if (width) {
                activate_rows(j->activation, rows * W, width, sums, width);
                write_filters(j, &b, group, sums, width);
                continue;
            }
            activate_rows(j->activation, height, vectors * LANES, sums, longest);
            real *y = j->y + row_target(j, &b, 0) + (group * j->filters + f) * j->y_channel;
            for (int64_t r = 0; r < height && status == HL_OK; r++)
                status = write_rows(t, &b, &p, sums + r * longest, y + r * j->y_channel);
        }
    }
    hl_give(scratch);
    return status;
}

/* All of w as [group][K][width]. */
static int begin_filters(const conv_job *j, int64_t width, hl_pack *pack)
{
    int64_t K = j->channels * taps_of(j);
    *pack = begin_weights(j, HL_PACK_CONV_FILTERS, j->groups * K * width, 0);
    if (!pack->data) return HL_NOMEM;
    if (pack->ready) return HL_OK;
    for (int64_t g = 0; g < j->groups && K; g++)
        gemm_pack_panel(j->filters, width, K, j->w + g * j->w_group, j->w_filter, 1,
                        (real *)pack->data + g * K * width);
    hl_pack_ready(pack);
    return HL_OK;
}

static grid direct_grid(const conv_job *j)
{
    /* The sums of one tile of filters are 64 KiB in float32: boxes as high as the second cache likes repeat fewer lines of x. But
     * every thread has one, if there are some rows for each. */
    int64_t each = j->images * j->groups * outputs_of(j) / hl_num_threads(0) + j->axes[2].outputs;
    grid g = make_grid(j, min64(16384 / gemm_rows(j->filters), max64(each, 64)));
    if (g.split < 0) { /* one image a box */
        g.per = 1;
        g.ranges = g.boxes = j->images;
    }
    return g;
}

/* Lanes go over the outputs of a plane, of which those at the end of its rows are lost, or over filters, where fewer are. But
 * there, what tiles begin and end with costs as much as so many of their steps. Beside more filters the panels of patches stand,
 * which take a tenth longer than their products. */
enum { FILTERS_START = 3 };
static int64_t filters_width(const conv_job *j, const grid *g)
{
    int64_t width = round_up(j->filters, LANES), K = j->channels * taps_of(j);
    if (!in_order(j) || j->y_step[2] != 1 || width > GEMM_COLUMNS) return 0;
    box b = box_at(j, g, 0);
    planes p = make_planes(j, &b, 1);
    int64_t rows = b.size[0] * b.size[1], used = rows * b.size[2];
    double all = (double)round_up(row_base(&b, &p, rows - 1) + b.size[2], LANES);
    if (j->filters > DIRECT_FILTERS) all = 1.1 * (double)used;
    return all * (double)(j->filters * K) > (double)(used * width * (K + FILTERS_START)) ? width : 0;
}
static int is_direct(const conv_job *j)
{
    if (is_flat(j)) return 0;
    if (j->filters <= DIRECT_FILTERS) return 1;
    grid g = direct_grid(j);
    return filters_width(j, &g) > 0;
}

/* Parallel over (box of one image, group). The sums of a tile of filters and outputs stay in registers over all taps, lanes over
 * outputs or over filters. x is copied to planes once per box and read from the first cache once per tap; y is written once.
 * Source: Zhang et al., High Performance Depthwise and Pointwise Convolutions (2020), section 3. */
static int conv_direct(const conv_job *j)
{
    int64_t taps = taps_of(j), K = j->channels * taps;
    hl_note(j->channels == 1 && j->groups > 1 ? "depthwise" : "direct");
    direct t = {.j = j, .grid = direct_grid(j), .depth = part_depth(j->channels, taps)};
    t.past_cache = j->images * j->groups * j->filters * outputs_of(j) > CACHE_BYTES / (int64_t)sizeof(real);
    t.width = filters_width(j, &t.grid);
    hl_pack weights;
    int status = t.width ? begin_filters(j, t.width, &weights) : begin_panels(j, t.depth, &weights);
    t.packed = weights.data;
    /* A multiply-add of a vector from the planes costs about four of what hl_grain counts. */
    double work = (double)outputs_of(j) * (double)j->images / (double)max64(t.grid.boxes, 1) * (double)j->filters *
                  (double)(K + 4) * 4 / LANES;
    if (status == HL_OK) status = parallel_even(t.grid.boxes * j->groups, work, direct_tasks, &t);
    hl_pack_end(&weights);
    return status;
}

/* ---- one output to a channel ---- */

static int is_linear(const conv_job *j)
{
    return is_flat(j) && outputs_of(j) == 1 && j->groups == 1 && j->y_channel == 1;
}

/* Blocks and order as in gemm_batched: y[images, filters] = x w^T + bias, with w read where it lies. */
static int conv_linear(const conv_job *j)
{
    hl_note("matrix product");
    gemm_call g = {.M = j->images,
                   .N = j->filters,
                   .K = j->channels,
                   .a = j->x,
                   .a_row = j->channels,
                   .a_col = 1,
                   .b = j->w,
                   .b_row = j->w_channel,
                   .b_col = j->w_filter,
                   .c = j->y,
                   .c_row = j->filters,
                   .column_bias = j->bias,
                   .activation = j->activation};
    return gemm_parallel(&g);
}

/* ---- kernels ---- */

#include "depthwise.h"
#include "depthwise_grad.h"
#if HL_F32
#include "winograd.h"
#endif

static int run(conv_job *j, int exact)
{
    if (j->images <= 0 || j->groups <= 0 || j->filters <= 0 || outputs_of(j) <= 0) return HL_OK;
    if (taps_of(j) <= 0 || inputs_of(j) <= 0) j->channels = 0;
    if (!j->channels)
        for (int a = 0; a < 3; a++) j->axes[a].taps = 1;
    flatten(j);
    if (is_linear(j)) return conv_linear(j);
#if HL_F32
    if (!exact && in_order(j) && is_dense(j)) {
        if (is_winograd(j, 1)) return conv_winograd(j, 0);
        if (is_dilated_winograd(j, 0)) return conv_winograd_dilated(j, 0);
    }
#else
    (void)exact;
#endif
    if (is_by_planes(j)) return conv_by_planes(j);
    if (is_by_rows(j)) return conv_by_rows(j);
    if (is_by_channels(j)) return conv_by_channels(j);
    if (is_direct(j)) return conv_direct(j);
    return conv_product(j);
}

/* The plans of the convolution and of its gradients name its axes alike. */
#define AXES_OF(p) \
    { \
        {(p)->OD, (p)->D, (p)->KD, (p)->stride_d, (p)->pad_d, (p)->dilation_d}, \
        {(p)->OH, (p)->H, (p)->KH, (p)->stride_h, (p)->pad_h, (p)->dilation_h}, \
        {(p)->OW, (p)->W, (p)->KW, (p)->stride_w, (p)->pad_w, (p)->dilation_w}, \
    }

int HL(conv)(const hl_conv_plan *p, const real *x, const real *w, const real *b, real *y)
{
    int64_t groups = max64(p->groups, 1), taps = p->KD * p->KH * p->KW;
    conv_job j = {
        .images = p->N,
        .groups = groups,
        .channels = p->CG,
        .filters = p->F / groups,
        .axes = AXES_OF(p),
        .x = x,
        .w = w,
        .weights = w,
        .w_group = p->F / groups * p->CG * taps,
        .w_filter = p->CG * taps,
        .w_channel = taps,
        .w_tap = {p->KH * p->KW, p->KW, 1},
        .bias = b,
        .y = y,
        .y_channel = p->OD * p->OH * p->OW,
        .y_step = {p->OH * p->OW, p->OW, 1},
        .activation = p->activation,
    };
    return run(&j, p->exact != 0);
}

static int64_t gcd64(int64_t a, int64_t b)
{
    while (b) {
        int64_t r = a % b;
        a = b;
        b = r;
    }
    return a;
}

/* The inputs i, i + stride, ... of one dimension take the same taps of w: a convolution of gy with stride 1.
 * input = output * stride - pad + tap * dilation, solved for output. */
typedef struct {
    axis axis;
    int64_t first_tap, tap_step; /* of w, for tap 0 of the axis and on */
} residue;
static residue residue_of(int64_t i, int64_t inputs, int64_t outputs, int64_t taps, int64_t stride, int64_t pad,
                          int64_t dilation)
{
    int64_t g = gcd64(dilation, stride), every = stride / g, tap = 0, at = i + pad;
    while (tap < min64(every, taps) && (at - tap * dilation) % stride) tap++;
    int64_t count = tap < min64(every, taps) ? (taps - 1 - tap) / every + 1 : 0;
    int64_t last = tap + (count - 1) * every; /* taps are taken from the last down: so outputs go up */
    residue r = {{.outputs = (inputs - 1 - i) / stride + 1,
                  .inputs = outputs,
                  .taps = count,
                  .stride = 1,
                  .dilation = dilation / g,
                  .pad = count ? -((at - last * dilation) / stride) : 0},
                 last,
                 -every};
    return r;
}

typedef struct {
    const hl_conv_grad_input_plan *plan;
    const real *gy, *w, *bias;
    real *gx;
    int nonfinite; /* set by any thread, read after all of them */
} input_job;

static int scan_weights(int64_t begin, int64_t end, void *context)
{
    input_job *t = context;
    if (has_nonfinite(t->w + begin, end - begin)) __atomic_store_n(&t->nonfinite, 1, __ATOMIC_RELAXED);
    return HL_OK;
}

/* [*low, *high): the outputs that read an input at tap `offset` - pad = tap * dilation - pad. */
static void outputs_inside(int64_t offset, int64_t stride, int64_t inputs, int64_t outputs, int64_t *low, int64_t *high)
{
    *low = offset < 0 ? min64(ceil_div(-offset, stride), outputs) : 0;
    *high = offset < inputs ? min64((inputs - 1 - offset) / stride + 1, outputs) : 0;
}

/* The gradient by its definition, each gy * w added where x was read: the convolutions below multiply w by the zeros
 * around gy, which is NaN for a weight that is not finite. Parallel over (image, channel). */
static int add_products(int64_t begin, int64_t end, void *context)
{
    const input_job *t = context;
    const hl_conv_grad_input_plan *p = t->plan;
    int64_t groups = max64(p->groups, 1), FG = p->F / groups, inputs = p->D * p->H * p->W, OHW = p->OH * p->OW;
    for (int64_t i = begin; i < end; i++) {
        int64_t n = i / p->C, c = i % p->C, group = c / p->CG;
        real *gx = t->gx + i * inputs;
        for (int64_t k = 0; k < inputs; k++) gx[k] = t->bias ? t->bias[c] : (real)0;
        for (int64_t f = group * FG; f < (group + 1) * FG; f++)
            for (int64_t k = 0; k < p->KD * p->KH * p->KW; k++) {
                int64_t d = k / p->KW / p->KH * p->dilation_d - p->pad_d, d_low, d_high;
                int64_t h = k / p->KW % p->KH * p->dilation_h - p->pad_h, h_low, h_high;
                int64_t v = k % p->KW * p->dilation_w - p->pad_w, v_low, v_high;
                outputs_inside(d, p->stride_d, p->D, p->OD, &d_low, &d_high);
                outputs_inside(h, p->stride_h, p->H, p->OH, &h_low, &h_high);
                outputs_inside(v, p->stride_w, p->W, p->OW, &v_low, &v_high);
                real weight = t->w[(f * p->CG + c % p->CG) * p->KD * p->KH * p->KW + k];
                for (int64_t od = d_low; od < d_high; od++)
                    for (int64_t oh = h_low; oh < h_high; oh++) {
                        const real *from = t->gy + ((n * p->F + f) * p->OD + od) * OHW + oh * p->OW;
                        real *to = gx + ((od * p->stride_d + d) * p->H + oh * p->stride_h + h) * p->W;
                        for (int64_t ow = v_low; ow < v_high; ow++) to[ow * p->stride_w + v] += weight * from[ow];
                    }
            }
    }
    return HL_OK;
}

/* Whether one output reads each input once, all groups the same. */
static int is_outer(const hl_conv_grad_input_plan *p)
{
    return p->groups == 1 && p->OD * p->OH * p->OW == 1 && p->D == p->KD && p->H == p->KH && p->W == p->KW &&
           !(p->pad_d | p->pad_h | p->pad_w) && (p->KD == 1 || p->dilation_d == 1) &&
           (p->KH == 1 || p->dilation_h == 1) && (p->KW == 1 || p->dilation_w == 1);
}

/* Blocks and order as in gemm_batched: gx[N, C * taps] = gy w + bias, with w read where it lies. */
static int grad_input_outer(const hl_conv_grad_input_plan *p, const real *gy, const real *w, const real *b, real *gx)
{
    hl_note("matrix product");
    int64_t taps = p->KD * p->KH * p->KW;
    for (int64_t i = 0; i < p->N * p->C && b; i++)
        for (int64_t k = 0; k < taps; k++) gx[i * taps + k] = b[i % p->C];
    gemm_call g = {.M = p->N,
                   .N = p->C * taps,
                   .K = p->F,
                   .a = gy,
                   .a_row = p->F,
                   .a_col = 1,
                   .b = w,
                   .b_row = p->C * taps,
                   .b_col = 1,
                   .c = gx,
                   .c_row = p->C * taps,
                   .accumulate = b != NULL};
    return gemm_parallel(&g);
}

/* One convolution of gy for each residue of the strides; all of them write apart from each other. */
int HL(conv_grad_input)(const hl_conv_grad_input_plan *p, const real *gy, const real *w, const real *b, real *gx)
{
    int64_t groups = max64(p->groups, 1), taps = p->KD * p->KH * p->KW;
    if (p->D <= 0 || p->H <= 0 || p->W <= 0) return HL_OK;
    if (is_outer(p)) return grad_input_outer(p, gy, w, b, gx);
    input_job direct = {.plan = p, .gy = gy, .w = w, .bias = b, .gx = gx};
    int scanned = parallel_even(p->F * p->CG * taps, 1, scan_weights, &direct);
    if (scanned != HL_OK) return scanned;
    if (direct.nonfinite) {
        hl_note("direct");
        double work = (double)(p->F / groups * taps) * (double)p->OD * (double)p->OH * (double)p->OW;
        return parallel_even(p->N * p->C, work, add_products, &direct);
    }
    if (is_scatter(p)) return grad_input_scatter(p, gy, w, b, gx);
#if HL_F32
    conv_job whole = {
        .images = p->N,
        .groups = groups,
        .channels = p->F / groups,
        .filters = p->CG,
        .axes = AXES_OF(p),
        .x = gy,
        .w = w,
        .weights = w,
        .w_group = p->F / groups * p->CG * taps,
        .w_filter = taps,
        .w_channel = p->CG * taps,
        .bias = b,
        .y = gx,
    };
    if (!p->exact && is_winograd(&whole, 1)) return conv_winograd(&whole, 1);
    if (!p->exact && is_dilated_winograd(&whole, 1)) return conv_winograd_dilated(&whole, 1);
#endif
    for (int64_t d = 0; d < min64(p->stride_d, p->D); d++)
        for (int64_t h = 0; h < min64(p->stride_h, p->H); h++)
            for (int64_t v = 0; v < min64(p->stride_w, p->W); v++) {
                residue r[3] = {residue_of(d, p->D, p->OD, p->KD, p->stride_d, p->pad_d, p->dilation_d),
                                residue_of(h, p->H, p->OH, p->KH, p->stride_h, p->pad_h, p->dilation_h),
                                residue_of(v, p->W, p->OW, p->KW, p->stride_w, p->pad_w, p->dilation_w)};
                conv_job j = {
                    .images = p->N,
                    .groups = groups,
                    .channels = p->F / groups,
                    .filters = p->CG,
                    .axes = {r[0].axis, r[1].axis, r[2].axis},
                    .x = gy,
                    .w = w + (r[0].first_tap * p->KH + r[1].first_tap) * p->KW + r[2].first_tap,
                    .weights = w,
                    .w_group = p->F / groups * p->CG * taps,
                    .w_filter = taps,
                    .w_channel = p->CG * taps,
                    .w_tap = {r[0].tap_step * p->KH * p->KW, r[1].tap_step * p->KW, r[2].tap_step},
                    .bias = b,
                    .y = gx + (d * p->H + h) * p->W + v,
                    .y_channel = p->D * p->H * p->W,
                    .y_step = {p->stride_d * p->H * p->W, p->stride_h * p->W, p->stride_w},
                };
                int status = run(&j, p->exact != 0);
                if (status != HL_OK) return status;
            }
    return HL_OK;
}
/* ---- gradient of the weights ---- */

typedef struct {
    const conv_job *j; /* y is not used */
    const real *gy;
    real *gw;
    grid grid;
    int64_t first_box, boxes; /* of this pass */
    int64_t row_blocks, rows, filter_blocks, padded; /* of K; filters, and filters rounded up to LANES */
    int64_t box_size; /* elements of one packed box of one group */
    int flat;
    real *packed;
} weight_job;

/* gy of each (box, group) as panels [filters][positions], positions outermost. */
static int pack_gy(int64_t begin, int64_t end, void *context)
{
    const weight_job *t = context;
    const conv_job *j = t->j;
    int64_t S = outputs_of(j);
    for (int64_t i = begin; i < end; i++) {
        int64_t group = i % j->groups;
        box b = box_at(j, &t->grid, t->first_box + i / j->groups);
        int64_t positions = positions_of(&b), each = positions / b.images;
        int64_t first = (b.first[0] * j->axes[1].outputs + b.first[1]) * j->axes[2].outputs + b.first[2];
        for (int64_t f = 0, step; f < j->filters; f += step) {
            step = gemm_columns(j->filters - f);
            real *panel = t->packed + i * t->box_size + f * positions;
            for (int64_t n = 0; n < b.images; n++, panel += each * step)
                gemm_pack_panel(min64(step, j->filters - f), step, each,
                                t->gy + (((b.image + n) * j->groups + group) * j->filters + f) * S + first, S, 1,
                                panel);
        }
    }
    return HL_OK;
}

#if HL_VLEN == 64
/* gathered_tile added to its sums for filters that fill no more than half of a vector: processors that multiply 512 bits in two turns need one. */
static void weight_tile_half(const real *from, const int64_t *offsets, const int64_t *runs, int64_t n, int64_t length,
                             const real *gy, real *sums, int64_t sums_row)
{
    typedef real half __attribute__((vector_size(HL_VLEN / 2), aligned(sizeof(real)), may_alias));
    half sum[GEMM_ROWS];
    const real *a[GEMM_ROWS];
#pragma GCC unroll 8
    for (int i = 0; i < GEMM_ROWS; i++) {
        a[i] = from + offsets[i];
        sum[i] = *(const half *)(sums + i * sums_row);
    }
    for (int64_t r = 0; r < n; r++)
        for (int64_t s = runs[r]; s < runs[r] + length; s++, gy += LANES) {
            half g = *(const half *)gy;
#pragma GCC unroll 8
            for (int i = 0; i < GEMM_ROWS; i++) sum[i] += a[i][s] * g;
        }
#pragma GCC unroll 8
    for (int i = 0; i < GEMM_ROWS; i++) *(half *)(sums + i * sums_row) = sum[i];
}
#endif

/* sums[rows][filters] += patches^T gy over all runs of `length` positions, as many rows as fill tiles: the patches are read where
 * they lie in the planes, gy from its panel. */
static void weight_rows(int64_t rows, int64_t filters, const real *from, const int64_t *offsets, const int64_t *runs,
                        int64_t n, int64_t length, const real *gy, real *sums, int64_t sums_row)
{
    int64_t vectors = ceil_div(filters, LANES);
    for (int64_t r = 0; r < rows; r += GEMM_ROWS) {
        real *to = sums + r * sums_row;
#if HL_VLEN == 64
        if (filters <= LANES / 2) {
            weight_tile_half(from, offsets + r, runs, n, length, gy, to, sums_row);
            continue;
        }
#endif
#define WEIGHT_TILE(vectors) gathered_tile(vectors, from, offsets + r, runs, n, length, gy, to, sums_row, to, sums_row)
        if (vectors == 1) WEIGHT_TILE(1);
        else if (vectors == 2) WEIGHT_TILE(2);
#if HL_REGISTERS == 32
        else WEIGHT_TILE(3);
#endif
    }
}

static int64_t weight_filter_cut(const weight_job *t, int64_t i)
{
    int64_t F = t->j->filters;
    return i == t->filter_blocks ? F : (F / t->filter_blocks * i + GEMM_COLUMNS / 2) / GEMM_COLUMNS * GEMM_COLUMNS;
}

/* One block of rows (channel, tap) of one group against one block of filters, over all boxes of this pass. */
static int weight_tasks(int64_t begin, int64_t end, void *context)
{
    const weight_job *t = context;
    const conv_job *j = t->j;
    int64_t taps = taps_of(j), K = j->channels * taps, S = inputs_of(j);
    box largest = box_at(j, &t->grid, 0);
    int64_t channels_max = t->rows / taps + 2;
    planes p = make_planes(j, &largest, channels_max);
    int flat = t->flat && t->grid.split >= 0;
    int64_t runs_max = largest.images * largest.size[0] * largest.size[1];
    size_t plane_size = flat ? 0 : planes_size(&largest, &p);
    size_t sums_size = (size_t)(t->rows * t->padded);
    real *scratch = hl_take((plane_size + sums_size) * sizeof(real) + (size_t)(t->rows + runs_max) * sizeof(int64_t));
    if (!scratch) return HL_NOMEM;
    real *sums = scratch + plane_size;
    int64_t *offsets = (int64_t *)(sums + sums_size), *runs = offsets + t->rows;
    for (int64_t i = begin; i < end; i++) {
        int64_t group = i / t->filter_blocks / t->row_blocks, r0 = i / t->filter_blocks % t->row_blocks * t->rows;
        int64_t rows = min64(t->rows, K - r0), c0 = r0 / taps, channels = ceil_div(r0 + rows, taps) - c0;
        int64_t tall = round_up(rows, GEMM_ROWS);
        int64_t f0 = weight_filter_cut(t, i % t->filter_blocks), f1 = weight_filter_cut(t, i % t->filter_blocks + 1);
        memset(sums, 0, sums_size * sizeof(real));
        for (int64_t n = 0; n < t->boxes; n++) {
            box b = box_at(j, &t->grid, t->first_box + n);
            int64_t positions = positions_of(&b), count = b.images * b.size[0] * b.size[1];
            const real *from = scratch;
            if (flat) {
                from = j->x + ((b.image * j->groups + group) * j->channels + c0) * S + b.first[2];
                for (int64_t r = 0; r < rows; r++) offsets[r] = r * S;
                runs[0] = 0;
            } else {
                p = make_planes(j, &b, channels_max);
                memset(scratch, 0, planes_size(&b, &p) * sizeof(real));
                fill_planes(j, &b, &p, group, c0, channels, scratch);
                fill_offsets(j, &p, r0, r0 + rows, c0, offsets);
                for (int64_t r = 0; r < count; r++) runs[r] = row_base(&b, &p, r);
            }
            for (int64_t r = rows; r < tall; r++) offsets[r] = offsets[0]; /* nobody reads their sums */
            for (int64_t f = f0, step; f < f1; f += step) {
                step = gemm_columns(f1 - f);
                weight_rows(tall, min64(step, f1 - f), from, offsets, runs, count, b.size[2],
                            t->packed + (n * j->groups + group) * t->box_size + f * positions, sums + (f - f0),
                            t->padded);
            }
        }
        real *to = t->gw + (group * j->filters + f0) * K + r0;
        if (!t->first_box) gemm_transpose(rows, f1 - f0, sums, t->padded, to, K);
        else
            for (int64_t f = 0; f < f1 - f0; f++)
                for (int64_t r = 0; r < rows; r++) to[f * K + r] += sums[r * t->padded + f];
    }
    hl_give(scratch);
    return HL_OK;
}

/* Parallel over (group, block of rows of K, block of filters); gw^T[K, filters] = patches^T[K, positions] gy^T[positions,
 * filters]. gy is transposed into panels first, as many boxes at a time as fit 32 MiB; then each task goes through all
 * boxes in order, so that a sum never depends on the threads.
 * gy is read twice and again (from panels) by each block of rows, x once per block of filters, gw is written once a pass.
 * Source: the transposed product of conv_product. */
static int weight_product(weight_job *t)
{
    const conv_job *j = t->j;
    int64_t K = j->channels * taps_of(j);
    t->flat = is_flat(j);
    hl_note(t->flat ? "matrix product" : "implicit gemm");
    /* At least 72 rows to a block, so that gy is not read from memory for too little work; 32 blocks are enough. */
    t->row_blocks = ceil_div(K, max64(72, ceil_div(K, 32)));
    t->rows = round_up(ceil_div(K, t->row_blocks), GEMM_ROWS);
    t->row_blocks = ceil_div(K, t->rows);
    t->filter_blocks = 1;
    while (j->groups * t->row_blocks * t->filter_blocks < 8 && j->filters / t->filter_blocks >= 2 * GEMM_COLUMNS)
        t->filter_blocks *= 2;
    t->padded = round_up(ceil_div(j->filters, t->filter_blocks), LANES) + 2 * GEMM_COLUMNS;
    box largest = box_at(j, &t->grid, 0);
    t->box_size = positions_of(&largest) * round_up(j->filters, LANES);
    int64_t pass = min64(t->grid.boxes, max64((32 << 20) / (int64_t)sizeof(real) / (j->groups * t->box_size), 1));
    t->packed = hl_take((size_t)(pass * j->groups * t->box_size) * sizeof(real));
    if (!t->packed) return HL_NOMEM;
    int status = HL_OK;
    for (; t->first_box < t->grid.boxes && status == HL_OK; t->first_box += pass) {
        t->boxes = min64(pass, t->grid.boxes - t->first_box);
        status = parallel_even(t->boxes * j->groups, (double)t->box_size, pack_gy, t);
        if (status != HL_OK) break;
        double work = (double)t->rows * (double)t->padded * (double)positions_of(&largest) * (double)t->boxes / 16;
        status = parallel_even(j->groups * t->row_blocks * t->filter_blocks, work, weight_tasks, t);
    }
    hl_give(t->packed);
    return status;
}

/* gw[filters, channels] = gy[filters, positions] x[channels, positions]^T, summed over the images; x is what is brought into
 * panels, and no result has to be turned. */
static int weight_flat(const conv_job *j, const real *gy, real *gw)
{
    int64_t S = outputs_of(j);
    hl_note("matrix product");
    for (int64_t i = 0; i < j->images; i++) {
        gemm_call g = {.M = j->filters,
                       .N = j->channels,
                       .K = S,
                       .a = gy + i * j->filters * S,
                       .a_row = S,
                       .a_col = 1,
                       .b = j->x + i * j->channels * S,
                       .b_row = 1,
                       .b_col = S,
                       .c = gw,
                       .c_row = j->channels,
                       .accumulate = i > 0};
        int status = gemm_parallel(&g);
        if (status != HL_OK) return status;
    }
    return HL_OK;
}

/* sums[k] += gy * patches over one row of W outputs, up to nine k; gy is zero beyond the row, what the planes hold there
 * is masked away (it may be infinite). */
static inline __attribute__((always_inline)) void dot_row(const int count, int64_t W, const real *gy, const real *from,
                                                          const int64_t *offsets, vreal *sums)
{
    int64_t s = 0;
    for (; s + LANES <= W; s += LANES) {
        vreal g = load(gy + s);
#pragma GCC unroll 9
        for (int i = 0; i < count; i++) sums[i] += g * load(from + offsets[i] + s);
    }
    if (s == W) return;
    vint inside;
    for (int i = 0; i < LANES; i++) inside[i] = s + i < W ? -1 : 0;
    vreal g = load(gy + s);
#pragma GCC unroll 9
    for (int i = 0; i < count; i++) sums[i] += g * blend(inside, load(from + offsets[i] + s), splat((real)0));
}

/* One group and block of rows, over all boxes. */
static int weight_dots(int64_t begin, int64_t end, void *context)
{
    const weight_job *t = context;
    const conv_job *j = t->j;
    int64_t taps = taps_of(j), K = j->channels * taps, S = outputs_of(j);
    box largest = box_at(j, &t->grid, 0);
    int64_t channels_max = t->rows / taps + 2;
    planes p = make_planes(j, &largest, channels_max);
    int64_t lines = largest.images * largest.size[0] * largest.size[1], pitch = round_up(largest.size[2], LANES);
    size_t plane_size = planes_size(&largest, &p), gy_size = (size_t)(lines * pitch);
    size_t sums_size = (size_t)(t->rows * j->filters * LANES);
    real *scratch =
        hl_take((plane_size + gy_size + sums_size) * sizeof(real) + (size_t)(t->rows + lines) * sizeof(int64_t));
    if (!scratch) return HL_NOMEM;
    real *gy = scratch + plane_size;
    vreal *sums = (vreal *)(gy + gy_size);
    int64_t *offsets = (int64_t *)(gy + gy_size + sums_size), *bases = offsets + t->rows;
    for (int64_t i = begin; i < end; i++) {
        int64_t group = i / t->row_blocks, r0 = i % t->row_blocks * t->rows, rows = min64(t->rows, K - r0);
        int64_t c0 = r0 / taps, channels = ceil_div(r0 + rows, taps) - c0;
        memset(sums, 0, sums_size * sizeof(real));
        for (int64_t n = 0; n < t->grid.boxes; n++) {
            box b = box_at(j, &t->grid, n);
            int64_t W = b.size[2];
            lines = b.images * b.size[0] * b.size[1];
            p = make_planes(j, &b, channels_max);
            memset(scratch, 0, planes_size(&b, &p) * sizeof(real));
            fill_planes(j, &b, &p, group, c0, channels, scratch);
            fill_offsets(j, &p, r0, r0 + rows, c0, offsets);
            for (int64_t r = 0; r < lines; r++) bases[r] = row_base(&b, &p, r);
            for (int64_t f = 0; f < j->filters; f++) {
                vreal *sum = sums + f * t->rows;
                for (int64_t r = 0; r < lines; r++) {
                    int64_t h = r % b.size[1] + b.first[1], d = r / b.size[1] % b.size[0] + b.first[0];
                    int64_t image = r / b.size[1] / b.size[0] + b.image;
                    copy_row(t->gy + ((image * j->groups + group) * j->filters + f) * S +
                                 (d * j->axes[1].outputs + h) * j->axes[2].outputs + b.first[2],
                             W, 1, lanes_before((W - 1) % LANES + 1), t->gy + j->images * j->groups * j->filters * S,
                             gy + r * pitch);
                }
                for (int64_t k = 0, count; k < rows; k += count) {
                    count = rows - k >= 9 ? 9 : rows - k >= 3 ? 3 : 1; /* the taps of 3x3, of one row of it */
                    vreal part[9];
                    memcpy(part, sum + k, (size_t)count * sizeof(vreal));
                    for (int64_t r = 0; r < lines; r++) {
                        const real *base = scratch + bases[r], *g = gy + r * pitch;
                        if (count == 9) dot_row(9, W, g, base, offsets + k, part);
                        else if (count == 3) dot_row(3, W, g, base, offsets + k, part);
                        else dot_row(1, W, g, base, offsets + k, part);
                    }
                    memcpy(sum + k, part, (size_t)count * sizeof(vreal));
                }
            }
        }
        for (int64_t f = 0; f < j->filters; f++)
            for (int64_t k = 0; k < rows; k++)
                t->gw[(group * j->filters + f) * K + r0 + k] = sum_lanes(sums[f * t->rows + k]);
    }
    hl_give(scratch);
    return HL_OK;
}

/* Parallel over (group, block of rows of K): dot products along W, for groups with too few filters to fill a vector.
 * x goes through planes once; gy is read once per block of rows.
 * Source: as conv_direct. */
static int weight_direct(weight_job *t)
{
    const conv_job *j = t->j;
    int64_t K = j->channels * taps_of(j);
    hl_note(j->channels == 1 && j->groups > 1 ? "depthwise" : "direct");
    t->grid = make_grid(j, 4096); /* planes as in conv_direct */
    t->rows = min64(K, max64(63, ceil_div(K, 32)));
    t->row_blocks = ceil_div(K, t->rows);
    double work = (double)t->rows * (double)j->filters * (double)outputs_of(j) * (double)j->images * 4 / LANES;
    return parallel_even(j->groups * t->row_blocks, work, weight_dots, t);
}

int HL(conv_grad_weight)(const hl_conv_grad_weight_plan *p, const real *gy, const real *x, real *gw)
{
    int64_t groups = max64(p->groups, 1);
    conv_job j = {
        .images = p->N,
        .groups = groups,
        .channels = p->CG,
        .filters = p->F / groups,
        .axes = AXES_OF(p),
        .x = x,
        .y_channel = p->OD * p->OH * p->OW,
        .y_step = {p->OH * p->OW, p->OW, 1},
    };
    if (p->F <= 0 || j.channels <= 0 || taps_of(&j) <= 0) return HL_OK;
    if (j.images <= 0 || outputs_of(&j) <= 0 || inputs_of(&j) <= 0) {
        memset(gw, 0, (size_t)(p->F * p->CG * taps_of(&j)) * sizeof(real));
        return HL_OK;
    }
    flatten(&j);
#if HL_F32
    if (!p->exact && is_winograd(&j, 0)) return conv_winograd_gradient(&j, gy, gw);
#endif
    if (is_weight_by_channels(&j)) return weight_by_channels(&j, gy, gw);
    if (is_weight_by_rows(&j)) return weight_by_rows(&j, gy, gw);
    /* Not where gw would be read and written for few products, or most of the work were panels. */
    int64_t S = outputs_of(&j), few = 256;
    if (is_flat(&j) && j.groups == 1 && (j.images == 1 || (S >= few && j.channels < 4 * j.filters)))
        return weight_flat(&j, gy, gw);
    weight_job t = {.j = &j, .gy = gy, .gw = gw, .grid = make_grid(&j, 8 * GEMM_COLUMNS)};
    return j.filters * 4 <= LANES ? weight_direct(&t) : weight_product(&t);
}

/* ---- gradient of the bias ---- */

typedef struct {
    const hl_conv_grad_bias_plan *p;
    const real *gy;
    real *gb;
} bias_job;
static int bias_filters(int64_t begin, int64_t end, void *context)
{
    const bias_job *t = context;
    int64_t S = t->p->S;
    for (int64_t f = begin; f < end; f++) {
        vreal sum[4] = {0}; /* four additions under way */
        real tail = 0;
        for (int64_t n = 0; n < t->p->N; n++) {
            const real *g = t->gy + (n * t->p->F + f) * S;
            int64_t s = 0;
            for (; s + 4 * LANES <= S; s += 4 * LANES)
                for (int v = 0; v < 4; v++) sum[v] += load(g + s + v * LANES);
            for (; s + LANES <= S; s += LANES) sum[0] += load(g + s);
            for (; s < S; s++) tail += g[s];
        }
        t->gb[f] = sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3])) + tail;
    }
    return HL_OK;
}

/* Parallel over filters. gy is read once in memory order, gb written once.
 * Source: the derivative of a sum. */
int HL(conv_grad_bias)(const hl_conv_grad_bias_plan *p, const real *gy, real *gb)
{
    bias_job job = {p, gy, gb};
    return parallel_even(p->F, (double)p->N * (double)p->S / LANES, bias_filters, &job);
}
