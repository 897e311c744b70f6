"""Other libraries beside hotloops: the same call on the same arrays, its result checked before it is timed.

A peer is a class with a `name` and a `version`: `prepare(workload, inputs, threads)` gives the call to time, or None where
the library has no such thing; `result` gives what the call returned as NumPy arrays. A new one is a class and its line in PEERS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from .. import _config
from .onnx_models import MODELS
from .workloads import Inputs, Workload


class Torch:
    """torch on the CPU: arrays are shared with NumPy, so that nothing is copied inside the timed call."""

    name = "torch"

    def __init__(self) -> None:
        import torch

        self.torch, self.version = torch, torch.__version__

    def prepare(self, workload: Workload, inputs: Inputs, threads: int) -> Callable[[], Any] | None:
        self.torch.set_num_threads(threads)
        make = getattr(self, f"_{workload.op}", None)
        if make is None:
            return None
        arrays = {name: self.torch.from_numpy(array) for name, array in inputs.items()}
        call = make(workload, arrays)
        return None if call is None else self._without_graph(call) if not workload.parameters.get("gradient") else call

    def result(self, result: Any) -> Any:
        if isinstance(result, tuple | list):
            return [self.result(part) for part in result]
        return None if result is None else result.detach().numpy()

    def _without_graph(self, call: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            with self.torch.inference_mode():
                return call()

        return run

    def _with_gradient(self, function: Callable[..., Any], gy: Any, *leaves: Any) -> Callable[[], Any]:
        leaves = tuple(leaf.clone().requires_grad_() for leaf in leaves)

        def run() -> Any:
            y = function(*leaves)
            return y, self.torch.autograd.grad(y, leaves, gy)

        return run

    # -- one method per op of the workloads

    def _conv2d(self, w: Workload, a: Any) -> Callable[[], Any]:
        function, p = getattr(self.torch.nn.functional, w.op), w.parameters
        groups = a["x"].shape[1] // a["w"].shape[1]
        return lambda: function(a["x"], a["w"], a["b"], p["stride"], p["padding"], 1, groups)

    _conv1d = _conv3d = _conv2d

    def _conv2d_backward(self, w: Workload, a: Any) -> Callable[[], Any]:
        backward, pair = self.torch.ops.aten.convolution_backward, [1, 1]
        filters = [a["w"].shape[0]]
        return lambda: backward(a["gy"], a["x"], a["w"], filters, pair, pair, pair, False, [0, 0], 1, [True] * 3)

    def _unfold(self, w: Workload, a: Any) -> Callable[[], Any]:
        return lambda: self.torch.nn.functional.unfold(a["x"], 3, padding=1)

    def _fold(self, w: Workload, a: Any) -> Callable[[], Any]:
        return lambda: self.torch.nn.functional.fold(a["columns"], a["x"].shape[2:], 3, padding=1)

    def _pooling(self, function: Callable[..., Any], w: Workload, a: Any) -> Callable[[], Any]:
        window = w.parameters["window"]
        if w.parameters["gradient"]:
            return self._with_gradient(lambda x: function(x, *window), a["gy"], a["x"])
        return lambda: function(a["x"], *window)

    def _max_pool2d(self, w: Workload, a: Any) -> Callable[[], Any]:
        return self._pooling(self.torch.nn.functional.max_pool2d, w, a)

    def _avg_pool2d(self, w: Workload, a: Any) -> Callable[[], Any]:
        return self._pooling(self.torch.nn.functional.avg_pool2d, w, a)

    def _adaptive_avg_pool2d(self, w: Workload, a: Any) -> Callable[[], Any]:
        return lambda: self.torch.nn.functional.adaptive_avg_pool2d(a["x"], *w.parameters["window"])

    def _recurrent(self, w: Workload, a: Any) -> Callable[[], Any]:
        state = (a["h0"], a["c0"]) if w.op == "lstm" else a["h0"]
        run = self.torch.ops.aten.rnn_tanh if w.op == "rnn" else getattr(self.torch.ops.aten, w.op)
        names = ("w_ih", "w_hh", "b_ih", "b_hh")

        def forward(x: Any, *weights: Any) -> Any:
            return run(x, state, list(weights), True, 1, 0.0, bool(w.parameters["gradient"]), False, False)[0]

        weights = [a[name] for name in names]
        if w.parameters["gradient"]:
            return self._with_gradient(forward, a["gy"], a["x"], *weights)
        return lambda: forward(a["x"], *weights)

    _lstm = _gru = _rnn = _recurrent

    def _softmax(self, w: Workload, a: Any) -> Callable[[], Any]:
        return lambda: self.torch.softmax(a["x"], -1)

    def _scaled_dot_product_attention(self, w: Workload, a: Any) -> Callable[[], Any]:
        f, causal = self.torch.nn.functional.scaled_dot_product_attention, w.parameters["causal"]
        if w.parameters["gradient"]:
            return self._with_gradient(lambda q, k, v: f(q, k, v, is_causal=causal), a["gy"], a["q"], a["k"], a["v"])
        return lambda: f(a["q"], a["k"], a["v"], is_causal=causal)

    def _multi_head_attention(self, w: Workload, a: Any) -> Callable[[], Any]:
        f, (N, L, D) = self.torch.nn.functional, a["x"].shape

        def run() -> Any:
            q, k, v = f.linear(a["x"], a["w_in"], a["b_in"]).reshape(N, L, 3, D // 64, 64).permute(2, 0, 3, 1, 4)
            heads = f.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(N, L, D)
            return f.linear(heads, a["w_out"], a["b_out"])

        return run

    def _box_iou(self, w: Workload, a: Any) -> Callable[[], Any]:
        torch = self.torch

        def run() -> Any:
            a1, a2 = ((b[:, 2:] - b[:, :2]).prod(1) for b in (a["a"], a["b"]))
            low, high = torch.maximum(a["a"][:, None, :2], a["b"][:, :2]), torch.minimum(a["a"][:, None, 2:], a["b"][:, 2:])
            shared = (high - low).clamp_(min=0).prod(2)
            return shared / (a1[:, None] + a2 - shared)

        return run


class OnnxRuntime:
    """ONNX Runtime's CPU provider on the workload as a model, compiled before it is timed."""

    name = "onnxruntime"

    def __init__(self) -> None:
        import onnxruntime

        self.runtime, self.version = onnxruntime, onnxruntime.__version__

    def prepare(self, workload: Workload, inputs: Inputs, threads: int) -> Callable[[], Any] | None:
        made = MODELS.get(workload.op, _none)(workload, inputs)
        if made is None:
            return None
        model, feeds = made
        options = self.runtime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
        # Its threads would spin on while the next runner is timed.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = self.runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        return lambda: session.run(None, feeds)[0]

    def result(self, result: Any) -> Any:
        return result


class OpenVINO:
    """OpenVINO's CPU plugin on the workload as a model, compiled for latency and float32; inputs are shared with NumPy."""

    name = "openvino"

    def __init__(self) -> None:
        import openvino

        self.openvino, self.version, self.core = openvino, openvino.__version__.split("-")[0], openvino.Core()

    def prepare(self, workload: Workload, inputs: Inputs, threads: int) -> Callable[[], Any] | None:
        made = MODELS.get(workload.op, _none)(workload, inputs)
        if made is None:
            return None
        model, feeds = made
        settings = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
        settings["INFERENCE_PRECISION_HINT"] = "f32"
        request = self.core.compile_model(self.core.read_model(model), "CPU", settings).create_infer_request()
        for name, array in feeds.items():
            request.set_tensor(name, self.openvino.Tensor(array, shared_memory=True))

        def run() -> Any:
            request.infer()
            return request.get_output_tensor(0).data

        return run

    def result(self, result: Any) -> Any:
        return np.array(result)  # its memory is used again


def _none(workload: Workload, inputs: Inputs) -> None:
    """The model of what ONNX has no operator for."""


# By name: the peer, and the packages that it needs.
PEERS: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "torch": (Torch, ("torch",)),
    "onnxruntime": (OnnxRuntime, ("onnxruntime", "onnx")),
    "openvino": (OpenVINO, ("openvino", "onnx")),
}


def find(names: Iterable[str]) -> list[Any]:
    """The peers of these names; ValueError for an unknown one, ImportError with what to install for a missing one."""
    found = []
    for name in names:
        if name not in PEERS:
            raise ValueError(f"there is no peer {name!r}; there are {', '.join(PEERS)}")
        make, packages = PEERS[name]
        missing = [package for package in packages if not _config.version(package)]
        if missing:
            raise ImportError(f"the peer {name} needs {' and '.join(missing)}: pip install {' '.join(missing)}")
        found.append(make())
    return found
