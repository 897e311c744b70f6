"""Recurrent layers over a sequence."""

import numpy as np

from . import case


def scaled(factor):
    return lambda rng, shape, dtype: factor * rng.standard_normal(shape)


def contracting(rng, shape, dtype):
    """Weights that do not make a small difference between two states grow, whatever the size."""
    return rng.standard_normal(shape) / max(shape[1], 1) ** 0.5


def gate_values(rng, shape, dtype):
    """What gates and tanh give: numbers between -1 and 1."""
    return rng.uniform(-0.9, 0.9, shape)


def some_lengths(rng, shape, dtype):
    """Lengths of 0, of 1 and of the whole sequence of 6 among them."""
    return np.resize([3, 0, 6, 1, 5], shape)


SHAPES = [
    ("one", dict(T=1, N=1, D=1, H=1, reverse=0)),
    ("small", dict(T=3, N=2, D=3, H=5, reverse=0)),
    ("reverse", dict(T=3, N=2, D=4, H=5, reverse=1)),
    ("lengths", dict(T=6, N=5, D=2, H=3, reverse=0, lengths=some_lengths)),
    ("lengths_reverse", dict(T=6, N=5, D=7, H=3, reverse=1, lengths=some_lengths)),
    ("vectors_and_tail", dict(T=4, N=3, D=19, H=37, reverse=0)),
    ("one_sequence", dict(T=7, N=1, D=33, H=64, reverse=0)),
    ("gates_side_by_side", dict(T=3, N=9, D=30, H=100, reverse=0)),
    ("gates_side_by_side_deep", dict(T=2, N=2, D=7, H=529, reverse=0)),
    ("single_step", dict(T=1, N=1, D=150, H=131, reverse=0)),
    ("single_step_short_input", dict(T=1, N=1, D=17, H=140, reverse=0)),
    ("two_steps_reverse", dict(T=2, N=1, D=129, H=160, reverse=1)),
    ("many", dict(T=5, N=33, D=17, H=64, reverse=1)),
    ("units_in_blocks", dict(T=3, N=5, D=64, H=256, reverse=0)),
    ("units_in_blocks_tail", dict(T=6, N=5, D=37, H=200, reverse=1, lengths=some_lengths)),
    ("few_sequences_ahead", dict(T=9, N=7, D=5, H=40, reverse=1)),
    ("long", dict(T=18, N=7, D=3, H=70, reverse=0)),
    ("no_inputs", dict(T=3, N=2, D=0, H=5, reverse=0)),
    ("no_steps", dict(T=0, N=2, D=2, H=3, reverse=0)),
]


def walks(*, absent=(), **extra):
    """The shapes with all optional arrays, and three of them without `absent`; lengths only where a shape gives them."""
    weights = dict(w_ih=contracting, w_hh=contracting, **extra)
    cases = []
    for name, values in SHAPES:
        values = {"lengths": None, **weights, **values}
        cases.append(case(name, **values))
        if name in ("small", "lengths_reverse", "vectors_and_tail"):
            cases.append(case(f"{name}_plain", **values, **dict.fromkeys(absent)))
    return cases


def with_values(cases, suffix, **values):
    return [case(f"{c.id}_{suffix}", **{**c.values, **values}) for c in cases]


LSTM = walks(absent=("b_ih", "b_hh", "gates", "cells", "previous"), clip=0.0, peephole=None)
LSTM_BACK = walks(absent=("gy",), clip=0.0, peephole=None, gates=gate_values, cells=gate_values)
GRU = walks(absent=("b_ih", "b_hh", "gates", "hidden", "previous"), reset_after=1)
GRU_BACK = walks(absent=("gy",), reset_after=1, gates=gate_values, hidden=gate_values, previous=gate_values)
RNN = walks(absent=("b_ih", "b_hh", "gates", "previous"), relu=0)
RNN_BACK = walks(absent=("gy",), relu=0, gates=gate_values)
SATURATED = dict(T=4, N=2, D=2, H=3, reverse=0, lengths=None, w_hh=scaled(0.3), peephole=None, clip=0.0)

CASES = {
    "lstm_sequence": LSTM
    + with_values(LSTM[1:7:2], "peephole", peephole=scaled(0.5))
    + with_values(LSTM[2:5:2], "clip", clip=0.5)
    + [
        case("saturated", **SATURATED, b_ih=lambda rng, shape, dtype: np.repeat([-200, 200, 0, 200], 3)),
        case("infinite", **SATURATED, b_ih=lambda rng, shape, dtype: np.repeat([-np.inf, np.inf, 0, np.inf], 3)),
        case("nan", **SATURATED, x=lambda rng, shape, dtype: np.where(np.arange(np.prod(shape)) == 5, np.nan, 1)),
    ],
    "lstm_sequence_backward": LSTM_BACK
    + with_values(LSTM_BACK[1:7:2], "peephole", peephole=scaled(0.5))
    + with_values(LSTM_BACK[1:2], "last_state_only", gy=None, gcn=None)
    + with_values(LSTM_BACK[2:3], "no_last_state", ghn=None, gcn=None),
    "lstm_peephole_grad": [
        case(c.id, **{k: v for k, v in c.values.items() if k not in ("gates", "clip", "cells")}) for c in LSTM_BACK
    ],
    "gru_sequence": GRU + with_values(GRU, "before", reset_after=0),
    "gru_sequence_backward": GRU_BACK
    + with_values(GRU_BACK, "before", reset_after=0)
    + with_values(GRU_BACK[1:2], "no_last_state", ghn=None),
    "rnn_sequence": RNN + with_values(RNN, "relu", relu=1),
    "rnn_sequence_backward": RNN_BACK
    + with_values(RNN_BACK, "relu", relu=1)
    + with_values(RNN_BACK[1:2], "no_last_state", ghn=None),
}
