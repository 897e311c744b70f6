"""Scalar functions that kernels share, written so that LLVM makes vectors of them."""

import math
from math import exp as _exp

import numpy as np

from .compile import inline, real


# exp(x) within 2 units in the last place: n = round(x / ln 2), a polynomial for the rest, two scalings by powers of two, so
# that results below the smallest normal number are right too. n is rounded by adding 1.5 * 2^23 (2^52), which leaves it in the
# low bits of the sum as well. The bounds let a NaN pass. math.exp is a call per element on the CPU.
@inline(ordered=True)
def exp(x):
    c = np.float32(-103.972084) if x < np.float32(-103.972084) else x
    c = np.float32(89.0) if c > np.float32(89.0) else c
    shifted = c * np.float32(1.44269504) + np.float32(12582912.0)
    n = shifted - np.float32(12582912.0)
    r = c - n * np.float32(0.693145752) - n * np.float32(1.42860677e-6)
    p = np.float32(8.3687453e-3) + r * np.float32(1.381454e-3)
    p = np.float32(4.1668391e-2) + r * p
    p = np.float32(1.666652e-1) + r * p
    p = np.float32(4.9999993e-1) + r * p
    k = np.float32(shifted).view(np.int32) - np.float32(12582912.0).view(np.int32)
    half = np.int32(k >> np.int32(1))
    a = np.int32((half + np.int32(127)) << np.int32(23)).view(np.float32)
    b = np.int32((k - half + np.int32(127)) << np.int32(23)).view(np.float32)
    return ((r * r * p + r) + np.float32(1)) * a * b


@exp.float64
def exp(x):
    c = -745.14 if x < -745.14 else x
    c = 710.0 if c > 710.0 else c
    shifted = c * 1.4426950408889634 + 6755399441055744.0
    n = shifted - 6755399441055744.0
    r = c - n * 6.93147180369123816490e-01 - n * 1.90821492927058770002e-10
    p = 1 / 479001600 + r * (1 / 6227020800)
    p = 1 / 39916800 + r * p
    p = 1 / 3628800 + r * p
    p = 1 / 362880 + r * p
    p = 1 / 40320 + r * p
    p = 1 / 5040 + r * p
    p = 1 / 720 + r * p
    p = 1 / 120 + r * p
    p = 1 / 24 + r * p
    p = 1 / 6 + r * p
    p = 0.5 + r * p
    k = np.float64(shifted).view(np.int64) - np.float64(6755399441055744.0).view(np.int64)
    half = k >> 1
    a = np.int64((half + 1023) << 52).view(np.float64)
    b = np.int64((k - half + 1023) << 52).view(np.float64)
    return ((r * r * p + r) + 1.0) * a * b


# exp(x) for an x of at most 0, or NaN, for weights that are normalised by their sum: what is below the smallest normal number
# may be 0, so that one scaling will do; at most 4 units in the last place (2 above exp(-30)).
@inline(ordered=True)
def exp_below(x):
    c = np.float32(-88.02969) if x < np.float32(-88.02969) else x  # -127 ln 2: the scale is 0 there
    shifted = c * np.float32(1.44269504) + np.float32(12583039.0)  # the exponent's bias, 127, comes along
    n = shifted - np.float32(12583039.0)
    r = c - n * np.float32(0.693145752) - n * np.float32(1.42860677e-6)
    p = np.float32(4.18981607e-2) + r * np.float32(8.29027201e-3)
    p = np.float32(1.66676381e-1) + r * p
    p = np.float32(4.99991478e-1) + r * p
    p = np.float32(9.99999706e-1) + r * p
    return (np.float32(1) + r * p) * np.int32(np.float32(shifted).view(np.int32) << np.int32(23)).view(np.float32)


@exp_below.float64
def exp_below(x):
    return exp(x)


@exp.cuda
def exp(x):
    return _exp(x)


# tanh(x) within a few units in the last place of 1: enough where it caps a score.
@inline
def cap(x, limit):
    e = exp(-abs(x) * (real(2) / limit))
    t = limit * (real(1) - e) / (real(1) + e)
    return t if x >= real(0) else -t


# 24 random bits for an index of the stream `seed`, as kernels.reference.linear.random24 defines them. The shifts and masks
# keep 32-bit arithmetic in 64-bit integers, which is what Numba computes with.
@inline(exact=True)
def random24(index, seed):
    h = _mix((index & 0xFFFFFFFF) ^ (seed & 0xFFFFFFFF))
    return _mix(h ^ (((index >> 32) * 0x9E3779B9 + (seed >> 32)) & 0xFFFFFFFF)) >> 8


@inline(exact=True)
def _mix(h):
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    h = ((h ^ (h >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return h ^ (h >> 16)


# ------------------------------------------------------------------------------------- windows of a pooling along one axis


@inline
def pool_taps(o, size, kernel, stride, pad, dilation):
    """(number of the first tap inside, how many are, where the first lies) of window o."""
    start = o * stride - pad
    first = 0 if start >= 0 else (dilation - 1 - start) // dilation
    last = min(kernel - 1, (size - 1 - start) // dilation)
    return first, last - first + 1, start + first * dilation


@inline
def pool_count(o, size, kernel, stride, pad, pad_after, dilation):
    """The taps of window o inside of the padded axis."""
    return min(kernel, (size + pad_after - 1 - (o * stride - pad)) // dilation + 1)


@inline
def pool_share(o, size, windows):
    """(start, end) of window o of those that share an axis out."""
    return o * size // windows, ((o + 1) * size + windows - 1) // windows


@inline
def pool_windows(position, windows, kernel, stride, dilation):
    """[begin, end): the taps with which windows may lie over a position of the padded axis."""
    begin = position - (windows - 1) * stride
    return 0 if begin <= 0 else (begin + dilation - 1) // dilation, min(kernel, position // dilation + 1)


# The functions of kernels.reference.activation by number, and their derivatives. A NaN stays NaN.
@inline
def activate(x, function):
    if function == 0 or x != x:
        return x
    if function == 1:
        return max(x, real(0))
    if function == 2:
        return min(max(x, real(0)), real(6))
    if function == 4:
        return real(math.tanh(x))
    if function == 6:
        share = real(0.5) * (real(1) + real(math.erf(x * real(0.7071067811865476))))
        return x * share if share != real(0) else share
    e = exp(-abs(x))
    share = (real(1) if x >= real(0) else e) / (real(1) + e)
    if function == 3 or share == real(0):
        return share
    return x * share


@inline
def activation_slope(x, function):
    if function == 0:
        return real(1)
    if x != x:
        return x
    if function <= 2:
        return real(1) if x > real(0) and (x < real(6) or function == 1) else real(0)
    if function == 4:
        e = exp(real(-2) * abs(x))
        return real(4) * e / ((real(1) + e) * (real(1) + e))
    if function == 6:
        share = real(0.5) * (real(1) + real(math.erf(x * real(0.7071067811865476))))
        bell = exp(real(-0.5) * x * x) * real(0.3989422804014327)
        return share + x * bell if bell != real(0) else share
    e = exp(-abs(x))
    share = (real(1) if x >= real(0) else e) / (real(1) + e)
    slope = e / ((real(1) + e) * (real(1) + e))
    if function == 3:
        return slope
    return share + x * slope if slope != real(0) else share
