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

  template <class Ops, int NT, int MR, class Ahead>
  KTK_INLINE void quads(typename Ops::I (&sum)[MR][NT], const uint8_t *rows, const uint8_t *tiles,
                        int64_t tile_stride_bytes, const Ahead &ahead, int first, int last) {
    for (int quad = first; quad < last; quad++) {
      typename Ops::W8 weights[NT];
      for (int j = 0; j < NT; j++) {
        const uint8_t *line = tiles + j * tile_stride_bytes + quad * 64;
        ahead.fetch(line);
        weights[j] = Ops::split_u8(line);
      }
      for (int r = 0; r < MR; r++) {
        const typename Ops::A8 activations = Ops::quad_s8(rows + r * kStepBytes + quad * 4);
        for (int j = 0; j < NT; j++) sum[r][j] = Ops::dot_u8s8(sum[r][j], weights[j], activations);
      }
    }
  }

  template <class Ops, int NT, int MR, int Halves, class Ahead>
  KTK_INLINE void step(typename Ops::I (&sum)[Halves][MR][NT], const uint8_t *rows, const uint8_t *tiles,
                       int64_t tile_stride_bytes, const Ahead &ahead, const StepFactors &) {
    const int half = rolled(16 / Halves);
    quads<Ops, NT, MR>(sum[0], rows, tiles, tile_stride_bytes, ahead, 0, half);
    if constexpr (Halves == 2)
      quads<Ops, NT, MR>(sum[1], rows, tiles, tile_stride_bytes, ahead, 8, rolled(16));
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
    const int group_columns = per_row ? kLoadColumns : gemm.group_columns;
    F inverse = Ops::zero_f();
    if (per_row) {
      const PanelSurvey<Ops> survey(args, kLoadColumns);
      if (survey.largest >= kInfinityBits) return 1;
      float scale[kPanelColumns], inverses[kPanelColumns];
      for (int n = 0; n < kPanelColumns; n++) {
        const Int8Scale row = int8_scale(survey.magnitudes[n]);
        scale[n] = row.scale;
        inverses[n] = row.inverse;
      }
      store_row_scales(args, scale);
      inverse = Ops::load_f(inverses);
    }
    // Whole groups at a time.
    const int columns = group_columns > kLoadColumns ? group_columns : kLoadColumns;
    const int64_t end = (int64_t)gemm.steps * kStepColumns;
    for (int64_t first = 0; first < end; first += columns) {
      alignas(64) float values[kMostGroupColumns * kPanelColumns];
      const int count = end - first < columns ? (int)(end - first) : columns;
      for (int c = 0; c < count; c += kLoadColumns)
        load_columns<Ops>(args, first + c, values + c * kPanelColumns);
      for (int part = 0; part < count; part += group_columns) {
        const int stop = least(part + group_columns, count);
        if (!per_row && first + part < gemm.depth) {
          float scale[kPanelColumns];
          if (!group_scale<Ops>(values, part, stop, scale, inverse)) return 1;
          store_group_scales<Ops>(args, (first + part) / group_columns, scale);
        }
        for (int c = part; c < stop; c += 4) {
          typename Ops::I codes[4];
          for (int i = 0; i < 4; i++)
            codes[i] = code<Ops>(Ops::load_f(values + (c + i) * kPanelColumns), inverse);
          const int64_t column = first + c;
          uint8_t *tile = args->tiles + column / kStepColumns * args->step_stride_bytes;
          Ops::stream_i(tile + column % kStepColumns * kPanelColumns, tile_line<Ops>(codes));
        }
      }
    }
    finish_tiles();
    return 0;
  }

  template <class Ops>
  KTK_INLINE typename Ops::I code(typename Ops::F value, typename Ops::F inverse) {
    const typename Ops::F scaled = Ops::mul(value, inverse);
    const typename Ops::F within = Ops::min(Ops::set1_f(127.0f), Ops::max(Ops::set1_f(-127.0f), scaled));
    return Ops::add_i(Ops::round_i(within), Ops::set1_i(kZeroPoint));
  }

  // Scales of a group of a panel's rows, columns [first, last), and what its weights are multiplied with;
  // false where a weight is not finite.
  template <class Ops>
  KTK_INLINE bool group_scale(const float *values, int first, int last, float *scale,
                              typename Ops::F &inverse) {
    typedef typename Ops::F F;
    typename Ops::I most = Ops::zero_i();
    for (int c = first; c < last; c++)
      most = larger_magnitude<Ops>(most, Ops::as_i(Ops::load_f(values + c * kPanelColumns)));
    if (Ops::reduce_max_i(most) >= kInfinityBits) return false;
    const F amax = Ops::as_f(most), zero = Ops::zero_f();
    const F exact = Ops::where_less(amax, Ops::set1_f(float_of_bits(kNegligibleBits)), zero,
                                    Ops::div(amax, Ops::set1_f(127.0f)));
    const F rounded = rounded_to_bf16<Ops>(exact);
    Ops::store_f(scale, rounded);
    inverse = Ops::where_less(zero, rounded, Ops::div(Ops::set1_f(1.0f), rounded), zero);
    return true;
  }
};
