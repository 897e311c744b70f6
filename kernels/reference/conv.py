"""Convolution, its gradients, and the patches that it is made of.

Three spatial dimensions everywhere but in the patches: 1-D and 2-D are the cases with sizes of 1. Output o and tap k meet
the input at o * stride - pad + k * dilation; outside [0, size) stands a zero. `pad` is the padding in front; what is
padded at the end follows from the size of the output. Scalars of an axis with one output or one tap do not matter.
"""

import math

import numpy as np

from ..spec import kernel
from .activation import activated


def _meet(outputs, taps, size, stride, pad, dilation):
    """[outputs, taps]: the input's index under each tap of each window; `size`, one past the end, where there is none."""
    at = np.arange(outputs)[:, None] * stride - pad + np.arange(taps) * dilation
    return np.where((at >= 0) & (at < size), at, size)


def _patches(x, outputs, taps, stride, pad, dilation):
    """[N, C, *outputs, *taps] of x[N, C, *sizes]: the patch under every window."""
    n = len(outputs)
    padded = np.pad(x, [(0, 0), (0, 0)] + [(0, 1)] * n)
    index = _grid([_meet(*axis) for axis in zip(outputs, taps, x.shape[2:], stride, pad, dilation, strict=True)])
    return padded[:, :, *index]


def _add_patches(patches, x, outputs, taps, stride, pad, dilation):
    """The adjoint of _patches: x = the sum of what the windows hold of each element."""
    n = len(outputs)
    padded = np.zeros([*x.shape[:2], *(size + 1 for size in x.shape[2:])], x.dtype)
    index = _grid([_meet(*axis) for axis in zip(outputs, taps, x.shape[2:], stride, pad, dilation, strict=True)])
    np.add.at(padded, (slice(None), slice(None), *index), patches)
    x[...] = padded[:, :, *(slice(-1),) * n]


def _grid(axes):
    """Index arrays of n axes, each [outputs, taps], broadcast to [*outputs, *taps]."""
    n = len(axes)
    return [a.reshape([len(a) if i == k else 1 for k in range(n)] + [a.shape[1] if i == k else 1 for k in range(n)])
            for i, a in enumerate(axes)]  # fmt: skip


@kernel(
    "x[N,C,D,H,W], w[F,CG,KD,KH,KW], b[F]? -> y[N,F,OD,OH,OW]",
    error="winograd:CG*KD*KH*KW",
    flops="2*N*F*OD*OH*OW*CG*KD*KH*KW",
)
def conv(
    x, w, b, y, groups: int, stride_d: int, stride_h: int, stride_w: int, pad_d: int, pad_h: int, pad_w: int,
    dilation_d: int, dilation_h: int, dilation_w: int, exact: int, activation: int,
):  # fmt: skip
    """y[n,f,o] = b[f] + the sum over c, k of w[f,c,k] x[n, c of f's group, o * stride - pad + k * dilation], then the
    function of number `activation` (see `activate`).

    It is a cross-correlation: the filter is not flipped. Padding is a zero, so a NaN or an infinity in w makes NaN there.
    exact = 0 allows an algorithm with larger rounding errors (Winograd).

    Source: Dumoulin and Visin, A guide to convolution arithmetic for deep learning, arXiv 1603.07285.
    """
    f, cg = w.shape[:2]
    geometry = (stride_d, stride_h, stride_w), (pad_d, pad_h, pad_w), (dilation_d, dilation_h, dilation_w)
    patches = _patches(x, y.shape[2:], w.shape[2:], *geometry)
    patches = patches.reshape(x.shape[0], groups, cg, *patches.shape[2:])
    filters = w.reshape(groups, f // groups, *w.shape[1:])
    with np.errstate(invalid="ignore"):
        y[...] = np.einsum("ngcdhwijk,gfcijk->ngfdhw", patches, filters, optimize=True).reshape(y.shape)
    if b is not None:
        y += b[:, None, None, None]
    y[...] = activated(y, activation)[0]


@kernel(
    "gy[N,F,OD,OH,OW], w[F,CG,KD,KH,KW], b[C]? -> gx[N,C,D,H,W]",
    error="winograd:F*KD*KH*KW/groups",
    flops="2*N*F*OD*OH*OW*CG*KD*KH*KW",
)
def conv_grad_input(
    gy, w, b, gx, groups: int, stride_d: int, stride_h: int, stride_w: int, pad_d: int, pad_h: int, pad_w: int,
    dilation_d: int, dilation_h: int, dilation_w: int, exact: int,
):  # fmt: skip
    """The adjoint of conv in x: each gy[n,f,o] w[f,c,k] is added where x was read; plus b[c]: the transposed convolution.

    Source: Dumoulin and Visin, chapter 4.
    """
    n, f = gy.shape[:2]
    geometry = (stride_d, stride_h, stride_w), (pad_d, pad_h, pad_w), (dilation_d, dilation_h, dilation_w)
    filters = w.reshape(groups, f // groups, *w.shape[1:])
    gradients = gy.reshape(n, groups, f // groups, *gy.shape[2:])
    with np.errstate(invalid="ignore"):
        patches = np.einsum("ngfdhw,gfcijk->ngcdhwijk", gradients, filters, optimize=True)
        _add_patches(patches.reshape(n, gx.shape[1], *patches.shape[3:]), gx, gy.shape[2:], w.shape[2:], *geometry)
    if b is not None:
        gx += b[:, None, None, None]


@kernel(
    "gy[N,F,OD,OH,OW], x[N,C,D,H,W] -> gw[F,CG,KD,KH,KW]",
    error="winograd:N*OD*OH*OW",
    flops="2*N*F*OD*OH*OW*CG*KD*KH*KW",
)
def conv_grad_weight(
    gy, x, gw, groups: int, stride_d: int, stride_h: int, stride_w: int, pad_d: int, pad_h: int, pad_w: int,
    dilation_d: int, dilation_h: int, dilation_w: int, exact: int,
):  # fmt: skip
    """gw[f,c,k] = the sum over n, o of gy[n,f,o] x[n, c of f's group, o * stride - pad + k * dilation]."""
    n, f = gy.shape[:2]
    geometry = (stride_d, stride_h, stride_w), (pad_d, pad_h, pad_w), (dilation_d, dilation_h, dilation_w)
    patches = _patches(x, gy.shape[2:], gw.shape[2:], *geometry)
    patches = patches.reshape(n, groups, gw.shape[1], *patches.shape[2:])
    gradients = gy.reshape(n, groups, f // groups, *gy.shape[2:])
    gw[...] = np.einsum("ngcdhwijk,ngfdhw->gfcijk", patches, gradients, optimize=True).reshape(gw.shape)


@kernel("gy[N,F,S] -> gb[F]", error="reduce:N*S", flops="N*F*S")
def conv_grad_bias(gy, gb):
    """The sum over everything but the channel; 0 for nothing."""
    gb[...] = gy.sum(axis=(0, 2))


@kernel("x[N,C,H,W] -> cols[N,C,KH,KW,OH,OW]", error="exact")
def unfold(
    x, cols, stride_h: int, stride_w: int, pad_h: int, pad_w: int, dilation_h: int, dilation_w: int
):  # fmt: skip
    """cols[n,c,i,j,oh,ow] = x[n, c, oh * stride - pad + i * dilation, ...], 0 in the padding: one column a window."""
    geometry = (stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w)
    cols[...] = _patches(x, cols.shape[4:], cols.shape[2:4], *geometry).transpose(0, 1, 4, 5, 2, 3)


@kernel("cols[N,C,KH,KW,OH,OW] -> x[N,C,H,W]", error="reduce:KH*KW", flops="N*C*KH*KW*OH*OW")
def fold(
    cols, x, stride_h: int, stride_w: int, pad_h: int, pad_w: int, dilation_h: int, dilation_w: int
):  # fmt: skip
    """The adjoint of unfold: x[n,c,h,w] = the sum of what the windows hold of it, 0 where none reaches."""
    geometry = (stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w)
    _add_patches(cols.transpose(0, 1, 4, 5, 2, 3), x, cols.shape[4:], cols.shape[2:4], *geometry)


@kernel("x[N,C,H,W] -> cols[N,OH,OW,C,KH,KW]", error="exact")
def im2col(
    x, cols, stride_h: int, stride_w: int, pad_h: int, pad_w: int, dilation_h: int, dilation_w: int
):  # fmt: skip
    """cols[n,oh,ow,c,i,j] = x[n, c, oh * stride - pad + i * dilation, ...], 0 in the padding: one row a window."""
    geometry = (stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w)
    cols[...] = _patches(x, cols.shape[1:3], cols.shape[4:], *geometry).transpose(0, 2, 3, 1, 4, 5)


@kernel("cols[N,OH,OW,C,KH,KW] -> x[N,C,H,W]", error="reduce:KH*KW", flops="N*C*KH*KW*OH*OW")
def col2im(
    cols, x, stride_h: int, stride_w: int, pad_h: int, pad_w: int, dilation_h: int, dilation_w: int
):  # fmt: skip
    """The adjoint of im2col: x[n,c,h,w] = the sum of what the windows hold of it, 0 where none reaches."""
    geometry = (stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w)
    _add_patches(cols.transpose(0, 3, 1, 2, 4, 5), x, cols.shape[1:3], cols.shape[4:], *geometry)


# -------------------------------------------------------------------------------------------- deformable convolution


FAR = 2.0**30  # an offset of so many pixels leads outside, whatever the padding


def _places(offset, stride, pad, dilation, axis):
    """(low, fraction) along one axis, each [N, OG, KH, KW, OH, OW]: where the taps of every window read, o * stride - pad +
    k * dilation + offset, as the pixel below and the way from it. Far outside low is -2; the fraction of a NaN is NaN."""
    moved = offset[:, :, :, :, axis]
    outputs, taps = moved.shape[4 + axis], moved.shape[2 + axis]
    still = (np.arange(taps) * dilation)[:, None] - pad + np.arange(outputs) * stride
    still = still.reshape((taps, 1, outputs, 1) if axis == 0 else (1, taps, 1, outputs))
    near = np.abs(moved) < FAR
    whole = np.floor(np.where(near, moved, 0))
    low = np.where(near, still + whole.astype(np.int64), -2)
    return low, np.where(near, moved - whole, np.where(np.isnan(moved), moved, 0))


def _deform(x, offset, stride, pad, dilation):
    """(index, value, fraction down, fraction to the right): the four pixels around each place, [2, 2, N, OG, 1, KH, KW, OH, OW]
    as an index into the H*W of a plane, H*W where there is none, and [2, 2, N, OG, C/OG, KH, KW, OH, OW], 0 where there is none.
    """
    N, C, H, W = x.shape
    OG = offset.shape[1]
    (low_h, down), (low_w, right) = (_places(offset, stride[a], pad[a], dilation[a], a) for a in (0, 1))
    flat = np.zeros((N, OG, C // OG, H * W + 1), x.dtype)
    flat[..., :-1] = x.reshape(N, OG, C // OG, H * W)
    index = np.empty((2, 2, *low_h.shape), np.int64)
    for i in (0, 1):
        for j in (0, 1):
            h, w = low_h + i, low_w + j
            inside = (h >= 0) & (h < H) & (w >= 0) & (w < W)
            index[i, j] = np.where(inside, h * W + w, H * W)
    places = index.reshape(2, 2, N, OG, 1, math.prod(index.shape[4:]))
    value = np.take_along_axis(flat[None, None], places, axis=5)
    value = value.reshape(2, 2, N, OG, C // OG, *index.shape[4:])
    return index, value, down[:, :, None], right[:, :, None]


def _between(value, down, right):
    """Bilinear interpolation: all four pixels count, those of weight 0 too (0 times an infinity is NaN)."""
    upper = (1 - right) * value[0, 0] + right * value[0, 1]
    return (1 - down) * upper + down * ((1 - right) * value[1, 0] + right * value[1, 1])


def _masked(samples, mask):
    return samples if mask is None else mask[:, :, None] * samples


def _sample_gradient(gy, w, OG, groups):
    """[N, OG, C/OG, KH, KW, OH, OW]: the gradient by the samples, through the weights."""
    (N, F, OH, OW), (CG, KH, KW) = gy.shape, w.shape[1:]
    gradients, filters = gy.reshape(N, groups, F // groups, OH, OW), w.reshape(groups, F // groups, CG, KH, KW)
    g = np.einsum("ngfhw,gfcij->ngcijhw", gradients, filters, optimize=True)
    return g.reshape(N, OG, groups * CG // OG, KH, KW, OH, OW)


@kernel(
    "x[N,C,H,W], offset[N,OG,KH,KW,2,OH,OW], mask[N,OG,KH,KW,OH,OW]?, w[F,CG,KH,KW], b[F]? -> y[N,F,OH,OW]",
    error="reduce:CG*KH*KW",
    flops="2*N*F*OH*OW*CG*KH*KW",
)
def deform_conv(
    x, offset, mask, w, b, y, groups: int, stride_h: int, stride_w: int, pad_h: int, pad_w: int, dilation_h: int, dilation_w: int
):  # fmt: skip
    """Convolution whose every tap reads at o * stride - pad + k * dilation + offset[n, channel's offset group, k], down and to
    the right, by bilinear interpolation between the four pixels around, times mask; a pixel outside the image is 0.

    All four pixels count: one of weight 0 that is infinite makes a NaN. An offset of 2**30 or more leads outside; one that is
    NaN makes the sample NaN.

    Source: Dai et al., Deformable convolutional networks, arXiv 1703.06211; with the mask Zhu et al., arXiv 1811.11168.
    """
    N, (F, CG) = len(x), w.shape[:2]
    with np.errstate(invalid="ignore", over="ignore"):
        _, value, down, right = _deform(x, offset, (stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w))
        samples = _masked(_between(value, down, right), mask).reshape(N, groups, CG, *w.shape[2:], *y.shape[2:])
        filters = w.reshape(groups, F // groups, *w.shape[1:])
        y[...] = np.einsum("ngcijhw,gfcij->ngfhw", samples, filters, optimize=True).reshape(y.shape)
        if b is not None:
            y += b[:, None, None]


@kernel(
    "gy[N,F,OH,OW], x[N,C,H,W], offset[N,OG,KH,KW,2,OH,OW], mask[N,OG,KH,KW,OH,OW]?, w[F,CG,KH,KW] "
    "-> gx[N,C,H,W]?, goffset[N,OG,KH,KW,2,OH,OW]?, gmask[N,OG,KH,KW,OH,OW]?",
    error="reduce:4*C*F*KH*KW",
    flops="2*N*F*OH*OW*CG*KH*KW",
)
def deform_conv_grad_samples(
    gy, x, offset, mask, w, gx, goffset, gmask, groups: int, stride_h: int, stride_w: int, pad_h: int, pad_w: int,
    dilation_h: int, dilation_w: int,
):  # fmt: skip
    """The gradients of deform_conv that go through its samples: those wanted of gx, goffset and gmask (the last with a mask).

    goffset is the slope between the four pixels; on a whole number, where it jumps, that towards larger coordinates. A sample
    at an offset that is NaN or leads outside adds nothing to gx.

    Source: as deform_conv, equation 7 and appendix A.
    """
    (N, C, H, W), OG = x.shape, offset.shape[1]
    with np.errstate(invalid="ignore", over="ignore"):
        index, value, down, right = _deform(x, offset, (stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w))
        g = _sample_gradient(gy, w, OG, groups)
        if gmask is not None:
            gmask[...] = (g * _between(value, down, right)).sum(axis=2)
        g = _masked(g, mask)
        if goffset is not None:
            slope = (1 - right) * (value[1, 0] - value[0, 0]) + right * (value[1, 1] - value[0, 1])
            goffset[:, :, :, :, 0] = (g * slope).sum(axis=2)
            slope = (1 - down) * (value[0, 1] - value[0, 0]) + down * (value[1, 1] - value[1, 0])
            goffset[:, :, :, :, 1] = (g * slope).sum(axis=2)
        if gx is not None:
            flat = np.zeros((N, OG, C // OG, H * W + 1), gx.dtype)
            images, offset_groups, channels = np.ogrid[:N, :OG, : C // OG]
            places = math.prod(index.shape[4:])
            for i, j in np.ndindex(2, 2):
                part = g * (down if i else 1 - down) * (right if j else 1 - right)
                at = index[i, j].reshape(N, OG, 1, places)
                where = images[..., None], offset_groups[..., None], channels[..., None], at
                np.add.at(flat, where, part.reshape(N, OG, C // OG, places))
            gx[...] = flat[..., :-1].reshape(gx.shape)


@kernel(
    "gy[N,F,OH,OW], x[N,C,H,W], offset[N,OG,KH,KW,2,OH,OW], mask[N,OG,KH,KW,OH,OW]? -> gw[F,CG,KH,KW]",
    error="reduce:N*OH*OW",
    flops="2*N*F*OH*OW*CG*KH*KW",
)
def deform_conv_grad_weight(
    gy, x, offset, mask, gw, groups: int, stride_h: int, stride_w: int, pad_h: int, pad_w: int, dilation_h: int, dilation_w: int
):  # fmt: skip
    """gw[f,c,k] = the sum over n, o of gy[n,f,o] and the sample of channel c under tap k."""
    (N, F), (CG, KH, KW) = gy.shape[:2], gw.shape[1:]
    with np.errstate(invalid="ignore", over="ignore"):
        _, value, down, right = _deform(x, offset, (stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w))
        samples = _masked(_between(value, down, right), mask).reshape(N, groups, CG, KH, KW, *gy.shape[2:])
        gradients = gy.reshape(N, groups, F // groups, *gy.shape[2:])
        gw[...] = np.einsum("ngcijhw,ngfhw->gfcij", samples, gradients, optimize=True).reshape(gw.shape)
