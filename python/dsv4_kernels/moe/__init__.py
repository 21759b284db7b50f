"""Mixture of experts: activations, number formats, grouped GEMM."""

from dsv4_kernels import torch_ops
from dsv4_kernels.moe.activations import padded_squared_relu

torch_ops.register()

__all__ = ["padded_squared_relu"]
