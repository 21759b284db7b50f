"""transformers' experts on Nvfp4MoE: the experts implementation "dsv4_kernels"."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dsv4_kernels.checkpoint import Source
from dsv4_kernels.errors import InvalidArgumentError
from dsv4_kernels.moe import Nvfp4MoE, dequantize_mxfp4, quantize_mxfp4

NAME = "dsv4_kernels"  # of the implementation, and of the submodule that holds the prepared weights

_PARAMETERS = ("gate_up_proj", "down_proj", "gate_up_proj_scale_inv", "down_proj_scale_inv")

_FP4 = (torch.int8, torch.uint8, torch.float4_e2m1fn_x2)
_FP8 = (torch.float8_e4m3fn,)
_PLAIN = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Preparation:
    """What becomes of the model's weights; see register()."""

    round_weights: bool = False
    keep_weights: bool = False


def register(*, round_weights: bool = False, keep_weights: bool = False) -> None:
    """Adds the experts implementation "dsv4_kernels" to transformers, for bfloat16 and for FP8 / FP4 experts.

    Then `from_pretrained(..., experts_implementation="dsv4_kernels")` or
    `model.set_experts_implementation("dsv4_kernels")` uses it, for any model whose experts are SwiGLU. A layer's
    weights are prepared at its first call: packed FP4 is taken as it is; bfloat16 and FP8 weights that were converted
    from MXFP4, as DeepSeek-V4's are, become MXFP4 again without loss. May be called again, with other options.

    Args:
        round_weights: round weights that MXFP4 does not hold exactly. Otherwise they are refused.
        keep_weights: keep the model's own expert weights in memory beside the prepared ones. Otherwise they are freed,
            and the model's state dict, without them, is refused.
    """
    from transformers.integrations import finegrained_fp8, moe

    experts = _implementation(Preparation(round_weights, keep_weights))
    moe.ALL_EXPERTS_FUNCTIONS.register(NAME, experts)
    finegrained_fp8.ALL_FP8_EXPERTS_FUNCTIONS.register(NAME, experts)


def _implementation(preparation: Preparation) -> Callable[..., Tensor]:
    def experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if NAME not in self._modules:
            prepare(self, top_k_index.shape[1], preparation)
        prepared: Nvfp4MoE = self._modules[NAME]
        return prepared.run(hidden_states, top_k_weights.to(torch.float32), top_k_index)

    return experts


@torch.no_grad()
def prepare(
    experts: Any,
    top_k: int,
    preparation: Preparation,
    checkpoint: Source | None = None,
    layer: int | str = 0,
) -> None:
    """Puts a layer's experts into a submodule Nvfp4MoE, or its new weights into the one that is there.

    Args:
        experts: transformers' module, of bfloat16, FP8 or FP4 weights.
        top_k: experts per token.
        preparation: see register().
        checkpoint: where to take the weights from. None: from the module.
        layer: of the checkpoint.
    """
    made = experts._modules.get(NAME)
    if made is None:
        made = _empty(experts, top_k)
    if checkpoint is not None:
        made.prepare_weights_from_checkpoint(checkpoint, layer)
    else:
        made.prepare_weights_from_stacked(*_stacked(experts, preparation.round_weights))
    if NAME not in experts._modules:
        experts.add_module(NAME, made)
        experts.register_state_dict_post_hook(_leave_out_of_state_dict)
        experts.register_load_state_dict_post_hook(partial(_take_loaded, preparation))
    if not preparation.keep_weights:
        for name in _PARAMETERS:
            if name in experts._parameters:
                parameter = experts._parameters[name]
                parameter.data = parameter.data.new_empty(0)


def _empty(experts: Any, top_k: int) -> Nvfp4MoE:
    """The layer that stands for the module, without weights."""
    _require(experts.has_gate and getattr(experts, "is_concatenated", True), "gate and up as one matrix, gate first")
    _require(not getattr(experts, "is_transposed", False), "weights as [experts, out, in]")
    _require(not experts.has_bias, "no biases")
    _require(not getattr(experts, "has_post_expert_norm", False), "no norm behind each expert")
    limit = getattr(experts, "limit", None)
    _require(_is_swiglu(experts, limit), f"SwiGLU, clamped at {limit}")
    weight = experts.gate_up_proj
    count, rows = weight.shape[:2]
    total = getattr(experts.config, "num_local_experts", None) or getattr(experts.config, "num_experts", count)
    return Nvfp4MoE(
        count,
        experts.down_proj.shape[1],
        rows // 2,
        top_k=top_k,
        total_experts=max(total, count),
        swiglu_limit=limit,
        device=weight.device,
    )


def _require(holds: bool, need: str) -> None:
    if not holds:
        raise InvalidArgumentError(f"experts_implementation {NAME!r}: experts: expected {need}, got others")


def _is_swiglu(experts: Any, limit: float | None) -> bool:
    """Whether the module's gating, whatever it is called, is silu(min(gate, limit)) * clamp(up, -limit, limit)."""
    both = torch.linspace(-30, 30, 61, dtype=torch.float32, device="cpu")
    gate, up = (part.flatten() for part in torch.meshgrid(both, both, indexing="ij"))
    given = experts._apply_gate(torch.cat((gate, up)))
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return torch.allclose(given, torch.nn.functional.silu(gate) * up, rtol=1e-5, atol=1e-6)


def _stacked(experts: Any, round_weights: bool) -> tuple[Tensor, Tensor, None, Tensor, Tensor, None]:
    """The module's weights as prepare_weights_from_stacked takes them."""
    parts: list[Tensor | None] = []
    for name in ("gate_up_proj", "down_proj"):
        weight, scale = getattr(experts, name), getattr(experts, f"{name}_scale_inv", None)
        if not weight.numel():
            raise InvalidArgumentError(
                f"experts_implementation {NAME!r}: {name}: expected weights, got none; they were freed when they were "
                "prepared before: give a checkpoint, or keep_weights=True from the start"
            )
        if weight.dtype in _FP4:
            assert scale is not None
            parts += [weight, _power_of_two(name, scale), None]
        elif weight.dtype in (*_FP8, *_PLAIN):
            parts += [*_packed(name, weight, scale, round_weights), None]
        else:
            raise InvalidArgumentError(
                f"experts_implementation {NAME!r}: {name}: expected packed FP4 (int8), float8_e4m3fn or bfloat16, "
                f"got {str(weight.dtype).removeprefix('torch.')}"
            )
    return tuple(parts)  # type: ignore[return-value]


def _power_of_two(name: str, scale: Tensor) -> Tensor:
    """A scale as E8M0, in which FP4 checkpoints have it; transformers may hold it as float32."""
    if scale.element_size() == 1:
        return scale
    rounded = scale.to(torch.float8_e8m0fnu)
    if not torch.equal(rounded.to(torch.float32), scale.to(torch.float32)):
        raise InvalidArgumentError(
            f"experts_implementation {NAME!r}: {name}_scale_inv: expected powers of two, got others"
        )
    return rounded


def _packed(name: str, weight: Tensor, scale: Tensor | None, round_weights: bool) -> tuple[Tensor, Tensor]:
    """MXFP4 codes and scales of values, one expert after another."""
    codes, scales = [], []
    for expert in range(weight.shape[0]):
        values = weight[expert] if scale is None else _dequantized(weight[expert], scale[expert])
        made = quantize_mxfp4(values.contiguous())
        if not round_weights and not torch.equal(dequantize_mxfp4(*made, dtype=torch.float32), values.float()):
            raise InvalidArgumentError(
                f"experts_implementation {NAME!r}: {name}[{expert}]: expected values that MXFP4 holds exactly, got "
                "others; round_weights=True rounds them"
            )
        codes.append(made[0].view(torch.uint8))
        scales.append(made[1].view(torch.uint8))
    return torch.stack(codes), torch.stack(scales)


def _dequantized(weight: Tensor, scale: Tensor) -> Tensor:
    """float32 of FP8 values [rows, columns] with a scale per block."""
    blocks = [-(-size // parts) for size, parts in zip(weight.shape, scale.shape, strict=True)]
    factor = scale.to(torch.float32)
    for dim, block in enumerate(blocks):
        factor = factor.repeat_interleave(block, dim).narrow(dim, 0, weight.shape[dim])
    return weight.to(torch.float32) * factor


def _leave_out_of_state_dict(module: Any, state: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """A state dict is transformers' own, without what has been prepared from it."""
    if not module.gate_up_proj.numel():
        raise InvalidArgumentError(
            f"experts_implementation {NAME!r}: {prefix}gate_up_proj: expected weights to save, got none; they were "
            "freed when they were prepared: keep_weights=True keeps them"
        )
    for name in [name for name in state if name.startswith(f"{prefix}{NAME}.")]:
        del state[name]


def _take_loaded(preparation: Preparation, module: Any, incompatible_keys: Any) -> None:
    """Prepares weights that a state dict has just brought, in the memory of those before."""
    missing = incompatible_keys.missing_keys
    missing[:] = [name for name in missing if f".{NAME}." not in f".{name}"]
    prepare(module, module._modules[NAME].top_k, preparation)
