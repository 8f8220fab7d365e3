// 8-bit weights, symmetric. Groups of 32 to 512 input columns share a bf16 scale, amax / 127 rounded; or
// a whole output row shares an fp32 one. Stored as value + 128, because the dot products of VNNI and AMX take
// one unsigned operand and the activations are the signed one.
// Tile: [16 quads of columns][16 rows][4].
#pragma once

#include "formats/format.h"

struct Int8 {
  static constexpr const char *kName = "int8";
  static constexpr int kStepColumns = 64;
  static constexpr int kTileBytes = 1024;
  static constexpr bool kInteger = true;
  static constexpr bool kFactors = false;
  static constexpr bool kExpands = false;
  static constexpr bool kScaledToBf16 = false;
  static constexpr int kZeroPoint = 128;
  static constexpr Multiply kMultiply = Multiply::byte;

  template <class Ops, int NT, int MR>
  KTK_INLINE void quads(typename Ops::I (&sum)[MR][NT], const uint8_t *rows, const uint8_t *tiles,
                        int64_t tile_stride_bytes, int64_t ahead_bytes, int first, int last) {
    for (int quad = first; quad < last; quad++) {
      typename Ops::W8 weights[NT];
      for (int j = 0; j < NT; j++) {
        const uint8_t *line = tiles + j * tile_stride_bytes + quad * 64;
        fetch_ahead(line, ahead_bytes);
        weights[j] = Ops::split_u8(line);
      }
      for (int r = 0; r < MR; r++) {
        const typename Ops::A8 activations = Ops::quad_s8(rows + r * kStepBytes + quad * 4);
        for (int j = 0; j < NT; j++) sum[r][j] = Ops::dot_u8s8(sum[r][j], weights[j], activations);
      }
    }
  }

  template <class Ops, int NT, int MR, int Halves>
  KTK_INLINE void step(typename Ops::I (&sum)[Halves][MR][NT], const uint8_t *rows, const uint8_t *tiles,
                       int64_t tile_stride_bytes, int64_t ahead_bytes, const StepFactors &) {
    const int half = rolled(16 / Halves);
    quads<Ops, NT, MR>(sum[0], rows, tiles, tile_stride_bytes, ahead_bytes, 0, half);
    if constexpr (Halves == 2)
      quads<Ops, NT, MR>(sum[1], rows, tiles, tile_stride_bytes, ahead_bytes, 8, rolled(16));
  }

  // Columns 2 `pair` and 2 `pair` + 1 of the 16 rows, before the scale.
  template <class Ops>
  KTK_INLINE void columns(const uint8_t *tile, int pair, const uint8_t *, typename Ops::F *even,
                          typename Ops::F *odd) {
    const typename Ops::I quads = Ops::load_i(tile + pair / 2 * 64);
    pair_of_quads<Ops>(quads, pair % 2 != 0, kZeroPoint, even, odd);
  }

  template <class Ops>
  static int32_t pack(const PackArgs *args) {
    typedef typename Ops::F F;
    const F least = Ops::set1_f(-127.0f), most = Ops::set1_f(127.0f);
    const Gemm &gemm = *args->gemm;
    const bool per_row = !gemm.scale_is_bf16;
    const int group_columns = per_row ? kPackColumns : gemm.group_columns;
    float inverse[kPanelColumns];
    if (per_row) {
      int32_t magnitudes[kPanelColumns];
      if (panel_magnitudes<Ops>(args, magnitudes) >= kInfinityBits) return 1;
      float scale[kPanelColumns];
      for (int n = 0; n < kPanelColumns; n++) {
        const Int8Scale row = int8_scale(magnitudes[n]);
        scale[n] = row.scale;
        inverse[n] = row.inverse;
      }
      store_row_scales(args, scale);
    }
    // Whole groups at a time.
    const int columns = group_columns > kPackColumns ? group_columns : kPackColumns;
    const int64_t end = (int64_t)gemm.steps * kStepColumns;
    for (int64_t first = 0; first < end; first += columns) {
      alignas(64) float values[kPanelColumns][kMostGroupColumns];
      alignas(64) uint8_t codes[kMostGroupColumns / kStepColumns][kPanelColumns][kStepColumns];
      for (int n = 0; n < kPanelColumns; n++) load_row<Ops>(args, n, first, columns, values[n]);
      for (int part = 0; part < columns; part += group_columns) {
        if (!per_row && first + part < gemm.depth) {
          float scale[kPanelColumns];
          if (!group_scales<Ops>(values, part, group_columns, scale, inverse)) return 1;
          store_group_scales<Ops>(args, (first + part) / group_columns, scale);
        }
        for (int n = 0; n < kPanelColumns; n++) {
          const F by = Ops::set1_f(inverse[n]);
          for (int c = part; c < part + group_columns; c += 16) {
            const F scaled = Ops::min(most, Ops::max(least, Ops::mul(Ops::load_f(values[n] + c), by)));
            Ops::store_low_bytes(codes[c / kStepColumns][n] + c % kStepColumns,
                                 Ops::add_i(Ops::round_i(scaled), Ops::set1_i(kZeroPoint)));
          }
        }
      }
      for (int step = 0; step < columns / kStepColumns; step++) {
        const int64_t to = first / kStepColumns + step;
        if (to < gemm.steps) store_tile<Ops>(codes[step], args->tiles + to * args->step_stride_bytes);
      }
    }
    finish_tiles();
    return 0;
  }

  // Scales of a group of a panel's rows, and what its weights are multiplied with; false where a weight is
  // not finite.
  template <class Ops>
  KTK_INLINE bool group_scales(const float (*values)[kMostGroupColumns], int part, int count, float *scale,
                               float *inverse) {
    typedef typename Ops::F F;
    int32_t magnitudes[kPanelColumns], largest = 0;
    for (int n = 0; n < kPanelColumns; n++) {
      typename Ops::I most = Ops::zero_i();
      for (int c = part; c < part + count; c += 16)
        most = larger_magnitude<Ops>(most, Ops::as_i(Ops::load_f(values[n] + c)));
      magnitudes[n] = Ops::reduce_max_i(most);
      largest = magnitudes[n] > largest ? magnitudes[n] : largest;
    }
    if (largest >= kInfinityBits) return false;
    const F amax = Ops::as_f(Ops::load_i(magnitudes)), zero = Ops::zero_f();
    const F exact = Ops::where_less(amax, Ops::set1_f(float_of_bits(kNegligibleBits)), zero,
                                    Ops::div(amax, Ops::set1_f(127.0f)));
    const F rounded = rounded_to_bf16<Ops>(exact);
    Ops::store_f(scale, rounded);
    Ops::store_f(inverse, Ops::where_less(zero, rounded, Ops::div(Ops::set1_f(1.0f), rounded), zero));
    return true;
  }
};
