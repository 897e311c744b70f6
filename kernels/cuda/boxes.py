"""Boxes: overlap measures and their gradients, suppression, RoI pooling, masks.

A product that is added to or subtracted from something goes through `cuda.fma(a, b, 0)` where its rounding decides what is
kept: a compiler may contract a * b + c, but not that.
"""

import math

import numpy as np

from ..compile import block, cuda, gpu, inline, real

THREADS = block(128)
MANY = block(512)  # for work that one block does alone


def _blocks(n):
    return -(-n // THREADS)


# ------------------------------------------------------------------------------------------------------------ one box


# One thread a box in every kernel of this part; neighbours read neighbouring 16 or 32 bytes.
@gpu("real[:,:], real[:]")
def _box_area(boxes, area):
    i = cuda.grid(1)
    if i < area.shape[0]:
        area[i] = (boxes[i, 2] - boxes[i, 0]) * (boxes[i, 3] - boxes[i, 1])


def box_area(boxes, area):
    if len(area):
        _box_area[_blocks(len(area)), THREADS](boxes, area)


@gpu("real[:], real[:,:], real[:,:]")
def _box_area_grad(grad, boxes, grad_boxes):
    i = cuda.grid(1)
    if i < grad.shape[0]:
        w, h = grad[i] * (boxes[i, 3] - boxes[i, 1]), grad[i] * (boxes[i, 2] - boxes[i, 0])
        grad_boxes[i, 0] = -w
        grad_boxes[i, 1] = -h
        grad_boxes[i, 2] = w
        grad_boxes[i, 3] = h


def box_area_grad(grad, boxes, grad_boxes):
    if len(grad):
        _box_area_grad[_blocks(len(grad)), THREADS](grad, boxes, grad_boxes)


@gpu("real[:,:], real[:,:], i32, i32")
def _box_convert(boxes, converted, source, target):
    i, half = cuda.grid(1), real(0.5)
    if i < boxes.shape[0]:
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
            converted[i, k] = first
            converted[i, k + 2] = last


def box_convert(boxes, converted, source, target):
    if len(boxes):
        _box_convert[_blocks(len(boxes)), THREADS](boxes, converted, source, target)


@gpu("real[:,:], real[:,:], i32, i32")
def _box_convert_grad(grad, grad_boxes, source, target):
    i, half = cuda.grid(1), real(0.5)
    if i < grad.shape[0]:
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
            grad_boxes[i, k] = first
            grad_boxes[i, k + 2] = last


def box_convert_grad(grad, grad_boxes, source, target):
    if len(grad):
        _box_convert_grad[_blocks(len(grad)), THREADS](grad, grad_boxes, source, target)


@gpu("real[:,:], real[:,:], real, real")
def _clip_boxes(boxes, clipped, height, width):
    i = cuda.grid(1)
    if i < boxes.shape[0]:
        for k in range(4):
            v, limit = boxes[i, k], width if k % 2 == 0 else height
            v = real(0) if v < real(0) else v
            clipped[i, k] = limit if v > limit else v


def clip_boxes(boxes, clipped, height, width):
    if len(boxes):
        _clip_boxes[_blocks(len(boxes)), THREADS](boxes, clipped, height, width)


@gpu("real[:,:], real[:,:], real[:,:], real, real")
def _clip_boxes_grad(grad, boxes, grad_boxes, height, width):
    i = cuda.grid(1)
    if i < boxes.shape[0]:
        for k in range(4):
            v, limit = boxes[i, k], width if k % 2 == 0 else height
            grad_boxes[i, k] = grad[i, k] if v >= real(0) and v <= limit else real(0)


def clip_boxes_grad(grad, boxes, grad_boxes, height, width):
    if len(boxes):
        _clip_boxes_grad[_blocks(len(boxes)), THREADS](grad, boxes, grad_boxes, height, width)


# One block: a tile of boxes at a time; each thread places its box behind those of the threads before it.
@gpu("real[:,:], i64[:], i64[:], real")
def _remove_small_boxes(boxes, keep, count, min_size):
    flags = cuda.shared.array(THREADS, np.int32)
    t, N, n = cuda.threadIdx.x, boxes.shape[0], 0
    for base in range(0, N, THREADS):
        i, large = base + t, False
        if i < N:
            large = boxes[i, 2] - boxes[i, 0] >= min_size and boxes[i, 3] - boxes[i, 1] >= min_size
        flags[t] = 1 if large else 0
        cuda.syncthreads()
        before, all_of_them = 0, 0
        for k in range(THREADS):
            before += flags[k] if k < t else 0
            all_of_them += flags[k]
        if large:
            keep[n + before] = i
        n += all_of_them
        cuda.syncthreads()
    for i in range(n + t, N, THREADS):
        keep[i] = -1
    if t == 0:
        count[0] = n


def remove_small_boxes(boxes, keep, count, min_size):
    _remove_small_boxes[1, THREADS](boxes, keep, count, min_size)


# ------------------------------------------------------------------------------------------------------------ overlap


@inline
def _plus(a):
    return real(0) if a < real(0) else a


@inline
def _product(a, b):
    """a * b, rounded here and not later."""
    return cuda.fma(a, b, real(0))


@inline
def _ratio(a, b):
    return a / (real(1) if b == real(0) else b)


@inline
def _shared(low1, high1, low2, high2):
    return (high2 if high2 < high1 else high1) - (low2 if low1 < low2 else low1)


@inline
def _around(low1, high1, low2, high2):
    return (high2 if high1 < high2 else high1) - (low2 if low2 < low1 else low1)


@inline
def _area(x1, y1, x2, y2):
    return _product(_plus(x2 - x1), _plus(y2 - y1))


@inline
def _iou(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2):
    inter = _product(_plus(_shared(ax1, ax2, bx1, bx2)), _plus(_shared(ay1, ay2, by1, by2)))
    return _ratio(inter, (_area(ax1, ay1, ax2, ay2) + _area(bx1, by1, bx2, by2)) - inter)


@inline
def _angle(x1, y1, x2, y2):
    return math.atan2(_plus(x2 - x1), _plus(y2 - y1))


@inline
def _measure(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2, kind, eps):
    inter = _product(_plus(_shared(ax1, ax2, bx1, bx2)), _plus(_shared(ay1, ay2, by1, by2)))
    both = (_area(ax1, ay1, ax2, ay2) + _area(bx1, by1, bx2, by2)) - inter
    iou = _ratio(inter, both)
    if kind == 0:
        return iou
    w, h = _plus(_around(ax1, ax2, bx1, bx2)), _plus(_around(ay1, ay2, by1, by2))
    if kind == 1:
        return iou - _ratio(_product(w, h) - both, _product(w, h))
    half = real(0.5)
    dx, dy = (ax1 + ax2) * half - (bx1 + bx2) * half, (ay1 + ay2) * half - (by1 + by2) * half
    diou = iou - _ratio(dx * dx + dy * dy, w * w + h * h + eps)
    if kind == 2:
        return diou
    angle = _angle(ax1, ay1, ax2, ay2) - _angle(bx1, by1, bx2, by2)
    v = real(0.40528473456935109) * angle * angle
    return diou - _ratio(v, real(1) - iou + v + eps) * v


# A thread holds one box of boxes2 and walks down a share of boxes1, which all threads of a warp read together: the matrix is
# written once, coalesced, and its write is what bounds the kernel.
@gpu("real[:,:], real[:,:], real[:,:], i32, real")
def _box_iou(boxes1, boxes2, iou, kind, eps):
    m = cuda.grid(1)
    if m < boxes2.shape[0]:
        p, q, r, s = boxes2[m, 0], boxes2[m, 1], boxes2[m, 2], boxes2[m, 3]
        for i in range(cuda.blockIdx.y, boxes1.shape[0], cuda.gridDim.y):
            iou[i, m] = _measure(boxes1[i, 0], boxes1[i, 1], boxes1[i, 2], boxes1[i, 3], p, q, r, s, kind, eps)


def box_iou(boxes1, boxes2, iou, kind, eps):
    N, M = iou.shape
    if N and M:
        _box_iou[(_blocks(M), min(max(-(-N // 4), 1), 65535)), THREADS](boxes1, boxes2, iou, kind, eps)


@gpu("real[:,:], real[:,:], real[:], i32, real")
def _box_iou_paired(boxes1, boxes2, iou, kind, eps):
    i = cuda.grid(1)
    if i < iou.shape[0]:
        p, q, r, s = boxes2[i, 0], boxes2[i, 1], boxes2[i, 2], boxes2[i, 3]
        iou[i] = _measure(boxes1[i, 0], boxes1[i, 1], boxes1[i, 2], boxes1[i, 3], p, q, r, s, kind, eps)


def box_iou_paired(boxes1, boxes2, iou, kind, eps):
    if len(iou):
        _box_iou_paired[_blocks(len(iou)), THREADS](boxes1, boxes2, iou, kind, eps)


@inline
def _larger(a, b):
    return real(0.5) if a == b else real(1) if a > b else real(0)


@inline
def _pull(a, i, b, m, g, kind, eps):
    """g times the derivative of the overlap of boxes a[i] and b[m] by the corners of the first."""
    ax1, ay1, ax2, ay2 = a[i, 0], a[i, 1], a[i, 2], a[i, 3]
    bx1, by1, bx2, by2 = b[m, 0], b[m, 1], b[m, 2], b[m, 3]
    zero, half = real(0), real(0.5)
    iw, ih = _shared(ax1, ax2, bx1, bx2), _shared(ay1, ay2, by1, by2)
    wa, ha = _plus(ax2 - ax1), _plus(ay2 - ay1)
    inter = _product(_plus(iw), _plus(ih))
    both = (_product(wa, ha) + _area(bx1, by1, bx2, by2)) - inter
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


# One block a box of boxes1: its threads share the row of grad, coalesced, then a tree in shared memory adds them up.
@gpu("real[:,:], real[:,:], real[:,:], real[:,:], i32, real")
def _grad_rows(grad, boxes1, boxes2, grad_boxes, kind, eps):
    sums = cuda.shared.array((4, THREADS), real)
    t, i = cuda.threadIdx.x, cuda.blockIdx.x
    for k in range(4):
        sums[k, t] = real(0)
    for m in range(t, boxes2.shape[0], THREADS):
        p, q, r, s = _pull(boxes1, i, boxes2, m, grad[i, m], kind, eps)
        sums[0, t] += p
        sums[1, t] += q
        sums[2, t] += r
        sums[3, t] += s
    cuda.syncthreads()
    step = THREADS // 2
    while step > 0:
        if t < step:
            for k in range(4):
                sums[k, t] += sums[k, t + step]
        cuda.syncthreads()
        step //= 2
    if t < 4:
        grad_boxes[i, t] = sums[t, 0]


# One thread a box of boxes2, down the rows: neighbours read neighbouring values of grad.
@gpu("real[:,:], real[:,:], real[:,:], real[:,:], i32, real")
def _grad_columns(grad, boxes1, boxes2, grad_boxes, kind, eps):
    m = cuda.grid(1)
    if m < boxes2.shape[0]:
        a, b, c, d = real(0), real(0), real(0), real(0)
        for n in range(boxes1.shape[0]):
            p, q, r, s = _pull(boxes2, m, boxes1, n, grad[n, m], kind, eps)
            a += p
            b += q
            c += r
            d += s
        grad_boxes[m, 0] = a
        grad_boxes[m, 1] = b
        grad_boxes[m, 2] = c
        grad_boxes[m, 3] = d


def box_iou_grad(grad, boxes1, boxes2, grad_boxes, kind, eps, second):
    if not len(grad_boxes):
        return
    if second:
        _grad_columns[_blocks(len(grad_boxes)), THREADS](grad, boxes1, boxes2, grad_boxes, kind, eps)
    else:
        _grad_rows[len(grad_boxes), THREADS](grad, boxes1, boxes2, grad_boxes, kind, eps)


@gpu("real[:], real[:,:], real[:,:], real[:,:], real[:,:], i32, real")
def _box_iou_paired_grad(grad, boxes1, boxes2, grad_boxes1, grad_boxes2, kind, eps):
    i = cuda.grid(1)
    if i < grad.shape[0]:
        p, q, r, s = _pull(boxes1, i, boxes2, i, grad[i], kind, eps)
        grad_boxes1[i, 0] = p
        grad_boxes1[i, 1] = q
        grad_boxes1[i, 2] = r
        grad_boxes1[i, 3] = s
        p, q, r, s = _pull(boxes2, i, boxes1, i, grad[i], kind, eps)
        grad_boxes2[i, 0] = p
        grad_boxes2[i, 1] = q
        grad_boxes2[i, 2] = r
        grad_boxes2[i, 3] = s


def box_iou_paired_grad(grad, boxes1, boxes2, grad_boxes1, grad_boxes2, kind, eps):
    if len(grad):
        _box_iou_paired_grad[_blocks(len(grad)), THREADS](grad, boxes1, boxes2, grad_boxes1, grad_boxes2, kind, eps)


@inline
def _above(boxes1, i, boxes2, m, threshold):
    a, b, c, d = boxes1[i, 0], boxes1[i, 1], boxes1[i, 2], boxes1[i, 3]
    return _iou(a, b, c, d, boxes2[m, 0], boxes2[m, 1], boxes2[m, 2], boxes2[m, 3]) > threshold


# One block a row; its threads count their columns, a tree adds them up.
@gpu("real[:,:], real[:,:], i64[:], real")
def _sparse_count(boxes1, boxes2, counts, threshold):
    sums = cuda.shared.array(THREADS, np.int32)
    t, i, n = cuda.threadIdx.x, cuda.blockIdx.x, 0
    for m in range(t, boxes2.shape[0], THREADS):
        n += 1 if _above(boxes1, i, boxes2, m, threshold) else 0
    sums[t] = n
    cuda.syncthreads()
    step = THREADS // 2
    while step > 0:
        if t < step:
            sums[t] += sums[t + step]
        cuda.syncthreads()
        step //= 2
    if t == 0:
        counts[i] = sums[0]


def sparse_box_iou_count(boxes1, boxes2, counts, threshold):
    if len(counts):
        _sparse_count[len(counts), THREADS](boxes1, boxes2, counts, threshold)


# One block: each thread adds up a stretch of counts; then every stretch starts where those before it end.
@gpu("i64[:], i64[:]")
def _offsets(counts, offsets):
    sums = cuda.shared.array(THREADS, np.int64)
    t, N = cuda.threadIdx.x, counts.shape[0]
    stretch = (N + THREADS - 1) // THREADS
    total = 0
    for i in range(t * stretch, min((t + 1) * stretch, N)):
        total += counts[i]
    sums[t] = total
    cuda.syncthreads()
    at = 0
    for k in range(t):
        at += sums[k]
    for i in range(t * stretch, min((t + 1) * stretch, N)):
        offsets[i] = at
        at += counts[i]


# One block a row, a tile of columns at a time; each thread places its pair behind those of the threads before it.
@gpu("real[:,:], real[:,:], i64[:], i64[:], i64[:], i64[:], real[:], real")
def _sparse(boxes1, boxes2, counts, offsets, rows, cols, iou, threshold):
    flags = cuda.shared.array(THREADS, np.int32)
    t, i, M = cuda.threadIdx.x, cuda.blockIdx.x, boxes2.shape[0]
    at = offsets[i]
    if counts[i] == 0:
        return
    a, b, c, d = boxes1[i, 0], boxes1[i, 1], boxes1[i, 2], boxes1[i, 3]
    for base in range(0, M, THREADS):
        m, value = base + t, real(-2)
        if m < M:
            value = _iou(a, b, c, d, boxes2[m, 0], boxes2[m, 1], boxes2[m, 2], boxes2[m, 3])
        flags[t] = 1 if m < M and value > threshold else 0
        cuda.syncthreads()
        before, found = 0, 0
        for k in range(THREADS):
            before += flags[k] if k < t else 0
            found += flags[k]
        if flags[t]:
            rows[at + before] = i
            cols[at + before] = m
            iou[at + before] = value
        at += found
        cuda.syncthreads()


def sparse_box_iou(boxes1, boxes2, counts, rows, cols, iou, threshold):
    if len(iou):
        offsets = cuda.device_array(len(counts), np.int64)
        _offsets[1, THREADS](counts, offsets)
        _sparse[len(counts), THREADS](boxes1, boxes2, counts, offsets, rows, cols, iou, threshold)


# -------------------------------------------------------------------------------------------------------- suppression


@inline
def _chosen(score, lowest):
    return lowest == real(-math.inf) or score > lowest


@inline
def _comes_before(s, i, t, j, lowest):
    """Whether box i with score s comes before box j with score t: those above the lowest score, then NaN last, then index."""
    a, b = _chosen(s, lowest), _chosen(t, lowest)
    if a != b:
        return a
    if s > t or (s == s and t != t):
        return True
    if t > s or (t == t and s != s):
        return False
    return i < j


# One thread a box: its rank is the number of boxes that come before it. Scores pass through shared memory in tiles.
@gpu("real[:], i64[:], i64[:], real")
def _rank(scores, order, keep, lowest):
    tile = cuda.shared.array(THREADS, real)
    t, i, N = cuda.threadIdx.x, cuda.grid(1), scores.shape[0]
    own, rank = scores[min(i, N - 1)], 0
    for base in range(0, N, THREADS):
        tile[t] = scores[min(base + t, N - 1)]
        cuda.syncthreads()
        for k in range(min(THREADS, N - base)):
            rank += 1 if _comes_before(tile[k], base + k, own, i, lowest) else 0
        cuda.syncthreads()
    if i < N:
        order[rank] = i
        keep[i] = -1


# One thread a word: which of 64 boxes the box of rank `start + row` overlaps, all of a lower rank and the same group.
@gpu("real[:,:], i64[:], i64[:], i64[:,:], i64, real")
def _overlaps(boxes, groups, order, words, start, threshold):
    w, row, N = cuda.grid(1), cuda.blockIdx.y, order.shape[0]
    if w >= words.shape[1] or start + row >= N:
        return
    i, bits = order[start + row], np.int64(0)
    grouped = groups.shape[0] > 0
    for k in range(64):
        r = w * 64 + k
        if r > start + row and r < N:
            j = order[r]
            if (not grouped or groups[i] == groups[j]) and _above(boxes, i, boxes, j, threshold):
                bits |= np.int64(1) << np.int64(k)
    words[row, w] = bits


# One block walks down the ranks: a box not suppressed is kept and its words join those suppressed.
@gpu("real[:], i64[:], i64[:,:], i64[:], i64[:], i64[:], i64, i64, real")
def _walk(scores, order, words, gone, keep, count, start, limit, lowest):
    t = cuda.threadIdx.x
    kept = count[0]
    for row in range(min(words.shape[0], order.shape[0] - start)):
        r = start + row
        if kept >= limit or not _chosen(scores[order[r]], lowest):
            break
        if (gone[r // 64] >> np.int64(r % 64)) & np.int64(1) == 0:
            if t == 0:
                keep[kept] = order[r]
            kept += 1
            for w in range(r // 64 + t, words.shape[1], MANY):
                gone[w] |= words[row, w]
        cuda.syncthreads()
    if t == 0:
        count[0] = kept


@gpu("i64[:]")
def _clear(a):
    i = cuda.grid(1)
    if i < a.shape[0]:
        a[i] = 0


ROWS = 4096  # ranks in one go: their overlaps take 51 MB for 100,000 boxes


def nms(boxes, scores, groups, keep, count, iou_threshold, score_threshold, max_output):
    N = len(scores)
    _clear[1, THREADS](count)
    if not N:
        return
    width = -(-N // 64)
    order, gone = cuda.device_array(N, np.int64), cuda.device_array(width, np.int64)
    words = cuda.device_array((min(N, ROWS), width), np.int64)
    _rank[_blocks(N), THREADS](scores, order, keep, score_threshold)
    _clear[_blocks(width), THREADS](gone)
    for start in range(0, N, ROWS):
        grid = (_blocks(width), min(ROWS, N - start))
        _overlaps[grid, THREADS](boxes, groups, order, words, start, iou_threshold)
        _walk[1, MANY](scores, order, words, gone, keep, count, start, max_output, score_threshold)


# One block: the threads share the boxes, lower the scores, and a tree finds the next best (the lower index of equal ones).
@gpu("real[:,:], real[:], i64[:], real[:], i64[:], real[:], i32, real, real, real")
def _soft_nms(boxes, scores, keep, kept_scores, count, left, gaussian, iou_threshold, sigma, score_threshold):
    best = cuda.shared.array(MANY, real)
    place = cuda.shared.array(MANY, np.int64)
    t, N, dead = cuda.threadIdx.x, scores.shape[0], real(-math.inf)
    for i in range(t, N, MANY):
        left[i] = scores[i] if scores[i] > score_threshold else dead
        keep[i] = -1
        kept_scores[i] = real(0)
    n = 0
    for _ in range(N):
        top, at = dead, np.int64(N)
        for i in range(t, N, MANY):
            if left[i] > top:
                top, at = left[i], np.int64(i)
        best[t] = top
        place[t] = at
        cuda.syncthreads()
        step = MANY // 2
        while step > 0:
            if t < step and (best[t + step] > best[t] or (best[t + step] == best[t] and place[t + step] < place[t])):
                best[t] = best[t + step]
                place[t] = place[t + step]
            cuda.syncthreads()
            step //= 2
        taken, top = place[0], best[0]
        cuda.syncthreads()
        if not top > dead:
            break
        if t == 0:
            keep[n] = taken
            kept_scores[n] = top
        n += 1
        a, b, c, d = boxes[taken, 0], boxes[taken, 1], boxes[taken, 2], boxes[taken, 3]
        for i in range(t, N, MANY):
            iou, lowered = _iou(a, b, c, d, boxes[i, 0], boxes[i, 1], boxes[i, 2], boxes[i, 3]), real(1)
            if gaussian:
                if iou == iou:
                    lowered = math.exp(-(iou * iou) / sigma)
            elif iou > iou_threshold:
                lowered = real(1) - iou
            s = left[i] * lowered
            left[i] = s if s > score_threshold and i != taken else dead
        cuda.syncthreads()
    if t == 0:
        count[0] = n


def soft_nms(boxes, scores, keep, kept_scores, count, gaussian, iou_threshold, sigma, score_threshold):
    left = cuda.device_array(max(len(scores), 1), scores.dtype)
    _soft_nms[1, MANY](boxes, scores, keep, kept_scores, count, left, gaussian, iou_threshold, sigma, score_threshold)


# ------------------------------------------------------------------------------------------------------------- RoIs


# One block: each thread looks at its RoIs, a tree finds the first whose image is none of the N.
@gpu("real[:,:], i64[:], i32")
def _check_images(boxes, bad, images):
    first = cuda.shared.array(THREADS, np.int64)
    t, K = cuda.threadIdx.x, boxes.shape[0]
    at = np.int64(K)
    for k in range(t, K, THREADS):
        image = boxes[k, 0]
        fine = image >= real(0) and image < real(images)
        if fine:
            fine = real(np.int32(image)) == image
        if not fine and k < at:
            at = np.int64(k)
    first[t] = at
    cuda.syncthreads()
    step = THREADS // 2
    while step > 0:
        if t < step and first[t + step] < first[t]:
            first[t] = first[t + step]
        cuda.syncthreads()
        step //= 2
    if t == 0:
        bad[0] = first[0] + 1 if first[0] < K else 0


@inline
def _start(boxes, k, axis, scale, aligned):
    return boxes[k, 1 + axis] * scale - (real(0.5) if aligned else real(0))


@inline
def _length(boxes, k, axis, scale, aligned):
    end = boxes[k, 3 + axis] * scale - (real(0.5) if aligned else real(0))
    length = end - _start(boxes, k, axis, scale, aligned)
    return real(1) if not aligned and length < real(1) else length


@inline
def _finite(x, y, w, h):
    total = x + y + w + h
    return total - total == real(0)


@inline
def _grid(length, bins, ratio):
    """Samples along one side of a bin."""
    if ratio > 0:
        return np.int32(ratio)
    wanted = length / real(bins)
    wanted = real(1 << 20) if wanted > real(1 << 20) else wanted
    whole = np.int32(wanted)
    whole += np.int32(1) if real(whole) < wanted else np.int32(0)
    return whole if whole > np.int32(0) else np.int32(0)


@inline
def _first_sample(first, step, grid, limit):
    """About the number of the sample at `limit`, in [0, grid]."""
    between = step / real(grid)
    if not between > real(0):
        return np.int32(0)
    at = (limit - first) / between
    return np.int32(at if at > real(0) else real(0)) if at < real(grid) else grid


@inline
def _begin(first, step, grid):
    return max(_first_sample(first, step, grid, real(-1)) - np.int32(3), np.int32(0)) if grid > 0 else np.int32(0)


@inline
def _end(first, step, grid, size):
    if grid > 0 and step > real(0):
        return min(_first_sample(first, step, grid, real(size)) + np.int32(3), grid)
    return grid


@inline
def _place(first, step, grid, i):
    return first + (real(i) + real(0.5)) * step / real(grid)


@inline
def _inside(at, size):
    return at >= real(-1) and at <= real(size)


@inline
def _pixel(at, size):
    """The pixel below a sample."""
    return min(np.int32(at if at > real(0) else real(0)), np.int32(size - 1))


@inline
def _upper(at, pixel, size):
    """The share of the pixel above."""
    return (at if at > real(0) else real(0)) - real(pixel) if pixel < size - 1 else real(0)


@inline
def _sample(input, n, c, at_y, at_x):
    H, W = input.shape[2], input.shape[3]
    y, x = _pixel(at_y, H), _pixel(at_x, W)
    ly, lx = _upper(at_y, y, H), _upper(at_x, x, W)
    y1, x1 = min(y + 1, H - 1), min(x + 1, W - 1)
    hy, hx = real(1) - ly, real(1) - lx
    top = input[n, c, y, x] * (hy * hx) + input[n, c, y, x1] * (hy * lx)
    return top + (input[n, c, y1, x] * (ly * hx) + input[n, c, y1, x1] * (ly * lx))


@inline
def _largest(input, n, c, y0, step_y, gh, x0, step_x, gw):
    """The largest sample of a bin and its place (i, j); i is -1 for one outside, that counts as 0."""
    H, W = input.shape[2], input.shape[3]
    best, row, col, any_inside, missed = real(0), -1, -1, False, False
    for i in range(_begin(y0, step_y, gh), _end(y0, step_y, gh, H)):
        y = _place(y0, step_y, gh, i)
        for j in range(_begin(x0, step_x, gw), _end(x0, step_x, gw, W)):
            x = _place(x0, step_x, gw, j)
            if not _inside(y, H) or not _inside(x, W):
                missed = True
                continue
            v = _sample(input, n, c, y, x)
            if not any_inside or v > best or (v != v and best == best):
                best, row, col = v, i, j
            any_inside = True
    missed = missed or _begin(y0, step_y, gh) > 0 or _end(y0, step_y, gh, H) < gh
    missed = missed or _begin(x0, step_x, gw) > 0 or _end(x0, step_x, gw, W) < gw
    if any_inside and missed and real(0) > best:
        best, row, col = real(0), -1, -1
    return best, row, col


# One thread a bin; neighbours write neighbouring bins and read neighbouring pixels. Reads 4 pixels a sample.
# Source: He et al., Mask R-CNN (2017), section 3.
@gpu("real[:,:,:,:], real[:,:], real[:,:,:,:], i64[:], real, i32, i32, i32")
def _roi_align(input, boxes, output, bad, scale, ratio, aligned, maximum):
    K, C, PH, PW = output.shape
    H, W = input.shape[2], input.shape[3]
    at = cuda.grid(1)
    if at >= K * C * PH * PW or bad[0] != 0:
        return
    q, p, c, k = at % PW, at // PW % PH, at // (PW * PH) % C, at // (PW * PH * C)
    x0, y0 = _start(boxes, k, 0, scale, aligned), _start(boxes, k, 1, scale, aligned)
    w, h = _length(boxes, k, 0, scale, aligned), _length(boxes, k, 1, scale, aligned)
    if not _finite(x0, y0, w, h):
        output[k, c, p, q] = real(math.nan)
        return
    gh, gw, n = _grid(h, PH, ratio), _grid(w, PW, ratio), np.int32(boxes[k, 0])
    step_y, step_x = h / real(PH), w / real(PW)
    y0 += real(p) * step_y
    x0 += real(q) * step_x
    if maximum:
        output[k, c, p, q] = _largest(input, n, c, y0, step_y, gh, x0, step_x, gw)[0]
        return
    total = real(0)
    for i in range(_begin(y0, step_y, gh), _end(y0, step_y, gh, H)):
        y = _place(y0, step_y, gh, i)
        if _inside(y, H):
            for j in range(_begin(x0, step_x, gw), _end(x0, step_x, gw, W)):
                x = _place(x0, step_x, gw, j)
                if _inside(x, W):
                    total += _sample(input, n, c, y, x)
    count = real(gh) * real(gw)
    output[k, c, p, q] = total / (count if count > real(1) else real(1))


def roi_align(input, boxes, output, bad, spatial_scale, sampling_ratio, aligned, maximum):
    _check_images[1, THREADS](boxes, bad, input.shape[0])
    if output.size:
        _roi_align[_blocks(output.size), THREADS](input, boxes, output, bad, spatial_scale, sampling_ratio, aligned, maximum)


@inline
def _share_of(first, step, grid, size, pixel):
    """What the samples of a bin along one axis give to a pixel."""
    total = real(0)
    for i in range(_begin(first, step, grid), _end(first, step, grid, size)):
        at = _place(first, step, grid, i)
        if _inside(at, size):
            low = _pixel(at, size)
            upper = _upper(at, low, size)
            if low == pixel:
                total += real(1) - upper
            if min(low + 1, size - 1) == pixel:
                total += upper
    return total


# One thread a pixel of the input: it gathers from the RoIs of its image in their order, so that no atomic addition is needed
# and the sums are always the same bits. A bin gives to a pixel the product of what its rows and its columns give.
@gpu("real[:,:,:,:], real[:,:,:,:], real[:,:], real[:,:,:,:], i64[:], real, i32, i32, i32")
def _roi_align_grad(grad, input, boxes, grad_input, bad, scale, ratio, aligned, maximum):
    N, C, H, W = input.shape
    K, PH, PW = grad.shape[0], grad.shape[2], grad.shape[3]
    at = cuda.grid(1)
    if at >= N * C * H * W or bad[0] != 0:
        return
    v, u, c, n = at % W, at // W % H, at // (W * H) % C, at // (W * H * C)
    total = real(0)
    for k in range(K):
        if boxes[k, 0] != real(n):
            continue
        x0, y0 = _start(boxes, k, 0, scale, aligned), _start(boxes, k, 1, scale, aligned)
        w, h = _length(boxes, k, 0, scale, aligned), _length(boxes, k, 1, scale, aligned)
        if not _finite(x0, y0, w, h):
            continue
        gh, gw, step_y, step_x = _grid(h, PH, ratio), _grid(w, PW, ratio), h / real(PH), w / real(PW)
        count = real(gh) * real(gw)
        for p in range(PH):
            first_y = y0 + real(p) * step_y
            rows = _share_of(first_y, step_y, gh, H, u)
            if rows == real(0):
                continue
            for q in range(PW):
                first_x = x0 + real(q) * step_x
                if not maximum:
                    total += grad[k, c, p, q] * (rows * _share_of(first_x, step_x, gw, W, v) / count)
                    continue
                _, i, j = _largest(input, n, c, first_y, step_y, gh, first_x, step_x, gw)
                if i >= 0:
                    y, x = _place(first_y, step_y, gh, i), _place(first_x, step_x, gw, j)
                    py, px = _pixel(y, H), _pixel(x, W)
                    ly, lx = _upper(y, py, H), _upper(x, px, W)
                    row = (real(1) - ly if py == u else real(0)) + (ly if min(py + 1, H - 1) == u else real(0))
                    col = (real(1) - lx if px == v else real(0)) + (lx if min(px + 1, W - 1) == v else real(0))
                    total += grad[k, c, p, q] * (row * col)
    grad_input[n, c, u, v] = total


def roi_align_grad(grad, input, boxes, grad_input, bad, spatial_scale, sampling_ratio, aligned, maximum):
    _check_images[1, THREADS](boxes, bad, input.shape[0])
    if grad_input.size:
        _roi_align_grad[_blocks(grad_input.size), THREADS](
            grad, input, boxes, grad_input, bad, spatial_scale, sampling_ratio, aligned, maximum
        )


@inline
def _whole(v):
    """A coordinate rounded to a pixel, halves away from 0."""
    limit = real(1 << 24)
    v = v + (real(0.5) if v > real(0) else real(-0.5))
    v = limit if v > limit else -limit if v < -limit else v
    return np.int32(v)


@inline
def _edge(low, high, bins, size, p, last):
    """The first pixel of bin p, or the one after its last, along one axis."""
    start = _whole(low)
    step = real(max(_whole(high) - start + 1, 1)) / real(bins)
    exact = real(p + 1) * step if last else real(p) * step
    whole = np.int32(exact)
    whole += 1 if last and real(whole) < exact else 0
    return min(max(start + whole, 0), size)


@inline
def _largest_pixel(input, n, c, boxes, k, scale, p, q, PH, PW):
    """Row and column of the first of the largest pixels (of the first NaN) of a bin; -1, -1 for an empty one."""
    H, W = input.shape[2], input.shape[3]
    y1, y2, x1, x2 = boxes[k, 2] * scale, boxes[k, 4] * scale, boxes[k, 1] * scale, boxes[k, 3] * scale
    left, right = _edge(x1, x2, PW, W, q, False), _edge(x1, x2, PW, W, q, True)
    best, row, col = real(0), -1, -1
    for y in range(_edge(y1, y2, PH, H, p, False), _edge(y1, y2, PH, H, p, True)):
        for x in range(left, right):
            v = input[n, c, y, x]
            if row < 0 or v > best or (v != v and best == best):
                best, row, col = v, y, x
    return row, col


@inline
def _has_nan(boxes, k, scale):
    total = real(0)
    for i in range(1, 5):
        v = boxes[k, i] * scale
        total += real(1) if v != v else real(0)
    return total > real(0)


# One thread a bin. Reads its pixels, writes it once. Source: Girshick, Fast R-CNN (2015), section 2.1.
@gpu("real[:,:,:,:], real[:,:], real[:,:,:,:], i64[:], real")
def _roi_pool(input, boxes, output, bad, scale):
    K, C, PH, PW = output.shape
    at = cuda.grid(1)
    if at >= K * C * PH * PW or bad[0] != 0:
        return
    q, p, c, k = at % PW, at // PW % PH, at // (PW * PH) % C, at // (PW * PH * C)
    if _has_nan(boxes, k, scale):
        output[k, c, p, q] = real(math.nan)
        return
    n = np.int32(boxes[k, 0])
    y, x = _largest_pixel(input, n, c, boxes, k, scale, p, q, PH, PW)
    output[k, c, p, q] = input[n, c, y, x] if y >= 0 else real(0)


def roi_pool(input, boxes, output, bad, spatial_scale):
    _check_images[1, THREADS](boxes, bad, input.shape[0])
    if output.size:
        _roi_pool[_blocks(output.size), THREADS](input, boxes, output, bad, spatial_scale)


# One thread a pixel of the input: it gathers from the bins whose largest pixel it is, RoI by RoI, without atomics.
@gpu("real[:,:,:,:], real[:,:,:,:], real[:,:], real[:,:,:,:], i64[:], real")
def _roi_pool_grad(grad, input, boxes, grad_input, bad, scale):
    N, C, H, W = input.shape
    K, PH, PW = grad.shape[0], grad.shape[2], grad.shape[3]
    at = cuda.grid(1)
    if at >= N * C * H * W or bad[0] != 0:
        return
    v, u, c, n = at % W, at // W % H, at // (W * H) % C, at // (W * H * C)
    total = real(0)
    for k in range(K):
        if boxes[k, 0] != real(n) or _has_nan(boxes, k, scale):
            continue
        y1, y2, x1, x2 = boxes[k, 2] * scale, boxes[k, 4] * scale, boxes[k, 1] * scale, boxes[k, 3] * scale
        for p in range(PH):
            if u < _edge(y1, y2, PH, H, p, False) or u >= _edge(y1, y2, PH, H, p, True):
                continue
            for q in range(PW):
                if v >= _edge(x1, x2, PW, W, q, False) and v < _edge(x1, x2, PW, W, q, True):
                    y, x = _largest_pixel(input, n, c, boxes, k, scale, p, q, PH, PW)
                    if y == u and x == v:
                        total += grad[k, c, p, q]
    grad_input[n, c, u, v] = total


def roi_pool_grad(grad, input, boxes, grad_input, bad, spatial_scale):
    _check_images[1, THREADS](boxes, bad, input.shape[0])
    if grad_input.size:
        _roi_pool_grad[_blocks(grad_input.size), THREADS](grad, input, boxes, grad_input, bad, spatial_scale)


# ------------------------------------------------------------------------------------------------------------- masks


# One block a pair of masks: the threads share the pixels, coalesced; a tree adds up intersection and union.
@gpu("u8[:,:], u8[:,:], real[:,:]")
def _mask_iou(masks1, masks2, iou):
    sums = cuda.shared.array((2, THREADS), np.int64)
    t, a, b = cuda.threadIdx.x, cuda.blockIdx.x // iou.shape[1], cuda.blockIdx.x % iou.shape[1]
    inter, both = 0, 0
    for p in range(t, masks1.shape[1], THREADS):
        inter += masks1[a, p] & masks2[b, p]
        both += masks1[a, p] | masks2[b, p]
    sums[0, t] = inter
    sums[1, t] = both
    cuda.syncthreads()
    step = THREADS // 2
    while step > 0:
        if t < step:
            sums[0, t] += sums[0, t + step]
            sums[1, t] += sums[1, t + step]
        cuda.syncthreads()
        step //= 2
    if t == 0:
        iou[a, b] = real(sums[0, 0]) / real(max(sums[1, 0], 1))


def mask_iou(masks1, masks2, iou):
    if iou.size:
        _mask_iou[iou.size, THREADS](masks1, masks2, iou)


# One block a mask: each thread finds the extremes of its pixels, a tree those of all.
@gpu("u8[:,:,:], real[:,:]")
def _masks_to_boxes(masks, boxes):
    low_x = cuda.shared.array(THREADS, np.int32)
    low_y = cuda.shared.array(THREADS, np.int32)
    high_x = cuda.shared.array(THREADS, np.int32)
    high_y = cuda.shared.array(THREADS, np.int32)
    t, n = cuda.threadIdx.x, cuda.blockIdx.x
    H, W = masks.shape[1], masks.shape[2]
    left, top, right, bottom = W, H, -1, -1
    for p in range(t, H * W, THREADS):
        y, x = p // W, p % W
        if masks[n, y, x]:
            left, top, right, bottom = min(left, x), min(top, y), max(right, x), max(bottom, y)
    low_x[t] = left
    low_y[t] = top
    high_x[t] = right
    high_y[t] = bottom
    cuda.syncthreads()
    step = THREADS // 2
    while step > 0:
        if t < step:
            low_x[t] = min(low_x[t], low_x[t + step])
            low_y[t] = min(low_y[t], low_y[t + step])
            high_x[t] = max(high_x[t], high_x[t + step])
            high_y[t] = max(high_y[t], high_y[t + step])
        cuda.syncthreads()
        step //= 2
    if t == 0:
        found = high_x[0] >= 0
        boxes[n, 0] = real(low_x[0]) if found else real(0)
        boxes[n, 1] = real(low_y[0]) if found else real(0)
        boxes[n, 2] = real(high_x[0]) if found else real(0)
        boxes[n, 3] = real(high_y[0]) if found else real(0)


def masks_to_boxes(masks, boxes):
    if len(boxes):
        _masks_to_boxes[len(boxes), THREADS](masks, boxes)
