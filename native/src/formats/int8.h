// 8-bit weights, symmetric, one fp32 scale an output row: amax / 127. Stored as value + 128, because the
// dot products of VNNI and AMX take one unsigned operand and the activations are the signed one.
// Tile: [16 quads of columns][16 rows][4].
#pragma once

#include "formats/format.h"

struct Int8 {
  static constexpr const char *kName = "int8";
  static constexpr int kStepColumns = 64;
  static constexpr int kTileBytes = 1024;
  static constexpr bool kInteger = true;
  static constexpr int kZeroPoint = 128;

  template <class Ops, int NT, int MR, int Halves>
  KTK_INLINE void step(typename Ops::I (&sum)[Halves][MR][NT], const uint8_t *rows, const uint8_t *tiles,
                       int64_t tile_stride_bytes) {
    for (int quad = 0; quad < 16; quad++) {
      typename Ops::W8 weights[NT];
      for (int j = 0; j < NT; j++) weights[j] = Ops::split_u8(tiles + j * tile_stride_bytes + quad * 64);
      for (int r = 0; r < MR; r++) {
        const typename Ops::A8 activations = Ops::quad_s8(rows + r * kStepBytes + quad * 4);
        for (int j = 0; j < NT; j++) sum[0][r][j] = Ops::dot_u8s8(sum[0][r][j], weights[j], activations);
      }
    }
  }

  template <class Ops>
  KTK_INLINE const uint8_t *tile_operand(const uint8_t *tile, uint8_t *) {
    return tile;
  }

  template <class Ops>
  static int32_t pack(const PackArgs *args) {
    const Gemm &gemm = *args->gemm;
    for (int n = 0; n < kPanelColumns; n++) {
      Int8Scale scale = {0.0f, 0.0f};
      if (args->rows[n] != nullptr) {
        const int32_t amax_bits =
            largest_magnitude_bits<Ops>(args->rows[n], args->dtype, 0, args->full_depth);
        if (amax_bits >= kInfinityBits) return 1;
        scale = int8_scale(amax_bits);
      }
      __builtin_memcpy(args->scale + n * 4, &scale.scale, 4);
      const int64_t last = args->first_column + gemm.depth;
      for (int64_t i = 0; i < (int64_t)gemm.steps * kStepColumns; i += 16) {
        typename Ops::I values = Ops::zero_i();
        if (args->rows[n] != nullptr && i < gemm.depth) {
          values = Ops::round_i(
              Ops::mul(load_values<Ops>(args->rows[n], args->dtype, args->first_column + i, last),
                       Ops::set1_f(scale.inverse)));
        }
        uint8_t bytes[16];
        Ops::store_low_bytes(bytes, Ops::add_i(values, Ops::set1_i(kZeroPoint)));
        uint8_t *tile = args->tiles + i / kStepColumns * args->step_stride_bytes;
        scatter_quads(bytes, 4, tile, n, (int)(i % kStepColumns) / 4);
      }
    }
    return 0;
  }
};
