"""Softmax and its kin over the middle axis of [M, K, I]."""

import math

import numpy as np

from ..compile import cpu, inline, real
from ..scalars import activate as activated
from ..scalars import activation_slope, exp, exp_below
from .panels import U

# Each kernel has two loops. I = 1: a row lies in one piece, the loops run along it. I > 1: the positions i lie side by side;
# BLOCK of them are walked down K, their maxima and sums in rows of scratch. Short rows of softmax, unless they are few, are
# turned, LANES of them at a time, and walked in the same way.

LANES, PART = 64, 16
SHORT = 32
FEW = 8  # rows are not turned: LANES of them would be computed for so many
BLOCK = 2048


# Python's max looks for a NaN in ways that no vector has; it may be passed over here.
@inline
def larger(a, b):
    return b if b > a else a


# The maximum of a row, LANES of them side by side: a single one would wait for each comparison.
@inline
def row_max(row, lanes):
    K, high = len(row), real(-math.inf)
    wide, narrow = K // LANES * LANES, K // PART * PART
    for i in range(LANES):
        lanes[i] = high
    for k in range(0, wide, LANES):
        part = row[k : k + LANES]
        for i in range(LANES):
            lanes[i] = larger(lanes[i], part[i])
    for k in range(wide, narrow, PART):
        part = row[k : k + PART]
        for i in range(PART):
            lanes[i] = larger(lanes[i], part[i])
    for i in range(32):
        lanes[i] = larger(lanes[i], lanes[i + 32])
    for i in range(16):
        lanes[i] = larger(lanes[i], lanes[i + 16])
    for i in range(8):
        high = larger(high, larger(lanes[i], lanes[i + 8]))
    for k in range(narrow, K):
        high = larger(high, row[k])
    return high


# The maxima of n columns of K values, `pitch` apart, the first at `at`.
@inline
def column_max(x, at, K, pitch, n, top):
    for i in range(n):
        top[i] = x[U(at) + U(i)]
    for k in range(1, K):
        a = U(at + k * pitch)
        for i in range(n):
            top[i] = larger(top[i], x[a + U(i)])


@inline
def softmax_columns(x, y, at, K, pitch, n, top, total):
    column_max(x, at, K, pitch, n, top)
    for i in range(n):
        total[i] = real(0)
    for k in range(K):
        a = U(at + k * pitch)
        for i in range(n):
            e = exp_below(x[a + U(i)] - top[i])
            y[a + U(i)] = e
            total[i] += e
    for i in range(n):
        total[i] = real(1) / total[i]
    for k in range(K):
        a = U(at + k * pitch)
        for i in range(n):
            y[a + U(i)] *= total[i]


# Parallel over M. Reads x twice, writes y twice (the second time from cache).
# A NaN that the maximum passes over comes back in the sum; in a row of -inf, -inf - -inf makes it.
@cpu(over="M")
def softmax(begin, end, x, y):
    K, I = x.shape[1], x.shape[2]
    is_turned = I == 1 and K <= SHORT and x.shape[0] >= FEW
    width, lanes = BLOCK if I > 1 else LANES, np.empty(LANES, x.dtype)
    top, total = np.empty(width, x.dtype), np.empty(width, x.dtype)
    x1, y1 = x.reshape(x.size), y.reshape(y.size)
    rows, out = x.reshape(x.shape[0], K * I), y.reshape(x.shape[0], K * I)
    if I > 1:
        for m in range(begin, end):
            for i in range(0, I, BLOCK):
                softmax_columns(x1, y1, m * K * I + i, K, I, min(BLOCK, I - i), top, total)
    elif is_turned:
        turned, done = np.zeros(SHORT * LANES, x.dtype), np.empty(SHORT * LANES, x.dtype)
        for first in range(begin, end, LANES):
            count = min(LANES, end - first)
            for r in range(count):
                for k in range(K):
                    turned[k * LANES + r] = rows[first + r, k]
            softmax_columns(turned, done, 0, K, LANES, LANES, top, total)
            for r in range(count):
                for k in range(K):
                    out[first + r, k] = done[k * LANES + r]
    else:
        for m in range(begin, end):
            high, s = row_max(rows[m], lanes), real(0)
            for k in range(K):
                out[m, k] = exp_below(rows[m, k] - high)
            # Apart: a loop that writes, too, is one of vectors only where the arrays do not lie close to each other, and
            # the order of its sum would depend on that.
            for k in range(K):
                s += out[m, k]
            s = real(1) / s
            for k in range(K):
                out[m, k] *= s


# Parallel over M. Reads x three times, writes y once.
@cpu(over="M")
def log_softmax(begin, end, x, y):
    K, I = x.shape[1], x.shape[2]
    top, total, lanes = np.empty(BLOCK, x.dtype), np.empty(BLOCK, x.dtype), np.empty(LANES, x.dtype)
    rows, out = x.reshape(x.shape[0], K * I), y.reshape(x.shape[0], K * I)
    x1, y1 = x.reshape(x.size), y.reshape(y.size)
    for m in range(begin, end):
        if I == 1:
            high, s = row_max(rows[m], lanes), real(0)
            for k in range(K):
                s += exp_below(rows[m, k] - high)
            s = math.log(s)
            for k in range(K):
                out[m, k] = (rows[m, k] - high) - s
        else:
            for first in range(0, I, BLOCK):
                at, n = m * K * I + first, min(BLOCK, I - first)
                column_max(x1, at, K, I, n, top)
                for i in range(n):
                    total[i] = real(0)
                for k in range(K):
                    a = U(at + k * I)
                    for i in range(n):
                        total[i] += exp_below(x1[a + U(i)] - top[i])
                for i in range(n):
                    total[i] = math.log(total[i])
                for k in range(K):
                    a = U(at + k * I)
                    for i in range(n):
                        y1[a + U(i)] = (x1[a + U(i)] - top[i]) - total[i]


# Parallel over M. Reads x twice, writes y once. An infinite maximum is not subtracted: what lies above 0 then counts as 1, like
# every maximum.
@cpu(over="M")
def logsumexp(begin, end, x, y):
    K, I = x.shape[1], x.shape[2]
    top, total, lanes = np.empty(BLOCK, x.dtype), np.empty(BLOCK, x.dtype), np.empty(LANES, x.dtype)
    rows, x1 = x.reshape(x.shape[0], K * I), x.reshape(x.size)
    for m in range(begin, end):
        if K == 0:
            for i in range(I):
                y[m, i] = real(-math.inf)
        elif I == 1:
            high, s = row_max(rows[m], lanes), real(0)
            base = real(0) if abs(high) == real(math.inf) else high
            for k in range(K):
                v = rows[m, k] - base
                s += exp_below(real(0) if v > real(0) else v)
            y[m, 0] = high + math.log(s)
        else:
            for first in range(0, I, BLOCK):
                at, n = m * K * I + first, min(BLOCK, I - first)
                column_max(x1, at, K, I, n, top)
                for i in range(n):
                    total[i] = real(0)
                for k in range(K):
                    a = U(at + k * I)
                    for i in range(n):
                        v = x1[a + U(i)] - (real(0) if abs(top[i]) == real(math.inf) else top[i])
                        total[i] += exp_below(real(0) if v > real(0) else v)
                for i in range(n):
                    y[m, first + i] = top[i] + math.log(total[i])


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
        if I == 1:
            g, base = gy[m, 0], y[m, 0]
            for k in range(K):
                gx[m, k, 0] = g * exp(x[m, k, 0] - base)
        else:
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
