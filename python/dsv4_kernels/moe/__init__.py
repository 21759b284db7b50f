"""Mixture of experts: activations, number formats, grouped GEMM."""

from dsv4_kernels import torch_ops
from dsv4_kernels.moe.activations import padded_squared_relu
from dsv4_kernels.moe.routing import SortedRoutes, max_tiles, moe_finalize, moe_sort

torch_ops.register()

__all__ = ["SortedRoutes", "max_tiles", "moe_finalize", "moe_sort", "padded_squared_relu"]
