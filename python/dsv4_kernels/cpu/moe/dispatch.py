"""moe_dispatch_places and moe_dispatch_rows in plain torch: the CPU implementation."""

from __future__ import annotations

import torch
from torch import Tensor


def _ranks_of(ids: Tensor, rank_of_id: Tensor) -> Tensor:
    """int64, -1 for ids outside the table."""
    ranks = torch.full(ids.shape, -1, dtype=torch.int64, device="cpu")
    known = (ids >= 0) & (ids < rank_of_id.shape[0])
    ranks[known] = rank_of_id[ids[known].to(torch.int64)].to(torch.int64)
    return ranks


def moe_dispatch_places(
    topk_ids: Tensor,
    rank_of_id: Tensor,
    dropped: Tensor,
    ranks: int,
    capacity: int,
    one_per_rank: bool,
    out_slot_to_place: Tensor,
    out_place_to_slot: Tensor,
) -> None:
    goes = _ranks_of(topk_ids, rank_of_id)
    goes[(goes < 0) | (goes >= ranks)] = ranks
    if one_per_rank:
        same = goes[:, :, None] == goes[:, None, :]  # [token, slot, earlier slot]
        goes[same.tril(-1).any(dim=2)] = ranks
    goes = goes.reshape(-1)
    sent, slots = torch.sort(goes, stable=True)  # slots by rank, in their own order
    count = torch.bincount(sent, minlength=ranks + 1)
    order = torch.arange(slots.numel(), device="cpu") - (count.cumsum(0) - count)[sent]
    fits = (sent < ranks) & (order < capacity)
    places = (sent * capacity + order)[fits]
    out_slot_to_place.fill_(-1)
    out_slot_to_place.view(-1)[slots[fits]] = places.to(torch.int32)
    out_place_to_slot.fill_(-1)
    out_place_to_slot[places] = slots[fits].to(torch.int32)
    dropped += (count[:ranks] - capacity).clamp(min=0).sum()


def moe_dispatch_rows(
    x: Tensor,
    scale: Tensor | None,
    topk_weights: Tensor,
    topk_ids: Tensor,
    rank_of_id: Tensor,
    place_to_slot: Tensor,
    capacity: int,
    routes: int,
    out: Tensor,
) -> None:
    def part(columns: int) -> int:
        return -(-columns // 16) * 16

    top_k = topk_ids.shape[1]
    at_scale = part(x.shape[1])
    at_ids = at_scale + (0 if scale is None else part(scale.shape[1]))
    at_weights = at_ids + part(4 * routes)
    own_ids = out[:, at_ids : at_ids + 4 * routes].view(torch.int32)
    own_ids.fill_(-1)
    used = ((place_to_slot >= 0) & (place_to_slot < topk_ids.numel())).nonzero()[:, 0]
    slot = place_to_slot[used].to(torch.int64)
    token = slot // top_k
    slots = token[:, None] * top_k + torch.arange(top_k, device="cpu") if routes == top_k else slot[:, None]
    ids = topk_ids.reshape(-1)[slots]
    here = _ranks_of(ids, rank_of_id) == (used // capacity)[:, None]
    row = torch.zeros((used.numel(), out.shape[1]), dtype=torch.uint8, device="cpu")
    row[:, : x.shape[1]] = x[token]
    if scale is not None:
        row[:, at_scale : at_scale + scale.shape[1]] = scale[token]
    row[:, at_ids : at_ids + 4 * routes].view(torch.int32).copy_(torch.where(here, ids, -1))
    row[:, at_weights : at_weights + 4 * routes].view(torch.float32).copy_(topk_weights.reshape(-1)[slots])
    out[used] = row
