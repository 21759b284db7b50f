"""The table of page layouts, and unpack_entries, against ml_dtypes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dsv4_kernels import InvalidArgumentError
from dsv4_kernels.cache import PAGE_LAYOUTS, unpack_entries

from tests.cache import compress_oracle as oracle
from tests.cache.compress_engine import pool
from tests.cache.compress_oracle import FORMATS, Array


@pytest.mark.parametrize("name", FORMATS)
def test_table(name: str) -> None:
    layout, form = PAGE_LAYOUTS[name], FORMATS[name]
    assert (layout.head_dim, layout.quantized_dims, layout.group) == (form.head_dim, form.quantized, form.group)
    assert (layout.value_bytes, layout.scale_bytes, layout.page_alignment) == (form.row, form.footer, form.alignment)
    assert layout.amax_floor == np.float32(form.floor)
    assert (layout.separate, layout.exact_scale) == (form.separate, form.exact)
    for entries in (1, 2, 63, 64, 256):
        assert layout.page_bytes(entries) == oracle.page_bytes(name, entries)


def test_sizes_that_engines_publish() -> None:
    assert list(PAGE_LAYOUTS) == list(FORMATS)
    sizes = {name: layout.entry_bytes for name, layout in PAGE_LAYOUTS.items()}
    assert sizes == {
        "bf16": 1024,
        "indexer_bf16": 256,
        "fp8_ds_mla": 584,
        "indexer_fp8": 132,
        "indexer_mxfp4": 68,
        "v41_fp8": 528,
        "v41_fp4": 288,
        "split": 448 + 4 + 128,
        "split_indexer": 72,
    }
    assert PAGE_LAYOUTS["fp8_ds_mla"].page_bytes(64) == 37_440


def decoded(parts: list[Array], slot: int, entries_per_page: int, name: str) -> Array:
    """An entry of pages by ml_dtypes, in float32."""
    form = FORMATS[name]
    row, scale_bytes = oracle.read(parts, slot, entries_per_page, name)
    quantized_bytes = len(row) - 2 * (form.head_dim - form.quantized)
    rest = row[quantized_bytes:].copy().view(oracle.BF16).astype(np.float32)
    if not form.quantized:
        return rest
    codes = row[:quantized_bytes].copy()
    if form.element is oracle.E4M3:
        values = codes.view(oracle.E4M3).astype(np.float32)
    else:
        nibbles = np.stack((codes & 15, codes >> 4), axis=1).reshape(-1)
        values = nibbles.view(oracle.E2M1).astype(np.float32)
    if form.scale == "e8m0":
        scale = np.ldexp(np.float64(1), scale_bytes.astype(np.int32) - 127).astype(np.float32)
        scale = np.where(scale_bytes == 255, np.nan, scale).astype(np.float32)
    else:
        scale = scale_bytes.view(np.float32 if form.scale == "float32" else oracle.E4M3).astype(np.float32)
    with np.errstate(all="ignore"):
        return np.concatenate(((values.reshape(-1, form.group) * scale[:, None]).reshape(-1), rest))


@pytest.mark.parametrize("index_type", [torch.int32, torch.int64])
@pytest.mark.parametrize("name", FORMATS)
def test_unpack_any_bytes(name: str, index_type: torch.dtype, device: str) -> None:
    """Random bytes, so every code and scale; slots out of range are NaN."""
    entries_per_page, page_count = 3, 5
    parts, tensors = pool(FORMATS[name], name, page_count, entries_per_page, device)
    random = np.random.default_rng(3)
    for part in parts:
        part.copy_(torch.from_numpy(random.integers(0, 256, part.shape, dtype=np.uint8)))
    slots = [14, 0, -1, 7, 15, 7, 2**31 - 1, -(2**31), 3]
    got = unpack_entries(
        tensors[0],
        torch.tensor(slots, dtype=index_type, device=device),
        name,
        entries_per_page,
        **dict(zip(("scales", "rope"), tensors[1:], strict=False)),
    )
    numbers = [part.cpu().numpy() for part in parts]
    for row, slot in zip(got.cpu().numpy(), slots, strict=True):
        inside = 0 <= slot < page_count * entries_per_page
        expected = decoded(numbers, slot, entries_per_page, name) if inside else np.full(len(row), np.nan)
        assert np.array_equal(row, expected.astype(np.float32), equal_nan=True)


def test_pages_with_room_between_them(device: str) -> None:
    pages = torch.randint(256, (5, 160), dtype=torch.uint8, device=device)
    slots = torch.tensor([3, 0, 2], device=device)
    spread = torch.zeros(5, 192, dtype=torch.uint8, device=device)[:, :160].copy_(pages)
    expected = unpack_entries(pages, slots, "indexer_mxfp4", 2)
    assert torch.equal(unpack_entries(spread, slots, "indexer_mxfp4", 2).nan_to_num(), expected.nan_to_num())


def test_no_entries_and_no_pages(device: str) -> None:
    pages = torch.zeros(2, 37_440, dtype=torch.uint8, device=device)
    slots = torch.zeros(3, dtype=torch.int32, device=device)
    assert unpack_entries(pages, slots[:0], "fp8_ds_mla", 64).shape == (0, 512)
    assert unpack_entries(pages[:0], slots, "fp8_ds_mla", 64).isnan().all()


def test_errors() -> None:
    pages, slots = torch.zeros(2, 37_439, dtype=torch.uint8), torch.zeros(3, dtype=torch.int32)
    with pytest.raises(InvalidArgumentError, match=r"layout: expected bf16 or .* or split_indexer, got fp8"):
        unpack_entries(pages, slots, "fp8", 64)
    with pytest.raises(InvalidArgumentError, match=r"pages columns .bytes.: expected at least 37440, got 37439"):
        unpack_entries(pages, slots, "fp8_ds_mla", 64)
    with pytest.raises(InvalidArgumentError, match="entries_per_page: expected 1 to"):
        unpack_entries(pages, slots, "fp8_ds_mla", 0)
    with pytest.raises(InvalidArgumentError, match="pages: expected rows aligned to 8 bytes"):
        unpack_entries(pages, slots, "fp8_ds_mla", 63)


def test_tensors_that_a_layout_does_not_have() -> None:
    pages, slots = torch.zeros(2, 37_440, dtype=torch.uint8), torch.zeros(3, dtype=torch.int32)
    fp8, scales = torch.zeros(2, 4, 448, dtype=torch.float8_e4m3fn), torch.zeros(2, 4)
    rope = torch.zeros(2, 4, 64, dtype=torch.bfloat16)
    with pytest.raises(InvalidArgumentError, match="scales: must be omitted for a layout whose pages hold them"):
        unpack_entries(pages, slots, "fp8_ds_mla", 64, scales=scales)
    with pytest.raises(InvalidArgumentError, match="rope: must be omitted for a layout"):
        unpack_entries(pages, slots, "fp8_ds_mla", 64, rope=rope)
    with pytest.raises(InvalidArgumentError, match="scales: expected"):
        unpack_entries(fp8, slots, "split", 4, rope=rope)
    with pytest.raises(InvalidArgumentError, match="rope: expected"):
        unpack_entries(fp8, slots, "split", 4, scales=scales)
    with pytest.raises(InvalidArgumentError, match=r"rope: expected shape .2, 4, 64."):
        unpack_entries(fp8, slots, "split", 4, scales=scales, rope=rope[:, :, :60].contiguous())
    assert unpack_entries(fp8, slots, "split", 4, scales=scales, rope=rope).shape == (3, 512)
