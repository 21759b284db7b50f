"""Routing of DeepSeek-V4 in SGLang: moe_fused_gate for scores of sqrt(softplus), and hash_topk.

Other score functions, groups, shared experts that the gate appends, packed ids and DeepSeek-V4.1's order of NaN stay
SGLang's; shared experts behind a hash table are appended here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv4_kernels.integrations.seams import Engine, Seam
from dsv4_kernels.integrations.sglang.hooks import add_hooks
from dsv4_kernels.router.functions import activation_topk, hash_router_scored

_GATE = "sglang.kernels.ops.moe.moe_fused_gate"
_HASH = "sglang.kernels.ops.moe.dsv4"
SEAMS = (
    Seam(_GATE, "moe_fused_gate", "2f70a5937a7fe57a"),
    Seam(_HASH, "hash_topk", "437ad3ae63735550"),
)


def register(engine: Engine) -> None:
    """Adds the hooks. Raises EngineVersionError for an SGLang that this was not written for."""
    add_hooks(engine, SEAMS, {f"{_GATE}.moe_fused_gate": _moe_fused_gate, f"{_HASH}.hash_topk": _hash_topk})


def _moe_fused_gate(
    original: Any,
    scores: Tensor,
    bias: Tensor | None,
    topk: int,
    scoring_func: str = "sigmoid",
    num_fused_shared_experts: int = 0,
    renormalize: bool = True,
    routed_scaling_factor: float | None = 1.0,
    apply_routed_scaling_factor_on_output: bool = False,
    moe_softcapping: float = 0.0,
    num_expert_group: int = 1,
    topk_group: int = 1,
    *,
    bias_alt: Tensor | None = None,
    input_ids: Tensor | None = None,
    bias_alt_token_id: int | None = None,
    num_token_non_padded: Tensor | None = None,
    renormalize_epsilon: float = 0.0,
    packed_out: Tensor | None = None,
    sqrtsoftplus_log1p: bool = False,
) -> tuple[Tensor, Tensor]:
    if (
        scoring_func.lower() != "sqrtsoftplus"
        or bias is None
        or num_fused_shared_experts
        or moe_softcapping
        or num_expert_group > 1
        or packed_out is not None
        or sqrtsoftplus_log1p
        or scores.dtype not in (torch.float32, torch.bfloat16)
    ):
        found: tuple[Tensor, Tensor] = original(
            scores,
            bias,
            topk,
            scoring_func,
            num_fused_shared_experts,
            renormalize,
            routed_scaling_factor,
            apply_routed_scaling_factor_on_output,
            moe_softcapping,
            num_expert_group,
            topk_group,
            bias_alt=bias_alt,
            input_ids=input_ids,
            bias_alt_token_id=bias_alt_token_id,
            num_token_non_padded=num_token_non_padded,
            renormalize_epsilon=renormalize_epsilon,
            packed_out=packed_out,
            sqrtsoftplus_log1p=sqrtsoftplus_log1p,
        )
        return found
    options: dict[str, Any] = {"renormalize": renormalize, "epsilon": float(renormalize_epsilon)}
    if apply_routed_scaling_factor_on_output:
        options["scale"] = float(1.0 if routed_scaling_factor is None else routed_scaling_factor)
    if num_token_non_padded is not None:
        rows = torch.arange(scores.shape[0], device=scores.device, dtype=torch.int32)
        options["padding_mask"] = rows >= num_token_non_padded
    if input_ids is not None and bias_alt is not None:
        options |= {"bias_alt": bias_alt.to(torch.float32), "bias_alt_mask": input_ids == bias_alt_token_id}
    return activation_topk(scores, bias.to(torch.float32), topk, **options)


def _hash_topk(
    original: Any,
    router_logits: Tensor,
    input_ids: Tensor,
    tid2eid: Tensor,
    num_fused_shared_experts: int = 0,
    routed_scaling_factor: float = 1.0,
    scoring_func: str = "sqrtsoftplus",
) -> tuple[Tensor, Tensor]:
    if scoring_func != "sqrtsoftplus" or router_logits.dtype not in (torch.float32, torch.bfloat16):
        found: tuple[Tensor, Tensor] = original(
            router_logits, input_ids, tid2eid, num_fused_shared_experts, routed_scaling_factor, scoring_func
        )
        return found
    weights, ids = hash_router_scored(input_ids.contiguous(), tid2eid, router_logits)
    if not num_fused_shared_experts:
        return weights, ids
    tokens, experts = router_logits.shape
    shape = (tokens, num_fused_shared_experts)
    shared = torch.arange(experts, experts + shape[1], dtype=ids.dtype, device=ids.device).expand(shape)
    share = torch.full(shape, 1.0 / routed_scaling_factor, dtype=weights.dtype, device=weights.device)
    return torch.cat([weights, share], dim=1), torch.cat([ids, shared], dim=1)
