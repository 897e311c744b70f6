"""Softmax and its kin over the middle axis of [M, K, I]."""

import math

import numpy as np

from ..spec import kernel

# What may follow a convolution or a dense layer; `function` is a place in this list, and 0 changes nothing.
FUNCTIONS = ("", "relu", "relu6", "sigmoid", "tanh", "silu", "gelu")

_erf = np.vectorize(math.erf, otypes=[np.float64])


def activated(x, function):
    """FUNCTIONS[function] of x, and its derivative there. A NaN stays NaN."""
    one = np.ones((), x.dtype)
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        if function == 0:
            return x, np.ones_like(x)
        if function == 1:
            return np.maximum(x, 0), np.where(np.isnan(x), x, (x > 0) * one)
        if function == 2:
            return np.clip(x, 0, 6), np.where(np.isnan(x), x, ((x > 0) & (x < 6)) * one)
        if function == 4:
            e = np.exp(-2 * np.abs(x))
            return np.tanh(x), 4 * e / (1 + e) ** 2  # 1 - tanh(x)^2 would lose its digits
        if function == 6:  # x P(X < x) for X standard normal
            share = ((1 + _erf(x / math.sqrt(2))) / 2).astype(x.dtype)
            bell = np.exp(-x * x / 2) / one.dtype.type(math.sqrt(2 * math.pi))
            return _product(x, share), share + _product(x, bell)
        share = 1 / (1 + np.exp(-x))
        if function == 3:
            return share, share * (1 - share)
        return _product(x, share), share + _product(x, share * (1 - share))


def _product(x, y):
    """x y, 0 where y is 0: what the product tends to where x is infinite."""
    return np.where(y == 0, y, x * y)


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


@kernel("x[N] -> y[N]", error="near:8", flops="N")
def activate(x, y, function: int):
    """y = FUNCTIONS[function] of x. silu and gelu of -inf are 0.

    Source: Hendrycks and Gimpel, Gaussian Error Linear Units (2016), for gelu (with erf) and silu.
    """
    y[...] = activated(x, function)[0]


@kernel("x[N], gy[N] -> gx[N]", error="near:16", flops="2*N")
def activate_backward(x, gy, gx, function: int):
    """gx = gy times the derivative of FUNCTIONS[function] at x; at the kinks of relu and relu6 it is 0."""
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        np.multiply(gy, activated(x, function)[1], out=gx)
