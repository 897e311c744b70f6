"""Softmax and its kin."""

import numpy as np

from hotloops.kernels.reference.activation import FUNCTIONS

from . import case


def with_special(*values):
    """Normal numbers with these values strewn in."""

    def fill(rng, shape, dtype):
        x = rng.standard_normal(shape).astype(dtype)
        for i, value in enumerate(values):
            x.reshape(-1)[i * 7 % x.size] = value
        return x

    return fill


def small(rng, shape, dtype):
    """Numbers of few bits whose sums are about 1: where functions bend, and exact."""
    return (rng.integers(-3, 4, shape) / 64).astype(dtype)


ROWS = [
    case("one", M=1, K=1, I=1),
    case("row", M=3, K=5, I=1),
    case("vectors_and_tail", M=4, K=67, I=1),
    case("inner", M=2, K=6, I=5),
    case("wide_inner", M=2, K=3, I=70),
    case("long_inner", M=3, K=40, I=333),
    case("deep_inner", M=1, K=3000, I=18),
    case("inner_nan", M=2, K=3, I=20, x=with_special(np.nan, -np.inf)),
    case("long_row", M=2, K=70000, I=1),
    case("two", M=5000, K=2, I=1),
    case("many_rows", M=700, K=33, I=1),
    case("nan", M=2, K=9, I=1, x=with_special(np.nan)),
    case("infinite", M=3, K=9, I=1, x=with_special(np.inf, -np.inf)),
    case("all_minus_infinity", M=2, K=20, I=1, x=lambda rng, shape, dtype: np.full(shape, -np.inf, dtype)),
    case("large", M=2, K=40, I=1, x=lambda rng, shape, dtype: 300 * rng.standard_normal(shape)),
]


def named(name):
    """The row cases with their special values in the array of that name."""
    renamed = [{name if key == "x" else key: value for key, value in c.values.items()} for c in ROWS]
    return [case(c.id, **values) for c, values in zip(ROWS, renamed, strict=True)]


def each_function(**more):
    """Every function on ordinary numbers, on special ones, and from end to end of its range."""
    for number, name in enumerate(FUNCTIONS):
        yield case(f"one_{name}", N=1, function=number, **more)
        yield case(f"odd_{name}", N=77, function=number, x=with_special(np.nan, np.inf, -np.inf, 0.0, -0.0, 6.0), **more)
        yield case(f"range_{name}", N=399, function=number, x=lambda rng, shape, dtype: np.linspace(-120, 120, shape[0]), **more)
        yield case(f"many_{name}", N=200_003, function=number, **more)


CASES = {
    "activate": list(each_function()),
    "activate_backward": list(each_function()),
    "softmax": ROWS,
    "log_softmax": ROWS,
    "logsumexp": ROWS,
    "softmax_backward": [c for c in named("y") if c.id != "large"],
    "log_softmax_backward": [c for c in named("y") if c.id != "large"],
    "logsumexp_backward": [c for c in ROWS if c.id != "large"],
}
