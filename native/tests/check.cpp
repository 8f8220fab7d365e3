#include "check.h"

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <mutex>

namespace ktk_test {
namespace {

Test *first_test = nullptr;
std::atomic<int> failure_count{0};
std::mutex output_mutex;

}  // namespace

Test::Test(const char *test_name, void (*test_body)()) : name(test_name), body(test_body), next(nullptr) {
  Test **last = &first_test;
  while (*last != nullptr) last = &(*last)->next;
  *last = this;
}

void record_failure(const char *file, int line, const std::string &what) {
  const std::lock_guard<std::mutex> lock(output_mutex);
  if (failure_count.fetch_add(1) < 50) std::fprintf(stderr, "%s:%d: %s\n", file, line, what.c_str());
}

int failures() { return failure_count.load(); }

}  // namespace ktk_test

// Arguments select tests by a part of their name.
int main(int argc, char **argv) {
  for (ktk_test::Test *test = ktk_test::first_test; test != nullptr; test = test->next) {
    bool selected = argc < 2;
    for (int i = 1; i < argc; ++i) selected = selected || std::strstr(test->name, argv[i]) != nullptr;
    if (!selected) continue;
    const int before = ktk_test::failures();
    const auto start = std::chrono::steady_clock::now();
    try {
      test->body();
    } catch (const std::exception &error) {
      ktk_test::record_failure(test->name, 0, std::string("exception: ") + error.what());
    }
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    std::printf("%s %s (%.2f s)\n", ktk_test::failures() == before ? "ok  " : "FAIL", test->name,
                seconds.count());
    std::fflush(stdout);
  }
  return ktk_test::failures() == 0 ? 0 : 1;
}
