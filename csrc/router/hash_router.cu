#include "core/dtype.h"
#include "core/launch.h"
#include "router/hash_lookup.cuh"

namespace dsv4 {

constexpr int kThreads = 256;

// One thread per slot (token, j), so accesses are coalesced, and a token's k threads share the load of its id. A block
// takes whole tokens, so that the division stays in 32 bits for any batch size.
template <typename Entry>
__global__ void hash_router_kernel(StridedIndices token_ids, const Entry* __restrict__ table,
                                   const bool* __restrict__ padding_mask, float* __restrict__ weights, OutIndices ids,
                                   int64_t tokens, int64_t vocab, int top_k, int tokens_per_block) {
  await_previous_grid();
  const int token_in_block = threadIdx.x / top_k;
  const int slot = threadIdx.x % top_k;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * tokens_per_block + token_in_block;
  if (token_in_block >= tokens_per_block || token >= tokens) return;
  const int64_t row = lookup_row(token_ids, padding_mask, token, vocab);
  const int64_t expert = row >= 0 ? static_cast<int64_t>(table[row * top_k + slot]) : kNoExpert;
  const bool valid = expert >= 0 && expert <= INT32_MAX;
  const int64_t out = token * top_k + slot;
  ids.store(out, valid ? static_cast<int32_t>(expert) : kNoExpert);
  weights[out] = valid ? 1.0f / static_cast<float>(top_k) : 0.0f;
}

}  // namespace dsv4

extern "C" dsv4_status dsv4_hash_router(const dsv4_hash_router_args* given, dsv4_stream stream) {
  using namespace dsv4;
  Check check("hash_router");
  const dsv4_hash_router_args args = check.read(given);
  const int top_k = static_cast<int>(check_hash_lookup(check, args));
  LaunchTarget target;
  if (dsv4_status status = check.open(stream, &target)) return status;

  const int64_t tokens = extent(args.token_ids, 0);
  if (tokens == 0) return DSV4_OK;
  const int tokens_per_block = kThreads / top_k;
  return with_index_type(args.hash_lut.dtype, [&](auto entry) {
    using Entry = decltype(entry);
    return launch<hash_router_kernel<Entry>>(
        target, {blocks_for(tokens, tokens_per_block), kThreads}, strided_indices_of(args.token_ids),
        static_cast<const Entry*>(args.hash_lut.data), static_cast<const bool*>(args.padding_mask.data),
        static_cast<float*>(args.out_weights.data), out_indices_of(args.out_ids), tokens, extent(args.hash_lut, 0),
        top_k, tokens_per_block);
  });
}
