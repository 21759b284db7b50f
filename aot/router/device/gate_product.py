"""The gate's product, spread over the device.

A block multiplies all tokens by a tile of experts, over a part of hidden_size, so that every byte of `weight` is read
once. It has a thread for each of max_experts, and a ring of stages in dynamic shared memory: a stage holds a unit of 64
elements of each of the block's rows, experts first and tokens behind them.
"""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Boolean, Float32, Int32, Int64, Uint32

from aot.router.device.arrays import CHUNK_BYTES, make_registers, shared_array

# The shape of one mma.sync.m16n8k16: experts by tokens, over 16 elements of hidden_size.
MMA_EXPERTS = 16
MMA_TOKENS = 8

# Tiles that max_experts experts are spread over. With 16 parts of hidden_size, 128 blocks.
EXPERT_TILES = 8

# Warps that multiply the same 16 experts, by other tokens. For few tokens some of them only load.
WARPS_PER_MMA = 4

# A unit is what a stage holds of a row: 64 elements, 8 chunks of 16 bytes.
UNIT = 64
CHUNK = 8
CHUNKS = UNIT // CHUNK
UNIT_BYTES = UNIT * 2
HALVES = 2

# The models' parts of hidden_size have 4, 5 and 7 units: all loads of a block are in flight at once. Where that is more
# than a block can have on sm_120, there are fewer.
MAX_STAGES = 7
RING_BYTES = 98 << 10


def threads_for(max_experts: int) -> int:
    return max_experts


def tile_experts_for(max_experts: int) -> int:
    return max_experts // EXPERT_TILES


def stage_bytes(max_experts: int, max_tokens: int) -> int:
    return (tile_experts_for(max_experts) + max_tokens) * UNIT_BYTES


def stages_for(max_experts: int, max_tokens: int) -> int:
    return min(MAX_STAGES, RING_BYTES // stage_bytes(max_experts, max_tokens))


def tiles_of_warp(max_tokens: int) -> int:
    """The groups of 8 tokens that a warp multiplies."""
    return max(1, max_tokens // WARPS_PER_MMA // MMA_TOKENS)


def chunk_offset(row: Int32, chunk: Int32) -> Int32:
    """Where a stage keeps a chunk: chunks of odd rows change halves, so that the 8 lanes that are served at once, two
    rows of four chunks, find 8 different groups of banks.
    """
    return row * UNIT_BYTES + (chunk ^ ((row & 1) * (CHUNKS // 2))) * CHUNK_BYTES


def copy_chunk(source: Int64, target: Int32, bytes_to_read: Int32, condition: Boolean | None) -> None:
    """Starts a copy of 16 bytes to shared memory (cp.async): bytes_to_read from global memory, the rest zero."""
    cute.arch.inline_ptx(
        "cp.async.cg.shared.global [{$r0}], [{$r1}], 16, {$r2};",
        read_only_args=[target, source, bytes_to_read],
        predicate=condition,
    )


def row_source(matrix: cute.Pointer, row: Int32, stride: Int64, rows: Int32, chunk: Int32) -> tuple[Int64, Int32]:
    """Address of a chunk of a row's first unit, and how many of its bytes there are: none past the last row."""
    address = matrix.toint() + (Int64(cutlass.min(row, rows - 1)) * stride + chunk * CHUNK) * 2
    return address, cutlass.select_(row < rows, Int32(CHUNK_BYTES), Int32(0))


def chunks_of_thread(
    hidden: cute.Pointer,
    weight: cute.Pointer,
    hidden_stride: Int64,
    weight_stride: Int64,
    tokens: Int32,
    experts: Int32,
    ring: Int32,
    max_experts: int,
    max_tokens: int,
) -> list[tuple[Int64, Int32, Int32, Boolean | None]]:
    """What this thread loads of each unit: one chunk of weight, and of hidden what falls to it.

    Each as the address in the row's first unit, the bytes to read, the place in the first stage, and a condition.
    """
    thread, _, _ = cute.arch.thread_idx()
    expert_tile, _, _ = cute.arch.block_idx()
    row, chunk = thread // CHUNKS, thread % CHUNKS
    rows_at_once = threads_for(max_experts) // CHUNKS
    tile_experts = tile_experts_for(max_experts)
    assert rows_at_once == tile_experts
    source, size = row_source(weight, expert_tile * tile_experts + row, weight_stride, experts, chunk)
    chunks = [(source, size, ring + chunk_offset(row, chunk), None)]
    for first in range(0, max_tokens, rows_at_once):
        token = first + row
        source, size = row_source(hidden, token, hidden_stride, tokens, chunk)
        condition = None if first + rows_at_once <= max_tokens else token < max_tokens
        chunks.append((source, size, ring + chunk_offset(tile_experts + token, chunk), condition))
    return chunks


def load_unit(chunks: list[tuple[Int64, Int32, Int32, Boolean | None]], unit: Int32, stage_offset: Int32) -> None:
    """Prefetches this thread's chunks of a unit."""
    for source, size, target, condition in chunks:
        copy_chunk(source + Int64(unit) * UNIT_BYTES, target + stage_offset, size, condition)


def load_fragment(address: Int32) -> cute.Tensor:
    """A lane's chunk of a row in shared memory, as two pairs of elements for each of two MMAs."""
    chunk = cute.make_rmem_tensor(CHUNK // 2, Uint32)
    cute.autovec_copy(shared_array(address, Uint32, CHUNK // 2), chunk)
    return chunk


def multiply_unit(stage: Int32, accumulators: list[cute.Tensor], max_experts: int) -> None:
    """Adds the warp's part of the product of a unit, each half of the unit to sums of its own.

    An MMA's lane wants, of its row, the elements 2q, 2q + 1, 2q + 8 and 2q + 9 of 16, where q = lane % 4. Any
    assignment of the real elements to these 16 positions gives the same sum, as long as both operands use the same.
    Here a lane gives the first four elements of its chunk to the first MMA and the last four to the second: so it loads
    16 bytes at once, and no value moves between lanes.
    """
    tile, quarter = place_of_warp()
    lane = cute.arch.lane_idx()
    row = lane // 4
    tiles = len(accumulators) // HALVES
    mma = cute.make_mma_atom(cute.nvgpu.warp.MmaF16BF16Op(BFloat16, Float32, (16, 8, 16)))
    first_token = tile_experts_for(max_experts) + quarter * tiles * MMA_TOKENS
    rows = [tile * MMA_EXPERTS + row, tile * MMA_EXPERTS + 8 + row]
    rows += [first_token + index * MMA_TOKENS + row for index in range(tiles)]
    for half in range(HALVES):
        chunk = half * 4 + lane % 4
        low, high, *tokens = [load_fragment(stage + chunk_offset(one, chunk)) for one in rows]
        for step in range(2):
            weight_operand = cute.make_rmem_tensor(8, BFloat16)
            weight_pairs = cute.recast_tensor(weight_operand, Uint32)
            # Operand registers alternate between the expert rows lane / 4 and lane / 4 + 8.
            for pair in range(2):
                weight_pairs[2 * pair] = low[2 * step + pair]
                weight_pairs[2 * pair + 1] = high[2 * step + pair]
            for index in range(tiles):
                hidden_operand = cute.make_rmem_tensor(4, BFloat16)
                hidden_pairs = cute.recast_tensor(hidden_operand, Uint32)
                for pair in range(2):
                    hidden_pairs[pair] = tokens[index][2 * step + pair]
                sums = accumulators[half * tiles + index]
                cute.mma_atom_call(mma, sums, weight_operand, hidden_operand, sums)


def place_of_warp() -> tuple[Int32, Int32]:
    """The 16 experts of the block's, and the part of the tokens, that this warp multiplies."""
    warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    return warp // WARPS_PER_MMA, warp % WARPS_PER_MMA


@cute.jit
def multiply_part(
    hidden: cute.Pointer,
    weight: cute.Pointer,
    hidden_stride: Int64,
    weight_stride: Int64,
    tokens: Int32,
    units_per_split: Int32,
    extra_units: Int32,
    experts: Int32,
    ring: Int32,
    max_experts: cutlass.Constexpr,
    max_tokens: cutlass.Constexpr,
) -> list[cute.Tensor]:
    """The warp's share of the product of the block's experts, all tokens and the block's part of hidden_size."""
    _, split, _ = cute.arch.block_idx()
    first = split * units_per_split + cutlass.min(split, extra_units)
    count = units_per_split + Int32(split < extra_units)
    bytes_of_stage = cutlass.const_expr(stage_bytes(max_experts, max_tokens))
    stages = cutlass.const_expr(stages_for(max_experts, max_tokens))

    chunks = chunks_of_thread(
        hidden, weight, hidden_stride, weight_stride, tokens, experts, ring, max_experts, max_tokens
    )
    for stage in cutlass.range_constexpr(stages):
        if stage < count:
            load_unit(chunks, first + stage, Int32(stage * bytes_of_stage))
        cute.arch.cp_async_commit_group()

    accumulators = [make_registers((4,), Float32) for _ in range(HALVES * tiles_of_warp(max_tokens))]
    for accumulator in accumulators:
        accumulator.fill(0.0)
    _, quarter = place_of_warp()
    stage_offset = Int32(0)
    for index in cutlass.range(count, unroll=1):
        cute.arch.cp_async_wait_group(stages - 1)
        cute.arch.sync_threads()
        if quarter * tiles_of_warp(max_tokens) * MMA_TOKENS < tokens:
            multiply_unit(ring + stage_offset, accumulators, max_experts)
        if index + stages < count:
            cute.arch.sync_threads()
            load_unit(chunks, first + index + stages, stage_offset)
        cute.arch.cp_async_commit_group()
        stage_offset += bytes_of_stage
        if stage_offset == stages * bytes_of_stage:
            stage_offset = Int32(0)
    return accumulators
