// fuzz LISTS SEED: random lists of tensors through an implementation of the update, against the method in double.
//
// Catches: reads and writes outside an array (with the address sanitizer), elements left out or visited twice at any
// cut between chunks, tensors, layers and launches, wrong types, the two passes disagreeing, counters and step counts
// gone wrong, and results that depend on the order in which threads run.

#include <cstdio>
#include <cstdlib>
#include <string>

#include "implementation.h"
#include "method.h"

namespace fuzz {
namespace {

std::string step(List& list, Dice& dice, bool& overflow) {
  const Snapshot before = list.snapshot();
  update(list.call, unsigned(dice.whole(0, 1 << 30)));
  const Snapshot after = list.snapshot();
  if (list.call.found_inf && *list.call.found_inf != 0) return after == before ? "" : "found_inf, and yet a change";
  std::string wrong = compare(list.call, before, overflow);
  if (wrong.empty() && !overflow && dice.one_in(4)) {
    list.restore(before);
    update(list.call, unsigned(dice.whole(0, 1 << 30)));
    if (list.snapshot() != after) wrong = "another order of threads has another result";
  }
  return wrong;
}

}  // namespace
}  // namespace fuzz

int main(int, char** arguments) {
  const int lists = std::atoi(arguments[1]);
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
