"""The one rule for how far a result may be from the truth; every tolerance of the suite is made here (and the amounts in
`spec.relative_error`, which the benchmarks share).

The truth is the reference computed in float64 on the same inputs. `exact`: the same values (a NaN equals a NaN).
`ulp:n`: n units in the last place of the float type, relative to each value. `near:n`: n units in the last
place, relative to the largest magnitude of the result. `reduce:K`: a sum of K products in any order
and grouping: proportional to the type's epsilon, to 2 sqrt(K) + 8, and to the largest magnitude of the result.
`winograd:K`: the same where the call says exact=1 or is in float64; else four times as much, at least 6e-6 of the largest
magnitude (Winograd's algorithm errs by up to 6e-6, a direct sum by 2e-6, where sums are long).
`recurrent:T`: a state carried over T steps, each of which adds the error of a sum.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from hotloops.bench import runner
from hotloops.kernels import spec

EXACT = np.longdouble  # float64 has 11 bits less where this is x87's; where it is float64 itself, half a unit is the truth's own
TINY = {np.dtype(np.float32): 1e-37, np.dtype(np.float64): 1e-300, np.dtype(np.float16): 6e-8}


def assert_same(actual: Any, expected: Any, what: str) -> None:
    """The same values, shape and element type; a NaN equals a NaN, 0.0 equals -0.0."""
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, expected {expected.shape}"
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, expected {expected.dtype}"
    np.testing.assert_array_equal(actual, expected, err_msg=what)


def assert_same_bits(actual: Any, expected: Any, what: str) -> None:
    """The same bytes."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype, what
    assert np.ascontiguousarray(actual).tobytes() == np.ascontiguousarray(expected).tobytes(), f"{what}: other bits"


def sums_exactly(error: str, names: dict[str, Any], dtype: Any) -> bool:
    """True where a call on small integers has only exact products and sums: every version gives the same values."""
    winograd = error.startswith("winograd") and spec.is_direct(names, float(np.finfo(dtype).eps))
    return (error.startswith("reduce") or winograd) and names.get("activation", 0) <= 2  # none, or one that cuts off


def assert_within(actual: Any, truth: Any, error: str, names: dict[str, Any], what: str) -> None:
    """The rule `error` of a kernel's record, with `names` the sizes and scalars it may speak of."""
    actual, truth = np.asarray(actual), np.asarray(truth)
    assert actual.shape == truth.shape, f"{what}: shape {actual.shape}, expected {truth.shape}"
    if error == "exact" or actual.dtype.kind != "f" or not actual.size:
        assert_same(actual, truth.astype(actual.dtype), what)
        return
    with np.errstate(over="ignore"):
        truth = truth.astype(np.float64)
        rounded = truth.astype(actual.dtype)
    finite = np.isfinite(rounded)
    np.testing.assert_array_equal(np.where(finite, 0, actual), np.where(finite, 0, rounded), err_msg=f"{what}: NaN or infinity")
    against, factor = spec.relative_error(error, float(np.finfo(actual.dtype).eps), names)
    largest = float(np.max(np.abs(truth), where=finite, initial=0.0))
    allowed = factor * (np.abs(truth) if against == "value" else np.full(truth.shape, largest)) + TINY[actual.dtype]
    allowed = np.where(finite, allowed, np.inf)
    with np.errstate(invalid="ignore"):
        distance = np.where(finite, np.abs(actual.astype(np.float64) - truth), 0.0)
        worst = np.unravel_index(np.argmax(distance - allowed), distance.shape)
    assert distance[worst] <= allowed[worst], (
        f"{what}: at {tuple(int(i) for i in worst)} {actual[worst]!r}, expected {truth[worst]!r} +- {allowed[worst]:.3g}"
    )


def assert_units(actual: Any, truth: Any, allowed: float, what: str, *, flushed: bool) -> None:
    """At most so many units in the last place of each true value, which is `EXACT` (below the smallest normal number: of that).
    `flushed`: what is below it may be 0."""
    info = np.finfo(actual.dtype)
    with np.errstate(over="ignore"):
        rounded = truth.astype(actual.dtype)
    finite = np.isfinite(rounded)
    np.testing.assert_array_equal(actual[~finite], rounded[~finite], err_msg=what)
    actual, truth = actual[finite], truth[finite]
    unit = np.ldexp(EXACT(1), np.maximum(np.frexp(truth)[1] - 1, info.minexp) - info.nmant)
    off = np.abs(actual.astype(EXACT) - truth) / unit
    off[flushed & (np.abs(truth) < info.tiny) & (np.abs(actual) <= info.tiny)] = 0
    worst = np.argmax(off)
    assert off[worst] <= allowed, f"{what}: {actual[worst]!r} is {float(off[worst]):.2f} units off {truth[worst]!r}"


def assert_agrees(actual: Any, expected: Any, choices: Iterable[Any], what: str) -> None:
    """One call on two backends: each as far from the truth as the records of the kernels that ran (`choices`) allow."""
    error, allowed = runner.difference(runner.arrays(actual), runner.arrays(expected)), runner.allowed_error(choices)
    assert error <= allowed, f"{what}: differs by {error:.3g} of the largest value, {allowed:.3g} is allowed"


def assert_oracle(actual: Any, expected: Any, *, terms: float = 1.0, what: str = "") -> None:
    """Against another library in the same float type: both are within `reduce:terms` of the truth."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, expected {expected.dtype}"
    assert_within(actual, expected, f"reduce:{4 * terms + 32}", {}, what)
