// csrc/update_cuda.cu, on a CPU.

#include <cuda_runtime.h>

#include <cmath>

#include "implementation.h"
#include "multi_tensor.cuh"

namespace fuzz {

const Borders kBorders{lwas::kChunk, {lwas::kSmallTable, lwas::kLargeTable}};

void update(const lwas::Call& call, unsigned order) {
  emulator::seed(order);
  emulator::processors = 1 + int(order % 3);
  std::vector<float> partials(size_t(lwas::partial_rows(call)) * lwas::kPartialFloats, NAN);
  lwas::update_cuda(call, partials.data(), nullptr);
}

}  // namespace fuzz
