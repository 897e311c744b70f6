/* Boxes: overlap measures and their gradients, suppression, RoI pooling, masks.
 *
 * Compiled without multiply-adds: what is kept is decided by inter / union > threshold, each operation rounded as
 * written, so that every instruction set and every backend keeps the same boxes. */
#include "vmath.h"

#define INLINE static inline __attribute__((always_inline))
#if HL_F32
#define SMALLEST 1.40129846e-45f /* the smallest number above 0 */
typedef uint32_t ukey;
#else
#define SMALLEST 4.9406564584124654e-324
typedef uint64_t ukey;
#endif
#define EPSILON ((real)(HL_F32 ? 1.1920929e-7 : 2.220446049250313e-16))

enum { IOU, GIOU, DIOU, CIOU };
enum { XYXY, XYWH, CXCYWH };

static inline real rmax(real a, real b) { return a < b ? b : a; }
static inline real rmin(real a, real b) { return b < a ? b : a; }

/* ---- one box ---- */

typedef struct {
    const real *grad, *boxes;
    real *out;
    int64_t source, target;
    real height, width;
} box_job;

static int area_chunk(int64_t begin, int64_t end, void *context)
{
    const box_job *j = context;
    for (int64_t i = begin; i < end; i++) {
        const real *b = j->boxes + 4 * i;
        j->out[i] = (b[2] - b[0]) * (b[3] - b[1]);
    }
    return HL_OK;
}

/* Parallel over boxes; one pass in memory order. Reads 4, writes 1. */
int HL(box_area)(const hl_box_area_plan *p, const real *boxes, real *area)
{
    box_job job = {.boxes = boxes, .out = area};
    return hl_parallel_for(p->N, hl_grain(6), area_chunk, &job);
}

static int area_grad_chunk(int64_t begin, int64_t end, void *context)
{
    const box_job *j = context;
    for (int64_t i = begin; i < end; i++) {
        const real *b = j->boxes + 4 * i;
        real *g = j->out + 4 * i, w = j->grad[i] * (b[3] - b[1]), h = j->grad[i] * (b[2] - b[0]);
        g[0] = -w;
        g[1] = -h;
        g[2] = w;
        g[3] = h;
    }
    return HL_OK;
}

int HL(box_area_grad)(const hl_box_area_grad_plan *p, const real *grad, const real *boxes, real *grad_boxes)
{
    box_job job = {.grad = grad, .boxes = boxes, .out = grad_boxes};
    return hl_parallel_for(p->N, hl_grain(10), area_grad_chunk, &job);
}

/* One axis of one box. */
INLINE void convert_axis(real a, real b, int64_t source, int64_t target, real *first, real *last)
{
    const real half = (real)0.5;
    real size = source == XYXY ? b - a : b;
    if (target == CXCYWH) *first = source == XYXY ? (a + b) * half : source == XYWH ? a + b * half : a;
    else *first = source == CXCYWH ? a - b * half : a;
    if (target == XYXY) *last = source == XYXY ? b : source == XYWH ? a + b : a + b * half;
    else *last = size;
}
INLINE void convert_axis_grad(real g, real h, int64_t source, int64_t target, real *first, real *last)
{
    const real half = (real)0.5;
    *first = g;
    *last = h;
    if (source == target) return;
    if (source == XYXY) {
        *first = target == XYWH ? g - h : g * half - h;
        *last = target == XYWH ? h : g * half + h;
    } else if (source == XYWH) {
        if (target == XYXY) *first = g + h;
        else *last = g * half + h;
    } else if (target == XYXY) {
        *first = g + h;
        *last = (h - g) * half;
    } else {
        *last = h - g * half;
    }
}

static int convert_chunk(int64_t begin, int64_t end, void *context)
{
    const box_job *j = context;
    for (int64_t i = 4 * begin; i < 4 * end; i += 4)
        for (int k = 0; k < 2; k++)
            convert_axis(j->boxes[i + k], j->boxes[i + k + 2], j->source, j->target, j->out + i + k,
                         j->out + i + k + 2);
    return HL_OK;
}
static int convert_grad_chunk(int64_t begin, int64_t end, void *context)
{
    const box_job *j = context;
    for (int64_t i = 4 * begin; i < 4 * end; i += 4)
        for (int k = 0; k < 2; k++)
            convert_axis_grad(j->grad[i + k], j->grad[i + k + 2], j->source, j->target, j->out + i + k,
                              j->out + i + k + 2);
    return HL_OK;
}

/* Parallel over boxes; one pass in memory order. Reads 4, writes 4. */
int HL(box_convert)(const hl_box_convert_plan *p, const real *boxes, real *converted)
{
    box_job job = {.boxes = boxes, .out = converted, .source = p->source, .target = p->target};
    return hl_parallel_for(p->N, hl_grain(10), convert_chunk, &job);
}
int HL(box_convert_grad)(const hl_box_convert_grad_plan *p, const real *grad, real *grad_boxes)
{
    box_job job = {.grad = grad, .out = grad_boxes, .source = p->source, .target = p->target};
    return hl_parallel_for(p->N, hl_grain(10), convert_grad_chunk, &job);
}

static int clip_chunk(int64_t begin, int64_t end, void *context)
{
    const box_job *j = context;
    const real limit[2] = {j->width, j->height};
    for (int64_t i = 4 * begin; i < 4 * end; i++) j->out[i] = rmin(rmax(j->boxes[i], (real)0), limit[i & 1]);
    return HL_OK;
}
static int clip_grad_chunk(int64_t begin, int64_t end, void *context)
{
    const box_job *j = context;
    const real limit[2] = {j->width, j->height};
    for (int64_t i = 4 * begin; i < 4 * end; i++)
        j->out[i] = ((j->boxes[i] >= (real)0) & (j->boxes[i] <= limit[i & 1])) ? j->grad[i] : (real)0;
    return HL_OK;
}

/* Parallel over boxes; one pass in memory order. Reads 4 (8), writes 4. */
int HL(clip_boxes)(const hl_clip_boxes_plan *p, const real *boxes, real *clipped)
{
    box_job job = {.boxes = boxes, .out = clipped, .height = (real)p->height, .width = (real)p->width};
    return hl_parallel_for(p->N, hl_grain(10), clip_chunk, &job);
}
int HL(clip_boxes_grad)(const hl_clip_boxes_grad_plan *p, const real *grad, const real *boxes, real *grad_boxes)
{
    box_job job = {.grad = grad, .boxes = boxes, .out = grad_boxes, .height = (real)p->height, .width = (real)p->width};
    return hl_parallel_for(p->N, hl_grain(14), clip_grad_chunk, &job);
}

/* One pass on one thread, without a branch: each index is written and stays if its box does. Reads 4, writes 1. */
int HL(remove_small_boxes)(const hl_remove_small_boxes_plan *p, const real *boxes, int64_t *keep, int64_t *count)
{
    const real smallest = (real)p->min_size;
    int64_t n = 0;
    for (int64_t i = 0; i < p->N; i++) {
        const real *b = boxes + 4 * i;
        keep[n] = i;
        n += (b[2] - b[0] >= smallest) & (b[3] - b[1] >= smallest);
    }
    *count = n;
    for (; n < p->N; n++) keep[n] = -1;
    return HL_OK;
}

/* ---- overlap ---- */

/* A box, or LANES of them, with what is computed once for it. */
typedef struct { vreal x1, y1, x2, y2, area, cx, cy, angle; } vbox;
enum { PLANES = 8 };

/* The planes of one box: corners, area, centre, angle (the last two only where the measure needs them). */
INLINE void describe(const real *b, int64_t kind, real out[PLANES])
{
    real w = rmax(b[2] - b[0], (real)0), h = rmax(b[3] - b[1], (real)0);
    for (int k = 0; k < 4; k++) out[k] = b[k];
    out[4] = w * h;
    if (kind >= DIOU) {
        out[5] = (b[0] + b[2]) * (real)0.5;
        out[6] = (b[1] + b[3]) * (real)0.5;
    }
    if (kind == CIOU) out[7] = HL_F32 ? (real)atan2f((float)w, (float)h) : (real)atan2((double)w, (double)h);
}

/* Boxes as planes [PLANES][stride], zero behind the last box; NULL when there is no memory. */
static real *make_planes(const real *boxes, int64_t n, int64_t kind, int64_t *stride)
{
    *stride = round_up(n, LANES) + LANES;
    real *planes = hl_take((size_t)*stride * PLANES * sizeof(real));
    if (!planes) return NULL;
    for (int64_t i = 0; i < n; i++) {
        real d[PLANES] = {0};
        describe(boxes + 4 * i, kind, d);
        for (int k = 0; k < PLANES; k++) planes[k * *stride + i] = d[k];
    }
    for (int k = 0; k < PLANES; k++)
        for (int64_t i = n; i < *stride; i++) planes[k * *stride + i] = (real)0;
    return planes;
}

INLINE vbox load_planes(const real *p, int64_t stride, int64_t kind)
{
    vbox v = {load(p), load(p + stride), load(p + 2 * stride), load(p + 3 * stride), load(p + 4 * stride), {0}, {0},
              {0}};
    if (kind >= DIOU) {
        v.cx = load(p + 5 * stride);
        v.cy = load(p + 6 * stride);
    }
    if (kind == CIOU) v.angle = load(p + 7 * stride);
    return v;
}
INLINE vbox splat_box(const real d[PLANES])
{
    return (vbox){splat(d[0]), splat(d[1]), splat(d[2]), splat(d[3]),
                  splat(d[4]), splat(d[5]), splat(d[6]), splat(d[7])};
}

INLINE vreal plus(vreal a) { return vmax(a, splat((real)0)); }
/* a / b, and a where b is 0. */
INLINE vreal ratio(vreal a, vreal b) { return a / blend(b == splat((real)0), splat((real)1), b); }

INLINE vreal intersection(const vbox *a, const vbox *b)
{
    return plus(vmin(a->x2, b->x2) - vmax(a->x1, b->x1)) * plus(vmin(a->y2, b->y2) - vmax(a->y1, b->y1));
}

INLINE vreal measure(const vbox *a, const vbox *b, int64_t kind, vreal eps)
{
    vreal inter = intersection(a, b), both = (a->area + b->area) - inter;
    vreal iou = inter / vmax(both, splat(SMALLEST)); /* inter is 0 where both is */
    if (kind == IOU) return iou;
    vreal w = plus(vmax(a->x2, b->x2) - vmin(a->x1, b->x1)), h = plus(vmax(a->y2, b->y2) - vmin(a->y1, b->y1));
    if (kind == GIOU) return iou - (w * h - both) / vmax(w * h, splat(SMALLEST));
    vreal dx = a->cx - b->cx, dy = a->cy - b->cy;
    vreal diou = iou - ratio(dx * dx + dy * dy, w * w + h * h + eps);
    if (kind == DIOU) return diou;
    vreal angle = a->angle - b->angle, v = splat((real)0.40528473456935109) * angle * angle;
    return diou - ratio(v, splat((real)1) - iou + v + eps) * v;
}

enum { COLUMNS = 2048, PASTE = 4096 }; /* columns in one go (planes in cache); values gathered for a streamed write */

typedef struct {
    const real *boxes1, *boxes2, *planes, *grad;
    real *out, *out2;
    int64_t N, M, stride, kind, second;
    int streamed;
    real eps;
} overlap_job;

/* Columns [m, end) of one row to `to`, which has room for a whole vector more. */
INLINE void overlap_loose(const vbox *a, const overlap_job *j, int64_t m, int64_t end, real *to, int64_t kind)
{
    for (; m < end; m += LANES, to += LANES) {
        vbox b = load_planes(j->planes + m, j->stride, kind);
        store(to, measure(a, &b, kind, splat(j->eps)));
    }
}
/* The same without a write past the end: the last vector overlaps the one before. */
INLINE void overlap_tight(const vbox *a, const overlap_job *j, int64_t begin, int64_t end, real *to, int64_t kind)
{
    int64_t n = end - begin, m = 0;
    for (; m + LANES <= n; m += LANES) {
        vbox b = load_planes(j->planes + begin + m, j->stride, kind);
        store(to + m, measure(a, &b, kind, splat(j->eps)));
    }
    if (m == n) return;
    if (n >= LANES) {
        m = n - LANES;
        vbox b = load_planes(j->planes + begin + m, j->stride, kind);
        store(to + m, measure(a, &b, kind, splat(j->eps)));
    } else {
        vbox b = load_planes(j->planes + begin, j->stride, kind);
        store_part(to, n, measure(a, &b, kind, splat(j->eps)));
    }
}

INLINE void overlap_chunk(int64_t begin, int64_t end, const overlap_job *j, int64_t kind)
{
    real paste[PASTE + COLUMNS + LANES] __attribute__((aligned(64)));
    int64_t gathered = 0;
    real *target = NULL;
    for (int64_t t = begin; t < end; t++) { /* block-major: the rows of one block of columns one after the other */
        int64_t i = t % j->N, m = t / j->N * COLUMNS, stop = min64(m + COLUMNS, j->M);
        real d[PLANES] = {0};
        describe(j->boxes1 + 4 * i, kind, d);
        vbox a = splat_box(d);
        real *to = j->out + i * j->M + m;
        if (!j->streamed) {
            overlap_tight(&a, j, m, stop, to, kind);
            continue;
        }
        if (gathered && (target + gathered != to || gathered >= PASTE)) {
            copy_past_cache(target, paste, gathered);
            gathered = 0;
        }
        if (!gathered) target = to;
        overlap_loose(&a, j, m, stop, paste + gathered, kind);
        gathered += stop - m;
    }
    if (gathered) copy_past_cache(target, paste, gathered);
    stream_end();
}

static int iou_chunk(int64_t begin, int64_t end, void *context)
{
    const overlap_job *j = context;
    if (j->kind == IOU) overlap_chunk(begin, end, j, IOU);
    else if (j->kind == GIOU) overlap_chunk(begin, end, j, GIOU);
    else if (j->kind == DIOU) overlap_chunk(begin, end, j, DIOU);
    else overlap_chunk(begin, end, j, CIOU);
    return HL_OK;
}

#define STREAM_BYTES ((double)(8 << 20)) /* a result beyond this leaves the cache anyway */

/* Parallel over blocks of columns times rows. boxes2 lies in planes, so that a vector holds LANES boxes of it; a block of
 * them stays in cache while the rows pass. Reads 5 values (8 for CIoU) a vector and LANES of them, writes each value once,
 * past the cache where the matrix is large. Source: Rezatofighi et al. (2019), Zheng et al. (2020). */
int HL(box_iou)(const hl_box_iou_plan *p, const real *boxes1, const real *boxes2, real *iou)
{
    overlap_job job = {.boxes1 = boxes1, .out = iou, .N = p->N, .M = p->M, .kind = p->kind, .eps = (real)p->eps};
    if (!p->N || !p->M) return HL_OK;
    real *planes = make_planes(boxes2, p->M, p->kind, &job.stride);
    if (!planes) return HL_NOMEM;
    job.planes = planes;
    job.streamed = (double)p->N * (double)p->M * sizeof(real) > STREAM_BYTES;
    int64_t blocks = (p->M - 1) / COLUMNS + 1;
    int status = hl_parallel_for(blocks * p->N, hl_grain((double)min64(p->M, COLUMNS) * (p->kind == IOU ? 2 : 4) + 16),
                                 iou_chunk, &job);
    hl_give(planes);
    return status;
}

/* Up to LANES boxes in memory order, as a vector of boxes; empty ones behind them. */
INLINE vbox gather_boxes(const real *boxes, int64_t n, int64_t kind)
{
    union {
        vreal v[PLANES];
        real a[PLANES][LANES];
    } u = {{{0}}};
    for (int64_t i = 0; i < n; i++) {
        real d[PLANES] = {0};
        describe(boxes + 4 * i, kind, d);
        for (int k = 0; k < PLANES; k++) u.a[k][i] = d[k];
    }
    return (vbox){u.v[0], u.v[1], u.v[2], u.v[3], u.v[4], u.v[5], u.v[6], u.v[7]};
}

INLINE void paired_chunk(int64_t begin, int64_t end, const overlap_job *j, int64_t kind)
{
    for (int64_t i = begin; i < end; i += LANES) {
        int64_t n = min64(LANES, end - i);
        vbox a = gather_boxes(j->boxes1 + 4 * i, n, kind), b = gather_boxes(j->boxes2 + 4 * i, n, kind);
        vreal y = measure(&a, &b, kind, splat(j->eps));
        if (n == LANES) store(j->out + i, y);
        else store_part(j->out + i, n, y);
    }
}
static int iou_paired_chunk(int64_t begin, int64_t end, void *context)
{
    const overlap_job *j = context;
    if (j->kind == IOU) paired_chunk(begin, end, j, IOU);
    else if (j->kind == GIOU) paired_chunk(begin, end, j, GIOU);
    else if (j->kind == DIOU) paired_chunk(begin, end, j, DIOU);
    else paired_chunk(begin, end, j, CIOU);
    return HL_OK;
}

/* Parallel over pairs, in memory order. Reads 8, writes 1. */
int HL(box_iou_paired)(const hl_box_iou_paired_plan *p, const real *boxes1, const real *boxes2, real *iou)
{
    overlap_job job = {.boxes1 = boxes1, .boxes2 = boxes2, .out = iou, .kind = p->kind, .eps = (real)p->eps};
    return hl_parallel_for(p->N, round_up(hl_grain(24), LANES), iou_paired_chunk, &job);
}

/* ---- gradients of the overlap ---- */

/* The derivative of max(a, b) by a: half where they are equal. */
INLINE vreal larger(vreal a, vreal b)
{
    return blend(a == b, splat((real)0.5), blend(a > b, splat((real)1), splat((real)0)));
}
INLINE vreal where(vint mask, vreal a) { return blend(mask, a, splat((real)0)); }

/* g times the derivative of the measure of a and b by the corners of a; alpha of CIoU counts as a constant. */
INLINE void pull(const vbox *a, const vbox *b, vreal g, int64_t kind, vreal eps, vreal out[4])
{
    const vreal zero = splat((real)0), half = splat((real)0.5);
    vreal iw = vmin(a->x2, b->x2) - vmax(a->x1, b->x1), ih = vmin(a->y2, b->y2) - vmax(a->y1, b->y1);
    vreal inter = plus(iw) * plus(ih), both = (a->area + b->area) - inter;
    vreal wa = plus(a->x2 - a->x1), ha = plus(a->y2 - a->y1);
    vreal by_inter = ratio(blend(both == zero, zero, g), both), by_union = -ratio(by_inter * inter, both);
    vreal by_w = zero, by_h = zero, by_dx = zero, by_dy = zero, by_wa = zero, by_ha = zero;
    vreal full_w = vmax(a->x2, b->x2) - vmin(a->x1, b->x1), full_h = vmax(a->y2, b->y2) - vmin(a->y1, b->y1);
    vreal w = plus(full_w), h = plus(full_h);
    if (kind == GIOU) {
        vreal share = ratio(blend(w * h == zero, zero, g), w * h);
        vreal by_around = -ratio(share * both, w * h);
        by_union += share;
        by_w = by_around * h;
        by_h = by_around * w;
    }
    if (kind >= DIOU) {
        vreal dx = a->cx - b->cx, dy = a->cy - b->cy, diagonal = w * w + h * h + eps;
        vreal share = ratio(splat((real)2) * g, diagonal), far = ratio(share * (dx * dx + dy * dy), diagonal);
        by_dx = -share * dx * half;
        by_dy = -share * dy * half;
        by_w = far * w;
        by_h = far * h;
    }
    if (kind == CIOU) {
        vreal angle = a->angle - b->angle, v = splat((real)0.40528473456935109) * angle * angle;
        vreal alpha = ratio(v, splat((real)1) - ratio(inter, both) + v + eps);
        vreal turn = ratio(-g * alpha * splat((real)0.81056946913870217) * angle, wa * wa + ha * ha);
        by_wa = turn * ha;
        by_ha = -turn * wa;
    }
    by_inter -= by_union;
    vreal by_iw = where(iw >= zero, by_inter * plus(ih)), by_ih = where(ih >= zero, by_inter * plus(iw));
    by_wa = where(a->x2 >= a->x1, by_wa + by_union * ha);
    by_ha = where(a->y2 >= a->y1, by_ha + by_union * wa);
    by_w = where(full_w >= zero, by_w);
    by_h = where(full_h >= zero, by_h);
    out[0] = by_dx - by_wa - by_iw * larger(a->x1, b->x1) - by_w * larger(b->x1, a->x1);
    out[1] = by_dy - by_ha - by_ih * larger(a->y1, b->y1) - by_h * larger(b->y1, a->y1);
    out[2] = by_dx + by_wa + by_iw * larger(b->x2, a->x2) + by_w * larger(a->x2, b->x2);
    out[3] = by_dy + by_ha + by_ih * larger(b->y2, a->y2) + by_h * larger(a->y2, b->y2);
}

INLINE vreal load_some(const real *p, int64_t n) { return n >= LANES ? load(p) : load_part(p, n, (real)0); }

/* Rows [begin, end) of boxes1: each sums over the boxes of the other list, LANES at a time. */
INLINE void grad_rows(int64_t begin, int64_t end, const overlap_job *j, int64_t kind)
{
    for (int64_t i = begin; i < end; i++) {
        real d[PLANES] = {0};
        describe(j->boxes1 + 4 * i, kind, d);
        vbox a = splat_box(d);
        vreal sum[4] = {{0}, {0}, {0}, {0}}, part[4];
        for (int64_t m = 0; m < j->M; m += LANES) {
            vbox b = load_planes(j->planes + m, j->stride, kind);
            pull(&a, &b, load_some(j->grad + i * j->M + m, j->M - m), kind, splat(j->eps), part);
            for (int k = 0; k < 4; k++) sum[k] += part[k];
        }
        for (int k = 0; k < 4; k++) j->out[4 * i + k] = sum_lanes(sum[k]);
    }
}
/* Columns [begin, end) times LANES of boxes2: a vector of them sums over the rows. */
INLINE void grad_columns(int64_t begin, int64_t end, const overlap_job *j, int64_t kind)
{
    for (int64_t m = begin * LANES; m < end * LANES; m += LANES) {
        int64_t n = min64(LANES, j->M - m);
        vbox a = load_planes(j->planes + m, j->stride, kind);
        union {
            vreal v[4];
            real a[4][LANES];
        } sum = {{{0}, {0}, {0}, {0}}};
        vreal part[4];
        for (int64_t i = 0; i < j->N; i++) {
            real d[PLANES] = {0};
            describe(j->boxes1 + 4 * i, kind, d);
            vbox b = splat_box(d);
            pull(&a, &b, load_some(j->grad + i * j->M + m, n), kind, splat(j->eps), part);
            for (int k = 0; k < 4; k++) sum.v[k] += part[k];
        }
        for (int64_t l = 0; l < n; l++)
            for (int k = 0; k < 4; k++) j->out[4 * (m + l) + k] = sum.a[k][l];
    }
}
#define EACH_KIND(f) \
    if (j->kind == IOU) f(begin, end, j, IOU); \
    else if (j->kind == GIOU) f(begin, end, j, GIOU); \
    else if (j->kind == DIOU) f(begin, end, j, DIOU); \
    else f(begin, end, j, CIOU)

static int grad_chunk(int64_t begin, int64_t end, void *context)
{
    const overlap_job *j = context;
    if (j->second) {
        EACH_KIND(grad_columns);
    } else {
        EACH_KIND(grad_rows);
    }
    return HL_OK;
}

/* Parallel over the boxes whose gradient is asked for; each sums over the other list in a fixed order. Reads grad once. */
int HL(box_iou_grad)(const hl_box_iou_grad_plan *p, const real *grad, const real *boxes1, const real *boxes2,
                     real *grad_boxes)
{
    overlap_job job = {.boxes1 = boxes1,
                       .grad = grad,
                       .out = grad_boxes,
                       .N = p->N,
                       .M = p->M,
                       .kind = p->kind,
                       .second = p->second,
                       .eps = (real)p->eps};
    real *planes = make_planes(boxes2, p->M, p->kind, &job.stride);
    if (!planes) return HL_NOMEM;
    job.planes = planes;
    int status = p->second
                     ? hl_parallel_for(round_up(p->M, LANES) / LANES, hl_grain((double)p->N * 80), grad_chunk, &job)
                     : hl_parallel_for(p->N, hl_grain((double)p->M * 8), grad_chunk, &job);
    hl_give(planes);
    return status;
}

INLINE void grad_pairs(int64_t begin, int64_t end, const overlap_job *j, int64_t kind)
{
    for (int64_t i = begin; i < end; i += LANES) {
        int64_t n = min64(LANES, end - i);
        vbox a = gather_boxes(j->boxes1 + 4 * i, n, kind), b = gather_boxes(j->boxes2 + 4 * i, n, kind);
        vreal g = load_some(j->grad + i, n);
        for (int side = 0; side < 2; side++) {
            union {
                vreal v[4];
                real a[4][LANES];
            } u;
            pull(side ? &b : &a, side ? &a : &b, g, kind, splat(j->eps), u.v);
            real *to = (side ? j->out2 : j->out) + 4 * i;
            for (int64_t l = 0; l < n; l++)
                for (int k = 0; k < 4; k++) to[4 * l + k] = u.a[k][l];
        }
    }
}
static int grad_pairs_chunk(int64_t begin, int64_t end, void *context)
{
    const overlap_job *j = context;
    EACH_KIND(grad_pairs);
    return HL_OK;
}

/* Parallel over pairs, in memory order. Reads 9, writes 8. */
int HL(box_iou_paired_grad)(const hl_box_iou_paired_grad_plan *p, const real *grad, const real *boxes1,
                            const real *boxes2, real *grad_boxes1, real *grad_boxes2)
{
    overlap_job job = {.boxes1 = boxes1,
                       .boxes2 = boxes2,
                       .grad = grad,
                       .out = grad_boxes1,
                       .out2 = grad_boxes2,
                       .kind = p->kind,
                       .eps = (real)p->eps};
    return hl_parallel_for(p->N, round_up(hl_grain(40), LANES), grad_pairs_chunk, &job);
}

/* ---- pairs above a threshold ---- */

/* The lanes where IoU > t, decided by the one expression. Most pairs are far from it: where inter < t * union, rounded, the
 * quotient cannot round to more than t, and a vector of such pairs needs no division. */
INLINE unsigned above(const vbox *a, const vbox *b, vreal t)
{
    vreal inter = intersection(a, b), both = (a->area + b->area) - inter;
    if (!lane_bits(~(inter < t * both))) return 0;
    return lane_bits(inter / vmax(both, splat(SMALLEST)) > t);
}

typedef struct {
    const real *boxes1, *planes;
    int64_t M, stride;
    real threshold;
    int64_t *counts, *rows, *cols;
    const int64_t *offsets;
    real *iou;
} sparse_job;

static int sparse_count_chunk(int64_t begin, int64_t end, void *context)
{
    const sparse_job *j = context;
    vreal t = splat(j->threshold);
    for (int64_t i = begin; i < end; i++) {
        real d[PLANES] = {0};
        describe(j->boxes1 + 4 * i, IOU, d);
        vbox a = splat_box(d);
        int64_t n = 0;
        for (int64_t m = 0; m < j->M; m += LANES) {
            vbox b = load_planes(j->planes + m, j->stride, IOU);
            unsigned bits = above(&a, &b, t);
            if (j->M - m < LANES) bits &= (1u << (j->M - m)) - 1;
            n += __builtin_popcount(bits);
        }
        j->counts[i] = n;
    }
    return HL_OK;
}

/* Parallel over rows. boxes2 lies in planes; a vector with no pair near the threshold costs no division. Reads boxes2 once
 * per row from cache, writes 1 number a row. */
int HL(sparse_box_iou_count)(const hl_sparse_box_iou_count_plan *p, const real *boxes1, const real *boxes2,
                             int64_t *counts)
{
    sparse_job job = {.boxes1 = boxes1, .M = p->M, .threshold = (real)p->threshold, .counts = counts};
    real *planes = make_planes(boxes2, p->M, IOU, &job.stride);
    if (!planes) return HL_NOMEM;
    job.planes = planes;
    int status = hl_parallel_for(p->N, hl_grain((double)p->M * 2), sparse_count_chunk, &job);
    hl_give(planes);
    return status;
}

static int sparse_chunk(int64_t begin, int64_t end, void *context)
{
    const sparse_job *j = context;
    vreal t = splat(j->threshold);
    for (int64_t i = begin; i < end; i++) {
        int64_t at = j->offsets[i], stop = j->offsets[i + 1];
        if (at == stop) continue;
        real d[PLANES] = {0};
        describe(j->boxes1 + 4 * i, IOU, d);
        vbox a = splat_box(d);
        for (int64_t m = 0; m < j->M && at < stop; m += LANES) {
            vbox b = load_planes(j->planes + m, j->stride, IOU);
            unsigned bits = above(&a, &b, t);
            if (j->M - m < LANES) bits &= (1u << (j->M - m)) - 1;
            if (!bits) continue;
            union {
                vreal v;
                real a[LANES];
            } iou = {.v = measure(&a, &b, IOU, t)};
            for (; bits && at < stop; bits &= bits - 1, at++) {
                int lane = __builtin_ctz(bits);
                j->rows[at] = i;
                j->cols[at] = m + lane;
                j->iou[at] = iou.a[lane];
            }
        }
    }
    return HL_OK;
}

/* As the count; rows with nothing to find are passed over. Writes 3 values a pair. */
int HL(sparse_box_iou)(const hl_sparse_box_iou_plan *p, const real *boxes1, const real *boxes2, const int64_t *counts,
                       int64_t *rows, int64_t *cols, real *iou)
{
    sparse_job job = {
        .boxes1 = boxes1, .M = p->M, .threshold = (real)p->threshold, .rows = rows, .cols = cols, .iou = iou};
    int64_t *offsets = hl_take((size_t)(p->N + 1) * sizeof(int64_t));
    real *planes = make_planes(boxes2, p->M, IOU, &job.stride);
    int status = HL_NOMEM;
    if (offsets && planes) {
        offsets[0] = 0;
        for (int64_t i = 0; i < p->N; i++) offsets[i + 1] = min64(offsets[i] + counts[i], p->K);
        job.planes = planes;
        job.offsets = offsets;
        status = hl_parallel_for(p->N, hl_grain((double)p->M * 2), sparse_chunk, &job);
    }
    hl_give(planes);
    hl_give(offsets);
    return status;
}

/* ---- sorting ---- */

/* A key to sort by and where it came from; 32 bits count the boxes of a float32 call (2^32 of them are 64 GB). */
typedef struct { ukey key, index; } ranked;
typedef struct { uint64_t key, index; } grouped;

/* Stable sort by `bits` low bits of the key, digit by digit from the lowest; a digit that all keys share is passed over.
 * The result is in a or b, which is returned. */
#define RADIX_SORT(NAME, ITEM) \
    static ITEM *NAME(ITEM *a, ITEM *b, int64_t n, int bits) \
    { \
        const int digit = n < 8192 ? 8 : 11; \
        const uint64_t mask = ((uint64_t)1 << digit) - 1; \
        for (int shift = 0; shift < bits; shift += digit) { \
            int64_t count[2048] = {0}, sum = 0; \
            for (int64_t i = 0; i < n; i++) count[a[i].key >> shift & mask]++; \
            if (n && count[a[0].key >> shift & mask] == n) continue; \
            for (uint64_t d = 0; d <= mask; d++) { \
                int64_t c = count[d]; \
                count[d] = sum; \
                sum += c; \
            } \
            for (int64_t i = 0; i < n; i++) b[count[a[i].key >> shift & mask]++] = a[i]; \
            ITEM *swap = a; \
            a = b; \
            b = swap; \
        } \
        return a; \
    }
RADIX_SORT(sort_ranked, ranked)
RADIX_SORT(sort_grouped, grouped)

/* Ascending in the key is descending in the score: both zeros alike, NaN last. */
INLINE ukey score_key(real score)
{
    union {
        real f;
        ukey u;
    } v = {.f = score + (real)0};
    const ukey sign = (ukey)1 << (8 * sizeof(ukey) - 1);
    if (score != score) return ~(ukey)0;
    return v.u & sign ? v.u : v.u ^ (ukey)~sign;
}

/* ---- suppression ---- */

/* Values of a kept box: corners and area. Up to FEW kept boxes, looking at all of them (24 vectors of 16) costs no more than
 * finding those near by. */
enum { FIELDS = 5, FEW = 384 };
#define TINY_AREA ((real)(HL_F32 ? 1e-30 : 1e-280))

/* The boxes of one group by decreasing score: plane k of box i is boxes[k * stride + i]; alive[i] is the answer. */
typedef struct {
    const real *boxes;
    int64_t stride, n, limit;
    real threshold;
    uint8_t *alive;
} segment;

INLINE vbox splat_field(const segment *s, int64_t i)
{
    const real *b = s->boxes + i;
    real d[PLANES] = {b[0], b[s->stride], b[2 * s->stride], b[3 * s->stride], b[4 * s->stride]};
    return splat_box(d);
}
/* Block of LANES kept boxes: [FIELDS][LANES]. */
INLINE vbox load_block(const real *block)
{
    return (vbox){load(block),
                  load(block + LANES),
                  load(block + 2 * LANES),
                  load(block + 3 * LANES),
                  load(block + 4 * LANES),
                  {0},
                  {0},
                  {0}};
}
/* Box i becomes lane `lane` of the block; a block begins with its lane 0, the others empty. */
INLINE void add_to_block(real *block, int64_t lane, const segment *s, int64_t i)
{
    if (!lane)
        for (int k = 0; k < FIELDS; k++) store(block + k * LANES, splat((real)0));
    for (int k = 0; k < FIELDS; k++) block[k * LANES + lane] = s->boxes[k * s->stride + i];
}

/* Every box against all kept before it, in blocks of LANES; stops at the first that suppresses it. Ends before the box that
 * would meet more than `most` others, and returns that box or n. */
static int64_t suppress_all(const segment *s, real *blocks, int64_t most)
{
    int64_t kept = 0, listed = 0;
    const vreal t = splat(s->threshold);
    for (int64_t i = 0; i < s->n; i++) {
        if (kept == s->limit) {
            memset(s->alive + i, 0, (size_t)(s->n - i));
            break;
        }
        if (listed > most) return i;
        vbox a = splat_field(s, i);
        unsigned hit = 0;
        for (int64_t at = 0; at < listed && !hit; at += LANES) {
            vbox b = load_block(blocks + at * FIELDS);
            hit = above(&a, &b, t);
            if (hit && listed - at < LANES) hit &= (1u << (listed - at)) - 1;
        }
        s->alive[i] = !hit;
        if (hit) continue;
        kept++;
        /* An empty or infinite box overlaps nothing, unless the threshold is below 0. */
        real area = s->boxes[4 * s->stride + i];
        if ((area > 0 && area <= REAL_MAX) || s->threshold < 0) {
            add_to_block(blocks + listed / LANES * LANES * FIELDS, listed % LANES, s, i);
            listed++;
        }
    }
    return s->n;
}

/* A grid over the centres. A box of width w has IoU > t only with boxes whose centre lies within reach * w of its own along
 * x, reach = (1 - t) max(1, 1 / (2 t)), and the same along y; the cells that this touches are all that is looked at. */
typedef struct {
    double low, scale; /* cell = (centre - low) * scale */
    int64_t cells;
} grid_axis;

static double reach_of(double t) { return (1 - t) * fmax(1.0, 0.5 / t); }

static int64_t cell_of(const grid_axis *g, double centre)
{
    double at = (centre - g->low) * g->scale, top = (double)(g->cells - 1);
    return (int64_t)(at > 0 ? (at < top ? at : top) : 0.0);
}

static void sort_sample(double *v, int n)
{
    for (int i = 1; i < n; i++) {
        double x = v[i];
        int k = i;
        for (; k > 0 && v[k - 1] > x; k--) v[k] = v[k - 1];
        v[k] = x;
    }
}

INLINE int regular(real area) { return area > 0 && area <= REAL_MAX; }
INLINE double centre_of(const segment *s, int axis, int64_t i)
{
    return 0.5 * (double)s->boxes[axis * s->stride + i] + 0.5 * (double)s->boxes[(axis + 2) * s->stride + i];
}
INLINE double size_of(const segment *s, int axis, int64_t i)
{
    return (double)s->boxes[(axis + 2) * s->stride + i] - (double)s->boxes[axis * s->stride + i];
}

/* Cells about as large as the reach of a middling box, over the middle of the centres (the few outside fall into the outer
 * cells), and no more of them than give each some boxes. False where there is nothing to divide. */
static int choose_grid(const segment *s, double reach, grid_axis grid[2])
{
    enum { SAMPLES = 63 };
    double extent[2], cell[2];
    int64_t step = s->n / SAMPLES + 1;
    for (int axis = 0; axis < 2; axis++) {
        double centre[SAMPLES], size[SAMPLES];
        int n = 0;
        for (int64_t i = 0; i < s->n && n < SAMPLES; i += step) {
            if (!regular(s->boxes[4 * s->stride + i])) continue;
            centre[n] = centre_of(s, axis, i);
            size[n++] = size_of(s, axis, i);
        }
        if (n < 8) return 0;
        sort_sample(centre, n);
        sort_sample(size, n);
        grid[axis].low = centre[1];
        extent[axis] = centre[n - 2] - centre[1];
        cell[axis] = reach * size[n / 2];
        if (!(cell[axis] > 0)) return 0;
    }
    double wanted = 1, most = (double)s->n / 16 + 1;
    for (int axis = 0; axis < 2; axis++) wanted *= fmax(1.0, extent[axis] / cell[axis]);
    double grow = wanted > most ? sqrt(wanted / most) : 1.0;
    for (int axis = 0; axis < 2; axis++) {
        double cells = fmin(fmax(1.0, extent[axis] / (cell[axis] * grow)), most);
        grid[axis].cells = (int64_t)cells;
        grid[axis].scale = extent[axis] > 0 ? (double)grid[axis].cells / extent[axis] : 0.0;
    }
    return grid[0].cells * grid[1].cells > 3;
}

/* Does one of so many kept boxes, in blocks from there on, suppress box a? An empty lane overlaps nothing. */
INLINE int meets(const vbox *a, const real *blocks, int64_t used, vreal t)
{
    for (int64_t at = 0; at < used; at += LANES) {
        vbox b = load_block(blocks + at * FIELDS);
        if (above(a, &b, t)) return 1;
    }
    return 0;
}

/* Does a kept box suppress box i of cell `home`? The boxes of cell c are blocks from start[c] on, used[c] of them. */
static int near_kept(const segment *s, int64_t i, int64_t home, const grid_axis grid[2], const int64_t *start,
                     const int64_t *used, const real *blocks)
{
    const double t = (double)s->threshold;
    const vreal vt = splat(s->threshold);
    const vbox a = splat_field(s, i);
    if (meets(&a, blocks + start[home] * FIELDS, used[home], vt)) return 1; /* most are suppressed from there */
    int64_t low[2], high[2];
    for (int axis = 0; axis < 2; axis++) {
        double w = size_of(s, axis, i), c = centre_of(s, axis, i);
        double magnitude =
            fabs((double)s->boxes[axis * s->stride + i]) + fabs((double)s->boxes[(axis + 2) * s->stride + i]);
        double r = reach_of(t) * w * 1.001 + 64 * (double)EPSILON * (magnitude + w / t);
        low[axis] = cell_of(&grid[axis], c - r);
        high[axis] = cell_of(&grid[axis], c + r);
    }
    for (int64_t y = low[1]; y <= high[1]; y++)
        for (int64_t c = y * grid[0].cells + low[0]; c <= y * grid[0].cells + high[0]; c++)
            if (c != home && meets(&a, blocks + start[c] * FIELDS, used[c], vt)) return 1;
    return 0;
}

/* The boxes from `first` on; those before are decided. HL_INVALID where a grid cannot be had and every pair must be looked
 * at. */
static int suppress_by_grid(const segment *s, int64_t first)
{
    const double t = (double)s->threshold;
    grid_axis grid[2];
    if (!(t >= 0.05 && t < 1) || !choose_grid(s, reach_of(t), grid)) return HL_INVALID;
    const int64_t cells = grid[0].cells * grid[1].cells;
    int32_t *cell = hl_take((size_t)s->n * sizeof(int32_t));
    int64_t *start = hl_take((size_t)(cells + 1) * sizeof(int64_t)), *used = hl_take((size_t)cells * sizeof(int64_t));
    real *blocks = NULL;
    int status = HL_NOMEM;
    if (!cell || !start || !used) goto out;
    memset(used, 0, (size_t)cells * sizeof(int64_t));
    for (int64_t i = 0; i < s->n; i++) {
        real area = s->boxes[4 * s->stride + i];
        if (area > 0 && area < TINY_AREA) { /* rounding of the areas themselves may make any IoU of it */
            status = HL_INVALID;
            goto out;
        }
        cell[i] = -1;
        if (!regular(area)) continue;
        cell[i] =
            (int32_t)(cell_of(&grid[1], centre_of(s, 1, i)) * grid[0].cells + cell_of(&grid[0], centre_of(s, 0, i)));
        used[cell[i]]++;
    }
    start[0] = 0;
    for (int64_t c = 0; c < cells; c++) {
        start[c + 1] = start[c] + round_up(used[c], LANES);
        used[c] = 0;
    }
    blocks = hl_take((size_t)start[cells] * FIELDS * sizeof(real));
    if (!blocks) goto out;
    int64_t kept = 0;
    for (int64_t i = 0; i < s->n; i++) {
        if (kept == s->limit) {
            memset(s->alive + i, 0, (size_t)(s->n - i));
            break;
        }
        if (i >= first) s->alive[i] = cell[i] < 0 || !near_kept(s, i, cell[i], grid, start, used, blocks);
        kept += s->alive[i];
        if (!s->alive[i] || cell[i] < 0) continue; /* empty or not finite: overlaps nothing */
        int64_t c = cell[i], lane = used[c] % LANES;
        add_to_block(blocks + (start[c] + used[c] - lane) * FIELDS, lane, s, i);
        used[c]++;
    }
    status = HL_OK;
out:
    hl_give(blocks);
    hl_give(used);
    hl_give(start);
    hl_give(cell);
    return status;
}

static int suppress(const segment *s, real *blocks)
{
    int64_t first = suppress_all(s, blocks, FEW);
    if (first == s->n) return HL_OK;
    int status = suppress_by_grid(s, first);
    if (status != HL_INVALID) return status;
    suppress_all(s, blocks, s->n);
    return HL_OK;
}

typedef struct {
    segment all;
    const int64_t *starts; /* of the groups, and the end of the last */
    int64_t largest;
} nms_job;

static int nms_chunk(int64_t begin, int64_t end, void *context)
{
    const nms_job *j = context;
    real *blocks = hl_take((size_t)round_up(j->largest, LANES) * FIELDS * sizeof(real));
    if (!blocks) return HL_NOMEM;
    int status = HL_OK;
    for (int64_t g = begin; g < end && status == HL_OK; g++) {
        segment s = j->all;
        s.boxes += j->starts[g];
        s.alive += j->starts[g];
        s.n = j->starts[g + 1] - j->starts[g];
        status = suppress(&s, blocks);
    }
    hl_give(blocks);
    return status;
}

/* Ranks by score; returns how many boxes are above the score threshold. */
static int64_t rank_scores(const real *scores, int64_t n, real lowest, ranked *items)
{
    int64_t m = 0;
    for (int64_t i = 0; i < n; i++) {
        items[m] = (ranked){score_key(scores[i]), (ukey)i};
        m += lowest == -(real)INFINITY || scores[i] > lowest;
    }
    return m;
}

static int bits_of(uint64_t range) { return range ? 64 - __builtin_clzll(range) : 1; }

/* Parallel over groups. Sorts by score, then, where there are groups, by group (both stable and linear in the number of
 * boxes); a group's boxes lie in planes by decreasing score. A box meets only kept boxes near it (a grid over the centres),
 * LANES at a time, until one suppresses it. Reads each box once, writes the indices. Source: Felzenszwalb et al. (2010). */
int HL(nms)(const hl_nms_plan *p, const real *boxes, const real *scores, const int64_t *groups, int64_t *keep,
            int64_t *count)
{
    const int64_t N = p->N;
    for (int64_t i = 0; i < N; i++) keep[i] = -1;
    *count = 0;
    if (!N || p->max_output <= 0) return HL_OK;
    if (HL_F32 && N > (int64_t)UINT32_MAX) return HL_NOMEM;
    int status = HL_NOMEM;
    ranked *items = hl_take(2 * (size_t)N * sizeof(ranked));
    grouped *members = groups ? hl_take(2 * (size_t)N * sizeof(grouped)) : NULL;
    int64_t *starts = hl_take((size_t)(groups ? N + 1 : 2) * sizeof(int64_t)), segments = 1, largest;
    const int64_t stride = round_up(N, LANES);
    real *planes = hl_take((size_t)stride * FIELDS * sizeof(real));
    uint8_t *alive = hl_take((size_t)(groups ? 2 * N : N));
    if (!items || (groups && !members) || !starts || !planes || !alive) goto out;

    int64_t n = rank_scores(scores, N, (real)p->score_threshold, items);
    const ranked *order = sort_ranked(items, items + N, n, 8 * (int)sizeof(ukey));
    const grouped *grouping = NULL;
    starts[0] = 0;
    starts[1] = largest = n;
    if (groups && n) {
        int64_t low = groups[order[0].index], high = low;
        for (int64_t i = 0; i < n; i++) {
            low = min64(low, groups[order[i].index]);
            high = max64(high, groups[order[i].index]);
        }
        for (int64_t i = 0; i < n; i++)
            members[i] = (grouped){(uint64_t)groups[order[i].index] - (uint64_t)low, (uint64_t)i};
        grouping = sort_grouped(members, members + N, n, bits_of((uint64_t)high - (uint64_t)low));
        segments = largest = 0;
        for (int64_t i = 1; i <= n; i++)
            if (i == n || grouping[i].key != grouping[i - 1].key) {
                starts[++segments] = i;
                largest = max64(largest, i - starts[segments - 1]);
            }
    }
    for (int64_t i = 0; i < n; i++) {
        const real *b = boxes + 4 * (int64_t)order[grouping ? (int64_t)grouping[i].index : i].index;
        for (int k = 0; k < 4; k++) planes[k * stride + i] = b[k];
        planes[4 * stride + i] = rmax(b[2] - b[0], (real)0) * rmax(b[3] - b[1], (real)0);
    }
    nms_job job = {{planes, stride, n, p->max_output, (real)p->iou_threshold, alive}, starts, largest};
    status = hl_parallel_for(segments, hl_grain(200.0 * (double)n / (double)segments), nms_chunk, &job);
    if (status != HL_OK) goto out;
    const uint8_t *by_rank = alive;
    if (grouping) {
        for (int64_t i = 0; i < n; i++) alive[N + (int64_t)grouping[i].index] = alive[i];
        by_rank = alive + N;
    }
    int64_t kept = 0;
    for (int64_t i = 0; i < n && kept < p->max_output; i++)
        if (by_rank[i]) keep[kept++] = (int64_t)order[i].index;
    *count = kept;
out:
    hl_give(alive);
    hl_give(planes);
    hl_give(starts);
    hl_give(members);
    hl_give(items);
    return status;
}

/* One thread: each box taken depends on all before it. The boxes lie in planes; one pass lowers the scores, drops what fell
 * below the threshold and finds the next best, LANES at a time. Reads 6 values, writes 1 a box for each box taken.
 * Source: Bodla et al., Soft-NMS (2017). */
int HL(soft_nms)(const hl_soft_nms_plan *p, const real *boxes, const real *scores, int64_t *keep, real *kept_scores,
                 int64_t *count)
{
    const int64_t N = p->N;
    int64_t stride, n = 0;
    real *planes = make_planes(boxes, N, IOU, &stride), *left = hl_take((size_t)stride * sizeof(real));
    if (!planes || !left) {
        hl_give(planes);
        hl_give(left);
        return HL_NOMEM;
    }
    const vreal dead = splat(-(real)INFINITY), one = splat((real)1), threshold = splat((real)p->iou_threshold);
    const vreal lowest = splat((real)p->score_threshold), sigma = splat((real)p->sigma);
    for (int64_t i = 0; i < stride; i++) left[i] = i < N ? scores[i] : -(real)INFINITY;
    for (int64_t taken = -1;;) {
        vbox a = {{0}, {0}, {0}, {0}, {0}, {0}, {0}, {0}};
        if (taken >= 0) {
            real d[PLANES] = {0};
            describe(boxes + 4 * taken, IOU, d);
            a = splat_box(d);
        }
        vreal best = dead;
        vint at = {0}, here = {0};
        for (int64_t i = 0; i < N; i += LANES, here += 1) {
            vreal s = load(left + i);
            if (taken >= 0) {
                vbox b = load_planes(planes + i, stride, IOU);
                vreal iou = measure(&a, &b, IOU, one), lowered;
                if (p->gaussian) lowered = vexp(-(iou * iou) / sigma);
                else lowered = blend(iou > threshold, one - iou, one);
                s *= blend(iou == iou, lowered, one);
            }
            s = blend(s > lowest, s, dead);
            store(left + i, s);
            at = (vint)blend(s > best, (vreal)here, (vreal)at);
            best = blend(s > best, s, best);
        }
        real top = max_lanes(best);
        if (!(top > -(real)INFINITY)) break;
        union {
            vreal v;
            real a[LANES];
        } value = {.v = best};
        union {
            vint v;
            ireal a[LANES];
        } block = {.v = at};
        taken = INT64_MAX;
        for (int l = 0; l < LANES; l++)
            if (value.a[l] == top) taken = min64(taken, (int64_t)block.a[l] * LANES + l);
        keep[n] = taken;
        kept_scores[n++] = top;
        left[taken] = -(real)INFINITY;
    }
    *count = n;
    for (; n < N; n++) {
        keep[n] = -1;
        kept_scores[n] = (real)0;
    }
    hl_give(left);
    hl_give(planes);
    return HL_OK;
}

/* ---- RoIs ---- */

/* What a bin reads along one axis: pixels and weights. With `maximum` they come in pairs, one a sample. */
typedef struct {
    int32_t pixel;
    real weight;
} tap;

typedef struct {
    const real *input, *boxes, *grad;
    real *out;
    int64_t N, C, H, W, K, PH, PW;
    int64_t groups; /* of LANES channels */
    const int64_t *order, *of_image; /* the RoIs by image: order[of_image[n] .. of_image[n + 1]) */
    const int64_t *starts; /* the taps of bin (k, i) begin at starts[k * (PH + PW) + i]; rows first, then columns */
    const tap *taps;
    const real *share; /* 1 / samples of a bin of RoI k; NaN where the RoI is not finite */
    const int32_t *edges; /* of roi_pool: begin and end of each bin */
    const uint8_t *outside; /* a bin has samples outside the input */
    int maximum, pool;
} roi_job;

/* bad = 1 + the first RoI whose image is none of the N. */
static int check_images(const real *boxes, int64_t K, int64_t N, int64_t *bad)
{
    *bad = 0;
    for (int64_t k = 0; k < K; k++) {
        real image = boxes[5 * k];
        if (!(image >= (real)0 && image < (real)N && (real)(int64_t)image == image)) {
            *bad = k + 1;
            return 0;
        }
    }
    return 1;
}

/* The RoIs in order of image, stable. */
static void sort_by_image(const real *boxes, int64_t K, int64_t N, int64_t *order, int64_t *of_image)
{
    memset(of_image, 0, (size_t)(N + 2) * sizeof(int64_t));
    for (int64_t k = 0; k < K; k++) of_image[(int64_t)boxes[5 * k] + 2]++;
    for (int64_t n = 0; n < N; n++) of_image[n + 2] += of_image[n + 1];
    for (int64_t k = 0; k < K; k++) order[of_image[(int64_t)boxes[5 * k] + 1]++] = k;
}

#define LARGEST_GRID (1 << 20)

/* Samples of one bin: the taps are written to `out` unless it is NULL; returns how many there are. `*missed` says whether a
 * sample lies outside. */
static int64_t bin_taps(real first, real step, int64_t grid, int64_t size, int maximum, tap *out, int *missed)
{
    int64_t n = 0, low = 0, high = grid, inside = 0;
    double between = (double)step / (double)(grid > 0 ? grid : 1);
    if (between > 0) { /* only these can lie in [-1, size] */
        low = (int64_t)fmin(fmax((-1.0 - (double)first) / between - 2, 0.0), (double)grid);
        high = (int64_t)fmin(fmax(((double)size - (double)first) / between + 2, 0.0), (double)grid);
    }
    for (int64_t i = low; i < high; i++) {
        real at = first + ((real)i + (real)0.5) * step / (real)grid;
        if (!(at >= (real)-1 && at <= (real)size)) continue;
        inside++;
        at = rmax(at, (real)0);
        int32_t pixel = (int32_t)min64((int64_t)at, size - 1), next = (int32_t)min64(pixel + 1, size - 1);
        real upper = pixel < size - 1 ? at - (real)pixel : (real)0;
        if (maximum) {
            if (out) {
                out[n] = (tap){pixel, (real)1 - upper};
                out[n + 1] = (tap){next, upper};
            }
            n += 2;
            continue;
        }
        /* The pixels grow from sample to sample: one that repeats is the last or the one before it. */
        int64_t found = n;
        if (!out) {
            n += 2;
            continue;
        }
        for (int64_t back = n - 1; back >= 0 && back >= n - 2; back--)
            if (out[back].pixel == pixel) found = back;
        if (found == n) out[n++] = (tap){pixel, (real)1 - upper};
        else out[found].weight += (real)1 - upper;
        for (found = n - 1; found >= 0 && found >= n - 2 && out[found].pixel != next; found--) {}
        if (found < 0 || out[found].pixel != next) out[n++] = (tap){next, upper};
        else out[found].weight += upper;
    }
    *missed = inside < grid;
    return n;
}

typedef struct {
    real x1, y1, w, h;
    int64_t grid_h, grid_w;
    int finite;
} region;

static region find_region(const real *box, real scale, int64_t ratio, int64_t aligned, int64_t PH, int64_t PW)
{
    real offset = aligned ? (real)0.5 : (real)0;
    real x1 = box[1] * scale - offset, y1 = box[2] * scale - offset, x2 = box[3] * scale - offset,
         y2 = box[4] * scale - offset;
    region r = {x1, y1, x2 - x1, y2 - y1, ratio, ratio, 0};
    if (!aligned) {
        r.w = rmax(r.w, (real)1);
        r.h = rmax(r.h, (real)1);
    }
    real sum = x1 + y1 + r.w + r.h;
    r.finite = sum - sum == 0;
    if (ratio <= 0 && r.finite) {
        r.grid_h = (int64_t)rmax(rmin((real)ceil((double)(r.h / (real)PH)), (real)LARGEST_GRID), (real)0);
        r.grid_w = (int64_t)rmax(rmin((real)ceil((double)(r.w / (real)PW)), (real)LARGEST_GRID), (real)0);
    }
    return r;
}

/* The taps of every bin of every RoI; the caller gives back starts, taps, share, outside. */
typedef struct {
    int64_t *starts;
    tap *taps;
    real *share;
    uint8_t *outside;
} tap_table;

static void give_table(tap_table *t)
{
    hl_give(t->starts);
    hl_give(t->taps);
    hl_give(t->share);
    hl_give(t->outside);
}

static int make_table(tap_table *t, const roi_job *j, real scale, int64_t ratio, int64_t aligned)
{
    const int64_t bins = j->PH + j->PW;
    t->starts = hl_take((size_t)(j->K * bins + 1) * sizeof(int64_t));
    t->share = hl_take((size_t)(j->K + 1) * sizeof(real));
    t->outside = hl_take((size_t)(j->K * bins + 1));
    t->taps = NULL;
    if (!t->starts || !t->share || !t->outside) return HL_NOMEM;
    for (int fill = 0; fill < 2; fill++) { /* first the room that is needed, then the taps */
        int64_t at = 0;
        for (int64_t k = 0; k < j->K; k++) {
            region r = find_region(j->boxes + 5 * k, scale, ratio, aligned, j->PH, j->PW);
            int64_t samples = max64(r.grid_h * r.grid_w, 1);
            t->share[k] = r.finite ? j->maximum ? (real)1 : (real)1 / (real)samples : (real)NAN;
            for (int64_t b = 0; b < bins; b++) {
                int vertical = b < j->PH, missed = 0;
                real step = vertical ? r.h / (real)j->PH : r.w / (real)j->PW;
                real first = vertical ? r.y1 + (real)b * step : r.x1 + (real)(b - j->PH) * step;
                if (fill) t->starts[k * bins + b] = at;
                if (r.finite)
                    at += bin_taps(first, step, vertical ? r.grid_h : r.grid_w, vertical ? j->H : j->W, j->maximum,
                                   fill ? t->taps + at : NULL, &missed);
                t->outside[k * bins + b] = (uint8_t)missed;
            }
        }
        if (fill) t->starts[j->K * bins] = at;
        else if (!(t->taps = hl_take((size_t)(at + 1) * sizeof(tap)))) return HL_NOMEM;
    }
    return HL_OK;
}

/* Channels [c, c + LANES) of one image as [H*W][LANES]; zero behind the last channel. */
static void channels_last(const real *image, int64_t c, int64_t C, int64_t pixels, real *slab)
{
    int64_t n = min64(LANES, C - c);
    if (n < LANES) memset(slab, 0, (size_t)(pixels * LANES) * sizeof(real));
    enum { TILE = 64 };
    for (int64_t p = 0; p < pixels; p += TILE) {
        int64_t end = min64(p + TILE, pixels);
        for (int64_t l = 0; l < n; l++)
            for (int64_t i = p; i < end; i++) slab[i * LANES + l] = image[(c + l) * pixels + i];
    }
}
static void channels_first(const real *slab, int64_t n, int64_t pixels, real *image)
{
    enum { TILE = 64 };
    for (int64_t p = 0; p < pixels; p += TILE) {
        int64_t end = min64(p + TILE, pixels);
        for (int64_t l = 0; l < n; l++)
            for (int64_t i = p; i < end; i++) image[l * pixels + i] = slab[i * LANES + l];
    }
}

/* a where it is larger or a NaN, unless b is a NaN already. */
INLINE vint beats(vreal a, vreal b) { return (a > b) | ((a != a) & (b == b)); }

INLINE vreal sample(const real *slab, int64_t W, const tap *y, const tap *x)
{
    const real *top = slab + y[0].pixel * W * LANES, *bottom = slab + y[1].pixel * W * LANES;
    const int64_t left = x[0].pixel * LANES, right = x[1].pixel * LANES;
    return load(top + left) * splat(y[0].weight * x[0].weight) + load(top + right) * splat(y[0].weight * x[1].weight) +
           load(bottom + left) * splat(y[1].weight * x[0].weight) +
           load(bottom + right) * splat(y[1].weight * x[1].weight);
}

/* The largest sample of a bin, and which (-1: one outside, that counts as 0). */
INLINE vreal largest_sample(const real *slab, int64_t W, const tap *y, const tap *y_end, const tap *x, const tap *x_end,
                            int outside, vint *which)
{
    vreal best = splat((real)0);
    vint at = {0}, here = {0};
    int any = 0;
    for (const tap *v = y; v < y_end; v += 2)
        for (const tap *u = x; u < x_end; u += 2, here += 1) {
            vreal s = sample(slab, W, v, u);
            vint better = any ? beats(s, best) : (vint)(s == s) | (vint)(s != s);
            best = blend(better, s, best);
            at = (vint)blend(better, (vreal)here, (vreal)at);
            any = 1;
        }
    if (outside || !any) {
        vint better = any ? beats(splat((real)0), best) : ~(vint){0};
        best = blend(better, splat((real)0), best);
        at = (vint)blend(better, (vreal) ~(vint){0}, (vreal)at);
    }
    *which = at;
    return best;
}

INLINE vreal align_bin(const roi_job *j, const real *slab, int64_t k, int64_t ph, int64_t pw)
{
    const int64_t *s = j->starts + k * (j->PH + j->PW);
    const tap *y = j->taps + s[ph], *y_end = j->taps + s[ph + 1], *x = j->taps + s[j->PH + pw],
              *x_end = j->taps + s[j->PH + pw + 1];
    if (j->maximum) {
        vint which;
        const uint8_t *missed = j->outside + k * (j->PH + j->PW);
        return largest_sample(slab, j->W, y, y_end, x, x_end, missed[ph] | missed[j->PH + pw], &which) *
               splat(j->share[k]);
    }
    vreal sum = splat((real)0);
    for (; y < y_end; y++) {
        const real *row = slab + y->pixel * j->W * LANES;
        vreal line = splat((real)0);
        for (const tap *u = x; u < x_end; u++) line += load(row + u->pixel * LANES) * splat(u->weight);
        sum += line * splat(y->weight);
    }
    return sum * splat(j->share[k]);
}

/* The largest pixel of a bin, and which; 0 and -1 for an empty one. */
INLINE vreal largest_pixel(const real *slab, int64_t W, const int32_t *y, const int32_t *x, vint *which)
{
    vreal best = splat((real)0);
    vint at = ~(vint){0};
    int any = 0;
    for (int32_t v = y[0]; v < y[1]; v++)
        for (int32_t u = x[0]; u < x[1]; u++) {
            ireal here = (ireal)(v * W + u);
            vreal s = load(slab + (v * W + u) * LANES);
            vint better = any ? beats(s, best) : ~(vint){0};
            best = blend(better, s, best);
            at = (vint)blend(better, (vreal)(here - (vint){0}), (vreal)at);
            any = 1;
        }
    *which = at;
    return best;
}

INLINE vreal pool_bin(const roi_job *j, const real *slab, int64_t k, int64_t ph, int64_t pw, vint *which)
{
    const int32_t *e = j->edges + k * 2 * (j->PH + j->PW);
    return largest_pixel(slab, j->W, e + 2 * ph, e + 2 * (j->PH + pw), which);
}

/* Bins [PH*PW][LANES] of one RoI to n channels of the output, and back. */
static void bins_out(const real *bins, int64_t n, int64_t count, real *out)
{
    for (int64_t l = 0; l < n; l++)
        for (int64_t b = 0; b < count; b++) out[l * count + b] = bins[b * LANES + l];
}
static void bins_in(const real *grad, int64_t n, int64_t count, real *bins)
{
    for (int64_t l = 0; l < n; l++)
        for (int64_t b = 0; b < count; b++) bins[b * LANES + l] = grad[l * count + b];
}

static int roi_chunk(int64_t begin, int64_t end, void *context)
{
    const roi_job *j = context;
    const int64_t pixels = j->H * j->W, count = j->PH * j->PW;
    real *slab = hl_take((size_t)(pixels * LANES) * sizeof(real)),
         *bins = hl_take((size_t)(count * LANES) * sizeof(real));
    int status = slab && bins ? HL_OK : HL_NOMEM;
    for (int64_t t = begin; t < end && status == HL_OK; t++) {
        const int64_t image = t / j->groups, c = t % j->groups * LANES, n = min64(LANES, j->C - c);
        if (j->of_image[image] == j->of_image[image + 1]) continue;
        channels_last(j->input + image * j->C * pixels, c, j->C, pixels, slab);
        for (int64_t o = j->of_image[image]; o < j->of_image[image + 1]; o++) {
            const int64_t k = j->order[o];
            vint which;
            for (int64_t ph = 0; ph < j->PH; ph++)
                for (int64_t pw = 0; pw < j->PW; pw++)
                    store(bins + (ph * j->PW + pw) * LANES,
                          j->pool ? pool_bin(j, slab, k, ph, pw, &which) + splat(j->share[k])
                                  : align_bin(j, slab, k, ph, pw));
            bins_out(bins, n, count, j->out + (k * j->C + c) * count);
        }
    }
    hl_give(bins);
    hl_give(slab);
    return status;
}

/* Adds g to lane l of the pixel. */
INLINE void add_lane(real *slab, int64_t pixel, int l, real g) { slab[pixel * LANES + l] += g; }

static void roi_bin_grad(const roi_job *j, const real *slab, real *sums, int64_t k, int64_t ph, int64_t pw, vreal g)
{
    union {
        vreal v;
        real a[LANES];
    } part = {.v = g};
    union {
        vint v;
        ireal a[LANES];
    } which;
    if (j->pool) {
        pool_bin(j, slab, k, ph, pw, &which.v);
        for (int l = 0; l < LANES; l++)
            if (which.a[l] >= 0) add_lane(sums, (int64_t)which.a[l], l, part.a[l]);
        return;
    }
    const int64_t *s = j->starts + k * (j->PH + j->PW);
    const tap *y = j->taps + s[ph], *y_end = j->taps + s[ph + 1], *x = j->taps + s[j->PH + pw],
              *x_end = j->taps + s[j->PH + pw + 1];
    if (!j->maximum) {
        g *= splat(j->share[k]);
        for (; y < y_end; y++)
            for (const tap *u = x; u < x_end; u++) {
                real *to = sums + (y->pixel * j->W + u->pixel) * LANES;
                store(to, load(to) + g * splat(y->weight * u->weight));
            }
        return;
    }
    const uint8_t *missed = j->outside + k * (j->PH + j->PW);
    largest_sample(slab, j->W, y, y_end, x, x_end, missed[ph] | missed[j->PH + pw], &which.v);
    const int64_t wide = (x_end - x) / 2;
    for (int l = 0; l < LANES; l++) {
        if (which.a[l] < 0) continue;
        const tap *v = y + 2 * ((int64_t)which.a[l] / wide), *u = x + 2 * ((int64_t)which.a[l] % wide);
        for (int corner = 0; corner < 4; corner++) {
            const tap *r = v + corner / 2, *q = u + corner % 2;
            add_lane(sums, r->pixel * j->W + q->pixel, l, part.a[l] * (r->weight * q->weight));
        }
    }
}

static int roi_grad_chunk(int64_t begin, int64_t end, void *context)
{
    const roi_job *j = context;
    const int64_t pixels = j->H * j->W, count = j->PH * j->PW;
    const size_t slab_bytes = (size_t)(pixels * LANES) * sizeof(real),
                 bins_bytes = (size_t)(count * LANES) * sizeof(real);
    real *slab = hl_take(slab_bytes), *sums = hl_take(slab_bytes), *bins = hl_take(bins_bytes);
    int status = slab && sums && bins ? HL_OK : HL_NOMEM;
    for (int64_t t = begin; t < end && status == HL_OK; t++) {
        const int64_t image = t / j->groups, c = t % j->groups * LANES, n = min64(LANES, j->C - c);
        real *out = j->out + (image * j->C + c) * pixels;
        if (j->of_image[image] == j->of_image[image + 1]) {
            memset(out, 0, (size_t)(n * pixels) * sizeof(real));
            continue;
        }
        if (j->pool || j->maximum) channels_last(j->input + image * j->C * pixels, c, j->C, pixels, slab);
        memset(sums, 0, slab_bytes);
        memset(bins, 0, bins_bytes);
        for (int64_t o = j->of_image[image]; o < j->of_image[image + 1]; o++) {
            const int64_t k = j->order[o];
            if (j->share[k] != j->share[k]) continue;
            bins_in(j->grad + (k * j->C + c) * count, n, count, bins);
            for (int64_t ph = 0; ph < j->PH; ph++)
                for (int64_t pw = 0; pw < j->PW; pw++)
                    roi_bin_grad(j, slab, sums, k, ph, pw, load(bins + (ph * j->PW + pw) * LANES));
        }
        channels_first(sums, n, pixels, out);
    }
    hl_give(bins);
    hl_give(sums);
    hl_give(slab);
    return status;
}

/* Sorts the RoIs by image and runs the chunks over images and groups of channels. */
static int run_rois(roi_job *j)
{
    int64_t *order = hl_take((size_t)(j->K + 1) * sizeof(int64_t)),
            *of_image = hl_take((size_t)(j->N + 2) * sizeof(int64_t));
    int status = HL_NOMEM;
    if (order && of_image) {
        sort_by_image(j->boxes, j->K, j->N, order, of_image);
        j->order = order;
        j->of_image = of_image;
        j->groups = (j->C + LANES - 1) / LANES;
        double work =
            (double)j->H * (double)j->W * LANES + (double)j->K / (double)max64(j->N, 1) * (double)(j->PH * j->PW) * 64;
        status = hl_parallel_for(j->N * j->groups, hl_grain(work), j->grad ? roi_grad_chunk : roi_chunk, j);
    }
    hl_give(of_image);
    hl_give(order);
    return status;
}

static int run_align(roi_job *j, double scale, int64_t ratio, int64_t aligned)
{
    tap_table t;
    int status = make_table(&t, j, (real)scale, ratio, aligned);
    if (status == HL_OK) {
        j->starts = t.starts;
        j->taps = t.taps;
        j->share = t.share;
        j->outside = t.outside;
        status = run_rois(j);
    }
    give_table(&t);
    return status;
}

/* Parallel over images and groups of LANES channels. A group is laid out channels last, so that a sample is a vector and its
 * weights are shared; the weights of a RoI, the same for all channels, are computed once, and samples that meet in a pixel
 * become one tap. Reads each input once, some ny * nx cached vectors a bin, writes each bin once.
 * Source: He et al., Mask R-CNN (2017), section 3. */
int HL(roi_align)(const hl_roi_align_plan *p, const real *input, const real *boxes, real *output, int64_t *bad)
{
    if (!check_images(boxes, p->K, p->N, bad)) return HL_OK;
    roi_job job = {.input = input,
                   .boxes = boxes,
                   .out = output,
                   .N = p->N,
                   .C = p->C,
                   .H = p->H,
                   .W = p->W,
                   .K = p->K,
                   .PH = p->PH,
                   .PW = p->PW,
                   .maximum = p->maximum != 0};
    return run_align(&job, p->spatial_scale, p->sampling_ratio, p->aligned);
}

/* The same turned round: each group of channels adds up the RoIs of its image in their order, so that the sums are the same
 * bits for any number of threads. */
int HL(roi_align_grad)(const hl_roi_align_grad_plan *p, const real *grad, const real *input, const real *boxes,
                       real *grad_input, int64_t *bad)
{
    if (!check_images(boxes, p->K, p->N, bad)) return HL_OK;
    roi_job job = {.input = input,
                   .boxes = boxes,
                   .grad = grad,
                   .out = grad_input,
                   .N = p->N,
                   .C = p->C,
                   .H = p->H,
                   .W = p->W,
                   .K = p->K,
                   .PH = p->PH,
                   .PW = p->PW,
                   .maximum = p->maximum != 0};
    return run_align(&job, p->spatial_scale, p->sampling_ratio, p->aligned);
}

/* A coordinate rounded to a pixel, halves away from 0; far ones stop where sums of a few of them still fit. */
static int64_t whole(real v)
{
    real r = HL_F32 ? (real)truncf((float)(v + copysignf(0.5f, (float)v)))
                    : (real)trunc((double)v + copysign(0.5, (double)v));
    return (int64_t)rmax(rmin(r, (real)(1 << 24)), (real) - (1 << 24));
}

static int run_pool(roi_job *j, double scale)
{
    const int64_t bins = j->PH + j->PW;
    int32_t *edges = hl_take((size_t)(j->K * bins * 2 + 1) * sizeof(int32_t));
    real *share = hl_take((size_t)(j->K + 1) * sizeof(real));
    int status = HL_NOMEM;
    if (edges && share) {
        for (int64_t k = 0; k < j->K; k++) {
            const real *b = j->boxes + 5 * k;
            int spoilt = 0;
            for (int i = 1; i < 5; i++) spoilt |= b[i] != b[i] || b[i] * (real)scale != b[i] * (real)scale;
            share[k] = spoilt ? (real)NAN : (real)0;
            if (spoilt) {
                memset(edges + k * bins * 2, 0, (size_t)(bins * 2) * sizeof(int32_t));
                continue;
            }
            for (int axis = 0; axis < 2; axis++) { /* rows, then columns */
                int64_t size = axis ? j->W : j->H, n = axis ? j->PW : j->PH, start = whole(b[2 - axis] * (real)scale);
                int64_t length = max64(whole(b[4 - axis] * (real)scale) - start + 1, 1);
                real step = (real)length / (real)n;
                int32_t *e = edges + (k * bins + axis * j->PH) * 2;
                for (int64_t i = 0; i < n; i++) {
                    int64_t low = (int64_t)floor((double)((real)i * step)),
                            high = (int64_t)ceil((double)((real)(i + 1) * step));
                    e[2 * i] = (int32_t)min64(max64(start + low, 0), size);
                    e[2 * i + 1] = (int32_t)min64(max64(start + high, 0), size);
                }
            }
        }
        j->edges = edges;
        j->share = share;
        j->pool = 1;
        status = run_rois(j);
    }
    hl_give(share);
    hl_give(edges);
    return status;
}

/* As roi_align, with the largest pixel of each bin. Source: Girshick, Fast R-CNN (2015), section 2.1. */
int HL(roi_pool)(const hl_roi_pool_plan *p, const real *input, const real *boxes, real *output, int64_t *bad)
{
    if (!check_images(boxes, p->K, p->N, bad)) return HL_OK;
    roi_job job = {.input = input,
                   .boxes = boxes,
                   .out = output,
                   .N = p->N,
                   .C = p->C,
                   .H = p->H,
                   .W = p->W,
                   .K = p->K,
                   .PH = p->PH,
                   .PW = p->PW};
    return run_pool(&job, p->spatial_scale);
}

/* The largest pixels are found again; RoIs add up in their order. */
int HL(roi_pool_grad)(const hl_roi_pool_grad_plan *p, const real *grad, const real *input, const real *boxes,
                      real *grad_input, int64_t *bad)
{
    if (!check_images(boxes, p->K, p->N, bad)) return HL_OK;
    roi_job job = {.input = input,
                   .boxes = boxes,
                   .grad = grad,
                   .out = grad_input,
                   .N = p->N,
                   .C = p->C,
                   .H = p->H,
                   .W = p->W,
                   .K = p->K,
                   .PH = p->PH,
                   .PW = p->PW};
    return run_pool(&job, p->spatial_scale);
}

/* ---- masks ---- */

typedef struct {
    const uint8_t *masks;
    const uint64_t *one, *two;
    const int64_t *area1, *area2;
    int64_t A, B, P, words, H, W;
    uint64_t *bits;
    int64_t *areas;
    real *out;
} mask_job;

static int pack_chunk(int64_t begin, int64_t end, void *context)
{
    const mask_job *j = context;
    for (int64_t i = begin; i < end; i++) {
        const uint8_t *m = j->masks + i * j->P;
        int64_t area = 0;
        for (int64_t w = 0; w < j->words; w++) {
            uint64_t bits = 0;
            int64_t n = min64(64, j->P - w * 64);
            for (int64_t b = 0; b < n; b++) bits |= (uint64_t)(m[w * 64 + b] & 1) << b;
            j->bits[i * j->words + w] = bits;
            area += __builtin_popcountll(bits);
        }
        j->areas[i] = area;
    }
    return HL_OK;
}

static int mask_iou_chunk(int64_t begin, int64_t end, void *context)
{
    const mask_job *j = context;
    for (int64_t a = begin; a < end; a++)
        for (int64_t b = 0; b < j->B; b++) {
            const uint64_t *x = j->one + a * j->words, *y = j->two + b * j->words;
            int64_t inter = 0;
            for (int64_t w = 0; w < j->words; w++) inter += __builtin_popcountll(x[w] & y[w]);
            j->out[a * j->B + b] = (real)((double)inter / (double)max64(j->area1[a] + j->area2[b] - inter, 1));
        }
    return HL_OK;
}

/* Parallel over masks, then over rows of the result. Masks become 64 pixels a word first. Reads each byte once, then a bit a
 * pixel and pair. */
int HL(mask_iou)(const hl_mask_iou_plan *p, const uint8_t *masks1, const uint8_t *masks2, real *iou)
{
    const int64_t words = (p->P + 63) / 64;
    uint64_t *bits = hl_take((size_t)((p->A + p->B) * words + 1) * sizeof(uint64_t));
    int64_t *areas = hl_take((size_t)(p->A + p->B + 1) * sizeof(int64_t));
    int status = HL_NOMEM;
    if (bits && areas) {
        mask_job job = {.P = p->P, .words = words, .A = p->A, .B = p->B, .masks = masks1, .bits = bits, .areas = areas};
        status = hl_parallel_for(p->A, hl_grain((double)p->P), pack_chunk, &job);
        job.masks = masks2;
        job.bits = bits + p->A * words;
        job.areas = areas + p->A;
        if (status == HL_OK) status = hl_parallel_for(p->B, hl_grain((double)p->P), pack_chunk, &job);
        job.one = bits;
        job.two = bits + p->A * words;
        job.area1 = areas;
        job.area2 = areas + p->A;
        job.out = iou;
        if (status == HL_OK)
            status = hl_parallel_for(p->A, hl_grain((double)p->B * (double)(words + 8) * 2), mask_iou_chunk, &job);
    }
    hl_give(areas);
    hl_give(bits);
    return status;
}

static int mask_boxes_chunk(int64_t begin, int64_t end, void *context)
{
    const mask_job *j = context;
    for (int64_t i = begin; i < end; i++) {
        int64_t left = j->W, right = -1, top = -1, bottom = -1;
        for (int64_t y = 0; y < j->H; y++) {
            const uint8_t *row = j->masks + (i * j->H + y) * j->W;
            const uint8_t *found = j->W ? memchr(row, 1, (size_t)j->W) : NULL;
            if (!found) continue;
            if (top < 0) top = y;
            bottom = y;
            left = min64(left, found - row);
            for (int64_t x = j->W - 1; x > right; x--)
                if (row[x]) right = x;
        }
        real *b = j->out + 4 * i;
        b[0] = top < 0 ? (real)0 : (real)left;
        b[1] = top < 0 ? (real)0 : (real)top;
        b[2] = top < 0 ? (real)0 : (real)right;
        b[3] = top < 0 ? (real)0 : (real)bottom;
    }
    return HL_OK;
}

/* Parallel over masks, row by row: from the left to the first pixel, from the right to the last one known. Reads each byte
 * at most twice. */
int HL(masks_to_boxes)(const hl_masks_to_boxes_plan *p, const uint8_t *masks, real *boxes)
{
    mask_job job = {.masks = masks, .H = p->H, .W = p->W, .out = boxes};
    return hl_parallel_for(p->N, hl_grain((double)p->H * (double)p->W / 4 + 4), mask_boxes_chunk, &job);
}
