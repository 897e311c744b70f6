"""What the kernels move and multiply: rows of flat arrays, and panels, packed pieces of a matrix of a constant width.

Inner loops stand in functions of their own, to which arrays come as arguments: a slice of those costs next to nothing.
"""

import numpy as np

from ..compile import inline, real

U = np.uint64  # for indices that need no test for being negative

TILE = 128  # columns of a panel: a constant, so that the compiler sees how far rows are apart
NARROW = 64  # of a panel with fewer
DEPTH = 1024  # rows of a panel: 512 KiB in float32, half of a second-level cache


def _product(width, pitch):
    """The product of four rows with the first `width` columns of a panel whose rows (and those of the sums) are `pitch` long:
    constants, so that sweeps need no tail."""

    @inline
    def multiply(row0, row1, row2, row3, depth, panel, sums):
        """sums[i, t] += the sum over k of row_i[k] panel[k, t], for k < depth, a multiple of four.

        Four rows by four k in each sweep: sixteen multiply-adds for eight loads and four stores.
        """
        for k in range(0, depth, 4):
            a, b, c, d = row0[k : k + 4], row1[k : k + 4], row2[k : k + 4], row3[k : k + 4]
            a0, a1, a2, a3 = a[0], a[1], a[2], a[3]
            b0, b1, b2, b3 = b[0], b[1], b[2], b[3]
            c0, c1, c2, c3 = c[0], c[1], c[2], c[3]
            d0, d1, d2, d3 = d[0], d[1], d[2], d[3]
            p = panel[k * pitch : (k + 4) * pitch]
            for t in range(width):
                p0, p1, p2, p3 = p[t], p[t + pitch], p[t + 2 * pitch], p[t + 3 * pitch]
                sums[t] += a0 * p0 + a1 * p1 + a2 * p2 + a3 * p3
                sums[t + pitch] += b0 * p0 + b1 * p1 + b2 * p2 + b3 * p3
                sums[t + 2 * pitch] += c0 * p0 + c1 * p1 + c2 * p2 + c3 * p3
                sums[t + 3 * pitch] += d0 * p0 + d1 * p1 + d2 * p2 + d3 * p3

    return multiply


multiply = _product(TILE, TILE)
multiply_narrow = _product(NARROW, NARROW)
multiply_half = _product(NARROW // 2, NARROW)


@inline
def fours(n):
    """n, or the next multiple of four: what is missing of a product's depth are zeros."""
    return (n + 3) // 4 * 4


@inline
def end_with_zeros(panel, depth, width):
    for i in range(depth * width, fours(depth) * width):
        panel[i] = real(0)


# --------------------------------------------------------------------------------------------------------------- rows

AHEAD = 32  # a row that is moved in whole rounds of vectors ends less than so many elements after its own end


@inline
def fill_ahead(to, at, n, value):
    """to[at + q] = value for q < n, and for what is left of the last AHEAD elements."""
    a = U(at)
    for q in range((n + AHEAD - 1) // AHEAD * AHEAD):
        to[a + U(q)] = value


@inline
def copy_ahead(source, at, to, to_at, n):
    """to[to_at + q] = source[at + q] for q < n, and for what is left of the last AHEAD elements: a short row has no tail."""
    a, b = U(at), U(to_at)
    for q in range((n + AHEAD - 1) // AHEAD * AHEAD):
        to[b + U(q)] = source[a + U(q)]


@inline
def fill_block(to, at, pitch, rows, columns, value):
    """to[at + r * pitch + q] = value."""
    for r in range(rows if columns > 0 else 0):
        for q in range(columns):
            to[U(at + r * pitch) + U(q)] = value


@inline
def copy_row(source, at, to, to_at, n):
    """to[to_at + q] = source[at + q]."""
    a, b = U(at), U(to_at)
    for q in range(n):
        to[b + U(q)] = source[a + U(q)]


@inline
def copy_block(source, at, step, stride, to, to_at, pitch, rows, columns):
    """to[to_at + r * pitch + q] = source[at + r * step + q * stride]."""
    n = min(columns, 2**60)  # 2 * q cannot wrap around then, or no vectors would be made
    for r in range(rows):
        a, b = source[at + r * step :], to[to_at + r * pitch : to_at + r * pitch + n]
        if stride == 1:
            for q in range(n):
                b[q] = a[q]
        elif stride == 2:
            for q in range(n):
                b[q] = a[2 * q]
        else:
            for q in range(n):
                b[q] = a[U(q) * U(stride)]


@inline
def inside(at, stride, size, n):
    """[begin, end): the k < n with 0 <= at + k * stride < size."""
    begin = min(max((stride - 1 - at) // stride, 0), n)
    return begin, min(max((size + stride - 1 - at) // stride, begin), n)


@inline
def move_row(source, at, step, to, to_at, stride, n):
    """to[to_at + q * stride] = source[at + q * step]."""
    a, b = U(at), U(to_at)
    for q in range(n):
        to[b + U(q) * U(stride)] = source[a + U(q) * U(step)]


@inline
def add_row(source, at, step, to, to_at, stride, n):
    """to[to_at + q * stride] += source[at + q * step]."""
    a, b = U(at), U(to_at)
    if step == 1 and stride == 1:
        for q in range(n):
            to[b + U(q)] += source[a + U(q)]
    else:
        for q in range(n):
            to[b + U(q) * U(stride)] += source[a + U(q) * U(step)]
