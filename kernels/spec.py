"""The record of one kernel, read from a shape line.

    @kernel("x[N,C,L], w[F,C,K], b[F]? -> y[N,F,M]", error="reduce:C*K", flops="2*N*F*M*C*K")
    def conv1d(x, w, b, y, stride: int, scale: float): ...

Left of the arrow is read, right is written, `+w[F]` is both. `b[F]?` may be absent (None). `:i64`, `:u8` mark another
element type than the float type of the call. `q[B,L]~` may be a view: the last axis lies side by side, the others have any
strides of whole elements. A size is a name, a number or an expression of names (`4*H`); every name
stands alone somewhere. Scalars follow the arrays; their annotation (int or float) is their type. `error` says how far a
fast version may be from this function: `exact`, `ulp:n` (n units in the last place of a result), `near:n` (n units in
the last place of the largest result), `reduce:K` (a sum of K products in any order) or `winograd:K` (as `reduce:K` where
the scalar `exact` is 1 or the type float64, else wider).
"""

from __future__ import annotations

import importlib
import inspect
import math
import pkgutil
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

_ARRAY = re.compile(r"\s*(\+?)(\w+)\[([^\]]*)\](~?)(\??)(?::(\w+))?(\??)\s*")
_NAME = re.compile(r"[A-Za-z_]\w*")
ELEMENT_TYPES = ("real", "i64", "u8")


@dataclass(frozen=True)
class Array:
    """One array of a kernel: its sizes, element type (real: the float type of the call), role (in, out, inout)."""

    name: str
    dims: tuple[str, ...]
    dtype: str
    role: str
    optional: bool
    view: bool = False


@dataclass(frozen=True)
class Scalar:
    name: str
    type: str  # int or float


@dataclass(frozen=True)
class Kernel:
    """What a kernel reads and writes, how exact it is, what it costs; `reference` is the function itself."""

    name: str
    family: str
    arrays: tuple[Array, ...]
    scalars: tuple[Scalar, ...]
    error: str
    flops: str
    reference: Callable[..., None]

    @cached_property
    def dims(self) -> tuple[str, ...]:
        """The names of the sizes, in order of first appearance."""
        names: dict[str, None] = {}
        for array in self.arrays:
            for dim in array.dims:
                if _NAME.fullmatch(dim):
                    names.setdefault(dim)
        return tuple(names)

    @cached_property
    def _plain(self) -> tuple[tuple[int, int, str], ...]:
        """Where each name stands alone: (array, axis, name), present arrays first come."""
        return tuple((i, k, d) for i, a in enumerate(self.arrays) for k, d in enumerate(a.dims) if _NAME.fullmatch(d))

    @cached_property
    def _computed(self) -> tuple[tuple[int, int, str], ...]:
        """The other sizes: (array, axis, number or expression)."""
        return tuple((i, k, d) for i, a in enumerate(self.arrays) for k, d in enumerate(a.dims) if not _NAME.fullmatch(d))

    def bind(self, arrays: Sequence[Any]) -> dict[str, int]:
        """The sizes of a call, from the shapes of its arrays; ValueError where they contradict each other."""
        if len(arrays) != len(self.arrays):
            raise TypeError(f"{self.name}: {len(arrays)} arrays came, {len(self.arrays)} are needed")
        shapes = [None if a is None else tuple(a.shape) for a in arrays]
        for spec, shape in zip(self.arrays, shapes, strict=True):
            if shape is None:
                if not spec.optional:
                    raise TypeError(f"{self.name}: {spec.name} is needed")
            elif len(shape) != len(spec.dims):
                raise ValueError(f"{self.name}: {spec.name} has shape {shape}, [{','.join(spec.dims)}] is needed")
        sizes: dict[str, int] = dict.fromkeys(self.dims, -1)
        for i, axis, dim in self._plain:
            shape = shapes[i]
            if shape is None:
                continue
            if sizes[dim] not in (-1, shape[axis]):
                raise ValueError(f"{self.name}: {self.arrays[i].name} has {dim} = {shape[axis]}, before it was {sizes[dim]}")
            sizes[dim] = shape[axis]
        for dim in sizes:
            if sizes[dim] == -1:  # of absent arrays alone
                sizes[dim] = 0
        for i, axis, dim in self._computed:
            shape = shapes[i]
            if shape is not None and shape[axis] != (int(dim) if dim.isdecimal() else evaluate(dim, sizes)):
                need = evaluate(dim, sizes)
                raise ValueError(f"{self.name}: {self.arrays[i].name} has {shape[axis]} where {dim} = {need} is needed")
        return sizes

    def strides(self, arrays: Sequence[Any]) -> list[list[int]]:
        """Of each array that may be a view: how many elements lie from one index to the next, along all axes but the last."""
        views = (a for s, a in zip(self.arrays, arrays, strict=True) if s.view)
        return [[n // a.itemsize for n in a.strides[:-1]] for a in views]

    def count_flops(self, sizes: Mapping[str, int], scalars: Mapping[str, Any] | None = None) -> float:
        return float(evaluate(self.flops, {**sizes, **(scalars or {})})) if self.flops else 0.0

    def count_bytes(self, arrays: Sequence[Any]) -> int:
        """The compulsory traffic: each input read once, each output written once."""
        total = 0
        for spec, array in zip(self.arrays, arrays, strict=True):
            if array is not None:
                total += math.prod(array.shape) * array.dtype.itemsize * (2 if spec.role == "inout" else 1)
        return total


def evaluate(expression: str, names: Mapping[str, Any]) -> Any:
    """The value of an arithmetic expression over sizes."""
    return eval(_compiled(expression), {"__builtins__": {}, "min": min, "max": max}, dict(names))


@cache
def _compiled(expression: str) -> Any:
    return compile(expression, "<shape line>", "eval")


def relative_error(error: str, eps: float, names: Mapping[str, Any]) -> tuple[str, float]:
    """What the rule `error` of a record allows in a float type of that epsilon: ("value" or "largest", factor), the factor
    times the magnitude of each value, or times the largest magnitude of the result.
    """
    kind, _, amount = error.partition(":")
    if kind == "exact":
        return "value", 0.0
    if kind == "ulp":
        return "value", float(evaluate(amount, names)) * eps
    if kind == "near":
        return "largest", float(evaluate(amount, names)) * eps
    if kind == "reduce":
        return "largest", eps * (2 * math.sqrt(float(evaluate(amount, names))) + 8)
    if kind == "winograd":
        width = 2 * math.sqrt(float(evaluate(amount, names))) + 8
        return "largest", eps * (width if is_direct(names, eps) else max(4 * width, 50))
    if kind == "recurrent":
        return "largest", 32 * eps * (float(evaluate(amount, names)) + 4)
    raise ValueError(f"unknown error rule {error!r}")


def is_direct(names: Mapping[str, Any], eps: float) -> bool:
    """True where a `winograd` kernel sums its products as they are: the call says so, or is in float64."""
    return names["exact"] == 1 or eps < 1e-10


def _arrays(text: str, role: str) -> list[Array]:
    arrays, at = [], 0
    while at < len(text.rstrip()):
        match = _ARRAY.match(text, at)
        if not match:
            raise SyntaxError(f"cannot read the shape line at {text[at:]!r}")
        plus, name, dims, view, mark1, dtype, mark2 = match.groups()
        dtype = dtype or "real"
        if dtype not in ELEMENT_TYPES:
            raise SyntaxError(f"{name}: the element type {dtype!r} is none of {ELEMENT_TYPES}")
        sizes = tuple(d.strip().replace(" ", "") for d in dims.split(",") if d.strip())
        arrays.append(Array(name, sizes, dtype, "inout" if plus else role, bool(mark1 or mark2), bool(view)))
        at = match.end()
        if at < len(text) and text[at] == ",":
            at += 1
    return arrays


def kernel(line: str, *, error: str = "exact", flops: str = "") -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Attaches the record that `line` describes to a reference function, as `function.record`."""
    left, arrow, right = line.partition("->")
    if not arrow:
        raise SyntaxError(f"the shape line needs '->': {line!r}")
    arrays = tuple(_arrays(left, "in") + _arrays(right, "out"))

    def attach(function: Callable[..., None]) -> Callable[..., None]:
        parameters = list(inspect.signature(function).parameters.values())
        names = [p.name for p in parameters]
        if names[: len(arrays)] != [a.name for a in arrays]:
            raise SyntaxError(f"{function.__name__}: the parameters {names} do not begin with the arrays of {line!r}")
        scalars = []
        for p in parameters[len(arrays) :]:
            kind = p.annotation if isinstance(p.annotation, str) else getattr(p.annotation, "__name__", "")
            if kind not in ("int", "float"):
                raise SyntaxError(f"{function.__name__}: the scalar {p.name} needs the annotation int or float")
            scalars.append(Scalar(p.name, kind))
        family = function.__module__.rpartition(".")[2]
        record = Kernel(function.__name__, family, arrays, tuple(scalars), error, flops, function)
        function.record = record  # type: ignore[attr-defined]
        return function

    return attach


_registry: dict[str, Kernel] = {}


def all_kernels() -> dict[str, Kernel]:
    """Every kernel of the specification by name; the family modules are found, not listed."""
    if not _registry:
        from . import reference

        found: dict[str, Kernel] = {}
        for module in pkgutil.iter_modules(reference.__path__):
            for value in vars(importlib.import_module(f"{reference.__name__}.{module.name}")).values():
                record = getattr(value, "record", None)
                if isinstance(record, Kernel) and record.family == module.name:
                    if record.name in found:
                        raise SyntaxError(f"two kernels are called {record.name}")
                    found[record.name] = record
        _registry.update(found)
    return _registry


def find(name: str) -> Kernel:
    """The record of the kernel of that name."""
    return all_kernels()[name]
