#include "method.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

using namespace lwas;

namespace fuzz {
namespace {

// What a layer's step is, worked out from its row before the step and from its true norms.
struct Applied {
  double first;  // the first pass moves by no more than this rate
  double usual;  // root mean square of the weights as the row has it; the first pass moves by a multiple at most
  double rate;
  double length;  // that is expected of the next direction
  bool capped;
  bool sure;  // not so close to a decision that float32 may rightly take the other one
};

// THE RULE OF THE CAP STANDS HERE, and nowhere else in these files.
Applied apply_cap(const Control& c, const float* row, double length, double size, double elements) {
  const double multiplier = double(c.lr) * c.ramp * (c.lr_tensor ? *c.lr_tensor : 1.0f);
  const double rate = !c.warming && row[kWeight] > 0 ? c.gain * row[kAverage] / row[kWeight] : c.warmup_rate;
  const auto largest = [&](double size, double length) {
    return std::min(length > 0 ? c.cap * size / length : INFINITY, double(c.largest_rate));
  };
  // By the norms known before the step, but where nothing was, or where the step would be far longer than the cap.
  const double expected = row[kLength], bound = largest(size, length);
  const bool known = row[kSize] > 0 && row[kElements] == float(elements);
  const double foreseen = std::min(rate, largest(row[kSize], expected));
  const double taken = known && foreseen <= c.slack * bound ? foreseen : std::min(rate, bound);
  const double average = std::min(known ? expected : 0, 4 * length), outlier = std::min(length, 2 * average);
  const double next = !(length > 0)    ? (known ? expected : 0)
                      : !(average > 0) ? length
                                       : std::sqrt(0.8 * average * average + 0.2 * outlier * outlier);
  const auto apart = [](double one, double two) { return !(std::fabs(one / two - 1) <= 1e-4); };
  return {known ? foreseen * multiplier : 0,
          row[kSize] / std::sqrt(elements),
          taken * multiplier,
          next,
          taken < rate,
          apart(foreseen, c.slack * bound) && apart(rate, bound) && apart(rate, largest(row[kSize], expected))};
}

// Hyperparameters of a call.
struct Method {
  bool adam, free;
  double beta1, beta2, eps, decay, factor;

  explicit Method(const Call& call)
      : adam(call.rule == Rule::kAdamW || call.rule == Rule::kFreeAdamW),
        free(call.rule == Rule::kFreeAdamW || call.rule == Rule::kFreeSgd),
        beta1(call.options.beta1),
        beta2(std::exp(call.options.log_beta2)),
        eps(call.options.eps),
        decay(call.options.weight_decay),
        factor(call.sign / double(call.grad_scale ? *call.grad_scale : 1.0f)) {}
};

// An element of a tensor: its state after the gradient came, and where that points.
struct Element {
  bool alive;  // its gradient is finite
  double weight, first, second;
  double direction;
  double divisor;   // of the sum that the direction is a multiple of
  double rounding;  // of that sum, in float32: its terms may cancel
};

Element advance(const Method& m, double decay, double n, double weight, double gradient, double first, double second) {
  Element e{true, weight, first, second, 0, 1, 0};
  const double g = m.factor * gradient;
  e.alive = std::fabs(float(g) * float(g)) <= 3.4e38;
  if (!e.alive) return e;
  const double with_decay = g + (m.adam ? 0 : decay * weight);
  if (!m.free) e.first = m.beta1 * first + (1 - m.beta1) * with_decay;
  if (m.adam) e.second = m.beta2 * second + (1 - m.beta2) * g * g;
  const double root = m.adam ? std::sqrt(e.second / (1 - std::pow(m.beta2, n))) + m.eps : 1;
  e.divisor = root * (m.free ? 1 : 1 - std::pow(m.beta1, n));
  e.direction = -(m.free ? with_decay : e.first) / e.divisor;
  e.rounding = 2e-7 * ((m.free ? 0 : std::fabs(first)) + std::fabs(g));
  return e;
}

// The tensors [begin, end) of a call, which are a layer.
class Layer {
 public:
  Layer(const Call& call, const Snapshot& before, int begin, int end)
      : call_(call), method_(call), before_(before), begin_(begin), end_(end) {
    double length = 0, size = 0;
    for (int t = begin; t < end; ++t) {
      const Slot& slot = call.slots[t];
      const double n = before.steps[slot.place] + 1;
      auto& elements = elements_.emplace_back();
      elements.reserve(size_t(slot.size));
      for (int64_t i = 0; i < slot.size; ++i) {
        const Element& e = elements.emplace_back(
            advance(method_, slot.decays ? method_.decay : 0, n, load(slot.kind, before.params[t].data(), i),
                    load(slot.kind, slot.grad, i), load(Kind::kFloat32, before.firsts[t].data(), i),
                    method_.adam ? load(Kind::kFloat32, before.seconds[t].data(), i) : 0));
        length += e.direction * e.direction;
        size += e.weight * e.weight;
        alive_ += e.alive;
        count_ += 1;
      }
    }
    length_ = std::sqrt(length);
    size_ = std::max(std::sqrt(size), call.control.rms_floor * std::sqrt(count_));
    moves_ = alive_ > 0 || count_ == 0;
    applied_ = apply_cap(call.control, &before.table[call.slots[begin].row * kColumns], length_, size_, count_);
  }

  std::string compare(bool& overflow) const {
    std::string wrong = compare_row();
    for (int t = begin_; t < end_ && wrong.empty(); ++t) wrong = compare_tensor(t, overflow);
    return wrong;
  }

 private:
  std::string wrong(const char* what, double mine, double theirs, int tensor = -1, int64_t i = -1) const {
    char text[200];
    std::snprintf(text, sizeof text, "%s is %.9g, not %.9g (rule %d, row %d, tensor %d, element %lld)", what, mine,
                  theirs, int(call_.rule), call_.slots[begin_].row, tensor, static_cast<long long>(i));
    return text;
  }

  static bool close(double mine, double theirs, double tolerance) {
    return std::fabs(mine - theirs) <= tolerance || (std::isnan(mine) && std::isnan(theirs));
  }

  std::string compare_row() const {
    const float* before = &before_.table[call_.slots[begin_].row * kColumns];
    const float* after = call_.table + call_.slots[begin_].row * kColumns;
    // Sums in float32 lose digits behind a few large elements. Schedule-free, SGD's gradient and its decay may cancel
    // within a direction.
    const double exact = method_.free && !method_.adam && method_.decay > 0 ? 2e-4 : 1e-4;
    const double rate = moves_ ? applied_.rate : 0, length = moves_ ? applied_.length : before[kLength],
                 size = moves_ ? size_ : before[kSize];
    const bool skipped = alive_ < count_, capped = moves_ && applied_.capped;
    if (applied_.sure && !close(after[kApplied], rate, exact * rate))
      return wrong("the applied rate", after[kApplied], rate);
    if (!close(after[kLength], length, 1e-4 * length)) return wrong("length", after[kLength], length);
    if (!close(after[kSize], size, 1e-4 * size)) return wrong("size", after[kSize], size);
    const float elements = moves_ ? float(count_) : before[kElements];
    if (after[kElements] != elements) return wrong("elements", after[kElements], elements);
    if (after[kSkipped] != before[kSkipped] + skipped)
      return wrong("skipped", after[kSkipped], before[kSkipped] + skipped);
    if (applied_.sure && after[kCapped] != before[kCapped] + capped)
      return wrong("capped", after[kCapped], before[kCapped] + capped);
    for (int column = 0; column < kColumns; ++column) {
      const bool ours = column == kApplied || column >= kCapped;
      if (!ours && after[column] != before[column]) return wrong("a column", after[column], before[column]);
    }
    return {};
  }

  std::string compare_tensor(int t, bool& overflow) const {
    const Slot& slot = call_.slots[t];
    const double steps = before_.steps[slot.place];
    if (call_.steps[slot.place] != steps + moves_) return wrong("the step count", call_.steps[slot.place], steps, t);
    for (int64_t i = 0; i < slot.size; ++i) {
      const Element& e = elements_[t - begin_][size_t(i)];
      const std::string wrong = compare_element(t, i, e, steps, overflow);
      if (!wrong.empty()) return wrong;
    }
    return {};
  }

  std::string compare_element(int t, int64_t i, const Element& e, double steps, bool& overflow) const {
    const Slot& slot = call_.slots[t];
    const Method& m = method_;
    const double decay = slot.decays ? m.decay : 0;
    // Its own rate, which compare_row has found right up to the rounding of the norms.
    const double r = call_.table[slot.row * kColumns + kApplied], first = applied_.first, d = std::fabs(e.direction);
    // Rounding of the parameter's type, also of where the first pass may have moved it.
    const double ulp = slot.kind == Kind::kFloat32 ? 1e-6 : slot.kind == Kind::kBFloat16 ? 8e-3 : 1e-3;
    const double tiny = slot.kind == Kind::kFloat16 ? 6e-8 : 0;  // spacing of its subnormal numbers
    double weight = e.weight, state = e.first, average = 0;
    // What either pass rounds: the first moves a weight by no more than a few times the weights' own size.
    const double limit = applied_.usual * (slot.kind == Kind::kFloat32 ? 8 : 2);
    double swing = std::fabs(e.weight) + r * d + std::min(first * d, limit);
    if (!e.alive) {
      swing = 0;
    } else if (m.free) {  // iterate and average, from what stood there
      swing += std::fabs(state) + first * decay * std::fabs(e.weight);
      average = e.weight - (1 - m.beta1) * state;
      const double iterate = average + state + r * (e.direction - (m.adam ? decay * e.weight : 0));
      average += (iterate - average) / (steps + 1);
      weight = m.beta1 * average + (1 - m.beta1) * iterate;
      state = iterate - average;
    } else {
      weight += r * (e.direction - (m.adam ? decay * e.weight : 0));
    }
    const double mine = load(slot.kind, slot.param, i);
    if (slot.kind == Kind::kFloat16 && std::isinf(mine) && std::fabs(weight) > 65400) {
      overflow = true;
      return {};
    }
    const double direction = e.alive ? r * (e.rounding / e.divisor + 2e-5 * d) : 0;
    if (!close(mine, weight, ulp * swing + direction + tiny)) return wrong("a weight", mine, weight, t, i);

    double exact = 1e-6 * (1 + std::fabs(state)) + e.rounding;
    if (m.free && e.alive) {
      // The second pass knows the weight before, and so its decay, up to the rounding of the parameter's type.
      const double moved = (1e-6 + 2 * (r + first) * decay * ulp) * swing + direction;
      const double off = mine - (1 - m.beta1) * slot.first[i];
      // What rounding adds to the weights counts as a move of the iterate, of which the average takes its share alone:
      // otherwise the roundings of many small moves would pile up in it.
      const double share = 1 / (steps + 1), part = share / (1 - m.beta1 * (1 - share));
      if (!close(off, average, 2 * part * (ulp * swing + tiny) + 2e-6 * swing + moved))
        return wrong("the average", off, average, t, i);
      // What rounding adds to the weights, the state takes; its steps are 1 / (1 - beta1) times the weights' at most.
      exact += moved + (slot.kind == Kind::kFloat32 ? 0 : 2 * (ulp * swing + tiny) / (1 - m.beta1));
    }
    if (!close(slot.first[i], state, exact)) return wrong("the first state", slot.first[i], state, t, i);
    if (m.adam && !close(slot.second[i], e.second, 1e-6 * (1 + e.second)))
      return wrong("a second moment", slot.second[i], e.second, t, i);
    return {};
  }

  const Call& call_;
  const Method method_;
  const Snapshot& before_;
  const int begin_, end_;
  std::vector<std::vector<Element>> elements_;  // of each tensor
  double count_ = 0, alive_ = 0;
  double length_, size_;
  bool moves_;
  Applied applied_;
};

}  // namespace

std::string compare(const Call& call, const Snapshot& before, bool& overflow) {
  const int tensors = int(call.slots.size());
  std::string wrong;
  for (int begin = 0; begin < tensors && wrong.empty();) {
    int end = begin;
    while (end < tensors && call.slots[end].row == call.slots[begin].row) ++end;
    wrong = Layer(call, before, begin, end).compare(overflow);
    begin = end;
  }
  return wrong;
}

}  // namespace fuzz
