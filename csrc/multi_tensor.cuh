// Moves the data of many tensors through registers, chunk by chunk; knows nothing of any formula. No include of torch.
//
// A launch gets its tensors as a table in its arguments, so that nothing has to be copied to the device before, and a
// CUDA graph captures the addresses with the launch. One block works on one chunk and finds the chunk's tensor by
// bisection; so there is no limit to the blocks of a launch, only to its tensors.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "chunks.h"

namespace lwas {

constexpr int kThreads = 256;
// Blocks that share a multiprocessor. Three have 64 bytes a thread or more under way, several times what hides the
// memory's latency, and leave each thread 85 registers: none is spilled, which CI checks.
constexpr int kBlocks = 3;
constexpr int kChunk = 32768;  // elements; divisible by every vector's length, so that all chunks of a tensor align

// 69 bytes a tensor. Arguments of a launch hold 4 KB everywhere, and 32 KB from CUDA 12.1 on, minus the rest's share.
constexpr int kSmallTable = 56;
constexpr int kLargeTable = 464;

template <int kCapacity>
struct Table {
  static constexpr int capacity = kCapacity;
  void* param[kCapacity];
  const void* grad[kCapacity];
  float* first[kCapacity];
  float* second[kCapacity];
  int64_t size[kCapacity];
  int32_t first_chunk[kCapacity];  // in this launch
  int32_t row[kCapacity];
  int32_t place[kCapacity];
  int32_t layer_begin[kCapacity], layer_end[kCapacity];  // chunks of the tensor's layer, in the whole call
  int64_t elements[kCapacity];                           // of the layer
  uint8_t kind[kCapacity];                               // Kind, plus kAligned and kDecays
  int32_t count;
  int32_t chunk_base;  // of this launch, in the whole call
  int32_t chunks;      // of this launch
};
constexpr uint8_t kAligned = 0x80;  // all four arrays start at multiples of 16 bytes
constexpr uint8_t kDecays = 0x40;   // weight decay acts on the tensor

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
__device__ __forceinline__ void narrow(float value, float& to) { to = value; }
__device__ __forceinline__ void narrow(float value, __nv_bfloat16& to) { to = __float2bfloat16_rn(value); }
__device__ __forceinline__ void narrow(float value, __half& to) { to = __float2half_rn(value); }
// The value as a T holds it.
template <typename T>
__device__ __forceinline__ float rounded(float value) {
  T narrowed;
  narrow(value, narrowed);
  return widen(narrowed);
}

// N elements that are loaded and stored in one instruction of at most 16 bytes, or a few.
template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Vector {
  T value[N];
};

// Calls body(weight, gradient, first, second) with references to floats for every element of a chunk, and writes back
// what it changed: the states if kWriteFirst and kWriteSecond, the parameter if `write`. The second is skipped unless
// kSecond.
template <typename T, bool kSecond, bool kWriteFirst, bool kWriteSecond, typename Body>
__device__ __forceinline__ void for_each_element(T* __restrict__ param, const T* __restrict__ grad,
                                                 float* __restrict__ first, float* __restrict__ second, int count,
                                                 bool aligned, bool write, Body body) {
  constexpr int N = 16 / int(sizeof(T));
  const int whole = aligned ? count / N * N : 0;
  using Narrow = Vector<T, N>;
  using Wide = Vector<float, N>;
  for (int i = threadIdx.x * N; i < whole; i += kThreads * N) {
    Narrow p = *reinterpret_cast<const Narrow*>(param + i);
    const Narrow g = *reinterpret_cast<const Narrow*>(grad + i);
    Wide m = *reinterpret_cast<const Wide*>(first + i);
    Wide v{};
    if (kSecond) v = *reinterpret_cast<const Wide*>(second + i);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      float weight = widen(p.value[k]);
      body(weight, widen(g.value[k]), m.value[k], v.value[k]);
      narrow(weight, p.value[k]);
    }
    if (kWriteFirst) *reinterpret_cast<Wide*>(first + i) = m;
    if (kWriteSecond && kSecond) *reinterpret_cast<Wide*>(second + i) = v;
    if (write) *reinterpret_cast<Narrow*>(param + i) = p;
  }
  for (int i = whole + threadIdx.x; i < count; i += kThreads) {
    float weight = widen(param[i]), m = first[i], v = kSecond ? second[i] : 0.0f;
    body(weight, widen(grad[i]), m, v);
    if (kWriteFirst) first[i] = m;
    if (kWriteSecond && kSecond) second[i] = v;
    if (write) narrow(weight, param[i]);
  }
}

// What the blocks of a kernel add up: sums, and one largest value.
constexpr int kSums = 3;
template <typename T>
struct Reduced {
  T sum[kSums];
  T largest;

  __device__ __forceinline__ void take(const Reduced& other) {
    for (int k = 0; k < kSums; ++k) sum[k] += other.sum[k];
    largest = other.largest > largest ? other.largest : largest;
  }
  __device__ __forceinline__ void reduce_warp() {
    for (int offset = 16; offset > 0; offset /= 2) {
      Reduced other;
      for (int k = 0; k < kSums; ++k) other.sum[k] = __shfl_down_sync(0xffffffffu, sum[k], offset);
      other.largest = __shfl_down_sync(0xffffffffu, largest, offset);
      take(other);
    }
  }
};

// Reduces over the block, for thread 0, always in the same order. `shared` holds 32 of them; all threads must call.
template <typename T>
__device__ __forceinline__ void reduce_block(Reduced<T>& value, Reduced<T>* shared) {
  value.reduce_warp();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  __syncthreads();  // whoever used `shared` before is done
  if (lane == 0) shared[warp] = value;
  __syncthreads();
  if (warp == 0) {
    value = lane < kThreads / 32 ? shared[lane] : Reduced<T>{};
    value.reduce_warp();
  }
}

}  // namespace lwas
