"""Calls that repeat: the checks are paid once, not dropped.

An op marked `@op(repeats=True)` depends on its arrays through their shapes and element types alone. Its first call on given
shapes, types and options runs as written while its `Call` keeps a log. Where that log is C or Numba kernels reading arguments
and writing fresh results or `out`, it becomes a plan: sizes and options, which argument each pointer comes from, what to
allocate. The next call with the same key (same shapes, types, options, backend choice) goes straight to the kernel; of small
strided or misaligned arrays it gets copies, which the long way makes too. Whatever else is unusual (large ones of those, an `out`
that overlaps an input, subclasses, float16, graphs, GPU arrays, `explain`) takes the long way each time.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable
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
SMALL = 1 << 16  # bytes; above, the long way takes little beside its copies


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
    if not all(is_plain(v) for v in (*args, *kwargs.values()) if isinstance(v, _ndarray)):
        return function(*args, **kwargs), None
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
    out, given = kwargs.get("out"), (*args, *(v for k, v in kwargs.items() if k != "out"))
    if out is not None and any(isinstance(v, _ndarray) and np.may_share_memory(out, v) for v in given):
        return result, None
    plan = _plan(log, values, result) if len(log) == 1 else None
    return result, plan or NO_PLAN


def is_plain(array: np.ndarray) -> bool:
    return array.flags.c_contiguous and array.flags.aligned


def in_line(values: Iterable[Any], out: Any) -> tuple[Any, ...]:
    """The values, with copies in place of small arrays that are strided or misaligned; `out` stays."""
    return tuple(v.copy() if type(v) is _ndarray and v.nbytes <= SMALL and v is not out and not is_plain(v) else v for v in values)


def _apart(value: Any, seen: set[tuple[int, int]]) -> Any:
    """The value; of an array that came before a copy, so that each pointer tells which argument it comes from."""
    if not isinstance(value, _ndarray):
        return value
    if _place(value) in seen:
        return value.copy()
    seen.add(_place(value))
    return value


def _place(array: np.ndarray) -> tuple[int, int]:
    return array.__array_interface__["data"][0], array.nbytes


def _plan(log: list[Any], arguments: tuple[Any, ...], result: Any) -> Callable[..., Any] | None:
    [call] = log
    if call.once or call.space != "host" or call.dtype != call.compute or not call.runs:
        return None
    arguments = (*call.constants, *arguments)
    sources: dict[tuple[int, int], int] = {}  # which argument a pointer comes from
    out = None
    for i, value in enumerate(arguments):
        if value is call.out is not None:
            out = i
        elif isinstance(value, _ndarray):
            if _place(value) in sources or not value.size:
                return None
            sources[_place(value)] = i
    results = result if type(result) is tuple else (result,)
    fresh = {_place(r): i for i, r in enumerate(results) if type(r) is _ndarray and r.flags.c_contiguous and r.size}
    if len(fresh) != sum(r is not None for r in results) or fresh.keys() & sources.keys():
        return None
    steps = [_Step(name, arrays, scalars) for name, arrays, scalars in call.runs]
    written = [place for step in steps for place in step.written]
    read = {place for step in steps for place in step.read}
    # an array that no kernel reads is an option: its values matter; what one kernel writes and another one reads is no result
    if sorted(written) != sorted(fresh) or read != sources.keys():
        return None
    prepared: list[tuple[Callable[..., Any], list[int]]] = []
    for step in steps:
        mine = sorted(fresh[place] for place in step.written)
        where = sources | {_place(results[r]): -2 - i for i, r in enumerate(mine)}
        one = _dispatch.prepared_call(
            step.name,
            step.arrays,
            step.scalars,
            made=tuple(
                out
                if results[r] is call.out
                else (np.empty if results[r].nbytes < _memory.MIN_BYTES else _memory.empty, results[r].shape, results[r].dtype)
                for r in mine
            ),
            sources=tuple(-1 if array is None else where[_place(array)] for array in step.arrays),
            arguments=arguments,
            returns_tuple=type(result) is tuple,
        )
        if one is None:
            return None
        prepared.append((functools.partial(one, *call.constants) if call.constants else one, mine))
    if len(prepared) == 1 and len(prepared[0][1]) == len(results):
        return prepared[0][0]
    return _one_by_one(prepared, len(results))


class _Step:
    """One kernel of a call, and the memory that it reads and writes."""

    def __init__(self, name: str, arrays: tuple[Any, ...], scalars: dict[str, Any]):
        self.name, self.arrays, self.scalars = name, arrays, scalars
        there = [(a, s) for a, s in zip(arrays, spec.find(name).arrays, strict=True) if a is not None]
        self.written = [_place(a) for a, s in there if s.role != "in"]
        self.read = {_place(a) for a, s in there if s.role == "in"}


def _one_by_one(steps: list[tuple[Callable[..., Any], list[int]]], count: int) -> Callable[..., Any]:
    """Kernels that each make some of `count` results; what none makes is None."""

    def plan(*values: Any) -> tuple[Any, ...]:
        results = [None] * count
        for kernel, places in steps:
            for place, result in zip(places, kernel(*values), strict=True):
                results[place] = result
        return tuple(results)

    return plan
