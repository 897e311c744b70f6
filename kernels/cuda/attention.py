"""Scaled dot-product attention, its gradients, and what stands around it.

A block of SIDE x SIDE threads makes the scores of SIDE rows (queries; keys where keys collect gradients) against tiles of
4 SIDE columns, through shared memory: thread (tx, ty) has row ty and the columns tx + c SIDE, c < 4. The L x S scores are
never stored. Of a result, a block makes CHUNK elements a row; wider heads take another block, which makes the scores again.
Products with weights of 0 are left out, so that nothing of a hidden key or value comes in.
"""

import math

from ..compile import block, blocks, cuda, gpu, inline, real
from ..scalars import random24

THREADS = block(256)
SIDE = 16 if THREADS == 256 else 2
TILE = 4 * SIDE
PARTS = 8
CHUNK = PARTS * SIDE
# Shapes in shared memory; the paddings keep the threads of a row on different banks.
ROWS, COLUMNS, SCORES, SUMS = (SIDE, SIDE), (TILE, SIDE + 1), (SIDE, TILE + 1), (SIDE, SIDE + 1)


# The products of row a0 + ty of a with rows b0 + tx + c SIDE of b, 0 beyond either matrix. Coalesced along the depth.
@inline
def products(a, a0, b, b0, left, right):
    tx, ty, depth = cuda.threadIdx.x, cuda.threadIdx.y, a.shape[1]
    p0, p1, p2, p3 = real(0), real(0), real(0), real(0)
    for d0 in range(0, depth, SIDE):
        d = d0 + tx
        left[ty, tx] = a[a0 + ty, d] if a0 + ty < a.shape[0] and d < depth else real(0)
        for c in range(4):
            r = b0 + ty + c * SIDE
            right[ty + c * SIDE, tx] = b[r, d] if r < b.shape[0] and d < depth else real(0)
        cuda.syncthreads()
        for i in range(SIDE):
            v = left[ty, i]
            p0 += v * right[tx, i]
            p1 += v * right[tx + SIDE, i]
            p2 += v * right[tx + 2 * SIDE, i]
            p3 += v * right[tx + 3 * SIDE, i]
        cuda.syncthreads()
    return p0, p1, p2, p3


@inline
def capped(x, scale, softcap):
    return softcap * math.tanh(x * scale / softcap) if softcap > real(0) else x * scale


# The score of query l and key s from their product; -inf where the key is hidden.
@inline
def score(x, bias, allowed, b, h, l, s, L, S, scale, softcap, left, right):
    y = real(-math.inf)
    if l < L and s < S and s >= l - left and s <= l + right:
        y = capped(x, scale, softcap)
        if bias.size > 0:
            add = bias[b if bias.shape[0] > 1 else 0, h if bias.shape[1] > 1 else 0, l if bias.shape[2] > 1 else 0, s]
            y = y + add if add != real(-math.inf) else add
        if allowed.size > 0:
            mb, mh, ml = b if allowed.shape[0] > 1 else 0, h if allowed.shape[1] > 1 else 0, l if allowed.shape[2] > 1 else 0
            y = y if allowed[mb, mh, ml, s] != 0 else real(-math.inf)
    return y


@inline
def keep(b, h, l, s, H, L, S, drop, keep_scale, seed):
    kept = real(1)
    if drop > 0:
        kept = keep_scale if random24(((b * H + h) * L + l) * S + s, seed) >= drop else real(0)
    return kept


# acc[j] += sum of weights[ty, s] x[x0 + s, first + tx + j SIDE] over the tile.
@inline
def accumulate(weights, x, x0, first, acc):
    tx, ty = cuda.threadIdx.x, cuda.threadIdx.y
    for s in range(min(TILE, x.shape[0] - x0)):
        w = weights[ty, s]
        if w != real(0):
            for j in range(PARTS):
                e = first + tx + j * SIDE
                if e < x.shape[1]:
                    acc[j] += w * x[x0 + s, e]


# Parallel over blocks of SIDE queries of all heads and over chunks of the value size. Reads k and v once per block; the
# maximum so far and the sum below it are carried from tile to tile.
# Source: Dao et al., FlashAttention (2022).
@gpu(
    "real[:,:,:,:], real[:,:,:,:], real[:,:,:,:], real[:,:,:,:], u8[:,:,:,:], real[:,:,:,:], real[:,:,:], "
    "real, real, i64, i64, i64, real, i64"
)
def _attention(q, k, v, bias, allowed, y, lse, scale, softcap, left, right, drop, keep_scale, seed):
    ls = cuda.shared.array(ROWS, real)
    rs = cuda.shared.array(COLUMNS, real)
    weights = cuda.shared.array(SCORES, real)
    row = cuda.shared.array(SUMS, real)
    acc = cuda.local.array(PARTS, real)
    scores = cuda.local.array(4, real)
    tx, ty = cuda.threadIdx.x, cuda.threadIdx.y
    H, L, G, S, E = q.shape[1], q.shape[2], k.shape[1], k.shape[2], v.shape[3]
    per_head = (L + SIDE - 1) // SIDE
    l0, h, b = cuda.blockIdx.x % per_head * SIDE, cuda.blockIdx.x // per_head % H, cuda.blockIdx.x // (per_head * H)
    g, l, first = h // (H // G), l0 + ty, cuda.blockIdx.y * CHUNK
    top, total = real(-math.inf), real(0)
    for j in range(PARTS):
        acc[j] = real(0)
    for s0 in range(max(l0 - left, 0) // TILE * TILE, min(l0 + SIDE + right, S), TILE):
        scores[0], scores[1], scores[2], scores[3] = products(q[b, h], l0, k[b, g], s0, ls, rs)
        high = top
        for c in range(4):
            s = s0 + tx + c * SIDE
            scores[c] = score(scores[c], bias, allowed, b, h, l, s, L, S, scale, softcap, left, right)
            high = max(high, scores[c])
        row[ty, tx] = high
        cuda.syncthreads()
        for i in range(SIDE):
            high = max(high, row[ty, i])
        base, more = high if high != real(-math.inf) else real(0), real(0)
        for c in range(4):
            s = s0 + tx + c * SIDE
            e = math.exp(scores[c] - base)
            more += e
            weights[ty, tx + c * SIDE] = e * keep(b, h, l, s, H, L, S, drop, keep_scale, seed)
        cuda.syncthreads()
        row[ty, tx] = more
        cuda.syncthreads()
        more = real(0)
        for i in range(SIDE):
            more += row[ty, i]
        shrink = math.exp(top - base)
        total, top = total * shrink + more, high
        for j in range(PARTS):
            acc[j] *= shrink
        accumulate(weights, v[b, g], s0, first, acc)
        cuda.syncthreads()
    if l < L:
        share = real(0) if total == real(0) else real(1) / total
        for j in range(PARTS):
            e = first + tx + j * SIDE
            if e < E:
                y[b, h, l, e] = acc[j] * share
        if tx == 0 and first == 0:
            lse[b, h, l] = real(-math.inf) if total == real(0) else (top + math.log(total) if total > real(0) else total)


def _grid(x, wide):
    """The blocks for SIDE rows each of x[B, H, L, ...] and for results of that width."""
    return x.shape[0] * x.shape[1] * blocks(x.shape[2], SIDE), max(blocks(wide, CHUNK), 1)


def attention(q, k, v, bias, allowed, y, lse, scale, softcap, left, right, drop, keep_scale, seed):
    if lse.size:
        launch = _attention[_grid(q, v.shape[3]), (SIDE, SIDE)]
        launch(q, k, v, bias, allowed, y, lse, scale, softcap, left, right, drop, keep_scale, seed)


# Parallel over blocks of SIDE queries. Writes w once.
@gpu("real[:,:,:,:], real[:,:,:,:], real[:,:,:,:], u8[:,:,:,:], real[:,:,:], real[:,:,:,:], real, real, i64, i64")
def _weights(q, k, bias, allowed, lse, w, scale, softcap, left, right):
    ls = cuda.shared.array(ROWS, real)
    rs = cuda.shared.array(COLUMNS, real)
    scores = cuda.local.array(4, real)
    tx, ty = cuda.threadIdx.x, cuda.threadIdx.y
    H, L, G, S = q.shape[1], q.shape[2], k.shape[1], k.shape[2]
    per_head = (L + SIDE - 1) // SIDE
    l0, h, b = cuda.blockIdx.x % per_head * SIDE, cuda.blockIdx.x // per_head % H, cuda.blockIdx.x // (per_head * H)
    g, l = h // (H // G), l0 + ty
    for s0 in range(0, S, TILE):
        scores[0], scores[1], scores[2], scores[3] = products(q[b, h], l0, k[b, g], s0, ls, rs)
        for c in range(4):
            s = s0 + tx + c * SIDE
            if l < L and s < S:
                x, below = score(scores[c], bias, allowed, b, h, l, s, L, S, scale, softcap, left, right), lse[b, h, l]
                w[b, h, l, s] = real(0) if below == real(-math.inf) else math.exp(x - below)


def attention_weights(q, k, bias, allowed, lse, w, scale, softcap, left, right):
    if w.size:
        _weights[_grid(q, 1)[0], (SIDE, SIDE)](q, k, bias, allowed, lse, w, scale, softcap, left, right)


# delta[b, h, l] = sum of gy y: what every score's gradient loses to the denominator. A thread a query.
@gpu("real[:,:,:,:], real[:,:,:,:], real[:,:,:]")
def _delta(gy, y, delta):
    at, H, L = cuda.grid(1), y.shape[1], y.shape[2]
    if at < delta.size:
        b, h, l, total = at // (H * L), at // L % H, at % L, real(0)
        for e in range(y.shape[3]):
            total += gy[b, h, l, e] * y[b, h, l, e]
        delta[b, h, l] = total


# (weight after dropout, gradient of the score with its bias) from the two products of a pair; 0 for a hidden one.
@inline
def pair(x, gw, bias, allowed, lse, delta, b, h, l, s, H, L, S, scale, softcap, left, right, drop, keep_scale, seed):
    weight, gradient = real(0), real(0)
    y = score(x, bias, allowed, b, h, l, s, L, S, scale, softcap, left, right)
    if y != real(-math.inf) and lse[b, h, l] != real(-math.inf):
        p, kept = math.exp(y - lse[b, h, l]), keep(b, h, l, s, H, L, S, drop, keep_scale, seed)
        weight, gradient = p * kept, p * (gw * kept - delta[b, h, l])
    return weight, gradient


# The derivative of the score by the product.
@inline
def slope(x, scale, softcap):
    t = math.tanh(x * scale / softcap) if softcap > real(0) else real(0)
    return scale * (real(1) - t * t)


# Parallel over blocks of SIDE queries and chunks of D. Reads k and v once per block, writes gq once.
@gpu(
    "real[:,:,:,:], real[:,:,:,:], real[:,:,:,:], real[:,:,:,:], u8[:,:,:,:], real[:,:,:], real[:,:,:], real[:,:,:,:], "
    "real[:,:,:,:], real, real, i64, i64, i64, real, i64"
)
def _grad_query(q, k, v, bias, allowed, lse, delta, gy, gq, scale, softcap, left, right, drop, keep_scale, seed):
    ls = cuda.shared.array(ROWS, real)
    rs = cuda.shared.array(COLUMNS, real)
    gradients = cuda.shared.array(SCORES, real)
    acc = cuda.local.array(PARTS, real)
    x, gw = cuda.local.array(4, real), cuda.local.array(4, real)
    tx, ty = cuda.threadIdx.x, cuda.threadIdx.y
    H, L, G, S, D = q.shape[1], q.shape[2], k.shape[1], k.shape[2], q.shape[3]
    per_head = (L + SIDE - 1) // SIDE
    l0, h, b = cuda.blockIdx.x % per_head * SIDE, cuda.blockIdx.x // per_head % H, cuda.blockIdx.x // (per_head * H)
    g, l, first = h // (H // G), l0 + ty, cuda.blockIdx.y * CHUNK
    for j in range(PARTS):
        acc[j] = real(0)
    for s0 in range(max(l0 - left, 0) // TILE * TILE, min(l0 + SIDE + right, S), TILE):
        x[0], x[1], x[2], x[3] = products(q[b, h], l0, k[b, g], s0, ls, rs)
        gw[0], gw[1], gw[2], gw[3] = products(gy[b, h], l0, v[b, g], s0, ls, rs)
        for c in range(4):
            s = s0 + tx + c * SIDE
            gradient = pair(
                x[c], gw[c], bias, allowed, lse, delta, b, h, l, s, H, L, S, scale, softcap, left, right, drop, keep_scale, seed
            )[1]
            gradients[ty, tx + c * SIDE] = gradient * slope(x[c], scale, softcap) if gradient != real(0) else real(0)
        cuda.syncthreads()
        accumulate(gradients, k[b, g], s0, first, acc)
        cuda.syncthreads()
    for j in range(PARTS):
        d = first + tx + j * SIDE
        if l < L and d < D:
            gq[b, h, l, d] = acc[j]


# Parallel over blocks of SIDE keys and chunks of D and E; a block adds up all queries of all heads of its group. Rows are keys
# here, columns queries. Reads q and gy once per block, writes gk and gv once.
@gpu(
    "real[:,:,:,:], real[:,:,:,:], real[:,:,:,:], real[:,:,:,:], u8[:,:,:,:], real[:,:,:], real[:,:,:], real[:,:,:,:], "
    "real[:,:,:,:], real[:,:,:,:], real, real, i64, i64, i64, real, i64"
)
def _grad_keys(q, k, v, bias, allowed, lse, delta, gy, gk, gv, scale, softcap, left, right, drop, keep_scale, seed):
    ls = cuda.shared.array(ROWS, real)
    rs = cuda.shared.array(COLUMNS, real)
    weights = cuda.shared.array(SCORES, real)
    gradients = cuda.shared.array(SCORES, real)
    acc_k, acc_v = cuda.local.array(PARTS, real), cuda.local.array(PARTS, real)
    x, gw = cuda.local.array(4, real), cuda.local.array(4, real)
    tx, ty = cuda.threadIdx.x, cuda.threadIdx.y
    H, L, G, S, D, E = q.shape[1], q.shape[2], k.shape[1], k.shape[2], q.shape[3], v.shape[3]
    per_head = (S + SIDE - 1) // SIDE
    s0, g, b = cuda.blockIdx.x % per_head * SIDE, cuda.blockIdx.x // per_head % G, cuda.blockIdx.x // (per_head * G)
    s, first = s0 + ty, cuda.blockIdx.y * CHUNK
    for j in range(PARTS):
        acc_k[j], acc_v[j] = real(0), real(0)
    for h in range(g * (H // G), (g + 1) * (H // G)):
        for l0 in range(max(s0 - right, 0) // TILE * TILE, min(s0 + SIDE + left, L), TILE):
            x[0], x[1], x[2], x[3] = products(k[b, g], s0, q[b, h], l0, ls, rs)
            gw[0], gw[1], gw[2], gw[3] = products(v[b, g], s0, gy[b, h], l0, ls, rs)
            for c in range(4):
                l = l0 + tx + c * SIDE
                weight, gradient = real(0), real(0)
                if l < L:
                    weight, gradient = pair(
                        x[c], gw[c], bias, allowed, lse, delta,
                        b, h, l, s, H, L, S, scale, softcap, left, right, drop, keep_scale, seed,
                    )  # fmt: skip
                weights[ty, tx + c * SIDE] = weight
                gradients[ty, tx + c * SIDE] = gradient * slope(x[c], scale, softcap) if gradient != real(0) else real(0)
            cuda.syncthreads()
            accumulate(gradients, q[b, h], l0, first, acc_k)
            accumulate(weights, gy[b, h], l0, first, acc_v)
            cuda.syncthreads()
    for j in range(PARTS):
        d = first + tx + j * SIDE
        if s < S and d < D:
            gk[b, g, s, d] = acc_k[j]
        if s < S and d < E:
            gv[b, g, s, d] = acc_v[j]


def _deltas(gy, y):
    delta = cuda.device_array(y.shape[:3], y.dtype)
    if delta.size:
        _delta[blocks(delta.size, THREADS), THREADS](gy, y, delta)
    return delta


def attention_backward(q, k, v, bias, allowed, y, lse, gy, gq, gk, gv, scale, softcap, left, right, drop, keep_scale, seed):
    delta, options = _deltas(gy, y), (scale, softcap, left, right, drop, keep_scale, seed)
    D, E = q.shape[3], v.shape[3]
    if gq.size:
        _grad_query[_grid(q, D), (SIDE, SIDE)](q, k, v, bias, allowed, lse, delta, gy, gq, *options)
    if gk.size or gv.size:
        _grad_keys[_grid(k, max(D, E)), (SIDE, SIDE)](q, k, v, bias, allowed, lse, delta, gy, gk, gv, *options)


# A thread an element of the mask: it adds up all batches, heads and queries that share it. k and v are read along the keys.
@gpu(
    "real[:,:,:,:], real[:,:,:,:], real[:,:,:,:], real[:,:,:,:], u8[:,:,:,:], real[:,:,:], real[:,:,:], real[:,:,:,:], "
    "real[:,:,:,:], real, real, i64, i64, i64, real, i64"
)
def _grad_bias(q, k, v, bias, allowed, lse, delta, gy, gbias, scale, softcap, left, right, drop, keep_scale, seed):
    at, B, H, L, G, S = cuda.grid(1), q.shape[0], q.shape[1], q.shape[2], k.shape[1], k.shape[2]
    MB, MH, ML = gbias.shape[0], gbias.shape[1], gbias.shape[2]
    if at < gbias.size:
        mb, mh, ml, s = at // (MH * ML * S), at // (ML * S) % MH, at // S % ML, at % S
        total = real(0)
        for b in range(mb if MB > 1 else 0, mb + 1 if MB > 1 else B):
            for h in range(mh if MH > 1 else 0, mh + 1 if MH > 1 else H):
                g = h // (H // G)
                for l in range(ml if ML > 1 else 0, ml + 1 if ML > 1 else L):
                    x, gw = real(0), real(0)
                    for d in range(q.shape[3]):
                        x += q[b, h, l, d] * k[b, g, s, d]
                    for e in range(v.shape[3]):
                        gw += gy[b, h, l, e] * v[b, g, s, e]
                    total += pair(
                        x, gw, bias, allowed, lse, delta,
                        b, h, l, s, H, L, S, scale, softcap, left, right, drop, keep_scale, seed,
                    )[1]  # fmt: skip
        gbias[mb, mh, ml, s] = total


def attention_grad_bias(q, k, v, bias, y, lse, gy, gbias, scale, softcap, left, right, drop, keep_scale, seed):
    if gbias.size:
        delta, everything = _deltas(gy, y), cuda.device_array((0, 0, 0, 0), "u1")
        launch = _grad_bias[blocks(gbias.size, THREADS), THREADS]
        launch(q, k, v, bias, everything, lse, delta, gy, gbias, scale, softcap, left, right, drop, keep_scale, seed)


# A thread an element of y, in its order: coalesced writes, and reads in runs of D.
@gpu("real[:,:,:,:,:], real[:,:,:,:,:]")
def _move_heads(x, y):
    at, A, C, B, D = cuda.grid(1), y.shape[1], y.shape[2], y.shape[3], y.shape[4]
    if at < y.size:
        d, b, c, a, p = at % D, at // D % B, at // (D * B) % C, at // (D * B * C) % A, at // (D * B * C * A)
        y[p, a, c, b, d] = x[a, b, p, c, d]


def move_heads(x, y):
    if y.size:
        _move_heads[blocks(y.size, THREADS), THREADS](x, y)


# A thread a pair. Reads x once, writes y once.
@gpu("real[:,:,:], real[:,:], real[:,:], real[:,:,:], i32, i32")
def _rotary(x, cos, sin, y, interleaved, inverse):
    at, L, C = cuda.grid(1), cos.shape[0], cos.shape[1]
    if at < x.shape[0] * L * C:
        m, l, c = at // (L * C), at // C % L, at % C
        i, j = (2 * c, 2 * c + 1) if interleaved else (c, C + c)
        a, b, s = x[m, l, i], x[m, l, j], -sin[l, c] if inverse else sin[l, c]
        y[m, l, i] = a * cos[l, c] - b * s
        y[m, l, j] = a * s + b * cos[l, c]


def rotary(x, cos, sin, y, interleaved, inverse):
    if y.size:
        _rotary[blocks(y.size // 2, THREADS), THREADS](x, cos, sin, y, interleaved, inverse)
