"""One ordinary call of every op that takes arrays: what the suites over all ops (layouts, hostile arguments) start from.

An entry is a function (rng, dtype) -> (args, kwargs); the float arrays among args are the ones that the suites vary. An op
that can be called with arrays of any one shape, or with such an array and numbers, needs no entry.
"""

from __future__ import annotations

import contextlib
import inspect

import numpy as np

import hotloops as hl

CALLS = {}


def call(function):
    CALLS[function.__name__.lstrip("_")] = function
    return function


def normal(rng, dtype, *shape):
    return rng.standard_normal(shape).astype(dtype)


def some_boxes(rng, dtype, n):
    corner = rng.uniform(0, 50, (n, 2))
    return np.concatenate([corner, corner + rng.uniform(1, 30, (n, 2))], axis=1).astype(dtype)


def define(*names, **kwargs):
    """Entries for ops that are called alike."""

    def deco(function):
        for name in names:
            CALLS[name] = function
        return function

    return deco


# ---------------------------------------------------------------------------------------------------------- activation


@define("softmax", "log_softmax", "logsumexp")
def _(rng, dtype):
    return [normal(rng, dtype, 3, 4, 5)], {"axis": 1}


# ----------------------------------------------------------------------------------------------------------- attention


@call
def scaled_dot_product_attention(rng, dtype):
    return [normal(rng, dtype, 2, 2, 5, 8), normal(rng, dtype, 2, 2, 7, 8), normal(rng, dtype, 2, 2, 7, 6)], {}


@call
def multi_head_attention(rng, dtype):
    x = [normal(rng, dtype, 2, n, 8) for n in (3, 5, 5)]
    return [*x, 2, normal(rng, dtype, 24, 8), normal(rng, dtype, 24), normal(rng, dtype, 8, 8), normal(rng, dtype, 8)], {}


@call
def rotary_embedding(rng, dtype):
    return [normal(rng, dtype, 2, 5, 8), normal(rng, dtype, 5, 4), normal(rng, dtype, 5, 4)], {}


@call
def dropout(rng, dtype):
    return [normal(rng, dtype, 4, 6), 0.3], {"rng": 7}


@call
def linear(rng, dtype):
    return [normal(rng, dtype, 3, 4, 5), normal(rng, dtype, 7, 5), normal(rng, dtype, 7)], {}


@call
def matmul(rng, dtype):
    return [normal(rng, dtype, 3, 4, 5), normal(rng, dtype, 5, 6)], {}


# --------------------------------------------------------------------------------------------------------------- boxes


@define("box_area")
def _(rng, dtype):
    return [some_boxes(rng, dtype, 5)], {}


@call
def box_convert(rng, dtype):
    return [some_boxes(rng, dtype, 5), "xyxy", "cxcywh"], {}


@define("box_iou", "generalized_box_iou", "distance_box_iou", "complete_box_iou")
def _(rng, dtype):
    return [some_boxes(rng, dtype, 5), some_boxes(rng, dtype, 7)], {}


@call
def sparse_box_iou(rng, dtype):
    return [some_boxes(rng, dtype, 5), some_boxes(rng, dtype, 7), 0.1], {}


@call
def clip_boxes_to_image(rng, dtype):
    return [some_boxes(rng, dtype, 6), (40, 30)], {}


@call
def remove_small_boxes(rng, dtype):
    return [some_boxes(rng, dtype, 6), 10.0], {}


@call
def nms(rng, dtype):
    return [some_boxes(rng, dtype, 20), rng.random(20).astype(dtype), 0.3], {}


@call
def batched_nms(rng, dtype):
    return [some_boxes(rng, dtype, 20), rng.random(20).astype(dtype), rng.integers(0, 3, 20), 0.3], {}


@call
def soft_nms(rng, dtype):
    return [some_boxes(rng, dtype, 12), rng.random(12).astype(dtype)], {}


@define("roi_align", "roi_pool")
def _(rng, dtype):
    rois = np.concatenate([rng.integers(0, 2, (4, 1)), some_boxes(rng, dtype, 4) / 8], axis=1).astype(dtype)
    return [normal(rng, dtype, 2, 3, 10, 12), rois, (2, 3)], {}


@call
def mask_iou(rng, dtype):
    return [rng.random((3, 6, 7)) > 0.5, rng.random((4, 6, 7)) > 0.5], {}


@call
def masks_to_boxes(rng, dtype):
    return [rng.random((3, 6, 7)) > 0.5], {}


# ---------------------------------------------------------------------------------------------------------------- conv


def convolution(rng, dtype, dims, transposed=False):
    x = normal(rng, dtype, 2, 4, *(7, 6, 5)[:dims])
    w = normal(rng, dtype, *((4, 3) if transposed else (6, 2)), *(3, 2, 2)[:dims])
    return [x, w, normal(rng, dtype, 6)], {"stride": 2, "padding": 1, "groups": 2}


CALLS["conv1d"] = lambda rng, dtype: convolution(rng, dtype, 1)
CALLS["conv2d"] = lambda rng, dtype: convolution(rng, dtype, 2)
CALLS["conv3d"] = lambda rng, dtype: convolution(rng, dtype, 3)
CALLS["conv_transpose1d"] = lambda rng, dtype: convolution(rng, dtype, 1, transposed=True)
CALLS["conv_transpose2d"] = lambda rng, dtype: convolution(rng, dtype, 2, transposed=True)
CALLS["conv_transpose3d"] = lambda rng, dtype: convolution(rng, dtype, 3, transposed=True)


@call
def conv2d_backward(rng, dtype):
    [x, w, _], kwargs = convolution(rng, dtype, 2)
    return [normal(rng, dtype, *hl.conv2d(x, w, **kwargs).shape), x, w], kwargs


@call
def deform_conv2d(rng, dtype):
    [x, w, b], kwargs = convolution(rng, dtype, 2)
    y = hl.conv2d(x, w, **kwargs).shape
    offset, mask = normal(rng, dtype, 2, 2 * 2 * 6, *y[2:]), normal(rng, dtype, 2, 2 * 6, *y[2:])
    return [x, offset, w, b, kwargs["stride"], kwargs["padding"], 1, mask], {}


@define("unfold", "im2col")
def _(rng, dtype):
    return [normal(rng, dtype, 2, 3, 6, 7), (2, 3)], {"stride": 2, "padding": 1}


@call
def fold(rng, dtype):
    return [normal(rng, dtype, 2, 3 * 6, 4 * 4), (6, 7), (2, 3)], {"stride": 2, "padding": 1}


@call
def col2im(rng, dtype):
    return [normal(rng, dtype, 2, 4, 4, 3, 2, 3), (6, 7)], {"stride": 2, "padding": 1}


@call
def conv2d_trace(rng, dtype):
    return [normal(rng, dtype, 4, 4), normal(rng, dtype, 3, 3)], {"stride": 2, "padding": 1}


# ---------------------------------------------------------------------------------------------------------------- pool


def pooling(dims):
    return lambda rng, dtype: ([normal(rng, dtype, 2, 3, *(7, 6, 5)[3 - dims :]), 2], {})


for dims in (1, 2, 3):
    CALLS[f"max_pool{dims}d"] = CALLS[f"avg_pool{dims}d"] = CALLS[f"adaptive_avg_pool{dims}d"] = pooling(dims)
    CALLS[f"adaptive_max_pool{dims}d"] = pooling(dims)
    CALLS[f"lp_pool{dims}d"] = lambda rng, dtype, dims=dims: ([np.abs(pooling(dims)(rng, dtype)[0][0]), 2.0, 2], {})


def unpooling(dims):
    def make(rng, dtype):
        x = pooling(dims)(rng, dtype)[0][0]
        y, indices = getattr(hl, f"max_pool{dims}d")(x, 2, return_indices=True)
        return [y, indices, 2], {"output_size": x.shape[2:]}

    return make


for dims in (1, 2, 3):
    CALLS[f"max_unpool{dims}d"] = unpooling(dims)


@call
def global_avg_pool2d(rng, dtype):
    return [normal(rng, dtype, 2, 3, 5, 6)], {}


# ----------------------------------------------------------------------------------------------------------------- rnn


def recurrent(gates, rng, dtype):
    x = normal(rng, dtype, 5, 2, 3)
    return x, [normal(rng, dtype, *s) for s in ((gates * 4, 3), (gates * 4, 4), (gates * 4,), (gates * 4,))]


@call
def lstm(rng, dtype):
    x, weights = recurrent(4, rng, dtype)
    return [x, (normal(rng, dtype, 1, 2, 4), normal(rng, dtype, 1, 2, 4)), weights], {}


@call
def gru(rng, dtype):
    x, weights = recurrent(3, rng, dtype)
    return [x, normal(rng, dtype, 1, 2, 4), weights], {}


@call
def rnn(rng, dtype):
    x, weights = recurrent(1, rng, dtype)
    return [x, normal(rng, dtype, 1, 2, 4), weights], {}


def cell(gates, state):
    def make(rng, dtype):
        x, weights = recurrent(gates, rng, dtype)
        h = normal(rng, dtype, 2, 4)
        return [x[0], (h, normal(rng, dtype, 2, 4)) if state == "pair" else h, *weights], {}

    return make


CALLS["lstm_cell"] = cell(4, "pair")
CALLS["gru_cell"] = cell(3, "one")
CALLS["rnn_cell"] = cell(1, "one")


# -------------------------------------------------------------------------------------------- ops without an entry of their own


def _guesses(op):
    """Calls that a simple op takes: arrays of one shape for all that it needs; an array, then numbers."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = sum(p.default is p.empty and p.kind in kinds for p in op.signature.parameters.values())
    yield lambda rng, dtype: ([normal(rng, dtype, 3, 4, 5) for _ in range(needed)], {})
    yield lambda rng, dtype: ([normal(rng, dtype, 3, 4, 5), *[2] * (needed - 1)], {})


def _runs(op, guess):
    with contextlib.suppress(Exception):
        args, kwargs = guess(np.random.default_rng(0), np.dtype(np.float32))
        op(*args, **kwargs)
        return True
    return False


for _name, _op in list(vars(hl).items()):  # a guess may import what hotloops imports late
    if hasattr(_op, "signature") and not _name.startswith("_") and _name not in CALLS:
        CALLS.update([(_name, guess) for guess in _guesses(_op) if _runs(_op, guess)][:1])
