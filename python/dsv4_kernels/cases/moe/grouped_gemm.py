"""Cases of moe_grouped_gemm and moe_grouped_gemm_quantized."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from dsv4_kernels.cases import Baseline, Case, Verdict, code_tables, conversions, is_poison, named, to_cpu
from dsv4_kernels.cases.moe import definitions
from dsv4_kernels.cases.moe.definitions import swizzled_positions
from dsv4_kernels.cases.moe.quantize import baseline_scales, encode_mx, encode_nvfp4, unpack
from dsv4_kernels.cases.moe.routing import uniform_ids
from dsv4_kernels.moe.formats import E4M3
from dsv4_kernels.moe.interleaved_weights import PAIR_ROWS, interleave_weights
from dsv4_kernels.moe.routing import max_tiles
from dsv4_kernels.ops import OPS
from dsv4_kernels.presets import PRESETS, Preset

# Of a sum of K products on tensor cores, over the sum of their sizes: they align addends and truncate, and a sum of
# thousands of products is a chain of as many such steps as fit.
SUM_ERROR = 2.0**-16


def bfloat16_weights(weight: Tensor, scale: Tensor) -> Tensor:
    """One expert's weights of either layout, [N, K] bfloat16."""
    if weight.dtype != torch.int32:
        return bfloat16_values(weight, scale)
    codes, factors = decoded_words(weight, scale)
    return (codes * factors * 2.0**8).flatten(1)


def decoded_words(words: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """One expert's interleaved weights as bfloat16: codes times 2^-126 [N, blocks, 2, 2, 4, 8] and what they are to be
    multiplied by, but for 2^8, in the same shape. With masks and rotations, as kernels do it.

    The dimensions of K are block, half, group of 32, pair and place.
    """
    bits = words.to(torch.int64) & 0xFFFFFFFF
    mask = 0x81C081C0
    pairs = [bits & mask] + [((bits >> by) | (bits << (32 - by))) & mask for by in (3, 6)]
    pairs.append(((bits & 0x001B001B) * 0x4108) & mask)
    stacked = torch.stack(pairs, dim=-1)
    stacked = (stacked - ((stacked >> 31) << 32)).to(torch.int32)
    blocks, rows = words.shape[:2]
    # [blocks, rows, place, group, half, pair, code]
    codes = stacked.view(torch.bfloat16).reshape(blocks, rows, 4, 2, 2, 4, 2).permute(1, 0, 4, 3, 5, 2, 6)
    # [blocks, rows, factors of a half, half]: a factor for 4 or for 2 pairs
    factor = factors.contiguous().view(torch.bfloat16).reshape(blocks, rows, 2, -1, 2).permute(1, 0, 4, 2, 3)
    factor = factor.repeat_interleave(4 // factor.shape[-1], dim=-1)[..., None]
    return codes.reshape(rows, blocks, 2, 2, 4, 8), factor.expand(rows, blocks, 2, 2, 4, 8)


def bfloat16_values(codes: Tensor, scale: Tensor | None) -> Tensor:
    """Dequantised to bfloat16, which holds every product of an FP4 code and a scale."""
    if codes.dtype == torch.bfloat16 or scale is None:
        return codes
    if codes.dtype == torch.float8_e4m3fn:
        values = codes.to(torch.bfloat16)
    else:
        values = conversions.decode_e2m1(codes.view(torch.uint8)).to(torch.bfloat16)
    if scale.dtype == torch.float8_e4m3fn:
        factor = scale.to(torch.bfloat16)
    else:
        factor = (scale.view(torch.uint8).to(torch.int16) << 7).view(torch.bfloat16)
    result: Tensor = (values.reshape(*factor.shape, -1) * factor[..., None]).flatten(-2)
    return result


def baseline_gemm(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    tile_to_expert: Tensor,
    row_to_slot: Tensor,
    x_scale: Tensor | None,
    alpha: Tensor | None,
    slot_weights: Tensor | None,
    top_k: int,
    swiglu: bool,
    limit: float,
) -> tuple[Tensor, ...]:
    """As an engine without such a kernel: expert after expert dequantised, then a bfloat16 product; no host sync."""
    tiles = tile_to_expert.shape[0]
    columns = weight.shape[-2] // 2 if swiglu else weight.shape[-2]
    interleaved = weight.dtype == torch.int32
    out = x.new_zeros((row_to_slot.shape[0], columns), dtype=torch.bfloat16)
    slot = row_to_slot.to(torch.int64)
    source = slot // top_k if top_k else torch.arange(slot.numel(), device=slot.device)
    present = (slot >= 0) & (source < x.shape[0])
    source = torch.where(present, source, 0)
    for tile in range(tiles):
        rows = slice(tile * (row_to_slot.shape[0] // tiles), (tile + 1) * (row_to_slot.shape[0] // tiles))
        expert = tile_to_expert[tile : tile + 1].to(torch.int64).clamp(0, weight.shape[0] - 1)
        taken = x.view(torch.uint8)[source[rows]].view(x.dtype)
        taken_scale = None if x_scale is None else x_scale.view(torch.uint8)[source[rows]].view(x_scale.dtype)
        values = bfloat16_values(taken, taken_scale)
        scales = weight_scale.view(torch.uint8)[expert][0].view(weight_scale.dtype)
        weights = bfloat16_weights(weight.view(torch.uint8)[expert][0].view(weight.dtype), scales)
        result = (values @ weights[:, : values.shape[1]].T).to(torch.float32)
        factor = torch.ones_like(result[0, :1]) if alpha is None else alpha[expert].reshape(-1)
        if swiglu:
            halves = result.unflatten(1, (-1, 2, PAIR_ROWS if interleaved else columns))
            gate, up = halves[:, :, 0].flatten(1) * factor[0], halves[:, :, 1].flatten(1) * factor[-1]
            if limit > 0:
                gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            result = torch.nn.functional.silu(gate) * up
        else:
            result = result * factor[0]
        if slot_weights is not None:
            slots = torch.where(present[rows], row_to_slot[rows], 0).to(torch.int64)
            result = result * slot_weights.reshape(-1)[slots, None]
        out[rows] = result.to(torch.bfloat16)
    return (out,)


def exact_and_allowed(given: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Of moe_grouped_gemm's arguments on the CPU: results in float64, the error that rounding to bfloat16 and SUM_ERROR
    of the operands' sizes allow, and which rows there are.
    """
    x, weight, weight_scale, tile_to_expert, row_to_slot, x_scale, alpha, weights, top_k, swiglu, limit = given
    count, interleaved = row_to_slot.shape[0], weight.dtype == torch.int32
    rows = definitions.rows_of_tiles(tile_to_expert, row_to_slot, top_k, x.shape[0], weight.shape[0])
    operands = (x, weight, weight_scale, x_scale, rows, count)
    exact, sizes = definitions.products(*operands), definitions.products(*operands, absolute=True)
    written = torch.zeros(count, dtype=torch.bool, device="cpu")
    factor, slot_weight = (
        torch.ones((count, 2), dtype=torch.float64, device="cpu"),
        torch.ones((count, 1), dtype=torch.float64, device="cpu"),
    )
    for row, slot, _, expert in rows:
        written[row] = True
        if alpha is not None:
            factor[row] = alpha[expert].to(torch.float64)  # one for both, or one each
        if weights is not None:
            slot_weight[row] = weights.flatten()[slot]

    if not swiglu:
        exact, sizes = exact * factor[:, :1], sizes * factor[:, :1].abs()
    else:
        gate, up = definitions.gate_and_up(exact, interleaved)
        exact = definitions.swiglu(gate * factor[:, :1], up * factor[:, 1:], limit)
        gate, up = definitions.gate_and_up(sizes, interleaved)
        gate, up = gate * factor[:, :1].abs(), up * factor[:, 1:].abs()
        # SwiGLU's derivatives are at most 1.1 times the other factor.
        bound = limit if limit > 0 else torch.inf
        sizes = 2.2 * gate.clamp(max=1e30) * up.clamp(max=bound) + up * gate.clamp(max=bound)
    exact, sizes = exact * slot_weight, sizes * slot_weight.abs()
    return exact, exact.abs() * 2.0**-8 + sizes * SUM_ERROR + 2.0**-126, written


def check_gemm(arguments: tuple[Any, ...], results: tuple[Tensor, ...], baseline: tuple[Tensor, ...]) -> Verdict:
    """Against float64; padding stays poisoned."""
    exact, allowed, written = exact_and_allowed(to_cpu(arguments))
    touched = int((~is_poison(results[0][~written])).sum())
    if touched:
        return Verdict(float(touched), 0.0, "touched elements")
    error = ((results[0].to(torch.float64) - exact).abs() / allowed)[written]
    return Verdict(float(error.max()) if error.numel() else 0.0, 1.0, "error over what rounding allows")


def of_product(arguments: tuple[Any, ...]) -> tuple[Any, Tensor | None, bool]:
    """moe_grouped_gemm's arguments of moe_grouped_gemm_quantized's; the global scale; whether scales are swizzled."""
    given = named("moe_grouped_gemm_quantized", arguments)._asdict()
    global_scale, swizzle = given.pop("global_scale"), given.pop("swizzle")
    return OPS["moe_grouped_gemm"].inputs(**given, swiglu=True), global_scale, swizzle


def baseline_quantized(*arguments: Any) -> tuple[Tensor, ...]:
    """As an engine without such a kernel: products into bfloat16, then quantised."""
    product, global_scale, swizzle = of_product(arguments)
    (values,) = baseline_gemm(*product)
    wide = values.to(torch.float32)
    data, scale = baseline_codes(wide, global_scale)
    return data, baseline_scales(scale, swizzle, None)


def baseline_codes(values: Tensor, global_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Bytes of codes and of scales, one row after another: NVFP4 under a global scale, without one MXFP8."""
    if global_scale is None:
        return encode_mx(values, E4M3, True, 0.0, True)
    return encode_nvfp4(values, global_scale, None, False, True, 0.0)


def check_quantized(arguments: tuple[Any, ...], results: tuple[Tensor, ...], baseline: tuple[Tensor, ...]) -> Verdict:
    """Scales and codes are right for some bfloat16 values that the product may give; codes under the scale they have.

    What has no row: codes and scales stay poisoned, swizzled scales are 0.
    """
    product, global_scale, swizzle = of_product(to_cpu(arguments))
    exact, allowed, written = exact_and_allowed(product)
    data, scale = (result.view(torch.uint8) for result in results)
    groups = exact.shape[1] // (32 if global_scale is None else 16)
    if swizzle:
        places = swizzled_positions(exact.shape[0], groups)
        rows, padding = scale.flatten()[places], scale.flatten().clone()
        padding[places[written]] = 0
        wrong = int((padding != 0).sum())
    else:
        rows, wrong = scale, int((~is_poison(scale[~written])).sum())
    wrong += int((~is_poison(data[~written])).sum())
    low, high = exact[written] - allowed[written], exact[written] + allowed[written]
    # Least and largest magnitudes in turn give the least and the largest scales.
    least = torch.where((low < 0) & (high > 0), 0.0, torch.minimum(low.abs(), high.abs()))
    largest = torch.maximum(low.abs(), high.abs())
    got = rows[written]
    bounds = [baseline_codes(size.to(torch.float32), global_scale)[1] for size in (least, largest)]
    wrong += int(((got < bounds[0]) | (got > bounds[1])).sum())
    fp4 = global_scale is not None
    if global_scale is not None:
        decoded = code_tables.decode_e4m3(got).to(torch.float32)
        factor = torch.where(decoded == 0, 0.0, 1.0 / (decoded * global_scale.reshape(-1)))
    else:
        factor = 1.0 / code_tables.decode_e8m0(got)
    codes = []
    for values in (low, high):
        scaled = (values * factor.to(torch.float64).repeat_interleave(exact.shape[1] // groups, dim=1)).float()
        nearest = code_tables.nearest(scaled, code_tables.E2M1 if fp4 else code_tables.E4M3)
        codes.append(code_tables.pack(nearest) if fp4 else nearest)
    at_least, at_most, found = (unpack(value, fp4) for value in (*codes, data[written]))
    wrong += int(((found < at_least) | (found > at_most)).sum())
    return Verdict(float(wrong), 0.0, "wrong or touched bytes")


def gemm_bytes(
    x: Tensor, weight: Tensor, weight_scale: Tensor, tile_to_expert: Tensor, row_to_slot: Tensor,
    x_scale: Tensor | None, alpha: Tensor | None, slot_weights: Tensor | None, top_k: int, swiglu: bool, limit: float,
) -> int:  # fmt: skip
    """Weights of the experts that a tile has, each once; rows in and out once."""
    experts: int = tile_to_expert[tile_to_expert >= 0].unique().numel()
    rows = int((row_to_slot >= 0).sum())
    columns = weight.shape[-2] // 2 if swiglu else weight.shape[-2]
    of_expert = (weight.nbytes + weight_scale.nbytes) // weight.shape[0]
    return experts * of_expert + min(rows, x.shape[0]) * x.shape[1] * x.element_size() + rows * columns * 2


def quantized_bytes(*arguments: Any) -> int:
    """As gemm_bytes, with codes and scales written in place of bfloat16."""
    product, global_scale, _ = of_product(arguments)
    rows = int((product.row_to_slot >= 0).sum())
    columns: int = product.weight.shape[-2] // 2
    written = columns + columns // 32 if global_scale is None else columns // 2 + columns // 16
    return gemm_bytes(*product) + rows * (written - 2 * columns)


# Hundreds of tiles in a Python loop: unrolled, torch.compile would take minutes for each problem.
GEMM = Baseline(torch.compiler.disable(baseline_gemm), check_gemm, gemm_bytes)
QUANTIZED = Baseline(torch.compiler.disable(baseline_quantized), check_quantized, quantized_bytes)


def random_weights(experts: int, rows: int, inner: int, nvfp4: bool, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Codes of every value; scales that make weights of a trained layer's size, a few units of 1/64."""
    codes = torch.randint(256, (experts, rows, inner // 2), generator=generator, dtype=torch.uint8, device="cpu")
    if nvfp4:
        scale = torch.randint(
            0x08, 0x20, (experts, rows, inner // 16), generator=generator, dtype=torch.uint8, device="cpu"
        )
        return codes, scale.view(torch.float8_e4m3fn)
    return codes, torch.randint(
        118, 122, (experts, rows, inner // 32), generator=generator, dtype=torch.uint8, device="cpu"
    )


def gemm_case(
    name: str,
    tokens: int,
    experts: int,
    columns: int,
    inner: int,
    tile_size: int,
    x_format: str = "bfloat16",
    nvfp4: bool = False,
    top_k: int = 2,
    swiglu: bool = False,
    limit: float = 0.0,
    alphas: int = 0,
    weighted: bool = False,
    from_slots: bool = True,
    dropped: float = 0.1,
    benched: bool = False,
    interleaved: bool = False,
) -> Case:
    """dropped: the share of slots without an expert. from_slots: rows are taken from tokens; else x has a row for each
    expert row, as in the second product. interleaved: the weights' layout.

    Benched cases have the same weights in every expert, each in memory of its own: drawn in a hundredth of the time.
    """

    def make(generator: torch.Generator) -> tuple[Any, ...]:
        ids = uniform_ids(tokens, experts, top_k, generator)
        ids[torch.rand(ids.shape, generator=generator, dtype=torch.float32, device="cpu") < dropped] = -1
        tiles = max_tiles(ids.numel(), experts, tile_size)
        routes = definitions.sorted_routes(ids, experts, tile_size, 0, tiles)
        rows = columns * (2 if swiglu else 1)
        weight, scale = random_weights(1 if benched else experts, rows, inner, nvfp4, generator)
        if interleaved:
            weight, scale = interleave_weights(weight, scale, gate_and_up=swiglu)
        if benched:
            each = (experts, *[1] * (weight.dim() - 1))
            weight, scale = weight.repeat(each), scale.view(torch.uint8).repeat(each).view(scale.dtype)
        x_rows = tokens if from_slots else routes[2].numel()
        x_scale = None
        if x_format == "bfloat16":
            x = torch.randn(x_rows, inner, generator=generator, dtype=torch.float32, device="cpu").to(torch.bfloat16)
        elif x_format == "nvfp4":
            x, x_scale = (tensor[0] for tensor in random_weights(1, x_rows, inner, True, generator))
        else:
            x = torch.randn(x_rows, inner, generator=generator, dtype=torch.float32, device="cpu").to(
                torch.float8_e4m3fn
            )
            x_scale = torch.randint(
                124, 130, (x_rows, inner // 32), generator=generator, dtype=torch.uint8, device="cpu"
            )
        alpha = (
            torch.rand(experts, *((2,) if alphas == 2 else ()), generator=generator, dtype=torch.float32, device="cpu")
            + 0.5
            if alphas
            else None
        )
        weights = (
            torch.rand(tokens, top_k, generator=generator, dtype=torch.float32, device="cpu") if weighted else None
        )
        k = top_k if from_slots else 0
        return x, weight, scale, routes[0], routes[2], x_scale, alpha, weights, k, swiglu, limit

    return Case(
        "moe_grouped_gemm",
        f"{name}, {tokens} tokens",
        make,
        GEMM,
        benched=benched,
        large=benched,
        labels={"tokens": tokens, "columns": columns, "inner": inner, "experts": experts},
    )


def quantized_case(
    name: str,
    tokens: int,
    experts: int,
    columns: int,
    inner: int,
    tile_size: int,
    nvfp4: bool,
    *,
    swizzle: bool = False,
    **options: Any,
) -> Case:
    """gemm_case with SwiGLU of NVFP4 or MXFP8, its results quantised; NVFP4 under the scale of values up to 8."""
    x_format = "nvfp4" if nvfp4 else "mxfp8"
    case = gemm_case(name, tokens, experts, columns, inner, tile_size, x_format, nvfp4, swiglu=True, **options)

    def make(generator: torch.Generator) -> tuple[Any, ...]:
        *maps, x_scale, alpha, weights, top_k, _, limit = case.make(generator)
        global_scale = torch.tensor([8.0 / (6 * 448)], dtype=torch.float32, device="cpu") if nvfp4 else None
        return (*maps, x_scale, global_scale, alpha, weights, top_k, limit, swizzle)

    return dataclasses.replace(case, op="moe_grouped_gemm_quantized", make=make, baseline=QUANTIZED)


def preset_cases(preset: Preset, tokens: int, tile_size: int, nvfp4: bool = False) -> tuple[Case, Case]:
    """Both products of a layer."""
    hidden, inter = preset.hidden_size, preset.expert_intermediate
    name = f"{preset.name}, {'NVFP4' if nvfp4 else 'MXFP4'}"
    common: dict[str, Any] = {"nvfp4": nvfp4, "top_k": preset.top_k, "dropped": 0.0, "benched": True}
    common["interleaved"] = True
    first = gemm_case(
        f"{name}, SwiGLU", tokens, preset.experts, inter, hidden, tile_size, swiglu=True, limit=10.0, **common
    )
    second = gemm_case(f"{name}, second", tokens, preset.experts, hidden, inter, tile_size, from_slots=False, **common)
    return first, second


def quantized_preset_case(preset: Preset, tokens: int, tile_size: int, nvfp4: bool) -> Case:
    """The first product of a layer with quantised activations."""
    return quantized_case(
        f"{preset.name}, {'NVFP4' if nvfp4 else 'MXFP8'}",
        tokens,
        preset.experts,
        preset.expert_intermediate,
        preset.hidden_size,
        tile_size,
        nvfp4,
        top_k=preset.top_k,
        limit=10.0,
        dropped=0.0,
        benched=True,
    )


FLASH = PRESETS["v4-flash"]

CASES = (
    gemm_case("no padding", 16, 1, 64, 64, 16, top_k=1, dropped=0.0),
    gemm_case("W4A16 MXFP4 SwiGLU", 9, 4, 64, 192, 16, swiglu=True, limit=1.5, alphas=2, weighted=True),
    gemm_case("W4A16 MXFP4, tiles of 64", 70, 2, 64, 128, 64, alphas=1, from_slots=False),
    gemm_case("W4A16 MXFP4 SwiGLU, tiles of 64", 50, 2, 64, 64, 64, swiglu=True),
    gemm_case("W4A16 MXFP4, tiles of 128", 80, 2, 64, 64, 128),
    gemm_case("W4A16 MXFP4 SwiGLU, tiles of 128", 80, 2, 64, 64, 128, swiglu=True, limit=2.0),
    gemm_case("W4A16 NVFP4", 9, 3, 128, 192, 16, nvfp4=True, alphas=1, weighted=True),
    gemm_case("W4A16 NVFP4 SwiGLU", 9, 3, 64, 128, 16, nvfp4=True, swiglu=True, alphas=1),
    gemm_case("W4A16 NVFP4, tiles of 64", 50, 2, 64, 64, 64, nvfp4=True),
    gemm_case("W4A16 NVFP4 SwiGLU, tiles of 64", 50, 2, 64, 64, 64, nvfp4=True, swiglu=True),
    gemm_case("W4A16 NVFP4, tiles of 128", 80, 2, 64, 64, 128, nvfp4=True),
    gemm_case("W4A16 NVFP4 SwiGLU, tiles of 128", 80, 2, 64, 64, 128, nvfp4=True, swiglu=True),
    gemm_case("no padding, interleaved", 16, 1, 128, 128, 16, top_k=1, dropped=0.0, interleaved=True),
    gemm_case(
        "interleaved MXFP4 SwiGLU", 9, 3, 64, 384, 16, swiglu=True, limit=1.5, alphas=2, weighted=True, interleaved=True
    ),
    gemm_case("interleaved MXFP4, tiles of 64", 50, 2, 256, 128, 64, alphas=1, from_slots=False, interleaved=True),
    gemm_case("interleaved MXFP4 SwiGLU, tiles of 64", 50, 2, 64, 128, 64, swiglu=True, interleaved=True),
    gemm_case("interleaved MXFP4, tiles of 128", 80, 2, 384, 128, 128, interleaved=True),
    gemm_case("interleaved MXFP4 SwiGLU, tiles of 128", 80, 2, 64, 128, 128, swiglu=True, limit=2.0, interleaved=True),
    gemm_case("interleaved NVFP4", 9, 2, 128, 256, 16, nvfp4=True, alphas=1, weighted=True, interleaved=True),
    gemm_case("interleaved NVFP4 SwiGLU", 9, 2, 128, 128, 16, nvfp4=True, swiglu=True, alphas=1, interleaved=True),
    gemm_case("interleaved NVFP4, half full tiles of 64", 20, 2, 128, 128, 64, nvfp4=True, interleaved=True),
    gemm_case("interleaved NVFP4 SwiGLU, tiles of 64", 50, 2, 64, 128, 64, nvfp4=True, swiglu=True, interleaved=True),
    gemm_case(
        "interleaved NVFP4, tiles of 128 less than a quarter full", 20, 2, 128, 128, 128, nvfp4=True, interleaved=True
    ),
    gemm_case(
        "interleaved NVFP4 SwiGLU, half full tiles of 128",
        50,
        2,
        64,
        128,
        128,
        nvfp4=True,
        swiglu=True,
        interleaved=True,
    ),
    gemm_case("W4A4", 9, 3, 192, 192, 16, "nvfp4", nvfp4=True, alphas=1),
    gemm_case("W4A4 SwiGLU", 9, 3, 64, 128, 16, "nvfp4", nvfp4=True, swiglu=True, limit=3.0, alphas=2),
    gemm_case("W4A4, tiles of 64", 50, 2, 64, 128, 64, "nvfp4", nvfp4=True, from_slots=False),
    gemm_case("W4A4 SwiGLU, tiles of 64", 50, 2, 64, 64, 64, "nvfp4", nvfp4=True, swiglu=True),
    gemm_case("W4A4, tiles of 128", 80, 2, 64, 64, 128, "nvfp4", nvfp4=True),
    gemm_case("W4A4 SwiGLU, tiles of 128", 80, 2, 64, 64, 128, "nvfp4", nvfp4=True, swiglu=True),
    gemm_case("W4A8", 9, 3, 192, 192, 16, "mxfp8", alphas=1),
    gemm_case("W4A8 SwiGLU", 9, 3, 64, 128, 16, "mxfp8", swiglu=True, limit=3.0, weighted=True),
    gemm_case("W4A8, tiles of 128", 80, 2, 64, 64, 128, "mxfp8", from_slots=False),
    gemm_case("W4A8 SwiGLU, tiles of 128", 80, 2, 64, 64, 128, "mxfp8", swiglu=True),
    quantized_case("NVFP4, no padding", 16, 1, 64, 64, 16, True, top_k=1, dropped=0.0),
    quantized_case("NVFP4", 9, 3, 128, 128, 16, True, limit=3.0, alphas=2, weighted=True),
    quantized_case("NVFP4, swizzle", 20, 3, 192, 192, 16, True, alphas=1, swizzle=True),
    quantized_case("NVFP4, tiles of 64", 50, 2, 64, 64, 64, True),
    quantized_case("NVFP4, tiles of 64, swizzle", 50, 2, 64, 64, 64, True, swizzle=True),
    quantized_case("NVFP4, tiles of 128", 80, 2, 64, 64, 128, True, swizzle=True, weighted=True),
    quantized_case("MXFP8", 9, 3, 192, 128, 16, False, limit=3.0, weighted=True),
    quantized_case("MXFP8, swizzle", 20, 3, 192, 192, 16, False, alphas=2, swizzle=True),
    quantized_case("MXFP8, tiles of 128", 80, 2, 64, 64, 128, False),
    quantized_case("MXFP8, tiles of 128, swizzle", 80, 2, 64, 64, 128, False, swizzle=True),
    *preset_cases(FLASH, 1, 16),
    *preset_cases(FLASH, 128, 16),
    *preset_cases(FLASH, 128, 16, nvfp4=True),
    *preset_cases(FLASH, 8192, 128),
    *preset_cases(FLASH, 8192, 128, nvfp4=True),
    *(
        quantized_preset_case(FLASH, tokens, tile_size, nvfp4)
        for nvfp4 in (True, False)
        for tokens, tile_size in ((128, 16), (8192, 128))
    ),
)
