"""The C kernels: a plan struct and pointers into the arrays, through cffi."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np

from .. import _memory, _threads

NAME = "c"
SPACE = "host"
VIEWS = True  # kernels get the strides of arrays that may be views
_ELEMENTS = {"i64": "int64_t[]", "u8": "uint8_t[]"}
_SUFFIX = {np.dtype(np.float32): ("f32", "float[]"), np.dtype(np.float64): ("f64", "double[]")}


@functools.cache
def _load() -> tuple[Any, Any, str, str]:
    """(ffi, lib, reason, error): the extension, or why it is not there."""
    try:
        from hotloops._ckernels import ffi, lib
    except ModuleNotFoundError as error:
        if error.name != "hotloops._ckernels":
            return None, None, f"the C extension does not load: {error}", traceback.format_exc()
        return None, None, "hotloops was installed without its C kernels (no C compiler at hand then)", ""
    except Exception as error:  # present but broken: its own error is shown where backends are listed
        return None, None, f"the C extension does not load: {error}", traceback.format_exc()
    _threads.on_change(lib.hl_num_threads)
    lib.hl_keep(_memory.KEEP_BYTES)
    return ffi, lib, "", ""


def status() -> str:
    return _load()[2]


def broken() -> str:
    return _load()[3]


def describe() -> str:
    return f"instruction set {isa()}, {_threads.get_num_threads()} threads"


def isa() -> str:
    """The instruction set in use."""
    ffi, lib, _, _ = _load()
    return ffi.string(lib.hl_isa_name()).decode()


def isas() -> list[str]:
    """The instruction sets that this CPU can run, from the lowest; empty without the extension."""
    ffi, lib, _, _ = _load()
    names: list[str] = []
    while lib is not None and (name := lib.hl_isa_list(len(names))) != ffi.NULL:
        names.append(ffi.string(name).decode())
    return names


def select_isa(name: str | None) -> None:
    """Uses this instruction set from now on; None: the best. ValueError when this CPU cannot run it."""
    ffi, lib, _, _ = _load()
    if lib.hl_isa_select(ffi.NULL if name is None else name.encode()) != lib.HL_OK:
        raise ValueError(f"this CPU cannot run {name!r}; it can run {', '.join(isas())}")


def algorithm() -> str:
    """What the last kernel on this thread picked ("winograd f(4x4, 3x3)"), "" when it had no choice."""
    ffi, lib, _, _ = _load()
    return ffi.string(lib.hl_algorithm()).decode()


def kernel(record: Any, dtype: np.dtype) -> tuple[str, Any, list[tuple[Any, bool]], Callable[[int], None]] | None:
    """(name, type of its plan, (pointer type, is it written) per array, what raises a status), or None."""
    ffi, lib, reason, _ = _load()
    if reason or dtype not in _SUFFIX:
        return None
    suffix, element = _SUFFIX[dtype]
    name = f"hl_{record.name}_{suffix}"
    if not hasattr(lib, name):
        return None

    def fail(status: int) -> None:
        if status == lib.HL_MISALIGNED:
            raise ValueError(f"{record.name}: an array does not lie at a multiple of its element size")
        if status == lib.HL_NOMEM:
            raise MemoryError(f"{record.name}: no memory for the scratch space of the C kernel")
        if status == lib.HL_INTERRUPTED:
            raise KeyboardInterrupt
        raise RuntimeError(f"{record.name}: the C kernel returned the unknown status {status}")

    pointers = [(ffi.typeof(_ELEMENTS.get(a.dtype, element)), a.role != "in") for a in record.arrays]
    return name, ffi.typeof(f"hl_{record.name}_plan *"), pointers, fail


def plan(record: Any, plan_type: Any, arrays: tuple[Any, ...], sizes: dict[str, int], scalars: dict[str, Any]) -> Any:
    """The plan struct of a call: its sizes, then its scalars, then the strides of arrays that may be views."""
    return _load()[0].new(plan_type, [*sizes.values(), *[scalars[s.name] for s in record.scalars], *record.strides(arrays)])


def prepare(record: Any, dtype: np.dtype) -> Callable[..., None] | None:
    found = kernel(record, dtype)
    if found is None:
        return None
    name, plan_type, arguments, fail = found
    ffi, lib, _, _ = _load()
    function, buffer, null = getattr(lib, name), ffi.from_buffer, ffi.NULL
    views = [a.view for a in record.arrays]

    def pointer(array: Any, kind: Any, writable: bool, view: bool) -> Any:
        if array is None:
            return null
        if view and not array.flags.c_contiguous:  # a buffer would have to be in one piece
            return ffi.cast("void *", array.__array_interface__["data"][0])
        return buffer(kind, array, writable)

    def call(arrays: tuple[Any, ...], sizes: dict[str, int], scalars: dict[str, Any]) -> None:
        pointers = [pointer(a, *how, view) for a, how, view in zip(arrays, arguments, views, strict=True)]
        status = function(plan(record, plan_type, arrays, sizes, scalars), *pointers)
        if status:
            fail(status)

    return call


def prepared_call(
    record: Any, dtype: np.dtype, arrays: tuple[Any, ...], scalars: dict[str, Any], *, arguments: tuple[Any, ...], **how: Any
) -> Callable[..., Any] | None:
    """The kernel's call with all but its arrays fixed, None where it has too many; `how`: see csrc/calls.c. It raises a
    ValueError for an array that is not contiguous or not aligned."""
    found = kernel(record, dtype)
    if found is None:
        return None
    from hotloops._calls import Call

    name, plan_type, _, fail = found
    ffi, lib, _, _ = _load()
    kept = plan(record, plan_type, arrays, record.bind(arrays), scalars)
    kernel_address, plan_address = (int(ffi.cast("uintptr_t", p)) for p in (ffi.addressof(lib, name), kept))
    try:
        return Call(kernel=kernel_address, plan=plan_address, kept=kept, fail=fail, arguments=len(arguments), **how)
    except ValueError:
        return None
