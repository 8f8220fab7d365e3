// e4m3 weights (OCP FP8: 4 bits of exponent with a bias of 7, 3 of mantissa, no infinities) with an fp32
// scale for every 128 columns of a row; in checkpoints the 128 rows of a block share theirs. The weight is
// code times scale, rounded to bf16, and everything behind that is the product of bf16 weights.
//
// Tile, 512 bytes for 16 output rows by 32 columns: [8 quads of columns][16 rows][4].
#pragma once

#include "formats/bf16.h"
#include "formats/format.h"

struct Fp8 {
  static constexpr const char *kName = "fp8";
  static constexpr int kStepColumns = 32;
  static constexpr int kTileBytes = 512;
  static constexpr bool kInteger = false;
  static constexpr bool kFactors = false;
  static constexpr bool kExpands = true;
  static constexpr bool kScaledToBf16 = true;
  static constexpr int kZeroPoint = 0;
  static constexpr Multiply kMultiply = Multiply::bf16;
  static constexpr float kLargest = 448.0f;
  static constexpr int32_t kBiasOfCodes = (127 - 7) * 8;  // of an fp32's exponent and 3 bits of mantissa
  static constexpr int kStepsOfScale = kScaleBlock / kStepColumns;

  // The values of codes in the top bytes of lanes. Four bits further down, exponent and mantissa are those of
  // an fp32 that lacks a bias of 120, codes below 2^-6 being subnormal; the product is exact.
  template <class Ops>
  KTK_INLINE typename Ops::F decode(typename Ops::I codes) {
    const typename Ops::I bits =
        Ops::and_i(Ops::shift_right_signed(codes, 4), Ops::set1_i((int32_t)0x87f00000));
    return Ops::mul(Ops::as_f(bits), Ops::set1_f(0x1p120f));
  }

  // Columns 2 `pair` and 2 `pair` + 1 of the 16 rows, before the scale.
  template <class Ops>
  KTK_INLINE void columns(const uint8_t *tile, int pair, const uint8_t *, typename Ops::F *even,
                          typename Ops::F *odd) {
    const typename Ops::I quads = Ops::load_i(tile + pair / 2 * 64);
    if (pair % 2 == 0) {
      *even = decode<Ops>(Ops::shift_left_i(quads, 24));
      *odd = decode<Ops>(Ops::shift_left_i(quads, 16));
    } else {
      *even = decode<Ops>(Ops::shift_left_i(quads, 8));
      *odd = decode<Ops>(quads);
    }
  }

  // The bf16 tile that a tile with these scales of its 16 rows stands for.
  template <class Ops>
  KTK_INLINE void expand_tile(const uint8_t *tile, typename Ops::F scale, uint8_t *operand) {
    for (int pair = 0; pair < rolled(16); pair += 2) {
      for (int i = 0; i < 2; i++) {
        typename Ops::F even, odd;
        columns<Ops>(tile + pair / 2 * 64, i, nullptr, &even, &odd);
        Ops::store_i(operand + (pair + i) * 64, Ops::join_bf16(Ops::mul(even, scale), Ops::mul(odd, scale)));
      }
    }
  }

  // Codes of values within +-448, to nearest, ties to even; NaN is not expected.
  template <class Ops>
  KTK_INLINE typename Ops::I encode(typename Ops::F values) {
    typedef typename Ops::I I;
    const I bits = Ops::as_i(values);
    const I magnitude = Ops::and_i(bits, Ops::set1_i(0x7fffffff));
    const I odd = Ops::and_i(Ops::shift_right_i(magnitude, 20), Ops::set1_i(1));
    const I rounded = Ops::add_i(magnitude, Ops::add_i(odd, Ops::set1_i(0x7ffff)));
    const I normal = Ops::sub_i(Ops::shift_right_i(rounded, 20), Ops::set1_i(kBiasOfCodes));
    // Below 2^-6 codes count steps of 2^-9, and code 8 is 2^-6; normal codes are smaller there, larger above.
    const typename Ops::F steps = Ops::mul(Ops::as_f(magnitude), Ops::set1_f(512.0f));
    const I subnormal = Ops::round_i(Ops::min(Ops::set1_f(8.0f), steps));
    const I sign = Ops::and_i(Ops::shift_right_i(bits, 24), Ops::set1_i(0x80));
    return Ops::add_i(Ops::max_i(normal, subnormal), sign);
  }

  // Whether 448 times the scale is a finite bf16.
  KTK_INLINE bool usable(float scale) { return magnitude_bits(scale * kLargest) < Bf16::kRoundsToInfinity; }

  template <class Ops>
  static int32_t pack(const PackArgs *args) {
    const Gemm &gemm = *args->gemm;
    if (args->block_scale != nullptr) return pack_codes(args);
    if (PanelSurvey<Ops>(args, kLoadColumns).largest >= kInfinityBits) return 1;
    const int64_t end = (int64_t)gemm.steps * kStepColumns;
    for (int64_t first = 0; first < end; first += kScaleBlock) {
      alignas(64) float columns[kScaleBlock * kPanelColumns];
      typename Ops::I largest = Ops::zero_i();
      for (int c = 0; c < kScaleBlock; c += kLoadColumns)
        load_columns<Ops>(args, first + c, columns + c * kPanelColumns);
      for (int c = 0; c < kScaleBlock; c++) {
        const typename Ops::I value = Ops::as_i(Ops::load_f(columns + c * 16));
        largest = Ops::max_i(largest, Ops::and_i(value, Ops::set1_i(0x7fffffff)));
      }
      int32_t magnitudes[kPanelColumns];
      Ops::store_i(magnitudes, largest);
      float scale[kPanelColumns], inverse[kPanelColumns];
      for (int n = 0; n < kPanelColumns; n++) {
        const bool negligible = magnitudes[n] < kNegligibleBits;
        const float amax = float_of_bits(magnitudes[n]);
        scale[n] = negligible ? 0.0f : amax / kLargest;
        inverse[n] = negligible ? 0.0f : kLargest / amax;
        if (!usable(scale[n])) return 1;
      }
      store_scales(args, first, scale);
      const typename Ops::F by = Ops::load_f(inverse);
      const typename Ops::F least = Ops::set1_f(-kLargest), most = Ops::set1_f(kLargest);
      for (int c = 0; c < kScaleBlock && first + c < end; c += 4) {
        typename Ops::I codes[4];
        for (int i = 0; i < 4; i++) {
          const typename Ops::F scaled = Ops::mul(Ops::load_f(columns + (c + i) * 16), by);
          codes[i] = encode<Ops>(Ops::min(most, Ops::max(least, scaled)));
        }
        uint8_t *tile = args->tiles + (first + c) / kStepColumns * args->step_stride_bytes;
        Ops::store_i(tile + (first + c) % kStepColumns / 4 * 64, tile_line<Ops>(codes));
      }
    }
    return 0;
  }

  KTK_INLINE void store_scales(const PackArgs *args, int64_t first, const float *scale) {
    __builtin_memcpy(args->scale + first / kScaleBlock * args->group_stride * 4, scale, kPanelColumns * 4);
  }

  // Rows that are codes, with their scales.
  static int32_t pack_codes(const PackArgs *args) {
    const Gemm &gemm = *args->gemm;
    for (int64_t first = 0; first < gemm.depth; first += kScaleBlock) {
      float scale[kPanelColumns] = {};
      const float given = args->block_scale[(args->first_column + first) / kScaleBlock];
      if (!usable(given)) return 1;
      for (int n = 0; n < kPanelColumns; n++) scale[n] = args->rows[n] != nullptr ? given : 0.0f;
      store_scales(args, first, scale);
    }
    for (int64_t column = 0; column < (int64_t)gemm.steps * kStepColumns; column += 4) {
      uint8_t *line =
          args->tiles + column / kStepColumns * args->step_stride_bytes + column % kStepColumns * 16;
      const int64_t left = gemm.depth - column;
      for (int n = 0; n < kPanelColumns; n++) {
        uint8_t codes[4] = {};
        if (args->rows[n] != nullptr && left > 0) {
          const uint8_t *from = (const uint8_t *)args->rows[n] + args->first_column + column;
          for (int i = 0; i < (left < 4 ? left : 4); i++) {
            if ((from[i] & 0x7f) == 0x7f) return 1;
            codes[i] = from[i];
          }
        }
        __builtin_memcpy(line + n * 4, codes, 4);
      }
    }
    return 0;
  }
};
