// Cuts tensors into chunks and chunks into launches. No include of torch or CUDA, so that the CPU's tests cover it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace lwas {

// Chunks of a tensor: one at least, so that an empty tensor's layer is seen too.
inline int64_t chunks_of(int64_t size, int64_t chunk) { return std::max<int64_t>(1, (size + chunk - 1) / chunk); }

// Tensors [first, last), whose chunks are [start, start + chunks) of the whole list's.
struct Launch {
  int first, last;
  int64_t start, chunks;
};

// Launches of at most `capacity` tensors each, which cover every tensor in order.
inline std::vector<Launch> plan(const std::vector<int64_t>& sizes, int64_t chunk, int capacity) {
  std::vector<Launch> launches;
  int64_t start = 0;
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (i % capacity == 0) launches.push_back({int(i), int(i), start, 0});
    const int64_t count = chunks_of(sizes[i], chunk);
    launches.back().last = int(i) + 1;
    launches.back().chunks += count;
    start += count;
  }
  return launches;
}

// The tensor that a chunk belongs to: the last whose first chunk is not behind it. first_chunk increases strictly.
template <typename Index>
#ifdef __CUDACC__
__host__ __device__ __forceinline__
#else
inline
#endif
    int tensor_of(const Index* first_chunk, int count, int64_t chunk) {
  int low = 0;
  for (int high = count; high - low > 1;) {
    const int middle = (low + high) / 2;
    (first_chunk[middle] <= chunk ? low : high) = middle;
  }
  return low;
}

}  // namespace lwas
