"""Softmax and its kin over the middle axis of [M, K, I]."""

import numpy as np

from ..spec import kernel


@kernel("x[M,K,I] -> y[M,K,I]", error="ulp:16", flops="5*M*K*I")
def softmax(x, y):
    """exp(x - max) / sum(exp(x - max)) over K. A NaN, or a row of -inf, makes its whole row NaN. K = 0 writes nothing.

    Source: the shifted exponential, Goodfellow et al., Deep Learning (2016), section 4.1.
    """
    if x.size == 0:
        return
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        e = np.exp(x - x.max(axis=1, keepdims=True))
        np.divide(e, e.sum(axis=1, keepdims=True), out=y)
