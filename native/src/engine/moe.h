// One mixture-of-experts layer: the pipeline that every format and instruction set shares.
//
//   route      which rows each expert computes
//   quantise   each token once
//   gather     the rows of experts with several tokens, side by side
//   gate/up    per (expert, 128 intermediate columns, or 256): both projections, activation, requantisation
//   down       per run of output columns: all experts, weighted and summed in fp32, rounded once; with
//              many rows, per (expert, run of output columns), by turns
//
// With many rows, 16 an expert and more, gather, gate/up and down are one section of units that wait for what
// they need (engine/overlap.cpp).
//
// With several shards each computes a partial sum over its columns of the intermediate, and a last section
// adds the parts in the order of the shards.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>

#include "core/backend.h"
#include "engine/expert_store.h"
#include "engine/scratch.h"
#include "ktk.h"

namespace ktk {

class Moe {
 public:
  Moe(const ktk_moe_config &config, std::shared_ptr<PoolContext> context);

  const ktk_moe_config &config() const { return config_; }
  const Backend &backend() const { return backend_; }
  ExpertStore &store() { return store_; }
  const ExpertStore &store() const { return store_; }

  // Everything about `args` that does not depend on the moment it runs.
  void check(const ktk_forward_args &args) const;
  void forward(const ktk_forward_args &args);
  // Fills the output of a forward that failed with NaN, as far as its size is known.
  void poison(const ktk_forward_args &args) const noexcept;

 private:
  friend class Training;
  struct Batch;
  struct DownTurns;
  void require_loaded(const Route &route) const;
  void prepare(Batch &batch) const;
  static bool many_rows(const Route &route);
  bool wide_units(const Route &route) const;
  int32_t unit_columns(const Route &route, int shard) const;
  void place(Batch &batch, bool measuring) const;
  void quantise(Batch &batch) const;
  void gather(Batch &batch) const;
  void gather_block(const Batch &batch, const Route::Expert &expert, int32_t row) const;
  void gate_up(Batch &batch) const;
  void gate_up_unit(const Batch &batch, int s, int worker, int64_t index) const;
  DownArgs down_args(const Batch &batch, int s, const Route::Expert &expert, int64_t first_panel,
                     int64_t last_panel, LoraProduct &lora) const;
  void down(Batch &batch) const;
  void down_by_turns(Batch &batch) const;
  void down_unit(const Batch &batch, DownTurns &by, int s, int worker, int64_t index) const;
  void overlapped(Batch &batch) const;
  void merge(Batch &batch) const;

  ktk_moe_config config_;
  std::string isa_name_;
  const Backend &backend_;
  const FormatKernels &kernels_;
  std::shared_ptr<PoolContext> context_;
  ExpertStore store_;
};

}  // namespace ktk
