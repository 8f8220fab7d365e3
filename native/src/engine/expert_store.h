// The packed experts of one layer: each shard's part on its own NUMA node, one slot an expert. Slots are
// reserved as address space and take memory when an expert is packed into them, so experts that live on a
// GPU cost nothing here.
#pragma once

#include <cstdint>
#include <vector>

#include "core/backend.h"
#include "engine/geometry.h"
#include "ktk.h"
#include "runtime/memory.h"
#include "runtime/worker_pool.h"

namespace ktk {

class ExpertStore {
 public:
  ExpertStore(const ktk_moe_config &config, const FormatKernels &kernels, WorkerPool &pool);

  struct Shard {
    ShardRange range;
    Gemm gate_up, down;
    int64_t panels;          // of gate/up
    int64_t part_offset[9];  // in a slot, by ktk_part; biases padded to whole panels
    int64_t slot_bytes;
    NodeBuffer memory;

    bool empty() const { return range.first == range.last; }
    int32_t columns() const { return range.last - range.first; }
  };

  int shard_count() const { return static_cast<int>(shards_.size()); }
  const Shard &shard(int index) const { return shards_[static_cast<size_t>(index)]; }
  // The projection of the unsharded layer that reads the caller's hidden states.
  const Gemm &gate_up() const { return gate_up_; }
  // Columns of the intermediate that are made together.
  int32_t group_columns() const { return down_.row_group_columns; }
  bool loaded(int32_t expert) const;
  // Bytes of the experts that are loaded.
  int64_t bytes() const;

  const uint8_t *part(int shard, int32_t expert, ktk_part part) const;
  // Null when the expert has no such bias.
  const float *bias(int shard, int32_t expert, ktk_part part) const;

  void pack(int32_t expert, const ktk_expert_weights &weights);
  // In fp32; pointers may be null.
  void unpack(int32_t expert, float *gate, float *up, float *down) const;
  size_t part_bytes(ktk_part part) const;
  void export_part(int32_t expert, ktk_part part, void *buffer, size_t bytes) const;
  void import_part(int32_t expert, ktk_part part, const void *buffer, size_t bytes);

 private:
  // Calls move(slot address, offset in the unsharded part, bytes) for every contiguous piece of a part.
  template <typename Move>
  void for_each_piece(int32_t expert, ktk_part part, Move move) const;
  uint8_t *slot(const Shard &shard, int32_t expert, ktk_part part) const;
  void check(int32_t expert, ktk_part part, size_t bytes) const;
  void check_values(int32_t expert, ktk_part part, const void *buffer, size_t bytes) const;
  uint32_t needed_parts() const;

  const FormatKernels &kernels_;
  WorkerPool &pool_;
  int32_t layer_index_, format_, num_experts_, hidden_size_, intermediate_size_;
  Gemm gate_up_, down_;
  std::vector<Shard> shards_;
  std::vector<uint32_t> present_;  // [num_experts], a bit a part
};

}  // namespace ktk
