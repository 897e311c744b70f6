"""The specification: one plain NumPy function a kernel, one file a family."""
