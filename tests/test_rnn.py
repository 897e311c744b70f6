"""Recurrent layers: torch as oracle, gradients, gates that keep or drop, ONNX's formulas in NumPy, lengths, bad arguments."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from compare import assert_oracle, assert_same, assert_same_bits, assert_within
from conftest import host_backends, running, variants

import hotloops as hl
from hotloops import _dispatch, _memory
from hotloops.kernels import spec

GATES = {"lstm": 4, "gru": 3, "rnn": 1}
KINDS = tuple(GATES)


def normal(*shape, dtype=np.float64, seed=0, scale=1.0):
    return (scale * np.random.default_rng([seed, *shape]).standard_normal(shape)).astype(dtype)


def weights_of(kind, D, H, *, layers=1, directions=1, bias=True, dtype=np.float64, seed=0):
    """The flat list of weights of a layer."""
    made, G = [], GATES[kind]
    for k in range(layers * directions):
        shapes = [(G * H, D if k < directions else directions * H), (G * H, H)] + [(G * H,), (G * H,)] * bias
        made += [normal(*s, dtype=dtype, seed=seed + 10 * k + j, scale=0.4) for j, s in enumerate(shapes)]
    return made


def leaves(x):
    return [leaf for v in x for leaf in leaves(v)] if isinstance(x, list | tuple) else [x]


def like(result, make):
    """The structure of a result with make(array) in the place of every array."""
    return type(result)(like(v, make) for v in result) if isinstance(result, list | tuple) else make(result)


# ----------------------------------------------------------------------------------------------------- torch as oracle

LAYERS = [
    {},
    {"bias": False},
    {"layers": 2},
    {"layers": 3, "bidirectional": True, "batch_first": True},
    {"bidirectional": True, "bias": False},
    {"unbatched": True},
    {"unbatched": True, "bidirectional": True, "batch_first": True, "layers": 2},
    {"hx": False, "layers": 2},
    {"lengths": (4, 6, 1, 6, 3)},
    {"lengths": (2, 5, 6, 1, 4), "bidirectional": True, "layers": 2, "batch_first": True},
    {"nonlinearity": "relu", "bidirectional": True},
]
T, N, D, H = 6, 5, 3, 7


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", LAYERS, ids=lambda o: "-".join(o) or "plain")
def test_layers_against_torch(kind, options, dtype, host_backend):
    """Values and all gradients of nn.LSTM, nn.GRU and nn.RNN."""
    torch = pytest.importorskip("torch", reason="torch 2.13 is the oracle")
    layers, two, batch_first = options.get("layers", 1), options.get("bidirectional", False), options.get("batch_first", False)
    lengths, unbatched = options.get("lengths"), options.get("unbatched", False)
    special = {"nonlinearity": options["nonlinearity"]} if "nonlinearity" in options and kind == "rnn" else {}
    module = getattr(torch.nn, kind.upper())(
        D, H, layers, bias=options.get("bias", True), batch_first=batch_first, bidirectional=two, **special
    )
    directions = 2 if two else 1
    weights = weights_of(kind, D, H, layers=layers, directions=directions, bias=options.get("bias", True), dtype=dtype)
    parameters = list(module.to(getattr(torch, dtype)).parameters())
    with torch.no_grad():
        for parameter, array in zip(parameters, weights, strict=True):
            parameter.copy_(torch.from_numpy(array))
    x = normal(*((T, D) if unbatched else (N, T, D) if batch_first else (T, N, D)), dtype=dtype, seed=1)
    states = [
        normal(*((layers * directions, H) if unbatched else (layers * directions, N, H)), dtype=dtype, seed=s) for s in (2, 3)
    ]
    hx = None if options.get("hx") is False else tuple(states) if kind == "lstm" else states[0]
    tensors = {a: torch.from_numpy(v).requires_grad_() for a, v in zip("xhc", [x, *states], strict=True)}
    torch_hx = None if hx is None else (tensors["h"], tensors["c"]) if kind == "lstm" else tensors["h"]
    if lengths is None:
        expected = module(tensors["x"], torch_hx)
    else:
        rnn = torch.nn.utils.rnn
        packed = rnn.pack_padded_sequence(tensors["x"], torch.tensor(lengths), batch_first, enforce_sorted=False)
        y, h = module(packed, torch_hx)
        expected = rnn.pad_packed_sequence(y, batch_first, total_length=T)[0], h

    def call(x, hx, weights):
        more = {} if lengths is None else {"lengths": lengths}
        return getattr(hl, kind)(x, hx, weights, num_layers=layers, bidirectional=two, batch_first=batch_first, **special, **more)

    actual, pullback = hl.vjp(call, x, hx, weights) if hx is not None else hl.vjp(lambda x, w: call(x, None, w), x, weights)
    for a, e in zip(leaves(actual), leaves(expected), strict=True):
        assert_oracle(a, e.detach().numpy(), terms=T * (D + H), what=kind)
    assert_same(leaves(call(x, hx, weights))[0], leaves(actual)[0], "without a graph")
    seeds = iter([normal(*a.shape, dtype=dtype, seed=4 + i) for i, a in enumerate(leaves(actual))])
    dy = like(actual, lambda a: next(seeds))
    wrt = [tensors["x"], *([] if hx is None else leaves(torch_hx)), *parameters]
    truth = torch.autograd.grad(leaves(expected), wrt, [torch.from_numpy(g) for g in leaves(dy)])
    for i, (g, t) in enumerate(zip(leaves(pullback(dy)), truth, strict=True)):
        assert_oracle(g, t.numpy(), terms=T * N * (D + 4 * H), what=f"{kind}, gradient {i}")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("options", [{}, {"bias": False, "unbatched": True}, {"hx": False}], ids=lambda o: "-".join(o) or "plain")
@pytest.mark.parametrize("kind", KINDS)
def test_cells_against_torch(kind, options, dtype, host_backend):
    torch = pytest.importorskip("torch", reason="torch 2.13 is the oracle")
    shape = () if "unbatched" in options else (N,)
    special = {"nonlinearity": "relu"} if kind == "rnn" and "hx" in options else {}
    module = getattr(torch.nn, f"{kind.upper()}Cell")(D, H, bias=options.get("bias", True), **special).to(getattr(torch, dtype))
    weights = weights_of(kind, D, H, bias=options.get("bias", True), dtype=dtype)
    parameters = list(module.parameters())
    with torch.no_grad():
        for parameter, array in zip(parameters, weights, strict=True):
            parameter.copy_(torch.from_numpy(array))
    x, h, c = (normal(*shape, n, dtype=dtype, seed=s) for s, n in enumerate((D, H, H)))
    tensors = [torch.from_numpy(v).requires_grad_() for v in (x, h, c)]
    hx = None if options.get("hx") is False else (h, c) if kind == "lstm" else h
    torch_hx = None if hx is None else tuple(tensors[1:]) if kind == "lstm" else tensors[1]
    expected = module(tensors[0], torch_hx)

    def call(x, weights, *hx):
        return getattr(hl, f"{kind}_cell")(x, hx[0] if hx else None, *weights, **special)

    actual, pullback = hl.vjp(call, x, weights, *([] if hx is None else [hx]))
    for a, e in zip(leaves(actual), leaves(expected), strict=True):
        assert_oracle(a, e.detach().numpy(), terms=D + H, what=kind)
    dy = like(actual, lambda a: normal(*a.shape, dtype=dtype, seed=5))
    wrt = [tensors[0], *parameters, *([] if hx is None else leaves(torch_hx))]
    truth = torch.autograd.grad(leaves(expected), wrt, [torch.from_numpy(g) for g in leaves(dy)])
    for i, (g, t) in enumerate(zip(leaves(pullback(dy)), truth, strict=True)):
        assert_oracle(g, t.numpy(), terms=N * (D + 4 * H), what=f"{kind} cell, gradient {i}")


# ----------------------------------------------------------------------------------------- gradients against differences


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("lstm", {"peephole": True}),
        ("lstm", {"clip": 0.4}),
        ("lstm", {"peephole": True, "clip": 0.6}),
        ("gru", {"reset_after": False}),
    ],
    ids=["peephole", "clip", "peephole-clip", "reset-before"],
)
@pytest.mark.parametrize("lengths", [None, (2, 3, 0)], ids=["all", "lengths"])
def test_gradcheck(kind, options, lengths, bidirectional, host_backend):
    T, N, D, H = 3, 3, 2, 2
    directions = 2 if bidirectional else 1
    weights = weights_of(kind, D, H, directions=directions, seed=3)
    count = len(weights)
    states = [normal(directions, N, H, seed=s) for s in (1, 2)][: 2 if kind == "lstm" else 1]
    extra = [normal(directions, 3, H, seed=4)] if options.get("peephole") else []
    rest = {k: v for k, v in options.items() if k != "peephole"}

    def f(x, *more):
        hx = more[: len(states)]
        w = more[len(states) : len(states) + count]
        peephole = {"peephole": more[-1]} if extra else {}
        hx = tuple(hx) if kind == "lstm" else hx[0]
        return getattr(hl, kind)(x, hx, list(w), bidirectional=bidirectional, lengths=lengths, **rest, **peephole)

    assert hl.gradcheck(f, normal(T, N, D, seed=5), *states, *weights, *extra)


# ------------------------------------------------------------------------------------------------------- what gates do


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("variant", ["reference", *variants()])
@pytest.mark.parametrize("H", [3, 37])
def test_forget_gate_1_and_input_gate_0_keep_the_cell(variant, H, dtype):
    """c_t equals c_t-1 bit for bit: a gate at 200 is exactly 1, one at -200 adds nothing."""
    T, N = (9, 5) if H == 37 else (3, 2)
    if variant == "cuda" and H == 37:
        pytest.skip("too large for the simulator")
    record = spec.find("lstm_sequence")
    x, w_ih, b_ih = normal(T, N, 2, dtype=dtype), normal(4 * H, 2, dtype=dtype, seed=3), np.zeros(4 * H, dtype)
    b_ih[:H], b_ih[H : 2 * H] = -200, 200
    h0, c0, w_hh = normal(N, H, dtype=dtype, seed=1), normal(N, H, dtype=dtype, seed=2), normal(4 * H, H, dtype=dtype, scale=0.3)
    y, hn, cn, cells = (np.full(s, np.nan, dtype) for s in ((T, N, H), (N, H), (N, H), (T, N, H)))
    arrays = (x, w_ih, b_ih, h0, c0, w_hh, None, None, None, y, hn, cn, None, cells, None)
    with running(variant):
        adapter = _dispatch.adapter(variant.partition("-")[0])
        adapter.prepare(record, np.dtype(dtype))(arrays, {"T": T, "N": N, "D": 2, "H": H}, {"reverse": 0, "clip": 0.0})
    assert_same_bits(cn, c0, variant)
    for t in range(T):
        assert_same_bits(cells[t], c0, f"{variant}, step {t}")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("variant", [v for v in variants() if v != "cuda"])
@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
def test_what_is_kept_beyond_the_caches(kind, variant, dtype):
    """A sequence that keeps more than caches hold gives the bits of its two halves, which do not; for any number of threads."""
    G = {"lstm": 4, "gru": 3, "rnn": 1}[kind]
    N, D, H = 33, 5, 256
    T = (10 << 20) // (N * H * G * np.dtype(dtype).itemsize)
    record = spec.find(f"{kind}_sequence")
    scalars = {"reverse": 0, **{"lstm": {"clip": 0.0}, "gru": {"reset_after": 1}, "rnn": {"relu": 0}}[kind]}
    x, w_ih, w_hh = normal(T, N, D, dtype=dtype), normal(G * H, D, dtype=dtype, seed=1), normal(G * H, H, dtype=dtype, scale=0.05)

    def poisoned(*shape):
        array = _memory.empty(shape, np.dtype(dtype))  # aligned, as results are
        array.fill(np.nan)
        return array

    def walk(x, states):
        T = len(x)
        y, *ends = poisoned(T, N, H), *(poisoned(N, H) for _ in states)
        kept = [poisoned(T, N, G * H), *(poisoned(T, N, H) for _ in range(2 if G > 1 else 1))]
        arrays = (x, w_ih, None, *states, w_hh, None, *[None] * (2 if kind == "lstm" else 1), y, *ends, *kept)
        with running(variant):
            adapter = _dispatch.adapter(variant.partition("-")[0])
            adapter.prepare(record, np.dtype(dtype))(arrays, {"T": T, "N": N, "D": D, "H": H}, scalars)
        return ends, [y, *kept]

    begin = [normal(N, H, dtype=dtype, seed=i) for i in range(2 if kind == "lstm" else 1)]
    middle, first = walk(np.ascontiguousarray(x[: T // 2]), begin)
    end, second = walk(np.ascontiguousarray(x[T // 2 :]), middle)
    for threads in (1, 2, 3):
        with hl.num_threads(threads):
            ends, kept = walk(x, begin)
        for actual, expected in zip(ends, end, strict=True):
            assert_same_bits(actual, expected, f"{threads} threads")
        for actual, *halves in zip(kept, first, second, strict=True):
            assert_same_bits(actual, np.concatenate(halves), f"{threads} threads")


@pytest.mark.parametrize("N", [7, 8, 13, 16, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_bits_do_not_depend_on_threads(kind, N, host_backend):
    """Samples are shared out differently; also where some of them end early."""
    T, D, H, G = 24, 5, 70, {"lstm": 4, "gru": 3, "rnn": 1}[kind]
    x, weights = normal(T, N, D), [normal(G * H, D, seed=1), normal(G * H, H, seed=2, scale=0.1)]
    dy = normal(T, N, H, seed=3)
    for lengths in (None, np.maximum(T - 2 * np.arange(N), 1)):
        layer = functools.partial(getattr(hl, kind), lengths=lengths)
        found = []
        for threads in (1, 2, 3):
            with hl.num_threads(threads):
                y, pullback = hl.vjp(lambda x, *w, layer=layer: layer(x, None, list(w))[0], x, *weights)
                found.append([y, *pullback(dy)])
        for results in found[1:]:
            for actual, expected in zip(results, found[0], strict=True):
                assert_same_bits(actual, expected, f"{N} samples")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", KINDS)
def test_more_units_than_a_part_of_a_product(kind, dtype, host_backend):
    """Sums over more terms than a product takes at a time, with their gradients."""
    T, N, D, H = 2, 3, 520, 530
    x, weights = normal(T, N, D, dtype=dtype), [np.asarray(w * 0.1, dtype) for w in weights_of(kind, D, H)]

    def call(x, weights):
        return getattr(hl, kind)(x, None, weights)[0]

    y, pullback = hl.vjp(call, x, weights)
    with hl.backend("reference"):
        expected, truth = hl.vjp(call, x.astype(np.float64), [w.astype(np.float64) for w in weights])
        gradients = leaves(truth(np.ones_like(expected)))
    assert_oracle(y, expected.astype(dtype), terms=T * (D + H), what=kind)
    for i, (g, t) in enumerate(zip(leaves(pullback(np.ones_like(y))), gradients, strict=True)):
        assert_oracle(g, t.astype(dtype), terms=T * N * (D + 4 * H), what=f"{kind}, gradient {i}")


def test_gradient_highway(host_backend):
    """With f = 1 and i = 0 the gradient of the cell passes unchanged, too, over 200 steps."""
    H = 4
    weights = [np.zeros((4 * H, 2)), np.zeros((4 * H, H)), np.repeat([-800.0, 200, 0, 0], H), np.zeros(4 * H)]
    c0, gc = normal(1, 3, H), normal(1, 3, H, seed=1)
    (_, (_, cn)), pullback = hl.vjp(lambda c: hl.lstm(np.ones((200, 3, 2)), (np.zeros_like(c0), c), weights), c0)
    assert_same_bits(cn, c0, "cell")
    zero = np.zeros((200, 3, H)), np.zeros_like(c0)
    assert_same_bits(pullback((zero[0], (zero[1], gc)))[0], gc, "gradient")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("clip", [0.25, 1.0, 3.0, 100.0])
def test_cut_gates_have_no_gradient(clip, dtype, host_backend):
    """Where every gate's argument is beyond the clip the gradient of each is exactly 0, in vectors and their tails."""
    H = 37
    weights = [np.zeros((4 * H, D), dtype), np.zeros((4 * H, H), dtype), np.resize(np.array([-1e3, 1e3], dtype), 4 * H)]
    (y, _), pullback = hl.vjp(
        lambda b: hl.lstm(np.ones((T, N, D), dtype), None, [*weights[:2], b, np.zeros(4 * H, dtype)], clip=clip), weights[2]
    )
    states = np.ones((1, N, H), dtype)
    assert not pullback((np.ones_like(y), (states, states)))[0].any()


@pytest.mark.parametrize(("eigenvalue", "steps"), [(0.5, 30), (0.9, 50), (1.0, 50), (1.1, 50), (2.0, 30)])
def test_gradients_vanish_and_explode(eigenvalue, steps, host_backend):
    """A rotation times `eigenvalue` in every step: the gradient's norm is eigenvalue ** steps of what it was."""
    angle = 0.3
    w_hh = eigenvalue * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    h0, g = 1e-25 * normal(1, 1, 2), normal(1, 1, 2, seed=1)  # tanh is the identity here
    x, w_ih = np.zeros((steps, 1, 1)), np.ones((2, 1))
    _, pullback = hl.vjp(lambda h: hl.rnn(x, h, [w_ih, w_hh]), h0)
    gradient = pullback((np.zeros((steps, 1, 2)), g))[0]
    ratio = np.linalg.norm(gradient) / np.linalg.norm(g)
    assert_within(np.array(ratio), np.array(eigenvalue**steps), f"reduce:{steps**2}", {}, "norm of the gradient")
    assert (ratio < 1e-2) if eigenvalue < 1 else (ratio > 1e2) if eigenvalue > 1 else True


@pytest.mark.parametrize("kind", KINDS)
def test_shared_weights_sum_their_gradients(kind, host_backend):
    """The gradient of a layer's weights is the sum of those of a chain of cells that each have weights of their own."""
    weights, x = weights_of(kind, D, H), normal(T, N, D)
    states = [normal(N, H, seed=s) for s in (1, 2)][: 2 if kind == "lstm" else 1]
    cell = getattr(hl, f"{kind}_cell")

    def chain(*copies):
        state = tuple(states) if kind == "lstm" else states[0]
        for t in range(T):
            state = cell(x[t], state, *copies[t])
        return state

    def layer(w):
        hx = tuple(s[None] for s in states) if kind == "lstm" else states[0][None]
        last = getattr(hl, kind)(x, hx, w)[1]
        return (last[0][0], last[1][0]) if kind == "lstm" else last[0]

    y1, pull1 = hl.vjp(chain, *[weights] * T)
    y2, pull2 = hl.vjp(layer, weights)
    dy = like(y1, lambda a: normal(N, H, seed=7))
    for a, b in zip(leaves(y1), leaves(y2), strict=True):
        assert_oracle(a, b, terms=T * (D + H), what="state")
    per_step = pull1(dy)
    for i, shared in enumerate(pull2(dy)[0]):
        assert_oracle(sum(g[i] for g in per_step), shared, terms=T * N * H, what=f"weight {i}")


# --------------------------------------------------------------------------------------------------------- ONNX's gates


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def onnx_lstm(x, W, R, B, P, h, c):
    """ONNX's LSTM: W[4H, D], R[4H, H], B = Wb, Rb in the order i o f c, P = p_i, p_o, p_f."""
    H = h.shape[1]
    ys = []
    for step in x:
        a = step @ W.T + h @ R.T + B[: 4 * H] + B[4 * H :]
        i, o, f, g = (a[:, k * H : (k + 1) * H] for k in range(4))
        p_i, p_o, p_f = P[:H], P[H : 2 * H], P[2 * H :]
        i, f, g = sigmoid(i + p_i * c), sigmoid(f + p_f * c), np.tanh(g)
        c = f * c + i * g
        h = sigmoid(o + p_o * c) * np.tanh(c)
        ys.append(h)
    return np.stack(ys), h, c


def onnx_gru(x, W, R, B, h, linear_before_reset):
    """ONNX's GRU: the order is z r h."""
    (W_z, W_r, W_h), (R_z, R_r, R_h), b = np.split(W, 3), np.split(R, 3), np.split(B, 6)
    ys = []
    for step in x:
        z = sigmoid(step @ W_z.T + h @ R_z.T + b[0] + b[3])
        r = sigmoid(step @ W_r.T + h @ R_r.T + b[1] + b[4])
        if linear_before_reset:
            new = np.tanh(step @ W_h.T + r * (h @ R_h.T + b[5]) + b[2])
        else:
            new = np.tanh(step @ W_h.T + (r * h) @ R_h.T + b[5] + b[2])
        h = (1 - z) * new + z * h
        ys.append(h)
    return np.stack(ys), h


@pytest.mark.parametrize("peephole", [True, False])
def test_onnx_lstm(peephole, host_backend):
    W, R, B = normal(4 * H, D), normal(4 * H, H, scale=0.4), normal(8 * H)
    P = normal(3 * H, seed=1) if peephole else np.zeros(3 * H)
    x, h, c = normal(T, N, D, seed=2), normal(N, H, seed=3), normal(N, H, seed=4)
    weights = [hl.lstm_gates_from_onnx(a) for a in (W, R, B[: 4 * H], B[4 * H :])]
    y, (hn, cn) = hl.lstm(x, (h[None], c[None]), weights, peephole=P.reshape(3, H) if peephole else None)
    for a, e in zip((y, hn[0], cn[0]), onnx_lstm(x, W, R, B, P, h, c), strict=True):
        assert_oracle(a, e, terms=T * (D + H), what="ONNX's LSTM")


@pytest.mark.parametrize("linear_before_reset", [0, 1])
def test_onnx_gru(linear_before_reset, host_backend):
    W, R, B = normal(3 * H, D), normal(3 * H, H, scale=0.4), normal(6 * H)
    x, h = normal(T, N, D, seed=2), normal(N, H, seed=3)
    weights = [hl.gru_gates_from_onnx(a) for a in (W, R, B[: 3 * H], B[3 * H :])]
    y, hn = hl.gru(x, h[None], weights, reset_after=bool(linear_before_reset))
    for a, e in zip((y, hn[0]), onnx_gru(x, W, R, B, h, linear_before_reset), strict=True):
        assert_oracle(a, e, terms=T * (D + H), what="ONNX's GRU")


@pytest.mark.parametrize(("kind", "G"), [("lstm", 4), ("gru", 3)])
def test_converters_undo_each_other(kind, G):
    there, back = getattr(hl, f"{kind}_gates_to_onnx"), getattr(hl, f"{kind}_gates_from_onnx")
    for array in (normal(G * 5, 3, dtype=np.float32), np.arange(G * 2), normal(G * 4)[::-1]):
        assert_same_bits(back(there(array)), np.ascontiguousarray(array), kind)
        assert_same_bits(there(back(array)), np.ascontiguousarray(array), kind)
    assert not np.shares_memory(there(array), array)
    for bad in (np.zeros(G * 2 + 1), np.zeros((G, 2, 2)), np.zeros(())):
        with pytest.raises(ValueError, match=f"{kind}_gates"):
            there(bad)


# ------------------------------------------------------------------------------------------------------------- lengths


@pytest.mark.parametrize("reverse", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_lengths_are_separate_sequences(kind, reverse, host_backend):
    """A sample of length n gives what it gives alone over n steps; one of length 0 keeps its first state."""
    weights, x, lengths = weights_of(kind, D, H, directions=2), normal(T, N, D), [3, 0, T, 1, 5]
    states = [normal(2, N, H, seed=s) for s in (1, 2)][: 2 if kind == "lstm" else 1]

    def call(n, steps, **more):
        hx = tuple(s[:, n] for s in states) if kind == "lstm" else states[0][:, n]
        return leaves(getattr(hl, kind)(x[:steps, n], hx, weights, bidirectional=True, **more))

    together = call(slice(None), T, lengths=lengths)
    for n, length in enumerate(lengths):
        y, *last = call(slice(n, n + 1), length)
        assert_oracle(together[0][:length, n], y[:, 0], terms=T * (D + H), what=f"sample {n}")
        assert not together[0][length:, n].any()
        for a, b in zip(together[1:], last, strict=True):
            assert_oracle(a[:, n], b[:, 0], terms=T * (D + H), what=f"last state of sample {n}")
    for state, last in zip(states, together[1:], strict=True):
        assert_same_bits(last[:, 1], state[:, 1], "length 0")


@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_not_read(kind, host_backend):
    """NaN past a sample's length changes no result and no gradient."""
    weights, x, lengths = weights_of(kind, D, H), normal(T, N, D), [3, 0, T, 1, 5]
    dirty = x.copy()
    for n, length in enumerate(lengths):
        dirty[length:, n] = np.nan
    results = []
    for values in (x, dirty):
        y, pullback = hl.vjp(lambda x, kind=kind: getattr(hl, kind)(x, None, weights, lengths=lengths), values)
        results.append([*leaves(y), *pullback(like(y, np.ones_like))])
    for a, b in zip(*results, strict=True):
        assert_same(a, b, kind)


@pytest.mark.parametrize("backend", [name for name in host_backends() if name != "reference"])  # BLAS promises nothing
@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_does_not_depend_on_its_neighbours(kind, backend):
    """The same bits in any order of the samples."""
    N, H = 7, 37
    weights, x = weights_of(kind, D, H, dtype=np.float32), normal(T, N, D, dtype=np.float32)
    order = np.random.default_rng(0).permutation(N)

    def run(x):
        y, pullback = hl.vjp(lambda x: getattr(hl, kind)(x, None, weights), x)
        return y[0], pullback(like(y, np.ones_like))[0]

    with hl.backend(backend):
        for a, b in zip(run(x), run(x[:, order]), strict=True):
            assert_same_bits(a[:, order], b, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(0, 2, 3), (4, 0, 3), (4, 2, 0), (0, 3)], ids=str)
def test_empty(kind, shape, host_backend):
    weights = weights_of(kind, shape[-1], H)
    (y, h), pullback = hl.vjp(lambda x, w: getattr(hl, kind)(x, None, w), normal(*shape), weights)
    assert y.shape == (*shape[:-1], H)
    assert all(s.shape == (1, *shape[1:-1], H) for s in leaves(h))
    gx, gw = pullback((np.ones_like(y), like(h, np.ones_like)))
    assert gx.shape == shape
    assert [g.shape for g in gw] == [w.shape for w in weights]
    if 0 in shape[:-1]:
        assert not any(g.any() for g in gw)


@pytest.mark.parametrize("kind", KINDS)
def test_float16(kind, host_backend):
    """float16 in and out, float32 in between."""
    weights, x = weights_of(kind, D, H, dtype=np.float16), normal(T, N, D, dtype=np.float16)

    def run(dtype):
        w = [a.astype(dtype) for a in weights]
        y, pullback = hl.vjp(lambda x, w: getattr(hl, kind)(x, None, w), x.astype(dtype), w)
        return leaves(y) + leaves(pullback(like(y, np.ones_like)))

    for a, b in zip(run(np.float16), run(np.float32), strict=True):
        assert a.dtype == np.float16
        assert_within(a, b, "ulp:1", {}, kind)


# -------------------------------------------------------------------------------------------------------- bad arguments


def bad_calls(kind):
    """(what the text must name, arguments) of calls that are errors."""
    G = GATES[kind]
    x, w = np.zeros((T, N, D)), weights_of(kind, D, H)

    def state(*shape):
        return (np.zeros(shape), np.zeros(shape)) if kind == "lstm" else np.zeros(shape)

    for shape in ((H,), (N, H), (1, 1, N, H), (1, N, H + 1), (1, N + 1, H), (2, N, H), (0, N, H), ()):
        yield "h0", (x, state(*shape), w), {}
    yield "h0", (x[:, 0], state(1, 1, H), w), {}
    for i, shape in enumerate(((G * H, D), (G * H, H), (G * H,), (G * H,))):
        for other in ((shape[0] + 1, *shape[1:]), (*shape[:-1], shape[-1] - 1), (), (*shape, 1)):
            yield "weights", (x, None, [*w[:i], np.zeros(other), *w[i + 1 :]]), {}
        yield "weights", (x, None, [*w[:i], None, *w[i + 1 :]]), {}
    for some in ([], None, 3, "w", w[0], w[:1], w[:3], [*w, w[0]], w + w[:2]):
        yield "weights", (x, None, some), {}
    for layers in (0, -1, 2, 2**62, 1.0, True, "1"):
        yield "num_layers|weights", (x, None, w), {"num_layers": layers}
    yield "weights", (x, None, w), {"bidirectional": True}
    for bad in ({"bidirectional": 1}, {"batch_first": "no"}):
        yield next(iter(bad)), (x, None, w), bad
    for shape in ((D,), (), (1, T, N, D), (T, N, D + 1)):
        yield "input|weights", (np.zeros(shape), None, w), {}
    for lengths in ([T] * (N - 1), [T] * (N + 1), [[T] * N], [T + 1] * N, [-1] * N, [2.0] * N, [True] * N, T, [2**62] * N, "x"):
        yield "lengths", (x, None, w), {"lengths": lengths}
    yield "lengths", (x, None, w), {"lengths": np.array([2**64 - 1] * N, np.uint64)}
    if kind == "lstm":
        for hx in (np.zeros((1, N, H)), (np.zeros((1, N, H)),), (np.zeros((1, N, H)), None), 3, "hx"):
            yield "hx", (x, hx, w), {}
        for shape in ((3, H + 1), (4, H), (H,), (2, 3, H), (3 * H,)):
            yield "peephole", (x, None, w), {"peephole": np.zeros(shape)}
        for clip in (0, -1.0, float("nan"), "1", True):
            yield "clip", (x, None, w), {"clip": clip}
    if kind == "gru":
        yield "reset_after", (x, None, w), {"reset_after": 1}
    if kind == "rnn":
        for bad in ("sigmoid", None, 1, "TANH"):
            yield "nonlinearity", (x, None, w), {"nonlinearity": bad}


@pytest.mark.parametrize("kind", KINDS)
def test_bad_arguments(kind):
    for named, args, kwargs in bad_calls(kind):
        with pytest.raises((TypeError, ValueError), match=rf"^{kind}: .*({named})"):
            getattr(hl, kind)(*args, **kwargs)
    for bad in (np.int64, bool, complex):
        with pytest.raises(TypeError, match=kind):
            getattr(hl, kind)(np.zeros((T, N, D), bad), None, weights_of(kind, D, H))


@pytest.mark.parametrize("kind", KINDS)
def test_bad_arguments_of_cells(kind):
    cell, (w_ih, w_hh, b_ih, b_hh) = getattr(hl, f"{kind}_cell"), weights_of(kind, D, H)
    x, h = np.zeros((N, D)), np.zeros((N, H))
    hx = (h, h) if kind == "lstm" else h

    def state(*shape):
        return (np.zeros(shape), np.zeros(shape)) if kind == "lstm" else np.zeros(shape)

    bad = [(x, state(*s), w_ih, w_hh) for s in ((H,), (1, N, H), (N + 1, H), (N, H + 1), ())]
    bad += [(np.zeros(s), hx, w_ih, w_hh) for s in ((), (1, N, D), (N, D + 1), (D,))]
    bad += [(x, hx, w_ih, w_hh, b_ih), (x, hx, w_ih, w_hh, None, b_hh), (x, hx, None, w_hh), (x, hx, w_ih, None)]
    bad += [(x, hx, w_ih[1:], w_hh), (x, hx, w_ih, w_hh[:, 1:]), (x, hx, w_ih, w_hh, b_ih[1:], b_hh), (None, hx, w_ih, w_hh)]
    for args in bad:
        with pytest.raises((TypeError, ValueError), match=rf"^{kind}_cell: "):
            cell(*args)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_other_shapes_are_errors(kind, host_backend):
    """A gradient that belongs to another result is refused before anything reads it."""
    y, pullback = hl.vjp(lambda x: getattr(hl, kind)(x, None, weights_of(kind, D, H)), np.zeros((T, N, D)))
    good = like(y, np.ones_like)
    for bad in (like(y, lambda a: np.ones((*a.shape[:-1], H + 1))), like(y, lambda a: np.ones(a.shape[1:])), good[::-1], good[0]):
        with pytest.raises((TypeError, ValueError)):
            pullback(bad)
