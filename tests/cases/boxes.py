"""Boxes: overlap, suppression, RoI pooling, masks."""

import numpy as np

from . import case


def boxes(rng, shape, dtype):
    """Boxes of many sizes that often overlap."""
    n = shape[0]
    corner, size = rng.uniform(0, 40, (n, 2)), np.exp(rng.normal(2, 0.8, (n, 2)))
    return np.concatenate([corner, corner + size], axis=1).astype(dtype)


def lattice(rng, shape, dtype):
    """Small whole coordinates: equal ones, touching, empty and inverted boxes among them."""
    return rng.integers(0, 6, shape).astype(dtype)


def far(rng, shape, dtype):
    return (boxes(rng, shape, np.float64) * 2.0**-4 + 100000).astype(dtype)


def tiny(rng, shape, dtype):
    """Areas at and below the smallest normal number."""
    return (boxes(rng, shape, np.float64) * (1e-24 if dtype == np.float32 else 1e-161)).astype(dtype)


def spoilt(rng, shape, dtype):
    """NaN and infinite coordinates strewn in."""
    b = boxes(rng, shape, dtype)
    for i, value in enumerate((np.nan, np.inf, -np.inf)):
        b.reshape(-1)[(5 * i + 2) % max(b.size, 1) :: 23] = value
    return b


def clustered(rng, shape, dtype):
    """Some ten boxes about each object, as a detector gives them."""
    n = shape[0]
    objects = boxes(rng, (max(1, n // 10), 4), np.float64)
    chosen = objects[rng.integers(0, len(objects), n)]
    size = chosen[:, 2:] - chosen[:, :2]
    return (chosen + np.concatenate([size, size], axis=1) * rng.normal(0, 0.08, (n, 4))).astype(dtype)


def spread(rng, shape, dtype):
    """As `clustered`, over a large plane, sizes over four decades."""
    n = shape[0]
    corner, size = rng.uniform(-3000, 3000, (max(1, n // 4), 2)), 10 ** rng.uniform(-1, 3, (max(1, n // 4), 2))
    chosen = np.concatenate([corner, corner + size], axis=1)[rng.integers(0, max(1, n // 4), n)]
    return (chosen + np.concatenate([chosen[:, 2:] - chosen[:, :2]] * 2, axis=1) * rng.normal(0, 0.1, (n, 4))).astype(dtype)


def outliers(rng, shape, dtype):
    b = clustered(rng, shape, dtype)
    b[::97] += dtype.type(1e6)
    b[1::101, 2:] += dtype.type(1e5)
    return b


def distinct(rng, shape, dtype):
    return rng.permutation(shape[0]).astype(dtype) / dtype.type(shape[0])


def tied(rng, shape, dtype):
    """Few different scores, NaN, infinities and both zeros among them."""
    return rng.choice(np.array([0.5, -1, 0.0, -0.0, np.nan, np.inf, -np.inf], dtype), shape)


def some_groups(rng, shape, dtype):
    return rng.choice(np.array([0, 7, -(2**63), 2**63 - 1, 3 << 40]), shape)


def many_groups(rng, shape, dtype):
    return rng.integers(-(2**40), 2**40, shape) // 2**31


def overlap_cases(**scalars):
    both = dict(boxes1=boxes, boxes2=boxes)
    return [
        case("one", N=1, M=1, **both, **scalars),
        case("none", N=0, M=3, **both, **scalars),
        case("narrow", N=5, M=3, **both, **scalars),
        case("vectors_and_tail", N=7, M=67, **both, **scalars),
        case("tall", N=70, M=5, **both, **scalars),
        case("large", N=301, M=517, **both, **scalars),
        case("lattice", N=12, M=16, boxes1=lattice, boxes2=lattice, **scalars),
        case("nan", N=9, M=11, boxes1=spoilt, boxes2=boxes, **scalars),
        case("nan_second", N=9, M=37, boxes1=boxes, boxes2=spoilt, **scalars),
    ]


KINDS = {"iou": 0, "giou": 1, "diou": 2, "ciou": 3}
FAR = [
    case("far", N=8, M=9, boxes1=far, boxes2=far, kind=0, eps=0.0),
    case("tiny", N=8, M=9, boxes1=boxes, boxes2=tiny, kind=0, eps=0.0),
]
MATRIX = [
    type(c)(f"{name}_{c.id}", c.values) for name, kind in KINDS.items() for c in overlap_cases(kind=kind, eps=1e-6)
]  # fmt: skip
FINITE = [c for c in MATRIX if "nan" not in c.id and "none" not in c.id]


def changed(cases, **values):
    return [type(c)(c.id, c.values | values) for c in cases]


def gradients():
    found = []
    for second in (0, 1):
        for c in FINITE:
            v = c.values | {"second": second, "K": c.values["M" if second else "N"]}
            found.append(type(c)(f"{c.id}_{second}", v))
    return found


def squared(cases):
    """The same with as many boxes in both lists."""
    return [type(c)(c.id, c.values | {"M": c.values["N"]}) for c in cases if "none" not in c.id]


def sparse(cases):
    """The cases with the counts that the first kernel gives, so that the second has the room it needs."""
    from hotloops.kernels.reference.boxes import sparse_box_iou_count

    found = []
    for c in cases:
        for threshold in (0.3, 0.0):
            rng = np.random.default_rng(3)
            one, two = (c.values[k](rng, (c.values[m], 4), np.dtype(np.float32)) for k, m in (("boxes1", "N"), ("boxes2", "M")))
            counts = np.zeros(len(one), np.int64)
            sparse_box_iou_count(one, two, counts, threshold)
            given = dict(
                boxes1=lambda rng, shape, dtype, b=one: b.astype(dtype),
                boxes2=lambda rng, shape, dtype, b=two: b.astype(dtype),
                counts=lambda rng, shape, dtype, k=counts: k,
            )
            found.append(type(c)(f"{c.id}_{threshold}", c.values | given | {"threshold": threshold, "K": int(counts.sum())}))
    return found


def suppression(**more):
    v = dict(iou_threshold=0.45, score_threshold=-np.inf, groups=None, scores=distinct, boxes=boxes) | more

    def made(id, **values):
        values = v | values
        return case(id, **({"max_output": values["N"]} | values))

    return [
        made("one", N=1),
        made("few", N=9),
        made("vectors_and_tail", N=83),
        made("ties", N=77, scores=tied),
        made("lattice", N=60, boxes=lattice, scores=tied),
        made("nan", N=80, boxes=spoilt),
        made("score_threshold", N=70, score_threshold=0.405),
        made("score_threshold_ties", N=70, scores=tied, score_threshold=0.0),
        made("max_output", N=70, max_output=7),
        made("no_output", N=7, max_output=0),
        made("all_overlap", N=50, iou_threshold=-1.0),
        made("any_overlap", N=50, iou_threshold=0.0),
        made("none_overlap", N=50, iou_threshold=1.0),
        made("high_threshold", N=200, boxes=clustered, iou_threshold=0.9),
        made("low_threshold", N=200, boxes=clustered, iou_threshold=0.1),
        made("clustered", N=3001, boxes=clustered),
        made("far", N=300, boxes=far),
        made("spread", N=4000, boxes=spread),
        made("outliers", N=3000, boxes=outliers),
        made("groups", N=90, groups=some_groups),
        made("groups_ties", N=90, groups=some_groups, scores=tied, boxes=lattice),
        made("groups_max_output", N=90, groups=some_groups, max_output=9),
        made("many_groups", N=2500, groups=many_groups, boxes=clustered),
        made("one_group", N=2600, groups=lambda rng, shape, dtype: np.full(shape, -5), boxes=clustered),
    ]


def softened():
    found = []
    for gaussian in (0, 1):
        for id, n, b in (("one", 1, boxes), ("few", 9, boxes), ("vectors_and_tail", 83, clustered), ("nan", 40, spoilt)):
            scalars = dict(gaussian=gaussian, iou_threshold=0.31, sigma=0.5, score_threshold=0.01)
            found.append(case(f"{id}_{gaussian}", N=n, boxes=b, scores=distinct, **scalars))
    return found


def rois(images, span):
    """RoIs of many kinds: inside, across the border, outside, inverted, tiny. Offsets keep samples off the edges of pixels."""

    def fill(rng, shape, dtype):
        k = shape[0]
        corner, size = rng.uniform(-0.3, 1, (k, 2)) * span, rng.uniform(0.05, 0.8, (k, 2)) * span
        r = np.concatenate([rng.integers(0, images, (k, 1)), corner, corner + size], axis=1)
        r[3::7, 3:] = r[3::7, 1:3] - 0.3
        r[5::11, 1:] += 3 * span
        return r.astype(dtype)

    return fill


def spoilt_rois(images, span):
    def fill(rng, shape, dtype):
        r = rois(images, span)(rng, shape, dtype)
        for i, v in enumerate((np.nan, np.inf, -np.inf, 1e9, -1e9, 3e38, 1e-40)):
            r[i % len(r), 1 + i % 4] = v
        return r

    return fill


def whole_rois(images, span):
    """RoIs whose bins come out alike in every float type: sides of a power of two."""

    def fill(rng, shape, dtype):
        k = shape[0]
        corner, size = rng.integers(-span // 3, span, (k, 2)), 2 ** rng.integers(0, 4, (k, 2))
        r = np.concatenate([rng.integers(0, images, (k, 1)), corner, corner + size - 1], axis=1).astype(dtype)
        r[4::9, 2] = np.nan
        return r

    return fill


def bad_image(value):
    def fill(rng, shape, dtype):
        r = rois(2, 8)(rng, shape, dtype)
        r[shape[0] // 2 :, 0] = value
        return r

    return fill


def aligned_cases(extra=()):
    base = dict(N=2, C=3, H=9, W=11, PH=2, PW=3, K=6, spatial_scale=1.0, sampling_ratio=2, aligned=0, maximum=0, boxes=rois(2, 9))

    def made(id, **values):
        return case(id, **(base | values))

    return [
        made("plain"),
        made("one", N=1, C=1, H=1, W=1, PH=1, PW=1, K=1, boxes=rois(1, 1)),
        made("aligned", aligned=1, spatial_scale=0.6),
        made("adaptive", sampling_ratio=0, spatial_scale=1.3, K=9),
        made("adaptive_aligned", sampling_ratio=0, aligned=1, K=9),
        made("maximum", maximum=1),
        made("maximum_adaptive", maximum=1, sampling_ratio=0, aligned=1),
        made("channels", C=37, K=5, PH=7, PW=7),
        made("many", C=70, K=60, H=20, W=23, PH=7, PW=7, boxes=rois(2, 20), aligned=1),
        made("many_maximum", C=20, K=60, H=20, W=23, PH=3, PW=4, boxes=rois(2, 20), maximum=1),
        made("not_finite", K=7, boxes=spoilt_rois(2, 9), sampling_ratio=0),
        made("no_rois", K=0),
        made("small", N=1, C=2, H=4, W=5, PW=2, K=2, boxes=rois(1, 4)),
        made("small_aligned", N=1, C=1, H=5, W=4, K=3, sampling_ratio=0, aligned=1, boxes=rois(1, 4)),
        made("small_maximum", N=1, C=1, H=4, W=4, K=2, maximum=1, boxes=rois(1, 4)),
        *extra,
    ]


def pooled_cases():
    base = dict(N=2, C=3, H=9, W=11, PH=2, PW=4, K=6, spatial_scale=1.0, boxes=whole_rois(2, 9))

    def made(id, **values):
        return case(id, **(base | values))

    return [
        made("plain"),
        made("one", N=1, C=1, H=1, W=1, PH=1, PW=1, K=1, boxes=whole_rois(1, 1)),
        made("scaled", spatial_scale=0.5),
        made("channels", C=37, K=5, PH=4, PW=2),
        made("many", C=70, K=60, H=20, W=23, PH=8, PW=8, boxes=whole_rois(2, 20)),
        made("no_rois", K=0),
        made("small", N=2, C=2, H=4, W=5, PW=2, K=3, boxes=whole_rois(2, 4)),
    ]


def with_nan(rng, shape, dtype):
    x = rng.standard_normal(shape).astype(dtype)
    x.reshape(-1)[::13] = np.nan
    return x


def normal(rng, shape, dtype):
    return rng.standard_normal(shape).astype(dtype)


def bits(rng, shape, dtype):
    return rng.random(shape) < 0.4


def sparse_bits(rng, shape, dtype):
    m = rng.random(shape) < 0.03
    m[:1] = False
    return m


SIZES = [case("one", N=1), case("none", N=0), case("odd", N=7), case("vectors_and_tail", N=67), case("many", N=50001)]


def one_box(**values):
    return [type(c)(c.id, c.values | values) for c in SIZES] + [
        case("lattice", N=40, **(values | {"boxes": lattice})),
        case("nan", N=40, **(values | {"boxes": spoilt})),
    ]


WRONG_IMAGES = (-1, 2, 0.5, np.nan, np.inf, 1e30)

CASES = {
    "box_area": one_box(boxes=boxes),
    "box_area_grad": one_box(boxes=boxes),
    "box_convert": [
        type(c)(f"{c.id}_{source}{target}", c.values | {"source": source, "target": target})
        for c in one_box(boxes=boxes)
        for source in range(3)
        for target in range(3)
        if c.id != "many" or (source, target) == (0, 2)
    ],
    "box_convert_grad": [
        case(f"{source}{target}", N=19, source=source, target=target) for source in range(3) for target in range(3)
    ],
    "clip_boxes": one_box(boxes=spoilt, height=21.0, width=30.5),
    "clip_boxes_grad": one_box(boxes=boxes, height=21.0, width=30.5),
    "remove_small_boxes": one_box(boxes=boxes, min_size=5.0),
    "box_iou": MATRIX + FAR,
    "box_iou_paired": squared(MATRIX + FAR),
    "box_iou_grad": gradients(),
    "box_iou_paired_grad": squared(FINITE),
    "sparse_box_iou_count": list(sparse(overlap_cases())),
    "sparse_box_iou": sparse([c for c in overlap_cases() if c.id != "none"]),
    "nms": suppression(),
    "soft_nms": softened(),
    "roi_align": aligned_cases(
        [
            case(
                "nan",
                N=1,
                C=2,
                H=6,
                W=7,
                PH=2,
                PW=2,
                K=3,
                spatial_scale=1.0,
                sampling_ratio=2,
                aligned=1,
                maximum=m,
                boxes=rois(1, 6),
                input=with_nan,
            )
            for m in (0, 1)
        ]
    )
    + [
        case(
            f"image_{v}",
            N=2,
            C=1,
            H=3,
            W=3,
            PH=1,
            PW=1,
            K=3,
            spatial_scale=1.0,
            sampling_ratio=1,
            aligned=0,
            maximum=0,
            boxes=bad_image(v),
        )
        for v in WRONG_IMAGES
    ],
    "roi_align_grad": [type(c)(c.id, c.values | {"input": normal}) for c in aligned_cases()],
    "roi_pool": pooled_cases()
    + [case("nan", N=1, C=2, H=6, W=7, PH=2, PW=2, K=3, spatial_scale=1.0, boxes=whole_rois(1, 6), input=with_nan)],
    "roi_pool_grad": pooled_cases(),
    "mask_iou": [
        case("one", A=1, B=1, P=1, masks1=bits, masks2=bits),
        case("odd", A=3, B=5, P=77, masks1=bits, masks2=bits),
        case("empty", A=2, B=3, P=130, masks1=sparse_bits, masks2=sparse_bits),
        case("no_pixels", A=2, B=3, P=0, masks1=bits, masks2=bits),
        case("large", A=9, B=11, P=70001, masks1=bits, masks2=sparse_bits),
    ],
    "masks_to_boxes": [
        case("one", N=1, H=1, W=1, masks=bits),
        case("odd", N=3, H=5, W=7, masks=sparse_bits),
        case("wide", N=2, H=3, W=130, masks=sparse_bits),
        case("many", N=33, H=60, W=70, masks=sparse_bits),
        case("no_pixels", N=2, H=0, W=3, masks=bits),
    ],
}
