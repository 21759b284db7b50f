"""The life of a block's shared memory, as other blocks of its cluster may use it: from the block's start to its end.

A block may touch another one's shared memory once it knows that the other block has started, which only a barrier of
the cluster (or what a third block passes on) tells; and the other block may end once it knows that the access is over.
Both are questions to the warps' clocks, not to the schedule that happened to run: see `shared_memory.Clocks`. The end
is looked at when all blocks have ended, as what a warp knows stays when it exits. A block lives until its last warp
exits, so it is enough that one warp of it knows.

What happens later than the instruction says (st.async, bulk copies) is over when its mbarrier has been polled: one that
is still in flight when its target has ended is a fault too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .faults import EmulatorFault, LaneFault

if TYPE_CHECKING:
    from .wave import Wave

Array = np.ndarray[Any, np.dtype[Any]]


class RemoteAccesses:
    """For each block of each cluster and each warp of the cluster: clock and place of its last access from outside."""

    def __init__(self, clusters: int, blocks: int, warps: int) -> None:
        shape = (clusters, blocks, warps) if blocks > 1 else (0, 0, 0)
        self.clock = np.zeros(shape, np.int32)
        self.pc = np.zeros(shape, np.int32)

    def check(self, wave: Wave, blocks: Array, lanes: Array, addresses: Array, deferred: bool) -> None:
        """Check and record the lanes' accesses to shared memory of `blocks`, which may be others than their own.

        deferred: the access happens later, and an mbarrier tells when it is over.
        """
        rows = np.flatnonzero(blocks != lanes // wave.threads)
        if not len(rows):
            return
        size = wave.cluster_size
        clusters, ranks = blocks[rows] // size, blocks[rows] % size
        warps = lanes[rows] % (wave.threads * size) // 32
        unknown = np.flatnonzero(~wave.clocks.started(clusters, warps, ranks))
        if len(unknown):
            one = int(rows[unknown[0]])
            raise LaneFault(
                "lifetime",
                f"access to shared memory of block {int(ranks[unknown[0]])} of the cluster, which may not have "
                "started: no barrier of the cluster has been waited for",
                int(lanes[one]),
                int(addresses[one]),
            )
        if not deferred:
            self.clock[clusters, ranks, warps] = wave.clocks.known[clusters, warps, warps]
            self.pc[clusters, ranks, warps] = wave.pc

    def check_ends(self, wave: Wave) -> None:
        """When all blocks have ended: each must have waited for all accesses from outside."""
        if not self.clock.any():
            return
        clusters, size, warps = self.clock.shape
        known = wave.clocks.known[:, :, :warps].reshape(clusters, size, warps // size, warps).max(axis=2)
        late = np.argwhere(self.clock > known)
        if not len(late):
            return
        cluster, rank, warp = (int(v) for v in late[0])
        instruction = wave.program.steps[int(self.pc[cluster, rank, warp])].instruction
        block, thread = wave.place(cluster * size * wave.threads + warp * 32)
        raise EmulatorFault(
            "lifetime",
            f"block {rank} of the cluster may end before this access to its shared memory: it has not waited for a "
            "barrier at which the accessing warp arrived afterwards",
            kernel=wave.program.name,
            line=instruction.line,
            text=instruction.text,
            block=block,
            thread=thread,
        )
