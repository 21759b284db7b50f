#include "mhc/streams.cuh"

namespace dsv4 {

constexpr int64_t kMostThreads = 256;

// A block has some of the chunks of one token. Each thread reads all four streams before it writes one, so the result
// may take their place.
__global__ void __launch_bounds__(kMostThreads)
    hyper_connection_post_kernel(Streams streams, UpdateInputs inputs, Streams out, int hidden) {
  await_previous_grid();
  const int64_t token = blockIdx.x;
  const int column = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x) * kChunk;
  if (column >= hidden) return;
  const StreamChunks old = load_chunks(streams, token, column);
  const uint4 x = *inputs.chunk_of_x(token, column);
  store_chunks(out, token, column, update(old, x, load_coefficients(inputs, token)));
}

}  // namespace dsv4

extern "C" dsv4_status dsv4_hyper_connection_post(const dsv4_hyper_connection_post_args* given, dsv4_stream stream) {
  using namespace dsv4;
  Check check("hyper_connection_post");
  const dsv4_hyper_connection_post_args args = check.read(given);
  const int64_t tokens = extent(args.x, 0), hidden = extent(args.x, 1);
  check_update(check, args.x, args.post, args.comb, tokens, hidden);
  check.range("x rows (tokens)", tokens, 0, INT32_MAX);
  check_streams(check, "streams", args.streams, tokens, hidden);
  check_streams(check, "out_streams", args.out_streams, tokens, hidden);
  check.in_place(args.out_streams, args.streams);
  LaunchTarget target;
  if (dsv4_status status = check.open(stream, &target)) return status;

  if (tokens == 0) return DSV4_OK;
  const int64_t chunks = hidden / kChunk;
  const uint32_t parts = blocks_for(chunks, kMostThreads);
  const uint32_t threads = blocks_for(blocks_for(chunks, parts), 32) * 32;
  return launch<hyper_connection_post_kernel>(target, {{static_cast<uint32_t>(tokens), parts}, threads},
                                              streams_of(args.streams), update_inputs_of(args.x, args.post, args.comb),
                                              streams_of(args.out_streams), static_cast<int>(hidden));
}
