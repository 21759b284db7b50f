"""compress_flush in plain torch: the CPU implementation, in float64 up to the norm."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4_kernels.cache.page_layouts import LAYOUTS_BY_INDEX, Pages, Quantization
from dsv4_kernels.cpu.cache.page_codec import read_entries, write_entries
from dsv4_kernels.cpu.cache.pooling import pooled

ROPE_DIM = 64
INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class Tokens:
    """Of each token of a call that belongs to a request: its index, request, position; and the request's extent.

    first, start: index and position of the request's first token in the call. end: position after its last one.
    """

    index: Tensor
    request: Tensor
    position: Tensor
    first: Tensor
    start: Tensor
    end: Tensor

    def select(self, chosen: Tensor) -> Tokens:
        """Those that a mask marks."""
        return Tokens(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))


def tokens_of(count: int, query_starts: Tensor, start_positions: Tensor) -> Tokens:
    """The tokens of a call that belong to a request."""
    requests = start_positions.shape[0]
    index = torch.arange(count, device=query_starts.device)
    starts = query_starts.to(torch.int64)
    request = torch.searchsorted(starts[1:], index, right=True).clamp(max=max(requests - 1, 0))
    if not requests:
        index, request = index[:0], request[:0]
    first, end = starts[request], starts[request + 1].clamp(max=count)
    start = start_positions.to(torch.int64)[request]
    valid = (first >= 0) & (index >= first) & (index < end) & (start >= 0) & (start + count <= INT32_MAX)
    all_tokens = Tokens(index, request, start + index - first, first, start, start + end - first)
    return all_tokens.select(valid)


@dataclass(frozen=True)
class State:
    """The rows of earlier calls, as [pages * rows, 2, width], and the table that finds them."""

    rows: Tensor
    table: Tensor
    rows_per_page: int

    @classmethod
    def of(cls, state: Tensor, table: Tensor) -> State:
        return cls(state.flatten(0, 1), table.to(torch.int64), state.shape[1])

    @property
    def capacity(self) -> int:
        """Positions until a place comes again."""
        return self.rows_per_page * int(self.table.shape[1])

    def places(self, request: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Indices of rows, and whether there is such a row."""
        position = position.clamp(min=0)
        page = self.table[request, position // self.rows_per_page % self.table.shape[1]]
        valid = (page >= 0) & (page < self.rows.shape[0] // self.rows_per_page)
        return torch.where(valid, page * self.rows_per_page + position % self.rows_per_page, 0), valid


def window_rows(
    kv: Tensor, score: Tensor, state: State, last: Tokens, ratio: int, overlap: bool, head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of the blocks that the tokens `last` complete: kv and score [entries, window, head_dim], and whether all
    of an entry's rows were there. Rows before position 0 have score -inf.
    """
    window = 2 * ratio if overlap else ratio
    row = torch.arange(window, device=kv.device)
    position = last.position[:, None] + 1 - window + row
    brought, exists = position >= last.start[:, None], position >= 0
    token = torch.where(brought, last.first[:, None] + position - last.start[:, None], 0)
    place, valid = state.places(last.request[:, None], position)
    column = (
        torch.arange(head_dim, device=kv.device) + torch.where(row >= ratio, head_dim if overlap else 0, 0)[:, None]
    )

    def rows(brought_rows: Tensor, which: int) -> Tensor:
        values = brought_rows[token[..., None], column]
        if state.rows.shape[0]:
            earlier = state.rows[place[..., None], which, column]
            values = torch.where((brought | ~exists)[..., None], values, earlier)
        return values

    masked = torch.where(exists[..., None], rows(score, 1), -torch.inf)
    return torch.where(exists[..., None], rows(kv, 0), 0.0), masked, (brought | ~exists | valid).all(dim=1)


def hadamard(values: Tensor) -> Tensor:
    """Each row's Hadamard transform times 128^-1/2, in float32: a butterfly for each bit of the channel, the lowest
    first, as the kernel adds.
    """
    channels = values.shape[1]
    stride = 1
    while stride < channels:
        pairs = values.unflatten(1, (-1, 2, stride))
        values = torch.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), dim=2).flatten(1)
        stride *= 2
    return values * torch.tensor(channels, dtype=torch.float64, device="cpu").rsqrt().to(torch.float32)


def rotate(values: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotates neighbouring pairs of the last 64 channels, in float32, each product rounded."""
    even, odd = values[:, -ROPE_DIM::2], values[:, -ROPE_DIM + 1 :: 2]
    cosine, sine = cos_sin[:, : ROPE_DIM // 2], cos_sin[:, ROPE_DIM // 2 :]
    rotated = torch.stack((even * cosine - odd * sine, odd * cosine + even * sine), dim=2).flatten(1)
    return torch.cat((values[:, :-ROPE_DIM], rotated), dim=1)


def finished(
    entries: Tensor, norm_weight: Tensor, cos_sin: Tensor, use_hadamard: bool, round_once: bool, epsilon: float
) -> Tensor:
    """From compressed channels [entries, d] to what is quantised: float32 that are bfloat16 numbers."""

    def step(values: Tensor) -> Tensor:
        return values if round_once else values.to(torch.bfloat16).to(values.dtype)

    entries = step(entries)
    mean = entries.square().mean(dim=1, keepdim=True)
    normed = step((entries * (mean + epsilon).rsqrt() * norm_weight.to(entries.dtype)).to(torch.float32))
    rotated = rotate(normed, cos_sin)
    if use_hadamard:
        rotated = hadamard(step(rotated))
    return rotated.to(torch.bfloat16).to(torch.float32)


def finished_entries(
    kv: Tensor,
    score: Tensor | None,
    ape: Tensor | None,
    query_starts: Tensor,
    start_positions: Tensor,
    state: Tensor,
    state_table: Tensor,
    norm_weight: Tensor,
    cos_sin: Tensor,
    pages: Pages,
    block_table: Tensor | None,
    slot_mapping: Tensor | None,
    ratio: int,
    overlap: bool,
    use_hadamard: bool,
    round_once: bool,
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    """The entries that a call writes: slots, counted over all pages, and channels before quantisation. Then stores the
    call's rows to the state.
    """
    kv = kv.to(torch.float32)
    score = torch.zeros_like(kv) if score is None else score.to(torch.float32)
    tokens = tokens_of(kv.shape[0], query_starts, start_positions)
    if ape is not None:
        score = score.index_add(0, tokens.index, ape[tokens.position % ratio])
    rows = State.of(state, state_table)

    last = tokens.select((tokens.position + 1) % ratio == 0)
    block = last.position // ratio
    if block_table is None:
        assert slot_mapping is not None
        slots = slot_mapping.to(torch.int64)[last.index]
    else:
        column = block // pages.entries_per_page
        inside = column < block_table.shape[1]
        page = torch.full_like(block, -1)
        page[inside] = block_table.to(torch.int64)[last.request[inside], column[inside]]
        slots = torch.where(page < 0, -1, page * pages.entries_per_page + block % pages.entries_per_page)
    written = (slots >= 0) & (slots < pages.count) & (block * ratio < cos_sin.shape[0])
    last, slots, block = last.select(written), slots[written], block[written]
    values, scores, complete = window_rows(kv, score, rows, last, ratio, overlap, pages.layout.head_dim)
    entries = pooled(values[complete], scores[complete])
    positions = block[complete] * ratio
    channels = finished(entries, norm_weight, cos_sin[positions], use_hadamard, round_once, epsilon)

    kept = tokens.select(tokens.position + rows.capacity >= tokens.end)
    place, valid = rows.places(kept.request, kept.position)
    state.flatten(0, 1)[place[valid]] = torch.stack((kv[kept.index], score[kept.index]), dim=1)[valid]
    return slots[complete], channels


def compress_flush(
    kv: Tensor,
    score: Tensor | None,
    ape: Tensor | None,
    query_starts: Tensor,
    start_positions: Tensor,
    state: Tensor,
    state_table: Tensor,
    norm_weight: Tensor,
    cos_sin: Tensor,
    pages: Tensor,
    block_table: Tensor | None,
    slot_mapping: Tensor | None,
    ratio: int,
    overlap: bool,
    layout: int,
    entries_per_page: int,
    scales: Tensor | None,
    rope: Tensor | None,
    hadamard: bool,
    round_once: bool,
    epsilon: float,
    amax_floor: float,
    scale_floor: float,
    fp4_ties_toward_zero: bool,
    exact_scale: bool,
) -> None:
    pool = Pages(pages, scales, rope, LAYOUTS_BY_INDEX[layout], entries_per_page)
    slots, channels = finished_entries(
        kv,
        score,
        ape,
        query_starts,
        start_positions,
        state,
        state_table,
        norm_weight,
        cos_sin,
        pool,
        block_table,
        slot_mapping,
        ratio,
        overlap,
        hadamard,
        round_once,
        epsilon,
    )
    quantization = Quantization(amax_floor, scale_floor, fp4_ties_toward_zero, exact_scale)
    write_entries(pool, slots, channels, quantization)


def unpack_entries(
    pages: Tensor,
    slots: Tensor,
    layout: int,
    entries_per_page: int,
    scales: Tensor | None,
    rope: Tensor | None,
    out: Tensor,
) -> None:
    pool, slots = Pages(pages, scales, rope, LAYOUTS_BY_INDEX[layout], entries_per_page), slots.to(torch.int64)
    inside = (slots >= 0) & (slots < pool.count)
    out.fill_(torch.nan)
    out[inside] = read_entries(pool, slots[inside]).to(out.dtype)
