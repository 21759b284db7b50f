"""How pages hold entries: the layouts of public engines, and from channels to bytes and back.

A page holds the values of its entries one after another, then the scales of its entries one after another, then padding
that no op touches. In a separate layout, scales and values in bfloat16 are tensors of their own. The table itself is
the library's (csrc/cache/page_layout.h).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4_kernels import _native, number_formats
from dsv4_kernels.host_values import integer

LARGEST = {"float8_e4m3fn": number_formats.LARGEST_E4M3, "float4_e2m1fn_x2": number_formats.LARGEST_E2M1}


@dataclass(frozen=True)
class PageLayout:
    """One layout.

    name: what functions take as `layout`. index: its number in the C interface.
    head_dim: channels of an entry. quantized_dims: how many are quantised, the first ones; the rest is bfloat16.
    element: dtype of the quantised channels. group: channels that share a scale. scale: dtype of that.
    value_bytes, scale_bytes: of an entry, the latter with padding. page_alignment: a page's bytes are a multiple of it.
    separate: whether pages hold quantised channels alone, and scales and the rest are tensors of their own.
    amax_floor: what the layout's own code takes for a group's largest magnitude at least.
    exact_scale: whether it leaves a float32 scale as it is, and does not round it up to a power of two.
    """

    name: str
    index: int
    head_dim: int
    quantized_dims: int
    element: str
    group: int
    scale: str
    value_bytes: int
    scale_bytes: int
    page_alignment: int
    separate: bool
    amax_floor: float
    exact_scale: bool

    def page_bytes(self, entries: int) -> int:
        """Bytes of a page of so many entries."""
        entries = integer("PageLayout.page_bytes", "entries", entries, 0, 2**31 - 1)
        return int(_native.page_bytes(self.index, entries))

    @property
    def entry_bytes(self) -> int:
        """Bytes that an entry takes, without the page's padding."""
        return self.value_bytes + self.scale_bytes + (self.rest_bytes if self.separate else 0)

    @property
    def rest_bytes(self) -> int:
        """Bytes of an entry's channels in bfloat16."""
        return 2 * (self.head_dim - self.quantized_dims)

    @property
    def quantized_bytes(self) -> int:
        """Bytes of an entry's quantised channels."""
        return self.value_bytes - (0 if self.separate else self.rest_bytes)

    @property
    def groups(self) -> int:
        """Scales of an entry."""
        return self.quantized_dims // self.group if self.group else 0

    @property
    def written_scale_bytes(self) -> int:
        """Bytes of an entry's scales without padding."""
        return self.groups * (4 if self.scale == "float32" else 1)


PAGE_LAYOUTS: dict[str, PageLayout] = {
    row[0]: PageLayout(row[0], index, *row[1:]) for index, row in enumerate(_native.page_layouts())
}
LAYOUTS_BY_INDEX = tuple(PAGE_LAYOUTS.values())


@dataclass(frozen=True)
class Quantization:
    """What engines differ in: see compress_flush."""

    amax_floor: float
    scale_floor: float = 0.0
    fp4_ties_toward_zero: bool = False
    exact_scale: bool = False


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


@dataclass(frozen=True)
class Pages:
    """The tensors of a pool, as ops take them: pages, and of separate layouts scales and rope."""

    pages: Tensor
    scales: Tensor | None
    rope: Tensor | None
    layout: PageLayout
    entries_per_page: int

    @property
    def count(self) -> int:
        """Entries of all pages."""
        return self.pages.shape[0] * self.entries_per_page

    def _columns(self, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From entries to page [entries, 1] and the columns of its values and of its scales."""
        page, slot = (slots // self.entries_per_page).unsqueeze(1), (slots % self.entries_per_page).unsqueeze(1)
        values = torch.arange(self.layout.value_bytes, device=slots.device)
        scales = torch.arange(self.layout.written_scale_bytes, device=slots.device)
        return (
            page,
            slot * self.layout.value_bytes + values,
            self.entries_per_page * self.layout.value_bytes + slot * self.layout.scale_bytes + scales,
        )

    def _parts(self) -> list[Tensor]:
        """The tensors of a separate layout as bytes, a row an entry: a view."""
        tensors = [tensor for tensor in (self.pages, self.rope, self.scales) if tensor is not None]
        return [t.view(torch.uint8).reshape(self.count, -1) if t.numel() else t.new_empty(0, 0) for t in tensors]

    def put(self, slots: Tensor, values: Tensor, scales: Tensor) -> None:
        """Writes bytes: of values, quantised ones first, and of scales [entries, bytes]."""
        if not self.layout.separate:
            page, value_columns, scale_columns = self._columns(slots)
            self.pages[page, value_columns] = values
            if self.layout.groups:
                self.pages[page, scale_columns] = scales
            return
        sizes = [self.layout.quantized_bytes, *([self.layout.rest_bytes] if self.rope is not None else [])]
        for part, rows in zip(self._parts(), (*values.split(sizes, dim=1), scales), strict=True):
            part[slots] = rows

    def get(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """What put() takes."""
        if not self.layout.separate:
            page, value_columns, scale_columns = self._columns(slots)
            return self.pages[page, value_columns], self.pages[page, scale_columns]
        rows = [part[slots] for part in self._parts()]
        return torch.cat(rows[:-1], dim=1), rows[-1]


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
