"""wgmma: matrix products of a warpgroup with operands in shared memory. They complete when their group is waited for.

The product is formed when the instruction is issued. Until the wait, the accumulator registers must not be touched, and
operands in shared memory must not change.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import number_formats as nf
from ..faults import LaneFault
from ..matrix_descriptors import Descriptor
from ..ptx_module import Immediate, Instruction, Vector
from ..registry import Collective, collective
from ..wave import InFlight
from .matrix import _C_COLUMN, _C_ROW, assemble_a, decoder

if TYPE_CHECKING:
    from ..program import Scope
    from ..wave import Active, Wave

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass
class Product:
    """An issued product: who, which group, which registers, which bytes of shared memory it reads."""

    mask: Array
    group: Array  # by lane of the wave
    slots: list[int]
    flat: Array
    seen: Array
    line: int


class Products:
    """All wgmma in flight of a wave."""

    def __init__(self, wave: Wave) -> None:
        self.pending: list[Product] = []
        self.committed = np.zeros(wave.lanes, np.int64)

    def wait(self, active: Active, keep: int) -> None:
        """Complete all but the newest `keep` groups of the active lanes."""
        wave = active.wave
        rest = []
        for product in self.pending:
            due = product.mask & active.mask & (product.group < self.committed - keep)
            if due.any():
                if not np.array_equal(wave.shared.data[product.flat], product.seen):
                    raise LaneFault(
                        "missing wait",
                        f"shared memory changed while the wgmma of line {product.line} was reading it",
                        int(np.flatnonzero(due)[0]),
                    )
                product.mask = product.mask & ~due
            if product.mask.any():
                rest.append(product)
        self.pending = rest
        busy: dict[int, Array] = {}
        for product in rest:
            for slot in product.slots:
                busy[slot] = busy[slot] | product.mask if slot in busy else product.mask
        for slot, value in enumerate(wave.registers):
            if value.__class__ is InFlight and value.what == "wgmma":
                flying = busy.get(slot)
                if flying is None:
                    wave.registers[slot] = value.value
                else:
                    value.mask = flying


def products_of(wave: Wave) -> Products:
    """The wave's wgmma."""
    if "wgmma" not in wave.state:
        wave.state["wgmma"] = Products(wave)
    found = wave.state["wgmma"]
    assert isinstance(found, Products)
    return found


@collective("wgmma")
def wgmma(instruction: Instruction, scope: Scope) -> Collective:
    """wgmma.mma_async, .fence, .commit_group, .wait_group"""
    if instruction.has("fence"):
        return (lambda active: None), None, 128
    if instruction.has("commit_group"):

        def commit(active: Active) -> None:
            products = products_of(active.wave)
            products.committed = products.committed + active.mask

        return commit, None, 128
    if instruction.has("wait_group"):
        count = instruction.operands[0]
        assert isinstance(count, Immediate)
        keep = int(count.value)
        return (lambda active: products_of(active.wave).wait(active, keep)), None, 128
    return _multiply(instruction, scope)


def _multiply(instruction: Instruction, scope: Scope) -> Collective:
    shape = next((m for m in (re.match(r"m64n(\d+)k(\d+)$", q) for q in instruction.qualifiers) if m), None)
    if shape is None or instruction.has("sp"):
        raise instruction.unknown("shape")
    n, k = int(shape.group(1)), int(shape.group(2))
    types = instruction.qualifiers[instruction.qualifiers.index(shape.group(0)) + 1 :]
    if len(types) != 3 or types[0] not in ("f32", "f16", "s32"):
        raise instruction.unknown("types")
    d_type, a_type, b_type = types
    bits, decode_a = decoder(a_type)
    decode_b = decoder(b_type)[1]
    d, a, b, scale, *immediates = instruction.operands
    constants = [int(i.value) for i in immediates if isinstance(i, Immediate)]
    if len(constants) != len(immediates) or not isinstance(d, Vector):
        raise instruction.unknown("operands")
    sign_a, sign_b = constants[:2] if len(constants) >= 2 else (1, 1)
    flips = constants[2:]
    in_registers = isinstance(a, Vector)
    flip_b = bool(flips[-1]) if flips else False
    flip_a = bool(flips[0]) if len(flips) == 2 else False
    slots = [scope.slot(item) for item in d.items]  # type: ignore[arg-type]
    if len(slots) != (n // 4 if d_type == "f16" else n // 2):
        raise instruction.unknown("number of accumulators")
    registers_a = [scope.wide(i, "b32") for i in a.items] if isinstance(a, Vector) else []
    descriptor_a = None if in_registers else scope.wide(a, "b64")
    descriptor_b = scope.wide(b, "b64")
    accumulate = scope.wide(scale, "pred") if not isinstance(scale, Immediate) else None
    always = bool(scale.value) if isinstance(scale, Immediate) else False

    def run(active: Active) -> None:
        wave = active.wave
        groups = np.flatnonzero(active.mask.reshape(-1, 128).any(axis=1))
        lanes = groups * 128
        blocks = lanes // wave.threads
        seen: list[Array] = []
        right = _operand(active, descriptor_b(active)[lanes], blocks, lanes, n, k, bits, not flip_b, seen)
        right_values = decode_b(right) * sign_b
        if descriptor_a is not None:
            left = _operand(active, descriptor_a(active)[lanes], blocks, lanes, 64, k, bits, not flip_a, seen)
        else:
            words = np.stack([r(active).reshape(-1, 32) for r in registers_a], axis=1)
            warps = (groups[:, None] * 4 + np.arange(4)).reshape(-1)
            left = assemble_a(words[warps], bits, k).reshape(len(groups), 64, k)
        product = np.matmul(decode_a(left) * sign_a, right_values.swapaxes(1, 2))
        tiles = product.reshape(len(groups) * 4, 16, n // 8, 8).swapaxes(1, 2)  # (warps, n / 8, 16, 8)
        fragments = tiles[:, :, _C_ROW, _C_COLUMN]  # (warps, n / 8, 4, 32)
        keep = (
            accumulate(active).reshape(-1, 128)[groups, 0] if accumulate is not None else np.full(len(groups), always)
        )
        _write(active, groups, fragments, keep, slots, d_type)
        flat = np.concatenate(seen) if seen else np.zeros(0, np.int64)
        products = products_of(wave)
        products.pending.append(
            Product(
                active.mask, products.committed.copy(), slots, flat, wave.shared.data[flat].copy(), instruction.line
            )
        )

    return run, None, 128


def _operand(
    active: Active,
    descriptors: Array,
    blocks: Array,
    lanes: Array,
    rows: int,
    k: int,
    bits: int,
    k_major: bool,
    seen: list[Array],
) -> Array:
    """Codes (groups, rows, k) of an operand in shared memory."""
    wave = active.wave
    size = bits // 8
    result = np.empty((len(lanes), rows, k), np.uint32)
    for number, (bits_of, block, lane) in enumerate(
        zip(descriptors.tolist(), blocks.tolist(), lanes.tolist(), strict=False)
    ):
        places = Descriptor.hopper(bits_of).places(rows, k, bits, k_major)
        where, who = np.full(places.size, block), np.full(places.size, lane)
        flat = wave.shared.check_range(where, places.reshape(-1), size, size, who, "matrix operand")
        threads = np.full(places.size, lane % (wave.threads * wave.cluster_size))
        _note(wave, flat, size, where, who, threads)
        result[number] = wave.shared.data.view(f"u{size}")[flat // size].reshape(rows, k)
        seen.append((flat[:, None] + np.arange(size)).reshape(-1))
    return result


def _note(wave: Wave, flat: Array, size: int, blocks: Array, lanes: Array, threads: Array) -> None:
    """Record reads, one for each 16 bytes."""
    units, first = np.unique(flat // 16, return_index=True)
    wave.shared.note_read(units * 16, 16, blocks[first], lanes[first], threads[first])


def _write(active: Active, groups: Array, fragments: Array, keep: Array, slots: list[int], d_type: str) -> None:
    """Add the products to the accumulators and mark these as in flight."""
    wave = active.wave
    warps = (groups[:, None] * 4 + np.arange(4)).reshape(-1)
    kept = np.repeat(keep, 4)[:, None]
    halves = 2 if d_type == "f16" else 1
    for number, slot in enumerate(slots):
        stored = wave.registers[slot]
        flying = stored if stored.__class__ is InFlight else None
        if flying is not None and flying.what != "wgmma":
            flying.resolve(active.mask)
        old = flying.value if flying is not None else stored
        wide = np.broadcast_to(old, (wave.lanes,)).reshape(-1, 32)
        before = wide[warps]
        if d_type == "f16":
            tile, part = divmod(number, 2)
            pairs = (
                np.ascontiguousarray(before)
                .view(np.uint16)
                .reshape(*before.shape, 2)
                .view(np.float16)
                .astype(np.float64)
            )
            total = np.stack([fragments[:, tile, 2 * part + i] for i in range(halves)], axis=-1)
            code = nf.f16_code(total + np.where(kept[..., None], pairs, 0.0)).astype(np.uint32)
            value = code[..., 0] | (code[..., 1] << np.uint32(16))
        else:
            tile, part = divmod(number, 4)
            kind = np.float32 if d_type == "f32" else np.int32
            start = np.where(kept, before.view(kind).astype(np.float64), 0.0)
            total = fragments[:, tile, part] + start
            value = (
                nf.canonical(total.astype(np.float32)) if d_type == "f32" else total.astype(np.int64).astype(np.int32)
            ).view(np.uint32)
        merged = wide.copy()
        merged[warps] = value
        mask = active.mask if flying is None else flying.mask | active.mask
        wave.registers[slot] = InFlight(merged.reshape(-1), mask, "wgmma")
