// 8-bit weights, symmetric. Groups of 32, 64 or 128 input columns share a bf16 scale, amax / 127 rounded; or
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
                        int64_t tile_stride_bytes, int first, int last) {
    for (int quad = first; quad < last; quad++) {
      typename Ops::W8 weights[NT];
      for (int j = 0; j < NT; j++) weights[j] = Ops::split_u8(tiles + j * tile_stride_bytes + quad * 64);
      for (int r = 0; r < MR; r++) {
        const typename Ops::A8 activations = Ops::quad_s8(rows + r * kStepBytes + quad * 4);
        for (int j = 0; j < NT; j++) sum[r][j] = Ops::dot_u8s8(sum[r][j], weights[j], activations);
      }
    }
  }

  template <class Ops, int NT, int MR, int Halves>
  KTK_INLINE void step(typename Ops::I (&sum)[Halves][MR][NT], const uint8_t *rows, const uint8_t *tiles,
                       int64_t tile_stride_bytes, const StepFactors &) {
    quads<Ops, NT, MR>(sum[0], rows, tiles, tile_stride_bytes, 0, rolled(16 / Halves));
    if constexpr (Halves == 2) quads<Ops, NT, MR>(sum[1], rows, tiles, tile_stride_bytes, 8, rolled(16));
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
    const Gemm &gemm = *args->gemm;
    const bool per_row = !gemm.scale_is_bf16;
    const int group_columns = per_row ? kPackColumns : gemm.group_columns;
    int32_t magnitudes[kPanelColumns];
    if (panel_magnitudes<Ops>(args, magnitudes) >= kInfinityBits) return 1;
    float scale[kPanelColumns], inverse[kPanelColumns];
    for (int n = 0; n < kPanelColumns; n++) {
      const Int8Scale row = int8_scale(magnitudes[n]);
      scale[n] = row.scale;
      inverse[n] = row.inverse;
    }
    if (per_row) store_row_scales(args, scale);

    const F least = Ops::set1_f(-127.0f), most = Ops::set1_f(127.0f);
    for (int64_t first = 0; first < (int64_t)gemm.steps * kStepColumns; first += kPackColumns) {
      float columns[kPackColumns * kPanelColumns];
      for (int c = 0; c < kPackColumns; c += 16) load_columns<Ops>(args, first + c, columns + c * 16);
      for (int part = 0; part < kPackColumns; part += group_columns) {
        if (!per_row && first + part < gemm.depth) {
          typename Ops::I largest = Ops::zero_i();
          for (int c = part; c < part + group_columns; c++) {
            const typename Ops::I value = Ops::as_i(Ops::load_f(columns + c * 16));
            largest = Ops::max_i(largest, Ops::and_i(value, Ops::set1_i(0x7fffffff)));
          }
          Ops::store_i(magnitudes, largest);
          for (int n = 0; n < kPanelColumns; n++) scale[n] = int8_scale(magnitudes[n]).scale;
          Ops::store_f(scale, rounded_to_bf16<Ops>(Ops::load_f(scale)));
          for (int n = 0; n < kPanelColumns; n++) {
            if (magnitude_bits(scale[n]) >= kInfinityBits) return 1;
            inverse[n] = scale[n] == 0.0f ? 0.0f : 1.0f / scale[n];
          }
          store_group_scales(args, (first + part) / gemm.group_columns, scale);
        }
        const F by = Ops::load_f(inverse);
        for (int c = part; c < part + group_columns; c++) {
          const F scaled = Ops::mul(Ops::load_f(columns + c * 16), by);
          Ops::store_f(columns + c * 16, Ops::min(most, Ops::max(least, scaled)));
        }
      }
      for (int c = 0; c < kPackColumns && first + c < (int64_t)gemm.steps * kStepColumns; c += 4) {
        typename Ops::I codes[4];
        for (int i = 0; i < 4; i++) {
          codes[i] = Ops::add_i(Ops::round_i(Ops::load_f(columns + (c + i) * 16)), Ops::set1_i(kZeroPoint));
        }
        uint8_t *tile = args->tiles + (first + c) / kStepColumns * args->step_stride_bytes;
        Ops::store_i(tile + (first + c) % kStepColumns / 4 * 64, tile_line<Ops>(codes));
      }
    }
    return 0;
  }
};
