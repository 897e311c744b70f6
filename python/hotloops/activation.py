"""Softmax and its kin."""

from __future__ import annotations

import math
from typing import Any

from . import _check
from ._check import Call, op


def _rows(shape: tuple[int, ...], axis: int) -> tuple[int, int, int]:
    """[M, K, I]: what stands before the axis, the axis, what stands after it."""
    if not shape:
        return 1, 1, 1
    return math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])


@op(repeats=True)
def softmax(input: Any, axis: int = -1, *, out: Any = None) -> Any:
    """Exponentials that sum to 1 along an axis: exp(x - max) / sum(exp(x - max)).

    Parameters
    ----------
    input : float[...]
        Any shape; float16, float32 or float64.
    axis : int
        The axis along which the result sums to 1.
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
    call = Call("softmax", out)
    [x] = call.floats(input=input)
    rows = _rows(x.shape, _check.axis("softmax", axis, x.ndim))
    y = call.result(x.shape)
    call.run("softmax", x.reshape(rows), y.reshape(rows))
    return call.finish(y)


def _softmax_gradient(g: Any, y: Any, a: Any) -> tuple[Any, ...]:
    return (y * (g - (g * y).sum(axis=a.axis, keepdims=True)),)
