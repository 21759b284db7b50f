"""Compressors and indexer of transformers' DeepSeek-V4 on UniformCache.

A cache layer of transformers keeps the window of keys as before. What it would keep for compressors (pending rows, rows
for the next entry, entries so far, joined anew at every step) is a UniformCache for each, in bfloat16, with room to
grow. Rows are projected with float32 results, as in the models' own code, and an entry is rounded once.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from dsv4_kernels.cache import UniformCache, rope_table
from dsv4_kernels.integrations.transformers.layers import settle, swap_forward
from dsv4_kernels.router import topk_select
from dsv4_kernels.router.prefill import gate_logits

_ROOM = 1024  # tokens that a cache starts with behind a prompt; a multiple of every ratio


class RopeTable:
    """The rotary table of the layers with compressed entries, as long as it has had to be."""

    def __init__(self, frequencies: Tensor) -> None:
        self._table = rope_table(frequencies, 0)
        self._frequencies = frequencies

    def up_to(self, positions: int, device: torch.device) -> Tensor:
        """[positions at least, 64] float32."""
        if self._table.shape[0] < positions or self._table.device != device:
            self._table = rope_table(self._frequencies, max(positions, 2 * self._table.shape[0]), device=device)
        return self._table


def swap_compressor(attention: Any, rope: RopeTable, modeling: Any) -> None:
    """Replaces forward of a layer's compressor, and of its indexer."""
    compressor = attention.compressor
    if compressor is not None:
        _settle(compressor)
    given = {"rope": rope, "layout": "bf16", "name": "compressor"}
    if isinstance(compressor, modeling.DeepseekV4CSACompressor):
        swap_forward(compressor, _sparse, **given)
        _settle(compressor.indexer)
        rotate = modeling.apply_rotary_pos_emb
        swap_forward(
            compressor.indexer, _indexer, rope=rope, layout="indexer_bf16", name="indexer", apply_rotary_pos_emb=rotate
        )
    elif isinstance(compressor, modeling.DeepseekV4HCACompressor):
        swap_forward(compressor, _heavy, **given)


def _settle(compressor: Any) -> None:
    settle(compressor, "position_bias")
    settle(compressor.kv_norm, "weight")


def _heavy(
    self: Any, hidden_states: Tensor, q_residual: Tensor, position_ids: Tensor, cache: Any, layer_idx: int
) -> tuple[Tensor, Tensor | None]:
    """DeepseekV4HCACompressor: entries [batch, 1, entries, head_dim], and which of them a query sees."""
    entries = _fed(self, hidden_states, cache, layer_idx)
    batch, count, _ = entries.shape
    if position_ids.shape[1] == 1 or count == 0:
        return entries.unsqueeze(1), None
    behind = torch.arange(count, device=entries.device) >= _complete(self, position_ids, batch).unsqueeze(2)
    bias = torch.zeros(behind.shape, dtype=entries.dtype, device=entries.device).masked_fill_(behind, -torch.inf)
    return entries.unsqueeze(1), bias.unsqueeze(1)


def _sparse(
    self: Any, hidden_states: Tensor, q_residual: Tensor, position_ids: Tensor, cache: Any, layer_idx: int
) -> tuple[Tensor, Tensor]:
    """DeepseekV4CSACompressor: likewise, those that the indexer has chosen."""
    entries = _fed(self, hidden_states, cache, layer_idx)
    chosen: Tensor = self.indexer(hidden_states, q_residual, position_ids, cache, layer_idx)
    (batch, tokens, _), count = chosen.shape, entries.shape[1]
    bias = torch.full((batch, tokens, count + 1), -torch.inf, dtype=entries.dtype, device=entries.device)
    bias.scatter_(2, torch.where(chosen < 0, count, chosen), 0.0)
    return entries.unsqueeze(1), bias[:, None, :, :count]


def _indexer(
    self: Any, hidden_states: Tensor, q_residual: Tensor, position_ids: Tensor, cache: Any, layer_idx: int
) -> Tensor:
    """DeepseekV4Indexer: [batch, tokens, k] int64, the entries that each query attends to; -1 behind the last."""
    keys = _fed(self, hidden_states, cache, layer_idx)
    batch, tokens, _ = hidden_states.shape
    cos, sin = self.rotary_emb(hidden_states, position_ids=position_ids, layer_type=self.rope_layer_type)
    q = self.q_b_proj(q_residual).view(batch, tokens, -1, self.head_dim).transpose(1, 2)
    q = self.dsv4["apply_rotary_pos_emb"](q, cos, sin).transpose(1, 2)
    k = min(self.index_topk, keys.shape[1])
    if k == 0:
        return torch.empty(batch, tokens, 0, dtype=torch.int64, device=keys.device)
    scores = self.scorer(q, keys, hidden_states).flatten(0, 1)
    lengths = _complete(self, position_ids, batch).flatten().to(torch.int32)
    _, ids = topk_select(scores, k, lengths=lengths, sorted=False, with_values=False)
    return ids.to(torch.int64).view(batch, tokens, k)


def _complete(self: Any, position_ids: Tensor, batch: int) -> Tensor:
    """[batch, tokens]: how many entries are complete at each query."""
    complete: Tensor = (position_ids + 1) // self.compress_rate
    return complete.expand(batch, -1)


def _fed(self: Any, hidden_states: Tensor, cache: Any, layer_idx: int) -> Tensor:
    """[batch, entries, head_dim] bfloat16: all entries of the sequences, with those that these tokens complete."""
    batch, tokens, _ = hidden_states.shape
    held = None if cache is None else _held(cache.layers[layer_idx])
    stored = None if held is None else held.get(self.dsv4["name"])
    if stored is None:
        room = tokens if held is None else tokens + _ROOM
        stored = UniformCache(batch, room, self.compress_rate, self.dsv4["layout"], device=hidden_states.device)
        if held is not None:
            held[self.dsv4["name"]] = stored
    end = stored.length + tokens
    if end > stored.capacity:
        stored.reserve(max(end, 2 * stored.capacity))
    return stored.feed(
        _projected(self.kv_proj, hidden_states),
        _projected(self.gate_proj, hidden_states),
        self.position_bias,
        self.kv_norm.weight,
        self.dsv4["rope"].up_to(stored.capacity, hidden_states.device),
        epsilon=self.kv_norm.variance_epsilon,
        round_once=True,
    )


def _projected(linear: Any, hidden_states: Tensor) -> Tensor:
    """The rows of a projection, float32 where its weights are bfloat16."""
    if type(linear) is not nn.Linear or linear.weight.dtype != torch.bfloat16:
        rows: Tensor = linear(hidden_states)
        return rows
    rows = gate_logits(hidden_states.flatten(0, 1), linear.weight)
    return rows.view(*hidden_states.shape[:2], -1)


def _held(layer: Any) -> dict[str, UniformCache]:
    """What a cache layer of transformers holds for this package; reordered and emptied with it."""
    held: dict[str, UniformCache] | None = getattr(layer, "dsv4", None)
    if held is None:
        held = layer.dsv4 = {}
        layer.reorder_cache, layer.reset = MethodType(_reorder, layer), MethodType(_reset, layer)
    return held


def _reorder(self: Any, beam_idx: Tensor) -> None:
    type(self).reorder_cache(self, beam_idx)
    for stored in self.dsv4.values():
        stored.reorder(beam_idx)


def _reset(self: Any) -> None:
    type(self).reset(self)
    self.dsv4.clear()
