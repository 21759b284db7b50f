"""FP4 weights in the order in which moe_grouped_gemm reads them fastest. Done once, when weights are loaded."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from dsv4_kernels.errors import InvalidArgumentError

BLOCK = 128  # inner positions that lie together
ROW_STEP = 16  # what rows must be multiples of, the gate's and up's each
PAIR_ROWS = 8  # of the gate, then as many of up

# Bits of a word, by pair of codes and code of the pair: sign, exponent's high and low bit, mantissa (aot/moe/device/
# interleaved_weights.py says why).
BITS = (
    ((15, 8, 7, 6), (31, 24, 23, 22)),
    ((18, 11, 10, 9), (2, 27, 26, 25)),
    ((21, 14, 13, 12), (5, 30, 29, 28)),
    ((1, 0, 4, 3), (17, 16, 20, 19)),
)
SIGNS = sum(1 << code[0] for pair in BITS for code in pair)
LARGEST_MXFP4_SCALE = 136  # 2^9: factors are the scales times 2^118, in bfloat16
BIAS = 118


class InterleavedExperts(NamedTuple):
    """What moe_grouped_gemm takes as weight and weight_scale; see interleave_weights."""

    weight: Tensor
    weight_scale: Tensor


def interleave_weights(weight: Tensor, weight_scale: Tensor, *, gate_and_up: bool = False) -> InterleavedExperts:
    """Rearranges packed FP4 weights, losslessly, for moe_grouped_gemm with bfloat16 rows.

    Blocks of 128 inner positions follow one another, the last one filled up with zeros, in each block row after row,
    16 words per row. Word 4 w + 2 g + h
    of a row has the codes of inner positions 64 h + 32 g + 8 p + 2 w and the next, p = 0 to 3, at the bits BITS[p].
    Scales become bfloat16, times 2^118, two in a word: the first 64 inner positions' in the low half.

    Args:
        weight: [experts, N, K / 2] packed E2M1 codes (uint8, int8 or float4_e2m1fn_x2, low nibble first). N is a
            multiple of 16 (with gate_and_up of 32), K one of the scales' group.
        weight_scale: NVFP4: [experts, N, K / 16] float8_e4m3fn. MXFP4: [experts, N, K / 32] uint8 or float8_e8m0fnu,
            at most 2^9 (byte 136).
        gate_and_up: the first half of N is a gate's rows, the second up's, for a product with swiglu: 8 rows of the
            gate are then followed by the same 8 of up.

    Returns:
        weight: [experts, ceil(K / 128), N, 16] int32, weight_scale: [experts, ceil(K / 128), N, 2] (MXFP4) or [.., 4]
        (NVFP4) int32. Memory beyond the result's is a few times one expert's.

    Raises:
        InvalidArgumentError: another shape or dtype, or a scale above 2^9.
    """
    nvfp4 = weight_scale.dtype == torch.float8_e4m3fn
    group = 16 if nvfp4 else 32
    experts, rows, packed = _checked(weight, weight_scale, group, gate_and_up)
    blocks = -(-2 * packed // BLOCK)
    padding = blocks * BLOCK - 2 * packed
    words = torch.empty((experts, blocks, rows, 16), dtype=torch.int32, device=weight.device)
    factors = words.new_empty((experts, blocks, rows, 4 if nvfp4 else 2))
    tables = _tables().to(weight.device)
    for expert in range(experts):
        codes, scale = weight[expert].view(torch.uint8), weight_scale[expert].view(torch.uint8)
        if gate_and_up:
            codes, scale = _gate_and_up(codes), _gate_and_up(scale)
        if padding:
            codes = torch.nn.functional.pad(codes, (0, padding // 2))
            scale = torch.nn.functional.pad(scale, (0, padding // group))
        # [rows, blocks, half, group, pair, place] to [blocks, rows, place, group, half, pair]
        pairs = codes.reshape(rows, blocks, 2, 2, 4, 4).permute(1, 0, 5, 3, 2, 4).to(torch.int32)
        word = tables[0][pairs[..., 0]]
        for pair in range(1, 4):
            word |= tables[pair][pairs[..., pair]]
        words[expert] = word.reshape(blocks, rows, 16)
        halves = _factors(scale, nvfp4).reshape(rows, blocks, 2, -1).permute(1, 0, 3, 2)
        factors[expert] = halves.contiguous().view(torch.int32)[..., 0]
    return InterleavedExperts(words, factors)


def can_interleave(rows: int, inner: int, weight_scale: Tensor) -> bool:
    """Whether interleave_weights takes weights of this size with these scales. Synchronises."""
    nvfp4 = weight_scale.dtype == torch.float8_e4m3fn
    if rows % ROW_STEP or inner % (16 if nvfp4 else 32):
        return False
    if nvfp4:
        return True
    return not weight_scale.numel() or int(weight_scale.view(torch.uint8).max()) <= LARGEST_MXFP4_SCALE


def _checked(weight: Tensor, weight_scale: Tensor, group: int, gate_and_up: bool) -> tuple[int, int, int]:
    """weight's shape."""
    step = 2 * ROW_STEP if gate_and_up else ROW_STEP
    if weight.dim() != 3 or weight.element_size() != 1 or weight.shape[1] % step or weight.shape[2] * 2 % group:
        raise InvalidArgumentError(
            f"interleave_weights: weight: expected packed codes [experts, N, K / 2], N a multiple of {step} and K one "
            f"of {group}, got {str(weight.dtype).removeprefix('torch.')} {list(weight.shape)}"
        )
    experts, rows, packed = weight.shape
    need = [experts, rows, 2 * packed // group]
    if list(weight_scale.shape) != need or weight_scale.element_size() != 1:
        raise InvalidArgumentError(
            f"interleave_weights: weight_scale: expected float8_e4m3fn, uint8 or float8_e8m0fnu of shape {need}, got "
            f"{str(weight_scale.dtype).removeprefix('torch.')} {list(weight_scale.shape)}"
        )
    if not can_interleave(rows, 2 * packed, weight_scale):
        raise InvalidArgumentError(
            "interleave_weights: weight_scale: expected scales of at most 2^9 (byte 136), got "
            f"{int(weight_scale.view(torch.uint8).max())}; moe_grouped_gemm takes such weights as they are"
        )
    return experts, rows, packed


def _gate_and_up(matrix: Tensor) -> Tensor:
    """The rows of both halves by turns, PAIR_ROWS at a time."""
    return matrix.reshape(2, -1, PAIR_ROWS, matrix.shape[1]).transpose(0, 1).reshape(matrix.shape)


def _factors(scale: Tensor, nvfp4: bool) -> Tensor:
    """Scales times 2^118 as bfloat16, in int16; all of them exact."""
    if nvfp4:
        return (scale.view(torch.float8_e4m3fn).to(torch.float32) * 2.0**BIAS).to(torch.bfloat16).view(torch.int16)
    return (scale.to(torch.int16) + BIAS) << 7


@cache
def _tables() -> Tensor:
    """[4, 256] int32: the bits of a word that a byte of two codes sets as pair 0 to 3."""
    tables = torch.zeros((4, 256), dtype=torch.int64, device="cpu")
    byte = torch.arange(256, device="cpu")
    for pair, codes in enumerate(BITS):
        for code, places in enumerate(codes):
            for bit, place in enumerate(places):
                tables[pair] |= (byte >> (4 * code + 3 - bit) & 1) << place
    return (tables - ((tables >> 31) << 32)).to(torch.int32)
