"""Sizes that follow from a layer's schema, and the state that a request starts from."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from dsv4_kernels import InvalidArgumentError
from dsv4_kernels.cache import (
    PAGE_LAYOUTS,
    AttentionType,
    CacheHandle,
    CacheState,
    LayerCacheSchema,
    PagedCache,
    maybe_flush_csa,
    maybe_flush_hca,
)
from dsv4_kernels.presets import PRESETS


def test_layers_of_the_presets() -> None:
    """43, 61 and 40 layers; the models' tables of compress ratios."""
    kinds = {
        name: [LayerCacheSchema.of_layer(preset, layer).attention.name for layer in range(preset.layers)]
        for name, preset in PRESETS.items()
    }
    assert kinds["v4-flash"] == ["SWA", "SWA", *["CSA", "HCA"] * 20, "CSA"]
    assert kinds["v4-pro"] == ["HCA", "HCA", *["CSA", "HCA"] * 29, "CSA"]
    assert kinds["v41-flash"] == ["SWA"] * 2 + ["HCA"] * 38
    ratios = [LayerCacheSchema.of_layer(PRESETS["v41-flash"], layer).m for layer in (0, 2, 19, 20, 39)]
    assert ratios == [0, 2, 2, 1, 1]


def test_blocks_of_multi_token_prediction() -> None:
    """They come behind the layers in the models' compress_ratios, and attend to a window alone."""
    blocks = {"v4-flash": 3, "v4-pro": 1, "v41-flash": 3}
    for name, preset in PRESETS.items():
        for block in range(blocks[name]):
            assert LayerCacheSchema.of_layer(preset, preset.layers + block) == LayerCacheSchema.swa()
        for layer in (-1, preset.layers + blocks[name], 10**9, 1.0, None):
            text = rf"^LayerCacheSchema.of_layer: layer \(of {name}: {preset.layers} layers, then {blocks[name]} blocks"
            with pytest.raises(InvalidArgumentError, match=text):
                LayerCacheSchema.of_layer(preset, layer)  # type: ignore[arg-type]


def test_sizes_of_the_models_layers() -> None:
    csa, hca, swa = LayerCacheSchema.csa(), LayerCacheSchema.hca(), LayerCacheSchema.swa()
    assert (csa.m, csa.tail_buffer_size_a, csa.tail_buffer_size_b, csa.tail_buffer_size_next_b) == (4, 4, 4, 4)
    assert (hca.m, hca.tail_buffer_size_a, hca.tail_buffer_size_b, hca.tail_buffer_size_next_b) == (128, 128, 0, 0)
    assert LayerCacheSchema.csa(projections=1).tail_buffer_size_next_b == 0
    assert (csa.width, hca.width, csa.head_dim, csa.entry_head_dim, csa.rope_dim) == (640, 512, 512, 512, 64)
    assert [csa.entries(tokens) for tokens in (0, 3, 4, 7, 8)] == [0, 0, 1, 1, 2]
    assert [csa.blocks(tokens) for tokens in (0, 3, 4, 256, 259, 260)] == [0, 0, 1, 1, 1, 2]
    assert (swa.entries(10**6), swa.blocks(10**6)) == (0, 0)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"attention": "hca"}, "attention: expected an AttentionType, got 'hca'"),
        ({"m": 0}, "m: expected at least 1, got 0"),
        ({"m": 4.0}, "m: expected an int, 0 or more, got 4.0"),
        ({"indexer_head_dim": -16}, "indexer_head_dim: expected an int, 0 or more, got -16"),
        ({"head_dim": 510}, "head_dim: expected a multiple of 4, got 510"),
        ({"rope_dim": 516}, "rope_dim: expected a multiple of 4 up to head_dim 512, got 516"),
        ({"indexer_head_dim": 100}, "indexer_head_dim: expected a multiple of 16, got 100"),
        ({"page_layout": "pages"}, "page_layout: expected bf16 or .*, got 'pages'"),
        ({"page_layout": ["split"]}, "page_layout: expected bf16 or .*, got \\['split'\\]"),
        ({"entries_per_block": 0}, "entries_per_block: expected at least 1, got 0"),
        ({"projections": 2}, "projections: expected 1, or 2 for CSA"),
    ],
)
def test_schemas_that_cannot_be(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"^LayerCacheSchema: {text}"):
        LayerCacheSchema(**{"attention": AttentionType.HCA, "m": 128, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [-1, 1.5, None])
def test_sizes_of_tensors_are_counts(size: Any) -> None:
    schema = LayerCacheSchema.csa()
    state, paged = CacheState.allocate(schema, 1), PagedCache.allocate(schema, 1)
    for call, name in (
        (lambda: CacheState.allocate(schema, size), "CacheState.allocate: max_requests"),
        (lambda: PagedCache.allocate(schema, size), "PagedCache.allocate: blocks"),
        (lambda: CacheHandle.allocate(state, paged, size, 1), "CacheHandle.allocate: requests"),
        (lambda: CacheHandle.allocate(state, paged, 1, size), "CacheHandle.allocate: blocks_per_request"),
        (lambda: PAGE_LAYOUTS["bf16"].page_bytes(size), "PageLayout.page_bytes: entries"),
        (lambda: schema.blocks(size), "LayerCacheSchema.entries: tokens"),
    ):
        with pytest.raises(InvalidArgumentError, match=f"^{name}: expected an int.*, got {size}"):
            call()


def test_flushes_take_the_schemas_block() -> None:
    """A block of another length would write entries that prepare_forward has no place for."""
    csa, hca = LayerCacheSchema.csa(), LayerCacheSchema.hca()
    for schema, flush, m in ((csa, maybe_flush_csa, 8), (hca, maybe_flush_hca, 4), (csa, maybe_flush_csa, None)):
        handle = CacheHandle.allocate(CacheState.allocate(schema, 1), PagedCache.allocate(schema, 1), 1, 1)
        with pytest.raises(InvalidArgumentError, match=f"expected {schema.m}, as the schema has it, got {m}"):
            flush(handle, schema, m)  # type: ignore[arg-type]
        wrong = hca if schema is csa else csa
        with pytest.raises(InvalidArgumentError, match=f"schema: expected {schema.attention.name} attention, got"):
            flush(handle, wrong, wrong.m)


@pytest.mark.parametrize(
    "schema", [LayerCacheSchema.csa(), LayerCacheSchema.csa(projections=1), LayerCacheSchema.hca()]
)
def test_a_slot_starts_and_restarts_masked(schema: LayerCacheSchema) -> None:
    """A first block has nothing before it; reset_slot restores that, and touches no other slot."""
    state = CacheState.allocate(schema, 3)
    assert state.tail_ka.shape == state.tail_za.shape == (3, schema.m, schema.width)
    assert state.tail_kb.shape == state.tail_zb.shape == (3, schema.tail_buffer_size_b, schema.width)
    assert (state.next_kb is None) == (state.next_zb is None) == (schema.projections == 1)
    assert (state.tail_kb == 0).all()
    assert (state.tail_zb == -math.inf).all()
    tensors = [tensor for tensor in vars(state).values() if tensor is not None]
    for tensor in tensors:
        tensor.fill_(7)
    state.reset_slot(1, position=12)
    fresh = CacheState.allocate(schema, 3)
    fresh.positions[1] = 12
    for tensor, start in zip(tensors, (t for t in vars(fresh).values() if t is not None), strict=True):
        assert torch.equal(tensor[1], start[1])
        assert (tensor[[0, 2]] == 7).all()


def test_tensors_of_pool_and_handle() -> None:
    paged = PagedCache.allocate(LayerCacheSchema.csa(entries_per_block=16), 5)
    assert paged.blocks == 5
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in vars(paged).items()}
    assert shapes == {
        "entries_fp8": ((5, 16, 448), torch.float8_e4m3fn),
        "entries_rope": ((5, 16, 64), torch.bfloat16),
        "inv_scale": ((5, 16), torch.float32),
        "indexer_keys_fp4": ((5, 16, 64), torch.uint8),
        "indexer_scale": ((5, 16, 8), torch.float8_e4m3fn),
    }
    handle = CacheHandle.allocate(CacheState.allocate(LayerCacheSchema.csa(), 9), paged, 4, 6)
    assert handle.block_table.shape == (4, 6)
    for tensor in (handle.request_slots, handle.positions, handle.block_table):
        assert (tensor == -1).all()
    assert handle.token_offsets.tolist() == [0] * 5
