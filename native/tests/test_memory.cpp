#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <utility>

#include "check.h"
#include "faults.h"
#include "runtime/memory.h"
#include "runtime/topology.h"

using ktk::NodeBuffer;
using ktk_test::faults;

static int64_t mapped_pages() {
  long pages = 0;
  FILE *file = std::fopen("/proc/self/statm", "r");
  if (file == nullptr || std::fscanf(file, "%ld", &pages) != 1) pages = -1;
  if (file != nullptr) std::fclose(file);
  return pages;
}

TEST(sizes_and_alignment) {
  for (const size_t bytes : {size_t{1}, size_t{4096}, size_t{4097}, (size_t{2} << 20) - 1, size_t{2} << 20,
                             (size_t{5} << 20) + 3}) {
    for (const bool huge : {false, true}) {
      NodeBuffer buffer(bytes, -1, huge);
      CHECK_EQUAL(buffer.size(), bytes);
      CHECK(!buffer.bound());
      const size_t alignment = bytes >= size_t{2} << 20 ? size_t{2} << 20 : size_t{4096};
      CHECK_EQUAL(reinterpret_cast<uintptr_t>(buffer.data()) % alignment, uintptr_t{0});
      CHECK_EQUAL(buffer.data()[0], 0);
      std::memset(buffer.data(), 1, bytes);
    }
  }
}

TEST(empty) {
  NodeBuffer none;
  CHECK(none.data() == nullptr);
  NodeBuffer zero(0, 0, true);
  CHECK(zero.data() == nullptr);
  CHECK_EQUAL(zero.size(), size_t{0});
}

TEST(moves_and_releases) {
  NodeBuffer first(100, -1, false);
  first.data()[99] = 7;
  NodeBuffer second(std::move(first));
  CHECK(first.data() == nullptr);
  CHECK_EQUAL(first.size(), size_t{0});
  CHECK_EQUAL(second.data()[99], 7);
  first = NodeBuffer(size_t{3} << 20, -1, true);
  first = std::move(second);
  CHECK_EQUAL(first.size(), size_t{100});
  const int64_t before = mapped_pages();
  for (int i = 0; i < 1000; ++i) NodeBuffer big(size_t{3} << 20, -1, true);
  CHECK(mapped_pages() - before < 1000);
}

TEST(placement) {
  const int node = ktk::Topology::read().nodes_with_cpus().front();
  NodeBuffer buffer(size_t{4} << 20, node, true);
  CHECK(faults.mbind_calls > 0);
  CHECK_EQUAL(ktk::page_node(buffer.data()), -1);
  std::memset(buffer.data(), 1, buffer.size());
  // Kernels without NUMA, and some sandboxes, refuse both calls.
  const int found = ktk::page_node(buffer.data() + buffer.size() - 1);
  if (buffer.bound() && found >= 0) CHECK_EQUAL(found, node);
}

TEST(refused_placement_is_no_failure) {
  faults.mbind_errno = EPERM;
  NodeBuffer buffer(4096, 0, false);
  faults.mbind_errno = 0;
  CHECK(!buffer.bound());
  buffer.data()[0] = 1;
  CHECK(!NodeBuffer(4096, 5000, false).bound());
}

TEST(too_large) {
  CHECK_THROWS(KTK_ERR_MEMORY, "18446744073709551615 bytes",
               NodeBuffer(std::numeric_limits<size_t>::max(), -1, false));
  CHECK_THROWS(KTK_ERR_MEMORY, "4611686018427387904 bytes", NodeBuffer(size_t{1} << 62, 0, true));
}
