#include <dsv4/stash.h>

#include "tensor.h"

namespace dsv4::python {

void bind_stash(py::module_& module) {
  module.def("paged_stash_workspace_size", &dsv4_paged_stash_workspace_size);
  module.def("paged_stash_copy",
             [](const Tensor& src, const Tensor& cuda_dst, const Tensor& host_dst, const Tensor& num_tokens,
                const Tensor& free_list_cuda, const Tensor& free_list_host, const Tensor& free_list_head,
                const Tensor& free_list_tail, const Tensor& free_list_capacity, const Tensor& page_record,
                const Tensor& overflow, const Tensor& host_spill_global, const Tensor& spilled_to_host,
                const Tensor& new_free_list_head, const Tensor& high_water, const Tensor& workspace) {
    dsv4_paged_stash_copy_args args = {};
    args.src = src.view;
    args.cuda_dst = cuda_dst.view;
    args.host_dst = host_dst.view;
    args.num_tokens = num_tokens.view;
    args.free_list_cuda = free_list_cuda.view;
    args.free_list_host = free_list_host.view;
    args.free_list_head = free_list_head.view;
    args.free_list_tail = free_list_tail.view;
    args.free_list_capacity = free_list_capacity.view;
    args.page_record = page_record.view;
    args.overflow = overflow.view;
    args.host_spill_global = host_spill_global.view;
    args.spilled_to_host = spilled_to_host.view;
    args.new_free_list_head = new_free_list_head.view;
    args.high_water = high_water.view;
    args.workspace = workspace.view;
    return call(dsv4_paged_stash_copy, args, src);
  });

  module.def("paged_stash_pop", [](const Tensor& cuda_src, const Tensor& host_src, const Tensor& dst,
                                   const Tensor& num_tokens, const Tensor& page_record, const Tensor& spilled_to_host,
                                   const Tensor& overflow, const Tensor& free_list_cuda, const Tensor& free_list_host,
                                   const Tensor& free_list_tail, const Tensor& free_list_capacity,
                                   const Tensor& new_free_list_tail, bool zero_rest, const Tensor& workspace) {
    dsv4_paged_stash_pop_args args = {};
    args.cuda_src = cuda_src.view;
    args.host_src = host_src.view;
    args.dst = dst.view;
    args.num_tokens = num_tokens.view;
    args.page_record = page_record.view;
    args.spilled_to_host = spilled_to_host.view;
    args.overflow = overflow.view;
    args.free_list_cuda = free_list_cuda.view;
    args.free_list_host = free_list_host.view;
    args.free_list_tail = free_list_tail.view;
    args.free_list_capacity = free_list_capacity.view;
    args.new_free_list_tail = new_free_list_tail.view;
    args.workspace = workspace.view;
    args.zero_rest = zero_rest;
    return call(dsv4_paged_stash_pop, args, cuda_src);
  });
}

}  // namespace dsv4::python
