"""NVFP4, MXFP4, MXFP8 and FP8: values to codes with scales for blocks of them, and back.

A few ops with many arguments; the other functions are these ops under the names, and with the arguments, that engines
use. What all have in common:

- x is [rows, columns] bfloat16, float16 or float32; rows may be strided. Codes come out as float4_e2m1fn_x2 (two a
  byte, the even element in the low nibble) or float8_e4m3fn, scales as float8_e4m3fn or float8_e8m0fnu; outputs that
  are given may be uint8 as well.
- `source` says which values are quantised. "plain": x. "deinterleave": the gates in x [rows, 2 * columns], of each
  2 * granularity columns the first granularity. "swiglu": silu(min(gate, limit)) * clamp(up, -limit, limit) in float32,
  rounded to bfloat16 first unless round_to_bfloat16 is False; granularity 0 means gates in the first half of the
  columns and ups in the second, another one that each granularity of gates is followed by as many ups.
- `swizzle`: scales in the order 32_4_4 (see blackwell_swizzle_32_4_4), rows padded to multiples of 128 and columns to
  multiples of 4, with 0; no second pass over the scales is needed.
- NaN: a block that holds one has a scale that is NaN, so that all of it comes back as NaN (see "NaN and infinities" of
  the number formats' page).
- `n_used`: one int32 on the device. Rows from it on are not written, except that a tile of 128 rows of swizzled scales
  that it cuts is filled with 0. A captured graph follows its value.
- Conversions round to nearest, ties to the even code, and saturate. ties_to_even=False sends ties of E2M1 toward zero.
- The CPU implementation gives the same bits, except of SwiGLU, whose relative error on a GPU is at most 2^-17: there a
  value may round to the neighbouring bfloat16.

Nothing is synchronised or depends on the order in which blocks run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_kernels import _native, host_values
from dsv4_kernels.errors import InvalidArgumentError
from dsv4_kernels.moe import formats
from dsv4_kernels.moe.scale_layouts import swizzled_shape
from dsv4_kernels.op import op, output
from dsv4_kernels.workspace import Workspace

__all__ = [
    "deinterleave_amax_quantize_nvfp4_fused",
    "deinterleave_quantize_nvfp4",
    "dequantize_blocks",
    "dequantize_fp8_per_token",
    "dequantize_mxfp4",
    "dequantize_mxfp8",
    "dequantize_nvfp4",
    "quantize_activation_nvfp4",
    "quantize_fp8_per_token",
    "quantize_mx",
    "quantize_mxfp4",
    "quantize_mxfp8",
    "quantize_nvfp4",
    "quantize_nvfp4_gpu_fused",
    "quantize_weight_to_nvfp4",
]

_SOURCES = {"plain": formats.PLAIN, "deinterleave": formats.DEINTERLEAVE, "swiglu": formats.SWIGLU}
_ELEMENT_FORMATS = {"e4m3": formats.E4M3, "e2m1": formats.E2M1}
_SCALE_FORMATS = {"e4m3": formats.SCALE_E4M3, "e8m0": formats.SCALE_E8M0, "float32": formats.SCALE_FLOAT32}
_DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_FLOATS = tuple(_DTYPES)

# The least amax that a global scale is made for, 448 * 6 * 2^-110: neither the scale nor its reciprocal, nor their
# products with block scales, leave the normal range of float32 then.
NVFP4_AMAX_FLOOR = 448 * 6 * 2.0**-110
MXFP4_AMAX_FLOOR = 6 * 2.0**-126
GRANULARITY = 4  # of gates and ups in the described system; DeepGEMM has 8, FlashInfer and TensorRT-LLM 64


def block_outputs(
    x: Tensor,
    shape: tuple[int, int],
    group: int,
    codes_per_byte: int,
    swizzle: bool,
    out: Tensor | None,
    out_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Codes for values of a shape and the scales of groups of them, as bytes: torch's tools for ops know no FP8."""
    rows, columns = shape
    scales = swizzled_shape(rows, columns // group) if swizzle else (rows, columns // group)
    return (
        output(out, x, (rows, columns // codes_per_byte), torch.uint8),
        output(out_scale, x, scales, torch.uint8),
    )


def _values_shape(x: Tensor, source: int) -> tuple[int, int]:
    """Rows and columns of the values that are quantised."""
    rows, columns = x.shape
    return rows, columns if source == formats.PLAIN else columns // 2


@op(_native.quantize_nvfp4)
def _quantize_nvfp4(
    x: Tensor,
    global_scale: Tensor,
    expert_ids: Tensor | None = None,
    reciprocal_global_scale: bool = False,
    source: int = 0,
    granularity: int = 0,
    limit: float = 0.0,
    round_to_bfloat16: bool = True,
    ties_to_even: bool = True,
    scale_floor: float = 0.0,
    swizzle: bool = False,
    n_used: Tensor | None = None,
    *,
    out: Tensor | None = None,
    out_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """quantize_nvfp4, the source as a number and results as bytes; so the other ops of this module."""
    return block_outputs(x, _values_shape(x, source), 16, 2, swizzle, out, out_scale)


def quantize_nvfp4(
    x: Tensor,
    global_scale: Tensor,
    *,
    expert_ids: Tensor | None = None,
    reciprocal_global_scale: bool = False,
    source: str = "plain",
    granularity: int = 0,
    limit: float | None = None,
    round_to_bfloat16: bool = True,
    ties_to_even: bool = True,
    scale_floor: float = 0.0,
    swizzle: bool = False,
    n_used: Tensor | None = None,
    out: Tensor | None = None,
    out_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """NVFP4 under global scales that are known: blocks of 16 E2M1 codes with an E4M3 scale each.

    In float32, rounded to nearest at each step, with decode = global_scale and encode = 1 / global_scale:

        scale = e4m3(max(encode * (amax * (1/6)), scale_floor))
        code = e2m1(value * (1 / (scale * decode))), or e2m1(value * 0) where scale is 0

    Source: the reference in vLLM's tests. Kernels of vLLM, TensorRT-LLM and FlashInfer take approximate reciprocals, so
    their codes may differ where a value is next to a midpoint. torchao has scale_floor=2**-6.

    Args:
        x: [rows, columns], columns a multiple of 16; [rows, 2 * columns] unless source is "plain".
        global_scale: float32, finite, at least 2^-126: one element for all rows; [rows]; or [experts] with expert_ids.
            It is amax / (448 * 6), by which results are multiplied: weight_scale_2 and input_scale of NVFP4
            checkpoints. It is not read by the host: under another one, codes and scales mean nothing.
        expert_ids: [rows] int32; rows with an id outside [0, experts) get codes and scales 0.
        reciprocal_global_scale: global_scale is 448 * 6 / amax, as the engines' functions of this kind take it.
        source: see the module's docstring.
        granularity: of gates and ups, a power of two from 4 that divides columns.
        limit: of SwiGLU, finite; None or 0: no clamp.
        round_to_bfloat16: of SwiGLU.
        ties_to_even: of E2M1.
        scale_floor: the least block scale.
        swizzle: scales in the order 32_4_4.
        n_used: one int32, rank 0 or 1.
        out: [rows, columns / 2] to write to, on a multiple of 8 bytes.
        out_scale: [rows, columns / 16] to write to; with swizzle padded to multiples of 128 and 4.

    Returns:
        codes float4_e2m1fn_x2, scales float8_e4m3fn. A block that holds a NaN has scale NaN (0x7f) and codes +6; an
        infinity becomes +-6 under the largest scale.
    """
    data, scale = _quantize_nvfp4(
        x, global_scale, expert_ids, reciprocal_global_scale, _choice("quantize_nvfp4", "source", source, _SOURCES),
        granularity, limit or 0.0, round_to_bfloat16, ties_to_even, scale_floor, swizzle, n_used,
        out=out, out_scale=out_scale,
    )  # fmt: skip
    return _typed(data, torch.float4_e2m1fn_x2, out), _typed(scale, torch.float8_e4m3fn, out_scale)


def _amax_workspace_size(experts: int) -> int:
    return _native.quantize_nvfp4_gpu_fused_workspace_size(experts)


@op(_native.quantize_nvfp4_gpu_fused, workspace_size=_amax_workspace_size)
def _quantize_nvfp4_gpu_fused(
    x: Tensor,
    expert_ids: Tensor | None = None,
    experts: int = 0,
    per_token: bool = False,
    reciprocal_global_scale: bool = False,
    source: int = 0,
    granularity: int = 0,
    limit: float = 0.0,
    round_to_bfloat16: bool = True,
    amax_floor: float = NVFP4_AMAX_FLOOR,
    ties_to_even: bool = True,
    scale_floor: float = 0.0,
    swizzle: bool = False,
    n_used: Tensor | None = None,
    *,
    workspace: Workspace | Tensor | None = None,
    out: Tensor | None = None,
    out_scale: Tensor | None = None,
    out_global_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    scales = x.shape[0] if per_token else max(experts, 1)
    return (
        *block_outputs(x, _values_shape(x, source), 16, 2, swizzle, out, out_scale),
        output(out_global_scale, x, (scales,), torch.float32),
    )


def quantize_nvfp4_gpu_fused(
    x: Tensor,
    *,
    expert_ids: Tensor | None = None,
    experts: int = 0,
    per_token: bool = False,
    reciprocal_global_scale: bool = False,
    source: str = "plain",
    granularity: int = 0,
    limit: float | None = None,
    round_to_bfloat16: bool = True,
    amax_floor: float = NVFP4_AMAX_FLOOR,
    ties_to_even: bool = True,
    scale_floor: float = 0.0,
    swizzle: bool = False,
    n_used: Tensor | None = None,
    workspace: Workspace | Tensor | None = None,
    out: Tensor | None = None,
    out_scale: Tensor | None = None,
    out_global_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """NVFP4 with the global scale taken from the values on the device, in one call.

        global_scale = amax / (448 * 6), amax clipped to [amax_floor, the largest float32]

    Codes and scales are to the bit those of quantize_nvfp4 with the global scale that is returned. One kernel finds
    amax and another encodes; per_token it is one, and each row is read from memory once.

    Args:
        x: [rows, columns], columns a multiple of 16; [rows, 2 * columns] unless source is "plain".
        expert_ids: [rows] int32, for a global scale of each expert; rows with an id outside [0, experts) count for none
            and get codes and scales 0.
        experts: how many there are; with expert_ids only.
        per_token: a global scale for each row.
        reciprocal_global_scale: return, and work with, 448 * 6 / amax.
        source: see the module's docstring.
        granularity: as in quantize_nvfp4.
        limit: of SwiGLU, finite; None or 0: no clamp.
        round_to_bfloat16: of SwiGLU.
        amax_floor: so that zeros have a scale; at least 448 * 6 * 2^-126. The default keeps all products in float32's
            normal range.
        ties_to_even: of E2M1.
        scale_floor: the least block scale.
        swizzle: scales in the order 32_4_4.
        n_used: one int32, rank 0 or 1.
        workspace: a Workspace, or a uint8 tensor of at least 4 * (max(experts, 1) + 1) bytes, aligned to 4, zeroed
            once; every call leaves it zeroed. Calls that may run at the same time need one each. By default the library
            lends one to each stream, and one to each stream of a captured graph.
        out: as in quantize_nvfp4.
        out_scale: as in quantize_nvfp4.
        out_global_scale: [1], [experts] or [rows] float32 to write to.

    Returns:
        codes float4_e2m1fn_x2, scales float8_e4m3fn, global scales float32. A block that holds a NaN has scale NaN and
        does not count for the global scale.
    """
    name = "quantize_nvfp4_gpu_fused"
    data, scale, global_scale = _quantize_nvfp4_gpu_fused(
        x, expert_ids, experts, per_token, reciprocal_global_scale, _choice(name, "source", source, _SOURCES),
        granularity, limit or 0.0, round_to_bfloat16, amax_floor, ties_to_even, scale_floor, swizzle, n_used,
        workspace=workspace, out=out, out_scale=out_scale, out_global_scale=out_global_scale,
    )  # fmt: skip
    return _typed(data, torch.float4_e2m1fn_x2, out), _typed(scale, torch.float8_e4m3fn, out_scale), global_scale


def quantize_activation_nvfp4(
    x: Tensor, global_scale: Tensor | float, *, swizzle: bool = False, n_used: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Activations under a static global scale, amax / (448 * 6): quantize_nvfp4, which also takes a float here.

    Raises:
        InvalidArgumentError: also for a float that is no finite float32 of at least 2^-126.

    Returns:
        codes [rows, columns / 2] float4_e2m1fn_x2, scales [rows, columns / 16] float8_e4m3fn.
    """
    scale = _as_tensor("quantize_activation_nvfp4", global_scale, x)
    return quantize_nvfp4(x, scale, swizzle=swizzle, n_used=n_used)


def quantize_weight_to_nvfp4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A weight [K, N] along K, with its own global scale.

    Args:
        weight: [K, N], K a multiple of 16. K-major memory (the transpose of a [N, K] tensor) is read as it is.

    Returns:
        codes [K / 2, N] float4_e2m1fn_x2 and scales [K / 16, N] float8_e4m3fn, both K-major; global scale [1] float32,
        amax / (448 * 6).
    """
    if weight.dim() != 2:
        raise InvalidArgumentError(f"quantize_weight_to_nvfp4: weight: expected [K, N], got shape {list(weight.shape)}")
    rows = weight.T if weight.T.stride(-1) == 1 else weight.T.contiguous()
    data, scale, global_scale = quantize_nvfp4_gpu_fused(rows)
    return data.T, scale.T, global_scale


def deinterleave_quantize_nvfp4(
    x: Tensor,
    intermediate_size: int,
    global_scale: Tensor | float,
    *,
    granularity: int = GRANULARITY,
    swizzle: bool = False,
    n_used: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The gate columns of an interleaved product, under a static global scale: quantize_nvfp4, source "deinterleave".

    A product with interleaved gate and up weights that applies SwiGLU itself leaves its results in the gate columns.

    Args:
        x: [rows, 2 * intermediate_size]: of each 2 * granularity columns the first granularity are quantised.
        intermediate_size: a multiple of 16 and of the granularity.
        global_scale: amax / (448 * 6), a float32 tensor as in quantize_nvfp4 or a finite float of at least 2^-126.
        granularity: of the weights' interleaving (see interleave_l1_weights).
        swizzle: scales in the order 32_4_4.
        n_used: one int32, rank 0 or 1.

    Returns:
        codes [rows, intermediate_size / 2], scales [rows, intermediate_size / 16].
    """
    _check_columns("deinterleave_quantize_nvfp4", x, intermediate_size)
    scale = _as_tensor("deinterleave_quantize_nvfp4", global_scale, x)
    return quantize_nvfp4(x, scale, source="deinterleave", granularity=granularity, swizzle=swizzle, n_used=n_used)


def deinterleave_amax_quantize_nvfp4_fused(
    x: Tensor,
    intermediate_size: int,
    *,
    granularity: int = GRANULARITY,
    swizzle: bool = False,
    n_used: Tensor | None = None,
    workspace: Workspace | Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """deinterleave_quantize_nvfp4 with the global scale taken from the gate columns, on the device.

    Returns:
        codes [rows, intermediate_size / 2], scales [rows, intermediate_size / 16], global scale [1] float32,
        amax / (448 * 6).
    """
    _check_columns("deinterleave_amax_quantize_nvfp4_fused", x, intermediate_size)
    return quantize_nvfp4_gpu_fused(
        x, source="deinterleave", granularity=granularity, swizzle=swizzle, n_used=n_used, workspace=workspace
    )


@op(_native.quantize_mx)
def _quantize_mx(
    x: Tensor,
    element_format: int = 0,
    source: int = 0,
    granularity: int = 0,
    limit: float = 0.0,
    round_to_bfloat16: bool = True,
    round_scale_up: bool = True,
    amax_floor: float = 0.0,
    ties_to_even: bool = True,
    swizzle: bool = False,
    n_used: Tensor | None = None,
    *,
    out: Tensor | None = None,
    out_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return block_outputs(x, _values_shape(x, source), 32, 1 + element_format, swizzle, out, out_scale)


def quantize_mx(
    x: Tensor,
    *,
    element_format: str = "e4m3",
    source: str = "plain",
    granularity: int = 0,
    limit: float | None = None,
    round_to_bfloat16: bool = True,
    round_scale_up: bool = True,
    amax_floor: float | None = None,
    ties_to_even: bool = True,
    swizzle: bool = False,
    n_used: Tensor | None = None,
    out: Tensor | None = None,
    out_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The MX formats: groups of 32 codes that share an E8M0 scale, a power of two.

        scale = the least power of two that is not below max(amax, amax_floor) / largest
        code = nearest to value / scale

    with `largest` 448 of E4M3 and 6 of E2M1, the quotient rounded to float32. A group of zeros has scale byte 0 if
    amax_floor is 0.

    Args:
        x: [rows, columns], columns a multiple of 32; [rows, 2 * columns] unless source is "plain".
        element_format: "e4m3" or "e2m1".
        source: see the module's docstring.
        granularity: as in quantize_nvfp4.
        limit: of SwiGLU, finite; None or 0: no clamp.
        round_to_bfloat16: of SwiGLU.
        round_scale_up: as above (DeepSeek, cuBLAS, torchao's RCEIL); False for the rule of the OCP MX specification
            1.0, the power of two in amax over that in `largest`, under which values may saturate.
        amax_floor: None: 0 for "e4m3", 6 * 2^-126 for "e2m1". The KV cache of DeepSeek-V4 has 1e-4 for "e4m3".
        ties_to_even: of E2M1.
        swizzle: scales in the order 32_4_4.
        n_used: one int32, rank 0 or 1.
        out: [rows, columns] or, for "e2m1", [rows, columns / 2] to write to, on a multiple of 16 or 8 bytes.
        out_scale: [rows, columns / 32] to write to; with swizzle padded to multiples of 128 and 4.

    Returns:
        codes float8_e4m3fn or float4_e2m1fn_x2, scales float8_e8m0fnu. A group that holds a NaN or an infinity has
        scale NaN (255) and codes NaN, or +6 in E2M1.
    """
    form = _choice("quantize_mx", "element_format", element_format, _ELEMENT_FORMATS)
    if amax_floor is None:
        amax_floor = MXFP4_AMAX_FLOOR if form == formats.E2M1 else 0.0
    data, scale = _quantize_mx(
        x, form, _choice("quantize_mx", "source", source, _SOURCES), granularity, limit or 0.0, round_to_bfloat16,
        round_scale_up, amax_floor, ties_to_even, swizzle, n_used, out=out, out_scale=out_scale,
    )  # fmt: skip
    dtype = torch.float4_e2m1fn_x2 if form == formats.E2M1 else torch.float8_e4m3fn
    return _typed(data, dtype, out), _typed(scale, torch.float8_e8m0fnu, out_scale)


def quantize_mxfp8(x: Tensor, *, swizzle: bool = False, n_used: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """MXFP8: quantize_mx with element_format "e4m3", whose further arguments it leaves at their defaults."""
    return quantize_mx(x, element_format="e4m3", swizzle=swizzle, n_used=n_used)


def quantize_mxfp4(x: Tensor, *, swizzle: bool = False, n_used: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """MXFP4: quantize_mx with element_format "e2m1", whose further arguments it leaves at their defaults."""
    return quantize_mx(x, element_format="e2m1", swizzle=swizzle, n_used=n_used)


@op(_native.quantize_fp8_per_token)
def _quantize_fp8_per_token(
    x: Tensor,
    scale_floor: float = 0.0,
    divide: bool = False,
    *,
    out: Tensor | None = None,
    out_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return output(out, x, x.shape, torch.uint8), output(out_scale, x, (x.shape[0],), torch.float32)


def quantize_fp8_per_token(
    x: Tensor,
    *,
    scale_floor: float = 0.0,
    divide: bool = False,
    out: Tensor | None = None,
    out_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """FP8 E4M3 with a float32 scale for each row.

        scale = max(amax / 448, scale_floor),  code = e4m3(value * (1 / scale))

    Args:
        x: [rows, columns], columns a multiple of 16.
        scale_floor: the least scale; vLLM has 1 / (448 * 512). A scale of 0 gives codes 0.
        divide: code = e4m3(value / scale), as vLLM and the models' reference code have it; a code differs where a
            value is next to a midpoint.
        out: [rows, columns] to write to, on a multiple of 16 bytes.
        out_scale: [rows] float32 to write to.

    Returns:
        codes float8_e4m3fn, scales float32. A row that holds a NaN has scale and codes NaN; one with an infinity has
        scale infinity and codes 0 or NaN.
    """
    data, scale = _quantize_fp8_per_token(x, scale_floor, divide, out=out, out_scale=out_scale)
    return _typed(data, torch.float8_e4m3fn, out), scale


@op(_native.dequantize_blocks)
def _dequantize_blocks(
    data: Tensor,
    scale: Tensor,
    global_scale: Tensor | None = None,
    expert_ids: Tensor | None = None,
    reciprocal_global_scale: bool = False,
    element_format: int = 1,
    scale_format: int = 0,
    swizzle: bool = False,
    dtype: int = 0,
    *,
    out: Tensor | None = None,
) -> Tensor:
    return output(out, data, (data.shape[0], data.shape[1] * (1 + element_format)), _FLOATS[dtype])


def dequantize_blocks(
    data: Tensor,
    scale: Tensor,
    *,
    global_scale: Tensor | None = None,
    expert_ids: Tensor | None = None,
    reciprocal_global_scale: bool = False,
    element_format: str = "e2m1",
    scale_format: str = "e4m3",
    swizzle: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
) -> Tensor:
    """code * scale * global_scale, multiplied in this order in float32 and rounded to dtype.

    Args:
        data: [rows, columns] of E4M3, [rows, columns / 2] of E2M1; typed or uint8.
        scale: "e4m3" [rows, columns / 16], "e8m0" [rows, columns / 32] (with swizzle padded), "float32" [rows].
        global_scale: as in quantize_nvfp4; None: 1.
        expert_ids: as in quantize_nvfp4; rows with an id outside [0, experts) are 0.
        reciprocal_global_scale: as in quantize_nvfp4.
        element_format: "e2m1" or "e4m3".
        scale_format: "e4m3", "e8m0" or "float32".
        swizzle: scale is in the order 32_4_4.
        dtype: bfloat16, float16 or float32.
        out: [rows, columns] to write to, of that dtype, on a multiple of 16 bytes.
    """
    name = "dequantize_blocks"
    if dtype not in _DTYPES:
        raise InvalidArgumentError(f"{name}: dtype: expected bfloat16, float16 or float32, got {dtype}")
    element = _choice(name, "element_format", element_format, _ELEMENT_FORMATS)
    scales = _choice(name, "scale_format", scale_format, _SCALE_FORMATS)
    return _dequantize_blocks(
        data, scale, global_scale, expert_ids, reciprocal_global_scale, element, scales, swizzle, _DTYPES[dtype],
        out=out,
    )  # fmt: skip


def dequantize_nvfp4(
    data: Tensor,
    scale: Tensor,
    global_scale: Tensor | float,
    *,
    expert_ids: Tensor | None = None,
    reciprocal_global_scale: bool = False,
    swizzle: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """The values of quantize_nvfp4's codes: dequantize_blocks, which also takes a float as global_scale here.

    A float must be a finite float32 of at least 2^-126.
    """
    given = _as_tensor("dequantize_nvfp4", global_scale, data)
    return dequantize_blocks(
        data, scale, global_scale=given, expert_ids=expert_ids, reciprocal_global_scale=reciprocal_global_scale,
        swizzle=swizzle, dtype=dtype,
    )  # fmt: skip


def dequantize_mxfp8(
    data: Tensor, scale: Tensor, *, swizzle: bool = False, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """The values of quantize_mxfp8's codes: dequantize_blocks."""
    return dequantize_blocks(data, scale, element_format="e4m3", scale_format="e8m0", swizzle=swizzle, dtype=dtype)


def dequantize_mxfp4(
    data: Tensor, scale: Tensor, *, swizzle: bool = False, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """The values of quantize_mxfp4's codes: dequantize_blocks."""
    return dequantize_blocks(data, scale, element_format="e2m1", scale_format="e8m0", swizzle=swizzle, dtype=dtype)


def dequantize_fp8_per_token(data: Tensor, scale: Tensor, *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The values of quantize_fp8_per_token's codes: dequantize_blocks."""
    return dequantize_blocks(data, scale, element_format="e4m3", scale_format="float32", dtype=dtype)


def _choice(function: str, name: str, given: str, choices: dict[str, int]) -> int:
    if given not in choices:
        raise InvalidArgumentError(f"{function}: {name}: expected {' or '.join(choices)}, got {given}")
    return choices[given]


def _typed(result: Tensor, dtype: torch.dtype, given: Tensor | None) -> Tensor:
    """A result that was allocated as bytes, in its dtype."""
    return result.view(dtype) if given is None else given


def _as_tensor(function: str, scale: Tensor | float, like: Tensor) -> Tensor:
    """A global scale as the ops take it. A number is checked: it costs no synchronisation."""
    if isinstance(scale, Tensor):
        return scale
    scale = host_values.scale(function, "global_scale", scale)
    return torch.full((1,), scale, dtype=torch.float32, device=like.device)


def _check_columns(function: str, x: Tensor, intermediate_size: int) -> None:
    if x.dim() != 2 or x.shape[1] != 2 * intermediate_size:
        raise InvalidArgumentError(
            f"{function}: x: expected [rows, {2 * intermediate_size}], twice intermediate_size, got {list(x.shape)}"
        )
