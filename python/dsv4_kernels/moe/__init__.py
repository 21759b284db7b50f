"""Mixture of experts: activations, number formats, grouped GEMM."""

from dsv4_kernels import torch_ops
from dsv4_kernels.moe.activations import (
    padded_squared_relu,
    padded_swiglu,
    squared_relu_and_quantize_mxfp8,
    swiglu_and_quantize_mxfp8,
)
from dsv4_kernels.moe.expert_parallel import ExpertParallelMoE
from dsv4_kernels.moe.grouped_gemm import (
    moe_grouped_gemm,
    moe_grouped_gemm_quantized,
    run_fused_swiglu_grouped_gemm,
    run_nvfp4_grouped_gemm,
)
from dsv4_kernels.moe.interleaved_weights import InterleavedExperts, can_interleave, interleave_weights
from dsv4_kernels.moe.mxfp8_tensor import MXFP8Tensor
from dsv4_kernels.moe.nvfp4_moe import Nvfp4MoE
from dsv4_kernels.moe.quantize import (
    deinterleave_amax_quantize_nvfp4_fused,
    deinterleave_quantize_nvfp4,
    dequantize_blocks,
    dequantize_fp8_per_token,
    dequantize_mxfp4,
    dequantize_mxfp8,
    dequantize_nvfp4,
    quantize_activation_nvfp4,
    quantize_fp8_per_token,
    quantize_mx,
    quantize_mxfp4,
    quantize_mxfp8,
    quantize_nvfp4,
    quantize_nvfp4_gpu_fused,
    quantize_weight_to_nvfp4,
)
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

torch_ops.register_family("moe")

__all__ = [
    "ExpertParallelMoE",
    "InterleavedExperts",
    "InterleavedWeights",
    "MXFP8Tensor",
    "Nvfp4MoE",
    "SortedRoutes",
    "assemble_raw_scales_2d3d_2d_side",
    "assemble_raw_scales_2d3d_3d_side",
    "assemble_scales_2d_side",
    "assemble_scales_3d_side",
    "blackwell_swizzle_32_4_4",
    "blackwell_unswizzle_32_4_4",
    "can_interleave",
    "deinterleave_amax_quantize_nvfp4_fused",
    "deinterleave_l1_weights",
    "deinterleave_quantize_nvfp4",
    "dequantize_blocks",
    "dequantize_fp8_per_token",
    "dequantize_mxfp4",
    "dequantize_mxfp8",
    "dequantize_nvfp4",
    "interleave_l1_weights",
    "interleave_weights",
    "make_b_k_major",
    "max_tiles",
    "moe_finalize",
    "moe_grouped_gemm",
    "moe_grouped_gemm_quantized",
    "moe_sort",
    "pad_and_swizzle_single",
    "padded_squared_relu",
    "padded_swiglu",
    "quantize_activation_nvfp4",
    "quantize_fp8_per_token",
    "quantize_mx",
    "quantize_mxfp4",
    "quantize_mxfp8",
    "quantize_nvfp4",
    "quantize_nvfp4_gpu_fused",
    "quantize_weight_to_nvfp4",
    "run_fused_swiglu_grouped_gemm",
    "run_nvfp4_grouped_gemm",
    "squared_relu_and_quantize_mxfp8",
    "swiglu_and_quantize_mxfp8",
]
