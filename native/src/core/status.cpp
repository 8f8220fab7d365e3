#include "core/status.h"

#include <cstring>
#include <new>
#include <system_error>

namespace ktk {
namespace {

// A fixed buffer: reporting an allocation failure must not allocate.
thread_local char thread_message[2048];

}  // namespace

const char *last_error() noexcept { return thread_message; }

void set_last_error(const char *message) noexcept {
  std::strncpy(thread_message, message, sizeof(thread_message) - 1);
  thread_message[sizeof(thread_message) - 1] = '\0';
}

ktk_status current_exception_status(std::string *message) noexcept {
  ktk_status status = KTK_ERR_INTERNAL;
  try {
    try {
      throw;
    } catch (const Error &error) {
      status = error.status();
      *message = error.what();
    } catch (const std::bad_alloc &) {
      status = KTK_ERR_MEMORY;
      *message = "out of memory";
    } catch (const std::system_error &error) {
      status = KTK_ERR_SYSTEM;
      *message = error.what();
    } catch (const std::exception &error) {
      *message = error.what();
    } catch (...) {
      *message = "unknown failure";
    }
  } catch (...) {
    status = KTK_ERR_MEMORY;
  }
  return status;
}

}  // namespace ktk
