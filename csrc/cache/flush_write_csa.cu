#include "cache/flush_write.cuh"

extern "C" dsv4_status dsv4_flush_write_csa(const dsv4_flush_write_csa_args* given, dsv4_stream stream) {
  using namespace dsv4;
  Check check("flush_write_csa");
  const dsv4_flush_write_csa_args args = check.read(given);
  const int64_t requests = extent(args.entry, 0);
  const int64_t indexer_head_dim = extent(args.indexer_key, 1);
  const int64_t blocks = extent(args.entries_fp8, 0);
  const int64_t per_block = extent(args.entries_fp8, 1);
  check_flush_write(check, args);
  check.tensor("indexer_key", args.indexer_key, one_of(DSV4_BFLOAT16), {requests, kAny});
  check.multiple("indexer_key columns (indexer_head_dim)", indexer_head_dim, kNvfp4Group);
  check.range("indexer_key columns (indexer_head_dim)", indexer_head_dim, 0, INT32_MAX / 2);
  check.aligned_rows("indexer_key", args.indexer_key, kFour * sizeof(__nv_bfloat16));
  check.tensor("indexer_keys_fp4", args.indexer_keys_fp4, one_of(DSV4_UINT8, DSV4_FLOAT4_E2M1FN_X2),
               {blocks, per_block, indexer_head_dim / 2});
  check.aligned_rows("indexer_keys_fp4", args.indexer_keys_fp4, kFour);
  check.tensor("indexer_scale", args.indexer_scale, one_of(DSV4_FLOAT8_E4M3FN, DSV4_UINT8),
               {blocks, per_block, indexer_head_dim / kNvfp4Group});
  check.changes(args.indexer_keys_fp4, args.indexer_scale);
  LaunchTarget target;
  if (dsv4_status status = check.open(stream, &target)) return status;

  if (requests == 0 || per_block == 0) return DSV4_OK;
  SplitPages pages = split_pages(args);
  pages.indexer_keys_fp4 = static_cast<uint8_t*>(args.indexer_keys_fp4.data);
  pages.indexer_scale = static_cast<uint8_t*>(args.indexer_scale.data);
  pages.indexer_head_dim = static_cast<int>(indexer_head_dim);
  const Geometry geometry = {dim3(static_cast<uint32_t>(requests), 2), kEntryThreads};
  return launch<flush_write_kernel<true>>(target, geometry, static_cast<const __nv_bfloat16*>(args.entry.data),
                                          static_cast<const __nv_bfloat16*>(args.indexer_key.data),
                                          static_cast<const bool*>(args.valid_mask.data), pool_target(args), pages);
}
