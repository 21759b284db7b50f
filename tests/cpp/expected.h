// What a step must give, by its definition, in double precision.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "layer.h"

namespace engine {

// A problem of numbers that differ everywhere but need no random numbers.
inline Problem make_problem() {
  Problem problem;
  uint32_t state = 1;
  const auto next = [&state](uint32_t below) {
    state = state * 1664525u + 1013904223u;
    return (state >> 16) % below;
  };
  for (int64_t id = 0; id < kVocab; ++id)
    for (int64_t slot = 0; slot < kTopK; ++slot)
      problem.table[id * kTopK + slot] = static_cast<int32_t>((id * 7 + slot * 5) % kExperts);
  for (uint16_t& value : problem.hidden) value = to_bfloat16((static_cast<float>(next(17)) - 8.0f) / 8.0f);
  for (auto* codes : {&problem.first_codes, &problem.second_codes})
    for (uint8_t& code : *codes) code = static_cast<uint8_t>(next(256));
  for (auto* scales : {&problem.first_scales, &problem.second_scales})
    for (uint8_t& scale : *scales) scale = static_cast<uint8_t>(122 + next(3));
  // Values and scores of a token depend on its stream and channel alone: then so do entries.
  for (int64_t token = 0; token < kTokens; ++token)
    for (int64_t column = 0; column < 2 * kHeadDim; ++column) {
      problem.kv[token * 2 * kHeadDim + column] = static_cast<float>(column * 31 % 67 - 33) / 16.0f;
      problem.score[token * 2 * kHeadDim + column] = column < kHeadDim ? 1.0f : 0.0f;
    }
  for (float& weight : problem.norm_weight) weight = 0.5f + static_cast<float>(next(8)) / 8.0f;
  for (int64_t position = 0; position < kPositions; ++position)
    for (int64_t pair = 0; pair < kRope / 2; ++pair) {
      const double angle = static_cast<double>(position) * std::pow(10000.0, -static_cast<double>(pair) / (kRope / 2));
      problem.cos_sin[position * kRope + pair] = static_cast<float>(std::cos(angle));
      problem.cos_sin[position * kRope + kRope / 2 + pair] = static_cast<float>(std::sin(angle));
    }
  return problem;
}

// Row . column of an expert's packed weights [.., rows, inner].
inline double product(const std::vector<double>& x, const std::vector<uint8_t>& codes,
                      const std::vector<uint8_t>& scales, int64_t row) {
  const int64_t inner = static_cast<int64_t>(x.size());
  double sum = 0;
  for (int64_t i = 0; i < inner; ++i)
    sum += x[i] * from_e2m1(&codes[row * inner / 2], i) * from_e8m0(scales[(row * inner + i) / kGroup]);
  return sum;
}

// Experts' sums of one token; an id of -1 adds nothing.
inline std::vector<double> expected_sums(const Problem& problem, int64_t token, const int32_t* ids) {
  std::vector<double> x(kHidden), inner(kInner), sums(kHidden);
  for (int64_t i = 0; i < kHidden; ++i) x[i] = from_bfloat16(problem.hidden[token * kHidden + i]);
  for (int64_t slot = 0; slot < kTopK; ++slot) {
    const int64_t expert = ids[slot];
    if (expert < 0) continue;
    for (int64_t i = 0; i < kInner; ++i) {
      const int64_t row = expert * 2 * kInner + i;
      const double gate = std::min<double>(product(x, problem.first_codes, problem.first_scales, row), kLimit);
      const double up =
          std::clamp<double>(product(x, problem.first_codes, problem.first_scales, row + kInner), -kLimit, kLimit);
      inner[i] = gate / (1 + std::exp(-gate)) * up;
    }
    for (int64_t i = 0; i < kHidden; ++i)
      sums[i] += product(inner, problem.second_codes, problem.second_scales, expert * kHidden + i) / kTopK;
  }
  return sums;
}

// Entry `number` of the request: the softmax over the b columns of the block before and the a columns of its own, norm,
// rotation by the position of its first token.
inline std::vector<double> expected_entry(const Problem& problem, int64_t number) {
  std::vector<double> entry(kHeadDim);
  double squares = 0;
  for (int64_t c = 0; c < kHeadDim; ++c) {
    const double b = problem.kv[c], a = problem.kv[kHeadDim + c];
    const double weight_b = number == 0 ? 0 : std::exp(problem.score[c] - problem.score[kHeadDim + c]);
    entry[c] = (weight_b * b + a) / (weight_b + 1);
    squares += entry[c] * entry[c];
  }
  const double norm = std::sqrt(squares / kHeadDim + kEpsilon);
  for (int64_t c = 0; c < kHeadDim; ++c) entry[c] *= problem.norm_weight[c] / norm;
  const float* angles = &problem.cos_sin[number * kRatio * kRope];
  for (int64_t pair = 0; pair < kRope / 2; ++pair) {
    double& even = entry[kHeadDim - kRope + 2 * pair];
    double& odd = entry[kHeadDim - kRope + 2 * pair + 1];
    const double cosine = angles[pair], sine = angles[kRope / 2 + pair], old = even;
    even = old * cosine - odd * sine;
    odd = old * sine + odd * cosine;
  }
  return entry;
}

// How many of the values are further from what they must be than bfloat16's rounding explains, on the scale of the row.
inline int count_wrong(const uint16_t* got, const std::vector<double>& expected) {
  double scale = 0;
  for (double value : expected) scale = std::max(scale, std::abs(value));
  int wrong = 0;
  for (size_t i = 0; i < expected.size(); ++i)
    wrong += !(std::abs(from_bfloat16(got[i]) - expected[i]) <= scale / 64);  // NaN is wrong
  return wrong;
}

// Tokens of a step. Every tenth lies outside the table, below or above.
inline std::vector<int64_t> token_ids(int step) {
  std::vector<int64_t> ids;
  for (int64_t token = 0; token < kTokens; ++token)
    ids.push_back(token % 10 == 3 ? (token % 20 == 3 ? -1 : kVocab) : (token * 37 + step * 101) % kVocab);
  return ids;
}

// Counts what is wrong in what a step left.
template <typename Layer>
int wrong_results(const Problem& problem, const Layer& layer, int step) {
  const std::vector<int64_t> tokens = token_ids(step);
  const std::vector<int32_t> ids = layer.ids.read();
  const std::vector<float> weights = layer.weights.read();
  const std::vector<uint16_t> sums = layer.sums.read(), pages = layer.pages.read();
  int wrong = 0;
  for (int64_t token = 0; token < kTokens; ++token) {
    const bool valid = tokens[token] >= 0 && tokens[token] < kVocab;
    for (int64_t slot = 0; slot < kTopK; ++slot) {
      const int64_t at = token * kTopK + slot;
      wrong += ids[at] != (valid ? problem.table[tokens[token] * kTopK + slot] : -1);
      wrong += weights[at] != (valid ? 1.0f / static_cast<float>(kTopK) : 0.0f);
    }
    wrong += count_wrong(&sums[token * kHidden], expected_sums(problem, token, &ids[token * kTopK]));
  }
  const int64_t entries = (step + 1) * kTokens / kRatio;  // complete after the step; the rest is untouched
  for (int64_t number = 0; number < entries; ++number)
    wrong += count_wrong(&pages[number * kHeadDim], expected_entry(problem, number));
  for (size_t i = entries * kHeadDim; i < pages.size(); ++i) wrong += pages[i] != 0;
  return wrong;
}

}  // namespace engine
