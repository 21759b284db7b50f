"""Rows on their way to the ranks that hold their experts, in messages of fixed size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dsv4_kernels.moe.quantize import quantize_mxfp8

FP8_GROUP = 32  # columns that share a scale


class Places(NamedTuple):
    """Which row of a message each slot has; see place_slots.

    of_slot: [tokens, top_k] int32. slot: [ranks * capacity] int64. dropped: [] int64.
    """

    of_slot: Tensor
    slot: Tensor
    dropped: Tensor


def place_slots(ranks_of_slots: Tensor, ranks: int, capacity: int, *, one_per_rank: bool) -> Places:
    """Gives the slots of each rank the rows that are sent to it, in the order of the slots.

    Args:
        ranks_of_slots: [tokens, top_k] int64: where a slot goes, `ranks` for nowhere.
        ranks: how many there are.
        capacity: rows for each rank, from row rank * capacity on.
        one_per_rank: a token takes one row per rank, that of its first slot there; the others take none.

    Returns:
        of_slot: the slot's row, -1 for those without. slot: the slot of each row, -1 for rows that are not used.
        dropped: slots for whom there was no row left: the last ones.
    """
    tokens, top_k = ranks_of_slots.shape
    device = ranks_of_slots.device
    goes = ranks_of_slots
    if one_per_rank:
        same = goes[:, :, None] == goes[:, None, :]  # [token, slot, earlier slot]
        earlier = torch.ones(top_k, top_k, dtype=torch.bool, device=device).tril(-1)
        goes = torch.where((same & earlier).any(dim=2), ranks, goes)
    goes = goes.reshape(-1)
    # A row for each rank: scans run along rows.
    here = torch.arange(ranks, device=device)[:, None] == goes
    order = here.cumsum(dim=1, dtype=torch.int32).gather(0, goes.clamp(max=ranks - 1)[None])[0].to(torch.int64) - 1
    sent = goes < ranks
    fits = sent & (order < capacity)
    place = torch.where(fits, goes * capacity + order, ranks * capacity)
    slot = torch.full((ranks * capacity + 1,), -1, dtype=torch.int64, device=device)
    slot.scatter_(0, place, torch.arange(tokens * top_k, device=device))  # the last place takes the others
    of_slot = torch.where(fits, place, -1).to(torch.int32).reshape(tokens, top_k)
    return Places(of_slot, slot[:-1], (sent & ~fits).sum())


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
        return sum(-(-count * dtype.itemsize // 16) * 16 for count, dtype in self._parts())

    def views(self, message: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Hidden states, scales, ids and weights of a message [rows, row_bytes] uint8, in place."""
        views, begin = [], 0
        for count, dtype in self._parts():
            size = count * dtype.itemsize
            views.append(message[:, begin : begin + size].view(dtype))
            begin += -(-size // 16) * 16
        x, scale, ids, weights = views
        return x, scale, ids, weights

    def pack(
        self, places: Places, capacity: int, hidden: Tensor, weights: Tensor, ids: Tensor, ranks: Tensor
    ) -> Tensor:
        """The messages to all ranks, one below the other: [ranks * capacity, row_bytes] uint8.

        Args:
            places: the rows of the slots of ids.
            capacity: rows of a message.
            hidden: [tokens, hidden_size] bfloat16, at least one.
            weights: [tokens, top_k] float32.
            ids: [tokens, top_k] int32 or int64. A row has those that go to its rank, all of its token's if routes is
                top_k, its own if it is 1; -1 for the others.
            ranks: [tokens, top_k] int64, where they go.
        """
        message = hidden.new_empty((places.slot.shape[0], self.row_bytes), dtype=torch.uint8)
        x, scale, own_ids, own_weights = self.views(message)
        top_k = ids.shape[1]
        slot = places.slot.clamp(min=0)
        token = slot // top_k
        used = (places.slot >= 0)[:, None]
        if self.fp8:
            codes, scales = quantize_mxfp8(hidden)
            x.view(torch.uint8).copy_(codes.view(torch.uint8)[token])
            scale.view(torch.uint8).copy_(scales.view(torch.uint8)[token])
        else:
            x.copy_(hidden[token])
        if self.routes == top_k:
            rank = torch.arange(len(slot), device=slot.device)[:, None] // capacity
            own_ids.copy_(torch.where(used & (ranks[token] == rank), ids[token], -1))
            own_weights.copy_(weights[token])
        else:
            own_ids.copy_(torch.where(used, ids.reshape(-1)[slot][:, None], -1))
            own_weights.copy_(weights.reshape(-1)[slot][:, None])
        return message


def rows_per_rank(max_tokens: int, ranks: int, top_k: int, combine: str = "sums") -> float:
    """How many rows go from a rank with so many tokens to each rank on average, if routes are spread evenly.

    combine "sums": a token has a row for each rank with one of its experts: 1 - (1 - 1 / ranks)^top_k. "routes": for
    each of its routes: top_k / ranks.
    """
    share = 1 - (1 - 1 / ranks) ** top_k if combine == "sums" else top_k / ranks
    return max_tokens * share
