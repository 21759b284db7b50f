"""Mixture of experts: activations, number formats, grouped GEMM."""

from dsv4_kernels import torch_ops
from dsv4_kernels.moe import activations, dispatch, grouped_gemm, quantize, routing, scale_layouts, weight_layouts
from dsv4_kernels.moe.activations import *
from dsv4_kernels.moe.dispatch import *
from dsv4_kernels.moe.expert_parallel import ExpertParallelMoE
from dsv4_kernels.moe.grouped_gemm import *
from dsv4_kernels.moe.interleaved_weights import InterleavedExperts, can_interleave, interleave_weights
from dsv4_kernels.moe.mxfp8_tensor import MXFP8Tensor
from dsv4_kernels.moe.nvfp4_moe import Nvfp4MoE
from dsv4_kernels.moe.quantize import *
from dsv4_kernels.moe.routing import *
from dsv4_kernels.moe.scale_layouts import *
from dsv4_kernels.moe.weight_layouts import *

torch_ops.register_family("moe")

__all__ = ["ExpertParallelMoE", "InterleavedExperts", "MXFP8Tensor", "Nvfp4MoE", "can_interleave", "interleave_weights"]
__all__ += activations.__all__
__all__ += dispatch.__all__
__all__ += grouped_gemm.__all__
__all__ += quantize.__all__
__all__ += routing.__all__
__all__ += scale_layouts.__all__
__all__ += weight_layouts.__all__
