"""dense_router_decode: gate product, activation and top-k of up to 64 tokens in one launch.

    logits[t, e] = sum over h of hidden[t, h] * weight[e, h]        bfloat16 operands, float32 products and sums
    s            = sqrt(softplus(logits))
    ids[t]       = the top_k largest of s[t] + bias, largest first; at a tie the lower expert first
    weights[t]   = s[t, ids[t]], divided by their sum if `renormalize`, times `scale`

The product is spread over the device: a block multiplies all tokens by a tile of experts, over a part of hidden_size,
so that every byte of `weight` is read once. The block with the number of a token then waits for the token's sums from
all blocks and selects for it.

Blocks hand over sums without a counter or a fence: a place of the workspace is zero until its sum is stored, and a sum
of zero is stored as -0. Who waits for a place takes the value and leaves zero again.

Nobody waits for a block that might not start, so the launch ends with any number of blocks resident at once, one
included, whatever else holds multiprocessors: other streams, other processes, a limit on them. In this order:
  1. A block counts itself in `presence` when it starts, and multiplies and stores its sums without waiting for anyone.
  2. A block with tokens looks at `presence` a limited number of times. Once it has seen that all have started, it waits
     for their sums: by 1 all of them come, as a block that has started keeps its place until it ends.
  3. If it has not seen that, it says in `presence` that it gives up. This addition and the last block's counting of
     itself are in one order, so each of the two knows which came first. If the last block had started before, 2 holds
     after all. If not, the block leaves a mark and ends, and its place is free for one that has not started.
  4. The last to start learns from the same addition how many gave up before. It is in case 2 by itself, and finds their
     marks, which come without waiting for anyone; then it selects for their tokens.
The next launch in the stream takes no place from this one: its blocks start only when all of this one's have.
Who selects changes no result: sums are added up in the order of their places.

Launch: grid (expert tiles, hidden_splits), THREADS threads, a ring of stages in dynamic shared memory.

    hidden        [tokens, hidden_size] bfloat16, rows hidden_stride elements apart, each aligned to 16 bytes
    weight        [experts, hidden_size] bfloat16, rows weight_stride elements apart, each aligned to 16 bytes
    bias          [experts] float32, or null
    sums          [hidden_splits <= 16, tokens, experts] float32 workspace
    presence      [65] uint32 workspace: what STARTED, GAVE_UP and LOOKED count, then a mark for each block
    out_weights   [tokens, top_k] float32
    out_ids       [tokens, top_k] int32

    tokens 1 to tile_tokens, hidden_size a multiple of 64 and at least 64 * hidden_splits, experts 1 to max_experts,
    top_k 1 to min(32, experts). Both parts of the workspace are zero before the launch and after it; two launches that
    may overlap need their own.

A selection score that is NaN is below all others, -inf included; a logit that is NaN makes it so and gives weight 0.
Ids are valid and distinct in any case. Sums are taken in a fixed order: the same input and grid give the same bits.
"""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Boolean, Float32, Int32, Int64, Uint32

from aot.declare import CuteKernel

LANES = 32

# The kernel is compiled for each of these. A thread for each expert.
MAX_EXPERTS = (256, 384, 512)
MAX_TOKENS = (16, 32, 64)

# The shape of one mma.sync.m16n8k16: experts by tokens, over 16 elements of hidden_size.
MMA_EXPERTS = 16
MMA_TOKENS = 8

# Tiles of experts that max_experts are spread over. With 16 parts of hidden_size, 128 blocks.
EXPERT_TILES = 8
MAX_SPLITS = 16

# Warps that multiply the same 16 experts, by other tokens. For few tokens some of them only load.
WARPS_PER_MMA = 4

# A unit is what a stage holds of a row: 64 elements, 8 chunks of 16 bytes.
UNIT = 64
CHUNK = 8
CHUNK_BYTES = 16
CHUNKS = UNIT // CHUNK
UNIT_BYTES = UNIT * 2
HALVES = 2

# The models' parts of hidden_size have 4, 5 and 7 units: all loads of a block are in flight at once. Where that is more
# than a block can have on sm_120, there are fewer.
MAX_STAGES = 7
RING_BYTES = 98 << 10

# Of sqrt_softplus: half of log2(e) and what float32 leaves of it; beyond FLAT, exp(-|x| / 2) is 0; below LINEAR,
# log(1 + e^x) is e^x to the last bit of float32; log(1 + u) is u times the polynomial of least relative error on
# [0, 1], coefficients from degree 9 down.
HALF_LOG2E = 0.72134752
HALF_LOG2E_REST = 9.6298149e-09
LN2 = 0.69314718
FLAT = 200.0
LINEAR = -17.0
LOG1P_OVER_U = (
    -0.0032440233,
    0.0198514536,
    -0.0569595173,
    0.106036536,
    -0.153055921,
    0.196759388,
    -0.249541342,
    0.333299637,
    -0.499999017,
    1.0,
)

# Selection keys: unsigned integers in the order of the float32 scores. The key of -inf is 0x007FFFFF, so that the small
# values are free for what ranks below it.
KEY_NONE = 0
KEY_NAN = 1
SIGN_BIT = 0x80000000
NO_EXPERT = 0xFFFFFFFF

# Up to this many experts are chosen by `select_few`.
FEW = 8

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


def make_registers(shape: tuple[int, ...], dtype: type[cutlass.Numeric]) -> cute.Tensor:
    """An array in registers, last index fastest. Every index must be known at compile time."""
    return cute.make_rmem_tensor(cute.make_ordered_layout(shape, order=tuple(reversed(range(len(shape))))), dtype)


def shared_array(address: Int32, dtype: type[cutlass.Numeric], size: int) -> cute.Tensor:
    pointer = cute.make_ptr(dtype, address, cute.AddressSpace.smem, assumed_align=CHUNK_BYTES)
    return cute.make_tensor(pointer, cute.make_layout(size))


def chunk_offset(row: Int32, chunk: Int32) -> Int32:
    """Where a stage keeps a chunk: chunks of odd rows change halves, so that the 8 lanes that are served at once, two
    rows of four chunks, find 8 different groups of banks.
    """
    return row * UNIT_BYTES + (chunk ^ ((row & 1) * (CHUNKS // 2))) * CHUNK_BYTES


def copy_chunk(source: Int64, target: Int32, bytes_to_read: Int32, condition: Boolean | None) -> None:
    """Asks for 16 bytes in shared memory: as many from global memory as given, the others zero."""
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
    """Asks for this thread's chunks of a unit."""
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


@cute.jit
def store_sums(
    accumulators: list[cute.Tensor],
    sums: cute.Pointer,
    tokens: Int32,
    experts: Int32,
    tile_experts: cutlass.Constexpr,
) -> None:
    """Stores the block's sums, zero as -0."""
    expert_tile, split, _ = cute.arch.block_idx()
    tile, quarter = place_of_warp()
    lane = cute.arch.lane_idx()
    tiles = cutlass.const_expr(len(accumulators) // HALVES)
    # Of the 16 by 8 result a lane holds columns 2 (lane % 4) and the next, of rows lane / 4 and lane / 4 + 8.
    first_expert = expert_tile * tile_experts + tile * MMA_EXPERTS + lane // 4
    first_token = quarter * tiles * MMA_TOKENS + lane % 4 * 2
    first = sums + ((Int64(split) * tokens + first_token) * experts + first_expert)
    for index in cutlass.range_constexpr(tiles):
        for item in cutlass.range_constexpr(4):
            bits = (accumulators[index][item] + accumulators[tiles + index][item]).bitcast(Uint32)
            if bits == 0:
                bits = Uint32(SIGN_BIT)
            token = index * MMA_TOKENS + item % 2
            if first_token + token < tokens and first_expert + item // 2 * 8 < experts:
                cute.arch.store(first + (token * experts + item // 2 * 8), bits, sem="relaxed", scope="gpu")


@cute.jit
def take_logit(sums: cute.Pointer, token: Int32, tokens: Int32, expert: Int32, experts: Int32) -> Float32:
    """Waits for the sums of a logit from all blocks, leaves zeros, and adds them up."""
    _, splits, _ = cute.arch.grid_dim()
    first = sums + (Int64(token) * experts + expert)
    stride = Int64(tokens) * experts
    words = make_registers((MAX_SPLITS,), Uint32)
    for split in cutlass.range_constexpr(MAX_SPLITS):
        words[split] = Uint32(0)
        if split >= splits:
            words[split] = Uint32(SIGN_BIT)
    missing = Boolean(True)
    while missing:
        for split in cutlass.range_constexpr(MAX_SPLITS):
            if words[split] == 0:
                words[split] = cute.arch.load(first + split * stride, Uint32, sem="relaxed", scope="gpu")
        missing = Boolean(False)
        for split in cutlass.range_constexpr(MAX_SPLITS):
            missing = missing | (words[split] == 0)
    for split in cutlass.range_constexpr(MAX_SPLITS):
        if split < splits:
            cute.arch.store(first + split * stride, Uint32(0), sem="relaxed", scope="gpu")
    values = [words[split].bitcast(Float32) for split in range(MAX_SPLITS)]
    while cutlass.const_expr(len(values) > 1):
        values = [values[2 * i] + values[2 * i + 1] for i in range(len(values) // 2)]
    return values[0]


@cute.jit
def sqrt_softplus(logit: Float32) -> Float32:
    """sqrt(log(1 + e^x)), as csrc/device/activation.cuh computes it, with the reasons. NaN stays NaN."""
    size = cute.math.abs(logit)
    if size > FLAT:
        size = Float32(FLAT)
    exponent = -size * HALF_LOG2E
    rest = cute.math.fma(-size, Float32(HALF_LOG2E), -exponent) - size * HALF_LOG2E_REST
    root = cute.math.exp2(exponent, fastmath=True)
    root = cute.math.fma(root * LN2, rest, root)
    u = root * root
    ratio = Float32(LOG1P_OVER_U[0])
    for coefficient in LOG1P_OVER_U[1:]:
        ratio = cute.math.fma(ratio, u, Float32(coefficient))
    softplus = cute.math.fma(ratio, u, cutlass.max(logit, Float32(0.0)))
    result = cute.math.sqrt(softplus, fastmath=True)
    if logit < LINEAR:
        result = root
    return result


@cute.jit
def selection_key(score: Float32) -> Uint32:
    """An unsigned integer that orders as the scores do, NaN lowest."""
    bits = score.bitcast(Uint32)
    key = bits | Uint32(SIGN_BIT)
    if bits >= Uint32(SIGN_BIT):
        key = ~bits
    if score != score:
        key = Uint32(KEY_NAN)
    return key


@cute.jit
def larger_key(lower_expert: tuple[Uint32, Uint32], higher_expert: tuple[Uint32, Uint32]) -> tuple[Uint32, Uint32]:
    """Of two pairs (key, expert) the one with the larger key; of equal keys the lower expert."""
    key, expert = lower_expert
    other_key, other_expert = higher_expert
    if other_key > key:
        key = other_key
        expert = other_expert
    return key, expert


def best_of_lane(keys: cute.Tensor) -> tuple[Uint32, Uint32]:
    """The largest of this lane's keys and its expert, by a tree of comparisons: short chains, not one long one."""
    lane = Uint32(cute.arch.lane_idx())
    pairs = [(keys[slot], lane + slot * LANES) for slot in range(cute.size(keys))]
    while len(pairs) > 1:
        halved = [larger_key(pairs[index], pairs[index + 1]) for index in range(0, len(pairs) - 1, 2)]
        pairs = halved + pairs[2 * len(halved) :]
    return pairs[0]


@cute.jit
def take_best(keys: cute.Tensor) -> Uint32:
    """The warp's expert of the largest key, the lowest such expert; its key is marked as taken."""
    lane = Uint32(cute.arch.lane_idx())
    lane_key, lane_expert = best_of_lane(keys)
    best_key = cute.arch.warp_redux_sync(lane_key, "max")
    candidate = Uint32(NO_EXPERT)
    if lane_key == best_key:
        candidate = lane_expert
    best_expert = cute.arch.warp_redux_sync(candidate, "min")
    for slot in cutlass.range_constexpr(cute.size(keys)):
        if best_expert == lane + slot * LANES:
            keys[slot] = Uint32(KEY_NONE)
    return best_expert


@cute.jit
def select_by_rounds(keys: cute.Tensor, top_k: Int32) -> Uint32:
    """Lane i gets the i-th choice: one round over all keys for each. Destroys the keys."""
    chosen = Uint32(0)
    for rank in cutlass.range(top_k, unroll=1):
        best_expert = take_best(keys)
        if cute.arch.lane_idx() == rank:
            chosen = best_expert
    return chosen


def tree_max(values: list[Uint32]) -> Uint32:
    """The largest: short chains, not one long one."""
    while len(values) > 1:
        halved = [cutlass.max(values[index], values[index + 1]) for index in range(0, len(values) - 1, 2)]
        values = halved + values[2 * len(halved) :]
    return values[0]


@cute.jit
def select_few(keys: cute.Tensor, top_k: Int32, shared: Int32) -> Uint32:
    """As select_by_rounds, for at most FEW choices: these are at least as good as the top_k-th best of the pairs of
    lanes' best ones, and seldom many more keys are. Those few, one for each lane, are ranked by counting.
    """
    lane = cute.arch.lane_idx()
    slots = cutlass.const_expr(cute.size(keys))
    pairs = cutlass.const_expr(LANES // 2)
    best_keys = shared_array(shared, Uint32, pairs)
    best = tree_max([keys[slot] for slot in range(slots)])
    best = cutlass.max(best, cute.arch.shuffle_sync_bfly(best, 1))
    best_keys[lane // 2] = best
    cute.arch.sync_warp()
    bests = cute.make_rmem_tensor(pairs, Uint32)
    cute.autovec_copy(best_keys, bests)
    better = Int32(0)
    for pair in cutlass.range_constexpr(pairs):
        better += Int32(bests[pair] > best)
    limit = Uint32(NO_EXPERT)
    if better < top_k:
        limit = best
    limit = cutlass.max(cute.arch.warp_redux_sync(limit, "min"), Uint32(KEY_NONE + 1))

    # Candidates in the order of the experts: the lower one of two equal keys has the lower place.
    candidate_keys = shared_array(shared + LANES * 4, Uint32, LANES)
    candidate_experts = shared_array(shared + 2 * LANES * 4, Uint32, LANES)
    count = Int32(0)
    for slot in cutlass.range_constexpr(slots):
        lanes = cute.arch.vote_ballot_sync(keys[slot] >= limit)
        place = count + cute.arch.popc(lanes & Int32(cute.arch.lanemask_lt()))
        if keys[slot] >= limit and place < LANES:
            candidate_keys[place] = keys[slot]
            candidate_experts[place] = Uint32(lane + slot * LANES)
        count += cute.arch.popc(lanes)
    cute.arch.sync_warp()
    chosen = Uint32(0)
    if count > LANES:
        # Many are equal.
        chosen = select_by_rounds(keys, top_k)
    else:
        key = Uint32(KEY_NONE)
        if lane < count:
            key = Uint32(candidate_keys[lane])
        rank = Int32(0)
        for first in cutlass.range(0, count, FEW, unroll=1):
            for index in cutlass.range_constexpr(FEW):
                other = first + index
                other_key = cute.arch.shuffle_sync(key, other)
                rank += Int32((other_key > key) | ((other_key == key) & (other < lane)))
        if lane < count and rank < top_k:
            best_keys[rank] = candidate_experts[lane]
        cute.arch.sync_warp()
        if lane < top_k:
            chosen = Uint32(best_keys[lane])
    return chosen


@cute.jit
def select_experts(
    scores: cute.Tensor,
    keys_of_block: cute.Tensor,
    scratch: Int32,
    out_weights: cute.Pointer,
    out_ids: cute.Pointer,
    token: Int32,
    top_k: Int32,
    renormalize: Int32,
    scale: Float32,
    epsilon: Float32,
) -> None:
    """Chooses the experts of one token and stores their ids and weights. By one warp; lane i stores the i-th choice."""
    lane = cute.arch.lane_idx()
    slots = cutlass.const_expr(cute.size(keys_of_block) // LANES)
    keys = make_registers((slots,), Uint32)
    for slot in cutlass.range_constexpr(slots):
        keys[slot] = Uint32(keys_of_block[slot * LANES + lane])
    chosen = Uint32(0)
    if top_k <= FEW:  # noqa: SIM108 -- the DSL makes no branch of a conditional expression
        chosen = select_few(keys, top_k, scratch)
    else:
        chosen = select_by_rounds(keys, top_k)

    weight = Float32(0.0)
    if lane < top_k:
        weight = scores[chosen]
        if weight != weight:
            weight = Float32(0.0)
    if renormalize != 0:
        total = weight
        for power in cutlass.range_constexpr(5):
            total += cute.arch.shuffle_sync_bfly(total, 1 << power)
        if total == 0.0:
            total = Float32(1.0)
        weight = weight / (total + epsilon)
    if lane < top_k:
        output = Int64(token) * top_k + lane
        (out_weights + output).store(weight * scale)
        (out_ids + output).store(Int32(chosen))


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


@cute.kernel
def dense_router_decode(
    hidden: cute.Pointer,
    weight: cute.Pointer,
    bias: cute.Pointer,
    sums: cute.Pointer,
    presence: cute.Pointer,
    out_weights: cute.Pointer,
    out_ids: cute.Pointer,
    hidden_stride: Int64,
    weight_stride: Int64,
    tokens: Int32,
    units_per_split: Int32,
    extra_units: Int32,
    experts: Int32,
    top_k: Int32,
    renormalize: Int32,
    scale: Float32,
    epsilon: Float32,
    max_experts: cutlass.Constexpr,
    max_tokens: cutlass.Constexpr,
) -> None:
    # The kernel's half of a launch (csrc/core/launch.h): first of all it waits for the one before it.
    cute.arch.griddepcontrol_wait()
    cute.arch.griddepcontrol_launch_dependents()

    thread, _, _ = cute.arch.thread_idx()
    expert_tile, split, _ = cute.arch.block_idx()
    tiles, splits, _ = cute.arch.grid_dim()
    block, blocks = split * tiles + expert_tile, tiles * splits
    # Blocks of this number and above have no token of their own.
    selecting = cutlass.min(tokens, blocks)
    ring = cute.arch.get_dyn_smem(Uint32, 128).toint()
    shared = cute.arch.alloc_smem(Int32, 4, CHUNK_BYTES)

    order = Uint32(0)
    if thread == 0:
        order = add_presence(presence, Uint32(STARTED))
    accumulators = multiply_part(
        hidden,
        weight,
        hidden_stride,
        weight_stride,
        tokens,
        units_per_split,
        extra_units,
        experts,
        ring,
        max_experts,
        max_tokens,
    )
    # Asked for here, so that they arrive while sums are exchanged.
    seen = Uint32(0)
    if thread == 0 and block < selecting:
        seen = load_presence(presence, Int32(0))
    expert = cutlass.min(thread, experts - 1)
    expert_bias = Float32(0.0)
    if block < selecting and bias.toint() != 0:
        expert_bias = (bias + expert).load()
    store_sums(accumulators, sums, tokens, experts, tile_experts_for(max_experts))

    if thread == 0:
        shared.store(decide_to_wait(presence, order, seen, block, blocks, selecting))
        (shared + 1).store(Int32((order & FIELD) == blocks - 1))
    cute.arch.sync_threads()
    duties = shared.load()
    looks = (shared + 1).load() + Int32(block < selecting)

    scores = shared_array(ring, Float32, max_experts)
    keys = shared_array(ring + max_experts * 4, Uint32, max_experts)
    for duty in cutlass.range(duties, unroll=1):
        owner = block
        if duty > 0 or block >= selecting:
            cute.arch.sync_threads()
            if thread == 0:
                (shared + 2).store(find_mark(presence, selecting))
            cute.arch.sync_threads()
            owner = (shared + 2).load()
            if bias.toint() != 0:
                expert_bias = (bias + expert).load()
        for token in cutlass.range(owner, tokens, blocks, unroll=1):
            key = Uint32(KEY_NONE)
            if thread < experts:
                score = sqrt_softplus(take_logit(sums, token, tokens, thread, experts))
                scores[thread] = score
                key = selection_key(score + expert_bias)
            keys[thread] = key
            cute.arch.sync_threads()
            if thread < LANES:
                select_experts(
                    scores,
                    keys,
                    ring + max_experts * 8,
                    out_weights,
                    out_ids,
                    token,
                    top_k,
                    renormalize,
                    scale,
                    epsilon,
                )
            if token + blocks < tokens:
                cute.arch.sync_threads()

    # The last to have looked at `presence` leaves it ready. By a thread that does not select.
    if thread == LANES and looks > 0:
        before = add_presence(presence, Uint32(looks * LOOKED))
        if before // LOOKED + looks == selecting + 1:
            cute.arch.store(presence, Uint32(0), sem="relaxed", scope="gpu")


ARGUMENTS = {
    "hidden": "const bf16*",
    "weight": "const bf16*",
    "bias": "const float32*",
    "sums": "uint32*",
    "presence": "uint32*",
    "out_weights": "float32*",
    "out_ids": "int32*",
    "hidden_stride": "int64",
    "weight_stride": "int64",
    "tokens": "int32",
    "units_per_split": "int32",
    "extra_units": "int32",
    "experts": "int32",
    "top_k": "int32",
    "renormalize": "int32",
    "scale": "float32",
    "epsilon": "float32",
}

KERNELS = [
    CuteKernel(
        function=dense_router_decode,
        name=f"dense_router_decode_experts{max_experts}_tokens{max_tokens}",
        arguments=ARGUMENTS,
        constants={"max_experts": max_experts, "max_tokens": max_tokens},
        threads=threads_for(max_experts),
        dynamic_shared=stages_for(max_experts, max_tokens) * stage_bytes(max_experts, max_tokens),
    )
    for max_experts in MAX_EXPERTS
    for max_tokens in MAX_TOKENS
]
