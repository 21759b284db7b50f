"""The grouped product against sums written out by hand, and against hostile maps."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from dsv4_kernels import InvalidArgumentError
from dsv4_kernels.cases import is_poison, poison
from dsv4_kernels.moe import moe_grouped_gemm, run_fused_swiglu_grouped_gemm, run_nvfp4_grouped_gemm

pytestmark = pytest.mark.every_architecture

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E2M1 += [-value for value in E2M1]


def by_hand(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Float64 values of packed codes: nibble by nibble, low first; E8M0 scales for 32, E4M3 scales for 16."""
    values = [[value for byte in row for value in (E2M1[byte & 15], E2M1[byte >> 4])] for row in codes.tolist()]
    factors = scale.double() if scale.dtype == torch.float8_e4m3fn else torch.exp2(scale.double() - 127)
    group = len(values[0]) // scale.shape[1]
    return torch.tensor(values, dtype=torch.float64) * factors.repeat_interleave(group, dim=1)


class Problem:
    """One tile of 16 rows of expert 1 of 2, 3 of them padding; the other tile is unused."""

    def __init__(self, device: str, nvfp4: bool = False, gate_and_up: bool = False) -> None:
        generator = torch.Generator().manual_seed(7)
        rows = 128 if gate_and_up else 64
        self.weight = torch.randint(256, (2, rows, 32), generator=generator, dtype=torch.uint8)
        if nvfp4:
            scale = torch.randint(0x08, 0x40, (2, rows, 4), generator=generator, dtype=torch.uint8)
            self.scale = scale.view(torch.float8_e4m3fn)
        else:
            self.scale = torch.randint(120, 130, (2, rows, 2), generator=generator, dtype=torch.uint8)
        self.x = torch.randn(5, 64, generator=generator).to(torch.bfloat16)
        self.tiles = torch.tensor([1, -1], dtype=torch.int32)
        slots = [9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 9, 4, -1, -1, -1] + [-1] * 16
        self.slots = torch.tensor(slots, dtype=torch.int32)
        self.expected = self.x[self.slots[:13].long() // 2].double() @ by_hand(self.weight[1], self.scale[1]).T
        self.arguments = tuple(value.to(device) for value in (self.x, self.weight, self.scale, self.tiles, self.slots))


@pytest.mark.parametrize("nvfp4", [False, True])
def test_product(nvfp4: bool, device: str) -> None:
    problem = Problem(device, nvfp4)
    alpha = torch.tensor([100.0, 0.25], device=device)
    out = poison(torch.empty(32, 64, dtype=torch.bfloat16, device=device))
    result = run_nvfp4_grouped_gemm(*problem.arguments, alpha=alpha, top_k=2, out=out)
    assert result is out
    assert torch.allclose(out[:13].cpu().double(), problem.expected * 0.25, rtol=2**-8, atol=1e-4)
    assert is_poison(out[13:]).all()


@pytest.mark.parametrize("limit", [0.0, 4.0])
def test_swiglu_clamps_before_silu(limit: float, device: str) -> None:
    problem = Problem(device, gate_and_up=True)
    alpha = torch.tensor([[9.0, 9.0], [0.5, 2.0]], device=device)
    weights = torch.rand(5, 2, device=device)
    out = run_fused_swiglu_grouped_gemm(*problem.arguments, alpha=alpha, slot_weights=weights, top_k=2, limit=limit)
    gate, up = problem.expected[:, :64] * 0.5, problem.expected[:, 64:] * 2.0
    if limit:
        gate, up = torch.where(gate > limit, limit, gate), up.clamp(-limit, limit)
        assert (gate == limit).any()
        assert (up == -limit).any()
    expected = gate / (1 + torch.exp(-gate)) * up * weights.cpu().flatten()[problem.slots[:13].long(), None].double()
    assert torch.allclose(out[:13].cpu().double(), expected, rtol=2**-7, atol=1e-3)


def test_each_scale_counts_once(device: str) -> None:
    """Twice the block scales with half the alpha is the same product, to the bit."""
    problem = Problem(device)
    x, weight, scale, tiles, slots = problem.arguments
    one = torch.ones(2, device=device)
    first = moe_grouped_gemm(x, weight, scale, tiles, slots, None, one, None, 2)
    second = moe_grouped_gemm(x, weight, scale + 1, tiles, slots, None, one / 2, None, 2)
    assert torch.equal(first[:13], second[:13])


def test_a_row_does_not_depend_on_its_tile(device: str) -> None:
    """Another place in the tile, other neighbours, other tiles: the same bits."""
    problem = Problem(device)
    x, weight, scale, tiles, slots = problem.arguments
    whole = run_nvfp4_grouped_gemm(x, weight, scale, tiles, slots, top_k=2)
    alone = slots.clone().fill_(-1)
    alone[21] = 7
    single = run_nvfp4_grouped_gemm(x, weight, scale, tiles.flip(0).contiguous(), alone, top_k=2)
    assert torch.equal(single[21], whole[8])


def test_hostile_maps_write_nothing(device: str) -> None:
    """Experts and slots far out of range: no read out of bounds, no row written."""
    problem = Problem(device)
    x, weight, scale, _, _ = problem.arguments
    out = poison(torch.empty(64, 64, dtype=torch.bfloat16, device=device))
    tiles = torch.tensor([2, 2**31 - 1, -(2**31), 0], dtype=torch.int32, device=device)
    slots = torch.zeros(64, dtype=torch.int32, device=device)
    slots[48:] = torch.tensor([10, 2**31 - 1, -(2**31), -1] * 4, dtype=torch.int32, device=device)
    moe_grouped_gemm(x, weight, scale, tiles, slots, top_k=2, out=out)
    assert is_poison(out).all()


def test_nan_stays_in_its_row(device: str) -> None:
    problem = Problem(device, gate_and_up=True)
    x, weight, scale, tiles, slots = problem.arguments
    x[2, 5] = math.nan
    out = run_fused_swiglu_grouped_gemm(x, weight, scale, tiles, slots, top_k=2, limit=3.0)[:13]
    reads = (problem.slots[:13] // 2 == 2).tolist()
    assert out.isnan().all(dim=1).tolist() == reads
    assert out.isnan().any(dim=1).tolist() == reads


@pytest.mark.parametrize("nvfp4", [False, True])
def test_scales_of_quantised_rows_at_their_ends(nvfp4: bool, device: str) -> None:
    """The least and the largest are powers like others, 0 counts in E8M0, and NaN is of its row alone."""
    problem = Problem(device, nvfp4)
    _, weight, scale, tiles, _ = problem.arguments
    slots = torch.arange(32, dtype=torch.int32, device=device)
    if nvfp4:
        x = torch.full((32, 32), 0x32, dtype=torch.uint8, device=device)  # 1 and 1.5 in turn
        ends, nan = [0x01, 0x07, 0x08, 0x7E], 0x7F
    else:
        x = torch.full((32, 64), 1.5, device=device).to(torch.float8_e4m3fn)
        ends, nan = [0, 1, 64, 254], 255
        # Weights so large that the least scales make normal sums, then so small that the largest one does.
        scale[:, :32], scale[:, 32:] = 187, 27
    kind = torch.arange(32) % 5
    x_scale = torch.tensor([*ends, nan], dtype=torch.uint8)[kind, None].repeat(1, 4 if nvfp4 else 2)
    typed = x_scale.view(torch.float8_e4m3fn) if nvfp4 else x_scale
    out = run_nvfp4_grouped_gemm(x, weight, scale, tiles, slots, x_scale=typed.to(device))[:16].cpu().double()
    values = torch.tensor([1.0, 1.5] * 32 if nvfp4 else [1.5] * 64, dtype=torch.float64)
    decoded = typed.double() if nvfp4 else torch.exp2(x_scale.double() - 127)
    rows = values * decoded.repeat_interleave(16 if nvfp4 else 32, dim=1)
    expected = (rows @ by_hand(weight[1].cpu(), scale[1].cpu()).T)[:16]
    kind = kind[:16]
    assert out[kind == 4].isnan().all()
    small, large = (kind < 4, kind < 4) if nvfp4 else (kind < 3, kind == 3)
    assert torch.allclose(out[small, :32], expected[small, :32], rtol=2**-8, atol=0)
    assert torch.allclose(out[large, 32:], expected[large, 32:], rtol=2**-8, atol=0)


def test_strided_rows(device: str) -> None:
    problem = Problem(device)
    x, weight, scale, tiles, slots = problem.arguments
    wide = torch.zeros(5, 96, dtype=torch.bfloat16, device=device)
    wide[:, 16:80] = x
    out = poison(torch.empty(32, 96, dtype=torch.bfloat16, device=device))
    moe_grouped_gemm(wide[:, 16:80], weight, scale, tiles, slots, top_k=2, out=out[:, 16:80])
    assert torch.equal(out[:13, 16:80], run_nvfp4_grouped_gemm(x, weight, scale, tiles, slots, top_k=2)[:13])
    assert is_poison(out[:, :16]).all()
    assert is_poison(out[:, 80:]).all()


def test_no_tiles(device: str) -> None:
    problem = Problem(device)
    none = torch.empty(0, dtype=torch.int32, device=device)
    assert moe_grouped_gemm(*problem.arguments[:3], none, none).shape == (0, 64)


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"x": torch.zeros(5, 32, dtype=torch.bfloat16)}, r"x columns: expected 64, got 32"),
    ({"row_to_slot": torch.zeros(64, dtype=torch.int32)}, r"row_to_slot: expected 16, 64 or 128 rows per tile, got 64"),
    ({"x": torch.zeros(5, 64).to(torch.float8_e4m3fn)}, r"x_scale: expected a tensor, got none"),
    ({"x_scale": torch.zeros(5, 2, dtype=torch.uint8)}, r"x_scale: must be omitted when x is bfloat16"),
    ({"weight_scale": torch.zeros(2, 64, 3, dtype=torch.uint8)}, r"weight_scale: expected shape \[2, 64, 2\]"),
    ({"alpha": torch.zeros(3)}, r"alpha: expected shape \[2\], got \[3\]"),
    ({"limit": math.nan}, r"limit: expected a finite number of at least 0, got nan"),
    ({"limit": math.inf}, r"limit: expected a finite number of at least 0, got inf"),
    ({"limit": -0.5}, r"limit: expected a finite number of at least 0, got -0.5"),
    ({"top_k": 33}, r"top_k: expected 0 to 32, got 33"),
]


@pytest.mark.parametrize(("changed", "text"), REFUSALS, ids=[text for _, text in REFUSALS])
def test_refusals(changed: dict[str, Any], text: str) -> None:
    problem = Problem("cpu")
    names = ("x", "weight", "weight_scale", "tile_to_expert", "row_to_slot")
    arguments = dict(zip(names, problem.arguments, strict=True)) | {"out": torch.zeros(32, 64, dtype=torch.bfloat16)}
    if changed.get("swiglu"):
        arguments["out"] = torch.zeros(32, 32, dtype=torch.bfloat16)
    with pytest.raises(InvalidArgumentError, match="moe_grouped_gemm: " + text):
        moe_grouped_gemm(**(arguments | changed))


@pytest.mark.parametrize("architecture", ["sm_100a", "sm_103a"])
@pytest.mark.parametrize("rows", [16, 64, 128])
@pytest.mark.parametrize("kind", ["swiglu", "plain"])
def test_blackwell_images_hold_the_block_scaled_instruction(architecture: str, rows: int, kind: str) -> None:
    def text(name: str) -> str:
        path = Path(os.environ.get("DSV4_TEST_PTX", "nowhere")) / architecture / f"{name}.ptx"
        if not path.exists() and not os.environ.get("CI"):
            pytest.skip(f"not built here: {path.name} for {architecture}")
        return path.read_text()

    assert "kind::mxf4nvf4.block_scale.block16" in text(f"moe_gemm_e2m1_nvfp4_{kind}_{rows}")
    if rows != 64:
        assert "kind::mxf8f6f4.block_scale" in text(f"moe_gemm_e4m3_mxfp4_{kind}_{rows}")
