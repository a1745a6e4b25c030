// The method in double, and what a step of the update is compared with.
#pragma once

#include <string>

#include "list.h"

namespace fuzz {

// What is wrong with a step that took `before` to what the call's arrays hold now; empty if nothing is.
// `overflow` is set where a weight rightly left the range of its type: the list is of no further use.
std::string compare(const lwas::Call& call, const Snapshot& before, bool& overflow);

}  // namespace fuzz
