"""The Numba kernels for CUDA GPUs; with NUMBA_ENABLE_CUDASIM=1 they run in Numba's simulator, slowly and without a GPU."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np

NAME = "cuda"
SPACE = "cuda"
_REAL = (np.dtype(np.float32), np.dtype(np.float64))
_ELEMENTS = {"i64": np.dtype(np.int64), "u8": np.dtype(np.uint8)}
_pid = 0  # the process that first used the GPU: CUDA does not survive a fork


@functools.cache
def _load() -> tuple[str, str]:
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed (pip install hotloops[cuda])", ""
    try:
        from ..kernels.compile import cuda

        if not cuda.is_available():
            return "no CUDA GPU with a working driver is visible", ""
    except Exception as error:
        return f"Numba's CUDA support does not load: {type(error).__name__}: {error}", traceback.format_exc()
    return "", ""


def status() -> str:
    if _pid and _pid != os.getpid():
        return "CUDA cannot be used in a process forked after its first use (start the process with spawn)"
    return _load()[0]


def broken() -> str:
    return _load()[1]


def describe() -> str:
    from ..kernels.compile import cuda

    if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1":
        return "Numba's CUDA simulator"
    name = cuda.get_current_device().name
    return name.decode() if isinstance(name, bytes) else str(name)


def _cuda() -> Any:
    global _pid
    from ..kernels.compile import cuda

    _pid = _pid or os.getpid()
    return cuda


# ------------------------------------------------------------------------------------------------- arrays on the GPU


def is_device_array(value: Any) -> bool:
    """True for an array in GPU memory (CuPy, torch, Numba, or whatever speaks the CUDA Array Interface or DLPack)."""
    if isinstance(value, np.ndarray | np.generic | int | float | list | tuple) or value is None:
        return False
    kind = type(value)
    if kind.__module__.startswith("numba") and hasattr(value, "copy_to_host"):
        return True
    if getattr(value, "__cuda_array_interface__", None) is not None:
        return True
    where = getattr(value, "__dlpack_device__", None)
    return where is not None and int(where()[0]) == 2


def as_device(value: Any) -> Any:
    """A Numba device array over the same memory; a contiguous copy where the strides ask for one."""
    cuda = _cuda()
    kind = type(value)
    if kind.__module__.startswith("numba"):
        array = value
    elif kind.__module__.startswith("torch"):
        array = cuda.as_cuda_array(value.detach().contiguous())
    elif getattr(value, "__cuda_array_interface__", None) is not None:
        array = cuda.as_cuda_array(value)
    else:
        array = cuda.from_dlpack(value) if hasattr(cuda, "from_dlpack") else cuda.as_cuda_array(_through_cupy(value))
    if not array.is_c_contiguous():
        array = cuda.to_device(np.ascontiguousarray(array.copy_to_host()))
    return array


def _through_cupy(value: Any) -> Any:
    import cupy  # type: ignore[import-not-found]

    return cupy.from_dlpack(value)


def as_kind_of(array: Any, example: Any) -> Any:
    """The Numba device array as the kind of array that `example` is, over the same memory."""
    module = type(example).__module__.partition(".")[0]
    if module == "torch":
        import torch

        return torch.as_tensor(array, device=example.device)
    if module == "cupy":
        return importlib.import_module("cupy").asarray(array)
    if module.startswith("numba"):
        return array
    namespace = getattr(example, "__array_namespace__", None)
    return namespace().from_dlpack(array) if namespace else array


def cast(array: Any, dtype: np.dtype) -> Any:
    """A copy in another element type."""
    return _cuda().to_device(np.ascontiguousarray(array.copy_to_host().astype(dtype)))


def empty(shape: tuple[int, ...], dtype: np.dtype) -> Any:
    return _cuda().device_array(shape, dtype)


def to_host(array: Any) -> np.ndarray:
    return array.copy_to_host()


# ---------------------------------------------------------------------------------------------------------- kernels


def find(record: Any) -> Any:
    """The launcher of that record's CUDA kernels, or None."""
    try:
        module = importlib.import_module(f"hotloops.kernels.cuda.{record.family}")
    except ModuleNotFoundError as error:
        if error.name != f"hotloops.kernels.cuda.{record.family}":
            raise
        return None
    return getattr(module, record.name, None)


def prepare(record: Any, dtype: np.dtype) -> Callable[..., None] | None:
    if status() or dtype not in _REAL:
        return None
    launcher = find(record)
    if launcher is None:
        return None

    def call(arrays: tuple[Any, ...], sizes: dict[str, int], scalars: dict[str, Any]) -> None:
        cuda = _cuda()
        arguments, back = [], []
        for spec, array in zip(record.arrays, arrays, strict=True):
            if array is None:
                device = cuda.device_array((0,) * len(spec.dims), _ELEMENTS.get(spec.dtype, dtype))
            elif isinstance(array, np.ndarray):
                device = cuda.to_device(np.ascontiguousarray(array))
                if spec.role != "in":
                    back.append((device, array))
            else:
                device = array
            arguments.append(device)
        launcher(*arguments, **scalars)
        for device, array in back:
            if array.size:
                array[...] = device.copy_to_host()

    return call
