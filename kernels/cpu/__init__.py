"""Numba kernels for the CPU: each works on a range [begin, end) of its outermost loop."""
