"""The workloads as ONNX models, for the peers that run such models: what stays the same over calls is part of the model.

A new one is a function of (workload, inputs) that returns (model, inputs of the model), and its line in MODELS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .workloads import Inputs, Workload

Node = tuple[str, Sequence[str], Sequence[str], Mapping[str, Any]]  # operator, inputs, outputs, attributes
Made = tuple[bytes, Inputs]
OPSET = 17


def _model(nodes: Sequence[Node], feeds: Inputs, constants: Inputs, output: Any = np.float32) -> Made:
    """The serialised model of nodes that end in an array y."""
    from onnx import helper, numpy_helper

    def kind(dtype: Any) -> int:
        return helper.np_dtype_to_tensor_dtype(np.dtype(dtype))

    graph = helper.make_graph(
        [helper.make_node(op, list(inputs), list(outputs), **attributes) for op, inputs, outputs, attributes in nodes],
        "workload",
        [helper.make_tensor_value_info(name, kind(array.dtype), array.shape) for name, array in feeds.items()],
        [helper.make_tensor_value_info("y", kind(output), None)],
        [numpy_helper.from_array(np.asarray(array, order="C"), name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9)
    return model.SerializeToString(), feeds


def _conv(w: Workload, a: Inputs) -> Made:
    groups, axes = a["x"].shape[1] // a["w"].shape[1], a["x"].ndim - 2
    border = [w.parameters["padding"]] * 2 * axes
    attributes = {"strides": [w.parameters["stride"]] * axes, "pads": border, "group": groups}
    return _model([("Conv", "xwb", "y", attributes)], {"x": a["x"]}, {"w": a["w"], "b": a["b"]})


def _pool(operator: str) -> Callable[[Workload, Inputs], Made | None]:
    def make(w: Workload, a: Inputs) -> Made | None:
        if w.parameters["gradient"]:
            return None
        window: tuple[int, ...] = w.parameters["window"]
        size, stride, border = (*window, *(window[0], 0)[len(window) - 1 :])
        attributes = {"kernel_shape": [size] * 2, "strides": [stride] * 2, "pads": [border] * 4}
        return _model([(operator, "x", "y", attributes)], {"x": a["x"]}, {})

    return make


def _adaptive_avg_pool2d(w: Workload, a: Inputs) -> Made | None:
    """To one place only: ONNX has no other."""
    return _model([("GlobalAveragePool", "x", "y", {})], {"x": a["x"]}, {}) if w.parameters["window"] == (1,) else None


def _recurrent(w: Workload, a: Inputs) -> Made | None:
    from .. import gru_gates_to_onnx, lstm_gates_to_onnx

    if w.parameters["gradient"]:
        return None
    orders: dict[str, Callable[[Any], Any]] = {"lstm": lstm_gates_to_onnx, "gru": gru_gates_to_onnx, "rnn": np.asarray}
    order = orders[w.op]
    constants: Inputs = {"w": order(a["w_ih"])[None], "r": order(a["w_hh"])[None], "h0": a["h0"], "one": np.array([1])}
    constants["b"] = np.concatenate([order(a["b_ih"]), order(a["b_hh"])])[None]
    inputs, attributes = ["x", "w", "r", "b", "", "h0"], {"hidden_size": a["h0"].shape[2]}
    if w.op == "lstm":
        inputs.append("c0")
        constants["c0"] = a["c0"]
    if w.op == "gru":
        attributes["linear_before_reset"] = 1
    nodes: list[Node] = [(w.op.upper(), inputs, ["directions"], attributes), ("Squeeze", ["directions", "one"], "y", {})]
    return _model(nodes, {"x": a["x"]}, constants)


def _softmax(w: Workload, a: Inputs) -> Made:
    return _model([("Softmax", "x", "y", {"axis": -1})], {"x": a["x"]}, {})


def _attention(causal: bool) -> list[Node]:
    """From q, k, v and scale (and mask) to `heads`."""
    return [
        ("Transpose", "k", ["turned"], {"perm": [0, 1, 3, 2]}),
        ("MatMul", ["q", "turned"], ["products"], {}),
        ("Mul", ["products", "scale"], ["scores"], {}),
        *([("Add", ["scores", "mask"], ["seen"], {})] if causal else []),
        ("Softmax", ["seen" if causal else "scores"], ["weights"], {"axis": -1}),
        ("MatMul", ["weights", "v"], ["heads"], {}),
    ]


def _scaled_dot_product_attention(w: Workload, a: Inputs) -> Made | None:
    if w.parameters["gradient"]:
        return None
    constants: Inputs = {"scale": np.float32(a["q"].shape[-1] ** -0.5)}
    if w.parameters["causal"]:
        hidden = np.triu(np.ones((a["q"].shape[2], a["k"].shape[2]), bool), 1)
        constants["mask"] = np.where(hidden, np.float32(-np.inf), np.float32(0))
    nodes = [*_attention(w.parameters["causal"]), ("Identity", ["heads"], "y", {})]
    return _model(nodes, {name: a[name] for name in "qkv"}, constants)


def _multi_head_attention(w: Workload, a: Inputs) -> Made:
    N, L, D = a["x"].shape
    constants = {"w_in": a["w_in"].T, "b_in": a["b_in"], "w_out": a["w_out"].T, "b_out": a["b_out"]}
    constants |= {"split": np.array([N, L, 3, D // 64, 64]), "joined": np.array([N, L, D]), "zero": np.array([0])}
    constants["scale"] = np.float32(1 / 8)
    nodes: list[Node] = [
        ("MatMul", ["x", "w_in"], ["product"], {}),
        ("Add", ["product", "b_in"], ["projected"], {}),
        ("Reshape", ["projected", "split"], ["apart"], {}),
        ("Transpose", ["apart"], ["inner"], {"perm": [2, 0, 3, 1, 4]}),
        ("Split", ["inner"], ["q1", "k1", "v1"], {"axis": 0}),
        *(("Squeeze", [f"{name}1", "zero"], name, {}) for name in "qkv"),
        *_attention(False),
        ("Transpose", ["heads"], ["outer"], {"perm": [0, 2, 1, 3]}),
        ("Reshape", ["outer", "joined"], ["row"], {}),
        ("MatMul", ["row", "w_out"], ["result"], {}),
        ("Add", ["result", "b_out"], "y", {}),
    ]
    return _model(nodes, {"x": a["x"]}, constants)


def _nms(w: Workload, a: Inputs) -> Made:
    constants = {"most": np.array([len(a["scores"])]), "threshold": np.array([0.5], np.float32), "two": np.array(2)}
    nodes: list[Node] = [
        ("NonMaxSuppression", ["boxes", "scores", "most", "threshold"], ["kept"], {}),
        ("Gather", ["kept", "two"], "y", {"axis": 1}),  # of image, class, box
    ]
    return _model(nodes, {"boxes": a["boxes"][None], "scores": a["scores"][None, None]}, constants, np.int64)


def _roi_align(w: Workload, a: Inputs) -> Made:
    attributes: dict[str, Any] = {"output_height": 7, "output_width": 7, "sampling_ratio": 2, "spatial_scale": 1 / 16}
    attributes["coordinate_transformation_mode"] = "output_half_pixel"
    node: Node = ("RoiAlign", ["x", "rois", "image"], "y", attributes)
    return _model([node], {"x": a["x"], "rois": a["rois"]}, {"image": np.zeros(len(a["rois"]), np.int64)})


MODELS: dict[str, Callable[[Workload, Inputs], Made | None]] = {
    "conv1d": _conv,
    "conv2d": _conv,
    "conv3d": _conv,
    "max_pool2d": _pool("MaxPool"),
    "avg_pool2d": _pool("AveragePool"),
    "adaptive_avg_pool2d": _adaptive_avg_pool2d,
    "lstm": _recurrent,
    "gru": _recurrent,
    "rnn": _recurrent,
    "softmax": _softmax,
    "scaled_dot_product_attention": _scaled_dot_product_attention,
    "multi_head_attention": _multi_head_attention,
    "nms": _nms,
    "roi_align": _roi_align,
}
