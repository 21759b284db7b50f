"""Experts spread over the ranks of a process group."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.compiler import is_compiling

from dsv4_kernels.errors import InvalidArgumentError
from dsv4_kernels.moe.nvfp4_moe import Nvfp4MoE

_ID_TYPES = (torch.int32, torch.int64)


class ExpertParallelMoE(nn.Module):
    """A layer whose experts are spread over ranks, each with tokens of its own.

    Dispatch gathers the tokens of all ranks, each rank runs its experts on them, and combine sends every partial sum
    back to its token's rank, which adds them in the order of ranks: the same input gives the same bits. Works with any
    backend that gathers and exchanges tensors: NCCL, and gloo on the CPU.

    Ranks may have different numbers of tokens, none too: each pads to the most that a rank has. With max_tokens that is
    a number known to all, what crosses ranks has a fixed size and nothing is synchronised with the host, so with NCCL
    the whole captures in a CUDA graph. Without it, every call first gathers the ranks' numbers and waits for them on
    the host; a rank whose arguments are refused then makes the call fail on every rank, instead of leaving the others
    waiting.

    Args:
        experts: this rank's experts; its experts_start_idx and total_experts say which of how many.
        group: the process group; default the whole world.
        max_tokens: the most tokens that any rank has in any call, the same on every rank. None: agreed in each call.
    """

    def __init__(
        self, experts: Nvfp4MoE, group: dist.ProcessGroup | None = None, *, max_tokens: int | None = None
    ) -> None:
        super().__init__()
        if not dist.is_initialized():
            raise InvalidArgumentError(
                "ExpertParallelMoE: group: expected an initialised process group, got none; call "
                "torch.distributed.init_process_group"
            )
        if max_tokens is not None and (not isinstance(max_tokens, int) or max_tokens < 1):
            raise InvalidArgumentError(
                f"ExpertParallelMoE: max_tokens: expected at least 1 or None, got {max_tokens!r}"
            )
        self.experts = experts
        self.group = group
        self.ranks = dist.get_world_size(group)
        self.max_tokens = max_tokens

    def forward(
        self, hidden: Tensor, topk_weights: Tensor, topk_ids: Tensor, *, shared: Tensor | None = None
    ) -> Tensor:
        """Sends this rank's tokens through all ranks' experts. Every rank of the group must call it.

        Args:
            hidden: [tokens, hidden_size] bfloat16.
            topk_weights: [tokens, top_k] float32.
            topk_ids: [tokens, top_k] int32 or int64, ids over all ranks, of one dtype on all ranks; -1 contributes
                nothing.
            shared: [tokens, hidden_size] bfloat16 to add, such as the shared expert's output of these tokens.

        Returns:
            [tokens, hidden_size] bfloat16. Each rank's part is rounded to bfloat16 on its way; their sum and shared are
            added in float32 and rounded once.

        Raises:
            InvalidArgumentError: arguments that do not fit: without max_tokens on every rank, with it on this one.
        """
        refusal = self._refusal(hidden, topk_weights, topk_ids, shared)
        rows = self._agreed_rows(hidden, topk_ids, refusal) if self.max_tokens is None else self.max_tokens
        if refusal is not None:
            raise refusal
        tokens = hidden.shape[0]
        if self.max_tokens is not None and tokens > self.max_tokens:
            raise InvalidArgumentError(
                f"ExpertParallelMoE: hidden: expected at most max_tokens {self.max_tokens} tokens, got {tokens}"
            )
        if rows == 0:  # on every rank
            return hidden.clone() if shared is None else shared.clone()
        # Ids of -1 take no row, so what the padding holds does not matter; zeros, as it crosses ranks.
        padded = _padded(hidden, rows, 0), _padded(topk_weights, rows, 0), _padded(topk_ids, rows, -1)
        parts = self.experts.run(*(self._gathered(tensor) for tensor in padded))
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts, group=self.group)
        total = received.view(self.ranks, rows, -1)[:, :tokens].to(torch.float32).sum(dim=0)
        return (total if shared is None else total + shared).to(torch.bfloat16)

    def _refusal(
        self, hidden: Tensor, topk_weights: Tensor, topk_ids: Tensor, shared: Tensor | None
    ) -> Exception | None:
        """What is wrong with this rank's arguments. Before anything crosses ranks: there it would abort the process."""
        try:
            self.experts.check_batch("ExpertParallelMoE", hidden, topk_weights, topk_ids, shared)
            for name, tensor, dtypes in (
                ("hidden", hidden, (torch.bfloat16,)),
                ("topk_weights", topk_weights, (torch.float32,)),
                ("topk_ids", topk_ids, _ID_TYPES),
                ("shared", shared, (torch.bfloat16,)),
            ):
                if tensor is not None and tensor.dtype not in dtypes:
                    need = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
                    got = str(tensor.dtype).removeprefix("torch.")
                    raise InvalidArgumentError(f"ExpertParallelMoE: {name}: expected dtype {need}, got {got}")
        except Exception as error:  # whatever it is, the other ranks must hear of it
            return error
        return None

    def _agreed_rows(self, hidden: Tensor, topk_ids: Tensor, refusal: Exception | None) -> int:
        """The most tokens that a rank has; an error on every rank if one of them cannot go on."""
        if is_compiling() or (hidden.is_cuda and torch.cuda.is_current_stream_capturing()):
            raise InvalidArgumentError(
                "ExpertParallelMoE: max_tokens: expected a number in CUDA graphs and under torch.compile, got None; "
                "ranks cannot agree on one there"
            )
        experts = self.experts
        mine = _Agreement(
            refusal is None,
            hidden.shape[0] if refusal is None else 0,
            experts.hidden_size,
            experts.top_k,
            topk_ids.dtype == torch.int64 if refusal is None else 0,
        )
        device = experts.device
        gathered = self._gathered(torch.tensor([mine], dtype=torch.int64, device=device))
        ranks = [_Agreement(*numbers) for numbers in gathered.tolist()]
        if refusal is not None:
            return 0
        failed = [rank for rank, its in enumerate(ranks) if not its.accepted]
        if failed:
            raise InvalidArgumentError(
                f"ExpertParallelMoE: arguments: expected what fits on every rank, got others on rank {failed[0]}; "
                "its own error says what is wrong"
            )
        for name in ("hidden_size", "top_k", "ids_of_64_bits"):
            values = [getattr(its, name) for its in ranks]
            if len(set(values)) > 1:
                raise InvalidArgumentError(f"ExpertParallelMoE: {name}: expected one on all ranks, got {values}")
        return max(its.tokens for its in ranks)

    def _gathered(self, tensor: Tensor) -> Tensor:
        """The tensor of every rank, one below the other."""
        out = tensor.new_empty((self.ranks * tensor.shape[0], *tensor.shape[1:]))
        # torch 2.13 has deprecated the name that older ones know.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(out, tensor.contiguous(), group=self.group)
        return out


class _Agreement(NamedTuple):
    """What each rank tells the others before tensors whose sizes must agree cross ranks."""

    accepted: int
    tokens: int
    hidden_size: int
    top_k: int
    ids_of_64_bits: int


def _padded(tensor: Tensor, rows: int, value: int) -> Tensor:
    """The tensor with rows of this value behind it."""
    if tensor.shape[0] == rows:
        return tensor
    out = tensor.new_full((rows, *tensor.shape[1:]), value)
    out[: tensor.shape[0]] = tensor
    return out
