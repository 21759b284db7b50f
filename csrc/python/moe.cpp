#include <dsv4/moe.h>

#include "tensor.h"

namespace dsv4::python {

void bind_moe(py::module_& module) {
  module.def("padded_squared_relu",
             [](const Tensor& x, const Tensor& permutation_map, const Tensor& n_used, const Tensor& out) {
    dsv4_padded_squared_relu_args args = {};
    args.x = x.view;
    args.permutation_map = permutation_map.view;
    args.n_used = n_used.view;
    args.out = out.view;
    return call(dsv4_padded_squared_relu, args, x);
  });
  module.def("padded_swiglu",
             [](const Tensor& x, const Tensor& permutation_map, const Tensor& n_used, float limit, const Tensor& out) {
    dsv4_padded_swiglu_args args = {};
    args.x = x.view;
    args.permutation_map = permutation_map.view;
    args.n_used = n_used.view;
    args.limit = limit;
    args.out = out.view;
    return call(dsv4_padded_swiglu, args, x);
  });
  module.def("squared_relu_and_quantize_mxfp8", [](const Tensor& x, const Tensor& permutation_map, const Tensor& n_used,
                                                   const Tensor& out_data, const Tensor& out_scale) {
    dsv4_squared_relu_and_quantize_mxfp8_args args = {};
    args.x = x.view;
    args.permutation_map = permutation_map.view;
    args.n_used = n_used.view;
    args.out_data = out_data.view;
    args.out_scale = out_scale.view;
    return call(dsv4_squared_relu_and_quantize_mxfp8, args, x);
  });
  module.def("swiglu_and_quantize_mxfp8", [](const Tensor& x, const Tensor& permutation_map, const Tensor& n_used,
                                             float limit, const Tensor& out_data, const Tensor& out_scale) {
    dsv4_swiglu_and_quantize_mxfp8_args args = {};
    args.x = x.view;
    args.permutation_map = permutation_map.view;
    args.n_used = n_used.view;
    args.limit = limit;
    args.out_data = out_data.view;
    args.out_scale = out_scale.view;
    return call(dsv4_swiglu_and_quantize_mxfp8, args, x);
  });
  module.def("moe_sort", [](const Tensor& topk_ids, int32_t local_experts, int32_t tile_size, int32_t experts_start_idx,
                            const Tensor& out_tile_to_expert, const Tensor& out_tile_rows,
                            const Tensor& out_row_to_slot, const Tensor& out_slot_to_row, const Tensor& out_counts) {
    dsv4_moe_sort_args args = {};
    args.topk_ids = topk_ids.view;
    args.out_tile_to_expert = out_tile_to_expert.view;
    args.out_tile_rows = out_tile_rows.view;
    args.out_row_to_slot = out_row_to_slot.view;
    args.out_slot_to_row = out_slot_to_row.view;
    args.out_counts = out_counts.view;
    args.local_experts = local_experts;
    args.tile_size = tile_size;
    args.experts_start_idx = experts_start_idx;
    return call(dsv4_moe_sort, args, topk_ids);
  });
  module.def("moe_sort_max_tiles", &dsv4_moe_sort_max_tiles);
  module.def("moe_grouped_gemm",
             [](const Tensor& x, const Tensor& weight, const Tensor& weight_scale, const Tensor& tile_to_expert,
                const Tensor& row_to_slot, const Tensor& x_scale, const Tensor& alpha, const Tensor& slot_weights,
                int32_t top_k, bool swiglu, float limit, const Tensor& out) {
    dsv4_moe_grouped_gemm_args args = {};
    args.x = x.view;
    args.weight = weight.view;
    args.weight_scale = weight_scale.view;
    args.tile_to_expert = tile_to_expert.view;
    args.row_to_slot = row_to_slot.view;
    args.x_scale = x_scale.view;
    args.alpha = alpha.view;
    args.slot_weights = slot_weights.view;
    args.out = out.view;
    args.top_k = top_k;
    args.swiglu = swiglu;
    args.limit = limit;
    return call(dsv4_moe_grouped_gemm, args, x);
  });
  module.def("moe_grouped_gemm_quantized",
             [](const Tensor& x, const Tensor& weight, const Tensor& weight_scale, const Tensor& tile_to_expert,
                const Tensor& row_to_slot, const Tensor& x_scale, const Tensor& global_scale, const Tensor& alpha,
                const Tensor& slot_weights, int32_t top_k, float limit, bool swizzle, const Tensor& out,
                const Tensor& out_scale) {
    dsv4_moe_grouped_gemm_quantized_args args = {};
    args.x = x.view;
    args.weight = weight.view;
    args.weight_scale = weight_scale.view;
    args.tile_to_expert = tile_to_expert.view;
    args.row_to_slot = row_to_slot.view;
    args.x_scale = x_scale.view;
    args.global_scale = global_scale.view;
    args.alpha = alpha.view;
    args.slot_weights = slot_weights.view;
    args.out = out.view;
    args.out_scale = out_scale.view;
    args.top_k = top_k;
    args.limit = limit;
    args.swizzle = swizzle;
    return call(dsv4_moe_grouped_gemm_quantized, args, x);
  });
  module.def("moe_finalize", [](const Tensor& rows, const Tensor& slot_to_row, const Tensor& weights,
                                const Tensor& shared, const Tensor& out) {
    dsv4_moe_finalize_args args = {};
    args.rows = rows.view;
    args.slot_to_row = slot_to_row.view;
    args.weights = weights.view;
    args.shared = shared.view;
    args.out = out.view;
    return call(dsv4_moe_finalize, args, rows);
  });
  module.def("blackwell_swizzle_32_4_4", [](const Tensor& scales, const Tensor& out) {
    dsv4_blackwell_swizzle_32_4_4_args args = {};
    args.scales = scales.view;
    args.out = out.view;
    return call(dsv4_blackwell_swizzle_32_4_4, args, scales);
  });
  module.def("blackwell_unswizzle_32_4_4", [](const Tensor& swizzled, int rows, int columns, const Tensor& out) {
    dsv4_blackwell_unswizzle_32_4_4_args args = {};
    args.swizzled = swizzled.view;
    args.rows = rows;
    args.columns = columns;
    args.out = out.view;
    return call(dsv4_blackwell_unswizzle_32_4_4, args, swizzled);
  });
  module.def("assemble_scales_2d_side", [](const Tensor& scales, const Tensor& expert_offsets,
                                           const Tensor& padded_offsets, int padded_rows, const Tensor& out) {
    dsv4_assemble_scales_2d_side_args args = {};
    args.scales = scales.view;
    args.expert_offsets = expert_offsets.view;
    args.padded_offsets = padded_offsets.view;
    args.padded_rows = padded_rows;
    args.out = out.view;
    return call(dsv4_assemble_scales_2d_side, args, scales);
  });

  module.def("quantize_nvfp4",
             [](const Tensor& x, const Tensor& global_scale, const Tensor& expert_ids, bool reciprocal_global_scale,
                int source, int granularity, float limit, bool round_to_bfloat16, bool ties_to_even, float scale_floor,
                bool swizzle, const Tensor& n_used, const Tensor& out, const Tensor& out_scale) {
    dsv4_quantize_nvfp4_args args = {};
    args.x = x.view;
    args.global_scale = global_scale.view;
    args.expert_ids = expert_ids.view;
    args.reciprocal_global_scale = reciprocal_global_scale;
    args.source = source;
    args.granularity = granularity;
    args.limit = limit;
    args.round_to_bfloat16 = round_to_bfloat16;
    args.ties_to_even = ties_to_even;
    args.scale_floor = scale_floor;
    args.swizzle = swizzle;
    args.n_used = n_used.view;
    args.out = out.view;
    args.out_scale = out_scale.view;
    return call(dsv4_quantize_nvfp4, args, x);
  });

  module.def("quantize_nvfp4_gpu_fused_workspace_size", &dsv4_quantize_nvfp4_gpu_fused_workspace_size);
  module.def("quantize_nvfp4_gpu_fused",
             [](const Tensor& x, const Tensor& expert_ids, int experts, bool per_token, bool reciprocal_global_scale,
                int source, int granularity, float limit, bool round_to_bfloat16, float amax_floor, bool ties_to_even,
                float scale_floor, bool swizzle, const Tensor& n_used, const Tensor& workspace, const Tensor& out,
                const Tensor& out_scale, const Tensor& out_global_scale) {
    dsv4_quantize_nvfp4_gpu_fused_args args = {};
    args.x = x.view;
    args.expert_ids = expert_ids.view;
    args.experts = experts;
    args.per_token = per_token;
    args.reciprocal_global_scale = reciprocal_global_scale;
    args.source = source;
    args.granularity = granularity;
    args.limit = limit;
    args.round_to_bfloat16 = round_to_bfloat16;
    args.amax_floor = amax_floor;
    args.ties_to_even = ties_to_even;
    args.scale_floor = scale_floor;
    args.swizzle = swizzle;
    args.n_used = n_used.view;
    args.workspace = workspace.view;
    args.out = out.view;
    args.out_scale = out_scale.view;
    args.out_global_scale = out_global_scale.view;
    return call(dsv4_quantize_nvfp4_gpu_fused, args, x);
  });

  module.def("quantize_mx", [](const Tensor& x, int element_format, int source, int granularity, float limit,
                               bool round_to_bfloat16, bool round_scale_up, float amax_floor, bool ties_to_even,
                               bool swizzle, const Tensor& n_used, const Tensor& out, const Tensor& out_scale) {
    dsv4_quantize_mx_args args = {};
    args.x = x.view;
    args.element_format = element_format;
    args.source = source;
    args.granularity = granularity;
    args.limit = limit;
    args.round_to_bfloat16 = round_to_bfloat16;
    args.round_scale_up = round_scale_up;
    args.amax_floor = amax_floor;
    args.ties_to_even = ties_to_even;
    args.swizzle = swizzle;
    args.n_used = n_used.view;
    args.out = out.view;
    args.out_scale = out_scale.view;
    return call(dsv4_quantize_mx, args, x);
  });

  module.def("quantize_fp8_per_token",
             [](const Tensor& x, float scale_floor, bool divide, const Tensor& out, const Tensor& out_scale) {
    dsv4_quantize_fp8_per_token_args args = {};
    args.x = x.view;
    args.scale_floor = scale_floor;
    args.divide = divide;
    args.out = out.view;
    args.out_scale = out_scale.view;
    return call(dsv4_quantize_fp8_per_token, args, x);
  });

  module.def("dequantize_blocks", [](const Tensor& data, const Tensor& scale, const Tensor& global_scale,
                                     const Tensor& expert_ids, bool reciprocal_global_scale, int element_format,
                                     int scale_format, bool swizzle, int /* dtype: out says it */, const Tensor& out) {
    dsv4_dequantize_blocks_args args = {};
    args.data = data.view;
    args.scale = scale.view;
    args.global_scale = global_scale.view;
    args.expert_ids = expert_ids.view;
    args.reciprocal_global_scale = reciprocal_global_scale;
    args.element_format = element_format;
    args.scale_format = scale_format;
    args.swizzle = swizzle;
    args.out = out.view;
    return call(dsv4_dequantize_blocks, args, data);
  });
}

}  // namespace dsv4::python
