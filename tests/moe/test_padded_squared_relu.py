from __future__ import annotations

import math

import pytest
import torch
from dsv4_kernels.cases import is_poison, poison
from dsv4_kernels.moe import padded_squared_relu


def all_bfloat16() -> torch.Tensor:
    """Every bfloat16 there is, NaNs included, as a [256, 256] matrix."""
    return torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).reshape(256, 256)


def squared_relu(value: float) -> float:
    """From the mathematics, in float64; the caller rounds once."""
    return math.nan if math.isnan(value) else max(value, 0.0) ** 2


def n_used(value: int, device: str, rank: int = 0) -> torch.Tensor:
    return torch.full((1,) * rank, value, dtype=torch.int32, device=device)


def test_every_bfloat16(device: str) -> None:
    x = all_bfloat16()
    rows = torch.arange(256, dtype=torch.int32)
    out = padded_squared_relu(x.to(device), rows.to(device), n_used(256, device)).cpu()
    # The square of a bfloat16 has 16 significant bits: float64 to bfloat16 rounds once, through no other format.
    expected = torch.tensor([squared_relu(v) for v in x.flatten().tolist()], dtype=torch.float64)
    expected = expected.to(torch.float32).to(torch.bfloat16).reshape(256, 256)
    same = (out.view(torch.int16) == expected.view(torch.int16)) | (out.isnan() & expected.isnan())
    assert same.all()


@pytest.mark.parametrize("columns", [1, 7, 16, 1023, 1024, 1025, 3072])
@pytest.mark.parametrize(("rows", "used"), [(1, 1), (9, 9), (300, 123), (300, 0)])
def test_only_used_rows_are_written(rows: int, used: int, columns: int, device: str) -> None:
    generator = torch.Generator().manual_seed(rows * columns)
    x = torch.randn(rows, columns, generator=generator).to(torch.bfloat16)
    mapping = torch.randint(-1, 3, (rows,), generator=generator, dtype=torch.int32)
    out = poison(torch.empty(rows, columns, dtype=torch.bfloat16, device=device))
    padded_squared_relu(x.to(device), mapping.to(device), n_used(used, device), out=out)
    out = out.cpu()
    for row in range(rows):
        if row < used and mapping[row] >= 0:
            expected = torch.tensor([squared_relu(v) for v in x[row].tolist()]).to(torch.bfloat16)
            assert torch.equal(out[row], expected), row
        else:
            assert is_poison(out[row]).all(), row


@pytest.mark.parametrize(("value", "written"), [(-5, 0), (0, 0), (4, 4), (5, 4), (2**31 - 1, 4), (-(2**31), 0)])
@pytest.mark.parametrize("rank", [0, 1])
def test_n_used_outside_the_rows(value: int, written: int, rank: int, device: str) -> None:
    x = torch.ones(4, 32, dtype=torch.bfloat16, device=device)
    out = poison(torch.empty_like(x))
    padded_squared_relu(x, torch.zeros(4, dtype=torch.int32, device=device), n_used(value, device, rank), out=out)
    assert (~is_poison(out)).all(dim=1).tolist() == [row < written for row in range(4)]


def test_strided_rows_and_poison_between(device: str) -> None:
    """Aligned and unaligned rows of wider buffers: what lies between the rows stays."""
    for offset, columns in ((16, 64), (3, 50)):
        wide = poison(torch.empty(6, 128, dtype=torch.bfloat16, device=device))
        x = torch.randn(6, 200, device=device).to(torch.bfloat16)[:, offset : offset + columns]
        out = wide[:, offset : offset + columns]
        padded_squared_relu(x, torch.zeros(6, dtype=torch.int32, device=device), n_used(6, device), out=out)
        assert torch.equal(out, x.float().relu().square().to(torch.bfloat16))
        assert is_poison(wide[:, :offset]).all()
        assert is_poison(wide[:, offset + columns :]).all()


def test_in_place(device: str) -> None:
    x = torch.randn(5, 96, device=device).to(torch.bfloat16)
    expected = x.float().relu().square().to(torch.bfloat16)
    result = padded_squared_relu(x, torch.zeros(5, dtype=torch.int32, device=device), n_used(5, device), out=x)
    assert result is x
    assert torch.equal(x, expected)


@pytest.mark.parametrize("shape", [(0, 64), (4, 0)])
def test_empty(shape: tuple[int, int], device: str) -> None:
    x = torch.empty(shape, dtype=torch.bfloat16, device=device)
    mapping = torch.zeros(shape[0], dtype=torch.int32, device=device)
    assert padded_squared_relu(x, mapping, n_used(shape[0], device)).shape == shape


@pytest.mark.gpu
def test_more_than_two_billion_elements() -> None:
    rows, columns = 2**20 + 3, 2048
    x = torch.ones(rows, columns, dtype=torch.bfloat16, device="cuda")
    mapping = torch.full((rows,), -1, dtype=torch.int32, device="cuda")
    mapping[-1] = 0
    x[-1] = 3
    padded_squared_relu(x, mapping, n_used(rows, "cuda"), out=x)
    assert (x[-1] == 9).all()
    assert (x[-2] == 1).all()
