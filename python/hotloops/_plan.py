"""Calls that repeat: the checks are paid once, not dropped.

An op marked `@op(repeats=True)` depends on its arrays through their shapes and element types alone. Its first call on given
shapes, types and options runs as written while its `Call` keeps a log. Where that log is one C or Numba kernel reading arguments
and writing fresh results or `out`, it becomes a plan: sizes and options, which argument each pointer comes from, what to
allocate. The next call with the same key (same shapes, types, options, backend choice) goes straight to the kernel. Whatever is
unusual (strided or misaligned arrays, an `out` that overlaps an input, subclasses, float16, graphs, GPU arrays, `explain`) takes
the long way each time.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from . import _dispatch, _memory
from ._prepack import PackedWeight
from .kernels import spec

MAX_PLANS = 512  # per op and pattern; then all are forgotten: a program that meets that many shapes does not repeat itself
_PLAIN = frozenset({int, float, bool, str, type(None)})
_ndarray = np.ndarray
recording = threading.local()
NO_PLAN: Any = object()  # stands for a call that was looked at and cannot have a plan
OTHER_TYPES: Any = object()
MAX_PATTERNS = 16  # of types, per op and number of arguments; each is tried in turn


def _not_integers(values: tuple[Any, ...]) -> bool:
    return any(type(v) is not int for v in values)


def keyer(kinds: tuple[type, ...]) -> Callable[..., Any] | None:
    """A function of arguments of these types: what decides how the call runs, None where a tuple holds more than integers, and
    OTHER_TYPES for arguments of other types. None instead of it when a type is unusual."""
    parts, odd = ["choice()", "exact()", "trace() is None"], []
    for i, kind in enumerate(kinds):
        if kind is _ndarray or kind is PackedWeight:
            parts += (f"a{i}.shape", f"a{i}.dtype")
        elif kind in _PLAIN:
            parts.append(f"a{i}")
        elif kind is tuple:
            parts.append(f"a{i}")
            odd.append(f"not_integers(a{i})")
        else:
            return None
    key = f"({', '.join(parts)})"
    if odd:
        key = f"None if {' or '.join(odd)} else {key}"
    others = " or ".join(f"type(a{i}) is not t{i}" for i in range(len(kinds))) or "False"
    choice, exact, trace = _dispatch.context()
    names = {"choice": choice, "exact": exact, "trace": trace, "not_integers": _not_integers, "other": OTHER_TYPES}
    names |= {f"t{i}": kind for i, kind in enumerate(kinds)}
    return eval(f"lambda {', '.join(f'a{i}' for i in range(len(kinds)))}: other if {others} else {key}", names)


def new_pattern(patterns: list[tuple[Any, dict[Any, Any]]], values: tuple[Any, ...]) -> tuple[Any, dict[Any, Any]]:
    """The key of a call whose types no pattern has, and the plans of the pattern that is made for them; (None, {}) where
    there can be none."""
    made = keyer(tuple(map(type, values))) if len(patterns) < MAX_PATTERNS else None
    if made is None:
        return None, {}
    patterns.append((made, {}))
    return made(*values), patterns[-1][1]


def make(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """(the result of the call, its plan; NO_PLAN where there can be none, None where it is these arrays that are unusual)."""
    seen: set[tuple[int, int]] = set()
    args = tuple(_apart(v, seen) for v in args)
    kwargs = {k: v if k == "out" else _apart(v, seen) for k, v in kwargs.items()}
    before = getattr(recording, "log", None)
    log: list[Any] = []
    recording.log = log
    try:
        result = function(*args, **kwargs)
    finally:
        recording.log = before
    values = (*args, *kwargs.values())
    if any(isinstance(v, _ndarray) and not (v.flags.c_contiguous and v.flags.aligned) for v in values):
        return result, None
    out, given = kwargs.get("out"), (*args, *(v for k, v in kwargs.items() if k != "out"))
    if out is not None and any(isinstance(v, _ndarray) and np.may_share_memory(out, v) for v in given):
        return result, None
    plan = _plan(log, values, result) if len(log) == 1 else None
    return result, plan or NO_PLAN


def _apart(value: Any, seen: set[tuple[int, int]]) -> Any:
    """The value; of an array that came before a copy, so that each pointer tells which argument it comes from."""
    if not isinstance(value, _ndarray) or not value.flags.c_contiguous:
        return value
    if _place(value) in seen:
        return value.copy()
    seen.add(_place(value))
    return value


def _place(array: np.ndarray) -> tuple[int, int]:
    return array.__array_interface__["data"][0], array.nbytes


def _plan(log: list[Any], arguments: tuple[Any, ...], result: Any) -> Callable[..., Any] | None:
    [call] = log
    if call.once or call.space != "host" or call.dtype != call.compute or len(call.runs) != 1:
        return None
    name, arrays, scalars = call.runs[0]
    arguments = (*call.constants, *arguments)
    sources: dict[tuple[int, int], int] = {}  # where a pointer comes from: argument i, or result -2 - i; -1: it is absent
    out = None
    for i, value in enumerate(arguments):
        if value is call.out is not None:
            out = i
        elif isinstance(value, _ndarray):
            if _place(value) in sources or not value.size:
                return None
            sources[_place(value)] = i
    results = result if type(result) is tuple else (result,)
    if not all(type(r) is _ndarray and r.flags.c_contiguous and r.size for r in results):
        return None
    fresh = {_place(r): -2 - i for i, r in enumerate(results)}
    if len(fresh) != len(results) or fresh.keys() & sources.keys():
        return None
    written = {
        _place(array) for array, s in zip(arrays, spec.find(name).arrays, strict=True) if array is not None and s.role != "in"
    }
    read = {_place(array) for array in arrays if array is not None} - written
    if written != fresh.keys() or read != sources.keys():  # an array that no kernel reads is an option: its values matter
        return None
    prepared = _dispatch.prepared_call(
        name,
        arrays,
        scalars,
        made=tuple(
            out if r is call.out else (np.empty if r.nbytes < _memory.MIN_BYTES else _memory.empty, r.shape, r.dtype)
            for r in results
        ),
        sources=tuple(-1 if array is None else (sources | fresh)[_place(array)] for array in arrays),
        arguments=arguments,
        returns_tuple=type(result) is tuple,
    )
    return functools.partial(prepared, *call.constants) if prepared and call.constants else prepared
