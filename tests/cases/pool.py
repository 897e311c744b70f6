"""Pooling. `over` lays windows over an input and fills in every size and scalar that a kernel's record asks for."""

import numpy as np

from hotloops.kernels import spec

from . import Case

AXES = ("d", "h", "w")
BEFORE, AFTER = ("pad_front", "pad_top", "pad_left"), ("pad_back", "pad_bottom", "pad_right")


def three(values, fill):
    values = values if isinstance(values, tuple) else (values,)
    return (fill,) * (3 - len(values)) + values


def over(kernel, id, M, sizes, size, stride=None, pad=0, after=None, dilation=1, ceil=False, **more):
    """A case of that kernel: windows of `size` taps over M planes of `sizes`, of which the record takes what it names."""
    sizes, size = three(sizes, 1), three(size, 1)
    stride = size if stride is None else three(stride, 1)
    before, dilation = three(pad, 0), three(dilation, 1)
    after = before if after is None else three(after, 0)
    values = {"M": M, "D": sizes[0], "H": sizes[1], "W": sizes[2], "count_include_pad": 1, "divisor": 0, "norm": 2.0}
    for a, n, k, s, p, q, d in zip(AXES, sizes, size, stride, before, after, dilation, strict=True):
        room = n + p + q - (k - 1) * d - 1
        windows = (-(-room // s) if ceil else room // s) + 1
        if ceil and (windows - 1) * s >= n + p:
            windows -= 1
        values |= {f"O{a.upper()}": windows, f"kernel_{a}": k, f"stride_{a}": s, f"dilation_{a}": d}
    values |= dict(zip(BEFORE, before, strict=True)) | dict(zip(AFTER, after, strict=True)) | more
    record = spec.find(kernel)
    wanted = {*record.dims, *(s.name for s in record.scalars), *(a.name for a in record.arrays)}
    return Case(id, {name: value for name, value in values.items() if name in wanted})


GEOMETRIES = [
    ("one", {"M": 1, "sizes": 1, "size": 1}),
    ("no_planes", {"M": 0, "sizes": (4, 4), "size": (2, 2)}),
    ("pairs", {"M": 3, "sizes": (6, 8), "size": (2, 2)}),
    ("pairs_wide", {"M": 2, "sizes": (4, 140), "size": (2, 2)}),
    ("pairs_odd", {"M": 2, "sizes": (5, 71), "size": (2, 2)}),
    ("pairs_ceil", {"M": 2, "sizes": (5, 37), "size": (2, 2), "ceil": True}),
    ("pairs_below_padding", {"M": 2, "sizes": (6, 40), "size": (3, 2), "stride": (2, 2), "pad": (1, 0)}),
    ("pairs_of_slices", {"M": 2, "sizes": (3, 6, 38), "size": (2, 2, 2), "pad": (1, 0, 0)}),
    ("stem", {"M": 2, "sizes": (9, 75), "size": (3, 3), "stride": (2, 2), "pad": (1, 1)}),
    ("stem_ceil", {"M": 2, "sizes": (8, 40), "size": (3, 3), "stride": (2, 2), "pad": (1, 1), "ceil": True}),
    ("same", {"M": 2, "sizes": (6, 50), "size": (3, 3), "stride": (1, 1), "pad": (1, 1)}),
    ("triples", {"M": 2, "sizes": (7, 66), "size": (3, 3)}),
    ("uneven", {"M": 2, "sizes": (5, 9), "size": (2, 3), "stride": (1, 2), "pad": (0, 1), "after": (1, 0)}),
    ("gaps", {"M": 2, "sizes": (4, 45), "size": (1, 2), "stride": (2, 3)}),
    ("rows_apart", {"M": 2, "sizes": (9, 50), "size": (2, 3), "stride": (3, 2), "pad": (1, 1)}),
    ("dilated", {"M": 2, "sizes": (9, 40), "size": (3, 2), "stride": (1, 1), "pad": (1, 1), "dilation": (2, 3)}),
    ("dilated_stride", {"M": 2, "sizes": (8, 61), "size": (2, 3), "stride": (2, 2), "dilation": (3, 2)}),
    ("large_window", {"M": 2, "sizes": (20, 18), "size": (15, 17), "stride": (2, 1), "pad": (3, 2)}),
    ("more_padding_than_map", {"M": 2, "sizes": (22, 2), "size": (7, 6), "stride": (2, 1), "pad": (3, 3)}),
    ("far_apart", {"M": 2, "sizes": (19, 75), "size": (3, 5), "stride": (4, 3), "pad": (1, 2), "ceil": True}),
    ("whole", {"M": 3, "sizes": (7, 7), "size": (7, 7)}),
    *[
        (f"apart_{k}", {"M": 3, "sizes": (4, W), "size": (2, K), "stride": (2, k), "pad": (0, p), "dilation": (1, d)})
        for k, K, W, p, d in (
            (3, 3, 100, 1, 1),
            (4, 4, 132, 0, 1),
            (4, 7, 90, 3, 2),
            (5, 5, 171, 2, 1),
            (5, 1, 83, 0, 1),
            (6, 6, 97, 0, 1),
        )
    ],
    ("overhang", {"M": 2, "sizes": (1, 2), "size": (2, 3), "stride": (2, 3), "ceil": True}),
    ("line", {"M": 3, "sizes": 53, "size": 4, "stride": 3, "pad": 2}),
    ("line_long", {"M": 2, "sizes": 300, "size": 5, "stride": 1, "pad": 2}),
    ("line_in_turns", {"M": 2, "sizes": 403, "size": 7, "stride": 3, "pad": 2}),
    ("line_in_turns_dilated", {"M": 2, "sizes": 403, "size": 4, "stride": 3, "pad": 2, "dilation": 2}),
    ("line_of_wide_windows", {"M": 2, "sizes": 300, "size": 140, "stride": 1, "pad": 5}),
    ("volume", {"M": 2, "sizes": (4, 5, 19), "size": (2, 3, 3), "stride": (1, 2, 2), "pad": (1, 1, 1)}),
    ("volume_dilated", {"M": 1, "sizes": (5, 4, 6), "size": (2, 2, 2), "stride": (1, 1, 1), "dilation": (2, 1, 3)}),
    ("tiny_windows", {"M": 40, "sizes": (3, 2), "size": (2, 2), "stride": (1, 1)}),
    *[(f"short_{W}", {"M": 5, "sizes": (4, W), "size": (3, 3), "stride": (1, 1), "pad": (1, 1)}) for W in (3, 4, 7, 8, 15, 16, 31)],
    ("short", {"M": 17, "sizes": (7, 13), "size": (3, 3), "stride": (2, 2), "pad": (1, 1)}),
    ("short_pairs", {"M": 6, "sizes": (7, 13), "size": (2, 2)}),
    ("short_wide_window", {"M": 4, "sizes": (9, 13), "size": (9, 13), "stride": (1, 1), "pad": (4, 6)}),
    ("many", {"M": 190, "sizes": (28, 36), "size": (2, 2)}),
    ("many_short", {"M": 700, "sizes": (14, 14), "size": (3, 3), "stride": (2, 2), "pad": (1, 1)}),
    ("many_overlapping", {"M": 90, "sizes": (22, 33), "size": (3, 3), "stride": (2, 2), "pad": (1, 1)}),
]
UNPADDED = [(id, g) for id, g in GEOMETRIES if "pad" not in g]


def strewn(*values):
    """Small integers, with many equal ones among them, and these values strewn in."""

    def fill(rng, shape, dtype):
        x = rng.integers(-2, 3, shape).astype(dtype)
        for value in values:
            x[rng.random(shape) < 0.15] = value
        return x

    return fill


def constant(value):
    return lambda rng, shape, dtype: np.full(shape, value, dtype)


SPECIAL = [
    ("nan", strewn(np.nan)),
    ("infinite", strewn(np.inf, -np.inf)),
    ("everything", strewn(np.nan, np.inf, -np.inf, -0.0)),
    ("all_nan", constant(np.nan)),
    ("all_minus_infinity", constant(-np.inf)),
    ("equal", constant(1.5)),
    ("lowest", strewn(-np.finfo(np.float32).max)),
]
SPECIAL_GEOMETRIES = [g for g in GEOMETRIES if g[0] in ("pairs_odd", "stem", "short", "dilated", "volume", "line")]


def max_pool_cases():
    results = {"all": {}, "values": {"indices": None, "offsets": None}, "offsets": {"indices": None}, "indices": {"offsets": None}}
    for id, g in GEOMETRIES:
        for kind in ("all", "values", "offsets"):
            yield over("max_pool", f"{id}-{kind}", **g, **results[kind])
    for id, x in SPECIAL:
        for name, g in SPECIAL_GEOMETRIES:
            for kind in ("all", "values"):
                yield over("max_pool", f"{id}-{name}-{kind}", **g, **results[kind], x=x)
    more_taps = {"M": 2, "sizes": (19, 20), "size": (17, 17), "stride": (1, 1)}
    yield over("max_pool", "more_than_256_taps", **more_taps, **results["indices"])


def max_pool_offsets(values):
    """Offsets that max_pool wrote for an input with many equal elements."""

    def fill(rng, shape, dtype):
        names = [s.name for s in spec.find("max_pool").scalars]
        x = rng.integers(-2, 3, tuple(values[n] for n in ("M", "D", "H", "W"))).astype(np.float64)
        y, offsets = np.empty(shape), np.empty(shape, np.uint8)
        spec.find("max_pool").reference(x, y, None, offsets, **{n: values[n] for n in names})
        return offsets

    return fill


def max_pool_backward_cases():
    for id, g in GEOMETRIES:
        plain = over("max_pool_backward", id, **g)
        if plain.values["kernel_d"] * plain.values["kernel_h"] * plain.values["kernel_w"] <= 256:
            yield Case(id, {**plain.values, "offsets": max_pool_offsets(plain.values)})


def avg_pool_cases(kernel):
    for id, g in GEOMETRIES:
        yield over(kernel, id, **g)
        if "pad" in g or "ceil" in g:
            yield over(kernel, f"{id}-inside", **g, count_include_pad=0)
    yield over(kernel, "divisor", M=2, sizes=(5, 37), size=(3, 2), stride=(2, 2), pad=(1, 1), divisor=5)
    yield over(kernel, "negative_divisor", M=2, sizes=(5, 7), size=(2, 2), divisor=-3)


def adaptive(id, M, sizes, out, **more):
    d, o = three(sizes, 1), three(out, 1)
    return Case(id, {"M": M, "D": d[0], "H": d[1], "W": d[2], "OD": o[0], "OH": o[1], "OW": o[2], **more})


ADAPTIVE = [
    ("one", 1, 1, 1),
    ("no_planes", 0, (4, 4), (2, 2)),
    ("even", 3, (8, 8), (2, 4)),
    ("sevenths", 2, (21, 112), (7, 7)),
    ("uneven", 3, (7, 10), (3, 4)),
    ("wide", 2, (5, 131), (2, 60)),
    ("keep", 2, (3, 5), (3, 5)),
    ("more", 2, (3, 5), (7, 6)),
    ("global", 5, (7, 7), (1, 1)),
    ("global_long", 3, (37, 41), (1, 1)),
    ("rows", 2, (6, 9), (3, 1)),
    ("columns", 2, (6, 9), (1, 4)),
    ("line", 3, 50, 7),
    ("volume", 2, (5, 6, 7), (2, 3, 4)),
    ("many", 230, (24, 40), (3, 5)),
]
SCATTERED = [
    ("one", 1, 1, 1),
    ("few", 3, 5, 4),
    ("same_place", 3, 40, 1),
    ("many", 70, 1000, 300),
    ("sparse", 2, 3, 500),
    ("no_planes", 0, 3, 5),
]


def scattered(kernel):
    """Values with random places, several of them the same."""
    for id, M, O, L in SCATTERED:
        yield Case(
            id,
            {"M": M, "O": O, "L": L, "indices": lambda rng, shape, dtype, L=L: rng.integers(0, L, shape)},
        )


def wrong_indices(place, value):
    """Every output but `bad` stays as it came."""

    def fill(rng, shape, dtype):
        indices = rng.integers(0, 9, shape)
        indices.reshape(-1)[place] = value
        return indices

    return {"M": 3, "O": 5, "L": 9, "indices": fill}


UNPOOL = [
    *scattered("max_unpool"),
    Case("too_large", wrong_indices(7, 9)),
    Case("negative", wrong_indices(0, -1)),
    Case("huge", wrong_indices(14, 2**62)),
    Case("two_wrong", {**wrong_indices(slice(3, 12, 8), -(2**63))}),
]


def positive(rng, shape, dtype):
    return rng.uniform(0.2, 2, shape)


def lp_pool_cases(kernel):
    given = {"lp_pool": ("x",), "lp_pool_backward": ("x", "y")}[kernel]
    for id, g in UNPADDED:
        yield over(kernel, id, **g, **({"y": positive} if "y" in given else {}))
    for norm in (1.0, 3.0, 4.0, 1.5, 0.5, -2.0):
        more = {"norm": norm} | dict.fromkeys(given, positive)
        yield over(kernel, f"norm_{norm}", M=2, sizes=(5, 37), size=(2, 2), ceil=True, **more)
    zeros = {name: constant(0.0) for name in given}
    for norm in (2.0, 3.0, 1.0):
        yield over(kernel, f"zeros_{norm}", M=1, sizes=(4, 6), size=(2, 2), norm=norm, **zeros)
    for id, sizes, stride, norm in (
        ("special", (6, 30), 2, 2.0),
        ("special_gaps", (7, 31), 3, 2.0),
        ("special_gaps_3", (7, 31), 3, 3.0),
    ):
        g = {"M": 2, "sizes": sizes, "size": (2, 2), "stride": (stride, stride), "norm": norm}
        forward = over("lp_pool", "", **g).values
        x = strewn(np.nan, np.inf)(np.random.default_rng(3), (2, 1, *sizes), np.dtype(np.float64))
        y = np.empty((2, 1, forward["OH"], forward["OW"]))
        record = spec.find("lp_pool")
        record.reference(x, y, **{s.name: forward[s.name] for s in record.scalars})
        special = {"x": x, "y": y}
        yield over(kernel, id, **g, **{name: lambda rng, shape, dtype, v=special[name]: v for name in given})


CASES = {
    "max_pool": list(max_pool_cases()),
    "max_pool_backward": list(max_pool_backward_cases()),
    "adaptive_max_pool": [
        *[adaptive(*a) for a in ADAPTIVE],
        *[adaptive(f"{a[0]}-values", *a[1:], indices=None) for a in ADAPTIVE],
        *[adaptive(id, 2, (7, 20), (3, 6), x=x) for id, x in SPECIAL],
    ],
    "adaptive_max_pool_backward": list(scattered("adaptive_max_pool_backward")),
    "avg_pool": [
        *avg_pool_cases("avg_pool"),
        over("avg_pool", "infinite", M=2, sizes=(6, 40), size=(3, 3), stride=(2, 2), pad=(1, 1), x=strewn(np.inf, -np.inf, np.nan)),
    ],
    "avg_pool_backward": list(avg_pool_cases("avg_pool_backward")),
    "adaptive_avg_pool": [
        *[adaptive(*a) for a in ADAPTIVE],
        adaptive("special", 2, (7, 20), (3, 6), x=strewn(np.nan, np.inf, -np.inf)),
    ],
    "adaptive_avg_pool_backward": [adaptive(*a) for a in ADAPTIVE],
    "lp_pool": list(lp_pool_cases("lp_pool")),
    "lp_pool_backward": list(lp_pool_cases("lp_pool_backward")),
    "max_unpool": UNPOOL,
    "max_unpool_backward": list(scattered("max_unpool_backward")),
}
