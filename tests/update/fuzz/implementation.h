// What fuzz.cpp tests: cpu.cpp and cuda.cpp define these.
#pragma once

#include "list.h"

namespace fuzz {

extern const Borders kBorders;

// Takes the call's step or its part. `order` says in which order threads run, as far as it is ours to say; `scratch`
// is what the first part leaves for the second.
void update(const lwas::Call& call, unsigned order, std::vector<double>& scratch);

}  // namespace fuzz
