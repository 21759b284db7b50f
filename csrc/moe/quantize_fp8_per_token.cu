// FP8 E4M3 with a float32 scale for each row: one block per row.
#include "device/fp8.cuh"
#include "moe/row_amax.cuh"

namespace dsv4 {

template <typename T, int Unit>
__global__ void __launch_bounds__(kQuantizeThreads)
    quantize_fp8_per_token_kernel(Source source, Target target, float scale_floor, bool divide, float* scales) {
  await_previous_grid();
  const uint32_t row = blockIdx.x;
  float scale = 0.0f, factor = 0.0f;
  by_row_amax<NanChunk::kCounts, T, Unit, false>(source, row, target.columns, [&](float amax) {
    scale = max_or_nan(__fdiv_rn(amax, kLargestE4m3), scale_floor);
    factor = scale == 0.0f ? 0.0f : __frcp_rn(scale);
    divide |= factor == INFINITY;  // of a scale below 2^-128
    if (threadIdx.x == 0) scales[row] = scale;
  }, [&](uint32_t column, const float (&values)[kChunk], float /* amax */) {
    float scaled[kChunk];
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      scaled[i] = divide && scale != 0.0f ? __fdiv_rn(values[i], scale) : values[i] * factor;
    const auto four = [&](int i) { return encode_e4m3x4(scaled[i], scaled[i + 1], scaled[i + 2], scaled[i + 3]); };
    *target.data_at<uint4>(row, column, 1) = {four(0), four(4), four(8), four(12)};
  });
}

}  // namespace dsv4

extern "C" dsv4_status dsv4_quantize_fp8_per_token(const dsv4_quantize_fp8_per_token_args* given, dsv4_stream stream) {
  using namespace dsv4;
  Check check("quantize_fp8_per_token");
  const dsv4_quantize_fp8_per_token_args args = check.read(given);
  const int64_t rows = extent(args.x, 0), columns = extent(args.x, 1);
  check.tensor("x", args.x, one_of(DSV4_BFLOAT16, DSV4_FLOAT16, DSV4_FLOAT32), {kAny, kAny}, Layout::kStridedRows);
  check.range("x rows", rows, 0, INT32_MAX);
  check.range("x columns", columns, 0, INT32_MAX - kChunk * kQuantizeThreads);
  check.multiple("x columns", columns, kChunk);
  check.number("scale_floor", args.scale_floor, 0.0f);
  check.flag("divide", args.divide);
  check.tensor("out", args.out, kE4m3Dtypes, {rows, columns});
  check.aligned_rows("out", args.out, kChunk);
  check.tensor("out_scale", args.out_scale, one_of(DSV4_FLOAT32), {rows});
  LaunchTarget launch_target;
  if (dsv4_status status = check.open(stream, &launch_target)) return status;

  if (rows == 0) return DSV4_OK;
  const auto items = static_cast<uint32_t>(std::max<int64_t>(columns / kChunk, 1));
  Source source = {};
  source.x = args.x.data;
  source.row_stride = args.x.stride[0];
  source.aligned = has_aligned_rows(args.x, 16);
  Target target = {};
  target.data = static_cast<uint8_t*>(args.out.data);
  target.rows = static_cast<uint32_t>(rows);
  target.columns = static_cast<uint32_t>(columns);
  const uint32_t threads = threads_for_row(items);
  const Geometry geometry = {target.rows, threads};
  const auto run = [&](auto type, auto unit) {
    return launch<quantize_fp8_per_token_kernel<decltype(type), decltype(unit)::value>>(
        launch_target, geometry, source, target, args.scale_floor, args.divide != 0,
        static_cast<float*>(args.out_scale.data));
  };
  switch (args.x.dtype) {
    case DSV4_FLOAT32: return run(float{}, std::integral_constant<int, 4>{});
    case DSV4_FLOAT16: return run(__half{}, std::integral_constant<int, 8>{});
    default: return run(__nv_bfloat16{}, std::integral_constant<int, 8>{});
  }
}
