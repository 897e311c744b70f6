"""Pooling: the largest, the mean or a norm of windows, and its inverse."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import _check
from ._check import Call, op

MAX_TAPS = 2**60  # of a window, along each axis and in all: keeps every sum of sizes and paddings inside an int64
_AXES = ("d", "h", "w")
_BEFORE = ("pad_front", "pad_top", "pad_left")
_AFTER = ("pad_back", "pad_bottom", "pad_right")


# ----------------------------------------------------------------------------------------------------------- geometry


@dataclass(frozen=True)
class _Windows:
    """How windows lie over the spatial axes of an input: three of them, missing ones in front."""

    planes: int
    sizes: tuple[int, ...]
    out: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    dilation: tuple[int, ...]

    @property
    def taps(self) -> int:
        return math.prod(self.kernel)

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (self.planes, *self.sizes)

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (self.planes, *self.out)

    def scalars(self, *, before: bool = True, after: bool = False) -> dict[str, int]:
        """The scalars of a kernel by name."""
        named: dict[str, int] = {}
        for name, values in (("kernel", self.kernel), ("stride", self.stride), ("dilation", self.dilation)):
            named |= {f"{name}_{axis}": value for axis, value in zip(_AXES, values, strict=True)}
        if before:
            named |= dict(zip(_BEFORE, self.before, strict=True))
        if after:
            named |= dict(zip(_AFTER, self.after, strict=True))
        return named


def _spatial(name: str, shape: tuple[int, ...], dims: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(what stands before the spatial sizes, those sizes) of an input [C, ...] or [N, C, ...]."""
    layout = ", ".join(("C", *"DHW"[3 - dims :])) if dims > 1 else "C, L"
    if len(shape) not in (dims + 1, dims + 2):
        raise ValueError(f"{name}: input has the shape {_check.shown(tuple(shape))}, [{layout}] or [N, {layout}] is needed")
    lead, sizes = tuple(shape[:-dims]), tuple(shape[-dims:])
    if min(sizes) < 1 or lead == (0,):
        raise ValueError(f"{name}: input has the shape {_check.shown(tuple(shape))}, only N of [N, {layout}] may be 0")
    return lead, sizes


def _strides(name: str, stride: Any, kernel: tuple[int, ...]) -> tuple[int, ...]:
    """stride per axis, the kernel's sizes where none is given; torch takes an empty sequence for none."""
    if stride is None or (isinstance(stride, list | tuple) and not stride):
        return kernel
    return _check.integers(name, "stride", stride, len(kernel), low=1)


def _paddings(
    name: str, padding: Any, sizes: tuple[int, ...], kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> list[tuple[int, int]]:
    """(before, after) per axis. "same": as many windows as strides begin in the axis, the odd position after it."""
    dims = len(sizes)
    if isinstance(padding, str):
        if _check.one_of(name, "padding", padding, ("valid", "same")) == "valid":
            return [(0, 0)] * dims
        totals = [
            max((n - 1) // s * s + (k - 1) * d + 1 - n, 0) for n, k, s, d in zip(sizes, kernel, stride, dilation, strict=True)
        ]
        return [(t // 2, t - t // 2) for t in totals]
    if isinstance(padding, list | tuple) and any(isinstance(p, list | tuple) for p in padding):
        if len(padding) != dims or any(not isinstance(p, list | tuple) or len(p) != 2 for p in padding):
            raise ValueError(f"{name}: padding must be a number, {dims} numbers or {dims} pairs, {_check.shown(padding)} came")
        return [_check.integers(name, "padding", pair, 2, low=0) for pair in padding]  # type: ignore[misc]
    return [(p, p) for p in _check.integers(name, "padding", padding, dims, low=0)]


def _windows(
    name: str,
    shape: tuple[int, ...],
    dims: int,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    ceil_mode: Any,
) -> tuple[_Windows, tuple[int, ...]]:
    """(the windows, the shape of the result), from the arguments of a pooling op."""
    lead, sizes = _spatial(name, shape, dims)
    kernel = _check.integers(name, "kernel_size", kernel_size, dims, low=1)
    stride = _strides(name, stride, kernel)
    dilation = _check.integers(name, "dilation", dilation, dims, low=1)
    ceil_mode = _check.flag(name, "ceil_mode", ceil_mode)
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    if max(spans) > MAX_TAPS or math.prod(kernel) > MAX_TAPS:
        raise ValueError(
            f"{name}: a window of {_check.shown(kernel)} taps with dilation {_check.shown(dilation)} is larger than any input"
        )
    pads = _paddings(name, padding, sizes, kernel, stride, dilation)
    out = []
    for size, span, step, (before, after), gap in zip(sizes, spans, stride, pads, dilation, strict=True):
        if max(before, after) > span // 2:
            raise ValueError(
                f"{name}: padding must be at most half of the window, {span // 2}; "
                f"{_check.shown((before, after))} came for a window of {span}"
            )
        room = size + before + after - span
        windows = (-(-room // step) if ceil_mode else room // step) + 1
        if ceil_mode and (windows - 1) * step >= size + before:  # the last window begins inside of the input or before it
            windows -= 1
        if windows < 1:
            raise ValueError(f"{name}: a window of {span} does not fit into the padded input of {size + before + after}")
        if gap > size and any((o * step - before) % gap >= size for o in range(min(windows, -(-before // step)))):
            raise ValueError(f"{name}: with dilation {gap} a window lies in the padding alone, around an input of {size}")
        out.append(windows)
    one = (1,) * (3 - dims)
    zero = (0,) * (3 - dims)
    geometry = _Windows(
        planes=math.prod(lead),
        sizes=one + sizes,
        out=one + tuple(out),
        kernel=one + kernel,
        stride=one + tuple(1 if n == 1 else s for n, s in zip(out, stride, strict=True)),
        before=zero + tuple(before for before, _ in pads),
        after=zero + tuple(after for _, after in pads),
        dilation=one + tuple(1 if k == 1 else d for k, d in zip(kernel, dilation, strict=True)),
    )
    return geometry, (*lead, *out)


def _adaptive_windows(
    name: str, shape: tuple[int, ...], dims: int, output_size: Any
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """(the input's shape and the result's as kernels see them, the shape of the result); None in output_size keeps a size."""
    lead, sizes = _spatial(name, shape, dims)
    wanted = output_size if isinstance(output_size, list | tuple) else (output_size,)
    if len(wanted) not in (1, dims):
        raise ValueError(f"{name}: output_size must be a number or {dims} numbers, {_check.shown(output_size)} came")
    wanted = tuple(wanted) * dims if len(wanted) == 1 else tuple(wanted)
    out = tuple(
        n if w is None else _check.integer(name, "output_size", w, low=0, high=2**31 - 1)
        for n, w in zip(sizes, wanted, strict=True)
    )
    one = (1,) * (3 - dims)
    planes = math.prod(lead)
    return (planes, *one, *sizes), (planes, *one, *out), (*lead, *out)


# -------------------------------------------------------------------------------------------------------------- maxima


class _Numbers:
    """The input of a maximum, which may hold integers or booleans: as floats that order them in the same way.

    Up to 32 bits a float holds every integer; 64-bit ones beyond 2 ** 53 are replaced by their ranks.
    """

    def __init__(self, call: Call, value: Any):
        self.call = call
        self.dtype: np.dtype | None = None  # of the result, where it is no float
        self.values: np.ndarray | None = None  # by rank
        self.input: Any
        if _check.is_device(value):
            [self.input] = call.floats(integers=True, input=value)
            dtype = np.dtype(_check._dispatch.adapter("cuda").as_device(value).dtype)
            if dtype.kind != "f":
                if dtype.itemsize == 8:
                    raise TypeError(f"{call.op}: input has the element type {dtype}; on a GPU floats or up to 32 bits are needed")
                self.dtype = dtype
            return
        array = _check.host_array(call.op, "input", value)
        if array.dtype.kind == "f":
            [self.input] = call.floats(input=array)
            return
        self.dtype = array.dtype.newbyteorder("=")
        exact = np.float32 if array.dtype.itemsize <= 2 else np.float64
        if array.dtype.itemsize == 8 and array.size and (array.max() > 2**53 or array.min() < -(2**53)):
            self.values, ranks = np.unique(array, return_inverse=True)
            array = ranks.reshape(array.shape)
        [self.input] = call.floats(input=array.astype(exact))

    def result(self, shape: tuple[int, ...]) -> Any:
        """The array for a kernel to write the maxima to."""
        return self.call.result(shape) if self.dtype is None else self.call.empty(shape)

    def finish(self, y: Any) -> Any:
        """The maxima as the caller expects them."""
        if self.dtype is None:
            return self.call.finish(y)
        if self.call.space == "cuda":
            return self.call.finish(_check._dispatch.adapter("cuda").cast(y, self.dtype))
        result = self.call.result(y.shape, self.dtype)
        result[...] = y if self.values is None else self.values[y.astype(np.intp)]
        return self.call.finish(result)


def _no_out(name: str, out: Any, return_indices: bool) -> None:
    if return_indices and out is not None:
        raise TypeError(f"{name}: out cannot be given together with return_indices=True, which makes two results")


def _max_pool(
    dims: int,
    input: Any,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    ceil_mode: Any,
    return_indices: Any,
    out: Any = None,
) -> Any:
    """The op's result."""
    name = f"max_pool{dims}d"
    return_indices = _check.flag(name, "return_indices", return_indices)
    _no_out(name, out, return_indices)
    call = Call(name, out)
    numbers = _Numbers(call, input)
    x = numbers.input
    windows, shape = _windows(name, x.shape, dims, kernel_size, stride, padding, dilation, ceil_mode)
    y = numbers.result(shape)
    indices: Any = call.empty(windows.output_shape, np.int64) if return_indices else None
    arrays = x.reshape(windows.input_shape), y.reshape(windows.output_shape), indices, None
    call.run("max_pool", *arrays, **windows.scalars())
    y = numbers.finish(y)
    return (y, _give(call, indices.reshape(shape), input)) if return_indices else y


def _own(value: Any) -> Any:
    """The value; of an array a copy, where the caller could write to it before the gradient reads it: kernels trust that places
    lie in their windows."""
    return value.copy() if isinstance(value, np.ndarray) else value


def _give(call: Call, array: Any, example: Any) -> Any:
    """A second result, as the array kind that came."""
    return _check._dispatch.adapter("cuda").as_kind_of(array, example) if call.space == "cuda" else array


@op(repeats=True)
def _max_pool_places(
    dims: int, input: Any, kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: Any, return_indices: Any
) -> tuple[Any, ...]:
    """(the op's result or results, what its gradient needs): an offset in the window for every output where a byte holds it,
    else the indices."""
    name = f"max_pool{dims}d"
    return_indices = _check.flag(name, "return_indices", return_indices)
    call = Call(name)
    [x] = call.floats(input=input)
    windows, shape = _windows(name, x.shape, dims, kernel_size, stride, padding, dilation, ceil_mode)
    y = call.empty(shape)
    small = windows.taps <= 256
    indices: Any = call.empty(windows.output_shape, np.int64) if return_indices or not small else None
    offsets = call.empty(windows.output_shape, np.uint8) if small else None
    arrays = x.reshape(windows.input_shape), y.reshape(windows.output_shape), indices, offsets
    call.run("max_pool", *arrays, **windows.scalars())
    results = (call.finish(y), _give(call, indices.reshape(shape), input)) if return_indices else (call.finish(y),)
    return *results, offsets if small else indices


def _max_pool_forward(dims: int) -> Callable[[Any], tuple[Any, Any]]:
    def forward(a: Any) -> tuple[Any, Any]:
        options = tuple(map(_own, (a.kernel_size, a.stride, a.padding, a.dilation, a.ceil_mode)))
        *results, places = _max_pool_places(dims, a.input, *options, a.return_indices)
        if not a.return_indices:
            return results[0], (places, options)
        return tuple(results), (_own(places) if places.dtype == np.int64 else places, options)

    return forward


@op(repeats=True)
def _max_pool_back(
    dims: int, g: Any, places: Any, shape: Any, kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: Any
) -> Any:
    """The gradient by an input of this shape, from the places of `_max_pool_places`."""
    call = Call("max_pool")
    [gy] = call.floats(grad_output=g)
    windows, _ = _windows("max_pool", shape, dims, kernel_size, stride, padding, dilation, ceil_mode)
    gx = call.result(shape)
    if places.dtype == np.uint8:
        arrays = gy.reshape(windows.output_shape), places, gx.reshape(windows.input_shape)
        call.run("max_pool_backward", *arrays, **windows.scalars())
    else:
        flat = (windows.planes, math.prod(windows.out))
        full = windows.planes, math.prod(windows.sizes)
        call.run("adaptive_max_pool_backward", gy.reshape(flat), places.reshape(flat), gx.reshape(full))
    return call.finish(gx)


def _max_pool_gradient(dims: int) -> Callable[..., tuple[Any, ...]]:
    def gradient(g: Any, saved: Any, a: Any) -> tuple[Any, ...]:
        places, options = saved
        return (_max_pool_back(dims, g[0] if isinstance(g, tuple) else g, places, tuple(a.input.shape), *options),)

    return gradient


@op(repeats=True)
def max_pool1d(
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
    *,
    out: Any = None,
) -> Any:
    """The largest element of each window of a sequence: `max_pool2d` with one spatial axis.

    Parameters
    ----------
    input : float[N, C, L] or float[C, L]
    kernel_size, stride, padding, dilation, ceil_mode, return_indices, out
        As in `max_pool2d`, with one number; padding also as ((left, right),).

    Returns
    -------
    float[N, C, OL] or float[C, OL]
        With return_indices a pair: this and int64 positions along L of the same shape.

    Raises
    ------
    TypeError, ValueError
        As in `max_pool2d`.

    Examples
    --------
    >>> import numpy as np, hotloops as hl
    >>> hl.max_pool1d(np.array([[1.0, 5.0, 2.0, 3.0]]), 2)
    array([[5., 3.]])
    """
    return _max_pool(1, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices, out)


@op(repeats=True)
def max_pool2d(
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
    *,
    out: Any = None,
) -> Any:
    """The largest element of each window of an image, channel by channel.

    Parameters
    ----------
    input : float[N, C, H, W] or float[C, H, W]
        Or integers or booleans, which give a result of their own type.
    kernel_size : int or pair of ints
        Taps of a window, down and across.
    stride : int or pair of ints, optional
        From window to window; kernel_size when not given.
    padding : int, pair of ints, ((top, bottom), (left, right)), "same" or "valid"
        Positions around the image that no maximum takes; at most half of the window. "same": H / stride rows, rounded up,
        the odd row at the bottom; likewise columns.
    dilation : int or pair of ints
        From tap to tap.
    ceil_mode : bool
        Also counts a last window that begins inside of the image (or in the padding before it) and ends outside.
    return_indices : bool
        Also gives where each maximum stands.
    out : array, optional
        Where the result goes, without return_indices.

    Returns
    -------
    float[N, C, OH, OW] or float[C, OH, OW]
        A NaN in a window gives NaN. With return_indices a pair: this and int64 positions h * W + w of the same shape; of
        equal elements the first counts, of NaNs too.

    Raises
    ------
    TypeError
        Element types or arguments of other types.
    ValueError
        A size, stride or dilation below 1; a negative padding, or more than half of the window; an input of other
        dimensions, or an empty one (but for N = 0); a window larger than the padded input, or in the padding alone.

    Notes
    -----
    OH = floor((H + top + bottom - dilation * (kernel - 1) - 1) / stride) + 1. No parameters are learned.

    Source: Boureau, Ponce and LeCun (2010), A theoretical analysis of feature pooling in visual recognition.

    Examples
    --------
    >>> import numpy as np, hotloops as hl
    >>> hl.max_pool2d(np.arange(16.0).reshape(1, 4, 4), 2)
    array([[[ 5.,  7.],
            [13., 15.]]])
    """
    return _max_pool(2, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices, out)


@op(repeats=True)
def max_pool3d(
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
    *,
    out: Any = None,
) -> Any:
    """The largest element of each window of a volume: `max_pool2d` with three spatial axes.

    Parameters
    ----------
    input : float[N, C, D, H, W] or float[C, D, H, W]
    kernel_size, stride, padding, dilation, ceil_mode, return_indices, out
        As in `max_pool2d`, with one number or three; padding also as ((front, back), (top, bottom), (left, right)).

    Returns
    -------
    float[N, C, OD, OH, OW] or float[C, OD, OH, OW]
        With return_indices a pair: this and int64 positions (d * H + h) * W + w of the same shape.

    Raises
    ------
    TypeError, ValueError
        As in `max_pool2d`.

    Examples
    --------
    >>> import numpy as np, hotloops as hl
    >>> hl.max_pool3d(np.arange(8.0).reshape(1, 2, 2, 2), 2)
    array([[[[7.]]]])
    """
    return _max_pool(3, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices, out)


def _adaptive_max_pool(
    dims: int, input: Any, output_size: Any, return_indices: Any, out: Any = None, graph: bool = False
) -> tuple[Any, Any]:
    """(the op's result, what its gradient needs when it is for a graph)."""
    name = f"adaptive_max_pool{dims}d"
    return_indices = _check.flag(name, "return_indices", return_indices)
    _no_out(name, out, return_indices)
    call = Call(name, out)
    numbers = _Numbers(call, input)
    x = numbers.input
    input_shape, output_shape, shape = _adaptive_windows(name, x.shape, dims, output_size)
    y = numbers.result(shape)
    indices: Any = call.empty(output_shape, np.int64) if return_indices or graph else None
    call.run("adaptive_max_pool", x.reshape(input_shape), y.reshape(output_shape), indices)
    y = numbers.finish(y)
    saved = (tuple(x.shape), input_shape, output_shape, _own(indices) if return_indices and graph else indices)
    return (y, _give(call, indices.reshape(shape), input)) if return_indices else y, saved


def _adaptive_max_pool_forward(dims: int) -> Callable[[Any], tuple[Any, Any]]:
    return lambda a: _adaptive_max_pool(dims, a.input, a.output_size, a.return_indices, graph=True)


def _adaptive_max_pool_gradient(g: Any, saved: Any, a: Any) -> tuple[Any, ...]:
    shape, input_shape, output_shape, indices = saved
    call = Call("adaptive_max_pool")
    [gy] = call.floats(grad_output=g[0] if isinstance(g, tuple) else g)
    gx = call.result(shape)
    flat = (output_shape[0], math.prod(output_shape[1:]))
    call.run(
        "adaptive_max_pool_backward",
        gy.reshape(flat),
        indices.reshape(flat),
        gx.reshape(input_shape[0], math.prod(input_shape[1:])),
    )
    return (call.finish(gx),)


@op(repeats=True)
def adaptive_max_pool1d(input: Any, output_size: Any, return_indices: bool = False, *, out: Any = None) -> Any:
    """The largest element of each of OL windows that share a sequence out: `adaptive_max_pool2d` with one spatial axis.

    Parameters
    ----------
    input : float[N, C, L] or float[C, L]
    output_size : int
    return_indices, out
        As in `adaptive_max_pool2d`.

    Returns
    -------
    float[N, C, OL] or float[C, OL]

    Raises
    ------
    TypeError, ValueError
        As in `adaptive_max_pool2d`.

    Examples
    --------
    >>> import numpy as np, hotloops as hl
    >>> hl.adaptive_max_pool1d(np.array([[1.0, 5.0, 2.0, 3.0]]), 2)
    array([[5., 3.]])
    """
    return _adaptive_max_pool(1, input, output_size, return_indices, out)[0]


@op(repeats=True)
def adaptive_max_pool2d(input: Any, output_size: Any, return_indices: bool = False, *, out: Any = None) -> Any:
    """The largest element of each of OH x OW windows that share an image out.

    Parameters
    ----------
    input : float[N, C, H, W] or float[C, H, W]
        Or integers or booleans, which give a result of their own type.
    output_size : int or pair of ints
        OH and OW; None keeps the input's size.
    return_indices : bool
        Also gives where each maximum stands.
    out : array, optional
        Where the result goes, without return_indices.

    Returns
    -------
    float[N, C, OH, OW] or float[C, OH, OW]
        With return_indices a pair: this and int64 positions h * W + w of the same shape. NaN and ties as in `max_pool2d`.

    Raises
    ------
    TypeError, ValueError
        Arguments of other types; a negative output_size; an input of other dimensions, or an empty one (but for N = 0).

    Notes
    -----
    Window o covers the rows floor(o * H / OH) to ceil((o + 1) * H / OH), the end excluded; windows may overlap.

    Examples
    --------
    >>> import numpy as np, hotloops as hl
    >>> hl.adaptive_max_pool2d(np.arange(9.0).reshape(1, 3, 3), 2)
    array([[[4., 5.],
            [7., 8.]]])
    """
    return _adaptive_max_pool(2, input, output_size, return_indices, out)[0]


@op(repeats=True)
def adaptive_max_pool3d(input: Any, output_size: Any, return_indices: bool = False, *, out: Any = None) -> Any:
    """The largest element of each of OD x OH x OW windows that share a volume out: `adaptive_max_pool2d` with three axes.

    Parameters
    ----------
    input : float[N, C, D, H, W] or float[C, D, H, W]
    output_size : int or three ints
    return_indices, out
        As in `adaptive_max_pool2d`.

    Returns
    -------
    float[N, C, OD, OH, OW] or float[C, OD, OH, OW]

    Raises
    ------
    TypeError, ValueError
        As in `adaptive_max_pool2d`.

    Examples
    --------
    >>> import numpy as np, hotloops as hl
    >>> hl.adaptive_max_pool3d(np.arange(8.0).reshape(1, 2, 2, 2), (1, 2, 1))
    array([[[[5.],
             [7.]]]])
    """
    return _adaptive_max_pool(3, input, output_size, return_indices, out)[0]


# --------------------------------------------------------------------------------------------------------------- means


def _avg_pool(dims: int, input: Any, *options: Any, out: Any = None) -> Any:
    call = Call(f"avg_pool{dims}d", out)
    [x] = call.floats(input=input)
    windows, shape, scalars = _mean_windows(call.op, dims, x.shape, *options)
    y = call.result(shape)
    call.run("avg_pool", x.reshape(windows.input_shape), y.reshape(windows.output_shape), **scalars)
    return call.finish(y)


@op(repeats=True)
def _avg_pool_back(dims: int, g: Any, shape: Any, *options: Any) -> Any:
    """The gradient by an input of this shape."""
    call = Call(f"avg_pool{dims}d")
    [gy] = call.floats(grad_output=g)
    windows, _, scalars = _mean_windows(call.op, dims, shape, *options)
    gx = call.result(shape)
    call.run("avg_pool_backward", gy.reshape(windows.output_shape), gx.reshape(windows.input_shape), **scalars)
    return call.finish(gx)


def _mean_windows(
    name: str,
    dims: int,
    shape: tuple[int, ...],
    kernel_size: Any,
    stride: Any,
    padding: Any,
    ceil_mode: Any,
    count_include_pad: Any,
    divisor_override: Any,
    dilation: Any,
) -> tuple[_Windows, tuple[int, ...], dict[str, int]]:
    """(the windows, the shape of the result, the scalars of the kernels)."""
    include = _check.flag(name, "count_include_pad", count_include_pad)
    divisor = 0
    if divisor_override is not None:
        divisor = _check.integer(name, "divisor_override", divisor_override)
        if not 0 < abs(divisor) < MAX_TAPS:
            raise ValueError(f"{name}: divisor_override must be a number other than 0, {_check.shown(divisor)} came")
    windows, result = _windows(name, shape, dims, kernel_size, stride, padding, dilation, ceil_mode)
    return windows, result, windows.scalars(after=True) | {"count_include_pad": int(include), "divisor": divisor}


def _avg_pool_gradient(dims: int) -> Callable[..., tuple[Any, ...]]:
    def gradient(g: Any, y: Any, a: Any) -> tuple[Any, ...]:
        divisor = getattr(a, "divisor_override", None)
        options = a.kernel_size, a.stride, a.padding, a.ceil_mode, a.count_include_pad, divisor, a.dilation
        return (_avg_pool_back(dims, g, tuple(a.input.shape), *options),)

    return gradient


@op(repeats=True)
def avg_pool1d(
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    *,
    dilation: Any = 1,
    out: Any = None,
) -> Any:
    """The mean of each window of a sequence: `avg_pool2d` with one spatial axis.

    Parameters
    ----------
    input : float[N, C, L] or float[C, L]
    kernel_size, stride, padding, ceil_mode, count_include_pad, dilation, out
        As in `avg_pool2d`, with one number; padding also as ((left, right),).

    Returns
    -------
    float[N, C, OL] or float[C, OL]

    Raises
    ------
    TypeError, ValueError
        As in `avg_pool2d`.

    Examples
    --------
    >>> import numpy as np, hotloops as hl
    >>> hl.avg_pool1d(np.array([[1.0, 5.0, 2.0, 3.0]]), 2)
    array([[3. , 2.5]])
    """
    return _avg_pool(1, input, kernel_size, stride, padding, ceil_mode, count_include_pad, None, dilation, out=out)


@op(repeats=True)
def avg_pool2d(
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    *,
    dilation: Any = 1,
    out: Any = None,
) -> Any:
    """The mean of each window of an image, channel by channel.

    Parameters
    ----------
    input : float[N, C, H, W] or float[C, H, W]
    kernel_size, stride, padding, ceil_mode, dilation
        As in `max_pool2d`; padding counts as 0.
    count_include_pad : bool
        Whether the mean is over the positions of the window in the padded image, or over those in the image.
    divisor_override : int, optional
        What the sum is divided by instead.
    out : array, optional
        Where the result goes.

    Returns
    -------
    float[N, C, OH, OW] or float[C, OH, OW]

    Raises
    ------
    TypeError, ValueError
        As in `max_pool2d`; a divisor_override of 0.

    Examples
    --------
    >>> import numpy as np, hotloops as hl
    >>> hl.avg_pool2d(np.arange(16.0).reshape(1, 4, 4), 2)
    array([[[ 2.5,  4.5],
            [10.5, 12.5]]])
    """
    return _avg_pool(2, input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override, dilation, out=out)


@op(repeats=True)
def avg_pool3d(
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    *,
    dilation: Any = 1,
    out: Any = None,
) -> Any:
    """The mean of each window of a volume: `avg_pool2d` with three spatial axes.

    Parameters
    ----------
    input : float[N, C, D, H, W] or float[C, D, H, W]
    kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override, dilation, out
        As in `avg_pool2d`, with one number or three; padding also as ((front, back), (top, bottom), (left, right)).

    Returns
    -------
    float[N, C, OD, OH, OW] or float[C, OD, OH, OW]

    Raises
    ------
    TypeError, ValueError
        As in `avg_pool2d`.

    Examples
    --------
    >>> import numpy as np, hotloops as hl
    >>> hl.avg_pool3d(np.arange(8.0).reshape(1, 2, 2, 2), 2)
    array([[[[3.5]]]])
    """
    return _avg_pool(3, input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override, dilation, out=out)


def _adaptive_avg_pool(name: str, dims: int, input: Any, output_size: Any, out: Any) -> Any:
    call = Call(name, out)
    [x] = call.floats(input=input)
    input_shape, output_shape, shape = _adaptive_windows(name, x.shape, dims, output_size)
    y = call.result(shape)
    call.run("adaptive_avg_pool", x.reshape(input_shape), y.reshape(output_shape))
    return call.finish(y)


@op(repeats=True)
def _adaptive_avg_pool_back(dims: int, g: Any, shape: Any) -> Any:
    """The gradient by an input of this shape."""
    call = Call("adaptive_avg_pool")
    [gy] = call.floats(grad_output=g)
    one = (1,) * (3 - dims)
    planes = math.prod(shape[:-dims])
    gx = call.result(shape)
    call.run(
        "adaptive_avg_pool_backward",
        gy.reshape((planes, *one, *gy.shape[-dims:])),
        gx.reshape((planes, *one, *shape[-dims:])),
    )
    return call.finish(gx)


def _adaptive_avg_pool_gradient(dims: int) -> Callable[..., tuple[Any, ...]]:
    return lambda g, y, a: (_adaptive_avg_pool_back(dims, g, tuple(a.input.shape)),)


@op(repeats=True)
def adaptive_avg_pool1d(input: Any, output_size: Any, *, out: Any = None) -> Any:
    """The mean of each of OL windows that share a sequence out: `adaptive_avg_pool2d` with one spatial axis.

    Parameters
    ----------
    input : float[N, C, L] or float[C, L]
    output_size : int
    out : array, optional
        Where the result goes.

    Returns
    -------
    float[N, C, OL] or float[C, OL]

    Raises
    ------
    TypeError, ValueError
        As in `adaptive_avg_pool2d`.

    Examples
    --------
    >>> import numpy as np, hotloops as hl
    >>> hl.adaptive_avg_pool1d(np.array([[1.0, 5.0, 2.0, 3.0]]), 2)
    array([[3. , 2.5]])
    """
    return _adaptive_avg_pool("adaptive_avg_pool1d", 1, input, output_size, out)


@op(repeats=True)
def adaptive_avg_pool2d(input: Any, output_size: Any, *, out: Any = None) -> Any:
    """The mean of each of OH x OW windows that share an image out.

    Parameters
    ----------
    input : float[N, C, H, W] or float[C, H, W]
    output_size : int or pair of ints
        OH and OW; None keeps the input's size.
    out : array, optional
        Where the result goes.

    Returns
    -------
    float[N, C, OH, OW] or float[C, OH, OW]

    Raises
    ------
    TypeError, ValueError
        Arguments of other types; a negative output_size; an input of other dimensions, or an empty one (but for N = 0).

    Notes
    -----
    Window o covers the rows floor(o * H / OH) to ceil((o + 1) * H / OH), the end excluded; windows may overlap.

    Source: He et al. (2014), Spatial pyramid pooling in deep convolutional networks.

    Examples
    --------
    >>> import numpy as np, hotloops as hl
    >>> hl.adaptive_avg_pool2d(np.arange(9.0).reshape(1, 3, 3), 2)
    array([[[2., 3.],
            [5., 6.]]])
    """
    return _adaptive_avg_pool("adaptive_avg_pool2d", 2, input, output_size, out)


@op(repeats=True)
def adaptive_avg_pool3d(input: Any, output_size: Any, *, out: Any = None) -> Any:
    """The mean of each of OD x OH x OW windows that share a volume out: `adaptive_avg_pool2d` with three spatial axes.

    Parameters
    ----------
    input : float[N, C, D, H, W] or float[C, D, H, W]
    output_size : int or three ints
    out : array, optional
        Where the result goes.

    Returns
    -------
    float[N, C, OD, OH, OW] or float[C, OD, OH, OW]

    Raises
    ------
    TypeError, ValueError
        As in `adaptive_avg_pool2d`.

    Examples
    --------
    >>> import numpy as np, hotloops as hl
    >>> hl.adaptive_avg_pool3d(np.arange(8.0).reshape(1, 2, 2, 2), 1)
    array([[[[3.5]]]])
    """
    return _adaptive_avg_pool("adaptive_avg_pool3d", 3, input, output_size, out)


@op(repeats=True)
def global_avg_pool2d(input: Any, *, out: Any = None) -> Any:
    """The mean of each channel of an image: `adaptive_avg_pool2d` with output_size 1.

    Parameters
    ----------
    input : float[N, C, H, W] or float[C, H, W]
    out : array, optional
        Where the result goes.

    Returns
    -------
    float[N, C, 1, 1] or float[C, 1, 1]

    Raises
    ------
    TypeError, ValueError
        As in `adaptive_avg_pool2d`.

    Notes
    -----
    Source: Lin, Chen and Yan (2014), Network in network.

    Examples
    --------
    >>> import numpy as np, hotloops as hl
    >>> hl.global_avg_pool2d(np.arange(4.0).reshape(1, 2, 2))
    array([[[1.5]]])
    """
    return _adaptive_avg_pool("global_avg_pool2d", 2, input, 1, out)


# --------------------------------------------------------------------------------------------------------------- norms


def _lp_pool(
    dims: int, input: Any, norm_type: Any, kernel_size: Any, stride: Any, ceil_mode: Any, dilation: Any, out: Any = None
) -> tuple[Any, Any]:
    """(the op's result, what its gradient needs)."""
    name = f"lp_pool{dims}d"
    norm = _check.number(name, "norm_type", norm_type)
    if norm == 0 or math.isinf(norm) or abs(norm) > 1e30 or abs(norm) < 1e-30:
        raise ValueError(
            f"{name}: norm_type must be a finite number other than 0, {norm!r} came (for infinity use max_pool{dims}d)"
        )
    call = Call(name, out)
    [x] = call.floats(input=input)
    windows, shape = _windows(name, x.shape, dims, kernel_size, stride, 0, dilation, ceil_mode)
    scalars = windows.scalars(before=False) | {"norm": norm}
    x = x.reshape(windows.input_shape)
    y = call.result(shape)
    call.run("lp_pool", x, y.reshape(windows.output_shape), **scalars)
    return call.finish(y), (x, y.reshape(windows.output_shape), scalars)


def _lp_pool_forward(dims: int) -> Callable[[Any], tuple[Any, Any]]:
    return lambda a: _lp_pool(dims, a.input, a.norm_type, a.kernel_size, a.stride, a.ceil_mode, a.dilation)


def _lp_pool_gradient(g: Any, saved: Any, a: Any) -> tuple[Any, ...]:
    x, y, scalars = saved
    call = Call("lp_pool")
    [gy] = call.floats(grad_output=g)
    gx = call.result(tuple(a.input.shape))
    call.run("lp_pool_backward", gy.reshape(y.shape), x, y, gx.reshape(x.shape), **scalars)
    return (call.finish(gx),)


@op(repeats=True)
def lp_pool1d(
    input: Any,
    norm_type: float,
    kernel_size: Any,
    stride: Any = None,
    ceil_mode: bool = False,
    *,
    dilation: Any = 1,
    out: Any = None,
) -> Any:
    """The p-norm of each window of a sequence: `lp_pool2d` with one spatial axis.

    Parameters
    ----------
    input : float[N, C, L] or float[C, L]
    norm_type, kernel_size, stride, ceil_mode, dilation, out
        As in `lp_pool2d`, with one number.

    Returns
    -------
    float[N, C, OL] or float[C, OL]

    Raises
    ------
    TypeError, ValueError
        As in `lp_pool2d`.

    Examples
    --------
    >>> import numpy as np, hotloops as hl
    >>> hl.lp_pool1d(np.array([[3.0, 4.0, 6.0, 8.0]]), 2, 2)
    array([[ 5., 10.]])
    """
    return _lp_pool(1, input, norm_type, kernel_size, stride, ceil_mode, dilation, out)[0]


@op(repeats=True)
def lp_pool2d(
    input: Any,
    norm_type: float,
    kernel_size: Any,
    stride: Any = None,
    ceil_mode: bool = False,
    *,
    dilation: Any = 1,
    out: Any = None,
) -> Any:
    """The p-norm of each window of an image, channel by channel: (sum of x ** p) ** (1 / p).

    Parameters
    ----------
    input : float[N, C, H, W] or float[C, H, W]
    norm_type : float
        p; finite and not 0. Signs are kept: for odd p a negative sum gives NaN.
    kernel_size, stride, ceil_mode, dilation
        As in `max_pool2d`. A last window that hangs over the edge is scaled to a full one.
    out : array, optional
        Where the result goes.

    Returns
    -------
    float[N, C, OH, OW] or float[C, OH, OW]
        The gradient of a window of norm 0 counts as 0.

    Raises
    ------
    TypeError, ValueError
        As in `max_pool2d`; a norm_type of 0, infinity or NaN.

    Notes
    -----
    Source: Gulcehre et al. (2014), Learned-norm pooling for deep feedforward and recurrent neural networks.

    Examples
    --------
    >>> import numpy as np, hotloops as hl
    >>> hl.lp_pool2d(np.array([[[3.0, 4.0]]]), 2, (1, 2))
    array([[[5.]]])
    """
    return _lp_pool(2, input, norm_type, kernel_size, stride, ceil_mode, dilation, out)[0]


@op(repeats=True)
def lp_pool3d(
    input: Any,
    norm_type: float,
    kernel_size: Any,
    stride: Any = None,
    ceil_mode: bool = False,
    *,
    dilation: Any = 1,
    out: Any = None,
) -> Any:
    """The p-norm of each window of a volume: `lp_pool2d` with three spatial axes.

    Parameters
    ----------
    input : float[N, C, D, H, W] or float[C, D, H, W]
    norm_type, kernel_size, stride, ceil_mode, dilation, out
        As in `lp_pool2d`, with one number or three.

    Returns
    -------
    float[N, C, OD, OH, OW] or float[C, OD, OH, OW]

    Raises
    ------
    TypeError, ValueError
        As in `lp_pool2d`.

    Examples
    --------
    >>> import numpy as np, hotloops as hl
    >>> hl.lp_pool3d(np.ones((1, 2, 2, 2)), 1, 2)
    array([[[[8.]]]])
    """
    return _lp_pool(3, input, norm_type, kernel_size, stride, ceil_mode, dilation, out)[0]


# --------------------------------------------------------------------------------------------------------- the way back


def _unpooled_size(
    name: str, sizes: tuple[int, ...], dims: int, kernel_size: Any, stride: Any, padding: Any, output_size: Any
) -> tuple[int, ...]:
    """The spatial sizes of the result: output_size where it is given and could have been pooled to these."""
    kernel = _check.integers(name, "kernel_size", kernel_size, dims, low=1)
    stride = _strides(name, stride, kernel)
    pads = _check.integers(name, "padding", padding, dims, low=0)
    usual = [(n - 1) * s + k - 2 * p for n, s, k, p in zip(sizes, stride, kernel, pads, strict=True)]
    if output_size is None:
        if min(usual) < 1:
            raise ValueError(f"{name}: the result would have the sizes {_check.shown(usual)}; give output_size")
        return tuple(usual)
    if not isinstance(output_size, list | tuple) or len(output_size) not in (dims, dims + 1, dims + 2):
        raise ValueError(f"{name}: output_size must be {dims} numbers or a whole shape, {_check.shown(output_size)} came")
    wanted = tuple(_check.integer(name, "output_size", n, low=1) for n in output_size[-dims:])
    for n, u, s in zip(wanted, usual, stride, strict=True):
        if abs(n - u) >= s:
            raise ValueError(f"{name}: output_size {_check.shown(n)} is not within {s - 1} of {u}, the size by kernel and stride")
    return wanted


def _max_unpool(
    dims: int,
    input: Any,
    indices: Any,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    output_size: Any,
    out: Any = None,
) -> tuple[Any, Any]:
    """(the op's result, what its gradient needs)."""
    name = f"max_unpool{dims}d"
    call = Call(name, out)
    [x] = call.floats(input=input)
    places = call.indices("indices", indices)
    if tuple(places.shape) != tuple(x.shape):
        raise ValueError(f"{name}: indices have the shape {tuple(places.shape)}, that of input, {tuple(x.shape)}, is needed")
    lead, sizes = _spatial(name, x.shape, dims)
    wanted = _unpooled_size(name, sizes, dims, kernel_size, stride, padding, output_size)
    y = call.result((*lead, *wanted))
    bad = call.empty((1,), np.int64)
    flat = (math.prod(lead), math.prod(sizes))
    places = places.reshape(flat)
    call.run("max_unpool", x.reshape(flat), places, y.reshape(flat[0], math.prod(wanted)), bad)
    first = int(call.get(bad)[0])
    if first:
        at = tuple(int(i) for i in np.unravel_index(first - 1, x.shape))
        value = int(call.get(places).reshape(-1)[first - 1])
        raise ValueError(f"{name}: indices{list(at)} is {value}, 0 to {math.prod(wanted) - 1} are the places of a plane")
    return call.finish(y), (places, tuple(x.shape), (flat[0], math.prod(wanted)))


def _max_unpool_forward(dims: int) -> Callable[[Any], tuple[Any, Any]]:
    def forward(a: Any) -> tuple[Any, Any]:
        y, (places, *rest) = _max_unpool(dims, a.input, a.indices, a.kernel_size, a.stride, a.padding, a.output_size)
        return y, (_own(places), *rest)

    return forward


def _max_unpool_gradient(g: Any, saved: Any, a: Any) -> tuple[Any, ...]:
    places, shape, flat = saved
    call = Call("max_unpool")
    [gy] = call.floats(grad_output=g)
    gx = call.result(shape)
    call.run("max_unpool_backward", gy.reshape(flat), places, gx.reshape(tuple(places.shape)))
    return (call.finish(gx),)


@op
def max_unpool1d(
    input: Any, indices: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, output_size: Any = None, *, out: Any = None
) -> Any:
    """The values of a pooled sequence back at the places they came from: `max_unpool2d` with one spatial axis.

    Parameters
    ----------
    input : float[N, C, OL] or float[C, OL]
    indices : int[N, C, OL] or int[C, OL]
    kernel_size, stride, padding, output_size, out
        As in `max_unpool2d`, with one number.

    Returns
    -------
    float[N, C, L] or float[C, L]

    Raises
    ------
    TypeError, ValueError
        As in `max_unpool2d`.

    Examples
    --------
    >>> import numpy as np, hotloops as hl
    >>> hl.max_unpool1d(np.array([[5.0, 3.0]]), np.array([[1, 3]]), 2)
    array([[0., 5., 0., 3.]])
    """
    return _max_unpool(1, input, indices, kernel_size, stride, padding, output_size, out)[0]


@op
def max_unpool2d(
    input: Any, indices: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, output_size: Any = None, *, out: Any = None
) -> Any:
    """The values of a pooled image back at the places they came from, 0 everywhere else.

    Parameters
    ----------
    input : float[N, C, OH, OW] or float[C, OH, OW]
    indices : int[N, C, OH, OW] or int[C, OH, OW]
        As `max_pool2d` gives them. Of values with the same index the last stays.
    kernel_size, stride, padding : int or pair of ints
        Those of the pooling; stride is kernel_size when not given.
    output_size : sequence of ints, optional
        H and W (or a whole shape) of the image that was pooled; (OH - 1) * stride + kernel_size - 2 * padding when not
        given, and less than a stride from it when given.
    out : array, optional
        Where the result goes.

    Returns
    -------
    float[N, C, H, W] or float[C, H, W]

    Raises
    ------
    TypeError
        Element types or arguments of other types.
    ValueError
        Shapes that do not fit; an index outside of 0 to H * W - 1; sizes below 1.

    Notes
    -----
    Source: Zeiler and Fergus (2014), Visualizing and understanding convolutional networks.

    Examples
    --------
    >>> import numpy as np, hotloops as hl
    >>> y, indices = hl.max_pool2d(np.arange(4.0).reshape(1, 2, 2), 2, return_indices=True)
    >>> hl.max_unpool2d(y, indices, 2)
    array([[[0., 0.],
            [0., 3.]]])
    """
    return _max_unpool(2, input, indices, kernel_size, stride, padding, output_size, out)[0]


@op
def max_unpool3d(
    input: Any, indices: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, output_size: Any = None, *, out: Any = None
) -> Any:
    """The values of a pooled volume back at the places they came from: `max_unpool2d` with three spatial axes.

    Parameters
    ----------
    input : float[N, C, OD, OH, OW] or float[C, OD, OH, OW]
    indices : int[N, C, OD, OH, OW] or int[C, OD, OH, OW]
    kernel_size, stride, padding, output_size, out
        As in `max_unpool2d`, with one number or three.

    Returns
    -------
    float[N, C, D, H, W] or float[C, D, H, W]

    Raises
    ------
    TypeError, ValueError
        As in `max_unpool2d`.

    Examples
    --------
    >>> import numpy as np, hotloops as hl
    >>> hl.max_unpool3d(np.array([[[[7.0]]]]), np.array([[[[1]]]]), (1, 1, 2))
    array([[[[0., 7.]]]])
    """
    return _max_unpool(3, input, indices, kernel_size, stride, padding, output_size, out)[0]
