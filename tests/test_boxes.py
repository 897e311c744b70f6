"""Boxes: other libraries as oracles, gradients against differences, corner cases."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from cases.boxes import boxes as some_boxes
from cases.boxes import clustered, spread, tiny
from compare import assert_oracle, assert_same, assert_same_bits
from conftest import running, variants

import hotloops as hl

MEASURES = ("box_iou", "generalized_box_iou", "distance_box_iou", "complete_box_iou")


def random_boxes(n, dtype=np.float32, seed=0, make=some_boxes):
    return make(np.random.default_rng(seed), (n, 4), np.dtype(dtype))


# ------------------------------------------------------------------------------------------------------------ oracles


def torch_overlap(torch, name, a, b):
    """The formulas of torchvision, in torch, so that its autograd gives the gradients."""
    top_left, bottom_right = torch.max(a[:, None, :2], b[None, :, :2]), torch.min(a[:, None, 2:], b[None, :, 2:])
    inter = (bottom_right - top_left).clamp(min=0).prod(dim=2)
    area_a, area_b = ((v[:, 2:] - v[:, :2]).prod(dim=1) for v in (a, b))
    union = area_a[:, None] + area_b[None] - inter
    iou = inter / union
    if name == "box_iou":
        return iou
    sides = (torch.max(a[:, None, 2:], b[None, :, 2:]) - torch.min(a[:, None, :2], b[None, :, :2])).clamp(min=0)
    if name == "generalized_box_iou":
        return iou - (sides.prod(dim=2) - union) / sides.prod(dim=2)
    centres_a, centres_b = ((v[:, :2] + v[:, 2:]) / 2 for v in (a, b))
    diou = iou - ((centres_a[:, None] - centres_b[None]) ** 2).sum(dim=2) / ((sides**2).sum(dim=2) + 1e-7)
    if name == "distance_box_iou":
        return diou
    angle_a, angle_b = (torch.atan((v[:, 2] - v[:, 0]) / (v[:, 3] - v[:, 1])) for v in (a, b))
    v = 4 / math.pi**2 * (angle_a[:, None] - angle_b[None]) ** 2
    with torch.no_grad():
        alpha = v / (1 - iou + v + 1e-7)
    return diou - alpha * v


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_overlap_like_torch(name, dtype, host_backend):
    """Values and gradients, matrix and paired."""
    torch = pytest.importorskip("torch")
    a, b = random_boxes(23, dtype, 1), random_boxes(37, dtype, 2)
    grad = np.random.default_rng(3).standard_normal((23, 37)).astype(dtype)
    y, pullback = hl.vjp(getattr(hl, name), a, b)
    ta, tb = (torch.from_numpy(v.astype(np.float64)).requires_grad_() for v in (a, b))
    expected = torch_overlap(torch, name, ta, tb)
    expected.backward(torch.from_numpy(grad.astype(np.float64)))
    assert_oracle(y, expected.detach().numpy().astype(dtype), what=name)
    for actual, t in zip(pullback(grad), (ta, tb), strict=True):
        assert_oracle(actual, t.grad.numpy().astype(dtype), terms=37, what=f"{name}, gradient")
    paired, pullback = hl.vjp(lambda a, b: getattr(hl, name)(a, b, paired=True), a, b[:23])
    assert_oracle(paired, np.ascontiguousarray(np.diagonal(y)), what=f"{name}, paired")
    ta, tb = (torch.from_numpy(v.astype(np.float64)).requires_grad_() for v in (a, b[:23]))
    torch_overlap(torch, name, ta, tb).diagonal().backward(torch.from_numpy(grad[:, 0].astype(np.float64)))
    for actual, t in zip(pullback(grad[:, 0]), (ta, tb), strict=True):
        assert_oracle(actual, t.grad.numpy().astype(dtype), what=f"{name}, paired gradient")


def test_suppression_like_torchvision(vision, host_backend):
    torch = pytest.importorskip("torch")
    for make, threshold in itertools.product((some_boxes, clustered), (0.1, 0.5, 0.7)):
        b = random_boxes(600, make=make)
        s = np.random.default_rng(1).permutation(600).astype(np.float32)
        groups = np.random.default_rng(2).integers(0, 5, 600)
        tensors = torch.from_numpy(b), torch.from_numpy(s)
        assert_same(hl.nms(b, s, threshold), vision.nms(*tensors, threshold).numpy(), "nms")
        expected = vision.boxes._batched_nms_vanilla(*tensors, torch.from_numpy(groups), threshold).numpy()
        assert_same(hl.batched_nms(b, s, groups, threshold), expected, "batched_nms")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_roi_like_torchvision(vision, dtype, host_backend):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 20, 23)).astype(dtype)
    rois = np.concatenate([rng.integers(0, 2, (17, 1)), random_boxes(17)], axis=1).astype(dtype)
    for size, scale in ((1, 1.0), ((2, 3), 0.5), (7, 0.3)):
        runs = [(lambda v, o: o.roi_pool(v, r(o), size, scale))]  # noqa: B023
        for ratio, aligned in itertools.product((-1, 2), (False, True)):
            runs.append(lambda v, o, q=ratio, a=aligned: o.roi_align(v, r(o), size, scale, q, a))  # noqa: B023

        def r(o):
            return rois if o is hl else torch.from_numpy(rois)

        for run in runs:
            y, pullback = hl.vjp(lambda v, f=run: f(v, hl), x)
            tx = torch.from_numpy(x).requires_grad_()
            expected = run(tx, vision)
            grad = rng.standard_normal(y.shape).astype(dtype)
            expected.backward(torch.from_numpy(grad))
            assert_oracle(y, expected.detach().numpy(), terms=16)
            assert_oracle(pullback(grad)[0], tx.grad.numpy(), terms=100)


def plain_iou(a, b):
    """Exact real numbers, no arrays."""
    from fractions import Fraction

    a, b = [Fraction(float(v)) for v in a], [Fraction(float(v)) for v in b]
    areas = [max(v[2] - v[0], 0) * max(v[3] - v[1], 0) for v in (a, b)]
    inter = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    return inter / (sum(areas) - inter) if sum(areas) else Fraction(0)


def test_iou_of_exact_arithmetic(host_backend):
    a, b = random_boxes(5, np.float64, 1), random_boxes(9, np.float64, 2)
    assert_oracle(hl.box_iou(a, b), np.array([[float(plain_iou(p, q)) for q in b] for p in a]))


@pytest.mark.parametrize("make", [clustered, spread, tiny])
@pytest.mark.parametrize("variant", [v for v in variants() if v != "cuda"])
def test_same_boxes_everywhere(variant, make):
    """What is kept is decided by the same roundings on every backend and instruction set, to the last bit."""
    for dtype, threshold in itertools.product((np.float32, np.float64), (0.3, 0.5, 0.7)):
        # Coordinates on a coarse grid: many pairs with an IoU at, just below and just above the threshold.
        b = random_boxes(700, dtype, make=make)
        b = b if make is tiny else np.round(b)
        s = np.random.default_rng(1).random(700).astype(dtype)
        with running("reference"):
            expected = hl.nms(b, s, threshold), hl.box_iou(b[:40], b), *hl.sparse_box_iou(b[:90], b, threshold)
        with running(variant):
            actual = hl.nms(b, s, threshold), hl.box_iou(b[:40], b), *hl.sparse_box_iou(b[:90], b, threshold)
        for x, y in zip(actual, expected, strict=True):
            assert_same_bits(x, y, variant)


# ---------------------------------------------------------------------------------------------------------- gradients


def test_gradients(host_backend):
    a, b = random_boxes(3, np.float64, 1), random_boxes(4, np.float64, 2)
    for fmt in ("xyxy", "xywh", "cxcywh"):
        p, q = (hl.box_convert(v, "xyxy", fmt) for v in (a, b))
        for name in MEASURES[:3]:
            for paired in (False, True):
                assert hl.gradcheck(
                    lambda x, y, n=name, f=fmt, k=paired: getattr(hl, n)(x, y, fmt=f, paired=k), p, q[:3] if paired else q
                )
        assert hl.gradcheck(lambda x, f=fmt: hl.box_area(x, f), p)
        for other in ("xyxy", "xywh", "cxcywh"):
            assert hl.gradcheck(lambda x, f=fmt, o=other: hl.box_convert(x, f, o), p)
    assert hl.gradcheck(lambda x: hl.clip_boxes_to_image(x, (20.5, 10.5)), a)


def test_roi_gradients(host_backend):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 2, 5, 6))
    rois = [np.array([[0.3, 0.4, 4.2, 3.9], [-2.2, 1.3, 9.4, 3.2]]), np.array([[1.1, 0.7, 2.6, 2.2]])]
    assert hl.gradcheck(lambda v: hl.roi_pool(v, rois, 2), x)
    for ratio, aligned, mode in itertools.product((-1, 2), (False, True), ("avg", "max")):
        assert hl.gradcheck(lambda v, q=ratio, a=aligned, m=mode: hl.roi_align(v, rois, (2, 3), 0.9, q, a, mode=m), x)


def test_complete_iou_gradient_holds_alpha(host_backend):
    """With the weight alpha of the point itself held fixed, the gradient is the derivative."""
    a, b = random_boxes(1, np.float64, 1), random_boxes(1, np.float64, 2)

    def parts(p, q):
        d, c = hl.distance_box_iou(p, q, paired=True)[0], hl.complete_box_iou(p, q, paired=True)[0]
        angle = [math.atan2(v[0, 2] - v[0, 0], v[0, 3] - v[0, 1]) for v in (p, q)]
        return d, c, 4 / math.pi**2 * (angle[0] - angle[1]) ** 2

    d, c, v = parts(a, b)
    alpha = (d - c) / v
    [gradient] = hl.vjp(lambda p: hl.complete_box_iou(p, b, paired=True), a)[1](np.ones(1))
    for i in range(4):
        values = []
        for step in (1e-6, -1e-6):
            moved = a.copy()
            moved[0, i] += step
            d, _, v = parts(moved, b)
            values.append(d - alpha * v)
        assert abs((values[0] - values[1]) / 2e-6 - gradient[0, i]) < 1e-6


def test_gradients_of_empty_boxes_are_finite(host_backend):
    b = np.array([[1.0, 1, 1, 1], [3, 3, 1, 1], [0, 0, 2, 2], [0, 0, 2, 2]])
    for name in MEASURES:
        for g in hl.vjp(getattr(hl, name), b, b)[1](np.ones((4, 4))):
            assert np.isfinite(g).all(), name


def test_roi_align_gradient_repeats():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 20, 12, 13)).astype(np.float32)
    rois = np.concatenate([np.zeros((90, 1)), random_boxes(90) / 4], axis=1).astype(np.float32)
    y, pullback = hl.vjp(lambda v: hl.roi_align(v, rois, 7), x)
    g = rng.standard_normal(y.shape).astype(np.float32)
    [first] = pullback(g)
    for threads in (1, 2, 3, 7):
        with hl.num_threads(threads):
            assert_same_bits(pullback(g)[0], first, f"{threads} threads")


# -------------------------------------------------------------------------------------------------------- corner cases


def test_a_box_with_itself_is_one(host_backend):
    rng = np.random.default_rng(0)
    for dtype in (np.float32, np.float64):
        corner = rng.uniform(-1, 1, (50, 2)) * 10.0 ** rng.uniform(-6, 7, (50, 1))
        b = np.concatenate([corner, corner + np.maximum(abs(corner), 1e-3)], axis=1).astype(dtype)
        assert (hl.box_iou(b, b, paired=True) == 1).all()
        assert (np.diagonal(hl.box_iou(b, b)) == 1).all()


def test_empty_and_inverted_boxes(host_backend):
    odd = np.array([[1.0, 1, 1, 5], [2, 2, 2, 2], [5, 5, 1, 1], [0, 4, 3, 1]])
    b = np.concatenate([odd, [[0.0, 0, 6, 6]]])
    assert (hl.box_iou(odd, b) == 0).all()
    for name in MEASURES:
        assert np.isfinite(getattr(hl, name)(b, b)).all(), name
    assert_same(hl.nms(b, np.arange(5.0), 0.0), np.array([4, 3, 2, 1, 0]), "nms")


def test_nan_boxes(host_backend):
    b = np.array([[0, 0, 4, 4], [0, 0, 4, np.nan], [0, 0, 4, 4]])
    for name in MEASURES:
        y = getattr(hl, name)(b, b)
        assert np.isnan(y[1]).all() and np.isnan(y[:, 1]).all() and np.isfinite(y[::2, ::2]).all(), name
    assert_same(hl.nms(b, [0.5, 0.9, 0.6], 0.5), np.array([1, 2]), "nms")
    assert_same(hl.nms(b, [np.nan, 0.9, np.nan], 0.5), np.array([1, 0]), "nms")


def test_threshold_is_strict(host_backend):
    for dtype in (np.float16, np.float32, np.float64):
        b = np.array([[0, 0, 10, 10], [0, 0, 10, 3], [0, 0, 10, 7]], dtype)  # IoU 0.3, 0.7 with the first
        assert_same(hl.nms(b[:2], np.array([2, 1], dtype), 0.3), np.array([0, 1]), str(dtype))
        assert_same(hl.nms(b[::2], np.array([2, 1], dtype), 0.7), np.array([0, 1]), str(dtype))
        assert_same(hl.nms(b[::2], np.array([2, 1], dtype), 0.69), np.array([0]), str(dtype))


def test_score_threshold_and_limit(host_backend):
    b = np.array([[0, 0, 1, 1], [2, 0, 3, 1], [4, 0, 5, 1], [6, 0, 7, 1]])
    s = np.array([0.1, 0.4, np.nan, 0.9])
    assert_same(hl.nms(b, s, 0.5), np.array([3, 1, 0, 2]), "all")
    assert_same(hl.nms(b, s, 0.5, score_threshold=0.1), np.array([3, 1]), "threshold")
    assert_same(hl.nms(b, s, 0.5, max_output=1), np.array([3]), "limit")
    assert_same(hl.batched_nms(b, s, [5, -5, 5, -5], 0.5, max_output=3), np.array([3, 1, 0]), "limit over groups")
    for bad in (-1, -(2**40)):
        with pytest.raises(ValueError, match="max_output"):
            hl.nms(b, s, 0.5, max_output=bad)
    with pytest.raises(ValueError, match="iou_threshold"):
        hl.nms(b, s, float("nan"))


def test_groups_never_mix(host_backend):
    """Groups are compared as 64-bit integers, whatever the coordinates."""
    b = np.tile(np.array([[-1e6, -1e6, 1e6, 1e6]], np.float32), (6, 1))
    groups = np.array([0, 1, 2**62, 2**62 + 1, -(2**63), 0])
    assert_same(hl.batched_nms(b, np.arange(6, 0, -1.0), groups, 0.5), np.array([0, 1, 2, 3, 4]), "groups")


def test_integer_boxes_do_not_overflow(host_backend):
    for dtype in (np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64):
        top = min(np.iinfo(dtype).max, 2**40)
        b = np.array([[0, 0, top, top], [0, 0, top, top // 2], [1, 1, 0, 0]], dtype)
        assert_same(hl.box_area(b)[:1], np.array([float(top) ** 2]), str(dtype))
        assert_same(hl.box_iou(b, b), hl.box_iou(b.astype(np.float64), b.astype(np.float64)), str(dtype))
        assert_same(hl.nms(b, [3, 2, 1], 0.6), np.array([0, 1, 2]), str(dtype))
        assert hl.clip_boxes_to_image(b, (5, 5)).max() == 5


def test_half_precision_is_computed_in_single(host_backend):
    b = np.array([[0, 0, 300, 300], [0, 0, 300, 150]], np.float16)  # the areas overflow float16
    assert_same(hl.box_iou(b, b), np.array([[1, 0.5], [0.5, 1]], np.float16), "box_iou")
    assert_same(hl.nms(b, np.array([1, 2], np.float16), 0.4), np.array([1]), "nms")
    g = hl.vjp(hl.generalized_box_iou, b, b)[1](np.ones((2, 2), np.float16))
    assert g[0].dtype == np.float16


def test_no_boxes(host_backend):
    none, some, scores = np.zeros((0, 4)), random_boxes(3, np.float64), np.zeros(0)
    for name in MEASURES:
        assert getattr(hl, name)(none, some).shape == (0, 3)
        assert getattr(hl, name)(some, none).shape == (3, 0)
        assert getattr(hl, name)(none, none, paired=True).shape == (0,)
        ga, gb = hl.vjp(getattr(hl, name), none, some)[1](np.zeros((0, 3)))
        assert ga.shape == (0, 4) and (gb == 0).all() and gb.shape == (3, 4)
    for keep in (hl.nms(none, scores, 0.5), hl.batched_nms(none, scores, [], 0.5), hl.remove_small_boxes(none, 1)):
        assert_same(keep, np.zeros(0, np.int64), "keep")
    assert [v.shape for v in hl.sparse_box_iou(none, some, 0.5)] == [(0,)] * 3
    assert [v.shape for v in hl.sparse_box_iou(some, none, 0.5)] == [(0,)] * 3
    assert [v.shape for v in hl.soft_nms(none, scores)] == [(0,), (0,)]
    assert hl.roi_align(np.zeros((2, 3, 4, 4)), np.zeros((0, 5)), 2).shape == (0, 3, 2, 2)
    assert hl.roi_pool(np.zeros((2, 3, 4, 4)), [none, none], 2).shape == (0, 3, 2, 2)
    assert hl.mask_iou(np.zeros((0, 2, 2), bool), np.zeros((3, 2, 2), bool)).shape == (0, 3)
    assert hl.masks_to_boxes(np.zeros((0, 2, 2), bool)).shape == (0, 4)


def test_sparse_iou_is_the_matrix(host_backend):
    for make in (some_boxes, spread):
        a, b = random_boxes(80, seed=1, make=make), random_boxes(300, seed=2, make=make)
        for threshold in (-1.0, 0.0, 0.2, 0.5, 1.0):
            full = hl.box_iou(a, b)
            rows, cols, iou = hl.sparse_box_iou(a, b, threshold)
            expected = np.nonzero(full > np.float32(threshold))
            assert_same(rows, expected[0], "rows")
            assert_same(cols, expected[1], "cols")
            assert_same_bits(iou, full[expected], "iou")


def test_formats_agree(host_backend):
    a, b = np.round(random_boxes(20, seed=1)), np.round(random_boxes(30, seed=2))
    for fmt in ("xywh", "cxcywh"):
        p, q = hl.box_convert(a, "xyxy", fmt), hl.box_convert(b, "xyxy", fmt)
        assert_same(hl.box_convert(p, fmt, "xyxy"), a, fmt)
        assert_same(hl.box_area(p, fmt), hl.box_area(a), fmt)
        for name in MEASURES:
            assert_same(getattr(hl, name)(p, q, fmt=fmt), getattr(hl, name)(a, b), name)
        for x, y in zip(hl.sparse_box_iou(p, q, 0.2, fmt=fmt), hl.sparse_box_iou(a, b, 0.2), strict=True):
            assert_same(x, y, fmt)


def test_leading_axes(host_backend):
    b = random_boxes(24).reshape(2, 3, 4, 4)
    assert hl.box_area(b).shape == (2, 3, 4)
    assert_same(hl.box_convert(b, "xyxy", "xywh").reshape(-1, 4), hl.box_convert(b.reshape(-1, 4), "xyxy", "xywh"), "convert")
    assert_same(hl.clip_boxes_to_image(b, (9, 9)).reshape(-1, 4), hl.clip_boxes_to_image(b.reshape(-1, 4), (9, 9)), "clip")


def test_soft_nms_by_hand(host_backend):
    b = np.array([[0.0, 0, 2, 2], [0, 0, 2, 1], [5, 5, 6, 6], [0, 0, 2, 2]])
    keep, scores = hl.soft_nms(b, [0.9, 0.8, 0.7, 0.6])
    assert_same(keep, np.array([0, 2, 1]), "linear")  # the last, equal to the first, falls to 0
    assert_oracle(scores, np.array([0.9, 0.7, 0.4]))
    keep, scores = hl.soft_nms(b, [0.9, 0.8, 0.7, 0.6], method="gaussian")
    first = [0.8 * math.exp(-0.5), 0.6 * math.exp(-2)]
    assert_same(keep, np.array([0, 2, 1, 3]), "gaussian")
    assert_oracle(scores, np.array([0.9, 0.7, first[0], first[1] * math.exp(-0.5)]))


@pytest.mark.parametrize("op", ["roi_align", "roi_pool"])
def test_rois_refused(op, host_backend):
    f, x = getattr(hl, op), np.ones((2, 1, 4, 4), np.float32)
    for image in (-1, 2, 0.5, np.nan, np.inf, 1e30):
        rois = np.array([[0, 0, 0, 1, 1], [image, 0, 0, 1, 1]], np.float32)
        with pytest.raises(ValueError, match=r"boxes\[1, 0\]"):
            f(x, rois, 2)
        with pytest.raises(ValueError, match=r"boxes\[1, 0\]"):
            hl.vjp(lambda v, r=rois: f(v, r, 2), x)
    for rois in (np.ones((3, 4)), np.ones(5), np.ones((1, 1, 5)), [np.ones((1, 4))], [np.ones((1, 5))] * 2, [np.ones(4)] * 2):
        with pytest.raises(ValueError, match="boxes"):
            f(x, rois, 2)
    for shape in ((1, 4, 4), (2, 1, 0, 4), (2, 1, 4, 4, 4)):
        with pytest.raises(ValueError, match="input"):
            f(np.ones(shape), np.ones((1, 5)), 2)
    with pytest.raises(ValueError, match="output_size"):
        f(x, np.zeros((1, 5)), -1)


@pytest.mark.parametrize("op", ["roi_align", "roi_pool"])
def test_wild_rois(op, host_backend):
    """Every combination of extreme coordinates comes back, soon, and NaN gives NaN."""
    x = np.ones((1, 1, 5, 6), np.float32)
    values = [np.nan, np.inf, -np.inf, 1e9, -1e9, 3e38, -3e38, 1e-40, 2.0]
    rois = np.array([[0, *c] for c in itertools.product(values, repeat=4)], np.float32)
    y = getattr(hl, op)(x, rois, 2)
    assert np.isnan(y[np.isnan(rois).any(axis=1)]).all()
    inside = ~np.isnan(y)
    assert (y[inside] >= 0).all() and (y[inside] <= 1 + 1e-5).all()
    hl.vjp(lambda v: getattr(hl, op)(v, rois, 2), x)[1](np.ones(y.shape, np.float32))


def test_roi_list_is_the_array(host_backend):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 2, 9, 9)).astype(np.float32)
    lists = [random_boxes(n, seed=n) / 5 for n in (2, 0, 3)]
    rois = np.concatenate([np.concatenate([np.full((len(b), 1), i), b], axis=1) for i, b in enumerate(lists)])
    for op in (hl.roi_align, hl.roi_pool):
        assert_same_bits(op(x, lists, (2, 3)), op(x, rois.astype(np.float32), (2, 3)), op.__name__)
        whole = [np.round(b).astype(np.int16) for b in lists]
        assert_same_bits(op(x, whole, 2), op(x, [b.astype(np.float32) for b in whole], 2), op.__name__)


def test_masks(host_backend):
    rng = np.random.default_rng(0)
    one, two = rng.random((4, 9, 11)) < 0.4, rng.random((5, 9, 11)) < 0.4
    one[0] = two[0] = False
    expected = [[(p & q).sum() / max((p | q).sum(), 1) for q in two] for p in one]
    assert_oracle(hl.mask_iou(one, two), np.array(expected))
    boxes = hl.masks_to_boxes(one)
    assert boxes.dtype == np.float32
    for mask, box in zip(one[1:], boxes[1:], strict=True):
        y, x = np.nonzero(mask)
        assert box.tolist() == [x.min(), y.min(), x.max(), y.max()]
    assert (boxes[0] == 0).all()
    for bad in (one[0], one.astype(complex), one.astype(object), None):
        with pytest.raises((TypeError, ValueError), match="masks"):
            hl.masks_to_boxes(bad)
    with pytest.raises(ValueError, match="masks2"):
        hl.mask_iou(one, two[:, :5])


@pytest.mark.parametrize("dtype", ["uint8", "int8", ">i4", "uint64", "float16", "float32", ">f8"])
def test_masks_of_numbers(host_backend, dtype):
    """Whatever is not zero is inside, as for torchvision."""
    rng = np.random.default_rng(1)
    one, two = rng.integers(0, 3, (4, 9, 11)).astype(dtype), rng.integers(0, 2, (5, 9, 11)).astype(dtype)
    if np.dtype(dtype).kind == "f":
        one[0, :2], one[1, 3, 4], one[2, 0, 0] = 0.25, np.nan, -0.0
    elif np.dtype(dtype).kind == "i":
        one[1, 2] = -1
    assert_same_bits(hl.mask_iou(one, two), hl.mask_iou(one != 0, two != 0), "mask_iou")
    assert_same_bits(hl.masks_to_boxes(one), hl.masks_to_boxes(one != 0), "masks_to_boxes")


def test_refused():
    b = np.ones((3, 4))
    for op in (hl.box_area, lambda v: hl.box_iou(v, b), lambda v: hl.box_iou(b, v), lambda v: hl.nms(v, [1, 2, 3], 0.5)):
        for wrong in (np.ones((3, 5)), np.ones((3, 3)), np.float64(3)):
            with pytest.raises(ValueError, match="boxes"):
                op(wrong)
        for wrong in ("x", None, np.ones((3, 4), complex), np.ma.ones((3, 4))):
            with pytest.raises(TypeError, match="boxes"):
                op(wrong)
    with pytest.raises(ValueError, match="fmt"):
        hl.box_iou(b, b, "yxyx")
    with pytest.raises(ValueError, match="paired"):
        hl.box_iou(b, b[:2], paired=True)
    with pytest.raises(TypeError, match="paired"):
        hl.box_iou(b, b, paired=1)
    with pytest.raises(ValueError, match="scores"):
        hl.nms(b, [1.0, 2.0], 0.5)
    with pytest.raises(TypeError, match="idxs"):
        hl.batched_nms(b, [1.0, 2.0, 3.0], [0.0, 1.0, 2.0], 0.5)
    with pytest.raises(ValueError, match="size"):
        hl.clip_boxes_to_image(b, (1, 2, 3))
    with pytest.raises(ValueError, match="sigma"):
        hl.soft_nms(b, np.ones(3), sigma=0.0)
    with pytest.raises(TypeError, match="no gradient"):
        hl.vjp(lambda v: hl.nms(v, np.ones(3), 0.5), b)
    huge = np.broadcast_to(np.zeros((1, 4), np.float32), (2**33, 4))
    with pytest.raises(MemoryError):
        hl.box_iou(np.broadcast_to(np.zeros((1, 4), np.float32), (2**50, 4)), huge)


def test_image_index_beyond_float16():
    """The RoIs of a float16 input are not rounded to float16, which has no 2049."""
    images = np.zeros((2051, 1, 2, 2), np.float16)
    images[2048], images[2049] = 5, 1
    pooled = hl.roi_align(images, np.array([[2049.0, 0, 0, 2, 2]], np.float32), 1)
    assert pooled.dtype == np.float16
    assert pooled.item() == 1
