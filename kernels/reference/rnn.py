"""Recurrent layers over a sequence, one layer and direction a call.

In all of them `lengths[n]` (absent: T) says how many steps of sample n count. Steps past it leave the state as it is, give
y = 0 and have no gradient. With `reverse` each sample is walked from its last step that counts to its first. `previous`
is the hidden state before each step, `hn` the one after the last.
"""

import numpy as np

from ..spec import kernel


def _steps(T, lengths, reverse):
    """(t, which samples take this step) in the order of the walk; None: all of them."""
    for t in reversed(range(T)) if reverse else range(T):
        yield t, slice(None) if lengths is None else np.flatnonzero(t < lengths)


def _input(x, w_ih, b_ih):
    """The input's share of the arguments of the gates, for all steps."""
    a = x @ w_ih.T
    return a if b_ih is None else a + b_ih


def _clear(*arrays):
    """Zeros, for the steps past a sample's length."""
    for a in arrays:
        if a is not None:
            a[...] = 0


def _sigmoid(x):
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, e) / (1 + e)


def _limit(x, clip):
    return np.clip(x, -clip, clip) if clip > 0 else x


def _inside(gate, clip, function):
    """1 where the argument of the gate was within the clip, 0 where it was cut."""
    if clip <= 0:
        return 1.0
    edge = function(np.asarray([-clip, clip], gate.dtype))
    return ((gate > edge[0]) & (gate < edge[1])).astype(gate.dtype)


@kernel(
    "x[T,N,D], w_ih[4*H,D], b_ih[4*H]?, h0[N,H], c0[N,H], w_hh[4*H,H], b_hh[4*H]?, peephole[3,H]?, lengths[N]:i64?"
    " -> y[T,N,H], hn[N,H], cn[N,H], gates[T,N,4*H]?, cells[T,N,H]?, previous[T,N,H]?",
    error="recurrent:T",
    flops="8*T*N*H*(D+H)",
)
def lstm_sequence(
    x, w_ih, b_ih, h0, c0, w_hh, b_hh, peephole, lengths, y, hn, cn, gates, cells, previous, reverse: int, clip: float
):
    """Long short-term memory. `gates` holds i, f, g, o.

    i = s(a_i + p_i c), f = s(a_f + p_f c), g = tanh(a_g), c' = f c + i g, o = s(a_o + p_o c'), h' = o tanh(c'), with s the
    sigmoid and a = x W_ih^T + b_ih + h W_hh^T + b_hh; `peephole` holds p_i, p_o, p_f; clip > 0 limits the arguments of the gates to
    [-clip, clip]. A gate that is exactly 1 (0) keeps (drops) its factor exactly. What is past a sample's length holds 0 in
    gates, cells and previous.
    Source: Hochreiter and Schmidhuber (1997); Gers and Schmidhuber (2000) for the peepholes.
    """
    T, H = x.shape[0], h0.shape[1]
    h, c = h0.copy(), c0.copy()
    _clear(y, gates, cells, previous)
    with np.errstate(all="ignore"):
        a_x = _input(x, w_ih, b_ih)
        for t, n in _steps(T, lengths, reverse):
            a = a_x[t, n] + h[n] @ w_hh.T
            if b_hh is not None:
                a += b_hh
            a_i, a_f, a_g, a_o = (a[:, k * H : (k + 1) * H] for k in range(4))
            p_i, p_o, p_f = (0, 0, 0) if peephole is None else peephole
            before = c[n]
            i = _sigmoid(_limit(a_i + p_i * before if peephole is not None else a_i, clip))
            f = _sigmoid(_limit(a_f + p_f * before if peephole is not None else a_f, clip))
            g = np.tanh(_limit(a_g, clip))
            after = f * before + i * g
            o = _sigmoid(_limit(a_o + p_o * after if peephole is not None else a_o, clip))
            if gates is not None:
                gates[t, n] = np.concatenate([i, f, g, o], axis=1)
            if previous is not None:
                previous[t, n] = h[n]
            if cells is not None:
                cells[t, n] = after
            c[n], h[n] = after, o * np.tanh(after)
            y[t, n] = h[n]
    hn[...], cn[...] = h, c


@kernel(
    "gy[T,N,H]?, ghn[N,H]?, gcn[N,H]?, gates[T,N,4*H], cells[T,N,H], c0[N,H], w_hh[4*H,H], peephole[3,H]?, lengths[N]:i64?"
    " -> gpre[T,N,4*H], gh0[N,H], gc0[N,H]",
    error="recurrent:T",
    flops="8*T*N*H*H",
)
def lstm_sequence_backward(gy, ghn, gcn, gates, cells, c0, w_hh, peephole, lengths, gpre, gh0, gc0, reverse: int, clip: float):
    """Gradients of the arguments of the gates and of the first state, from those of y and of the last state.

    Source: backpropagation through time of the formulas above.
    """
    T, H = gates.shape[0], c0.shape[1]
    gh = np.zeros_like(c0) if ghn is None else ghn.copy()
    gc = np.zeros_like(c0) if gcn is None else gcn.copy()
    gpre[...] = 0
    with np.errstate(all="ignore"):
        for t, n in reversed(list(_steps(T, lengths, reverse))):
            earlier = _before(cells, c0, lengths, t, n, reverse)
            i, f, g, o = (gates[t, n, k * H : (k + 1) * H] for k in range(4))
            p_i, p_o, p_f = (0, 0, 0) if peephole is None else peephole
            tanh_c = np.tanh(cells[t, n])
            dh = gh[n] if gy is None else gh[n] + gy[t, n]
            d_o = dh * tanh_c * o * (1 - o) * _inside(o, clip, _sigmoid)
            dc = gc[n] + dh * o * (1 - tanh_c * tanh_c) + d_o * p_o
            d_i = dc * g * i * (1 - i) * _inside(i, clip, _sigmoid)
            d_f = dc * earlier * f * (1 - f) * _inside(f, clip, _sigmoid)
            d_g = dc * i * (1 - g * g) * _inside(g, clip, np.tanh)
            gpre[t, n] = np.concatenate([d_i, d_f, d_g, d_o], axis=1)
            gc[n] = dc * f + d_i * p_i + d_f * p_f
            gh[n] = gpre[t, n] @ w_hh
    gh0[...], gc0[...] = gh, gc


def _before(states, first, lengths, t, n, reverse):
    """The state before step t for the samples n."""
    T = states.shape[0]
    if not reverse:
        return states[t - 1, n] if t > 0 else first[n]
    last = np.full(first.shape[0], T) if lengths is None else lengths
    later = states[min(t + 1, T - 1)]
    return np.where((t + 1 < last)[:, None], later, first)[n]


@kernel(
    "gpre[T,N,4*H], cells[T,N,H], c0[N,H], lengths[N]:i64? -> gp[3,H]",
    error="reduce:T*N",
    flops="6*T*N*H",
)
def lstm_peephole_grad(gpre, cells, c0, lengths, gp, reverse: int):
    """The gradient of the peephole weights (i, o, f): the sum over steps of the gate's gradient times the cell it looks at."""
    T, H = gpre.shape[0], c0.shape[1]
    gp[...] = 0
    with np.errstate(all="ignore"):
        for t, n in _steps(T, lengths, reverse):
            earlier = _before(cells, c0, lengths, t, n, reverse)
            gp[0] += (gpre[t, n, :H] * earlier).sum(axis=0)
            gp[1] += (gpre[t, n, 3 * H :] * cells[t, n]).sum(axis=0)
            gp[2] += (gpre[t, n, H : 2 * H] * earlier).sum(axis=0)


@kernel(
    "x[T,N,D], w_ih[3*H,D], b_ih[3*H]?, h0[N,H], w_hh[3*H,H], b_hh[3*H]?, lengths[N]:i64?"
    " -> y[T,N,H], hn[N,H], gates[T,N,3*H]?, hidden[T,N,H]?, previous[T,N,H]?",
    error="recurrent:T",
    flops="6*T*N*H*(D+H)",
)
def gru_sequence(x, w_ih, b_ih, h0, w_hh, b_hh, lengths, y, hn, gates, hidden, previous, reverse: int, reset_after: int):
    """Gated recurrent unit. `gates` holds r, z, n.

    r = s(a_r + u_r), z = s(a_z + u_z), h' = (1 - z) n + z h with a = x W_ih^T + b_ih and u = h W_hh^T + b_hh. reset_after:
    n = tanh(a_n + r u_n) and `hidden` holds u_n; otherwise n = tanh(a_n + (r h) W_hn^T + b_hn) and `hidden` holds r h. What is
    past a sample's length holds 0 in gates, hidden and previous.
    Source: Cho et al. (2014), its version with the reset before the product; cuDNN's and torch's resets after it.
    """
    T, H = x.shape[0], h0.shape[1]
    h = h0.copy()
    b = np.zeros(3 * H, h0.dtype) if b_hh is None else b_hh
    _clear(y, gates, hidden, previous)
    with np.errstate(all="ignore"):
        a_x = _input(x, w_ih, b_ih)
        for t, n in _steps(T, lengths, reverse):
            a, before = a_x[t, n], h[n]
            u = before @ w_hh[: 2 * H].T + b[: 2 * H]
            r, z = _sigmoid(a[:, :H] + u[:, :H]), _sigmoid(a[:, H : 2 * H] + u[:, H:])
            kept = before @ w_hh[2 * H :].T + b[2 * H :] if reset_after else r * before
            new = np.tanh(a[:, 2 * H :] + (r * kept if reset_after else kept @ w_hh[2 * H :].T + b[2 * H :]))
            if gates is not None:
                gates[t, n] = np.concatenate([r, z, new], axis=1)
            if hidden is not None:
                hidden[t, n] = kept
            if previous is not None:
                previous[t, n] = before
            h[n] = (1 - z) * new + z * before
            y[t, n] = h[n]
    hn[...] = h


@kernel(
    "gy[T,N,H]?, ghn[N,H]?, gates[T,N,3*H], hidden[T,N,H], previous[T,N,H], w_hh[3*H,H], lengths[N]:i64?"
    " -> gpre[T,N,3*H], ghidden[T,N,3*H], gh0[N,H]",
    error="recurrent:T",
    flops="6*T*N*H*H",
)
def gru_sequence_backward(gy, ghn, gates, hidden, previous, w_hh, lengths, gpre, ghidden, gh0, reverse: int, reset_after: int):
    """Gradients of the gates' arguments on the input's side (gpre) and on the state's side (ghidden, those of u; with
    reset_after = 0 its last third belongs to (r h) W_hn^T), and of the first state.

    Source: backpropagation through time of the formulas above.
    """
    T, H = gates.shape[0], w_hh.shape[1]
    gh = np.zeros(gh0.shape, gh0.dtype) if ghn is None else ghn.copy()
    gpre[...], ghidden[...] = 0, 0
    with np.errstate(all="ignore"):
        for t, n in reversed(list(_steps(T, lengths, reverse))):
            r, z, new = (gates[t, n, k * H : (k + 1) * H] for k in range(3))
            dh = gh[n] if gy is None else gh[n] + gy[t, n]
            d_n = dh * (1 - z) * (1 - new * new)
            d_z = dh * (previous[t, n] - new) * z * (1 - z)
            if reset_after:
                d_r, d_u = d_n * hidden[t, n] * r * (1 - r), d_n * r
                back = np.concatenate([d_r, d_z, d_u], axis=1) @ w_hh
            else:
                d_kept, d_u = d_n @ w_hh[2 * H :], d_n
                d_r = d_kept * previous[t, n] * r * (1 - r)
                back = np.concatenate([d_r, d_z], axis=1) @ w_hh[: 2 * H] + d_kept * r
            gpre[t, n] = np.concatenate([d_r, d_z, d_n], axis=1)
            ghidden[t, n] = np.concatenate([d_r, d_z, d_u], axis=1)
            gh[n] = dh * z + back
    gh0[...] = gh


@kernel(
    "x[T,N,D], w_ih[H,D], b_ih[H]?, h0[N,H], w_hh[H,H], b_hh[H]?, lengths[N]:i64?"
    " -> y[T,N,H], hn[N,H], gates[T,N,H]?, previous[T,N,H]?",
    error="recurrent:T",
    flops="2*T*N*H*(D+H)",
)
def rnn_sequence(x, w_ih, b_ih, h0, w_hh, b_hh, lengths, y, hn, gates, previous, reverse: int, relu: int):
    """The plain recurrent layer: h' = tanh(a), or max(0, a) with `relu`, of a = x W_ih^T + b_ih + h W_hh^T + b_hh.

    `gates` holds h' as `y` does. What is past a sample's length holds 0 in gates and previous.
    Source: Elman (1990).
    """
    h = h0.copy()
    _clear(y, gates, previous)
    with np.errstate(all="ignore"):
        a_x = _input(x, w_ih, b_ih)
        for t, n in _steps(x.shape[0], lengths, reverse):
            a = a_x[t, n] + h[n] @ w_hh.T
            if b_hh is not None:
                a += b_hh
            if previous is not None:
                previous[t, n] = h[n]
            h[n] = np.maximum(a, 0) if relu else np.tanh(a)
            y[t, n] = h[n]
            if gates is not None:
                gates[t, n] = h[n]
    hn[...] = h


@kernel(
    "gy[T,N,H]?, ghn[N,H]?, gates[T,N,H], w_hh[H,H], lengths[N]:i64? -> gpre[T,N,H], gh0[N,H]",
    error="recurrent:T",
    flops="2*T*N*H*H",
)
def rnn_sequence_backward(gy, ghn, gates, w_hh, lengths, gpre, gh0, reverse: int, relu: int):
    """Gradients of a and of the first state. The derivative of ReLU at 0 is 0.

    Source: backpropagation through time of the formula above.
    """
    gh = np.zeros(gh0.shape, gh0.dtype) if ghn is None else ghn.copy()
    gpre[...] = 0
    with np.errstate(all="ignore"):
        for t, n in reversed(list(_steps(gates.shape[0], lengths, reverse))):
            h = gates[t, n]
            dh = gh[n] if gy is None else gh[n] + gy[t, n]
            gpre[t, n] = dh * (h > 0) if relu else dh * (1 - h * h)
            gh[n] = gpre[t, n] @ w_hh
    gh0[...] = gh
