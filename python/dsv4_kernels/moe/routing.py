"""Groups routed slots by expert, and adds up what the experts gave."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dsv4_kernels import _native
from dsv4_kernels.op import op, output

__all__ = ["SortedRoutes", "max_tiles", "moe_finalize", "moe_sort", "moe_tiles_from_counts"]


class SortedRoutes(NamedTuple):
    """Where each routed slot goes; see moe_sort."""

    tile_to_expert: Tensor
    tile_rows: Tensor
    row_to_slot: Tensor
    slot_to_row: Tensor
    counts: Tensor


def max_tiles(slots: int, local_experts: int, tile_size: int) -> int:
    """The most tiles that any routing of so many slots can use.

    slots if they are no more than the experts (one each), else floor((slots + (tile_size - 1) * local_experts) /
    tile_size): every expert's last tile can be all but one row short of full. dsv4_moe_sort_max_tiles in C.
    """
    if local_experts <= 0 or tile_size <= 0:
        return 0  # the op's checks say what is wrong with them
    # Without a branch on the number of slots, which a trace may not know.
    least = min if isinstance(slots, int) else torch.sym_min
    tiles: int = least(slots, (slots + (tile_size - 1) * local_experts) // tile_size)
    return tiles


@op(_native.moe_sort)
def _moe_sort(
    topk_ids: Tensor,
    local_experts: int,
    tile_size: int,
    experts_start_idx: int = 0,
    expert_map: Tensor | None = None,
    *,
    out_tile_to_expert: Tensor | None = None,
    out_tile_rows: Tensor | None = None,
    out_row_to_slot: Tensor | None = None,
    out_slot_to_row: Tensor | None = None,
    out_counts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """moe_sort, its results as a plain tuple, which torch's tracing needs."""
    tokens, top_k = topk_ids.shape
    tiles = max_tiles(tokens * top_k, local_experts, tile_size)
    return (
        output(out_tile_to_expert, topk_ids, (tiles,), torch.int32),
        output(out_tile_rows, topk_ids, (tiles,), torch.int32),
        output(out_row_to_slot, topk_ids, (tiles * tile_size,), torch.int32),
        output(out_slot_to_row, topk_ids, (tokens, top_k), torch.int32),
        output(out_counts, topk_ids, (2,), torch.int32),
    )


def moe_sort(
    topk_ids: Tensor,
    local_experts: int,
    tile_size: int,
    experts_start_idx: int = 0,
    expert_map: Tensor | None = None,
    *,
    out_tile_to_expert: Tensor | None = None,
    out_tile_rows: Tensor | None = None,
    out_row_to_slot: Tensor | None = None,
    out_slot_to_row: Tensor | None = None,
    out_counts: Tensor | None = None,
) -> SortedRoutes:
    """Rows for the routed slots, grouped by expert in tiles of tile_size rows.

    Slot s is element s of topk_ids: token s // top_k. Each tile belongs to one expert; experts come in order, the slots
    of an expert in their own order, so the result does not depend on how the work was split. An id that is negative or
    not local takes no row. One launch; nothing is synchronised; a captured graph follows new ids and a new map.

    Args:
        topk_ids: [tokens, top_k] int32 or int64, top_k at most 32; rows may be strided.
        local_experts: number of experts that live here, 1 to 1024.
        tile_size: rows of a tile: 16, 32, 64 or 128.
        experts_start_idx: id of the first local expert (expert parallelism). 0 with expert_map.
        expert_map: [ids] int32, the local expert of each id, where local experts are no range of ids: -1 for those that
            are elsewhere. Several ids may have the same expert. Ids outside the map, and those that it sends outside of
            [0, local_experts), take no row.
        out_tile_to_expert: [tiles] int32 to write to; tiles = max_tiles(tokens * top_k, local_experts, tile_size).
        out_tile_rows: [tiles] int32 to write to.
        out_row_to_slot: [tiles * tile_size] int32 to write to.
        out_slot_to_row: [tokens, top_k] int32 to write to.
        out_counts: [2] int32 to write to.

    Returns:
        tile_to_expert: local expert of each tile, -1 for the unused ones, which come last. tile_rows: rows of the tile
        that hold a slot, the first ones. row_to_slot: -1 for the padding of a used tile; undefined in unused tiles.
        slot_to_row: -1 for slots without a row. counts: tiles used, slots that have a row.
    """
    return SortedRoutes(
        *_moe_sort(
            topk_ids,
            local_experts,
            tile_size,
            experts_start_idx,
            expert_map,
            out_tile_to_expert=out_tile_to_expert,
            out_tile_rows=out_tile_rows,
            out_row_to_slot=out_row_to_slot,
            out_slot_to_row=out_slot_to_row,
            out_counts=out_counts,
        )
    )


@op(_native.moe_tiles_from_counts)
def moe_tiles_from_counts(
    counts: Tensor,
    max_rows: int,
    tile_size: int,
    *,
    out_tile_to_expert: Tensor | None = None,
    out_row_to_slot: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The tiles of rows that lie by expert already, as DeepEP's low-latency mode and vLLM's batched experts have them.

    Each expert has room for max_rows rows, of which the first counts[e] are used: row i of expert e is row
    e * max_rows + i, in products as in their results. For moe_grouped_gemm with top_k 0 or 1, which then reads and
    writes no other rows. One launch; a captured graph follows new counts.

    Args:
        counts: [experts] int32 or int64. Below 0 acts as 0, above max_rows as max_rows.
        max_rows: a multiple of tile_size; experts * max_rows at most 2^30.
        tile_size: rows of a tile: 16, 32, 64 or 128.
        out_tile_to_expert: [experts * max_rows / tile_size] int32 to write to.
        out_row_to_slot: [experts * max_rows] int32 to write to.

    Returns:
        tile_to_expert: the expert, -1 for tiles without a row, which lie among the others. row_to_slot: the row itself,
        -1 for rows that are not used.
    """
    rows = counts.shape[0] * max_rows
    # Without tiles of no rows: the op's checks say what is wrong with that.
    return (
        output(out_tile_to_expert, counts, (rows // tile_size if tile_size > 0 else 0,), torch.int32),
        output(out_row_to_slot, counts, (rows,), torch.int32),
    )


@op(_native.moe_finalize)
def moe_finalize(
    rows: Tensor,
    slot_to_row: Tensor,
    weights: Tensor | None = None,
    shared: Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Each token's sum over its experts: out[t] = sum_k weights[t, k] * rows[slot_to_row[t, k]] + shared[t].

    In float32, in the order of k, rounded once: the same input gives the same bits, whatever the batch.

    Args:
        rows: [rows, columns] bfloat16, the experts' outputs in moe_sort's order; rows may be strided.
        slot_to_row: [tokens, top_k] int32, of moe_sort. A row that is negative or beyond the rows contributes nothing.
        weights: [tokens, top_k] float32 routing weights, rows may be strided; None if the experts' outputs have them
            already.
        shared: [tokens, columns] bfloat16 to add, such as the shared expert's output; rows may be strided.
        out: [tokens, columns] bfloat16 to write to; shared itself is allowed.

    Returns:
        out.
    """
    return output(out, rows, (slot_to_row.shape[0], rows.shape[1]), torch.bfloat16)
