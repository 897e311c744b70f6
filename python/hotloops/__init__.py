"""hotloops: the hot loops of deep learning and vision as fast primitives on NumPy arrays."""

from ._dispatch import backend, backends, explain
from ._errors import BackendUnavailableError, PerformanceWarning
from ._threads import get_num_threads, num_threads, set_num_threads

from .autograd import Variable, grad, gradcheck, value_and_grad, vjp

# activation
from .activation import softmax

# attention
# boxes
# conv
# linear
# pool
# rnn
__version__ = "0.1.0"
