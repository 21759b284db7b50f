from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from dsv4_kernels import InvalidArgumentError
from dsv4_kernels.cases import is_poison, poison
from dsv4_kernels.cases.router.functions import gate_inputs
from dsv4_kernels.router import hash_router_fused, hash_router_scored
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.launches import observed
from tests.router import oracle

# A logit is a float32 sum of up to a few hundred products here; a weight is a few operations more.
RELATIVE = 2e-6


def random_inputs(
    seed: int, tokens: int, hidden_size: int, experts: int, k: int, vocab: int = 11
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    token_ids = torch.randint(vocab, (tokens,), generator=generator)
    table = torch.randint(experts, (vocab, k), generator=generator)
    hidden, weight, _ = gate_inputs(generator, tokens, hidden_size, experts)
    return token_ids, table, hidden, weight


def logits_of(hidden: list[float], weight: list[list[float]]) -> list[float]:
    products = [[h * w for h, w in zip(hidden, row, strict=True)] for row in weight]
    return [math.fsum(p) if all(map(math.isfinite, p)) else sum(p) for p in products]


def check(
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    device: str,
    mask: torch.Tensor | None = None,
    **options: Any,
) -> None:
    """Runs the op on these inputs and compares with the mathematics."""
    on_device = [tensor.to(device) for tensor in inputs]
    weights, ids = hash_router_fused(*on_device, padding_mask=mask.to(device) if mask is not None else None, **options)
    token_ids, table, hidden, weight = (tensor.tolist() for tensor in inputs)
    padding = mask.tolist() if mask is not None else [False] * len(token_ids)
    for i, token in enumerate(token_ids):
        logits = logits_of(hidden[i], weight)
        want_weights, want_ids = oracle.hash_router_scored(token, table, logits, padding[i], **options)
        assert ids[i].tolist() == want_ids
        assert weights[i].tolist() == pytest.approx(want_weights, rel=RELATIVE, abs=1e-37, nan_ok=True)


@pytest.mark.parametrize("hidden_size", [8, 64, 264, 2056])
@pytest.mark.parametrize("k", [1, 2, 5, 6, 7, 12, 13, 32])
def test_mathematics(k: int, hidden_size: int, device: str) -> None:
    check(random_inputs(k, 3, hidden_size, 17, k), device, scale=2.5)


@pytest.mark.parametrize("token_type", [torch.int32, torch.int64])
@pytest.mark.parametrize("table_type", [torch.int32, torch.int64])
def test_index_types(table_type: torch.dtype, token_type: torch.dtype, device: str) -> None:
    token_ids, table, hidden, weight = random_inputs(0, 20, 64, 9, 6)
    check((token_ids.to(token_type), table.to(table_type), hidden, weight), device)


@pytest.mark.parametrize("hidden_size", [4096, 7168, 8192, 8200, 12288, 17000])
@pytest.mark.parametrize("k", [6, 20])
def test_long_rows(k: int, hidden_size: int, device: str) -> None:
    """Rows of the models' length, and beyond what a pass over them takes at once; against float64."""
    token_ids, table, hidden, weight = random_inputs(hidden_size, 5, hidden_size, 40, k)
    weights, ids = hash_router_fused(*(t.to(device) for t in (token_ids, table, hidden, weight)), scale=1.5)
    exact = hash_router_scored(token_ids, table, (hidden.double() @ weight.double().T).float(), scale=1.5)
    assert torch.equal(ids.cpu(), exact[1])
    torch.testing.assert_close(weights.cpu(), exact[0], rtol=RELATIVE, atol=0)


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
    check(random_inputs(1, 8, 128, 30, 6), device, **options)


def test_same_bits_in_every_batch(device: str) -> None:
    """Batches that the kernel splits differently over the device."""
    inputs = random_inputs(2, 300, 7168, 64, 6, vocab=500)
    token_ids, table, hidden, weight = (tensor.to(device) for tensor in inputs)
    weights, ids = hash_router_fused(token_ids, table, hidden, weight)
    for tokens in (1, 16, 17, 33, 40, 64, 67, 133):
        batch = hash_router_fused(token_ids[:tokens], table, hidden[:tokens], weight)
        assert torch.equal(batch[1], ids[:tokens])
        if device != "cpu":  # the CPU implementation multiplies with a library that chooses by shape
            assert torch.equal(batch[0], weights[:tokens])


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_ids_tables_and_masks(data: st.DataObject) -> None:
    vocab, k, experts = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 32)), data.draw(st.integers(1, 9))
    limits = st.integers(-(2**63), 2**63 - 1) | st.integers(-2, vocab + 1)
    ids = data.draw(st.lists(limits, min_size=1, max_size=5))
    entries = st.integers(-(2**63), 2**63 - 1) | st.integers(-1, experts)
    table = torch.tensor(data.draw(st.lists(st.lists(entries, min_size=k, max_size=k), min_size=vocab, max_size=vocab)))
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids))))
    _, _, hidden, weight = random_inputs(3, len(ids), 16, experts, k)
    check((torch.tensor(ids), table, hidden, weight), "cpu", mask, scale=1.5)


def test_ids_and_entries_out_of_range(device: str) -> None:
    """Beyond the table, beyond the experts, padding: ids -1, weights 0, and the rest of the row shares the sum."""
    _, _, hidden, weight = random_inputs(4, 7, 64, 4, 3)
    token_ids = torch.tensor([0, 1, 2, -1, 2**62, -(2**62), 0])
    table = torch.tensor([[1, 4, -1], [2**40, -(2**40), 3]])
    mask = torch.tensor([False] * 6 + [True])
    check((token_ids, table, hidden, weight), device, mask)


def test_not_a_number_and_infinity(device: str) -> None:
    """NaN in one token or one expert weighs nothing and disturbs nobody else; -inf scores 0."""
    token_ids, table, hidden, weight = random_inputs(5, 4, 64, 8, 6)
    hidden[1] = math.nan
    weight[int(table[token_ids[0], 2])] = math.nan
    check((token_ids, table, hidden, weight), device)
    hidden, weight = torch.zeros(1, 64, dtype=torch.bfloat16), torch.zeros(2, 64, dtype=torch.bfloat16)
    hidden[0, 3], weight[0, 3] = 1, -math.inf
    check((torch.tensor([0]), torch.tensor([[0, 0], [1, 1]]), hidden, weight), device)


def test_no_experts(device: str) -> None:
    token_ids, table = torch.tensor([0, 1], device=device), torch.zeros(2, 3, dtype=torch.int64, device=device)
    hidden = torch.zeros(2, 64, dtype=torch.bfloat16, device=device)
    weights, ids = hash_router_fused(token_ids, table, hidden, hidden[:0])
    assert ids.tolist() == [[-1] * 3] * 2
    assert weights.tolist() == [[0.0] * 3] * 2


def test_no_tokens(device: str) -> None:
    table = torch.zeros(4, 6, dtype=torch.int64, device=device)
    weight = torch.zeros(8, 64, dtype=torch.bfloat16, device=device)
    weights, ids = hash_router_fused(table[:0, 0], table, weight[:0], weight)
    assert weights.shape == ids.shape == (0, 6)


def test_strided_rows(device: str) -> None:
    token_ids, table, hidden, weight = (t.to(device) for t in random_inputs(6, 20, 256, 40, 6))
    expected = hash_router_fused(token_ids, table, hidden, weight)
    wide_hidden = torch.full((20, 320), math.nan, dtype=torch.bfloat16, device=device)
    wide_weight = torch.full((40, 512), math.nan, dtype=torch.bfloat16, device=device)
    wide_hidden[:, 8:264] = hidden
    wide_weight[:, :256] = weight
    results = hash_router_fused(token_ids, table, wide_hidden[:, 8:264], wide_weight[:, :256])
    assert torch.equal(results[0], expected[0])
    assert torch.equal(results[1], expected[1])


def test_writes_only_its_outputs(device: str) -> None:
    token_ids, table, hidden, weight = (t.to(device) for t in random_inputs(7, 33, 128, 20, 7))
    weights = poison(torch.empty(40, 7, device=device))
    ids = poison(torch.empty(40, 7, dtype=torch.int32, device=device))
    hash_router_fused(token_ids, table, hidden, weight, out_weights=weights[3:36], out_ids=ids[3:36])
    for buffer in (weights, ids):
        touched = ~is_poison(buffer)
        assert touched[3:36].all()
        assert not touched[:3].any()
        assert not touched[36:].any()


@pytest.mark.parametrize(
    ("tokens", "blocks"), [(1, 8), (16, 8), (17, 4), (33, 4), (34, 2), (64, 2), (66, 2), (67, 1), (1000, 1)]
)
def test_small_batches_use_the_whole_device(tokens: int, blocks: int) -> None:
    with observed("sm_90a", multiprocessors=132) as launches:
        hash_router_fused(*random_inputs(8, tokens, 64, 8, 6))
    assert [launch.grid for launch in launches] == [(tokens * blocks, 1, 1)]
    assert [launch.block for launch in launches] == [(512 // blocks, 1, 1)]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"hidden": (4, 60)}, "hidden columns: expected a multiple of 8, got 60"),
        ({"hidden": (3, 64)}, "hidden: expected shape [4, any], got [3, 64]"),
        ({"weight": (8, 72)}, "weight: expected shape [any, 64], got [8, 72]"),
        ({"hash_lut": (5, 33)}, "hash_lut columns (k): expected 1 to 32, got 33"),
    ],
    ids=str,
)
def test_refuses_what_is_outside_its_range(change: dict[str, tuple[int, int]], text: str, device: str) -> None:
    shapes = {"hash_lut": (5, 6), "hidden": (4, 64), "weight": (8, 64)} | change
    token_ids = torch.zeros(4, dtype=torch.int64, device=device)
    table = torch.zeros(shapes["hash_lut"], dtype=torch.int64, device=device)
    hidden, weight = (torch.zeros(shapes[name], dtype=torch.bfloat16, device=device) for name in ("hidden", "weight"))
    with pytest.raises(InvalidArgumentError) as raised:
        hash_router_fused(token_ids, table, hidden, weight)
    assert str(raised.value) == f"hash_router_fused: {text}"


def test_refuses_other_dtypes_and_alignments(device: str) -> None:
    token_ids, table, hidden, weight = (t.to(device) for t in random_inputs(9, 4, 64, 8, 6))
    with pytest.raises(InvalidArgumentError, match="weight: expected dtype bfloat16, got float32"):
        hash_router_fused(token_ids, table, hidden, weight.float())
    wide = torch.zeros(4, 68, dtype=torch.bfloat16, device=device)
    with pytest.raises(InvalidArgumentError, match="hidden: expected rows aligned to 16 bytes"):
        hash_router_fused(token_ids, table, wide[:, 4:], weight)
