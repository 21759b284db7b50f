"""swap_in: the parts of a DeepSeek-V4 of transformers that this package has kernels for, all at once."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, TypeVar

from dsv4_kernels.checkpoint import Source
from dsv4_kernels.errors import InvalidArgumentError
from dsv4_kernels.integrations.transformers import compressors, engine, experts, layers

Model = TypeVar("Model")

PARTS = ("experts", "routers", "hyper_connections", "norms", "compressors")


def swap_in(
    model: Model,
    checkpoint: Source | None = None,
    *,
    parts: Collection[str] = PARTS,
    round_weights: bool = False,
    keep_weights: bool = False,
) -> Model:
    """Runs a DeepSeek-V4 of transformers, bfloat16 between its layers, on this package's kernels.

    Modules stay where they are, with their parameters and names; their forward functions are replaced, on this model
    alone. Nothing is launched through a compiler. For inference: call the model under torch.no_grad() or
    torch.inference_mode(), as generate() does. Called again, it takes over weights in the same memory: captured graphs
    see the new ones at their next replay.

    Args:
        model: DeepseekV4ForCausalLM, or a model that holds one.
        checkpoint: a .safetensors file, a folder, or the tensors by name, to take the experts' weights from, by the
            names that Nvfp4MoE.prepare_weights_from_checkpoint knows. None: the model's own.
        parts: which of PARTS to replace.
        round_weights: see register().
        keep_weights: see register().

    Returns:
        the model.

    Raises:
        InvalidArgumentError: no DeepSeek-V4, one whose sizes or functions there are no kernels for, or a release of
            transformers that is not known.
        CheckpointError: naming file and tensor.
    """
    for part in parts:
        if part not in PARTS:
            raise InvalidArgumentError(f"swap_in: parts: expected some of {', '.join(PARTS)}, got {part!r}")
    modeling = engine.modeling()
    modules: list[Any] = list(model.modules()) if hasattr(model, "modules") else []
    bodies = [module for module in modules if isinstance(module, modeling.DeepseekV4Model)]
    if not bodies:
        raise InvalidArgumentError(
            f"swap_in: model: expected a DeepSeek-V4 of transformers, got {type(model).__name__}"
        )
    for body in bodies:
        layers.check(body.config, parts)
    if "experts" in parts:
        experts.register(round_weights=round_weights, keep_weights=keep_weights)
    preparation = experts.Preparation(round_weights, keep_weights)
    for body in bodies:
        rope = compressors.RopeTable(body.rotary_emb.compress_inv_freq)
        for layer in body.layers:
            if "hyper_connections" in parts:
                layers.swap_hyper_connections(layer, body.config)
            if "norms" in parts:
                layers.swap_norms(layer.self_attn)
            if "compressors" in parts:
                compressors.swap_compressor(layer.self_attn, rope, modeling)
            if "routers" in parts:
                layers.swap_router(layer.mlp.gate, body.config, hashed=layer.mlp.is_hash)
            if "experts" in parts and (checkpoint is not None or experts.NAME not in layer.mlp.experts._modules):
                top_k = body.config.num_experts_per_tok
                experts.prepare(layer.mlp.experts, top_k, preparation, checkpoint, layer.layer_idx)
        if "hyper_connections" in parts:
            layers.swap_head(body.hc_head, body.norm, body.config)
        if "experts" in parts:
            body.set_experts_implementation(experts.NAME)
    return model
