from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from dsv4_kernels.cases import FLOAT32_ULP, is_poison, poison
from dsv4_kernels.router import hash_router_scored
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.router import oracle

# A weight is a handful of correctly rounded or nearly so float32 operations.
RELATIVE = 8 * FLOAT32_ULP


def check(
    token_ids: torch.Tensor,
    table: torch.Tensor,
    logits: torch.Tensor,
    results: tuple[torch.Tensor, torch.Tensor],
    mask: torch.Tensor | None = None,
    **options: Any,
) -> None:
    padding = mask.tolist() if mask is not None else [False] * len(token_ids)
    rows = zip(token_ids.tolist(), logits.tolist(), padding, strict=True)
    for i, (token, row, padded) in enumerate(rows):
        weights, ids = oracle.hash_router_scored(token, table.tolist(), row, padded, **options)
        assert results[1][i].tolist() == ids
        assert results[0][i].tolist() == pytest.approx(weights, rel=RELATIVE, abs=1e-37, nan_ok=True)


@pytest.mark.parametrize("logit_type", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("token_type", [torch.int32, torch.int64])
@pytest.mark.parametrize("table_type", [torch.int32, torch.int64])
@pytest.mark.parametrize("k", [1, 2, 3, 6, 17, 32])
def test_types_and_k(
    k: int, table_type: torch.dtype, token_type: torch.dtype, logit_type: torch.dtype, device: str
) -> None:
    generator = torch.Generator().manual_seed(k)
    token_ids = torch.randint(11, (37,), generator=generator, dtype=token_type)
    table = torch.randint(40, (11, k), generator=generator, dtype=table_type)
    logits = (4 * torch.randn(37, 40, generator=generator)).to(logit_type)
    results = hash_router_scored(token_ids.to(device), table.to(device), logits.to(device), scale=2.5)
    check(token_ids, table, logits, (results[0].cpu(), results[1].cpu()), scale=2.5)


@pytest.mark.parametrize(
    "options",
    [
        {"renormalize": False},
        {"renormalize": False, "scale": 1.5},
        {"epsilon": 1e-20},
        {"epsilon": 0.5, "scale": 2.5},
        {"scale": 0.0},
    ],
    ids=str,
)
def test_options(options: dict[str, Any], device: str) -> None:
    generator = torch.Generator().manual_seed(1)
    token_ids = torch.arange(8)
    table = torch.randint(256, (8, 6), generator=generator)
    logits = torch.randn(8, 256, generator=generator)
    results = hash_router_scored(token_ids.to(device), table.to(device), logits.to(device), **options)
    check(token_ids, table, logits, (results[0].cpu(), results[1].cpu()), **options)


def test_logits_of_every_size(device: str) -> None:
    """From where e^x is subnormal to where it overflows: the weight keeps its digits."""
    values = [-170.0, -104.0, -103.0, -90.0, -87.4, -50.0, -17.01, -16.99, -1e-8, 0.0, 1e-8, 1.0, 20.0, 88.8, 1e4, 3e38]
    logits = torch.tensor([values])
    table = torch.arange(len(values)).reshape(1, -1)
    token_ids = torch.zeros(1, dtype=torch.int64)
    weights, _ = hash_router_scored(token_ids.to(device), table.to(device), logits.to(device), renormalize=False)
    want = [oracle.score(v) for v in logits[0].tolist()]
    assert weights.cpu()[0].tolist() == pytest.approx(want, rel=4 * FLOAT32_ULP, abs=0)


def test_not_a_number_and_infinity(device: str) -> None:
    logits = torch.tensor([[math.nan, 1.0, -math.inf, 2.0], [math.nan] * 4, [-math.inf] * 4])
    table = torch.tensor([[0, 1, 2, 3]])
    token_ids = torch.zeros(3, dtype=torch.int64)
    weights, ids = hash_router_scored(token_ids.to(device), table.to(device), logits.to(device))
    weights, ids = weights.cpu(), ids.cpu()
    assert ids.tolist() == [[0, 1, 2, 3]] * 3
    assert weights[0, [0, 2]].tolist() == [0.0, 0.0]
    assert float(weights[0].sum()) == pytest.approx(1.0, rel=1e-6)
    assert weights[1:].tolist() == [[0.0] * 4] * 2  # a sum of 0 counts as 1


def test_entries_outside_the_experts_take_no_part(device: str) -> None:
    logits = torch.zeros(1, 4)
    table = torch.tensor([[1, 4, -1, 2**40, 3]])
    weights, ids = hash_router_scored(torch.tensor([0]).to(device), table.to(device), logits.to(device))
    assert ids.cpu().tolist() == [[1, -1, -1, -1, 3]]
    assert weights.cpu().tolist() == [[0.5, 0.0, 0.0, 0.0, 0.5]]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_ids_masks_and_logits(data: st.DataObject) -> None:
    vocab, k, experts = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 32)), data.draw(st.integers(1, 9))
    ids = data.draw(st.lists(st.integers(-2, vocab + 1), min_size=1, max_size=5))
    entries = st.integers(-1, experts)
    table = torch.tensor(data.draw(st.lists(st.lists(entries, min_size=k, max_size=k), min_size=vocab, max_size=vocab)))
    values = st.floats(-300, 300, width=32) | st.just(math.nan)
    logits = torch.tensor(
        data.draw(st.lists(st.lists(values, min_size=experts, max_size=experts), min_size=len(ids), max_size=len(ids)))
    )
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids))))
    token_ids = torch.tensor(ids)
    results = hash_router_scored(token_ids, table, logits, padding_mask=mask, scale=1.5)
    check(token_ids, table, logits, results, mask, scale=1.5)


def test_strided_logits(device: str) -> None:
    """Logits that are columns of a wider tensor, as a fused product leaves them."""
    generator = torch.Generator().manual_seed(2)
    wide = torch.randn(9, 100, generator=generator)
    table = torch.randint(64, (5, 6), generator=generator)
    token_ids = torch.randint(5, (9,), generator=generator)
    logits = wide[:, 7:71]
    results = hash_router_scored(token_ids.to(device), table.to(device), wide.to(device)[:, 7:71])
    check(token_ids, table, logits, (results[0].cpu(), results[1].cpu()))


def test_writes_only_its_outputs(device: str) -> None:
    weights = poison(torch.empty(40, 6, device=device))
    ids = poison(torch.empty(40, 6, dtype=torch.int32, device=device))
    table = torch.arange(60, device=device).reshape(10, 6)
    token_ids = torch.arange(33, device=device) % 12
    logits = torch.randn(33, 64, device=device)
    hash_router_scored(token_ids, table, logits, out_weights=weights[3:36], out_ids=ids[3:36])
    for buffer in (weights, ids):
        touched = ~is_poison(buffer)
        assert touched[3:36].all()
        assert not touched[:3].any()
        assert not touched[36:].any()


def test_empty(device: str) -> None:
    table = torch.zeros(4, 6, dtype=torch.int64, device=device)
    none = torch.empty(0, dtype=torch.int64, device=device)
    weights, ids = hash_router_scored(none, table, torch.empty(0, 256, device=device))
    assert weights.shape == ids.shape == (0, 6)
    weights, ids = hash_router_scored(torch.tensor([1], device=device), table, torch.empty(1, 0, device=device))
    assert ids.cpu().tolist() == [[-1] * 6]
    assert weights.cpu().tolist() == [[0.0] * 6]
