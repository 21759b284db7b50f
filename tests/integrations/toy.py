"""A DeepSeek-V4 of transformers, small and random, whose expert weights MXFP4 holds exactly."""

from __future__ import annotations

import copy
from typing import Any

import torch
from dsv4_kernels.moe import dequantize_mxfp4, quantize_mxfp4
from torch import Tensor
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
    DeepseekV4Experts,
    DeepseekV4ForCausalLM,
    DeepseekV4HashRouter,
)

LAYER_TYPES = ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"]


def toy_config(**options: Any) -> DeepseekV4Config:
    """One layer of each kind; heads and entries are as wide as the models', all else is narrow."""
    sizes: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 128,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 3,
        "layer_types": LAYER_TYPES,
        "num_hash_layers": 1,
        "num_attention_heads": 2,
        "q_lora_rank": 64,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "o_groups": 2,
        "o_lora_rank": 32,
        "index_n_heads": 2,
        "index_topk": 512,
        "sliding_window": 16,
        "max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 16,
            "original_max_position_embeddings": 256,
            "beta_fast": 32,
            "beta_slow": 1,
        },
        "pad_token_id": 0,
        "eos_token_id": None,
        "attn_implementation": "eager",
    }
    return DeepseekV4Config(**(sizes | options))


@torch.no_grad()
def toy_model(seed: int = 0, **options: Any) -> DeepseekV4ForCausalLM:
    """In float32, every weight a bfloat16 number."""
    config = toy_config(**options)
    model = DeepseekV4ForCausalLM(config).eval()
    g = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.copy_(torch.randn(parameter.shape, generator=g) * parameter.shape[-1] ** -0.5)
        parameter.copy_(parameter.to(torch.bfloat16))
    for module in model.modules():
        if isinstance(module, DeepseekV4HashRouter):
            for row in module.tid2eid:
                row.copy_(torch.randperm(config.n_routed_experts, generator=g)[: row.numel()])
        if isinstance(module, DeepseekV4Experts):
            for weight in (module.gate_up_proj, module.down_proj):
                weight.copy_(as_mxfp4(weight))
    return model


def as_mxfp4(weight: Tensor) -> Tensor:
    """The nearest values that MXFP4 holds."""
    return dequantize_mxfp4(*quantize_mxfp4(weight.flatten(0, 1)), dtype=torch.float32).view(weight.shape)


def in_bfloat16(model: DeepseekV4ForCausalLM) -> DeepseekV4ForCausalLM:
    """A copy as from_pretrained(dtype=bfloat16) has it: what the models keep in float32 stays so."""
    model = copy.deepcopy(model)
    keep = model._keep_in_fp32_modules_strict
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not any(part in keep for part in name.split(".")) and "inv_freq" not in name:
            tensor.data = tensor.data.to(torch.bfloat16)
    return model


def tokens(batch: int, length: int, seed: int = 0, vocab: int = 96) -> Tensor:
    return torch.randint(1, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))
