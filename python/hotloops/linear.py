"""Dense layers, matrix products and dropout."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from . import _check
from . import activation as _activation
from ._check import Call, op
from ._plan import is_plain

# ---------------------------------------------------------------------------------------------------------------- linear


@op(repeats=True)
def linear(input: Any, weight: Any, bias: Any = None, *, activation: str | None = None, out: Any = None) -> Any:
    """The input times the transposed weight, plus the bias.

    Parameters
    ----------
    input : float[..., K]
    weight : float[N, K]
        Or [K], for one output without an axis of its own.
    bias : float[N], optional
    activation : {"relu", "relu6", "sigmoid", "tanh", "silu", "gelu"}, optional
        A function of each result, applied on its way out: no second pass over memory.
    out : array, optional
        Where the result goes; may overlap an input.

    Returns
    -------
    float[..., N]

    Raises
    ------
    TypeError, ValueError
        An element type that is no float; sizes that do not fit; an `out` that does not fit; an unknown activation.

    Examples
    --------
    >>> import numpy as np, hotloops as hl
    >>> hl.linear(np.array([1.0, 2.0]), np.array([[3.0, 4.0]]), np.array([0.5]))
    array([11.5])
    """
    return _linear(input, weight, bias, activation, out)


def _linear(input: Any, weight: Any, bias: Any, activation: Any, out: Any = None) -> Any:
    _check.needed("linear", input=input, weight=weight)
    call = Call("linear", out)
    x, w, b = call.floats(input=input, weight=weight, bias=bias)
    if w.ndim not in (1, 2):
        raise ValueError(f"linear: weight has the shape {tuple(w.shape)}, [N, K] or [K] is needed")
    if x.ndim < 1 or x.shape[-1] != w.shape[-1]:
        raise ValueError(f"linear: input has the shape {tuple(x.shape)}, its last size must be the weight's, {w.shape[-1]}")
    if b is not None and tuple(b.shape) != tuple(w.shape[:-1]):
        raise ValueError(f"linear: bias has the shape {tuple(b.shape)}, {tuple(w.shape[:-1])} is needed")
    lead, K, N = tuple(x.shape[:-1]), w.shape[-1], math.prod(w.shape[:-1])
    function = _activation._function("linear", activation)
    y = call.result(lead + tuple(w.shape[:-1]))
    M = math.prod(lead)
    arrays = x.reshape((M, K)), w.reshape((N, K)), b if b is None else b.reshape((N,)), y.reshape((M, N))
    call.run("linear", *arrays, activation=function)
    return call.finish(y)


def _linear_forward(a: Any) -> tuple[Any, Any]:
    """With an activation what came into it is kept for the gradient."""
    z = linear(a.input, a.weight, a.bias)
    return (z, None) if a.activation is None else (_activation._activated("linear", z, a.activation), z)


def _linear_gradient(g: Any, z: Any, a: Any) -> tuple[Any, ...]:
    if a.activation is not None:
        g = _activation._activation_gradient("linear", g, z, a.activation)
    x, w = a.input if "weight" in a.needs else None, a.weight if "input" in a.needs else None
    return _linear_gradients(g, x, w, tuple(a.input.shape), tuple(a.weight.shape), "bias" in a.needs)


@op(repeats=True)
def _linear_gradients(
    g: Any, x: Any, w: Any, x_shape: tuple[int, ...], w_shape: tuple[int, ...], with_bias: bool
) -> tuple[Any, ...]:
    """(gradient by input, weight, bias): by the input where there is the weight, by the weight where there is the input."""
    call = Call("linear gradient")
    gy, x, w = call.floats(gy=g, input=x, weight=w)
    M, K, N = math.prod(x_shape[:-1]), w_shape[-1], math.prod(w_shape[:-1])
    rows = gy.reshape((M, N))
    gx = gw = gb = None
    if w is not None:
        gx = call.empty(x_shape)
        call.run("linear_grad_input", rows, w.reshape((N, K)), gx.reshape((M, K)))
    if x is not None:
        gw = call.empty(w_shape)
        call.run("linear_grad_weight", rows, x.reshape((M, K)), gw.reshape((N, K)))
    if with_bias:
        gb = call.empty(w_shape[:-1])
        call.run("linear_grad_bias", rows, gb.reshape((N,)))
    return tuple(v if v is None else call.finish(v) for v in (gx, gw, gb))


# ---------------------------------------------------------------------------------------------------------------- matmul


@op(repeats=True, strides=True)
def matmul(a: Any, b: Any, *, out: Any = None) -> Any:
    """The matrix product over the last two axes, the others broadcast, as numpy.matmul has it.

    Parameters
    ----------
    a : float[..., M, K]
        Or [K]: one row, whose axis the result lacks.
    b : float[..., K, N]
        Or [K]: one column, whose axis the result lacks.
    out : array, optional
        Where the result goes; may overlap an input.

    Returns
    -------
    float[..., M, N]

    Raises
    ------
    TypeError, ValueError
        An element type that is no float; a 0-d array; sizes that do not fit.

    Examples
    --------
    >>> import numpy as np, hotloops as hl
    >>> hl.matmul(np.array([[1.0, 2.0]]), np.array([3.0, 4.0]))
    array([11.])
    """
    _check.needed("matmul", a=a, b=b)
    if all(not isinstance(factor, np.ndarray) or is_plain(factor) for factor in (a, b)):
        return _multiply(a, b, "", out)
    turned = _turned_factor(a, b)
    return _multiply_views(a.swapaxes(-1, -2) if turned == "a" else a, b.swapaxes(-1, -2) if turned == "b" else b, turned, out=out)


@op(repeats=True)
def _multiply_views(a: Any, b: Any, turned: str, *, out: Any = None) -> Any:
    """matmul where the factor that `turned` names, "a" or "b" or none, comes, and goes to the kernel, as it lies in memory."""
    return _multiply(a, b, turned, out)


def _multiply(a: Any, b: Any, turned: str, out: Any) -> Any:
    call = Call("matmul", out)
    x, y = call.floats(a=a, b=b)
    left, right = x.swapaxes(-1, -2) if turned == "a" else x, y.swapaxes(-1, -2) if turned == "b" else y
    product = _Product(call, tuple(left.shape), tuple(right.shape))
    z = call.result(product.result)
    B, M, K = product.rows
    if turned == "a":
        call.run("matmul_grad_b", x.reshape(B, K, M), product.right(y), z.reshape(product.out))
    elif turned == "b":
        call.run("matmul_grad_a", product.left(x), y.reshape(B, -1, K), z.reshape(product.out))
    else:
        call.run("matmul", product.left(x), product.right(y), z.reshape(product.out))
    return call.finish(z)


def _turned_factor(a: Any, b: Any) -> str:
    """Which factor is a transposed view that need not be copied: what lies in memory is what a gradient's product reads."""
    if not isinstance(a, np.ndarray) or not isinstance(b, np.ndarray) or a.ndim < 2 or b.ndim < 2:
        return ""
    same = a.shape[:-2] == b.shape[:-2]
    in_a, in_b = same and _is_turned(a), (same or b.ndim == 2) and _is_turned(b)
    if in_a and (not in_b or a.size >= b.size):
        return "a"
    return "b" if in_b else ""


def _is_turned(array: np.ndarray) -> bool:
    return not array.flags.c_contiguous and array.swapaxes(-1, -2).flags.c_contiguous


class _Product:
    """How a product of these shapes becomes one of [B, M, K] and [B, K, N]."""

    def __init__(self, call: Call, a: tuple[int, ...], b: tuple[int, ...]):
        if not a or not b:
            raise ValueError(f"matmul: shapes {a} and {b} came, both need at least one axis")
        self.call = call
        a2, b2 = a if len(a) > 1 else (1, *a), b if len(b) > 1 else (*b, 1)
        (M, K), (K2, N) = a2[-2:], b2[-2:]
        if K != K2:
            raise ValueError(f"matmul: a of shape {a} has {K} columns, b of shape {b} has {K2} rows")
        try:
            lead = np.broadcast_shapes(a2[:-2], b2[:-2])
        except ValueError:
            raise ValueError(f"matmul: the shapes {a} and {b} do not broadcast") from None
        self.a, self.b, self.a2, self.b2 = a, b, a2, b2
        self.result = lead + ((M,) if len(a) > 1 else ()) + ((N,) if len(b) > 1 else ())
        if math.prod(b2[:-2]) == 1:  # one right factor: the left ones are one tall matrix
            self.a_full, self.b_full, B, M = a2, b2, 1, math.prod(a2[:-2]) * M
        else:
            self.a_full, self.b_full, B = (*lead, M, K), (*lead, K, N), math.prod(lead)
        self.rows, self.columns, self.out = (B, M, K), (B, K, N), (B, M, N)

    def left(self, a: Any) -> Any:
        return self.call.expand(a.reshape(self.a2), self.a_full).reshape(self.rows)

    def right(self, b: Any) -> Any:
        return self.call.expand(b.reshape(self.b2), self.b_full).reshape(self.columns)


def _matmul_gradient(g: Any, y: Any, a: Any) -> tuple[Any, ...]:
    left, right = a.a if "b" in a.needs else None, a.b if "a" in a.needs else None
    return _matmul_gradients(g, left, right, tuple(a.a.shape), tuple(a.b.shape))


@op(repeats=True)
def _matmul_gradients(g: Any, left: Any, right: Any, left_shape: tuple[int, ...], right_shape: tuple[int, ...]) -> tuple[Any, ...]:
    """(gradient by the left factor, by the right one), each where there is the other one."""
    call = Call("matmul gradient")
    gy, left, right = call.floats(gy=g, a=left, b=right)
    product = _Product(call, left_shape, right_shape)
    gy = gy.reshape(product.out)
    ga = gb = None
    if right is not None:
        ga = call.empty(product.a_full)
        call.run("matmul_grad_a", gy, product.right(right), ga.reshape(product.rows))
        ga = call.finish(call.collapse(ga, product.a2).reshape(product.a))
    if left is not None:
        gb = call.empty(product.b_full)
        call.run("matmul_grad_b", product.left(left), gy, gb.reshape(product.columns))
        gb = call.finish(call.collapse(gb, product.b2).reshape(product.b))
    return ga, gb


# --------------------------------------------------------------------------------------------------------------- dropout


@op
def dropout(input: Any, p: float = 0.5, training: bool = True, *, rng: Any = None, out: Any = None) -> Any:
    """The input with each element set to 0 with probability p, the others multiplied by 1 / (1 - p).

    Parameters
    ----------
    input : float[...]
    p : float
        In [0, 1].
    training : bool
        False: the result is a copy of the input.
    rng : numpy.random.Generator or seed, optional
        What the choice comes from; the same seed drops the same elements on every backend.
    out : array, optional
        Where the result goes: the shape and element type of `input`; may overlap it.

    Returns
    -------
    float[...]
        A dropped element is 0 even where the input is NaN or infinite.

    Raises
    ------
    TypeError, ValueError
        An element type that is no float; a p outside [0, 1]; an rng that is no source of random numbers.

    Notes
    -----
    Source: Srivastava et al., Dropout (2014). The choice hashes the place of an element and a seed drawn from `rng`.

    Examples
    --------
    >>> import numpy as np, hotloops as hl
    >>> hl.dropout(np.ones(6), 0.5, rng=1)
    array([2., 0., 2., 2., 2., 2.])
    """
    p, seed = _dropout_choice(p, training, rng)
    return _dropout(input, p, seed, out)


def _dropout_choice(p: Any, training: Any, rng: Any) -> tuple[float, int]:
    p = _check.number("dropout", "p", p, 0.0, 1.0)
    p = p if _check.flag("dropout", "training", training) else 0.0
    return p, _check.seed("dropout", rng) if p else 0


def drop_scalars(p: float) -> tuple[int, float]:
    """What a kernel drops with: the threshold of its 24 random bits, and what the kept elements are multiplied by."""
    return round(p * 2**24), 1 / (1 - p) if p < 1 else 0.0


def _dropout(input: Any, p: float, seed: int, out: Any = None) -> Any:
    _check.needed("dropout", input=input)
    call = Call("dropout", out)
    [x] = call.floats(input=input)
    y = call.result(x.shape)
    drop, scale = drop_scalars(p)
    call.run("dropout", x.reshape((-1,)), y.reshape((-1,)), drop=drop, scale=scale, seed=seed)
    return call.finish(y)


def _dropout_forward(a: Any) -> tuple[Any, Any]:
    choice = _dropout_choice(a.p, a.training, a.rng)
    return _dropout(a.input, *choice), choice


def _dropout_gradient(g: Any, choice: tuple[float, int], a: Any) -> tuple[Any, ...]:
    return (_dropout(g, *choice),)
