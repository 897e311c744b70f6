/* Winograd F(5x5, 2x2), F(4x4, 3x3), F(3x3, 4x4) and F(2x2, 5x5), float32 only: a tile of 16 outputs of 3x3 taps, say,
 * from 36 products instead of 144.
 *
 * A tile has 6x6 inputs (36 points) and 7 - taps outputs in each dimension. With lanes over channels (inputs) and over
 * filters (weights, outputs) the transforms are whole-vector sums for any size of image; between them stand 36 matrix
 * products [tiles, C] x [C, F]. The points are 0, +-sqrt(1/2), +-sqrt(2) and infinity: a quarter of the rounding error of
 * 0, +-1, +-2.
 * Where the last tile of a row or column has fewer outputs it takes as many points fewer, the others serve it with the
 * same transformed weights: 14 outputs are 4 + 4 + 4 + 2 in 6 + 6 + 6 + 4 points.
 * With a stride of 2 the even and the odd rows and columns of x are four images, which the even and the odd taps meet with
 * a stride of 1: four times the channels of half the taps in each dimension. In the gradient of the input it is gx that
 * comes in four images: four times the filters. With a dilation, they are more images of a convolution without one.
 * Volumes are slices, each an image of its own: the taps in depth are as many times the channels, each of another slice of x.
 * Kernels of one row, or of one column, are transformed in their own dimension only: a tile is six lines, each with the same
 * weights.
 * Source: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks (2016); the points, Alam et al., Winograd
 * Convolution for Deep Neural Networks: Efficient Point Selection (2022). */
#ifndef HL_WINOGRAD_H
#define HL_WINOGRAD_H

enum { POINTS = 36, PATCH = 6 };

/* x or y as the tiles see it, in each dimension: place i of phase p is element i * stride + p - before, if there is one. */
typedef struct {
    int64_t stride; /* as many phases in each dimension */
    int64_t size[2], before[2];
    int64_t channels; /* of one group */
} side;

typedef struct {
    const conv_job *j;    /* the axes are those of the convolution, also where x is gy and y is gx */
    int adjoint;          /* the gradient of the input */
    int line;             /* the dimension of a kernel that has one only, or -1 */
    int64_t taps[2], out[2]; /* of a tile, 2 to 5 and 5 to 2; across the lines of such a kernel 1 and 6 */
    int64_t kernel[2], stride; /* of the convolution */
    side x, y;
    axis depth;           /* of the convolution */
    int64_t x_slices, y_slices; /* of an image */
    int64_t channels, filters; /* of all phases of x, and taps in depth; of all phases of y */
    int64_t places[2];    /* of y to be computed */
    int64_t points; /* of a tile: of rows by themselves, those of as many as there are */
    int64_t rest[2];      /* outputs of the last tile of a column, of a row */
    conv_job tiles;       /* only images and axes[].outputs: so that make_grid cuts tiles */
    grid grid;
    int64_t T; /* slots for the tiles of a box; odd, so that points do not share a cache set */
    int64_t C, chunk; /* channels rounded up to LANES; so many at a time */
    int64_t filter_block, splits; /* filters at a time; tasks that share one box */
    int64_t v_step, box_size; /* elements of V of LANES channels, of all channels of one box */
    int64_t group_size; /* elements of U of one group */
    real *shared_v, *shared_u; /* made before, or NULL: each task makes its own */
} winograd;

#define ROOT_HALF 0.70710678f
#define ROOT_TWO 1.41421356f

/* ---- transforms of one dimension ---- */

/* The points that so many inputs take, as bits: points 1 to 4 are +-sqrt(1/2), +-sqrt(2), 0 is zero, 5 infinity. */
static const unsigned points_of[PATCH + 1] = {0, 0, 0x21, 0x26, 0x27, 0x3e, 0x3f};

/* Each point's polynomial, the product of (x - other points), scaled so that the weights' factor is that of six points. */
static inline __attribute__((always_inline)) void transform_input(const int64_t inputs, const vreal *d, vreal *t)
{
    if (inputs == 6) {
        vreal even1 = d[4] - splat(2) * d[2], odd1 = d[3] - splat(2) * d[1];
        vreal even2 = d[4] - splat(0.5f) * d[2], odd2 = d[3] - splat(0.5f) * d[1];
        t[0] = (d[0] - splat(2.5f) * d[2]) + d[4];
        t[1] = even1 + splat(ROOT_HALF) * odd1;
        t[2] = even1 - splat(ROOT_HALF) * odd1;
        t[3] = even2 + splat(ROOT_TWO) * odd2;
        t[4] = even2 - splat(ROOT_TWO) * odd2;
        t[5] = (d[1] - splat(2.5f) * d[3]) + d[5];
    } else if (inputs == 5) {
        vreal even1 = splat(0.5f) * d[2] - d[0], odd1 = splat(0.5f) * d[3] - d[1];
        vreal even2 = splat(2) * d[2] - d[0], odd2 = splat(2) * d[3] - d[1];
        t[1] = even1 + splat(ROOT_TWO) * odd1;
        t[2] = even1 - splat(ROOT_TWO) * odd1;
        t[3] = even2 + splat(ROOT_HALF) * odd2;
        t[4] = even2 - splat(ROOT_HALF) * odd2;
        t[5] = (d[0] - splat(2.5f) * d[2]) + d[4];
    } else if (inputs == 4) {
        t[0] = d[0] - splat(2) * d[2];
        t[1] = splat(-1.5f) * d[2] - splat(1.5f * ROOT_HALF) * d[1];
        t[2] = splat(-1.5f) * d[2] + splat(1.5f * ROOT_HALF) * d[1];
        t[5] = d[3] - splat(0.5f) * d[1];
    } else if (inputs == 2) {
        t[0] = d[0];
        t[5] = d[1];
    } else {
        t[1] = splat(-0.75f) * d[0] - splat(1.5f * ROOT_HALF) * d[1];
        t[2] = splat(-0.75f) * d[0] + splat(1.5f * ROOT_HALF) * d[1];
        t[5] = d[2] - splat(0.5f) * d[0];
    }
}
/* Powers of the points, divided by what the full polynomial is there: 1, -3/2, 6. */
static inline __attribute__((always_inline)) void transform_weight(const int64_t taps, const vreal *g, vreal *t)
{
    vreal even1 = g[0], even2 = g[0], odd1 = g[1], odd2 = g[1];
    if (taps > 2) even1 += splat(0.5f) * g[2], even2 += splat(2) * g[2];
    if (taps > 3) odd1 += splat(0.5f) * g[3], odd2 += splat(2) * g[3];
    if (taps > 4) even1 += splat(0.25f) * g[4], even2 += splat(4) * g[4];
    t[0] = g[0];
    t[1] = splat(-2.0f / 3) * even1 - splat(ROOT_TWO / 3) * odd1;
    t[2] = splat(-2.0f / 3) * even1 + splat(ROOT_TWO / 3) * odd1;
    t[3] = splat(1.0f / 6) * even2 + splat(ROOT_TWO / 6) * odd2;
    t[4] = splat(1.0f / 6) * even2 - splat(ROOT_TWO / 6) * odd2;
    t[5] = g[taps - 1];
}
static inline __attribute__((always_inline)) void transform_weight_adjoint(const int64_t taps, const vreal *t, vreal *g)
{
    vreal sum1 = splat(-2.0f / 3) * (t[1] + t[2]), difference1 = splat(-ROOT_TWO / 3) * (t[1] - t[2]);
    vreal sum2 = splat(1.0f / 6) * (t[3] + t[4]), difference2 = splat(ROOT_TWO / 6) * (t[3] - t[4]);
    g[0] = t[0] + (sum1 + sum2);
    g[1] = difference1 + difference2;
    if (taps > 2) g[2] = splat(0.5f) * sum1 + splat(2) * sum2;
    if (taps > 3) g[3] = splat(0.5f) * difference1 + splat(2) * difference2;
    if (taps > 4) g[4] = splat(0.25f) * sum1 + splat(4) * sum2;
    g[taps - 1] += t[5];
}
/* Powers of the points that so many inputs take; infinity counts in the last output only. */
static inline __attribute__((always_inline)) void transform_output(const int64_t inputs, const int64_t outputs,
                                                                   const vreal *m, vreal *t)
{
    vreal sum1 = splat(0), difference1 = splat(0), sum2 = splat(0), difference2 = splat(0);
    if (inputs >= 3) sum1 = m[1] + m[2], difference1 = m[1] - m[2];
    if (inputs >= 5) sum2 = m[3] + m[4], difference2 = m[3] - m[4];
    t[0] = sum1 + sum2;
    if (inputs % 2 == 0) t[0] += m[0];
    if (outputs > 1) t[1] = splat(ROOT_HALF) * difference1 + splat(ROOT_TWO) * difference2;
    if (outputs > 2) t[2] = splat(0.5f) * sum1 + splat(2) * sum2;
    if (outputs > 3) t[3] = splat(ROOT_HALF / 2) * difference1 + splat(2 * ROOT_TWO) * difference2;
    if (outputs > 4) t[4] = splat(0.25f) * sum1 + splat(4) * sum2;
    t[outputs - 1] += m[5];
}
static inline __attribute__((always_inline)) void transform_output_adjoint(const int64_t inputs, const int64_t outputs,
                                                                           const vreal *y, vreal *t)
{
    vreal even1 = y[0], even2 = y[0], odd1 = splat(0), odd2 = splat(0);
    if (outputs > 1) odd1 = odd2 = y[1];
    if (outputs > 2) even1 += splat(0.5f) * y[2], even2 += splat(2) * y[2];
    if (outputs > 3) odd1 += splat(0.5f) * y[3], odd2 += splat(2) * y[3];
    if (outputs > 4) even1 += splat(0.25f) * y[4], even2 += splat(4) * y[4];
    if (inputs % 2 == 0) t[0] = y[0];
    t[1] = even1 + splat(ROOT_HALF) * odd1;
    t[2] = even1 - splat(ROOT_HALF) * odd1;
    if (inputs >= 5) {
        t[3] = even2 + splat(ROOT_TWO) * odd2;
        t[4] = even2 - splat(ROOT_TWO) * odd2;
    }
    t[5] = y[outputs - 1];
}

/* ---- the tiles of a box ---- */

/* Slots: the tiles cut short in height only, then the whole ones, those cut in width, those cut in both: so that each
 * point finds its tiles one after the other. */
typedef struct {
    int64_t whole[2], outputs[2]; /* tiles that are not cut, down and right; outputs of the box */
    int64_t next[4], end; /* first slot by class: 1 cut in width + 2 cut in height */
} slots;

static slots slots_of(const winograd *t, const box *b)
{
    slots s;
    for (int a = 0; a < 2; a++) {
        int64_t first = b->first[a + 1], last = first + b->size[a + 1];
        s.outputs[a] = min64(last * t->out[a], t->places[a]) - first * t->out[a];
        s.whole[a] = s.outputs[a] / t->out[a];
    }
    int64_t cut_h = b->size[1] - s.whole[0], cut_w = b->size[2] - s.whole[1];
    s.next[2] = 0;
    s.next[0] = b->images * cut_h * s.whole[1];
    s.next[1] = s.next[0] + b->images * s.whole[0] * s.whole[1];
    s.next[3] = s.next[1] + b->images * s.whole[0] * cut_w;
    s.end = s.next[3] + b->images * cut_h * cut_w;
    return s;
}
/* The points of so many outputs in dimension a. */
static unsigned points_for(const winograd *t, int a, int64_t outputs)
{
    return t->taps[a] == 1 ? (1u << outputs) - 1 : points_of[outputs + t->taps[a] - 1];
}
static int64_t take_slot(slots *s, int64_t th, int64_t tw)
{
    return s->next[(th >= s->whole[0]) * 2 + (tw >= s->whole[1])]++;
}
/* The slots of point p. */
static void range_of(const winograd *t, const slots *s, int p, int64_t *first, int64_t *last)
{
    unsigned high = points_for(t, 0, t->rest[0]) >> p / PATCH & 1;
    unsigned wide = points_for(t, 1, t->rest[1]) >> p % PATCH & 1;
    *first = high ? 0 : s->next[0];
    *last = !wide ? s->next[1] : high ? s->end : s->next[3];
}

/* ---- V = B^T d B of a box: [channels / LANES][point][slot][LANES] ---- */

/* Both dimensions of a tile, so many inputs each; a tile at the rim has rows [first, last) and columns [begin, end) only. */
typedef struct { int64_t first, last, begin, end; } rim;

static inline __attribute__((always_inline)) void input_down(const int64_t inputs, const rim *rim, int64_t columns,
                                                             const real *from, int64_t step, vreal half[PATCH][PATCH])
{
    for (int64_t w = 0; w < columns; w++, from += LANES) {
        vreal d[PATCH] = {0}, e[PATCH] = {0};
#pragma GCC unroll 6
        for (int64_t h = 0; h < inputs; h++)
            if (!rim || (h >= rim->first && h < rim->last && w >= rim->begin && w < rim->end))
                d[h] = load(from + h * step);
        transform_input(inputs, d, e);
#pragma GCC unroll 6
        for (int p = 0; p < PATCH; p++)
            if (points_of[inputs] >> p & 1) half[p][w] = e[p];
    }
}
static inline __attribute__((always_inline)) void input_across(const int64_t inputs, unsigned rows,
                                                               vreal half[PATCH][PATCH], real *to, int64_t point)
{
    for (int p = 0; p < PATCH; p++) {
        vreal e[PATCH] = {0};
        if (!(rows >> p & 1)) continue;
        transform_input(inputs, half[p], e);
#pragma GCC unroll 6
        for (int q = 0; q < PATCH; q++)
            if (points_of[inputs] >> q & 1) store(to + (p * PATCH + q) * point, e[q]);
    }
}
static void input_tile(int64_t high, int64_t wide, const rim *rim, const real *from, int64_t step, real *to,
                       int64_t point)
{
    vreal half[PATCH][PATCH];
    if (rim) {
        if (high == 6) input_down(6, rim, wide, from, step, half);
        else if (high == 5) input_down(5, rim, wide, from, step, half);
        else if (high == 4) input_down(4, rim, wide, from, step, half);
        else if (high == 3) input_down(3, rim, wide, from, step, half);
        else input_down(2, rim, wide, from, step, half);
    } else {
        if (high == 6) input_down(6, NULL, wide, from, step, half);
        else if (high == 5) input_down(5, NULL, wide, from, step, half);
        else if (high == 4) input_down(4, NULL, wide, from, step, half);
        else if (high == 3) input_down(3, NULL, wide, from, step, half);
        else input_down(2, NULL, wide, from, step, half);
    }
    if (wide == 6) input_across(6, points_of[high], half, to, point);
    else if (wide == 5) input_across(5, points_of[high], half, to, point);
    else if (wide == 4) input_across(4, points_of[high], half, to, point);
    else if (wide == 3) input_across(3, points_of[high], half, to, point);
    else input_across(2, points_of[high], half, to, point);
}

/* The lines of a tile, each transformed by itself: its rows (`across`) or its columns. */
static inline __attribute__((always_inline)) void input_lines(const int across, int64_t lines, const int64_t inputs,
                                                              const rim *rim, const real *from, int64_t step, real *to,
                                                              int64_t point)
{
    for (int64_t l = 0; l < lines; l++) {
        vreal d[PATCH] = {0}, e[PATCH] = {0};
#pragma GCC unroll 6
        for (int64_t i = 0; i < inputs; i++) {
            int64_t h = across ? l : i, w = across ? i : l;
            if (!rim || (h >= rim->first && h < rim->last && w >= rim->begin && w < rim->end))
                d[i] = load(from + h * step + w * LANES);
        }
        transform_input(inputs, d, e);
#pragma GCC unroll 6
        for (int q = 0; q < PATCH; q++)
            if (points_of[inputs] >> q & 1) store(to + (across ? l * PATCH + q : q * PATCH + l) * point, e[q]);
    }
}
#define INPUT_LINES(name, across, lines, inputs) \
    static void name(int64_t high, int64_t wide, const rim *rim, const real *from, int64_t step, real *to, \
                     int64_t point) \
    { \
        if (!rim && inputs == 6) input_lines(across, lines, 6, NULL, from, step, to, point); \
        else if (inputs == 6) input_lines(across, lines, 6, rim, from, step, to, point); \
        else if (inputs == 5) input_lines(across, lines, 5, rim, from, step, to, point); \
        else if (inputs == 4) input_lines(across, lines, 4, rim, from, step, to, point); \
        else if (inputs == 3) input_lines(across, lines, 3, rim, from, step, to, point); \
        else input_lines(across, lines, 2, rim, from, step, to, point); \
    }
INPUT_LINES(input_rows, 1, high, wide)
INPUT_LINES(input_columns, 0, wide, high)

/* The places [low, high) of a phase in dimension a. */
static int64_t low_of(const side *s, int a, int64_t phase)
{
    return ceil_div(max64(s->before[a] - phase, 0), s->stride);
}
static int64_t high_of(const side *s, int a, int64_t phase)
{
    return ceil_div(max64(s->size[a] + s->before[a] - phase, 0), s->stride);
}

/* The rows [top, bottom) and columns [left, right) of places of any phase that a box of tiles reads. */
typedef struct { int64_t top, bottom, left, right; } region;
static region region_of(const winograd *t, const box *b, const slots *s)
{
    int64_t top = b->first[1] * t->out[0], left = b->first[2] * t->out[1], last = t->x.stride - 1;
    region r = {max64(top, low_of(&t->x, 0, last)), min64(top + s->outputs[0] + t->taps[0] - 1, high_of(&t->x, 0, 0)),
                max64(left, low_of(&t->x, 1, last)),
                min64(left + s->outputs[1] + t->taps[1] - 1, high_of(&t->x, 1, 0))};
    r.bottom = max64(r.bottom, r.top);
    r.right = max64(r.right, r.left);
    return r;
}

/* Elements from one lane's places to the next, those that a vector may touch behind the last among them; odd vectors. */
static int64_t lane_pitch(int64_t places) { return ((places / LANES + 2) | 1) * LANES; }

/* A region of LANES channels of phases as [row][column][LANES], with zeros where no element is. `x`: of a group. */
static void pack_phases(const winograd *t, const real *x, int64_t first, int64_t width, const region *g, real *lanes,
                        real *to)
{
    const side *s = &t->x;
    int64_t H = s->size[0], W = s->size[1], columns = g->right - g->left, places = (g->bottom - g->top) * columns;
    const real *end = t->j->x + t->j->images * t->j->groups * s->channels * H * W;
    for (int64_t i = 0; i < width; i++) {
        int64_t phase = (first + i) / s->channels, c = (first + i) % s->channels, across = phase % 2;
        int64_t low = max64(low_of(s, 1, across) - g->left, 0);
        int64_t high = max64(min64(high_of(s, 1, across) - g->left, columns), low);
        vint inside = lanes_before((high - low - 1) % LANES + 1);
        real *row = lanes + i * lane_pitch(places);
        for (int64_t r = g->top; r < g->bottom; r++, row += columns) {
            int64_t h = r * 2 + phase / 2 - s->before[0], n = h >= 0 && h < H ? high - low : 0;
            const real *from = x + (c * H + h) * W + (g->left + low) * 2 + across - s->before[1];
            for (int64_t k = 0; k < low; k++) row[k] = 0;
            for (int64_t k = 0; k < n * 2; k += 64 / (int64_t)sizeof(real)) __builtin_prefetch(from + H * W + k);
            if (n) copy_row(from, n, 2, inside, end, row + low);
            for (int64_t k = low + n; k < columns; k++) row[k] = 0;
        }
    }
    gemm_pack_panel(width, LANES, places, lanes, lane_pitch(places), 1, to);
}

/* The slice of x that a slice of y meets at a tap in depth, or -1. */
static int64_t slice_at(const winograd *t, int64_t slice, int64_t tap)
{
    const axis *d = &t->depth;
    int64_t at = t->adjoint ? slice + d->pad - tap * d->dilation : slice * d->stride - d->pad + tap * d->dilation;
    if (t->adjoint && at >= 0) at = at % d->stride ? -1 : at / d->stride;
    return at < t->x_slices ? max64(at, -1) : -1;
}

/* V of LANES channels from c0 on. `stage` takes the region of one image as [row][column][LANES] and, by lanes,
 * its phases. */
static void make_v(const winograd *t, const box *b, int64_t group, int64_t c0, real *stage, real *v)
{
    const conv_job *j = t->j;
    int64_t H = t->x.size[0], W = t->x.size[1], point = t->T * LANES;
    int64_t width = min64(LANES, t->channels - c0);
    slots s = slots_of(t, b);
    region g = region_of(t, b, &s);
    int64_t pitch = g.right - g.left, rows = g.bottom - g.top, each = t->x_slices * H * W;
    int64_t tap = t->depth.taps > 1 ? c0 / t->x.channels : 0; /* LANES channels are of one */
    for (int64_t n = b->image; n < b->image + b->images; n++) {
        int64_t slice = slice_at(t, n % t->y_slices, tap);
        const real *x = j->x + (n / t->y_slices * j->groups + group) * t->x.channels * each + max64(slice, 0) * H * W;
        const real *from =
            x + (c0 - tap * t->x.channels) * each + (g.top - t->x.before[0]) * W + g.left - t->x.before[1];
        if (slice < 0) memset(stage, 0, (size_t)(rows * pitch * LANES) * sizeof(real));
        else if (t->x.stride > 1) pack_phases(t, x, c0, width, &g, stage + rows * pitch * LANES, stage);
        else if (pitch == W) gemm_pack_panel(width, LANES, rows * W, from, each, 1, stage);
        else
            for (int64_t r = 0; r < rows; r++)
                gemm_pack_panel(width, LANES, pitch, from + r * W, each, 1, stage + r * pitch * LANES);
        for (int64_t th = 0; th < b->size[1]; th++)
            for (int64_t tw = 0; tw < b->size[2]; tw++) {
                int64_t top = (b->first[1] + th) * t->out[0] - g.top, left = (b->first[2] + tw) * t->out[1] - g.left;
                int64_t high = th < s.whole[0] ? PATCH : t->rest[0] + t->taps[0] - 1;
                int64_t wide = tw < s.whole[1] ? PATCH : t->rest[1] + t->taps[1] - 1;
                rim edge = {-top, rows - top, -left, pitch - left};
                int inside = top >= 0 && top + high <= rows && left >= 0 && left + wide <= pitch;
                const rim *cut = inside ? NULL : &edge;
                const real *first = stage + (top * pitch + left) * LANES;
                real *to = v + take_slot(&s, th, tw) * LANES;
                if (t->line < 0) input_tile(high, wide, cut, first, pitch * LANES, to, point);
                else if (t->line > 0) input_rows(high, wide, cut, first, pitch * LANES, to, point);
                else input_columns(high, wide, cut, first, pitch * LANES, to, point);
            }
    }
}

/* ---- U = G g G^T of some filters: [point][filter panel][channels][panel] ---- */

/* A row of points is one vector longer than it need be: powers of two apart they would fall on one set of the cache. */
static int64_t u_point(int64_t channels, int64_t filters) { return channels * round_up(filters, LANES) + LANES; }
static int64_t m_point(const winograd *t, int64_t filters) { return t->T * round_up(filters, LANES) + LANES; }

/* tap_at[k]: the tap of w that tap k of a phase is, -1: none. */
static void taps_at(const winograd *t, int64_t phase, int64_t *tap_at)
{
    int64_t all = t->taps[0] * t->taps[1], wide = t->taps[1];
    for (int64_t k = 0; k < all; k++) {
        int64_t tap = t->adjoint ? all - 1 - k : k;
        int64_t h = tap / wide * t->stride + phase / t->stride, w = tap % wide * t->stride + phase % t->stride;
        tap_at[k] = h < t->kernel[0] && w < t->kernel[1] ? h * t->kernel[1] + w : -1;
    }
}

static inline __attribute__((always_inline)) void weight_tile_u(const int64_t taps, const int64_t *tap_at,
                                                                const real *from, real *to, int64_t point)
{
    vreal half[PATCH][5];
    for (int64_t kw = 0; kw < taps; kw++) {
        vreal g[5], e[PATCH];
#pragma GCC unroll 5
        for (int64_t kh = 0; kh < taps; kh++) {
            int64_t tap = tap_at[kh * taps + kw];
            g[kh] = tap < 0 ? splat(0) : load(from + tap * LANES);
        }
        transform_weight(taps, g, e);
#pragma GCC unroll 6
        for (int p = 0; p < PATCH; p++) half[p][kw] = e[p];
    }
    for (int p = 0; p < PATCH; p++) {
        vreal e[PATCH];
        transform_weight(taps, half[p], e);
#pragma GCC unroll 6
        for (int q = 0; q < PATCH; q++) store(to + (p * PATCH + q) * point, e[q]);
    }
}

/* U of a kernel that is one line: six points, which all lines of a tile share. */
static inline __attribute__((always_inline)) void weight_line_u(const int64_t taps, const int64_t *tap_at,
                                                                const real *from, real *to, int64_t point)
{
    vreal g[5], e[PATCH];
#pragma GCC unroll 5
    for (int64_t k = 0; k < taps; k++) g[k] = load(from + tap_at[k] * LANES);
    transform_weight(taps, g, e);
#pragma GCC unroll 6
    for (int q = 0; q < PATCH; q++) store(to + q * point, e[q]);
}
/* Its adjoint. */
static inline __attribute__((always_inline)) void weight_line_adjoint(const int64_t taps, const real *from,
                                                                      int64_t point, const int64_t *tap_at, real *to)
{
    vreal e[PATCH], g[5];
#pragma GCC unroll 6
    for (int q = 0; q < PATCH; q++) e[q] = load(from + q * point);
    transform_weight_adjoint(taps, e, g);
#pragma GCC unroll 5
    for (int64_t k = 0; k < taps; k++) store(to + tap_at[k] * LANES, g[k]);
}
/* How many points U has, and which one point p of V meets. */
static int64_t u_points(const winograd *t) { return t->line < 0 ? POINTS : PATCH; }
static int64_t u_of(const winograd *t, int64_t p) { return t->line < 0 ? p : t->line ? p % PATCH : p / PATCH; }

static inline __attribute__((always_inline)) void weight_tile_adjoint(const int64_t taps, const real *from,
                                                                      int64_t point, const int64_t *tap_at, real *to)
{
    vreal half[5][PATCH];
    for (int q = 0; q < PATCH; q++) {
        vreal e[PATCH], g[5];
#pragma GCC unroll 6
        for (int p = 0; p < PATCH; p++) e[p] = load(from + (p * PATCH + q) * point);
        transform_weight_adjoint(taps, e, g);
#pragma GCC unroll 5
        for (int64_t kh = 0; kh < taps; kh++) half[kh][q] = g[kh];
    }
    for (int64_t kh = 0; kh < taps; kh++) {
        vreal g[5];
        transform_weight_adjoint(taps, half[kh], g);
#pragma GCC unroll 5
        for (int64_t kw = 0; kw < taps; kw++) {
            int64_t tap = tap_at[kh * taps + kw];
            if (tap >= 0) store(to + tap * LANES, g[kw]);
        }
    }
}

/* Filters of all phases: those of each phase begin a vector. */
static int64_t phase_filters(const winograd *t)
{
    return t->y.stride > 1 ? round_up(t->y.channels, LANES) : t->y.channels;
}

/* U of LANES filters from f on and n channels of one phase from c on, which `stage` takes as [channel][tap][LANES]. */
static void make_u_part(const winograd *t, int64_t group, int64_t f, int64_t width, int64_t c, int64_t n, real *stage,
                        real *to, int64_t step, int64_t point)
{
    const conv_job *j = t->j;
    int64_t taps = t->kernel[0] * t->kernel[1], tap_at[25], each = max64(t->taps[0], t->taps[1]);
    const real *source =
        j->w + group * j->w_group + f % phase_filters(t) * j->w_filter + c % t->x.channels * j->w_channel;
    if (t->stride == 1) source += c / t->x.channels * taps; /* the tap in depth */
    taps_at(t, t->stride == 1 ? 0 : t->adjoint ? f / phase_filters(t) : c / t->x.channels, tap_at);
    if (j->w_channel == taps) gemm_pack_panel(width, LANES, n * taps, source, j->w_filter, 1, stage);
    else
        for (int64_t i = 0; i < n; i++)
            gemm_pack_panel(width, LANES, taps, source + i * j->w_channel, j->w_filter, 1, stage + i * taps * LANES);
    for (int64_t i = 0; i < n; i++, stage += taps * LANES, to += step) {
#define WEIGHT(taps) \
    t->line < 0 ? weight_tile_u(taps, tap_at, stage, to, point) : weight_line_u(taps, tap_at, stage, to, point)
        if (each == 2) WEIGHT(2);
        else if (each == 3) WEIGHT(3);
        else if (each == 4) WEIGHT(4);
        else WEIGHT(5);
    }
}

/* Channels from c0 on; u holds `all` from `before` on. w is read as it lies: the channels of a filter, or some filters of a
 * channel side by side, and then no more channels at a time than memory follows. */
static void make_u(const winograd *t, int64_t group, int64_t f0, int64_t filters, int64_t c0, int64_t channels,
                   int64_t before, int64_t all, real *stage, real *u)
{
    enum { TOGETHER = 8 };
    int64_t point = u_point(all, filters), most = t->j->w_channel == t->kernel[0] * t->kernel[1] ? channels : TOGETHER;
    for (int64_t c = c0, n; c < c0 + channels; c += n) { /* of one phase */
        n = min64(min64(c0 + channels - c, t->x.channels - c % t->x.channels), most);
        for (int64_t f = 0, step; f < filters; f += step) {
            step = gemm_columns(filters - f);
            for (int64_t v = 0; v < step; v += LANES) {
                int64_t filter = f0 + f + v,
                        width = min64(min64(LANES, filters - f - v), t->y.channels - filter % phase_filters(t));
                make_u_part(t, group, filter, width, c, n, stage, u + f * all + (c - before) * step + v, step, point);
            }
        }
    }
}

/* ---- M[point][slot][filters] = V U ---- */

/* `ahead`: the part of U that comes next, of which each step of a tile fetches the line `ahead_step` elements on. */
static inline __attribute__((always_inline)) void point_tile(const int rows, const int vectors, int64_t channels,
                                                             int64_t v_step, const real *v, const real *u,
                                                             const real *ahead, int64_t ahead_step, real *m,
                                                             int64_t m_row, int add)
{
    if (HL_REGISTERS < 32) ahead = NULL; /* to small tiles that costs more than it brings */
    vreal sum[GEMM_ROWS][GEMM_VECTORS];
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 3
        for (int k = 0; k < vectors; k++) sum[i][k] = splat((real)0);
    const int last = (channels - 1) % LANES >= GEMM_LAST - 1 ? GEMM_LAST : 0; /* of the last group of channels */
    for (int64_t c = 0;; c += LANES, v += v_step, u += LANES * vectors * LANES) {
        int64_t n = channels - c > LANES ? LANES : channels - c - last, most = n / GEMM_STEPS * GEMM_STEPS;
        gemm_multiply(GEMM_STEPS, rows, vectors, most, v, LANES, 1, u, vectors * LANES, NULL, ahead, ahead_step, sum,
                      NULL);
        if (GEMM_STEPS > 1 && most < n)
            gemm_multiply(1, rows, vectors, n - most, v + most, LANES, 1, u + most * vectors * LANES, vectors * LANES,
                          NULL, NULL, 0, sum, NULL);
        if (ahead) ahead += LANES * ahead_step;
        if (channels - c > LANES) continue;
        v += n, u += n * vectors * LANES;
        break;
    }
#define FINISH(last, put) \
    gemm_finish(last, rows, vectors, v, LANES, 1, u, vectors *LANES, NULL, sum, put, m, m_row, m, m_row)
    if (last < GEMM_LAST) add ? FINISH(0, GEMM_ADD) : FINISH(0, GEMM_STORE);
    else add ? FINISH(GEMM_LAST, GEMM_ADD) : FINISH(GEMM_LAST, GEMM_STORE);
}

/* An odd number of taps leaves the odd phases one short: there a point, infinity or (the adjoint's taps being in reverse)
 * zero, has no weights. This many phases, from the first on, take point p; one may stand among them that does not. */
static int64_t phases_at(const winograd *t, int p)
{
    int64_t all = t->stride * t->stride;
    int down = p / PATCH == (t->adjoint ? 0 : 5), across = p % PATCH == (t->adjoint ? 0 : 5);
    if (t->kernel[0] % t->stride == 0) return all;
    return down && across ? 1 : down ? t->stride : across ? all - 1 : all;
}

/* M of filters from f0 on, by the channels from c0 on; added to it where c0 is not 0. Point by point, so that what is
 * multiplied at a time stays in the second cache; in parts of the channels, so that a panel of U stays in the first. The
 * last rows of a range may be computed beyond it, into slots that this point does not serve. */
static void multiply_points(const winograd *t, const slots *s, int64_t c0, int64_t channels, int64_t f0,
                            int64_t filters, const real *v, const real *u, real *m)
{
    int64_t m_row = round_up(filters, LANES);
    for (int p = 0; p < t->points; p++, v += t->T * LANES, m += m_point(t, filters)) {
        int64_t first, last, phases = phases_at(t, p);
        const real *up = u + u_of(t, p) * u_point(channels, filters);
        range_of(t, s, p, &first, &last);
        int64_t end = t->adjoint || t->stride == 1 ? c0 + channels : min64(c0 + channels, phases * t->x.channels);
        int64_t used = t->adjoint ? phases * phase_filters(t) - f0 : filters;
        for (int64_t f = 0, step; f < filters; f += step) {
            step = gemm_columns(filters - f);
            if (f >= used) {
                for (int64_t i = first; i < last && !c0; i++)
                    for (int64_t k = 0; k < step; k += LANES) store(m + i * m_row + f + k, splat(0));
                continue;
            }
            for (int64_t c = c0, depth; c < end; c += depth) {
                depth = min64(t->chunk, end - c);
                const real *vc = v + c / LANES * t->v_step, *uc = up + f * channels + (c - c0) * step;
                int64_t share = step * GEMM_ROWS / max64(last - first, GEMM_ROWS); /* of what comes next, a step */
                for (int64_t i = first, rows; i < last; i += rows) {
                    rows = last - i > GEMM_ROWS / 2 ? GEMM_ROWS : GEMM_ROWS / 2;
                    const real *ahead = uc + depth * step + (i - first) / GEMM_ROWS * depth * share;
#define POINT_TILE(r, k) \
    point_tile(r, k, depth, t->v_step, vc + i * LANES, uc, ahead, share, m + i * m_row + f, m_row, c > 0)
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
    }
}

/* ---- y = A^T m A ---- */

static inline __attribute__((always_inline)) void output_tile(const int64_t taps, const int64_t high,
                                                              const int64_t wide, const real *from, int64_t point,
                                                              vreal bias, real *to, int64_t pitch)
{
    vreal half[5][PATCH];
#pragma GCC unroll 6
    for (int q = 0; q < PATCH; q++) {
        vreal e[PATCH] = {0}, o[5];
        if (!(points_of[wide + taps - 1] >> q & 1)) continue;
#pragma GCC unroll 6
        for (int p = 0; p < PATCH; p++)
            if (points_of[high + taps - 1] >> p & 1) e[p] = load(from + (p * PATCH + q) * point);
        transform_output(high + taps - 1, high, e, o);
#pragma GCC unroll 5
        for (int64_t h = 0; h < high; h++) half[h][q] = o[h];
    }
    for (int64_t h = 0; h < high; h++) {
        vreal o[5];
        transform_output(wide + taps - 1, wide, half[h], o);
#pragma GCC unroll 5
        for (int64_t w = 0; w < wide; w++) store(to + (h * pitch + w) * LANES, o[w] + bias);
    }
}

/* The lines of a tile, as input_lines has them. */
static inline __attribute__((always_inline)) void output_lines(const int64_t taps, const int across, int64_t lines,
                                                               const int64_t outputs, const real *from, int64_t point,
                                                               vreal bias, real *to, int64_t pitch)
{
    for (int64_t l = 0; l < lines; l++) {
        vreal e[PATCH] = {0}, o[5];
#pragma GCC unroll 6
        for (int q = 0; q < PATCH; q++)
            if (points_of[outputs + taps - 1] >> q & 1)
                e[q] = load(from + (across ? l * PATCH + q : q * PATCH + l) * point);
        transform_output(outputs + taps - 1, outputs, e, o);
#pragma GCC unroll 5
        for (int64_t i = 0; i < outputs; i++) store(to + (across ? l * pitch + i : i * pitch + l) * LANES, o[i] + bias);
    }
}
static void output_of_lines(const int across, int64_t taps, int64_t lines, int64_t outputs, const real *from,
                            int64_t point, vreal bias, real *to, int64_t pitch)
{
#define OUTPUT_LINES(taps, outputs) \
    across ? output_lines(taps, 1, lines, outputs, from, point, bias, to, pitch) \
           : output_lines(taps, 0, lines, outputs, from, point, bias, to, pitch)
    if (outputs < 7 - taps) OUTPUT_LINES(taps, outputs);
    else if (taps == 2) OUTPUT_LINES(2, 5);
    else if (taps == 3) OUTPUT_LINES(3, 4);
    else if (taps == 4) OUTPUT_LINES(4, 3);
    else OUTPUT_LINES(5, 2);
}

static inline __attribute__((always_inline)) void gradient_tile(const int64_t taps, const int64_t high,
                                                                const int64_t wide, const real *from, int64_t pitch,
                                                                real *to, int64_t point)
{
    vreal half[PATCH][5];
    for (int64_t w = 0; w < wide; w++) {
        vreal e[5] = {0}, o[PATCH] = {0};
#pragma GCC unroll 5
        for (int64_t h = 0; h < high; h++) e[h] = load(from + (h * pitch + w) * LANES);
        transform_output_adjoint(high + taps - 1, high, e, o);
#pragma GCC unroll 6
        for (int p = 0; p < PATCH; p++) half[p][w] = o[p];
    }
    for (int p = 0; p < PATCH; p++) {
        vreal o[PATCH] = {0};
        if (!(points_of[high + taps - 1] >> p & 1)) continue;
        transform_output_adjoint(wide + taps - 1, wide, half[p], o);
#pragma GCC unroll 6
        for (int q = 0; q < PATCH; q++)
            if (points_of[wide + taps - 1] >> q & 1) store(to + (p * PATCH + q) * point, o[q]);
    }
}

/* The adjoint of output_lines. */
static inline __attribute__((always_inline)) void gradient_lines(const int64_t taps, const int across, int64_t lines,
                                                                 const int64_t outputs, const real *from, int64_t pitch,
                                                                 real *to, int64_t point)
{
    for (int64_t l = 0; l < lines; l++) {
        vreal e[5] = {0}, o[PATCH] = {0};
#pragma GCC unroll 5
        for (int64_t i = 0; i < outputs; i++) e[i] = load(from + (across ? l * pitch + i : i * pitch + l) * LANES);
        transform_output_adjoint(outputs + taps - 1, outputs, e, o);
#pragma GCC unroll 6
        for (int q = 0; q < PATCH; q++)
            if (points_of[outputs + taps - 1] >> q & 1)
                store(to + (across ? l * PATCH + q : q * PATCH + l) * point, o[q]);
    }
}
static void gradient_of_lines(const int across, int64_t taps, int64_t lines, int64_t outputs, const real *from,
                              int64_t pitch, real *to, int64_t point)
{
#define GRADIENT_LINES(taps, outputs) \
    across ? gradient_lines(taps, 1, lines, outputs, from, pitch, to, point) \
           : gradient_lines(taps, 0, lines, outputs, from, pitch, to, point)
    if (outputs < 7 - taps) GRADIENT_LINES(taps, outputs);
    else if (taps == 2) GRADIENT_LINES(2, 5);
    else if (taps == 3) GRADIENT_LINES(3, 4);
    else if (taps == 4) GRADIENT_LINES(4, 3);
    else GRADIENT_LINES(5, 2);
}

/* A row of places of the LANES filters of a phase, [column][LANES], to where their elements lie in y, that of an image. */
static void unpack_phase(const winograd *t, int64_t phase, int64_t width, int64_t row, int64_t left, int64_t columns,
                         const real *from, real *lanes, real *y)
{
    const side *s = &t->y;
    int64_t pitch = lane_pitch(columns), h = row * 2 + phase / 2 - s->before[0], w = phase % 2 - s->before[1];
    int64_t low = max64(low_of(s, 1, phase % 2), left), high = min64(high_of(s, 1, phase % 2), left + columns);
    if (h < 0 || h >= s->size[0]) return;
    gemm_transpose(columns, width, from, LANES, lanes, pitch);
    for (int64_t i = 0; i < width; i++)
        for (int64_t k = low; k < high; k++)
            y[(i * s->size[0] + h) * s->size[1] + k * 2 + w] = lanes[i * pitch + k - left];
}

/* `stage` takes the outputs of LANES filters of one image as [row][column][LANES], then a row
 * by lanes. */
static void make_y(const winograd *t, const box *b, int64_t group, int64_t f0, int64_t filters, const real *m,
                   real *stage)
{
    const conv_job *j = t->j;
    int64_t H = t->y.size[0], W = t->y.size[1], each = t->y_slices * H * W, m_row = round_up(filters, LANES);
    int64_t out = t->out[0], across = t->out[1], point = m_point(t, filters);
    int64_t top = b->first[1] * out, left = b->first[2] * across;
    for (int64_t f = 0; f < filters; f += LANES) {
        int64_t phase = (f0 + f) / phase_filters(t), filter = (f0 + f) % phase_filters(t);
        int64_t width = min64(min64(LANES, filters - f), t->y.channels - filter),
                channel = group * t->y.channels + filter;
        vreal bias = j->bias ? load_part(j->bias + channel, width, 0) : splat(0);
        slots s = slots_of(t, b);
        int64_t rows = s.outputs[0], pitch = s.outputs[1];
        for (int64_t n = b->image; n < b->image + b->images; n++) {
            for (int64_t th = 0; th < b->size[1]; th++)
                for (int64_t tw = 0; tw < b->size[2]; tw++) {
                    const real *from = m + f + take_slot(&s, th, tw) * m_row;
                    real *to = stage + (th * out * pitch + tw * across) * LANES;
                    int64_t high = min64(out, rows - th * out), wide = min64(across, pitch - tw * across);
                    if (t->line == 0) output_of_lines(0, t->taps[0], wide, high, from, point, bias, to, pitch);
                    else if (t->line > 0) output_of_lines(1, t->taps[1], high, wide, from, point, bias, to, pitch);
                    else if (high < out || wide < out)
                        output_tile(t->taps[0], high, wide, from, point, bias, to, pitch);
                    else if (out == 5) output_tile(2, 5, 5, from, point, bias, to, pitch);
                    else if (out == 4) output_tile(3, 4, 4, from, point, bias, to, pitch);
                    else if (out == 3) output_tile(4, 3, 3, from, point, bias, to, pitch);
                    else output_tile(5, 2, 2, from, point, bias, to, pitch);
                }
            real *y = j->y + (n / t->y_slices * j->groups * t->y.channels + channel) * each + n % t->y_slices * H * W;
            activate_rows(j->activation, rows, pitch * LANES, stage, pitch * LANES);
            if (t->y.stride > 1)
                for (int64_t r = 0; r < rows; r++)
                    unpack_phase(t, phase, width, top + r, left, pitch, stage + r * pitch * LANES,
                                 stage + rows * pitch * LANES, y);
            else if (pitch == W) gemm_transpose(rows * W, width, stage, LANES, y + top * W, each);
            else
                for (int64_t r = 0; r < rows; r++)
                    gemm_transpose(pitch, width, stage + r * pitch * LANES, LANES, y + (top + r) * W + left, each);
        }
    }
}

/* ---- tasks ---- */

static int64_t stage_size(const winograd *t)
{
    box b = box_at(&t->tiles, &t->grid, 0);
    int64_t rows = b.size[1] * t->out[0] + t->taps[0], columns = b.size[2] * t->out[1] + t->taps[1];
    int64_t taps = t->kernel[0] * t->kernel[1];
    return max64((rows * columns + lane_pitch(rows * columns)) * LANES, t->chunk * taps * LANES);
}

/* LANES channels after the other, but all phases of them before the next: they lie in the same lines. */
static int64_t nth_part(const winograd *t, int64_t k)
{
    int64_t phases = t->x.stride * t->x.stride;
    return t->x.channels % LANES ? k : k % phases * (t->x.channels / LANES) + k / phases;
}

/* V of LANES channels of one (box, group). */
static int winograd_inputs(int64_t begin, int64_t end, void *context)
{
    const winograd *t = context;
    int64_t parts = t->C / LANES;
    real *stage = hl_take((size_t)stage_size(t) * sizeof(real));
    if (!stage) return HL_NOMEM;
    for (int64_t i = begin; i < end; i++) {
        int64_t at = i / parts, part = nth_part(t, i % parts);
        box b = box_at(&t->tiles, &t->grid, at / t->j->groups);
        make_v(t, &b, at % t->j->groups, part * LANES, stage, t->shared_v + at * t->box_size + part * t->v_step);
    }
    hl_give(stage);
    return HL_OK;
}

/* U of one (group, block of filters, part of the channels). */
static int winograd_weights(int64_t begin, int64_t end, void *context)
{
    const winograd *t = context;
    int64_t F = t->filters, blocks = ceil_div(F, t->filter_block), parts = ceil_div(t->channels, t->chunk);
    real *stage = hl_take((size_t)stage_size(t) * sizeof(real));
    if (!stage) return HL_NOMEM;
    for (int64_t i = begin; i < end; i++) {
        int64_t block = i / parts % blocks, f0 = block * t->filter_block, c = i % parts * t->chunk;
        real *u = t->shared_u + i / parts / blocks * t->group_size + block * (t->group_size / blocks);
        make_u(t, i / parts / blocks, f0, min64(t->filter_block, F - f0), c, min64(t->chunk, t->channels - c), 0,
               t->channels, stage, u);
    }
    hl_give(stage);
    return HL_OK;
}

static int winograd_tasks(int64_t begin, int64_t end, void *context)
{
    const winograd *t = context;
    const conv_job *j = t->j;
    int64_t F = t->filters, blocks = ceil_div(F, t->filter_block);
    size_t stage = (size_t)stage_size(t), v_part = t->shared_v ? 0 : (size_t)t->box_size;
    size_t u_part = t->shared_u ? 0 : (size_t)(u_points(t) * u_point(t->chunk, t->filter_block));
    size_t m_part = (size_t)(t->points * m_point(t, t->filter_block));
    real *scratch = hl_take((stage + v_part + u_part + m_part) * sizeof(real));
    if (!scratch) return HL_NOMEM;
    real *own_v = scratch + stage, *own_u = own_v + v_part, *m = own_u + u_part;
    for (int64_t i = begin; i < end; i++) {
        int64_t split = i % t->splits, group = i / t->splits % j->groups, at = i / t->splits;
        box b = box_at(&t->tiles, &t->grid, at / j->groups);
        slots s = slots_of(t, &b);
        const real *v = t->shared_v ? t->shared_v + at * t->box_size : own_v;
        for (int64_t k = 0; k < t->C / LANES && !t->shared_v; k++) {
            int64_t part = nth_part(t, k);
            make_v(t, &b, group, part * LANES, scratch, own_v + part * t->v_step);
        }
        for (int64_t block = blocks * split / t->splits; block < blocks * (split + 1) / t->splits; block++) {
            int64_t f0 = block * t->filter_block, filters = min64(t->filter_block, F - f0);
            int64_t u = group * t->group_size + block * (t->group_size / blocks);
            if (t->shared_u) multiply_points(t, &s, 0, t->channels, f0, filters, v, t->shared_u + u, m);
            else
                for (int64_t c = 0, channels; c < t->channels; c += channels) { /* while they are in cache */
                    channels = min64(t->chunk, t->channels - c);
                    make_u(t, group, f0, filters, c, channels, c, channels, scratch, own_u);
                    multiply_points(t, &s, c, channels, f0, filters, v, own_u, m);
                }
            make_y(t, &b, group, f0, filters, m, scratch);
        }
    }
    hl_give(scratch);
    return HL_OK;
}

/* ---- gradient of the weights: the adjoint of all that in U ---- */

/* gw = G^T (sum over boxes of V^T (A gy A^T)) G: the rows of a register tile are channels, its columns filters. */
enum { GRADIENT_ROWS = HL_REGISTERS == 32 && LANES >= 8 ? 8 : 4 };

typedef struct {
    winograd w; /* shared_v is that of a pass */
    const real *gy;
    real *gw;
    int64_t F; /* filters rounded up to LANES */
    int64_t m_size; /* elements of the transformed gy of one box of one group */
    int64_t first_box, boxes; /* of this pass */
    int64_t channel_block;
    real *m, *du; /* [box][group][point][slot][F]; [group][point][C][F] */
} winograd_gradient;

/* A gy A^T of LANES filters from f0 on, as make_v and make_y have them. */
static void make_m(const winograd_gradient *g, const box *b, int64_t group, int64_t f0, real *stage, real *m)
{
    const winograd *t = &g->w;
    const conv_job *j = t->j;
    int64_t H = j->axes[1].outputs, W = j->axes[2].outputs, each = t->y_slices * H * W, point = m_point(t, g->F);
    int64_t out = t->out[0], across = t->out[1];
    int64_t width = min64(LANES, j->filters - f0);
    slots s = slots_of(t, b);
    int64_t rows = s.outputs[0], pitch = s.outputs[1];
    for (int64_t n = b->image; n < b->image + b->images; n++) {
        const real *gy = g->gy + ((n / t->y_slices * j->groups + group) * j->filters + f0) * each +
                         n % t->y_slices * H * W + b->first[1] * out * W + b->first[2] * across;
        if (pitch == W) gemm_pack_panel(width, LANES, rows * W, gy, each, 1, stage);
        else
            for (int64_t r = 0; r < rows; r++)
                gemm_pack_panel(width, LANES, pitch, gy + r * W, each, 1, stage + r * pitch * LANES);
        for (int64_t th = 0; th < b->size[1]; th++)
            for (int64_t tw = 0; tw < b->size[2]; tw++) {
                real *to = m + f0 + take_slot(&s, th, tw) * g->F;
                const real *from = stage + (th * out * pitch + tw * across) * LANES;
                int64_t high = min64(out, rows - th * out), wide = min64(across, pitch - tw * across);
                if (t->line == 0) gradient_of_lines(0, t->taps[0], wide, high, from, pitch, to, point);
                else if (t->line > 0) gradient_of_lines(1, t->taps[1], high, wide, from, pitch, to, point);
                else if (high < out || wide < out) gradient_tile(t->taps[0], high, wide, from, pitch, to, point);
                else if (out == 5) gradient_tile(2, 5, 5, from, pitch, to, point);
                else if (out == 4) gradient_tile(3, 4, 4, from, pitch, to, point);
                else if (out == 3) gradient_tile(4, 3, 3, from, pitch, to, point);
                else gradient_tile(5, 2, 2, from, pitch, to, point);
            }
    }
}

/* LANES channels or filters of one (box, group) of this pass. */
static int gradient_inputs(int64_t begin, int64_t end, void *context)
{
    const winograd_gradient *g = context;
    const winograd *t = &g->w;
    int64_t parts = (t->C + g->F) / LANES;
    real *stage = hl_take((size_t)stage_size(t) * sizeof(real));
    if (!stage) return HL_NOMEM;
    for (int64_t i = begin; i < end; i++) {
        int64_t at = i / parts, first = i % parts * LANES, group = at % t->j->groups;
        box b = box_at(&t->tiles, &t->grid, g->first_box + at / t->j->groups);
        if (first < t->C)
            make_v(t, &b, group, first, stage, t->shared_v + at * t->box_size + first / LANES * t->v_step);
        else make_m(g, &b, group, first - t->C, stage, g->m + at * g->m_size);
    }
    hl_give(stage);
    return HL_OK;
}

/* Slots of one box: where they begin in V and M. */
typedef struct { int64_t v, m, count; } run_of_slots;

static inline __attribute__((always_inline)) void gradient_product(const int vectors, int64_t count,
                                                                   const run_of_slots *runs, const real *v,
                                                                   const real *m, int64_t F, real *du, int add)
{
    vreal sum[GRADIENT_ROWS][GEMM_VECTORS];
#pragma GCC unroll 8
    for (int i = 0; i < GRADIENT_ROWS; i++)
#pragma GCC unroll 3
        for (int k = 0; k < vectors; k++) sum[i][k] = add ? load(du + i * F + k * LANES) : splat(0);
    for (int64_t n = 0; n < count; n++) {
        const real *vn = v + runs[n].v, *mn = m + runs[n].m;
        for (int64_t s = 0; s < runs[n].count; s++, vn += LANES, mn += F) {
            vreal ms[GEMM_VECTORS];
#pragma GCC unroll 3
            for (int k = 0; k < vectors; k++) ms[k] = load(mn + k * LANES);
#pragma GCC unroll 8
            for (int i = 0; i < GRADIENT_ROWS; i++)
#pragma GCC unroll 3
                for (int k = 0; k < vectors; k++) sum[i][k] += splat(vn[i]) * ms[k];
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < GRADIENT_ROWS; i++)
#pragma GCC unroll 3
        for (int k = 0; k < vectors; k++) store(du + i * F + k * LANES, sum[i][k]);
}

/* dU of one (group, point of U, block of channels), over the boxes of this pass and the points of V that meet it. */
static int gradient_products(int64_t begin, int64_t end, void *context)
{
    const winograd_gradient *g = context;
    const winograd *t = &g->w;
    int64_t blocks = ceil_div(t->C, g->channel_block), groups = t->j->groups, all = u_points(t), most = t->points / all;
    run_of_slots *runs = hl_take((size_t)(g->boxes * most) * sizeof(run_of_slots));
    if (!runs) return HL_NOMEM;
    for (int64_t i = begin; i < end; i++) {
        int64_t group = i / blocks / all, q = i / blocks % all, c0 = i % blocks * g->channel_block, n = 0;
        int64_t depth = t->stride == 1 ? t->channels : phases_at(t, (int)q) * t->x.channels;
        for (int64_t k = 0; k < g->boxes; k++) {
            box b = box_at(&t->tiles, &t->grid, g->first_box + k);
            slots s = slots_of(t, &b);
            for (int64_t l = 0; l < most; l++) {
                int64_t p = most == 1 ? q
                            : t->line ? l * PATCH + q
                                      : q * PATCH + l,
                        at = k * groups + group, first, last;
                range_of(t, &s, (int)p, &first, &last);
                if (first < last)
                    runs[n++] = (run_of_slots){at * t->box_size + (p * t->T + first) * LANES,
                                               at * g->m_size + p * m_point(t, g->F) + first * g->F, last - first};
            }
        }
        for (int64_t f = 0, step; f < g->F; f += step) { /* a panel of M for all channels of the block */
            step = gemm_columns(g->F - f);
            for (int64_t c = c0; c < min64(c0 + g->channel_block, depth); c += GRADIENT_ROWS) {
                const real *v = t->shared_v + c / LANES * t->v_step + c % LANES;
                real *du = g->du + ((group * all + q) * t->C + c) * g->F + f;
#define GRADIENT_PRODUCT(k) gradient_product(k, n, runs, v, g->m + f, g->F, du, g->first_box > 0)
                if (step == LANES) GRADIENT_PRODUCT(1);
                else if (step == 2 * LANES) GRADIENT_PRODUCT(2);
                else GRADIENT_PRODUCT(GEMM_VECTORS);
            }
        }
    }
    hl_give(runs);
    return HL_OK;
}

/* gw of (group, LANES filters). */
static int gradient_weights(int64_t begin, int64_t end, void *context)
{
    const winograd_gradient *g = context;
    const winograd *t = &g->w;
    const conv_job *j = t->j;
    int64_t parts = g->F / LANES, taps = t->kernel[0] * t->kernel[1], point = t->C * g->F, tap_at[25];
    int64_t each = max64(t->taps[0], t->taps[1]), all = t->depth.taps * taps, phases = t->stride * t->stride;
    real *stage = hl_take((size_t)(t->chunk * all * LANES) * sizeof(real));
    if (!stage) return HL_NOMEM;
    for (int64_t i = begin; i < end; i++) {
        int64_t group = i / parts, f0 = i % parts * LANES;
        for (int64_t c0 = 0; c0 < j->channels; c0 += t->chunk) {
            int64_t channels = min64(t->chunk, j->channels - c0);
            for (int64_t l = 0; l < phases * t->depth.taps; l++) { /* of one of the two there is only one */
                taps_at(t, l % phases, tap_at);
                for (int64_t c = 0; c < channels; c++) {
                    int64_t k = l * j->channels + c0 + c;
                    const real *from = g->du + (group * u_points(t) * t->C + k) * g->F + f0;
                    real *to = stage + (c * all + l / phases * taps) * LANES;
#define WEIGHT_ADJOINT(taps) \
    t->line < 0 ? weight_tile_adjoint(taps, from, point, tap_at, to) \
                : weight_line_adjoint(taps, from, point, tap_at, to)
                    if (each == 2) WEIGHT_ADJOINT(2);
                    else if (each == 3) WEIGHT_ADJOINT(3);
                    else if (each == 4) WEIGHT_ADJOINT(4);
                    else WEIGHT_ADJOINT(5);
                }
            }
            real *gw = g->gw + ((group * j->filters + f0) * j->channels + c0) * all;
            gemm_transpose(channels * all, min64(LANES, j->filters - f0), stage, LANES, gw, j->channels * all);
        }
    }
    hl_give(stage);
    return HL_OK;
}

/* ---- the choice ---- */

static double direct_work(const conv_job *j)
{
    return (double)(j->images * outputs_of(j) * taps_of(j)) * (double)(j->channels * j->filters);
}

/* The dimension of a kernel that has one only, or -1. */
static int line_of(const conv_job *j)
{
    int64_t down = j->axes[1].taps, across = j->axes[2].taps;
    return down == 1 && across > 1 ? 1 : across == 1 && down > 1 ? 0 : -1;
}

static int is_volume(const conv_job *j)
{
    const axis *d = &j->axes[0];
    return d->outputs != 1 || d->inputs != 1 || d->taps != 1 || d->stride != 1 || d->pad;
}

/* Its work in multiply-adds of a vector, as measured, or infinity where it does not apply. Weights that are `known` need not
 * be transformed again if they are prepacked. */
static double winograd_work(const conv_job *j, int known)
{
    const axis *d = &j->axes[0], *h = &j->axes[1], *w = &j->axes[2];
    if (is_volume(j) && (h->stride > 1 || (d->taps > 1 && j->channels % LANES))) return INFINITY;
    int line = line_of(j);
    if ((line < 0 && w->taps != h->taps) || h->stride != w->stride || h->stride > 2) return INFINITY;
    if (line >= 0 && h->stride > 1) return INFINITY;
    int64_t stride = h->stride, down = ceil_div(h->taps, stride), across = ceil_div(w->taps, stride);
    int64_t taps = max64(down, across);
    if (taps < 2 || taps > 5 || j->channels * stride * stride < 12 || j->filters < 16) return INFINITY;
    /* Of the points, which are somewhat slower; the transforms of a tile and channel, with a stride phase by phase; those of
     * a weight, or of its gradient, which is summed over all tiles. */
    const double slower = stride == 1 ? 1.16 : 1.1,
                 share = line < 0 ? 1 : 1.0 / PATCH; /* of a tile: one of its lines */
    const double transform = (stride == 1 ? 300 : 450) * share;
    const double weight = (!known ? 2000 : stride == 1 ? 330 : 580) * share;
    int64_t high = ceil_div(h->outputs, 7 - down), wide = ceil_div(w->outputs, 7 - across);
    double n = (double)(j->images * d->outputs), C = (double)(j->channels * stride * stride * d->taps),
           F = (double)j->filters;
    double points = n * (double)((h->outputs + high * (down - 1)) * (w->outputs + wide * (across - 1)));
    double tiles = n * (double)(line < 0 ? high * wide : line ? h->outputs * wide : high * w->outputs);
    return (slower * points + weight) * C * F + tiles * transform * (C + F);
}

/* Whether it pays: where its work is less than that of the direct sums, or hardly more where it can be prepacked. The parts
 * were measured on Intel's processors, where additions wait for the units that multiply, too. Where they do not, the
 * break-even lay at 1.75 times the work of the direct sums with AVX-512, at 1.5 with AVX2 (Zen 4); not for gradients of
 * weights that do not stay in the caches. */
static int is_winograd(const conv_job *j, int known)
{
    int64_t stride = j->axes[1].stride, channels = stride * stride * j->axes[0].taps * j->channels;
    int64_t points = (line_of(j) < 0 ? POINTS : PATCH) * channels * j->filters;
    double more = hl_adds_beside ? (LANES == 16 ? 1.6 : 1.4) : known ? 1.1 : 1;
    if (!known && points > CACHE_BYTES / (int64_t)sizeof(real)) more = 1;
    return j->axes[1].dilation == 1 && j->axes[2].dilation == 1 && winograd_work(j, known) < more * direct_work(j);
}

static winograd make_winograd(const conv_job *j, int adjoint)
{
    static const char *const names[2][4] = {
        {"winograd f(5x5, 2x2)", "winograd f(4x4, 3x3)", "winograd f(3x3, 4x4)", "winograd f(2x2, 5x5)"},
        {"winograd f(5, 2)", "winograd f(4, 3)", "winograd f(3, 4)", "winograd f(2, 5)"}};
    int64_t stride = j->axes[1].stride;
    winograd t = {.j = j, .adjoint = adjoint, .depth = j->axes[0]};
    t.x_slices = adjoint ? t.depth.outputs : t.depth.inputs;
    t.y_slices = adjoint ? t.depth.inputs : t.depth.outputs;
    t.tiles.images = j->images * t.y_slices;
    t.line = line_of(j);
    t.stride = stride;
    t.x = (side){.stride = adjoint ? 1 : stride, .channels = j->channels};
    t.y = (side){.stride = adjoint ? stride : 1, .channels = j->filters};
    t.tiles.axes[0].outputs = 1;
    for (int a = 0; a < 2; a++) {
        const axis *x = &j->axes[a + 1];
        t.kernel[a] = x->taps;
        t.taps[a] = ceil_div(x->taps, stride);
        t.out[a] = 7 - t.taps[a];
        t.x.size[a] = adjoint ? x->outputs : x->inputs;
        t.y.size[a] = adjoint ? x->inputs : x->outputs;
        /* Place i of gx has the gradients at i, i - 1, ... of gy. */
        side whole = {.stride = stride, .size = {x->inputs}, .before = {x->pad}};
        int64_t low = low_of(&whole, 0, stride - 1);
        t.x.before[a] = adjoint ? t.taps[a] - 1 - low : x->pad;
        t.y.before[a] = adjoint ? x->pad - low * stride : 0;
        t.places[a] = adjoint ? high_of(&whole, 0, 0) - low : x->outputs;
        t.tiles.axes[a + 1].outputs = ceil_div(t.places[a], t.out[a]);
        t.rest[a] = t.places[a] - (t.tiles.axes[a + 1].outputs - 1) * t.out[a];
    }
    hl_note(names[t.line >= 0][max64(t.taps[0], t.taps[1]) - 2]);
    t.channels = t.x.stride * t.x.stride * t.x.channels * t.depth.taps;
    t.filters = t.y.stride * t.y.stride * phase_filters(&t);
    t.C = round_up(t.channels, LANES);
    /* Tiles at a time. Up to 128 channels V (at most 576 KiB) stays in a second-level cache of 1 MiB; the fewer they are, the
     * more tiles, whose rims are read less often. More channels do not fit, V streams from the third level: 128 tiles then,
     * so that U comes by seldom, with M (and U of 128 channels) of 32 filters 576 KiB. Where few filters take V and U stays
     * near, too, V had better come by once, for 128 filters: then 48 tiles, whose V, U and M of one point are 512 KiB. */
    int few = t.C <= 128, near = t.filters < t.C && u_points(&t) * t.C * t.filters * (int64_t)sizeof(real) <= 16 << 20;
    t.points = t.line == 1 ? PATCH * max64(min64(t.places[0], PATCH), 1) : POINTS;
    /* Of tiles with few points as many more; but some boxes for several threads. */
    int64_t tiles = few ? min64(128, 4096 / t.C) : near ? 48 : 128;
    int64_t all = t.tiles.images * t.tiles.axes[1].outputs * t.tiles.axes[2].outputs;
    t.grid = make_grid(&t.tiles, max64(min64(tiles * POINTS / t.points, all / 8), tiles));
    t.filter_block = min64(few ? 64 : near ? 128 : 32, t.filters);
    t.chunk = min64(128, t.C);
    box largest = box_at(&t.tiles, &t.grid, 0);
    t.T = (positions_of(&largest) + GEMM_ROWS / 2) | 1;
    t.v_step = t.points * t.T * LANES;
    t.box_size = t.C / LANES * t.v_step;
    return t;
}

/* Parallel over (box of tiles, group, split of the filters). A box of tiles goes through all its channels and filters in
 * one task, so that V and M stay in cache; what several tasks need (V when the filters are split, U when there are several
 * boxes) is made once before.
 * x is read once per box and column of its phases (1.3 to 1.7 times with the rims), w once, y is written once. */
static int conv_winograd(const conv_job *j, int adjoint)
{
    winograd t = make_winograd(j, adjoint);
    int64_t boxes = t.grid.boxes * j->groups;
    while (t.filter_block > LANES && boxes * ceil_div(t.filters, t.filter_block) < enough_tasks()) t.filter_block /= 2;
    t.filter_block = round_up(t.filter_block, LANES);
    int64_t blocks = ceil_div(t.filters, t.filter_block);
    t.splits = boxes >= 16 ? 1 : min64(blocks, ceil_div(16, boxes));
    t.group_size = blocks * u_points(&t) * u_point(t.channels, t.filter_block);
    if (t.splits > 1) t.shared_v = hl_take((size_t)(boxes * t.box_size) * sizeof(real));
    hl_pack weights = {0};
    int share_u = t.grid.boxes > 1 || hl_is_prepacked(j->weights);
    if (share_u) /* the block's number says all that the order of U depends on */
        weights = begin_weights(j, HL_PACK_WINOGRAD, j->groups * t.group_size,
                                (t.filter_block * 2 + adjoint) * 2 + t.stride - 1);
    t.shared_u = weights.data;
    int status = (t.splits > 1 && !t.shared_v) || (share_u && !t.shared_u) ? HL_NOMEM : HL_OK;
    if (status == HL_OK && t.shared_v)
        status = parallel_even(boxes * t.C / LANES, (double)t.v_step / 4, winograd_inputs, &t);
    if (status == HL_OK && share_u && !weights.ready) {
        int64_t parts = blocks * ceil_div(t.channels, t.chunk);
        status = parallel_even(j->groups * parts, (double)t.group_size / (double)parts / 4, winograd_weights, &t);
        if (status == HL_OK) hl_pack_ready(&weights);
    }
    double work = (double)(t.T * t.points) * (double)t.C * (double)t.filters / (double)t.splits / 16;
    if (status == HL_OK) status = parallel_even(boxes * t.splits, work, winograd_tasks, &t);
    hl_give(t.shared_v);
    hl_pack_end(&weights);
    return status;
}

/* ---- dilation ---- */

/* Every dilation-th row and column of outputs meets every dilation-th input without a dilation: phases, as images of their
 * own. Of all phases alike are computed; what lies beyond the outputs is left out. The axes of `whole` are those of the
 * convolution, also where x is gy and y is gx. */
typedef struct {
    const conv_job *whole;
    int adjoint;
    int64_t image; /* the first of those that are at work */
    conv_job phases; /* of these */
    real *x, *y; /* of the phases */
} dilated;

static conv_job phases_of(const conv_job *j, int adjoint)
{
    conv_job p = *j;
    for (int a = 1; a < 3; a++) {
        axis *x = &p.axes[a];
        int64_t places = ceil_div(adjoint ? x->inputs : x->outputs, x->dilation), more = places + x->taps - 1;
        p.images *= x->dilation;
        *x = (axis){places, more, x->taps, 1, 0, 1};
        if (adjoint) *x = (axis){more, places, x->taps, 1, x->taps - 1, 1};
    }
    return p;
}

/* What x, or y, of a phase and a channel is made of: element [row][column] is this one of the plane, if there is one. */
typedef struct { int64_t size[2], step[2], first[2], places[2], phases; } phase_grid;
static phase_grid grid_of(const dilated *t, int is_x)
{
    phase_grid g = {.phases = 1};
    for (int a = 0; a < 2; a++) {
        const axis *x = &t->whole->axes[a + 1], *p = &t->phases.axes[a + 1];
        int inputs = is_x != t->adjoint;
        g.size[a] = inputs ? x->inputs : x->outputs;
        g.places[a] = inputs ? p->inputs : p->outputs;
        g.step[a] = x->dilation;
        g.first[a] = !is_x ? 0 : t->adjoint ? x->pad - (x->taps - 1) * x->dilation : -x->pad;
        g.phases *= x->dilation;
    }
    return g;
}

/* Parallel over (image, channel): the phases of its x, with zeros where no input lies. */
static int split_phases(int64_t begin, int64_t end, void *context)
{
    const dilated *t = context;
    const phase_grid g = grid_of(t, 1);
    int64_t channels = t->whole->groups * t->whole->channels, W = g.size[1];
    for (int64_t i = begin; i < end; i++)
        for (int64_t q = 0; q < g.phases; q++) {
            const real *from = t->whole->x + (t->image * channels + i) * g.size[0] * W;
            int64_t down = q / g.step[1] + g.first[0], right = q % g.step[1] + g.first[1];
            int64_t low = min64(ceil_div(max64(-right, 0), g.step[1]), g.places[1]);
            int64_t high = min64(ceil_div(max64(W - right, 0), g.step[1]), g.places[1]);
            real *to = t->x + ((i / channels * g.phases + q) * channels + i % channels) * g.places[0] * g.places[1];
            for (int64_t r = 0; r < g.places[0]; r++, to += g.places[1]) {
                int64_t h = r * g.step[0] + down;
                if (h < 0 || h >= g.size[0] || low >= high) memset(to, 0, (size_t)g.places[1] * sizeof(real));
                else {
                    for (int64_t k = 0; k < low; k++) to[k] = 0;
                    for (int64_t k = low; k < high; k++) to[k] = from[h * W + k * g.step[1] + right];
                    for (int64_t k = high; k < g.places[1]; k++) to[k] = 0;
                }
            }
        }
    return HL_OK;
}

/* Parallel over (image, channel): y from its phases, row by row. */
static int merge_phases(int64_t begin, int64_t end, void *context)
{
    const dilated *t = context;
    const phase_grid g = grid_of(t, 0);
    int64_t channels = t->whole->groups * t->whole->filters, W = g.size[1], step = g.step[1];
    for (int64_t i = begin; i < end; i++) {
        real *to = t->whole->y + (t->image * channels + i) * g.size[0] * W;
        for (int64_t h = 0; h < g.size[0]; h++, to += W)
            for (int64_t v = 0; v < min64(step, W); v++) {
                int64_t q = h % g.step[0] * step + v;
                const real *from =
                    t->y + ((i / channels * g.phases + q) * channels + i % channels) * g.places[0] * g.places[1] +
                    h / g.step[0] * g.places[1];
                for (int64_t k = 0; k * step + v < W; k++) to[k * step + v] = from[k];
            }
    }
    return HL_OK;
}

/* An element that is copied apart from its neighbours costs as much as this many multiply-adds of a vector. */
enum { COPY_WORK = 80 };
/* Not where phases have two outputs in a dimension: so small tiles take longer than winograd_work tells. */
static int is_dilated_winograd(const conv_job *j, int adjoint)
{
    if (is_volume(j)) return 0;
    for (int a = 1; a < 3; a++) {
        const axis *x = &j->axes[a];
        if (x->stride != 1 || (x->dilation > 1 && x->dilation * 2 >= (adjoint ? x->inputs : x->outputs))) return 0;
    }
    if (j->axes[1].dilation == 1 && j->axes[2].dilation == 1) return 0;
    conv_job p = phases_of(j, adjoint);
    double copies = (double)p.images * (double)(p.channels * inputs_of(&p) + p.filters * outputs_of(&p));
    return winograd_work(&p, 1) + COPY_WORK * copies < direct_work(j);
}

/* As many images at a time as their phases fit a third-level cache. */
static int conv_winograd_dilated(const conv_job *j, int adjoint)
{
    dilated t = {.whole = j, .adjoint = adjoint, .phases = phases_of(j, adjoint)};
    int64_t phases = t.phases.images / j->images, inputs = inputs_of(&t.phases), outputs = outputs_of(&t.phases);
    if (adjoint) inputs = outputs_of(&t.phases), outputs = inputs_of(&t.phases);
    int64_t x_size = phases * j->groups * j->channels * inputs, y_size = phases * j->groups * j->filters * outputs;
    int64_t most = min64(max64((8 << 20) / (x_size + y_size), 1), j->images);
    t.x = hl_take((size_t)(most * (x_size + y_size)) * sizeof(real));
    if (!t.x) return HL_NOMEM;
    t.y = t.x + most * x_size;
    int status = HL_OK;
    for (; t.image < j->images && status == HL_OK; t.image += most) {
        int64_t images = min64(most, j->images - t.image);
        t.phases.images = images * phases;
        t.phases.x = t.x;
        t.phases.y = t.y;
        status = parallel_even(images * j->groups * j->channels, (double)(phases * inputs), split_phases, &t);
        if (status == HL_OK) status = conv_winograd(&t.phases, adjoint);
        if (status == HL_OK)
            status = parallel_even(images * j->groups * j->filters, (double)(phases * outputs), merge_phases, &t);
    }
    hl_give(t.x);
    return status;
}

/* In passes over as many boxes as their transforms fit a third-level cache: transforms parallel over (box, group, part of
 * the channels or filters), then products parallel over (group, point, block of channels), each in the order of the boxes;
 * at the end the weights, parallel over (group, part of the filters).
 * x and gy are read once; their transforms (of y 36 points for 25 to 4 outputs) are written and read; dU is read and written once a pass. */
static int conv_winograd_gradient(const conv_job *j, const real *gy, real *gw)
{
    winograd_gradient g = {.w = make_winograd(j, 0), .gy = gy, .gw = gw, .F = round_up(j->filters, LANES)};
    winograd *t = &g.w;
    g.m_size = t->points * m_point(t, g.F);
    int64_t du_size = j->groups * u_points(t) * t->C * g.F, each = j->groups * (t->box_size + g.m_size);
    /* 8 MiB, or as much as a pass moves of dU. */
    g.boxes = min64(t->grid.boxes, max64(max64((8 << 20) / (int64_t)sizeof(real), du_size) / each, 1));
    int64_t pass = g.boxes;
    g.channel_block = round_up(ceil_div(t->C, ceil_div(t->C, 64)), LANES);
    t->shared_v = hl_take((size_t)(pass * each) * sizeof(real));
    g.du = hl_take((size_t)du_size * sizeof(real));
    int status = t->shared_v && g.du ? HL_OK : HL_NOMEM;
    if (status == HL_OK) g.m = t->shared_v + pass * j->groups * t->box_size;
    for (; g.first_box < t->grid.boxes && status == HL_OK; g.first_box += pass) {
        g.boxes = min64(pass, t->grid.boxes - g.first_box);
        status = parallel_even(g.boxes * j->groups * (t->C + g.F) / LANES, (double)t->v_step / 4, gradient_inputs, &g);
        double work = (double)(t->T * t->points / u_points(t) * g.boxes * g.channel_block * g.F) / 16;
        if (status == HL_OK)
            status =
                parallel_even(j->groups * u_points(t) * ceil_div(t->C, g.channel_block), work, gradient_products, &g);
    }
    if (status == HL_OK)
        status = parallel_even(j->groups * g.F / LANES, (double)(t->C * u_points(t) * LANES) / 4, gradient_weights, &g);
    hl_give(t->shared_v);
    hl_give(g.du);
    return status;
}
#endif
