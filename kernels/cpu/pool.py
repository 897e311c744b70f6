"""Pooling over three spatial axes.

The lines of the input that a row of windows takes (along D and H) are reduced to one, straight from the input, for a band of
rows; then the taps along W are taken from those lines. With a stride of s every s-th column is laid side by side before, so
that the inputs of neighbouring outputs are neighbours whatever the stride, and the padding is filled in: a tap is then a shift
of all lines of a band, in one long sweep without borders. Inner loops stand in functions of their own, to which arrays come as
arguments: a slice of those costs next to nothing.
"""

import math

import numpy as np

from ..compile import cpu, inline, real
from ..scalars import pool_share, pool_taps
from .llvm import fetch
from .panels import AHEAD, U, copy_block, fill_ahead, inside

ROWS, COLUMNS = 16, 512  # of outputs that are made together: their lines stay in the first cache
FETCHED = 1024  # elements of a band, where it has several rows: about what is fetched ahead while the band before is worked on


# -------------------------------------------------------------------------------------------------------------- bands


@inline
def _cut(o, outputs, size, kernel, stride, pad, dilation):
    """What windows o to o + outputs - 1 take of an axis: (the first tap that any of them has inside, how many from it to the
    last, where window o has the first, elements of a phase, phases)."""
    first = pool_taps(o + outputs - 1, size, kernel, stride, pad, dilation)[0]
    low, count, _ = pool_taps(o, size, kernel, stride, pad, dilation)
    reach = (low + count - first - 1) * dilation
    return first, low + count - first, o * stride - pad + first * dilation, outputs + reach // stride, min(stride, reach + 1)


@inline
def _room(outputs, size, kernel, stride, dilation):
    """The most that _cut gives for so many outputs: (taps, elements of a phase, phases)."""
    taps = min(kernel, (size - 1 + (outputs - 1) * stride) // dilation + 1)
    reach = (taps - 1) * dilation
    return taps, outputs + reach // stride, min(stride, reach + 1)


@inline
def _find_lines(first, nd, step_d, nh, step_h, to):
    """Where the lines begin that a row of windows takes; how many they are."""
    for d in range(nd):
        for h in range(nh):
            to[d * nh + h] = first + d * step_d + h * step_h
    return nd * nh


@inline
def _fetch_lines(x, starts, first, taps, n):
    """Lines `first` to `taps` - 1, which the windows before have not taken: what is to be read where these will be, soon."""
    for k in range(first, taps):
        for q in range(0, n, 16):
            fetch(x, starts[k] + q)


@inline
def _ahead(n, start, size):
    """n, or the whole rounds of vectors that cover it where an array of that size has them: a short row has no tail then."""
    rounds = (n + AHEAD - 1) // AHEAD * AHEAD
    return rounds if start + rounds <= size else n


@inline
def _rounds(n):
    """n, or the whole rounds of vectors that cover it where it is many."""
    return (n + AHEAD - 1) // AHEAD * AHEAD if n >= AHEAD else n


@inline
def _band_rows(rows, elements):
    """How many rows of windows are worked on together; so many elements of the input stand between two."""
    return max(min(ROWS, rows, (FETCHED - 1) // elements + 1), 1)


@inline
def _split(lines, n, stride, phases, to):
    """to[j * n + q] = lines[q * stride + j]. All phases of a pair in one loop, whose reads are whole vectors."""
    n = min(n, 2**60)  # 2 * q cannot wrap around then, or no vectors would be made
    if stride == 2 and phases == 2:
        even, odd = to[:n], to[n : 2 * n]
        for q in range(n):
            a, b = lines[2 * q], lines[2 * q + 1]
            even[q], odd[q] = a, b
    else:
        for j in range(phases):
            copy_block(lines, j, 0, stride, to, j * n, 0, 1, n)


@inline
def _shifts(across, n, stride, dilation, to):
    """How far the taps along W are apart in n lines that are split."""
    j, q = 0, 0
    for k in range(across[1]):
        to[k] = j * n + q
        j += dilation
        q, j = q + j // stride, j % stride


@inline
def _sizes(x, y, kernel, stride):
    """The spatial sizes of x and y, without the planes; sequences count as the rows of one plane."""
    M, D, H, W = x.shape
    OD, OH, OW = y.shape[1:]
    if D * H * OD * OH * kernel[0] * kernel[1] * stride[1] == 1:
        H = OH = M
    return (D, H, W), (OD, OH, OW)


@inline
def _add(source, shifts, taps, n, sums, at):
    """sums[at + q] = the sum of source[q + shift] over the taps. More than a few lines are fetched one after the other."""
    a, b, c, to = U(shifts[0]), U(shifts[min(1, taps - 1)]), U(shifts[min(2, taps - 1)]), U(at)
    if taps == 1 or taps > 3:
        for q in range(n):
            sums[to + U(q)] = source[a + U(q)]
    elif taps == 2:
        for q in range(n):
            sums[to + U(q)] = source[a + U(q)] + source[b + U(q)]
    else:
        for q in range(n):
            sums[to + U(q)] = source[a + U(q)] + source[b + U(q)] + source[c + U(q)]
    for k in range(1, taps if taps > 3 else 1):
        a = U(shifts[k])
        for q in range(n):
            sums[to + U(q)] += source[a + U(q)]


@inline
def _larger(v, best):
    """True where v takes the place of `best`: it is larger, or the first NaN."""
    return (not v <= best) & (best == best)


@inline
def _max(v, best):
    """The larger one; NaN where one is."""
    larger = v if v > best else best
    return v if v != v else larger


@inline
def _maximize(source, shifts, taps, n, best, at):
    """best[at + q] = the largest source[q + shift] of the taps: four, then three at a time, of the last ones some again."""
    last, to = taps - 1, U(at)
    a, b, c, d = U(shifts[0]), U(shifts[min(1, last)]), U(shifts[min(2, last)]), U(shifts[min(3, last)])
    if taps == 1:
        for q in range(n):
            best[to + U(q)] = source[a + U(q)]
    elif taps == 2:
        for q in range(n):
            best[to + U(q)] = _max(source[b + U(q)], source[a + U(q)])
    elif taps == 3:
        for q in range(n):
            best[to + U(q)] = _max(source[c + U(q)], _max(source[b + U(q)], source[a + U(q)]))
    else:
        for q in range(n):
            v = _max(source[b + U(q)], source[a + U(q)])
            best[to + U(q)] = _max(source[d + U(q)], _max(source[c + U(q)], v))
    for k in range(4, taps, 3):
        a, b, c = U(shifts[k]), U(shifts[min(k + 1, last)]), U(shifts[min(k + 2, last)])
        for q in range(n):
            v = _max(source[a + U(q)], best[to + U(q)])
            best[to + U(q)] = _max(source[c + U(q)], _max(source[b + U(q)], v))


@inline
def _find_in_lines(source, shifts, places, taps, n, best, found, at):
    """As _maximize; found[at + q] = the place of the first tap with the largest. A tap that counts again changes nothing."""
    last, to = taps - 1, U(at)
    a, b, c = U(shifts[0]), U(shifts[min(1, last)]), U(shifts[min(2, last)])
    place_a, place_b, place_c = places[0], places[min(1, last)], places[min(2, last)]
    for q in range(n):
        u, v, w = source[a + U(q)], source[b + U(q)], source[c + U(q)]
        take = _larger(v, u)
        u, place = v if take else u, place_b if take else place_a
        take = _larger(w, u)
        best[to + U(q)], found[to + U(q)] = w if take else u, place_c if take else place
    for k in range(3, taps):
        a, place = U(shifts[k]), places[k]
        for q in range(n):
            u, v = best[to + U(q)], source[a + U(q)]
            take = _larger(v, u)
            best[to + U(q)] = v if take else u
            found[to + U(q)] = place if take else found[to + U(q)]


# ------------------------------------------------------------------------------------------------------------- maxima


@inline
def _smaller(place, v, best, smallest):
    """The place of v where it is as large as the best, or a NaN, and comes first."""
    return place if ((v == best) | (v != v)) & (place < smallest) else smallest


@inline
def _find_first(lines, line_places, shifts, taps, unit, n, best, places):
    """places[q] = the smallest place of the taps that are as large as best[q], those of a NaN where it is one."""
    last = taps - 1
    a, b, c = U(shifts[0]), U(shifts[min(1, last)]), U(shifts[min(2, last)])
    step_b, step_c = np.int32(unit * min(1, last)), np.int32(unit * min(2, last))
    for q in range(n):
        largest = best[q]
        place = _smaller(line_places[a + U(q)], lines[a + U(q)], largest, np.int32(2**31 - 1))
        place = _smaller(np.int32(line_places[b + U(q)] + step_b), lines[b + U(q)], largest, place)
        places[q] = _smaller(np.int32(line_places[c + U(q)] + step_c), lines[c + U(q)], largest, place)
    for k in range(3, taps):
        a, step = U(shifts[k]), np.int32(unit * k)
        for q in range(n):
            places[q] = _smaller(np.int32(line_places[a + U(q)] + step), lines[a + U(q)], best[q], places[q])


@inline
def _write_places(places, pitch, firsts, step, to, at, to_pitch, rows, columns):
    """to[at + r * to_pitch + q] = places[r * pitch + q], counted from firsts[r] + q * step."""
    for r in range(rows):
        a, b, first = U(r * pitch), U(at + r * to_pitch), firsts[r]
        for q in range(columns):
            to[b + U(q)] = first + q * step + places[a + U(q)]


@inline
def _max_windows(begin, end, x, y, indices, offsets, counts_taps, kernel, stride, pad, dilation):
    """The maxima of rows of outputs, and their places: offsets if those are what counts, else indices, unless they are empty."""
    (D, H, W), (OD, OH, OW) = _sizes(x, y, kernel, stride)
    row_step = W if H == x.shape[2] else 0  # from row to row in the count of indices
    x1, y1, indices1, offsets1 = x.reshape(x.size), y.reshape(y.size), indices.reshape(indices.size), offsets.reshape(offsets.size)
    with_places, columns = counts_taps or indices.size > 0, max(min(COLUMNS // stride[2], OW), 1)
    unit = (kernel[1] * kernel[2], kernel[2], 1) if counts_taps else (dilation[0] * H * W, dilation[1] * W, dilation[2])
    outside = np.int32(2**31 - 1 - unit[2] * kernel[2])  # larger than any place inside, with any tap added
    most_rows = _band_rows(OH, W * stride[1])
    taps_d, taps_h = _room(1, D, kernel[0], stride[0], dilation[0])[0], _room(1, H, kernel[1], stride[1], dilation[1])[0]
    taps_w, pitch_w, phases_w = _room(columns, W, kernel[2], stride[2], dilation[2])
    line_shifts, line_numbers, by_tap = (
        np.empty(taps_d * taps_h, np.int64),
        np.empty(taps_d * taps_h, np.int32),
        np.empty(taps_w, np.int64),
    )
    most = most_rows * pitch_w + AHEAD
    lines, apart = np.empty((most + pitch_w + AHEAD) * stride[2], x.dtype), np.empty(phases_w * most + pitch_w + AHEAD, x.dtype)
    line_places = np.empty(len(lines) if with_places else 0, np.int32)
    apart_places = np.empty(len(apart) if with_places else 0, np.int32)
    best, places, firsts = np.empty(most, x.dtype), np.empty(most if with_places else 0, np.int32), np.empty(most_rows, np.int64)
    row = begin
    while row < end:
        m, od, top = row // OH // OD, row // OH % OD, row % OH
        rows = min(most_rows, OH - top, end - row)
        kd, nd, d0 = pool_taps(od, D, kernel[0], stride[0], pad[0], dilation[0])
        for left in range(0, OW, columns):
            width = min(columns, OW - left)
            across = _cut(left, width, W, kernel[2], stride[2], pad[2], dilation[2])
            pitch, length = across[3], across[3] * stride[2]
            lo, hi = inside(across[2], 1, W, length)
            for r in range(rows):
                kh, nh, h0 = pool_taps(top + r, H, kernel[1], stride[1], pad[1], dilation[1])
                first, at = ((m * D + d0) * H + h0) * W + across[2] + lo, r * length
                taps = _find_lines(first, nd, dilation[0] * H * W, nh, dilation[1] * W, line_shifts)
                n = _ahead(hi - lo, line_shifts[taps - 1], len(x1))
                _fetch_lines(x1, line_shifts, max(taps - stride[1], 0), taps, hi - lo)
                fill_ahead(lines, at, lo, real(-np.inf))
                if with_places:
                    _find_lines(0, nd, unit[0], nh, unit[1], line_numbers)
                    fill_ahead(line_places, at, lo, outside)
                    _find_in_lines(x1, line_shifts, line_numbers, taps, n, lines, line_places, at + lo)
                    fill_ahead(line_places, at + hi, length - hi, outside)
                else:
                    _maximize(x1, line_shifts, taps, n, lines, at + lo)
                fill_ahead(lines, at + hi, length - hi, real(-np.inf))
                if counts_taps:
                    firsts[r] = (kd * kernel[1] + kh) * kernel[2] + across[0]
                else:
                    firsts[r] = d0 * H * W + h0 * row_step + across[2]
            n, at = _rounds(rows * pitch), row * OW + left
            _shifts(across, n, stride[2], dilation[2], by_tap)
            if stride[2] > 1:  # calls of their own: a name for either would be counted in every band
                _split(lines, n, stride[2], across[4], apart)
                _maximize(apart, by_tap, across[1], n, best, 0)
            else:
                _maximize(lines, by_tap, across[1], n, best, 0)
            copy_block(best, 0, pitch, 1, y1, at, OW, rows, width)
            if with_places:
                if stride[2] > 1:
                    _split(line_places, n, stride[2], across[4], apart_places)
                    _find_first(apart, apart_places, by_tap, across[1], unit[2], n, best, places)
                else:
                    _find_first(lines, line_places, by_tap, across[1], unit[2], n, best, places)
                if counts_taps:
                    _write_places(places, pitch, firsts, 0, offsets1, at, OW, rows, width)
                else:
                    _write_places(places, pitch, firsts, stride[2], indices1, at, OW, rows, width)
        row += rows


@inline
def _side_by_side(x, y, kernel, stride, pad, dilation):
    """Windows of 2 x 2 that lie side by side, all inside."""
    squares = kernel == (1, 2, 2) and stride == (1, 2, 2) and pad == (0, 0, 0) and dilation[1] == 1 and dilation[2] == 1
    return squares and 2 * y.shape[2] <= x.shape[2] and 2 * y.shape[3] <= x.shape[3]


@inline
def _max_squares(upper, lower, n, y, offsets):
    """A row of such windows from their two lines."""
    n = min(n, 2**60)  # 2 * q cannot wrap around then, or no vectors would be made
    for q in range(n):
        a, b, c, d = upper[2 * q], upper[2 * q + 1], lower[2 * q], lower[2 * q + 1]
        take = _larger(b, a)
        best, tap = b if take else a, np.uint8(1) if take else np.uint8(0)
        take = _larger(c, best)
        best, tap = c if take else best, np.uint8(2) if take else tap
        take = _larger(d, best)
        y[q], offsets[q] = d if take else best, np.uint8(3) if take else tap


# Parallel over rows of outputs, a band of them at a time. A window of K taps costs about 2 sqrt(K) comparisons, by selection
# and not by branches, which random numbers would mispredict. Reads an input once a band (and kernel_d times); from cache then.
@cpu(over="M*OD*OH")
def max_pool(
    begin, end, x, y, indices, offsets, kernel_d, kernel_h, kernel_w, stride_d, stride_h, stride_w, pad_front, pad_top,
    pad_left, dilation_d, dilation_h, dilation_w,
):  # fmt: skip
    kernel, stride = (kernel_d, kernel_h, kernel_w), (stride_d, stride_h, stride_w)
    pad, dilation = (pad_front, pad_top, pad_left), (dilation_d, dilation_h, dilation_w)
    if offsets.size > 0 and indices.size == 0 and _side_by_side(x, y, kernel, stride, pad, dilation):
        OD, OH = y.shape[1:3]
        for row in range(begin, end):
            m, od, oh = row // OH // OD, row // OH % OD, row % OH
            _max_squares(x[m, od, 2 * oh], x[m, od, 2 * oh + 1], y.shape[3], y[m, od, oh], offsets[m, od, oh])
        return
    for counts_taps in (False, True):  # not two calls, which would be compiled apart
        if (offsets.size > 0) if counts_taps else (indices.size > 0 or offsets.size == 0):
            _max_windows(begin, end, x, y, indices, offsets, counts_taps, kernel, stride, pad, dilation)


@inline
def _place(tap, kernel_h, kernel_w, dilation_d, dilation_h, dilation_w, H, W):
    """Where the tap of that number stands in a plane, from tap 0."""
    kd, kh, kw = tap // (kernel_h * kernel_w), tap // kernel_w % kernel_h, tap % kernel_w
    return (kd * dilation_d * H + kh * dilation_h) * W + kw * dilation_w


@inline
def _spread_pairs(g, taps, first, n, line):
    """A line of gx of windows two columns wide that lie side by side; the taps of the line are number `first` and the next."""
    n = min(n, 2**60)  # 2 * q cannot wrap around then, or no vectors would be made
    for q in range(n):
        a, b = g[q] if taps[q] == first else real(0), g[q] if taps[q] == first + 1 else real(0)
        line[2 * q], line[2 * q + 1] = a, b


# Parallel over planes. A plane is cleared and then added to while it sits in cache; gy and offsets stream through. Windows of
# 2 x 2 side by side need neither.
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
    kernel, stride = (kernel_d, kernel_h, kernel_w), (stride_d, stride_h, stride_w)
    squares = _side_by_side(gx, gy, kernel, stride, (pad_front, pad_top, pad_left), (dilation_d, dilation_h, dilation_w))
    for m in range(begin, end):
        if squares:
            for od in range(OD):
                for oh in range(OH):
                    for kh in range(2):
                        line = gx[m, od, 2 * oh + kh]
                        _spread_pairs(gy[m, od, oh], offsets[m, od, oh], np.uint8(2 * kh), OW, line)
                        line[2 * OW :] = real(0)
                gx[m, od, 2 * OH :] = real(0)
            gx[m, OD:] = real(0)
            continue
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
    line, numbers, counts = np.empty(W, x.dtype), np.empty(W, np.int32), np.arange(len(shifts)).astype(np.int32)
    for row in range(begin * OD * OH, end * OD * OH):
        m, od, oh = row // OH // OD, row // OH % OD, row % OH
        lines = _share_lines(m, od, oh, D, H, W, OD, OH, shifts)
        if indices.size:
            _find_in_lines(x1, shifts, counts, lines, W, line, numbers, 0)
        else:
            _maximize(x1, shifts, lines, W, line, 0)
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
    most_rows = _band_rows(OH, W * stride[1])
    taps_d, taps_h = _room(1, D, kernel[0], stride[0], dilation[0])[0], _room(1, H, kernel[1], stride[1], dilation[1])[0]
    taps_w, pitch_w, phases_w = _room(columns, W, kernel[2], stride[2], dilation[2])
    by_line, by_tap, most = np.empty(taps_d * taps_h, np.int64), np.empty(taps_w, np.int64), most_rows * pitch_w + AHEAD
    lines, apart = np.empty((most + pitch_w + AHEAD) * stride[2], x.dtype), np.empty(phases_w * most + pitch_w + AHEAD, x.dtype)
    sums, row_factors = np.empty(most, x.dtype), np.empty(most_rows, x.dtype)
    high = min((most_rows - 1) * stride[1] + (taps_h - 1) * dilation[1] + 1, H) if norm != real(1) else 0
    powers = np.empty(taps_d * high * W + AHEAD, x.dtype)
    row = begin
    while row < end:
        m, od, top = row // OH // OD, row // OH % OD, row % OH
        rows = min(most_rows, OH - top, end - row)
        _, nd, d0 = pool_taps(od, D, kernel[0], stride[0], pad[0], dilation[0])
        start, step_d = (m * D + d0) * H * W, dilation[0] * H * W
        if norm != real(1):
            _, _, low = pool_taps(top, H, kernel[1], stride[1], pad[1], dilation[1])
            _, nh, h0 = pool_taps(top + rows - 1, H, kernel[1], stride[1], pad[1], dilation[1])
            n = (h0 + (nh - 1) * dilation[1] + 1 - low) * W
            copy_block(x1, start + low * W, step_d, 1, powers, 0, n, nd, n)
            _raise(powers, norm, nd * n)
            start, step_d = -low * W, n
        for r in range(rows):
            row_factors[r] = factors[0, od] * factors[1, (top + r) % y.shape[2]]  # sequences are rows of one plane
        for left in range(0, OW, columns):
            width = min(columns, OW - left)
            across = _cut(left, width, W, kernel[2], stride[2], pad[2], dilation[2])
            pitch, length = across[3], across[3] * stride[2]
            lo, hi = inside(across[2], 1, W, length)
            for r in range(rows):
                _, nh, h0 = pool_taps(top + r, H, kernel[1], stride[1], pad[1], dilation[1])
                taps = _find_lines(start + h0 * W + across[2] + lo, nd, step_d, nh, dilation[1] * W, by_line)
                fill_ahead(lines, r * length, lo, real(0))
                at = r * length + lo
                if norm != real(1):
                    _add(powers, by_line, taps, _ahead(hi - lo, by_line[taps - 1], len(powers)), lines, at)
                else:
                    _fetch_lines(x1, by_line, max(taps - stride[1], 0), taps, hi - lo)
                    _add(x1, by_line, taps, _ahead(hi - lo, by_line[taps - 1], len(x1)), lines, at)
                fill_ahead(lines, r * length + hi, length - hi, real(0))
            n = _rounds(rows * pitch)
            _shifts(across, n, stride[2], dilation[2], by_tap)
            if stride[2] > 1:  # calls of their own: a name for either would be counted in every band
                _split(lines, n, stride[2], across[4], apart)
                _add(apart, by_tap, across[1], n, sums, 0)
            else:
                _add(lines, by_tap, across[1], n, sums, 0)
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
def _takers(size, outputs, kernel, stride, pad, dilation):
    """Which outputs of an axis take each of its elements: (the first, how many, how far apart). A kernel of 0 stands for the
    windows of adaptive pooling."""
    takers = np.empty((size, 3), np.int64)
    apart = 1
    while kernel and apart * stride % dilation:
        apart += 1
    for i in range(size):
        if kernel:
            at = i + pad
            first = max(at - (kernel - 1) * dilation + stride - 1, 0) // stride
            last = min(at // stride, outputs - 1)
            while first <= last and (at - first * stride) % dilation:
                first += 1
        else:
            first, last = i * outputs // size, min(((i + 1) * outputs + size - 1) // size, outputs) - 1
        takers[i, 0], takers[i, 1], takers[i, 2] = first, max((last - first + apart) // apart, 0), apart
    return takers


@inline
def _taken_places(takers, outputs):
    """[most, size]: which outputs take each element, `outputs` where there are no more."""
    most = 1
    for i in range(len(takers)):
        most = max(most, takers[i, 1])
    places = np.empty((most, len(takers)), np.uint32)
    for i in range(len(takers)):
        for q in range(most):
            places[q, i] = takers[i, 0] + q * takers[i, 2] if q < takers[i, 1] else outputs
    return places


@inline
def _gather(sums, places, n, to, at):
    """to[at + i] = the sum over q of sums[places[q, i]]."""
    a, most = U(at), len(places)
    first, second = places[0], places[min(1, most - 1)]
    if most == 1:
        for i in range(n):
            to[a + U(i)] = sums[U(first[i])]
    else:
        for i in range(n):
            to[a + U(i)] = sums[U(first[i])] + sums[U(second[i])]
    for q in range(2, most):
        next = places[q]
        for i in range(n):
            to[a + U(i)] += sums[U(next[i])]


@inline
def _times_power(gx, x, at, taken, norm, n):
    """gx *= x ** (norm - 1), from `at` on; of what no window has taken, nothing counts, not even a NaN."""
    a = U(at)
    if norm == real(2):
        for i in range(n):
            gx[a + U(i)] = gx[a + U(i)] * x[a + U(i)] if taken[i] else real(0)
    elif norm != real(1):
        for i in range(n):
            if taken[i]:
                gx[a + U(i)] *= x[a + U(i)] ** (norm - real(1))


@inline
def _spread_windows(begin, end, gy, x, y, gx, factors, norm, kernel, stride, pad, dilation):
    """The gradient of _sum_windows for planes, line by line; x and y are not read for the norm 1."""
    D, H, W = gx.shape[1:]
    OD, OH, OW = gy.shape[1:]
    x1, y1, gy1, gx1 = x.reshape(x.size), y.reshape(y.size), gy.reshape(gy.size), gx.reshape(gx.size)
    deep = _takers(D, OD, kernel[0], stride[0], pad[0], dilation[0])
    high = _takers(H, OH, kernel[1], stride[1], pad[1], dilation[1])
    wide = _takers(W, OW, kernel[2], stride[2], pad[2], dilation[2])
    places = _taken_places(wide, OW)
    # The sums of a line with zeros around: with a stride of 1 the taps along W are shifts of it, else they are picked.
    shifts = np.arange(kernel[2] if stride[2] == 1 else 0) * dilation[2]
    before = max((len(shifts) - 1) * dilation[2] - pad[2], 0)
    padded = np.zeros(before + OW + max(W + pad[2] - OW, 0) + 1, gx.dtype)
    sums, passed = padded[before:], np.empty(OW, gx.dtype)
    shifts += before + pad[2] - (len(shifts) - 1) * dilation[2]
    starts = np.empty(max(deep[:, 1].max() * high[:, 1].max(), 1), np.int64)
    divisors = np.empty(len(starts), gx.dtype)
    for line in range(begin * D * H, end * D * H):
        m, d, h = line // H // D, line // H % D, line % H
        at, rows, alike = line * W, deep[d, 1] * high[h, 1], norm == real(1)
        if rows == 0:
            for i in range(W):
                gx1[U(at) + U(i)] = real(0)
            continue
        if alike and h > 0 and high[h, 0] == high[h - 1, 0] and high[h, 1] == high[h - 1, 1]:
            copy_block(gx1, at - W, 0, 1, gx1, at, 0, 1, W)  # the same outputs take both
            continue
        for r in range(rows):
            od, oh = deep[d, 0] + r // high[h, 1] * deep[d, 2], high[h, 0] + r % high[h, 1] * high[h, 2]
            starts[r], divisors[r] = ((m * OD + od) * OH + oh) * OW, factors[0, od] * factors[1, oh]
            alike &= divisors[r] == divisors[0]
        if alike:
            _add(gy1, starts, rows, OW, passed, 0)
            _pass_back(passed, y1, 0, divisors[0], factors[2], norm, OW, sums)
        for r in range(0 if alike else rows):
            _pass_back(gy1, y1, starts[r], divisors[r], factors[2], norm, OW, passed if r else sums)
            for o in range(OW if r else 0):
                sums[o] += passed[o]
        if len(shifts):
            _add(padded, shifts, len(shifts), W, gx1, at)
        else:
            _gather(sums, places, W, gx1, at)
        _times_power(gx1, x1, at, wide[:, 1], norm, W)


# Parallel over planes. Every line is made once, from the sums of the rows of outputs whose windows take it.
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
        _add(x1, shifts, lines, W, line, 0)
        for ow in range(OW):
            w0, w1 = pool_share(ow, W, OW)
            total = real(0)
            for w in range(w0, w1):
                total += line[w]
            y[m, od, oh, ow] = total / real(lines * (w1 - w0))


# Parallel over planes, as avg_pool_backward.
@cpu(over="M")
def adaptive_avg_pool_backward(begin, end, gy, gx):
    sizes, windows, none, one = gx.shape[1:], gy.shape[1:], (0, 0, 0), (1, 1, 1)
    factors = np.empty((3, max(windows[0], windows[1], windows[2])), gx.dtype)
    for a in range(3):
        for o in range(windows[a]):
            first, last = pool_share(o, sizes[a], windows[a])
            factors[a, o] = real(last - first)
    _spread_windows(begin, end, gy, gy, gy, gx, factors, real(1), none, one, none, one)


# Parallel over planes. Every line is made once, from the sums of the rows of outputs whose windows take it.
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
