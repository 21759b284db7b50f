#include <dsv4/moe.h>

#include "bind.h"

namespace dsv4::python {
namespace {

size_t quantize_workspace_size(const dsv4_quantize_nvfp4_gpu_fused_args& args) {
  return dsv4_quantize_nvfp4_gpu_fused_workspace_size(args.experts);
}

}  // namespace

void bind_moe(py::module_& module) {
  {
    using A = dsv4_padded_squared_relu_args;
    bind(module, "padded_squared_relu", dsv4_padded_squared_relu, &A::x, &A::permutation_map, &A::n_used, &A::out);
  }
  {
    using A = dsv4_padded_swiglu_args;
    bind(module, "padded_swiglu", dsv4_padded_swiglu, &A::x, &A::permutation_map, &A::n_used, &A::limit, &A::out);
  }
  {
    using A = dsv4_squared_relu_and_quantize_mxfp8_args;
    bind(module, "squared_relu_and_quantize_mxfp8", dsv4_squared_relu_and_quantize_mxfp8, &A::x, &A::permutation_map,
         &A::n_used, &A::out_data, &A::out_scale);
  }
  {
    using A = dsv4_swiglu_and_quantize_mxfp8_args;
    bind(module, "swiglu_and_quantize_mxfp8", dsv4_swiglu_and_quantize_mxfp8, &A::x, &A::permutation_map, &A::n_used,
         &A::limit, &A::out_data, &A::out_scale);
  }
  {
    using A = dsv4_moe_sort_args;
    bind(module, "moe_sort", dsv4_moe_sort, &A::topk_ids, &A::local_experts, &A::tile_size, &A::experts_start_idx,
         &A::expert_map, &A::out_tile_to_expert, &A::out_tile_rows, &A::out_row_to_slot, &A::out_slot_to_row,
         &A::out_counts);
  }
  {
    using A = dsv4_moe_tiles_from_counts_args;
    bind(module, "moe_tiles_from_counts", dsv4_moe_tiles_from_counts, &A::counts, &A::max_rows, &A::tile_size,
         &A::out_tile_to_expert, &A::out_row_to_slot);
  }
  {
    using A = dsv4_moe_dispatch_places_args;
    bind(module, "moe_dispatch_places", dsv4_moe_dispatch_places, &A::topk_ids, &A::rank_of_id, &A::dropped, &A::ranks,
         &A::capacity, flag(&A::one_per_rank), &A::out_slot_to_place, &A::out_place_to_slot);
  }
  {
    using A = dsv4_moe_dispatch_rows_args;
    bind(module, "moe_dispatch_rows", dsv4_moe_dispatch_rows, &A::x, &A::scale, &A::topk_weights, &A::topk_ids,
         &A::rank_of_id, &A::place_to_slot, &A::capacity, &A::routes, &A::out);
  }
  module.def("moe_sort_max_tiles", &dsv4_moe_sort_max_tiles);
  module.def("moe_tile_max_slots_per_expert", &dsv4_moe_tile_max_slots_per_expert);
  {
    using A = dsv4_moe_grouped_gemm_args;
    bind(module, "moe_grouped_gemm", dsv4_moe_grouped_gemm, &A::x, &A::weight, &A::weight_scale, &A::tile_to_expert,
         &A::row_to_slot, &A::x_scale, &A::alpha, &A::slot_weights, &A::top_k, flag(&A::swiglu), &A::limit, &A::out);
  }
  {
    using A = dsv4_moe_grouped_gemm_quantized_args;
    bind(module, "moe_grouped_gemm_quantized", dsv4_moe_grouped_gemm_quantized, &A::x, &A::weight, &A::weight_scale,
         &A::tile_to_expert, &A::row_to_slot, &A::x_scale, &A::global_scale, &A::alpha, &A::slot_weights, &A::top_k,
         &A::limit, flag(&A::swizzle), &A::out, &A::out_scale);
  }
  {
    using A = dsv4_moe_finalize_args;
    bind(module, "moe_finalize", dsv4_moe_finalize, &A::rows, &A::slot_to_row, &A::weights, &A::shared, &A::out);
  }
  {
    using A = dsv4_blackwell_swizzle_32_4_4_args;
    bind(module, "blackwell_swizzle_32_4_4", dsv4_blackwell_swizzle_32_4_4, &A::scales, &A::out);
  }
  {
    using A = dsv4_blackwell_unswizzle_32_4_4_args;
    bind(module, "blackwell_unswizzle_32_4_4", dsv4_blackwell_unswizzle_32_4_4, &A::swizzled, &A::rows, &A::columns,
         &A::out);
  }
  {
    using A = dsv4_assemble_scales_2d_side_args;
    bind(module, "assemble_scales_2d_side", dsv4_assemble_scales_2d_side, &A::scales, &A::expert_offsets,
         &A::padded_offsets, &A::padded_rows, &A::out);
  }
  {
    using A = dsv4_quantize_nvfp4_args;
    bind(module, "quantize_nvfp4", dsv4_quantize_nvfp4, &A::x, &A::global_scale, &A::expert_ids,
         flag(&A::reciprocal_global_scale), &A::source, &A::granularity, &A::limit, flag(&A::round_to_bfloat16),
         flag(&A::ties_to_even), &A::scale_floor, flag(&A::swizzle), &A::n_used, &A::out, &A::out_scale);
  }

  module.def("quantize_nvfp4_gpu_fused_workspace_size", &dsv4_quantize_nvfp4_gpu_fused_workspace_size);
  {
    using A = dsv4_quantize_nvfp4_gpu_fused_args;
    bind(module, "quantize_nvfp4_gpu_fused", dsv4_quantize_nvfp4_gpu_fused, &A::x, &A::expert_ids, &A::experts,
         flag(&A::per_token), flag(&A::reciprocal_global_scale), &A::source, &A::granularity, &A::limit,
         flag(&A::round_to_bfloat16), &A::amax_floor, flag(&A::ties_to_even), &A::scale_floor, flag(&A::swizzle),
         &A::n_used, lent(&A::workspace, quantize_workspace_size), &A::out, &A::out_scale, &A::out_global_scale);
  }
  {
    using A = dsv4_quantize_mx_args;
    bind(module, "quantize_mx", dsv4_quantize_mx, &A::x, &A::element_format, &A::source, &A::granularity, &A::limit,
         flag(&A::round_to_bfloat16), flag(&A::round_scale_up), &A::amax_floor, flag(&A::ties_to_even),
         flag(&A::swizzle), &A::n_used, &A::out, &A::out_scale);
  }
  {
    using A = dsv4_quantize_fp8_per_token_args;
    bind(module, "quantize_fp8_per_token", dsv4_quantize_fp8_per_token, &A::x, &A::scale_floor, flag(&A::divide),
         &A::out, &A::out_scale);
  }
  {
    using A = dsv4_dequantize_blocks_args;
    bind(module, "dequantize_blocks", dsv4_dequantize_blocks, &A::data, &A::scale, &A::global_scale, &A::expert_ids,
         flag(&A::reciprocal_global_scale), &A::element_format, &A::scale_format, flag(&A::swizzle),
         Unused<int>{/* dtype */}, &A::out);
  }
}

}  // namespace dsv4::python
