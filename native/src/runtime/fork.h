// What has to happen in the child of a fork: threads do not survive it, locks may be held by nobody.
#pragma once

#include <cstdint>

namespace ktk {

// Changes with each fork from which this process descends, as far as a ForkListener has ever lived: what was
// begun under another number is the business of a parent.
uint32_t process_number() noexcept;

// An object that is told, in the child and before fork() returns there, that only the forking thread
// is left. Registered from construction to destruction.
class ForkListener {
 public:
  ForkListener(const ForkListener &) = delete;
  ForkListener &operator=(const ForkListener &) = delete;

 protected:
  ForkListener();
  virtual ~ForkListener();

 private:
  // Must neither allocate nor lock: any lock may have been held by a thread that is gone.
  virtual void after_fork_in_child() noexcept = 0;

  static void prepare() noexcept;
  static void in_parent() noexcept;
  static void in_child() noexcept;

  ForkListener *next_ = nullptr;
  ForkListener *previous_ = nullptr;
};

}  // namespace ktk
