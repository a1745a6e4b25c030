// Random lists of tensors through update_cpu.cpp, against the method in double. Built with sanitizers by
// test_fuzz_update.py, which names the number of lists and the seed; every array is its own allocation, of its exact
// size.
//
// Catches: reads and writes outside an array, elements left out or visited twice at any cut between chunks, tensors and
// layers, wrong types, the two passes disagreeing, counters and step counts gone wrong.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <thread>

#include "../../csrc/update.h"

using namespace lwas;

namespace {

std::mt19937_64 dice;
double uniform(double low, double high) { return std::uniform_real_distribution<double>(low, high)(dice); }
int whole(int low, int high) { return std::uniform_int_distribution<int>(low, high)(dice); }
bool one_in(int n) { return whole(1, n) == 1; }

double to_double(Kind kind, const void* data, int64_t i) {
  if (kind == Kind::kFloat32) return static_cast<const float*>(data)[i];
  if (kind == Kind::kFloat16) return double(static_cast<const _Float16*>(data)[i]);
  const uint32_t bits = uint32_t(static_cast<const uint16_t*>(data)[i]) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

void put(Kind kind, void* data, int64_t i, double value) {
  if (kind == Kind::kFloat32) {
    static_cast<float*>(data)[i] = float(value);
  } else if (kind == Kind::kFloat16) {
    static_cast<_Float16*>(data)[i] = _Float16(value);
  } else {
    const float wide = float(value);
    uint32_t bits;
    std::memcpy(&bits, &wide, sizeof bits);
    static_cast<uint16_t*>(data)[i] = uint16_t(bits >> 16);
  }
}

// An array of its own, which starts `offset` elements behind an aligned address and ends with its allocation.
struct Array {
  std::unique_ptr<char[]> memory;
  void* data;
  Array(int64_t count, int bytes, int offset) : memory(new char[(count + offset) * bytes]) {
    data = memory.get() + offset * bytes;
  }
};

struct Tensor {
  Array param, grad, first, second;
  std::vector<double> weight, gradient, m, v;  // before the step
};

int64_t any_size() {
  if (one_in(8)) return 0;
  if (one_in(12)) return whole(16382, 16386);
  if (one_in(60)) return whole(1000, 70000);
  return whole(1, 400);
}

double any_gradient(double scale) {
  if (one_in(300)) return one_in(2) ? NAN : INFINITY;
  if (one_in(300)) return 3e30;  // finite, but its square is not
  return scale * uniform(-1, 1);
}

int fail(int list, const char* what, double mine, double theirs) {
  std::printf("list %d: %s is %.9g, not %.9g\n", list, what, mine, theirs);
  return 1;
}

bool close(double mine, double theirs, double tolerance) {
  return std::fabs(mine - theirs) <= tolerance || (std::isnan(mine) && std::isnan(theirs));
}

int run(int list) {
  const bool adam = one_in(2), free = one_in(2);
  const double beta1 = one_in(6) ? 0 : uniform(0.5, 0.99), beta2 = one_in(6) ? 0 : uniform(0.9, 0.9999);
  const double decay = one_in(2) ? 0 : uniform(0, one_in(5) ? 3 : 0.1), sign = one_in(2) ? 1 : -1,
               scale = one_in(3) ? 1024 : 1;
  const double eps = adam ? 1e-3 : 0;  // large, so that directions are no rounding errors blown up
  Control c{};
  c.lr = float(uniform(0.2, 1));
  c.ramp = float(one_in(2) ? 1 : uniform(0, 1));
  c.warmup_rate = float(uniform(0, 0.1));
  c.gain = free ? float(uniform(1, 5)) : 1;
  c.warming = one_in(4);
  c.cap = one_in(5) ? INFINITY : float(uniform(0.01, one_in(6) ? 3 : 0.3));
  c.largest_rate = adam && decay > 0 ? float(c.cap / decay) : INFINITY;
  c.rms_floor = 0.01f;
  c.margin = 2;
  const float grad_scale = float(scale), found_inf = one_in(20) ? 1.0f : 0.0f;

  const Rule rule = adam ? (free ? Rule::kFreeAdamW : Rule::kAdamW) : (free ? Rule::kFreeSgd : Rule::kSgd);
  Call call{rule, {}, {}, c, float(sign), nullptr, nullptr, &grad_scale, &found_inf};
  call.options = {float(1 - beta1),
                  float(1 - beta2),
                  float(eps),
                  float(decay),
                  beta1 > 0 ? std::log(beta1) : -INFINITY,
                  beta2 > 0 ? std::log(beta2) : -INFINITY,
                  beta1};
  const int tensors = whole(0, 9);
  int row = whole(0, 1);
  std::vector<Tensor> kept;
  std::vector<float> steps(tensors + 2);
  for (auto& step : steps) step = float(whole(0, 50));
  const double size_of_gradients = std::pow(10, uniform(-3, one_in(9) ? 5 : 1.5));
  for (int t = 0; t < tensors; ++t) {
    const Kind kind = Kind(whole(0, 2));
    const int64_t size = any_size();
    const int bytes = kind == Kind::kFloat32 ? 4 : 2;
    kept.push_back({Array(size, bytes, whole(0, 7)),
                    Array(size, bytes, whole(0, 7)),
                    Array(size, 4, whole(0, 7)),
                    Array(adam ? size : 0, 4, whole(0, 7)),
                    {},
                    {},
                    {},
                    {}});
    Tensor& k = kept.back();
    for (int64_t i = 0; i < size; ++i) {
      put(kind, k.param.data, i, uniform(-1, 1));
      put(kind, k.grad.data, i, any_gradient(size_of_gradients * scale));
      // Iterate and average start together.
      static_cast<float*>(k.first.data)[i] = free && steps[t] == 0 ? 0.0f : float(uniform(-1, 1));
      if (adam) static_cast<float*>(k.second.data)[i] = float(uniform(0, 1));
      k.weight.push_back(to_double(kind, k.param.data, i));
      k.gradient.push_back(to_double(kind, k.grad.data, i));
      k.m.push_back(static_cast<float*>(k.first.data)[i]);
      k.v.push_back(adam ? static_cast<float*>(k.second.data)[i] : 0);
    }
    if (t > 0) row += one_in(2) ? whole(1, 2) : 0;
    call.slots.push_back({k.param.data, k.grad.data, static_cast<float*>(k.first.data),
                          adam ? static_cast<float*>(k.second.data) : nullptr, size, row, t, kind});
  }
  std::vector<float> table((row + 1) * kColumns);
  for (int r = 0; r <= row; ++r) {
    float* of = &table[r * kColumns];
    of[kWeight] = one_in(4) ? 0 : float(uniform(0.1, 1));
    of[kAverage] = of[kWeight] * float(std::pow(10, uniform(-4, 0)));
    of[kLength] = one_in(4) ? 0 : float(one_in(4) ? 1e-6 : uniform(0, 30));
    of[kSize] = of[kLength] > 0 ? float(uniform(0.1, 30)) : 0;
  }
  const std::vector<float> table_before = table, steps_before = steps;
  call.table = table.data();
  call.steps = steps.data();

  const bool threads = one_in(3);
  update_cpu(call, [&](int64_t count, int64_t, const std::function<void(int64_t, int64_t)>& body) {
    if (!threads) return body(0, count);
    std::thread other([&] { body(0, count / 2); });
    body(count / 2, count);
    other.join();
  });

  for (int begin = 0; begin < tensors;) {
    int end = begin;
    while (end < tensors && call.slots[end].row == call.slots[begin].row) ++end;
    const float* before = &table_before[call.slots[begin].row * kColumns];
    const float* after = &table[call.slots[begin].row * kColumns];
    double length = 0, weights = 0, elements = 0, alive = 0;
    std::vector<std::vector<double>> directions(end - begin), rounding(end - begin);
    for (int t = begin; t < end; ++t) {
      Tensor& k = kept[t];
      const double n = steps_before[t] + 1;
      const double correct1 = 1 - std::pow(beta1, n), correct2 = 1 - std::pow(beta2, n);
      elements += double(k.weight.size());
      for (size_t i = 0; i < k.weight.size(); ++i) {
        const double g = sign * k.gradient[i] / scale;
        double d = 0, error = 0;
        if (std::fabs(float(g) * float(g)) <= 3.4e38) {
          alive += 1;
          const double old = k.m[i];
          const double with_decay = g + (adam ? 0 : decay * k.weight[i]);
          if (!free) k.m[i] = beta1 * k.m[i] + (1 - beta1) * with_decay;
          if (adam) k.v[i] = beta2 * k.v[i] + (1 - beta2) * g * g;
          const double divisor = (free ? 1 : correct1) * (adam ? std::sqrt(k.v[i] / correct2) + eps : 1);
          d = -(free ? with_decay : k.m[i]) / divisor;
          error = 2e-7 * ((free ? 0 : std::fabs(old)) + std::fabs(g)) / divisor;  // old and new may cancel
        } else {
          d = NAN;
        }
        directions[t - begin].push_back(d);
        rounding[t - begin].push_back(error);
        length += std::isnan(d) ? 0 : d * d;
        weights += k.weight[i] * k.weight[i];
      }
    }
    const double limit = 2 * before[kSize] / std::sqrt(elements);
    const bool nothing = found_inf != 0, moves = !nothing && (alive > 0 || elements == 0);
    length = std::sqrt(length);
    weights = std::max(std::sqrt(weights), 0.01 * std::sqrt(elements));
    const double rate = !c.warming && before[kWeight] > 0 ? c.gain * before[kAverage] / before[kWeight] : c.warmup_rate;
    const double bound = std::min(length > 0 ? c.cap * weights / length : INFINITY, double(c.largest_rate));
    const double r = std::min(rate, bound) * c.lr * c.ramp,
                 first = std::min(rate, double(c.largest_rate)) * c.lr * c.ramp;
    if (!nothing) {
      // Schedule-free, SGD's gradient and its decay may cancel within a direction.
      const double exact = free && !adam && decay > 0 ? 2e-4 : 5e-5;
      if (!close(after[kApplied], moves ? r : 0, exact * r)) return fail(list, "the applied rate", after[kApplied], r);
      if (after[kSkipped] != (alive < elements)) return fail(list, "skipped", after[kSkipped], alive < elements);
      if (std::fabs(rate - bound) > 1e-4 * bound && after[kCapped] != (moves && rate > bound))
        return fail(list, "capped", after[kCapped], rate > bound);
      if (moves && !close(after[kLength], length, 1e-4 * length)) return fail(list, "length", after[kLength], length);
      if (moves && !close(after[kSize], weights, 1e-5 * weights)) return fail(list, "size", after[kSize], weights);
    }
    for (int t = begin; t < end; ++t) {
      const Tensor& k = kept[t];
      const Kind kind = call.slots[t].kind;
      // Rounding of the parameter's type, also of where the first pass may have moved it.
      const double ulp = kind == Kind::kFloat32 ? 1e-6 : kind == Kind::kBFloat16 ? 8e-3 : 1e-3;
      const double tiny = kind == Kind::kFloat16 ? 6e-8 : 0;  // spacing of its subnormal numbers
      if (steps[t] != steps_before[t] + (moves ? 1 : 0)) return fail(list, "the step count", steps[t], steps_before[t]);
      for (size_t i = 0; i < k.weight.size(); ++i) {
        const double d = directions[t - begin][i], error = rounding[t - begin][i];
        const bool still = nothing || std::isnan(d);
        double expected = still ? k.weight[i] : (adam ? 1 - r * decay : 1) * k.weight[i] + r * d, state = k.m[i];
        // What either pass rounds: the first moves a weight by no more than about the weights' own size.
        double swing = still ? 0 : std::fabs(k.weight[i]) + r * std::fabs(d) + std::min(first * std::fabs(d), limit);
        double average = 0;
        if (free && !still) {  // iterate and average, from what stood there
          average = k.weight[i] - (1 - beta1) * state;
          const double iterate = average + state + r * (d - (adam ? decay * k.weight[i] : 0));
          const double next = average + (iterate - average) / (steps_before[t] + 1);
          swing += std::fabs(state) + first * decay * std::fabs(k.weight[i]);
          expected = beta1 * next + (1 - beta1) * iterate;
          state = iterate - next;
          average = next;
        }
        const double mine = to_double(kind, k.param.data, int64_t(i));
        if (!close(mine, expected, ulp * swing + r * error + (still ? 0 : 2e-5 * r * std::fabs(d)) + tiny))
          return fail(list, "a weight", mine, expected);
        if (nothing) continue;
        const double m = static_cast<float*>(k.first.data)[i];
        // The second pass knows the weight before, and so its decay, up to the rounding of the parameter's type.
        const double moved =
            free && !still ? (1e-6 + 2 * (r + first) * decay * ulp) * swing + r * error + 2e-5 * r * std::fabs(d) : 0;
        // What rounding adds to the weights, the state takes; its steps are 1 / (1 - beta1) times the weights' at most.
        const double settled = free && !still && kind != Kind::kFloat32 ? 2 * (ulp * swing + tiny) / (1 - beta1) : 0;
        if (!close(m, state, 1e-6 * (1 + std::fabs(state)) + moved + settled))
          return fail(list, "the first state", m, state);
        // So that the average stays exact up to one rounding, small as the moves may be.
        if (free && !still && !close(mine - (1 - beta1) * m, average, 2 * ulp * swing + moved + tiny))
          return fail(list, "the average", mine - (1 - beta1) * m, average);
        if (!adam) continue;
        const double v = static_cast<float*>(k.second.data)[i];
        if (!close(v, k.v[i], 1e-6 * (1 + k.v[i]))) return fail(list, "a second moment", v, k.v[i]);
      }
    }
    begin = end;
  }
  return 0;
}

}  // namespace

int main(int, char** arguments) {
  const int lists = std::atoi(arguments[1]);
  dice.seed(std::atoi(arguments[2]));
  for (int list = 0; list < lists; ++list) {
    if (run(list) != 0) return 1;
  }
  std::printf("%d lists agree\n", lists);
}
