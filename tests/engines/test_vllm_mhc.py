"""Hyper-connections in the forward pass of vLLM's own decoder layers, from wheel.

The layers' forward code and vLLM's torch references run on the CPU; attention and experts are a product each.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm.model_executor.kernels.mhc.tilelang as functions
import vllm.models.deepseek_v4.nvidia.model as model
from dsv4_kernels.integrations import vllm as plugin
from torch import Tensor, nn
from vllm.model_executor.kernels.mhc.torch import mhc_post_torch, mhc_pre_torch
from vllm.model_executor.warmup.jit_warmup import JitWarmupRegistry, VllmJitKernel

HIDDEN, TOKENS = 512, 23
NAMES = (
    "mhc_pre_tilelang",
    "mhc_pre_broadcast_tilelang",
    "mhc_post_tilelang",
    "mhc_fused_post_pre_tilelang",
    "hc_head_fused_kernel_tilelang",
)


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    before = {name: getattr(functions, name) for name in NAMES}
    plugin.register(moe=False, mhc=True, router=False)
    after = {name: getattr(functions, name) for name in NAMES}
    plugin.register(moe=False, mhc=True, router=False)
    assert {name: getattr(functions, name) for name in NAMES} == after
    # The model had them by `from ... import` before they were replaced.
    assert all(getattr(model, name) is after[name] is not before[name] for name in NAMES)


class Product(nn.Module):
    """Stands in for attention and experts."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(HIDDEN, HIDDEN, dtype=torch.bfloat16) * HIDDEN**-0.5)
        self.inputs: list[Tensor] = []

    def forward(self, *args: object) -> Tensor:
        x = next(arg for arg in args if isinstance(arg, Tensor) and arg.is_floating_point())
        self.inputs.append(x)
        return x @ self.weight


def decoder_layer() -> model.DeepseekV4DecoderLayer:
    """A layer with random hyper-connections, its __init__, which needs a GPU's configuration, left out."""
    layer = model.DeepseekV4DecoderLayer.__new__(model.DeepseekV4DecoderLayer)
    nn.Module.__init__(layer)
    layer.hidden_size, layer.use_sequence_parallel, layer.rms_norm_eps = HIDDEN, False, 1e-6
    layer.hc_mult, layer.hc_sinkhorn_iters, layer.hc_eps, layer.hc_post_alpha = 4, 20, 1e-6, 2.0
    layer.attn, layer.ffn = Product(), Product()
    for part in ("attn", "ffn"):
        norm = SimpleNamespace(weight=nn.Parameter(torch.rand(HIDDEN, dtype=torch.bfloat16)), variance_epsilon=1e-6)
        setattr(layer, f"{part}_norm", norm)
        for name, tensor in (
            ("fn", torch.randn(24, 4 * HIDDEN) * HIDDEN**-0.5),
            ("base", torch.randn(24)),
            ("scale", torch.rand(3)),
        ):
            setattr(layer, f"hc_{part}_{name}", nn.Parameter(tensor))
    layer.hc_attn_fn_broadcast = layer.hc_attn_fn.view(24, 4, HIDDEN).sum(1)
    return layer


def normed(u: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm of what vLLM's reference collapsed."""
    u = u.float()
    return (u * torch.rsqrt(u.square().mean(-1, keepdim=True) + 1e-6) * weight.float()).to(torch.bfloat16)


def engine_pre(residual: Tensor, *args: object, norm_weight: Tensor, **_: object) -> tuple[Tensor, ...]:
    post, comb, u = mhc_pre_torch(residual, *args)
    return post, comb, normed(u, norm_weight)


def engine_broadcast(x: Tensor, *args: object, norm_weight: Tensor, **_: object) -> tuple[Tensor, ...]:
    residual = x.unsqueeze(1).repeat(1, 4, 1)
    return residual, *engine_pre(residual, *args, norm_weight=norm_weight)


def engine_post_pre(x: Tensor, residual: Tensor, post: Tensor, comb: Tensor, *args: object, **options: object) -> Any:
    residual = mhc_post_torch(x, residual, post, comb)
    return residual, *engine_pre(residual, *args, norm_weight=options["norm_weight"])


@torch.no_grad()
def forward(layers: list[model.DeepseekV4DecoderLayer], x: Tensor) -> tuple[list[Tensor], Tensor]:
    """What attention and experts of each layer are given, and the streams behind the last."""
    state = residual = post = comb = None
    for layer in layers:
        layer.attn.inputs.clear(), layer.ffn.inputs.clear()
        x, residual, post, comb = layer(x, torch.arange(x.shape[0]), None, post, comb, residual)
    state = model.mhc_post_tilelang(x, residual, post, comb)
    return [x for layer in layers for x in (*layer.attn.inputs, *layer.ffn.inputs)], state


@pytest.mark.parametrize("streams", [False, True], ids=["first-layer-from-embeddings", "first-layer-from-streams"])
def test_two_decoder_layers_as_by_vllms_reference(monkeypatch: pytest.MonkeyPatch, streams: bool) -> None:
    layers = [decoder_layer(), decoder_layer()]
    x = torch.randn((TOKENS, 4, HIDDEN) if streams else (TOKENS, HIDDEN), dtype=torch.bfloat16)
    found, found_streams = forward(layers, x)
    monkeypatch.setattr(model, "mhc_pre_tilelang", engine_pre)
    monkeypatch.setattr(model, "mhc_pre_broadcast_tilelang", engine_broadcast)
    monkeypatch.setattr(model, "mhc_fused_post_pre_tilelang", engine_post_pre)
    monkeypatch.setattr(model, "mhc_post_tilelang", mhc_post_torch)
    exact, exact_streams = forward(layers, x)
    assert len(found) == 4
    # The reference rounds what it collapsed before the norm, where vLLM's kernels and ours norm unrounded values: two
    # bfloat16 roundings, carried through four sublayers.
    for ours, theirs in zip([*found, found_streams], [*exact, exact_streams], strict=True):
        assert ours.dtype == torch.bfloat16
        assert ours.shape == theirs.shape
        difference = (ours.double() - theirs.double()).norm() / theirs.double().norm()
        assert difference < 2**-7, float(difference)


@torch.no_grad()
def test_coefficients_equal_vllms_reference() -> None:
    layer = decoder_layer()
    streams = torch.randn(TOKENS, 4, HIDDEN, dtype=torch.bfloat16)
    args = streams, layer.hc_attn_fn, layer.hc_attn_scale, layer.hc_attn_base, 1e-6, 1e-6, 1e-6, 2.0, 20
    post, comb, u = functions.mhc_pre_tilelang(*args)
    expected_post, expected_comb, expected_u = mhc_pre_torch(*args)
    torch.testing.assert_close(post, expected_post, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(comb, expected_comb, rtol=1e-5, atol=1e-6)
    assert (u != expected_u).float().mean() < 0.01  # a bfloat16 step where float32 sums round to different sides
    x = torch.randn(TOKENS, HIDDEN, dtype=torch.bfloat16)
    got, want = functions.mhc_post_tilelang(x, streams, post, comb), mhc_post_torch(x, streams, post, comb)
    assert (got != want).float().mean() < 0.01
    torch.testing.assert_close(got, want, rtol=2**-7, atol=2**-7)


@torch.no_grad()
def test_the_head_equals_its_definition() -> None:
    streams = torch.randn(TOKENS, 4, HIDDEN, dtype=torch.bfloat16)
    fn, scale, base = torch.randn(4, 4 * HIDDEN) * HIDDEN**-0.5, torch.rand(1), torch.randn(4)
    x = streams.flatten(1).double()
    mixed = x @ fn.double().T * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    pre = torch.sigmoid(mixed * scale.double() + base.double()) + 1e-6
    exact = (pre.unsqueeze(-1) * streams.double()).sum(1)
    found = model.hc_head_fused_kernel_tilelang(streams, fn, scale, base, 1e-6, 1e-6)
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=2**-8)


@torch.no_grad()
def test_a_call_of_another_kind_is_vllms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two streams, or two epsilons of different values: the function that was there is called with all arguments."""
    layer = decoder_layer()
    given = []
    names = "residual", "fn", "hc_scale", "hc_base", "rms_eps", "hc_pre_eps", "hc_sinkhorn_eps"
    original = functions.mhc_pre_tilelang.__wrapped__
    streams = torch.randn(3, 4, HIDDEN, dtype=torch.bfloat16)
    rest = layer.hc_attn_scale, layer.hc_attn_base, 1e-6, 1e-6, 1e-5, 2.0, 20
    from dsv4_kernels.integrations.vllm import mhc

    mhc._pre(lambda *args: given.append(args), streams, layer.hc_attn_fn, *rest, norm_weight=None)
    assert given[0][: len(names)] == (streams, layer.hc_attn_fn, *rest[:5])
    assert given[0][len(names) :] == (2.0, 20, 1, None, 1e-6)
    assert original.__name__ == "mhc_pre_tilelang"


class Kernel(VllmJitKernel):
    CompileKey = tuple

    def dispatch(self, **_: object) -> None: ...
    def get_warmup_keys(self, **_: object) -> list[tuple[int, ...]]:
        return []

    def compile(self, *_: object) -> None: ...


@pytest.mark.parametrize(
    ("module", "model_type", "registered"),
    [
        ("vllm.model_executor.kernels.mhc.tilelang_kernels", "deepseek_v4", False),
        ("vllm.model_executor.kernels.mhc.tilelang_kernels", "deepseek_v41", True),
        ("vllm.v1.sample.rejection_sampler", "deepseek_v4", True),
    ],
)
def test_no_kernel_is_compiled_that_is_never_launched(
    monkeypatch: pytest.MonkeyPatch, module: str, model_type: str, registered: bool
) -> None:
    seen = []
    monkeypatch.setattr(JitWarmupRegistry, "register", classmethod(lambda cls, kernel, *a, **k: seen.append(kernel)))
    config = SimpleNamespace(model_config=SimpleNamespace(hf_config=SimpleNamespace(model_type=model_type)))
    monkeypatch.setattr("vllm.config.get_current_vllm_config", lambda: config)
    monkeypatch.setattr(Kernel, "__module__", module)
    Kernel.__new__(Kernel).register_warmup()
    assert bool(seen) is registered
