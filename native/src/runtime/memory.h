// Large buffers on a given NUMA node.
#pragma once

#include <cstddef>

namespace ktk {

// Zero-filled anonymous memory, page aligned (2 MiB aligned from that size on). Pages are allocated
// when they are first touched, on `node` while it has memory left and elsewhere after that: a full
// node costs speed rather than the process.
class NodeBuffer {
 public:
  NodeBuffer() noexcept = default;
  // `node` -1: wherever the touching thread runs. `huge_pages` asks for transparent huge pages where
  // the buffer is large enough. Throws KTK_ERR_MEMORY. Zero bytes: an empty buffer.
  NodeBuffer(size_t bytes, int node, bool huge_pages);
  ~NodeBuffer();
  NodeBuffer(NodeBuffer &&other) noexcept;
  NodeBuffer &operator=(NodeBuffer &&other) noexcept;
  NodeBuffer(const NodeBuffer &) = delete;
  NodeBuffer &operator=(const NodeBuffer &) = delete;

  char *data() noexcept { return data_; }
  const char *data() const noexcept { return data_; }
  size_t size() const noexcept { return size_; }
  // Whether the kernel accepted the placement on the node.
  bool bound() const noexcept { return bound_; }

 private:
  void swap(NodeBuffer &other) noexcept;

  char *data_ = nullptr;
  size_t size_ = 0;
  size_t mapped_ = 0;
  bool bound_ = false;
};

// Node of the page at `address`; -1 when it is not resident or the kernel does not say.
int page_node(const void *address) noexcept;

}  // namespace ktk
