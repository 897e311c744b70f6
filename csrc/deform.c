/* The deformable convolution and its gradients.
 *
 * x is copied with the channels innermost: whatever the offset, a sample is then four runs of memory, and a vector holds
 * as many channels. Samples of some channels (a chunk) at a block of positions become a small matrix in the second cache,
 * which goes through the matrix product; the column matrix of an image never exists. */
#include "gemm.h"

/* Positions of a block at most: four panels of the product, which repay reading the weights. */
enum { BLOCK = 4 * GEMM_COLUMNS };
/* Columns (taps x channels) of a chunk, about: with a block of positions a quarter of a second-level cache. */
enum { COLUMNS = 320 };
/* Elements of x with the channels innermost at a time (or one image): 32 MiB. */
enum { PASS = (32 << 20) / (int)sizeof(real) };
/* An offset of so many pixels leads outside. */
#define FAR ((real)(1 << 30))

typedef struct { int64_t outputs, inputs, taps, stride, pad, dilation; } axis;

typedef struct {
    int64_t N, C, groups, channels, filters, OG; /* channels and filters of one group */
    int64_t taps, S, P;                          /* S outputs, P pixels of a plane */
    axis h, w;
    const real *x, *offset, *mask;
    int64_t per_chunk, chunks; /* channels at most */
    int64_t per_block, blocks; /* positions at most */
    int64_t pass;              /* images at a time */
    int64_t first, images;     /* of this pass */
    real *pixels;              /* [images][P + 1][C]; the last pixel is 0 and stands for all outside */
} job;

static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* Part of a group's channels, or all channels of some groups. */
typedef struct { int64_t channel, channels, group, groups; } chunk;

/* Groups narrower than a vector share a chunk. */
static int is_shared(const job *j) { return j->groups > 1 && j->channels < LANES; }

static void cut_chunks(job *j)
{
    if (is_shared(j)) {
        j->per_chunk = max64(LANES / max64(j->channels, 1), 1) * j->channels;
        j->chunks = ceil_div(j->groups, max64(LANES / max64(j->channels, 1), 1));
        return;
    }
    int64_t most = max64(COLUMNS / j->taps / LANES * LANES, LANES), pieces = max64(ceil_div(j->channels, most), 1);
    j->per_chunk = min64(round_up(ceil_div(j->channels, pieces), LANES), j->channels);
    j->chunks = j->groups * (j->channels ? ceil_div(j->channels, j->per_chunk) : 1);
}

static chunk chunk_at(const job *j, int64_t i)
{
    if (is_shared(j)) {
        int64_t per = max64(LANES / max64(j->channels, 1), 1), groups = min64(per, j->groups - i * per);
        return (chunk){i * per * j->channels, groups * j->channels, i * per, groups};
    }
    int64_t pieces = j->chunks / j->groups, group = i / pieces, first = i % pieces * j->per_chunk;
    return (chunk){group * j->channels + first, min64(j->per_chunk, j->channels - first), group, 1};
}

/* At least so many tasks where blocks of one panel allow. */
static void cut_blocks(job *j, int64_t at_least)
{
    j->blocks = max64(ceil_div(j->S, BLOCK), min64(at_least, ceil_div(j->S, GEMM_COLUMNS)));
    j->per_block = round_up(ceil_div(j->S, j->blocks), LANES);
    j->blocks = ceil_div(j->S, j->per_block);
}

/* ---- x with the channels innermost ---- */

enum { PIXELS = 1024 }; /* of one unit of work */

static int turn_pixels(int64_t begin, int64_t end, void *context)
{
    const job *j = context;
    int64_t units = ceil_div(j->P, PIXELS);
    for (int64_t i = begin; i < end; i++) {
        int64_t n = i / units, p = i % units * PIXELS;
        real *to = j->pixels + n * (j->P + 1) * j->C;
        gemm_transpose(j->C, min64(PIXELS, j->P - p), j->x + (j->first + n) * j->C * j->P + p, j->P, to + p * j->C,
                       j->C);
        if (p == 0) memset(to + j->P * j->C, 0, (size_t)j->C * sizeof(real));
    }
    return HL_OK;
}

/* As many images at a time as PASS allows, when each needs so many elements beside its pixels. */
static void cut_passes(job *j, int64_t beside)
{
    j->pass = min64(max64(PASS / max64((j->P + 1) * j->C + beside, 1), 1), j->N);
}

/* Calls `images` for every pass, with its pixels in place. */
static int in_passes(job *j, int needs_pixels, int (*images)(job *j, void *context), void *context)
{
    /* What a whole vector may touch behind the last pixel. */
    size_t size = (size_t)(j->pass * (j->P + 1) * j->C + LANES) * sizeof(real);
    if (needs_pixels && !(j->pixels = hl_take(size))) return HL_NOMEM;
    int status = HL_OK;
    for (j->first = 0; j->first < j->N && status == HL_OK; j->first += j->pass) {
        j->images = min64(j->pass, j->N - j->first);
        if (needs_pixels)
            status = parallel_even(j->images * ceil_div(j->P, PIXELS), (double)(PIXELS * j->C), turn_pixels, j);
        if (status == HL_OK) status = images(j, context);
    }
    hl_give(j->pixels);
    return status;
}

/* ---- places ---- */

/* Where one tap reads at each position of a block: four pixels and their weights, and the ways that make these. */
typedef struct {
    int64_t still_h[BLOCK], still_w[BLOCK]; /* o * stride - pad */
    int64_t at[4][BLOCK];
    real down[BLOCK], right[BLOCK], mask[BLOCK], weight[4][BLOCK];
} places;

static void begin_block(const job *j, int64_t first, int64_t n, places *p)
{
    for (int64_t i = 0; i < n; i++) {
        p->still_h[i] = (first + i) / j->w.outputs * j->h.stride - j->h.pad;
        p->still_w[i] = (first + i) % j->w.outputs * j->w.stride - j->w.pad;
    }
}

/* The pixel below still + moved, and the way from it; far outside -2. The way is NaN where the offset is. */
static inline __attribute__((always_inline)) int64_t low_pixel(int64_t still, real moved, real *way)
{
    int near = moved > -FAR && moved < FAR;
    int32_t whole = (int32_t)(near ? moved : 0);
    whole -= near && (real)whole > moved;
    *way = near ? moved - (real)whole : moved != moved ? moved : 0;
    return near ? still + whole : -2;
}

static void find_places(const job *j, int64_t image, int64_t group, int64_t tap, int64_t first, int64_t n, places *p)
{
    int64_t row = (image * j->OG + group) * j->taps + tap, H = j->h.inputs, W = j->w.inputs, P = j->P;
    const real *offset = j->offset + row * 2 * j->S + first, *offset_w = offset + j->S;
    int64_t tap_h = tap / j->w.taps * j->h.dilation, tap_w = tap % j->w.taps * j->w.dilation;
    for (int64_t i = 0; i < n; i++) {
        real down, right;
        int64_t h = low_pixel(p->still_h[i] + tap_h, offset[i], &down);
        int64_t w = low_pixel(p->still_w[i] + tap_w, offset_w[i], &right);
        int upper = h >= 0 && h < H, lower = h >= -1 && h < H - 1;
        int64_t left = w >= 0 && w < W, next = w >= -1 && w < W - 1;
        int64_t at = (upper || lower ? h : 0) * W + w;
        p->at[0][i] = upper && left ? at : P;
        p->at[1][i] = upper && next ? at + 1 : P;
        p->at[2][i] = lower && left ? at + W : P;
        p->at[3][i] = lower && next ? at + W + 1 : P;
        p->weight[0][i] = (1 - down) * (1 - right);
        p->weight[1][i] = (1 - down) * right;
        p->weight[2][i] = down * (1 - right);
        p->weight[3][i] = down * right;
        p->down[i] = down;
        p->right[i] = right;
    }
    for (int64_t i = 0; i < n; i++) p->mask[i] = j->mask ? j->mask[row * j->S + first + i] : 1;
}

/* The offset groups that share channels with a chunk, and what they share. */
static int64_t first_group(const job *j, const chunk *c) { return c->channel / max64(j->C / j->OG, 1); }
static int64_t last_group(const job *j, const chunk *c)
{
    return (c->channel + c->channels - 1) / max64(j->C / j->OG, 1);
}
static int64_t shared_begin(const job *j, const chunk *c, int64_t group)
{
    return max64(group * (j->C / j->OG) - c->channel, 0);
}
static int64_t shared_end(const job *j, const chunk *c, int64_t group)
{
    return min64((group + 1) * (j->C / j->OG) - c->channel, c->channels);
}

/* columns[i * row + tap * channels + c]: the samples of a chunk. The last vector of a run writes beyond it; what follows is
 * written later, and a row ends in LANES for it. */
static void sample(const job *j, const chunk *c, int64_t image, int64_t first, int64_t n, places *p, real *columns,
                   int64_t row)
{
    const real *pixels = j->pixels + (image - j->first) * (j->P + 1) * j->C + c->channel;
    if (!c->channels) return;
    for (int64_t tap = 0; tap < j->taps; tap++)
        for (int64_t group = first_group(j, c); group <= last_group(j, c); group++) {
            int64_t begin = shared_begin(j, c, group), end = shared_end(j, c, group);
            find_places(j, image, group, tap, first, n, p);
            real *to = columns + tap * c->channels;
            for (int64_t i = 0; i < n; i++, to += row) {
                const real *v0 = pixels + p->at[0][i] * j->C, *v1 = pixels + p->at[1][i] * j->C;
                const real *v2 = pixels + p->at[2][i] * j->C, *v3 = pixels + p->at[3][i] * j->C;
                vreal w0 = splat(p->weight[0][i]), w1 = splat(p->weight[1][i]), w2 = splat(p->weight[2][i]),
                      w3 = splat(p->weight[3][i]), mask = splat(p->mask[i]);
                for (int64_t k = begin; k < end; k += LANES)
                    store(to + k,
                          mask * (w0 * load(v0 + k) + w1 * load(v1 + k) + w2 * load(v2 + k) + w3 * load(v3 + k)));
            }
        }
}

/* ---- forward ---- */

/* w of a chunk as [filters][taps][channels]. */
static void turn_weights(const job *j, const chunk *c, const real *w, real *to)
{
    const real *from = w + c->group * j->filters * j->channels * j->taps + c->channel % max64(j->channels, 1) * j->taps;
    for (int64_t f = 0; f < j->filters; f++, from += j->channels * j->taps)
        for (int64_t tap = 0; tap < j->taps; tap++)
            for (int64_t k = 0; k < c->channels; k++) *to++ = from[k * j->taps + tap];
}

typedef struct {
    const job *j;
    const real *w, *b;
    real *y;
    real *packed; /* w by chunks; not where groups share a chunk */
    int64_t panel; /* elements of a chunk in it */
    int by_columns; /* in panels of taps and channels (the gradient), not as rows of filters */
} weights;

static int pack_chunks(int64_t begin, int64_t end, void *context)
{
    const weights *t = context;
    const job *j = t->j;
    real *turned = hl_take((size_t)(j->filters * j->taps * j->per_chunk) * sizeof(real) + 1);
    if (!turned) return HL_NOMEM;
    for (int64_t i = begin; i < end; i++) {
        chunk c = chunk_at(j, i);
        int64_t columns = j->taps * c.channels;
        turn_weights(j, &c, t->w, t->by_columns ? turned : t->packed + i * t->panel);
        if (t->by_columns) gemm_pack_b(j->filters, columns, turned, columns, 1, t->packed + i * t->panel);
    }
    hl_give(turned);
    return HL_OK;
}

static int pack_weights(weights *t)
{
    const job *j = t->j;
    if (is_shared(j)) return HL_OK;
    t->panel = round_up(j->filters * round_up(j->taps * j->per_chunk, LANES), LANES);
    t->packed = hl_take((size_t)(j->chunks * t->panel) * sizeof(real) + 1);
    if (!t->packed) return HL_NOMEM;
    return parallel_even(j->chunks, (double)t->panel * 2, pack_chunks, t);
}

static int forward_blocks(int64_t begin, int64_t end, void *context)
{
    const weights *t = context;
    const job *j = t->j;
    int64_t row = j->taps * j->per_chunk + LANES, shared = is_shared(j);
    size_t matrix = (size_t)(j->per_block * row), turned_size = shared ? matrix : 0;
    real *columns = hl_take((matrix + turned_size) * sizeof(real) + sizeof(places)), *turned = columns + matrix;
    if (!columns) return HL_NOMEM;
    places *p = (places *)(turned + turned_size);
    int status = HL_OK;
    for (int64_t i = begin; i < end && status == HL_OK; i++) {
        int64_t image = j->first + i / j->blocks, first = i % j->blocks * j->per_block;
        int64_t n = min64(j->per_block, j->S - first);
        begin_block(j, first, n, p);
        for (int64_t k = 0; k < j->chunks && status == HL_OK; k++) {
            chunk c = chunk_at(j, k);
            int64_t filter = c.group * j->filters;
            gemm_call g = {.M = j->filters,
                           .N = n,
                           .K = j->taps * c.channels,
                           .a = t->packed + k * t->panel,
                           .a_row = j->taps * c.channels,
                           .a_col = 1,
                           .b = columns,
                           .b_row = 1,
                           .b_col = row,
                           .c = t->y + (image * j->groups * j->filters + filter) * j->S + first,
                           .c_row = j->S,
                           .accumulate = c.channel != c.group * j->channels};
            if (t->b && !g.accumulate) g.row_bias = t->b + filter;
            sample(j, &c, image, first, n, p, columns, row);
            if (!shared) {
                status = gemm(&g);
                continue;
            }
            gemm_transpose(n, j->taps * c.channels, columns, row, turned, j->per_block);
            for (int64_t q = 0; q < c.groups; q++, g.c += j->filters * j->S)
                for (int64_t channel = 0; channel < j->channels && status == HL_OK; channel++) {
                    int64_t at = q * j->channels + channel;
                    g.K = j->taps;
                    g.a = t->w + ((filter + q * j->filters) * j->channels + channel) * j->taps;
                    g.a_row = j->channels * j->taps;
                    g.a_col = 1;
                    g.b = turned + at * j->per_block;
                    g.b_row = c.channels * j->per_block;
                    g.b_col = 1;
                    g.accumulate = channel > 0;
                    g.row_bias = t->b && !channel ? t->b + filter + q * j->filters : NULL;
                    status = gemm(&g);
                }
        }
    }
    hl_give(columns);
    return status;
}

static int forward_images(job *j, void *context)
{
    double work = (double)j->per_block * (double)(j->C * j->taps) * ((double)j->filters / 16 + 1);
    return parallel_even(j->images * j->blocks, work, forward_blocks, context);
}

#define JOB(p) \
    {.N = p->N, \
     .C = p->C, \
     .groups = max64(p->groups, 1), \
     .channels = p->CG, \
     .filters = p->F / max64(p->groups, 1), \
     .OG = max64(p->OG, 1), \
     .taps = p->KH * p->KW, \
     .S = p->OH * p->OW, \
     .P = p->H * p->W, \
     .h = {p->OH, p->H, p->KH, p->stride_h, p->pad_h, p->dilation_h}, \
     .w = {p->OW, p->W, p->KW, p->stride_w, p->pad_w, p->dilation_w}, \
     .x = x, \
     .offset = offset, \
     .mask = mask}

/* Parallel over blocks of positions of each image; y = w[filters, taps x channels] samples[taps x channels, positions].
 * Chunk by chunk of channels: the samples go along them, the products along the positions. x is copied with the channels
 * innermost. Reads x four times a sample (from cache), w once per block; writes y once per chunk.
 * Source: Dai et al., Deformable convolutional networks, arXiv 1703.06211. */
int HL(deform_conv)(const hl_deform_conv_plan *plan, const real *x, const real *offset, const real *mask, const real *w,
                    const real *b, real *y)
{
    job j = JOB(plan);
    if (j.N <= 0 || j.S <= 0 || plan->F <= 0) return HL_OK;
    cut_chunks(&j);
    cut_blocks(&j, ceil_div(16, j.N));
    weights t = {.j = &j, .w = w, .b = b, .y = y};
    cut_passes(&j, 0);
    int status = pack_weights(&t);
    if (status == HL_OK) status = in_passes(&j, 1, forward_images, &t);
    hl_give(t.packed);
    return status;
}

/* ---- gradients through the samples ---- */

typedef struct {
    weights weights;
    const real *gy;
    real *gx, *goffset, *gmask;
    real *sums; /* [images][chunk + offset group][tap][down, right, mask][S]: the parts of each chunk, or NULL */
} gradients;

/* The first n lanes of v, zeros after them. */
static inline __attribute__((always_inline)) vreal first_lanes(vreal v, int64_t n)
{
    return blend(lanes_before(n), v, splat((real)0));
}

/* gx, with the channels innermost, += the weights times the gradient of a sample. */
static void scatter(const places *p, int64_t i, const real *g, int64_t begin, int64_t end, real *gx, int64_t pitch)
{
    for (int v = 0; v < 4; v++) {
        real *to = gx + p->at[v][i] * pitch;
        vreal weight = splat(p->weight[v][i] * p->mask[i]);
        int64_t k = begin;
        for (; k + LANES <= end; k += LANES) store(to + k, load(to + k) + weight * load(g + k));
        if (k < end) store(to + k, load(to + k) + first_lanes(weight * load(g + k), end - k));
    }
}

/* What the gradient of a sample says of its place and its mask: sums over some channels. */
static void slopes(const places *p, int64_t i, const real *g, int64_t begin, int64_t end, const real *pixels,
                   int64_t pitch, real *down, real *right, real *mask)
{
    const real *v0 = pixels + p->at[0][i] * pitch, *v1 = pixels + p->at[1][i] * pitch;
    const real *v2 = pixels + p->at[2][i] * pitch, *v3 = pixels + p->at[3][i] * pitch;
    vreal d = splat(p->down[i]), r = splat(p->right[i]), up = splat(1 - p->down[i]), left = splat(1 - p->right[i]);
    vreal sum_d = {0}, sum_r = {0}, sum_m = {0};
    for (int64_t k = begin; k < end; k += LANES) {
        vreal a = load(v0 + k), b = load(v1 + k), e = load(v2 + k), f = load(v3 + k), gk = load(g + k);
        vreal gd = gk * (left * (e - a) + r * (f - b)), gr = gk * (up * (b - a) + d * (f - e));
        vreal gm = gk * (up * (left * a + r * b) + d * (left * e + r * f));
        if (end - k < LANES) {
            gd = first_lanes(gd, end - k);
            gr = first_lanes(gr, end - k);
            gm = first_lanes(gm, end - k);
        }
        sum_d += gd;
        sum_r += gr;
        sum_m += gm;
    }
    *down = p->mask[i] * sum_lanes(sum_d);
    *right = p->mask[i] * sum_lanes(sum_r);
    *mask = sum_lanes(sum_m);
}

/* columns[i * row + tap * channels + c] = the sum over filters of gy and w. */
static int sample_gradients(const gradients *t, const chunk *c, int64_t k, int64_t image, int64_t first, int64_t n,
                            real *columns, int64_t row, real *turned)
{
    const job *j = t->weights.j;
    const real *gy = t->gy + (image * j->groups + c->group) * j->filters * j->S + first;
    if (!is_shared(j)) {
        gemm_call g = {.M = n,
                       .N = j->taps * c->channels,
                       .K = j->filters,
                       .a = gy,
                       .a_row = 1,
                       .a_col = j->S,
                       .packed_b = t->weights.packed + k * t->weights.panel,
                       .c = columns,
                       .c_row = row};
        return gemm(&g);
    }
    int status = HL_OK;
    for (int64_t q = 0; q < c->groups; q++, gy += j->filters * j->S)
        for (int64_t channel = 0; channel < j->channels && status == HL_OK; channel++) {
            gemm_call g = {.M = j->taps,
                           .N = n,
                           .K = j->filters,
                           .a = t->weights.w + ((c->group + q) * j->filters * j->channels + channel) * j->taps,
                           .a_row = 1,
                           .a_col = j->channels * j->taps,
                           .b = gy,
                           .b_row = j->S,
                           .b_col = 1,
                           .c = turned + (q * j->channels + channel) * j->per_block,
                           .c_row = c->channels * j->per_block};
            status = gemm(&g);
        }
    gemm_transpose(j->taps * c->channels, n, turned, j->per_block, columns, row);
    return status;
}

static int gradient_chunks(int64_t begin, int64_t end, void *context)
{
    const gradients *t = context;
    const job *j = t->weights.j;
    int64_t row = j->taps * j->per_chunk + LANES, pitch = round_up(max64(j->per_chunk, 1), LANES) + LANES;
    size_t image_size = t->gx ? (size_t)((j->P + 1) * pitch) : 0;
    size_t matrix = (size_t)(j->per_block * row), turned_size = is_shared(j) ? matrix : 0;
    real *columns = hl_take((matrix + turned_size + image_size) * sizeof(real) + sizeof(places));
    if (!columns) return HL_NOMEM;
    real *turned = columns + matrix, *gx = turned + turned_size;
    places *p = (places *)(gx + image_size);
    int status = HL_OK;
    for (int64_t i = begin; i < end && status == HL_OK; i++) {
        int64_t n = i / j->chunks, image = j->first + n;
        chunk c = chunk_at(j, i % j->chunks);
        if (!c.channels) continue;
        const real *pixels = j->pixels + n * (j->P + 1) * j->C + c.channel;
        if (t->gx) memset(gx, 0, image_size * sizeof(real));
        for (int64_t first = 0; first < j->S && status == HL_OK; first += j->per_block) {
            int64_t positions = min64(j->per_block, j->S - first);
            begin_block(j, first, positions, p);
            status = sample_gradients(t, &c, i % j->chunks, image, first, positions, columns, row, turned);
            for (int64_t tap = 0; tap < j->taps && status == HL_OK; tap++)
                for (int64_t group = first_group(j, &c); group <= last_group(j, &c); group++) {
                    int64_t from = shared_begin(j, &c, group), to = shared_end(j, &c, group);
                    int64_t part = (n * (j->chunks + j->OG) + i % j->chunks + group) * j->taps + tap;
                    real *down = t->sums ? t->sums + part * 3 * j->S + first : NULL;
                    find_places(j, image, group, tap, first, positions, p);
                    for (int64_t s = 0; s < positions; s++) {
                        const real *g = columns + s * row + tap * c.channels;
                        if (t->gx) scatter(p, s, g, from, to, gx, pitch);
                        if (down)
                            slopes(p, s, g, from, to, pixels, j->C, down + s, down + j->S + s, down + 2 * j->S + s);
                    }
                }
        }
        if (t->gx) gemm_transpose(j->P, c.channels, gx, pitch, t->gx + (image * j->C + c.channel) * j->P, j->P);
    }
    hl_give(columns);
    return status;
}

/* The parts of all chunks of an offset group, in order. */
static int add_parts(int64_t begin, int64_t end, void *context)
{
    const gradients *t = context;
    const job *j = t->weights.j;
    for (int64_t i = begin; i < end; i++) {
        int64_t n = i / j->OG / j->taps, group = i / j->taps % j->OG, tap = i % j->taps;
        int64_t at = ((j->first + n) * j->OG + group) * j->taps + tap;
        real *to[3] = {t->goffset ? t->goffset + at * 2 * j->S : NULL,
                       t->goffset ? t->goffset + (at * 2 + 1) * j->S : NULL, t->gmask ? t->gmask + at * j->S : NULL};
        for (int v = 0; v < 3; v++) {
            if (!to[v]) continue;
            memset(to[v], 0, (size_t)j->S * sizeof(real));
            for (int64_t k = 0; k < j->chunks; k++) {
                chunk c = chunk_at(j, k);
                if (!c.channels || group < first_group(j, &c) || group > last_group(j, &c)) continue;
                const real *from = t->sums + (((n * (j->chunks + j->OG) + k + group) * j->taps + tap) * 3 + v) * j->S;
                for (int64_t s = 0; s < j->S; s++) to[v][s] += from[s];
            }
        }
    }
    return HL_OK;
}

static int gradient_images(job *j, void *context)
{
    const gradients *t = context;
    double work = (double)j->S * (double)(j->per_chunk * j->taps) * ((double)j->filters / 16 + 2);
    int status = parallel_even(j->images * j->chunks, work, gradient_chunks, context);
    if (status != HL_OK || !t->sums) return status;
    double parts = (double)j->chunks / (double)j->OG + 2;
    return parallel_even(j->images * j->OG * j->taps, (double)j->S * 3 * parts, add_parts, context);
}

/* Parallel over chunks of channels of each image: each adds to channels of gx of its own, block by block of positions, so
 * that a sum never depends on the threads; what it knows of the offsets and masks is a part, added to the others after.
 * The gradients of a block's samples are a product of gy and w in the second cache; the channels of gx lie innermost.
 * Reads gy once per chunk, x four times a sample (from cache), reads and writes gx four times a sample (from cache).
 * Source: as deform_conv, appendix A. */
int HL(deform_conv_grad_samples)(const hl_deform_conv_grad_samples_plan *plan, const real *gy, const real *x,
                                 const real *offset, const real *mask, const real *w, real *gx, real *goffset,
                                 real *gmask)
{
    job j = JOB(plan);
    if (j.N <= 0) return HL_OK;
    if (j.S <= 0 || j.C <= 0) {
        if (goffset) memset(goffset, 0, (size_t)(j.N * j.OG * j.taps * 2 * j.S) * sizeof(real));
        if (gmask) memset(gmask, 0, (size_t)(j.N * j.OG * j.taps * j.S) * sizeof(real));
        if (gx) memset(gx, 0, (size_t)(j.N * j.C * j.P) * sizeof(real));
        return HL_OK;
    }
    cut_chunks(&j);
    cut_blocks(&j, 1);
    gradients t = {
        .weights = {.j = &j, .w = w, .by_columns = 1}, .gy = gy, .gx = gx, .goffset = goffset, .gmask = gmask};
    int status = pack_weights(&t.weights), places_too = goffset || gmask;
    int64_t parts = places_too ? (j.chunks + j.OG) * j.taps * 3 * j.S : 0;
    cut_passes(&j, parts);
    if (status == HL_OK && places_too && !(t.sums = hl_take((size_t)(j.pass * parts) * sizeof(real))))
        status = HL_NOMEM;
    if (status == HL_OK) status = in_passes(&j, places_too, gradient_images, &t);
    hl_give(t.sums);
    hl_give(t.weights.packed);
    return status;
}

/* ---- gradient of the weights ---- */

typedef struct {
    const job *j;
    const real *gy;
    real *gw;
    real *sums; /* [parts][w by chunks] */
    int64_t parts;
} weight_job;

/* Where a chunk begins in w by chunks. */
static int64_t chunk_start(const job *j, const chunk *c)
{
    return c->group * j->filters * j->channels * j->taps + (c->channel - c->group * j->channels) * j->filters * j->taps;
}

static int weight_parts(int64_t begin, int64_t end, void *context)
{
    const weight_job *t = context;
    const job *j = t->j;
    int64_t row = j->taps * j->per_chunk + LANES, shared = is_shared(j),
            all = j->groups * j->filters * j->channels * j->taps;
    size_t matrix = (size_t)(j->per_block * row), turned_size = shared ? matrix : 0;
    real *columns = hl_take((matrix + turned_size) * sizeof(real) + sizeof(places)), *turned = columns + matrix;
    if (!columns) return HL_NOMEM;
    places *p = (places *)(turned + turned_size);
    int status = HL_OK;
    for (int64_t i = begin; i < end && status == HL_OK; i++) {
        int64_t part = i / j->chunks, total = j->images * j->blocks;
        chunk c = chunk_at(j, i % j->chunks);
        real *sums = t->sums + part * all + chunk_start(j, &c);
        for (int64_t u = total * part / t->parts; u < total * (part + 1) / t->parts && status == HL_OK; u++) {
            int64_t image = j->first + u / j->blocks, first = u % j->blocks * j->per_block;
            int64_t n = min64(j->per_block, j->S - first);
            const real *gy = t->gy + (image * j->groups + c.group) * j->filters * j->S + first;
            begin_block(j, first, n, p);
            sample(j, &c, image, first, n, p, columns, row);
            gemm_call g = {.M = j->filters,
                           .N = j->taps * c.channels,
                           .K = n,
                           .a = gy,
                           .a_row = j->S,
                           .a_col = 1,
                           .b = columns,
                           .b_row = row,
                           .b_col = 1,
                           .c = sums,
                           .c_row = j->taps * c.channels,
                           .accumulate = 1};
            if (!shared) {
                status = gemm(&g);
                continue;
            }
            gemm_transpose(n, j->taps * c.channels, columns, row, turned, j->per_block);
            for (int64_t q = 0; q < c.channels && status == HL_OK; q++) {
                int64_t group = q / j->channels, channel = q % j->channels;
                g.N = j->taps;
                g.a = gy + group * j->filters * j->S;
                g.b = turned + q * j->per_block;
                g.b_row = 1;
                g.b_col = c.channels * j->per_block;
                g.c = sums + (group * j->filters * j->channels + channel) * j->taps;
                g.c_row = j->channels * j->taps;
                status = gemm(&g);
            }
        }
    }
    hl_give(columns);
    return status;
}

static int weight_images(job *j, void *context)
{
    weight_job *t = context;
    double work = (double)(j->images * j->S) * (double)(j->per_chunk * j->taps) * ((double)j->filters / 16 + 1);
    return parallel_even(j->chunks * t->parts, work / (double)t->parts, weight_parts, t);
}

/* Adds the parts in order, and puts taps behind channels again. */
static int join_parts(int64_t begin, int64_t end, void *context)
{
    const weight_job *t = context;
    const job *j = t->j;
    int64_t all = j->groups * j->filters * j->channels * j->taps;
    for (int64_t i = begin; i < end; i++) {
        chunk c = chunk_at(j, i);
        const real *from = t->sums + chunk_start(j, &c);
        real *to = t->gw + c.group * j->filters * j->channels * j->taps + (c.channel - c.group * j->channels) * j->taps;
        int64_t size = c.groups * j->filters * (is_shared(j) ? j->channels : c.channels) * j->taps;
        for (int64_t q = 0; q < size; q++) {
            real sum = from[q];
            for (int64_t part = 1; part < t->parts; part++) sum += from[part * all + q];
            int64_t f = q / (j->taps * c.channels), tap = q / c.channels % j->taps, k = q % c.channels;
            to[is_shared(j) ? q : (f * j->channels + k) * j->taps + tap] = sum;
        }
    }
    return HL_OK;
}

/* Parallel over chunks of channels and, where these are few, parts of the positions; each goes through its blocks in order,
 * so that a sum never depends on the threads.
 * The samples of a block are made as in deform_conv and multiplied with gy. Reads x four times a sample (from cache), gy
 * once per chunk; writes gw once per block (in cache).
 * Source: as deform_conv. */
int HL(deform_conv_grad_weight)(const hl_deform_conv_grad_weight_plan *plan, const real *gy, const real *x,
                                const real *offset, const real *mask, real *gw)
{
    job j = JOB(plan);
    int64_t all = j.groups * j.filters * j.channels * j.taps;
    if (all <= 0) return HL_OK;
    memset(gw, 0, (size_t)all * sizeof(real));
    if (j.N <= 0 || j.S <= 0) return HL_OK;
    cut_chunks(&j);
    cut_blocks(&j, 1);
    weight_job t = {.j = &j, .gy = gy, .gw = gw};
    t.parts = min64(ceil_div(16, j.chunks), max64(j.N * j.blocks / 4, 1)); /* a part repays its sums by four blocks */
    t.sums = hl_take((size_t)(t.parts * all) * sizeof(real));
    if (!t.sums) return HL_NOMEM;
    memset(t.sums, 0, (size_t)(t.parts * all) * sizeof(real));
    cut_passes(&j, 0);
    int status = in_passes(&j, 1, weight_images, &t);
    if (status == HL_OK)
        status = parallel_even(j.chunks, (double)(all * t.parts) / (double)j.chunks * 4, join_parts, &t);
    hl_give(t.sums);
    return status;
}
