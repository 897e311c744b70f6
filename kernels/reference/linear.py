"""Matrix products of dense layers, and dropout."""

import numpy as np

from ..spec import kernel
from .activation import activated


@kernel("x[M,K], w[N,K], b[N]? -> y[M,N]", error="reduce:K+1", flops="2*M*N*K")
def linear(x, w, b, y, activation: int):
    """y = x w^T + b, then the function of that number (`activate`). K = 0 gives b, or 0."""
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        np.matmul(x, w.T, out=y)
        if b is not None:
            y += b
    y[...] = activated(y, activation)[0]


@kernel("gy[M,N], x[M,K] -> gw[N,K]", error="reduce:M", flops="2*M*N*K")
def linear_grad_weight(gy, x, gw):
    """gw = gy^T x."""
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        np.matmul(gy.T, x, out=gw)


@kernel("gy[M,N], w[N,K] -> gx[M,K]", error="reduce:N", flops="2*M*N*K")
def linear_grad_input(gy, w, gx):
    """gx = gy w."""
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        np.matmul(gy, w, out=gx)


@kernel("gy[M,N] -> gb[N]", error="reduce:M", flops="M*N")
def linear_grad_bias(gy, gb):
    """gb = the sum of the rows of gy."""
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        np.sum(gy, axis=0, out=gb)


@kernel("a[B,M,K], b[B,K,N] -> y[B,M,N]", error="reduce:K", flops="2*B*M*N*K")
def matmul(a, b, y):
    """y = a b, for every batch."""
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        np.matmul(a, b, out=y)


@kernel("gy[B,M,N], b[B,K,N] -> ga[B,M,K]", error="reduce:N", flops="2*B*M*N*K")
def matmul_grad_a(gy, b, ga):
    """ga = gy b^T, for every batch."""
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        np.matmul(gy, b.transpose(0, 2, 1), out=ga)


@kernel("a[B,M,K], gy[B,M,N] -> gb[B,K,N]", error="reduce:M", flops="2*B*M*N*K")
def matmul_grad_b(a, gy, gb):
    """gb = a^T gy, for every batch."""
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        np.matmul(a.transpose(0, 2, 1), gy, out=gb)


@kernel("x[N] -> y[N]", error="ulp:2", flops="2*N")
def dropout(x, y, drop: int, scale: float, seed: int):
    """y = scale x where random24 is at least `drop`, 0 elsewhere (of NaN and infinity, too)."""
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        kept = random24(np.arange(x.size, dtype=np.uint64), seed) >= drop
        y[...] = np.where(kept, x * x.dtype.type(scale), 0)


def random24(index, seed):
    """24 random bits as uint32 for each index (uint64) of the stream `seed`: two rounds of an integer hash.

    Source of the hash: C. Wellons, Prospecting for Hash Functions (2018), lowbias32.
    """
    low, high = index.astype(np.uint32), (index >> np.uint64(32)).astype(np.uint32)
    h = _mix(low ^ np.uint32(seed & 0xFFFFFFFF))
    return _mix(h ^ (high * np.uint32(0x9E3779B9) + np.uint32(seed >> 32))) >> np.uint32(8)


def _mix(h):
    h = (h ^ (h >> np.uint32(16))) * np.uint32(0x7FEB352D)
    h = (h ^ (h >> np.uint32(15))) * np.uint32(0x846CA68B)
    return h ^ (h >> np.uint32(16))
