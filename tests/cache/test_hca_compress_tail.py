"""The entry of a full HCA tail, against the mathematics in float64."""

from __future__ import annotations

import math

import pytest
import torch
from dsv4_kernels.cache import hca_compress_tail
from dsv4_kernels.cases import is_poison, poison


def expected(ka: torch.Tensor, za: torch.Tensor) -> list[float]:
    """Of one slot, from the definition, a column at a time."""
    entry = []
    for values, scores in zip(ka.T.to(torch.float64).tolist(), za.T.to(torch.float64).tolist(), strict=True):
        weights = [math.exp(score - max(scores)) for score in scores]
        entry.append(math.fsum(w * v for w, v in zip(weights, values, strict=True)) / math.fsum(weights))
    return entry


def compress(
    ka: torch.Tensor, za: torch.Tensor, tail_len: list[int], request_slots: list[int], m: int, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows, poisoned where nothing was written; and the mask."""
    entry = poison(torch.empty(len(request_slots), ka.shape[2], dtype=torch.bfloat16, device=device))
    mask = torch.empty(len(request_slots), dtype=torch.bool, device=device)
    lengths = torch.tensor(tail_len, dtype=torch.int32, device=device)
    slots = torch.tensor(request_slots, dtype=torch.int32, device=device)
    hca_compress_tail(ka.to(device), za.to(device), lengths, slots, m, out_entry=entry, out_valid_mask=mask)
    return entry.cpu(), mask.cpu()


@pytest.mark.parametrize(("m", "width"), [(1, 4), (2, 36), (127, 32), (128, 64), (129, 28), (257, 8)])
def test_rows_of_any_number(m: int, width: int, device: str) -> None:
    """Row counts around what the kernel reads side by side; rows beyond m are not read."""
    generator = torch.Generator().manual_seed(m * width)
    ka, za = torch.randn(2, 3, m + 2, width, generator=generator)
    za *= 4
    ka[:, m:], za[:, m:] = torch.nan, torch.nan
    rows, mask = compress(ka, za, [m, m - 1, m], [2, 1, 0], m, device)
    assert mask.tolist() == [True, False, True]
    assert is_poison(rows[1]).all()
    for row, slot in ((0, 2), (2, 0)):
        want = torch.tensor(expected(ka[slot, :m], za[slot, :m]), dtype=torch.float64)
        assert torch.allclose(rows[row].to(torch.float64), want, rtol=2**-8, atol=1e-6)


def test_float32_sums_are_as_good_as_any(device: str) -> None:
    """Scores that spread over hundreds: what counts is exp of differences. And equal scores: the mean of 128."""
    generator = torch.Generator().manual_seed(5)
    ka, za = torch.randn(2, 3, 128, 32, generator=generator)
    za[0] *= 200
    za[1] = -1e30
    za[2, ::2] = -torch.inf
    rows, _ = compress(ka, za, [128] * 3, [0, 1, 2], 128, device)
    for slot in range(3):
        finite = za[slot].clamp(min=-3e38)  # exp of it is 0 all the same
        want = torch.tensor(expected(ka[slot], finite), dtype=torch.float64)
        assert torch.allclose(rows[slot].to(torch.float64), want, rtol=2**-8, atol=2e-6)


def test_all_rows_masked_and_padding(device: str) -> None:
    ka, za = torch.randn(2, 2, 128, 32)
    za[0] = -torch.inf
    rows, mask = compress(ka, za, [128, 128], [0, -1, 2], 128, device)
    assert mask.tolist() == [True, False, False]
    assert (rows[0] == 0).all()
    assert is_poison(rows[1:]).all()


def test_nothing_undefined_is_returned(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a mask to tell them apart, rows of requests whose tail is not full are zeros in an allocated tensor."""
    ka, za = torch.randn(2, 2, 128, 32).to(device)
    lengths = torch.tensor([128, 127], dtype=torch.int32, device=device)
    slots = torch.tensor([1, 0, -1], dtype=torch.int32, device=device)
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *a, **k: poison(new_empty(self, *a, **k)))
    entry = hca_compress_tail(ka, za, lengths, slots, 128)
    want = torch.tensor(expected(ka[0].cpu(), za[0].cpu()), dtype=torch.float64)
    assert torch.allclose(entry[1].cpu().to(torch.float64), want, rtol=2**-8, atol=1e-6)
    assert not entry[[0, 2]].any()
