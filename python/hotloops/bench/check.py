"""A quick self-test: the workloads at small sizes on every backend and instruction set of this machine."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from .. import _config, _dispatch
from ..kernels import spec
from .runner import allowed_error, arrays, difference, kernels_of, make_call, traced, usable_backends
from .workloads import Inputs, Workload


def variants() -> list[tuple[str, str | None]]:
    """(backend, instruction set) of every way to run a kernel here besides the reference."""
    found: list[tuple[str, str | None]] = []
    for backend in usable_backends():
        if backend == "c":
            found += [("c", isa) for isa in _dispatch.adapter("c").isas()]
        elif backend != "reference":
            found.append((backend, None))
    return found


@contextlib.contextmanager
def on(backend: str, isa: str | None) -> Iterator[None]:
    """Inside, every call runs on this backend with this instruction set."""
    with _dispatch.backend(backend):
        if isa is None:
            yield
            return
        c = _dispatch.adapter("c")
        before = c.isa()
        c.select_isa(isa)
        try:
            yield
        finally:
            c.select_isa(before)


def cast(inputs: Inputs, dtype: Any) -> Inputs:
    """The same arrays with their floats in another type."""
    return {name: a.astype(dtype) if a.dtype.kind == "f" else a for name, a in inputs.items()}


def run(workloads: Sequence[Workload], progress: Callable[[str, int, int], object]) -> dict[str, Any]:
    """Per variant how many results agree with the reference and which do not; the kernels that ran."""
    ways = variants()
    names = [f"{backend}-{isa}" if isa else backend for backend, isa in ways]
    found: dict[str, dict[str, Any]] = {name: {"right": 0, "wrong": []} for name in ("reference", *names)}
    if ("numba", None) in ways:
        _config.compile_kernels(kernels_of(workloads), ("float32", "float64"), progress)
    broken = found["reference"]["wrong"]
    kernels: set[str] = set()
    for done, workload in enumerate(workloads):
        small = workload.make(small=True)
        for dtype in (np.float32, np.float64):
            inputs = cast(small, dtype)
            try:
                with _dispatch.backend("reference"):
                    expected, choices = traced(make_call(workload, inputs, "reference"))
            except Exception as problem:  # shown as the reference's failure, the other workloads are still checked
                broken.append(f"{workload.name} {dtype.__name__}: {type(problem).__name__}: {problem}")
                continue
            truth, allowed = arrays(expected), allowed_error(choices)
            found["reference"]["right"] += 1
            kernels |= {choice.kernel for choice in choices}
            for name, (backend, isa) in zip(names, ways, strict=True):
                progress(f"{workload.name}, {name}, {dtype.__name__}", done, len(workloads))
                try:
                    with on(backend, isa):
                        error = difference(arrays(make_call(workload, inputs, backend)()), truth)
                except Exception as problem:  # shown as this variant's failure, the others are still checked
                    found[name]["wrong"].append(f"{workload.name} {dtype.__name__}: {type(problem).__name__}: {problem}")
                    continue
                if error <= allowed:
                    found[name]["right"] += 1
                else:
                    found[name]["wrong"].append(f"{workload.name} {dtype.__name__}: off by {error:.1e}, {allowed:.1e} allowed")
    skipped = {name: state.partition(": ")[2] for name, state in _dispatch.backends().items() if not state.startswith("available")}
    return {"variants": found, "skipped": skipped, "kernels": sorted(kernels), "known": len(spec.all_kernels())}
