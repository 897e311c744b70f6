"""Softmax and its kin over the middle axis of [M, K, I]."""

import math

from ..compile import block, cuda, gpu, real

THREADS = block(128)  # a block a row: four warps hide the latency of the loads of a row of a few hundred values


# Parallel over rows (m, i), one block each. Neighbouring threads read neighbouring k: coalesced when I = 1.
# Reads x twice, writes y once. Tree reduction in shared memory.
@gpu("real[:,:,:], real[:,:,:]")
def _softmax_rows(x, y):
    shared = cuda.shared.array(THREADS, real)
    t = cuda.threadIdx.x
    m, i = cuda.blockIdx.x // x.shape[2], cuda.blockIdx.x % x.shape[2]
    K = x.shape[1]
    top = real(-math.inf)
    for k in range(t, K, THREADS):
        top = max(top, x[m, k, i])
    shared[t] = top
    cuda.syncthreads()
    step = THREADS // 2
    while step > 0:
        if t < step:
            shared[t] = max(shared[t], shared[t + step])
        cuda.syncthreads()
        step //= 2
    top = shared[0]
    cuda.syncthreads()
    total = real(0)
    for k in range(t, K, THREADS):
        total += math.exp(x[m, k, i] - top)
    shared[t] = total
    cuda.syncthreads()
    step = THREADS // 2
    while step > 0:
        if t < step:
            shared[t] += shared[t + step]
        cuda.syncthreads()
        step //= 2
    scale = real(1) / shared[0]
    for k in range(t, K, THREADS):
        y[m, k, i] = math.exp(x[m, k, i] - top) * scale


def softmax(x, y):
    _softmax_rows[x.shape[0] * x.shape[2], THREADS](x, y)
