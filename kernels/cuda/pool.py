"""Pooling over three spatial axes. A thread makes one output (or, going back, one element of the gradient) of each plane that
its block takes; neighbouring threads stand side by side along W, so that loads and stores are coalesced for small strides.
Gradients gather what the windows over an element pass to it: no atomics, and sums in a fixed order.
"""

import math

from ..compile import block, cuda, gpu, real
from ..scalars import pool_count, pool_share, pool_taps, pool_windows

THREADS = block(128)
PLANES = 65535  # of a grid; further planes go to the same blocks in turn
KERNEL = ", ".join(["i64"] * 9)  # sizes, strides, dilations
FOUR = "real[:,:,:,:]"


def _grid(elements, planes):
    return -(-elements // THREADS), min(planes, PLANES)


# Parallel over outputs. Reads each tap of a window once, in memory order; overlapping windows meet in the cache.
@gpu(f"{FOUR}, {FOUR}, i64[:,:,:,:], u8[:,:,:,:], {KERNEL}, i64, i64, i64")
def _max_pool(x, y, indices, offsets, kd, kh, kw, sd, sh, sw, dd, dh, dw, pad_front, pad_top, pad_left):
    M, D, H, W = x.shape
    OD, OH, OW = y.shape[1:]
    o = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
    if o >= OD * OH * OW:
        return
    od, oh, ow = o // OW // OH, o // OW % OH, o % OW
    fd, nd, d0 = pool_taps(od, D, kd, sd, pad_front, dd)
    fh, nh, h0 = pool_taps(oh, H, kh, sh, pad_top, dh)
    fw, nw, w0 = pool_taps(ow, W, kw, sw, pad_left, dw)
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
    x,
    y,
    indices,
    offsets,
    kernel_d,
    kernel_h,
    kernel_w,
    stride_d,
    stride_h,
    stride_w,
    pad_front,
    pad_top,
    pad_left,
    dilation_d,
    dilation_h,
    dilation_w,
):
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
    gy,
    offsets,
    gx,
    kernel_d,
    kernel_h,
    kernel_w,
    stride_d,
    stride_h,
    stride_w,
    pad_front,
    pad_top,
    pad_left,
    dilation_d,
    dilation_h,
    dilation_w,
):
    if gx.size:
        _max_pool_backward[_grid(gx.size // gx.shape[0], gx.shape[0]), THREADS](
            gy, offsets, gx, kernel_d, kernel_h, kernel_w, stride_d, stride_h, stride_w,
            dilation_d, dilation_h, dilation_w, pad_front, pad_top, pad_left,
        )  # fmt: skip


# Parallel over outputs, as _max_pool.
@gpu(f"{FOUR}, {FOUR}, i64[:,:,:,:]")
def _adaptive_max_pool(x, y, indices):
    M, D, H, W = x.shape
    OD, OH, OW = y.shape[1:]
    o = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
    if o >= OD * OH * OW:
        return
    od, oh, ow = o // OW // OH, o // OW % OH, o % OW
    d0, d1 = pool_share(od, D, OD)
    h0, h1 = pool_share(oh, H, OH)
    w0, w1 = pool_share(ow, W, OW)
    for m in range(cuda.blockIdx.y, M, cuda.gridDim.y):
        best = x[m, d0, h0, w0]
        place = (d0 * H + h0) * W + w0
        for d in range(d0, d1):
            for h in range(h0, h1):
                for w in range(w0, w1):
                    v = x[m, d, h, w]
                    if v > best or (v != v and best == best):
                        best = v
                        place = (d * H + h) * W + w
        y[m, od, oh, ow] = best
        if indices.size > 0:
            indices[m, od, oh, ow] = place


def adaptive_max_pool(x, y, indices):
    if y.size:
        _adaptive_max_pool[_grid(y.size // y.shape[0], y.shape[0]), THREADS](x, y, indices)


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


# Parallel over outputs. Reads each tap of a window once; overlapping windows meet in the cache.
@gpu(f"{FOUR}, {FOUR}, {KERNEL}, i64, i64, i64, i64, i64, i64, i64, i64")
def _avg_pool(
    x, y, kd, kh, kw, sd, sh, sw, dd, dh, dw, pad_front, pad_back, pad_top, pad_bottom, pad_left, pad_right, include, divisor
):
    M, D, H, W = x.shape
    OD, OH, OW = y.shape[1:]
    o = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
    if o >= OD * OH * OW:
        return
    od, oh, ow = o // OW // OH, o // OW % OH, o % OW
    _, nd, d0 = pool_taps(od, D, kd, sd, pad_front, dd)
    _, nh, h0 = pool_taps(oh, H, kh, sh, pad_top, dh)
    _, nw, w0 = pool_taps(ow, W, kw, sw, pad_left, dw)
    count = divisor
    if divisor == 0:
        count = nd * nh * nw
        if include:
            count = pool_count(od, D, kd, sd, pad_front, pad_back, dd) * pool_count(oh, H, kh, sh, pad_top, pad_bottom, dh)
            count *= pool_count(ow, W, kw, sw, pad_left, pad_right, dw)
    for m in range(cuda.blockIdx.y, M, cuda.gridDim.y):
        total = real(0)
        for d in range(nd):
            for h in range(nh):
                for w in range(nw):
                    total += x[m, d0 + d * dd, h0 + h * dh, w0 + w * dw]
        y[m, od, oh, ow] = total / real(count)


def avg_pool(
    x,
    y,
    kernel_d,
    kernel_h,
    kernel_w,
    stride_d,
    stride_h,
    stride_w,
    pad_front,
    pad_back,
    pad_top,
    pad_bottom,
    pad_left,
    pad_right,
    dilation_d,
    dilation_h,
    dilation_w,
    count_include_pad,
    divisor,
):
    if y.size:
        _avg_pool[_grid(y.size // y.shape[0], y.shape[0]), THREADS](
            x, y, kernel_d, kernel_h, kernel_w, stride_d, stride_h, stride_w, dilation_d, dilation_h, dilation_w,
            pad_front, pad_back, pad_top, pad_bottom, pad_left, pad_right, count_include_pad, divisor,
        )  # fmt: skip


# Parallel over elements of gx. Reads the gradient of every window over an element, writes it once.
@gpu(f"{FOUR}, {FOUR}, {KERNEL}, i64, i64, i64, i64, i64, i64, i64, i64")
def _avg_pool_backward(
    gy, gx, kd, kh, kw, sd, sh, sw, dd, dh, dw, pad_front, pad_back, pad_top, pad_bottom, pad_left, pad_right, include, divisor
):
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
                od = (d - a * dd) // sd
                for b in range(h_begin, h_end):
                    if (h - b * dh) % sh == 0:
                        oh = (h - b * dh) // sh
                        for c in range(w_begin, w_end):
                            if (w - c * dw) % sw == 0:
                                ow = (w - c * dw) // sw
                                count = divisor
                                if divisor == 0 and include:
                                    count = pool_count(od, D, kd, sd, pad_front, pad_back, dd)
                                    count *= pool_count(oh, H, kh, sh, pad_top, pad_bottom, dh)
                                    count *= pool_count(ow, W, kw, sw, pad_left, pad_right, dw)
                                elif divisor == 0:
                                    count = pool_taps(od, D, kd, sd, pad_front, dd)[1]
                                    count *= pool_taps(oh, H, kh, sh, pad_top, dh)[1]
                                    count *= pool_taps(ow, W, kw, sw, pad_left, dw)[1]
                                total += gy[m, od, oh, ow] / real(count)
        gx[m, d - pad_front, h - pad_top, w - pad_left] = total


def avg_pool_backward(
    gy,
    gx,
    kernel_d,
    kernel_h,
    kernel_w,
    stride_d,
    stride_h,
    stride_w,
    pad_front,
    pad_back,
    pad_top,
    pad_bottom,
    pad_left,
    pad_right,
    dilation_d,
    dilation_h,
    dilation_w,
    count_include_pad,
    divisor,
):
    if gx.size:
        _avg_pool_backward[_grid(gx.size // gx.shape[0], gx.shape[0]), THREADS](
            gy, gx, kernel_d, kernel_h, kernel_w, stride_d, stride_h, stride_w, dilation_d, dilation_h, dilation_w,
            pad_front, pad_back, pad_top, pad_bottom, pad_left, pad_right, count_include_pad, divisor,
        )  # fmt: skip


# Parallel over outputs, as _avg_pool.
@gpu(f"{FOUR}, {FOUR}")
def _adaptive_avg_pool(x, y):
    M, D, H, W = x.shape
    OD, OH, OW = y.shape[1:]
    o = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
    if o >= OD * OH * OW:
        return
    od, oh, ow = o // OW // OH, o // OW % OH, o % OW
    d0, d1 = pool_share(od, D, OD)
    h0, h1 = pool_share(oh, H, OH)
    w0, w1 = pool_share(ow, W, OW)
    for m in range(cuda.blockIdx.y, M, cuda.gridDim.y):
        total = real(0)
        for d in range(d0, d1):
            for h in range(h0, h1):
                for w in range(w0, w1):
                    total += x[m, d, h, w]
        y[m, od, oh, ow] = total / real((d1 - d0) * (h1 - h0) * (w1 - w0))


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
        _adaptive_avg_pool[_grid(outputs, y.shape[0]), THREADS](x, y)


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


# Parallel over outputs. Raises each tap of a window once.
@gpu(f"{FOUR}, {FOUR}, {KERNEL}, real")
def _lp_pool(x, y, kd, kh, kw, sd, sh, sw, dd, dh, dw, norm):
    M, D, H, W = x.shape
    OD, OH, OW = y.shape[1:]
    o = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
    if o >= OD * OH * OW:
        return
    od, oh, ow = o // OW // OH, o // OW % OH, o % OW
    _, nd, d0 = pool_taps(od, D, kd, sd, 0, dd)
    _, nh, h0 = pool_taps(oh, H, kh, sh, 0, dh)
    _, nw, w0 = pool_taps(ow, W, kw, sw, 0, dw)
    scale = real(kd * kh * kw) / real(nd * nh * nw)
    for m in range(cuda.blockIdx.y, M, cuda.gridDim.y):
        total = real(0)
        for d in range(nd):
            for h in range(nh):
                for w in range(nw):
                    v = x[m, d0 + d * dd, h0 + h * dh, w0 + w * dw]
                    total += v * v if norm == real(2) else math.pow(v, norm)
        total *= scale
        y[m, od, oh, ow] = math.sqrt(total) if norm == real(2) else math.pow(total, real(1) / norm)


def lp_pool(
    x,
    y,
    kernel_d,
    kernel_h,
    kernel_w,
    stride_d,
    stride_h,
    stride_w,
    dilation_d,
    dilation_h,
    dilation_w,
    norm,
):
    if y.size:
        _lp_pool[_grid(y.size // y.shape[0], y.shape[0]), THREADS](
            x, y, kernel_d, kernel_h, kernel_w, stride_d, stride_h, stride_w, dilation_d, dilation_h, dilation_w, norm
        )  # fmt: skip


# Parallel over elements of gx. Reads the gradient and the norm of every window over an element, writes it once.
@gpu(f"{FOUR}, {FOUR}, {FOUR}, {FOUR}, {KERNEL}, real")
def _lp_pool_backward(gy, x, y, gx, kd, kh, kw, sd, sh, sw, dd, dh, dw, norm):
    M, D, H, W = gx.shape
    OD, OH, OW = gy.shape[1:]
    i = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
    if i >= D * H * W:
        return
    d, h, w = i // W // H, i // W % H, i % W
    d_begin, d_end = pool_windows(d, OD, kd, sd, dd)
    h_begin, h_end = pool_windows(h, OH, kh, sh, dh)
    w_begin, w_end = pool_windows(w, OW, kw, sw, dw)
    for m in range(cuda.blockIdx.y, M, cuda.gridDim.y):
        v = x[m, d, h, w]
        power = real(1) if norm == real(1) else v if norm == real(2) else math.pow(v, norm - real(1))
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
                                taps = pool_taps(od, D, kd, sd, 0, dd)[1] * pool_taps(oh, H, kh, sh, 0, dh)[1]
                                taps *= pool_taps(ow, W, kw, sw, 0, dw)[1]
                                g, root = gy[m, od, oh, ow], y[m, od, oh, ow]
                                if norm != real(1):
                                    if root == real(0):
                                        g = real(0)
                                    elif norm == real(2):
                                        g *= power / root
                                    else:
                                        g *= power * math.pow(root, real(1) - norm)
                                total += g * (real(kd * kh * kw) / real(taps))
        gx[m, d, h, w] = total


def lp_pool_backward(
    gy,
    x,
    y,
    gx,
    kernel_d,
    kernel_h,
    kernel_w,
    stride_d,
    stride_h,
    stride_w,
    dilation_d,
    dilation_h,
    dilation_w,
    norm,
):
    if gx.size:
        _lp_pool_backward[_grid(gx.size // gx.shape[0], gx.shape[0]), THREADS](
            gy, x, y, gx, kernel_d, kernel_h, kernel_w, stride_d, stride_h, stride_w, dilation_d, dilation_h, dilation_w, norm
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
