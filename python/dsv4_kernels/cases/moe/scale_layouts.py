"""Cases of the scale layouts. Every check computes positions from the documented formula, one scale at a time."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dsv4_kernels.cases import Baseline, Case, Verdict, to_cpu
from dsv4_kernels.cases.moe.definitions import as_batch, swizzled_positions


def expected_swizzle(scales: Tensor) -> Tensor:
    """[matrices, bytes] uint8."""
    matrices = as_batch(scales)
    rows, columns = matrices.shape[1:]
    flat = torch.zeros(matrices.shape[0], -(-rows // 128) * 128 * -(-columns // 4) * 4, dtype=torch.uint8, device="cpu")
    flat[:, swizzled_positions(rows, columns).flatten()] = matrices.flatten(1)
    return flat


def wrong_bytes(got: Tensor, expected: Tensor) -> Verdict:
    return Verdict(float((got.view(torch.uint8).flatten() != expected.flatten()).sum()), 0.0, "wrong bytes")


def check_swizzle(arguments: tuple[Any, ...], results: tuple[Tensor, ...], _: tuple[Tensor, ...]) -> Verdict:
    return wrong_bytes(results[0], expected_swizzle(to_cpu(arguments)[0]))


def check_unswizzle(arguments: tuple[Any, ...], results: tuple[Tensor, ...], _: tuple[Tensor, ...]) -> Verdict:
    swizzled, rows, columns = to_cpu(arguments)
    matrices = as_batch(swizzled).flatten(1)
    return wrong_bytes(results[0], matrices[:, swizzled_positions(rows, columns).flatten()])


def check_assemble(arguments: tuple[Any, ...], results: tuple[Tensor, ...], _: tuple[Tensor, ...]) -> Verdict:
    scales, expert_offsets, padded_offsets, padded_rows = to_cpu(arguments)
    padded = torch.zeros(padded_rows, scales.shape[1], dtype=torch.uint8, device="cpu")
    for start, end, to in zip(expert_offsets[:-1], expert_offsets[1:], padded_offsets, strict=False):
        padded[to : to + end - start] = scales.view(torch.uint8)[start:end]
    return wrong_bytes(results[0], expected_swizzle(padded))


def baseline_swizzle(scales: Tensor) -> tuple[Tensor, ...]:
    """As engines write it: pad, then permute."""
    as_bytes = as_batch(scales)
    count, rows, columns = as_bytes.shape
    down, across = -(-rows // 128), -(-columns // 4)
    padded = torch.nn.functional.pad(as_bytes, (0, across * 4 - columns, 0, down * 128 - rows))
    tiles = padded.view(count, down, 4, 32, across, 4).permute(0, 1, 4, 3, 2, 5)
    return (tiles.reshape(*scales.shape[:-2], down * 128, across * 4).view(scales.dtype),)


def baseline_unswizzle(swizzled: Tensor, rows: int, columns: int) -> tuple[Tensor, ...]:
    as_bytes = as_batch(swizzled)
    count, down, across = as_bytes.shape[0], as_bytes.shape[1] // 128, as_bytes.shape[2] // 4
    matrices = as_bytes.view(count, down, across, 32, 4, 4).permute(0, 1, 4, 3, 2, 5).reshape(as_bytes.shape)
    cut = matrices[:, :rows, :columns].contiguous()
    return (cut.view(*swizzled.shape[:-2], rows, columns).view(swizzled.dtype),)


def baseline_assemble(
    scales: Tensor, expert_offsets: Tensor, padded_offsets: Tensor, padded_rows: int
) -> tuple[Tensor, ...]:
    """As the described runner writes it: scatter into zeros, then swizzle all of it."""
    row = torch.arange(scales.shape[0], device=scales.device)
    expert = torch.searchsorted(expert_offsets[1:].contiguous(), row, right=True).clamp(max=expert_offsets.numel() - 2)
    padded = torch.zeros(padded_rows, scales.shape[1], dtype=torch.uint8, device=scales.device)
    padded[padded_offsets[expert] + row - expert_offsets[expert]] = scales.view(torch.uint8)
    return (baseline_swizzle(padded)[0].view(scales.dtype),)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _padded_bytes(rows: int, columns: int) -> int:
    return -(-rows // 128) * 128 * -(-columns // 4) * 4


BASELINES = {
    "blackwell_swizzle_32_4_4": Baseline(
        baseline_swizzle,
        check_swizzle,
        lambda scales: _bytes(scales) + scales.shape[:-2].numel() * _padded_bytes(*scales.shape[-2:]),
    ),
    "blackwell_unswizzle_32_4_4": Baseline(
        baseline_unswizzle,
        check_unswizzle,
        lambda swizzled, rows, columns: _bytes(swizzled) + swizzled.shape[:-2].numel() * rows * columns,
    ),
    "assemble_scales_2d_side": Baseline(
        baseline_assemble,
        check_assemble,
        lambda scales, expert_offsets, padded_offsets, padded_rows: (
            _bytes(scales)
            + _bytes(expert_offsets)
            + _bytes(padded_offsets)
            + _padded_bytes(padded_rows, scales.shape[1])
        ),
    ),
}


def random_scales(generator: torch.Generator, *shape: int, dtype: torch.dtype) -> Tensor:
    """Bytes from 100 to 140, which are E8M0 scales of values of ordinary size."""
    return torch.randint(100, 141, shape, generator=generator, dtype=torch.uint8, device="cpu").view(dtype)


LARGE = 16 << 20  # bytes of scales


def swizzle_case(*shape: int, benched: bool = False, dtype: torch.dtype = torch.float8_e8m0fnu) -> Case:
    return Case(
        "blackwell_swizzle_32_4_4",
        " x ".join(map(str, shape)),
        lambda generator: (random_scales(generator, *shape, dtype=dtype),),
        BASELINES["blackwell_swizzle_32_4_4"],
        benched=benched,
        launches=1 if 0 not in shape else 0,
        large=math.prod(shape) > LARGE,
        labels={"shape": list(shape)},
    )


def unswizzle_case(*shape: int, benched: bool = False, dtype: torch.dtype = torch.float8_e8m0fnu) -> Case:
    *matrices, rows, columns = shape
    padded = (*matrices, -(-rows // 128) * 128, -(-columns // 4) * 4)
    return Case(
        "blackwell_unswizzle_32_4_4",
        " x ".join(map(str, shape)),
        lambda generator: (random_scales(generator, *padded, dtype=dtype), rows, columns),
        BASELINES["blackwell_unswizzle_32_4_4"],
        benched=benched,
        large=math.prod(shape) > LARGE,
        labels={"shape": list(shape)},
    )


def assemble_case(
    rows: int, columns: int, experts: int, benched: bool = False, dtype: torch.dtype = torch.float8_e8m0fnu
) -> Case:
    def make(generator: torch.Generator) -> tuple[Any, ...]:
        expert = torch.randint(experts, (rows,), generator=generator, device="cpu")
        counts = torch.bincount(expert, minlength=experts)
        expert_offsets = torch.zeros(experts + 1, dtype=torch.int32, device="cpu")
        expert_offsets[1:] = counts.cumsum(0)
        padded_offsets = torch.zeros_like(expert_offsets)
        padded_offsets[1:] = ((counts + 127) // 128 * 128).cumsum(0)
        most_tiles = max(1, rows) if rows <= experts else (rows + 127 * experts) // 128
        scales = random_scales(generator, rows, columns, dtype=dtype)
        return scales, expert_offsets, padded_offsets, most_tiles * 128

    return Case(
        "assemble_scales_2d_side",
        f"{rows} x {columns}, {experts} experts",
        make,
        BASELINES["assemble_scales_2d_side"],
        benched=benched,
        large=rows * columns > LARGE,
        labels={"rows": rows, "columns": columns, "experts": experts},
    )


CASES = (
    swizzle_case(384, 1024, 224, benched=True),
    swizzle_case(128, 224, benched=True),
    swizzle_case(300, 72),
    swizzle_case(3, 130, 9),
    swizzle_case(2, 129, 48),
    swizzle_case(7, 5),
    swizzle_case(5, 3, dtype=torch.uint8),
    swizzle_case(0, 8, dtype=torch.uint8),
    unswizzle_case(384, 1024, 224, benched=True),
    unswizzle_case(128, 224, benched=True),
    unswizzle_case(300, 72),
    unswizzle_case(3, 130, 9),
    unswizzle_case(2, 129, 48),
    unswizzle_case(1, 1, dtype=torch.uint8),
    assemble_case(49152, 448, 256, benched=True),
    assemble_case(96, 224, 256, benched=True),
    assemble_case(500, 36, 3),
    assemble_case(130, 5, 7, dtype=torch.float8_e4m3fn),
    assemble_case(4, 1, 2, dtype=torch.uint8),
    assemble_case(0, 8, 4),
)
