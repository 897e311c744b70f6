"""C kernels stay inside their arrays: every array lies against a page that faults on any access, at its end and at its start."""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import os

import numpy as np
import pytest
from cases import all_cases, build
from compare import assert_same_bits
from conftest import running, variants

from hotloops import _dispatch
from hotloops.kernels import spec

PAGE = mmap.PAGESIZE
LIMIT = 1 << 20  # bytes of an array: larger cases walk the same code
libc = ctypes.CDLL(None, use_errno=True)
C_VARIANTS = [v for v in variants() if v.startswith("c-")]


class Guarded:
    """Memory between two pages that may not be touched."""

    def __init__(self, nbytes: int):
        self.room = -(-max(nbytes, 1) // PAGE) * PAGE
        self.map = mmap.mmap(-1, self.room + 2 * PAGE)
        self.start = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        for page in (self.start, self.start + PAGE + self.room):
            if libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(PAGE), 0):
                raise OSError(ctypes.get_errno(), "mprotect")

    def array(self, like: np.ndarray, at_end: bool) -> np.ndarray:
        offset = PAGE + (self.room - like.nbytes if at_end else 0)
        placed = np.frombuffer(self.map, like.dtype, like.size, offset).reshape(like.shape)
        placed[...] = like
        return placed

    def view(self, like: np.ndarray, at_end: bool) -> np.ndarray:
        """The same, but the second axis and the last but one have changed places in memory."""
        return self.array(like.swapaxes(1, -2), at_end).swapaxes(1, -2)


def parameters():
    for name, cases in all_cases().items():
        for variant in C_VARIANTS:
            if _dispatch.adapter("c").prepare(spec.find(name), np.dtype(np.float32)) is not None:
                yield pytest.param(name, variant, cases, id=f"{name}-{variant}")


@pytest.mark.parametrize(("name", "variant", "cases"), list(parameters()))
@pytest.mark.parametrize("at_end", [True, False], ids=["end", "start"])
def test_stays_inside(name, variant, cases, at_end):
    record = spec.find(name)
    for case in cases:
        for dtype in (np.float32, np.float64):
            arrays, sizes, scalars = build(record, case, dtype, "normal")
            if max((a.nbytes for a in arrays if a is not None), default=0) > LIMIT:
                continue
            kernel = _dispatch.adapter("c").prepare(record, np.dtype(dtype))
            given = list(zip(record.arrays, arrays, strict=True))
            layouts = [[None if a is None else Guarded(a.nbytes).array(a, at_end) for _, a in given]]
            if any(s.view for s, _ in given):
                views = [Guarded(a.nbytes).view(a, at_end) if s.view else b for (s, a), b in zip(given, layouts[0], strict=True)]
                layouts.append(views)
            with running(variant):
                kernel(tuple(arrays), sizes, scalars)
                for placed in layouts:
                    kernel(tuple(placed), sizes, scalars)
                    for (s, plain), guarded in zip(given, placed, strict=True):
                        if plain is not None:
                            assert_same_bits(guarded, plain, f"{name}, {s.name}, case {case.id}, {np.dtype(dtype)}")


@pytest.mark.skipif(not C_VARIANTS, reason="no C kernels here")
def test_the_guard_bites():
    """A touched guard page ends the process (by a signal, or by a sanitizer that reports it): the check above can fail."""
    pid = os.fork()
    if pid == 0:
        faulthandler.disable()
        guarded = Guarded(64)
        ctypes.memset(guarded.start + PAGE + guarded.room, 0, 1)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] != 0
