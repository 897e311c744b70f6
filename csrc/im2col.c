/* Patches under a sliding window and their adjoints: unfold and fold ([N, C, KH, KW, OH, OW]), im2col and col2im
 * ([N, OH, OW, C, KH, KW]). Output o and tap k of an axis meet the input at o * stride - pad + k * dilation. */
#include "simd.h"

typedef struct { int64_t outputs, inputs, taps, stride, pad, dilation; } axis;

/* The smallest output whose input under the tap is at least `at`; `outputs` when there is none. */
static int64_t first_output(const axis *a, int64_t tap, int64_t at)
{
    int64_t gap = at + a->pad - tap * a->dilation;
    return gap <= 0 ? 0 : min64((gap - 1) / a->stride + 1, a->outputs);
}
static int64_t input_at(const axis *a, int64_t output, int64_t tap)
{
    return output * a->stride - a->pad + tap * a->dilation;
}

static inline __attribute__((always_inline)) void copy(real *to, const real *from, int64_t n)
{
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store(to + i, load(from + i));
    if (i == n) return;
    if (n >= LANES) store(to + n - LANES, load(from + n - LANES));
    else
        for (; i < n; i++) to[i] = from[i];
}
static inline __attribute__((always_inline)) void zero(real *to, int64_t n)
{
    for (int64_t i = 0; i < n; i++) to[i] = 0;
}
typedef struct {
    axis h, w;
    int64_t channels, bands, band_rows;
    int64_t inputs; /* elements of `from`, for unfold */
    const real *from;
    real *to;
    int past_cache;
} job;

/* ---- unfold ---- */

/* One row of a column plane: the inputs that tap kw meets, from the input row `from` (NULL: a row of padding). */
static inline void unfold_row(const axis *w, int64_t kw, int64_t lo, int64_t hi, const real *from, real *to)
{
    if (!from) {
        zero(to, w->outputs);
        return;
    }
    zero(to, lo);
    if (w->stride == 1) copy(to + lo, from + input_at(w, lo, kw), hi - lo);
    else if (w->stride == 2)
        for (int64_t o = lo; o < hi; o++) to[o] = from[2 * o - w->pad + kw * w->dilation];
    else
        for (int64_t o = lo; o < hi; o++) to[o] = from[input_at(w, o, kw)];
    zero(to + hi, w->outputs - hi);
}

/* A column plane as wide as the image, at stride 1, is the image moved by some elements, and zeros where that leaves its row
 * or the image. */
static int is_moved(const job *j)
{
    return j->h.stride == 1 && j->w.stride == 1 && j->w.outputs == j->w.inputs && j->w.inputs > 0 &&
           j->w.inputs < INT32_MAX / 2;
}

typedef struct {
    const real *from; /* where element 0 comes from */
    int64_t first, last; /* elements before which and from which on there is none to read */
    int64_t W, top, bottom, lo, hi; /* zeros are before `top` and from `bottom` on, and outside columns [lo, hi) */
    const vint
        *narrow; /* where a row is less than a vector: which elements are in those columns, by the first one's column */
} moved;

/* Which of LANES elements from `column` on lie in columns [lo, hi), in rows of W; `narrow`: of less than LANES. */
static inline vint in_columns(const int narrow, int64_t column, int64_t W, int64_t lo, int64_t hi)
{
    vint at = {0};
    for (int i = 0; i < LANES; i++) at[i] = i;
    at += (ireal)column;
    at -= (at >= (ireal)W) & (ireal)W;
    if (narrow)
        for (int64_t end = column + LANES - W; end > W; end -= W) at -= (at >= (ireal)W) & (ireal)W;
    return (at >= (ireal)lo) & (at < (ireal)hi);
}
/* v from `column` on, zero outside the columns. */
static inline __attribute__((always_inline)) vreal in_row(const moved *m, int64_t column, vreal v)
{
    if (m->narrow) return (vreal)(m->narrow[column] & (vint)v);
    if (column >= m->lo && column + LANES <= m->hi) return v;
    return (vreal)(in_columns(0, column, m->W, m->lo, m->hi) & (vint)v);
}

/* LANES elements from i on, wherever zeros begin. */
static vreal moved_at(const moved *m, int64_t i)
{
    if (i < m->first || i + LANES > m->last) {
        real part[LANES];
        for (int64_t k = 0; k < LANES; k++) {
            int64_t c = (i + k) % m->W;
            part[k] = i + k >= m->top && i + k < m->bottom && c >= m->lo && c < m->hi ? m->from[i + k] : 0;
        }
        return load(part);
    }
    vint above = lanes_before(min64(max64(m->top - i, 0), LANES));
    vint inside = lanes_before(min64(max64(m->bottom - i, 0), LANES));
    return in_row(m, i % m->W, (vreal)(~above & inside & (vint)load(m->from + i)));
}

static inline __attribute__((always_inline)) void unfold_moved(const moved *m, int64_t size, real *to,
                                                               const int past_cache)
{
    int64_t head = min64((int64_t)(-(uintptr_t)to % HL_VLEN / sizeof(real)), size), i = head, W = m->W;
    int64_t low = max64(m->top, m->first), high = min64(m->bottom, m->last), step = W < LANES ? LANES % W : LANES;
    if (head) store_part(to, head, moved_at(m, 0));
    for (; i + LANES <= size; i += LANES) {
        if (i >= low && i + LANES <= high) {
            for (int64_t column = i % W; i + LANES <= high; i += LANES) {
                vreal v = in_row(m, column, load(m->from + i));
                if (past_cache) stream(to + i, v);
                else store(to + i, v);
                column += step;
                if (column >= W) column -= W;
            }
            if (i + LANES > size) break;
        }
        if (past_cache) stream(to + i, moved_at(m, i));
        else store(to + i, moved_at(m, i));
    }
    if (i < size) store_part(to + i, size - i, moved_at(m, i));
}

/* Elements of a plane: with fewer, more is lost on lines that are written in parts, at both ends, than a copy costs. */
enum { SMALL_PLANE = 3072 };

static int unfold_planes(int64_t begin, int64_t end, void *context)
{
    const job *j = context;
    const axis *h = &j->h, *w = &j->w;
    int64_t size = h->outputs * w->outputs;
    int as_moved = is_moved(j), status;
    outflow cols;
    vint *narrow = NULL;
    if (as_moved && w->inputs < LANES) {
        if (!(narrow = hl_take((size_t)(w->taps * w->inputs) * sizeof(vint)))) return HL_NOMEM;
        for (int64_t kw = 0, i = 0; kw < w->taps; kw++)
            for (int64_t column = 0; column < w->inputs; column++, i++)
                narrow[i] = in_columns(1, column, w->inputs, first_output(w, kw, 0), first_output(w, kw, w->inputs));
    }
    const int straight = as_moved && j->past_cache && (size >= SMALL_PLANE || size * (int64_t)sizeof(real) % 64 == 0);
    status = outflow_begin(&cols, j->to + begin * size, as_moved ? size : w->outputs, j->past_cache && !straight);
    for (int64_t i = begin; i < end && status == HL_OK; i++) {
        int64_t kw = i % w->taps, kh = i / w->taps % h->taps, plane = i / w->taps / h->taps * h->inputs * w->inputs;
        int64_t lo = first_output(w, kw, 0), hi = first_output(w, kw, w->inputs);
        if (as_moved) {
            int64_t begins = plane + input_at(h, 0, kh) * w->inputs + input_at(w, 0, kw);
            moved m = {.from = j->from + begins,
                       .first = -begins,
                       .last = j->inputs - begins,
                       .W = w->inputs,
                       .top = first_output(h, kh, 0) * w->inputs,
                       .bottom = first_output(h, kh, h->inputs) * w->inputs,
                       .lo = lo,
                       .hi = hi,
                       .narrow = narrow ? narrow + kw * w->inputs : NULL};
            straight ? unfold_moved(&m, size, j->to + i * size, 1) : unfold_moved(&m, size, outflow_place(&cols), 0);
            if (!straight) outflow_added(&cols, size);
            continue;
        }
        hi = max64(hi, lo);
        for (int64_t o = 0; o < h->outputs; o++) {
            int64_t at = input_at(h, o, kh);
            const real *from = at >= 0 && at < h->inputs ? j->from + plane + at * w->inputs : NULL;
            unfold_row(w, kw, lo, hi, from, outflow_place(&cols));
            outflow_added(&cols, w->outputs);
        }
    }
    outflow_end(&cols);
    hl_give(narrow);
    if (straight) stream_end();
    return status;
}

/* Parallel over planes (image, channel, tap), which are contiguous.
 * Row by row of a plane: reads and writes run along W; the taps of a channel find its image in the cache.
 * An output is written once, an input read KH*KW times from cache.
 * Source: Chellapilla et al., High performance convolutional neural networks for document processing (2006). */
int HL(unfold)(const hl_unfold_plan *p, const real *x, real *cols)
{
    int64_t planes = p->N * p->C * p->KH * p->KW, size = p->OH * p->OW;
    job j = {.h = {p->OH, p->H, p->KH, p->stride_h, p->pad_h, p->dilation_h},
             .w = {p->OW, p->W, p->KW, p->stride_w, p->pad_w, p->dilation_w},
             .inputs = p->N * p->C * p->H * p->W,
             .from = x,
             .to = cols,
             .past_cache = planes * size > CACHE_BYTES / (int64_t)sizeof(real)};
    return hl_parallel_for(planes, hl_grain((double)size), unfold_planes, &j);
}

/* ---- fold ---- */

/* to[o * stride] += from[o] for the outputs of a row. */
static inline void add_row(const real *from, real *to, int64_t n, int64_t stride)
{
    if (stride == 1) {
        const int64_t ahead = hl_ahead;
        int64_t i = 0;
        for (; i + LANES <= n; i += LANES) {
            fetch(from + i, ahead);
            store(to + i, load(to + i) + load(from + i));
        }
        for (; i < n; i++) to[i] += from[i];
    } else if (stride == 2)
        for (int64_t i = 0; i < n; i++) to[2 * i] += from[i];
    else
        for (int64_t i = 0; i < n; i++) to[i * stride] += from[i];
}

/* Rows [top, bottom) of an image, which are zero, whose column planes are as wide: each plane is added where it lies once it is
 * moved. */
static inline __attribute__((always_inline)) void fold_moved(const job *j, const int narrow, int64_t plane, int64_t top,
                                                             int64_t bottom)
{
    const axis *h = &j->h, *w = &j->w;
    int64_t W = w->inputs, size = h->outputs * W, step = narrow ? LANES % W : LANES;
    const int64_t ahead = hl_ahead;
    real *image = j->to + plane * h->inputs * W;
    for (int64_t tap = 0; tap < h->taps * w->taps; tap++) {
        const real *from = j->from + (plane * h->taps * w->taps + tap) * size;
        int64_t right = input_at(w, 0, tap % w->taps), move = input_at(h, 0, tap / w->taps) * W + right;
        int64_t lo = max64(right, 0), hi = min64(W + right, W);
        if (lo >= hi) continue;
        int64_t q = max64(top * W, move), end = min64(bottom * W, size + move), column = q % W;
        for (; q + LANES <= end; q += LANES) {
            fetch(from + q - move, ahead);
            vreal v = load(from + q - move);
            if (narrow ? lo > 0 || hi < W : column < lo || column + LANES > hi)
                v = (vreal)(in_columns(narrow, column, W, lo, hi) & (vint)v);
            store(image + q, load(image + q) + v);
            column += step;
            if (column >= W) column -= W;
        }
        for (; q < end; q++, column++) {
            if (column == W) column = 0;
            if (column >= lo && column < hi) image[q] += from[q - move];
        }
    }
}

static int fold_bands(int64_t begin, int64_t end, void *context)
{
    const job *j = context;
    const axis *h = &j->h, *w = &j->w;
    int as_moved = is_moved(j);
    for (int64_t i = begin; i < end; i++) {
        int64_t plane = i / j->bands, top = i % j->bands * j->band_rows, bottom = min64(top + j->band_rows, h->inputs);
        real *image = j->to + plane * h->inputs * w->inputs;
        zero(image + top * w->inputs, (bottom - top) * w->inputs);
        if (as_moved) {
            w->inputs < LANES ? fold_moved(j, 1, plane, top, bottom) : fold_moved(j, 0, plane, top, bottom);
            continue;
        }
        for (int64_t kh = 0; kh < h->taps; kh++) {
            int64_t first = first_output(h, kh, top), last = first_output(h, kh, bottom);
            for (int64_t kw = 0; kw < w->taps; kw++) {
                const real *from = j->from + ((plane * h->taps + kh) * w->taps + kw) * h->outputs * w->outputs;
                int64_t lo = first_output(w, kw, 0), hi = first_output(w, kw, w->inputs);
                if (lo >= hi) continue;
                real *to = image + input_at(w, lo, kw);
                for (int64_t o = first; o < last; o++)
                    add_row(from + o * w->outputs + lo, to + input_at(h, o, kh) * w->inputs, hi - lo, w->stride);
            }
        }
    }
    return HL_OK;
}

/* The rows of an image that stay in the second cache while all taps add to them. */
static void cut_bands(job *j)
{
    int64_t rows = max64(32768 / max64(j->w.inputs, 1), 1);
    j->bands = max64((j->h.inputs + rows - 1) / rows, 1);
    j->band_rows = (j->h.inputs + j->bands - 1) / j->bands;
}

/* Parallel over bands of rows of each channel's image.
 * Tap by tap: the columns stream through once along W, the band stays in cache.
 * A column element is read once, an output read and written KH*KW times in cache, in the order of the taps.
 * Source: as unfold, whose adjoint it is. */
int HL(fold)(const hl_fold_plan *p, const real *cols, real *x)
{
    job j = {.h = {p->OH, p->H, p->KH, p->stride_h, p->pad_h, p->dilation_h},
             .w = {p->OW, p->W, p->KW, p->stride_w, p->pad_w, p->dilation_w},
             .from = cols,
             .to = x};
    cut_bands(&j);
    int64_t n = p->N * p->C * j.bands;
    double work = (double)(p->KH * p->KW) * (double)(p->OH * p->OW) / (double)j.bands;
    return hl_parallel_for(n, hl_grain(work), fold_bands, &j);
}

/* ---- im2col ---- */

/* The patch of one window, by channel, row and column. */
static inline __attribute__((always_inline)) void patch(const job *j, const real *image, int64_t top, int64_t left,
                                                        const int64_t taps, real *to)
{
    const axis *h = &j->h, *w = &j->w;
    int inside = left >= 0 && left + (taps - 1) * w->dilation < w->inputs;
    for (int64_t c = 0; c < j->channels; c++, image += h->inputs * w->inputs)
        for (int64_t kh = 0; kh < h->taps; kh++, to += taps) {
            int64_t row = top + kh * h->dilation;
            if (row < 0 || row >= h->inputs) zero(to, taps);
            else if (inside) {
                const real *from = image + row * w->inputs + left;
                for (int64_t kw = 0; kw < taps; kw++) to[kw] = from[kw * w->dilation];
            } else
                for (int64_t kw = 0; kw < taps; kw++) {
                    int64_t column = left + kw * w->dilation;
                    to[kw] = column >= 0 && column < w->inputs ? image[row * w->inputs + column] : 0;
                }
        }
}

static int im2col_rows(int64_t begin, int64_t end, void *context)
{
    const job *j = context;
    const axis *h = &j->h, *w = &j->w;
    int64_t size = j->channels * h->taps * w->taps;
    outflow cols;
    int status = outflow_begin(&cols, j->to + begin * w->outputs * size, size, j->past_cache);
    for (int64_t i = begin; i < end && status == HL_OK; i++) {
        const real *image = j->from + i / h->outputs * j->channels * h->inputs * w->inputs;
        int64_t top = input_at(h, i % h->outputs, 0);
        for (int64_t o = 0; o < w->outputs; o++) {
            real *to = outflow_place(&cols);
            int64_t left = input_at(w, o, 0);
            switch (w->taps) { /* known to the compiler, the usual ones need no loop */
            case 1: patch(j, image, top, left, 1, to); break;
            case 3: patch(j, image, top, left, 3, to); break;
            case 5: patch(j, image, top, left, 5, to); break;
            default: patch(j, image, top, left, w->taps, to);
            }
            outflow_added(&cols, size);
        }
    }
    outflow_end(&cols);
    return status;
}

/* Parallel over rows of windows.
 * Window by window: writes run along memory; neighbouring windows find the rows of all channels in the cache.
 * An output is written once, an input read KH*KW times from cache.
 * Source: as unfold. */
int HL(im2col)(const hl_im2col_plan *p, const real *x, real *cols)
{
    int64_t n = p->N * p->OH, size = p->OW * p->C * p->KH * p->KW;
    job j = {.h = {p->OH, p->H, p->KH, p->stride_h, p->pad_h, p->dilation_h},
             .w = {p->OW, p->W, p->KW, p->stride_w, p->pad_w, p->dilation_w},
             .channels = p->C,
             .from = x,
             .to = cols,
             .past_cache = n * size > CACHE_BYTES / (int64_t)sizeof(real)};
    return hl_parallel_for(n, hl_grain((double)size), im2col_rows, &j);
}

/* ---- col2im ---- */

enum { CHANNELS = 8 }; /* added to together: their part of a patch is a few whole cache lines */

/* Adds `channels` patches of one window, [channels, KH, taps], to the rows [top, bottom) of their images. */
static inline __attribute__((always_inline)) void add_patch(const job *j, const real *from, int64_t channels,
                                                            int64_t oh, int64_t left, int64_t top, int64_t bottom,
                                                            const int64_t taps, real *to)
{
    const axis *h = &j->h, *w = &j->w;
    int inside = left >= 0 && left + (taps - 1) * w->dilation < w->inputs;
    for (int64_t k = 0; k < channels; k++, to += h->inputs * w->inputs)
        for (int64_t kh = 0; kh < h->taps; kh++, from += taps) {
            int64_t row = input_at(h, oh, kh);
            if (row < top || row >= bottom) continue;
            if (inside) {
                real *line = to + row * w->inputs + left;
                for (int64_t kw = 0; kw < taps; kw++) line[kw * w->dilation] += from[kw];
            } else
                for (int64_t kw = 0; kw < taps; kw++) {
                    int64_t column = left + kw * w->dilation;
                    if (column >= 0 && column < w->inputs) to[row * w->inputs + column] += from[kw];
                }
        }
}

static int col2im_bands(int64_t begin, int64_t end, void *context)
{
    const job *j = context;
    const axis *h = &j->h, *w = &j->w;
    int64_t blocks = (j->channels + CHANNELS - 1) / CHANNELS, taps = h->taps * w->taps, image = h->inputs * w->inputs;
    for (int64_t i = begin; i < end; i++) {
        int64_t top = i % j->bands * j->band_rows, bottom = min64(top + j->band_rows, h->inputs);
        int64_t c = i / j->bands % blocks * CHANNELS, n = i / j->bands / blocks,
                channels = min64(CHANNELS, j->channels - c);
        real *to = j->to + (n * j->channels + c) * image;
        for (int64_t k = 0; k < channels; k++) zero(to + k * image + top * w->inputs, (bottom - top) * w->inputs);
        int64_t first = first_output(h, h->taps - 1, top), last = first_output(h, 0, bottom);
        for (int64_t oh = first; oh < last; oh++)
            for (int64_t ow = 0; ow < w->outputs; ow++) {
                const real *from = j->from + (((n * h->outputs + oh) * w->outputs + ow) * j->channels + c) * taps;
                int64_t left = input_at(w, ow, 0);
                switch (w->taps) { /* as in im2col */
                case 1: add_patch(j, from, channels, oh, left, top, bottom, 1, to); break;
                case 3: add_patch(j, from, channels, oh, left, top, bottom, 3, to); break;
                case 5: add_patch(j, from, channels, oh, left, top, bottom, 5, to); break;
                default: add_patch(j, from, channels, oh, left, top, bottom, w->taps, to);
                }
            }
    }
    return HL_OK;
}

/* Parallel over bands of rows of the images of a few channels.
 * Window by window: the patches stream through once, the band stays in cache.
 * A patch element is read once, an output read and written KH*KW times in cache, in the order of the windows.
 * Source: as unfold. */
int HL(col2im)(const hl_col2im_plan *p, const real *cols, real *x)
{
    job j = {.h = {p->OH, p->H, p->KH, p->stride_h, p->pad_h, p->dilation_h},
             .w = {p->OW, p->W, p->KW, p->stride_w, p->pad_w, p->dilation_w},
             .channels = p->C,
             .from = cols,
             .to = x};
    cut_bands(&j);
    int64_t n = p->N * ((p->C + CHANNELS - 1) / CHANNELS) * j.bands;
    double work = (double)(CHANNELS * p->KH * p->KW) * (double)(p->OH * p->OW) / (double)j.bands;
    return hl_parallel_for(n, hl_grain(work), col2im_bands, &j);
}
