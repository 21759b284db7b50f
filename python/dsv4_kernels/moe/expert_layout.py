"""How FP4 weights lie in memory: number format and order, and one expert's tensors on their way there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dsv4_kernels.moe.interleaved_weights import BLOCK, ROW_STEP, can_interleave, interleave_weights

# What a checkpoint may store packed FP4 codes and MXFP4 scales as.
CODES = (torch.uint8, torch.int8, torch.float4_e2m1fn_x2)
MXFP4_SCALES = (torch.uint8, torch.float8_e8m0fnu)
NVFP4_SCALES = (torch.float8_e4m3fn,)

GROUPS = {"nvfp4": 16, "mxfp4": 32}  # codes that share a scale


class ExpertTensors(NamedTuple):
    """One expert as checkpoints have it.

    codes: [2 * intermediate, hidden / 2] (gate, then up) and [hidden, intermediate / 2]. scale: the same rows, a column
    for each group. factor: float32, [2] (gate, up) and [1], or None.
    """

    l1_codes: Tensor
    l1_scale: Tensor
    l1_factor: Tensor | None
    l2_codes: Tensor
    l2_scale: Tensor
    l2_factor: Tensor | None


@dataclass(frozen=True)
class WeightLayout:
    """How the weights of one product lie in memory.

    format: "nvfp4" or "mxfp4". interleaved: in interleave_weights' order, else in the checkpoints'.
    """

    format: str
    interleaved: bool

    @staticmethod
    def of(weight: Tensor, scale: Tensor) -> WeightLayout:
        """The layout of tensors that have one of them; which follows from dtypes and the scales' last dimension."""
        interleaved = weight.dtype == torch.int32
        nvfp4 = scale.shape[-1:] == (BLOCK // 32,) if interleaved else scale.dtype == torch.float8_e4m3fn
        return WeightLayout("nvfp4" if nvfp4 else "mxfp4", interleaved)

    def shapes(self, experts: int, rows: int, inner: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of weight and scale, for [experts, rows, inner] values."""
        if self.interleaved:
            blocks = (experts, -(-inner // BLOCK), rows)
            return (*blocks, BLOCK // 8), (*blocks, BLOCK // GROUPS[self.format] // 2)
        return (experts, rows, inner // 2), (experts, rows, inner // GROUPS[self.format])

    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """Of weight and scale."""
        if self.interleaved:
            return torch.int32, torch.int32
        return torch.uint8, torch.float8_e4m3fn if self.format == "nvfp4" else torch.uint8

    def empty(self, experts: int, rows: int, inner: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Weight and scale, not initialised."""
        weight, scale = (
            torch.empty(shape, dtype=dtype, device=device)
            for shape, dtype in zip(self.shapes(experts, rows, inner), self.dtypes(), strict=True)
        )
        return weight, scale

    def store(self, codes: Tensor, scale: Tensor, weight_out: Tensor, scale_out: Tensor, *, gate_and_up: bool) -> bool:
        """Writes one expert's tensors in the checkpoints' order into its place in this layout.

        Returns:
            Whether that was possible: interleaved MXFP4 weights have scales of at most 2^9. Synchronises.
        """
        device = weight_out.device
        codes, scale = codes.view(torch.uint8).to(device), scale.to(device)  # as bytes: torch does not copy FP4
        if not self.interleaved:
            weight_out.copy_(codes)
            scale_out.view(torch.uint8).copy_(scale.view(torch.uint8))
            return True
        if not can_interleave(codes.shape[0], 2 * codes.shape[1], scale):
            return False
        made = interleave_weights(codes[None], scale[None], gate_and_up=gate_and_up)
        weight_out.copy_(made.weight[0])
        scale_out.copy_(made.weight_scale[0])
        return True


def can_be_interleaved(rows: int, inner: int, weights: str) -> bool:
    """Whether interleave_weights takes weights of this size and format, the gate's and up's rows by turns or not."""
    return rows % (2 * ROW_STEP) == 0 and inner % GROUPS[weights] == 0
