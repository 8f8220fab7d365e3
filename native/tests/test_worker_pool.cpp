#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "faults.h"
#include "machines.h"
#include "runtime/worker_pool.h"

using ktk::SubpoolConfig;
using ktk::Topology;
using ktk::WorkerPool;
using namespace ktk_test;

// Counts how often each unit ran, and notices two threads that use one worker's scratch at a time.
class Counter {
 public:
  Counter(const WorkerPool &pool, std::vector<int64_t> counts) : counts_(std::move(counts)) {
    for (int s = 0; s < pool.subpools(); ++s) {
      threads_.push_back(pool.threads(s));
      runs_.emplace_back(std::make_unique<std::atomic<int>[]>(static_cast<size_t>(counts_[s] + 1)));
      busy_.emplace_back(std::make_unique<std::atomic<int>[]>(static_cast<size_t>(pool.threads(s))));
    }
  }

  void run_on(WorkerPool &pool) { pool.run(counts_.data(), &Counter::unit, this); }

  void check(int times = 1) const {
    for (size_t s = 0; s < counts_.size(); ++s) {
      for (int64_t unit = 0; unit < counts_[s]; ++unit) CHECK_EQUAL(runs_[s][unit].load(), times);
    }
    CHECK(!clash_.load());
  }

  static void unit(void *context, int subpool, int worker, int64_t unit) noexcept {
    Counter &self = *static_cast<Counter *>(context);
    if (subpool < 0 || subpool >= static_cast<int>(self.counts_.size()) || worker < 0 ||
        worker >= self.threads_[subpool] || unit < 0 || unit >= self.counts_[subpool]) {
      self.clash_ = true;
      return;
    }
    if (self.busy_[subpool][worker].exchange(1) != 0) self.clash_ = true;
    self.runs_[subpool][unit].fetch_add(1, std::memory_order_relaxed);
    self.busy_[subpool][worker].store(0);
  }

 private:
  std::vector<int64_t> counts_;
  std::vector<int> threads_;
  std::vector<std::unique_ptr<std::atomic<int>[]>> runs_;
  std::vector<std::unique_ptr<std::atomic<int>[]>> busy_;
  std::atomic<bool> clash_{false};
};

static std::vector<SubpoolConfig> on_node_0(std::initializer_list<int> threads) {
  std::vector<SubpoolConfig> configs;
  for (const int count : threads) configs.push_back({0, count});
  return configs;
}

static void nothing(void *, int, int, int64_t) noexcept {}

static double cpu_seconds() {
  timespec time;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

TEST(every_unit_once) {
  for (const auto &threads :
       {on_node_0({1}), on_node_0({2}), on_node_0({4}), on_node_0({1, 1}), on_node_0({2, 1, 3})}) {
    WorkerPool pool(threads, true, 20000);
    for (const int64_t units : {0, 1, 2, 3, 7, 100, 5000}) {
      std::vector<int64_t> counts;
      for (int s = 0; s < pool.subpools(); ++s) counts.push_back(s % 2 == 0 ? units : units / 2);
      Counter counter(pool, counts);
      counter.run_on(pool);
      counter.check();
    }
  }
}

TEST(subpools_without_units) {
  WorkerPool pool(on_node_0({2, 2, 2}), true, 0);
  for (const auto &counts : {std::vector<int64_t>{0, 5, 0}, {0, 0, 1}, {3, 0, 0}, {1, 0, 0}, {0, 0, 0}}) {
    Counter counter(pool, counts);
    counter.run_on(pool);
    counter.check();
  }
}

TEST(description) {
  WorkerPool pool(on_node_0({1, 2}), true, -1);
  CHECK_EQUAL(pool.subpools(), 2);
  CHECK_EQUAL(pool.threads(1), 2);
  CHECK_EQUAL(pool.thread_count(), 3);
  CHECK_EQUAL(pool.node(1), 0);
  const std::unique_lock<std::mutex> lock(pool.forward_mutex());
}

TEST(bad_arguments) {
  CHECK_THROWS(KTK_ERR_ARGUMENT, "at least one subpool", WorkerPool({}, true, -1));
  CHECK_THROWS(KTK_ERR_ARGUMENT, "subpool 1: got 0 threads", WorkerPool({{0, 1}, {0, 0}}, true, -1));
  CHECK_THROWS(KTK_ERR_ARGUMENT, "NUMA node 77 does not exist; this machine has node 0",
               WorkerPool({{77, 1}}, true, -1));
  CHECK_THROWS(KTK_ERR_ARGUMENT, "NUMA node -1", WorkerPool({{-1, 1}}, true, -1));
  WorkerPool pool(on_node_0({2}), true, -1);
  const int64_t negative = -1;
  const int64_t large = int64_t{1} << 32;
  CHECK_THROWS(KTK_ERR_ARGUMENT, "got -1 units", pool.run(&negative, &nothing, nullptr));
  CHECK_THROWS(KTK_ERR_ARGUMENT, "got 4294967296 units", pool.run(&large, &nothing, nullptr));
}

TEST(placement_on_two_packages) {
  Machine machine;
  make_dual_socket(machine);
  const Topology topology = Topology::read(machine.root());
  faults.setaffinity_errno = -1;
  {
    WorkerPool pool({{0, 4}, {1, 6}}, true, 0, topology);
    CHECK_EQUAL(pool.warnings(), "");
    for (int w = 0; w < 4; ++w) CHECK_EQUAL(pool.cpu(0, w), w);
    CHECK_EQUAL(pool.cpu(1, 3), 7);
    CHECK_EQUAL(pool.cpu(1, 4), 12);
    CHECK(!pool.crowded());
    CHECK_EQUAL(pool.spare_cpus(), 6);
    CHECK(pool.bind_submitter());
    Counter counter(pool, {100, 100});
    counter.run_on(pool);
    counter.check();
  }
  {
    WorkerPool pool({{1, 2}, {1, 2}}, true, 0, topology);
    CHECK_EQUAL(pool.cpu(0, 0), 4);
    CHECK_EQUAL(pool.cpu(1, 0), 6);
  }
  {
    WorkerPool pool({{0, 2}, {1, 9}}, true, 0, topology);
    CHECK_EQUAL(pool.warnings(), "NUMA node 1: 9 threads for 8 CPUs; they are not bound to single CPUs");
    CHECK_EQUAL(pool.cpu(0, 1), 1);
    CHECK_EQUAL(pool.cpu(1, 0), -1);
    CHECK(pool.crowded());
  }
  {
    WorkerPool pool({{0, 2}, {1, 2}}, false, 0, topology);
    CHECK_EQUAL(pool.cpu(0, 1), -1);
    CHECK(!pool.bind_submitter());
  }
  faults.setaffinity_errno = 0;
}

TEST(node_without_cpus) {
  Machine machine;
  make_laptop(machine);
  machine.online_nodes("0,2");
  machine.node(2, "", 64000);
  const Topology topology = Topology::read(machine.root());
  CHECK_THROWS(KTK_ERR_ARGUMENT, "NUMA node 2 has no CPUs", WorkerPool({{2, 1}}, true, -1, topology));
}

TEST(quota_below_the_threads) {
  Machine machine;
  make_laptop(machine);
  machine.write("proc/self/cgroup", "0::/\n");
  machine.write("sys/fs/cgroup/cpu.max", "150000 100000\n");
  faults.setaffinity_errno = -1;
  WorkerPool pool({{0, 4}}, true, -1, Topology::read(machine.root()));
  faults.setaffinity_errno = 0;
  CHECK_EQUAL(pool.warnings(), "the CPU quota of 1.5 CPUs is less than the 4 threads");
  CHECK(pool.crowded());
}

TEST(binding_refused) {
  faults.setaffinity_errno = EPERM;
  const int cpus = Topology::read().nodes[0].physical_cores;
  WorkerPool pool({{0, std::max(cpus, 2)}}, true, -1);
  faults.setaffinity_errno = 0;
  if (cpus >= 2) CHECK_EQUAL(pool.warnings(), "threads are not bound to CPUs: Operation not permitted");
  CHECK_EQUAL(pool.cpu(0, 1), -1);
  Counter counter(pool, {50});
  counter.run_on(pool);
  counter.check();
}

// Keeps its worker until the other one has come, so that neither does both units.
static void note_cpu(void *context, int, int worker, int64_t) noexcept {
  auto *seen = static_cast<std::atomic<int> *>(context);
  seen[worker] = sched_getcpu();
  for (int i = 0; i < 20000 && seen[1 - worker] < 0; ++i) usleep(100);
}

TEST(workers_run_where_they_are_bound) {
  const std::vector<int> cpus = Topology::read().nodes[0].cpus;
  if (cpus.size() < 2) return;
  WorkerPool pool({{0, 2}}, true, -1);
  std::atomic<int> seen[2] = {{-1}, {-1}};
  const int64_t units = 2;
  pool.run(&units, &note_cpu, seen);
  CHECK_EQUAL(seen[1].load(), pool.cpu(0, 1));
  CHECK_EQUAL(pool.cpu(0, 0), cpus[0]);
  CHECK_EQUAL(pool.cpu(0, 1), cpus[1]);
  std::thread submitter([&] {
    CHECK(pool.bind_submitter());
    CHECK_EQUAL(show(ktk::thread_affinity()), std::to_string(pool.cpu(0, 0)));
  });
  submitter.join();
}

TEST(thread_creation_fails) {
  const int before = settled_threads();
  for (int created = 0; created < 5; ++created) {
    faults.pthread_create_after = created;
    CHECK_THROWS(KTK_ERR_SYSTEM, "cannot start thread " + std::to_string(created + 2) + " of 6",
                 WorkerPool(on_node_0({3, 3}), true, -1));
    faults.pthread_create_after = -1;
  }
  CHECK(wait_for_threads(before));
}

TEST(destruction_joins) {
  const int before = settled_threads();
  for (int i = 0; i < 50; ++i) {
    WorkerPool pool(on_node_0({2, 2}), true, i % 2 == 0 ? 0 : 1000000);
    if (i % 3 == 0) continue;
    Counter counter(pool, {10, 10});
    counter.run_on(pool);
    counter.check();
  }
  CHECK(wait_for_threads(before));
}

struct Held {
  std::atomic<int64_t> others{0};
  int64_t expected;
  std::atomic<bool> timed_out{false};
};

// Unit 0 ends only after all others, which therefore have to leave the share of its worker.
static void hold_first(void *context, int, int, int64_t unit) noexcept {
  Held &held = *static_cast<Held *>(context);
  if (unit != 0) {
    held.others.fetch_add(1);
    return;
  }
  for (int64_t start = ktk::now_ns(); held.others.load() < held.expected; sched_yield()) {
    if (ktk::now_ns() - start < int64_t{20} * 1000000000) continue;
    held.timed_out = true;
    return;
  }
}

TEST(units_of_a_busy_worker_are_taken_over) {
  WorkerPool pool(on_node_0({2}), true, 0);
  for (int i = 0; i < 100; ++i) {
    Held held;
    const int64_t units = 64;
    held.expected = units - 1;
    pool.run(&units, &hold_first, &held);
    CHECK(!held.timed_out.load());
  }
}

struct Nested {
  WorkerPool *pool;
  WorkerPool *other;
  std::atomic<int64_t> inner{0};
  std::atomic<bool> wrong_worker{false};
};

struct Inner {
  Nested *nested;
  pthread_t thread;
  int worker;
};

static void count_inner(void *context, int subpool, int worker, int64_t) noexcept {
  Inner &inner = *static_cast<Inner *>(context);
  inner.nested->inner.fetch_add(1);
  if (!pthread_equal(inner.thread, pthread_self()) || subpool != 0 || worker != inner.worker)
    inner.nested->wrong_worker = true;
}

static void run_nested(void *context, int, int worker, int64_t) noexcept {
  Nested &nested = *static_cast<Nested *>(context);
  Inner inner{&nested, pthread_self(), worker};
  const int64_t units = 3;
  nested.pool->run(&units, &count_inner, &inner);
}

static void run_nested_in_other(void *context, int, int, int64_t) noexcept {
  Nested &nested = *static_cast<Nested *>(context);
  const int64_t units = 1;
  nested.other->run(
      &units,
      [](void *inner, int, int, int64_t) noexcept { static_cast<Nested *>(inner)->inner.fetch_add(1); },
      context);
}

TEST(nested_sections) {
  WorkerPool pool(on_node_0({3}), true, -1);
  Nested nested{&pool, nullptr};
  const int64_t units = 20;
  for (int i = 0; i < 100; ++i) pool.run(&units, &run_nested, &nested);
  CHECK_EQUAL(nested.inner.load(), int64_t{6000});
  CHECK(!nested.wrong_worker.load());
}

TEST(sections_of_another_pool) {
  WorkerPool pool(on_node_0({2}), true, -1);
  WorkerPool other(on_node_0({2}), true, -1);
  Nested nested{&pool, &other};
  const int64_t units = 20;
  for (int i = 0; i < 50; ++i) pool.run(&units, &run_nested_in_other, &nested);
  CHECK_EQUAL(nested.inner.load(), int64_t{1000});
}

TEST(concurrent_callers) {
  WorkerPool pool(on_node_0({2, 1}), true, 5000);
  std::vector<std::thread> callers;
  for (unsigned seed = 0; seed < 4; ++seed) {
    callers.emplace_back([&pool, seed] {
      std::minstd_rand random(seed + 1);
      for (int i = 0; i < 500; ++i) {
        Counter counter(pool, {static_cast<int64_t>(random() % 40), static_cast<int64_t>(random() % 10)});
        counter.run_on(pool);
        counter.check();
      }
    });
  }
  for (std::thread &caller : callers) caller.join();
}

TEST(stress) {
  // Sections of random sizes, back to back and after pauses in which workers park: a million, or fewer where
  // a sanitizer makes each one slow.
  for (const auto &threads : {on_node_0({2}), on_node_0({2, 2}), on_node_0({5})}) {
    WorkerPool pool(threads, true, 3000);
    std::minstd_rand random(7);
    constexpr int64_t kMost = 48;
    std::vector<std::atomic<int64_t>> sums(4);
    int64_t expected = 0;
    int64_t sections = 0;
    const int total = KTK_TEST_TSAN ? 8000 : KTK_TEST_ASAN ? 35000 : 335000;
    for (int i = 0; i < total; ++i) {
      int64_t counts[2];
      for (int s = 0; s < pool.subpools(); ++s) {
        counts[s] = static_cast<int64_t>(random() % kMost);
        expected += counts[s] * (counts[s] + 1) / 2;
      }
      pool.run(
          counts,
          [](void *context, int, int worker, int64_t unit) noexcept {
            auto *totals = static_cast<std::atomic<int64_t> *>(context);
            totals[worker % 4].fetch_add(unit + 1, std::memory_order_relaxed);
          },
          sums.data());
      ++sections;
      if (random() % 512 == 0) usleep(static_cast<useconds_t>(random() % 100));
      int64_t sum = 0;
      for (const auto &part : sums) sum += part.load(std::memory_order_relaxed);
      if (sum != expected) {
        record_failure(__FILE__, __LINE__, "section " + std::to_string(sections) + " lost units");
        return;
      }
    }
  }
}

// Units that end only when each of them has begun, which takes as many workers as there are units.
struct Gathering {
  int64_t expected = 0;
  std::atomic<int64_t> begun{0};
  std::atomic<bool> timed_out{false};

  static void unit(void *context, int, int, int64_t) noexcept {
    Gathering &all = *static_cast<Gathering *>(context);
    all.begun.fetch_add(1);
    for (int64_t start = ktk::now_ns(); all.begun.load() < all.expected; sched_yield()) {
      if (ktk::now_ns() - start < int64_t{60} * 1000000000) continue;
      all.timed_out = true;
      return;
    }
  }
};

TEST(every_parked_worker_is_woken) {
  for (const auto &threads : {on_node_0({2}), on_node_0({33}), on_node_0({1, 9, 3}), on_node_0({70})}) {
    for (const int64_t spin_ns : {0, 3000}) {
      WorkerPool pool(threads, true, spin_ns);
      std::minstd_rand random(3);
      for (int i = 0; i < (KTK_TEST_TSAN ? 20 : 100); ++i) {
        // Fewer units than workers in some sections: the others sleep on, and have to be woken by a later
        // one.
        std::vector<int64_t> counts;
        Gathering all;
        for (int s = 0; s < pool.subpools(); ++s) {
          const auto most = static_cast<unsigned>(pool.threads(s));
          counts.push_back(i % 2 == 0 ? static_cast<int64_t>(most)
                                      : 1 + static_cast<int64_t>(random() % most));
          all.expected += counts.back();
        }
        if (i % 5 == 0) usleep(static_cast<useconds_t>(random() % 300));
        pool.run(counts.data(), &Gathering::unit, &all);
        CHECK_EQUAL(all.begun.load(), all.expected);
        CHECK(!all.timed_out.load());
        if (all.timed_out.load()) return;
      }
    }
  }
}

struct Shapes {
  WorkerPool *pool;
  std::vector<std::atomic<int64_t>> runs;
  std::atomic<int64_t> inner{0};
  unsigned seed = 0;
  static constexpr int64_t kInner = 3;

  explicit Shapes(WorkerPool *on) : pool(on), runs(200) {}

  // Most units are short, some keep their worker until others have taken over what it has left, some lose
  // their CPU, and some run a section of their own.
  static void unit(void *context, int, int, int64_t unit) noexcept {
    Shapes &self = *static_cast<Shapes *>(context);
    self.runs[static_cast<size_t>(unit)].fetch_add(1, std::memory_order_relaxed);
    const auto kind = (static_cast<unsigned>(unit) * 2654435761u + self.seed) >> 8;
    if (kind % 16 == 0) {
      const std::vector<int64_t> counts(static_cast<size_t>(self.pool->subpools()), kInner);
      self.pool->run(
          counts.data(),
          [](void *shapes, int, int, int64_t) noexcept {
            static_cast<Shapes *>(shapes)->inner.fetch_add(1, std::memory_order_relaxed);
          },
          context);
    } else if (kind % 64 == 1) {
      usleep(50);
    } else if (kind % 16 == 2) {
      sched_yield();
    }
  }
};

TEST(random_widths_and_sections) {
  std::minstd_rand random(11);
  const int pools = KTK_TEST_TSAN ? 12 : KTK_TEST_ASAN ? 25 : 60;
  for (int round = 0; round < pools; ++round) {
    std::vector<SubpoolConfig> configs;
    int threads = 1 + static_cast<int>(random() % 33);
    for (; threads > 0 && configs.size() < 2; threads -= configs.back().threads)
      configs.push_back({0, 1 + static_cast<int>(random() % static_cast<unsigned>(threads))});
    if (threads > 0) configs.push_back({0, threads});
    const int64_t spins[] = {0, 2000, 100000};
    WorkerPool pool(configs, round % 2 == 0, spins[random() % 3]);
    std::vector<std::thread> callers;
    for (unsigned caller = 0; caller < 1 + random() % 3; ++caller) {
      callers.emplace_back([&pool, seed = static_cast<unsigned>(random())] {
        std::minstd_rand own(seed);
        for (int section = 0; section < 60; ++section) {
          Shapes shapes(&pool);
          shapes.seed = static_cast<unsigned>(own());
          std::vector<int64_t> counts;
          for (int s = 0; s < pool.subpools(); ++s)
            counts.push_back(static_cast<int64_t>(own() % 3 == 0 ? own() % 4 : own() % 200));
          pool.run(counts.data(), &Shapes::unit, &shapes);
          for (int64_t unit = 0; unit < 200; ++unit) {
            int64_t expected = 0;
            for (const int64_t count : counts) expected += unit < count ? 1 : 0;
            CHECK_EQUAL(shapes.runs[static_cast<size_t>(unit)].load(), expected);
          }
          CHECK_EQUAL(shapes.inner.load() % (Shapes::kInner * pool.subpools()), int64_t{0});
          if (own() % 8 == 0) usleep(static_cast<useconds_t>(own() % 200));
        }
      });
    }
    for (std::thread &caller : callers) caller.join();
  }
}

TEST(writes_of_units_are_visible_to_the_caller_and_the_next_section) {
  WorkerPool pool(on_node_0({3}), true, -1);
  std::vector<int64_t> values(300, 0);
  const int64_t units = 300;
  for (int i = 0; i < 200; ++i) {
    // Plain memory: each unit reads what some other worker wrote in the section before.
    pool.run(
        &units,
        [](void *context, int, int, int64_t unit) noexcept {
          auto &all = *static_cast<std::vector<int64_t> *>(context);
          all[static_cast<size_t>(unit)] += 1;
        },
        &values);
    for (const int64_t value : values) CHECK_EQUAL(value, int64_t{i + 1});
    std::rotate(values.begin(), values.begin() + 101, values.end());
  }
}

TEST(more_threads_than_cpus) {
  const int threads = 4 * Topology::read().allowed_cpus();
  WorkerPool pool({{0, threads}}, true, -1);
  CHECK(pool.warnings().find("not bound to single CPUs") != std::string::npos);
  CHECK_EQUAL(pool.warnings().find('\n'), std::string::npos);
  CHECK(pool.crowded());
  const int64_t start = ktk::now_ns();
  for (int i = 0; i < 2000; ++i) {
    Counter counter(pool, {threads * 2});
    counter.run_on(pool);
    counter.check();
  }
  CHECK(ktk::now_ns() - start < int64_t{20} * 1000000000);
}

TEST(idle_workers_use_no_cpu_time) {
  WorkerPool pool(on_node_0({2, 1}), true, 200000);
  Counter counter(pool, {100, 100});
  counter.run_on(pool);
  usleep(20000);
  const double before = cpu_seconds();
  usleep(300000);
  CHECK(cpu_seconds() - before < 0.003);
}

TEST(signals_stay_with_the_host) {
  static std::atomic<bool> elsewhere{false};
  static pthread_t host;
  host = pthread_self();
  struct sigaction action = {}, before;
  action.sa_handler = [](int) {
    if (!pthread_equal(pthread_self(), host)) elsewhere = true;
  };
  sigaction(SIGUSR1, &action, &before);
  {
    WorkerPool pool(on_node_0({4}), true, 0);
    for (int i = 0; i < 200; ++i) {
      Counter counter(pool, {16});
      counter.run_on(pool);
      kill(getpid(), SIGUSR1);
    }
  }
  sigaction(SIGUSR1, &before, nullptr);
  CHECK(!elsewhere.load());
}

#if !KTK_TEST_TSAN
static int status_of_child(pid_t child) {
  for (int attempt = 0; attempt < 10000; ++attempt) {
    int status = 0;
    if (waitpid(child, &status, WNOHANG) == child) return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
    usleep(1000);
  }
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
  return -2;
}

TEST(fork_while_sections_run) {
  auto pool = std::make_unique<WorkerPool>(on_node_0({2, 1}), true, -1);
  std::atomic<bool> stop{false};
  // Allocates nothing while the process forks: a sanitizer's allocator does not survive that.
  Counter background(*pool, {20, 5});
  std::thread busy([&] {
    while (!stop) {
      const std::lock_guard<std::mutex> lock(pool->forward_mutex());
      background.run_on(*pool);
    }
  });
  for (int i = 0; i < 20; ++i) {
    const pid_t child = fork();
    if (child == 0) {
      const int before = failures();
      if (i % 4 != 0) {
        const std::lock_guard<std::mutex> lock(pool->forward_mutex());
        Counter counter(*pool, {20, 5});
        counter.run_on(*pool);
        counter.check();
        if (count_threads() != 3) _exit(3);
      }
      pool.reset();
      WorkerPool fresh(on_node_0({2}), true, -1);
      Counter counter(fresh, {20});
      counter.run_on(fresh);
      counter.check();
      _exit(failures() == before ? 0 : 1);
    }
    CHECK_EQUAL(status_of_child(child), 0);
  }
  stop = true;
  busy.join();
  Counter counter(*pool, {20, 5});
  counter.run_on(*pool);
  counter.check();
}

TEST(threads_missing_in_the_child) {
  WorkerPool pool(on_node_0({3}), true, -1);
  const pid_t child = fork();
  if (child == 0) {
    faults.pthread_create_after = 1;
    const int before = failures();
    Counter refused(pool, {20});
    CHECK_THROWS(KTK_ERR_SYSTEM, "cannot start thread 3 of 3", refused.run_on(pool));
    refused.check(0);
    faults.pthread_create_after = -1;
    Counter counter(pool, {20});
    counter.run_on(pool);
    counter.check();
    _exit(failures() == before ? 0 : 1);
  }
  CHECK_EQUAL(status_of_child(child), 0);
}

TEST(exit_with_living_pools) {
  for (int i = 0; i < 4; ++i) {
    const pid_t child = fork();
    if (child == 0) {
      auto *pool = new WorkerPool(on_node_0({3}), true, i < 2 ? 0 : 100000000);
      Counter counter(*pool, {20});
      counter.run_on(*pool);
      if (i % 2 == 0) _exit(0);
      std::quick_exit(0);
    }
    CHECK_EQUAL(status_of_child(child), 0);
  }
}
#endif
