"""What a layer does with new tokens inside the captured graph: append, then flush what is full.

Every call makes the same launches whatever the requests hold; which of them flush is decided on the device, from
tail_len.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dsv4_kernels.cache import functions
from dsv4_kernels.cache.schema import AttentionType, LayerCacheSchema
from dsv4_kernels.cache.state import CacheHandle
from dsv4_kernels.errors import InvalidArgumentError
from dsv4_kernels.host_values import integer


def maybe_flush_csa(handle: CacheHandle, schema: LayerCacheSchema, m: int, *, clear_rows: bool = True) -> None:
    """Turns the tail of each request of the batch that holds m tokens into an entry and an indexer key in the pool.

    Three launches: csa_compress_tail, flush_write_csa, csa_rotate_state.

    Args:
        handle: the layer's cache and the batch.
        schema: of the layer.
        m: tokens per block, as the schema has it.
        clear_rows: see csa_rotate_state.
    """
    _require(schema, AttentionType.CSA, m, "maybe_flush_csa", "m")
    state, paged, slots = handle.state, handle.paged, handle.request_slots
    valid_mask = torch.empty(slots.shape, dtype=torch.bool, device=slots.device)
    tail = (state.tail_ka, state.tail_za, state.tail_kb, state.tail_zb)
    entry, indexer_key = functions.csa_compress_tail(
        *tail, state.tail_len, slots, m, schema.indexer_head_dim, out_valid_mask=valid_mask
    )
    functions.flush_write_csa(
        entry,
        indexer_key,
        valid_mask,
        slots,
        state.positions,
        handle.block_table,
        paged.entries_fp8,
        paged.entries_rope,
        paged.inv_scale,
        paged.indexer_keys_fp4,
        paged.indexer_scale,
        m,
    )
    functions.csa_rotate_state(
        valid_mask, slots, *tail, state.tail_len, state.next_kb, state.next_zb, clear_rows=clear_rows
    )


def maybe_flush_hca(handle: CacheHandle, schema: LayerCacheSchema, m_prime: int, *, clear_rows: bool = True) -> None:
    """Turns the tail of each request of the batch that holds m_prime tokens into an entry in the pool.

    Three launches: hca_compress_tail, flush_write_hca, hca_reset_state.

    Args:
        handle: the layer's cache and the batch.
        schema: of the layer.
        m_prime: tokens per block, as the schema has it.
        clear_rows: see hca_reset_state.
    """
    _require(schema, AttentionType.HCA, m_prime, "maybe_flush_hca", "m_prime")
    state, paged, slots = handle.state, handle.paged, handle.request_slots
    valid_mask = torch.empty(slots.shape, dtype=torch.bool, device=slots.device)
    entry = functions.hca_compress_tail(
        state.tail_ka, state.tail_za, state.tail_len, slots, m_prime, out_valid_mask=valid_mask
    )
    functions.flush_write_hca(
        entry,
        valid_mask,
        slots,
        state.positions,
        handle.block_table,
        paged.entries_fp8,
        paged.entries_rope,
        paged.inv_scale,
        m_prime,
    )
    functions.hca_reset_state(valid_mask, slots, state.tail_ka, state.tail_za, state.tail_len, clear_rows=clear_rows)


def append_and_flush(
    handle: CacheHandle,
    schema: LayerCacheSchema,
    kv: Tensor,
    z: Tensor,
    *,
    max_new_tokens: int,
    indexer_kv: Tensor | None = None,
    indexer_z: Tensor | None = None,
    ape: Tensor | None = None,
    indexer_ape: Tensor | None = None,
    clear_rows: bool = True,
) -> None:
    """Appends the batch's new tokens to a layer's tails, and flushes each block that they complete.

    A tail holds one block, so this takes a round of four launches for each block that a request may touch:
    (max_new_tokens + m - 2) // m + 1 rounds, whatever the requests bring. For prompts of thousands of tokens
    compress_flush is the way.

    Args:
        handle: the layer's cache and the batch, as prepare_forward left them.
        schema: of the layer; nothing is done for SWA.
        kv: [tokens, columns] float32, the rows of all new tokens in the order of the requests; see append.
        z: like kv, the scores.
        max_new_tokens: the most tokens that a request of any replay brings.
        indexer_kv: the indexer's rows; where the schema has an indexer.
        indexer_z: like indexer_kv, the scores.
        ape: [m, columns] float32, position bias that is added to z.
        indexer_ape: the same for indexer_z.
        clear_rows: see csa_rotate_state.
    """
    if schema.attention is AttentionType.SWA:
        return
    max_new_tokens = integer("append_and_flush", "max_new_tokens", max_new_tokens, 0)
    flush: Callable[..., None] = maybe_flush_csa if schema.attention is AttentionType.CSA else maybe_flush_hca
    state = handle.state
    for number in range((max_new_tokens + schema.m - 2) // schema.m + 1):
        functions.append(
            kv,
            z,
            handle.request_slots,
            handle.positions,
            state.tail_ka,
            state.tail_za,
            state.tail_len,
            state.positions,
            schema.m,
            state.next_kb,
            state.next_zb,
            handle.token_offsets,
            indexer_kv,
            indexer_z,
            ape,
            indexer_ape,
            number,
        )
        flush(handle, schema, schema.m, clear_rows=clear_rows)


def _require(schema: LayerCacheSchema, attention: AttentionType, m: int, function: str, name: str) -> None:
    if schema.attention is not attention:
        raise InvalidArgumentError(
            f"{function}: schema: expected {attention.name} attention, got {schema.attention.name}"
        )
    if m != schema.m:
        raise InvalidArgumentError(f"{function}: {name}: expected {schema.m}, as the schema has it, got {m!r}")
