#include <dsv4/cache.h>

#include "tensor.h"

namespace dsv4::python {

void bind_cache(py::module_& module) {
  module.def("csa_compress_tail", [](const Tensor& tail_ka, const Tensor& tail_za, const Tensor& tail_kb,
                                     const Tensor& tail_zb, const Tensor& tail_len, const Tensor& request_slots, int m,
                                     int /* indexer_head_dim: the outputs say it */, const Tensor& out_entry,
                                     const Tensor& out_indexer_key, const Tensor& out_valid_mask) {
    dsv4_csa_compress_tail_args args = {};
    args.tail_ka = tail_ka.view;
    args.tail_za = tail_za.view;
    args.tail_kb = tail_kb.view;
    args.tail_zb = tail_zb.view;
    args.tail_len = tail_len.view;
    args.request_slots = request_slots.view;
    args.m = m;
    args.out_entry = out_entry.view;
    args.out_indexer_key = out_indexer_key.view;
    args.out_valid_mask = out_valid_mask.view;
    return call(dsv4_csa_compress_tail, args, tail_ka);
  });

  module.def("hca_compress_tail",
             [](const Tensor& tail_ka, const Tensor& tail_za, const Tensor& tail_len, const Tensor& request_slots,
                int m, const Tensor& out_entry, const Tensor& out_valid_mask) {
    dsv4_hca_compress_tail_args args = {};
    args.tail_ka = tail_ka.view;
    args.tail_za = tail_za.view;
    args.tail_len = tail_len.view;
    args.request_slots = request_slots.view;
    args.m = m;
    args.out_entry = out_entry.view;
    args.out_valid_mask = out_valid_mask.view;
    return call(dsv4_hca_compress_tail, args, tail_ka);
  });

  module.def("append", [](const Tensor& kv, const Tensor& z, const Tensor& request_slots, const Tensor& positions,
                          const Tensor& tail_ka, const Tensor& tail_za, const Tensor& tail_len,
                          const Tensor& slot_positions, int m, const Tensor& next_kb, const Tensor& next_zb,
                          const Tensor& token_offsets, const Tensor& indexer_kv, const Tensor& indexer_z,
                          const Tensor& ape, const Tensor& indexer_ape, int round) {
    dsv4_append_args args = {};
    args.kv = kv.view;
    args.z = z.view;
    args.request_slots = request_slots.view;
    args.positions = positions.view;
    args.tail_ka = tail_ka.view;
    args.tail_za = tail_za.view;
    args.tail_len = tail_len.view;
    args.slot_positions = slot_positions.view;
    args.m = m;
    args.next_kb = next_kb.view;
    args.next_zb = next_zb.view;
    args.token_offsets = token_offsets.view;
    args.indexer_kv = indexer_kv.view;
    args.indexer_z = indexer_z.view;
    args.ape = ape.view;
    args.indexer_ape = indexer_ape.view;
    args.round = round;
    return call(dsv4_append, args, kv);
  });

  module.def("flush_write_csa", [](const Tensor& entry, const Tensor& indexer_key, const Tensor& valid_mask,
                                   const Tensor& request_slots, const Tensor& slot_positions, const Tensor& block_table,
                                   const Tensor& entries_fp8, const Tensor& entries_rope, const Tensor& inv_scale,
                                   const Tensor& indexer_keys_fp4, const Tensor& indexer_scale, int m) {
    dsv4_flush_write_csa_args args = {};
    args.entry = entry.view;
    args.indexer_key = indexer_key.view;
    args.valid_mask = valid_mask.view;
    args.request_slots = request_slots.view;
    args.slot_positions = slot_positions.view;
    args.block_table = block_table.view;
    args.entries_fp8 = entries_fp8.view;
    args.entries_rope = entries_rope.view;
    args.inv_scale = inv_scale.view;
    args.indexer_keys_fp4 = indexer_keys_fp4.view;
    args.indexer_scale = indexer_scale.view;
    args.m = m;
    return call(dsv4_flush_write_csa, args, entry);
  });

  module.def("flush_write_hca", [](const Tensor& entry, const Tensor& valid_mask, const Tensor& request_slots,
                                   const Tensor& slot_positions, const Tensor& block_table, const Tensor& entries_fp8,
                                   const Tensor& entries_rope, const Tensor& inv_scale, int m) {
    dsv4_flush_write_hca_args args = {};
    args.entry = entry.view;
    args.valid_mask = valid_mask.view;
    args.request_slots = request_slots.view;
    args.slot_positions = slot_positions.view;
    args.block_table = block_table.view;
    args.entries_fp8 = entries_fp8.view;
    args.entries_rope = entries_rope.view;
    args.inv_scale = inv_scale.view;
    args.m = m;
    return call(dsv4_flush_write_hca, args, entry);
  });

  module.def("csa_rotate_state",
             [](const Tensor& valid_mask, const Tensor& request_slots, const Tensor& tail_ka, const Tensor& tail_za,
                const Tensor& tail_kb, const Tensor& tail_zb, const Tensor& tail_len, const Tensor& next_kb,
                const Tensor& next_zb, bool clear_rows) {
    dsv4_csa_rotate_state_args args = {};
    args.valid_mask = valid_mask.view;
    args.request_slots = request_slots.view;
    args.tail_ka = tail_ka.view;
    args.tail_za = tail_za.view;
    args.tail_kb = tail_kb.view;
    args.tail_zb = tail_zb.view;
    args.tail_len = tail_len.view;
    args.next_kb = next_kb.view;
    args.next_zb = next_zb.view;
    args.clear_rows = clear_rows;
    return call(dsv4_csa_rotate_state, args, tail_ka);
  });

  module.def("hca_reset_state", [](const Tensor& valid_mask, const Tensor& request_slots, const Tensor& tail_ka,
                                   const Tensor& tail_za, const Tensor& tail_len, bool clear_rows) {
    dsv4_hca_reset_state_args args = {};
    args.valid_mask = valid_mask.view;
    args.request_slots = request_slots.view;
    args.tail_ka = tail_ka.view;
    args.tail_za = tail_za.view;
    args.tail_len = tail_len.view;
    args.clear_rows = clear_rows;
    return call(dsv4_hca_reset_state, args, tail_ka);
  });

  module.def("page_layouts", [] {
    py::list layouts;
    dsv4_page_layout_info info;
    for (int32_t i = 0; dsv4_page_layout_at(i, &info) == DSV4_OK; ++i)
      layouts.append(py::make_tuple(info.name, info.head_dim, info.quantized_dims, dsv4_dtype_name(info.element),
                                    info.group, dsv4_dtype_name(info.scale), info.value_bytes, info.scale_bytes,
                                    info.page_alignment, info.separate != 0, info.amax_floor, info.exact_scale != 0));
    return layouts;
  });
  module.def("page_bytes", &dsv4_page_bytes);

  module.def("compress_flush",
             [](const Tensor& kv, const Tensor& score, const Tensor& ape, const Tensor& query_starts,
                const Tensor& start_positions, const Tensor& state, const Tensor& state_table,
                const Tensor& norm_weight, const Tensor& cos_sin, const Tensor& pages, const Tensor& block_table,
                const Tensor& slot_mapping, int ratio, bool overlap, int layout, int entries_per_page,
                const Tensor& scales, const Tensor& rope, bool hadamard, bool round_once, float epsilon,
                float amax_floor, float scale_floor, bool fp4_ties_toward_zero, bool exact_scale) {
    dsv4_compress_flush_args args = {};
    args.kv = kv.view;
    args.score = score.view;
    args.ape = ape.view;
    args.query_starts = query_starts.view;
    args.start_positions = start_positions.view;
    args.state = state.view;
    args.state_table = state_table.view;
    args.norm_weight = norm_weight.view;
    args.cos_sin = cos_sin.view;
    args.pages = pages.view;
    args.scales = scales.view;
    args.rope = rope.view;
    args.block_table = block_table.view;
    args.slot_mapping = slot_mapping.view;
    args.ratio = ratio;
    args.overlap = overlap;
    args.layout = layout;
    args.entries_per_page = entries_per_page;
    args.hadamard = hadamard;
    args.round_once = round_once;
    args.epsilon = epsilon;
    args.amax_floor = amax_floor;
    args.scale_floor = scale_floor;
    args.fp4_ties_toward_zero = fp4_ties_toward_zero;
    args.exact_scale = exact_scale;
    return call(dsv4_compress_flush, args, kv);
  });

  module.def("unpack_entries", [](const Tensor& pages, const Tensor& slots, int layout, int entries_per_page,
                                  const Tensor& scales, const Tensor& rope, const Tensor& out) {
    dsv4_unpack_entries_args args = {};
    args.pages = pages.view;
    args.scales = scales.view;
    args.rope = rope.view;
    args.slots = slots.view;
    args.out = out.view;
    args.layout = layout;
    args.entries_per_page = entries_per_page;
    return call(dsv4_unpack_entries, args, pages);
  });
}

}  // namespace dsv4::python
