"""Pooling over three spatial axes; the channels of all images are the planes M, a missing axis has the size 1.

Window o of an axis covers the taps k = 0 .. kernel - 1 at the positions o * stride - pad + k * dilation. Positions outside
of the input take no part: they count as -inf in a maximum and as 0 in a sum. Every window holds a position inside.
"""

import math

import numpy as np

from ..spec import kernel

TAPS = "kernel_d*kernel_h*kernel_w"


def _window(o, size, kernel, stride, pad, dilation):
    """(number of the first tap inside, its position and all after it as a slice) of window o."""
    start = o * stride - pad
    first = max(0, -(start // dilation))
    last = min(kernel - 1, (size - 1 - start) // dilation)
    return first, slice(start + first * dilation, start + last * dilation + 1, dilation)


def _count(o, size, kernel, stride, pad, pad_after, dilation):
    """The taps of window o inside of the padded axis: all, but for the last windows in ceil mode."""
    return min(kernel, (size + pad_after - 1 - (o * stride - pad)) // dilation + 1)


def _adaptive(o, size, windows):
    """Window o of `windows` that share an axis out: the first ends where the second begins, or one position later."""
    return slice(o * size // windows, -(-(o + 1) * size // windows))


def _first_largest(window):
    """(values, positions [3, M]) of the first NaN of each plane's window, else of its first largest element."""
    flat = window.reshape(len(window), math.prod(window.shape[1:]))
    at = flat.argmax(axis=1)
    return flat[np.arange(len(flat)), at], np.unravel_index(at, window.shape[1:])


@kernel(
    "x[M,D,H,W] -> y[M,OD,OH,OW], indices[M,OD,OH,OW]?:i64, offsets[M,OD,OH,OW]?:u8",
    error="exact",
    flops=f"M*OD*OH*OW*{TAPS}",
)
def max_pool(
    x,
    y,
    indices,
    offsets,
    kernel_d: int,
    kernel_h: int,
    kernel_w: int,
    stride_d: int,
    stride_h: int,
    stride_w: int,
    pad_front: int,
    pad_top: int,
    pad_left: int,
    dilation_d: int,
    dilation_h: int,
    dilation_w: int,
):
    """The largest element of each window. A NaN is larger than all; of equal ones (NaNs too) the first in memory counts.

    indices: where it stands in its plane, (d * H + h) * W + w. offsets: which tap it is, (kd * KH + kh) * KW + kw, for
    windows of at most 256 taps; all that the gradient needs. Source: Boureau et al. (2010), A theoretical analysis of
    feature pooling; NaN and ties as numpy.argmax has them.
    """
    _, D, H, W = x.shape
    for od, oh, ow in np.ndindex(y.shape[1:]):
        kd, d = _window(od, D, kernel_d, stride_d, pad_front, dilation_d)
        kh, h = _window(oh, H, kernel_h, stride_h, pad_top, dilation_h)
        kw, w = _window(ow, W, kernel_w, stride_w, pad_left, dilation_w)
        y[:, od, oh, ow], (i, j, k) = _first_largest(x[:, d, h, w])
        if indices is not None:
            row = (d.start + i * dilation_d) * H + h.start + j * dilation_h
            indices[:, od, oh, ow] = row * W + w.start + k * dilation_w
        if offsets is not None:
            offsets[:, od, oh, ow] = ((kd + i) * kernel_h + kh + j) * kernel_w + kw + k


@kernel("gy[M,OD,OH,OW], offsets[M,OD,OH,OW]:u8 -> gx[M,D,H,W]", error=f"reduce:{TAPS}", flops="M*OD*OH*OW")
def max_pool_backward(
    gy,
    offsets,
    gx,
    kernel_d: int,
    kernel_h: int,
    kernel_w: int,
    stride_d: int,
    stride_h: int,
    stride_w: int,
    pad_front: int,
    pad_top: int,
    pad_left: int,
    dilation_d: int,
    dilation_h: int,
    dilation_w: int,
):
    """Each gradient goes to the element that was the largest of its window; offsets as max_pool wrote them. gx = 0 elsewhere."""
    gx[...] = 0
    planes = np.arange(len(gx))
    for od, oh, ow in np.ndindex(gy.shape[1:]):
        kd, kh, kw = np.unravel_index(offsets[:, od, oh, ow], (kernel_d, kernel_h, kernel_w))
        d = od * stride_d - pad_front + kd * dilation_d
        h = oh * stride_h - pad_top + kh * dilation_h
        w = ow * stride_w - pad_left + kw * dilation_w
        gx[planes, d, h, w] += gy[:, od, oh, ow]


@kernel(
    "x[M,D,H,W] -> y[M,OD,OH,OW], indices[M,OD,OH,OW]?:i64",
    error="exact",
    flops="M*max(D,OD)*max(H,OH)*max(W,OW)",
)
def adaptive_max_pool(x, y, indices):
    """The largest element of each of OD x OH x OW windows that share the input out; NaN, ties and indices as in max_pool.

    Window o of an axis covers the positions floor(o * size / windows) to ceil((o + 1) * size / windows), the end excluded.
    """
    _, D, H, W = x.shape
    OD, OH, OW = y.shape[1:]
    for od, oh, ow in np.ndindex(OD, OH, OW):
        d, h, w = _adaptive(od, D, OD), _adaptive(oh, H, OH), _adaptive(ow, W, OW)
        y[:, od, oh, ow], (i, j, k) = _first_largest(x[:, d, h, w])
        if indices is not None:
            indices[:, od, oh, ow] = ((d.start + i) * H + h.start + j) * W + w.start + k


@kernel("gy[M,O], indices[M,O]:i64 -> gx[M,L]", error="reduce:O", flops="M*O")
def adaptive_max_pool_backward(gy, indices, gx):
    """Each gradient is added to the element that its index names (0 .. L - 1, as the forward kernels wrote it); else gx = 0."""
    gx[...] = 0
    np.add.at(gx, (np.arange(len(gx))[:, None], indices), gy)


@kernel("x[M,D,H,W] -> y[M,OD,OH,OW]", error=f"near:8+2*({TAPS})**0.5", flops=f"M*OD*OH*OW*{TAPS}")
def avg_pool(
    x,
    y,
    kernel_d: int,
    kernel_h: int,
    kernel_w: int,
    stride_d: int,
    stride_h: int,
    stride_w: int,
    pad_front: int,
    pad_back: int,
    pad_top: int,
    pad_bottom: int,
    pad_left: int,
    pad_right: int,
    dilation_d: int,
    dilation_h: int,
    dilation_w: int,
    count_include_pad: int,
    divisor: int,
):
    """The sum of each window over its divisor: `divisor` when that is not 0, else the number of taps inside of the padded
    input (count_include_pad) or inside of the input.
    """
    _, D, H, W = x.shape
    for od, oh, ow in np.ndindex(y.shape[1:]):
        _, d = _window(od, D, kernel_d, stride_d, pad_front, dilation_d)
        _, h = _window(oh, H, kernel_h, stride_h, pad_top, dilation_h)
        _, w = _window(ow, W, kernel_w, stride_w, pad_left, dilation_w)
        window = x[:, d, h, w]
        count = divisor or math.prod(window.shape[1:])
        if count_include_pad and not divisor:
            count = (
                _count(od, D, kernel_d, stride_d, pad_front, pad_back, dilation_d)
                * _count(oh, H, kernel_h, stride_h, pad_top, pad_bottom, dilation_h)
                * _count(ow, W, kernel_w, stride_w, pad_left, pad_right, dilation_w)
            )
        with np.errstate(invalid="ignore", over="ignore"):
            y[:, od, oh, ow] = window.sum(axis=(1, 2, 3)) / count


@kernel("gy[M,OD,OH,OW] -> gx[M,D,H,W]", error=f"near:8+2*({TAPS})**0.5", flops=f"M*OD*OH*OW*{TAPS}")
def avg_pool_backward(
    gy,
    gx,
    kernel_d: int,
    kernel_h: int,
    kernel_w: int,
    stride_d: int,
    stride_h: int,
    stride_w: int,
    pad_front: int,
    pad_back: int,
    pad_top: int,
    pad_bottom: int,
    pad_left: int,
    pad_right: int,
    dilation_d: int,
    dilation_h: int,
    dilation_w: int,
    count_include_pad: int,
    divisor: int,
):
    """Each gradient over its window's divisor is added to every element of the window."""
    _, D, H, W = gx.shape
    gx[...] = 0
    for od, oh, ow in np.ndindex(gy.shape[1:]):
        _, d = _window(od, D, kernel_d, stride_d, pad_front, dilation_d)
        _, h = _window(oh, H, kernel_h, stride_h, pad_top, dilation_h)
        _, w = _window(ow, W, kernel_w, stride_w, pad_left, dilation_w)
        window = gx[:, d, h, w]
        count = divisor or math.prod(window.shape[1:])
        if count_include_pad and not divisor:
            count = (
                _count(od, D, kernel_d, stride_d, pad_front, pad_back, dilation_d)
                * _count(oh, H, kernel_h, stride_h, pad_top, pad_bottom, dilation_h)
                * _count(ow, W, kernel_w, stride_w, pad_left, pad_right, dilation_w)
            )
        window += (gy[:, od, oh, ow] / count)[:, None, None, None]


@kernel(
    "x[M,D,H,W] -> y[M,OD,OH,OW]",
    error="near:8+2*((D//max(OD,1)+2)*(H//max(OH,1)+2)*(W//max(OW,1)+2))**0.5",
    flops="M*max(D,OD)*max(H,OH)*max(W,OW)",
)
def adaptive_avg_pool(x, y):
    """The mean of each of OD x OH x OW windows that share the input out, as in adaptive_max_pool."""
    D, H, W = x.shape[1:]
    OD, OH, OW = y.shape[1:]
    for od, oh, ow in np.ndindex(OD, OH, OW):
        window = x[:, _adaptive(od, D, OD), _adaptive(oh, H, OH), _adaptive(ow, W, OW)]
        with np.errstate(invalid="ignore", over="ignore"):
            y[:, od, oh, ow] = window.sum(axis=(1, 2, 3)) / math.prod(window.shape[1:])


@kernel(
    "gy[M,OD,OH,OW] -> gx[M,D,H,W]",
    error="near:8+2*((OD//D+2)*(OH//H+2)*(OW//W+2))**0.5",
    flops="M*max(D,OD)*max(H,OH)*max(W,OW)",
)
def adaptive_avg_pool_backward(gy, gx):
    """Each gradient over the size of its window is added to every element of the window; windows may overlap."""
    D, H, W = gx.shape[1:]
    OD, OH, OW = gy.shape[1:]
    gx[...] = 0
    for od, oh, ow in np.ndindex(OD, OH, OW):
        window = gx[:, _adaptive(od, D, OD), _adaptive(oh, H, OH), _adaptive(ow, W, OW)]
        window += (gy[:, od, oh, ow] / math.prod(window.shape[1:]))[:, None, None, None]


@kernel("x[M,D,H,W] -> y[M,OD,OH,OW]", error=f"near:8+2*({TAPS})**0.5", flops=f"2*M*OD*OH*OW*{TAPS}")
def lp_pool(
    x,
    y,
    kernel_d: int,
    kernel_h: int,
    kernel_w: int,
    stride_d: int,
    stride_h: int,
    stride_w: int,
    dilation_d: int,
    dilation_h: int,
    dilation_w: int,
    norm: float,
):
    """(sum of x ** norm over the window) ** (1 / norm), signs kept: a negative sum gives NaN unless 1 / norm is whole.

    A window that ceil mode lets hang over the edge counts as full: its sum is scaled by its taps over those inside.
    Source: Gulcehre et al. (2014), Learned-norm pooling; the scaling is torch's.
    """
    _, D, H, W = x.shape
    taps = kernel_d * kernel_h * kernel_w
    with np.errstate(all="ignore"):
        for od, oh, ow in np.ndindex(y.shape[1:]):
            _, d = _window(od, D, kernel_d, stride_d, 0, dilation_d)
            _, h = _window(oh, H, kernel_h, stride_h, 0, dilation_h)
            _, w = _window(ow, W, kernel_w, stride_w, 0, dilation_w)
            window = x[:, d, h, w]
            total = (window**norm).sum(axis=(1, 2, 3)) * (taps / math.prod(window.shape[1:]))
            y[:, od, oh, ow] = total ** (1 / norm)


@kernel("gy[M,OD,OH,OW], x[M,D,H,W], y[M,OD,OH,OW] -> gx[M,D,H,W]", error=f"near:8+2*({TAPS})**0.5", flops=f"3*M*OD*OH*OW*{TAPS}")
def lp_pool_backward(
    gy,
    x,
    y,
    gx,
    kernel_d: int,
    kernel_h: int,
    kernel_w: int,
    stride_d: int,
    stride_h: int,
    stride_w: int,
    dilation_d: int,
    dilation_h: int,
    dilation_w: int,
    norm: float,
):
    """gy * y ** (1 - norm) * x ** (norm - 1), scaled as in lp_pool, is added to every element of the window; a window of
    norm 0 passes nothing on (unless norm is 1).
    """
    _, D, H, W = x.shape
    taps = kernel_d * kernel_h * kernel_w
    gx[...] = 0
    with np.errstate(all="ignore"):
        for od, oh, ow in np.ndindex(y.shape[1:]):
            _, d = _window(od, D, kernel_d, stride_d, 0, dilation_d)
            _, h = _window(oh, H, kernel_h, stride_h, 0, dilation_h)
            _, w = _window(ow, W, kernel_w, stride_w, 0, dilation_w)
            window = x[:, d, h, w]
            root = y[:, od, oh, ow]
            passed = gy[:, od, oh, ow] * root ** (1 - norm) * (taps / math.prod(window.shape[1:]))
            passed = passed[:, None, None, None] * window ** (norm - 1)
            gx[:, d, h, w] += np.where((root == 0)[:, None, None, None] & (norm != 1), 0, passed)


@kernel("x[M,O], indices[M,O]:i64 -> y[M,L], bad[1]:i64", error="exact")
def max_unpool(x, indices, y, bad):
    """Puts each value where its index says, 0 elsewhere; of values with the same index the last stays.

    bad = 0, or 1 + the place of the first index outside of 0 .. L - 1; then nothing else is written.
    Source: Zeiler and Fergus (2014), Visualizing and understanding convolutional networks.
    """
    wrong = np.flatnonzero((indices < 0) | (indices >= y.shape[1]))
    bad[0] = wrong[0] + 1 if wrong.size else 0
    if bad[0]:
        return
    y[...] = 0
    for o in range(x.shape[1]):
        y[np.arange(len(y)), indices[:, o]] = x[:, o]


@kernel("gy[M,L], indices[M,O]:i64 -> gx[M,O]", error="exact")
def max_unpool_backward(gy, indices, gx):
    """The gradient of the place that each index names; indices as max_unpool has checked them."""
    gx[...] = np.take_along_axis(gy, indices, axis=1)
