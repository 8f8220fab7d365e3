#include "faults.h"

#include <dirent.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstdarg>

namespace ktk_test {

Faults faults;

int count_threads() {
  int count = 0;
  DIR *directory = opendir("/proc/self/task");
  if (directory == nullptr) return -1;
  while (const dirent *entry = readdir(directory)) count += entry->d_name[0] != '.';
  closedir(directory);
  return count;
}

int settled_threads() {
  int count = count_threads();
  for (int same = 0; same < 20; ++same) {
    usleep(1000);
    const int now = count_threads();
    if (now < count) same = 0;
    count = now;
  }
  return count;
}

bool wait_for_threads(int expected) {
  for (int attempt = 0; attempt < 1000; ++attempt) {
    if (count_threads() == expected) return true;
    usleep(1000);
  }
  return false;
}

}  // namespace ktk_test

extern "C" {

int __real_pthread_create(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
int __real_pthread_setaffinity_np(pthread_t, size_t, const cpu_set_t *);
long __real_syscall(long, ...);

int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*start)(void *),
                          void *argument) {
  if (ktk_test::faults.pthread_create_after == 0) return EAGAIN;
  if (ktk_test::faults.pthread_create_after > 0) --ktk_test::faults.pthread_create_after;
  return __real_pthread_create(thread, attributes, start, argument);
}

int __wrap_pthread_setaffinity_np(pthread_t thread, size_t bytes, const cpu_set_t *cpus) {
  __atomic_fetch_add(&ktk_test::faults.setaffinity_calls, 1, __ATOMIC_RELAXED);
  if (ktk_test::faults.setaffinity_errno > 0) return ktk_test::faults.setaffinity_errno;
  if (ktk_test::faults.setaffinity_errno < 0) return 0;
  return __real_pthread_setaffinity_np(thread, bytes, cpus);
}

long __wrap_syscall(long number, ...) {
  va_list list;
  va_start(list, number);
  long arguments[6];
  for (long &argument : arguments) argument = va_arg(list, long);
  va_end(list);
  if (number == SYS_mbind) {
    ++ktk_test::faults.mbind_calls;
    if (ktk_test::faults.mbind_errno != 0) {
      errno = ktk_test::faults.mbind_errno;
      return -1;
    }
  }
  return __real_syscall(number, arguments[0], arguments[1], arguments[2], arguments[3], arguments[4],
                        arguments[5]);
}

}  // extern "C"
