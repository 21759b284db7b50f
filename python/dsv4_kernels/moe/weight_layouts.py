"""The order of expert weights: K-major, and gate and up interleaved. Done once, when weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4_kernels.errors import InvalidArgumentError
from dsv4_kernels.moe.interleaved_weights import PAIR_ROWS

__all__ = ["InterleavedWeights", "deinterleave_l1_weights", "interleave_l1_weights", "make_b_k_major"]

GRANULARITY = 4  # the described system's; DeepGEMM interleaves by 8, FlashInfer and TensorRT-LLM by 64


@dataclass(frozen=True)
class InterleavedWeights:
    """Gate and up interleaved along N, and how: what reads the data needs both.

    data: as the tensor that was interleaved.
    granularity: how many elements of N of the gate come before as many of up.
    dim: the dimension of data that is N.
    """

    data: Tensor
    granularity: int
    dim: int = -1


def make_b_k_major(b: Tensor) -> Tensor:
    """B of a grouped product [experts, K, N], with its elements along K next to each other in memory.

    Args:
        b: [experts, K, N] of any dtype. FP4 is packed along K: [experts, K / 2, N] uint8 or float4_e2m1fn_x2.

    Returns:
        The same shape and values; strides [K * N, 1, K]. b itself where it is so already.
    """
    if b.dim() != 3:
        raise InvalidArgumentError(f"make_b_k_major: b: expected [experts, K, N], got shape {list(b.shape)}")
    # As bytes: torch does not copy FP4.
    as_bytes = b.view(torch.uint8) if b.element_size() == 1 else b
    return as_bytes.transpose(1, 2).contiguous().transpose(1, 2).view(b.dtype)


def interleave_l1_weights(weights: Tensor, *, granularity: int = GRANULARITY, dim: int = -1) -> InterleavedWeights:
    """Puts each few columns of the gate before the same columns of up, so that one tile of a product has both.

    With G = granularity, gate columns 0..G-1, up columns 0..G-1, gate columns G..2G-1, ... The granularity counts
    elements of N, which are whole in every form that a weight comes in: values, FP4 bytes (packed along K, so a column
    of bytes is a column of elements) and scales [K / group, N]. Interleaving weights and scales alike keeps them
    together.

    Args:
        weights: N in dimension `dim`, [experts, K, N] by default; gate in the first half of N, up in the second. Any
            dtype.
        granularity: 4, 8 and 64 are in use; any divisor of N / 2 works.
        dim: the dimension that is N; 1 for the checkpoint's [experts, N, K]. Never the one that FP4 is packed along.

    Raises:
        InvalidArgumentError: N is not a multiple of 2 * granularity.
    """
    blocks = _blocks("interleave_l1_weights", weights, granularity, dim)
    return InterleavedWeights(_exchange(weights, dim, (2, blocks, granularity)), granularity, dim)


def deinterleave_l1_weights(
    weights: InterleavedWeights | Tensor, *, granularity: int | None = None, dim: int | None = None
) -> Tensor:
    """The inverse of interleave_l1_weights; on a product's output, too, whose columns are N.

    Args:
        weights: what interleave_l1_weights returned, or a tensor in that order.
        granularity: of a tensor, 4 by default. InterleavedWeights know theirs; another one is an error.
        dim: of a tensor, the dimension that is N, the last by default.

    Returns:
        A tensor with the gate in the first half of N, up in the second.
    """
    if isinstance(weights, InterleavedWeights):
        for name, given, known in (
            ("granularity", granularity, weights.granularity),
            ("dim", dim, weights.dim),
        ):
            if given not in (None, known):
                raise InvalidArgumentError(
                    f"deinterleave_l1_weights: {name}: expected {known}, with which they were interleaved, got {given}"
                )
        tensor, granularity, dim = weights.data, weights.granularity, weights.dim
    else:
        tensor, granularity, dim = (
            weights,
            GRANULARITY if granularity is None else granularity,
            -1 if dim is None else dim,
        )
    blocks = _blocks("deinterleave_l1_weights", tensor, granularity, dim)
    return _exchange(tensor, dim, (blocks, 2, granularity))


def _blocks(function: str, weights: Tensor, granularity: int, dim: int) -> int:
    """How many blocks of the granularity each half of N has."""
    if not -weights.dim() <= dim < weights.dim():
        raise InvalidArgumentError(f"{function}: dim: expected a dimension of shape {list(weights.shape)}, got {dim}")
    if granularity < 1:
        raise InvalidArgumentError(f"{function}: granularity: expected at least 1, got {granularity}")
    columns = weights.shape[dim]
    if columns % (2 * granularity):
        raise InvalidArgumentError(
            f"{function}: weights: expected an N that is a multiple of {2 * granularity}, twice the granularity, "
            f"got {columns}"
        )
    return columns // (2 * granularity)


def _exchange(weights: Tensor, dim: int, order: tuple[int, int, int]) -> Tensor:
    """N seen as these three dimensions, with the first two exchanged; contiguous."""
    # As bytes: torch does not copy FP4.
    as_bytes = weights.view(torch.uint8) if weights.element_size() == 1 else weights
    dim %= weights.dim()
    exchanged = as_bytes.unflatten(dim, order).transpose(dim, dim + 1).reshape(weights.shape)
    result: Tensor = exchanged.contiguous().view(weights.dtype)
    return result


def gate_and_up(result: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """The two halves of a first product's columns, as the layout of its weights has them."""
    if interleaved:
        gate, up = result.unflatten(-1, (-1, 2, PAIR_ROWS)).unbind(dim=-2)
        return gate.flatten(-2), up.flatten(-2)
    gate, up = result.chunk(2, dim=-1)
    return gate, up
