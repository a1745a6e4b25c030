// csrc/update_cuda.cu, on a CPU.

#include <cuda_runtime.h>

#include <cmath>

#include "implementation.h"
#include "multi_tensor.cuh"

namespace fuzz {

const Borders kBorders{lwas::kChunk, {lwas::kSmallTable, lwas::kLargeTable}};

void update(const lwas::Call& call, unsigned order, std::vector<double>& scratch) {
  emulator::seed(order);
  emulator::processors = 1 + int(order % 3);
  std::vector<int64_t> sizes;
  for (const lwas::Slot& slot : call.slots) sizes.push_back(slot.size);
  if (!call.settles) scratch.assign(size_t(lwas::scratch_size(sizes)), NAN);
  lwas::update_cuda(call, scratch.data(), nullptr);
}

}  // namespace fuzz
