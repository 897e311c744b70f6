"""Softmax and its kin over the middle axis of [M, K, I]."""

import math

import numpy as np

from ..compile import cpu, inline, real
from ..scalars import activate as activated
from ..scalars import activation_slope, exp

# Each kernel has two loops. I = 1: a row lies in one piece, the loops run along it. I > 1: the positions i lie side by side,
# so K is walked in the outer loop and sums for all i of a slice are kept in a row of scratch.

LANES = 64


# The maximum of row m, LANES of them side by side: a single one would wait for each comparison. A NaN may be passed over.
@inline
def row_max(rows, m, lanes):
    K = rows.shape[1]
    whole, high = K // LANES * LANES, rows[m, 0]
    if whole:
        for i in range(LANES):
            lanes[i] = rows[m, i]
        for k in range(LANES, whole, LANES):
            for i in range(LANES):
                lanes[i] = max(lanes[i], rows[m, k + i])
        for i in range(LANES):
            high = max(high, lanes[i])
    for k in range(whole, K):
        high = max(high, rows[m, k])
    return high


# Parallel over M. Reads x twice, writes y twice (the second time from cache when I = 1).
# A NaN that the maximum passes over comes back in the sum; in a row of -inf, -inf - -inf makes it.
@cpu(over="M")
def softmax(begin, end, x, y):
    K, I = x.shape[1], x.shape[2]
    top, total, lanes = np.empty(I, x.dtype), np.empty(I, x.dtype), np.empty(LANES, x.dtype)
    rows, out = x.reshape(x.shape[0], K * I), y.reshape(x.shape[0], K * I)
    for m in range(begin, end):
        if I == 1:
            high, s = row_max(rows, m, lanes), real(0)
            for k in range(K):
                e = exp(rows[m, k] - high)
                out[m, k] = e
                s += e
            s = real(1) / s
            for k in range(K):
                out[m, k] *= s
        else:
            for i in range(I):
                top[i], total[i] = x[m, 0, i], real(0)
            for k in range(1, K):
                for i in range(I):
                    top[i] = max(top[i], x[m, k, i])
            for k in range(K):
                for i in range(I):
                    e = exp(x[m, k, i] - top[i])
                    y[m, k, i] = e
                    total[i] += e
            for i in range(I):
                total[i] = real(1) / total[i]
            for k in range(K):
                for i in range(I):
                    y[m, k, i] *= total[i]


# Parallel over M. Reads x three times, writes y once.
@cpu(over="M")
def log_softmax(begin, end, x, y):
    K, I = x.shape[1], x.shape[2]
    top, total, lanes = np.empty(I, x.dtype), np.empty(I, x.dtype), np.empty(LANES, x.dtype)
    rows, out = x.reshape(x.shape[0], K * I), y.reshape(x.shape[0], K * I)
    for m in range(begin, end):
        if I == 1:
            high, s = row_max(rows, m, lanes), real(0)
            for k in range(K):
                s += exp(rows[m, k] - high)
            s = math.log(s)
            for k in range(K):
                out[m, k] = (rows[m, k] - high) - s
        else:
            for i in range(I):
                top[i], total[i] = x[m, 0, i], real(0)
            for k in range(1, K):
                for i in range(I):
                    top[i] = max(top[i], x[m, k, i])
            for k in range(K):
                for i in range(I):
                    total[i] += exp(x[m, k, i] - top[i])
            for i in range(I):
                total[i] = math.log(total[i])
            for k in range(K):
                for i in range(I):
                    y[m, k, i] = (x[m, k, i] - top[i]) - total[i]


# Parallel over M. Reads x twice, writes y once. An infinite maximum is not subtracted: exp and log take it to the result.
@cpu(over="M")
def logsumexp(begin, end, x, y):
    K, I = x.shape[1], x.shape[2]
    top, total, lanes = np.empty(I, x.dtype), np.empty(I, x.dtype), np.empty(LANES, x.dtype)
    rows = x.reshape(x.shape[0], K * I)
    for m in range(begin, end):
        if I == 1 and K > 0:
            high, s = row_max(rows, m, lanes), real(0)
            high = real(0) if abs(high) == real(math.inf) else high
            for k in range(K):
                s += exp(rows[m, k] - high)
            y[m, 0] = high + math.log(s)
        else:
            for i in range(I):
                top[i], total[i] = real(-math.inf), real(0)
            for k in range(K):
                for i in range(I):
                    top[i] = max(top[i], x[m, k, i])
            for i in range(I):
                top[i] = real(0) if abs(top[i]) == real(math.inf) else top[i]
            for k in range(K):
                for i in range(I):
                    total[i] += exp(x[m, k, i] - top[i])
            for i in range(I):
                y[m, i] = top[i] + math.log(total[i])


# Parallel over M. Reads gy and y twice, writes gx once.
@cpu(over="M")
def softmax_backward(begin, end, gy, y, gx):
    K, I = y.shape[1], y.shape[2]
    total = np.empty(I, y.dtype)
    for m in range(begin, end):
        if I == 1:
            s = real(0)
            for k in range(K):
                s += gy[m, k, 0] * y[m, k, 0]
            for k in range(K):
                gx[m, k, 0] = y[m, k, 0] * (gy[m, k, 0] - s)
        else:
            total[:] = real(0)
            for k in range(K):
                for i in range(I):
                    total[i] += gy[m, k, i] * y[m, k, i]
            for k in range(K):
                for i in range(I):
                    gx[m, k, i] = y[m, k, i] * (gy[m, k, i] - total[i])


# Parallel over M. Reads gy twice and y once, writes gx once.
@cpu(over="M")
def log_softmax_backward(begin, end, gy, y, gx):
    K, I = y.shape[1], y.shape[2]
    total = np.empty(I, y.dtype)
    for m in range(begin, end):
        if I == 1:
            s = real(0)
            for k in range(K):
                s += gy[m, k, 0]
            for k in range(K):
                gx[m, k, 0] = gy[m, k, 0] - exp(y[m, k, 0]) * s
        else:
            total[:] = real(0)
            for k in range(K):
                for i in range(I):
                    total[i] += gy[m, k, i]
            for k in range(K):
                for i in range(I):
                    gx[m, k, i] = gy[m, k, i] - exp(y[m, k, i]) * total[i]


# Parallel over M. Reads x once, writes gx once.
@cpu(over="M")
def logsumexp_backward(begin, end, gy, x, y, gx):
    K, I = x.shape[1], x.shape[2]
    for m in range(begin, end):
        for k in range(K):
            for i in range(I):
                gx[m, k, i] = gy[m, i] * exp(x[m, k, i] - y[m, i])


# Parallel over elements. Reads x once, writes y once.
@cpu(over="N")
def activate(begin, end, x, y, function):
    for i in range(begin, end):
        y[i] = activated(x[i], function)


# As activate; reads gy, too.
@cpu(over="N")
def activate_backward(begin, end, x, gy, gx, function):
    for i in range(begin, end):
        gx[i] = gy[i] * activation_slope(x[i], function)
