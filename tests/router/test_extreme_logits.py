"""The rule of docs/families/router.md, "Extreme logits", in every op that weighs experts: mathematics, in logarithms.

A share is e^(l_i) / sum of e^(l_j), with l the logarithm of a score: a number of ordinary size for any finite logit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from dsv4_kernels.router import (
    activation_topk,
    dense_router_decode,
    dense_router_prefill,
    hash_router_fused,
    hash_router_scored,
)

INF, NAN = math.inf, math.nan
SCALE = 1.5
EXPERTS = 6  # all of them are chosen

# All are bfloat16 numbers, so that a gate of one-hot hidden states gives them exactly.
ROWS: dict[str, list[float]] = {
    **{f"all {x}": [x] * EXPERTS for x in (-17.0, -88.0, -104.0, -176.0, -200.0, -9984.0, -(2.0**127), 88.0, 2.0**127)},
    **{
        f"from {x}": [x + step for step in (0.0, 1.0, 2.0, 4.0, 8.0, 12.0)]
        for x in (-220, -184, -150, -104, -94, -60, -17, 0, 90)
    },
    "lost and kept": [-200.0, -172.0, -176.0, -170.0, -230.0, -171.0],
    "far apart": [-200.0, -100.0, 0.0, 3.0, -50.0, 20.0],
    "one +inf": [INF, 1.0, 2.0, 0.0, 3.0, -1.0],
    "two +inf": [1.0, INF, 2.0, INF, -300.0, NAN],
    "all +inf": [INF] * EXPERTS,
    "+inf and -inf": [-INF, INF, -INF, 2.0, NAN, -INF],
    "one NaN": [NAN, 1.0, 1.0, 1.0, 1.0, 1.0],
    "NaN among tiny": [NAN, -200.0, -202.0, NAN, -201.0, -INF],
    "all NaN": [NAN] * EXPERTS,
    "all -inf": [-INF] * EXPERTS,
    "NaN and -inf": [NAN, -INF, NAN, -INF, NAN, -INF],
}


def log_sqrt_softplus(x: float) -> float:
    if x < -40:
        return x / 2  # but for e^x / 4
    return math.log(x + math.log1p(math.exp(-x)) if x > 0 else math.log1p(math.exp(x))) / 2


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > -40 else x


def shares(logits: Sequence[float], log_score: Callable[[float], float]) -> list[float]:
    """Of the whole weight. Nothing for NaN and -inf; infinite scores share it."""
    logs = [-INF if math.isnan(x) or x == -INF else INF if x == INF else log_score(x) for x in logits]
    highest = max(logs)
    if highest == -INF:
        return [0.0] * len(logs)
    powers = [1.0 if one == highest else math.exp(one - highest) for one in logs]
    return [power / math.fsum(powers) for power in powers]


def one_hot(row: Sequence[float], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and gate whose logits are these."""
    hidden = torch.zeros(1, 64, dtype=torch.bfloat16)
    hidden[0, 5] = 1
    gate = torch.zeros(len(row), 64, dtype=torch.bfloat16)
    gate[:, 5] = torch.tensor(row)
    assert torch.equal(
        gate[:, 5].to(torch.float64).nan_to_num(7.5), torch.tensor(row, dtype=torch.float64).nan_to_num(7.5)
    )
    return hidden.to(device), gate.to(device)


def by_expert(result: tuple[torch.Tensor, torch.Tensor]) -> list[float]:
    weights, ids = result
    assert sorted(ids[0].tolist()) == list(range(weights.shape[1])), ids
    ordered: list[float] = torch.zeros_like(weights).scatter(1, ids.to(torch.int64), weights)[0].tolist()
    return ordered


def by_op(row: Sequence[float], device: str, **options: float | bool) -> dict[str, list[float]]:
    """Weights by expert, of every op that scores by sqrt-softplus."""
    hidden, gate = one_hot(row, device)
    logits = torch.tensor([row], device=device)
    token = torch.zeros(1, dtype=torch.int64, device=device)
    table = torch.arange(len(row), device=device)[None]
    k = len(row)
    results = {
        "hash_router_scored": hash_router_scored(token, table, logits, **options),
        "hash_router_scored, bfloat16": hash_router_scored(token, table, logits.to(torch.bfloat16), **options),
        "hash_router_fused": hash_router_fused(token, table, hidden, gate, **options),
        "activation_topk": activation_topk(logits, None, k, **options),
        "activation_topk, bfloat16": activation_topk(logits.to(torch.bfloat16), None, k, **options),
        "dense_router_decode": dense_router_decode(hidden, gate, None, k, **options),
        "dense_router_prefill": dense_router_prefill(hidden, gate, None, k, **options),
    }
    return {op: by_expert(result) for op, result in results.items()}


@pytest.mark.parametrize("name", ROWS)
def test_weights(name: str, device: str) -> None:
    row = ROWS[name]
    expected = [SCALE * share for share in shares(row, log_sqrt_softplus)]
    for op, weights in by_op(row, device, scale=SCALE).items():
        assert weights == pytest.approx(expected, rel=2e-6, abs=1e-18), op


@pytest.mark.parametrize("function", ["sigmoid", "softmax"])
@pytest.mark.parametrize("name", ROWS)
def test_other_score_functions(name: str, function: str, device: str) -> None:
    """Sigmoid is 1 at +inf; softmax of one magnitude for all is uniform, also of -inf."""
    row = ROWS[name]
    if function == "softmax" and -INF in row and all(x == -INF or math.isnan(x) for x in row):
        expected = [SCALE / row.count(-INF) if x == -INF else 0.0 for x in row]
    elif function == "softmax":
        expected = [SCALE * share for share in shares(row, lambda x: x)]
    else:
        expected = [SCALE * share for share in shares([min(x, 1e300) for x in row], log_sigmoid)]
    weights = by_expert(
        activation_topk(torch.tensor([row], device=device), None, EXPERTS, score_function=function, scale=SCALE)
    )
    assert weights == pytest.approx(expected, rel=2e-6, abs=1e-18)


@pytest.mark.parametrize("function", ["sqrt_softplus", "sigmoid", "softmax"])
def test_chosen_by_a_bias(function: str, device: str) -> None:
    """What is chosen has tiny scores beside experts that are not chosen: the chosen share the whole weight."""
    logits = torch.tensor([[3.0, -210.0, -212.0, 2.0, -212.0, 1.0]])
    bias = torch.tensor([0.0, 10.0, 9.0, 0.0, 8.0, 0.0])
    weights, ids = activation_topk(logits.to(device), bias.to(device), 3, score_function=function, scale=SCALE)
    assert ids.tolist() == [[1, 2, 4]]
    slope = 0.5 if function == "sqrt_softplus" else 1.0
    expected = shares([-210.0, -212.0, -212.0], lambda x: slope * x)
    assert weights[0].tolist() == pytest.approx([SCALE * share for share in expected], rel=2e-6)


@pytest.mark.parametrize(("experts", "tokens"), [(256, 3), (384, 3), (256, 2050), (100, 3)])
def test_tokens_do_not_disturb_each_other(experts: int, tokens: int, device: str) -> None:
    """Extreme rows between ordinary ones, which share warps with them: each as it is alone, bit for bit."""
    if tokens > 2048 and device not in ("cpu", "cuda"):
        pytest.skip("thousands of tokens take minutes in the emulator")
    generator = torch.Generator().manual_seed(experts)
    logits = torch.randn(tokens, experts, generator=generator)
    logits[1] = -200.0
    logits[tokens - 1, 7] = INF
    logits = logits.to(device)
    weights, ids = activation_topk(logits, None, 6, scale=SCALE)
    assert weights[1].tolist() == pytest.approx([SCALE / 6] * 6, rel=1e-6)
    assert weights[tokens - 1].tolist() == [SCALE, 0.0, 0.0, 0.0, 0.0, 0.0]
    for token in (0, 1, tokens - 1):
        alone = activation_topk(logits[token : token + 1], None, 6, scale=SCALE)
        assert torch.equal(weights[token], alone[0][0])
        assert torch.equal(ids[token], alone[1][0])


def test_scores_that_underflow_are_equal(device: str) -> None:
    """Below 2^-126 a score is 0 and the lower expert is chosen, whatever runs."""
    row = [-200.0, -180.0, -190.0, -176.0]
    hidden, gate = one_hot(row, device)
    for _, ids in (
        activation_topk(torch.tensor([row], device=device), None, 2),
        dense_router_decode(hidden, gate, None, 2),
        dense_router_prefill(hidden, gate, None, 2),
    ):
        assert ids.tolist() == [[0, 1]]


def test_without_renormalisation(device: str) -> None:
    """Scores times scale: infinite for +inf, 0 for NaN and what underflows; never NaN, not with a scale of 0 either."""
    row = [INF, 2.0, NAN, -INF, -300.0, -60.0]
    expected = [INF, SCALE * math.exp(log_sqrt_softplus(2.0)), 0.0, 0.0, 0.0, SCALE * math.exp(-30.0)]
    for op, weights in by_op(row, device, renormalize=False, scale=SCALE).items():
        assert weights == pytest.approx(expected, rel=2e-6, abs=1e-37), op
    for op, weights in by_op(row, device, renormalize=False, scale=0.0).items():
        assert weights == [0.0] * EXPERTS, op


def test_with_epsilon(device: str) -> None:
    """The formula as it stands: tiny scores beside an epsilon weigh next to nothing. +inf is still the limit."""
    row = [-104.0, -102.0, -100.0, -98.0, -96.0, -94.0]
    scores = [math.exp(x / 2) for x in row]
    expected = [SCALE * s / (math.fsum(scores) + 1e-20) for s in scores]
    for op, weights in by_op(row, device, scale=SCALE, epsilon=1e-20).items():
        assert weights == pytest.approx(expected, rel=2e-6, abs=0), op
    for op, weights in by_op([-200.0] * EXPERTS, device, scale=SCALE, epsilon=1e-20).items():
        assert weights == pytest.approx([0.0] * EXPERTS, abs=1e-17), op
    for op, weights in by_op(ROWS["two +inf"], device, scale=SCALE, epsilon=0.5).items():
        assert weights == [0.0, SCALE / 2, 0.0, SCALE / 2, 0.0, 0.0], op
