"""What hotloops found on this machine, and compiling the Numba kernels ahead of their first call."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import pathlib
import platform
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from . import _dispatch, _threads
from .kernels import spec

ENVIRONMENT = ("HOTLOOPS_BACKEND", "HOTLOOPS_ISA", "HOTLOOPS_NUM_THREADS", "OMP_NUM_THREADS", "HOTLOOPS_CACHE_DIR")


def version(package: str) -> str:
    """The version of an installed package, "" when there is none; imports nothing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def cpu_name() -> str:
    with contextlib.suppress(OSError):
        with open("/proc/cpuinfo") as lines:
            fields = dict(line.split(":", 1) for line in lines if ":" in line)
        for key in ("model name", "Model", "Hardware"):
            for field, value in fields.items():
                if field.strip() == key:
                    return value.strip()
    return platform.processor() or platform.machine()


def caches() -> dict[str, int]:
    """Bytes of each cache that the first processor sees: {"L1d": ..., "L2": ..., "L3": ...}; empty where unknown."""
    sizes: dict[str, int] = {}
    for folder in sorted(pathlib.Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        with contextlib.suppress(OSError, ValueError):
            kind = (folder / "type").read_text().strip()
            text = (folder / "size").read_text().strip()
            if kind != "Instruction":
                size = int(text.rstrip("KMG")) * {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1], 1)
                sizes[f"L{(folder / 'level').read_text().strip()}{'d' if kind == 'Data' else ''}"] = size
    return sizes


def machine() -> dict[str, Any]:
    """The processor, its caches and the system."""
    return {
        "cpu": cpu_name(),
        "processors": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "caches": caches(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    from . import __version__

    found = {"hotloops": __version__, "python": platform.python_version(), "numpy": np.__version__}
    return found | {name: version(name) for name in ("cffi", "numba", "numba-cuda") if version(name)}


def _thread_source() -> str:
    if _threads._wanted:
        return "set_num_threads"
    for name in ("HOTLOOPS_NUM_THREADS", "OMP_NUM_THREADS"):
        if os.environ.get(name, "").split(",")[0].strip().isdecimal():
            return name
    return "processors of this process"


def _backends() -> dict[str, dict[str, str]]:
    found = {}
    for name, state in _dispatch.backends().items():
        word, _, detail = state.partition(": ")
        found[name] = {"state": word, "detail": detail, "error": _dispatch.adapter(name).broken()}
    return found


def config() -> dict[str, Any]:
    """The whole configuration as plain dictionaries."""
    from .kernels.compile import cache_folder

    c = _dispatch.adapter("c")
    there = not c.status()
    return {
        "Versions": versions(),
        "Installed in": str(pathlib.Path(__file__).parent),
        "Machine": machine(),
        "Backends": _backends(),
        "C kernels": {"instruction set": c.isa() if there else "", "this CPU can run": c.isas()},
        "Threads": {"in use": _threads.get_num_threads(), "from": _thread_source()},
        "Numba cache": cache_folder() or "none: no folder that this user alone may write to",
        "Environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    }


def _bytes(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"


def config_text(found: dict[str, Any]) -> str:
    """`config()` for people."""
    hardware, c, threads = found["Machine"], found["C kernels"], found["Threads"]
    sizes = ", ".join(f"{name} {_bytes(size)}" for name, size in hardware["caches"].items())
    packages = [f"{name} {number}" for name, number in found["Versions"].items() if name != "hotloops"]
    lines = [
        f"hotloops {found['Versions']['hotloops']} in {found['Installed in']}",
        f"  versions         {', '.join(packages)}",
        f"  machine          {hardware['cpu']}, {hardware['processors']} processors{', ' + sizes if sizes else ''}",
        f"  system           {hardware['system']}",
        f"  threads          {threads['in use']} (from: {threads['from']})",
    ]
    if c["this CPU can run"]:
        lines.append(f"  instruction set  {c['instruction set']} (this CPU can run {', '.join(c['this CPU can run'])})")
    lines.append(f"  numba cache      {found['Numba cache']}")
    if found["Environment"]:
        lines.append(f"  environment      {', '.join(f'{k}={v}' for k, v in found['Environment'].items())}")
    lines.append("backends, in the order in which they are tried")
    for name, state in found["Backends"].items():
        lines.append(f"  {name:<16} {state['state']}: {state['detail']}")
        lines += [f"    {line}" for line in state["error"].splitlines()]
    return "\n".join(lines)


def show_config(mode: str = "stdout") -> dict[str, Any] | None:
    """Shows which backends, instruction set, threads and versions are in use here.

    Parameters
    ----------
    mode : {"stdout", "dicts"}
        Print a text, or return nested dictionaries.

    Returns
    -------
    dict or None
        None when it prints.

    Raises
    ------
    ValueError
        Another mode.

    Examples
    --------
    >>> import hotloops as hl
    >>> hl.show_config("dicts")["Backends"]["reference"]["state"]
    'available'
    """
    if mode not in ("stdout", "dicts"):
        raise ValueError(f"show_config: mode must be one of 'stdout', 'dicts'; {mode!r} came")
    found = config()
    if mode == "dicts":
        return found
    print(config_text(found))
    return None


# ------------------------------------------------------------------------------------------------------------ warm-up


def families() -> list[str]:
    """The families of kernels."""
    return sorted({record.family for record in spec.all_kernels().values()})


def warmup(families: str | Iterable[str] | None = None, *, progress: Callable[[str, int, int], object] | None = None) -> int:
    """Compiles the Numba kernels for the CPU ahead of their first call, and gives their number.

    What was compiled before is taken from the cache folder, so a second run takes a moment.

    Parameters
    ----------
    families : str or list of str, optional
        Families of kernels, such as "conv" or ["conv", "pool"]; all of them when left out.
    progress : callable, optional
        Called as `progress(name, done, total)` while it works.

    Returns
    -------
    int
        How many kernels are compiled now, float32 and float64 counted one by one.

    Raises
    ------
    ValueError
        There is no such family.
    BackendUnavailableError
        Numba cannot run here; the text says why.
    """
    known = globals()["families"]()
    wanted = known if families is None else [families] if isinstance(families, str) else list(families)
    for family in wanted:
        if family not in known:
            raise ValueError(f"warmup: there is no family {family!r}; there are {', '.join(known)}")
    numba = _dispatch.adapter("numba")
    if numba.status():
        raise _dispatch.BackendUnavailableError(f"warmup: {numba.status()}")
    names = [record.name for record in spec.all_kernels().values() if record.family in wanted and numba.find(record) is not None]
    compile_kernels(names, ("float32", "float64"), progress)
    return 2 * len(names)


def compile_kernels(names: Sequence[str], dtypes: Sequence[str], progress: Callable[[str, int, int], object] | None = None) -> None:
    """Compiles Numba kernels for the CPU: what is not in the cache folder yet in one process per processor, since the compiler
    works on one kernel at a time in each; then all of them are taken from there.
    """
    from .kernels.compile import cache_folder, is_kept

    new = [name for name in names if not is_kept(name)]
    processes = min(_threads.get_num_threads(), len(new) // 2)
    if cache_folder() and processes > 1 and sys.executable:
        _compile_in_processes(new, dtypes, processes, progress)
    numba = _dispatch.adapter("numba")
    for done, name in enumerate(names):
        if progress is not None:
            progress(name, done, len(names))
        for dtype in dtypes:
            numba.prepare(spec.find(name), np.dtype(dtype))


def _compile_in_processes(names: Sequence[str], dtypes: Sequence[str], processes: int, progress: Any) -> None:
    code = "import sys, hotloops._config as c; [(c.compile_kernels([n], sys.argv[1].split()), print(n)) for n in sys.argv[2:]]"
    command = [sys.executable, "-P", "-u", "-c", code, " ".join(dtypes)]
    found: queue.Queue[str | None] = queue.Queue()

    def follow(share: Sequence[str]) -> None:
        """What fails here fails again, and is raised, when this process asks for the kernel."""
        with subprocess.Popen([*command, *share], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            for line in process.stdout or ():
                found.put(line.strip())
        found.put(None)

    followers = [threading.Thread(target=follow, args=(names[k::processes],), daemon=True) for k in range(processes)]
    for follower in followers:
        follower.start()
    ended = done = 0
    while ended < processes:
        name = found.get()
        ended, done = (ended + 1, done) if name is None else (ended, done + 1)
        if progress is not None and name is not None:
            progress(name, done, len(names))
