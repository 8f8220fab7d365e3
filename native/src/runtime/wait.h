// Bounded spinning and futexes: how runtime threads wait for one another.
#pragma once

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>

namespace ktk {

// Two lines: adjacent-line prefetchers would otherwise couple neighbours.
constexpr size_t kLineBytes = 128;

inline int64_t now_ns() noexcept {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<int64_t>(now.tv_sec) * 1000000000 + now.tv_nsec;
}

inline void pause_cpu() noexcept {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#endif
}

static_assert(sizeof(std::atomic<uint32_t>) == 4, "a futex is 32 bits");

// Sleeps while `word` is `expected`; may return early for no reason.
inline void futex_wait(std::atomic<uint32_t> &word, uint32_t expected) noexcept {
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, expected, nullptr, nullptr, 0);
}

inline void futex_wake(std::atomic<uint32_t> &word, int threads) noexcept {
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, threads, nullptr, nullptr, 0);
}

// What one waiting thread has learnt about its CPU.
struct Contention {
  int64_t until_ns = 0;
};

// Spins until `ready()` holds, at most `limit_ns`; returns whether it holds.
//
// A spinner offers its CPU to others every few ten microseconds. When that call returns late, another
// thread had been kept waiting: the spinner gives up at once, so that its caller parks, and spins only
// briefly for a while. A parked thread is scheduled soon after its wake-up; one that has used up its
// time slice spinning is not, so spinning on a contended CPU loses on both sides.
template <typename Ready>
bool spin_until(Ready ready, int64_t limit_ns, Contention &contention) noexcept {
  constexpr int kPausesPerCheck = 32;
  constexpr int64_t kYieldEveryNs = 30000;
  constexpr int64_t kLateYieldNs = 25000;
  constexpr int64_t kContendedNs = 20000000;
  constexpr int64_t kContendedLimitNs = 4000;

  if (ready()) return true;
  if (limit_ns <= 0) return false;
  const int64_t start = now_ns();
  if (start < contention.until_ns && limit_ns > kContendedLimitNs) limit_ns = kContendedLimitNs;
  int64_t last_yield = start;
  for (;;) {
    for (int i = 0; i < kPausesPerCheck; ++i) {
      pause_cpu();
      if (ready()) return true;
    }
    int64_t now = now_ns();
    if (now - start >= limit_ns) return false;
    if (now - last_yield >= kYieldEveryNs) {
      sched_yield();
      last_yield = now_ns();
      if (ready()) return true;
      if (last_yield - now > kLateYieldNs) {
        contention.until_ns = last_yield + kContendedNs;
        return false;
      }
    }
  }
}

}  // namespace ktk
