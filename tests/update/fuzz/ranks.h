// A step that is taken in two parts, by one rank or by several that hold a part of every tensor each.
#pragma once

#include <string>

#include "list.h"

namespace fuzz {

// Takes the list's step with so many ranks; says what is wrong with it by itself, nothing if nothing is. The list is
// then as after a step in one call, which the caller is to compare with.
std::string step_in_parts(List& list, int ranks, Dice& dice);

}  // namespace fuzz
