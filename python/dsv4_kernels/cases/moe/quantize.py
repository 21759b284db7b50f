"""Cases of the quantising ops, and the same computations as an engine would write them in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dsv4_kernels.cases import Baseline, Case, Verdict, is_poison, to_cpu
from dsv4_kernels.moe.formats import DEINTERLEAVE, E2M1, E4M3, PLAIN, SWIGLU
from dsv4_kernels.ops import OPS

# Halfway between E2M1 values. A tie goes to the lower code at those of even index, where that is the even code; at the
# others the bound lies just below.
MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
L2_BYTES = 40 << 20  # what a second read of surely finds nothing of in a cache, when it is more
# Relative error of SwiGLU in float32 with approximate exponential and quotient, for arguments up to 16 in size.
SWIGLU_ERROR = 2.0**-18

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

Run = Callable[..., tuple[Tensor, ...]]


@cache
def constant(device: torch.device, *values: float) -> Tensor:
    """A float32 tensor that is copied to the device once: a captured graph cannot."""
    return torch.tensor(values, device=device, dtype=torch.float32)


def number(like: Tensor, value: float) -> Tensor:
    """As a tensor, by which torch really divides: by a number it multiplies with the reciprocal."""
    return constant(like.device, value)[0]


def baseline_e2m1(values: Tensor, ties_to_even: bool = True) -> Tensor:
    below = (0.25, 0.75 - 2.0**-24, 1.25, 1.75 - 2.0**-23, 2.5, 3.5 - 2.0**-22, 5.0)
    bounds = constant(values.device, *(below if ties_to_even else MIDPOINTS))
    codes = torch.bucketize(values.abs(), bounds).to(torch.uint8) + 8 * values.signbit().to(torch.uint8)
    codes = torch.where(values.isnan(), 7, codes)
    return codes[:, ::2] + 16 * codes[:, 1::2]


def baseline_e4m3(values: Tensor) -> Tensor:
    return values.clamp(-448.0, 448.0).to(torch.float8_e4m3fn)


def baseline_values(x: Tensor, source: int, granularity: int, limit: float, round_to_bfloat16: bool) -> Tensor:
    if source == PLAIN:
        return x.to(torch.float32)
    rows, width = x.shape
    pairs = x.view(rows, 1, 2, width // 2) if granularity == 0 else x.view(rows, -1, 2, granularity)
    gate, up = (pairs[:, :, i].reshape(rows, width // 2).to(torch.float32) for i in (0, 1))
    if source == DEINTERLEAVE:
        return gate
    if limit > 0:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    value = torch.nn.functional.silu(gate) * up
    return value.to(torch.bfloat16).to(torch.float32) if round_to_bfloat16 else value


def baseline_scales(scale: Tensor, swizzle: bool, n_used: Tensor | None) -> Tensor:
    """Bytes of scales in the order that is asked for."""
    scale = scale.view(torch.uint8)
    if not swizzle:
        return scale
    if n_used is not None:
        scale = torch.where(torch.arange(scale.shape[0], device=scale.device)[:, None] < n_used, scale, 0)
    rows, columns = scale.shape
    padded = torch.nn.functional.pad(scale, (0, -columns % 4, 0, -rows % 128))
    tiles = padded.view(padded.shape[0] // 128, 4, 32, padded.shape[1] // 4, 4)
    return tiles.permute(0, 3, 2, 1, 4).reshape(padded.shape)


def encode_nvfp4(
    values: Tensor, global_scale: Tensor, expert_ids: Tensor | None, reciprocal: bool, ties: bool, floor: float
) -> tuple[Tensor, Tensor]:
    """As the reference in vLLM's tests."""
    of_row = global_scale.reshape(-1, 1)
    valid = None
    if expert_ids is not None:
        valid = (expert_ids >= 0) & (expert_ids < of_row.shape[0])
        of_row = of_row[torch.where(valid, expert_ids, 0).to(torch.int64)]
    multiply = of_row if reciprocal else 1.0 / of_row
    divide = 1.0 / of_row if reciprocal else of_row
    blocks = values.view(values.shape[0], -1, 16)
    scale = baseline_e4m3((multiply * (blocks.abs().amax(dim=2) * (1.0 / 6.0))).clamp(min=floor))
    decoded = scale.to(torch.float32)
    factor = torch.where(decoded == 0, 0.0, 1.0 / (decoded * divide))
    data = baseline_e2m1((blocks * factor[:, :, None]).flatten(1), ties)
    scale = scale.view(torch.uint8)
    if valid is not None:
        data, scale = data * valid[:, None], scale * valid[:, None]
    return data, scale


def baseline_nvfp4(
    x: Tensor, global_scale: Tensor, expert_ids: Tensor | None, reciprocal: bool, source: int, granularity: int,
    limit: float, rounds: bool, ties: bool, floor: float, swizzle: bool, n_used: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    values = baseline_values(x, source, granularity, limit, rounds)
    data, scale = encode_nvfp4(values, global_scale, expert_ids, reciprocal, ties, floor)
    return data, baseline_scales(scale, swizzle, n_used)


def baseline_nvfp4_gpu_fused(
    x: Tensor, expert_ids: Tensor | None, experts: int, per_token: bool, reciprocal: bool, source: int,
    granularity: int, limit: float, rounds: bool, amax_floor: float, ties: bool, floor: float, swizzle: bool,
    n_used: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    values = baseline_values(x, source, granularity, limit, rounds)
    rows = values.abs().amax(dim=1)
    if per_token:
        amax = rows
    else:
        # Where nothing is used or belongs to an expert, a row of zeros stands in.
        index = torch.zeros(len(rows), dtype=torch.int64, device=x.device) if expert_ids is None else expert_ids.long()
        unused = torch.arange(len(rows), device=x.device) >= (len(rows) if n_used is None else n_used)
        count = max(experts, 1)
        index = torch.where(unused | (index < 0) | (index >= count), count, index)
        amax = rows.new_zeros(count + 1).scatter_reduce(0, index, rows, "amax")[:count]
    size, largest = amax.clamp(min=amax_floor), number(amax, 2688.0)
    scale = largest / size if reciprocal else size / largest
    data, block_scale = encode_nvfp4(values, scale, expert_ids, reciprocal, ties, floor)
    return data, baseline_scales(block_scale, swizzle, n_used), scale


def encode_mx(values: Tensor, form: int, up: bool, floor: float, ties: bool) -> tuple[Tensor, Tensor]:
    groups = values.view(values.shape[0], -1, 32)
    amax = groups.abs().amax(dim=2).clamp(min=floor)
    if up:
        quotient = amax / number(amax, 6.0 if form == E2M1 else 448.0)
        scale = ((quotient.view(torch.int32) + 0x7FFFFF) & 0x7F800000) >> 23
    else:
        scale = ((amax.view(torch.int32) >> 23) - (2 if form == E2M1 else 8)).clamp(min=0)
    scaled = torch.ldexp(groups.to(torch.float64), (127 - scale)[:, :, None]).to(torch.float32).flatten(1)
    codes = baseline_e2m1(scaled, ties) if form == E2M1 else baseline_e4m3(scaled).view(torch.uint8)
    return codes, scale.to(torch.uint8)


def baseline_mx(
    x: Tensor, form: int, source: int, granularity: int, limit: float, rounds: bool, up: bool, floor: float,
    ties: bool, swizzle: bool, n_used: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    data, scale = encode_mx(baseline_values(x, source, granularity, limit, rounds), form, up, floor, ties)
    return data, baseline_scales(scale, swizzle, n_used)


def baseline_fp8_per_token(x: Tensor, floor: float, divide: bool) -> tuple[Tensor, ...]:
    values = x.to(torch.float32)
    amax = values.abs().amax(dim=1)
    scale = (amax / number(amax, 448.0)).clamp(min=floor)
    scaled = values / scale[:, None] if divide else values * (1.0 / scale)[:, None]
    return baseline_e4m3(torch.where(scale[:, None] == 0, 0.0, scaled)).view(torch.uint8), scale


def baseline_dequantize(
    data: Tensor, scale: Tensor, global_scale: Tensor | None, expert_ids: Tensor | None, reciprocal: bool, form: int,
    scale_form: int, swizzle: bool, dtype: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    if form == E2M1:
        table = constant(data.device, *E2M1_VALUES, *(-value for value in E2M1_VALUES))
        values = torch.stack([table[(data & 15).long()], table[(data >> 4).long()]], dim=-1).flatten(1)
    else:
        values = data.view(torch.float8_e4m3fn).to(torch.float32)
    if scale_form == 2:
        blocks = scale[:, None]
    else:
        group = 16 if scale_form == 0 else 32
        decoded = scale.view(torch.float8_e4m3fn if scale_form == 0 else torch.float8_e8m0fnu).to(torch.float32)
        if swizzle:
            height, width = decoded.shape
            tiles = decoded.view(height // 128, width // 4, 32, 4, 4).permute(0, 3, 2, 1, 4)
            decoded = tiles.reshape(height, width)[: values.shape[0], : values.shape[1] // group]
        blocks = decoded.repeat_interleave(group, dim=1)
    values = values * blocks
    if global_scale is not None:
        of_row = global_scale.reshape(-1, 1)
        if expert_ids is not None:
            valid = (expert_ids >= 0) & (expert_ids < of_row.shape[0])
            of_row = torch.where(valid[:, None], of_row[torch.where(valid, expert_ids, 0).long()], 0.0)
        values = values * (torch.where(of_row == 0, 0.0, 1.0 / of_row) if reciprocal else of_row)
    return (values.to((torch.bfloat16, torch.float16, torch.float32)[dtype]),)


def named(op: str, arguments: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip(OPS[op].names, arguments, strict=True))


def written_rows(given: dict[str, Any], result: str) -> int:
    """Rows of a result that the op writes."""
    rows: int = given["x"].shape[0]
    used = rows if given.get("n_used") is None else min(max(int(given["n_used"]), 0), rows)
    if result == "out_scale" and given.get("swizzle"):
        return -(-used // 128) * 128
    return used if result != "out_global_scale" or given["per_token"] else max(given["experts"], 1)


def unpack(codes: Tensor, fp4: bool) -> Tensor:
    """Codes as integers that compare like their values."""
    wide = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1).int() if fp4 else codes.int()
    sign = 8 if fp4 else 128
    return torch.where(wide >= sign, sign - wide, wide)


def check_of(op: str) -> Callable[[tuple[Any, ...], tuple[Tensor, ...], tuple[Tensor, ...]], Verdict]:
    """To the bit, and rows that are not used must still be poisoned. What comes from SwiGLU must lie between what its
    values give when they are as much too small, and as much too large, as float32 may make them.
    """

    def verdict(arguments: tuple[Any, ...], results: tuple[Tensor, ...], baseline: tuple[Tensor, ...]) -> Verdict:
        given = named(op, to_cpu(arguments))
        if given.get("source") == SWIGLU:
            return check_swiglu(op, given, results)
        wrong = 0
        for name, result, expected in zip(OPS[op].results, results, baseline, strict=True):
            rows = written_rows(given, name)
            wrong += int((result[:rows].view(torch.uint8) != expected[:rows].view(torch.uint8)).sum())
            wrong += int((~is_poison(result[rows:])).sum())
        return Verdict(float(wrong), 0.0, "wrong or touched bytes")

    return verdict


def check_swiglu(op: str, given: dict[str, Any], results: tuple[Tensor, ...]) -> Verdict:
    """See check_of()."""
    x, limit = given["x"].to(torch.float64), given["limit"]
    rows, width = x.shape
    pairs = x.view(rows, 1, 2, width // 2) if given["granularity"] == 0 else x.view(rows, -1, 2, given["granularity"])
    gate, up = (pairs[:, :, i].reshape(rows, width // 2) for i in (0, 1))
    if limit > 0:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    exact = gate * torch.sigmoid(gate) * up
    bounds = []
    for error in (-SWIGLU_ERROR, SWIGLU_ERROR):
        value = (exact * (1 + error)).to(torch.float32)
        value = value.to(torch.bfloat16).to(torch.float32) if given["round_to_bfloat16"] else value
        changed = {"x": value, "source": PLAIN, "granularity": 0, "limit": 0.0, "swizzle": given["swizzle"]}
        bounds.append(BASELINES[op].run(*(given | changed).values()))
    fp4 = given.get("element_format", E2M1) == E2M1
    wrong = 0
    for name, result, low, high in zip(OPS[op].results, results, *bounds, strict=True):
        count = written_rows(given, name)
        if name == "out":
            codes, one, two = (unpack(t, fp4) for t in (result, low, high))
        else:
            codes, one, two = (t.to(torch.float64) for t in (result, low, high))
        outside = (codes < torch.minimum(one, two)) | (codes > torch.maximum(one, two))
        if name == "out" and not given["swizzle"]:  # under another scale codes are others
            group = codes.shape[1] // results[1].shape[1]
            outside &= (bounds[0][1] == bounds[1][1]).repeat_interleave(group, dim=1)
        wrong += int(outside[:count].sum()) + int((~is_poison(result[count:])).sum())
    return Verdict(float(wrong), 0.0, "codes outside of what rounding allows")


def moved_bytes(op: str) -> Callable[..., int]:
    """Reads of the values, and writes of codes and scales, of the rows that are used.

    What is larger than a cache must be read twice for an amax of all of it.
    """

    def count(*arguments: Any) -> int:
        given = named(op, arguments)
        first = arguments[0]
        used: int = first.shape[0] if given.get("n_used") is None else int(given["n_used"])
        read: int = used * first.shape[1] * first.element_size()
        if op == "dequantize_blocks":
            read += given["scale"].numel() * given["scale"].element_size()
        if op == "quantize_nvfp4_gpu_fused" and not given["per_token"] and read > L2_BYTES:
            read *= 2
        written = sum(result.nbytes for result in OPS[op].allocate(arguments))
        return int(read + written * used // max(int(first.shape[0]), 1))

    return count


RUNS: dict[str, Run] = {
    "quantize_nvfp4": baseline_nvfp4,
    "quantize_nvfp4_gpu_fused": baseline_nvfp4_gpu_fused,
    "quantize_mx": baseline_mx,
    "quantize_fp8_per_token": baseline_fp8_per_token,
}
BASELINES = {op: Baseline(run, check_of(op), moved_bytes(op)) for op, run in RUNS.items()}


def check_dequantize(arguments: tuple[Any, ...], results: tuple[Tensor, ...], baseline: tuple[Tensor, ...]) -> Verdict:
    """To the bit: plain torch multiplies in the same order."""
    wrong = results[0].view(torch.uint8) != baseline[0].view(torch.uint8)
    return Verdict(float(wrong.sum()), 0.0, "wrong bytes")


BASELINES["dequantize_blocks"] = Baseline(baseline_dequantize, check_dequantize, moved_bytes("dequantize_blocks"))

LARGE = (16384, 7168)  # 224 MiB of bfloat16
SMALL = ((1, 7168), (64, 7168))


def wide_values(generator: torch.Generator, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Rows of very different sizes, a block of zeros and one of equal values among them."""
    size = 2.0 ** torch.randint(-6, 7, (rows, 1), generator=generator, dtype=torch.float32, device="cpu")
    x = torch.randn(rows, columns, generator=generator, dtype=torch.float32, device="cpu") * size
    x[0, :32], x[-1, -32:] = 0.0, 1.75
    return x.to(dtype)


def case(
    op: str, name: str, rows: int, columns: int, *, dtype: torch.dtype = torch.bfloat16, benched: bool = False,
    large: bool = False, launches: int = 1, used: int | None = None, experts: int = 0, scales: str = "",
    **options: Any,
) -> Case:  # fmt: skip
    """A case of an op with the table's defaults for what is not given."""

    def make(generator: torch.Generator) -> tuple[Any, ...]:
        width = columns if options.get("source", PLAIN) == PLAIN else 2 * columns
        given = {parameter.name: parameter.default_value for parameter in OPS[op].parameters} | options
        given["x"] = wide_values(generator, rows, width, dtype)
        if "global_scale" in given:
            count = experts or (rows if scales == "per row" else 1)
            given["global_scale"] = 10.0 ** -(
                torch.rand(count, generator=generator, dtype=torch.float32, device="cpu") + 1
            )
        if experts:
            given["expert_ids"] = torch.randint(
                -1, experts + 1, (rows,), generator=generator, dtype=torch.int32, device="cpu"
            )
            if "experts" in given:
                given["experts"] = experts
        if used is not None:
            given["n_used"] = torch.tensor(used, dtype=torch.int32, device="cpu")
        return tuple(given.values())

    labels = {"rows": rows, "columns": columns}
    return Case(op, name, make, BASELINES[op], benched, launches, large, labels)


def dequantize_case(
    name: str, rows: int, columns: int, *, benched: bool = False, large: bool = False, experts: int = 0,
    has_global: bool = True, **options: Any,
) -> Case:  # fmt: skip
    def make(generator: torch.Generator) -> tuple[Any, ...]:
        given = {parameter.name: parameter.default_value for parameter in OPS["dequantize_blocks"].parameters} | options
        width = columns // (1 + given["element_format"])
        data = torch.randint(256, (rows, width), generator=generator, dtype=torch.uint8, device="cpu")
        if given["element_format"] == E4M3:
            data[(data & 127) == 127] = 0  # no NaN: its sign and payload are not part of the format
        given["data"] = data
        if given["scale_format"] == 2:
            given["scale"] = torch.rand(rows, generator=generator, dtype=torch.float32, device="cpu")
        else:
            group = 16 if given["scale_format"] == 0 else 32
            shape = (rows, columns // group)
            if given["swizzle"]:
                shape = (-(-rows // 128) * 128, -(-shape[1] // 4) * 4)
            given["scale"] = torch.randint(100, 127, shape, generator=generator, dtype=torch.uint8, device="cpu")
        if has_global:
            given["global_scale"] = (
                torch.rand(experts or 1, generator=generator, dtype=torch.float32, device="cpu") + 0.1
            )
        if experts:
            given["expert_ids"] = torch.randint(
                -1, experts + 1, (rows,), generator=generator, dtype=torch.int32, device="cpu"
            )
        return tuple(given.values())

    labels = {"rows": rows, "columns": columns}
    return Case("dequantize_blocks", name, make, BASELINES["dequantize_blocks"], benched, large=large, labels=labels)


FP16, FP32 = torch.float16, torch.float32
CASES = (
    case("quantize_nvfp4", "16384 x 7168", *LARGE, benched=True, large=True),
    case("quantize_nvfp4", "16384 x 7168, swizzle", *LARGE, swizzle=True, benched=True, large=True),
    case("quantize_nvfp4", "16384 x 3072, swiglu, swizzle", 16384, 3072, source=SWIGLU, limit=10.0, swizzle=True,
         benched=True, large=True),
    *(case("quantize_nvfp4", f"{rows} x {columns}", rows, columns, benched=True) for rows, columns in SMALL),
    case("quantize_nvfp4", "5 x 16, float32", 5, 16, dtype=FP32),
    case("quantize_nvfp4", "7 x 304, float16, per row, reciprocal", 7, 304, dtype=FP16, scales="per row",
         reciprocal_global_scale=True),
    case("quantize_nvfp4", "33 x 96, experts, ties toward zero", 33, 96, experts=4, ties_to_even=False),
    case("quantize_nvfp4", "130 x 80, swizzle", 130, 80, swizzle=True),
    case("quantize_nvfp4", "300 x 64, swizzle, 129 used", 300, 64, swizzle=True, used=129, experts=3),
    case("quantize_nvfp4", "9 x 64, 4 used", 9, 64, used=4, scale_floor=2.0**-6),
    case("quantize_nvfp4", "9 x 64, deinterleave by 4", 9, 64, source=DEINTERLEAVE, granularity=4),
    case("quantize_nvfp4", "9 x 128, deinterleave by 64, float32", 9, 128, source=DEINTERLEAVE, granularity=64,
         dtype=FP32),
    case("quantize_nvfp4", "17 x 96, swiglu by 8", 17, 96, source=SWIGLU, granularity=8, limit=1.5),
    case("quantize_nvfp4", "17 x 96, swiglu by 4, float16", 17, 96, source=SWIGLU, granularity=4, dtype=FP16,
         round_to_bfloat16=False),
    case("quantize_nvfp4_gpu_fused", "16384 x 7168", *LARGE, benched=True, large=True, launches=2),
    case("quantize_nvfp4_gpu_fused", "16384 x 7168, per token", *LARGE, per_token=True, benched=True, large=True),
    *(case("quantize_nvfp4_gpu_fused", f"{rows} x {columns}", rows, columns, benched=True, launches=min(rows, 2))
      for rows, columns in SMALL),
    case("quantize_nvfp4_gpu_fused", "64 x 7168, per token", 64, 7168, per_token=True, benched=True),
    case("quantize_nvfp4_gpu_fused", "3 x 16, float32", 3, 16, dtype=FP32, launches=2),
    case("quantize_nvfp4_gpu_fused", "70 x 112, experts", 70, 112, experts=5, launches=2),
    case("quantize_nvfp4_gpu_fused", "70 x 112, experts, 33 used, swizzle", 70, 112, experts=5, used=33, swizzle=True,
         reciprocal_global_scale=True, launches=2),
    case("quantize_nvfp4_gpu_fused", "11 x 80, per token, swizzle, 5 used", 11, 80, per_token=True, swizzle=True,
         used=5),
    case("quantize_nvfp4_gpu_fused", "7 x 128, deinterleave by 8, float16", 7, 128, source=DEINTERLEAVE, granularity=8,
         dtype=FP16, launches=2),
    case("quantize_nvfp4_gpu_fused", "7 x 128, deinterleave by 64, float32", 7, 128, source=DEINTERLEAVE,
         granularity=64, dtype=FP32, per_token=True),
    case("quantize_mx", "16384 x 7168", *LARGE, benched=True, large=True),
    case("quantize_mx", "16384 x 7168, FP4, swizzle", *LARGE, element_format=E2M1, swizzle=True, benched=True,
         large=True),
    *(case("quantize_mx", f"{rows} x {columns}", rows, columns, benched=True) for rows, columns in SMALL),
    case("quantize_mx", "5 x 32, float32", 5, 32, dtype=FP32),
    case("quantize_mx", "33 x 160, FP4, float16", 33, 160, element_format=E2M1, dtype=FP16,
         amax_floor=6 * 2.0**-126),
    case("quantize_mx", "130 x 96, swizzle, 120 used", 130, 96, swizzle=True, used=120, amax_floor=1e-4),
    case("quantize_mx", "9 x 64, FP4, OCP, ties toward zero", 9, 64, element_format=E2M1, round_scale_up=False,
         ties_to_even=False),
    case("quantize_mx", "9 x 64, OCP, deinterleave by 4", 9, 64, round_scale_up=False, source=DEINTERLEAVE,
         granularity=4),
    case("quantize_mx", "9 x 64, OCP, floor of the amax", 9, 64, round_scale_up=False, amax_floor=3.0),
    case("quantize_mx", "17 x 96, swiglu", 17, 96, source=SWIGLU, limit=2.0),
    case("quantize_mx", "17 x 128, FP4, swiglu by 64, float32", 17, 128, source=SWIGLU, granularity=64,
         element_format=E2M1, dtype=FP32),
    case("quantize_fp8_per_token", "16384 x 7168", *LARGE, benched=True, large=True),
    case("quantize_fp8_per_token", "64 x 7168", 64, 7168, benched=True),
    case("quantize_fp8_per_token", "9 x 4112, float16, divided", 9, 4112, dtype=FP16, divide=True),
    case("quantize_fp8_per_token", "33 x 48, float32", 33, 48, dtype=FP32, scale_floor=1e-2),
    dequantize_case("NVFP4, 16384 x 7168", *LARGE, benched=True, large=True),
    dequantize_case("NVFP4, 64 x 7168", 64, 7168, benched=True),
    dequantize_case("NVFP4, 130 x 80, experts, swizzle, float32", 130, 80, experts=3, swizzle=True, dtype=2,
                    reciprocal_global_scale=True),
    dequantize_case("MXFP4, 33 x 96, float16", 33, 96, scale_format=1, dtype=1, has_global=False),
    dequantize_case("MXFP8, 9 x 160, swizzle", 9, 160, element_format=E4M3, scale_format=1, swizzle=True,
                    has_global=False),
    dequantize_case("FP8 per token, 5 x 48", 5, 48, element_format=E4M3, scale_format=2, has_global=False),
)  # fmt: skip
