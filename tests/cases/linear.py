"""Matrix products of dense layers, and dropout."""

import numpy as np

from hotloops.kernels.reference.activation import FUNCTIONS

from . import case
from .activation import small, with_special

# M, N, K of a layer: one, vector tails, few rows, one column, beyond a block, enough for several threads.
SIZES = {
    "one": (1, 1, 1),
    "small": (3, 5, 7),
    "one_row": (1, 70, 33),
    "four_rows": (4, 19, 300),
    "one_column": (50, 1, 20),
    "tails": (67, 51, 29),
    "deep": (9, 17, 700),
    "blocks": (210, 170, 130),
    "wide": (20, 900, 40),
    "outer": (30, 40, 1),
    "one_wide_row": (1, 1200, 500),
}

LAYERS = [case(name, M=M, N=N, K=K) for name, (M, N, K) in SIZES.items()]
NAN = [case("nan", M=6, N=5, K=4, gy=lambda rng, shape, dtype: with_special(np.nan, np.inf)(rng, shape, dtype).round())]

BATCHES = [
    *(case(name, B=1, M=M, N=N, K=K) for name, (M, N, K) in SIZES.items()),
    case("batches", B=5, M=7, N=19, K=6),
    case("many_batches", B=300, M=5, N=4, K=3),
    case("small_batches", B=7, M=6, N=20, K=9),
    case("batches_of_one_row", B=5, M=1, N=37, K=45),
    case("batches_of_few_rows", B=5, M=3, N=37, K=75),
    case("large_batches", B=3, M=70, N=60, K=50),
]


def on_off(id, **values):
    return [
        case(f"{id}_drop", drop=5033165, scale=10 / 7, seed=2**62 + 12345, **values),
        case(id, drop=0, scale=1.0, seed=0, **values),
    ]


CASES = {
    "linear": [
        *(case(c.id, activation=0, **c.values) for c in LAYERS),
        *(case(f"{c.id}_no_bias", b=None, activation=0, **c.values) for c in LAYERS),
        *(case(f"{c.id}_{f}", activation=k, x=small, **c.values) for c in LAYERS for k, f in enumerate(FUNCTIONS) if k),
        case("empty_sum", M=3, N=4, K=0, activation=0),
        case("empty_sum_sigmoid", M=3, N=4, K=0, activation=3),
    ],
    "linear_grad_weight": LAYERS + NAN,
    "linear_grad_input": LAYERS + NAN,
    "linear_grad_bias": [case(c.id, M=c.values["M"], N=c.values["N"]) for c in LAYERS]
    + [case("many_rows", M=3000, N=70), case("one_long_column", M=100000, N=1), case("wide_row", M=2, N=100000)],
    "matmul": [*BATCHES, case("empty_sum", B=2, M=3, N=4, K=0)],
    "matmul_grad_a": BATCHES,
    "matmul_grad_b": BATCHES,
    "dropout": [
        *on_off("one", N=1),
        *on_off("small", N=37),
        *on_off("several_chunks", N=300_001),
        case("all", N=40, drop=2**24, scale=0.0, seed=1),
        case("special", N=40, drop=2**23, scale=2.0, seed=1, x=with_special(np.nan, np.inf, -np.inf)),
    ],
}
