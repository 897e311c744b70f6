"""What `import hotloops` brings along, and what a kernel's use brings."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = {"numba", "llvmlite", "cffi", "_cffi_backend", "pycparser", "setuptools", "scipy", "torch", "rich", "concurrent", "logging"}


def modules_after(code):
    """The names of the top-level modules that a fresh interpreter has loaded after NumPy and this code."""
    program = (
        f"import numpy, sys; before = set(sys.modules)\n{code}\nimport json; print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_import_is_light():
    loaded = {name.partition(".")[0] for name in modules_after("import hotloops")}
    assert "hotloops" in loaded
    assert not loaded & HEAVY


def test_import_compiles_and_loads_no_kernel():
    loaded = modules_after("import hotloops")
    assert "hotloops._ckernels" not in loaded
    assert not [name for name in loaded if name.startswith(("hotloops.kernels.cpu", "hotloops.kernels.cuda"))]


def test_a_call_in_c_needs_no_numba():
    loaded = modules_after("import hotloops as hl, numpy as np\nhl.softmax(np.zeros(3, np.float32))")
    if "hotloops._ckernels" not in loaded:
        pytest.skip("no C kernels here")
    assert "numba" not in loaded


def test_import_prints_nothing():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "import hotloops; hotloops.get_num_threads()"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_every_public_name_is_there():
    import hotloops

    for name in dir(hotloops):
        getattr(hotloops, name)
