"""Attention: worked numbers, properties, masks, gradients, and torch as oracle."""

from __future__ import annotations

import math

import numpy as np
import pytest
from compare import assert_oracle, assert_same, assert_same_bits

import hotloops as hl
from hotloops import _dispatch

sdpa = hl.scaled_dot_product_attention


def draw(*shape, seed=0, dtype=np.float64):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


# ------------------------------------------------------------------------------------------------------ worked numbers


def test_cross_attention_shapes(host_backend):
    """Encoder output 4 x 512, decoder output 2 x 512, heads of 64: Q 2 x 64, K and V 4 x 64, Z 2 x 64."""
    encoder, decoder = draw(4, 512), draw(2, 512)
    wq, wk, wv = (draw(64, 512, seed=i) for i in range(3))
    q, k, v = hl.linear(decoder, wq), hl.linear(encoder, wk), hl.linear(encoder, wv)
    assert (q.shape, k.shape, v.shape) == ((2, 64), (4, 64), (4, 64))
    z = sdpa(q, k, v)
    assert z.shape == (2, 64)
    assert_oracle(z, hl.softmax(q @ k.T / 8, 1) @ v, terms=512)


def test_by_hand(host_backend):
    q, k, v = np.array([[1.0, 1.0]]), np.array([[math.log(2) * math.sqrt(2), 0.0], [0.0, 0.0]]), np.array([[3.0], [0.0]])
    assert_oracle(sdpa(q, k, v), np.array([[2.0]]))
    _, w = sdpa(q, k, v, return_scores=True)
    assert_oracle(w, np.array([[2 / 3, 1 / 3]]))


def test_permutation_equivariance(host_backend):
    x, order = draw(6, 8), np.random.default_rng(1).permutation(6)
    assert_oracle(sdpa(x[order], x[order], x[order]), sdpa(x, x, x)[order], terms=8)


def test_one_head_of_many_is_plain_attention(host_backend):
    x, w, b = draw(2, 5, 6), draw(18, 6), draw(18)
    q, k, v = (hl.linear(x, w[6 * i : 6 * i + 6], b[6 * i : 6 * i + 6]) for i in range(3))
    assert_oracle(hl.multi_head_attention(x, x, x, 1, w, b, np.eye(6), None), sdpa(q, k, v), terms=6)


def test_positional_encoding_formula():
    pe = hl.positional_encoding(7, 6, dtype=np.float64)
    for p in range(7):
        for i in range(3):
            assert pe[p, 2 * i] == pytest.approx(math.sin(p / 10000 ** (2 * i / 6)))
            assert pe[p, 2 * i + 1] == pytest.approx(math.cos(p / 10000 ** (2 * i / 6)))
    assert hl.positional_encoding(2, 512).shape == (2, 512)
    assert hl.positional_encoding(3, 5).shape == (3, 5)
    assert hl.positional_encoding(0, 4).shape == (0, 4)


def test_rotation_keeps_relative_positions(host_backend):
    """The product of a rotated query and a rotated key depends on the distance of their positions alone."""
    angles = np.arange(8)[:, None] * 100.0 ** (-np.arange(3) / 3)
    for interleaved in (False, True):
        q, k = (
            hl.rotary_embedding(np.tile(draw(6, seed=s), (8, 1)), np.cos(angles), np.sin(angles), interleaved=interleaved)
            for s in (0, 1)
        )
        products = q @ k.T
        assert_oracle(products[1:, 1:], products[:-1, :-1], terms=6)


def test_causal_mask_hides_the_future(host_backend):
    assert_same(hl.causal_mask(3, 2), np.array([[True, False], [True, True], [True, True]]), "causal_mask")
    q, k, v = draw(1, 2, 5, 4), draw(1, 2, 7, 4), draw(1, 2, 7, 3)
    y = sdpa(q, k, v, is_causal=True)
    assert_oracle(y, sdpa(q, k, v, hl.causal_mask(5, 7)), terms=8)
    k[..., 3, :], v[..., 3, :] = np.nan, np.inf
    assert_oracle(sdpa(q, k, v, is_causal=True)[..., :3, :], y[..., :3, :], terms=8, what="queries before a NaN key")
    assert np.isnan(sdpa(q, k, v, is_causal=True)[..., 3:, :]).all()


# --------------------------------------------------------------------------------------------------------------- masks

MASKS = {
    "full": (2, 3, 5, 7),
    "padding": (2, 1, 1, 7),
    "heads": (3, 5, 7),
    "square": (5, 7),
    "columns": (5, 1),
    "keys": (7,),
    "scalar": (),
    "batch": (2, 1, 5, 7),
}


@pytest.mark.parametrize("shape", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks(shape, kind, host_backend):
    q, k, v = draw(2, 3, 5, 4), draw(2, 3, 7, 4), draw(2, 3, 7, 6)
    rng = np.random.default_rng(0)
    mask = np.asarray(rng.random(shape) > 0.4) if kind == "bool" else np.asarray(rng.standard_normal(shape))
    s = q @ k.swapaxes(2, 3) / 2
    s = np.where(mask, s, -np.inf) if kind == "bool" else s + mask
    e = np.exp(s - np.maximum(s.max(3, keepdims=True), -1e30))
    w = e / np.maximum(e.sum(3, keepdims=True), 1e-300)
    y, weights = sdpa(q, k, v, mask, return_scores=True)
    assert_oracle(y, w @ v, terms=12)
    assert_oracle(weights, w, terms=12)


def test_a_masked_row_is_zero_and_leaks_nothing(host_backend):
    q, k, v = draw(1, 1, 4, 8), draw(1, 1, 6, 8), draw(1, 1, 6, 8)
    mask = np.ones((4, 6), bool)
    mask[1] = False
    mask[:, 2] = False
    clean = sdpa(q, k, v, mask)
    assert (clean[0, 0, 1] == 0).all()
    additive = np.where(mask, 0.0, -np.inf)
    assert_oracle(sdpa(q, k, v, additive), clean, terms=8)
    k2, v2, q2 = k.copy(), v.copy(), q.copy()
    k2[0, 0, 2], v2[0, 0, 2], q2[0, 0, 1] = np.nan, np.nan, np.inf
    for m in (mask, additive):
        assert_oracle(sdpa(q2, k2, v2, m), clean, terms=8)
        _, pull = hl.vjp(lambda q, k, v, m=m: sdpa(q, k, v, m), q, k, v)
        _, pull2 = hl.vjp(lambda q, k, v, m=m: sdpa(q, k, v, m), q2, k2, v2)
        g = draw(1, 1, 4, 8, seed=5)
        for a, b in zip(pull2(g), pull(g), strict=True):
            assert_oracle(a, b, terms=64)
        assert (pull2(g)[0][0, 0, 1] == 0).all()
        assert (pull2(g)[1][0, 0, 2] == 0).all()


def test_window(host_backend):
    q, k, v = draw(2, 9, 4), draw(2, 11, 4), draw(2, 11, 4)
    distance = np.arange(11) - np.arange(9)[:, None]
    for left, right in ((2, 1), (0, 0), (None, 3), (3, -1), (-1, None), (2**62, 2)):
        low, high = (10**6 if n in (None, -1) else n for n in (left, right))
        mask = (distance >= -low) & (distance <= high)
        assert_oracle(sdpa(q, k, v, window=(left, right)), sdpa(q, k, v, mask), terms=12)
        assert_oracle(sdpa(q, k, v, window=(left, right), is_causal=True), sdpa(q, k, v, mask & (distance <= 0)), terms=12)


def test_softcap(host_backend):
    q, k, v = 3 * draw(2, 5, 4), draw(2, 7, 4), draw(2, 7, 4)
    s = 2 * np.tanh(q @ k.swapaxes(1, 2) * 0.7 / 2)
    assert_oracle(sdpa(q, k, v, scale=0.7, softcap=2.0), hl.softmax(s) @ v, terms=12)


@pytest.mark.parametrize("size", [4, 70])
def test_heads_inside_rows(size, host_backend):
    """Heads of a projection, also backwards or repeated, give the bits of their copies; so do scores and gradients of them."""
    rng = np.random.default_rng(size)
    q, k, v = rng.standard_normal((2, size, 3, 4, 5)).astype(np.float32).transpose(2, 0, 3, 1, 4)
    repeated = np.broadcast_to(k[:1, :1], k[:, :2].shape)
    for views in ((q, k, v), (q[:, :, ::-1], k[:, ::-1], v), (q[:, :2], repeated, v[:, 1:3]), (q[0], k[0], v[0])):
        copies = [x.copy() for x in views]
        for options in ({}, {"is_causal": True, "return_scores": True}):
            actual, expected = (hl.scaled_dot_product_attention(*x, **options) for x in (views, copies))
            for a, e in zip(actual, expected, strict=True):
                assert_same_bits(a, e, "views")
        pulls = [hl.vjp(hl.scaled_dot_product_attention, *x)[1] for x in (views, copies)]
        for a, e in zip(*(pull(np.ones(copies[0].shape, np.float32)) for pull in pulls), strict=True):
            assert_same_bits(a, e, "gradient of views")


def test_grouped_heads(host_backend):
    q, k, v = draw(2, 6, 5, 4), draw(2, 2, 7, 4), draw(2, 2, 7, 3)
    full = sdpa(q, k.repeat(3, 1), v.repeat(3, 1), is_causal=True)
    assert_oracle(sdpa(q, k, v, is_causal=True, enable_gqa=True), full, terms=12)
    assert_oracle(sdpa(q, k[:, :1], v[:, :1]), sdpa(q, k[:, :1].repeat(6, 1), v[:, :1].repeat(6, 1)), terms=12)
    with pytest.raises(ValueError, match="heads"):
        sdpa(q, k.repeat(2, 1), v.repeat(2, 1), enable_gqa=True)


def test_empty(host_backend):
    assert_same(sdpa(draw(3, 4), draw(0, 4), draw(0, 2)), np.zeros((3, 2)), "no keys")
    assert sdpa(draw(0, 4), draw(5, 4), draw(5, 2)).shape == (0, 2)
    assert sdpa(draw(0, 2, 3, 4), draw(0, 2, 5, 4), draw(0, 2, 5, 4)).shape == (0, 2, 3, 4)
    assert_oracle(sdpa(np.zeros((3, 0)), np.zeros((5, 0)), draw(5, 2)), np.tile(draw(5, 2).mean(0), (3, 1)), terms=5)
    assert sdpa(draw(3, 4), draw(5, 4), np.zeros((5, 0))).shape == (3, 0)


def test_large_scores(host_backend):
    """Scores far beyond the range of exp: the largest takes all."""
    q, k, v = np.full((1, 1), 1e4), np.array([[1.0], [2.0], [-1.0]]), np.array([[1.0], [2.0], [3.0]])
    assert_same(sdpa(q, k, v, scale=1.0), np.array([[2.0]]), "the largest score")
    assert_same(sdpa(-q, k, v, scale=1.0), np.array([[3.0]]), "the largest score")
    y = sdpa(np.full((1, 1), np.nan), k, v)
    assert np.isnan(y).all()


# ------------------------------------------------------------------------------------------------------------- dropout


def test_dropout_of_weights():
    q, k, eye = draw(2, 40, 8), draw(2, 30, 8), np.broadcast_to(np.eye(30), (2, 30, 30))
    weights = sdpa(q, k, eye)
    results = []
    for backend in ("reference", "c", "numba"):
        if not _dispatch.adapter(backend).status():
            with hl.backend(backend):
                results.append(sdpa(q, k, eye, dropout_p=0.3, rng=5))
    for y in results:
        kept = y != 0
        assert_oracle(y, np.where(kept, weights / 0.7, 0), terms=30)
        assert abs(kept.mean() - 0.7) < 0.03
        assert_same(kept, results[0] != 0, "the choice of another backend")
    assert (sdpa(q, k, eye, dropout_p=1.0) == 0).all()
    assert_same_bits(sdpa(q, k, eye, dropout_p=0.3, rng=5), sdpa(q, k, eye, dropout_p=0.3, rng=5), "the same seed")
    assert (sdpa(q, k, eye, dropout_p=0.3, rng=6) != results[0]).any()


# ----------------------------------------------------------------------------------------------------------- gradients

OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"window": (2, 1)},
    "softcap": {"softcap": 1.5, "scale": 0.9},
    "dropout": {"dropout_p": 0.4, "rng": 3},
    "padding": {"attn_mask": np.array([True, True, False, True, True, False])},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradients(options, host_backend):
    q, k, v = draw(1, 2, 4, 3), draw(1, 2, 6, 3), draw(1, 2, 6, 2)
    assert hl.gradcheck(lambda q, k, v: sdpa(q, k, v, **options), q, k, v)


def test_gradients_of_groups(host_backend):
    q, k, v = draw(2, 4, 3, 2), draw(2, 2, 5, 2), draw(2, 2, 5, 3)
    assert hl.gradcheck(lambda q, k, v: sdpa(q, k, v, enable_gqa=True, is_causal=True), q, k, v)
    assert hl.gradcheck(lambda q, k, v: sdpa(q, k, v), q[0], k[:, :1], v[:, :1])


@pytest.mark.parametrize("shape", MASKS.values(), ids=MASKS)
def test_gradient_of_an_additive_mask(shape, host_backend):
    q, k, v = draw(2, 3, 5, 2), draw(2, 3, 7, 2), draw(2, 3, 7, 2)
    assert hl.gradcheck(lambda m: sdpa(q, k, v, m, softcap=2.0), np.asarray(draw(*shape)))


def test_gradients_of_many_heads(host_backend):
    x, y, w, b, wo, bo = draw(2, 3, 4), draw(2, 5, 4), draw(12, 4), draw(12), draw(4, 4), draw(4)
    assert hl.gradcheck(lambda x, w, b, wo, bo: hl.multi_head_attention(x, x, x, 2, w, b, wo, bo), x, w, b, wo, bo)
    assert hl.gradcheck(lambda x, y, w: hl.multi_head_attention(x, y, y, 2, w, None, wo, None), x, y, w)


def test_gradient_of_a_rotation(host_backend):
    cos, sin = np.cos(draw(3, 2)), np.sin(draw(3, 2))
    for interleaved in (False, True):
        assert hl.gradcheck(lambda x, i=interleaved: hl.rotary_embedding(x, cos, sin, interleaved=i), draw(2, 3, 4))


def test_half_precision(host_backend):
    q, k, v = (draw(1, 2, 4, 8, seed=i, dtype=np.float16) for i in range(3))
    y, pull = hl.vjp(lambda q, k, v: sdpa(q, k, v), q, k, v)
    assert y.dtype == np.float16
    assert all(g.dtype == np.float16 for g in pull(y))
    wide = sdpa(*(x.astype(np.float32) for x in (q, k, v)))
    assert_same(y, wide.astype(np.float16), "float16 computes in float32")


# ---------------------------------------------------------------------------------------------------------- bad inputs


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"attn_mask": np.ones((4, 5))}, ValueError),
        ({"attn_mask": np.ones((2, 1, 1, 4, 6))}, ValueError),
        ({"attn_mask": np.ones((4, 6), int)}, TypeError),
        ({"dropout_p": 1.5}, ValueError),
        ({"dropout_p": math.nan}, ValueError),
        ({"is_causal": 1}, TypeError),
        ({"scale": "1"}, TypeError),
        ({"softcap": -1.0}, ValueError),
        ({"window": 3}, ValueError),
        ({"window": (1, -2)}, ValueError),
        ({"window": (1.0, 2)}, TypeError),
        ({"dropout_p": 0.5, "rng": "x"}, TypeError),
        ({"return_scores": True, "out": np.empty((2, 4, 3))}, ValueError),
    ],
)
def test_bad_options(options, error):
    with pytest.raises(error, match="scaled_dot_product_attention"):
        sdpa(draw(2, 4, 3), draw(2, 6, 3), draw(2, 6, 3), **options)


@pytest.mark.parametrize(
    "shapes",
    [
        [(4,), (6, 3), (6, 3)],
        [(4, 3), (6, 2), (6, 3)],
        [(4, 3), (6, 3), (5, 3)],
        [(2, 4, 3), (3, 6, 3), (3, 6, 3)],
        [(2, 1, 4, 3), (3, 1, 6, 3), (3, 1, 6, 3)],
    ],
)
def test_bad_shapes(shapes):
    with pytest.raises(ValueError, match="scaled_dot_product_attention: query"):
        sdpa(*(np.zeros(s) for s in shapes))


def test_scores_have_no_gradient():
    with pytest.raises(TypeError, match="return_scores"):
        hl.vjp(lambda q: sdpa(q, q, q, return_scores=True)[0], draw(2, 3))


# ------------------------------------------------------------------------------------------------------------- oracles

ORACLE = [
    # lead of q, lead of k and v, L, S, D, E, options
    ((1, 12), (1, 12), 64, 64, 64, 64, {}),
    ((2, 3), (2, 3), 130, 70, 32, 16, {"is_causal": True}),
    ((2, 8), (2, 2), 33, 57, 24, 24, {"enable_gqa": True}),
    ((2, 4), (2, 4), 1, 300, 64, 64, {}),
    ((2, 1), (2, 3), 5, 300, 7, 65, {"scale": 0.3}),
    ((), (), 200, 200, 16, 16, {"is_causal": True}),
    ((3, 2, 2), (3, 2, 2), 17, 19, 128, 128, {}),
    ((2,), (2,), 10, 20, 256, 100, {}),
]


@pytest.mark.parametrize("case", ORACLE, ids=str)
@pytest.mark.parametrize("masked", ["", "bool", "float"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_torch(case, masked, dtype, host_backend):
    torch = pytest.importorskip("torch")
    lead_q, lead_k, L, S, D, E, options = case
    arrays = [draw(*lead_q, L, D, dtype=dtype), draw(*lead_k, S, D, seed=1, dtype=dtype), draw(*lead_k, S, E, seed=2, dtype=dtype)]
    options = dict(options)
    if masked and not options.get("is_causal"):
        rng = np.random.default_rng(0)
        mask = rng.random((L, S)) > 0.5 if masked == "bool" else rng.standard_normal((L, S)).astype(dtype)
        options["attn_mask"] = mask
    y, pull = hl.vjp(lambda q, k, v: sdpa(q, k, v, **options), *arrays)
    leaves = [torch.from_numpy(a.astype(np.float64)).requires_grad_() for a in arrays]
    if "attn_mask" in options:
        m = torch.from_numpy(options["attn_mask"])
        options["attn_mask"] = m if masked == "bool" else m.double()
    z = torch.nn.functional.scaled_dot_product_attention(*leaves, **options)
    assert_oracle(y, z.detach().numpy().astype(dtype), terms=D + S)
    g = draw(*z.shape, seed=3, dtype=dtype)
    z.backward(torch.from_numpy(g.astype(np.float64)))
    for leaf, mine in zip(leaves, pull(g), strict=True):
        assert_oracle(mine, leaf.grad.numpy().astype(dtype), terms=8 * (D + S + L))


def test_torch_module(host_backend):
    torch = pytest.importorskip("torch")
    module = torch.nn.MultiheadAttention(24, 4, batch_first=True).double()
    p = {n: w.detach().numpy() for n, w in module.named_parameters()}
    x, y = draw(2, 5, 24), draw(2, 7, 24)
    weights = (p["in_proj_weight"], p["in_proj_bias"], p["out_proj.weight"], p["out_proj.bias"])
    tx, ty = torch.from_numpy(x), torch.from_numpy(y)
    expected = module(tx, ty, ty)[0].detach().numpy()
    assert_oracle(hl.multi_head_attention(x, y, y, 4, *weights), expected, terms=24)
    expected = module(tx, tx, tx, attn_mask=~torch.from_numpy(hl.causal_mask(5)), is_causal=True)[0].detach().numpy()
    assert_oracle(hl.multi_head_attention(x, x, x, 4, *weights, is_causal=True), expected, terms=24)
    assert_oracle(hl.multi_head_attention(x[0], x[0], x[0], 4, *weights, is_causal=True), expected[0], terms=24)


def test_torch_samples():
    """Every sample that torch tests its own function with."""
    torch = pytest.importorskip("torch")
    infos = pytest.importorskip("torch.testing._internal.common_methods_invocations")
    [info] = [o for o in infos.op_db if o.name == "nn.functional.scaled_dot_product_attention"]
    for sample in info.sample_inputs("cpu", torch.float64):
        if sample.kwargs.get("dropout_p"):
            continue
        arrays = [sample.input.numpy(), *(a.numpy() for a in sample.args)]
        kwargs = {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in sample.kwargs.items()}
        expected = torch.nn.functional.scaled_dot_product_attention(sample.input, *sample.args, **sample.kwargs)
        assert_oracle(sdpa(*arrays, **kwargs), expected.numpy(), terms=16)


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_threads_do_not_change_bits(threads):
    q, k, v = (draw(2, 3, 150, 40, seed=i, dtype=np.float32) for i in range(3))

    def run():
        y, pull = hl.vjp(lambda q, k, v: sdpa(q, k, v, is_causal=True, dropout_p=0.1, rng=1), q, k, v)
        return y, *pull(q)

    with hl.num_threads(1):
        expected = run()
    with hl.num_threads(threads):
        for a, b in zip(run(), expected, strict=True):
            assert_same_bits(a, b, "other threads")


@pytest.mark.parametrize("op", [hl.softmax, hl.log_softmax])
def test_dtype_converts_first(op):
    x = np.arange(6).reshape(2, 3)
    np.testing.assert_array_equal(op(x, 1, dtype=np.float64), op(x.astype(np.float64), 1))
    assert op(x.astype(np.float32), dtype="float16").dtype == np.float16
    [g] = hl.vjp(lambda v: op(v, dtype=np.float64), x.astype(np.float32))[1](np.ones((2, 3)))
    assert g.dtype == np.float32
    with pytest.raises(TypeError, match="dtype"):
        op(x, dtype=np.int32)
