"""Hyper-connections and routing in SGLang's own functions, from wheel, through SGLang's hook registry.

What it is compared with are SGLang's torch references and its Triton kernels, interpreted on the CPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import sglang.kernels.ops.layernorm.mhc as mhc
import sglang.kernels.ops.layernorm.mhc_head as mhc_head
import sglang.kernels.ops.moe.dsv4 as hash_module
import sglang.kernels.ops.moe.moe_fused_gate as gate_module
import torch
from dsv4_kernels.integrations import sglang as plugin
from sglang.kernels.ops.moe.triton_hash_topk import hash_topk_triton
from sglang.srt.plugins.hook_registry import HookRegistry
from torch import Tensor

from tests.engines.reference import route

HIDDEN, TOKENS, EXPERTS, TOP_K, SCALE = 512, 21, 256, 6, 1.5
TARGETS = (
    "sglang.kernels.ops.layernorm.mhc.mhc_pre",
    "sglang.kernels.ops.layernorm.mhc.mhc_post",
    "sglang.kernels.ops.layernorm.mhc.mhc_fused_post_pre",
    "sglang.kernels.ops.layernorm.mhc.prewarm_mhc_pre",
    "sglang.kernels.ops.layernorm.mhc_head.fused_hc_head",
    "sglang.kernels.ops.moe.moe_fused_gate.moe_fused_gate",
    "sglang.kernels.ops.moe.dsv4.hash_topk",
)


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    plugin.register(moe=False)
    plugin.register(moe=False)  # SGLang loads plugins in every process; a second time adds nothing
    assert set(TARGETS) <= HookRegistry._patched
    assert all(len(HookRegistry._hooks[target]) == 1 for target in TARGETS)


def connection() -> tuple[Tensor, Tensor, Tensor]:
    """fn, scale, base."""
    return torch.randn(24, 4 * HIDDEN) * HIDDEN**-0.5, torch.rand(3), torch.randn(24)


def normed(u: Tensor, weight: Tensor) -> Tensor:
    u = u.float()
    return (u * torch.rsqrt(u.square().mean(-1, keepdim=True) + 1e-6) * weight.float()).to(torch.bfloat16)


def test_pre_and_post_equal_sglangs_reference() -> None:
    streams, (fn, scale, base) = torch.randn(TOKENS, 4, HIDDEN, dtype=torch.bfloat16), connection()
    args = streams, fn, scale, base, 1e-6, 1e-6, 1e-6, 2.0, 20
    post, comb, u = mhc.mhc_pre(*args)
    expected = mhc._mhc_pre_torch(*args)
    torch.testing.assert_close(post, expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(comb, expected[1], rtol=1e-5, atol=1e-6)
    assert u.shape == expected[2].shape
    assert (u != expected[2]).float().mean() < 0.01  # a bfloat16 step where float32 sums round to different sides
    weight = torch.rand(HIDDEN, dtype=torch.bfloat16)
    found = mhc.mhc_pre(*args, norm_weight=weight, norm_eps=1e-6)[2]
    torch.testing.assert_close(found.float(), normed(expected[2], weight).float(), rtol=2**-6, atol=2**-8)
    x = torch.randn(TOKENS, HIDDEN, dtype=torch.bfloat16)
    # SGLang's reference multiplies in float32 and rounds once, as the op does.
    torch.testing.assert_close(
        mhc.mhc_post(x, streams, post, comb), mhc._mhc_post_torch(x, streams, *expected[:2]), rtol=2**-7, atol=2**-7
    )


@pytest.mark.parametrize("tokens", [0, 1, TOKENS])
def test_the_fused_form_is_post_then_pre(tokens: int) -> None:
    streams, x = (torch.randn(*shape, HIDDEN, dtype=torch.bfloat16) for shape in ((tokens, 4), (tokens,)))
    fn, scale, base = connection()
    weight = torch.rand(HIDDEN, dtype=torch.bfloat16)
    rest = fn, scale, base, 1e-6, 1e-6, 1e-6, 2.0, 20
    post, comb, _ = mhc.mhc_pre(streams, *rest)
    fused = mhc.mhc_fused_post_pre(x, streams, post, comb, *rest, norm_weight=weight, norm_eps=1e-6)
    after = mhc.mhc_post(x, streams, post, comb)
    expected = after, *mhc.mhc_pre(after, *rest, norm_weight=weight, norm_eps=1e-6)
    assert [tuple(t.shape) for t in fused] == [(tokens, 4, HIDDEN), (tokens, 4, 1), (tokens, 4, 4), (tokens, HIDDEN)]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(fused, expected, strict=True))


def test_the_head_equals_sglangs_kernel() -> None:
    """The Triton kernel that was there, interpreted."""
    streams = torch.randn(5, 4, HIDDEN, dtype=torch.bfloat16)
    args = streams, torch.randn(4, 4 * HIDDEN) * HIDDEN**-0.5, torch.rand(1), torch.randn(4), 1e-6, 1e-6
    found, theirs = mhc_head.fused_hc_head(*args), mhc_head.fused_hc_head.__wrapped__(*args)
    assert found.dtype == theirs.dtype
    torch.testing.assert_close(found.float(), theirs.float(), rtol=2**-7, atol=2**-8)


def test_nothing_is_compiled_ahead() -> None:
    """The prewarm would need SGLang's schedule, TileLang and a GPU."""
    streams, (fn, scale, base) = torch.zeros(1, 4, HIDDEN, dtype=torch.bfloat16), connection()
    mhc.prewarm_mhc_pre(streams, fn, scale, base, 1e-6, 1e-6, 1e-6, 2.0, 20, 1, 32, None, None)


def test_a_call_of_another_kind_is_sglangs() -> None:
    from dsv4_kernels.integrations.sglang import mhc as hooks

    given: list[Any] = []
    streams, (fn, scale, base) = torch.randn(2, 4, HIDDEN, dtype=torch.bfloat16), connection()
    args = streams, fn, scale, base, 1e-6, 1e-6, 1e-5, 2.0, 20
    hooks._pre(lambda *a, **k: given.append((a, k)), *args, norm_weight=None)
    assert given == [((*args, 1, 32), {"norm_weight": None, "norm_eps": None})]


def check(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert found[1].dtype == torch.int32
    assert torch.equal(found[1].long(), expected[1].long())
    torch.testing.assert_close(found[0].double(), expected[0].double(), rtol=1e-6, atol=1e-7)


def test_the_gate_equals_float64_and_sglangs_kernel() -> None:
    logits, bias = torch.randn(12, EXPERTS) * 4, torch.randn(EXPERTS)
    options = {
        "topk": TOP_K,
        "scoring_func": "sqrtsoftplus",
        "routed_scaling_factor": SCALE,
        "apply_routed_scaling_factor_on_output": True,
    }
    found = gate_module.moe_fused_gate(logits, bias, **options)
    check(found, route(logits, bias, TOP_K, SCALE, None))
    theirs = gate_module.moe_fused_gate.__wrapped__(logits, bias, **options)
    assert torch.equal(found[1], theirs[1])
    torch.testing.assert_close(found[0], theirs[0], rtol=2e-4, atol=1e-6)


def test_padded_rows_and_image_tokens() -> None:
    logits, bias, image_bias = torch.randn(12, EXPERTS), torch.randn(EXPERTS), torch.randn(EXPERTS)
    ids = torch.arange(12) % 3
    weights, chosen = gate_module.moe_fused_gate(
        logits, bias, TOP_K, "sqrtsoftplus", bias_alt=image_bias, input_ids=ids, bias_alt_token_id=2,
        num_token_non_padded=torch.tensor(9, dtype=torch.int32),
    )  # fmt: skip
    by_bias = (route(logits, b, TOP_K, 1.0, None) for b in (bias, image_bias))
    expected = [torch.where((ids == 2)[:, None], vl, text) for text, vl in zip(*by_bias, strict=True)]
    check((weights[:9], chosen[:9]), (expected[0][:9], expected[1][:9]))
    assert (chosen[9:] == -1).all()
    assert not weights[9:].any()


@pytest.mark.parametrize("shared", [0, 1])
def test_hash_tables_equal_sglangs_kernel(shared: int) -> None:
    """The Triton form of hash_topk, interpreted; with the shared expert as one more route."""
    logits = torch.randn(12, EXPERTS) * 4
    table = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(50)]).to(torch.int32)
    ids = torch.randint(0, 50, (12,), dtype=torch.int64)
    found = hash_module.hash_topk(logits, ids, table, shared, SCALE)
    theirs = hash_topk_triton(logits, ids, table, shared, SCALE, "sqrtsoftplus")
    assert torch.equal(found[1], theirs[1])
    torch.testing.assert_close(found[0], theirs[0], rtol=2e-4, atol=1e-6)
    check((found[0][:, :TOP_K], found[1][:, :TOP_K]), route(logits, None, TOP_K, 1.0, table[ids]))
