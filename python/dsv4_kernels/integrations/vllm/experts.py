"""The experts class of vLLM's modular kernel: what is between its dispatch and its combine."""

from __future__ import annotations

from typing import Any

import torch
import vllm.envs as envs
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from torch import Tensor
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP
from vllm.model_executor.layers.quantization.utils.quant_utils import kMxfp4Static
from vllm.model_executor.utils import replace_parameter
from vllm.platforms import current_platform

from dsv4_kernels.images import read_images
from dsv4_kernels.integrations.experts import (
    BATCH_INVARIANT_TILE,
    prepare_in_place,
    product_rows,
    product_weights,
    run_experts,
    tile_size,
)


class Dsv4Experts(mk.FusedMoEExpertsModular):  # type: ignore[misc]
    """MXFP4 experts with bfloat16 activations: SwiGLU with the model's clamp, weighted and summed in float32.

    Weights stay in vLLM's parameters. w13_weight and w2_weight keep memory, shape and dtype; their bytes are rearranged
    once, when they are loaded. The scales become two bytes each. Where that is not possible (widths that are no
    multiple of 128, scales above 2^9) the products read the checkpoints' layout. What is computed in lies in vLLM's
    workspace. Experts elsewhere and EPLB's physical experts come by expert_map.
    """

    @staticmethod
    def activation_format() -> mk.FusedMoEActivationFormat:
        """Rows by token."""
        return mk.FusedMoEActivationFormat.Standard

    @property
    def expects_unquantized_inputs(self) -> bool:
        """Activations are bfloat16."""
        return True

    @staticmethod
    def _supports_current_device() -> bool:
        capability = current_platform.get_device_capability() if current_platform.is_cuda() else None
        return capability is not None and f"sm_{capability.major}{capability.minor}" in _architectures()

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return False

    @staticmethod
    def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
        return bool(weight_key == kMxfp4Static and activation_key is None)

    @staticmethod
    def _supports_activation(activation: MoEActivation) -> bool:
        return bool(activation == MoEActivation.SILU)

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: Any) -> bool:
        return True

    @staticmethod
    def _supports_shape(hidden_dim: int) -> bool:
        return hidden_dim % 64 == 0

    @staticmethod
    def _supports_batch_invariance() -> bool:
        return True

    @staticmethod
    def is_supported_config(
        cls: Any, moe_config: Any, weight_key: Any, activation_key: Any, activation_format: Any
    ) -> tuple[bool, str | None]:
        """Whether a layer can run here, and if not why."""
        supported, reason = mk.FusedMoEExperts.is_supported_config(
            cls, moe_config, weight_key, activation_key, activation_format
        )
        if not supported:
            return supported, reason
        width = moe_config.intermediate_size_per_partition
        for need, fine in (
            (f"an intermediate size per rank that is no multiple of 32 ({width})", width % 32 == 0),
            ("biases of the experts", not moe_config.has_bias),
            (f"activations of {moe_config.in_dtype}", moe_config.in_dtype == torch.bfloat16),
            ("a SwiGLU with alpha or beta", moe_config.swiglu_alpha is None and moe_config.swiglu_beta is None),
        ):
            if not fine:
                return False, f"kernel does not support {need}"
        return True, None

    def finalize_weight_and_reduce_impl(self) -> mk.TopKWeightAndReduce:
        """Weights are multiplied and experts summed here."""
        return TopKWeightAndReduceNoOP()

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Rearranges the layer's weights for the products; weights that are so already stay."""
        for product, description in (("w13", self.quant_config._w1), ("w2", self.quant_config._w2)):
            weight, scale = getattr(layer, f"{product}_weight"), getattr(layer, f"{product}_weight_scale")
            if scale.dtype != torch.int32:
                scales = prepare_in_place(weight.data, scale.data, gate_and_up=product == "w13")
                if scales is not None:
                    replace_parameter(layer, f"{product}_weight_scale", scales)
            description.scale = getattr(layer, f"{product}_weight_scale")

    def workspace_shapes(
        self,
        M: int,  # noqa: N803
        N: int,  # noqa: N803
        K: int,  # noqa: N803
        topk: int,
        global_num_experts: int,
        local_num_experts: int,
        expert_tokens_meta: mk.ExpertTokensMetadata | None,
        activation: MoEActivation,
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Rows between the products, rows behind them, output. The output may lie where the first ones did."""
        rows = product_rows(M * topk, local_num_experts, self._tile(M * topk, global_num_experts))
        return (rows, N // 2), (rows, K), (M, K)

    def apply(
        self,
        output: Tensor,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        activation: MoEActivation,
        global_num_experts: int,
        expert_map: Tensor | None,
        a1q_scale: Tensor | None,
        a2_scale: Tensor | None,
        workspace13: Tensor,
        workspace2: Tensor,
        expert_tokens_meta: mk.ExpertTokensMetadata | None,
        apply_router_weight_on_input: bool,
    ) -> None:
        """Writes each token's weighted sum over the experts here."""
        if self._uses_post_gemm2_hook(hidden_states.shape[0]):
            raise NotImplementedError(
                "dsv4_kernels: vllm: expected no post_gemm2_hook, got one; choose another back end by --moe-backend"
            )
        run_experts(
            hidden_states,
            product_weights(w1, self.w1_scale),
            product_weights(w2, self.w2_scale),
            None if apply_router_weight_on_input else topk_weights,
            topk_ids,
            tile=self._tile(topk_ids.numel(), global_num_experts),
            expert_map=expert_map,
            limit=float(self.activation_config.clamp_limit or 0.0),
            out=output,
            out_inner=workspace13,
            out_rows=workspace2,
        )

    @staticmethod
    def _tile(slots: int, total_experts: int) -> int:
        return BATCH_INVARIANT_TILE if envs.VLLM_BATCH_INVARIANT else tile_size(slots, total_experts)


def _architectures() -> set[str]:
    """Those that there are kernels for, without the suffix of their feature set."""
    return {image["architecture"].rstrip("af") for image in read_images() if image["family"] == "moe"}
