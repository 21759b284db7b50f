"""The demo's compressed cache: new tokens of a CSA and of an HCA layer, in decode and in prefill.

Every request has a block's tokens but the last in its tail; decode brings that one, so that all requests flush at once,
and prefill brings a prompt to an empty cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4_kernels.cache import (
    AttentionType,
    BlockAllocator,
    CacheHandle,
    CacheState,
    LayerCacheSchema,
    PagedCache,
    Request,
    append_and_flush,
    prepare_forward,
)
from dsv4_kernels.cases import Verdict, code_tables
from dsv4_kernels.cases.cache import definitions
from dsv4_kernels.presets import Preset

# E4M3 rounds to half a step, 16 beside its largest value 448; what float32 and bfloat16 add is small beside it.
FP8_LIMIT = 16 / 448 + 2**-8
# E2M1 rounds by up to 1 beside its largest value 6, in units of a scale that E4M3 rounds by up to 1/16.
FP4_LIMIT = (1 / 6) * (1 + 2**-4) + 2**-4


@dataclass
class CacheStep:
    """A batch of requests through one layer's cache, which holds `before` tokens of each and gets `new` more."""

    layer: str
    schema: LayerCacheSchema
    requests: int
    before: int
    new: int
    rows: Tensor  # [requests, before + new, 2, streams * width]: values and scores of every token
    handle: CacheHandle

    op = "append_and_flush"
    kernels = "append"  # one of those that run; all are CUDA C++

    def run(self) -> None:
        """The step, again and again from the same positions."""
        self._append(self.before, self.before + self.new)

    def verdict(self) -> Verdict:
        """From an empty state: first what was before, then the step; every entry in the pool against float64."""
        state, device = self.handle.state, self.handle.positions.device
        allocator = BlockAllocator(self.handle.paged.blocks)
        requests = [Request(slot) for slot in range(self.requests)]
        for slot in range(self.requests):
            state.reset_slot(slot)
        for new in (self.before, self.new):
            prepare_forward(self.handle, self.schema, allocator, requests, [new] * self.requests)
            if new:
                start = requests[0].position - new
                self._append(start, start + new)
        count = self.schema.entries(self.before + self.new)
        exact = torch.stack([self._exact(rows) for rows in self.rows.cpu()])
        blocks = torch.tensor([request.blocks for request in requests], device=device, dtype=torch.int64)
        stored = [part[blocks].flatten(1, 2)[:, :count].cpu() for part in vars(self.handle.paged).values()]
        fp8, fp4 = self._errors(stored, exact)
        if fp4 > FP4_LIMIT:
            return Verdict(fp4, FP4_LIMIT, "indexer key, of its group's largest value")
        return Verdict(fp8, FP8_LIMIT, "entry, of its largest value")

    def moved_bytes(self) -> int:
        """New rows in, each row of the state that they complete a block with once, entries out."""
        schema, row = self.schema, int(self.rows[0, 0].numel()) * 4
        entries = self.requests * (schema.entries(self.before + self.new) - schema.entries(self.before))
        earlier = self.requests * (schema.tail_buffer_size_b * row + self.before % schema.m * row)
        pool: list[Tensor] = list(vars(self.handle.paged).values())
        entry = sum(part[0, 0].numel() * part.element_size() for part in pool)
        return self.requests * self.new * row + earlier + entries * entry

    def _append(self, begin: int, end: int) -> None:
        columns = self.rows[:, begin:end].flatten(0, 1)
        head = self.schema.projections * self.schema.head_dim
        kv, z = columns[:, 0], columns[:, 1]
        indexer = {"indexer_kv": kv[:, head:], "indexer_z": z[:, head:]} if self.schema.indexer_head_dim else {}
        append_and_flush(
            self.handle,
            self.schema,
            kv[:, :head],
            z[:, :head],
            max_new_tokens=end - begin,
            clear_rows=False,
            **indexer,
        )

    def _exact(self, rows: Tensor) -> Tensor:
        """[entries, width] float64 of one request's tokens."""
        schema, streams = self.schema, self.schema.projections
        count = schema.entries(len(rows))
        blocks = rows[: count * schema.m].unflatten(0, (count, schema.m))
        main, side = blocks.split((streams * schema.head_dim, streams * schema.indexer_head_dim), dim=3)
        pairs = zip(main.chunk(streams, dim=3), side.chunk(streams, dim=3), strict=True)
        by_stream = [torch.cat(pair, dim=3) for pair in pairs]
        current = by_stream[-1]
        values, scores = current[:, :, 0], current[:, :, 1]
        if schema.attention is AttentionType.CSA:
            before = torch.empty_like(by_stream[0])
            before[1:] = by_stream[0][:-1]
            before[0, :, 0], before[0, :, 1] = 0.0, -torch.inf
            values, scores = torch.cat((before[:, :, 0], values), 1), torch.cat((before[:, :, 1], scores), 1)
        return definitions.pooled(values, scores)

    def _errors(self, stored: list[Tensor], exact: Tensor) -> tuple[float, float]:
        """Of entries, relative to their largest value; of indexer keys, relative to that of each group."""
        fp8, rope, scale, codes, key_scale = stored
        head = self.schema.head_dim
        values = code_tables.decode_e4m3(fp8.view(torch.uint8)) * scale[..., None]
        entry = torch.cat((values, rope.to(torch.float32)), dim=-1)
        main = exact[..., :head]
        error = float(((entry - main).abs() / main.abs().amax(dim=-1, keepdim=True)).max())
        if not self.schema.indexer_head_dim:
            return error, 0.0
        groups = code_tables.decode_e2m1(codes).unflatten(-1, (-1, 16))
        key = groups * code_tables.decode_e4m3(key_scale.view(torch.uint8))[..., None]
        side = exact[..., head:].unflatten(-1, (-1, 16))
        return error, float(((key - side).abs() / side.abs().amax(dim=-1, keepdim=True)).max())


def cache_steps(preset: Preset, requests: int, device: str, generator: torch.Generator) -> list[CacheStep]:
    """Decode of a batch and prefill of one request, for the model's first CSA and HCA layers."""
    kinds: dict[AttentionType, int] = {}
    for layer in range(preset.layers):
        kinds.setdefault(LayerCacheSchema.of_layer(preset, layer).attention, layer)
    steps = []
    for attention, layer in sorted(kinds.items(), key=lambda item: item[1]):
        schema = LayerCacheSchema.of_layer(preset, layer)
        if attention is AttentionType.SWA:
            continue
        shapes = (("decode", requests, 2 * schema.m - 1, 1), ("prefill", 1, 0, 2 * schema.m + 1))
        for name, batch, before, new in shapes:
            tokens = before + new
            rows = torch.randn(
                batch,
                tokens,
                2,
                schema.projections * schema.width,
                generator=generator,
                dtype=torch.float32,
                device="cpu",
            )
            rows[:, :, 1] *= 3
            state = CacheState.allocate(schema, batch, device=device)
            paged = PagedCache.allocate(schema, batch * schema.blocks(tokens), device=device)
            handle = CacheHandle.allocate(state, paged, batch, schema.blocks(tokens))
            label = f"{layer} {attention.name} {name}"
            steps.append(CacheStep(label, schema, batch, before, new, rows.to(device), handle))
    return steps
