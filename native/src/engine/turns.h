// Workers that add to the same sums, one after the other in a given order.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "runtime/wait.h"

namespace ktk {

// A line of turns for each run of columns. Whoever waits for turn n relies on turns below n having been taken
// by threads that run: units that take turns are started in that order (run_in_order).
class Turns {
 public:
  explicit Turns(int64_t lines) : lines_(static_cast<size_t>(lines)) {}

  struct Turn {
    Turns *turns;
    int64_t line;
    uint32_t number;
  };
  // For kernels, which know no classes: `turn` is a Turn.
  static void await(const void *turn) {
    const Turn &own = *static_cast<const Turn *>(turn);
    const std::atomic<uint32_t> &next = own.turns->next(own.line);
    constexpr int64_t kSpinNs = 50000;
    Contention contention;
    while (
        !spin_until([&] { return next.load(std::memory_order_acquire) == own.number; }, kSpinNs, contention))
      sched_yield();
  }
  static void done(const Turn &turn) {
    turn.turns->next(turn.line).store(turn.number + 1, std::memory_order_release);
  }

 private:
  struct alignas(kLineBytes) Line {
    std::atomic<uint32_t> next{0};
  };
  std::atomic<uint32_t> &next(int64_t line) { return lines_[static_cast<size_t>(line)].next; }

  std::vector<Line> lines_;
};

}  // namespace ktk
