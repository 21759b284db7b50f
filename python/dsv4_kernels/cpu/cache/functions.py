"""The compressed cache in plain torch: the CPU implementation. Each function writes to its last arguments, or to the
state that it changes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_kernels import number_formats
from dsv4_kernels.cpu.cache.pooling import pooled

NVFP4_GROUP = 16
LEAST_SCALE = 2.0**-126  # so that an entry of zeros divides by something


def inside_state(request_slots: Tensor, slots: int) -> Tensor:
    """[requests] bool, whose slot is one of the state's."""
    return (request_slots >= 0) & (request_slots < slots)


def full_requests(tail_len: Tensor, request_slots: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """[requests] bool, whose tail is full; and the slots of those."""
    inside = inside_state(request_slots, tail_len.shape[0])
    slots = request_slots.to(torch.int64).clamp(0, max(tail_len.shape[0] - 1, 0))
    if not tail_len.shape[0]:
        return torch.zeros_like(inside), slots[:0]
    full = inside & (tail_len[slots] >= m)
    return full, slots[full]


def csa_compress_tail(
    tail_ka: Tensor,
    tail_za: Tensor,
    tail_kb: Tensor,
    tail_zb: Tensor,
    tail_len: Tensor,
    request_slots: Tensor,
    m: int,
    indexer_head_dim: int,
    out_entry: Tensor,
    out_indexer_key: Tensor,
    out_valid_mask: Tensor,
) -> None:
    full, slots = full_requests(tail_len, request_slots, m)
    values = torch.cat((tail_kb[slots, :m], tail_ka[slots, :m]), dim=1)
    scores = torch.cat((tail_zb[slots, :m], tail_za[slots, :m]), dim=1)
    rows = pooled(values, scores)
    head_dim = out_entry.shape[1]
    out_entry[full] = rows[:, :head_dim].to(out_entry.dtype)
    out_indexer_key[full] = rows[:, head_dim:].to(out_indexer_key.dtype)
    out_valid_mask.copy_(full)


def hca_compress_tail(
    tail_ka: Tensor,
    tail_za: Tensor,
    tail_len: Tensor,
    request_slots: Tensor,
    m: int,
    out_entry: Tensor,
    out_valid_mask: Tensor,
) -> None:
    full, slots = full_requests(tail_len, request_slots, m)
    out_entry[full] = pooled(tail_ka[slots, :m], tail_za[slots, :m]).to(out_entry.dtype)
    out_valid_mask.copy_(full)


def tokens_of_round(
    tokens: int,
    request_slots: Tensor,
    positions: Tensor,
    token_offsets: Tensor | None,
    slots: int,
    m: int,
    round: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each token that the round takes: its number in the batch, its slot, its position."""
    token = torch.arange(tokens, device="cpu")
    requests = request_slots.shape[0]
    if token_offsets is None:
        request, first = token, token
    else:
        request = torch.searchsorted(token_offsets.to(torch.int64), token, right=True) - 1
        first = token_offsets.to(torch.int64)[request.clamp(0)]
    known = (request >= 0) & (request < requests)
    token, request, first = token[known], request[known], first[known]
    start = positions[request]
    position = start + token - first
    taken = (start >= 0) & inside_state(request_slots, slots)[request] & (position // m == start // m + round)
    return token[taken], request_slots[request[taken]].to(torch.int64), position[taken]


def append(
    kv: Tensor,
    z: Tensor,
    request_slots: Tensor,
    positions: Tensor,
    tail_ka: Tensor,
    tail_za: Tensor,
    tail_len: Tensor,
    slot_positions: Tensor,
    m: int,
    next_kb: Tensor | None,
    next_zb: Tensor | None,
    token_offsets: Tensor | None,
    indexer_kv: Tensor | None,
    indexer_z: Tensor | None,
    ape: Tensor | None,
    indexer_ape: Tensor | None,
    round: int,
) -> None:
    slots = tail_ka.shape[0]
    token, slot, position = tokens_of_round(kv.shape[0], request_slots, positions, token_offsets, slots, m, round)
    row = position % m
    streams = 1 if next_kb is None else 2

    def parts(main: Tensor, indexer: Tensor | None, bias: Tensor | None, indexer_bias: Tensor | None) -> list[Tensor]:
        """The rows of each stream."""
        columns = main[token] if bias is None else main[token] + bias[row]
        streams_of = columns.chunk(streams, dim=1)
        if indexer is None:
            return list(streams_of)
        columns = indexer[token] if indexer_bias is None else indexer[token] + indexer_bias[row]
        return [torch.cat(pair, dim=1) for pair in zip(streams_of, columns.chunk(streams, dim=1), strict=True)]

    values, scores = parts(kv, indexer_kv, None, None), parts(z, indexer_z, ape, indexer_ape)
    tail_ka[slot, row], tail_za[slot, row] = values[-1], scores[-1]
    if next_kb is not None and next_zb is not None:
        next_kb[slot, row], next_zb[slot, row] = values[0], scores[0]
    # The last of a slot's tokens counts: positions ascend within a request.
    last = torch.full_like(slot_positions, -1).scatter_reduce(0, slot, position, "amax")
    taken = last >= 0
    tail_len[taken] = (last[taken] % m + 1).to(tail_len.dtype)
    slot_positions[taken] = last[taken] + 1


def pool_rows(
    valid_mask: Tensor,
    request_slots: Tensor,
    slot_positions: Tensor,
    block_table: Tensor,
    blocks: int,
    entries_per_block: int,
    m: int,
) -> tuple[Tensor, Tensor]:
    """Requests whose entry has a place in the pool, and its row there, with all blocks end to end."""
    written = valid_mask & inside_state(request_slots, slot_positions.shape[0])
    request = written.nonzero()[:, 0]
    position = slot_positions[request_slots[request].to(torch.int64)]
    entry = (position - 1).clamp(0) // m
    column = entry // entries_per_block
    known = (position >= 1) & (column < block_table.shape[1])
    request, entry, column = request[known], entry[known], column[known]
    block = block_table[request, column].to(torch.int64)
    in_pool = (block >= 0) & (block < blocks)
    row = block * entries_per_block + entry % entries_per_block
    return request[in_pool], row[in_pool]


def quantize_entry(values: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 codes of float32 rows, and the scale of each row."""
    scale = (number_formats.largest_magnitude(values) / number_formats.LARGEST_E4M3).clamp(min=LEAST_SCALE)
    return number_formats.encode_e4m3(values / scale[..., None]), scale


def quantize_indexer_key(values: Tensor) -> tuple[Tensor, Tensor]:
    """Packed E2M1 codes of float32 rows, and the E4M3 codes of the scales of each 16."""
    groups = values.unflatten(-1, (-1, NVFP4_GROUP))
    scale_codes = number_formats.encode_e4m3(number_formats.largest_magnitude(groups) / number_formats.LARGEST_E2M1)
    scale = number_formats.decode_e4m3(scale_codes)[..., None]
    codes = number_formats.encode_e2m1(groups / scale)
    codes = torch.where(scale == 0, torch.zeros_like(codes), codes)
    return number_formats.pack_e2m1(codes.flatten(-2)), scale_codes


def as_rows(pool: Tensor) -> Tensor:
    """The pool's entries end to end, as bytes where the elements are bytes."""
    rows = pool.flatten(0, 1)
    return rows.view(torch.uint8) if rows.element_size() == 1 else rows


def flush_write_hca(
    entry: Tensor,
    valid_mask: Tensor,
    request_slots: Tensor,
    slot_positions: Tensor,
    block_table: Tensor,
    entries_fp8: Tensor,
    entries_rope: Tensor,
    inv_scale: Tensor,
    m: int,
) -> None:
    blocks, entries_per_block, stored = entries_fp8.shape
    if not entries_per_block:
        return
    request, row = pool_rows(valid_mask, request_slots, slot_positions, block_table, blocks, entries_per_block, m)
    if stored:
        codes, scale = quantize_entry(entry[request, :stored].to(torch.float32))
    else:
        codes, scale = (
            torch.empty(len(request), 0, dtype=torch.uint8, device="cpu"),
            torch.full((len(request),), LEAST_SCALE, dtype=torch.float32, device="cpu"),
        )
    as_rows(entries_fp8)[row] = codes
    as_rows(entries_rope)[row] = entry[request, stored:]
    inv_scale.flatten()[row] = scale


def flush_write_csa(
    entry: Tensor,
    indexer_key: Tensor,
    valid_mask: Tensor,
    request_slots: Tensor,
    slot_positions: Tensor,
    block_table: Tensor,
    entries_fp8: Tensor,
    entries_rope: Tensor,
    inv_scale: Tensor,
    indexer_keys_fp4: Tensor,
    indexer_scale: Tensor,
    m: int,
) -> None:
    where = (valid_mask, request_slots, slot_positions, block_table)
    flush_write_hca(entry, *where, entries_fp8, entries_rope, inv_scale, m)
    blocks, entries_per_block, _ = entries_fp8.shape
    if not entries_per_block:
        return
    request, row = pool_rows(*where, blocks, entries_per_block, m)
    codes, scale_codes = quantize_indexer_key(indexer_key[request].to(torch.float32))
    as_rows(indexer_keys_fp4)[row] = codes
    as_rows(indexer_scale)[row] = scale_codes


def csa_rotate_state(
    valid_mask: Tensor,
    request_slots: Tensor,
    tail_ka: Tensor,
    tail_za: Tensor,
    tail_kb: Tensor,
    tail_zb: Tensor,
    tail_len: Tensor,
    next_kb: Tensor | None,
    next_zb: Tensor | None,
    clear_rows: bool,
) -> None:
    slots = request_slots[valid_mask & inside_state(request_slots, tail_len.shape[0])].to(torch.int64)
    tail_kb[slots] = (tail_ka if next_kb is None else next_kb)[slots]
    tail_zb[slots] = (tail_za if next_zb is None else next_zb)[slots]
    tail_len[slots] = 0
    if clear_rows:
        for rows in (tail_ka, tail_za, next_kb, next_zb):
            if rows is not None:
                rows[slots] = 0.0


def hca_reset_state(
    valid_mask: Tensor,
    request_slots: Tensor,
    tail_ka: Tensor,
    tail_za: Tensor,
    tail_len: Tensor,
    clear_rows: bool,
) -> None:
    slots = request_slots[valid_mask & inside_state(request_slots, tail_len.shape[0])].to(torch.int64)
    tail_len[slots] = 0
    if clear_rows:
        tail_ka[slots] = 0.0
        tail_za[slots] = 0.0
