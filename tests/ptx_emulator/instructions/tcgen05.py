"""tcgen05: alloc, dealloc, ld, st, cp, mma, commit, waits and fences, of one block or of a pair (cta_group::2).

In a pair, each block holds half of the rows of A and of the result, and half of the columns of B; one thread issues for
both. Scales of A belong to a block's rows, scales of B are in both blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import number_formats as nf
from ..faults import LaneFault
from ..matrix_descriptors import Descriptor
from ..ptx_module import Address, Immediate, Instruction, Vector
from ..registry import Collective, Plain, collective, plain
from ..tensor_memory import LANES, Commit, tensor_memory_of
from ..wave import InFlight
from .elementwise import allow
from .load_store import shared_place
from .matrix import decoder
from .mbarrier import barriers_of, locate, warp_in_cluster
from .warp import warps_of

if TYPE_CHECKING:
    from ..program import Scope
    from ..wave import Active, Wave

Array = np.ndarray[Any, np.dtype[Any]]

COLLECTIVE_FORMS = ("alloc", "dealloc", "relinquish_alloc_permit", "ld", "st", "wait::ld", "wait::st")
_NUMBER_OF_BYTES = 32  # of K that an instruction multiplies, for every kind


@plain("tcgen05")
def single(instruction: Instruction, scope: Scope) -> Plain:
    """The forms that one thread issues: mma, cp, commit and fences"""
    form = instruction.qualifiers[0]
    if form.startswith("fence"):
        return lambda active: None
    forms = {"mma": _mma, "cp": _cp, "commit": _commit}
    if form not in forms:
        raise instruction.unknown()
    return forms[form](instruction, scope)


@collective("tcgen05")
def warp_wide(instruction: Instruction, scope: Scope) -> Collective:
    """The forms that a warp executes together: alloc, dealloc, relinquish_alloc_permit, ld, st, wait"""
    forms: dict[str, Callable[[Instruction, Scope], Plain]] = {
        "alloc": _alloc, "dealloc": _dealloc, "relinquish_alloc_permit": _relinquish, "ld": _ld, "st": _st,
        "wait::ld": _wait_ld, "wait::st": _wait_st,
    }  # fmt: skip
    return forms[instruction.qualifiers[0]](instruction, scope), None


# ------------------------------------------------------------------------------------------------------ allocation


def _first_lanes(active: Active) -> list[tuple[int, int, int]]:
    """(warp of the wave, block, first lane) of each active warp."""
    wave = active.wave
    return [(int(w), int(w) * 32 // wave.threads, int(w) * 32) for w in warps_of(active)]


def _alloc(instruction: Instruction, scope: Scope) -> Plain:
    address, count = scope.address(instruction.operands[0]), scope.wide(instruction.operands[1], "u32")

    def run(active: Active) -> None:
        wave = active.wave
        memory = tensor_memory_of(wave)
        addresses = active.rows(address(active))
        columns = count(active)
        blocks, offsets = shared_place(active, addresses & np.uint64(0xFFFFFFFF))
        position = {int(lane): row for row, lane in enumerate(active.index)}
        for _, block, lane in _first_lanes(active):
            start = memory.allocate(block, int(columns[lane]), lane)
            row = position[lane]
            one = np.array([lane])
            wave.shared.store(
                blocks[row : row + 1],
                offsets[row : row + 1],
                np.array([[start]], np.uint32),
                one,
                active.threads[row : row + 1],
            )
        wave.launch.progress += 1

    return run


def _dealloc(instruction: Instruction, scope: Scope) -> Plain:
    address, count = scope.wide(instruction.operands[0], "u32"), scope.wide(instruction.operands[1], "u32")

    def run(active: Active) -> None:
        for _, block, lane in _first_lanes(active):
            start = int(address(active)[lane]) & 0xFFFF
            tensor_memory_of(active.wave).free(block, start, int(count(active)[lane]), lane)

    return run


def _relinquish(instruction: Instruction, scope: Scope) -> Plain:
    def run(active: Active) -> None:
        for _, block, _lane in _first_lanes(active):
            tensor_memory_of(active.wave).may_allocate[block] = False

    return run


# ------------------------------------------------------------------------------------------------- loads and stores


def _fragment(instruction: Instruction) -> tuple[int, Array, Array, int]:
    """(registers, lane of tensor memory and column of each (thread, register), split): the shapes of ld and st.

    A shape is repeated along the columns. Rows of 16xNb shapes: each lane of tensor memory holds N/32 columns, thread t
    has lane t / 4 (t / 2 % 8 for 64 bits), and 8 lanes further on in its next registers (or in threads 16 to 31).
    16x32bx2 takes 16 lanes twice: threads 16 to 31 start `split` columns further on.
    """
    shapes = ("32x32b", "16x64b", "16x128b", "16x256b", "16x32bx2")
    repeats = tuple(f"x{1 << i}" for i in range(8))
    allow(instruction, "ld", "st", "sync", "aligned", "b32", *shapes, *repeats)
    shape = next(q for q in instruction.qualifiers if q in shapes)
    count = next(int(q[1:]) for q in instruction.qualifiers if q in repeats)
    thread = np.arange(32)
    none = np.zeros(32, np.int64)
    if shape == "32x32b":
        rows, columns, width = [thread], [none], 1
    elif shape == "16x32bx2":
        rows, columns, width = [thread % 16], [none], 1
    elif shape == "16x64b":
        rows, columns, width = [thread // 2 % 8 + thread // 16 * 8], [thread % 2], 2
    elif shape == "16x128b":
        rows, columns, width = [thread // 4, thread // 4 + 8], [thread % 4] * 2, 4
    else:
        place = thread % 4 * 2
        rows, columns, width = [thread // 4] * 2 + [thread // 4 + 8] * 2, [place, place + 1, place, place + 1], 8
    row = np.stack(rows * count, axis=1)
    column = np.stack([c + width * n for n in range(count) for c in columns], axis=1)
    split = 0
    if shape == "16x32bx2":
        (half,) = [o for o in instruction.operands if isinstance(o, Immediate)]
        split = int(half.value)
        column = column + np.where(thread >= 16, split, 0)[:, None]
    return row.shape[1], row, column, split


def _tensor_address(scope: Scope, operand: Any) -> Callable[[Active], Array]:
    if not isinstance(operand, Address):
        raise KeyError("tensor memory address")
    base = scope.wide(operand.base, "u32")
    offset = np.uint32(operand.offset & 0xFFFFFFFF)
    return lambda active: base(active) + offset


def _cells(wave: Wave, warp: int, address: int, lane: int, row: Array, column: Array) -> tuple[Array, Array]:
    """Lane of tensor memory and column of each (thread, register). A warp may access its quarter of the lanes."""
    quarter = warp % (wave.threads // 32) % 4
    first = address >> 16
    rows = first + row
    if first % 16 or rows.min() < 32 * quarter or rows.max() >= 32 * quarter + 32:
        raise LaneFault(
            "out of bounds",
            f"lanes from {first} of tensor memory, the warp may access {32 * quarter} to {32 * quarter + 31}",
            lane,
        )
    return rows, (address & 0xFFFF) + column


def _ld(instruction: Instruction, scope: Scope) -> Plain:
    count, row, column, _ = _fragment(instruction)
    targets = instruction.operands[0]
    items = targets.items if isinstance(targets, Vector) else (targets,)
    if len(items) != count:
        raise instruction.unknown("number of registers")
    slots = [scope.slot(item) for item in items]  # type: ignore[arg-type]
    address = _tensor_address(scope, instruction.operands[1])

    def run(active: Active) -> None:
        wave = active.wave
        memory = tensor_memory_of(wave)
        addresses = address(active)
        strict = "tcgen05.ld" in wave.launch.strict
        by_warp = []
        for warp, block, lane in _first_lanes(active):
            rows, columns = _cells(wave, warp, int(addresses[lane]), lane, row, column)
            memory.check_columns(block, int(columns.min()), int(np.ptp(columns)) + 1, lane)
            memory.check_read(block, rows, columns, lane, by_product=False)
            by_warp.append((warp, memory.data[block][rows, columns]))
        for number, slot in enumerate(slots):
            stored = wave.registers[slot]
            old = stored.resolve(active.mask) if stored.__class__ is InFlight else stored
            mask = stored.mask | active.mask if stored.__class__ is InFlight else active.mask
            wide = np.array(np.broadcast_to(old, (wave.lanes,))).reshape(-1, 32)
            for warp, values in by_warp:
                wide[warp] = values[:, number]
            wave.registers[slot] = InFlight(wide.reshape(-1), mask, "tcgen05.ld") if strict else wide.reshape(-1)
        if strict:
            memory.loads.append((active.mask, slots))

    return run


def _wait_ld(instruction: Instruction, scope: Scope) -> Plain:
    def run(active: Active) -> None:
        wave = active.wave
        memory = tensor_memory_of(wave)
        rest = []
        for mask, slots in memory.loads:
            for slot in slots:
                value = wave.registers[slot]
                if value.__class__ is InFlight and value.what == "tcgen05.ld":
                    value.mask = value.mask & ~active.mask
                    if not value.mask.any():
                        wave.registers[slot] = value.value
            mask = mask & ~active.mask
            if mask.any():
                rest.append((mask, slots))
        memory.loads = rest

    return run


def _st(instruction: Instruction, scope: Scope) -> Plain:
    count, row, column, _ = _fragment(instruction)
    address = _tensor_address(scope, instruction.operands[0])
    values = instruction.operands[-1]
    items = values.items if isinstance(values, Vector) else (values,)
    if len(items) != count:
        raise instruction.unknown("number of registers")
    sources = [scope.source(item, "b32") for item in items]

    def run(active: Active) -> None:
        wave = active.wave
        memory = tensor_memory_of(wave)
        addresses = address(active)
        stacked = np.stack([active.rows(s(active)) for s in sources], axis=1).reshape(-1, 32, count)
        for (warp, block, lane), data in zip(_first_lanes(active), stacked, strict=True):
            rows, columns = _cells(wave, warp, int(addresses[lane]), lane, row, column)
            memory.check_columns(block, int(columns.min()), int(np.ptp(columns)) + 1, lane)
            if (memory.product[block][rows, columns] > memory.completed[block]).any():
                raise LaneFault("missing wait", "store to tensor memory that a product is still writing", lane)
            memory.data[block][rows, columns] = data
            memory.written[block][rows, columns] = True
            memory.storing[block][rows, columns] = warp + 1
        wave.launch.progress += 1

    return run


def _wait_st(instruction: Instruction, scope: Scope) -> Plain:
    def run(active: Active) -> None:
        memory = tensor_memory_of(active.wave)
        for warp, block, _ in _first_lanes(active):
            cells = memory.storing[block]
            cells[cells == warp + 1] = 0

    return run


# --------------------------------------------------------------------------------------------------------- products


def _blocks_of(wave: Wave, block: int, group: int, lane: int) -> tuple[int, ...]:
    """The blocks that an instruction concerns: the own one, or the pair that it is part of."""
    if group == 1:
        return (block,)
    if wave.cluster_size % 2:
        raise LaneFault("invalid operand", "cta_group::2 in a cluster of an odd number of blocks", lane)
    return (block // 2 * 2, block // 2 * 2 + 1)


def _group(instruction: Instruction) -> int:
    return 2 if instruction.has("cta_group::2") else 1


def _commit(instruction: Instruction, scope: Scope) -> Plain:
    """tcgen05.commit{.multicast::cluster}: an arrival when the thread's products so far are complete"""
    known = ("commit", "cta_group::1", "cta_group::2", "mbarrier::arrive::one", "shared::cluster", "b64")
    allow(instruction, *known, "multicast::cluster")
    group = _group(instruction)
    address = scope.address(instruction.operands[0])
    mask = scope.source(instruction.operands[1], "u16") if instruction.has("multicast::cluster") else None

    def run(active: Active) -> None:
        wave = active.wave
        memory = tensor_memory_of(wave)
        masks = active.rows(mask(active)) if mask is not None else None
        for row, lane, block, offset in locate(active, active.rows(address(active)), deferred=True):
            own = int(active.blocks[row])
            targets = [block]
            if masks is not None:
                first = own - own % wave.cluster_size
                targets = [first + rank for rank in range(wave.cluster_size) if int(masks[row]) >> rank & 1]
            # Who waits for the products also comes after what their thread did before: the reads of shared memory.
            knowledge = wave.clocks.release(*warp_in_cluster(wave, lane))
            for target in targets:
                barrier = barriers_of(wave).find(wave, target, offset, lane)
                blocks = _blocks_of(wave, own, group, lane)
                commit = Commit(blocks, memory.issued, barrier, knowledge, lane)
                memory.commits.append(commit)
                barrier.deliveries.append(_delivery(wave, commit))

    return run


def _delivery(wave: Wave, commit: Commit) -> Callable[[], None]:
    """Complete a commit. Products complete in order, so all earlier commits of the block arrive first."""

    def deliver() -> None:
        memory = tensor_memory_of(wave)
        due = [c for c in memory.commits if c.blocks == commit.blocks and c.number <= commit.number]
        due = due[: due.index(commit) + 1]
        memory.commits = [c for c in memory.commits if c not in due]
        for one in due:
            one.barrier.deliveries = [d for d in one.barrier.deliveries if getattr(d, "commit", None) is not one]
            for block in one.blocks:
                memory.complete(wave, block, one.number)
            barriers_of(wave).arrive(wave, one.barrier, 1, one.knowledge, one.lane)

    deliver.commit = commit  # type: ignore[attr-defined]
    return deliver


def read_shared(wave: Wave, places: Array, block: int, lane: int, issued: int, line: int, unit: int = 16) -> Array:
    """Bytes of shared memory that a tensor operation reads until it is complete; whole units of `unit` bytes."""
    flat_places = places.reshape(-1)
    units = np.unique(flat_places // unit) * unit
    where, who = np.full(len(units), block), np.full(len(units), lane)
    wave.remote.check(wave, where, who, units, deferred=True)  # of a pair, the other block
    flat = wave.shared.check_range(where, units, unit, unit, who, "matrix operand")
    wave.shared.note_read(flat, unit, where, who, np.full(len(units), lane % (wave.threads * wave.cluster_size)))
    every = (flat[:, None] + np.arange(unit)).reshape(-1)
    tensor_memory_of(wave).operands[block].append((issued, every, wave.shared.data[every].copy(), line))
    return wave.shared.data[block * wave.shared.stride + flat_places].reshape(places.shape)


def _cp(instruction: Instruction, scope: Scope) -> Plain:
    """Shared to tensor memory: 128x256b, 128x128b, and 32x128b.warpx4, which all four quarters get"""
    allow(instruction, "cp", "cta_group::1", "cta_group::2", "128x256b", "128x128b", "32x128b", "warpx4")
    shape = next(q for q in instruction.qualifiers if q.endswith("b") and "x" in q)
    rows, bits = (int(v) for v in shape[:-1].split("x"))
    group = _group(instruction)
    address = _tensor_address(scope, instruction.operands[0])
    descriptor = scope.wide(instruction.operands[1], "b64")

    def run(active: Active) -> None:
        wave = active.wave
        memory = tensor_memory_of(wave)
        for lane, own in zip(active.index.tolist(), active.blocks.tolist(), strict=True):
            number = memory.begin()
            places = Descriptor.blackwell(int(descriptor(active)[lane])).places(rows, bits // 8, 8, True)
            start = int(address(active)[lane])
            columns = (start & 0xFFFF) + np.arange(bits // 32)
            for block in _blocks_of(wave, own, group, lane):
                words = np.ascontiguousarray(read_shared(wave, places, block, lane, number, instruction.line))
                memory.check_columns(block, int(columns[0]), len(columns), lane)
                for first in range(0, LANES, rows) if rows == 32 else (start >> 16,):
                    where = np.ix_(np.arange(first, first + rows), columns)
                    memory.data[block][where] = words.view(np.uint32)
                    memory.written[block][where] = True
                    memory.product[block][where] = number
        wave.launch.progress += 1

    return run


_F16_TYPES = {0: "f16", 1: "bf16"}
_SMALL_TYPES = {0: "e4m3", 1: "e5m2", 3: "e2m3", 4: "e3m2", 5: "e2m1"}
_SCALED = {"mxf8f6f4": 32, "mxf4": 32, "mxf4nvf4": 16}


def _types(kind: str, code: int, instruction: Instruction) -> str:
    if kind == "f16":
        return _F16_TYPES[code]
    if kind == "tf32":
        return "tf32"
    if kind in ("f8f6f4", "mxf8f6f4"):
        return _SMALL_TYPES[code]
    if kind in ("mxf4", "mxf4nvf4") and code == 1:
        return "e2m1"
    if kind == "i8":
        return "s8" if code else "u8"
    raise instruction.unknown(f"operand type {code}")


def _mma(instruction: Instruction, scope: Scope) -> Plain:
    """tcgen05.mma, A from shared or tensor memory, dense, with and without block scales"""
    kind = next(q[6:] for q in instruction.qualifiers if q.startswith("kind::"))
    group = _group(instruction)
    allow(
        instruction,
        "mma",
        "cta_group::1",
        "cta_group::2",
        f"kind::{kind}",
        "block_scale",
        "block16",
        "block32",
        "scale_vec::1X",
        "scale_vec::2X",
        "scale_vec::4X",
        *(f"collector::a::{w}" for w in ("fill", "use", "lastuse", "discard")),
    )
    d, a, b, idesc, *rest = instruction.operands
    to = _tensor_address(scope, d)
    a_in_tensor_memory = isinstance(a, Address)
    left = _tensor_address(scope, a) if a_in_tensor_memory else scope.wide(a, "b64")
    right, describe = scope.wide(b, "b64"), scope.wide(idesc, "b32")
    scale_places = None
    block_size = 0
    if instruction.has("block_scale"):
        scale_places = [_tensor_address(scope, rest.pop(0)), _tensor_address(scope, rest.pop(0))]
        block_size = _block_size(instruction, kind)
    if rest and isinstance(rest[0], Vector):
        raise instruction.unknown("disabled lanes")
    accumulate = scope.wide(rest[0], "pred")
    if len(rest) > 1 and not (isinstance(rest[1], Immediate) and rest[1].value == 0):
        raise instruction.unknown("scale of the input")

    def run(active: Active) -> None:
        wave = active.wave
        memory = tensor_memory_of(wave)
        for lane, own in zip(active.index.tolist(), active.blocks.tolist(), strict=True):
            fields = _Fields(int(describe(active)[lane]), kind, instruction)
            number = memory.begin()
            blocks = _blocks_of(wave, own, group, lane)
            issue = _Issue(wave, lane, number, instruction, kind)
            right_place = int(right(active)[lane])
            values_b = np.concatenate(
                [issue.shared(block, right_place, fields.n // group, fields.b, fields.b_k_major) for block in blocks]
            )
            for block in blocks:
                if a_in_tensor_memory:
                    values_a = _from_tensor_memory(memory, int(left(active)[lane]), block, lane, fields)
                else:
                    values_a = issue.shared(block, int(left(active)[lane]), fields.m, fields.a, fields.a_k_major)
                scaled_b = values_b
                if scale_places is not None:
                    place_a, place_b = (int(where(active)[lane]) for where in scale_places)
                    table = nf.DECODE["ue8m0" if fields.scales_are_ue8m0 else "ue4m3"]
                    count = values_a.shape[1] // block_size
                    codes_a = _scales(memory, place_a, block, lane, fields.m, count, fields.a_scale_id)
                    codes_b = _scales(memory, place_b, block, lane, fields.n, count, fields.b_scale_id)
                    values_a = values_a * np.repeat(table[codes_a], block_size, axis=1)
                    scaled_b = values_b * np.repeat(table[codes_b], block_size, axis=1)
                product = (values_a * fields.sign_a) @ (scaled_b * fields.sign_b).T
                add = bool(accumulate(active)[lane])
                _accumulate(memory, block, int(to(active)[lane]), product, add, fields, number, lane)
        wave.launch.progress += 1

    return run


def _block_size(instruction: Instruction, kind: str) -> int:
    for qualifier in instruction.qualifiers:
        if qualifier.startswith("block") and qualifier[5:].isdigit():
            return int(qualifier[5:])
        if qualifier.startswith("scale_vec::"):
            return (64 if kind != "mxf8f6f4" else 32) // int(qualifier[11:-1])
    return _SCALED[kind]


class _Fields:
    """The instruction descriptor."""

    def __init__(self, bits: int, kind: str, instruction: Instruction) -> None:
        scaled = kind in _SCALED
        if bits >> 2 & 1:
            raise instruction.unknown("sparsity")
        self.a = _types(kind, bits >> 7 & 7, instruction)
        self.b = _types(kind, bits >> 10 & (3 if kind in ("mxf4", "mxf4nvf4") else 7), instruction)
        self.sign_a, self.sign_b = 1 - 2 * (bits >> 13 & 1), 1 - 2 * (bits >> 14 & 1)
        self.a_k_major, self.b_k_major = not bits >> 15 & 1, not bits >> 16 & 1
        self.n = (bits >> 17 & 63) * 8
        group = _group(instruction)
        rows = (bits >> 24 & 31) * 16
        self.m = rows // group  # of one block
        self.result = "f32" if scaled else {0: "f16", 1: "f32", 2: "s32"}[bits >> 4 & 3]
        self.scales_are_ue8m0 = bool(bits >> 23 & 1)
        self.a_scale_id, self.b_scale_id = bits >> 29 & 3, bits >> 4 & 3
        if rows == 128 and group == 2:
            raise instruction.unknown("128 rows in a pair of blocks")
        step = (8 if self.m == 64 else 16) * group
        if rows not in ((64, 128) if group == 1 else (256,)) or not 8 <= self.n <= 256 or self.n % step:
            raise LaneFault("invalid operand", f"instruction descriptor {bits:#x}: shape {rows} x {self.n}")
        if kind in ("mxf4", "mxf4nvf4") and bits >> 31:
            raise instruction.unknown("K of 96")


class _Issue:
    """One issued product, as the reader of operands in shared memory."""

    def __init__(self, wave: Wave, lane: int, number: int, instruction: Instruction, kind: str) -> None:
        self.wave, self.lane, self.number, self.instruction, self.kind = wave, lane, number, instruction, kind

    def _read(self, block: int, places: Array, unit: int = 16) -> Array:
        return read_shared(self.wave, places, block, self.lane, self.number, self.instruction.line, unit)

    def shared(self, block: int, descriptor: int, rows: int, type_name: str, k_major: bool) -> Array:
        """An operand as float64 (rows, k)."""
        layout = Descriptor.blackwell(descriptor)
        bits, decode = decoder(type_name)
        if type_name in ("e2m1", "e2m3", "e3m2"):
            if not k_major:
                raise self.instruction.unknown("MN-major operand of less than 8 bits")
            places = layout.places(rows, _NUMBER_OF_BYTES, 8, True)
            if self.kind in ("mxf4", "mxf4nvf4"):
                data = self._read(block, places)
                return decode(np.stack([data & 15, data >> 4], axis=-1).reshape(rows, -1))
            width = 4 if type_name == "e2m1" else 6
            places = places.reshape(rows, -1, 16)[:, :, : 2 * width]  # the rest of every 16 bytes is padding
            return decode(_unpadded(self._read(block, places, unit=8 if width == 4 else 4), width))
        size = bits // 8
        places = layout.places(rows, _NUMBER_OF_BYTES // size, bits, k_major)
        data = self._read(block, places[..., None] + np.arange(size))
        return decode(np.ascontiguousarray(data).view(f"u{size}").reshape(rows, -1))


def _unpadded(data: Array, bits: int) -> Array:
    """Elements of 4 or 6 bits of kind f8f6f4, 16 of them in each (row, chunk, 2 * bits bytes)."""
    chunks = np.unpackbits(data.reshape(-1, 2 * bits), axis=1, bitorder="little").reshape(-1, 16, bits)
    codes = np.packbits(chunks, axis=2, bitorder="little")[..., 0]
    return codes.reshape(data.shape[0], -1)


def _rows_of_product(m: int) -> Array:
    """The lane of each row: all 128, or for 64 rows the first half of each warp's quarter."""
    row = np.arange(m)
    return row if m == 128 else row // 16 * 32 + row % 16


def _from_tensor_memory(memory: Any, place: int, block: int, lane: int, fields: _Fields) -> Array:
    """A as float64: one row per lane, K along the columns."""
    bits, decode = decoder(fields.a)
    if fields.a in ("e2m1", "e2m3", "e3m2"):
        raise LaneFault("invalid operand", "A in tensor memory with elements below 8 bits is not implemented", lane)
    columns = (place & 0xFFFF) + np.arange(_NUMBER_OF_BYTES // 4)
    memory.check_columns(block, int(columns[0]), len(columns), lane)
    rows = _rows_of_product(fields.m) + (place >> 16)
    memory.check_read(block, rows[:, None], columns, lane, by_product=True)
    words = np.ascontiguousarray(memory.data[block][np.ix_(rows, columns)])
    return decode(words.view(f"u{bits // 8}"))


def _scales(memory: Any, place: int, block: int, lane: int, rows: int, count: int, selector: int) -> Array:
    """Scale codes (rows, count): row r is in lane r % 32, column r / 32; the selector is the first byte."""
    first = place & 0xFFFF
    columns = first + np.arange(-(-rows // 32))
    memory.check_columns(block, first, len(columns), lane)
    memory.check_read(block, np.arange(32)[:, None], columns, lane, by_product=True)
    row = np.arange(rows)
    words = memory.data[block][row % 32, first + row // 32]
    if selector + count > 4:
        raise LaneFault("invalid operand", f"scale factor id {selector} with {count} scales", lane)
    return (words[:, None] >> (8 * (selector + np.arange(count))).astype(np.uint32)) & np.uint32(255)


def _accumulate(
    memory: Any, block: int, place: int, product: Array, add: bool, fields: _Fields, number: int, lane: int
) -> None:
    column = place & 0xFFFF
    rows = _rows_of_product(fields.m) + (place >> 16)
    columns = column + np.arange(fields.n)
    memory.check_columns(block, column, fields.n, lane)
    where = np.ix_(rows, columns)
    if add:
        memory.check_read(block, rows[:, None], columns, lane, by_product=True)
    old = memory.data[block][where]
    if fields.result == "f32":
        total = product + (old.view(np.float32).astype(np.float64) if add else 0.0)
        words = nf.canonical(total.astype(np.float32)).view(np.uint32)
    elif fields.result == "s32":
        total = product + (old.view(np.int32).astype(np.float64) if add else 0.0)
        words = (total.astype(np.int64) & 0xFFFFFFFF).astype(np.uint32)
    else:
        start = (old & np.uint32(0xFFFF)).astype(np.uint16).view(np.float16).astype(np.float64) if add else 0.0
        words = nf.f16_code(product + start).astype(np.uint32)
    memory.data[block][where] = words
    memory.written[block][where] = True
    memory.product[block][where] = number
