"""How pages hold entries: the layouts of public engines, and where the bytes of an entry are.

A page holds the values of its entries one after another, then the scales of its entries one after another, then padding
that no op touches. In a separate layout, scales and values in bfloat16 are tensors of their own. The table itself is
the library's (csrc/cache/page_layout.h).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4_kernels import _native
from dsv4_kernels.host_values import integer


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
        """The tensors of a separate layout as bytes, one row per entry: a view."""
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
