"""FP4 E2M1, FP8 E4M3 and E8M0 in vectorised torch: the bits that csrc/device/fp4.cuh, fp8.cuh and e8m0.cuh give.

Codes are uint8 tensors; view them as torch.float8_e4m3fn, float8_e8m0fnu or float4_e2m1fn_x2 where a dtype is wanted.
Values are float32: what is wider must be rounded before. Nothing is in place.
"""

from __future__ import annotations

import torch
from torch import Tensor

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
LARGEST_E2M1 = 6.0
LARGEST_E4M3 = 448.0
# The exponents of the two, for the rule of the OCP MX specification.
E2M1_EXPONENT = 2
E4M3_EXPONENT = 8

E4M3_NAN = 0x7F
E8M0_NAN = 0xFF

# Halfway between neighbouring E2M1 values, and whether a tie goes up to the even code.
_MIDPOINTS = ((0.25, False), (0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False))


def largest_magnitude(values: Tensor) -> Tensor:
    """Over the last dimension, which is gone; NaN if a value is. What the scale of a group of values is taken from."""
    return values.abs().amax(dim=-1)


def encode_e2m1(values: Tensor, *, ties_to_even: bool = True) -> Tensor:
    """The nearest E2M1 codes, saturated to +-6.

    Args:
        values: float32, any shape. The sign is kept, also of zeros; infinities give +-6, NaN gives +6.
        ties_to_even: ties go to the even code, as the hardware's conversion has it; else towards zero.

    Returns:
        uint8, 0 to 15, one code per element; see pack_e2m1.
    """
    size = values.abs()
    code = torch.zeros_like(values, dtype=torch.uint8)
    for midpoint, up in _MIDPOINTS:
        code += (size >= midpoint) if up and ties_to_even else (size > midpoint)
    code = torch.where(values.signbit(), code | 8, code)
    return torch.where(values.isnan(), torch.full_like(code, 7), code)


def decode_e2m1(codes: Tensor) -> Tensor:
    """The float32 values of E2M1 codes, of which the low 4 bits count."""
    # The code's bits are those of a float32 2^126 times smaller; no table, which a captured graph could not copy.
    bits = codes.to(torch.int32)
    return (bits << 28 & -(2**31) | (bits & 7) << 22).view(torch.float32) * 2.0**126


def pack_e2m1(codes: Tensor) -> Tensor:
    """[..., 2 n] codes to [..., n] bytes, the even element in the low nibble."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_e2m1(packed: Tensor) -> Tensor:
    """[..., n] bytes to [..., 2 n] codes."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def encode_e4m3(values: Tensor) -> Tensor:
    """The nearest E4M3 codes, ties to even, saturated to +-448.

    Args:
        values: float32, any shape. Infinities give +-448; NaN gives 0x7f whatever its sign.

    Returns:
        uint8.
    """
    codes = values.clamp(-LARGEST_E4M3, LARGEST_E4M3).to(torch.float8_e4m3fn).view(torch.uint8)
    return torch.where(values.isnan(), torch.full_like(codes, E4M3_NAN), codes)


def decode_e4m3(codes: Tensor) -> Tensor:
    """The float32 values of E4M3 codes."""
    return codes.view(torch.float8_e4m3fn).to(torch.float32)


def ceil_e8m0(scale: Tensor) -> Tensor:
    """The least power of two that is not below each scale, 2^ceil(log2(scale)), as uint8 E8M0 codes.

    ((bits(scale) + 0x7fffff) & 0x7f800000) >> 23 for a float32 scale of 0 or more: 0 gives 0, what lies between 0 and
    2^-126 gives 1, infinity and NaN give 255, which is NaN.
    """
    bits = scale.contiguous().view(torch.int32).to(torch.int64)
    return ((bits + 0x7FFFFF) >> 23).clamp(max=255).to(torch.uint8)


def ceil_e8m0_of_amax(amax: Tensor, floor: float, largest: float) -> Tensor:
    """The scale of a group: ceil_e8m0(max(amax, floor) / largest), the quotient rounded to float32.

    MXFP8: floor 0, largest 448. KV cache: floor 1e-4, largest 448. MXFP4: floor 6 * 2^-126, largest 6. 255 for an amax
    that is NaN.
    """
    return ceil_e8m0(amax.clamp(min=floor) / amax.new_tensor(largest))


def floor_e8m0(amax: Tensor, largest_exponent: int) -> Tensor:
    """The power of two in amax over that in the format's largest value, as the OCP MX specification 1.0 has it.

    Args:
        amax: float32, 0 or more. Infinity and NaN give 255.
        largest_exponent: E2M1_EXPONENT or E4M3_EXPONENT. Values of a group may exceed the format's largest one.
    """
    exponent = amax.contiguous().view(torch.int32) >> 23
    scaled = (exponent - largest_exponent).clamp(min=0)
    return torch.where(exponent == 255, exponent, scaled).to(torch.uint8)


def decode_e8m0(codes: Tensor) -> Tensor:
    """2^(code - 127) in float32; 255 is NaN."""
    return _power_of_two(codes.to(torch.int32), codes)


def reciprocal_e8m0(codes: Tensor) -> Tensor:
    """2^(127 - code) in float32, exact; NaN for 255."""
    return _power_of_two(254 - codes.to(torch.int32), codes)


def _power_of_two(exponent: Tensor, codes: Tensor) -> Tensor:
    bits = torch.where(exponent == 0, 0x00400000, exponent << 23)
    return torch.where(codes == E8M0_NAN, torch.nan, bits.view(torch.float32))
