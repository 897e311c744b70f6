"""What this machine can do at most: multiply-adds a second, and bytes a second from memory and from the nearest caches.

Measured with the vectors and threads of the C kernels (csrc/peak.c); without them NumPy's matrix product and copy stand in.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .. import _config, _dispatch, _threads

BLOCK = 1 << 14  # elements, as in csrc/peak.c
FAR_BYTES = 1 << 27
REPEATS = 7


@dataclass(frozen=True)
class Peaks:
    """`gflops` in 10^9 float32 operations a second (a multiply-add is two), the others in 10^9 bytes a second."""

    threads: int
    gflops: float
    memory: float
    cache: float
    how: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def last_cache() -> int:
    """Bytes of the last cache; 8 MiB where unknown."""
    return max(_config.caches().values(), default=8 << 20)


def floor_ms(peaks: dict[str, Any], flops: float, moved: float, cached: bool) -> tuple[float, str]:
    """The least time for so many operations and bytes, and what sets it: "compute", "memory" or "cache"."""
    level = "cache" if cached else "memory"
    compute, transport = flops / peaks["gflops"] / 1e6, moved / peaks[level] / 1e6
    return (compute, "compute") if compute >= transport else (transport, level)


def _best(work: Callable[[], Any]) -> float:
    work()
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times)


def _aligned(n: int) -> np.ndarray:
    buffer = np.ones(n + 16, np.float32)
    start = -buffer.ctypes.data % 64 // 4
    return buffer[start : start + n]


def measure(threads: int) -> Peaks:
    """The peaks with so many threads, the best of a few runs each (some 0.5 s)."""
    near = min(max(last_cache() // 8, 1 << 19), 1 << 22)
    with _threads.num_threads(threads):
        return _numpy(threads, near) if _dispatch.adapter("c").status() else _c(threads, near)


def _c(threads: int, near: int) -> Peaks:
    c = _dispatch.adapter("c")
    ffi, lib = c._load()[:2]
    buffer = ffi.from_buffer
    chunks, count = 4 * threads, 384 * 40000
    sums = np.empty(chunks, np.float32)
    seconds = _best(lambda: lib.hl_peak_fma_f32(chunks, count, buffer("float[]", sums)))
    gflops = 2e-9 * chunks * count / seconds

    def bandwidth(size: int, past_cache: bool) -> float:
        blocks = size // (4 * BLOCK)
        x, y, out = _aligned(blocks * BLOCK), _aligned(blocks * BLOCK), np.empty(blocks, np.float32)
        px, py, po = buffer("float[]", x), buffer("float[]", y), buffer("float[]", out)
        repeats = math.ceil((1 << 25) / size)

        def read() -> None:
            for _ in range(repeats):
                lib.hl_peak_read_f32(blocks, px, po)

        def copy() -> None:
            for _ in range(repeats):
                lib.hl_peak_copy_f32(blocks, past_cache, px, py)

        return 1e-9 * repeats * max(x.nbytes / _best(read), 2 * x.nbytes / _best(copy))

    return Peaks(threads, gflops, bandwidth(FAR_BYTES, True), bandwidth(near, False), f"C kernels, {c.isa()}")


def _numpy(threads: int, near: int) -> Peaks:
    from .runner import blas_threads

    a = np.ones((1024, 1024), np.float32)

    def bandwidth(size: int) -> float:
        x, y = _aligned(size // 4), _aligned(size // 4)
        return 2e-9 * x.nbytes / _best(lambda: np.copyto(y, x))

    with blas_threads(threads):
        gflops = 2e-9 * 1024**3 / _best(lambda: a @ a)
    return Peaks(threads, gflops, bandwidth(FAR_BYTES), bandwidth(near), "NumPy's matrix product and copy")
