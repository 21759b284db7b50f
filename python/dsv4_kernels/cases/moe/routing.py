"""Cases of moe_sort, moe_tiles_from_counts and moe_finalize."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dsv4_kernels.cases import Baseline, Case, Verdict, is_poison, to_cpu
from dsv4_kernels.cases.moe import definitions
from dsv4_kernels.moe.routing import max_tiles
from dsv4_kernels.presets import PRESETS, Preset


def baseline_sort(
    topk_ids: Tensor, local_experts: int, tile_size: int, experts_start_idx: int, expert_map: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As an engine would write it: a stable sort, prefix sums and scatters, without a host synchronisation."""
    device, slots = topk_ids.device, topk_ids.numel()
    ids = topk_ids.reshape(-1).to(torch.int64)
    if expert_map is not None:
        mapped = (ids >= 0) & (ids < len(expert_map))
        table = torch.nn.functional.pad(expert_map.to(torch.int64), (0, 1), value=-1)
        ids = table[torch.where(mapped, ids, len(expert_map))]
    local = (ids >= experts_start_idx) & (ids < experts_start_idx + local_experts)
    key, order = torch.sort(torch.where(local, ids - experts_start_idx, local_experts), stable=True)
    count = torch.zeros(local_experts + 1, dtype=torch.int64, device=device)
    count.scatter_add_(0, key, torch.ones_like(key))
    tiles = (count[:local_experts] + tile_size - 1) // tile_size
    last_tile = tiles.cumsum(0)
    room = max_tiles(topk_ids.numel(), local_experts, tile_size)
    tile = torch.arange(room, device=device)
    expert = torch.searchsorted(last_tile, tile, right=True)
    used = expert < local_experts
    expert_or_0 = torch.where(used, expert, 0)
    rank_of_tile = tile - (last_tile - tiles)[expert_or_0]
    tile_rows = torch.where(used, (count[expert_or_0] - rank_of_tile * tile_size).clamp(max=tile_size), 0)
    first_row = torch.cat(
        ((last_tile - tiles) * tile_size, torch.full((1,), room * tile_size, device=device, dtype=torch.int64))
    )
    row = first_row[key] + torch.arange(slots, device=device) - (count.cumsum(0) - count)[key]
    row_to_slot = torch.full((room * tile_size + slots + 1,), -1, dtype=torch.int32, device=device)
    row_to_slot[row] = order.to(torch.int32)
    slot_to_row = torch.empty(slots, dtype=torch.int32, device=device)
    slot_to_row[order] = torch.where(key < local_experts, row, -1).to(torch.int32)
    return (
        torch.where(used, expert, -1).to(torch.int32),
        tile_rows.to(torch.int32),
        row_to_slot[: room * tile_size],
        slot_to_row.reshape(topk_ids.shape),
        torch.stack((last_tile[-1], count[:local_experts].sum())).to(torch.int32),
    )


def check_sort(arguments: tuple[Any, ...], results: tuple[Tensor, ...], baseline: tuple[Tensor, ...]) -> Verdict:
    """To the bit; rows of unused tiles must still be poisoned."""
    topk_ids, local_experts, tile_size, start, expert_map = to_cpu(arguments)
    expected = definitions.sorted_routes(topk_ids, local_experts, tile_size, start, len(results[0]), expert_map)
    wrong = sum(int((results[i] != expected[i]).sum()) for i in (0, 1, 3, 4))
    rows = int(expected[4][0]) * int(tile_size)
    wrong += int((results[2][:rows] != expected[2][:rows]).sum()) + int((~is_poison(results[2][rows:])).sum())
    return Verdict(float(wrong), 0.0, "wrong or touched elements")


def sort_bytes(
    topk_ids: Tensor, local_experts: int, tile_size: int, experts_start_idx: int, expert_map: Tensor | None
) -> int:
    """Ids and the map in; a row for each slot, a slot for each row of the used tiles, and the tile tables out."""
    tiles = int(baseline_sort(topk_ids, local_experts, tile_size, experts_start_idx, expert_map)[4][0])
    room = max_tiles(topk_ids.numel(), local_experts, tile_size)
    mapped = 0 if expert_map is None else expert_map.nbytes
    return topk_ids.numel() * (topk_ids.element_size() + 4) + mapped + tiles * tile_size * 4 + 2 * room * 4 + 8


def baseline_tiles(counts: Tensor, max_rows: int, tile_size: int) -> tuple[Tensor, Tensor]:
    """As an engine would write it: rows compared with their expert's count."""
    place = torch.arange(max_rows, dtype=torch.int32, device=counts.device)
    used = place < counts[:, None]
    expert = torch.arange(len(counts), dtype=torch.int32, device=counts.device)[:, None]
    slots = torch.where(used, expert * max_rows + place, -1)
    return torch.where(used[:, ::tile_size], expert, -1).flatten(), slots.flatten()


def check_tiles(arguments: tuple[Any, ...], results: tuple[Tensor, ...], baseline: tuple[Tensor, ...]) -> Verdict:
    """To the bit."""
    expected = definitions.tiles_of_counts(*to_cpu(arguments))
    wrong = sum(int((got != want).sum()) for got, want in zip(results, expected, strict=True))
    return Verdict(float(wrong), 0.0, "wrong elements")


def tiles_bytes(counts: Tensor, max_rows: int, tile_size: int) -> int:
    rows = counts.numel() * max_rows
    return counts.nbytes + 4 * rows + 4 * rows // tile_size


def baseline_finalize(
    rows: Tensor, slot_to_row: Tensor, weights: Tensor | None, shared: Tensor | None
) -> tuple[Tensor, ...]:
    """As an engine would write it: gather, multiply and sum in float32."""
    present = (slot_to_row >= 0) & (slot_to_row < rows.shape[0])
    values = rows[torch.where(present, slot_to_row, 0)].to(torch.float32)
    factor = present.to(torch.float32) if weights is None else torch.where(present, weights, 0.0)
    total = torch.where(present[..., None], values, 0.0).mul_(factor[..., None]).sum(dim=1)
    if shared is not None:
        total += shared
    return (total.to(torch.bfloat16),)


def check_finalize(arguments: tuple[Any, ...], results: tuple[Tensor, ...], baseline: tuple[Tensor, ...]) -> Verdict:
    """Error over the largest sum: at most half a bfloat16 unit and what float32 sums lose."""
    rows, slot_to_row, weights, shared = to_cpu(arguments)
    exact = definitions.finalized(rows, slot_to_row, weights, shared)
    sizes_of = [None if value is None else value.abs() for value in (weights, shared)]
    sizes = definitions.finalized(rows.abs(), slot_to_row, *sizes_of)
    # Per slot a product and a sum, each rounded to 2^-24, and the rounding to bfloat16, 2^-8 of the result.
    allowed = exact.abs() * 2.0**-8 + sizes * (slot_to_row.shape[1] + 2) * 2.0**-23 + 2.0**-133
    error = (results[0].to(torch.float64) - exact).abs() / allowed
    return Verdict(float(error.max()) if error.numel() else 0.0, 1.0, "error over what rounding allows")


def finalize_bytes(rows: Tensor, slot_to_row: Tensor, weights: Tensor | None, shared: Tensor | None) -> int:
    present = int(((slot_to_row >= 0) & (slot_to_row < rows.shape[0])).sum())
    slots = slot_to_row.numel() * (4 if weights is None else 8)
    read = present + (0 if shared is None else slot_to_row.shape[0])
    return slots + (read + slot_to_row.shape[0]) * rows.shape[1] * rows.element_size()


SORT = Baseline(baseline_sort, check_sort, sort_bytes)
TILES = Baseline(baseline_tiles, check_tiles, tiles_bytes)
FINALIZE = Baseline(baseline_finalize, check_finalize, finalize_bytes)


def uniform_ids(tokens: int, experts: int, top_k: int, generator: torch.Generator) -> Tensor:
    """top_k different experts for each token."""
    return (
        torch.rand(tokens, experts, generator=generator, dtype=torch.float32, device="cpu").topk(top_k, dim=1).indices
    )


def sort_case(
    name: str,
    ids: Callable[[torch.Generator], Tensor],
    experts: int,
    tile_size: int,
    start: int = 0,
    benched: bool = False,
    large: bool = False,
    expert_map: list[int] | None = None,
    **labels: Any,
) -> Case:
    def make(generator: torch.Generator) -> tuple[Any, ...]:
        place = None if expert_map is None else torch.tensor(expert_map, dtype=torch.int32, device="cpu")
        return ids(generator), experts, tile_size, start, place

    return Case("moe_sort", f"{name}, tiles of {tile_size}", make, SORT, benched=benched, large=large, labels=labels)


def preset_sort_case(preset: Preset, tokens: int, tile_size: int, large: bool = False) -> Case:
    return sort_case(
        f"{preset.name}, {tokens} tokens",
        lambda generator: uniform_ids(tokens, preset.experts, preset.top_k, generator).to(torch.int32),
        preset.experts,
        tile_size,
        benched=True,
        large=large,
        preset=preset.name,
        tokens=tokens,
    )


def tiles_case(name: str, counts: list[int], max_rows: int, tile_size: int, benched: bool = False) -> Case:
    def make(_: torch.Generator) -> tuple[Any, ...]:
        of_type = torch.int32 if benched else torch.int64
        return torch.tensor(counts, dtype=of_type, device="cpu"), max_rows, tile_size

    launches = 1 if counts and max_rows else 0
    labels = {"experts": len(counts), "max_rows": max_rows}
    return Case("moe_tiles_from_counts", name, make, TILES, benched=benched, launches=launches, labels=labels)


def finalize_case(
    name: str,
    tokens: int,
    columns: int,
    top_k: int,
    weighted: bool = True,
    with_shared: bool = False,
    missing: float = 0.0,
    benched: bool = False,
    large: bool = False,
) -> Case:
    """missing: the share of slots without a row."""

    def make(generator: torch.Generator) -> tuple[Any, ...]:
        slots = tokens * top_k
        rows = torch.empty(slots + 7, columns, dtype=torch.bfloat16, device="cpu")
        rows.view(torch.int16).random_(0x3C00, 0x4100, generator=generator)  # 2^-7 to 8: normal numbers, drawn fast
        slot_to_row = (
            torch.randperm(slots + 7, generator=generator, device="cpu")[:slots].to(torch.int32).reshape(tokens, top_k)
        )
        slot_to_row[torch.rand(tokens, top_k, generator=generator, dtype=torch.float32, device="cpu") < missing] = -1
        weights = (
            torch.rand(tokens, top_k, generator=generator, dtype=torch.float32, device="cpu") - 0.25
            if weighted
            else None
        )
        shared = (
            torch.randn(tokens, columns, generator=generator, dtype=torch.float32, device="cpu").to(torch.bfloat16)
            if with_shared
            else None
        )
        return rows, slot_to_row, weights, shared

    return Case(
        "moe_finalize",
        f"{name}, {tokens} tokens",
        make,
        FINALIZE,
        benched=benched,
        large=large,
        labels={"tokens": tokens, "columns": columns},
    )


# Local experts of ids 0 to 7: some ids share one, others have none or an invalid one. Id 8 is not in the map.
_SPREAD = [2, -1, 0, 1, 2, 3, -7, 0]

FLASH, PRO = PRESETS["v4-flash"], PRESETS["v4-pro"]

CASES = (
    preset_sort_case(FLASH, 1, 16),
    preset_sort_case(FLASH, 16, 16),
    preset_sort_case(FLASH, 128, 16),
    preset_sort_case(FLASH, 1024, 32),
    preset_sort_case(FLASH, 8192, 128, large=True),
    preset_sort_case(PRO, 128, 16),
    preset_sort_case(PRO, 1024, 16),
    preset_sort_case(PRO, 8192, 128, large=True),
    sort_case("one slot", lambda _: torch.tensor([[2]], dtype=torch.int64, device="cpu"), 4, 16),
    sort_case("no tokens", lambda _: torch.empty(0, 6, dtype=torch.int32, device="cpu"), 8, 16),
    sort_case("no slot is local", lambda _: torch.full((5, 3), 7, dtype=torch.int32, device="cpu"), 4, 32),
    sort_case("all to one expert", lambda _: torch.full((300, 2), 3, dtype=torch.int64, device="cpu"), 8, 16),
    sort_case("a quarter is local", lambda g: uniform_ids(150, 64, 6, g), 16, 16, start=32),
    sort_case("two blocks", lambda g: uniform_ids(1300, 12, 5, g).to(torch.int32), 12, 64),
    sort_case("most experts, two blocks", lambda g: uniform_ids(110, 1024, 32, g).to(torch.int32), 1024, 16),
    sort_case("by a map, one slot per lane", lambda g: uniform_ids(4, 9, 6, g), 3, 16, expert_map=_SPREAD),
    sort_case("by a map", lambda g: uniform_ids(150, 9, 6, g).to(torch.int32), 3, 16, expert_map=_SPREAD),
    sort_case("by a map, two blocks", lambda g: uniform_ids(700, 9, 6, g), 3, 64, expert_map=_SPREAD),
    sort_case("an empty map", lambda g: uniform_ids(30, 9, 6, g), 3, 16, expert_map=[]),
    tiles_case("32 experts, 1024 rows for each", [7 * e % 45 for e in range(32)], 1024, 16, benched=True),
    tiles_case("counts out of range", [-1, 0, 1, 64, 65, 2**62, -(2**63), 33], 64, 16),
    tiles_case("one tile for each", [127, 128, 0], 128, 128),
    tiles_case("no rows", [3, 0], 0, 64),
    tiles_case("no experts", [], 64, 64),
    finalize_case("v4-flash", 1, FLASH.hidden_size, FLASH.top_k, benched=True),
    finalize_case("v4-flash", 16, FLASH.hidden_size, FLASH.top_k, with_shared=True, benched=True),
    finalize_case("v4-flash", 8192, FLASH.hidden_size, FLASH.top_k, benched=True, large=True),
    finalize_case("v4-pro", 8192, PRO.hidden_size, PRO.top_k, benched=True, large=True),
    finalize_case("k 1, not weighted", 5, 64, 1, weighted=False),
    finalize_case("k 11, columns not in eights", 7, 301, 11, with_shared=True, missing=0.3),
    finalize_case("k 32, half is missing", 3, 2056, 32, missing=0.5, with_shared=True),
    finalize_case("no row at all", 4, 48, 3, missing=1.1),
)
