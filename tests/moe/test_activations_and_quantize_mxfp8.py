"""squared_relu_and_quantize_mxfp8, swiglu_and_quantize_mxfp8: codes and scales to the bit, and what is left alone."""

from __future__ import annotations

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from dsv4_kernels.cases import is_poison, poison
from dsv4_kernels.errors import InvalidArgumentError
from dsv4_kernels.moe import (
    MXFP8Tensor,
    padded_squared_relu,
    padded_swiglu,
    quantize_mxfp8,
    squared_relu_and_quantize_mxfp8,
    swiglu_and_quantize_mxfp8,
)

E4M3_NAN, E8M0_NAN = 0x7F, 0xFF


def everyone(rows: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.arange(rows, dtype=torch.int32, device=device),
        torch.tensor(rows, dtype=torch.int32, device=device),
    )


def scale_of(largest: float) -> int:
    """The recipe in exact arithmetic: the least e with 2^(e - 127) >= largest / 448, from 1 on; 0 for 0."""
    if largest == 0:
        return 0
    quotient = Fraction(largest) / 448
    e = max(1, math.frexp(largest)[1] + 127 - 11)  # below any that is enough
    while Fraction(2) ** (e - 127) < quotient:
        e += 1
    return e


def expected(value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and row-major scales of bfloat16 values, by ml_dtypes' conversion and exact scales."""
    groups = value.to(torch.float64).unflatten(1, (-1, 32))
    known: dict[float, int] = {}
    largest = groups.abs().amax(dim=2)
    scale = torch.tensor(
        [[known.setdefault(v, scale_of(v)) for v in row] for row in largest.tolist()], dtype=torch.int64
    ).reshape(largest.shape)
    quotients = (groups * torch.exp2(127.0 - scale.to(torch.float64))[..., None]).flatten(1)
    codes = quotients.numpy().astype(np.float32).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    return torch.from_numpy(codes), scale.to(torch.uint8)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8).cpu()


def assert_quantised(result: MXFP8Tensor, value: torch.Tensor) -> None:
    codes, scale = expected(value)
    assert torch.equal(as_bytes(result.data), codes)
    assert torch.equal(as_bytes(result.scales()), scale)


def test_every_amax_of_bfloat16(device: str) -> None:
    """Each group's largest value is the square of another bfloat16; all squares that are finite, tiny ones included."""
    positive = torch.arange(0x7F80, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    positive = positive[(positive.to(torch.float64) ** 2) < 3.38e38]
    positive = positive[: positive.numel() // 32 * 32].reshape(-1, 8)
    generator = torch.Generator().manual_seed(5)
    x = positive.repeat_interleave(32, dim=1)
    smaller = x.to(torch.float32) * torch.rand(x.shape, generator=generator)
    lane = torch.randint(32, positive.shape, generator=generator)
    largest = torch.nn.functional.one_hot(lane, 32).to(torch.bool).flatten(1)
    x = torch.where(largest, x, smaller.to(torch.bfloat16))
    result = squared_relu_and_quantize_mxfp8(x.to(device), *everyone(x.shape[0], device))
    square = padded_squared_relu(x, *everyone(x.shape[0], "cpu")) if device == "cuda" else None
    square = (x.to(torch.float32) ** 2).to(torch.bfloat16) if square is None else square
    assert_quantised(result, square)


@pytest.mark.parametrize("columns", [32, 96, 128, 160, 288, 1856])
@pytest.mark.parametrize(("rows", "used"), [(1, 1), (127, 127), (129, 70), (300, 130), (140, 0)])
def test_only_used_rows(rows: int, used: int, columns: int, device: str) -> None:
    """Data of other rows is left alone; their scales, and the padding's, are zero."""
    generator = torch.Generator().manual_seed(rows * columns)
    x = torch.randn(rows, columns, generator=generator).to(torch.bfloat16)
    mapping = torch.randint(-1, 3, (rows,), generator=generator, dtype=torch.int32)
    data = poison(torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=device))
    padded = (rows + 127) // 128 * 128, (columns // 32 + 3) // 4 * 4
    scale = poison(torch.empty(padded, dtype=torch.float8_e8m0fnu, device=device))
    n_used = torch.tensor(used, dtype=torch.int32, device=device)
    result = squared_relu_and_quantize_mxfp8(x.to(device), mapping.to(device), n_used, out_data=data, out_scale=scale)
    assert result.data.data_ptr() == data.data_ptr()
    held = (torch.arange(rows) < used) & (mapping >= 0)
    codes, scales = expected((x[held].to(torch.float32).relu() ** 2).to(torch.bfloat16))
    got = as_bytes(result.data)
    assert torch.equal(got[held], codes)
    assert is_poison(got[~held]).all()
    row_major = as_bytes(result.scales())
    assert torch.equal(row_major[held], scales)
    assert not row_major[~held].any()
    assert as_bytes(result.scale).sum(dtype=torch.int64) == scales.sum(dtype=torch.int64)  # the padding adds nothing


@pytest.mark.parametrize("limit", [None, 10.0])
def test_swiglu_is_quantised_as_its_unfused_form(limit: float | None, device: str) -> None:
    """The same bits as quantising what padded_swiglu writes on the same device."""
    generator = torch.Generator().manual_seed(8)
    x = (6 * torch.randn(70, 2 * 320, generator=generator)).to(torch.bfloat16).to(device)
    x[3, :32] = 0  # groups of zeros, of both signs
    x[4, :32] = -0.0
    value = padded_swiglu(x, *everyone(70, device), limit).cpu()
    assert_quantised(swiglu_and_quantize_mxfp8(x, *everyone(70, device), limit), value)


def test_same_bits_as_quantize_mxfp8(device: str) -> None:
    """The fused op, and the unfused one followed by quantize_mxfp8."""
    x = torch.randn(37, 288, generator=torch.Generator().manual_seed(9)).to(torch.bfloat16).to(device)
    value = padded_squared_relu(x, *everyone(37, device))
    codes, scale = quantize_mxfp8(value, swizzle=True)
    result = squared_relu_and_quantize_mxfp8(x, *everyone(37, device))
    assert torch.equal(as_bytes(result.data), as_bytes(codes))
    assert torch.equal(as_bytes(result.scale), as_bytes(scale))


def test_dequantize(device: str) -> None:
    x = torch.randn(140, 96, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    result = squared_relu_and_quantize_mxfp8(x.to(device), *everyone(140, device))
    square = x.to(torch.float64).relu() ** 2
    codes, scale = expected((x.to(torch.float32).relu() ** 2).to(torch.bfloat16))
    values = torch.from_numpy(codes.numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float64))
    values *= torch.exp2(scale.to(torch.float64) - 127).repeat_interleave(32, dim=1)
    assert torch.equal(result.dequantize(torch.float64).cpu(), values)
    assert result.dequantize().dtype == torch.float32
    largest = square.unflatten(1, (-1, 32)).amax(dim=2).repeat_interleave(32, dim=1)
    assert ((result.dequantize().cpu() - square).abs() <= largest / 14).all()  # half a step of e4m3 at the top


def test_what_is_no_number(device: str) -> None:
    """NaN and infinity take their group with them, scale and codes."""
    x = torch.full((3, 64), 2.0).to(torch.bfloat16)
    x[0, 5] = math.nan
    x[1, 40] = math.inf
    x[2, :32] = math.nan
    result = squared_relu_and_quantize_mxfp8(x.to(device), *everyone(3, device))
    codes, scales = as_bytes(result.data), as_bytes(result.scales())
    four, of_four = 0x78, scale_of(4.0)  # 4 / 2^-6 = 256
    assert scales.tolist() == [[E8M0_NAN, of_four], [of_four, E8M0_NAN], [E8M0_NAN, of_four]]
    plain = torch.full((3, 64), four, dtype=torch.uint8)
    plain[0, :32] = E4M3_NAN
    plain[1, 32:] = E4M3_NAN
    plain[2, :32] = E4M3_NAN
    assert torch.equal(codes, plain)
    values = result.dequantize().cpu()
    assert torch.equal(values.isnan(), plain == E4M3_NAN)
    assert (values[~values.isnan()] == 4).all()


def test_swiglu_that_is_no_number(device: str) -> None:
    x = torch.ones(2, 128).to(torch.bfloat16)
    x[0, 3], x[1, 64 + 33] = math.nan, math.inf
    free = swiglu_and_quantize_mxfp8(x.to(device), *everyone(2, device))
    groups = as_bytes(free.data).unflatten(1, (2, 32)) == E4M3_NAN
    assert groups.all(dim=2).tolist() == groups.any(dim=2).tolist() == [[True, False], [False, True]]
    assert (as_bytes(free.scales()) == E8M0_NAN).tolist() == [[True, False], [False, True]]
    clamped = swiglu_and_quantize_mxfp8(x.to(device), *everyone(2, device), 10.0)
    assert (as_bytes(clamped.data) == E4M3_NAN).nonzero().tolist() == [[0, column] for column in range(32)]
    assert (as_bytes(clamped.scales()) == E8M0_NAN).tolist() == [[True, False], [False, False]]


def test_strided_and_unaligned_rows(device: str) -> None:
    wide = torch.randn(40, 400, generator=torch.Generator().manual_seed(4)).to(torch.bfloat16)
    for offset in (0, 16, 3):
        x = wide[:, offset : offset + 160]
        square = (x.to(torch.float32).relu() ** 2).to(torch.bfloat16)
        strided = wide.to(device)[:, offset : offset + 160]
        assert_quantised(squared_relu_and_quantize_mxfp8(strided, *everyone(40, device)), square)
        both = wide.to(device)[:, offset : offset + 320]
        unfused = padded_swiglu(both, *everyone(40, device)).cpu()
        assert_quantised(swiglu_and_quantize_mxfp8(both, *everyone(40, device)), unfused)


@pytest.mark.parametrize("value", [-5, 2**31 - 1, -(2**31)])
def test_n_used_outside_the_rows(value: int, device: str) -> None:
    x = torch.ones(130, 32, dtype=torch.bfloat16, device=device)
    mapping, _ = everyone(130, device)
    scale = poison(torch.empty(256, 4, dtype=torch.uint8, device=device))
    n_used = torch.tensor([value], dtype=torch.int32, device=device)
    squared_relu_and_quantize_mxfp8(x, mapping, n_used, out_scale=scale)
    assert int((scale != 0).sum()) == (130 if value > 0 else 0)


@pytest.mark.parametrize("rows", [0, 3])
def test_empty(rows: int, device: str) -> None:
    x = torch.zeros(rows, 0 if rows else 64, dtype=torch.bfloat16, device=device)
    result = squared_relu_and_quantize_mxfp8(x, *everyone(rows, device))
    assert result.data.shape == x.shape
    assert result.scale.numel() == 0
    assert result.dequantize().shape == x.shape


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"x": torch.zeros(4, 48, dtype=torch.bfloat16)}, "x columns: expected a multiple of 32, got 48"),
        ({"out_data": torch.empty(4, 32)}, "out_data: expected dtype uint8 or float8_e4m3fn, got float32"),
        (
            {"out_scale": torch.empty(4, 1, dtype=torch.uint8)},
            r"out_scale: expected shape \[128, 4\], got \[4, 1\]",
        ),
        (
            {"out_scale": torch.empty(520, dtype=torch.uint8)[8:].view(128, 4)},
            "out_scale: expected data on a multiple of 16 bytes, got 8",
        ),
        (
            {"out_data": torch.empty(136, dtype=torch.uint8)[8:].view(4, 32)},
            "out_data: expected rows aligned to 16 bytes",
        ),
    ],
)
def test_refusals(changes: dict[str, torch.Tensor], text: str) -> None:
    mapping, n_used = everyone(4, "cpu")
    given = {"x": torch.zeros(4, 64, dtype=torch.bfloat16)[:, :32], "permutation_map": mapping, "n_used": n_used}
    with pytest.raises(InvalidArgumentError, match=f"squared_relu_and_quantize_mxfp8: {text}"):
        squared_relu_and_quantize_mxfp8(**given | changes)
    with pytest.raises(InvalidArgumentError, match="expected a multiple of 64, got 96"):
        swiglu_and_quantize_mxfp8(torch.zeros(4, 96, dtype=torch.bfloat16), mapping, n_used)
