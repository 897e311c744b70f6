"""Softmax and its kin over the middle axis of [M, K, I]."""

import numpy as np

from ..spec import kernel


@kernel("x[M,K,I] -> y[M,K,I]", error="ulp:12+2*K**0.5", flops="5*M*K*I")
def softmax(x, y):
    """exp(x - max) / sum(exp(x - max)) over K. A NaN, +inf, or a row of -inf, makes its whole row NaN. K = 0 writes nothing.

    Source: the shifted exponential, Goodfellow et al., Deep Learning (2016), section 4.1.
    """
    if x.size == 0:
        return
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        e = np.exp(x - x.max(axis=1, keepdims=True))
        np.divide(e, e.sum(axis=1, keepdims=True), out=y)


@kernel("x[M,K,I] -> y[M,K,I]", error="near:8+2*(K)**0.5", flops="4*M*K*I")
def log_softmax(x, y):
    """x - max - log(sum(exp(x - max))) over K; NaN as in softmax."""
    if x.size == 0:
        return
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        z = x - x.max(axis=1, keepdims=True)
        np.subtract(z, np.log(np.exp(z).sum(axis=1, keepdims=True)), out=y)


@kernel("x[M,K,I] -> y[M,I]", error="near:8+2*(K)**0.5", flops="4*M*K*I")
def logsumexp(x, y):
    """log(sum(exp(x))) over K, by way of the maximum. K = 0 and a row of -inf give -inf, +inf gives +inf, NaN gives NaN."""
    if x.size == 0:
        y[...] = -np.inf
        return
    with np.errstate(invalid="ignore", over="ignore", under="ignore", divide="ignore"):
        top = x.max(axis=1, keepdims=True)
        top[np.isinf(top)] = 0
        np.add(np.log(np.exp(x - top).sum(axis=1)), top[:, 0], out=y)


@kernel("gy[M,K,I], y[M,K,I] -> gx[M,K,I]", error="near:8+2*(K)**0.5", flops="4*M*K*I")
def softmax_backward(gy, y, gx):
    """gx = y (gy - sum(gy y)) over K, y the result of softmax."""
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        np.multiply(y, gy - (gy * y).sum(axis=1, keepdims=True), out=gx)


@kernel("gy[M,K,I], y[M,K,I] -> gx[M,K,I]", error="near:8+2*(K)**0.5", flops="4*M*K*I")
def log_softmax_backward(gy, y, gx):
    """gx = gy - exp(y) sum(gy) over K, y the result of log_softmax."""
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        np.subtract(gy, np.exp(y) * gy.sum(axis=1, keepdims=True), out=gx)


@kernel("gy[M,I], x[M,K,I], y[M,I] -> gx[M,K,I]", error="near:8+2*(1)**0.5", flops="3*M*K*I")
def logsumexp_backward(gy, x, y, gx):
    """gx = gy exp(x - y), y the result of logsumexp over K. Where x is y and infinite, the difference is NaN."""
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        np.multiply(gy[:, None], np.exp(x - y[:, None]), out=gx)
