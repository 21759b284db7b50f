from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from dsv4_kernels import InvalidArgumentError
from dsv4_kernels.cases import is_poison, poison
from dsv4_kernels.cases.router.functions import baseline_dense, check_selection, gate_inputs
from dsv4_kernels.router import dense_router_decode, dense_router_prefill

from tests.router import oracle


@pytest.mark.parametrize(
    ("tokens", "hidden_size", "experts", "k"), [(1, 64, 8, 6), (65, 72, 9, 9), (70, 192, 17, 3), (100, 64, 130, 32)]
)
@pytest.mark.parametrize("with_bias", [True, False])
def test_mathematics(tokens: int, hidden_size: int, experts: int, k: int, with_bias: bool, device: str) -> None:
    generator = torch.Generator().manual_seed(tokens)
    hidden, weight, bias = gate_inputs(generator, tokens, hidden_size, experts, with_bias)
    on_device = bias.to(device) if bias is not None else None
    weights, ids = dense_router_prefill(hidden.to(device), weight.to(device), on_device, k, scale=2.5)
    biases = bias.tolist() if bias is not None else None
    for i in range(0, tokens, 7):
        want_weights, want_ids = oracle.dense(hidden[i].tolist(), weight.tolist(), biases, k, scale=2.5)
        assert ids[i].tolist() == want_ids
        assert weights[i].tolist() == pytest.approx(want_weights, rel=2e-6)


@pytest.mark.parametrize("options", [{}, {"renormalize": False, "scale": 2.5}, {"epsilon": 0.5}], ids=str)
@pytest.mark.parametrize(("hidden_size", "experts"), [(4096, 256), (7168, 384), (5120, 384)])
def test_equals_decode_up_to_rounding(hidden_size: int, experts: int, options: dict[str, Any], device: str) -> None:
    generator = torch.Generator().manual_seed(hidden_size)
    hidden, weight, bias = (t.to(device) for t in gate_inputs(generator, 64, hidden_size, experts) if t is not None)
    decode = dense_router_decode(hidden, weight, bias, 6, **options)
    prefill = dense_router_prefill(hidden, weight, bias, 6, **options)
    weighing = {"renormalize": True, "scale": 1.0, "epsilon": 0.0} | options
    arguments = (hidden, weight, bias, 6, *weighing.values())
    results, plain = (tuple(t.cpu() for t in pair) for pair in (prefill, baseline_dense(*arguments)))
    verdict = check_selection(arguments, results, plain)
    assert verdict.passed, verdict
    same = (decode[1] == prefill[1]).all(dim=1)  # a near tie may go the other way
    assert int(same.sum()) >= 62
    torch.testing.assert_close(prefill[0][same], decode[0][same], rtol=3e-6, atol=0)


def test_logits_are_not_rounded_to_bfloat16(device: str) -> None:
    """256.5 and 257 are one bfloat16: rounded, expert 0 would win the tie."""
    hidden = torch.ones(70, 8, dtype=torch.bfloat16, device=device)
    weight = torch.zeros(2, 8, dtype=torch.bfloat16, device=device)
    weight[:, 0] = 256
    weight[0, 1], weight[1, 1] = 0.5, 1
    _, ids = dense_router_prefill(hidden, weight, None, 2)
    assert ids.tolist() == [[1, 0]] * 70


def test_padding(device: str) -> None:
    generator = torch.Generator().manual_seed(1)
    hidden, weight, bias = (t.to(device) for t in gate_inputs(generator, 80, 128, 20) if t is not None)
    mask = torch.arange(80, device=device) % 3 == 0
    clean = dense_router_prefill(hidden, weight, bias, 4)
    weights, ids = dense_router_prefill(hidden, weight, bias, 4, padding_mask=mask)
    assert (ids[mask] == -1).all()
    assert (weights[mask] == 0).all()
    assert torch.equal(ids[~mask], clean[1][~mask])
    assert torch.equal(weights[~mask], clean[0][~mask])


def test_not_a_number_is_chosen_last_and_weighs_nothing(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, _ = gate_inputs(generator, 70, 128, 20, with_bias=False)
    hidden[1] = math.nan
    weights, ids = dense_router_prefill(hidden.to(device), weight.to(device), None, 6)
    assert ids[1].tolist() == [0, 1, 2, 3, 4, 5]
    assert weights[1].tolist() == [0.0] * 6
    assert not weights[[0, 2]].isnan().any()


def test_writes_only_its_outputs(device: str) -> None:
    generator = torch.Generator().manual_seed(2)
    hidden, weight, _ = gate_inputs(generator, 70, 64, 33, with_bias=False)
    weights = poison(torch.empty(80, 5, device=device))
    ids = poison(torch.empty(80, 5, dtype=torch.int32, device=device))
    out = {"out_weights": weights[4:74], "out_ids": ids[4:74]}
    results = dense_router_prefill(hidden.to(device), weight.to(device), None, 5, **out)
    assert results[0] is out["out_weights"]
    for buffer in (weights, ids):
        touched = ~is_poison(buffer)
        assert touched[4:74].all()
        assert not touched[:4].any()
        assert not touched[74:].any()


def test_no_tokens(device: str) -> None:
    hidden = torch.empty(0, 128, dtype=torch.bfloat16, device=device)
    weight = torch.zeros(16, 128, dtype=torch.bfloat16, device=device)
    weights, ids = dense_router_prefill(hidden, weight, None, 4)
    assert weights.shape == ids.shape == (0, 4)


def test_refuses_operands_that_do_not_fit(device: str) -> None:
    hidden = torch.zeros(70, 64, dtype=torch.bfloat16, device=device)
    weight = torch.zeros(16, 64, dtype=torch.bfloat16, device=device)
    for arguments, text in [
        ((hidden.double(), weight), "hidden: expected dtype bfloat16 or float32 or float16, got float64"),
        ((hidden[0], weight), "hidden: expected shape [any, any], got [64]"),
        ((hidden, weight[:, :32]), "weight: expected shape [any, 64], got [16, 32]"),
    ]:
        with pytest.raises(InvalidArgumentError) as raised:
            dense_router_prefill(*arguments, None, 4)
        assert str(raised.value) == f"dense_router_prefill: {text}"
    with pytest.raises(InvalidArgumentError, match="top_k: expected 1 to 16, got 17"):
        dense_router_prefill(hidden, weight, None, 17)


def test_compiles_as_one_graph(device: str) -> None:
    generator = torch.Generator().manual_seed(3)
    hidden, weight, bias = (t.to(device) for t in gate_inputs(generator, 70, 128, 20) if t is not None)
    compiled = torch.compile(dense_router_prefill, fullgraph=True, backend="aot_eager")
    for traced, eager in zip(
        compiled(hidden, weight, bias, 4), dense_router_prefill(hidden, weight, bias, 4), strict=True
    ):
        assert torch.equal(traced, eager)


@pytest.mark.gpu
def test_captures_and_follows_new_inputs() -> None:
    generator = torch.Generator().manual_seed(4)
    hidden, weight, bias = (t.cuda() for t in gate_inputs(generator, 100, 4096, 256) if t is not None)
    dense_router_prefill(hidden, weight, bias, 6)  # the library makes its workspace outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        weights, ids = dense_router_prefill(hidden, weight, bias, 6)
    hidden.copy_(hidden.flip(0))
    graph.replay()
    expected = dense_router_prefill(hidden, weight, bias, 6)
    assert torch.equal(ids, expected[1])
    assert torch.equal(weights, expected[0])
