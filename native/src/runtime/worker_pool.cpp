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

// For so long, who has run out of units leaves the slots of others alone: to look into one takes its line
// from its owner, who in a short section is just about to need it. Longer than an empty section, shorter than
// a unit.
constexpr int64_t kSearchAfterNs = 1000;

// In Slot::unfinished: the submitter sleeps, and this slot is one of those in unfinished_slots_.
constexpr uint64_t kWatched = uint64_t{1} << 63;

constexpr uint64_t pack_range(uint32_t begin, uint32_t end) { return uint64_t{begin} << 32 | end; }
constexpr uint32_t range_begin(uint64_t range) { return static_cast<uint32_t>(range >> 32); }
constexpr uint32_t range_end(uint64_t range) { return static_cast<uint32_t>(range); }
constexpr bool range_empty(uint64_t range) { return range_begin(range) >= range_end(range); }

// Spins until `ready()` holds, about kSearchAfterNs; returns whether it holds.
template <typename Ready>
bool ready_soon(Ready ready) noexcept {
  constexpr int kPausesPerCheck = 4;
  if (ready()) return true;
  const int64_t start = now_ns();
  do {
    for (int i = 0; i < kPausesPerCheck; ++i) {
      pause_cpu();
      if (ready()) return true;
    }
  } while (now_ns() - start < kSearchAfterNs);
  return false;
}

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
    subpools_[i].sleepers = std::make_unique<Sleepers[]>(static_cast<size_t>((config.threads + 63) / 64));
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
    int active = subpool.threads;
    if (alone) {
      active = s == 0 ? 1 : 0;
    } else if (!all) {
      others += subpool.threads - 1;
      const int64_t upto = others * (limit - subpool_count_) / std::max(1, thread_count_ - subpool_count_);
      active = static_cast<int>(1 + upto - given);
      given = upto;
    }
    const int before = subpool.active.exchange(active, std::memory_order_relaxed);
    // Whoever spins for the next section learns that it is not for him.
    if (active < before) ++section_;
    for (int w = active; w < before; ++w) subpool.slots[w].section.store(section_, std::memory_order_release);
  }
}

Lane WorkerPool::lane(int subpool, int worker) const noexcept {
  return Lane{id_, static_cast<uint16_t>(subpool), static_cast<int16_t>(subpools_[subpool].node),
              static_cast<uint16_t>(worker), static_cast<uint16_t>(active_threads_)};
}

void WorkerPool::stop_threads() noexcept {
  if (!running_threads_) return;
  stopping_.store(true, std::memory_order_release);
  ++section_;
  for (int s = 0; s < subpool_count_; ++s) {
    for (int w = 0; w < subpools_[s].threads; ++w) {
      std::atomic<uint32_t> &section = subpools_[s].slots[w].section;
      section.store(section_, std::memory_order_release);
      futex_wake(section, 1);
    }
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
    for (int w = 0; w < subpool.threads; ++w) {
      subpool.slots[w].range.store(0, std::memory_order_relaxed);
      subpool.sleepers[w / 64].bits.store(0, std::memory_order_relaxed);
    }
  }
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
  const std::atomic<uint32_t> &section = subpool.slots[worker].section;
  Contention contention;
  for (;;) {
    // Read before the work is looked for: a section that opens in between is noticed below.
    const uint32_t seen = section.load(std::memory_order_acquire);
    if (stopping_.load(std::memory_order_acquire)) return;
    const bool active = worker < subpool.active.load(std::memory_order_relaxed);
    if (active) {
      run_own(subpool_index, worker);
      if (ready_soon([&section, seen] { return section.load(std::memory_order_acquire) != seen; })) continue;
      run_others(subpool_index, worker, seen);
    }
    wait_for_section(subpool_index, worker, seen, active, contention);
  }
}

void WorkerPool::wait_for_section(int subpool_index, int worker, uint32_t seen, bool active,
                                  Contention &contention) noexcept {
  Subpool &subpool = subpools_[subpool_index];
  std::atomic<uint32_t> &section = subpool.slots[worker].section;
  const auto changed = [&section, seen] { return section.load(std::memory_order_acquire) != seen; };
  const int64_t limit = !active ? 0 : crowded_ ? std::min(spin_ns_, kCrowdedSpinNs) : spin_ns_;
  if (spin_until(changed, limit, contention)) return;
  std::atomic<uint64_t> &sleepers = subpool.sleepers[worker / 64].bits;
  const uint64_t bit = uint64_t{1} << (worker % 64);
  // Set before the section is looked at again, while run() changes the section before it looks at the bits.
  // Both look and set in one operation, so that one of the two comes second and sees the other.
  sleepers.fetch_or(bit, std::memory_order_acq_rel);
  // A share dealt after the last look may belong to a worker that is busy with this one's: so one more look,
  // and one whenever somebody wakes.
  for (;;) {
    if (active) run_others(subpool_index, worker, seen);
    if (changed()) break;
    futex_wait(section, seen);
  }
  sleepers.fetch_and(~bit, std::memory_order_acq_rel);
  wake_sleepers(subpool);
}

// Wakes workers whose share is not finished; they wake more. Even one whose share has been taken over has
// something to do: whoever took it has left a share behind.
void WorkerPool::wake_sleepers(Subpool &subpool) noexcept {
  int woken = 0;
  for (int base = 0; base < subpool.threads; base += 64) {
    uint64_t bits = subpool.sleepers[base / 64].bits.fetch_add(0, std::memory_order_acq_rel);
    for (; bits != 0; bits &= bits - 1) {
      Slot &slot = subpool.slots[base + __builtin_ctzll(bits)];
      const uint32_t section = slot.section.load(std::memory_order_acquire);
      if ((slot.unfinished.load(std::memory_order_relaxed) & ~kWatched) == 0) continue;
      if (slot.woken.exchange(section, std::memory_order_relaxed) == section) continue;
      futex_wake(slot.section, 1);
      if (++woken == kWakeFanOut) return;
    }
  }
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
    ++section_;
    if (label.of == SpanLabel::Of::units) return run_serially(unit_counts, fn, context, 0, 0);
    const SpanScope span(submitter_lane(), label, total);
    run_serially(unit_counts, fn, context, 0, 0);
    return;
  }
  if (!running_threads_) start_threads(nullptr);

  ++section_;
  // Other nodes first: their workers have the longer way.
  for (int s = subpool_count_ - 1; s >= 0; --s) deal(s, unit_counts[s], fn, context, label);
  // After all stores, which until here need not wait for one another.
  for (int s = subpool_count_ - 1; s >= 0; --s) {
    if (unit_counts[s] != 0) wake_sleepers(subpools_[s]);
  }
  run_own(0, 0);
  wait_for_completion(label.layer);
}

void WorkerPool::run_serially(const int64_t *unit_counts, UnitFn fn, void *context, int subpool,
                              int worker) noexcept {
  for (int s = 0; s < subpool_count_; ++s) {
    for (int64_t unit = 0; unit < unit_counts[s]; ++unit) fn(context, s, s == subpool ? worker : 0, unit);
  }
}

void WorkerPool::deal(int subpool_index, int64_t units, UnitFn fn, void *context,
                      const SpanLabel &label) noexcept {
  Subpool &subpool = subpools_[subpool_index];
  const int64_t active = subpool.active.load(std::memory_order_relaxed);
  subpool.dealt = static_cast<int>(std::min(active, units));
  const int64_t share = units / active;
  const int64_t larger = units % active;
  // The submitter's own share last: the others have the longer way.
  for (int w = subpool.dealt - 1; w >= 0; --w) {
    Slot &slot = subpool.slots[w];
    const int64_t begin = w * share + std::min<int64_t>(w, larger);
    const int64_t end = begin + share + (w < larger ? 1 : 0);
    slot.fn = fn;
    slot.context = context;
    slot.label = label;
    slot.unfinished.store(static_cast<uint64_t>(end - begin), std::memory_order_relaxed);
    slot.range.store(pack_range(static_cast<uint32_t>(begin), static_cast<uint32_t>(end)),
                     std::memory_order_release);
    slot.section.store(section_, std::memory_order_release);
  }
}

// Runs the units that are left of the worker's share.
void WorkerPool::run_own(int subpool_index, int worker) noexcept {
  Slot &slot = subpools_[subpool_index].slots[worker];
  const TraceState traced = tracing();
  const uint64_t began = traced != 0 ? trace_ticks(traced) : 0;
  uint64_t finished = 0;
  uint64_t range = slot.range.load(std::memory_order_acquire);
  while (!range_empty(range)) {
    const uint32_t unit = range_begin(range);
    const uint64_t rest = pack_range(unit + 1, range_end(range));
    if (!slot.range.compare_exchange_weak(range, rest, std::memory_order_acq_rel, std::memory_order_acquire))
      continue;
    slot.fn(slot.context, subpool_index, worker, unit);
    ++finished;
    range = slot.range.load(std::memory_order_acquire);
  }
  if (finished == 0) return;
  // Before the units are retired: until then the section is open, and whoever waits for it finds them.
  if (traced != 0 && slot.label.of == SpanLabel::Of::section)
    record_span(traced, lane(subpool_index, worker), slot.label, slot.section.load(std::memory_order_relaxed),
                began, static_cast<int64_t>(finished));
  retire(slot, finished);
}

// Takes units over from the other workers of the subpool until none is left, or until the worker's next
// section opens after `seen`.
void WorkerPool::run_others(int subpool_index, int worker, uint32_t seen) noexcept {
  Subpool &subpool = subpools_[subpool_index];
  const std::atomic<uint32_t> &section = subpool.slots[worker].section;
  for (int step = 1; step < subpool.threads && section.load(std::memory_order_relaxed) == seen;) {
    const int other = worker + step < subpool.threads ? worker + step : worker + step - subpool.threads;
    Slot &slot = subpool.slots[other];
    const uint64_t stolen = steal(slot.range, subpool.threads);
    if (range_empty(stolen)) {
      ++step;
      continue;
    }
    const TraceState traced = tracing();
    const uint64_t began = traced != 0 ? trace_ticks(traced) : 0;
    const uint32_t units = range_end(stolen) - range_begin(stolen);
    for (uint32_t unit = range_begin(stolen); unit < range_end(stolen); ++unit)
      slot.fn(slot.context, subpool_index, worker, unit);
    if (traced != 0 && slot.label.of == SpanLabel::Of::section)
      record_span(traced, lane(subpool_index, worker), slot.label,
                  slot.section.load(std::memory_order_relaxed), began, units);
    retire(slot, units);
  }
}

// Takes units from the tail of a range; empty when there are none. What is taken cannot be taken again
// from the thief (its own slot may be dealt to at any time), so it is a small part of what is left.
uint64_t WorkerPool::steal(std::atomic<uint64_t> &victim, int threads) noexcept {
  uint64_t range = victim.load(std::memory_order_acquire);
  while (!range_empty(range)) {
    const uint32_t begin = range_begin(range);
    const uint32_t end = range_end(range);
    const uint32_t part = std::max<uint32_t>(1, (end - begin) / (2 * static_cast<uint32_t>(threads)));
    if (victim.compare_exchange_weak(range, pack_range(begin, end - part), std::memory_order_acq_rel,
                                     std::memory_order_acquire))
      return pack_range(end - part, end);
  }
  return 0;
}

// Counts finished units of a slot, whoever ran them. Nothing of the slot may be read afterwards.
void WorkerPool::retire(Slot &slot, uint64_t units) noexcept {
  if (slot.unfinished.fetch_sub(units, std::memory_order_acq_rel) != kWatched + units) return;
  if (unfinished_slots_.fetch_sub(1, std::memory_order_acq_rel) == 1) futex_wake(unfinished_slots_, 1);
}

void WorkerPool::wait_for_completion(int layer) noexcept {
  // The slot dealt last, or over the longest way, is finished last most of the time. Only the slot that is
  // waited for is read, so that the others keep their lines; after it come those that are finished, and the
  // reads of their lines overlap.
  int s = subpool_count_ - 1, w = 0;
  const auto done = [this, &s, &w] {
    for (; s >= 0; --s, w = 0) {
      const Subpool &subpool = subpools_[s];
      for (; w < subpool.dealt; ++w) {
        if (subpool.slots[w].unfinished.load(std::memory_order_acquire) != 0) return false;
      }
    }
    return true;
  };
  if (ready_soon(done)) return;
  run_others(0, 0, section_);
  const SpanScope span(own_lane(), {Stage::wait, layer}, 0);
  const int64_t limit = crowded_ ? kCrowdedSpinNs : std::max(spin_ns_, kCrowdedSpinNs);
  if (spin_until(done, limit, submitter_contention_)) return;
  // A worker that lost its CPU may hold a range that it took from another.
  run_others(0, 0, section_);

  // Each slot that is marked before its last unit is retired will be counted down by who retires that one.
  // One more stands for this loop.
  uint32_t slots = 0, finished = 1;
  for (int i = 0; i < subpool_count_; ++i) slots += static_cast<uint32_t>(subpools_[i].dealt);
  unfinished_slots_.store(slots + 1, std::memory_order_relaxed);
  for (int i = 0; i < subpool_count_; ++i) {
    for (int j = 0; j < subpools_[i].dealt; ++j) {
      if (subpools_[i].slots[j].unfinished.fetch_or(kWatched, std::memory_order_acq_rel) == 0) ++finished;
    }
  }
  uint32_t left = unfinished_slots_.fetch_sub(finished, std::memory_order_acq_rel) - finished;
  for (; left != 0; left = unfinished_slots_.load(std::memory_order_acquire))
    futex_wait(unfinished_slots_, left);
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
