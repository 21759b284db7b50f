"""Cases of the mixture-of-experts ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv4_kernels.cases import Case, Verdict, Yardstick, is_poison, to_cpu
from dsv4_kernels.moe import layout_cases, quantize_cases, reference, routing_cases


def plain_padded_squared_relu(x: Tensor, permutation_map: Tensor, n_used: Tensor) -> tuple[Tensor, ...]:
    """As an engine would write it: every row, padding or not."""
    return (x.to(torch.float32).relu().square().to(torch.bfloat16),)


def judge_padded_squared_relu(
    arguments: tuple[Any, ...], results: tuple[Tensor, ...], plain: tuple[Tensor, ...]
) -> Verdict:
    """To the bit; rows that hold no token must still be poisoned."""
    x, permutation_map, n_used = to_cpu(arguments)
    rows = reference.used_rows(permutation_map, n_used)
    written = torch.zeros(x.shape[0], dtype=torch.bool)
    written[rows] = True
    wrong = int((results[0][written].view(torch.int16) != plain[0][written].view(torch.int16)).sum())
    wrong += int((~is_poison(results[0][~written])).sum())
    return Verdict(float(wrong), 0.0, "wrong or touched elements")


def padded_squared_relu_bytes(x: Tensor, permutation_map: Tensor, n_used: Tensor) -> int:
    rows = reference.used_rows(permutation_map.cpu(), n_used.cpu()).numel()
    return rows * x.shape[1] * 2 * x.element_size() + int(n_used) * permutation_map.element_size()


YARDSTICKS = {
    "padded_squared_relu": Yardstick(plain_padded_squared_relu, judge_padded_squared_relu, padded_squared_relu_bytes)
}


def padded_squared_relu_case(rows: int, columns: int, used: int, padding: float = 0.1, benched: bool = False) -> Case:
    def make(generator: torch.Generator) -> tuple[Any, ...]:
        x = torch.randn(rows, columns, generator=generator).to(torch.bfloat16)
        permutation_map = torch.randint(rows, (rows,), generator=generator, dtype=torch.int32)
        permutation_map[torch.rand(rows, generator=generator) < padding] = -1
        return x, permutation_map, torch.tensor(used, dtype=torch.int32)

    return Case(
        "padded_squared_relu",
        f"{rows} x {columns}, {used} used",
        make,
        YARDSTICKS["padded_squared_relu"],
        benched=benched,
        labels={"rows": rows, "columns": columns},
    )


CASES = (
    padded_squared_relu_case(16384, 3072, 16384, padding=0.0, benched=True),
    padded_squared_relu_case(128, 2048, 100, benched=True),
    padded_squared_relu_case(300, 4096, 299),
    padded_squared_relu_case(7, 1000, 7, padding=0.0),
    padded_squared_relu_case(5, 17, 3),
    padded_squared_relu_case(64, 1, 64),
    padded_squared_relu_case(64, 256, 0),
    *routing_cases.CASES,
    *layout_cases.CASES,
    *quantize_cases.CASES,
)
