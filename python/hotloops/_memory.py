"""Memory for results: large ones come from the C library's cache of blocks.

A fresh block of some megabytes costs more in page faults than many a kernel takes to fill it. When the last array over a
block is gone, the block goes back to the cache, which keeps at most HOTLOOPS_KEEP_MB megabytes (256; 0 keeps nothing).
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

MIN_BYTES = 1 << 18  # below this malloc keeps the pages itself


def _keep_bytes() -> int:
    text = os.environ.get("HOTLOOPS_KEEP_MB", "").strip()
    return min(int(text) if text.isdecimal() else 256, 1 << 40) << 20


KEEP_BYTES = _keep_bytes()
_library: Any = None


def _blocks() -> Any:
    """(ffi, lib) of the C library, or False where it is not there."""
    global _library
    if _library is None:
        from ._backends import c

        ffi, lib, reason, _ = c._load()
        _library = False if reason or not KEEP_BYTES else (ffi, lib)
    return _library


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array with undefined elements, as numpy.empty makes it; MemoryError when there is no room."""
    count = 1
    for n in shape:
        count *= n
    nbytes = count * dtype.itemsize
    if nbytes < MIN_BYTES or not (library := _blocks()):
        return np.empty(shape, dtype)
    ffi, lib = library
    block = lib.hl_take(nbytes)
    if block == ffi.NULL:
        raise MemoryError(f"no memory for an array of shape {shape}, {dtype}")
    return np.frombuffer(ffi.buffer(ffi.gc(block, lib.hl_give, nbytes), nbytes), dtype).reshape(shape)
