// Memory that a forward needs only while it runs. It belongs to the pool and is shared by all its layers;
// whoever holds the pool's forward mutex owns it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "engine/route.h"
#include "runtime/memory.h"
#include "runtime/worker_pool.h"

namespace ktk {

// A region that grows to the largest forward seen and hands out pieces of itself. Sizes are asked for
// twice: once to learn the total, once to place the pieces.
class Arena {
 public:
  // Starts a forward. While measuring, place() returns null.
  void begin(bool measuring) {
    measuring_ = measuring;
    used_ = 0;
  }
  template <typename T>
  T *place(int64_t count) {
    const size_t at = used_;
    used_ += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return measuring_ ? nullptr : reinterpret_cast<T *>(memory_.data() + at);
  }
  // Makes room for what was measured.
  void reserve(int node) {
    if (used_ > memory_.size()) {
      memory_ = NodeBuffer();
      memory_ = NodeBuffer(used_ + used_ / 4, node, true);
    }
  }

 private:
  NodeBuffer memory_;
  size_t used_ = 0;
  bool measuring_ = false;
};

struct Scratch {
  Route route;
  Arena shared;               // on the first subpool's node
  std::vector<Arena> shards;  // on each subpool's node
  // What training needs beside them.
  Arena training;
  std::vector<Arena> training_shards;
};

// A pool with what its layers share.
struct PoolContext {
  PoolContext(std::vector<SubpoolConfig> subpools, bool bind, int64_t spin_ns)
      : pool(std::move(subpools), bind, spin_ns) {
    scratch.shards.resize(static_cast<size_t>(pool.subpools()));
    scratch.training_shards.resize(static_cast<size_t>(pool.subpools()));
  }
  WorkerPool pool;
  Scratch scratch;
};

}  // namespace ktk
