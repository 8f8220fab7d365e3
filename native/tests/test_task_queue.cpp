#include <signal.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "faults.h"
#include "machines.h"
#include "runtime/task_queue.h"

using ktk::Task;
using ktk::TaskQueue;
using ktk::WorkerPool;
using namespace ktk_test;

struct Journal {
  std::vector<int> order;
  std::atomic<int> freed{0};
};

struct Entry {
  Journal *journal;
  int number;
  int sleep_us = 0;

  static void run(void *context) {
    const Entry &entry = *static_cast<Entry *>(context);
    if (entry.sleep_us > 0) usleep(static_cast<useconds_t>(entry.sleep_us));
    entry.journal->order.push_back(entry.number);
  }
  static void done(void *context) {
    const auto entry = std::unique_ptr<Entry>(static_cast<Entry *>(context));
    entry->journal->freed.fetch_add(1);
  }
};

static Task entry(Journal &journal, int number, int sleep_us = 0) {
  return Task{&Entry::run, &Entry::done, new Entry{&journal, number, sleep_us}};
}

static Task call(void (*run)(void *), void *context = nullptr) { return Task{run, nullptr, context}; }

TEST(order_of_submission) {
  WorkerPool pool({{0, 1}}, true, -1);
  TaskQueue queue(pool);
  Journal journal;
  for (int i = 0; i < 2000; ++i) {
    queue.submit(entry(journal, i));
    if (i % 300 == 0) usleep(300);
  }
  queue.sync();
  CHECK_EQUAL(queue.pending(), int64_t{0});
  CHECK_EQUAL(journal.freed.load(), 2000);
  CHECK_EQUAL(journal.order.size(), size_t{2000});
  for (int i = 0; i < 2000; ++i) CHECK_EQUAL(journal.order[static_cast<size_t>(i)], i);
}

struct Gate {
  std::atomic<bool> open{false};
  static void wait(void *context) {
    while (!static_cast<Gate *>(context)->open) usleep(100);
  }
};

TEST(sync_with_tasks_left) {
  WorkerPool pool({{0, 1}}, true, -1);
  TaskQueue queue(pool);
  Journal journal;
  Gate gate;
  queue.submit(entry(journal, 0));
  queue.submit(entry(journal, 1));
  queue.submit(call(&Gate::wait, &gate));
  queue.submit(entry(journal, 2));
  queue.sync(2);
  CHECK_EQUAL(journal.freed.load(), 2);
  CHECK_EQUAL(queue.pending(), int64_t{2});
  queue.sync(3);
  queue.sync(INT64_MAX);
  gate.open = true;
  queue.sync(0);
  CHECK_EQUAL(journal.freed.load(), 3);
  queue.sync();
  CHECK_THROWS(KTK_ERR_ARGUMENT, "allow_n_pending: got -1", queue.sync(-1));
}

TEST(several_waiters) {
  WorkerPool pool({{0, 2}}, true, -1);
  TaskQueue queue(pool);
  Journal journal;
  for (int i = 0; i < 40; ++i) queue.submit(entry(journal, i, 500));
  std::vector<std::thread> waiters;
  for (int left = 0; left < 4; ++left) {
    waiters.emplace_back([&queue, &journal, left] {
      queue.sync(left * 10);
      CHECK(journal.freed.load() >= 40 - left * 10);
    });
  }
  for (std::thread &waiter : waiters) waiter.join();
}

TEST(failures) {
  WorkerPool pool({{0, 1}}, true, -1);
  TaskQueue queue(pool);
  Journal journal;
  queue.submit(call([](void *) { ktk::fail(KTK_ERR_STATE, "first"); }));
  queue.submit(call([](void *) { ktk::fail(KTK_ERR_SYSTEM, "second"); }));
  queue.submit(entry(journal, 1));
  CHECK_THROWS(KTK_ERR_STATE, "first", queue.sync());
  CHECK_EQUAL(journal.freed.load(), 1);
  queue.sync();
  queue.submit(call([](void *) { throw std::bad_alloc(); }));
  CHECK_THROWS(KTK_ERR_MEMORY, "out of memory", queue.sync());
  queue.submit(call([](void *) { throw std::runtime_error("odd"); }));
  CHECK_THROWS(KTK_ERR_INTERNAL, "odd", queue.sync());
  queue.submit(call([](void *) { throw 7; }));
  queue.wait(0);
  CHECK_THROWS(KTK_ERR_INTERNAL, "", queue.raise_failure());
  queue.record_failure(KTK_ERR_SYSTEM, "told");
  queue.record_failure(KTK_ERR_STATE, "too late");
  CHECK_THROWS(KTK_ERR_SYSTEM, "told", queue.sync(5));
  queue.sync();
}

TEST(destruction_runs_what_is_pending) {
  Journal journal;
  const int before = settled_threads();
  {
    WorkerPool pool({{0, 1}}, true, -1);
    TaskQueue queue(pool);
    for (int i = 0; i < 20; ++i) queue.submit(entry(journal, i, 300));
    queue.submit(call([](void *) { ktk::fail(KTK_ERR_STATE, "nobody asks"); }));
  }
  CHECK_EQUAL(journal.order.size(), size_t{20});
  CHECK_EQUAL(journal.freed.load(), 20);
  CHECK(wait_for_threads(before));
  WorkerPool pool({{0, 1}}, true, -1);
  for (int i = 0; i < 50; ++i) {
    TaskQueue queue(pool);
    if (i % 2 == 0) usleep(200);
  }
}

struct Chain {
  TaskQueue *queue;
  int left;
  static void run(void *context) {
    Chain &chain = *static_cast<Chain *>(context);
    if (--chain.left > 0) chain.queue->submit(call(&Chain::run, context));
  }
};

TEST(tasks_that_submit) {
  WorkerPool pool({{0, 1}}, true, -1);
  Chain chain{nullptr, 100};
  {
    TaskQueue queue(pool);
    chain.queue = &queue;
    queue.submit(call(&Chain::run, &chain));
  }
  CHECK_EQUAL(chain.left, 0);
}

TEST(tasks_must_not_sync) {
  WorkerPool pool({{0, 1}}, true, -1);
  TaskQueue queue(pool);
  queue.submit(call([](void *context) { static_cast<TaskQueue *>(context)->sync(); }, &queue));
  CHECK_THROWS(KTK_ERR_STATE, "must not sync", queue.sync());
  CHECK(!queue.on_queue_thread());
}

TEST(submissions_from_several_threads) {
  WorkerPool pool({{0, 2}}, true, -1);
  TaskQueue queue(pool);
  Journal journal;
  constexpr int kEach = 5000;
  std::vector<std::thread> submitters;
  for (int t = 0; t < 4; ++t) {
    submitters.emplace_back([&queue, &journal, t] {
      for (int i = 0; i < kEach; ++i) {
        queue.submit(entry(journal, t * kEach + i));
        if (i % 1000 == 0) queue.sync(10);
      }
    });
  }
  for (std::thread &submitter : submitters) submitter.join();
  queue.sync();
  CHECK_EQUAL(journal.freed.load(), 4 * kEach);
  int last[4] = {-1, -1, -1, -1};
  for (const int number : journal.order) {
    CHECK(number > last[number / kEach]);
    last[number / kEach] = number;
  }
}

static void count_unit(void *context, int, int, int64_t) noexcept {
  static_cast<std::atomic<int> *>(context)->fetch_add(1);
}

struct Section {
  WorkerPool *pool;
  std::atomic<int> units{0};
  static void run(void *context) {
    Section &section = *static_cast<Section *>(context);
    const int64_t counts = 30;
    section.pool->run(&counts, &count_unit, &section.units);
  }
};

TEST(sections_from_the_queue_and_the_host) {
  WorkerPool pool({{0, 2}}, true, -1);
  TaskQueue queue(pool);
  Section section{&pool};
  for (int i = 0; i < 500; ++i) {
    queue.submit(call(&Section::run, &section));
    Section::run(&section);
  }
  queue.sync();
  CHECK_EQUAL(section.units.load(), 2 * 500 * 30);
}

TEST(binding_of_the_queue_thread) {
  WorkerPool pool({{0, 1}}, true, -1);
  TaskQueue queue(pool);
  std::vector<int> masks[3];
  for (int i = 0; i < 3; ++i) {
    Task task = call(
        [](void *context) { *static_cast<std::vector<int> *>(context) = ktk::thread_affinity(); }, &masks[i]);
    task.foreign = i == 1;
    queue.submit(task);
  }
  queue.sync();
  CHECK_EQUAL(show(masks[0]), std::to_string(pool.cpu(0, 0)));
  CHECK_EQUAL(show(masks[1]), show(ktk::thread_affinity()));
  CHECK_EQUAL(show(masks[2]), show(masks[0]));
}

struct Remembered : TaskQueue::Kept {
  explicit Remembered(int &counter) : count(counter) {}
  ~Remembered() override { ++count; }
  int &count;
};

TEST(kept_objects) {
  WorkerPool pool({{0, 1}}, true, -1);
  int gone = 0;
  {
    TaskQueue queue(pool);
    for (int i = 0; i < 3; ++i) queue.keep(std::make_unique<Remembered>(gone));
    queue.sync();
    CHECK_EQUAL(gone, 0);
  }
  CHECK_EQUAL(gone, 3);
}

TEST(thread_cannot_be_started) {
  WorkerPool pool({{0, 1}}, true, -1);
  faults.pthread_create_after = 0;
  CHECK_THROWS(KTK_ERR_SYSTEM, "task queue", TaskQueue queue(pool));
  faults.pthread_create_after = -1;
}

TEST(idle_queue_uses_no_cpu_time) {
  WorkerPool pool({{0, 2}}, true, -1);
  TaskQueue queue(pool);
  Section section{&pool};
  queue.submit(call(&Section::run, &section));
  queue.sync();
  usleep(20000);
  timespec before, after;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &before);
  usleep(300000);
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &after);
  CHECK((after.tv_sec - before.tv_sec) * 1000000000 + after.tv_nsec - before.tv_nsec < 3000000);
}

#if !KTK_TEST_TSAN
TEST(fork_with_tasks_pending) {
  WorkerPool pool({{0, 2}}, true, -1);
  auto queue = std::make_unique<TaskQueue>(pool);
  Gate gate;
  auto *ran = new std::atomic<int>(0);
  const auto count = [](void *context) { static_cast<std::atomic<int> *>(context)->fetch_add(1); };
  queue->submit(call(&Gate::wait, &gate));
  queue->submit(call(count, ran));
  for (int i = 0; i < 4; ++i) {
    const pid_t child = fork();
    if (child == 0) {
      const int before = failures();
      CHECK_EQUAL(queue->pending(), int64_t{0});
      queue->sync();
      if (i > 0) {
        Section section{&pool};
        queue->submit(call(&Section::run, &section));
        queue->submit(call([](void *) { ktk::fail(KTK_ERR_STATE, "in the child"); }));
        CHECK_THROWS(KTK_ERR_STATE, "in the child", queue->sync());
        CHECK_EQUAL(section.units.load(), 30);
      }
      CHECK_EQUAL(ran->load(), 0);
      if (i > 1) queue.reset();
      _exit(failures() == before ? 0 : 1);
    }
    int status = -1;
    waitpid(child, &status, 0);
    CHECK_EQUAL(status, 0);
  }
  gate.open = true;
  queue->sync();
  CHECK_EQUAL(ran->load(), 1);
  queue.reset();
  delete ran;
}

TEST(fork_inside_a_task) {
  WorkerPool pool({{0, 1}}, true, -1);
  TaskQueue queue(pool);
  int status = -1;
  queue.submit(call(
      [](void *context) {
        const pid_t child = fork();
        if (child == 0) _exit(0);
        waitpid(child, static_cast<int *>(context), 0);
      },
      &status));
  queue.sync();
  CHECK_EQUAL(status, 0);
}
#endif
