// Workspace that the library owns, for callers of ops that have none: see dsv4_workspace() in dsv4.h.
//
// Kernels leave workspaces zeroed, so memory is zeroed once, when it is allocated, and then lent again and again. Two
// launches that may run at the same time must not share it: outside of captures a block belongs to a stream, in a
// capture to a stream of that graph, since replays may run concurrently with eager calls and with other graphs.
#include <dsv4/dsv4.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <mutex>
#include <vector>

#include "core/check.h"
#include "core/device.h"

namespace dsv4 {
namespace {

constexpr const char* kOp = "workspace";
constexpr size_t kSmallestBlock = 16 << 10;

struct Block {
  unsigned char* data;
  size_t size;
  unsigned long long stream;      // stream blocks: the stream's id, which is never reused; graph blocks: its handle
  unsigned long long capture;     // graph blocks: id of the capture
  uint64_t last_use;              // stream blocks
  std::atomic<bool> taken{true};  // graph blocks: until the graph and all copies and executables of it are destroyed
};

// The blocks of one device. Never freed at exit, when the driver may be gone and graphs may still give blocks back.
// After a fork the child, which cannot use the parent's CUDA context, cannot use this either.
struct Pool {
  std::mutex mutex;
  cudaStream_t zeroing = nullptr;  // independent of the caller's streams
  uint64_t clock = 0;
  std::vector<Block*> of_streams;
  std::vector<Block*> of_graphs;
};

Pool& pool_of(int ordinal) {
  static Pool* const pools = new Pool[kMaxDevices];
  return pools[ordinal];
}

// Powers of two: batches of many sizes share few blocks.
size_t rounded(size_t size) {
  size_t block = kSmallestBlock;
  while (block < size) block *= 2;
  return block;
}

dsv4_status allocate(Pool& pool, size_t size, Block** block) {
  AllowLoadingInCapture allow;
  if (!pool.zeroing)
    if (cudaError_t error = cudaStreamCreateWithFlags(&pool.zeroing, cudaStreamNonBlocking))
      return fail_cuda(error, kOp, "cudaStreamCreateWithFlags");
  void* data = nullptr;
  if (cudaError_t error = cudaMalloc(&data, size)) return fail_cuda(error, kOp, "cudaMalloc");
  cudaError_t error = cudaMemsetAsync(data, 0, size, pool.zeroing);
  if (!error) error = cudaStreamSynchronize(pool.zeroing);
  if (error) {
    cudaFree(data);
    return fail_cuda(error, kOp, "zeroing it (cudaMemsetAsync)");
  }
  *block = new Block;
  (*block)->data = static_cast<unsigned char*>(data);
  (*block)->size = size;
  return DSV4_OK;
}

// Frees the block of the stream that called least recently, to make room for one more. That stream is most likely
// destroyed; CUDA does not notify of it. cudaFree waits for the device, so no kernel can still be using the block. If
// cudaFree may not be called now (during a capture), the table grows beyond its bound instead.
void evict(Pool& pool) {
  if (pool.of_streams.size() < DSV4_WORKSPACE_STREAMS) return;
  AllowLoadingInCapture allow;
  const auto oldest = std::min_element(pool.of_streams.begin(), pool.of_streams.end(),
                                       [](const Block* a, const Block* b) { return a->last_use < b->last_use; });
  if (cudaFree((*oldest)->data)) {
    cudaGetLastError();
    return;
  }
  delete *oldest;
  pool.of_streams.erase(oldest);
}

// Lends to an eager call. A stream that needs more than before gets a second block, as the first may be in use; sizes
// double.
dsv4_status lend_to_stream(Pool& pool, unsigned long long stream, size_t size, Block** lent) {
  for (Block* block : pool.of_streams)
    if (block->stream == stream && block->size >= size) {
      block->last_use = ++pool.clock;
      *lent = block;
      return DSV4_OK;
    }
  evict(pool);
  if (dsv4_status status = allocate(pool, rounded(size), lent)) return status;
  (*lent)->stream = stream;  // NOLINT(clang-analyzer-core.NullDereference): allocate() has set it
  (*lent)->last_use = ++pool.clock;
  pool.of_streams.push_back(*lent);
  return DSV4_OK;
}

// Called by CUDA on an internal thread when the last reference to the graph is gone. It must not call CUDA or take the
// lock: a thread that holds the lock may be waiting for this one inside CUDA.
void CUDART_CB give_back(void* block) { static_cast<Block*>(block)->taken.store(false, std::memory_order_release); }

// The graph, its copies and its executables share ownership of the block; when the last of them has been destroyed and
// its work is complete, the block is given back.
dsv4_status tie_to_graph(Block* block, cudaGraph_t graph) {
  AllowLoadingInCapture allow;
  cudaUserObject_t owner = nullptr;
  if (cudaError_t error = cudaUserObjectCreate(&owner, block, give_back, 1, cudaUserObjectNoDestructorSync)) {
    give_back(block);
    return fail_cuda(error, kOp, "cudaUserObjectCreate");
  }
  if (cudaError_t error = cudaGraphRetainUserObject(graph, owner, 1, cudaGraphUserObjectMove)) {
    cudaUserObjectRelease(owner, 1);  // gives the block back
    return fail_cuda(error, kOp, "cudaGraphRetainUserObject");
  }
  return DSV4_OK;
}

// Launches that one stream adds to a graph run one after the other, and share a block.
dsv4_status lend_to_graph(Pool& pool, unsigned long long stream, unsigned long long capture, cudaGraph_t graph,
                          size_t size, Block** lent) {
  Block* smallest_free = nullptr;
  for (Block* block : pool.of_graphs) {
    if (block->size < size) continue;
    if (!block->taken.load(std::memory_order_acquire)) {
      if (!smallest_free || block->size < smallest_free->size) smallest_free = block;
    } else if (block->stream == stream && block->capture == capture) {
      *lent = block;
      return DSV4_OK;
    }
  }
  Block* block = smallest_free;
  if (block) {
    block->taken.store(true, std::memory_order_relaxed);
  } else {
    if (dsv4_status status = allocate(pool, rounded(size), &block)) return status;
    pool.of_graphs.push_back(block);
  }
  block->stream = stream;
  block->capture = capture;
  *lent = block;
  return tie_to_graph(block, graph);
}

dsv4_status lend(const LaunchTarget& target, size_t size, Block** lent) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long capture = 0;
  cudaGraph_t graph = nullptr;
  if (cudaError_t error = cudaStreamGetCaptureInfo(target.stream, &status, &capture, &graph))
    return fail_cuda(error, kOp, "cudaStreamGetCaptureInfo");
  if (status == cudaStreamCaptureStatusInvalidated)
    return fail_cuda(cudaErrorStreamCaptureInvalidated, kOp, "capturing the stream");
  // cudaStreamGetId() is not allowed while capturing. The handle identifies the stream for the length of the capture.
  unsigned long long stream = reinterpret_cast<uintptr_t>(target.stream);
  if (status == cudaStreamCaptureStatusNone)
    if (cudaError_t error = cudaStreamGetId(target.stream, &stream)) return fail_cuda(error, kOp, "cudaStreamGetId");
  Pool& pool = pool_of(target.device->ordinal);
  std::lock_guard<std::mutex> lock(pool.mutex);
  return status == cudaStreamCaptureStatusActive ? lend_to_graph(pool, stream, capture, graph, size, lent)
                                                 : lend_to_stream(pool, stream, size, lent);
}

}  // namespace
}  // namespace dsv4

extern "C" dsv4_status dsv4_workspace(int32_t device, dsv4_stream stream, size_t size, dsv4_tensor* out) {
  using namespace dsv4;
  if (!out) return fail(DSV4_ERROR_INVALID_ARGUMENT, kOp, "out", "expected a place to write to, got NULL");
  if (size > PTRDIFF_MAX)
    return fail(DSV4_ERROR_INVALID_ARGUMENT, kOp, "size", "expected at most %td, got %zu", PTRDIFF_MAX, size);
  if (device == DSV4_HOST)
    return fail(DSV4_ERROR_HOST_TENSOR, kOp, "device",
                "expected a CUDA device, got cpu; the Python package holds the CPU implementation");
  LaunchTarget target;
  if (dsv4_status status = target.open(kOp, device, stream)) return status;
  Block* block = nullptr;
  if (dsv4_status status = lend(target, size, &block)) return status;
  *out = {};
  out->data = block->data;  // NOLINT(clang-analyzer-core.NullDereference): lend() has set it
  out->dtype = DSV4_UINT8;
  out->device = device;
  out->rank = 1;
  out->shape[0] = static_cast<int64_t>(block->size);
  out->stride[0] = 1;
  return DSV4_OK;
}

extern "C" dsv4_status dsv4_workspace_usage(int32_t device, dsv4_workspace_report* report) {
  using namespace dsv4;
  if (device < 0 || device >= kMaxDevices)
    return fail(DSV4_ERROR_INVALID_ARGUMENT, "workspace_usage", "device", "expected 0 to %d, got %d", kMaxDevices - 1,
                device);
  dsv4_workspace_report usage = {};
  Pool& pool = pool_of(device);
  std::lock_guard<std::mutex> lock(pool.mutex);
  usage.stream_blocks = pool.of_streams.size();
  for (const Block* block : pool.of_streams) usage.bytes += block->size;
  for (const Block* block : pool.of_graphs) {
    ++(block->taken.load(std::memory_order_acquire) ? usage.graph_blocks : usage.free_blocks);
    usage.bytes += block->size;
  }
  return write_struct("workspace_usage", "report", &usage, sizeof(usage), report);
}
