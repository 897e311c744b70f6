"""Every CUDA kernel compiles for the GPUs that hotloops is meant for; that needs NVIDIA's compiler library, no GPU."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import pathlib
import pkgutil
import re
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import SIMULATED

from hotloops.kernels import compile as kernels_compile
from hotloops.kernels import cuda

for module in pkgutil.iter_modules(cuda.__path__):
    importlib.import_module(f"{cuda.__name__}.{module.name}")
TARGETS = [(8, 0), (9, 0)]
REQUIRED = os.environ.get("HOTLOOPS_REQUIRE_PTX") == "1"
WHEELS = {
    "nvvm/lib64/libnvvm.so.4": "cuda_nvcc/nvvm/lib64/libnvvm.so",
    "nvvm/libdevice": "cuda_nvcc/nvvm/libdevice",
    "lib64": "cuda_runtime/lib",
}


@pytest.fixture(scope="module", autouse=True)
def toolkit(tmp_path_factory):
    """Shows Numba the packages nvidia-cuda-nvcc-cu12 and nvidia-cuda-runtime-cu12 as a toolkit, where they are installed."""
    if SIMULATED:
        pytest.skip("the simulator is on")
    pytest.importorskip("numba")
    spec = importlib.util.find_spec("nvidia")
    for root in map(pathlib.Path, spec.submodule_search_locations if spec else ()):
        if all((root / source).exists() for source in WHEELS.values()):
            home = tmp_path_factory.mktemp("cuda")
            for link, source in WHEELS.items():
                (home / link).parent.mkdir(parents=True, exist_ok=True)
                (home / link).symlink_to(root / source)
            os.environ["CUDA_HOME"] = str(home)
    reason = missing()
    if reason and not REQUIRED:
        pytest.skip(f"CUDA kernels cannot be compiled here: {reason}")
    assert not reason


@functools.cache
def missing():
    """Why nothing can be compiled here, "" when it can."""
    try:
        ptx(lambda: None, (), (8, 0))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def ptx(function, types, target):
    from numba import cuda
    from numba.cuda import dispatcher

    with pytest.MonkeyPatch.context() as patch:  # for the functions that a kernel calls Numba asks the GPU at hand what it is
        patch.setattr(dispatcher, "get_current_device", lambda: SimpleNamespace(compute_capability=target))
        return cuda.compile_ptx(function, types, cc=target)[0]


@pytest.mark.parametrize("target", TARGETS, ids=lambda cc: f"sm_{cc[0]}{cc[1]}")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "kernel", kernels_compile.gpu_kernels, ids=lambda k: f"{k.function.__module__.rpartition('.')[2]}-{k.__name__}"
)
def test_ptx(kernel, dtype, target):
    real = np.dtype(dtype).type
    text = ptx(kernel.bound(real), kernel.types(real), target)
    assert f".target sm_{target[0]}{target[1]}" in text
    assert ".entry" in text
    if dtype == "float32":  # one float64 literal is enough to slow a whole loop down 32 times
        lines = [line.strip() for line in text.splitlines() if re.search(r"\.f64\b", line)]
        assert not [line for line in lines if not line.startswith((".reg", ".param", "ld.param"))]


def test_there_are_kernels():
    assert kernels_compile.gpu_kernels
