"""Routers, norms and hyper-connections of transformers' DeepSeek-V4: forward functions in place of the modules' own.

They read the modules' parameters, which stay where they are under their names. Roundings are those of the models' own
code: the gate's logits, the coefficients of hyper-connections and the weights of norms are float32, each result is
rounded once. transformers has bfloat16 logits, and casts coefficients, and in some releases the norm, before the last
product.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from types import MethodType
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from dsv4_kernels.errors import InvalidArgumentError
from dsv4_kernels.mhc import (
    hyper_connection_head,
    hyper_connection_post,
    hyper_connection_post_pre,
    hyper_connection_pre,
)
from dsv4_kernels.router import activation_topk, hash_router_scored
from dsv4_kernels.router.prefill import gate_logits

_EPSILON = 1e-20  # in the sum of a token's scores, as transformers has it
_SCORE_FUNCTIONS = {"sqrtsoftplus": "sqrt_softplus", "sigmoid": "sigmoid", "softmax": "softmax"}
_STREAMS = 4


def swap_forward(module: Any, forward: Callable[..., Any], **constants: Any) -> None:
    """Replaces a module's forward function on this instance. constants: what it finds in `self.dsv4`.

    A bound method: a copy of the model calls the copy's modules.
    """
    module.dsv4 = constants
    module.forward = MethodType(forward, module)


def check(config: Any, parts: Collection[str]) -> None:
    """Raises InvalidArgumentError if there are no kernels for what the model has in these parts."""
    if "compressors" in parts:
        for name, width in (("head_dim", 512), ("index_head_dim", 128), ("qk_rope_head_dim", 64)):
            if getattr(config, name) != width:
                _refuse(name, str(width), getattr(config, name))
        for kind, ratio in (("compressed_sparse_attention", 4), ("heavily_compressed_attention", 128)):
            if kind in config.layer_types and config.compress_rates[kind] != ratio:
                _refuse(f"compress_rates[{kind!r}]", str(ratio), config.compress_rates[kind])
    if "hyper_connections" in parts and config.hc_mult != _STREAMS:
        _refuse("hc_mult", str(_STREAMS), config.hc_mult)
    if "routers" in parts:
        hashed = "hash_moe" in config.mlp_layer_types
        known = ("sqrtsoftplus",) if hashed else tuple(_SCORE_FUNCTIONS)
        if config.scoring_func not in known:
            _refuse("scoring_func", " or ".join(known) + (" in hash layers" if hashed else ""), config.scoring_func)


def swap_router(router: Any, config: Any, *, hashed: bool) -> None:
    """Replaces forward of DeepseekV4HashRouter or DeepseekV4TopKRouter."""
    if hashed:
        settle(router, "tid2eid", dtype=None)
        swap_forward(router, _hash_router)
    else:
        settle(router, "e_score_correction_bias")
        swap_forward(router, _dense_router, score_function=_SCORE_FUNCTIONS[config.scoring_func])


def _dense_router(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = gate_logits(hidden_states.reshape(-1, self.hidden_dim), self.weight)
    weights, ids = activation_topk(
        logits,
        self.e_score_correction_bias,
        self.top_k,
        scale=self.routed_scaling_factor,
        epsilon=_EPSILON,
        int64_ids=True,
        **self.dsv4,
    )
    return logits, weights, ids


def _hash_router(self: Any, hidden_states: Tensor, input_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = gate_logits(hidden_states.reshape(-1, self.hidden_dim), self.weight)
    token_ids = input_ids.reshape(-1).contiguous()
    weights, ids = hash_router_scored(
        token_ids, self.tid2eid, logits, scale=self.routed_scaling_factor, epsilon=_EPSILON
    )
    return logits, weights, ids.to(torch.int64)


def swap_hyper_connections(layer: Any, config: Any) -> None:
    """Replaces forward of DeepseekV4DecoderLayer: three launches around attention and experts."""
    for connection in (layer.attn_hc, layer.ffn_hc):
        settle(connection, "fn", "base", "scale")
    for norm in (layer.input_layernorm, layer.post_attention_layernorm):
        settle(norm, "weight")
    swap_forward(
        layer,
        _decoder_layer,
        epsilon=config.rms_norm_eps,
        hc_epsilon=config.hc_eps,
        sinkhorn_iterations=config.hc_sinkhorn_iters,
    )


def _decoder_layer(self: Any, hidden_states: Tensor, input_ids: Tensor | None = None, **kwargs: Any) -> Tensor:
    shape = hidden_states.shape
    streams, connection = hidden_states.flatten(0, 1), self.attn_hc
    layer_input, _, post, comb = hyper_connection_pre(
        streams,
        connection.fn,
        connection.base,
        connection.scale,
        norm_weight=self.input_layernorm.weight,
        **self.dsv4,
    )
    attended, _ = self.self_attn(layer_input.unflatten(0, shape[:2]), **kwargs)
    connection = self.ffn_hc
    streams, layer_input, _, post, comb = hyper_connection_post_pre(
        attended.flatten(0, 1),
        streams,
        post,
        comb,
        connection.fn,
        connection.base,
        connection.scale,
        norm_weight=self.post_attention_layernorm.weight,
        **self.dsv4,
    )
    output: Tensor = self.mlp(layer_input.unflatten(0, shape[:2]), input_ids=input_ids)
    return hyper_connection_post(output.flatten(0, 1), streams, post, comb).view(shape)


def swap_head(head: Any, norm: Any, config: Any) -> None:
    """Replaces forward of DeepseekV4HyperHead by its own and the norm's behind it, whose forward then does nothing."""
    settle(head, "hc_fn", "hc_base", "hc_scale")
    settle(norm, "weight")
    swap_forward(head, _head, norm=norm, epsilon=config.rms_norm_eps, hc_epsilon=config.hc_eps)
    swap_forward(norm, _passed_on)


def _head(self: Any, x: Tensor) -> Tensor:
    given = self.dsv4
    hidden = hyper_connection_head(
        x.flatten(0, 1),
        self.hc_fn,
        self.hc_base,
        self.hc_scale,
        norm_weight=given["norm"].weight,
        epsilon=given["epsilon"],
        hc_epsilon=given["hc_epsilon"],
    )
    unflattened: Tensor = hidden.unflatten(0, x.shape[:2])
    return unflattened


def _passed_on(self: Any, hidden_states: Tensor) -> Tensor:
    return hidden_states


def swap_norms(attention: Any) -> None:
    """Replaces forward of attention's norms: float32 and one rounding, where transformers has two or more, or none.

    The models' own code is alike for the norms with weights; theirs of each head rounds every step to bfloat16, which
    no engine does.
    """
    for module in attention.modules():
        if hasattr(module, "variance_epsilon"):  # DeepseekV4RMSNorm, of the compressors too
            swap_forward(module, _norm, epsilon=module.variance_epsilon)
    swap_forward(attention.q_b_norm, _norm, epsilon=attention.q_b_norm.eps)


def _norm(self: Any, hidden_states: Tensor) -> Tensor:
    weight = self._parameters.get("weight")
    weight = None if weight is None else weight.to(torch.float32)
    values = hidden_states.to(torch.float32)
    return rms_norm(values, values.shape[-1:], weight, self.dsv4["epsilon"]).to(hidden_states.dtype)


def settle(module: Any, *names: str, dtype: torch.dtype | None = torch.float32) -> None:
    """Makes tensors of a module what kernels read: of this dtype, on 16 bytes.

    The models have them in float32; a cast of the whole model has rounded them, and they stay as rounded. Those that
    safetensors has mapped from a file lie where the file has them.
    """
    for name in names:
        tensor = getattr(module, name)
        values = tensor.data if dtype is None else tensor.data.to(dtype)
        tensor.data = values.clone() if values.data_ptr() % 16 else values


def _refuse(name: str, need: str, got: object) -> NoReturn:
    raise InvalidArgumentError(f"swap_in: config.{name}: expected {need}, got {got!r}")
