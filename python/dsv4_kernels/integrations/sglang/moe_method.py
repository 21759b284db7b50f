"""SGLang's MXFP4 experts for `--moe-runner-backend marlin`: Mxfp4MarlinMoEMethod by two of its methods.

SGLang's parameters, loaders and dispatch stay. Weights stay in SGLang's parameters: their bytes are rearranged once, in
place, when they are loaded; scales become two bytes each. A layer that the kernels do not take (an activation other
than SwiGLU, alpha or beta in it, experts that are not to be summed) runs by Marlin as ever.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from dsv4_kernels.integrations.experts import prepare_in_place, product_weights, run_experts, tile_size
from dsv4_kernels.integrations.seams import Engine, Seam
from dsv4_kernels.integrations.sglang.hooks import add_hooks

BACKEND = "dsv4_kernels"  # what SGLang's layers then name

_METHOD = "sglang.srt.layers.quantization.mxfp4_marlin_moe"
_CLASS = "Mxfp4MarlinMoEMethod"
SEAMS = (
    Seam(_METHOD, "Mxfp4MarlinMoEMethod", "d4af9d3629f9034c"),
    Seam(_METHOD, "build_marlin_moe_quant_info", "ed8f623b51c3a981"),
    Seam("sglang.srt.layers.moe.moe_runner.marlin", "fused_experts_none_to_marlin", "3a88708194afd4ee"),
    Seam("sglang.srt.layers.moe.moe_runner.base", "MoeRunnerConfig", "1f37bf83ddf5e0ec"),
    Seam("sglang.srt.layers.moe.token_dispatcher.standard", "StandardCombineInput", "0bdad3f582c5dfa3"),
)


def register(engine: Engine) -> None:
    """Adds the hooks. Raises EngineVersionError for an SGLang that this was not written for."""
    target = f"{_METHOD}.{_CLASS}"
    add_hooks(engine, SEAMS, {f"{target}.process_weights_after_loading": _prepare, f"{target}.apply": _apply})


def _supported(config: Any) -> bool:
    """Whether the kernels do what a MoeRunnerConfig says."""
    return (
        config.activation == "silu"
        and config.is_gated
        and config.gemm1_alpha is None
        and config.gemm1_beta is None
        and config.gemm1_clamp_limit is None
        and not config.no_combine
    )


def _prepare(original: Any, method: Any, layer: Any) -> None:
    """Instead of Marlin's repacking, this package's order."""
    if not _supported(method.runner.config):
        original(method, layer)
        return
    method._fp8.process_weights_after_loading(layer)
    if getattr(layer, "_mega_moe_weights_built", False):
        return
    for product in ("w13", "w2"):
        scale = getattr(layer, f"{product}_weight_scale_inv")
        if scale.dtype != torch.int32:
            scales = prepare_in_place(
                getattr(layer, f"{product}_weight").data, scale.data, gate_and_up=product == "w13"
            )
            if scales is not None:
                setattr(layer, f"{product}_weight_scale_inv", nn.Parameter(scales, requires_grad=False))
    layer._dsv4_mxfp4_backend = BACKEND


def _apply(original: Any, method: Any, layer: Any, dispatch_output: Any) -> Any:
    if getattr(layer, "_dsv4_mxfp4_backend", None) != BACKEND:
        return original(method, layer, dispatch_output)
    standard = importlib.import_module("sglang.srt.layers.moe.token_dispatcher.standard")
    hidden: Tensor = dispatch_output.hidden_states
    routes = dispatch_output.topk_output
    if hasattr(routes, "topk_weights"):
        weights, ids = routes.topk_weights, routes.topk_ids
    else:
        runner = importlib.import_module("sglang.srt.layers.moe.moe_runner.marlin")
        ids, weights = runner._fused_unpack_packed_topk(routes.packed_topk_ids)
    first = product_weights(layer.w13_weight, layer.w13_weight_scale_inv)
    second = product_weights(layer.w2_weight, layer.w2_weight_scale_inv)
    width = layer.w2_weight.shape[1]  # of the layer, or rounded up by SGLang
    x = hidden if hidden.shape[-1] == width else nn.functional.pad(hidden, (0, width - hidden.shape[-1]))
    # With expert parallelism SGLang's dispatcher has mapped the ids to the experts here, -1 for those elsewhere.
    config = method.runner.config
    out = run_experts(
        x.to(torch.bfloat16),
        first,
        second,
        None if config.apply_router_weight_on_input else weights.to(torch.float32),
        ids,
        tile=tile_size(ids.numel(), layer.dispatcher.num_experts),
        limit=float(config.swiglu_limit or 0.0),
    )
    return standard.StandardCombineInput(hidden_states=out[:, : hidden.shape[-1]].to(hidden.dtype))
