// What a fused update works on: one call takes one step with any number of tensors. No include of torch.
//
// Where ranks hold a part of every tensor each, two calls take the step: a layer's step is settled by sums over all of
// it, which the ranks add up in between.
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
  int64_t elements;  // of its whole layer: of all tensors that take part, on all ranks
  int32_t row;       // its layer, a row of the table; does not decrease from slot to slot
  int32_t place;     // where its step count stands
  bool decays;       // whether weight decay acts on it
  Kind kind;
};

// Of each layer: the sums of squares of its direction and of its weights, how many elements are skipped, and what is
// more than 0 if a move was over its limit.
constexpr int kTotals = 4;

struct Call {
  Rule rule;
  std::vector<Slot> slots;
  Options options;
  Control control;
  float sign;                // of the gradient: -1 to maximize
  float* table;              // (layers, kColumns)
  float* steps;              // updates of each tensor so far
  const float* grad_scale;   // gradients are divided by it; may be null
  const float* found_inf;    // nothing happens where it is not 0; may be null
  double* totals = nullptr;  // (layers_of, kTotals); null: this call takes the whole step
  bool settles = false;      // with totals: whether it settles the step by them, or writes them after the first pass
};

// Layers among the slots; in order of appearance they have the totals.
inline int64_t layers_of(const Call& call) {
  int64_t layers = 0;
  for (size_t i = 0; i < call.slots.size(); ++i) layers += i == 0 || call.slots[i].row != call.slots[i - 1].row;
  return layers;
}

// Runs body(begin, end) over parts of [0, count) of at least `grain`, perhaps in several threads.
using ParallelFor =
    std::function<void(int64_t count, int64_t grain, const std::function<void(int64_t begin, int64_t end)>& body)>;

void update_cpu(const Call& call, const ParallelFor& parallel_for);

// How many numbers of scratch update_cuda needs for tensors of these sizes.
int64_t scratch_size(const std::vector<int64_t>& sizes);

// Enqueues the step, or its part, on `stream` (a cudaStream_t) of the current device; std::runtime_error if a launch
// fails. The second part gets the scratch as the first left it.
void update_cuda(const Call& call, double* scratch, void* stream);

}  // namespace lwas
