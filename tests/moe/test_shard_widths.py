"""Grouped products of widths that fill no tile: shards of experts over ranks have inner sizes such as 288 and 96.

Against sums of values read off the bytes. x lies in a wider tensor full of NaN, and results in a poisoned one, so that
whatever is read or written beside a row shows; memory behind the last row is not there, and the emulator says so.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dsv4_kernels import InvalidArgumentError
from dsv4_kernels.cases import is_poison, poison
from dsv4_kernels.moe import (
    blackwell_unswizzle_32_4_4,
    can_interleave,
    dequantize_mxfp8,
    dequantize_nvfp4,
    interleave_weights,
    moe_grouped_gemm,
    moe_grouped_gemm_quantized,
)

from tests.emulated import emulated
from tests.moe.test_moe_grouped_gemm import by_hand

pytestmark = pytest.mark.every_architecture

TOP_K = 2
SLOTS = [9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 9, 4]  # of expert 1
LIMIT = 3.0

# Formats of x and weights, and whether the weights are interleaved.
BFLOAT16 = [("bfloat16", "mxfp4", False), ("bfloat16", "nvfp4", False)]
INTERLEAVED = [("bfloat16", "mxfp4", True), ("bfloat16", "nvfp4", True)]
QUANTISED = [("nvfp4", "nvfp4", False), ("mxfp8", "mxfp4", False)]


def sizes_of(formats: list[tuple[str, str, bool]]) -> list[tuple[str, str, bool, int]]:
    return [(*form, size) for form in formats for size in (16, 64, 128) if form[0] != "mxfp8" or size != 64]


class Problem:
    """A tile with 13 rows of expert 1 of 2, one without an expert, and enough of these for the kernel of many tiles."""

    def __init__(
        self, x_format: str, weights: str, interleaved: bool, tile_size: int, rows: int, inner: int, swiglu: bool,
        few: bool = False,
    ) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(rows + inner)
        self.columns, self.swiglu, self.x_format = rows, swiglu, x_format
        weight_rows = 2 * rows if swiglu else rows

        def fp4(kind: str, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
            codes = torch.randint(256, (*shape, inner // 2), generator=generator, dtype=torch.uint8)
            if kind == "nvfp4":
                scale = torch.randint(0x10, 0x30, (*shape, inner // 16), generator=generator, dtype=torch.uint8)
                return codes, scale.view(torch.float8_e4m3fn)
            return codes, torch.randint(119, 125, (*shape, inner // 32), generator=generator, dtype=torch.uint8)

        self.x_scale: torch.Tensor | None = None
        if x_format == "bfloat16":
            x = torch.randn(5, inner, generator=generator).to(torch.bfloat16)
            values, beside = x.double(), float("nan")
        elif x_format == "nvfp4":
            x, self.x_scale = fp4("nvfp4", 5)
            values, beside = by_hand(x, self.x_scale), 0xFF
        else:
            x = torch.randn(5, inner, generator=generator).to(torch.float8_e4m3fn)
            self.x_scale = torch.randint(123, 129, (5, inner // 32), generator=generator, dtype=torch.uint8)
            values = x.double() * torch.exp2(self.x_scale.double() - 127).repeat_interleave(32, dim=1)
            beside = float("nan")
        self.wide = torch.full((5, x.shape[1] + 64), beside).to(x.dtype)
        self.wide[:, 16:-48] = x
        codes, scale = fp4(weights, 2, weight_rows)
        self.exact = values[torch.tensor(SLOTS) // TOP_K] @ by_hand(codes[1], scale[1]).T
        self.weight = interleave_weights(codes, scale, gate_and_up=swiglu) if interleaved else (codes, scale)
        tiles = 2 if few else 14
        self.tiles = torch.tensor([1] + [-1] * (tiles - 1), dtype=torch.int32)
        self.slots = torch.full((tiles * tile_size,), -1, dtype=torch.int32)
        self.slots[: len(SLOTS)] = torch.tensor(SLOTS, dtype=torch.int32)
        self.alpha = torch.tensor([9.0, 0.25])
        if swiglu:
            self.exact = self.exact * 0.25
            gate, up = self.exact[:, :rows].clamp(max=LIMIT), self.exact[:, rows:].clamp(-LIMIT, LIMIT)
            self.exact = gate / (1 + torch.exp(-gate)) * up
        else:
            self.exact = self.exact * 0.25

    def maps(self, device: str) -> tuple[Any, ...]:
        """x with its NaNs on either side, weights and maps, on the device."""
        x = self.wide.to(device)[:, 16:-48]
        return (x, *(value.to(device) for value in (*self.weight, self.tiles, self.slots)))

    def check(self, device: str) -> None:
        out = poison(torch.empty(self.slots.numel(), self.columns + 32, dtype=torch.bfloat16, device=device))
        x_scale = None if self.x_scale is None else self.x_scale.to(device)
        moe_grouped_gemm(
            *self.maps(device), x_scale, self.alpha.to(device), None, TOP_K, self.swiglu,
            LIMIT if self.swiglu else 0.0, out=out[:, 16:-16],
        )  # fmt: skip
        got = out[: len(SLOTS), 16:-16].cpu().double()
        assert float((got - self.exact).abs().max()) <= 2**-8 * float(self.exact.abs().max())
        assert float((got - self.exact).norm() / self.exact.norm()) < 2**-8
        assert is_poison(out[:, :16]).all()
        assert is_poison(out[:, -16:]).all()
        assert is_poison(out[len(SLOTS) :]).all()


@pytest.mark.parametrize(("rows", "inner"), [(96, 288), (288, 96)])
@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize(
    ("x_format", "weights", "interleaved", "tile_size"), sizes_of(BFLOAT16 + INTERLEAVED + QUANTISED)
)
def test_shards_of_v4_1(
    x_format: str, weights: str, interleaved: bool, tile_size: int, swiglu: bool, rows: int, inner: int, device: str
) -> None:
    Problem(x_format, weights, interleaved, tile_size, rows, inner, swiglu).check(device)


@pytest.mark.parametrize(("rows", "inner"), [(96, 288), (288, 96), (48, 32)])
@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize(("x_format", "weights", "interleaved"), INTERLEAVED)
def test_few_tiles(
    x_format: str, weights: str, interleaved: bool, swiglu: bool, rows: int, inner: int, device: str
) -> None:
    Problem(x_format, weights, interleaved, 16, rows, inner, swiglu, few=True).check(device)


def test_both_kernels_of_interleaved_weights_are_tested() -> None:
    for few in (False, True):
        problem = Problem("bfloat16", "mxfp4", True, 16, 96, 288, False, few)
        with emulated("sm_90a") as symbols:
            problem.check("cpu")
        assert ["few_tiles" in symbol for symbol in symbols] == [few]


@pytest.mark.parametrize(
    ("weights", "interleaved", "rows", "inner"),
    [
        ("mxfp4", False, 16, 32),
        ("nvfp4", False, 16, 32),
        ("mxfp4", True, 16, 32),
        ("nvfp4", True, 16, 16),
        ("nvfp4", True, 144, 144),
        ("mxfp4", False, 144, 160),
        ("mxfp4", True, 208, 416),
    ],
)
def test_least_steps(weights: str, interleaved: bool, rows: int, inner: int, device: str) -> None:
    """Columns by 16; inner sizes by 32, or by the scales' group."""
    for swiglu in (False, True):
        Problem("bfloat16", weights, interleaved, 16, rows, inner, swiglu).check(device)


@pytest.mark.parametrize("swizzle", [False, True])
@pytest.mark.parametrize(("rows", "inner"), [(96, 288), (288, 96)])
@pytest.mark.parametrize(("x_format", "weights", "interleaved", "tile_size"), sizes_of(QUANTISED))
def test_quantised_shards(
    x_format: str, weights: str, interleaved: bool, tile_size: int, rows: int, inner: int, swizzle: bool, device: str
) -> None:
    """Half a step of the codes from the exact value; padding and rows without a slot as documented."""
    problem = Problem(x_format, weights, interleaved, tile_size, rows, inner, True)
    nvfp4, used = x_format == "nvfp4", len(SLOTS)
    group = 16 if nvfp4 else 32
    groups, slots = rows // group, problem.slots.numel()
    extent = (-(-slots // 128) * 128, -(-groups // 4) * 4) if swizzle else (slots, groups)
    data = poison(torch.empty(slots, rows // 2 if nvfp4 else rows, dtype=torch.uint8, device=device))
    scale = poison(torch.empty(extent, dtype=torch.uint8, device=device))
    global_scale = torch.tensor([0.003], device=device) if nvfp4 else None
    moe_grouped_gemm_quantized(
        *problem.maps(device), problem.x_scale.to(device), global_scale, problem.alpha.to(device), None, TOP_K, LIMIT,  # type: ignore[union-attr]
        swizzle, out=data, out_scale=scale,
    )  # fmt: skip
    assert is_poison(data[used:]).all()
    if swizzle:
        in_rows = blackwell_unswizzle_32_4_4(scale, *scale.shape)
        assert (in_rows[used:] == 0).all()
        assert (in_rows[:, groups:] == 0).all()
        scale = in_rows[:, :groups].contiguous()
    else:
        assert is_poison(scale[used:]).all()
    data, scale = data[:used].contiguous(), scale[:used].contiguous()
    if nvfp4:
        got = dequantize_nvfp4(data, scale.view(torch.float8_e4m3fn), global_scale, dtype=torch.float32)  # type: ignore[arg-type]
        steps = scale.view(torch.float8_e4m3fn).cpu().double() * 0.003
    else:
        got = dequantize_mxfp8(data, scale, dtype=torch.float32)
        steps = torch.exp2(scale.cpu().double() - 127) * 16
    allowed = steps.repeat_interleave(group, dim=1) * 1.001 + problem.exact.abs() * 2**-7
    assert ((got.cpu().double() - problem.exact).abs() <= allowed).all()
    assert float((got.cpu().double() - problem.exact).norm() / problem.exact.norm()) < (0.12 if nvfp4 else 0.03)


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"rows": 24}, "weight rows: expected a multiple of 16, got 24"),
        ({"rows": 48, "swiglu": True}, "weight rows: expected a multiple of 32, got 48"),
        ({"inner": 48}, "weight inner size: expected a multiple of 32, got 48"),
        ({"inner": 0}, "weight inner size: expected 32 to 1073741823, got 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_error_says_which_widths_there_are(changed: dict[str, Any], text: str) -> None:
    rows, inner, swiglu = changed.get("rows", 64), changed.get("inner", 64), changed.get("swiglu", False)
    with pytest.raises(InvalidArgumentError, match=f"^moe_grouped_gemm: {text}$"):
        moe_grouped_gemm(
            torch.zeros(1, inner, dtype=torch.bfloat16),
            torch.zeros(1, rows, inner // 2, dtype=torch.uint8),
            torch.zeros(1, rows, inner // 16).to(torch.float8_e4m3fn),
            torch.zeros(1, dtype=torch.int32),
            torch.zeros(16, dtype=torch.int32),
            swiglu=swiglu,
        )


def test_quantised_columns_are_the_inner_size_of_the_second_product() -> None:
    problem = Problem("nvfp4", "nvfp4", False, 16, 48, 64, True)
    with pytest.raises(
        InvalidArgumentError, match=r"^moe_grouped_gemm_quantized: weight rows: expected a multiple of 64"
    ):
        moe_grouped_gemm_quantized(*problem.maps("cpu"), problem.x_scale, torch.ones(1), top_k=TOP_K)


@pytest.mark.parametrize(("inner", "text"), [(384, "expected 129 to 256, got 384"), (144, "expected a multiple of 32")])
def test_x_has_the_inner_size(inner: int, text: str) -> None:
    """Interleaved weights say it by the block: x says where the last one ends."""
    problem = Problem("bfloat16", "mxfp4", True, 16, 32, 160, False)
    x = torch.zeros(5, inner, dtype=torch.bfloat16)
    with pytest.raises(InvalidArgumentError, match=f"^moe_grouped_gemm: x columns: {text}"):
        moe_grouped_gemm(x, *problem.weight, problem.tiles, problem.slots, top_k=TOP_K)


def test_what_can_be_interleaved() -> None:
    mxfp4, nvfp4 = torch.zeros(0, dtype=torch.uint8), torch.zeros(0).to(torch.float8_e4m3fn)
    assert can_interleave(96, 288, mxfp4)
    assert can_interleave(16, 16, nvfp4)
    assert not can_interleave(16, 16, mxfp4)
    assert not can_interleave(24, 32, mxfp4)
    assert not can_interleave(16, 24, nvfp4)
