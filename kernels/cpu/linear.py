"""Matrix products of dense layers, and dropout.

Every product goes tile by tile of TILE columns: a piece of the right factor is packed into a panel, which stays in the second
cache while rows of the left factor pass by. Where there are few rows, packing would cost more than the product; if the
right factor then lies along the sum, each element is a dot product.
"""

import numpy as np

from ..compile import cpu, inline, real
from ..scalars import activate, random24
from .llvm import add_product
from .panels import DEPTH, TILE, U, aligned

ROWS = 32  # of the left factor, in one unit of work
FEW = 16  # rows for which a panel does not pay: it costs as much as some 16 rows of the product


@inline
def pack(b, at, row, column, depth, columns, panel):
    """panel[k, n] = b[at + k * row + n * column]."""
    if column == 1:
        for k in range(depth):
            to, start = U(k * TILE), U(at + k * row)
            for n in range(columns):
                panel[to + U(n)] = b[start + U(n)]
    else:  # eight columns at a time: of a whole row every element may fall into the same few cache lines
        for n0 in range(0, columns, 8):
            for k in range(depth):
                for n in range(n0, min(n0 + 8, columns)):
                    panel[U(k * TILE + n)] = b[U(at + k * row + n * column)]


@inline
def dots(a, at, row, b, b_at, step, K, rows, columns, bias, n, y, y_at, pitch, activation):
    """y[i, j] = bias[n + j] + the sum over k of a[at + i * row + k] b[b_at + j * step + k], four rows (or one) at once."""
    for i in range(0, rows, 4):
        r0, some = U(at + i * row), min(4, rows - i)
        r1, r2, r3 = r0 + U(min(1, some - 1) * row), r0 + U(min(2, some - 1) * row), r0 + U((some - 1) * row)
        for j in range(columns):
            line, t0, t1, t2, t3 = U(b_at + j * step), real(0), real(0), real(0), real(0)
            if some == 1:
                for k in range(K):
                    t0 += a[r0 + U(k)] * b[line + U(k)]
            else:
                for k in range(K):
                    v = b[line + U(k)]
                    t0 += a[r0 + U(k)] * v
                    t1 += a[r1 + U(k)] * v
                    t2 += a[r2 + U(k)] * v
                    t3 += a[r3 + U(k)] * v
            start = bias[n + j] if bias.size > 0 else real(0)
            for r in range(some):
                total = start + (t0 if r == 0 else t1 if r == 1 and some > 2 else t2 if r == 2 and some > 3 else t3)
                y[y_at + (i + r) * pitch + j] = activate(total, activation)


@inline
def products(begin, end, a, a_strides, b, b_strides, bias, y, M, N, K, activation):
    """y[batch, m, n] = the sum over k of a b, + bias[n], then the activation, for units of ROWS rows x TILE columns. a, b and y are
    flat; the strides are those of a batch, of m or k, of k or n."""
    blocks, tiles = (M + ROWS - 1) // ROWS, (N + TILE - 1) // TILE
    few = M <= FEW and b_strides[1] == 1 and a_strides[2] == 1
    panel = aligned(min(DEPTH, K) * TILE, y)
    unit = begin
    while unit < end:
        batch, n, block = unit // blocks // tiles, unit // blocks % tiles * TILE, unit % blocks
        units = min(blocks - block, end - unit)  # of this tile
        first, last, columns = block * ROWS, min((block + units) * ROWS, M), min(TILE, N - n)
        unit += units
        a_at, b_at, y_at = batch * a_strides[0], batch * b_strides[0] + n * b_strides[2], batch * M * N + n
        if few:
            dots(a, a_at, a_strides[1], b, b_at, b_strides[2], K, M, columns, bias, n, y, y_at, N, activation)
            continue
        for m in range(first, last):
            to = y[y_at + m * N : y_at + m * N + columns]
            for i in range(columns):
                to[i] = bias[n + i] if bias.size > 0 else real(0)
        for k in range(0, K, DEPTH):
            depth, at = min(DEPTH, K - k), a_at + first * a_strides[1] + k * a_strides[2]
            pack(b, b_at + k * b_strides[1], b_strides[1], b_strides[2], depth, columns, panel)
            add_product(
                a, at, a_strides[1], a_strides[2], panel, 0, TILE, y, y_at + first * N, N, last - first, columns, depth
            )  # fmt: skip
        for m in range(first, last if activation else first):
            to = y[y_at + m * N : y_at + m * N + columns]
            for i in range(columns):
                to[i] = activate(to[i], activation)


# Parallel over tiles of columns x blocks of rows. Reads w once per range of rows (packed), x once per tile.
# Source: Goto and van de Geijn, Anatomy of high-performance matrix multiplication (2008).
@cpu(over="((M+31)//32)*((N+127)//128)")
def linear(begin, end, x, w, b, y, activation):
    M, K, N = x.shape[0], x.shape[1], w.shape[0]
    products(begin, end, x.reshape(x.size), (0, K, 1), w.reshape(w.size), (0, 1, K), b, y.reshape(y.size), M, N, K, activation)


# As linear; gy is read down its columns.
@cpu(over="((N+31)//32)*((K+127)//128)")
def linear_grad_weight(begin, end, gy, x, gw):
    M, N, K = gy.shape[0], gy.shape[1], x.shape[1]
    none = np.empty(0, gy.dtype)
    products(begin, end, gy.reshape(gy.size), (0, 1, N), x.reshape(x.size), (0, K, 1), none, gw.reshape(gw.size), N, K, M, 0)


# As linear.
@cpu(over="((M+31)//32)*((K+127)//128)")
def linear_grad_input(begin, end, gy, w, gx):
    M, N, K = gy.shape[0], gy.shape[1], w.shape[1]
    none = np.empty(0, gy.dtype)
    products(begin, end, gy.reshape(gy.size), (0, N, 1), w.reshape(w.size), (0, K, 1), none, gx.reshape(gx.size), M, K, N, 0)


@inline
def add_rows(x, at, pitch, rows, n, sums):
    """sums[i] += x[at + m * pitch + i], four rows in each sweep."""
    for m in range(0, rows - 3, 4):
        a, b, c, d = U(at + m * pitch), U(at + (m + 1) * pitch), U(at + (m + 2) * pitch), U(at + (m + 3) * pitch)
        for i in range(n):
            sums[i] += (x[a + U(i)] + x[b + U(i)]) + (x[c + U(i)] + x[d + U(i)])
    for m in range(rows // 4 * 4, rows):
        a = U(at + m * pitch)
        for i in range(n):
            sums[i] += x[a + U(i)]


# Parallel over blocks of 256 columns, whose sums stay in the nearest cache. Reads gy once.
@cpu(over="(N+255)//256")
def linear_grad_bias(begin, end, gy, gb):
    M, N = gy.shape
    gy1 = gy.reshape(gy.size)
    for block in range(begin, end):
        first, n = block * 256, min(256, N - block * 256)
        gb[first : first + n] = real(0)
        add_rows(gy1, first, N, M, n, gb[first : first + n])


# As linear, for every batch.
@cpu(over="B*((M+31)//32)*((N+127)//128)")
def matmul(begin, end, a, b, y):
    M, K, N = a.shape[1], a.shape[2], b.shape[2]
    none = np.empty(0, a.dtype)
    products(begin, end, a.reshape(a.size), (M * K, K, 1), b.reshape(b.size), (K * N, N, 1), none, y.reshape(y.size), M, N, K, 0)


# As matmul; b is read across.
@cpu(over="B*((M+31)//32)*((K+127)//128)")
def matmul_grad_a(begin, end, gy, b, ga):
    M, N, K = gy.shape[1], gy.shape[2], b.shape[1]
    none = np.empty(0, gy.dtype)
    products(
        begin, end, gy.reshape(gy.size), (M * N, N, 1), b.reshape(b.size), (K * N, 1, N), none, ga.reshape(ga.size), M, K, N, 0
    )


# As matmul; a is read down its columns.
@cpu(over="B*((K+31)//32)*((N+127)//128)")
def matmul_grad_b(begin, end, a, gy, gb):
    M, K, N = a.shape[1], a.shape[2], gy.shape[2]
    none = np.empty(0, gy.dtype)
    products(
        begin, end, a.reshape(a.size), (M * K, 1, K), gy.reshape(gy.size), (M * N, N, 1), none, gb.reshape(gb.size), K, N, M, 0
    )


# Parallel over elements. Reads x once, writes y once; some 20 integer operations an element.
@cpu(over="N")
def dropout(begin, end, x, y, drop, scale, seed):
    for i in range(begin, end):
        kept = x[i] * scale
        y[i] = kept if random24(i, seed) >= drop else real(0)
