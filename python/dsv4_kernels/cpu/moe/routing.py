"""moe_sort, moe_tiles_from_counts and moe_finalize in plain torch: the CPU implementation."""

from __future__ import annotations

import torch
from torch import Tensor


def moe_sort(
    topk_ids: Tensor,
    local_experts: int,
    tile_size: int,
    experts_start_idx: int,
    expert_map: Tensor | None,
    out_tile_to_expert: Tensor,
    out_tile_rows: Tensor,
    out_row_to_slot: Tensor,
    out_slot_to_row: Tensor,
    out_counts: Tensor,
) -> None:
    # No id minus the start wraps: what lies below the range is found before the subtraction.
    ids = topk_ids.reshape(-1).to(torch.int64)
    if expert_map is not None:
        mapped = ((ids >= 0) & (ids < expert_map.shape[0])).nonzero()[:, 0]
        local_ids = torch.full_like(ids, -1)
        local_ids[mapped] = expert_map[ids[mapped]].to(torch.int64)
        ids = local_ids
    local = (ids >= experts_start_idx) & (ids < experts_start_idx + local_experts)
    slots = local.nonzero()[:, 0]
    expert, order = torch.sort(ids[slots] - experts_start_idx, stable=True)
    slots = slots[order]

    count = torch.bincount(expert, minlength=local_experts)
    tiles = (count + tile_size - 1) // tile_size
    first_tile, first_slot = tiles.cumsum(0) - tiles, count.cumsum(0) - count
    rank = torch.arange(slots.numel(), device="cpu") - first_slot[expert]
    row = first_tile[expert] * tile_size + rank

    used = int(tiles.sum())
    tile_expert = torch.repeat_interleave(torch.arange(local_experts, device="cpu"), tiles)
    rank_of_tile = torch.arange(used, device="cpu") - first_tile[tile_expert]
    out_tile_to_expert.fill_(-1)
    out_tile_to_expert[:used] = tile_expert.to(torch.int32)
    out_tile_rows.zero_()
    out_tile_rows[:used] = (count[tile_expert] - rank_of_tile * tile_size).clamp(max=tile_size).to(torch.int32)
    out_row_to_slot[: used * tile_size] = -1
    out_row_to_slot[row] = slots.to(torch.int32)
    out_slot_to_row.fill_(-1)
    out_slot_to_row.view(-1)[slots] = row.to(torch.int32)
    out_counts.copy_(torch.tensor([used, slots.numel()], dtype=torch.int64, device="cpu"))


def moe_tiles_from_counts(
    counts: Tensor, max_rows: int, tile_size: int, out_tile_to_expert: Tensor, out_row_to_slot: Tensor
) -> None:
    row = torch.arange(out_row_to_slot.shape[0], device="cpu")
    expert = row // max(max_rows, 1)
    slot = torch.where(row - expert * max_rows < counts[expert], row, -1)
    out_row_to_slot.copy_(slot)
    out_tile_to_expert.copy_(torch.where(slot >= 0, expert, -1)[::tile_size])


def moe_finalize(rows: Tensor, slot_to_row: Tensor, weights: Tensor | None, shared: Tensor | None, out: Tensor) -> None:
    """Exact but for float64's rounding; out may be float64."""
    total = torch.zeros(out.shape, dtype=torch.float64, device="cpu")
    for k in range(slot_to_row.shape[1]):
        row = slot_to_row[:, k].to(torch.int64)
        present = (row >= 0) & (row < rows.shape[0])
        value = rows[row[present]].to(torch.float64)
        if weights is not None:
            value = value * weights[present, k, None].to(torch.float64)
        total[present] += value
    if shared is not None:
        total += shared.to(torch.float64)
    out.copy_(total.to(torch.float32).to(out.dtype) if out.dtype == torch.bfloat16 else total)
