"""The vector functions that the C kernels share, against float64 (float64 against extended precision)."""

from __future__ import annotations

import math
import struct

import emulated
import numpy as np
import pytest
from compare import EXACT, assert_units
from conftest import adapter, kernel_variants, running

VARIANTS = [v for v in kernel_variants() if v.startswith(("c-", "emulated"))]


def erf(x):
    return np.array([math.erf(v) for v in x.astype(np.float64)], EXACT)


def sigmoid(x):
    return np.where(x < 0, np.exp(np.minimum(x, 0)), 1) / (1 + np.exp(-np.abs(x)))


# name: number in hotloops.h, truth, units in the last place, range; "flushed": a result below the smallest normal number may be 0
FUNCTIONS = {
    "exp": (0, np.exp, 2, (-np.inf, np.inf), False),
    "exp_below": (1, np.exp, 2, (-np.inf, 0), True),
    "exp2": (2, np.exp2, 2, (-np.inf, 126), True),
    "log": (3, np.log, 2, (-np.inf, np.inf), False),
    "tanh": (4, np.tanh, 2, (-np.inf, np.inf), False),
    "sigmoid": (5, sigmoid, 2, (-np.inf, np.inf), False),
    "erf": (6, erf, 2, (-np.inf, np.inf), False),
    "tanh_gate": (7, np.tanh, 4, (-np.inf, np.inf), True),
    "sigmoid_gate": (8, sigmoid, 4, (-np.inf, np.inf), True),
}


def evaluate(variant, number, x):
    y = np.full_like(x, 77)
    name = f"hl_elementary_{'f32' if x.dtype == np.float32 else 'f64'}"
    with running(variant):
        if variant == "emulated":
            plan = np.frombuffer(struct.pack("=qq", x.size, number), np.uint8).copy()
            assert emulated.server().run(name, [plan, x, y]) == 0
        else:
            ffi, lib = adapter(variant)._load()[:2]
            element = "float[]" if x.dtype == np.float32 else "double[]"
            plan = ffi.new("hl_elementary_plan *", [x.size, number])
            assert getattr(lib, name)(plan, ffi.from_buffer(element, x), ffi.from_buffer(element, y)) == lib.HL_OK
    return y


def sweep(dtype):
    """Numbers of every exponent and both signs, and more of them between -800 and 800."""
    bits, integer, step = (32, np.uint32, 4001) if dtype == np.float32 else (64, np.uint64, (1 << 45) + 9973)
    patterns = np.arange(0, 1 << bits, step, dtype=object) if bits == 64 else np.arange(0, 1 << bits, step)
    rng = np.random.default_rng(0)
    near = [rng.uniform(-w, w, 60_000) for w in (1, 10, 100, 800)]
    return np.concatenate([patterns.astype(integer).view(dtype), np.concatenate(near).astype(dtype)])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_units_in_the_last_place(name, variant, dtype):
    number, function, allowed, (low, high), flushed = FUNCTIONS[name]
    x = sweep(dtype)
    x = x[(x >= low) & (x <= high)]
    wide = np.float64 if dtype == np.float32 else EXACT
    with np.errstate(all="ignore"):
        truth = np.asarray(function(x.astype(wide)), EXACT)
    assert_units(evaluate(variant, number, x), truth, allowed, name, flushed=flushed)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("variant", VARIANTS)
def test_special_values(variant, dtype):
    for name, (number, function, _, (low, high), _) in FUNCTIONS.items():
        x = np.array([v for v in (0.0, -0.0, np.inf, -np.inf) if low <= v <= high] + [np.nan], dtype)
        with np.errstate(all="ignore"):
            expected = function(x).astype(dtype)
        np.testing.assert_array_equal(evaluate(variant, number, x), expected, err_msg=name)
