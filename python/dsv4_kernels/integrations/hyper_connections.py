"""Hyper-connections behind the functions of vLLM and SGLang, which take the same arguments by the same names.

Both engines have four separate numbers for the two epsilons of the models: of the streams' root mean square and of the
sublayer's norm, of pre and of the Sinkhorn iterations. The ops have one for each pair, as in the models, all of which
have equal ones; supported() says whether a call is of that kind.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_kernels.mhc.functions import (
    hyper_connection_head,
    hyper_connection_post,
    hyper_connection_post_pre,
    hyper_connection_pre,
)

_STREAMS, _ROWS, _LARGEST_HIDDEN = 4, 24, 8192


def supported(
    streams: Tensor,
    fn: Tensor,
    rms_eps: float,
    hc_pre_eps: float,
    hc_sinkhorn_eps: float,
    sinkhorn_repeat: int,
    norm_weight: Tensor | None,
    norm_eps: float | None,
) -> bool:
    """Whether the ops take a call: four streams of a width that there are kernels for, and equal epsilons."""
    return (
        supported_streams(streams)
        and fn.shape == (_ROWS, _STREAMS * streams.shape[-1])
        and fn.is_contiguous()
        and hc_pre_eps == hc_sinkhorn_eps
        and hc_pre_eps > 0
        and 1 <= sinkhorn_repeat <= 1000
        and (norm_weight is None or norm_eps is None or norm_eps == rms_eps)
    )


def supported_streams(streams: Tensor) -> bool:
    """Whether there are kernels for streams of that shape and dtype."""
    width = streams.shape[-1]
    return (
        streams.dtype == torch.bfloat16
        and streams.shape[-2] == _STREAMS
        and width % 8 == 0
        and width <= _LARGEST_HIDDEN
        and streams.is_contiguous()
    )


def pre(
    residual: Tensor,
    fn: Tensor,
    hc_scale: Tensor,
    hc_base: Tensor,
    rms_eps: float,
    hc_pre_eps: float,
    hc_post_mult_value: float,
    sinkhorn_repeat: int,
    norm_weight: Tensor | None = None,
    *,
    norm_unrounded: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of residual [..., 4, H]: post [..., 4, 1], comb [..., 4, 4] and the sublayer's input [..., H]."""
    outer = residual.shape[:-2]
    layer_input, _, post, comb = hyper_connection_pre(
        _flat(residual),
        fn,
        hc_base,
        hc_scale,
        norm_weight=norm_weight,
        epsilon=rms_eps,
        hc_epsilon=hc_pre_eps,
        post_factor=hc_post_mult_value,
        sinkhorn_iterations=sinkhorn_repeat,
        norm_unrounded=norm_unrounded and norm_weight is not None,
    )
    return post.view(*outer, 4, 1), comb.view(*outer, 4, 4), layer_input.view(*outer, residual.shape[-1])


def post(x: Tensor, residual: Tensor, post_layer_mix: Tensor, comb_res_mix: Tensor) -> Tensor:
    """The streams behind a sublayer, [..., 4, H], of what it returned, x [..., H]."""
    width = residual.shape[-1]
    streams = hyper_connection_post(
        x.reshape(-1, width), _flat(residual), post_layer_mix.reshape(-1, 4), comb_res_mix.reshape(-1, 4, 4)
    )
    return streams.view(residual.shape)


def post_pre(
    x: Tensor,
    residual: Tensor,
    post_layer_mix: Tensor,
    comb_res_mix: Tensor,
    fn: Tensor,
    hc_scale: Tensor,
    hc_base: Tensor,
    rms_eps: float,
    hc_pre_eps: float,
    hc_post_mult_value: float,
    sinkhorn_repeat: int,
    norm_weight: Tensor | None = None,
    *,
    norm_unrounded: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """post() of one sublayer, then pre() of the next in the same launch: the streams, then what pre() returns."""
    outer, width = residual.shape[:-2], residual.shape[-1]
    streams, layer_input, _, next_post, next_comb = hyper_connection_post_pre(
        x.reshape(-1, width),
        _flat(residual),
        post_layer_mix.reshape(-1, 4),
        comb_res_mix.reshape(-1, 4, 4),
        fn,
        hc_base,
        hc_scale,
        norm_weight=norm_weight,
        epsilon=rms_eps,
        hc_epsilon=hc_pre_eps,
        post_factor=hc_post_mult_value,
        sinkhorn_iterations=sinkhorn_repeat,
        norm_unrounded=norm_unrounded and norm_weight is not None,
    )
    return (
        streams.view(residual.shape),
        next_post.view(*outer, 4, 1),
        next_comb.view(*outer, 4, 4),
        layer_input.view(*outer, width),
    )


def head(hidden_states: Tensor, fn: Tensor, hc_scale: Tensor, hc_base: Tensor, rms_eps: float, hc_eps: float) -> Tensor:
    """What is behind the last layer, without its norm: [..., H] of streams [..., 4, H]."""
    out = hyper_connection_head(_flat(hidden_states), fn, hc_base, hc_scale, epsilon=rms_eps, hc_epsilon=hc_eps)
    return out.view(*hidden_states.shape[:-2], hidden_states.shape[-1])


def _flat(streams: Tensor) -> Tensor:
    return streams.reshape(-1, *streams.shape[-2:])
