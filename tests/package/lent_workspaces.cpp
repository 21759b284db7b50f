// The book-keeping of csrc/core/workspace.cpp on a CUDA runtime made for the purpose, which has streams, captures and
// graphs of its own. What a GPU does with it is tested in tests/test_workspace.py. Exits with 1 at what is wrong.
#include "core/workspace.cpp"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <set>
#include <string>

namespace {

// A stream handle is the address of one of these. Ids are never used again; handles are.
struct Stream {
  unsigned long long id;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long capture = 0;
  std::vector<cudaUserObject_t>* graph = nullptr;
};

struct UserObject {
  void* pointer;
  cudaHostFn_t destroy;
};

std::set<void*> allocated;
int frees = 0;
bool out_of_memory = false, frees_forbidden = false, retain_fails = false;
cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
unsigned long long next_id = 1, next_capture = 1;

void expect(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "wrong: %s\n", what);
  std::exit(1);
}

Stream* of(cudaStream_t stream) { return reinterpret_cast<Stream*>(stream); }
dsv4_stream handle(Stream& stream) { return reinterpret_cast<dsv4_stream>(&stream); }

void begin(Stream& stream, std::vector<cudaUserObject_t>& graph, unsigned long long capture) {
  stream.status = cudaStreamCaptureStatusActive;
  stream.capture = capture;
  stream.graph = &graph;
}

void end(Stream& stream) { stream.status = cudaStreamCaptureStatusNone; }

void destroy(std::vector<cudaUserObject_t>& graph) {
  for (cudaUserObject_t one : graph) cudaUserObjectRelease(one, 1);
  graph.clear();
}

}  // namespace

extern "C" {
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* exchanged) {
  std::swap(mode, *exchanged);
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  expect(flags == cudaStreamNonBlocking, "the library's stream waits for the legacy stream");
  *stream = handle(*new Stream{next_id++});
  return cudaSuccess;
}
cudaError_t cudaMalloc(void** data, size_t size) {
  expect(mode == cudaStreamCaptureModeRelaxed, "cudaMalloc in a mode that captures forbid");
  if (out_of_memory) return cudaErrorMemoryAllocation;
  *data = std::malloc(size);
  std::memset(*data, 0xA5, size);
  allocated.insert(*data);
  return cudaSuccess;
}
cudaError_t cudaFree(void* data) {
  expect(mode == cudaStreamCaptureModeRelaxed, "cudaFree in a mode that captures forbid");
  if (frees_forbidden) return cudaErrorStreamCaptureUnsupported;
  expect(allocated.erase(data) == 1, "cudaFree of what is not allocated");
  std::free(data);
  ++frees;
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* data, int value, size_t size, cudaStream_t stream) {
  expect(of(stream)->status == cudaStreamCaptureStatusNone, "a memset in the capture");
  std::memset(data, value, size);
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  expect(of(stream)->status == cudaStreamCaptureStatusNone, "waits for a stream that is being captured");
  return cudaSuccess;
}
cudaError_t cudaStreamGetId(cudaStream_t stream, unsigned long long* id) {
  if (of(stream)->status != cudaStreamCaptureStatusNone) return cudaErrorStreamCaptureUnsupported;
  *id = of(stream)->id;
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t* graph, const cudaGraphNode_t**, const cudaGraphEdgeData**, size_t*) {
  *status = of(stream)->status;
  *id = of(stream)->capture;
  *graph = reinterpret_cast<cudaGraph_t>(of(stream)->graph);
  return cudaSuccess;
}
cudaError_t cudaUserObjectCreate(cudaUserObject_t* object, void* pointer, cudaHostFn_t destroy, unsigned count,
                                 unsigned flags) {
  expect(count == 1 && flags == cudaUserObjectNoDestructorSync, "a user object of another kind");
  *object = reinterpret_cast<cudaUserObject_t>(new UserObject{pointer, destroy});
  return cudaSuccess;
}
cudaError_t cudaUserObjectRelease(cudaUserObject_t object, unsigned) {
  auto* const one = reinterpret_cast<UserObject*>(object);
  one->destroy(one->pointer);
  delete one;
  return cudaSuccess;
}
cudaError_t cudaGraphRetainUserObject(cudaGraph_t graph, cudaUserObject_t object, unsigned, unsigned flags) {
  expect(flags == cudaGraphUserObjectMove, "the graph holds a reference of its own");
  if (retain_fails) return cudaErrorNotSupported;
  reinterpret_cast<std::vector<cudaUserObject_t>*>(graph)->push_back(object);
  return cudaSuccess;
}
}

namespace dsv4 {

dsv4_status fail(dsv4_status status, const char*, const char*, const char*, ...) { return status; }
dsv4_status fail_cuda(cudaError_t, const char*, const char*) { return DSV4_ERROR_CUDA; }
dsv4_status LaunchTarget::open(const char* name, int ordinal, dsv4_stream on_stream) {
  static Device devices[kMaxDevices];
  op = name;
  stream = on_stream;
  devices[ordinal].ordinal = ordinal;
  device = &devices[ordinal];
  return DSV4_OK;
}
void LaunchTarget::leave() {}
dsv4_status write_struct(const char*, const char*, const void* result, size_t size, void* given) {
  if (!given || *static_cast<size_t*>(given) != size) return DSV4_ERROR_INVALID_ARGUMENT;
  std::memcpy(given, result, size);
  *static_cast<size_t*>(given) = size;
  return DSV4_OK;
}

}  // namespace dsv4

namespace {

void* lent(Stream& stream, size_t size, int device = 0) {
  dsv4_tensor out = {};
  expect(dsv4_workspace(device, handle(stream), size, &out) == DSV4_OK, "not lent");
  expect(out.dtype == DSV4_UINT8 && out.device == device && out.rank == 1 && out.stride[0] == 1, "no row of bytes");
  expect(out.shape[0] >= static_cast<int64_t>(size), "too small");
  const auto* const bytes = static_cast<unsigned char*>(out.data);
  expect(std::all_of(bytes, bytes + out.shape[0], [](unsigned char byte) { return byte == 0; }), "not zeroed");
  expect(mode == cudaStreamCaptureModeGlobal, "the thread's capture mode is not what it was");
  return out.data;
}

dsv4_workspace_report report(int device = 0) {
  dsv4_workspace_report one = {};
  one.struct_size = sizeof(one);
  expect(dsv4_workspace_usage(device, &one) == DSV4_OK, "no report");
  return one;
}

void test_streams() {
  Stream a{next_id++}, b{next_id++};
  void* const first = lent(a, 100);
  expect(lent(a, 16 << 10) == first && lent(a, 0) == first, "another block at the next call");
  expect(lent(b, 100) != first, "two streams share a block");
  void* const larger = lent(a, 1 << 20);
  expect(larger != first && allocated.count(first), "a block that may be in use is gone");
  expect(lent(a, (1 << 20) - 5) == larger, "another block for less");
  expect(lent(a, 100, 1) != first, "two devices share a block");
  expect(report().stream_blocks == 3 && report(1).stream_blocks == 1, "the count");
  a.id = next_id++;  // destroyed; the next stream has its handle
  void* const next = lent(a, 100);
  expect(next != first && next != larger, "a new stream gets the block of an old one");
}

void test_bound() {
  Stream busy{next_id++};
  void* const kept = lent(busy, 100);
  const int before = frees;
  for (int i = 0; i < 500; ++i) {
    Stream passing{next_id++};
    lent(passing, 100);
    expect(lent(busy, 100) == kept, "a busy stream loses its block");
    expect(report().stream_blocks <= DSV4_WORKSPACE_STREAMS, "more blocks than there may be");
  }
  expect(frees > before, "nothing was freed");
  frees_forbidden = true;
  Stream one_more{next_id++};
  lent(one_more, 100);
  frees_forbidden = false;
  expect(report().stream_blocks == DSV4_WORKSPACE_STREAMS + 1, "no block where none can be freed");
}

void test_graphs() {
  Stream a{next_id++}, b{next_id++};
  std::vector<cudaUserObject_t> graph, other;
  void* const eager = lent(a, 100);
  const size_t streams = report().stream_blocks;
  begin(a, graph, next_capture++);
  begin(b, graph, a.capture);
  void* const first = lent(a, 100);
  expect(first != eager, "a graph has the block of a stream");
  expect(lent(a, 100) == first, "calls of one stream of a graph do not share");
  void* const beside = lent(b, 100);
  expect(beside != first && beside != eager, "streams of a graph share");
  void* const larger = lent(a, 1 << 20);
  expect(larger != first && graph.size() == 3, "the graph does not hold its blocks");
  end(a);
  end(b);
  expect(lent(a, 100) == eager, "the stream's block after the capture");
  begin(a, other, next_capture++);
  void* const second = lent(a, 100);
  expect(second != first && second != beside && second != larger, "two graphs share");
  end(a);
  expect(report().stream_blocks == streams && report().graph_blocks == 4 && report().free_blocks == 0, "the count");
  const size_t bytes = report().bytes;
  destroy(graph);
  expect(report().graph_blocks == 1 && report().free_blocks == 3, "blocks do not come back");
  begin(b, graph, next_capture++);
  void* const again = lent(b, 100);
  expect(again == first || again == beside, "not the smallest that is free");
  expect(lent(b, 1 << 20) == larger && report().bytes == bytes, "allocates where there are free blocks");
  end(b);
  destroy(graph);
  destroy(other);
  expect(report().graph_blocks == 0 && report().free_blocks == 4, "blocks do not come back");
}

void test_failures() {
  dsv4_tensor out = {};
  Stream a{next_id++};
  std::vector<cudaUserObject_t> graph;
  const dsv4_workspace_report before = report();
  out_of_memory = true;
  expect(dsv4_workspace(0, handle(a), 100, &out) == DSV4_ERROR_CUDA, "no memory, no error");
  begin(a, graph, next_capture++);
  expect(dsv4_workspace(0, handle(a), 1 << 24, &out) == DSV4_ERROR_CUDA, "no memory, no error");
  out_of_memory = false;
  retain_fails = true;
  expect(dsv4_workspace(0, handle(a), 100, &out) == DSV4_ERROR_CUDA, "a graph that holds nothing, no error");
  retain_fails = false;
  a.status = cudaStreamCaptureStatusInvalidated;
  expect(dsv4_workspace(0, handle(a), 100, &out) == DSV4_ERROR_CUDA, "a broken capture, no error");
  const dsv4_workspace_report after = report();
  expect(std::memcmp(&before, &after, sizeof(before)) == 0, "a failure leaves something behind");
  expect(mode == cudaStreamCaptureModeGlobal, "the thread's capture mode is not what it was");
  expect(dsv4_workspace(0, handle(a), 100, nullptr) == DSV4_ERROR_INVALID_ARGUMENT, "NULL");
  expect(dsv4_workspace(0, handle(a), SIZE_MAX, &out) == DSV4_ERROR_INVALID_ARGUMENT, "a size that does not exist");
  expect(dsv4_workspace(DSV4_HOST, nullptr, 100, &out) == DSV4_ERROR_HOST_TENSOR, "the host");
  dsv4_workspace_report broken = {};
  expect(dsv4_workspace_usage(0, &broken) == DSV4_ERROR_INVALID_ARGUMENT, "a report of no size");
  expect(dsv4_workspace_usage(0, nullptr) == DSV4_ERROR_INVALID_ARGUMENT, "NULL");
  broken.struct_size = sizeof(broken);
  expect(dsv4_workspace_usage(-1, &broken) == DSV4_ERROR_INVALID_ARGUMENT, "no device");
}

}  // namespace

int main() {
  test_streams();
  test_graphs();
  test_failures();
  test_bound();
  return 0;
}
