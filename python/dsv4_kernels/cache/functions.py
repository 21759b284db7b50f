"""The ops of the tail-counting cache state.

Shared rules: request_slots says which slot of the state each request of the batch owns; a slot outside the state is
padding, which has no effect; the slots of one call are distinct. What happens to a request is decided on the device,
so a call captured in a CUDA graph is right for every replay. Nothing is synchronised. Arguments that an op cannot take
raise InvalidArgumentError.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_kernels import _native
from dsv4_kernels.op import InOut, op, output

__all__ = [
    "append",
    "csa_compress_tail",
    "csa_rotate_state",
    "flush_write_csa",
    "flush_write_hca",
    "hca_compress_tail",
    "hca_reset_state",
]


@op(_native.append)
def append(
    kv: Tensor,
    z: Tensor,
    request_slots: Tensor,
    positions: Tensor,
    tail_ka: InOut,
    tail_za: InOut,
    tail_len: InOut,
    slot_positions: InOut,
    m: int,
    next_kb: InOut | None = None,
    next_zb: InOut | None = None,
    token_offsets: Tensor | None = None,
    indexer_kv: Tensor | None = None,
    indexer_z: Tensor | None = None,
    ape: Tensor | None = None,
    indexer_ape: Tensor | None = None,
    round: int = 0,
) -> None:
    """Puts rows of new tokens into the tail buffers, in place.

    Token p of a request is row p mod m of block p div m. A call takes the tokens of one block of each request, that of
    the request's first token plus round; for up to n tokens per request, append and flush are repeated for
    round 0 to (n + m - 2) // m. Where a request has tokens in the round, tail_len of its slot becomes the number of
    rows that its block then holds, and slot_positions the position after the last of them. What is written follows
    from positions alone, so a call may be repeated, and rejected draft tokens of the current block are simply
    overwritten; going back beyond a block that was flushed is for compress_flush.

    Args:
        kv: [tokens, head_dim] float32, or [tokens, 2 * head_dim] with two projections: first the columns for the next
            block's entry (b), then those for the current one (a). Rows may be strided; 16-byte aligned.
        z: like kv, the scores.
        request_slots: [requests] int32.
        positions: [requests] int64, position of each request's first token of the call; negative for none.
        tail_ka: [slots, rows >= m, width] float32 to change; width a multiple of 4, of which head_dim are the entry's.
        tail_za: like tail_ka, the scores.
        tail_len: [slots] int32 to change.
        slot_positions: [slots] int64 to change.
        m: tokens per block.
        next_kb: like tail_ka, for the b columns, with two projections.
        next_zb: like next_kb, the scores.
        token_offsets: [requests + 1] int32, ascending: request r brings tokens [token_offsets[r],
            token_offsets[r + 1]) of kv. None: one token per request, in order. Tokens beyond are skipped.
        indexer_kv: [tokens, width - head_dim], or twice as many columns with two projections; where width exceeds
            head_dim.
        indexer_z: like indexer_kv, the scores.
        ape: [m, columns of kv] float32, position bias that is added to z.
        indexer_ape: [m, columns of indexer_kv] float32, added to indexer_z.
        round: which block of each request to take.
    """


@op(_native.csa_compress_tail)
def _csa_compress_tail(
    tail_ka: Tensor,
    tail_za: Tensor,
    tail_kb: Tensor,
    tail_zb: Tensor,
    tail_len: Tensor,
    request_slots: Tensor,
    m: int,
    indexer_head_dim: int = 128,
    *,
    out_entry: Tensor | None = None,
    out_indexer_key: Tensor | None = None,
    out_valid_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """csa_compress_tail, with the mask."""
    requests = request_slots.shape[0]
    return (
        output(out_entry, tail_ka, (requests, tail_ka.shape[2] - indexer_head_dim), torch.bfloat16),
        output(out_indexer_key, tail_ka, (requests, indexer_head_dim), torch.bfloat16),
        output(out_valid_mask, tail_ka, (requests,), torch.bool),
    )


def csa_compress_tail(
    tail_ka: Tensor,
    tail_za: Tensor,
    tail_kb: Tensor,
    tail_zb: Tensor,
    tail_len: Tensor,
    request_slots: Tensor,
    m: int,
    indexer_head_dim: int = 128,
    *,
    out_entry: Tensor | None = None,
    out_indexer_key: Tensor | None = None,
    out_valid_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The entry and the indexer key of each request whose tail is full: tail_len >= m.

        entry[c] = sum over 2m rows of softmax(z[:, c]) * k[:, c]

    in float32: the b rows of the block before, then the a rows of the current one. Rows of entry and indexer key lie
    side by side in the tail buffers, and the softmax is per column, so one pass gives both. Source: equations 11, 12
    and 20 to 23 of the DeepSeek-V4 report; class Compressor of the models' published inference code.

    Args:
        tail_ka: [slots, rows >= m, width] float32, values of the current block; width a multiple of 4.
        tail_za: like tail_ka, scores of the current block.
        tail_kb: like tail_ka, values of the block before; 0 for the first block.
        tail_zb: like tail_ka, scores of the block before; -inf for the first block. Where all scores of a column are
            -inf the result is 0.
        tail_len: [slots] int32, rows that the current block holds.
        request_slots: [requests] int32.
        m: tokens per block.
        indexer_head_dim: how many of the last columns are the indexer key; 0 for none.
        out_entry: [requests, width - indexer_head_dim] bfloat16 to write to.
        out_indexer_key: [requests, indexer_head_dim] bfloat16 to write to.
        out_valid_mask: [requests] bool to write to: whose tail was full.

    Returns:
        entry, indexer_key. Rows of requests whose tail is not full are not written where a tensor is given. In an
        allocated one they are 0, which takes a launch more; with out_valid_mask, which tells them apart, they are left
        undefined.
    """
    entry, indexer_key, valid_mask = _csa_compress_tail(
        tail_ka,
        tail_za,
        tail_kb,
        tail_zb,
        tail_len,
        request_slots,
        m,
        indexer_head_dim,
        out_entry=out_entry,
        out_indexer_key=out_indexer_key,
        out_valid_mask=out_valid_mask,
    )
    if out_valid_mask is None:
        if out_entry is None:
            entry = _defined(entry, valid_mask)
        if out_indexer_key is None:
            indexer_key = _defined(indexer_key, valid_mask)
    return entry, indexer_key


@op(_native.hca_compress_tail)
def _hca_compress_tail(
    tail_ka: Tensor,
    tail_za: Tensor,
    tail_len: Tensor,
    request_slots: Tensor,
    m: int,
    *,
    out_entry: Tensor | None = None,
    out_valid_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """hca_compress_tail, with the mask."""
    requests = request_slots.shape[0]
    entry = output(out_entry, tail_ka, (requests, tail_ka.shape[2]), torch.bfloat16)
    return entry, output(out_valid_mask, tail_ka, (requests,), torch.bool)


def hca_compress_tail(
    tail_ka: Tensor,
    tail_za: Tensor,
    tail_len: Tensor,
    request_slots: Tensor,
    m: int,
    *,
    out_entry: Tensor | None = None,
    out_valid_mask: Tensor | None = None,
) -> Tensor:
    """The entry of each request whose tail is full: tail_len >= m.

        entry[c] = sum over m rows of softmax(tail_za[:, c]) * tail_ka[:, c]

    in float32. Source: class Compressor of the models' published inference code, without overlap.

    Args:
        tail_ka: [slots, rows >= m, width] float32, values of the current block; width a multiple of 4.
        tail_za: like tail_ka, the scores. Where all scores of a column are -inf the result is 0.
        tail_len: [slots] int32, rows that the current block holds.
        request_slots: [requests] int32.
        m: tokens per block.
        out_entry: [requests, width] bfloat16 to write to.
        out_valid_mask: [requests] bool to write to: whose tail was full.

    Returns:
        entry. Rows of requests whose tail is not full are not written where out_entry is given. In an allocated tensor
        they are 0, which takes a launch more; with out_valid_mask, which tells them apart, they are left undefined.
    """
    entry, valid_mask = _hca_compress_tail(
        tail_ka, tail_za, tail_len, request_slots, m, out_entry=out_entry, out_valid_mask=out_valid_mask
    )
    return _defined(entry, valid_mask) if out_entry is None and out_valid_mask is None else entry


def _defined(rows: Tensor, valid_mask: Tensor) -> Tensor:
    """The rows that were written, and zeros for the others."""
    return rows.where(valid_mask[:, None], 0.0)


@op(_native.flush_write_csa)
def flush_write_csa(
    entry: Tensor,
    indexer_key: Tensor,
    valid_mask: Tensor,
    request_slots: Tensor,
    slot_positions: Tensor,
    block_table: Tensor,
    entries_fp8: InOut,
    entries_rope: InOut,
    inv_scale: InOut,
    indexer_keys_fp4: InOut,
    indexer_scale: InOut,
    m: int,
) -> None:
    """Quantises entries and indexer keys, and writes them to the pool in the split layout, in place.

    For each request whose valid_mask is true. Its entry has the number i = (slot_positions[slot] - 1) div m, and lives
    in slot i mod entries_per_block of block block_table[request, i div entries_per_block]. A block that is not in the
    table or not in the pool (-1) is not written.

        inv_scale = max(amax(values) / 448, 2^-126)     entries_fp8 = e4m3(values / inv_scale)     values without rope
        indexer_scale = e4m3(amax(16 values) / 6)       indexer_keys_fp4 = e2m1(values / indexer_scale)

    in float32, to nearest with ties to even, saturated: a value is its code times its scale. A group of zeros has codes
    and scale 0. A group that holds a NaN has a scale of NaN; its codes are E4M3's NaN, or 6 in E2M1, which has none.

    Args:
        entry: [requests, head_dim] bfloat16, head_dim a multiple of 4, at most 1024; the last rope_dim columns rotary.
        indexer_key: [requests, indexer_head_dim] bfloat16, indexer_head_dim a multiple of 16.
        valid_mask: [requests] bool.
        request_slots: [requests] int32.
        slot_positions: [slots] int64, position after the last token of each slot's tail.
        block_table: [requests, any] int32, the blocks of each request in order; rows may be strided.
        entries_fp8: [blocks, entries_per_block, head_dim - rope_dim] float8_e4m3fn or uint8 to change.
        entries_rope: [blocks, entries_per_block, rope_dim] bfloat16 to change; a copy of the rotary columns.
        inv_scale: [blocks, entries_per_block] float32 to change.
        indexer_keys_fp4: [blocks, entries_per_block, indexer_head_dim / 2] uint8 or float4_e2m1fn_x2 to change, the
            even element in the low nibble.
        indexer_scale: [blocks, entries_per_block, indexer_head_dim / 16] float8_e4m3fn or uint8 to change.
        m: tokens a block of the sequence.
    """


@op(_native.flush_write_hca)
def flush_write_hca(
    entry: Tensor,
    valid_mask: Tensor,
    request_slots: Tensor,
    slot_positions: Tensor,
    block_table: Tensor,
    entries_fp8: InOut,
    entries_rope: InOut,
    inv_scale: InOut,
    m: int,
) -> None:
    """Quantises entries and writes them to the pool in the split layout, in place: flush_write_csa without the indexer.

    Args:
        entry: [requests, head_dim] bfloat16, head_dim a multiple of 4, at most 1024; the last rope_dim columns rotary.
        valid_mask: [requests] bool.
        request_slots: [requests] int32.
        slot_positions: [slots] int64, position after the last token of each slot's tail.
        block_table: [requests, any] int32, the blocks of each request in order; rows may be strided.
        entries_fp8: [blocks, entries_per_block, head_dim - rope_dim] float8_e4m3fn or uint8 to change.
        entries_rope: [blocks, entries_per_block, rope_dim] bfloat16 to change.
        inv_scale: [blocks, entries_per_block] float32 to change.
        m: tokens a block of the sequence.
    """


@op(_native.csa_rotate_state)
def csa_rotate_state(
    valid_mask: Tensor,
    request_slots: Tensor,
    tail_ka: InOut,
    tail_za: InOut,
    tail_kb: InOut,
    tail_zb: InOut,
    tail_len: InOut,
    next_kb: InOut | None = None,
    next_zb: InOut | None = None,
    clear_rows: bool = True,
) -> None:
    """Makes the current block of each request whose valid_mask is true the block before, in place, after a CSA flush.

    The models project a token twice: what the next entry needs of this block are its b rows. With next_kb and next_zb
    they become tail_kb and tail_zb. Without, one projection serves both streams, and tail_ka and tail_za do: what the
    system's description calls the rotation. tail_len becomes 0.

    Args:
        valid_mask: [requests] bool.
        request_slots: [requests] int32.
        tail_ka: [slots, rows, width] float32 to change; width a multiple of 4.
        tail_za: like tail_ka.
        tail_kb: like tail_ka.
        tail_zb: like tail_ka.
        tail_len: [slots] int32 to change.
        next_kb: like tail_ka, the b rows of the current block, with two projections.
        next_zb: like next_kb, their scores.
        clear_rows: sets the rows of the current block to 0. Nothing reads them before append writes them, so False
            changes no entry and saves the time.
    """


@op(_native.hca_reset_state)
def hca_reset_state(
    valid_mask: Tensor,
    request_slots: Tensor,
    tail_ka: InOut,
    tail_za: InOut,
    tail_len: InOut,
    clear_rows: bool = True,
) -> None:
    """Empties the tail of each request whose valid_mask is true, in place, after an HCA flush: tail_len becomes 0.

    Args:
        valid_mask: [requests] bool.
        request_slots: [requests] int32.
        tail_ka: [slots, rows, width] float32 to change; width a multiple of 4.
        tail_za: like tail_ka.
        tail_len: [slots] int32 to change.
        clear_rows: sets the rows to 0. Nothing reads them before append writes them, so False changes no entry and
            saves the time: 512 KiB a request of the models.
    """
