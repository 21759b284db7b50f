"""Hyper-connections of DeepSeek-V4 in SGLang: the functions of sglang.kernels.ops.layernorm.mhc and mhc_head by name.

A call that the ops do not take (other than four streams, epsilons of two values) goes to SGLang's own function.
Nothing is compiled for them, so SGLang's prewarm of mhc_pre has nothing to do. DeepSeek-V4.1's functions stay SGLang's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dsv4_kernels.integrations import hyper_connections
from dsv4_kernels.integrations.seams import Engine, Seam
from dsv4_kernels.integrations.sglang.hooks import add_hooks

_FUNCTIONS = "sglang.kernels.ops.layernorm.mhc"
_HEAD = "sglang.kernels.ops.layernorm.mhc_head"
SEAMS = (
    Seam(_FUNCTIONS, "mhc_pre", "8ef3187eb1bba0ae"),
    Seam(_FUNCTIONS, "mhc_post", "1fbe7dfb629b4ceb"),
    Seam(_FUNCTIONS, "mhc_fused_post_pre", "8f16a2ae75c579be"),
    Seam(_FUNCTIONS, "prewarm_mhc_pre", "a004649b62b9f231"),
    Seam(_HEAD, "fused_hc_head", "a5842f5443a2596a"),
)


def register(engine: Engine) -> None:
    """Adds the hooks. Raises EngineVersionError for an SGLang that this was not written for."""
    hooks: dict[str, Callable[..., Any]] = {
        f"{_FUNCTIONS}.mhc_pre": _pre,
        f"{_FUNCTIONS}.mhc_post": _post,
        f"{_FUNCTIONS}.mhc_fused_post_pre": _post_pre,
        f"{_FUNCTIONS}.prewarm_mhc_pre": _prewarm,
        f"{_HEAD}.fused_hc_head": _head,
    }
    add_hooks(engine, SEAMS, hooks)


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
    n_splits_pre: int = 32,
    *,
    norm_weight: Tensor | None = None,
    norm_eps: float | None = None,
) -> Any:
    args = residual, fn, hc_scale, hc_base, rms_eps, hc_pre_eps
    rest = hc_post_mult_value, sinkhorn_repeat
    if not hyper_connections.supported(
        residual, fn, rms_eps, hc_pre_eps, hc_sinkhorn_eps, sinkhorn_repeat, norm_weight, norm_eps
    ):
        options = {"norm_weight": norm_weight, "norm_eps": norm_eps}
        return original(*args, hc_sinkhorn_eps, *rest, n_splits, n_splits_pre, **options)
    return hyper_connections.pre(*args, *rest, norm_weight)


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
    *,
    norm_weight: Tensor | None = None,
    norm_eps: float | None = None,
) -> Any:
    args = x, residual, post_layer_mix, comb_res_mix, fn, hc_scale, hc_base, rms_eps, hc_pre_eps
    rest = hc_post_mult_value, sinkhorn_repeat
    if not hyper_connections.supported(
        residual, fn, rms_eps, hc_pre_eps, hc_sinkhorn_eps, sinkhorn_repeat, norm_weight, norm_eps
    ):
        options = {"norm_weight": norm_weight, "norm_eps": norm_eps}
        return original(*args, hc_sinkhorn_eps, *rest, n_splits, tile_n, **options)
    return hyper_connections.post_pre(*args, *rest, norm_weight)


def _prewarm(original: Any, residual: Tensor, fn: Tensor, *args: Any, **kwargs: Any) -> None:
    if not hyper_connections.supported_streams(residual):
        original(residual, fn, *args, **kwargs)


def _head(
    original: Any, x: Tensor, hc_fn: Tensor, hc_scale: Tensor, hc_base: Tensor, norm_eps: float, hc_eps: float
) -> Any:
    if x.dtype != torch.bfloat16 or not hyper_connections.supported_streams(x) or hc_eps <= 0:
        return original(x, hc_fn, hc_scale, hc_base, norm_eps, hc_eps)
    return hyper_connections.head(x, hc_fn, hc_scale.view(1), hc_base, norm_eps, hc_eps)
