// The table through which the engine reaches the kernels of one instruction set.
//
// This header is read both by baseline code and by code built for an instruction set, so it holds
// plain data only: no function with a body, nothing from the standard library but fixed-width integers.
//
// Activations ("rows") of one expert lie in blocks of up to 16 rows. Within a block the K steps of 64
// bytes follow each other, and within a step the rows: [step][row of the block][64 bytes]. A block is
// therefore a run of tile operands, and a single row is contiguous. `row_address` in
// kernels/rows.h is the one place that computes the addresses.
#pragma once

#include <cstdint>

#include "core/train_kernels.h"

namespace ktk {

constexpr int kPanelColumns = 16;      // output neurons of one panel: a tile's columns, a vector's lanes
constexpr int kBlockRows = 16;         // rows of one block of activations: a tile's rows
constexpr int kStepBytes = 64;         // bytes of K that one step advances each row
constexpr int kActivationGroup = 128;  // columns of a row of activations that share a scale, where they do
constexpr int kRotatedGroup = 256;     // columns of a rotated intermediate that share one
constexpr int kRotation = 64;          // columns that a rotation mixes
constexpr int kMostGroupColumns = 512;
constexpr int kPassRows = 512;    // most rows of one pass over weight panels (see kernels/expert.h)
constexpr int kFormats = 4;       // values of ktk_format
constexpr int kScaleBlock = 128;  // columns of e4m3 weights that share a scale

// One projection as the kernels see it: K is cut into steps, and steps into segments, within which
// integer products share one weight scale and one activation scale.
struct Gemm {
  int32_t depth;            // K: input columns
  int32_t steps;            // ceil(depth / columns of a step)
  int32_t segments;         // 1 for bf16
  int32_t segment_steps;    // steps in a segment
  int32_t halves;           // 2: each step holds two segments of 32 columns, else 1
  int32_t row_group_shift;  // segment >> row_group_shift: its activation group
  int32_t weight_groups;    // scales along K, for one output row; 0 for bf16
  int32_t row_groups;       // activation scales along K, 0 for bf16
  int32_t group_columns;    // weight group size, depth for one scale a row; 0: no scales
  int32_t scale_is_bf16;    // scales of groups; those of rows are fp32
  int32_t factor_groups;    // groups with integer factors under one scale a row; 0: none
  int32_t factor_shift;     // column >> factor_shift: its group of factors
  // Sums of a row of activations, one for each segment; with factors, behind each those of its steps: of the
  // two halves, as 16-bit numbers, the first in the low one.
  int32_t sums;
  int32_t sums_per_row_group;  // from those of a group of activations to those of the next
  // Columns of the intermediate that are made together, because they share a scale where there are scales: of
  // the gemm that multiplies with it.
  int32_t row_group_columns;
  int32_t rotated;    // columns are those of the model times the rotation of docs/numerics.md
  int64_t row_bytes;  // of activations, from one row to the next
};

// One expert's activations; scale [rows][row_groups], sum [rows][sums]: integer formats only.
struct Rows {
  uint8_t *data;
  float *scale;
  int32_t *sum;
};

// One packed projection of one expert in one shard.
struct Weights {
  const uint8_t *tiles;
  const uint8_t *scale;
  const uint8_t *factors;
};

struct QuantiseArgs {
  const Gemm *gemm;
  const void *input;  // [tokens][depth], row-major
  int32_t dtype;      // ktk_dtype
  int32_t first, last;
  Rows rows;  // single rows: row t at t * steps * 64 bytes
};

struct GatherArgs {
  const Gemm *gemm;
  Rows from;              // single rows, by token
  const int32_t *tokens;  // [count], those of one block
  int32_t count;          // 1 .. 16
  Rows to;                // the block
};

struct GateUpArgs {
  const Gemm *gemm;        // depth = hidden size
  const Gemm *next;        // depth = the shard's intermediate size: how `output` is laid out
  Weights weights;         // the expert's, all panels of the shard
  const float *gate_bias;  // the shard's, or null
  const float *up_bias;
  Rows input;
  Rows output;
  int32_t rows;
  // Of the shard: whole groups of the intermediate, or a part of one that begins on a step.
  int32_t first_column, last_column;
  // Of a group computed in parts, integer formats: [rows][columns of a group], and parts not done yet.
  float *group_values;
  int32_t *parts_left;
  float limit, alpha;
  int32_t strict;
  float *scratch;                  // kScratchFloats
  const GateUpTraining *training;  // null: a forward of inference
};

// Scratch of a worker: a pass's sums for the gate and up columns of a group, then their activations. A unit
// of more columns takes fewer rows a pass.
constexpr int kSumFloats = kPassRows * 2 * kActivationGroup;
constexpr int kMostUnitColumns = 256;                              // of the intermediate, in one unit of work
constexpr int kMostPanels = 2 * kMostUnitColumns / kPanelColumns;  // of gate and up, or of down
constexpr int kScratchFloats = kSumFloats + kPassRows * kRotatedGroup;
static_assert(kRotatedGroup <= kMostUnitColumns, "a unit holds whole groups");

struct DownArgs {
  const Gemm *gemm;  // depth = the shard's intermediate size
  Weights weights;
  const float *bias;  // [hidden size] or null
  Rows input;
  const int32_t *tokens;        // [rows]
  const float *expert_weights;  // [rows]
  int32_t rows;                 // of the expert
  int32_t first_row, last_row;  // those to compute, from a block of rows on
  int32_t hidden_size;
  int32_t first_panel, last_panel;
  int32_t strict;
  float *scratch;           // kScratchFloats
  float *sum;               // [tokens], each of (last_panel - first_panel) * 16 columns
  int64_t sum_stride;       // from a token to the next
  const LoraProduct *lora;  // null: none; of all panels
  // Called before the first sum is touched, where others add to the same sums; else null.
  void (*await_turn)(const void *turn);
  const void *turn;
};

struct FinishArgs {
  const float *const *parts;  // [part_count], summed in order; [tokens][part_stride]
  int32_t part_count;
  int64_t part_stride;
  int32_t first_token, last_token;
  int32_t first_column, last_column;  // of the output
  int64_t hidden_size;
  void *output;  // [tokens][hidden_size]
  int32_t dtype;
  int32_t incremental;
  int32_t rotated;  // the sums are of rotated columns, to be rotated back; first_column is on kRotation
};

struct PackArgs {
  const Gemm *gemm;
  const void *const *rows;  // [16] row pointers of full_depth values; null: padding
  int32_t dtype;
  int32_t full_depth;    // columns of the unsharded row, over which a row scale is taken
  int32_t first_column;  // where the shard's columns begin
  uint8_t *tiles;        // of step s: tiles + s * step_stride_bytes
  int64_t step_stride_bytes;
  uint8_t *scale;    // of group g: 16 scales at element g * group_stride
  uint8_t *factors;  // of group g: 16 multipliers and 16 offsets at byte g * 2 * group_stride
  int64_t group_stride;
  const float *block_scale;  // of e4m3 rows, one for every 128 columns of the unsharded row; else null
};

// The multiplication that a format's products are made of.
enum class Multiply : int32_t { bf16, byte, nibble };

// A loop of multiplications for probes.
constexpr int kProbeOperandBytes = 2048;
struct ProductLoopArgs {
  const uint8_t *operands;  // [kProbeOperandBytes], aligned to 64
  int64_t repeats;
  int32_t *result;  // [16], so that nothing was computed in vain
};

struct ProductLoop {
  const char *name;
  int64_t operations;  // of one repeat, a multiplication and an addition being two
  void (*run)(const ProductLoopArgs *);
};

constexpr int kProductLoops = 5;
struct ProductLoops {
  ProductLoop loop[kProductLoops];  // name null: no more
};

struct ReadArgs {
  const uint8_t *data;
  int64_t bytes;  // a multiple of 1024
  int32_t streams;
  int64_t prefetch_bytes;  // how far ahead; 0: left to the hardware
  uint32_t *sum;           // of all 32-bit words, modulo 2^32
};

struct CopyArgs {
  uint8_t *to;  // both aligned to 64
  const uint8_t *from;
  int64_t bytes;      // a multiple of 64
  int32_t streaming;  // non-zero: stores that pass by the caches
};

struct FormatKernels {
  const char *name;
  int32_t tile_bytes;
  int32_t step_columns;
  int32_t integer;    // int8 activations with scales, else bf16
  int32_t factors;    // groups have integer factors under one scale a row, instead of scales
  int32_t tile_rows;  // rows from which the matrix-unit kernel is used; 0: never
  void (*quantise)(const QuantiseArgs *);
  void (*gather)(const GatherArgs *);
  void (*gate_up)(const GateUpArgs *);
  void (*down)(const DownArgs *);
  // Returns 0, or 1 when a weight is not finite.
  int32_t (*pack)(const PackArgs *);
  ProductLoops products;
  void (*expand)(const ExpandArgs *);
  void (*unpack)(const UnpackArgs *);
};

struct Backend {
  const char *name;
  uint32_t needs;     // CpuRequirement bits
  int32_t automatic;  // may be chosen without being named
  void (*finish)(const FinishArgs *);
  void (*read)(const ReadArgs *);
  void (*copy)(const CopyArgs *);
  FormatKernels formats[kFormats];  // by ktk_format
  TrainKernels train;
};

}  // namespace ktk
