"""Softmax and its kin over the middle axis of [M, K, I].

Each has two kernels. `_rows` (I = 1): a block a row, neighbouring threads read neighbouring k, sums by a tree in shared memory.
`_columns` (I > 1): a thread walks the K values of its (m, i), neighbouring threads have neighbouring i. Both read coalesced.
"""

import math

from ..compile import block, blocks, cuda, gpu, inline, real
from ..scalars import activate as activated
from ..scalars import activation_slope

THREADS = block(128)  # a row of a few hundred values: four warps hide the latency of its loads


# The largest of one value per thread, by a tree. A NaN may be passed over; the sum brings it back.
@inline
def largest(shared, value):
    t = cuda.threadIdx.x
    cuda.syncthreads()
    shared[t] = value
    cuda.syncthreads()
    step = THREADS // 2
    while step > 0:
        if t < step:
            shared[t] = max(shared[t], shared[t + step])
        cuda.syncthreads()
        step //= 2
    return shared[0]


@inline
def summed(shared, value):
    t = cuda.threadIdx.x
    cuda.syncthreads()
    shared[t] = value
    cuda.syncthreads()
    step = THREADS // 2
    while step > 0:
        if t < step:
            shared[t] += shared[t + step]
        cuda.syncthreads()
        step //= 2
    return shared[0]


@inline
def row_largest(x, m, shared):
    top = real(-math.inf)
    for k in range(cuda.threadIdx.x, x.shape[1], THREADS):
        top = max(top, x[m, k, 0])
    return largest(shared, top)


@inline
def column_largest(x, m, i):
    top = real(-math.inf)
    for k in range(x.shape[1]):
        top = max(top, x[m, k, i])
    return top


# log(x) of a sum of exponentials: 0 gives -inf, NaN stays NaN.
@inline
def log_of_sum(x):
    return math.log(x) if x > real(0) else (real(-math.inf) if x == real(0) else x)


@inline
def finite_base(top):
    return real(0) if top == real(math.inf) or top == real(-math.inf) else top


def _launch(rows, columns, M, I, *arrays):
    if I == 1 and M:
        rows[M, THREADS](*arrays)
    elif M * I:
        columns[blocks(M * I, THREADS), THREADS](*arrays)


# Reads x three times (twice from cache where a row fits), writes y once.
@gpu("real[:,:,:], real[:,:,:]")
def _softmax_rows(x, y):
    shared = cuda.shared.array(THREADS, real)
    t, m, K = cuda.threadIdx.x, cuda.blockIdx.x, x.shape[1]
    top, total = row_largest(x, m, shared), real(0)
    for k in range(t, K, THREADS):
        total += math.exp(x[m, k, 0] - top)
    scale = real(1) / summed(shared, total)
    for k in range(t, K, THREADS):
        y[m, k, 0] = math.exp(x[m, k, 0] - top) * scale


@gpu("real[:,:,:], real[:,:,:]")
def _softmax_columns(x, y):
    at, I = cuda.grid(1), x.shape[2]
    if at < x.shape[0] * I:
        m, i = at // I, at % I
        top, total = column_largest(x, m, i), real(0)
        for k in range(x.shape[1]):
            total += math.exp(x[m, k, i] - top)
        scale = real(1) / total
        for k in range(x.shape[1]):
            y[m, k, i] = math.exp(x[m, k, i] - top) * scale


def softmax(x, y):
    _launch(_softmax_rows, _softmax_columns, x.shape[0], x.shape[2], x, y)


# Reads x three times, writes y once.
@gpu("real[:,:,:], real[:,:,:]")
def _log_softmax_rows(x, y):
    shared = cuda.shared.array(THREADS, real)
    t, m, K = cuda.threadIdx.x, cuda.blockIdx.x, x.shape[1]
    top, total = row_largest(x, m, shared), real(0)
    for k in range(t, K, THREADS):
        total += math.exp(x[m, k, 0] - top)
    rest = log_of_sum(summed(shared, total))
    for k in range(t, K, THREADS):
        y[m, k, 0] = (x[m, k, 0] - top) - rest


@gpu("real[:,:,:], real[:,:,:]")
def _log_softmax_columns(x, y):
    at, I = cuda.grid(1), x.shape[2]
    if at < x.shape[0] * I:
        m, i = at // I, at % I
        top, total = column_largest(x, m, i), real(0)
        for k in range(x.shape[1]):
            total += math.exp(x[m, k, i] - top)
        rest = log_of_sum(total)
        for k in range(x.shape[1]):
            y[m, k, i] = (x[m, k, i] - top) - rest


def log_softmax(x, y):
    _launch(_log_softmax_rows, _log_softmax_columns, x.shape[0], x.shape[2], x, y)


# Reads x twice, writes y once.
@gpu("real[:,:,:], real[:,:]")
def _logsumexp_rows(x, y):
    shared = cuda.shared.array(THREADS, real)
    t, m, K = cuda.threadIdx.x, cuda.blockIdx.x, x.shape[1]
    base, total = finite_base(row_largest(x, m, shared)), real(0)
    for k in range(t, K, THREADS):
        total += math.exp(x[m, k, 0] - base)
    total = summed(shared, total)
    if t == 0:
        y[m, 0] = base + log_of_sum(total)


@gpu("real[:,:,:], real[:,:]")
def _logsumexp_columns(x, y):
    at, I = cuda.grid(1), x.shape[2]
    if at < x.shape[0] * I:
        m, i = at // I, at % I
        base, total = finite_base(column_largest(x, m, i)), real(0)
        for k in range(x.shape[1]):
            total += math.exp(x[m, k, i] - base)
        y[m, i] = base + log_of_sum(total)


def logsumexp(x, y):
    _launch(_logsumexp_rows, _logsumexp_columns, x.shape[0], x.shape[2], x, y)


# Reads gy and y twice, writes gx once.
@gpu("real[:,:,:], real[:,:,:], real[:,:,:]")
def _softmax_backward_rows(gy, y, gx):
    shared = cuda.shared.array(THREADS, real)
    t, m, K = cuda.threadIdx.x, cuda.blockIdx.x, y.shape[1]
    total = real(0)
    for k in range(t, K, THREADS):
        total += gy[m, k, 0] * y[m, k, 0]
    total = summed(shared, total)
    for k in range(t, K, THREADS):
        gx[m, k, 0] = y[m, k, 0] * (gy[m, k, 0] - total)


@gpu("real[:,:,:], real[:,:,:], real[:,:,:]")
def _softmax_backward_columns(gy, y, gx):
    at, I = cuda.grid(1), y.shape[2]
    if at < y.shape[0] * I:
        m, i, total = at // I, at % I, real(0)
        for k in range(y.shape[1]):
            total += gy[m, k, i] * y[m, k, i]
        for k in range(y.shape[1]):
            gx[m, k, i] = y[m, k, i] * (gy[m, k, i] - total)


def softmax_backward(gy, y, gx):
    _launch(_softmax_backward_rows, _softmax_backward_columns, y.shape[0], y.shape[2], gy, y, gx)


# Reads gy twice and y once, writes gx once.
@gpu("real[:,:,:], real[:,:,:], real[:,:,:]")
def _log_softmax_backward_rows(gy, y, gx):
    shared = cuda.shared.array(THREADS, real)
    t, m, K = cuda.threadIdx.x, cuda.blockIdx.x, y.shape[1]
    total = real(0)
    for k in range(t, K, THREADS):
        total += gy[m, k, 0]
    total = summed(shared, total)
    for k in range(t, K, THREADS):
        gx[m, k, 0] = gy[m, k, 0] - math.exp(y[m, k, 0]) * total


@gpu("real[:,:,:], real[:,:,:], real[:,:,:]")
def _log_softmax_backward_columns(gy, y, gx):
    at, I = cuda.grid(1), y.shape[2]
    if at < y.shape[0] * I:
        m, i, total = at // I, at % I, real(0)
        for k in range(y.shape[1]):
            total += gy[m, k, i]
        for k in range(y.shape[1]):
            gx[m, k, i] = gy[m, k, i] - math.exp(y[m, k, i]) * total


def log_softmax_backward(gy, y, gx):
    _launch(_log_softmax_backward_rows, _log_softmax_backward_columns, y.shape[0], y.shape[2], gy, y, gx)


# A thread an element. Reads x once, writes gx once.
@gpu("real[:,:], real[:,:,:], real[:,:], real[:,:,:]")
def _logsumexp_backward(gy, x, y, gx):
    at, K, I = cuda.grid(1), x.shape[1], x.shape[2]
    if at < x.shape[0] * K * I:
        m, k, i = at // (K * I), at // I % K, at % I
        gx[m, k, i] = gy[m, i] * math.exp(x[m, k, i] - y[m, i])


def logsumexp_backward(gy, x, y, gx):
    n = x.shape[0] * x.shape[1] * x.shape[2]
    if n:
        _logsumexp_backward[blocks(n, THREADS), THREADS](gy, x, y, gx)


# A thread an element. Reads x once, writes y once.
@gpu("real[:], real[:], i64")
def _activate(x, y, function):
    i = cuda.grid(1)
    if i < x.size:
        y[i] = activated(x[i], function)


def activate(x, y, function):
    if x.size:
        _activate[blocks(x.size, THREADS), THREADS](x, y, function)


# As _activate; reads gy, too.
@gpu("real[:], real[:], real[:], i64")
def _activate_backward(x, gy, gx, function):
    i = cuda.grid(1)
    if i < x.size:
        gx[i] = gy[i] * activation_slope(x[i], function)


def activate_backward(x, gy, gx, function):
    if x.size:
        _activate_backward[blocks(x.size, THREADS), THREADS](x, gy, gx, function)
