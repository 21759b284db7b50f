from __future__ import annotations

import math

import pytest
import torch
from dsv4_kernels.cases import is_poison, poison, worst_relative_error
from dsv4_kernels.errors import InvalidArgumentError
from dsv4_kernels.moe import padded_swiglu

NOT_NUMBERS = (math.nan, math.inf, -math.inf)


def everyone(rows: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """permutation_map and n_used where every row holds a token."""
    return (
        torch.arange(rows, dtype=torch.int32, device=device),
        torch.tensor(rows, dtype=torch.int32, device=device),
    )


def exact(x: torch.Tensor, limit: float | None) -> torch.Tensor:
    """From the mathematics, in float64."""
    gate, up = x.to(torch.float64).chunk(2, dim=1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate / (1 + torch.exp(-gate)) * up


def plain(x: torch.Tensor, limit: float | None) -> torch.Tensor:
    gate, up = x.to(torch.float32).chunk(2, dim=1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (torch.nn.functional.silu(gate) * up).to(torch.bfloat16)


@pytest.mark.parametrize("limit", [None, 10.0, 0.5])
def test_every_gate(limit: float | None, device: str) -> None:
    """Every finite bfloat16 as gate down to -88, below which plain torch's silu has no normal result."""
    gates = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    gates = gates[gates.isfinite() & (gates >= -87) & (gates.abs() < 1e30)]
    gates = gates[: gates.numel() // 128 * 128].reshape(128, -1)
    ups = torch.randn(gates.shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    x = torch.cat((gates, ups), dim=1)
    got = padded_swiglu(x.to(device), *everyone(128, device), limit).cpu()
    # Results below the least normal number have no relative precision, in bfloat16 as in float32.
    expected = exact(x, limit)
    normal = expected.abs() >= 2.0**-125
    error, allowed = (worst_relative_error(v[normal], expected[normal]) for v in (got, plain(x, limit)))
    assert error <= 2 * allowed
    assert (got[~normal].to(torch.float64) - expected[~normal]).abs().max() <= 2.0**-125


def test_below_the_range_of_exp(device: str) -> None:
    """exp(-gate) overflows in float32 from -89 on; results stay right as long as they are numbers of bfloat16."""
    gates = torch.linspace(-91, -80, 64)[None].to(torch.bfloat16)
    x = torch.cat((gates, torch.full_like(gates, 256.0)), dim=1)
    got = padded_swiglu(x.to(device), *everyone(1, device)).cpu()
    assert worst_relative_error(got, exact(x, None)) <= 2.0**-8


def test_what_is_no_number(device: str) -> None:
    """NaN stays NaN, whichever side it is on and whatever the clamps; infinities are clamped where there are clamps."""
    ones = [1.0] * 3
    gates = torch.tensor([[*NOT_NUMBERS, *ones]]).to(torch.bfloat16)
    ups = torch.tensor([[*ones, *NOT_NUMBERS]]).to(torch.bfloat16)
    x = torch.cat((gates, ups), dim=1)
    silu_one = 1 / (1 + math.exp(-1))
    free = padded_swiglu(x.to(device), *everyone(1, device)).cpu()[0]
    expected = torch.tensor([math.nan, math.inf, math.nan, math.nan, math.inf, -math.inf]).to(torch.bfloat16)
    assert torch.equal(free.isnan(), expected.isnan())
    assert torch.equal(free[~free.isnan()], expected[~free.isnan()])
    clamped = padded_swiglu(x.to(device), *everyone(1, device), 10.0).cpu()[0]
    silu_limit = 10 / (1 + math.exp(-10))
    expected = torch.tensor([math.nan, silu_limit, math.nan, math.nan, 10 * silu_one, -10 * silu_one])
    assert torch.equal(clamped.isnan(), expected.isnan())
    assert worst_relative_error(clamped[~clamped.isnan()], expected[~clamped.isnan()]) <= 2.0**-8


@pytest.mark.parametrize("columns", [1, 7, 255, 256, 257, 768])
@pytest.mark.parametrize(("rows", "used"), [(1, 1), (9, 9), (130, 77), (130, 0)])
def test_only_used_rows_are_written(rows: int, used: int, columns: int, device: str) -> None:
    generator = torch.Generator().manual_seed(rows * columns)
    x = torch.randn(rows, 2 * columns, generator=generator).to(torch.bfloat16)
    mapping = torch.randint(-1, 3, (rows,), generator=generator, dtype=torch.int32)
    out = poison(torch.empty(rows, columns, dtype=torch.bfloat16, device=device))
    n_used = torch.tensor(used, dtype=torch.int32, device=device)
    padded_swiglu(x.to(device), mapping.to(device), n_used, 10.0, out=out)
    held = (torch.arange(rows) < used) & (mapping >= 0)
    out = out.cpu()
    assert is_poison(out[~held]).all()
    assert not is_poison(out[held]).any()
    assert worst_relative_error(out[held], exact(x[held], 10.0)) <= 2.0**-8


def test_strided_rows_and_poison_between(device: str) -> None:
    for offset, columns in ((16, 32), (3, 25)):
        wide = poison(torch.empty(6, 128, dtype=torch.bfloat16, device=device))
        x = torch.randn(6, 200, device=device).to(torch.bfloat16)[:, offset : offset + 2 * columns]
        out = wide[:, offset : offset + columns]
        padded_swiglu(x, *everyone(6, device), out=out)
        assert worst_relative_error(out.cpu(), exact(x.cpu(), None)) <= 2.0**-8
        assert is_poison(wide[:, :offset]).all()
        assert is_poison(wide[:, offset + columns :]).all()


@pytest.mark.parametrize("limit", [-1.0, -0.25, math.nan, math.inf])
def test_refuses_limit(limit: float) -> None:
    x = torch.zeros(2, 8, dtype=torch.bfloat16)
    with pytest.raises(
        InvalidArgumentError, match=f"padded_swiglu: limit: expected a finite number of at least 0, got {limit:g}$"
    ):
        padded_swiglu(x, *everyone(2, "cpu"), limit)


def test_refuses_odd_columns() -> None:
    x = torch.zeros(2, 7, dtype=torch.bfloat16)
    with pytest.raises(InvalidArgumentError, match=r"x columns \(gate, up\): expected a multiple of 2, got 7"):
        padded_swiglu(x, *everyone(2, "cpu"))
