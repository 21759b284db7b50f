"""Launch a kernel of a parsed module on the CPU: cut the grid into waves, run them, report faults."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .faults import EmulatorFault, LaneFault
from .global_order import GlobalOrder
from .memory import Memory
from .program import Program, compile_program
from .ptx_module import Module
from .registry import FINAL_CHECKS
from .wave import Wave

TENSOR_MEMORY_BYTES = 1 << 20  # of a block, with its records

Triple = tuple[int, int, int]


@dataclass(frozen=True)
class Limits:
    """How much runs at once. Smaller ones let a small launch do what a large one does on a small device."""

    wave_lanes: int = 1 << 15  # threads executed together: enough to hide Python, few enough for the cache
    wave_bytes: int = 1 << 28  # shared and tensor memory of those, with the records of who touched it
    waves: int = 1 << 30  # in progress at once; the other blocks start when one of them has ended


class Launch:
    """One launch: geometry, parameters, memory, and the waves in progress."""

    def __init__(
        self,
        program: Program,
        module: Module,
        grid: Triple,
        block: Triple,
        cluster: Triple,
        dynamic_shared: int,
        parameters: Sequence[bytes],
        memory: Memory,
        seed: int,
        arch: str,
        strict: Collection[str],
        limits: Limits,
    ) -> None:
        self.program = program
        self.module = module
        self.grid, self.block, self.cluster = grid, block, cluster
        self.memory = memory
        self.arch = arch
        self.strict = frozenset(strict)
        self.limits = limits
        self.random = np.random.default_rng(seed)
        self.block_size = block[0] * block[1] * block[2]
        self.cluster_size = cluster[0] * cluster[1] * cluster[2]
        self.dynamic_shared = dynamic_shared
        self.shared_size = program.dynamic_shared_offset + dynamic_shared
        self.progress = 0
        self.next_cluster = 1
        self.order = GlobalOrder(program.global_granule)
        self.symbols = program.place_variables(module, memory)
        self.parameter_block = self._pack(parameters)
        self._parameter_address: int | None = None
        self.waves: list[Wave] = []
        self.pending: list[np.ndarray[Any, np.dtype[Any]]] = []
        self.executed = 0
        self._check()

    def _pack(self, parameters: Sequence[bytes]) -> bytes:
        declared = self.program.parameters
        if len(parameters) != len(declared):
            raise self._invalid(f"{len(declared)} parameters are declared, {len(parameters)} were given")
        packed = bytearray(self.program.parameter_size)
        for number, (value, variable) in enumerate(zip(parameters, declared, strict=False)):
            if len(value) != variable.size:
                raise self._invalid(f"parameter {number} has {variable.size} bytes, {len(value)} were given")
            offset = self.program.parameter_offsets[variable.name]
            packed[offset : offset + variable.size] = value
        return bytes(packed)

    @property
    def parameter_address(self) -> int:
        """Address of a copy of the parameters, for kernels that take the address of one."""
        if self._parameter_address is None:
            self._parameter_address = self.memory.allocate(
                len(self.parameter_block), "kernel parameters", self.parameter_block, read_only=True
            )
        return self._parameter_address

    def _invalid(self, text: str) -> EmulatorFault:
        return EmulatorFault("invalid launch", text, kernel=self.program.name)

    def _check(self) -> None:
        limits = (2**31 - 1, 65535, 65535)
        if any(not 1 <= g <= limit for g, limit in zip(self.grid, limits, strict=False)):
            raise self._invalid(f"grid {self.grid}")
        if not 1 <= self.block_size <= 1024 or self.block[2] > 64:
            raise self._invalid(f"block {self.block}")
        if any(g % c for g, c in zip(self.grid, self.cluster, strict=False)):
            raise self._invalid(f"grid {self.grid} is not a multiple of the cluster {self.cluster}")
        if self.cluster_size > 16:
            raise self._invalid(f"cluster {self.cluster} has more than 16 blocks")
        directives = self.program.directives
        required = directives.get("reqntid")
        if required and tuple(required) + (1,) * (3 - len(required)) != self.block:
            raise self._invalid(f"block {self.block}, the kernel requires {required}")
        largest = directives.get("maxntid")
        if largest and self.block_size > int(np.prod(largest)):
            raise self._invalid(f"block {self.block}, the kernel allows at most {largest}")
        needed = directives.get("reqnctapercluster")
        if needed and tuple(needed) + (1,) * (3 - len(needed)) != self.cluster:
            raise self._invalid(f"cluster {self.cluster}, the kernel requires {needed}")
        limit = 99 * 1024 if self.arch.startswith("sm_12") else 227 * 1024
        if self.shared_size > limit:
            raise self._invalid(f"{self.shared_size} bytes of shared memory, {self.arch} has {limit} for a block")

    def block_coordinates(self, number: int) -> Triple:
        """Coordinates of a block by its number."""
        x, y, _ = self.grid
        return number % x, number // x % y, number // (x * y)

    def thread_coordinates(self, number: int) -> Triple:
        """Coordinates of a thread by its number inside the block."""
        x, y, _ = self.block
        return number % x, number // x % y, number // (x * y)

    def _cut_into_waves(self) -> None:
        x, y, z = self.grid
        cx, cy, cz = self.cluster
        shape = (x // cx, y // cy, z // cz)
        order = self.random.permutation(shape[0] * shape[1] * shape[2])
        base_x, base_y, base_z = (
            order % shape[0] * cx,
            order // shape[0] % shape[1] * cy,
            order // (shape[0] * shape[1]) * cz,
        )
        rank = np.arange(self.cluster_size)
        bx = base_x[:, None] + rank % cx
        by = base_y[:, None] + rank // cx % cy
        bz = base_z[:, None] + rank // (cx * cy)
        blocks = (bx + x * (by + y * bz)).reshape(-1)
        padded = -(-self.block_size // 32) * 32
        warps = padded // 32 * self.cluster_size
        records = (24 + 5 * warps) // self.program.granule  # bytes that a byte of shared memory is watched with
        weight = max(self.shared_size, 1024) * (1 + records)
        weight += TENSOR_MEMORY_BYTES if self.program.uses_tensor_memory else 0
        size = max(min(self.limits.wave_lanes // padded, self.limits.wave_bytes // weight), 1)
        size = max(size // self.cluster_size, 1) * self.cluster_size
        self.pending = [blocks[i : i + size] for i in range(0, len(blocks), size)]

    def _room(self) -> bool:
        """Whether blocks are left to start, and may start now."""
        return bool(self.pending) and len(self.waves) < self.limits.waves

    def others_wait(self, wave: Wave) -> bool:
        """Whether a wave that makes no progress should let other blocks run."""
        return self._room() or any(other is not wave for other in self.waves)

    def _final_checks(self, wave: Wave) -> None:
        for check in FINAL_CHECKS:
            try:
                check(wave)
            except LaneFault as fault:
                block, thread = wave.place(fault.lane) if fault.lane is not None else (None, None)
                raise EmulatorFault(
                    fault.kind,
                    fault.detail,
                    kernel=self.program.name,
                    block=block,
                    thread=thread,
                    address=fault.address,
                ) from fault

    def close(self) -> None:
        """Give back what the launch registered."""
        if self._parameter_address is not None:
            self.memory.unregister(self._parameter_address)

    def run(self) -> None:
        """Run all blocks, in a seeded order. A wave that waits for other blocks lets the next one start."""
        self._cut_into_waves()
        turn = 0
        quiet, seen = 0, -1
        with np.errstate(all="ignore"):
            while self.pending or self.waves:
                if not self.waves or (quiet and self._room()):
                    self.waves.append(Wave(self, self.pending.pop(0)))
                    turn = len(self.waves) - 1
                wave = self.waves[turn % len(self.waves)]
                if wave.run():
                    self.waves.remove(wave)
                    self.executed += wave.executed
                    self._final_checks(wave)
                    quiet = 0
                    continue
                quiet = quiet + 1 if self.progress == seen else 1
                seen = self.progress
                turn += 1
                if quiet > 8 * len(self.waves) and not self._room():
                    wave._no_progress()


def emulate(
    module: Module,
    kernel_symbol: str,
    grid: Triple,
    block: Triple,
    cluster: Triple = (1, 1, 1),
    dynamic_shared: int = 0,
    parameters: Sequence[bytes] = (),
    memory: Memory | None = None,
    seed: int = 0,
    arch: str = "sm_90a",
    strict: Collection[str] = (),
    limits: Limits | None = None,
) -> Launch:
    """Run a kernel. Raises `EmulatorFault` for what the kernel does wrong.

    parameters: the bytes of each parameter, in the kernel's order. seed: order of blocks and of atomics that meet.
    strict: what to report beyond the default. 'tcgen05.ld': use of its registers before tcgen05.wait::ld. The PTX ISA
    requires that wait, but Triton and the CuTe DSL leave it out, as the assembler keeps such uses behind the load.
    limits: how much runs at once.
    """
    if kernel_symbol not in module.kernels:
        raise EmulatorFault("invalid launch", f"the module has {sorted(module.kernels)}", kernel=kernel_symbol)
    program = compile_program(module, kernel_symbol)
    launch = Launch(
        program,
        module,
        grid,
        block,
        cluster,
        dynamic_shared,
        parameters,
        memory or Memory(),
        seed,
        arch,
        strict,
        limits or Limits(),
    )
    try:
        launch.run()
    finally:
        launch.close()
    return launch
