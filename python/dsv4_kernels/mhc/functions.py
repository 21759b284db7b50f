"""The functions of hyper-connections (mHC), the residual connection of DeepSeek-V4, DeepSeek-V4.1 and GLM-5.3-Flash.

A token has four streams R[j] of `hidden` columns. Around each sublayer, with the streams of a token as one row x:

    m    = (x . fn^T) * rsqrt(mean(x^2) + epsilon)                  [24] float32
    pre  = sigmoid(m[0:4] * scale[0] + base[0:4]) + hc_epsilon      [4]
    post = post_factor * sigmoid(m[4:8] * scale[1] + base[4:8])     [4]
    C    = softmax of each row of (m[8:24] * scale[2] + base[8:24]) as [4, 4], + hc_epsilon
    C    = C / (column sums + hc_epsilon)
    sinkhorn_iterations - 1 times: C = C / (row sums + hc_epsilon);  C = C / (column sums + hc_epsilon)
    u    = bfloat16(sum over j of pre[j] * R[j])
    n    = bfloat16(norm_weight * (u * rsqrt(mean(u^2) + epsilon)))
    R'[k] = bfloat16(post[k] * y + sum over j of C[j, k] * R[j])    y = sublayer(n)

The first index of C, `comb` in what follows, is the old stream. Source: class Block of the models' published inference
code. Defaults are DeepSeek-V4's; presets.py of this package has the models' epsilons.

Shared rules: outputs are allocated unless given; nothing is synchronised; arguments that an op cannot take raise
InvalidArgumentError. hidden is a multiple of 8, up to 8192; streams may be strided by token and by stream, every row
aligned to 16 bytes. A token gets the same bits in every batch, and NaN and infinity stay in their token. fn is
multiplied in full float32 precision, on tensor cores. Ops are for inference: no gradient flows through them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_kernels import _native
from dsv4_kernels.op import op, output
from dsv4_kernels.workspace import Workspace

__all__ = [
    "hyper_connection_coefficients",
    "hyper_connection_collapse",
    "hyper_connection_head",
    "hyper_connection_post",
    "hyper_connection_post_pre",
    "hyper_connection_pre",
    "hyper_connection_workspace_size",
    "mean_head",
]


def _hidden(streams: Tensor, out: Tensor | None) -> Tensor:
    """[tokens, hidden] bfloat16."""
    return output(out, streams, (streams.shape[0], streams.shape[2]), torch.bfloat16)


def _coefficients(
    streams: Tensor, out_pre: Tensor | None, out_post: Tensor | None, out_comb: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """pre, post and comb of each token."""
    tokens = streams.shape[0]
    return (
        output(out_pre, streams, (tokens, 4), torch.float32),
        output(out_post, streams, (tokens, 4), torch.float32),
        output(out_comb, streams, (tokens, 4, 4), torch.float32),
    )


def _workspace_size(streams: Tensor) -> int:
    return _native.hyper_connection_workspace_size(streams.shape[0], streams.shape[2])


def hyper_connection_workspace_size(tokens: int, hidden: int) -> int:
    """Bytes of workspace that hyper_connection_pre, _post_pre, _coefficients and _head need: at most 8 MiB."""
    return _native.hyper_connection_workspace_size(tokens, hidden)


@op(_native.hyper_connection_pre, workspace_size=_workspace_size)
def hyper_connection_pre(
    streams: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    *,
    pre_in: Tensor | None = None,
    norm_weight: Tensor | None = None,
    epsilon: float = 1e-6,
    hc_epsilon: float = 1e-6,
    post_factor: float = 2.0,
    sinkhorn_iterations: int = 20,
    norm_unrounded: bool = False,
    workspace: Workspace | Tensor | None = None,
    out_layer_input: Tensor | None = None,
    out_pre: Tensor | None = None,
    out_post: Tensor | None = None,
    out_comb: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ahead of a sublayer: its input, and the coefficients of the update behind it.

    Two launches; of more than 2048 tokens, two per 2048 tokens.

    Args:
        streams: [tokens, 4, hidden] bfloat16.
        fn: [24, 4 * hidden] float32; the checkpoints' `layers.N.hc_attn_fn` or `hc_ffn_fn`.
        base: [24] float32.
        scale: [3] float32.
        pre_in: [tokens, 4] float32 to collapse the streams with instead of their own pre: the delayed form of
            DeepSeek-V4.1, where that is the pre of the sublayer before, and (1, 0, 0, 0) ahead of the first.
        norm_weight: [hidden] float32 or bfloat16 of the sublayer's RMSNorm. None: no norm.
        epsilon: of both root mean squares: 1e-6 in V4, 1e-20 in V4.1, 1e-5 in GLM-5.3-Flash.
        hc_epsilon: in pre and in the Sinkhorn iterations; above 0.
        post_factor: of post.
        sinkhorn_iterations: 1 to 1000.
        norm_unrounded: take the norm's mean square from u before its rounding, as some engines do for V4.
        workspace: a Workspace, or a uint8 tensor of at least `hyper_connection_workspace_size(tokens, hidden)` bytes,
            aligned to 64, zeroed once. None: the library's own.
        out_layer_input: [tokens, hidden] bfloat16 to write to.
        out_pre: [tokens, 4] float32 to write to.
        out_post: [tokens, 4] float32 to write to.
        out_comb: [tokens, 4, 4] float32 to write to.

    Returns:
        layer input [tokens, hidden] bfloat16: n, or u without a norm; pre [tokens, 4], post [tokens, 4] and comb
        [tokens, 4, 4] float32.
    """
    return _hidden(streams, out_layer_input), *_coefficients(streams, out_pre, out_post, out_comb)


@op(_native.hyper_connection_post)
def hyper_connection_post(
    x: Tensor, streams: Tensor, post: Tensor, comb: Tensor, *, out_streams: Tensor | None = None
) -> Tensor:
    """Behind a sublayer: the new streams. One launch.

    Args:
        x: [tokens, hidden] bfloat16: what the sublayer returned; rows may be strided.
        streams: [tokens, 4, hidden] bfloat16: as they were ahead of the sublayer.
        post: [tokens, 4] float32.
        comb: [tokens, 4, 4] float32, the first index being the old stream.
        out_streams: [tokens, 4, hidden] bfloat16 to write to; may be streams itself.

    Returns:
        streams [tokens, 4, hidden] bfloat16.
    """
    return output(out_streams, x, streams.shape, torch.bfloat16)


@op(_native.hyper_connection_post_pre, workspace_size=_workspace_size)
def hyper_connection_post_pre(
    x: Tensor,
    streams: Tensor,
    post: Tensor,
    comb: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    *,
    pre_in: Tensor | None = None,
    norm_weight: Tensor | None = None,
    epsilon: float = 1e-6,
    hc_epsilon: float = 1e-6,
    post_factor: float = 2.0,
    sinkhorn_iterations: int = 20,
    norm_unrounded: bool = False,
    workspace: Workspace | Tensor | None = None,
    out_streams: Tensor | None = None,
    out_layer_input: Tensor | None = None,
    out_pre: Tensor | None = None,
    out_post: Tensor | None = None,
    out_comb: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Between two sublayers: hyper_connection_post with what the first returned, then hyper_connection_pre of the
    second, with the same bits: the streams are read once. Launches as for hyper_connection_pre.

    Args:
        x: [tokens, hidden] bfloat16: what the first sublayer returned; rows may be strided.
        streams: [tokens, 4, hidden] bfloat16: as they were ahead of it.
        post: [tokens, 4] float32: the first sublayer's.
        comb: [tokens, 4, 4] float32: the first sublayer's.
        fn: [24, 4 * hidden] float32: the second sublayer's, as all that follows; see hyper_connection_pre.
        base: [24] float32.
        scale: [3] float32.
        pre_in: [tokens, 4] float32 for the delayed form: the first sublayer's pre.
        norm_weight: [hidden] float32 or bfloat16. None: no norm.
        epsilon: of both root mean squares.
        hc_epsilon: in pre and in the Sinkhorn iterations; above 0.
        post_factor: of post.
        sinkhorn_iterations: 1 to 1000.
        norm_unrounded: take the norm's mean square from u before its rounding.
        workspace: a Workspace, or a uint8 tensor of at least `hyper_connection_workspace_size(tokens, hidden)` bytes,
            aligned to 64, zeroed once. None: the library's own.
        out_streams: [tokens, 4, hidden] bfloat16 to write to; may be streams itself.
        out_layer_input: [tokens, hidden] bfloat16 to write to.
        out_pre: [tokens, 4] float32 to write to.
        out_post: [tokens, 4] float32 to write to.
        out_comb: [tokens, 4, 4] float32 to write to.

    Returns:
        streams [tokens, 4, hidden] bfloat16, then what hyper_connection_pre returns.
    """
    return (
        output(out_streams, x, streams.shape, torch.bfloat16),
        _hidden(streams, out_layer_input),
        *_coefficients(streams, out_pre, out_post, out_comb),
    )


@op(_native.hyper_connection_coefficients, workspace_size=_workspace_size)
def hyper_connection_coefficients(
    streams: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    *,
    epsilon: float = 1e-6,
    hc_epsilon: float = 1e-6,
    post_factor: float = 2.0,
    sinkhorn_iterations: int = 20,
    workspace: Workspace | Tensor | None = None,
    out_pre: Tensor | None = None,
    out_post: Tensor | None = None,
    out_comb: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The coefficients alone. In the delayed form none of them is needed before the sublayer ends, so they may be
    computed beside it on a stream of their own.

    Args:
        streams: [tokens, 4, hidden] bfloat16.
        fn: [24, 4 * hidden] float32.
        base: [24] float32.
        scale: [3] float32.
        epsilon: of the streams' root mean square.
        hc_epsilon: in pre and in the Sinkhorn iterations; above 0.
        post_factor: of post.
        sinkhorn_iterations: 1 to 1000.
        workspace: a Workspace, or a uint8 tensor of at least `hyper_connection_workspace_size(tokens, hidden)` bytes,
            aligned to 64, zeroed once. None: the library's own.
        out_pre: [tokens, 4] float32 to write to.
        out_post: [tokens, 4] float32 to write to.
        out_comb: [tokens, 4, 4] float32 to write to.

    Returns:
        pre [tokens, 4], post [tokens, 4] and comb [tokens, 4, 4] float32.
    """
    return _coefficients(streams, out_pre, out_post, out_comb)


@op(_native.hyper_connection_collapse)
def hyper_connection_collapse(
    streams: Tensor,
    pre: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    epsilon: float = 1e-6,
    norm_unrounded: bool = False,
    out_hidden: Tensor | None = None,
) -> Tensor:
    """Collapse and norm with a pre that is known: ahead of a sublayer in the delayed form, and behind the last layer of
    DeepSeek-V4.1, where pre is that of its last sublayer. Without one, the mean: see mean_head.

    Args:
        streams: [tokens, 4, hidden] bfloat16.
        pre: [tokens, 4] float32. None: the mean of the streams.
        norm_weight: [hidden] float32 or bfloat16. None: no norm.
        epsilon: of the norm.
        norm_unrounded: take the norm's mean square from u before its rounding.
        out_hidden: [tokens, hidden] bfloat16 to write to.

    Returns:
        hidden [tokens, hidden] bfloat16.
    """
    return _hidden(streams, out_hidden)


@op(_native.hyper_connection_head, workspace_size=_workspace_size)
def hyper_connection_head(
    streams: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    *,
    norm_weight: Tensor | None = None,
    epsilon: float = 1e-6,
    hc_epsilon: float = 1e-6,
    norm_unrounded: bool = False,
    workspace: Workspace | Tensor | None = None,
    out_hidden: Tensor | None = None,
) -> Tensor:
    """Behind the last layer of DeepSeek-V4, and of its blocks of multi-token prediction: collapse and norm with

        pre = sigmoid((x . fn^T) * rsqrt(mean(x^2) + epsilon) * scale + base) + hc_epsilon

    Args:
        streams: [tokens, 4, hidden] bfloat16.
        fn: [4, 4 * hidden] float32; the checkpoints' `hc_head_fn`.
        base: [4] float32.
        scale: [1] float32.
        norm_weight: [hidden] float32 or bfloat16 of the model's last norm. None: no norm.
        epsilon: of both root mean squares.
        hc_epsilon: added to pre; above 0.
        norm_unrounded: take the norm's mean square from u before its rounding.
        workspace: a Workspace, or a uint8 tensor of at least `hyper_connection_workspace_size(tokens, hidden)` bytes,
            aligned to 64, zeroed once. None: the library's own.
        out_hidden: [tokens, hidden] bfloat16 to write to.

    Returns:
        hidden [tokens, hidden] bfloat16.
    """
    return _hidden(streams, out_hidden)


def mean_head(
    streams: Tensor, *, norm_weight: Tensor | None = None, epsilon: float = 1e-5, out_hidden: Tensor | None = None
) -> Tensor:
    """Behind the last layer of GLM-5.3-Flash: the float32 mean of the streams, rounded to bfloat16, then the norm.

    Args:
        streams: [tokens, 4, hidden] bfloat16.
        norm_weight: [hidden] float32 or bfloat16 of the model's last norm. None: no norm.
        epsilon: of the norm.
        out_hidden: [tokens, hidden] bfloat16 to write to.

    Returns:
        hidden [tokens, hidden] bfloat16.
    """
    return hyper_connection_collapse(streams, norm_weight=norm_weight, epsilon=epsilon, out_hidden=out_hidden)
