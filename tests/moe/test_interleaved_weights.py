"""Interleaved weights against values read off the checkpoint's bytes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from dsv4_kernels import InvalidArgumentError
from dsv4_kernels.cases import is_poison, poison
from dsv4_kernels.cpu.moe.grouped_gemm import expert_weights
from dsv4_kernels.moe import (
    can_interleave,
    interleave_weights,
    moe_grouped_gemm,
    run_fused_swiglu_grouped_gemm,
    run_nvfp4_grouped_gemm,
)

from tests.moe.test_moe_grouped_gemm import by_hand

pytestmark = pytest.mark.every_architecture


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(1)


def random_codes(rows: int, inner: int, experts: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows + inner)
    return torch.randint(256, (experts, rows, inner // 2), generator=generator, dtype=torch.uint8)


def mxfp4_scale(rows: int, inner: int, low: int = 110, high: int = 131) -> torch.Tensor:
    return torch.randint(low, high, (1, rows, inner // 32), dtype=torch.uint8)


def nvfp4_scale(rows: int, inner: int) -> torch.Tensor:
    """Every finite E4M3 scale, of both signs."""
    values = torch.tensor([byte for byte in range(256) if byte & 0x7F != 0x7F], dtype=torch.uint8)
    count = rows * inner // 16
    return values.repeat(count // 254 + 1)[:count].view(torch.float8_e4m3fn).reshape(1, rows, inner // 16)


def test_codes_have_bits_of_their_own() -> None:
    """The largest code at one inner position sets 4 bits of one word, and no other position's."""
    codes = torch.zeros(1, 128, 64, dtype=torch.uint8)
    for k in range(128):
        codes[0, k, k // 2] = 0xF0 if k % 2 else 0x0F
    words = interleave_weights(codes, torch.full((1, 128, 4), 127, dtype=torch.uint8)).weight
    assert words.shape == (1, 1, 128, 16)
    assert ((words != 0).sum(dim=-1) == 1).all()
    bits = torch.stack([words.to(torch.int64) >> i & 1 for i in range(32)])
    assert (bits.sum(dim=(0, 1, 2, 4)) == 4).all()
    assert (bits.sum(dim=3) == 1).all()


@pytest.mark.parametrize("nvfp4", [False, True])
def test_nothing_is_lost(nvfp4: bool) -> None:
    codes = random_codes(256, 256)
    scale = nvfp4_scale(256, 256) if nvfp4 else (torch.arange(256 * 8, dtype=torch.int32) % 137).to(torch.uint8)
    scale = scale.reshape(1, 256, -1)
    words, factors = interleave_weights(codes, scale)
    assert factors.shape == (1, 2, 256, 4 if nvfp4 else 2)
    want = by_hand(codes[0], scale[0])
    assert torch.equal(expert_weights(words[0], factors[0]), want)
    words, factors = interleave_weights(codes, scale, gate_and_up=True)
    order = torch.arange(256).reshape(2, -1, 8).transpose(0, 1).flatten()
    assert torch.equal(expert_weights(words[0], factors[0]), want[order])


@pytest.mark.parametrize("tile_size", [16, 64, 128])
@pytest.mark.parametrize("nvfp4", [False, True])
def test_unit_rows_give_the_weights_themselves(nvfp4: bool, tile_size: int, device: str) -> None:
    """Row k of the identity times the weights is column k of them, to the bit: scales over the range, every code."""
    codes = random_codes(128, 128)
    scale = nvfp4_scale(128, 128) if nvfp4 else mxfp4_scale(128, 128, 27, 137)
    weight = [value.to(device) for value in interleave_weights(codes, scale)]
    x = torch.eye(128, dtype=torch.bfloat16, device=device)
    tiles = torch.zeros(128 // tile_size, dtype=torch.int32, device=device)
    slots = torch.arange(128, dtype=torch.int32, device=device)
    out = run_nvfp4_grouped_gemm(x, *weight, tiles, slots)
    assert torch.equal(out.cpu().double(), by_hand(codes[0], scale[0]).T)


@pytest.mark.parametrize("nvfp4", [False, True])
@pytest.mark.parametrize("limit", [0.0, 3.0])
def test_swiglu(nvfp4: bool, limit: float, device: str) -> None:
    """Gate and up by alpha, clamp and slot weight; padding and rows of other experts are not written."""
    codes = random_codes(256, 128, experts=2)
    scale = torch.cat((mxfp4_scale(256, 128, 119, 125),) * 2)
    if nvfp4:
        scale = torch.randint(0x08, 0x28, (2, 256, 8), dtype=torch.uint8).view(torch.float8_e4m3fn)
    weight = [value.to(device) for value in interleave_weights(codes, scale, gate_and_up=True)]
    x = torch.randn(5, 128).to(torch.bfloat16)
    tiles = torch.tensor([1, -1, 7], dtype=torch.int32)
    slots = torch.tensor([9, 0, 3, 8, 2] + [-1] * 11 + [1] * 32, dtype=torch.int32)
    alpha = torch.tensor([[9.0, 9.0], [0.5, 2.0]])
    weights = torch.rand(5, 2)
    out = poison(torch.empty(48, 128, dtype=torch.bfloat16, device=device))
    given = [value.to(device) for value in (tiles, slots)]
    run_fused_swiglu_grouped_gemm(
        x.to(device),
        *weight,
        *given,
        alpha=alpha.to(device),
        slot_weights=weights.to(device),
        top_k=2,
        limit=limit,
        out=out,
    )
    both = x[slots[:5].long() // 2].double() @ by_hand(codes[1], scale[1]).T
    gate, up = both[:, :128] * 0.5, both[:, 128:] * 2.0
    if limit:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        assert (gate == limit).any()
        assert (up == -limit).any()
    expected = gate / (1 + torch.exp(-gate)) * up * weights.flatten()[slots[:5].long(), None].double()
    assert torch.allclose(out[:5].cpu().double(), expected, rtol=2**-7, atol=1e-3)
    assert is_poison(out[5:]).all()


def test_nan_and_infinity_stay_in_their_row(device: str) -> None:
    codes, scale = random_codes(128, 128), mxfp4_scale(128, 128)
    weight = [value.to(device) for value in interleave_weights(codes, scale)]
    x = torch.randn(16, 128).to(torch.bfloat16)
    x[3, 7], x[5, 100] = math.nan, math.inf
    tiles = torch.zeros(1, dtype=torch.int32, device=device)
    slots = torch.arange(16, dtype=torch.int32, device=device)
    out = run_nvfp4_grouped_gemm(x.to(device), *weight, tiles, slots).cpu()
    bad = ~out.isfinite().all(dim=1)
    assert bad.nonzero().flatten().tolist() == [3, 5]
    assert out[3].isnan().all()


def test_strided_rows(device: str) -> None:
    codes, scale = random_codes(128, 128), mxfp4_scale(128, 128)
    weight = [value.to(device) for value in interleave_weights(codes, scale)]
    wide = torch.randn(16, 192).to(torch.bfloat16).to(device)
    tiles = torch.zeros(1, dtype=torch.int32, device=device)
    slots = torch.arange(16, dtype=torch.int32, device=device)
    out = poison(torch.empty(16, 160, dtype=torch.bfloat16, device=device))
    run_nvfp4_grouped_gemm(wide[:, 32:160], *weight, tiles, slots, out=out[:, 16:144])
    want = run_nvfp4_grouped_gemm(wide[:, 32:160].contiguous(), *weight, tiles, slots)
    assert torch.equal(out[:, 16:144], want)
    assert is_poison(out[:, :16]).all()
    assert is_poison(out[:, 144:]).all()


def test_what_cannot_be_interleaved() -> None:
    codes, scale = random_codes(128, 128), mxfp4_scale(128, 128)
    assert can_interleave(128, 128, scale)
    with pytest.raises(InvalidArgumentError, match=r"weight: .* N a multiple of 16 and K one of 32, got uint8 \[1, 72"):
        interleave_weights(codes[:, :72], scale[:, :72])
    with pytest.raises(InvalidArgumentError, match=r"weight: .* N a multiple of 32 and K one of 32, got uint8 \[1, 48"):
        interleave_weights(codes[:, :48], scale[:, :48], gate_and_up=True)
    with pytest.raises(InvalidArgumentError, match=r"weight_scale: expected .* \[1, 128, 4\], got uint8 \[1, 128, 8"):
        interleave_weights(codes, torch.cat((scale, scale), dim=2))
    scale[0, 5, 1] = 137
    assert not can_interleave(128, 128, scale)
    with pytest.raises(InvalidArgumentError, match=r"scales of at most 2\^9 \(byte 136\), got 137; moe_grouped"):
        interleave_weights(codes, scale)


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"x": torch.zeros(16, 128).to(torch.float8_e4m3fn)}, r"x: expected dtype bfloat16, got float8_e4m3fn"),
    ({"x": torch.zeros(16, 256, dtype=torch.bfloat16)}, r"x columns: expected 1 to 128, got 256"),
    ({"weight": torch.zeros(1, 1, 128, 8, dtype=torch.int32)}, r"weight: expected shape .*16\], got \[1, 1, 128, 8\]"),
    ({"weight": torch.zeros(1, 1, 128, 16)}, r"weight: expected dtype int32, got float32"),
    ({"weight_scale": torch.zeros(1, 1, 128, 3, dtype=torch.int32)}, r"weight_scale: expected shape \[1, 1, 128, 2\]"),
    ({"weight_scale": torch.zeros(1, 128, 4, dtype=torch.uint8)}, r"weight_scale: expected dtype int32"),
    ({"row_to_slot": torch.zeros(32, dtype=torch.int32)}, r"row_to_slot: expected 16, 64 or 128 rows per tile, got 32"),
]


@pytest.mark.parametrize(("changed", "text"), REFUSALS, ids=[text for _, text in REFUSALS])
def test_refusals(changed: dict[str, Any], text: str) -> None:
    words, factors = interleave_weights(random_codes(128, 128), mxfp4_scale(128, 128))
    arguments: dict[str, Any] = {
        "x": torch.zeros(16, 128, dtype=torch.bfloat16),
        "weight": words,
        "weight_scale": factors,
        "tile_to_expert": torch.zeros(1, dtype=torch.int32),
        "row_to_slot": torch.zeros(16, dtype=torch.int32),
    } | changed
    rows = arguments["row_to_slot"].numel()
    with pytest.raises(InvalidArgumentError, match="moe_grouped_gemm: " + text):
        moe_grouped_gemm(**arguments, out=torch.zeros(rows, 128, dtype=torch.bfloat16))
