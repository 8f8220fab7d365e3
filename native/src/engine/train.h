// Forward with adapters, and the way back, of a layer.
//
//   forward    the pipeline of Moe, with two products by the adapters' A and their B inside gate/up and down
//   backward   dO by expert -> down transposed, activation -> gate/up transposed, summed by token
//
// The order of things is in train.cpp; sizes and memory of a run in train_run.cpp; the adapters' small
// products, forward and back, in train_lora.cpp; the way back through the packed weights in
// train_backward.cpp; gradients of adapters and weights in train_gradients.cpp.
//
// The packed weights of the forward serve the backward too: a unit of work turns the tiles that it needs into
// bf16 tiles of the transposed projection, in its own scratch, and multiplies with those. Whatever is summed
// over rows is summed by one unit in the order of the rows, so that no gradient depends on timing.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "engine/adapter_tiles.h"
#include "engine/batch.h"
#include "engine/moe.h"
#include "engine/route.h"
#include "engine/turns.h"
#include "ktk.h"
#include "runtime/memory.h"

namespace ktk {

// What one forward leaves for its backward.
struct TrainingState {
  enum class Phase { fresh, ready, used };

  explicit TrainingState(const ktk_sft_context_config &config) : config(config) {}
  void release();

  ktk_sft_context_config config;
  Phase phase = Phase::fresh;
  int32_t tokens = 0, top_k = 0;
  Route route;
  const void *input = nullptr;  // the caller's, or `kept_input`
  int32_t input_dtype = 0;
  NodeBuffer kept_input;            // bf16 [tokens][H]
  std::vector<NodeBuffer> gate_up;  // of each shard: bf16 [rows][2 * columns]
  size_t activation_bytes = 0, table_bytes = 0;
};

class Training {
 public:
  Training(const ktk_sft_config &config, const Moe &moe);

  void set_lora(const ktk_lora_tensors &tensors);
  // Everything that does not depend on the moment it runs.
  void check(const ktk_forward_args &args) const;
  void check(const ktk_backward_args &args) const;
  void forward(TrainingState &state, const ktk_forward_args &args) const;
  void backward(TrainingState &state, const ktk_backward_args &args) const;
  // Fills the outputs of what failed with NaN.
  void poison(const TrainingState &state, const ktk_backward_args &args) const noexcept;

 private:
  struct Run;

  bool adapted() const { return config_.lora_rank > 0 && config_.skip_lora == 0; }
  void require_adapters() const;
  // `count` for each shard that holds columns, else 0.
  std::vector<int64_t> units_of_shards(int64_t count) const;
  void start(Run &run) const;
  void place(Run &run, bool measuring) const;
  void keep_input(Run &run) const;
  // Rows [first_row, first_row + count) and columns of an adapter's matrix [rows][columns] of an expert.
  AdapterMatrix adapter(const void *values, int64_t expert_id, int64_t rows, int64_t columns,
                        int64_t first_row, int64_t count, int64_t first_column, int64_t column_count) const;
  AdapterMatrix down_a(int64_t expert_id, int64_t first, int64_t count) const;
  AdapterPair gate_up_a(int64_t expert_id, int64_t first, int64_t count) const;
  void pack_adapters(Run &run, bool backward) const;
  void adapter_input(Run &run) const;
  void adapter_middle(Run &run) const;
  void gather_grad(Run &run) const;
  void grad_adapter_input(Run &run) const;
  void grad_down(Run &run) const;
  void grad_adapter_middle(Run &run) const;
  void add_grad_gate_up(Run &run, int s, int index, int32_t e, int32_t column, int32_t columns, float *sum,
                        int64_t sum_stride, const Turns::Turn *turn) const;
  void grad_gate_up(Run &run) const;
  void grad_expert_weights(Run &run) const;
  void transpose_factors(Run &run) const;
  void grad_adapters(Run &run) const;
  void grad_base(Run &run) const;
  void clear_idle(Run &run) const;

  ktk_sft_config config_;
  const Moe &moe_;
  ktk_lora_tensors lora_{};
};

}  // namespace ktk
