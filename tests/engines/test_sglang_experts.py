"""The MXFP4 experts in SGLang's own Mxfp4MarlinMoEMethod, from wheel: its parameters, its hooks, its tuples."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import sglang.srt.layers.quantization.mxfp4_marlin_moe as method_module
import torch
from dsv4_kernels.integrations import sglang as plugin
from dsv4_kernels.integrations.sglang.moe_method import BACKEND
from sglang.srt.layers.moe.moe_runner.base import MoeRunnerConfig
from sglang.srt.layers.moe.token_dispatcher.standard import StandardCombineInput, StandardDispatchOutput
from sglang.srt.layers.moe.topk import StandardTopKOutput
from torch import Tensor

from tests.engines.reference import experts, mxfp4_values, relative_error

EXPERTS, TOP_K, LIMIT, HIDDEN, INNER = 16, 6, 7.0, 512, 256


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    plugin.register(mhc=False, router=False)
    plugin.register(mhc=False, router=False)


@pytest.fixture(autouse=True)
def _platform(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Hopper, where SGLang does not round widths up."""
    monkeypatch.setattr(method_module, "get_platform", lambda: SimpleNamespace(is_sm90=True, is_sm120=False))


class Base:
    """What SGLang's method for FP8 does with a layer: nothing that matters here."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None: ...


def loaded(local: int = EXPERTS, **options: object) -> tuple[Any, Any, list[Tensor]]:
    """A method and layer with weights as a checkpoint's loader leaves them, and their values."""
    method = method_module.Mxfp4MarlinMoEMethod(Base(), prefix="model.layers.0.mlp.experts")
    layer: Any = torch.nn.Module()
    layer.hidden_size, layer.dispatcher = HIDDEN, SimpleNamespace(num_experts=EXPERTS)
    method.create_weights(layer, local, HIDDEN, INNER, torch.bfloat16)
    for name, parameter in layer.named_parameters():
        low, high = (120, 129) if "scale" in name else (0, 256)
        parameter.data.view(torch.uint8).copy_(torch.randint(low, high, parameter.shape, dtype=torch.uint8))
    values = [
        mxfp4_values(getattr(layer, f"{p}_weight"), getattr(layer, f"{p}_weight_scale_inv")) for p in ("w13", "w2")
    ]
    config = MoeRunnerConfig(**{"num_experts": EXPERTS, "num_local_experts": local, "swiglu_limit": LIMIT, **options})
    method.runner = SimpleNamespace(config=config)
    return method, layer, values


def dispatched(x: Tensor, weights: Tensor, ids: Tensor) -> StandardDispatchOutput:
    routes = StandardTopKOutput(topk_weights=weights, topk_ids=ids, router_logits=torch.empty(x.shape[0], EXPERTS))
    return StandardDispatchOutput(hidden_states=x, hidden_states_scale=None, topk_output=routes)


@pytest.mark.parametrize("tokens", [1, 37])
@pytest.mark.parametrize("local", [EXPERTS, 4], ids=["all-experts", "a-rank-of-four"])
def test_the_layer_equals_float64(tokens: int, local: int) -> None:
    """With expert parallelism the dispatcher gives ids of the experts here, -1 for those elsewhere."""
    method, layer, values = loaded(local)
    before = {n: (p.data_ptr(), p.shape, p.dtype) for n, p in layer.named_parameters() if "scale" not in n}
    method.process_weights_after_loading(layer)
    assert {n: (p.data_ptr(), p.shape, p.dtype) for n, p in layer.named_parameters() if "scale" not in n} == before
    assert layer._dsv4_mxfp4_backend == BACKEND
    method.process_weights_after_loading(layer)  # weights that are rearranged already stay
    x, weights = torch.randn(tokens, HIDDEN, dtype=torch.bfloat16), torch.rand(tokens, TOP_K)
    ids = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(tokens)]).to(torch.int32)
    ids = torch.where(ids < local, ids, -1)
    ids[-1, :2] = torch.tensor([1, 3])
    found = method.apply(layer, dispatched(x, weights, ids))
    assert isinstance(found, StandardCombineInput)
    exact, plain = (experts(x, *values, weights, ids, LIMIT, dtype) for dtype in (torch.float64, torch.bfloat16))
    assert relative_error(found.hidden_states, exact) <= 2 * relative_error(plain, exact)


@pytest.mark.parametrize("options", [{"gemm1_alpha": 1.702}, {"activation": "relu2"}, {"no_combine": True}])
def test_what_the_kernels_do_not_do_stays_marlins(options: dict[str, object]) -> None:
    """SGLang's own code runs: it asks its Marlin checks, which need a GPU's library."""
    method, layer, _ = loaded(**options)
    before = {name: parameter.clone() for name, parameter in layer.named_parameters()}
    with pytest.raises((ImportError, RuntimeError, AttributeError, NotImplementedError, AssertionError)):
        method.process_weights_after_loading(layer)
    assert layer._dsv4_mxfp4_backend is None
    for name, parameter in layer.named_parameters():
        if "scale" not in name:
            assert torch.equal(parameter.view(torch.uint8), before[name].view(torch.uint8))
