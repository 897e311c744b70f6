"""The function that may follow a convolution or a dense layer on its way out."""

from __future__ import annotations

import numpy as np
import pytest
from compare import assert_oracle, assert_same_bits

import hotloops as hl

NAMES = ("relu", "relu6", "sigmoid", "tanh", "silu", "gelu")
CALLS = {
    "conv1d": (hl.conv1d, (2, 6, 9), (8, 6, 3), {"padding": 1}),
    "conv2d": (hl.conv2d, (2, 6, 9, 7), (8, 6, 3, 3), {"padding": 1}),
    "depthwise": (hl.conv2d, (2, 6, 9, 17), (6, 1, 3, 3), {"padding": 1, "groups": 6}),
    "winograd": (hl.conv2d, (2, 24, 13, 14), (40, 24, 3, 3), {"padding": 1}),
    "pointwise": (hl.conv2d, (2, 6, 9, 7), (40, 6, 1, 1), {}),
    "conv3d": (hl.conv3d, (6, 5, 4, 3), (8, 6, 2, 2, 2), {}),
    "linear": (hl.linear, (3, 4, 20), (8, 20), {}),
    "one output": (hl.linear, (3, 20), (20,), {}),
}


def draw(*shape, dtype=np.float32):
    return np.random.default_rng(shape).standard_normal(shape).astype(dtype)


def arrays(name, dtype=np.float32):
    op, x, w, options = CALLS[name]
    return op, draw(*x, dtype=dtype), draw(*w, dtype=dtype), draw(*w[:1] if len(w) > 1 else (), dtype=dtype), options


@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("name", CALLS)
def test_against_torch(name, activation, host_backend):
    torch = pytest.importorskip("torch")
    op, x, w, b, options = arrays(name)
    expected = getattr(torch.nn.functional, activation)(torch.from_numpy(np.asarray(op(x, w, b, **options))))
    result = op(x, w, b, activation=activation, **options)
    assert_oracle(result, expected.numpy(), terms=w[0].size, what=f"{name}, {activation}")


@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("name", ["conv1d", "conv2d", "depthwise", "conv3d", "linear", "one output"])
def test_gradients(name, activation):
    op, x, w, b, options = arrays(name, np.float64)
    assert hl.gradcheck(lambda x, w, b: op(x, w, b, activation=activation, **options), x, w, b)


def test_special_values(host_backend):
    x = np.array([[np.nan], [np.inf], [-np.inf], [0.0], [-3.0], [9.0]])
    one = np.ones((1, 1))
    expected = {
        "relu": [np.nan, np.inf, 0, 0, 0, 9],
        "relu6": [np.nan, 6, 0, 0, 0, 6],
        "sigmoid": [np.nan, 1, 0, 0.5, 0.04742587317756678, 0.9998766054240137],
        "tanh": [np.nan, 1, -1, 0, -0.9950547536867305, 0.9999999695400409],
        "silu": [np.nan, np.inf, 0, 0, -0.14227761953270035, 8.998889448816124],
        "gelu": [np.nan, np.inf, 0, 0, -0.00404969409489031, 9.0],
    }
    for name, values in expected.items():
        assert_oracle(hl.linear(x, one, activation=name)[:, 0], np.array(values, float), what=name)


def test_kinks_have_the_gradient_0():
    for name, x in (("relu", 0.0), ("relu6", 0.0), ("relu6", 6.0)):
        assert hl.grad(lambda x, name=name: hl.linear(x, np.ones(1), activation=name))(np.array([x])) == 0


@pytest.mark.parametrize("name", CALLS)
def test_options_and_types(name):
    op, x, w, b, options = arrays(name)
    plain, result = op(x, w, b, **options), op(x, w, b, activation="relu", **options)
    assert_same_bits(result, np.maximum(plain, 0), "relu of the same sums")
    assert_same_bits(op(x, w, b, activation=None, **options), plain, "None")
    out = np.full_like(result, 7)
    assert op(x, w, b, activation="relu", out=out, **options) is out
    assert_same_bits(out, result, "out")
    packed = hl.prepack(op, w)
    assert_same_bits(op(x, packed, b, activation="relu", **options), result, "prepacked")
    half = op(x.astype(np.float16), w.astype(np.float16), b.astype(np.float16), activation="relu", **options)
    assert half.dtype == np.float16 and (half >= 0).all()


@pytest.mark.parametrize("value", ["Relu", "softmax", "", 1, True, np.maximum])
def test_unknown(value):
    for name in ("conv2d", "linear"):
        op, x, w, b, options = arrays(name)
        with pytest.raises(ValueError, match=f"{name}: activation must be one of 'relu', 'relu6'"):
            op(x, w, b, activation=value, **options)
