"""hotloops: the hot loops of deep learning and vision as fast primitives on NumPy arrays."""

from ._dispatch import backend, backends, exact_convolution, explain
from ._errors import BackendUnavailableError, PerformanceWarning
from ._prepack import PackedWeight, prepack
from ._threads import get_num_threads, num_threads, set_num_threads

from .autograd import Variable, grad, gradcheck, value_and_grad, vjp

# activation
from .activation import log_softmax, logsumexp, softmax

# attention
from .attention import (
    causal_mask,
    multi_head_attention,
    positional_encoding,
    rotary_embedding,
    scaled_dot_product_attention,
)

# boxes
from .boxes import (
    batched_nms,
    box_area,
    box_convert,
    box_iou,
    clip_boxes_to_image,
    complete_box_iou,
    distance_box_iou,
    generalized_box_iou,
    mask_iou,
    masks_to_boxes,
    nms,
    remove_small_boxes,
    roi_align,
    roi_pool,
    soft_nms,
    sparse_box_iou,
)

# conv
from .conv import col2im, conv1d, conv2d, conv2d_backward, conv2d_trace, conv3d, conv_output_size, conv_parameters
from .conv import conv_transpose1d, conv_transpose2d, conv_transpose3d, deform_conv2d, fold, im2col, same_padding, unfold

# linear
from .linear import dropout, linear, matmul

# pool
from .pool import (
    adaptive_avg_pool1d,
    adaptive_avg_pool2d,
    adaptive_avg_pool3d,
    adaptive_max_pool1d,
    adaptive_max_pool2d,
    adaptive_max_pool3d,
    avg_pool1d,
    avg_pool2d,
    avg_pool3d,
    global_avg_pool2d,
    lp_pool1d,
    lp_pool2d,
    lp_pool3d,
    max_pool1d,
    max_pool2d,
    max_pool3d,
    max_unpool1d,
    max_unpool2d,
    max_unpool3d,
)

# rnn
from .rnn import gru, gru_cell, gru_gates_from_onnx, gru_gates_to_onnx, lstm, lstm_cell, lstm_gates_from_onnx, lstm_gates_to_onnx
from .rnn import rnn, rnn_cell

__version__ = "0.1.0"

_LAZY = {"show_config": "_config", "warmup": "_config", "bench": "bench"}  # imported when first asked for


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'hotloops' has no attribute {name!r}")
    import importlib

    module = importlib.import_module(f".{_LAZY[name]}", __name__)
    value = module if _LAZY[name] == name else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
