// What one forward or backward of training works on: sizes, memory, and the small helpers of the files
// train*.cpp, which nothing else includes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "core/status.h"
#include "engine/sections.h"
#include "engine/train.h"

namespace ktk {

constexpr int32_t kChunkRows = 32;      // rows of one unit of the adapters' small products
constexpr int32_t kBlockTokens = 1024;  // rows along K of one operand of a gradient
constexpr int32_t kGradColumns = 64;    // columns of one unit of a gradient
constexpr int64_t kTokensOfUnit = 8;
constexpr int64_t kTileBytes = 1024;

constexpr const char *kTensorNames[] = {"gate_lora_a", "gate_lora_b", "up_lora_a",
                                        "up_lora_b",   "down_lora_a", "down_lora_b"};

inline int32_t rows_of_chunk(int32_t rows, int32_t first, int32_t size) {
  return std::min(rows - first, size);
}

// Row-major numbers in memory.
inline Source matrix(const void *values, int32_t dtype, int64_t columns, int64_t stride) {
  Source source{};
  source.values = values;
  source.dtype = dtype;
  source.columns = static_cast<int32_t>(columns);
  source.stride = stride;
  return source;
}

inline Source operand(const uint8_t *values, const Gemm &gemm, int32_t rows) {
  Source source{};
  source.values = values;
  source.dtype = KTK_DTYPE_BF16;
  source.columns = gemm.depth;
  source.operand = &gemm;
  source.operand_rows = rows;
  return source;
}

enum Projection : int { kGate, kUp, kDown };

struct Training::Run {
  TrainingState &state;
  const Route &route;
  Moe::Batch batch;
  const ktk_backward_args *args = nullptr;  // null: a forward
  TrainingBatch extra{};

  int64_t tokens = 0, rows = 0;
  bool adapted = false, dropout = false;
  bool packs_forward = false;  // the adapters' operands of the forward are needed

  int32_t rank = 0, even_rank = 0;
  int32_t stacked_panels = 0, rank_panels = 0;  // of gate's and up's ranks side by side, and of one rank
  Gemm hidden{};
  struct Chunk {
    int32_t expert, first, rows;  // expert: index in the route
  };
  std::vector<Chunk> chunks{};     // of kChunkRows
  std::vector<Chunk> blocks{};     // of kBlockTokens
  std::vector<int64_t> k_steps{};  // steps of 32 rows before each expert's, and in all
  int32_t unit_columns = 0;        // of grad_down
  int32_t token_columns = 0;       // of grad_gate_up
  bool shared_sums = false;        // in grad_gate_up, see Moe::Batch

  // All on the first node.
  uint8_t *gate_up_a = nullptr;     // tiles, by expert
  float *gate_up_middle = nullptr;  // [rows][stacked_panels * 16]: tokens through A
  float *down_middle = nullptr;     // [rows][rank_panels * 16]
  uint8_t *grad_rows = nullptr;     // operand: dO by expert, times the scales of down's rows
  uint8_t *down_b_back = nullptr;
  float *grad_down_middle = nullptr;
  uint8_t *grad_down_input = nullptr;
  float *grad_gate_up_middle = nullptr;
  uint8_t *grad_gate_up_input[2] = {};  // with dropout gate and up apart
  struct Factor {                       // transposed: [rank][rows of the expert], by blocks of kBlockTokens
    const float *values;
    int32_t stride, first, columns;
    bool weighted;
    uint8_t *operand;
  };
  enum FactorIndex { kGateMiddle, kUpMiddle, kDownMiddle, kGradGateUp, kGradDown, kFactors };
  Factor factors[kFactors] = {};
  float *ones = nullptr;
  float *bias_products = nullptr;  // [rows]: dO times the bias of down
  float *select[2] = {};           // [2 * even_rank]: 1 for the ranks of gate, of up

  struct Shard {
    uint8_t *down_a = nullptr;
    uint8_t *gate_up_b_back = nullptr;
    Gemm gate_up_gemm{};  // K: 32 columns of gate and 32 of up by turns
    Gemm z_gemm{};
    uint16_t *saved = nullptr;
    uint8_t *gate_up = nullptr, *plain = nullptr, *z = nullptr;  // operands
    float *products = nullptr;                                   // [units][rows]
    float *down_middle = nullptr, *grad_gate_up_middle = nullptr;
    float *partial = nullptr;  // [tokens][H]
    uint8_t *scratch = nullptr;
    int64_t units = 0;               // of grad_down, an expert
    uint8_t *base_factor = nullptr;  // transposed gradients of gate and up, then weighted intermediate
  };
  std::vector<Shard> shards{};

  // A worker's scratch.
  int64_t tile_bytes = 0, lora_tile_bytes = 0, operand_bytes = 0, out_floats = 0, sum_floats = 0,
          scratch_bytes = 0;
  struct Worker {
    float *product;
    uint8_t *tiles;
    uint8_t *lora_tiles;  // A transposed, for a run of columns
    uint8_t *operand;
    float *out, *out2;
    float *sum;
  };
  Worker worker(int shard, int index) const;

  const Route::Expert &expert(int32_t index) const { return route.experts[static_cast<size_t>(index)]; }
  int64_t stacked_stride() const { return int64_t{stacked_panels} * kPanelColumns; }
  int64_t rank_stride() const { return int64_t{rank_panels} * kPanelColumns; }
  int64_t experts() const { return static_cast<int64_t>(route.experts.size()); }
  // What the adapter of a projection drops of its input.
  Dropout dropped(double share, int32_t expert_id, Projection projection) const;
  // The intermediate of a chunk with what the adapter's input drops; `first_column` is the shard's.
  Source dropped_intermediate(double share, int shard, int32_t first_column, const Chunk &chunk,
                              const uint8_t *z) const;
  // A chunk's rows of what tokens or gradients came to in the ranks, `values` [rows of the chunk][ranks,
  // padded to panels], into their operand: times `scale`, and times column_scale unless that is null.
  void load_middle(const TrainKernels &kernels, const Chunk &chunk, const float *values, const Gemm &gemm,
                   float scale, const float *column_scale, uint8_t *operand) const;
  // One run of columns of a gradient into worker.out: rows [first_row, last_row) of a transposed factor times
  // what pack(first, rows, steps) makes tiles of, summed over the rows of the expert.
  template <typename Pack>
  void sum_gradient(const Backend &backend, const Worker &worker, int64_t index, const uint8_t *factor,
                    int32_t factor_rows, int32_t first_row, int32_t last_row, int32_t columns,
                    const Pack &pack) const;
  // Where a block's operand begins, in steps of 32 rows.
  int64_t block_offset(const Chunk &block) const {
    return k_steps[static_cast<size_t>(block.expert)] + block.first / 32;
  }
};

}  // namespace ktk
