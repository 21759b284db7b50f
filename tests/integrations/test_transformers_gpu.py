"""DeepSeek-V4 of transformers on the device: generate() beside the CPU's float32, and CUDA graphs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from dsv4_kernels.integrations.transformers import swap_in

from tests.integrations.test_transformers import error
from tests.integrations.toy import in_bfloat16, tokens, toy_model

pytestmark = pytest.mark.gpu

OPTIONS: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module")
def reference() -> Any:
    return toy_model(num_hash_layers=3)


@pytest.fixture(scope="module")
def swapped(reference: Any) -> Any:
    return swap_in(in_bfloat16(reference).to("cuda"))


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def test_greedy_tokens_are_those_of_float32_on_the_cpu(reference: Any, swapped: Any) -> None:
    prompt = tokens(1, 123)
    wanted = reference.generate(prompt, **OPTIONS)
    assert torch.equal(swapped.generate(prompt.cuda(), **OPTIONS).cpu(), wanted)


def test_is_nearer_to_float32_than_transformers_bfloat16(reference: Any, swapped: Any) -> None:
    ids = tokens(2, 140)
    exact = reference(ids).logits
    theirs = copy.deepcopy(reference).to(torch.bfloat16).to("cuda")(ids.cuda()).logits.cpu()
    ours = swapped(ids.cuda()).logits.cpu()
    assert error(ours, exact) < error(theirs, exact)
    assert error(ours, exact) < 0.03


def test_weights_that_move_to_the_device_after_swap_in(reference: Any, swapped: Any) -> None:
    ids = tokens(1, 140).cuda()
    moved = swap_in(in_bfloat16(reference)).to("cuda")
    assert torch.equal(moved(ids).logits, swapped(ids).logits)


def test_a_captured_forward_follows_new_tokens(swapped: Any) -> None:
    """Every token's routes, entries and choices are made on the device: a replay is right for any text.

    The mask is given, since transformers makes it from values on the host, which no capture allows.
    """
    first, second = tokens(2, 140).cuda(), tokens(2, 140, seed=9).cuda()
    wanted = [swapped(ids, use_cache=False).logits for ids in (first, second)]
    distance = torch.arange(140, device="cuda")[:, None] - torch.arange(140, device="cuda")
    seen = (distance >= 0) & (distance < swapped.config.sliding_window)
    mask = torch.zeros(2, 1, 140, 140, dtype=torch.bfloat16, device="cuda")
    mask.masked_fill_(~seen, torch.finfo(torch.bfloat16).min)
    ids = first.clone()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        swapped(ids, attention_mask=mask, use_cache=False)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = swapped(ids, attention_mask=mask, use_cache=False).logits
    for given, exact in zip((first, second), wanted, strict=True):
        ids.copy_(given)
        graph.replay()
        assert error(logits, exact) < 5e-3  # the libraries' products may be others under capture


@pytest.mark.parametrize("layer", [0, 2])
def test_a_captured_block_of_experts_follows_new_tokens(swapped: Any, layer: int) -> None:
    """Router, experts and shared expert of a decode step."""
    block = swapped.model.layers[layer].mlp
    hidden, ids = torch.zeros(1, 1, 128, device="cuda").to(torch.bfloat16), tokens(1, 1).cuda()
    block(hidden, input_ids=ids)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = block(hidden, input_ids=ids)
    for seed in range(3):
        hidden.copy_(torch.randn(1, 1, 128, generator=torch.Generator().manual_seed(seed)))
        ids.copy_(tokens(1, 1, seed=seed))
        graph.replay()
        assert error(out, block(hidden, input_ids=ids)) < 5e-3
