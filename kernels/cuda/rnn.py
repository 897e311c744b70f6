"""Recurrent layers over a sequence: one block a sample walks all steps in one launch.

A step has two halves with a barrier between them: dot products of the state with the weights (threads over outputs, the
state in a tile of shared memory, weights transposed so that neighbouring threads read neighbouring values), then the gates
(threads over hidden units). The running state lives in the result that holds it at the end; a tile of it is loaded at a
time, so that any hidden size works. Every sum is one thread's, in order: no atomics, the same bits every time.
"""

import math

from ..compile import block, cuda, gpu, inline, real
from .linear import linear

THREADS = block(512)  # sixteen warps hide the latency of the weights' loads from L2
TILE = 1024  # values of the state in shared memory


@inline
def _sigmoid(x):
    e = math.exp(-abs(x))
    return (real(1) if x >= real(0) else e) / (real(1) + e)


@inline
def _limit(x, clip):
    return -clip if x < -clip else clip if x > clip else x


# 0 where the gate's argument was cut.
@inline
def _inside(gate, clip, low, high):
    return real(1) if clip <= real(0) or (low < gate and gate < high) else real(0)


# y[first + j] += (bias[j] +) x . w[:, j] for j in [0, J), x of K values from shared memory, tile by tile. All threads of a
# block come here together; x and y are not the same array.
@inline
def _add_products(tile, y, first, x, begin, K, w, w_first, J, bias, bias_first):
    t = cuda.threadIdx.x
    for k0 in range(0, K, TILE):
        size = min(TILE, K - k0)
        for k in range(t, size, THREADS):
            tile[k] = x[begin + k0 + k]
        cuda.syncthreads()
        for j in range(t, J, THREADS):
            total = real(0)
            for k in range(size):
                total += tile[k] * w[k0 + k, w_first + j]
            if k0 == 0 and bias.size:
                total += bias[bias_first + j]
            y[first + j] += total
        cuda.syncthreads()


# Parallel over the elements of the result; neighbouring threads write neighbouring ones.
@gpu("real[:,:], real[:,:]")
def _transpose(w, wt):
    J, K = w.shape
    index = cuda.grid(1)
    if index < J * K:
        wt[index // J, index % J] = w[index % J, index // J]


def _transposed(w):
    wt = cuda.device_array((w.shape[1], w.shape[0]), w.dtype)
    if w.size:
        _transpose[-(-w.size // THREADS), THREADS](w, wt)
    return wt


# Parallel over samples, one block each. Reads the weights T*N times (from L2), gates once; writes each output once.
@gpu(
    "real[:,:,:], real[:,:], real[:,:], real[:,:], real[:], real[:,:], i64[:], real[:,:,:], real[:,:], real[:,:], real[:,:,:],"
    " real[:,:,:], i32, real"
)
def _lstm(gates, h0, c0, wt, b_hh, peephole, lengths, y, hn, cn, cells, previous, reverse, clip):
    tile = cuda.shared.array(TILE, real)
    thread, n = cuda.threadIdx.x, cuda.blockIdx.x
    T, H = gates.shape[0], h0.shape[1]
    length = lengths[n] if lengths.size else T
    h, c = hn[n], cn[n]
    for u in range(thread, H, THREADS):
        h[u], c[u] = h0[n, u], c0[n, u]
    cuda.syncthreads()
    for step in range(T):
        t = T - 1 - step if reverse else step
        if t < length:
            _add_products(tile, gates[t, n], 0, h, 0, H, wt, 0, 4 * H, b_hh, 0)
        for u in range(thread, H, THREADS):
            i, f, g, o, before = real(0), real(0), real(0), real(0), real(0)
            if t < length:
                i, f, g, o = gates[t, n, u], gates[t, n, H + u], gates[t, n, 2 * H + u], gates[t, n, 3 * H + u]
                before = h[u]
                if peephole.size:
                    i += peephole[0, u] * c[u]
                    f += peephole[2, u] * c[u]
                if clip > real(0):
                    i, f, g = _limit(i, clip), _limit(f, clip), _limit(g, clip)
                i, f, g = _sigmoid(i), _sigmoid(f), math.tanh(g)
                c[u] = f * c[u] + i * g
                if peephole.size:
                    o += peephole[1, u] * c[u]
                if clip > real(0):
                    o = _limit(o, clip)
                o = _sigmoid(o)
                h[u] = o * math.tanh(c[u])
            gates[t, n, u], gates[t, n, H + u], gates[t, n, 2 * H + u], gates[t, n, 3 * H + u] = i, f, g, o
            y[t, n, u] = h[u] if t < length else real(0)
            if cells.size:
                cells[t, n, u] = c[u] if t < length else real(0)
            if previous.size:
                previous[t, n, u] = before
        cuda.syncthreads()


# The input's share of the arguments of the gates, for all steps: in `gates`, or in memory of its own where they are not kept.
def _inputs(x, w_ih, b_ih, gates):
    T, N, D = x.shape
    if not gates.size:
        gates = cuda.device_array((T, N, w_ih.shape[0]), x.dtype)
    if gates.size:
        linear(x.reshape((T * N, D)), w_ih, b_ih, gates.reshape((T * N, w_ih.shape[0])), 0)
    return gates


def lstm_sequence(x, w_ih, b_ih, h0, c0, w_hh, b_hh, peephole, lengths, y, hn, cn, gates, cells, previous, reverse, clip):
    if h0.shape[0]:
        gates = _inputs(x, w_ih, b_ih, gates)
        _lstm[h0.shape[0], THREADS](
            gates, h0, c0, _transposed(w_hh), b_hh, peephole, lengths, y, hn, cn, cells, previous, reverse, clip
        )


# The state of sample n before step t.
@inline
def _before(states, first, t, n, u, reverse, length):
    if reverse:
        return states[t + 1, n, u] if t + 1 < length else first[n, u]
    return states[t - 1, n, u] if t > 0 else first[n, u]


# Parallel over samples, one block each; w_hh as it is lies right for the way back. Reads it T*N times (from L2).
@gpu(
    "real[:,:,:], real[:,:], real[:,:], real[:,:,:], real[:,:,:], real[:,:], real[:,:], real[:,:], i64[:], real[:,:,:],"
    " real[:,:], real[:,:], real[:], i32, real"
)
def _lstm_backward(gy, ghn, gcn, gates, cells, c0, w_hh, peephole, lengths, gpre, gh0, gc0, none, reverse, clip):
    tile = cuda.shared.array(TILE, real)
    thread, n = cuda.threadIdx.x, cuda.blockIdx.x
    T, H = gates.shape[0], c0.shape[1]
    length = lengths[n] if lengths.size else T
    low, high, tanh_low, tanh_high = _sigmoid(-clip), _sigmoid(clip), math.tanh(-clip), math.tanh(clip)
    gh, gc = gh0[n], gc0[n]
    for u in range(thread, H, THREADS):
        gh[u] = ghn[n, u] if ghn.size else real(0)
        gc[u] = gcn[n, u] if gcn.size else real(0)
    cuda.syncthreads()
    for step in range(T):
        t = step if reverse else T - 1 - step
        d = gpre[t, n]
        for u in range(thread, H, THREADS):
            d_i, d_f, d_g, d_o = real(0), real(0), real(0), real(0)
            if t < length:
                i, f, g, o = gates[t, n, u], gates[t, n, H + u], gates[t, n, 2 * H + u], gates[t, n, 3 * H + u]
                tanh_c = math.tanh(cells[t, n, u])
                dh = gh[u] + gy[t, n, u] if gy.size else gh[u]
                d_o = dh * tanh_c * o * (real(1) - o) * _inside(o, clip, low, high)
                dc = gc[u] + dh * o * (real(1) - tanh_c * tanh_c)
                if peephole.size:
                    dc += d_o * peephole[1, u]
                earlier = _before(cells, c0, t, n, u, reverse, length)
                d_i = dc * g * i * (real(1) - i) * _inside(i, clip, low, high)
                d_f = dc * earlier * f * (real(1) - f) * _inside(f, clip, low, high)
                d_g = dc * i * (real(1) - g * g) * _inside(g, clip, tanh_low, tanh_high)
                dc *= f
                if peephole.size:
                    dc += d_i * peephole[0, u] + d_f * peephole[2, u]
                gc[u] = dc
                gh[u] = real(0)
            d[u], d[H + u], d[2 * H + u], d[3 * H + u] = d_i, d_f, d_g, d_o
        cuda.syncthreads()
        if t < length:
            _add_products(tile, gh, 0, d, 0, 4 * H, w_hh, 0, H, none, 0)


def lstm_sequence_backward(gy, ghn, gcn, gates, cells, c0, w_hh, peephole, lengths, gpre, gh0, gc0, reverse, clip):
    if c0.shape[0]:
        none = cuda.device_array(0, c0.dtype)
        _lstm_backward[c0.shape[0], THREADS](
            gy, ghn, gcn, gates, cells, c0, w_hh, peephole, lengths, gpre, gh0, gc0, none, reverse, clip
        )


# Parallel over hidden units, one thread each, which walks steps and samples in order. Reads are coalesced.
@gpu("real[:,:,:], real[:,:,:], real[:,:], i64[:], real[:,:], i32")
def _peephole_grad(gpre, cells, c0, lengths, gp, reverse):
    T, N, H = cells.shape
    u = cuda.grid(1)
    if u < H:
        g_i, g_o, g_f = real(0), real(0), real(0)
        for step in range(T):
            t = T - 1 - step if reverse else step
            for n in range(N):
                length = lengths[n] if lengths.size else T
                if t < length:
                    earlier = _before(cells, c0, t, n, u, reverse, length)
                    g_i += gpre[t, n, u] * earlier
                    g_o += gpre[t, n, 3 * H + u] * cells[t, n, u]
                    g_f += gpre[t, n, H + u] * earlier
        gp[0, u], gp[1, u], gp[2, u] = g_i, g_o, g_f


def lstm_peephole_grad(gpre, cells, c0, lengths, gp, reverse):
    threads = block(32)
    _peephole_grad[-(-c0.shape[1] // threads), threads](gpre, cells, c0, lengths, gp, reverse)


# Parallel over samples, one block each. `kept` and `product` are scratch: r h, and the product of the last gate.
@gpu(
    "real[:,:,:], real[:,:], real[:,:], real[:], i64[:], real[:,:,:], real[:,:], real[:,:,:], real[:,:,:], real[:,:], real[:,:],"
    " i32, i32"
)
def _gru(gates, h0, wt, b_hh, lengths, y, hn, hidden, previous, kept, product, reverse, reset_after):
    tile = cuda.shared.array(TILE, real)
    thread, n = cuda.threadIdx.x, cuda.blockIdx.x
    T, H = gates.shape[0], h0.shape[1]
    length = lengths[n] if lengths.size else T
    h, k_n, u_n = hn[n], kept[n], product[n]
    for u in range(thread, H, THREADS):
        h[u] = h0[n, u]
    cuda.syncthreads()
    for step in range(T):
        t = T - 1 - step if reverse else step
        if t < length:
            _add_products(tile, gates[t, n], 0, h, 0, H, wt, 0, 2 * H, b_hh, 0)
        for u in range(thread, H, THREADS):
            r, z = real(0), real(0)
            if t < length:
                r, z = _sigmoid(gates[t, n, u]), _sigmoid(gates[t, n, H + u])
                k_n[u], u_n[u] = h[u] if reset_after else r * h[u], real(0)
            gates[t, n, u], gates[t, n, H + u] = r, z
        cuda.syncthreads()
        if t < length:
            _add_products(tile, u_n, 0, k_n, 0, H, wt, 2 * H, H, b_hh, 2 * H)
        for u in range(thread, H, THREADS):
            new, before, other, out = real(0), real(0), real(0), real(0)
            if t < length:
                r, z, before = gates[t, n, u], gates[t, n, H + u], h[u]
                other = u_n[u] if reset_after else k_n[u]
                new = math.tanh(gates[t, n, 2 * H + u] + (r * u_n[u] if reset_after else u_n[u]))
                out = (real(1) - z) * new + z * before
                h[u] = out
            gates[t, n, 2 * H + u], y[t, n, u] = new, out
            if hidden.size:
                hidden[t, n, u] = other
            if previous.size:
                previous[t, n, u] = before
        cuda.syncthreads()


def gru_sequence(x, w_ih, b_ih, h0, w_hh, b_hh, lengths, y, hn, gates, hidden, previous, reverse, reset_after):
    if h0.shape[0]:
        gates = _inputs(x, w_ih, b_ih, gates)
        kept, product = cuda.device_array(h0.shape, h0.dtype), cuda.device_array(h0.shape, h0.dtype)
        _gru[h0.shape[0], THREADS](
            gates, h0, _transposed(w_hh), b_hh, lengths, y, hn, hidden, previous, kept, product, reverse, reset_after
        )


# Parallel over samples, one block each. `product` is scratch: the gradient of what the last gate's weights multiply.
@gpu(
    "real[:,:,:], real[:,:], real[:,:,:], real[:,:,:], real[:,:,:], real[:,:], i64[:], real[:,:,:], real[:,:,:], real[:,:],"
    " real[:,:], real[:], i32, i32"
)
def _gru_backward(gy, ghn, gates, hidden, previous, w_hh, lengths, gpre, ghidden, gh0, product, none, reverse, reset_after):
    tile = cuda.shared.array(TILE, real)
    thread, n = cuda.threadIdx.x, cuda.blockIdx.x
    T, H = gates.shape[0], w_hh.shape[1]
    length = lengths[n] if lengths.size else T
    gh, g_kept = gh0[n], product[n]
    for u in range(thread, H, THREADS):
        gh[u] = ghn[n, u] if ghn.size else real(0)
    cuda.syncthreads()
    for step in range(T):
        t = step if reverse else T - 1 - step
        d, d_hidden = gpre[t, n], ghidden[t, n]
        for u in range(thread, H, THREADS):
            d_r, d_z, d_n, d_u = real(0), real(0), real(0), real(0)
            if t < length:
                r, z, new = gates[t, n, u], gates[t, n, H + u], gates[t, n, 2 * H + u]
                dh = gh[u] + gy[t, n, u] if gy.size else gh[u]
                d_n = dh * (real(1) - z) * (real(1) - new * new)
                d_z = dh * (previous[t, n, u] - new) * z * (real(1) - z)
                d_u = d_n
                if reset_after:
                    d_r, d_u = d_n * hidden[t, n, u] * r * (real(1) - r), d_n * r
                gh[u], g_kept[u] = dh * z, real(0)
            d[u], d[H + u], d[2 * H + u] = d_r, d_z, d_n
            d_hidden[u], d_hidden[H + u], d_hidden[2 * H + u] = d_r, d_z, d_u
        cuda.syncthreads()
        if t < length:
            _add_products(tile, g_kept, 0, d_hidden, 2 * H, H, w_hh[2 * H :], 0, H, none, 0)
            for u in range(thread, H, THREADS):
                if reset_after:
                    gh[u] += g_kept[u]
                else:
                    r = gates[t, n, u]
                    d_r = g_kept[u] * previous[t, n, u] * r * (real(1) - r)
                    d[u], d_hidden[u] = d_r, d_r
                    gh[u] += g_kept[u] * r
            cuda.syncthreads()
            _add_products(tile, gh, 0, d_hidden, 0, 2 * H, w_hh, 0, H, none, 0)


def gru_sequence_backward(gy, ghn, gates, hidden, previous, w_hh, lengths, gpre, ghidden, gh0, reverse, reset_after):
    if gh0.shape[0]:
        product, none = cuda.device_array(gh0.shape, gh0.dtype), cuda.device_array(0, gh0.dtype)
        _gru_backward[gh0.shape[0], THREADS](
            gy, ghn, gates, hidden, previous, w_hh, lengths, gpre, ghidden, gh0, product, none, reverse, reset_after
        )


# Parallel over samples, one block each. Reads the weights T*N times (from L2), gates once; writes each output once.
@gpu("real[:,:,:], real[:,:], real[:,:], real[:], i64[:], real[:,:,:], real[:,:], real[:,:,:], i32, i32")
def _rnn(gates, h0, wt, b_hh, lengths, y, hn, previous, reverse, relu):
    tile = cuda.shared.array(TILE, real)
    thread, n = cuda.threadIdx.x, cuda.blockIdx.x
    T, H = gates.shape[0], h0.shape[1]
    length = lengths[n] if lengths.size else T
    h = hn[n]
    for u in range(thread, H, THREADS):
        h[u] = h0[n, u]
    cuda.syncthreads()
    for step in range(T):
        t = T - 1 - step if reverse else step
        if t < length:
            _add_products(tile, gates[t, n], 0, h, 0, H, wt, 0, H, b_hh, 0)
        for u in range(thread, H, THREADS):
            before, a = real(0), real(0)
            if t < length:
                before, a = h[u], gates[t, n, u]
                if relu:
                    a = real(0) if a < real(0) else a
                else:
                    a = math.tanh(a)
                h[u] = a
            gates[t, n, u], y[t, n, u] = a, a
            if previous.size:
                previous[t, n, u] = before
        cuda.syncthreads()


def rnn_sequence(x, w_ih, b_ih, h0, w_hh, b_hh, lengths, y, hn, gates, previous, reverse, relu):
    if h0.shape[0]:
        gates = _inputs(x, w_ih, b_ih, gates)
        _rnn[h0.shape[0], THREADS](gates, h0, _transposed(w_hh), b_hh, lengths, y, hn, previous, reverse, relu)


# Parallel over samples, one block each; w_hh as it is lies right for the way back. Reads it T*N times (from L2).
@gpu("real[:,:,:], real[:,:], real[:,:,:], real[:,:], i64[:], real[:,:,:], real[:,:], real[:], i32, i32")
def _rnn_backward(gy, ghn, gates, w_hh, lengths, gpre, gh0, none, reverse, relu):
    tile = cuda.shared.array(TILE, real)
    thread, n = cuda.threadIdx.x, cuda.blockIdx.x
    T, H = gates.shape[0], w_hh.shape[1]
    length = lengths[n] if lengths.size else T
    gh = gh0[n]
    for u in range(thread, H, THREADS):
        gh[u] = ghn[n, u] if ghn.size else real(0)
    cuda.syncthreads()
    for step in range(T):
        t = step if reverse else T - 1 - step
        for u in range(thread, H, THREADS):
            d = real(0)
            if t < length:
                h = gates[t, n, u]
                dh = gh[u] + gy[t, n, u] if gy.size else gh[u]
                if relu:
                    d = dh * (real(1) if h > real(0) else real(0))
                else:
                    d = dh * (real(1) - h * h)
                gh[u] = real(0)
            gpre[t, n, u] = d
        cuda.syncthreads()
        if t < length:
            _add_products(tile, gh, 0, gpre[t, n], 0, H, w_hh, 0, H, none, 0)


def rnn_sequence_backward(gy, ghn, gates, w_hh, lengths, gpre, gh0, reverse, relu):
    if gh0.shape[0]:
        _rnn_backward[gh0.shape[0], THREADS](
            gy, ghn, gates, w_hh, lengths, gpre, gh0, cuda.device_array(0, gh0.dtype), reverse, relu
        )
