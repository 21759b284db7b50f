"""A matrix in MXFP8."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4_kernels.moe.scale_layouts import blackwell_unswizzle_32_4_4

GROUP = 32  # columns that share a scale


@dataclass(frozen=True)
class MXFP8Tensor:
    """E4M3 codes and a power of two for each 32 columns, as block-scaled products read them.

    Attributes:
        data: [rows, columns] float8_e4m3fn, columns a multiple of 32.
        scale: [rows to a multiple of 128, columns / 32 to one of 4] float8_e8m0fnu, in the order of
            blackwell_swizzle_32_4_4, zero in its padding.
    """

    data: Tensor
    scale: Tensor

    def scales(self) -> Tensor:
        """[rows, columns / 32] float8_e8m0fnu in row-major order."""
        rows, columns = self.data.shape
        return blackwell_unswizzle_32_4_4(self.scale, rows, columns // GROUP)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[rows, columns] values: code * 2^(scale - 127), exact in float32; NaN where the scale is 255 or the code NaN.

        Rows that hold no token have scale 0, which is 2^-127, and whatever codes their memory held.
        """
        factors = self.scales().to(torch.float32).repeat_interleave(GROUP, dim=1)
        return (self.data.to(torch.float32) * factors).to(dtype)
