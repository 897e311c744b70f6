"""Softmax and its kin."""

from __future__ import annotations

import math
from typing import Any

from . import _check
from ._check import Call, op

_FUNCTIONS = ("", "relu", "relu6", "sigmoid", "tanh", "silu", "gelu")  # by their number in the record of `activate`


def _rows(shape: tuple[int, ...], axis: int) -> tuple[int, int, int]:
    """[M, K, I]: what stands before the axis, the axis, what stands after it."""
    if not shape:
        return 1, 1, 1
    return math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])


@op(repeats=True)
def softmax(input: Any, axis: int = -1, *, dtype: Any = None, out: Any = None) -> Any:
    """Exponentials that sum to 1 along an axis: exp(x - max) / sum(exp(x - max)).

    Parameters
    ----------
    input : float[...]
        Any shape; float16, float32 or float64.
    axis : int
        The axis along which the result sums to 1.
    dtype : float16, float32 or float64, optional
        What the input is converted to first, and the result's element type.
    out : array, optional
        Where the result goes: the shape and element type of `input`; may overlap it.

    Returns
    -------
    float[...]
        The shape and element type of `input`. A slice that holds a NaN, or only -inf, is NaN.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        An element type that is no float; an `out` that does not fit; no such axis.

    Notes
    -----
    Source: Goodfellow et al., Deep Learning (2016), section 4.1.

    Examples
    --------
    >>> import numpy as np, hotloops as hl
    >>> hl.softmax(np.array([0.0, 0.0]))
    array([0.5, 0.5])
    """
    _check.needed("softmax", input=input)
    call = Call("softmax", out)
    [x] = call.floats(input=_check.as_type("softmax", "input", input, dtype))
    rows = _rows(x.shape, _check.axis("softmax", axis, x.ndim))
    y = call.result(x.shape)
    call.run("softmax", x.reshape(rows), y.reshape(rows))
    return call.finish(y)


def _softmax_gradient(g: Any, y: Any, a: Any) -> tuple[Any, ...]:
    return (_row_gradient("softmax_backward", g, y, a.axis),)


def _log_softmax_gradient(g: Any, y: Any, a: Any) -> tuple[Any, ...]:
    return (_row_gradient("log_softmax_backward", g, y, a.axis),)


@op(repeats=True)
def _row_gradient(kernel: str, g: Any, y: Any, axis: int) -> Any:
    call = Call(kernel)
    gy, y = call.floats(gy=g, y=y)
    rows = _rows(y.shape, _check.axis(kernel, axis, y.ndim))
    gx = call.empty(y.shape)
    call.run(kernel, gy.reshape(rows), y.reshape(rows), gx.reshape(rows))
    return call.finish(gx)


@op(repeats=True)
def log_softmax(input: Any, axis: int = -1, *, dtype: Any = None, out: Any = None) -> Any:
    """The logarithm of softmax, without the loss of digits: x - max - log(sum(exp(x - max))).

    Parameters
    ----------
    input : float[...]
        Any shape; float16, float32 or float64.
    axis : int
        The axis along which the exponentials of the result sum to 1.
    dtype : float16, float32 or float64, optional
        What the input is converted to first, and the result's element type.
    out : array, optional
        Where the result goes: the shape and element type of `input`; may overlap it.

    Returns
    -------
    float[...]
        The shape and element type of `input`. A slice that holds a NaN, +inf, or only -inf, is NaN.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        An element type that is no float; an `out` that does not fit; no such axis.

    Notes
    -----
    Source: Goodfellow et al., Deep Learning (2016), section 4.1.

    Examples
    --------
    >>> import numpy as np, hotloops as hl
    >>> hl.log_softmax(np.array([0.0, 0.0])).round(4)
    array([-0.6931, -0.6931])
    """
    _check.needed("log_softmax", input=input)
    call = Call("log_softmax", out)
    [x] = call.floats(input=_check.as_type("log_softmax", "input", input, dtype))
    rows = _rows(x.shape, _check.axis("log_softmax", axis, x.ndim))
    y = call.result(x.shape)
    call.run("log_softmax", x.reshape(rows), y.reshape(rows))
    return call.finish(y)


@op(repeats=True)
def logsumexp(input: Any, axis: int | tuple[int, ...], keepdims: bool = False, *, out: Any = None) -> Any:
    """The logarithm of the sum of the exponentials over one axis or several, without overflow.

    Parameters
    ----------
    input : float[...]
        Any shape; float16, float32 or float64.
    axis : int or tuple of int
        The axes summed over; an empty tuple stands for all of them, as in torch.
    keepdims : bool
        Whether they stay in the result with size 1.
    out : array, optional
        Where the result goes; may overlap the input.

    Returns
    -------
    float[...]
        -inf over an axis of size 0, or of -inf alone; +inf where there is one; NaN where there is a NaN.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        An element type that is no float; an `out` that does not fit; no such axis, or one given twice.

    Notes
    -----
    Source: Goodfellow et al., Deep Learning (2016), section 4.1.

    Examples
    --------
    >>> import numpy as np, hotloops as hl
    >>> hl.logsumexp(np.array([[0.0, 0.0], [1000.0, 1000.0]]), 1).round(4).tolist()
    [0.6931, 1000.6931]
    """
    _check.needed("logsumexp", input=input)
    call = Call("logsumexp", out)
    [x] = call.floats(input=input)
    axes = _axes("logsumexp", axis, x.ndim)
    _check.flag("logsumexp", "keepdims", keepdims)
    kept = tuple(1 if i in axes else n for i, n in enumerate(x.shape))
    y = call.result(kept if keepdims else tuple(n for i, n in enumerate(x.shape) if i not in axes))
    _logsumexp_steps(call, x, axes, y)
    return call.finish(y)


def _axes(op: str, axis: Any, ndim: int) -> tuple[int, ...]:
    """The axes in increasing order, counted from 0; all of them for ()."""
    values = axis if isinstance(axis, tuple | list) else (axis,)
    axes = tuple(sorted(_check.axis(op, v, ndim) for v in values)) or tuple(range(ndim))
    if len(set(axes)) < len(axes):
        raise ValueError(f"{op}: axis names an axis twice, {_check.shown(axis)} came")
    return axes if ndim else ()


def _logsumexp_steps(call: Call, x: Any, axes: tuple[int, ...], y: Any, there: bool = False) -> list[tuple[Any, Any]]:
    """Sums over each run of neighbouring axes in turn, the last into y, unless it is there: [(what was read [M, K, I], its sum
    [M, I])]."""
    runs: list[list[int]] = []
    for i in axes:
        if runs and runs[-1][1] == i:
            runs[-1][1] = i + 1
        else:
            runs.append([i, i + 1])
    shape, steps, read = list(x.shape), [], x
    for begin, end in runs[::-1] or [[0, 0]]:  # a 0-d array: one row of one element
        rows = math.prod(shape[:begin]), math.prod(shape[begin:end]), math.prod(shape[end:])
        shape[begin:end] = [1] * (end - begin)
        last = begin == (runs[0][0] if runs else 0)
        written = y if last else call.empty((rows[0] * rows[2],))
        read, written = read.reshape(rows), written.reshape((rows[0], rows[2]))
        if not (last and there):
            call.run("logsumexp", read, written)
        steps.append((read, written))
        read = written
    return steps


def _logsumexp_gradient(g: Any, y: Any, a: Any) -> tuple[Any, ...]:
    return (_logsumexp_back(g, a.input, y, a.axis),)


@op(repeats=True)
def _logsumexp_back(g: Any, input: Any, y: Any, axis: Any) -> Any:
    call = Call("logsumexp gradient")
    x, gy, sums = call.floats(input=input, gy=g, y=y)
    there = y.dtype == call.compute  # float16 is not near enough
    axes = _axes("logsumexp", axis, x.ndim)
    for read, written in _logsumexp_steps(call, x, axes, sums if there else call.empty(gy.shape), there)[::-1]:
        gx = call.empty(read.shape)
        call.run("logsumexp_backward", gy.reshape(written.shape), read, written, gx)
        gy = gx
    return call.finish(gy.reshape(x.shape))


# ------------------------------------------------------------------------- what may follow a convolution or a dense layer


def _function(op: str, activation: Any) -> int:
    """The number that kernels know a function by; 0 for None."""
    return 0 if activation is None else _FUNCTIONS.index(_check.one_of(op, "activation", activation, _FUNCTIONS[1:]))


@op(repeats=True)
def _activated(name: str, z: Any, activation: str) -> Any:
    """The function of that name of each element of a result."""
    call = Call(name)
    [x] = call.floats(result=z)
    y = call.empty(x.shape)
    n = math.prod(x.shape)
    call.run("activate", x.reshape((n,)), y.reshape((n,)), function=_function(name, activation))
    return call.finish(y)


@op(repeats=True)
def _activation_gradient(name: str, g: Any, z: Any, activation: str) -> Any:
    """The gradient of what came into the function, from that of what came out."""
    call = Call(name)
    x, gy = call.floats(result=z, grad_output=g)
    gx = call.empty(x.shape)
    n = math.prod(x.shape)
    call.run("activate_backward", x.reshape((n,)), gy.reshape((n,)), gx.reshape((n,)), function=_function(name, activation))
    return call.finish(gx)
