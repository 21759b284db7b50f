"""Baselines of the cache's ops: the same work in plain torch, and how results are checked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dsv4_kernels import number_formats
from dsv4_kernels.cases import FLOAT32_ULP, Baseline, Verdict, conversions, fresh, is_poison, named, same_bits, to_cpu
from dsv4_kernels.cases.cache import definitions
from dsv4_kernels.ops import OPS

# A pooled column is a few dozen float32 operations: whatever plain torch loses, this much is always allowed, relative
# to the sum of the weighted magnitudes.
POOLED_LIMIT = 16 * FLOAT32_ULP


def bfloat16_error(got: Tensor, exact: Tensor, magnitude: Tensor) -> float:
    """How much further from exact than rounding to bfloat16 explains, relative to the magnitude that was summed."""
    if not got.numel():
        return 0.0
    got = got.to(torch.float64)
    half_ulp = torch.maximum(got.abs(), exact.abs()).clamp(min=2.0**-126).log2().floor().exp2() * 2.0**-8
    excess = ((got - exact).abs() - half_ulp).clamp(min=0) / magnitude.clamp(min=2.0**-126)
    return float(torch.where(got.isnan() & exact.isnan(), 0.0, excess).max())


def check_csa_compress_tail(
    arguments: tuple[Any, ...], results: tuple[Tensor, ...], baseline: tuple[Tensor, ...]
) -> Verdict:
    """Rows against float64; rows of tails that are not full must still be poisoned."""
    ka, za, kb, zb, tail_len, request_slots, m, _ = to_cpu(arguments)
    full = definitions.full_tails(tail_len, request_slots, m)
    slots = request_slots[full].to(torch.int64)
    if not same_bits(results[2], full):
        return Verdict(float("inf"), 0.0, "valid mask")
    touched = sum(int((~is_poison(rows[~full])).sum()) for rows in results[:2])
    if touched:
        return Verdict(float(touched), 0.0, "elements written for a tail that is not full")
    values = torch.cat((kb[slots, :m], ka[slots, :m]), dim=1)
    scores = torch.cat((zb[slots, :m], za[slots, :m]), dim=1)
    exact, magnitude = definitions.pooled(values, scores), definitions.pooled(values.abs(), scores)

    def error(rows: tuple[Tensor, ...]) -> float:
        return bfloat16_error(torch.cat((rows[0][full], rows[1][full]), dim=1), exact, magnitude)

    return Verdict(error(results), max(2 * error(baseline), POOLED_LIMIT), "entry, beyond rounding to bfloat16")


def baseline_csa_compress_tail(
    tail_ka: Tensor,
    tail_za: Tensor,
    tail_kb: Tensor,
    tail_zb: Tensor,
    tail_len: Tensor,
    request_slots: Tensor,
    m: int,
    indexer_head_dim: int,
) -> tuple[Tensor, ...]:
    """As an engine would write it: every request, full or not, and no check of the slots."""
    scores = torch.cat((tail_zb[request_slots, :m], tail_za[request_slots, :m]), dim=1)
    values = torch.cat((tail_kb[request_slots, :m], tail_ka[request_slots, :m]), dim=1)
    rows = (scores.softmax(dim=1) * values).sum(dim=1).to(torch.bfloat16)
    head_dim = rows.shape[1] - indexer_head_dim
    return rows[:, :head_dim], rows[:, head_dim:], tail_len[request_slots] >= m


def csa_compress_tail_bytes(*arguments: Any) -> int:
    given = named("csa_compress_tail", arguments)
    entries = int(definitions.full_tails(given.tail_len, given.request_slots, given.m).sum())
    return entries * (4 * int(given.m) * 4 + 2) * int(given.tail_ka.shape[2]) + 9 * int(given.request_slots.shape[0])


def check_hca_compress_tail(
    arguments: tuple[Any, ...], results: tuple[Tensor, ...], baseline: tuple[Tensor, ...]
) -> Verdict:
    """As for CSA, with one stream."""
    ka, za, tail_len, request_slots, m = to_cpu(arguments)
    full = definitions.full_tails(tail_len, request_slots, m)
    slots = request_slots[full].to(torch.int64)
    if not same_bits(results[1], full):
        return Verdict(float("inf"), 0.0, "valid mask")
    touched = int((~is_poison(results[0][~full])).sum())
    if touched:
        return Verdict(float(touched), 0.0, "elements written for a tail that is not full")
    values, scores = ka[slots, :m], za[slots, :m]
    exact, magnitude = definitions.pooled(values, scores), definitions.pooled(values.abs(), scores)
    error, of_baseline = (bfloat16_error(rows[0][full], exact, magnitude) for rows in (results, baseline))
    return Verdict(error, max(2 * of_baseline, POOLED_LIMIT), "entry, beyond rounding to bfloat16")


def baseline_hca_compress_tail(
    tail_ka: Tensor, tail_za: Tensor, tail_len: Tensor, request_slots: Tensor, m: int
) -> tuple[Tensor, ...]:
    rows = (tail_za[request_slots, :m].softmax(dim=1) * tail_ka[request_slots, :m]).sum(dim=1)
    return rows.to(torch.bfloat16), tail_len[request_slots] >= m


def hca_compress_tail_bytes(tail_ka: Tensor, tail_za: Tensor, tail_len: Tensor, request_slots: Tensor, m: int) -> int:
    full = definitions.full_tails(tail_len, request_slots, m)
    return int(full.sum()) * (2 * m * 4 + 2) * tail_ka.shape[2] + 9 * int(request_slots.shape[0])


def check_bits(op: str) -> Callable[[tuple[Any, ...], tuple[Tensor, ...], tuple[Tensor, ...]], Verdict]:
    """What an op changes in place must have the bits that its definition gives, all of the rest included."""

    def check(arguments: tuple[Any, ...], results: tuple[Tensor, ...], baseline: tuple[Tensor, ...]) -> Verdict:
        expected = fresh(to_cpu(arguments))
        getattr(definitions, op)(*expected)
        wrong = 0
        for got, want in zip(results, OPS[op].mutated_of(expected), strict=True):
            a, b = got.reshape(-1).view(torch.uint8), want.reshape(-1).view(torch.uint8)
            wrong += int((a != b).sum())
        return Verdict(float(wrong), 0.0, "wrong or touched bytes")

    return check


def baseline_append(
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
) -> tuple[Tensor, ...]:
    """One token per request, as in decode: no padding, no rounds. Batches with more are not timed, nor is the check's
    tolerance taken from them: the state comes back as it is.
    """
    changed: tuple[Tensor, ...] = (tail_ka, tail_za, tail_len, slot_positions)
    if token_offsets is not None:
        return changed
    row = positions % m
    scores = z if ape is None else z + ape[row]
    streams = 1 if next_kb is None else 2
    parts = [list(rows.chunk(streams, dim=1)) for rows in (kv, scores)]
    if indexer_kv is not None and indexer_z is not None:
        indexer_scores = indexer_z if indexer_ape is None else indexer_z + indexer_ape[row]
        for part, rows in zip(parts, (indexer_kv, indexer_scores), strict=True):
            part[:] = [torch.cat(pair, dim=1) for pair in zip(part, rows.chunk(streams, dim=1), strict=True)]
    tail_ka[request_slots, row], tail_za[request_slots, row] = parts[0][-1], parts[1][-1]
    if next_kb is not None and next_zb is not None:
        next_kb[request_slots, row], next_zb[request_slots, row] = parts[0][0], parts[1][0]
        changed += (next_kb, next_zb)
    tail_len[request_slots] = (row + 1).to(torch.int32)
    slot_positions[request_slots] = positions + 1
    return changed


def append_bytes(*arguments: Any) -> int:
    """With one token per request; every row of the bias that is used, once."""
    given = named("append", arguments)
    row = (1 if given.next_kb is None else 2) * int(given.tail_ka.shape[2]) * 4
    bias_rows = int((given.positions % given.m).unique().numel()) if given.ape is not None else 0
    return int(given.kv.shape[0]) * (4 * row + 24) + bias_rows * row


def baseline_flush_write_hca(
    entry: Tensor,
    valid_mask: Tensor,
    request_slots: Tensor,
    slot_positions: Tensor,
    block_table: Tensor,
    entries_fp8: Tensor,
    entries_rope: Tensor,
    inv_scale: Tensor,
    m: int,
) -> tuple[Tensor, ...]:
    """Every request, and no check of slots and blocks; those without an entry write what is there already."""
    row, valid = baseline_pool_rows(valid_mask, request_slots, slot_positions, block_table, entries_fp8.shape[1], m)
    stored = entries_fp8.shape[2]
    values = entry[:, :stored].to(torch.float32)
    scale = (values.abs().amax(dim=1) / number_formats.LARGEST_E4M3).clamp(min=2.0**-126)
    codes = (values / scale[:, None]).to(torch.float8_e4m3fn).view(torch.uint8)
    baseline_scatter(entries_fp8, row, valid, codes)
    baseline_scatter(entries_rope, row, valid, entry[:, stored:])
    baseline_scatter(inv_scale[..., None], row, valid, scale[:, None])
    return entries_fp8, entries_rope, inv_scale


def baseline_flush_write_csa(
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
) -> tuple[Tensor, ...]:
    where = (valid_mask, request_slots, slot_positions, block_table)
    changed = baseline_flush_write_hca(entry, *where, entries_fp8, entries_rope, inv_scale, m)
    row, valid = baseline_pool_rows(*where, entries_fp8.shape[1], m)
    groups = indexer_key.to(torch.float32).unflatten(1, (-1, 16))
    scale = (groups.abs().amax(dim=2) / number_formats.LARGEST_E2M1).to(torch.float8_e4m3fn)
    codes = conversions.encode_e2m1((groups / scale.to(torch.float32)[..., None]).flatten(1))
    baseline_scatter(indexer_keys_fp4, row, valid, codes)
    baseline_scatter(indexer_scale, row, valid, scale.view(torch.uint8))
    return (*changed, indexer_keys_fp4, indexer_scale)


def baseline_pool_rows(
    valid_mask: Tensor, request_slots: Tensor, slot_positions: Tensor, block_table: Tensor, per_block: int, m: int
) -> tuple[Tensor, Tensor]:
    entry = (slot_positions[request_slots] - 1) // m
    block = block_table.gather(1, (entry // per_block)[:, None].clamp(0, block_table.shape[1] - 1))[:, 0]
    return (block.clamp(0) * per_block + entry % per_block).to(torch.int64), valid_mask & (block >= 0)


def baseline_scatter(pool: Tensor, row: Tensor, valid: Tensor, values: Tensor) -> None:
    rows = pool.flatten(0, 1)
    rows = rows.view(torch.uint8) if rows.element_size() == 1 else rows
    rows[row] = torch.where(valid[:, None], values, rows[row])


def flush_write_csa_bytes(*arguments: Any) -> int:
    given = named("flush_write_csa", arguments)
    return flush_write_bytes(given, int(given.indexer_key.shape[1]))


def flush_write_hca_bytes(*arguments: Any) -> int:
    return flush_write_bytes(named("flush_write_hca", arguments), 0)


def flush_write_bytes(given: Any, indexer: int) -> int:
    """bfloat16 rows in, their codes and scales out; indexer: columns of an indexer key."""
    stored, rotary = int(given.entries_fp8.shape[2]), int(given.entries_rope.shape[2])
    requests, columns = given.entry.shape
    entry_bytes = 2 * columns + stored + 2 * rotary + 4 + 2 * indexer + indexer // 2 + indexer // 16
    return int(int(given.valid_mask.sum()) * (entry_bytes + 8 + 4) + 5 * requests)


def baseline_csa_rotate_state(
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
) -> tuple[Tensor, ...]:
    changed = tuple(t for t in (tail_ka, tail_za, tail_kb, tail_zb, tail_len, next_kb, next_zb) if t is not None)
    keep = ~valid_mask[:, None, None]
    moves = ((tail_kb, tail_ka if next_kb is None else next_kb), (tail_zb, tail_za if next_zb is None else next_zb))
    for to, source in moves:
        to[request_slots] = torch.where(keep, to[request_slots], source[request_slots])
    for rows in (tail_ka, tail_za, next_kb, next_zb) if clear_rows else ():
        if rows is not None:
            rows[request_slots] = torch.where(keep, rows[request_slots], 0.0)
    tail_len[request_slots] = torch.where(valid_mask, 0, tail_len[request_slots])
    return changed


def baseline_hca_reset_state(
    valid_mask: Tensor,
    request_slots: Tensor,
    tail_ka: Tensor,
    tail_za: Tensor,
    tail_len: Tensor,
    clear_rows: bool,
) -> tuple[Tensor, ...]:
    for rows in (tail_ka, tail_za) if clear_rows else ():
        rows[request_slots] = torch.where(~valid_mask[:, None, None], rows[request_slots], 0.0)
    tail_len[request_slots] = torch.where(valid_mask, 0, tail_len[request_slots])
    return tail_ka, tail_za, tail_len


def rotate_bytes(*arguments: Any) -> int:
    given = named("csa_rotate_state", arguments)
    slot = int(given.tail_ka[0].numel()) * 4 if given.tail_ka.shape[0] else 0
    cleared = (2 if given.next_kb is None else 4) if given.clear_rows else 0
    return int(given.valid_mask.sum()) * (slot * (4 + cleared) + 4) + 5 * int(given.valid_mask.shape[0])


def reset_bytes(
    valid_mask: Tensor, request_slots: Tensor, tail_ka: Tensor, tail_za: Tensor, tail_len: Tensor, clear_rows: bool
) -> int:
    slot = tail_ka[0].numel() * 4 if clear_rows and tail_ka.shape[0] else 0
    return int(valid_mask.sum()) * (2 * slot + 4) + 5 * int(valid_mask.shape[0])


BASELINES = {
    "csa_compress_tail": Baseline(baseline_csa_compress_tail, check_csa_compress_tail, csa_compress_tail_bytes),
    "hca_compress_tail": Baseline(baseline_hca_compress_tail, check_hca_compress_tail, hca_compress_tail_bytes),
    "append": Baseline(baseline_append, check_bits("append"), append_bytes),
    "flush_write_csa": Baseline(baseline_flush_write_csa, check_bits("flush_write_csa"), flush_write_csa_bytes),
    "flush_write_hca": Baseline(baseline_flush_write_hca, check_bits("flush_write_hca"), flush_write_hca_bytes),
    "csa_rotate_state": Baseline(baseline_csa_rotate_state, check_bits("csa_rotate_state"), rotate_bytes),
    "hca_reset_state": Baseline(baseline_hca_reset_state, check_bits("hca_reset_state"), reset_bytes),
}
