"""atom and red: read, modify, write. Lanes that meet at one address take turns in a seeded order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable

import numpy as np

from .. import number_formats as nf
from ..faults import LaneFault
from ..ptx_parser import Instruction, Register, Sink, Vector
from ..registry import Plain, plain
from ..shared_memory import ATOMIC
from ..spaces import SHARED_WINDOW, SPACE_SHIFT
from ..values import DTYPES
from .elementwise import allow
from .load_store import shared_place, space_of, vector_length

if TYPE_CHECKING:
    from ..program import Scope
    from ..wave import Active

Array = np.ndarray[Any, np.dtype[Any]]
Operation = Callable[[Array, Array, Array], Array]  # (old, operand, second operand) -> new

_SCOPES = ("relaxed", "acquire", "release", "acq_rel", "cta", "cluster", "gpu", "sys", "global", "shared", "shared::cta",
           "shared::cluster", "noftz", "L2::cache_hint", "L1::no_allocate")  # fmt: skip


def _half_add(is_bf16: bool) -> Operation:
    def run(old: Array, operand: Array, _: Array) -> Array:
        a, b = (np.ascontiguousarray(v).view(np.uint16) for v in (old, operand))
        if is_bf16:
            result = nf.f64_to_bf16(nf.odd_sum(nf.bf16_to_f32(a).astype(np.float64), nf.bf16_to_f32(b).astype(np.float64)))
        else:
            result = nf.f16_code(nf.odd_sum(a.view(np.float16).astype(np.float64), b.view(np.float16).astype(np.float64)))
        return result.view(old.dtype)

    return run


def operation(name: str, type_name: str) -> Operation:
    """What an atomic does to the stored value. f32 add flushes nothing in global memory (.ftz does not apply there)."""
    if type_name in ("f16", "bf16", "f16x2", "bf16x2"):
        if name != "add":
            raise KeyError(f"{name}.{type_name}")
        return _half_add(type_name.startswith("bf"))
    table: dict[str, Operation] = {
        "add": lambda o, a, b: nf.canonical(o + a) if o.dtype == np.float32 else o + a,
        "min": lambda o, a, b: np.minimum(o, a), "max": lambda o, a, b: np.maximum(o, a),
        "and": lambda o, a, b: o & a, "or": lambda o, a, b: o | a, "xor": lambda o, a, b: o ^ a,
        "exch": lambda o, a, b: a, "cas": lambda o, a, b: np.where(o == a, b, o),
        "inc": lambda o, a, b: np.where(o >= a, o.dtype.type(0), o + o.dtype.type(1)),
        "dec": lambda o, a, b: np.where((o == 0) | (o > a), a, o - o.dtype.type(1)),
    }  # fmt: skip
    if DTYPES[type_name].kind == "f" and name in ("min", "max"):
        raise KeyError(f"{name}.{type_name}")
    return table[name]


def apply(active: Active, rows: Array, addresses: Array, space: str, function: Operation, operands: list[Array]) -> Array:
    """Perform an atomic for the active lanes; returns the old values. `rows` gives element type and count by shape."""
    wave = active.wave
    count, dtype = rows.shape[1], rows.dtype
    if space == "generic":
        windows = np.unique(addresses >> np.uint64(SPACE_SHIFT))
        if len(windows) > 1:
            raise LaneFault("invalid operand", "one atomic on addresses of several state spaces")
        space = "shared" if int(windows[0]) == SHARED_WINDOW else "global"
        addresses = addresses & np.uint64((1 << SPACE_SHIFT) - 1)
    order = wave.launch.random.permutation(active.count)
    old = np.empty((active.count, count), dtype)
    # Lanes with distinct addresses go together: first every address's first lane, then its second, and so on.
    _, group = np.unique(addresses[order], return_inverse=True)
    turn = _occurrence(group)
    lanes, threads = active.index, active.threads
    for step in range(int(turn.max()) + 1):
        now = order[turn == step]
        if space == "shared":
            blocks, offsets = shared_place(active, addresses)
            shared = wave.shared
            width = dtype.itemsize * count
            flat = shared.check_range(blocks[now], offsets[now], width, width, lanes[now], "atomic")
            place = flat // width
            view = shared.data.view(dtype).reshape(-1, count)
            if (shared.writer[flat // shared.granule] == -1).any():
                raise LaneFault("uninitialised", "atomic on shared memory that was never written", int(lanes[now][0]),
                                int(offsets[now][0]))
            before = view[place]
            after = function(before, operands[0][now], operands[1][now])
            nothing = np.zeros(len(now), np.bool_)
            shared.note_write(flat, width, blocks[now], lanes[now], threads[now], ATOMIC, nothing)
            view[place] = after
        else:
            before = wave.launch.memory.load(addresses[now], dtype, count, lanes[now])
            after = function(before, operands[0][now], operands[1][now])
            wave.launch.memory.store(addresses[now], after.astype(dtype, copy=False), lanes[now])
        old[now] = before
        if not np.array_equal(before, after):
            wave.launch.progress += 1
    return old


def _occurrence(group: Array) -> Array:
    """For each element how often its value occurred before."""
    order = np.argsort(group, kind="stable")
    sorted_group = group[order]
    start = np.flatnonzero(np.r_[True, sorted_group[1:] != sorted_group[:-1]])
    counts = np.diff(np.r_[start, len(group)])
    result = np.empty(len(group), np.int64)
    result[order] = np.arange(len(group)) - np.repeat(start, counts)
    return result


@plain("atom", "red")
def atom(instruction: Instruction, scope: Scope) -> Plain:
    """atom{.sem}{.scope}{.space}.op{.vec}.type d, [a], b{, c}; red without d"""
    type_name = instruction.qualifiers[-1]
    names = ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")
    name = next(q for q in instruction.qualifiers if q in names)
    allow(instruction, *_SCOPES, *names, "v2", "v4", "v8", type_name)
    space = space_of(instruction)
    operands = list(instruction.operands)
    target = operands.pop(0) if instruction.opcode == "atom" else Sink()
    address = scope.address(operands.pop(0))
    if instruction.has("L2::cache_hint"):
        operands.pop()
    if type_name == "b128":
        raise instruction.unknown("b128")
    count = vector_length(instruction)
    kind = {"f16": "b16", "bf16": "b16", "f16x2": "b32", "bf16x2": "b32"}.get(type_name, type_name)
    function = operation(name, type_name)
    items = [o.items if isinstance(o, Vector) else (o,) for o in operands]
    sources = [[scope.source(i, kind) for i in row] for row in items]
    targets = target.items if isinstance(target, Vector) else (target,)
    puts = [scope.destination(t, kind) if isinstance(t, Register) else None for t in targets]
    dtype = DTYPES[kind]

    def run(active: Active) -> None:
        values = []
        for row in sources:
            block = np.empty((active.count, count), dtype)
            for column, source in enumerate(row):
                block[:, column] = active.rows(source(active))
            values.append(block)
        values = (values + values)[:2] if len(values) == 1 else values
        old = apply(active, values[0], active.rows(address(active)), space, function, values)
        wide = active.layout(old)
        for column, put in enumerate(puts):
            if put is not None:
                put(active, wide[:, column].copy())
        active.wave.poll()

    return run
