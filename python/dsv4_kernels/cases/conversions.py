"""What the baselines of several ops have in common: conversions as an engine writes them in plain torch.

Without a table or a constant: a captured graph could not copy it from the host.
"""

from __future__ import annotations

import torch
from torch import Tensor


def encode_e2m1(values: Tensor, ties_to_even: bool = True) -> Tensor:
    """float32 [..., 2 n] to [..., n] bytes of the nearest two codes each, saturated.

    A code is 2 e + v / 2^(e - 1), rounded, with e the value's exponent, 0 to 2. Ties fall to the even quotient, and
    with it to the even code.
    """
    size = values.abs().clamp(max=6.0)
    exponent = ((size.view(torch.int32) >> 23) - 127).clamp(0, 2)
    steps = size * ((128 - exponent) << 23).view(torch.float32)
    rounded = steps.round() if ties_to_even else (steps - 0.5).ceil()
    codes = (rounded.to(torch.int32) + 2 * exponent + 8 * values.signbit()).to(torch.uint8)
    return codes[..., ::2] | codes[..., 1::2] << 4


def decode_e2m1(packed: Tensor) -> Tensor:
    """[..., n] bytes to [..., 2 n] float32."""
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2).to(torch.int32)
    return ((codes & 8) << 28 | (codes & 7) << 22).view(torch.float32) * 2.0**126


def encode_e4m3(values: Tensor) -> Tensor:
    """float32 to bytes of the nearest codes, saturated."""
    return values.clamp(-448.0, 448.0).to(torch.float8_e4m3fn).view(torch.uint8)


def decode_e4m3(codes: Tensor) -> Tensor:
    """Bytes to float32."""
    return codes.view(torch.float8_e4m3fn).to(torch.float32)


def power_of_two_up(values: Tensor) -> Tensor:
    """The E8M0 codes, int32, of the least powers of two that float32 values do not exceed."""
    return (values.view(torch.int32) + 0x7FFFFF) >> 23
