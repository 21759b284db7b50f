"""The MXFP4 back end in vLLM's own oracle, method and modular kernel, from wheel; all of it runs on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
import vllm.model_executor.layers.fused_moe.oracle.mxfp4 as oracle
from dsv4_kernels.integrations import vllm as plugin
from torch import Tensor
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    FusedMoEParallelConfig,
    RoutingMethodType,
)
from vllm.model_executor.layers.quantization.mxfp4 import Mxfp4MoEMethod
from vllm.model_executor.layers.quantization.utils.quant_utils import kMxfp4Static
from vllm.v1.worker import workspace

from tests.engines.reference import experts, mxfp4_values, relative_error

EXPERTS, TOP_K, LIMIT = 16, 6, 7.0


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    plugin.register(moe=True, mhc=False, router=False)
    plugin.register(moe=True, mhc=False, router=False)  # vLLM may load plugins more than once
    workspace.init_workspace_manager(torch.device("cpu"))


@pytest.fixture(autouse=True)
def _device(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the device had kernels: no GPU is here."""
    from dsv4_kernels.integrations.vllm.experts import Dsv4Experts

    monkeypatch.setattr(Dsv4Experts, "_supports_current_device", staticmethod(lambda: True))
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)  # vLLM's workspace calls it when it grows


def moe_config(hidden: int, inner: int, backend: str = "auto", **options: object) -> FusedMoEConfig:
    return FusedMoEConfig(
        num_experts=EXPERTS,
        experts_per_token=TOP_K,
        hidden_dim=hidden,
        intermediate_size=inner,
        num_local_experts=EXPERTS,
        num_logical_experts=EXPERTS,
        activation=MoEActivation.SILU,
        device="cpu",
        routing_method=RoutingMethodType.DeepseekV4,
        moe_parallel_config=FusedMoEParallelConfig.make_no_parallel(),
        in_dtype=torch.bfloat16,
        moe_backend=backend,
        swiglu_limit=LIMIT,
        **options,
    )


class Layer(torch.nn.Module):
    """What Mxfp4MoEMethod reads of vLLM's RoutedExperts."""

    activation = MoEActivation.SILU
    apply_router_weight_on_input = False
    global_num_experts = EXPERTS
    swiglu_limit = LIMIT

    def __init__(self, expert_map: Tensor | None) -> None:
        super().__init__()
        self.expert_map = expert_map

    def _expert_routing_tables(self) -> None:
        return None


def loaded(
    hidden: int, inner: int, local: int = EXPERTS, expert_map: Tensor | None = None, largest_scale: int = 128
) -> Any:
    """A method and layer with weights as a checkpoint's loader leaves them, and their values."""
    method = Mxfp4MoEMethod(moe_config(hidden, inner))
    layer = Layer(expert_map)
    method.create_weights(layer, local, hidden, inner, torch.bfloat16, weight_loader=None)
    for name, parameter in layer.named_parameters():
        low, high = (largest_scale - 8, largest_scale + 1) if name.endswith("scale") else (0, 256)
        parameter.data.copy_(torch.randint(low, high, parameter.shape, dtype=torch.uint8))
    values = [mxfp4_values(getattr(layer, f"{p}_weight"), getattr(layer, f"{p}_weight_scale")) for p in ("w13", "w2")]
    return method, layer, values


def batch(tokens: int, hidden: int) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(tokens, hidden, dtype=torch.bfloat16)
    weights = torch.rand(tokens, TOP_K)
    ids = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(tokens)]).to(torch.int32)
    return x, weights, ids


def run(method: Mxfp4MoEMethod, layer: Layer, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    return method.apply(layer, x, weights, ids, shared_experts=None, shared_experts_input=None)


def test_the_oracle_chooses_it_where_it_would_choose_marlin() -> None:
    from dsv4_kernels.integrations.vllm.experts import Dsv4Experts

    backend, chosen = oracle.select_deepseek_v4_mxfp4_moe_backend(moe_config(512, 256))
    assert (backend.value, chosen) == ("DSV4_KERNELS", Dsv4Experts)
    order = [found.value for found in oracle._get_priority_backends()]
    ours = order.index("DSV4_KERNELS")
    assert order[ours + 1] == "MARLIN"
    assert {"FLASHINFER_TRTLLM_MXFP4_MXFP8", "DEEPGEMM_MXFP4"} <= set(order[:ours])
    assert oracle.map_mxfp4_backend("dsv4_kernels") == [backend]
    assert oracle.map_mxfp4_backend("marlin") == [oracle.Mxfp4MoeBackend.MARLIN]
    assert oracle.Mxfp4MoeBackend("DSV4_KERNELS") is backend


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"has_bias": True}, "biases"),
        ({"in_dtype": torch.float16}, "float16"),
        ({"swiglu_alpha": 1.702}, "alpha"),
        ({"is_lora_enabled": True}, "LoRA"),
        ({"activation": MoEActivation.GELU}, "activation"),
        ({"hidden_dim": 4128}, "hidden dim"),
        ({"intermediate_size": 2056}, "2056"),
    ],
)
def test_what_the_kernels_do_not_do_is_left_to_other_back_ends(options: dict[str, Any], reason: str) -> None:
    from dsv4_kernels.integrations.vllm.experts import Dsv4Experts

    config = moe_config(4096, 2048)
    assert Dsv4Experts.is_supported_config(
        Dsv4Experts, config, kMxfp4Static, None, mk.FusedMoEActivationFormat.Standard
    ) == (True, None)
    for name, value in options.items():
        setattr(config, name, value)
    config.intermediate_size_per_partition = config.intermediate_size
    supported, found = Dsv4Experts.is_supported_config(
        Dsv4Experts, config, kMxfp4Static, None, mk.FusedMoEActivationFormat.Standard
    )
    assert not supported
    assert reason in found


@pytest.mark.parametrize(
    ("hidden", "inner", "largest_scale", "in_place"),
    [
        pytest.param(512, 256, 128, True, id="rearranged"),
        pytest.param(512, 192, 128, False, id="a-shard-that-fills-no-block"),
        pytest.param(512, 256, 137, False, id="scales-above-2^9"),
    ],
)
@pytest.mark.parametrize("tokens", [1, 37])
def test_the_layer_equals_float64(hidden: int, inner: int, largest_scale: int, in_place: bool, tokens: int) -> None:
    """At most twice the error of plain torch in bfloat16, whose intermediate results are rounded in the same places."""
    method, layer, values = loaded(hidden, inner, largest_scale=largest_scale)
    before = {name: (p.data_ptr(), p.shape, p.dtype) for name, p in layer.named_parameters() if "scale" not in name}
    method.process_weights_after_loading(layer)
    assert {n: (p.data_ptr(), p.shape, p.dtype) for n, p in layer.named_parameters() if "scale" not in n} == before
    assert (layer.w2_weight_scale.dtype == torch.int32) is in_place
    x, weights, ids = batch(tokens, hidden)
    x *= 2.0 ** (128 - largest_scale)  # so that the limit acts on some and not on all
    found = run(method, layer, x, weights, ids)
    exact, plain = (experts(x, *values, weights, ids, LIMIT, dtype) for dtype in (torch.float64, torch.bfloat16))
    assert relative_error(found, exact) <= 2 * relative_error(plain, exact)
    again = run(method, layer, x, weights, ids)
    assert torch.equal(found, again)


def test_weights_that_are_processed_twice_stay() -> None:
    method, layer, _ = loaded(512, 256)
    method.process_weights_after_loading(layer)
    once = [parameter.clone() for parameter in layer.parameters()]
    method.moe_kernel.fused_experts.process_weights_after_loading(layer)
    assert all(torch.equal(a, b) for a, b in zip(once, layer.parameters(), strict=True))


def test_experts_elsewhere_and_replicas_come_by_expert_map() -> None:
    """Of 16 experts 0 to 15, this rank has the four that the map names, in that order; -1 is padding."""
    expert_map = torch.full((EXPERTS,), -1, dtype=torch.int32)
    expert_map[torch.tensor([9, 2, 15, 4])] = torch.arange(4, dtype=torch.int32)
    method, layer, values = loaded(512, 256, local=4, expert_map=expert_map)
    method.process_weights_after_loading(layer)
    x, weights, ids = batch(29, 512)
    ids[3] = -1
    found = run(method, layer, x, weights, ids)
    local = torch.where(ids >= 0, expert_map[ids.clamp(0).long()], -1)
    assert (local >= 0).any()
    exact, plain = (experts(x, *values, weights, local, LIMIT, dtype) for dtype in (torch.float64, torch.bfloat16))
    assert relative_error(found, exact) <= 2 * relative_error(plain, exact)
    assert not found[3].any()


def test_the_workspace_is_vllms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results of both products lie in the workspace that vLLM sized by workspace_shapes, at every batch size."""
    import dsv4_kernels.integrations.vllm.experts as module

    method, layer, _ = loaded(512, 256)
    method.process_weights_after_loading(layer)
    manager = workspace.current_workspace_manager()
    seen = []
    original = getattr(module, "run_experts")  # noqa: B009

    def watched(*args: object, **options: Tensor) -> Tensor:
        whole = manager._current_workspaces[0]
        bounds = whole.data_ptr(), whole.data_ptr() + whole.numel() * whole.element_size()
        for name in ("out_inner", "out_rows"):
            start = options[name].data_ptr()
            assert bounds[0] <= start
            assert start + options[name].numel() * 2 <= bounds[1]
        seen.append(options["out_inner"].shape[0])
        return original(*args, **options)

    monkeypatch.setattr(module, "run_experts", watched)
    for tokens in (1, 8, 100, 1000):
        module.Dsv4Experts.workspace_shapes(
            method.moe_kernel.fused_experts, tokens, 512, 512, TOP_K, EXPERTS, EXPERTS, None, MoEActivation.SILU
        )
        run(method, layer, *batch(tokens, 512))
    assert len(seen) == 4
    assert sorted(seen) == seen
