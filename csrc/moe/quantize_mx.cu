// The MX formats: groups of 32 codes that share an E8M0 scale. Two neighbouring lanes make a group.
#include "device/e8m0.cuh"
#include "device/fp4.cuh"
#include "device/fp8.cuh"
#include "device/reduce.cuh"
#include "moe/quantize_target.cuh"

namespace dsv4 {

constexpr int kMxGroup = 32;
constexpr int kMxLanes = kMxGroup / kChunk;

struct MxRule {
  float amax_floor;
  bool round_scale_up;
  bool ties_to_even;
};

template <bool kFp4>
__device__ inline uint32_t mx_scale(float amax, const MxRule& rule) {
  return rule.round_scale_up ? ceil_e8m0_of_amax(amax, rule.amax_floor, kFp4 ? kLargestE2m1 : kLargestE4m3)
                             : floor_e8m0(max_or_nan(amax, rule.amax_floor), kFp4 ? 2 : 8);
}

// Writes the codes of values * factor.
template <bool kFp4>
__device__ inline void store_mx_codes(const Target& target, const MxRule& rule, uint32_t row, uint32_t column,
                                      float factor, const float (&values)[kChunk]) {
  float scaled[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; ++i) scaled[i] = values[i] * factor;
  if (kFp4) {
    const auto& halves = reinterpret_cast<const float (&)[2][8]>(scaled);
    const uint2 codes = rule.ties_to_even ? uint2{encode_e2m1x8(halves[0]), encode_e2m1x8(halves[1])}
                                          : uint2{encode_e2m1x8<Ties::kTowardZero>(halves[0]),
                                                  encode_e2m1x8<Ties::kTowardZero>(halves[1])};
    *target.data_at<uint2>(row, column, 2) = codes;
  } else {
    const auto four = [&](int i) { return encode_e4m3x4(scaled[i], scaled[i + 1], scaled[i + 2], scaled[i + 3]); };
    *target.data_at<uint4>(row, column, 1) = {four(0), four(4), four(8), four(12)};
  }
}

template <typename T, int Unit, bool kSwiglu, bool kFp4>
__global__ void __launch_bounds__(kQuantizeThreads) quantize_mx_kernel(Source source, Target target, MxRule rule) {
  await_previous_grid();
  for_each_item(target, [&](uint32_t row, uint32_t column, Item item) {
    float values[kChunk] = {};
    if (item == Item::kChunk) load_chunk<Unit, kSwiglu, T>(source, row, column, values);
    float amax = largest_magnitude(values);
    amax = max_or_nan(amax, __shfl_xor_sync(kFullWarp, amax, kMxLanes / 2));
    if (item == Item::kNothing) return;
    const uint32_t scale = item == Item::kChunk ? mx_scale<kFp4>(amax, rule) : 0;
    if (item == Item::kChunk) store_mx_codes<kFp4>(target, rule, row, column, reciprocal_e8m0(scale), values);
    if (column % kMxGroup == 0) target.scale[target.scale_offset(row, column / kMxGroup)] = static_cast<uint8_t>(scale);
  });
}

}  // namespace dsv4

extern "C" dsv4_status dsv4_quantize_mx(const dsv4_quantize_mx_args* given, dsv4_stream stream) {
  using namespace dsv4;
  Check check("quantize_mx");
  const dsv4_quantize_mx_args args = check.read(given);
  check_source(check, args, kMxGroup);
  check.range("element_format", args.element_format, DSV4_ELEMENT_E4M3, DSV4_ELEMENT_E2M1);
  const bool fp4 = args.element_format == DSV4_ELEMENT_E2M1;
  check.number("amax_floor", args.amax_floor, 0.0f);
  check.flag("round_scale_up", args.round_scale_up);
  check.flag("ties_to_even", args.ties_to_even);
  check_target(check, args, kMxGroup, fp4 ? 2 : 1, fp4 ? kFp4Dtypes : kE4m3Dtypes, kE8m0Dtypes);
  LaunchTarget launch_target;
  if (dsv4_status status = check.open(stream, &launch_target)) return status;

  const Target target = make_target(args, kMxGroup);
  if (target.rows == 0 || target.columns == 0) return DSV4_OK;
  const MxRule rule = {args.amax_floor, args.round_scale_up != 0, args.ties_to_even != 0};
  return with_source(args, [&](auto type, auto unit, auto swiglu) {
    using T = decltype(type);
    constexpr int kUnit = decltype(unit)::value;
    constexpr bool kSwiglu = decltype(swiglu)::value;
    const Geometry geometry = {quantize_blocks(launch_target, target), kQuantizeThreads};
    return fp4 ? launch<quantize_mx_kernel<T, kUnit, kSwiglu, true>>(launch_target, geometry, make_source(args), target,
                                                                     rule)
               : launch<quantize_mx_kernel<T, kUnit, kSwiglu, false>>(launch_target, geometry, make_source(args),
                                                                      target, rule);
  });
}
