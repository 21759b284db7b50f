"""Cases of the activations over expert rows of which some are padding, quantising or not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv4_kernels.cases import Baseline, Case, Verdict, is_poison, to_cpu, worst_relative_error
from dsv4_kernels.cases.moe import definitions
from dsv4_kernels.cases.moe.definitions import held_rows, swizzled_positions
from dsv4_kernels.cases.moe.scale_layouts import baseline_swizzle
from dsv4_kernels.number_formats import LARGEST_E4M3

LIMIT = 10.0  # of the models' SwiGLU


def baseline_squared_relu(x: Tensor, permutation_map: Tensor, n_used: Tensor) -> tuple[Tensor, ...]:
    """As an engine would write it: every row, padding or not."""
    return (x.to(torch.float32).relu().square().to(torch.bfloat16),)


def baseline_swiglu(x: Tensor, permutation_map: Tensor, n_used: Tensor, limit: float) -> tuple[Tensor, ...]:
    gate, up = x.to(torch.float32).chunk(2, dim=-1)
    if limit:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return ((torch.nn.functional.silu(gate) * up).to(torch.bfloat16),)


def baseline_mxfp8(value: Tensor) -> tuple[Tensor, ...]:
    groups = value.to(torch.float32).unflatten(-1, (-1, 32))
    quotient = groups.abs().amax(dim=-1) / LARGEST_E4M3
    scale = (quotient.view(torch.int32) + 0x7FFFFF) >> 23
    codes = (groups * torch.exp2(127.0 - scale)[..., None]).to(torch.float8_e4m3fn)
    return codes.flatten(-2).view(torch.uint8), baseline_swizzle(scale.to(torch.uint8))[0]


def baseline_squared_relu_mxfp8(*arguments: Any) -> tuple[Tensor, ...]:
    return baseline_mxfp8(baseline_squared_relu(*arguments)[0])


def baseline_swiglu_mxfp8(*arguments: Any) -> tuple[Tensor, ...]:
    return baseline_mxfp8(baseline_swiglu(*arguments)[0])


def check_squared_relu(
    arguments: tuple[Any, ...], results: tuple[Tensor, ...], baseline: tuple[Tensor, ...]
) -> Verdict:
    """To the bit; rows that hold no token must still be poisoned."""
    _, permutation_map, n_used = to_cpu(arguments)
    held = held_rows(permutation_map, n_used)
    wrong = int((results[0][held].view(torch.int16) != baseline[0][held].view(torch.int16)).sum())
    wrong += int((~is_poison(results[0][~held])).sum())
    return Verdict(float(wrong), 0.0, "wrong or touched elements")


def check_swiglu(arguments: tuple[Any, ...], results: tuple[Tensor, ...], baseline: tuple[Tensor, ...]) -> Verdict:
    x, permutation_map, n_used, limit = to_cpu(arguments)
    held = held_rows(permutation_map, n_used)
    gate, up = x[held].chunk(2, dim=-1)
    exact = definitions.swiglu(gate, up, limit)
    if not is_poison(results[0][~held]).all():
        return Verdict(float("inf"), 0.0, "rows that hold no token were touched")
    allowed = 2 * worst_relative_error(baseline[0][held], exact)
    return Verdict(worst_relative_error(results[0][held], exact), allowed, "relative error")


def least_scale(largest: Tensor) -> Tensor:
    """The E8M0 byte of the least power of two that is at least largest / 448, from float64 mathematics."""
    mantissa, exponent = torch.frexp(largest.to(torch.float64) / LARGEST_E4M3)
    power = torch.where(mantissa == 0.5, exponent - 1, exponent)
    return torch.where(largest == 0, torch.zeros_like(power), power.clamp(min=-126) + 127)


def wrong_mxfp8(
    arguments: tuple[Any, ...], results: tuple[Tensor, ...], low: Tensor, high: Tensor, held: Tensor
) -> Verdict:
    """Counts codes and scales that are right for no values between low and high, [used rows, columns] float64."""
    data, scale = results
    rows, columns = data.shape
    unswizzled = scale.flatten()[swizzled_positions(rows, columns // 32).flatten()].view(rows, -1).to(torch.int64)
    of_padding = int(scale.sum(dtype=torch.int64) - unswizzled[held].sum())
    touched = int((~is_poison(data[~held])).sum())

    bounds = torch.stack((low, high)).abs().unflatten(-1, (-1, 32)).amax(dim=-1)
    smallest = torch.where((low < 0) & (high > 0), 0.0, torch.minimum(low.abs(), high.abs()))
    least = least_scale(smallest.unflatten(-1, (-1, 32)).amax(dim=-1))
    got = unswizzled[held]
    wrong_scales = int(((got < least) | (got > least_scale(bounds.amax(dim=0)))).sum())

    factor = torch.exp2(127.0 - got.to(torch.float64)).repeat_interleave(32, dim=1)
    value = data[held].view(torch.float8_e4m3fn).to(torch.float64)
    lowest, highest = ((v * factor).to(torch.float32).to(torch.float8_e4m3fn).to(torch.float64) for v in (low, high))
    wrong_codes = int(((value < lowest) | (value > highest) | value.isnan()).sum())
    return Verdict(float(of_padding + touched + wrong_scales + wrong_codes), 0.0, "wrong or touched bytes")


def check_squared_relu_mxfp8(
    arguments: tuple[Any, ...], results: tuple[Tensor, ...], baseline: tuple[Tensor, ...]
) -> Verdict:
    """To the bit, from the square that is rounded to bfloat16."""
    x, permutation_map, n_used = to_cpu(arguments)
    held = held_rows(permutation_map, n_used)
    value = baseline_squared_relu(x[held], permutation_map, n_used)[0].to(torch.float64)
    return wrong_mxfp8(arguments, results, value, value, held)


def check_swiglu_mxfp8(
    arguments: tuple[Any, ...], results: tuple[Tensor, ...], baseline: tuple[Tensor, ...]
) -> Verdict:
    """To the bit for some values that are as near to float64 as twice the error of plain torch in bfloat16."""
    x, permutation_map, n_used, limit = to_cpu(arguments)
    held = held_rows(permutation_map, n_used)
    gate, up = x[held].chunk(2, dim=-1)
    exact = definitions.swiglu(gate, up, limit)
    in_bfloat16 = baseline_swiglu(x[held], permutation_map, n_used, limit)[0]
    margin = 2 * worst_relative_error(in_bfloat16, exact) * exact.abs()
    return wrong_mxfp8(arguments, results, exact - margin, exact + margin, held)


def moved_bytes(out_bytes_of_32: int) -> Any:
    """Input, output and map of the used rows; out_bytes_of_32: what 32 columns of the output take."""

    def count(x: Tensor, permutation_map: Tensor, n_used: Tensor, *limit: float) -> int:
        rows = int(held_rows(permutation_map.cpu(), n_used.cpu()).sum())
        columns = x.shape[1] // 2 if limit else x.shape[1]
        return rows * (x.shape[1] * 2 + columns * out_bytes_of_32 // 32) + int(n_used) * permutation_map.element_size()

    return count


BASELINES = {
    "padded_squared_relu": Baseline(baseline_squared_relu, check_squared_relu, moved_bytes(64)),
    "padded_swiglu": Baseline(baseline_swiglu, check_swiglu, moved_bytes(64)),
    "squared_relu_and_quantize_mxfp8": Baseline(baseline_squared_relu_mxfp8, check_squared_relu_mxfp8, moved_bytes(33)),
    "swiglu_and_quantize_mxfp8": Baseline(baseline_swiglu_mxfp8, check_swiglu_mxfp8, moved_bytes(33)),
}


def case(op: str, rows: int, columns: int, n_used: int, padding: float = 0.1, **flags: bool) -> Case:
    """columns: of the result."""
    gated = "swiglu" in op

    def make(generator: torch.Generator) -> tuple[Any, ...]:
        x = torch.randn(
            rows, columns * 2 if gated else columns, generator=generator, dtype=torch.float32, device="cpu"
        ).to(torch.bfloat16)
        if gated:
            x *= 4  # so that some are clamped
        permutation_map = torch.randint(rows, (rows,), generator=generator, dtype=torch.int32, device="cpu")
        permutation_map[torch.rand(rows, generator=generator, dtype=torch.float32, device="cpu") < padding] = -1
        arguments = x, permutation_map, torch.tensor(n_used, dtype=torch.int32, device="cpu")
        return (*arguments, LIMIT) if gated else arguments

    labels = {"rows": rows, "columns": columns}
    return Case(op, f"{rows} x {columns}, {n_used} used", make, BASELINES[op], labels=labels, **flags)


def cases_of(op: str) -> tuple[Case, ...]:
    timed = (
        case(op, 16384, 3072, 16384, padding=0.0, benched=True, large=True),
        case(op, 128, 2048, 100, benched=True),
        case(op, 128, 2048, 16, padding=0.0, benched=True),
    )
    if "mxfp8" in op:
        return (
            *timed,
            case(op, 300, 1856, 259),
            case(op, 130, 160, 130),
            case(op, 5, 32, 3),
            case(op, 2, 32, 2, padding=0.0),
            case(op, 200, 256, 0),
        )
    return (
        *timed,
        case(op, 300, 4096, 299),
        case(op, 7, 1000, 7, padding=0.0),
        case(op, 5, 17, 3),
        case(op, 64, 1, 64),
        case(op, 64, 256, 0),
    )


CASES = tuple(case for op in BASELINES for case in cases_of(op))
