// The optimizers' formulae, on registers: the one place where they stand in C++.
//
// Host and device, no include of torch. What moves the data (update_cpu.cpp, multi_tensor.cuh) knows nothing of the
// formulae; what stands here knows nothing of memory. lwas_fast/update/plain.py is the same in plain torch, and
// tests/reference.py defines both.
//
// A step takes one pass over parameter, gradient and state. The cap bounds a layer's step by ||W|| / ||d||, which are
// known after the pass only: the pass goes by the norms that the layer's row has of the steps before, and sums up the
// true ones. A second pass corrects, from the state just written, the layers whose step turns out to be far longer than
// the cap, and those of which nothing was known; most often there are none.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define LWAS_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
// Always: the callers are compiled for several instruction sets, and a call out of them would not be.
#define LWAS_HD inline __attribute__((always_inline))
#else
#define LWAS_HD inline
#endif

namespace lwas {

// What a layer's row of statistics holds; a test compares it with lwas_fast.table.Column.
enum Column : int {
  kAverage = 0,
  kWeight = 1,
  kApplied = 4,
  kCapped = 10,
  kSkipped = 11,
  kLength = 12,
  kSize = 13,
  kElements = 14,
  kColumns = 16
};

// Hyperparameters of the direction.
struct Options {
  float share1, share2;  // 1 - beta, worked out in double: 1 - 0.999f is off by 1.3e-5 of itself
  float eps, weight_decay;
  double log_beta1, log_beta2;  // -inf where the beta is 0
  double beta1;
};

// What turns a layer's rate into its step: the same for all layers of a call.
struct Control {
  float lr;  // multiplier; times *lr_tensor where that is given
  const float* lr_tensor;
  float ramp;         // share of the measured rate that is applied in this step
  float warmup_rate;  // the rate in warm-up, and of layers never measured
  float gain;         // what measured rates are multiplied by
  bool warming;
  float cap;           // largest ||r d|| / ||W|| that is aimed at
  float largest_rate;  // largest r, whatever the norms (decoupled decay); may be infinite
  float rms_floor;     // the weights' root mean square counts as this much at least
  float slack;         // a step is corrected when it is longer than this many times the cap
};

// What depends on the tensor alone: on the number of its update, and on whether it decays.
struct Bias {
  float decay;   // Options::weight_decay, or 0
  float first;   // -1 / (1 - beta1^n)
  float second;  // 1 / sqrt(1 - beta2^n)
  // Schedule-free, with c = 1/n the share of the new iterate in the average:
  float ahead;  // 1 - beta1 (1 - c): of a move of the iterate, that the weights make
  float pull;   // beta1 c: of iterate minus average, by which the weights approach the iterate
  float rest;   // 1 - c: of iterate minus average, what is left of it
  // The weights before are those after, minus undo_ahead times the move, minus undo_pull times the state after.
  float undo_ahead;  // ahead - pull
  float undo_pull;   // pull / rest
};

LWAS_HD Bias bias_of(const Options& o, float step, bool decays) {
  Bias b;
  b.decay = decays ? o.weight_decay : 0.0f;
  // expm1: 1 - beta^n would cost float32 four digits at beta = 0.999.
  b.first = float(-1.0 / -expm1(step * o.log_beta1));
  b.second = float(1.0 / sqrt(-expm1(step * o.log_beta2)));
  const double c = 1.0 / step;
  b.ahead = float(1.0 - o.beta1 * (1.0 - c));
  b.pull = float(o.beta1 * c);
  b.rest = float(1.0 - c);
  // In its first update a tensor's state is 0 before and after.
  b.undo_pull = step > 1 ? float(o.beta1 / (step - 1.0)) : 0.0f;
  b.undo_ahead = step > 1 ? float(1.0 - o.beta1) : 1.0f;
  return b;
}

// A gradient counts as finite when its square is: a second moment must not become infinite.
LWAS_HD bool is_finite(float gradient) { return gradient * gradient <= 3.402823466e+38f; }

// (1 - share) * average + share * value. In this form value is the outcome for share 1 to the last bit, and average =
// value stays so for any share.
LWAS_HD float averaged(float average, float value, float share) { return (average - share * average) + share * value; }

// With momentum, the first state is the gradient's average; schedule-free, it is the iterate minus the average of the
// iterates, and the weights are that average plus 1 - beta1 times the state.
struct AdamW {
  static constexpr bool kSecond = true;
  static constexpr bool kDecoupled = true;
  static constexpr bool kFree = false;

  LWAS_HD static void advance(const Options& o, const Bias&, float gradient, float, float& first, float& second) {
    first = averaged(first, gradient, o.share1);
    second = averaged(second, gradient * gradient, o.share2);
  }
  LWAS_HD static float direction(const Options& o, const Bias& b, float, float first, float second) {
    return b.first * first / (sqrtf(second) * b.second + o.eps);
  }
};

struct Sgd {
  static constexpr bool kSecond = false;
  static constexpr bool kDecoupled = false;
  static constexpr bool kFree = false;

  LWAS_HD static void advance(const Options& o, const Bias& b, float gradient, float weight, float& first, float&) {
    first = averaged(first, gradient + b.decay * weight, o.share1);
  }
  LWAS_HD static float direction(const Options&, const Bias& b, float, float first, float) { return b.first * first; }
};

struct FreeAdamW {
  static constexpr bool kSecond = true;
  static constexpr bool kDecoupled = true;
  static constexpr bool kFree = true;

  LWAS_HD static void advance(const Options& o, const Bias&, float gradient, float, float&, float& second) {
    second = averaged(second, gradient * gradient, o.share2);
  }
  LWAS_HD static float direction(const Options& o, const Bias& b, float gradient, float, float second) {
    return -gradient / (sqrtf(second) * b.second + o.eps);
  }
};

// Its direction is without the decay, which acts on the weights beside it: so a step can be taken back.
struct FreeSgd {
  static constexpr bool kSecond = false;
  static constexpr bool kDecoupled = false;
  static constexpr bool kFree = true;

  LWAS_HD static void advance(const Options&, const Bias&, float, float, float&, float&) {}
  LWAS_HD static float direction(const Options&, const Bias&, float gradient, float, float) { return -gradient; }
};

// Schedule-free state, after rounding to the parameter's type has moved a weight from `exact` to `stored`: the iterate
// makes the move that is left. If it made the whole move, small moves would be lost to the weights and pile up in
// the state, and the average, which is the difference, would run off.
template <typename Rule>
LWAS_HD void settle_state(const Bias& b, float gradient, float exact, float stored, float& first) {
  const float next = first + b.rest * ((stored - exact) / b.ahead);  // divided: a factor would cost a register
  if (Rule::kFree) first = is_finite(gradient) ? next : first;
}

template <typename Rule>
LWAS_HD float kept(const Bias& b, float rate) {
  return Rule::kDecoupled ? 1.0f - rate * b.decay : 1.0f;
}

// How far the first pass moves a weight: no further than `limit`, some times the size of a weight, lest taking it back
// leave nothing but the rounding of a runaway.
LWAS_HD float held_back(float move, float limit) {
  const float below = move < limit ? move : limit;
  return below > -limit ? below : -limit;
}

// What a pass sums up of a piece of a layer.
struct Sums {
  float length = 0, size = 0;  // ||d||^2 and ||W||^2, W before the step
  float skipped = 0;           // elements whose gradient is not finite: left alone
  float reach = 0;             // largest |rate * d|: beyond the limit, an element was held back
};

// Selections below choose between values that are worked out in any case: that is what compilers vectorise.

// First pass, one element: the state advances, the weight moves by rate * d.
template <typename Rule>
LWAS_HD void advance_element(const Options& o, const Bias& b, float rate, float limit, float gradient, float& weight,
                             float& first, float& second, Sums& sums) {
  const bool finite = is_finite(gradient);
  float m = first, v = second;
  Rule::advance(o, b, gradient, weight, m, v);
  first = finite ? m : first;
  if (Rule::kSecond) second = finite ? v : second;
  const float direction = Rule::direction(o, b, gradient, m, v);
  const float d = finite ? direction : 0.0f;
  const float move = rate * d;
  const float whole = Rule::kFree && !Rule::kDecoupled && finite ? d - b.decay * weight : d;
  sums.length += whole * whole;
  sums.size += weight * weight;
  sums.skipped += finite ? 0.0f : 1.0f;
  const float size = fabsf(move);
  sums.reach = size > sums.reach ? size : sums.reach;
  if (Rule::kFree) {
    const float step = held_back(move, limit) - rate * b.decay * weight;
    const float next = weight + (b.ahead * step + b.pull * first), offset = b.rest * (first + step);
    weight = finite ? next : weight;
    first = finite ? offset : first;
  } else {
    const float next = kept<Rule>(b, rate) * weight + held_back(move, limit);
    weight = finite ? next : weight;
  }
}

// Second pass, one element: the weight, which the first has moved at the rate `before`, moves by rate * d in its stead.
template <typename Rule>
LWAS_HD float correct_element(const Options& o, const Bias& b, float before, float limit, float rate, float gradient,
                              float weight, float& first, float second) {
  const float d = Rule::direction(o, b, gradient, first, second);
  if (Rule::kFree) {  // moves add up, and only the decay asks for the weight before
    const float moved = held_back(before * d, limit), decay = before * b.decay;
    const float start = (weight - b.undo_ahead * moved - b.undo_pull * first) / (1.0f - b.undo_ahead * decay);
    const float more = (rate * d - moved) - (rate - before) * b.decay * start;
    const float next = weight + b.ahead * more, offset = first + b.rest * more;
    first = is_finite(gradient) ? offset : first;
    return is_finite(gradient) ? next : weight;
  }
  const float back = (weight - held_back(before * d, limit)) / kept<Rule>(b, before);
  const float start = before != 0.0f ? back : weight;
  const float next = kept<Rule>(b, rate) * start + rate * d;
  return is_finite(gradient) ? next : weight;
}

LWAS_HD float rate_of(const Control& c, const float* row) {
  const bool measured = !c.warming && row[kWeight] > 0;
  return measured ? c.gain * (row[kAverage] / row[kWeight]) : c.warmup_rate;
}

LWAS_HD float multiplier_of(const Control& c) { return c.lr * c.ramp * (c.lr_tensor ? *c.lr_tensor : 1.0f); }

// The largest rate of a layer with these norms. Nothing bounds it where there is no direction.
LWAS_HD float bound_of(const Control& c, float size, float length) {
  float bound = length > 0 ? c.cap * size / length : INFINITY;
  if (!(bound >= 0)) bound = 0;  // both norms overflowed
  return c.largest_rate < bound ? c.largest_rate : bound;
}

// A layer's rate by what is known before the pass; infinite where nothing is.
LWAS_HD float foreseen_rate(const Control& c, const float* row, double elements) {
  if (!(row[kSize] > 0) || row[kElements] != float(elements)) return INFINITY;  // never stepped, or other tensors did
  const float rate = rate_of(c, row), bound = bound_of(c, row[kSize], row[kLength]);
  return rate < bound ? rate : bound;
}

// Whether the first pass is to leave a layer's weights alone: because nothing is known of it, or because it decays by
// so much that it could not be taken back.
template <typename Rule>
LWAS_HD bool waits(const Options& o, const Control& c, float foreseen) {
  const bool decays = Rule::kDecoupled || Rule::kFree;
  return foreseen == INFINITY || (decays && !(foreseen * multiplier_of(c) * o.weight_decay < 0.5f));
}

// The limit of its moves, by the root mean square of the layer's weights. A move that is taken back costs a weight the
// digits by which it was longer than the weight, and half precision has few.
LWAS_HD float limit_of(const float* row, double elements, bool half) {
  return (half ? 2.0f : 8.0f) * row[kSize] / sqrtf(float(elements));
}

// What is known of a layer after the first pass.
struct Settled {
  float before, rate;  // what its weights were moved by, and what they are to be moved by
  float length, size;
  bool known, capped, moves, held;

  LWAS_HD bool differs() const { return moves && (held || before != rate); }
};

// `held`: whether a move of the first pass was longer than its limit.
LWAS_HD Settled settle(const Control& c, const float* row, float foreseen, bool waited, bool held, double length,
                       double size, double skipped, double elements) {
  Settled s;
  s.known = foreseen < INFINITY;
  s.held = held && !waited;
  const float floor = c.rms_floor * sqrtf(float(elements));
  s.length = float(sqrt(length));
  s.size = float(sqrt(size));
  if (s.size < floor) s.size = floor;
  s.moves = skipped == 0 || skipped < elements;
  const float uncapped = rate_of(c, row), bound = bound_of(c, s.size, s.length);
  float rate = foreseen > c.slack * bound ? bound : foreseen;
  s.capped = rate < uncapped;
  if (!s.capped) rate = uncapped;
  s.before = waited ? 0.0f : foreseen * multiplier_of(c);
  s.rate = rate * multiplier_of(c);
  return s;
}

// The norm to expect of the next direction: the root mean square over about five steps. An outlier counts as twice the
// average, and an average of longer directions as four times this one, so that it does not shorten steps for long. A
// step without a direction, or with one that overflowed, does not count.
LWAS_HD float expected_length(float before, float now) {
  if (!(now > 0 && now < INFINITY)) return before;
  if (!(before > 0)) return now;
  const float average = before < 4 * now ? before : 4 * now, counted = now < 2 * average ? now : 2 * average;
  const float ratio = counted / average;  // no square of a norm, which may overflow
  return average * sqrtf(0.8f + 0.2f * ratio * ratio);
}

// Bring a layer's row up to date.
LWAS_HD void record(const Settled& s, double skipped, double elements, float* row) {
  row[kApplied] = s.moves ? s.rate : 0.0f;
  if (s.moves) {
    row[kLength] = expected_length(s.known ? row[kLength] : 0.0f, s.length);
    row[kSize] = s.size;
    row[kElements] = float(elements);
  }
  row[kCapped] += s.moves && s.capped ? 1.0f : 0.0f;
  row[kSkipped] += skipped > 0 ? 1.0f : 0.0f;
}

}  // namespace lwas
