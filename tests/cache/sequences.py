"""Whole sequences as the model sees them: what a request's entries must be, from the rows of all of its tokens."""

from __future__ import annotations

import torch
from dsv4_kernels import number_formats
from dsv4_kernels.cache import CacheHandle, LayerCacheSchema
from torch import Tensor

NVFP4_GROUP = 16


def token_rows(schema: LayerCacheSchema, tokens: int, generator: torch.Generator) -> Tensor:
    """[tokens, 2, streams * width] values and scores, the columns as append takes them: entry, then indexer."""
    rows = torch.randn(tokens, 2, schema.projections * schema.width, generator=generator)
    rows[:, 1] *= 3
    return rows


def split_rows(schema: LayerCacheSchema, rows: Tensor) -> dict[str, Tensor | None]:
    """The arguments of append_and_flush for token_rows."""
    main = schema.projections * schema.head_dim
    kv, z = rows[:, 0], rows[:, 1]
    if not schema.indexer_head_dim:
        return {"kv": kv.contiguous(), "z": z.contiguous()}
    return {
        "kv": kv[:, :main].contiguous(),
        "z": z[:, :main].contiguous(),
        "indexer_kv": kv[:, main:].contiguous(),
        "indexer_z": z[:, main:].contiguous(),
    }


def expected_entries(schema: LayerCacheSchema, rows: Tensor) -> Tensor:
    """[entries, width] float64: the definition, on all tokens at once."""
    m, streams, head = schema.m, schema.projections, schema.head_dim
    count = rows.shape[0] // m
    main, side = rows[: count * m].to(torch.float64).split((streams * head, streams * schema.indexer_head_dim), dim=2)
    of_stream = [
        torch.cat((main.chunk(streams, 2)[s], side.chunk(streams, 2)[s]), dim=2).unflatten(0, (count, m))
        for s in range(streams)
    ]
    a, b = of_stream[-1], of_stream[0]  # b first in a token's columns; with one projection both are the same
    values, scores = a[:, :, 0], a[:, :, 1]
    if schema.tail_buffer_size_b:
        before = b.roll(1, dims=0).clone()
        if count:
            before[0, :, 0], before[0, :, 1] = 0.0, -torch.inf
        values = torch.cat((before[:, :, 0], values), dim=1)
        scores = torch.cat((before[:, :, 1], scores), dim=1)
    weights = scores.softmax(dim=1)
    return (weights * values).sum(dim=1)


def stored_entries(schema: LayerCacheSchema, handle: CacheHandle, blocks: list[int], count: int) -> dict[str, Tensor]:
    """What the pool holds of a request: the parts of its first entries, as stored."""
    parts = {}
    for name, pool in vars(handle.paged).items():
        rows = pool[blocks].flatten(0, 1)[:count] if blocks else pool.flatten(0, 1)[:0]
        parts[name] = rows.cpu()
    return parts


def dequantised(parts: dict[str, Tensor]) -> Tensor:
    """[entries, width] float32 from the parts of stored_entries."""
    values = number_formats.decode_e4m3(parts["entries_fp8"].view(torch.uint8)) * parts["inv_scale"][:, None]
    rows = [values, parts["entries_rope"].to(torch.float32)]
    if parts["indexer_keys_fp4"].shape[1]:
        codes = number_formats.decode_e2m1(number_formats.unpack_e2m1(parts["indexer_keys_fp4"]))
        scale = number_formats.decode_e4m3(parts["indexer_scale"].view(torch.uint8))
        rows.append((codes.unflatten(1, (-1, NVFP4_GROUP)) * scale[..., None]).flatten(1))
    return torch.cat(rows, dim=1)


def wrong_entries(schema: LayerCacheSchema, parts: dict[str, Tensor], rows: Tensor) -> list[int]:
    """Numbers of the entries that are not, within what their formats round, those of the sequence."""
    exact = expected_entries(schema, rows)
    got = dequantised(parts).to(torch.float64)
    stored, head = schema.head_dim - schema.rope_dim, schema.head_dim
    limit = torch.empty_like(exact)
    # E4M3: half a step of the value, or of its least normal value. bfloat16: twice, entry and storage are one rounding.
    amax = exact[:, :stored].abs().amax(dim=1, keepdim=True) if stored else exact[:, :0]
    limit[:, :stored] = exact[:, :stored].abs() * 2**-4 * 1.1 + amax * 2**-15
    limit[:, stored:head] = exact[:, stored:head].abs() * 2**-8
    if schema.indexer_head_dim:
        groups = exact[:, head:].unflatten(1, (-1, NVFP4_GROUP))
        # E2M1: half of its widest step, in units of a scale that is itself rounded.
        largest = groups.abs().amax(dim=2, keepdim=True).expand_as(groups).flatten(1)
        limit[:, head:] = largest / 6 * 1.1 + 2**-9
    wrong = ((got - exact).abs() > limit + 1e-5).any(dim=1) | ~got.isfinite().all(dim=1)
    return wrong.nonzero()[:, 0].tolist()  # type: ignore[no-any-return]
