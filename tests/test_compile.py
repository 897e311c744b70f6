"""Where compiled Numba kernels are kept: a folder of the user's own; no folder, or a spoilt one, is no error."""

from __future__ import annotations

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


def start(folder):
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", CODE],
        env=os.environ | {"HOTLOOPS_CACHE_DIR": str(folder)},
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
