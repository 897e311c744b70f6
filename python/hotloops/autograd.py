"""Gradients: a graph of the operations on `Variable`s, walked backwards without recursion.

An op is tied to its gradient by one line at the end of this file: `tie(op, wrt, backward)`. `backward(g, y, a)` gets the
gradient of the result, the result, and the bound arguments of the call as plain arrays (attributes by parameter name),
and returns one gradient per name in `wrt` (None for one that is not needed: `a.needs` is the set of names that are).
An op that must keep more than its result for the gradient gives `forward(a)`, which returns (result, saved); `backward`
then gets `saved` in the place of y.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from . import _check
from ._check import host_array, is_device

_counter = itertools.count()


class _Node:
    """One operation: what it read, and how a gradient of its results becomes gradients of what it read."""

    __slots__ = ("id", "name", "outputs", "parents", "pull")

    def __init__(
        self, name: str, parents: tuple[Variable, ...], pull: Callable[[list[Any]], Sequence[Any]] | None, outputs: int = 1
    ):
        self.id = next(_counter)
        self.name, self.parents, self.pull, self.outputs = name, parents, pull, outputs


class Variable:
    """An array in a graph: arithmetic, indexing, reductions and every differentiable function of hotloops accept it.

    Parameters
    ----------
    value : array
        float16, float32 or float64; other numbers become float64.

    Examples
    --------
    >>> import numpy as np, hotloops as hl
    >>> y, pullback = hl.vjp(lambda a: (a * a).sum(), np.array([1.0, 2.0]))
    >>> pullback(1.0)[0]
    array([2., 4.])
    """

    __slots__ = ("_index", "_node", "value")
    __hash__ = object.__hash__

    def __init__(self, value: Any, *, name: str = "input"):
        if isinstance(value, Variable):
            raise TypeError("Variable: the value is a Variable already")
        if not is_device(value):
            value = host_array("Variable", "value", value)
            if value.dtype.kind != "f":
                value = value.astype(np.float64)
        self.value = value
        self._node = _Node(name, (), None)
        self._index = 0

    @classmethod
    def _of(cls, value: Any, node: _Node, index: int = 0) -> Variable:
        self = cls.__new__(cls)
        self.value, self._node, self._index = value, node, index
        return self

    # -- what NumPy users expect to see

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    @property
    def dtype(self) -> Any:
        return self.value.dtype

    @property
    def ndim(self) -> int:
        return len(self.value.shape)

    @property
    def size(self) -> int:
        return int(self.value.size)

    @property
    def T(self) -> Variable:
        return self.transpose()

    def __len__(self) -> int:
        return len(self.value)

    def __repr__(self) -> str:
        return f"Variable({self.value!r})"

    def __bool__(self) -> bool:
        return bool(self.value)

    def __float__(self) -> float:
        return float(self.value)

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("a Variable is no array: use its value, or the functions of hotloops.autograd")

    def __reduce__(self) -> Any:
        raise TypeError("a Variable belongs to a graph and cannot be pickled; pickle its value")

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        """np.exp(variable), array + variable and the like."""
        function = _UFUNCS.get(ufunc)
        if function is None or method != "__call__" or kwargs:
            return NotImplemented
        return function(*inputs)

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """np.sum(variable), np.concatenate([...]) and the like."""
        function = _FUNCTIONS.get(func)
        return NotImplemented if function is None else function(*args, **kwargs)

    # -- operators

    def __add__(self, other: Any) -> Any:
        return add(self, other)

    def __radd__(self, other: Any) -> Any:
        return add(other, self)

    def __sub__(self, other: Any) -> Any:
        return subtract(self, other)

    def __rsub__(self, other: Any) -> Any:
        return subtract(other, self)

    def __mul__(self, other: Any) -> Any:
        return multiply(self, other)

    def __rmul__(self, other: Any) -> Any:
        return multiply(other, self)

    def __truediv__(self, other: Any) -> Any:
        return divide(self, other)

    def __rtruediv__(self, other: Any) -> Any:
        return divide(other, self)

    def __pow__(self, other: Any) -> Any:
        return power(self, other)

    def __rpow__(self, other: Any) -> Any:
        return power(other, self)

    def __matmul__(self, other: Any) -> Any:
        return matmul(self, other)

    def __rmatmul__(self, other: Any) -> Any:
        return matmul(other, self)

    def __neg__(self) -> Any:
        return negative(self)

    def __abs__(self) -> Any:
        return absolute(self)

    def __lt__(self, other: Any) -> Any:
        return self.value < _value(other)

    def __le__(self, other: Any) -> Any:
        return self.value <= _value(other)

    def __gt__(self, other: Any) -> Any:
        return self.value > _value(other)

    def __ge__(self, other: Any) -> Any:
        return self.value >= _value(other)

    def __getitem__(self, key: Any) -> Any:
        key = _value(key) if isinstance(key, Variable) else key
        x = self.value

        basic = all(k is None or k is Ellipsis or isinstance(k, slice | int) for k in (key if isinstance(key, tuple) else (key,)))

        def pull(g: Any) -> Any:
            full = np.zeros_like(x)
            if basic:  # no element is taken twice
                full[key] = g
            else:
                np.add.at(full, key, g)
            return full

        return _elementwise("getitem", self, x[key], pull)

    def __iter__(self) -> Any:
        return (self[i] for i in range(len(self)))

    def reshape(self, *shape: Any) -> Any:
        before = self.shape
        return _elementwise("reshape", self, self.value.reshape(*shape), lambda g: g.reshape(before))

    def ravel(self) -> Any:
        return self.reshape(-1)

    def transpose(self, *axes: Any) -> Any:
        order = axes[0] if len(axes) == 1 and not hasattr(axes[0], "__index__") else axes or None
        value = self.value.transpose(order)
        order = tuple(range(self.ndim))[::-1] if order is None else tuple(int(a) % self.ndim for a in order)
        back = tuple(int(i) for i in np.argsort(order))
        return _elementwise("transpose", self, value, lambda g: g.transpose(back))

    def swapaxes(self, a: int, b: int) -> Any:
        return _elementwise("swapaxes", self, self.value.swapaxes(a, b), lambda g: g.swapaxes(a, b))

    def astype(self, dtype: Any) -> Any:
        before = self.dtype
        return _elementwise("astype", self, self.value.astype(dtype), lambda g: g.astype(before))

    def sum(self, axis: Any = None, keepdims: bool = False) -> Any:
        return sum(self, axis, keepdims)

    def mean(self, axis: Any = None, keepdims: bool = False) -> Any:
        return mean(self, axis, keepdims)

    def max(self, axis: Any = None, keepdims: bool = False) -> Any:
        return max(self, axis, keepdims)

    # -- looking at the graph

    def paths(self, input: Variable | None = None) -> list[Path]:
        """Every path from an input of the graph (or from one input) to this value, with the local derivative of each step.

        The gradient of an input is the sum, over its paths, of the products of their local derivatives. The number of
        paths grows exponentially in a deep graph with branches: this is for graphs that a person reads.

        Examples
        --------
        >>> import hotloops as hl
        >>> x = hl.Variable(3.0, name="x")
        >>> for path in (x * x).paths():
        ...     print(path, "=", path.product)
        x -> multiply (3) = 3.0
        x -> multiply (3) = 3.0
        """
        return _paths(self, input)

    def to_dot(self) -> str:
        """The graph as DOT text, for Graphviz."""
        return _dot(self)


# --------------------------------------------------------------------------------------------------- making the graph


def _value(x: Any) -> Any:
    return x.value if isinstance(x, Variable) else x


def any_variable(args: Iterable[Any], kwargs: dict[str, Any]) -> bool:
    """True where an argument, or an element of a list or tuple argument, is a Variable."""
    return _holds(args) or bool(kwargs) and _holds(kwargs.values())


def _holds(values: Iterable[Any]) -> bool:
    return any(isinstance(v, Variable) or (type(v) in (list, tuple) and _holds(v)) for v in values)


def _strip(x: Any) -> Any:
    """The same structure with plain arrays in the place of Variables."""
    if isinstance(x, Variable):
        return x.value
    return type(x)(_strip(v) for v in x) if type(x) in (list, tuple) else x


def _leaves(x: Any) -> list[Any]:
    """The leaves of nested lists and tuples, in order."""
    if type(x) in (list, tuple):
        return [leaf for v in x for leaf in _leaves(v)]
    return [x]


def _places(x: Any) -> list[tuple[int, ...]]:
    """Where each leaf of nested lists and tuples stands, in the order of `_leaves`."""
    if type(x) in (list, tuple):
        return [(k, *rest) for k, v in enumerate(x) for rest in _places(v)]
    return [()]


def _leaf_gradient(gradient: Any, i: int, place: tuple[int, ...]) -> Any:
    """One leaf's part of an argument's gradient, which has the argument's structure, or is one array where a list of numbers
    or arrays was read as one."""
    if gradient is None:
        return None
    return _leaves(gradient)[i] if type(gradient) in (list, tuple) else gradient[place]


def _rebuild(template: Any, leaves: Any) -> Any:
    if type(template) in (list, tuple):
        return type(template)(_rebuild(v, leaves) for v in template)
    return next(leaves)


def _differentiable(x: Any) -> bool:
    return hasattr(x, "dtype") and np.dtype(x.dtype).kind == "f"


_rules: dict[Any, tuple[tuple[str, ...], Callable[..., Any], Callable[..., Any] | None]] = {}


def tie(
    op: Any,
    wrt: str | Sequence[str],
    backward: Callable[..., Any],
    forward: Callable[[SimpleNamespace], tuple[Any, Any]] | None = None,
) -> None:
    """Ties an op to its gradient; see the top of this file."""
    _rules[op] = ((wrt,) if isinstance(wrt, str) else tuple(wrt), backward, forward)


def record(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs an op on the values of its Variables and adds it to their graph."""
    name = op.__name__
    if op not in _rules:
        raise TypeError(f"{name} has no gradient: call it on plain arrays (variable.value)")
    wrt, backward, forward = _rules[op]
    given = _arguments(op, args, kwargs)
    if given.get("out") is not None:
        raise TypeError(f"{name}: out cannot be given where a gradient is recorded")
    a, needs = SimpleNamespace(), set()
    values = vars(a)  # the arguments with plain arrays in the place of Variables
    for key, value in given.items():
        values[key] = value
        if isinstance(value, Variable) or type(value) in (list, tuple):
            values[key] = _strip(value)
            if _holds((value,)):
                if key not in wrt:
                    raise TypeError(f"{name} has no gradient with respect to {key}: pass its .value")
                needs.add(key)
    a.needs = needs
    if forward is None:
        result = saved = op(**_call_arguments(op, a))
    else:
        result, saved = forward(a)
    outputs = _leaves(result)
    parents, wanted = [], []  # the Variables read, and where each stands among the leaves of its argument
    for key in wrt:
        if key not in needs:
            continue
        places = _places(given[key])
        for i, leaf in enumerate(_leaves(given[key])):
            if isinstance(leaf, Variable):
                parents.append(leaf)
                wanted.append((key, i, places[i]))
    single = not isinstance(result, tuple | list)

    def pull(grads: list[Any]) -> list[Any]:
        filled = [
            g if g is not None or not _differentiable(y) else np.zeros(y.shape, y.dtype)
            for g, y in zip(grads, outputs, strict=True)
        ]
        g = filled[0] if single else _rebuild(result, iter(filled))
        pulled = backward(g, saved, a)
        by_name = dict(zip(wrt, pulled, strict=True))
        return [_leaf_gradient(by_name[key], i, place) for key, i, place in wanted]

    node = _Node(name, tuple(parents), pull, len(outputs))
    wrapped = [Variable._of(y, node, i) if _differentiable(y) else y for i, y in enumerate(outputs)]
    return wrapped[0] if single else _rebuild(result, iter(wrapped))


def _arguments(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments by name, defaults included. `op.signature` makes the same of them, and the errors, but takes its time."""
    names, defaults = _layout(op)
    given = dict(zip(names, args, strict=False))
    if len(args) <= len(names) and given.keys().isdisjoint(kwargs):
        arguments = {**defaults, **given, **kwargs}
        if arguments.keys() == op.signature.parameters.keys():
            return arguments
    bound = op.signature.bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


@functools.cache
def _layout(op: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    """(the names that positions stand for, the default values by name)."""
    parameters = op.signature.parameters.values()
    return (
        tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD),
        {p.name: p.default for p in parameters if p.default is not p.empty},
    )


def _call_arguments(op: Any, a: SimpleNamespace) -> dict[str, Any]:
    return {k: getattr(a, k) for k in op.signature.parameters}


def _elementwise(name: str, x: Variable, value: Any, pull: Callable[[Any], Any]) -> Variable:
    return Variable._of(np.asarray(value) if np.isscalar(value) else value, _Node(name, (x,), lambda g: (pull(g[0]),)))


def _unbroadcast(g: Any, shape: tuple[int, ...]) -> Any:
    """Sums g over the axes that broadcasting added or stretched."""
    extra = g.ndim - len(shape)
    if extra:
        g = g.sum(axis=tuple(range(extra)))
    stretched = tuple(i for i, n in enumerate(shape) if n == 1 and g.shape[i] != 1)
    return g.sum(axis=stretched, keepdims=True) if stretched else g


def _binary(name: str, x: Any, y: Any, f: Callable[..., Any], dx: Callable[..., Any], dy: Callable[..., Any]) -> Any:
    a, b = _value(x), _value(y)
    value = f(a, b)
    parents, pulls = [], []
    for v, d in ((x, dx), (y, dy)):
        if isinstance(v, Variable):
            parents.append(v)
            pulls.append((d, v.shape))
    if not parents:
        return value

    def pull(grads: list[Any]) -> list[Any]:
        return [_unbroadcast(np.asarray(d(grads[0], a, b, value)), shape) for d, shape in pulls]

    return Variable._of(np.asarray(value) if np.isscalar(value) else value, _Node(name, tuple(parents), pull))


def add(x: Any, y: Any) -> Any:
    """x + y."""
    return _binary("add", x, y, lambda a, b: a + b, lambda g, a, b, v: g, lambda g, a, b, v: g)


def subtract(x: Any, y: Any) -> Any:
    """x - y."""
    return _binary("subtract", x, y, lambda a, b: a - b, lambda g, a, b, v: g, lambda g, a, b, v: -g)


def multiply(x: Any, y: Any) -> Any:
    """x * y."""
    return _binary("multiply", x, y, lambda a, b: a * b, lambda g, a, b, v: g * b, lambda g, a, b, v: g * a)


def divide(x: Any, y: Any) -> Any:
    """x / y."""
    return _binary("divide", x, y, lambda a, b: a / b, lambda g, a, b, v: g / b, lambda g, a, b, v: -g * v / b)


def power(x: Any, y: Any) -> Any:
    """x ** y; the derivative by y counts as 0 where x is 0."""

    def by_exponent(g: Any, a: Any, b: Any, v: Any) -> Any:
        base = np.where(np.asarray(a) > 0, a, 1)
        return g * v * np.log(base)

    def by_base(g: Any, a: Any, b: Any, v: Any) -> Any:
        return g * b * np.asarray(a) ** np.where(np.asarray(b) == 0, np.ones_like(b), np.asarray(b) - 1).astype(np.asarray(a).dtype)

    return _binary("power", x, y, lambda a, b: a**b, by_base, by_exponent)


def maximum(x: Any, y: Any) -> Any:
    """The larger of x and y; equal ones share the gradient."""

    def share(g: Any, mine: Any, other: Any) -> Any:
        return g * (np.greater(mine, other) + np.equal(mine, other) * np.asarray(0.5)).astype(g.dtype)

    return _binary("maximum", x, y, np.maximum, lambda g, a, b, v: share(g, a, b), lambda g, a, b, v: share(g, b, a))


def minimum(x: Any, y: Any) -> Any:
    """The smaller of x and y; equal ones share the gradient."""
    return -maximum(-x, -y)


def matmul(x: Any, y: Any) -> Any:
    """The matrix product, as numpy.matmul has it for one, two and more dimensions."""

    def dx(g: Any, a: Any, b: Any, v: Any) -> Any:
        a, b = np.asarray(a), np.asarray(b)
        if b.ndim == 1:
            return g * b if a.ndim == 1 else g[..., None] * b
        return (g[..., None, :] @ b.swapaxes(-1, -2))[..., 0, :] if a.ndim == 1 else g @ b.swapaxes(-1, -2)

    def dy(g: Any, a: Any, b: Any, v: Any) -> Any:
        a, b = np.asarray(a), np.asarray(b)
        if a.ndim == 1:
            return g * a if b.ndim == 1 else a[:, None] * g[..., None, :]
        if b.ndim == 1:
            return (a.swapaxes(-1, -2) @ g[..., None])[..., 0].reshape(-1, b.shape[0]).sum(axis=0)
        return a.swapaxes(-1, -2) @ g

    return _binary("matmul", x, y, lambda a, b: a @ b, dx, dy)


def where(condition: Any, x: Any, y: Any) -> Any:
    """x where the condition holds, y elsewhere."""
    c = _value(condition)
    return _binary(
        "where",
        x,
        y,
        lambda a, b: np.where(c, a, b),
        lambda g, a, b, v: np.where(c, g, np.zeros_like(g)),
        lambda g, a, b, v: np.where(c, np.zeros_like(g), g),
    )


def _unary(name: str, f: Callable[[Any], Any], derivative: Callable[[Any, Any, Any], Any], doc: str) -> Callable[[Any], Any]:
    def function(x: Any) -> Any:
        if not isinstance(x, Variable):
            return f(x)
        value, a = f(x.value), x.value
        return _elementwise(name, x, value, lambda g: derivative(g, a, value))

    function.__name__ = function.__qualname__ = name
    function.__doc__ = doc
    return function


negative = _unary("negative", np.negative, lambda g, x, y: -g, "-x.")
exp = _unary("exp", np.exp, lambda g, x, y: g * y, "e to the power of x.")
log = _unary("log", np.log, lambda g, x, y: g / x, "The natural logarithm of x.")
sqrt = _unary("sqrt", np.sqrt, lambda g, x, y: g / (y + y), "The square root of x.")
absolute = _unary("absolute", np.abs, lambda g, x, y: g * np.sign(x), "The absolute value of x; its derivative at 0 is 0.")
sin = _unary("sin", np.sin, lambda g, x, y: g * np.cos(x), "The sine of x in radians.")
cos = _unary("cos", np.cos, lambda g, x, y: -g * np.sin(x), "The cosine of x in radians.")
tanh = _unary("tanh", np.tanh, lambda g, x, y: g * (1 - y * y), "The hyperbolic tangent of x.")


def _axes(axis: Any, ndim: int) -> tuple[int, ...]:
    if axis is None:
        return tuple(range(ndim))
    return tuple(_check.axis("Variable", a, ndim) for a in (axis if isinstance(axis, tuple) else (axis,)))


def sum(x: Any, axis: Any = None, keepdims: bool = False) -> Any:
    """The sum over an axis, several, or all."""
    if not isinstance(x, Variable):
        return np.sum(x, axis=axis, keepdims=keepdims)
    a = x.value
    axes = _axes(axis, a.ndim)

    def pull(g: Any) -> Any:
        g = np.asarray(g)
        return np.broadcast_to(g if keepdims else np.expand_dims(g, axes), a.shape)

    return _elementwise("sum", x, np.sum(a, axis=axes, keepdims=keepdims), pull)


def mean(x: Any, axis: Any = None, keepdims: bool = False) -> Any:
    """The mean over an axis, several, or all."""
    if not isinstance(x, Variable):
        return np.mean(x, axis=axis, keepdims=keepdims)
    a = x.value
    axes = _axes(axis, a.ndim)
    count = math.prod(a.shape[i] for i in axes)

    def pull(g: Any) -> Any:
        wide = np.asarray(g, np.promote_types(a.dtype, np.float32)) / count  # a float16 count ends at 65504
        return np.broadcast_to((wide if keepdims else np.expand_dims(wide, axes)).astype(a.dtype), a.shape)

    return _elementwise("mean", x, np.mean(a, axis=axes, keepdims=keepdims), pull)


def max(x: Any, axis: Any = None, keepdims: bool = False) -> Any:
    """The largest value over an axis, several, or all; the first of equal ones takes the gradient."""
    if not isinstance(x, Variable):
        return np.max(x, axis=axis, keepdims=keepdims)
    a = x.value
    axes = _axes(axis, a.ndim)
    rest = tuple(i for i in range(a.ndim) if i not in axes)
    moved = a.transpose(rest + axes).reshape(*(a.shape[i] for i in rest), math.prod(a.shape[i] for i in axes))
    first = moved.argmax(axis=-1)

    def pull(g: Any) -> Any:
        g = np.asarray(g).reshape(first.shape)
        full = np.zeros_like(moved)
        np.put_along_axis(full, first[..., None], g[..., None], axis=-1)
        order = np.argsort(rest + axes)
        return full.reshape([a.shape[i] for i in rest + axes]).transpose(order)

    return _elementwise("max", x, np.max(a, axis=axes, keepdims=keepdims), pull)


def concatenate(arrays: Sequence[Any], axis: int = 0) -> Any:
    """The arrays joined along an axis."""
    if not _holds(arrays):
        return np.concatenate(arrays, axis=axis)
    values = [np.asarray(_value(v)) for v in arrays]
    ends = np.cumsum([v.shape[axis] for v in values])[:-1]
    variables = [i for i, v in enumerate(arrays) if isinstance(v, Variable)]

    def pull(grads: list[Any]) -> list[Any]:
        parts = np.split(grads[0], ends, axis=axis)
        return [parts[i] for i in variables]

    node = _Node("concatenate", tuple(arrays[i] for i in variables), pull)
    return Variable._of(np.concatenate(values, axis=axis), node)


def stack(arrays: Sequence[Any], axis: int = 0) -> Any:
    """The arrays joined along a new axis."""
    expanded = [_expand(v, axis) for v in arrays]
    return concatenate(expanded, axis=axis)


def _expand(x: Any, axis: int) -> Any:
    shape = list(np.expand_dims(_value(x), axis).shape)
    return x.reshape(shape) if isinstance(x, Variable) else np.expand_dims(x, axis)


_UFUNCS: dict[Any, Callable[..., Any]] = {
    np.add: add,
    np.subtract: subtract,
    np.multiply: multiply,
    np.divide: divide,
    np.power: power,
    np.matmul: matmul,
    np.maximum: maximum,
    np.minimum: minimum,
    np.negative: negative,
    np.absolute: absolute,
    np.exp: exp,
    np.log: log,
    np.sqrt: sqrt,
    np.sin: sin,
    np.cos: cos,
    np.tanh: tanh,
    np.less: lambda a, b: _value(a) < _value(b),
    np.less_equal: lambda a, b: _value(a) <= _value(b),
    np.greater: lambda a, b: _value(a) > _value(b),
    np.greater_equal: lambda a, b: _value(a) >= _value(b),
}
_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    np.sum: sum,
    np.mean: mean,
    np.max: max,
    np.concatenate: concatenate,
    np.stack: stack,
    np.where: where,
    np.reshape: lambda x, *shape: x.reshape(*shape),
    np.transpose: lambda x, axes=None: x.transpose(axes),
    np.swapaxes: lambda x, a, b: x.swapaxes(a, b),
    np.ravel: lambda x: x.ravel(),
    np.shape: lambda x: x.shape,
    np.ndim: lambda x: x.ndim,
    np.size: lambda x: x.size,
}

# ------------------------------------------------------------------------------------------------- walking the graph


def _backward(outputs: list[tuple[Variable, Any]], inputs: Sequence[Variable]) -> list[Any]:
    """The gradient of each input, summed over every path. A heap of node numbers takes the place of recursion: a node's
    number is larger than those of all it read, so the largest pending one has received all of its gradient."""
    pending: dict[int, tuple[_Node, list[Any]]] = {}
    heap: list[int] = []

    def give(variable: Variable, g: Any) -> None:
        node = variable._node
        if node.id not in pending:
            pending[node.id] = (node, [None] * node.outputs)
            heapq.heappush(heap, -node.id)
        slots = pending[node.id][1]
        held = slots[variable._index]
        slots[variable._index] = g if held is None else held + g

    kept: dict[int, list[Any]] = {}
    leaves = {v._node.id for v in inputs}
    for variable, g in outputs:
        give(variable, g)
    while heap:
        node, grads = pending.pop(-heapq.heappop(heap))
        if node.id in leaves:
            kept[node.id] = grads
        if node.pull is not None:
            for parent, g in zip(node.parents, node.pull(grads), strict=True):
                if g is not None:
                    give(parent, g)
    result = []
    given = [g for _, g in outputs]  # no gradient that is returned shares memory with another one, or with dy
    for v in inputs:
        g = kept.get(v._node.id, [None])[v._index]
        if g is None:
            g = _zeros_like(v.value)
        elif isinstance(v.value, np.ndarray):
            g = np.asarray(g)
            if g.base is None:
                alone = not any(g is other for other in given)
            else:
                alone = g.flags.writeable and not any(np.may_share_memory(g, other) for other in given)
            g = np.array(g, dtype=v.value.dtype, copy=None if alone else True)
        given.append(g)
        result.append(g)
    return result


def _zeros_like(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return np.zeros(value.shape, value.dtype)
    cuda = _check._dispatch.adapter("cuda")
    return cuda.as_kind_of(cuda._cuda().to_device(np.zeros(value.shape, value.dtype)), value)


def vjp(f: Callable[..., Any], *arrays: Any) -> tuple[Any, Callable[..., tuple[Any, ...]]]:
    """The result of f and its pullback: from the gradient of the result to one gradient per array.

    Parameters
    ----------
    f : callable
        Takes as many Variables as there are arrays; returns a Variable, or a tuple (nested or not) of them.
    *arrays : float[...]
        Where f is evaluated. A list or tuple of arrays counts as one argument; its gradient is a list or tuple as well.

    Returns
    -------
    y : array or tuple of arrays
        f(*arrays).
    pullback : callable
        `pullback(dy)`, with dy in the structure and shapes of y, returns one gradient per array: the sum over every path.
        It may be called again with another dy.

    Raises
    ------
    TypeError, ValueError
        An array that holds no numbers; dy whose structure or shapes are not those of y.

    Examples
    --------
    >>> import numpy as np, hotloops as hl
    >>> y, pullback = hl.vjp(lambda a, b: a * b, np.array([2.0]), np.array([3.0]))
    >>> pullback(np.array([1.0]))
    (array([3.]), array([2.]))
    """
    variables = [
        _rebuild(a, iter([Variable(leaf) for leaf in _leaves(a)])) if type(a) in (list, tuple) else Variable(a) for a in arrays
    ]
    result = f(*variables)
    outputs = _leaves(result)
    inputs = [leaf for v in variables for leaf in _leaves(v)]
    plain = _strip(result)

    def pullback(dy: Any) -> tuple[Any, ...]:
        grads = _leaves(dy) if isinstance(result, tuple | list) else [dy]
        if len(grads) != len(outputs):
            raise ValueError(f"pullback: {len(grads)} gradients came, the result has {len(outputs)} arrays")
        pairs = []
        for g, y in zip(grads, outputs, strict=True):
            if isinstance(y, Variable) and g is not None:
                pairs.append((y, _output_gradient(g, y)))
        leaves = iter(_backward(pairs, inputs))
        return tuple(_rebuild(v, leaves) for v in variables)

    return plain, pullback


def _output_gradient(g: Any, y: Variable) -> Any:
    if is_device(g):
        return g
    array = host_array("pullback", "dy", g)
    if array.shape != y.shape:
        raise ValueError(f"pullback: dy has the shape {array.shape}, the result has {y.shape}")
    return array.astype(y.dtype, copy=False)


def value_and_grad(f: Callable[..., Any], argnums: int | Sequence[int] = 0) -> Callable[..., tuple[Any, Any]]:
    """A function that returns f's scalar result and its gradient by the arguments that `argnums` names.

    Raises
    ------
    TypeError, ValueError
        f does not return one scalar; no such argument.

    Examples
    --------
    >>> import numpy as np, hotloops as hl
    >>> hl.value_and_grad(lambda a: (a * a).sum())(np.array([3.0]))
    (np.float64(9.0), array([6.]))
    """
    many = isinstance(argnums, tuple | list)
    wanted = [_check.integer("grad", "argnums", n) for n in (argnums if many else [argnums])]  # type: ignore[union-attr]

    def function(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        for n in wanted:
            if not -len(args) <= n < len(args):
                raise ValueError(f"grad: argnums names argument {n}, {len(args)} came")
        places = [n % len(args) for n in wanted]

        def restricted(*some: Any) -> Any:
            full = list(args)
            for place, value in zip(places, some, strict=True):
                full[place] = value
            return f(*full, **kwargs)

        y, pullback = vjp(restricted, *[args[p] for p in places])
        if isinstance(y, tuple | list) or np.shape(y) != ():
            raise ValueError(f"grad: the function must return one scalar, a result of shape {np.shape(y)} came (use vjp)")
        gradients = pullback(np.ones((), np.asarray(y).dtype))
        return np.asarray(y)[()], gradients if many else gradients[0]

    return function


def grad(f: Callable[..., Any], argnums: int | Sequence[int] = 0) -> Callable[..., Any]:
    """A function that returns the gradient of f's scalar result by the arguments that `argnums` names.

    Examples
    --------
    >>> import numpy as np, hotloops as hl
    >>> hl.grad(lambda a: (a * a).sum())(np.array([3.0]))
    array([6.])
    """
    both = value_and_grad(f, argnums)
    return lambda *args, **kwargs: both(*args, **kwargs)[1]


def gradcheck(f: Callable[..., Any], *arrays: Any, eps: float = 1e-6, atol: float = 1e-5, rtol: float = 1e-3) -> bool:
    """True where the gradients of f equal central finite differences in float64; an error with the place where not.

    Parameters
    ----------
    f : callable
        As for `vjp`.
    *arrays : float64[...]
        Where to check; converted to float64.
    eps : float
        The half width of the difference.
    atol, rtol : float
        How far the two may be apart: atol + rtol * |difference quotient|.

    Raises
    ------
    AssertionError
        A gradient that differs: which array, where, both numbers.

    Examples
    --------
    >>> import numpy as np, hotloops as hl
    >>> hl.gradcheck(hl.softmax, np.array([0.1, 0.7, -0.2]))
    True
    """
    points = [np.array(_value(a), np.float64) for a in arrays]
    y, pullback = vjp(f, *points)
    outputs = [np.asarray(v, np.float64) for v in _leaves(y)]
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal(v.shape) for v in outputs]
    analytic = pullback(_rebuild(y, iter(weights)) if isinstance(y, tuple | list) else weights[0])

    def weighted() -> float:
        return float(np.sum([np.sum(w * np.asarray(v)) for w, v in zip(weights, _leaves(vjp(f, *points)[0]), strict=True)]))

    for k, point in enumerate(points):
        for index in np.ndindex(point.shape):
            kept = point[index]
            point[index] = kept + eps
            above = weighted()
            point[index] = kept - eps
            below = weighted()
            point[index] = kept
            numeric = (above - below) / (2 * eps)
            if not abs(analytic[k][index] - numeric) <= atol + rtol * abs(numeric):
                raise AssertionError(
                    f"gradcheck: array {k} at {index}: the gradient is {analytic[k][index]!r}, the difference quotient {numeric!r}"
                )
    return True


class Path:
    """One way from an input to a result: `steps` holds the operations in order, each with its local derivative.

    The local derivative of a step is the gradient of what it reads when that of its result is all ones: for scalars the
    derivative itself. `product` multiplies them: the path's share of the input's gradient, for scalars.
    """

    def __init__(self, input: str, steps: Sequence[tuple[str, Any]]):
        self.input, self.steps = input, tuple(steps)

    @property
    def product(self) -> Any:
        total: Any = 1.0
        for _, local in self.steps:
            total = total * local
        return np.asarray(total)[()]

    def __str__(self) -> str:
        return " -> ".join([self.input, *(f"{name} ({_short(local)})" for name, local in self.steps)])

    __repr__ = __str__


def _short(local: Any) -> str:
    local = np.asarray(local)
    return f"{local.item():.6g}" if local.size == 1 else f"array of shape {local.shape}"


def _paths(result: Variable, wanted: Variable | None) -> list[Path]:
    found: list[Path] = []
    stack: list[tuple[Variable, tuple[tuple[str, Any], ...]]] = [(result, ())]
    while stack:
        variable, tail = stack.pop()
        node = variable._node
        if node.pull is None:
            if wanted is None or wanted._node is node:
                found.append(Path(node.name, tail))
            continue
        ones = [np.ones(variable.shape, variable.dtype) if i == variable._index else None for i in range(node.outputs)]
        steps = zip(node.parents, node.pull(ones), strict=True)
        stack += [(parent, ((node.name, local), *tail)) for parent, local in reversed(list(steps))]
    return found


def _dot(variable: Variable) -> str:
    lines, seen, stack = ["digraph {", "  rankdir=LR;"], set(), [variable._node]
    while stack:
        node = stack.pop()
        if node.id in seen:
            continue
        seen.add(node.id)
        label = node.name.replace("\\", "\\\\").replace('"', '\\"')
        lines.append(f'  n{node.id} [label="{label}", shape={"box" if node.parents else "ellipse"}];')
        for parent in node.parents:
            lines.append(f"  n{parent._node.id} -> n{node.id};")
            stack.append(parent._node)
    return "\n".join([*lines, "}"])


# ---------------------------------------------------------------------------------- one line per op: op, inputs, gradient

from . import activation, attention, boxes, conv, linear, pool, rnn  # type: ignore[no-redef] # noqa: E402 - the table needs the above

# activation
tie(activation.softmax, "input", activation._softmax_gradient)
tie(activation.log_softmax, "input", activation._log_softmax_gradient)
tie(activation.logsumexp, "input", activation._logsumexp_gradient)
# attention
tie(
    attention.scaled_dot_product_attention,
    ("query", "key", "value", "attn_mask"),
    attention._attention_gradient,
    attention._attention_forward,
)
tie(attention.rotary_embedding, "x", attention._rotary_gradient)
tie(attention._split_heads, "input", attention._split_heads_gradient)
tie(attention._merge_heads, "input", attention._merge_heads_gradient)
# boxes
tie(boxes.box_area, "boxes", boxes._box_area_gradient)
tie(boxes.box_convert, "boxes", boxes._box_convert_gradient)
tie(boxes.clip_boxes_to_image, "boxes", boxes._clip_boxes_gradient)
tie(boxes.box_iou, ("boxes1", "boxes2"), boxes._overlap_gradient(boxes._IOU))
tie(boxes.generalized_box_iou, ("boxes1", "boxes2"), boxes._overlap_gradient(boxes._GIOU))
tie(boxes.distance_box_iou, ("boxes1", "boxes2"), boxes._overlap_gradient(boxes._DIOU))
tie(boxes.complete_box_iou, ("boxes1", "boxes2"), boxes._overlap_gradient(boxes._CIOU))
tie(boxes.roi_align, "input", boxes._roi_align_gradient)
tie(boxes.roi_pool, "input", boxes._roi_pool_gradient)
# conv
for _dims in (1, 2, 3):
    tie(getattr(conv, f"conv{_dims}d"), ("input", "weight", "bias"), conv._conv_gradient, conv._conv_forward(_dims))
for _op in (conv.conv_transpose1d, conv.conv_transpose2d, conv.conv_transpose3d):
    tie(_op, ("input", "weight", "bias"), conv._conv_transpose_gradient)
tie(conv.deform_conv2d, ("input", "offset", "weight", "bias", "mask"), conv._deform_conv_gradient)
tie(conv.unfold, "input", conv._unfold_gradient)
tie(conv.fold, "input", conv._fold_gradient)
tie(conv.im2col, "input", conv._im2col_gradient)
tie(conv.col2im, "cols", conv._col2im_gradient)
# linear
tie(linear.linear, ("input", "weight", "bias"), linear._linear_gradient, linear._linear_forward)
tie(linear.matmul, ("a", "b"), linear._matmul_gradient)
tie(linear.dropout, "input", linear._dropout_gradient, linear._dropout_forward)
# pool
for _dims in (1, 2, 3):
    tie(getattr(pool, f"max_pool{_dims}d"), "input", pool._max_pool_gradient(_dims), pool._max_pool_forward(_dims))
    tie(
        getattr(pool, f"adaptive_max_pool{_dims}d"),
        "input",
        pool._adaptive_max_pool_gradient,
        pool._adaptive_max_pool_forward(_dims),
    )
    tie(getattr(pool, f"avg_pool{_dims}d"), "input", pool._avg_pool_gradient(_dims))
    tie(getattr(pool, f"adaptive_avg_pool{_dims}d"), "input", pool._adaptive_avg_pool_gradient(_dims))
    tie(getattr(pool, f"lp_pool{_dims}d"), "input", pool._lp_pool_gradient, pool._lp_pool_forward(_dims))
    tie(getattr(pool, f"max_unpool{_dims}d"), "input", pool._max_unpool_gradient, pool._max_unpool_forward(_dims))
tie(pool.global_avg_pool2d, "input", pool._adaptive_avg_pool_gradient(2))
# rnn
tie(rnn.lstm, ("input", "hx", "weights", "peephole"), rnn._gradient, rnn._lstm_forward)
tie(rnn.gru, ("input", "hx", "weights"), rnn._gradient, rnn._gru_forward)
tie(rnn.rnn, ("input", "hx", "weights"), rnn._gradient, rnn._rnn_forward)
for _kind in ("lstm", "gru", "rnn"):
    _wrt = ("input", "hx", "w_ih", "w_hh", "b_ih", "b_hh")
    tie(getattr(rnn, f"{_kind}_cell"), _wrt, rnn._cell_gradient, getattr(rnn, f"_{_kind}_cell_forward"))
