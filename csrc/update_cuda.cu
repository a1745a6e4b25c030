// The fused update on CUDA: two launches for all tensors, of which the second most often finds nothing to do. A step in
// two parts has a small one after the first and one before the second.
//
// No include of torch, so that it compiles with the toolkit alone; bindings.cpp brings device, stream and scratch.

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "multi_tensor.cuh"
#include "update.h"

namespace lwas {
namespace {

// What the first pass leaves of a chunk: its sums, whether a move was held back (0 or 1), and what it went by. `state`
// is the tensor's step count with this step, negative where the layer's weights were left alone; it, `limit` and
// `foreseen` are here because the second pass must not read what its own blocks write. The sums are double because in a
// step of two parts those of all ranks take the place of a chunk's.
struct Partial {
  double length, size, skipped;
  float held, state, limit, foreseen;
};

// Where the chunks of some layers begin, and behind the last where its end.
template <int kCapacity>
struct Layers {
  int32_t begin[kCapacity + 1];
  int32_t count;
};

struct Scalars {
  Options options;
  Control control;
  float sign;
  float* table;
  float* steps;
  const float* grad_scale;
  const float* found_inf;
  Partial* partials;
};

static_assert(sizeof(Partial) % sizeof(double) == 0, "what scratch_size counts in");
static_assert(sizeof(Table<kSmallTable>) + sizeof(Scalars) <= 4096, "a launch's arguments everywhere");
static_assert(sizeof(Table<kLargeTable>) + sizeof(Scalars) <= 32764, "a launch's arguments from CUDA 12.1 on");

__device__ __forceinline__ float factor_of(const Scalars& s) { return s.sign / (s.grad_scale ? *s.grad_scale : 1.0f); }

__device__ __forceinline__ Kind kind_of(uint8_t kind) { return Kind(kind & ~(kAligned | kDecays)); }

// Calls body(T{}) with the element type of a tensor.
template <typename Body>
__device__ __forceinline__ void with_type(uint8_t kind, Body body) {
  switch (kind_of(kind)) {
    case Kind::kFloat32:
      return body(float{});
    case Kind::kBFloat16:
      return body(__nv_bfloat16{});
    case Kind::kFloat16:
      return body(__half{});
  }
}

template <typename Rule, int kCapacity>
__global__ void __launch_bounds__(kThreads, kBlocks)
    first_pass(const __grid_constant__ Table<kCapacity> table, const __grid_constant__ Scalars s) {
  if (s.found_inf && *s.found_inf != 0) return;
  const int chunk = blockIdx.x;
  const int tensor = tensor_of(table.first_chunk, table.count, chunk);
  const int64_t start = int64_t(chunk - table.first_chunk[tensor]) * kChunk;
  const int64_t left = table.size[tensor] - start;
  const int count = left < kChunk ? int(left) : kChunk;

  __shared__ Bias bias_shared;
  __shared__ float state_shared, rate_shared, limit_shared, foreseen_shared;
  if (threadIdx.x == 0) {  // double arithmetic, once
    const float* row = s.table + int64_t(table.row[tensor]) * kColumns;
    const float step = s.steps[table.place[tensor]] + 1;
    const double elements = double(table.elements[tensor]);
    const float foreseen = foreseen_rate(s.control, row, elements);
    const bool left_alone = waits<Rule>(s.options, s.control, foreseen);
    bias_shared = bias_of(s.options, step, table.kind[tensor] & kDecays);
    foreseen_shared = foreseen;
    rate_shared = left_alone ? 0.0f : foreseen * multiplier_of(s.control);
    state_shared = left_alone ? -step : step;
    const bool half = kind_of(table.kind[tensor]) != Kind::kFloat32;
    limit_shared = limit_of(row, elements, half);
  }
  __syncthreads();
  const Bias bias = bias_shared;
  const float rate = rate_shared, limit = limit_shared, factor = factor_of(s);
  const bool write = Rule::kFree || state_shared > 0;

  Sums sums;
  with_type(table.kind[tensor], [&](auto type) {
    using T = decltype(type);
    for_each_element<T, Rule::kSecond, true, true>(
        static_cast<T*>(table.param[tensor]) + start, static_cast<const T*>(table.grad[tensor]) + start,
        table.first[tensor] + start, table.second[tensor] + start, count, table.kind[tensor] & kAligned, write,
        [&](float& weight, float gradient, float& m, float& v) {
          advance_element<Rule>(s.options, bias, rate, limit, gradient * factor, weight, m, v, sums);
          if (sizeof(T) < sizeof(float)) settle_state<Rule>(bias, gradient * factor, weight, rounded<T>(weight), m);
        });
  });

  __shared__ Reduced<float> shared[32];
  Reduced<float> value{{sums.length, sums.size, sums.skipped}, sums.reach};
  reduce_block(value, shared);
  if (threadIdx.x == 0) {
    const float held = value.largest > limit ? 1.0f : 0.0f;
    s.partials[table.chunk_base + chunk] = {value.sum[0], value.sum[1], value.sum[2],   held,
                                            state_shared, limit,        foreseen_shared};
  }
}

template <typename Rule, int kCapacity>
__global__ void __launch_bounds__(kThreads, kBlocks)
    second_pass(const __grid_constant__ Table<kCapacity> table, const __grid_constant__ Scalars s) {
  if (s.found_inf && *s.found_inf != 0) return;
  __shared__ Reduced<double> shared[32];
  __shared__ Settled settled_shared;
  __shared__ Bias bias_shared;
  const float factor = factor_of(s);
  // Neighbouring chunks, so that a block meets few layers and adds up each layer's partial sums once.
  const int begin = int(int64_t(table.chunks) * blockIdx.x / gridDim.x);
  const int end = int(int64_t(table.chunks) * (blockIdx.x + 1) / gridDim.x);
  int row = -1;
  for (int chunk = begin; chunk < end; ++chunk) {
    const int tensor = tensor_of(table.first_chunk, table.count, chunk);
    const int layer_begin = table.layer_begin[tensor], layer_end = table.layer_end[tensor];
    const Partial own = s.partials[table.chunk_base + chunk];
    float* statistics = s.table + int64_t(table.row[tensor]) * kColumns;
    if (row != table.row[tensor]) {
      row = table.row[tensor];
      Reduced<double> value{};
      for (int i = layer_begin + threadIdx.x; i < layer_end; i += kThreads) {
        const Partial partial = s.partials[i];
        value.take({{partial.length, partial.size, partial.skipped}, partial.held});
      }
      reduce_block(value, shared);
      if (threadIdx.x == 0) {
        const double elements = double(table.elements[tensor]);
        settled_shared = settle(s.control, statistics, own.foreseen, own.state < 0, value.largest > 0, value.sum[0],
                                value.sum[1], value.sum[2], elements);
        // One block does the bookkeeping; the columns written here are read by no other.
        if (table.chunk_base + chunk == layer_begin) record(settled_shared, value.sum[2], elements, statistics);
      }
      __syncthreads();
    }
    const Settled settled = settled_shared;
    if (threadIdx.x == 0) {
      if (chunk == table.first_chunk[tensor] && settled.moves) s.steps[table.place[tensor]] = fabsf(own.state);
      if (settled.differs()) bias_shared = bias_of(s.options, fabsf(own.state), table.kind[tensor] & kDecays);
    }
    if (!settled.differs()) continue;  // the same for all threads
    __syncthreads();
    const Bias bias = bias_shared;
    const int64_t start = int64_t(chunk - table.first_chunk[tensor]) * kChunk;
    const int64_t left = table.size[tensor] - start;
    with_type(table.kind[tensor], [&](auto type) {
      using T = decltype(type);
      for_each_element<T, Rule::kSecond, Rule::kFree, false>(
          static_cast<T*>(table.param[tensor]) + start, static_cast<const T*>(table.grad[tensor]) + start,
          table.first[tensor] + start, table.second[tensor] + start, left < kChunk ? int(left) : kChunk,
          table.kind[tensor] & kAligned, true, [&](float& weight, float gradient, float& m, float& v) {
            weight = correct_element<Rule>(s.options, bias, settled.before, own.limit, settled.rate, gradient * factor,
                                           weight, m, v);
            if (sizeof(T) < sizeof(float)) settle_state<Rule>(bias, gradient * factor, weight, rounded<T>(weight), m);
          });
    });
    __syncthreads();  // before bias_shared and settled_shared are written again
  }
}

// The end of a step's first part: adds up each layer's partial sums, a block for each, and leaves none in their place.
template <int kCapacity>
__global__ void __launch_bounds__(kThreads) sum_layers(const __grid_constant__ Layers<kCapacity> layers,
                                                       Partial* partials, const float* found_inf, double* totals) {
  __shared__ Reduced<double> shared[32];
  const int layer = blockIdx.x;
  // Where nothing happens there are no partial sums, and yet ranks may add up the totals.
  const int end = found_inf && *found_inf != 0 ? 0 : layers.begin[layer + 1];
  Reduced<double> value{};
  for (int i = layers.begin[layer] + threadIdx.x; i < end; i += kThreads) {
    Partial& partial = partials[i];
    value.take({{partial.length, partial.size, partial.skipped}, partial.held});
    partial.length = partial.size = partial.skipped = partial.held = 0;
  }
  reduce_block(value, shared);
  if (threadIdx.x == 0) {
    for (int k = 0; k < kSums; ++k) totals[layer * kTotals + k] = value.sum[k];
    totals[layer * kTotals + kSums] = value.largest;
  }
}

// The start of the second part: what all ranks found of a layer stands where the first chunk's sums did.
template <int kCapacity>
__global__ void __launch_bounds__(kThreads)
    place_totals(const __grid_constant__ Layers<kCapacity> layers, Partial* partials, const double* totals) {
  const int layer = blockIdx.x * kThreads + threadIdx.x;
  if (layer >= layers.count) return;
  Partial& partial = partials[layers.begin[layer]];
  const double* of = totals + layer * kTotals;
  partial.length = of[0];
  partial.size = of[1];
  partial.skipped = of[2];
  partial.held = of[3] > 0 ? 1.0f : 0.0f;
}

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("lwas_fast: ") + what + ": " + cudaGetErrorString(status));
  }
}

bool aligned(const Slot& slot) {
  const auto bits = reinterpret_cast<uintptr_t>(slot.param) | reinterpret_cast<uintptr_t>(slot.grad) |
                    reinterpret_cast<uintptr_t>(slot.first) | reinterpret_cast<uintptr_t>(slot.second);
  return bits % 16 == 0;
}

// Chunks [begin, end) of the layer that each tensor belongs to.
struct LayerSpan {
  int32_t begin, end;
};

std::vector<LayerSpan> layer_spans(const Call& call) {
  const auto& slots = call.slots;
  std::vector<LayerSpan> spans(slots.size());
  int64_t chunk = 0;
  for (size_t i = 0; i < slots.size();) {
    size_t last = i;
    const int64_t begin = chunk;
    for (; last < slots.size() && slots[last].row == slots[i].row; ++last) {
      chunk += chunks_of(slots[last].size, kChunk);
    }
    for (; i < last; ++i) spans[i] = {int32_t(begin), int32_t(chunk)};
  }
  return spans;
}

// Calls body(layers, number of the first of them) with all layers in turn, as many at a time as a launch takes.
template <int kCapacity, typename Body>
void each_layers(const Call& call, const std::vector<LayerSpan>& spans, Body body) {
  Layers<kCapacity> layers;
  int64_t first = 0;
  layers.count = 0;
  for (size_t i = 0; i < spans.size(); ++i) {
    if (i > 0 && call.slots[i].row == call.slots[i - 1].row) continue;
    if (layers.count == kCapacity) {
      body(layers, first);
      first += kCapacity;
      layers.count = 0;
    }
    layers.begin[layers.count] = spans[i].begin;
    layers.begin[++layers.count] = spans[i].end;
  }
  body(layers, first);
}

template <typename Rule, typename LaunchTable>
void run(const Call& call, const Scalars& scalars, cudaStream_t stream) {
  const auto spans = layer_spans(call);
  std::vector<int64_t> sizes;
  for (const Slot& slot : call.slots) sizes.push_back(slot.size);
  int device = 0, processors = 0;
  check(cudaGetDevice(&device), "no device");
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "device attributes");

  std::vector<LaunchTable> tables;
  for (const Launch& launch : plan(sizes, kChunk, LaunchTable::capacity)) {
    LaunchTable& table = tables.emplace_back();
    table.count = launch.last - launch.first;
    table.chunk_base = int32_t(launch.start);
    table.chunks = int32_t(launch.chunks);
    int64_t chunk = 0;
    for (int i = 0; i < table.count; ++i) {
      const Slot& slot = call.slots[launch.first + i];
      const LayerSpan& span = spans[launch.first + i];
      table.param[i] = slot.param;
      table.grad[i] = slot.grad;
      table.first[i] = slot.first;
      table.second[i] = slot.second;
      table.size[i] = slot.size;
      table.first_chunk[i] = int32_t(chunk);
      table.row[i] = slot.row;
      table.place[i] = slot.place;
      table.layer_begin[i] = span.begin;
      table.layer_end[i] = span.end;
      table.elements[i] = slot.elements;
      table.kind[i] = uint8_t(slot.kind) | (aligned(slot) ? kAligned : 0) | (slot.decays ? kDecays : 0);
      chunk += chunks_of(slot.size, kChunk);
    }
  }
  // A layer may lie in two launches, and the second pass needs all of it.
  if (!call.settles) {
    for (const LaunchTable& table : tables) {
      first_pass<Rule, LaunchTable::capacity><<<table.chunks, kThreads, 0, stream>>>(table, scalars);
      check(cudaGetLastError(), "launch of the update");
    }
  }
  if (call.totals) {
    constexpr int kCapacity = LaunchTable::capacity;
    each_layers<kCapacity>(call, spans, [&](const Layers<kCapacity>& layers, int64_t first) {
      double* totals = call.totals + first * kTotals;
      if (call.settles) {
        const int blocks = (layers.count + kThreads - 1) / kThreads;
        place_totals<kCapacity><<<blocks, kThreads, 0, stream>>>(layers, scalars.partials, totals);
      } else {
        sum_layers<kCapacity><<<layers.count, kThreads, 0, stream>>>(layers, scalars.partials, call.found_inf, totals);
      }
      check(cudaGetLastError(), "launch of the layers' sums");
    });
    if (!call.settles) return;
  }
  for (const LaunchTable& table : tables) {
    const int blocks = std::min(table.chunks, kBlocks * processors);  // as many as run at once
    second_pass<Rule, LaunchTable::capacity><<<blocks, kThreads, 0, stream>>>(table, scalars);
    check(cudaGetLastError(), "launch of the update's second pass");
  }
}

template <typename Rule>
void run_with_table(const Call& call, const Scalars& scalars, cudaStream_t stream) {
#if CUDART_VERSION >= 12010
  static const bool large_tables = [] {
    int driver = 0;
    return cudaDriverGetVersion(&driver) == cudaSuccess && driver >= 12010;
  }();
  if (large_tables && int(call.slots.size()) > kSmallTable) return run<Rule, Table<kLargeTable>>(call, scalars, stream);
#endif
  run<Rule, Table<kSmallTable>>(call, scalars, stream);
}

}  // namespace

int64_t scratch_size(const std::vector<int64_t>& sizes) {
  int64_t chunks = 0;
  for (int64_t size : sizes) chunks += chunks_of(size, kChunk);
  return chunks * int64_t(sizeof(Partial) / sizeof(double));
}

void update_cuda(const Call& call, double* scratch, void* stream) {
  if (call.slots.empty()) return;
  const Scalars scalars{call.options, call.control,    call.sign,      call.table,
                        call.steps,   call.grad_scale, call.found_inf, reinterpret_cast<Partial*>(scratch)};
  const auto on = static_cast<cudaStream_t>(stream);
  with_rule(call.rule, [&](auto rule) { run_with_table<decltype(rule)>(call, scalars, on); });
}

}  // namespace lwas
