"""The routed experts on an engine's own tensors: MXFP4 weights in the checkpoints' layout, gate rows before up rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dsv4_kernels.moe.expert_layout import can_be_interleaved
from dsv4_kernels.moe.grouped_gemm import run_fused_swiglu_grouped_gemm, run_nvfp4_grouped_gemm
from dsv4_kernels.moe.interleaved_weights import BLOCK, can_interleave, interleave_weights
from dsv4_kernels.moe.nvfp4_moe import ROWS_FOR_TILES_OF_16, ROWS_FOR_TILES_OF_64
from dsv4_kernels.moe.routing import max_tiles, moe_finalize, moe_sort

BATCH_INVARIANT_TILE = 64


class ProductWeights(NamedTuple):
    """A product's weights as run_experts takes them: in interleave_weights' order, or in the checkpoints'."""

    weight: Tensor
    scale: Tensor


def prepare_in_place(weight: Tensor, scale: Tensor, *, gate_and_up: bool) -> Tensor | None:
    """Rearranges MXFP4 weights within their own memory, expert by expert.

    weight keeps its address, shape and dtype, its bytes are afterwards those of interleave_weights' words. Memory
    beyond that is a few times one expert's, and the new scales, which take two bytes instead of one.

    Args:
        weight: [experts, N, K / 2] packed codes of one byte each element, contiguous.
        scale: [experts, N, K / 32] uint8 or float8_e8m0fnu.
        gate_and_up: the first half of N is a gate's rows; see interleave_weights.

    Returns:
        the scales, [experts, K / 128, N, 2] int32. None where that order cannot be, or takes more memory than the
        weights have: K is no multiple of 128, or a scale is above 2^9. Then nothing has changed, and the products take
        the weights as they are, in about twice the time.
    """
    experts, rows, packed = weight.shape
    inner = 2 * packed
    whole = inner % BLOCK == 0 and weight.is_contiguous() and can_be_interleaved(rows, inner, "mxfp4")
    if not whole or not can_interleave(rows, inner, scale):
        return None
    scales = torch.empty((experts, inner // BLOCK, rows, 2), dtype=torch.int32, device=weight.device)
    for expert in range(experts):
        made = interleave_weights(weight[expert, None], scale[expert, None], gate_and_up=gate_and_up)
        weight[expert].view(torch.uint8).view(-1).copy_(made.weight.view(torch.uint8).view(-1))
        scales[expert] = made.weight_scale[0]
    return scales


def product_weights(weight: Tensor, scale: Tensor) -> ProductWeights:
    """The views that the products read, of weights that prepare_in_place has rearranged or left as they were."""
    if scale.dtype != torch.int32:
        return ProductWeights(weight.view(torch.uint8), scale)
    experts, blocks, rows, _ = scale.shape
    return ProductWeights(weight.view(torch.int32).view(experts, blocks, rows, BLOCK // 8), scale)


def tile_size(slots: int, total_experts: int) -> int:
    """Rows of a tile for so many routed slots over all ranks' experts; Nvfp4MoE's choice."""
    if slots <= ROWS_FOR_TILES_OF_16 * total_experts:
        return 16
    return 64 if slots <= ROWS_FOR_TILES_OF_64 * total_experts else 128


def product_rows(slots: int, local_experts: int, tile: int) -> int:
    """Rows that the products of so many routed slots can have."""
    return max_tiles(slots, local_experts, tile) * tile


def run_experts(
    hidden: Tensor,
    first: ProductWeights,
    second: ProductWeights,
    topk_weights: Tensor | None,
    topk_ids: Tensor,
    *,
    tile: int,
    expert_map: Tensor | None = None,
    limit: float = 0.0,
    shared: Tensor | None = None,
    out: Tensor | None = None,
    out_inner: Tensor | None = None,
    out_rows: Tensor | None = None,
) -> Tensor:
    """y[t] = sum_k weight[t, k] * expert[id[t, k]](x[t]), in the four launches of Nvfp4MoE.

    Args:
        hidden: [tokens, H] bfloat16.
        first: gate and up, [experts, 2 * I, H] values.
        second: down, [experts, H, I] values.
        topk_weights: [tokens, top_k] float32; None: every chosen expert counts once.
        topk_ids: [tokens, top_k] int32 or int64: ids of the experts here, or with expert_map of all; others contribute
            nothing.
        tile: rows of a tile, 16, 64 or 128.
        expert_map: [ids] int32, the expert here that an id stands for, or -1.
        limit: SwiGLU's, 0 for none.
        shared: [tokens, H] bfloat16 to add.
        out: [tokens, H] bfloat16 to write to.
        out_inner: [product_rows, I] bfloat16 to compute in.
        out_rows: [product_rows, H] bfloat16 to compute in.

    Returns:
        [tokens, H] bfloat16.
    """
    routes = moe_sort(topk_ids.contiguous(), first.weight.shape[0], tile, expert_map=expert_map)
    maps = routes.tile_to_expert, routes.row_to_slot
    top_k = topk_ids.shape[1]
    inner = run_fused_swiglu_grouped_gemm(hidden, *first, *maps, top_k=top_k, limit=limit, out=out_inner)
    rows = run_nvfp4_grouped_gemm(inner, *second, *maps, out=out_rows)
    return moe_finalize(rows, routes.slot_to_row, topk_weights, shared, out=out)
