"""Products with panels: packed pieces of a matrix, of a constant width, whose rows lie one after the other."""

from ..compile import inline, real

TILE = 128  # columns of a panel: a constant, so that the compiler sees how far rows are apart
NARROW = 64  # of a panel with fewer
DEPTH = 1024  # rows of a panel: 512 KiB in float32, half of a second-level cache


def _product(width):
    """The product of four rows with a panel whose rows are `width` long: a constant, so that sweeps need no tail."""

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
            p = panel[k * width : (k + 4) * width]
            for t in range(width):
                p0, p1, p2, p3 = p[t], p[t + width], p[t + 2 * width], p[t + 3 * width]
                sums[t] += a0 * p0 + a1 * p1 + a2 * p2 + a3 * p3
                sums[t + width] += b0 * p0 + b1 * p1 + b2 * p2 + b3 * p3
                sums[t + 2 * width] += c0 * p0 + c1 * p1 + c2 * p2 + c3 * p3
                sums[t + 3 * width] += d0 * p0 + d1 * p1 + d2 * p2 + d3 * p3

    return multiply


multiply = _product(TILE)
multiply_narrow = _product(NARROW)


@inline
def fours(n):
    """n, or the next multiple of four: what is missing of a product's depth are zeros."""
    return (n + 3) // 4 * 4


@inline
def end_with_zeros(panel, depth, width):
    for i in range(depth * width, fours(depth) * width):
        panel[i] = real(0)
