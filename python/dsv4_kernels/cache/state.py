"""The tensors of a layer's cache, as plain dataclasses: what a request has pending, the pool of finished entries, and
what one forward pass works on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dsv4_kernels.cache.batch_tensors import BatchTensors
from dsv4_kernels.cache.schema import LayerCacheSchema
from dsv4_kernels.host_values import integer

# The score of a row that is not there. The system's description uses -1e9: beside any real score both weigh 0.
MASKED_SCORE = -math.inf


@dataclass
class CacheState:
    """The rows of each request's current block and of the block before. One slot a request.

    tail_ka, tail_za: [slots, m, width] float32, values and scores of the current block (a).
    tail_kb, tail_zb: like tail_ka, of the block before (b); scores of -inf where there is none. No rows for HCA.
    next_kb, next_zb: like tail_ka, what becomes tail_kb and tail_zb; None where one projection serves both streams.
    tail_len: [slots] int32, rows of the current block. positions: [slots] int64, position after the last of them.
    """

    tail_ka: Tensor
    tail_za: Tensor
    tail_kb: Tensor
    tail_zb: Tensor
    next_kb: Tensor | None
    next_zb: Tensor | None
    tail_len: Tensor
    positions: Tensor

    @classmethod
    def allocate(
        cls, schema: LayerCacheSchema, max_requests: int, *, device: torch.device | str | None = None
    ) -> CacheState:
        """State for that many requests, all of them at their start."""
        max_requests = integer("CacheState.allocate", "max_requests", max_requests, 0)

        def rows(count: int, fill: float = 0.0) -> Tensor:
            return torch.full((max_requests, count, schema.width), fill, dtype=torch.float32, device=device)

        two = schema.tail_buffer_size_next_b > 0
        return cls(
            tail_ka=rows(schema.tail_buffer_size_a),
            tail_za=rows(schema.tail_buffer_size_a),
            tail_kb=rows(schema.tail_buffer_size_b),
            tail_zb=rows(schema.tail_buffer_size_b, MASKED_SCORE),
            next_kb=rows(schema.tail_buffer_size_next_b) if two else None,
            next_zb=rows(schema.tail_buffer_size_next_b) if two else None,
            tail_len=torch.zeros(max_requests, dtype=torch.int32, device=device),
            positions=torch.zeros(max_requests, dtype=torch.int64, device=device),
        )

    def reset_slot(self, slot: int, position: int = 0) -> None:
        """Prepares a slot for another request, whose first block has no block before it.

        Args:
            slot: which one.
            position: of the request's first token. One that starts in the middle of a sequence starts at a block's
                first token.

        Raises:
            InvalidArgumentError: a slot that the state does not have, -1 (padding) among them, or a negative position;
                nothing has changed.
        """
        slot = self.check_slot("CacheState.reset_slot", "slot", slot)
        position = integer("CacheState.reset_slot", "position", position, 0)
        for rows in (self.tail_ka, self.tail_za, self.tail_kb, self.next_kb, self.next_zb):
            if rows is not None:
                rows[slot] = 0.0
        self.tail_zb[slot] = MASKED_SCORE
        self.tail_len[slot] = 0
        self.positions[slot] = position

    def check_slot(self, where: str, name: str, slot: object) -> int:
        """The slot as an int; InvalidArgumentError, which names `where` and `name`, if the state does not have it."""
        return integer(where, name, slot, 0, self.tail_len.shape[0] - 1)


@dataclass
class PagedCache:
    """The pool of finished entries, in the split layout: a tensor for each part, by [block, slot in the block].

    entries_fp8: [blocks, entries_per_block, head_dim - rope_dim] float8_e4m3fn, times inv_scale.
    entries_rope: [blocks, entries_per_block, rope_dim] bfloat16. inv_scale: [blocks, entries_per_block] float32.
    indexer_keys_fp4: [blocks, entries_per_block, indexer_head_dim / 2] uint8, two E2M1 codes a byte, the even one low.
    indexer_scale: [blocks, entries_per_block, indexer_head_dim / 16] float8_e4m3fn.
    """

    entries_fp8: Tensor
    entries_rope: Tensor
    inv_scale: Tensor
    indexer_keys_fp4: Tensor
    indexer_scale: Tensor

    @classmethod
    def allocate(cls, schema: LayerCacheSchema, blocks: int, *, device: torch.device | str | None = None) -> PagedCache:
        """A pool of that many blocks, zeroed."""
        blocks = integer("PagedCache.allocate", "blocks", blocks, 0)

        def pool(*columns: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(blocks, schema.entries_per_block, *columns, dtype=dtype, device=device)

        return cls(
            entries_fp8=pool(schema.head_dim - schema.rope_dim, dtype=torch.float8_e4m3fn),
            entries_rope=pool(schema.rope_dim, dtype=torch.bfloat16),
            inv_scale=pool(dtype=torch.float32),
            indexer_keys_fp4=pool(schema.indexer_head_dim // 2, dtype=torch.uint8),
            indexer_scale=pool(schema.indexer_head_dim // 16, dtype=torch.float8_e4m3fn),
        )

    @property
    def blocks(self) -> int:
        """How many blocks the pool has."""
        return self.entries_fp8.shape[0]


@dataclass
class CacheHandle:
    """One layer's cache and the batch that a forward pass works on. A captured graph reads these tensors, so between
    replays prepare_forward writes to them and never replaces them. It writes what has changed since its last call, so
    nobody else writes to them but through torch, whose version counters it looks at. Handles of layers that share a
    schema may share them.

    request_slots: [requests] int32, the slot of each request; -1 for padding.
    positions: [requests] int64, position of each request's first new token.
    token_offsets: [requests + 1] int32, where each request's new tokens begin in the batch.
    block_table: [requests, any] int32, the blocks of each request in order; -1 where there is none.
    """

    state: CacheState
    paged: PagedCache
    request_slots: Tensor
    positions: Tensor
    token_offsets: Tensor
    block_table: Tensor
    batch: BatchTensors = field(default_factory=BatchTensors, init=False, repr=False, compare=False)

    @classmethod
    def allocate(cls, state: CacheState, paged: PagedCache, requests: int, blocks_per_request: int) -> CacheHandle:
        """A handle for batches of up to that many requests, none of them there yet."""
        requests = integer("CacheHandle.allocate", "requests", requests, 0)
        columns = integer("CacheHandle.allocate", "blocks_per_request", blocks_per_request, 0)
        device = state.tail_len.device
        with torch.inference_mode(False):  # inference tensors have no version counters
            return cls(
                state=state,
                paged=paged,
                request_slots=torch.full((requests,), -1, dtype=torch.int32, device=device),
                positions=torch.full((requests,), -1, dtype=torch.int64, device=device),
                token_offsets=torch.zeros(requests + 1, dtype=torch.int32, device=device),
                block_table=torch.full((requests, columns), -1, dtype=torch.int32, device=device),
            )
