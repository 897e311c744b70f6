"""Convolution, its gradients and its patches."""

import numpy as np

from hotloops.kernels.reference.activation import FUNCTIONS

from . import case
from .activation import small


def geometry(c, size, f, kernel, *, n=1, groups=1, stride=1, pad=0, end=None, dilation=1):
    """The sizes and scalars of a convolution over 1 to 3 axes (lifted to 3); `end` is the padding at the end."""
    axes = len(size)
    spread = [v if isinstance(v, tuple) else (v,) * axes for v in (stride, pad, pad if end is None else end, dilation)]
    out = [
        (d + p + e - r * (k - 1) - 1) // s + 1 for d, k, s, p, e, r in zip(size, kernel, *spread, strict=True)
    ]  # stride, front, end, dilation
    ones, zeros = [1] * (3 - axes), [0] * (3 - axes)
    values = {"N": n, "C": c, "F": f, "CG": c // groups, "groups": groups, "activation": 0}
    for names, lifted in (
        (("D", "H", "W"), ones + list(size)),
        (("KD", "KH", "KW"), ones + list(kernel)),
        (("OD", "OH", "OW"), ones + out),
        (("stride_d", "stride_h", "stride_w"), ones + list(spread[0])),
        (("pad_d", "pad_h", "pad_w"), zeros + list(spread[1])),
        (("dilation_d", "dilation_h", "dilation_w"), ones + list(spread[3])),
    ):
        values |= dict(zip(names, lifted, strict=True))
    return values


SHAPES = {
    "one": geometry(1, (1, 1), 1, (1, 1)),
    "line": geometry(2, (9,), 3, (3,), n=2, stride=2, pad=1),
    "sheet": geometry(1, (4, 4), 1, (3, 3), stride=2, pad=1),
    "square": geometry(3, (7, 9), 4, (3, 3), n=2, pad=1),
    "same_even": geometry(2, (5, 6), 3, (2, 4), pad=(0, 1), end=(1, 2)),
    "valid_5x5": geometry(2, (9, 8), 2, (5, 5)),
    "stride": geometry(3, (11, 10), 2, (3, 2), n=2, stride=(3, 2), pad=(1, 0)),
    "dilation": geometry(2, (9, 11), 3, (3, 2), pad=2, dilation=(2, 3)),
    "gaps": geometry(2, (8, 9), 3, (1, 2), stride=(3, 4)),
    "wide_padding": geometry(1, (2, 3), 2, (2, 2), pad=(3, 4)),
    "far_padding": geometry(1, (2, 2), 1, (1, 1), stride=2**40, pad=2**40),
    "long_window": geometry(1, (3, 4), 2, (2, 3), pad=(9, 8), dilation=(10, 9)),
    "groups": geometry(6, (6, 5), 9, (3, 3), n=2, groups=3, pad=1),
    "depthwise": geometry(5, (8, 7), 5, (3, 3), n=2, groups=5, pad=1),
    "depthwise_stride": geometry(4, (9, 9), 8, (3, 3), groups=4, stride=2, pad=1),
    "volume": geometry(2, (3, 4, 5), 3, (2, 3, 2), n=2, pad=(1, 0, 1), stride=(1, 2, 1), dilation=(2, 1, 1)),
    "tall_filters": geometry(1, (2, 2), 13, (2, 2)),
    "deep": geometry(9, (3, 3), 2, (3, 3), stride=2, pad=1),
    "deep_groups": geometry(16, (3, 2), 4, (2, 2), groups=2, stride=(2, 1), pad=1),
    "many_positions": geometry(1, (6, 6), 8, (1, 1)),
    "whole_kernel": geometry(3, (4, 5), 7, (4, 5), n=3),
    "whole_kernel_groups": geometry(4, (3, 2), 6, (3, 2), n=2, groups=2, stride=3),
    "pixels": geometry(9, (1, 1), 5, (1, 1), n=4, stride=2),
    "no_images": geometry(2, (4, 4), 3, (3, 3), n=0),
    "no_channels": geometry(0, (4, 4), 3, (3, 3)),
}
LARGE = {
    "large_3x3": geometry(19, (30, 37), 35, (3, 3), n=2, pad=1),
    "large_3x3_narrow": geometry(40, (7, 7), 50, (3, 3), n=9, pad=1),
    "large_3x3_one_over": geometry(33, (9, 13), 20, (3, 3), n=6, pad=1),
    "large_3x3_three_over": geometry(150, (11, 14), 17, (3, 3), n=7),
    "large_5x5": geometry(21, (11, 16), 36, (5, 5), n=3, pad=2),
    "filters_of_a_vector": geometry(7, (14, 13), 16, (5, 5), n=2),
    "filters_of_a_vector_groups": geometry(12, (11, 12), 32, (5, 4), n=2, groups=2, stride=(1, 2), pad=1),
    "filters_of_a_vector_deep": geometry(45, (9, 8), 15, (5, 5), dilation=(1, 1), stride=(2, 1), pad=(1, 0)),
    "filters_of_vectors": geometry(9, (15, 13), 48, (5, 4), n=2, stride=(2, 1), pad=(2, 0)),
    "filters_of_vectors_groups": geometry(10, (19, 18), 62, (4, 5), n=2, groups=2, pad=1, dilation=(1, 2)),
    "filters_of_vectors_volume": geometry(6, (5, 9, 11), 32, (3, 3, 3), n=2, stride=2, pad=1),
    "filters_of_a_vector_volume": geometry(5, (6, 7, 9), 16, (3, 4, 4), n=2),
    "tiles": geometry(11, (15, 51), 40, (2, 2), n=3, stride=2),
    "tiles_wide": geometry(3, (34, 52), 30, (16, 16), n=2, stride=16),
    "tiles_groups": geometry(20, (8, 30), 48, (4, 3), n=2, groups=2, stride=(4, 3)),
    "tiles_deep": geometry(5, (35, 56), 21, (17, 18), n=2, stride=(17, 18)),
    "tiles_volume": geometry(9, (5, 9, 23), 25, (2, 3, 2), n=2, stride=(2, 3, 2)),
    "large_1x1": geometry(67, (13, 17), 45, (1, 1), n=3),
    "large_1x1_images": geometry(40, (16, 17), 29, (1, 1), n=3),
    "large_1x1_deep": geometry(700, (5, 7), 20, (1, 1), n=2),
    "large_1x1_stride": geometry(33, (20, 21), 34, (1, 1), n=2, stride=2),
    "large_kernel": geometry(2, (24, 33), 9, (17, 31), n=2),
    "large_whole_kernel": geometry(65, (3, 1, 4), 150, (3, 1, 4), n=1),
    "large_pixels": geometry(130, (1, 1), 67, (1, 1), n=19),
    "large_7x7": geometry(3, (40, 41), 20, (7, 7), n=2, stride=2, pad=3),
    "large_deep": geometry(300, (5, 6), 20, (3, 3), pad=1),
    "large_depthwise": geometry(34, (40, 35), 34, (3, 3), n=2, groups=34, pad=1),
    "large_depthwise_volume": geometry(3, (4, 9, 30), 3, (3, 3, 3), n=2, groups=3, pad=1),
    "large_depthwise_5x5": geometry(20, (41, 36), 20, (5, 5), n=2, groups=20, pad=2, stride=2),
    "large_depthwise_5x5_rows": geometry(19, (17, 30), 19, (5, 5), n=2, groups=19, pad=2),
    "large_depthwise_5x5_short_rows": geometry(40, (15, 14), 40, (5, 5), n=2, groups=40, pad=2),
    "large_depthwise_wide": geometry(21, (9, 17), 42, (2, 19), n=3, groups=21, pad=(1, 9), dilation=(2, 1), stride=(1, 2)),
    "large_depthwise_5x5_stride": geometry(20, (25, 61), 20, (5, 5), n=2, groups=20, pad=(1, 2), stride=2),
    "large_depthwise_twice": geometry(33, (21, 45), 66, (3, 3), n=2, groups=33, pad=1),
    "large_depthwise_7x7": geometry(33, (20, 30), 33, (7, 7), n=2, groups=33, pad=(2, 5), dilation=(1, 2)),
    "large_depthwise_wide_padding": geometry(20, (19, 47), 20, (3, 3), n=2, groups=20, pad=2),
    "large_depthwise_wide_padding_stride": geometry(20, (22, 61), 20, (3, 3), n=2, groups=20, stride=2, pad=(1, 2)),
    "large_depthwise_bands": geometry(3, (250, 140), 3, (3, 3), n=2, groups=3, pad=1),
    "large_depthwise_bands_stride": geometry(2, (470, 301), 2, (3, 3), groups=2, stride=2, pad=(2, 0)),
    "large_depthwise_stride": geometry(35, (21, 61), 70, (3, 3), n=2, groups=35, stride=2, pad=(1, 3)),
    "large_depthwise_stride_5x4": geometry(21, (19, 58), 21, (5, 4), n=2, groups=21, stride=2, pad=(4, 2), dilation=(1, 2)),
    "large_depthwise_stride_7x7": geometry(20, (15, 28), 20, (7, 7), n=2, groups=20, stride=2, pad=(2, 3), end=(5, 4)),
    "large_depthwise_stride_4x2": geometry(20, (24, 37), 20, (4, 2), n=2, groups=20, stride=2, pad=(1, 1)),
    "depthwise_small_maps": geometry(40, (7, 7), 40, (3, 3), n=3, groups=40, pad=1),
    "depthwise_small_maps_5x5": geometry(17, (9, 6), 34, (5, 5), n=2, groups=17, pad=(1, 2)),
    "depthwise_small_maps_7x7": geometry(9, (7, 8), 9, (7, 7), n=2, groups=9, pad=3),
    "depthwise_small_maps_stride": geometry(21, (14, 13), 21, (3, 3), n=2, groups=21, stride=2, pad=1),
    "depthwise_small_maps_stride_5x5": geometry(6, (11, 15), 12, (5, 5), n=2, groups=6, stride=2, pad=(4, 2), dilation=(1, 2)),
    "depthwise_small_maps_padding": geometry(5, (3, 2), 5, (3, 3), n=2, groups=5, pad=(7, 3)),
    "large_depthwise_short_rows": geometry(40, (9, 14), 40, (3, 3), n=2, groups=40, pad=1),
    "large_depthwise_shortest_rows": geometry(40, (7, 6), 40, (5, 3), n=2, groups=40, pad=(2, 1)),
    "large_one_channel": geometry(1, (30, 29), 11, (3, 3), n=13, pad=1),
    "large_groups": geometry(24, (30, 31), 40, (3, 3), n=2, groups=4, pad=1),
    "large_line": geometry(16, (700,), 24, (9,), n=2, pad=4),
    "large_volume": geometry(5, (9, 12, 13), 12, (3, 3, 3), n=2, pad=1),
}

FAST = {
    "fast_2x2": geometry(34, (25, 26), 40, (2, 2), n=3, pad=1),
    "fast_4x4": geometry(17, (21, 20), 36, (4, 4), n=2, pad=2),
    "fast_line_2": geometry(20, (200,), 24, (2,), n=2, pad=1),
    "fast_line_3": geometry(34, (101,), 40, (3,), n=3, pad=2),
    "fast_line_4": geometry(40, (9, 50), 44, (1, 4), n=2, groups=2, pad=(0, 3)),
    "fast_line_5": geometry(16, (53, 7), 30, (5, 1), n=2, pad=(4, 0)),
    "fast_line_3_down": geometry(36, (40, 13), 20, (3, 1), n=2, pad=1),
    "fast_volume": geometry(32, (5, 11, 13), 40, (3, 3, 3), n=2, pad=1),
    "fast_volume_depth": geometry(
        32, (9, 8, 10), 36, (4, 2, 2), n=2, groups=2, pad=(2, 0, 1), stride=(2, 1, 1), dilation=(2, 1, 1)
    ),
    "fast_volume_slices": geometry(18, (4, 14, 9), 30, (1, 4, 4), n=2, pad=(1, 2, 2)),
    "fast_volume_line": geometry(16, (6, 5, 40), 20, (2, 1, 3), pad=(1, 0, 1)),
    "fast_dilation": geometry(72, (21, 30), 70, (3, 3), n=3, pad=(2, 5), dilation=(2, 3)),
    "fast_dilation_groups": geometry(130, (29, 17), 160, (4, 4), n=3, groups=2, pad=(0, 3), end=(6, 1), dilation=(4, 1)),
    "fast_dilation_5x5": geometry(24, (33, 35), 40, (5, 5), pad=(7, 0), dilation=2),
    "fast_stride_2x2_one_over": geometry(33, (44, 43), 36, (4, 4), n=3, stride=2, pad=1),
    "fast_stride_3x3": geometry(40, (39, 40), 48, (3, 3), n=4, stride=2, pad=1),
    "fast_stride_3x3_end": geometry(36, (40, 39), 66, (3, 3), n=4, stride=2, pad=(0, 3), end=(1, 2)),
    "fast_stride_4x4_groups": geometry(40, (31, 30), 44, (4, 4), n=7, groups=2, stride=2, pad=1),
    "fast_stride_5x5": geometry(20, (41, 42), 36, (5, 5), n=3, stride=2, pad=2),
    "fast_stride_6x6": geometry(20, (30, 33), 20, (6, 6), n=2, stride=2, pad=(5, 4)),
    "fast_stride_7x7": geometry(3, (60, 59), 32, (7, 7), n=2, stride=2, pad=3),
    "fast_stride_9x9": geometry(16, (30, 31), 16, (9, 9), n=2, stride=2, pad=(4, 9)),
}


def convolutions(**extra):
    return [case(name, **values, **extra) for name, values in {**SHAPES, **LARGE}.items()]


def fast():
    """What Winograd's algorithm may take, among others."""
    names = ("square", "groups", "large_3x3", "large_3x3_narrow", "large_3x3_one_over", "large_3x3_three_over", "large_5x5")
    names += ("large_deep", "large_groups")
    shapes = {f"{name}_fast": {**SHAPES, **LARGE}[name] for name in names} | FAST
    return [case(name, **values, exact=0) for name, values in shapes.items()]


def activated():
    """Every function, on shapes that each algorithm takes."""
    names = ("square", "depthwise", "tall_filters", "deep", "no_channels", "groups")
    names += ("large_3x3_one_over", "large_5x5", "large_1x1", "large_1x1_stride", "large_depthwise", "large_deep", "large_volume")
    return [
        case(f"{name}_{f}", **({**SHAPES, **LARGE}[name] | {"activation": number}), exact=0, x=small)
        for number, f in enumerate(FUNCTIONS)
        for name in names
        if number
    ]


def specials(rng, shape, dtype):
    """Small integers with a NaN and infinities among them."""
    x = rng.integers(-3, 4, shape).astype(dtype)
    x.flat[[0, x.size // 3, x.size - 1]] = np.nan, np.inf, -np.inf
    return x


NONFINITE = ("square", "same_even", "stride", "dilation", "groups", "depthwise", "volume", "tall_filters")
NONFINITE += ("far_padding", "large_depthwise", "large_depthwise_stride", "large_depthwise_shortest_rows")
SPECIAL = geometry(2, (6, 7), 3, (3, 3), pad=1)


def patches(values):
    dropped = ("F", "CG", "D", "KD", "OD", "groups", "stride_d", "pad_d", "dilation_d")
    return {k: v for k, v in values.items() if k not in dropped}


PATCHES = [case(name, **patches(values)) for name, values in {**SHAPES, **LARGE}.items() if values["KD"] == values["D"] == 1]
PATCHES += [
    case("wide_rows", **patches(geometry(3, (20, 300), 1, (3, 3), n=2, pad=1))),
    case("many_channels", **patches(geometry(300, (6, 5), 1, (2, 3), n=3))),
    case("whole_image", **patches(geometry(3, (12, 13), 1, (12, 13), n=2))),
    case("beyond_the_cache", **patches(geometry(33, (90, 91), 1, (3, 3), n=2, pad=1))),
    case("beyond_the_cache_stride", **patches(geometry(20, (180, 150), 1, (4, 4), n=2, stride=2, pad=1))),
    case("small_maps_beyond_the_cache", **patches(geometry(60, (19, 21), 1, (5, 5), n=4, pad=2))),
    case("small_maps_of_whole_lines_beyond_the_cache", **patches(geometry(70, (16, 20), 1, (5, 5), n=4, pad=2))),
    *(case(f"rows_of_{w}", **patches(geometry(3, (6, w), 1, (3, 3), n=2, pad=1))) for w in (1, 2, 3, 5, 8, 9, 13, 16, 17)),
    case("rows_of_7_dilation", **patches(geometry(2, (9, 7), 1, (3, 5), n=3, pad=(2, 4), dilation=2))),
    case("nan", **patches(SPECIAL), x=specials),
    case("nan_rows_of_7", **patches(geometry(3, (5, 7), 1, (3, 3), n=2, pad=1)), x=specials),
    case("nan_rows_of_18", **patches(geometry(3, (5, 18), 1, (3, 3), n=2, pad=1)), x=specials),
]
ADJOINTS = [c for c in PATCHES if not c.id.startswith("nan")]


def deform(c, size, f, kernel, offset_groups, **more):
    values = geometry(c, size, f, kernel, **more)
    return {**{k: v for k, v in values.items() if not k.endswith("_d") and k not in ("D", "KD", "OD")}, "OG": offset_groups}


def places(rng, shape, dtype):
    """Offsets that lead between pixels, onto them and outside; in quarters, so that sums of small integers stay exact."""
    return (np.round(rng.standard_normal(shape) * 8) / 4).astype(dtype)


def far_places(rng, shape, dtype):
    """Some offsets are no place of an image, or none at all."""
    offset = rng.integers(-2, 3, shape).astype(dtype)
    odd = np.array([np.nan, np.inf, -np.inf, 1e9, -1e9, 3e38, -3e38, 2.0**30, -(2.0**30), 2.0**31, 2.0**62, 2.0**63, 1e-38], dtype)
    offset.flat[: 3 * len(odd) : 3] = odd[: len(offset.flat[: 3 * len(odd) : 3])]
    return offset


DEFORM = {
    "one": deform(1, (1, 1), 1, (1, 1), 1),
    "small": deform(2, (3, 3), 9, (2, 2), 1, pad=(1, 0)),
    "small_groups": deform(4, (3, 4), 2, (2, 2), 2, n=2, groups=2, stride=(1, 2)),
    "small_offset_groups": deform(4, (3, 2), 2, (2, 1), 4, n=2, dilation=(2, 1)),
    "square": deform(3, (6, 7), 4, (3, 3), 1, n=2, pad=1),
    "offset_groups": deform(6, (5, 4), 2, (2, 1), 3, n=2),
    "groups": deform(6, (5, 5), 9, (3, 2), 2, n=2, groups=3, pad=(1, 0)),
    "depthwise": deform(5, (5, 4), 5, (3, 3), 5, groups=5, pad=1),
    "stride": deform(4, (9, 8), 3, (3, 2), 2, stride=(2, 3), pad=(2, 1), dilation=(2, 1)),
    "far_padding": deform(1, (2, 2), 1, (1, 1), 1, stride=2**40, pad=2**40),
    "no_images": deform(2, (4, 4), 3, (3, 3), 1, n=0),
    "no_channels": deform(0, (4, 4), 3, (3, 3), 1),
    "large": deform(40, (23, 25), 35, (3, 3), 1, n=3, pad=1),
    "large_groups": deform(72, (15, 14), 40, (3, 3), 3, n=2, groups=2, pad=1),
    "large_shared": deform(36, (19, 18), 72, (3, 3), 2, n=2, groups=9, pad=1, stride=2),
    "large_depthwise": deform(37, (20, 21), 37, (3, 3), 1, n=2, groups=37, pad=1),
    "large_offset_groups": deform(48, (14, 15), 16, (1, 2), 48, n=2),
}


def deformed(*left_out):
    """The cases of a kernel; without the mask, and without each of the outputs that may be left out."""
    cases = [case(name, **values, offset=places) for name, values in DEFORM.items()]
    for name in ("small_groups", "groups", "large"):
        cases.append(case(f"{name}_no_mask", **DEFORM[name], offset=places, mask=None, **{"gmask": None} if left_out else {}))
    for name in left_out:
        cases.append(case(f"no_{name}", **DEFORM["small"], offset=places, **{name: None}))
    return [*cases, *(case(f"far_{name}", **DEFORM[name], offset=far_places) for name in ("small", "square"))]


CASES = {
    "deform_conv": [*deformed(), case("no_bias", **DEFORM["small"], offset=places, b=None)],
    "deform_conv_grad_samples": [*deformed("gx", "goffset", "gmask")],
    "deform_conv_grad_weight": deformed(),
    "conv": [
        *convolutions(exact=1),
        *fast(),
        *activated(),
        case("no_bias", **SHAPES["square"], exact=1, b=None),
        case("no_bias_large", **LARGE["large_1x1"], exact=1, b=None),
        case("nan", **SPECIAL, exact=1, x=specials),
        *(case(f"{name}_nan", **{**SHAPES, **LARGE}[name], exact=1, w=specials) for name in NONFINITE),
    ],
    "conv_grad_input": [
        *convolutions(exact=1),
        *fast(),
        case("no_bias", **SHAPES["stride"], exact=1, b=None),
        case("no_bias_large", **LARGE["large_3x3"], exact=1, b=None),
        case("no_filters", **geometry(2, (4, 4), 0, (3, 3)), exact=1),
        *(case(f"{name}_nan", **{**SHAPES, **LARGE}[name], exact=name == "stride", w=specials) for name in NONFINITE),
    ],
    "conv_grad_weight": [
        *convolutions(exact=1),
        *fast(),
        *(case(f"{name}_nan", **{**SHAPES, **LARGE}[name], exact=1, x=specials) for name in NONFINITE),
        *(case(f"{name}_nan_gradient", **{**SHAPES, **LARGE}[name], exact=1, gy=specials) for name in NONFINITE),
    ],
    "conv_grad_bias": [
        case("one", N=1, F=1, S=1),
        case("odd", N=3, F=5, S=7),
        case("tail", N=2, F=3, S=67),
        case("many", N=5, F=37, S=1501),
        case("long", N=1, F=2, S=300_001),
        case("nothing", N=0, F=3, S=4),
    ],
    "unfold": PATCHES,
    "im2col": PATCHES,
    "fold": ADJOINTS,
    "col2im": ADJOINTS,
}
