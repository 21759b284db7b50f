"""What a layer's compressed cache looks like: tokens per entry, widths of rows, layout of pages.

Sizes of the public models: head_dim 512 of which 64 carry the rotary position, indexer keys of 128.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from dsv4_kernels.cache.page_layouts import PAGE_LAYOUTS
from dsv4_kernels.errors import InvalidArgumentError
from dsv4_kernels.host_values import integer
from dsv4_kernels.presets import Preset


class AttentionType(enum.Enum):
    """Kind of attention.

    SWA: a sliding window alone, nothing compressed. CSA: compressed and sparsely attended, through an indexer; blocks
    overlap. HCA: heavily compressed, attended in full; blocks do not overlap.
    """

    SWA = "swa"
    CSA = "csa"
    HCA = "hca"


@dataclass(frozen=True)
class LayerCacheSchema:
    """One layer.

    Attributes:
        attention: kind of attention, which decides the streams of the state.
        m: tokens a compressed entry; 0 for SWA.
        head_dim: width of an entry, its last rope_dim columns rotary.
        rope_dim: see head_dim.
        indexer_head_dim: width of an indexer key, 0 without.
        entries_per_block: entries that one block of the pool holds.
        projections: 2 where a token has rows of its own for the current block (a) and for the next one (b), as in the
            models' CSA layers; 1 where one row serves both.
        page_layout: name of the layout of the pool's pages; "split" is the one of PagedCache.

    Raises:
        InvalidArgumentError: a size that no layer has.
    """

    attention: AttentionType
    m: int
    head_dim: int = 512
    rope_dim: int = 64
    indexer_head_dim: int = 128
    entries_per_block: int = 64
    projections: int = 1
    page_layout: str = "split"

    def __post_init__(self) -> None:
        kind = isinstance(self.attention, AttentionType)
        self._require("attention", kind, f"an AttentionType, got {self.attention!r}")
        for name in ("m", "head_dim", "rope_dim", "indexer_head_dim", "entries_per_block", "projections"):
            integer("LayerCacheSchema", name, getattr(self, name), 0)
        self._require("m", self.m >= (self.attention is not AttentionType.SWA), f"at least 1, got {self.m}")
        self._require("head_dim", self.head_dim > 0 and self.head_dim % 4 == 0, f"a multiple of 4, got {self.head_dim}")
        self._require(
            "rope_dim",
            0 <= self.rope_dim <= self.head_dim and self.rope_dim % 4 == 0,
            f"a multiple of 4 up to head_dim {self.head_dim}, got {self.rope_dim}",
        )
        self._require(
            "indexer_head_dim",
            self.indexer_head_dim >= 0 and self.indexer_head_dim % 16 == 0,
            f"a multiple of 16, got {self.indexer_head_dim}",
        )
        self._require("entries_per_block", self.entries_per_block > 0, f"at least 1, got {self.entries_per_block}")
        known = self.page_layout in list(PAGE_LAYOUTS)  # a list: also for what cannot be hashed
        self._require("page_layout", known, f"{' or '.join(PAGE_LAYOUTS)}, got {self.page_layout!r}")
        csa = self.attention is AttentionType.CSA
        self._require("projections", self.projections in ((1, 2) if csa else (1,)), f"1, or 2 for CSA: {self!r}")

    def _require(self, name: str, holds: bool, need: str) -> None:
        if not holds:
            raise InvalidArgumentError(f"LayerCacheSchema: {name}: expected {need}")

    @classmethod
    def swa(cls) -> LayerCacheSchema:
        """A layer without compressed entries."""
        return cls(AttentionType.SWA, 0, indexer_head_dim=0)

    @classmethod
    def csa(cls, m: int = 4, *, projections: int = 2, entries_per_block: int = 64) -> LayerCacheSchema:
        """The models' sparse layers: entries overlap by a block, and each has an indexer key."""
        return cls(AttentionType.CSA, m, entries_per_block=entries_per_block, projections=projections)

    @classmethod
    def hca(cls, m: int = 128, *, entries_per_block: int = 64) -> LayerCacheSchema:
        """The models' heavily compressed layers: one entry for m tokens, no indexer key."""
        return cls(AttentionType.HCA, m, indexer_head_dim=0, entries_per_block=entries_per_block)

    @classmethod
    def of_layer(cls, preset: Preset, layer: int, *, entries_per_block: int = 64) -> LayerCacheSchema:
        """A layer of a public model, by its compress ratio. A ratio of 4 overlaps blocks, any other does not.

        Args:
            preset: the model.
            layer: 0 to preset.layers - 1 for a layer; preset.layers + n for block n of multi-token prediction.
            entries_per_block: entries that one block of the pool holds.

        Raises:
            InvalidArgumentError: the model has no such layer.
        """
        blocks = len(preset.compress_ratios) - preset.layers
        known = f"layer (of {preset.name}: {preset.layers} layers, then {blocks} blocks of multi-token prediction)"
        layer = integer("LayerCacheSchema.of_layer", known, layer, 0, len(preset.compress_ratios) - 1)
        ratio = preset.compress_ratios[layer]
        if ratio == 0:
            return cls.swa()
        if ratio == 4:
            return cls.csa(ratio, entries_per_block=entries_per_block)
        return cls.hca(ratio, entries_per_block=entries_per_block)

    @property
    def entry_head_dim(self) -> int:
        """head_dim under its other name."""
        return self.head_dim

    @property
    def width(self) -> int:
        """Columns of a tail buffer's row: entry and indexer key side by side."""
        return self.head_dim + self.indexer_head_dim

    @property
    def tail_buffer_size_a(self) -> int:
        """Rows of the current block that a request keeps."""
        return self.m

    @property
    def tail_buffer_size_b(self) -> int:
        """Rows of the block before that a request keeps."""
        return self.m if self.attention is AttentionType.CSA else 0

    @property
    def tail_buffer_size_next_b(self) -> int:
        """Rows of the current block that a request keeps for the entry after: those of the second projection."""
        return self.tail_buffer_size_b if self.projections == 2 else 0

    def entries(self, tokens: int) -> int:
        """Entries that a request of that many tokens has."""
        tokens = integer("LayerCacheSchema.entries", "tokens", tokens, 0)
        return tokens // self.m if self.m else 0

    def blocks(self, tokens: int) -> int:
        """Blocks that those entries take."""
        return -(-self.entries(tokens) // self.entries_per_block)
