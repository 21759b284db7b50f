"""dense_router_decode: gate product, activation and top-k of up to 64 tokens in one launch.

    logits[t, e] = sum over h of hidden[t, h] * weight[e, h]        bfloat16 operands, float32 products and sums
    s            = sqrt(softplus(logits))
    ids[t]       = the top_k largest of s[t] + bias, largest first; at a tie the lower expert first
    weights[t]   = s[t, ids[t]], divided by their sum if `renormalize`, times `scale`

The time goes into reading `weight` once, so the product is spread over the device: a block multiplies all tokens by 8
experts, and over a part of hidden_size where the launch has gridDim.y > 1. The block that finishes last selects for all
tokens, so no second launch is needed. mma.sync is enough for a product this small, and every architecture has it.

Launch: grid (ceil(experts / 8), hidden_splits), THREADS threads, no dynamic shared memory.

    hidden        [tokens, hidden_size] bfloat16, rows hidden_stride elements apart, each aligned to 16 bytes
    weight        [experts, hidden_size] bfloat16, rows weight_stride elements apart, each aligned to 16 bytes
    bias          [experts] float32, or null
    logits        [hidden_splits, tokens, experts] float32 workspace: the sums over the parts of hidden_size
    arrivals      one uint32, zero before the launch, zero after it; two launches that may overlap need one each
    out_weights   [tokens, top_k] float32
    out_ids       [tokens, top_k] int32

    tokens 1 to 16 * token_tiles, hidden_size a multiple of 64, experts 1 to 512, top_k 1 to min(32, experts)

A selection score that is NaN is below all others, -inf included; a logit that is NaN makes it so and gives weight 0.
Ids are valid and distinct in any case. Sums are taken in a fixed order: the same input and grid give the same bits.
"""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64, Uint32

from aot.declare import CuteKernel

LANES = 32
WARPS = 16
THREADS = WARPS * LANES

# The shape of one mma.sync.m16n8k16: tokens by experts, over 16 elements of hidden_size.
TILE_TOKENS = 16
TILE_EXPERTS = 8

# A chunk is what a lane loads at once: 16 bytes, 8 elements of a row, enough for two MMAs; see `multiply_slice`.
CHUNK = 8
CHUNK_BYTES = 16
MMAS_PER_CHUNK = 2

# A slice is the unit of work of a warp: 64 elements of hidden_size, 128 bytes of each row, two chunks for each of the
# four lanes that share a row.
SLICE = 64
SLICE_BYTES = SLICE * 2
LANES_PER_ROW = 4
CHUNKS_PER_SLICE = SLICE // (CHUNK * LANES_PER_ROW)

# Slices that a warp loads before it multiplies the first, by token_tiles. What bounds a small batch is the latency of
# memory, so: as many as fit in the 128 registers that 16 warps leave a thread. With one token tile a block has all of
# hidden_size 4096 in flight at once.
SLICES_IN_FLIGHT = {1: 4, 2: 2, 4: 1}

MAX_EXPERTS = 512
EXPERTS_PER_LANE = MAX_EXPERTS // LANES

# Below this logit u = exp(logit) is under 2^-24, where log1p(u) is u in float32.
LOG1P_IS_IDENTITY_BELOW = -17.0

# Selection keys: unsigned integers in the order of the float32 scores. The key of -inf is 0x007FFFFF, so that the small
# values are free for what ranks below it.
KEY_TAKEN = 0
KEY_NAN = 1
SIGN_BIT = 0x80000000
NO_EXPERT = 0xFFFFFFFF


def make_registers(shape: tuple[int, ...], dtype: type[cutlass.Numeric]) -> cute.Tensor:
    """An array in registers, last index fastest. Every index must be known at compile time."""
    return cute.make_rmem_tensor(cute.make_ordered_layout(shape, order=tuple(reversed(range(len(shape))))), dtype)


def row_address(matrix: cute.Pointer, row: Int32, stride: Int64) -> Int64:
    """The address of this lane's first chunk of a row: lanes that share a row take neighbouring chunks."""
    lane_in_row = cute.arch.lane_idx() % LANES_PER_ROW
    return matrix.toint() + (Int64(row) * stride + lane_in_row * CHUNK) * (BFloat16.width // 8)


def load_chunks(address: Int64, chunks: cute.Tensor) -> None:
    """Loads this lane's chunks of one row of a slice into the rows of `chunks`."""
    for index in range(CHUNKS_PER_SLICE):
        source = cute.make_ptr(
            BFloat16,
            address + index * LANES_PER_ROW * CHUNK_BYTES,
            cute.AddressSpace.gmem,
            assumed_align=CHUNK_BYTES,
        )
        cute.autovec_copy(cute.make_tensor(source, cute.make_layout(CHUNK)), chunks[index, None])


def multiply_slice(
    mma: cute.MmaAtom, hidden_chunks: cute.Tensor, weight_chunks: cute.Tensor, accumulators: cute.Tensor
) -> None:
    """Adds the product of one slice.

    An MMA's lane wants, of its row, the elements 2q, 2q + 1, 2q + 8 and 2q + 9 of 16, where q = lane % 4. Any
    assignment of the real elements to these 16 positions gives the same sum, as long as both operands use the same.
    Here a lane gives the first four elements of its chunk to the first MMA and the last four to the second: so it loads
    16 bytes at once, and no value moves between lanes.
    """
    hidden_operand = cute.make_rmem_tensor(8, BFloat16)
    weight_operand = cute.make_rmem_tensor(4, BFloat16)
    hidden_pairs = cute.recast_tensor(hidden_operand, Uint32)
    for tile in range(cute.size(accumulators, mode=[0])):
        for chunk in range(CHUNKS_PER_SLICE):
            low_row = cute.recast_tensor(hidden_chunks[tile, 0, chunk, None], Uint32)
            high_row = cute.recast_tensor(hidden_chunks[tile, 1, chunk, None], Uint32)
            for step in range(MMAS_PER_CHUNK):
                # Operand registers alternate between the token rows lane / 4 and lane / 4 + 8.
                for half in range(2):
                    hidden_pairs[2 * half] = low_row[2 * step + half]
                    hidden_pairs[2 * half + 1] = high_row[2 * step + half]
                for element in range(4):
                    weight_operand[element] = weight_chunks[chunk, 4 * step + element]
                accumulator = accumulators[tile, None]
                cute.mma_atom_call(mma, accumulator, hidden_operand, weight_operand, accumulator)


@cute.jit
def multiply_slices_of_warp(
    hidden: cute.Pointer,
    weight: cute.Pointer,
    hidden_stride: Int64,
    weight_stride: Int64,
    tokens: Int32,
    hidden_size: Int32,
    experts: Int32,
    token_tiles: cutlass.Constexpr,
) -> cute.Tensor:
    """The warp's part of the product of all tokens and the block's experts: [token_tiles, 4], in the MMA's layout."""
    expert_block, split, _ = cute.arch.block_idx()
    _, splits, _ = cute.arch.grid_dim()
    warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    row_in_tile = cute.arch.lane_idx() // LANES_PER_ROW
    slices_in_flight = cutlass.const_expr(SLICES_IN_FLIGHT[token_tiles])

    # Rows past the end are read from the last row instead; what comes of them is never stored.
    weight_row = cutlass.min(expert_block * TILE_EXPERTS + row_in_tile, experts - 1)
    weight_address = row_address(weight, weight_row, weight_stride)
    hidden_addresses = [
        [
            row_address(hidden, cutlass.min(tile * TILE_TOKENS + half * 8 + row_in_tile, tokens - 1), hidden_stride)
            for half in range(2)
        ]
        for tile in range(token_tiles)
    ]

    mma = cute.make_mma_atom(cute.nvgpu.warp.MmaF16BF16Op(BFloat16, Float32, (16, 8, 16)))
    accumulators = make_registers((token_tiles, 4), Float32)
    accumulators.fill(0.0)
    # By half: the token rows lane / 4 and lane / 4 + 8 of a tile.
    hidden_chunks = [
        make_registers((token_tiles, 2, CHUNKS_PER_SLICE, CHUNK), BFloat16) for _ in range(slices_in_flight)
    ]
    weight_chunks = [make_registers((CHUNKS_PER_SLICE, CHUNK), BFloat16) for _ in range(slices_in_flight)]

    # Slices go round robin to the warps of a block, then to the blocks that share the experts.
    slices = hidden_size // SLICE
    first_slice = split * WARPS + warp
    slice_step = splits * WARPS
    for next_slice in cutlass.range(first_slice, slices, slice_step * slices_in_flight, unroll=1):
        for index in cutlass.range_constexpr(slices_in_flight):
            slice_index = next_slice + index * slice_step
            if slice_index < slices:
                offset = Int64(slice_index) * SLICE_BYTES
                load_chunks(weight_address + offset, weight_chunks[index])
                for tile in cutlass.range_constexpr(token_tiles):
                    for half in cutlass.range_constexpr(2):
                        load_chunks(hidden_addresses[tile][half] + offset, hidden_chunks[index][tile, half, None, None])
        for index in cutlass.range_constexpr(slices_in_flight):
            if next_slice + index * slice_step < slices:
                multiply_slice(mma, hidden_chunks[index], weight_chunks[index], accumulators)
    return accumulators


@cute.jit
def store_block_logits(
    accumulators: cute.Tensor,
    shared: cute.Pointer,
    logits: cute.Pointer,
    tokens: Int32,
    experts: Int32,
    token_tiles: cutlass.Constexpr,
) -> None:
    """Adds up the warps' sums, in the order of the warps, and stores the block's logits."""
    thread, _, _ = cute.arch.thread_idx()
    expert_block, split, _ = cute.arch.block_idx()
    warp = cute.arch.warp_idx()
    lane = cute.arch.lane_idx()
    block_tokens = token_tiles * TILE_TOKENS
    sums = cute.make_tensor(
        shared,
        cute.make_layout((WARPS, block_tokens, TILE_EXPERTS), stride=(block_tokens * TILE_EXPERTS, TILE_EXPERTS, 1)),
    )

    # Of the 16 by 8 result a lane holds columns 2 (lane % 4) and the next, of rows lane / 4 and lane / 4 + 8.
    for tile in cutlass.range_constexpr(token_tiles):
        for half in cutlass.range_constexpr(2):
            for column in cutlass.range_constexpr(2):
                row = tile * TILE_TOKENS + half * 8 + lane // LANES_PER_ROW
                sums[warp, row, lane % LANES_PER_ROW * 2 + column] = accumulators[tile, 2 * half + column]
    cute.arch.sync_threads()

    for output in cutlass.range(thread, block_tokens * TILE_EXPERTS, THREADS, unroll=1):
        token = output // TILE_EXPERTS
        expert_in_block = output % TILE_EXPERTS
        expert = expert_block * TILE_EXPERTS + expert_in_block
        if token < tokens and expert < experts:
            total = Float32(0.0)
            for source in cutlass.range_constexpr(WARPS):
                total += sums[source, token, expert_in_block]
            (logits + ((Int64(split) * tokens + token) * experts + expert)).store(total)


@cute.jit
def is_last_block(arrivals: cute.Pointer, shared: cute.Pointer) -> cutlass.Boolean:
    """Counts this block in. True in the last block to get here, which then sees what all the others have stored."""
    thread, _, _ = cute.arch.thread_idx()
    grid_x, grid_y, _ = cute.arch.grid_dim()

    # Also orders the block's reads of `shared` before the write below.
    cute.arch.sync_threads()
    if thread == 0:
        # Release: the block's stores, which the barrier puts before this, are seen by who sees the count. Acquire: a
        # block that sees the full count sees the stores of all.
        arrived = cute.arch.atomic_add(arrivals, Uint32(1), sem="acq_rel", scope="gpu")
        is_last = arrived == Uint32(grid_x * grid_y - 1)
        if is_last:
            # All have arrived: ready for the next launch.
            arrivals.store(Uint32(0))
        cute.recast_ptr(shared, dtype=Int32).store(Int32(is_last))
    cute.arch.sync_threads()
    result = cute.recast_ptr(shared, dtype=Int32).load() != 0
    # The flag's place is reused.
    cute.arch.sync_threads()
    return result


@cute.jit
def sqrt_softplus(logit: Float32) -> Float32:
    """sqrt(max(x, 0) + log1p(exp(-|x|))), to a few units in the last place of the result for any x. NaN stays NaN."""
    result = logit
    if logit >= LOG1P_IS_IDENTITY_BELOW:
        softplus = cutlass.max(logit, Float32(0.0)) + cute.math.log1p(cute.math.exp(-cute.math.abs(logit)))
        result = cute.math.sqrt(softplus)
    if logit < LOG1P_IS_IDENTITY_BELOW:
        # sqrt(exp(x)), by half the exponent: exp(x) itself would become subnormal and lose precision.
        result = cute.math.exp(logit * 0.5)
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
def load_scores(logits: cute.Pointer, scores: cute.Tensor, token: Int32, tokens: Int32, experts: Int32) -> None:
    """Fills the warp's row of shared memory with the scores of one token: NaN where the logit is."""
    _, splits, _ = cute.arch.grid_dim()
    lane = cute.arch.lane_idx()
    # First all loads, so that they overlap; then the activation in a loop, as its code is long.
    sums = cute.make_rmem_tensor(EXPERTS_PER_LANE, Float32)
    sums.fill(0.0)
    for split in cutlass.range(splits, unroll=1):
        row = (Int64(split) * tokens + token) * experts
        for slot in cutlass.range_constexpr(EXPERTS_PER_LANE):
            expert = cutlass.min(slot * LANES + lane, experts - 1)
            # Stored by other blocks: a relaxed load at device scope is not served from this processor's own cache.
            sums[slot] += cute.arch.load(logits + (row + expert), Float32, sem="relaxed", scope="gpu")
    for slot in cutlass.range_constexpr(EXPERTS_PER_LANE):
        scores[slot * LANES + lane] = sums[slot]
    for expert in cutlass.range(lane, experts, LANES, unroll=2):
        scores[expert] = sqrt_softplus(scores[expert])


@cute.jit
def load_bias(bias: cute.Pointer, experts: Int32) -> cute.Tensor:
    """The bias of this lane's experts, lane + 32 * slot; zeros if there is none."""
    lane = cute.arch.lane_idx()
    values = cute.make_rmem_tensor(EXPERTS_PER_LANE, Float32)
    values.fill(0.0)
    if bias.toint() != 0:
        for slot in cutlass.range_constexpr(EXPERTS_PER_LANE):
            expert = cutlass.min(slot * LANES + lane, experts - 1)
            values[slot] = (bias + expert).load()
    return values


@cute.jit
def selection_keys(scores: cute.Tensor, bias_values: cute.Tensor, experts: Int32) -> cute.Tensor:
    """The keys of this lane's experts, lane + 32 * slot. Where there is no such expert, as if taken already."""
    lane = cute.arch.lane_idx()
    keys = cute.make_rmem_tensor(EXPERTS_PER_LANE, Uint32)
    for slot in cutlass.range_constexpr(EXPERTS_PER_LANE):
        expert = slot * LANES + lane
        key = selection_key(scores[expert] + bias_values[slot])
        if expert >= experts:
            key = Uint32(KEY_TAKEN)
        keys[slot] = key
    return keys


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
    """The largest of this lane's keys and its expert, by a tree of comparisons, which is four deep rather than 15."""
    lane = Uint32(cute.arch.lane_idx())
    pairs = [(keys[slot], lane + slot * LANES) for slot in range(EXPERTS_PER_LANE)]
    while len(pairs) > 1:
        pairs = [larger_key(pairs[index], pairs[index + 1]) for index in range(0, len(pairs), 2)]
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
    for slot in cutlass.range_constexpr(EXPERTS_PER_LANE):
        if best_expert == lane + slot * LANES:
            keys[slot] = Uint32(KEY_TAKEN)
    return best_expert


@cute.jit
def select_experts(
    scores: cute.Tensor,
    bias_values: cute.Tensor,
    out_weights: cute.Pointer,
    out_ids: cute.Pointer,
    token: Int32,
    experts: Int32,
    top_k: Int32,
    renormalize: Int32,
    scale: Float32,
    epsilon: Float32,
) -> None:
    """Chooses the experts of one token and stores their ids and weights. Lane i keeps the i-th choice."""
    lane = cute.arch.lane_idx()
    keys = selection_keys(scores, bias_values, experts)
    chosen = Uint32(0)
    for rank in cutlass.range(top_k, unroll=1):
        best_expert = take_best(keys)
        if lane == rank:
            chosen = best_expert

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


@cute.kernel
def dense_router_decode(
    hidden: cute.Pointer,
    weight: cute.Pointer,
    bias: cute.Pointer,
    logits: cute.Pointer,
    arrivals: cute.Pointer,
    out_weights: cute.Pointer,
    out_ids: cute.Pointer,
    hidden_stride: Int64,
    weight_stride: Int64,
    tokens: Int32,
    hidden_size: Int32,
    experts: Int32,
    top_k: Int32,
    renormalize: Int32,
    scale: Float32,
    epsilon: Float32,
    token_tiles: cutlass.Constexpr,
) -> None:
    # Used by the product for the warps' sums, then by the last block for the warps' rows of scores.
    shared_floats = WARPS * max(token_tiles * TILE_TOKENS * TILE_EXPERTS, MAX_EXPERTS)
    shared = cute.arch.alloc_smem(Float32, shared_floats, CHUNK_BYTES)

    accumulators = multiply_slices_of_warp(
        hidden, weight, hidden_stride, weight_stride, tokens, hidden_size, experts, token_tiles
    )
    store_block_logits(accumulators, shared, logits, tokens, experts, token_tiles)
    if is_last_block(arrivals, shared):
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        scores = cute.make_tensor(shared + warp * MAX_EXPERTS, cute.make_layout(MAX_EXPERTS))
        bias_values = load_bias(bias, experts)
        for token in cutlass.range(warp, tokens, WARPS, unroll=1):
            load_scores(logits, scores, token, tokens, experts)
            cute.arch.sync_warp()
            select_experts(
                scores, bias_values, out_weights, out_ids, token, experts, top_k, renormalize, scale, epsilon
            )
            cute.arch.sync_warp()


ARGUMENTS = {
    "hidden": "const bf16*",
    "weight": "const bf16*",
    "bias": "const float32*",
    "logits": "float32*",
    "arrivals": "uint32*",
    "out_weights": "float32*",
    "out_ids": "int32*",
    "hidden_stride": "int64",
    "weight_stride": "int64",
    "tokens": "int32",
    "hidden_size": "int32",
    "experts": "int32",
    "top_k": "int32",
    "renormalize": "int32",
    "scale": "float32",
    "epsilon": "float32",
}

KERNELS = [
    CuteKernel(
        function=dense_router_decode,
        name=f"dense_router_decode_tokens{token_tiles * TILE_TOKENS}",
        arguments=ARGUMENTS,
        constants={"token_tiles": token_tiles},
        threads=THREADS,
        dynamic_shared=0,
    )
    for token_tiles in SLICES_IN_FLIGHT
]
