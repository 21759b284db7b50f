"""Which experts each token goes to, and with which weight."""

from dsv4_kernels import torch_ops
from dsv4_kernels.router.functions import (
    dense_router_decode,
    dense_router_decode_workspace_size,
    hash_router,
    hash_router_scored,
)

torch_ops.register()

__all__ = ["dense_router_decode", "dense_router_decode_workspace_size", "hash_router", "hash_router_scored"]
