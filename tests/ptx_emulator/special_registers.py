"""Values of special registers: %tid, %ctaid, %laneid and so on."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .faults import UnknownInstruction

if TYPE_CHECKING:
    from .wave import Active, Wave

Array = np.ndarray[Any, np.dtype[Any]]


def special_register(name: str, dtype: np.dtype[Any]) -> Callable[[Active], Array]:
    """A function that reads a special register as the type, in the layout of the active lanes."""
    key = name.lstrip("%")
    if key in ("clock", "clock64", "clock_hi", "globaltimer", "globaltimer_lo", "globaltimer_hi"):
        return lambda active: np.array([active.wave.executed], np.uint64).astype(dtype)
    if _evaluator(key) is None:
        raise UnknownInstruction(f"special register {name}")

    def read(active: Active) -> Array:
        cache = active.wave.coordinates
        value = cache.get(key)
        if value is None:
            evaluate = _evaluator(key)
            assert evaluate is not None
            value = cache[key] = evaluate(active.wave).astype(np.uint32)
        if active.compact and value.shape[0] != 1:
            value = value[active.index]
        if dtype.itemsize == 4:
            return value.view(dtype)
        return value.astype(f"u{dtype.itemsize}").view(dtype)

    return read


def _axis(values: Any, axis: str) -> Array:
    return np.array([values["xyz".index(axis)] if axis != "w" else 0])


def _split(number: Array, extent: tuple[int, int, int], axis: str) -> Array:
    x, y, _ = extent
    if axis == "x":
        return number % x
    if axis == "y":
        return number // x % y
    return number // (x * y) if axis == "z" else number * 0


def _evaluator(key: str) -> Callable[[Wave], Array] | None:
    match = re.match(r"(\w+)\.([xyzw])$", key)
    if match:
        return _vector(match.group(1), match.group(2))
    scalars: dict[str, Callable[[Wave], Array]] = {
        "laneid": lambda w: w.thread_of_lane % 32,
        "warpid": lambda w: w.thread_of_lane // 32,
        "nwarpid": lambda w: np.array([w.threads // 32]),
        "smid": lambda w: w.block_numbers[w.block_of_lane] % 132,
        "nsmid": lambda w: np.array([132]),
        "gridid": lambda w: np.array([1]),
        "lanemask_eq": lambda w: np.uint32(1) << (w.thread_of_lane % 32).astype(np.uint32),
        "lanemask_lt": lambda w: (np.uint32(1) << (w.thread_of_lane % 32).astype(np.uint32)) - np.uint32(1),
        "lanemask_le": lambda w: (np.uint64(2) << (w.thread_of_lane % 32).astype(np.uint64)) - np.uint64(1),
        "lanemask_gt": lambda w: ~((np.uint64(2) << (w.thread_of_lane % 32).astype(np.uint64)) - np.uint64(1)),
        "lanemask_ge": lambda w: ~((np.uint32(1) << (w.thread_of_lane % 32).astype(np.uint32)) - np.uint32(1)),
        "dynamic_smem_size": lambda w: np.array([w.launch.dynamic_shared]),
        "total_smem_size": lambda w: np.array([w.launch.shared_size]),
        "is_explicit_cluster": lambda w: np.array([w.cluster_size > 1]),
        "cluster_ctarank": lambda w: w.block_of_lane % w.cluster_size,
        "cluster_nctarank": lambda w: np.array([w.cluster_size]),
    }
    return scalars.get(key)


def _vector(name: str, axis: str) -> Callable[[Wave], Array] | None:
    def clusters(w: Wave) -> tuple[int, int, int]:
        gx, gy, gz = w.launch.grid
        cx, cy, cz = w.launch.cluster
        return gx // cx, gy // cy, gz // cz

    vectors: dict[str, Callable[[Wave], Array]] = {
        "tid": lambda w: _split(w.thread_of_lane, w.launch.block, axis),
        "ntid": lambda w: _axis(w.launch.block, axis),
        "ctaid": lambda w: _split(w.block_numbers[w.block_of_lane], w.launch.grid, axis),
        "nctaid": lambda w: _axis(w.launch.grid, axis),
        "clusterid": lambda w: (
            _split(w.block_numbers[w.block_of_lane], w.launch.grid, axis) // _axis(w.launch.cluster, axis)
            if axis != "w"
            else np.array([0])
        ),
        "nclusterid": lambda w: _axis(clusters(w), axis),
        "cluster_ctaid": lambda w: _split(w.block_of_lane % w.cluster_size, w.launch.cluster, axis),
        "cluster_nctaid": lambda w: _axis(w.launch.cluster, axis),
    }
    return vectors.get(name)
