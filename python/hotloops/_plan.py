"""Calls that repeat: the checks are paid once, not dropped.

An op marked `@op(repeats=True)` depends on its arrays through their shapes and element types alone. Its first call on given
shapes, types and options runs as written while its `Call` keeps a log. Where that log is one C kernel reading arguments and
writing fresh results, it becomes a plan: the plan struct, which argument each pointer comes from, what to allocate. The
next call with the same key (same shapes, types, options, backend choice) goes straight to the kernel. Whatever is unusual
(strided or misaligned arrays, subclasses, `out=`, float16, graphs, GPU arrays, `explain`) takes the long way each time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from . import _dispatch, _memory

MAX_PLANS = 512  # per op and pattern; then all are forgotten: a program that meets that many shapes does not repeat itself
_PLAIN = frozenset({int, float, bool, str, type(None)})
_ndarray = np.ndarray
recording = threading.local()
NO_PLAN: Any = object()  # stands for a call that was looked at and cannot have a plan


def _not_integers(values: tuple[Any, ...]) -> bool:
    return any(type(v) is not int for v in values)


def keyer(kinds: tuple[type, ...]) -> Callable[..., Any] | None:
    """A function of arguments of these types: what decides how the call runs, or None where a tuple holds more than integers.
    None instead of it when an argument is of an unusual type."""
    parts, odd = ["choice()", "exact()", "trace() is None"], []
    for i, kind in enumerate(kinds):
        if kind is _ndarray:
            parts += (f"a{i}.shape", f"a{i}.dtype")
        elif kind in _PLAIN:
            parts.append(f"a{i}")
        elif kind is tuple:
            parts.append(f"a{i}")
            odd.append(f"not_integers(a{i})")
        else:
            return None
    key = f"({', '.join(parts)})"
    text = f"lambda {', '.join(f'a{i}' for i in range(len(kinds)))}: " + (f"None if {' or '.join(odd)} else {key}" if odd else key)
    choice, exact, trace = _dispatch.context()
    return eval(text, {"choice": choice, "exact": exact, "trace": trace, "not_integers": _not_integers})


def make(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """(the result of the call, its plan; NO_PLAN where there can be none, None where it is these arrays that are unusual)."""
    before = getattr(recording, "log", None)
    log: list[Any] = []
    recording.log = log
    try:
        result = function(*args, **kwargs)
    finally:
        recording.log = before
    values = (*args, *kwargs.values())
    if any(type(v) is _ndarray and not (v.flags.c_contiguous and v.flags.aligned) for v in values):
        return result, None
    plan = _plan(log, values, result) if len(log) == 1 else None
    return result, plan or NO_PLAN


def _place(array: np.ndarray) -> tuple[int, int]:
    return array.__array_interface__["data"][0], array.nbytes


def _plan(log: list[Any], arguments: tuple[Any, ...], result: Any) -> Callable[..., Any] | None:
    [call] = log
    if call.space != "host" or call.dtype != call.compute or call.out is not None or len(call.runs) != 1:
        return None
    name, arrays, scalars = call.runs[0]
    sources: dict[tuple[int, int], str] = {}
    for i, value in enumerate(arguments):
        if isinstance(value, _ndarray):
            if _place(value) in sources or not value.size:
                return None
            sources[_place(value)] = f"a{i}"
    results = result if type(result) is tuple else (result,)
    if not all(type(r) is _ndarray and r.flags.c_contiguous and r.size for r in results):
        return None
    fresh = {_place(r): f"y{i}" for i, r in enumerate(results)}
    if len(fresh) != len(results) or fresh.keys() & sources.keys():
        return None
    prepared = _dispatch.prepared_plan(name, arrays, scalars)
    if prepared is None:
        return None
    kernel, plan, pointers, null, fail = prepared
    names: dict[str, Any] = {
        "kernel": kernel,
        "plan": plan,
        "null": null,
        "fail": fail,
        "buffer": _dispatch.adapter("c").from_buffer(),
    }
    passed = ["plan"]
    written, read = set(), set()
    for i, (array, (pointer, writable)) in enumerate(zip(arrays, pointers, strict=True)):
        names[f"t{i}"] = pointer
        if array is None:
            passed.append("null")
        elif writable:
            if _place(array) not in fresh:
                return None
            written.add(_place(array))
            passed.append(f"buffer(t{i}, {fresh[_place(array)]}, True)")
        elif _place(array) in sources:
            read.add(_place(array))
            passed.append(f"buffer(t{i}, {sources[_place(array)]})")
        else:
            return None
    if written != fresh.keys() or read != sources.keys():  # an array that no kernel reads is an option: its values matter
        return None
    lines = [f"def run({', '.join(f'a{i}' for i in range(len(arguments)))}):"]
    for i, r in enumerate(results):
        names[f"s{i}"], names[f"d{i}"] = r.shape, r.dtype
        names[f"empty{i}"] = np.empty if r.nbytes < _memory.MIN_BYTES else _memory.empty
        lines.append(f"    y{i} = empty{i}(s{i}, d{i})")
    lines += [f"    status = kernel({', '.join(passed)})", "    if status:", "        fail(status)"]
    lines.append(f"    return {', '.join(f'y{i}' for i in range(len(results)))}{',' if type(result) is tuple else ''}")
    exec("\n".join(lines), names)
    return names["run"]
