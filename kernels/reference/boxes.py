"""Boxes: overlap measures and their gradients, suppression, RoI pooling, masks.

A box is x1 y1 x2 y2 on continuous coordinates. It is empty where x2 <= x1 or y2 <= y1; an empty box has the area 0 in every
measure. What decides what is kept (the overlap in `nms`, `soft_nms`, `sparse_box_iou`) is computed in the float type of the
call by one expression, each operation rounded as written: inter / union > threshold, union = (area1 + area2) - inter.
"""

import math

import numpy as np

from ..spec import kernel

XYXY, XYWH, CXCYWH = range(3)
IOU, GIOU, DIOU, CIOU = range(4)
LARGEST_GRID = 1 << 20  # samples a side of a RoI bin; past it the bin is a million times larger than a pixel


# ------------------------------------------------------------------------------------------------------------ one box


@kernel("boxes[N,4] -> area[N]", error="ulp:4", flops="3*N")
def box_area(boxes, area):
    """(x2 - x1) * (y2 - y1), signed: a box inverted along one axis has a negative area. NaN where a factor is NaN."""
    with np.errstate(all="ignore"):
        np.multiply(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1], out=area)


@kernel("grad[N], boxes[N,4] -> grad_boxes[N,4]", error="ulp:4", flops="4*N")
def box_area_grad(grad, boxes, grad_boxes):
    """The gradient of `box_area`."""
    with np.errstate(all="ignore"):
        grad_w, grad_h = grad * (boxes[:, 3] - boxes[:, 1]), grad * (boxes[:, 2] - boxes[:, 0])
    grad_boxes[...] = np.stack([-grad_w, -grad_h, grad_w, grad_h], axis=1)


@kernel("boxes[N,4] -> converted[N,4]", error="exact", flops="4*N")
def box_convert(boxes, converted, source: int, target: int):
    """Boxes in another notation: 0 x1 y1 x2 y2, 1 x1 y1 w h, 2 cx cy w h. One rounding a value; NaN stays NaN."""
    with np.errstate(all="ignore"):
        for axis in (0, 1):
            a, b = boxes[:, axis], boxes[:, axis + 2]
            size = b - a if source == XYXY else b
            if target == CXCYWH:
                first = [(a + b) / 2, a + b / 2, a][source]
            else:
                first = a - b / 2 if source == CXCYWH else a
            last = [b, a + b, a + b / 2][source] if target == XYXY else size
            converted[:, axis], converted[:, axis + 2] = first, last


@kernel("grad[N,4] -> grad_boxes[N,4]", error="exact", flops="4*N")
def box_convert_grad(grad, grad_boxes, source: int, target: int):
    """The gradient of `box_convert`: its matrix, transposed; no value sums more than two terms."""
    for axis in (0, 1):
        g, h = grad[:, axis], grad[:, axis + 2]
        with np.errstate(all="ignore"):
            if source == target:
                pair = g, h
            elif source == XYXY:
                pair = (g - h, h) if target == XYWH else (g / 2 - h, g / 2 + h)
            elif source == XYWH:
                pair = (g + h, h) if target == XYXY else (g, g / 2 + h)
            else:
                pair = (g + h, (h - g) / 2) if target == XYXY else (g, h - g / 2)
        grad_boxes[:, axis], grad_boxes[:, axis + 2] = pair


@kernel("boxes[N,4] -> clipped[N,4]", error="exact", flops="8*N")
def clip_boxes(boxes, clipped, height: float, width: float):
    """x into [0, width], y into [0, height]. NaN stays NaN."""
    clipped[:, 0::2] = np.clip(boxes[:, 0::2], 0, width)
    clipped[:, 1::2] = np.clip(boxes[:, 1::2], 0, height)


@kernel("grad[N,4], boxes[N,4] -> grad_boxes[N,4]", error="exact", flops="8*N")
def clip_boxes_grad(grad, boxes, grad_boxes, height: float, width: float):
    """The gradient of `clip_boxes`: grad where a coordinate lies inside or on the border, else 0 (0 for NaN too)."""
    limit = np.array([width, height, width, height], boxes.dtype)
    grad_boxes[...] = np.where((boxes >= 0) & (boxes <= limit), grad, 0)


@kernel("boxes[N,4] -> keep[N]:i64, count[1]:i64", error="exact", flops="4*N")
def remove_small_boxes(boxes, keep, count, min_size: float):
    """The indices of the boxes with both sides >= min_size, then -1; their number. NaN is not kept."""
    smallest = boxes.dtype.type(min_size)
    with np.errstate(all="ignore"):
        kept = np.flatnonzero((boxes[:, 2] - boxes[:, 0] >= smallest) & (boxes[:, 3] - boxes[:, 1] >= smallest))
    _fill(keep, count, kept)


def _fill(keep, count, kept):
    count[0] = len(kept)
    keep[: len(kept)] = kept
    keep[len(kept) :] = -1


# ------------------------------------------------------------------------------------------------------------ overlap


def _extent(boxes):
    """Width and height, 0 for an inverted side."""
    return np.maximum(boxes[..., 2] - boxes[..., 0], 0), np.maximum(boxes[..., 3] - boxes[..., 1], 0)


def _ratio(a, b):
    """a / b, and a where b is 0."""
    return a / np.where(b == 0, np.ones_like(b), b)


def _intersection(a, b):
    """Intersection and union of boxes that broadcast against each other."""
    (wa, ha), (wb, hb) = _extent(a), _extent(b)
    w = np.maximum(np.minimum(a[..., 2], b[..., 2]) - np.maximum(a[..., 0], b[..., 0]), 0)
    h = np.maximum(np.minimum(a[..., 3], b[..., 3]) - np.maximum(a[..., 1], b[..., 1]), 0)
    inter = w * h
    return inter, (wa * ha + wb * hb) - inter


def _enclosing(a, b):
    """Width and height of the smallest box around both."""
    w = np.maximum(a[..., 2], b[..., 2]) - np.minimum(a[..., 0], b[..., 0])
    h = np.maximum(a[..., 3], b[..., 3]) - np.minimum(a[..., 1], b[..., 1])
    return np.maximum(w, 0), np.maximum(h, 0)


def _centres(a, b):
    """The distance of the centres along x and y."""
    return (
        (a[..., 0] + a[..., 2]) / 2 - (b[..., 0] + b[..., 2]) / 2,
        (a[..., 1] + a[..., 3]) / 2 - (b[..., 1] + b[..., 3]) / 2,
    )


def _overlap(a, b, kind, eps):
    with np.errstate(all="ignore"):
        inter, union = _intersection(a, b)
        iou = _ratio(inter, union)
        if kind == IOU:
            return iou
        w, h = _enclosing(a, b)
        if kind == GIOU:
            return iou - _ratio(w * h - union, w * h)
        dx, dy = _centres(a, b)
        eps = a.dtype.type(eps)
        diou = iou - _ratio(dx * dx + dy * dy, w * w + h * h + eps)
        if kind == DIOU:
            return diou
        v = _aspect(a, b)[0]
        return diou - _ratio(v, 1 - iou + v + eps) * v


def _aspect(a, b):
    """The aspect term v of CIoU and the difference of the two angles."""
    angle = np.arctan2(*_extent(a)) - np.arctan2(*_extent(b))
    return a.dtype.type(4 / math.pi**2) * angle * angle, angle


@kernel("boxes1[N,4], boxes2[M,4] -> iou[N,M]", error="near:16", flops="(13, 22, 31, 41)[kind]*N*M")
def box_iou(boxes1, boxes2, iou, kind: int, eps: float):
    """How much each box of the one list overlaps each of the other: 0 IoU, 1 GIoU, 2 DIoU, 3 CIoU.

    An empty box has IoU 0 with every box, and finite GIoU, DIoU and CIoU. A NaN in a box makes its values NaN. A quotient
    with the divisor 0 is its dividend, which is 0 then.
    Source: Rezatofighi et al., Generalized IoU (2019); Zheng et al., Distance-IoU loss (2020), eps and CIoU as there.
    """
    iou[...] = _overlap(boxes1[:, None], boxes2[None], kind, eps)


@kernel("boxes1[N,4], boxes2[N,4] -> iou[N]", error="near:16", flops="(13, 22, 31, 41)[kind]*N")
def box_iou_paired(boxes1, boxes2, iou, kind: int, eps: float):
    """`box_iou` of the first box with the first, the second with the second ..."""
    iou[...] = _overlap(boxes1, boxes2, kind, eps)


def _larger(a, b):
    """The derivative of max(a, b) by a: half where they are equal."""
    return np.where(a == b, 0.5, a > b).astype(a.dtype)


def _overlap_gradient(grad, a, b, kind, eps):
    """grad times the derivative of the overlap of a and b by a. The weight alpha of CIoU counts as a constant."""
    with np.errstate(all="ignore"):
        inter, union = _intersection(a, b)
        iw = np.minimum(a[..., 2], b[..., 2]) - np.maximum(a[..., 0], b[..., 0])
        ih = np.minimum(a[..., 3], b[..., 3]) - np.maximum(a[..., 1], b[..., 1])
        wa, ha = _extent(a)
        # By the intersection and by the area of a, union = area + area - inter.
        full = np.where(union == 0, 0, grad)
        by_inter, by_union = _ratio(full, union), -_ratio(_ratio(full, union) * inter, union)
        by_w, by_h = np.zeros_like(inter), np.zeros_like(inter)  # by the sides of the enclosing box
        by_dx, by_dy = np.zeros_like(inter), np.zeros_like(inter)
        by_wa, by_ha = np.zeros_like(inter), np.zeros_like(inter)
        w, h = _enclosing(a, b)
        if kind == GIOU:
            around = np.where(w * h == 0, 0, grad)
            by_union = by_union + _ratio(around, w * h)
            by_around = -_ratio(_ratio(around, w * h) * union, w * h)
            by_w, by_h = by_around * h, by_around * w
        if kind >= DIOU:
            dx, dy = _centres(a, b)
            diagonal = w * w + h * h + a.dtype.type(eps)
            share = _ratio(2 * grad, diagonal)
            by_dx, by_dy = -share * dx, -share * dy
            far = _ratio(share * (dx * dx + dy * dy), diagonal)
            by_w, by_h = far * w, far * h
        if kind == CIOU:
            v, angle = _aspect(a, b)
            alpha = _ratio(v, 1 - _ratio(inter, union) + v + a.dtype.type(eps))
            turn = _ratio(-grad * alpha * a.dtype.type(8 / math.pi**2) * angle, wa * wa + ha * ha)
            by_wa, by_ha = turn * ha, -turn * wa
        by_inter = by_inter - by_union
        by_iw, by_ih = by_inter * np.maximum(ih, 0) * (iw >= 0), by_inter * np.maximum(iw, 0) * (ih >= 0)
        by_wa = (by_wa + by_union * ha) * (a[..., 2] >= a[..., 0])
        by_ha = (by_ha + by_union * wa) * (a[..., 3] >= a[..., 1])
        by_w = by_w * (np.maximum(a[..., 2], b[..., 2]) >= np.minimum(a[..., 0], b[..., 0]))
        by_h = by_h * (np.maximum(a[..., 3], b[..., 3]) >= np.minimum(a[..., 1], b[..., 1]))
        x1 = by_dx / 2 - by_wa - by_iw * _larger(a[..., 0], b[..., 0]) - by_w * _larger(b[..., 0], a[..., 0])
        y1 = by_dy / 2 - by_ha - by_ih * _larger(a[..., 1], b[..., 1]) - by_h * _larger(b[..., 1], a[..., 1])
        x2 = by_dx / 2 + by_wa + by_iw * _larger(b[..., 2], a[..., 2]) + by_w * _larger(a[..., 2], b[..., 2])
        y2 = by_dy / 2 + by_ha + by_ih * _larger(b[..., 3], a[..., 3]) + by_h * _larger(a[..., 3], b[..., 3])
        return np.stack([x1, y1, x2, y2], axis=-1)


@kernel("grad[N,M], boxes1[N,4], boxes2[M,4] -> grad_boxes[K,4]", error="near:256", flops="(40, 55, 65, 85)[kind]*N*M")
def box_iou_grad(grad, boxes1, boxes2, grad_boxes, kind: int, eps: float, second: int):
    """The gradient of `box_iou` by boxes1 (K = N), or by boxes2 where second is 1 (K = M).

    At a tie of two coordinates each takes half; a side of length 0 counts as positive. alpha of CIoU is a constant, as its
    authors have it. Empty pairs (union 0) give 0.
    """
    if second:
        pairs = _overlap_gradient(grad, np.broadcast_to(boxes2[None], (*grad.shape, 4)), boxes1[:, None], kind, eps)
    else:
        pairs = _overlap_gradient(grad, np.broadcast_to(boxes1[:, None], (*grad.shape, 4)), boxes2[None], kind, eps)
    np.sum(pairs, axis=0 if second else 1, out=grad_boxes)


@kernel(
    "grad[N], boxes1[N,4], boxes2[N,4] -> grad_boxes1[N,4], grad_boxes2[N,4]", error="near:64", flops="(80, 110, 130, 170)[kind]*N"
)
def box_iou_paired_grad(grad, boxes1, boxes2, grad_boxes1, grad_boxes2, kind: int, eps: float):
    """The gradients of `box_iou_paired`; ties and constants as in `box_iou_grad`."""
    grad_boxes1[...] = _overlap_gradient(grad, boxes1, boxes2, kind, eps)
    grad_boxes2[...] = _overlap_gradient(grad, boxes2, boxes1, kind, eps)


@kernel("boxes1[N,4], boxes2[M,4] -> counts[N]:i64", error="exact", flops="13*N*M")
def sparse_box_iou_count(boxes1, boxes2, counts, threshold: float):
    """How many boxes of the second list have IoU > threshold with each of the first; NaN is no match."""
    threshold = boxes1.dtype.type(threshold)
    for i, box in enumerate(boxes1):
        counts[i] = np.count_nonzero(_overlap(box, boxes2, IOU, 0.0) > threshold)


@kernel("boxes1[N,4], boxes2[M,4], counts[N]:i64 -> rows[K]:i64, cols[K]:i64, iou[K]", error="near:16", flops="13*N*M")
def sparse_box_iou(boxes1, boxes2, counts, rows, cols, iou, threshold: float):
    """The pairs that `sparse_box_iou_count` counted, by row, then column, with their IoU; K is the sum of counts."""
    threshold = boxes1.dtype.type(threshold)
    at = 0
    for i, box in enumerate(boxes1):
        values = _overlap(box, boxes2, IOU, 0.0)
        found = np.flatnonzero(values > threshold)
        part = slice(at, at + counts[i])
        rows[part], cols[part], iou[part] = i, found, values[found]
        at += counts[i]


# -------------------------------------------------------------------------------------------------------- suppression


@kernel("boxes[N,4], scores[N], groups[N]?:i64 -> keep[N]:i64, count[1]:i64", error="exact", flops="")
def nms(boxes, scores, groups, keep, count, iou_threshold: float, score_threshold: float, max_output: int):
    """Walks the boxes by decreasing score and keeps those whose IoU with every box kept before, of the same group, is not
    above iou_threshold; writes their indices in that order, then -1, and their number (at most max_output).

    Equal scores: the lower index first; NaN scores last, in order of index. A box whose score is not above score_threshold
    is not looked at, unless that is -inf. A box with a NaN overlaps nothing.
    """
    threshold, lowest = boxes.dtype.type(iou_threshold), boxes.dtype.type(score_threshold)
    order = np.argsort(-scores, kind="stable")
    if lowest != -np.inf:
        order = order[scores[order] > lowest]
    alive = np.ones(len(order), bool)
    kept = []
    for position, i in enumerate(order):
        if len(kept) == max_output:
            break
        if alive[position]:
            kept.append(i)
            after = order[position + 1 :]
            overlaps = _overlap(boxes[i], boxes[after], IOU, 0.0) > threshold
            if groups is not None:
                overlaps &= groups[after] == groups[i]
            alive[position + 1 :] &= ~overlaps
    _fill(keep, count, kept)


@kernel("boxes[N,4], scores[N] -> keep[N]:i64, kept_scores[N], count[1]:i64", error="near:64", flops="")
def soft_nms(boxes, scores, keep, kept_scores, count, gaussian: int, iou_threshold: float, sigma: float, score_threshold: float):
    """Takes the box with the highest score again and again (equal ones: the lower index), and lowers the score of the others
    by their overlap with it: times 1 - IoU where IoU > iou_threshold, or times exp(-IoU^2 / sigma). What is not above
    score_threshold (NaN too) is dropped. Writes indices and lowered scores, then -1 and 0, and the number.

    An overlap that is NaN lowers nothing. Source: Bodla et al., Soft-NMS (2017).
    """
    real = boxes.dtype.type
    threshold, sigma, lowest = real(iou_threshold), real(sigma), real(score_threshold)
    index, left = np.arange(len(scores)), scores.copy()
    n = 0
    while True:
        alive = left > lowest
        index, left = index[alive], left[alive]
        if not len(index):
            break
        best = np.argmax(left)
        i, keep[n], kept_scores[n] = index[best], index[best], left[best]
        n += 1
        index, left = np.delete(index, best), np.delete(left, best)
        overlap = _overlap(boxes[i], boxes[index], IOU, 0.0)
        lowered = np.exp(-(overlap * overlap) / sigma) if gaussian else np.where(overlap > threshold, 1 - overlap, real(1))
        left = left * np.where(np.isnan(overlap), real(1), lowered)
    keep[n:], kept_scores[n:], count[0] = -1, 0, n


# ------------------------------------------------------------------------------------------------------------- RoIs


def _bad_image(boxes, images, bad):
    """bad[0] = 1 + the first RoI whose image index is no whole number in [0, images), else 0."""
    index = boxes[:, 0]
    wrong = np.flatnonzero(~((index >= 0) & (index < images) & (index == np.floor(index))))
    bad[0] = 1 + wrong[0] if len(wrong) else 0
    return bool(len(wrong))


def _samples(start, length, bins, size, ratio):
    """Along one axis, the samples of each bin that lie in the image: lists of (low pixel, high pixel, share of the high one);
    and the number of samples a bin has, inside or not."""
    real = type(start)
    step = length / real(bins)
    grid = min(max(int(np.ceil(min(step, real(LARGEST_GRID)))), 0), LARGEST_GRID) if ratio <= 0 else ratio
    found = []
    for p in range(bins):
        first, inside = start + real(p) * step, []
        if grid:
            between = step / real(grid)
            for i in _candidates(first, between, size, grid):
                at = first + (real(i) + real(0.5)) * step / real(grid)
                if -1 <= at <= size:
                    at = max(at, real(0))
                    low = min(int(at), size - 1)
                    inside.append((low, min(low + 1, size - 1), at - real(low) if low < size - 1 else real(0)))
        found.append(inside)
    return found, grid


def _candidates(first, between, size, grid):
    """The numbers of the samples that may lie in [-1, size], with some to spare on both sides."""
    if not between > 0:
        return range(grid)
    low = min(max((-1 - float(first)) / float(between) - 2, 0.0), float(grid))
    high = min(max((size - float(first)) / float(between) + 2, 0.0), float(grid))
    return range(int(low), int(high))


def _region(box, scale, aligned):
    """x and y of the corner and width and height of a RoI on the feature map."""
    real = box.dtype.type
    scale, offset = real(scale), real(0.5 if aligned else 0)
    x1, y1, x2, y2 = (v * scale - offset for v in box[1:])
    w, h = x2 - x1, y2 - y1
    if not aligned:
        w, h = max(w, real(1)), max(h, real(1))
    return x1, y1, w, h


@kernel("input[N,C,H,W], boxes[K,5] -> output[K,C,PH,PW], bad[1]:i64", error="near:64", flops="8*K*C*PH*PW")
def roi_align(input, boxes, output, bad, spatial_scale: float, sampling_ratio: int, aligned: int, maximum: int):
    """Each RoI (image, x1, y1, x2, y2) cut into PH x PW bins, each the mean (or the maximum) of bilinear samples.

    The samples stand on a regular grid in the bin: sampling_ratio a side, or ceil(bin size) where that is not positive. A
    sample outside [-1, H] x [-1, W] counts as 0, one on the border takes the border's value. `aligned` moves by half a pixel,
    else a RoI is at least 1 wide. A bin with no sample is 0; a RoI that is not finite is NaN; values of pixels that a sample
    touches enter even with the weight 0. bad: 1 + the first RoI whose image is none of the N (then nothing else is written).
    Source: He et al., Mask R-CNN (2017), section 3.
    """
    N, _, H, W = input.shape
    if _bad_image(boxes, N, bad):
        return
    with np.errstate(all="ignore"):
        for k, box in enumerate(boxes):
            x1, y1, w, h = _region(box, spatial_scale, aligned)
            image = input[int(box[0])]
            if not np.isfinite(x1 + y1 + w + h):
                output[k] = np.nan
                continue
            ys, grid_h = _samples(y1, h, output.shape[2], H, sampling_ratio)
            xs, grid_w = _samples(x1, w, output.shape[3], W, sampling_ratio)
            for ph, rows in enumerate(ys):
                for pw, cols in enumerate(xs):
                    output[k, :, ph, pw] = _bin(image, rows, cols, grid_h, grid_w, maximum)


def _corners(rows, cols):
    """Each sample's four (row, column, weight)."""
    for y0, y1, ly in rows:
        for x0, x1, lx in cols:
            yield (
                (y0, x0, (1 - ly) * (1 - lx)), (y0, x1, (1 - ly) * lx), (y1, x0, ly * (1 - lx)), (y1, x1, ly * lx)
            )  # fmt: skip


def _bin(image, rows, cols, grid_h, grid_w, maximum):
    values = [sum(image[:, y, x] * weight for y, x, weight in corners) for corners in _corners(rows, cols)]
    count = grid_h * grid_w
    if maximum:
        if len(values) < count:
            values.append(np.zeros_like(image[:, 0, 0]))
        return np.max(values, axis=0) if values else 0
    return np.sum(values, axis=0) / image.dtype.type(count) if values else 0


@kernel("grad[K,C,PH,PW], input[N,C,H,W], boxes[K,5] -> grad_input[N,C,H,W], bad[1]:i64", error="near:256", flops="8*K*C*PH*PW")
def roi_align_grad(grad, input, boxes, grad_input, bad, spatial_scale: float, sampling_ratio: int, aligned: int, maximum: int):
    """The gradient of `roi_align` by its input; with `maximum` the first of the largest samples takes it (a NaN counts as the
    largest). RoIs that are not finite give nothing."""
    N, C, H, W = input.shape
    if _bad_image(boxes, N, bad):
        return
    grad_input[...] = 0
    with np.errstate(all="ignore"):
        for k, box in enumerate(boxes):
            x1, y1, w, h = _region(box, spatial_scale, aligned)
            image, target = input[int(box[0])], grad_input[int(box[0])]
            if not np.isfinite(x1 + y1 + w + h):
                continue
            ys, grid_h = _samples(y1, h, grad.shape[2], H, sampling_ratio)
            xs, grid_w = _samples(x1, w, grad.shape[3], W, sampling_ratio)
            for ph, rows in enumerate(ys):
                for pw, cols in enumerate(xs):
                    corners = list(_corners(rows, cols))
                    count = grid_h * grid_w
                    if not maximum:
                        for corner in corners:
                            for y, x, weight in corner:
                                target[:, y, x] += grad[k, :, ph, pw] * (weight / input.dtype.type(count))
                        continue
                    values = [sum(image[:, y, x] * weight for y, x, weight in corner) for corner in corners]
                    if len(values) < count:
                        values.append(np.zeros(C, input.dtype))
                    for c, best in enumerate(np.argmax(values, axis=0) if values else ()):
                        for y, x, weight in corners[best] if best < len(corners) else ():
                            target[c, y, x] += grad[k, c, ph, pw] * weight


def _bin_edges(real, start, length, bins, size):
    """The pixels [begin, end) of each bin along one axis."""
    step = real(length) / real(bins)
    edges = [(math.floor(real(p) * step), math.ceil(real(p + 1) * step)) for p in range(bins)]
    return [(min(max(start + a, 0), size), min(max(start + b, 0), size)) for a, b in edges]


def _whole_region(box, scale):
    """Corner and size of a RoI rounded to pixels (halves away from 0)."""
    scaled = [v * box.dtype.type(scale) for v in box[1:]]
    limit = 1 << 24  # beyond every feature map; keeps the sums below small
    x1, y1, x2, y2 = (int(np.clip(np.trunc(v + np.copysign(v.dtype.type(0.5), v)), -limit, limit)) for v in scaled)
    return x1, y1, max(x2 - x1 + 1, 1), max(y2 - y1 + 1, 1)


@kernel("input[N,C,H,W], boxes[K,5] -> output[K,C,PH,PW], bad[1]:i64", error="exact", flops="4*K*C*PH*PW")
def roi_pool(input, boxes, output, bad, spatial_scale: float):
    """Each RoI, rounded to pixels, cut into PH x PW bins, each the maximum of its pixels; an empty bin is 0.

    A NaN in a bin makes it NaN; a RoI with a NaN is NaN. bad as in `roi_align`. Source: Girshick, Fast R-CNN (2015), 2.1.
    """
    N, _, H, W = input.shape
    if _bad_image(boxes, N, bad):
        return
    for k, box in enumerate(boxes):
        if np.isnan(box).any():
            output[k] = np.nan
            continue
        x1, y1, w, h = _whole_region(box, spatial_scale)
        for ph, (top, bottom) in enumerate(_bin_edges(box.dtype.type, y1, h, output.shape[2], H)):
            for pw, (left, right) in enumerate(_bin_edges(box.dtype.type, x1, w, output.shape[3], W)):
                pixels = input[int(box[0]), :, top:bottom, left:right]
                output[k, :, ph, pw] = pixels.max(axis=(1, 2)) if pixels.size else 0


@kernel("grad[K,C,PH,PW], input[N,C,H,W], boxes[K,5] -> grad_input[N,C,H,W], bad[1]:i64", error="near:256", flops="4*K*C*PH*PW")
def roi_pool_grad(grad, input, boxes, grad_input, bad, spatial_scale: float):
    """The gradient of `roi_pool` by its input: to the first of a bin's largest pixels, row by row (its first NaN)."""
    N, C, H, W = input.shape
    if _bad_image(boxes, N, bad):
        return
    grad_input[...] = 0
    for k, box in enumerate(boxes):
        if np.isnan(box).any():
            continue
        n = int(box[0])
        x1, y1, w, h = _whole_region(box, spatial_scale)
        for ph, (top, bottom) in enumerate(_bin_edges(box.dtype.type, y1, h, grad.shape[2], H)):
            for pw, (left, right) in enumerate(_bin_edges(box.dtype.type, x1, w, grad.shape[3], W)):
                pixels = input[n, :, top:bottom, left:right].reshape(C, -1)
                if pixels.size:
                    best = pixels.argmax(axis=1)
                    rows, cols = top + best // (right - left), left + best % (right - left)
                    grad_input[n, np.arange(C), rows, cols] += grad[k, :, ph, pw]


# ------------------------------------------------------------------------------------------------------------- masks


@kernel("masks1[A,P]:u8, masks2[B,P]:u8 -> iou[A,B]", error="ulp:1", flops="2*A*B*P")
def mask_iou(masks1, masks2, iou):
    """Common pixels over all pixels of each pair of masks (bytes 0 or 1); 0 where both are empty."""
    one, two = masks1.astype(np.int64), masks2.astype(np.int64)
    inter = one @ two.T
    union = one.sum(axis=1)[:, None] + two.sum(axis=1)[None] - inter
    np.divide(inter, np.maximum(union, 1), out=iou, casting="same_kind")


@kernel("masks[N,H,W]:u8 -> boxes[N,4]", error="exact", flops="N*H*W")
def masks_to_boxes(masks, boxes):
    """x1 y1 x2 y2 of the first and last column and row that hold a pixel of each mask; 0 0 0 0 for an empty mask."""
    for n, mask in enumerate(masks):
        cols, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
        boxes[n] = [cols[0], rows[0], cols[-1], rows[-1]] if len(cols) else 0
