#include <dsv4/stash.h>

#include "bind.h"

namespace dsv4::python {
namespace {

template <typename Args>
size_t stash_workspace_size(const Args&) {
  return dsv4_paged_stash_workspace_size();
}

}  // namespace

void bind_stash(py::module_& module) {
  module.def("paged_stash_workspace_size", &dsv4_paged_stash_workspace_size);
  {
    using A = dsv4_paged_stash_copy_args;
    bind(module, "paged_stash_copy", dsv4_paged_stash_copy, &A::src, &A::cuda_dst, &A::host_dst, &A::num_tokens,
         &A::free_list_cuda, &A::free_list_host, &A::free_list_head, &A::free_list_tail, &A::free_list_capacity,
         &A::page_record, &A::overflow, &A::host_spill_global, &A::spilled_to_host, &A::new_free_list_head,
         &A::high_water, lent(&A::workspace, stash_workspace_size<A>));
  }
  {
    using A = dsv4_paged_stash_pop_args;
    bind(module, "paged_stash_pop", dsv4_paged_stash_pop, &A::cuda_src, &A::host_src, &A::dst, &A::num_tokens,
         &A::page_record, &A::spilled_to_host, &A::overflow, &A::free_list_cuda, &A::free_list_host, &A::free_list_tail,
         &A::free_list_capacity, &A::new_free_list_tail, flag(&A::zero_rest),
         lent(&A::workspace, stash_workspace_size<A>));
  }
}

}  // namespace dsv4::python
