"""Routing of DeepSeek-V4 in vLLM: fused_topk_bias, for scores of sqrt(softplus).

Other score functions, and hash layers of vision checkpoints, in which image tokens choose by a bias, stay vLLM's.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from dsv4_kernels.integrations.seams import Engine, Seam, check_engine, wrap_everywhere
from dsv4_kernels.router.functions import activation_topk, hash_router_scored

_IMAGE_TOKENS = 5  # consecutive ids of image tokens, from image_sentinel_lo on

_ROUTER = "vllm.model_executor.layers.fused_moe.router.fused_topk_bias_router"
SEAMS = (
    Seam(_ROUTER, "fused_topk_bias", "0faee316c33cbaca"),
    Seam(_ROUTER, "_get_padding_mask", "67ee5ba42320c8cf"),
    Seam(_ROUTER, "FusedTopKBiasRouter._compute_routing", "4eb365db11f417f7"),
    Seam("vllm.model_executor.layers.fused_moe.router.dsv4_topk", "dsv4_topk", "caa36567fbfa8b4c"),
)

_registered = False


def register(engine: Engine) -> None:
    """Replaces fused_topk_bias. Raises EngineVersionError for a vLLM that this was not written for."""
    global _registered
    if _registered:
        return
    check_engine(engine, SEAMS)
    wrap_everywhere(importlib.import_module(_ROUTER), "fused_topk_bias", _fused_topk_bias)
    _registered = True


def _fused_topk_bias(
    original: Any,
    hidden_states: Tensor,
    gating_output: Tensor,
    scoring_func: str,
    e_score_correction_bias: Tensor | None,
    topk: int,
    renormalize: bool,
    indices_type: torch.dtype | None = None,
    input_tokens: Tensor | None = None,
    hash_indices_table: Tensor | None = None,
    routed_scaling_factor: float = 1.0,
    bias_vl: Tensor | None = None,
    image_sentinel_lo: int = 0,
) -> tuple[Tensor, Tensor]:
    vision = bias_vl is not None and image_sentinel_lo > 0
    hashed = hash_indices_table is not None
    if (
        scoring_func != "sqrtsoftplus"
        or (hashed and vision)
        or ((hashed or vision) and input_tokens is None)
        or gating_output.dtype not in (torch.float32, torch.bfloat16)
        or indices_type not in (None, torch.int32, torch.int64)
    ):
        found: tuple[Tensor, Tensor] = original(
            hidden_states, gating_output, scoring_func, e_score_correction_bias, topk, renormalize, indices_type,
            input_tokens, hash_indices_table, routed_scaling_factor, bias_vl, image_sentinel_lo,
        )  # fmt: skip
        return found
    padding = importlib.import_module(_ROUTER)._get_padding_mask(gating_output.shape[0])
    options: dict[str, Any] = {"renormalize": renormalize, "scale": routed_scaling_factor, "padding_mask": padding}
    if hash_indices_table is not None and input_tokens is not None:
        weights, ids = hash_router_scored(input_tokens.contiguous(), hash_indices_table, gating_output, **options)
        return weights, ids if indices_type is None else ids.to(indices_type)
    if vision and input_tokens is not None and bias_vl is not None:
        image = (input_tokens >= image_sentinel_lo) & (input_tokens < image_sentinel_lo + _IMAGE_TOKENS)
        if e_score_correction_bias is None:
            e_score_correction_bias = torch.zeros_like(bias_vl)
        options |= {"bias_alt": bias_vl, "bias_alt_mask": image}
    return activation_topk(
        gating_output, e_score_correction_bias, topk, int64_ids=indices_type == torch.int64, **options
    )
