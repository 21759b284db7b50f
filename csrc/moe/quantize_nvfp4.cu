#include "moe/nvfp4_block.cuh"

namespace dsv4 {

struct GlobalScales {
  const float* values;
  const int32_t* expert_ids;  // null: one scale for all rows, or one for each
  uint32_t count;
  bool reciprocal;

  __device__ bool fetch(uint32_t row, float* value) const {
    const uint32_t index = expert_ids ? static_cast<uint32_t>(expert_ids[row]) : count == 1 ? 0 : row;
    if (index >= count) return false;
    *value = values[index];
    return true;
  }
};

template <typename T, int Unit, bool kSwiglu>
__global__ void __launch_bounds__(kQuantizeThreads)
    quantize_nvfp4_kernel(Source source, Target target, Nvfp4Rule rule, GlobalScales scales) {
  await_previous_grid();
  quantize_nvfp4_blocks<Unit, kSwiglu, T>(source, target, rule, [&](uint32_t row, float* value) {
    return scales.fetch(row, value);
  }, [&](float value) { return global_scale_of(value, scales.reciprocal); });
}

}  // namespace dsv4

extern "C" dsv4_status dsv4_quantize_nvfp4(const dsv4_quantize_nvfp4_args* given, dsv4_stream stream) {
  using namespace dsv4;
  Check check("quantize_nvfp4");
  const dsv4_quantize_nvfp4_args args = check.read(given);
  check_source(check, args, kNvfp4Block);
  check_global_scale(check, args, extent(args.x, 0));
  check.flag("ties_to_even", args.ties_to_even);
  check.number("scale_floor", args.scale_floor, 0.0f);
  check_target(check, args, kNvfp4Block, 2, kFp4Dtypes, kE4m3Dtypes);
  LaunchTarget launch_target;
  if (dsv4_status status = check.open(stream, &launch_target)) return status;

  const Target target = make_target(args, kNvfp4Block);
  if (target.rows == 0 || target.columns == 0) return DSV4_OK;
  const GlobalScales scales = {static_cast<const float*>(args.global_scale.data),
                               static_cast<const int32_t*>(args.expert_ids.data),
                               static_cast<uint32_t>(elements(args.global_scale)), args.reciprocal_global_scale != 0};
  return with_source(args, [&](auto type, auto unit, auto swiglu) {
    return launch<quantize_nvfp4_kernel<decltype(type), decltype(unit)::value, decltype(swiglu)::value>>(
        launch_target, {quantize_blocks(launch_target, target), kQuantizeThreads}, make_source(args), target,
        Nvfp4Rule{args.scale_floor, args.ties_to_even != 0}, scales);
  });
}
