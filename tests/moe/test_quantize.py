"""Quantising ops: every code, every scale, and inputs that are meant to break them."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from dsv4_kernels import moe
from dsv4_kernels.cases import is_poison, poison, same_bits
from dsv4_kernels.errors import InvalidArgumentError
from dsv4_kernels.moe.quantize import NVFP4_AMAX_FLOOR

FLOAT4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu().contiguous().view(torch.uint8)


def e4m3_codes(values: np.ndarray[Any, Any]) -> torch.Tensor:
    """By ml_dtypes, saturated."""
    return torch.from_numpy(np.clip(values, -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8))


def random_rows(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator).to(torch.bfloat16)


def finite_bfloat16() -> torch.Tensor:
    """Every bfloat16 from 0 to the largest: 32640 of them."""
    return torch.arange(0x7F80, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def blocks_of_amax(group: int) -> torch.Tensor:
    """[128, 255 * group]: a group for every finite bfloat16, which is its largest magnitude, with either sign."""
    amax = finite_bfloat16()
    x = torch.zeros(len(amax), group, dtype=torch.bfloat16)
    sign = 1 - 2 * (torch.arange(len(amax)) % 2)
    x[torch.arange(len(amax)), torch.arange(len(amax)) % group] = amax * sign
    x[:, (group - 1) // 2] = torch.where(x[:, (group - 1) // 2] == 0, amax / 4, x[:, (group - 1) // 2])
    return x.reshape(128, -1)


# Scales, over all amax.


@pytest.mark.parametrize("global_scale", [1.0, 2.0**-40, 0.013])
def test_nvfp4_scale_of_every_bfloat16_amax(global_scale: float, device: str) -> None:
    x = blocks_of_amax(16)
    scale = torch.tensor([global_scale])
    _, got = moe.quantize_nvfp4(x.to(device), scale.to(device))
    encode = np.float32(1) / scale.numpy()[0]
    with np.errstate(over="ignore"):
        wanted = encode * (finite_bfloat16().to(torch.float32).numpy() * np.float32(1 / 6))
    assert torch.equal(as_bytes(got).flatten(), e4m3_codes(wanted))


@pytest.mark.parametrize(("form", "largest"), [("e4m3", 448), ("e2m1", 6)])
def test_mx_scale_of_every_bfloat16_amax(form: str, largest: int, device: str) -> None:
    """The least power of two with which nothing saturates, in exact arithmetic."""
    data, got = moe.quantize_mx(blocks_of_amax(32).to(device), element_format=form)
    scale = as_bytes(got).flatten().to(torch.float64)
    amax = finite_bfloat16().to(torch.float64)
    floored = torch.maximum(amax, torch.tensor(6 * 2.0**-126 if form == "e2m1" else 0.0, dtype=torch.float64))
    limit = torch.exp2(scale - 127) * largest
    normal = scale > 1
    assert (floored <= limit).all()
    assert (floored[normal] > limit[normal] / 2).all()
    assert torch.equal(scale == 0, floored == 0)
    values = np.abs(moe_values(data, form))
    assert values.max() <= largest
    assert (values.max(axis=1)[scale.numpy() > 1] >= largest / 2).all()


def moe_values(data: torch.Tensor, form: str) -> np.ndarray[Any, Any]:
    """The values of codes in groups of 32, by ml_dtypes."""
    codes = as_bytes(data).numpy()
    if form == "e4m3":
        return codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32).reshape(-1, 32)
    return FLOAT4[np.stack([codes & 15, codes >> 4], axis=-1)].reshape(-1, 32)


@pytest.mark.parametrize(("form", "largest", "exponent"), [("e4m3", 448.0, 8), ("e2m1", 6.0, 2)])
@pytest.mark.parametrize("round_scale_up", [True, False])
def test_mx_amax_floor(form: str, largest: float, exponent: int, round_scale_up: bool, device: str) -> None:
    """Below the floor the scale is the floor's, above it the group's own; whichever way it is rounded."""
    floor = 3.0
    x = torch.zeros(5, 32)
    x[:, 9] = torch.tensor([0.0, 1e-20, -2.9, 3.0, -24.0])
    _, scale = moe.quantize_mx(x.to(device), element_format=form, amax_floor=floor, round_scale_up=round_scale_up)
    amax = [max(floor, abs(value)) for value in x[:, 9].tolist()]
    if round_scale_up:
        powers = [math.ceil(math.log2(value / largest)) for value in amax]
    else:
        powers = [math.floor(math.log2(value)) - exponent for value in amax]
    assert as_bytes(scale).flatten().tolist() == [power + 127 for power in powers]


# Codes, all of them.


@pytest.mark.parametrize("swizzle", [False, True])
def test_every_fp4_code_and_e4m3_scale(swizzle: bool, device: str) -> None:
    data = torch.arange(256, dtype=torch.uint8).expand(256, 256).contiguous()
    scale = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 32).contiguous()
    codes = data.numpy()
    values = FLOAT4[np.stack([codes & 15, codes >> 4], axis=-1)].reshape(256, 512)
    expected = values * np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)[:, None]
    given = moe.blackwell_swizzle_32_4_4(scale) if swizzle else scale
    got = moe.dequantize_nvfp4(data.to(device), given.to(device), 1.0, swizzle=swizzle, dtype=torch.float32).cpu()
    assert np.array_equal(got.numpy(), expected, equal_nan=True)


@pytest.mark.parametrize("form", ["e4m3", "e2m1"])
def test_every_code_and_e8m0_scale(form: str, device: str) -> None:
    columns = 256 if form == "e4m3" else 512
    data = torch.arange(256, dtype=torch.uint8).expand(256, 256).contiguous()
    scale = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, columns // 32).contiguous()
    function = moe.dequantize_mxfp8 if form == "e4m3" else moe.dequantize_mxfp4
    got = function(data.to(device), scale.to(device), dtype=torch.float32).cpu().numpy()
    powers = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    with np.errstate(over="ignore"):
        expected = moe_values(data, form).reshape(256, -1) * powers[:, None]
    assert np.array_equal(got, expected, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_values_of_codes_are_encoded_as_those_codes(dtype: torch.dtype, device: str) -> None:
    """With 6 or 448 in each block, all values of the format are exact."""
    four = torch.tensor([*FLOAT4.tolist()]).to(dtype)
    x = torch.stack([four.roll(i) for i in range(16)])
    data, scale = moe.quantize_nvfp4(x.to(device), torch.ones(1, device=device))
    assert (as_bytes(scale) == 0x38).all()
    codes = as_bytes(data).numpy()
    assert np.array_equal(FLOAT4[np.stack([codes & 15, codes >> 4], axis=-1)].reshape(16, 16), x.float().numpy())
    data, scale = moe.quantize_mxfp4(x.reshape(8, 32).to(device))
    assert (as_bytes(scale) == 127).all()
    assert torch.equal(as_bytes(data).flatten(), torch.from_numpy(codes).flatten())
    eight = torch.arange(256, dtype=torch.uint8)
    eight[[0x7F, 0xFF]] = 0x7E
    x = torch.stack([eight.view(torch.float8_e4m3fn).float().to(dtype), torch.full((256,), 448.0, dtype=dtype)], dim=1)
    data, scale = moe.quantize_mxfp8(x.reshape(16, 32).to(device))
    assert (as_bytes(scale) == 127).all()
    exact = torch.ones(256, dtype=torch.bool)
    if dtype == torch.bfloat16:
        assert torch.equal(x[:, 0].float(), eight.view(torch.float8_e4m3fn).float())
    assert torch.equal(as_bytes(data).reshape(256, 2)[exact, 0], eight[exact])


@pytest.mark.parametrize("ties_to_even", [True, False])
def test_ties(ties_to_even: bool, device: str) -> None:
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]
    x = torch.tensor([ties + [-v for v in ties]])
    data, _ = moe.quantize_nvfp4(x.to(device), torch.ones(1, device=device), ties_to_even=ties_to_even)
    low = as_bytes(data)[0]
    codes = torch.stack([low & 15, low >> 4], dim=-1).flatten().tolist()
    expected = [0, 2, 2, 4, 4, 6, 6, 7] if ties_to_even else [0, 1, 2, 3, 4, 5, 6, 7]
    assert codes == expected + [code + 8 for code in expected]


# Error, in the large.


@pytest.mark.parametrize("swizzle", [False, True])
def test_nvfp4_error_is_half_a_step(swizzle: bool, device: str) -> None:
    """Against float64: a code is the nearest one under its scale, and the scale rounds up or down by 1/16 at most."""
    x = random_rows(130, 112)
    data, scale, global_scale = moe.quantize_nvfp4_gpu_fused(x.to(device), swizzle=swizzle)
    back = moe.dequantize_nvfp4(data, scale, global_scale, swizzle=swizzle, dtype=torch.float32).cpu().double()
    exact = x.double()
    amax = exact.abs().unflatten(1, (-1, 16)).amax(dim=2).repeat_interleave(16, dim=1)
    step = torch.where(exact.abs() > amax * 4 / 6 * 0.93, 2.0, torch.where(exact.abs() > amax / 3 * 0.93, 1.0, 0.5))
    # 1/16 of the largest value is lost where the scale was rounded down.
    assert ((back - exact).abs() <= amax / 6 * 1.07 * step / 2 + amax / 16).all()
    assert float((back - exact).square().mean().sqrt() / exact.square().mean().sqrt()) < 0.11


# The global scale.


@pytest.mark.parametrize("reciprocal", [False, True])
@pytest.mark.parametrize("mode", ["tensor", "token", "expert"])
def test_fused_equals_static_with_its_scale(mode: str, reciprocal: bool, device: str) -> None:
    x = random_rows(40, 96) * torch.arange(1, 41)[:, None].to(torch.bfloat16)
    ids = torch.randint(-2, 6, (40,), generator=torch.Generator().manual_seed(1), dtype=torch.int32).to(device)
    options = {"tensor": {}, "token": {"per_token": True}, "expert": {"expert_ids": ids, "experts": 4}}[mode]
    *fused, global_scale = moe.quantize_nvfp4_gpu_fused(x.to(device), reciprocal_global_scale=reciprocal, **options)
    experts = {"expert_ids": ids} if mode == "expert" else {}
    static = moe.quantize_nvfp4(x.to(device), global_scale, reciprocal_global_scale=reciprocal, **experts)
    assert all(same_bits(a, b) for a, b in zip(fused, static, strict=True))
    rows = x.float().abs().amax(dim=1)
    if mode == "tensor":
        amax = rows.max()[None]
    elif mode == "token":
        amax = rows
    else:
        members = [rows[ids.cpu() == e] for e in range(4)]
        amax = torch.stack([m.max() if len(m) else torch.tensor(NVFP4_AMAX_FLOOR) for m in members])
    range_ = np.float32(2688)
    expected = range_ / amax.numpy() if reciprocal else amax.numpy() / range_
    assert np.array_equal(global_scale.cpu().numpy(), expected)


def test_workspace_is_left_ready(device: str) -> None:
    """A call after one with larger values, on the same workspace."""
    for size in (100.0, 1.0):
        x = random_rows(9, 64) * size
        *_, scale = moe.quantize_nvfp4_gpu_fused(x.to(device))
        assert scale.item() == np.float32(x.float().abs().max()) / np.float32(2688)
        ids = torch.arange(9, dtype=torch.int32, device=device)
        *_, scale = moe.quantize_nvfp4_gpu_fused(x.to(device), expert_ids=ids, experts=9)
        assert np.array_equal(scale.cpu().numpy(), x.float().abs().amax(dim=1).numpy() / np.float32(2688))


def test_zeros_have_a_scale(device: str) -> None:
    x = torch.zeros(3, 32, device=device)
    data, scale, global_scale = moe.quantize_nvfp4_gpu_fused(x)
    assert global_scale.item() == 2.0**-110
    assert (as_bytes(data) == 0).all()
    assert (as_bytes(scale) == 0).all()
    data, scale, global_scale = moe.quantize_nvfp4_gpu_fused(x[:0])
    assert data.shape == (0, 16)
    assert global_scale.item() == 2.0**-110


# NaN and infinity.


def test_nvfp4_nan_and_infinity(device: str) -> None:
    x = torch.full((1, 64), 3.0)
    x[0, 5], x[0, 20], x[0, 37] = math.nan, math.inf, -math.inf
    data, scale = moe.quantize_nvfp4(x.to(device), torch.ones(1, device=device))
    back = moe.dequantize_nvfp4(data, scale, 1.0, dtype=torch.float32).cpu()[0]
    assert as_bytes(scale)[0].tolist() == [0x7F, 0x7E, 0x7E, 0x30]
    assert back[:16].isnan().all()
    assert (back[20], back[37]) == (6 * 448, -6 * 448)
    assert back[16:20].tolist() == [0.0] * 4
    assert back[48:].tolist() == [3.0] * 16
    *_, global_scale = moe.quantize_nvfp4_gpu_fused(x.to(device))
    assert global_scale.item() == np.finfo(np.float32).max / np.float32(2688)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def with_nans(dtype: torch.dtype, negative: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """[5, 544] with NaN in some of each row's 17 groups of 32 at every place of a group of 16, and which groups.

    The largest values are beside them.
    """
    x = random_rows(5, 544).to(dtype)
    spoilt = torch.zeros(5, 17, dtype=torch.bool)
    for row in range(4):
        for place, group in enumerate(range(row, 17, row + 2)):
            spoilt[row, group] = True
            x[row, 32 * group : 32 * group + 2] = 100.0
            x[row, 32 * group + (place + 4 * row) % 16] = -math.nan if negative else math.nan
    spoilt[4, 3] = True
    x[4, 96:128] = math.nan
    return x, spoilt


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("ties_to_even", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_takes_its_block_and_nothing_else(
    dtype: torch.dtype, ties_to_even: bool, negative: bool, device: str
) -> None:
    """Scale and codes of a block with a NaN; all others, and global scales, are as if that block held zeros."""
    x, of_32 = with_nans(dtype, negative)
    of_16 = of_32.repeat_interleave(2, dim=1)
    of_16[:4, 1::2] = False
    clean = torch.where(of_16.repeat_interleave(16, dim=1), 0, x)

    def of(x: torch.Tensor) -> dict[str, tuple[torch.Tensor, ...]]:
        x = x.to(device)
        ids = torch.tensor([1, 0, 1, 0, 0], dtype=torch.int32, device=device)
        ties = {"ties_to_even": ties_to_even}
        return {
            "static": moe.quantize_nvfp4(x, torch.full((1,), 0.01, device=device), **ties),
            "tensor": moe.quantize_nvfp4_gpu_fused(x, **ties),
            "token": moe.quantize_nvfp4_gpu_fused(x, per_token=True, **ties),
            "expert": moe.quantize_nvfp4_gpu_fused(x, expert_ids=ids, experts=2, **ties),
        }

    got, expected = of(x), of(clean)
    for name, (data, scale, *global_scale) in got.items():
        want_data, want_scale, *want_global_scale = expected[name]
        assert all(torch.equal(a, b) for a, b in zip(global_scale, want_global_scale, strict=True)), name
        want_scale = torch.where(of_16, 0x7F, as_bytes(want_scale))
        want_data = torch.where(of_16.repeat_interleave(8, dim=1), 0x77, as_bytes(want_data))
        assert torch.equal(as_bytes(scale), want_scale), name
        assert torch.equal(as_bytes(data), want_data), name
    clean = torch.where(of_32.repeat_interleave(32, dim=1), 0, x)
    for form, code, bytes_of_group in (("e4m3", 0x7F, 32), ("e2m1", 0x77, 16)):
        for up in (True, False):
            options = {"element_format": form, "round_scale_up": up, "ties_to_even": ties_to_even}
            data, scale = moe.quantize_mx(x.to(device), **options)
            want_data, want_scale = moe.quantize_mx(clean.to(device), **options)
            assert torch.equal(as_bytes(scale), torch.where(of_32, 0xFF, as_bytes(want_scale)))
            spoilt = of_32.repeat_interleave(bytes_of_group, dim=1)
            assert torch.equal(as_bytes(data), torch.where(spoilt, code, as_bytes(want_data)))


@pytest.mark.parametrize("round_to_bfloat16", [True, False])
def test_nan_of_swiglu(round_to_bfloat16: bool, device: str) -> None:
    """From the gate or from up, whatever the clamp."""
    x = torch.ones(3, 128)
    x[0, 5], x[1, 64 + 40] = math.nan, -math.nan
    options: dict[str, Any] = {"source": "swiglu", "limit": 10.0, "round_to_bfloat16": round_to_bfloat16}
    spoilt = torch.tensor([[True, False], [False, True], [False, False]])
    for form in ("e4m3", "e2m1"):
        _, scale = moe.quantize_mx(x.to(device), element_format=form, **options)
        assert torch.equal(as_bytes(scale) == 0xFF, spoilt)
    of_16 = torch.zeros(3, 4, dtype=torch.bool)
    of_16[0, 0] = of_16[1, 2] = True
    for fused in (False, True):
        if fused:
            _, scale, _ = moe.quantize_nvfp4_gpu_fused(x.to(device), **options)
        else:
            _, scale = moe.quantize_nvfp4(x.to(device), torch.full((1,), 0.01, device=device), **options)
        assert torch.equal(as_bytes(scale) == 0x7F, of_16)


def test_global_scale_of_nothing_but_nan(device: str) -> None:
    rows = torch.full((3, 32), math.nan)
    rows[1, 16:], rows[2, :16] = -2688.0, 2688.0
    *_, per_token = moe.quantize_nvfp4_gpu_fused(rows.to(device), per_token=True)
    assert per_token.tolist() == [2.0**-110, 1.0, 1.0]
    *_, of_all = moe.quantize_nvfp4_gpu_fused(rows[:1].to(device))
    assert of_all.tolist() == [2.0**-110]


def test_mx_infinity(device: str) -> None:
    x = torch.full((2, 32), 3.0)
    x[1, 7] = -math.inf
    for quantize, dequantize, finite in (
        (moe.quantize_mxfp8, moe.dequantize_mxfp8, 127 - 7),
        (moe.quantize_mxfp4, moe.dequantize_mxfp4, 126),
    ):
        data, scale = quantize(x.to(device))
        assert as_bytes(scale)[:, 0].tolist() == [finite, 255]
        back = dequantize(data, scale, dtype=torch.float32).cpu()
        assert (back[0] == 3.0).all()
        assert back[1].isnan().all()


@pytest.mark.parametrize("divide", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fp8_per_token_nan_and_infinity(dtype: torch.dtype, divide: bool, device: str) -> None:
    """Of the row in any chunk: the first, one that is kept, and one that is read again."""
    x = torch.ones(5, 16 * 600, dtype=dtype)
    x[0, 3], x[1, 4], x[2, -1], x[3, 16 * 300] = math.nan, math.inf, math.nan, -math.nan
    data, scale = moe.quantize_fp8_per_token(x.to(device), divide=divide)
    assert scale[[0, 2, 3]].isnan().all()
    assert scale[[1, 4]].tolist() == [math.inf, np.float32(1) / np.float32(448)]
    codes = as_bytes(data)
    assert (codes[[0, 2, 3]] == 0x7F).all()
    assert codes[1, :16].tolist() == [0] * 4 + [0x7F] + [0] * 11
    assert (codes[4] == 0x7E).all()


@pytest.mark.parametrize("divide", [False, True])
def test_fp8_per_token_of_tiny_rows(divide: bool, device: str) -> None:
    """Down to scales whose reciprocal is infinite: zeros stay zeros."""
    x = torch.zeros(4, 32)
    x[:, 5] = torch.tensor([2.0**-110, 2.0**-118, 2.0**-125, 2.0**-140])
    data, scale = moe.quantize_fp8_per_token(x.to(device), divide=divide)
    codes = as_bytes(data)
    assert (codes[:, :5] == 0).all()
    assert (codes[:, 6:] == 0).all()
    back = moe.dequantize_fp8_per_token(data, scale, dtype=torch.float32).cpu()[:, 5].double()
    # A scale below 2^-149 * 8 has no digits.
    assert ((back - x[:, 5].double()).abs()[:3] <= x[:3, 5].double() / 8).all()


def test_values_of_fp8_per_token(device: str) -> None:
    """Every code under three scales: one product, rounded once."""
    data = torch.arange(256, dtype=torch.uint8).expand(3, 256).contiguous()
    scale = torch.tensor([1.0, 0.3, 2.0**-120])
    got = moe.dequantize_fp8_per_token(data.to(device), scale.to(device), dtype=torch.float32).cpu().numpy()
    expected = moe_values(data, "e4m3").reshape(3, 256) * scale.numpy()[:, None]
    assert np.array_equal(got, expected, equal_nan=True)


# Layouts and rows.


@pytest.mark.parametrize("granularity", [4, 8, 64])
def test_deinterleave_takes_the_gates(granularity: int, device: str) -> None:
    gate, up = random_rows(5, 64), random_rows(5, 64, seed=1) * 100
    mixed = moe.interleave_l1_weights(torch.cat([gate, up], dim=1), granularity=granularity).data.to(device)
    scale = torch.full((1,), 0.01, device=device)
    got = moe.deinterleave_quantize_nvfp4(mixed, 64, scale, granularity=granularity)
    expected = moe.quantize_activation_nvfp4(gate.to(device), 0.01)
    assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True))
    got_fused = moe.deinterleave_amax_quantize_nvfp4_fused(mixed, 64, granularity=granularity)
    expected_fused = moe.quantize_nvfp4_gpu_fused(gate.to(device))
    assert all(same_bits(a, b) for a, b in zip(got_fused, expected_fused, strict=True))


def test_swiglu_of_every_layout_is_one(device: str) -> None:
    gate, up = random_rows(5, 64) * 3, random_rows(5, 64, seed=1)
    halves = torch.cat([gate, up], dim=1)
    scale = torch.full((1,), 0.01, device=device)
    results = [moe.quantize_nvfp4(halves.to(device), scale, source="swiglu", limit=2.0)]
    for granularity in (4, 8, 64):
        mixed = moe.interleave_l1_weights(halves, granularity=granularity).data.to(device)
        results.append(moe.quantize_nvfp4(mixed, scale, source="swiglu", limit=2.0, granularity=granularity))
    assert all(same_bits(a, b) for result in results for a, b in zip(result, results[0], strict=True))


def test_weight_is_quantised_along_k(device: str) -> None:
    weight = random_rows(48, 32).T  # [K = 32, N = 48], K-major
    for given in (weight, weight.contiguous()):
        data, scale, global_scale = moe.quantize_weight_to_nvfp4(given.to(device))
        assert (data.shape, scale.shape) == ((16, 48), (2, 48))
        back = moe.dequantize_nvfp4(data.T, scale.T, global_scale, dtype=torch.float32).cpu().T
        assert float((back - weight.float()).abs().max()) < 0.2 * float(weight.abs().max())
        rows = moe.quantize_nvfp4_gpu_fused(weight.T.contiguous().to(device))
        assert same_bits(data.T, rows[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("offset", [1, 4, 8])
def test_strided_and_misaligned_rows(offset: int, dtype: torch.dtype, device: str) -> None:
    x = random_rows(6, 64).to(dtype)
    wide = torch.full((6, 80), math.nan, dtype=dtype)
    wide[:, offset : offset + 64] = x
    view = wide.to(device)[:, offset : offset + 64]
    for function in (moe.quantize_nvfp4_gpu_fused, moe.quantize_mxfp8, moe.quantize_mxfp4, moe.quantize_fp8_per_token):
        for a, b in zip(function(view), function(x.to(device)), strict=True):  # type: ignore[operator]
            assert same_bits(a, b)


def test_typed_outputs_and_bytes_around_them(device: str) -> None:
    x = random_rows(4, 64).to(device)
    expected = moe.quantize_mxfp4(x)
    for typed in (False, True):
        data, scale = (poison(torch.empty(8, n, dtype=torch.uint8, device=device)) for n in (32, 2))
        out, out_scale = data[2:6], scale[2:6]
        if typed:
            out, out_scale = out.view(torch.float4_e2m1fn_x2), out_scale.view(torch.float8_e8m0fnu)
        got = moe.quantize_mx(x, element_format="e2m1", out=out, out_scale=out_scale)
        assert got[0] is out
        assert got[1] is out_scale
        assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True))
        for buffer in (data, scale):
            assert is_poison(buffer[:2]).all()
            assert is_poison(buffer[6:]).all()


@pytest.mark.parametrize(("value", "used"), [(-3, 0), (0, 0), (2, 2), (5, 5), (99, 5), (-(2**31), 0)])
@pytest.mark.parametrize("swizzle", [False, True])
def test_rows_that_are_not_used_stay(swizzle: bool, value: int, used: int, device: str) -> None:
    x, n_used = random_rows(5, 32).to(device), torch.tensor([value], dtype=torch.int32, device=device)
    out = poison(torch.empty(5, 32, dtype=torch.uint8, device=device))
    scale = poison(torch.empty((128, 4) if swizzle else (5, 1), dtype=torch.uint8, device=device))
    moe.quantize_mx(x, swizzle=swizzle, n_used=n_used, out=out, out_scale=scale)
    assert same_bits(out[:used], moe.quantize_mxfp8(x)[0][:used].view(torch.uint8))
    assert is_poison(out[used:]).all()
    if not swizzle:
        assert is_poison(scale[used:]).all()
    elif used:
        rows = moe.blackwell_unswizzle_32_4_4(scale, 128, 4)
        assert (rows[used:] == 0).all()
        assert (rows[:, 1:] == 0).all()
    else:
        assert is_poison(scale).all()


def test_experts_out_of_range_give_zeros(device: str) -> None:
    x = random_rows(4, 32).to(device)
    ids = torch.tensor([0, -1, 2**31 - 1, 1], dtype=torch.int32, device=device)
    data, scale = moe.quantize_nvfp4(x, torch.full((2,), 0.01, device=device), expert_ids=ids)
    assert (as_bytes(data)[1:3] == 0).all()
    assert (as_bytes(scale)[1:3] == 0).all()
    back = moe.dequantize_nvfp4(data, scale, torch.full((2,), 0.01, device=device), expert_ids=ids)
    assert (back[1:3] == 0).all()
    assert (back[[0, 3]] != 0).any(dim=1).all()


@pytest.mark.parametrize("shape", [(0, 64), (4, 0)])
def test_empty(shape: tuple[int, int], device: str) -> None:
    x = torch.empty(shape, dtype=torch.bfloat16, device=device)
    assert moe.quantize_mxfp8(x)[0].shape == shape
    assert moe.quantize_nvfp4(x, torch.ones(1, device=device))[0].shape == (shape[0], shape[1] // 2)
    assert moe.quantize_nvfp4_gpu_fused(x)[2].tolist() == [2.0**-110]
    assert moe.quantize_nvfp4_gpu_fused(x, per_token=True)[2].tolist() == [2.0**-110] * shape[0]
    assert moe.quantize_fp8_per_token(x)[1].tolist() == [0.0] * shape[0]


@pytest.mark.gpu
def test_more_than_two_billion_elements() -> None:
    x = torch.zeros(2**20 + 3, 2048, dtype=torch.bfloat16, device="cuda")
    x[-1] = 3
    data, scale, _ = moe.quantize_nvfp4_gpu_fused(x)
    assert (as_bytes(data[-1:]) == 0x77).all()
    assert (as_bytes(scale[-1:]) == 0x7E).all()
    assert (as_bytes(data[-2:-1]) == 0).all()


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda x: moe.quantize_nvfp4(x[:, :24], torch.ones(1)),
            "quantize_nvfp4: x columns: expected a multiple of 16, got 24",
        ),
        (lambda x: moe.quantize_mx(x[:, :48]), "quantize_mx: x columns: expected a multiple of 32, got 48"),
        (
            lambda x: moe.quantize_nvfp4(x, torch.ones(3)),
            "quantize_nvfp4: global_scale elements: expected 1, or as many as there are rows, got 3",
        ),
        (
            lambda x: moe.quantize_mx(x, source="swish"),
            "quantize_mx: source: expected plain or deinterleave or swiglu, got swish",
        ),
        (
            lambda x: moe.quantize_mx(x, source="deinterleave", granularity=2),
            "quantize_mx: granularity: expected a power of two from 4, got 2",
        ),
        (
            lambda x: moe.deinterleave_quantize_nvfp4(x, 48, 1.0),
            "deinterleave_quantize_nvfp4: x: expected [rows, 96], twice intermediate_size, got [4, 64]",
        ),
        (
            lambda x: moe.quantize_nvfp4_gpu_fused(x, experts=3),
            "quantize_nvfp4_gpu_fused: experts: expected 0, got 3",
        ),
        (
            lambda x: moe.quantize_mx(x.to(torch.float64)),
            "quantize_mx: x: expected dtype float16 or bfloat16 or float32, got float64",
        ),
        (
            lambda x: moe.dequantize_blocks(torch.zeros(2, 8, dtype=torch.uint8), torch.zeros(2, 2, dtype=torch.uint8)),
            "dequantize_blocks: scale: expected shape [2, 1], got [2, 2]",
        ),
        (
            lambda x: moe.quantize_nvfp4_gpu_fused(x, amax_floor=0.0),
            "quantize_nvfp4_gpu_fused: amax_floor: expected a finite number of at least 3.15973e-35, got 0",
        ),
    ],
    ids=range(10),
)
def test_refuses(call: Any, text: str) -> None:
    with pytest.raises(InvalidArgumentError) as raised:
        call(random_rows(4, 64))
    assert str(raised.value) == text


@pytest.mark.parametrize("value", [0.0, -0.0, -1.0, math.nan, math.inf, -math.inf, 1e-40, 1e39])
def test_refuses_scales_that_make_no_sense(value: float) -> None:
    """Python numbers; what is on the device is not looked at."""
    x = random_rows(4, 64)
    codes, scale = moe.quantize_nvfp4(x, torch.ones(1))
    calls = {
        "quantize_activation_nvfp4": lambda: moe.quantize_activation_nvfp4(x, value),
        "deinterleave_quantize_nvfp4": lambda: moe.deinterleave_quantize_nvfp4(x, 32, value),
        "dequantize_nvfp4": lambda: moe.dequantize_nvfp4(codes, scale, value),
    }
    for name, call in calls.items():
        with pytest.raises(InvalidArgumentError) as raised:
            call()
        assert str(raised.value) == f"{name}: global_scale: expected a finite float32 of at least 2^-126, got {value}"


@pytest.mark.parametrize("reciprocal", [False, True])
def test_bad_scales_on_the_device_stay_in_their_rows(reciprocal: bool, device: str) -> None:
    x = random_rows(8, 64)
    bad = [0.0, -1.0, math.nan, math.inf, -math.inf, 2.0**-149]
    ids = torch.arange(8, dtype=torch.int32)
    given = torch.tensor([0.01, *bad, 0.02])
    data, scale = moe.quantize_nvfp4(
        x.to(device), given.to(device), expert_ids=ids.to(device), reciprocal_global_scale=reciprocal
    )
    moe.dequantize_nvfp4(data, scale, given.to(device), expert_ids=ids.to(device), reciprocal_global_scale=reciprocal)
    for row in (0, 7):
        alone = moe.quantize_nvfp4(x[row : row + 1], given[row : row + 1], reciprocal_global_scale=reciprocal)
        assert torch.equal(as_bytes(data)[row], as_bytes(alone[0])[0])
        assert torch.equal(as_bytes(scale)[row], as_bytes(alone[1])[0])
