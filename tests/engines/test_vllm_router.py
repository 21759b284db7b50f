"""Routing in vLLM's own FusedTopKBiasRouter, from wheel, and against its Triton kernel, interpreted on the CPU."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import vllm.model_executor.layers.fused_moe.router.fused_topk_bias_router as router_module
from dsv4_kernels.integrations import vllm as plugin
from torch import Tensor
from vllm.model_executor.layers.fused_moe.router.fused_topk_bias_router import FusedTopKBiasRouter

from tests.engines.reference import route

EXPERTS, TOP_K, SCALE, IMAGES = 256, 6, 1.5, 1000


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    plugin.register(moe=False, mhc=False, router=True)
    wrapper = router_module.fused_topk_bias
    plugin.register(moe=False, mhc=False, router=True)
    assert router_module.fused_topk_bias is wrapper


@pytest.fixture(scope="module")
def triton_topk() -> ModuleType:
    """vLLM's module dsv4_topk as it is on a GPU, its kernel run by Triton's interpreter."""
    with pytest.MonkeyPatch.context() as patch:
        import triton
        import triton.language

        cuda = SimpleNamespace(is_cuda=lambda: True, is_arch_support_pdl=lambda: False)
        patch.setattr("vllm.platforms.current_platform", cuda)
        patch.setitem(sys.modules, "vllm.triton_utils", SimpleNamespace(tl=triton.language, triton=triton))
        path = Path(router_module.__file__).with_name("dsv4_topk.py")
        spec = importlib.util.spec_from_file_location("vllm_dsv4_topk_interpreted", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def router(bias: Tensor | None, table: Tensor | None = None, **options: object) -> FusedTopKBiasRouter:
    made = {"top_k": TOP_K, "global_num_experts": EXPERTS, "scoring_func": "sqrtsoftplus"}
    return FusedTopKBiasRouter(
        **{**made, **options},
        e_score_correction_bias=bias,
        hash_indices_table=table,
        routed_scaling_factor=SCALE,
    )


def compute(
    made: FusedTopKBiasRouter, logits: Tensor, dtype: torch.dtype = torch.int32, ids: Tensor | None = None
) -> Any:
    hidden = torch.empty(logits.shape[0], 64, dtype=torch.bfloat16)
    return made._compute_routing(hidden, logits, dtype, input_ids=ids)


def check(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], dtype: torch.dtype = torch.int32) -> None:
    assert found[1].dtype == dtype
    assert torch.equal(found[1].long(), expected[1].long())
    torch.testing.assert_close(found[0].double(), expected[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_top_k_equals_float64(dtype: torch.dtype) -> None:
    logits, bias = torch.randn(40, EXPERTS) * 4, torch.randn(EXPERTS)
    check(compute(router(bias), logits, dtype), route(logits, bias, TOP_K, SCALE, None), dtype)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_hash_tables_equal_float64(dtype: torch.dtype) -> None:
    """Token ids as a column of a batch of sequences are strided."""
    logits = torch.randn(40, EXPERTS) * 4
    table = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(100)]).to(torch.int32)
    ids = torch.randint(0, 100, (40, 3), dtype=torch.int64)[:, 1]
    found = compute(router(None, table), logits, dtype, ids)
    check(found, route(logits, None, TOP_K, SCALE, table[ids]), dtype)


def test_image_tokens_choose_by_their_own_bias() -> None:
    logits, bias, bias_vl = torch.randn(40, EXPERTS), torch.randn(EXPERTS), torch.randn(EXPERTS)
    ids = torch.arange(IMAGES - 20, IMAGES + 20)
    found = compute(router(bias, bias_vl=bias_vl, image_sentinel_lo=IMAGES), logits, ids=ids)
    image = (ids >= IMAGES) & (ids < IMAGES + 5)
    by_bias = (route(logits, b, TOP_K, SCALE, None) for b in (bias, bias_vl))
    expected = tuple(torch.where(image[:, None], vl, text) for text, vl in zip(*by_bias, strict=True))
    check(found, expected)


def test_padding_goes_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    padding = torch.arange(10) >= 7
    monkeypatch.setattr(router_module, "_get_padding_mask", lambda tokens: padding[:tokens])
    weights, ids = compute(router(torch.zeros(EXPERTS)), torch.randn(10, EXPERTS))
    assert (ids[7:] == -1).all()
    assert (weights[7:] == 0).all()
    assert (ids[:7] >= 0).all()


def test_vllms_own_kernel_gives_the_same(triton_topk: ModuleType) -> None:
    """Ties, zeros, logits that underflow, padding and image tokens included."""
    logits = torch.randn(24, EXPERTS) * 8
    logits[0], logits[1, ::2], logits[2] = 0.0, -200.0, -30.0
    bias, bias_vl = torch.randn(EXPERTS), torch.randn(EXPERTS)
    bias[10:20] = 3.0
    ids, padding = torch.arange(IMAGES - 12, IMAGES + 12), torch.arange(24) == 5
    theirs = triton_topk.dsv4_topk(logits, bias, torch.int64, SCALE, padding, ids, bias_vl, IMAGES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(router_module, "_get_padding_mask", lambda tokens: padding)
        ours = compute(router(bias, bias_vl=bias_vl, image_sentinel_lo=IMAGES), logits, torch.int64, ids)
    assert torch.equal(ours[1], theirs[1])
    # The kernel takes log(1 + exp(x)) in float32, which underflows: scores below -17 are 0 there.
    plain = (logits.gather(1, ours[1].clamp(0)) > -14).all(1)
    torch.testing.assert_close(ours[0][plain], theirs[0][plain], rtol=2e-4, atol=1e-6)
    assert plain.sum() > 15


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_other_scores_are_vllms(monkeypatch: pytest.MonkeyPatch, scoring: str) -> None:
    monkeypatch.setattr(router_module.rocm_aiter_ops, "is_fused_moe_enabled", lambda: True)  # vLLM's torch path
    monkeypatch.setattr(router_module, "_aiter_can_use_biased_grouped_topk", lambda *_: False)
    logits, bias = torch.randn(9, EXPERTS), torch.randn(EXPERTS)
    found = compute(router(bias, scoring_func=scoring), logits)
    scores = logits.softmax(1) if scoring == "softmax" else logits.sigmoid()
    ids = (scores + bias).topk(TOP_K, dim=1).indices
    assert torch.equal(found[1].long().sort(1).values, ids.sort(1).values)
