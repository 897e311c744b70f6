"""Which backend runs: the memory space of the arrays, then what was asked for, then the order of the policy."""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ._errors import BackendUnavailableError
from ._policy import ORDER
from .kernels import spec

_MODULES = {"c": "c", "numba": "numba_cpu", "reference": "reference", "cuda": "numba_cuda"}
_choice: ContextVar[str | None] = ContextVar("hotloops_backend", default=None)
_exact: ContextVar[bool] = ContextVar("hotloops_exact", default=os.environ.get("HOTLOOPS_EXACT") == "1")
_trace: ContextVar[list[Any] | None] = ContextVar("hotloops_trace", default=None)


@functools.cache
def adapter(name: str) -> Any:
    return importlib.import_module(f"._backends.{_MODULES[name]}", __package__)


def _known(name: Any, source: str) -> str:
    if name not in _MODULES:
        raise ValueError(f"{source}: there is no backend {name!r}; there are {', '.join(_MODULES)}")
    return name


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Context manager: every call inside runs on this backend, or raises.

    Parameters
    ----------
    name : {"c", "numba", "reference", "cuda"}

    Raises
    ------
    ValueError
        There is no backend of that name.
    BackendUnavailableError
        It cannot run here; the text says why.

    Examples
    --------
    >>> import numpy as np, hotloops as hl
    >>> with hl.backend("reference"):
    ...     hl.softmax(np.zeros(2))
    array([0.5, 0.5])
    """
    reason = adapter(_known(name, "backend")).status()
    if reason:
        raise BackendUnavailableError(f"backend {name!r} cannot run here: {reason}")
    token = _choice.set(name)
    try:
        yield
    finally:
        _choice.reset(token)


@functools.cache
def _from_environment() -> str | None:
    name = os.environ.get("HOTLOOPS_BACKEND")
    return _known(name, "HOTLOOPS_BACKEND") if name else None


@contextlib.contextmanager
def exact_convolution(exact: bool = True) -> Iterator[None]:
    """Context manager: convolutions inside sum products directly, with no algorithm of larger rounding error.

    By default a float32 convolution with square filters of 2 to 5 taps, of 3 to 10 where the stride is 2, or with filters of one
    row or column of 2 to 5 taps (`conv1d`), and its gradients, may run as Winograd's algorithm, which needs fewer multiplications
    and rounds more: it errs by up to 5e-6 of the result's largest value instead of 1.5e-6, the gradient of the filters by up to
    8e-6 instead of 3e-6 (normally distributed numbers, 128 channels; `hotloops bench` shows the difference of each of its
    workloads). In volumes the same holds of each slice of a filter, where height and width have a stride of 1. An element of the
    input that is NaN or infinite makes NaN of up to six results in a dimension, also of some that do not read it. The environment
    variable HOTLOOPS_EXACT=1 sets the same for a whole process. float64 is always exact.

    Parameters
    ----------
    exact : bool
        False allows the faster algorithm again inside an outer `exact_convolution()`.

    Raises
    ------
    TypeError
        `exact` is no boolean.

    Notes
    -----
    Source: Lavin and Gray, Fast algorithms for convolutional neural networks, arXiv 1509.09308.

    Examples
    --------
    >>> import numpy as np, hotloops as hl
    >>> with hl.exact_convolution():
    ...     hl.conv1d(np.ones((1, 1, 3)), np.ones((1, 1, 2)))
    array([[[2., 2.]]])
    """
    if not isinstance(exact, bool):
        raise TypeError(f"exact_convolution: exact must be True or False, {type(exact).__name__} came")
    token = _exact.set(exact)
    try:
        yield
    finally:
        _exact.reset(token)


def exact() -> int:
    """1 where convolutions must sum their products as they are."""
    return int(_exact.get())


def chosen() -> str | None:
    """The backend asked for: by `with backend(...)`, else by HOTLOOPS_BACKEND; None: the policy decides."""
    return _choice.get() or _from_environment()


@dataclass(frozen=True)
class Choice:
    """One kernel's backend and why: `refused` names each backend that came first and its reason.

    `flops`, `bytes` and `error` are what its record says of this call: operations, compulsory traffic, and the distance from
    the reference that is allowed, relative to the largest magnitude of a result.
    """

    kernel: str
    dtype: str
    backend: str
    refused: tuple[tuple[str, str], ...]
    asked: bool
    algorithm: str = ""
    flops: float = 0.0
    bytes: int = 0
    error: float = 0.0


@functools.lru_cache(4096)
def _prepared(name: str, dtype: np.dtype, backend_name: str) -> Any:
    return adapter(backend_name).prepare(spec.find(name), dtype)


def _reason(name: str, dtype: np.dtype, backend_name: str) -> str:
    return adapter(backend_name).status() or f"it has no kernel {name} for {dtype}"


def select(name: str, dtype: np.dtype, space: str) -> tuple[Any, str, list[str]]:
    """(prepared kernel, its backend, the backends passed over) for a call on arrays of this type in this space."""
    asked = chosen()
    if asked is not None:
        target = adapter(asked)
        if space == "cuda" and target.SPACE != "cuda":
            raise BackendUnavailableError(
                f"{name}: backend {asked!r} works on arrays in host memory, the arrays are on a GPU; "
                "copy them to the host or use backend 'cuda'"
            )
        call = None if target.status() else _prepared(name, dtype, asked)
        if call is None:
            raise BackendUnavailableError(f"{name}: backend {asked!r} cannot run this call: {_reason(name, dtype, asked)}")
        return call, asked, []
    passed: list[str] = []
    for candidate in ORDER[space]:
        call = _prepared(name, dtype, candidate) if not adapter(candidate).status() else None
        if call is not None:
            return call, candidate, passed
        passed.append(candidate)
    reasons = "; ".join(f"{p}: {_reason(name, dtype, p)}" for p in passed)
    raise BackendUnavailableError(f"{name}: no backend can run this call ({reasons})")


def takes_views(name: str, dtype: np.dtype) -> bool:
    """True where the backend that runs this kernel on the host reads arrays that its record marks `~` where they lie."""
    return getattr(adapter(select(name, dtype, "host")[1]), "VIEWS", False)


def _real_type(record: Any, arrays: tuple[Any, ...]) -> np.dtype:
    return next(np.dtype(a.dtype) for s, a in zip(record.arrays, arrays, strict=True) if s.dtype == "real" and a is not None)


def run(name: str, arrays: tuple[Any, ...], scalars: dict[str, Any], space: str) -> None:
    """Runs one kernel on contiguous (see `takes_views`), native, checked arrays of one float type."""
    record = spec.find(name)
    dtype = _real_type(record, arrays)
    sizes = record.bind(arrays)
    written = [a for s, a in zip(record.arrays, arrays, strict=True) if s.role != "in" and a is not None]
    call, backend_name, passed = select(name, dtype, space)
    if any(math.prod(a.shape) for a in written):
        call(arrays, sizes, scalars)
    trace = _trace.get()
    if trace is not None:
        algorithm = getattr(adapter(backend_name), "algorithm", str)()
        refused = tuple((p, _reason(name, dtype, p)) for p in passed)
        flops, moved = record.count_flops(sizes, scalars), record.count_bytes(arrays)
        error = spec.relative_error(record.error, float(np.finfo(dtype).eps), {**sizes, **scalars})[1]
        trace.append(Choice(name, str(dtype), backend_name, refused, chosen() is not None, algorithm, flops, moved, error))


def context() -> tuple[Callable[[], Any], Callable[[], Any], Callable[[], Any]]:
    """What besides its arguments decides how a call runs, as functions: the choice, `exact`, and the log of `explain`."""
    return _choice.get, _exact.get, _trace.get


def prepared_call(name: str, arrays: tuple[Any, ...], scalars: dict[str, Any], **how: Any) -> Callable[..., Any] | None:
    """The call of this kernel with new arrays of the same sizes, where its backend has one: see `_backends.c.prepared_call`."""
    record = spec.find(name)
    dtype = _real_type(record, arrays)
    prepare = getattr(adapter(select(name, dtype, "host")[1]), "prepared_call", None)
    return None if prepare is None or _trace.get() is not None else prepare(record, dtype, arrays, scalars, **how)


# ------------------------------------------------------------------------------------------------------- explanation


@dataclass(frozen=True)
class Explanation:
    """What a call ran on; prints as text."""

    op: str
    choices: tuple[Choice, ...]
    backends: dict[str, str] = field(repr=False)

    @property
    def backend(self) -> str:
        """The backend of the call ("" when there was nothing to compute)."""
        return self.choices[0].backend if self.choices else ""

    def __str__(self) -> str:
        lines = [f"{self.op}"]
        for choice in self.choices:
            why = "asked for" if choice.asked else "first in order that has it"
            lines.append(
                f"  kernel {choice.kernel} ({choice.dtype}): backend {choice.backend}, {why}; {self.backends[choice.backend]}"
            )
            if choice.algorithm:
                lines.append(f"    algorithm: {choice.algorithm}")
            lines += [f"    not {name}: {reason}" for name, reason in choice.refused]
        if not self.choices:
            lines.append("  no kernel ran")
        return "\n".join(lines)

    __repr__ = __str__


def explain(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Runs `op(*args, **kwargs)` once and says which backend each of its kernels ran on, and why not the others.

    Examples
    --------
    >>> import numpy as np, hotloops as hl
    >>> hl.explain(hl.softmax, np.zeros((2, 3), np.float32)).backend in ("c", "numba", "reference")
    True
    """
    token = _trace.set([])
    try:
        op(*args, **kwargs)
        choices = tuple(_trace.get() or ())
    finally:
        _trace.reset(token)
    used = {c.backend: adapter(c.backend).describe() for c in choices}
    return Explanation(getattr(op, "__name__", str(op)), choices, used)


def backends() -> dict[str, str]:
    """Each backend's name and its state: "available: what it runs on", or why it cannot run here.

    Examples
    --------
    >>> import hotloops as hl
    >>> hl.backends()["reference"].startswith("available")
    True
    """
    states = {}
    for name in _MODULES:
        target = adapter(name)
        reason = target.status()
        states[name] = f"unavailable: {reason}" if reason else f"available: {target.describe()}"
    return states
