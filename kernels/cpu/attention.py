"""Scaled dot-product attention, its gradients, and what stands around it.

Scores are made for ROWS queries against a tile of KEYS keys at a time; a tile, transposed so that its keys lie side by side,
serves ROWS queries from the nearest caches, and the L x S scores are never stored. All products are `product`.
"""

import math

import numpy as np

from ..compile import cpu, inline, real
from ..scalars import cap, exp, exp_below, random24
from .activation import LANES, larger, row_max
from .llvm import add_product

ROWS, KEYS, FEW = 32, 128, 4


# tile[d, s] = x[s0 + s, d] for s < n, 0 beyond.
@inline
def turn(x, s0, n, tile):
    for s in range(n):
        for d in range(x.shape[1]):
            tile[d, s] = x[s0 + s, d]
    tile[:, n:] = real(0)


# c[m] += sum over k < depth of a[m, k] b[b0 + k] for m < rows; a row of b or c lies in one piece.
@inline
def product(a, b, c, rows, b0, depth):
    size = c.itemsize
    a_row, a_col, b_row, c_row = a.strides[0] // size, a.strides[1] // size, b.strides[0] // size, c.strides[0] // size
    add_product(a, 0, a_row, a_col, b, b0 * b_row, b_row, c, 0, c_row, rows, c.shape[1], depth)


# c[m] += sum of a[m, k] b[b0 + k] without the products of weights 0: what is hidden may be NaN.
@inline
def product_of_seen(a, b, c, rows, b0, depth):
    for m in range(rows):
        for k in range(depth):
            if a[m, k] != real(0):
                for n in range(c.shape[1]):
                    c[m, n] += a[m, k] * b[b0 + k, n]


# The products of few queries, whose keys are not worth turning: as they lie in memory.
@inline
def dots(q, k, s0, n, p):
    for i in range(q.shape[0]):
        for s in range(n):
            total = real(0)
            for e in range(q.shape[1]):
                total += q[i, e] * k[s0 + s, e]
            p[i, s] = total


@inline
def has_nonfinite(x, begin, end):
    total = real(0)
    for i in range(begin, end):
        for j in range(x.shape[1]):
            total += x[i, j] * real(0)
    return total != real(0)


# The products in p[rows, KEYS] become scores: scaled, capped, with their bias; -inf where hidden and beyond n. `capped` keeps
# them without the bias where there is a cap.
@inline
def finish_scores(p, capped, rows, n, bias, allowed, mb, mh, first, s0, scale, softcap, left, right):
    for i in range(rows):
        l = first + i
        for s in range(n):
            p[i, s] *= scale
        if softcap > real(0):
            for s in range(n):
                p[i, s] = capped[i, s] = cap(p[i, s], softcap)
        if bias.size > 0:
            ml = l if bias.shape[2] > 1 else 0
            for s in range(n):
                add = bias[mb, mh, ml, s0 + s]
                p[i, s] = p[i, s] + add if add != real(-math.inf) else add
        if allowed.size > 0:
            ml = l if allowed.shape[2] > 1 else 0
            for s in range(n):
                p[i, s] = p[i, s] if allowed[mb, mh, ml, s0 + s] != 0 else real(-math.inf)
        for s in range(min(max(l - left - s0, 0), n)):
            p[i, s] = real(-math.inf)
        for s in range(max(min(l + right + 1 - s0, n), 0), KEYS):
            p[i, s] = real(-math.inf)


# Parallel over blocks of ROWS queries of all heads. Reads q once, k and v once per block; writes y once per tile of keys, from
# cache. The maximum so far and the sum below it are carried from tile to tile.
# Source: Milakov and Gimelshein, Online normalizer calculation for softmax (2018); Dao et al., FlashAttention (2022).
@cpu(over="B*H*((L+31)//32)")
def attention(begin, end, q, k, v, bias, allowed, y, lse, scale, softcap, left, right, drop, keep_scale, seed):
    H, L, G, S = q.shape[1], q.shape[2], k.shape[1], k.shape[2]
    blocks = (L + ROWS - 1) // ROWS
    tile = np.empty((q.shape[3], KEYS), q.dtype)
    p, top, total = np.empty((ROWS, KEYS), q.dtype), np.empty(ROWS, q.dtype), np.empty(ROWS, q.dtype)
    lanes = np.empty(LANES, q.dtype)
    for task in range(begin, end):
        b, h, first = task // (blocks * H), task // blocks % H, task % blocks * ROWS
        g, last = h // (H // G), min(first + ROWS, L)
        rows = last - first
        mb, mh = b if max(bias.shape[0], allowed.shape[0]) > 1 else 0, h if max(bias.shape[1], allowed.shape[1]) > 1 else 0
        out = y[b, h, first:last]
        out[:, :] = real(0)
        top[:], total[:] = real(-math.inf), real(0)
        for s0 in range(max(first - left, 0) // KEYS * KEYS, min(last + right, S), KEYS):
            n = min(KEYS, S - s0)
            if rows < FEW:
                dots(q[b, h, first:last], k[b, g], s0, n, p)
            else:
                turn(k[b, g], s0, n, tile)
                p[:, :] = real(0)
                product(q[b, h, first:last], tile, p, rows, 0, q.shape[3])
            finish_scores(p, p, rows, n, bias, allowed, mb, mh, first, s0, scale, softcap, left, right)
            for i in range(rows):
                high = larger(top[i], row_max(p[i], lanes))
                base = high if high != real(-math.inf) else real(0)
                shrink, more = exp_below(top[i] - base), real(0)
                for s in range(KEYS):
                    e = exp_below(p[i, s] - base)
                    p[i, s] = e
                    more += e
                top[i], total[i] = high, total[i] * shrink + more
                if shrink != real(1):
                    for e in range(out.shape[1]):
                        out[i, e] *= shrink
                if drop > 0:
                    at = ((b * H + h) * L + first + i) * S + s0
                    for s in range(n):
                        p[i, s] = p[i, s] * keep_scale if random24(at + s, seed) >= drop else real(0)
            if has_nonfinite(v[b, g], s0, s0 + n):
                product_of_seen(p, v[b, g], out, rows, s0, n)
            else:
                product(p, v[b, g], out, rows, s0, n)
        for i in range(rows):
            lse[b, h, first + i] = top[i] + math.log(total[i])
            share = real(1) / total[i] if total[i] != real(0) else real(0)
            for e in range(out.shape[1]):
                out[i, e] *= share


# Parallel over blocks of ROWS queries of all heads. Reads q once, k once per block; writes w once.
@cpu(over="B*H*((L+31)//32)")
def attention_weights(begin, end, q, k, bias, allowed, lse, w, scale, softcap, left, right):
    H, L, G, S = q.shape[1], q.shape[2], k.shape[1], k.shape[2]
    blocks = (L + ROWS - 1) // ROWS
    tile, p = np.empty((q.shape[3], KEYS), q.dtype), np.empty((ROWS, KEYS), q.dtype)
    for task in range(begin, end):
        b, h, first = task // (blocks * H), task // blocks % H, task % blocks * ROWS
        g, last = h // (H // G), min(first + ROWS, L)
        rows = last - first
        mb, mh = b if max(bias.shape[0], allowed.shape[0]) > 1 else 0, h if max(bias.shape[1], allowed.shape[1]) > 1 else 0
        for s0 in range(0, S, KEYS):
            n = min(KEYS, S - s0)
            turn(k[b, g], s0, n, tile)
            p[:, :] = real(0)
            product(q[b, h, first:last], tile, p, rows, 0, q.shape[3])
            finish_scores(p, p, rows, n, bias, allowed, mb, mh, first, s0, scale, softcap, left, right)
            for i in range(rows):
                below = lse[b, h, first + i]
                share = real(1) if below != real(-math.inf) else real(0)
                below = below if below != real(-math.inf) else real(0)
                for s in range(n):
                    w[b, h, first + i, s0 + s] = share * exp(p[i, s] - below)


# The products q k^T in p and gy v^T in ds become the weights after dropout and the gradient of the scores with their bias.
# Hidden pairs get 0 whatever the products are.
@inline
def gradient_of_scores(p, ds, rows, n, lse, delta, at, S, drop, keep_scale, seed):
    for i in range(rows):
        below, low = lse[i], real(-math.inf)
        for s in range(n):
            weight = exp(p[i, s] - below)
            kept = real(1)
            if drop > 0:
                kept = keep_scale if random24(at + i * S + s, seed) >= drop else real(0)
            seen = p[i, s] != low and below != low
            ds[i, s] = weight * (ds[i, s] * kept - delta[i]) if seen else real(0)
            p[i, s] = weight * kept if seen else real(0)


# Parallel over key heads; a task takes the query heads of its group one after the other, so that nobody else adds to its
# gradients. Reads k and v once per head, q and gy once per head and tile of keys. The weights are computed again from lse.
# Source: Dao et al., FlashAttention (2022), appendix B.
@cpu(over="B*G")
def attention_backward(
    begin, end, q, k, v, bias, allowed, y, lse, gy, gq, gk, gv, scale, softcap, left, right, drop, keep_scale, seed
):
    H, L, G, S, D, E = q.shape[1], q.shape[2], k.shape[1], k.shape[2], q.shape[3], v.shape[3]
    tile, value_tile = np.empty((D, KEYS), q.dtype), np.empty((E, KEYS), q.dtype)
    p, ds, capped = np.empty((ROWS, KEYS), q.dtype), np.empty((ROWS, KEYS), q.dtype), np.empty((ROWS, KEYS), q.dtype)
    delta = np.empty(L, q.dtype)
    for task in range(begin, end):
        b, g = task // G, task % G
        gk[b, g], gv[b, g] = real(0), real(0)
        for h in range(g * (H // G), (g + 1) * (H // G)):
            gq[b, h] = real(0)
            mb, mh = b if max(bias.shape[0], allowed.shape[0]) > 1 else 0, h if max(bias.shape[1], allowed.shape[1]) > 1 else 0
            nonfinite = has_nonfinite(k[b, g], 0, S) or has_nonfinite(q[b, h], 0, L) or has_nonfinite(gy[b, h], 0, L)
            for l in range(L):
                total = real(0)
                for e in range(E):
                    total += gy[b, h, l, e] * y[b, h, l, e]
                delta[l] = total
            for s0 in range(0, S, KEYS):
                n = min(KEYS, S - s0)
                turn(k[b, g], s0, n, tile)
                turn(v[b, g], s0, n, value_tile)
                for first in range(max(s0 - right, 0) // ROWS * ROWS, min(s0 + n + left, L), ROWS):
                    last = min(first + ROWS, L)
                    rows = last - first
                    qs, gs = q[b, h, first:last], gy[b, h, first:last]
                    p[:, :], ds[:, :] = real(0), real(0)
                    product(qs, tile, p, rows, 0, D)
                    product(gs, value_tile, ds, rows, 0, E)
                    finish_scores(p, capped, rows, n, bias, allowed, mb, mh, first, s0, scale, softcap, left, right)
                    at = ((b * H + h) * L + first) * S + s0
                    gradient_of_scores(p, ds, rows, n, lse[b, h, first:last], delta[first:last], at, S, drop, keep_scale, seed)
                    for i in range(rows):
                        for s in range(n):
                            ds[i, s] *= scale
                        if softcap > real(0):
                            for s in range(n):
                                t = capped[i, s] / softcap
                                ds[i, s] = ds[i, s] * (real(1) - t * t) if ds[i, s] != real(0) else real(0)
                    if nonfinite:
                        product_of_seen(ds, k[b, g], gq[b, h, first:last], rows, s0, n)
                        product_of_seen(ds.T, qs, gk[b, g, s0 : s0 + n], n, 0, rows)
                        product_of_seen(p.T, gs, gv[b, g, s0 : s0 + n], n, 0, rows)
                    else:
                        product(ds, k[b, g], gq[b, h, first:last], rows, s0, n)
                        product(ds.T, qs, gk[b, g, s0 : s0 + n], n, 0, rows)
                        product(p.T, gs, gv[b, g, s0 : s0 + n], n, 0, rows)


# Parallel over the batches and heads of the mask; a task adds up all batches, heads and queries that share its elements.
# Reads k and v once per head, q and gy once per head and tile of keys.
@cpu(over="MB*MH")
def attention_grad_bias(begin, end, q, k, v, bias, y, lse, gy, gbias, scale, softcap, left, right, drop, keep_scale, seed):
    B, H, L, G, S, D, E = q.shape[0], q.shape[1], q.shape[2], k.shape[1], k.shape[2], q.shape[3], v.shape[3]
    MB, MH, ML = bias.shape[0], bias.shape[1], bias.shape[2]
    tile, value_tile = np.empty((D, KEYS), q.dtype), np.empty((E, KEYS), q.dtype)
    p, ds, delta = np.empty((ROWS, KEYS), q.dtype), np.empty((ROWS, KEYS), q.dtype), np.empty(ROWS, q.dtype)
    everything = np.empty((0, 0, 0, 0), np.uint8)
    for task in range(begin, end):
        mb, mh = task // MH, task % MH
        gbias[mb, mh] = real(0)
        for pair in range(B * H):
            b, h = pair // H, pair % H
            if (MB > 1 and b != mb) or (MH > 1 and h != mh):
                continue
            g = h // (H // G)
            for s0 in range(0, S, KEYS):
                n = min(KEYS, S - s0)
                turn(k[b, g], s0, n, tile)
                turn(v[b, g], s0, n, value_tile)
                for first in range(0, L, ROWS):
                    last = min(first + ROWS, L)
                    rows = last - first
                    for i in range(rows):
                        total = real(0)
                        for e in range(E):
                            total += gy[b, h, first + i, e] * y[b, h, first + i, e]
                        delta[i] = total
                    p[:, :], ds[:, :] = real(0), real(0)
                    product(q[b, h, first:last], tile, p, rows, 0, D)
                    product(gy[b, h, first:last], value_tile, ds, rows, 0, E)
                    finish_scores(p, p, rows, n, bias, everything, mb, mh, first, s0, scale, softcap, left, right)
                    at = ((b * H + h) * L + first) * S + s0
                    gradient_of_scores(p, ds, rows, n, lse[b, h, first:last], delta, at, S, drop, keep_scale, seed)
                    for i in range(rows):
                        for s in range(n):
                            gbias[mb, mh, first + i if ML > 1 else 0, s0 + s] += ds[i, s]


# Parallel over (part, batch, head): each writes one piece y[p, a, c]. Reads x once, in pieces of D.
@cpu(over="P*A*C")
def move_heads(begin, end, x, y):
    A, B, C, D = x.shape[0], x.shape[1], x.shape[3], x.shape[4]
    for task in range(begin, end):
        p, a, c = task // (A * C), task // C % A, task % C
        for b in range(B):
            for d in range(D):
                y[p, a, c, b, d] = x[a, b, p, c, d]


# Parallel over rows [L, D] of all M. Reads x once, the tables from cache; writes y once.
@cpu(over="M*L")
def rotary(begin, end, x, cos, sin, y, interleaved, inverse):
    L, C = cos.shape
    sign = real(-1) if inverse else real(1)
    for task in range(begin, end):
        m, l = task // L, task % L
        if interleaved:
            for c in range(C):
                a, b, s = x[m, l, 2 * c], x[m, l, 2 * c + 1], sign * sin[l, c]
                y[m, l, 2 * c] = a * cos[l, c] - b * s
                y[m, l, 2 * c + 1] = a * s + b * cos[l, c]
        else:
            for c in range(C):
                a, b, s = x[m, l, c], x[m, l, C + c], sign * sin[l, c]
                y[m, l, c] = a * cos[l, c] - b * s
                y[m, l, C + c] = a * s + b * cos[l, c]
