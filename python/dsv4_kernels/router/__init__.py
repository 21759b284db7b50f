"""Which experts each token goes to, and with which weight."""

from dsv4_kernels import torch_ops
from dsv4_kernels.router import functions
from dsv4_kernels.router.functions import *
from dsv4_kernels.router.prefill import dense_router_prefill
from dsv4_kernels.router.router import Router
from dsv4_kernels.router.shared_experts import append_shared_experts

torch_ops.register_family("router")

__all__ = ["Router", "append_shared_experts", "dense_router_prefill"]
__all__ += functions.__all__
