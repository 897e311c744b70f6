"""The kernels of hotloops: a plain NumPy specification and Numba versions of it for CPUs and GPUs.

Nothing here knows of hotloops. `spec` describes a kernel, `reference/` is the specification, `cpu/` and `cuda/` hold
fast versions under the same family and function names, `compile` is the one place with compile options.
"""
