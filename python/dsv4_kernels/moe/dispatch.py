"""Rows on their way to the ranks that hold their experts, in messages of fixed size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4_kernels import _native
from dsv4_kernels.moe.quantize import quantize_mxfp8
from dsv4_kernels.op import InOut, op, output

__all__ = ["moe_dispatch_places", "moe_dispatch_rows", "rows_per_rank"]

FP8_GROUP = 32  # columns that share a scale
PART = 16  # bytes that each part of a row is a multiple of


@op(_native.moe_dispatch_places)
def moe_dispatch_places(
    topk_ids: Tensor,
    rank_of_id: Tensor,
    dropped: InOut,
    ranks: int,
    capacity: int,
    one_per_rank: bool = False,
    *,
    out_slot_to_place: Tensor | None = None,
    out_place_to_slot: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gives the slots of each rank the rows of a message to it, in the order of the slots.

    Slot s is element s of topk_ids. Place rank * capacity + i is that of the i-th slot whose expert the rank has. One
    launch; a captured graph follows new ids and a new table.

    Args:
        topk_ids: [tokens, top_k] int32 or int64, top_k at most 32.
        rank_of_id: [ids] int32. Ids outside of it, and those with a rank outside [0, ranks), go nowhere.
        dropped: [1] int64, to which the slots are added that no place was left for: the last ones of a rank.
        ranks: 1 to 65535.
        capacity: places for each rank; ranks * capacity at most 2^30.
        one_per_rank: a token takes one place per rank, that of its first slot there; its others take none.
        out_slot_to_place: [tokens, top_k] int32 to write to.
        out_place_to_slot: [ranks * capacity] int32 to write to.

    Returns:
        slot_to_place: -1 for slots without a place; moe_finalize adds up what comes back by it. place_to_slot: -1 for
        places that are not used.
    """
    return (
        output(out_slot_to_place, topk_ids, topk_ids.shape, torch.int32),
        output(out_place_to_slot, topk_ids, (ranks * capacity,), torch.int32),
    )


@op(_native.moe_dispatch_rows)
def moe_dispatch_rows(
    x: Tensor,
    scale: Tensor | None,
    topk_weights: Tensor,
    topk_ids: Tensor,
    rank_of_id: Tensor,
    place_to_slot: Tensor,
    capacity: int,
    routes: int,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """The rows of messages to all ranks: what MessageLayout describes. Arguments are its pack()'s, as bytes.

    Args:
        x: [tokens, bytes] uint8, bytes a multiple of 16; rows may be strided, and start on multiples of 16 bytes.
        scale: [tokens, bytes] uint8 or None.
        topk_weights: [tokens, top_k] float32.
        topk_ids: [tokens, top_k] int32 or int64, top_k at most 32.
        rank_of_id: [ids] int32.
        place_to_slot: [places] int32, of moe_dispatch_places.
        capacity: places for each rank.
        routes: of a row: top_k, all of its token's, with id -1 for those of other ranks; or 1, its slot's.
        out: [places, row bytes] uint8 to write to, on a multiple of 16 bytes.

    Returns:
        out. A place without a slot gets ids -1 and nothing else: the rest of the row is undefined in an allocated out.
    """
    parts = x.shape[1], 0 if scale is None else scale.shape[1], 4 * routes, 4 * routes
    return output(out, x, (place_to_slot.shape[0], sum(map(_padded, parts))), torch.uint8)


def _padded(size: int) -> int:
    return -(-size // PART) * PART


@dataclass(frozen=True)
class MessageLayout:
    """A row of a message: hidden states, their scales if they are FP8, the ids of its routes and their weights.

    routes: of a row. Every part starts on a multiple of 16 bytes, as the products read rows where they lie.
    """

    hidden_size: int
    routes: int
    fp8: bool

    def _parts(self) -> tuple[tuple[int, torch.dtype], ...]:
        if self.fp8:
            x = (self.hidden_size, torch.float8_e4m3fn), (self.hidden_size // FP8_GROUP, torch.float8_e8m0fnu)
        else:
            x = (self.hidden_size, torch.bfloat16), (0, torch.float8_e8m0fnu)
        return *x, (self.routes, torch.int32), (self.routes, torch.float32)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row, a multiple of 16."""
        return sum(_padded(count * dtype.itemsize) for count, dtype in self._parts())

    def views(self, message: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Hidden states, scales, ids and weights of a message [rows, row_bytes] uint8, in place."""
        views, begin = [], 0
        for count, dtype in self._parts():
            size = count * dtype.itemsize
            views.append(message[:, begin : begin + size].view(dtype))
            begin += _padded(size)
        x, scale, ids, weights = views
        return x, scale, ids, weights

    def pack(
        self,
        hidden: Tensor,
        weights: Tensor,
        ids: Tensor,
        rank_of_id: Tensor,
        place_to_slot: Tensor,
        capacity: int,
    ) -> Tensor:
        """The messages to all ranks, one below the other: [ranks * capacity, row_bytes] uint8.

        Args:
            hidden: [tokens, hidden_size] bfloat16.
            weights: [tokens, top_k] float32.
            ids: [tokens, top_k] int32 or int64.
            rank_of_id: [ids] int32.
            place_to_slot: [ranks * capacity] int32, of moe_dispatch_places.
            capacity: rows of a message.
        """
        x, scale = quantize_mxfp8(hidden) if self.fp8 else (hidden, None)
        scale = None if scale is None else scale.view(torch.uint8)
        return moe_dispatch_rows(
            x.view(torch.uint8), scale, weights, ids, rank_of_id, place_to_slot, capacity, self.routes
        )


def rows_per_rank(max_tokens: int, ranks: int, top_k: int, combine: str = "sums") -> float:
    """How many rows go from a rank with so many tokens to each rank on average, if routes are spread evenly.

    combine "sums": a token has a row for each rank with one of its experts: 1 - (1 - 1 / ranks)^top_k. "routes": for
    each of its routes: top_k / ranks.
    """
    share = 1 - (1 - 1 / ranks) ** top_k if combine == "sums" else top_k / ranks
    return max_tokens * share
