// The product by matrix units.
//
// K is cut into blocks; inside a block, the panels into runs of up to 4 tiles. The weights of a run (expanded
// to bytes, for narrower formats) stay in the first-level cache while every tile of rows streams past them
// from the second level; what has been summed so far waits in `out`. So each weight is read from memory once
// a pass, and each tile of activations once a block, used for all panels of the pass:
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

struct TileState {
  [[maybe_unused]] TileFile file;
  int shaped_rows = 0;  // what the registers are configured for
  alignas(64) uint8_t expanded[kTileBlockSteps * kRunTiles][1024];
  alignas(64) int32_t sums[kRunTiles * kBlockRows * kPanelColumns];
};

// Adds the exact sums of a segment for a tile of rows: sums [NT][16][16], out [rows][NT][16].
template <class Ops, class Format, int NT, bool Asymmetric>
KTK_INLINE void add_tile_segment(const Product &p, int first_tile, int segment, int first_row, int rows,
                                 const int32_t *sums, float *out) {
  const Gemm &gemm = *p.gemm;
  const float *row_scale =
      p.rows.scale + (int64_t)first_row * gemm.row_groups + (segment >> gemm.row_group_shift);
  const int32_t *row_sum = p.rows.sum + (int64_t)first_row * gemm.segments + segment;
  for (int j = 0; j < NT; j++) {
    const SegmentScale<Ops> scale = segment_scale<Ops>(p, segment, first_tile + j);
    for (int64_t r = 0; r < rows; r++) {
      const int32_t sum_of_row = row_sum[r * gemm.segments];
      const typename Ops::I sum = Ops::add_i(Ops::load_i(sums + (j * kBlockRows + r) * kPanelColumns),
                                             segment_start<Ops, Format>(gemm, sum_of_row));
      add_scaled<Ops, Asymmetric>(scale, sum, row_scale[r * gemm.row_groups], sum_of_row,
                                  out + (r * NT + j) * kPanelColumns);
    }
  }
}

// Steps [step0, step0 + steps) of tiles [first_tile, first_tile + NT), for rows [first, last), which begin a
// block of rows, added to out: [last - first][NT][16]. The first block of K starts the sums.
template <class Ops, class Format, int NT>
static void tile_run(const Product &p, TileState &state, int first_tile, int step0, int steps, int first,
                     int last, float *out) {
  const Gemm &gemm = *p.gemm;
  const bool whole = gemm.segments == 1;  // sums of all of K stay in one accumulator
  const int halves = Format::kInteger ? gemm.halves : 1;
  const int depth_bytes = kStepBytes / halves;
  constexpr int64_t kRowFloats = NT * kPanelColumns;
  [[maybe_unused]] TileFile &file = state.file;
  const uint8_t *weights[kTileBlockSteps][NT];
  for (int s = 0; s < steps; s++) {
    for (int j = 0; j < NT; j++) {
      const uint8_t *tile = p.tiles + (step0 + s) * p.step_stride_bytes + p.tile_offset_bytes(first_tile + j);
      weights[s][j] = Format::template tile_operand<Ops>(tile, state.expanded[s * NT + j]);
    }
  }
  KTK_TILE_FENCE();
  if (!whole && step0 == 0) __builtin_memset(out, 0, (uint64_t)(last - first) * kRowFloats * sizeof(float));

  for (int row = first; row < last; row += kBlockRows) {
    const int rows = last - row < kBlockRows ? last - row : kBlockRows;
    if (rows != state.shaped_rows) {
      const TileConfig config = tile_shape(rows, depth_bytes);
      KTK_TILE_CONFIGURE(file, config);
      state.shaped_rows = rows;
    }
    const RowAddress address = row_address(p.rows.data, gemm, p.row_count, row);
    const uint8_t *data = address.data + step0 * address.step_stride_bytes;
    const uint8_t *ahead = data + (int64_t)kBlockRows * gemm.steps * kStepBytes;  // the next tile of rows
    float *target = out + (row - first) * kRowFloats;
    if (whole) {
      if (step0 == 0 && !p.accumulate) {
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
        KTK_TILE_STEP(4, data + s * address.step_stride_bytes, weights[s]);
        prefetch_tile(ahead + (int64_t)(s + 1) * kBlockRows * kStepBytes);
        KTK_TILE_STEP(5, data + (s + 1) * address.step_stride_bytes, weights[s + 1]);
      }
      if (s < steps) KTK_TILE_STEP(4, data + s * address.step_stride_bytes, weights[s]);
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
          const uint8_t *shifted[NT];
          for (int j = 0; j < NT; j++) shifted[j] = weights[step][j] + offset * kPanelColumns;
          KTK_TILE_STEP(4, data + step * address.step_stride_bytes + offset, shifted);
        }
        KTK_TILE_STORE(file, 0, state.sums, 64);
        if constexpr (NT > 1) KTK_TILE_STORE(file, 1, state.sums + 256, 64);
        if constexpr (NT > 2) KTK_TILE_STORE(file, 2, state.sums + 512, 64);
        if constexpr (NT > 3) KTK_TILE_STORE(file, 3, state.sums + 768, 64);
        if (gemm.asymmetric) {
          add_tile_segment<Ops, Format, NT, true>(p, first_tile, segment, row, rows, state.sums, target);
        } else {
          add_tile_segment<Ops, Format, NT, false>(p, first_tile, segment, row, rows, state.sums, target);
        }
        // A step of two halves is done after its second.
        if (halves == 1 || (segment - first_segment) % 2 == 1) s = stop;
      }
    }
  }
}

// The exact sums that tile_run left for a run whose K is one segment, scaled.
template <class Ops, class Format, int NT>
KTK_INLINE void scale_run(const Product &p, int first_tile, int first, int last, float *out) {
  for (int j = 0; j < NT; j++) {
    const SegmentScale<Ops> scale = segment_scale<Ops>(p, 0, first_tile + j);
    for (int row = first; row < last; row++) {
      float *target = out + ((row - first) * NT + j) * kPanelColumns;
      const typename Ops::I sum =
          Ops::add_i(Ops::load_i(target), segment_start<Ops, Format>(*p.gemm, p.rows.sum[row]));
      Ops::store_f(target, Ops::zero_f());
      if (p.gemm->asymmetric) {
        add_scaled<Ops, true>(scale, sum, p.rows.scale[row], p.rows.sum[row], target);
      } else {
        add_scaled<Ops, false>(scale, sum, p.rows.scale[row], p.rows.sum[row], target);
      }
    }
  }
}

// Tiles [0, tile_count) for rows [first, last), which begin a block of rows. out: runs of up to 4 tiles, each
// [last - first][tiles of the run][16].
template <class Ops, class Format>
static void tile_product(const Product &p, int tile_count, int first, int last, float *out) {
  const Gemm &gemm = *p.gemm;
  TileState state;
  const int64_t run_floats = (int64_t)(last - first) * kRunTiles * kPanelColumns;
  for (int step0 = 0; step0 < gemm.steps; step0 += kTileBlockSteps) {
    const int steps = least(gemm.steps - step0, kTileBlockSteps);
    for (int tile = 0; tile < tile_count; tile += kRunTiles) {
      float *sums = out + tile / kRunTiles * run_floats;
      switch (least(tile_count - tile, kRunTiles)) {
        case 1:
          tile_run<Ops, Format, 1>(p, state, tile, step0, steps, first, last, sums);
          break;
        case 2:
          tile_run<Ops, Format, 2>(p, state, tile, step0, steps, first, last, sums);
          break;
        case 3:
          tile_run<Ops, Format, 3>(p, state, tile, step0, steps, first, last, sums);
          break;
        default:
          tile_run<Ops, Format, 4>(p, state, tile, step0, steps, first, last, sums);
      }
    }
  }
  KTK_TILE_RELEASE(state.file);
  if constexpr (Format::kInteger) {
    if (gemm.segments > 1) return;
    for (int tile = 0; tile < tile_count; tile += kRunTiles) {
      float *sums = out + tile / kRunTiles * run_floats;
      switch (least(tile_count - tile, kRunTiles)) {
        case 1:
          scale_run<Ops, Format, 1>(p, tile, first, last, sums);
          break;
        case 2:
          scale_run<Ops, Format, 2>(p, tile, first, last, sums);
          break;
        case 3:
          scale_run<Ops, Format, 3>(p, tile, first, last, sums);
          break;
        default:
          scale_run<Ops, Format, 4>(p, tile, first, last, sums);
      }
    }
  }
}
#undef KTK_TILE_STEP
#undef KTK_TILE_DOT
