#include "cache/entry_codec.cuh"
#include "core/check.h"
#include "core/launch.h"
#include "device/indices.cuh"

namespace dsv4 {

constexpr int kUnpackThreads = 128;

// One thread per four channels; `entry_threads` is a power of two.
__global__ void __launch_bounds__(kUnpackThreads)
    unpack_entries_kernel(Pages pages, PageLayout layout, Indices slots, float* __restrict__ out, int64_t entries,
                          int entry_threads) {
  await_previous_grid();
  const int thread = threadIdx.x & (entry_threads - 1);
  const int64_t entry = int64_t{blockIdx.x} * (kUnpackThreads / entry_threads) + threadIdx.x / entry_threads;
  if (entry >= entries) return;
  const Place place = pages.place(slots[entry]);
  float values[kChannels] = {NAN, NAN, NAN, NAN};
  if (place.exists()) load_entry(layout, pages, place, kChannels * thread, values);
  reinterpret_cast<float4*>(out)[entry * entry_threads + thread] = {values[0], values[1], values[2], values[3]};
}

}  // namespace dsv4

extern "C" dsv4_status dsv4_unpack_entries(const dsv4_unpack_entries_args* given, dsv4_stream stream) {
  using namespace dsv4;
  Check check("unpack_entries");
  const dsv4_unpack_entries_args args = check.read(given);
  check.range("layout", args.layout, 0, kPageLayoutCount - 1);
  const dsv4_page_layout_info& layout = kPageLayouts[check.status() ? 0 : args.layout];
  const int64_t entries = extent(args.slots, 0);
  check_pages(check, args.pages, args.scales, args.rope, layout, args.entries_per_page);
  check.tensor("slots", args.slots, one_of(DSV4_INT32, DSV4_INT64), {kAny});
  check.range("slots (entries)", entries, 0, INT32_MAX);
  check.tensor("out", args.out, one_of(DSV4_FLOAT32), {entries, layout.head_dim});
  check.aligned_rows("out", args.out, sizeof(float4));
  LaunchTarget target;
  if (dsv4_status status = check.open(stream, &target)) return status;

  if (entries == 0) return DSV4_OK;
  const int threads = layout.head_dim / kChannels;
  const Pages pages = pages_of(args.pages, args.scales, args.rope, layout, args.entries_per_page);
  return launch<unpack_entries_kernel>(target, {blocks_for(entries * threads, kUnpackThreads), kUnpackThreads}, pages,
                                       page_layout(layout), indices_of(args.slots), static_cast<float*>(args.out.data),
                                       entries, threads);
}
