// The product by matrix units, for up to 4 panels of 16 columns.
//
// K is cut into blocks whose weight tiles (expanded to bytes, for narrower formats) fill about half of the
// first-level cache of a hyper-thread. A block stays there while every tile of rows streams past it from the
// second level; what has been summed so far waits in `out`. So each weight is read from memory once a call,
// each tile of activations once for NT products, and the accumulators once a block:
//
//   registers 0-3  accumulators, 16 rows by 16 columns each
//             4-5  activations, by turns
//             6-7  weights, by turns
#pragma once

#include "kernels/product.h"

// Shapes the tiles for `rows` rows and operands of `depth_bytes` along K.
KTK_INLINE TileConfig tile_shape(int rows, int depth_bytes) {
  TileConfig config;
  for (int i = 0; i < 4; i++) {
    config.rows[i] = (uint8_t)rows;
    config.row_bytes[i] = kPanelColumns * 4;
  }
  for (int i = 4; i < 6; i++) {
    config.rows[i] = (uint8_t)rows;
    config.row_bytes[i] = (uint16_t)depth_bytes;
  }
  for (int i = 6; i < 8; i++) {
    config.rows[i] = (uint8_t)(depth_bytes / 4);
    config.row_bytes[i] = kPanelColumns * 4;
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

// One step: a tile of rows in register `a` times NT tiles of weights.
#define KTK_TILE_STEP(a, rows_address, weights)                                  \
  do {                                                                           \
    KTK_TILE_LOAD(file, 6, (weights)[0], 64);                                    \
    KTK_TILE_LOAD(file, a, rows_address, kStepBytes);                            \
    if constexpr (NT > 1) KTK_TILE_LOAD(file, 7, (weights)[NT > 1 ? 1 : 0], 64); \
    KTK_TILE_DOT(file, 0, a, 6);                                                 \
    if constexpr (NT > 2) KTK_TILE_LOAD(file, 6, (weights)[NT > 2 ? 2 : 0], 64); \
    if constexpr (NT > 1) KTK_TILE_DOT(file, 1, a, 7);                           \
    if constexpr (NT > 3) KTK_TILE_LOAD(file, 7, (weights)[NT > 3 ? 3 : 0], 64); \
    if constexpr (NT > 2) KTK_TILE_DOT(file, 2, a, 6);                           \
    if constexpr (NT > 3) KTK_TILE_DOT(file, 3, a, 7);                           \
  } while (0)

KTK_INLINE void prefetch_tile(const uint8_t *tile) {
  for (int line = 0; line < 16; line++) __builtin_prefetch(tile + line * 64, 0, 3);
}

// The tiles of one block of K as operands.
template <int NT>
struct WeightBlock {
  const uint8_t *tiles[kTileBlockSteps][NT];
};

template <class Ops, class Format, int NT>
KTK_INLINE void operands(const Product &p, int first_step, int steps, uint8_t *expanded,
                         WeightBlock<NT> *block) {
  for (int s = 0; s < steps; s++) {
    for (int j = 0; j < NT; j++) {
      const uint8_t *tile = p.tiles + (first_step + s) * p.step_stride_bytes + p.tile_offset_bytes(j);
      block->tiles[s][j] = Format::template tile_operand<Ops>(tile, expanded + (s * NT + j) * 1024);
    }
  }
}

// Adds the exact sums of a segment for a tile of rows: sums [NT][16][16], out [rows][NT][16].
template <class Ops, class Format, int NT>
KTK_INLINE void add_tile_segment(const Product &p, int segment, int first_row, int rows, const int32_t *sums,
                                 float *out) {
  const Gemm &gemm = *p.gemm;
  const int64_t row_group = segment / gemm.segments_per_row_group;
  for (int j = 0; j < NT; j++) {
    const SegmentScale<Ops> scale = segment_scale<Ops>(p, segment, j);
    for (int r = 0; r < rows; r++) {
      const int64_t row = first_row + r;
      add_scaled<Ops, Format>(gemm, scale, Ops::load_i(sums + (j * kBlockRows + r) * kPanelColumns),
                              p.rows.scale[row * gemm.row_groups + row_group],
                              p.rows.sum[row * gemm.segments + segment], out + (r * NT + j) * kPanelColumns);
    }
  }
}

// Rows [first, last), beginning a block of rows. out: [last - first][NT][16].
template <class Ops, class Format, int NT>
static void tile_product(const Product &p, int first, int last, float *out) {
  const Gemm &gemm = *p.gemm;
  const bool whole = gemm.segments == 1;  // sums of all of K stay in one accumulator
  const int halves = Format::kInteger ? gemm.halves : 1;
  const int depth_bytes = kStepBytes / halves;
  constexpr int64_t kRowFloats = NT * kPanelColumns;

  [[maybe_unused]] TileFile file;
  alignas(64) uint8_t expanded[Format::kTileBytes < 1024 ? kTileBlockSteps * NT * 1024 : 64];
  alignas(64) int32_t sums[NT * kBlockRows * kPanelColumns];
  WeightBlock<NT> block;
  int shaped_rows = 0;

  if (!whole) __builtin_memset(out, 0, (uint64_t)(last - first) * kRowFloats * sizeof(float));
  for (int step0 = 0; step0 < gemm.steps; step0 += kTileBlockSteps) {
    const int steps = gemm.steps - step0 < kTileBlockSteps ? gemm.steps - step0 : kTileBlockSteps;
    operands<Ops, Format, NT>(p, step0, steps, expanded, &block);
    KTK_TILE_FENCE();
    for (int row = first; row < last; row += kBlockRows) {
      const int rows = last - row < kBlockRows ? last - row : kBlockRows;
      if (rows != shaped_rows) {
        const TileConfig config = tile_shape(rows, depth_bytes);
        KTK_TILE_CONFIGURE(file, config);
        shaped_rows = rows;
      }
      const RowAddress address = row_address(p.rows.data, gemm, p.row_count, row);
      const uint8_t *data = address.data + step0 * address.step_stride_bytes;
      // The next tile of rows, or the first one of the next block of K.
      const uint8_t *ahead = row + kBlockRows < last
                                 ? data + (int64_t)kBlockRows * gemm.steps * kStepBytes
                                 : row_address(p.rows.data, gemm, p.row_count, first).data +
                                       (int64_t)(step0 + steps) * kBlockRows * kStepBytes;
      float *target = out + (row - first) * kRowFloats;
      if (whole) {
        if (step0 == 0) {
          KTK_TILE_ZERO(file, 0);
          if constexpr (NT > 1) KTK_TILE_ZERO(file, 1);
          if constexpr (NT > 2) KTK_TILE_ZERO(file, 2);
          if constexpr (NT > 3) KTK_TILE_ZERO(file, 3);
        } else {
          KTK_TILE_LOAD(file, 0, target, kRowFloats * 4);
          if constexpr (NT > 1) KTK_TILE_LOAD(file, 1, target + kPanelColumns, kRowFloats * 4);
          if constexpr (NT > 2) KTK_TILE_LOAD(file, 2, target + 2 * kPanelColumns, kRowFloats * 4);
          if constexpr (NT > 3) KTK_TILE_LOAD(file, 3, target + 3 * kPanelColumns, kRowFloats * 4);
        }
        int s = 0;
        for (; s + 2 <= steps; s += 2) {
          prefetch_tile(ahead + (int64_t)s * kBlockRows * kStepBytes);
          KTK_TILE_STEP(4, data + s * address.step_stride_bytes, block.tiles[s]);
          prefetch_tile(ahead + (int64_t)(s + 1) * kBlockRows * kStepBytes);
          KTK_TILE_STEP(5, data + (s + 1) * address.step_stride_bytes, block.tiles[s + 1]);
        }
        if (s < steps) KTK_TILE_STEP(4, data + s * address.step_stride_bytes, block.tiles[s]);
        KTK_TILE_STORE(file, 0, target, kRowFloats * 4);
        if constexpr (NT > 1) KTK_TILE_STORE(file, 1, target + kPanelColumns, kRowFloats * 4);
        if constexpr (NT > 2) KTK_TILE_STORE(file, 2, target + 2 * kPanelColumns, kRowFloats * 4);
        if constexpr (NT > 3) KTK_TILE_STORE(file, 3, target + 3 * kPanelColumns, kRowFloats * 4);
        continue;
      }
      if constexpr (Format::kInteger) {
        const int first_segment = step0 / gemm.segment_steps * halves;
        for (int s = 0, segment = first_segment; s < steps && segment < gemm.segments; segment++) {
          const int64_t offset = (segment - first_segment) % halves * depth_bytes;
          const int stop = s + gemm.segment_steps < steps ? s + gemm.segment_steps : steps;
          KTK_TILE_ZERO(file, 0);
          if constexpr (NT > 1) KTK_TILE_ZERO(file, 1);
          if constexpr (NT > 2) KTK_TILE_ZERO(file, 2);
          if constexpr (NT > 3) KTK_TILE_ZERO(file, 3);
          for (int step = s; step < stop; step++) {
            const uint8_t *weights[NT];
            for (int j = 0; j < NT; j++) weights[j] = block.tiles[step][j] + offset * kPanelColumns;
            KTK_TILE_STEP(4, data + step * address.step_stride_bytes + offset, weights);
          }
          KTK_TILE_STORE(file, 0, sums, 64);
          if constexpr (NT > 1) KTK_TILE_STORE(file, 1, sums + 256, 64);
          if constexpr (NT > 2) KTK_TILE_STORE(file, 2, sums + 512, 64);
          if constexpr (NT > 3) KTK_TILE_STORE(file, 3, sums + 768, 64);
          add_tile_segment<Ops, Format, NT>(p, segment, row, rows, sums, target);
          // A step of two halves is done after its second.
          if (halves == 1 || (segment - first_segment) % 2 == 1) s = stop;
        }
      }
    }
  }
  KTK_TILE_RELEASE(file);

  if constexpr (Format::kInteger) {
    if (!whole) return;
    for (int r = 0; r < last - first; r++) {
      for (int j = 0; j < NT; j++) {
        float *target = out + r * kRowFloats + j * kPanelColumns;
        const typename Ops::I sum = Ops::load_i(target);
        Ops::store_f(target, Ops::zero_f());
        add_scaled<Ops, Format>(gemm, segment_scale<Ops>(p, 0, j), sum, p.rows.scale[first + r],
                                p.rows.sum[first + r], target);
      }
    }
  }
}
#undef KTK_TILE_STEP
#undef KTK_TILE_DOT
