"""Tests of the emulator on small kernels of their own; they need no CUDA and nothing of the package."""
