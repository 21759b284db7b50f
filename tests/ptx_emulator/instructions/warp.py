"""Warp collectives: shfl, vote, match, redux, elect, activemask, bar.warp.sync."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .. import number_formats as nf
from ..ptx_module import Instruction
from ..registry import Collective, Members, Plain, collective, plain
from ..values import DTYPES
from ..warp_waits import lane_bits
from .elementwise import allow

if TYPE_CHECKING:
    from ..program import Scope
    from ..wave import Active

Array = np.ndarray[Any, np.dtype[Any]]

_LANE = np.arange(32, dtype=np.int64)
_BIT = np.uint32(1) << _LANE.astype(np.uint32)


def members_of(scope: Scope, operand: Any) -> Members:
    """The member mask of every lane of the wave."""
    return scope.wide(operand, "b32")


def warps_of(active: Active) -> Array:
    """Numbers of the warps that have active lanes."""
    return np.flatnonzero(lane_bits(active.mask))


def cluster_and_warp(active: Active) -> tuple[Array, Array]:
    """Cluster of the wave and warp inside it, of each warp with active lanes."""
    warps = warps_of(active)
    per_cluster = active.wave.threads // 32 * active.wave.cluster_size
    return warps // per_cluster, warps % per_cluster


def spread(active: Active, warps: Array, rows: Array) -> Array:
    """(warps, 32) values of those warps in the layout of the active set."""
    wide = np.zeros((active.wave.warps, 32), rows.dtype)
    wide[warps] = rows
    return active.from_wide(wide.reshape(-1))


@collective("shfl")
def shfl(instruction: Instruction, scope: Scope) -> Collective:
    """shfl.sync{.up,.down,.bfly,.idx}.b32 d|p, a, b, c, members. Lanes that do not take part give a poison value."""
    _, mode, _ = instruction.qualifiers
    allow(instruction, "sync", "up", "down", "bfly", "idx", "b32")
    d, a, b, c, m = instruction.operands
    target, predicate = scope.pair(d)
    put, put_valid = scope.destination(target, "b32"), scope.destination(predicate, "pred")
    value, amount, clamp = scope.wide(a, "b32"), scope.wide(b, "u32"), scope.wide(c, "u32")

    def run(active: Active) -> None:
        warps = warps_of(active)
        rows = value(active).reshape(-1, 32)[warps]
        by = amount(active).reshape(-1, 32)[warps].astype(np.int64) & 31
        control = clamp(active).reshape(-1, 32)[warps].astype(np.int64)
        segment = (control >> 8) & 31
        low = _LANE & segment
        high = low | (control & 31 & ~segment)
        if mode == "up":
            source = _LANE - by
            valid = source >= high
        elif mode == "down":
            source = _LANE + by
            valid = source <= high
        elif mode == "bfly":
            source = _LANE ^ by
            valid = source <= high
        else:
            source = low | (by & ~segment)
            valid = source <= high
        source = np.where(valid, source, _LANE)
        picked = np.take_along_axis(rows, source, axis=1)
        present = np.take_along_axis(active.mask.reshape(-1, 32)[warps], source, axis=1)
        picked = np.where(present, picked, np.uint32(0xA5A5A5A5))
        put(active, spread(active, warps, picked))
        put_valid(active, spread(active, warps, valid))

    return run, members_of(scope, m)


@collective("vote")
def vote(instruction: Instruction, scope: Scope) -> Collective:
    """vote.sync{.all,.any,.uni}.pred and vote.sync.ballot.b32"""
    _, mode, type_name = instruction.qualifiers
    allow(instruction, "sync", "all", "any", "uni", "ballot", "pred", "b32")
    d, a, m = instruction.operands
    put = scope.destination(d, type_name)
    predicate, members = scope.wide(a, "pred"), members_of(scope, m)

    def run(active: Active) -> None:
        ballot = np.repeat(lane_bits(predicate(active) & active.mask), 32) & members(active)
        if mode == "ballot":
            result = ballot
        elif mode == "any":
            result = ballot != 0
        else:
            everyone = np.repeat(lane_bits(active.mask), 32) & members(active)
            result = ballot == everyone
            if mode == "uni":
                result = result | (ballot == 0)
        put(active, active.from_wide(result))

    return run, members


@collective("match")
def match(instruction: Instruction, scope: Scope) -> Collective:
    """match{.any,.all}.sync: lanes with the same value"""
    mode, _, type_name = instruction.qualifiers
    d, a, m = instruction.operands
    target, predicate = scope.pair(d)
    put, put_all = scope.destination(target, "b32"), scope.destination(predicate, "pred")
    value, members = scope.wide(a, type_name), members_of(scope, m)

    def run(active: Active) -> None:
        warps = warps_of(active)
        rows = value(active).reshape(-1, 32)[warps]
        taking_part = active.mask.reshape(-1, 32)[warps]
        allowed = (members(active).reshape(-1, 32)[warps][:, :, None] & _BIT) != 0
        same = (rows[:, :, None] == rows[:, None, :]) & taking_part[:, None, :] & allowed
        bits = (same * _BIT).sum(axis=2, dtype=np.uint32)
        if mode == "any":
            put(active, spread(active, warps, bits))
            return
        everyone = ((taking_part[:, None, :] & allowed) * _BIT).sum(axis=2, dtype=np.uint32)
        agreed = bits == everyone
        put(active, spread(active, warps, np.where(agreed, everyone, np.uint32(0))))
        put_all(active, spread(active, warps, agreed))

    return run, members


@collective("redux")
def redux(instruction: Instruction, scope: Scope) -> Collective:
    """redux.sync.op{.abs}{.NaN}.type d, a, members"""
    type_name = instruction.qualifiers[-1]
    name = instruction.qualifiers[1]
    allow(instruction, "sync", "add", "min", "max", "and", "or", "xor", "abs", "NaN", "u32", "s32", "b32", "f32")
    d, a, m = instruction.operands
    put, value, members = scope.destination(d, type_name), scope.wide(a, type_name), members_of(scope, m)
    dtype = DTYPES[type_name]
    absolute, nan = instruction.has("abs"), instruction.has("NaN")

    def run(active: Active) -> None:
        warps = warps_of(active)
        rows = value(active).reshape(-1, 32)[warps]
        if absolute:
            rows = np.abs(rows)
        taking_part = active.mask.reshape(-1, 32)[warps]
        allowed = ((members(active).reshape(-1, 32)[warps][:, :, None] & _BIT) != 0) & taking_part[:, None, :]
        cube = np.broadcast_to(rows[:, None, :], allowed.shape)
        if dtype.kind == "f":
            neutral = np.float32(np.inf if name == "min" else -np.inf)
            skip = ~allowed if nan else ~allowed | np.isnan(cube)
            filled = np.where(skip, neutral, cube)
            result = filled.min(axis=2) if name == "min" else filled.max(axis=2)
            if not nan:
                result = np.where(skip.all(axis=2), np.float32(np.nan), result)
            put(active, spread(active, warps, nf.canonical(result)))
            return
        info = np.iinfo(dtype)
        neutral = {"add": 0, "or": 0, "xor": 0, "and": ~dtype.type(0), "min": info.max, "max": info.min}[name]
        function = {"add": np.add, "or": np.bitwise_or, "xor": np.bitwise_xor, "and": np.bitwise_and,
                    "min": np.minimum, "max": np.maximum}[name]  # fmt: skip
        filled = np.where(allowed, cube, dtype.type(neutral))
        put(active, spread(active, warps, function.reduce(filled, axis=2, dtype=dtype)))

    return run, members


@collective("elect")
def elect(instruction: Instruction, scope: Scope) -> Collective:
    """elect.sync d|p, members: the lowest member is the leader"""
    allow(instruction, "sync")
    d, m = instruction.operands
    target, predicate = scope.pair(d)
    put, put_leader = scope.destination(target, "b32"), scope.destination(predicate, "pred")
    members = members_of(scope, m)

    def run(active: Active) -> None:
        present = np.repeat(lane_bits(active.mask), 32) & members(active)
        lowest = present & (~present + np.uint32(1))
        leader = (np.frexp(lowest.astype(np.float64))[1] - 1).astype(np.uint32)
        put(active, active.from_wide(leader))
        own = np.uint32(1) << (np.arange(active.wave.lanes) % 32).astype(np.uint32)
        put_leader(active, active.from_wide(lowest == own))

    return run, members


@plain("activemask")
def activemask(instruction: Instruction, scope: Scope) -> Plain:
    """activemask: the lanes of the warp that execute this together; which those are is up to the schedule"""
    put = scope.destination(instruction.operands[0], "b32")
    return lambda active: put(active, active.from_wide(np.repeat(lane_bits(active.mask), 32)))
