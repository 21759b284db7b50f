// A layer's step as an inference engine in C++ would run it: its own memory and stream, captured in a CUDA graph that
// is replayed for new tokens, without Python.
//
// Exits with 0 if the results are right, 1 if they are wrong, and kRefused + the library's status if it refuses.
#include <cstdio>

#include "device_memory.h"
#include "expected.h"

namespace {

constexpr int kRefused = 10;
constexpr int32_t kDevice = 0;

int run() {
  using namespace engine;
  const Problem problem = make_problem();
  dsv4::check(dsv4_preload(kDevice));
  open_device();
  const dsv4_stream stream = make_stream();
  const Layer<DeviceArray> layer(problem, kDevice);
  const Graph graph(stream, [&] { layer.step(stream); });
  int wrong = 0;
  for (int step = 0; step < kSteps; ++step) {
    layer.token_ids.write(token_ids(step));
    layer.start_positions.write({static_cast<int32_t>(step * kTokens)});
    graph.launch();
    wait_for(stream);
    wrong += wrong_results(problem, layer, step);
  }
  std::printf("%d steps of %d tokens: routed, through %d experts each, flushed; %d values wrong\n", kSteps,
              static_cast<int>(kTokens), static_cast<int>(kTopK), wrong);
  return wrong ? EXIT_FAILURE : EXIT_SUCCESS;
}

}  // namespace

int main() {
  std::printf("dsv4-kernels %s\n", dsv4_version());
  try {
    return run();
  } catch (const dsv4::Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return kRefused + error.status();
  }
}
