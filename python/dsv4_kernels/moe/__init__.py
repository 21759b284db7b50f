"""Mixture of experts: activations, number formats, grouped GEMM."""

from dsv4_kernels import torch_ops
from dsv4_kernels.moe.activations import padded_squared_relu
from dsv4_kernels.moe.routing import SortedRoutes, max_tiles, moe_finalize, moe_sort
from dsv4_kernels.moe.scale_layouts import (
    assemble_raw_scales_2d3d_2d_side,
    assemble_raw_scales_2d3d_3d_side,
    assemble_scales_2d_side,
    assemble_scales_3d_side,
    blackwell_swizzle_32_4_4,
    blackwell_unswizzle_32_4_4,
    pad_and_swizzle_single,
)
from dsv4_kernels.moe.weight_layouts import (
    InterleavedWeights,
    deinterleave_l1_weights,
    interleave_l1_weights,
    make_b_k_major,
)

torch_ops.register()

__all__ = [
    "InterleavedWeights",
    "SortedRoutes",
    "assemble_raw_scales_2d3d_2d_side",
    "assemble_raw_scales_2d3d_3d_side",
    "assemble_scales_2d_side",
    "assemble_scales_3d_side",
    "blackwell_swizzle_32_4_4",
    "blackwell_unswizzle_32_4_4",
    "deinterleave_l1_weights",
    "interleave_l1_weights",
    "make_b_k_major",
    "max_tiles",
    "moe_finalize",
    "moe_sort",
    "pad_and_swizzle_single",
    "padded_squared_relu",
]
