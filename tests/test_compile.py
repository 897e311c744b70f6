"""Numba's kernels: the product in vectors, what is counted, where they are kept (a folder of the user's own; no folder, or a spoilt
one, is no error)."""

from __future__ import annotations

import importlib
import os
import stat
import subprocess
import sys

import pytest
from conftest import host_backends

pytestmark = pytest.mark.skipif("numba" not in host_backends(), reason="numba is not installed")

CODE = """
import numpy as np, hotloops as hl
from hotloops.kernels import compile
with hl.backend("numba"):
    assert abs(hl.softmax(np.zeros(4, np.float32)).sum() - 1) < 1e-6
print(compile.cache_folder())
"""


def start(folder, code=CODE, **environment):
    if folder is not None:
        environment["HOTLOOPS_CACHE_DIR"] = str(folder)
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, error = process.communicate(timeout=240)
    assert process.returncode == 0, error
    return out.strip()


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*.nb?"))


def test_kept_and_found_again(tmp_path):
    where = finish(start(tmp_path / "cache"))
    assert where.startswith(str(tmp_path / "cache"))
    assert stat.S_IMODE(os.stat(where).st_mode) == 0o700
    kept = files(tmp_path)
    assert any("softmax" in name for name in kept)
    times = {name: os.stat(tmp_path / name).st_mtime_ns for name in kept}
    finish(start(tmp_path / "cache"))
    assert {name: os.stat(tmp_path / name).st_mtime_ns for name in files(tmp_path)} == times


def test_no_place_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    assert finish(start(tmp_path / "file" / "below")) == ""


def test_a_folder_that_others_may_write_to_is_not_used(tmp_path):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    assert finish(start(tmp_path / "open")) == ""
    assert not files(tmp_path)


def test_a_spoilt_cache_is_no_error(tmp_path):
    finish(start(tmp_path))
    for name in files(tmp_path):
        (tmp_path / name).write_bytes(b"\x80nonsense")
    finish(start(tmp_path))


def test_processes_that_compile_at_once(tmp_path):
    for process in [start(tmp_path) for _ in range(4)]:
        finish(process)


PRODUCT = """
import itertools
import numpy as np
from hotloops.kernels.cpu.llvm import add_product

rng = np.random.default_rng(0)
for dtype in (np.float32, np.float64):
    function = add_product.bound(dtype, "cpu")
    for M, N, K in itertools.product((0, 1, 3, 4, 7, 8, 9, 17), (0, 1, 7, 8, 15, 16, 17, 32, 33, 50), (0, 1, 2, 255, 257)):
        a, b, c = (rng.integers(-4, 5, shape).astype(dtype) for shape in ((M, K), (K, N), (M, N)))
        expected = c + a @ b
        # Rows lie apart; what stands between them must count for nothing and stay.
        wide_b, wide_c = np.full((K, N + 5), np.nan, dtype), np.full((M, N + 3), np.nan, dtype)
        wide_b[:, :N] = b
        for left, strides in ((a, (K, 1)), (np.ascontiguousarray(a.T), (1, M))):
            wide_c[:, :N] = c
            flat_c = np.concatenate([[np.nan], wide_c.ravel(), [np.nan]]).astype(dtype)
            flat_a, flat_b = (np.concatenate([[np.nan], x.ravel(), [np.nan]]).astype(dtype) for x in (left, wide_b))
            function(flat_a, 1, *strides, flat_b, 1, N + 5, flat_c, 1, N + 3, M, N, K)
            assert np.isnan(flat_c[[0, -1]]).all()
            got = flat_c[1:-1].reshape(M, N + 3)
            assert np.array_equal(got[:, :N], expected) and np.isnan(got[:, N:]).all(), (dtype, M, N, K)
"""


@pytest.mark.parametrize("cpu, features", [("", ""), ("haswell", "+avx,+avx2,+fma"), ("generic", "")])
def test_product_by_vectors(cpu, features, tmp_path):
    """Bit for bit, for the registers of this processor and of lesser ones."""
    has = importlib.import_module("llvmlite.binding").get_host_cpu_features()
    if any(not has.get(name[1:]) for name in filter(None, features.split(","))):
        pytest.skip(f"code for {features} does not run on this processor")
    environment = {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": features} if cpu else {}
    finish(start(tmp_path, PRODUCT, **environment))


COUNTS = """
import sys
import numpy as np, hotloops as hl
from numba.core.runtime import rtsys

x, w, boxes = np.ones((2, 16, 20, 20), np.float32), np.ones((16, 16, 3, 3), np.float32), np.ones((30, 4), np.float32)
sequence, weights = np.ones((20, 3, 16), np.float32), tuple(np.ones(s, np.float32) for s in ((64, 16), (64, 16), 64, 64))
def run():
    hl.conv2d(x, w, padding=1), hl.conv2d_backward(x, x, w, padding=1), hl.max_pool2d(x, 3, 2), hl.avg_pool2d(x, 2)
    hl.lstm(sequence, None, weights), hl.scaled_dot_product_attention(x, x, x)
    hl.nms(boxes, boxes[:, 0], 0.5), hl.linear(w[0, 0], w[1, 0])
with hl.backend("numba"):
    run()
    before, counts = rtsys.get_allocation_stats(), [sys.getrefcount(a) for a in (x, w, boxes, sequence, *weights)]
    for _ in range(20):
        run()
after = rtsys.get_allocation_stats()
assert counts == [sys.getrefcount(a) for a in (x, w, boxes, sequence, *weights)]
assert after.alloc - before.alloc == after.free - before.free > 0
assert after.mi_alloc - before.mi_alloc == after.mi_free - before.mi_free > 0
"""


def test_what_a_kernel_takes_it_gives_back():
    """References to arguments are not counted inside kernels, scratch memory is."""
    finish(start(None, COUNTS, NUMBA_NRT_STATS="1"))


NO_BINS = """
import numpy as np, hotloops as hl
with hl.backend("numba"):
    for size in ((1, 0), (0, 1), (0, 0)):
        for _ in range(20):
            result = hl.roi_pool(np.ones((1, 2, 9, 9), np.float32), np.array([[0, 0, 0, 5, 5]], np.float32), size)
            assert result.shape == (1, 2, *size)
"""


def test_scratch_memory_is_written_before_it_is_read():
    """New memory is not zero: RoIs without bins have no first column."""
    finish(start(None, NO_BINS, MALLOC_PERTURB_="165"))
