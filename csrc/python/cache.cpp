#include <dsv4/cache.h>

#include "bind.h"

namespace dsv4::python {

void bind_cache(py::module_& module) {
  {
    using A = dsv4_csa_compress_tail_args;
    bind(module, "csa_compress_tail", dsv4_csa_compress_tail, &A::tail_ka, &A::tail_za, &A::tail_kb, &A::tail_zb,
         &A::tail_len, &A::request_slots, &A::m, Unused<int>{/* indexer_head_dim */}, &A::out_entry,
         &A::out_indexer_key, &A::out_valid_mask);
  }
  {
    using A = dsv4_hca_compress_tail_args;
    bind(module, "hca_compress_tail", dsv4_hca_compress_tail, &A::tail_ka, &A::tail_za, &A::tail_len, &A::request_slots,
         &A::m, &A::out_entry, &A::out_valid_mask);
  }
  {
    using A = dsv4_append_args;
    bind(module, "append", dsv4_append, &A::kv, &A::z, &A::request_slots, &A::positions, &A::tail_ka, &A::tail_za,
         &A::tail_len, &A::slot_positions, &A::m, &A::next_kb, &A::next_zb, &A::token_offsets, &A::indexer_kv,
         &A::indexer_z, &A::ape, &A::indexer_ape, &A::round);
  }
  {
    using A = dsv4_flush_write_csa_args;
    bind(module, "flush_write_csa", dsv4_flush_write_csa, &A::entry, &A::indexer_key, &A::valid_mask, &A::request_slots,
         &A::slot_positions, &A::block_table, &A::entries_fp8, &A::entries_rope, &A::inv_scale, &A::indexer_keys_fp4,
         &A::indexer_scale, &A::m);
  }
  {
    using A = dsv4_flush_write_hca_args;
    bind(module, "flush_write_hca", dsv4_flush_write_hca, &A::entry, &A::valid_mask, &A::request_slots,
         &A::slot_positions, &A::block_table, &A::entries_fp8, &A::entries_rope, &A::inv_scale, &A::m);
  }
  {
    using A = dsv4_csa_rotate_state_args;
    bind(module, "csa_rotate_state", dsv4_csa_rotate_state, &A::valid_mask, &A::request_slots, &A::tail_ka, &A::tail_za,
         &A::tail_kb, &A::tail_zb, &A::tail_len, &A::next_kb, &A::next_zb, flag(&A::clear_rows));
  }
  {
    using A = dsv4_hca_reset_state_args;
    bind(module, "hca_reset_state", dsv4_hca_reset_state, &A::valid_mask, &A::request_slots, &A::tail_ka, &A::tail_za,
         &A::tail_len, flag(&A::clear_rows));
  }

  module.def("page_layouts", [] {
    py::list layouts;
    dsv4_page_layout_info info = {};
    info.struct_size = sizeof(info);
    for (int32_t i = 0; dsv4_page_layout_at(i, &info) == DSV4_OK; ++i)
      layouts.append(py::make_tuple(info.name, info.head_dim, info.quantized_dims, dsv4_dtype_name(info.element),
                                    info.group, dsv4_dtype_name(info.scale), info.value_bytes, info.scale_bytes,
                                    info.page_alignment, info.separate != 0, info.amax_floor, info.exact_scale != 0));
    return layouts;
  });
  module.def("page_bytes", &dsv4_page_bytes);
  {
    using A = dsv4_compress_flush_args;
    bind(module, "compress_flush", dsv4_compress_flush, &A::kv, &A::score, &A::ape, &A::query_starts,
         &A::start_positions, &A::state, &A::state_table, &A::norm_weight, &A::cos_sin, &A::pages, &A::block_table,
         &A::slot_mapping, &A::ratio, flag(&A::overlap), &A::layout, &A::entries_per_page, &A::scales, &A::rope,
         flag(&A::hadamard), flag(&A::round_once), &A::epsilon, &A::amax_floor, &A::scale_floor,
         flag(&A::fp4_ties_toward_zero), flag(&A::exact_scale));
  }
  {
    using A = dsv4_unpack_entries_args;
    bind(module, "unpack_entries", dsv4_unpack_entries, &A::pages, &A::slots, &A::layout, &A::entries_per_page,
         &A::scales, &A::rope, &A::out);
  }
}

}  // namespace dsv4::python
