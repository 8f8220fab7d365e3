#include "runtime/memory.h"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#include "core/status.h"

namespace ktk {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

// From <linux/mempolicy.h>; libnuma is not a dependency.
constexpr int kPreferNode = 1;
constexpr int kMaxNodes = 1024;

bool prefer_node(void *address, size_t bytes, int node) noexcept {
  constexpr int kWordBits = std::numeric_limits<unsigned long>::digits;
  if (node < 0 || node >= kMaxNodes) return false;
  unsigned long mask[kMaxNodes / kWordBits] = {};
  mask[node / kWordBits] = 1UL << (node % kWordBits);
  // The kernel counts one bit less than it is told.
  return syscall(SYS_mbind, address, bytes, kPreferNode, mask, kMaxNodes + 1UL, 0U) == 0;
}

}  // namespace

NodeBuffer::NodeBuffer(size_t bytes, int node, bool huge_pages) {
  if (bytes == 0) return;
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t unit = bytes >= kHugePage ? kHugePage : page;
  const size_t slack = unit - page;
  void *mapping = MAP_FAILED;
  int failure = ENOMEM;
  size_t rounded = 0;
  if (bytes <= std::numeric_limits<size_t>::max() - 2 * kHugePage) {
    rounded = (bytes + page - 1) / page * page;
    mapping = mmap(nullptr, rounded + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    failure = errno;
  }
  if (mapping == MAP_FAILED)
    fail(KTK_ERR_MEMORY, "cannot allocate ", bytes, " bytes: ", std::strerror(failure));

  char *start = static_cast<char *>(mapping);
  const size_t skip = (unit - reinterpret_cast<uintptr_t>(start) % unit) % unit;
  if (skip > 0) munmap(start, skip);
  if (slack > skip) munmap(start + skip + rounded, slack - skip);
  data_ = start + skip;
  size_ = bytes;
  mapped_ = rounded;
  bound_ = prefer_node(data_, mapped_, node);
  // Only a hint: kernels without transparent huge pages refuse it.
  if (huge_pages && unit == kHugePage) madvise(data_, mapped_, MADV_HUGEPAGE);
}

NodeBuffer::~NodeBuffer() {
  if (data_ != nullptr) munmap(data_, mapped_);
}

NodeBuffer::NodeBuffer(NodeBuffer &&other) noexcept { swap(other); }

NodeBuffer &NodeBuffer::operator=(NodeBuffer &&other) noexcept {
  NodeBuffer moved(std::move(other));
  swap(moved);
  return *this;
}

void NodeBuffer::swap(NodeBuffer &other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  std::swap(mapped_, other.mapped_);
  std::swap(bound_, other.bound_);
}

int page_node(const void *address) noexcept {
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  void *start = reinterpret_cast<void *>(reinterpret_cast<uintptr_t>(address) / page * page);
  int status = -1;
  // Without target nodes the call only reports where pages are.
  if (syscall(SYS_move_pages, 0, 1UL, &start, nullptr, &status, 0) != 0 || status < 0) return -1;
  return status;
}

}  // namespace ktk
