#include "device/reduce.cuh"
#include "mhc/streams.cuh"

namespace dsv4 {

constexpr int kMostThreads = kMaxHidden / kChunk;

// A block a token, a thread a chunk.
__global__ void __launch_bounds__(kMostThreads)
    hyper_connection_collapse_kernel(Streams streams, const float4* __restrict__ pre, NormWeight norm_weight,
                                     __nv_bfloat16* out, int hidden, float epsilon, float reciprocal_hidden,
                                     bool norm_unrounded) {
  await_previous_grid();
  __shared__ float squares_of_warp[kWarpLanes];
  const int64_t token = blockIdx.x;
  const int column = static_cast<int>(threadIdx.x) * kChunk;
  const bool has_chunk = column < hidden;
  float squares = 0.0f, weight[kChunk];
  uint4 u = {};
  if (has_chunk) {
    const float4 factors = pre ? __ldg(pre + token) : float4{0.25f, 0.25f, 0.25f, 0.25f};
    const StreamChunks chunks = load_chunks(streams, token, column);
    if (norm_weight.data) norm_weight.load(column, weight);
    u = collapse(chunks, factors, norm_unrounded, &squares);
  }
  uint4* const place = reinterpret_cast<uint4*>(out + token * hidden + column);
  if (!norm_weight.data) {
    if (has_chunk) *place = u;
    return;
  }
  squares = sum_over_group(squares, kWarpLanes);
  if (threadIdx.x % kWarpLanes == 0) squares_of_warp[threadIdx.x / kWarpLanes] = squares;
  __syncthreads();
  const unsigned lane = threadIdx.x % kWarpLanes;
  squares = sum_over_group(lane < blockDim.x / kWarpLanes ? squares_of_warp[lane] : 0.0f, kWarpLanes);
  if (has_chunk) *place = normalize(u, rsqrtf(fmaf(squares, reciprocal_hidden, epsilon)), weight);
}

}  // namespace dsv4

extern "C" dsv4_status dsv4_hyper_connection_collapse(const dsv4_hyper_connection_collapse_args* given,
                                                      dsv4_stream stream) {
  using namespace dsv4;
  Check check("hyper_connection_collapse");
  const dsv4_hyper_connection_collapse_args args = check.read(given);
  const int64_t tokens = extent(args.streams, 0), hidden = extent(args.streams, 2);
  check_streams(check, "streams", args.streams, kAny, kAny);
  check.range("streams rows (tokens)", tokens, 0, INT32_MAX);
  check.optional_tensor("pre", args.pre, one_of(DSV4_FLOAT32), {tokens, kStreams});
  if (present(args.pre)) check.aligned_rows("pre", args.pre, sizeof(float4));
  check.number("epsilon", args.epsilon, 0.0f);
  check_norm(check, args.norm_weight, args.norm_unrounded, hidden);
  check.tensor("out_hidden", args.out_hidden, one_of(DSV4_BFLOAT16), {tokens, hidden});
  check.aligned_rows("out_hidden", args.out_hidden, sizeof(uint4));
  LaunchTarget target;
  if (dsv4_status status = check.open(stream, &target)) return status;

  if (tokens == 0) return DSV4_OK;
  const uint32_t threads = blocks_for(hidden / kChunk, kWarpLanes) * kWarpLanes;
  return launch<hyper_connection_collapse_kernel>(
      target, {static_cast<uint32_t>(tokens), threads}, streams_of(args.streams),
      static_cast<const float4*>(args.pre.data), norm_weight_of(args.norm_weight),
      static_cast<__nv_bfloat16*>(args.out_hidden.data), static_cast<int>(hidden), args.epsilon,
      1.0f / static_cast<float>(hidden), args.norm_unrounded != 0);
}
