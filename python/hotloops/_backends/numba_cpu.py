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
MIN_BYTES = 1 << 18  # below this the hand-over to another Python thread (some 50 microseconds) costs more than the loop


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
    options = [scalars[s.name] if s.type == "int" else dtype.type(scalars[s.name]) for s in record.scalars]
    moved = sum(a.nbytes for a in arrays if a is not None)
    parallel = moved + record.count_flops(sizes, scalars) / 4 >= MIN_BYTES
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
    record: Any, dtype: np.dtype, arrays: tuple[Any, ...], scalars: dict[str, Any], *, made: Any, sources: Any, **how: Any
) -> Callable[..., Any]:
    """The kernel's call with all but its arrays fixed, as that of the C backend (see csrc/calls.c). It raises a ValueError for an
    array that is not contiguous or not aligned."""
    kernel, sizes = find(record), record.bind(arrays)
    absent, options, n, parallel = _arrange(record, kernel, dtype, arrays, sizes, scalars)
    function, returns_tuple = kernel.compiled(dtype), how["returns_tuple"]
    forms = [(s, none.shape if a is None else a.shape, none.dtype) for s, a, none in zip(sources, arrays, absent, strict=True)]

    def call(*values: Any) -> Any:
        results = [make(shape, element) for make, shape, element in made]
        given = []
        for source, shape, element in forms:  # the same memory in the kernel's shape
            array: Any = values[source] if source >= 0 else results[-2 - source] if source < -1 else None
            if source >= 0 and not (array.flags.c_contiguous and array.flags.aligned):
                raise ValueError(f"{record.name}: an array is not contiguous, or does not lie at a multiple of its element size")
            same = type(array) is np.ndarray and array.dtype is element  # then reshape takes half the time
            given.append(array.reshape(shape) if same else np.ndarray(shape, element, array))
        if parallel:
            _threads.run_ranges(lambda begin, end: function(begin, end, *given, *options), n, True)
        else:  # a small call is soon done: nothing stands in between
            function(0, n, *given, *options)
        return tuple(results) if returns_tuple else results[0]

    return call
