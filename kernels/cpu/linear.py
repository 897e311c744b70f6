"""Matrix products of dense layers, and dropout."""

import numpy as np

from ..compile import cpu, inline, real
from ..scalars import random24

ROWS, DEPTH = 32, 128  # a task is ROWS rows of the result; a piece of DEPTH rows of the right factor is used ROWS times


# c[m] += sum over k < depth of a[m, k0 + k] b[b0 + k] for m0 <= m < m1. Two rows of c and four of b in the inner loop: six
# reads and two writes for eight multiply-adds, all along n.
@inline
def product(a, b, c, m0, m1, k0, b0, depth):
    N = c.shape[1]
    for m in range(m0, m1 - 1, 2):
        for k in range(0, depth - 3, 4):
            j, i = b0 + k, k0 + k
            p0, p1, p2, p3 = a[m, i], a[m, i + 1], a[m, i + 2], a[m, i + 3]
            q0, q1, q2, q3 = a[m + 1, i], a[m + 1, i + 1], a[m + 1, i + 2], a[m + 1, i + 3]
            for n in range(N):
                b0n, b1n, b2n, b3n = b[j, n], b[j + 1, n], b[j + 2, n], b[j + 3, n]
                c[m, n] += p0 * b0n + p1 * b1n + p2 * b2n + p3 * b3n
                c[m + 1, n] += q0 * b0n + q1 * b1n + q2 * b2n + q3 * b3n
        for k in range(depth // 4 * 4, depth):
            p, q = a[m, k0 + k], a[m + 1, k0 + k]
            for n in range(N):
                c[m, n] += p * b[b0 + k, n]
                c[m + 1, n] += q * b[b0 + k, n]
    for m in range(m0 + (m1 - m0) // 2 * 2, m1):
        for k in range(depth):
            p = a[m, k0 + k]
            for n in range(N):
                c[m, n] += p * b[b0 + k, n]


# piece[k, n] = b[n, k0 + k]: a piece of the transposed b, eight columns at a time: in one column of a piece whose width is a
# power of two every element falls into the same few cache lines.
@inline
def transpose(b, k0, depth, piece):
    N = b.shape[0]
    for n0 in range(0, N, 8):
        for k in range(depth):
            for n in range(n0, min(n0 + 8, N)):
                piece[k, n] = b[n, k0 + k]


# Parallel over blocks of rows of x. w is transposed piece by piece, so that n lies side by side. Reads w once per ROWS rows.
@cpu(over="(M+31)//32")
def linear(begin, end, x, w, b, y):
    M, K, N = x.shape[0], x.shape[1], w.shape[0]
    piece = np.empty((min(DEPTH, K), N), x.dtype)
    for block in range(begin, end):
        first, last = block * ROWS, min(block * ROWS + ROWS, M)
        for m in range(first, last):
            for n in range(N):
                y[m, n] = b[n] if b.size > 0 else real(0)
        for k0 in range(0, K, DEPTH):
            depth = min(DEPTH, K - k0)
            transpose(w, k0, depth, piece)
            product(x, piece, y, first, last, k0, 0, depth)


# Parallel over blocks of rows of gw. Reads x once per ROWS rows of gw; gy down its columns.
@cpu(over="(N+31)//32")
def linear_grad_weight(begin, end, gy, x, gw):
    M, N, columns = gy.shape[0], gy.shape[1], gy.T
    for block in range(begin, end):
        first, last = block * ROWS, min(block * ROWS + ROWS, N)
        gw[first:last] = real(0)
        for k0 in range(0, M, DEPTH):
            product(columns, x, gw, first, last, k0, k0, min(DEPTH, M - k0))


# Parallel over blocks of rows of gx. Reads w once per ROWS rows.
@cpu(over="(M+31)//32")
def linear_grad_input(begin, end, gy, w, gx):
    M, N = gy.shape
    for block in range(begin, end):
        first, last = block * ROWS, min(block * ROWS + ROWS, M)
        gx[first:last] = real(0)
        for k0 in range(0, N, DEPTH):
            product(gy, w, gx, first, last, k0, k0, min(DEPTH, N - k0))


# Parallel over blocks of 256 columns, which stay in the nearest cache. Reads gy once.
@cpu(over="(N+255)//256")
def linear_grad_bias(begin, end, gy, gb):
    M, N = gy.shape
    for block in range(begin, end):
        first, last = block * 256, min(block * 256 + 256, N)
        gb[first:last] = real(0)
        for m in range(M):
            for n in range(first, last):
                gb[n] += gy[m, n]


# Parallel over blocks of rows of all batches. Reads b once per ROWS rows.
@cpu(over="B*((M+31)//32)")
def matmul(begin, end, a, b, y):
    M, K = a.shape[1], a.shape[2]
    blocks = (M + ROWS - 1) // ROWS
    for task in range(begin, end):
        batch, first = task // blocks, task % blocks * ROWS
        last = min(first + ROWS, M)
        y[batch, first:last] = real(0)
        for k0 in range(0, K, DEPTH):
            product(a[batch], b[batch], y[batch], first, last, k0, k0, min(DEPTH, K - k0))


# As matmul; b is transposed piece by piece.
@cpu(over="B*((M+31)//32)")
def matmul_grad_a(begin, end, gy, b, ga):
    M, N, K = gy.shape[1], gy.shape[2], b.shape[1]
    blocks = (M + ROWS - 1) // ROWS
    piece = np.empty((min(DEPTH, N), K), gy.dtype)
    for task in range(begin, end):
        batch, first = task // blocks, task % blocks * ROWS
        last = min(first + ROWS, M)
        ga[batch, first:last] = real(0)
        for n0 in range(0, N, DEPTH):
            depth = min(DEPTH, N - n0)
            transpose(b[batch], n0, depth, piece)
            product(gy[batch], piece, ga[batch], first, last, n0, 0, depth)


# As matmul, over rows of gb; a is read down its columns.
@cpu(over="B*((K+31)//32)")
def matmul_grad_b(begin, end, a, gy, gb):
    M, K = a.shape[1], a.shape[2]
    blocks = (K + ROWS - 1) // ROWS
    for task in range(begin, end):
        batch, first = task // blocks, task % blocks * ROWS
        last = min(first + ROWS, K)
        gb[batch, first:last] = real(0)
        for m0 in range(0, M, DEPTH):
            product(a[batch].T, gy[batch], gb[batch], first, last, m0, m0, min(DEPTH, M - m0))


# Parallel over elements. Reads x once, writes y once; some 20 integer operations an element.
@cpu(over="N")
def dropout(begin, end, x, y, drop, scale, seed):
    for i in range(begin, end):
        kept = x[i] * scale
        y[i] = kept if random24(i, seed) >= drop else real(0)
