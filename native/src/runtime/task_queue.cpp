#include "runtime/task_queue.h"

#include <signal.h>

#include <algorithm>
#include <climits>
#include <cstring>
#include <memory>
#include <new>
#include <utility>

#include "runtime/topology.h"

namespace ktk {
namespace {

// Long enough for a host that submits the next layer as soon as it has the last result.
constexpr int64_t kHotNs = 100000;

thread_local const TaskQueue *queue_of_thread = nullptr;

}  // namespace

TaskQueue::TaskQueue(WorkerPool &pool) : pool_(pool) {
  link_ = std::make_shared<Link>();
  link_->queue = this;
  start_thread();
}

TaskQueue::~TaskQueue() {
  {
    const std::unique_lock<std::shared_mutex> lock(link_->mutex);
    link_->queue = nullptr;
  }
  if (running_.load(std::memory_order_acquire)) {
    stopping_.store(true, std::memory_order_release);
    arrivals_.fetch_add(1, std::memory_order_seq_cst);
    futex_wake(arrivals_, 1);
    pthread_join(thread_, nullptr);
  }
  delete oldest_;
  while (kept_ != nullptr) delete std::exchange(kept_, kept_->next_);
}

void TaskQueue::start_thread() {
  const std::lock_guard<std::mutex> lock(start_mutex_);
  if (running_.load(std::memory_order_relaxed)) return;
  auto first = std::make_unique<Node>();
  oldest_ = first.get();
  newest_.store(oldest_, std::memory_order_relaxed);
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  const int failure = pthread_create(&thread_, nullptr, &thread_main, this);
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  if (failure != 0) {
    oldest_ = nullptr;
    fail(KTK_ERR_SYSTEM, "cannot start the thread of a task queue: ", std::strerror(failure));
  }
  first.release();
  running_.store(true, std::memory_order_release);
}

void TaskQueue::after_fork_in_child() noexcept {
  new (&start_mutex_) std::mutex();
  new (&failure_mutex_) std::mutex();
  new (&kept_mutex_) std::mutex();
  new (&link_->mutex) std::shared_mutex();
  // A task that forks takes the queue's thread along.
  if (on_queue_thread()) return;
  // The nodes of the parent's tasks are abandoned: freeing them could need a lock of a dead thread.
  running_.store(false, std::memory_order_relaxed);
  newest_.store(nullptr, std::memory_order_relaxed);
  oldest_ = nullptr;
  submitted_.store(0, std::memory_order_relaxed);
  finished_.store(0, std::memory_order_relaxed);
  parked_.store(0, std::memory_order_relaxed);
  waiters_.store(0, std::memory_order_relaxed);
  bound_ = false;
}

void *TaskQueue::thread_main(void *argument) noexcept {
  pthread_setname_np(pthread_self(), "ktk-queue");
  static_cast<TaskQueue *>(argument)->work();
  return nullptr;
}

void TaskQueue::submit(const Task &task) {
  auto node = std::make_unique<Node>();
  node->task = task;
  if (!running_.load(std::memory_order_acquire)) start_thread();
  submitted_.fetch_add(1, std::memory_order_relaxed);
  Node *const appended = node.release();
  Node *const before = newest_.exchange(appended, std::memory_order_acq_rel);
  before->next.store(appended, std::memory_order_release);
  arrivals_.fetch_add(1, std::memory_order_seq_cst);
  if (parked_.load(std::memory_order_seq_cst) != 0) futex_wake(arrivals_, 1);
}

// The next task's node, whose predecessor is freed; nullptr when none is linked yet.
TaskQueue::Node *TaskQueue::pop() noexcept {
  Node *const next = oldest_->next.load(std::memory_order_acquire);
  if (next == nullptr) return nullptr;
  delete oldest_;
  oldest_ = next;
  return next;
}

void TaskQueue::work() noexcept {
  queue_of_thread = this;
  try {
    inherited_affinity_ = thread_affinity();
  } catch (...) {
    inherited_affinity_.clear();
  }
  place(false);
  Contention contention;
  for (;;) {
    if (const Node *node = pop()) {
      execute(node->task);
    } else if (stopping_.load(std::memory_order_acquire)) {
      // A task submitted before the queue was destroyed is linked by now.
      if (oldest_->next.load(std::memory_order_acquire) == nullptr) return;
    } else {
      wait_for_submission(contention);
    }
  }
}

void TaskQueue::execute(const Task &task) noexcept {
  place(task.foreign);
  try {
    if (task.foreign) {
      const SpanScope span(pool_.own_lane(), {Stage::task}, 1);
      task.run(task.context);
    } else {
      task.run(task.context);
    }
  } catch (...) {
    record_current_exception();
  }
  if (task.done != nullptr) task.done(task.context);
  finished_.fetch_add(1, std::memory_order_release);
  completions_.fetch_add(1, std::memory_order_seq_cst);
  if (waiters_.load(std::memory_order_seq_cst) != 0) futex_wake(completions_, INT_MAX);
}

void TaskQueue::place(bool foreign) noexcept {
  if (foreign == !bound_) return;
  if (!foreign)
    bound_ = !inherited_affinity_.empty() && pool_.bind_submitter();
  else
    bound_ = set_thread_affinity(pthread_self(), inherited_affinity_) != 0;
}

void TaskQueue::wait_for_submission(Contention &contention) noexcept {
  const uint32_t seen = arrivals_.load(std::memory_order_acquire);
  const auto arrived = [this, seen] {
    return arrivals_.load(std::memory_order_acquire) != seen ||
           oldest_->next.load(std::memory_order_acquire) != nullptr ||
           stopping_.load(std::memory_order_acquire);
  };
  if (spin_until(arrived, pool_.crowded() ? 0 : kHotNs, contention)) return;
  parked_.store(1, std::memory_order_seq_cst);
  while (!arrived()) futex_wait(arrivals_, seen);
  parked_.store(0, std::memory_order_relaxed);
}

void TaskQueue::wait(int64_t allow_n_pending) noexcept {
  const uint64_t submitted = submitted_.load(std::memory_order_acquire);
  const uint64_t allowed = static_cast<uint64_t>(std::max<int64_t>(allow_n_pending, 0));
  if (submitted <= allowed) return;
  const uint64_t target = submitted - allowed;
  const auto reached = [this, target] { return finished_.load(std::memory_order_acquire) >= target; };
  const SpanScope span(pool_.own_lane(), {Stage::sync}, 0);
  // Only where a CPU is left over: elsewhere this thread would keep one from the pool.
  Contention contention;
  if (spin_until(reached, pool_.spare_cpus() > 0 ? kHotNs : 0, contention)) return;
  waiters_.fetch_add(1, std::memory_order_seq_cst);
  for (;;) {
    const uint32_t seen = completions_.load(std::memory_order_seq_cst);
    if (reached()) break;
    futex_wait(completions_, seen);
  }
  waiters_.fetch_sub(1, std::memory_order_relaxed);
}

void TaskQueue::sync(int64_t allow_n_pending) {
  require(allow_n_pending >= 0, "allow_n_pending: got ", allow_n_pending, ", expected at least 0");
  if (on_queue_thread()) fail(KTK_ERR_STATE, "a task must not sync the queue it runs on");
  wait(allow_n_pending);
  raise_failure();
}

void TaskQueue::raise_failure() {
  if (!failed_.load(std::memory_order_acquire)) return;
  ktk_status status;
  std::string message;
  {
    const std::lock_guard<std::mutex> lock(failure_mutex_);
    if (!failed_.load(std::memory_order_relaxed)) return;
    status = failure_status_;
    message = std::move(failure_message_);
    failure_message_.clear();
    failed_.store(false, std::memory_order_relaxed);
  }
  throw Error(status, std::move(message));
}

int64_t TaskQueue::pending() const noexcept {
  // In this order the difference is never negative.
  const uint64_t finished = finished_.load(std::memory_order_acquire);
  return static_cast<int64_t>(submitted_.load(std::memory_order_acquire) - finished);
}

void TaskQueue::record_failure(ktk_status status, const std::string &message) noexcept {
  const std::lock_guard<std::mutex> lock(failure_mutex_);
  if (failed_.load(std::memory_order_relaxed)) return;
  failure_status_ = status;
  try {
    failure_message_ = message;
  } catch (...) {
    failure_message_.clear();
  }
  failed_.store(true, std::memory_order_release);
}

void TaskQueue::record_current_exception() noexcept {
  std::string message;
  const ktk_status status = current_exception_status(&message);
  record_failure(status, message);
}

bool TaskQueue::on_queue_thread() const noexcept { return queue_of_thread == this; }

void TaskQueue::keep(std::unique_ptr<Kept> kept) noexcept {
  const std::lock_guard<std::mutex> lock(kept_mutex_);
  kept->next_ = kept_;
  kept_ = kept.release();
}

}  // namespace ktk
