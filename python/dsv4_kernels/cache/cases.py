"""Cases of the cache's ops: the models' layers at the batch sizes of decode, and variants beyond them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv4_kernels.cache import reference
from dsv4_kernels.cases import FLOAT32_ULP, Case, Verdict, Yardstick, is_poison, same_bits, to_cpu

DECODE_REQUESTS = (1, 16, 64)

# A pooled column is a few dozen float32 operations: whatever plain torch loses, this much is always allowed, relative
# to the sum of the weighted magnitudes.
POOLED_LIMIT = 16 * FLOAT32_ULP


def bfloat16_error(got: Tensor, exact: Tensor, magnitude: Tensor) -> float:
    """How much further from exact than rounding to bfloat16 explains, relative to the magnitude that was summed."""
    if not got.numel():
        return 0.0
    got = got.to(torch.float64)
    half_ulp = torch.maximum(got.abs(), exact.abs()).clamp(min=2.0**-126).log2().floor().exp2() * 2.0**-8
    excess = ((got - exact).abs() - half_ulp).clamp(min=0) / magnitude.clamp(min=2.0**-126)
    return float(torch.where(got.isnan() & exact.isnan(), 0.0, excess).max())


def judge_csa_compress_tail(
    arguments: tuple[Any, ...], results: tuple[Tensor, ...], plain: tuple[Tensor, ...]
) -> Verdict:
    """Rows against float64; what no full tail asks for must still be poisoned."""
    ka, za, kb, zb, tail_len, request_slots, m, _ = to_cpu(arguments)
    full, slots = reference.full_requests(tail_len, request_slots, m)
    if not same_bits(results[2], full):
        return Verdict(float("inf"), 0.0, "valid mask")
    touched = sum(int((~is_poison(rows[~full])).sum()) for rows in results[:2])
    if touched:
        return Verdict(float(touched), 0.0, "elements written for a tail that is not full")
    values = torch.cat((kb[slots, :m], ka[slots, :m]), dim=1)
    scores = torch.cat((zb[slots, :m], za[slots, :m]), dim=1)
    exact, magnitude = reference.pooled(values, scores), reference.pooled(values.abs(), scores)

    def error(rows: tuple[Tensor, ...]) -> float:
        return bfloat16_error(torch.cat((rows[0][full], rows[1][full]), dim=1), exact, magnitude)

    return Verdict(error(results), max(2 * error(plain), POOLED_LIMIT), "entry, beyond rounding to bfloat16")


def plain_csa_compress_tail(
    tail_ka: Tensor,
    tail_za: Tensor,
    tail_kb: Tensor,
    tail_zb: Tensor,
    tail_len: Tensor,
    request_slots: Tensor,
    m: int,
    indexer_head_dim: int,
) -> tuple[Tensor, ...]:
    """As an engine would write it: every request, full or not, and no check of the slots."""
    scores = torch.cat((tail_zb[request_slots, :m], tail_za[request_slots, :m]), dim=1)
    values = torch.cat((tail_kb[request_slots, :m], tail_ka[request_slots, :m]), dim=1)
    rows = (scores.softmax(dim=1) * values).sum(dim=1).to(torch.bfloat16)
    head_dim = rows.shape[1] - indexer_head_dim
    return rows[:, :head_dim], rows[:, head_dim:], tail_len[request_slots] >= m


def csa_compress_tail_bytes(tail_ka: Tensor, *arguments: Any) -> int:
    *_, tail_len, request_slots, m, _ = arguments
    full, _ = reference.full_requests(tail_len, request_slots, m)
    entries, requests = int(full.sum()), int(request_slots.shape[0])
    return entries * (4 * int(m) * 4 + 2) * tail_ka.shape[2] + 9 * requests


YARDSTICKS = {
    "csa_compress_tail": Yardstick(plain_csa_compress_tail, judge_csa_compress_tail, csa_compress_tail_bytes),
}


def tail_rows(generator: torch.Generator, slots: int, rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Values and scores of a tail buffer; the scores spread as a trained layer's do: a few units."""
    values, scores = torch.randn(2, slots, rows, width, generator=generator)
    return values, 3 * scores


def request_slots_of(generator: torch.Generator, requests: int, slots: int) -> Tensor:
    """Distinct slots in any order."""
    return torch.randperm(slots, generator=generator)[:requests].to(torch.int32)


def csa_compress_case(
    name: str,
    requests: int,
    m: int = 4,
    head_dim: int = 512,
    indexer_head_dim: int = 128,
    full: float = 1.0,
    benched: bool = False,
) -> Case:
    """full: share of the requests whose tail is full. One request in three has no block before."""

    def make(generator: torch.Generator) -> tuple[Any, ...]:
        slots, width = requests + 3, head_dim + indexer_head_dim
        ka, za = tail_rows(generator, slots, m, width)
        kb, zb = tail_rows(generator, slots, m, width)
        kb[::3], zb[::3] = 0.0, -torch.inf
        tail_len = torch.where(torch.rand(slots, generator=generator) < full, m, m - 1).to(torch.int32)
        return ka, za, kb, zb, tail_len, request_slots_of(generator, requests, slots), m, indexer_head_dim

    return Case(
        "csa_compress_tail",
        f"{name}, {requests} requests",
        make,
        YARDSTICKS["csa_compress_tail"],
        benched=benched,
        labels={"requests": requests},
    )


CASES = (
    *(csa_compress_case("CSA", requests, benched=True) for requests in DECODE_REQUESTS),
    csa_compress_case("half of them full", 9, full=0.5),
    csa_compress_case("blocks of 1", 3, m=1, head_dim=64, indexer_head_dim=0),
    csa_compress_case("blocks of 7, no entry", 5, m=7, head_dim=0, indexer_head_dim=20),
)
