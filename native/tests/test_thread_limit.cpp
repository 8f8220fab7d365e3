#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <mutex>
#include <set>
#include <thread>
#include <utility>
#include <vector>

#include "check.h"
#include "faults.h"
#include "machines.h"
#include "runtime/worker_pool.h"

using ktk::WorkerPool;
using namespace ktk_test;

// Who ran units, and how often each ran.
class Log {
 public:
  explicit Log(std::vector<int64_t> counts) : counts_(std::move(counts)) {
    for (const int64_t count : counts_) runs_.emplace_back(static_cast<size_t>(count), 0);
  }

  std::set<std::pair<int, int>> run_on(WorkerPool &pool) {
    workers_.clear();
    threads_.clear();
    for (std::vector<int> &runs : runs_) std::fill(runs.begin(), runs.end(), 0);
    pool.run(counts_.data(), &Log::unit, this);
    for (const std::vector<int> &runs : runs_) {
      for (const int count : runs) CHECK_EQUAL(count, 1);
    }
    return workers_;
  }
  size_t threads() const { return threads_.size(); }

 private:
  static void unit(void *context, int subpool, int worker, int64_t unit) noexcept {
    auto &self = *static_cast<Log *>(context);
    usleep(100);
    const std::lock_guard<std::mutex> lock(self.mutex_);
    ++self.runs_[static_cast<size_t>(subpool)][static_cast<size_t>(unit)];
    self.workers_.insert({subpool, worker});
    self.threads_.insert(std::this_thread::get_id());
  }

  std::vector<int64_t> counts_;
  std::vector<std::vector<int>> runs_;
  std::mutex mutex_;
  std::set<std::pair<int, int>> workers_;
  std::set<std::thread::id> threads_;
};

struct Unlimited {
  ~Unlimited() { WorkerPool::limit_threads(0); }
};

TEST(workers_beyond_the_limit_do_nothing) {
  const Unlimited at_end;
  WorkerPool pool({{0, 4}}, false, 100000);
  Log log({40});
  log.run_on(pool);
  for (const int limit : {2, 1, 3, 4, 1, 2}) {
    WorkerPool::limit_threads(limit);
    // A worker on its way out of the section before may still take a unit.
    log.run_on(pool);
    usleep(1000);
    for (const auto &[subpool, worker] : log.run_on(pool)) CHECK(worker < limit);
    CHECK(log.threads() <= static_cast<size_t>(limit));
  }
}

TEST(limits_are_shared_among_subpools) {
  const Unlimited at_end;
  WorkerPool pool({{0, 4}, {0, 2}}, false, 0);
  Log log({30, 30});
  for (int limit = 1; limit <= 6; ++limit) {
    WorkerPool::limit_threads(limit);
    log.run_on(pool);
    usleep(2000);
    int most[2] = {0, 0};
    for (const auto &[subpool, worker] : log.run_on(pool))
      most[subpool] = std::max(most[subpool], worker + 1);
    CHECK(log.threads() <= static_cast<size_t>(limit));
    CHECK(most[0] + most[1] <= std::max(limit, 2));
    CHECK(most[0] <= 4 && most[1] <= 2);
  }
}

TEST(one_thread_does_every_subpool) {
  const Unlimited at_end;
  WorkerPool pool({{0, 2}, {0, 2}, {0, 2}}, false, 0);
  Log log({5, 5, 5});
  for (const int limit : {1, 2}) {
    WorkerPool::limit_threads(limit);
    log.run_on(pool);
    usleep(2000);
    CHECK_EQUAL(log.run_on(pool).size(), size_t{3});
    CHECK_EQUAL(log.threads(), size_t{1});
  }
}

TEST(what_was_read_can_be_set_again) {
  const Unlimited at_end;
  WorkerPool pool({{0, 3}}, false, 0);
  const int all = WorkerPool::most_threads();
  CHECK(all >= 3);
  WorkerPool::limit_threads(2);
  CHECK_EQUAL(WorkerPool::most_threads(), 2);
  WorkerPool::limit_threads(1);
  CHECK_EQUAL(WorkerPool::most_threads(), 1);
  WorkerPool::limit_threads(all);
  CHECK_EQUAL(WorkerPool::most_threads(), all);
  // No limit, so that a larger pool is not held back by it.
  WorkerPool large({{0, all + 2}}, false, 0);
  CHECK_EQUAL(WorkerPool::most_threads(), all + 2);
  WorkerPool::limit_threads(0);
  CHECK_EQUAL(WorkerPool::most_threads(), all + 2);
  CHECK_THROWS(KTK_ERR_ARGUMENT, "num_threads: got -1", WorkerPool::limit_threads(-1));
  CHECK_EQUAL(WorkerPool::most_threads(), all + 2);
}

static int64_t cpu_ns() {
  timespec time;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
  return int64_t{time.tv_sec} * 1000000000 + time.tv_nsec;
}

TEST(workers_beyond_the_limit_sleep) {
  const Unlimited at_end;
  // They would spin for ten seconds.
  WorkerPool pool({{0, 2}}, false, int64_t{10000000000});
  Log log({12});
  log.run_on(pool);
  WorkerPool::limit_threads(1);
  log.run_on(pool);
  usleep(5000);
  const int64_t before = cpu_ns();
  usleep(200000);
  CHECK(cpu_ns() - before < 100000000);
}

TEST(pools_that_begin_and_end_within_a_limit) {
  const Unlimited at_end;
  WorkerPool::limit_threads(1);
  for (int i = 0; i < 20; ++i) {
    WorkerPool pool({{0, 3}}, false, i % 2 == 0 ? 0 : 100000);
    if (i % 3 == 0) continue;
    Log log({4});
    log.run_on(pool);
    CHECK_EQUAL(log.threads(), size_t{1});
    if (i % 3 == 1) continue;
    WorkerPool::limit_threads(0);
    log.run_on(pool);
    WorkerPool::limit_threads(1);
  }
}

TEST(a_limit_that_changes_while_sections_run) {
  const Unlimited at_end;
  WorkerPool pool({{0, 3}, {0, 2}}, false, 20000);
  std::atomic<bool> done{false};
  std::thread changer([&] {
    for (int i = 0; !done.load(); ++i) {
      WorkerPool::limit_threads(i % 6);
      usleep(50);
    }
  });
  std::atomic<int64_t> units{0};
  const int64_t counts[] = {11, 7};
  constexpr int kSections = 3000;
  for (int i = 0; i < kSections; ++i) {
    pool.run(
        counts,
        [](void *context, int, int, int64_t) noexcept {
          static_cast<std::atomic<int64_t> *>(context)->fetch_add(1, std::memory_order_relaxed);
        },
        &units);
  }
  done.store(true);
  changer.join();
  CHECK_EQUAL(units.load(), int64_t{kSections * 18});
}

// ThreadSanitizer refuses threads in the child of a process with threads.
#if !KTK_TEST_TSAN
TEST(fork_within_a_limit) {
  const Unlimited at_end;
  WorkerPool pool({{0, 3}}, false, 0);
  Log log({9});
  WorkerPool::limit_threads(2);
  log.run_on(pool);
  const pid_t child = ::fork();
  if (child == 0) {
    log.run_on(pool);
    bool right = WorkerPool::most_threads() == 2 && log.threads() <= 2;
    WorkerPool::limit_threads(0);
    log.run_on(pool);
    right = right && failures() == 0;
    _exit(right ? 0 : 1);
  }
  int status = -1;
  CHECK_EQUAL(waitpid(child, &status, 0), child);
  CHECK_EQUAL(status, 0);
}
#endif
