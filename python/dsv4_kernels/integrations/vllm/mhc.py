"""Hyper-connections of DeepSeek-V4 in vLLM: the functions of vllm.model_executor.kernels.mhc.tilelang by name.

A call that the ops do not take (other than four streams, epsilons of two values) goes to vLLM's own function. Those of
DeepSeek-V4.1 (mhc_pre_delayed_tilelang and its fused form) stay vLLM's. With all of V4's calls here, TileLang would
compile kernels in vLLM's warm-up that are never launched; that part of the warm-up is left out for V4.
"""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor

from dsv4_kernels.integrations import hyper_connections
from dsv4_kernels.integrations.seams import Engine, Seam, check_engine, wrap_everywhere

_FUNCTIONS = "vllm.model_executor.kernels.mhc.tilelang"
_KERNELS = "vllm.model_executor.kernels.mhc.tilelang_kernels"
_WARMUP = "vllm.model_executor.warmup.jit_warmup"
SEAMS = (
    Seam(_FUNCTIONS, "mhc_pre_tilelang", "31a52968f75ebd9d"),
    Seam(_FUNCTIONS, "mhc_pre_broadcast_tilelang", "4453cd9ccc96f1cc"),
    Seam(_FUNCTIONS, "mhc_post_tilelang", "8bca4c1a1bac7683"),
    Seam(_FUNCTIONS, "mhc_fused_post_pre_tilelang", "25e9a382fdfb72a6"),
    Seam(_FUNCTIONS, "hc_head_fused_kernel_tilelang", "37fe8d68682b2ca9"),
    Seam(_WARMUP, "VllmJitKernel.register_warmup", "fa88990c78d55eaa"),
)

_registered = False


def register(engine: Engine) -> None:
    """Replaces the functions. Raises EngineVersionError for a vLLM that this was not written for."""
    global _registered
    if _registered:
        return
    check_engine(engine, SEAMS)
    functions = importlib.import_module(_FUNCTIONS)
    for name, hook in (
        ("mhc_pre_tilelang", _pre),
        ("mhc_pre_broadcast_tilelang", _pre_broadcast),
        ("mhc_post_tilelang", _post),
        ("mhc_fused_post_pre_tilelang", _post_pre),
        ("hc_head_fused_kernel_tilelang", _head),
    ):
        wrap_everywhere(functions, name, hook)
    kernel = importlib.import_module(_WARMUP).VllmJitKernel
    original = kernel.register_warmup

    def register_warmup(self: Any, *args: Any, **kwargs: Any) -> None:
        if type(self).__module__ != _KERNELS or not _is_deepseek_v4():
            original(self, *args, **kwargs)

    kernel.register_warmup = register_warmup
    _registered = True


def _is_deepseek_v4() -> bool:
    """Whether the model that is being built calls the functions above and no others of theirs."""
    config = importlib.import_module("vllm.config").get_current_vllm_config()
    model = getattr(getattr(config, "model_config", None), "hf_config", None)
    return getattr(model, "model_type", None) == "deepseek_v4"


def _pre(
    original: Any,
    residual: Tensor,
    fn: Tensor,
    hc_scale: Tensor,
    hc_base: Tensor,
    rms_eps: float,
    hc_pre_eps: float,
    hc_sinkhorn_eps: float,
    hc_post_mult_value: float,
    sinkhorn_repeat: int,
    n_splits: int = 1,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
) -> Any:
    args = residual, fn, hc_scale, hc_base, rms_eps, hc_pre_eps
    rest = hc_post_mult_value, sinkhorn_repeat
    if not hyper_connections.supported(
        residual, fn, rms_eps, hc_pre_eps, hc_sinkhorn_eps, sinkhorn_repeat, norm_weight, norm_eps
    ):
        return original(*args, hc_sinkhorn_eps, *rest, n_splits, norm_weight, norm_eps)
    return hyper_connections.pre(*args, *rest, norm_weight)


def _pre_broadcast(
    original: Any,
    residual: Tensor,
    fn: Tensor,
    hc_scale: Tensor,
    hc_base: Tensor,
    rms_eps: float,
    hc_pre_eps: float,
    hc_sinkhorn_eps: float,
    hc_post_mult_value: float,
    sinkhorn_repeat: int,
    n_splits: int = 1,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    fn_broadcast: Tensor | None = None,
) -> Any:
    # Ahead of the first layer the four streams are equal.
    streams = residual.unsqueeze(1).expand(-1, 4, -1).contiguous()
    if not hyper_connections.supported(
        streams, fn, rms_eps, hc_pre_eps, hc_sinkhorn_eps, sinkhorn_repeat, norm_weight, norm_eps
    ):
        return original(
            residual, fn, hc_scale, hc_base, rms_eps, hc_pre_eps, hc_sinkhorn_eps, hc_post_mult_value,
            sinkhorn_repeat, n_splits, norm_weight, norm_eps, fn_broadcast,
        )  # fmt: skip
    return streams, *hyper_connections.pre(
        streams, fn, hc_scale, hc_base, rms_eps, hc_pre_eps, hc_post_mult_value, sinkhorn_repeat, norm_weight
    )


def _post(original: Any, x: Tensor, residual: Tensor, post_layer_mix: Tensor, comb_res_mix: Tensor) -> Any:
    if not hyper_connections.supported_streams(residual):
        return original(x, residual, post_layer_mix, comb_res_mix)
    return hyper_connections.post(x, residual, post_layer_mix, comb_res_mix)


def _post_pre(
    original: Any,
    x: Tensor,
    residual: Tensor,
    post_layer_mix: Tensor,
    comb_res_mix: Tensor,
    fn: Tensor,
    hc_scale: Tensor,
    hc_base: Tensor,
    rms_eps: float,
    hc_pre_eps: float,
    hc_sinkhorn_eps: float,
    hc_post_mult_value: float,
    sinkhorn_repeat: int,
    n_splits: int = 1,
    tile_n: int = 1,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
) -> Any:
    args = x, residual, post_layer_mix, comb_res_mix, fn, hc_scale, hc_base, rms_eps, hc_pre_eps
    rest = hc_post_mult_value, sinkhorn_repeat
    if not hyper_connections.supported(
        residual, fn, rms_eps, hc_pre_eps, hc_sinkhorn_eps, sinkhorn_repeat, norm_weight, norm_eps
    ):
        return original(*args, hc_sinkhorn_eps, *rest, n_splits, tile_n, norm_weight, norm_eps)
    return hyper_connections.post_pre(*args, *rest, norm_weight)


def _head(
    original: Any, hs_flat: Tensor, fn: Tensor, hc_scale: Tensor, hc_base: Tensor, rms_eps: float, hc_eps: float
) -> Any:
    if not hyper_connections.supported_streams(hs_flat) or hc_eps <= 0:
        return original(hs_flat, fn, hc_scale, hc_base, rms_eps, hc_eps)
    return hyper_connections.head(hs_flat, fn, hc_scale, hc_base, rms_eps, hc_eps)
