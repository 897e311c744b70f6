"""Pooling over three spatial axes.

What a band of outputs takes of a plane is laid out as a sheet: with a stride of s every s-th row and column side by side, so
that the inputs of neighbouring outputs are neighbours whatever the stride, and the padding filled in. A tap is then a shift of
the whole sheet: the taps along W are combined to a sheet of lines, the taps along H of these to outputs, in long sweeps without
borders. Inner loops stand in functions of their own, to which arrays come as arguments: a slice of those costs next to nothing.
"""

import math

import numpy as np

from ..compile import cpu, inline, real
from ..scalars import pool_share, pool_taps
from .panels import AHEAD, U, add_row, copy_ahead, copy_block, fill_ahead, fill_block, inside

ROWS, COLUMNS = 16, 512  # of outputs that are made together: their sheet stays in the first cache
FETCHED = 1024  # elements of a sheet, where it has several rows: about what is fetched ahead while the sheet before is worked on


# ------------------------------------------------------------------------------------------------------------- sheets


@inline
def _cut(o, outputs, size, kernel, stride, pad, dilation):
    """What windows o to o + outputs - 1 take of an axis: (the first tap that any of them has inside, how many from it to the
    last, where window o has the first, lines of a phase, phases)."""
    first = pool_taps(o + outputs - 1, size, kernel, stride, pad, dilation)[0]
    low, count, _ = pool_taps(o, size, kernel, stride, pad, dilation)
    reach = (low + count - first - 1) * dilation
    return first, low + count - first, o * stride - pad + first * dilation, outputs + reach // stride, min(stride, reach + 1)


@inline
def _room(outputs, size, kernel, stride, dilation):
    """The most that _cut gives for so many outputs: (taps, lines, phases)."""
    taps = min(kernel, (size - 1 + (outputs - 1) * stride) // dilation + 1)
    reach = (taps - 1) * dilation
    return taps, outputs + reach // stride, min(stride, reach + 1)


@inline
def _copy_lines(x, start, H, W, top, stride, rows, phases, left, step, width, fill, to, to_at):
    """to[to_at + (i * rows + r) * width + q] = x[start + (top + r * stride + i) * W + left + q * step], `fill` outside: in the
    order of memory, which is fetched ahead then."""
    lo, hi = inside(left, step, W, width)
    for r in range(rows):
        for i in range(phases):
            h, at, block_end = top + r * stride + i, to_at + (i * rows + r) * width, to_at + (i + 1) * rows * width
            a, b = (lo, hi) if 0 <= h < H else (0, 0)
            begin = start + h * W + left + a * step
            if step == 1 and at + width + AHEAD <= block_end and begin + b - a + AHEAD <= len(x):  # what follows is written later
                fill_ahead(to, at, a, fill)
                copy_ahead(x, begin, to, at + a, b - a)
                fill_ahead(to, at + b, width - b, fill)
            else:
                fill_block(to, at, 0, 1, a, fill)
                copy_block(x, begin, 0, step, to, at + a, 0, 1, b - a)
                fill_block(to, at + b, 0, 1, width - b, fill)


@inline
def _lay_out(x, plane, H, W, down, across, stride, fill, whole, sheet):
    """sheet[j, i, r, q] = x[plane, top + r * stride_h + i, left + q * stride_w + j], `fill` outside. Where every column is
    wanted, whole rows are copied, then taken apart in one long sweep: each alone is too short for vectors."""
    (_, _, top, rows, phases_h), (_, _, left, pitch, phases_w) = down, across
    apart, n = phases_w if phases_w == stride[2] else 1, phases_h * rows * pitch
    step, to = stride[2] // apart, sheet if apart == 1 else whole
    for j in range(phases_w // apart):
        _copy_lines(x, plane * H * W, H, W, top, stride[1], rows, phases_h, left + j, step, pitch * apart, fill, to, j * n)
    for j in range(apart if apart > 1 else 0):
        copy_block(whole, j, 0, apart, sheet, j * n, 0, 1, n)


@inline
def _shifts(down, across, stride, dilation, by_line, by_tap):
    """How far the taps are apart: those along W in the sheet, those along H in the lines that the former are combined to."""
    (_, taps_h, _, rows, phases_h), (_, taps_w, _, pitch, _) = down, across
    i, r = 0, 0
    for k in range(taps_h):
        by_line[k] = (i * rows + r) * pitch
        i += dilation[1]
        r, i = r + i // stride[1], i % stride[1]
    j, q = 0, 0
    for k in range(taps_w):
        by_tap[k] = j * phases_h * rows * pitch + q
        j += dilation[2]
        q, j = q + j // stride[2], j % stride[2]


@inline
def _sizes(x, y, kernel, stride):
    """The spatial sizes of x and y, without the planes; sequences count as the rows of one plane."""
    M, D, H, W = x.shape
    OD, OH, OW = y.shape[1:]
    if D * H * OD * OH * kernel[0] * kernel[1] * stride[1] == 1:
        H = OH = M
    return (D, H, W), (OD, OH, OW)


@inline
def _add(source, shifts, taps, n, sums, fresh):
    """sums[q] (+)= the sum of source[q + shift] over the taps."""
    done = min(taps, 2) if fresh else 0
    a, b = U(shifts[0]), U(shifts[max(done - 1, 0)])
    if done == 1:
        for q in range(n):
            sums[q] = source[a + U(q)]
    if done == 2:
        for q in range(n):
            sums[q] = source[a + U(q)] + source[b + U(q)]
    for k in range(done, taps):
        a = U(shifts[k])
        for q in range(n):
            sums[q] += source[a + U(q)]


@inline
def _larger(v, best):
    """True where v takes the place of `best`: it is larger, or the first NaN."""
    return (not v <= best) & (best == best)


@inline
def _maximize(source, shifts, taps, n, best, fresh):
    """best[q] = the largest source[q + shift] of the taps (and best[q])."""
    done = min(taps, 2) if fresh else 0
    a, b = U(shifts[0]), U(shifts[max(done - 1, 0)])
    if fresh:
        for q in range(n):
            u, v = source[a + U(q)], source[b + U(q)]
            best[q] = v if _larger(v, u) else u
    for k in range(done, taps):
        a = U(shifts[k])
        for q in range(n):
            u, v = best[q], source[a + U(q)]
            best[q] = v if _larger(v, u) else u


@inline
def _find_in_rows(source, shifts, taps, unit, n, best, places):
    """As _maximize, afresh; places[q] = unit * the first tap with the largest."""
    first = U(shifts[0])
    for q in range(n):
        best[q], places[q] = source[first + U(q)], np.int32(0)
    for k in range(1, taps):
        a, place = U(shifts[k]), np.int32(unit * k)
        for q in range(n):
            u, v = best[q], source[a + U(q)]
            take = _larger(v, u)
            best[q] = v if take else u
            places[q] = place if take else places[q]


@inline
def _find_in_lines(lines, line_places, shifts, taps, start, unit, n, best, places):
    """As _maximize; places[q] = start + unit * the first tap with the largest + the place in its line."""
    for k in range(taps):
        a, place = U(shifts[k]), np.int32(start + unit * k)
        for q in range(n):
            u, v = best[q], lines[a + U(q)]
            take = _larger(v, u)
            best[q] = v if take else u
            places[q] = line_places[a + U(q)] + place if take else places[q]


# ------------------------------------------------------------------------------------------------------------- maxima


@inline
def _first_places(o, windows, size, kernel, stride, pad, dilation, unit, to):
    """unit * the first tap inside of windows o, o + 1, ..., counted from that of the last of them."""
    last = pool_taps(o + windows - 1, size, kernel, stride, pad, dilation)[0]
    i, first = 0, pool_taps(o, size, kernel, stride, pad, dilation)[0]
    while i < windows and first > last:
        to[i] = unit * (first - last)
        i += 1
        first = pool_taps(o + i, size, kernel, stride, pad, dilation)[0]
    for k in range(i, windows):
        to[k] = 0


@inline
def _start_places(row_places, column_places, rows, columns, pitch, best, places):
    """No maximum yet; where all is minus infinity, the first tap inside of a window is its place."""
    for r in range(rows):
        a, place = U(r * pitch), row_places[r]
        for q in range(columns):
            best[a + U(q)], places[a + U(q)] = real(-np.inf), place + column_places[q]


@inline
def _write_places(places, pitch, first, row_step, step, to, at, to_pitch, rows, columns):
    """to[at + r * to_pitch + q] = places[r * pitch + q], counted from first + r * row_step + q * step."""
    for r in range(rows):
        a, b, begin = U(r * pitch), U(at + r * to_pitch), first + r * row_step
        for q in range(columns):
            to[b + U(q)] = begin + q * step + places[a + U(q)]


@inline
def _max_windows(begin, end, x, y, indices, offsets, counts_taps, kernel, stride, pad, dilation):
    """The maxima of rows of outputs, and their places: offsets if those are what counts, else indices, unless they are empty."""
    (D, H, W), (OD, OH, OW) = _sizes(x, y, kernel, stride)
    line = W if H == x.shape[2] else 0  # from row to row in the count of indices
    x1, y1, indices1, offsets1 = x.reshape(x.size), y.reshape(y.size), indices.reshape(indices.size), offsets.reshape(offsets.size)
    with_places, columns = counts_taps or indices.size > 0, max(min(COLUMNS // stride[2], OW), 1)
    unit = (kernel[1] * kernel[2], kernel[2], 1) if counts_taps else (dilation[0] * H * W, dilation[1] * W, dilation[2])
    most_rows = max(min(ROWS, OH, (FETCHED - 1) // (W * stride[1]) + 1), 1)
    taps_h, lines_h, phases_h = _room(most_rows, H, kernel[1], stride[1], dilation[1])
    taps_w, lines_w, phases_w = _room(columns, W, kernel[2], stride[2], dilation[2])
    by_line, by_tap, most = np.empty(taps_h, np.int64), np.empty(taps_w, np.int64), phases_h * lines_h * lines_w
    sheet, lines, best = np.empty((phases_w + 1) * most, x.dtype), np.empty(most, x.dtype), np.empty(most_rows * lines_w, x.dtype)
    whole = np.empty(phases_w * most, x.dtype)
    line_places = np.empty(most if with_places else 0, np.int32)
    places = np.empty(most_rows * lines_w if with_places else 0, np.int32)
    row_places, column_places = np.empty(most_rows, np.int32), np.empty(columns, np.int32)
    row = begin
    while row < end:
        m, od, top = row // OH // OD, row // OH % OD, row % OH
        rows = min(most_rows, OH - top, end - row)
        kd, nd, d0 = pool_taps(od, D, kernel[0], stride[0], pad[0], dilation[0])
        down = _cut(top, rows, H, kernel[1], stride[1], pad[1], dilation[1])
        for left in range(0, OW, columns):
            width = min(columns, OW - left)
            across = _cut(left, width, W, kernel[2], stride[2], pad[2], dilation[2])
            pitch = across[3]
            n, lines_n, at = rows * pitch, down[4] * down[3] * pitch, row * OW + left
            _shifts(down, across, stride, dilation, by_line, by_tap)
            if with_places:
                _first_places(top, rows, H, kernel[1], stride[1], pad[1], dilation[1], unit[1], row_places)
                _first_places(left, width, W, kernel[2], stride[2], pad[2], dilation[2], unit[2], column_places)
                _start_places(row_places, column_places, rows, width, pitch, best, places)
            for d in range(nd):
                _lay_out(x1, m * D + d0 + d * dilation[0], H, W, down, across, stride, real(-np.inf), whole, sheet)
                if with_places:
                    _find_in_rows(sheet, by_tap, across[1], unit[2], lines_n, lines, line_places)
                else:
                    _maximize(sheet, by_tap, across[1], lines_n, lines, d >= 0)  # True; as a literal it would be compiled apart
                if with_places:
                    _find_in_lines(lines, line_places, by_line, down[1], d * unit[0], unit[1], n, best, places)
                else:
                    _maximize(lines, by_line, down[1], n, best, d == 0)
            copy_block(best, 0, pitch, 1, y1, at, OW, rows, width)
            if counts_taps:
                first = (kd * kernel[1] + down[0]) * kernel[2] + across[0]
                _write_places(places, pitch, first, 0, 0, offsets1, at, OW, rows, width)
            elif with_places:
                first = d0 * H * W + down[2] * line + across[2]
                _write_places(places, pitch, first, stride[1] * line, stride[2], indices1, at, OW, rows, width)
        row += rows


# Parallel over rows of outputs, a band of them at a time. A window of K taps costs about 2 sqrt(K) comparisons, by selection
# and not by branches, which random numbers would mispredict. Reads an input once a band (and kernel_d times); from cache then.
@cpu(over="M*OD*OH")
def max_pool(
    begin, end, x, y, indices, offsets, kernel_d, kernel_h, kernel_w, stride_d, stride_h, stride_w, pad_front, pad_top,
    pad_left, dilation_d, dilation_h, dilation_w,
):  # fmt: skip
    kernel, stride = (kernel_d, kernel_h, kernel_w), (stride_d, stride_h, stride_w)
    pad, dilation = (pad_front, pad_top, pad_left), (dilation_d, dilation_h, dilation_w)
    for counts_taps in (False, True):  # not two calls, which would be compiled apart
        if (offsets.size > 0) if counts_taps else (indices.size > 0 or offsets.size == 0):
            _max_windows(begin, end, x, y, indices, offsets, counts_taps, kernel, stride, pad, dilation)


@inline
def _place(tap, kernel_h, kernel_w, dilation_d, dilation_h, dilation_w, H, W):
    """Where the tap of that number stands in a plane, from tap 0."""
    kd, kh, kw = tap // (kernel_h * kernel_w), tap // kernel_w % kernel_h, tap % kernel_w
    return (kd * dilation_d * H + kh * dilation_h) * W + kw * dilation_w


# Parallel over planes. A plane is cleared and then added to while it sits in cache; gy and offsets stream through.
@cpu(over="M")
def max_pool_backward(
    begin, end, gy, offsets, gx, kernel_d, kernel_h, kernel_w, stride_d, stride_h, stride_w, pad_front, pad_top, pad_left,
    dilation_d, dilation_h, dilation_w,
):  # fmt: skip
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


@inline
def _share_lines(plane, od, oh, D, H, W, OD, OH, to):
    """Where the lines of the input begin that a row of windows takes; how many they are."""
    (d0, d1), (h0, h1) = pool_share(od, D, OD), pool_share(oh, H, OH)
    for d in range(d1 - d0):
        for h in range(h1 - h0):
            to[d * (h1 - h0) + h] = ((plane * D + d0 + d) * H + h0 + h) * W
    return (d1 - d0) * (h1 - h0)


@inline
def _largest(line, begin, end):
    best = line[begin]
    for i in range(begin + 1, end):
        best = line[i] if _larger(line[i], best) else best
    return best


@inline
def _find_largest(line, places, begin, end):
    """Where a line has the first largest element, the smallest place before all."""
    at = begin
    for i in range(begin + 1, end):
        same = (line[i] == line[at]) | ((line[i] != line[i]) & (line[at] != line[at]))
        at = i if _larger(line[i], line[at]) | (same & (places[i] < places[at])) else at
    return at


# Parallel over planes. The lines of a row of windows are reduced to one, with the number of each column's largest line, that
# line window by window.
@cpu(over="M")
def adaptive_max_pool(begin, end, x, y, indices):
    D, H, W = x.shape[1:]
    OD, OH, OW = y.shape[1:]
    x1, shifts = x.reshape(x.size), np.empty((D // OD + 2) * (H // OH + 2), np.int64)
    line, numbers = np.empty(W, x.dtype), np.empty(W, np.int32)
    for row in range(begin * OD * OH, end * OD * OH):
        m, od, oh = row // OH // OD, row // OH % OD, row % OH
        lines = _share_lines(m, od, oh, D, H, W, OD, OH, shifts)
        if indices.size:
            _find_in_rows(x1, shifts, lines, oh // OH + 1, W, line, numbers)
        else:
            _maximize(x1, shifts, lines, W, line, oh >= 0)
        for ow in range(OW):
            w0, w1 = pool_share(ow, W, OW)
            if indices.size:
                w = _find_largest(line, numbers, w0, w1)
                y[m, od, oh, ow], indices[m, od, oh, ow] = line[w], shifts[numbers[w]] - m * D * H * W + w
            else:
                y[m, od, oh, ow] = _largest(line, w0, w1)


# Parallel over planes; additions in memory order, whatever the threads.
@cpu(over="M")
def adaptive_max_pool_backward(begin, end, gy, indices, gx):
    for m in range(begin, end):
        g, at, plane = gy[m], indices[m], gx[m]
        plane[:] = real(0)
        for o in range(len(g)):
            plane[at[o]] += g[o]


# ------------------------------------------------------------------------------------------------------- means and norms


@inline
def _raise(x, norm, n):
    if norm == real(2):
        for i in range(n):
            x[i] = x[i] * x[i]
    elif norm == real(3):
        for i in range(n):
            x[i] = x[i] * x[i] * x[i]
    elif norm != real(1):
        for i in range(n):
            x[i] = x[i] ** norm


@inline
def _finish(sums, pitch, row_factors, column_factors, left, norm, rows, columns, to, at, to_pitch):
    """to[at + r * to_pitch + q] = the roots of the sums over their factors."""
    for r in range(rows):
        a, b, factor = U(r * pitch), U(at + r * to_pitch), row_factors[r]
        for q in range(columns):
            to[b + U(q)] = sums[a + U(q)] / (factor * column_factors[U(left) + U(q)])
        if norm == real(2):
            for q in range(columns):
                to[b + U(q)] = math.sqrt(to[b + U(q)])
        elif norm != real(1):
            for q in range(columns):
                to[b + U(q)] = to[b + U(q)] ** (real(1) / norm)


@inline
def _sum_windows(begin, end, x, y, factors, norm, kernel, stride, pad, dilation):
    """The roots of sums of powers for rows of outputs, over the product of the factors of d, h and w that each window has."""
    (D, H, W), (OD, OH, OW) = _sizes(x, y, kernel, stride)
    x1, y1, columns = x.reshape(x.size), y.reshape(y.size), max(min(COLUMNS // stride[2], OW), 1)
    most_rows = max(min(ROWS, OH, (FETCHED - 1) // (W * stride[1]) + 1), 1)
    taps_h, lines_h, phases_h = _room(most_rows, H, kernel[1], stride[1], dilation[1])
    taps_w, lines_w, phases_w = _room(columns, W, kernel[2], stride[2], dilation[2])
    by_line, by_tap, most = np.empty(taps_h, np.int64), np.empty(taps_w, np.int64), phases_h * lines_h * lines_w
    sheet, lines, sums = np.empty((phases_w + 1) * most, x.dtype), np.empty(most, x.dtype), np.empty(most_rows * lines_w, x.dtype)
    whole = np.empty(phases_w * most, x.dtype)
    row_factors, nothing = np.empty(most_rows, x.dtype), real(0) if norm > real(0) else real(np.inf)  # whose power is 0
    row = begin
    while row < end:
        m, od, top = row // OH // OD, row // OH % OD, row % OH
        rows = min(most_rows, OH - top, end - row)
        _, nd, d0 = pool_taps(od, D, kernel[0], stride[0], pad[0], dilation[0])
        down = _cut(top, rows, H, kernel[1], stride[1], pad[1], dilation[1])
        for r in range(rows):
            row_factors[r] = factors[0, od] * factors[1, (top + r) % y.shape[2]]  # sequences are rows of one plane
        for left in range(0, OW, columns):
            width = min(columns, OW - left)
            across = _cut(left, width, W, kernel[2], stride[2], pad[2], dilation[2])
            pitch = across[3]
            n, lines_n = rows * pitch, down[4] * down[3] * pitch
            _shifts(down, across, stride, dilation, by_line, by_tap)
            for d in range(nd):
                _lay_out(x1, m * D + d0 + d * dilation[0], H, W, down, across, stride, nothing, whole, sheet)
                _raise(sheet, norm, across[4] * lines_n)
                _add(sheet, by_tap, across[1], lines_n, lines, d >= 0)  # True; as a literal it would be compiled apart
                _add(lines, by_line, down[1], n, sums, d == 0)
            _finish(sums, pitch, row_factors, factors[2], left, norm, rows, width, y1, row * OW + left, OW)
        row += rows


@inline
def _factors(y, sizes, kernel, stride, pad, dilation, units):
    """factors[axis, o] = units[axis] * the number of taps that window o of an axis has inside."""
    windows = y.shape[1:]
    factors = np.empty((3, max(windows[0], windows[1], windows[2])), y.dtype)
    for a in range(3):
        for o in range(windows[a]):
            factors[a, o] = units[a] * real(kernel[a])
        for back in range(2):  # from either end up to the first whole window
            o = windows[a] - 1 if back else 0
            taps = pool_taps(o, sizes[a], kernel[a], stride[a], pad[a], dilation[a])[1]
            while taps < kernel[a] and 0 <= o < windows[a]:
                factors[a, o] = units[a] * real(taps)
                o += -1 if back else 1
                taps = pool_taps(o, sizes[a], kernel[a], stride[a], pad[a], dilation[a])[1]
    return factors


@inline
def _divisors(y, sizes, kernel, stride, pad, after, dilation, count_include_pad, divisor):
    """The divisors of means, as factors per axis."""
    (D, H, W), units = sizes, (real(1), real(1), real(1))
    if count_include_pad or divisor:
        D, H, W, pad = D + pad[0] + after[0], H + pad[1] + after[1], W + pad[2] + after[2], (0, 0, 0)
    if divisor:
        kernel, units = (1, 1, 1), (real(divisor), real(1), real(1))
    return _factors(y, (D, H, W), kernel, stride, pad, dilation, units)


# Parallel over rows of outputs, as max_pool. A window of K taps costs about 2 sqrt(K) additions.
@cpu(over="M*OD*OH")
def avg_pool(
    begin, end, x, y, kernel_d, kernel_h, kernel_w, stride_d, stride_h, stride_w, pad_front, pad_back, pad_top, pad_bottom,
    pad_left, pad_right, dilation_d, dilation_h, dilation_w, count_include_pad, divisor,
):  # fmt: skip
    kernel, stride = (kernel_d, kernel_h, kernel_w), (stride_d, stride_h, stride_w)
    pad, dilation = (pad_front, pad_top, pad_left), (dilation_d, dilation_h, dilation_w)
    after = (pad_back, pad_bottom, pad_right)
    factors = _divisors(y, x.shape[1:], kernel, stride, pad, after, dilation, count_include_pad, divisor)
    _sum_windows(begin, end, x, y, factors, real(1), kernel, stride, pad, dilation)


# As avg_pool, with the powers of the inputs.
@cpu(over="M*OD*OH")
def lp_pool(
    begin, end, x, y, kernel_d, kernel_h, kernel_w, stride_d, stride_h, stride_w, dilation_d, dilation_h, dilation_w, norm,
):  # fmt: skip
    kernel, stride, pad = (kernel_d, kernel_h, kernel_w), (stride_d, stride_h, stride_w), (0, 0, 0)
    dilation = (dilation_d, dilation_h, dilation_w)
    units = (real(1) / real(kernel_d), real(1) / real(kernel_h), real(1) / real(kernel_w))
    factors = _factors(y, x.shape[1:], kernel, stride, pad, dilation, units)
    _sum_windows(begin, end, x, y, factors, norm, kernel, stride, pad, dilation)


@inline
def _pass_back(gy, y, at, row_factor, column_factors, norm, n, to):
    """What a row of outputs passes to each of its taps, but for the power of the tap."""
    for q in range(n):
        to[q] = gy[U(at) + U(q)] / (row_factor * column_factors[q])
    if norm == real(2):
        for q in range(n):
            root = y[U(at) + U(q)]
            to[q] = to[q] / root if root != real(0) else real(0)
    elif norm != real(1):
        for q in range(n):
            root = y[U(at) + U(q)]
            to[q] = to[q] * root ** (real(1) - norm) if root != real(0) else real(0)


@inline
def _add_line(line, x, gx, at, norm, n):
    """gx += line * x ** (norm - 1), from `at` on."""
    a = U(at)
    if norm == real(1):
        for q in range(n):
            gx[a + U(q)] += line[q]
    elif norm == real(2):
        for q in range(n):
            gx[a + U(q)] += line[q] * x[a + U(q)]
    else:
        for q in range(n):
            if line[q] != real(0):
                gx[a + U(q)] += line[q] * x[a + U(q)] ** (norm - real(1))


@inline
def _spread_windows(begin, end, gy, x, y, gx, factors, norm, kernel, stride, pad, dilation):
    """The gradient of _sum_windows for planes; x and y are not read for the norm 1."""
    D, H, W = gx.shape[1:]
    OD, OH, OW = gy.shape[1:]
    x1, y1, gy1, gx1 = x.reshape(x.size), y.reshape(y.size), gy.reshape(gy.size), gx.reshape(gx.size)
    line, passed, columns = np.empty(W, gx.dtype), np.empty(OW, gx.dtype), max(min(COLUMNS // stride[2], OW), 1)
    for i in range(begin * D * H * W, end * D * H * W):
        gx1[i] = real(0)
    for row in range(begin * OD * OH, end * OD * OH):
        m, od, oh = row // OH // OD, row // OH % OD, row % OH
        _, nd, d0 = pool_taps(od, D, kernel[0], stride[0], pad[0], dilation[0])
        _, nh, h0 = pool_taps(oh, H, kernel[1], stride[1], pad[1], dilation[1])
        _pass_back(gy1, y1, row * OW, factors[0, od] * factors[1, oh], factors[2], norm, OW, passed)
        for i in range(W):
            line[i] = real(0)
        for left in range(0, OW, columns):
            across = _cut(left, min(columns, OW - left), W, kernel[2], stride[2], pad[2], dilation[2])
            for k in range(across[1]):
                at = across[2] + k * dilation[2]
                lo, hi = inside(at, stride[2], W, min(columns, OW - left))
                add_row(passed, left + lo, 1, line, at + lo * stride[2], stride[2], hi - lo)
        for d in range(nd):
            for h in range(nh):
                at = ((m * D + d0 + d * dilation[0]) * H + h0 + h * dilation[1]) * W
                _add_line(line, x1, gx1, at, norm, W)


# Parallel over planes. Each row of outputs becomes one line, which is added to every line that its windows take, in cache.
@cpu(over="M")
def avg_pool_backward(
    begin, end, gy, gx, kernel_d, kernel_h, kernel_w, stride_d, stride_h, stride_w, pad_front, pad_back, pad_top, pad_bottom,
    pad_left, pad_right, dilation_d, dilation_h, dilation_w, count_include_pad, divisor,
):  # fmt: skip
    kernel, stride = (kernel_d, kernel_h, kernel_w), (stride_d, stride_h, stride_w)
    pad, after, dilation = (pad_front, pad_top, pad_left), (pad_back, pad_bottom, pad_right), (dilation_d, dilation_h, dilation_w)
    factors = _divisors(gy, gx.shape[1:], kernel, stride, pad, after, dilation, count_include_pad, divisor)
    _spread_windows(begin, end, gy, gy, gy, gx, factors, real(1), kernel, stride, pad, dilation)


# Parallel over planes. The lines of a row of windows are summed to one, that line window by window.
@cpu(over="M")
def adaptive_avg_pool(begin, end, x, y):
    D, H, W = x.shape[1:]
    OD, OH, OW = y.shape[1:]
    x1, shifts, line = x.reshape(x.size), np.empty((D // OD + 2) * (H // OH + 2), np.int64), np.empty(W, x.dtype)
    for row in range(begin * OD * OH, end * OD * OH):
        m, od, oh = row // OH // OD, row // OH % OD, row % OH
        lines = _share_lines(m, od, oh, D, H, W, OD, OH, shifts)
        _add(x1, shifts, lines, W, line, oh >= 0)
        for ow in range(OW):
            w0, w1 = pool_share(ow, W, OW)
            total = real(0)
            for w in range(w0, w1):
                total += line[w]
            y[m, od, oh, ow] = total / real(lines * (w1 - w0))


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


# Parallel over planes. Each row of outputs becomes one line, which is added to every line that its windows take, in cache.
@cpu(over="M")
def lp_pool_backward(
    begin, end, gy, x, y, gx, kernel_d, kernel_h, kernel_w, stride_d, stride_h, stride_w, dilation_d, dilation_h, dilation_w,
    norm,
):  # fmt: skip
    kernel, stride, pad = (kernel_d, kernel_h, kernel_w), (stride_d, stride_h, stride_w), (0, 0, 0)
    dilation, units = (
        (dilation_d, dilation_h, dilation_w),
        (real(1) / real(kernel_d), real(1) / real(kernel_h), real(1) / real(kernel_w)),
    )
    factors = _factors(gy, gx.shape[1:], kernel, stride, pad, dilation, units)
    _spread_windows(begin, end, gy, x, y, gx, factors, norm, kernel, stride, pad, dilation)


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
