// What a fused update works on: one call takes one step with any number of tensors. No include of torch.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "update_math.h"

namespace lwas {

enum class Rule : uint8_t { kAdamW, kSgd, kFreeAdamW, kFreeSgd };
enum class Kind : uint8_t { kFloat32, kBFloat16, kFloat16 };  // of parameter and gradient; state is float32

// Calls body(R{}) with the formulae R of a rule.
template <typename Body>
auto with_rule(Rule rule, Body body) {
  switch (rule) {
    case Rule::kAdamW:
      return body(AdamW{});
    case Rule::kSgd:
      return body(Sgd{});
    case Rule::kFreeAdamW:
      return body(FreeAdamW{});
    default:
      return body(FreeSgd{});
  }
}

// One tensor. The four arrays have `size` elements each and lie in memory in the same order.
struct Slot {
  void* param;
  const void* grad;
  float* first;
  float* second;  // null for Sgd and FreeSgd
  int64_t size;
  int32_t row;    // its layer, a row of the table; does not decrease from slot to slot
  int32_t place;  // where its step count stands
  bool decays;    // whether weight decay acts on it
  Kind kind;
};

struct Call {
  Rule rule;
  std::vector<Slot> slots;
  Options options;
  Control control;
  float sign;               // of the gradient: -1 to maximize
  float* table;             // (layers, kColumns)
  float* steps;             // updates of each tensor so far
  const float* grad_scale;  // gradients are divided by it; may be null
  const float* found_inf;   // nothing happens where it is not 0; may be null
};

// Runs body(begin, end) over parts of [0, count) of at least `grain`, perhaps in several threads.
using ParallelFor =
    std::function<void(int64_t count, int64_t grain, const std::function<void(int64_t begin, int64_t end)>& body)>;

void update_cpu(const Call& call, const ParallelFor& parallel_for);

// Rows of partial sums that update_cuda needs as scratch, of so many floats each.
constexpr int kPartialFloats = 7;
int64_t partial_rows(const Call& call);

// Enqueues the step on `stream` (a cudaStream_t) of the current device; std::runtime_error if a launch fails.
void update_cuda(const Call& call, float* partials, void* stream);

}  // namespace lwas
