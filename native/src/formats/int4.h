// 4-bit weights. Groups of 32, 64 or 128 input columns share a bf16 scale, and a zero point when
// asymmetric; or a whole output row shares an fp32 scale.
//
// Tile, 512 bytes for 16 output rows by 64 columns: [8 r][16 rows][4 i], the low nibble of a byte being
// column 4r + i and the high nibble column 32 + 4r + i. One load, one mask and one shift give two operand
// registers, and each nibble of a tile belongs to one group of 32.
//
// Symmetric: the value of largest magnitude becomes exactly -8, so that all 16 codes are used.
#pragma once

#include "formats/format.h"

struct Int4 {
  static constexpr const char *kName = "int4";
  static constexpr int kStepColumns = 64;
  static constexpr int kTileBytes = 512;
  static constexpr bool kInteger = true;
  static constexpr int kZeroPoint = 8;

  template <class Ops, int NT, int MR, int Halves>
  KTK_INLINE void step(typename Ops::I (&sum)[Halves][MR][NT], const uint8_t *rows, const uint8_t *tiles,
                       int64_t tile_stride_bytes) {
    for (int quad = 0; quad < 8; quad++) {
      typename Ops::I low[NT], high[NT];
      for (int j = 0; j < NT; j++) {
        const typename Ops::I bytes = Ops::load_i(tiles + j * tile_stride_bytes + quad * 64);
        low[j] = Ops::low_nibbles(bytes);
        high[j] = Ops::high_nibbles(bytes);
      }
      for (int r = 0; r < MR; r++) {
        const uint8_t *row = rows + r * kStepBytes + quad * 4;
        const typename Ops::I first = Ops::quad_u4(row), second = Ops::quad_u4(row + 32);
        for (int j = 0; j < NT; j++) {
          sum[0][r][j] = Ops::dot_u4s8(sum[0][r][j], low[j], first);
          sum[Halves - 1][r][j] = Ops::dot_u4s8(sum[Halves - 1][r][j], high[j], second);
        }
      }
    }
  }

  // Expands nibbles to bytes: quads 0-7 from the low ones, 8-15 from the high ones.
  template <class Ops>
  KTK_INLINE const uint8_t *tile_operand(const uint8_t *tile, uint8_t *scratch) {
    for (int quad = 0; quad < 8; quad++) {
      const typename Ops::I bytes = Ops::load_i(tile + quad * 64);
      Ops::store_i(scratch + quad * 64, Ops::low_nibbles(bytes));
      Ops::store_i(scratch + (quad + 8) * 64, Ops::high_nibbles(bytes));
    }
    return scratch;
  }

  struct Group {
    float scale, inverse;
    int32_t zero;
  };

  template <class Ops>
  KTK_INLINE float round_to_bf16(float value) {
    uint16_t halves[16];
    Ops::store_bf16(halves, Ops::set1_f(value));
    return float_of_bits((int32_t)((uint32_t)halves[0] << 16));
  }

  // The scale and zero point of values [first, last) of a row. Their magnitudes are finite.
  template <class Ops>
  KTK_INLINE Group group_of(const PackArgs *args, const void *row, int64_t first, int64_t last) {
    float low = 0.0f, high = 0.0f, extreme = 0.0f;
    for (int64_t i = first; i < last; i += 16) {
      float values[16];
      Ops::store_f(values, load_values<Ops>(row, args->dtype, i, last));
      for (int n = 0; n < 16; n++) {
        low = values[n] < low ? values[n] : low;
        high = values[n] > high ? values[n] : high;
        extreme = __builtin_fabsf(values[n]) > __builtin_fabsf(extreme) ? values[n] : extreme;
      }
    }
    const bool asymmetric = args->gemm->asymmetric != 0;
    float scale = asymmetric ? (high - low) / 15.0f : extreme / -8.0f;
    if (__builtin_fabsf(extreme) < float_of_bits(kNegligibleBits)) scale = 0.0f;
    if (args->gemm->scale_is_bf16) scale = round_to_bf16<Ops>(scale);
    if (scale == 0.0f) return {0.0f, 0.0f, asymmetric ? 0 : kZeroPoint};
    const float inverse = 1.0f / scale;
    int32_t zero = kZeroPoint;
    if (asymmetric) {
      zero = (int32_t)__builtin_rintf(-low * inverse);
      zero = zero < 0 ? 0 : zero > 15 ? 15 : zero;
    }
    return {scale, inverse, zero};
  }

  template <class Ops>
  static int32_t pack(const PackArgs *args) {
    const Gemm &gemm = *args->gemm;
    const bool per_row = gemm.weight_groups == 1 && !gemm.scale_is_bf16;
    for (int n = 0; n < kPanelColumns; n++) {
      const void *row = args->rows[n];
      if (row != nullptr &&
          largest_magnitude_bits<Ops>(row, args->dtype, 0, args->full_depth) >= kInfinityBits) {
        return 1;
      }
      Group group = {0.0f, 0.0f, gemm.asymmetric ? 0 : kZeroPoint};
      if (row != nullptr && per_row) group = group_of<Ops>(args, row, 0, args->full_depth);
      if (magnitude_bits(group.scale) >= kInfinityBits) return 1;
      if (per_row) __builtin_memcpy(args->scale + n * 4, &group.scale, 4);
      for (int64_t step = 0; step < gemm.steps; step++) {
        uint8_t codes[kStepColumns];
        for (int part = 0; part < kStepColumns; part += 32) {
          const int64_t column = step * kStepColumns + part;
          if (!per_row && column % gemm.group_columns == 0 && column < gemm.depth) {
            const int64_t end = column + gemm.group_columns;
            if (row != nullptr) {
              group = group_of<Ops>(args, row, args->first_column + column,
                                    args->first_column + (end < gemm.depth ? end : gemm.depth));
            }
            if (magnitude_bits(group.scale) >= kInfinityBits) return 1;
            const int64_t at = column / gemm.group_columns * args->group_stride + n;
            uint32_t bits;
            __builtin_memcpy(&bits, &group.scale, 4);
            const uint16_t half = (uint16_t)(bits >> 16);
            __builtin_memcpy(args->scale + at * 2, &half, 2);
            if (gemm.asymmetric) args->zero[at] = (uint8_t)group.zero;
          }
          for (int i = 0; i < 32; i += 16) {
            typename Ops::F scaled = Ops::zero_f();
            if (row != nullptr && column + i < gemm.depth) {
              scaled = Ops::mul(load_values<Ops>(row, args->dtype, args->first_column + column + i,
                                                 args->first_column + gemm.depth),
                                Ops::set1_f(group.inverse));
            }
            const float lowest = (float)-group.zero;
            scaled = Ops::min(Ops::set1_f(lowest + 15.0f), Ops::max(Ops::set1_f(lowest), scaled));
            Ops::store_low_bytes(codes + part + i, Ops::add_i(Ops::round_i(scaled), Ops::set1_i(group.zero)));
          }
        }
        for (int i = 0; i < 32; i++) codes[i] = (uint8_t)(codes[i] | codes[32 + i] << 4);
        scatter_quads(codes, 8, args->tiles + step * args->step_stride_bytes, n, 0);
      }
    }
    return 0;
  }
};
