"""Attention, and what stands around it in a transformer."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from . import _check
from ._check import Call, op
from ._dispatch import takes_views
from .linear import drop_scalars, linear


def _results(y: Any, lse: Any, *weights: Any) -> Any:
    return (y, *weights) if weights else y


@op(repeats=True, strides=True, then=_results)
def scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    softcap: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    return_scores: bool = False,
    rng: Any = None,
    out: Any = None,
) -> Any:
    """For each query the mean of the values, weighted by the softmax of the scaled products of the query with the keys.

    Parameters
    ----------
    query : float[..., H, L, D]
        Axes before [L, D] broadcast against those of key and value.
    key : float[..., H, S, D]
    value : float[..., H, S, E]
    attn_mask : bool[..., L, S] or float[..., L, S], optional
        Broadcast to [..., L, S]. True: the query may read the key. Numbers are added to the scores; -inf hides a key as
        False does.
    dropout_p : float
        The probability with which a weight is dropped, in [0, 1]. Unlike a module, a function always drops.
    is_causal : bool
        True hides key s from query l where s > l (also with a mask, and when L and S differ).
    scale : float, optional
        What the products are multiplied by; 1 / sqrt(D) when not given.
    enable_gqa : bool
        True: key and value have fewer heads (axis -3); query head h reads head h // (H / their heads).
    softcap : float, optional
        The scores become softcap tanh(score / softcap), before the mask.
    window : (left, right), optional
        Hides key s from query l outside l - left <= s <= l + right; None or -1 sets no limit on that side.
    return_scores : bool
        True: the result is (result, weights[..., H, L, S]), the weights before dropout. Has no gradient.
    rng : numpy.random.Generator or seed, optional
        What dropout draws from; the same seed drops the same weights on every backend.
    out : array, optional
        Where the result goes; may overlap an input.

    Returns
    -------
    float[..., H, L, E]
        0 for a query with no key to read. Nothing of a hidden key or value reaches it, not even a NaN.

    Raises
    ------
    TypeError, ValueError
        Element types that are no floats (a mask: neither float nor bool); shapes that do not fit; options out of range.

    Notes
    -----
    Memory is linear in the length: the L x S scores are never stored, and the gradient computes them again.
    Heads of a projection (`x.reshape(N, L, H, D).swapaxes(1, 2)`) are read where they lie by the C kernels, and the result then
    lies in memory as the query does: swapping the axes back and reshaping to [N, L, H * E] copies nothing.
    Source: Vaswani et al., Attention Is All You Need (2017), section 3.2.1; Dao et al., FlashAttention (2022).

    Examples
    --------
    >>> import numpy as np, hotloops as hl
    >>> q, k, v = np.zeros((1, 4)), np.ones((2, 4)), np.array([[1.0], [3.0]])
    >>> hl.scaled_dot_product_attention(q, k, v)
    array([[2.]])
    """
    if _check.flag(_NAME, "return_scores", return_scores) and out is not None:
        raise ValueError(f"{_NAME}: out cannot be given with return_scores, which has two results")
    a = _Attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, softcap, window, rng, out)
    y, lse = a.forward()
    return (y, lse, a.weights(lse)) if return_scores else (y, lse)


_NAME = "scaled_dot_product_attention"


class _Attention:
    """One checked call: its arrays as the kernels read them, q [B, H, L, D], k [B, G, S, D], v [B, G, S, E]."""

    def __init__(
        self,
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any,
        dropout_p: Any,
        is_causal: Any,
        scale: Any,
        enable_gqa: Any,
        softcap: Any,
        window: Any,
        rng: Any,
        out: Any = None,
    ):
        _check.needed(_NAME, query=query, key=key, value=value)
        self.call = call = Call(_NAME, out)
        mask = attn_mask
        if mask is not None and not _check.is_device(mask):
            mask = _check.host_array(_NAME, "attn_mask", mask)
        hides = mask is not None and np.dtype(mask.dtype).kind == "b"
        q, k, v, bias = call.floats(query=query, key=key, value=value, attn_mask=None if hides else mask, kernel="attention")
        mask = call.booleans("attn_mask", mask) if hides else bias
        self._shapes(q, k, v, _check.flag(_NAME, "enable_gqa", enable_gqa))
        self.mask_shape = None if mask is None else tuple(mask.shape)
        mask = self._mask(mask)
        self.bias: Any = None if hides else mask
        self.allowed: Any = mask if hides else None
        L, S, D = self.q.shape[2], self.k.shape[2], self.q.shape[3]
        left, right = self._window(window, L + S)
        if _check.flag(_NAME, "is_causal", is_causal):
            right = 0
        p = _check.number(_NAME, "dropout_p", dropout_p, 0.0, 1.0)
        drop, keep_scale = drop_scalars(p)
        call.once = drop > 0
        self.scores = {
            "scale": 1 / math.sqrt(max(D, 1)) if scale is None else _check.number(_NAME, "scale", scale),
            "softcap": 0.0 if softcap in (None, math.inf) else _check.number(_NAME, "softcap", softcap, 0.0),
            "left": left,
            "right": right,
        }
        self.dropout = {"drop": drop, "keep_scale": keep_scale, "seed": _check.seed(_NAME, rng) if drop else 0}

    def _shapes(self, q: Any, k: Any, v: Any, grouped: bool) -> None:
        shapes = [tuple(x.shape) for x in (q, k, v)]
        came = f"{_NAME}: query {shapes[0]}, key {shapes[1]}, value {shapes[2]} came"
        if min(map(len, shapes)) < (3 if grouped else 2):
            raise ValueError(f"{came}; {'[..., H, L, D]' if grouped else '[..., L, D]'} is needed")
        (*lead_q, L, D), (*lead_k, S, D2), (*lead_v, S2, E) = shapes
        if D != D2:
            raise ValueError(f"{came}; query and key need the same last size")
        if S != S2:
            raise ValueError(f"{came}; key and value need the same length")
        if not grouped:  # heads broadcast like any other axis; a single head of key and value is a group
            lead_q, lead_k, lead_v = ([1] * (1 - len(x)) + x for x in (lead_q, lead_k, lead_v))
        H, G = lead_q[-1], lead_k[-1]
        try:
            batch = np.broadcast_shapes(*(tuple(x[:-1]) for x in (lead_q, lead_k, lead_v)))
            if not grouped:
                [H] = np.broadcast_shapes(*(tuple(x[-1:]) for x in (lead_q, lead_k, lead_v)))
                G = 1 if G == lead_v[-1] == 1 else H
        except ValueError:
            raise ValueError(f"{came}; their leading axes do not broadcast") from None
        if grouped and (lead_v[-1] != G or (H % G if G else H)):
            raise ValueError(f"{came}; the heads of query (axis -3) must be a multiple of those of key and value")
        self.batch, self.heads, B = batch, H, math.prod(batch)
        self.inputs = shapes  # as they came, then as broadcasting makes them
        self.full = [(*batch, H, L, D), (*batch, G, S, D), (*batch, G, S, E)]
        # How the lead of an input is written before it is broadcast: with an axis for the heads.
        self.reshaped = [(*lead, *x[-2:]) for lead, x in zip((lead_q, lead_k, lead_v), shapes, strict=True)]
        lead = (*batch, H) if max(map(len, shapes)) > 2 else ()
        self.result, self.weights_shape = (*lead, L, E), (*lead, L, S)
        self.q, self.k, self.v = (
            self.call.expand(x.reshape(as_read), full).reshape((B, *full[-3:]))
            for x, as_read, full in zip((q, k, v), self.reshaped, self.full, strict=True)
        )

    def _mask(self, mask: Any) -> Any:
        """[MB, MH, ML, S] with MB, MH, ML full or 1."""
        if mask is None:
            return None
        full = (*self.batch, self.heads, *self.weights_shape[-2:])
        shape = (1,) * (len(full) - mask.ndim) + tuple(mask.shape)
        if len(shape) != len(full) or any(m not in (1, n) for m, n in zip(shape, full, strict=True)):
            raise ValueError(f"{_NAME}: attn_mask has the shape {tuple(mask.shape)}, it must broadcast to {self.weights_shape}")
        lead = (1,) * len(self.batch) if math.prod(shape[:-3]) == 1 else self.batch
        self.mask_reshaped, self.mask_full = shape, (*lead, *shape[-3:-1], full[-1])
        wide = self.call.expand(mask.reshape(shape), self.mask_full)
        return wide.reshape((math.prod(lead), *self.mask_full[-3:]))

    def _window(self, window: Any, unlimited: int) -> tuple[int, int]:
        if window is None:
            return unlimited, unlimited
        if not isinstance(window, tuple | list) or len(window) != 2:
            raise ValueError(f"{_NAME}: window must be (left, right), {_check.shown(window)} came")
        sides = [unlimited if n is None else _check.integer(_NAME, "window", n, -1) for n in window]
        left, right = (unlimited if n == -1 else min(n, unlimited) for n in sides)
        return left, right

    def forward(self) -> tuple[Any, Any]:
        call, q = self.call, self.q
        (B, H, L, _), E = q.shape, self.v.shape[3]
        if call.out is None and isinstance(q, np.ndarray) and q.strides[1] < q.strides[2] and min(H, L) > 1:
            self.y = call.empty((B, L, H, E)).transpose(0, 2, 1, 3)  # rows of all heads, as the queries are
            y = self.y.reshape(self.result)
        else:
            y = call.result(self.result)
            self.y = y.reshape((B, H, L, E))
        lse = call.empty((B, H, L))
        call.run("attention", q, self.k, self.v, self.bias, self.allowed, self.y, lse, **self.scores, **self.dropout)
        self.lse = lse
        return call.finish(y), lse

    def weights(self, lse: Any) -> Any:
        q, k = self.call.whole(self.q), self.call.whole(self.k)
        w = self.call.empty((*q.shape[:3], k.shape[2]))
        self.call.run("attention_weights", q, k, self.bias, self.allowed, lse, w, **self.scores)
        return self.call.finish(w.reshape(self.weights_shape))

    def backward(self, g: Any, needs: set[str]) -> tuple[Any, ...]:
        call = self.call
        arrays, options = [call.whole(x) for x in (self.q, self.k, self.v)], {**self.scores, **self.dropout}
        [gy] = call.more_floats(gy=g)
        gy, y = gy.reshape(self.y.shape), call.whole(self.y)
        grads: list[Any] = [None, None, None]
        if needs - {"attn_mask"}:
            grads = [call.empty(x.shape) for x in arrays]
            call.run("attention_backward", *arrays, self.bias, self.allowed, y, self.lse, gy, *grads, **options)
            grads = [
                call.collapse(x.reshape(full), as_read).reshape(shape)
                for x, full, as_read, shape in zip(grads, self.full, self.reshaped, self.inputs, strict=True)
            ]
        if "attn_mask" in needs:
            gb = call.empty(self.bias.shape)
            call.run("attention_grad_bias", *arrays, self.bias, y, self.lse, gy, gb, **options)
            grads.append(call.collapse(gb.reshape(self.mask_full), self.mask_reshaped).reshape(self.mask_shape))
        else:
            grads.append(None)
        return tuple(x if x is None else call.finish(x) for x in grads)


def _attention_forward(a: Any) -> tuple[Any, Any]:
    if _check.flag(_NAME, "return_scores", a.return_scores):
        raise TypeError(f"{_NAME}: return_scores has no gradient: call it on plain arrays (variable.value)")
    arrays, options = (a.query, a.key, a.value, a.attn_mask), (a.is_causal, a.scale, a.enable_gqa, a.softcap, a.window)
    kinds = {x.dtype if type(x) is np.ndarray else None for x in arrays[:3]}
    if kinds in ({np.dtype(np.float32)}, {np.dtype(np.float64)}) and "attn_mask" not in a.needs and a.dropout_p == 0:
        y, lse = _attend(*arrays, *options)
        return y, (y, lse, *options)
    attention = _Attention(*arrays[:4], a.dropout_p, *options, a.rng)
    return attention.forward()[0], attention


def _attention_gradient(g: Any, saved: Any, a: Any) -> tuple[Any, ...]:
    if isinstance(saved, _Attention):
        return saved.backward(g, a.needs)
    return (*_attend_back(g, a.query, a.key, a.value, a.attn_mask, *saved), None)


@op(repeats=True, strides=True)
def _attend(
    query: Any, key: Any, value: Any, attn_mask: Any, causal: Any, scale: Any, grouped: Any, softcap: Any, window: Any
) -> tuple[Any, Any]:
    """(the result, the logarithms of the sums), without dropout."""
    return _Attention(query, key, value, attn_mask, 0.0, causal, scale, grouped, softcap, window, None).forward()


@op(repeats=True, strides=True)
def _attend_back(
    g: Any,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any,
    y: Any,
    lse: Any,
    causal: Any,
    scale: Any,
    grouped: Any,
    softcap: Any,
    window: Any,
) -> tuple[Any, Any, Any]:
    """The gradients by query, key and value, from what `_attend` returned."""
    attention = _Attention(query, key, value, attn_mask, 0.0, causal, scale, grouped, softcap, window, None)
    attention.y, attention.lse = y.reshape((*attention.q.shape[:3], attention.v.shape[3])), lse
    return attention.backward(g, {"query", "key", "value"})[:3]


# ------------------------------------------------------------------------------------------------------------ many heads


def multi_head_attention(
    query: Any,
    key: Any,
    value: Any,
    num_heads: int,
    in_proj_weight: Any,
    in_proj_bias: Any,
    out_proj_weight: Any,
    out_proj_bias: Any,
    *,
    attn_mask: Any = None,
    is_causal: bool = False,
) -> Any:
    """The queries after attention in several heads: projections, scaled dot-product attention, one more projection.

    Parameters
    ----------
    query : float[N, L, D]
        Or [L, D], and key and value likewise.
    key, value : float[N, S, D]
        The same array three times is self-attention, and projects once.
    num_heads : int
        D must be a multiple of it.
    in_proj_weight : float[3 * D, D]
        The rows that make queries, keys, values.
    in_proj_bias : float[3 * D] or None
    out_proj_weight : float[D, D]
    out_proj_bias : float[D] or None
    attn_mask, is_causal
        As in `scaled_dot_product_attention`, where the scores are [N, num_heads, L, S].

    Returns
    -------
    float[N, L, D]

    Raises
    ------
    TypeError, ValueError
        Element types that are no floats; sizes that do not fit; D no multiple of num_heads.

    Notes
    -----
    Source: Vaswani et al., Attention Is All You Need (2017), section 3.2.2.

    Examples
    --------
    >>> import numpy as np, hotloops as hl
    >>> x, w = np.ones((1, 3, 4)), np.ones((12, 4))
    >>> hl.multi_head_attention(x, x, x, 2, w, None, np.eye(4), None).shape
    (1, 3, 4)
    """
    name = "multi_head_attention"
    given = {"query": query, "key": key, "value": value, "in_proj_weight": in_proj_weight, "out_proj_weight": out_proj_weight}
    _check.needed(name, **given)
    given |= {"in_proj_bias": in_proj_bias, "out_proj_bias": out_proj_bias}
    arrays = {}
    for n, x in given.items():
        plain = x is not None and not isinstance(x, _check.autograd.Variable) and not _check.is_device(x)
        arrays[n] = _check.host_array(name, n, x) if plain else x
        if x is not None and np.dtype(arrays[n].dtype).kind != "f":
            raise TypeError(f"{name}: {n} has the element type {arrays[n].dtype}, float16, float32 or float64 is needed")
    half = all(x is None or x.dtype == np.float16 and hasattr(x, "astype") for x in arrays.values())
    if half:  # one rounding, at the end
        arrays = {n: x if x is None else x.astype(np.float32) for n, x in arrays.items()}
    w, b, w_out, b_out = (arrays[n] for n in ("in_proj_weight", "in_proj_bias", "out_proj_weight", "out_proj_bias"))
    inputs = [arrays[n] for n in ("query", "key", "value")]
    shapes = [tuple(x.shape) for x in inputs]
    heads = _check.integer(name, "num_heads", num_heads, 1)
    came = f"{name}: query {shapes[0]}, key {shapes[1]}, value {shapes[2]} came with {heads} heads"
    if len(set(map(len, shapes))) > 1 or len(shapes[0]) not in (2, 3):
        raise ValueError(f"{came}; [N, L, D], or [L, D], is needed for all three")
    D = shapes[0][-1]
    if D % heads or any(s[-1] != D for s in shapes):
        raise ValueError(f"{came}; one last size, a multiple of the heads, is needed")
    for x, n, shape in ((w, "in_proj_weight", (3 * D, D)), (b, "in_proj_bias", (3 * D,)), (b_out, "out_proj_bias", (D,))):
        if x is not None and tuple(x.shape) != shape:
            raise ValueError(f"{name}: {n} has the shape {tuple(x.shape)}, {shape} is needed")
    if tuple(w_out.shape) != (D, D):
        raise ValueError(f"{name}: out_proj_weight has the shape {tuple(w_out.shape)}, {(D, D)} is needed")
    if query is key and query is value:
        q, k, v = _split_heads(linear(inputs[0], w, b), 3, heads)
    else:
        parts = [slice(i * D, (i + 1) * D) for i in range(3)]
        q, k, v = (
            _split_heads(linear(x, w[p], None if b is None else b[p]), 1, heads)[0] for x, p in zip(inputs, parts, strict=True)
        )
    z = scaled_dot_product_attention(q, k, v, attn_mask, 0.0, is_causal)
    y = linear(_merge_heads(z), w_out, b_out)
    return y.astype(np.float16) if half else y


@op
def _split_heads(input: Any, parts: int, heads: int) -> Any:
    """[N, L, parts * heads * D] as `parts` arrays [N, heads, L, D] ([L, ...] as [heads, L, D])."""
    call = Call("multi_head_attention")
    [x] = call.floats(input=input)
    N, L, D = math.prod(x.shape[:-2]), x.shape[-2], x.shape[-1] // (parts * heads)
    if isinstance(x, np.ndarray) and call.dtype == x.dtype and takes_views("attention", x.dtype):
        return tuple(np.moveaxis(x.reshape((*x.shape[:-1], parts, heads, D)), (-3, -2), (0, -3)))
    y = call.empty((parts, *x.shape[:-2], heads, L, D))
    call.run("move_heads", x.reshape((N, L, parts, heads, D)), y.reshape((parts, N, heads, L, D)))
    y = call.finish(y)
    return tuple(y[i] for i in range(parts))


def _split_heads_gradient(g: Any, y: Any, a: Any) -> tuple[Any, ...]:
    merged = [_merge_heads(x) for x in g]
    return (merged[0] if len(merged) == 1 else np.concatenate(merged, axis=-1),)


@op
def _merge_heads(input: Any) -> Any:
    """[N, heads, L, D] as [N, L, heads * D]."""
    *lead, H, L, D = input.shape
    if isinstance(input, np.ndarray) and (rows := input.swapaxes(-2, -3)).flags.c_contiguous:
        return rows.reshape((*lead, L, H * D))
    call = Call("multi_head_attention")
    [x] = call.floats(input=input)
    N = math.prod(lead)
    y = call.empty((*lead, L, H * D))
    call.run("move_heads", x.reshape((N, H, 1, L, D)), y.reshape((1, N, L, H, D)))
    return call.finish(y)


def _merge_heads_gradient(g: Any, y: Any, a: Any) -> tuple[Any, ...]:
    return (_split_heads(g, 1, a.input.shape[-3])[0],)


# ------------------------------------------------------------------------------------------------------------- positions


def positional_encoding(length: int, dim: int, *, base: float = 10000.0, dtype: Any = np.float32) -> np.ndarray:
    """Sines and cosines that tell positions apart: [p, 2i] = sin(p / base^(2i / dim)), [p, 2i + 1] the cosine of the same.

    Parameters
    ----------
    length : int
        The positions 0 to length - 1.
    dim : int
        The size of an encoding.
    base : float
        Positive; the longest wave is 2 pi base.
    dtype : float type

    Returns
    -------
    float[length, dim]

    Raises
    ------
    TypeError, ValueError
        Negative sizes; a base that is not positive; a dtype that is no float.

    Notes
    -----
    Source: Vaswani et al., Attention Is All You Need (2017), section 3.5.

    Examples
    --------
    >>> import hotloops as hl
    >>> hl.positional_encoding(2, 4).round(2)
    array([[0.  , 1.  , 0.  , 1.  ],
           [0.84, 0.54, 0.01, 1.  ]], dtype=float32)
    """
    name = "positional_encoding"
    length, dim = _check.integer(name, "length", length, 0), _check.integer(name, "dim", dim, 0)
    base = _check.number(name, "base", base, 0.0)
    try:
        dtype = np.dtype(dtype)
    except TypeError:
        raise TypeError(f"{name}: dtype must be a float type, {_check.shown(dtype)} came") from None
    if base == 0 or math.isinf(base) or dtype not in _check.FLOATS:
        raise ValueError(f"{name}: base must be positive and finite and dtype a float type, {base} and {dtype} came")
    _check.size(name, "the result", (length, dim), 8)
    angles = np.arange(length)[:, None] / base ** (np.arange(0, dim, 2) / max(dim, 1))
    result = np.empty((length, dim), dtype)
    result[:, 0::2] = np.sin(angles)
    result[:, 1::2] = np.cos(angles[:, : dim // 2])
    return result


@op(repeats=True)
def rotary_embedding(x: Any, cos: Any, sin: Any, *, interleaved: bool = False, out: Any = None) -> Any:
    """The input with each pair (a, b) of its last axis turned by the angle of its position: (a cos - b sin, a sin + b cos).

    Parameters
    ----------
    x : float[..., L, D]
        D even.
    cos, sin : float[L, D / 2]
        Cosine and sine of the angle of position l in pair c.
    interleaved : bool
        False: a pair is (c, D / 2 + c). True: it is (2c, 2c + 1).
    out : array, optional
        Where the result goes: the shape of x; may overlap it.

    Returns
    -------
    float[..., L, D]

    Raises
    ------
    TypeError, ValueError
        Element types that are no floats; shapes that do not fit. The tables cos and sin have no gradient.

    Notes
    -----
    Source: Su et al., RoFormer (2021), section 3.2.2.

    Examples
    --------
    >>> import numpy as np, hotloops as hl
    >>> hl.rotary_embedding(np.array([[1.0, 2.0]]), np.array([[0.0]]), np.array([[1.0]]))
    array([[-2.,  1.]])
    """
    return _rotate(x, cos, sin, interleaved, 0, out)


def _rotate(x: Any, cos: Any, sin: Any, interleaved: Any, inverse: int, out: Any = None) -> Any:
    name = "rotary_embedding"
    _check.needed(name, x=x, cos=cos, sin=sin)
    call = Call(name, out)
    x, cos, sin = call.floats(x=x, cos=cos, sin=sin)
    if x.ndim < 2 or x.shape[-1] % 2:
        raise ValueError(f"{name}: x has the shape {tuple(x.shape)}, [..., L, D] with an even D is needed")
    L, D = x.shape[-2:]
    for table, what in ((cos, "cos"), (sin, "sin")):
        if tuple(table.shape) != (L, D // 2):
            raise ValueError(f"{name}: {what} has the shape {tuple(table.shape)}, {(L, D // 2)} is needed for x {tuple(x.shape)}")
    y, rows = call.result(x.shape), (math.prod(x.shape[:-2]), L, D)
    interleaved = int(_check.flag(name, "interleaved", interleaved))
    call.run("rotary", x.reshape(rows), cos, sin, y.reshape(rows), interleaved=interleaved, inverse=inverse)
    return call.finish(y)


def _rotary_gradient(g: Any, y: Any, a: Any) -> tuple[Any, ...]:
    return (_rotate(g, a.cos, a.sin, a.interleaved, 1),)


def causal_mask(L: int, S: int | None = None) -> np.ndarray:
    """True where query l may read key s of a causal attention: s <= l.

    Parameters
    ----------
    L : int
        Queries.
    S : int, optional
        Keys; as many as queries when not given.

    Returns
    -------
    bool[L, S]

    Raises
    ------
    TypeError, ValueError
        Negative sizes.

    Examples
    --------
    >>> import hotloops as hl
    >>> hl.causal_mask(2, 3)
    array([[ True, False, False],
           [ True,  True, False]])
    """
    L = _check.integer("causal_mask", "L", L, 0)
    S = L if S is None else _check.integer("causal_mask", "S", S, 0)
    _check.size("causal_mask", "the result", (L, S), 1)
    return np.arange(S) <= np.arange(L)[:, None]
