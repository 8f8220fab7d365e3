// Parallel sections of the engine over a worker pool.
#pragma once

#include <xmmintrin.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <vector>

#include "runtime/worker_pool.h"

namespace ktk {

// Arithmetic in the IEEE default for the lifetime of the object, whatever the thread was set to: a caller
// that flushes subnormals must not change the bits of its share of the work.
class DefaultArithmetic {
 public:
  DefaultArithmetic() : saved_(_mm_getcsr()) {
    if (saved_ != kDefault) _mm_setcsr(kDefault);
  }
  ~DefaultArithmetic() {
    if (saved_ != kDefault) _mm_setcsr(saved_);
  }
  DefaultArithmetic(const DefaultArithmetic &) = delete;
  DefaultArithmetic &operator=(const DefaultArithmetic &) = delete;

 private:
  static constexpr unsigned kDefault = 0x1f80;  // all exceptions masked, round to nearest
  unsigned saved_;
};

// Runs unit(subpool, worker, index) for index in 0 .. unit_counts[subpool] - 1, in traces under `label`. The
// callable must not throw.
template <typename Unit>
void run_section(WorkerPool &pool, const SpanLabel &label, const int64_t *unit_counts, Unit &unit) {
  pool.run(
      unit_counts,
      [](void *context, int subpool, int worker, int64_t index) noexcept {
        const DefaultArithmetic arithmetic;
        (*static_cast<Unit *>(context))(subpool, worker, index);
      },
      const_cast<void *>(static_cast<const void *>(&unit)), label);
}

// The same, but units are started in the order of their indices, so that neighbours run at the same time and
// meet in the shared caches what they have in common.
template <typename Unit>
void run_in_order(WorkerPool &pool, const SpanLabel &label, const int64_t *unit_counts, Unit &unit) {
  struct alignas(64) Counter {
    std::atomic<int64_t> started{0};
  };
  std::vector<Counter> counters(static_cast<size_t>(pool.subpools()));
  const auto next = [&](int subpool, int worker, int64_t) {
    unit(subpool, worker,
         counters[static_cast<size_t>(subpool)].started.fetch_add(1, std::memory_order_relaxed));
  };
  run_section(pool, label, unit_counts, next);
}

// Runs unit(subpool, worker, index) for index in 0 .. units - 1, dealt over the subpools by their threads.
template <typename Unit>
void run_dealt(WorkerPool &pool, const SpanLabel &label, int64_t units, const Unit &unit) {
  if (units == 0) return;
  std::vector<int64_t> counts, first;
  int64_t done = 0, threads = 0;
  for (int subpool = 0; subpool < pool.subpools(); subpool++) {
    threads += pool.threads(subpool);
    const int64_t next = units * threads / pool.thread_count();
    first.push_back(done);
    counts.push_back(next - done);
    done = next;
  }
  const auto shifted = [&](int subpool, int worker, int64_t index) {
    unit(subpool, worker, first[static_cast<size_t>(subpool)] + index);
  };
  run_section(pool, label, counts.data(), shifted);
}

// Runs unit(index) for index in 0 .. units - 1 on all subpools, in proportion to their threads; on the
// calling thread alone when there are at most `inline_units`.
template <typename Unit>
void run_spread(WorkerPool &pool, const SpanLabel &label, int64_t units, int64_t inline_units, Unit unit) {
  if (units == 0) return;
  if (units <= inline_units) {
    const SpanScope span(pool.submitter_lane(), label, units);
    const DefaultArithmetic arithmetic;
    for (int64_t index = 0; index < units; index++) unit(index);
    return;
  }
  run_dealt(pool, label, units, [&](int, int, int64_t index) { unit(index); });
}

// Zeroes sums that workers will add to: [tokens][row_floats] of each part that is there.
inline void run_zeroing(WorkerPool &pool, const SpanLabel &label, const std::vector<float *> &parts,
                        int64_t tokens, int64_t row_floats) {
  constexpr int64_t kTokens = 8;  // of a unit
  run_spread(pool, label, (tokens + kTokens - 1) / kTokens, 0, [&](int64_t unit) {
    const int64_t first = unit * kTokens, count = std::min(kTokens, tokens - first);
    for (float *part : parts) {
      if (part != nullptr)
        std::memset(part + first * row_floats, 0, static_cast<size_t>(count * row_floats) * sizeof(float));
    }
  });
}

}  // namespace ktk
