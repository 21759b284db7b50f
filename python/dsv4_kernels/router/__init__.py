"""Which experts each token goes to, and with which weight."""

from dsv4_kernels import torch_ops
from dsv4_kernels.router.functions import (
    activation_topk,
    dense_router_decode,
    dense_router_decode_workspace_size,
    hash_router,
    hash_router_fused,
    hash_router_scored,
    topk_select,
)
from dsv4_kernels.router.prefill import dense_router_prefill
from dsv4_kernels.router.router import Router

torch_ops.register_family("router")

__all__ = [
    "Router",
    "activation_topk",
    "dense_router_decode",
    "dense_router_decode_workspace_size",
    "dense_router_prefill",
    "hash_router",
    "hash_router_fused",
    "hash_router_scored",
    "topk_select",
]
