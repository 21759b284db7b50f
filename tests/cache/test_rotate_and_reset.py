"""What a flush leaves of the state."""

from __future__ import annotations

import pytest
import torch
from dsv4_kernels.cache import csa_rotate_state, hca_reset_state
from dsv4_kernels.cases import same_bits

SLOTS = 5
MASK = [True, False, True, True, True]
REQUEST_SLOTS = [3, 1, -1, SLOTS, 0]
CHANGED = [0, 3]  # valid, and inside the state


def buffers(count: int, m: int = 3, width: int = 140) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(SLOTS, m, width, generator=generator) for _ in range(count)]


def batch(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(MASK, device=device), torch.tensor(REQUEST_SLOTS, dtype=torch.int32, device=device)


@pytest.mark.parametrize("clear_rows", [True, False])
@pytest.mark.parametrize("projections", [1, 2])
def test_rotation(projections: int, clear_rows: bool, device: str) -> None:
    """With two projections the b half of the current block goes on, and the a half does not: what the description's
    rotation, which one projection has, would lose.
    """
    before = buffers(2 + 2 * projections)
    tail_len = torch.full((SLOTS,), 3, dtype=torch.int32)
    after = [rows.to(device, copy=True) for rows in before]
    lengths = tail_len.to(device, copy=True)
    csa_rotate_state(*batch(device), *after[:4], lengths, *after[4:], clear_rows=clear_rows)
    ka, za, kb, zb, *following = (rows.clone() for rows in before)
    source_k, source_z = following or (ka, za)
    kb[CHANGED], zb[CHANGED] = source_k[CHANGED], source_z[CHANGED]
    if clear_rows:
        for rows in (ka, za, *following):
            rows[CHANGED] = 0.0
    tail_len[CHANGED] = 0
    assert torch.equal(lengths.cpu(), tail_len)
    for got, want in zip(after, (ka, za, kb, zb, *following), strict=True):
        assert same_bits(got.cpu(), want)


@pytest.mark.parametrize("clear_rows", [True, False])
def test_reset(clear_rows: bool, device: str) -> None:
    before = buffers(2, m=33)
    tail_len = torch.full((SLOTS,), 33, dtype=torch.int32)
    after = [rows.to(device, copy=True) for rows in before]
    lengths = tail_len.to(device, copy=True)
    hca_reset_state(*batch(device), *after, lengths, clear_rows=clear_rows)
    tail_len[CHANGED] = 0
    assert torch.equal(lengths.cpu(), tail_len)
    for got, want in zip(after, before, strict=True):
        if clear_rows:
            want[CHANGED] = 0.0
        assert same_bits(got.cpu(), want)


def test_nothing_to_rotate(device: str) -> None:
    """No requests, and no slots."""
    for slots in (SLOTS, 0):
        rows = [rows[:slots].to(device) for rows in buffers(4)]
        lengths = torch.ones(slots, dtype=torch.int32, device=device)
        mask, request_slots = batch(device)
        requests = 0 if slots else SLOTS
        csa_rotate_state(mask[:requests], request_slots[:requests], *rows, lengths)
        hca_reset_state(mask[:requests], request_slots[:requests], *rows[:2], lengths)
        assert (lengths == 1).all()
        for got, want in zip(rows, buffers(4), strict=True):
            assert same_bits(got.cpu(), want[:slots])
