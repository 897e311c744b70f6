"""Numba kernels for CUDA GPUs: each function launches its kernels on arrays in device memory."""
