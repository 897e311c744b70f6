"""The graph: operators against finite differences, sums over paths, graphs too deep for recursion, what is refused."""

from __future__ import annotations

import pickle
import weakref

import numpy as np
import pytest

import hotloops as hl
from hotloops import _memory
from hotloops import autograd as ag

rng = np.random.default_rng(3)
A, B, V = rng.standard_normal((3, 4)), rng.standard_normal((4, 2)), rng.standard_normal(4)
POSITIVE = rng.uniform(0.5, 2.0, (3, 4))

EXPRESSIONS = {
    "add": (lambda a, b: a + b, A, V),
    "subtract": (lambda a, b: a - b, A, V),
    "subtract_from_number": (lambda a: 2.0 - a, A),
    "multiply": (lambda a, b: a * b, A, V[:1]),
    "array_times_variable": (lambda a: V * a, A),
    "divide": (lambda a, b: a / b, A, POSITIVE),
    "power": (lambda a, b: a**b, POSITIVE, A),
    "power_of_number": (lambda a: a**3, A),
    "number_to_power": (lambda a: 2.0**a, A),
    "negative": (lambda a: -a, A),
    "absolute": (lambda a: abs(a), A),
    "matmul": (lambda a, b: a @ b, A, B),
    "matmul_vector": (lambda a, b: a @ b, A, V),
    "vector_matmul": (lambda a, b: a @ b, V, B),
    "vector_vector": (lambda a, b: a @ b, V, V),
    "matmul_stack": (lambda a, b: a @ b, rng.standard_normal((2, 3, 4)), B),
    "matmul_stack_vector": (lambda a, b: a @ b, rng.standard_normal((2, 3, 4)), V),
    "vector_matmul_stack": (lambda a, b: a @ b, V, rng.standard_normal((2, 4, 3))),
    "slice": (lambda a: a[1:, ::-2], A),
    "index": (lambda a: a[1] * a[2, 3], A),
    "repeated_index": (lambda a: a[[0, 0, 2]], A),
    "mask": (lambda a: a[A > 0], A),
    "iterate": (lambda a: [row * row for row in a][1], A),
    "reshape": (lambda a: a.reshape(2, 6) ** 2, A),
    "transpose": (lambda a: a.T @ a, A),
    "transpose_axes": (lambda a: a.transpose(2, 0, 1) ** 2, rng.standard_normal((2, 3, 4))),
    "swapaxes": (lambda a: a.swapaxes(0, 1) ** 2, A),
    "sum": (lambda a: a.sum(), A),
    "sum_axis": (lambda a: a.sum(1) ** 2, A),
    "sum_keepdims": (lambda a: a / a.sum(0, keepdims=True), POSITIVE),
    "mean": (lambda a: a.mean((0, 1)), A),
    "max": (lambda a: a.max(1), A),
    "max_all": (lambda a: a.max(), A),
    "max_two_axes": (lambda a: a.max((0, 2)), rng.standard_normal((2, 3, 4))),
    "exp": (lambda a: ag.exp(a), A),
    "log": (lambda a: np.log(a), POSITIVE),
    "sqrt": (lambda a: np.sqrt(a), POSITIVE),
    "sin_cos": (lambda a: np.sin(a) * np.cos(a), A),
    "tanh": (lambda a: np.tanh(a), A),
    "maximum": (lambda a, b: np.maximum(a, b), A, POSITIVE),
    "minimum": (lambda a, b: ag.minimum(a, b), A, POSITIVE),
    "where": (lambda a, b: ag.where(A > 0, a, b), A, V),
    "concatenate": (lambda a, b: np.concatenate([a, V[None], b * b], axis=0), A, POSITIVE),
    "stack": (lambda a, b: np.stack([a, b], axis=1) ** 2, A, POSITIVE),
    "used_twice": (lambda a: a * a + a, A),
    "two_results": (lambda a, b: (a * b, (a + b).sum()), A, V),
    "one_argument_unused": (lambda a, b: a * 2.0, A, V),
    "op_inside": (lambda a: (hl.softmax(a, 1) * A).sum(), A),
}


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_finite_differences(name):
    f, *arrays = EXPRESSIONS[name]
    assert hl.gradcheck(f, *arrays)


def test_gradcheck_can_fail():
    with pytest.raises(AssertionError, match=r"array 0 at \(0,\)"):
        hl.gradcheck(lambda a: a * a.value, np.array([1.0, 2.0]))


def test_value_is_numpys():
    y, pullback = hl.vjp(lambda a, b: a @ b, A, B)
    assert type(y) is np.ndarray
    np.testing.assert_array_equal(y, A @ B)
    da, db = pullback(np.ones((3, 2)))
    np.testing.assert_allclose(da, np.ones((3, 2)) @ B.T)
    np.testing.assert_allclose(db, A.T @ np.ones((3, 2)))


def test_pullback_again():
    _, pullback = hl.vjp(lambda a: a * a, A)
    first, second = pullback(A)[0], pullback(2 * A)[0]
    np.testing.assert_allclose(second, 2 * first)


def test_types_are_kept():
    for dtype in (np.float16, np.float32, np.float64):
        y, pullback = hl.vjp(lambda a: (a * 2.0).sum(0) / 3.0, A.astype(dtype))
        assert y.dtype == dtype
        assert pullback(np.ones(4))[0].dtype == dtype


def test_gradients_do_not_share_memory():
    dy = np.ones((3, 4))
    _, pullback = hl.vjp(lambda a, b: a + b, A, A)
    da, db = pullback(dy)
    da[...] = 7
    assert (db == 1).all()
    assert (dy == 1).all()
    assert pullback(dy)[0].flags.writeable


def test_list_of_arrays_is_one_argument():
    _, pullback = hl.vjp(lambda a, pair: a * pair[0] + pair[1], V, [V + 1, V + 2])
    da, (d0, d1) = pullback(np.ones(4))
    np.testing.assert_allclose(da, V + 1)
    np.testing.assert_allclose(d0, V)
    np.testing.assert_allclose(d1, 1.0)


def test_grad_and_argnums():
    f = lambda a, b: (a * b).sum()  # noqa: E731 - the function under test
    np.testing.assert_array_equal(hl.grad(f)(V, V + 1), V + 1)
    np.testing.assert_array_equal(hl.grad(f, 1)(V, V + 1), V)
    value, (da, db) = hl.value_and_grad(f, (0, -1))(V, V + 1)
    assert value == (V * (V + 1)).sum()
    np.testing.assert_array_equal(db, V)
    np.testing.assert_array_equal(da, V + 1)


def test_a_million_nodes():
    """Built, run backward and freed without recursion."""
    v = hl.Variable(np.array([1.0]))
    x = v
    for _ in range(1_000_000):
        x = x + 1.0
    [g] = ag._backward([(x, np.ones(1))], [v])
    assert g == 1.0
    assert x.value == 1_000_001.0
    del x


def test_many_paths():
    """Forty doublings are 2^40 paths; the graph walks each node once."""
    _, pullback = hl.vjp(lambda a: _doubled(a, 40), np.array([1.0]))
    assert pullback(np.ones(1))[0] == 2.0**40


def _doubled(a, times):
    for _ in range(times):
        a = a + a
    return a


def sheet_example():
    """The study sheet's network: w_a feeds a_1, which branches into z_2 and z_3; both meet in z_4."""
    names = dict(w_a=0.3, w_b=-0.2, w_c=0.7, w_d=0.4, w_e=1.1, w_f=-0.6)
    w = {name: hl.Variable(value, name=name) for name, value in names.items()}
    x = 1.5
    a_1 = ag.tanh(w["w_a"] * x + w["w_b"])
    a_2 = ag.tanh(w["w_c"] * a_1)
    a_3 = ag.tanh(w["w_d"] * a_1)
    z_4 = w["w_e"] * a_2 + w["w_f"] * a_3
    loss = (ag.tanh(z_4) - 1.0) ** 2
    return w, loss


def test_paths_of_the_sheet():
    """The gradient of w_a is the sum over two paths, those of w_e and w_c over one."""
    w, loss = sheet_example()
    gradients = dict(zip(w, ag._backward([(loss, np.ones(()))], list(w.values())), strict=True))
    for name, count in (("w_a", 2), ("w_e", 1), ("w_c", 1)):
        paths = loss.paths(w[name])
        assert len(paths) == count
        np.testing.assert_allclose(sum(p.product for p in paths), gradients[name], rtol=1e-12)
    text = str(loss.paths(w["w_e"])[0])
    assert text.startswith("w_e -> multiply (")
    assert len(loss.paths()) == 8


def test_dot():
    _, loss = sheet_example()
    dot = loss.to_dot()
    assert dot.startswith("digraph {")
    assert dot.count("->") >= 12
    assert 'label="w_a"' in dot


def test_refused():
    v = hl.Variable(V)
    with pytest.raises(TypeError, match="pickle"):
        pickle.dumps(v)
    with pytest.raises(TypeError, match="out"):
        hl.softmax(v, out=np.empty(4))
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        hl.vjp(lambda a: a * 2.0, V)[1](np.ones(3))
    with pytest.raises(ValueError, match="scalar"):
        hl.grad(lambda a: a * 2.0)(V)
    with pytest.raises(ValueError, match="argnums"):
        hl.grad(lambda a: a.sum(), 3)(V)
    with pytest.raises(TypeError, match="element type"):
        hl.Variable(np.array(["a"]))
    with pytest.raises(ValueError, match="2 arrays"):
        hl.vjp(lambda a: (a, a), V)[1]([V])


def test_list_of_variables_read_as_one_array():
    """Each Variable of the list gets its own part of the gradient."""
    other = np.zeros(4)
    assert hl.gradcheck(lambda v: hl.softmax([v, other * 1.0], 0), V)
    _, pullback = hl.vjp(lambda a, b: hl.softmax([a, b], 0), V, other)
    dy = rng.standard_normal((2, 4))
    da, db = pullback(dy)
    [expected] = hl.vjp(lambda s: hl.softmax(s, 0), np.stack([V, other]))[1](dy)
    np.testing.assert_allclose(da, expected[0])
    np.testing.assert_allclose(db, expected[1])


def test_mean_of_many_float16():
    value, gradient = hl.value_and_grad(lambda a: a.mean())(np.ones((128, 1024), np.float16))
    assert value == 1.0
    assert gradient.dtype == np.float16
    np.testing.assert_array_equal(gradient, np.float16(1 / (128 * 1024)))


def test_max_of_nothing():
    y, pullback = hl.vjp(lambda a: a.max(axis=1), np.zeros((0, 3)))
    assert y.shape == (0,)
    assert pullback(np.zeros(0))[0].shape == (0, 3)


def test_no_array_of_variables():
    with pytest.raises(TypeError, match="no array"):
        np.asarray(hl.Variable(V))


@pytest.mark.parametrize(
    "f",
    {
        "lstm": lambda a, b: hl.lstm(a, None, [b, np.ones((8, 2))])[0],
        "attention with dropout": lambda a, b: hl.scaled_dot_product_attention(a, b, b, dropout_p=0.5, rng=0),
        "conv1d": lambda a, b: hl.conv1d(a, b[..., None]),
        "adaptive_max_pool1d": lambda a, b: hl.adaptive_max_pool1d(a * b[:1, :1], 2),
    }.items(),
    ids=lambda item: item[0],
)
def test_a_pullback_keeps_nothing(f, monkeypatch):
    """What it makes is gone when its gradients are, however often it is called."""
    made, empty = [], _memory.empty

    def counted(*args):
        array = empty(*args)
        made.append(weakref.ref(array))
        return array

    y, pullback = hl.vjp(f[1], np.ones((3, 8, 8)), np.ones((8, 8)))
    pullback(np.ones_like(y))  # plans are made
    monkeypatch.setattr(_memory, "empty", counted)
    for _ in range(3):
        pullback(np.ones_like(y))
    assert not [array for array in made if array() is not None]
