// What training adds to the table of kernels in core/backend.h. All products of training are products of
// bf16 rows with bf16 tiles, the same ones as in a forward of bf16 weights; the kernels here make their
// operands and work on their results.
//
// An operand of tiles is laid out [panel of 16 columns][step of 32 along K][1024 bytes]; an operand of rows
// as core/backend.h says.
#pragma once

#include <cstdint>

namespace ktk {

struct Gemm;
struct Weights;

// Which elements of a LoRA input are dropped: element (row, feature) is kept if a hash of it and the key is
// at least `threshold` / 2^24, and then multiplied with `scale`. docs/numerics.md defines the hash.
struct Dropout {
  uint64_t key;
  int32_t threshold;  // 0: nothing is dropped
  float scale;
};

// Rows of numbers: row-major in memory, or an operand of rows.
struct Source {
  const void *values;
  int32_t dtype;        // ktk_dtype
  int32_t columns;      // of a row
  int64_t stride;       // values from one row to the next, row-major only
  const int32_t *rows;  // which rows, null: 0, 1, 2 ...
  const Gemm *operand;  // not null: `values` is an operand of operand_rows rows
  int32_t operand_rows;
  int32_t first_row;            // of an operand, added to each row
  const int32_t *dropout_rows;  // the row of each for `dropout`
  int32_t dropout_column;       // of the first column
  Dropout dropout;
};

// A second product added to the first, on bf16 operands.
struct LoraProduct {
  const Gemm *gemm;
  uint8_t *rows;         // of the expert
  const uint8_t *tiles;  // [panel][step][1024]; gate and up [panel][step][2][1024]
};

// What a forward that trains asks of the gate and up kernel beside its output.
struct GateUpTraining {
  const LoraProduct *lora;  // null: none
  uint16_t *saved;          // bf16 [rows][2 * columns of the shard], gate then up; null: not saved
  int64_t saved_stride;
  int32_t saved_columns;
  const Gemm *z_gemm;  // the intermediate rounded to bf16 beside `output`; null: not wanted
  uint8_t *z;
};

// Rows [first, last) of an operand of `rows` rows: source row i times scale, times row_scale[i] and
// column_scale[column], rounded to bf16.
struct LoadRowsArgs {
  Source source;
  const Gemm *gemm;
  int32_t rows, first, last;
  float scale;
  const float *row_scale;     // null: 1
  const float *column_scale;  // null: 1; padded to whole vectors
  uint8_t *to;
};

// The transpose of columns [first_column, first_column + columns) of the source as an operand of `columns`
// rows and source rows [first, first + depth) along K, times row_scale (at the same index) and scale.
struct TransposeRowsArgs {
  Source source;
  const Gemm *gemm;  // depth <= first + ..
  int32_t first, first_column, columns;
  float scale;
  const float *row_scale;  // null: 1
  uint8_t *to;
};

// Tiles whose columns are the source's rows [0, rows), from column `to_column` on, and whose K are its
// columns, from `to_depth` on, which is even. Tiles keep what they held elsewhere.
struct PackTilesArgs {
  Source source;
  int32_t rows;
  int32_t to_column, to_depth;
  int32_t steps;
  int64_t panel_stride_bytes, step_stride_bytes;
  uint8_t *tiles;
};

// Tiles whose K are the source's rows [first, first + rows), from `to_depth` on, which is even, and whose
// columns, from `to_column` on, are its columns [first_column, first_column + columns), first_column on 16.
// Tiles keep what they held elsewhere; columns that follow in the last panel may become zero.
struct PackPairsArgs {
  Source source;
  int32_t first, rows;
  int32_t to_column, to_depth;
  int32_t first_column, columns;
  int32_t steps;
  uint8_t *tiles;
};

// Columns [first_column, first_column + columns) of a packed projection's input as an operand of tiles for
// the transposed product. K runs over its outputs; with gate and up, 32 of gate and 32 of up by turns.
struct ExpandArgs {
  const Gemm *gemm;
  const uint8_t *tiles, *scale, *factors;  // the projection's
  int32_t panels;
  int32_t projections;            // 1, or 2 for gate and up
  int32_t first_column, columns;  // first_column on 64
  uint8_t *to;
};

// One panel of a packed projection in fp32, row by row.
struct UnpackArgs {
  const Gemm *gemm;
  const uint8_t *tiles, *scale, *factors;  // the panel's
  int32_t projections, which;
  float *const *rows;  // [16], null: not wanted
};

// Rows [first, last) times tiles, into out [last - first][stride].
struct MultiplyArgs {
  const Gemm *gemm;
  uint8_t *rows;
  int32_t row_count, first, last;
  const uint8_t *tiles;
  int32_t panels;  // at most 16
  const LoraProduct *lora;
  int32_t accumulate;  // adds to out
  int32_t strict;
  float *out;
  int64_t stride;
  float *scratch;           // kScratchFloats
  int32_t rotated_columns;  // of the product, to be rotated back; 0: none
};

// The way back through the activation, for columns [first_column, first_column + columns) of a shard.
struct ActivationBackwardArgs {
  int32_t row_count, first, last;  // rows of the expert
  int32_t first_column, columns;   // first_column on 32
  const float *grad;               // [last - first][stride], not yet weighted
  int64_t stride;
  const uint16_t *saved;  // as in GateUpTraining, of the expert
  int64_t saved_stride;
  int32_t saved_columns;
  const float *expert_weights;  // [row_count]
  float limit, alpha;
  const Gemm *gate_up_gemm;            // K: 32 of gate and 32 of up by turns
  uint8_t *gate_up;                    // gradient of gate and up, times the scales
  const float *gate_scale, *up_scale;  // by panels of 16 with 16 others between; null: 1
  uint8_t *plain;                      // the same without the scales; null: not wanted
  const Gemm *z_gemm;
  uint8_t *z;       // the intermediate; null: not wanted
  float *products;  // [row_count]: gradient times intermediate, summed over the columns
};

// target[target_rows[i]][0 .. columns) += source row i times its dropout factors.
struct AddDroppedArgs {
  float *values;  // [last - first][stride]; overwritten
  int64_t stride;
  int32_t first, last, first_column, columns;
  const int32_t *dropout_rows;
  Dropout dropout;
  const int32_t *target_rows;  // null: first .. last - 1 go to 0 ..
  float *target;
  int64_t target_stride;
  int32_t rotated_columns;  // of what is added: rotated first; 0: none
};

// Rows [0, rows) and columns [0, columns) of sums into the caller's matrix, straight or transposed.
struct StoreMatrixArgs {
  const float *values;
  int64_t stride;
  int32_t rows, columns;
  void *target;
  int32_t dtype;
  int64_t target_stride;
  int32_t transposed;
  int32_t accumulate;
};

// For one instruction set, whatever the format.
struct TrainKernels {
  void (*load_rows)(const LoadRowsArgs *);
  void (*transpose_rows)(const TransposeRowsArgs *);
  // Return 1 where a value is not finite.
  int32_t (*pack_tiles)(const PackTilesArgs *);
  int32_t (*pack_pairs)(const PackPairsArgs *);
  void (*multiply)(const MultiplyArgs *);
  void (*activation_backward)(const ActivationBackwardArgs *);
  void (*add_dropped)(const AddDroppedArgs *);
  void (*store_matrix)(const StoreMatrixArgs *);
};

}  // namespace ktk
