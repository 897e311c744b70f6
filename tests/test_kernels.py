"""Every kernel x case x backend x instruction set x element type against the reference."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from cases import all_cases, build
from compare import assert_same_bits, assert_within, sums_exactly
from conftest import SIMULATED, adapter, kernel_variants, running

from hotloops.kernels import spec

CASES = all_cases()
RUNS = [(dtype, fill) for dtype in ("float32", "float64") for fill in ("normal", "integers")]
SIMULATOR_LIMIT = 400  # elements of a case: in the simulator every CUDA thread is a Python thread, some 5,000 a second


def implemented(name: str, variant: str) -> bool:
    backend, record = adapter(variant), spec.find(name)
    if variant.startswith(("c-", "emulated")):
        return backend.kernel(record, np.dtype(np.float32)) is not None
    return backend.find(record) is not None  # `prepare` would compile it


def parameters():
    """The variants of a case follow each other, so that one truth serves all."""
    for name, cases in CASES.items():
        variants = [variant for variant in kernel_variants() if implemented(name, variant)]
        for case in cases:
            for variant in variants:
                yield pytest.param(name, case, variant, id=f"{name}-{case.id}-{variant}")


def call(record, variant, arrays, sizes, scalars, dtype):
    with running(variant):
        adapter(variant).prepare(record, np.dtype(dtype))(tuple(arrays), sizes, scalars)


def copies(arrays):
    return [None if a is None else a.copy() for a in arrays]


@functools.lru_cache(maxsize=len(RUNS))
def built(name, case, dtype, fill):
    return build(spec.find(name), case, dtype, fill)


@functools.lru_cache(maxsize=len(RUNS))
def true_arrays(name, case, dtype, fill):
    """The arrays of a case as the reference in float64 leaves them."""
    arrays, _, scalars = built(name, case, dtype, fill)
    truth = [a if a is None or a.dtype.kind != "f" else a.astype(np.float64) for a in copies(arrays)]
    spec.find(name).reference(*truth, **scalars)
    return truth


@pytest.mark.parametrize(("name", "case", "variant"), list(parameters()))
def test_kernel(name, case, variant):
    record = spec.find(name)
    for dtype, fill in RUNS:
        inputs, sizes, scalars = built(name, case, dtype, fill)
        if variant == "cuda" and SIMULATED and sum(a.size for a in inputs if a is not None) > SIMULATOR_LIMIT:
            pytest.skip("too large for the simulator")
        arrays, truth = copies(inputs), true_arrays(name, case, dtype, fill)
        call(record, variant, arrays, sizes, scalars, dtype)
        exact = fill == "integers" and sums_exactly(record.error, scalars, np.dtype(dtype))
        for spec_, before, actual, expected in zip(record.arrays, inputs, arrays, truth, strict=True):
            if actual is None:
                continue
            what = f"{name} of {dtype}, {fill}: {spec_.name}"
            if spec_.role == "in":
                assert_same_bits(actual, before, f"{what} (an input)")
            else:
                assert_within(actual, expected, "exact" if exact else record.error, {**sizes, **scalars}, what)


def test_every_kernel_has_cases():
    assert sorted(CASES) == sorted(spec.all_kernels())


@pytest.mark.parametrize("name", sorted(spec.all_kernels()))
def test_reference_fills_its_outputs(name):
    """The reference leaves no output unwritten and no input changed."""
    record = spec.find(name)
    for case in CASES[name]:
        arrays, _, scalars = build(record, case, "float64", "integers")
        before = [None if a is None else a.copy() for a in arrays]
        record.reference(*arrays, **scalars)
        for s, a, b in zip(record.arrays, arrays, before, strict=True):
            if a is not None and s.role == "in":
                assert_same_bits(a, b, f"{name}, {s.name}, case {case.id}")
