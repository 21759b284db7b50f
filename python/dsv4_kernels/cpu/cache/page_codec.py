"""Entries of a page from channels to bytes and back, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_kernels import number_formats
from dsv4_kernels.cache.page_layouts import PageLayout, Pages, Quantization

LARGEST = {"float8_e4m3fn": number_formats.LARGEST_E4M3, "float4_e2m1fn_x2": number_formats.LARGEST_E2M1}


def scales_of(values: Tensor, layout: PageLayout, quantization: Quantization) -> Tensor:
    """The scale of each group, as bytes: [entries, groups, bytes of a scale] uint8.

    values: [entries, head_dim] float32 that are bfloat16 numbers.
    """
    grouped = values[:, : layout.quantized_dims].unflatten(1, (layout.groups, layout.group))
    amax = number_formats.largest_magnitude(grouped).clamp(min=quantization.amax_floor)
    wanted = (amax / _like(values, LARGEST[layout.element])).clamp(min=quantization.scale_floor)
    if layout.scale == "float32":
        scale = wanted if quantization.exact_scale else number_formats.decode_e8m0(number_formats.ceil_e8m0(wanted))
        return scale.unsqueeze(2).contiguous().view(torch.uint8)
    code = number_formats.ceil_e8m0(wanted) if layout.scale == "float8_e8m0fnu" else number_formats.encode_e4m3(wanted)
    return code.unsqueeze(2)


def _like(values: Tensor, number: float) -> Tensor:
    return torch.full((), number, dtype=torch.float32, device=values.device)


def decode_scales(scales: Tensor, layout: PageLayout) -> Tensor:
    """[entries, groups] float32 of what scales_of() gives."""
    if layout.scale == "float32":
        return scales.contiguous().view(torch.float32).squeeze(2)
    decode = number_formats.decode_e8m0 if layout.scale == "float8_e8m0fnu" else number_formats.decode_e4m3
    return decode(scales.squeeze(2))


def encode_values(values: Tensor, scales: Tensor, layout: PageLayout, quantization: Quantization) -> Tensor:
    """[entries, quantized_bytes + rest_bytes] uint8: nearest codes under given scales, then what stays bfloat16."""
    rest = values[:, layout.quantized_dims :].to(torch.bfloat16).contiguous().view(torch.uint8)
    if not layout.quantized_dims:
        return rest
    scale = decode_scales(scales, layout).unsqueeze(2)
    grouped = values[:, : layout.quantized_dims].unflatten(1, (layout.groups, layout.group))
    scaled = torch.where(scale == 0, 0.0, grouped / scale).flatten(1)
    if layout.element == "float8_e4m3fn":
        return torch.cat((number_formats.encode_e4m3(scaled), rest), dim=1)
    codes = number_formats.encode_e2m1(scaled, ties_to_even=not quantization.fp4_ties_toward_zero)
    return torch.cat((number_formats.pack_e2m1(codes), rest), dim=1)


def decode_values(values: Tensor, scales: Tensor, layout: PageLayout) -> Tensor:
    """[entries, head_dim] float32 of the bytes of entries."""
    quantized_bytes = layout.quantized_bytes
    rest = values[:, quantized_bytes:].contiguous().view(torch.bfloat16).to(torch.float32)
    if not layout.quantized_dims:
        return rest
    codes = values[:, :quantized_bytes].contiguous()
    if layout.element == "float8_e4m3fn":
        decoded = number_formats.decode_e4m3(codes)
    else:
        decoded = number_formats.decode_e2m1(number_formats.unpack_e2m1(codes))
    scale = decode_scales(scales, layout).unsqueeze(2)
    return torch.cat(((decoded.unflatten(1, (layout.groups, layout.group)) * scale).flatten(1), rest), dim=1)


def write_entries(pages: Pages, slots: Tensor, values: Tensor, quantization: Quantization) -> None:
    """Quantises entries [entries, head_dim] float32, bfloat16 numbers, into pages. Slots, which count the entries of
    all pages, must be in range.
    """
    layout = pages.layout
    scales = scales_of(values, layout, quantization) if layout.groups else values.new_empty(0)
    pages.put(
        slots, encode_values(values, scales, layout, quantization), scales.flatten(1) if layout.groups else scales
    )


def read_entries(pages: Pages, slots: Tensor) -> Tensor:
    """[entries, head_dim] float32. Slots must be in range."""
    values, scales = pages.get(slots)
    layout = pages.layout
    return decode_values(values, scales.unflatten(1, (layout.groups, -1)) if layout.groups else scales, layout)
