"""dsv4_kernels.number_formats against ml_dtypes and against the formats' definitions, over all codes."""

from __future__ import annotations

import math
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
import torch
from dsv4_kernels import number_formats as formats

FLOAT4_VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def all_bfloat16() -> torch.Tensor:
    """Every bfloat16 there is, NaNs included, as float32."""
    return torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).to(torch.float32)


def neighbours(values: torch.Tensor) -> torch.Tensor:
    """The float32 values, and the next ones on both sides, with both signs."""
    up, down = torch.tensor(math.inf), torch.tensor(-math.inf)
    near = torch.cat([values, torch.nextafter(values, up), torch.nextafter(values, down)])
    return torch.cat([near, -near])


def midpoints(decoded: list[float]) -> torch.Tensor:
    return torch.tensor([(a + b) / 2 for a, b in pairwise(decoded)])


def hard_values(decoded: list[float]) -> torch.Tensor:
    """Where a rounding can go wrong: the values, their midpoints, what lies next to them, and every bfloat16."""
    edges = [0.0, decoded[-1] * 1.0625, decoded[-1] * 1.1, 1e30, math.inf]
    return torch.cat(
        [neighbours(torch.tensor(decoded)), neighbours(midpoints(decoded)), torch.tensor(edges), all_bfloat16()]
    )


def as_ml_dtypes(values: torch.Tensor, kind: type, largest: float) -> torch.Tensor:
    """Codes by ml_dtypes, of values saturated before, as its conversions overflow to NaN."""
    with np.errstate(invalid="ignore"):
        return torch.from_numpy(np.clip(values.numpy(), -largest, largest).astype(kind).view(np.uint8))


def test_largest_magnitude_keeps_nan() -> None:
    rows = torch.tensor([[1.0, -3.0, math.nan], [math.nan, math.nan, math.nan], [-math.inf, 2.0, math.nan]])
    assert formats.largest_magnitude(rows).isnan().all()
    assert formats.largest_magnitude(rows[:, :2].nan_to_num(nan=0.0, neginf=-math.inf)).tolist() == [3.0, 0.0, math.inf]
    assert formats.ceil_e8m0_of_amax(torch.tensor([math.nan, 0.0, 12.0]), 6.0, 6.0).tolist() == [255, 127, 128]


def test_e2m1_codes() -> None:
    values = hard_values(FLOAT4_VALUES)
    values = values[~values.isnan()]
    codes = formats.encode_e2m1(values)
    assert torch.equal(codes, as_ml_dtypes(values, ml_dtypes.float4_e2m1fn, 6.0) & 15)


def test_e2m1_of_nan_and_infinity() -> None:
    values = torch.tensor([math.nan, -math.nan, math.inf, -math.inf, -0.0, -0.1])
    for ties_to_even in (True, False):
        assert formats.encode_e2m1(values, ties_to_even=ties_to_even).tolist() == [7, 7, 7, 15, 8, 8]


def test_e2m1_ties_toward_zero() -> None:
    """Only the midpoints differ from the other rule, and they take the smaller value."""
    values = hard_values(FLOAT4_VALUES)
    even, zero = formats.encode_e2m1(values), formats.encode_e2m1(values, ties_to_even=False)
    tie = torch.isin(values.abs(), midpoints(FLOAT4_VALUES))
    assert torch.equal(even[~tie], zero[~tie])
    below = [max(i for i, value in enumerate(FLOAT4_VALUES) if value < x) for x in values[tie].abs().tolist()]
    assert (zero[tie] & 7).tolist() == below


def test_e2m1_values() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    table = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    expected = torch.from_numpy(table)[codes.to(torch.int64) & 15]
    assert torch.equal(formats.decode_e2m1(codes).view(torch.int32), expected.view(torch.int32))


def test_packing_puts_the_even_element_in_the_low_nibble() -> None:
    codes = torch.tensor([[1, 2, 3, 4], [15, 0, 0, 15]], dtype=torch.uint8)
    packed = formats.pack_e2m1(codes)
    assert packed.tolist() == [[0x21, 0x43], [0x0F, 0xF0]]
    assert torch.equal(formats.unpack_e2m1(packed), codes)
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(formats.pack_e2m1(formats.unpack_e2m1(every)), every)


def test_e4m3_codes() -> None:
    decoded = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32).tolist()
    values = hard_values(decoded)
    values = values[~values.isnan()]
    assert torch.equal(formats.encode_e4m3(values), as_ml_dtypes(values, ml_dtypes.float8_e4m3fn, 448.0))
    assert formats.encode_e4m3(torch.tensor([math.nan, -math.nan])).tolist() == [0x7F, 0x7F]


def test_e4m3_values() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    expected = torch.from_numpy(codes.numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32))
    assert torch.equal(formats.decode_e4m3(codes).isnan(), expected.isnan())
    assert torch.equal(formats.decode_e4m3(codes).nan_to_num(), expected.nan_to_num())
    assert torch.equal(formats.encode_e4m3(formats.decode_e4m3(codes))[codes != 255], codes[codes != 255])


def test_e8m0_values() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    expected = torch.from_numpy(codes.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32))
    assert torch.equal(formats.decode_e8m0(codes)[:255], expected[:255])
    assert torch.equal((formats.decode_e8m0(codes) * formats.reciprocal_e8m0(codes))[:255], torch.ones(255))
    assert formats.decode_e8m0(codes[255:]).isnan().all()
    assert formats.reciprocal_e8m0(codes[255:]).isnan().all()


def ceil_of_logarithm(numerator: int, denominator: int) -> int:
    """ceil(log2(numerator / denominator)), exactly."""
    exponent = numerator.bit_length() - denominator.bit_length() - 1
    while numerator << max(-exponent, 0) > denominator << max(exponent, 0):
        exponent += 1
    return exponent


@pytest.mark.parametrize(("floor", "largest"), [(0.0, 448), (1e-4, 448), (6 * 2.0**-126, 6)])
def test_scale_of_every_bfloat16_amax(floor: float, largest: int) -> None:
    """2^ceil(log2(max(amax, floor) / largest)), against integers of any size."""
    amax = all_bfloat16()
    amax = amax[(amax >= 0) & amax.isfinite() & ~amax.signbit()]
    floor = torch.tensor(floor).item()  # as the kernels have it, in float32
    got = formats.ceil_e8m0_of_amax(amax, floor, largest).tolist()
    for value, byte in zip(amax.tolist(), got, strict=True):
        numerator, denominator = max(value, floor).as_integer_ratio()
        if numerator == 0:
            assert byte == 0
        else:
            assert byte == max(ceil_of_logarithm(numerator, denominator * largest) + 127, 1), value


def test_scale_of_every_bfloat16_amax_by_the_reciprocal() -> None:
    """Engines that multiply by 1/448 in float32 get the same byte."""
    amax = all_bfloat16()
    amax = amax[(amax >= 0) & amax.isfinite()]
    divided = formats.ceil_e8m0_of_amax(amax, 0.0, 448.0)
    assert torch.equal(divided, formats.ceil_e8m0(amax * torch.tensor(1 / 448, dtype=torch.float32)))


def test_ceil_e8m0_edges() -> None:
    values = torch.tensor([0.0, 2.0**-149, 2.0**-127, 2.0**-126, 1.0, 2.0, 2.0**127, math.inf, math.nan])
    up = torch.nextafter(values[3:7], torch.tensor(math.inf))
    assert formats.ceil_e8m0(values).tolist() == [0, 1, 1, 1, 127, 128, 254, 255, 255]
    assert formats.ceil_e8m0(up).tolist() == [2, 128, 129, 255]


@pytest.mark.parametrize("exponent", [formats.E2M1_EXPONENT, formats.E4M3_EXPONENT])
def test_floor_e8m0(exponent: int) -> None:
    amax = all_bfloat16()
    amax = amax[(amax >= 2.0**-100) & amax.isfinite()]
    expected = [math.frexp(value)[1] - 1 - exponent + 127 for value in amax.tolist()]
    assert formats.floor_e8m0(amax, exponent).tolist() == expected
    edges = torch.tensor([0.0, 2.0**-126, math.inf, math.nan])
    assert formats.floor_e8m0(edges, exponent).tolist() == [0, 0, 255, 255]
