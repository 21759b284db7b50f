// The four padded activations: squared ReLU or SwiGLU, to bfloat16 or to MXFP8. Their kernels are the specialisations
// of aot/moe/padded_activations.py.
#include <dsv4/moe.h>

#include <cmath>

#include "core/check.h"
#include "core/launch.h"
#include "device/swizzle.cuh"
#include "kernels.h"
#include "moe/padded_activations_policy.h"

namespace dsv4 {

constexpr int64_t kVector = 16;   // what the arguments of aligned kernels are multiples of: elements, and bytes
constexpr int64_t kMxGroup = 32;  // values that share a scale

// What the ops differ in.
struct PaddedActivation {
  const aot::PaddedActivationKernel *aligned, *any;
  int64_t PaddedActivationsTuning::* blocks_per_multiprocessor;

  constexpr bool gated() const { return any->constants[0].swiglu; }  // x has gate and up
  constexpr bool mxfp8() const { return any->constants[0].mxfp8; }
};

constexpr PaddedActivation kSquaredRelu = {&aot::padded_squared_relu_aligned, &aot::padded_squared_relu_any,
                                           &PaddedActivationsTuning::squared_relu};
constexpr PaddedActivation kSwiglu = {&aot::padded_swiglu_aligned, &aot::padded_swiglu_any,
                                      &PaddedActivationsTuning::swiglu};
constexpr PaddedActivation kSquaredReluMxfp8 = {&aot::squared_relu_and_quantize_mxfp8_aligned,
                                                &aot::squared_relu_and_quantize_mxfp8_any,
                                                &PaddedActivationsTuning::squared_relu_mxfp8};
constexpr PaddedActivation kSwigluMxfp8 = {&aot::swiglu_and_quantize_mxfp8_aligned, &aot::swiglu_and_quantize_mxfp8_any,
                                           &PaddedActivationsTuning::swiglu_mxfp8};

// The ops' arguments in one form.
struct PaddedArguments {
  dsv4_tensor x, permutation_map, n_used, out, out_scale;
  float limit;
};

static void check_padding(Check& check, int64_t rows, const dsv4_tensor& permutation_map, const dsv4_tensor& n_used) {
  check.tensor("permutation_map", permutation_map, one_of(DSV4_INT32), {rows});
  if (n_used.rank == 0)
    check.tensor("n_used", n_used, one_of(DSV4_INT32), {});
  else
    check.tensor("n_used", n_used, one_of(DSV4_INT32), {1});
}

// MXFP8 of [rows, columns]: data without gaps, and scales in the 32_4_4 layout, both on a multiple of 16 bytes.
static void check_mxfp8(Check& check, int64_t rows, int64_t columns, const dsv4_tensor& data,
                        const dsv4_tensor& scale) {
  if (check.status()) return;  // else the extents are in range, and their products too
  const int64_t words = swizzled_rows(rows) * swizzled_columns(columns / kMxGroup) / 4;
  check.require(words <= INT32_MAX / 2, "x", "at most 2^32 groups of 32 columns", 4 * words);
  check.tensor("out_data", data, one_of(DSV4_UINT8, DSV4_FLOAT8_E4M3FN), {rows, columns});
  check.tensor("out_scale", scale, one_of(DSV4_UINT8, DSV4_FLOAT8_E8M0FNU),
               {swizzled_rows(rows), swizzled_columns(columns / kMxGroup)});
  check.aligned_rows("out_data", data, kVector);
  check.require(reinterpret_cast<uintptr_t>(scale.data) % kVector == 0, "out_scale", "data on a multiple of 16 bytes",
                reinterpret_cast<uintptr_t>(scale.data) % kVector);
}

// Whether a kernel may read and write 16 bytes at a time.
static bool is_aligned(const dsv4_tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.data) % kVector == 0 && tensor.stride[0] % kVector == 0 &&
         tensor.shape[1] % kVector == 0;
}

static dsv4_status run(Check& check, const PaddedArguments& args, const PaddedActivation& op, dsv4_stream stream) {
  const int halves = op.gated() ? 2 : 1;
  const int64_t rows = extent(args.x, 0);
  const int64_t columns = extent(args.x, 1) / halves;
  check.tensor("x", args.x, one_of(DSV4_BFLOAT16), {kAny, kAny}, Layout::kStridedRows);
  check.multiple(op.gated() ? "x columns (gate, up)" : "x columns", extent(args.x, 1),
                 halves * (op.mxfp8() ? kMxGroup : 1));
  // Kernels count rows in 32 bits, and look as many rows ahead as the grid has in it.
  check.range("x rows", rows, 0, INT32_MAX - (1 << 21));
  check.range("x columns", columns, 0, INT32_MAX / 2);
  check_padding(check, rows, args.permutation_map, args.n_used);
  if (op.gated()) check.number("limit", args.limit, 0.0f);
  if (op.mxfp8()) {
    check_mxfp8(check, rows, columns, args.out, args.out_scale);
  } else {
    check.tensor("out", args.out, one_of(DSV4_BFLOAT16), {rows, columns}, Layout::kStridedRows);
    if (!op.gated()) check.in_place(args.out, args.x);
  }
  LaunchTarget target;
  if (dsv4_status status = check.open(stream, &target)) return status;

  if (rows == 0 || columns == 0) return DSV4_OK;
  const auto& kernel = *(is_aligned(args.x) && (op.mxfp8() || is_aligned(args.out)) ? op.aligned : op.any);
  const dim3 grid = padded_grid(*target.device, op.blocks_per_multiprocessor, op.mxfp8() ? swizzled_rows(rows) : rows,
                                columns, kernel.on(*target.device));
  return kernel(target, grid, args.x.data, args.permutation_map.data, args.n_used.data, args.out.data,
                args.out_scale.data, args.limit > 0.0f ? args.limit : INFINITY, args.x.stride[0], args.out.stride[0],
                static_cast<int32_t>(columns), static_cast<int32_t>(rows));
}

}  // namespace dsv4

extern "C" dsv4_status dsv4_padded_squared_relu(const dsv4_padded_squared_relu_args* given, dsv4_stream stream) {
  using namespace dsv4;
  Check check("padded_squared_relu");
  const auto args = check.read(given);
  return run(check, {args.x, args.permutation_map, args.n_used, args.out, {}, 0.0f}, kSquaredRelu, stream);
}

extern "C" dsv4_status dsv4_padded_swiglu(const dsv4_padded_swiglu_args* given, dsv4_stream stream) {
  using namespace dsv4;
  Check check("padded_swiglu");
  const auto args = check.read(given);
  return run(check, {args.x, args.permutation_map, args.n_used, args.out, {}, args.limit}, kSwiglu, stream);
}

extern "C" dsv4_status dsv4_squared_relu_and_quantize_mxfp8(const dsv4_squared_relu_and_quantize_mxfp8_args* given,
                                                            dsv4_stream stream) {
  using namespace dsv4;
  Check check("squared_relu_and_quantize_mxfp8");
  const auto args = check.read(given);
  return run(check, {args.x, args.permutation_map, args.n_used, args.out_data, args.out_scale, 0.0f}, kSquaredReluMxfp8,
             stream);
}

extern "C" dsv4_status dsv4_swiglu_and_quantize_mxfp8(const dsv4_swiglu_and_quantize_mxfp8_args* given,
                                                      dsv4_stream stream) {
  using namespace dsv4;
  Check check("swiglu_and_quantize_mxfp8");
  const auto args = check.read(given);
  return run(check, {args.x, args.permutation_map, args.n_used, args.out_data, args.out_scale, args.limit},
             kSwigluMxfp8, stream);
}
