"""What the cache's ops compute, as their documentation has it: what results are checked against.

Request by request and token by token, sums in float64, codes by comparison with tables of every value. Shares no code
with the CPU implementation.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dsv4_kernels.cache.page_layouts import PageLayout, Quantization
from dsv4_kernels.cases import code_tables

LARGEST_E4M3, LARGEST_E2M1 = 448.0, 6.0
ROPE_DIM = 64


def pooled(values: Tensor, scores: Tensor) -> Tensor:
    """sum softmax(scores) * values over the rows [entries, rows, channels], in float64; 0 where all scores are -inf."""
    weights = torch.softmax(scores.to(torch.float64), dim=1).nan_to_num(nan=0.0)
    return (weights * values.to(torch.float64)).sum(dim=1)


def full_tails(tail_len: Tensor, request_slots: Tensor, m: int) -> Tensor:
    """[requests] bool: whose slot is one of the state's and holds m rows."""
    slots = request_slots.tolist()
    return torch.tensor(
        [0 <= slot < len(tail_len) and int(tail_len[slot]) >= m for slot in slots], dtype=torch.bool, device="cpu"
    )


def append(
    kv: Tensor, z: Tensor, request_slots: Tensor, positions: Tensor, tail_ka: Tensor, tail_za: Tensor,
    tail_len: Tensor, slot_positions: Tensor, m: int, next_kb: Tensor | None, next_zb: Tensor | None,
    token_offsets: Tensor | None, indexer_kv: Tensor | None, indexer_z: Tensor | None, ape: Tensor | None,
    indexer_ape: Tensor | None, round: int,
) -> None:  # fmt: skip
    """Changes the state in place, as append does."""

    def halves(main: Tensor, indexer: Tensor | None) -> list[Tensor]:
        """A token's row of each stream, (b, a) or (a): its columns of the entry, then those of the indexer key."""
        streams = 1 if next_kb is None else 2
        parts = [main.chunk(streams)] if indexer is None else [main.chunk(streams), indexer.chunk(streams)]
        return [torch.cat(columns) for columns in zip(*parts, strict=True)]

    for request, slot in enumerate(request_slots.tolist()):
        start = int(positions[request])
        offsets = (request, request + 1) if token_offsets is None else token_offsets[request : request + 2].tolist()
        if not 0 <= slot < len(tail_ka) or start < 0:
            continue
        for token in range(*offsets):
            position = start + token - offsets[0]
            row = position % m
            if position // m != start // m + round:
                continue
            score = z[token] if ape is None else z[token] + ape[row]
            of_indexer = None if indexer_z is None else indexer_z[token]
            if of_indexer is not None and indexer_ape is not None:
                of_indexer = of_indexer + indexer_ape[row]
            values = halves(kv[token], None if indexer_kv is None else indexer_kv[token])
            scores = halves(score, of_indexer)
            tail_ka[slot, row], tail_za[slot, row] = values[-1], scores[-1]
            if next_kb is not None and next_zb is not None:
                next_kb[slot, row], next_zb[slot, row] = values[0], scores[0]
            tail_len[slot], slot_positions[slot] = row + 1, position + 1


def bytes_of(tensor: Tensor) -> Tensor:
    """The same memory as bytes."""
    return tensor.view(torch.uint8)


def flush_write_hca(
    entry: Tensor, valid_mask: Tensor, request_slots: Tensor, slot_positions: Tensor, block_table: Tensor,
    entries_fp8: Tensor, entries_rope: Tensor, inv_scale: Tensor, m: int,
) -> None:  # fmt: skip
    """Changes the pools in place, as flush_write_hca does."""
    blocks, per_block, stored = entries_fp8.shape
    where = (valid_mask, request_slots, slot_positions, block_table, blocks, per_block, m)
    for request, block, place in pool_places(*where):
        values = entry[request, :stored].to(torch.float32)
        largest = values.abs().amax() if stored else values.new_tensor(0.0)
        scale = (largest / LARGEST_E4M3).clamp(min=2.0**-126)
        bytes_of(entries_fp8)[block, place] = code_tables.nearest(values / scale, code_tables.E4M3)
        entries_rope[block, place] = entry[request, stored:]
        inv_scale[block, place] = scale


def flush_write_csa(
    entry: Tensor, indexer_key: Tensor, valid_mask: Tensor, request_slots: Tensor, slot_positions: Tensor,
    block_table: Tensor, entries_fp8: Tensor, entries_rope: Tensor, inv_scale: Tensor, indexer_keys_fp4: Tensor,
    indexer_scale: Tensor, m: int,
) -> None:  # fmt: skip
    """Changes the pools in place, as flush_write_csa does."""
    where = (valid_mask, request_slots, slot_positions, block_table)
    flush_write_hca(entry, *where, entries_fp8, entries_rope, inv_scale, m)
    blocks, per_block, _ = entries_fp8.shape
    for request, block, place in pool_places(*where, blocks, per_block, m):
        groups = indexer_key[request].to(torch.float32).reshape(-1, 16)
        codes = code_tables.nearest(groups.abs().amax(dim=1) / LARGEST_E2M1, code_tables.E4M3)
        scale = code_tables.decode_e4m3(codes).to(torch.float32)[:, None]
        values = torch.where(scale == 0, torch.zeros_like(groups), groups / scale).flatten()
        nibbles = torch.where(
            (scale == 0).expand_as(groups).flatten(), 0, code_tables.nearest(values, code_tables.E2M1)
        )
        bytes_of(indexer_keys_fp4)[block, place] = code_tables.pack(nibbles.to(torch.uint8))
        bytes_of(indexer_scale)[block, place] = codes


def pool_places(
    valid_mask: Tensor, request_slots: Tensor, slot_positions: Tensor, block_table: Tensor, blocks: int,
    per_block: int, m: int,
) -> Iterator[tuple[int, int, int]]:  # fmt: skip
    """(request, block of the pool, place in it) of each entry that is written."""
    for request, slot in enumerate(request_slots.tolist()):
        if not bool(valid_mask[request]) or not 0 <= slot < len(slot_positions) or int(slot_positions[slot]) < 1:
            continue
        column, place = divmod((int(slot_positions[slot]) - 1) // m, per_block)
        if column < block_table.shape[1] and 0 <= int(block_table[request, column]) < blocks:
            yield request, int(block_table[request, column]), place


def csa_rotate_state(
    valid_mask: Tensor, request_slots: Tensor, tail_ka: Tensor, tail_za: Tensor, tail_kb: Tensor, tail_zb: Tensor,
    tail_len: Tensor, next_kb: Tensor | None, next_zb: Tensor | None, clear_rows: bool,
) -> None:  # fmt: skip
    """Changes the state in place, as csa_rotate_state does."""
    for valid, slot in zip(valid_mask.tolist(), request_slots.tolist(), strict=True):
        if not valid or not 0 <= slot < len(tail_len):
            continue
        tail_kb[slot] = (tail_ka if next_kb is None else next_kb)[slot]
        tail_zb[slot] = (tail_za if next_zb is None else next_zb)[slot]
        tail_len[slot] = 0
        for rows in (tail_ka, tail_za, next_kb, next_zb):
            if rows is not None and clear_rows:
                rows[slot] = 0.0


def hca_reset_state(
    valid_mask: Tensor, request_slots: Tensor, tail_ka: Tensor, tail_za: Tensor, tail_len: Tensor, clear_rows: bool
) -> None:
    """Changes the state in place, as hca_reset_state does."""
    for valid, slot in zip(valid_mask.tolist(), request_slots.tolist(), strict=True):
        if not valid or not 0 <= slot < len(tail_len):
            continue
        tail_len[slot] = 0
        if clear_rows:
            tail_ka[slot], tail_za[slot] = 0.0, 0.0


# Entries in pages.


class Pool(NamedTuple):
    """What ops are given of a pool: pages, and of separate layouts scales and rope."""

    pages: Tensor
    scales: Tensor | None
    rope: Tensor | None
    layout: PageLayout
    entries_per_page: int

    def entry(self, slot: int) -> list[Tensor]:
        """Views of the bytes of an entry: its quantised values, what stays bfloat16, its scales."""
        page, place = divmod(slot, self.entries_per_page)
        layout = self.layout
        if layout.separate:
            parts = [bytes_of(part)[page, place] for part in (self.pages, self.rope) if part is not None]
            rest = parts[1] if len(parts) > 1 else parts[0][:0]
            assert self.scales is not None
            scales = bytes_of(self.scales[page]).reshape(self.entries_per_page, -1)[place]
            return [parts[0], rest, scales]
        row = self.pages[page]
        values = row[place * layout.value_bytes :][: layout.value_bytes]
        scales = row[self.entries_per_page * layout.value_bytes + place * layout.scale_bytes :]
        quantized = layout.quantized_dims // (1 if layout.element == "float8_e4m3fn" else 2)
        return [
            values[:quantized],
            values[quantized:],
            scales[: layout.groups * (4 if layout.scale == "float32" else 1)],
        ]

    @property
    def slots(self) -> int:
        """Entries of all pages."""
        return len(self.pages) * self.entries_per_page


def decode_scales(scales: Tensor, layout: PageLayout) -> Tensor:
    """[..., bytes of an entry's scales] to [..., groups] float64."""
    if layout.scale == "float32":
        return scales.contiguous().view(torch.float32).to(torch.float64)
    return (code_tables.decode_e8m0 if layout.scale == "float8_e8m0fnu" else code_tables.decode_e4m3)(scales)


def decode_entries(quantized: Tensor, rest: Tensor, scales: Tensor, layout: PageLayout) -> Tensor:
    """[entries, d] float64 of the bytes of entries: value times scale, then the channels in bfloat16."""
    channels = [rest.contiguous().view(torch.bfloat16).to(torch.float64)] if rest.shape[1] else []
    if layout.groups:
        decode = code_tables.decode_e4m3 if layout.element == "float8_e4m3fn" else code_tables.decode_e2m1
        factors = decode_scales(scales, layout).repeat_interleave(layout.group, dim=1)
        channels.insert(0, decode(quantized) * factors)
    return torch.cat(channels, dim=1)


def scales_of(channels: Tensor, layout: PageLayout, quantization: Quantization) -> Tensor:
    """[entries, bytes of scales]: of each group, from bfloat16 numbers [entries, d]. Quotients are float32."""
    if not layout.groups:
        return torch.empty(len(channels), 0, dtype=torch.uint8, device="cpu")
    groups = channels[:, : layout.quantized_dims].to(torch.float32).reshape(len(channels), layout.groups, layout.group)
    largest = LARGEST_E4M3 if layout.element == "float8_e4m3fn" else LARGEST_E2M1
    amax = groups.abs().amax(dim=2).clamp(min=quantization.amax_floor)
    wanted = (amax / amax.new_tensor(largest)).clamp(min=quantization.scale_floor)
    if layout.scale == "float8_e4m3fn":
        return code_tables.nearest(wanted, code_tables.E4M3)
    if layout.scale == "float8_e8m0fnu":
        return code_tables.least_power(wanted)
    power = code_tables.decode_e8m0(code_tables.least_power(wanted)).to(torch.float32)
    return bytes_of((wanted if quantization.exact_scale else power).contiguous())


def encode_entries(
    channels: Tensor, scales: Tensor, layout: PageLayout, quantization: Quantization
) -> tuple[Tensor, Tensor]:
    """The bytes of quantised values and of the rest, from bfloat16 numbers [entries, d] under given scales."""
    rest = bytes_of(channels[:, layout.quantized_dims :].to(torch.bfloat16).contiguous())
    if not layout.groups:
        return torch.empty(len(channels), 0, dtype=torch.uint8, device="cpu"), rest
    scale = decode_scales(scales, layout).to(torch.float32).repeat_interleave(layout.group, dim=1)
    scaled = channels[:, : layout.quantized_dims].to(torch.float32) / scale
    scaled = torch.where(scale == 0, torch.zeros_like(scaled), scaled)
    if layout.element == "float8_e4m3fn":
        return code_tables.nearest(scaled, code_tables.E4M3), rest
    to_even = not quantization.fp4_ties_toward_zero
    return code_tables.pack(code_tables.nearest(scaled, code_tables.E2M1, to_even)), rest


# compress_flush.


def tokens_of(kv: Tensor, query_starts: Tensor, start_positions: Tensor) -> Iterator[tuple[int, int, int, int]]:
    """(request, its first token's index, index after its last one, its first position) of those that take part."""
    for request, start in enumerate(start_positions.tolist()):
        first, end = query_starts[request : request + 2].tolist()
        if start >= 0 and first < end:
            yield request, first, min(end, len(kv)), start


def compressed(
    kv: Tensor, score: Tensor | None, ape: Tensor | None, query_starts: Tensor, start_positions: Tensor,
    state: Tensor, state_table: Tensor, norm_weight: Tensor, cos_sin: Tensor, pool: Pool, block_table: Tensor | None,
    slot_mapping: Tensor | None, ratio: int, overlap: bool, use_hadamard: bool, round_once: bool, epsilon: float,
) -> tuple[list[int], Tensor]:  # fmt: skip
    """The slots of the entries that a call completes and their channels [entries, d] in float64, before the rounding to
    bfloat16 that goes before quantisation. Stores the call's rows to the state.
    """
    head_dim, rows, columns = pool.layout.head_dim, state.shape[1], state_table.shape[1]
    window = 2 * ratio if overlap else ratio
    kv = kv.to(torch.float32)
    scores = torch.zeros_like(kv) if score is None else score.to(torch.float32).clone()
    requests = list(tokens_of(kv, query_starts, start_positions))
    if ape is not None:
        for _, first, end, start in requests:
            for token in range(first, end):
                scores[token] += ape[(start + token - first) % ratio]

    def row_of(request: int, first: int, start: int, position: int) -> tuple[Tensor, Tensor]:
        """kv and score of a position, of this call or an earlier one."""
        if position >= start:
            return kv[first + position - start], scores[first + position - start]
        page = int(state_table[request, position // rows % columns])
        return state[page, position % rows, 0], state[page, position % rows, 1]

    slots: list[int] = []
    entries, angles = [], []
    for request, first, end, start in requests:
        for token in range(first, end):
            block, phase = divmod(start + token - first, ratio)
            if phase != ratio - 1:
                continue
            if slot_mapping is None:
                assert block_table is not None
                column, place = divmod(block, pool.entries_per_page)
                page = int(block_table[request, column]) if column < block_table.shape[1] else -1
                slot = page * pool.entries_per_page + place if page >= 0 else -1
            else:
                slot = int(slot_mapping[token])
            if not 0 <= slot < pool.slots or block * ratio >= len(cos_sin):
                continue
            parts = []
            for row in range(window):
                position = (block + 1) * ratio - window + row
                if position >= 0:
                    left = head_dim if overlap and row >= ratio else 0
                    row_parts = row_of(request, first, start, position)
                    parts.append(torch.stack([part[left : left + head_dim] for part in row_parts]))
            gathered = torch.stack(parts, dim=1)
            slots.append(slot)
            entries.append(pooled(gathered[:1], gathered[1:])[0])
            angles.append(cos_sin[block * ratio])
    for request, first, end, start in requests:
        for token in range(first, end):
            position = start + token - first
            page = int(state_table[request, position // rows % columns]) if rows else -1
            if start + end - first <= position + rows * columns and 0 <= page < len(state):
                state[page, position % rows] = torch.stack((kv[token], scores[token]))
    if not slots:
        return slots, torch.empty(0, head_dim, dtype=torch.float64, device="cpu")
    finish = (norm_weight.to(torch.float64), torch.stack(angles).to(torch.float64), use_hadamard, round_once, epsilon)
    return slots, finished(torch.stack(entries), *finish)


def finished(
    entries: Tensor, norm_weight: Tensor, cos_sin: Tensor, use_hadamard: bool, round_once: bool, epsilon: float
) -> Tensor:
    """Norm, rotation and, if asked for, the Hadamard transform, in float64, rounded to bfloat16 between them."""

    def step(values: Tensor) -> Tensor:
        return values if round_once else values.to(torch.bfloat16).to(torch.float64)

    values = step(entries)
    values = step(values / (values.square().mean(dim=1, keepdim=True) + epsilon).sqrt() * norm_weight)
    pairs = values[:, -ROPE_DIM:].reshape(len(values), -1, 2)
    turned = torch.complex(pairs[..., 0], pairs[..., 1]) * torch.complex(*cos_sin.chunk(2, dim=1))
    values = torch.cat((values[:, :-ROPE_DIM], torch.view_as_real(turned).flatten(1)), dim=1)
    if not use_hadamard:
        return values
    index = range(values.shape[1])
    signs = [[(-1.0) ** bin(i & j).count("1") for j in index] for i in index]
    transformed: Tensor = step(values) @ torch.tensor(signs, dtype=torch.float64, device="cpu") / values.shape[1] ** 0.5
    return transformed
