"""Quantisation in plain torch: the CPU implementation, to the bit what the kernels do but for SwiGLU's exponential."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_kernels import number_formats as formats
from dsv4_kernels.cpu.moe.scale_layouts import TILE_ROWS, swizzle_32_4_4, unswizzle_32_4_4
from dsv4_kernels.cpu.moe.swiglu import clamped_swiglu
from dsv4_kernels.moe.formats import DEINTERLEAVE, E2M1, PLAIN, SCALE_E4M3, SCALE_FLOAT32

NVFP4_RANGE = formats.LARGEST_E4M3 * formats.LARGEST_E2M1


def source_values(x: Tensor, source: int, granularity: int, limit: float, round_to_bfloat16: bool) -> Tensor:
    """The float32 values [rows, columns] that are quantised. SwiGLU is computed in float64 and rounded once."""
    wide = x.to(torch.float32)
    if source == PLAIN:
        return wide
    rows, half = x.shape[0], x.shape[1] // 2
    width = granularity or max(half, 1)  # of a run of gates
    pairs = wide.reshape(rows, half // width, 2, width)
    gate, up = pairs[:, :, 0].reshape(rows, half), pairs[:, :, 1].reshape(rows, half)
    if source == DEINTERLEAVE:
        return gate
    value = clamped_swiglu(gate.to(torch.float64), up.to(torch.float64), limit).to(torch.float32)
    return value.to(torch.bfloat16).to(torch.float32) if round_to_bfloat16 else value


def in_groups(values: Tensor, group: int) -> Tensor:
    """[rows, columns] as [rows, columns / group, group]."""
    rows, columns = values.shape
    return values.reshape(rows, columns // group, group)


def row_amax(values: Tensor) -> Tensor:
    """[rows, columns] to [rows]; NaN if a value is."""
    return formats.largest_magnitude(torch.nn.functional.pad(values, (0, 1)))  # of no columns, 0


def quantize_nvfp4(
    x: Tensor,
    global_scale: Tensor,
    expert_ids: Tensor | None,
    reciprocal_global_scale: bool,
    source: int,
    granularity: int,
    limit: float,
    round_to_bfloat16: bool,
    ties_to_even: bool,
    scale_floor: float,
    swizzle: bool,
    n_used: Tensor | None,
    out: Tensor,
    out_scale: Tensor,
) -> None:
    values = source_values(x, source, granularity, limit, round_to_bfloat16)
    of_row, has_one = _global_scale_of_rows(global_scale, expert_ids, values.shape[0])
    other = 1.0 / of_row
    encode, decode = (of_row, other) if reciprocal_global_scale else (other, of_row)
    amax = formats.largest_magnitude(in_groups(values, 16))
    wanted = encode[:, None] * (amax * torch.tensor(1 / 6, dtype=torch.float32, device="cpu"))
    scale = formats.encode_e4m3(wanted.clamp(min=scale_floor))
    decoded = formats.decode_e4m3(scale)
    factor = torch.where(decoded == 0, 0.0, 1.0 / (decoded * decode[:, None]))
    scaled = in_groups(values, 16) * factor[:, :, None]
    data = formats.pack_e2m1(formats.encode_e2m1(scaled.flatten(1), ties_to_even=ties_to_even))
    data[~has_one], scale[~has_one] = 0, 0
    _write(data, scale, swizzle, n_used, out, out_scale)


def quantize_nvfp4_gpu_fused(
    x: Tensor,
    expert_ids: Tensor | None,
    experts: int,
    per_token: bool,
    reciprocal_global_scale: bool,
    source: int,
    granularity: int,
    limit: float,
    round_to_bfloat16: bool,
    amax_floor: float,
    ties_to_even: bool,
    scale_floor: float,
    swizzle: bool,
    n_used: Tensor | None,
    out: Tensor,
    out_scale: Tensor,
    out_global_scale: Tensor,
) -> None:
    values = source_values(x, source, granularity, limit, round_to_bfloat16)
    used = used_count(n_used, x.shape[0])
    # A block with a NaN has a scale of NaN, and counts for no global one.
    of_rows = row_amax(formats.largest_magnitude(in_groups(values, 16)).nan_to_num(nan=0.0, posinf=torch.inf))
    if per_token:
        amax, written = of_rows, slice(0, used)
    else:
        index = (
            expert_ids[:used].to(torch.int64)
            if expert_ids is not None
            else torch.zeros(used, dtype=torch.int64, device="cpu")
        )
        count = out_global_scale.shape[0]
        valid = (index >= 0) & (index < count)
        amax = torch.zeros(count, dtype=torch.float32, device="cpu").scatter_reduce(
            0, index[valid], of_rows[:used][valid], "amax"
        )
        written = slice(0, count)
    size = amax.clamp(amax_floor, torch.finfo(torch.float32).max)
    range_ = size.new_tensor(NVFP4_RANGE)  # divided by a number, torch may multiply with its reciprocal
    scale = range_ / size if reciprocal_global_scale else size / range_
    out_global_scale[written] = scale[written]
    quantize_nvfp4(
        x, scale, expert_ids, reciprocal_global_scale, source, granularity, limit, round_to_bfloat16, ties_to_even,
        scale_floor, swizzle, n_used, out, out_scale,
    )  # fmt: skip


def quantize_mx(
    x: Tensor,
    element_format: int,
    source: int,
    granularity: int,
    limit: float,
    round_to_bfloat16: bool,
    round_scale_up: bool,
    amax_floor: float,
    ties_to_even: bool,
    swizzle: bool,
    n_used: Tensor | None,
    out: Tensor,
    out_scale: Tensor,
) -> None:
    values = source_values(x, source, granularity, limit, round_to_bfloat16)
    amax = formats.largest_magnitude(in_groups(values, 32))
    fp4 = element_format == E2M1
    if round_scale_up:
        scale = formats.ceil_e8m0_of_amax(amax, amax_floor, formats.LARGEST_E2M1 if fp4 else formats.LARGEST_E4M3)
    else:
        scale = formats.floor_e8m0(amax.clamp(min=amax_floor), formats.E2M1_EXPONENT if fp4 else formats.E4M3_EXPONENT)
    scaled = (in_groups(values, 32) * formats.reciprocal_e8m0(scale)[:, :, None]).flatten(1)
    if fp4:
        data = formats.pack_e2m1(formats.encode_e2m1(scaled, ties_to_even=ties_to_even))
    else:
        data = formats.encode_e4m3(scaled)
    _write(data, scale, swizzle, n_used, out, out_scale)


def quantize_fp8_per_token(x: Tensor, scale_floor: float, divide: bool, out: Tensor, out_scale: Tensor) -> None:
    values = x.to(torch.float32)
    amax = row_amax(values)
    scale = (amax / amax.new_tensor(formats.LARGEST_E4M3)).clamp(min=scale_floor)
    safe = torch.where(scale == 0, torch.inf, scale)[:, None]
    factor = 1.0 / safe
    # The reciprocal of a scale below 2^-128 is infinite.
    scaled = torch.where(factor.isinf() | divide, values / safe, values * factor)
    out.view(torch.uint8).copy_(formats.encode_e4m3(scaled))
    out_scale.copy_(scale)


def dequantize_blocks(
    data: Tensor,
    scale: Tensor,
    global_scale: Tensor | None,
    expert_ids: Tensor | None,
    reciprocal_global_scale: bool,
    element_format: int,
    scale_format: int,
    swizzle: bool,
    dtype: int,
    out: Tensor,
) -> None:
    codes = data.view(torch.uint8)
    values = formats.decode_e2m1(formats.unpack_e2m1(codes)) if element_format == E2M1 else formats.decode_e4m3(codes)
    rows, columns = values.shape
    if scale_format == SCALE_FLOAT32:
        blocks = scale[:, None].expand(rows, columns)
    else:
        group = 16 if scale_format == SCALE_E4M3 else 32
        bytes_of = scale.view(torch.uint8)
        if swizzle:
            bytes_of = unswizzle_32_4_4(bytes_of)[:rows, : columns // group]
        decoded = formats.decode_e4m3(bytes_of) if scale_format == SCALE_E4M3 else formats.decode_e8m0(bytes_of)
        blocks = decoded.repeat_interleave(group, dim=1)
    values = values * blocks
    if global_scale is not None:
        of_row, has_one = _global_scale_of_rows(global_scale, expert_ids, rows)
        decode = 1.0 / of_row if reciprocal_global_scale else of_row
        values = values * torch.where(has_one, decode, 0.0)[:, None]
    out.copy_(values)


def _global_scale_of_rows(global_scale: Tensor, expert_ids: Tensor | None, rows: int) -> tuple[Tensor, Tensor]:
    """Of each row, and whether it has one; 1 where it has none."""
    flat = global_scale.reshape(-1)
    if expert_ids is None:
        return flat.expand(rows), torch.ones(rows, dtype=torch.bool, device="cpu")
    index = expert_ids.to(torch.int64)
    has_one = (index >= 0) & (index < flat.shape[0])
    return torch.where(has_one, flat[torch.where(has_one, index, 0)], 1.0), has_one


def used_count(n_used: Tensor | None, rows: int) -> int:
    return rows if n_used is None else min(max(int(n_used), 0), rows)


def _write(data: Tensor, scale: Tensor, swizzle: bool, n_used: Tensor | None, out: Tensor, out_scale: Tensor) -> None:
    """Codes and scales of the used rows; with a swizzle, whole tiles of scales."""
    used = used_count(n_used, data.shape[0])
    out.view(torch.uint8)[:used] = data[:used]
    as_bytes = out_scale.view(torch.uint8)
    if not swizzle:
        as_bytes[:used] = scale[:used]
        return
    written = -(-used // TILE_ROWS) * TILE_ROWS
    padded = torch.zeros(written, out_scale.shape[1], dtype=torch.uint8, device="cpu")
    padded[:used, : scale.shape[1]] = scale[:used]
    as_bytes[:written] = swizzle_32_4_4(padded)
