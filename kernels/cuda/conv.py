"""Convolution, its gradients, and the patches that it is made of.

An axis of all of these is one rule: target position o and tap k meet the source at (o * step + shift + k * spread) / divide,
where that is a whole number in [0, size). For conv the source is x: step = stride, shift = -pad, spread = dilation, divide
= 1; for the gradient by the input the source is gy: step = 1, shift = pad, spread = -dilation, divide = stride. Sums are
gathered by one thread or in a fixed tree, never added to memory by many: the same bits every time.
"""

import math

import numpy as np

from ..compile import block, cuda, gpu, inline, real
from ..scalars import activate

THREADS = block(256)
SIDE = 16 if THREADS == 256 else 2  # the threads of a tile are SIDE x SIDE, and each sums PER x PER results
PER = 4 if THREADS == 256 else 2
TILE = SIDE * PER
PADDED = TILE + 1  # stores down a column of a tile meet different banks of the shared memory
DEPTH = SIDE  # products from one load of the tiles
FEW = 8  # with fewer filters in a group a tile would be mostly empty: a thread a result
PARTS = 64  # at most so many blocks share the positions of one tile of weight gradients


@inline
def _meet(at, divide, size):
    """The index in the source, or -1."""
    if at < 0:
        return -1
    if divide > 1:
        if at % divide != 0:
            return -1
        at //= divide
    return at if at < size else -1


# Parallel over tiles of TILE rows (filters) x TILE positions; each thread keeps PER x PER sums in registers.
# Neighbouring threads load neighbouring positions; DEPTH threads work out the geometry of DEPTH taps for all.
# Reads the source once per tile of rows and the weights once per tile of positions, through shared memory; writes once.
# A tile multiplies the weights by the zeros beyond the source too: one that is infinite makes NaN there.
# Source: implicit GEMM, Chetlur et al., cuDNN: efficient primitives for deep learning, arXiv 1410.0759.
@gpu(
    "real[:], real[:], real[:], real[:], i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, "
    "i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64"
)
def _conv_tiles(
    x, w, b, y, N, groups, rows, channels, D, H, W, KD, KH, KW, OD, OH, OW, w_row, w_channel,
    step_d, step_h, step_w, shift_d, shift_h, shift_w, spread_d, spread_h, spread_w, divide_d, divide_h, divide_w,
    activation,
):  # fmt: skip
    a_tile = cuda.shared.array((DEPTH, PADDED), real)
    b_tile = cuda.shared.array((DEPTH, TILE), real)
    tap_w = cuda.shared.array(DEPTH, np.int64)
    tap_x = cuda.shared.array(DEPTH, np.int64)
    tap_d = cuda.shared.array(DEPTH, np.int64)
    tap_h = cuda.shared.array(DEPTH, np.int64)
    tap_i = cuda.shared.array(DEPTH, np.int64)
    sums = cuda.local.array((PER, PER), real)
    thread = cuda.threadIdx.x
    tx, ty = thread % SIDE, thread // SIDE
    size, taps = OD * OH * OW, KD * KH * KW
    positions, row_tiles = (N * size + TILE - 1) // TILE, (rows + TILE - 1) // TILE
    first = cuda.blockIdx.x % positions * TILE
    row = cuda.blockIdx.x // positions % row_tiles * TILE
    g = cuda.blockIdx.x // positions // row_tiles
    for i in range(PER):
        for j in range(PER):
            sums[i, j] = real(0)
    # The position that this thread loads: TILE divides the number of threads, so it is the same every time.
    q = first + thread % TILE
    there = q < N * size
    n, s = q // size, q % size
    base_d = s // OW // OH * step_d + shift_d
    base_h = s // OW % OH * step_h + shift_h
    base_w = s % OW * step_w + shift_w
    image = (n * groups + g) * channels * D * H * W
    depth = channels * taps
    for start in range(0, depth, DEPTH):
        if thread < DEPTH:
            k = start + thread
            c, tap = k // taps, k % taps
            tap_w[thread] = g * rows * depth + c * w_channel + tap
            tap_x[thread] = c * D * H * W
            tap_d[thread] = tap // KW // KH * spread_d
            tap_h[thread] = tap // KW % KH * spread_h
            tap_i[thread] = tap % KW * spread_w
        cuda.syncthreads()
        for i in range(thread, DEPTH * TILE, THREADS):
            k, r = i % DEPTH, i // DEPTH
            inside = start + k < depth and row + r < rows
            a_tile[k, r] = w[tap_w[k] + (row + r) * w_row] if inside else real(0)
        for i in range(thread, DEPTH * TILE, THREADS):
            k = i // TILE
            value = real(0)
            if there and start + k < depth:
                d = _meet(base_d + tap_d[k], divide_d, D)
                h = _meet(base_h + tap_h[k], divide_h, H)
                u = _meet(base_w + tap_i[k], divide_w, W)
                if d >= 0 and h >= 0 and u >= 0:
                    value = x[image + tap_x[k] + (d * H + h) * W + u]
            b_tile[k, i % TILE] = value
        cuda.syncthreads()
        for k in range(DEPTH):
            for i in range(PER):
                a = a_tile[k, ty + i * SIDE]
                for j in range(PER):
                    sums[i, j] += a * b_tile[k, tx + j * SIDE]
    for j in range(PER):
        q = first + tx + j * SIDE
        if q < N * size:
            n, s = q // size, q % size
            for i in range(PER):
                r = row + ty + i * SIDE
                if r < rows:
                    bias = b[g * rows + r] if b.size > 0 else real(0)
                    y[((n * groups + g) * rows + r) * size + s] = activate(sums[i, j] + bias, activation)


# Parallel over results, a thread each; neighbouring threads have neighbouring positions. For few filters in a group.
# Reads channels x taps values a result, shared with its neighbours through the caches; writes once.
@gpu(
    "real[:], real[:], real[:], real[:], i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, "
    "i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64"
)
def _conv_few(
    x, w, b, y, N, groups, rows, channels, D, H, W, KD, KH, KW, OD, OH, OW, w_row, w_channel,
    step_d, step_h, step_w, shift_d, shift_h, shift_w, spread_d, spread_h, spread_w, divide_d, divide_h, divide_w,
    activation,
):  # fmt: skip
    q = cuda.grid(1)
    size, taps = OD * OH * OW, KD * KH * KW
    if q >= N * groups * rows * size:
        return
    s, r, g = q % size, q // size % rows, q // size // rows % groups
    n = q // size // rows // groups
    base_d = s // OW // OH * step_d + shift_d
    base_h = s // OW % OH * step_h + shift_h
    base_w = s % OW * step_w + shift_w
    total = b[g * rows + r] if b.size > 0 else real(0)
    weights = g * rows * channels * taps + r * w_row
    is_padded = spread_d > 0  # with zeros, which weights multiply; to a gradient, what lies outside adds nothing
    for c in range(channels):
        plane = ((n * groups + g) * channels + c) * D * H * W
        for kd in range(KD):
            d = _meet(base_d + kd * spread_d, divide_d, D)
            for kh in range(KH):
                h = _meet(base_h + kh * spread_h, divide_h, H)
                for kw in range(KW):
                    u = _meet(base_w + kw * spread_w, divide_w, W)
                    inside = d >= 0 and h >= 0 and u >= 0
                    if inside or is_padded:
                        value = x[plane + (d * H + h) * W + u] if inside else real(0)
                        total += w[weights + c * w_channel + (kd * KH + kh) * KW + kw] * value
    y[q] = activate(total, activation)


def _run(x, w, b, y, groups, rows, channels, w_row, w_channel, axes, activation=0):
    """Both kernels take the arrays as rows of memory: x[N, groups, channels, *], y[N, groups, rows, *]."""
    N, size = y.shape[0], y.shape[2] * y.shape[3] * y.shape[4]
    if not y.size:
        return
    flat = [a.reshape(a.size) for a in (x, w, b, y)]
    sizes = (N, groups, rows, channels, *x.shape[2:], *w.shape[2:], *y.shape[2:], w_row, w_channel)
    if rows < FEW:
        _conv_few[(y.size + THREADS - 1) // THREADS, THREADS](*flat, *sizes, *axes, activation)
    else:
        blocks = groups * ((rows + TILE - 1) // TILE) * ((N * size + TILE - 1) // TILE)
        _conv_tiles[blocks, THREADS](*flat, *sizes, *axes, activation)


def conv(
    x, w, b, y, groups, stride_d, stride_h, stride_w, pad_d, pad_h, pad_w, dilation_d, dilation_h, dilation_w, exact, activation
):  # fmt: skip
    axes = (stride_d, stride_h, stride_w, -pad_d, -pad_h, -pad_w, dilation_d, dilation_h, dilation_w, 1, 1, 1)
    taps = w.shape[2] * w.shape[3] * w.shape[4]
    _run(x, w, b, y, groups, w.shape[0] // groups, w.shape[1], w.shape[1] * taps, taps, axes, activation)


def conv_grad_input(
    gy, w, b, gx, groups, stride_d, stride_h, stride_w, pad_d, pad_h, pad_w, dilation_d, dilation_h, dilation_w, exact
):  # fmt: skip
    axes = (1, 1, 1, pad_d, pad_h, pad_w, -dilation_d, -dilation_h, -dilation_w, stride_d, stride_h, stride_w)
    taps = w.shape[2] * w.shape[3] * w.shape[4]
    _run(gy, w, b, gx, groups, w.shape[1], w.shape[0] // groups, taps, w.shape[1] * taps, axes)


# Parallel over tiles of TILE filters x TILE (channel, tap)s x runs of positions; PER x PER sums in registers.
# Neighbouring threads load neighbouring positions; DEPTH threads work out the geometry of DEPTH positions for all.
# Reads gy once per tile of taps and x once per tile of filters, through shared memory; writes one partial sum a run.
# Source: as _conv_tiles.
@gpu(
    "real[:], real[:], real[:], i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, "
    "i64, i64, i64, i64, i64, i64, i64, i64, i64"
)
def _weight_tiles(
    gy, x, partial, N, groups, rows, channels, D, H, W, KD, KH, KW, OD, OH, OW, run,
    stride_d, stride_h, stride_w, pad_d, pad_h, pad_w, dilation_d, dilation_h, dilation_w,
):  # fmt: skip
    g_tile = cuda.shared.array((DEPTH, PADDED), real)
    x_tile = cuda.shared.array((DEPTH, PADDED), real)
    at_g = cuda.shared.array(DEPTH, np.int64)
    at_x = cuda.shared.array(DEPTH, np.int64)
    at_d = cuda.shared.array(DEPTH, np.int64)
    at_h = cuda.shared.array(DEPTH, np.int64)
    at_w = cuda.shared.array(DEPTH, np.int64)
    tap_x = cuda.shared.array(TILE, np.int64)
    tap_d = cuda.shared.array(TILE, np.int64)
    tap_h = cuda.shared.array(TILE, np.int64)
    tap_w = cuda.shared.array(TILE, np.int64)
    sums = cuda.local.array((PER, PER), real)
    thread = cuda.threadIdx.x
    tx, ty = thread % SIDE, thread // SIDE
    size, taps = OD * OH * OW, KD * KH * KW
    depth = channels * taps
    columns, row_tiles = (depth + TILE - 1) // TILE, (rows + TILE - 1) // TILE
    column = cuda.blockIdx.x % columns * TILE
    row = cuda.blockIdx.x // columns % row_tiles * TILE
    g = cuda.blockIdx.x // columns // row_tiles % groups
    part = cuda.blockIdx.x // columns // row_tiles // groups
    for i in range(PER):
        for j in range(PER):
            sums[i, j] = real(0)
    if thread < TILE:
        c, tap = (column + thread) // taps, (column + thread) % taps
        tap_x[thread] = (g * channels + c) * D * H * W
        tap_d[thread] = tap // KW // KH * dilation_d
        tap_h[thread] = tap // KW % KH * dilation_h
        tap_w[thread] = tap % KW * dilation_w
    end = min(N * size, (part + 1) * run)
    for start in range(part * run, end, DEPTH):
        if thread < DEPTH:
            n, s = (start + thread) // size, (start + thread) % size
            at_g[thread] = (n * groups + g) * rows * size + s
            at_x[thread] = n * groups * channels * D * H * W
            at_d[thread] = s // OW // OH * stride_d - pad_d
            at_h[thread] = s // OW % OH * stride_h - pad_h
            at_w[thread] = s % OW * stride_w - pad_w
        cuda.syncthreads()
        for i in range(thread, DEPTH * TILE, THREADS):
            q, r = i % DEPTH, i // DEPTH
            g_tile[q, r] = gy[at_g[q] + (row + r) * size] if start + q < end and row + r < rows else real(0)
            value = real(0)
            if start + q < end and column + r < depth:
                d, h, u = at_d[q] + tap_d[r], at_h[q] + tap_h[r], at_w[q] + tap_w[r]
                if 0 <= d < D and 0 <= h < H and 0 <= u < W:
                    value = x[at_x[q] + tap_x[r] + (d * H + h) * W + u]
            x_tile[q, r] = value
        cuda.syncthreads()
        for q in range(DEPTH):
            for i in range(PER):
                a = g_tile[q, ty + i * SIDE]
                for j in range(PER):
                    sums[i, j] += a * x_tile[q, tx + j * SIDE]
    for i in range(PER):
        for j in range(PER):
            r, k = row + ty + i * SIDE, column + tx + j * SIDE
            if r < rows and k < depth:
                partial[((part * groups + g) * rows + r) * depth + k] = sums[i, j]


# Parallel over elements; the partial sums of each in order.
@gpu("real[:], real[:], i64")
def _add_parts(partial, y, parts):
    i = cuda.grid(1)
    if i < y.size:
        total = real(0)
        for part in range(parts):
            total += partial[part * y.size + i]
        y[i] = total


# Parallel over weights, a block each: neighbouring threads read neighbouring positions, then a tree in shared memory.
# For few filters in a group: reads gy and x once a weight, through the caches; writes once.
@gpu(
    "real[:], real[:], real[:], i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, "
    "i64, i64, i64, i64, i64, i64, i64, i64, i64"
)
def _weight_few(
    gy, x, gw, N, groups, rows, channels, D, H, W, KD, KH, KW, OD, OH, OW,
    stride_d, stride_h, stride_w, pad_d, pad_h, pad_w, dilation_d, dilation_h, dilation_w,
):  # fmt: skip
    shared = cuda.shared.array(THREADS, real)
    thread = cuda.threadIdx.x
    kw, kh = cuda.blockIdx.x % KW, cuda.blockIdx.x // KW % KH
    kd, c = cuda.blockIdx.x // KW // KH % KD, cuda.blockIdx.x // KW // KH // KD % channels
    f = cuda.blockIdx.x // KW // KH // KD // channels
    channel, size = f // rows * channels + c, OD * OH * OW
    total = real(0)
    for q in range(thread, N * size, THREADS):
        n, s = q // size, q % size
        d = s // OW // OH * stride_d - pad_d + kd * dilation_d
        h = s // OW % OH * stride_h - pad_h + kh * dilation_h
        u = s % OW * stride_w - pad_w + kw * dilation_w
        value = real(0)  # of the padding, which makes NaN of a gradient that is not finite
        if 0 <= d < D and 0 <= h < H and 0 <= u < W:
            value = x[((n * groups * channels + channel) * D + d) * H * W + h * W + u]
        total += gy[(n * groups * rows + f) * size + s] * value
    shared[thread] = total
    cuda.syncthreads()
    step = THREADS // 2
    while step > 0:
        if thread < step:
            shared[thread] += shared[thread + step]
        cuda.syncthreads()
        step //= 2
    if thread == 0:
        gw[cuda.blockIdx.x] = shared[0]


def conv_grad_weight(
    gy, x, gw, groups, stride_d, stride_h, stride_w, pad_d, pad_h, pad_w, dilation_d, dilation_h, dilation_w, exact
):  # fmt: skip
    if not gw.size:
        return
    N, rows, channels = gy.shape[0], gy.shape[1] // groups, gw.shape[1]
    sizes = (N, groups, rows, channels, *x.shape[2:], *gw.shape[2:], *gy.shape[2:])
    axes = (stride_d, stride_h, stride_w, pad_d, pad_h, pad_w, dilation_d, dilation_h, dilation_w)
    gy, x, flat = gy.reshape(gy.size), x.reshape(x.size), gw.reshape(gw.size)
    if rows < FEW:
        _weight_few[gw.size, THREADS](gy, x, flat, *sizes, *axes)
        return
    positions, depth = gy.size // (groups * rows), gw.size // (groups * rows)
    tiles = groups * ((rows + TILE - 1) // TILE) * ((depth + TILE - 1) // TILE)
    run = max(positions // PARTS, 16 * DEPTH) // DEPTH * DEPTH + DEPTH
    parts = max((positions + run - 1) // run, 1)
    partial = cuda.device_array(parts * gw.size, gw.dtype)
    _weight_tiles[tiles * parts, THREADS](gy, x, partial, *sizes, run, *axes)
    _add_parts[(gw.size + THREADS - 1) // THREADS, THREADS](partial, flat, parts)


# Parallel over channels, a block each; neighbouring threads read neighbouring elements. A tree in shared memory.
@gpu("real[:,:,:], real[:]")
def _bias_rows(gy, gb):
    shared = cuda.shared.array(THREADS, real)
    thread, f = cuda.threadIdx.x, cuda.blockIdx.x
    total = real(0)
    for n in range(gy.shape[0]):
        for s in range(thread, gy.shape[2], THREADS):
            total += gy[n, f, s]
    shared[thread] = total
    cuda.syncthreads()
    step = THREADS // 2
    while step > 0:
        if thread < step:
            shared[thread] += shared[thread + step]
        cuda.syncthreads()
        step //= 2
    if thread == 0:
        gb[f] = shared[0]


def conv_grad_bias(gy, gb):
    if gb.size:
        _bias_rows[gb.size, THREADS](gy, gb)


# ------------------------------------------------------------------------------------------------------------- patches


# Parallel over pieces of THREADS windows of each plane (image, channel, tap): a block has one tap, its threads neighbouring
# windows. Reads x KH*KW times, through the caches; writes once, coalesced.
@gpu("real[:,:,:,:], real[:,:,:], i64, i64, i64, i64, i64, i64, i64, i64, i64, i64")
def _unfold_planes(x, cols, pieces, KH, KW, OW, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w):
    plane = cuda.blockIdx.x // pieces
    s = cuda.blockIdx.x % pieces * THREADS + cuda.threadIdx.x
    if s >= cols.shape[2]:
        return
    tap, image = plane % (KH * KW), plane // (KH * KW)
    h = s // OW * stride_h - pad_h + tap // KW * dilation_h
    u = s % OW * stride_w - pad_w + tap % KW * dilation_w
    inside = 0 <= h < x.shape[2] and 0 <= u < x.shape[3]
    cols[image, tap, s] = x[image // x.shape[1], image % x.shape[1], h, u] if inside else real(0)


def unfold(x, cols, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w):
    N, C, KH, KW, OH, OW = cols.shape
    pieces = (OH * OW + THREADS - 1) // THREADS
    if cols.size:
        planes = cols.reshape(N * C, KH * KW, OH * OW)
        axes = (stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w)
        _unfold_planes[N * C * KH * KW * pieces, THREADS](x, planes, pieces, KH, KW, OW, *axes)


# Parallel over the elements of x, a thread each, which gathers from the windows that hold it: no two threads write one
# element. Reads every column element once, neighbouring threads neighbouring ones (stride 1); writes once.
# The columns are [N, C, KH, KW, OH, OW] or [N, OH, OW, C, KH, KW] with the strides that the last six numbers give.
@gpu("real[:], real[:,:,:,:], i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64")
def _fold_pixels(
    cols, x, KH, KW, OH, OW, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, at_n, at_c, at_kh, at_kw, at_oh, at_ow
):  # fmt: skip
    i = cuda.grid(1)
    C, H, W = x.shape[1], x.shape[2], x.shape[3]
    if i >= x.size:
        return
    u, h, c, n = i % W, i // W % H, i // W // H % C, i // W // H // C
    total = real(0)
    for kh in range(KH):
        oh = _meet(h + pad_h - kh * dilation_h, stride_h, OH)
        if oh < 0:
            continue
        for kw in range(KW):
            ow = _meet(u + pad_w - kw * dilation_w, stride_w, OW)
            if ow >= 0:
                total += cols[n * at_n + c * at_c + kh * at_kh + kw * at_kw + oh * at_oh + ow * at_ow]
    x[n, c, h, u] = total


def fold(cols, x, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w):
    _N, C, KH, KW, OH, OW = cols.shape
    if x.size:
        axes = (KH, KW, OH, OW, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w)
        at = (C * KH * KW * OH * OW, KH * KW * OH * OW, KW * OH * OW, OH * OW, OW, 1)
        _fold_pixels[(x.size + THREADS - 1) // THREADS, THREADS](cols.reshape(cols.size), x, *axes, *at)


def col2im(cols, x, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w):
    _N, OH, OW, C, KH, KW = cols.shape
    if x.size:
        axes = (KH, KW, OH, OW, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w)
        at = (OH * OW * C * KH * KW, KH * KW, KW, 1, OW * C * KH * KW, C * KH * KW)
        _fold_pixels[(x.size + THREADS - 1) // THREADS, THREADS](cols.reshape(cols.size), x, *axes, *at)


# Parallel over windows, a block each; neighbouring threads write neighbouring elements of the patch.
# Reads x KH*KW times, through the caches; writes once, coalesced.
@gpu("real[:,:,:,:], real[:,:,:], i64, i64, i64, i64, i64, i64, i64, i64, i64")
def _im2col_windows(x, cols, OW, KH, KW, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w):
    window, n = cuda.blockIdx.x % cols.shape[1], cuda.blockIdx.x // cols.shape[1]
    top, left = window // OW * stride_h - pad_h, window % OW * stride_w - pad_w
    for i in range(cuda.threadIdx.x, cols.shape[2], THREADS):
        h = top + i // KW % KH * dilation_h
        u = left + i % KW * dilation_w
        inside = 0 <= h < x.shape[2] and 0 <= u < x.shape[3]
        cols[n, window, i] = x[n, i // KW // KH, h, u] if inside else real(0)


def im2col(x, cols, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w):
    N, OH, OW, C, KH, KW = cols.shape
    if cols.size:
        patches = cols.reshape(N, OH * OW, C * KH * KW)
        axes = (stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w)
        _im2col_windows[N * OH * OW, THREADS](x, patches, OW, KH, KW, *axes)


# --------------------------------------------------------------------------------------------- deformable convolution

FAR = 2.0**30  # an offset of so many pixels leads outside
COLUMNS = 1 << 26  # samples at a time (or those of one image)


@inline
def _low(still, moved):
    """The pixel below still + moved and the way from it; far outside -2. The way is NaN where the offset is."""
    if real(-FAR) < moved and moved < real(FAR):
        whole = int(math.floor(moved))
        return still + whole, moved - real(whole)
    return -2, (moved if moved != moved else real(0))


@inline
def _pixel(x, plane, h, u, H, W):
    return x[plane + h * W + u] if 0 <= h < H and 0 <= u < W else real(0)


@inline
def _between(a, b, way):
    return (real(1) - way) * a + way * b


# Parallel over samples, a thread each; neighbouring threads have neighbouring positions.
# Reads offset and mask once a channel, coalesced, four pixels mostly beside those of the neighbours; writes once, coalesced.
# Source: Dai et al., Deformable convolutional networks, arXiv 1703.06211.
@gpu("real[:], real[:], real[:], real[:], i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64")
def _deform_samples(
    x, offset, mask, cols, image, C, H, W, OG, KH, KW, OH, OW, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w
):  # fmt: skip
    i = cuda.grid(1)
    if i >= cols.size:
        return
    size, taps = OH * OW, KH * KW
    s, tap, c, n = i % size, i // size % taps, i // size // taps % C, image + i // size // taps // C
    place = (n * OG + c // (C // OG)) * taps + tap
    h, down = _low(s // OW * stride_h - pad_h + tap // KW * dilation_h, offset[2 * place * size + s])
    u, right = _low(s % OW * stride_w - pad_w + tap % KW * dilation_w, offset[(2 * place + 1) * size + s])
    plane = (n * C + c) * H * W
    upper = _between(_pixel(x, plane, h, u, H, W), _pixel(x, plane, h, u + 1, H, W), right)
    lower = _between(_pixel(x, plane, h + 1, u, H, W), _pixel(x, plane, h + 1, u + 1, H, W), right)
    value = _between(upper, lower, down)
    cols[i] = mask[place * size + s] * value if mask.size > 0 else value


def _passes(N, one):
    """(first, end) of the images whose samples are made at a time; `one` image has so many."""
    step = max(COLUMNS // max(one, 1), 1)
    return [(first, min(first + step, N)) for first in range(0, N, step)]


def _samples(x, offset, mask, cols, image, sizes, axes):
    """cols[images from `image` on, C * KH * KW, 1, 1, OH * OW]: what the taps read, times the mask."""
    if cols.size:
        flat = [a.reshape(a.size) for a in (x, offset, mask, cols)]
        _deform_samples[(cols.size + THREADS - 1) // THREADS, THREADS](*flat, image, *sizes, *axes)


def deform_conv(x, offset, mask, w, b, y, groups, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w):
    (N, C, H, W), (F, _, KH, KW), (OH, OW) = x.shape, w.shape, y.shape[2:]
    if not y.size:
        return
    rows, depth = F // groups, w.size // F
    sizes, axes = (C, H, W, offset.shape[1], KH, KW, OH, OW), (stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w)
    for first, end in _passes(N, C * KH * KW * OH * OW):
        cols = cuda.device_array((end - first, C * KH * KW, 1, 1, OH * OW), y.dtype)
        _samples(x, offset, mask, cols, first, sizes, axes)
        results = y[first:end].reshape(end - first, F, 1, 1, OH * OW)
        _run(cols, w.reshape(F, depth, 1, 1, 1), b, results, groups, rows, depth, depth, 1, (1, 1, 1, 0, 0, 0, 1, 1, 1, 1, 1, 1))


# Parallel over places, a thread each, which sums over the channels that it moves; neighbouring threads have neighbouring
# positions. Reads the gradient of each sample once, coalesced, and four pixels; writes the three gradients once, coalesced.
# Source: as _deform_samples, appendix A.
@gpu(
    "real[:], real[:], real[:], real[:], real[:], real[:], i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, "
    "i64, i64, i64"
)
def _deform_places(
    gcols, x, offset, mask, goffset, gmask, image, images, C, H, W, OG, KH, KW, OH, OW,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
):  # fmt: skip
    i = cuda.grid(1)
    size, taps, per_group = OH * OW, KH * KW, C // OG
    if i >= images * OG * taps * size:
        return
    s, tap, group, n = i % size, i // size % taps, i // size // taps % OG, i // size // taps // OG
    place = ((image + n) * OG + group) * taps + tap
    h, down = _low(s // OW * stride_h - pad_h + tap // KW * dilation_h, offset[2 * place * size + s])
    u, right = _low(s % OW * stride_w - pad_w + tap % KW * dilation_w, offset[(2 * place + 1) * size + s])
    sum_h, sum_w, sum_mask = real(0), real(0), real(0)
    for c in range(group * per_group, (group + 1) * per_group):
        plane = ((image + n) * C + c) * H * W
        g = gcols[((n * C + c) * taps + tap) * size + s]
        p, q = _pixel(x, plane, h, u, H, W), _pixel(x, plane, h, u + 1, H, W)
        r, t = _pixel(x, plane, h + 1, u, H, W), _pixel(x, plane, h + 1, u + 1, H, W)
        sum_h += g * _between(r - p, t - q, right)
        sum_w += g * _between(q - p, t - r, down)
        sum_mask += g * _between(_between(p, q, right), _between(r, t, right), down)
    scale = mask[place * size + s] if mask.size > 0 else real(1)
    if goffset.size > 0:
        goffset[2 * place * size + s] = scale * sum_h
        goffset[(2 * place + 1) * size + s] = scale * sum_w
    if gmask.size > 0:
        gmask[place * size + s] = sum_mask


# Parallel over planes of gx, a thread each, which alone adds to it, tap by tap and position by position: the same bits every
# time. Reads the gradient of each sample once; reads and writes four pixels a sample.
# Source: as _deform_places.
@gpu("real[:], real[:], real[:], real[:], i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64")
def _deform_planes(
    gcols, offset, mask, gx, image, images, C, H, W, OG, KH, KW, OH, OW,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
):  # fmt: skip
    i = cuda.grid(1)
    if i >= images * C:
        return
    c, n, size, taps = i % C, image + i // C, OH * OW, KH * KW
    plane = (n * C + c) * H * W
    for p in range(H * W):
        gx[plane + p] = real(0)
    for tap in range(taps):
        place = (n * OG + c // (C // OG)) * taps + tap
        for s in range(size):
            h, down = _low(s // OW * stride_h - pad_h + tap // KW * dilation_h, offset[2 * place * size + s])
            u, right = _low(s % OW * stride_w - pad_w + tap % KW * dilation_w, offset[(2 * place + 1) * size + s])
            g = gcols[(i * taps + tap) * size + s]
            if mask.size > 0:
                g *= mask[place * size + s]
            for v in range(4):
                at_h, at_w = h + v // 2, u + v % 2
                if 0 <= at_h < H and 0 <= at_w < W:
                    part = g * (down if v // 2 else real(1) - down)
                    gx[plane + at_h * W + at_w] += part * (right if v % 2 else real(1) - right)


def deform_conv_grad_samples(
    gy, x, offset, mask, w, gx, goffset, gmask, groups, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w
):  # fmt: skip
    (N, C, H, W), (F, CG, KH, KW), (OH, OW), OG = x.shape, w.shape, gy.shape[2:], offset.shape[1]
    sizes, axes = (C, H, W, OG, KH, KW, OH, OW), (stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w)
    x, offset, mask, flat_gx, flat_goffset, flat_gmask = (a.reshape(a.size) for a in (x, offset, mask, gx, goffset, gmask))
    rows, no_bias = CG * KH * KW, cuda.device_array(0, gy.dtype)
    for first, end in _passes(N, C * KH * KW * OH * OW):
        images = end - first
        gcols = cuda.device_array((images, C * KH * KW, 1, 1, OH * OW), gy.dtype)
        gradients = gy[first:end].reshape(images, F, 1, 1, OH * OW)
        ones = (1, 1, 1, 0, 0, 0, 1, 1, 1, 1, 1, 1)
        _run(gradients, w.reshape(F, rows, 1, 1, 1), no_bias, gcols, groups, rows, F // groups, 1, rows, ones)
        gcols = gcols.reshape(gcols.size)
        places = images * OG * KH * KW * OH * OW
        if places and (goffset.size or gmask.size):
            _deform_places[(places + THREADS - 1) // THREADS, THREADS](
                gcols, x, offset, mask, flat_goffset, flat_gmask, first, images, *sizes, *axes
            )
        if gx.size:
            _deform_planes[(images * C + THREADS - 1) // THREADS, THREADS](
                gcols, offset, mask, flat_gx, first, images, *sizes, *axes
            )


def deform_conv_grad_weight(gy, x, offset, mask, gw, groups, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w):
    (N, C, H, W), (F, CG, KH, KW), (OH, OW) = x.shape, gw.shape, gy.shape[2:]
    if not gw.size:
        return
    sizes, axes = (C, H, W, offset.shape[1], KH, KW, OH, OW), (stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w)
    passes = _passes(N, C * KH * KW * OH * OW)
    partial = cuda.device_array(max(len(passes), 1) * gw.size, gw.dtype)
    for i, (first, end) in enumerate(passes):
        cols = cuda.device_array((end - first, C * KH * KW, 1, 1, OH * OW), gw.dtype)
        _samples(x, offset, mask, cols, first, sizes, axes)
        gradients = gy[first:end].reshape(end - first, F, 1, 1, OH * OW)
        part = partial[i * gw.size : (i + 1) * gw.size].reshape(F, CG * KH * KW, 1, 1, 1)
        conv_grad_weight(gradients, cols, part, groups, 1, 1, 1, 0, 0, 0, 1, 1, 1, 1)
    _add_parts[(gw.size + THREADS - 1) // THREADS, THREADS](partial, gw.reshape(gw.size), len(passes))
