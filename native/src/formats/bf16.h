// bf16 weights as they are. Tile: [16 pairs of columns][16 rows][2], the operand of TDPBF16PS.
#pragma once

#include "formats/format.h"

struct Bf16 {
  static constexpr const char *kName = "bf16";
  static constexpr int kStepColumns = 32;
  static constexpr int kTileBytes = 1024;
  static constexpr bool kInteger = false;
  static constexpr bool kFactors = false;
  static constexpr bool kExpands = false;
  static constexpr bool kScaledToBf16 = false;
  static constexpr int kZeroPoint = 0;
  static constexpr Multiply kMultiply = Multiply::bf16;
  // The smallest fp32 magnitude that has no finite bf16.
  static constexpr int32_t kRoundsToInfinity = 0x7f7f8000;

  template <class Ops, int NT, int MR, class Ahead>
  KTK_INLINE void step(typename Ops::F (&sum)[MR][NT], const uint8_t *rows, const uint8_t *tiles,
                       int64_t tile_stride_bytes, const Ahead &ahead) {
    const int pairs = rolled(16);
    for (int pair = 0; pair < pairs; pair++) {
      typename Ops::WB weights[NT];
      for (int j = 0; j < NT; j++) {
        const uint8_t *line = tiles + j * tile_stride_bytes + pair * 64;
        ahead.fetch(line);
        weights[j] = Ops::split_bf16(line);
      }
      for (int r = 0; r < MR; r++) {
        const typename Ops::AB activations = Ops::pair_bf16(rows + r * kStepBytes + pair * 4);
        for (int j = 0; j < NT; j++) sum[r][j] = Ops::dot_bf16(sum[r][j], weights[j], activations);
      }
    }
  }

  // Columns 2 `pair` and 2 `pair` + 1 of the 16 rows.
  template <class Ops>
  KTK_INLINE void columns(const uint8_t *tile, int pair, const uint8_t *, typename Ops::F *even,
                          typename Ops::F *odd) {
    const typename Ops::I words = Ops::load_i(tile + pair * 64);
    *even = Ops::as_f(Ops::shift_left_i(words, 16));
    *odd = Ops::as_f(Ops::and_i(words, Ops::set1_i((int32_t)0xffff0000)));
  }

  template <class Ops>
  static int32_t pack(const PackArgs *args) {
    const Gemm &gemm = *args->gemm;
    typename Ops::I largest = Ops::zero_i();
    for (int64_t step = 0; step < gemm.steps; step++) {
      alignas(64) uint16_t values[kPanelColumns][kStepColumns];
      const int64_t first = step * kStepColumns;
      const bool as_it_is = args->dtype == KTK_DTYPE_BF16 && first + kStepColumns <= gemm.depth;
      for (int n = 0; n < kPanelColumns; n++) {
        if (as_it_is && args->rows[n] != nullptr) {
          const uint16_t *from = (const uint16_t *)args->rows[n] + args->first_column + first;
          const typename Ops::I pairs = Ops::load_i(from);
          __builtin_prefetch(from + kPackAheadBytes / 2, 0, 0);
          largest = larger_magnitude<Ops>(largest, Ops::shift_left_i(pairs, 16));
          largest = larger_magnitude<Ops>(largest, Ops::and_i(pairs, Ops::set1_i((int32_t)0xffff0000)));
          Ops::store_i(values[n], pairs);
          continue;
        }
        float row[kStepColumns];
        load_row<Ops>(args, n, first, kStepColumns, row);
        for (int c = 0; c < kStepColumns; c += 16) {
          const typename Ops::F v = Ops::load_f(row + c);
          largest = larger_magnitude<Ops>(largest, Ops::as_i(v));
          Ops::store_bf16(values[n] + c, v);
        }
      }
      store_tile<Ops>(values, args->tiles + step * args->step_stride_bytes);
    }
    finish_tiles();
    return Ops::reduce_max_i(largest) >= kRoundsToInfinity;
  }
};
