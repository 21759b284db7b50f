"""moe_grouped_gemm in plain torch: the CPU implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_kernels.moe.interleaved_weights import PAIR_ROWS
from dsv4_kernels.number_formats import decode_e2m1, decode_e4m3, decode_e8m0, unpack_e2m1


def dequantize(codes: Tensor, scale: Tensor | None) -> Tensor:
    """[..., K] values in float64 of packed FP4 or FP8 codes with their block scales; of bfloat16 as they are."""
    if codes.dtype == torch.bfloat16:
        return codes.to(torch.float64)
    if codes.dtype == torch.float8_e4m3fn:
        values = decode_e4m3(codes.view(torch.uint8))
    else:
        values = decode_e2m1(unpack_e2m1(codes.view(torch.uint8)))
    if scale is None:
        return values.to(torch.float64)
    decode = decode_e4m3 if scale.dtype == torch.float8_e4m3fn else decode_e8m0
    factor = decode(scale.view(torch.uint8)).to(torch.float64)
    return values.to(torch.float64) * factor.repeat_interleave(values.shape[-1] // factor.shape[-1], dim=-1)


def widen_interleaved(words: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """One expert's interleaved weights as bfloat16: codes times 2^-126 [N, blocks, 2, 2, 4, 8] and what they are to be
    multiplied by, but for 2^8, in the same shape.

    The dimensions of K are block, half, group of 32, pair and place. It is the kernel's way, in torch.
    """
    bits = words.to(torch.int64) & 0xFFFFFFFF
    mask = 0x81C081C0
    pairs = [bits & mask] + [((bits >> by) | (bits << (32 - by))) & mask for by in (3, 6)]
    pairs.append(((bits & 0x001B001B) * 0x4108) & mask)
    stacked = torch.stack(pairs, dim=-1)
    stacked = (stacked - ((stacked >> 31) << 32)).to(torch.int32)
    blocks, rows = words.shape[:2]
    # [blocks, rows, place, group, half, pair, code]
    codes = stacked.view(torch.bfloat16).reshape(blocks, rows, 4, 2, 2, 4, 2).permute(1, 0, 4, 3, 5, 2, 6)
    # [blocks, rows, factors of a half, half]: a factor for 4 or for 2 pairs
    factor = factors.contiguous().view(torch.bfloat16).reshape(blocks, rows, 2, -1, 2).permute(1, 0, 4, 2, 3)
    factor = factor.repeat_interleave(4 // factor.shape[-1], dim=-1)[..., None]
    return codes.reshape(rows, blocks, 2, 2, 4, 8), factor.expand(rows, blocks, 2, 2, 4, 8)


def expert_weights(weight: Tensor, weight_scale: Tensor) -> Tensor:
    """One expert's weights in float64, [N, K], of either layout."""
    if weight.dtype != torch.int32:
        return dequantize(weight, weight_scale)
    codes, factors = widen_interleaved(weight, weight_scale)
    return (codes.to(torch.float64) * factors.to(torch.float64) * 2.0**8).flatten(1)


def gate_and_up(result: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """The two halves of a first product's columns, as the layout of its weights has them."""
    if interleaved:
        gate, up = result.unflatten(-1, (-1, 2, PAIR_ROWS)).unbind(dim=-2)
        return gate.flatten(-2), up.flatten(-2)
    gate, up = result.chunk(2, dim=-1)
    return gate, up


def sources(row_to_slot: Tensor, top_k: int, x_rows: int) -> tuple[Tensor, Tensor]:
    """The row of x that each row reads, and which rows there are."""
    slot = row_to_slot.to(torch.int64)
    row = torch.arange(slot.numel(), device=slot.device)
    source = slot // top_k if top_k else row
    return source, (slot >= 0) & (source < x_rows)


def swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """silu(min(gate, limit)) * clamp(up, -limit, limit); NaN stays NaN."""
    if limit > 0:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(gate) * up


def rows_of_experts(
    tile_to_expert: Tensor, row_to_slot: Tensor, top_k: int, x_rows: int, experts: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The rows that are written, what rows of x they read, and their experts."""
    source, present = sources(row_to_slot, top_k, x_rows)
    tile_size = row_to_slot.shape[0] // max(tile_to_expert.shape[0], 1)
    expert = tile_to_expert.to(torch.int64).repeat_interleave(tile_size)
    rows = (present & (expert >= 0) & (expert < experts)).nonzero()[:, 0]
    return rows, source[rows], expert[rows]


def moe_grouped_gemm(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    tile_to_expert: Tensor,
    row_to_slot: Tensor,
    x_scale: Tensor | None,
    alpha: Tensor | None,
    slot_weights: Tensor | None,
    top_k: int,
    with_swiglu: bool,
    limit: float,
    out: Tensor,
) -> None:
    """In float64, rounded once; out may be float64."""
    written, source, expert_of_row = rows_of_experts(tile_to_expert, row_to_slot, top_k, x.shape[0], weight.shape[0])
    for expert in expert_of_row.unique().tolist():
        rows, taken = written[expert_of_row == expert], source[expert_of_row == expert]
        rows_of_x = x.view(torch.uint8)[taken].view(x.dtype)  # torch takes no rows of packed FP4
        values = dequantize(rows_of_x, None if x_scale is None else x_scale[taken])
        weights = expert_weights(weight[expert], weight_scale[expert])
        result = values @ weights[:, : values.shape[1]].T  # interleaved weights have padding
        factor = (
            torch.ones(1, dtype=torch.float64, device="cpu")
            if alpha is None
            else alpha[expert].to(torch.float64).reshape(-1)
        )
        if with_swiglu:
            gate, up = gate_and_up(result, weight.dtype == torch.int32)
            result = swiglu(gate * factor[0], up * factor[-1], limit)
        else:
            result = result * factor[0]
        if slot_weights is not None:
            result = result * slot_weights.reshape(-1)[row_to_slot[rows].to(torch.int64), None].to(torch.float64)
        out[rows] = result.to(out.dtype)
