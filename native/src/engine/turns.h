// Workers that wait for one another within a section: to add to the same sums in a given order, or for what
// other units make. Whoever waits relies on units before its own, which run or are done: the units are
// started in that order (run_in_order).
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "runtime/wait.h"

namespace ktk {

template <typename Ready>
void await_others(Ready ready) {
  constexpr int64_t kSpinNs = 50000;
  Contention contention;
  while (!spin_until(ready, kSpinNs, contention)) sched_yield();
}

// Units that others wait for.
class Countdown {
 public:
  // Before the section.
  void expect(int64_t units) { left_.store(units, std::memory_order_relaxed); }
  void done() { left_.fetch_sub(1, std::memory_order_acq_rel); }
  void await() const {
    await_others([&] { return left_.load(std::memory_order_acquire) == 0; });
  }

 private:
  std::atomic<int64_t> left_{0};
};

// A line of turns for each run of columns.
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
    await_others([&] { return next.load(std::memory_order_acquire) == own.number; });
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
