"""A small engine around compress_flush that remembers every row of every request, so that the oracle can say what its
pages must hold.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from dsv4_kernels.cache import compress_flush

from tests.cache import compress_oracle as oracle
from tests.cache.compress_oracle import FORMATS, Array

POISON = 0xA5


@dataclass
class Request:
    """One sequence: its place in the state and its rows so far, the biased scores."""

    slot: int
    kv: Array
    score: Array
    pages: list[int] = field(default_factory=list)
    length: int = 0
    state_pages: list[int] = field(default_factory=list)


@dataclass
class Engine:
    """Keeps state, pages and history for requests that share one compressor.

    norm_dtype: of the norm's weight. starts_dtype: of query_starts.
    """

    layout: str
    ratio: int
    overlap: bool
    device: str = "cpu"
    slots: int = 4
    state_rows: int = 16
    state_columns: int = 1
    entries_per_page: int = 4
    page_count: int = 64
    positions: int = 4096
    seed: int = 0
    dtype: torch.dtype = torch.float32
    norm_dtype: torch.dtype = torch.float32
    starts_dtype: torch.dtype = torch.int32
    by_slot_mapping: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)
        form = FORMATS[self.layout]
        self.width = form.head_dim * (2 if self.overlap else 1)
        self.ape = self.normal(self.ratio, self.width)
        norm_weight = torch.from_numpy(1 + 0.1 * self.normal(form.head_dim)).to(self.norm_dtype)
        self.weight = norm_weight.to(torch.float32).numpy()
        angle = np.arange(self.positions)[:, None] * 0.7 ** np.arange(32)
        self.cos_sin = np.concatenate((np.cos(angle), np.sin(angle)), axis=1).astype(np.float32)
        # What is never written must not matter, and must stay.
        state = np.full((self.slots * self.state_columns, self.state_rows, 2, self.width), np.nan, np.float32)
        self.state = self.to_device(state)
        self.parts, self.tensors = pool(form, self.layout, self.page_count, self.entries_per_page, self.device)
        self.pages = self.parts[0]
        self.expected = [part.cpu().numpy().copy() for part in self.parts]
        self.free_pages = list(range(self.page_count))
        self.constants = [self.to_device(self.ape), norm_weight.to(self.device), self.to_device(self.cos_sin)]

    def normal(self, *shape: int) -> Array:
        return self.random.standard_normal(shape).astype(np.float32)

    def to_device(self, array: Array) -> torch.Tensor:
        return torch.from_numpy(array.copy()).to(self.device)

    def request(self, slot: int) -> Request:
        empty = np.zeros((0, self.width), np.float32)
        first = slot * self.state_columns
        return Request(slot, empty, empty, state_pages=list(range(first, first + self.state_columns)))

    def step(
        self,
        growth: list[tuple[Request, int]],
        rows: tuple[Array, Array] | None = None,
        padding: int = 0,
        check: bool = True,
    ) -> None:
        """Each request brings so many tokens, at the positions from its length on; rows: their kv and score, random
        ones by default. padding: tokens at the end that belong to no request."""
        counts = [count for _, count in growth]
        tokens = sum(counts) + padding
        kv, score = rows if rows is not None else (self.normal(tokens, self.width), 3 * self.normal(tokens, self.width))
        kv_tensor, score_tensor = (torch.from_numpy(a).to(self.dtype) for a in (kv, score))
        kv, score = (t.to(torch.float32).numpy() for t in (kv_tensor, score_tensor))
        starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
        for (request, count), first in zip(growth, starts[:-1], strict=True):
            self._remember(request, kv[first : first + count], score[first : first + count])
        table = self._table(growth)
        slot_mapping = self._slot_mapping(growth, tokens) if self.by_slot_mapping else None
        ape, weight, cos_sin = self.constants
        compress_flush(
            kv_tensor.to(self.device),
            score_tensor.to(self.device),
            ape,
            self.to_device(starts).to(self.starts_dtype),
            self.to_device(np.array([r.length - n for r, n in growth], np.int32 if self.seed % 2 else np.int64)),
            self.state,
            self.to_device(np.array([r.state_pages for r, _ in growth], np.int32).reshape(-1, self.state_columns)),
            weight,
            cos_sin,
            self.tensors[0],
            None if slot_mapping is not None else self.to_device(table),
            self.to_device(slot_mapping) if slot_mapping is not None else None,
            ratio=self.ratio,
            overlap=self.overlap,
            layout=self.layout,
            entries_per_page=self.entries_per_page,
            **dict(zip(("scales", "rope"), self.tensors[1:], strict=False)),
            **self.options,
        )
        self._expect(growth)
        if check:
            self.check()

    def roll_back(self, request: Request, tokens: int) -> None:
        """Takes the last tokens back, as after a rejected draft."""
        request.length -= tokens
        request.kv, request.score = request.kv[: request.length], request.score[: request.length]

    def leave(self, request: Request) -> None:
        self.free_pages += request.pages
        request.pages = []

    def _remember(self, request: Request, kv: Array, score: Array) -> None:
        position = np.arange(request.length, request.length + len(kv))
        request.kv = np.concatenate((request.kv, kv))
        request.score = np.concatenate((request.score, score + self.ape[position % self.ratio]))
        request.length += len(kv)
        needed = -(-(request.length // self.ratio) // self.entries_per_page)
        while len(request.pages) < needed:
            request.pages.append(self.free_pages.pop(0))

    def _table(self, growth: list[tuple[Request, int]]) -> Array:
        columns = max((len(r.pages) for r, _ in growth), default=0) + 1
        table = np.full((len(growth), columns), -1, np.int32)
        for row, (request, _) in zip(table, growth, strict=True):
            row[: len(request.pages)] = request.pages
        return table

    def slot_of(self, request: Request, block: int) -> int:
        return request.pages[block // self.entries_per_page] * self.entries_per_page + block % self.entries_per_page

    def _slot_mapping(self, growth: list[tuple[Request, int]], tokens: int) -> Array:
        mapping: list[int] = []
        for request, count in growth:
            for position in range(request.length - count, request.length):
                completes = (position + 1) % self.ratio == 0
                mapping.append(self.slot_of(request, position // self.ratio) if completes else -1)
        return np.array(mapping + [-1] * (tokens - len(mapping)), np.int64)

    def blocks_of(self, request: Request, count: int) -> range:
        """Blocks that the last `count` tokens complete."""
        return range((request.length - count) // self.ratio, request.length // self.ratio)

    def entries(self, growth: list[tuple[Request, int]]) -> tuple[list[int], Array, Array]:
        """Slots and, by the oracle, channels before quantisation of the entries that these tokens complete; and the
        channels, before they are rotated, that rows without signs would give: what cancels keeps their error.
        """
        head_dim = FORMATS[self.layout].head_dim
        slots, values, scores, first = [], [], [], []
        for request, count in growth:
            for block in self.blocks_of(request, count):
                own = slice(block * self.ratio, (block + 1) * self.ratio)
                rows = [(request.kv[own, -head_dim:], request.score[own, -head_dim:])]
                if self.overlap and block:
                    before = slice(own.start - self.ratio, own.start)
                    rows.insert(0, (request.kv[before, :head_dim], request.score[before, :head_dim]))
                elif self.overlap:
                    rows.insert(0, (0 * rows[0][0], np.full_like(rows[0][1], -np.inf)))
                slots.append(self.slot_of(request, block))
                values.append(np.concatenate([v for v, _ in rows]))
                scores.append(np.concatenate([z for _, z in rows]))
                first.append(own.start)
        if not slots:
            return [], np.zeros((0, head_dim), np.float32), np.zeros((0, head_dim))
        compressed = oracle.compress(np.stack(values), np.stack(scores))
        names = ("epsilon", "hadamard", "round_once")
        options = {"epsilon": 1e-6, "hadamard": False, "round_once": False}
        options |= {name: value for name, value in self.options.items() if name in names}
        channels = oracle.finish(compressed, self.weight, self.cos_sin[first], **options)
        norm = np.sqrt((compressed**2).mean(axis=1, keepdims=True) + options["epsilon"])
        return slots, channels, oracle.compress(np.abs(np.stack(values)), np.stack(scores)) / norm * np.abs(self.weight)

    def _expect(self, growth: list[tuple[Request, int]]) -> None:
        """Compares new entries with the oracle's, and from then on expects to the byte what the kernel wrote."""
        slots, channels, signless = self.entries(growth)
        if not slots:
            return
        got = self.read_bf16(slots)
        # The kernel sums in float32 and rounds to bfloat16 up to four times: a few values land on the other side, by a
        # step of each of the values that they were made of, of which the norm may make two. What is left where rows
        # cancel keeps their error, of which 2^-20 of their size is allowed: about four of float32's.
        made_of = np.abs(channels) + 2.0**-14 * signless
        pairs = made_of[:, -oracle.ROPE :].reshape(len(channels), -1, 2)
        made_of[:, -oracle.ROPE :] = np.linalg.norm(pairs, axis=2).repeat(2, axis=1)
        if self.options.get("hadamard"):
            made_of[:] = made_of.max(axis=1, keepdims=True)
        assert (np.abs(got - channels) <= 2.0**-6 * made_of).all()
        # One value that lies within float32's error of the middle between two bfloat16 moves the norm by 2^-9 of its
        # share, and with it the rounding of up to a dozen others of its entry.
        differ = (got != channels).mean()
        assert differ <= 0.02 + 16 / got.size or self.options.get("hadamard"), differ
        values, scales = oracle.encode(got, self.layout)
        for slot, value, scale in zip(slots, values, scales, strict=True):
            oracle.write(self.expected, slot, self.entries_per_page, self.layout, value, scale)

    def read_bf16(self, slots: list[int]) -> Array:
        """Channels of entries of a layout that does not quantise."""
        row = FORMATS[self.layout].row
        pages, place = np.array(slots) // self.entries_per_page, np.array(slots) % self.entries_per_page
        columns = place[:, None] * row + np.arange(row)
        read = self.pages[torch.from_numpy(pages[:, None]).to(self.device), torch.from_numpy(columns).to(self.device)]
        return read.cpu().numpy().view(oracle.BF16).astype(np.float32)

    def check(self) -> None:
        """Every byte of every page."""
        for part, expected in zip(self.parts, self.expected, strict=True):
            assert np.array_equal(part.cpu().numpy(), expected)


def pool(
    form: oracle.Format, layout: str, page_count: int, entries_per_page: int, device: str
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Poisoned tensors of a pool: as bytes [pages, bytes], and as ops take them, of the same memory."""

    def poisoned(size: int) -> torch.Tensor:
        return torch.full((page_count, size), POISON, dtype=torch.uint8, device=device)

    if not form.separate:
        pages = poisoned(oracle.page_bytes(layout, entries_per_page))
        return [pages], [pages]
    scale_type = torch.float32 if form.scale == "float32" else torch.float8_e4m3fn
    dtypes = (torch.float8_e4m3fn if form.element is oracle.E4M3 else torch.uint8, scale_type, torch.bfloat16)
    parts, tensors = [], []
    for shape, dtype in zip(form.shapes, dtypes, strict=False):
        size = torch.empty(0, dtype=dtype).element_size()
        parts.append(poisoned(entries_per_page * int(np.prod(shape, dtype=int)) * size))
        tensors.append(parts[-1].view(dtype).view(page_count, entries_per_page, *shape))
    return parts, tensors
