"""Prepacked weights: the bits of plain ones, made once, forgotten with the weights."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import pickle
import threading

import numpy as np
import pytest
from compare import assert_same_bits
from conftest import running, variants

import hotloops as hl
from hotloops import _dispatch

needs_c = pytest.mark.skipif(bool(_dispatch.adapter("c").status()), reason="no C kernels here")

# op, shapes of the inputs that one weight serves, shape of the weight, options
CALLS = {
    "winograd": (hl.conv2d, [(1, 32, 12, 12), (8, 32, 12, 12), (3, 32, 9, 17)], (40, 32, 3, 3), {"padding": 1}),
    "winograd stride": (hl.conv2d, [(2, 40, 39, 40), (4, 40, 37, 31)], (48, 40, 3, 3), {"stride": 2, "padding": 1}),
    "winograd 5x5": (hl.conv2d, [(2, 32, 14, 14), (1, 32, 30, 30)], (32, 32, 5, 5), {"padding": 2}),
    "winograd line": (hl.conv1d, [(2, 32, 60), (1, 32, 301)], (40, 32, 3), {"padding": 1}),
    "winograd volume": (hl.conv3d, [(2, 32, 4, 12, 12), (1, 32, 6, 9, 17)], (40, 32, 3, 3, 3), {"padding": 1}),
    "winograd dilation": (hl.conv2d, [(2, 64, 24, 24), (1, 64, 31, 27)], (80, 64, 3, 3), {"padding": 2, "dilation": 2}),
    "implicit": (hl.conv2d, [(2, 5, 9, 9), (1, 5, 30, 31)], (33, 5, 3, 3), {"stride": 2, "padding": 1}),
    "pointwise": (hl.conv2d, [(2, 600, 7, 7), (1, 600, 3, 1)], (24, 600, 1, 1), {}),
    "groups": (hl.conv2d, [(2, 12, 9, 9)], (60, 4, 3, 3), {"groups": 3}),
    "few filters": (hl.conv2d, [(2, 3, 9, 9), (1, 3, 40, 40)], (4, 3, 3, 3), {}),
    "depthwise": (hl.conv2d, [(2, 20, 17, 17), (1, 20, 5, 40)], (20, 1, 3, 3), {"groups": 20, "padding": 1}),
    "depthwise, short rows": (hl.conv2d, [(2, 20, 7, 7), (1, 20, 5, 3)], (20, 1, 3, 3), {"groups": 20, "padding": 1}),
    "conv1d": (hl.conv1d, [(2, 20, 50)], (30, 20, 3), {}),
    "conv3d": (hl.conv3d, [(1, 3, 5, 6, 7)], (20, 3, 2, 3, 2), {}),
    "transposed": (hl.conv_transpose2d, [(2, 20, 9, 9), (1, 20, 3, 3)], (20, 24, 3, 3), {"stride": 2, "padding": 1}),
    "transposed winograd stride": (hl.conv_transpose2d, [(4, 32, 15, 16)], (32, 40, 4, 4), {"stride": 2, "padding": 1}),
    "transposed winograd": (hl.conv_transpose2d, [(4, 32, 12, 12)], (32, 32, 3, 3), {"padding": 1}),
    "linear": (hl.linear, [(3, 600), (7, 600), (200, 600), (2, 2, 600)], (70, 600), {}),
    "linear, one output": (hl.linear, [(7, 600)], (600,), {}),
    "matmul": (hl.matmul, [(3, 600), (9, 600), (2, 9, 600)], (600, 70), {}),
}


def draw(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("variant", ["reference", *variants()])
@pytest.mark.parametrize("name", CALLS)
def test_the_bits_of_plain_weights(name, variant, dtype):
    op, inputs, shape, options = CALLS[name]
    if variant == "cuda":
        pytest.skip("weights in GPU memory are not packed")
    weight = draw(*shape, seed=1, dtype=dtype)
    packed = hl.prepack(op, weight)
    with running(variant):
        for _ in range(2):  # what the first pass keeps the second one finds
            for at in inputs:
                x = draw(*at, dtype=dtype)
                assert_same_bits(op(x, packed, **options), op(x, weight, **options), f"{name}, input {at}")


@needs_c
@pytest.mark.parametrize(("kind", "gates"), [("lstm", 4), ("gru", 3), ("rnn", 1)])
def test_recurrent_layers_pack_once(kind, gates):
    D, H = 9, 37
    weights = [draw(gates * H, D), draw(gates * H, H), draw(gates * H), draw(gates * H, seed=1)]
    op, packed = getattr(hl, kind), hl.prepack(getattr(hl, kind), weights)
    options = [{}, {"reset_after": False}] if kind == "gru" else [{}]
    kept = []
    with hl.backend("c"):
        for _ in range(2):
            for chosen in options:
                for x in (draw(1, 1, D), draw(5, 3, D), draw(40, 1, D)):
                    assert_same_bits(op(x, None, packed, **chosen)[0], op(x, None, weights, **chosen)[0], f"{kind}, {chosen}")
            kept.append([w.packed_bytes for w in packed[:2]])
    assert kept[0] == kept[1]
    assert kept[0][0] >= 4 * gates * H * D
    assert kept[0][1] >= 4 * gates * H * H * len(options)


@needs_c
@pytest.mark.parametrize("name", CALLS)
def test_it_is_packed_once(name):
    op, inputs, shape, options = CALLS[name]
    packed = hl.prepack(op, draw(*shape))
    with hl.backend("c"):
        assert packed.packed_bytes == 0
        for at in inputs:
            op(draw(*at), packed, **options)
        first = packed.packed_bytes
        for at in inputs:
            op(draw(*at), packed, **options)
    assert packed.packed_bytes == first
    if name == "depthwise":
        assert first == 0  # weights are read as they are
    else:
        assert first >= packed.nbytes or name == "linear, one output"  # a vector is read as it is


def recurrent(kind, dtype=np.float32, layers=2):
    gates, I, H = {"lstm": 4, "gru": 3, "rnn": 1}[kind], 5, 20
    weights = []
    for layer in range(layers):
        for direction in range(2):
            shapes = (gates * H, 2 * H if layer else I), (gates * H, H), (gates * H,), (gates * H,)
            weights += [draw(*s, seed=layer * 2 + direction, dtype=dtype) / 4 for s in shapes]
    return weights


@pytest.mark.parametrize("variant", ["reference", *variants()])
@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
def test_recurrent_layers(kind, variant):
    if variant == "cuda":
        pytest.skip("weights in GPU memory are not packed")
    op, weights = getattr(hl, kind), recurrent(kind)
    packed = hl.prepack(op, weights)
    assert [isinstance(w, hl.PackedWeight) for w in packed] == [w.ndim == 2 for w in weights]
    with running(variant):
        for _ in range(2):
            for T, N in ((7, 3), (1, 1), (2, 1), (3, 40)):
                x = draw(T, N, 5)
                for a, b in zip(
                    leaves(op(x, None, packed, bidirectional=True)), leaves(op(x, None, weights, bidirectional=True)), strict=True
                ):
                    assert_same_bits(a, b, f"{kind}, T {T}, N {N}")


def leaves(result):
    return [result] if isinstance(result, np.ndarray) else [leaf for part in result for leaf in leaves(part)]


@needs_c
@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
def test_recurrent_weights_are_packed_once(kind):
    op, cell = getattr(hl, kind), getattr(hl, f"{kind}_cell")
    with hl.backend("c"):
        packed = hl.prepack(op, recurrent(kind), (7, 3, 5), bidirectional=True)
        first = [w.packed_bytes for w in packed if w.ndim == 2]
        op(draw(9, 2, 5), None, packed, bidirectional=True)
        assert [w.packed_bytes for w in packed if w.ndim == 2] == first
        assert min(first) > 0
        one = hl.prepack(cell, recurrent(kind, layers=1)[:4], (3, 5))
        assert one[0].packed_bytes > 0
        for a, b in zip(leaves(cell(draw(3, 5), None, *one)), leaves(cell(draw(3, 5), None, *map(np.array, one))), strict=True):
            assert_same_bits(a, b, f"{kind}_cell")


@needs_c
def test_one_call_ahead_packs():
    with hl.backend("c"):
        packed = hl.prepack(hl.conv2d, draw(40, 32, 3, 3), (8, 32, 12, 12), padding=1)
        ready = packed.packed_bytes
        hl.conv2d(draw(8, 32, 12, 12), packed, padding=1)
    assert 0 < ready == packed.packed_bytes


@needs_c
def test_forms_go_with_the_weights():
    ffi, lib, _, _ = _dispatch.adapter("c")._load()
    packed = hl.prepack(hl.linear, draw(70, 300), (9, 300))
    view = np.asarray(packed)[:10]
    address = ffi.cast("void *", packed.ctypes.data)
    kept = lib.hl_prepacked_bytes(address)
    assert kept == packed.packed_bytes > 0
    del packed
    gc.collect()
    assert lib.hl_prepacked_bytes(address) == kept, "a view may still be read"
    assert_same_bits(hl.linear(draw(9, 300), view), hl.linear(draw(9, 300), view.copy()), "part of a packed weight")
    del view
    gc.collect()
    assert lib.hl_prepacked_bytes(address) == 0


def test_it_is_a_copy_that_cannot_be_written():
    weight = draw(6, 5)
    packed = hl.prepack(hl.linear, weight)
    before = packed.tolist()
    weight[:] = 0
    assert packed.tolist() == before
    with pytest.raises(ValueError, match="read-only"):
        packed[0, 0] = 1
    with pytest.raises(ValueError, match="read-only"):
        packed += 1


def test_what_is_made_of_it_is_plain():
    packed = hl.prepack(hl.linear, draw(6, 5))
    assert isinstance(packed, hl.PackedWeight)
    for made in (packed * 2, packed[1:], packed[0], packed.sum(), hl.linear(packed, packed), np.concatenate([packed, packed])):
        assert not isinstance(made, hl.PackedWeight)
    assert hl.prepack(hl.linear, packed) is packed


@pytest.mark.parametrize("again", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))], ids=["deepcopy", "pickle"])
def test_copies_are_packed_too(again):
    packed = hl.prepack(hl.linear, draw(6, 5))
    other = again(packed)
    assert isinstance(other, hl.PackedWeight)
    assert not np.may_share_memory(packed, other)
    assert_same_bits(other, packed, "a copy")


@pytest.mark.parametrize(
    "weight",
    [draw(12, 10).T, draw(10, 24)[:, ::2], draw(10, 12)[::-1], draw(10, 12).astype(">f4"), draw(10, 12, dtype=np.float64)],
    ids=["transposed", "strided", "reversed", "byte-swapped", "float64"],
)
def test_any_layout(weight):
    packed = hl.prepack(hl.linear, weight)
    x = draw(9, 12)
    assert_same_bits(hl.linear(x, packed), hl.linear(x, weight), "another layout")
    assert packed.dtype == weight.dtype.newbyteorder("=")


def test_gradients_see_the_same_weights():
    x, weight = draw(2, 20, 9, 9), draw(20, 20, 3, 3)
    packed = hl.prepack(hl.conv2d, weight)
    y, pullback = hl.vjp(lambda x: hl.conv2d(x, packed, padding=1), x)
    expected, plain = hl.vjp(lambda x: hl.conv2d(x, weight, padding=1), x)
    assert_same_bits(y, expected, "result")
    assert_same_bits(pullback(y)[0], plain(y)[0], "gradient of the input")
    for a, b in zip(hl.conv2d_backward(y, x, packed, 1, 1), hl.conv2d_backward(y, x, weight, 1, 1), strict=True):
        assert_same_bits(a, b, "conv2d_backward")


def test_many_threads_make_it_at_once():
    x, weight = draw(9, 300), draw(700, 300)
    expected = hl.linear(x, weight)
    for _ in range(20):
        packed, results = hl.prepack(hl.linear, weight), []
        barrier = threading.Barrier(4)

        def work(packed=packed, results=results, barrier=barrier):
            barrier.wait()
            results.append(hl.linear(x, packed))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert len(results) == 4
        for y in results:
            assert_same_bits(y, expected, "packed by several threads at once")


def _in_child(x, packed, queue):
    queue.put(hl.linear(x, packed))


def test_after_fork():
    x, packed = draw(9, 300), hl.prepack(hl.linear, draw(70, 300), (9, 300))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(x, packed, queue))
    child.start()
    got = queue.get(timeout=60)
    child.join()
    assert_same_bits(got, hl.linear(x, packed), "in a child")


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((hl.softmax, draw(3, 3)), {}, TypeError, "op must be one of.*conv2d"),
        ((len, draw(3, 3)), {}, TypeError, "op must be one of"),
        (("conv2d", draw(3, 3)), {}, TypeError, "op must be one of"),
        ((hl.conv2d, draw(3, 3)), {}, ValueError, r"shape \(3, 3\), 4 axes are needed for conv2d"),
        ((hl.conv2d, np.ones((3, 3, 3, 3), int)), {}, TypeError, "element type int64"),
        ((hl.conv2d, None), {}, TypeError, "weight must be an array"),
        ((hl.conv2d, draw(3, 3, 3, 3)), {"strides": 2}, TypeError, "no option 'strides'"),
        ((hl.conv2d, draw(3, 3, 3, 3)), {"stride": 2}, TypeError, "without input_shape"),
        ((hl.conv2d, draw(3, 3, 3, 3), (1, 4, 9, 9)), {}, ValueError, "channels"),
        ((hl.conv2d, draw(3, 3, 3, 3), (1, 3, 9, -9)), {}, ValueError, "input_shape"),
        ((hl.lstm, draw(8, 2)), {}, TypeError, "list of weights that lstm takes"),
        ((hl.lstm, [draw(8, 2), None]), {}, TypeError, r"weight\[1\]"),
    ],
)
def test_nonsense(arguments, options, error, words):
    with pytest.raises(error, match=words):
        hl.prepack(*arguments, **options)
