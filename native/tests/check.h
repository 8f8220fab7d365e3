// A test is a TEST(name) { ... } block; CHECK records a failure and goes on.
#pragma once

#include <sstream>
#include <string>

#include "core/status.h"

#if defined(__SANITIZE_THREAD__)
#define KTK_TEST_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define KTK_TEST_TSAN 1
#endif
#endif
#ifndef KTK_TEST_TSAN
#define KTK_TEST_TSAN 0
#endif
#if defined(__SANITIZE_ADDRESS__)
#define KTK_TEST_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define KTK_TEST_ASAN 1
#endif
#endif
#ifndef KTK_TEST_ASAN
#define KTK_TEST_ASAN 0
#endif

namespace ktk_test {

struct Test {
  Test(const char *name, void (*body)());
  const char *name;
  void (*body)();
  Test *next;
};

void record_failure(const char *file, int line, const std::string &what);
int failures();

template <typename Left, typename Right>
void check_equal(const Left &left, const Right &right, const char *expression, const char *file, int line) {
  if (left == right) return;
  std::ostringstream stream;
  stream << expression << ": " << left << " is not " << right;
  record_failure(file, line, stream.str());
}

// Runs `body`, which has to throw ktk::Error of `status` with `part` in its message.
template <typename Body>
void check_throws(ktk_status status, const std::string &part, Body body, const char *file, int line) {
  try {
    body();
  } catch (const ktk::Error &error) {
    check_equal(static_cast<int>(error.status()), static_cast<int>(status), error.what(), file, line);
    if (std::string(error.what()).find(part) == std::string::npos)
      record_failure(file, line, "no \"" + part + "\" in \"" + error.what() + "\"");
    return;
  }
  record_failure(file, line, "nothing thrown, expected \"" + part + "\"");
}

}  // namespace ktk_test

#define TEST(name)                                         \
  static void test_##name();                               \
  static ktk_test::Test entry_##name(#name, &test_##name); \
  static void test_##name()
#define CHECK(condition) ((condition) ? void() : ktk_test::record_failure(__FILE__, __LINE__, #condition))
#define CHECK_EQUAL(left, right) \
  ktk_test::check_equal((left), (right), #left " == " #right, __FILE__, __LINE__)
#define CHECK_THROWS(status, part, ...) \
  ktk_test::check_throws((status), (part), [&] { __VA_ARGS__; }, __FILE__, __LINE__)
