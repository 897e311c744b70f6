"""Pooling: torch as oracle, hand-worked numbers, gradients, NaN and ties, integers, bad arguments."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from compare import assert_oracle, assert_same, assert_same_bits
from conftest import host_backends

import hotloops as hl

FAMILIES = ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "max_unpool", "lp_pool")


OPS = [f"{family}{dims}d" for family in FAMILIES for dims in (1, 2, 3)]
FLOATS = [np.float32, np.float64]


def normal(*shape, dtype=np.float64, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def distinct(*shape, dtype=np.float64, seed=0):
    """Numbers of which no two are close: a difference quotient moves no maximum."""
    n = int(np.prod(shape))
    return (np.random.default_rng(seed).permutation(n) / 8.0 - n / 16).reshape(shape).astype(dtype)


# ----------------------------------------------------------------------------------------------------- worked by hand


X = np.array([[1, 2, 3, 4], [5, 6, 7, 8], [9, 1, 2, 3], [4, 5, 6, 7]], float)[None]


def test_by_hand(host_backend):
    y, indices = hl.max_pool2d(X, 2, return_indices=True)
    assert y.tolist() == [[[6, 8], [9, 7]]]
    assert indices.tolist() == [[[5, 7], [8, 15]]]
    assert hl.avg_pool2d(X, 2).tolist() == [[[3.5, 5.5], [4.75, 4.5]]]
    assert hl.max_pool2d(X, 3, 2, 1).tolist() == [[[6, 8], [9, 8]]]
    assert_oracle(hl.avg_pool2d(X, 3, 2, 1), np.array([[[14 / 9, 30 / 9], [30 / 9, 5]]]))
    assert hl.avg_pool2d(X, 3, 2, 1, count_include_pad=False).tolist() == [[[3.5, 5], [5, 5]]]
    assert hl.global_avg_pool2d(X).tolist() == [[[73 / 16]]]
    assert hl.adaptive_avg_pool2d(X, (1, 2)).tolist() == [[[33 / 8, 40 / 8]]]
    assert hl.adaptive_max_pool2d(X, 3).tolist() == [[[6, 7, 8], [9, 7, 8], [9, 6, 7]]]
    assert hl.lp_pool2d(X[:, :1, :2], 1, (1, 2)).tolist() == [[[3]]]
    assert hl.max_unpool2d(y, indices, 2).tolist() == [[[0, 0, 0, 0], [0, 6, 0, 8], [9, 0, 0, 0], [0, 0, 0, 7]]]


def test_pool_of_two_halves_an_image(host_backend):
    """The sheet's POOL-2 layers: 32 x 32 to 16 x 16 to 8 x 8, channels kept, nothing learned."""
    x = np.zeros((8, 32, 32), np.float32)
    assert hl.max_pool2d(x, 2).shape == (8, 16, 16)
    assert hl.max_pool2d(np.zeros((16, 16, 16), np.float32), 2).reshape(-1).shape == (1024,)


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize(("size", "kernel", "stride", "pad"), list(itertools.product((5, 8), (2, 3), (1, 2, 3), (0, 1))))
def test_output_size(size, kernel, stride, pad, ceil_mode, host_backend):
    room = size + 2 * pad - kernel
    windows = (-(-room // stride) if ceil_mode else room // stride) + 1
    if ceil_mode and (windows - 1) * stride >= size + pad:
        windows -= 1
    x = np.zeros((1, size), np.float32)
    assert hl.max_pool1d(x, kernel, stride, pad, 1, ceil_mode).shape == (1, windows)
    assert hl.avg_pool1d(x, kernel, stride, pad, ceil_mode).shape == (1, windows)


def test_paddings(host_backend):
    x = normal(2, 6, 7)
    inside = np.pad(x, ((0, 0), (1, 0), (0, 1)))
    expected = hl.avg_pool2d(inside, (3, 2), 1)
    assert_oracle(hl.avg_pool2d(x, (3, 2), 1, ((1, 0), (0, 1))), expected, what="pairs")
    assert_same(hl.max_pool2d(x, 3, 1, "same"), hl.max_pool2d(x, 3, 1, 1), "same")
    assert_same(hl.max_pool2d(x, 2, padding="valid"), hl.max_pool2d(x, 2), "valid")
    assert hl.max_pool2d(x, 2, padding="same").shape == (2, 3, 4)
    assert_same(hl.max_pool2d(x, 2, padding="same")[..., -1:], hl.max_pool2d(x[..., 6:], (2, 1)), "the odd column alone")
    assert_same(hl.max_pool1d(x[0], 4, 1, "same"), hl.max_pool1d(x[0], 4, 1, ((1, 2),)), "the odd position is on the right")


# ------------------------------------------------------------------------------------------------------------- corners


@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_and_ties(dtype, host_backend):
    nan, inf = np.nan, np.inf
    rows = {  # row: (largest, its place)
        (nan, 1, nan): (nan, 0),
        (1, nan, nan): (nan, 1),
        (inf, 3, nan): (nan, 2),
        (2, 2, 2): (2, 0),
        (-inf, -inf, -inf): (-inf, 0),
        (-inf, -1, -inf): (-1, 1),
        (-0.0, 0.0, 0.0): (0, 0),
        (1, inf, inf): (inf, 1),
    }
    x = np.array(list(rows), dtype)
    for pool in (lambda: hl.max_pool1d(x, 3, return_indices=True), lambda: hl.adaptive_max_pool1d(x, 1, True)):
        y, indices = pool()
        assert_same(y[:, 0], np.array([v for v, _ in rows.values()], dtype), "largest")
        assert indices[:, 0].tolist() == [at for _, at in rows.values()]


def test_first_of_equal_ones_in_memory_order(host_backend):
    """Of equal elements in different rows and columns the one that comes first in the plane counts, also for the gradient."""
    x = np.zeros((1, 3, 3))
    x[0, 0, 2] = x[0, 1, 0] = x[0, 2, 1] = 1
    assert hl.max_pool2d(x, 3, return_indices=True)[1].item() == 2
    assert hl.vjp(lambda a: hl.max_pool2d(a, 3), x)[1](np.ones((1, 1, 1)))[0].reshape(-1).tolist() == [0, 0, 1, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("value", [-np.inf, np.nan])
def test_windows_of_nothing_else(value, host_backend):
    """Windows full of -inf or NaN have an index inside, and their gradient goes there, padding or not."""
    x = np.full((1, 2, 4, 4), value)
    y, indices = hl.max_pool2d(x, 3, 2, 1, return_indices=True)
    assert_same(y, np.full((1, 2, 2, 2), value), "value")
    assert indices.tolist() == [[[[0, 1], [4, 5]]] * 2]
    g = hl.vjp(lambda a: hl.max_pool2d(a, 3, 2, 1), x)[1](np.ones((1, 2, 2, 2)))[0]
    assert g[0, 0].tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0] * 4, [0] * 4]


def test_empty(host_backend):
    for name in OPS:
        dims = int(name[-2])
        if name.startswith("max_unpool"):
            continue
        args = (2.0, 2) if name.startswith("lp") else (2,)
        for lead in ((0, 3), (2, 0), (0, 0)):
            y = getattr(hl, name)(np.zeros((*lead, *(4,) * dims), np.float32), *args)
            assert y.shape == (*lead, *(2,) * dims)
    assert hl.max_pool2d(np.zeros((0, 3, 4, 4)), 2, return_indices=True)[1].shape == (0, 3, 2, 2)
    assert hl.adaptive_avg_pool2d(np.zeros((2, 3, 4, 4)), (0, 2)).shape == (2, 3, 0, 2)
    assert hl.max_unpool2d(np.zeros((0, 3, 2, 2)), np.zeros((0, 3, 2, 2), int), 2).shape == (0, 3, 4, 4)
    x = np.ones((2, 3, 4, 4))
    assert_same(hl.vjp(lambda a: hl.adaptive_avg_pool2d(a, (0, 2)), x)[1](np.ones((2, 3, 0, 2)))[0], 0 * x, "no gradient came")
    assert_same(hl.vjp(lambda a: hl.adaptive_max_pool2d(a, (0, 2)), x)[1](np.ones((2, 3, 0, 2)))[0], 0 * x, "no gradient came")


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", ">i4", ">u8"])
def test_integers(dtype, host_backend):
    rng = np.random.default_rng(1)
    dtype = np.dtype(dtype)
    if dtype.kind == "b":
        x = rng.random((2, 3, 7, 8)) < 0.3
    else:
        low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
        x = rng.integers(low, high, (2, 3, 7, 8), dtype=dtype.newbyteorder("="), endpoint=True).astype(dtype)
        x[0, 0, 0, 0], x[0, 0, 2, 0], x[0, 0, 2, 1] = low, high - 1, high  # a float64 cannot tell the last two apart
    y, indices = hl.max_pool2d(x, 2, return_indices=True)
    windows = x[:, :, :6].reshape(2, 3, 3, 2, 4, 2).transpose(0, 1, 2, 4, 3, 5).reshape(2, 3, 3, 4, 4)
    assert_same(y, windows.max(axis=-1).astype(dtype.newbyteorder("=")), "largest")
    assert_same(np.take_along_axis(x.reshape(2, 3, 56), indices.reshape(2, 3, -1), 2).reshape(y.shape).astype(y.dtype), y, "index")
    out = np.zeros_like(y)
    assert hl.max_pool2d(x, 2, out=out) is out
    assert_same(out, y, "out")
    assert_same(hl.adaptive_max_pool2d(x, (1, 1))[..., 0, 0], x.max(axis=(2, 3)).astype(y.dtype), "adaptive")
    with pytest.raises(TypeError, match="avg_pool2d"):
        hl.avg_pool2d(x, 2)


@pytest.mark.parametrize("name", OPS)
def test_float16(name, host_backend):
    """float16 comes and goes; in between it is a float32."""
    dims = int(name[-2])
    x = np.abs(normal(2, 3, *(8, 6, 4)[:dims], dtype=np.float16))
    args = {"lp": (3.0, 2), "ad": (3,)}.get(name[:2], (2,))
    if name.startswith("max_unpool"):
        x, indices = getattr(hl, f"max_pool{dims}d")(x, 2, return_indices=True)
        args = (indices, 2)
    op = getattr(hl, name)
    y = op(x, *args)
    assert_same_bits(y, op(x.astype(np.float32), *args).astype(np.float16), name)
    gy = normal(*y.shape, dtype=np.float16, seed=1)
    g = hl.vjp(lambda a: op(a, *args), x)[1](gy)[0]
    assert g.dtype == np.float16
    if not name.startswith("lp"):  # its gradient reads the result, which is kept as float32
        wide = hl.vjp(lambda a: op(a, *args), x.astype(np.float32))[1](gy.astype(np.float32))[0]
        assert_same_bits(g, wide.astype(np.float16), f"{name}, gradient")


# ----------------------------------------------------------------------------------------------------------- gradients


GRADIENTS = {
    "max": lambda a: hl.max_pool2d(a, 3, 2, 1),
    "max, dilated": lambda a: hl.max_pool2d(a, 2, 1, 1, 3),
    "max, ceil": lambda a: hl.max_pool2d(a, 3, 2, ceil_mode=True),
    "max, pairs": lambda a: hl.max_pool2d(a, (2, 3), (1, 2), ((1, 0), (1, 1))),
    "max, indices": lambda a: hl.max_pool2d(a, 2, return_indices=True)[0],
    "max, 1d": lambda a: hl.max_pool1d(a[:, :, 0], 3, 2, 1),
    "max, 3d": lambda a: hl.max_pool3d(a, 2),
    "max, more than 256 taps": lambda a: hl.max_pool1d(a.reshape(1, -1), 300, 100, 150),
    "adaptive max": lambda a: hl.adaptive_max_pool2d(a, (3, 4)),
    "adaptive max, 1d": lambda a: hl.adaptive_max_pool1d(a[0], 4),
    "adaptive max, 3d": lambda a: hl.adaptive_max_pool3d(a, (1, 3, 2)),
    "average": lambda a: hl.avg_pool2d(a, 3, 2, 1),
    "average, inside": lambda a: hl.avg_pool2d(a, 3, 2, 1, True, False),
    "average, divisor": lambda a: hl.avg_pool2d(a, 2, 1, 0, False, True, 7),
    "average, dilated": lambda a: hl.avg_pool2d(a, 3, 1, 2, dilation=2),
    "average, 1d": lambda a: hl.avg_pool1d(a[0], 3, 2, 1, True),
    "average, 3d": lambda a: hl.avg_pool3d(a, (1, 2, 3), 2, (0, 1, 1), True, False),
    "adaptive average": lambda a: hl.adaptive_avg_pool2d(a, (3, 4)),
    "adaptive average, more": lambda a: hl.adaptive_avg_pool2d(a, (9, 11)),
    "adaptive average, 1d": lambda a: hl.adaptive_avg_pool1d(a[0], 4),
    "adaptive average, 3d": lambda a: hl.adaptive_avg_pool3d(a, (1, 3, 2)),
    "global average": hl.global_avg_pool2d,
    "norm 2": lambda a: hl.lp_pool2d(a, 2, 3, 2, True),
    "norm 4": lambda a: hl.lp_pool2d(a, 4.0, 2, 1),
    "norm 1.5": lambda a: hl.lp_pool2d(a * a + 0.1, 1.5, 2, dilation=2),
    "norm 1": lambda a: hl.lp_pool1d(a[0], 1, 2),
    "norm, 3d": lambda a: hl.lp_pool3d(a, 2, 2, 1),
    "unpool": lambda a: hl.max_unpool2d(a, np.random.default_rng(2).permuted(np.tile(np.arange(168), (2, 3, 1)), axis=2)[
        ..., : 42].reshape(2, 3, 6, 7), 2),
    "unpool, 1d": lambda a: hl.max_unpool1d(a[0, :, 0], np.tile([0, 2, 5, 6, 9, 11, 13], (3, 1)), 2),
    "unpool, 3d": lambda a: hl.max_unpool3d(a, np.tile(np.arange(126).reshape(3, 6, 7) * 8, (2, 1, 1, 1)), 2),
}  # fmt: skip


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients(name, host_backend):
    """Central differences in float64; the input of a maximum has no two elements closer than the step."""
    assert hl.gradcheck(GRADIENTS[name], distinct(2, 3, 6, 7) + 0.03)


def test_norm_of_zeros_has_gradient_zero(host_backend):
    """Where torch gives NaN (0 times infinity) the subgradient of smallest norm is taken."""
    g = hl.vjp(lambda a: hl.lp_pool2d(a, 2, 2), np.zeros((1, 2, 2)))[1](np.ones((1, 1, 1)))[0]
    assert_same(g, np.zeros((1, 2, 2)), "gradient")


def test_the_index_has_no_gradient(host_backend):
    y, indices = hl.max_pool2d(hl.Variable(X), 2, return_indices=True)
    assert isinstance(y, hl.Variable)
    assert isinstance(indices, np.ndarray)
    assert indices.dtype == np.int64


# ----------------------------------------------------------------------------------------------------------- bad input


def refused(error, match, op, *args, **kwargs):
    with pytest.raises(error, match=match):
        op(*args, **kwargs)


BIG = (2**31 - 1, 2**31, 2**62, 2**63 - 1)


@pytest.mark.parametrize("name", [n for n in OPS if n.startswith(("max_pool", "avg", "lp"))])
def test_bad_windows(name):
    op, dims = getattr(hl, name), int(name[-2])
    x = np.ones((2, *(9,) * dims))
    before = (2.0,) if name.startswith("lp") else ()
    for value in (0, -1, (0,) * dims, -(2**63), 2**63):
        refused(ValueError, f"{name}.*kernel_size", op, x, *before, value)
        refused(ValueError, f"{name}.*stride", op, x, *before, 2, value)
        refused(ValueError, f"{name}.*dilation", op, x, *before, 2, dilation=value)
    for value in (True, 2.0, "2", None, (2.0,) * dims, np.float32(2), 1 + 0j):
        refused(TypeError, f"{name}.*kernel_size", op, x, *before, value)
    for value in ((2,) * (dims + 1), (), (2,) * 7):
        refused(ValueError, f"{name}.*kernel_size", op, x, *before, value)
        refused(ValueError, f"{name}.*dilation", op, x, *before, 2, dilation=value)
        if value:  # torch takes an empty stride for none
            refused(ValueError, f"{name}.*stride", op, x, *before, 2, value)
    refused(ValueError, "does not fit", op, x, *before, 10)
    for value in (9, 10, 90, *BIG):
        refused(ValueError, name, op, x, *before, 2, dilation=value)
        refused(ValueError, name, op, x, *before, max(value, 10))
    for value in BIG:
        assert op(x, *before, 2, value).shape == (2, *(1,) * dims)
    refused(TypeError, "ceil_mode", op, x, *before, 2, ceil_mode=1)
    for shape in ((), (9,) * dims, (1,) * (dims + 3)):
        refused(ValueError, f"{name}.*needed", op, np.ones(shape), *before, 1)
    for shape in ((0, *(9,) * dims), (1, *(9,) * (dims - 1), 0), (3, 1, *(9,) * (dims - 1), 0)):
        refused(ValueError, "only N", op, np.ones(shape), *before, 1)
    if not before:
        for value in (-1, 2, (2,) * dims, (-1,) * dims, ((2, 0),) * dims, ((0, -1),) * dims, *BIG):
            refused(ValueError, f"{name}.*padding", op, x, 3, 1, value)
        for value in ((1,) * (dims + 1), ((1, 1),) * (dims + 1), ((1, 1, 1),) * dims, "same ", "", ((1, 1), 1, 2, 3)):
            refused(ValueError, f"{name}.*padding", op, x, 3, 1, value)
        for value in (1.5, True, None, {}):
            refused(TypeError, f"{name}.*padding", op, x, 3, 1, value)


def test_a_window_in_the_padding_alone():
    refused(ValueError, "padding alone", hl.max_pool1d, np.ones((1, 1)), 2, 1, 2, 4)
    refused(ValueError, "padding alone", hl.avg_pool1d, np.ones((1, 2)), 2, 1, 3, dilation=5)
    assert hl.max_pool1d(np.ones((1, 1)), 3, 1, 4, 4).tolist() == [[1]]


def test_huge_windows():
    """Sizes near the largest integers in ceil mode: one window, no overflow on the way."""
    x = np.arange(6.0).reshape(1, 2, 3)
    for n in (2**31, 2**40, 2**59):
        assert hl.max_pool2d(x, (n, 1), 1, 0, 1, True).shape[0] == 1 if n == 0 else True
        y, indices = hl.max_pool2d(x, (1, n), (1, n), 0, 1, True, True)
        assert y.tolist() == [[[2], [5]]]
        assert indices.tolist() == [[[2], [5]]]
        assert hl.avg_pool2d(x, (1, n), (1, n), 0, True).tolist() == [[[1], [4]]]
        y = hl.avg_pool2d(x, (1, n), (1, n), (0, n // 2), True)
        assert y.tolist() == [[[3 / n], [12 / n]]] or y.shape == (1, 2, 2)


def test_other_bad_arguments():
    x = np.ones((2, 3, 6, 6))
    refused(ValueError, "divisor_override", hl.avg_pool2d, x, 2, divisor_override=0)
    refused(TypeError, "divisor_override", hl.avg_pool2d, x, 2, divisor_override=2.0)
    refused(TypeError, "count_include_pad", hl.avg_pool2d, x, 2, count_include_pad=None)
    refused(TypeError, "return_indices", hl.max_pool2d, x, 2, return_indices=1)
    refused(TypeError, "two results", hl.max_pool2d, x, 2, return_indices=True, out=x)
    refused(TypeError, "two results", hl.adaptive_max_pool2d, x, 2, True, out=x)
    for norm in (0, 0.0, np.inf, -np.inf, np.nan, 1e300, 1e-300):
        refused(ValueError, "norm_type", hl.lp_pool2d, x, norm, 2)
    refused(TypeError, "norm_type", hl.lp_pool2d, x, "2", 2)
    for op in (hl.adaptive_avg_pool2d, hl.adaptive_max_pool2d):
        for value in (-1, (2, -1), (), (1, 2, 3), 2**31, 2**63):
            refused(ValueError, "output_size", op, x, value)
        for value in (1.5, True, "3", (2, 2.5)):
            refused(TypeError, "output_size", op, x, value)
        refused(MemoryError, "the result", op, np.ones((2**20, 1, 1)), 2**31 - 1)
        refused(ValueError, "needed", op, np.ones((2, 2)), 1)
        refused(ValueError, "only N", op, np.ones((2, 0, 2)), 1)


def test_unpool_refuses_indices(host_backend):
    """Before anything is written, `out` included."""
    y, indices = hl.max_pool2d(normal(2, 3, 6, 6), 2, return_indices=True)
    for value in (-1, 36, 2**31, 2**62, -(2**63)):
        wrong = indices.copy()
        wrong[1, 2, 0, 1] = value
        out = np.full((2, 3, 6, 6), 7.0)
        refused(ValueError, rf"max_unpool2d: indices\[1, 2, 0, 1\] is {value}, 0 to 35", hl.max_unpool2d, y, wrong, 2, out=out)
        assert (out == 7).all()
    refused(TypeError, "indices", hl.max_unpool2d, y, indices.astype(float), 2)
    refused(TypeError, "indices", hl.max_unpool2d, y, indices > 3, 2)
    refused(ValueError, "indices", hl.max_unpool2d, y, indices[..., :2], 2)
    refused(ValueError, "indices", hl.max_unpool2d, y, indices.astype(np.uint64) + np.uint64(2**63), 2)
    for size in ((4, 6), (8, 6), (2, 3, 6, 9), (6,), (1, 2, 3, 6, 6)):
        refused(ValueError, "output_size", hl.max_unpool2d, y, indices, 2, output_size=size)
    refused(ValueError, "give output_size", hl.max_unpool2d, y[..., :1, :1], 0 * indices[..., :1, :1], 2, 1, 2)
    assert hl.max_unpool2d(y, indices.astype(np.int8), 2).shape == (2, 3, 6, 6)
    assert hl.max_unpool2d(y, indices, 2, output_size=(2, 3, 7, 7)).shape == (2, 3, 7, 7)


def test_of_values_with_one_index_the_last_stays(host_backend):
    x = np.arange(1.0, 4001).reshape(1, 4000)
    assert hl.max_unpool1d(x, np.zeros((1, 4000), int), 2)[0, :2].tolist() == [4000, 0]


@pytest.mark.parametrize(("width", "window"), [(162, (2, 2, 0)), (167, (3, 2, 1)), (166, (3, 1, 1)), (161, (5, 3, 2))])
@pytest.mark.parametrize("dtype", FLOATS)
def test_gradient_beyond_the_caches(dtype, width, window):
    """It is written past them, in pieces that begin and end anywhere in a line. Sums are exact."""
    rng = np.random.default_rng(0)
    x = rng.integers(-9, 10, (3, 30, 160, width)).astype(dtype)
    expected = None
    for backend, threads in (("reference", 1), *((name, t) for name in host_backends() for t in (1, 2))):
        with hl.backend(backend), hl.num_threads(threads):
            y, pull = hl.vjp(lambda a: hl.max_pool2d(a, *window), x)
            g = np.random.default_rng(1).integers(-9, 10, y.shape).astype(dtype)
            gx = pull(g)[0]
        expected = gx if expected is None else expected
        assert_same(gx, expected, f"{backend}, {threads} threads")


@pytest.mark.parametrize("dtype", FLOATS)
def test_pairs_beyond_the_last_cache(dtype, host_backend):
    """Lines that are fetched ahead, down to the end of the input. Sums are exact."""
    rows = 110 if dtype == np.float64 else 220
    x = np.random.default_rng(0).integers(-9, 10, (3, 30, rows, 222)).astype(dtype)
    pairs = x.reshape(3, 30, rows // 2, 2, 111, 2)
    for threads in (1, 2):
        with hl.num_threads(threads):
            y, pull = hl.vjp(lambda a: hl.max_pool2d(a, 2), x)
            assert_same(y, pairs.max(axis=(3, 5)), "largest")
            assert_same(pull(y)[0].sum(axis=(2, 3)), y.sum(axis=(2, 3)), "gradient")
            assert_same(hl.max_pool2d(x, 2), y, "largest, no gradient")
            assert_same(hl.avg_pool2d(x, 2) * 4, pairs.sum(axis=(3, 5)), "means")
            assert_same(hl.lp_pool2d(x, 2, 2), np.sqrt((pairs * pairs).sum(axis=(3, 5))), "norms")


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_threads(threads, host_backend):
    """The same bits with any number of threads, forward and backward."""
    x = normal(3, 11, 40, 41, dtype=np.float32)
    for f in (
        lambda a: hl.max_pool2d(a, 3, 2, 1),
        lambda a: hl.max_pool2d(a, 2),
        lambda a: hl.avg_pool2d(a, 3, 1, 1),
        lambda a: hl.avg_pool2d(a, 3, 2, 1),
        lambda a: hl.adaptive_avg_pool2d(a, 7),
        hl.global_avg_pool2d,
        lambda a: hl.lp_pool2d(a, 2, 2),
    ):
        results = []
        for n in (1, threads):
            with hl.num_threads(n):
                y, pull = hl.vjp(f, x)
                results.append((y, pull(y)[0]))
        for one, many in zip(*results, strict=True):
            assert_same_bits(many, one, "threads")


# -------------------------------------------------------------------------------------------------------------- torch


def to_torch(x):
    torch = pytest.importorskip("torch")
    return torch.from_numpy(x.copy()) if isinstance(x, np.ndarray) else x


def run_torch(name, args, kwargs, gradient):
    """(results, gradient of the input for that gradient of the first result) of torch.nn.functional."""
    torch = pytest.importorskip("torch")
    x = to_torch(args[0]).requires_grad_(gradient)
    y = getattr(torch.nn.functional, name)(x, *[to_torch(a) for a in args[1:]], **kwargs)
    ys = y if isinstance(y, tuple) else (y,)
    gy = np.random.default_rng(9).standard_normal(tuple(ys[0].shape)).astype(args[0].dtype)
    gx = torch.autograd.grad(ys[0], x, torch.from_numpy(gy))[0].numpy() if gradient else None
    return [v.detach().numpy() for v in ys], gy, gx


def compare_with_torch(name, args, kwargs, gradient=True, terms=64):
    expected, gy, gx = run_torch(name, args, kwargs, gradient)
    op = getattr(hl, name)
    y, pull = hl.vjp(lambda a: op(a, *args[1:], **kwargs), args[0])
    y = y if isinstance(y, tuple) else (y,)
    assert len(y) == len(expected)
    for a, e in zip(y, expected, strict=True):
        assert_oracle(a, e, terms=terms, what=f"{name} {args[1:]} {kwargs}")
    if gradient:
        g = pull((gy, None) if len(y) == 2 else gy)[0]
        assert_oracle(g, gx, terms=terms, what=f"{name} {args[1:]} {kwargs}, gradient")


KINDS = {
    "plain": {},
    "stride": {"stride": 1},
    "stride_2_pad": {"stride": 2, "padding": 1},
    "ceil": {"stride": 2, "padding": 1, "ceil_mode": True},
}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [n for n in OPS if n.startswith(("max_pool", "avg"))])
def test_against_torch(name, kind, batched, dtype, host_backend):
    dims = int(name[-2])
    x = normal(*(2, 3, 9, 10, 7)[0 if batched else 1 : 2], *(9, 10, 7)[:dims], dtype=dtype)
    if name.startswith("max"):
        for more in ({}, {"return_indices": True}, {"dilation": 2}):
            compare_with_torch(name, (x, 3), {**KINDS[kind], **more})
    else:
        for more in ({}, {"count_include_pad": False}, {"divisor_override": 5} if dims > 1 else {}):
            compare_with_torch(name, (x, 3), {**KINDS[kind], **more})


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_adaptive_against_torch(dims, dtype, host_backend):
    x = normal(2, 3, *(9, 10, 7)[:dims], dtype=dtype)
    for size in ((3, 4, 2), (9, 10, 7), (1, 1, 1), (11, 13, 8), (5, 7, 1)):
        compare_with_torch(f"adaptive_avg_pool{dims}d", (x, size[:dims]), {})
        compare_with_torch(f"adaptive_max_pool{dims}d", (x, size[:dims], True), {})
    compare_with_torch(f"adaptive_avg_pool{dims}d", (x[0], 2), {})


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_norms_against_torch(dims, dtype, host_backend):
    x = normal(2, 3, *(9, 10, 7)[:dims], dtype=dtype)
    for norm, a in ((2, x), (2.0, x[0]), (1.5, np.abs(x)), (3, np.abs(x)), (4, x), (1, x), (0.5, np.abs(x) + 0.1)):
        for kwargs in ({}, {"stride": 1}, {"stride": 2, "ceil_mode": True}):
            compare_with_torch(f"lp_pool{dims}d", (a, norm, 3), kwargs)
    y = getattr(hl, f"lp_pool{dims}d")(x, 3, 2)
    [e], _, _ = run_torch(f"lp_pool{dims}d", (x, 3, 2), {}, False)
    assert_same(np.isnan(y), np.isnan(e), "a negative sum of odd powers is NaN")


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_unpool_against_torch(dims, host_backend):
    x = normal(2, 3, *(9, 10, 7)[:dims])
    for kernel, stride, pad in ((2, None, 0), (3, 2, 1), (2, 3, 0)):
        y, indices = getattr(hl, f"max_pool{dims}d")(x, kernel, stride, pad, return_indices=True)
        for size in (x.shape, x.shape[2:]):
            compare_with_torch(f"max_unpool{dims}d", (y, indices, kernel, stride, pad, list(size)), {}, gradient=kernel == 2)
    y, indices = getattr(hl, f"max_pool{dims}d")(x[0], 2, return_indices=True)
    compare_with_torch(f"max_unpool{dims}d", (y, indices, 2, 2, 0, x.shape[2:]), {})


def opinfos():
    pytest.importorskip("torch")
    pytest.importorskip("expecttest")
    from torch.testing._internal.common_methods_invocations import op_db

    return {op.name.rpartition(".")[2] + op.variant_test_name: op for op in op_db if op.name.rpartition(".")[2] in OPS}


@pytest.mark.parametrize("name", [n for n in OPS if not n.startswith("lp")])
def test_torch_samples(name):
    """Every sample input of torch's own test suite for the function of the same name: values, gradients, errors."""
    torch = pytest.importorskip("torch")

    info = opinfos()[name]
    samples = list(info.sample_inputs("cpu", torch.float64, requires_grad=False))
    for sample in samples[:: max(1, len(samples) // 150)]:
        args = [a.detach().numpy() if isinstance(a, torch.Tensor) else a for a in (sample.input, *sample.args)]
        kwargs = {k: v.detach().numpy() if isinstance(v, torch.Tensor) else v for k, v in sample.kwargs.items()}
        kwargs = {k: tuple(v) if isinstance(v, torch.Size) else v for k, v in kwargs.items()}
        compare_with_torch(name, args, kwargs, gradient="unpool" not in name)
    if info.error_inputs_func is None:
        return
    for bad in info.error_inputs("cpu"):
        sample = bad.sample_input
        args = [a.detach().numpy() if isinstance(a, torch.Tensor) else a for a in (sample.input, *sample.args)]
        with pytest.raises((ValueError, TypeError)):
            getattr(hl, name)(*args, **sample.kwargs)


def test_a_gradient_does_not_see_what_is_written_later(host_backend):
    """Indices and options that are arrays may be changed between the result and the gradient."""
    x = np.random.default_rng(0).standard_normal((1, 2, 20, 20))
    size, step = np.array([3, 3]), np.array([2, 2])
    flat = hl.max_pool2d(x, 2, return_indices=True)[1]
    calls = [
        (lambda v: hl.max_pool2d(v, size, step), x, lambda y: (size.fill(2), step.fill(2))),
        (lambda v: hl.max_pool2d(v, 17, return_indices=True), x, lambda y: y[1].fill(2**40)),
        (lambda v: hl.adaptive_max_pool2d(v, 3, return_indices=True), x, lambda y: y[1].fill(2**40)),
        (lambda v: hl.max_unpool2d(v, flat, 2), x[..., ::2, ::2].copy(), lambda y: flat.fill(2**40)),
    ]
    for function, values, spoil in calls:
        y, pullback = hl.vjp(function, values)
        first = y[0] if isinstance(y, tuple) else y
        dy = (np.ones_like(first), None) if isinstance(y, tuple) else np.ones_like(first)
        [expected] = pullback(dy)
        spoil(y)
        np.testing.assert_array_equal(pullback(dy)[0], expected)
