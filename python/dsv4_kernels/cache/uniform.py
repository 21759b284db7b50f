"""UniformCache: compressed entries of a batch whose sequences have one length, and what is pending for the next."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv4_kernels.cache.compress_flush import compress_flush, unpack_entries
from dsv4_kernels.cache.page_layouts import PAGE_LAYOUTS
from dsv4_kernels.errors import InvalidArgumentError
from dsv4_kernels.host_values import integer

__all__ = ["UniformCache"]

ENTRIES_PER_PAGE = 64


class UniformCache:
    """State and entries of one compressor, for callers without pages of their own.

        cache = UniformCache(batch, capacity=4096, ratio=4, layout="bf16", device="cuda")
        entries = cache.feed(kv, score, ape, norm_weight, cos_sin)        # a prompt, or a token, of each sequence

    Each sequence has its own pages and its own state, and all have been fed the same number of tokens. A feed is one
    launch of compress_flush and one that counts. `positions` count on the device, so that a graph captured of a feed
    goes on at every replay: `rows` is then what to read, of which positions // ratio are there. `length` and `count`
    are those of the calls, on the host.

    Args:
        batch: sequences.
        capacity: tokens of each, at most. More: reserve().
        ratio: tokens per entry: 1, 2, 4 or 128.
        layout: one of PAGE_LAYOUTS that has all in pages.
        overlap: whether rows have two streams; default for ratio 4, as in the models.
        retained: tokens that resume() may take back, of rejected drafts.
        device: where it lives.
    """

    def __init__(
        self,
        batch: int,
        capacity: int,
        ratio: int,
        layout: str = "bf16",
        *,
        overlap: bool | None = None,
        retained: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        known = [name for name, one in PAGE_LAYOUTS.items() if not one.separate]
        if layout not in known:
            raise InvalidArgumentError(f"UniformCache: layout: expected {' or '.join(known)}, got {layout!r}")
        batch = integer("UniformCache", "batch", batch, 0)
        self.ratio = integer("UniformCache", "ratio", ratio, 1)
        self.layout, self.overlap = PAGE_LAYOUTS[layout], ratio == 4 if overlap is None else overlap
        self.length = 0
        window = ratio * (2 if self.overlap else 1)
        width = self.layout.head_dim * (2 if self.overlap else 1)
        retained = integer("UniformCache", "retained", retained, 0)
        held = 0 if ratio == 1 else batch
        self.state = torch.zeros(held, window + retained, 2, width, dtype=torch.float32, device=device)
        self.state_table = torch.arange(batch, dtype=torch.int32, device=device).unsqueeze(1)
        self.positions = torch.zeros(batch, dtype=torch.int64, device=device)
        self._retained = retained
        self._allocate(integer("UniformCache", "capacity", capacity, 0))

    def _allocate(self, capacity: int) -> None:
        self.capacity = capacity
        batch, device = self.positions.shape[0], self.positions.device
        columns = -(-(capacity // self.ratio) // ENTRIES_PER_PAGE)
        self.pages = torch.zeros(
            batch * columns, self.layout.page_bytes(ENTRIES_PER_PAGE), dtype=torch.uint8, device=device
        )
        self.block_table = torch.arange(batch * columns, dtype=torch.int32, device=device).view(batch, columns)

    @property
    def batch(self) -> int:
        """Sequences."""
        return self.positions.shape[0]

    @property
    def count(self) -> int:
        """Entries of each sequence."""
        return self.length // self.ratio

    @property
    def rows(self) -> Tensor:
        """All entries that there is room for, [batch, capacity // ratio, head_dim]; those not there yet hold anything.

        In bfloat16 layouts a view of the pages, else float32, unpacked by one launch.
        """
        places = self.block_table.shape[1] * ENTRIES_PER_PAGE
        if self.layout.groups == 0:
            rows = self.pages.view(torch.bfloat16)
            return rows.view(self.batch, places, self.layout.head_dim)[:, : self.capacity // self.ratio]
        slots = torch.arange(self.batch * places, dtype=torch.int64, device=self.pages.device)
        unpacked = unpack_entries(self.pages, slots, self.layout.name, ENTRIES_PER_PAGE)
        return unpacked.view(self.batch, places, -1)[:, : self.capacity // self.ratio]

    @property
    def entries(self) -> Tensor:
        """[batch, count, head_dim]: those of `rows` that are there."""
        return self.rows[:, : self.count]

    def feed(
        self,
        kv: Tensor,
        score: Tensor | None,
        ape: Tensor | None,
        norm_weight: Tensor,
        cos_sin: Tensor,
        **options: Any,
    ) -> Tensor:
        """The next tokens of each sequence.

        Args:
            kv: [batch, tokens, width] float32 or bfloat16, width head_dim or, with overlap, twice that.
            score: like kv; None for ratio 1.
            ape: [ratio, width] float32, or None.
            norm_weight: [head_dim] float32.
            cos_sin: [positions, 64] float32, see rope_table; of capacity positions at least.
            options: compress_flush's: hadamard, round_once, epsilon and those of quantisation.

        Returns:
            `entries`, those of earlier calls among them.

        Raises:
            InvalidArgumentError: more tokens than there is room for, or other sequences; nothing has changed.
        """
        batch, tokens, width = kv.shape
        if batch != self.batch:
            raise InvalidArgumentError(f"UniformCache.feed: kv: expected {self.batch} sequences, got {batch}")
        end = self.length + tokens
        if end > self.capacity:
            raise InvalidArgumentError(
                f"UniformCache.feed: kv: expected at most {self.capacity} tokens in all, got {end}; reserve({end})"
            )
        if end // self.ratio and (end // self.ratio - 1) * self.ratio >= cos_sin.shape[0]:
            raise InvalidArgumentError(
                f"UniformCache.feed: cos_sin: expected the position of each entry, below {end}, got "
                f"{cos_sin.shape[0]} positions"
            )
        compress_flush(
            kv.reshape(batch * tokens, width),
            None if score is None else score.reshape(batch * tokens, width),
            ape,
            torch.arange(0, (batch + 1) * tokens, tokens, dtype=torch.int32, device=kv.device)
            if tokens
            else self.state_table.new_zeros(batch + 1),
            self.positions,
            self.state,
            self.state_table,
            norm_weight,
            cos_sin,
            self.pages,
            self.block_table,
            ratio=self.ratio,
            overlap=self.overlap,
            layout=self.layout.name,
            entries_per_page=ENTRIES_PER_PAGE,
            **options,
        )
        self.positions += tokens
        self.length = end
        return self.entries

    def reserve(self, capacity: int) -> None:
        """Room for more tokens of each sequence. What there is moves: graphs that were captured keep the old memory."""
        capacity = integer("UniformCache.reserve", "capacity", capacity, 0)
        if capacity <= self.capacity:
            return
        pages, table = self.pages, self.block_table
        self._allocate(capacity)
        self.pages[self.block_table[:, : table.shape[1]].flatten().to(torch.int64)] = pages

    def resume(self, length: int) -> None:
        """Goes on behind `length` tokens: 0 starts anew; a little less than were fed takes back rejected drafts.

        Raises:
            InvalidArgumentError: a length whose rows are gone.
        """
        length = integer("UniformCache.resume", "length", length, 0, self.length)
        if length and self.length - length > self._retained:
            raise InvalidArgumentError(
                f"UniformCache.resume: length: expected 0 or at least {self.length - self._retained} "
                f"(retained={self._retained} of {self.length}), got {length}"
            )
        self.length = length
        self.positions.fill_(length)

    def reorder(self, index: Tensor) -> None:
        """Sequence i becomes a copy of what sequence index[i] was, as beam search needs it. index: [batch] integers."""
        index = index.to(self.pages.device)
        self.pages.copy_(self.pages.unflatten(0, self.block_table.shape)[index].flatten(0, 1))
        if self.state.shape[0]:
            self.state.copy_(self.state[index])
