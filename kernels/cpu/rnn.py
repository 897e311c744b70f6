"""Recurrent layers over a sequence: ROWS samples walk the steps together, so that a weight that is read serves all of them.

What a sample gets does not depend on its neighbours: a product of one sample adds in the order of that of several.
"""

import numpy as np

from ..compile import cpu, inline, real
from ..scalars import exp
from .llvm import add_product
from .panels import U, aligned

ROWS = 32  # a multiple of four
WIDTH = 64  # columns of a panel of weights: a constant, so that sweeps need no tail
LONG = 16  # steps from which on making the panels of a product pays


# 1 / (1 + e^-x): exactly 1 from some 17 (float64: 37) on; e^-x overflows to infinity, which gives 0.
@inline(exact=True)
def _sigmoid(x):
    return real(1) / (real(1) + exp(-x))


# tanh within a few units in the last place: a polynomial where 1 - 2 / (e^2x + 1) would cancel. Coefficients: Cephes.
@inline(exact=True)
def _tanh(x):
    z = x * x
    p = real(-5.70498872745e-3) * z + real(2.06390887954e-2)
    p = p * z + real(-5.37397155531e-2)
    p = p * z + real(1.33314422036e-1)
    p = p * z + real(-3.33332819422e-1)
    near = p * z * x + x
    far = real(1) - real(2) / (exp(real(2) * abs(x)) + real(1))
    return near if abs(x) < real(0.625) else far if x >= real(0) else -far


@_tanh.float64
def _tanh(x):
    z = x * x
    p = (-9.64399179425052238628e-1 * z - 9.92877231001918586564e1) * z - 1.61468768441708447952e3
    q = ((z + 1.12811678491632931402e2) * z + 2.23548839060100448583e3) * z + 4.84406305325125486048e3
    near = x + x * z * (p / q)
    far = 1.0 - 2.0 / (exp(2.0 * abs(x)) + 1.0)
    return near if abs(x) < 0.625 else far if x >= 0.0 else -far


# u[b, j] = x[b] . w[j] for `rows` rows, or some more, as there are fours: two rows of w at a time keep eight sums in registers;
# all reads run along k.
@inline
def _products(u, x, w, rows):
    J, K = w.shape
    for b in range(0, rows, 4):
        x0, x1, x2, x3 = x[b], x[b + 1], x[b + 2], x[b + 3]
        for j in range(0, J, 2):
            v, w_ = w[j], w[min(j + 1, J - 1)]
            a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = real(0)
            for k in range(K):
                a0 += x0[k] * v[k]
                a1 += x1[k] * v[k]
                a2 += x2[k] * v[k]
                a3 += x3[k] * v[k]
                b0 += x0[k] * w_[k]
                b1 += x1[k] * w_[k]
                b2 += x2[k] * w_[k]
                b3 += x3[k] * w_[k]
            u[b, j], u[b + 1, j], u[b + 2, j], u[b + 3, j] = a0, a1, a2, a3
            if j + 1 < J:
                u[b, j + 1], u[b + 1, j + 1], u[b + 2, j + 1], u[b + 3, j + 1] = b0, b1, b2, b3


# How many steps of `rows` samples fill the rows of one product over the input.
@inline
def _steps_ahead(rows):
    return max(1, ROWS // rows)


# a[step's place * rows + b] = x[t, first + b] . w_ih + b_ih for that step and those ahead; xs is scratch for rows of x.
@inline
def _inputs(a, xs, x, w_ih, panels, b_ih, first, rows, step, reverse):
    T = x.shape[0]
    ahead = min(_steps_ahead(rows), T - step)
    for i in range(ahead):
        t = T - 1 - step - i if reverse else step + i
        for b in range(rows):
            _copy(xs[i * rows + b], x[t, first + b])
    _multiply(a, xs, w_ih, panels, ahead * rows)
    if b_ih.size:
        for i in range(ahead * rows):
            _add(a[i], b_ih)


@inline
def _copy(y, x):
    for i in range(y.size):
        y[i] = x[i]


@inline
def _fill(y, value):
    for i in range(y.size):
        y[i] = value


@inline
def _add(y, x):
    for i in range(y.size):
        y[i] += x[i]


@inline
def _add_product(y, a, b):
    for i in range(y.size):
        y[i] += a[i] * b[i]


@inline
def _limit(y, clip):
    if clip > real(0):
        for i in range(y.size):
            y[i] = -clip if y[i] < -clip else clip if y[i] > clip else y[i]


@inline
def _sigmoids(y):
    for i in range(y.size):
        y[i] = _sigmoid(y[i])


@inline
def _tanhs(y):
    for i in range(y.size):
        y[i] = _tanh(y[i])


# d = 0 where the gate's argument was cut.
@inline
def _cut(d, gate, low, high):
    for i in range(d.size):
        d[i] = d[i] if low < gate[i] and gate[i] < high else real(0)


# The matrix w^T ("turned") or w of a product x w^T or x w, WIDTH columns after the other: panels[p, k, t] is row k, column
# p * WIDTH + t. Zeros behind the last column. `turned` comes as a comparison: of a literal each value would be compiled apart.
@inline
def _panels(w, turned):
    rows, columns = w.shape
    depth, n = (columns, rows) if turned else (rows, columns)
    panels = aligned((n + WIDTH - 1) // WIDTH * depth * WIDTH, w)
    panels[:] = real(0)
    for first in range(0, n, 16 if turned else WIDTH):  # 16 columns: a whole cache line of a panel
        at, last = first // WIDTH * depth * WIDTH + first % WIDTH, min(first + (16 if turned else WIDTH), n)
        for k in range(depth):
            for j in range(first, last):
                panels[U(at + k * WIDTH) + U(j - first)] = w[j, k] if turned else w[k, j]
    return panels


# sums[t] = the sum over k of x[k] panels[at + k * WIDTH + t], in the order of k: eight of them in a sweep.
@inline(ordered=True)
def _multiply_one(x, depth, panels, at, sums):
    for t in range(WIDTH):
        sums[t] = real(0)
    for k in range(0, depth - depth % 8, 8):
        a = x[k : k + 8]
        x0, x1, x2, x3, x4, x5, x6, x7 = a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]
        for t in range(WIDTH):
            p = U(at + k * WIDTH) + U(t)
            total = sums[t] + x0 * panels[p] + x1 * panels[p + U(WIDTH)]
            total = total + x2 * panels[p + U(2 * WIDTH)] + x3 * panels[p + U(3 * WIDTH)]
            total = total + x4 * panels[p + U(4 * WIDTH)] + x5 * panels[p + U(5 * WIDTH)]
            sums[t] = total + x6 * panels[p + U(6 * WIDTH)] + x7 * panels[p + U(7 * WIDTH)]
    for k in range(depth - depth % 8, depth):
        for t in range(WIDTH):
            sums[t] = sums[t] + x[k] * panels[U(at + k * WIDTH) + U(t)]


# u[b] = x[b] times the matrix whose panels these are, for `rows` rows; two or three are computed as four.
@inline
def _sweep(u, x, panels, rows):
    n, depth = u.shape[1], x.shape[1]
    x1, u1, sums = x.reshape(x.size), u.reshape(u.size), aligned(WIDTH, x)
    some = 1 if rows == 1 else max(rows, 4)
    u1[: some * n] = real(0)
    for first in range(0, n, WIDTH):
        if rows > 1:
            add_product(x1, 0, depth, 1, panels, first * depth, WIDTH, u1, first, n, some, min(WIDTH, n - first), depth)
            continue
        _multiply_one(x1, depth, panels, first * depth, sums)
        for t in range(min(WIDTH, n - first)):
            u1[U(first) + U(t)] = sums[U(t)]


# u[b] = w x[b]: by sweeps over the panels of w^T where there are any.
@inline
def _multiply(u, x, w, panels, rows):
    if panels.size:
        _sweep(u, x, panels, rows)
    else:
        _products(u, x, w, rows)


# Parallel over N. Per step and block of ROWS samples 4*H dot products of H, those of D for several steps at a time where samples
# are few, then one pass over the gates. Reads the weights T*N/ROWS times, x once; writes each result once.
@cpu(over="N")
def lstm_sequence(
    begin, end, x, w_ih, b_ih, h0, c0, w_hh, b_hh, peephole, lengths, y, hn, cn, gates, cells, previous, reverse, clip
):
    T, H = x.shape[0], h0.shape[1]
    u, ax, xs = np.empty((ROWS, 4 * H), h0.dtype), np.empty((ROWS, 4 * H), h0.dtype), np.zeros((ROWS, x.shape[2]), h0.dtype)
    h, c = np.zeros((ROWS, H), h0.dtype), np.zeros((ROWS, H), h0.dtype)
    panels, panels_ih = _panels(w_hh[: 4 * H if T >= LONG else 0], T >= 0), _panels(w_ih[: 4 * H if T >= LONG else 0], T >= 0)
    for first in range(begin, end, ROWS):
        rows = min(ROWS, end - first)
        for b in range(rows):
            _copy(h[b], h0[first + b])
            _copy(c[b], c0[first + b])
        for step in range(T):
            t = T - 1 - step if reverse else step
            turn = step % _steps_ahead(rows)
            if turn == 0:
                _inputs(ax, xs, x, w_ih, panels_ih, b_ih, first, rows, step, reverse)
            _multiply(u, h, w_hh, panels, rows)
            for b in range(rows):
                n = first + b
                a = ax[turn * rows + b]
                if lengths.size and t >= lengths[n]:
                    if gates.size:
                        _fill(gates[t, n], real(0))
                    _fill(y[t, n], real(0))
                    if cells.size:
                        _fill(cells[t, n], real(0))
                    if previous.size:
                        _fill(previous[t, n], real(0))
                    continue
                _add(a, u[b])
                if b_hh.size:
                    _add(a, b_hh)
                i, f, g, o = a[:H], a[H : 2 * H], a[2 * H : 3 * H], a[3 * H :]
                hb, cb = h[b], c[b]
                if peephole.size:
                    _add_product(i, peephole[0], cb)
                    _add_product(f, peephole[2], cb)
                _limit(a[: 3 * H], clip)
                _sigmoids(a[: 2 * H])
                _tanhs(g)
                for j in range(H):
                    cb[j] = f[j] * cb[j] + i[j] * g[j]
                if peephole.size:
                    _add_product(o, peephole[1], cb)
                _limit(o, clip)
                _sigmoids(o)
                if gates.size:
                    _copy(gates[t, n], a)
                if cells.size:
                    _copy(cells[t, n], cb)
                if previous.size:
                    _copy(previous[t, n], hb)
                for j in range(H):
                    hb[j] = o[j] * _tanh(cb[j])
                _copy(y[t, n], hb)
        for b in range(rows):
            _copy(hn[first + b], h[b])
            _copy(cn[first + b], c[b])


# Parallel over N. Per step and block one pass over the gates, then H dot products of 4*H each with the rows of w_hh^T (one
# copy a range). Reads gates, cells and gy once, w_hh^T T*N/ROWS times; writes gpre once.
@cpu(over="N")
def lstm_sequence_backward(begin, end, gy, ghn, gcn, gates, cells, c0, w_hh, peephole, lengths, gpre, gh0, gc0, reverse, clip):
    T, H = gates.shape[0], c0.shape[1]
    panels, d = _panels(w_hh, T < 0), np.zeros((ROWS, 4 * H), c0.dtype)
    u, gh, gc = np.zeros((ROWS, H), c0.dtype), np.zeros((ROWS, H), c0.dtype), np.zeros((ROWS, H), c0.dtype)
    tanh_c = np.empty(H, c0.dtype)
    low, high, tanh_low, tanh_high = _sigmoid(-clip), _sigmoid(clip), _tanh(-clip), _tanh(clip)
    for first in range(begin, end, ROWS):
        rows = min(ROWS, end - first)
        for b in range(rows):
            n = first + b
            if ghn.size:
                _copy(gh[b], ghn[n])
            else:
                _fill(gh[b], real(0))
            if gcn.size:
                _copy(gc[b], gcn[n])
            else:
                _fill(gc[b], real(0))
        for step in range(T):
            t = step if reverse else T - 1 - step
            for b in range(rows):
                n = first + b
                length = lengths[n] if lengths.size else T
                if t >= length:
                    _fill(gpre[t, n], real(0))
                    continue
                if reverse:
                    earlier = cells[t + 1, n] if t + 1 < length else c0[n]
                else:
                    earlier = cells[t - 1, n] if t > 0 else c0[n]
                a, db, dh, dc = gates[t, n], d[b], gh[b], gc[b]
                i, f, g, o = a[:H], a[H : 2 * H], a[2 * H : 3 * H], a[3 * H :]
                d_i, d_f, d_g, d_o = db[:H], db[H : 2 * H], db[2 * H : 3 * H], db[3 * H :]
                if gy.size:
                    _add(dh, gy[t, n])
                _copy(tanh_c, cells[t, n])
                _tanhs(tanh_c)
                for j in range(H):
                    d_o[j] = dh[j] * tanh_c[j] * o[j] * (real(1) - o[j])
                if clip > real(0):
                    _cut(d_o, o, low, high)
                for j in range(H):
                    dc[j] += dh[j] * o[j] * (real(1) - tanh_c[j] * tanh_c[j])
                if peephole.size:
                    _add_product(dc, d_o, peephole[1])
                for j in range(H):
                    d_i[j] = dc[j] * g[j] * i[j] * (real(1) - i[j])
                for j in range(H):
                    d_f[j] = dc[j] * earlier[j] * f[j] * (real(1) - f[j])
                for j in range(H):
                    d_g[j] = dc[j] * i[j] * (real(1) - g[j] * g[j])
                if clip > real(0):
                    _cut(d_i, i, low, high)
                    _cut(d_f, f, low, high)
                    _cut(d_g, g, tanh_low, tanh_high)
                for j in range(H):
                    dc[j] *= f[j]
                if peephole.size:
                    _add_product(dc, d_i, peephole[0])
                    _add_product(dc, d_f, peephole[2])
                _copy(gpre[t, n], db)
            _sweep(u, d, panels, rows)
            for b in range(rows):
                if not lengths.size or t < lengths[first + b]:
                    _copy(gh[b], u[b])
        for b in range(rows):
            _copy(gh0[first + b], gh[b])
            _copy(gc0[first + b], gc[b])


# Parallel over H; the sums run over the steps, then the samples, in order. Reads three quarters of gpre and the cells twice.
@cpu(over="H")
def lstm_peephole_grad(begin, end, gpre, cells, c0, lengths, gp, reverse):
    T, N, H = cells.shape
    g_i, g_o, g_f = gp[0, begin:end], gp[1, begin:end], gp[2, begin:end]
    _fill(g_i, real(0))
    _fill(g_o, real(0))
    _fill(g_f, real(0))
    for step in range(T):
        t = T - 1 - step if reverse else step
        for n in range(N):
            length = lengths[n] if lengths.size else T
            if t >= length:
                continue
            if reverse:
                earlier = cells[t + 1, n] if t + 1 < length else c0[n]
            else:
                earlier = cells[t - 1, n] if t > 0 else c0[n]
            _add_product(g_i, gpre[t, n, begin:end], earlier[begin:end])
            _add_product(g_o, gpre[t, n, 3 * H + begin : 3 * H + end], cells[t, n, begin:end])
            _add_product(g_f, gpre[t, n, H + begin : H + end], earlier[begin:end])


# Parallel over N. As lstm_sequence, with 3*H dot products of H each; without reset_after those of the last gate need r first.
@cpu(over="N")
def gru_sequence(begin, end, x, w_ih, b_ih, h0, w_hh, b_hh, lengths, y, hn, gates, hidden, previous, reverse, reset_after):
    T, H = x.shape[0], h0.shape[1]
    ax, xs = np.empty((ROWS, 3 * H), h0.dtype), np.zeros((ROWS, x.shape[2]), h0.dtype)
    w_rz, w_n = w_hh[: 2 * H], w_hh[2 * H :]
    u_rz, u_n = np.empty((ROWS, 2 * H), h0.dtype), np.empty((ROWS, H), h0.dtype)
    h, kept = np.zeros((ROWS, H), h0.dtype), np.zeros((ROWS, H), h0.dtype)
    long = T >= LONG
    panels_rz, panels_n = _panels(w_rz[: 2 * H if long else 0], T >= 0), _panels(w_n[: H if long else 0], T >= 0)
    panels_ih = _panels(w_ih[: 3 * H if long else 0], T >= 0)
    for first in range(begin, end, ROWS):
        rows = min(ROWS, end - first)
        for b in range(rows):
            _copy(h[b], h0[first + b])
        for step in range(T):
            t = T - 1 - step if reverse else step
            turn = step % _steps_ahead(rows)
            if turn == 0:
                _inputs(ax, xs, x, w_ih, panels_ih, b_ih, first, rows, step, reverse)
            _multiply(u_rz, h, w_rz, panels_rz, rows)
            for b in range(rows):
                n = first + b
                a, hb, kb = ax[turn * rows + b], h[b], kept[b]
                rz, r = a[: 2 * H], a[:H]
                if lengths.size and t >= lengths[n]:
                    continue
                _add(rz, u_rz[b])
                if b_hh.size:
                    _add(rz, b_hh[: 2 * H])
                _sigmoids(rz)
                if not reset_after:
                    for j in range(H):
                        kb[j] = r[j] * hb[j]
            _multiply(u_n, h if reset_after else kept, w_n, panels_n, rows)
            for b in range(rows):
                n = first + b
                if lengths.size and t >= lengths[n]:
                    if gates.size:
                        _fill(gates[t, n], real(0))
                    _fill(y[t, n], real(0))
                    if hidden.size:
                        _fill(hidden[t, n], real(0))
                    if previous.size:
                        _fill(previous[t, n], real(0))
                    continue
                a, hb, ub = ax[turn * rows + b], h[b], u_n[b]
                r, z, new = a[:H], a[H : 2 * H], a[2 * H :]
                if b_hh.size:
                    _add(ub, b_hh[2 * H :])
                if reset_after:
                    _add_product(new, r, ub)
                else:
                    _add(new, ub)
                _tanhs(new)
                if gates.size:
                    _copy(gates[t, n], a)
                if hidden.size:
                    _copy(hidden[t, n], ub if reset_after else kept[b])
                if previous.size:
                    _copy(previous[t, n], hb)
                for j in range(H):
                    hb[j] = (real(1) - z[j]) * new[j] + z[j] * hb[j]
                _copy(y[t, n], hb)
        for b in range(rows):
            _copy(hn[first + b], h[b])


# Parallel over N. As lstm_sequence_backward, with H dot products of 2*H and of H each.
@cpu(over="N")
def gru_sequence_backward(begin, end, gy, ghn, gates, hidden, previous, w_hh, lengths, gpre, ghidden, gh0, reverse, reset_after):
    T, H = gates.shape[0], w_hh.shape[1]
    panels_rz, panels_n = _panels(w_hh[: 2 * H], T < 0), _panels(w_hh[2 * H :], T < 0)
    d_rz = np.zeros((ROWS, 2 * H), w_hh.dtype)
    d_u, gh = np.zeros((ROWS, H), w_hh.dtype), np.zeros((ROWS, H), w_hh.dtype)
    u_rz, u_n = np.zeros((ROWS, H), w_hh.dtype), np.zeros((ROWS, H), w_hh.dtype)
    for first in range(begin, end, ROWS):
        rows = min(ROWS, end - first)
        for b in range(rows):
            if ghn.size:
                _copy(gh[b], ghn[first + b])
            else:
                _fill(gh[b], real(0))
        for step in range(T):
            t = step if reverse else T - 1 - step
            for b in range(rows):
                n = first + b
                if lengths.size and t >= lengths[n]:
                    continue
                a, dh, before = gates[t, n], gh[b], previous[t, n]
                r, z, new = a[:H], a[H : 2 * H], a[2 * H :]
                d_r, d_z, d_n = d_rz[b, :H], d_rz[b, H:], gpre[t, n, 2 * H :]
                if gy.size:
                    _add(dh, gy[t, n])
                for j in range(H):
                    d_n[j] = dh[j] * (real(1) - z[j]) * (real(1) - new[j] * new[j])
                for j in range(H):
                    d_z[j] = dh[j] * (before[j] - new[j]) * z[j] * (real(1) - z[j])
                _copy(d_u[b], d_n)
                if reset_after:
                    kept, du = hidden[t, n], d_u[b]
                    for j in range(H):
                        d_r[j] = d_n[j] * kept[j] * r[j] * (real(1) - r[j])
                    for j in range(H):
                        du[j] *= r[j]
            _sweep(u_n, d_u, panels_n, rows)
            if not reset_after:
                for b in range(rows):
                    n = first + b
                    if lengths.size and t >= lengths[n]:
                        continue
                    r, before, ub, d_r = gates[t, n, :H], previous[t, n], u_n[b], d_rz[b, :H]
                    for j in range(H):
                        d_r[j] = ub[j] * before[j] * r[j] * (real(1) - r[j])
                    for j in range(H):
                        ub[j] *= r[j]
            _sweep(u_rz, d_rz, panels_rz, rows)
            for b in range(rows):
                n = first + b
                if lengths.size and t >= lengths[n]:
                    _fill(gpre[t, n], real(0))
                    _fill(ghidden[t, n], real(0))
                    continue
                _copy(gpre[t, n, : 2 * H], d_rz[b])
                _copy(ghidden[t, n, : 2 * H], d_rz[b])
                _copy(ghidden[t, n, 2 * H :], d_u[b])
                dh, z, v, w = gh[b], gates[t, n, H : 2 * H], u_rz[b], u_n[b]
                for j in range(H):
                    dh[j] = dh[j] * z[j] + (v[j] + w[j])
        for b in range(rows):
            _copy(gh0[first + b], gh[b])


# Parallel over N. As lstm_sequence, with H dot products of H each.
@cpu(over="N")
def rnn_sequence(begin, end, x, w_ih, b_ih, h0, w_hh, b_hh, lengths, y, hn, gates, previous, reverse, relu):
    T, H = x.shape[0], h0.shape[1]
    ax, xs = np.empty((ROWS, H), h0.dtype), np.zeros((ROWS, x.shape[2]), h0.dtype)
    u, h = np.empty((ROWS, H), h0.dtype), np.zeros((ROWS, H), h0.dtype)
    panels, panels_ih = _panels(w_hh[: H if T >= LONG else 0], T >= 0), _panels(w_ih[: H if T >= LONG else 0], T >= 0)
    for first in range(begin, end, ROWS):
        rows = min(ROWS, end - first)
        for b in range(rows):
            _copy(h[b], h0[first + b])
        for step in range(T):
            t = T - 1 - step if reverse else step
            turn = step % _steps_ahead(rows)
            if turn == 0:
                _inputs(ax, xs, x, w_ih, panels_ih, b_ih, first, rows, step, reverse)
            _multiply(u, h, w_hh, panels, rows)
            for b in range(rows):
                n = first + b
                a, hb = ax[turn * rows + b], h[b]
                if lengths.size and t >= lengths[n]:
                    if gates.size:
                        _fill(gates[t, n], real(0))
                    _fill(y[t, n], real(0))
                    if previous.size:
                        _fill(previous[t, n], real(0))
                    continue
                _add(a, u[b])
                if b_hh.size:
                    _add(a, b_hh)
                if relu:
                    for j in range(H):
                        a[j] = real(0) if a[j] < real(0) else a[j]
                else:
                    _tanhs(a)
                if previous.size:
                    _copy(previous[t, n], hb)
                if gates.size:
                    _copy(gates[t, n], a)
                _copy(hb, a)
                _copy(y[t, n], a)
        for b in range(rows):
            _copy(hn[first + b], h[b])


# Parallel over N. As lstm_sequence_backward, with H dot products of H each.
@cpu(over="N")
def rnn_sequence_backward(begin, end, gy, ghn, gates, w_hh, lengths, gpre, gh0, reverse, relu):
    T, H = gates.shape[0], w_hh.shape[1]
    panels = _panels(w_hh, T < 0)
    d, u, gh = np.zeros((ROWS, H), w_hh.dtype), np.zeros((ROWS, H), w_hh.dtype), np.zeros((ROWS, H), w_hh.dtype)
    for first in range(begin, end, ROWS):
        rows = min(ROWS, end - first)
        for b in range(rows):
            if ghn.size:
                _copy(gh[b], ghn[first + b])
            else:
                _fill(gh[b], real(0))
        for step in range(T):
            t = step if reverse else T - 1 - step
            for b in range(rows):
                n = first + b
                if lengths.size and t >= lengths[n]:
                    _fill(gpre[t, n], real(0))
                    continue
                h, db, dh = gates[t, n], d[b], gh[b]
                if gy.size:
                    _add(dh, gy[t, n])
                if relu:
                    for j in range(H):
                        db[j] = dh[j] * (real(1) if h[j] > real(0) else real(0))
                else:
                    for j in range(H):
                        db[j] = dh[j] * (real(1) - h[j] * h[j])
                _copy(gpre[t, n], db)
            _sweep(u, d, panels, rows)
            for b in range(rows):
                if not lengths.size or t < lengths[first + b]:
                    _copy(gh[b], u[b])
        for b in range(rows):
            _copy(gh0[first + b], gh[b])
