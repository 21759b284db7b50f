from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from dsv4_kernels import InvalidArgumentError
from dsv4_kernels.cases import is_poison, poison
from dsv4_kernels.cases.router.functions import gate_inputs
from dsv4_kernels.router import dense_router_decode, dense_router_decode_workspace_size

from tests.emulated import DISTINCT, emulated, ptx_folder
from tests.ptx_emulator import Limits
from tests.router import oracle


def check_against_mathematics(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, k: int, device: str, rel: float = 2e-6
) -> None:
    """Inputs whose scores lie far enough apart that every correct implementation chooses the same experts."""
    on_device = bias.to(device) if bias is not None else None
    weights, ids = dense_router_decode(hidden.to(device), weight.to(device), on_device, k, scale=2.5)
    for i in range(hidden.shape[0]):
        biases = bias.tolist() if bias is not None else None
        want_weights, want_ids = oracle.dense(hidden[i].tolist(), weight.tolist(), biases, k, scale=2.5)
        assert ids[i].tolist() == want_ids
        assert weights[i].tolist() == pytest.approx(want_weights, rel=rel)


@pytest.mark.parametrize(
    ("tokens", "hidden_size", "experts", "k"),
    [(1, 64, 8, 6), (3, 128, 9, 9), (16, 192, 17, 3), (17, 64, 31, 6), (5, 448, 130, 32), (64, 64, 3, 2)],
)
@pytest.mark.parametrize("with_bias", [True, False])
def test_mathematics(tokens: int, hidden_size: int, experts: int, k: int, with_bias: bool, device: str) -> None:
    generator = torch.Generator().manual_seed(tokens)
    check_against_mathematics(*gate_inputs(generator, tokens, hidden_size, experts, with_bias), k, device)


def one_hot_gate(scores: list[float], tokens: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs whose logits are exactly these values (which must be bfloat16), the same for every token."""
    hidden = torch.zeros(tokens, 64, dtype=torch.bfloat16)
    hidden[:, 5] = 1
    weight = torch.zeros(len(scores), 64, dtype=torch.bfloat16)
    weight[:, 5] = torch.tensor(scores)
    return hidden, weight


def test_ties_go_to_the_lower_expert(device: str) -> None:
    hidden, weight = one_hot_gate([1.0, 3.0, 2.0, 3.0, 2.0, 3.0, 0.0, 2.0] * 40)
    _, ids = dense_router_decode(hidden.to(device), weight.to(device), None, 32)
    highest = [e for e in range(320) if weight[e, 5] == 3.0]
    assert ids.tolist() == [highest[:32]] * 2


def test_bias_selects_but_does_not_weigh(device: str) -> None:
    hidden, weight = one_hot_gate([0.0, 4.0, 2.0, 1.0])
    bias = torch.tensor([10.0, 0.0, 0.0, 5.0], device=device)
    weights, ids = dense_router_decode(hidden.to(device), weight.to(device), bias, 2)
    assert ids.tolist() == [[0, 3]] * 2
    low, high = oracle.score(0.0), oracle.score(1.0)
    assert weights[0].tolist() == pytest.approx([low / (low + high), high / (low + high)], rel=1e-6)


def test_not_a_number_is_chosen_last_and_weighs_nothing(device: str) -> None:
    """A token of NaN still gets valid and different experts; other tokens of the batch are not disturbed."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, _ = gate_inputs(generator, 3, 128, 20, with_bias=False)
    clean = dense_router_decode(hidden.to(device), weight.to(device), None, 6)
    hidden[1] = math.nan
    weights, ids = dense_router_decode(hidden.to(device), weight.to(device), None, 6)
    assert ids[1].tolist() == [0, 1, 2, 3, 4, 5]
    assert weights[1].tolist() == [0.0] * 6
    for row in (0, 2):
        assert torch.equal(ids[row], clean[1][row])
        assert torch.equal(weights[row], clean[0][row])
    weight[4] = math.nan  # one expert of NaN: after all others, also after a bias of -inf
    bias = torch.zeros(20)
    bias[7] = -math.inf
    _, ids = dense_router_decode(hidden[:1].to(device), weight.to(device), bias.to(device), 20)
    assert sorted(ids[0].tolist()) == list(range(20))
    assert ids[0].tolist()[-2:] == [7, 4]


def test_infinite_bias(device: str) -> None:
    hidden, weight = one_hot_gate([1.0, 2.0, 3.0, 4.0])
    bias = torch.tensor([math.inf, 0.0, -math.inf, 0.0], device=device)
    weights, ids = dense_router_decode(hidden.to(device), weight.to(device), bias, 4)
    assert ids.tolist() == [[0, 3, 1, 2]] * 2
    assert torch.isfinite(weights).all()


@pytest.mark.parametrize("logit", [-170.0, -90.0, -20.0, 0.0, 20.0, 96.0])
def test_score_of_any_size(logit: float, device: str) -> None:
    logit = float(torch.tensor(logit, dtype=torch.bfloat16))
    hidden, weight = one_hot_gate([logit])
    weights, _ = dense_router_decode(hidden.to(device), weight.to(device), None, 1, renormalize=False)
    assert weights[0].tolist() == pytest.approx([oracle.score(logit)], rel=1e-6, abs=0)


def test_strided_rows(device: str) -> None:
    generator = torch.Generator().manual_seed(3)
    hidden, weight, bias = gate_inputs(generator, 20, 256, 40)
    assert bias is not None
    expected = dense_router_decode(hidden.to(device), weight.to(device), bias.to(device), 6)
    wide_hidden = torch.full((20, 320), math.nan, dtype=torch.bfloat16, device=device)
    wide_weight = torch.full((40, 512), math.nan, dtype=torch.bfloat16, device=device)
    wide_hidden[:, 8:264] = hidden
    wide_weight[:, :256] = weight
    results = dense_router_decode(wide_hidden[:, 8:264], wide_weight[:, :256], bias.to(device), 6)
    assert torch.equal(results[0], expected[0])
    assert torch.equal(results[1], expected[1])


def test_writes_only_its_outputs(device: str) -> None:
    generator = torch.Generator().manual_seed(4)
    hidden, weight, _ = gate_inputs(generator, 17, 128, 33, with_bias=False)
    weights = poison(torch.empty(40, 5, device=device))
    ids = poison(torch.empty(40, 5, dtype=torch.int32, device=device))
    dense_router_decode(hidden.to(device), weight.to(device), None, 5, out_weights=weights[4:21], out_ids=ids[4:21])
    for buffer in (weights, ids):
        touched = ~is_poison(buffer)
        assert touched[4:21].all()
        assert not touched[:4].any()
        assert not touched[21:].any()


def test_no_tokens(device: str) -> None:
    hidden = torch.empty(0, 128, dtype=torch.bfloat16, device=device)
    weight = torch.zeros(16, 128, dtype=torch.bfloat16, device=device)
    weights, ids = dense_router_decode(hidden, weight, None, 4)
    assert weights.shape == ids.shape == (0, 4)


@pytest.mark.gpu
def test_workspace_is_left_ready() -> None:
    """It is all zero again after a call, and nothing beyond the stated size is written."""
    generator = torch.Generator().manual_seed(5)
    hidden, weight, bias = (t.cuda() for t in gate_inputs(generator, 16, 256, 64) if t is not None)
    size = dense_router_decode_workspace_size(16, 64)
    workspace = torch.full((size + 4096,), 0xA5, dtype=torch.uint8, device="cuda")
    workspace[:size] = 0
    first = dense_router_decode(hidden, weight, bias, 6, workspace=workspace[:size])
    assert not workspace[:size].any()
    assert (workspace[size:] == 0xA5).all()
    second = dense_router_decode(hidden, weight, bias, 6, workspace=workspace[:size])
    assert torch.equal(first[0], second[0])


@pytest.mark.parametrize("architecture", DISTINCT)
@pytest.mark.parametrize(("blocks_a_wave", "waves"), [(1, 1), (3, 1), (2, 2)])
def test_few_blocks_at_once(architecture: str, blocks_a_wave: int, waves: int) -> None:
    """With room for few of its blocks the launch ends all the same, with the same bits, and leaves the workspace ready.

    More tokens than blocks, so that some select for two; and fewer, so that the last to start may have none.
    """
    ptx_folder()
    every_block = Limits(wave_lanes=256 * blocks_a_wave)
    for tokens, hidden_size, seed in ((11, 320, 0), (2, 192, 1), (11, 192, 2)):
        generator = torch.Generator().manual_seed(tokens)
        hidden, weight, bias = gate_inputs(generator, tokens, hidden_size, 40)
        workspace = torch.zeros(dense_router_decode_workspace_size(tokens, 40), dtype=torch.uint8)
        results = []
        for limits in (replace(every_block, waves=waves), every_block):
            with emulated(architecture, seed, limits=limits):
                results.append(dense_router_decode(hidden, weight, bias, 6, workspace=workspace))
            assert not workspace.any()
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("architecture", DISTINCT)
def test_stages_are_used_again(architecture: str) -> None:
    """A block whose part of hidden_size has more units than the ring has stages: loads wait until the stage was read.

    On two multiprocessors there is one split of 20 units, and the ring has 7 stages.
    """
    hidden, weight, bias = gate_inputs(torch.Generator().manual_seed(3), 12, 64 * 20, 40)
    assert bias is not None
    expected = [
        oracle.dense(row, weight.tolist(), bias.tolist(), 6, scale=2.5) for row in hidden.to(torch.float64).tolist()
    ]
    for seed in range(3):
        with emulated(architecture, seed, multiprocessors=2):
            weights, ids = dense_router_decode(hidden, weight, bias, 6, scale=2.5)
        for i, (want_weights, want_ids) in enumerate(expected):
            assert ids[i].tolist() == want_ids
            assert weights[i].tolist() == pytest.approx(want_weights, rel=1e-5)


@pytest.mark.gpu
def test_beside_work_that_fills_the_device() -> None:
    """Blocks that cannot start at once because another stream's work is there."""
    generator = torch.Generator().manual_seed(6)
    hidden, weight, bias = (t.cuda() for t in gate_inputs(generator, 64, 4096, 256) if t is not None)
    expected = dense_router_decode(hidden, weight, bias, 6)
    matrix = torch.randn(8192, 8192, device="cuda").to(torch.bfloat16)
    product = torch.empty_like(matrix)
    torch.cuda.synchronize()
    ours, theirs = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(theirs):
        for _ in range(20):
            torch.mm(matrix, matrix, out=product)
    with torch.cuda.stream(ours):
        results = [dense_router_decode(hidden, weight, bias, 6) for _ in range(200)]
    torch.cuda.synchronize()
    for weights, ids in results:
        assert torch.equal(weights, expected[0])
        assert torch.equal(ids, expected[1])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"tokens": 65}, "hidden rows (tokens): expected 0 to 64, got 65"),
        ({"hidden_size": 96}, "hidden columns: expected a multiple of 64, got 96"),
        ({"experts": 513}, "weight rows (experts): expected 1 to 512, got 513"),
        ({"k": 33}, "top_k: expected 1 to 32, got 33"),
        ({"k": 0}, "top_k: expected 1 to 32, got 0"),
        ({"experts": 4, "k": 5}, "top_k: expected 1 to 4, got 5"),
    ],
    ids=str,
)
def test_refuses_what_is_outside_its_range(change: dict[str, int], text: str, device: str) -> None:
    sizes = {"tokens": 8, "hidden_size": 128, "experts": 64, "k": 6} | change
    hidden = torch.zeros(sizes["tokens"], sizes["hidden_size"], dtype=torch.bfloat16, device=device)
    weight = torch.zeros(sizes["experts"], sizes["hidden_size"], dtype=torch.bfloat16, device=device)
    with pytest.raises(InvalidArgumentError) as raised:
        dense_router_decode(hidden, weight, None, sizes["k"])
    assert str(raised.value) == f"dense_router_decode: {text}"


def test_refuses_rows_that_are_not_aligned(device: str) -> None:
    weight = torch.zeros(8, 128, dtype=torch.bfloat16, device=device)
    hidden = torch.zeros(4, 132, dtype=torch.bfloat16, device=device)[:, 4:]
    with pytest.raises(InvalidArgumentError, match="hidden: expected rows aligned to 16 bytes"):
        dense_router_decode(hidden, weight, None, 4)
