"""The commands of `python -m dsv4_kernels`, one module each."""
