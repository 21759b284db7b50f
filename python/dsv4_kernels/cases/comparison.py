"""What checks of results have in common: copies, poison, equality by bits, errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FLOAT32_ULP = 2.0**-23


def fresh(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same values in memory of their own."""
    return tuple(a.clone() if isinstance(a, Tensor) else a for a in arguments)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one dtype are equal byte for byte: NaN equals itself, and any dtype can be compared."""
    return a.shape == b.shape and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def to_cpu(values: Sequence[Any]) -> tuple[Any, ...]:
    """The same values with tensors on the CPU."""
    return tuple(value.cpu() if isinstance(value, Tensor) else value for value in values)


POISON_BYTE = 0xA5


def poison(tensor: Tensor) -> Tensor:
    """Fills a contiguous tensor with a pattern that no kernel writes, so that what it left alone can be told."""
    tensor.view(-1).view(torch.uint8).fill_(POISON_BYTE)
    return tensor


def is_poison(tensor: Tensor) -> Tensor:
    """Which elements still hold the pattern."""
    bytes_of = tensor.reshape(-1).view(torch.uint8).reshape(*tensor.shape, tensor.element_size())
    return (bytes_of == POISON_BYTE).all(dim=-1)


def worst_relative_error(got: Tensor, expected: Tensor) -> float:
    """max |got - expected| / |expected|, where 0 must be met exactly; NaN or infinity if only one of them has it."""
    got, expected = got.to(torch.float64), expected.to(torch.float64)
    same = (got == expected) | (got.isnan() & expected.isnan())
    error = torch.where(same, 0.0, (got - expected).abs() / expected.abs())
    return float(error.max()) if error.numel() else 0.0
