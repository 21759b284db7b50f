#include "cache/entry_codec.cuh"
#include "core/check.h"
#include "core/launch.h"
#include "device/indices.cuh"

namespace dsv4 {

constexpr int kUnpackThreads = 128;

__global__ void __launch_bounds__(kUnpackThreads)
    unpack_entries_kernel(Pages pages, PageLayout layout, Indices slots, float* __restrict__ out, int64_t entries,
                          int head_dim) {
  await_previous_grid();
  const int threads = head_dim / kChannels;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kUnpackThreads + threadIdx.x;
  const int64_t entry = thread / threads;
  if (entry >= entries) return;
  const int channel = kChannels * static_cast<int>(thread % threads);
  const int64_t index = slots[entry];
  float values[kChannels] = {NAN, NAN, NAN, NAN};
  if (pages.holds(index)) load_entry(layout, pages, index, channel, values);
  *reinterpret_cast<float4*>(out + entry * head_dim + channel) = {values[0], values[1], values[2], values[3]};
}

}  // namespace dsv4

extern "C" dsv4_status dsv4_unpack_entries(const dsv4_unpack_entries_args* given, dsv4_stream stream) {
  using namespace dsv4;
  Check check("unpack_entries");
  const dsv4_unpack_entries_args args = check.read(given);
  check.range("layout", args.layout, 0, kPageLayoutCount - 1);
  const dsv4_page_layout_info& layout = kPageLayouts[check.status() ? 0 : args.layout];
  const int64_t entries = extent(args.slots, 0);
  check_pages(check, args.pages, layout, args.entries_per_page);
  check.tensor("slots", args.slots, one_of(DSV4_INT32, DSV4_INT64), {kAny});
  check.range("slots (entries)", entries, 0, INT32_MAX);
  check.tensor("out", args.out, one_of(DSV4_FLOAT32), {entries, layout.head_dim});
  check.aligned_rows("out", args.out, sizeof(float4));
  LaunchTarget target;
  if (dsv4_status status = check.open(stream, &target)) return status;

  if (entries == 0) return DSV4_OK;
  const int64_t threads = entries * (layout.head_dim / kChannels);
  return launch<unpack_entries_kernel>(
      target, {blocks_for(threads, kUnpackThreads), kUnpackThreads}, pages_of(args.pages, args.entries_per_page),
      page_layout(layout), indices_of(args.slots), static_cast<float*>(args.out.data), entries, layout.head_dim);
}
