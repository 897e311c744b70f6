"""Pooling over three spatial axes. A thread makes one output (or, going back, one element of the gradient) of each plane that
its block takes; neighbouring threads stand side by side along W, so that loads and stores are coalesced for small strides.
Gradients gather what the windows over an element pass to it: no atomics, and sums in a fixed order.
"""

import math

from ..compile import block, cuda, gpu, inline, real
from ..scalars import pool_count, pool_share, pool_taps, pool_windows

THREADS = block(128)
PLANES = 65535  # of a grid; further planes go to the same blocks in turn
KERNEL = ", ".join(["i64"] * 9)  # sizes, strides, dilations
PADS = ", ".join(["i64"] * 6)  # before, then after
FOUR = "real[:,:,:,:]"


def _grid(elements, planes):
    return -(-elements // THREADS), min(planes, PLANES)


@inline
def _window(o, size, windows, kernel, stride, pad, dilation):
    """As pool_taps; with a kernel of 0, window o of those that share the axis out."""
    if kernel == 0:
        begin, end = pool_share(o, size, windows)
        return 0, end - begin, begin
    return pool_taps(o, size, kernel, stride, pad, dilation)


# Parallel over outputs. Reads each tap of a window once, in memory order; overlapping windows meet in the cache.
@gpu(f"{FOUR}, {FOUR}, i64[:,:,:,:], u8[:,:,:,:], {KERNEL}, i64, i64, i64")
def _max_pool(x, y, indices, offsets, kd, kh, kw, sd, sh, sw, dd, dh, dw, pad_front, pad_top, pad_left):
    M, D, H, W = x.shape
    OD, OH, OW = y.shape[1:]
    o = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
    if o >= OD * OH * OW:
        return
    od, oh, ow = o // OW // OH, o // OW % OH, o % OW
    fd, nd, d0 = _window(od, D, OD, kd, sd, pad_front, dd)
    fh, nh, h0 = _window(oh, H, OH, kh, sh, pad_top, dh)
    fw, nw, w0 = _window(ow, W, OW, kw, sw, pad_left, dw)
    for m in range(cuda.blockIdx.y, M, cuda.gridDim.y):
        best = x[m, d0, h0, w0]
        bd, bh, bw = 0, 0, 0
        for d in range(nd):
            for h in range(nh):
                for w in range(nw):
                    v = x[m, d0 + d * dd, h0 + h * dh, w0 + w * dw]
                    if v > best or (v != v and best == best):
                        best, bd, bh, bw = v, d, h, w
        y[m, od, oh, ow] = best
        if indices.size > 0:
            indices[m, od, oh, ow] = ((d0 + bd * dd) * H + h0 + bh * dh) * W + w0 + bw * dw
        if offsets.size > 0:
            offsets[m, od, oh, ow] = ((fd + bd) * kh + fh + bh) * kw + fw + bw


def max_pool(
    x, y, indices, offsets, kernel_d, kernel_h, kernel_w, stride_d, stride_h, stride_w, pad_front, pad_top, pad_left,
    dilation_d, dilation_h, dilation_w,
):  # fmt: skip
    if y.size:
        _max_pool[_grid(y.size // y.shape[0], y.shape[0]), THREADS](
            x, y, indices, offsets, kernel_d, kernel_h, kernel_w, stride_d, stride_h, stride_w,
            dilation_d, dilation_h, dilation_w, pad_front, pad_top, pad_left,
        )  # fmt: skip


# Parallel over elements of gx. Reads the gradient and the offset of every window over an element, writes it once.
@gpu(f"{FOUR}, u8[:,:,:,:], {FOUR}, {KERNEL}, i64, i64, i64")
def _max_pool_backward(gy, offsets, gx, kd, kh, kw, sd, sh, sw, dd, dh, dw, pad_front, pad_top, pad_left):
    M, D, H, W = gx.shape
    OD, OH, OW = gy.shape[1:]
    i = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
    if i >= D * H * W:
        return
    d, h, w = i // W // H + pad_front, i // W % H + pad_top, i % W + pad_left
    d_begin, d_end = pool_windows(d, OD, kd, sd, dd)
    h_begin, h_end = pool_windows(h, OH, kh, sh, dh)
    w_begin, w_end = pool_windows(w, OW, kw, sw, dw)
    for m in range(cuda.blockIdx.y, M, cuda.gridDim.y):
        total = real(0)
        for a in range(d_begin, d_end):
            if (d - a * dd) % sd == 0:
                for b in range(h_begin, h_end):
                    if (h - b * dh) % sh == 0:
                        for c in range(w_begin, w_end):
                            if (w - c * dw) % sw == 0:
                                od, oh, ow = (d - a * dd) // sd, (h - b * dh) // sh, (w - c * dw) // sw
                                if offsets[m, od, oh, ow] == (a * kh + b) * kw + c:
                                    total += gy[m, od, oh, ow]
        gx[m, d - pad_front, h - pad_top, w - pad_left] = total


def max_pool_backward(
    gy, offsets, gx, kernel_d, kernel_h, kernel_w, stride_d, stride_h, stride_w, pad_front, pad_top, pad_left, dilation_d,
    dilation_h, dilation_w,
):  # fmt: skip
    if gx.size:
        _max_pool_backward[_grid(gx.size // gx.shape[0], gx.shape[0]), THREADS](
            gy, offsets, gx, kernel_d, kernel_h, kernel_w, stride_d, stride_h, stride_w,
            dilation_d, dilation_h, dilation_w, pad_front, pad_top, pad_left,
        )  # fmt: skip


def adaptive_max_pool(x, y, indices):
    if y.size:
        none = cuda.device_array((0, 0, 0, 0), "uint8")
        _max_pool[_grid(y.size // y.shape[0], y.shape[0]), THREADS](x, y, indices, none, 0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0)


# One block a plane, which takes the outputs a tile at a time. Of the outputs of a tile with the same index the first thread
# adds them all, in order: no two threads write one element, and the sums are the same in every run.
@gpu("real[:,:], i64[:,:], real[:,:]")
def _scatter_add(gy, indices, gx):
    values = cuda.shared.array(THREADS, real)
    places = cuda.shared.array(THREADS, "int64")
    t = cuda.threadIdx.x
    O, L = gy.shape[1], gx.shape[1]
    for m in range(cuda.blockIdx.x, gy.shape[0], cuda.gridDim.x):
        for i in range(t, L, THREADS):
            gx[m, i] = real(0)
        for tile in range(0, O, THREADS):
            cuda.syncthreads()
            if tile + t < O:
                values[t], places[t] = gy[m, tile + t], indices[m, tile + t]
            cuda.syncthreads()
            n = min(THREADS, O - tile)
            if t < n:
                first = True
                for i in range(t):
                    if places[i] == places[t]:
                        first = False
                if first:
                    total = gx[m, places[t]]
                    for i in range(t, n):
                        if places[i] == places[t]:
                            total += values[i]
                    gx[m, places[t]] = total
        cuda.syncthreads()


def adaptive_max_pool_backward(gy, indices, gx):
    if gx.size:
        _scatter_add[min(gx.shape[0], PLANES), THREADS](gy, indices, gx)


@inline
def _count(o, sizes, kernel, stride, dilation, pad, after, include, divisor):
    """What the sum over a window is divided by."""
    if divisor != 0:
        return divisor
    if include:
        count = pool_count(o[0], sizes[0], kernel[0], stride[0], pad[0], after[0], dilation[0])
        count *= pool_count(o[1], sizes[1], kernel[1], stride[1], pad[1], after[1], dilation[1])
        return count * pool_count(o[2], sizes[2], kernel[2], stride[2], pad[2], after[2], dilation[2])
    count = pool_taps(o[0], sizes[0], kernel[0], stride[0], pad[0], dilation[0])[1]
    count *= pool_taps(o[1], sizes[1], kernel[1], stride[1], pad[1], dilation[1])[1]
    return count * pool_taps(o[2], sizes[2], kernel[2], stride[2], pad[2], dilation[2])[1]


@inline
def _power(v, norm):
    return v if norm == real(1) else v * v if norm == real(2) else math.pow(v, norm)


@inline
def _root(v, norm):
    return v if norm == real(1) else math.sqrt(v) if norm == real(2) else math.pow(v, real(1) / norm)


# The root of the sum of powers, over the count of each window's taps, of which a norm's `whole` are one. Parallel over
# outputs. Reads each tap of a window once; overlapping windows meet in the cache.
@gpu(f"{FOUR}, {FOUR}, {KERNEL}, {PADS}, i64, i64, i64, real")
def _sum_pool(x, y, kd, kh, kw, sd, sh, sw, dd, dh, dw, front, top, left, back, bottom, right, include, divisor, whole, norm):
    M, D, H, W = x.shape
    OD, OH, OW = y.shape[1:]
    o = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
    if o >= OD * OH * OW:
        return
    od, oh, ow = o // OW // OH, o // OW % OH, o % OW
    _, nd, d0 = _window(od, D, OD, kd, sd, front, dd)
    _, nh, h0 = _window(oh, H, OH, kh, sh, top, dh)
    _, nw, w0 = _window(ow, W, OW, kw, sw, left, dw)
    count = nd * nh * nw
    if kd > 0:
        pad, after = (front, top, left), (back, bottom, right)
        count = _count((od, oh, ow), (D, H, W), (kd, kh, kw), (sd, sh, sw), (dd, dh, dw), pad, after, include, divisor)
    for m in range(cuda.blockIdx.y, M, cuda.gridDim.y):
        total = real(0)
        for d in range(nd):
            for h in range(nh):
                for w in range(nw):
                    total += _power(x[m, d0 + d * dd, h0 + h * dh, w0 + w * dw], norm)
        y[m, od, oh, ow] = _root(total / (real(count) / real(whole)), norm)


def avg_pool(
    x, y, kernel_d, kernel_h, kernel_w, stride_d, stride_h, stride_w, pad_front, pad_back, pad_top, pad_bottom, pad_left,
    pad_right, dilation_d, dilation_h, dilation_w, count_include_pad, divisor,
):  # fmt: skip
    if y.size:
        _sum_pool[_grid(y.size // y.shape[0], y.shape[0]), THREADS](
            x, y, kernel_d, kernel_h, kernel_w, stride_d, stride_h, stride_w, dilation_d, dilation_h, dilation_w,
            pad_front, pad_top, pad_left, pad_back, pad_bottom, pad_right, count_include_pad, divisor, 1, 1.0,
        )  # fmt: skip


# The gradient of _sum_pool; x and y are not read for the norm 1. Parallel over elements of gx. Reads the gradient and the norm
# of every window over an element, writes it once.
@gpu(f"{FOUR}, {FOUR}, {FOUR}, {FOUR}, {KERNEL}, {PADS}, i64, i64, i64, real")
def _sum_pool_backward(
    gy, x, y, gx, kd, kh, kw, sd, sh, sw, dd, dh, dw, front, top, left, back, bottom, right, include, divisor, whole, norm
):  # fmt: skip
    M, D, H, W = gx.shape
    OD, OH, OW = gy.shape[1:]
    i = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
    if i >= D * H * W:
        return
    d, h, w = i // W // H + front, i // W % H + top, i % W + left
    d_begin, d_end = pool_windows(d, OD, kd, sd, dd)
    h_begin, h_end = pool_windows(h, OH, kh, sh, dh)
    w_begin, w_end = pool_windows(w, OW, kw, sw, dw)
    sizes, kernel, stride, dilation = (D, H, W), (kd, kh, kw), (sd, sh, sw), (dd, dh, dw)
    pad, after = (front, top, left), (back, bottom, right)
    for m in range(cuda.blockIdx.y, M, cuda.gridDim.y):
        power = real(1) if norm == real(1) else _power(x[m, d - front, h - top, w - left], norm - real(1))
        total = real(0)
        for a in range(d_begin, d_end):
            if (d - a * dd) % sd == 0:
                od = (d - a * dd) // sd
                for b in range(h_begin, h_end):
                    if (h - b * dh) % sh == 0:
                        oh = (h - b * dh) // sh
                        for c in range(w_begin, w_end):
                            if (w - c * dw) % sw == 0:
                                ow = (w - c * dw) // sw
                                count = _count((od, oh, ow), sizes, kernel, stride, dilation, pad, after, include, divisor)
                                g = gy[m, od, oh, ow] / (real(count) / real(whole))
                                if norm != real(1):
                                    root = y[m, od, oh, ow]
                                    if root == real(0):
                                        g = real(0)
                                    elif norm == real(2):
                                        g *= power / root
                                    else:
                                        g *= power * math.pow(root, real(1) - norm)
                                total += g
        gx[m, d - front, h - top, w - left] = total


def avg_pool_backward(
    gy, gx, kernel_d, kernel_h, kernel_w, stride_d, stride_h, stride_w, pad_front, pad_back, pad_top, pad_bottom, pad_left,
    pad_right, dilation_d, dilation_h, dilation_w, count_include_pad, divisor,
):  # fmt: skip
    if gx.size:
        _sum_pool_backward[_grid(gx.size // gx.shape[0], gx.shape[0]), THREADS](
            gy, gy, gy, gx, kernel_d, kernel_h, kernel_w, stride_d, stride_h, stride_w, dilation_d, dilation_h, dilation_w,
            pad_front, pad_top, pad_left, pad_back, pad_bottom, pad_right, count_include_pad, divisor, 1, 1.0,
        )  # fmt: skip


# One block an output, for large windows: its threads share the window out, neighbours taking neighbours, and add their sums
# as a tree in shared memory.
@gpu(f"{FOUR}, {FOUR}")
def _adaptive_avg_pool_large(x, y):
    shared = cuda.shared.array(THREADS, real)
    D, H, W = x.shape[1:]
    OD, OH, OW = y.shape[1:]
    t, o = cuda.threadIdx.x, cuda.blockIdx.x
    od, oh, ow = o // OW // OH, o // OW % OH, o % OW
    d0, d1 = pool_share(od, D, OD)
    h0, h1 = pool_share(oh, H, OH)
    w0, w1 = pool_share(ow, W, OW)
    size = (d1 - d0) * (h1 - h0) * (w1 - w0)
    for m in range(cuda.blockIdx.y, x.shape[0], cuda.gridDim.y):
        total = real(0)
        for i in range(t, size, THREADS):
            row = i // (w1 - w0)
            total += x[m, d0 + row // (h1 - h0), h0 + row % (h1 - h0), w0 + i % (w1 - w0)]
        shared[t] = total
        cuda.syncthreads()
        step = THREADS // 2
        while step > 0:
            if t < step:
                shared[t] += shared[t + step]
            cuda.syncthreads()
            step //= 2
        if t == 0:
            y[m, od, oh, ow] = shared[0] / real(size)
        cuda.syncthreads()


def adaptive_avg_pool(x, y):
    if not y.size:
        return
    outputs = y.size // y.shape[0]
    if x.size // x.shape[0] // outputs >= 8 * THREADS:
        _adaptive_avg_pool_large[(outputs, min(y.shape[0], PLANES)), THREADS](x, y)
    else:
        _sum_pool[_grid(outputs, y.shape[0]), THREADS](x, y, 0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1.0)


# Parallel over elements of gx. The windows over position p of an axis are those from floor(p * windows / size) to
# ceil((p + 1) * windows / size), the end excluded.
@gpu(f"{FOUR}, {FOUR}")
def _adaptive_avg_pool_backward(gy, gx):
    M, D, H, W = gx.shape
    OD, OH, OW = gy.shape[1:]
    i = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
    if i >= D * H * W:
        return
    d, h, w = i // W // H, i // W % H, i % W
    d_begin, d_end = pool_share(d, OD, D)
    h_begin, h_end = pool_share(h, OH, H)
    w_begin, w_end = pool_share(w, OW, W)
    for m in range(cuda.blockIdx.y, M, cuda.gridDim.y):
        total = real(0)
        for od in range(d_begin, d_end):
            d0, d1 = pool_share(od, D, OD)
            for oh in range(h_begin, h_end):
                h0, h1 = pool_share(oh, H, OH)
                for ow in range(w_begin, w_end):
                    w0, w1 = pool_share(ow, W, OW)
                    total += gy[m, od, oh, ow] / real((d1 - d0) * (h1 - h0) * (w1 - w0))
        gx[m, d, h, w] = total


def adaptive_avg_pool_backward(gy, gx):
    if gx.size:
        _adaptive_avg_pool_backward[_grid(gx.size // gx.shape[0], gx.shape[0]), THREADS](gy, gx)


def lp_pool(
    x, y, kernel_d, kernel_h, kernel_w, stride_d, stride_h, stride_w, dilation_d, dilation_h, dilation_w, norm,
):  # fmt: skip
    if y.size:
        _sum_pool[_grid(y.size // y.shape[0], y.shape[0]), THREADS](
            x, y, kernel_d, kernel_h, kernel_w, stride_d, stride_h, stride_w, dilation_d, dilation_h, dilation_w,
            0, 0, 0, 0, 0, 0, 0, 0, kernel_d * kernel_h * kernel_w, norm,
        )  # fmt: skip


def lp_pool_backward(
    gy, x, y, gx, kernel_d, kernel_h, kernel_w, stride_d, stride_h, stride_w, dilation_d, dilation_h, dilation_w, norm,
):  # fmt: skip
    if gx.size:
        _sum_pool_backward[_grid(gx.size // gx.shape[0], gx.shape[0]), THREADS](
            gy, x, y, gx, kernel_d, kernel_h, kernel_w, stride_d, stride_h, stride_w, dilation_d, dilation_h, dilation_w,
            0, 0, 0, 0, 0, 0, 0, 0, kernel_d * kernel_h * kernel_w, norm,
        )  # fmt: skip


NONE_BAD = 2**63 - 1


@gpu("i64[:], i64, i64")
def _set_bad(bad, before, after):
    """bad[0] = after where it is before; unconditionally where before is negative."""
    if cuda.threadIdx.x == 0 and (before < 0 or bad[0] == before):
        bad[0] = after


# Parallel over indices; the smallest place wins, whoever comes first.
@gpu("i64[:,:], i64, i64[:]")
def _check(indices, L, bad):
    i = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
    M, O = indices.shape
    while i < M * O:
        at = indices[i // O, i % O]
        if at < 0 or at >= L:
            cuda.atomic.min(bad, 0, i + 1)
        i += cuda.gridDim.x * THREADS


# One block a plane, a tile of values at a time: of those with the same index the last one of the tile is written, and tiles
# follow each other, so that the last of all stays.
@gpu("real[:,:], i64[:,:], real[:,:], i64[:]")
def _scatter(x, indices, y, bad):
    places = cuda.shared.array(THREADS, "int64")
    t = cuda.threadIdx.x
    O, L = x.shape[1], y.shape[1]
    if bad[0] != 0:
        return
    for m in range(cuda.blockIdx.x, x.shape[0], cuda.gridDim.x):
        for i in range(t, L, THREADS):
            y[m, i] = real(0)
        for tile in range(0, O, THREADS):
            cuda.syncthreads()
            if tile + t < O:
                places[t] = indices[m, tile + t]
            cuda.syncthreads()
            n = min(THREADS, O - tile)
            if t < n:
                last = True
                for i in range(t + 1, n):
                    if places[i] == places[t]:
                        last = False
                if last:
                    y[m, places[t]] = x[m, tile + t]
        cuda.syncthreads()


def max_unpool(x, indices, y, bad):
    _set_bad[1, THREADS](bad, -1, NONE_BAD)
    if x.size:
        _check[min(-(-x.size // THREADS), PLANES), THREADS](indices, y.shape[1], bad)
    _set_bad[1, THREADS](bad, NONE_BAD, 0)
    if y.size:
        _scatter[min(y.shape[0], PLANES), THREADS](x, indices, y, bad)


# Parallel over outputs: a gather.
@gpu("real[:,:], i64[:,:], real[:,:]")
def _gather(gy, indices, gx):
    o = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
    if o < gx.shape[1]:
        for m in range(cuda.blockIdx.y, gx.shape[0], cuda.gridDim.y):
            gx[m, o] = gy[m, indices[m, o]]


def max_unpool_backward(gy, indices, gx):
    if gx.size:
        _gather[_grid(gx.shape[1], gx.shape[0]), THREADS](gy, indices, gx)
