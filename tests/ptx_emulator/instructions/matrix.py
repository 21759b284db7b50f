"""ldmatrix, stmatrix, movmatrix and mma.sync.

Products are summed in float64 and rounded once to float32; the hardware sums in an order and with intermediate
roundings that are not documented, so results agree within float32 summation error, not bit for bit.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import number_formats as nf
from ..ptx_module import Instruction, Vector
from ..registry import Collective, collective
from .load_store import shared_place, subset
from .warp import spread, warps_of

if TYPE_CHECKING:
    from ..program import Scope
    from ..wave import Active

Array = np.ndarray[Any, np.dtype[Any]]

_LANE = np.arange(32)
_GROUP, _QUAD = _LANE >> 2, _LANE & 3


def _items(operand: Any) -> tuple[Any, ...]:
    return operand.items if isinstance(operand, Vector) else (operand,)


# ------------------------------------------------------------------------------------------------ matrix fragments


def _matrix_count(instruction: Instruction) -> int:
    return next(int(q[1:]) for q in instruction.qualifiers if q in ("x1", "x2", "x4"))


def _check_shape(instruction: Instruction) -> None:
    known = ("sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared", "shared::cta", "b16")
    for qualifier in instruction.qualifiers:
        if qualifier not in known:
            raise instruction.unknown(f"qualifier .{qualifier}")


def _rows_of(active: Active, addresses: Array, count: int) -> tuple[Array, Array, Array, Array]:
    """The lanes that give a row address, with block, offset and thread of each."""
    lanes = active.index[active.index % 32 < 8 * count]
    part = subset(active, lanes)
    blocks, offsets = shared_place(part, addresses[lanes])
    return lanes, blocks, offsets, part.threads


@collective("ldmatrix")
def ldmatrix(instruction: Instruction, scope: Scope) -> Collective:
    """ldmatrix.m8n8: lane i gives the address of row i; a lane receives two neighbours of a row (or of a column)"""
    _check_shape(instruction)
    count = _matrix_count(instruction)
    puts = [scope.destination(item, "b32") for item in _items(instruction.operands[0])]
    address = _wide_address(scope, instruction.operands[1])
    transposed = instruction.has("trans")

    def run(active: Active) -> None:
        warps = warps_of(active)
        lanes, blocks, offsets, threads = _rows_of(active, address(active), count)
        rows = active.wave.shared.load(blocks, offsets, np.dtype("u2"), 8, lanes, threads)
        matrices = rows.reshape(len(warps), count, 8, 8)
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        for number, put in enumerate(puts):
            low = matrices[:, number, _GROUP, 2 * _QUAD].astype(np.uint32)
            high = matrices[:, number, _GROUP, 2 * _QUAD + 1].astype(np.uint32)
            put(active, spread(active, warps, low | (high << np.uint32(16))))

    return run, None


@collective("stmatrix")
def stmatrix(instruction: Instruction, scope: Scope) -> Collective:
    """stmatrix.m8n8: the inverse of ldmatrix"""
    _check_shape(instruction)
    count = _matrix_count(instruction)
    address = _wide_address(scope, instruction.operands[0])
    sources = [scope.wide(item, "b32") for item in _items(instruction.operands[1])]
    transposed = instruction.has("trans")

    def run(active: Active) -> None:
        warps = warps_of(active)
        lanes, blocks, offsets, threads = _rows_of(active, address(active), count)
        matrices = np.empty((len(warps), count, 8, 8), np.uint16)
        for number, source in enumerate(sources):
            value = source(active).reshape(-1, 32)[warps]
            matrices[:, number, _GROUP, 2 * _QUAD] = value & np.uint32(0xFFFF)
            matrices[:, number, _GROUP, 2 * _QUAD + 1] = value >> np.uint32(16)
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        rows = np.ascontiguousarray(matrices).reshape(-1, 8)
        active.wave.shared.store(blocks, offsets, rows, lanes, threads)
        active.wave.launch.progress += 1

    return run, None


@collective("movmatrix")
def movmatrix(instruction: Instruction, scope: Scope) -> Collective:
    """movmatrix.m8n8.trans: transpose a fragment"""
    d, a = instruction.operands
    put, source = scope.destination(d, "b32"), scope.wide(a, "b32")

    def run(active: Active) -> None:
        warps = warps_of(active)
        value = source(active).reshape(-1, 32)[warps]
        matrix = np.empty((len(warps), 8, 8), np.uint32)
        matrix[:, _GROUP, 2 * _QUAD] = value & np.uint32(0xFFFF)
        matrix[:, _GROUP, 2 * _QUAD + 1] = value >> np.uint32(16)
        matrix = matrix.swapaxes(1, 2)
        put(
            active,
            spread(active, warps, matrix[:, _GROUP, 2 * _QUAD] | (matrix[:, _GROUP, 2 * _QUAD + 1] << np.uint32(16))),
        )

    return run, None


def _wide_address(scope: Scope, operand: Any) -> Callable[[Active], Array]:
    """Addresses with a row for every lane of the wave."""
    address = scope.address(operand)

    def read(active: Active) -> Array:
        from ..wave import Active as Set

        whole = active if not active.compact else Set(active.wave, active.mask, compact=False)
        value = address(whole)
        return np.broadcast_to(value, (active.wave.lanes,))

    return read


# ------------------------------------------------------------------------------------------------------------- mma


def decoder(type_name: str) -> tuple[int, Callable[[Array], Array]]:
    """Bits of an element, and the function from codes to float64 (or int64)."""
    if type_name == "bf16":
        return 16, lambda c: nf.bf16_to_f32(c.astype(np.uint16)).astype(np.float64)
    if type_name == "f16":
        return 16, lambda c: c.astype(np.uint16).view(np.float16).astype(np.float64)
    if type_name == "tf32":
        return 32, lambda c: (c.astype(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    if type_name in ("s8", "u8"):
        return 8, lambda c: c.astype(np.uint8).view(np.int8 if type_name == "s8" else np.uint8).astype(np.float64)
    if type_name in nf.DECODE:
        table = nf.DECODE[type_name]
        return 8, lambda c: table[c & (len(table) - 1)]
    raise KeyError(type_name)


def unpack_fragment(registers: Array, bits: int) -> Array:
    """(warps, registers, 32) words to (warps, registers, 32, elements) codes."""
    per = 32 // bits
    shifts = (np.arange(per) * bits).astype(np.uint32)
    mask = np.uint32((1 << bits) - 1) if bits < 32 else np.uint32(0xFFFFFFFF)
    return (registers[..., None] >> shifts) & mask


def assemble_a(registers: Array, bits: int, k: int) -> Array:
    """The 16 x k matrix of codes from the lanes' A registers."""
    codes = unpack_fragment(registers, bits)
    per = 32 // bits
    matrix = np.zeros((registers.shape[0], 16, k), codes.dtype)
    for number in range(registers.shape[1]):
        row = _GROUP + 8 * (number % 2)
        column = (_QUAD * per)[:, None] + np.arange(per) + 4 * per * (number // 2)
        matrix[:, row[:, None], column] = codes[:, number]
    return matrix


def assemble_b(registers: Array, bits: int, k: int) -> Array:
    """The k x 8 matrix of codes from the lanes' B registers."""
    codes = unpack_fragment(registers, bits)
    per = 32 // bits
    matrix = np.zeros((registers.shape[0], k, 8), codes.dtype)
    for number in range(registers.shape[1]):
        row = (_QUAD * per)[:, None] + np.arange(per) + 4 * per * number
        matrix[:, row, _GROUP[:, None]] = codes[:, number]
    return matrix


_C_ROW = np.stack([_GROUP, _GROUP, _GROUP + 8, _GROUP + 8])
_C_COLUMN = np.stack([2 * _QUAD, 2 * _QUAD + 1, 2 * _QUAD, 2 * _QUAD + 1])

_BITS_IN_REGISTER = {"mxf4": 4, "mxf4nvf4": 4}


@collective("mma")
def mma(instruction: Instruction, scope: Scope) -> Collective:
    """mma.sync.aligned.m16n8kK of f16, bf16, tf32, bytes, and formats of 8 bits and less with block scales"""
    shape = next((re.match(r"m16n8k(\d+)$", q) for q in instruction.qualifiers if q.startswith("m16n8k")), None)
    if shape is None or instruction.has("sp") or any(q.startswith("sp::") for q in instruction.qualifiers):
        raise instruction.unknown("shape")
    k = int(shape.group(1))
    types = instruction.qualifiers[instruction.qualifiers.index("col") + 1 :]
    types = tuple(t for t in types if t not in ("satfinite", "block_scale") and "::" not in t)
    d_type, a_type, b_type, c_type = types[:4]
    for qualifier in instruction.qualifiers:
        if qualifier not in (
            "sync",
            "aligned",
            "row",
            "col",
            "satfinite",
            "block_scale",
            shape.group(0),
            *types,
        ) and not (qualifier.startswith(("kind::", "scale_vec::"))):
            raise instruction.unknown(f"qualifier .{qualifier}")
    kind = next((q[6:] for q in instruction.qualifiers if q.startswith("kind::")), "")
    bits_a, decode_a = decoder(a_type)
    bits_b, decode_b = decoder(b_type)
    if kind in _BITS_IN_REGISTER:
        bits_a = bits_b = _BITS_IN_REGISTER[kind]
    elif kind in ("f8f6f4", "mxf8f6f4"):  # formats of 6 and 4 bits sit in bytes, 4 bits shifted up by two
        decode_a, decode_b = _in_byte(a_type, decode_a), _in_byte(b_type, decode_b)
    if d_type != c_type or d_type not in ("f32", "f16", "s32"):
        raise instruction.unknown("accumulator")
    d, a, b, c, *scale_operands = instruction.operands
    sources = [[scope.wide(i, "b32") for i in _items(o)] for o in (a, b, c)]
    puts = [scope.destination(i, "b32") for i in _items(d)]
    if len(sources[0]) * 32 * 32 // bits_a != 16 * k or len(sources[1]) * 32 * 32 // bits_b != 8 * k:
        raise instruction.unknown("number of registers")
    scales = None
    if instruction.has("block_scale"):
        from .block_scales import mma_scales

        scales = mma_scales(instruction, scope, scale_operands, types[-1], k)
    saturates = instruction.has("satfinite")

    def run(active: Active) -> None:
        warps = warps_of(active)
        fragments = [np.stack([s(active).reshape(-1, 32)[warps] for s in registers], axis=1) for registers in sources]
        left = decode_a(assemble_a(fragments[0], bits_a, k))
        right = decode_b(assemble_b(fragments[1], bits_b, k))
        if scales is not None:
            scale_a, scale_b = scales(active, warps)
            left = left * np.repeat(scale_a, k // scale_a.shape[2], axis=2)
            right = right * np.repeat(scale_b, k // scale_b.shape[1], axis=1)
        product = np.matmul(left, right)
        if d_type == "f16":
            halves = unpack_fragment(fragments[2], 16).swapaxes(2, 3)  # (warps, 2, 2, 32)
            start = halves.reshape(len(warps), 4, 32).astype(np.uint16).view(np.float16).astype(np.float64)
        elif d_type == "f32":
            start = fragments[2].view(np.float32).astype(np.float64)
        else:
            start = fragments[2].view(np.int32).astype(np.float64)
        total = product[:, _C_ROW, _C_COLUMN] + start
        if d_type == "f16":
            code = nf.f16_code(total).astype(np.uint32).reshape(len(warps), 2, 2, 32)
            words = code[:, :, 0] | (code[:, :, 1] << np.uint32(16))
        elif d_type == "f32":
            words = nf.canonical(total.astype(np.float32)).view(np.uint32)
        else:
            if saturates:
                total = np.clip(total, -(2.0**31), 2.0**31 - 1)
            words = (total.astype(np.int64) & 0xFFFFFFFF).astype(np.uint32)
        for number, put in enumerate(puts):
            put(active, spread(active, warps, np.ascontiguousarray(words[:, number])))

    return run, None


def _in_byte(type_name: str, decode: Callable[[Array], Array]) -> Callable[[Array], Array]:
    if type_name == "e2m1":
        return lambda c: decode(c >> np.uint32(2))
    return decode
