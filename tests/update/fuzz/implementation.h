// What fuzz.cpp tests: cpu.cpp and cuda.cpp define these.
#pragma once

#include "list.h"

namespace fuzz {

extern const Borders kBorders;

// Takes the call's step. `order` says in which order threads run, as far as it is ours to say.
void update(const lwas::Call& call, unsigned order);

}  // namespace fuzz
