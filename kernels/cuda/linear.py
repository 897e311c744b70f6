"""Matrix products of dense layers, and dropout."""

from ..compile import block, blocks, cuda, gpu, inline, real
from ..scalars import activate, random24

THREADS = block(256)
SIDE = 16 if THREADS == 256 else 2  # a block is SIDE x SIDE threads; each makes a 4 x 4 piece of a (4 SIDE)^2 tile
TILE = 4 * SIDE
PADDED = (SIDE, TILE + 1)  # the padding keeps threads that write one column on different banks


# tile[k][r] = x[r0 + r, k0 + k], 0 beyond the matrix; neighbouring threads read along whichever axis lies side by side.
@inline
def fetch(x, start, rows, depth, row, col, r0, k0, tile):
    t = cuda.threadIdx.y * SIDE + cuda.threadIdx.x
    for i in range(t, TILE * SIDE, SIDE * SIDE):
        r, k = (i // SIDE, i % SIDE) if col == 1 else (i % TILE, i // TILE)
        inside = r0 + r < rows and k0 + k < depth
        tile[k, r] = x[start + (r0 + r) * row + (k0 + k) * col] if inside else real(0)


# y[batch, M, N] = a b + bias[N] with any strides of a and b, given as flat arrays. Parallel over tiles of y, a block each; a
# and b go through shared memory, so each element is read once per tile row or column. 16 products per 8 shared reads.
@gpu("real[:], i64, i64, i64, real[:], i64, i64, i64, real[:], real[:], i64, i64, i64, i64")
def _product(a, a_batch, a_row, a_col, b, b_batch, b_row, b_col, bias, y, M, N, K, activation):
    left = cuda.shared.array(PADDED, real)
    right = cuda.shared.array(PADDED, real)
    total = cuda.local.array((4, 4), real)
    tx, ty, batch = cuda.threadIdx.x, cuda.threadIdx.y, cuda.blockIdx.z
    across = (N + TILE - 1) // TILE
    m0, n0 = cuda.blockIdx.x // across * TILE, cuda.blockIdx.x % across * TILE
    for i in range(4):
        for j in range(4):
            total[i, j] = real(0)
    for k0 in range(0, K, SIDE):
        fetch(a, batch * a_batch, M, K, a_row, a_col, m0, k0, left)
        fetch(b, batch * b_batch, N, K, b_col, b_row, n0, k0, right)
        cuda.syncthreads()
        for k in range(SIDE):
            for i in range(4):
                v = left[k, ty + i * SIDE]
                for j in range(4):
                    total[i, j] += v * right[k, tx + j * SIDE]
        cuda.syncthreads()
    for i in range(4):
        for j in range(4):
            m, n = m0 + ty + i * SIDE, n0 + tx + j * SIDE
            if m < M and n < N:
                start = bias[n] if bias.size > 0 else real(0)
                y[(batch * M + m) * N + n] = activate(start + total[i, j], activation)


def _flat(x):
    return x.reshape(x.size)


def _multiply(B, M, N, K, a, a_strides, b, b_strides, bias, y, activation=0):
    """`y[B, M, N]`; the strides are those of a batch, of m or k, of k or n."""
    if B * M * N:
        for first in range(0, B, 65535):  # as many blocks as the z axis of a grid has
            some = min(B - first, 65535)
            part = [_flat(x[first : first + some]) if B > 65535 else _flat(x) for x in (a, b, y)]
            grid = blocks(M, TILE) * blocks(N, TILE), 1, some
            _product[grid, (SIDE, SIDE)](part[0], *a_strides, part[1], *b_strides, bias, part[2], M, N, K, activation)


def linear(x, w, b, y, activation):
    M, K, N = x.shape[0], x.shape[1], w.shape[0]
    _multiply(1, M, N, K, x, (0, K, 1), w, (0, 1, K), b, y, activation)


def _nothing(like):
    return cuda.device_array(0, like.dtype)


def linear_grad_weight(gy, x, gw):
    M, N, K = gy.shape[0], gy.shape[1], x.shape[1]
    _multiply(1, N, K, M, gy, (0, 1, N), x, (0, K, 1), _nothing(x), gw)


def linear_grad_input(gy, w, gx):
    M, N, K = gy.shape[0], gy.shape[1], w.shape[1]
    _multiply(1, M, K, N, gy, (0, N, 1), w, (0, K, 1), _nothing(w), gx)


def matmul(a, b, y):
    B, M, K, N = a.shape[0], a.shape[1], a.shape[2], b.shape[2]
    _multiply(B, M, N, K, a, (M * K, K, 1), b, (K * N, N, 1), _nothing(a), y)


def matmul_grad_a(gy, b, ga):
    B, M, N, K = gy.shape[0], gy.shape[1], gy.shape[2], b.shape[1]
    _multiply(B, M, K, N, gy, (M * N, N, 1), b, (K * N, 1, N), _nothing(b), ga)


def matmul_grad_b(a, gy, gb):
    B, M, K, N = a.shape[0], a.shape[1], a.shape[2], gy.shape[2]
    _multiply(B, K, N, M, a, (M * K, 1, K), gy, (M * N, N, 1), _nothing(a), gb)


# Parallel over columns, a thread each: neighbouring threads read neighbouring columns. Reads gy once.
@gpu("real[:,:], real[:]")
def _grad_bias(gy, gb):
    n = cuda.grid(1)
    if n < gy.shape[1]:
        total = real(0)
        for m in range(gy.shape[0]):
            total += gy[m, n]
        gb[n] = total


def linear_grad_bias(gy, gb):
    if gb.size:
        _grad_bias[blocks(gb.size, THREADS), THREADS](gy, gb)


# A thread an element. Reads x once, writes y once.
@gpu("real[:], real[:], i64, real, i64")
def _dropout(x, y, drop, scale, seed):
    i = cuda.grid(1)
    if i < x.size:
        y[i] = x[i] * scale if random24(i, seed) >= drop else real(0)


def dropout(x, y, drop, scale, seed):
    if x.size:
        _dropout[blocks(x.size, THREADS), THREADS](x, y, drop, scale, seed)
