"""The router's public functions.

Shared rules: outputs are allocated unless given; nothing is synchronised; a token id outside [0, vocab) and a token
that padding_mask marks get ids -1 and weights 0, and nothing out of bounds is read. Arguments that an op cannot take
raise InvalidArgumentError. Logits that are NaN, infinite or far below 0 are weighed by one rule, and no weight is ever
NaN: see "Extreme logits" in docs/families/router.md. Ops are for inference: no gradient flows through them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_kernels import _native
from dsv4_kernels.op import op, output
from dsv4_kernels.workspace import Workspace

__all__ = [
    "activation_topk",
    "dense_router_decode",
    "dense_router_decode_workspace_size",
    "hash_router",
    "hash_router_fused",
    "hash_router_scored",
    "topk_select",
]

# dsv4_score_function of csrc/include/dsv4/router.h
_SCORE_FUNCTIONS = {"sqrt_softplus": 0, "sigmoid": 1, "softmax": 2}


def _routes(
    tokens: Tensor, k: int, out_weights: Tensor | None, out_ids: Tensor | None, int64_ids: bool
) -> tuple[Tensor, Tensor]:
    """Weights and ids [tokens, k] for the rows of a tensor."""
    shape, id_type = (tokens.shape[0], k), torch.int64 if int64_ids else torch.int32
    return output(out_weights, tokens, shape, torch.float32), output(out_ids, tokens, shape, id_type)


@op(_native.hash_router)
def hash_router(
    token_ids: Tensor,
    hash_lut: Tensor,
    *,
    padding_mask: Tensor | None = None,
    int64_ids: bool = False,
    out_weights: Tensor | None = None,
    out_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Experts of each token from a table, with uniform weights.

    What the system's description calls the hash router. The DeepSeek-V4 models weigh the experts by the gate's scores:
    see hash_router_scored.

    Args:
        token_ids: [tokens] int32 or int64; may be strided, as a column of a matrix is.
        hash_lut: [vocab, k] int32 or int64, k <= 32; the checkpoints' `layers.N.ffn.gate.tid2eid`.
        padding_mask: [tokens] bool, true for padding.
        int64_ids: return ids as int64. An out_ids that is given has either type.
        out_weights: [tokens, k] float32 to write to.
        out_ids: [tokens, k] int32 or int64 to write to.

    Returns:
        weights [tokens, k] float32, all 1/k; ids [tokens, k]. A table entry that is negative or does not fit in int32
        gives its slot id -1 and weight 0.
    """
    return _routes(token_ids, hash_lut.shape[1], out_weights, out_ids, int64_ids)


@op(_native.hash_router_scored)
def hash_router_scored(
    token_ids: Tensor,
    hash_lut: Tensor,
    logits: Tensor,
    *,
    padding_mask: Tensor | None = None,
    renormalize: bool = True,
    scale: float = 1.0,
    epsilon: float = 0.0,
    bias_alt: Tensor | None = None,
    bias_alt_mask: Tensor | None = None,
    int64_ids: bool = False,
    out_weights: Tensor | None = None,
    out_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Experts of each token from a table, weighed by the gate's scores, as DeepSeek-V4's hash layers do.

        s = sqrt(softplus(logits[token, id])),  weight = scale * s / (sum of the row's s + epsilon)

    Source: class Gate of the models' published inference code.

    Args:
        token_ids: [tokens] int32 or int64; may be strided, as a column of a matrix is.
        hash_lut: [vocab, k] int32 or int64, k <= 32.
        logits: [tokens, experts] float32 or bfloat16: hidden . gate.weight^T; rows may be strided.
        padding_mask: [tokens] bool, true for padding.
        renormalize: divide by the sum.
        scale: the model's routed scaling factor (1.5 in v4-flash, 2.5 in v4-pro).
        epsilon: added to the sum; the models use 0, some engines 1e-20.
        bias_alt: [experts] float32, at most 1024 experts: the bias of the tokens that bias_alt_mask marks, such as an
            image's, which the table does not know: their experts are the k largest of s + bias_alt in descending order,
            as activation_topk chooses.
        bias_alt_mask: [tokens] bool, given together with bias_alt.
        int64_ids: return ids as int64. An out_ids that is given has either type.
        out_weights: [tokens, k] float32 to write to.
        out_ids: [tokens, k] int32 or int64 to write to.

    Returns:
        weights [tokens, k] float32; ids [tokens, k]. A table entry outside [0, experts) gives its slot id -1 and
        weight 0 and takes no part in the sum.
    """
    return _routes(token_ids, hash_lut.shape[1], out_weights, out_ids, int64_ids)


@op(_native.hash_router_fused)
def hash_router_fused(
    token_ids: Tensor,
    hash_lut: Tensor,
    hidden: Tensor,
    weight: Tensor,
    *,
    padding_mask: Tensor | None = None,
    renormalize: bool = True,
    scale: float = 1.0,
    epsilon: float = 0.0,
    int64_ids: bool = False,
    out_weights: Tensor | None = None,
    out_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """hash_router_scored without the product that makes the logits: only the k logits that a token's weights need.

        s = sqrt(softplus(hidden[token] . weight[id])),  weight = scale * s / (sum of the row's s + epsilon)

    One launch. It reads k rows of the gate for each token, so it is for small batches: a product of all rows reads each
    once. Source: class Gate of the models' published inference code, which computes all logits and gathers k.

    Args:
        token_ids: [tokens] int32 or int64; may be strided, as a column of a matrix is.
        hash_lut: [vocab, k] int32 or int64, k <= 32; the checkpoints' `layers.N.ffn.gate.tid2eid`.
        hidden: [tokens, hidden_size] bfloat16, hidden_size a multiple of 8; rows may be strided, each aligned to 16
            bytes.
        weight: [experts, hidden_size] bfloat16; rows likewise. `layers.N.ffn.gate.weight`.
        padding_mask: [tokens] bool, true for padding.
        renormalize: divide by the sum.
        scale: the model's routed scaling factor (1.5 in v4-flash, 2.5 in v4-pro).
        epsilon: added to the sum; the models use 0, some engines 1e-20.
        int64_ids: return ids as int64. An out_ids that is given has either type.
        out_weights: [tokens, k] float32 to write to.
        out_ids: [tokens, k] int32 or int64 to write to.

    Returns:
        weights [tokens, k] float32; ids [tokens, k]. A token gets the same bits in every batch. A table entry
        outside [0, experts) gives its slot id -1 and weight 0 and takes no part in the sum.
    """
    return _routes(token_ids, hash_lut.shape[1], out_weights, out_ids, int64_ids)


def _decode_workspace_size(hidden: Tensor, weight: Tensor) -> int:
    return _native.dense_router_decode_workspace_size(hidden.shape[0], weight.shape[0])


@op(_native.dense_router_decode, workspace_size=_decode_workspace_size)
def dense_router_decode(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    *,
    renormalize: bool = True,
    scale: float = 1.0,
    epsilon: float = 0.0,
    bias_alt: Tensor | None = None,
    bias_alt_mask: Tensor | None = None,
    int64_ids: bool = False,
    workspace: Workspace | Tensor | None = None,
    out_weights: Tensor | None = None,
    out_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The gate of a small batch in one launch: GEMM, activation, selection.

        logits = hidden . weight^T in float32,  s = sqrt(softplus(logits)),  ids = the k largest of s + bias
        weight = scale * s[id] / (sum of the chosen s + epsilon)

    Source: class Gate of the models' published inference code.

    Args:
        hidden: [tokens, hidden_size] bfloat16, at most 64 tokens, hidden_size a multiple of 64; rows may be strided,
            each aligned to 16 bytes.
        weight: [experts, hidden_size] bfloat16, at most 512 experts; rows likewise. `layers.N.ffn.gate.weight`.
        bias: [experts] float32, for selection only, or None. `layers.N.ffn.gate.bias`.
        k: experts per token, 1 to 32.
        renormalize: divide by the sum.
        scale: the model's routed scaling factor.
        epsilon: added to the sum.
        bias_alt: [experts] float32, the bias of the tokens that bias_alt_mask marks, such as those of an image.
        bias_alt_mask: [tokens] bool, given together with bias_alt.
        int64_ids: return ids as int64. An out_ids that is given has either type.
        workspace: a Workspace, or a uint8 tensor of at least `dense_router_decode_workspace_size(tokens, experts)`
            bytes, aligned to 64, zeroed once; every call leaves it zeroed. Calls that may run at the same time need one
            each. By default the library lends one to each stream, and one to each stream of a captured graph.
        out_weights: [tokens, k] float32 to write to.
        out_ids: [tokens, k] int32 or int64 to write to.

    Returns:
        weights [tokens, k] float32 and ids [tokens, k] in descending order of s + bias; ties go to the lower id,
        NaN is lowest.
    """
    return _routes(hidden, k, out_weights, out_ids, int64_ids)


def dense_router_decode_workspace_size(tokens: int, experts: int) -> int:
    """Bytes of workspace that dense_router_decode needs for a batch of that shape."""
    return _native.dense_router_decode_workspace_size(tokens, experts)


@op(_native.activation_topk)
def _activation_topk(
    logits: Tensor,
    bias: Tensor | None,
    k: int,
    score_function: int = 0,
    renormalize: bool = True,
    scale: float = 1.0,
    epsilon: float = 0.0,
    padding_mask: Tensor | None = None,
    bias_alt: Tensor | None = None,
    bias_alt_mask: Tensor | None = None,
    int64_ids: bool = False,
    *,
    out_weights: Tensor | None = None,
    out_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """activation_topk, the score function as a number."""
    return _routes(logits, k, out_weights, out_ids, int64_ids)


def activation_topk(
    logits: Tensor,
    bias: Tensor | None,
    k: int,
    *,
    score_function: str = "sqrt_softplus",
    renormalize: bool = True,
    scale: float = 1.0,
    epsilon: float = 0.0,
    padding_mask: Tensor | None = None,
    bias_alt: Tensor | None = None,
    bias_alt_mask: Tensor | None = None,
    int64_ids: bool = False,
    out_weights: Tensor | None = None,
    out_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """From the gate's logits to experts and weights, in one kernel: activation, selection, renormalisation.

        s = score_function(logits),  ids = the k largest of s + bias
        weight = scale * s[id] / (sum of the chosen s + epsilon)

    Source: class Gate of the models' published inference code.

    Args:
        logits: [tokens, experts] float32 or bfloat16, at most 1024 experts: hidden . weight^T; rows may be strided.
        bias: [experts] float32, for selection only, or None. `layers.N.ffn.gate.bias`.
        k: experts per token, 1 to 32, at most experts.
        score_function: "sqrt_softplus" (DeepSeek-V4), "sigmoid" or "softmax" (over the experts whose logit is not
            NaN).
        renormalize: divide by the sum.
        scale: the model's routed scaling factor (1.5 in v4-flash, 2.5 in v4-pro).
        epsilon: added to the sum; the models use 0, some engines 1e-20.
        padding_mask: [tokens] bool, true for padding: ids -1, weights 0.
        bias_alt: [experts] float32, the bias of the tokens that bias_alt_mask marks, such as those of an image.
        bias_alt_mask: [tokens] bool, given together with bias_alt.
        int64_ids: return ids as int64. An out_ids that is given has either type.
        out_weights: [tokens, k] float32 to write to.
        out_ids: [tokens, k] int32 or int64 to write to.

    Returns:
        weights [tokens, k] float32 and ids [tokens, k] in descending order of s + bias; ties go to the lower id, NaN is
        lowest. Ids are valid and different whatever the logits, unless the token is padding.
    """
    if score_function not in _SCORE_FUNCTIONS:
        raise _unknown_score_function(score_function)
    return _activation_topk(
        logits,
        bias,
        k,
        _SCORE_FUNCTIONS[score_function],
        renormalize,
        scale,
        epsilon,
        padding_mask,
        bias_alt,
        bias_alt_mask,
        int64_ids,
        out_weights=out_weights,
        out_ids=out_ids,
    )


def _unknown_score_function(got: object) -> Exception:
    from dsv4_kernels.errors import InvalidArgumentError

    need = " or ".join(_SCORE_FUNCTIONS)
    return InvalidArgumentError(f"activation_topk: score_function: expected {need}, got {got}")


@op(_native.topk_select)
def topk_select(
    scores: Tensor,
    k: int,
    *,
    lengths: Tensor | None = None,
    sorted: bool = True,
    with_values: bool = True,
    out_values: Tensor | None = None,
    out_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The k largest of each row, exactly: equal values (-0 equals +0) go to the lower column, NaN is below any number.

    Args:
        scores: [rows, columns] float32 or bfloat16, at most 1,048,576 columns; rows may be strided.
        k: 1 to 2048; may exceed the columns.
        lengths: [rows] int32, how many leading columns of a row count; below 0 it is 0, above the columns all of them.
        sorted: in descending order, equal values by column. Otherwise in the order of the columns.
        with_values: False returns values [rows, 0] and spares writing them.
        out_values: [rows, k] float32 to write to.
        out_ids: [rows, k] int32 to write to.

    Returns:
        values [rows, k] float32, bit for bit those of scores, and ids [rows, k] int32, their columns. A row with fewer
        than k columns that count ends in values -infinity and ids -1.
    """
    rows = scores.shape[0]
    values = output(out_values, scores, (rows, k if with_values else 0), torch.float32)
    return values, output(out_ids, scores, (rows, k), torch.int32)
