"""E2M1, E4M3 and E8M0 from their bit fields: tables of values, and the nearest code by comparison in float64.

What results are checked against: slow, and sharing no code with number_formats, which the CPU implementation is made
of.
"""

from __future__ import annotations

import torch
from torch import Tensor


def magnitudes(exponent_bits: int, mantissa_bits: int, codes: int) -> Tensor:
    """The float64 values of the first so many codes without sign: at exponent 0 subnormals, then 1.m * 2^(e - bias)."""
    bias = 2 ** (exponent_bits - 1) - 1
    values = []
    for code in range(codes):
        exponent, mantissa = divmod(code, 2**mantissa_bits)
        fraction = mantissa / 2**mantissa_bits
        values.append(fraction * 2.0 ** (1 - bias) if exponent == 0 else (1 + fraction) * 2.0 ** (exponent - bias))
    return torch.tensor(values, dtype=torch.float64, device="cpu")


E2M1 = magnitudes(2, 1, 8)
E4M3 = magnitudes(4, 3, 127)  # of 0x7f: NaN


def nearest(values: Tensor, table: Tensor, ties_to_even: bool = True) -> Tensor:
    """The codes [...] uint8 of the nearest values, those beyond the largest at that; the sign above the code's bits.

    NaN becomes the code that follows the table, or the table's last where the sign follows that (E2M1).
    """
    wide = values.to(torch.float64)
    size = wide.abs().nan_to_num(nan=0.0).clamp(max=float(table[-1]))
    above = torch.searchsorted(table, size)
    below = (above - 1).clamp(min=0)
    up, down = table[above] - size, size - table[below]
    code = torch.where((up < down) | ((up == down) & (above % 2 == 0) & ties_to_even), above, below)
    sign = 128 if len(table) > 8 else 8
    code += sign * torch.signbit(wide)
    return torch.where(wide.isnan(), min(len(table), sign - 1), code).to(torch.uint8)


def decode_e2m1(packed: Tensor) -> Tensor:
    """[..., n] bytes of two codes, the first in the low nibble, to [..., 2 n] float64."""
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2).to(torch.int64)
    return torch.where(codes >= 8, -E2M1[codes % 8], E2M1[codes % 8])


def decode_e4m3(codes: Tensor) -> Tensor:
    """Bytes to float64."""
    index = codes.to(torch.int64)
    values = torch.cat((E4M3, E4M3.new_tensor([torch.nan])))[index % 128]
    return torch.where(index >= 128, -values, values)


def decode_e8m0(codes: Tensor) -> Tensor:
    """2^(code - 127) in float64; 255 is NaN."""
    return torch.where(codes == 255, torch.nan, torch.exp2(codes.to(torch.float64) - 127))


def least_power(values: Tensor) -> Tensor:
    """The E8M0 codes of the least powers of two, from 2^-126 on, that are not below the values; 0 for 0."""
    mantissa, exponent = torch.frexp(values.to(torch.float64))  # mantissa from 0.5 on
    power = torch.where(mantissa == 0.5, exponent - 1, exponent)
    return torch.where(values == 0, 0, power.clamp(min=-126) + 127).to(torch.uint8)


def pack(codes: Tensor) -> Tensor:
    """[..., 2 n] E2M1 codes to [..., n] bytes, the first in the low nibble."""
    return codes[..., 0::2] + 16 * codes[..., 1::2]
