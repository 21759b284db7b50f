#include "cache/flush_write.cuh"

extern "C" dsv4_status dsv4_flush_write_hca(const dsv4_flush_write_hca_args* given, dsv4_stream stream) {
  using namespace dsv4;
  Check check("flush_write_hca");
  const dsv4_flush_write_hca_args args = check.read(given);
  check_flush_write(check, args);
  LaunchTarget target;
  if (dsv4_status status = check.open(stream, &target)) return status;

  const int64_t requests = extent(args.entry, 0);
  if (requests == 0 || extent(args.entries_fp8, 1) == 0) return DSV4_OK;
  const Geometry geometry = {static_cast<uint32_t>(requests), kEntryThreads};
  return launch<flush_write_kernel<false>>(target, geometry, static_cast<const __nv_bfloat16*>(args.entry.data),
                                           nullptr, static_cast<const bool*>(args.valid_mask.data), pool_target(args),
                                           split_pages(args));
}
