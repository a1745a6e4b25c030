// Runs CUDA kernels in one thread of the CPU: blocks one after the other, their threads as fibers with own stacks.
//
// A fiber runs until it waits for others: its warp at a shuffle, its block at a barrier. Which block, warp and lane
// goes first is drawn anew each time, and warps drift apart between barriers as far as they can, so what is right in
// one order of threads only goes wrong here soon. Shared memory holds what the block before left there, as on a device.
//
// What it cannot show: blocks that run at the same time, memory that other blocks see late, the rounding of the
// device's fused multiply-add, and speed.

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "cuda_runtime.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

uint3 threadIdx{}, blockIdx{}, blockDim{}, gridDim{};

// Saves this context's registers on its stack and the stack's pointer at `save`; goes on where `to` was saved. By a
// jump: processors predict where a `ret` goes from the last call, and here would always be wrong.
extern "C" void emulator_switch(void** save, void* to);
asm(R"(
.text
.globl emulator_switch
.type emulator_switch, @function
emulator_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  pop %rdx
  jmp *%rdx
.size emulator_switch, .-emulator_switch
)");

namespace emulator {

int processors = 1;
int driver = std::getenv("EMULATED_DRIVER") ? std::atoi(std::getenv("EMULATED_DRIVER")) : CUDART_VERSION;

namespace {

constexpr int kLanes = 32;
constexpr size_t kPage = 4096, kStack = 16 * kPage;
constexpr int kSavedRegisters = 6;

enum class Wait { kNothing, kWarp, kBlock, kDone };

struct Fiber {
  void* context = nullptr;      // where its stack stands while another runs
  const void* stack = nullptr;  // its lowest byte
  size_t size = 0;
  void* fake_stack = nullptr;  // the address sanitizer's
  Wait wait = Wait::kNothing;
  Where where;
  bool odd = false;  // whether the number of its shuffles is

  bool waits_with(const Fiber& other) const {
    return wait == other.wait && where.line() == other.where.line() && where.file_name() == other.where.file_name();
  }
};

// What lanes hand each other, for two shuffles in turn: a lane may be at its next before others have read this one's.
struct Board {
  uint64_t value[2][kLanes];
};

// Whose turn it is: the lanes of a warp one after the other, each once, in an order that was drawn.
struct Turn {
  int warp;
  uint32_t start, stride, taken;
};

std::vector<Fiber> fibers;
std::vector<Board> boards;
Fiber scheduler;  // the program's own stack
Turn turn;
int current;
const std::function<void()>* body;
std::mt19937 dice;

[[noreturn]] void fail(const char* what, const Where& a, const Where& b) {
  std::printf("block %u: %s: %s:%u, %s:%u\n", blockIdx.x, what, a.file_name(), a.line(), b.file_name(), b.line());
  std::exit(3);
}

// The address sanitizer follows a stack's use, so it is told of every switch. Empty without it.
void before_switch([[maybe_unused]] Fiber& from, [[maybe_unused]] const Fiber& to) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.size);
#endif
}
void after_switch([[maybe_unused]] Fiber& to) {
#ifdef __SANITIZE_ADDRESS__
  // The first switch is away from the program's own stack, of which nobody else tells where it is.
  const bool first = scheduler.stack == nullptr;
  __sanitizer_finish_switch_fiber(to.fake_stack, first ? &scheduler.stack : nullptr, first ? &scheduler.size : nullptr);
#endif
}

// The next lane of the warp whose turn it is; after the last, the scheduler.
Fiber& next() {
  if (turn.taken == kLanes) return scheduler;
  current = turn.warp * kLanes + int((turn.start + turn.taken++ * turn.stride) % kLanes);
  threadIdx.x = unsigned(current);
  return fibers[current];
}

void switch_to_next(Fiber& from) {
  Fiber& to = next();
  before_switch(from, to);
  emulator_switch(&from.context, to.context);
  after_switch(from);
}

void suspend(Wait wait, const Where& where) {
  Fiber& fiber = fibers[current];
  fiber.wait = wait;
  fiber.where = where;
  switch_to_next(fiber);
}

// A fiber serves one block after the other.
void live() noexcept {
  after_switch(fibers[current]);
  for (;;) {
    (*body)();
    suspend(Wait::kDone, Where());
  }
}

void make_fibers(int threads) {
  fibers.resize(threads);
  boards.resize(threads / kLanes);
  for (int i = 0; i < threads; ++i) {
    // A page below that must not be touched: a stack that overflows ends the program.
    void* memory = mmap(nullptr, kPage + kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kPage, PROT_NONE) != 0) std::abort();
    char* stack = static_cast<char*>(memory) + kPage;
    fibers[i].stack = stack;
    fibers[i].size = kStack;
    // Stacks that start at the same place of a page would compete for the same lines of the cache.
    void** top = reinterpret_cast<void**>(stack + kStack - size_t(i % 16) * 256);
    *(top -= 2) = reinterpret_cast<void*>(&live);  // where emulator_switch goes on; no caller above it
    fibers[i].context = top - kSavedRegisters;
  }
}

// Runs a warp until it waits, its lanes in random order; returns what for.
Wait run_warp(int warp) {
  const uint32_t random = dice();
  turn = {warp, random >> 16, random | 1, 0};  // an odd stride meets every lane
  switch_to_next(scheduler);
  const Fiber* lanes = &fibers[warp * kLanes];
  for (int lane = 1; lane < kLanes; ++lane) {
    if (lanes[lane].waits_with(lanes[0])) continue;
    fail("threads of a warp wait at different places", lanes[0].where, lanes[lane].where);
  }
  return lanes[0].wait;
}

void run_block(int warps) {
  std::vector<int> ready;
  do {
    ready.resize(warps);
    std::iota(ready.begin(), ready.end(), 0);
    while (!ready.empty()) {
      int& warp = ready[dice() % ready.size()];
      if (run_warp(warp) == Wait::kWarp) continue;
      std::swap(warp, ready.back());
      ready.pop_back();
    }
    for (int warp = 1; warp < warps; ++warp) {
      const Fiber& lane = fibers[warp * kLanes];
      if (lane.waits_with(fibers[0])) continue;
      fail("warps of a block wait at different places", fibers[0].where, lane.where);
    }
  } while (fibers[0].wait != Wait::kDone);
}

}  // namespace

void seed(uint32_t value) { dice.seed(value); }

void wait_for_block(const Where& where) { suspend(Wait::kBlock, where); }

uint64_t shuffle_down(uint32_t mask, uint64_t bits, int offset, const Where& where) {
  if (mask != 0xffffffffu) fail("a shuffle of a part of a warp, which is not emulated", where, where);
  const int lane = current % kLanes;
  uint64_t* values = boards[current / kLanes].value[fibers[current].odd ^= true];
  values[lane] = bits;
  suspend(Wait::kWarp, where);
  // Beyond the end a lane gets its own. Not by a branch: lanes in random order would be mispredicted.
  const bool inside = lane + offset < kLanes;
  return values[lane + inside * offset];
}

void launch(int blocks, int threads, int, void*, const std::function<void()>& kernel) {
  if (fibers.empty()) make_fibers(threads);
  if (blocks < 1 || threads != int(fibers.size()) || threads % kLanes != 0) {
    std::printf("a launch of %d blocks of %d threads\n", blocks, threads);
    std::exit(3);
  }
  body = &kernel;
  blockDim = {unsigned(threads), 1, 1};
  gridDim = {unsigned(blocks), 1, 1};
  std::vector<int> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), dice);
  for (int block : order) {
    blockIdx.x = unsigned(block);
    run_block(threads / kLanes);
  }
}

}  // namespace emulator
