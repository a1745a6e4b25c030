// As much of CUDA as csrc/update_cuda.cu asks for, on a CPU: emulator.cpp runs its kernels.
//
// Three things of the language have no counterpart in C++; test_fuzz_cuda.py rewrites two of them in the source, the
// launch `kernel<<<blocks, threads, 0, stream>>>(arguments)` and parameters that are __grid_constant__.
#pragma once

#include <algorithm>  // nvcc's own header brings these, and sources count on it
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // the third: blocks run one after the other, so one copy serves all

#ifndef CUDART_VERSION
#define CUDART_VERSION 13000
#endif

namespace emulator {

using Where = std::source_location;

extern int processors;  // of the device; kernels may cut their work by it
extern int driver;      // its driver's version; from the variable EMULATED_DRIVER, as programs ask once

// Random orders of blocks, warps and threads follow from it.
void seed(uint32_t value);

// Runs a kernel to its end. Ends the program where CUDA leaves open what happens: threads of a block at different
// barriers, or a warp of which a part shuffles.
void launch(int blocks, int threads, int shared, void* stream, const std::function<void()>& kernel);

void wait_for_block(const Where& where);
uint64_t shuffle_down(uint32_t mask, uint64_t bits, int offset, const Where& where);

}  // namespace emulator

struct uint3 {
  unsigned x, y, z;
};
extern uint3 threadIdx, blockIdx, blockDim, gridDim;

inline void __syncthreads(const emulator::Where& where = emulator::Where::current()) {
  emulator::wait_for_block(where);
}

template <typename T>
T __shfl_down_sync(uint32_t mask, T value, int offset, const emulator::Where& where = emulator::Where::current()) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = emulator::shuffle_down(mask, bits, offset, where);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };

inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  return *value = emulator::processors, cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = emulator::driver, cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
