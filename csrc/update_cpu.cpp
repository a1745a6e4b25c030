// The fused update on the CPU: chunks of all tensors over the threads, vectorised by the compiler.

#include <cstring>
#include <stdexcept>

#include "chunks.h"
#include "update.h"

// One copy of each loop for every level of x86; the loader picks by what the processor can do. Elsewhere, and under a
// sanitizer, which runs before the loader's choice can, the compiler's default serves.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12 && \
    !defined(__SANITIZE_ADDRESS__)
#define LWAS_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define LWAS_CLONES
#endif

namespace lwas {
namespace {

// 16384 elements and their state fit a core's second cache, so that the second pass over a chunk would be cheap.
constexpr int64_t kChunk = 16384;
constexpr int64_t kSummed = 4096;  // elements summed up in float32 before double takes over
constexpr int64_t kGrain = 32768;  // elements worth a thread

struct Float32 {
  using Storage = float;
  LWAS_HD static float load(float value) { return value; }
  LWAS_HD static float store(float value) { return value; }
};

struct BFloat16 {
  using Storage = uint16_t;
  LWAS_HD static float load(uint16_t value) {
    const uint32_t bits = uint32_t(value) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
  }
  LWAS_HD static uint16_t store(float value) {  // to nearest, ties to even; a NaN stays one
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
  }
};

#ifdef __FLT16_MAX__
struct Float16 {
  using Storage = _Float16;
  LWAS_HD static float load(_Float16 value) { return float(value); }
  LWAS_HD static _Float16 store(float value) { return _Float16(value); }
};
#endif

struct Totals {
  double length = 0, size = 0, skipped = 0;
  float reach = 0;
};

template <typename Rule, typename Type>
LWAS_HD Totals advance_chunk(const Options& options, const Bias& bias, float rate, float limit, float factor,
                             typename Type::Storage* __restrict__ param,
                             const typename Type::Storage* __restrict__ grad, float* __restrict__ first,
                             float* __restrict__ second, int64_t count) {
  const Options o = options;
  const Bias b = bias;
  Totals totals;
  for (int64_t begin = 0; begin < count; begin += kSummed) {
    const int64_t end = std::min(count, begin + kSummed);
    float length = 0, size = 0, skipped = 0, reach = 0;
#pragma omp simd reduction(+ : length, size, skipped) reduction(max : reach)
    for (int64_t i = begin; i < end; ++i) {
      Sums sums;
      float weight = Type::load(param[i]), m = first[i], v = Rule::kSecond ? second[i] : 0.0f;
      const float gradient = Type::load(grad[i]) * factor;
      advance_element<Rule>(o, b, rate, limit, gradient, weight, m, v, sums);
      param[i] = Type::store(weight);  // with momentum and at rate 0 what it was
      if (sizeof(param[i]) < sizeof(float)) settle_state<Rule>(b, gradient, weight, Type::load(param[i]), m);
      first[i] = m;
      if (Rule::kSecond) second[i] = v;
      length += sums.length;
      size += sums.size;
      skipped += sums.skipped;
      reach = sums.reach > reach ? sums.reach : reach;
    }
    totals.length += length;
    totals.size += size;
    totals.skipped += skipped;
    totals.reach = std::max(totals.reach, reach);
  }
  return totals;
}

template <typename Rule, typename Type>
LWAS_HD void correct_chunk(const Options& options, const Bias& bias, float before, float limit, float rate,
                           float factor, typename Type::Storage* __restrict__ param,
                           const typename Type::Storage* __restrict__ grad, float* __restrict__ first,
                           const float* __restrict__ second, int64_t count) {
  const Options o = options;
  const Bias b = bias;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const float v = Rule::kSecond ? second[i] : 0.0f;
    float m = first[i];
    const float gradient = Type::load(grad[i]) * factor;
    const float weight = correct_element<Rule>(o, b, before, limit, rate, gradient, Type::load(param[i]), m, v);
    param[i] = Type::store(weight);
    if (!Rule::kFree) continue;
    if (sizeof(param[i]) < sizeof(float)) settle_state<Rule>(b, gradient, weight, Type::load(param[i]), m);
    first[i] = m;
  }
}

// Templates cannot be cloned for instruction sets; these functions can.
#define LWAS_LOOPS(RULE, TYPE)                                                                                       \
  LWAS_CLONES Totals advance_##RULE##_##TYPE(const Options& o, const Bias& b, float rate, float limit, float factor, \
                                             const Slot& s, int64_t start, int64_t count) {                          \
    using T = TYPE::Storage;                                                                                         \
    return advance_chunk<RULE, TYPE>(o, b, rate, limit, factor, static_cast<T*>(s.param) + start,                    \
                                     static_cast<const T*>(s.grad) + start, s.first + start,                         \
                                     RULE::kSecond ? s.second + start : nullptr, count);                             \
  }                                                                                                                  \
  LWAS_CLONES void correct_##RULE##_##TYPE(const Options& o, const Bias& b, float before, float limit, float rate,   \
                                           float factor, const Slot& s, int64_t start, int64_t count) {              \
    using T = TYPE::Storage;                                                                                         \
    correct_chunk<RULE, TYPE>(o, b, before, limit, rate, factor, static_cast<T*>(s.param) + start,                   \
                              static_cast<const T*>(s.grad) + start, s.first + start,                                \
                              RULE::kSecond ? s.second + start : nullptr, count);                                    \
  }

#define LWAS_ALL_LOOPS(TYPE)  \
  LWAS_LOOPS(AdamW, TYPE)     \
  LWAS_LOOPS(Sgd, TYPE)       \
  LWAS_LOOPS(FreeAdamW, TYPE) \
  LWAS_LOOPS(FreeSgd, TYPE)
LWAS_ALL_LOOPS(Float32)
LWAS_ALL_LOOPS(BFloat16)
#ifdef __FLT16_MAX__
LWAS_ALL_LOOPS(Float16)
#endif

struct Loops {
  decltype(&advance_AdamW_Float32) advance;
  decltype(&correct_AdamW_Float32) correct;
};

#define LWAS_LOOPS_OF(TYPE)                                        \
  switch (rule) {                                                  \
    case Rule::kAdamW:                                             \
      return {advance_AdamW_##TYPE, correct_AdamW_##TYPE};         \
    case Rule::kSgd:                                               \
      return {advance_Sgd_##TYPE, correct_Sgd_##TYPE};             \
    case Rule::kFreeAdamW:                                         \
      return {advance_FreeAdamW_##TYPE, correct_FreeAdamW_##TYPE}; \
    case Rule::kFreeSgd:                                           \
      return {advance_FreeSgd_##TYPE, correct_FreeSgd_##TYPE};     \
  }                                                                \
  break

Loops loops_for(Rule rule, Kind kind) {
  switch (kind) {
    case Kind::kFloat32:
      LWAS_LOOPS_OF(Float32);
    case Kind::kBFloat16:
      LWAS_LOOPS_OF(BFloat16);
    case Kind::kFloat16:
#ifdef __FLT16_MAX__
      LWAS_LOOPS_OF(Float16);
#else
      break;
#endif
  }
  throw std::runtime_error("float16 parameters: not supported by the compiler that built lwas_fast; use foreach=True");
}

struct Layer {
  float* row;
  double elements;
  bool waits, held = false;
  float foreseen, rate;  // `rate` is the first pass's
  Totals totals;
  Settled settled;
};

}  // namespace

void update_cpu(const Call& call, const ParallelFor& parallel_for) {
  if (call.slots.empty()) return;
  const bool first_part = call.totals && !call.settles;
  if (call.found_inf && *call.found_inf != 0) {
    if (first_part) std::fill_n(call.totals, layers_of(call) * kTotals, 0.0);
    return;
  }
  const Control& control = call.control;
  const float factor = call.sign / (call.grad_scale ? *call.grad_scale : 1.0f);
  const int tensors = int(call.slots.size());

  std::vector<int64_t> first_chunk(tensors);
  std::vector<Layer> layers;
  std::vector<int> layer_of(tensors);
  std::vector<Bias> bias(tensors);
  std::vector<float> limit(tensors);
  int64_t chunks = 0, elements = 0;
  for (int i = 0; i < tensors; ++i) {
    const Slot& slot = call.slots[i];
    loops_for(call.rule, slot.kind);  // raises before anything is changed
    first_chunk[i] = chunks;
    chunks += chunks_of(slot.size, kChunk);
    elements += slot.size;
    bias[i] = bias_of(call.options, call.steps[slot.place] + 1, slot.decays);
    if (i == 0 || slot.row != call.slots[i - 1].row) {
      Layer& layer = layers.emplace_back();
      layer.row = call.table + int64_t(slot.row) * kColumns;
      layer.elements = double(slot.elements);
      // Also in the second part, of which the table is still what it was in the first.
      layer.foreseen = foreseen_rate(control, layer.row, layer.elements);
      layer.waits =
          with_rule(call.rule, [&](auto r) { return waits<decltype(r)>(call.options, control, layer.foreseen); });
      layer.rate = layer.waits ? 0.0f : layer.foreseen * multiplier_of(control);
    }
    layer_of[i] = int(layers.size()) - 1;
    limit[i] = limit_of(layers.back().row, layers.back().elements, slot.kind != Kind::kFloat32);
  }

  const int64_t grain = std::max<int64_t>(1, kGrain * chunks / std::max<int64_t>(1, elements));
  const auto each_chunk = [&](const std::function<void(int, int64_t, int64_t, int64_t)>& body) {
    parallel_for(chunks, grain, [&](int64_t begin, int64_t end) {
      int tensor = tensor_of(first_chunk.data(), tensors, begin);
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        while (tensor + 1 < tensors && first_chunk[tensor + 1] <= chunk) ++tensor;
        const int64_t start = (chunk - first_chunk[tensor]) * kChunk;
        body(tensor, chunk, start, std::min(kChunk, call.slots[tensor].size - start));
      }
    });
  };

  if (!call.settles) {
    std::vector<Totals> partial(chunks);
    each_chunk([&](int tensor, int64_t chunk, int64_t start, int64_t count) {
      const Slot& slot = call.slots[tensor];
      const Layer& layer = layers[layer_of[tensor]];
      partial[chunk] = loops_for(call.rule, slot.kind)
                           .advance(call.options, bias[tensor], layer.rate, limit[tensor], factor, slot, start, count);
    });
    for (int i = 0; i < tensors; ++i) {
      Layer& layer = layers[layer_of[i]];
      const int64_t end = i + 1 < tensors ? first_chunk[i + 1] : chunks;
      for (int64_t chunk = first_chunk[i]; chunk < end; ++chunk) {
        layer.totals.length += partial[chunk].length;
        layer.totals.size += partial[chunk].size;
        layer.totals.skipped += partial[chunk].skipped;
        layer.held |= partial[chunk].reach > limit[i];
      }
    }
  }
  if (first_part) {
    double* to = call.totals;
    for (const Layer& layer : layers) {
      for (double sum : {layer.totals.length, layer.totals.size, layer.totals.skipped}) *to++ = sum;
      *to++ = layer.held;
    }
    return;
  }

  bool differs = false;
  const double* from = call.totals;
  for (Layer& layer : layers) {
    Totals& t = layer.totals;
    if (call.settles) {
      for (double* sum : {&t.length, &t.size, &t.skipped}) *sum = *from++;
      layer.held = *from++ > 0;
    }
    layer.settled = settle(control, layer.row, layer.foreseen, layer.waits, layer.held, t.length, t.size, t.skipped,
                           layer.elements);
    differs |= layer.settled.differs();
    record(layer.settled, t.skipped, layer.elements, layer.row);
  }
  for (int i = 0; i < tensors; ++i) call.steps[call.slots[i].place] += layers[layer_of[i]].settled.moves ? 1.0f : 0.0f;

  if (!differs) return;
  each_chunk([&](int tensor, int64_t, int64_t start, int64_t count) {
    const Settled& settled = layers[layer_of[tensor]].settled;
    if (!settled.differs()) return;
    const Slot& slot = call.slots[tensor];
    loops_for(call.rule, slot.kind)
        .correct(call.options, bias[tensor], settled.before, limit[tensor], settled.rate, factor, slot, start, count);
  });
}

}  // namespace lwas
