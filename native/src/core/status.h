// Failures inside the library are ktk::Error exceptions; capi.cpp turns them into a status and the
// calling thread's message. Code under isa/ and kernels/ never throws: it is validated from above.
#pragma once

#include <exception>
#include <sstream>
#include <string>
#include <utility>

#include "ktk.h"

namespace ktk {

class Error : public std::exception {
 public:
  Error(ktk_status status, std::string message) : status_(status), message_(std::move(message)) {}
  ktk_status status() const noexcept { return status_; }
  const char *what() const noexcept override { return message_.c_str(); }

 private:
  ktk_status status_;
  std::string message_;
};

// Concatenates its arguments as text.
template <typename... Parts>
std::string text(const Parts &...parts) {
  std::ostringstream stream;
  (stream << ... << parts);
  return stream.str();
}

template <typename... Parts>
[[noreturn]] void fail(ktk_status status, const Parts &...parts) {
  throw Error(status, text(parts...));
}

// Checks a condition that the caller is responsible for.
template <typename... Parts>
void require(bool condition, const Parts &...parts) {
  if (!condition) fail(KTK_ERR_ARGUMENT, parts...);
}

// The calling thread's message, for ktk_last_error().
const char *last_error() noexcept;
void set_last_error(const char *message) noexcept;

// Maps the exception in flight to a status and its message; call only inside a catch block.
ktk_status current_exception_status(std::string *message) noexcept;

}  // namespace ktk
