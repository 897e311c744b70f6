"""hotloops: the hot loops of deep learning and vision as fast primitives on NumPy arrays."""

from ._dispatch import backend, backends, exact_convolution, explain
from ._errors import BackendUnavailableError, PerformanceWarning
from ._threads import get_num_threads, num_threads, set_num_threads

from .autograd import Variable, grad, gradcheck, value_and_grad, vjp

# activation
from .activation import softmax

# attention
# boxes
# conv
from .conv import col2im, conv1d, conv2d, conv2d_backward, conv2d_trace, conv3d, conv_output_size, conv_parameters
from .conv import conv_transpose1d, conv_transpose2d, conv_transpose3d, fold, im2col, same_padding, unfold

# linear
# pool
# rnn
__version__ = "0.1.0"
