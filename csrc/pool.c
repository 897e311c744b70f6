/* Pooling over three spatial axes: a missing axis has the size 1, the channels of all images are the planes M.
 *
 * One idea carries the forward kernels: the windows of one row of outputs take the same lines of the input. Those lines
 * are first reduced to one line, whole vectors at a time, and that line then across, tap by tap. With a stride of 2 the
 * line is kept as its even and its odd elements, so that both steps load whole vectors. A window of K taps costs about
 * 2 K^(1/2) operations, not K. With strides of 3 to 5 a vector of outputs is picked from as many vectors of
 * the line, with larger ones outputs go across one by one. Rows are reduced some at a time before any goes across: a vector that
 * is taken from between two that were stored waits for them. Rows of small maps stay in registers (short_rows.h). */
#include "simd.h"
#if defined(__SSE2__)
#include <immintrin.h>
#endif

/* How windows lie over the axes D, H, W. */
typedef struct {
    int64_t size[3], out[3], kernel[3], stride[3], pad[3], after[3], dilation[3];
    int shared; /* the windows share each axis out: kernel is only the largest number of taps */
} windows;

/* The taps of a window along one axis that lie inside: the number of the first, how many, and where the first lies. */
typedef struct { int64_t first, count, at; } taps;

static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

static taps taps_of(const windows *w, int axis, int64_t o)
{
    int64_t size = w->size[axis], d = w->dilation[axis];
    if (w->shared) {
        int64_t at = o * size / w->out[axis];
        return (taps){0, ceil_div((o + 1) * size, w->out[axis]) - at, at};
    }
    int64_t start = o * w->stride[axis] - w->pad[axis], room = size - 1 - start;
    int64_t first = start >= 0 ? 0 : d == 1 ? -start : ceil_div(-start, d);
    int64_t last = min64(w->kernel[axis] - 1, d == 1 ? room : room / d);
    return (taps){first, last - first + 1, start + first * d};
}

/* The windows of an adaptive pooling: equal ones without overlap where the sizes divide, else some reach the next one's first
 * element; the kernel is as large as the largest. */
static windows share_out(const int64_t size[3], const int64_t out[3])
{
    windows w = {.shared = 0};
    for (int a = 0; a < 3; a++) w.shared |= size[a] % out[a] != 0;
    for (int a = 0; a < 3; a++) {
        w.size[a] = size[a];
        w.out[a] = out[a];
        w.kernel[a] = size[a] / out[a];
        w.dilation[a] = 1;
        for (int64_t o = 0; w.shared && o < out[a]; o++) w.kernel[a] = max64(w.kernel[a], taps_of(&w, a, o).count);
        w.stride[a] = w.kernel[a];
    }
    return w;
}

#define KERNEL(p) \
    .size = {p->D, p->H, p->W}, .out = {p->OD, p->OH, p->OW}, .kernel = {p->kernel_d, p->kernel_h, p->kernel_w}, \
    .stride = {p->stride_d, p->stride_h, p->stride_w}, .dilation = {p->dilation_d, p->dilation_h, p->dilation_w}
#define BEFORE(p) .pad = {p->pad_front, p->pad_top, p->pad_left}
#define AFTER(p) .after = {p->pad_back, p->pad_bottom, p->pad_right}

static int64_t volume(const int64_t n[3]) { return n[0] * n[1] * n[2]; }

/* ---- one row of outputs ---- */

/* Where a row of outputs lies; rows come in order, and counting them is cheaper than dividing. */
typedef struct { int64_t plane, od, oh; } row_place;

static row_place row_at(const windows *w, int64_t r)
{
    return (row_place){r / w->out[1] / w->out[0], r / w->out[1] % w->out[0], r % w->out[1]};
}

static void next_rows(const windows *w, row_place *p, int64_t n)
{
    p->oh += n;
    if (p->oh < w->out[1]) return;
    int64_t slices = 1, left = p->oh - w->out[1];
    if (left >= w->out[1]) slices += left / w->out[1], left %= w->out[1];
    p->oh = left;
    p->od += slices;
    if (p->od < w->out[0]) return;
    p->plane += w->out[0] == 1 ? p->od : p->od / w->out[0];
    p->od = w->out[0] == 1 ? 0 : p->od % w->out[0];
}

/* The lines of the input that the windows of a row of outputs take. */
typedef struct {
    const real *first, *end; /* the first line; what lies behind the whole input */
    taps d, h;
    int64_t step_d, step_h; /* from line to line */
    int64_t ahead; /* in bytes, what to fetch where each line is read once; 0: nothing */
} lines;

/* Lane at[i] of one or two vectors, counted through both. Other instruction sets pick lane by lane. */
#if defined(__AVX2__) && !defined(__clang__)
enum { CAN_PICK = 1 };
static inline __attribute__((always_inline)) vreal pick(const int vectors, const vreal *v, vint at)
{
    return vectors == 1 ? __builtin_shuffle(v[0], at) : __builtin_shuffle(v[0], v[1], at);
}
#else
enum { CAN_PICK = 0 };
static inline vreal pick(int vectors, const vreal *v, vint at) { return vectors == 1 ? v[0] : v[1] + (vreal)at; }
#endif

/* The reduced lines of some rows. Where they are padded, tap k of output o stands at o * stride + k * dilation; with a stride
 * of 2 even and odd elements are apart. Elsewhere taps[2] has the taps of every output. In a maximum with places, the ids (the
 * number of the line's first tap) lie behind the elements. */
typedef struct {
    void *block;
    int64_t rows, pitch; /* rows that are reduced together; from anything of one to that of the next */
    int padded, split, seamless;
    int64_t before, reach, ids; /* elements of padding; elements that outputs read; from an element to its id */
    int64_t apart; /* from an output's elements to the next one's, in the part that they are read from */
    vint *turns; /* where these are 3 or more apart, how they come together (elements_at) */
    real *part[2];
    ireal *id; /* of the outputs: the number of the largest tap */
    int64_t *tap; /* where the taps of the first output stand, from part[0] on */
    taps *taps[3]; /* of every output along each axis */
} row_space;

/* A window may be far larger than the input: most of its taps are none. */
static int is_padded(const windows *w)
{
    return !w->shared && (w->kernel[2] - 1) * w->dilation[2] + 1 <= 2 * w->size[2] + LANES;
}

/* Do the rows of a slice's windows, side by side, cover it, so that the next slice's go on at the same distance? */
static int is_seamless(const windows *w)
{
    return !w->shared && w->size[0] == w->out[0] && w->kernel[0] == 1 && w->size[1] == w->out[1] * w->stride[1] &&
           (w->kernel[1] - 1) * w->dilation[1] < w->stride[1] && !(w->pad[0] | w->pad[1]);
}

/* Up to so many elements apart, whole vectors of outputs are picked from as many vectors. */
enum { MOST_APART = 5 };

/* The elements of LANES outputs, of which x is the first: each turn picks those that lie in one vector more. */
static inline __attribute__((always_inline)) vreal elements_at(const int apart, const row_space *s, const real *x)
{
    vreal v[2] = {load(x)};
#pragma GCC unroll 4
    for (int k = 1; k < apart; k++) {
        v[1] = load(x + k * LANES);
        v[0] = pick(2, v, s->turns[k - 1]);
    }
    return v[0];
}
static void fill_turns(const row_space *s)
{
    for (int64_t k = 1; k < s->apart; k++)
        for (int64_t lane = 0; lane < LANES; lane++) {
            int64_t at = lane * s->apart, vector = at / LANES;
            s->turns[k - 1][lane] = (ireal)(vector == k ? LANES + at % LANES : vector == 0 && k == 1 ? at : lane);
        }
}

/* Elements of the rows that are reduced together, and how many rows they are at most. */
enum { TOGETHER = 384, MOST_ROWS = 16 };

enum { MAXIMUM, PLACES, SUM, SQUARES, POWERS };

/* At most PIECE vectors of a line are reduced together, no more than stay in registers. A tap in the padding
 * has a number above all others. */
enum { PIECE = HL_REGISTERS == 32 ? 8 : 14, NO_TAP = INT32_MAX / 2 };
/* How many: enough for additions that do not wait. Maxima, their places and what tells a NaN take registers, too. */
static inline int piece_of(int kind) { return HL_REGISTERS == 16 && kind == PLACES ? 4 : 8; }

static inline __attribute__((always_inline)) vreal identity(int kind)
{
    return splat((real)(kind <= PLACES ? -INFINITY : 0));
}

static inline __attribute__((always_inline)) vreal combined(int kind, vreal a, vreal b)
{
    return kind <= PLACES ? vmax(a, b) : a + b;
}

/* Elements [from, to) of the padded line. */
static inline __attribute__((always_inline)) void fill(int kind, const row_space *s, int64_t from, int64_t to)
{
    for (int k = 0; k <= s->split; k++) {
        int64_t first = s->split ? (from - k + 1) / 2 : from, last = s->split ? (to - k + 1) / 2 : to;
        for (int64_t i = first; i < last; i += LANES) {
            store(s->part[k] + i, identity(kind));
            if (kind == PLACES) store(s->part[k] + s->ids + i, (vreal)((vint){0} + NO_TAP));
        }
    }
}

/* Where element i of the padded line stands. */
static inline __attribute__((always_inline)) real *element(const row_space *s, int64_t i)
{
    return s->split ? s->part[i & 1] + (i >> 1) : s->part[0] + i;
}

static inline __attribute__((always_inline)) void next_row(row_space *s)
{
    s->part[0] += s->pitch;
    s->part[1] += s->pitch;
    s->id += s->pitch;
}

/* Whether outputs go across in whole vectors, but not side by side. */
static int is_picked(const row_space *s, int64_t outputs)
{
    return CAN_PICK && s->padded && s->apart > 2 && s->apart <= MOST_APART && outputs > 4;
}

static int take_rows(int kind, row_space *s, const windows *w)
{
    int64_t W = w->size[2], OW = w->out[2], K = w->kernel[2], stride = w->stride[2],
            span = (K - 1) * w->dilation[2] + 1;
    s->padded = is_padded(w);
    s->split = s->padded && stride == 2;
    s->apart = s->split ? 1 : stride;
    s->seamless = is_seamless(w);
    s->before = s->padded ? w->pad[2] : 0;
    s->reach = s->padded ? (OW - 1) * stride + span : 0;
    int64_t part = round_up(max64(s->before + W, s->reach), LANES) + (PIECE + 1) * LANES, outs = round_up(OW, LANES);
    s->rows = max64(min64(TOGETHER / (W + 1), MOST_ROWS), 2);
    s->ids = 2 * part;
    s->pitch = 4 * part + outs;
    const int picks = is_picked(s, OW);
    size_t turns = (size_t)(picks ? s->apart : 0) * sizeof(vint);
    size_t bytes = (size_t)(s->rows * s->pitch) * sizeof(real), offsets = (size_t)(s->padded ? K : 0) * sizeof(int64_t);
    s->block = hl_take(turns + bytes + offsets + (size_t)(w->out[0] + w->out[1] + OW) * sizeof(taps));
    if (!s->block) return HL_NOMEM;
    s->turns = s->block;
    if (picks) fill_turns(s);
    s->part[0] = (real *)((char *)s->block + turns);
    s->part[1] = s->part[0] + part;
    s->id = (ireal *)(s->part[0] + 4 * part);
    s->tap = (int64_t *)((char *)s->part[0] + bytes);
    for (int64_t k = 0; k < K && s->padded; k++) s->tap[k] = element(s, k * w->dilation[2]) - s->part[0];
    taps *t = (taps *)((char *)s->tap + offsets);
    for (int axis = 0; axis < 3; axis++) {
        s->taps[axis] = t;
        for (int64_t o = 0; o < w->out[axis]; o++) *t++ = taps_of(w, axis, o);
    }
    row_space row = *s;
    for (int64_t r = 0; r < s->rows; r++, next_row(&row)) fill(kind, &row, 0, s->before);
    return HL_OK;
}

static inline const real *last_line(const lines *l)
{
    return l->first + (l->d.count - 1) * l->step_d + (l->h.count - 1) * l->step_h;
}

/* Where nothing is fetched of what is near, what does not stay in the last cache is: two lines at a time are too few for the
 * processor to be far enough ahead by itself. From inputs of 16 MiB on, as measured on Zen 4 with 32 MiB for two cores. */
enum { LAST_CACHE = (16 << 20) / (int)sizeof(real), FAR_AHEAD = 8192 };

static inline lines lines_of(const windows *w, const row_space *s, const real *x, int64_t M, const row_place *p)
{
    int64_t H = w->size[1], W = w->size[2], inside = w->size[0] * H * W;
    lines l = {.end = x + M * inside, .d = s->taps[0][p->od], .h = s->taps[1][p->oh]};
    l.first = x + p->plane * inside + (l.d.at * H + l.h.at) * W;
    l.step_d = w->dilation[0] * H * W;
    l.step_h = w->dilation[1] * W;
    l.ahead = hl_ahead || M * inside <= LAST_CACHE ? hl_ahead : FAR_AHEAD;
    return l;
}

static inline __attribute__((always_inline)) vreal power(vreal x, int64_t n)
{
    vreal y = x;
    for (int64_t i = 1; i < n; i++) y *= x;
    return y;
}

/* LANES elements of a line, of which those behind `end` are 0. */
static inline __attribute__((always_inline)) vreal load_before(const real *p, const real *end, int whole)
{
    if (whole || end - p >= LANES) return load(p);
    return end > p ? load_part(p, end - p, (real)0) : splat((real)0);
}

/* n vectors of the lines from column i on, reduced, and the ids of their maxima; n is even. `check` becomes NaN where an
 * element is. What lies `ahead` is fetched; callers pass a constant 0 for nothing, as the branch would cost a tenth. */
static inline __attribute__((always_inline)) void down(int kind, int64_t norm, const windows *w, const lines *l,
                                                       int64_t i, int n, int whole, const int64_t ahead, vreal v[PIECE],
                                                       vint id[PIECE], vreal check[2])
{
    ireal line = (ireal)((l->d.first * w->kernel[1] + l->h.first) * w->kernel[2]);
    for (int k = 0; k < n; k++) {
        v[k] = identity(kind);
        id[k] = (vint){0} + line;
    }
    for (int64_t d = 0; d < l->d.count; d++)
        for (int64_t h = 0; h < l->h.count; h++) {
            const real *x = l->first + d * l->step_d + h * l->step_h + i;
            line = (ireal)(((l->d.first + d) * w->kernel[1] + l->h.first + h) * w->kernel[2]);
            /* Kept in a register: the compiler would splat it anew for each vector. */
            vint number = (vint)kept((vreal)((vint){0} + line));
            for (int k = 0; k < n; k++) {
                fetch(x + k * LANES, ahead);
                vreal a = kept(load_before(x + k * LANES, l->end, whole));
                if (kind == PLACES) {
                    vint larger = a > v[k];
                    id[k] = (larger & number) | (~larger & id[k]);
                }
                if (kind <= PLACES) check[k & 1] += a;
                v[k] = combined(kind, v[k], kind == SQUARES ? a * a : kind == POWERS ? power(a, norm) : a);
            }
        }
}

/* Puts n vectors of the reduced line where they belong. */
static inline __attribute__((always_inline)) void keep_reduced(int kind, const row_space *s, int64_t i, int n,
                                                               const vreal v[PIECE], const vint id[PIECE])
{
    real *even = element(s, s->before + i), *odd = s->split ? element(s, s->before + i + 1) : even + LANES;
    for (int k = 0; k < n; k += 2, even += s->split ? LANES : 2 * LANES, odd += s->split ? LANES : 2 * LANES) {
        store(even, s->split ? evens(v[k], v[k + 1]) : v[k]);
        store(odd, s->split ? odds(v[k], v[k + 1]) : v[k + 1]);
        if (kind != PLACES) continue;
        vreal a = (vreal)id[k], b = (vreal)id[k + 1];
        store(even + s->ids, s->split ? evens(a, b) : a);
        store(odd + s->ids, s->split ? odds(a, b) : b);
    }
}

/* Reduces the lines of each of n rows to one. Of a maximum, the result holds a NaN where one may be among the elements. */
static inline __attribute__((always_inline)) vreal reduce_ahead(int kind, int64_t norm, const windows *w, lines l,
                                                                row_space s, int64_t n, const int64_t ahead)
{
    int64_t W = w->size[2], left = l.end - last_line(&l), down_to_next = w->stride[1] * W;
    const int piece = piece_of(kind);
    vreal check[2] = {splat((real)0), splat((real)0)}, v[PIECE];
    vint id[PIECE];
    for (int64_t r = 0; r < n; r++, l.first += down_to_next, left -= down_to_next, next_row(&s)) {
        for (int64_t i = 0; i < W;) {
            int64_t rest = W - i, room = left - i;
#define REDUCE(vectors, whole) \
    do { \
        down(kind, norm, w, &l, i, vectors, whole, ahead, v, id, check); \
        keep_reduced(kind, &s, i, vectors, v, id); \
        i += (vectors) * LANES; \
    } while (0)
            if (PIECE > 8 && kind >= SUM && rest > (PIECE - 2) * LANES && room >= PIECE * LANES) REDUCE(PIECE, 1);
            else if (rest > piece / 2 * LANES && room >= piece * LANES) REDUCE(piece, 1);
            else if (rest > 2 * LANES && room >= piece / 2 * LANES) REDUCE(piece / 2, 1);
            else if (room >= 2 * LANES) REDUCE(2, 1);
            else REDUCE(2, 0);
        }
        fill(kind, &s, s.before + W, s.reach);
    }
    return check[0] + check[1];
}
/* In a function of its own: beside it the compiler makes less of the loop that fetches nothing. */
static __attribute__((noinline)) vreal reduce_fetching(int kind, int64_t norm, const windows *w, const lines *l,
                                                       const row_space *s, int64_t n)
{
    switch (kind) {
    case MAXIMUM: return reduce_ahead(MAXIMUM, norm, w, *l, *s, n, hl_ahead);
    case PLACES: return reduce_ahead(PLACES, norm, w, *l, *s, n, hl_ahead);
    case SUM: return reduce_ahead(SUM, norm, w, *l, *s, n, hl_ahead);
    case SQUARES: return reduce_ahead(SQUARES, norm, w, *l, *s, n, hl_ahead);
    default: return reduce_ahead(POWERS, norm, w, *l, *s, n, hl_ahead);
    }
}
static inline __attribute__((always_inline)) vreal reduce_down(int kind, int64_t norm, const windows *w, const lines *l,
                                                               const row_space *s, int64_t n)
{
    return hl_ahead ? reduce_fetching(kind, norm, w, l, s, n) : reduce_ahead(kind, norm, w, *l, *s, n, 0);
}

/* Stores the first n lanes; the others too where they stay before `limit`: they belong to outputs that come later. */
static inline __attribute__((always_inline)) void put(real *p, vreal v, int64_t n, const real *limit)
{
    if (n >= LANES || limit - p >= LANES) store(p, v);
    else store_part(p, n, v);
}

/* Windows two columns wide that lie side by side need no reduced line: their outputs come from the lines at once. */
static int side_by_side(const windows *w)
{
    return !w->shared && w->kernel[2] == 2 && w->stride[2] == 2 && w->dilation[2] == 1 && w->pad[2] == 0 &&
           2 * w->out[2] <= w->size[2];
}

/* How many rows of outputs from p on, at most n, have their lines at one distance, all inside of the slice; at least 1. */
static int64_t run_of_rows(const windows *w, const row_space *s, const row_place *p, int64_t n)
{
    if (s->seamless) return n;
    n = w->shared ? 1 : min64(n, w->out[1] - p->oh);
    while (n > 1 && (s->taps[1][p->oh].count < w->kernel[1] || s->taps[1][p->oh + n - 1].count < w->kernel[1])) n--;
    return n;
}

/* LANES outputs, from the lines' columns from i on, and the numbers of their largest taps. */
static inline __attribute__((always_inline)) vreal pairs(int kind, const windows *w, const lines *l, int64_t i,
                                                         int whole, const int64_t ahead, vint *tap, vreal check[2])
{
    vreal v[PIECE];
    vint id[PIECE];
    down(kind, 1, w, l, i, 2, whole, ahead, v, id, check);
    vreal even = evens(v[0], v[1]), odd = odds(v[0], v[1]);
    if (kind == PLACES) {
        vint a = (vint)evens((vreal)id[0], (vreal)id[1]), b = (vint)odds((vreal)id[0], (vreal)id[1]) + 1;
        vint right = (odd > even) | ((odd == even) & (b < a));
        *tap = (right & b) | (~right & a);
    }
    return combined(kind, even, odd);
}

/* The same of just two lines, with the places: all four taps are compared with the largest one. */
static inline __attribute__((always_inline)) vreal squares(const windows *w, const lines *l, int64_t i, int whole,
                                                           const int64_t ahead, vint *tap, vreal check[2])
{
    vreal even[2], odd[2];
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
        const real *x = l->first + h * l->step_h + i;
        fetch(x, ahead);
        fetch(x + LANES, ahead);
        vreal a = kept(load_before(x, l->end, whole)), b = kept(load_before(x + LANES, l->end, whole));
        check[h] += a + b;
        even[h] = evens(a, b);
        odd[h] = odds(a, b);
    }
    vreal best = vmax(vmax(even[0], odd[0]), vmax(even[1], odd[1]));
    vint right = odd[0] == best, id = (even[1] == best) + 3;
    id = (right & 1) | (~right & id);
    *tap = (~(even[0] == best) & id) + (ireal)((l->d.first * w->kernel[1] + l->h.first) * w->kernel[2]);
    return best;
}

/* A window of n taps of the line, which goes on for a vector behind it. */
static inline __attribute__((always_inline)) real reduced(int kind, const real *x, int64_t n, int64_t dilation)
{
    real total = x[0];
    if (dilation == 1 && n >= LANES) {
        vreal v = load(x);
        int64_t k = LANES;
        for (; k + LANES <= n; k += LANES) v = combined(kind, v, load(x + k));
        total = kind <= PLACES ? max_lanes(v) : sum_lanes(v);
        for (; k < n; k++) total = kind > PLACES ? total + x[k] : x[k] > total ? x[k] : total;
        return total;
    }
    for (int64_t k = 1; k < n; k++) {
        real v = x[k * dilation];
        total = kind > PLACES ? total + v : v > total ? v : total;
    }
    return total;
}

/* What the sums of a row are scaled by: times `factor` where that is not 0, over `divisor`, or where outputs differ over
 * divisor * counts. */
typedef struct {
    real factor, divisor;
    const real *counts;
} scaling;

/* Sums of the outputs from i on, scaled. */
static inline __attribute__((always_inline)) vreal scaled(vreal sum, scaling by, int64_t i)
{
    if (by.factor != 0) return sum * splat(by.factor);
    return sum / (by.counts ? splat(by.divisor) * load(by.counts + i) : splat(by.divisor));
}

/* The same of a single one, o. */
static inline __attribute__((always_inline)) real scaled_one(real sum, scaling by, int64_t o)
{
    if (by.factor != 0) return sum * by.factor;
    return sum / (by.counts ? by.divisor * by.counts[o] : by.divisor);
}

/* The first n lanes as bytes; more where `room` elements may be written. */
typedef uint8_t bytes __attribute__((vector_size(LANES)));
static inline __attribute__((always_inline)) bytes narrowed(vint id)
{
#if defined(__SSE2__) && !defined(__AVX512F__) /* the compiler would go lane by lane, through memory */
    __m128i low, high;
    bytes few;
#if defined(__AVX2__)
    low = _mm256_castsi256_si128((__m256i)id), high = _mm256_extracti128_si256((__m256i)id, 1);
#else
    low = high = (__m128i)id;
#endif
    if (!HL_F32) low = high = (__m128i)_mm_shuffle_ps((__m128)low, (__m128)high, 0x88);
    __m128i all = _mm_packs_epi32(low, high);
    all = _mm_packus_epi16(all, all);
    memcpy(&few, &all, sizeof few);
    return few;
#else
    return __builtin_convertvector(id, bytes);
#endif
}
static __attribute__((noinline)) void put_few_bytes(uint8_t *to, const bytes *from, int64_t n)
{
    for (int64_t o = 0; o < n; o++) to[o] = (*from)[o];
}
static inline __attribute__((always_inline)) void put_bytes(uint8_t *to, vint id, int64_t n, int64_t room)
{
    bytes narrow = narrowed(id);
    if (n >= LANES || room >= LANES) memcpy(to, &narrow, LANES);
    else {
        bytes copy = narrow;
        put_few_bytes(to, &copy, n);
    }
}

#include "short_rows.h"

/* ---- maxima ---- */

typedef struct max_job max_job;
struct max_job {
    windows w;
    int64_t M;
    const real *x;
    real *y;
    int64_t *indices;
    uint8_t *offsets;
    /* What makes n rows of outputs from r on, which is at p, in a chunk that ends at `end`; the result holds a NaN where one may
     * be among the elements. */
    vreal (*some)(const max_job *, const row_space *, const row_place *p, int64_t r, int64_t n, int64_t end);
    short_space space;
};

enum { TABLE = 256 };

/* The plane's place of the tap `id` of a window whose tap 0 stands at `start`. */
static int64_t place(const windows *w, int64_t start, int64_t id)
{
    int64_t kw = id % w->kernel[2], rest = id / w->kernel[2], kh = rest % w->kernel[1], kd = rest / w->kernel[1];
    return start + (kd * w->dilation[0] * w->size[1] + kh * w->dilation[1]) * w->size[2] + kw * w->dilation[2];
}

/* Places of all taps of a window at 0, where they are few. */
static void fill_table(const windows *w, int64_t table[TABLE])
{
    int64_t n = volume(w->kernel);
    for (int64_t id = 0; id < n && n <= TABLE; id++) table[id] = place(w, 0, id);
}

static int has_nan(const lines *l, int64_t W)
{
    for (int64_t d = 0; d < l->d.count; d++)
        for (int64_t h = 0; h < l->h.count; h++) {
            const real *x = l->first + d * l->step_d + h * l->step_h;
            int found = 0;
            for (int64_t i = 0; i < W; i++) found |= x[i] != x[i];
            if (found) return 1;
        }
    return 0;
}

/* The plane's place of tap 0 of a row of windows, but for its column. */
static int64_t start_of(const windows *w, const lines *l)
{
    int64_t d = l->d.at - l->d.first * w->dilation[0], h = l->h.at - l->h.first * w->dilation[1];
    return (d * w->size[1] + h) * w->size[2];
}

/* A row of outputs element by element, for rows with a NaN and windows with too many taps for an ireal. */
static void max_row_plain(const max_job *j, const lines *l, const row_space *s, int64_t at)
{
    const windows *w = &j->w;
    int64_t start = start_of(w, l);
    for (int64_t o = 0; o < w->out[2]; o++) {
        taps t = s->taps[2][o];
        real best = 0;
        int64_t id = -1;
        for (int64_t d = 0; d < l->d.count; d++)
            for (int64_t h = 0; h < l->h.count; h++) {
                const real *x = l->first + d * l->step_d + h * l->step_h + t.at;
                for (int64_t k = 0; k < t.count; k++) {
                    real v = x[k * w->dilation[2]];
                    if (id < 0 || v > best || (v != v && best == best)) {
                        best = v;
                        id = ((l->d.first + d) * w->kernel[1] + l->h.first + h) * w->kernel[2] + t.first + k;
                    }
                }
            }
        j->y[at + o] = best;
        if (j->offsets) j->offsets[at + o] = (uint8_t)id;
        if (j->indices) j->indices[at + o] = place(w, start + t.at - t.first * w->dilation[2], id);
    }
}

/* The largest element of n taps of the line, of equal ones the tap with the smallest number. Without branches, which nothing
 * could foretell. */
static inline real largest(const real *x, const ireal *line, int64_t n, int64_t dilation, ireal first, ireal *id)
{
    real best = x[0];
    ireal at = line[0] + first;
    for (int64_t k = 1; k < n; k++) {
        real v = x[k * dilation];
        ireal tap = line[k * dilation] + first + (ireal)k, larger = -(ireal)(v > best), same = -(ireal)(v == best);
        ireal take = larger | (same & -(ireal)(tap < at));
        best = v > best ? v : best;
        at ^= (at ^ tap) & take;
    }
    *id = at;
    return best;
}

/* Where the taps of an output stand; of the first ones in registers. */
enum { FIRST_TAPS = 3 };
typedef struct { int64_t first[FIRST_TAPS], *all; } tap_places;
static inline __attribute__((always_inline)) tap_places find_taps(int64_t K, const row_space *s)
{
    tap_places t = {.all = s->tap};
#pragma GCC unroll 3
    for (int64_t k = 0; k < FIRST_TAPS; k++) t.first[k] = k < K ? s->tap[k] : 0;
    return t;
}
static inline __attribute__((always_inline)) int64_t tap_at(const tap_places *t, int64_t k)
{
    return k < FIRST_TAPS ? t->first[k] : t->all[k];
}

/* Rows of outputs, a vector at a time: the combined elements of all taps first, and of a maximum with places then the smallest
 * number of the taps that equal it. */
static inline __attribute__((always_inline)) void rows_across(const int kind, const int apart, int64_t K,
                                                              const windows *w, row_space s, int64_t n, scaling by,
                                                              real *y, uint8_t *offsets, const real *limit)
{
    const tap_places taps = find_taps(K, &s);
    int64_t OW = w->out[2];
    for (int64_t r = 0; r < n; r++, next_row(&s), y += OW) {
        const real *x = s.part[0];
        for (int64_t i = 0; i < OW; i += LANES, x += LANES * apart) {
            vreal v = elements_at(apart, &s, x);
            for (int64_t k = 1; k < K; k++) v = combined(kind, v, elements_at(apart, &s, x + tap_at(&taps, k)));
            put(y + i, kind < SUM ? v : scaled(v, by, i), OW - i, limit);
            if (kind != PLACES) continue;
            vint id = (vint){0} + NO_TAP;
            for (int64_t k = 0; k < K; k++) {
                const real *at = x + tap_at(&taps, k);
                vint tap = (vint)elements_at(apart, &s, at + s.ids) + (ireal)k;
                vint smaller = (elements_at(apart, &s, at) == v) & (tap < id);
                id = (smaller & tap) | (~smaller & id);
            }
            store((real *)s.id + i, (vreal)id);
            if (offsets) put_bytes(offsets + r * OW + i, id, OW - i, limit - (y + i));
        }
    }
}

/* n rows of outputs from their reduced lines: maxima, with the numbers of their taps, as bytes too, or scaled sums. */
static inline __attribute__((always_inline)) void rows_of(const int kind, const windows *w, const row_space *s,
                                                          int64_t n, scaling by, real *y, uint8_t *offsets,
                                                          const real *limit)
{
    int64_t K = w->kernel[2], OW = w->out[2], d = w->dilation[2];
    const int picks = is_picked(s, OW), side_by_side = s->padded && s->apart <= 2;
#define ACROSS(apart, K) rows_across(kind, apart, K, w, *s, n, by, y, offsets, limit)
    if (picks && s->apart == 3) ACROSS(3, K);
    else if (picks && s->apart == 4) ACROSS(4, K);
    else if (picks) ACROSS(5, K);
    else if (side_by_side && K == 2) ACROSS(1, 2);
    else if (side_by_side && K == 3) ACROSS(1, 3);
    else if (side_by_side) ACROSS(1, K);
    else {
        row_space row = *s;
        for (int64_t r = 0; r < n; r++, next_row(&row), y += OW)
            for (int64_t o = 0; o < OW; o++) {
                taps t = s->padded ? (taps){0, K, o * s->apart} : s->taps[2][o];
                const real *x = row.part[0] + t.at;
                if (kind == PLACES) {
                    y[o] = largest(x, (const ireal *)(x + s->ids), t.count, d, (ireal)t.first, row.id + o);
                    if (offsets) offsets[r * OW + o] = (uint8_t)row.id[o];
                } else if (kind == MAXIMUM) y[o] = reduced(MAXIMUM, x, t.count, d);
                else y[o] = scaled_one(reduced(SUM, x, t.count, d), by, o);
            }
    }
#undef ACROSS
}
static __attribute__((noinline)) void rows_of_maxima(const windows *w, const row_space *s, int64_t n, real *y,
                                                     const real *limit)
{
    rows_of(MAXIMUM, w, s, n, (scaling){0}, y, NULL, limit);
}
static __attribute__((noinline)) void rows_with_places(const windows *w, const row_space *s, int64_t n, real *y,
                                                       uint8_t *offsets, const real *limit)
{
    rows_of(PLACES, w, s, n, (scaling){0}, y, offsets, limit);
}
static __attribute__((noinline)) void rows_of_sums(const windows *w, const row_space *s, int64_t n, scaling by, real *y,
                                                   const real *limit)
{
    rows_of(SUM, w, s, n, by, y, NULL, limit);
}

/* n rows of outputs of windows side by side, and the numbers of their taps as bytes; the result is that of reduce_down. */
static inline __attribute__((always_inline)) vreal pairs_ahead(int kind, windows w, lines l, int64_t n,
                                                               const int64_t ahead, ireal *id, int64_t id_step, real *y,
                                                               uint8_t *offsets, const real *limit)
{
    vreal check[2] = {splat((real)0), splat((real)0)};
    int64_t OW = w.out[2];
    const int two = l.d.count == 1 && l.h.count == 2;
    for (int64_t r = 0; r < n; r++, l.first += w.stride[1] * w.size[2], y += OW, id += id_step) {
        int64_t whole = l.end - last_line(&l) - 2 * LANES;
        for (int64_t o = 0; o < OW; o += LANES) {
            vint tap;
            vreal v = kind == PLACES && two ? squares(&w, &l, 2 * o, 2 * o <= whole, ahead, &tap, check)
                                            : pairs(kind, &w, &l, 2 * o, 2 * o <= whole, ahead, &tap, check);
            put(y + o, v, OW - o, limit);
            if (kind != PLACES) continue;
            store((real *)id + o, (vreal)tap);
            if (offsets) put_bytes(offsets + r * OW + o, tap, OW - o, limit - (y + o));
        }
    }
    return check[0] + check[1];
}
static inline __attribute__((always_inline)) vreal max_pairs(int kind, const windows *w, const lines *l, int64_t n,
                                                             ireal *id, int64_t id_step, real *y, uint8_t *offsets,
                                                             const real *limit)
{
    return l->ahead ? pairs_ahead(kind, *w, *l, n, l->ahead, id, id_step, y, offsets, limit)
                    : pairs_ahead(kind, *w, *l, n, 0, id, id_step, y, offsets, limit);
}

/* The planes' places of a row of taps. */
static void put_indices(const windows *w, const lines *l, const row_space *s, const int64_t *table, int64_t *indices)
{
    int64_t start = start_of(w, l);
    for (int64_t o = 0; o < w->out[2]; o++) {
        int64_t first = start + s->taps[2][o].at - s->taps[2][o].first * w->dilation[2];
        indices[o] = table ? first + table[s->id[o]] : place(w, first, s->id[o]);
    }
}

static int with_places(const max_job *j) { return j->indices || j->offsets; }
/* The numbers of the taps fit in an ireal. */
static int fits(const max_job *j) { return !with_places(j) || volume(j->w.kernel) < NO_TAP; }

/* What is left of n rows from r on, which is at p: the indices, and rows with a NaN. */
static __attribute__((noinline)) void finish_maxima(const max_job *j, row_space s, row_place p, int64_t r, int64_t n,
                                                    int doubtful, const int64_t *table)
{
    const windows *w = &j->w;
    int64_t OW = w->out[2];
    for (int64_t end = r + n; r < end; r++, next_rows(w, &p, 1), next_row(&s)) {
        lines l = lines_of(w, &s, j->x, j->M, &p);
        if (!fits(j) || (doubtful && has_nan(&l, w->size[2]))) max_row_plain(j, &l, &s, r * OW);
        else if (j->indices) put_indices(w, &l, &s, volume(w->kernel) <= TABLE ? table : NULL, j->indices + r * OW);
    }
}

/* Each way is a function of its own: in one with the others the compiler makes less of it. First windows side by side. */
static __attribute__((noinline)) vreal max_of_pairs(const max_job *j, const row_space *s, const row_place *p, int64_t r,
                                                    int64_t n, int64_t end)
{
    const windows *w = &j->w;
    int64_t OW = w->out[2];
    lines l = lines_of(w, s, j->x, j->M, p);
    real *y = j->y + r * OW, *limit = j->y + end * OW;
    if (!with_places(j)) return max_pairs(MAXIMUM, w, &l, n, NULL, 0, y, NULL, limit);
    uint8_t *offsets = j->offsets ? j->offsets + r * OW : NULL;
    return max_pairs(PLACES, w, &l, n, s->id, j->indices ? s->pitch : 0, y, offsets, limit);
}

static __attribute__((noinline)) vreal max_of_short(const max_job *j, const row_space *s, const row_place *p, int64_t r,
                                                    int64_t n, int64_t end)
{
    int64_t OW = j->w.out[2];
    short_job rows = {&j->w, &j->space, .x = j->x, .M = j->M, .p = *p, .n = n};
    rows.y = j->y + r * OW, rows.limit = j->y + end * OW;
    rows.offsets = j->offsets ? j->offsets + r * OW : NULL;
    rows.ids = s->id, rows.ids_step = j->indices ? s->pitch : 0;
    return pool_short(with_places(j) ? PLACES : MAXIMUM, &rows);
}

static __attribute__((noinline)) vreal max_of_lines(const max_job *j, const row_space *s, const row_place *p, int64_t r,
                                                    int64_t n, int64_t end)
{
    const windows *w = &j->w;
    int64_t OW = w->out[2];
    vreal check = splat((real)0);
    lines l = lines_of(w, s, j->x, j->M, p);
    real *y = j->y + r * OW, *limit = j->y + end * OW;
    if (!with_places(j)) {
        check = reduce_down(MAXIMUM, 1, w, &l, s, n);
        rows_of_maxima(w, s, n, y, limit);
    } else if (fits(j)) {
        check = reduce_down(PLACES, 1, w, &l, s, n);
        rows_with_places(w, s, n, y, j->offsets ? j->offsets + r * OW : NULL, limit);
    }
    return check;
}

static int max_rows(int64_t begin, int64_t end, void *context)
{
    const max_job *j = context;
    const windows *w = &j->w;
    int64_t table[TABLE];
    row_space s;
    if (take_rows(with_places(j) ? PLACES : MAXIMUM, &s, w)) return HL_NOMEM;
    if (j->indices) fill_table(w, table);
    row_place p = row_at(w, begin);
    for (int64_t r = begin, n; r < end; r += n, next_rows(w, &p, n)) {
        n = j->indices || j->some == max_of_lines ? min64(end - r, s.rows) : end - r;
        if (j->some != max_of_short) n = run_of_rows(w, &s, &p, n);
        vreal check = j->some(j, &s, &p, r, n, end);
        int doubtful = !fits(j) || lane_bits(check != check);
        if (doubtful || j->indices) finish_maxima(j, s, p, r, n, doubtful, table);
    }
    hl_give(s.block);
    return HL_OK;
}

/* Parallel over the rows of outputs. Rows in memory order, so that the lines that two rows share are still in cache.
 * Every input is read kernel_h / stride_h times, from cache but for the first; every output is written once.
 * Source: the separation of a maximum over a box into one over lines and one over columns. */
static int run_max(max_job *j)
{
    const windows *w = &j->w;
    if (!volume(w->out)) return HL_OK;
    double work =
        (double)w->size[2] * (double)min64(w->kernel[0], w->size[0]) * (double)min64(w->kernel[1], w->size[1]);
    if (j->indices) work *= 3;
    int paired = side_by_side(w) && (with_places(j) || is_seamless(w) || !are_short(w));
    j->some = !fits(j) ? max_of_lines : paired ? max_of_pairs : are_short(w) ? max_of_short : max_of_lines;
    if (j->some == max_of_short && take_short(&j->space, w)) return HL_NOMEM;
    int status = hl_parallel_for(j->M * w->out[0] * w->out[1], hl_grain(work / 2 + (double)w->out[2]), max_rows, j);
    give_short(&j->space);
    return status;
}

int HL(max_pool)(const hl_max_pool_plan *p, const real *x, real *y, int64_t *indices, uint8_t *offsets)
{
    max_job j = {.w = {KERNEL(p), BEFORE(p)}, .M = p->M, .x = x, .y = y, .indices = indices, .offsets = offsets};
    return run_max(&j);
}

int HL(adaptive_max_pool)(const hl_adaptive_max_pool_plan *p, const real *x, real *y, int64_t *indices)
{
    int64_t size[3] = {p->D, p->H, p->W}, out[3] = {p->OD, p->OH, p->OW};
    if (!volume(out)) return HL_OK;
    max_job j = {.w = share_out(size, out), .M = p->M, .x = x, .y = y, .indices = indices};
    return run_max(&j);
}

typedef struct {
    windows w;
    const real *gy;
    const uint8_t *offsets;
    real *gx;
    int past_cache;
} max_backward_job;

/* Two lines of gx from a row of windows of 2 x 2 that lie side by side: written once, whole vectors at a time, the last ones
 * twice where vectors do not fill the row. */
static void pairs_back(const real *g, const uint8_t *offset, real *gx, int64_t W, int64_t OW)
{
    for (int64_t o = 0; o < OW; o += LANES) {
        o = min64(o, OW - LANES);
        vint at, value = (vint)load(g + o);
        for (int k = 0; k < LANES; k++) ((ireal *)&at)[k] = offset[o + k];
        for (int h = 0; h < 2; h++) {
            vreal left = (vreal)(value & (at == 2 * h)), right = (vreal)(value & (at == 2 * h + 1));
            store(gx + h * W + 2 * o, zip_low(left, right));
            store(gx + h * W + 2 * o + LANES, zip_high(left, right));
        }
    }
}

/* Rows of windows of 2 x 2 that lie side by side: windows, rows and planes follow each other without gaps. */
static int pairs_rows(int64_t begin, int64_t end, void *context)
{
    const max_backward_job *j = context;
    int64_t OW = j->w.out[2];
    outflow gx;
    int status = outflow_begin(&gx, j->gx + begin * 4 * OW, 4 * OW, j->past_cache);
    for (int64_t row = begin; row < end && status == HL_OK; row++) {
        pairs_back(j->gy + row * OW, j->offsets + row * OW, outflow_place(&gx), 2 * OW, OW);
        outflow_added(&gx, 4 * OW);
    }
    outflow_end(&gx);
    return status;
}

/* gx[i step + table[offset[i apart]]] += g[i apart], for windows of a row that share no element of gx: where the sum that is read
 * may be the one just written, the processor waits for it each time. */
static inline void add_to_taps(const real *g, const uint8_t *offset, int64_t n, int64_t apart, real *gx, int64_t step,
                               const int64_t *table)
{
#pragma GCC unroll 4
    for (int64_t o = 0; o < n; o += apart, gx += step) gx[table[offset[o]]] += g[o];
}

static int max_backward_planes(int64_t begin, int64_t end, void *context)
{
    const max_backward_job *j = context;
    const windows *w = &j->w;
    int64_t inside = volume(w->size), W = w->size[2], OW = w->out[2], stride = w->stride[2], table[TABLE];
    real *buffer = j->past_cache ? hl_take((size_t)inside * sizeof(real)) : NULL;
    if (j->past_cache && !buffer) return HL_NOMEM;
    fill_table(w, table);
    int64_t last_line = table[volume(w->kernel) - w->kernel[2]]; /* of a window, from its first */
    int64_t apart = min64(((w->kernel[2] - 1) * w->dilation[2] + stride) / stride, OW);
    const real *g = j->gy + begin * volume(w->out);
    const uint8_t *offset = j->offsets + begin * volume(w->out);
    for (int64_t m = begin; m < end; m++) {
        real *to = j->gx + m * inside, *gx = buffer ? buffer : to;
        int64_t cleared = 0, written = 0;
        for (int64_t od = 0; od < w->out[0]; od++)
            for (int64_t oh = 0; oh < w->out[1]; oh++, g += OW, offset += OW) {
                int64_t d = od * w->stride[0] - w->pad[0], h = oh * w->stride[1] - w->pad[1];
                int64_t start = (d * w->size[1] + h) * W - w->pad[2];
                /* What is added to is cleared just before; nothing more is added to what lies before the first line. */
                int64_t end = min64(start + w->pad[2] + last_line + W, inside);
                int64_t whole = d < 0 ? 0 : (d * w->size[1] + max64(h, 0)) * W;
                for (; cleared < end && cleared + LANES <= inside; cleared += LANES)
                    store(gx + cleared, splat((real)0));
                for (; cleared < end; cleared++) gx[cleared] = 0;
                whole -= (int64_t)((uintptr_t)(to + whole) % 64 / sizeof(real));
                if (buffer && whole - written >= BUFFER) {
                    copy_past_cache(to + written, buffer + written, whole - written);
                    written = whole;
                }
                for (int64_t first = 0; first < apart; first++)
                    add_to_taps(g + first, offset + first, OW - first, apart, gx + start + first * stride,
                                apart * stride, table);
            }
        for (; cleared < inside; cleared++) gx[cleared] = 0;
        if (buffer) copy_past_cache(to + written, buffer + written, inside - written);
    }
    if (buffer) stream_end();
    hl_give(buffer);
    return HL_OK;
}

/* Parallel over rows of windows of 2 x 2 that lie side by side: their lines are written once, large results past the cache.
 * Else over planes: a plane is cleared and then added to while it sits in cache, if all of gx does not, in a buffer that is
 * written past it; one read and one write of an element of gx per output, besides the clearing. gy and offsets stream
 * through. Source: the chain rule. */
int HL(max_pool_backward)(const hl_max_pool_backward_plan *p, const real *gy, const uint8_t *offsets, real *gx)
{
    max_backward_job j = {{KERNEL(p), BEFORE(p)}, gy, offsets, gx, 0};
    const windows *w = &j.w;
    int64_t inside = volume(w->size);
    j.past_cache = p->M * inside > CACHE_BYTES / (int64_t)sizeof(real);
    if (w->kernel[0] == 1 && w->kernel[1] == 2 && w->kernel[2] == 2 && w->dilation[1] == 1 && w->dilation[2] == 1 &&
        w->size[0] == w->out[0] && w->size[1] == 2 * w->out[1] && w->size[2] == 2 * w->out[2] &&
        !(w->pad[1] | w->pad[2]) && w->out[2] >= LANES)
        return hl_parallel_for(p->M * w->out[0] * w->out[1], hl_grain(5 * (double)w->out[2]), pairs_rows, &j);
    j.past_cache &= inside * (int64_t)sizeof(real) <= 256 << 10;
    return hl_parallel_for(p->M, hl_grain((double)inside + 4 * (double)volume(w->out)), max_backward_planes, &j);
}

/* ---- places given by indices ---- */

typedef struct {
    const real *from;
    const int64_t *indices;
    real *to;
    int64_t O, L;
    int add, *wrong;
} scatter_job;

static int scatter_planes(int64_t begin, int64_t end, void *context)
{
    const scatter_job *j = context;
    for (int64_t m = begin; m < end; m++) {
        const real *from = j->from + m * j->O;
        const int64_t *at = j->indices + m * j->O;
        real *to = j->to + m * j->L;
        memset(to, 0, (size_t)j->L * sizeof(real));
        if (j->add)
            for (int64_t o = 0; o < j->O; o++) to[at[o]] += from[o];
        else
            for (int64_t o = 0; o < j->O; o++) to[at[o]] = from[o];
    }
    return HL_OK;
}

/* Parallel over planes, in memory order inside of one: the order of additions is fixed, and of two stores the last stays.
 * One read of a value and its index and one write per value, besides the clearing. Source: the chain rule. */
int HL(adaptive_max_pool_backward)(const hl_adaptive_max_pool_backward_plan *p, const real *gy, const int64_t *indices,
                                   real *gx)
{
    scatter_job j = {.from = gy, .indices = indices, .to = gx, .O = p->O, .L = p->L, .add = 1};
    return hl_parallel_for(p->M, hl_grain((double)p->L + 4 * (double)p->O), scatter_planes, &j);
}

static int check_indices(int64_t begin, int64_t end, void *context)
{
    const scatter_job *j = context;
    int wrong = 0;
    for (int64_t i = begin; i < end; i++) wrong |= (uint64_t)j->indices[i] >= (uint64_t)j->L;
    if (wrong) __atomic_store_n(j->wrong, 1, __ATOMIC_RELAXED);
    return HL_OK;
}

int HL(max_unpool)(const hl_max_unpool_plan *p, const real *x, const int64_t *indices, real *y, int64_t *bad)
{
    int wrong = 0;
    scatter_job j = {.from = x, .indices = indices, .to = y, .O = p->O, .L = p->L, .wrong = &wrong};
    int64_t n = p->M * p->O;
    int status = hl_parallel_for(n, hl_grain(1), check_indices, &j);
    if (status != HL_OK) return status;
    bad[0] = 0;
    for (int64_t i = 0; wrong && i < n && !bad[0]; i++)
        if ((uint64_t)indices[i] >= (uint64_t)p->L) bad[0] = i + 1;
    if (wrong) return HL_OK;
    return hl_parallel_for(p->M, hl_grain((double)p->L + 4 * (double)p->O), scatter_planes, &j);
}

static int gather_planes(int64_t begin, int64_t end, void *context)
{
    const scatter_job *j = context;
    for (int64_t m = begin; m < end; m++)
        for (int64_t o = m * j->O; o < (m + 1) * j->O; o++) j->to[o] = j->from[m * j->L + j->indices[o]];
    return HL_OK;
}

int HL(max_unpool_backward)(const hl_max_unpool_backward_plan *p, const real *gy, const int64_t *indices, real *gx)
{
    scatter_job j = {.from = gy, .indices = indices, .to = gx, .O = p->O, .L = p->L};
    return hl_parallel_for(p->M, hl_grain(4 * (double)p->O), gather_planes, &j);
}

/* ---- means and norms ---- */

typedef struct sum_job sum_job;
struct sum_job {
    windows w;
    int64_t M;
    int include;     /* the padding counts in a mean */
    int64_t divisor; /* of a mean; 0: the count */
    real norm;       /* 0: a mean */
    const real *x;
    real *y;
    /* What makes n rows of scaled sums, as of maxima. */
    void (*some)(const sum_job *, const row_space *, const row_place *p, int64_t r, int64_t n, int64_t end, scaling by);
    short_space space;
};

/* The taps of window o inside of the padded axis. */
static int64_t padded_count(const windows *w, int axis, int64_t o)
{
    int64_t room = w->size[axis] + w->after[axis] - 1 - (o * w->stride[axis] - w->pad[axis]);
    if (w->dilation[axis] > 1) room /= w->dilation[axis];
    return min64(w->kernel[axis], room + 1);
}

/* 1 / divisor where that is exact, else 0. */
static inline real exact_factor(real divisor)
{
    int exponent;
    real mantissa = (real)frexp((double)divisor, &exponent);
    return mantissa == (real)0.5 || mantissa == (real)-0.5 ? (real)1 / divisor : (real)0;
}

static int whole_norm(real norm) { return norm >= 1 && norm <= 8 && norm == (real)(int)norm; }

/* x ** norm over the lines, element by element, into the reduced line. */
static void powers_down(real norm, const windows *w, const lines *l, const row_space *s)
{
    for (int64_t i = 0; i < w->size[2]; i++) {
        double total = 0;
        for (int64_t d = 0; d < l->d.count; d++)
            for (int64_t h = 0; h < l->h.count; h++)
                total += pow((double)l->first[d * l->step_d + h * l->step_h + i], (double)norm);
        *element(s, s->before + i) = (real)total;
    }
    fill(SUM, s, s->before + w->size[2], s->reach);
}

static void root(real norm, real *y, int64_t n)
{
    if (norm == 2)
        for (int64_t i = 0; i < n; i++) y[i] = HL_F32 ? sqrtf((float)y[i]) : (real)sqrt((double)y[i]);
    else if (norm != 1)
        for (int64_t i = 0; i < n; i++) y[i] = (real)pow((double)y[i], 1 / (double)norm);
}

/* n rows of outputs of windows side by side. */
static inline __attribute__((always_inline)) void
sums_ahead(int kind, windows w, lines l, int64_t n, const int64_t ahead, scaling by, real *y, const real *limit)
{
    vreal check[2];
    int64_t OW = w.out[2];
    for (int64_t r = 0; r < n; r++, l.first += w.stride[1] * w.size[2], y += OW) {
        int64_t whole = l.end - last_line(&l) - 2 * LANES;
        for (int64_t o = 0; o < OW; o += LANES)
            put(y + o, scaled(pairs(kind, &w, &l, 2 * o, 2 * o <= whole, ahead, NULL, check), by, o), OW - o, limit);
    }
}
static inline __attribute__((always_inline)) void sum_pairs(int kind, const windows *w, const lines *l, int64_t n,
                                                            scaling by, real *y, const real *limit)
{
    if (l->ahead) sums_ahead(kind, *w, *l, n, l->ahead, by, y, limit);
    else sums_ahead(kind, *w, *l, n, 0, by, y, limit);
}

/* What the sums of all rows have in common: the taps of every output across, and whether they are equal. */
typedef struct {
    row_space s;
    real *counts;
    int alike, even; /* even: all rows have as many taps along the other axes */
    int64_t outer; /* taps along the other axes that `by` is for */
    scaling by;
} sum_space;

/* The taps of a row of windows along the other axes, as far as they count. */
static int64_t outer_taps(const sum_job *j, const row_space *s, const row_place *p)
{
    if (j->include) return padded_count(&j->w, 0, p->od) * padded_count(&j->w, 1, p->oh);
    return s->taps[0][p->od].count * s->taps[1][p->oh].count;
}

static int take_sums(sum_space *t, const sum_job *j)
{
    const windows *w = &j->w;
    if (take_rows(SUM, &t->s, w)) return HL_NOMEM;
    t->counts = (real *)t->s.id; /* nobody asks for places */
    t->alike = 1;
    t->outer = 0;
    for (int64_t o = 0; o < w->out[2]; o++) {
        t->counts[o] = (real)(j->include ? padded_count(w, 2, o) : t->s.taps[2][o].count);
        t->alike &= t->counts[o] == t->counts[0];
    }
    row_place p = {0, 0, 0};
    int64_t first = outer_taps(j, &t->s, &p);
    t->even = first > 0; /* taps are a product over the axes: each by itself is enough */
    for (; p.od < w->out[0]; p.od++) t->even &= outer_taps(j, &t->s, &p) == first;
    for (p.od = 0; p.oh < w->out[1]; p.oh++) t->even &= outer_taps(j, &t->s, &p) == first;
    return HL_OK;
}

static inline __attribute__((always_inline)) void scale_row(sum_space *t, const sum_job *j, const row_place *p)
{
    int64_t outer = outer_taps(j, &t->s, p);
    if (outer == t->outer) return; /* most often: the rows inside are alike */
    t->outer = outer;
    t->by = (scaling){.divisor = (real)outer * (t->alike ? t->counts[0] : (real)1)};
    if (j->norm != 0) t->by.divisor /= (real)volume(j->w.kernel);
    if (j->divisor) t->by.divisor = (real)j->divisor;
    else if (!t->alike) t->by.counts = t->counts;
    if (!t->by.counts) t->by.factor = exact_factor(t->by.divisor);
}

static __attribute__((noinline)) void sum_of_pairs(const sum_job *j, const row_space *s, const row_place *p, int64_t r,
                                                   int64_t n, int64_t end, scaling by)
{
    const windows *w = &j->w;
    int64_t OW = w->out[2];
    lines l = lines_of(w, s, j->x, j->M, p);
    if (j->norm == 2) sum_pairs(SQUARES, w, &l, n, by, j->y + r * OW, j->y + end * OW);
    else sum_pairs(SUM, w, &l, n, by, j->y + r * OW, j->y + end * OW);
}

static __attribute__((noinline)) void sum_of_short(const sum_job *j, const row_space *s, const row_place *p, int64_t r,
                                                   int64_t n, int64_t end, scaling by)
{
    (void)s;
    short_job rows = {&j->w, &j->space, .x = j->x, .M = j->M, .p = *p, .n = n, .by = by};
    rows.y = j->y + r * j->w.out[2], rows.limit = j->y + end * j->w.out[2];
    pool_short(j->norm == 2 ? SQUARES : SUM, &rows);
}

static __attribute__((noinline)) void sum_of_lines(const sum_job *j, const row_space *s, const row_place *p, int64_t r,
                                                   int64_t n, int64_t end, scaling by)
{
    const windows *w = &j->w;
    int64_t OW = w->out[2];
    lines l = lines_of(w, s, j->x, j->M, p);
    if (j->norm == 0 || j->norm == 1) reduce_down(SUM, 1, w, &l, s, n);
    else if (j->norm == 2) reduce_down(SQUARES, 1, w, &l, s, n);
    else if (whole_norm(j->norm)) reduce_down(POWERS, (int64_t)j->norm, w, &l, s, n);
    else powers_down(j->norm, w, &l, s);
    rows_of_sums(w, s, n, by, j->y + r * OW, j->y + end * OW);
}

static int sum_rows(int64_t begin, int64_t end, void *context)
{
    const sum_job *j = context;
    const windows *w = &j->w;
    int64_t OW = w->out[2];
    sum_space t;
    if (take_sums(&t, j)) return HL_NOMEM;
    row_place p = row_at(w, begin);
    for (int64_t r = begin, n; r < end; r += n, next_rows(w, &p, n)) {
        n = end - r;
        if (j->some == sum_of_lines) n = j->norm == 0 || whole_norm(j->norm) ? min64(n, t.s.rows) : 1;
        if (j->some != sum_of_short || !t.even) n = run_of_rows(w, &t.s, &p, n);
        scale_row(&t, j, &p);
        j->some(j, &t.s, &p, r, n, end, t.by);
        if (j->norm != 0) root(j->norm, j->y + r * OW, n * OW);
    }
    hl_give(t.s.block);
    return HL_OK;
}

/* The sum of n neighbours, in eight vectors so that loads and not additions set the pace. */
static real sum_of(const real *x, int64_t n)
{
    vreal v[8] = {{0}};
    int64_t i = 0;
    for (; i + 8 * LANES <= n; i += 8 * LANES)
        for (int k = 0; k < 8; k++) v[k] += load(x + i + k * LANES);
    for (; i + LANES <= n; i += LANES) v[0] += load(x + i);
    if (i < n) v[1] += load_part(x + i, n - i, (real)0);
    return sum_lanes(((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7])));
}

/* A mean of one window, which is the plane. */
static int is_whole_mean(const windows *w, real norm)
{
    return norm == 0 && volume(w->out) == 1 && !memcmp(w->kernel, w->size, sizeof w->size) &&
           !(w->pad[0] | w->pad[1] | w->pad[2]);
}

static int mean_planes(int64_t begin, int64_t end, void *context)
{
    const sum_job *j = context;
    int64_t n = volume(j->w.size);
    for (int64_t m = begin; m < end; m++) j->y[m] = sum_of(j->x + m * n, n) / (real)(j->divisor ? j->divisor : n);
    return HL_OK;
}

/* Parallel over the rows of outputs, or over planes where a plane has one window. Rows in memory order.
 * Every input is read kernel_h / stride_h times, from cache but for the first; every output is written once.
 * Source: the separation of a sum over a box into sums over lines and over columns. */
static int run_sum(sum_job *j)
{
    const windows *w = &j->w;
    if (!volume(w->out)) return HL_OK;
    if (is_whole_mean(w, j->norm)) return hl_parallel_for(j->M, hl_grain((double)volume(w->size)), mean_planes, j);
    double work =
        (double)w->size[2] * (double)min64(w->kernel[0], w->size[0]) * (double)min64(w->kernel[1], w->size[1]);
    if (j->norm != 0 && j->norm != 2) work *= 20;
    int simple = j->norm == 0 || j->norm == 1 || j->norm == 2;
    int paired = side_by_side(w) && (is_seamless(w) || !are_short(w));
    j->some = !simple ? sum_of_lines : paired ? sum_of_pairs : are_short(w) ? sum_of_short : sum_of_lines;
    if (j->some == sum_of_short && take_short(&j->space, w)) return HL_NOMEM;
    int status = hl_parallel_for(j->M * w->out[0] * w->out[1], hl_grain(work / 2 + (double)w->out[2]), sum_rows, j);
    give_short(&j->space);
    return status;
}

int HL(avg_pool)(const hl_avg_pool_plan *p, const real *x, real *y)
{
    sum_job j = {.w = {KERNEL(p), BEFORE(p), AFTER(p)},
                 .M = p->M,
                 .include = p->count_include_pad != 0,
                 .divisor = p->divisor,
                 .x = x,
                 .y = y};
    return run_sum(&j);
}

int HL(adaptive_avg_pool)(const hl_adaptive_avg_pool_plan *p, const real *x, real *y)
{
    int64_t size[3] = {p->D, p->H, p->W}, out[3] = {p->OD, p->OH, p->OW};
    if (!volume(out)) return HL_OK;
    sum_job j = {.w = share_out(size, out), .M = p->M, .x = x, .y = y};
    return run_sum(&j);
}

int HL(lp_pool)(const hl_lp_pool_plan *p, const real *x, real *y)
{
    sum_job j = {.w = {KERNEL(p)}, .M = p->M, .norm = (real)p->norm, .x = x, .y = y};
    return run_sum(&j);
}

#include "spread.h"

/* What the only window of a plane passes on: the same to all elements. */
static int spread_whole_planes(int64_t begin, int64_t end, void *context)
{
    const spread_job *j = context;
    int64_t n = volume(j->sum.w.size);
    const real *limit = j->gx + end * n;
    for (int64_t m = begin; m < end; m++) {
        vreal g = splat(j->gy[m] / (real)(j->sum.divisor ? j->sum.divisor : n));
        for (int64_t i = 0; i < n; i += LANES) put(j->gx + m * n + i, g, n - i, limit);
    }
    return HL_OK;
}

/* Parallel over the lines of gx, or over planes where a plane has one window. Lines in memory order, so that the rows of outputs
 * that two lines share are scaled once. gy is read and gx written once, large ones past the cache. Source: the chain rule. */
static int run_spread(spread_job *j)
{
    const windows *w = &j->sum.w;
    int64_t M = j->sum.M;
    if (is_whole_mean(w, j->sum.norm))
        return hl_parallel_for(M, hl_grain((double)volume(w->size)), spread_whole_planes, j);
    if (take_spread(j)) return HL_NOMEM;
    double work = (double)(1 + j->span[0] * j->span[1] + j->across.most) / 4;
    if (j->sum.norm > 2) work += 20;
    j->past_cache = M * volume(w->size) > CACHE_BYTES / (int64_t)sizeof(real);
    int status = hl_parallel_for(M * w->size[0] * w->size[1], hl_grain(work * (double)w->size[2]), spread_lines, j);
    give_spread(j);
    return status;
}

int HL(avg_pool_backward)(const hl_avg_pool_backward_plan *p, const real *gy, real *gx)
{
    spread_job j = {.sum = {.w = {KERNEL(p), BEFORE(p), AFTER(p)},
                            .M = p->M,
                            .include = p->count_include_pad != 0,
                            .divisor = p->divisor},
                    .gy = gy,
                    .gx = gx};
    return run_spread(&j);
}

int HL(adaptive_avg_pool_backward)(const hl_adaptive_avg_pool_backward_plan *p, const real *gy, real *gx)
{
    int64_t size[3] = {p->D, p->H, p->W}, out[3] = {p->OD, p->OH, p->OW};
    if (!volume(out)) {
        memset(gx, 0, (size_t)(p->M * volume(size)) * sizeof(real));
        return HL_OK;
    }
    spread_job j = {.sum = {.w = share_out(size, out), .M = p->M}, .gy = gy, .gx = gx};
    return run_spread(&j);
}

int HL(lp_pool_backward)(const hl_lp_pool_backward_plan *p, const real *gy, const real *x, const real *y, real *gx)
{
    spread_job j = {.sum = {.w = {KERNEL(p)}, .M = p->M, .norm = (real)p->norm}, .gy = gy, .gx = gx};
    if (j.sum.norm != 1) j.x = x, j.y = y; /* else the gradient is that of a sum */
    return run_spread(&j);
}
