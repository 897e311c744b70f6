"""Convolution, its gradients, and the patches that it is made of.

Three spatial dimensions everywhere but in the patches: 1-D and 2-D are the cases with sizes of 1. Output o and tap k meet
the input at o * stride - pad + k * dilation; outside [0, size) stands a zero. `pad` is the padding in front; what is
padded at the end follows from the size of the output. Scalars of an axis with one output or one tap do not matter.
"""

import numpy as np

from ..spec import kernel


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
    dilation_d: int, dilation_h: int, dilation_w: int, exact: int,
):  # fmt: skip
    """y[n,f,o] = b[f] + the sum over c, k of w[f,c,k] x[n, c of f's group, o * stride - pad + k * dilation].

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
