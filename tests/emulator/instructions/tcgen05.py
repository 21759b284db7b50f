"""tcgen05 of one block (cta_group::1): alloc, dealloc, ld, st, cp, mma, commit, waits and fences."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable

import numpy as np

from .. import number_formats as nf
from ..faults import LaneFault
from ..matrix_descriptors import Descriptor
from ..ptx_parser import Address, Immediate, Instruction, Vector
from ..registry import Collective, Plain, collective, plain
from ..tensor_memory import LANES, tensor_memory_of
from ..wave import InFlight
from .elementwise import allow
from .load_store import shared_place
from .matrix import decoder
from .mbarrier import barriers_of, locate
from .warp import warps_of

if TYPE_CHECKING:
    from ..program import Scope
    from ..wave import Active, Wave

Array = np.ndarray[Any, np.dtype[Any]]

COLLECTIVE_FORMS = ("alloc", "dealloc", "relinquish_alloc_permit", "ld", "st", "wait::ld", "wait::st")
_NUMBER_OF_BYTES = 32  # of K that an instruction multiplies, for every kind


def is_collective(instruction: Instruction) -> bool:
    """Whether whole warps execute it; the other forms are issued by single threads."""
    return instruction.qualifiers[0] in COLLECTIVE_FORMS


@plain("tcgen05")
def single(instruction: Instruction, scope: Scope) -> Plain:
    """The forms that one thread issues: mma, cp, commit and fences"""
    form = instruction.qualifiers[0]
    if instruction.has("cta_group::2"):
        raise instruction.unknown("pairs of blocks")
    if form.startswith("fence"):
        return lambda active: None
    forms = {"mma": _mma, "cp": _cp, "commit": _commit}
    if form not in forms:
        raise instruction.unknown()
    return forms[form](instruction, scope)


@collective("tcgen05")
def warp_wide(instruction: Instruction, scope: Scope) -> Collective:
    """The forms that a warp executes together: alloc, dealloc, relinquish_alloc_permit, ld, st, wait"""
    if instruction.has("cta_group::2"):
        raise instruction.unknown("pairs of blocks")
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
                blocks[row:row + 1], offsets[row:row + 1], np.array([[start]], np.uint32), one, active.threads[row:row + 1]
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


def _shape(instruction: Instruction) -> int:
    """Number of columns of the 32x32b shape, the only one implemented."""
    allow(instruction, "ld", "st", "sync", "aligned", "32x32b", "b32", *(f"x{1 << i}" for i in range(8)))
    return next(int(q[1:]) for q in instruction.qualifiers if q[0] == "x" and q[1:].isdigit())


def _tensor_address(scope: Scope, operand: Any) -> Callable[[Active], Array]:
    if not isinstance(operand, Address):
        raise KeyError("tensor memory address")
    base = scope.wide(operand.base, "u32")
    offset = np.uint32(operand.offset & 0xFFFFFFFF)
    return lambda active: base(active) + offset


def _own_rows(wave: Wave, warp: int, address: int, lane: int) -> Array:
    """Lanes of tensor memory that the warp may access: its quarter."""
    quarter = warp % (wave.threads // 32) % 4
    row = address >> 16
    if row != 32 * quarter:
        raise LaneFault("out of bounds", f"lane {row} of tensor memory, the warp may access {32 * quarter} to {32 * quarter + 31}", lane)
    return np.arange(row, row + 32)


def _ld(instruction: Instruction, scope: Scope) -> Plain:
    count = _shape(instruction)
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
        rows_by_warp = []
        for warp, block, lane in _first_lanes(active):
            place = int(addresses[lane])
            rows = _own_rows(wave, warp, place, lane)
            columns = (place & 0xFFFF) + np.arange(count)
            memory.check_columns(block, int(columns[0]), count, lane)
            memory.check_read(block, rows, columns, lane, by_product=False)
            rows_by_warp.append((warp, memory.data[block][np.ix_(rows, columns)]))
        for number, slot in enumerate(slots):
            stored = wave.registers[slot]
            old = stored.resolve(active.mask) if stored.__class__ is InFlight else stored
            mask = stored.mask | active.mask if stored.__class__ is InFlight else active.mask
            wide = np.array(np.broadcast_to(old, (wave.lanes,))).reshape(-1, 32)
            for warp, values in rows_by_warp:
                wide[warp] = values[:, number]
            wave.registers[slot] = InFlight(wide.reshape(-1), mask, "tcgen05.ld")
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
    count = _shape(instruction)
    address = _tensor_address(scope, instruction.operands[0])
    values = instruction.operands[1]
    items = values.items if isinstance(values, Vector) else (values,)
    if len(items) != count:
        raise instruction.unknown("number of registers")
    sources = [scope.source(item, "b32") for item in items]

    def run(active: Active) -> None:
        wave = active.wave
        memory = tensor_memory_of(wave)
        addresses = address(active)
        block_of_values = np.stack([active.rows(s(active)) for s in sources], axis=1).reshape(-1, 32, count)
        for (warp, block, lane), data in zip(_first_lanes(active), block_of_values):
            place = int(addresses[lane])
            rows = _own_rows(wave, warp, place, lane)
            columns = (place & 0xFFFF) + np.arange(count)
            memory.check_columns(block, int(columns[0]), count, lane)
            where = np.ix_(rows, columns)
            if (memory.product[block][where] > memory.completed[block]).any():
                raise LaneFault("missing wait", "store to tensor memory that a product is still writing", lane)
            memory.data[block][where] = data
            memory.written[block][where] = True
            memory.storing[block][where] = warp + 1
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


def _commit(instruction: Instruction, scope: Scope) -> Plain:
    allow(instruction, "commit", "cta_group::1", "mbarrier::arrive::one", "shared::cluster", "b64")
    address = scope.address(instruction.operands[0])

    def run(active: Active) -> None:
        wave = active.wave
        memory = tensor_memory_of(wave)
        for row, lane, block, offset in locate(active, active.rows(address(active))):
            barrier = barriers_of(wave).find(block, offset, lane)
            own, number = int(active.blocks[row]), memory.issued

            def deliver(own: int = own, number: int = number, barrier: Any = barrier, lane: int = lane) -> None:
                memory.complete(wave, own, number)
                barriers_of(wave).arrive(wave, barrier, 1, None, lane)

            barrier.deliveries.append(deliver)

    return run


def read_shared(wave: Wave, places: Array, block: int, lane: int, issued: int, line: int) -> Array:
    """Bytes of shared memory that a tensor operation reads until it is complete."""
    flat_places = places.reshape(-1)
    units = np.unique(flat_places // 16) * 16
    where, who = np.full(len(units), block), np.full(len(units), lane)
    flat = wave.shared.check_range(where, units, 16, 16, who, "matrix operand")
    wave.shared.note_read(flat, 16, where, who, np.full(len(units), lane % (wave.threads * wave.cluster_size)))
    every = (flat[:, None] + np.arange(16)).reshape(-1)
    tensor_memory_of(wave).operands[block].append((issued, every, wave.shared.data[every].copy(), line))
    return wave.shared.data[block * wave.shared.stride + flat_places].reshape(places.shape)


def _cp(instruction: Instruction, scope: Scope) -> Plain:
    """Shared to tensor memory: 128x256b, 128x128b, and 32x128b.warpx4, which all four quarters get"""
    allow(instruction, "cp", "cta_group::1", "128x256b", "128x128b", "32x128b", "warpx4")
    shape = next(q for q in instruction.qualifiers if q.endswith("b") and "x" in q)
    rows, bits = (int(v) for v in shape[:-1].split("x"))
    address = _tensor_address(scope, instruction.operands[0])
    descriptor = scope.wide(instruction.operands[1], "b64")

    def run(active: Active) -> None:
        wave = active.wave
        memory = tensor_memory_of(wave)
        for lane, block in zip(active.index.tolist(), active.blocks.tolist()):
            number = memory.begin(block)
            places = Descriptor.blackwell(int(descriptor(active)[lane])).places(rows, bits // 8, 8, True)
            data = read_shared(wave, places, block, lane, number, instruction.line)
            words = np.ascontiguousarray(data).view(np.uint32)
            start = int(address(active)[lane])
            columns = (start & 0xFFFF) + np.arange(bits // 32)
            memory.check_columns(block, int(columns[0]), len(columns), lane)
            for first in range(0, LANES, rows) if rows == 32 else (start >> 16,):
                where = np.ix_(np.arange(first, first + rows), columns)
                memory.data[block][where] = words
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
    """tcgen05.mma of one block, A from shared or tensor memory, dense, with and without block scales"""
    kind = next(q[6:] for q in instruction.qualifiers if q.startswith("kind::"))
    allow(instruction, "mma", "cta_group::1", f"kind::{kind}", "block_scale", "block16", "block32", "scale_vec::1X",
          "scale_vec::2X", "scale_vec::4X", *(f"collector::a::{w}" for w in ("fill", "use", "lastuse", "discard")))  # fmt: skip
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
        for lane, block in zip(active.index.tolist(), active.blocks.tolist()):
            fields = _Fields(int(describe(active)[lane]), kind, instruction)
            number = memory.begin(block)
            place = int(to(active)[lane])
            column = place & 0xFFFF
            if a_in_tensor_memory:
                values_a = _from_tensor_memory(memory, int(left(active)[lane]), block, lane, fields)
            else:
                values_a = _from_shared(wave, int(left(active)[lane]), fields.m, fields.a, fields.a_k_major, block, lane, number, instruction, kind)
            values_b = _from_shared(wave, int(right(active)[lane]), fields.n, fields.b, fields.b_k_major, block, lane, number, instruction, kind)
            if scale_places is not None:
                table = nf.DECODE["ue8m0" if fields.scales_are_ue8m0 else "ue4m3"]
                for values, where, selector, rows in (
                    (values_a, scale_places[0], fields.a_scale_id, fields.m), (values_b, scale_places[1], fields.b_scale_id, fields.n),
                ):  # fmt: skip
                    codes = _scales(memory, int(where(active)[lane]), block, lane, rows, values.shape[1] // block_size, selector)
                    values *= np.repeat(table[codes], block_size, axis=1)
            product = (values_a * fields.sign_a) @ (values_b * fields.sign_b).T
            _accumulate(memory, block, place, column, product, bool(accumulate(active)[lane]), fields, number, lane)
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
        self.m = (bits >> 24 & 31) * 16
        self.result = "f32" if scaled else {0: "f16", 1: "f32", 2: "s32"}[bits >> 4 & 3]
        self.scales_are_ue8m0 = bool(bits >> 23 & 1)
        self.a_scale_id, self.b_scale_id = bits >> 29 & 3, bits >> 4 & 3
        step = 8 if self.m == 64 else 16
        if self.m not in (64, 128) or not 8 <= self.n <= 256 or self.n % step:
            raise LaneFault("invalid operand", f"instruction descriptor {bits:#x}: shape {self.m} x {self.n}")
        if kind in ("mxf4", "mxf4nvf4") and bits >> 31:
            raise instruction.unknown("K of 96")


def _from_shared(
    wave: Wave, descriptor: int, rows: int, type_name: str, k_major: bool, block: int, lane: int, number: int,
    instruction: Instruction, kind: str,
) -> Array:
    """An operand as float64 (rows, k)."""
    layout = Descriptor.blackwell(descriptor)
    bits, decode = decoder(type_name)
    if type_name in ("e2m1", "e2m3", "e3m2"):
        if not k_major:
            raise instruction.unknown("MN-major operand of less than 8 bits")
        data = read_shared(wave, layout.places(rows, _NUMBER_OF_BYTES, 8, True), block, lane, number, instruction.line)
        if kind in ("mxf4", "mxf4nvf4"):
            return decode(np.stack([data & 15, data >> 4], axis=-1).reshape(rows, -1))
        return decode(_unpadded(data, 4 if type_name == "e2m1" else 6))
    size = bits // 8
    places = layout.places(rows, _NUMBER_OF_BYTES // size, bits, k_major)
    data = read_shared(wave, places[..., None] + np.arange(size), block, lane, number, instruction.line)
    codes = np.ascontiguousarray(data).view(f"u{size}").reshape(rows, -1)
    return decode(codes)


def _unpadded(data: Array, bits: int) -> Array:
    """Sub-byte elements of kind f8f6f4: 16 elements at the start of each 16 bytes."""
    chunks = np.unpackbits(data.reshape(-1, 16), axis=1, bitorder="little")[:, :16 * bits].reshape(-1, 16, bits)
    codes = np.packbits(chunks, axis=2, bitorder="little")[..., 0]
    return codes.reshape(data.shape[0], -1)


def _from_tensor_memory(memory: Any, place: int, block: int, lane: int, fields: _Fields) -> Array:
    """A as float64: a row a lane, K along the columns."""
    bits, decode = decoder(fields.a)
    if fields.m != 128 or bits < 8:
        raise LaneFault("invalid operand", "A in tensor memory with M other than 128 or elements below 8 bits is not implemented", lane)
    columns = (place & 0xFFFF) + np.arange(_NUMBER_OF_BYTES // 4)
    memory.check_columns(block, int(columns[0]), len(columns), lane)
    rows = np.arange(128)
    memory.check_read(block, rows, columns, lane, by_product=True)
    words = np.ascontiguousarray(memory.data[block][np.ix_(rows, columns)])
    return decode(words.view(f"u{bits // 8}"))


def _scales(memory: Any, place: int, block: int, lane: int, rows: int, count: int, selector: int) -> Array:
    """Scale codes (rows, count): row r is in lane r % 32, column r / 32; the selector is the first byte."""
    first = place & 0xFFFF
    columns = first + np.arange(-(-rows // 32))
    memory.check_columns(block, first, len(columns), lane)
    memory.check_read(block, np.arange(32), columns, lane, by_product=True)
    row = np.arange(rows)
    words = memory.data[block][row % 32, first + row // 32]
    if selector + count > 4:
        raise LaneFault("invalid operand", f"scale factor id {selector} with {count} scales", lane)
    return (words[:, None] >> (8 * (selector + np.arange(count))).astype(np.uint32)) & np.uint32(255)


def _accumulate(
    memory: Any, block: int, place: int, column: int, product: Array, add: bool, fields: _Fields, number: int, lane: int
) -> None:
    row = np.arange(fields.m)
    rows = row if fields.m == 128 else row // 16 * 32 + row % 16
    rows = rows + (place >> 16)
    columns = column + np.arange(fields.n)
    memory.check_columns(block, column, fields.n, lane)
    where = np.ix_(rows, columns)
    if add:
        memory.check_read(block, rows, columns, lane, by_product=True)
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


