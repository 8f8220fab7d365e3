// What a weight format provides. A format is a struct of static members, compiled once for each
// instruction set; the kernels are templates over it.
//
//   kName            as users write it
//   kStepColumns     input columns of one 64-byte step of an activation row
//   kTileBytes       bytes of one tile: 16 output rows by kStepColumns
//   kInteger         int8 activations with scales, or bf16 ones without
//   kFactors         groups of columns have integer factors under one scale a row (integer formats)
//   kScaledToBf16    weights that turn into a bf16 tile as they are read; kStepsOfScale steps share a scale
//   kZeroPoint       integer formats: the byte that means 0
//   step             adds one step of MR activation rows (64 bytes apart) times NT tiles; not where tiles
//                    turn into bf16
//   kExpands         whether a tile must be expanded to be a matrix-unit operand
//   expand_tile      if so: into the given 1024 bytes, with the scales of its 16 rows if kScaledToBf16, with
//                    their factors if kFactors
//   columns          two columns of a tile in fp32, less the zero point and before the scale
//   pack             16 output rows into tiles, scales and factors; 1 if a weight or a scale is not finite
//
// docs/adding-a-format.md walks through one.
#pragma once

#include "core/backend.h"
#include "kernels/inline.h"
#include "kernels/rows.h"

// The factors of the two halves of a step for tiles side by side: 16 multipliers, then 16 offsets.
struct StepFactors {
  const uint8_t *low, *high;
  int64_t tile_stride_bytes;
  const int32_t *sums;  // with pair sums: those of the rows' step, row_stride apart
  int64_t row_stride;
};

constexpr int kFactorBytes = 2 * kPanelColumns;  // of a group in a panel

// Packing sees a panel as vectors of its 16 output rows, one for each input column: scales and factors are
// then vectors too, and 4 columns of codes are one line of a tile.

constexpr int kPackColumns = 128;  // columns packed at a time: a multiple of every group and step

// `count` values of row n from `column` of the shard on, a multiple of 16; zero past the end and in rows that
// do not exist. The rows of a panel are too many streams for a processor to foresee.
constexpr int kPackAheadBytes = 1024;
template <class Ops>
KTK_INLINE void load_row(const PackArgs *args, int n, int64_t column, int count, float *values) {
  const int64_t depth = args->gemm->depth, from = args->first_column + column;
  const bool exists = args->rows[n] != nullptr;
  if (exists && column + count <= depth && args->dtype == KTK_DTYPE_BF16) {
    const uint16_t *row = (const uint16_t *)args->rows[n] + from;
    for (int c = 0; c < count; c += 32) __builtin_prefetch(row + c + kPackAheadBytes / 2, 0, 0);
    for (int c = 0; c < count; c += 16) Ops::store_f(values + c, Ops::load_bf16(row + c));
    return;
  }
  const int64_t last = args->first_column + depth;
  for (int c = 0; c < count; c += 16) {
    Ops::store_f(values + c, exists && column + c < depth
                                 ? load_values<Ops>(args->rows[n], args->dtype, from + c, last)
                                 : Ops::zero_f());
  }
}

// 16 columns of a panel from `column` of the shard on, [column][16 rows].
template <class Ops>
KTK_INLINE void load_columns(const PackArgs *args, int64_t column, float *columns) {
  float rows[kPanelColumns][16];
  for (int n = 0; n < kPanelColumns; n++) load_row<Ops>(args, n, column, 16, rows[n]);
  Ops::transpose(rows, columns);
}

// Rows of one step of K, 64 bytes each, into a tile of 1024 bytes: their words of 4 bytes transposed. The
// tile will not be read soon, so it passes by the caches; finish_tiles() makes it visible to other threads.
template <class Ops>
KTK_INLINE void store_tile(const void *rows, uint8_t *tile) {
  alignas(64) uint8_t turned[kPanelColumns * kStepBytes];
  Ops::transpose(rows, turned);
  for (int line = 0; line < kPanelColumns; line++)
    Ops::stream_i(tile + line * kStepBytes, Ops::load_i(turned + line * kStepBytes));
}
KTK_INLINE void finish_tiles() { __builtin_ia32_sfence(); }

// The largest magnitude of each row of a panel, over all of the unsharded row, as fp32 bits. Returns the
// largest of them.
template <class Ops>
KTK_INLINE int32_t panel_magnitudes(const PackArgs *args, int32_t *magnitudes) {
  int32_t largest = 0;
  for (int n = 0; n < kPanelColumns; n++) {
    magnitudes[n] = args->rows[n] == nullptr
                        ? 0
                        : largest_magnitude_bits<Ops>(args->rows[n], args->dtype, 0, args->full_depth);
    largest = magnitudes[n] > largest ? magnitudes[n] : largest;
  }
  return largest;
}

KTK_INLINE void store_row_scales(const PackArgs *args, const float *scale) {
  __builtin_memcpy(args->scale, scale, kPanelColumns * 4);
}

// Scales of a group that bf16 holds exactly.
template <class Ops>
KTK_INLINE void store_group_scales(const PackArgs *args, int64_t group, const float *scale) {
  Ops::store_bf16((uint16_t *)args->scale + group * args->group_stride, Ops::load_f(scale));
}

template <class Ops>
KTK_INLINE typename Ops::F rounded_to_bf16(typename Ops::F v) {
  uint16_t halves[16];
  Ops::store_bf16(halves, v);
  return Ops::load_bf16(halves);
}

// One line of a tile from 4 columns of codes 0 .. 255.
template <class Ops>
KTK_INLINE typename Ops::I tile_line(const typename Ops::I *codes) {
  typename Ops::I line = codes[3];
  for (int i = 2; i >= 0; i--) {
    line = Ops::add_i(Ops::shift_left_4(Ops::shift_left_4(line)), codes[i]);
  }
  return line;
}

// Columns 0 and 1 of quads of bytes, or 2 and 3, less what stands for 0.
template <class Ops>
KTK_INLINE void pair_of_quads(typename Ops::I quads, bool second, int32_t zero_point, typename Ops::F *even,
                              typename Ops::F *odd) {
  const typename Ops::I both = second ? Ops::shift_right_i(quads, 16) : quads;
  const typename Ops::I byte = Ops::set1_i(255), zero = Ops::set1_i(zero_point);
  *even = Ops::from_i(Ops::sub_i(Ops::and_i(both, byte), zero));
  *odd = Ops::from_i(Ops::sub_i(Ops::and_i(Ops::shift_right_i(both, 8), byte), zero));
}
