"""Experts spread over the ranks of a process group."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.compiler import is_compiling

from dsv4_kernels.errors import InvalidArgumentError
from dsv4_kernels.moe.dispatch import MessageLayout, moe_dispatch_places
from dsv4_kernels.moe.nvfp4_moe import Nvfp4MoE
from dsv4_kernels.moe.quantize import dequantize_mxfp8
from dsv4_kernels.moe.routing import moe_finalize

_ID_TYPES = (torch.int32, torch.int64)


class ExpertParallelMoE(nn.Module):
    """A layer whose experts are spread over ranks, each with tokens of its own.

    Two ways for tokens to reach their experts, with any backend that gathers and exchanges tensors: NCCL, and gloo on
    the CPU. Both are deterministic: the same input gives the same bits.

    dispatch "gather": every token goes to every rank, and each rank sends its partial sum of it back; the token's rank
    adds them in the order of ranks. Best for two ranks, and for batches of a few tokens.

    dispatch "routed": a token goes to the ranks that hold its experts and to no other, in messages of `capacity` rows
    for each rank, in one exchange; a second one brings the results back. combine "sums": a row for each of its ranks,
    their partial sums in bfloat16, added in the order of the token's routes. combine "routes": a row for each of its
    routes, added by moe_finalize as one rank's results are: to the bit the layer on one rank, if both use tiles of one
    size (see Nvfp4MoE, batch_invariant). rows "fp8": dispatched as MXFP8, half the bytes; with activations "mxfp8" that
    is what the products read, so that no bit changes, otherwise rows are rounded to it.

    Ranks may have different numbers of tokens, none too. With max_tokens, the most that a rank has in any call, what
    crosses ranks has a fixed size and nothing is synchronised with the host, so with NCCL the whole captures in a CUDA
    graph. Without it (dispatch "gather" alone), every call first gathers the ranks' numbers and waits for them on the
    host; a rank whose arguments are refused then makes the call fail on every rank, instead of leaving the others
    waiting.

    Args:
        experts: this rank's experts; its experts_start_idx and total_experts say which of how many.
        group: the process group; default the whole world.
        max_tokens: the most tokens that any rank has in any call, the same on every rank. None: agreed in each call.
        dispatch: "gather" or "routed". Then construction is collective: ranks tell each other which experts they have.
        rows: "bf16" or, with dispatch "routed", "fp8".
        combine: "sums" or, with dispatch "routed", "routes".
        capacity: with dispatch "routed", rows from each rank to each rank, the same on all; rows_per_rank() says what
            is sent on average. Default: as many as could ever be sent. Rows beyond it are dropped, the last ones, and
            contribute nothing; `dropped` counts them.
    """

    dropped: Tensor
    _rank_of_id: Tensor

    def __init__(
        self,
        experts: Nvfp4MoE,
        group: dist.ProcessGroup | None = None,
        *,
        max_tokens: int | None = None,
        dispatch: str = "gather",
        rows: str = "bf16",
        combine: str = "sums",
        capacity: int | None = None,
    ) -> None:
        super().__init__()
        if not dist.is_initialized():
            raise InvalidArgumentError(
                "ExpertParallelMoE: group: expected an initialised process group, got none; call "
                "torch.distributed.init_process_group"
            )
        for name, number in (("max_tokens", max_tokens), ("capacity", capacity)):
            if number is not None and (not isinstance(number, int) or number < 1):
                raise InvalidArgumentError(f"ExpertParallelMoE: {name}: expected at least 1 or None, got {number!r}")
        for name, value, values in (
            ("dispatch", dispatch, ("gather", "routed")),
            ("rows", rows, ("bf16", "fp8") if dispatch == "routed" else ("bf16",)),
            ("combine", combine, ("sums", "routes") if dispatch == "routed" else ("sums",)),
        ):
            if value not in values:
                need = " or ".join(map(repr, values))
                raise InvalidArgumentError(
                    f"ExpertParallelMoE: {name}: expected {need} with dispatch {dispatch!r}, got {value!r}"
                    if name != "dispatch"
                    else f"ExpertParallelMoE: dispatch: expected {need}, got {value!r}"
                )
        if dispatch == "routed" and max_tokens is None:
            raise InvalidArgumentError(
                "ExpertParallelMoE: max_tokens: expected a number with dispatch 'routed', got None; messages have a "
                "fixed size"
            )
        if dispatch == "gather" and capacity is not None:
            raise InvalidArgumentError(
                f"ExpertParallelMoE: capacity: expected None with dispatch 'gather', got {capacity}"
            )
        self.experts = experts
        self.group = group
        self.ranks = dist.get_world_size(group)
        self.max_tokens = max_tokens
        self.dispatch, self.rows, self.combine = dispatch, rows, combine
        self.register_buffer("dropped", torch.zeros(1, dtype=torch.int64, device=experts.device), persistent=False)
        self.register_buffer("_rank_of_id", torch.empty(0, dtype=torch.int32, device=experts.device), persistent=False)
        self.capacity = 0
        if max_tokens is not None and dispatch == "routed":
            routes = 1 if combine == "routes" else experts.top_k
            self._layout = MessageLayout(experts.hidden_size, routes, rows == "fp8")
            self.capacity = max_tokens * (experts.top_k // routes) if capacity is None else capacity
            self._rank_of_id = self._agreed_ranks()

    @property
    def message_bytes(self) -> int:
        """Bytes that cross ranks for a row that is dispatched, with dispatch "routed"."""
        return self._layout.row_bytes

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
            [tokens, hidden_size] bfloat16. What ranks send back, each rank's part or each route's result, is rounded to
            bfloat16 on its way; their sum and shared are added in float32 and rounded once.

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
        if self.dispatch == "routed":
            return self._routed(hidden, topk_weights, topk_ids, shared)
        if rows == 0:  # on every rank
            return hidden.clone() if shared is None else shared.clone()
        # Ids of -1 take no row, so what the padding holds does not matter; zeros, as it crosses ranks.
        padded = _padded(hidden, rows, 0), _padded(topk_weights, rows, 0), _padded(topk_ids, rows, -1)
        parts = self.experts.run(*(self._gathered(tensor) for tensor in padded))
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts, group=self.group)
        total = received.view(self.ranks, rows, -1)[:, :tokens].to(torch.float32).sum(dim=0)
        return (total if shared is None else total + shared).to(torch.bfloat16)

    def _routed(self, hidden: Tensor, topk_weights: Tensor, topk_ids: Tensor, shared: Tensor | None) -> Tensor:
        """Rows to the ranks of their experts, results back to the ranks of their tokens."""
        experts, layout, table = self.experts, self._layout, self._rank_of_id
        slot_to_place, place_to_slot = moe_dispatch_places(
            topk_ids, table, self.dropped, self.ranks, self.capacity, self.combine == "sums"
        )
        message = layout.pack(hidden, topk_weights, topk_ids, table, place_to_slot, self.capacity)
        x, scales, ids, weights = layout.views(self._exchanged(message))
        scale = scales.contiguous() if layout.fp8 else None
        if scale is not None and experts.activations != "mxfp8":
            x = dequantize_mxfp8(x.contiguous(), scale)
            scale = None
        early = experts.weight_before_second or experts.apply_router_weight_on_input
        late = self.combine == "routes" and not early
        parts = experts.sums(
            x,
            scale,
            weights.contiguous(),
            ids.contiguous(),
            experts.tile_size(self.ranks * self.max_tokens),  # type: ignore[operator]
            weigh=not (late or early),
        )
        results = self._exchanged(parts)
        return moe_finalize(results, slot_to_place, topk_weights if late else None, shared)

    def _exchanged(self, messages: Tensor) -> Tensor:
        """What the ranks send here, one below the other: of each the part for this rank."""
        received = torch.empty_like(messages)
        dist.all_to_all_single(received, messages, group=self.group)
        return received

    def _agreed_ranks(self) -> Tensor:
        """The rank of each id, from what the ranks tell each other; all must have been made alike."""
        experts = self.experts
        mine = (
            experts.experts_start_idx,
            experts.num_experts,
            experts.hidden_size,
            experts.top_k,
            self.max_tokens,
            self.capacity,
            self.rows == "fp8",
            self.combine == "routes",
        )
        names = ("hidden_size", "top_k", "max_tokens", "capacity", "rows", "combine")
        told = self._gathered(torch.tensor([mine], dtype=torch.int64, device=experts.device)).tolist()
        for name, values in zip(names, list(zip(*told, strict=True))[2:], strict=True):
            if len(set(values)) > 1:
                raise InvalidArgumentError(f"ExpertParallelMoE: {name}: expected one on all ranks, got {list(values)}")
        table = [self.ranks] * max(start + count for start, count, *_ in told)
        for rank, (start, count, *_) in enumerate(told):
            for identity in range(start, start + count):
                if table[identity] != self.ranks:
                    raise InvalidArgumentError(
                        f"ExpertParallelMoE: experts: expected each id on one rank, got id {identity} on ranks "
                        f"{table[identity]} and {rank}"
                    )
                table[identity] = rank
        return torch.tensor(table, dtype=torch.int32, device=experts.device)

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
