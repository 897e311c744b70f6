"""Boxes: area, overlap, suppression, RoI pooling, masks."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np

from . import _check, _dispatch
from ._check import Call, host_array, is_device, op

_FORMATS = ("xyxy", "xywh", "cxcywh")
_IOU, _GIOU, _DIOU, _CIOU = range(4)
_MAX_SAMPLES = 4096


# ------------------------------------------------------------------------------------------------------------- checks


def _format(op: str, name: str, value: Any) -> int:
    return _FORMATS.index(_check.one_of(op, name, value, _FORMATS))


def _need_boxes(op: str, name: str, boxes: Any, ndim: int | None = 2) -> None:
    """Boxes are [N, 4], or [..., 4] where ndim is None."""
    wanted = "[..., 4]" if ndim is None else "[N, 4]"
    if (ndim is not None and boxes.ndim != ndim) or boxes.ndim < 1 or boxes.shape[-1] != 4:
        raise ValueError(f"{op}: {name} has the shape {tuple(boxes.shape)}, {wanted} is needed")


def _read(call: Call, **named: Any) -> list[Any]:
    """The named arrays, all of which are needed, in one float type; integers count as float64."""
    for name, value in named.items():
        if value is None:
            raise TypeError(f"{call.op}: {name} must be an array, None came")
    return call.floats(integers=True, **named)


def _corners(call: Call, boxes: Any, fmt: int) -> Any:
    """The boxes as x1 y1 x2 y2."""
    if fmt == 0:
        return boxes
    converted = call.empty(boxes.shape)
    call.run("box_convert", boxes, converted, source=fmt, target=0)
    return converted


def _first(*found: Any) -> Any:
    """The first n elements of each array, as arrays of their own; n is in the last."""
    *arrays, count = found
    if isinstance(count, np.ndarray):
        n = int(count[0])
        firsts = [a[:n].copy() for a in arrays]
    else:
        cuda = _dispatch.adapter("cuda")
        host = [cuda.to_host(cuda.as_device(a)) for a in (*arrays, count)]
        n = int(host.pop()[0])
        firsts = [cuda.as_kind_of(cuda._cuda().to_device(h[:n].copy()), a) for h, a in zip(host, arrays, strict=True)]
    return firsts[0] if len(firsts) == 1 else tuple(firsts)


# ------------------------------------------------------------------------------------------------------------ one box


@op(repeats=True)
def box_area(boxes: Any, fmt: str = "xyxy", *, out: Any = None) -> Any:
    """The area of each box, width times height.

    Parameters
    ----------
    boxes : float[..., 4]
        Boxes in the notation `fmt`; integers count as float64 (no overflow), so the areas are float64 then.
    fmt : {"xyxy", "xywh", "cxcywh"}
        Corners x1 y1 x2 y2; corner and size; centre and size. Continuous coordinates: no pixel is added to a side.
    out : float[...], optional
        Where the result goes.

    Returns
    -------
    float[...]
        Signed: a box inverted along one axis has a negative area; NaN where a side is NaN. In float16 an area above 65504
        is infinite, though computed in float32.

    Raises
    ------
    TypeError, ValueError
        Elements that are no numbers, a last axis other than 4, an unknown `fmt`.

    Notes
    -----
    Source: torchvision.ops.box_area.

    Examples
    --------
    >>> import hotloops as hl
    >>> hl.box_area([[1.0, 2.0, 4.0, 6.0]])
    array([12.])
    """
    call = Call("box_area", out)
    [b] = _read(call, boxes=boxes)
    _need_boxes("box_area", "boxes", b, None)
    source = _format("box_area", "fmt", fmt)
    area = call.result(b.shape[:-1])
    call.run("box_area", _corners(call, b.reshape(-1, 4), source), area.reshape(-1))
    return call.finish(area)


def _box_area_gradient(g: Any, y: Any, a: SimpleNamespace) -> tuple[Any, ...]:
    call = Call("box_area")
    boxes, grad = _read(call, boxes=a.boxes, grad=g)
    source = _format("box_area", "fmt", a.fmt)
    flat = _corners(call, boxes.reshape(-1, 4), source)
    grad_boxes = call.empty(flat.shape)
    call.run("box_area_grad", grad.reshape(-1), flat, grad_boxes)
    return (call.finish(_to_format(call, grad_boxes, source).reshape(boxes.shape)),)


def _to_format(call: Call, grad: Any, source: int) -> Any:
    """A gradient by corners as a gradient by the notation that they were made from."""
    if source == 0:
        return grad
    converted = call.empty(grad.shape)
    call.run("box_convert_grad", grad, converted, source=source, target=0)
    return converted


@op(repeats=True)
def box_convert(boxes: Any, in_fmt: str, out_fmt: str, *, out: Any = None) -> Any:
    """The boxes in another notation.

    Parameters
    ----------
    boxes : float[..., 4]
        Boxes in the notation `in_fmt`; integers count as float64.
    in_fmt, out_fmt : {"xyxy", "xywh", "cxcywh"}
        Corners x1 y1 x2 y2; corner and size; centre and size.
    out : float[..., 4], optional
        Where the result goes; may be `boxes`.

    Returns
    -------
    float[..., 4]
        A fresh array, each value rounded once. A NaN makes the two values of its axis NaN where they depend on it.

    Raises
    ------
    TypeError, ValueError
        Elements that are no numbers, a last axis other than 4, an unknown notation.

    Notes
    -----
    Source: torchvision.ops.box_convert.

    Examples
    --------
    >>> import hotloops as hl
    >>> hl.box_convert([[1.0, 2.0, 4.0, 6.0]], "xyxy", "cxcywh")
    array([[2.5, 4. , 3. , 4. ]])
    """
    call = Call("box_convert", out)
    [b] = _read(call, boxes=boxes)
    _need_boxes("box_convert", "boxes", b, None)
    source, target = _format("box_convert", "in_fmt", in_fmt), _format("box_convert", "out_fmt", out_fmt)
    converted = call.result(b.shape)
    call.run("box_convert", b.reshape(-1, 4), converted.reshape(-1, 4), source=source, target=target)
    return call.finish(converted)


def _box_convert_gradient(g: Any, y: Any, a: SimpleNamespace) -> tuple[Any, ...]:
    call = Call("box_convert")
    [grad] = call.floats(grad=g)
    source, target = _format("box_convert", "in_fmt", a.in_fmt), _format("box_convert", "out_fmt", a.out_fmt)
    grad_boxes = call.empty(grad.shape)
    call.run("box_convert_grad", grad.reshape(-1, 4), grad_boxes.reshape(-1, 4), source=source, target=target)
    return (call.finish(grad_boxes),)


def _image_size(op: str, size: Any) -> tuple[float, float]:
    if not isinstance(size, list | tuple) or len(size) != 2:
        raise ValueError(f"{op}: size must be (height, width), {_check.shown(size)} came")
    height, width = (_check.number(op, "size", s, 0.0) for s in size)
    return height, width


@op(repeats=True)
def clip_boxes_to_image(boxes: Any, size: tuple[float, float], *, out: Any = None) -> Any:
    """The boxes with every coordinate moved into the image.

    Parameters
    ----------
    boxes : float[..., 4]
        Boxes x1 y1 x2 y2 in pixels; integers count as float64.
    size : (height, width)
        Of the image: x is clipped to [0, width], y to [0, height].
    out : float[..., 4], optional
        Where the result goes; may be `boxes`.

    Returns
    -------
    float[..., 4]
        NaN stays NaN. The gradient passes where a coordinate lies inside or on the border.

    Raises
    ------
    TypeError, ValueError
        Elements that are no numbers, a last axis other than 4, a size that is no pair of numbers of at least 0.

    Notes
    -----
    Source: torchvision.ops.clip_boxes_to_image.

    Examples
    --------
    >>> import hotloops as hl
    >>> hl.clip_boxes_to_image([[-1.0, 2.0, 40.0, 6.0]], (10, 20))
    array([[ 0.,  2., 20.,  6.]])
    """
    call = Call("clip_boxes_to_image", out)
    [b] = _read(call, boxes=boxes)
    _need_boxes("clip_boxes_to_image", "boxes", b, None)
    height, width = _image_size("clip_boxes_to_image", size)
    clipped = call.result(b.shape)
    call.run("clip_boxes", b.reshape(-1, 4), clipped.reshape(-1, 4), height=height, width=width)
    return call.finish(clipped)


def _clip_boxes_gradient(g: Any, y: Any, a: SimpleNamespace) -> tuple[Any, ...]:
    call = Call("clip_boxes_to_image")
    boxes, grad = _read(call, boxes=a.boxes, grad=g)
    height, width = _image_size("clip_boxes_to_image", a.size)
    grad_boxes = call.empty(boxes.shape)
    flat = [x.reshape(-1, 4) for x in (grad, boxes, grad_boxes)]
    call.run("clip_boxes_grad", *flat, height=height, width=width)
    return (call.finish(grad_boxes),)


@op(repeats=True, then=_first)
def remove_small_boxes(boxes: Any, min_size: float) -> Any:
    """The indices of the boxes whose width and height are both at least `min_size`.

    Parameters
    ----------
    boxes : float[N, 4]
        Boxes x1 y1 x2 y2 in pixels; integers count as float64.
    min_size : float
        In pixels.

    Returns
    -------
    int64[K]
        In increasing order. A box with a NaN side is not among them.

    Raises
    ------
    TypeError, ValueError
        Elements that are no numbers, a shape other than [N, 4], a `min_size` that is NaN or no number.

    Notes
    -----
    Source: torchvision.ops.remove_small_boxes.

    Examples
    --------
    >>> import hotloops as hl
    >>> hl.remove_small_boxes([[0, 0, 9, 9], [0, 0, 1, 9]], 2)
    array([0])
    """
    call = Call("remove_small_boxes")
    [b] = _read(call, boxes=boxes)
    _need_boxes("remove_small_boxes", "boxes", b)
    smallest = _check.number("remove_small_boxes", "min_size", min_size)
    keep, count = call.empty(b.shape[:1], np.int64), call.empty((1,), np.int64)
    call.run("remove_small_boxes", b, keep, count, min_size=smallest)
    return call.finish(keep), call.finish(count)


# ------------------------------------------------------------------------------------------------------------ overlap


def _overlap(op: str, boxes1: Any, boxes2: Any, fmt: Any, paired: Any, out: Any, kind: int, eps: float) -> Any:
    call = Call(op, out)
    a, b = _read(call, boxes1=boxes1, boxes2=boxes2)
    _need_boxes(op, "boxes1", a)
    _need_boxes(op, "boxes2", b)
    source, paired = _format(op, "fmt", fmt), _check.flag(op, "paired", paired)
    if paired and a.shape != b.shape:
        raise ValueError(
            f"{op}: paired boxes1 and boxes2 have the shapes {tuple(a.shape)} and {tuple(b.shape)}, equal ones are needed"
        )
    y = call.result(a.shape[:1] if paired else (a.shape[0], b.shape[0]))
    call.run("box_iou_paired" if paired else "box_iou", _corners(call, a, source), _corners(call, b, source), y, kind=kind, eps=eps)
    return call.finish(y)


@op(repeats=True)
def box_iou(boxes1: Any, boxes2: Any, fmt: str = "xyxy", *, paired: bool = False, out: Any = None) -> Any:
    """Intersection over union of every box of the one list with every box of the other.

    Parameters
    ----------
    boxes1, boxes2 : float[N, 4], float[M, 4]
        Boxes in the notation `fmt`, on continuous coordinates (no pixel is added); integers count as float64.
    fmt : {"xyxy", "xywh", "cxcywh"}
        Corners; corner and size; centre and size.
    paired : bool
        True: the first box with the first, the second with the second ... (N = M).
    out : float[N, M], optional
        Where the result goes (float[N] when paired).

    Returns
    -------
    float[N, M]
        In [0, 1]; float[N] when paired. An empty or inverted box has IoU 0 with every box, a box with a NaN has NaN. A box
        with itself gives exactly 1 wherever its area is a finite number above 0, however large the coordinates.

    Raises
    ------
    TypeError, ValueError, MemoryError
        Elements that are no numbers; shapes other than [N, 4]; an unknown `fmt`; a result too large for any memory.

    Notes
    -----
    inter / ((area1 + area2) - inter), each operation rounded once, in the element type of the boxes (float16: in float32).
    Source: Jaccard (1912); torchvision.ops.box_iou.

    Examples
    --------
    >>> import hotloops as hl
    >>> hl.box_iou([[0.0, 0.0, 2.0, 2.0]], [[1.0, 0.0, 3.0, 2.0], [5.0, 5.0, 6.0, 6.0]])
    array([[0.33333333, 0.        ]])
    """
    return _overlap("box_iou", boxes1, boxes2, fmt, paired, out, _IOU, 0.0)


@op(repeats=True)
def generalized_box_iou(boxes1: Any, boxes2: Any, fmt: str = "xyxy", *, paired: bool = False, out: Any = None) -> Any:
    """Generalized IoU: IoU less the share of the smallest enclosing box that neither box covers.

    Parameters
    ----------
    boxes1, boxes2, fmt, paired, out
        As for `box_iou`.

    Returns
    -------
    float[N, M]
        In [-1, 1]; float[N] when paired. Finite for empty and inverted boxes, NaN for a box with a NaN.

    Raises
    ------
    TypeError, ValueError, MemoryError
        As `box_iou`.

    Notes
    -----
    Source: Rezatofighi et al., Generalized Intersection over Union (2019); torchvision.ops.generalized_box_iou.

    Examples
    --------
    >>> import hotloops as hl
    >>> hl.generalized_box_iou([[0.0, 0.0, 1.0, 1.0]], [[3.0, 0.0, 4.0, 1.0]])
    array([[-0.5]])
    """
    return _overlap("generalized_box_iou", boxes1, boxes2, fmt, paired, out, _GIOU, 0.0)


@op(repeats=True)
def distance_box_iou(
    boxes1: Any, boxes2: Any, eps: float = 1e-7, fmt: str = "xyxy", *, paired: bool = False, out: Any = None
) -> Any:
    """Distance IoU: IoU less the squared distance of the centres over the squared diagonal of the enclosing box.

    Parameters
    ----------
    boxes1, boxes2, fmt, paired, out
        As for `box_iou`.
    eps : float
        Added to the squared diagonal.

    Returns
    -------
    float[N, M]
        float[N] when paired. Finite for empty and inverted boxes, NaN for a box with a NaN.

    Raises
    ------
    TypeError, ValueError, MemoryError
        As `box_iou`; an `eps` below 0.

    Notes
    -----
    Source: Zheng et al., Distance-IoU loss (2020); torchvision.ops.distance_box_iou.

    Examples
    --------
    >>> import hotloops as hl
    >>> hl.distance_box_iou([[0.0, 0.0, 1.0, 1.0]], [[3.0, 0.0, 4.0, 1.0]], eps=0.0).round(4)
    array([[-0.5294]])
    """
    eps = _check.number("distance_box_iou", "eps", eps, 0.0)
    return _overlap("distance_box_iou", boxes1, boxes2, fmt, paired, out, _DIOU, eps)


@op(repeats=True)
def complete_box_iou(
    boxes1: Any, boxes2: Any, eps: float = 1e-7, fmt: str = "xyxy", *, paired: bool = False, out: Any = None
) -> Any:
    """Complete IoU: distance IoU less a term for the difference of the aspect ratios.

    Parameters
    ----------
    boxes1, boxes2, fmt, paired, out
        As for `box_iou`.
    eps : float
        Added to the squared diagonal and to the divisor of the weight alpha.

    Returns
    -------
    float[N, M]
        float[N] when paired. Finite for empty and inverted boxes, NaN for a box with a NaN.

    Raises
    ------
    TypeError, ValueError, MemoryError
        As `box_iou`; an `eps` below 0.

    Notes
    -----
    The gradient takes the weight alpha as a constant, as the paper and torchvision have it.
    Source: Zheng et al., Distance-IoU loss (2020); torchvision.ops.complete_box_iou.

    Examples
    --------
    >>> import hotloops as hl
    >>> hl.complete_box_iou([[0.0, 0.0, 2.0, 1.0]], [[0.0, 0.0, 1.0, 2.0]]).round(4)
    array([[0.2371]])
    """
    eps = _check.number("complete_box_iou", "eps", eps, 0.0)
    return _overlap("complete_box_iou", boxes1, boxes2, fmt, paired, out, _CIOU, eps)


def _overlap_gradient(kind: int) -> Any:
    """The gradient rule of one measure, matrix and paired."""

    def gradient(g: Any, y: Any, a: SimpleNamespace) -> tuple[Any, ...]:
        call = Call("box_iou")
        one, two, grad = _read(call, boxes1=a.boxes1, boxes2=a.boxes2, grad=g)
        source, eps = _format("box_iou", "fmt", a.fmt), float(getattr(a, "eps", 0.0))
        one, two = _corners(call, one, source), _corners(call, two, source)
        grads: list[Any] = [None, None]
        if a.paired:
            grads = [call.empty(one.shape), call.empty(two.shape)]
            call.run("box_iou_paired_grad", grad, one, two, *grads, kind=kind, eps=eps)
        else:
            for second, boxes in enumerate((one, two)):
                if f"boxes{second + 1}" in a.needs:
                    grads[second] = call.empty(boxes.shape)
                    call.run("box_iou_grad", grad, one, two, grads[second], kind=kind, eps=eps, second=second)
        return tuple(None if v is None else call.finish(_to_format(call, v, source)) for v in grads)

    return gradient


@op
def sparse_box_iou(boxes1: Any, boxes2: Any, threshold: float, *, fmt: str = "xyxy") -> tuple[Any, Any, Any]:
    """The pairs of boxes with IoU above a threshold, and their IoU, without the full matrix.

    Parameters
    ----------
    boxes1, boxes2 : float[N, 4], float[M, 4]
        Boxes in the notation `fmt`; integers count as float64.
    threshold : float
        Pairs with IoU > threshold are listed (strictly, as `nms` has it); 0 lists all that overlap.
    fmt : {"xyxy", "xywh", "cxcywh"}
        Corners; corner and size; centre and size.

    Returns
    -------
    rows, cols : int64[K]
        Indices into boxes1 and boxes2, sorted by row, then column.
    iou : float[K]
        The values that `box_iou` has there. NaN is above no threshold.

    Raises
    ------
    TypeError, ValueError, MemoryError
        As `box_iou`; a threshold that is NaN or no number.

    Notes
    -----
    Source: as `box_iou`.

    Examples
    --------
    >>> import hotloops as hl
    >>> hl.sparse_box_iou([[0, 0, 2, 2], [5, 5, 6, 6]], [[0, 0, 2, 2], [5, 5, 6, 7]], 0.4)
    (array([0, 1]), array([0, 1]), array([1. , 0.5]))
    """
    call = Call("sparse_box_iou")
    a, b = _read(call, boxes1=boxes1, boxes2=boxes2)
    _need_boxes("sparse_box_iou", "boxes1", a)
    _need_boxes("sparse_box_iou", "boxes2", b)
    source = _format("sparse_box_iou", "fmt", fmt)
    with np.errstate(over="ignore"):
        threshold = float(call.compute.type(_check.number("sparse_box_iou", "threshold", threshold)))
    a, b = _corners(call, a, source), _corners(call, b, source)
    counts = call.empty(a.shape[:1], np.int64)
    call.run("sparse_box_iou_count", a, b, counts, threshold=threshold)
    found = int(call.get(counts).sum()) if a.shape[0] else 0
    rows, cols, iou = call.empty((found,), np.int64), call.empty((found,), np.int64), call.empty((found,))
    call.run("sparse_box_iou", a, b, counts, rows, cols, iou, threshold=threshold)
    return call.finish(rows), call.finish(cols), call.finish(iou)


# -------------------------------------------------------------------------------------------------------- suppression


def _nms(
    op: str, boxes: Any, scores: Any, idxs: Any, iou_threshold: Any, score_threshold: Any, max_output: Any, grouped: bool
) -> Any:
    call = Call(op)
    b, s = _read(call, boxes=boxes, scores=scores)
    _need_boxes(op, "boxes", b)
    groups = call.indices("idxs", idxs) if grouped else None
    for name, array in (("scores", s), ("idxs", groups)):
        if array is not None and tuple(array.shape) != (b.shape[0],):
            raise ValueError(f"{op}: {name} has the shape {tuple(array.shape)}, ({b.shape[0]},) is needed, one for each box")
    real = call.compute.type
    with np.errstate(over="ignore"):
        threshold = float(real(_check.number(op, "iou_threshold", iou_threshold)))
        lowest = -math.inf if score_threshold is None else float(real(_check.number(op, "score_threshold", score_threshold)))
    limit = b.shape[0] if max_output is None else min(_check.integer(op, "max_output", max_output, 0), b.shape[0])
    keep, count = call.empty(b.shape[:1], np.int64), call.empty((1,), np.int64)
    call.run("nms", b, s, groups, keep, count, iou_threshold=threshold, score_threshold=lowest, max_output=limit)
    return call.finish(keep), call.finish(count)


@op(repeats=True, then=_first)
def nms(
    boxes: Any, scores: Any, iou_threshold: float, *, score_threshold: float | None = None, max_output: int | None = None
) -> Any:
    """The indices of the boxes that survive non-maximum suppression, by decreasing score.

    Parameters
    ----------
    boxes : float[N, 4]
        Boxes x1 y1 x2 y2; integers count as float64.
    scores : float[N]
        Equal scores: the lower index counts as higher. NaN scores come last, in order of index.
    iou_threshold : float
        A box is dropped when its IoU with a kept box of higher score is greater (strictly) than this.
    score_threshold : float, optional
        Boxes whose score is not greater (strictly) than this are left out from the start, NaN scores too.
    max_output : int, optional
        Stops after so many indices.

    Returns
    -------
    int64[K]
        The same on every backend, bit for bit. A box with a NaN neither suppresses nor is suppressed; nor does an empty one.

    Raises
    ------
    TypeError, ValueError
        Elements that are no numbers; shapes other than [N, 4] and [N]; a threshold that is NaN; `max_output` below 0.

    Notes
    -----
    The IoU is that of `box_iou`, in the element type of the boxes; the threshold is rounded to that type.
    Source: Felzenszwalb et al., Object detection with discriminatively trained part-based models (2010), section 7;
    torchvision.ops.nms.

    Examples
    --------
    >>> import hotloops as hl
    >>> hl.nms([[0.0, 0.0, 9.0, 9.0], [0.0, 0.0, 9.0, 8.0], [20.0, 0.0, 29.0, 9.0]], [0.8, 0.9, 0.3], 0.5)
    array([1, 2])
    """
    return _nms("nms", boxes, scores, None, iou_threshold, score_threshold, max_output, False)


@op(repeats=True, then=_first)
def batched_nms(
    boxes: Any,
    scores: Any,
    idxs: Any,
    iou_threshold: float,
    *,
    score_threshold: float | None = None,
    max_output: int | None = None,
) -> Any:
    """The indices of the boxes that survive non-maximum suppression within their group, by decreasing score.

    Parameters
    ----------
    boxes, scores, iou_threshold, score_threshold
        As for `nms`.
    idxs : int64[N]
        The group (class, image, or a number made of both) of each box: any integers. Boxes of different groups never suppress
        each other; the groups are compared, no coordinate is moved.
    max_output : int, optional
        How many indices come back at most, over all groups.

    Returns
    -------
    int64[K]
        As for `nms`, over all groups.

    Raises
    ------
    TypeError, ValueError
        As `nms`; `idxs` that are no integers, or not one a box.

    Notes
    -----
    Source: torchvision.ops.batched_nms.

    Examples
    --------
    >>> import hotloops as hl
    >>> hl.batched_nms([[0, 0, 9, 9], [0, 0, 9, 8], [0, 0, 9, 9]], [0.8, 0.9, 0.3], [7, 7, -1], 0.5)
    array([1, 2])
    """
    return _nms("batched_nms", boxes, scores, idxs, iou_threshold, score_threshold, max_output, True)


@op(repeats=True, then=_first)
def soft_nms(
    boxes: Any,
    scores: Any,
    *,
    method: str = "linear",
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    score_threshold: float = 0.001,
) -> Any:
    """The indices of the boxes by decreasing lowered score, and those scores: overlap lowers a score and drops no box at once.

    Parameters
    ----------
    boxes : float[N, 4]
        Boxes x1 y1 x2 y2; integers count as float64.
    scores : float[N]
        Equal scores: the lower index counts as higher.
    method : {"linear", "gaussian"}
        A box taken multiplies the scores of the rest by 1 - IoU where IoU > `iou_threshold`, or by exp(-IoU^2 / sigma).
    iou_threshold, sigma : float
        Of the linear and the Gaussian method.
    score_threshold : float
        A box whose score is not greater than this, or NaN, is dropped.

    Returns
    -------
    keep : int64[K]
        The boxes in the order taken.
    scores : float[K]
        Their lowered scores. A box with a NaN lowers nothing and is not lowered.

    Raises
    ------
    TypeError, ValueError
        As `nms`; an unknown method; a sigma that is not above 0.

    Notes
    -----
    Source: Bodla et al., Soft-NMS (2017).

    Examples
    --------
    >>> import hotloops as hl
    >>> keep, lowered = hl.soft_nms([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 1.0]], [0.8, 0.6])
    >>> keep, lowered.round(3)
    (array([0, 1]), array([0.8, 0.3]))
    """
    call = Call("soft_nms")
    b, s = _read(call, boxes=boxes, scores=scores)
    _need_boxes("soft_nms", "boxes", b)
    if tuple(s.shape) != (b.shape[0],):
        raise ValueError(f"soft_nms: scores has the shape {tuple(s.shape)}, ({b.shape[0]},) is needed, one for each box")
    gaussian = int(_check.one_of("soft_nms", "method", method, ("linear", "gaussian")) == "gaussian")
    real = call.compute.type
    with np.errstate(all="ignore"):
        numbers = {
            "iou_threshold": float(real(_check.number("soft_nms", "iou_threshold", iou_threshold))),
            "sigma": float(real(_check.number("soft_nms", "sigma", sigma, 0.0))),
            "score_threshold": float(real(_check.number("soft_nms", "score_threshold", score_threshold))),
        }
    if numbers["sigma"] == 0:
        raise ValueError(f"soft_nms: sigma must be above 0, {_check.shown(sigma)} came")
    n = b.shape[:1]
    keep, kept, count = call.empty(n, np.int64), call.empty(n), call.empty((1,), np.int64)
    call.run("soft_nms", b, s, keep, kept, count, gaussian=gaussian, **numbers)
    return call.finish(keep), call.finish(kept), call.finish(count)


# ------------------------------------------------------------------------------------------------------------- RoIs


def _rois(op: str, boxes: Any, images: int, dtype: Any) -> Any:
    """[K, 5] with the image index first, from that or from one [K, 4] an image; integers become dtype."""
    if isinstance(boxes, list | tuple) and (not boxes or any(hasattr(b, "shape") for b in boxes)):
        if len(boxes) != images:
            raise ValueError(f"{op}: boxes is a list of {len(boxes)} arrays, the input has {images} images")
        parts = [np.zeros((0, 5), dtype)]
        for i, b in enumerate(boxes):
            array = host_array(op, f"boxes[{i}]", _dispatch.adapter("cuda").to_host(b) if is_device(b) else b)
            _need_boxes(op, f"boxes[{i}]", array)
            kind = np.result_type(array.dtype if array.dtype.kind == "f" else dtype, np.float32)  # holds any image index
            parts.append(np.concatenate([np.full((len(array), 1), i, kind), array], axis=1, dtype=kind))
        return np.concatenate(parts)
    if is_device(boxes):
        return boxes
    array = host_array(op, "boxes", boxes)
    return array if array.dtype.kind == "f" else array.astype(dtype)


def _pooling(call: Call, input: Any, boxes: Any, output_size: Any) -> tuple[Any, Any, tuple[int, ...]]:
    """Input and RoIs in one float type, and the bins."""
    name = call.op
    x = input if hasattr(input, "shape") and hasattr(input, "dtype") else host_array(name, "input", input)
    if len(x.shape) != 4 or 0 in x.shape[2:]:
        raise ValueError(f"{name}: input has the shape {tuple(x.shape)}, [N, C, H, W] with H, W of at least 1 is needed")
    bins = _check.integers(name, "output_size", output_size, 2, 0)
    half = np.dtype(x.dtype) == np.float16  # RoIs stay in float32 then: float16 has no 2049
    rois = _rois(name, boxes, x.shape[0], np.dtype(np.float32) if half else x.dtype)
    if is_device(x) and not is_device(rois):
        rois = _dispatch.adapter("cuda")._cuda().to_device(np.ascontiguousarray(rois, dtype=np.float32 if half else x.dtype))
    if len(rois.shape) != 2 or rois.shape[1] != 5:
        raise ValueError(
            f"{name}: boxes has the shape {tuple(rois.shape)}, [K, 5] with the image index first, "
            "or a list of one [K, 4] for each image, is needed"
        )
    x, rois = call.floats(input=x, boxes=rois)
    if half and call.compute == np.float32:
        call.dtype = np.dtype(np.float16)
    return x, rois, bins


def _need_images(call: Call, bad: Any, images: int) -> None:
    position = int(call.get(bad)[0])
    if position:
        raise ValueError(f"{call.op}: boxes[{position - 1}, 0] must be the number of one of the {images} images, from 0")


def _roi_align_options(sampling_ratio: Any, aligned: Any, mode: Any, spatial_scale: Any) -> dict[str, Any]:
    return {
        "spatial_scale": _check.number("roi_align", "spatial_scale", spatial_scale),
        "sampling_ratio": max(_check.integer("roi_align", "sampling_ratio", sampling_ratio, None, _MAX_SAMPLES), 0),
        "aligned": int(_check.flag("roi_align", "aligned", aligned)),
        "maximum": int(_check.one_of("roi_align", "mode", mode, ("avg", "max")) == "max"),
    }


@op
def roi_align(
    input: Any,
    boxes: Any,
    output_size: Any,
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
    *,
    mode: str = "avg",
    out: Any = None,
) -> Any:
    """Each region of interest as a small map: bins, each the mean of bilinear samples of the input.

    Parameters
    ----------
    input : float[N, C, H, W]
    boxes : float[K, 5] or list of float[K_i, 4]
        Image index, x1, y1, x2, y2; or one list of x1 y1 x2 y2 for each image. Integers count in the element type of `input`.
    output_size : int or (int, int)
        Rows and columns of bins, PH and PW.
    spatial_scale : float
        Pixels of `input` for one unit of `boxes`.
    sampling_ratio : int
        Samples along each side of a bin; not positive: ceil(size of the bin). At most 4096.
    aligned : bool
        True: coordinates are moved by half a pixel, as pixel centres ask for. False: not, and a RoI is at least 1 wide.
    mode : {"avg", "max"}
        The mean of the samples, or the largest.
    out : float[K, C, PH, PW], optional
        Where the result goes.

    Returns
    -------
    float[K, C, PH, PW]
        A sample more than one pixel outside the input counts as 0. A RoI whose coordinates are not finite is NaN. The gradient
        by `input` is the same bits in every run; `boxes` has none.

    Raises
    ------
    TypeError, ValueError, MemoryError
        Element types that are no floats; other shapes; an image index that is no whole number in [0, N); a negative size.

    Notes
    -----
    Source: He et al., Mask R-CNN (2017), section 3; torchvision.ops.roi_align.

    Examples
    --------
    >>> import numpy as np, hotloops as hl
    >>> x = np.arange(16.0).reshape(1, 1, 4, 4)
    >>> hl.roi_align(x, [np.array([[0.0, 0.0, 3.0, 3.0]])], 1)
    array([[[[7.5]]]])
    """
    call = Call("roi_align", out)
    options = _roi_align_options(sampling_ratio, aligned, mode, spatial_scale)
    x, rois, bins = _pooling(call, input, boxes, output_size)
    y = call.result((rois.shape[0], x.shape[1], *bins))
    bad = call.empty((1,), np.int64)
    call.run("roi_align", x, rois, y, bad, **options)
    _need_images(call, bad, x.shape[0])
    return call.finish(y)


def _roi_align_gradient(g: Any, y: Any, a: SimpleNamespace) -> tuple[Any, ...]:
    call = Call("roi_align")
    options = _roi_align_options(a.sampling_ratio, a.aligned, a.mode, a.spatial_scale)
    x, rois, _ = _pooling(call, a.input, a.boxes, a.output_size)
    [grad] = call.floats(grad=g)
    grad_input, bad = call.empty(x.shape), call.empty((1,), np.int64)
    call.run("roi_align_grad", grad, x, rois, grad_input, bad, **options)
    return (call.finish(grad_input),)


@op
def roi_pool(input: Any, boxes: Any, output_size: Any, spatial_scale: float = 1.0, *, out: Any = None) -> Any:
    """Each region of interest as a small map: bins, each the maximum of its pixels.

    Parameters
    ----------
    input : float[N, C, H, W]
    boxes : float[K, 5] or list of float[K_i, 4]
        As for `roi_align`.
    output_size : int or (int, int)
        Rows and columns of bins, PH and PW.
    spatial_scale : float
        Pixels of `input` for one unit of `boxes`; the products are rounded, halves away from 0.
    out : float[K, C, PH, PW], optional
        Where the result goes.

    Returns
    -------
    float[K, C, PH, PW]
        A bin without pixels is 0, one with a NaN is NaN. A RoI with a NaN is NaN. The gradient by `input` goes to the first of
        the largest pixels of a bin; `boxes` has none.

    Raises
    ------
    TypeError, ValueError, MemoryError
        As `roi_align`.

    Notes
    -----
    Source: Girshick, Fast R-CNN (2015), section 2.1; torchvision.ops.roi_pool.

    Examples
    --------
    >>> import numpy as np, hotloops as hl
    >>> x = np.arange(16.0).reshape(1, 1, 4, 4)
    >>> hl.roi_pool(x, [np.array([[0.0, 0.0, 3.0, 3.0]])], 2)
    array([[[[ 5.,  7.],
             [13., 15.]]]])
    """
    call = Call("roi_pool", out)
    scale = _check.number("roi_pool", "spatial_scale", spatial_scale)
    x, rois, bins = _pooling(call, input, boxes, output_size)
    y = call.result((rois.shape[0], x.shape[1], *bins))
    bad = call.empty((1,), np.int64)
    call.run("roi_pool", x, rois, y, bad, spatial_scale=scale)
    _need_images(call, bad, x.shape[0])
    return call.finish(y)


def _roi_pool_gradient(g: Any, y: Any, a: SimpleNamespace) -> tuple[Any, ...]:
    call = Call("roi_pool")
    x, rois, _ = _pooling(call, a.input, a.boxes, a.output_size)
    [grad] = call.floats(grad=g)
    grad_input, bad = call.empty(x.shape), call.empty((1,), np.int64)
    call.run("roi_pool_grad", grad, x, rois, grad_input, bad, spatial_scale=float(a.spatial_scale))
    return (call.finish(grad_input),)


# ------------------------------------------------------------------------------------------------------------- masks


def _masks(call: Call, name: str, value: Any) -> Any:
    """Masks as 0 and 1: whatever is not zero is inside, a NaN too."""
    array = host_array(call.op, name, value)
    masks = call.booleans(name, array if array.dtype.kind == "b" else array != 0)
    if len(masks.shape) != 3:
        raise ValueError(f"{call.op}: {name} has the shape {tuple(masks.shape)}, [N, H, W] is needed")
    return masks


@op
def mask_iou(masks1: Any, masks2: Any, *, out: Any = None) -> Any:
    """Intersection over union of every mask of the one list with every mask of the other, by pixels.

    Parameters
    ----------
    masks1, masks2 : bool[A, H, W], bool[B, H, W]
        Or numbers of any type: whatever is not 0 is inside, NaN too.
    out : float64[A, B], optional
        Where the result goes.

    Returns
    -------
    float64[A, B]
        0 where both masks are empty.

    Raises
    ------
    TypeError, ValueError, MemoryError
        Elements that are no numbers; other shapes, or masks of different sizes.

    Notes
    -----
    Source: Jaccard (1912).

    Examples
    --------
    >>> import numpy as np, hotloops as hl
    >>> hl.mask_iou(np.array([[[True, True]]]), np.array([[[True, False]]]))
    array([[0.5]])
    """
    call = Call("mask_iou", out)
    one, two = _masks(call, "masks1", masks1), _masks(call, "masks2", masks2)
    if tuple(one.shape[1:]) != tuple(two.shape[1:]):
        raise ValueError(
            f"mask_iou: masks1 and masks2 have the shapes {tuple(one.shape)} and {tuple(two.shape)}, one size is needed"
        )
    y = call.result((one.shape[0], two.shape[0]))
    pixels = one.shape[1] * one.shape[2]
    call.run("mask_iou", one.reshape(one.shape[0], pixels), two.reshape(two.shape[0], pixels), y)
    return call.finish(y)


@op
def masks_to_boxes(masks: Any, *, out: Any = None) -> Any:
    """The box around the pixels of each mask.

    Parameters
    ----------
    masks : bool[N, H, W]
        Or numbers of any type: whatever is not 0 is inside, NaN too.
    out : float32[N, 4], optional
        Where the result goes.

    Returns
    -------
    float32[N, 4]
        x1 y1 x2 y2: the first and last column and row that hold a pixel (the last one included, so x2 - x1 is one less than the
        columns covered); 0 0 0 0 for an empty mask.

    Raises
    ------
    TypeError, ValueError
        Elements that are no numbers; a shape other than [N, H, W].

    Notes
    -----
    Source: torchvision.ops.masks_to_boxes.

    Examples
    --------
    >>> import numpy as np, hotloops as hl
    >>> hl.masks_to_boxes(np.array([[[False, True, True], [False, False, False]]]))
    array([[1., 0., 2., 0.]], dtype=float32)
    """
    call = Call("masks_to_boxes", out)
    call.dtype = call.compute = np.dtype(np.float32)
    m = _masks(call, "masks", masks)
    boxes = call.result((m.shape[0], 4))
    call.run("masks_to_boxes", m, boxes)
    return call.finish(boxes)
