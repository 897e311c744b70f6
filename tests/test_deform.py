"""The deformable convolution against torchvision, plain loops, hand-worked numbers, plain convolutions and finite differences."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from compare import assert_oracle, assert_same, assert_same_bits

import hotloops as hl

rng = np.random.default_rng(11)
ARRAYS = ("input", "offset", "weight", "bias", "mask")


def normal(*shape, dtype=np.float64):
    return rng.standard_normal(shape).astype(dtype)


def inputs(n, c, size, f, kernel, *, groups=1, offset_groups=1, mask=True, bias=True, dtype=np.float64, **options):
    """input, offset, weight, bias, mask of a call; the offsets of some samples are whole numbers."""
    x, w = normal(n, c, *size, dtype=dtype), normal(f, c // groups, *kernel, dtype=dtype)
    outputs = hl.conv2d(x, w, None, **options, groups=groups).shape[2:]
    offset = normal(n, 2 * offset_groups * math.prod(kernel), *outputs, dtype=dtype) * 2
    b = normal(f, dtype=dtype) if bias else None
    m = normal(n, offset_groups * math.prod(kernel), *outputs, dtype=dtype) if mask else None
    return [x, offset, w, b, m]


def run(x, offset, weight, bias=None, mask=None, stride=1, padding=0, dilation=1, **more):
    return hl.deform_conv2d(x, offset, weight, bias, stride, padding, dilation, mask, **more)


CONFIGURATIONS = [
    ((2, 3, (6, 7), 4, (3, 3)), {}, {"padding": 1}),
    ((2, 6, (5, 6), 4, (2, 3)), {"groups": 2, "offset_groups": 3}, {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}),
    ((1, 4, (5, 4), 8, (3, 3)), {"groups": 4, "offset_groups": 2, "mask": False}, {"padding": 1}),
    ((3, 2, (4, 4), 3, (1, 1)), {"bias": False, "offset_groups": 2}, {}),
    ((2, 40, (9, 8), 20, (3, 3)), {"offset_groups": 2}, {"stride": 2, "padding": 1}),
]


# ---------------------------------------------------------------------------------------------------------- plain loops


def pixel(plane, h, w):
    inside = 0 <= h < plane.shape[0] and 0 <= w < plane.shape[1]
    return plane[int(h), int(w)] if inside else 0.0


def loops(x, offset, weight, bias=None, mask=None, stride=1, padding=0, dilation=1):
    """As the papers write it: the sum over all pixels near the place of its triangle weight times the pixel."""
    (stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w) = (
        v if isinstance(v, tuple) else (v, v) for v in (stride, padding, dilation)
    )
    (f, cg, kh, kw), (n, c) = weight.shape, x.shape[:2]
    taps, outputs = kh * kw, offset.shape[2:]
    per_offset, per_group = c // (offset.shape[1] // (2 * taps)), f // (c // cg)
    y = np.zeros((n, f, *outputs))
    for i, o, oh, ow in np.ndindex(y.shape):
        total = 0.0 if bias is None else bias[o]
        for k, a, b in np.ndindex(cg, kh, kw):
            channel = o // per_group * cg + k
            place = channel // per_offset * taps + a * kw + b
            h = oh * stride_h - pad_h + a * dilation_h + offset[i, 2 * place, oh, ow]
            w = ow * stride_w - pad_w + b * dilation_w + offset[i, 2 * place + 1, oh, ow]
            value = sum(
                max(0.0, 1 - abs(h - p)) * max(0.0, 1 - abs(w - q)) * pixel(x[i, channel], p, q)
                for p, q in itertools.product((math.floor(h), math.floor(h) + 1), (math.floor(w), math.floor(w) + 1))
            )
            total += weight[o, k, a, b] * value * (1.0 if mask is None else mask[i, place, oh, ow])
        y[i, o, oh, ow] = total
    return y


@pytest.mark.parametrize(("sizes", "more", "options"), CONFIGURATIONS[:4])
def test_against_plain_loops(host_backend, sizes, more, options):
    arrays = inputs(*sizes, **more, **options)
    assert_oracle(run(*arrays, **options), loops(*arrays, **options), terms=30)


@pytest.mark.parametrize(("sizes", "more", "options"), CONFIGURATIONS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_against_torchvision(vision, host_backend, sizes, more, options, dtype):
    torch = pytest.importorskip("torch")
    arrays = inputs(*sizes, **more, **options, dtype=np.dtype(dtype).type)
    tensors = [None if a is None else torch.from_numpy(a.copy()).requires_grad_() for a in arrays]
    settings = [options.get("stride", 1), options.get("padding", 0), options.get("dilation", 1)]
    theirs = vision.deform_conv2d(*tensors[:4], *settings, tensors[4])
    there = [i for i, a in enumerate(arrays) if a is not None]

    def call(*values):
        given = dict(zip(there, values, strict=True))
        return run(*[given.get(i) for i in range(5)], **options)

    mine, pullback = hl.vjp(call, *[arrays[i] for i in there])
    assert_oracle(mine, theirs.detach().numpy(), terms=400)
    gy = normal(*mine.shape, dtype=mine.dtype)
    theirs.backward(torch.from_numpy(gy))
    for i, g in zip(there, pullback(gy), strict=True):
        assert_oracle(g, tensors[i].grad.numpy(), terms=4000, what=ARRAYS[i])


# --------------------------------------------------------------------------------------------------- hand-worked numbers


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_by_hand(host_backend, dtype):
    """One tap at (0.5, 0.25) between 1 2 / 3 5: 0.5 (0.75 1 + 0.25 2) + 0.5 (0.75 3 + 0.25 5) = 2.375."""
    x, w = np.array([[[[1, 2], [3, 5]]]], dtype), np.array([[[[2]]]], dtype)
    offset = np.zeros((1, 2, 2, 2), dtype)
    offset[0, :, 0, 0] = 0.5, 0.25
    offset[0, :, 0, 1] = -0.5, 0  # half of it above the image: 0.5 2
    offset[0, :, 1, 0] = -1, 0.5  # 0.5 (1 + 2)
    offset[0, :, 1, 1] = 0, 1  # outside
    mask = np.array([[[[1, 1], [0.5, 1]]]], dtype)
    b = np.array([10], dtype)
    assert_same(run(x, offset, w, b, mask), np.array([[[[14.75, 12], [11.5, 10]]]], dtype), "y")
    _, pullback = hl.vjp(lambda *a: run(*a), x, offset, w, b, mask)
    gx, go, gw, gb, gm = pullback(np.array([[[[1, 0], [0, 0]]]], dtype))
    assert_same(gx, np.array([[[[0.75, 0.25], [0.75, 0.25]]]], dtype), "by input")
    expected = np.zeros((1, 2, 2, 2), dtype)
    expected[0, :, 0, 0] = 4.5, 3  # 2 (0.75 (3 - 1) + 0.25 (5 - 2)), 2 (0.5 (2 - 1) + 0.5 (5 - 3))
    assert_same(go, expected, "by offset")
    assert_same(gw, np.array([[[[2.375]]]], dtype), "by weight")
    assert_same(gb, np.array([1], dtype), "by bias")
    assert_same(gm, np.array([[[[4.75, 0], [0, 0]]]], dtype), "by mask")


def test_order_of_the_offsets(host_backend):
    """Down and right of tap after tap, offset group after offset group."""
    x = np.arange(2 * 25, dtype=np.float64).reshape(1, 2, 5, 5)
    offset = np.zeros((1, 2 * 2 * 2, 1, 1))
    offset[0, :, 0, 0] = 1, 0, 0, 2, 3, 3, 4, -1
    w = np.array([[[[1.0, 100.0]], [[10.0, 1000.0]]]])
    y = run(x[..., :1, :], offset * 0, w, dilation=(1, 4))
    assert y.item() == 0 * 1 + 4 * 100 + 25 * 10 + 29 * 1000
    y = run(x, np.broadcast_to(offset, (1, 8, 5, 1)), w, dilation=(1, 4))
    assert y[0, 0, 0, 0] == x[0, 0, 1, 0] + 100 * 0 + 10 * x[0, 1, 3, 3] + 1000 * x[0, 1, 4, 3]


# -------------------------------------------------------------------------------------------- against plain convolutions


@pytest.mark.parametrize(("sizes", "more", "options"), CONFIGURATIONS)
def test_no_offset_is_conv2d(host_backend, sizes, more, options):
    x, offset, w, b, _ = inputs(*sizes, **more, **options)
    groups = more.get("groups", 1)
    expected = hl.conv2d(x, w, b, **options, groups=groups)
    assert_oracle(run(x, offset * 0, w, b, **options), expected, terms=400)
    mask = np.full((sizes[0], offset.shape[1] // 2, *offset.shape[2:]), 2.0)
    assert_oracle(run(x, offset * 0, w / 2, b, mask, **options), expected, terms=400)


@pytest.mark.parametrize("shift", [(1, 0), (0, -1), (-2, 3), (7, 7)])
def test_whole_offsets_move_the_window(host_backend, shift):
    x, _, w, b, _ = inputs(2, 3, (6, 7), 4, (3, 3))
    everywhere = hl.conv2d(x, w, b, padding=8)
    top, left = 8 + shift[0], 8 + shift[1]
    offset = np.tile(np.array(shift, float)[:, None, None], (2, 9, 4, 5))
    assert_oracle(run(x, offset, w, b), everywhere[:, :, top : top + 4, left : left + 5], terms=27)


# ---------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize(("sizes", "more", "options"), CONFIGURATIONS[:4])
def test_gradcheck(host_backend, sizes, more, options):
    arrays = inputs(*sizes, **more, **options)
    away = np.abs(arrays[1] - np.round(arrays[1])) < 0.01  # the slope jumps on whole numbers
    arrays[1][away] += 0.1
    there = [i for i, a in enumerate(arrays) if a is not None]

    def call(*values):
        given = dict(zip(there, values, strict=True))
        return run(*[given.get(i) for i in range(5)], **options)

    assert hl.gradcheck(call, *[arrays[i] for i in there])


def test_gradients_one_by_one(host_backend):
    """Each gradient alone has the bits that it has among all."""
    arrays = inputs(2, 6, (6, 5), 4, (3, 2), groups=2, offset_groups=3, dtype=np.float32, padding=1)
    y, pullback = hl.vjp(lambda *a: run(*a, padding=1), *arrays)
    gy = normal(*y.shape, dtype=np.float32)
    for i, together in enumerate(pullback(gy)):
        _, alone = hl.vjp(lambda v, i=i: run(*arrays[:i], v, *arrays[i + 1 :], padding=1), arrays[i])
        assert_same_bits(alone(gy)[0], together, ARRAYS[i])


def test_float16_computes_in_float32(host_backend):
    arrays = inputs(1, 4, (5, 5), 3, (3, 3), dtype=np.float16)
    wide = run(*[a.astype(np.float32) for a in arrays])
    assert_same(run(*arrays), wide.astype(np.float16), "float16")
    _, pullback = hl.vjp(lambda *a: run(*a), *arrays)
    assert [g.dtype for g in pullback(np.ones_like(wide, np.float16))] == [np.float16] * 5


# --------------------------------------------------------------------------------------------------------- bad inputs


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_offsets_that_are_no_place(host_backend, dtype):
    """Infinite and huge ones lead outside, NaN makes NaN; no gradient is lost or misplaced by them."""
    odd = [np.nan, np.inf, -np.inf, 1e9, -1e9, 3e38, -3e38, 2.0**31, -(2.0**31), 2.0**63, 1e-40]
    for a, b in itertools.product([*odd, 0.0], repeat=2):
        x, w = np.ones((1, 3, 4, 5), dtype), np.ones((2, 3, 1, 1), dtype)
        offset = np.zeros((1, 2, 4, 5), dtype)
        offset[0, :, 1, 2] = a, b
        mask = np.ones((1, 1, 4, 5), dtype)
        y, pullback = hl.vjp(lambda *v, w=w: run(v[0], v[1], w, None, v[2]), x, offset, mask)
        small = abs(a) < 1 and abs(b) < 1
        value = np.nan if np.isnan(a) or np.isnan(b) else 3.0 if small else 0.0
        expected = np.full((1, 2, 4, 5), 3, dtype)
        expected[:, :, 1, 2] = value
        assert_same(y, expected, f"offset {a}, {b}")
        gx, go, gm = pullback(np.ones_like(y))
        expected = np.full((1, 3, 4, 5), 2, dtype)
        expected[:, :, 1, 2] = 2 if small else 0
        assert_same(gx, expected, f"offset {a}, {b}: by input")
        inner = go[0, :, :3, :4].copy()  # where the image goes on, it is flat
        inner[:, 1, 2] = 0
        assert not inner.any()
        assert_same(gm[0, 0, 1, 2], np.array(2 * value, dtype)[()], f"offset {a}, {b}: by mask")


def test_infinite_pixels_reach_their_neighbours(host_backend):
    """All four pixels count, with the weight 0 too."""
    x = np.ones((1, 1, 3, 3))
    x[0, 0, 1, 1] = np.inf
    y = run(x, np.zeros((1, 2, 3, 3)), np.ones((1, 1, 1, 1)))
    assert_same(y, np.array([[[[np.nan, np.nan, 1], [np.nan, np.inf, 1], [1, 1, 1]]]]), "y")


GOOD = {"x": (2, 4, 5, 6), "offset": (2, 2 * 2 * 6, 4, 4), "w": (3, 4, 2, 3), "mask": (2, 2 * 6, 4, 4)}


@pytest.mark.parametrize(
    "shapes",
    [
        {"x": (4, 5, 6)},
        {"x": (1, 4, 5, 6)},
        {"x": (2, 5, 5, 6)},
        {"x": (2, 4, 0, 6)},
        {"x": (2, 0, 5, 6)},
        {"offset": (2, 23, 4, 4)},
        {"offset": (2, 11, 4, 4)},
        {"offset": (2, 0, 4, 4)},
        {"offset": (2, 36, 4, 4)},
        {"offset": (2, 24, 4, 5)},
        {"offset": (2, 24, 4)},
        {"offset": (1, 24, 4, 4)},
        {"offset": ()},
        {"w": (3, 4, 6, 3)},
        {"w": (3, 5, 2, 3)},
        {"w": (3, 2, 2, 3)},
        {"w": (3, 0, 2, 3)},
        {"w": (3, 4, 2)},
        {"w": (3, 4, 0, 3)},
        {"mask": (2, 6, 4, 4)},
        {"mask": (2, 24, 4, 4)},
        {"mask": (1, 12, 4, 4)},
        {"mask": (2, 12, 5, 4)},
        {"mask": (12,)},
    ],
    ids=str,
)
def test_bad_shapes(shapes):
    arrays = {name: np.ones(shape) for name, shape in {**GOOD, **shapes}.items()}
    with pytest.raises(ValueError, match="deform_conv2d: "):
        run(arrays["x"], arrays["offset"], arrays["w"], None, arrays["mask"])
    good = {name: np.ones(shape) for name, shape in GOOD.items()}
    assert run(good["x"], good["offset"], good["w"], None, good["mask"]).shape == (2, 3, 4, 4)


BAD = {
    "stride 0": {"stride": 0},
    "stride 1.0": {"stride": 1.0},
    "padding -1": {"padding": -1},
    "padding 2**63 - 1": {"padding": 2**63 - 1},
    "dilation 0": {"dilation": 0},
    "dilation 2**31": {"dilation": 2**31},
    "bias of another length": {"bias": np.ones(4)},
    "bias with two axes": {"bias": np.ones((3, 1))},
    "mask of booleans": {"mask": np.ones(GOOD["mask"], bool)},
    "offset of integers": {"offset": np.zeros(GOOD["offset"], int)},
    "no offset": {"offset": None},
    "out of another shape": {"out": np.zeros((2, 3, 4, 5))},
    "out of another type": {"out": np.zeros((2, 3, 4, 4), np.float32)},
}


@pytest.mark.parametrize("options", BAD.values(), ids=BAD)
def test_bad_arguments(options):
    arguments = {"x": np.ones(GOOD["x"]), "offset": np.ones(GOOD["offset"]), "weight": np.ones(GOOD["w"])}
    assert run(**arguments).shape == (2, 3, 4, 4)
    with pytest.raises((ValueError, TypeError), match="deform_conv2d: "):
        run(**{**arguments, **options})


def test_empty(host_backend):
    x, offset, w = np.ones((0, 3, 4, 4)), np.ones((0, 18, 2, 2)), np.ones((2, 3, 3, 3))
    y, pullback = hl.vjp(lambda *a: run(*a), x, offset, w, np.ones(2))
    assert y.shape == (0, 2, 2, 2)
    gradients = pullback(y)
    assert [g.shape for g in gradients] == [x.shape, offset.shape, w.shape, (2,)]
    assert not any(g.any() for g in gradients)


def test_out_may_overlap(host_backend):
    x, w = normal(1, 2, 5, 5), normal(2, 2, 3, 3)
    offset = normal(1, 18, 5, 5)
    expected = run(x, offset, w, padding=1)
    assert run(x, offset, w, padding=1, out=x) is x
    assert_same_bits(x, expected, "out is the input")
