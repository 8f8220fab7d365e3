// Where time goes: spans of work, stamped by each thread into a ring buffer of its own.
//
// While nothing is traced, a place that could be traced costs one relaxed load. Spans are read through
// Trace objects; several may be open at a time, each with its own beginning and end.
#pragma once

#include <x86intrin.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "runtime/wait.h"

namespace ktk {

// What a span is about. Their names and what they mean are in one table in trace.cpp.
enum class Stage : uint16_t {
  section,
  route,
  quantise,
  gather,
  gate_up,
  down,
  merge,
  pack,
  lora_pack,
  lora_input,
  lora_middle,
  grad_input,
  grad_lora_input,
  grad_down,
  grad_lora_middle,
  grad_gate_up,
  grad_merge,
  grad_lora,
  grad_base,
  forward,
  backward,
  task,
  wait,
  sync,
  count
};

const char *stage_name(Stage stage) noexcept;

struct SpanLabel {
  Stage stage = Stage::section;
  int32_t layer = -1;  // -1: of no layer
  // Whether a section has this label, or its units have labels of their own (WorkerPool::unit_span).
  enum class Of : uint8_t { section, units } of = Of::section;
};

// Whose time a span is: a worker's, or with kOwnLane the calling thread's, beside the pool's workers.
struct Lane {
  static constexpr uint16_t kOwnLane = 0xffff;
  uint16_t pool = 0;
  uint16_t subpool = 0;
  int16_t node = 0;
  uint16_t worker = kOwnLane;
  uint16_t threads = 1;  // of the whole pool that share its sections
};

// 0: nothing is traced. Otherwise a number that changes with each Trace that begins; its lowest bit says
// that ticks are those of the time stamp counter, so that a single load tells a thread all it needs.
using TraceState = uint32_t;
extern std::atomic<TraceState> trace_state;

inline TraceState tracing() noexcept { return trace_state.load(std::memory_order_relaxed); }

inline uint64_t trace_ticks(TraceState state) noexcept {
  return (state & 1) != 0 ? __rdtsc() : static_cast<uint64_t>(now_ns());
}

// Records that this thread spent the time from `begin` until now on `units` units. Spans that follow each
// other with the same lane and `section` become one; section 0 is never the same.
void record_span(TraceState state, const Lane &lane, const SpanLabel &label, uint32_t section, uint64_t begin,
                 int64_t units) noexcept;

// A span from construction to destruction; of a section, or of none (0).
class SpanScope {
 public:
  SpanScope(const Lane &lane, const SpanLabel &label, int64_t units, uint32_t section = 0) noexcept
      : lane_(lane), label_(label), units_(units), section_(section), state_(tracing()) {
    if (state_ != 0) begin_ = trace_ticks(state_);
  }
  ~SpanScope() {
    if (state_ != 0) record_span(state_, lane_, label_, section_, begin_, units_);
  }
  SpanScope(const SpanScope &) = delete;
  SpanScope &operator=(const SpanScope &) = delete;

 private:
  const Lane lane_;
  const SpanLabel label_;
  const int64_t units_;
  const uint32_t section_;
  const TraceState state_;
  uint64_t begin_ = 0;
};

// What is recorded from construction to stop(). In the child of a fork a trace of the parent is stopped
// and empty.
class Trace {
 public:
  static constexpr int64_t kDefaultSpans = (int64_t{1} << 16) - 1;
  static constexpr int64_t kMostSpans = (int64_t{1} << 24) - 1;

  // Each thread keeps at least its latest `spans_per_thread` spans; 0: the default. They take 40 bytes
  // each, as they are used. Throws KTK_ERR_ARGUMENT (not in 0 .. kMostSpans).
  explicit Trace(int64_t spans_per_thread);
  ~Trace();
  Trace(const Trace &) = delete;
  Trace &operator=(const Trace &) = delete;

  // Again: nothing. Waits if the trace is too short to measure the clock by it.
  void stop();

  // In the format of Chrome's trace viewer and Perfetto: complete events with times in microseconds from
  // the beginning of the trace; a process is a subpool and a thread a worker. KTK_ERR_STATE before stop().
  std::string json() const;
  // The same into a file, which is never seen half written. KTK_ERR_SYSTEM.
  void write(const std::string &path) const;

 private:
  struct Contents;
  const Contents &contents() const;

  std::unique_ptr<Contents> contents_;
};

}  // namespace ktk
