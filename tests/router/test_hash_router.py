from __future__ import annotations

import pytest
import torch
from dsv4_kernels.cases import is_poison, poison
from dsv4_kernels.router import hash_router
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.router import oracle

INDEX_TYPES = (torch.int32, torch.int64)


def expected(
    token_ids: torch.Tensor, table: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    padding = mask.tolist() if mask is not None else [False] * len(token_ids)
    rows = [oracle.hash_router(t, table.tolist(), p) for t, p in zip(token_ids.tolist(), padding, strict=True)]
    shape = (len(rows), table.shape[1])
    weights = torch.tensor([row[0] for row in rows], dtype=torch.float32).reshape(shape)
    return weights, torch.tensor([row[1] for row in rows], dtype=torch.int32).reshape(shape)


@pytest.mark.parametrize("token_type", INDEX_TYPES)
@pytest.mark.parametrize("table_type", INDEX_TYPES)
@pytest.mark.parametrize("k", [1, 2, 3, 6, 8, 31, 32])
@pytest.mark.parametrize("tokens", [1, 43, 300])
def test_every_index_type_and_k(
    tokens: int, k: int, token_type: torch.dtype, table_type: torch.dtype, device: str
) -> None:
    generator = torch.Generator().manual_seed(tokens * 100 + k)
    token_ids = torch.randint(97, (tokens,), generator=generator, dtype=token_type)
    table = torch.randint(256, (97, k), generator=generator, dtype=table_type)
    weights, ids = hash_router(token_ids.to(device), table.to(device))
    for got, want in zip((weights, ids), expected(token_ids, table, None), strict=True):
        assert got.dtype == want.dtype
        assert torch.equal(got.cpu(), want)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_ids_tables_and_masks(data: st.DataObject) -> None:
    vocab, k = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 32))
    limits = st.integers(-(2**63), 2**63 - 1) | st.integers(-2, vocab + 1)
    ids = data.draw(st.lists(limits, max_size=6))
    entries = st.integers(-(2**63), 2**63 - 1) | st.integers(-1, 300)
    table = torch.tensor(data.draw(st.lists(st.lists(entries, min_size=k, max_size=k), min_size=vocab, max_size=vocab)))
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids))), dtype=torch.bool)
    token_ids = torch.tensor(ids, dtype=torch.int64)
    results = hash_router(token_ids, table, padding_mask=mask)
    for got, want in zip(results, expected(token_ids, table, mask), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("token_type", INDEX_TYPES)
def test_ids_outside_the_table(token_type: torch.dtype, device: str) -> None:
    """vocab itself, just beyond, far beyond and negative: rows of -1 and 0, and no read outside the table."""
    limits = torch.iinfo(token_type)
    token_ids = torch.tensor([0, 9, 10, 11, -1, limits.max, limits.min, 5], dtype=token_type)
    table = torch.arange(60, dtype=torch.int32).reshape(10, 6)
    weights, ids = hash_router(token_ids.to(device), table.to(device))
    inside = torch.tensor([True, True, False, False, False, False, False, True])
    assert torch.equal(ids.cpu()[~inside], torch.full((5, 6), -1, dtype=torch.int32))
    assert torch.equal(weights.cpu()[~inside], torch.zeros(5, 6))
    assert torch.equal(ids.cpu()[inside], table[[0, 9, 5]])


def test_padding(device: str) -> None:
    token_ids = torch.tensor([1, 2, 3], device=device)
    table = torch.arange(24, device=device).reshape(4, 6)
    weights, ids = hash_router(token_ids, table, padding_mask=torch.tensor([False, True, False], device=device))
    assert ids.cpu().tolist() == [list(range(6, 12)), [-1] * 6, list(range(18, 24))]
    assert weights.cpu()[1].tolist() == [0.0] * 6


def test_table_entries_that_are_no_int32(device: str) -> None:
    table = torch.tensor([[7, 2**31, -1, 2**31 - 1]], device=device)
    weights, ids = hash_router(torch.tensor([0], device=device), table)
    assert ids.cpu().tolist() == [[7, -1, -1, 2**31 - 1]]
    assert weights.cpu().tolist() == [[0.25, 0.0, 0.0, 0.25]]


def test_writes_only_its_outputs(device: str) -> None:
    """The outputs lie inside larger poisoned buffers, whose rest must stay."""
    table = torch.arange(60, dtype=torch.int32, device=device).reshape(10, 6)
    weights = poison(torch.empty(70, 6, device=device))
    ids = poison(torch.empty(70, 6, dtype=torch.int32, device=device))
    token_ids = torch.arange(50, dtype=torch.int32, device=device) % 10
    hash_router(token_ids, table, out_weights=weights[10:60], out_ids=ids[10:60])
    for buffer in (weights, ids):
        touched = ~is_poison(buffer)
        assert touched[10:60].all()
        assert not touched[:10].any()
        assert not touched[60:].any()


def test_no_tokens(device: str) -> None:
    empty = torch.empty(0, dtype=torch.int32, device=device)
    weights, ids = hash_router(empty, torch.zeros(4, 6, dtype=torch.int32, device=device))
    assert weights.shape == ids.shape == (0, 6)


def test_empty_table_routes_nowhere(device: str) -> None:
    token_ids = torch.tensor([0, 1], device=device)
    weights, ids = hash_router(token_ids, torch.empty(0, 3, dtype=torch.int64, device=device))
    assert ids.cpu().tolist() == [[-1] * 3] * 2
    assert weights.cpu().tolist() == [[0.0] * 3] * 2


def test_given_outputs_are_returned(device: str) -> None:
    out_ids = torch.empty(2, 6, dtype=torch.int32, device=device)
    table = torch.arange(60, device=device).reshape(10, 6)
    weights, ids = hash_router(torch.tensor([3, 4], device=device), table, out_ids=out_ids)
    assert ids is out_ids
    assert ids.cpu().tolist() == table[3:5].cpu().tolist()
    assert weights.shape == (2, 6)


@pytest.mark.gpu
def test_more_tokens_than_int32_bytes() -> None:
    """Offsets beyond 2^31 elements of the outputs."""
    tokens, k = 2**31 // 32 + 1000, 32
    token_ids = torch.zeros(tokens, dtype=torch.int32, device="cuda")
    token_ids[-1] = 1
    table = torch.stack((torch.zeros(k, dtype=torch.int32), torch.arange(k, dtype=torch.int32))).cuda()
    _, ids = hash_router(token_ids, table)
    assert torch.equal(ids[-1].cpu(), table[1].cpu())
    assert not ids[-2].any()
