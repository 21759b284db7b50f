"""Which blocks of a launch have started, so that none waits for one that might not.

So a launch ends with any number of blocks resident at once, one included, whatever else holds multiprocessors: other
streams, other processes, a limit on them. In this order:
  1. A block counts itself in `presence` when it starts, and multiplies and stores its sums without waiting for anyone.
  2. A block with tokens looks at `presence` a limited number of times. Once it has seen that all have started, it waits
     for their sums: by 1 all of them come, as a block that has started keeps its place until it ends.
  3. If it has not seen that, it says in `presence` that it gives up. This addition and the last block's counting of
     itself are in one order, so each of the two knows which came first. If the last block had started before, 2 holds
     after all. If not, the block leaves a mark and ends, and its place is free for one that has not started.
  4. The last to start learns from the same addition how many gave up before. It is in case 2 by itself, and finds their
     marks, which come without waiting for anyone; then it selects for their tokens.
The next launch in the stream takes no place from this one: its blocks start only when all of this one's have.
"""

import cutlass.cute as cute
from cutlass import Int32, Uint32

# The first word of `presence` counts blocks in three fields of 8 bits: those that have started, at most 128; those that
# left their tokens to the last to start; and those that have looked at it for the last time. All three change by
# additions to one word, so they are seen in one order without fences.
STARTED = 1
GAVE_UP = 1 << 8
LOOKED = 1 << 16
FIELD = 0xFF
# The words behind it: a mark of each block that gave up.
MARKS = 1
# Looks at `presence`, a third of a microsecond each, before a block gives up.
LOOKS = 64


@cute.jit
def load_presence(presence: cute.Pointer, word: Int32) -> Uint32:
    return cute.arch.load(presence + word, Uint32, sem="relaxed", scope="gpu")


@cute.jit
def add_presence(presence: cute.Pointer, count: Uint32) -> Uint32:
    return cute.arch.atomic_add(presence, count, sem="relaxed", scope="gpu")


@cute.jit
def decide_to_wait(
    presence: cute.Pointer, order: Uint32, seen: Uint32, block: Int32, blocks: Int32, selecting: Int32
) -> Int32:
    """By one thread of a block: how many blocks' tokens this block selects for, itself first if it has tokens.

    order: what `presence` said when this block started; seen: what it said of late.
    """
    duties = Int32(0)
    if (order & FIELD) == blocks - 1:
        # The last to start.
        duties = Int32((order // GAVE_UP) & FIELD) + Int32(block < selecting)
    elif block < selecting:
        looks = Int32(0)
        while (seen & FIELD) != blocks and looks < LOOKS:
            seen = load_presence(presence, Int32(0))
            looks += 1
        duties = Int32(1)
        if (seen & FIELD) != blocks:
            seen = add_presence(presence, Uint32(GAVE_UP))
            # If all have started by now, nobody will take over.
            if (seen & FIELD) != blocks:
                duties = Int32(0)
                cute.arch.store(presence + (MARKS + block), Uint32(1), sem="relaxed", scope="gpu")
    return duties


@cute.jit
def find_mark(presence: cute.Pointer, selecting: Int32) -> Int32:
    """By one thread of the last block to start: waits for the mark of a block that gave up, and takes it away."""
    found = Int32(-1)
    candidate = Int32(0)
    while found < 0:
        if load_presence(presence, MARKS + candidate) != 0:
            found = candidate
            cute.arch.store(presence + (MARKS + candidate), Uint32(0), sem="relaxed", scope="gpu")
        candidate += 1
        if candidate == selecting:
            candidate = Int32(0)
    return found
