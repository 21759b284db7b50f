"""What the ops of the mixture of experts compute, as their documentation has it: what results are checked against.

In float64 and integers, from tables of every code. Shares no code with the CPU implementation.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from dsv4_kernels.cases import code_tables
from dsv4_kernels.moe.interleaved_weights import BITS, PAIR_ROWS


def held_rows(permutation_map: Tensor, n_used: Tensor) -> Tensor:
    """[rows] bool: which rows hold a token: those before n_used whose place in the map is not negative."""
    places = enumerate(permutation_map.tolist())
    return torch.tensor([row < int(n_used) and place >= 0 for row, place in places], dtype=torch.bool, device="cpu")


def swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """gate / (1 + e^-gate) * up in float64, both clamped first if limit is above 0."""
    gate, up = gate.to(torch.float64), up.to(torch.float64)
    if limit > 0:
        gate, up = torch.where(gate > limit, limit, gate), torch.where(up.abs() > limit, limit * up.sign(), up)
    return gate / (1 + torch.exp(-gate)) * up


def sorted_routes(
    topk_ids: Tensor,
    local_experts: int,
    tile_size: int,
    experts_start_idx: int,
    tiles: int,
    expert_map: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """What moe_sort gives, slot by slot: expert and rows of each of `tiles` tiles, the slot of each row, the row of
    each slot, and how many tiles and rows are used. Rows of tiles that are not used are -1.
    """
    of_expert: list[list[int]] = [[] for _ in range(local_experts)]
    here = {experts_start_idx + expert: expert for expert in range(local_experts)}
    if expert_map is not None:
        here = {identity: expert for identity, expert in enumerate(expert_map.tolist()) if 0 <= expert < local_experts}
    for slot, identity in enumerate(topk_ids.flatten().tolist()):
        if identity in here:
            of_expert[here[identity]].append(slot)
    experts: list[int] = []
    sizes: list[int] = []
    row_to_slot: list[int] = []
    slot_to_row = [-1] * topk_ids.numel()
    for expert, slots in enumerate(of_expert):
        for begin in range(0, len(slots), tile_size):
            tile = slots[begin : begin + tile_size]
            for place, slot in enumerate(tile):
                slot_to_row[slot] = len(experts) * tile_size + place
            experts.append(expert)
            sizes.append(len(tile))
            row_to_slot += tile + [-1] * (tile_size - len(tile))
    unused = tiles - len(experts)
    columns = (
        experts + [-1] * unused, sizes + [0] * unused, row_to_slot + [-1] * (unused * tile_size),
        slot_to_row, [len(experts), sum(map(len, of_expert))],
    )  # fmt: skip
    tables = [torch.tensor(column, dtype=torch.int32, device="cpu") for column in columns]
    tables[3] = tables[3].reshape(topk_ids.shape)
    return tuple(tables)


def tiles_of_counts(counts: Tensor, max_rows: int, tile_size: int) -> tuple[Tensor, Tensor]:
    """What moe_tiles_from_counts gives: the expert of each tile, and each row's own number, or -1."""
    tile_to_expert, row_to_slot = [], []
    for expert, count in enumerate(counts.tolist()):
        first = expert * max_rows
        row_to_slot += [first + place if place < count else -1 for place in range(max_rows)]
        tile_to_expert += [expert if place < count else -1 for place in range(0, max_rows, tile_size)]
    tables = [torch.tensor(table, dtype=torch.int32, device="cpu") for table in (tile_to_expert, row_to_slot)]
    return tables[0], tables[1]


def dispatch_places(
    topk_ids: Tensor, rank_of_id: Tensor, ranks: int, capacity: int, one_per_rank: bool
) -> tuple[Tensor, Tensor, int]:
    """What moe_dispatch_places gives, slot by slot: each slot's place, each place's slot, and how many are dropped."""
    table = dict(enumerate(rank_of_id.tolist()))
    sent: list[list[int]] = [[] for _ in range(ranks)]
    for token, row in enumerate(topk_ids.tolist()):
        there: set[int] = set()
        for k, identity in enumerate(row):
            rank = table.get(identity, -1)
            if 0 <= rank < ranks and not (one_per_rank and rank in there):
                sent[rank].append(token * len(row) + k)
                there.add(rank)
    slot_to_place = [-1] * topk_ids.numel()
    place_to_slot = []
    for rank, slots in enumerate(sent):
        for order, slot in enumerate(slots[:capacity]):
            slot_to_place[slot] = rank * capacity + order
        place_to_slot += (slots + [-1] * capacity)[:capacity]
    tables = [torch.tensor(table, dtype=torch.int32, device="cpu") for table in (slot_to_place, place_to_slot)]
    return tables[0].reshape(topk_ids.shape), tables[1], sum(max(len(slots) - capacity, 0) for slots in sent)


def dispatch_row(x: Tensor, scale: Tensor | None, weights: list[float], ids: list[int], own: list[bool]) -> bytes:
    """A row of a message: a token's bytes of x and of its scales, ids (-1 if not its own) and weights."""

    def part(content: bytes) -> bytes:
        return content + bytes(-len(content) % 16)

    return (
        part(bytes(x.tolist()))
        + (b"" if scale is None else part(bytes(scale.tolist())))
        + part(b"".join(struct.pack("<i", i if o else -1) for i, o in zip(ids, own, strict=True)))
        + part(b"".join(struct.pack("<f", weight) for weight in weights))
    )


def finalized(rows: Tensor, slot_to_row: Tensor, weights: Tensor | None, shared: Tensor | None) -> Tensor:
    """The weighted sum of each token's rows in float64; a slot without a row adds nothing."""
    total = torch.zeros(len(slot_to_row), rows.shape[1], dtype=torch.float64, device="cpu")
    for token, places in enumerate(slot_to_row.tolist()):
        for k, row in enumerate(places):
            if 0 <= row < len(rows):
                total[token] += rows[row].to(torch.float64) * (1.0 if weights is None else float(weights[token, k]))
    return total if shared is None else total + shared.to(torch.float64)


def values_of(codes: Tensor, scale: Tensor | None) -> Tensor:
    """[rows, K] float64 of packed FP4 codes, FP8 codes or bfloat16, times the scales [rows, groups] of their groups."""
    if codes.dtype == torch.bfloat16:
        return codes.to(torch.float64)
    decode = code_tables.decode_e4m3 if codes.dtype == torch.float8_e4m3fn else code_tables.decode_e2m1
    values = decode(codes.view(torch.uint8))
    if scale is None:
        return values
    factor = code_tables.decode_e4m3 if scale.dtype == torch.float8_e4m3fn else code_tables.decode_e8m0
    factors = factor(scale.view(torch.uint8))
    return values * factors.repeat_interleave(values.shape[1] // factors.shape[1], dim=1)


def weights_of(weight: Tensor, scale: Tensor) -> Tensor:
    """One expert's weights [N, K] in float64, of the checkpoints' layout or, as int32 words, of interleave_weights'."""
    if weight.dtype != torch.int32:
        return values_of(weight, scale)
    blocks, rows = weight.shape[:2]
    bits = torch.stack([weight.to(torch.int64) >> place & 1 for place in range(32)], dim=-1)  # [blocks, rows, 16, 32]
    values = torch.empty(rows, blocks, 128, dtype=torch.float64, device="cpu")
    for word in range(16):
        place, group, half = word // 4, word // 2 % 2, word % 2
        for pair in range(4):
            for code in range(2):
                sign, *number = (bits[:, :, word, bit] for bit in BITS[pair][code])
                size = code_tables.E2M1[4 * number[0] + 2 * number[1] + number[2]]
                k = 64 * half + 32 * group + 8 * pair + 2 * place + code
                values[:, :, k] = (torch.where(sign == 1, -size, size)).T
    # Two bfloat16 in a word: the scale of as many positions of the first 64 in the low half; they are times 2^118.
    words = scale.to(torch.int64)
    halves = torch.stack((words & 0xFFFF, words >> 16 & 0xFFFF), dim=2)  # [blocks, rows, half, groups of a half]
    factors = halves.to(torch.int16).view(torch.bfloat16).to(torch.float64) * 2.0**-118
    factors = factors.flatten(2).transpose(0, 1)
    return (values * factors.repeat_interleave(128 // factors.shape[2], dim=2)).flatten(1)


def gate_and_up(columns: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """The gate's and up's columns of a first product: halves, or, interleaved, 8 of each by turns."""
    width = PAIR_ROWS if interleaved else columns.shape[1] // 2
    column = torch.arange(columns.shape[1], device="cpu")
    is_up = column // width % 2 == 1
    return columns[:, ~is_up], columns[:, is_up]


def rows_of_tiles(
    tile_to_expert: Tensor, row_to_slot: Tensor, top_k: int, x_rows: int, experts: int
) -> list[tuple[int, int, int, int]]:
    """(row, its slot, its row of x, its expert) of each row that is written."""
    tile_size = len(row_to_slot) // max(len(tile_to_expert), 1)
    written = []
    for row, slot in enumerate(row_to_slot.tolist()):
        expert = int(tile_to_expert[row // tile_size])
        source = slot // top_k if top_k else row
        if slot >= 0 and source < x_rows and 0 <= expert < experts:
            written.append((row, slot, source, expert))
    return written


def products(
    x: Tensor, weight: Tensor, weight_scale: Tensor, x_scale: Tensor | None, rows: list[tuple[int, int, int, int]],
    count: int, absolute: bool = False,
) -> Tensor:  # fmt: skip
    """[count, N] float64: each row's row of x times its expert's weights; or, absolute, the sums of sizes."""
    result = torch.zeros(count, weight.shape[-2], dtype=torch.float64, device="cpu")
    for expert in {expert for *_, expert in rows}:
        places = [row for row, _, _, of in rows if of == expert]
        sources = [source for _, _, source, of in rows if of == expert]
        taken = x.view(torch.uint8)[sources].view(x.dtype)
        values = values_of(taken, None if x_scale is None else x_scale.view(torch.uint8)[sources].view(x_scale.dtype))
        weights = weights_of(weight[expert], weight_scale[expert])
        result[places] = values.abs() @ weights.abs().T if absolute else values @ weights.T
    return result


def as_batch(scales: Tensor) -> Tensor:
    """[matrices, rows, columns] bytes of one matrix or of several."""
    return scales.view(torch.uint8).reshape(scales.shape[:-2].numel(), *scales.shape[-2:])


def swizzled_positions(rows: int, columns: int) -> Tensor:
    """[rows, columns] int64: the byte of the 32_4_4 layout that holds each scale."""
    r, c = torch.arange(rows, device="cpu")[:, None], torch.arange(columns, device="cpu")[None, :]
    across = -(-columns // 4)
    return (r // 128 * across + c // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4
