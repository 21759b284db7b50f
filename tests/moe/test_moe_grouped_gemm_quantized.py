"""The quantised grouped product against quantising the bfloat16 one, and what rows without a slot get."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from dsv4_kernels import InvalidArgumentError
from dsv4_kernels.cases import is_poison, poison, same_bits
from dsv4_kernels.moe import (
    blackwell_unswizzle_32_4_4,
    dequantize_mxfp8,
    dequantize_nvfp4,
    moe_grouped_gemm_quantized,
    quantize_mxfp8,
    quantize_nvfp4,
    run_fused_swiglu_grouped_gemm,
    run_nvfp4_grouped_gemm,
)

from tests.moe.test_moe_grouped_gemm import by_hand

pytestmark = pytest.mark.every_architecture

COLUMNS, INNER, TOP_K = 192, 128, 2
SIZES = [("nvfp4", 16), ("nvfp4", 64), ("nvfp4", 128), ("mxfp8", 16), ("mxfp8", 128)]
ROUTES = [9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 9, 4]  # slots of expert 1


class Problem:
    """A tile of 13 rows of expert 1 of 2, and after it one that is not used."""

    def __init__(self, x_format: str, tile_size: int, device: str) -> None:
        generator = torch.Generator().manual_seed(3)
        self.nvfp4 = x_format == "nvfp4"
        group = 16 if self.nvfp4 else 32

        def scales(low: int, high: int, *shape: int) -> torch.Tensor:
            drawn = torch.randint(low, high, (*shape, INNER // group), generator=generator, dtype=torch.uint8)
            return (drawn.view(torch.float8_e4m3fn) if self.nvfp4 else drawn).to(device)

        self.weight = torch.randint(256, (2, 2 * COLUMNS, INNER // 2), generator=generator, dtype=torch.uint8).to(
            device
        )
        self.weight_scale = scales(0x10, 0x38, 2, 2 * COLUMNS) if self.nvfp4 else scales(118, 126, 2, 2 * COLUMNS)
        self.x = torch.randint(256, (5, INNER // 2), generator=generator, dtype=torch.uint8).to(device)
        if not self.nvfp4:
            self.x = torch.randn(5, INNER, generator=generator).to(torch.float8_e4m3fn).to(device)
        self.x_scale = scales(0x18, 0x38, 5) if self.nvfp4 else scales(122, 130, 5)
        self.tiles = torch.tensor([1, -1], dtype=torch.int32, device=device)
        self.slots = torch.full((2 * tile_size,), -1, dtype=torch.int32, device=device)
        self.slots[: len(ROUTES)] = torch.tensor(ROUTES, dtype=torch.int32)
        self.alpha = torch.tensor([[9.0, 9.0], [0.01, 0.02]], device=device)
        self.slot_weights = torch.rand(5, TOP_K, generator=generator).to(device)
        self.global_scale = torch.tensor([0.003], device=device) if self.nvfp4 else None
        self.maps = self.x, self.weight, self.weight_scale, self.tiles, self.slots

    def in_bfloat16(self, weighted: bool, limit: float) -> torch.Tensor:
        """Rows with a slot."""
        result = run_fused_swiglu_grouped_gemm(
            *self.maps, x_scale=self.x_scale, alpha=self.alpha, slot_weights=self.slot_weights if weighted else None,
            top_k=TOP_K, limit=limit,
        )  # fmt: skip
        return result[: len(ROUTES)]

    def of(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantised by the package's op."""
        return quantize_nvfp4(values, self.global_scale) if self.nvfp4 else quantize_mxfp8(values)

    def run(self, weighted: bool = False, limit: float = 0.0, swizzle: bool = False) -> tuple[torch.Tensor, ...]:
        """Bytes of codes and scales, poisoned before."""
        rows, group = self.slots.numel(), 16 if self.nvfp4 else 32
        height, width = (-(-rows // 128) * 128, -(-COLUMNS // group // 4) * 4) if swizzle else (rows, COLUMNS // group)
        device = self.x.device
        data = poison(torch.empty(rows, COLUMNS // (2 if self.nvfp4 else 1), dtype=torch.uint8, device=device))
        scale = poison(torch.empty(height, width, dtype=torch.uint8, device=device))
        results = moe_grouped_gemm_quantized(
            *self.maps, self.x_scale, self.global_scale, self.alpha, self.slot_weights if weighted else None, TOP_K,
            limit, swizzle, out=data, out_scale=scale,
        )  # fmt: skip
        assert results[0] is data
        assert results[1] is scale
        return data, scale


@pytest.mark.parametrize(("x_format", "tile_size"), SIZES)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_bits_of_quantising_bfloat16(x_format: str, tile_size: int, weighted: bool, device: str) -> None:
    problem = Problem(x_format, tile_size, device)
    data, scale = problem.run(weighted, limit=3.0)
    want_data, want_scale = problem.of(problem.in_bfloat16(weighted, 3.0))
    used = len(ROUTES)
    assert same_bits(data[:used], want_data.view(torch.uint8))
    assert same_bits(scale[:used], want_scale.view(torch.uint8))
    assert is_poison(data[used:]).all()
    assert is_poison(scale[used:]).all()


@pytest.mark.parametrize(("x_format", "tile_size"), SIZES)
def test_swizzled_scales_are_0_wherever_there_is_no_row(x_format: str, tile_size: int, device: str) -> None:
    """Rows without a slot, tiles without an expert, rows up to 128, and of MXFP8 columns up to 4."""
    problem = Problem(x_format, tile_size, device)
    plain_data, plain_scale = problem.run()
    data, scale = problem.run(swizzle=True)
    assert same_bits(data, plain_data)
    used, groups = len(ROUTES), plain_scale.shape[1]
    in_rows = blackwell_unswizzle_32_4_4(scale, *scale.shape)
    assert same_bits(in_rows[:used, :groups].contiguous(), plain_scale[:used])
    assert (in_rows[used:] == 0).all()
    assert (in_rows[:, groups:] == 0).all()


@pytest.mark.parametrize("x_format", ["nvfp4", "mxfp8"])
def test_values(x_format: str, device: str) -> None:
    """Against sums written out by hand: half a step of the codes, and no more."""
    problem = Problem(x_format, 16, device)
    data, scale = (value[: len(ROUTES)].contiguous() for value in problem.run(limit=3.0))
    x_scale, weight_scale = problem.x_scale.cpu(), problem.weight_scale[1].cpu()
    if problem.nvfp4:
        x = by_hand(problem.x.cpu(), x_scale)
        got = dequantize_nvfp4(data, scale.view(torch.float8_e4m3fn), problem.global_scale, dtype=torch.float32)
        steps = scale.view(torch.float8_e4m3fn).cpu().double() * problem.global_scale.cpu().double()
        allowed = steps.repeat_interleave(16, dim=1)  # between 4 and 6; less for smaller values
    else:
        x = problem.x.cpu().double() * torch.exp2(x_scale.double() - 127).repeat_interleave(32, dim=1)
        got = dequantize_mxfp8(data, scale, dtype=torch.float32)
        allowed = torch.exp2(scale.cpu().double() - 127).repeat_interleave(32, dim=1) * 16
    both = x[torch.tensor(ROUTES) // TOP_K] @ by_hand(problem.weight[1].cpu(), weight_scale).T
    gate, up = (both[:, :COLUMNS] * 0.01).clamp(max=3.0), (both[:, COLUMNS:] * 0.02).clamp(-3.0, 3.0)
    expected = gate / (1 + torch.exp(-gate)) * up
    assert ((got.cpu().double() - expected).abs() <= allowed * 1.001 + expected.abs() * 2**-8).all()
    assert float((got.cpu().double() - expected).norm() / expected.norm()) < (0.12 if problem.nvfp4 else 0.03)


@pytest.mark.parametrize("x_format", ["nvfp4", "mxfp8"])
def test_zeros_and_nan(x_format: str, device: str) -> None:
    """A weight of 0 gives scales of 0; NaN gives scales of NaN, and codes +6 or NaN."""
    problem = Problem(x_format, 16, device)
    problem.slot_weights.fill_(1.0)
    problem.slot_weights[0] = 0.0
    problem.slot_weights[1] = math.nan
    data, scale = problem.run(weighted=True)
    want_data, want_scale = problem.of(problem.in_bfloat16(True, 0.0))
    assert same_bits(data[: len(ROUTES)], want_data.view(torch.uint8))
    assert same_bits(scale[: len(ROUTES)], want_scale.view(torch.uint8))
    token = torch.tensor(ROUTES) // TOP_K
    assert (scale[: len(ROUTES)].cpu()[token == 0] == 0).all()
    assert (scale[: len(ROUTES)].cpu()[token == 1] == (0x7F if problem.nvfp4 else 0xFF)).all()
    assert (data[: len(ROUTES)].cpu()[token == 1] & 0x7F == (0x77 if problem.nvfp4 else 0x7F)).all()


def test_infinity(device: str) -> None:
    problem = Problem("mxfp8", 16, device)
    problem.slot_weights[2, 1] = math.inf
    data, scale = problem.run(weighted=True)
    want_data, want_scale = problem.of(problem.in_bfloat16(True, 0.0))
    assert same_bits(data[: len(ROUTES)], want_data.view(torch.uint8))
    assert same_bits(scale[: len(ROUTES)], want_scale.view(torch.uint8))
    assert (scale == 255).any()


@pytest.mark.parametrize("x_format", ["nvfp4", "mxfp8"])
@pytest.mark.parametrize("swizzle", [False, True])
def test_hostile_maps_write_nothing(x_format: str, swizzle: bool, device: str) -> None:
    """Experts and slots far out of range, and x without rows: no access out of bounds, and what padding holds."""
    problem = Problem(x_format, 16, device)
    for tiles, slots in (
        ([2, 2**31 - 1, -(2**31), 0], [0] * 48 + [10, 2**31 - 1, -(2**31), -1] * 4),
        ([0, 1], [0] * 32),
    ):
        if len(tiles) == 2:
            problem.x, problem.x_scale, problem.slot_weights = (
                problem.x[:0],
                problem.x_scale[:0],
                problem.slot_weights[:0],
            )
        problem.tiles = torch.tensor(tiles, dtype=torch.int32, device=device)
        problem.slots = torch.tensor(slots, dtype=torch.int32, device=device)
        problem.maps = problem.x, problem.weight, problem.weight_scale, problem.tiles, problem.slots
        data, scale = problem.run(swizzle=swizzle)
        assert is_poison(data).all()
        assert (scale == 0).all() if swizzle else is_poison(scale).all()


@pytest.mark.parametrize("x_format", ["nvfp4", "mxfp8"])
def test_the_second_product_reads_it(x_format: str, device: str) -> None:
    """Allocated results, in the types that they are of, as x and x_scale with top_k 0."""
    problem = Problem(x_format, 16, device)
    codes, scale = moe_grouped_gemm_quantized(
        *problem.maps, problem.x_scale, problem.global_scale, problem.alpha, top_k=TOP_K
    )
    assert (codes.dtype, scale.dtype) == (
        (torch.float4_e2m1fn_x2, torch.float8_e4m3fn) if problem.nvfp4 else (torch.float8_e4m3fn, torch.float8_e8m0fnu)
    )
    weight, weight_scale = problem.weight[:, :64], problem.weight_scale[:, :64]
    weight = torch.cat((weight, weight[..., : (COLUMNS - INNER) // 2]), dim=-1).contiguous()
    as_bytes = weight_scale.view(torch.uint8)
    groups = as_bytes.shape[-1] * COLUMNS // INNER
    weight_scale = torch.cat((as_bytes, as_bytes), dim=-1)[..., :groups].contiguous().view(weight_scale.dtype)
    out = run_nvfp4_grouped_gemm(codes, weight, weight_scale, problem.tiles, problem.slots, x_scale=scale)[
        : len(ROUTES)
    ].cpu()
    if problem.nvfp4:
        x = by_hand(codes.view(torch.uint8)[: len(ROUTES)].cpu(), scale[: len(ROUTES)].cpu())
    else:
        x = dequantize_mxfp8(codes[: len(ROUTES)].cpu(), scale[: len(ROUTES)].cpu(), dtype=torch.float32).double()
    expected = x @ by_hand(weight[1].cpu(), weight_scale[1].cpu()).T
    assert float((out.double() - expected).norm() / expected.norm()) < 2**-8


REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    ("nvfp4", {"x": torch.zeros(5, INNER, dtype=torch.bfloat16)}, r"x: expected dtype .*, got bfloat16"),
    ("nvfp4", {"global_scale": None}, r"global_scale: expected a tensor, got none"),
    ("nvfp4", {"global_scale": torch.ones(2)}, r"global_scale: expected shape \[1\], got \[2\]"),
    ("mxfp8", {"global_scale": torch.ones(1)}, r"global_scale: must be omitted when x is MXFP8"),
    ("mxfp8", {"row_to_slot": torch.zeros(128, dtype=torch.int32)}, r"row_to_slot: expected 16 or 128 rows per tile"),
    ("nvfp4", {"out": torch.zeros(32, COLUMNS, dtype=torch.uint8)}, r"out: expected shape \[32, 96\], got \[32, 192\]"),
    ("nvfp4", {"swizzle": True}, r"out_scale: expected shape \[128, 12\], got \[32, 12\]"),
    ("mxfp8", {"swizzle": True}, r"out_scale: expected shape \[128, 8\], got \[32, 6\]"),
    ("mxfp8", {"limit": math.nan}, r"limit: expected a finite number of at least 0, got nan"),
    ("nvfp4", {"limit": -10.0}, r"limit: expected a finite number of at least 0, got -10"),
    ("nvfp4", {"weight": torch.zeros(2, 1, 384, 16, dtype=torch.int32)}, r"weight: expected dtype"),
]


@pytest.mark.parametrize(("x_format", "changed", "text"), REFUSALS, ids=[text for *_, text in REFUSALS])
def test_refusals(x_format: str, changed: dict[str, Any], text: str) -> None:
    problem = Problem(x_format, 16, "cpu")
    names = ("x", "weight", "weight_scale", "tile_to_expert", "row_to_slot")
    arguments = dict(zip(names, problem.maps, strict=True)) | {
        "x_scale": problem.x_scale,
        "global_scale": problem.global_scale,
        "out": torch.zeros(32, COLUMNS // (2 if problem.nvfp4 else 1), dtype=torch.uint8),
        "out_scale": torch.zeros(32, COLUMNS // (16 if problem.nvfp4 else 32), dtype=torch.uint8),
    }
    with pytest.raises(InvalidArgumentError, match="moe_grouped_gemm_quantized: " + text):
        moe_grouped_gemm_quantized(**(arguments | changed))
