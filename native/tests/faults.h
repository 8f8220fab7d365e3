// Failures of the operating system, on request.
#pragma once

namespace ktk_test {

struct Faults {
  int pthread_create_after = -1;  // this many succeed, the next fails with EAGAIN; -1: none fails
  int setaffinity_errno = 0;      // -1: pretend success without asking the system
  int setaffinity_calls = 0;
  int mbind_errno = 0;
  int mbind_calls = 0;
};

extern Faults faults;

// Threads of this process; one that was joined may be counted for a moment longer.
int count_threads();
// The same once it has stopped falling.
int settled_threads();
bool wait_for_threads(int expected);

}  // namespace ktk_test
