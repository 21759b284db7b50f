"""Cases of moe_dispatch_places and moe_dispatch_rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv4_kernels.cases import Baseline, Case, Verdict, is_poison, to_cpu
from dsv4_kernels.cases.moe import definitions
from dsv4_kernels.cases.moe.routing import uniform_ids
from dsv4_kernels.presets import PRESETS


def ranks_of(ids: Tensor, rank_of_id: Tensor) -> Tensor:
    known = (ids >= 0) & (ids < len(rank_of_id))
    table = torch.nn.functional.pad(rank_of_id.to(torch.int64), (0, 1), value=-1)
    return table[torch.where(known, ids, len(rank_of_id)).to(torch.int64)]


def baseline_places(
    topk_ids: Tensor, rank_of_id: Tensor, dropped: Tensor, ranks: int, capacity: int, one_per_rank: bool
) -> tuple[Tensor, ...]:
    """As an engine would write it: comparisons, a prefix sum for each rank and a scatter, without a synchronisation."""
    goes, top_k, device = ranks_of(topk_ids, rank_of_id), topk_ids.shape[1], topk_ids.device
    goes = torch.where((goes >= 0) & (goes < ranks), goes, ranks)
    if one_per_rank:
        same = goes[:, :, None] == goes[:, None, :]
        earlier = torch.ones(top_k, top_k, dtype=torch.bool, device=device).tril(-1)
        goes = torch.where((same & earlier).any(dim=2), ranks, goes)
    goes = goes.reshape(-1)
    here = torch.arange(ranks, device=device)[:, None] == goes
    order = here.cumsum(dim=1, dtype=torch.int32).gather(0, goes.clamp(max=ranks - 1)[None])[0].to(torch.int64) - 1
    sent = goes < ranks
    fits = sent & (order < capacity)
    place = torch.where(fits, goes * capacity + order, ranks * capacity)
    slots = torch.full((ranks * capacity + 1,), -1, dtype=torch.int32, device=device)
    slots.scatter_(0, place, torch.arange(topk_ids.numel(), dtype=torch.int32, device=device))
    dropped += (sent & ~fits).sum()
    return torch.where(fits, place, -1).to(torch.int32).reshape(topk_ids.shape), slots[:-1], dropped


def check_places(arguments: tuple[Any, ...], results: tuple[Tensor, ...], baseline: tuple[Tensor, ...]) -> Verdict:
    """To the bit."""
    topk_ids, rank_of_id, before, *numbers = to_cpu(arguments)
    *expected, more = definitions.dispatch_places(topk_ids, rank_of_id, *numbers)
    wrong = sum(int((got != want).sum()) for got, want in zip(results, (*expected, before + more), strict=True))
    return Verdict(float(wrong), 0.0, "wrong elements")


def places_bytes(
    topk_ids: Tensor, rank_of_id: Tensor, dropped: Tensor, ranks: int, capacity: int, one_per_rank: bool
) -> int:
    return topk_ids.nbytes + rank_of_id.nbytes + 4 * topk_ids.numel() + 4 * ranks * capacity


def baseline_rows(
    x: Tensor,
    scale: Tensor | None,
    topk_weights: Tensor,
    topk_ids: Tensor,
    rank_of_id: Tensor,
    place_to_slot: Tensor,
    capacity: int,
    routes: int,
) -> tuple[Tensor, ...]:
    """As an engine would write it: each part gathered and copied into its columns."""
    places, top_k, device = len(place_to_slot), topk_ids.shape[1], x.device
    used = (place_to_slot >= 0) & (place_to_slot < topk_ids.numel())
    if topk_ids.numel() == 0:
        used, x, topk_ids = used & False, x.new_zeros(1, x.shape[1]), topk_ids.new_zeros(1, top_k)
        topk_weights, scale = (
            topk_weights.new_zeros(1, top_k),
            None if scale is None else scale.new_zeros(1, scale.shape[1]),
        )
    slot = torch.where(used, place_to_slot, 0).to(torch.int64)
    token = slot // top_k
    slots = token[:, None] * top_k + torch.arange(top_k, device=device) if routes == top_k else slot[:, None]
    ids = topk_ids.reshape(-1)[slots]
    rank = torch.arange(places, device=device) // capacity
    own = used[:, None] & (ranks_of(ids, rank_of_id) == rank[:, None])
    parts = [x[token], *([] if scale is None else [scale[token]])]
    parts.append(torch.where(own, ids, -1).to(torch.int32).view(torch.uint8))
    parts.append(topk_weights.reshape(-1)[slots].view(torch.uint8))
    return (torch.cat([torch.nn.functional.pad(p, (0, -p.shape[1] % 16)) for p in parts], dim=1),)


def check_rows(arguments: tuple[Any, ...], results: tuple[Tensor, ...], baseline: tuple[Tensor, ...]) -> Verdict:
    """To the byte; of places without a slot the ids alone, the rest as it was."""
    x, scale, weights, ids, rank_of_id, place_to_slot, capacity, routes = to_cpu(arguments)
    top_k, table, wrong = ids.shape[1], dict(enumerate(rank_of_id.tolist())), 0
    at_ids = results[0].shape[1] - 2 * (-(-routes * 4 // 16) * 16)
    for place, slot in enumerate(place_to_slot.tolist()):
        row = results[0][place]
        if not 0 <= slot < ids.numel():
            written = slice(at_ids, at_ids + 4 * routes)
            wrong += (
                int((row[written] != 255).sum()) + int((~is_poison(row)).sum()) - int((~is_poison(row[written])).sum())
            )
            continue
        token = slot // top_k
        slots = range(token * top_k, (token + 1) * top_k) if routes == top_k else [slot]
        of_row = [int(ids.view(-1)[s]) for s in slots]
        own = [table.get(i, -1) == place // capacity for i in of_row]
        factors = [float(weights.view(-1)[s]) for s in slots]
        want = definitions.dispatch_row(x[token], None if scale is None else scale[token], factors, of_row, own)
        wrong += int((row != torch.tensor(list(want), dtype=torch.uint8, device="cpu")).sum())
    return Verdict(float(wrong), 0.0, "wrong bytes")


def rows_bytes(
    x: Tensor,
    scale: Tensor | None,
    topk_weights: Tensor,
    topk_ids: Tensor,
    rank_of_id: Tensor,
    place_to_slot: Tensor,
    capacity: int,
    routes: int,
) -> int:
    used = int(((place_to_slot >= 0) & (place_to_slot < topk_ids.numel())).sum())
    row = x.shape[1] + (0 if scale is None else scale.shape[1]) + 8 * routes
    return place_to_slot.nbytes + used * (2 * row)


PLACES = Baseline(baseline_places, check_places, places_bytes)
ROWS = Baseline(baseline_rows, check_rows, rows_bytes)
EXPERTS, TOP_K = PRESETS["v4-flash"].experts, PRESETS["v4-flash"].top_k


def table(experts: int, ranks: int) -> Tensor:
    return (torch.arange(experts, device="cpu") * ranks // experts).to(torch.int32)


def places_case(
    name: str,
    tokens: int,
    ranks: int,
    capacity: int,
    *,
    one_per_rank: bool,
    spoiled: bool = False,
    benched: bool = False,
) -> Case:
    """spoiled: with ids and ranks out of range, ids of 64 bits, and a count of those that were dropped before."""

    def make(generator: torch.Generator) -> tuple[Any, ...]:
        ids, of = uniform_ids(tokens, EXPERTS, TOP_K, generator), table(EXPERTS, ranks)
        if spoiled:
            ids.view(-1)[::5] = -1
            ids.view(-1)[::7] = 2**40
            of[:5], of[5:9] = -3, ranks
        else:
            ids = ids.to(torch.int32)
        return ids, of, torch.tensor([7 * spoiled], dtype=torch.int64, device="cpu"), ranks, capacity, one_per_rank

    labels = {"preset": "v4-flash", "tokens": tokens, "ranks": ranks}
    return Case("moe_dispatch_places", f"{name}, {tokens} tokens", make, PLACES, benched=benched, labels=labels)


def rows_case(
    name: str, tokens: int, ranks: int, capacity: int, width: int, *, routes: int = TOP_K, scales: int = 0,
    benched: bool = False,
) -> Case:  # fmt: skip
    """width: bytes of a row of x. scales: of its scales."""

    def make(generator: torch.Generator) -> tuple[Any, ...]:
        ids, of = uniform_ids(tokens, EXPERTS, TOP_K, generator), table(EXPERTS, ranks)
        _, places, _ = definitions.dispatch_places(ids, of, ranks, capacity, routes == TOP_K)
        places[:1] = places[:1] if benched or capacity == 1 else 2**30
        x, scale = (
            torch.randint(256, (tokens, n), generator=generator, dtype=torch.uint8, device="cpu")
            for n in (width, scales)
        )
        weights = torch.rand(tokens, TOP_K, generator=generator, dtype=torch.float32, device="cpu")
        return x, scale if scales else None, weights, ids, of, places, capacity, routes

    labels = {"preset": "v4-flash", "tokens": tokens, "ranks": ranks}
    return Case("moe_dispatch_rows", f"{name}, {tokens} tokens", make, ROWS, benched=benched, labels=labels)


CASES = (
    places_case("8 ranks, one place each", 128, 8, 128, one_per_rank=True, benched=True),
    places_case("8 ranks, a place for each slot", 128, 8, 768, one_per_rank=False, benched=True),
    places_case("two rounds of a block, places run out", 700, 3, 300, one_per_rank=True, spoiled=True),
    places_case("a place for each slot, places run out", 150, 5, 61, one_per_rank=False, spoiled=True),
    places_case("no tokens", 0, 4, 3, one_per_rank=True),
    rows_case("8 ranks, bfloat16", 128, 8, 100, 8192, benched=True),
    rows_case("8 ranks, FP8", 128, 8, 100, 4096, scales=128, benched=True),
    rows_case("a route each", 9, 3, 25, 256, routes=1),
    rows_case("scales that fill no part", 40, 2, 41, 96, scales=3),
    rows_case("every place used", 40, 2, 1, 48, scales=6),
    rows_case("no tokens", 0, 2, 3, 64),
)
