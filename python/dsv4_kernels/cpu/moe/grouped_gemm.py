"""The grouped GEMMs of the experts in plain torch: the CPU implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_kernels.cpu.moe import quantize
from dsv4_kernels.cpu.moe.scale_layouts import swizzle_32_4_4
from dsv4_kernels.cpu.moe.swiglu import clamped_swiglu
from dsv4_kernels.moe import formats
from dsv4_kernels.moe.weight_layouts import gate_and_up
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


def decode_interleaved(words: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
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
    codes, factors = decode_interleaved(weight, weight_scale)
    return (codes.to(torch.float64) * factors.to(torch.float64) * 2.0**8).flatten(1)


def sources(row_to_slot: Tensor, top_k: int, x_rows: int) -> tuple[Tensor, Tensor]:
    """The row of x that each row reads, and which rows there are."""
    slot = row_to_slot.to(torch.int64)
    row = torch.arange(slot.numel(), device=slot.device)
    source = slot // top_k if top_k else row
    return source, (slot >= 0) & (source < x_rows)


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
    swiglu: bool,
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
        if swiglu:
            gate, up = gate_and_up(result, weight.dtype == torch.int32)
            result = clamped_swiglu(gate * factor[0], up * factor[-1], limit)
        else:
            result = result * factor[0]
        if slot_weights is not None:
            result = result * slot_weights.reshape(-1)[row_to_slot[rows].to(torch.int64), None].to(torch.float64)
        out[rows] = result.to(out.dtype)


def moe_grouped_gemm_quantized(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    tile_to_expert: Tensor,
    row_to_slot: Tensor,
    x_scale: Tensor,
    global_scale: Tensor | None,
    alpha: Tensor | None,
    slot_weights: Tensor | None,
    top_k: int,
    limit: float,
    swizzle: bool,
    out: Tensor,
    out_scale: Tensor,
) -> None:
    """Two steps: bfloat16, then codes of it."""
    maps = tile_to_expert, row_to_slot
    in_bfloat16 = torch.zeros(row_to_slot.shape[0], weight.shape[-2] // 2, dtype=torch.bfloat16, device="cpu")
    moe_grouped_gemm(x, weight, weight_scale, *maps, x_scale, alpha, slot_weights, top_k, True, limit, in_bfloat16)
    rows, _, _ = rows_of_experts(*maps, top_k, x.shape[0], weight.shape[0])
    data, scale = quantized(in_bfloat16[rows], global_scale)
    out.view(torch.uint8)[rows] = data
    as_bytes = out_scale.view(torch.uint8)
    if not swizzle:
        as_bytes[rows] = scale
        return
    padded = torch.zeros_like(as_bytes)
    padded[rows, : scale.shape[1]] = scale
    as_bytes.copy_(swizzle_32_4_4(padded))


def quantized(values: Tensor, global_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Bytes of codes and of scales, one row after another: NVFP4 under a global scale, without one MXFP8."""
    rows, columns = values.shape
    group, codes_per_byte = (32, 1) if global_scale is None else (16, 2)
    data = torch.empty(rows, columns // codes_per_byte, dtype=torch.uint8, device="cpu")
    scale = torch.empty(rows, columns // group, dtype=torch.uint8, device="cpu")
    plain = formats.PLAIN, 0, 0.0, True
    if global_scale is None:
        quantize.quantize_mx(values, formats.E4M3, *plain, True, 0.0, True, False, None, data, scale)
    else:
        quantize.quantize_nvfp4(values, global_scale, None, False, *plain, True, 0.0, False, None, data, scale)
    return data, scale
