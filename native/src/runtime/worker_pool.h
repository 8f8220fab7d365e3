// The threads that compute: one subpool per NUMA node, sections of units dealt over their workers.
#pragma once

#include <pthread.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "runtime/fork.h"
#include "runtime/topology.h"
#include "runtime/trace.h"
#include "runtime/wait.h"

namespace ktk {

struct SubpoolConfig {
  int numa_node;
  int threads;
};

// Workers are POSIX threads with every signal blocked. The thread that calls run() takes part as
// worker 0 of subpool 0, so one subpool of n threads starts n - 1.
//
// In the child of a fork the pool has no threads; the first run() there starts them again. A unit that
// forks must not use the pool in the child.
class WorkerPool : private ForkListener {
 public:
  // Runs one unit. `worker` is 0 .. threads(subpool) - 1 and identifies scratch.
  using UnitFn = void (*)(void *context, int subpool, int worker, int64_t unit) noexcept;

  // Idle time before a worker parks. Between the experts of two layers of one decode step lie the
  // attention and the router, 0.1 to 0.4 ms on a GPU: workers stay awake across that. Whoever leaves
  // them idle for longer pays a wake-up of some ten microseconds, a few per cent of the gap.
  static constexpr int64_t kDefaultSpinNs = 500000;

  // One subpool for each entry; several may name one node. `spin_ns` below 0: the default. Throws
  // KTK_ERR_ARGUMENT (no such node, or one without CPUs; threads below 1) or KTK_ERR_SYSTEM (a thread
  // cannot be started).
  WorkerPool(std::vector<SubpoolConfig> subpools, bool bind, int64_t spin_ns);
  WorkerPool(std::vector<SubpoolConfig> subpools, bool bind, int64_t spin_ns, const Topology &topology);
  // Waits for running sections.
  ~WorkerPool() override;

  int subpools() const noexcept { return subpool_count_; }
  int threads(int subpool) const noexcept { return subpools_[subpool].threads; }
  int thread_count() const noexcept { return thread_count_; }
  int node(int subpool) const noexcept { return subpools_[subpool].node; }
  // What creation gave up, one line each; "" when nothing.
  const std::string &warnings() const noexcept { return warnings_; }
  // CPU that a worker is bound to; -1: to none, or to all of its node.
  int cpu(int subpool, int worker) const noexcept;
  // More threads than CPUs (or than the CPU quota): waiting threads give up their CPU at once.
  bool crowded() const noexcept { return crowded_; }
  // CPUs beyond those of the pool's threads.
  int spare_cpus() const noexcept { return spare_cpus_; }

  // Runs fn(context, subpool, worker, unit) for each unit in 0 .. unit_counts[subpool] - 1 on the
  // threads of each subpool and returns when all are done. Each worker starts with a contiguous share;
  // one that runs out takes from the tails of others. With fewer units than threads, the workers without
  // a unit are left alone. Callers on several threads take turns. From inside a unit of the same pool all
  // units run on the calling worker: with its own index for units of its own subpool, with index 0 for
  // others. At most 2^32 - 1 units a subpool (KTK_ERR_ARGUMENT). Traces show the section under `label`.
  void run(const int64_t *unit_counts, UnitFn fn, void *context, const SpanLabel &label = {});

  // For the spans of work on this pool that is no section: of worker 0 of subpool 0, in whose place the
  // calling thread works, and of the calling thread beside the workers.
  Lane submitter_lane() const noexcept { return lane(0, 0); }
  Lane own_lane() const noexcept { return lane(0, Lane::kOwnLane); }
  // Of one unit of the open section, where units have labels of their own; for the unit itself.
  SpanScope unit_span(int subpool, int worker, const SpanLabel &label) const noexcept {
    return {lane(subpool, worker), label, 1, section_};
  }

  // Lets at most `threads` threads of each pool of the process take part in a section, from its next
  // section on; the others sleep. They are spread over the subpools; where there are fewer than subpools,
  // the calling thread does everything. 0 lifts the limit, and so does a number that neither the usable
  // CPUs nor any pool so far exceeds. Throws KTK_ERR_ARGUMENT (below 0).
  static void limit_threads(int threads);
  // The limit. Where there is none, the usable CPUs or the threads of the largest pool so far, whichever
  // is more; setting that lifts a limit.
  static int most_threads();

  // A forward holds this over all its sections, so that sections of concurrent callers never
  // interleave (scratch belongs to the pool).
  std::mutex &forward_mutex() noexcept { return forward_mutex_; }

  // Binds the calling thread to the CPU that is kept free for worker 0 of subpool 0; false when there
  // is none or the system refuses.
  bool bind_submitter() const noexcept;

 private:
  // One worker's share of the open section, and the line that this worker polls between sections: what opens
  // a section for it brings the share along, and no line is polled or counted down by all.
  //
  // `range` holds the units not yet started, `begin` in the upper and `end` in the lower half. The owner
  // takes from the front and thieves from the back, each with one compare-and-swap. Whoever has taken a unit
  // keeps the section open until the unit is retired; therefore a worker that arrives late, even from an
  // earlier section, either finds nothing or takes a unit of the section that is open now. fn, context and
  // label are written only while no unit is left that anyone could take, and read only by who has taken one.
  struct alignas(kLineBytes) Slot {
    std::atomic<uint64_t> range{0};
    std::atomic<uint64_t> unfinished{0};  // units dealt and not yet retired; see kWatched
    UnitFn fn = nullptr;
    void *context = nullptr;
    SpanLabel label;
    std::atomic<uint32_t> section{0};  // the last that was dealt here; its worker waits for it to change
    std::atomic<uint32_t> woken{0};    // the last section for which somebody undertook to wake the worker
  };

  // Of 64 workers, those that sleep or are about to. Each sets and clears its own bit.
  struct alignas(kLineBytes) Sleepers {
    std::atomic<uint64_t> bits{0};
  };

  struct alignas(kLineBytes) Subpool {
    int node = 0;
    int threads = 0;
    std::atomic<int> active{0};  // workers below it take part
    std::unique_ptr<Slot[]> slots;
    std::unique_ptr<Sleepers[]> sleepers;    // [threads / 64, rounded up]
    std::vector<std::vector<int>> affinity;  // [threads], empty: any CPU
    // Of the submitter alone.
    alignas(kLineBytes) int dealt = 0;  // slots that the open section uses, from the first on
  };

  struct Worker {
    WorkerPool *pool;
    int subpool;
    int index;
    pthread_t thread;
  };

  struct Frame;
  static thread_local const Frame *current_frame_;

  void after_fork_in_child() noexcept override;
  void plan(const Topology &topology, bool bind);
  void start_threads(std::string *binding_failure);
  void stop_threads() noexcept;
  static void *thread_main(void *argument) noexcept;
  void work(int subpool, int worker) noexcept;
  void wait_for_section(int subpool, int worker, uint32_t seen, bool active, Contention &contention) noexcept;
  void wake_sleepers(Subpool &subpool) noexcept;
  void apply_limit(int limit) noexcept;
  Lane lane(int subpool, int worker) const noexcept;
  void run_serially(const int64_t *unit_counts, UnitFn fn, void *context, int subpool, int worker) noexcept;
  void deal(int subpool, int64_t units, UnitFn fn, void *context, const SpanLabel &label) noexcept;
  void run_own(int subpool, int worker) noexcept;
  void run_others(int subpool, int worker, uint32_t seen) noexcept;
  static uint64_t steal(std::atomic<uint64_t> &victim, int threads) noexcept;
  void retire(Slot &slot, uint64_t units) noexcept;
  void wait_for_completion(int layer) noexcept;

  int subpool_count_ = 0;
  int thread_count_ = 0;
  int spare_cpus_ = 0;
  uint16_t id_ = 0;        // in traces
  int applied_limit_ = 0;  // of which the subpools' `active` is the consequence
  int active_threads_ = 0;
  bool crowded_ = false;
  std::atomic<bool> stopping_{false};
  int64_t spin_ns_ = 0;
  std::unique_ptr<Subpool[]> subpools_;
  std::vector<Worker> workers_;
  std::string warnings_;
  bool running_threads_ = false;

  // From here on, what a submitter writes: workers read what is above in each section.
  alignas(kLineBytes) std::mutex forward_mutex_;
  std::mutex section_mutex_;
  uint32_t section_ = 0;
  Contention submitter_contention_;
  alignas(kLineBytes) std::atomic<uint32_t> unfinished_slots_{0};  // while the submitter sleeps
};

}  // namespace ktk
