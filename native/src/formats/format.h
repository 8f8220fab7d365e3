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

// 16 columns of a panel from `column` of the shard on, [column][16 rows]; zero past the end and in rows that
// do not exist.
template <class Ops>
KTK_INLINE void load_columns(const PackArgs *args, int64_t column, float *columns) {
  float rows[kPanelColumns][16];
  const int64_t last = args->first_column + args->gemm->depth;
  for (int n = 0; n < kPanelColumns; n++) {
    const bool exists = args->rows[n] != nullptr && column < args->gemm->depth;
    Ops::store_f(rows[n],
                 exists ? load_values<Ops>(args->rows[n], args->dtype, args->first_column + column, last)
                        : Ops::zero_f());
  }
  Ops::transpose(rows, columns);
}

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
KTK_INLINE void store_group_scales(const PackArgs *args, int64_t group, const float *scale) {
  for (int n = 0; n < kPanelColumns; n++) {
    uint32_t bits;
    __builtin_memcpy(&bits, scale + n, 4);
    const uint16_t half = (uint16_t)(bits >> 16);
    __builtin_memcpy(args->scale + (group * args->group_stride + n) * 2, &half, 2);
  }
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
