"""Convolution, its gradients, and the patches that it is made of.

Where a group has four filters or more, everything is a matrix product on panels of TILE positions: the patches of a tile
(never of the whole image) are packed into rows that the product reads one after the other. With fewer filters (depthwise)
packing would cost more than the product: then a padded plane is swept once for every few taps.
"""

import math

import numpy as np

from ..compile import cpu, inline, real
from ..scalars import activate
from .llvm import add_product
from .panels import (
    AHEAD,
    DEPTH,
    TILE,
    U,
    add_row,
    aligned,
    copy_ahead,
    copy_block,
    copy_row,
    fill_ahead,
    fill_block,
    inside,
    move_row,
)
from .winograd import is_winograd, winograd

FILTERS = 64  # of one unit of work: they repay the packing of their panel
WIDE = 24  # outputs of a row: two rows in a sweep repay that their inputs are laid out apart


@inline
def _first(at, stride, outputs):
    """The smallest output o with o * stride >= at, in [0, outputs]."""
    return 0 if at <= 0 else min((at - 1) // stride + 1, outputs)


@inline
def _turn_weights(w):
    """w[F, CG, taps] of one group as [CG, taps, F], flat."""
    F, CG, taps = w.shape
    turned = np.empty(CG * taps * F, w.dtype)
    for c in range(CG):
        for tap in range(taps):
            to = turned[(c * taps + tap) * F : (c * taps + tap + 1) * F]
            for f in range(F):
                to[f] = w[f, c, tap]
    return turned


@inline
def _plan(x, OW, KW, stride, pad, dilation):
    """How _pack goes along W: (whether all taps of a run share its lines, of which there is one for each phase of the stride, or
    each tap has its own; from where and where inside of x the line of a whole row is, for each; where a tap begins in the lines of
    a run; how much longer than a run its lines are; and room for the lines and for what _pack knows of its runs)."""
    reach = (KW - 1) * dilation
    shared = KW > 1 and reach < TILE
    parts, more = min(stride, reach + 1) if shared else KW, reach // stride if shared else 0
    columns, begins = np.empty((parts, 3), np.int64), np.empty(KW, np.int64)
    room, most = min(OW, TILE) + more, (TILE + OW - 2) // OW + 1  # of a run's line; runs
    for i in range(parts):
        columns[i, 0] = i * (1 if shared else dilation) - pad
        columns[i, 1], columns[i, 2] = inside(columns[i, 0], stride, x.shape[4], OW + more)
    for kw in range(KW):
        begins[kw] = kw * dilation % stride * most * room + kw * dilation // stride
    lines, runs = np.empty((most * parts * room if shared else 0) + AHEAD, x.dtype), np.empty((most, 8), np.int64)
    return shared, columns, begins, more, lines, runs


@inline
def _put_lines(x, columns, i, stride, more, runs, n_runs, to, at):
    """Lines from to[at] on for runs of outputs, `more` longer than the run, of the rows of x that begin at runs[r, 6] (zeros for
    -1), from where column i of the plan says."""
    for r in range(n_runs):
        n, ow, start, to_at = runs[r, 1] + more, runs[r, 2], runs[r, 6], at + runs[r, 7]
        lo = min(max(columns[i, 1] - ow, 0), n)
        hi = min(max(columns[i, 2] - ow, lo), n) if start >= 0 else lo
        begin = start + columns[i, 0] + (ow + lo) * stride
        fill_ahead(to, to_at, lo, real(0))
        if stride == 1 and begin + hi - lo + AHEAD <= len(x):
            copy_ahead(x, begin, to, to_at + lo, hi - lo)
        else:
            copy_block(x, begin, 0, stride, to, to_at + lo, 0, 1, hi - lo)
        fill_ahead(to, to_at + hi, n - hi, real(0))


@inline
def _take_lines(lines, shift, runs, n_runs, panel, k):
    """A row of the panel: of each run what a tap takes of its lines."""
    for r in range(n_runs):
        copy_ahead(lines, runs[r, 7] + shift, panel, k + runs[r, 0], runs[r, 1])


@inline
def _pack(x, shape, channel, channels, first, count, panel, out, taps, stride, pad, dilation, plan):
    """panel[(c, taps), t] = x, of that shape, under the taps of the output positions first + t, for t < count, of so many channels;
    AHEAD elements after that may change, too.

    The positions are runs in rows of outputs. Of each the lines are laid out, with their padding, and copied from there for the
    taps; where the plan says so, taps have lines of their own.
    """
    (OD, OH, OW), (KD, KH, KW), (_, C, D, H, W) = out, taps, shape
    shared, columns, begins, more, lines, runs = plan
    parts, room = len(columns), min(OW, TILE) + more
    t, n_runs, ow = 0, 0, first % OW
    oh, od, n = first // OW % OH, first // OW // OH % OD, first // OW // OH // OD
    while t < count:
        run = min(OW - ow, count - t)
        runs[n_runs, 0], runs[n_runs, 1], runs[n_runs, 2], runs[n_runs, 3] = t, run, ow, n * C
        runs[n_runs, 4], runs[n_runs, 5] = od * stride[0] - pad[0], oh * stride[1] - pad[1]
        runs[n_runs, 7] = n_runs * room if shared else t
        t, n_runs, ow, oh = t + run, n_runs + 1, 0, oh + 1
        if oh == OH:
            oh, od = 0, od + 1
        if od == OD:
            od, n = 0, n + 1
    k = 0
    for c in range(channel, channel + channels):
        for kd in range(KD):
            for kh in range(KH):
                for r in range(n_runs):
                    d, h = runs[r, 4] + kd * dilation[0], runs[r, 5] + kh * dilation[1]
                    runs[r, 6] = (((runs[r, 3] + c) * D + d) * H + h) * W if 0 <= d < D and 0 <= h < H else -1
                for i in range(parts):
                    to, at = (lines, i * len(runs) * room) if shared else (panel, k + i * TILE)
                    _put_lines(x, columns, i, stride[2], more, runs, n_runs, to, at)
                for kw in range(KW if shared else 0):
                    _take_lines(lines, begins[kw], runs, n_runs, panel, k + kw * TILE)
                k += KW * TILE


@inline
def _multiply_tile(w, per_filter, at, depth, b, f_begin, f_end, panel, sums, y, F, size, first, count, is_first, activation):
    """The products of a tile's panel and the weights w[f * per_filter + at + k], k < depth, written where the positions are in
    y[n, f, s]: with the bias if these are the first of several, added if not. Those of several images are summed in `sums`."""
    at, filters, pitch = at + f_begin * per_filter, f_end - f_begin, TILE
    to, start, several = sums, 0, first % size + count > size
    if not several:
        to, start, pitch = y, (first // size * F + f_begin) * size + first % size, size
    for f in range(filters if is_first else 0):
        fill_block(to, start + f * pitch, 0, 1, count, b[f_begin + f] if len(b) else real(0))
    if several and not is_first:
        _move_tile(y, sums, True, f_begin, filters, F, size, first, count)
    add_product(w, at, per_filter, 1, panel, 0, TILE, to, start, pitch, filters, count, depth)
    for f in range(filters if activation else 0):
        line = to[start + f * pitch : start + f * pitch + count]
        for t in range(count):
            line[t] = activate(line[t], activation)
    if several:
        _move_tile(y, sums, False, f_begin, filters, F, size, first, count)


@inline
def _move_tile(y, sums, back, f_begin, filters, F, size, first, count):
    """sums[f, t] to where the positions first + t of the filters are in y[n, f, s], or `back` from there."""
    t, n, s = 0, first // size, first % size
    while t < count:  # a run of positions in one image
        run = min(size - s, count - t)
        for f in range(filters):
            at = (n * F + f_begin + f) * size + s
            if back:
                copy_row(y, at, sums, f * TILE + t, run)
            else:
                copy_row(sums, f * TILE + t, y, at, run)
        t, n, s = t + run, n + 1, 0


@inline
def _pad_plane(x, start, H, W, padded, rows, pitch, front, stride_h, stride_w):
    """padded[i, j, r, q] = plane[r * stride_h + i - front[0], q * stride_w + j - front[1]], 0 outside, for i < stride_h,
    j < stride_w, of the plane of H x W that begins at x[start]: whatever the stride, the inputs of neighbouring outputs are
    neighbours. AHEAD elements after that may change, too."""
    zero = real(min(W, 0))  # were it known, the compiler would call memset for a few elements
    for i in range(stride_h):
        for j in range(stride_w):
            lo, hi = _first(front[1] - j, stride_w, pitch), _first(W + front[1] - j, stride_w, pitch)
            first, last = _first(front[0] - i, stride_h, rows), _first(H + front[0] - i, stride_h, rows)
            if lo >= hi or first >= last:
                first, last, lo = rows, rows, 0
            at = (i * stride_w + j) * rows * pitch
            fill_ahead(padded, at, first * pitch + lo, zero)
            for r in range(first, last):  # of each the elements of the plane, then zeros up to those of the next row
                to, begin = at + r * pitch, start + (r * stride_h + i - front[0]) * W + lo * stride_w + j - front[1]
                if stride_w == 1 and begin + hi - lo + AHEAD <= len(x):
                    copy_ahead(x, begin, padded, to + lo, hi - lo)
                else:
                    copy_block(x, begin, 0, stride_w, padded, to + lo, 0, 1, hi - lo)
                fill_ahead(padded, to + hi, min(pitch - hi + lo, (rows - r) * pitch - hi), zero)
            fill_ahead(padded, at + last * pitch + lo, (rows - last) * pitch - lo, zero)


@inline
def _put_plane(sums, apart, pitch, rows, columns, y, start):
    """The plane of rows x columns that begins at y[start], from sums whose even rows are `pitch` apart, as are the odd ones, each
    of those `apart` from the even one before it; AHEAD more are read."""
    ahead = max(rows - (AHEAD + columns - 1) // columns, 0)  # rows with room behind them for what copy_ahead writes too much
    at, following = 0, apart
    for r in range(ahead):
        copy_ahead(sums, at, y, start + r * columns, columns)
        at, following = following, at + pitch
    for r in range(ahead, rows):
        copy_row(sums, at, y, start + r * columns, columns)
        at, following = following, at + pitch


@inline
def _layout(KH, KW, rows, pitch, stride, dilation):
    """Where the taps of a filter are in a padded plane."""
    offsets = np.empty(KH * KW, np.int64)
    for kh in range(KH):
        for kw in range(KW):
            h, w = kh * dilation[1], kw * dilation[2]
            phase = h % stride[1] * stride[2] + w % stride[2]
            offsets[kh * KW + kw] = (phase * rows + h // stride[1]) * pitch + w // stride[2]
    return offsets


@inline
def _sweep(weights, offsets, padded, length, sums):
    """sums[q] += the sum over taps of weights[tap] padded[q + offsets[tap]]; nine taps or three in each sweep."""
    taps = len(offsets)
    nines = taps // 9 * 9
    for k in range(0, nines, 9):
        w0, w1, w2 = weights[k], weights[k + 1], weights[k + 2]
        w3, w4, w5 = weights[k + 3], weights[k + 4], weights[k + 5]
        w6, w7, w8 = weights[k + 6], weights[k + 7], weights[k + 8]
        o0, o1, o2 = U(offsets[k]), U(offsets[k + 1]), U(offsets[k + 2])
        o3, o4, o5 = U(offsets[k + 3]), U(offsets[k + 4]), U(offsets[k + 5])
        o6, o7, o8 = U(offsets[k + 6]), U(offsets[k + 7]), U(offsets[k + 8])
        for i in range(length):
            q = U(i)
            first = w0 * padded[q + o0] + w1 * padded[q + o1] + w2 * padded[q + o2]
            second = w3 * padded[q + o3] + w4 * padded[q + o4] + w5 * padded[q + o5]
            sums[q] += first + second + (w6 * padded[q + o6] + w7 * padded[q + o7] + w8 * padded[q + o8])
    for k in range(nines, taps - 2, 3):
        a, b, c = weights[k], weights[k + 1], weights[k + 2]
        p = padded[offsets[k] : offsets[k] + length]
        q = padded[offsets[k + 1] : offsets[k + 1] + length]
        r = padded[offsets[k + 2] : offsets[k + 2] + length]
        for i in range(length):
            sums[i] += a * p[i] + b * q[i] + c * r[i]
    for k in range(taps - taps % 3, taps):
        a = weights[k]
        p = padded[offsets[k] : offsets[k] + length]
        for i in range(length):
            sums[i] += a * p[i]


@inline
def _pair(w, padded, q, row1, row2, row3):
    """The sums of a 3 x 3 filter for two outputs, one below the other."""
    a0, a1, a2 = padded[q], padded[q + U(1)], padded[q + U(2)]
    b0, b1, b2 = padded[q + row1], padded[q + row1 + U(1)], padded[q + row1 + U(2)]
    c0, c1, c2 = padded[q + row2], padded[q + row2 + U(1)], padded[q + row2 + U(2)]
    d0, d1, d2 = padded[q + row3], padded[q + row3 + U(1)], padded[q + row3 + U(2)]
    w0, w1, w2, w3, w4, w5, w6, w7, w8 = w
    upper = (w0 * a0 + w1 * a1 + w2 * a2) + (w3 * b0 + w4 * b1 + w5 * b2) + (w6 * c0 + w7 * c1 + w8 * c2)
    lower = (w0 * b0 + w1 * b1 + w2 * b2) + (w3 * c0 + w4 * c1 + w5 * c2) + (w6 * d0 + w7 * d1 + w8 * d2)
    return upper, lower


@inline
def _sweep_pairs(weights, padded, apart, pitch, length, sums, half, fresh, bias):
    """Two rows of outputs of a 3 x 3 filter at a time: what they share of the four rows below them is loaded once. Even and odd
    rows are `apart` in the padded plane, and `half` in the sums. Sums that are `fresh` begin with the bias."""
    w = (weights[0], weights[1], weights[2], weights[3], weights[4], weights[5], weights[6], weights[7], weights[8])
    row1, row2, row3, other = U(apart), U(pitch), U(apart + pitch), U(half)
    if fresh:
        for i in range(length):
            upper, lower = _pair(w, padded, U(i), row1, row2, row3)
            sums[U(i)] = bias + upper
            sums[U(i) + other] = bias + lower
    else:
        for i in range(length):
            upper, lower = _pair(w, padded, U(i), row1, row2, row3)
            sums[U(i)] += upper
            sums[U(i) + other] += lower


@inline
def _dot(a, b, n, stride):
    """The sum of a[i] b[i * stride]."""
    total = real(0)
    if stride == 1:
        for i in range(n):
            total += a[i] * b[i]
    elif stride == 2:
        for i in range(n):
            total += a[i] * b[2 * i]
    else:
        for i in range(n):
            total += a[i] * b[i * stride]
    return total


@inline
def _add(a, source, source_stride, target, target_stride, n):
    """target[i * target_stride] += a source[i * source_stride]; one of the strides is 1."""
    if source_stride == 1 and target_stride == 1:
        for i in range(n):
            target[i] += a * source[i]
    elif source_stride == 2:
        for i in range(n):
            target[i] += a * source[2 * i]
    elif target_stride == 2:
        for i in range(n):
            target[2 * i] += a * source[i]
    else:
        for i in range(n):
            target[i * target_stride] += a * source[i * source_stride]


@inline
def _is_flat(taps, stride):
    """True for a convolution of single elements: whole images are one row."""
    return taps == 1 and stride == 1


# Parallel over groups x tiles of positions x blocks of filters, or images x filters where a group has few filters.
# A tile's patches are packed once per block and stay in the second cache; rows of outputs lie along the panel.
# Reads each patch element once per block of filters (packed) and once per four filters (from cache); writes once per DEPTH.
# Source: Goto and van de Geijn, Anatomy of high-performance matrix multiplication (2008).
@cpu(over="N*F if F < 4*groups or CG == 1 and F <= 16*groups else groups*((N*OD*OH*OW+127)//128)*((F//groups+63)//64)")
def conv(
    begin, end, x, w, b, y, groups, stride_d, stride_h, stride_w, pad_d, pad_h, pad_w, dilation_d, dilation_h, dilation_w, exact,
    activation,
):  # fmt: skip
    N, F, CG, KD, KH, KW = x.shape[0], w.shape[0], w.shape[1], w.shape[2], w.shape[3], w.shape[4]
    FG, taps = F // groups, KD * KH * KW
    stride, pad, dilation = (stride_d, stride_h, stride_w), (pad_d, pad_h, pad_w), (dilation_d, dilation_h, dilation_w)
    if FG < 4 or (CG == 1 and FG <= 16):
        _conv_few(begin, end, x, w, b, y, FG, stride, pad, dilation, activation)
        return
    if is_winograd(x, y, (KD, KH, KW), stride, pad, dilation, CG, FG, exact):
        units = groups * ((N * y.shape[3] * y.shape[4] + TILE - 1) // TILE) * ((FG + FILTERS - 1) // FILTERS)
        winograd(begin, end, units, x, w, b, y, groups, pad_h, pad_w, False, activation)
        return
    if _is_flat(taps, stride_d * stride_h * stride_w) and x.shape[2:] == y.shape[2:] and pad_d == pad_h == pad_w == 0:
        x = x.reshape((N, x.shape[1], 1, 1, x.shape[2] * x.shape[3] * x.shape[4]))
        y = y.reshape((N, F, 1, 1, y.shape[2] * y.shape[3] * y.shape[4]))
    out = (y.shape[2], y.shape[3], y.shape[4])
    size = out[0] * out[1] * out[2]
    tiles, blocks = (N * size + TILE - 1) // TILE, (FG + FILTERS - 1) // FILTERS
    step = min(max(DEPTH // taps, 1), max(CG, 1))  # channels of a panel
    panel, sums = aligned(step * taps * TILE + AHEAD, x), aligned(FILTERS * TILE, x)
    w1, x1, y1 = w.reshape(w.size), x.reshape(x.size), y.reshape(y.size)
    plan, packed = _plan(x, out[2], KW, stride_w, pad_w, dilation_w), -1
    for unit in range(begin, end):
        block, tile = unit % blocks, unit // blocks
        g, first = tile // tiles, tile % tiles * TILE
        count = min(TILE, N * size - first)
        f_begin, f_end = g * FG + block * FILTERS, g * FG + min((block + 1) * FILTERS, FG)
        for channel in range(0, max(CG, 1), step):
            channels = min(step, CG - channel)
            if packed != tile or CG > step:
                c = g * CG + channel
                _pack(x1, x.shape, c, channels, first, count, panel, out, (KD, KH, KW), stride, pad, dilation, plan)
                packed = tile
            _multiply_tile(
                w1, CG * taps, channel * taps, channels * taps, b, f_begin, f_end, panel, sums, y1, F, size, first, count,
                channel == 0, activation if channel + step >= CG else 0,
            )  # fmt: skip


@inline
def _conv_few(begin, end, x, w, b, y, FG, stride, pad, dilation, activation):
    """Filter by filter of every image."""
    F, CG, KD, KH, KW = w.shape
    D, H, W, OD, OH, OW = x.shape[2], x.shape[3], x.shape[4], y.shape[2], y.shape[3], y.shape[4]
    rows, pitch = OH + (KH - 1) * dilation[1] // stride[1], OW + (KW - 1) * dilation[2] // stride[2]
    turns, height, taps = stride[1], OH, KH * KW  # rows of inputs that take turns; rows of outputs that lie in order
    pairs = KH == 3 and KW == 3 and stride[1] * stride[2] * dilation[1] * dilation[2] == 1 and OW >= WIDE
    if pairs:
        turns, height = 2, (OH + 1) // 2
        rows = height + 1
    flat = float(turns) * stride[2] * rows * pitch <= 4 * (H * W + OH * OW) + 65536  # no far taps, no huge stride
    padded = np.empty(turns * stride[2] * rows * pitch + AHEAD if flat else 0, x.dtype)
    apart, step, length = pitch, 2 * pitch, (height - 1) * pitch + OW  # an even and an odd row, two even ones; sums of a sweep
    if pairs:
        apart, step = height * pitch, pitch
    filled = apart + length if pairs else length
    sums = np.empty(filled + pitch + AHEAD if flat else 0, x.dtype)
    x1, w1, y1 = x.reshape(x.size), w.reshape(w.size), y.reshape(y.size)
    offsets, kept = _layout(KH, KW, rows, pitch, stride, dilation), -1
    for unit in range(begin, end):
        n, f = unit // F, unit % F
        bias = b[f] if len(b) else real(0)
        for od in range(OD):
            fresh = flat and pairs and 0 <= od * stride[0] - pad[0] < D  # nothing comes before the first sweep
            if flat and not fresh:
                fill_ahead(sums, 0, filled, bias)
            elif not flat:
                for oh in range(OH):
                    for ow in range(OW):
                        y[n, f, od, oh, ow] = bias
            for c in range(CG):
                for kd in range(KD):
                    d, at = od * stride[0] - pad[0] + kd * dilation[0], ((f * CG + c) * KD + kd) * taps
                    channel, outside = f // FG * CG + c, d < 0 or d >= D
                    if flat and outside:
                        if not _all_finite(w1[at : at + taps]):  # times the zeros of the padding
                            fill_ahead(sums, 0, filled, real(np.nan))
                        continue
                    if flat:
                        start = ((n * x.shape[1] + channel) * D + d) * H * W
                        if start != kept:
                            _pad_plane(x1, start, H, W, padded, rows, pitch, (pad[1], pad[2]), turns, stride[2])
                            kept = start
                        if pairs:
                            _sweep_pairs(w1[at : at + 9], padded, rows * pitch, pitch, length, sums, apart, fresh, bias)
                        else:
                            _sweep(w1[at : at + taps], offsets, padded, length, sums)
                        fresh = False
                        continue
                    plane = x[n, channel, 0 if outside else d]
                    for kh in range(KH):
                        up = pad[1] - kh * dilation[1]
                        low, high = _first(up, stride[1], OH), 0 if outside else _first(H + up, stride[1], OH)
                        for kw in range(KW):
                            left = pad[2] - kw * dilation[2]
                            lo, hi = _first(left, stride[2], OW), _first(W + left, stride[2], OW)
                            if not _all_finite(w[f, c, kd, kh, kw : kw + 1]):
                                for oh in range(OH):
                                    for ow in range(OW):
                                        if not (low <= oh < high and lo <= ow < hi):
                                            y[n, f, od, oh, ow] = real(np.nan)
                            if lo >= hi:
                                continue
                            for oh in range(low, high):
                                line = plane[oh * stride[1] - up, lo * stride[2] - left :]
                                _add(w[f, c, kd, kh, kw], line, stride[2], y[n, f, od, oh, lo:hi], 1, hi - lo)
            if flat:
                _put_plane(sums, apart, step, OH, OW, y1, ((n * F + f) * OD + od) * OH * OW)
            for oh in range(OH if activation else 0):
                to = y[n, f, od, oh]
                for i in range(OW):
                    to[i] = activate(to[i], activation)


# Parallel over images x groups x blocks of channels, or images x channels where a group has few filters.
# For each tap, four channels of a tile of outputs are summed over all filters in cache, then added where they came from.
# Reads gy once per block of channels (packed) and once per four channels and tap (from cache); writes gx once per tap.
# Source: the transposed product of conv (Dumoulin and Visin, arXiv 1603.07285, chapter 4).
@cpu(over="N*groups*CG if F < 4*groups else N*groups*((CG+15)//16)")
def conv_grad_input(
    begin, end, gy, w, b, gx, groups, stride_d, stride_h, stride_w, pad_d, pad_h, pad_w, dilation_d, dilation_h, dilation_w, exact
):  # fmt: skip
    N, F, CG, KD, KH, KW = gy.shape[0], w.shape[0], w.shape[1], w.shape[2], w.shape[3], w.shape[4]
    FG, taps = F // groups, KD * KH * KW
    stride, pad, dilation = (stride_d, stride_h, stride_w), (pad_d, pad_h, pad_w), (dilation_d, dilation_h, dilation_w)
    if FG < 4:
        _grad_input_few(begin, end, gy, w, b, gx, groups, stride, pad, dilation)
        return
    if is_winograd(gy, gx, (KD, KH, KW), stride, pad, dilation, FG, CG, exact):
        winograd(begin, end, N * groups * ((CG + 15) // 16), gy, w, b, gx, groups, 2 - pad_h, 2 - pad_w, True, 0)
        return
    if _is_flat(taps, stride_d * stride_h * stride_w) and gx.shape[2:] == gy.shape[2:] and pad_d == pad_h == pad_w == 0:
        gx = gx.reshape((N, gx.shape[1], 1, 1, gx.shape[2] * gx.shape[3] * gx.shape[4]))
        gy = gy.reshape((N, F, 1, 1, gy.shape[2] * gy.shape[3] * gy.shape[4]))
    D, H, W, OD, OH, OW = gx.shape[2], gx.shape[3], gx.shape[4], gy.shape[2], gy.shape[3], gy.shape[4]
    size = OD * OH * OW
    blocks = (CG + 15) // 16
    panel, sums = aligned(min(FG, DEPTH) * TILE, gx), aligned(16 * TILE, gx)
    w4, gy3 = w.reshape((groups, FG, CG, taps)), gy.reshape((N, F, size))
    turned, group = np.empty(0, gx.dtype), -1
    for unit in range(begin, end):
        n, block, g = unit % N, unit // N % blocks, unit // N // blocks
        if g != group:
            turned, group = _turn_weights(w4[g]), g
        c_begin, c_end = block * 16, min(block * 16 + 16, CG)
        for c in range(g * CG + c_begin, g * CG + c_end):
            plane = gx[n, c].reshape(D * H * W)
            bias = b[c] if len(b) else real(0)
            for i in range(D * H * W):
                plane[i] = bias
        for first in range(0, size, TILE):
            count = min(TILE, size - first)
            for start in range(0, FG, DEPTH):
                depth = min(DEPTH, FG - start)
                for k in range(depth):
                    source, to = gy3[n, g * FG + start + k, first : first + count], panel[k * TILE : k * TILE + count]
                    for t in range(count):
                        to[t] = source[t]
                for tap in range(taps):
                    for t in range(16 * TILE):
                        sums[t] = real(0)
                    at = (c_begin * taps + tap) * FG + start
                    add_product(turned, at, taps * FG, 1, panel, 0, TILE, sums, 0, TILE, c_end - c_begin, count, depth)
                    kd, kh, kw = tap // KW // KH, tap // KW % KH, tap % KW
                    left = pad[2] - kw * dilation[2]
                    low, high = _first(left, stride[2], OW), _first(W + left, stride[2], OW)
                    t = 0
                    while t < count:  # a run of positions in one row of outputs
                        ow, row = (first + t) % OW, (first + t) // OW
                        run = min(OW - ow, count - t)
                        d = row // OH * stride[0] - pad[0] + kd * dilation[0]
                        h = row % OH * stride[1] - pad[1] + kh * dilation[1]
                        lo, hi = max(low, ow), min(high, ow + run)
                        if 0 <= d < D and 0 <= h < H and lo < hi:
                            for i in range(c_end - c_begin):
                                part = sums[i * TILE + t + lo - ow : i * TILE + t + hi - ow]
                                line = gx[n, g * CG + c_begin + i, d, h, lo * stride[2] - left :]
                                _add(real(1), part, 1, line, stride[2], hi - lo)
                        t += run


@inline
def _all_finite(x):
    total = real(0)
    for i in range(len(x)):
        total += x[i] * real(0)
    return total == real(0)


@inline
def _grad_input_few(begin, end, gy, w, b, gx, groups, stride, pad, dilation):
    """Channel by channel of every image."""
    F, CG, KD, KH, KW = w.shape
    FG, C = F // groups, groups * CG
    D, H, W, OD, OH, OW = gx.shape[2], gx.shape[3], gx.shape[4], gy.shape[2], gy.shape[3], gy.shape[4]
    rows, pitch = H + (KH - 1) * dilation[1], W + (KW - 1) * dilation[2]
    flat = stride[1] == 1 and stride[2] == 1 and rows * pitch <= 4 * (H * W + OH * OW) + 65536
    w1 = w.reshape(w.size)
    flat = flat and _all_finite(w1)  # zeros around gy are multiplied too
    padded = np.empty(rows * pitch + AHEAD if flat else 0, gx.dtype)
    sums, gx1, gy1 = np.empty(H * pitch + AHEAD if flat else 0, gx.dtype), gx.reshape(gx.size), gy.reshape(gy.size)
    length = (H - 1) * pitch + W
    offsets = _layout(KH, KW, rows, pitch, (1, 1, 1), dilation)[::-1].copy()  # the filter turned around
    for unit in range(begin, end):
        n, c = unit // C, unit % C
        g = c // CG
        bias = b[c] if len(b) else real(0)
        for d in range(D):
            if flat:
                for i in range(length):
                    sums[i] = bias
            else:
                for h in range(H):
                    for i in range(W):
                        gx[n, c, d, h, i] = bias
            for f in range(g * FG, (g + 1) * FG):
                for kd in range(KD):
                    at = d + pad[0] - kd * dilation[0]
                    od = at // stride[0]
                    if at < 0 or at % stride[0] or od >= OD:
                        continue
                    plane = gy[n, f, od]
                    if flat:
                        front = ((KH - 1) * dilation[1] - pad[1], (KW - 1) * dilation[2] - pad[2])
                        start = ((n * F + f) * OD + od) * OH * OW
                        _pad_plane(gy1, start, OH, OW, padded, rows, pitch, front, 1, 1)
                        at = ((f * CG + c - g * CG) * KD + kd) * KH * KW
                        _sweep(w1[at : at + KH * KW], offsets, padded, length, sums)
                        continue
                    for kh in range(KH):
                        up = pad[1] - kh * dilation[1]
                        for kw in range(KW):
                            left = pad[2] - kw * dilation[2]
                            lo, hi = _first(left, stride[2], OW), _first(W + left, stride[2], OW)
                            if lo >= hi:
                                continue
                            for oh in range(_first(up, stride[1], OH), _first(H + up, stride[1], OH)):
                                line = gx[n, c, d, oh * stride[1] - up, lo * stride[2] - left :]
                                _add(w[f, c - g * CG, kd, kh, kw], plane[oh, lo:hi], 1, line, stride[2], hi - lo)
            if flat:
                _put_plane(sums, pitch, 2 * pitch, H, W, gx1, ((n * C + c) * D + d) * H * W)


# Parallel over channels, or over filters where a group has few of them.
# Tile by tile of positions: the patches of some channels are packed, gy is turned, and the sums for all filters stay in cache.
# Reads each patch element once (packed) and gy once per DEPTH; writes gw once.
# Source: as conv.
@cpu(over="F if F < 4*groups else C")
def conv_grad_weight(
    begin, end, gy, x, gw, groups, stride_d, stride_h, stride_w, pad_d, pad_h, pad_w, dilation_d, dilation_h, dilation_w, exact
):  # fmt: skip
    N, F, CG, KD, KH, KW = gy.shape[0], gw.shape[0], gw.shape[1], gw.shape[2], gw.shape[3], gw.shape[4]
    FG, taps = F // groups, KD * KH * KW
    stride, pad, dilation = (stride_d, stride_h, stride_w), (pad_d, pad_h, pad_w), (dilation_d, dilation_h, dilation_w)
    if FG < 4:
        _grad_weight_few(begin, end, gy, x, gw, FG, stride, pad, dilation)
        return
    if _is_flat(taps, stride_d * stride_h * stride_w) and x.shape[2:] == gy.shape[2:] and pad_d == pad_h == pad_w == 0:
        x = x.reshape((N, x.shape[1], 1, 1, x.shape[2] * x.shape[3] * x.shape[4]))
        gy = gy.reshape((N, F, 1, 1, gy.shape[2] * gy.shape[3] * gy.shape[4]))
    out = (gy.shape[2], gy.shape[3], gy.shape[4])
    size = out[0] * out[1] * out[2]
    gy3, gw3 = gy.reshape((N, F, size)), gw.reshape((F, CG, taps))
    x1, plan = x.reshape(x.size), _plan(x, out[2], KW, stride_w, pad_w, dilation_w)
    step = min(max(DEPTH // taps, 1), end - begin)  # channels of a panel
    panel, turned = aligned(step * taps * TILE + AHEAD, x), aligned(TILE * FILTERS, x)
    sums = aligned((FG + FILTERS - 1) // FILTERS * step * taps * FILTERS, x)
    channel = begin
    while channel < end:
        channels = min(step, end - channel, (channel // CG + 1) * CG - channel)
        for i in range(len(sums)):
            sums[i] = real(0)
        for first in range(0, N * size, TILE):
            count = min(TILE, N * size - first)
            _pack(x1, x.shape, channel, channels, first, count, panel, out, (KD, KH, KW), stride, pad, dilation, plan)
            _add_products(gy3, channel // CG * FG, FG, first, count, panel, channels * taps, turned, sums)
        _write_sums(sums, channel // CG * FG, FG, channel % CG, channels, gw3)
        channel += channels


@inline
def _add_products(gy, f_begin, filters, first, count, panel, rows, turned, sums):
    """sums[block of filters, row, filter] += the sum over t < count of panel[row, t] and gy at position first + t."""
    size = gy.shape[2]
    for block in range((filters + FILTERS - 1) // FILTERS):
        width = min(FILTERS, filters - block * FILTERS)
        t = 0
        while t < count:  # a run of positions in one image
            n, s = (first + t) // size, (first + t) % size
            run = min(size - s, count - t)
            for i in range(width):
                line, to = gy[n, f_begin + block * FILTERS + i, s : s + run], turned[t * FILTERS + i :]
                for j in range(run):
                    to[j * FILTERS] = line[j]
            t += run
        add_product(panel, 0, TILE, 1, turned, 0, FILTERS, sums, block * rows * FILTERS, FILTERS, rows, width, count)


@inline
def _write_sums(sums, f_begin, filters, channel, channels, gw):
    """gw[f, c, tap] from the sums of _add_products."""
    taps = gw.shape[2]
    for f in range(filters):
        at = f // FILTERS * channels * taps * FILTERS + f % FILTERS
        for c in range(channels):
            for k in range(taps):
                gw[f_begin + f, channel + c, k] = sums[at + (c * taps + k) * FILTERS]


@inline
def _grad_weight_few(begin, end, gy, x, gw, FG, stride, pad, dilation):
    """Filter by filter: dot products of gy with the shifted input."""
    CG, KD, KH, KW = gw.shape[1], gw.shape[2], gw.shape[3], gw.shape[4]
    N, D, H, W, OD, OH, OW = gy.shape[0], x.shape[2], x.shape[3], x.shape[4], gy.shape[2], gy.shape[3], gy.shape[4]
    rows, pitch = OH + (KH - 1) * dilation[1] // stride[1], OW + (KW - 1) * dilation[2] // stride[2]
    flat = float(stride[1]) * stride[2] * rows * pitch <= 4 * (H * W + OH * OW) + 65536  # no far taps, no huge stride
    padded = np.empty(stride[1] * stride[2] * rows * pitch + AHEAD if flat else 0, x.dtype)
    spread = np.empty(OH * pitch + AHEAD if flat else 0, x.dtype)
    x1, gy1, F = x.reshape(x.size), gy.reshape(gy.size), gy.shape[1]
    length = (OH - 1) * pitch + OW
    offsets = _layout(KH, KW, rows, pitch, stride, dilation)
    for f in range(begin, end):
        for c in range(CG):
            for kd in range(KD):
                for kh in range(KH):
                    for kw in range(KW):
                        gw[f, c, kd, kh, kw] = real(0)
        for n in range(N):
            for od in range(OD):
                start = ((n * F + f) * OD + od) * OH * OW
                finite = _all_finite(gy1[start : start + OH * OW])  # else its products with the padding count
                if flat:
                    _pad_plane(gy1, start, OH, OW, spread, OH, pitch, (0, 0), 1, 1)
                for c in range(CG):
                    for kd in range(KD):
                        d = od * stride[0] - pad[0] + kd * dilation[0]
                        outside = d < 0 or d >= D
                        if outside and finite:
                            continue
                        plane = x[n, f // FG * CG + c, 0 if outside else d]
                        if flat and not outside:
                            start = ((n * x.shape[1] + f // FG * CG + c) * D + d) * H * W
                            _pad_plane(x1, start, H, W, padded, rows, pitch, (pad[1], pad[2]), stride[1], stride[2])
                        for kh in range(KH):
                            up = pad[1] - kh * dilation[1]
                            for kw in range(KW):
                                left = pad[2] - kw * dilation[2]
                                if flat and not outside:
                                    at = offsets[kh * KW + kw]
                                    total = _dot(spread, padded[at:], length, 1)
                                    if not (total - total == real(0)):  # what lies between the rows may have made it so
                                        total = real(0)
                                        for r in range(0, OH * pitch, pitch):
                                            total += _dot(spread[r:], padded[at + r :], OW, 1)
                                    gw[f, c, kd, kh, kw] += total
                                    continue
                                lo, hi = _first(left, stride[2], OW), _first(W + left, stride[2], OW)
                                low, high = _first(up, stride[1], OH), 0 if outside else _first(H + up, stride[1], OH)
                                for oh in range(0 if finite else OH):
                                    for ow in range(OW):
                                        if not (low <= oh < high and lo <= ow < hi):
                                            gw[f, c, kd, kh, kw] += gy[n, f, od, oh, ow] * real(0)
                                if lo >= hi:
                                    continue
                                for oh in range(low, high):
                                    line = plane[oh * stride[1] - up, lo * stride[2] - left :]
                                    gw[f, c, kd, kh, kw] += _dot(gy[n, f, od, oh, lo:hi], line, hi - lo, stride[2])


# Parallel over channels. Reads every element once along memory.
@cpu(over="F")
def conv_grad_bias(begin, end, gy, gb):
    N, S = gy.shape[0], gy.shape[2]
    for f in range(begin, end):
        total = real(0)
        for n in range(N):
            part = real(0)
            line = gy[n, f]
            for s in range(S):
                part += line[s]
            total += part
        gb[f] = total


# Parallel over taps of the channels of all images. Rows of a column are pieces of rows of the image: reads and writes along W.
# Writes every output once; the image of a channel is read KH*KW times from cache.
@cpu(over="N*C*KH*KW")
def unfold(begin, end, x, cols, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w):
    H, W, KH, KW, OH, OW = x.shape[2], x.shape[3], cols.shape[2], cols.shape[3], cols.shape[4], cols.shape[5]
    x1, cols1 = x.reshape(x.size), cols.reshape(cols.size)
    for unit in range(begin, end):
        channel, up, left = unit // KW // KH, unit // KW % KH * dilation_h - pad_h, unit % KW * dilation_w - pad_w
        (first, last), (lo, hi) = inside(up, stride_h, H, OH), inside(left, stride_w, W, OW)
        at, start = unit * OH * OW, (channel * H + up + first * stride_h) * W + left + lo * stride_w
        fill_block(cols1, at, OW, first, OW, real(0))
        at += first * OW
        fill_block(cols1, at, OW, last - first, lo, real(0))
        copy_block(x1, start, stride_h * W, stride_w, cols1, at + lo, OW, last - first, hi - lo)
        fill_block(cols1, at + hi, OW, last - first, OW - hi, real(0))
        fill_block(cols1, at + (last - first) * OW, OW, OH - last, OW, real(0))


# Parallel over the channels of all images. Tap by tap the columns stream through, the image of the channel stays in cache.
# Reads every column element once, reads and writes an output KH*KW times in cache.
@cpu(over="N*C")
def fold(begin, end, cols, x, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w):
    H, W, KH, KW, OH, OW = x.shape[2], x.shape[3], cols.shape[2], cols.shape[3], cols.shape[4], cols.shape[5]
    x1, cols1 = x.reshape(x.size), cols.reshape(cols.size)
    fill_block(x1, begin * H * W, W, (end - begin) * H, W, real(0))
    for tap in range(begin * KH * KW, end * KH * KW):
        channel, up, left = tap // KW // KH, tap // KW % KH * dilation_h - pad_h, tap % KW * dilation_w - pad_w
        (first, last), (lo, hi) = inside(up, stride_h, H, OH), inside(left, stride_w, W, OW)
        for oh in range(first, last):
            to = (channel * H + up + oh * stride_h) * W + left + lo * stride_w
            add_row(cols1, (tap * OH + oh) * OW + lo, 1, x1, to, stride_w, hi - lo)


WINDOWS = 64  # in a row whose patches are filled or taken together, tap by tap: a cache line of each stays at hand


# Parallel over rows of windows, some of a row at a time. Tap by tap: reads along memory, writes every output once.
@cpu(over="N*OH")
def im2col(begin, end, x, cols, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w):
    C, H, W, OH, OW, KH, KW = x.shape[1], x.shape[2], x.shape[3], cols.shape[1], cols.shape[2], cols.shape[4], cols.shape[5]
    size, x1, cols1, zero = C * KH * KW, x.reshape(x.size), cols.reshape(cols.size), np.zeros(1, x.dtype)
    low, high = np.empty(KW, np.int64), np.empty(KW, np.int64)
    for unit in range(begin, end):
        for start in range(0, OW, WINDOWS):
            windows, left = min(WINDOWS, OW - start), start * stride_w - pad_w
            for kw in range(KW):
                low[kw], high[kw] = inside(left + kw * dilation_w, stride_w, W, windows)
            at = (unit * OW + start) * size
            for c in range(C):
                for kh in range(KH):
                    h = unit % OH * stride_h - pad_h + kh * dilation_h
                    line = ((unit // OH * C + c) * H + h) * W + left
                    for kw in range(KW):
                        lo, hi = low[kw] if 0 <= h < H else windows, high[kw] if 0 <= h < H else windows
                        move_row(zero, 0, 0, cols1, at, size, lo)
                        move_row(x1, line + kw * dilation_w + lo * stride_w, stride_w, cols1, at + lo * size, size, hi - lo)
                        move_row(zero, 0, 0, cols1, at + hi * size, size, windows - hi)
                        at += 1


# Parallel over blocks of eight channels of all images, which stay in cache while the patches pass by: a piece of a patch for
# eight channels is whole cache lines. Reads every patch element once, reads and writes an output KH*KW times in cache.
@cpu(over="N*((C+7)//8)")
def col2im(begin, end, cols, x, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w):
    C, H, W, OH, OW, KH, KW = x.shape[1], x.shape[2], x.shape[3], cols.shape[1], cols.shape[2], cols.shape[4], cols.shape[5]
    x1, cols1, blocks, taps = x.reshape(x.size), cols.reshape(cols.size), (C + 7) // 8, KH * KW
    low, high = np.empty(KW, np.int64), np.empty(KW, np.int64)
    for unit in range(begin, end):
        n, c_begin, c_end = unit // blocks, unit % blocks * 8, min(unit % blocks * 8 + 8, C)
        fill_block(x1, (n * C + c_begin) * H * W, W, (c_end - c_begin) * H, W, real(0))
        for start in range(0, OW, WINDOWS):
            left = start * stride_w - pad_w
            for kw in range(KW):
                low[kw], high[kw] = inside(left + kw * dilation_w, stride_w, W, min(WINDOWS, OW - start))
            for oh in range(OH):
                for c in range(c_begin, c_end):
                    for kh in range(KH):
                        h, at = oh * stride_h - pad_h + kh * dilation_h, (((n * OH + oh) * OW + start) * C + c) * taps + kh * KW
                        for kw in range(KW if 0 <= h < H else 0):
                            lo, to = low[kw], ((n * C + c) * H + h) * W + left + kw * dilation_w + low[kw] * stride_w
                            add_row(cols1, at + kw + lo * C * taps, C * taps, x1, to, stride_w, high[kw] - lo)


# --------------------------------------------------------------------------------------------- deformable convolution

FAR = 2.0**30  # an offset of so many pixels leads outside


@inline
def _low(still, moved):
    """The pixel below still + moved and the way from it; far outside -2. The way is NaN where the offset is."""
    if real(-FAR) < moved and moved < real(FAR):
        whole = int(math.floor(moved))
        return still + whole, moved - real(whole)
    return -2, (moved if moved != moved else real(0))


@inline
def _find_places(offset, mask, taps_w, outputs_w, first, count, H, W, stride, pad, dilation, at, weight, way, scale):
    """Where each tap of an image's offset group reads at `count` positions: at[tap, v, t] of four pixels, -1 outside, their
    weights, the ways down and to the right that make these, and the mask."""
    for tap in range(len(offset)):
        still_h, still_w = tap // taps_w * dilation[0] - pad[0], tap % taps_w * dilation[1] - pad[1]
        for t in range(count):
            oh, ow = (first + t) // outputs_w, (first + t) % outputs_w
            h, down = _low(oh * stride[0] + still_h, offset[tap, 0, first + t])
            u, right = _low(ow * stride[1] + still_w, offset[tap, 1, first + t])
            for v in range(4):
                i, j = h + v // 2, u + v % 2
                at[tap, v, t] = i * W + j if 0 <= i < H and 0 <= j < W else -1
            weight[tap, 0, t] = (real(1) - down) * (real(1) - right)
            weight[tap, 1, t] = (real(1) - down) * right
            weight[tap, 2, t] = down * (real(1) - right)
            weight[tap, 3, t] = down * right
            way[tap, 0, t], way[tap, 1, t] = down, right
            scale[tap, t] = mask[tap, first + t] if len(mask) else real(1)


@inline
def _pixel(plane, at):
    return plane[at] if at >= 0 else real(0)


@inline
def _sample(plane, at, weight, scale, count, to):
    """to[t] = what a tap reads of one channel."""
    for t in range(count):
        upper = weight[0, t] * _pixel(plane, at[0, t]) + weight[1, t] * _pixel(plane, at[1, t])
        lower = weight[2, t] * _pixel(plane, at[2, t]) + weight[3, t] * _pixel(plane, at[3, t])
        to[t] = scale[t] * (upper + lower)


@inline
def _scatter(g, at, weight, scale, count, plane):
    """Adds the gradient of what a tap read to the pixels that it read."""
    for t in range(count):
        for v in range(4):
            if at[v, t] >= 0:
                plane[at[v, t]] += g[t] * scale[t] * weight[v, t]


@inline(exact=True)
def _between(a, b, way):
    """Not a + way (b - a), which would make a NaN of two infinities."""
    return (real(1) - way) * a + way * b


@inline
def _slopes(g, plane, at, way, count, sums):
    """Adds to sums[0, t] and sums[1, t] the gradients by the place, down and to the right, to sums[2, t] that by the mask."""
    for t in range(count):
        a, b = _pixel(plane, at[0, t]), _pixel(plane, at[1, t])
        c, d = _pixel(plane, at[2, t]), _pixel(plane, at[3, t])
        down, right = way[0, t], way[1, t]
        sums[0, t] += g[t] * _between(c - a, d - b, right)
        sums[1, t] += g[t] * _between(b - a, d - c, down)
        sums[2, t] += g[t] * _between(_between(a, b, right), _between(c, d, right), down)


# Parallel over images x tiles of positions. The samples of a tile are a panel in the second cache, for all filters of a group;
# an offset group's places are found once a tile. The products go along the positions.
# Reads x four times a sample (from cache) and w once a tile; writes y once per DEPTH.
# Source: Dai et al., Deformable convolutional networks, arXiv 1703.06211.
@cpu(over="N*((OH*OW+127)//128)")
def deform_conv(
    begin, end, x, offset, mask, w, b, y, groups, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w
):  # fmt: skip
    (N, C, H, W), (F, CG, KH, KW), OG = x.shape, w.shape, offset.shape[1]
    FG, taps, size = F // groups, KH * KW, y.shape[2] * y.shape[3]
    tiles, per_group = (size + TILE - 1) // TILE, max(C // OG, 1)
    stride, pad, dilation = (stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w)
    step = min(max(DEPTH // taps, 1), max(CG, 1))  # channels of a panel
    panel = aligned(step * taps * TILE, x)
    at, weight = np.empty((taps, 4, TILE), np.int64), np.empty((taps, 4, TILE), x.dtype)
    way, scale = np.empty((taps, 2, TILE), x.dtype), np.empty((taps, TILE), x.dtype)
    x3, y1, w1 = x.reshape((N, C, H * W)), y.reshape(y.size), w.reshape(w.size)
    offset5 = offset.reshape((N, OG, taps, 2, size))
    mask4 = mask.reshape((N, OG, mask.size // max(N * OG * size, 1), size))  # or no taps of it
    for unit in range(begin, end):
        n, first = unit // tiles, unit % tiles * TILE
        count = min(TILE, size - first)
        found = -1  # the offset group whose places are at hand
        for g in range(groups):
            for start in range(0, max(CG, 1), step):
                channels = min(step, CG - start)
                for k in range(channels):
                    c = g * CG + start + k
                    if c // per_group != found:
                        found = c // per_group
                        _find_places(
                            offset5[n, found], mask4[n, found], KW, y.shape[3], first, count, H, W, stride, pad, dilation,
                            at, weight, way, scale,
                        )  # fmt: skip
                    for tap in range(taps):
                        _sample(x3[n, c], at[tap], weight[tap], scale[tap], count, panel[(k * taps + tap) * TILE :])
                for f in range(g * FG, (g + 1) * FG if start == 0 else 0):
                    fill_block(y1, (n * F + f) * size + first, 0, 1, count, b[f] if len(b) else real(0))
                add_product(
                    w1, (g * FG * CG + start) * taps, CG * taps, 1, panel, 0, TILE, y1, (n * F + g * FG) * size + first, size,
                    FG, count, channels * taps,
                )  # fmt: skip


# Parallel over images x offset groups, which own the channels that they move. Tile by tile of positions: the gradients of
# eight (channel, tap)s' samples are a product of w and gy in cache, which goes to the pixels read, places and masks at once.
# Reads gy once a tile (packed), x four times a sample, reads and writes gx four times a sample (from cache).
# Source: as deform_conv, appendix A.
@cpu(over="N*OG")
def deform_conv_grad_samples(
    begin, end, gy, x, offset, mask, w, gx, goffset, gmask, groups, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w
):  # fmt: skip
    (N, C, H, W), (F, CG, KH, KW), OG = x.shape, w.shape, offset.shape[1]
    FG, taps, size, per_group = F // groups, KH * KW, gy.shape[2] * gy.shape[3], C // OG
    stride, pad, dilation = (stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w)
    panel, sums = aligned(FG * TILE, x), aligned(8 * TILE, x)
    at, weight = np.empty((taps, 4, TILE), np.int64), np.empty((taps, 4, TILE), x.dtype)
    way, scale, slope = np.empty((taps, 2, TILE), x.dtype), np.empty((taps, TILE), x.dtype), np.empty((taps, 3, TILE), x.dtype)
    turned = np.empty(C * taps * FG, x.dtype)  # the weights of each (channel, tap), of all filters of its group
    w3 = w.reshape((F, CG, taps))
    for c in range(C):
        for tap in range(taps):
            for f in range(FG):
                turned[(c * taps + tap) * FG + f] = w3[c // CG * FG + f, c % CG, tap]
    x3, gy3 = x.reshape((N, C, H * W)), gy.reshape((N, F, size))
    offset5 = offset.reshape((N, OG, taps, 2, size))
    mask4 = mask.reshape((N, OG, mask.size // max(N * OG * size, 1), size))  # or no taps of it
    wants_x, wants_offset, wants_mask = gx.size > 0, goffset.size > 0, gmask.size > 0
    gx3 = gx.reshape((N, C, gx.size // max(N * C, 1)))
    goffset5 = goffset.reshape((N, OG, goffset.size // max(2 * N * OG * size, 1), 2, size))
    gmask4 = gmask.reshape((N, OG, gmask.size // max(N * OG * size, 1), size))
    for unit in range(begin, end):
        n, group = unit // OG, unit % OG
        c_begin, c_end = group * per_group, (group + 1) * per_group
        for c in range(c_begin, c_end):
            plane = gx3[n, c]
            for i in range(len(plane)):
                plane[i] = real(0)
        for first in range(0, size, TILE):
            count = min(TILE, size - first)
            _find_places(
                offset5[n, group], mask4[n, group], KW, gy.shape[3], first, count, H, W, stride, pad, dilation,
                at, weight, way, scale,
            )  # fmt: skip
            for tap in range(taps):
                for v in range(3):
                    for t in range(count):
                        slope[tap, v, t] = real(0)
            c = c_begin
            while c < c_end:  # the channels of one group of filters
                g = c // CG
                stop = min(c_end, (g + 1) * CG)
                for f in range(FG):
                    source, to = gy3[n, g * FG + f, first : first + count], panel[f * TILE : f * TILE + count]
                    for t in range(count):
                        to[t] = source[t]
                for k in range(c * taps, stop * taps, 8):
                    rows = min(8, stop * taps - k)
                    for t in range(8 * TILE):
                        sums[t] = real(0)
                    add_product(turned, k * FG, FG, 1, panel, 0, TILE, sums, 0, TILE, rows, count, FG)
                    for i in range(rows):
                        channel, tap = (k + i) // taps, (k + i) % taps
                        part = sums[i * TILE : (i + 1) * TILE]
                        if wants_x:
                            _scatter(part, at[tap], weight[tap], scale[tap], count, gx3[n, channel])
                        if wants_offset or wants_mask:
                            _slopes(part, x3[n, channel], at[tap], way[tap], count, slope[tap])
                c = stop
            for tap in range(taps):
                for t in range(count):
                    if wants_offset:
                        goffset5[n, group, tap, 0, first + t] = scale[tap, t] * slope[tap, 0, t]
                        goffset5[n, group, tap, 1, first + t] = scale[tap, t] * slope[tap, 1, t]
                    if wants_mask:
                        gmask4[n, group, tap, first + t] = slope[tap, 2, t]


# Parallel over blocks of eight channels, which share the places. Tile by tile of positions: the samples of a channel stay in
# the first cache, for all filters of its group.
# Reads x four times a sample (from cache) and gy once a channel; adds to gw once a tile.
# Source: as deform_conv.
@cpu(over="(C+7)//8")
def deform_conv_grad_weight(
    begin, end, gy, x, offset, mask, gw, groups, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w
):  # fmt: skip
    (N, C, H, W), (F, CG, KH, KW), OG = x.shape, gw.shape, offset.shape[1]
    FG, taps, size, per_group = F // groups, KH * KW, gy.shape[2] * gy.shape[3], max(C // OG, 1)
    stride, pad, dilation = (stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w)
    samples = np.empty((taps, TILE), x.dtype)
    at, weight = np.empty((taps, 4, TILE), np.int64), np.empty((taps, 4, TILE), x.dtype)
    way, scale = np.empty((taps, 2, TILE), x.dtype), np.empty((taps, TILE), x.dtype)
    x3, gy3, gw3 = x.reshape((N, C, H * W)), gy.reshape((N, F, size)), gw.reshape((F, CG, taps))
    offset5 = offset.reshape((N, OG, taps, 2, size))
    mask4 = mask.reshape((N, OG, mask.size // max(N * OG * size, 1), size))  # or no taps of it
    for unit in range(begin, end):
        c_begin, c_end = unit * 8, min(unit * 8 + 8, C)
        for c in range(c_begin, c_end):
            for f in range(c // CG * FG, (c // CG + 1) * FG):
                for tap in range(taps):
                    gw3[f, c % CG, tap] = real(0)
        for n in range(N):
            for first in range(0, size, TILE):
                count = min(TILE, size - first)
                found = -1
                for c in range(c_begin, c_end):
                    if c // per_group != found:
                        found = c // per_group
                        _find_places(
                            offset5[n, found], mask4[n, found], KW, gy.shape[3], first, count, H, W, stride, pad, dilation,
                            at, weight, way, scale,
                        )  # fmt: skip
                    for tap in range(taps):
                        _sample(x3[n, c], at[tap], weight[tap], scale[tap], count, samples[tap])
                    for f in range(c // CG * FG, (c // CG + 1) * FG):
                        for tap in range(taps):
                            gw3[f, c % CG, tap] += _dot(gy3[n, f, first : first + count], samples[tap], count, 1)
