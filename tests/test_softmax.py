"""Softmax, its logarithm, and logsumexp."""

from __future__ import annotations

import math

import numpy as np
import pytest
from compare import assert_oracle, assert_same

import hotloops as hl

BOTH = [hl.softmax, hl.log_softmax]


def draw(*shape, seed=0, dtype=np.float64):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def test_by_hand(host_backend):
    x = np.log([1.0, 2.0, 5.0])
    assert_oracle(hl.softmax(x), np.array([0.125, 0.25, 0.625]))
    assert_oracle(hl.log_softmax(x), np.log([0.125, 0.25, 0.625]))
    assert_oracle(hl.logsumexp(x, 0), np.array(math.log(8)))


@pytest.mark.parametrize("op", BOTH)
@pytest.mark.parametrize(
    ("rows", "length", "dtype"),
    [(8500, 1001, np.float32), (2100, 4095, np.float32), (17000, 512, np.float32), (100000, 43, np.float64)],
)
def test_a_result_larger_than_caches(op, rows, length, dtype):
    """Written another way, with the same bits as a part of it alone; wherever its rows begin."""
    x = draw(rows, length, dtype=dtype)
    memory = np.full(rows * length + 2, 7, dtype)
    y = op(x, out=memory[1:-1].reshape(rows, length))
    assert memory[0] == memory[-1] == 7
    fresh = op(x)
    for part in (slice(0, 3), slice(rows // 2, rows // 2 + 5), slice(rows - 2, rows)):
        assert_same(y[part], op(x[part]), f"rows {part.start} to {part.stop}")
        assert_same(fresh[part], y[part], f"rows {part.start} to {part.stop}, where vectors begin")


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (4, 3, 70), (2, 3, 4, 5), (300, 2), (3, 0), (0, 3), (2, 2000)])
def test_any_axis(shape, host_backend):
    x = np.asarray(draw(*shape))
    for axis in range(-max(x.ndim, 1), max(x.ndim, 1)):
        with np.errstate(divide="ignore"):
            top = x.max(axis=axis, keepdims=True, initial=-1e300) if x.ndim else x
            log_sum = np.log(np.exp(x - top).sum(axis=axis, keepdims=True)) + top if x.ndim else x
        if x.size:
            assert_oracle(hl.softmax(x, axis), np.exp(x - log_sum), terms=9)
            assert_oracle(hl.log_softmax(x, axis), x - log_sum, terms=9)
            assert_oracle(np.asarray(hl.logsumexp(x, axis, keepdims=True)), np.asarray(log_sum), terms=9)
            assert hl.logsumexp(x, axis).shape == np.squeeze(log_sum, axis if x.ndim else ()).shape
        else:
            assert hl.softmax(x, axis).shape == x.shape


def test_shift_and_large_values(host_backend):
    x = draw(4, 33)
    assert_oracle(hl.softmax(x + 1000), hl.softmax(x), terms=1e6)
    assert_same(hl.softmax(np.array([0.0, 1e5])), np.array([0.0, 1.0]), "far apart")
    assert_same(hl.log_softmax(np.array([0.0, 1e5])), np.array([-1e5, 0.0]), "far apart")
    assert_same(hl.logsumexp(np.array([1e5, -1e5]), 0), np.array(1e5), "far apart")


@pytest.mark.parametrize("n", [1, 3, 20, 100])
@pytest.mark.parametrize("inner", [1, 4])
def test_special_rows(n, inner, host_backend):
    for dtype in (np.float32, np.float64):
        low = np.full((2, n, inner), -np.inf, dtype)
        for f in BOTH:
            assert np.isnan(f(low, 1)).all()
        assert (hl.logsumexp(low, 1) == -np.inf).all()
        for value, total in ((np.nan, np.nan), (np.inf, np.inf)):
            x = draw(2, n, inner, dtype=dtype)
            x[1, n // 2, 0] = value
            for f in BOTH:
                y = f(x, 1)
                assert np.isnan(y[1, n // 2, 0])
                assert np.isfinite(y[0]).all()
                assert np.isfinite(y[1, :, 1:]).all()
            assert_same(hl.logsumexp(x, 1)[1, 0], dtype(total), "the sum")
        x = np.concatenate([low, np.zeros((2, 1, inner), dtype)], axis=1)
        assert_same(hl.softmax(x, 1), np.concatenate([np.zeros_like(low), np.ones((2, 1, inner), dtype)], axis=1), "one value")


def test_logsumexp_over_several_axes(host_backend):
    x = draw(2, 3, 4, 5)
    full = np.exp(x)
    for axes in ((0, 1), (1, 3), (0, 2), (3, 0, 1), (-1, -2), (0, 1, 2, 3), ()):
        every = axes or (0, 1, 2, 3)
        for keepdims in (False, True):
            expected = np.log(full.sum(axis=every, keepdims=keepdims))
            assert_oracle(np.asarray(hl.logsumexp(x, axes, keepdims)), np.asarray(expected), terms=120)
        assert hl.gradcheck(lambda x, axes=axes: hl.logsumexp(x, axes), x[:, :, :2, :3])
    assert_same(hl.logsumexp(np.zeros((2, 0, 3)), (1, 2)), np.full(2, -np.inf), "nothing to sum")


def test_gradients(host_backend):
    for axis in (0, 1, 2):
        for f in BOTH:
            assert hl.gradcheck(lambda x, f=f, axis=axis: f(x, axis), draw(3, 4, 2))
        assert hl.gradcheck(lambda x, axis=axis: hl.logsumexp(x, axis, keepdims=True), draw(3, 4, 2))
    for f in BOTH:
        assert hl.gradcheck(f, draw(2, 40))


@pytest.mark.parametrize(
    ("f", "arguments", "error"),
    [
        (hl.logsumexp, (draw(2, 3), (0, 0)), ValueError),
        (hl.logsumexp, (draw(2, 3), (0, -2)), ValueError),
        (hl.logsumexp, (draw(2, 3), 2), np.exceptions.AxisError),
        (hl.logsumexp, (draw(2, 3), None), TypeError),
        (hl.logsumexp, (draw(2, 3), 0, 1), TypeError),
        (hl.softmax, (draw(2, 3), -3), np.exceptions.AxisError),
        (hl.softmax, (draw(2, 3), 0.0), TypeError),
        (hl.softmax, (np.arange(3),), TypeError),
        (hl.log_softmax, (None,), TypeError),
    ],
)
def test_bad_inputs(f, arguments, error):
    with pytest.raises(error, match=f.__name__):
        f(*arguments)


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp"])
def test_torch_samples(name, host_backend):
    torch = pytest.importorskip("torch")
    infos = pytest.importorskip("torch.testing._internal.common_methods_invocations")
    [info] = [o for o in infos.op_db if o.name == name and not o.variant_test_name]
    for sample in info.sample_inputs("cpu", torch.float64, requires_grad=True):
        x = sample.input.detach().numpy()
        expected = getattr(torch, name)(sample.input, *sample.args, **sample.kwargs)
        y, pull = hl.vjp(lambda x, s=sample: getattr(hl, name)(x, *s.args, **s.kwargs), x)
        assert_oracle(np.asarray(y), expected.detach().numpy(), terms=25)
        g = np.asarray(draw(*expected.shape))
        [gradient] = torch.autograd.grad(expected, [sample.input], torch.from_numpy(g))
        assert_oracle(pull(g)[0], gradient.numpy(), terms=50)
