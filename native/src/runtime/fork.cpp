#include "runtime/fork.h"

#include <pthread.h>

#include <atomic>
#include <mutex>
#include <new>

#include "core/status.h"

namespace ktk {
namespace {

std::mutex registry_mutex;
ForkListener *first_listener = nullptr;
std::atomic<uint32_t> number{0};

}  // namespace

uint32_t process_number() noexcept { return number.load(std::memory_order_relaxed); }

ForkListener::ForkListener() {
  static const int failure = pthread_atfork(&prepare, &in_parent, &in_child);
  if (failure != 0) fail(KTK_ERR_MEMORY, "cannot register a fork handler: out of memory");
  const std::lock_guard<std::mutex> lock(registry_mutex);
  next_ = first_listener;
  if (next_ != nullptr) next_->previous_ = this;
  first_listener = this;
}

ForkListener::~ForkListener() {
  const std::lock_guard<std::mutex> lock(registry_mutex);
  if (next_ != nullptr) next_->previous_ = previous_;
  (previous_ != nullptr ? previous_->next_ : first_listener) = next_;
}

void ForkListener::prepare() noexcept { registry_mutex.lock(); }

void ForkListener::in_parent() noexcept { registry_mutex.unlock(); }

void ForkListener::in_child() noexcept {
  number.fetch_add(1, std::memory_order_relaxed);
  for (ForkListener *listener = first_listener; listener != nullptr; listener = listener->next_)
    listener->after_fork_in_child();
  registry_mutex.unlock();
}

}  // namespace ktk
