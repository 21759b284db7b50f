"""The top_k experts of a token, chosen by one warp."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32

from aot.router.device.activation import sqrt_softplus
from aot.router.device.arrays import LANES, make_registers, shared_array

# Selection keys: unsigned integers in the order of the float32 scores. The key of -inf is 0x007FFFFF, so that the small
# values are free for what ranks below it.
KEY_NONE = 0
KEY_NAN = 1
SIGN_BIT = 0x80000000
NO_EXPERT = 0xFFFFFFFF

# Up to this many experts are chosen by `select_few`.
FEW = 8

# Weights, as in csrc/router/weigh_slot.cuh: a sum of scores below LEAST_SUM has lost digits, or all of them, to scores
# below the normal range of float32. Each score of such a sum is of a logit below TINY, where it is e^(logit / 2).
LEAST_SUM = 2.0**-64
TINY = -88.0
INFINITY = float("inf")


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
def kept_score(logit: Float32, score: Float32) -> Float32:
    """What a block keeps of an expert: the score; below TINY the logit, which is negative as no score is."""
    kept = score
    if logit < TINY:
        kept = logit
    return kept


@cute.jit
def limit_share(kept: Float32) -> Float32:
    """A lane's share of its token's weight where scores do not tell it; csrc/router/weigh_slot.cuh does the same.

    Either some score is infinite, and these share the whole; or all are kept as logits.
    """
    highest = kept
    if kept != kept:
        highest = Float32(-INFINITY)
    for power in cutlass.range_constexpr(5):
        highest = cutlass.max(highest, cute.arch.shuffle_sync_bfly(highest, 1 << power))
    share = Float32(0.0)
    if kept > -INFINITY:
        share = Float32(1.0)
        if kept != highest:
            share = cute.math.exp((kept - highest) * 0.5)
    total = share
    for power in cutlass.range_constexpr(5):
        total += cute.arch.shuffle_sync_bfly(total, 1 << power)
    if total != 0.0:
        share = share / total
    return share


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
    wide_ids: Int32,
    scale: Float32,
    epsilon: Float32,
) -> None:
    """Chooses the experts of one token and stores their ids and weights. By one warp; lane i stores the i-th choice.

    wide_ids: whether ids are int64: of each the low half, then a high half of 0, for every token has its experts.
    """
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

    kept = Float32(-INFINITY)
    weight = Float32(0.0)
    if lane < top_k:
        kept = Float32(scores[chosen])
        if kept >= 0.0:
            weight = kept
        if kept < 0.0:
            weight = sqrt_softplus(kept)
    if renormalize != 0:
        total = weight
        for power in cutlass.range_constexpr(5):
            total += cute.arch.shuffle_sync_bfly(total, 1 << power)
        if (total == INFINITY) | ((total < LEAST_SUM) & (epsilon == 0.0)):
            weight = limit_share(kept)
        else:
            # A division of 0 takes the slow path, as denormals do; lanes without a choice skip it.
            if lane < top_k:
                weight = weight / (total + epsilon)
    if lane < top_k:
        if scale == 0.0:  # without `renormalize` a weight may be infinite
            weight = Float32(0.0)
        output = Int64(token) * top_k + lane
        (out_weights + output).store(weight * scale)
        if wide_ids != 0:
            (out_ids + 2 * output).store(Int32(chosen))
            (out_ids + 2 * output + 1).store(Int32(0))
        else:
            (out_ids + output).store(Int32(chosen))
