"""Convolution against torch, hand-worked numbers and finite differences; what it refuses."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
from compare import assert_oracle, assert_same, assert_same_bits
from torch_samples import check_errors, check_samples

import hotloops as hl

rng = np.random.default_rng(5)
X = [[1, 2, 3, 4], [5, 6, 7, 8], [9, 1, 2, 3], [4, 5, 6, 7]]
K = [[1, 0, -1]] * 3
CONVS = {1: hl.conv1d, 2: hl.conv2d, 3: hl.conv3d}
TRANSPOSED = {1: hl.conv_transpose1d, 2: hl.conv_transpose2d, 3: hl.conv_transpose3d}


def normal(*shape, dtype=np.float64):
    return rng.standard_normal(shape).astype(dtype)


# ------------------------------------------------------------------------------------------------ hand-worked numbers


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_sheet_example(host_backend, dtype):
    y = hl.conv2d(np.array([X], dtype), np.array([[K]], dtype), stride=2, padding=1)
    assert_same(y, np.array([[[-8, -4], [-12, -6]]], dtype), "the sheet's Y")


def test_sheet_windows():
    trace = hl.conv2d_trace(np.array(X), np.array(K), stride=2, padding=1)
    assert_same(trace.result, np.array([[-8, -4], [-12, -6]]), "Y")
    assert_same(trace.padded, np.pad(np.array(X), 1), "X_pad")
    assert [w.position for w in trace] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [(w.rows, w.columns) for w in trace] == [((0, 2), (0, 2)), ((0, 2), (2, 4)), ((2, 4), (0, 2)), ((2, 4), (2, 4))]
    patches = [
        [[0, 0, 0], [0, 1, 2], [0, 5, 6]],
        [[0, 0, 0], [2, 3, 4], [6, 7, 8]],
        [[0, 5, 6], [0, 9, 1], [0, 4, 5]],
        [[6, 7, 8], [1, 2, 3], [5, 6, 7]],
    ]
    written = [
        "0 + 0 - 0 + 0 + 0 - 2 + 0 + 0 - 6 = -8",
        "0 + 0 - 0 + 2 + 0 - 4 + 6 + 0 - 8 = -4",
        "0 + 0 - 6 + 0 + 0 - 1 + 0 + 0 - 5 = -12",
        "6 + 0 - 8 + 1 + 0 - 3 + 5 + 0 - 7 = -6",
    ]
    for window, patch, text in zip(trace, patches, written, strict=True):
        assert_same(window.patch, np.array(patch), "patch")
        assert_same(window.products, np.array(patch) * np.array(K), "products")
        assert window.sum == window.products.sum()
        assert text in str(window) and text in str(trace)
    assert "[0 1 2 3 4 0]" in str(trace)


def test_trace_with_channels_is_the_convolution():
    x, w = normal(3, 6, 5), normal(3, 2, 3)
    trace = hl.conv2d_trace(x, w, (2, 1), ((1, 0), (0, 2)))
    assert_oracle(trace.result, hl.conv2d(x, w[None], None, (2, 1), ((1, 0), (0, 2)))[0], terms=18)
    first = normal(1, 1) * 0 - 3.0
    assert str(hl.conv2d_trace(first, first)[0]).endswith("= 9 = 9")


def test_sheet_shapes_and_parameters():
    """The sheet's P3: CONV3-8, POOL-2, BatchNorm, CONV3-16, POOL-2, FC-10 on 32 x 32 x 3."""
    size, parameters, shapes = (32, 32), [0], [(32, 32, 3)]
    for channels, filters in ((3, 8), (8, 16)):
        size = hl.conv_output_size(size, 3, padding=1)
        parameters.append(hl.conv_parameters(channels, filters, 3))
        shapes.append((*size, filters))
        size = hl.conv_output_size(size, 2, 2)
        parameters.append(0)
        shapes.append((*size, filters))
    assert shapes == [(32, 32, 3), (32, 32, 8), (16, 16, 8), (16, 16, 16), (8, 8, 16)]
    assert parameters == [0, 224, 0, 1168, 0]
    assert hl.conv_parameters(1024, 10, 1) == 10250  # the fully connected layer: a 1x1 filter over 1024 channels
    assert hl.conv_parameters(4, 6, (2, 3), groups=2, bias=False) == 72


def test_sizes():
    assert hl.conv_output_size(4, 3, 2, 1) == 2
    assert hl.conv_output_size(7, 3, 2, ((0, 1),), 2) == 2
    assert hl.conv_output_size((5, 6), (3, 2), padding="same") == (5, 6)
    assert hl.conv_output_size((9, 9), 3, 1, "valid", (1, 2)) == (7, 5)
    assert hl.conv_output_size((5, 6), 3, 1, ((1, 2), (0, 0))) == (6, 4)
    for size, kernel, stride, dilation in itertools.product((1, 5, 8), (1, 2, 5), (1, 2, 3), (1, 2)):
        pad = hl.same_padding(size, kernel, stride, dilation)
        if dilation * (kernel - 1) + 1 <= size + sum(pad):
            assert hl.conv_output_size(size, kernel, stride, (pad,), dilation) == -(-size // stride)
        assert pad[1] - pad[0] in (0, 1)


@pytest.mark.parametrize(
    ("f", "args", "error"),
    [
        (hl.conv_output_size, (2, 3), ValueError),
        (hl.conv_output_size, (4, 3, 0), ValueError),
        (hl.conv_output_size, (4, 3.0), TypeError),
        (hl.conv_output_size, (4, True), TypeError),
        (hl.conv_output_size, ((4, 4), (1, 2, 3)), ValueError),
        (hl.conv_output_size, (4, 3, 2, "same"), ValueError),
        (hl.conv_output_size, (4, 3, 1, "same "), ValueError),
        (hl.same_padding, (0, 3), ValueError),
        (hl.conv_parameters, (3, 8, 3, 2), ValueError),
        (hl.conv_parameters, (3, 8, 0), ValueError),
        (hl.conv2d_trace, (np.ones((3, 3)), np.ones((1, 2, 2))), ValueError),
        (hl.conv2d_trace, (np.ones((2, 2)), np.ones((3, 3))), ValueError),
    ],
)
def test_sizes_refused(f, args, error):
    with pytest.raises(error):
        f(*args)


# --------------------------------------------------------------------------------------------------------------- torch

CONFIGURATIONS = [
    (n, channels, filters, groups, stride, padding, dilation)
    for n in (1, 2, 3)
    for channels, filters, groups, stride, padding, dilation in (
        (3, 4, 1, 1, 0, 1),
        (3, 5, 1, 2, 1, 1),
        (4, 6, 2, 1, 2, 2),
        (4, 4, 4, 1, 1, 1),
        (4, 8, 4, 3, 1, 2),
        (2, 3, 1, 1, "same", 3),
        (2, 3, 1, 2, "valid", 1),
    )
]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_conv_and_gradients_against_torch(host_backend, configuration, bias):
    torch = pytest.importorskip("torch")
    n, c, f, groups, stride, padding, dilation = configuration
    size, kernel = (9, 8, 7)[:n], (3, 2, 3)[:n]
    for dtype, unbatched in ((np.float32, False), (np.float64, True)):
        x = normal(*(() if unbatched else (2,)), c, *size, dtype=dtype)
        w, b = normal(f, c // groups, *kernel, dtype=dtype), normal(f, dtype=dtype)
        tensors = [torch.from_numpy(a.copy()).requires_grad_() for a in (x, w, b)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = getattr(torch.nn.functional, f"conv{n}d")(
                tensors[0], tensors[1], tensors[2] if bias else None, stride, padding, dilation, groups
            )
        arrays = (x, w, b) if bias else (x, w)
        mine, pullback = hl.vjp(lambda *a: CONVS[n](a[0], a[1], a[2] if bias else None, stride, padding, dilation, groups), *arrays)
        assert_oracle(mine, theirs.detach().numpy(), terms=54)
        gy = normal(*mine.shape, dtype=dtype)
        theirs.backward(torch.from_numpy(gy))
        for g, t in zip(pullback(gy), tensors, strict=False):
            assert_oracle(g, t.grad.numpy(), terms=500)


@pytest.mark.parametrize("configuration", [c for c in CONFIGURATIONS if not isinstance(c[5], str)], ids=str)
def test_transposed_and_gradients_against_torch(host_backend, configuration):
    torch = pytest.importorskip("torch")
    n, c, f, groups, stride, padding, dilation = configuration
    size, kernel = (5, 4, 3)[:n], (3, 2, 3)[:n]
    extra = max(stride, dilation) - 1
    for dtype, unbatched in ((np.float32, False), (np.float64, True)):
        x = normal(*(() if unbatched else (2,)), c, *size, dtype=dtype)
        w, b = normal(c, f // groups, *kernel, dtype=dtype), normal(f // groups * groups, dtype=dtype)
        tensors = [torch.from_numpy(a.copy()).requires_grad_() for a in (x, w, b)]
        theirs = getattr(torch.nn.functional, f"conv_transpose{n}d")(*tensors, stride, padding, extra, groups, dilation)
        mine, pullback = hl.vjp(lambda *a: TRANSPOSED[n](*a, stride, padding, extra, groups, dilation), x, w, b)
        assert_oracle(mine, theirs.detach().numpy(), terms=54)
        gy = normal(*mine.shape, dtype=dtype)
        theirs.backward(torch.from_numpy(gy))
        for g, t in zip(pullback(gy), tensors, strict=True):
            assert_oracle(g, t.grad.numpy(), terms=500)


@pytest.mark.parametrize("arguments", [(3, 1, 0, 1), ((2, 3), (2, 1), (1, 2), (1, 2)), (2, 3, 4, 3), ((1, 2), 1, 0, 4)], ids=str)
def test_unfold_and_fold_against_torch(host_backend, arguments):
    F = pytest.importorskip("torch").nn.functional
    from_numpy = pytest.importorskip("torch").from_numpy
    for dtype in (np.float32, np.float64):
        x = normal(2, 3, 8, 9, dtype=dtype)
        theirs = F.unfold(from_numpy(x), *arguments).numpy()
        assert_same(hl.unfold(x, *arguments), theirs, "unfold")
        assert_same(hl.unfold(x[0], *arguments), theirs[0], "unfold of one image")
        cols = normal(*theirs.shape, dtype=dtype)
        theirs = F.fold(from_numpy(cols), (8, 9), *arguments).numpy()
        assert_oracle(hl.fold(cols, (8, 9), *arguments), theirs, terms=9)
        assert_oracle(hl.fold(cols[0], (8, 9), *arguments), theirs[0], terms=9)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "name", ["conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "unfold"]
)
def test_torch_samples(name, dtype):
    check_samples(f"nn.functional.{name}", getattr(hl, name), dtype, terms=lambda args: 300.0)
    check_errors(f"nn.functional.{name}", getattr(hl, name))


# ----------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("n", [1, 2, 3])
def test_gradcheck(host_backend, n):
    size, kernel = (5, 4, 3)[:n], (2, 3, 2)[:n]
    x, w, b = normal(2, 4, *size), normal(6, 2, *kernel), normal(6)
    pairs = ((1, 2), (0, 1), (1, 0))[:n]
    assert hl.gradcheck(lambda *a: CONVS[n](*a, 2, pairs, 1, 2), x, w, b)
    assert hl.gradcheck(lambda *a: CONVS[n](*a, padding="same"), x, normal(3, 4, *kernel), normal(3))
    y, w, b = normal(2, 4, *(3, 2, 2)[:n]), normal(4, 3, *kernel), normal(6)
    assert hl.gradcheck(lambda *a: TRANSPOSED[n](*a, 2, 1, 1, 2), y, w, b)


def test_gradcheck_patches(host_backend):
    options = {"stride": (2, 1), "padding": ((1, 0), (0, 2)), "dilation": (1, 2)}
    x = normal(2, 3, 5, 6)
    assert hl.gradcheck(lambda a: hl.unfold(a, (2, 3), **options), x)
    assert hl.gradcheck(lambda a: hl.im2col(a, (2, 3), **options), x)
    assert hl.gradcheck(lambda a: hl.fold(a, (5, 6), (2, 3), **options), normal(*hl.unfold(x, (2, 3), **options).shape))
    assert hl.gradcheck(lambda a: hl.col2im(a, (5, 6), **options), normal(*hl.im2col(x, (2, 3), **options).shape))
    assert hl.gradcheck(lambda a: hl.unfold(a, 2), x[0])


def test_backward_is_the_pullback(host_backend):
    x, w, b = normal(2, 4, 6, 5), normal(6, 2, 3, 2), normal(6)
    y, pullback = hl.vjp(lambda *a: hl.conv2d(*a, 2, ((1, 0), (0, 1)), 1, 2), x, w, b)
    gy = normal(*y.shape)
    gradients = hl.conv2d_backward(gy, x, w, 2, ((1, 0), (0, 1)), 1, 2)
    for g, p in zip(gradients, pullback(gy), strict=True):
        assert_same_bits(g, p, "conv2d_backward")
    for needs in itertools.product((True, False), repeat=3):
        some = hl.conv2d_backward(gy, x, w, 2, ((1, 0), (0, 1)), 1, 2, needs)
        assert [g is not None for g in some] == list(needs)
    half = hl.conv2d_backward(gy[0].astype(np.float16), x[0].astype(np.float16), w.astype(np.float16), 2, ((1, 0), (0, 1)), 1, 2)
    assert [g.dtype for g in half] == [np.float16] * 3 and half[0].shape == x[0].shape


@pytest.mark.parametrize(
    "arguments",
    [
        (np.ones((1, 1, 3, 3)), np.ones((1, 1, 4, 4)), np.ones((1, 1, 2, 2))),
        (np.ones((1, 1, 3)), np.ones((1, 1, 4, 4)), np.ones((1, 1, 2, 2))),
        (np.ones((1, 1, 4, 4)), np.ones((1, 1, 4, 4)), np.ones((1, 1, 2, 2))),
        (np.ones((2, 1, 3, 3)), np.ones((1, 1, 4, 4)), np.ones((1, 1, 2, 2))),
        (np.ones((1, 2, 3, 3)), np.ones((1, 1, 4, 4)), np.ones((1, 1, 2, 2))),
    ],
)
def test_backward_shapes(arguments):
    if arguments[0].shape == (1, 1, 3, 3):
        assert hl.conv2d_backward(*arguments)[0].shape == (1, 1, 4, 4)
        return
    with pytest.raises(ValueError, match="grad_output"):
        hl.conv2d_backward(*arguments)


def test_backward_needs():
    with pytest.raises(ValueError, match="needs"):
        hl.conv2d_backward(np.ones((1, 1, 1)), np.ones((1, 1, 1)), np.ones((1, 1, 1, 1)), needs=(True,))
    with pytest.raises(TypeError, match="needs"):
        hl.conv2d_backward(np.ones((1, 1, 1)), np.ones((1, 1, 1)), np.ones((1, 1, 1, 1)), needs=(1, True, True))


# ---------------------------------------------------------------------------------------------------------- properties


def test_padding_forms(host_backend):
    x, w = normal(2, 3, 7, 6), normal(4, 3, 3, 2)
    expected = hl.conv2d(np.pad(x, [(0, 0), (0, 0), (1, 1), (2, 2)]), w)
    for padding in ((1, 2), [1, 2], ((1, 1), (2, 2)), [[1, 1], [2, 2]], np.array([1, 2])):
        assert_same(hl.conv2d(x, w, padding=padding), expected, f"padding {padding}")
    uneven = hl.conv2d(np.pad(x, [(0, 0), (0, 0), (0, 2), (3, 1)]), w)
    assert_same(hl.conv2d(x, w, padding=((0, 2), (3, 1))), uneven, "pairs")
    assert_same(hl.conv2d(x, w, padding=((1, 1), (0, 1))), hl.conv2d(x, w, padding="same"), "same")
    assert_same(hl.conv2d(x, w, padding="valid"), hl.conv2d(x, w), "valid")


def test_patches_are_the_convolution(host_backend):
    x, w = rng.integers(-4, 5, (2, 3, 7, 8)).astype(np.float64), rng.integers(-4, 5, (4, 3, 2, 3)).astype(np.float64)
    options = {"stride": (1, 2), "padding": (1, 0), "dilation": (2, 1)}
    y = hl.conv2d(x, w, **options)
    rows = np.einsum("nhwcij,fcij->nfhw", hl.im2col(x, (2, 3), **options), w)
    columns = (w.reshape(4, -1) @ hl.unfold(x, (2, 3), **options)).reshape(y.shape)
    assert_same(rows, y, "im2col")
    assert_same(columns, y, "unfold")


def test_adjoints(host_backend):
    """<unfold(x), c> = <x, fold(c)>, and so for the others, on integers."""
    x = rng.integers(-4, 5, (2, 3, 7, 8)).astype(np.float32)
    options = {"stride": (1, 2), "padding": (1, 0), "dilation": (2, 1)}
    for forward, backward in (
        (lambda a: hl.unfold(a, (2, 3), **options), lambda c: hl.fold(c, (7, 8), (2, 3), **options)),
        (lambda a: hl.im2col(a, (2, 3), **options), lambda c: hl.col2im(c, (7, 8), **options)),
    ):
        y = forward(x)
        c = rng.integers(-4, 5, y.shape).astype(np.float32)
        assert (y * c).sum() == (x * backward(c)).sum()


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", ">i4", ">i8"])
def test_im2col_moves_integers(host_backend, dtype):
    limits = (0, 1) if dtype == "bool" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    x = rng.integers(*limits, (2, 3, 5, 6), endpoint=True, dtype=np.uint64 if dtype == "uint64" else np.int64).astype(dtype)
    y = hl.im2col(x, 3, padding=1, stride=2)
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(x, [(0, 0), (0, 0), (1, 1), (1, 1)]), (3, 3), (2, 3))
    assert y.dtype == np.dtype(dtype).newbyteorder("=")
    np.testing.assert_array_equal(y, windows[:, :, ::2, ::2].transpose(0, 2, 3, 1, 4, 5))
    out = np.empty_like(y)
    assert hl.im2col(x, 3, padding=1, stride=2, out=out) is out
    np.testing.assert_array_equal(out, y)
    with pytest.raises(TypeError, match="out"):
        hl.im2col(x, 3, padding=1, stride=2, out=np.empty(out.shape, np.float16))


def test_out_may_overlap(host_backend):
    x, w = normal(1, 2, 6, 6), normal(2, 2, 3, 3)
    expected = hl.conv2d(x, w, padding=1)
    result = hl.conv2d(x, w, padding=1, out=x)
    assert result is x
    assert_same_bits(x, expected, "out is the input")
    buffer = normal(100)
    view, target = buffer[:36].reshape(1, 6, 6), buffer[10:46].reshape(1, 6, 6)
    expected = hl.conv2d(view.copy(), w[:1, :1], padding=1)
    assert_same_bits(hl.conv2d(view, w[:1, :1], padding=1, out=target), expected, "out overlaps the input")


def test_float16_sums_in_float32(host_backend):
    x, w = normal(1, 300, 5, 5, dtype=np.float16), normal(2, 300, 3, 3, dtype=np.float16)
    wide = hl.conv2d(x.astype(np.float32), w.astype(np.float32)).astype(np.float16)
    assert_same(hl.conv2d(x, w), wide, "float16")
    assert hl.conv2d(x, w.astype(np.float64)).dtype == np.float64


def test_empty(host_backend):
    assert hl.conv2d(np.ones((0, 3, 5, 5)), np.ones((2, 3, 3, 3))).shape == (0, 2, 3, 3)
    assert_same(hl.conv2d(np.ones((1, 0, 3, 3)), np.ones((2, 0, 2, 2)), np.array([1.0, 2.0]))[0, :, 0, 0], np.array([1.0, 2.0]), "")
    gx, gw, gb = hl.conv2d_backward(np.ones((0, 2, 3, 3)), np.ones((0, 3, 5, 5)), np.ones((2, 3, 3, 3)))
    assert gx.shape == (0, 3, 5, 5) and not gw.any() and gw.shape == (2, 3, 3, 3) and not gb.any()
    assert hl.unfold(np.ones((0, 3, 5, 5)), 3).shape == (0, 27, 9)
    assert hl.unfold(np.ones((2, 0, 5, 5)), 3).shape == (2, 0, 9)
    assert hl.fold(np.ones((0, 27, 9)), 5, 3).shape == (0, 3, 5, 5)
    assert hl.conv_transpose2d(np.ones((0, 3, 5, 5)), np.ones((3, 2, 3, 3))).shape == (0, 2, 7, 7)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("x_shape", "w_shape", "options"),
    [
        ((1, 64, 9, 9), (170, 64, 3, 3), {"padding": 1}),
        ((1, 40, 19, 19), (150, 40, 3, 3), {"stride": 2, "padding": 1}),
        ((2, 301, 9, 9), (203, 301, 1, 1), {}),
        ((1, 90, 13, 13), (210, 30, 3, 3), {"groups": 3, "padding": 2, "dilation": 2}),
        ((1, 3, 90, 75), (3, 1, 3, 3), {"groups": 3, "padding": 1}),
        ((1, 2, 101, 90), (2, 1, 3, 3), {"groups": 2, "padding": 1, "stride": 2}),
        ((2, 1, 70, 81), (5, 1, 3, 3), {"padding": (0, 2)}),
        ((1, 33, 24, 31), (33, 1, 5, 4), {"groups": 33, "padding": (3, 1), "stride": 2}),
    ],
)
def test_any_number_of_threads(host_backend, dtype, x_shape, w_shape, options):
    """Few products to a weight, where filters are cut as the threads ask, and few channels, where rows are. Sums are exact."""
    x, w = (rng.integers(-4, 5, shape).astype(dtype) for shape in (x_shape, w_shape))
    with hl.exact_convolution():
        with hl.backend("reference"):
            y = hl.conv2d(x, w, **options)
            gy = rng.integers(-4, 5, y.shape).astype(dtype)
            gx, gw, _ = hl.conv2d_backward(gy, x, w, **options)
        for threads in (1, 2, 3, 5):
            with hl.num_threads(threads):
                assert_same_bits(hl.conv2d(x, w, **options), y, f"{threads} threads")
                assert_same_bits(hl.conv2d(x, hl.prepack(hl.conv2d, w), **options), y, f"{threads} threads, prepacked")
                got = hl.conv2d_backward(gy, x, w, **options)
                assert_same_bits(got[0], gx, f"gradient of x, {threads} threads")
                assert_same_bits(got[1], gw, f"gradient of w, {threads} threads")


def test_dilation_in_passes(host_backend):
    """More images than the phases of a dilated convolution are made of at a time."""
    x, w = normal(3, 32, 300, 290, dtype=np.float32), normal(32, 32, 3, 3, dtype=np.float32)
    y = hl.conv2d(x, w, padding=(2, 3), dilation=(2, 3))
    gx = hl.conv2d_backward(y, x, w, padding=(2, 3), dilation=(2, 3))[0]
    with hl.exact_convolution():
        assert_oracle(y, hl.conv2d(x, w, padding=(2, 3), dilation=(2, 3)), terms=32 * 9)
        assert_oracle(gx, hl.conv2d_backward(y, x, w, padding=(2, 3), dilation=(2, 3))[0], terms=32 * 9)


def test_exact_convolution(host_backend):
    x, w = normal(2, 64, 20, 20, dtype=np.float32), normal(64, 64, 3, 3, dtype=np.float32)
    truth = hl.conv2d(x.astype(np.float64), w.astype(np.float64), padding=1)
    with hl.exact_convolution():
        exact = hl.conv2d(x, w, padding=1)
        with hl.exact_convolution(False):
            fast = hl.conv2d(x, w, padding=1)
    assert_same_bits(fast, hl.conv2d(x, w, padding=1), "fast is the default")
    assert_oracle(exact, truth.astype(np.float32), terms=1)
    with pytest.raises(TypeError), hl.exact_convolution(1):
        pass


def test_exact_environment():
    code = "import numpy as np, hotloops as hl; print(hl._dispatch.exact())"
    for value, expected in (("1", "1"), ("", "0")):
        environment = {**os.environ, "HOTLOOPS_EXACT": value}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected


# ---------------------------------------------------------------------------------------------------------- bad inputs

BAD = {
    "stride 0": {"stride": 0},
    "stride (1, 0)": {"stride": (1, 0)},
    "stride -1": {"stride": -1},
    "stride True": {"stride": True},
    "stride 1.0": {"stride": 1.0},
    "stride (1.0, 1)": {"stride": (1.0, 1)},
    "stride (True, 1)": {"stride": (True, 1)},
    "stride '1'": {"stride": "1"},
    "stride of 3": {"stride": (1, 1, 1)},
    "stride of 0": {"stride": ()},
    "stride 10**30": {"stride": 10**30},
    "padding -1": {"padding": -1},
    "padding of 3": {"padding": (1, 1, 1)},
    "padding 'same '": {"padding": "same "},
    "padding of one pair": {"padding": ((1, 1),)},
    "padding of triples": {"padding": ((1, 1, 1), (1, 1, 1))},
    "padding 2**63 - 1": {"padding": 2**63 - 1},
    "padding 'same', stride 2": {"padding": "same", "stride": 2},
    "padding float": {"padding": 0.5},
    "padding pair of floats": {"padding": ((0.5, 1), (1, 1))},
    "dilation 0": {"dilation": 0},
    "dilation -1": {"dilation": (1, -1)},
    "dilation 2**31 - 1": {"dilation": 2**31 - 1},
    "dilation 2**31": {"dilation": 2**31},
    "dilation 2**63 - 1": {"dilation": 2**63 - 1},
    "groups 0": {"groups": 0},
    "groups -1": {"groups": -1},
    "groups 3": {"groups": 3},
    "groups 2": {"groups": 2},
    "groups True": {"groups": True},
}


@pytest.mark.parametrize("options", BAD.values(), ids=BAD)
def test_bad_options(options):
    x, w = np.ones((2, 4, 6, 6)), np.ones((6, 4, 3, 3))
    hl.conv2d(x, w)  # a plan of the good call is kept now
    hl.conv2d(x, w, None, (1, 1), (0, 0), (1, 1), 1)
    with pytest.raises((ValueError, TypeError), match="conv2d: "):
        hl.conv2d(x, w, **options)
    with pytest.raises((ValueError, TypeError), match="conv2d_backward: "):
        hl.conv2d_backward(np.ones((2, 6, 4, 4)), x, w, **options)
    if "groups" not in options:
        with pytest.raises((ValueError, TypeError), match="unfold: "):
            hl.unfold(x, 3, **options)
        with pytest.raises((ValueError, TypeError), match="im2col: "):
            hl.im2col(x, 3, **options)
        with pytest.raises((ValueError, TypeError), match="fold: "):
            hl.fold(np.ones((2, 36, 16)), 6, 3, **options)
        with pytest.raises((ValueError, TypeError), match="col2im: "):
            hl.col2im(np.ones((2, 4, 4, 4, 3, 3)), 6, **options)


@pytest.mark.parametrize("size", [0, -1, True, 2.0, (1, 2, 3), "3", 2**63, None])
def test_bad_kernel_sizes(size):
    for f in (hl.unfold, hl.im2col, lambda x, k: hl.fold(np.ones((2, 9, 4)), 4, k)):
        with pytest.raises((ValueError, TypeError)):
            f(np.ones((2, 3, 5, 5)), size)


@pytest.mark.parametrize(
    ("x", "w"),
    [
        ((4, 4), (1, 1, 2, 2)),
        ((1, 1, 1, 4, 4), (1, 1, 2, 2)),
        ((1, 1, 4, 4), (1, 1, 2)),
        ((1, 1, 4, 4), (1, 1, 5, 5)),
        ((1, 2, 4, 4), (1, 1, 2, 2)),
        ((1, 1, 0, 4), (1, 1, 1, 1)),
        ((1, 1, 4, 4), (1, 1, 0, 1)),
        ((1, 0, 4, 4), (1, 1, 1, 1)),
    ],
)
def test_bad_shapes(x, w):
    with pytest.raises(ValueError, match="conv2d: "):
        hl.conv2d(np.ones(x), np.ones(w))


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 1), (0,)])
def test_bad_bias(shape):
    with pytest.raises(ValueError, match="conv2d: bias"):
        hl.conv2d(np.ones((1, 1, 4, 4)), np.ones((2, 1, 2, 2)), np.ones(shape))


@pytest.mark.parametrize(
    "options", [{"output_padding": 1}, {"output_padding": -1}, {"padding": 5}, {"padding": "same"}, {"groups": 2}]
)
def test_bad_transposed(options):
    with pytest.raises((ValueError, TypeError), match="conv_transpose2d: "):
        hl.conv_transpose2d(np.ones((1, 3, 3, 3)), np.ones((3, 2, 3, 3)), **options)


def test_too_large():
    one = np.ones((1, 1, 1, 1))
    with pytest.raises(MemoryError, match="conv2d"):
        hl.conv2d(one, one, padding=2**40)
    with pytest.raises(MemoryError, match="conv_transpose2d"):
        hl.conv_transpose2d(np.ones((1, 1, 2, 2)), one, stride=2**40)
    with pytest.raises(MemoryError, match="conv_transpose1d"):
        hl.conv_transpose1d(np.ones((1, 1, 3)), np.ones((1, 1, 1)), stride=2**62)
    with pytest.raises(MemoryError, match="unfold"):
        hl.unfold(one, 1, padding=2**40)
    with pytest.raises(MemoryError, match="fold"):
        hl.fold(np.ones((1, 1)), 2**40, 1, stride=2**40)


@pytest.mark.parametrize("kernel, stride", [(2, 1), (3, 1), (4, 1), (5, 1), (3, 2), (4, 2), (5, 2), (7, 2), (9, 2)])
def test_errors_that_exact_convolution_names(kernel, stride):
    numbers = np.random.default_rng(10 * kernel + stride)  # its own: the largest error of many is another one for other numbers
    x, w = (numbers.standard_normal(shape, np.float32) for shape in ((2, 128, 33, 33), (64, 128, kernel, kernel)))
    options = (stride, kernel // 2)
    gy = numbers.standard_normal(hl.conv2d(x, w, None, *options).shape, np.float32)

    def results(*arrays):
        x, w, gy = arrays
        gx, gw, _ = hl.conv2d_backward(gy, x, w, *options)
        return hl.conv2d(x, w, None, *options), gx, gw

    truth = results(*(a.astype(np.float64) for a in (x, w, gy)))
    with hl.exact_convolution():
        direct = results(x, w, gy)
    for fast, slow, right, (limit, slow_limit) in zip(
        results(x, w, gy), direct, truth, ((5e-6, 1.5e-6), (5e-6, 1.5e-6), (8e-6, 3e-6)), strict=True
    ):
        largest = np.abs(right).max()
        assert np.abs(fast - right).max() <= limit * largest
        assert np.abs(slow - right).max() <= slow_limit * largest


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("width", [512, 509])  # rows of y that begin a vector, and some that do not
def test_pointwise_result_beyond_the_caches(host_backend, dtype, width):
    x = rng.integers(-8, 8, (2, 5, 512, width)).astype(dtype)
    w, bias = rng.integers(-8, 8, (11, 5, 1, 1)).astype(dtype), rng.integers(-8, 8, 11).astype(dtype)
    y = hl.conv2d(x, w, bias)
    assert y.nbytes > 8 << 20
    assert_same(y, np.einsum("fc,nchw->nfhw", w[:, :, 0, 0], x) + bias[:, None, None], "y")


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("options", [(3, 1, 1), (3, 1, 0), (3, 2, 1), (7, 4, 3)])
def test_patches_beyond_the_caches(host_backend, dtype, options, threads):
    """They are written past them, in pieces that begin and end anywhere in a row."""
    kernel, stride, padding = options
    x = rng.integers(-8, 8, (2, 9 * stride**2, 117, 118)).astype(dtype)
    padded = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (kernel, kernel), axis=(2, 3))[:, :, ::stride, ::stride]
    with hl.num_threads(threads):
        unfolded = hl.unfold(x, kernel, stride=stride, padding=padding)
        rows = hl.im2col(x, kernel, stride=stride, padding=padding)
    assert unfolded.nbytes > 8 << 20
    assert_same(unfolded, windows.transpose(0, 1, 4, 5, 2, 3).reshape(unfolded.shape), "unfold")
    assert_same(rows, windows.transpose(0, 2, 3, 1, 4, 5).reshape(rows.shape), "im2col")


def test_huge_options_that_mean_nothing(host_backend):
    """A stride past the only window, a dilation of a single tap."""
    x, w = normal(1, 2, 3, 3), normal(2, 2, 3, 3)
    assert_same_bits(hl.conv2d(x, w, stride=2**63 - 1), hl.conv2d(x, w), "stride")
    assert_same_bits(hl.conv2d(x, w[:, :, :1, :1], dilation=2**63 - 1), hl.conv2d(x, w[:, :, :1, :1]), "dilation")
    far = hl.conv2d(x, w[:, :, :1, :1], stride=2**60, padding=2**60)
    assert far.shape == (1, 2, 3, 3) and np.count_nonzero(far) == 2
    x, w = normal(2, 20, 5, 21).round(), normal(20, 1, 3, 3).round()
    options = {"padding": (1, 2**40), "dilation": (1, 2**40), "groups": 20}
    assert_same_bits(hl.conv2d(x, w, **options), hl.conv2d(x, w[:, :, :, 1:2], padding=(1, 0), groups=20), "columns far away")


def test_types_refused():
    w = np.ones((1, 1, 1, 1))
    for bad in (
        np.ones((1, 1, 2, 2), int),
        np.ones((1, 1, 2, 2), bool),
        np.ma.ones((1, 1, 2, 2)),
        "x",
        None,
        np.ones((1, 1, 2, 2), complex),
    ):
        with pytest.raises(TypeError, match="conv2d"):
            hl.conv2d(bad, w)
    for f in (lambda x: hl.unfold(x, 1), lambda x: hl.fold(x[0, 0], 2, 1), lambda x: hl.col2im(x[None, None], 1)):
        with pytest.raises(TypeError):
            f(np.ones((1, 1, 2, 2), int))
