"""The one place with compile options: how a Numba kernel becomes code for a CPU or a GPU.

A kernel is written once for float32 and float64. `real` in its text is the float type being compiled for: a literal is
written `real(0.5)`, because a bare 0.5 is a float64 and would promote a whole float32 loop. `@inline` marks a scalar
function that kernels share (kernels/scalars.py); it is compiled into its callers, for either target.
"""

from __future__ import annotations

import functools
import hashlib
import os
import pathlib
import re
import stat
import threading
import types
from collections.abc import Callable
from typing import Any

import numpy as np

from .spec import find

# NaN and infinity mean something here, so nnan and ninf are never named.
FASTMATH = {"reassoc", "contract", "nsz", "arcp", "afn"}

_lock = threading.RLock()


def real(value: Any) -> Any:
    """Stands for the float type that a kernel is compiled for; only has meaning inside one."""
    raise RuntimeError("`real` has a meaning only inside a kernel")


class Inline:
    """A scalar function that kernels call."""

    def __init__(self, function: Callable[..., Any], flags: set[str] = FASTMATH):
        self.function, self.flags = function, flags
        self._float64 = self._gpu = function
        self._bound: dict[tuple[str, Any], Any] = {}

    def float64(self, function: Callable[..., Any]) -> Inline:
        """Marks the text for float64 where it differs from that for float32."""
        self._float64 = function
        return self

    def cuda(self, function: Callable[..., Any]) -> Inline:
        """Marks the text for GPUs where it differs from that for the CPU."""
        self._gpu = function
        return self

    def bound(self, dtype: Any, target: str) -> Any:
        if (target, dtype) not in self._bound:
            text = self._float64 if dtype is np.float64 else self.function
            function = _bind(self._gpu if target == "cuda" and self._gpu is not self.function else text, dtype, target)
            self._bound[target, dtype] = _cpu_inline(function, self.flags) if target == "cpu" else _cuda_inline(function)
        return self._bound[target, dtype]

    def __call__(self, *args: Any) -> Any:
        raise RuntimeError(f"{self.function.__name__} has a meaning only inside a kernel")


def inline(function: Any = None, *, exact: bool = False, ordered: bool = False) -> Any:
    """Marks a scalar function; `exact` as for `cpu`, `ordered`: nothing is reassociated, but multiply-adds are formed."""
    flags = set[str]() if exact else {"contract"} if ordered else FASTMATH
    return Inline(function, flags) if function is not None else lambda f: Inline(f, flags)


def _cpu_inline(function: Callable[..., Any], flags: set[str]) -> Any:
    import numba

    return numba.njit(fastmath=flags, nogil=True, pipeline_class=_compiler())(function)


def _cuda_inline(function: Callable[..., Any]) -> Any:
    if simulated():  # the simulator's own device functions lose `cuda` when several threads are inside one
        return function
    return cuda.jit(device=True)(function)


def _max(a: Any, b: Any) -> Any:
    return b if b > a else a


def _min(a: Any, b: Any) -> Any:
    return b if b < a else a


# On a GPU, too, max and min of two numbers are Python's: the first where a NaN is among them. Numba's own drop the NaN there,
# or do not compile.
_CUDA_BUILTINS = {"max": Inline(_max), "min": Inline(_min)}


def _bind(function: Callable[..., Any], dtype: Any, target: str) -> Callable[..., Any]:
    """A copy of the function in which `real` is dtype and every inline function is compiled for it."""
    names = dict(function.__globals__)
    for name in _names(function.__code__):
        value = names.get(name, _CUDA_BUILTINS.get(name) if target == "cuda" else None)
        if value is real:
            names[name] = dtype
        elif isinstance(value, Inline):
            names[name] = value.bound(dtype, target)
        elif isinstance(value, _Cuda) and not simulated():
            names[name] = _import_cuda()
    copy = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__qualname__, copy.__module__, copy.__doc__ = function.__qualname__, function.__module__, function.__doc__
    return copy


def _names(code: types.CodeType) -> set[str]:
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= _names(constant)
    return found


# ---------------------------------------------------------------------------------------------------------- the CPU


class CpuKernel:
    """A kernel over a range [begin, end) of its outermost loop, of which there are `over` (an expression of sizes)."""

    def __init__(self, function: Callable[..., None], over: str, exact: bool):
        self.function, self.over, self.exact = function, over, exact
        self.__name__, self.__doc__ = function.__name__, function.__doc__
        self._compiled: dict[Any, Any] = {}

    def compiled(self, dtype: np.dtype) -> Any:
        """The machine code for float32 or float64, compiled on first use and kept on disk where that is possible."""
        with _lock:
            if dtype not in self._compiled:
                self._compiled[dtype] = _compile_cpu(
                    _bind(self.function, dtype.type, "cpu"), self._signature(dtype), set() if self.exact else FASTMATH
                )
            return self._compiled[dtype]

    def _signature(self, dtype: np.dtype) -> Any:
        import numba.types as nt

        record = find(self.function.__name__)
        element = {"real": nt.float32 if dtype == np.float32 else nt.float64, "i64": nt.int64, "u8": nt.uint8}
        arguments: list[Any] = [nt.int64, nt.int64]
        for array in record.arrays:  # an input may be read-only, and a writable array passes for one
            arguments.append(nt.Array(element[array.dtype], len(array.dims), "C", readonly=array.role == "in"))
        arguments += [nt.int64 if s.type == "int" else element["real"] for s in record.scalars]
        return nt.void(*arguments)


def cpu(*, over: str, exact: bool = False) -> Callable[[Callable[..., None]], CpuKernel]:
    """Marks a kernel for the CPU: `begin`, `end`, then the parameters of its reference.

    `exact`: every operation rounds as it is written (nothing reassociated, no multiply-add formed).
    """
    return lambda function: CpuKernel(function, over, exact)


@functools.cache
def _compiler() -> Any:
    """Numba's compiler, but for two things.

    A kernel uses the widest vectors there are: for Intel's processors LLVM prefers halves, because a few wide operations among
    others once slowed them all down; loops that are nothing else are faster with whole ones.

    References to arrays that are arguments are not counted, nor those to their views: who calls holds them. Threads would
    take turns at every slice. A function that returns arrays counts as ever.
    """
    from numba.core import cgutils, compiler, compiler_machinery, ir, lowering, typed_passes, types

    class Lower(lowering.Lower):
        def setup_function(self, fndesc: Any) -> None:
            super().setup_function(fndesc)
            set.add(self.function.attributes, '"prefer-vector-width"="512"')  # not among those that llvmlite knows by name

        def lower_assign(self, ty: Any, inst: Any) -> Any:
            value = super().lower_assign(ty, inst)
            result = self.context.data_model_manager[self.fndesc.restype]
            if isinstance(inst.value, ir.Arg) and isinstance(ty, types.Array) and not result.contains_nrt_meminfo():
                self.decref(ty, value)  # the assignment has counted
                array = self.context.make_array(ty)(self.context, self.builder, value)
                array.meminfo = cgutils.get_null_value(array.meminfo.type)
                return array._getvalue()
            return value

    class Lowering(typed_passes.BaseNativeLowering):
        _name = "native_lowering_of_kernels"
        lowering_class = Lower

    class Compiler(compiler.CompilerBase):
        def define_pipelines(self) -> list[Any]:
            pipeline = compiler.DefaultPassBuilder.define_nopython_pipeline(self.state)
            pipeline.passes = [(Lowering if made is typed_passes.NativeLowering else made, why) for made, why in pipeline.passes]
            pipeline.finalize()
            return [pipeline]

    compiler_machinery.register_pass(mutates_CFG=True, analysis_only=False)(Lowering)
    return Compiler


def _compile_cpu(function: Callable[..., None], signature: Any, fastmath: set[str]) -> Any:
    import numba

    def build(cached: bool) -> Any:
        dispatcher = numba.njit(nogil=True, fastmath=fastmath, error_model="numpy", pipeline_class=_compiler())(function)
        if cached:
            folder, before = cache_folder(), numba.config.CACHE_DIR
            try:
                numba.config.CACHE_DIR = folder
                dispatcher.enable_caching()
            finally:
                numba.config.CACHE_DIR = before
        dispatcher.compile(signature)
        dispatcher.disable_compile()
        return dispatcher

    if cache_folder():
        try:
            return build(cached=True)
        except Exception:  # a full disk, a spoilt file, no place for the cache; an error of the kernel itself comes again below
            pass
    return build(cached=False)


_folder: str | None = None


def cache_folder() -> str:
    """Where compiled kernels are kept: a folder of the user's own, named after the kernels' text; "" when there is none.

    $HOTLOOPS_CACHE_DIR, else $XDG_CACHE_HOME/hotloops, else ~/.cache/hotloops. The cache is code that will be run, so a
    folder that another user owns or may write to is not used.
    """
    global _folder
    if _folder is None:
        _folder = _find_cache_folder()
    return _folder


def _find_cache_folder() -> str:
    base = os.environ.get("HOTLOOPS_CACHE_DIR")
    if not base:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        base = os.path.join(home, "hotloops")
    here = pathlib.Path(__file__).parent
    text = hashlib.sha256()
    for path in sorted([*here.glob("*.py"), *here.glob("cpu/*.py"), *here.glob("reference/*.py")]):
        text.update(path.read_bytes())
    folder = os.path.join(base, text.hexdigest()[:16])
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        for place in (base, folder):
            status = os.stat(place)
            if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                return ""
        probe = os.path.join(folder, f".probe-{os.getpid()}-{threading.get_ident()}")
        with open(probe, "w"):
            pass
        os.unlink(probe)
    except OSError:
        return ""
    return folder


def is_kept(name: str) -> bool:
    """Whether the cache folder holds machine code of the CPU kernel of that name, for one float type at least."""
    return bool(cache_folder()) and any(pathlib.Path(cache_folder()).glob(f"*/*.{name}-*.nbi"))


# ---------------------------------------------------------------------------------------------------------- the GPU


def _import_cuda() -> Any:
    """The one import of a CUDA package: numba-cuda when installed (it replaces numba.cuda), numba's own, its successor."""
    try:
        from numba import cuda
    except ImportError:
        from numba_cuda_mlir import cuda  # type: ignore[import-not-found, no-redef]
    return cuda


class _Cuda:
    """`cuda` in a kernel's text, imported on first use; in the simulator, what the kernel that runs calls `cuda`."""

    def __getattr__(self, name: str) -> Any:
        module = _import_cuda()
        running = module.simulator.kernel._get_kernel_context() if simulated() else None
        return getattr(module if running is None else running, name)


cuda: Any = _Cuda()


def simulated() -> bool:
    """True where Numba's simulator stands in for a GPU."""
    return os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"


def blocks(n: int, threads: int) -> int:
    """How many blocks of so many threads cover n elements."""
    return (n + threads - 1) // threads


def block(threads: int) -> int:
    """The threads of a block: `threads` (a power of two), but 4 in Numba's simulator, where each is a Python thread."""
    return 4 if simulated() else threads


gpu_kernels: list[GpuKernel] = []
_GPU_ARGUMENT = re.compile(r"(real|i64|u8|i32)(\[[:,\s]*\])?")


class GpuKernel:
    """A kernel for CUDA, launched as `kernel[blocks, threads](...)` with blocks and threads numbers or tuples."""

    def __init__(self, function: Callable[..., None], signature: str):
        self.function, self.signature = function, signature
        self.__name__, self.__doc__ = function.__name__, function.__doc__
        self.arguments = [(kind, shape.count(":")) for kind, shape in _GPU_ARGUMENT.findall(signature)]
        self._compiled: dict[Any, Any] = {}
        gpu_kernels.append(self)

    def bound(self, dtype: Any) -> Callable[..., None]:
        return _bind(self.function, dtype, "cuda")

    def types(self, dtype: Any) -> tuple[Any, ...]:
        import numba.types as nt

        element = {"real": nt.float32 if dtype == np.float32 else nt.float64, "i64": nt.int64, "u8": nt.uint8, "i32": nt.int32}
        return tuple(nt.Array(element[k], ndim, "C") if ndim else element[k] for k, ndim in self.arguments)

    def __getitem__(self, launch: tuple[Any, ...]) -> Callable[..., None]:
        def run(*arguments: Any) -> None:
            dtype = next(
                (np.dtype(a.dtype) for a, (kind, ndim) in zip(arguments, self.arguments, strict=True) if kind == "real" and ndim),
                np.dtype(np.float32),
            )
            with _lock:
                if dtype not in self._compiled:
                    self._compiled[dtype] = cuda.jit(fastmath=False)(self.bound(dtype.type))
            arguments = tuple(
                dtype.type(a) if kind == "real" and not ndim else np.int32(a) if kind == "i32" and not ndim else a
                for a, (kind, ndim) in zip(arguments, self.arguments, strict=True)
            )
            self._compiled[dtype][launch](*arguments)

        return run


def gpu(signature: str) -> Callable[[Callable[..., None]], GpuKernel]:
    """Marks a CUDA kernel; the signature lists its arguments: `real[:,:], i64[:], i32, real`."""
    return lambda function: GpuKernel(function, signature)
