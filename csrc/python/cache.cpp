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
}

}  // namespace dsv4::python
