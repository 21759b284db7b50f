"""Routes to shared experts, for layers that hold them among the routed ones."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_kernels.errors import InvalidArgumentError

__all__ = ["append_shared_experts"]


def append_shared_experts(
    weights: Tensor, ids: Tensor, experts: int, *, count: int = 1, weight: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Gives every token a route to each shared expert, behind those that a router chose.

    For Nvfp4MoE with num_fused_shared_experts, and as SGLang's fused shared experts have it. In a few small launches of
    torch; captures in CUDA graphs.

    Args:
        weights: [tokens, top_k] float32, of any router here.
        ids: [tokens, top_k] int32 or int64.
        experts: routed experts: the id of the first shared one.
        count: shared experts.
        weight: of their routes: 1, or 1 / scale for a caller that multiplies all weights by a factor afterwards.

    Returns:
        weights [tokens, top_k + count] float32 and ids [tokens, top_k + count] of the same type. A token without any
        expert, such as padding, gets ids -1 and weights 0 here too.

    Raises:
        InvalidArgumentError: weights and ids of different shapes, or a count or number of experts below 1.
    """
    if weights.dim() != 2 or weights.shape != ids.shape:
        raise InvalidArgumentError(
            f"append_shared_experts: ids: expected [tokens, top_k] as weights, {list(weights.shape)}, got "
            f"{list(ids.shape)}"
        )
    for name, number in (("experts", experts), ("count", count)):
        if number < 1:
            raise InvalidArgumentError(f"append_shared_experts: {name}: expected at least 1, got {number}")
    routed = (ids >= 0).any(dim=1, keepdim=True)
    shared = torch.arange(experts, experts + count, dtype=ids.dtype, device=ids.device)
    more_weights = torch.where(routed, weight, 0.0).to(weights.dtype).expand(-1, count)
    return torch.cat((weights, more_weights), dim=1), torch.cat((ids, torch.where(routed, shared, -1)), dim=1)
