from __future__ import annotations

import math

import pytest
import torch
from dsv4_kernels.cases import is_poison, poison
from dsv4_kernels.moe import moe_finalize


def total(rows: torch.Tensor, slots: list[int], weights: list[float], shared: torch.Tensor | None) -> torch.Tensor:
    """One token in float64."""
    result = torch.zeros(rows.shape[1], dtype=torch.float64)
    for row, weight in zip(slots, weights, strict=True):
        if 0 <= row < len(rows):
            result += weight * rows[row].double()
    return result if shared is None else result + shared.double()


@pytest.mark.parametrize("columns", [1, 7, 8, 2048, 2056])
@pytest.mark.parametrize("with_shared", [False, True])
def test_weighted_sum(columns: int, with_shared: bool, device: str) -> None:
    generator = torch.Generator().manual_seed(columns)
    rows = torch.randn(20, columns, generator=generator).to(torch.bfloat16)
    slot_to_row = torch.randint(-2, 23, (5, 9), generator=generator, dtype=torch.int32)  # -2, -1, 20 .. 22 are no rows
    weights = torch.rand(5, 9, generator=generator)
    shared = torch.randn(5, columns, generator=generator).to(torch.bfloat16) if with_shared else None
    given = (rows, slot_to_row, weights, shared)
    out = moe_finalize(*(None if value is None else value.to(device) for value in given)).cpu()
    for token in range(5):
        addition = None if shared is None else shared[token]
        exact = total(rows, slot_to_row[token].tolist(), weights[token].tolist(), addition)
        assert torch.allclose(out[token].double(), exact, rtol=2**-8, atol=1e-5)


def test_weights_that_lie_apart(device: str) -> None:
    """The first columns of wider rows; what lies between is NaN."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(20, 24, generator=generator).to(torch.bfloat16)
    slot_to_row = torch.randint(20, (5, 7), generator=generator, dtype=torch.int32)
    wide = torch.full((5, 11), math.nan)
    wide[:, 2:9] = torch.rand(5, 7, generator=generator)
    out = moe_finalize(rows.to(device), slot_to_row.to(device), wide.to(device)[:, 2:9]).cpu()
    for token in range(5):
        exact = total(rows, slot_to_row[token].tolist(), wide[token, 2:9].tolist(), None)
        assert torch.allclose(out[token].double(), exact, rtol=2**-8, atol=1e-5)


def test_order_is_that_of_the_slots(device: str) -> None:
    """2^24 + 1 + 1 in float32 is 2^24, 1 + 1 + 2^24 is 2^24 + 2: bfloat16 rounds both alike, so take it away again."""
    rows = torch.tensor([[2.0**24], [1.0], [-(2.0**24)]]).to(torch.bfloat16).to(device)
    slot_to_row = torch.tensor([[0, 1, 1, 2], [1, 1, 0, 2]], dtype=torch.int32, device=device)
    out = poison(torch.empty(2, 1, dtype=torch.bfloat16, device=device))
    kernels_ran = not torch.equal(moe_finalize(rows, slot_to_row, out=out).cpu().flatten(), torch.tensor([2.0, 2.0]))
    # The CPU implementation sums in float64, where both are 2.
    assert out.flatten().tolist() == ([0.0, 2.0] if kernels_ran else [2.0, 2.0])


def test_missing_rows_contribute_nothing_even_if_weights_are_nan(device: str) -> None:
    rows = torch.full((2, 16), math.nan, dtype=torch.bfloat16, device=device)
    slot_to_row = torch.tensor([[-1, 2], [2**31 - 1, -(2**31)]], dtype=torch.int32, device=device)
    weights = torch.full((2, 2), math.nan, device=device)
    assert moe_finalize(rows, slot_to_row, weights).tolist() == [[0.0] * 16] * 2


def test_a_token_does_not_depend_on_its_batch(device: str) -> None:
    rows = torch.randn(60, 264, device=device).to(torch.bfloat16)
    slot_to_row = torch.arange(60, dtype=torch.int32, device=device).reshape(10, 6)
    weights = torch.rand(10, 6, device=device)
    whole = moe_finalize(rows, slot_to_row, weights)
    for token in (0, 3, 9):
        alone = moe_finalize(rows, slot_to_row[token : token + 1], weights[token : token + 1])
        assert torch.equal(alone[0], whole[token])


def test_strided_rows_and_what_lies_between(device: str) -> None:
    wide_rows = torch.randn(6, 80, device=device).to(torch.bfloat16)
    wide_out = poison(torch.empty(3, 80, dtype=torch.bfloat16, device=device))
    slot_to_row = torch.tensor([[5, 0], [1, 4], [2, 3]], dtype=torch.int32, device=device)
    for offset, columns in ((16, 48), (3, 50)):
        poison(wide_out)
        rows, out = wide_rows[:, offset : offset + columns], wide_out[:, offset : offset + columns]
        moe_finalize(rows, slot_to_row, out=out)
        expected = rows[slot_to_row[:, 0].long()].float() + rows[slot_to_row[:, 1].long()].float()
        assert torch.equal(out, expected.to(torch.bfloat16))
        assert is_poison(wide_out[:, :offset]).all()
        assert is_poison(wide_out[:, offset + columns :]).all()


@pytest.mark.parametrize(("offset", "columns", "stride"), [(16, 48, 80), (3, 50, 77), (8, 64, 64 + 8)])
def test_shared_has_a_row_stride_of_its_own(offset: int, columns: int, stride: int, device: str) -> None:
    """Neither that of rows nor of out; what lies between its rows is NaN."""
    wide = torch.full((4, stride), math.nan, dtype=torch.bfloat16)
    wide[:, offset : offset + columns] = torch.arange(4, dtype=torch.bfloat16)[:, None] + 1
    rows = torch.full((2, columns + 32), 8.0, dtype=torch.bfloat16, device=device)[:, :columns]
    slot_to_row = torch.tensor([[0, 1], [1, -1], [-1, -1], [0, 0]], dtype=torch.int32, device=device)
    out = moe_finalize(rows, slot_to_row, shared=wide.to(device)[:, offset : offset + columns]).cpu()
    assert out.tolist() == [[17.0] * columns, [10.0] * columns, [3.0] * columns, [20.0] * columns]


def test_shared_in_place(device: str) -> None:
    rows = torch.ones(2, 24, dtype=torch.bfloat16, device=device)
    shared = torch.full((1, 24), 3.0, dtype=torch.bfloat16, device=device)
    slot_to_row = torch.tensor([[0, 1]], dtype=torch.int32, device=device)
    assert moe_finalize(rows, slot_to_row, None, shared, out=shared) is shared
    assert shared.tolist() == [[5.0] * 24]


@pytest.mark.parametrize(("tokens", "columns"), [(0, 64), (3, 0)])
def test_empty(tokens: int, columns: int, device: str) -> None:
    rows = torch.empty(4, columns, dtype=torch.bfloat16, device=device)
    slot_to_row = torch.zeros(tokens, 2, dtype=torch.int32, device=device)
    assert moe_finalize(rows, slot_to_row).shape == (tokens, columns)


@pytest.mark.gpu
def test_more_than_two_billion_elements() -> None:
    rows = torch.zeros(2**20 + 5, 2048, dtype=torch.bfloat16, device="cuda")
    rows[-1] = 2
    slot_to_row = torch.tensor([[2**20 + 4, 0]], dtype=torch.int32, device="cuda")
    assert (moe_finalize(rows, slot_to_row) == 2).all()
