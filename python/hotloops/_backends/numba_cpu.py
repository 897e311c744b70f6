"""The Numba kernels for the CPU: ranges of the outermost loop on the library's threads."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np

from .. import _threads
from ..kernels import spec

NAME = "numba"
SPACE = "host"
_REAL = (np.dtype(np.float32), np.dtype(np.float64))
_ELEMENTS = {"i64": np.dtype(np.int64), "u8": np.dtype(np.uint8)}
MIN_BYTES = 3 << 19  # a loop that moves less is about as soon done as another Python thread is awake


@functools.cache
def _load() -> tuple[str, str]:
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed (pip install hotloops[numba])", ""
    try:
        import numba  # noqa: F401 - whether it loads is what is asked
    except Exception as error:
        return f"numba does not load: {error}", traceback.format_exc()
    return "", ""


def status() -> str:
    return _load()[0]


def broken() -> str:
    return _load()[1]


def describe() -> str:
    import numba

    return f"numba {numba.__version__}, {_threads.get_num_threads()} threads"


def find(record: Any) -> Any:
    """The Numba kernel of that record, or None."""
    try:
        module = importlib.import_module(f"hotloops.kernels.cpu.{record.family}")
    except ModuleNotFoundError as error:
        if error.name != f"hotloops.kernels.cpu.{record.family}":
            raise
        return None
    return getattr(module, record.name, None)


def _arrange(
    record: Any, kernel: Any, dtype: np.dtype, arrays: tuple[Any, ...], sizes: dict[str, int], scalars: dict[str, Any]
) -> tuple[list[Any], list[Any], int, bool]:
    """(what stands for each array where it is left out, the scalars, the size of the outermost loop, whether threads pay)."""
    absent = [np.empty((0,) * len(a.dims), _ELEMENTS.get(a.dtype, dtype)) for a in record.arrays]
    # Python's floats: a NumPy scalar takes longer on its way in.
    options = [scalars[s.name] if s.type == "int" else float(dtype.type(scalars[s.name])) for s in record.scalars]
    moved = sum(a.nbytes for a in arrays if a is not None)
    parallel = moved + record.count_flops(sizes, scalars) / 8 >= MIN_BYTES
    return absent, options, int(spec.evaluate(kernel.over, {**sizes, **scalars})), parallel


def prepare(record: Any, dtype: np.dtype) -> Callable[..., None] | None:
    if status() or dtype not in _REAL:
        return None
    kernel = find(record)
    if kernel is None:
        return None
    function = kernel.compiled(dtype)

    def call(arrays: tuple[Any, ...], sizes: dict[str, int], scalars: dict[str, Any]) -> None:
        absent, options, n, parallel = _arrange(record, kernel, dtype, arrays, sizes, scalars)
        given = [none if a is None else a for a, none in zip(arrays, absent, strict=True)]
        _threads.run_ranges(lambda begin, end: function(begin, end, *given, *options), n, parallel)

    return call


def prepared_call(
    record: Any,
    dtype: np.dtype,
    arrays: tuple[Any, ...],
    scalars: dict[str, Any],
    *,
    made: Any,
    sources: Any,
    arguments: Any,
    **how: Any,
) -> Callable[..., Any]:
    """The kernel's call with all but its arrays fixed, as that of the C backend (see csrc/calls.c). It raises a ValueError for an
    array that is not contiguous or not aligned.

    A small call is soon done: the text of this one is written out, with no loop over arrays and no test that can be made here.
    """
    kernel, sizes = find(record), record.bind(arrays)
    absent, options, n, parallel = _arrange(record, kernel, dtype, arrays, sizes, scalars)
    names = {
        "function": kernel.compiled(dtype),
        "run_ranges": _threads.run_ranges,
        "ndarray": np.ndarray,
        "share": np.may_share_memory,
    }
    lines, given = [], []
    forms = []  # shape and element type of each result
    for i, how_made in enumerate(made):
        if isinstance(how_made, int):  # an argument: what is read must not lie in it, and a reshape must not copy it
            out = f"value{how_made}"
            unfit = [f"not ({out}.flags.c_contiguous and {out}.flags.aligned and {out}.flags.writeable)"]
            unfit += [f"share({out}, value{source})" for source in sources if source >= 0]
            lines += [f"if {' or '.join(unfit)}: raise ValueError", f"result{i} = {out}"]
            forms.append((arguments[how_made].shape, arguments[how_made].dtype))
            continue
        make, *form = how_made
        forms.append(tuple(form))
        names |= {f"make{i}": make, f"shape{i}": form[0], f"element{i}": form[1]}
        lines.append(f"result{i} = make{i}(shape{i}, element{i})")
    for i, (array, none, source) in enumerate(zip(arrays, absent, sources, strict=True)):
        if array is None:
            names[f"given{i}"] = none
        else:  # the same memory in the kernel's shape
            name = f"value{source}" if source >= 0 else f"result{-2 - source}"
            shape, element = (arguments[source].shape, arguments[source].dtype) if source >= 0 else forms[-2 - source]
            names |= {f"form{i}": array.shape, f"type{i}": array.dtype}
            if element != array.dtype:
                name = f"ndarray(form{i}, type{i}, {name})"
            elif shape != array.shape:
                name = f"{name}.reshape(form{i})"
            lines.append(f"given{i} = {name}")
        given.append(f"given{i}")
    names |= {f"option{i}": option for i, option in enumerate(options)}
    given += [f"option{i}" for i in range(len(options))]
    values, results = ", ".join(f"value{i}" for i in range(len(arguments))), ", ".join(f"result{i}" for i in range(len(made)))
    if parallel:
        call = f"run_ranges(lambda begin, end: function(begin, end, {', '.join(given)}), {n}, True)"
    else:
        call = f"function(0, {n}, {', '.join(given)})"
    body = "\n    ".join(lines)
    text = f"""
def prepared({values}):
    {body}
    try:
        {call}
    except TypeError as error:  # the compiled function takes no other arrays, and says so before it begins
        raise ValueError("{record.name}: an array is not contiguous, or does not lie at a multiple of its element size") from error
    return {f"({results},)" if how["returns_tuple"] else results}
"""
    exec(text, names)
    return names["prepared"]
