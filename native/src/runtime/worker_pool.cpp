#include "runtime/worker_pool.h"

#include <signal.h>

#include <algorithm>
#include <climits>
#include <cstdio>
#include <cstring>
#include <limits>
#include <map>
#include <new>
#include <utility>

#include "core/status.h"

namespace ktk {
namespace {

// Where threads share CPUs, whoever waits is in the way of the thread it waits for.
constexpr int64_t kCrowdedSpinNs = 2000;

// A woken worker wakes as many others, so that waking n parked ones takes log2(n) steps.
constexpr int kWakeFanOut = 2;

constexpr uint64_t pack_range(uint32_t begin, uint32_t end) { return uint64_t{begin} << 32 | end; }
constexpr uint32_t range_begin(uint64_t range) { return static_cast<uint32_t>(range >> 32); }
constexpr uint32_t range_end(uint64_t range) { return static_cast<uint32_t>(range); }

// Of all pools: threads that may take part, 0 for no limit; threads of the largest pool; number of pools.
std::atomic<int> thread_limit{0};
std::atomic<int> largest_pool{0};
std::atomic<uint16_t> pools_made{0};

std::string thread_counts_text(int threads, size_t cpus) {
  return text(threads, threads == 1 ? " thread for " : " threads for ", cpus, cpus == 1 ? " CPU" : " CPUs");
}

}  // namespace

// The pools whose units the current thread is inside of, innermost first.
struct WorkerPool::Frame {
  const WorkerPool *pool;
  int subpool;
  int worker;
  const Frame *outer;

  Frame(const WorkerPool *in_pool, int in_subpool, int in_worker) noexcept
      : pool(in_pool), subpool(in_subpool), worker(in_worker), outer(current_frame_) {
    current_frame_ = this;
  }
  ~Frame() { current_frame_ = outer; }
  Frame(const Frame &) = delete;
  Frame &operator=(const Frame &) = delete;
};

thread_local const WorkerPool::Frame *WorkerPool::current_frame_ = nullptr;

WorkerPool::WorkerPool(std::vector<SubpoolConfig> subpools, bool bind, int64_t spin_ns)
    : WorkerPool(std::move(subpools), bind, spin_ns, Topology::read()) {}

WorkerPool::WorkerPool(std::vector<SubpoolConfig> subpools, bool bind, int64_t spin_ns,
                       const Topology &topology)
    : spin_ns_(spin_ns < 0 ? kDefaultSpinNs : spin_ns) {
  require(!subpools.empty(), "a worker pool needs at least one subpool");
  subpool_count_ = static_cast<int>(subpools.size());
  subpools_ = std::make_unique<Subpool[]>(subpools.size());
  int64_t threads = 0;
  for (size_t i = 0; i < subpools.size(); ++i) {
    const SubpoolConfig &config = subpools[i];
    require(config.threads >= 1, "subpool ", i, ": got ", config.threads, " threads, expected at least 1");
    const Topology::Node *node = topology.find(config.numa_node);
    require(node != nullptr, "subpool ", i, ": NUMA node ", config.numa_node,
            " does not exist; this machine has ", topology.describe());
    require(!node->cpus.empty(), "subpool ", i, ": NUMA node ", config.numa_node,
            " has no CPUs that this process may use; this machine has ", topology.describe());
    threads += config.threads;
    require(threads <= INT_MAX, "too many threads: ", threads);
    subpools_[i].node = config.numa_node;
    subpools_[i].threads = config.threads;
    subpools_[i].slots = std::make_unique<Slot[]>(static_cast<size_t>(config.threads));
    subpools_[i].affinity.resize(static_cast<size_t>(config.threads));
  }
  thread_count_ = static_cast<int>(threads);
  id_ = pools_made.fetch_add(1, std::memory_order_relaxed);
  int largest = largest_pool.load(std::memory_order_relaxed);
  while (largest < thread_count_ &&
         !largest_pool.compare_exchange_weak(largest, thread_count_, std::memory_order_relaxed)) {
  }
  apply_limit(thread_limit.load(std::memory_order_relaxed));
  plan(topology, bind);

  std::string binding_failure;
  start_threads(&binding_failure);
  if (!binding_failure.empty()) warnings_ += binding_failure + '\n';
  if (!warnings_.empty()) warnings_.pop_back();
}

WorkerPool::~WorkerPool() {
  const std::lock_guard<std::mutex> lock(section_mutex_);
  stop_threads();
}

// Gives each thread its CPUs and finds out whether the threads have to share them.
void WorkerPool::plan(const Topology &topology, bool bind) {
  std::map<int, int> wanted;
  for (int s = 0; s < subpool_count_; ++s) wanted[subpools_[s].node] += subpools_[s].threads;
  const bool several_nodes = topology.nodes_with_cpus().size() > 1;
  for (const auto &[id, threads] : wanted) {
    const std::vector<int> &cpus = topology.find(id)->cpus;
    const bool fits = static_cast<size_t>(threads) <= cpus.size();
    if (!fits) {
      crowded_ = true;
      warnings_ += text("NUMA node ", id, ": ", thread_counts_text(threads, cpus.size()),
                        "; they are not bound to single CPUs\n");
    }
    if (!bind || (!fits && !several_nodes)) continue;
    size_t next = 0;
    for (int s = 0; s < subpool_count_; ++s) {
      if (subpools_[s].node != id) continue;
      for (std::vector<int> &affinity : subpools_[s].affinity) {
        if (fits)
          affinity.assign(1, cpus[next++]);
        else
          affinity = cpus;
      }
    }
  }
  const int usable = topology.usable_cpus();
  spare_cpus_ = std::max(0, usable - thread_count_);
  if (!crowded_ && thread_count_ > usable) {
    crowded_ = true;
    warnings_ +=
        text("the CPU quota of ", topology.cpu_quota, " CPUs is less than the ", thread_count_, " threads\n");
  }
}

void WorkerPool::start_threads(std::string *binding_failure) {
  stopping_.store(false, std::memory_order_relaxed);
  running_threads_ = true;
  workers_.clear();
  // Threads keep a pointer to their entry.
  workers_.reserve(static_cast<size_t>(thread_count_));

  // A worker must not run the handlers of the host program.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  int failure = 0;
  int refused = 0;
  for (int s = 0; s < subpool_count_ && failure == 0; ++s) {
    for (int w = s == 0 ? 1 : 0; w < subpools_[s].threads; ++w) {
      workers_.push_back(Worker{this, s, w, pthread_t{}});
      Worker &worker = workers_.back();
      failure = pthread_create(&worker.thread, nullptr, &thread_main, &worker);
      if (failure != 0) {
        workers_.pop_back();
        break;
      }
      const std::vector<int> &affinity = subpools_[s].affinity[static_cast<size_t>(w)];
      if (!affinity.empty() && refused == 0) refused = set_thread_affinity(worker.thread, affinity);
    }
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);

  if (failure != 0) {
    const size_t started = workers_.size() + 1;
    stop_threads();
    fail(KTK_ERR_SYSTEM, "cannot start thread ", started + 1, " of ", thread_count_, ": ",
         std::strerror(failure), "; use fewer threads or raise the limit (ulimit -u, cgroup pids.max)");
  }
  if (refused != 0) {
    for (int s = 0; s < subpool_count_; ++s)
      for (std::vector<int> &affinity : subpools_[s].affinity) affinity.clear();
    if (binding_failure != nullptr)
      *binding_failure = text("threads are not bound to CPUs: ", std::strerror(refused));
  }
}

void WorkerPool::limit_threads(int threads) {
  require(threads >= 0, "num_threads: got ", threads, ", expected at least 1, or 0 for no limit");
  const int largest = std::max(Topology::read().usable_cpus(), largest_pool.load(std::memory_order_relaxed));
  thread_limit.store(threads >= largest ? 0 : threads, std::memory_order_relaxed);
}

int WorkerPool::most_threads() {
  const int limit = thread_limit.load(std::memory_order_relaxed);
  if (limit != 0) return limit;
  return std::max(Topology::read().usable_cpus(), largest_pool.load(std::memory_order_relaxed));
}

// Shares the threads that may take part among the subpools: one each, the rest in proportion.
void WorkerPool::apply_limit(int limit) noexcept {
  applied_limit_ = limit;
  const bool all = limit == 0 || limit >= thread_count_;
  const bool alone = !all && limit < subpool_count_;
  active_threads_ = all ? thread_count_ : alone ? 1 : limit;
  int64_t others = 0, given = 0;
  for (int s = 0; s < subpool_count_; ++s) {
    Subpool &subpool = subpools_[s];
    uint32_t active = static_cast<uint32_t>(subpool.threads);
    if (alone) {
      active = s == 0 ? 1 : 0;
    } else if (!all) {
      others += subpool.threads - 1;
      const int64_t upto = others * (limit - subpool_count_) / std::max(1, thread_count_ - subpool_count_);
      active = static_cast<uint32_t>(1 + upto - given);
      given = upto;
    }
    const uint32_t before = subpool.active.exchange(active, std::memory_order_seq_cst);
    if (before < active) futex_wake(subpool.active, INT_MAX);
    // Whoever spins for the next section learns that it is not for him.
    if (before > active) subpool.generation.fetch_add(1, std::memory_order_seq_cst);
  }
}

Lane WorkerPool::lane(int subpool, int worker) const noexcept {
  return Lane{id_, static_cast<uint16_t>(subpool), static_cast<int16_t>(subpools_[subpool].node),
              static_cast<uint16_t>(worker), static_cast<uint16_t>(active_threads_)};
}

void WorkerPool::stop_threads() noexcept {
  if (!running_threads_) return;
  stopping_.store(true, std::memory_order_release);
  apply_limit(0);
  for (int s = 0; s < subpool_count_; ++s) {
    subpools_[s].generation.fetch_add(1, std::memory_order_seq_cst);
    futex_wake(subpools_[s].generation, INT_MAX);
  }
  for (const Worker &worker : workers_) pthread_join(worker.thread, nullptr);
  workers_.clear();
  running_threads_ = false;
}

void WorkerPool::after_fork_in_child() noexcept {
  running_threads_ = false;
  workers_.clear();
  new (&forward_mutex_) std::mutex();
  new (&section_mutex_) std::mutex();
  for (int s = 0; s < subpool_count_; ++s) {
    Subpool &subpool = subpools_[s];
    subpool.parked.store(0, std::memory_order_relaxed);
    for (int w = 0; w < subpool.threads; ++w) subpool.slots[w].range.store(0, std::memory_order_relaxed);
  }
  remaining_.store(0, std::memory_order_relaxed);
  submitter_parked_.store(0, std::memory_order_relaxed);
}

void *WorkerPool::thread_main(void *argument) noexcept {
  const Worker &worker = *static_cast<const Worker *>(argument);
  char name[16];
  std::snprintf(name, sizeof(name), "ktk-%d-%d", worker.subpool % 1000, worker.index % 10000);
  pthread_setname_np(pthread_self(), name);
  worker.pool->work(worker.subpool, worker.index);
  return nullptr;
}

void WorkerPool::work(int subpool_index, int worker) noexcept {
  const Frame frame(this, subpool_index, worker);
  Subpool &subpool = subpools_[subpool_index];
  Contention contention;
  for (;;) {
    // Read before the work is looked for: a section that opens in between is noticed below.
    const uint32_t seen = subpool.generation.load(std::memory_order_acquire);
    if (stopping_.load(std::memory_order_acquire)) return;
    const uint32_t active = subpool.active.load(std::memory_order_seq_cst);
    if (static_cast<uint32_t>(worker) >= active) {
      futex_wait(subpool.active, active);
      continue;
    }
    drain(subpool_index, worker);
    wait_for_section(subpool, seen, contention);
  }
}

void WorkerPool::wait_for_section(Subpool &subpool, uint32_t seen, Contention &contention) noexcept {
  const auto changed = [&subpool, seen] {
    return subpool.generation.load(std::memory_order_acquire) != seen;
  };
  if (spin_until(changed, crowded_ ? std::min(spin_ns_, kCrowdedSpinNs) : spin_ns_, contention)) return;
  // Counted before the kernel compares the generation, while run() changes the generation before it
  // reads the count: one of the two sees the other.
  subpool.parked.fetch_add(1, std::memory_order_seq_cst);
  while (!changed()) futex_wait(subpool.generation, seen);
  if (subpool.parked.fetch_sub(1, std::memory_order_seq_cst) > 1) futex_wake(subpool.generation, kWakeFanOut);
}

void WorkerPool::run(const int64_t *unit_counts, UnitFn fn, void *context, const SpanLabel &label) {
  for (const Frame *frame = current_frame_; frame != nullptr; frame = frame->outer) {
    if (frame->pool == this) {
      run_serially(unit_counts, fn, context, frame->subpool, frame->worker);
      return;
    }
  }
  int64_t total = 0;
  for (int s = 0; s < subpool_count_; ++s) {
    require(unit_counts[s] >= 0 && unit_counts[s] <= std::numeric_limits<uint32_t>::max(), "subpool ", s,
            ": got ", unit_counts[s], " units, expected 0 to 2^32 - 1");
    total += unit_counts[s];
  }
  if (total == 0) return;

  const std::lock_guard<std::mutex> lock(section_mutex_);
  const Frame frame(this, 0, 0);
  const int limit = thread_limit.load(std::memory_order_relaxed);
  if (limit != applied_limit_) apply_limit(limit);
  if (active_threads_ == 1 ||
      (unit_counts[0] == total && (total == 1 || subpools_[0].active.load(std::memory_order_relaxed) == 1))) {
    const SpanScope span(submitter_lane(), label, total);
    run_serially(unit_counts, fn, context, 0, 0);
    return;
  }
  if (!running_threads_) start_threads(nullptr);

  fn_ = fn;
  context_ = context;
  label_ = label;
  ++section_;
  remaining_.store(total, std::memory_order_relaxed);
  // Other nodes first: their workers have the longer way.
  for (int s = subpool_count_ - 1; s >= 0; --s) {
    if (unit_counts[s] == 0) continue;
    Subpool &subpool = subpools_[s];
    deal(subpool, unit_counts[s]);
    subpool.generation.fetch_add(1, std::memory_order_seq_cst);
    if (subpool.parked.load(std::memory_order_seq_cst) != 0) futex_wake(subpool.generation, kWakeFanOut);
  }
  if (drain(0, 0)) return;
  const SpanScope span(own_lane(), {Stage::wait, label.layer}, 0);
  wait_for_completion();
}

void WorkerPool::run_serially(const int64_t *unit_counts, UnitFn fn, void *context, int subpool,
                              int worker) noexcept {
  for (int s = 0; s < subpool_count_; ++s) {
    for (int64_t unit = 0; unit < unit_counts[s]; ++unit) fn(context, s, s == subpool ? worker : 0, unit);
  }
}

void WorkerPool::deal(Subpool &subpool, int64_t units) noexcept {
  const int active = static_cast<int>(subpool.active.load(std::memory_order_relaxed));
  const int64_t share = units / active;
  const int64_t larger = units % active;
  int64_t begin = 0;
  for (int w = 0; w < active && begin < units; ++w) {
    const int64_t end = begin + share + (w < larger ? 1 : 0);
    subpool.slots[w].range.store(pack_range(static_cast<uint32_t>(begin), static_cast<uint32_t>(end)),
                                 std::memory_order_release);
    begin = end;
  }
}

// Runs units until none is left to take; true when this completed the section.
bool WorkerPool::drain(int subpool_index, int worker) noexcept {
  Subpool &subpool = subpools_[subpool_index];
  std::atomic<uint64_t> &own = subpool.slots[worker].range;
  const TraceState traced = tracing();
  uint64_t began = traced != 0 ? trace_ticks(traced) : 0;
  // Before the units are retired: until then the section is open, and whoever waits for it finds them.
  const auto record = [&](int64_t units) {
    if (traced != 0) record_span(traced, lane(subpool_index, worker), label_, section_, began, units);
  };
  int64_t finished = 0;
  uint64_t range = own.load(std::memory_order_acquire);
  while (range_begin(range) < range_end(range)) {
    const uint32_t unit = range_begin(range);
    const uint64_t rest = pack_range(unit + 1, range_end(range));
    if (!own.compare_exchange_weak(range, rest, std::memory_order_acq_rel, std::memory_order_acquire))
      continue;
    fn_(context_, subpool_index, worker, unit);
    ++finished;
    range = own.load(std::memory_order_acquire);
  }
  // Before looking at others: the last unit of a section should not wait for a search.
  if (finished > 0) {
    record(finished);
    if (retire(finished)) return true;
  }

  for (int step = 1; step < subpool.threads;) {
    const int other = worker + step < subpool.threads ? worker + step : worker + step - subpool.threads;
    const uint64_t stolen = steal(subpool.slots[other].range, subpool.threads);
    if (range_begin(stolen) == range_end(stolen)) {
      ++step;
      continue;
    }
    if (traced != 0) began = trace_ticks(traced);
    for (uint32_t unit = range_begin(stolen); unit < range_end(stolen); ++unit)
      fn_(context_, subpool_index, worker, unit);
    record(range_end(stolen) - range_begin(stolen));
    if (retire(range_end(stolen) - range_begin(stolen))) return true;
  }
  return false;
}

// Takes units from the tail of a range; empty when there are none. What is taken cannot be taken again
// from the thief (its own slot may be dealt to at any time), so it is a small part of what is left.
uint64_t WorkerPool::steal(std::atomic<uint64_t> &victim, int threads) noexcept {
  uint64_t range = victim.load(std::memory_order_acquire);
  while (range_begin(range) < range_end(range)) {
    const uint32_t begin = range_begin(range);
    const uint32_t end = range_end(range);
    const uint32_t part = std::max<uint32_t>(1, (end - begin) / (2 * static_cast<uint32_t>(threads)));
    if (victim.compare_exchange_weak(range, pack_range(begin, end - part), std::memory_order_acq_rel,
                                     std::memory_order_acquire))
      return pack_range(end - part, end);
  }
  return 0;
}

// Counts finished units; true for the call that completes the section.
bool WorkerPool::retire(int64_t units) noexcept {
  if (remaining_.fetch_sub(units, std::memory_order_acq_rel) != units) return false;
  // Until this store the submitter cannot go on, so section_ still is the one just completed. A
  // submitter that parks has announced it before it compares: one of the two sees the other.
  completed_.store(section_, std::memory_order_seq_cst);
  if (submitter_parked_.load(std::memory_order_seq_cst) != 0) futex_wake(completed_, 1);
  return true;
}

void WorkerPool::wait_for_completion() noexcept {
  const auto done = [this] { return completed_.load(std::memory_order_acquire) == section_; };
  const int64_t limit = crowded_ ? kCrowdedSpinNs : std::max(spin_ns_, kCrowdedSpinNs);
  if (spin_until(done, limit, submitter_contention_)) return;
  // A worker that lost its CPU may hold a range that it took from another.
  if (drain(0, 0)) return;
  submitter_parked_.store(1, std::memory_order_seq_cst);
  for (;;) {
    const uint32_t seen = completed_.load(std::memory_order_seq_cst);
    if (seen == section_) break;
    futex_wait(completed_, seen);
  }
  submitter_parked_.store(0, std::memory_order_relaxed);
}

int WorkerPool::cpu(int subpool, int worker) const noexcept {
  const std::vector<int> &affinity = subpools_[subpool].affinity[static_cast<size_t>(worker)];
  return affinity.size() == 1 ? affinity[0] : -1;
}

bool WorkerPool::bind_submitter() const noexcept {
  const std::vector<int> &affinity = subpools_[0].affinity[0];
  return !affinity.empty() && set_thread_affinity(pthread_self(), affinity) == 0;
}

}  // namespace ktk
