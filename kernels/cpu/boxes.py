"""Boxes: overlap measures and their gradients, suppression, RoI pooling, masks.

Every kernel is compiled exact: what is kept is decided by the same roundings as in the reference.
"""

import math

import numpy as np

from ..compile import cpu, inline, real
from ..scalars import exp
from .activation import LANES as MAXIMA
from .activation import row_max
from .panels import U

# ------------------------------------------------------------------------------------------------------------ one box


# Parallel over boxes, in memory order. Reads 4, writes 1.
@cpu(over="N", exact=True)
def box_area(begin, end, boxes, area):
    for i in range(begin, end):
        area[i] = (boxes[i, 2] - boxes[i, 0]) * (boxes[i, 3] - boxes[i, 1])


@cpu(over="N", exact=True)
def box_area_grad(begin, end, grad, boxes, grad_boxes):
    for i in range(begin, end):
        w, h = grad[i] * (boxes[i, 3] - boxes[i, 1]), grad[i] * (boxes[i, 2] - boxes[i, 0])
        grad_boxes[i, 0], grad_boxes[i, 1], grad_boxes[i, 2], grad_boxes[i, 3] = -w, -h, w, h


# Parallel over boxes, in memory order. Reads 4, writes 4. 0 x1 y1 x2 y2, 1 x1 y1 w h, 2 cx cy w h.
@cpu(over="N", exact=True)
def box_convert(begin, end, boxes, converted, source, target):
    half = real(0.5)
    for i in range(begin, end):
        for k in range(2):
            a, b = boxes[i, k], boxes[i, k + 2]
            first, last = a, b
            if target == 2:
                first = (a + b) * half if source == 0 else a + b * half if source == 1 else a
            elif source == 2:
                first = a - b * half
            if target == 0:
                last = b if source == 0 else a + b if source == 1 else a + b * half
            elif source == 0:
                last = b - a
            converted[i, k], converted[i, k + 2] = first, last


@cpu(over="N", exact=True)
def box_convert_grad(begin, end, grad, grad_boxes, source, target):
    half = real(0.5)
    for i in range(begin, end):
        for k in range(2):
            g, h = grad[i, k], grad[i, k + 2]
            first, last = g, h
            if source == 0 and target == 1:
                first = g - h
            elif source == 0 and target == 2:
                first, last = g * half - h, g * half + h
            elif source == 1 and target == 0:
                first = g + h
            elif source == 1 and target == 2:
                last = g * half + h
            elif source == 2 and target == 0:
                first, last = g + h, (h - g) * half
            elif source == 2 and target == 1:
                last = h - g * half
            grad_boxes[i, k], grad_boxes[i, k + 2] = first, last


@cpu(over="N", exact=True)
def clip_boxes(begin, end, boxes, clipped, height, width):
    zero = real(0)
    for i in range(begin, end):
        for k in range(4):
            v, limit = boxes[i, k], width if k % 2 == 0 else height
            v = zero if v < zero else v
            clipped[i, k] = limit if v > limit else v


@cpu(over="N", exact=True)
def clip_boxes_grad(begin, end, grad, boxes, grad_boxes, height, width):
    for i in range(begin, end):
        for k in range(4):
            v, limit = boxes[i, k], width if k % 2 == 0 else height
            grad_boxes[i, k] = grad[i, k] if v >= real(0) and v <= limit else real(0)


# One thread, without a branch: each index is written and stays if its box does.
@cpu(over="1", exact=True)
def remove_small_boxes(begin, end, boxes, keep, count, min_size):
    n = 0
    for i in range(boxes.shape[0]):
        keep[n] = i
        n += (boxes[i, 2] - boxes[i, 0] >= min_size) & (boxes[i, 3] - boxes[i, 1] >= min_size)
    count[0] = n
    keep[n:] = -1


# ------------------------------------------------------------------------------------------------------------ overlap


@inline(exact=True)
def _plus(a):
    return real(0) if a < real(0) else a


@inline(exact=True)
def _ratio(a, b):
    return a / (real(1) if b == real(0) else b)


@inline(exact=True)
def _shared(low1, high1, low2, high2):
    """The length that two intervals share; negative where they lie apart."""
    return (high2 if high2 < high1 else high1) - (low2 if low1 < low2 else low1)


@inline(exact=True)
def _around(low1, high1, low2, high2):
    """The length of the interval around two."""
    return (high2 if high1 < high2 else high1) - (low2 if low2 < low1 else low1)


@inline(exact=True)
def _area(x1, y1, x2, y2):
    return _plus(x2 - x1) * _plus(y2 - y1)


@inline(exact=True)
def _iou(ax1, ay1, ax2, ay2, aa, bx1, by1, bx2, by2, ba):
    inter = _plus(_shared(ax1, ax2, bx1, bx2)) * _plus(_shared(ay1, ay2, by1, by2))
    return _ratio(inter, (aa + ba) - inter)


@inline(exact=True)
def _giou(ax1, ay1, ax2, ay2, aa, bx1, by1, bx2, by2, ba):
    inter = _plus(_shared(ax1, ax2, bx1, bx2)) * _plus(_shared(ay1, ay2, by1, by2))
    both = (aa + ba) - inter
    around = _plus(_around(ax1, ax2, bx1, bx2)) * _plus(_around(ay1, ay2, by1, by2))
    return _ratio(inter, both) - _ratio(around - both, around)


@inline(exact=True)
def _diou(ax1, ay1, ax2, ay2, aa, bx1, by1, bx2, by2, ba, eps):
    w, h = _plus(_around(ax1, ax2, bx1, bx2)), _plus(_around(ay1, ay2, by1, by2))
    dx, dy = (ax1 + ax2) * real(0.5) - (bx1 + bx2) * real(0.5), (ay1 + ay2) * real(0.5) - (by1 + by2) * real(0.5)
    return _iou(ax1, ay1, ax2, ay2, aa, bx1, by1, bx2, by2, ba) - _ratio(dx * dx + dy * dy, w * w + h * h + eps)


@inline(exact=True)
def _ciou(diou, iou, angle, eps):
    v = real(0.40528473456935109) * angle * angle
    return diou - _ratio(v, real(1) - iou + v + eps) * v


@inline(exact=True)
def _angle(x1, y1, x2, y2):
    return real(math.atan2(_plus(x2 - x1), _plus(y2 - y1)))


@inline(exact=True)
def _planes(boxes, kind):
    """Corners, area and (for CIoU) angle as rows, so that a loop over boxes has unit strides."""
    planes = np.empty((6, boxes.shape[0]), boxes.dtype)
    for m in range(boxes.shape[0]):
        for k in range(4):
            planes[k, m] = boxes[m, k]
        planes[4, m] = _area(boxes[m, 0], boxes[m, 1], boxes[m, 2], boxes[m, 3])
    if kind == 3:
        for m in range(boxes.shape[0]):
            planes[5, m] = _angle(boxes[m, 0], boxes[m, 1], boxes[m, 2], boxes[m, 3])
    return planes


# Parallel over boxes1. boxes2 lies in planes: the inner loop has unit strides and vectorises, one loop a measure.
# Reads 5 values (6 for CIoU) from cache, writes 1 a pair.
@cpu(over="N", exact=True)
def box_iou(begin, end, boxes1, boxes2, iou, kind, eps):
    planes = _planes(boxes2, kind)
    x1, y1, x2, y2, area, angle = planes[0], planes[1], planes[2], planes[3], planes[4], planes[5]
    M = boxes2.shape[0]
    for i in range(begin, end):
        a, b, c, d = boxes1[i, 0], boxes1[i, 1], boxes1[i, 2], boxes1[i, 3]
        own, row = _area(a, b, c, d), iou[i]
        if kind == 0:
            for m in range(M):
                row[m] = _iou(a, b, c, d, own, x1[m], y1[m], x2[m], y2[m], area[m])
        elif kind == 1:
            for m in range(M):
                row[m] = _giou(a, b, c, d, own, x1[m], y1[m], x2[m], y2[m], area[m])
        else:
            for m in range(M):
                row[m] = _diou(a, b, c, d, own, x1[m], y1[m], x2[m], y2[m], area[m], eps)
        if kind == 3:
            turned = _angle(a, b, c, d)
            for m in range(M):
                plain = _iou(a, b, c, d, own, x1[m], y1[m], x2[m], y2[m], area[m])
                row[m] = _ciou(row[m], plain, turned - angle[m], eps)


@cpu(over="N", exact=True)
def box_iou_paired(begin, end, boxes1, boxes2, iou, kind, eps):
    for i in range(begin, end):
        a, b, c, d = boxes1[i, 0], boxes1[i, 1], boxes1[i, 2], boxes1[i, 3]
        p, q, r, s = boxes2[i, 0], boxes2[i, 1], boxes2[i, 2], boxes2[i, 3]
        one, two = _area(a, b, c, d), _area(p, q, r, s)
        if kind == 1:
            iou[i] = _giou(a, b, c, d, one, p, q, r, s, two)
        elif kind == 0:
            iou[i] = _iou(a, b, c, d, one, p, q, r, s, two)
        else:
            diou = _diou(a, b, c, d, one, p, q, r, s, two, eps)
            if kind == 3:
                diou = _ciou(diou, _iou(a, b, c, d, one, p, q, r, s, two), _angle(a, b, c, d) - _angle(p, q, r, s), eps)
            iou[i] = diou


@inline(exact=True)
def _larger(a, b):
    return real(0.5) if a == b else real(1) if a > b else real(0)


@inline(exact=True)
def _pull(a, i, b, m, g, kind, eps):
    """g times the derivative of the overlap of boxes a[i] and b[m] by the corners of the first."""
    ax1, ay1, ax2, ay2 = a[i, 0], a[i, 1], a[i, 2], a[i, 3]
    bx1, by1, bx2, by2 = b[m, 0], b[m, 1], b[m, 2], b[m, 3]
    zero, half = real(0), real(0.5)
    iw, ih = _shared(ax1, ax2, bx1, bx2), _shared(ay1, ay2, by1, by2)
    wa, ha = _plus(ax2 - ax1), _plus(ay2 - ay1)
    inter = _plus(iw) * _plus(ih)
    both = (wa * ha + _area(bx1, by1, bx2, by2)) - inter
    by_inter = zero if both == zero else g / both
    by_union = -_ratio(by_inter * inter, both)
    full_w, full_h = _around(ax1, ax2, bx1, bx2), _around(ay1, ay2, by1, by2)
    w, h = _plus(full_w), _plus(full_h)
    by_w, by_h, by_dx, by_dy, by_wa, by_ha = zero, zero, zero, zero, zero, zero
    if kind == 1:
        share = zero if w * h == zero else g / (w * h)
        by_around = -_ratio(share * both, w * h)
        by_union += share
        by_w, by_h = by_around * h, by_around * w
    if kind >= 2:
        dx, dy = (ax1 + ax2) * half - (bx1 + bx2) * half, (ay1 + ay2) * half - (by1 + by2) * half
        diagonal = w * w + h * h + eps
        share = _ratio(real(2) * g, diagonal)
        far = _ratio(share * (dx * dx + dy * dy), diagonal)
        by_dx, by_dy, by_w, by_h = -share * dx * half, -share * dy * half, far * w, far * h
    if kind == 3:
        angle = _angle(ax1, ay1, ax2, ay2) - _angle(bx1, by1, bx2, by2)
        v = real(0.40528473456935109) * angle * angle
        alpha = _ratio(v, real(1) - _ratio(inter, both) + v + eps)
        turn = _ratio(-g * alpha * real(0.81056946913870217) * angle, wa * wa + ha * ha)
        by_wa, by_ha = turn * ha, -turn * wa
    by_inter -= by_union
    by_iw = by_inter * _plus(ih) if iw >= zero else zero
    by_ih = by_inter * _plus(iw) if ih >= zero else zero
    by_wa = by_wa + by_union * ha if ax2 >= ax1 else zero
    by_ha = by_ha + by_union * wa if ay2 >= ay1 else zero
    by_w = by_w if full_w >= zero else zero
    by_h = by_h if full_h >= zero else zero
    return (
        by_dx - by_wa - by_iw * _larger(ax1, bx1) - by_w * _larger(bx1, ax1),
        by_dy - by_ha - by_ih * _larger(ay1, by1) - by_h * _larger(by1, ay1),
        by_dx + by_wa + by_iw * _larger(bx2, ax2) + by_w * _larger(ax2, bx2),
        by_dy + by_ha + by_ih * _larger(by2, ay2) + by_h * _larger(ay2, by2),
    )


# Parallel over the boxes whose gradient is asked for; each sums over the other list in order. The rows of grad are walked
# along memory in both cases. Reads grad once.
@cpu(over="K", exact=True)
def box_iou_grad(begin, end, grad, boxes1, boxes2, grad_boxes, kind, eps, second):
    for i in range(begin, end):
        for k in range(4):
            grad_boxes[i, k] = real(0)
    if second:
        for n in range(boxes1.shape[0]):
            for i in range(begin, end):
                p, q, r, s = _pull(boxes2, i, boxes1, n, grad[n, i], kind, eps)
                grad_boxes[i, 0] += p
                grad_boxes[i, 1] += q
                grad_boxes[i, 2] += r
                grad_boxes[i, 3] += s
    else:
        for i in range(begin, end):
            for m in range(boxes2.shape[0]):
                p, q, r, s = _pull(boxes1, i, boxes2, m, grad[i, m], kind, eps)
                grad_boxes[i, 0] += p
                grad_boxes[i, 1] += q
                grad_boxes[i, 2] += r
                grad_boxes[i, 3] += s


@cpu(over="N", exact=True)
def box_iou_paired_grad(begin, end, grad, boxes1, boxes2, grad_boxes1, grad_boxes2, kind, eps):
    for i in range(begin, end):
        p, q, r, s = _pull(boxes1, i, boxes2, i, grad[i], kind, eps)
        grad_boxes1[i, 0], grad_boxes1[i, 1], grad_boxes1[i, 2], grad_boxes1[i, 3] = p, q, r, s
        p, q, r, s = _pull(boxes2, i, boxes1, i, grad[i], kind, eps)
        grad_boxes2[i, 0], grad_boxes2[i, 1], grad_boxes2[i, 2], grad_boxes2[i, 3] = p, q, r, s


# Parallel over rows; boxes2 in planes, as in box_iou. Reads 5 values a pair from cache, writes 1 a row.
@cpu(over="N", exact=True)
def sparse_box_iou_count(begin, end, boxes1, boxes2, counts, threshold):
    planes = _planes(boxes2, 0)
    x1, y1, x2, y2, area = planes[0], planes[1], planes[2], planes[3], planes[4]
    for i in range(begin, end):
        a, b, c, d = boxes1[i, 0], boxes1[i, 1], boxes1[i, 2], boxes1[i, 3]
        own, n = _area(a, b, c, d), 0
        for m in range(boxes2.shape[0]):
            n += _iou(a, b, c, d, own, x1[m], y1[m], x2[m], y2[m], area[m]) > threshold
        counts[i] = n


@cpu(over="N", exact=True)
def sparse_box_iou(begin, end, boxes1, boxes2, counts, rows, cols, iou, threshold):
    at = counts[:begin].sum()
    planes = _planes(boxes2, 0)
    x1, y1, x2, y2, area = planes[0], planes[1], planes[2], planes[3], planes[4]
    values = np.empty(boxes2.shape[0], boxes2.dtype)
    for i in range(begin, end):
        if not counts[i]:
            continue
        a, b, c, d = boxes1[i, 0], boxes1[i, 1], boxes1[i, 2], boxes1[i, 3]
        own = _area(a, b, c, d)
        for m in range(boxes2.shape[0]):
            values[m] = _iou(a, b, c, d, own, x1[m], y1[m], x2[m], y2[m], area[m])
        for m in range(boxes2.shape[0]):
            if values[m] > threshold:
                rows[at], cols[at], iou[at] = i, m, values[m]
                at += 1


# -------------------------------------------------------------------------------------------------------- suppression


@inline(exact=True)
def _score_key(score):
    """Ascending where scores descend: both zeros alike, NaN last."""
    bits, sign = U(np.float32(score + np.float32(0)).view(np.uint32)), U(1 << 31)
    return (bits if bits & sign else bits ^ (sign - U(1))) if score == score else U((1 << 32) - 1)


@_score_key.float64
def _score_key(score):
    bits, sign = np.float64(score + 0.0).view(np.uint64), U(1 << 63)
    return (bits if bits & sign else bits ^ (sign - U(1))) if score == score else U((1 << 64) - 1)


@inline(exact=True)
def _sort(keys, items):
    """The items by ascending keys, equal ones as they stand: byte by byte, as many as the largest key has."""
    n, highest = len(keys), U(0)
    for i in range(n):
        highest = max(highest, keys[i])
    other_keys, others, starts, shift = np.empty_like(keys), np.empty_like(items), np.empty(257, np.int64), 0
    while shift < 64 and highest >> U(shift):
        starts[:] = 0
        for i in range(n):
            starts[((keys[i] >> U(shift)) & U(255)) + U(1)] += 1
        for digit in range(255):
            starts[digit + 1] += starts[digit]
        for i in range(n):
            digit = (keys[i] >> U(shift)) & U(255)
            at = starts[digit]
            starts[digit] = at + 1
            other_keys[at], others[at] = keys[i], items[i]
        keys, other_keys, items, others = other_keys, keys, others, items
        shift += 8
    return items


@inline(exact=True)
def _sort_sample(sample, n):
    for i in range(1, n):
        v, k = sample[i], i
        while k > 0 and sample[k - 1] > v:
            sample[k] = sample[k - 1]
            k -= 1
        sample[k] = v


@inline(exact=True)
def _cell(centre, low, scale, cells):
    at = (centre - low) * scale
    return int(at if at < cells - 1 else cells - 1) if at > 0 else 0


@inline(exact=True)
def _regular(area):
    return (area > real(0)) & (area < real(np.inf))


@inline(exact=True)
def _middle(low, high):
    return 0.5 * float(low) + 0.5 * float(high)


@inline(exact=True)
def _divide(planes, pitch, axis, begin, end, reach):
    """Origin, scale and number of the cells of a grid along one axis, from a sample: about the reach of a middling box each."""
    low, high, area = axis * pitch, (axis + 2) * pitch, 4 * pitch
    centres, sizes, n = np.empty(64), np.empty(64), 0
    for i in range(begin, end, (end - begin) // 63 + 1):
        if _regular(planes[area + i]):
            centres[n] = _middle(planes[low + i], planes[high + i])
            sizes[n] = float(planes[high + i]) - float(planes[low + i])
            n += 1
    if n < 8:
        return 0.0, 0.0, 1
    _sort_sample(centres, n)
    _sort_sample(sizes, n)
    extent = centres[n - 2] - centres[1]
    cells = min(max(extent / max(reach * sizes[n // 2], 1e-300), 1.0), math.sqrt(end - begin) / 4 + 1)
    return centres[1], (int(cells) / extent if extent > 0 else 0.0), int(cells)


FEW = 384  # kept boxes: to look at so many costs no more than to find those near by


SIDE = 16  # kept boxes that are looked at side by side


@inline(exact=True)
def _is_hit(kept, pitch, first, last, a, b, c, d, own, threshold):
    """Whether one of the kept boxes [first, last) overlaps more; those up to a multiple of SIDE more may be looked at, too."""
    for begin in range(first, last, SIDE):
        hit = False
        x1, y1, x2 = U(begin), U(begin + pitch), U(begin + 2 * pitch)
        y2, area = U(begin + 3 * pitch), U(begin + 4 * pitch)
        for i in range(SIDE):
            j = U(i)
            hit |= _iou(a, b, c, d, own, kept[x1 + j], kept[y1 + j], kept[x2 + j], kept[y2 + j], kept[area + j]) > threshold
        if hit:
            return True
    return False


@inline(exact=True)
def _keep(kept, at, planes, i, pitch):
    for k in range(5):
        kept[k * pitch + at] = planes[k * pitch + i]


@inline(exact=True)
def _box(planes, pitch, i):
    return planes[i], planes[pitch + i], planes[2 * pitch + i], planes[3 * pitch + i], planes[4 * pitch + i]


@inline(exact=True)
def _suppress_all(planes, pitch, begin, end, alive, threshold, limit, kept, most):
    """Each box against all kept before it, until more than `most` are; returns the first box that is left."""
    n = listed = 0
    for i in range(4 * pitch, 4 * pitch + end - begin + SIDE):
        kept[i] = real(np.nan)  # the area of no box: it overlaps nothing
    for i in range(begin, end):
        if n == limit:
            alive[i:end] = 0
            break
        if listed > most:
            return i
        a, b, c, d, own = _box(planes, pitch, i)
        alive[i] = not _is_hit(kept, pitch, 0, listed, a, b, c, d, own, threshold)
        n += alive[i]
        if alive[i] and (_regular(own) or threshold < 0):  # an empty or infinite box overlaps nothing
            _keep(kept, listed, planes, i, pitch)
            listed += 1
    return end


@inline(exact=True)
def _suppress(planes, pitch, begin, end, alive, threshold, limit, kept):
    """alive for the boxes of one group, in order of score. Where many are kept, one is looked at where its centre lies within
    the reach of the one that is asked about (see csrc/boxes.c); the cells of a grid hold the kept ones."""
    t, first = float(threshold), _suppress_all(planes, pitch, begin, end, alive, threshold, limit, kept, FEW)
    if first == end:
        return
    cells_x = cells_y = 1
    if t > 0.05 and t < 1:
        reach = (1 - t) * max(1.0, 0.5 / t)
        low_x, scale_x, cells_x = _divide(planes, pitch, 0, begin, end, reach)
        low_y, scale_y, cells_y = _divide(planes, pitch, 1, begin, end, reach)
    tiny = False  # rounding may make any overlap of such a box
    for i in range(4 * pitch + begin, 4 * pitch + end):
        tiny |= (planes[i] > real(0)) & (planes[i] < real(1e-30))
    if tiny or cells_x * cells_y < 4:
        _suppress_all(planes, pitch, begin, end, alive, threshold, limit, kept, end)
        return
    cell, used = np.empty(end - begin, np.int64), np.zeros(cells_x * cells_y, np.int64)
    for i in range(begin, end):
        cell[i - begin] = -1
        a, b, c, d, own = _box(planes, pitch, i)
        if _regular(own):
            at = _cell(_middle(b, d), low_y, scale_y, cells_y) * cells_x + _cell(_middle(a, c), low_x, scale_x, cells_x)
            cell[i - begin] = at
            used[at] += 1
    starts = np.zeros(cells_x * cells_y + 1, np.int64)
    for at in range(cells_x * cells_y):
        starts[at + 1] = starts[at] + used[at]
        used[at] = 0
    n = 0
    for i in range(begin, end):
        if n == limit:
            alive[i:end] = 0
            break
        at = cell[i - begin]
        if i >= first:
            a, b, c, d, own = _box(planes, pitch, i)
            hit = at >= 0 and _is_hit(kept, pitch, starts[at], starts[at] + used[at], a, b, c, d, own, threshold)  # most are
            if at >= 0 and not hit:
                w, h = float(c) - float(a), float(d) - float(b)
                r = reach * w * 1.001 + 1.6e-5 * (abs(float(a)) + abs(float(c)) + w / t)
                from_x = _cell(_middle(a, c) - r, low_x, scale_x, cells_x)
                to_x = _cell(_middle(a, c) + r, low_x, scale_x, cells_x)
                r = reach * h * 1.001 + 1.6e-5 * (abs(float(b)) + abs(float(d)) + h / t)
                from_y = _cell(_middle(b, d) - r, low_y, scale_y, cells_y)
                to_y = _cell(_middle(b, d) + r, low_y, scale_y, cells_y)
                for y in range(from_y, to_y + 1):
                    for near in range(y * cells_x + from_x, y * cells_x + to_x + 1):
                        last = starts[near] + used[near]
                        hit = hit or _is_hit(kept, pitch, starts[near], last, a, b, c, d, own, threshold)
            alive[i] = not hit
        n += alive[i]
        if alive[i] and at >= 0:
            _keep(kept, starts[at] + used[at], planes, i, pitch)
            used[at] += 1


# One thread. Sorts by score, then stably by group; a group meets only itself. Reads each box once, and per box the kept ones
# about it. Source: Felzenszwalb et al. (2010), section 7.
@cpu(over="1", exact=True)
def nms(begin, end, boxes, scores, groups, keep, count, iou_threshold, score_threshold, max_output):
    keep[:] = -1
    count[0] = 0
    order, keys = np.empty(len(scores), np.int64), np.empty(len(scores), np.uint64)
    n = 0
    for i in range(len(scores)):
        order[n], keys[n] = i, _score_key(scores[i])
        n += score_threshold == -np.inf or scores[i] > score_threshold
    if n == 0 or max_output <= 0:
        return
    order = _sort(keys[:n], order[:n])
    rank, starts, segments = np.arange(n), np.zeros(n + 1, np.int64), 0
    if len(groups):
        lowest = groups[order[0]]
        for i in range(n):
            lowest = min(lowest, groups[order[i]])
        for i in range(n):
            keys[i] = U(groups[order[i]]) - U(lowest)
        rank = _sort(keys[:n], rank)
        for i in range(1, n):
            if groups[order[rank[i]]] != groups[order[rank[i - 1]]]:
                segments += 1
                starts[segments] = i
    starts[segments + 1] = n
    pitch = n + SIDE  # of flat planes: a tuple of arrays would be counted as used, by an atomic operation, for every box
    planes, kept = np.empty(5 * pitch, boxes.dtype), np.empty(5 * pitch, boxes.dtype)
    for i in range(n):
        box = order[rank[i]]
        for k in range(4):
            planes[k * pitch + i] = boxes[box, k]
        planes[4 * pitch + i] = _area(boxes[box, 0], boxes[box, 1], boxes[box, 2], boxes[box, 3])
    alive, chosen = np.empty(n, np.uint8), np.empty(n, np.uint8)
    for segment in range(segments + 1):
        _suppress(planes, pitch, starts[segment], starts[segment + 1], alive, iou_threshold, max_output, kept)
    for i in range(n):
        chosen[rank[i]] = alive[i]
    n = 0
    for i in range(len(chosen)):
        if chosen[i] and n < max_output:
            keep[n] = order[i]
            n += 1
    count[0] = n


@inline(exact=True)
def _lower(left, planes, box, gaussian, iou_threshold, sigma, score_threshold):
    """Lowers the scores that are left by the overlap with a box, to -inf where they are then not above the threshold."""
    x1, y1, x2, y2, area = planes[0], planes[1], planes[2], planes[3], planes[4]
    a, b, c, d, own = x1[box], y1[box], x2[box], y2[box], area[box]
    for i in range(len(left)):
        iou = _iou(a, b, c, d, own, x1[i], y1[i], x2[i], y2[i], area[i])
        lowered = exp(-(iou * iou) / sigma) if gaussian else real(1) - iou if iou > iou_threshold else real(1)
        s = left[i] * (lowered if iou == iou else real(1))
        left[i] = s if s > score_threshold else real(-np.inf)


# One thread. One pass lowers the scores and drops what fell below the threshold, two short ones find the next best. Reads 7
# values, writes 1 a box for each box taken. Source: Bodla et al., Soft-NMS (2017).
@cpu(over="1", exact=True)
def soft_nms(begin, end, boxes, scores, keep, kept_scores, count, gaussian, iou_threshold, sigma, score_threshold):
    N, n = len(scores), 0
    planes, left, lanes = _planes(boxes, 0), np.empty(N, scores.dtype), np.empty(MAXIMA, scores.dtype)
    for i in range(N):
        left[i] = scores[i] if scores[i] > score_threshold else real(-np.inf)
    for n in range(N + 1):
        best, taken = row_max(left, lanes), 0
        if not best > real(-np.inf):
            break
        while left[taken] != best:
            taken += 1
        keep[n], kept_scores[n], left[taken] = taken, best, real(-np.inf)
        _lower(left, planes, taken, gaussian, iou_threshold, sigma, score_threshold)
    count[0] = n
    keep[n:] = -1
    kept_scores[n:] = real(0)


# ------------------------------------------------------------------------------------------------------------- RoIs


@inline(exact=True)
def _bad_image(boxes, images, bad):
    bad[0] = 0
    for k in range(boxes.shape[0]):
        image = boxes[k, 0]
        if not (image >= 0 and image < images and image == math.floor(image)):
            bad[0] = k + 1
            return True
    return False


@inline(exact=True)
def _grid(length, bins, ratio):
    """Samples along one side of a bin."""
    if ratio > 0:
        return ratio
    return int(min(max(math.ceil(min(length / real(bins), real(1 << 20))), 0), 1 << 20))


@inline(exact=True)
def _taps(start, length, bins, size, grid, starts, low, upper):
    """The samples of each bin inside the input: starts[p] to starts[p + 1] in low (pixel) and upper (share of the next)."""
    step, n = length / real(bins), 0
    between = float(step) / max(grid, 1)
    for p in range(bins):
        starts[p] = n
        first = start + real(p) * step
        begin, end = 0, grid
        if between > 0:
            begin = int(min(max((-1 - float(first)) / between - 2, 0.0), float(grid)))
            end = int(min(max((size - float(first)) / between + 2, 0.0), float(grid)))
        for i in range(begin, end):
            at = first + (real(i) + real(0.5)) * step / real(grid)
            if at >= real(-1) and at <= real(size):
                at = max(at, real(0))
                pixel = min(int(at), size - 1)
                low[n], upper[n] = pixel, (at - real(pixel) if pixel < size - 1 else real(0))
                n += 1
    starts[bins] = n


@inline(exact=True)
def _room(length, bins, size, grid):
    """More samples than _taps can find along one axis."""
    between = float(length) / bins / max(grid, 1)
    inside = (size + 8) / between + 8 if between > 0 else float(grid)
    return bins * int(min(float(grid), inside) + 1)


@inline(exact=True)
def _sample(plane, y, ly, x, lx):
    H, W = plane.shape
    y1, x1 = min(y + 1, H - 1), min(x + 1, W - 1)
    hy, hx = real(1) - ly, real(1) - lx
    return plane[y, x] * (hy * hx) + plane[y, x1] * (hy * lx) + plane[y1, x] * (ly * hx) + plane[y1, x1] * (ly * lx)


@inline(exact=True)
def _largest(plane, ys, ly, xs, lx, outside):
    """The largest sample and its number; -1 for one outside, that counts as 0."""
    best, which, here = real(0), -1, 0
    for i in range(len(ys)):
        for j in range(len(xs)):
            v = _sample(plane, ys[i], ly[i], xs[j], lx[j])
            if here == 0 or v > best or (v != v and best == best):
                best, which = v, here
            here += 1
    if here and outside and real(0) > best:
        best, which = real(0), -1
    return best, which


@inline(exact=True)
def _region(box, scale, ratio, aligned, PH, PW):
    """Where a RoI begins, its size, and the samples along one side of its bins: along y, along x."""
    offset = real(0.5) if aligned else real(0)
    x1, y1 = box[1] * scale - offset, box[2] * scale - offset
    w, h = box[3] * scale - offset - x1, box[4] * scale - offset - y1
    if not aligned:
        w, h = real(1) if w < real(1) else w, real(1) if h < real(1) else h
    if not math.isfinite(x1 + y1 + w + h):
        return (y1, h, 0), (x1, w, 0), False
    return (y1, h, _grid(h, PH, ratio)), (x1, w, _grid(w, PW, ratio)), True


@inline(exact=True)
def _most_samples(boxes, scale, ratio, aligned, PH, PW, H, W):
    """More samples than any RoI has along y, along x."""
    most_y, most_x = 1, 1
    for k in range(boxes.shape[0]):
        (_, h, gh), (_, w, gw), finite = _region(boxes[k], scale, ratio, aligned, PH, PW)
        if finite:
            most_y, most_x = max(most_y, _room(h, PH, H, gh)), max(most_x, _room(w, PW, W, gw))
    return most_y, most_x


@inline(exact=True)
def _merge(starts, low, upper, size, begins, pixels, weights):
    """The pixels that each bin reads along one axis, and how much they count: samples of one bin often share a pixel."""
    n = 0
    for p in range(len(starts) - 1):
        begins[p] = n
        for i in range(starts[p], starts[p + 1]):
            pixel, after = low[i], min(low[i] + 1, size - 1)
            at = n - 1 if n > begins[p] and pixels[n - 1] == pixel else n - 2
            if at >= begins[p] and pixels[at] == pixel:
                weights[at] += real(1) - upper[i]
            else:
                pixels[n], weights[n] = pixel, real(1) - upper[i]
                n += 1
            if pixels[n - 1] == after:
                weights[n - 1] += upper[i]
            else:
                pixels[n], weights[n] = after, upper[i]
                n += 1
    begins[len(starts) - 1] = n


LANES = 64  # channels side by side: a constant; a loop over fewer would be unrolled and not become vectors
PARTS = 8  # of the RoIs: units of work, where there are few channels


@inline(exact=True)
def _channels_last(planes, slab):
    """Up to LANES planes [C, H, W] as slab[pixel, channel], flat."""
    C, H, W = planes.shape
    for c in range(C):
        plane = planes[c].reshape(H * W)
        for i in range(H * W):
            slab[U(i) * U(LANES) + U(c)] = plane[i]


@inline(exact=True)
def _channels_first(bins, planes):
    """Bins of LANES channels each to up to LANES planes [C, PH, PW]."""
    C, PH, PW = planes.shape
    for c in range(C):
        plane = planes[c].reshape(PH * PW)
        for i in range(PH * PW):
            plane[i] = bins[U(i) * U(LANES) + U(c)]


@inline(exact=True)
def _add_pixel(source, pixel, weight, to, at):
    """to[at] += weight * source[pixel], for LANES channels."""
    a, b = U(pixel * LANES), U(at * LANES)
    for c in range(LANES):
        to[b + U(c)] += weight * source[a + U(c)]


@inline(exact=True)
def _largest_bins(planes, sy, ys, ly, gh, sx, xs, lx, gw, output):
    """The largest sample of each bin of each channel."""
    for c in range(output.shape[0]):
        for p in range(output.shape[1]):
            for q in range(output.shape[2]):
                outside = sy[p + 1] - sy[p] < gh or sx[q + 1] - sx[q] < gw
                ny, nx = slice(sy[p], sy[p + 1]), slice(sx[q], sx[q + 1])
                output[c, p, q] = _largest(planes[c], ys[ny], ly[ny], xs[nx], lx[nx], outside)[0]


# Parallel over images x LANES channels x PARTS of the RoIs. The channels lie side by side: a pixel is a vector, its weights are
# shared. For a row of bins the pixels of each column that a bin reads are summed along y, then those of each bin along x. Reads
# the input once, cached pixels some ny * nx times a bin; writes each bin once. Source: He et al., Mask R-CNN (2017), section 3.
@cpu(over="N*((C+63)//64)*8", exact=True)
def roi_align(begin, end, input, boxes, output, bad, spatial_scale, sampling_ratio, aligned, maximum):
    N, C, H, W = input.shape
    K, PH, PW = output.shape[0], output.shape[2], output.shape[3]
    if _bad_image(boxes, N, bad):
        return
    most_y, most_x = _most_samples(boxes, spatial_scale, sampling_ratio, aligned, PH, PW, H, W)
    sy, ys, ly = np.empty(PH + 1, np.int64), np.empty(most_y, np.int64), np.empty(most_y, boxes.dtype)
    sx, xs, lx = np.empty(PW + 1, np.int64), np.empty(most_x, np.int64), np.empty(most_x, boxes.dtype)
    begins_y, pixels_y, weights_y = np.empty_like(sy), np.empty(2 * most_y, np.int64), np.empty(2 * most_y, boxes.dtype)
    begins_x, pixels_x, weights_x = np.empty_like(sx), np.empty(2 * most_x, np.int64), np.empty(2 * most_x, boxes.dtype)
    slab, columns = np.zeros(H * W * LANES, input.dtype), np.empty(2 * most_x * LANES, input.dtype)
    bins, groups = np.empty(PH * PW * LANES, input.dtype), (C + LANES - 1) // LANES
    for unit in range(begin, end):
        group, part = unit // PARTS, unit % PARTS
        n, first = group // groups, group % groups * LANES
        last = min(first + LANES, C)
        if part == 0 or unit == begin:
            _channels_last(input[n, first:last], slab)
        for k in range(K * part // PARTS, K * (part + 1) // PARTS):
            if boxes[k, 0] != n:
                continue
            (y1, h, gh), (x1, w, gw), finite = _region(boxes[k], spatial_scale, sampling_ratio, aligned, PH, PW)
            if not finite:
                output[k, first:last] = real(np.nan)
                continue
            _taps(y1, h, PH, H, gh, sy, ys, ly)
            _taps(x1, w, PW, W, gw, sx, xs, lx)
            if maximum:
                _largest_bins(input[n, first:last], sy, ys, ly, gh, sx, xs, lx, gw, output[k, first:last])
                continue
            _merge(sy, ys, ly, H, begins_y, pixels_y, weights_y)
            _merge(sx, xs, lx, W, begins_x, pixels_x, weights_x)
            share = real(1) / real(max(gh * gw, 1))
            bins[:] = real(0)
            for p in range(PH):
                columns[: begins_x[PW] * LANES] = real(0)
                for i in range(begins_y[p], begins_y[p + 1]):
                    row, weight = pixels_y[i] * W, weights_y[i] * share
                    for j in range(begins_x[PW]):
                        _add_pixel(slab, row + pixels_x[j], weight, columns, j)
                for q in range(PW):
                    for j in range(begins_x[q], begins_x[q + 1]):
                        _add_pixel(columns, j, weights_x[j], bins, p * PW + q)
            _channels_first(bins, output[k, first:last])


@inline(exact=True)
def _spread(plane, y, ly, x, lx, g):
    H, W = plane.shape
    y1, x1 = min(y + 1, H - 1), min(x + 1, W - 1)
    hy, hx = real(1) - ly, real(1) - lx
    plane[y, x] += g * (hy * hx)
    plane[y, x1] += g * (hy * lx)
    plane[y1, x] += g * (ly * hx)
    plane[y1, x1] += g * (ly * lx)


# Parallel over channels; each adds up the RoIs in their order, so that the sums are always the same bits.
@cpu(over="C", exact=True)
def roi_align_grad(begin, end, grad, input, boxes, grad_input, bad, spatial_scale, sampling_ratio, aligned, maximum):
    N, C, H, W = input.shape
    K, PH, PW = grad.shape[0], grad.shape[2], grad.shape[3]
    if _bad_image(boxes, N, bad):
        return
    grad_input[:, begin:end] = real(0)
    for k in range(K):
        (y1, h, gh), (x1, w, gw), finite = _region(boxes[k], spatial_scale, sampling_ratio, aligned, PH, PW)
        if not finite:
            continue
        ry, rx = _room(h, PH, H, gh), _room(w, PW, W, gw)
        sy, sx = np.empty(PH + 1, np.int64), np.empty(PW + 1, np.int64)
        ys, ly, xs, lx = np.empty(ry, np.int64), np.empty(ry, boxes.dtype), np.empty(rx, np.int64), np.empty(rx, boxes.dtype)
        _taps(y1, h, PH, H, gh, sy, ys, ly)
        _taps(x1, w, PW, W, gw, sx, xs, lx)
        share = real(1) / real(max(gh * gw, 1))
        for c in range(begin, end):
            n = int(boxes[k, 0])
            plane, target = input[n, c], grad_input[n, c]
            for p in range(PH):
                for q in range(PW):
                    g = grad[k, c, p, q]
                    if maximum:
                        outside = sy[p + 1] - sy[p] < gh or sx[q + 1] - sx[q] < gw
                        ny, nx = slice(sy[p], sy[p + 1]), slice(sx[q], sx[q + 1])
                        which = _largest(plane, ys[ny], ly[ny], xs[nx], lx[nx], outside)[1]
                        if which >= 0:
                            i, j = sy[p] + which // (sx[q + 1] - sx[q]), sx[q] + which % (sx[q + 1] - sx[q])
                            _spread(target, ys[i], ly[i], xs[j], lx[j], g)
                    else:
                        for i in range(sy[p], sy[p + 1]):
                            for j in range(sx[q], sx[q + 1]):
                                _spread(target, ys[i], ly[i], xs[j], lx[j], g * share)


@inline(exact=True)
def _whole(v):
    """A coordinate rounded to a pixel, halves away from 0."""
    v = v + (real(0.5) if v > real(0) else real(-0.5))
    return int(min(max(math.trunc(min(max(v, real(-(1 << 24))), real(1 << 24))), -(1 << 24)), 1 << 24))


@inline(exact=True)
def _edges(low, high, bins, size, edges):
    """The pixels [edges[p, 0], edges[p, 1]) of each bin along one axis."""
    start = _whole(low)
    step = real(max(_whole(high) - start + 1, 1)) / real(bins)
    for p in range(bins):
        edges[p, 0] = min(max(start + int(math.floor(real(p) * step)), 0), size)
        edges[p, 1] = min(max(start + int(math.ceil(real(p + 1) * step)), 0), size)


@inline(exact=True)
def _largest_pixel(plane, rows, cols):
    """Row and column of the first of the largest pixels (of the first NaN); -1, -1 for an empty bin."""
    best, row, col = real(0), -1, -1
    for y in range(rows[0], rows[1]):
        for x in range(cols[0], cols[1]):
            v = plane[y, x]
            if row < 0 or v > best or (v != v and best == best):
                best, row, col = v, y, x
    return row, col


@inline(exact=True)
def _take_larger(source, at, n, best, to):
    """best[to] is the larger of it and of source[at], for n numbers; a NaN stays."""
    for i in range(n):
        u, v = best[U(to) + U(i)], source[U(at) + U(i)]
        best[U(to) + U(i)] = v if (not v <= u) & (u == u) else u


# Parallel and laid out as roi_align: for a row of bins the maxima of all its columns, then those of each bin. Reads a cached
# pixel once or twice, writes each bin once. Source: Girshick, Fast R-CNN (2015), section 2.1.
@cpu(over="N*((C+63)//64)*8", exact=True)
def roi_pool(begin, end, input, boxes, output, bad, spatial_scale):
    N, C, H, W = input.shape
    K, PH, PW = output.shape[0], output.shape[2], output.shape[3]
    if _bad_image(boxes, N, bad):
        return
    if output.size == 0:  # no bins: there is no first column
        return
    ys, xs = np.empty((PH, 2), np.int64), np.empty((PW, 2), np.int64)
    slab, columns = np.zeros(H * W * LANES, input.dtype), np.empty(W * LANES, input.dtype)
    bins, groups = np.empty(PH * PW * LANES, input.dtype), (C + LANES - 1) // LANES
    for unit in range(begin, end):
        group, part = unit // PARTS, unit % PARTS
        n, first = group // groups, group % groups * LANES
        last = min(first + LANES, C)
        if part == 0 or unit == begin:
            _channels_last(input[n, first:last], slab)
        for k in range(K * part // PARTS, K * (part + 1) // PARTS):
            if boxes[k, 0] != n:
                continue
            s = boxes[k] * spatial_scale
            if s[1] != s[1] or s[2] != s[2] or s[3] != s[3] or s[4] != s[4]:
                output[k, first:last] = real(np.nan)
                continue
            _edges(s[2], s[4], PH, H, ys)
            _edges(s[1], s[3], PW, W, xs)
            left, width = xs[0, 0], xs[PW - 1, 1] - xs[0, 0]
            for p in range(PH):
                columns[: width * LANES] = real(-np.inf)
                for y in range(ys[p, 0], ys[p, 1]):
                    _take_larger(slab, (y * W + left) * LANES, width * LANES, columns, 0)
                for q in range(PW):
                    at, empty = (p * PW + q) * LANES, ys[p, 0] >= ys[p, 1] or xs[q, 0] >= xs[q, 1]
                    bins[at : at + LANES] = real(0) if empty else real(-np.inf)
                    for x in range(xs[q, 0], xs[q, 1] if not empty else 0):
                        _take_larger(columns, (x - left) * LANES, LANES, bins, at)
            _channels_first(bins, output[k, first:last])


# Parallel over channels; each adds up the RoIs in their order.
@cpu(over="C", exact=True)
def roi_pool_grad(begin, end, grad, input, boxes, grad_input, bad, spatial_scale):
    N, C, H, W = input.shape
    K, PH, PW = grad.shape[0], grad.shape[2], grad.shape[3]
    if _bad_image(boxes, N, bad):
        return
    grad_input[:, begin:end] = real(0)
    ys, xs = np.empty((PH, 2), np.int64), np.empty((PW, 2), np.int64)
    for k in range(K):
        s = boxes[k] * spatial_scale
        if s[1] != s[1] or s[2] != s[2] or s[3] != s[3] or s[4] != s[4]:
            continue
        _edges(s[2], s[4], PH, H, ys)
        _edges(s[1], s[3], PW, W, xs)
        n = int(boxes[k, 0])
        for c in range(begin, end):
            for p in range(PH):
                for q in range(PW):
                    y, x = _largest_pixel(input[n, c], ys[p], xs[q])
                    if y >= 0:
                        grad_input[n, c, y, x] += grad[k, c, p, q]


# ------------------------------------------------------------------------------------------------------------- masks


# Parallel over masks1. The bytes of two masks, 0 or 1, are multiplied and summed: unit strides, vectorises.
@cpu(over="A", exact=True)
def mask_iou(begin, end, masks1, masks2, iou):
    B, P = masks2.shape
    areas = np.empty(B, np.int64)
    for b in range(B):
        total = 0
        for p in range(P):
            total += masks2[b, p]
        areas[b] = total
    for a in range(begin, end):
        own = 0
        for p in range(P):
            own += masks1[a, p]
        for b in range(B):
            inter = 0
            for p in range(P):
                inter += masks1[a, p] & masks2[b, p]
            iou[a, b] = real(inter / max(own + areas[b] - inter, 1))


# Parallel over masks, row by row: from the left to the first pixel, from the right to the last one known.
@cpu(over="N", exact=True)
def masks_to_boxes(begin, end, masks, boxes):
    H, W = masks.shape[1], masks.shape[2]
    for n in range(begin, end):
        left, right, top, bottom = W, -1, -1, -1
        for y in range(H):
            x = 0
            while x < W and not masks[n, y, x]:
                x += 1
            if x == W:
                continue
            top, bottom, left = y if top < 0 else top, y, min(left, x)
            x = W - 1
            while x > right and not masks[n, y, x]:
                x -= 1
            right = max(right, x)
        boxes[n, 0], boxes[n, 1], boxes[n, 2], boxes[n, 3] = (left, top, right, bottom) if top >= 0 else (0, 0, 0, 0)
