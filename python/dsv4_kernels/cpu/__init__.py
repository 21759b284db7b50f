"""The CPU backend: every op in plain torch, in float32 or wider, under the name of the op.

The implementation of an op that dsv4_kernels/<family>/<module>.py declares is in dsv4_kernels/cpu/<family>/<module>.py.
It takes the op's inputs, then its outputs, which it writes in whatever float dtype they have. Only dsv4_kernels.op
imports this package; it is what runs for tensors in host memory, and one of the two sides of the tests.
"""
