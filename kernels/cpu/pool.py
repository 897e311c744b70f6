"""Pooling over three spatial axes. The windows of one row of outputs take the same lines of the input: those are reduced to
one line, element by element, and that line across, tap by tap.
"""

import math

import numpy as np

from ..compile import cpu, inline, real
from ..scalars import pool_count, pool_share, pool_taps


@inline
def _interior(size, windows, kernel, stride, pad, dilation):
    """[begin, end): the windows whose taps all lie inside."""
    begin = min(windows, (pad + stride - 1) // stride)
    room = size - 1 - (kernel - 1) * dilation + pad
    return begin, max(begin, min(windows, room // stride + 1 if room >= 0 else 0))


@inline
def _place(tap, kernel_h, kernel_w, dilation_d, dilation_h, dilation_w, H, W):
    """Where the tap of that number stands in a plane, from tap 0."""
    kd, kh, kw = tap // (kernel_h * kernel_w), tap // kernel_w % kernel_h, tap % kernel_w
    return (kd * dilation_d * H + kh * dilation_h) * W + kw * dilation_w


@inline
def _phase(line, even, odd, stride, shift, begin):
    """The line from where the tap at `shift` of window `begin` stands: its neighbours are the windows' for strides 1 and 2."""
    if stride != 2:
        return line[stride * begin + shift :]
    return odd[begin + (shift >> 1) :] if shift & 1 else even[begin + (shift >> 1) :]


@inline
def _copy(source, to):
    """Elements by a loop: an assignment of slices costs several times as much on a line."""
    for i in range(len(to)):
        to[i] = source[i]


@inline
def _split(line, even, odd):
    """Takes a line apart into its even and odd elements."""
    pairs = len(line) // 2
    for i in range(pairs):
        even[i], odd[i] = line[2 * i], line[2 * i + 1]
    if len(line) % 2:
        even[pairs] = line[2 * pairs]


# Parallel over rows of outputs, in memory order. A window of K taps costs about 2 sqrt(K) comparisons, by selection and
# not by branches, which random numbers would mispredict; each input is read kernel_h / stride_h times from cache.
@cpu(over="M*OD*OH")
def max_pool(
    begin,
    end,
    x,
    y,
    indices,
    offsets,
    kernel_d,
    kernel_h,
    kernel_w,
    stride_d,
    stride_h,
    stride_w,
    pad_front,
    pad_top,
    pad_left,
    dilation_d,
    dilation_h,
    dilation_w,
):
    D, H, W = x.shape[1:]
    OD, OH, OW = y.shape[1:]
    with_taps = indices.size > 0 or offsets.size > 0
    line, even, odd = np.empty(W, x.dtype), np.empty(W // 2 + 1, x.dtype), np.empty(W // 2 + 1, x.dtype)
    ids, even_ids, odd_ids = np.empty(W, np.int64), np.empty(W // 2 + 1, np.int64), np.empty(W // 2 + 1, np.int64)
    best_ids = np.empty(OW, np.int64)
    places = np.empty(256, np.int64)
    for i in range(256):
        places[i] = _place(i, kernel_h, kernel_w, dilation_d, dilation_h, dilation_w, H, W)
    lo, hi = _interior(W, OW, kernel_w, stride_w, pad_left, dilation_w)
    for r in range(begin, end):
        m, od, oh = r // (OD * OH), r // OH % OD, r % OH
        kd, nd, d0 = pool_taps(od, D, kernel_d, stride_d, pad_front, dilation_d)
        kh, nh, h0 = pool_taps(oh, H, kernel_h, stride_h, pad_top, dilation_h)
        row, inner = y[m, od, oh], y[m, od, oh, lo:hi]
        _copy(x[m, d0, h0], line)
        if not with_taps:
            for d in range(nd):
                for h in range(nh):
                    taps = x[m, d0 + d * dilation_d, h0 + h * dilation_h]
                    for w in range(W):
                        v, best = taps[w], line[w]
                        larger = v if v > best else best
                        line[w] = v if v != v else larger
            if stride_w == 2:
                _split(line, even, odd)
            for k in range(kernel_w if hi > lo else 0):
                source = _phase(line, even, odd, stride_w, k * dilation_w - pad_left, lo)
                if k == 0 and stride_w <= 2:
                    _copy(source, inner)
                elif stride_w <= 2:
                    for i in range(hi - lo):
                        v, best = source[i], inner[i]
                        larger = v if v > best else best
                        inner[i] = v if v != v else larger
                else:
                    for i in range(hi - lo):
                        v, best = source[stride_w * i], inner[i]
                        larger = v if v > best or k == 0 else best
                        inner[i] = v if v != v else larger
            for i in range(OW):
                if lo <= i < hi:
                    continue
                _, nw, w0 = pool_taps(i, W, kernel_w, stride_w, pad_left, dilation_w)
                best = line[w0]
                for w in range(1, nw):
                    v = line[w0 + w * dilation_w]
                    best = v if v > best or v != v else best
                row[i] = best
            continue
        ids[:] = (kd * kernel_h + kh) * kernel_w
        for d in range(nd):
            for h in range(nh):
                taps = x[m, d0 + d * dilation_d, h0 + h * dilation_h]
                first = ((kd + d) * kernel_h + kh + h) * kernel_w
                for w in range(W):
                    v, best, at = taps[w], line[w], ids[w]
                    take = (v > best) | ((v != v) & (best == best))
                    line[w] = v if take else best
                    ids[w] = first if take else at
        if stride_w == 2:
            _split(line, even, odd)
            _split(ids, even_ids, odd_ids)
        for k in range(kernel_w if hi > lo else 0):
            source = _phase(line, even, odd, stride_w, k * dilation_w - pad_left, lo)
            source_ids = _phase(ids, even_ids, odd_ids, stride_w, k * dilation_w - pad_left, lo)
            step = 1 if stride_w == 2 else stride_w
            if k == 0:
                for i in range(hi - lo):
                    inner[i], best_ids[lo + i] = source[step * i], source_ids[step * i]
            elif step == 1:
                best_inner = best_ids[lo:hi]
                for i in range(hi - lo):
                    v, best, n, at = source[i], inner[i], source_ids[i] + k, best_inner[i]
                    same = (v == best) | ((v != v) & (best != best))
                    take = (v > best) | ((v != v) & (best == best)) | (same & (n < at))
                    inner[i] = v if take else best
                    best_inner[i] = n if take else at
            else:
                for i in range(hi - lo):
                    v, best, n, at = source[step * i], inner[i], source_ids[step * i] + k, best_ids[lo + i]
                    same = (v == best) | ((v != v) & (best != best))
                    take = (v > best) | ((v != v) & (best == best)) | (same & (n < at))
                    inner[i] = v if take else best
                    best_ids[lo + i] = n if take else at
        for i in range(OW):
            kw, nw, w0 = pool_taps(i, W, kernel_w, stride_w, pad_left, dilation_w)
            if not lo <= i < hi:
                best, at = line[w0], ids[w0] + kw
                for w in range(1, nw):
                    v, n = line[w0 + w * dilation_w], ids[w0 + w * dilation_w] + kw + w
                    same = (v == best) | ((v != v) & (best != best))
                    if (v > best) | ((v != v) & (best == best)) | (same & (n < at)):
                        best, at = v, n
                row[i], best_ids[i] = best, at
            tap = best_ids[i]
            if offsets.size:
                offsets[m, od, oh, i] = tap
            if indices.size:
                start = ((d0 - kd * dilation_d) * H + h0 - kh * dilation_h) * W + w0 - kw * dilation_w
                place = _place(tap, kernel_h, kernel_w, dilation_d, dilation_h, dilation_w, H, W) if tap > 255 else places[tap]
                indices[m, od, oh, i] = start + place


# Parallel over planes. A plane is cleared and then added to while it sits in cache; gy and offsets stream through.
@cpu(over="M")
def max_pool_backward(
    begin,
    end,
    gy,
    offsets,
    gx,
    kernel_d,
    kernel_h,
    kernel_w,
    stride_d,
    stride_h,
    stride_w,
    pad_front,
    pad_top,
    pad_left,
    dilation_d,
    dilation_h,
    dilation_w,
):
    D, H, W = gx.shape[1:]
    OD, OH, OW = gy.shape[1:]
    place = np.empty(256, np.int64)
    for i in range(256):
        place[i] = _place(i, kernel_h, kernel_w, dilation_d, dilation_h, dilation_w, H, W)
    for m in range(begin, end):
        plane = gx[m].reshape(D * H * W)
        plane[:] = real(0)
        for od in range(OD):
            for oh in range(OH):
                start = ((od * stride_d - pad_front) * H + oh * stride_h - pad_top) * W - pad_left
                g, taps = gy[m, od, oh], offsets[m, od, oh]
                for ow in range(OW):
                    plane[start + ow * stride_w + place[taps[ow]]] += g[ow]


# Parallel over planes. The lines of a row of windows are reduced to one, with the place of each column's largest element,
# that line window by window.
@cpu(over="M")
def adaptive_max_pool(begin, end, x, y, indices):
    D, H, W = x.shape[1:]
    OD, OH, OW = y.shape[1:]
    line, places = np.empty(W, x.dtype), np.empty(W, np.int64)
    for m in range(begin, end):
        for od in range(OD):
            d0, d1 = pool_share(od, D, OD)
            for oh in range(OH):
                h0, h1 = pool_share(oh, H, OH)
                _copy(x[m, d0, h0], line)
                places[:] = (d0 * H + h0) * W
                for d in range(d0, d1):
                    for h in range(h0, h1):
                        taps = x[m, d, h]
                        first = (d * H + h) * W
                        for w in range(W):
                            v, best, at = taps[w], line[w], places[w]
                            take = (v > best) | ((v != v) & (best == best))
                            line[w] = v if take else best
                            places[w] = first if take else at
                for ow in range(OW):
                    w0, w1 = pool_share(ow, W, OW)
                    best, at = line[w0], places[w0] + w0
                    for w in range(w0 + 1, w1):
                        v, n = line[w], places[w] + w
                        same = (v == best) | ((v != v) & (best != best))
                        take = (v > best) | ((v != v) & (best == best)) | (same & (n < at))
                        best = v if take else best
                        at = n if take else at
                    y[m, od, oh, ow] = best
                    if indices.size:
                        indices[m, od, oh, ow] = at


# Parallel over planes; additions in memory order, whatever the threads.
@cpu(over="M")
def adaptive_max_pool_backward(begin, end, gy, indices, gx):
    for m in range(begin, end):
        g, at, plane = gy[m], indices[m], gx[m]
        plane[:] = real(0)
        for o in range(len(g)):
            plane[at[o]] += g[o]


# Parallel over rows of outputs, in memory order. A window of K taps costs about 2 sqrt(K) additions.
@cpu(over="M*OD*OH")
def avg_pool(
    begin,
    end,
    x,
    y,
    kernel_d,
    kernel_h,
    kernel_w,
    stride_d,
    stride_h,
    stride_w,
    pad_front,
    pad_back,
    pad_top,
    pad_bottom,
    pad_left,
    pad_right,
    dilation_d,
    dilation_h,
    dilation_w,
    count_include_pad,
    divisor,
):
    D, H, W = x.shape[1:]
    OD, OH, OW = y.shape[1:]
    line, even, odd = np.empty(W, x.dtype), np.empty(W // 2 + 1, x.dtype), np.empty(W // 2 + 1, x.dtype)
    lo, hi = _interior(W, OW, kernel_w, stride_w, pad_left, dilation_w)
    for r in range(begin, end):
        m, od, oh = r // (OD * OH), r // OH % OD, r % OH
        _, nd, d0 = pool_taps(od, D, kernel_d, stride_d, pad_front, dilation_d)
        _, nh, h0 = pool_taps(oh, H, kernel_h, stride_h, pad_top, dilation_h)
        outer = nd * nh
        if count_include_pad:
            outer = pool_count(od, D, kernel_d, stride_d, pad_front, pad_back, dilation_d)
            outer *= pool_count(oh, H, kernel_h, stride_h, pad_top, pad_bottom, dilation_h)
        row = y[m, od, oh]
        _copy(x[m, d0, h0], line)
        for d in range(nd):
            for h in range(nh):
                if d or h:
                    taps = x[m, d0 + d * dilation_d, h0 + h * dilation_h]
                    for w in range(W):
                        line[w] += taps[w]
        inner = row[lo:hi]
        for i in range(hi - lo):
            inner[i] = real(0)
        if stride_w == 2:
            _split(line, even, odd)
        for k in range(kernel_w if hi > lo else 0):
            source = _phase(line, even, odd, stride_w, k * dilation_w - pad_left, lo)
            if stride_w <= 2:
                for i in range(hi - lo):
                    inner[i] += source[i]
            else:
                for i in range(hi - lo):
                    inner[i] += source[stride_w * i]
        count = real(divisor if divisor else outer * kernel_w)
        for i in range(hi - lo):
            inner[i] /= count
        for i in range(OW):
            if lo <= i < hi:
                continue
            _, nw, w0 = pool_taps(i, W, kernel_w, stride_w, pad_left, dilation_w)
            total = real(0)
            for w in range(nw):
                total += line[w0 + w * dilation_w]
            across = pool_count(i, W, kernel_w, stride_w, pad_left, pad_right, dilation_w) if count_include_pad else nw
            row[i] = total / real(divisor if divisor else outer * across)


# Parallel over planes. Each row of outputs becomes one line, which is added to every line that its windows take, in cache.
@cpu(over="M")
def avg_pool_backward(
    begin,
    end,
    gy,
    gx,
    kernel_d,
    kernel_h,
    kernel_w,
    stride_d,
    stride_h,
    stride_w,
    pad_front,
    pad_back,
    pad_top,
    pad_bottom,
    pad_left,
    pad_right,
    dilation_d,
    dilation_h,
    dilation_w,
    count_include_pad,
    divisor,
):
    D, H, W = gx.shape[1:]
    OD, OH, OW = gy.shape[1:]
    line = np.empty(W, gx.dtype)
    for m in range(begin, end):
        gx[m] = real(0)
        for od in range(OD):
            _, nd, d0 = pool_taps(od, D, kernel_d, stride_d, pad_front, dilation_d)
            for oh in range(OH):
                _, nh, h0 = pool_taps(oh, H, kernel_h, stride_h, pad_top, dilation_h)
                outer = nd * nh
                if count_include_pad:
                    outer = pool_count(od, D, kernel_d, stride_d, pad_front, pad_back, dilation_d)
                    outer *= pool_count(oh, H, kernel_h, stride_h, pad_top, pad_bottom, dilation_h)
                line[:] = real(0)
                for ow in range(OW):
                    _, nw, w0 = pool_taps(ow, W, kernel_w, stride_w, pad_left, dilation_w)
                    across = pool_count(ow, W, kernel_w, stride_w, pad_left, pad_right, dilation_w) if count_include_pad else nw
                    g = gy[m, od, oh, ow] / real(divisor if divisor else outer * across)
                    for w in range(nw):
                        line[w0 + w * dilation_w] += g
                for d in range(nd):
                    for h in range(nh):
                        row = gx[m, d0 + d * dilation_d, h0 + h * dilation_h]
                        for w in range(W):
                            row[w] += line[w]


# Parallel over planes. The lines of a row of windows are summed to one, that line window by window.
@cpu(over="M")
def adaptive_avg_pool(begin, end, x, y):
    D, H, W = x.shape[1:]
    OD, OH, OW = y.shape[1:]
    line = np.empty(W, x.dtype)
    for m in range(begin, end):
        for od in range(OD):
            d0, d1 = pool_share(od, D, OD)
            for oh in range(OH):
                h0, h1 = pool_share(oh, H, OH)
                line[:] = real(0)
                for d in range(d0, d1):
                    for h in range(h0, h1):
                        taps = x[m, d, h]
                        for w in range(W):
                            line[w] += taps[w]
                for ow in range(OW):
                    w0, w1 = pool_share(ow, W, OW)
                    total = real(0)
                    for w in range(w0, w1):
                        total += line[w]
                    y[m, od, oh, ow] = total / real((d1 - d0) * (h1 - h0) * (w1 - w0))


# Parallel over planes, as avg_pool_backward.
@cpu(over="M")
def adaptive_avg_pool_backward(begin, end, gy, gx):
    D, H, W = gx.shape[1:]
    OD, OH, OW = gy.shape[1:]
    line = np.empty(W, gx.dtype)
    for m in range(begin, end):
        gx[m] = real(0)
        for od in range(OD):
            d0, d1 = pool_share(od, D, OD)
            for oh in range(OH):
                h0, h1 = pool_share(oh, H, OH)
                line[:] = real(0)
                for ow in range(OW):
                    w0, w1 = pool_share(ow, W, OW)
                    g = gy[m, od, oh, ow] / real((d1 - d0) * (h1 - h0) * (w1 - w0))
                    for w in range(w0, w1):
                        line[w] += g
                for d in range(d0, d1):
                    for h in range(h0, h1):
                        row = gx[m, d, h]
                        for w in range(W):
                            row[w] += line[w]


# Parallel over rows of outputs, in memory order. Each input is raised kernel_h / stride_h times.
@cpu(over="M*OD*OH")
def lp_pool(
    begin,
    end,
    x,
    y,
    kernel_d,
    kernel_h,
    kernel_w,
    stride_d,
    stride_h,
    stride_w,
    dilation_d,
    dilation_h,
    dilation_w,
    norm,
):
    D, H, W = x.shape[1:]
    OD, OH, OW = y.shape[1:]
    line = np.empty(W, x.dtype)
    for r in range(begin, end):
        m, od, oh = r // (OD * OH), r // OH % OD, r % OH
        _, nd, d0 = pool_taps(od, D, kernel_d, stride_d, 0, dilation_d)
        _, nh, h0 = pool_taps(oh, H, kernel_h, stride_h, 0, dilation_h)
        line[:] = real(0)
        for d in range(nd):
            for h in range(nh):
                taps = x[m, d0 + d * dilation_d, h0 + h * dilation_h]
                if norm == real(2):
                    for w in range(W):
                        line[w] += taps[w] * taps[w]
                else:
                    for w in range(W):
                        line[w] += taps[w] ** norm
        for ow in range(OW):
            _, nw, w0 = pool_taps(ow, W, kernel_w, stride_w, 0, dilation_w)
            total = real(0)
            for w in range(nw):
                total += line[w0 + w * dilation_w]
            total *= real(kernel_d * kernel_h * kernel_w) / real(nd * nh * nw)
            y[m, od, oh, ow] = math.sqrt(total) if norm == real(2) else total ** (real(1) / norm)


# Parallel over planes. Each row of outputs becomes one line, which is added to every line that its windows take, in cache.
@cpu(over="M")
def lp_pool_backward(
    begin,
    end,
    gy,
    x,
    y,
    gx,
    kernel_d,
    kernel_h,
    kernel_w,
    stride_d,
    stride_h,
    stride_w,
    dilation_d,
    dilation_h,
    dilation_w,
    norm,
):
    D, H, W = gx.shape[1:]
    OD, OH, OW = gy.shape[1:]
    line = np.empty(W, gx.dtype)
    for m in range(begin, end):
        gx[m] = real(0)
        for od in range(OD):
            _, nd, d0 = pool_taps(od, D, kernel_d, stride_d, 0, dilation_d)
            for oh in range(OH):
                _, nh, h0 = pool_taps(oh, H, kernel_h, stride_h, 0, dilation_h)
                line[:] = real(0)
                for ow in range(OW):
                    _, nw, w0 = pool_taps(ow, W, kernel_w, stride_w, 0, dilation_w)
                    root = y[m, od, oh, ow]
                    g = gy[m, od, oh, ow] * (real(kernel_d * kernel_h * kernel_w) / real(nd * nh * nw))
                    if norm == real(2):
                        g = g / root if root != 0 else real(0)
                    elif norm != real(1):
                        g = g * root ** (real(1) - norm) if root != 0 else real(0)
                    for w in range(nw):
                        line[w0 + w * dilation_w] += g
                for d in range(nd):
                    for h in range(nh):
                        taps = x[m, d0 + d * dilation_d, h0 + h * dilation_h]
                        row = gx[m, d0 + d * dilation_d, h0 + h * dilation_h]
                        if norm == real(2):
                            for w in range(W):
                                row[w] += line[w] * taps[w]
                        elif norm == real(1):
                            for w in range(W):
                                row[w] += line[w]
                        else:
                            for w in range(W):
                                if line[w] != 0:
                                    row[w] += line[w] * taps[w] ** (norm - real(1))


# The check runs over all indices first, in one range: `bad` and the answer must not depend on how ranges are run.
@cpu(over="1")
def max_unpool(begin, end, x, indices, y, bad):
    M, O = x.shape
    L = y.shape[1]
    bad[0] = 0
    for m in range(M):
        for o in range(O):
            if indices[m, o] < 0 or indices[m, o] >= L:
                bad[0] = m * O + o + 1
                return
    for m in range(M):
        values, at, plane = x[m], indices[m], y[m]
        plane[:] = real(0)
        for o in range(O):
            plane[at[o]] = values[o]


# Parallel over planes: a gather.
@cpu(over="M")
def max_unpool_backward(begin, end, gy, indices, gx):
    for m in range(begin, end):
        plane, at, g = gy[m], indices[m], gx[m]
        for o in range(len(at)):
            g[o] = plane[at[o]]
