#include "ranks.h"

#include <algorithm>
#include <cmath>

#include "implementation.h"

using namespace lwas;

namespace fuzz {
namespace {

struct Rank {
  Call call;
  std::vector<float> table, steps;  // its own
  std::vector<double> totals, scratch;
};

// Elements [begin, end) of a slot.
Slot part_of(const Slot& slot, int64_t begin, int64_t end) {
  const int64_t bytes = slot.kind == Kind::kFloat32 ? 4 : 2;
  Slot part = slot;
  part.param = static_cast<char*>(slot.param) + begin * bytes;
  part.grad = static_cast<const char*>(slot.grad) + begin * bytes;
  part.first += begin;
  if (part.second) part.second += begin;
  part.size = end - begin;
  return part;
}

}  // namespace

std::string step_in_parts(List& list, int count, Dice& dice) {
  const Call& whole = list.call;
  const Snapshot before = list.snapshot();
  const auto order = [&] { return unsigned(dice.whole(0, 1 << 30)); };
  std::vector<Rank> ranks(count, Rank{whole, before.table, before.steps, {}, {}});
  for (size_t t = 0; t < whole.slots.size(); ++t) {
    const Slot& slot = whole.slots[t];
    int64_t begin = 0;
    for (int r = 0; r < count; ++r) {
      const bool rest = r == count - 1 || dice.one_in(4);
      const int64_t end = rest ? slot.size : dice.one_in(4) ? begin : dice.whole(int(begin), int(slot.size));
      ranks[r].call.slots[t] = part_of(slot, begin, end);
      begin = end;
    }
  }
  const int layers = layers_of(whole);
  std::vector<double> sums(size_t(layers) * kTotals, 0.0);
  for (Rank& rank : ranks) {
    rank.totals.assign(sums.size(), NAN);
    rank.call.table = rank.table.data();
    rank.call.steps = rank.steps.data();
    rank.call.totals = rank.totals.data();
    update(rank.call, order(), rank.scratch);
    if (rank.table != before.table || rank.steps != before.steps) return "the first part changes a table";
    for (size_t i = 0; i < sums.size(); ++i) sums[i] += rank.totals[i];
  }
  if (whole.found_inf && *whole.found_inf != 0) {
    if (sums != std::vector<double>(sums.size(), 0.0)) return "found_inf, and yet the totals are not 0";
  }
  for (Rank& rank : ranks) {
    rank.totals = sums;
    rank.call.settles = true;
    update(rank.call, order(), rank.scratch);
    if (rank.table != ranks[0].table || rank.steps != ranks[0].steps) return "ranks have different tables";
  }
  std::copy(ranks[0].table.begin(), ranks[0].table.end(), whole.table);
  std::copy(ranks[0].steps.begin(), ranks[0].steps.end(), whole.steps);
  return {};
}

}  // namespace fuzz
