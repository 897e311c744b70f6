"""Convolution, its gradients, the patches that it is made of, and its arithmetic of sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from . import _check, _dispatch
from . import activation as _activation
from ._check import Call, is_device, op

_AXES = ("d", "h", "w")
_SIZE_LIMIT = 2**62  # of a padded axis: every index that a kernel computes stays far inside an int64


# ------------------------------------------------------------------------------------------------ arithmetic of sizes


def _same(size: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    outputs = (size + stride - 1) // stride
    total = max((outputs - 1) * stride + dilation * (kernel - 1) + 1 - size, 0)
    return total // 2, total - total // 2


def _paddings(op: str, value: Any, n: int, kernel: Any, stride: Any, dilation: Any) -> tuple[tuple[int, int], ...]:
    """The padding in front and at the end of each axis, from a number, n numbers, n pairs, "same" or "valid"."""
    if isinstance(value, str):
        if _check.one_of(op, "padding", value, ("same", "valid")) == "valid":
            return ((0, 0),) * n
        if any(s != 1 for s in stride):
            raise ValueError(f"{op}: padding='same' needs a stride of 1, stride {_check.shown(stride)} came")
        return tuple(_same(k, k, 1, d) for k, d in zip(kernel, dilation, strict=True))
    if isinstance(value, list | tuple) and value and all(isinstance(v, list | tuple) for v in value):
        if len(value) != n or any(len(pair) != 2 for pair in value):
            raise ValueError(f"{op}: padding must be a number, {n} numbers or {n} pairs, {_check.shown(value)} came")
        return tuple((_check.integer(op, "padding", a, 0), _check.integer(op, "padding", b, 0)) for a, b in value)
    return tuple((p, p) for p in _check.integers(op, "padding", value, n, 0))


def _outputs(op: str, size: int, kernel: int, stride: int, padding: tuple[int, int], dilation: int) -> int:
    """How many windows fit one axis; ValueError when none does."""
    padded, extent = size + sum(padding), dilation * (kernel - 1) + 1
    if padded > _SIZE_LIMIT:
        raise ValueError(f"{op}: padding {_check.shown(padding)} makes an axis of {size} longer than any array")
    if extent > padded:
        raise ValueError(
            f"{op}: the window spans {_check.shown(extent)} (kernel_size {kernel}, dilation {_check.shown(dilation)}), "
            f"more than the {_check.shown(padded)} of the padded input"
        )
    return (padded - extent) // stride + 1


def _numbers(op: str, name: str, value: Any, low: int) -> tuple[tuple[int, ...], bool]:
    """The numbers of an argument that is one number or a tuple of them, and whether it was a tuple."""
    if isinstance(value, list | tuple):
        if not value:
            raise ValueError(f"{op}: {name} must hold at least one number")
        return tuple(_check.integer(op, name, v, low) for v in value), True
    return (_check.integer(op, name, value, low),), False


def conv_output_size(size: Any, kernel_size: Any, stride: Any = 1, padding: Any = 0, dilation: Any = 1) -> Any:
    """How many windows fit: floor((size + padding - dilation (kernel_size - 1) - 1) / stride) + 1, for each axis.

    Parameters
    ----------
    size : int or tuple of int
        The input's size, at least 0.
    kernel_size, stride, dilation : int or tuple of int
        At least 1.
    padding : int, tuple of int, tuple of pairs, "same" or "valid"
        Added at both ends; a pair gives the two ends of an axis.

    Returns
    -------
    int or tuple of int
        As `size` is.

    Raises
    ------
    TypeError, ValueError
        No integer; out of range; a window larger than the padded input.

    Notes
    -----
    Source: Dumoulin and Visin, A guide to convolution arithmetic for deep learning, arXiv 1603.07285, relationship 15.

    Examples
    --------
    >>> import hotloops as hl
    >>> hl.conv_output_size(4, 3, stride=2, padding=1)
    2
    >>> hl.conv_output_size((224, 200), 7, 2, 3)
    (112, 100)
    """
    name = "conv_output_size"
    sizes, many = _numbers(name, "size", size, 0)
    n = len(sizes)
    kernel = _check.integers(name, "kernel_size", kernel_size, n, 1)
    strides = _check.integers(name, "stride", stride, n, 1)
    dilations = _check.integers(name, "dilation", dilation, n, 1)
    pads = _paddings(name, padding, n, kernel, strides, dilations)
    result = tuple(_outputs(name, *axis) for axis in zip(sizes, kernel, strides, pads, dilations, strict=True))
    return result if many else result[0]


def same_padding(size: Any, kernel_size: Any, stride: Any = 1, dilation: Any = 1) -> Any:
    """The padding (front, end) that makes ceil(size / stride) outputs; an odd one is at the end.

    Parameters
    ----------
    size, kernel_size, stride, dilation : int or tuple of int
        At least 1.

    Returns
    -------
    (int, int) or tuple of (int, int)
        A pair, or one for each number of `size`: what the `padding` of `conv2d` takes.

    Raises
    ------
    TypeError, ValueError
        No integer; out of range.

    Examples
    --------
    >>> import hotloops as hl
    >>> hl.same_padding(5, 3)
    (1, 1)
    >>> hl.same_padding((224, 224), 7, stride=2)
    ((2, 3), (2, 3))
    """
    name = "same_padding"
    sizes, many = _numbers(name, "size", size, 1)
    n = len(sizes)
    rest = [
        _check.integers(name, what, value, n, 1)
        for what, value in (("kernel_size", kernel_size), ("stride", stride), ("dilation", dilation))
    ]
    result = tuple(_same(*axis) for axis in zip(sizes, *rest, strict=True))
    return result if many else result[0]


def conv_parameters(in_channels: int, out_channels: int, kernel_size: Any, groups: int = 1, bias: bool = True) -> int:
    """How many learnable numbers a convolution layer has.

    Parameters
    ----------
    in_channels, out_channels : int
        At least 1, divisible by `groups`.
    kernel_size : int or tuple of int
        A number k means k x k; a tuple has one number for each axis.
    groups : int
    bias : bool

    Returns
    -------
    int
        The elements of the filters, and one for each output channel with a bias.

    Raises
    ------
    TypeError, ValueError
        No integer; out of range; channels that `groups` does not divide.

    Examples
    --------
    >>> import hotloops as hl
    >>> hl.conv_parameters(3, 8, 3)
    224
    """
    name = "conv_parameters"
    groups = _check.integer(name, "groups", groups, 1)
    c = _check.integer(name, "in_channels", in_channels, 1)
    f = _check.integer(name, "out_channels", out_channels, 1)
    if c % groups or f % groups:
        raise ValueError(f"{name}: groups {groups} must divide in_channels {c} and out_channels {f}")
    kernel, many = _numbers(name, "kernel_size", kernel_size, 1)
    taps = math.prod(kernel if many else kernel * 2)
    return f * (c // groups) * taps + (f if _check.flag(name, "bias", bias) else 0)


# -------------------------------------------------------------------------------------------------------- convolution


class _Plan(NamedTuple):
    """A checked convolution: the shapes that the kernels see (three axes, batched), the result's shape, the scalars."""

    x: tuple[int, ...]
    w: tuple[int, ...]
    y: tuple[int, ...]
    result: tuple[int, ...]
    scalars: dict[str, int]


def _lift(shape: tuple[int, ...]) -> tuple[int, ...]:
    """[A, B, *axes] with ones in front of the axes, so that there are three."""
    return (*shape[:2], *(1,) * (5 - len(shape)), *shape[2:])


def _check_shapes(op: str, n: int, x: tuple[int, ...], w: tuple[int, ...], groups: Any) -> tuple[tuple[int, ...], int]:
    """(the batched shape of the input, groups)."""
    groups = _check.integer(op, "groups", groups, 1)
    if len(w) != n + 2:
        raise ValueError(f"{op}: weight must have {n + 2} axes, the shape {w} came")
    if len(x) not in (n + 1, n + 2):
        raise ValueError(f"{op}: input must have {n + 2} axes ({n + 1} without a batch), the shape {x} came")
    batched = x if len(x) == n + 2 else (1, *x)
    if 0 in batched[2:] or 0 in w[2:]:
        raise ValueError(f"{op}: an axis of the input {x} or the weight {w} has no elements")
    return batched, groups


def _scalars(n: int, outputs: Any, kernel: Any, stride: Any, pads: Any, dilation: Any, groups: int) -> dict[str, int]:
    """The kernels' scalars. A stride between less than two outputs, a dilation of one tap mean nothing: they become 1."""
    stride = [s if o > 1 else 1 for s, o in zip(stride, outputs, strict=True)]
    dilation = [d if k > 1 else 1 for d, k in zip(dilation, kernel, strict=True)]
    scalars = {"groups": groups}
    for name, values, rest in (("stride", stride, 1), ("pad", [p[0] for p in pads], 0), ("dilation", dilation, 1)):
        lifted = [rest] * (3 - n) + list(values)
        scalars |= {f"{name}_{axis}": value for axis, value in zip(_AXES, lifted, strict=True)}
    return scalars


def _plan(op: str, n: int, x: Any, w: Any, stride: Any, padding: Any, dilation: Any, groups: Any) -> _Plan:
    batched, groups = _check_shapes(op, n, x, w, groups)
    strides = _check.integers(op, "stride", stride, n, 1)
    dilations = _check.integers(op, "dilation", dilation, n, 1)
    pads = _paddings(op, padding, n, w[2:], strides, dilations)
    if w[0] % groups or (w[0] == 0 and groups > 1):
        raise ValueError(f"{op}: groups {groups} must divide the {w[0]} filters of weight")
    if batched[1] != w[1] * groups:
        raise ValueError(
            f"{op}: input {x} has {batched[1]} channels, weight {w} with groups {groups} needs {w[1] * groups}; "
            "weight is [filters, channels / groups, *kernel]"
        )
    outputs = tuple(_outputs(op, *axis) for axis in zip(batched[2:], w[2:], strides, pads, dilations, strict=True))
    y = (batched[0], w[0], *outputs)
    scalars = _scalars(n, outputs, w[2:], strides, pads, dilations, groups)
    return _Plan(_lift(batched), _lift(w), _lift(y), y if len(x) == n + 2 else y[1:], scalars)


def _check_there(op: str, **arrays: Any) -> None:
    for name, value in arrays.items():
        if value is None:
            raise TypeError(f"{op}: {name} must be an array, None came")


def _check_bias(op: str, bias: Any, channels: int) -> None:
    if bias is not None and tuple(bias.shape) != (channels,):
        raise ValueError(f"{op}: bias must have the shape ({channels},), {tuple(bias.shape)} came")


def _conv(
    op: str, n: int, input: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: Any,
    activation: Any, out: Any = None,
) -> Any:  # fmt: skip
    _check_there(op, input=input, weight=weight)
    call = Call(op, out)
    x, w, b = call.floats(input=input, weight=weight, bias=bias)
    plan = _plan(op, n, tuple(x.shape), tuple(w.shape), stride, padding, dilation, groups)
    _check_bias(op, b, plan.w[0])
    function = _activation._function(op, activation)
    y = call.result(plan.result)
    arrays = x.reshape(plan.x), w.reshape(plan.w), b, y.reshape(plan.y)
    call.run("conv", *arrays, exact=_dispatch.exact(), activation=function, **plan.scalars)
    return call.finish(y)


@op(repeats=True)
def conv1d(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
    out: Any = None,
) -> Any:
    """The cross-correlation of a signal with filters; see `conv2d`.

    Parameters
    ----------
    input : float[N, C, W] or float[C, W]
    weight : float[F, C/groups, K]
    bias : float[F], optional
    stride, dilation : int or (int,)
    padding : int, (int,), ((left, right),), "same" or "valid"
    groups : int
    activation : str, optional
    out : array, optional
        Where the result goes.

    Returns
    -------
    float[N, F, OW] or float[F, OW]

    Raises
    ------
    TypeError, ValueError
        As `conv2d`.

    Notes
    -----
    In float32, filters of 2 to 5 taps may run as Winograd's algorithm: see `exact_convolution`.

    Examples
    --------
    >>> import numpy as np, hotloops as hl
    >>> hl.conv1d(np.array([[1.0, 2.0, 4.0]]), np.array([[[-1.0, 1.0]]]))
    array([[1., 2.]])
    """
    return _conv("conv1d", 1, input, weight, bias, stride, padding, dilation, groups, activation, out)


@op(repeats=True)
def conv2d(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
    out: Any = None,
) -> Any:
    """The cross-correlation of images with filters: the sum of products under a window at every position, plus a bias.

    Parameters
    ----------
    input : float[N, C, H, W] or float[C, H, W]
        float16, float32 or float64; without the batch axis the result has none either.
    weight : float[F, C/groups, KH, KW]
        One filter per output channel. It is not flipped.
    bias : float[F], optional
    stride : int or (int, int)
        Pixels between windows, down and right.
    padding : int, (int, int), ((top, bottom), (left, right)), "same" or "valid"
        Zeros around the image. "same" keeps its size (stride 1; an odd one goes to the bottom and the right), "valid" is 0.
    dilation : int or (int, int)
        Pixels between the taps of a filter.
    groups : int
        The channels and the filters fall into so many groups that do not see each other; C of them: depthwise.
    activation : {"relu", "relu6", "sigmoid", "tanh", "silu", "gelu"}, optional
        A function of each result, applied on its way out: no second pass over memory.
    out : array, optional
        Where the result goes: its shape and element type; may overlap an input.

    Returns
    -------
    float[N, F, OH, OW] or float[F, OH, OW]
        In the wider element type of the inputs. OH and OW as `conv_output_size` says.

    Raises
    ------
    TypeError
        Element types that are no float; options that are no integers.
    ValueError
        Shapes that do not fit together; options out of range; a window larger than the padded image; an unknown activation.
    MemoryError
        A result larger than any memory.

    Notes
    -----
    In float32, square filters and those of one row or column may run as Winograd's algorithm: see `exact_convolution`.
    Source: Dumoulin and Visin, A guide to convolution arithmetic for deep learning, arXiv 1603.07285.

    Examples
    --------
    >>> import numpy as np, hotloops as hl
    >>> x = np.array([[[1.0, 2, 3, 4], [5, 6, 7, 8], [9, 1, 2, 3], [4, 5, 6, 7]]])
    >>> k = np.array([[[[1.0, 0, -1], [1, 0, -1], [1, 0, -1]]]])
    >>> hl.conv2d(x, k, stride=2, padding=1)
    array([[[ -8.,  -4.],
            [-12.,  -6.]]])
    """
    return _conv("conv2d", 2, input, weight, bias, stride, padding, dilation, groups, activation, out)


@op(repeats=True)
def conv3d(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
    out: Any = None,
) -> Any:
    """The cross-correlation of volumes with filters; see `conv2d`.

    Parameters
    ----------
    input : float[N, C, D, H, W] or float[C, D, H, W]
    weight : float[F, C/groups, KD, KH, KW]
    bias : float[F], optional
    stride, dilation : int or (int, int, int)
    padding : int, three ints, three pairs, "same" or "valid"
    groups : int
    activation : str, optional
    out : array, optional
        Where the result goes.

    Returns
    -------
    float[N, F, OD, OH, OW] or float[F, OD, OH, OW]

    Raises
    ------
    TypeError, ValueError, MemoryError
        As `conv2d`.

    Notes
    -----
    In float32, many filters may run as Winograd's algorithm, slice by slice: see `exact_convolution`.

    Examples
    --------
    >>> import numpy as np, hotloops as hl
    >>> hl.conv3d(np.ones((1, 2, 2, 2)), np.ones((1, 1, 2, 2, 2)))
    array([[[[8.]]]])
    """
    return _conv("conv3d", 3, input, weight, bias, stride, padding, dilation, groups, activation, out)


# --------------------------------------------------------------------------------------------------------- transposed


def _transposed_plan(
    op: str, n: int, y: Any, w: Any, stride: Any, padding: Any, output_padding: Any, groups: Any, dilation: Any
) -> _Plan:
    """The plan of the convolution whose adjoint is meant: its output is our input."""
    batched, groups = _check_shapes(op, n, y, w, groups)
    strides = _check.integers(op, "stride", stride, n, 1)
    dilations = _check.integers(op, "dilation", dilation, n, 1)
    extra = _check.integers(op, "output_padding", output_padding, n, 0)
    if isinstance(padding, str):
        raise TypeError(f"{op}: padding must be a number, {n} numbers or {n} pairs, {_check.shown(padding)} came")
    pads = _paddings(op, padding, n, w[2:], strides, dilations)
    if batched[1] != w[0] or w[0] % groups or (w[0] == 0 and groups > 1):
        raise ValueError(
            f"{op}: input {y} has {batched[1]} channels, weight {w} needs {w[0]}, divisible by groups {groups}; "
            "weight is [channels, filters / groups, *kernel]"
        )
    sizes = []
    for size, k, s, pad, d, e in zip(batched[2:], w[2:], strides, pads, dilations, extra, strict=True):
        if e >= max(s, d):
            raise ValueError(f"{op}: output_padding {e} must be smaller than the stride {s} or the dilation {d}")
        full = (size - 1) * s + d * (k - 1) + 1 + e
        if full - sum(pad) < 1:
            raise ValueError(f"{op}: padding {_check.shown(pad)} leaves nothing of an axis of {_check.shown(full)}")
        if full > _SIZE_LIMIT:
            raise MemoryError(f"{op}: the result would have an axis of {_check.shown(full)}, more than any memory holds")
        sizes.append(full - sum(pad))
    x = (batched[0], w[1] * groups, *sizes)
    scalars = _scalars(n, batched[2:], w[2:], strides, pads, dilations, groups)
    return _Plan(_lift(x), _lift(w), _lift(batched), x if len(y) == n + 2 else x[1:], scalars)


def _conv_transpose(
    op: str, n: int, input: Any, weight: Any, bias: Any, stride: Any, padding: Any, output_padding: Any, groups: Any,
    dilation: Any, out: Any,
) -> Any:  # fmt: skip
    _check_there(op, input=input, weight=weight)
    call = Call(op, out)
    y, w, b = call.floats(input=input, weight=weight, bias=bias)
    plan = _transposed_plan(op, n, tuple(y.shape), tuple(w.shape), stride, padding, output_padding, groups, dilation)
    _check_bias(op, b, plan.x[1])
    x = call.result(plan.result)
    call.run("conv_grad_input", y.reshape(plan.y), w.reshape(plan.w), b, x.reshape(plan.x), exact=_dispatch.exact(), **plan.scalars)
    return call.finish(x)


@op(repeats=True)
def conv_transpose1d(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
    *,
    out: Any = None,
) -> Any:
    """The adjoint of `conv1d` applied to a signal; see `conv_transpose2d`.

    Parameters
    ----------
    input : float[N, C, W] or float[C, W]
    weight : float[C, F/groups, K]
    bias : float[F], optional
    stride, padding, output_padding, dilation : int or (int,)
    groups : int
    out : array, optional
        Where the result goes.

    Returns
    -------
    float[N, F, OW] or float[F, OW]

    Raises
    ------
    TypeError, ValueError, MemoryError
        As `conv_transpose2d`.

    Examples
    --------
    >>> import numpy as np, hotloops as hl
    >>> hl.conv_transpose1d(np.array([[1.0, 2.0]]), np.array([[[1.0, 10.0]]]), stride=2)
    array([[ 1., 10.,  2., 20.]])
    """
    return _conv_transpose("conv_transpose1d", 1, input, weight, bias, stride, padding, output_padding, groups, dilation, out)


@op(repeats=True)
def conv_transpose2d(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
    *,
    out: Any = None,
) -> Any:
    """The adjoint of `conv2d` applied to images: every pixel adds its multiple of the filters to the result.

    Parameters
    ----------
    input : float[N, C, H, W] or float[C, H, W]
    weight : float[C, F/groups, KH, KW]
    bias : float[F], optional
    stride : int or (int, int)
        Pixels of the result between the places where neighbouring pixels add.
    padding : int, (int, int) or ((top, bottom), (left, right))
        How much is cut off the result's border.
    output_padding : int or (int, int)
        Rows and columns added at the bottom and the right; smaller than the stride or the dilation.
    groups : int
    dilation : int or (int, int)
    out : array, optional
        Where the result goes.

    Returns
    -------
    float[N, F, OH, OW] or float[F, OH, OW]
        OH = (H - 1) stride - top - bottom + dilation (KH - 1) + output_padding + 1.

    Raises
    ------
    TypeError, ValueError, MemoryError
        As `conv2d`; an `output_padding` that is too large; a `padding` that leaves nothing.

    Notes
    -----
    Source: Dumoulin and Visin, A guide to convolution arithmetic for deep learning, arXiv 1603.07285, chapter 4.

    Examples
    --------
    >>> import numpy as np, hotloops as hl
    >>> hl.conv_transpose2d(np.array([[[2.0]]]), np.array([[[[1.0, 2.0], [3.0, 4.0]]]]))
    array([[[2., 4.],
            [6., 8.]]])
    """
    return _conv_transpose("conv_transpose2d", 2, input, weight, bias, stride, padding, output_padding, groups, dilation, out)


@op(repeats=True)
def conv_transpose3d(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
    *,
    out: Any = None,
) -> Any:
    """The adjoint of `conv3d` applied to volumes; see `conv_transpose2d`.

    Parameters
    ----------
    input : float[N, C, D, H, W] or float[C, D, H, W]
    weight : float[C, F/groups, KD, KH, KW]
    bias : float[F], optional
    stride, padding, output_padding, dilation : int or (int, int, int)
    groups : int
    out : array, optional
        Where the result goes.

    Returns
    -------
    float[N, F, OD, OH, OW] or float[F, OD, OH, OW]

    Raises
    ------
    TypeError, ValueError, MemoryError
        As `conv_transpose2d`.

    Examples
    --------
    >>> import numpy as np, hotloops as hl
    >>> hl.conv_transpose3d(np.ones((1, 1, 1, 2)), np.ones((1, 1, 1, 1, 2)))
    array([[[[1., 2., 1.]]]])
    """
    return _conv_transpose("conv_transpose3d", 3, input, weight, bias, stride, padding, output_padding, groups, dilation, out)


# ---------------------------------------------------------------------------------------------------------- gradients


def _gradients(call: Call, plan: _Plan, g: Any, x: Any, w: Any, shapes: Any, needs: Sequence[bool]) -> Any:
    """(gradient by input, weight, bias) of a convolution, None for each that `needs` leaves out. `shapes`: of input and weight;
    x and w may be None where no gradient needs them."""
    if tuple(g.shape) != plan.result:
        raise ValueError(f"{call.op}: grad_output must have the result's shape {plan.result}, {tuple(g.shape)} came")
    gx = gw = gb = None
    g5 = g.reshape(plan.y)
    if needs[0]:
        gx = call.empty(shapes[0])
        call.run("conv_grad_input", g5, w.reshape(plan.w), None, gx.reshape(plan.x), exact=_dispatch.exact(), **plan.scalars)
    if needs[1]:
        gw = call.empty(shapes[1])
        call.run("conv_grad_weight", g5, x.reshape(plan.x), gw.reshape(plan.w), exact=_dispatch.exact(), **plan.scalars)
    if needs[2]:
        gb = _grad_bias(call, g5)
    return tuple(None if a is None else call.finish(a) for a in (gx, gw, gb))


def _grad_bias(call: Call, gy: Any) -> Any:
    gb = call.empty((gy.shape[1],))
    call.run("conv_grad_bias", gy.reshape((*gy.shape[:2], math.prod(gy.shape[2:]))), gb)
    return gb


@op(repeats=True)
def conv2d_backward(
    grad_output: Any,
    input: Any,
    weight: Any,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Any, Any, Any]:
    """The gradients of `conv2d` by its input, weight and bias.

    Parameters
    ----------
    grad_output : float[N, F, OH, OW] or float[F, OH, OW]
        The gradient by the result.
    input, weight, stride, padding, dilation, groups
        What `conv2d` got.
    needs : (bool, bool, bool)
        Which of the three are wanted.

    Returns
    -------
    grad_input : float[N, C, H, W] or float[C, H, W] or None
    grad_weight : float[F, C/groups, KH, KW] or None
    grad_bias : float[F] or None

    Raises
    ------
    TypeError, ValueError
        As `conv2d`; a `grad_output` that has not the result's shape.

    Examples
    --------
    >>> import numpy as np, hotloops as hl
    >>> x, w = np.array([[[1.0, 2.0]]]), np.array([[[[3.0]]]])
    >>> gx, gw, gb = hl.conv2d_backward(np.array([[[1.0, 10.0]]]), x, w)
    >>> gx, gw, gb
    (array([[[ 3., 30.]]]), array([[[[21.]]]]), array([11.]))
    """
    if not isinstance(needs, list | tuple) or len(needs) != 3:
        raise ValueError(f"conv2d_backward: needs must be three booleans, {_check.shown(needs)} came")
    wanted = [_check.flag("conv2d_backward", "needs", n) for n in needs]
    _check_there("conv2d_backward", grad_output=grad_output, input=input, weight=weight)
    call = Call("conv2d_backward")
    g, x, w = call.floats(grad_output=grad_output, input=input, weight=weight)
    shapes = tuple(x.shape), tuple(w.shape)
    plan = _plan("conv2d_backward", 2, *shapes, stride, padding, dilation, groups)
    return _gradients(call, plan, g, x, w, shapes, wanted)


def _conv_forward(n: int) -> Any:
    """With an activation what came into it is kept for the gradient."""
    conv = (conv1d, conv2d, conv3d)[n - 1]

    def forward(a: Any) -> tuple[Any, Any]:
        z = conv(a.input, a.weight, a.bias, a.stride, a.padding, a.dilation, a.groups)
        return (z, None) if a.activation is None else (_activation._activated(conv.__name__, z, a.activation), z)

    return forward


@op(repeats=True)
def _conv_gradients(
    name: str,
    g: Any,
    x: Any,
    w: Any,
    x_shape: tuple[int, ...],
    w_shape: tuple[int, ...],
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
    with_bias: bool,
) -> Any:
    """As `_gradients`: by the input where there is the weight, by the weight where there is the input."""
    call = Call(name)
    g, x, w = call.floats(grad_output=g, input=x, weight=w)
    plan = _plan(name, len(w_shape) - 2, x_shape, w_shape, stride, padding, dilation, groups)
    return _gradients(call, plan, g, x, w, (x_shape, w_shape), (w is not None, x is not None, with_bias))


def _conv_gradient(g: Any, z: Any, a: Any) -> tuple[Any, ...]:
    shapes = tuple(a.input.shape), tuple(a.weight.shape)
    name = f"conv{len(shapes[1]) - 2}d"
    if a.activation is not None:
        g = _activation._activation_gradient(name, g, z, a.activation)
    x, w = a.input if "weight" in a.needs else None, a.weight if "input" in a.needs else None
    return _conv_gradients(name, g, x, w, *shapes, a.stride, a.padding, a.dilation, a.groups, "bias" in a.needs)


def _conv_transpose_gradient(g: Any, y: Any, a: Any) -> tuple[Any, ...]:
    """The adjoint of an adjoint: the convolution itself; the weight sees input and gradient in exchanged places."""
    n = len(a.weight.shape) - 2
    op = f"conv_transpose{n}d"
    call = Call(op)
    g, y, w = call.floats(grad_output=g, input=a.input, weight=a.weight)
    plan = _transposed_plan(op, n, tuple(y.shape), tuple(w.shape), a.stride, a.padding, a.output_padding, a.groups, a.dilation)
    gy = gw = gb = None
    g5 = g.reshape(plan.x)
    if "input" in a.needs:
        gy = call.empty(y.shape)
        arrays = g5, w.reshape(plan.w), None, gy.reshape(plan.y)
        call.run("conv", *arrays, exact=_dispatch.exact(), activation=0, **plan.scalars)
    if "weight" in a.needs:
        gw = call.empty(w.shape)
        call.run("conv_grad_weight", y.reshape(plan.y), g5, gw.reshape(plan.w), exact=_dispatch.exact(), **plan.scalars)
    if "bias" in a.needs:
        gb = _grad_bias(call, g5)
    return tuple(None if r is None else call.finish(r) for r in (gy, gw, gb))


# -------------------------------------------------------------------------------------------- deformable convolution


def _deform_plan(
    op: str, shapes: Any, stride: Any, padding: Any, dilation: Any
) -> tuple[tuple[int, ...], tuple[int, ...], dict[str, int]]:
    """(the shape of the result, [N, OG, KH, KW], the kernels' scalars) from the shapes of input, offset, weight and mask."""
    x, offset, weight, mask = shapes
    if len(x) != 4:
        raise ValueError(f"{op}: input must be [N, C, H, W], the shape {x} came")
    groups = x[1] // weight[1] if len(weight) == 4 and weight[1] else 1
    plan = _plan(op, 2, x, weight, stride, padding, dilation, max(groups, 1))
    taps = weight[2] * weight[3]
    offset_groups = offset[1] // (2 * taps) if len(offset) == 4 else 0
    if offset_groups < 1 or x[1] % offset_groups or offset != (x[0], 2 * offset_groups * taps, *plan.result[2:]):
        raise ValueError(
            f"{op}: offset must be [{x[0]}, 2*G*{taps}, {plan.result[2]}, {plan.result[3]}] (the batch, two coordinates for each "
            f"of G offset groups and {taps} taps, the result's size), G a divisor of the {x[1]} channels; the shape {offset} came"
        )
    needed = (x[0], offset_groups * taps, *plan.result[2:])
    if mask is not None and mask != needed:
        raise ValueError(f"{op}: mask must have the shape {needed}, one number for each place of offset; {mask} came")
    scalars = {k: v for k, v in plan.scalars.items() if not k.endswith("_d")}
    return plan.result, (x[0], offset_groups, *weight[2:]), scalars


@op(repeats=True)
def deform_conv2d(
    input: Any,
    offset: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    mask: Any = None,
    *,
    out: Any = None,
) -> Any:
    """The convolution of images whose every tap reads beside its place, by an offset of its own: the deformable convolution.

    Parameters
    ----------
    input : float[N, C, H, W]
        float16, float32 or float64.
    offset : float[N, 2*G*KH*KW, OH, OW]
        In pixels, down and then to the right, for each of G offset groups and each tap of the filter, row by row. The channels
        fall into the G groups in order; G follows from the shape. Between pixels the image is interpolated bilinearly, around
        it stands 0. An offset of 2**30 or more, or infinite, leads outside; NaN gives NaN.
    weight : float[F, C/groups, KH, KW]
        The number of groups follows from the shapes.
    bias : float[F], optional
    stride, padding, dilation
        As for `conv2d`.
    mask : float[N, G*KH*KW, OH, OW], optional
        What each sample is multiplied with (version 2 of the paper).
    out : array, optional
        Where the result goes.

    Returns
    -------
    float[N, F, OH, OW]
        In the wider element type of the inputs.

    Raises
    ------
    TypeError, ValueError, MemoryError
        As `conv2d`; an offset or a mask whose shape does not fit.

    Notes
    -----
    All four pixels around a place count: an infinite one with the weight 0 makes a NaN. The gradient by an offset that is a whole
    number, where the slope jumps, is that towards larger coordinates.

    Source: Dai et al., Deformable convolutional networks, arXiv 1703.06211; Zhu et al., Deformable ConvNets v2, arXiv
    1811.11168; torchvision.ops.deform_conv2d.

    Examples
    --------
    >>> import numpy as np, hotloops as hl
    >>> x = np.array([[[[1.0, 2.0, 4.0]]]])
    >>> offset = np.zeros((1, 2, 1, 3))
    >>> offset[0, 1] = [[0.5, 1.0, 0.25]]  # to the right; the last reads a quarter of the 0 behind the image
    >>> hl.deform_conv2d(x, offset, np.ones((1, 1, 1, 1)))
    array([[[[1.5, 4. , 3. ]]]])
    """
    name = "deform_conv2d"
    _check_there(name, input=input, offset=offset, weight=weight)
    call = Call(name, out)
    x, o, w, b, m = call.floats(input=input, offset=offset, weight=weight, bias=bias, mask=mask)
    shapes = [None if a is None else tuple(a.shape) for a in (x, o, w, m)]
    result, place, scalars = _deform_plan(name, shapes, stride, padding, dilation)
    _check_bias(name, b, result[1])
    y = call.result(result)
    o, m = _at_places(o, m, place, result[2:])
    call.run("deform_conv", x, o, m, w, b, y, **scalars)
    return call.finish(y)


def _at_places(offset: Any, mask: Any, place: tuple[int, ...], size: tuple[int, ...]) -> tuple[Any, Any]:
    """offset and mask, either of which may be missing, as the kernels see them: [N, OG, KH, KW, (2,) OH, OW]."""
    return (
        None if offset is None else offset.reshape((*place, 2, *size)),
        None if mask is None else mask.reshape((*place, *size)),
    )


def _deform_conv_gradient(g: Any, y: Any, a: Any) -> tuple[Any, ...]:
    call = Call("deform_conv2d")
    g, x, o, w, m = call.floats(grad_output=g, input=a.input, offset=a.offset, weight=a.weight, mask=a.mask)
    shapes = [None if v is None else tuple(v.shape) for v in (x, o, w, m)]
    result, place, scalars = _deform_plan("deform_conv2d", shapes, a.stride, a.padding, a.dilation)
    named = {"input": x, "offset": o, "weight": w, "mask": m}
    gx, go, gw, gm = (call.empty(v.shape) if name in a.needs and v is not None else None for name, v in named.items())
    gb = None
    o, m = _at_places(o, m, place, result[2:])
    if not (gx is None and go is None and gm is None):
        call.run("deform_conv_grad_samples", g, x, o, m, w, gx, *_at_places(go, gm, place, result[2:]), **scalars)
    if gw is not None:
        call.run("deform_conv_grad_weight", g, x, o, m, gw, **scalars)
    if "bias" in a.needs:
        gb = _grad_bias(call, g)
    return tuple(None if v is None else call.finish(v) for v in (gx, go, gw, gb, gm))


# ------------------------------------------------------------------------------------------------------------ patches


def _patch_plan(op: str, size: Any, kernel: Any, stride: Any, padding: Any, dilation: Any) -> tuple[Any, Any, dict[str, int]]:
    """(kernel size, windows down and right, the kernels' scalars)."""
    kernel = _check.integers(op, "kernel_size", kernel, 2, 1)
    strides = _check.integers(op, "stride", stride, 2, 1)
    dilations = _check.integers(op, "dilation", dilation, 2, 1)
    pads = _paddings(op, padding, 2, kernel, strides, dilations)
    outputs = tuple(_outputs(op, *axis) for axis in zip(size, kernel, strides, pads, dilations, strict=True))
    scalars = _scalars(2, outputs, kernel, strides, pads, dilations, 1)
    return kernel, outputs, {k: v for k, v in scalars.items() if k[-2:] in ("_h", "_w")}


def _image_shape(op: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """[N, C, H, W] of a batch or a single image."""
    if len(shape) not in (3, 4) or 0 in shape[-2:]:
        raise ValueError(f"{op}: input must be [N, C, H, W] or [C, H, W] with pixels, the shape {shape} came")
    return shape if len(shape) == 4 else (1, *shape)


@op(repeats=True)
def unfold(input: Any, kernel_size: Any, dilation: Any = 1, padding: Any = 0, stride: Any = 1, *, out: Any = None) -> Any:
    """The patches under a sliding window, one column each.

    Parameters
    ----------
    input : float[N, C, H, W] or float[C, H, W]
    kernel_size, dilation, stride : int or (int, int)
    padding : int, (int, int), ((top, bottom), (left, right)), "same" or "valid"
    out : array, optional
        Where the result goes.

    Returns
    -------
    float[N, C*KH*KW, L] or float[C*KH*KW, L]
        L = OH*OW windows, row by row; a column lists its patch by channel, row, column.

    Raises
    ------
    TypeError, ValueError, MemoryError
        As `conv2d`.

    Examples
    --------
    >>> import numpy as np, hotloops as hl
    >>> hl.unfold(np.array([[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]]), 2)
    array([[1., 2.],
           [2., 3.],
           [4., 5.],
           [5., 6.]])
    """
    _check_there("unfold", input=input)
    call = Call("unfold", out)
    [x] = call.floats(input=input)
    n, c, h, w = _image_shape("unfold", tuple(x.shape))
    kernel, outputs, scalars = _patch_plan("unfold", (h, w), kernel_size, stride, padding, dilation)
    shape = (n, c * math.prod(kernel), math.prod(outputs))
    cols = call.result(shape if x.ndim == 4 else shape[1:])
    call.run("unfold", x.reshape((n, c, h, w)), cols.reshape((n, c, *kernel, *outputs)), **scalars)
    return call.finish(cols)


@op(repeats=True)
def fold(
    input: Any, output_size: Any, kernel_size: Any, dilation: Any = 1, padding: Any = 0, stride: Any = 1, *, out: Any = None
) -> Any:
    """The image whose every pixel is the sum of what the columns of patches hold of it: the adjoint of `unfold`.

    Parameters
    ----------
    input : float[N, C*KH*KW, L] or float[C*KH*KW, L]
        L windows, as many as `unfold` makes of an image of `output_size`.
    output_size : int or (int, int)
    kernel_size, dilation, stride : int or (int, int)
    padding : int, (int, int), ((top, bottom), (left, right)), "same" or "valid"
    out : array, optional
        Where the result goes.

    Returns
    -------
    float[N, C, H, W] or float[C, H, W]

    Raises
    ------
    TypeError, ValueError, MemoryError
        As `conv2d`; a number of rows or columns that does not fit.

    Examples
    --------
    >>> import numpy as np, hotloops as hl
    >>> hl.fold(np.ones((4, 2)), (2, 3), 2)
    array([[[1., 2., 1.],
            [1., 2., 1.]]])
    """
    _check_there("fold", input=input)
    call = Call("fold", out)
    [cols] = call.floats(input=input)
    size = _check.integers("fold", "output_size", output_size, 2, 1)
    kernel, outputs, scalars = _patch_plan("fold", size, kernel_size, stride, padding, dilation)
    shape = tuple(cols.shape)
    taps = math.prod(kernel)
    if len(shape) not in (2, 3) or shape[-2] % taps or shape[-1] != math.prod(outputs):
        raise ValueError(
            f"fold: input must be [N, C*KH*KW, L] or [C*KH*KW, L] with rows divisible by {_check.shown(taps)} and "
            f"L = {_check.shown(math.prod(outputs))} windows, the shape {shape} came"
        )
    n, c = (shape[0] if len(shape) == 3 else 1), shape[-2] // taps
    x = call.result((n, c, *size) if len(shape) == 3 else (c, *size))
    call.run("fold", cols.reshape((n, c, *kernel, *outputs)), x.reshape((n, c, *size)), **scalars)
    return call.finish(x)


@op(repeats=True)
def im2col(input: Any, kernel_size: Any, *, stride: Any = 1, padding: Any = 0, dilation: Any = 1, out: Any = None) -> Any:
    """The patches under a sliding window, by position.

    Parameters
    ----------
    input : [N, C, H, W] or [C, H, W]
        Floats, integers or booleans.
    kernel_size, stride, dilation : int or (int, int)
    padding : int, (int, int), ((top, bottom), (left, right)), "same" or "valid"
    out : array, optional
        Where the result goes.

    Returns
    -------
    [N, OH, OW, C, KH, KW] or [OH, OW, C, KH, KW]
        In the element type of the input; 0 in the padding.

    Raises
    ------
    TypeError, ValueError, MemoryError
        As `conv2d`.

    Examples
    --------
    >>> import numpy as np, hotloops as hl
    >>> hl.im2col(np.array([[[1, 2, 3]]]), (1, 2))
    array([[[[[1, 2]]],
    <BLANKLINE>
    <BLANKLINE>
            [[[2, 3]]]]])
    """
    call = Call("im2col", out)
    integers = None
    if not is_device(input):
        array = _check.host_array("im2col", "input", input)
        if array.dtype.kind != "f":  # only moved, never computed with: bits in the guise of floats
            integers = array.dtype.newbyteorder("=")
            input = np.ascontiguousarray(array, integers if integers.itemsize >= 4 else np.int32)
            input = input.view(np.float64 if input.itemsize == 8 else np.float32)
            call.out = None
    [x] = call.floats(input=input)
    shape = _image_shape("im2col", tuple(x.shape))
    kernel, outputs, scalars = _patch_plan("im2col", shape[2:], kernel_size, stride, padding, dilation)
    full = (shape[0], *outputs, shape[1], *kernel)
    cols = call.result(full if len(x.shape) == 4 else full[1:])
    call.run("im2col", x.reshape(shape), cols.reshape(full), **scalars)
    if integers is None:
        return call.finish(cols)
    moved = cols.view(integers if integers.itemsize >= 4 else np.int32).astype(integers, copy=False)
    if out is None:
        return moved
    call.out = out
    call._check_out(moved.shape, integers)
    out[...] = moved
    return out


@op(repeats=True)
def col2im(cols: Any, output_size: Any, *, stride: Any = 1, padding: Any = 0, dilation: Any = 1, out: Any = None) -> Any:
    """The image whose every pixel is the sum of what the patches hold of it: the adjoint of `im2col`.

    Parameters
    ----------
    cols : float[N, OH, OW, C, KH, KW] or float[OH, OW, C, KH, KW]
    output_size : int or (int, int)
    stride, dilation : int or (int, int)
    padding : int, (int, int), ((top, bottom), (left, right)), "same" or "valid"
    out : array, optional
        Where the result goes.

    Returns
    -------
    float[N, C, H, W] or float[C, H, W]

    Raises
    ------
    TypeError, ValueError, MemoryError
        As `conv2d`; patches whose number does not fit `output_size`.

    Examples
    --------
    >>> import numpy as np, hotloops as hl
    >>> hl.col2im(np.ones((1, 2, 1, 1, 2)), (1, 3))
    array([[[1., 2., 1.]]])
    """
    _check_there("col2im", cols=cols)
    call = Call("col2im", out)
    [c] = call.floats(cols=cols)
    shape = tuple(c.shape)
    if len(shape) not in (5, 6):
        raise ValueError(f"col2im: cols must be [N, OH, OW, C, KH, KW] or [OH, OW, C, KH, KW], the shape {shape} came")
    full = shape if len(shape) == 6 else (1, *shape)
    size = _check.integers("col2im", "output_size", output_size, 2, 1)
    _, outputs, scalars = _patch_plan("col2im", size, full[4:], stride, padding, dilation)
    if full[1:3] != outputs:
        raise ValueError(f"col2im: an image of {size} has {outputs} windows, cols of shape {shape} holds {full[1:3]}")
    x = call.result((full[0], full[3], *size) if len(shape) == 6 else (full[3], *size))
    call.run("col2im", c.reshape(full), x.reshape((full[0], full[3], *size)), **scalars)
    return call.finish(x)


def _unfold_gradient(g: Any, y: Any, a: Any) -> tuple[Any, ...]:
    return (fold(g, a.input.shape[-2:], a.kernel_size, a.dilation, a.padding, a.stride),)


def _fold_gradient(g: Any, y: Any, a: Any) -> tuple[Any, ...]:
    return (unfold(g, a.kernel_size, a.dilation, a.padding, a.stride),)


def _im2col_gradient(g: Any, y: Any, a: Any) -> tuple[Any, ...]:
    return (col2im(g, a.input.shape[-2:], stride=a.stride, padding=a.padding, dilation=a.dilation),)


def _col2im_gradient(g: Any, y: Any, a: Any) -> tuple[Any, ...]:
    return (im2col(g, tuple(a.cols.shape[-2:]), stride=a.stride, padding=a.padding, dilation=a.dilation),)


# -------------------------------------------------------------------------------------------------- window by window


class Window(NamedTuple):
    """One position of a sliding filter: which rows and columns of the padded input it covers, and what it does there."""

    position: tuple[int, int]
    rows: tuple[int, int]
    columns: tuple[int, int]
    patch: np.ndarray
    products: np.ndarray
    sum: Any
    filter: np.ndarray

    def __str__(self) -> str:
        p, w = self.products.ravel().tolist(), self.filter.ravel().tolist()
        minus = [v < 0 or (v == 0 and k < 0) for v, k in zip(p, w, strict=True)]
        terms = "".join(f" {'-' if m else '+'} {abs(v):g}" for v, m in zip(p, minus, strict=True))
        terms = terms[3:] if not minus[0] else "-" + terms[3:]
        return (
            f"Position ({self.position[0]},{self.position[1]}): rows {self.rows[0]}-{self.rows[1]}, "
            f"cols {self.columns[0]}-{self.columns[1]}\n{_matrix(self.patch)}\n= {terms} = {self.sum:g}"
        )


class Trace(list[Window]):
    """The windows of a convolution, row by row, with the padded input and the result; prints all of them."""

    padded: np.ndarray
    result: np.ndarray

    def __str__(self) -> str:
        parts = [f"X_pad =\n{_matrix(self.padded)}", *map(str, self), f"Y =\n{_matrix(self.result)}"]
        return "\n\n".join(parts)


def _matrix(a: np.ndarray) -> str:
    """A matrix with its numbers in columns; channels one below the other."""
    texts = [[[f"{v:g}" for v in row] for row in plane] for plane in a.reshape(-1, *a.shape[-2:]).tolist()]
    width = max(len(t) for plane in texts for row in plane for t in row)
    return "\n\n".join("\n".join("[" + " ".join(t.rjust(width) for t in row) + "]" for row in plane) for plane in texts)


def conv2d_trace(input: Any, weight: Any, stride: Any = 1, padding: Any = 0) -> Trace:
    """The windows of a small convolution with one filter, one by one, as one would write them out by hand.

    Parameters
    ----------
    input : [H, W] or [C, H, W]
        Floats or integers.
    weight : [KH, KW] or [C, KH, KW]
        One filter, with as many axes as the input.
    stride : int or (int, int)
    padding : int, (int, int), ((top, bottom), (left, right)), "same" or "valid"

    Returns
    -------
    list of windows
        Each with `position`, `rows` and `columns` (first and last, in the padded input), `patch`, `products`, `sum`. The
        list has `padded` and `result` as well, and prints as text.

    Raises
    ------
    TypeError, ValueError
        As `conv2d`.

    Examples
    --------
    >>> import numpy as np, hotloops as hl
    >>> windows = hl.conv2d_trace(np.array([[1, 2, 3], [4, 5, 6]]), np.array([[1, -1], [0, 1]]))
    >>> print(windows[0])
    Position (0,0): rows 0-1, cols 0-1
    [1 2]
    [4 5]
    = 1 - 2 + 0 + 5 = 4
    >>> windows.result
    array([[4, 5]])
    """
    name = "conv2d_trace"
    x, w = _check.host_array(name, "input", input), _check.host_array(name, "weight", weight)
    if x.ndim not in (2, 3) or w.ndim != x.ndim or w.shape[:-2] != x.shape[:-2] or 0 in x.shape or 0 in w.shape:
        raise ValueError(f"{name}: input [H, W] and weight [KH, KW], or [C, H, W] and [C, KH, KW]; {x.shape}, {w.shape} came")
    kernel = w.shape[-2:]
    strides = _check.integers(name, "stride", stride, 2, 1)
    pads = _paddings(name, padding, 2, kernel, strides, (1, 1))
    patches = im2col(x.reshape(-1, *x.shape[-2:]), kernel, stride=strides, padding=pads)
    dtype = np.result_type(x, w, *([] if x.dtype.kind == w.dtype.kind == "f" else [np.int64])).newbyteorder("=")
    w = np.array(w, dtype, order="C", subok=False)
    wide = w.astype(np.float32) if dtype == np.float16 else w
    trace = Trace()
    for i, j in np.ndindex(*patches.shape[:2]):
        patch = patches[i, j].reshape(w.shape)
        top, left = i * strides[0], j * strides[1]
        rows, columns = (top, top + kernel[0] - 1), (left, left + kernel[1] - 1)
        products = patch * wide
        trace.append(Window((i, j), rows, columns, patch, products.astype(dtype), products.sum().astype(dtype), w))
    trace.padded = np.pad(x, [(0, 0)] * (x.ndim - 2) + list(pads))
    trace.result = np.array([window.sum for window in trace], dtype).reshape(patches.shape[:2])
    return trace
