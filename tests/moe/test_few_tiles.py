"""The grouped product of few tiles of interleaved weights: when it is chosen, and that its split changes nothing."""

from __future__ import annotations

import pytest
import torch
from dsv4_kernels.cases import is_poison, poison
from dsv4_kernels.moe import interleave_weights, run_fused_swiglu_grouped_gemm, run_nvfp4_grouped_gemm

from tests.emulated import ARCHITECTURES, emulated, ptx_folder
from tests.launches import observed
from tests.moe.test_interleaved_weights import random_codes
from tests.moe.test_moe_grouped_gemm import by_hand

pytestmark = pytest.mark.every_architecture

KERNEL = "moe_few_tiles_kernel"


class Experts:
    """Weights of some experts, in the checkpoints' layout and interleaved."""

    def __init__(self, experts: int, rows: int, inner: int, nvfp4: bool = False, gate_and_up: bool = False) -> None:
        generator = torch.Generator().manual_seed(3)
        self.codes = random_codes(rows, inner, experts)
        if nvfp4:
            scale = torch.randint(0x08, 0x28, (experts, rows, inner // 16), generator=generator, dtype=torch.uint8)
            self.scale = scale.view(torch.float8_e4m3fn)
        else:
            self.scale = torch.randint(118, 124, (experts, rows, inner // 32), generator=generator, dtype=torch.uint8)
        self.interleaved = interleave_weights(self.codes, self.scale, gate_and_up=gate_and_up)

    def product(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        return x.double() @ by_hand(self.codes[expert], self.scale[expert]).T


def maps(*tiles: tuple[int, list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """tile_to_expert and row_to_slot of tiles with these experts and slots, the rest of each tile padding."""
    rows = [slots + [-1] * (16 - len(slots)) for _, slots in tiles]
    experts = [expert for expert, _ in tiles]
    return torch.tensor(experts, dtype=torch.int32), torch.tensor(rows, dtype=torch.int32).flatten()


# Rows up to the last one in a tile: in one to four passes of 4; padding between them and whole passes of it; a tile of
# an unknown expert, one without rows, one of each number of passes.
TILES: tuple[tuple[int, list[int]], ...] = (
    (1, [5]),
    (0, [9, 0, 1, 2, 3]),
    (7, [4]),
    (2, [-1, 6, -1, -1, -1, -1, -1, -1, 7]),
    (-1, [8]),
    (3, []),
    (4, [10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, -1, 25]),
)


@pytest.mark.parametrize("inner", [128, 384, 512])
@pytest.mark.parametrize("nvfp4", [False, True])
def test_rows_of_all_passes(inner: int, nvfp4: bool, device: str) -> None:
    """One, three and four blocks of inner positions: a unit that is cut short, a group of one unit and of several."""
    experts = Experts(7, 128, inner, nvfp4)
    tiles, slots = maps(*TILES)
    x = torch.randn(13, inner, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)
    alpha = torch.rand(7) + 0.5
    weights = torch.rand(13, 2)
    out = poison(torch.empty(slots.numel(), 128, dtype=torch.bfloat16, device=device))
    given = [value.to(device) for value in (x, *experts.interleaved, tiles, slots)]
    run_nvfp4_grouped_gemm(*given, alpha=alpha.to(device), slot_weights=weights.to(device), top_k=2, out=out)
    for row, slot in enumerate(slots.tolist()):
        expert = int(tiles[row // 16])
        if not 0 <= slot < 26 or not 0 <= expert < 7:
            assert is_poison(out[row]).all()
            continue
        exact = experts.product(expert, x[slot // 2]) * alpha[expert] * weights.flatten()[slot]
        assert torch.allclose(out[row].cpu().double(), exact, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("swiglu", [False, True])
def test_no_split_changes_a_bit(architecture: str, swiglu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many weight rows on one multiprocessor: a block takes stretches of several tiles in many batches. Few of them on
    500: no block has two groups.
    """
    ptx_folder()
    rows, inner, multiprocessors_of = (256, 4096, (16, 500)) if swiglu else (6144, 128, (1, 20))
    experts = Experts(4, rows, inner, gate_and_up=swiglu)
    tiles, slots = maps((3, [0, 1, 2, 3, 4, 5]), (1, [6]), (9, [0]), (2, [7]))
    x = torch.randn(8, inner, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)
    run = run_fused_swiglu_grouped_gemm if swiglu else run_nvfp4_grouped_gemm
    results = []
    for multiprocessors in multiprocessors_of:
        monkeypatch.setitem(ARCHITECTURES, architecture, multiprocessors)
        with emulated(architecture) as symbols:
            results.append(run(x, *experts.interleaved, tiles, slots, top_k=1))
        assert len(symbols) == 1
        assert KERNEL in symbols[0]
    valid = [*range(6), 16, 48]
    assert torch.equal(results[0][valid], results[1][valid])
    moved = torch.full_like(slots, -1)
    moved[11], moved[21] = 6, 3
    with emulated(architecture):
        again = run(x, *experts.interleaved, tiles[[1, 0, 2, 3]], moved, top_k=1)
    assert torch.equal(again[[11, 21]], results[0][[16, 3]])
    if not swiglu:
        exact = experts.product(3, x[:6])
        assert torch.allclose(results[0][:6].double(), exact, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize(
    ("tiles", "rows", "experts", "weight_rows", "inner", "few"),
    [
        (12, 16, 12, 128, 128, True),
        (13, 16, 40, 128, 128, False),
        (9, 16, 8, 128, 128, False),
        (2, 64, 8, 128, 128, False),
        (2, 16, 2, 128, 8192, True),
        (2, 16, 2, 128, 8320, False),
        (6, 16, 6, 6144, 128, True),
        (6, 16, 6, 6016, 128, False),
        (3, 16, 3, 2816, 128, True),
        (3, 16, 3, 2944, 128, False),
        (1, 16, 1, 65664, 128, False),
    ],
)
def test_choice(tiles: int, rows: int, experts: int, weight_rows: int, inner: int, few: bool) -> None:
    """At most 12 tiles of 16 rows, no more than experts, of many weight rows, or of fewer blocks of 64 than the device
    has multiprocessors (132): by shapes alone.
    """
    words = torch.zeros(experts, inner // 128, weight_rows, 16, dtype=torch.int32)
    factors = torch.zeros(experts, inner // 128, weight_rows, 2, dtype=torch.int32)
    x = torch.zeros(1, inner, dtype=torch.bfloat16)
    of_tile, slots = torch.zeros(tiles, dtype=torch.int32), torch.zeros(tiles * rows, dtype=torch.int32)
    with observed("sm_90a") as launches:
        run_nvfp4_grouped_gemm(x, words, factors, of_tile, slots, top_k=1)
    (launch,) = launches
    assert (KERNEL in launch.symbol) == few
