from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from dsv4_kernels import InvalidArgumentError
from dsv4_kernels.cases import FLOAT32_ULP, is_poison, poison
from dsv4_kernels.router import activation_topk, dense_router_decode
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.router import oracle

SCORE_FUNCTIONS = ["sqrt_softplus", "sigmoid", "softmax"]
RELATIVE = 16 * FLOAT32_ULP


def spread_logits(tokens: int, experts: int, seed: int = 0, step: float = 0.01) -> torch.Tensor:
    """Logits so far apart that every correct implementation chooses the same experts."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(experts, generator=generator) for _ in range(tokens)])
    return (order - experts / 2) * min(step, 8.0 / experts)


def check(logits: torch.Tensor, bias: torch.Tensor | None, k: int, device: str, **options: Any) -> None:
    on_device = {n: o.to(device) if isinstance(o, torch.Tensor) else o for n, o in options.items()}
    weights, ids = activation_topk(logits.to(device), bias.to(device) if bias is not None else None, k, **on_device)
    padding, marked = options.pop("padding_mask", None), options.pop("bias_alt_mask", None)
    bias_alt = options.pop("bias_alt", None)
    options.pop("int64_ids", None)
    for i, row in enumerate(logits.tolist()):
        used = bias_alt if marked is not None and marked[i] else bias
        want_weights, want_ids = oracle.gate(row, used.tolist() if used is not None else None, k, **options)
        if padding is not None and padding[i]:
            want_weights, want_ids = [0.0] * k, [-1] * k
        assert ids[i].tolist() == want_ids
        assert weights[i].tolist() == pytest.approx(want_weights, rel=RELATIVE, abs=1e-37)


@pytest.mark.parametrize("score_function", SCORE_FUNCTIONS)
@pytest.mark.parametrize("experts", [1, 2, 31, 128, 255, 256, 257, 384, 385, 511, 1023, 1024])
@pytest.mark.parametrize("k", [1, 6, 8, 9, 32])
def test_mathematics(experts: int, k: int, score_function: str, device: str) -> None:
    k = min(k, experts)
    check(spread_logits(5, experts, k), None, k, device, score_function=score_function, scale=2.5)


@pytest.mark.parametrize("experts", [256, 384])
def test_models(experts: int, device: str) -> None:
    """Logits and biases of a gate's size, where neighbours may tie but for rounding: see also the cases."""
    generator = torch.Generator().manual_seed(experts)
    bias = (torch.arange(experts) % 7) * 0.5
    logits = spread_logits(9, experts, 1) + torch.rand(9, 1, generator=generator)
    check(logits, bias, 6, device, scale=1.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("experts", [256, 384])
def test_large_batches(experts: int, dtype: torch.dtype, device: str) -> None:
    """They are computed in another way, with the same bits; an odd number of tokens, and rows of ties and NaN."""
    tokens = 2051
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(experts)) * 2
    column = torch.arange(experts)
    logits[1] = 1.0
    logits[2] = (column % 4).to(torch.float32)
    logits[3] = math.nan
    logits[4, 3:] = math.nan
    logits[5] = torch.where(column < 16, 9.0, 0.0)
    logits[7] = column.to(torch.float32)
    logits[tokens - 1] = -3.0
    logits = logits.to(dtype).to(device)
    bias = ((column % 5) * 0.25).to(device)
    for used in (bias, None):
        weights, ids = activation_topk(logits, used, 6, scale=1.5)
        for some in (slice(0, 40), slice(tokens - 5, tokens)):
            few_weights, few_ids = activation_topk(logits[some], used, 6, scale=1.5)
            assert torch.equal(weights[some], few_weights)
            assert torch.equal(ids[some], few_ids)


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
    check(spread_logits(8, 64), (torch.arange(64) % 3).to(torch.float32), 5, device, **options)


def test_bfloat16(device: str) -> None:
    logits = ((torch.arange(200) * 37 % 200) / 16 - 5).to(torch.bfloat16).reshape(1, -1).expand(3, -1).contiguous()
    check(logits, None, 6, device)


@pytest.mark.parametrize("int64_ids", [False, True])
def test_masks_and_id_types(int64_ids: bool, device: str) -> None:
    logits = spread_logits(10, 100, 3)
    bias = (torch.arange(100) % 9) * 0.3
    bias_alt = (torch.arange(100) % 4) * -0.4
    padding = torch.arange(10) % 3 == 0
    marked = torch.arange(10) % 2 == 0
    options = {"padding_mask": padding, "bias_alt": bias_alt, "bias_alt_mask": marked, "int64_ids": int64_ids}
    check(logits, bias, 6, device, **options)
    check(logits, None, 6, device, **options)
    out_ids = torch.empty(10, 6, dtype=torch.int64, device=device)
    _, ids = activation_topk(logits.to(device), None, 6, int64_ids=int64_ids, out_ids=out_ids)
    assert ids is out_ids
    assert torch.equal(out_ids, activation_topk(logits.to(device), None, 6)[1].to(torch.int64))


@pytest.mark.parametrize("k", [1, 6, 32])
@pytest.mark.parametrize("experts", [40, 256, 1000])
def test_ties_go_to_the_lower_expert(experts: int, k: int, device: str) -> None:
    """All equal; levels by column; equal only after the bias; zeros of both signs."""
    column = torch.arange(experts)
    logits = torch.stack([torch.ones(experts), column % 4, -(column % 3), torch.where(column % 2 == 0, -0.0, 0.0)])
    check(logits.to(torch.float32), None, k, device)
    bias = torch.where(column % 2 == 0, math.inf, 0.0)
    weights, ids = activation_topk(logits.to(torch.float32).to(device), bias.to(device), k)
    best = [*range(0, experts, 2), *range(1, experts, 2)]
    assert ids[0].tolist() == best[:k]
    assert torch.isfinite(weights).all()


@pytest.mark.parametrize("score_function", SCORE_FUNCTIONS)
def test_not_a_number(score_function: str, device: str) -> None:
    """Chosen last, weighs nothing; ids stay valid and different; other experts are not disturbed."""
    logits = spread_logits(4, 70, 5)
    logits[1, 3::2] = math.nan
    logits[2] = math.nan
    logits[3, :66] = math.nan
    check(logits, None, 6, device, score_function=score_function)
    check(logits, (torch.arange(70) % 5) * 0.25, 32, device, score_function=score_function)
    bias = torch.zeros(70)
    bias[7], bias[8] = -math.inf, math.nan
    _, ids = activation_topk(logits[:1].to(device), bias.to(device), 32)
    assert not {7, 8} & set(ids[0].tolist())
    few = activation_topk(logits[:1, :10].contiguous().to(device), bias[:10].to(device), 10)[1]
    assert few[0].tolist()[-2:] == [7, 8]


@pytest.mark.parametrize("score_function", SCORE_FUNCTIONS)
def test_infinities(score_function: str, device: str) -> None:
    logits = torch.tensor([[-math.inf, 1.0, 2.0, -math.inf], [-math.inf] * 4, [0.0, 1e4, -1e4, 3.0]])
    check(logits, None, 3, device, score_function=score_function)
    _, ids = activation_topk(torch.tensor([[1.0, math.inf, 3.0]], device=device), None, 2)
    assert ids.tolist() == [[1, 2]]
    softmax, _ = activation_topk(
        torch.tensor([[1.0, math.inf, 3.0, math.inf]], device=device), None, 3, score_function="softmax"
    )
    assert softmax.tolist() == [[0.5, 0.5, 0.0]]


@pytest.mark.parametrize("logit", [-170.0, -104.0, -90.0, -17.01, -16.99, -1e-8, 0.0, 1e-8, 1.0, 20.0, 88.8, 1e4, 3e38])
def test_score_of_any_size(logit: float, device: str) -> None:
    logits = torch.tensor([[logit]])
    weights, _ = activation_topk(logits.to(device), None, 1, renormalize=False)
    assert weights[0].tolist() == pytest.approx([oracle.score(float(logits))], rel=4 * FLOAT32_ULP, abs=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [0, 1, 2, 4])
@pytest.mark.parametrize("experts", [256, 383])
def test_strided_and_misaligned_rows(experts: int, offset: int, dtype: torch.dtype, device: str) -> None:
    """The same bits as from rows that vector loads can read."""
    logits = spread_logits(6, experts).to(dtype)
    bias = torch.randn(experts + 8, generator=torch.Generator().manual_seed(1))
    expected = activation_topk(logits.to(device), bias[:experts].to(device), 6, score_function="softmax")
    wide = torch.full((6, experts + 8), math.nan, dtype=dtype, device=device)
    wide[:, offset : offset + experts] = logits
    wide_bias = torch.cat([torch.zeros(offset), bias[:experts]]).to(device)
    results = activation_topk(wide[:, offset : offset + experts], wide_bias[offset:], 6, score_function="softmax")
    assert torch.equal(results[0], expected[0])
    assert torch.equal(results[1], expected[1])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_logits(data: st.DataObject) -> None:
    experts = data.draw(st.integers(1, 9))
    k = data.draw(st.integers(1, experts))
    # Integers: scores of different ones differ by more than rounding, also with a bias of integers.
    values = st.integers(-8, 8).map(float) | st.just(math.nan)
    rows = data.draw(st.lists(st.lists(values, min_size=experts, max_size=experts), min_size=1, max_size=4))
    function = data.draw(st.sampled_from(SCORE_FUNCTIONS[:2]))
    check(torch.tensor(rows), None, k, "cpu", score_function=function, scale=1.5)


def test_writes_only_its_outputs(device: str) -> None:
    weights = poison(torch.empty(20, 6, device=device))
    ids = poison(torch.empty(20, 6, dtype=torch.int64, device=device))
    activation_topk(spread_logits(7, 256).to(device), None, 6, out_weights=weights[5:12], out_ids=ids[5:12])
    for buffer in (weights, ids):
        touched = ~is_poison(buffer)
        assert touched[5:12].all()
        assert not touched[:5].any()
        assert not touched[12:].any()


def test_no_tokens(device: str) -> None:
    weights, ids = activation_topk(torch.empty(0, 256, device=device), None, 6)
    assert weights.shape == ids.shape == (0, 6)


def test_agrees_with_dense_router_decode(device: str) -> None:
    """The same rule: a gate with one weight a row gives logits that are exactly known."""
    experts = 64
    hidden = torch.zeros(3, 64, dtype=torch.bfloat16, device=device)
    hidden[:, 5] = 1
    weight = torch.zeros(experts, 64, dtype=torch.bfloat16, device=device)
    weight[:, 5] = ((torch.arange(experts) * 11 % 16) / 4).to(device)
    bias = ((torch.arange(experts) % 3) * 0.5).to(device)
    dense = dense_router_decode(hidden, weight, bias, 9, scale=2.5)
    logits = weight[:, 5].to(torch.float32).expand(3, -1).contiguous()
    weights, ids = activation_topk(logits, bias, 9, scale=2.5)
    assert torch.equal(ids, dense[1])
    assert torch.allclose(weights, dense[0], rtol=RELATIVE, atol=0)


@pytest.mark.gpu
def test_rows_beyond_two_to_the_31_elements() -> None:
    stride = 2**28 + 4
    storage = torch.empty(9 * stride, dtype=torch.bfloat16, device="cuda")
    logits = storage.as_strided((9, 256), (stride, 1))
    some = spread_logits(9, 256).to(torch.bfloat16)
    logits.copy_(some)
    weights, ids = activation_topk(logits, None, 6)
    expected = activation_topk(some.cuda(), None, 6)
    assert torch.equal(weights, expected[0])
    assert torch.equal(ids, expected[1])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"experts": 1025}, "logits columns (experts): expected 1 to 1024, got 1025"),
        ({"experts": 0}, "logits columns (experts): expected 1 to 1024, got 0"),
        ({"k": 33}, "top_k: expected 1 to 32, got 33"),
        ({"k": 0}, "top_k: expected 1 to 32, got 0"),
        ({"experts": 4, "k": 5}, "top_k: expected 1 to 4, got 5"),
        ({"score_function": "relu"}, "score_function: expected sqrt_softplus or sigmoid or softmax, got relu"),
        ({"bias_alt": torch.zeros(64)}, "bias_alt_mask: expected a tensor, got none"),
        ({"bias_alt_mask": torch.zeros(8, dtype=torch.bool)}, "bias_alt: expected a tensor, got none"),
    ],
    ids=str,
)
def test_refuses_what_is_outside_its_range(change: dict[str, Any], text: str, device: str) -> None:
    options = {"experts": 64, "k": 6} | {
        n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in change.items()
    }
    experts, k = options.pop("experts"), options.pop("k")
    with pytest.raises(InvalidArgumentError) as raised:
        activation_topk(torch.zeros(8, experts, device=device), None, k, **options)
    assert str(raised.value) == f"activation_topk: {text}"
