// NVFP4 with the global scale taken from the values, on the device. Of a whole tensor or of experts: one kernel finds
// the largest magnitudes, a second one reads them, and its last block leaves the workspace zeroed. Of tokens: one
// kernel, one block per row. Maxima do not depend on the order in which they are taken, so the bits are always the same. A
// block of values with a NaN counts for no global scale: it alone is lost.
#include "moe/nvfp4_block.cuh"
#include "moe/row_amax.cuh"

namespace dsv4 {

// Global scales are then normal numbers, and so are their reciprocals.
constexpr float kLeastAmaxFloor = kNvfp4Range * 0x1p-126f;

struct AmaxRule {
  float floor;
  bool reciprocal;

  // The global scale for a largest magnitude: infinity counts as the largest number.
  __device__ float operator()(float amax) const {
    const float size = fminf(fmaxf(amax, floor), 3.40282347e+38f);
    return reciprocal ? __fdiv_rn(kNvfp4Range, size) : __fdiv_rn(size, kNvfp4Range);
  }
};

// In the workspace: the bits of the largest magnitudes, then the number of blocks that have read them.
struct Amaxes {
  uint32_t* bits;
  const int32_t* expert_ids;  // null: one for all rows
  uint32_t count;

  __device__ uint32_t index(uint32_t row) const { return expert_ids ? static_cast<uint32_t>(expert_ids[row]) : 0; }
  __device__ uint32_t* readers() const { return bits + count; }
};

template <typename T, int Unit, bool kSwiglu>
__global__ void __launch_bounds__(kQuantizeThreads) amax_kernel(Source source, Target target, Amaxes amaxes) {
  await_previous_grid();
  float of_all = 0.0f;
  for_each_item(target, [&](uint32_t row, uint32_t column, Item item) {
    float values[kChunk] = {};
    uint32_t index = 0;
    if (item == Item::kChunk) {
      index = amaxes.index(row);
      if (index < amaxes.count) load_chunk<Unit, kSwiglu, T>(source, row, column, values);
    }
    const float amax = fmaxf(largest_magnitude(values), 0.0f);  // of a block with a NaN: 0
    of_all = fmaxf(of_all, amax);
    if (!amaxes.expert_ids) return;
    const uint32_t first = __shfl_sync(kFullWarp, index, 0);
    if (__all_sync(kFullWarp, index == first)) {
      const uint32_t bits = warp_amax_bits(amax);
      if (threadIdx.x % kWarpLanes == 0 && bits != 0) atomicMax(&amaxes.bits[index], bits);
    } else if (amax > 0.0f) {
      atomicMax(&amaxes.bits[index], __float_as_uint(amax));
    }
  });
  if (amaxes.expert_ids) return;
  of_all = block_amax(of_all);
  if (threadIdx.x == 0) atomicMax(amaxes.bits, __float_as_uint(of_all));
}

template <typename T, int Unit, bool kSwiglu>
__global__ void __launch_bounds__(kQuantizeThreads)
    quantize_by_amax_kernel(Source source, Target target, Nvfp4Rule rule, AmaxRule amax_rule, Amaxes amaxes,
                            float* global_scale) {
  await_previous_grid();
  const auto scale_at = [&](uint32_t index) { return amax_rule(__uint_as_float(amaxes.bits[index])); };
  if (blockIdx.x == 0)
    for (uint32_t i = threadIdx.x; i < amaxes.count; i += kQuantizeThreads) global_scale[i] = scale_at(i);
  if (amaxes.expert_ids) {
    quantize_nvfp4_blocks<Unit, kSwiglu, T>(source, target, rule, [&](uint32_t row, float* amax) {
      const uint32_t index = amaxes.index(row);
      if (index >= amaxes.count) return false;
      *amax = __uint_as_float(amaxes.bits[index]);
      return true;
    }, [&](float amax) { return global_scale_of(amax_rule(amax), amax_rule.reciprocal); });
  } else {
    const GlobalScale of_all = global_scale_of(scale_at(0), amax_rule.reciprocal);
    quantize_nvfp4_blocks<Unit, kSwiglu, T>(source, target, rule, [](uint32_t, float*) { return true; },
                                            [&](float) { return of_all; });
  }

  // The last block to have read the magnitudes clears them, and the count.
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(amaxes.readers(), 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (last)
    for (uint32_t i = threadIdx.x; i <= amaxes.count; i += kQuantizeThreads) amaxes.bits[i] = 0;
}

// A block a row.
template <typename T, int Unit, bool kSwiglu>
__global__ void __launch_bounds__(kQuantizeThreads)
    quantize_rows_kernel(Source source, Target target, Nvfp4Rule rule, AmaxRule amax_rule, float* global_scale) {
  await_previous_grid();
  const uint32_t row = blockIdx.x, used = target.used_rows();
  if (row >= target.written_rows(used)) return;
  GlobalScale global = {};
  if (row < used)
    by_row_amax<NanChunk::kPassedOver, T, Unit, kSwiglu>(source, row, target.columns, [&](float amax) {
      const float value = amax_rule(amax);
      global = global_scale_of(value, amax_rule.reciprocal);
      if (threadIdx.x == 0) global_scale[row] = value;
    }, [&](uint32_t column, const float (&values)[kChunk], float amax) {
      store_nvfp4_block(target, rule, global, row, column, values, amax);
    });
  const uint32_t padding = row < used ? target.scales : 0;  // where it begins, of swizzled scales
  for (uint32_t item = padding + threadIdx.x; item < target.row_items.value; item += blockDim.x)
    target.scale[target.scale_offset(row, item)] = 0;
}

}  // namespace dsv4

extern "C" size_t dsv4_quantize_nvfp4_gpu_fused_workspace_size(int64_t experts) {
  return sizeof(uint32_t) * (static_cast<size_t>(experts < 1 ? 1 : experts) + 1);
}

extern "C" dsv4_status dsv4_quantize_nvfp4_gpu_fused(const dsv4_quantize_nvfp4_gpu_fused_args* given,
                                                     dsv4_stream stream) {
  using namespace dsv4;
  Check check("quantize_nvfp4_gpu_fused");
  const dsv4_quantize_nvfp4_gpu_fused_args args = check.read(given);
  check_source(check, args, kNvfp4Block);
  const int64_t rows = extent(args.x, 0);
  check.optional_tensor("expert_ids", args.expert_ids, one_of(DSV4_INT32), {rows});
  check.range("experts", args.experts, present(args.expert_ids) ? 1 : 0, present(args.expert_ids) ? INT32_MAX - 1 : 0);
  check.range("per_token", args.per_token, 0, present(args.expert_ids) ? 0 : 1);
  check.flag("reciprocal_global_scale", args.reciprocal_global_scale);
  check.number("amax_floor", args.amax_floor, kLeastAmaxFloor);
  check.flag("ties_to_even", args.ties_to_even);
  check.number("scale_floor", args.scale_floor, 0.0f);
  const int64_t count = args.per_token ? rows : std::max<int64_t>(args.experts, 1);
  const auto workspace_bytes = static_cast<int64_t>(dsv4_quantize_nvfp4_gpu_fused_workspace_size(args.experts));
  check.tensor("workspace", args.workspace, one_of(DSV4_UINT8), {kAny});
  check.range("workspace bytes", extent(args.workspace, 0), workspace_bytes, INT64_MAX);
  check.aligned_rows("workspace", args.workspace, sizeof(uint32_t));
  check_target(check, args, kNvfp4Block, 2, kFp4Dtypes, kE4m3Dtypes);
  check.tensor("out_global_scale", args.out_global_scale, one_of(DSV4_FLOAT32), {count});
  LaunchTarget launch_target;
  if (dsv4_status status = check.open(stream, &launch_target)) return status;

  if (count == 0) return DSV4_OK;
  const Source source = make_source(args);
  const Target target = make_target(args, kNvfp4Block);
  const Nvfp4Rule rule = {args.scale_floor, args.ties_to_even != 0};
  const AmaxRule amax_rule = {args.amax_floor, args.reciprocal_global_scale != 0};
  const Amaxes amaxes = {static_cast<uint32_t*>(args.workspace.data), static_cast<const int32_t*>(args.expert_ids.data),
                         static_cast<uint32_t>(count)};
  auto* const global_scale = static_cast<float*>(args.out_global_scale.data);
  return with_source(args, [&](auto type, auto unit, auto swiglu) {
    using T = decltype(type);
    constexpr int kUnit = decltype(unit)::value;
    constexpr bool kSwiglu = decltype(swiglu)::value;
    const bool one_row = rows == 1 && !present(args.expert_ids) && !present(args.n_used);  // the same thing then
    if (args.per_token || one_row) {
      const uint32_t threads = threads_for_row(std::max(target.row_items.value, 1u));
      const auto written = static_cast<uint32_t>(target.swizzle ? swizzled_rows(rows) : rows);
      return launch<quantize_rows_kernel<T, kUnit, kSwiglu>>(launch_target, {written, threads}, source, target, rule,
                                                             amax_rule, global_scale);
    }
    const Geometry geometry = {quantize_blocks(launch_target, target), kQuantizeThreads};
    if (dsv4_status status = launch<amax_kernel<T, kUnit, kSwiglu>>(launch_target, geometry, source, target, amaxes))
      return status;
    return launch<quantize_by_amax_kernel<T, kUnit, kSwiglu>>(launch_target, geometry, source, target, rule, amax_rule,
                                                              amaxes, global_scale);
  });
}
