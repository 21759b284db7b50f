// The steps of engine.cpp on host memory, for a test that runs the kernels in the emulator.
#include <dsv4/testing.h>

#include "expected.h"
#include "host_memory.h"

// Tells `memory` of every array, hands every launch of `steps` steps on a device of that architecture to `observer`,
// and returns how many results are wrong; -1 if the library refuses, with dsv4_last_error().
extern "C" int steps_on_host(const char* architecture, int32_t multiprocessors, int32_t steps,
                             void (*memory)(void* data, size_t bytes), dsv4_launch_observer observer) {
  using namespace engine;
  on_host_memory = memory;
  int wrong = 0;
  try {
    dsv4::check(dsv4_observe_launches(architecture, multiprocessors, observer, nullptr));
    const Problem problem = make_problem();
    const Layer<HostArray> layer(problem, DSV4_HOST);
    for (int step = 0; step < steps; ++step) {
      layer.token_ids.write(token_ids(step));
      layer.start_positions.write({static_cast<int32_t>(step * kTokens)});
      layer.step(nullptr);
      wrong += wrong_results(problem, layer, step);
    }
  } catch (const dsv4::Error&) {
    wrong = -1;
  }
  dsv4_observe_launches(nullptr, 0, nullptr, nullptr);
  return wrong;
}
