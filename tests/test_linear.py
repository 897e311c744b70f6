"""Dense layers, matrix products and dropout."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from compare import assert_oracle, assert_same, assert_same_bits

import hotloops as hl
from hotloops import _dispatch


def draw(*shape, seed=0, dtype=np.float64):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


# ---------------------------------------------------------------------------------------------------------------- linear


def test_parameters_of_a_small_network(host_backend):
    """20 inputs, layers of 50, 100 and 3: outputs times inputs weights, and one bias an output."""
    sizes, x, count = (20, 50, 100, 3), draw(4, 20), 0
    for inputs, outputs in itertools.pairwise(sizes):
        w, b = draw(outputs, inputs), draw(outputs)
        x, count = hl.linear(x, w, b), count + w.size + b.size
    assert x.shape == (4, 3)
    assert count == (20 * 50 + 50) + (50 * 100 + 100) + (100 * 3 + 3)


@pytest.mark.parametrize("lead", [(), (0,), (3,), (2, 1, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear(lead, bias, host_backend):
    x, w, b = draw(*lead, 5), draw(4, 5), draw(4) if bias else None
    expected = x @ w.T + (0 if b is None else b)
    assert_oracle(hl.linear(x, w, b), expected, terms=5)
    assert_oracle(hl.linear(x, w[0], None if b is None else b[0]), expected[..., 0], terms=5)


def test_linear_without_inputs(host_backend):
    assert_same(hl.linear(np.zeros((2, 0)), np.zeros((3, 0)), np.arange(3.0)), np.tile(np.arange(3.0), (2, 1)), "K = 0")


def test_linear_gradients(host_backend):
    assert hl.gradcheck(hl.linear, draw(2, 3, 4), draw(5, 4), draw(5))
    assert hl.gradcheck(hl.linear, draw(4), draw(5, 4))
    assert hl.gradcheck(hl.linear, draw(3, 4), draw(4), np.array(0.5))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((draw(3), draw(4, 5)), ValueError),
        ((np.array(1.0), draw(4, 5)), ValueError),
        ((draw(5), draw(2, 4, 5)), ValueError),
        ((draw(5), draw(4, 5), draw(5)), ValueError),
        ((draw(5), draw(4, 5), draw(1, 4)), ValueError),
        ((np.arange(5), draw(4, 5)), TypeError),
        ((draw(5), None), TypeError),
    ],
)
def test_bad_linear(arguments, error):
    with pytest.raises(error, match=r"linear: (input|weight|bias)"):
        hl.linear(*arguments)


# ---------------------------------------------------------------------------------------------------------------- matmul

SHAPES = [
    ((3,), (3,)),
    ((2, 3), (3,)),
    ((3,), (3, 4)),
    ((2, 3), (3, 4)),
    ((5, 2, 3), (3, 4)),
    ((5, 2, 3), (3,)),
    ((3,), (5, 3, 4)),
    ((2, 3), (5, 3, 4)),
    ((5, 1, 2, 3), (6, 3, 4)),
    ((5, 2, 3), (1, 3, 4)),
    ((2, 0), (0, 3)),
    ((5, 0, 3), (3, 4)),
    ((0, 2, 3), (0, 3, 4)),
]


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_matmul(shapes, host_backend):
    a, b = (draw(*s, seed=i) for i, s in enumerate(shapes))
    assert_oracle(np.asarray(hl.matmul(a, b)), np.asarray(a @ b), terms=3)
    if a.size and b.size:
        assert hl.gradcheck(hl.matmul, a, b)


@pytest.mark.parametrize("turned", ["a", "b", "ab"])
@pytest.mark.parametrize("shapes", [s for s in SHAPES if len(s[0]) > 1 and len(s[1]) > 1], ids=str)
def test_matmul_of_transposed_views(shapes, turned, host_backend):
    """As of their copies: the factor may be read where it lies, from either end; results of integers are exact."""
    rng = np.random.default_rng(0)
    factors = []
    for name, shape in zip("ab", shapes, strict=True):
        values = rng.integers(-4, 5, shape).astype(np.float32)
        factors.append(np.ascontiguousarray(values.swapaxes(-1, -2)).swapaxes(-1, -2) if name in turned else values)
    expected = np.matmul(*factors)
    assert_same_bits(hl.matmul(*factors), expected, str(shapes))
    out = np.full_like(expected, np.nan)
    assert hl.matmul(*factors, out=out) is out
    assert_same_bits(out, expected, "out")
    if all(f.size for f in factors):
        assert hl.gradcheck(hl.matmul, *(f.astype(np.float64).swapaxes(-1, -2).copy().swapaxes(-1, -2) for f in factors))


def test_matmul_of_a_transposed_view_of_its_result():
    a = np.arange(9.0).reshape(3, 3)
    expected = a.T @ a
    assert_same_bits(hl.matmul(a.T, a, out=a), expected, "a.T a over a")


@pytest.mark.parametrize("rows", [16, 23, 40, 130, 400])
@pytest.mark.parametrize("columns", [40, 100, 1000])
def test_blocks_of_few_rows(rows, columns, host_backend):
    """Products that are cut into columns or rows, by the number of threads too. Sums are exact."""
    rng = np.random.default_rng(rows)
    a = rng.integers(-4, 5, (rows, 600)).astype(np.float32)
    b = rng.integers(-4, 5, (600, columns)).astype(np.float32)
    for threads in (1, 2, 5):
        with hl.num_threads(threads):
            for left, right in ((a, b), (np.asfortranarray(a), b), (a, np.asfortranarray(b))):
                assert_same_bits(hl.matmul(left, right), a @ b, f"{threads} threads")


@pytest.mark.parametrize("shapes", [((), (3,)), ((2, 3), (2, 3)), ((3, 2, 3), (2, 3, 4)), ((2,), (3, 4))], ids=str)
def test_bad_matmul(shapes):
    with pytest.raises(ValueError, match="matmul: "):
        hl.matmul(*(np.zeros(s) for s in shapes))


@pytest.mark.parametrize("rows", [2, 7, 8, 13, 16, 17])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_few_rows_against_a_matrix_beyond_the_caches(rows, dtype, host_backend):
    """Its rows are taken a few at a time, from end to end; also where they are a part of a wider matrix. Sums are exact."""
    rng = np.random.default_rng(rows)
    a = rng.integers(-4, 5, (rows, 1063)).astype(dtype)
    b = rng.integers(-4, 5, (1063, 2050)).astype(dtype)
    for columns in (slice(None), slice(3, 1006)):
        expected = a @ b[:, columns]
        for threads in (1, 2):
            with hl.num_threads(threads):
                assert_same_bits(hl.matmul(a, b[:, columns]), expected, f"{threads} threads")


# --------------------------------------------------------------------------------------------------------------- dropout


def test_dropout():
    x = draw(300, 400, dtype=np.float32)
    x.flat[0] = np.nan
    results = []
    for backend in ("reference", "c", "numba"):
        if not _dispatch.adapter(backend).status():
            with hl.backend(backend):
                results.append(hl.dropout(x, 0.3, rng=7))
    for y in results:
        assert_same_bits(y, results[0], "another backend")
    kept = results[0] != 0
    assert_oracle(results[0][kept], x[kept] / np.float32(0.7))
    assert abs(kept.mean() - 0.7) < 0.005
    # Neighbours, rows and other seeds fall independently.
    other = hl.dropout(np.ones_like(x), 0.3, rng=8) != 0
    for a, b in ((kept[:, 1:], kept[:, :-1]), (kept[1:], kept[:-1]), (kept, other)):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.02


def test_dropout_edges(host_backend):
    x = np.array([np.nan, np.inf, 1.0])
    assert_same(hl.dropout(x, 1.0), np.zeros(3), "p = 1")
    assert_same(hl.dropout(x, 0.0), x, "p = 0")
    assert_same(hl.dropout(x, 0.5, training=False), x, "not training")
    assert hl.dropout(x, 0.5, False) is not x
    assert hl.dropout(np.zeros((2, 0))).shape == (2, 0)
    assert np.asarray(hl.dropout(np.array(1.0), 0.0)).shape == ()
    generator = np.random.default_rng(3)
    first, second = (hl.dropout(np.ones(200), rng=generator) for _ in range(2))
    assert (first != second).any()


def test_dropout_gradient(host_backend):
    y, pull = hl.vjp(lambda x: hl.dropout(x, 0.4, rng=5), np.ones(50))
    assert_same(pull(np.ones(50))[0], y, "the gradient drops what the result dropped")
    generator = np.random.default_rng(1)
    y, pull = hl.vjp(lambda x: hl.dropout(x, 0.4, rng=generator), np.ones(50))
    assert_same(pull(np.ones(50))[0], y, "one draw for result and gradient")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"p": -0.1}, ValueError),
        ({"p": 1.1}, ValueError),
        ({"p": np.nan}, ValueError),
        ({"p": "0.5"}, TypeError),
        ({"training": 1}, TypeError),
        ({"rng": -1}, ValueError),
        ({"rng": 0.5}, TypeError),
    ],
)
def test_bad_dropout(options, error):
    with pytest.raises(error, match="dropout"):
        hl.dropout(np.ones(3), **options)


# ---------------------------------------------------------------------------------------------------------------- oracle


@pytest.mark.parametrize("name", ["nn.functional.linear", "matmul"])
def test_torch_samples(name, host_backend):
    torch = pytest.importorskip("torch")
    infos = pytest.importorskip("torch.testing._internal.common_methods_invocations")
    ops = {"nn.functional.linear": (hl.linear, torch.nn.functional.linear), "matmul": (hl.matmul, torch.matmul)}
    [info] = [o for o in infos.op_db if o.name == name]
    mine, theirs = ops[name]
    for sample in info.sample_inputs("cpu", torch.float64, requires_grad=True):
        leaves = [sample.input, *sample.args]
        arrays = [a.detach().numpy() for a in leaves]
        expected = theirs(*leaves)
        y, pull = hl.vjp(mine, *arrays)
        assert_oracle(np.asarray(y), expected.detach().numpy(), terms=20)
        g = draw(*expected.shape)
        grads = torch.autograd.grad(expected, leaves, torch.from_numpy(np.asarray(g)))
        for a, b in zip(pull(g), grads, strict=True):
            assert_oracle(a, b.numpy(), terms=100)


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_threads_do_not_change_bits(threads):
    a, b = draw(300, 170, dtype=np.float32), draw(170, 290, dtype=np.float32)
    with hl.num_threads(1):
        expected = hl.matmul(a, b), hl.linear(a, b.T), hl.dropout(a, 0.5, rng=1)
    with hl.num_threads(threads):
        for x, y in zip((hl.matmul(a, b), hl.linear(a, b.T), hl.dropout(a, 0.5, rng=1)), expected, strict=True):
            assert_same_bits(x, y, "other threads")
