"""Shared by all tests: which backends and instruction sets can run here."""

from __future__ import annotations

import contextlib
import os

import emulated
import pytest

import hotloops as hl
from hotloops import _dispatch

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"


def variants() -> list[str]:
    """Every way to run a kernel here: `c-<instruction set>`, `numba`, `cuda` (a GPU, or the simulator)."""
    c, found = _dispatch.adapter("c"), []
    if os.environ.get("HOTLOOPS_REQUIRE_C") == "1" and c.status():
        raise RuntimeError(f"the C kernels are required: {c.status()}\n{c.broken()}")
    if not c.status():
        found += [f"c-{isa}" for isa in c.isas()]
    found += [name for name in ("numba", "cuda") if not _dispatch.adapter(name).status()]
    return found


def kernel_variants() -> list[str]:
    """Those, and `emulated`: C kernels of another machine. They run as kernels; ops run on `variants()` alone."""
    return variants() + (["emulated"] if emulated.COMMAND else [])


def adapter(variant: str):
    """What runs the kernels of a variant: its backend's adapter, or the emulator's."""
    return emulated if variant == "emulated" else _dispatch.adapter(variant.partition("-")[0])


@contextlib.contextmanager
def running(variant: str):
    """Inside, every call runs on that variant ("reference" too)."""
    if variant == "emulated":
        yield
        return
    name, _, isa = variant.partition("-")
    c = _dispatch.adapter("c")
    before = c.isa() if isa else None
    with hl.backend(name):
        try:
            if isa:
                c.select_isa(isa)
            yield
        finally:
            if isa:
                c.select_isa(before)


def host_backends() -> list[str]:
    """The backends for arrays in host memory that can run here, as `hl.backend` names them."""
    return [name for name in ("reference", "c", "numba") if not _dispatch.adapter(name).status()]


@pytest.fixture(params=host_backends())
def host_backend(request):
    """Runs the test once on every backend of the host."""
    with hl.backend(request.param):
        yield request.param


@pytest.fixture
def vision():
    """torchvision's operators; a skip where it is not there or not built for the torch that is."""
    try:
        import torchvision
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"no torchvision: {error}")
    return torchvision.ops
