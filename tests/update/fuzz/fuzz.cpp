// fuzz LISTS SEED: random lists of tensors through an implementation of the update, against the method in double.
//
// Catches: reads and writes outside an array (with the address sanitizer), elements left out or visited twice at any
// cut between chunks, tensors, layers and launches, wrong types, the two passes disagreeing, counters and step counts
// gone wrong, results that depend on the order in which threads run, and a step in two parts, by one rank or by several
// that hold a part of every tensor each, that is another one than in one call. And norms that overflow, first of all.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "implementation.h"
#include "method.h"
#include "ranks.h"

namespace fuzz {
namespace {

// What is wrong with a step that took `before` to what the list is now.
std::string wrong_with(const List& list, const Snapshot& before, bool& overflow) {
  if (!list.call.found_inf || *list.call.found_inf == 0) return compare(list.call, before, overflow);
  return list.snapshot() == before ? "" : "found_inf, and yet a change";
}

std::string step(List& list, Dice& dice, bool& overflow) {
  const Snapshot before = list.snapshot();
  std::vector<double> scratch;
  update(list.call, unsigned(dice.whole(0, 1 << 30)), scratch);
  const Snapshot after = list.snapshot();
  std::string wrong = wrong_with(list, before, overflow);
  if (wrong.empty() && !overflow && dice.one_in(4)) {
    list.restore(before);
    update(list.call, unsigned(dice.whole(0, 1 << 30)), scratch);
    if (list.snapshot() != after) wrong = "another order of threads has another result";
  }
  if (wrong.empty() && !overflow && dice.one_in(2)) {
    list.restore(before);
    const int ranks = dice.whole(1, 3);
    wrong = step_in_parts(list, ranks, dice);
    if (wrong.empty() && ranks == 1 && list.snapshot() != after) wrong = "it has another result";
    if (wrong.empty()) wrong = wrong_with(list, before, overflow);
    if (!wrong.empty()) wrong = "in parts, by " + std::to_string(ranks) + " ranks: " + wrong;
  }
  return wrong;
}

// A layer of two weights, whose norm overflows, and so does its direction's: nothing is known of the cap, so it stays.
std::string overflowing_layer(lwas::Rule rule) {
  std::vector<float> weights(2, 1.5e19f), gradients(weights), offsets(2), table(lwas::kColumns), steps(1);
  lwas::Call call{};
  call.rule = rule;
  call.options = {1, 1, 0, 0, -INFINITY, -INFINITY, 0};
  call.control = {1, nullptr, 1, 1e-3f, 1, true, 0.1f, INFINITY, 0.01f, 1.25f};
  call.sign = 1;
  call.table = table.data();
  call.steps = steps.data();
  call.slots = {{weights.data(), gradients.data(), offsets.data(), nullptr, 2, 2, 0, 0, false, lwas::Kind::kFloat32}};
  std::vector<double> scratch;
  for (int step = 0; step < 3; ++step) {
    update(call, 1, scratch);
    for (float weight : weights) {
      if (!(std::fabs(weight / 1.5e19f - 1) < 1e-6)) return "it moves to " + std::to_string(weight);
    }
  }
  return "";
}

}  // namespace
}  // namespace fuzz

int main(int, char** arguments) {
  const int lists = std::atoi(arguments[1]);
  for (lwas::Rule rule : {lwas::Rule::kSgd, lwas::Rule::kFreeSgd}) {
    if (const std::string wrong = fuzz::overflowing_layer(rule); !wrong.empty()) {
      std::printf("a layer whose norms overflow (rule %d): %s\n", int(rule), wrong.c_str());
      return 1;
    }
  }
  fuzz::Dice dice(std::atoi(arguments[2]));
  for (int i = 0; i < lists; ++i) {
    fuzz::List list(dice, fuzz::kBorders);
    bool overflow = false;
    for (int left = dice.whole(1, 3); left > 0 && !overflow; --left) {
      const std::string wrong = fuzz::step(list, dice, overflow);
      if (!wrong.empty()) {
        std::printf("list %d: %s\n", i, wrong.c_str());
        return 1;
      }
      if (left > 1) list.next(dice);
    }
  }
  std::printf("%d lists agree\n", lists);
}
