"""Gates as the models, transformers, vLLM and SGLang hold them: names, dtypes, vision layers; and what is no gate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dsv4_kernels import InvalidArgumentError
from dsv4_kernels.cases.router import definitions
from dsv4_kernels.checkpoint import CheckpointError
from dsv4_kernels.presets import PRESETS
from dsv4_kernels.router import Router, dense_router_prefill
from safetensors.torch import save_file

FLASH = replace(PRESETS["v4-flash"], hidden_size=256, experts=32, vocab_size=500)
TOKENS = 7

# What each calls the gate's tensors in front of which prefix: bias, bias of image tokens, table.
NAMES = {
    "the models": ("layers.3.ffn.", "gate.bias", "gate.bias_vl", "gate.tid2eid"),
    "transformers": (
        "model.layers.3.mlp.", "gate.e_score_correction_bias", "gate.e_score_correction_bias_vl", "gate.tid2eid"
    ),
    "vLLM": ("model.layers.3.ffn.", "gate.e_score_correction_bias", "gate.bias_vl", "gate.tid2eid"),
    "SGLang": (
        "model.layers.3.mlp.", "gate.e_score_correction_bias", "gate.e_score_correction_bias_vl", "topk.tid2eid"
    ),
}  # fmt: skip


def tensors(*, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(FLASH.experts, FLASH.hidden_size, generator=generator) * 2 / FLASH.hidden_size**0.5
    return {
        "weight": weight.to(torch.bfloat16),
        "bias": 0.3 * torch.randn(FLASH.experts, generator=generator),
        "bias_vl": 0.3 * torch.randn(FLASH.experts, generator=generator),
        "tid2eid": torch.randint(FLASH.experts, (FLASH.vocab_size, FLASH.top_k), generator=generator),
    }


def named(names: tuple[str, str, str, str], *kinds: str) -> dict[str, torch.Tensor]:
    prefix, bias, bias_vl, table = names
    ending = {"weight": "gate.weight", "bias": bias, "bias_vl": bias_vl, "tid2eid": table}
    return {prefix + ending[kind]: tensors()[kind] for kind in kinds}


def batch(dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(TOKENS, FLASH.hidden_size, generator=generator).to(dtype)
    return hidden, torch.randint(FLASH.vocab_size, (TOKENS,), generator=generator)


def chosen(scores: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights in float64 and ids of the models' gate, from all scores."""
    ids = (scores + bias.to(torch.float64)).topk(FLASH.top_k, dim=1).indices
    return definitions.weights_of(scores.gather(1, ids), True, FLASH.routed_scaling, 0.0), ids


def agrees(results: tuple[torch.Tensor, torch.Tensor], weights: torch.Tensor, ids: torch.Tensor) -> bool:
    return torch.equal(results[1].long(), ids) and torch.allclose(results[0].double(), weights, rtol=3e-6, atol=0)


@pytest.mark.parametrize("engine", NAMES)
def test_names(engine: str) -> None:
    """Dense and hash layers, those of vision models among them, from a whole model's tensors by name."""
    for kinds, mode, held in (
        (("weight", "bias"), "dense", {"weight", "bias"}),
        (("weight", "bias", "bias_vl"), "dense", {"weight", "bias", "bias_vl"}),
        (("weight", "tid2eid"), "hash", {"weight", "tid2eid"}),
        # Vision checkpoints keep a bias in hash layers too; nothing reads it.
        (("weight", "bias", "bias_vl", "tid2eid"), "hash", {"weight", "bias_vl", "tid2eid"}),
    ):
        router = Router.from_checkpoint(named(NAMES[engine], *kinds), 3, FLASH)
        assert router.mode == mode
        saved = router.state_dict()
        assert set(saved) == held
        for kind in held:
            assert torch.equal(saved[kind], tensors()[kind])


@pytest.mark.parametrize("mode", ["dense", "hash"])
@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_of_transformers_and_vllm(mode: str, assign: bool) -> None:
    """As load_state_dict of the module itself: a gate's state dict, with the names that engines give its buffers."""
    given = {f"gate.{name}": tensor for name, tensor in tensors().items()}
    given["gate.e_score_correction_bias"] = given.pop("gate.bias")
    given["gate.e_score_correction_bias_vl"] = given.pop("gate.bias_vl")
    if mode == "dense":
        del given["gate.tid2eid"]
    block = torch.nn.Module()
    block.gate = Router.from_preset(mode, FLASH, image_bias=True)  # type: ignore[arg-type]
    block.load_state_dict(given, assign=assign)
    for name, tensor in block.gate.state_dict().items():
        assert torch.equal(tensor, tensors()[name])
    assert "gate.bias" not in given  # the caller's mapping is left as it was


def test_a_float32_gate_that_bfloat16_holds() -> None:
    given = tensors() | {"weight": tensors()["weight"].float()}
    del given["tid2eid"], given["bias_vl"]
    for assign in (False, True):
        router = Router.from_preset("dense", FLASH)
        router.load_state_dict(given, assign=assign)
        assert router.weight.dtype == torch.bfloat16
        assert torch.equal(router.weight, tensors()["weight"])
    read = Router.from_checkpoint({f"layers.0.ffn.gate.{name}": tensor for name, tensor in given.items()}, 0, FLASH)
    assert read.weight_dtype == read.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("mode", ["dense", "hash"])
def test_a_float32_gate_keeps_its_digits(mode: str, device: str) -> None:
    """Against float64: nearer than a gate rounded to bfloat16 could be."""
    weight = tensors()["weight"].float() * 1.001
    given = named(NAMES["the models"], "bias" if mode == "dense" else "tid2eid") | {"layers.3.ffn.gate.weight": weight}
    router = Router.from_checkpoint(given, 3, FLASH, device=device)
    assert router.weight.dtype == torch.float32
    hidden, token_ids = batch()
    scores = definitions.scores_of(definitions.logits_of(hidden, weight))
    ids = tensors()["tid2eid"][token_ids]
    weights = definitions.weights_of(scores.gather(1, ids), True, FLASH.routed_scaling, 0.0)
    if mode == "dense":
        weights, ids = chosen(scores, tensors()["bias"])
    results = router(hidden.to(device), token_ids.to(device))
    assert agrees((results[0].cpu(), results[1].cpu()), weights, ids)


@pytest.mark.parametrize("mode", ["dense", "hash"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_hidden_states_of_other_dtypes(mode: str, dtype: torch.dtype, device: str) -> None:
    given = named(NAMES["the models"], "weight", "bias" if mode == "dense" else "tid2eid")
    router = Router.from_checkpoint(given, 3, FLASH, device=device)
    hidden, token_ids = batch(dtype)
    scores = definitions.scores_of(definitions.logits_of(hidden, tensors()["weight"]))
    ids = tensors()["tid2eid"][token_ids]
    weights = definitions.weights_of(scores.gather(1, ids), True, FLASH.routed_scaling, 0.0)
    if mode == "dense":
        weights, ids = chosen(scores, tensors()["bias"])
    results = router(hidden.to(device), token_ids.to(device))
    assert agrees((results[0].cpu(), results[1].cpu()), weights, ids)


@pytest.mark.parametrize("mode", ["dense", "hash"])
def test_logits_are_computed_once(mode: str, device: str) -> None:
    """What output_router_logits wants, and the same routes from it; hidden states are then not read."""
    given = named(NAMES["the models"], "weight", "bias" if mode == "dense" else "tid2eid")
    router = Router.from_checkpoint(given, 3, FLASH, device=device)
    hidden, token_ids = (tensor.to(device) for tensor in batch())
    logits = router.logits(hidden)
    exact = definitions.logits_of(hidden.cpu(), tensors()["weight"])
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.cpu().double(), exact, rtol=0, atol=1e-5)
    results = router(torch.full_like(hidden, torch.nan), token_ids, logits=logits)
    for result, alone in zip(results, router(hidden, token_ids), strict=True):
        torch.testing.assert_close(result, alone, rtol=3e-6, atol=0)
    with pytest.raises(InvalidArgumentError, match=r"Router: hidden: expected shape \[any, 256\], got \[7, 255\]"):
        router.logits(hidden[:, 1:])


def test_image_tokens_of_dense_layers(device: str) -> None:
    router = Router.from_checkpoint(named(NAMES["vLLM"], "weight", "bias", "bias_vl"), 3, FLASH, device=device)
    hidden, _ = batch()
    images = torch.tensor([True, False, False, True, True, False, True])
    scores = definitions.scores_of(definitions.logits_of(hidden, tensors()["weight"]))
    weights, ids = (
        torch.where(images[:, None], image, text)
        for image, text in zip(
            chosen(scores, tensors()["bias_vl"]), chosen(scores, tensors()["bias"]), strict=True
        )
    )  # fmt: skip
    results = router(hidden.to(device), None, None, images.to(device))
    assert agrees((results[0].cpu(), results[1].cpu()), weights, ids)
    assert not torch.equal(results[1].cpu(), router(hidden.to(device))[1].cpu())
    alone = dense_router_prefill(
        hidden.to(device), router.weight, router.bias, FLASH.top_k, scale=FLASH.routed_scaling,
        bias_alt=router.bias_vl, bias_alt_mask=images.to(device), int64_ids=True,
    )  # fmt: skip
    assert alone[1].dtype == torch.int64
    assert agrees((alone[0].cpu(), alone[1].cpu()), weights, ids)


def test_image_tokens_of_hash_layers(device: str) -> None:
    """They choose by bias_vl; the others, those with an id outside of the table among them, by the table."""
    names = named(NAMES["the models"], "weight", "bias", "bias_vl", "tid2eid")
    router = Router.from_checkpoint(names, 3, FLASH, device=device)
    hidden, token_ids = batch()
    token_ids[3:6] = FLASH.vocab_size + 2  # as sentinels of images have; the last of them is no image
    images = torch.tensor([True, False, False, True, True, False, False])
    padding = torch.tensor([False, False, True, False, True, False, False])
    scores = definitions.scores_of(definitions.logits_of(hidden, tensors()["weight"]))
    ids = definitions.looked_up(token_ids, tensors()["tid2eid"], padding)
    logits = definitions.logits_of(hidden, tensors()["weight"])
    weights = definitions.looked_up_weights(ids, logits, True, FLASH.routed_scaling, 0.0)
    by_bias = chosen(scores, tensors()["bias_vl"])
    weights = torch.where((images & ~padding)[:, None], by_bias[0], weights)
    ids = torch.where((images & ~padding)[:, None], by_bias[1], ids)
    out = (
        torch.empty(TOKENS, FLASH.top_k, device=device),
        torch.empty(TOKENS, FLASH.top_k, dtype=torch.int32, device=device),
    )
    results = router(*(t.to(device) for t in (hidden, token_ids, padding, images)), out_weights=out[0], out_ids=out[1])
    assert results[0] is out[0]
    assert agrees((out[0].cpu(), out[1].cpu()), weights, ids)


def test_a_mask_without_a_bias_for_it() -> None:
    router = Router.from_checkpoint(named(NAMES["vLLM"], "weight", "bias"), 3, FLASH)
    with pytest.raises(InvalidArgumentError, match=r"image_mask: expected None without a bias_vl, .*image_bias=True"):
        router(batch()[0], image_mask=torch.ones(TOKENS, dtype=torch.bool))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({}, "expected the experts of each token, got 0 in every entry; was the table ever loaded?"),
        ({(499, 5): 32}, "expected experts from 0 to 31, got 32"),
        ({(0, 0): -1}, "expected experts from 0 to 31, got -1"),
    ],
    ids=["all zero", "too large", "negative"],
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_tables_that_are_none(
    change: dict[tuple[int, int], int], text: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    table = torch.zeros(FLASH.vocab_size, FLASH.top_k, dtype=dtype)
    for place, expert in change.items():
        table[place] = expert
    given = named(NAMES["the models"], "weight") | {"layers.3.ffn.gate.tid2eid": table}
    file = tmp_path / "model.safetensors"
    save_file(given, file)
    with pytest.raises(CheckpointError) as raised:
        Router.from_checkpoint(file, 3, FLASH)
    assert str(raised.value) == f"{file}: layers.3.ffn.gate.tid2eid: {text}"
    router = Router.from_preset("hash", FLASH)
    with pytest.raises(CheckpointError) as raised:
        router.load_state_dict({"weight": tensors()["weight"], "tid2eid": table})
    assert str(raised.value) == f"Router: tid2eid: {text}"


def test_a_gate_without_bias_and_table() -> None:
    with pytest.raises(
        CheckpointError,
        match=r"layers\.3\.ffn\.gate: expected \.bias \(dense\) or \.tid2eid \(hash\), got neither; looked for gate\.",
    ):
        Router.from_checkpoint(named(NAMES["the models"], "weight", "bias_vl"), 3, FLASH)


def test_weight_dtypes_that_no_gate_has() -> None:
    options: dict[str, Any] = {"hidden_size": 64, "experts": 8, "top_k": 2}
    with pytest.raises(InvalidArgumentError, match=r"weight_dtype: expected torch\.bfloat16 or torch\.float32, got"):
        Router("dense", **options, weight_dtype=torch.float16)
