#include "list.h"

#include <algorithm>
#include <cmath>
#include <cstring>

using namespace lwas;

namespace fuzz {
namespace {

int64_t any_size(Dice& dice, const Borders& borders, bool many) {
  if (dice.one_in(8)) return 0;
  if (many) return dice.whole(1, 40);
  if (dice.one_in(16)) return dice.whole(borders.chunk - 2, borders.chunk + 2);
  if (dice.one_in(60)) return dice.whole(1000, 4 * borders.chunk + 4000);
  return dice.whole(1, 400);
}

// On both sides of each table's end, the rarer the longer: so each takes its share of the time.
int any_count(Dice& dice, const Borders& borders) {
  for (int table : borders.tables) {
    if (dice.one_in(table)) return dice.whole(table - 3, table + 9);
  }
  return dice.whole(0, 9);
}

double any_gradient(Dice& dice, double size) {
  const int kind = dice.whole(1, 300);
  if (kind == 1) return dice.one_in(2) ? NAN : INFINITY;
  if (kind == 2) return 3e30;  // finite, but its square is not
  return size * dice.uniform(-1, 1);
}

int bytes_of(Kind kind) { return kind == Kind::kFloat32 ? 4 : 2; }

Snapshot::Bytes bytes(const Array& array) { return {array.data, array.data + array.bytes}; }

void put_back(const Snapshot::Bytes& from, Array& to) { std::copy(from.begin(), from.end(), to.data); }

float* floats(Array& array) { return reinterpret_cast<float*>(array.data); }

}  // namespace

double load(Kind kind, const void* data, int64_t i) {
  if (kind == Kind::kFloat32) return static_cast<const float*>(data)[i];
  if (kind == Kind::kFloat16) return double(static_cast<const _Float16*>(data)[i]);
  const uint32_t bits = uint32_t(static_cast<const uint16_t*>(data)[i]) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

void store(Kind kind, void* data, int64_t i, double value) {
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

Array::Array(int64_t count, int element, int offset)
    : memory(new char[(count + offset) * element]), data(memory.get() + offset * element), bytes(count * element) {}

List::List(Dice& dice, const Borders& borders) : call{} {
  draw_options(dice);
  const bool adam = call.rule == Rule::kAdamW || call.rule == Rule::kFreeAdamW;
  const bool free = call.rule == Rule::kFreeAdamW || call.rule == Rule::kFreeSgd;
  const int count = any_count(dice, borders);
  const int shared = dice.whole(1, 4);  // a row goes on for another tensor more or less often
  steps_.resize(count + 2);
  for (float& step : steps_) step = dice.one_in(5) ? 0 : float(dice.whole(0, 50));
  const int turn = dice.whole(0, count + 1);  // places are in another order than the tensors
  int row = dice.whole(0, 1);
  tensors_.reserve(count);
  for (int t = 0; t < count; ++t) {
    const Kind kind = Kind(dice.whole(0, 2));
    const int64_t size = any_size(dice, borders, count > 20);
    const int place = (t + turn) % (count + 2);
    const auto offset = [&] { return dice.one_in(2) ? 0 : dice.whole(0, 7); };
    const int together = offset();  // now and then all four are aligned
    const auto array = [&](int64_t elements, int element) {
      return Array(elements, element, dice.one_in(2) ? together : offset());
    };
    Tensor& tensor = tensors_.emplace_back(
        Tensor{array(size, bytes_of(kind)), array(size, bytes_of(kind)), array(size, 4), array(adam ? size : 0, 4)});
    for (int64_t i = 0; i < size; ++i) {
      store(kind, tensor.param.data, i, dice.uniform(-1, 1));
      // Iterate and average start together.
      floats(tensor.first)[i] = free && steps_[place] == 0 ? 0.0f : float(dice.uniform(-1, 1));
      if (adam) floats(tensor.second)[i] = float(dice.uniform(0, 1));
    }
    if (t > 0 && dice.one_in(shared)) row += dice.whole(1, 2);
    call.slots.push_back({tensor.param.data, tensor.grad.data, floats(tensor.first),
                          adam ? floats(tensor.second) : nullptr, size, 0, row, place, !dice.one_in(4), kind});
  }
  table_.resize((row + 1) * kColumns);
  for (int r = 0; r <= row; ++r) {
    float* of = &table_[r * kColumns];
    draw_rates(dice, of);
    of[kLength] = dice.one_in(4) ? 0 : float(dice.one_in(4) ? 1e-6 : dice.uniform(0, 30));
    of[kSize] = of[kLength] > 0 ? float(dice.uniform(0.1, 30)) : 0;
  }
  for (const Slot& slot : call.slots) table_[slot.row * kColumns + kElements] += float(slot.size);
  for (Slot& slot : call.slots) slot.elements = int64_t(table_[slot.row * kColumns + kElements]);
  for (int r = 0; r <= row; ++r) table_[r * kColumns + kElements] += dice.one_in(9) ? 1 : 0;  // other tensors stepped
  call.table = table_.data();
  call.steps = steps_.data();
  draw_gradients(dice, 1);
}

void List::draw_options(Dice& dice) {
  const bool adam = dice.one_in(2), free = dice.one_in(2);
  const double beta1 = dice.one_in(6) ? 0 : dice.uniform(0.5, 0.99);
  const double beta2 = dice.one_in(6) ? 0 : dice.uniform(0.9, 0.9999);
  const double decay = dice.one_in(2) ? 0 : dice.uniform(0, dice.one_in(5) ? 3 : 0.1);
  const double eps = adam ? 1e-3 : 0;  // large, so that directions are no rounding errors blown up
  call.rule = adam ? (free ? Rule::kFreeAdamW : Rule::kAdamW) : (free ? Rule::kFreeSgd : Rule::kSgd);
  call.options = {float(1 - beta1),
                  float(1 - beta2),
                  float(eps),
                  float(decay),
                  beta1 > 0 ? std::log(beta1) : -INFINITY,
                  beta2 > 0 ? std::log(beta2) : -INFINITY,
                  beta1};
  Control& c = call.control;
  c.lr = float(dice.uniform(0.2, 1));
  lr_ = float(dice.uniform(0.2, 1));
  c.lr_tensor = dice.one_in(3) ? &lr_ : nullptr;
  c.ramp = float(dice.one_in(2) ? 1 : dice.uniform(0, 1));
  c.warmup_rate = float(dice.uniform(0, 0.1));
  c.gain = free ? float(dice.uniform(1, 5)) : 1;
  c.warming = dice.one_in(4);
  c.cap = dice.one_in(5) ? INFINITY : float(dice.uniform(0.01, dice.one_in(6) ? 3 : 0.3));
  c.largest_rate = adam && decay > 0 ? float(c.cap / decay) : INFINITY;
  c.rms_floor = 0.01f;
  c.slack = 1.25;
  call.sign = dice.one_in(2) ? 1 : -1;
  grad_scale_ = dice.one_in(2) ? 1 : 1024;
  call.grad_scale = dice.one_in(2) ? &grad_scale_ : nullptr;
  call.found_inf = dice.one_in(2) ? &found_inf_ : nullptr;
  gradients_ = std::pow(10, dice.uniform(-3, dice.one_in(9) ? 5 : 1.5));
}

void List::draw_rates(Dice& dice, float* row) {
  row[kWeight] = dice.one_in(4) ? 0 : float(dice.uniform(0.1, 1));
  row[kAverage] = row[kWeight] * float(std::pow(10, dice.uniform(-4, 0)));
}

void List::draw_gradients(Dice& dice, double spike) {
  const double size = gradients_ * (call.grad_scale ? grad_scale_ : 1);
  const int which = dice.whole(0, std::max(0, int(tensors_.size()) - 1));  // all of them, or one
  const bool all = dice.one_in(2);
  for (int t = 0; t < int(tensors_.size()); ++t) {
    const Slot& slot = call.slots[t];
    const double own = dice.one_in(15) ? NAN : all || t == which ? size * spike : size;
    for (int64_t i = 0; i < slot.size; ++i) store(slot.kind, tensors_[t].grad.data, i, any_gradient(dice, own));
  }
  found_inf_ = dice.one_in(10) ? 1.0f : 0.0f;
}

void List::rescale_weights(Dice& dice, int tensor) {
  const Slot& slot = call.slots[tensor];
  const double factor = std::pow(10, dice.uniform(-2, 1));
  for (int64_t i = 0; i < slot.size; ++i) {
    const double weight = factor * load(slot.kind, slot.param, i);
    store(slot.kind, slot.param, i, std::clamp(weight, -1e3, 1e3));  // float16 has room for what follows
  }
}

void List::next(Dice& dice) {
  for (int t = 0; t < int(tensors_.size()); ++t) {
    if (dice.one_in(4)) rescale_weights(dice, t);
  }
  for (size_t row = 0; row < table_.size(); row += kColumns) {
    if (dice.one_in(3)) draw_rates(dice, &table_[row]);
  }
  draw_gradients(dice, dice.one_in(4) ? 1e6 : 1);
}

Snapshot List::snapshot() const {
  Snapshot snapshot{{}, {}, {}, table_, steps_};
  for (const Tensor& tensor : tensors_) {
    snapshot.params.push_back(bytes(tensor.param));
    snapshot.firsts.push_back(bytes(tensor.first));
    snapshot.seconds.push_back(bytes(tensor.second));
  }
  return snapshot;
}

void List::restore(const Snapshot& snapshot) {
  std::copy(snapshot.table.begin(), snapshot.table.end(), table_.begin());
  std::copy(snapshot.steps.begin(), snapshot.steps.end(), steps_.begin());
  for (size_t t = 0; t < tensors_.size(); ++t) {
    put_back(snapshot.params[t], tensors_[t].param);
    put_back(snapshot.firsts[t], tensors_[t].first);
    put_back(snapshot.seconds[t], tensors_[t].second);
  }
}

}  // namespace fuzz
