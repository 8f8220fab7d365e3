// What the machine can do at most, measured on the threads of a pool.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/backend.h"
#include "engine/scratch.h"
#include "ktk.h"
#include "runtime/memory.h"

namespace ktk {

// One kind of probe in its variants, of which the fastest is the machine's rate. The work is dealt to the
// threads as that of a layer is: contiguous shares, and whoever is done early takes from the others.
class Probe {
 public:
  struct Result {
    double work;  // operations, or bytes
    double seconds;
  };

  // Throws KTK_ERR_ARGUMENT or KTK_ERR_UNSUPPORTED (the instruction set) or KTK_ERR_MEMORY.
  Probe(const ktk_probe_config &config, std::shared_ptr<PoolContext> context);

  int32_t variants() const noexcept { return static_cast<int32_t>(variants_.size()); }
  // Throws KTK_ERR_ARGUMENT (no such variant).
  const char *variant_name(int32_t variant) const;
  // Throws KTK_ERR_ARGUMENT, or KTK_ERR_INTERNAL when the loop did not do what it is timed for.
  Result run(int32_t variant, int64_t repeats);

 private:
  struct Variant {
    std::string name;
    const ProductLoop *loop;
    int32_t streams;
    int64_t prefetch_bytes;
    bool side_by_side;  // the threads' chunks alternate in memory, else each thread's lie together
    bool streaming;
  };
  // Memory of one subpool, in chunks; read: `from` alone.
  struct Area {
    NodeBuffer from, to;
    int64_t chunks_of_thread;
  };

  const Variant &at(int32_t variant) const;
  void fill();
  double multiply(const Variant &variant, int64_t repeats);
  double read(const Variant &variant);
  double copy(const Variant &variant);
  template <typename Use>
  void for_each_chunk(bool side_by_side, Use use);

  const Backend &backend_;
  std::shared_ptr<PoolContext> context_;
  int32_t kind_;
  std::vector<Variant> variants_;
  std::vector<Area> areas_;
  uint32_t sum_ = 0;  // of all words of `from`
};

}  // namespace ktk
