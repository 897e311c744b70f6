"""The named workloads of the benchmarks: one call of a public function on real inputs each.

The sizes are those of the layers and detectors that people run (ResNet, MobileNet, text models, ViT, COCO detectors). `quick`
marks the ones that `--quick` runs; every workload also has a small size, at which the tests run it on every backend.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import inputs as make
from .inputs import normal, rng

Inputs = dict[str, Any]

# No size of a small workload is above these.
SMALL = {"N": 2, "C": 16, "F": 18, "H": 15}
SMALL |= {"T": 9, "D": 20, "hidden": 19, "L": 37, "S": 37, "heads": 3}
SMALL |= {"boxes": 70, "others": 40, "rois": 9}


@dataclass(frozen=True)
class Workload:
    """`inputs(**sizes)` makes the arrays, `call(hotloops, arrays)` is what is timed; `roofline` is false where the data
    decide how much there is to do, so that no peak of the machine says how fast it could be; `parameters` are what the call
    passes besides arrays, for the peers."""

    name: str
    family: str
    op: str
    about: str
    sizes: Mapping[str, int]
    inputs: Callable[..., Inputs] = field(repr=False)
    call: Callable[[Any, Inputs], Any] = field(repr=False)
    quick: bool = False
    roofline: bool = True
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def make(self, small: bool = False) -> Inputs:
        """The arrays of the call, the same ones each time."""
        return self.inputs(**(self.small_sizes if small else self.sizes))

    @property
    def small_sizes(self) -> dict[str, int]:
        return {name: min(size, SMALL.get(name, size)) for name, size in self.sizes.items()}

    def shape(self, small: bool = False) -> str:
        """The sizes, to be read by people."""
        return self.about.format(**(self.small_sizes if small else self.sizes))


_all: dict[str, Workload] = {}


def workloads() -> dict[str, Workload]:
    """Every workload by name, family by family."""
    return dict(_all)


def _add(*args: Any, **kwargs: Any) -> None:
    workload = Workload(*args, **kwargs)
    _all[workload.name] = workload


# -------------------------------------------------------------------------------------------------------------- conv


def _conv_inputs(N: int, C: int, H: int, F: int, K: int, stride: int, depthwise: int) -> Inputs:
    random, taps = rng(), (1 if depthwise else C) * K * K
    out = (H + 2 * (K // 2) - K) // stride + 1
    F = C if depthwise else F
    return {
        "x": make.features(N, C, H, H, random),
        "w": normal(random, F, 1 if depthwise else C, K, K, scale=taps**-0.5),
        "b": normal(random, F, scale=0.1),
        "gy": normal(random, N, F, out, out),
    }


def _conv(name: str, N: int, C: int, H: int, F: int, K: int, stride: int = 1, depthwise: bool = False, quick: bool = False) -> None:
    about = "{N}×{C}×{H}×{H}, " + ("depthwise" if depthwise else "{F} filters") + " {K}×{K}" + ("/{stride}" if stride > 1 else "")
    sizes = {"N": N, "C": C, "H": H, "F": F, "K": K, "stride": stride, "depthwise": int(depthwise)}

    def call(hl: Any, a: Inputs) -> Any:
        return hl.conv2d(a["x"], a["w"], a["b"], stride, K // 2, 1, a["x"].shape[1] if depthwise else 1)

    _add(name, "conv", "conv2d", about, sizes, _conv_inputs, call, quick, parameters={"stride": stride, "padding": K // 2})


_conv("conv7x7s2_n8_3x224_64", 8, 3, 224, 64, 7, 2, quick=True)
_conv("conv3x3_n8_64x56_64", 8, 64, 56, 64, 3, quick=True)
_conv("conv3x3_n8_128x28_128", 8, 128, 28, 128, 3)
_conv("conv3x3_n8_256x14_256", 8, 256, 14, 256, 3, quick=True)
_conv("conv3x3_n8_512x7_512", 8, 512, 7, 512, 3)
_conv("conv3x3_n1_64x112_64", 1, 64, 112, 64, 3)
_conv("conv1x1_n8_256x56_64", 8, 256, 56, 64, 1, quick=True)
_conv("conv1x1_n8_64x56_256", 8, 64, 56, 256, 1)
_conv("conv3x3s2_n8_128x56_128", 8, 128, 56, 128, 3, 2)
_conv("conv5x5_n8_32x28_96", 8, 32, 28, 96, 5)
_conv("dwconv3x3_n8_144x56", 8, 144, 56, 144, 3, depthwise=True, quick=True)
_conv("conv3x3_n32_1x28_8", 32, 1, 28, 8, 3)
_conv("small_conv3x3_1x1x8x8", 1, 1, 8, 1, 3)


def _line_inputs(N: int, C: int, L: int, F: int, K: int) -> Inputs:
    random = rng()
    return {
        "x": normal(random, N, C, L),
        "w": normal(random, F, C, K, scale=(C * K) ** -0.5),
        "b": normal(random, F, scale=0.1),
    }


def _volume_inputs(N: int, C: int, D: int, H: int, F: int, K: int) -> Inputs:
    random = rng()
    return {
        "x": normal(random, N, C, D, H, H),
        "w": normal(random, F, C, K, K, K, scale=(C * K**3) ** -0.5),
        "b": normal(random, F, scale=0.1),
    }


_add(
    "conv1d_n8_64x1000_64_3",
    "conv",
    "conv1d",
    "{N}×{C}×{L}, {F} filters of {K}",
    {"N": 8, "C": 64, "L": 1000, "F": 64, "K": 3},
    _line_inputs,
    lambda hl, a: hl.conv1d(a["x"], a["w"], a["b"], 1, 1),
    parameters={"stride": 1, "padding": 1},
)
_add(
    "conv3d_n1_32x16x28_32_3",
    "conv",
    "conv3d",
    "{N}×{C}×{D}×{H}×{H}, {F} filters {K}×{K}×{K}",
    {"N": 1, "C": 32, "D": 16, "H": 28, "F": 32, "K": 3},
    _volume_inputs,
    lambda hl, a: hl.conv3d(a["x"], a["w"], a["b"], 1, 1),
    parameters={"stride": 1, "padding": 1},
)


def _backward(hl: Any, a: Inputs) -> Any:
    return hl.conv2d_backward(a["gy"], a["x"], a["w"], 1, 1)


_add(
    "conv3x3_bwd_n8_64x56_64",
    "conv",
    "conv2d_backward",
    "{N}×{C}×{H}×{H}, {F} filters {K}×{K}",
    {"N": 8, "C": 64, "H": 56, "F": 64, "K": 3, "stride": 1, "depthwise": 0},
    _conv_inputs,
    _backward,
    True,
)


def _unfold_inputs(N: int, C: int, H: int) -> Inputs:
    random = rng()
    return {"x": make.features(N, C, H, H, random), "columns": normal(random, N, C * 9, H * H)}


_PATCHES = ("{N}×{C}×{H}×{H}, 3×3", {"N": 8, "C": 64, "H": 56}, _unfold_inputs)
_add("im2col_n8_64x56_3x3", "conv", "unfold", *_PATCHES, lambda hl, a: hl.unfold(a["x"], 3, padding=1), True)
_add("col2im_n8_64x56_3x3", "conv", "fold", *_PATCHES, lambda hl, a: hl.fold(a["columns"], a["x"].shape[2:], 3, padding=1))


# -------------------------------------------------------------------------------------------------------------- pool


def _pool(name: str, op: str, about: str, window: tuple[int, ...], gradient: bool = False, quick: bool = False) -> None:
    def inputs(N: int, C: int, H: int) -> Inputs:
        random = rng()
        a = {"x": make.features(N, C, H, H, random)}
        if gradient:
            size, step, border = (*window, *(window[0], 0)[len(window) - 1 :])  # torch's defaults
            out = (H + 2 * border - size) // step + 1
            a["gy"] = normal(random, N, C, out, out)
        return a

    def call(hl: Any, a: Inputs) -> Any:
        function = getattr(hl, op)
        if not gradient:
            return function(a["x"], *window)
        y, pullback = hl.vjp(lambda x: function(x, *window), a["x"])
        return y, pullback(a["gy"])

    about = "{N}×{C}×{H}×{H}, " + about + (", fwd+bwd" if gradient else "")
    parameters = {"window": window, "gradient": gradient}
    _add(name, "pool", op, about, {"N": 8, "C": 64, "H": 112}, inputs, call, quick, parameters=parameters)


_pool("maxpool2x2s2_n8_64x112", "max_pool2d", "2×2/2", (2,), quick=True)
_pool("maxpool3x3s2_n8_64x112", "max_pool2d", "3×3/2", (3, 2, 1), quick=True)
_pool("maxpool2x2s2_fwdbwd", "max_pool2d", "2×2/2", (2,), gradient=True)
_pool("maxpool3x3s2_fwdbwd", "max_pool2d", "3×3/2", (3, 2, 1), gradient=True, quick=True)
_pool("avgpool2x2s2_n8_64x112", "avg_pool2d", "2×2/2", (2,), quick=True)
_pool("avgpool2x2s2_fwdbwd", "avg_pool2d", "2×2/2", (2,), gradient=True)
_pool("global_avgpool_n8_64x112", "adaptive_avg_pool2d", "to 1×1", (1,))
_pool("adaptive_avgpool7_n8_64x112", "adaptive_avg_pool2d", "to 7×7", (7,), quick=True)


# --------------------------------------------------------------------------------------------------------------- rnn


def _recurrent(kind: str, T: int, N: int, D: int, hidden: int, gradient: bool = False, quick: bool = False) -> None:
    def inputs(T: int, N: int, D: int, hidden: int) -> Inputs:
        return make.recurrent(kind, T, N, D, hidden)

    def call(hl: Any, a: Inputs) -> Any:
        function, weights = getattr(hl, kind), [a["w_ih"], a["w_hh"], a["b_ih"], a["b_hh"]]
        state = (a["h0"], a["c0"]) if kind == "lstm" else a["h0"]
        if not gradient:
            return function(a["x"], state, weights)[0]
        y, pullback = hl.vjp(lambda x, *w: function(x, state, list(w))[0], a["x"], *weights)
        return y, pullback(a["gy"])

    name = f"{kind}{'_fwdbwd' if gradient else ''}_T{T}_N{N}_I{D}_H{hidden}"
    about = "{T}×{N}×{D} → {hidden}" + (", fwd+bwd" if gradient else "")
    sizes = {"T": T, "N": N, "D": D, "hidden": hidden}
    _add(name, "rnn", kind, about, sizes, inputs, call, quick, parameters={"gradient": gradient})


_recurrent("lstm", 100, 1, 128, 256, quick=True)
_recurrent("lstm", 100, 32, 128, 256, quick=True)
_recurrent("lstm", 50, 64, 512, 512)
_recurrent("gru", 100, 32, 128, 256, quick=True)
_recurrent("rnn", 100, 32, 128, 256)
_recurrent("lstm", 100, 32, 128, 256, gradient=True, quick=True)
_recurrent("gru", 100, 32, 128, 256, gradient=True)


# --------------------------------------------------------------------------------------------------------- attention


def _softmax(name: str, about: str, quick: bool = False, **sizes: int) -> None:
    def inputs(**sizes: int) -> Inputs:
        """Scores of patches against patches, as softmax meets them in attention."""
        *outer, L, S = sizes.values()
        B = int(np.prod(outer))
        random = rng()
        q, k = make.patches(B, L, 64, random), make.patches(B, S, 64, random)
        return {"x": (q @ k.transpose(0, 2, 1) / 8).astype(np.float32).reshape(*outer, L, S)}

    _add(name, "attention", "softmax", about, sizes, inputs, lambda hl, a: hl.softmax(a["x"], -1), quick)


_softmax("softmax_4096x1024", "{L}×{S}", True, L=4096, S=1024)
_softmax("softmax_4x12x512x512", "{N}×{heads}×{L}×{S}", N=4, heads=12, L=512, S=512)
_softmax("small_softmax_1x10", "{L}×{S}", L=1, S=10)


def _attention(
    name: str, N: int, heads: int, L: int, S: int, causal: bool = False, gradient: bool = False, quick: bool = False
) -> None:
    def inputs(N: int, heads: int, L: int, S: int, head: int) -> Inputs:
        random = rng()

        def split(x: np.ndarray) -> np.ndarray:
            return np.ascontiguousarray(x.reshape(N, -1, heads, head).transpose(0, 2, 1, 3))

        q, k, v = (split(make.patches(N, n, heads * head, random)) for n in (L, S, S))
        return {"q": q, "k": k, "v": v, "gy": normal(random, N, heads, L, head)}

    def call(hl: Any, a: Inputs) -> Any:
        if not gradient:
            return hl.scaled_dot_product_attention(a["q"], a["k"], a["v"], is_causal=causal)
        y, pullback = hl.vjp(hl.scaled_dot_product_attention, a["q"], a["k"], a["v"])
        return y, pullback(a["gy"])

    about = "{N}×{heads}×{L}×{head}" + (", {S} keys" if L != S else "") + (", causal" if causal else "")
    about += ", fwd+bwd" if gradient else ""
    sizes = {"N": N, "heads": heads, "L": L, "S": S, "head": 64}
    parameters = {"causal": causal, "gradient": gradient}
    _add(name, "attention", "scaled_dot_product_attention", about, sizes, inputs, call, quick, parameters=parameters)


_attention("sdpa_1x12x512x64", 1, 12, 512, 512, quick=True)
_attention("sdpa_8x8x128x64", 8, 8, 128, 128)
_attention("sdpa_causal_1x12x1024x64", 1, 12, 1024, 1024, causal=True, quick=True)
_attention("sdpa_decode_8x12x2048x64", 8, 12, 1, 2048, quick=True)
_attention("sdpa_fwdbwd_1x12x512x64", 1, 12, 512, 512, gradient=True, quick=True)


def _heads_inputs(N: int, L: int, heads: int) -> Inputs:
    random, D = rng(), 64 * heads
    weights = {"w_in": normal(random, 3 * D, D, scale=D**-0.5), "b_in": normal(random, 3 * D, scale=0.02)}
    weights |= {"w_out": normal(random, D, D, scale=D**-0.5), "b_out": normal(random, D, scale=0.02)}
    return {"x": make.patches(N, L, D, random), **weights}


def _heads(hl: Any, a: Inputs) -> Any:
    x = a["x"]
    return hl.multi_head_attention(x, x, x, x.shape[-1] // 64, a["w_in"], a["b_in"], a["w_out"], a["b_out"])


_add(
    "mha_8x128x512_h8",
    "attention",
    "multi_head_attention",
    "{N}×{L}×512, {heads} heads",
    {"N": 8, "L": 128, "heads": 8},
    _heads_inputs,
    _heads,
)


# ------------------------------------------------------------------------------------------------------------- boxes


def _pairs(name: str, op: str, A: int, B: int, quick: bool = False) -> None:
    def inputs(boxes: int, others: int) -> Inputs:
        random = rng()
        return {"a": make.boxes(boxes, random), "b": make.boxes(others, random)}

    def call(hl: Any, a: Inputs) -> Any:
        return getattr(hl, op)(a["a"], a["b"])

    _add(name, "boxes", op, "{boxes} × {others}", {"boxes": A, "others": B}, inputs, call, quick)


_pairs("box_iou_1000x1000", "box_iou", 1000, 1000, quick=True)
_pairs("box_iou_5000x5000", "box_iou", 5000, 5000)
_pairs("box_iou_100000x100", "box_iou", 100000, 100)
_pairs("giou_1000x1000", "generalized_box_iou", 1000, 1000, quick=True)
_pairs("small_box_iou_4x4", "box_iou", 4, 4)


def _detections(boxes: int) -> Inputs:
    random = rng()
    found, scores = make.detections(boxes, random)
    return {"boxes": found, "scores": scores, "classes": random.integers(0, 80, boxes)}


def _nms(hl: Any, a: Inputs) -> Any:
    return hl.nms(a["boxes"], a["scores"], 0.5)


def _batched_nms(hl: Any, a: Inputs) -> Any:
    return hl.batched_nms(a["boxes"], a["scores"], a["classes"], 0.5)


for _n in (1000, 10000, 100000):
    _add(f"nms_{_n}", "boxes", "nms", "{boxes} boxes", {"boxes": _n}, _detections, _nms, _n == 10000, roofline=False)
_add(
    "batched_nms_20000_c80",
    "boxes",
    "batched_nms",
    "{boxes} boxes, 80 classes",
    {"boxes": 20000},
    _detections,
    _batched_nms,
    roofline=False,
)


def _roi_inputs(C: int, rois: int) -> Inputs:
    """A feature map of a picture of 1088 x 800 pixels, one number per 16 x 16 pixels, and boxes on that picture."""
    random = rng()
    regions = make.boxes(rois, random)
    regions[:, 0::2] = np.clip(regions[:, 0::2], 0, 1088)
    regions[:, 1::2] = np.clip(regions[:, 1::2], 0, 800)
    regions[:, 2:] = np.maximum(regions[:, 2:], regions[:, :2] + 1)
    return {"x": make.features(1, C, 50, 68, random), "rois": regions}


def _roi(name: str, op: str, call: Callable[[Any, Inputs], Any], quick: bool = False) -> None:
    _add(name, "boxes", op, "{C}×50×68, {rois} regions to 7×7", {"C": 256, "rois": 1000}, _roi_inputs, call, quick)


_roi(
    "roi_align_256x50x68_1000_7x7_sr2",
    "roi_align",
    lambda hl, a: hl.roi_align(a["x"], [a["rois"]], 7, 1 / 16, 2),
    True,
)
_roi("roi_pool_256x50x68_1000_7x7", "roi_pool", lambda hl, a: hl.roi_pool(a["x"], [a["rois"]], 7, 1 / 16))
