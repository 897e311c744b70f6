"""Softmax and its kin over the middle axis of [M, K, I]."""

import math

from ..compile import cpu, real


# Parallel over M. Reads x twice, writes y twice, per position of I; K is walked with a stride of I.
@cpu(over="M")
def softmax(begin, end, x, y):
    K, I = x.shape[1], x.shape[2]
    for m in range(begin, end):
        for i in range(I):
            top = x[m, 0, i]
            for k in range(1, K):
                top = max(top, x[m, k, i])
            total = real(0)
            for k in range(K):
                e = math.exp(x[m, k, i] - top)
                y[m, k, i] = e
                total += e
            scale = real(1) / total
            for k in range(K):
                y[m, k, i] *= scale
