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
//   step             adds one step of MR activation rows (64 bytes apart) times NT tiles, and tells
//                    `ahead` of each line that it reads; not where tiles turn into bf16
//   kSumsNibbles     with factors: whether steps of MR rows take off what stands for 0 by themselves
//   kMultiply        the multiplication of its products, for probes
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
  const int32_t *sums;  // of the rows, those of the step's two halves, row_stride apart; null: not needed
  int64_t row_stride;
  // The same from another tile on.
  KTK_MEMBER StepFactors from_tile(int tile) const {
    return {low + tile * tile_stride_bytes, high + tile * tile_stride_bytes, tile_stride_bytes, sums,
            row_stride};
  }
};

// What is fetched with each line of a tile that is read. ReadAhead: what lies `kBytes` behind it; 0: that is
// left to the processor. NextPair: the same line of the next pair of tiles, `bytes` behind it, into the
// second level; 0: the line itself, which costs less than to ask.
template <int64_t kBytes>
struct ReadAhead {
  KTK_MEMBER void fetch(const uint8_t *line) const {
    if constexpr (kBytes > 0) __builtin_prefetch(line + kBytes, 0, 3);
  }
};
struct NextPair {
  int64_t bytes;
  KTK_MEMBER void fetch(const uint8_t *line) const { __builtin_prefetch(line + bytes, 0, 2); }
};

template <int kBytes>
KTK_INLINE void fetch_lines(const uint8_t *data) {
  for (int line = 0; line < kBytes; line += 64) __builtin_prefetch(data + line, 0, 3);
}
template <class Format, int64_t kAheadBytes>
KTK_INLINE void fetch_tile_ahead(const uint8_t *tile) {
  if constexpr (kAheadBytes > 0) fetch_lines<Format::kTileBytes>(tile + kAheadBytes);
}

constexpr int kFactorBytes = 2 * kPanelColumns;  // of a group in a panel

// Packing sees a panel as vectors of its 16 output rows, one for each input column: scales and factors are
// then vectors too, and 4 columns of codes are one line of a tile.

constexpr int kPackColumns = 128;  // columns of 4-bit weights packed at a time: whole groups and steps

// `count` values of row n from `column` of the shard on, a multiple of 16, as they are; zero past the end and
// in rows that do not exist. The rows of a panel are too many streams for a processor to foresee.
constexpr int kPackAheadBytes = 1024;
template <class Ops>
KTK_INLINE void read_row(const PackArgs *args, int n, int64_t column, int count, float *values) {
  const Gemm &gemm = *args->gemm;
  const int64_t from = args->first_column + column;
  const bool exists = args->rows[n] != nullptr;
  if (exists && column + count <= gemm.depth && args->dtype == KTK_DTYPE_BF16) {
    const uint16_t *row = (const uint16_t *)args->rows[n] + from;
    for (int c = 0; c < count; c += 32) __builtin_prefetch(row + c + kPackAheadBytes / 2, 0, 0);
    for (int c = 0; c < count; c += 16) Ops::store_f(values + c, Ops::load_bf16(row + c));
    return;
  }
  const int64_t last = args->first_column + gemm.depth;
  for (int c = 0; c < count; c += 16) {
    Ops::store_f(values + c, exists && column + c < gemm.depth
                                 ? load_values<Ops>(args->rows[n], args->dtype, from + c, last)
                                 : Ops::zero_f());
  }
}

// The same, in whole rotations where the weights are rotated.
template <class Ops>
KTK_INLINE void load_row(const PackArgs *args, int n, int64_t column, int count, float *values) {
  read_row<Ops>(args, n, column, count, values);
  const Gemm &gemm = *args->gemm;
  if (gemm.rotated) rotate_values<Ops>(values, least(count, (int)(gemm.depth - column)));
}

// Sums and differences of vectors at distance 1, 2 and 4, of 8 that are `stride` floats apart.
template <class Ops>
KTK_INLINE void butterflies(float *values, int stride) {
  typename Ops::F v[8];
  for (int i = 0; i < 8; i++) v[i] = Ops::load_f(values + i * stride);
  const typename Ops::F minus = Ops::set1_f(-1.0f);
  for (int distance = 1; distance < 8; distance *= 2) {
    for (int i = 0; i < 8; i++) {
      if (i & distance) continue;
      const typename Ops::F low = v[i], high = v[i + distance];
      v[i] = Ops::add(low, high);
      v[i + distance] = Ops::fma(high, minus, low);
    }
  }
  for (int i = 0; i < 8; i++) Ops::store_f(values + i * stride, v[i]);
}

// Rotates kRotation columns of 16 rows: as rotate() does with each row, to the bit, and with fewer
// operations.
template <class Ops>
KTK_INLINE void rotate_columns(float *columns) {
  static_assert(kRotation == 64, "one over its root is 1/8, and it is two rounds of 8");
  for (int c = 0; c < kRotation * kPanelColumns; c += kPanelColumns)
    Ops::store_f(columns + c, Ops::mul(Ops::load_f(columns + c), Ops::set1_f(0.125f)));
  for (int i = 0; i < 8; i++) butterflies<Ops>(columns + i * 8 * kPanelColumns, kPanelColumns);
  for (int i = 0; i < 8; i++) butterflies<Ops>(columns + i * kPanelColumns, 8 * kPanelColumns);
}

// 64 columns of a panel from `column` of the shard on, [column][16 rows]; rotated if the weights are.
constexpr int kLoadColumns = 64;
static_assert(kLoadColumns == kRotation, "columns are loaded by rotations");
template <class Ops>
KTK_INLINE void load_columns(const PackArgs *args, int64_t column, float *columns) {
  const Gemm &gemm = *args->gemm;
  if (args->dtype == KTK_DTYPE_BF16 && column + kLoadColumns <= gemm.depth) {
    // Words of two columns are transposed before they become fp32.
    for (int half = 0; half < kLoadColumns; half += 32) {
      alignas(64) uint8_t words[kPanelColumns * 64], turned[kPanelColumns * 64];
      for (int n = 0; n < kPanelColumns; n++) {
        typename Ops::I pairs = Ops::zero_i();
        if (args->rows[n] != nullptr) {
          const uint16_t *row = (const uint16_t *)args->rows[n] + args->first_column + column + half;
          __builtin_prefetch(row + kPackAheadBytes / 2, 0, 0);
          pairs = Ops::load_i(row);
        }
        Ops::store_i(words + n * 64, pairs);
      }
      Ops::transpose(words, turned);
      float *to = columns + half * kPanelColumns;
      for (int pair = 0; pair < 16; pair++, to += 2 * kPanelColumns) {
        const typename Ops::I both = Ops::load_i(turned + pair * 64);
        Ops::store_f(to, Ops::as_f(Ops::shift_left_i(both, 16)));
        Ops::store_f(to + kPanelColumns, Ops::as_f(Ops::and_i(both, Ops::set1_i((int32_t)0xffff0000))));
      }
    }
  } else {
    alignas(64) float rows[kPanelColumns][kLoadColumns], part[kPanelColumns][16];
    for (int n = 0; n < kPanelColumns; n++) read_row<Ops>(args, n, column, kLoadColumns, rows[n]);
    for (int c = 0; c < kLoadColumns; c += 16) {
      for (int n = 0; n < kPanelColumns; n++) Ops::store_f(part[n], Ops::load_f(rows[n] + c));
      Ops::transpose(part, columns + c * kPanelColumns);
    }
  }
  if (gemm.rotated && column + kRotation <= gemm.depth) rotate_columns<Ops>(columns);
}

// The same panel, of rows that no shard has cut.
struct WholeRows {
  Gemm gemm;
  PackArgs args;
  KTK_MEMBER explicit WholeRows(const PackArgs &shard) : gemm(*shard.gemm), args(shard) {
    gemm.depth = shard.full_depth;
    args.gemm = &gemm;
    args.first_column = 0;
  }
};

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

// Of each row of a panel, over all of the unsharded row: the largest magnitude, as fp32 bits, and the widest
// range of a group of columns, a power of two of them; a range includes 0.
template <class Ops>
struct PanelSurvey {
  alignas(64) int32_t magnitudes[kPanelColumns];
  typename Ops::F widest;
  int32_t largest;  // of the magnitudes

  KTK_MEMBER explicit PanelSurvey(const PackArgs *args, int group_columns) {
    typedef typename Ops::F F;
    const WholeRows whole(*args);
    typename Ops::I most = Ops::zero_i();
    widest = Ops::zero_f();
    F low = Ops::zero_f(), high = Ops::zero_f();
    for (int64_t first = 0; first < args->full_depth; first += kLoadColumns) {
      alignas(64) float columns[kLoadColumns * kPanelColumns];
      load_columns<Ops>(&whole.args, first, columns);
      for (int c = 0; c < kLoadColumns; c++) {
        const F value = Ops::load_f(columns + c * kPanelColumns);
        most = larger_magnitude<Ops>(most, Ops::as_i(value));
        low = Ops::min(low, value);
        high = Ops::max(high, value);
        if (((first + c + 1) & (group_columns - 1)) != 0) continue;
        widest = Ops::max(widest, Ops::fma(low, Ops::set1_f(-1.0f), high));
        low = high = Ops::zero_f();
      }
    }
    widest = Ops::max(widest, Ops::fma(low, Ops::set1_f(-1.0f), high));
    Ops::store_i(magnitudes, most);
    largest = Ops::reduce_max_i(most);
  }
};

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
    line = Ops::add_i(Ops::shift_left_i(line, 8), codes[i]);
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
