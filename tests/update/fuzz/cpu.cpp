// csrc/update_cpu.cpp, in one thread or in two.

#include <thread>

#include "implementation.h"

namespace fuzz {

const Borders kBorders{16384, {56}};  // update_cpu.cpp's chunk; it has no tables, and takes a long list now and then

void update(const lwas::Call& call, unsigned order, std::vector<double>&) {
  lwas::update_cpu(call, [&](int64_t count, int64_t, const std::function<void(int64_t, int64_t)>& body) {
    if (order % 3 > 0) return body(0, count);
    std::thread other([&] { body(0, count / 2); });
    body(count / 2, count);
    other.join();
  });
}

}  // namespace fuzz
