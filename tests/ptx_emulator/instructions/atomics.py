"""atom and red: read, modify, write. Lanes that meet at one address take turns in a seeded order."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import number_formats as nf
from ..faults import LaneFault
from ..global_order import Observer, synchronise
from ..ptx_module import Instruction, Register, Sink, Vector
from ..registry import Plain, plain
from ..shared_memory import ATOMIC, NEVER
from ..spaces import SHARED_WINDOW, SPACE_SHIFT
from ..values import DTYPES
from .elementwise import allow
from .load_store import shared_place, space_of, vector_length

if TYPE_CHECKING:
    from ..program import Scope
    from ..wave import Active

Array = np.ndarray[Any, np.dtype[Any]]
Operation = Callable[[Array, Array, Array], Array]  # (old, operand, second operand) -> new

_SCOPES = (
    "relaxed",
    "acquire",
    "release",
    "acq_rel",
    "cta",
    "cluster",
    "gpu",
    "sys",
    "global",
    "shared",
    "shared::cta",
    "shared::cluster",
    "noftz",
    "L2::cache_hint",
    "L1::no_allocate",
)


def _half_add(is_bf16: bool) -> Operation:
    def run(old: Array, operand: Array, _: Array) -> Array:
        a, b = (np.ascontiguousarray(v).view(np.uint16) for v in (old, operand))
        if is_bf16:
            result = nf.f64_to_bf16(
                nf.odd_sum(nf.bf16_to_f32(a).astype(np.float64), nf.bf16_to_f32(b).astype(np.float64))
            )
        else:
            result = nf.f16_code(
                nf.odd_sum(a.view(np.float16).astype(np.float64), b.view(np.float16).astype(np.float64))
            )
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


class _Place:
    """Where an atomic works: the stored values of the active lanes, and how to write new ones."""

    def __init__(self, active: Active, space: str, addresses: Array, dtype: np.dtype[Any], count: int) -> None:
        self.active, self.dtype, self.count = active, dtype, count
        if space == "generic":
            windows = np.unique(addresses >> np.uint64(SPACE_SHIFT))
            if len(windows) > 1:
                raise LaneFault("invalid operand", "one atomic on addresses of several state spaces")
            space = "shared" if int(windows[0]) == SHARED_WINDOW else "global"
            addresses = addresses & np.uint64((1 << SPACE_SHIFT) - 1)
        self.shared = active.wave.shared if space == "shared" else None
        self.keys = addresses
        if self.shared is None:
            return
        width = dtype.itemsize * count
        self.blocks, offsets = shared_place(active, addresses)
        flat = self.shared.check_range(self.blocks, offsets, width, width, active.index, "atomic")
        fresh = np.flatnonzero(self.shared.writer[flat // self.shared.granule] == NEVER)
        if len(fresh):
            one = int(fresh[0])
            raise LaneFault(
                "uninitialised",
                "atomic on shared memory that was never written",
                int(active.index[one]),
                int(offsets[one]),
            )
        self.keys = flat

    def synchronise(self, order: Array, loads: bool, publishes: str) -> None:
        """Lanes synchronise with other blocks, in this order."""
        if self.shared is None:
            synchronise(self.active, order, self.keys, loads, publishes)

    def load(self, rows: Array) -> Array:
        """Stored values for some of the active lanes."""
        if self.shared is None:
            memory = self.active.wave.launch.memory
            return memory.load(self.keys[rows], self.dtype, self.count, self.active.index[rows])
        width = self.dtype.itemsize * self.count
        return self.shared.data.view(self.dtype).reshape(-1, self.count)[self.keys[rows] // width]

    def store(self, rows: Array, values: Array) -> None:
        """Store the final values, one row for each distinct address."""
        active = self.active
        if self.shared is None:
            observer = Observer(active, exempt=True).part(rows)
            active.wave.launch.memory.store(self.keys[rows], values, active.index[rows], observer)
            return
        width = self.dtype.itemsize * self.count
        nothing = np.zeros(active.count, np.bool_)
        self.shared.note_write(self.keys, width, self.blocks, active.index, active.threads, ATOMIC, nothing)
        self.shared.data.view(self.dtype).reshape(-1, self.count)[self.keys[rows] // width] = values


def apply(
    place: _Place, sums: bool, function: Operation, operands: list[Array], loads: bool, publishes: str | None
) -> Array:
    """Perform an atomic for the active lanes; returns the old values. Lanes of one address follow in a seeded order.

    sums: it is an addition of integers, of which all can be done at once. loads, publishes: see `synchronise`; None: it
    does not synchronise with other blocks.
    """
    launch = place.active.wave.launch
    order = launch.random.permutation(place.active.count)
    order = order[np.argsort(place.keys[order], kind="stable")]
    if publishes is not None:
        place.synchronise(order, loads, publishes)
    keys = place.keys[order]
    starts = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]])
    sizes = np.diff(np.r_[starts, len(keys)])
    initial = place.load(order[starts])
    first, second = operands[0][order], operands[1][order]
    if (sizes == 1).all():
        before, final = initial, function(initial, first, second).astype(place.dtype, copy=False)
    elif sums:
        running = np.cumsum(first, axis=0, dtype=place.dtype) - first  # wraps around as the sums themselves do
        before = running + np.repeat(initial - running[starts], sizes, axis=0)
        ends = starts + sizes - 1
        final = before[ends] + first[ends]
    else:
        before, final = _one_by_one(initial, starts, sizes, function, first, second)
    place.store(order[starts], final)
    if not np.array_equal(initial, final):
        launch.progress += 1
    old = np.empty_like(before)
    old[order] = before
    return old


def _one_by_one(
    initial: Array, starts: Array, sizes: Array, function: Operation, first: Array, second: Array
) -> tuple[Array, Array]:
    """Old values of all lanes and final values of all addresses: every address's first lane, then its second, ..."""
    current = initial.copy()
    before = np.empty_like(first)
    for turn in range(int(sizes.max())):
        here = np.flatnonzero(sizes > turn)
        rows = starts[here] + turn
        before[rows] = current[here]
        current[here] = function(current[here], first[rows], second[rows])
    return before, current


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
    sums = name == "add" and type_name[0] in "us"
    releases = instruction.has("release") or instruction.has("acq_rel")
    publishes = None if instruction.has("cta") else "release" if releases else "relaxed"
    loads = instruction.opcode == "atom"

    def run(active: Active) -> None:
        values = []
        for row in sources:
            block = np.empty((active.count, count), dtype)
            for column, source in enumerate(row):
                block[:, column] = active.rows(source(active))
            values.append(block)
        values = (values + values)[:2] if len(values) == 1 else values
        place = _Place(active, space, active.rows(address(active)), dtype, count)
        old = apply(place, sums, function, values, loads, publishes)
        wide = active.layout(old)
        for column, put in enumerate(puts):
            if put is not None:
                put(active, wide[:, column].copy())
        active.wave.poll()

    return run
