"""ld, st and prefetches, for every state space and for generic addresses; cp.reduce and friends are elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..faults import LaneFault
from ..global_order import Observer, global_lanes, synchronise
from ..ptx_module import Address, Instruction, Operand, Register, Symbol, Vector
from ..registry import Plain, plain
from ..spaces import LOCAL_WINDOW, RANK_SHIFT, SHARED_WINDOW, SPACE_SHIFT
from ..values import DTYPES
from .elementwise import allow

if TYPE_CHECKING:
    from ..program import Scope
    from ..wave import Active

Array = np.ndarray[Any, np.dtype[Any]]

# Caching, scope and ordering qualifiers do not change what the emulator does: stores are visible at once.
_HINTS = (
    "weak",
    "volatile",
    "relaxed",
    "acquire",
    "release",
    "mmio",
    "cta",
    "cluster",
    "gpu",
    "sys",
    "ca",
    "cg",
    "cs",
    "lu",
    "cv",
    "wb",
    "wt",
    "nc",
    "L1::evict_normal",
    "L1::evict_unchanged",
    "L1::evict_first",
    "L1::evict_last",
    "L1::no_allocate",
    "L2::evict_last",
    "L2::evict_normal",
    "L2::evict_first",
    "L2::cache_hint",
    "L2::64B",
    "L2::128B",
    "L2::256B",
    "unified",
    "level::eviction_priority",
)
_POLLS = ("volatile", "acquire", "relaxed")
SPACES = (
    "global",
    "shared",
    "shared::cta",
    "shared::cluster",
    "local",
    "const",
    "param",
    "param::entry",
    "param::func",
)


def shared_place(active: Active, addresses: Array, deferred: bool = False) -> tuple[Array, Array]:
    """Block of the wave and offset for shared addresses, which may name another block of the cluster.

    deferred: the access happens later than the instruction, and an mbarrier tells when it is over.
    """
    ranks = (addresses >> np.uint64(RANK_SHIFT)).astype(np.int64)
    offsets = (addresses & np.uint64((1 << RANK_SHIFT) - 1)).astype(np.int64)
    size = active.wave.cluster_size
    wrong = np.flatnonzero(ranks >= size)
    if len(wrong):
        one = int(wrong[0])
        raise LaneFault(
            "out of bounds",
            f"shared address outside the cluster of {size} blocks",
            int(active.index[one]),
            int(addresses[one]),
        )
    if size == 1:
        return active.blocks, offsets
    blocks = active.blocks // size * size + ranks
    active.wave.remote.check(active.wave, blocks, active.index, addresses, deferred)
    return blocks, offsets


def load_rows(
    active: Active, space: str, addresses: Array, dtype: np.dtype[Any], count: int, exempt: bool = False
) -> Array:
    """Rows of elements from a state space, one row for each active lane. exempt: not checked for races."""
    if space == "generic":
        return _by_window(active, addresses, dtype, count, None, exempt)
    wave = active.wave
    if space == "shared":
        blocks, offsets = shared_place(active, addresses)
        return wave.shared.load(blocks, offsets, dtype, count, active.index, active.threads)
    if space == "local":
        return _local(active, addresses, dtype, count)[0]
    return wave.launch.memory.load(addresses, dtype, count, active.index, Observer(active, exempt))


def store_rows(active: Active, space: str, addresses: Array, values: Array, exempt: bool = False) -> None:
    """Store rows of elements."""
    if space == "generic":
        _by_window(active, addresses, values.dtype, values.shape[1], values, exempt)
        return
    wave = active.wave
    if space == "shared":
        blocks, offsets = shared_place(active, addresses)
        wave.shared.store(blocks, offsets, values, active.index, active.threads)
    elif space == "local":
        _, view, places = _local(active, addresses, values.dtype, values.shape[1])
        view[places] = values
    else:
        wave.launch.memory.store(addresses, values, active.index, Observer(active, exempt))


def _local(active: Active, addresses: Array, dtype: np.dtype[Any], count: int) -> tuple[Array, Array, Array]:
    local = active.wave.local
    width = dtype.itemsize * count
    size = 0 if local is None else local.shape[1]
    wrong = np.flatnonzero((addresses + np.uint64(width) > np.uint64(size)) | (addresses % np.uint64(width) != 0))
    if local is None or len(wrong):
        one = int(wrong[0]) if len(wrong) else 0
        kind = "misaligned" if int(addresses[one]) + width <= size else "out of bounds"
        raise LaneFault(
            kind,
            f"access of {width} bytes, the thread has {size} bytes of local memory",
            int(active.index[one]),
            int(addresses[one]),
        )
    padded = -(-size // 16) * 16
    if padded != size:
        active.wave.local = local = np.pad(local, ((0, 0), (0, padded - size)))
    view = local.reshape(-1).view(dtype).reshape(-1, count)
    places = active.index * (padded // width) + (addresses // np.uint64(width)).astype(np.int64)
    return view[places], view, places


def _by_window(
    active: Active, addresses: Array, dtype: np.dtype[Any], count: int, values: Array | None, exempt: bool
) -> Array:
    """Generic addresses: split the lanes by state space."""
    windows = (addresses >> np.uint64(SPACE_SHIFT)).astype(np.int64)
    inside = addresses & np.uint64((1 << SPACE_SHIFT) - 1)
    kinds = np.unique(windows)
    result = np.empty((len(addresses), count), dtype) if values is None else values
    for kind in kinds:
        space = {SHARED_WINDOW: "shared", LOCAL_WINDOW: "local"}.get(int(kind), "global")
        place = addresses if space == "global" else inside
        if len(kinds) == 1:
            part, rows = active, slice(None)
        else:
            rows = np.flatnonzero(windows == kind)  # type: ignore[assignment]
            part = subset(active, active.index[rows])
        if values is None:
            result[rows] = load_rows(part, space, place[rows], dtype, count, exempt)
        else:
            store_rows(part, space, place[rows], values[rows], exempt)
    return result


def subset(active: Active, lanes: Array) -> Active:
    """The active set of some of the lanes."""
    from ..wave import Active as Set

    mask = np.zeros(active.wave.lanes, np.bool_)
    mask[lanes] = True
    return Set(active.wave, mask)


def space_of(instruction: Instruction) -> str:
    """The state space in the qualifiers, 'generic' without one."""
    found = next((q for q in instruction.qualifiers if q in SPACES), "generic")
    return found.split("::")[0]


def vector_length(instruction: Instruction) -> int:
    """1, 2, 4 or 8 from .v2, .v4, .v8."""
    return next((int(q[1:]) for q in instruction.qualifiers if q in ("v2", "v4", "v8")), 1)


@plain("ld", "ldu")
def ld(instruction: Instruction, scope: Scope) -> Plain:
    """ld{.space}{.vec}.type d, [a]"""
    type_name = instruction.qualifiers[-1]
    count = vector_length(instruction)
    allow(instruction, *_HINTS, *SPACES, "v2", "v4", "v8", type_name)
    space = space_of(instruction)
    d, a = instruction.operands[:2]
    targets = d.items if isinstance(d, Vector) else (d,)
    if len(targets) != count:
        raise instruction.unknown("vector length")
    if type_name == "b128":
        type_name, count = "b64", 2 * count
        raise instruction.unknown("b128")
    puts = [scope.destination(t, type_name) for t in targets]
    dtype = DTYPES[type_name]
    assert isinstance(a, Address)
    if space == "param" and isinstance(a.base, Symbol):
        return _ld_parameter(scope, a, puts, dtype)
    address = scope.address(a)
    polls = any(q in _POLLS for q in instruction.qualifiers)
    wide = not instruction.has("cta")
    place = "global" if space in ("const", "param") else space
    parameter = space == "param"

    def run(active: Active) -> None:
        addresses = address(active)
        if parameter:
            addresses = addresses + np.uint64(active.wave.launch.parameter_address)
        if place == "global" and addresses.shape[0] == 1 and active.count > 1:
            observer = Observer(active, polls)
            values = active.wave.launch.memory.load(addresses, dtype, count, active.index[:1], observer)
        else:
            values = active.layout(load_rows(active, place, active.rows(addresses), dtype, count, polls))
        for column, put in enumerate(puts):
            put(active, values[:, column])
        if polls:
            active.wave.poll()
            if wide:
                rows = active.rows(addresses)
                synchronise(active, global_lanes(rows, place), rows, True, "")

    return run


def _ld_parameter(scope: Scope, a: Address, puts: list[Any], dtype: np.dtype[Any]) -> Plain:
    assert isinstance(a.base, Symbol)
    name, offset = a.base.name, a.base.offset + a.offset
    width = dtype.itemsize
    kernel = scope.program.parameter_offsets if scope.function.is_kernel else {}
    variable = scope.variable(name)
    if variable is None:
        raise KeyError(name)
    if offset < 0 or offset + width * len(puts) > variable.size:
        raise KeyError(f"offset {offset} of parameter {name}, which has {variable.size} bytes")
    if name in kernel:
        inside = kernel[name] + offset

        def run(active: Active) -> None:
            data = active.wave.launch.parameter_block
            for number, put in enumerate(puts):
                put(active, np.frombuffer(data, dtype, 1, inside + number * width))

        return run
    key = (scope.function.name, name)

    def run_call(active: Active) -> None:
        stored = active.wave.parameters[key]
        for number, put in enumerate(puts):
            at = offset + number * width
            part = np.ascontiguousarray(stored[:, at : at + width]).view(dtype).reshape(-1)
            put(active, part[active.index] if active.compact and len(part) > 1 else part)

    return run_call


@plain("st")
def st(instruction: Instruction, scope: Scope) -> Plain:
    """st{.space}{.vec}.type [a], b; st.async is in async_store"""
    if instruction.has("async"):
        from .async_store import async_store

        return async_store(instruction, scope)
    type_name = instruction.qualifiers[-1]
    count = vector_length(instruction)
    allow(instruction, *_HINTS, *SPACES, "v2", "v4", "v8", type_name)
    space = space_of(instruction)
    a, b = instruction.operands[:2]
    items: tuple[Operand, ...] = b.items if isinstance(b, Vector) else (b,)
    if len(items) != count:
        raise instruction.unknown("vector length")
    bits = f"b{8 * DTYPES[type_name].itemsize}"
    kind = type_name if not isinstance(items[0], Register) else bits
    sources = [scope.source(i, kind if not isinstance(i, Register) else bits) for i in items]
    dtype = DTYPES[bits]
    assert isinstance(a, Address)
    if space == "param" and isinstance(a.base, Symbol):
        return _st_parameter(scope, a, sources, dtype)
    if space in ("const", "param"):
        raise instruction.unknown("store to this space")
    address = scope.address(a)
    exempt = any(q in ("volatile", "relaxed", "release") for q in instruction.qualifiers)
    publishes = "" if not exempt or instruction.has("cta") else "release" if instruction.has("release") else "relaxed"

    def run(active: Active) -> None:
        values = np.empty((active.count, count), dtype)
        for column, source in enumerate(sources):
            values[:, column] = active.rows(source(active)).view(dtype)
        places = active.rows(address(active))
        store_rows(active, space, places, values, exempt)
        if publishes:
            synchronise(active, global_lanes(places, space), places, False, publishes)
        active.wave.launch.progress += 1

    return run


def _st_parameter(scope: Scope, a: Address, sources: list[Any], dtype: np.dtype[Any]) -> Plain:
    assert isinstance(a.base, Symbol)
    key = (scope.function.name, a.base.name)
    variable = scope.variable(a.base.name)
    assert variable is not None
    offset, size, width = a.base.offset + a.offset, variable.size, dtype.itemsize

    def run(active: Active) -> None:
        wave = active.wave
        stored = wave.parameters.get(key)
        stored = np.zeros((wave.lanes, size), np.uint8) if stored is None else stored
        for number, source in enumerate(sources):
            rows = np.ascontiguousarray(active.rows(source(active))).view(np.uint8).reshape(-1, width)
            at = offset + number * width
            stored[active.index, at : at + width] = rows
        wave.parameters[key] = stored

    return run


@plain("prefetch", "prefetchu", "applypriority", "discard", "createpolicy")
def prefetch(instruction: Instruction, scope: Scope) -> Plain:
    """Cache hints do nothing; createpolicy gives an arbitrary policy word."""
    if instruction.opcode == "discard":
        raise instruction.unknown()
    if instruction.opcode == "createpolicy":
        put = scope.destination(instruction.operands[0], "b64")
        return lambda active: put(active, np.zeros(1, np.uint64))
    return lambda active: None
