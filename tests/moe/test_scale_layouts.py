"""Swizzles and assembly of block scales, against the layout's formula and its inverse."""

from __future__ import annotations

import pytest
import torch
from dsv4_kernels.cases import is_poison, poison
from dsv4_kernels.errors import InvalidArgumentError
from dsv4_kernels.moe import (
    assemble_raw_scales_2d3d_2d_side,
    assemble_raw_scales_2d3d_3d_side,
    assemble_scales_2d_side,
    assemble_scales_3d_side,
    blackwell_swizzle_32_4_4,
    blackwell_unswizzle_32_4_4,
    pad_and_swizzle_single,
)
from hypothesis import given, settings
from hypothesis import strategies as st

DTYPES = [torch.uint8, torch.float8_e4m3fn, torch.float8_e8m0fnu]


def byte_at(row: int, column: int, columns: int) -> int:
    """The issue's formula, one scale at a time."""
    tiles_across = (columns + 3) // 4
    return ((row // 128) * tiles_across + column // 4) * 512 + (row % 32) * 16 + ((row % 128) // 32) * 4 + column % 4


def random_bytes(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def swizzled_by_hand(scales: torch.Tensor) -> torch.Tensor:
    rows, columns = scales.shape
    flat = torch.zeros((rows + 127) // 128 * 128 * ((columns + 3) // 4 * 4), dtype=torch.uint8)
    for row in range(rows):
        for column in range(columns):
            flat[byte_at(row, column, columns)] = scales[row, column]
    return flat


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 1), (127, 3), (128, 4), (129, 5), (31, 16), (200, 20), (33, 48), (40, 131)]
)
def test_every_byte_is_where_the_formula_says(rows: int, columns: int, dtype: torch.dtype, device: str) -> None:
    scales = random_bytes(rows, columns)
    out = poison(torch.empty((rows + 127) // 128 * 128, (columns + 3) // 4 * 4, dtype=torch.uint8, device=device))
    result = blackwell_swizzle_32_4_4(scales.view(dtype).to(device), out=out.view(dtype))
    assert result.dtype == dtype
    assert torch.equal(out.flatten().cpu(), swizzled_by_hand(scales))


@pytest.mark.parametrize("offset", [0, 1, 4, 8])
@pytest.mark.parametrize("stride", [64, 67, 68, 80])
def test_strided_rows(offset: int, stride: int, device: str) -> None:
    """Every width of access: the inverse writes only the matrix, not what lies between its rows."""
    wide = random_bytes(130, stride).to(device)
    scales = wide[:, offset : offset + 48]
    swizzled = blackwell_swizzle_32_4_4(scales)
    assert torch.equal(swizzled.flatten().cpu(), swizzled_by_hand(scales.cpu()))
    back = poison(torch.empty(130, stride, dtype=torch.uint8, device=device))
    blackwell_unswizzle_32_4_4(swizzled, 130, 48, out=back[:, offset : offset + 48])
    assert torch.equal(back[:, offset : offset + 48], scales)
    assert is_poison(back[:, :offset]).all()
    assert is_poison(back[:, offset + 48 :]).all()


def test_batched_and_strided_matrices(device: str) -> None:
    wide = random_bytes(3, 140, 64).to(device)
    scales = wide[:, 2:135, :16]
    swizzled = blackwell_swizzle_32_4_4(scales)
    assert swizzled.shape == (3, 256, 16)
    for matrix, result in zip(scales, swizzled, strict=True):
        assert torch.equal(result.flatten().cpu(), swizzled_by_hand(matrix.cpu()))
    assert torch.equal(blackwell_unswizzle_32_4_4(swizzled, 133, 16), scales)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 3), st.integers(0, 300), st.integers(0, 40), st.integers(0, 2**31))
def test_unswizzle_inverts_swizzle(matrices: int, rows: int, columns: int, seed: int) -> None:
    shape = (matrices, rows, columns) if matrices else (rows, columns)
    scales = random_bytes(*shape, seed=seed)
    swizzled = blackwell_swizzle_32_4_4(scales)
    assert torch.equal(blackwell_unswizzle_32_4_4(swizzled, rows, columns), scales)
    assert swizzled.sum(dtype=torch.int64) == scales.sum(dtype=torch.int64)  # what is not a scale is zero


@pytest.mark.parametrize("dtype", DTYPES)
def test_pad_and_swizzle_single(dtype: torch.dtype) -> None:
    scales = random_bytes(10, 6)
    assert torch.equal(pad_and_swizzle_single(scales.view(dtype)).view(torch.uint8), swizzled_by_hand(scales))
    by_columns = scales.T.contiguous().T
    assert torch.equal(pad_and_swizzle_single(by_columns.view(dtype)).view(torch.uint8), swizzled_by_hand(scales))
    with pytest.raises(InvalidArgumentError, match="pad_and_swizzle_single: scale: expected rank 2, got rank 3"):
        pad_and_swizzle_single(scales[None])


@pytest.mark.parametrize("dtype", DTYPES)
def test_both_orders_of_the_weights_scales(dtype: torch.dtype) -> None:
    """Checkpoint order [N, K / group] and the quantiser's [K / group, N] end in the same bytes, list or stack."""
    scales = random_bytes(3, 130, 7)
    expected = torch.stack([swizzled_by_hand(matrix) for matrix in scales])
    by_n = [matrix.view(dtype) for matrix in scales]
    by_k = [matrix.T.contiguous().view(dtype) for matrix in scales]
    stack = scales.transpose(1, 2).contiguous().view(dtype)
    for assembled in (
        assemble_raw_scales_2d3d_3d_side(by_n),
        assemble_raw_scales_2d3d_3d_side(scales.view(dtype)),
        assemble_scales_3d_side(by_k),
        assemble_scales_3d_side(stack),
    ):
        assert assembled.dtype == dtype
        assert torch.equal(assembled.view(torch.uint8), expected)


def test_assembly_refuses_unequal_experts() -> None:
    with pytest.raises(InvalidArgumentError, match=r"all of one shape, got \[\(2, 3\), \(3, 3\)\]"):
        assemble_scales_3d_side([random_bytes(2, 3), random_bytes(3, 3)])
    with pytest.raises(InvalidArgumentError, match="got none"):
        assemble_raw_scales_2d3d_3d_side([])
    with pytest.raises(InvalidArgumentError, match="got none"):
        assemble_raw_scales_2d3d_2d_side([])


def offsets(counts: list[int], multiple: int = 1) -> torch.Tensor:
    padded = torch.tensor([0] + [-(-count // multiple) * multiple for count in counts], dtype=torch.int32)
    return padded.cumsum(0, dtype=torch.int32)


@pytest.mark.parametrize("counts", [[5], [0, 129, 0, 1], [128, 3, 0], [0, 0], [1] * 9])
@pytest.mark.parametrize("columns", [3, 8, 32])
def test_activation_side_by_device_offsets(counts: list[int], columns: int, device: str) -> None:
    """As the host's assembly, from offsets on the device, with room for more."""
    scales = random_bytes(sum(counts), columns).to(device)
    starts, padded = offsets(counts).to(device), offsets(counts, 128).to(device)
    rows = int(padded[-1]) + 128
    result = assemble_scales_2d_side(scales, starts, padded, rows)
    host = assemble_raw_scales_2d3d_2d_side(list(scales.split(counts)))
    assert torch.equal(result[: host.shape[0]], host)
    assert not result[host.shape[0] :].any()


def test_activation_side_survives_bad_offsets(device: str) -> None:
    """Nothing is read out of bounds (the emulator and compute-sanitizer look); what has no row is zero."""
    scales = random_bytes(40, 4).to(device)
    wild = [
        ([-7, 10, 500], [0, 128, 256]),
        ([0, 2**31 - 1, -(2**31)], [0, 128, 256]),
        ([0, 20, 40], [256, 0, -128]),
        ([0, 20, 40], [-(2**31), 2**31 - 1, 0]),
        ([40, 20, 0], [128, 256, 2**31 - 1]),
    ]
    for starts, padded in wild:
        given_offsets = [torch.tensor(values, dtype=torch.int32, device=device) for values in (starts, padded)]
        result = assemble_scales_2d_side(scales, *given_offsets, 256)
        plain = blackwell_unswizzle_32_4_4(result, 256, 4)
        rows = {tuple(row) for row in scales.tolist()} | {(0, 0, 0, 0)}
        assert {tuple(row) for row in plain.tolist()} <= rows


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda s: blackwell_swizzle_32_4_4(s.to(torch.int32)), "scales: expected dtype uint8 or float8_e4m3fn or"),
        (lambda s: blackwell_swizzle_32_4_4(s[0]), "scales: expected shape"),
        (lambda s: blackwell_swizzle_32_4_4(s.T), "scales: expected contiguous rows"),
        (lambda s: blackwell_swizzle_32_4_4(s, out=s), r"out: expected shape \[128, 8\], got \[6, 8\]"),
        (
            lambda s: blackwell_swizzle_32_4_4(s, out=torch.empty(1032, dtype=torch.uint8)[8:].view(128, 8)),
            "out: expected data on a multiple of 16 bytes, got",
        ),
        (
            lambda s: blackwell_swizzle_32_4_4(s, out=torch.empty(128, 8).to(torch.float8_e4m3fn)),
            "out: expected dtype uint8, got float8_e4m3fn",
        ),
        (lambda s: blackwell_unswizzle_32_4_4(s, -1, 8), "rows: expected 0 to 2147483647, got -1"),
        (lambda s: blackwell_unswizzle_32_4_4(s, 6, 8), r"swizzled: expected shape \[128, 8\], got \[6, 8\]"),
        (
            lambda s: blackwell_unswizzle_32_4_4(torch.zeros(128, 8, dtype=torch.uint8), 5, 8, out=s),
            r"out: expected shape \[5, 8\], got \[6, 8\]",
        ),
        (
            lambda s: assemble_scales_2d_side(s, offsets([6]), offsets([6], 128), 100),
            "padded_rows: expected a multiple of 128, got 100",
        ),
        (
            lambda s: assemble_scales_2d_side(s, offsets([6]), offsets([6, 1], 128), 128),
            r"padded_offsets: expected shape \[2\], got \[3\]",
        ),
        (
            lambda s: assemble_scales_2d_side(s, offsets([]), offsets([]), 128),
            r"expert_offsets entries \(experts \+ 1\): expected 2 to",
        ),
    ],
)
def test_refusals(call: object, text: str) -> None:
    scales = torch.zeros(6, 8, dtype=torch.uint8)
    with pytest.raises(InvalidArgumentError, match=text):
        call(scales)  # type: ignore[operator]
