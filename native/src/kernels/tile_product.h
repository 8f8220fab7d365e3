// The product by matrix units: two tiles of rows by NT tiles of columns in accumulators 0-3, operands in
// 4 and 5 (activations) and 6 and 7 (weights).
#pragma once

#include "kernels/product.h"

// Shapes the tiles for two blocks of rows and operands of `depth_bytes` along K.
KTK_INLINE TileConfig tile_shape(int first_rows, int second_rows, int depth_bytes) {
  TileConfig config;
  const int rows[2] = {first_rows, second_rows > 0 ? second_rows : first_rows};
  for (int i = 0; i < 2; i++) {
    for (int j = 0; j < 2; j++) {
      config.rows[2 * i + j] = (uint8_t)rows[i];
      config.row_bytes[2 * i + j] = kPanelColumns * 4;
    }
    config.rows[4 + i] = (uint8_t)rows[i];
    config.row_bytes[4 + i] = (uint16_t)depth_bytes;
    config.rows[6 + i] = (uint8_t)(depth_bytes / 4);
    config.row_bytes[6 + i] = kPanelColumns * 4;
  }
  return config;
}

#define KTK_TILE_DOT(file, sum, a, b)     \
  do {                                    \
    if constexpr (Format::kInteger) {     \
      KTK_TILE_DOT_S8U8(file, sum, a, b); \
    } else {                              \
      KTK_TILE_DOT_BF16(file, sum, a, b); \
    }                                     \
  } while (0)

// Rows [first, last), at most kGroupRows of them, beginning a block. out: [last - first][NT][16].
template <class Ops, class Format, int NT>
static void tile_product(const Product &p, int first, int last, float *out) {
  const Gemm &gemm = *p.gemm;
  const int count = last - first;
  const int first_rows = count < kBlockRows ? count : kBlockRows;
  const int second_rows = count - first_rows;
  const RowAddress one = row_address(p.rows.data, gemm, p.row_count, first);
  const RowAddress two =
      second_rows > 0 ? row_address(p.rows.data, gemm, p.row_count, first + kBlockRows) : one;
  const int halves = Format::kInteger ? gemm.halves : 1;

  [[maybe_unused]] TileFile file;
  const TileConfig config = tile_shape(first_rows, second_rows, kStepBytes / halves);
  KTK_TILE_CONFIGURE(file, config);
  alignas(64) uint8_t expanded[2][1024];
  alignas(64) int32_t sums[2][NT][kBlockRows][kPanelColumns];

  if constexpr (Format::kInteger) {
    for (int i = 0; i < count * NT; i++) Ops::store_f(out + i * kPanelColumns, Ops::zero_f());
  }
  for (int segment = 0; segment < gemm.segments; segment++) {
    const int start = halves == 2 ? segment / 2 : segment * gemm.segment_steps;
    const int stop = start + gemm.segment_steps < gemm.steps ? start + gemm.segment_steps : gemm.steps;
    const int half = halves == 2 ? segment % 2 : -1;
    const int64_t half_offset = half == 1 ? kStepBytes / 2 : 0;
    KTK_TILE_ZERO(file, 0);
    KTK_TILE_ZERO(file, 1);
    KTK_TILE_ZERO(file, 2);
    KTK_TILE_ZERO(file, 3);
    for (int step = start; step < stop; step++) {
      const uint8_t *tile = p.tiles + step * p.step_stride_bytes;
      const uint8_t *left = Format::template tile_operand<Ops>(tile, expanded[0], half);
      KTK_TILE_FENCE();
      KTK_TILE_LOAD(file, 4, one.data + step * one.step_stride_bytes + half_offset, kStepBytes);
      KTK_TILE_LOAD(file, 6, left, 64);
      KTK_TILE_DOT(file, 0, 4, 6);
      if constexpr (NT == 2) {
        const uint8_t *right =
            Format::template tile_operand<Ops>(tile + p.tile_stride_bytes, expanded[1], half);
        KTK_TILE_FENCE();
        KTK_TILE_LOAD(file, 7, right, 64);
        KTK_TILE_DOT(file, 1, 4, 7);
      }
      if (second_rows > 0) {
        KTK_TILE_LOAD(file, 5, two.data + step * two.step_stride_bytes + half_offset, kStepBytes);
        KTK_TILE_DOT(file, 2, 5, 6);
        if constexpr (NT == 2) KTK_TILE_DOT(file, 3, 5, 7);
      }
    }
    KTK_TILE_STORE(file, 0, sums[0][0], 64);
    if constexpr (NT == 2) KTK_TILE_STORE(file, 1, sums[0][NT - 1], 64);
    if (second_rows > 0) {
      KTK_TILE_STORE(file, 2, sums[1][0], 64);
      if constexpr (NT == 2) KTK_TILE_STORE(file, 3, sums[1][NT - 1], 64);
    }
    for (int r = 0; r < count; r++) {
      float *target = out + r * NT * kPanelColumns;
      if constexpr (Format::kInteger) {
        typename Ops::I row[NT];
        for (int j = 0; j < NT; j++) row[j] = Ops::load_i(sums[r / kBlockRows][j][r % kBlockRows]);
        add_segment<Ops, Format, NT>(p, segment, first + r, row, target);
      } else {
        for (int j = 0; j < NT; j++) {
          Ops::store_i(target + j * kPanelColumns, Ops::load_i(sums[r / kBlockRows][j][r % kBlockRows]));
        }
      }
    }
  }
  KTK_TILE_RELEASE(file);
}
#undef KTK_TILE_DOT
