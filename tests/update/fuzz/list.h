// A random list of tensors, and the calls of the update that it takes a few steps with.
#pragma once

#include <memory>
#include <random>
#include <vector>

#include "update.h"

namespace fuzz {

class Dice {
 public:
  explicit Dice(uint64_t seed) : bits_(seed) {}
  double uniform(double low, double high) { return std::uniform_real_distribution<double>(low, high)(bits_); }
  int whole(int low, int high) { return std::uniform_int_distribution<int>(low, high)(bits_); }
  bool one_in(int n) { return whole(1, n) == 1; }

 private:
  std::mt19937_64 bits_;
};

// Where an implementation cuts its work: sizes and numbers of tensors lie on both sides.
struct Borders {
  int chunk;                // elements
  std::vector<int> tables;  // tensors
};

double load(lwas::Kind kind, const void* data, int64_t i);
void store(lwas::Kind kind, void* data, int64_t i, double value);

// An allocation of its own, of which the array starts `offset` elements behind an aligned address and takes the rest:
// the address sanitizer sees the first step outside.
struct Array {
  Array(int64_t count, int element, int offset);
  std::unique_ptr<char[]> memory;
  char* data;
  int64_t bytes;
};

struct Tensor {
  Array param, grad, first, second;
};

// All that a step may change.
struct Snapshot {
  using Bytes = std::vector<char>;
  std::vector<Bytes> params, firsts, seconds;
  std::vector<float> table, steps;
  bool operator==(const Snapshot&) const = default;
};

class List {
 public:
  List(Dice& dice, const Borders& borders);
  List(const List&) = delete;  // the call points into it

  // New gradients, and now and then other rates and weights of another size: what the rows remember is then off.
  void next(Dice& dice);

  Snapshot snapshot() const;
  void restore(const Snapshot& snapshot);

  lwas::Call call;

 private:
  void draw_options(Dice& dice);
  void draw_rates(Dice& dice, float* row);
  void draw_gradients(Dice& dice, double spike);
  void rescale_weights(Dice& dice, int tensor);

  std::vector<Tensor> tensors_;
  std::vector<float> table_, steps_;
  float lr_ = 1, grad_scale_ = 1, found_inf_ = 0;
  double gradients_ = 1;  // their size
};

}  // namespace fuzz
