// Moves large pages with bulk copies: global memory to a ring of stages in shared memory, and from there to global
// memory. One thread of a block issues them all; the hardware keeps several stages of each block in flight, both ways.
#pragma once

#include "device/cluster.cuh"
#include "stash/pages.cuh"

namespace dsv4 {

constexpr int kRingThreads = 64;  // the first warp drives the ring, the last one has the metadata
constexpr int kStages = 8;
constexpr int kStageBytes = 8192;
constexpr int kRingBytes = kStages * kStageBytes;  // of dynamic shared memory
constexpr int kRingBlocks = 3;       // of a multiprocessor with room for them: the kernels are compiled for it
constexpr int kAhead = kStages - 1;  // spans that a block has on the way in

// A span is the part of a page that one stage holds.
struct Span {
  const char* from;
  char* to;
  uint32_t size;  // 0: nothing to move
};

// The spans of all pages, in order.
struct Spans {
  int64_t page_bytes, total;  // total: bytes of all rows
  uint32_t per_page, count;

  __device__ Spans(int64_t pages, int64_t page_bytes, int64_t total) : page_bytes(page_bytes), total(total) {
    per_page = static_cast<uint32_t>((page_bytes + kStageBytes - 1) / kStageBytes);
    const int64_t in_last = total - (pages - 1) * page_bytes;
    count = pages ? static_cast<uint32_t>((pages - 1) * per_page + (in_last + kStageBytes - 1) / kStageBytes) : 0;
  }

  __device__ uint32_t page(uint32_t span) const { return span / per_page; }
  __device__ bool starts_page(uint32_t span) const { return span % per_page == 0; }
  __device__ int64_t offset(uint32_t span) const { return int64_t{span % per_page} * kStageBytes; }
  __device__ uint32_t size(uint32_t span) const {
    const int64_t in_page = total - page(span) * page_bytes;
    const int64_t left = (in_page < page_bytes ? in_page : page_bytes) - offset(span);
    return static_cast<uint32_t>(left < kStageBytes ? left : kStageBytes);
  }
};

// The ring of a block, in the hands of one thread.
class BulkRing {
 public:
  __device__ explicit BulkRing(char* stages, uint64_t* full, Span* spans)
      : stages_(stages), full_(full), spans_(spans) {
    for (int i = 0; i < kStages; ++i)
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&full_[i])) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }

  __device__ void load(const Span& span) {
    const int stage = loaded_ % kStages;
    const uint32_t bytes = span.size / kVectorBytes * kVectorBytes, barrier = shared_address(&full_[stage]);
    spans_[stage] = span;
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
    if (bytes)
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                       shared_address(stages_ + stage * kStageBytes)),
                   "l"(span.from), "r"(bytes), "r"(barrier)
                   : "memory");
    ++loaded_;
  }

  __device__ bool empty() const { return stored_ == loaded_; }

  // Waits for the oldest span and sends it on.
  __device__ void store() {
    const int stage = stored_ % kStages;
    const Span span = spans_[stage];
    const uint32_t bytes = span.size / kVectorBytes * kVectorBytes;
    asm volatile(
        "{\n"
        ".reg .pred complete;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 complete, [%0], %1;\n"
        "@!complete bra again;\n"
        "}" ::"r"(shared_address(&full_[stage])),
        "r"(stored_ / kStages % 2)
        : "memory");
    if (bytes)
      asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(span.to),
                   "r"(shared_address(stages_ + stage * kStageBytes)), "r"(bytes)
                   : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    for (uint32_t byte = bytes; byte < span.size; ++byte) span.to[byte] = span.from[byte];
    ++stored_;
  }

  // The stage before the one stored last may be loaded again.
  __device__ static void wait_for_room() { asm volatile("cp.async.bulk.wait_group.read 1;" ::: "memory"); }

  // The block may end, and its shared memory with it: all of it has been read.
  __device__ static void drain() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

 private:
  char* stages_;
  uint64_t* full_;
  Span* spans_;
  uint32_t loaded_ = 0, stored_ = 0;
};

// Moves all spans. id_of(span) reads the id of the span's page; span_of(span, id) says what to move, and has the page
// recorded. A block starts on spans of its own and then draws: blocks that are late must not leave theirs undone, and
// neighbouring spans should move at about the same time. Every block draws until there is nothing left, so the number
// of draws is known, and the last one puts the counter back to 0.
template <typename IdOf, typename SpanOf>
__device__ void move_spans(const Spans& spans, uint32_t* drawn, char* stages, uint64_t* full, Span* in_flight,
                           IdOf id_of, SpanOf span_of) {
  BulkRing ring(stages, full, in_flight);
  const uint32_t own = kAhead * gridDim.x;
  bool more = spans.count > own;
  uint32_t next = 0;
  const auto draw = [&] {
    asm volatile("atom.inc.relaxed.gpu.global.u32 %0, [%1], %2;"
                 : "=r"(next)
                 : "l"(drawn), "r"(spans.count - own + gridDim.x - 1)
                 : "memory");
  };
  if (more) draw();
  int64_t ids[kAhead];
#pragma unroll
  for (int i = 0; i < kAhead; ++i)
    if (blockIdx.x + i * gridDim.x < spans.count) ids[i] = id_of(blockIdx.x + i * gridDim.x);
#pragma unroll
  for (int i = 0; i < kAhead; ++i)
    if (blockIdx.x + i * gridDim.x < spans.count) ring.load(span_of(blockIdx.x + i * gridDim.x, ids[i]));
  while (!ring.empty()) {
    ring.store();
    more = more && next < spans.count - own;
    if (!more) continue;
    const uint32_t span = own + next;
    const int64_t id = id_of(span);
    draw();
    const Span moved = span_of(span, id);
    BulkRing::wait_for_room();
    ring.load(moved);
  }
  BulkRing::drain();
}

}  // namespace dsv4
