"""What the kernels move: rows of flat arrays, and panels, packed pieces of a matrix of a constant width.

Inner loops stand in functions of their own, to which arrays come as arguments: a slice of those costs next to nothing.
"""

import numpy as np

from ..compile import inline

U = np.uint64  # for indices that need no test for being negative

TILE = 128  # columns of a panel: a constant, so that the compiler sees how far rows are apart
DEPTH = 1024  # rows of a panel: 512 KiB in float32, half of a second-level cache
LINE = 64  # bytes of a cache line


@inline
def aligned(n, like):
    """n elements of the type of `like`, from a whole cache line on: vectors do not lie across two."""
    room = np.empty(n + LINE // like.itemsize, like.dtype)
    first = -room.ctypes.data % LINE // like.itemsize
    return room[first : first + n]


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
