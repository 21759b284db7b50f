"""moe_grouped_gemm in plain torch: the CPU implementation."""

from __future__ import annotations

import torch
from torch import Tensor

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
    experts, tiles = weight.shape[0], tile_to_expert.shape[0]
    source, present = sources(row_to_slot, top_k, x.shape[0])
    expert_of_row = tile_to_expert.to(torch.int64).repeat_interleave(row_to_slot.shape[0] // max(tiles, 1))
    for expert in expert_of_row[present].unique().tolist():
        if not 0 <= expert < experts:
            continue
        rows = (present & (expert_of_row == expert)).nonzero()[:, 0]
        taken = source[rows]
        values = dequantize(x[taken], None if x_scale is None else x_scale[taken])
        result = values @ dequantize(weight[expert], weight_scale[expert]).T
        factor = torch.ones(1, dtype=torch.float64) if alpha is None else alpha[expert].to(torch.float64).reshape(-1)
        if with_swiglu:
            gate, up = result.chunk(2, dim=1)
            result = swiglu(gate * factor[0], up * factor[-1], limit)
        else:
            result = result * factor[0]
        if slot_weights is not None:
            result = result * slot_weights.reshape(-1)[row_to_slot[rows].to(torch.int64), None].to(torch.float64)
        out[rows] = result.to(out.dtype)
