"""Opinions about speed, all in one place."""

# Inside a memory space, the first backend that has the kernel for the element type runs.
ORDER = {"host": ("c", "numba", "reference"), "cuda": ("cuda",)}
