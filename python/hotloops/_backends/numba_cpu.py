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


def prepare(record: Any, dtype: np.dtype) -> Callable[..., None] | None:
    if status() or dtype not in _REAL:
        return None
    kernel = find(record)
    if kernel is None:
        return None
    function = kernel.compiled(dtype)
    absent = [np.empty((0,) * len(a.dims), _ELEMENTS.get(a.dtype, dtype)) for a in record.arrays]
    scalar_types = [(s.name, int if s.type == "int" else dtype.type) for s in record.scalars]

    def call(arrays: tuple[Any, ...], sizes: dict[str, int], scalars: dict[str, Any]) -> None:
        arguments = [none if a is None else a for a, none in zip(arrays, absent, strict=True)]
        arguments += [convert(scalars[name]) for name, convert in scalar_types]
        n = int(spec.evaluate(kernel.over, {**sizes, **scalars}))
        moved = sum(a.nbytes for a in arrays if a is not None)
        parallel = moved + record.count_flops(sizes, scalars) / 4 >= MIN_BYTES
        _threads.run_ranges(lambda begin, end: function(begin, end, *arguments), n, parallel)

    return call
