"""Hyper-connections in plain torch and float64: the CPU implementation. Each function writes to its last arguments."""

from __future__ import annotations

import torch
from torch import Tensor

STREAMS = 4


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float64)


def _scaled_products(streams: Tensor, fn: Tensor, epsilon: float) -> Tensor:
    """[tokens, rows of fn]: the products, each token's scaled by its streams' inverse root mean square."""
    x = _wide(streams).flatten(1)
    return (x @ _wide(fn).T) * torch.rsqrt(x.square().mean(1, keepdim=True) + epsilon)


def _sinkhorn(z: Tensor, iterations: int, epsilon: float) -> Tensor:
    """[tokens, 4, 4]: softmax over the last dimension, then columns and rows are divided by their sums in turn."""
    c = torch.softmax(z, 2) + epsilon
    c = c / (c.sum(1, keepdim=True) + epsilon)
    for _ in range(iterations - 1):
        c = c / (c.sum(2, keepdim=True) + epsilon)
        c = c / (c.sum(1, keepdim=True) + epsilon)
    return c


def _coefficients(
    streams: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    epsilon: float,
    hc_epsilon: float,
    post_factor: float,
    sinkhorn_iterations: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """pre, post and comb in float64."""
    products, base, scale = _scaled_products(streams, fn, epsilon), _wide(base), _wide(scale)
    pre = torch.sigmoid(products[:, :STREAMS] * scale[0] + base[:STREAMS]) + hc_epsilon
    post = post_factor * torch.sigmoid(products[:, STREAMS : 2 * STREAMS] * scale[1] + base[STREAMS : 2 * STREAMS])
    z = products[:, 2 * STREAMS :] * scale[2] + base[2 * STREAMS :]
    return pre, post, _sinkhorn(z.unflatten(1, (STREAMS, STREAMS)), sinkhorn_iterations, hc_epsilon)


def _collapse(
    streams: Tensor, pre: Tensor, norm_weight: Tensor | None, epsilon: float, norm_unrounded: bool, out: Tensor
) -> None:
    exact = (_wide(pre)[:, :, None] * _wide(streams)).sum(1)
    rounded = exact.to(torch.bfloat16).to(torch.float64)
    if norm_weight is None:
        out.copy_(rounded)
        return
    squares = exact if norm_unrounded else rounded
    out.copy_(_wide(norm_weight) * (rounded * torch.rsqrt(squares.square().mean(1, keepdim=True) + epsilon)))


def _update(x: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """The new streams in float64, rounded to bfloat16."""
    added = _wide(post)[:, :, None] * _wide(x)[:, None, :]
    return (added + torch.einsum("tjk,tjh->tkh", _wide(comb), _wide(streams))).to(torch.bfloat16)


def hyper_connection_pre(
    streams: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    pre_in: Tensor | None,
    norm_weight: Tensor | None,
    epsilon: float,
    hc_epsilon: float,
    post_factor: float,
    sinkhorn_iterations: int,
    norm_unrounded: bool,
    out_layer_input: Tensor,
    out_pre: Tensor,
    out_post: Tensor,
    out_comb: Tensor,
) -> None:
    pre, post, comb = _coefficients(streams, fn, base, scale, epsilon, hc_epsilon, post_factor, sinkhorn_iterations)
    _collapse(streams, pre if pre_in is None else pre_in, norm_weight, epsilon, norm_unrounded, out_layer_input)
    out_pre.copy_(pre)
    out_post.copy_(post)
    out_comb.copy_(comb)


def hyper_connection_post(x: Tensor, streams: Tensor, post: Tensor, comb: Tensor, out_streams: Tensor) -> None:
    out_streams.copy_(_update(x, streams, post, comb))


def hyper_connection_post_pre(
    x: Tensor,
    streams: Tensor,
    post: Tensor,
    comb: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    pre_in: Tensor | None,
    norm_weight: Tensor | None,
    epsilon: float,
    hc_epsilon: float,
    post_factor: float,
    sinkhorn_iterations: int,
    norm_unrounded: bool,
    out_streams: Tensor,
    out_layer_input: Tensor,
    out_pre: Tensor,
    out_post: Tensor,
    out_comb: Tensor,
) -> None:
    updated = _update(x, streams, post, comb)
    hyper_connection_pre(
        updated,
        fn,
        base,
        scale,
        pre_in,
        norm_weight,
        epsilon,
        hc_epsilon,
        post_factor,
        sinkhorn_iterations,
        norm_unrounded,
        out_layer_input,
        out_pre,
        out_post,
        out_comb,
    )
    out_streams.copy_(updated)


def hyper_connection_coefficients(
    streams: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    epsilon: float,
    hc_epsilon: float,
    post_factor: float,
    sinkhorn_iterations: int,
    out_pre: Tensor,
    out_post: Tensor,
    out_comb: Tensor,
) -> None:
    results = _coefficients(streams, fn, base, scale, epsilon, hc_epsilon, post_factor, sinkhorn_iterations)
    for out, result in zip((out_pre, out_post, out_comb), results, strict=True):
        out.copy_(result)


def hyper_connection_collapse(
    streams: Tensor,
    pre: Tensor | None,
    norm_weight: Tensor | None,
    epsilon: float,
    norm_unrounded: bool,
    out_hidden: Tensor,
) -> None:
    if pre is None:
        pre = torch.full(streams.shape[:2], 1 / STREAMS, dtype=torch.float64, device=streams.device)
    _collapse(streams, pre, norm_weight, epsilon, norm_unrounded, out_hidden)


def hyper_connection_head(
    streams: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    norm_weight: Tensor | None,
    epsilon: float,
    hc_epsilon: float,
    norm_unrounded: bool,
    out_hidden: Tensor,
) -> None:
    pre = torch.sigmoid(_scaled_products(streams, fn, epsilon) * _wide(scale) + _wide(base)) + hc_epsilon
    _collapse(streams, pre, norm_weight, epsilon, norm_unrounded, out_hidden)
