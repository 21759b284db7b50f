"""Experts spread over the ranks of a process group."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dsv4_kernels.errors import InvalidArgumentError
from dsv4_kernels.moe.nvfp4_moe import Nvfp4MoE


class ExpertParallelMoE(nn.Module):
    """A layer whose experts are spread over ranks, each with tokens of its own.

    Dispatch gathers the tokens of all ranks, each rank runs its experts on them, and combine sends every partial sum
    back to its token's rank, which adds them in the order of ranks: the same input gives the same bits. What crosses
    ranks has a size that depends on shapes alone, and nothing is synchronised with the host, so with NCCL the whole
    captures in a CUDA graph. Works with any backend that gathers and exchanges tensors: NCCL, and gloo on the CPU.

    Args:
        experts: this rank's experts; its experts_start_idx and total_experts say which of how many.
        group: the process group; default the whole world.
    """

    def __init__(self, experts: Nvfp4MoE, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        if not dist.is_initialized():
            raise InvalidArgumentError(
                "ExpertParallelMoE: group: expected an initialised process group, got none; call "
                "torch.distributed.init_process_group"
            )
        self.experts = experts
        self.group = group
        self.ranks = dist.get_world_size(group)

    def forward(
        self, hidden: Tensor, topk_weights: Tensor, topk_ids: Tensor, *, shared: Tensor | None = None
    ) -> Tensor:
        """Sends this rank's tokens through all ranks' experts. Every rank of the group must call it.

        Args:
            hidden: [tokens, hidden_size] bfloat16; as many tokens on every rank (pad with ids of -1).
            topk_weights: [tokens, top_k] float32.
            topk_ids: [tokens, top_k] int32 or int64, ids over all ranks.
            shared: [tokens, hidden_size] bfloat16 to add, such as the shared expert's output of these tokens.

        Returns:
            [tokens, hidden_size] bfloat16. Each rank's part is rounded to bfloat16 on its way.
        """
        gathered = [self._gathered(tensor.contiguous()) for tensor in (hidden, topk_weights, topk_ids)]
        parts = self.experts.run(gathered[0], gathered[1], gathered[2])
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts, group=self.group)
        total = received.view(self.ranks, *hidden.shape).to(torch.float32).sum(dim=0)
        return (total if shared is None else total + shared).to(torch.bfloat16)

    def _gathered(self, tensor: Tensor) -> Tensor:
        """The tensor of every rank, one below the other."""
        out = tensor.new_empty((self.ranks * tensor.shape[0], *tensor.shape[1:]))
        dist.all_gather_into_tensor(out, tensor, group=self.group)
        return out
