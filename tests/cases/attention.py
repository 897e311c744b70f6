"""Attention, its gradients, and what stands around it."""

import numpy as np

from . import case


def bits(rng, shape, dtype):
    """A mask with a key that no query may read and, where there are several queries, one that may read nothing."""
    mask = rng.random(shape) > 0.4
    if shape[-1] > 1:
        mask[..., shape[-1] // 2] = False
    if shape[-2] > 1:
        mask[..., shape[-2] // 2, :] = False
    return mask


def additive(rng, shape, dtype):
    return np.where(bits(rng, shape, dtype), rng.standard_normal(shape), -np.inf)


def plain(id, B, H, L, S, D, E, G=None, mask=None, like=(0, 0, 0), **options):
    """A case of every attention kernel; `like` are MB, MH, ML of a mask ("bool" or "float")."""
    scalars = {
        "scale": 0.5 / D**0.5,
        "softcap": 0.0,
        "left": L + S,
        "right": L + S,
        "drop": 0,
        "keep_scale": 1.0,
        "seed": 0,
    } | options
    MB, MH, ML = like
    arrays = {"bias": additive if mask == "float" else None, "allowed": bits if mask == "bool" else None}
    return case(id, B=B, H=H, L=L, S=S, D=D, E=E, G=G or H, MB=MB, MH=MH, ML=ML, **arrays, **scalars)


DROP = {"drop": 5033165, "keep_scale": 10 / 7, "seed": 2**62 + 12345}

ATTENTION = [
    plain("one", 1, 1, 1, 1, 1, 1),
    plain("small", 1, 2, 3, 5, 4, 3),
    plain("causal", 1, 2, 5, 4, 4, 4, right=0),
    plain("bool", 1, 2, 4, 5, 3, 3, mask="bool", like=(1, 2, 4)),
    plain("padding", 2, 2, 3, 5, 3, 3, mask="bool", like=(2, 1, 1)),
    plain("float", 2, 1, 4, 5, 3, 3, mask="float", like=(1, 1, 4)),
    plain("groups", 1, 4, 3, 5, 4, 2, G=2),
    plain("options", 1, 2, 5, 6, 4, 4, softcap=1.5, left=2, right=1, **DROP),
    plain("decode", 2, 2, 1, 50, 4, 4),
    plain("no_keys", 1, 1, 3, 0, 2, 2),
    plain("tails", 1, 2, 67, 101, 19, 35),
    plain("causal_long", 1, 2, 150, 150, 16, 16, right=0),
    plain("causal_far", 1, 1, 300, 200, 8, 8, right=0),
    plain("window_long", 1, 1, 260, 300, 8, 8, left=30, right=5),
    plain("decode_long", 3, 4, 1, 700, 64, 64, G=2),
    plain("few_queries", 2, 4, 5, 300, 32, 32, G=1),
    plain("few_queries_wide", 1, 2, 5, 90, 70, 130),
    plain("masked_long", 2, 2, 70, 130, 16, 16, mask="bool", like=(2, 2, 70)),
    plain("biased_long", 2, 2, 70, 130, 16, 16, mask="float", like=(2, 1, 70), softcap=3.0),
    plain("dropped_long", 1, 2, 100, 220, 16, 16, **DROP),
    plain("wide_heads", 1, 2, 40, 60, 200, 130),
    plain("many", 4, 6, 64, 64, 32, 32),
]

BIASED = [
    plain("one", 1, 1, 1, 1, 1, 1, mask="float", like=(1, 1, 1)),
    plain("full", 2, 2, 3, 4, 3, 2, mask="float", like=(2, 2, 3)),
    plain("square", 2, 2, 3, 4, 3, 2, mask="float", like=(1, 1, 3), right=0),
    plain("padding", 2, 2, 3, 4, 3, 2, mask="float", like=(2, 1, 1), softcap=1.5),
    plain("dropped", 1, 2, 4, 4, 3, 2, mask="float", like=(1, 2, 4), G=1, **DROP),
    plain("large", 2, 3, 50, 70, 20, 10, mask="float", like=(2, 1, 50)),
]


def only(cases, *absent):
    """The cases without the values of arrays and scalars that a kernel does not have."""
    return [case(c.id, **{k: v for k, v in c.values.items() if k not in absent}) for c in cases]


# The gradients take any y, lse and gy: nothing in them depends on where those come from, as long as lse is of the right size.
def denominators(rng, shape, dtype):
    """Logarithms of denominators large enough that no weight is far above 1."""
    return 4 + rng.standard_normal(shape)


def with_lse(cases):
    return [case(c.id, lse=denominators, **c.values) for c in cases]


CASES = {
    "attention": ATTENTION,
    "attention_weights": only(with_lse(ATTENTION), "E", "drop", "keep_scale", "seed"),
    "attention_backward": with_lse(ATTENTION),
    "attention_grad_bias": with_lse(BIASED),
    "move_heads": [
        case("one", A=1, B=1, P=1, C=1, D=1),
        case("split", A=2, B=3, P=3, C=2, D=5),
        case("merge", A=2, B=4, P=1, C=7, D=3),
        case("large", A=4, B=70, P=3, C=8, D=33),
    ],
    "rotary": [
        case(f"{id}{'_interleaved' * interleaved}{'_inverse' * inverse}", M=M, L=L, C=C, interleaved=interleaved, inverse=inverse)
        for id, M, L, C in (("one", 1, 1, 1), ("small", 2, 3, 5), ("large", 12, 100, 37))
        for interleaved in (0, 1)
        for inverse in (0, 1)
    ],
}
