// Routes a batch of tokens as an inference engine in C++ would: its own memory and stream, one call of the library.
//
// Exits with 0 if the results are right, 1 if they are wrong, and kRefused + the library's status if it refuses.
#include <dsv4/router.h>
#include <dsv4/dsv4.hpp>

#include <cstdio>

#include "device_memory.h"

namespace {

constexpr int kRefused = 10;
constexpr int64_t kVocab = 1000;
constexpr int64_t kTopK = 6;
constexpr int64_t kTokens = 257;
constexpr int32_t kDevice = 0;

int32_t expert(int64_t token_id, int64_t slot) { return static_cast<int32_t>((token_id * 7 + slot * 31) % 256); }

// Every tenth token id lies outside the table, below or above.
int64_t token_id(int64_t token) { return token % 10 == 3 ? (token % 20 == 3 ? -1 : kVocab) : token * 37 % kVocab; }

int count_wrong(const std::vector<float>& weights, const std::vector<int32_t>& ids) {
  int wrong = 0;
  for (int64_t token = 0; token < kTokens; ++token) {
    const int64_t id = token_id(token);
    const bool valid = id >= 0 && id < kVocab;
    for (int64_t slot = 0; slot < kTopK; ++slot) {
      const size_t at = static_cast<size_t>(token * kTopK + slot);
      wrong += ids[at] != (valid ? expert(id, slot) : -1);
      wrong += weights[at] != (valid ? 1.0f / static_cast<float>(kTopK) : 0.0f);
    }
  }
  return wrong;
}

int route() {
  dsv4::check(dsv4_preload(kDevice));
  std::vector<int64_t> token_ids;
  for (int64_t token = 0; token < kTokens; ++token) token_ids.push_back(token_id(token));
  std::vector<int32_t> hash_lut;
  for (int64_t id = 0; id < kVocab; ++id)
    for (int64_t slot = 0; slot < kTopK; ++slot) hash_lut.push_back(expert(id, slot));

  engine::open_device();
  const dsv4_stream stream = engine::make_stream();
  const engine::DeviceArray<int64_t> device_token_ids(token_ids);
  const engine::DeviceArray<int32_t> device_hash_lut(hash_lut);
  const engine::DeviceArray<float> device_weights(std::vector<float>(kTokens * kTopK, -1.0f));
  const engine::DeviceArray<int32_t> device_ids(std::vector<int32_t>(kTokens * kTopK, -2));

  auto args = dsv4::args<dsv4_hash_router_args>();  // what is not set is absent
  args.token_ids = dsv4::view(device_token_ids.data(), {kTokens}, kDevice);
  args.hash_lut = dsv4::view(device_hash_lut.data(), {kVocab, kTopK}, kDevice);
  args.out_weights = dsv4::view(device_weights.data(), {kTokens, kTopK}, kDevice);
  args.out_ids = dsv4::view(device_ids.data(), {kTokens, kTopK}, kDevice);
  dsv4::call(dsv4_hash_router, args, stream);
  engine::wait_for(stream);

  const int wrong = count_wrong(device_weights.read(), device_ids.read());
  std::printf("routed %d tokens to %d experts each, %d values wrong\n", static_cast<int>(kTokens),
              static_cast<int>(kTopK), wrong);
  return wrong ? EXIT_FAILURE : EXIT_SUCCESS;
}

}  // namespace

int main() {
  std::printf("dsv4-kernels %s\n", dsv4_version());
  try {
    return route();
  } catch (const dsv4::Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return kRefused + error.status();
  }
}
