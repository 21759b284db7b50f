"""Routing of large batches: the gate's product by torch's library, the rest by one kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_kernels.errors import InvalidArgumentError
from dsv4_kernels.router.functions import activation_topk

_FLOATS = torch.bfloat16, torch.float32, torch.float16


def gate_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden . weight^T with float32 products, sums and result: [tokens, experts]. Of bfloat16 operands in one launch;
    operands of other dtypes are converted to float32 first.
    """
    if hidden.is_cuda and hidden.dtype == weight.dtype == torch.bfloat16:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    return hidden.to(torch.float32) @ weight.to(torch.float32).T


def dense_router_prefill(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    *,
    padding_mask: Tensor | None = None,
    bias_alt: Tensor | None = None,
    bias_alt_mask: Tensor | None = None,
    renormalize: bool = True,
    scale: float = 1.0,
    epsilon: float = 0.0,
    int64_ids: bool = False,
    out_weights: Tensor | None = None,
    out_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The gate of a large batch: what dense_router_decode computes, for any number of tokens.

    The product is the library's, with a float32 result: logits are not rounded to bfloat16. activation_topk does the
    rest. Results equal dense_router_decode's up to the order of float32 sums.

    Args:
        hidden: [tokens, hidden_size] bfloat16, float32 or float16.
        weight: [experts, hidden_size] bfloat16, float32 or float16, at most 1024 experts. `layers.N.ffn.gate.weight`.
            If both are bfloat16 no copy is made of either; else the product is torch's of float32 matrices, as
            torch.set_float32_matmul_precision has it.
        bias: [experts] float32, for selection only, or None. `layers.N.ffn.gate.bias`.
        k: experts per token, 1 to 32.
        padding_mask: [tokens] bool, true for padding: ids -1 and weights 0.
        bias_alt: [experts] float32, the bias of the tokens that bias_alt_mask marks, such as those of an image.
        bias_alt_mask: [tokens] bool, given together with bias_alt.
        renormalize: divide by the sum.
        scale: the model's routed scaling factor.
        epsilon: added to the sum.
        int64_ids: return ids as int64. An out_ids that is given has either type.
        out_weights: [tokens, k] float32 to write to.
        out_ids: [tokens, k] int32 or int64 to write to.

    Returns:
        weights [tokens, k] float32 and ids [tokens, k], as dense_router_decode.
    """
    check_operand("dense_router_prefill", "hidden", hidden, None)
    check_operand("dense_router_prefill", "weight", weight, hidden.shape[1])
    return activation_topk(
        gate_logits(hidden, weight),
        bias,
        k,
        padding_mask=padding_mask,
        bias_alt=bias_alt,
        bias_alt_mask=bias_alt_mask,
        renormalize=renormalize,
        scale=scale,
        epsilon=epsilon,
        int64_ids=int64_ids,
        out_weights=out_weights,
        out_ids=out_ids,
    )


def check_operand(op: str, name: str, tensor: Tensor, columns: int | None) -> None:
    """InvalidArgumentError unless the tensor is a matrix of floats with so many columns."""
    if tensor.dtype not in _FLOATS:
        need = " or ".join(str(dtype).removeprefix("torch.") for dtype in _FLOATS)
        got = str(tensor.dtype).removeprefix("torch.")
        raise InvalidArgumentError(f"{op}: {name}: expected dtype {need}, got {got}")
    if tensor.dim() != 2 or (columns is not None and tensor.shape[1] != columns):
        width = "any" if columns is None else columns
        raise InvalidArgumentError(f"{op}: {name}: expected shape [any, {width}], got {list(tensor.shape)}")
