// A thread that runs tasks in the order of submission.
#pragma once

#include <pthread.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <vector>

#include "core/status.h"
#include "runtime/fork.h"
#include "runtime/wait.h"
#include "runtime/worker_pool.h"

namespace ktk {

struct Task {
  void (*run)(void *context);   // may throw; the first failure is kept for sync()
  void (*done)(void *context);  // frees the context, after run or instead of it; NULL: nothing to free
  void *context;
  // Runs code of the caller, which may start threads of its own: the queue's thread must not hand
  // down its binding to one CPU.
  bool foreign = false;
};

// Submission is lock-free. The thread is bound to the CPU that the pool keeps for it, except while it
// runs foreign tasks, and has every signal blocked.
//
// In the child of a fork the queue starts empty, with a new thread at the first submission; tasks that
// were pending in the parent run there only, and their contexts are not freed in the child.
class TaskQueue : private ForkListener {
 public:
  // The pool must outlive the queue. Throws KTK_ERR_SYSTEM.
  explicit TaskQueue(WorkerPool &pool);
  // Runs what is pending. A failure nobody asked for is dropped. Kept objects go last.
  ~TaskQueue() override;

  WorkerPool &pool() const noexcept { return pool_; }
  // From any thread, also from inside a task. The task belongs to the queue once this has returned;
  // when it throws, the caller still owns it.
  void submit(const Task &task);
  // Waits until at most `allow_n_pending` of the tasks submitted before the call are left, then throws
  // the first failure since the last sync, if any. KTK_ERR_STATE from inside a task of this queue.
  void sync(int64_t allow_n_pending = 0);
  // The waiting half of sync(): failures stay kept for the next sync.
  void wait(int64_t allow_n_pending) noexcept;
  // Tasks submitted and not yet finished.
  int64_t pending() const noexcept;
  // Keeps a failure as if a task had thrown it, unless one is kept already.
  void record_failure(ktk_status status, const std::string &message) noexcept;
  // Same, for the exception in flight; only inside a catch block.
  void record_current_exception() noexcept;
  // Whether the calling thread is the queue's.
  bool on_queue_thread() const noexcept;

  // Something that has to live as long as the queue.
  class Kept {
   public:
    virtual ~Kept() = default;

   private:
    friend class TaskQueue;
    Kept *next_ = nullptr;
  };
  void keep(std::unique_ptr<Kept> kept) noexcept;

  // The queue as seen by those who may outlive it: callbacks that wait in a CUDA stream.
  struct Link {
    std::shared_mutex mutex;  // shared: in use; exclusive: being destroyed
    TaskQueue *queue;         // nullptr once the queue is gone
  };
  const std::shared_ptr<Link> &link() const noexcept { return link_; }
  // Throws the kept failure, if any; never waits.
  void raise_failure();

 private:
  struct Node {
    std::atomic<Node *> next{nullptr};
    Task task{};
  };

  void after_fork_in_child() noexcept override;
  void start_thread();
  static void *thread_main(void *argument) noexcept;
  void work() noexcept;
  void execute(const Task &task) noexcept;
  Node *pop() noexcept;
  void wait_for_submission(Contention &contention) noexcept;
  void place(bool foreign) noexcept;

  WorkerPool &pool_;
  pthread_t thread_{};
  std::atomic<bool> running_{false};
  std::mutex start_mutex_;
  std::atomic<bool> stopping_{false};
  std::vector<int> inherited_affinity_;
  bool bound_ = false;

  std::mutex failure_mutex_;
  std::atomic<bool> failed_{false};
  ktk_status failure_status_ = KTK_OK;
  std::string failure_message_;

  std::mutex kept_mutex_;
  Kept *kept_ = nullptr;
  std::shared_ptr<Link> link_;

  Node *oldest_ = nullptr;                                   // already executed; its successor is next
  alignas(kLineBytes) std::atomic<Node *> newest_{nullptr};  // submitters append here
  alignas(kLineBytes) std::atomic<uint64_t> submitted_{0};
  std::atomic<uint32_t> arrivals_{0};  // futex of the queue's thread
  std::atomic<uint32_t> parked_{0};
  alignas(kLineBytes) std::atomic<uint64_t> finished_{0};
  std::atomic<uint32_t> completions_{0};  // futex of waiting callers
  std::atomic<uint32_t> waiters_{0};
};

}  // namespace ktk
