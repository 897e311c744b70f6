"""Scaled dot-product attention, its gradients, and what stands around it.

Query head h reads the keys and values of head h // (H / G). Key s is hidden from query l where s < l - left, s > l + right,
`allowed` is 0 or `bias` is -inf; nothing of a hidden key or value, not even a NaN, reaches the query or its gradients. A
query with no key to read (or only scores of -inf) gives 0, its lse is -inf and its gradients are 0. Dropout drops the
weight of (b, h, l, s) where random24 of its place in [B, H, L, S] is below `drop`, and multiplies the others by keep_scale.
"""

import numpy as np

from ..spec import kernel
from .linear import random24


def _scores(q, k, bias, allowed, scale, softcap, left, right):
    """(scores, where they are hidden, derivative of the soft cap or 1), all [B, H, L, S] or broadcasting to it."""
    H, L, G, S = q.shape[1], q.shape[2], k.shape[1], k.shape[2]
    s = q @ np.repeat(k, H // G, axis=1).swapaxes(2, 3) * q.dtype.type(scale)
    slope = q.dtype.type(1)
    if softcap > 0:
        t = np.tanh(s / q.dtype.type(softcap))
        s, slope = t * q.dtype.type(softcap), 1 - t * t
    distance = np.arange(S) - np.arange(L)[:, None]
    hidden = np.broadcast_to((distance < -left) | (distance > right), s.shape)
    if allowed is not None:
        hidden = hidden | (allowed == 0)
    if bias is not None:
        hidden = hidden | np.isneginf(bias)
        s = s + bias
    return np.where(hidden, -np.inf, s).astype(q.dtype), hidden, slope


def _dropped(w, drop, keep_scale, seed):
    """What dropout multiplies the weights by."""
    if drop == 0:
        return w.dtype.type(1)
    kept = random24(np.arange(w.size, dtype=np.uint64), seed).reshape(w.shape) >= drop
    return kept * w.dtype.type(keep_scale)


def _product(w, hidden, x):
    """w x without the products of hidden pairs, so that a NaN behind one stays there."""
    odd = ~np.isfinite(x)
    y = np.where(hidden, 0, w) @ np.where(odd, 0, x)
    for b, h, s in np.unique(np.argwhere(odd)[:, :3], axis=0):
        y[b, h] += np.where(hidden[b, h, :, s, None], 0, w[b, h, :, s, None] * np.where(odd[b, h, s], x[b, h, s], 0))
    return y


def _per_group(x, G):
    """The sum over the query heads of each key head."""
    B, H, *rest = x.shape
    return x.reshape(B, G, H // G, *rest).sum(axis=2)


@kernel(
    "q[B,H,L,D]~, k[B,G,S,D]~, v[B,G,S,E]~, bias[MB,MH,ML,S]?, allowed[MB,MH,ML,S]?:u8 -> y[B,H,L,E]~, lse[B,H,L]",
    error="near:8+2*(D+S)**0.5",
    flops="2*B*H*L*S*(D+E)",
)
def attention(
    q, k, v, bias, allowed, y, lse,
    scale: float, softcap: float, left: int, right: int, drop: int, keep_scale: float, seed: int,
):  # fmt: skip
    """y = softmax(softcap tanh(q k^T scale / softcap) + bias) v, lse the logarithm of the softmax' denominator.

    softcap = 0: none. Source: Vaswani et al., Attention Is All You Need (2017), section 3.2.1; soft cap: Gemma 2 (2024).
    """
    with np.errstate(all="ignore"):
        s, hidden, _ = _scores(q, k, bias, allowed, scale, softcap, left, right)
        top = s.max(axis=3, keepdims=True, initial=-np.inf)
        top = np.where(np.isneginf(top), 0, top).astype(q.dtype)
        e = np.exp(s - top)
        total = e.sum(axis=3, keepdims=True)
        w = np.where(total == 0, 0, e / total).astype(q.dtype)
        lse[...] = (top + np.log(total))[..., 0]
        y[...] = _product(w * _dropped(w, drop, keep_scale, seed), hidden, np.repeat(v, q.shape[1] // v.shape[1], axis=1))


def _weights(s, hidden, lse):
    empty = np.isneginf(lse)[..., None]
    return np.where(hidden | empty, 0, np.exp(s - np.where(empty, 0, lse[..., None]))).astype(s.dtype)


@kernel(
    "q[B,H,L,D], k[B,G,S,D], bias[MB,MH,ML,S]?, allowed[MB,MH,ML,S]?:u8, lse[B,H,L] -> w[B,H,L,S]",
    error="near:8+2*(D+S)**0.5",
    flops="2*B*H*L*S*D",
)
def attention_weights(q, k, bias, allowed, lse, w, scale: float, softcap: float, left: int, right: int):
    """The weights that attention multiplies the values with, before dropout."""
    with np.errstate(all="ignore"):
        s, hidden, _ = _scores(q, k, bias, allowed, scale, softcap, left, right)
        w[...] = _weights(s, hidden, lse)


def _score_gradient(q, k, v, bias, allowed, y, lse, gy, scale, softcap, left, right, drop, keep_scale, seed):
    """(gradient of the scores with their bias, weights after dropout, hidden, derivative of the soft cap)."""
    s, hidden, slope = _scores(q, k, bias, allowed, scale, softcap, left, right)
    w = _weights(s, hidden, lse)
    kept = _dropped(w, drop, keep_scale, seed)
    gw = (gy @ np.repeat(v, q.shape[1] // v.shape[1], axis=1).swapaxes(2, 3)) * kept
    gs = np.where(hidden | np.isneginf(lse)[..., None], 0, w * (gw - (gy * y).sum(axis=3, keepdims=True)))
    return gs.astype(q.dtype), w * kept, hidden, slope


@kernel(
    "q[B,H,L,D], k[B,G,S,D], v[B,G,S,E], bias[MB,MH,ML,S]?, allowed[MB,MH,ML,S]?:u8, y[B,H,L,E], lse[B,H,L], gy[B,H,L,E]"
    " -> gq[B,H,L,D], gk[B,G,S,D], gv[B,G,S,E]",
    error="near:8+2*((D+E+S+L)*H)**0.5",
    flops="2*B*H*L*S*(3*D+2*E)",
)
def attention_backward(
    q, k, v, bias, allowed, y, lse, gy, gq, gk, gv,
    scale: float, softcap: float, left: int, right: int, drop: int, keep_scale: float, seed: int,
):  # fmt: skip
    """The gradients of attention by q, k and v; the weights are computed again from lse.

    Source: Dao et al., FlashAttention (2022), appendix B.
    """
    G, repeat = k.shape[1], q.shape[1] // k.shape[1]
    with np.errstate(all="ignore"):
        gs, w, hidden, slope = _score_gradient(
            q, k, v, bias, allowed, y, lse, gy, scale, softcap, left, right, drop, keep_scale, seed
        )
        hidden = hidden | np.isneginf(lse)[..., None]
        gs = np.where(hidden, 0, gs * slope * q.dtype.type(scale)).astype(q.dtype)
        gq[...] = _product(gs, hidden, np.repeat(k, repeat, axis=1))
        gk[...] = _per_group(_product(gs.swapaxes(2, 3), hidden.swapaxes(2, 3), q), G)
        gv[...] = _per_group(_product(w.swapaxes(2, 3), hidden.swapaxes(2, 3), gy), G)


@kernel(
    "q[B,H,L,D], k[B,G,S,D], v[B,G,S,E], bias[MB,MH,ML,S], y[B,H,L,E], lse[B,H,L], gy[B,H,L,E] -> gbias[MB,MH,ML,S]",
    error="near:8+2*((D+E)*B*H*L)**0.5",
    flops="2*B*H*L*S*(D+E)",
)
def attention_grad_bias(
    q, k, v, bias, y, lse, gy, gbias,
    scale: float, softcap: float, left: int, right: int, drop: int, keep_scale: float, seed: int,
):  # fmt: skip
    """The gradient of attention by its additive mask, summed where the mask was broadcast (MB, MH or ML is 1)."""
    with np.errstate(all="ignore"):
        gs = _score_gradient(q, k, v, bias, None, y, lse, gy, scale, softcap, left, right, drop, keep_scale, seed)[0]
        stretched = tuple(i for i in range(3) if bias.shape[i] == 1)
        gbias[...] = gs.sum(axis=stretched, keepdims=True)


@kernel("x[A,B,P,C,D] -> y[P,A,C,B,D]")
def move_heads(x, y):
    """The middle axes moved: [N, L, 3, H, D] -> [3, N, H, L, D] splits a projection into heads, [N, H, 1, L, D] merges them."""
    y[...] = x.transpose(2, 0, 3, 1, 4)


@kernel("x[M,L,2*C], cos[L,C], sin[L,C] -> y[M,L,2*C]", error="reduce:2", flops="6*M*L*C")
def rotary(x, cos, sin, y, interleaved: int, inverse: int):
    """Each pair (a, b) turned: (a cos - b sin, a sin + b cos), or back with inverse = 1. A pair is (c, C + c), or
    (2c, 2c + 1) with interleaved = 1.

    Source: Su et al., RoFormer (2021), section 3.2.2.
    """
    C = cos.shape[1]
    first, second = (slice(0, None, 2), slice(1, None, 2)) if interleaved else (slice(0, C), slice(C, None))
    with np.errstate(all="ignore"):
        a, b, s = x[..., first], x[..., second], -sin if inverse else sin
        y[..., first], y[..., second] = a * cos - b * s, a * s + b * cos
