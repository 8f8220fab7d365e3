// The product by matrix units.
//
// K is cut into blocks. Within one, a panel of up to 4 tiles of rows stays in the first-level cache while the
// weights stream past it, one tile at a time, each used for all rows of the panel; what has been summed so
// far waits in `out`. Tiles are loaded once for every 1.25 products where a panel is whole, and each comes
// from the second-level cache or nearer.
//
// Registers 0-3 hold sums, 4 the rows, 5 the weights. Of the others only 6 is ever used, for a block of fewer
// than 16 rows: where two hyper-threads share a core, registers that hold nothing are what the processor
// renames the others into, and a loop that loads tiles runs 1.6 times as fast with 6 registers as with 8
// (docs/benchmarks/log.md).
#pragma once

#include "kernels/product.h"

#define KTK_TILE_DOT(file, sum, a, b)     \
  do {                                    \
    if constexpr (Format::kInteger) {     \
      KTK_TILE_DOT_S8U8(file, sum, a, b); \
    } else {                              \
      KTK_TILE_DOT_BF16(file, sum, a, b); \
    }                                     \
  } while (0)

// Statements for each of COUNT accumulators; `number` must be a literal in them.
#define KTK_TILE_EACH(COUNT, STATEMENT)      \
  do {                                       \
    STATEMENT(0);                            \
    if constexpr ((COUNT) > 1) STATEMENT(1); \
    if constexpr ((COUNT) > 2) STATEMENT(2); \
    if constexpr ((COUNT) > 3) STATEMENT(3); \
  } while (0)

constexpr int kSumTileFloats = kBlockRows * kPanelColumns;

KTK_INLINE void prefetch_near(const uint8_t *tile) {
  for (int line = 0; line < 16; line++) __builtin_prefetch(tile + line * 64, 0, 3);
}
KTK_INLINE void prefetch_far(const uint8_t *tile) {
  for (int line = 0; line < 16; line++) __builtin_prefetch(tile + line * 64, 0, 2);
}

// The scales of a panel's rows in one segment, and what their sums start from.
struct SegmentRows {
  alignas(64) float scale[kTileBlocks * kBlockRows];
  alignas(64) int32_t start[kTileBlocks * kBlockRows];
};

struct TileState {
  [[maybe_unused]] TileFile file;
  // What the registers are configured for.
  int blocks = 0, last_rows = 0, depth_bytes = 0;
  // Operands of one block of K, where weights are not stored as such: [tile][step].
  alignas(64) uint8_t expanded[kMostTiles * kTileBlockSteps][1024];
  alignas(64) int32_t sums[2][kTileBlocks * kSumTileFloats];
  SegmentRows segment_rows[2 * kTileBlockSteps];
};

// A panel of rows: `blocks` blocks of 16, the last of `last_rows`.
struct TilePanel {
  int first_row, blocks, last_rows;
};

// A block of K.
struct TileSteps {
  int first, count;
};

// The operands that will be needed after those of a panel.
struct TilesAhead {
  const uint8_t *rows;      // of the next panel, or null
  int64_t row_block_bytes;  // from one block of rows to the next
  int row_blocks;
  bool weights;  // of the next block of K
};

// Registers for the rows of a panel (`sums` tiles of them) and operands of `depth_bytes` along K.
KTK_INLINE void shape_tiles(TileState &state, int blocks, int last_rows, int depth_bytes) {
  if (state.blocks == blocks && state.last_rows == last_rows && state.depth_bytes == depth_bytes) return;
  [[maybe_unused]] TileFile &file = state.file;
  TileConfig config;
  const auto shape = [&](int number, int rows, int row_bytes) {
    config.rows[number] = (uint8_t)rows;
    config.row_bytes[number] = (uint16_t)row_bytes;
  };
  for (int i = 0; i < blocks; i++) shape(i, i == blocks - 1 ? last_rows : kBlockRows, kPanelColumns * 4);
  shape(4, kBlockRows, depth_bytes);
  shape(5, depth_bytes / 4, kPanelColumns * 4);
  shape(6, last_rows, depth_bytes);
  KTK_TILE_CONFIGURE(file, config);
  state.blocks = blocks;
  state.last_rows = last_rows;
  state.depth_bytes = depth_bytes;
}

// Weights of one tile in a block of K.
struct TileColumn {
  const uint8_t *data;
  int64_t step_stride_bytes;
};

template <class Format>
KTK_INLINE TileColumn tile_column(const Product &p, const TileState &state, int tile, int step0) {
  if constexpr (Format::kExpands) return {state.expanded[tile * kTileBlockSteps], 1024};
  return {p.tiles + p.tile_offset_bytes(tile) + step0 * p.step_stride_bytes, p.step_stride_bytes};
}

// Where the sums of a tile of columns for a block of rows lie: [block][tile][16][16].
KTK_INLINE float *tile_sums(float *out, int block, int tile_count, int tile) {
  return out + ((int64_t)block * tile_count + tile) * kSumTileFloats;
}

template <class Format>
KTK_INLINE void load_segment_rows(const Product &p, int segment, int first_row, int rows, SegmentRows &to) {
  const Gemm &gemm = *p.gemm;
  const float *scale =
      p.rows.scale + (int64_t)first_row * gemm.row_groups + (segment >> gemm.row_group_shift);
  const int32_t *sum = p.rows.sum + (int64_t)first_row * gemm.sums + segment;
  for (int r = 0; r < rows; r++) {
    to.scale[r] = scale[(int64_t)r * gemm.row_groups];
    to.start[r] = segment_start<Format>(sum[(int64_t)r * gemm.sums]);
  }
}

// Adds the exact sums of a segment, [rows][16], to the rows' outputs for one tile of columns; `out_stride`
// floats from one block of rows to the next.
template <class Ops, bool Grouped>
KTK_INLINE void add_tile_segment(const Product &p, int tile, int segment, const SegmentRows &of, int rows,
                                 const int32_t *sums, float *out, int64_t out_stride) {
  const typename Ops::F scale = Grouped ? weight_scale<Ops>(p, segment, tile) : Ops::zero_f();
  for (int block = 0; block < rows; block += kBlockRows, out += out_stride) {
    const int stop = least(rows - block, kBlockRows);
    for (int r = 0; r < stop; r++) {
      const typename Ops::I sum =
          Ops::add_i(Ops::load_i(sums + (block + r) * kPanelColumns), Ops::set1_i(of.start[block + r]));
      add_scaled<Ops, Grouped>(scale, sum, of.scale[block + r], out + r * kPanelColumns);
    }
  }
}

// One block of K, MT blocks of rows, every tile of columns. Partial: the last block has fewer than 16 rows.
template <class Ops, class Format, int MT, bool Partial>
static void tile_panel(const Product &p, TileState &state, int tile_count, const TileSteps &k,
                       const TilePanel &panel, const TilesAhead &ahead, float *out) {
  const Gemm &gemm = *p.gemm;
  [[maybe_unused]] TileFile &file = state.file;
  const int step0 = k.first, steps = k.count;
  const bool whole = gemm.segments == 1;
  const int halves = Format::kInteger ? gemm.halves : 1;
  const int64_t out_stride = (int64_t)tile_count * kSumTileFloats;
  shape_tiles(state, MT, Partial ? panel.last_rows : kBlockRows, kStepBytes / halves);
  const uint8_t *rows[MT];
  int64_t row_stride[MT];
  for (int i = 0; i < MT; i++) {
    const RowAddress address = row_address(p.rows.data, gemm, p.row_count, panel.first_row + i * kBlockRows);
    rows[i] = address.data + step0 * address.step_stride_bytes;
    row_stride[i] = address.step_stride_bytes;
  }
  const int count = (MT - 1) * kBlockRows + panel.last_rows;
  const int first_segment = step0 / gemm.segment_steps * halves;
  if (!whole) {
    const int last_segment =
        least(gemm.segments, (step0 + steps + gemm.segment_steps - 1) / gemm.segment_steps * halves);
    for (int i = first_segment; i < last_segment; i++)
      load_segment_rows<Format>(p, i, panel.first_row, count, state.segment_rows[i - first_segment]);
  }
  // Each step of a tile fetches its share of the lines of the next panel's rows.
  const int lines = ahead.rows == nullptr ? 0 : (ahead.row_blocks * 16 + tile_count - 1) / tile_count;
#define KTK_FETCH()                                                                                        \
  do {                                                                                                     \
    const int soon = step + 2;                                                                             \
    prefetch_near(soon < steps ? column.data + soon * column.step_stride_bytes                             \
                               : next.data + (soon - steps) * next.step_stride_bytes);                     \
    if (ahead.weights) prefetch_far(column.data + (steps + step) * column.step_stride_bytes);              \
    for (int line = tile * lines; line < tile * lines + lines; line++)                                     \
      __builtin_prefetch(ahead.rows + line / 16 * ahead.row_block_bytes + step * 1024 + line % 16 * 64, 0, \
                         2);                                                                               \
  } while (0)
#define KTK_ZERO(i) KTK_TILE_ZERO(file, i)
#define KTK_LOAD_SUM(i) KTK_TILE_LOAD(file, i, target + (i) * out_stride, 64)
#define KTK_STORE_SUM(i) KTK_TILE_STORE(file, i, target + (i) * out_stride, 64)
#define KTK_STORE_EXACT(i) KTK_TILE_STORE(file, i, exact + (i) * kSumTileFloats, 64)
#define KTK_MULTIPLY(i)                                                            \
  do {                                                                             \
    if constexpr (Partial && (i) == MT - 1) {                                      \
      KTK_TILE_LOAD(file, 6, rows[i] + step * row_stride[i] + offset, kStepBytes); \
      KTK_TILE_DOT(file, i, 6, 5);                                                 \
    } else {                                                                       \
      KTK_TILE_LOAD(file, 4, rows[i] + step * row_stride[i] + offset, kStepBytes); \
      KTK_TILE_DOT(file, i, 4, 5);                                                 \
    }                                                                              \
  } while (0)
  for (int tile = 0; tile < tile_count; tile++) {
    const TileColumn column = tile_column<Format>(p, state, tile, step0);
    const TileColumn next = tile_column<Format>(p, state, tile + 1 < tile_count ? tile + 1 : tile, step0);
    float *target = out + (int64_t)tile * kSumTileFloats;
    if (whole) {
      constexpr int64_t offset = 0;
      if (step0 == 0 && !p.accumulate) {
        KTK_TILE_EACH(MT, KTK_ZERO);
      } else {
        KTK_TILE_EACH(MT, KTK_LOAD_SUM);
      }
      for (int step = 0; step < steps; step++) {
        KTK_FETCH();
        KTK_TILE_LOAD(file, 5, column.data + step * column.step_stride_bytes, 64);
        KTK_TILE_EACH(MT, KTK_MULTIPLY);
      }
      KTK_TILE_EACH(MT, KTK_STORE_SUM);
      continue;
    }
    if constexpr (Format::kInteger) {
      const auto add = [&](int segment) {
        const int32_t *sums = state.sums[segment % 2];
        const SegmentRows &of = state.segment_rows[segment - first_segment];
        if (gemm.scale_is_bf16) {
          add_tile_segment<Ops, true>(p, tile, segment, of, count, sums, target, out_stride);
        } else {
          add_tile_segment<Ops, false>(p, tile, segment, of, count, sums, target, out_stride);
        }
      };
      if (step0 == 0) {
        for (int i = 0; i < MT; i++) __builtin_memset(target + i * out_stride, 0, kSumTileFloats * 4);
      }
      // While the unit works on one segment, the sums of the one before are scaled.
      int segment = first_segment;
      for (int first = 0; first < steps && segment < gemm.segments; segment++) {
        const int half = (segment - first_segment) % halves;
        const int64_t offset = (int64_t)half * (kStepBytes / halves);
        const int stop = least(first + gemm.segment_steps, steps);
        int32_t *exact = state.sums[segment % 2];
        KTK_TILE_EACH(MT, KTK_ZERO);
        for (int step = first; step < stop; step++) {
          KTK_FETCH();
          KTK_TILE_LOAD(file, 5, column.data + step * column.step_stride_bytes + offset * kPanelColumns, 64);
          KTK_TILE_EACH(MT, KTK_MULTIPLY);
        }
        if (segment > first_segment) add(segment - 1);
        KTK_TILE_EACH(MT, KTK_STORE_EXACT);
        // A step of two halves is done after its second.
        if (half == halves - 1) first = stop;
      }
      add(segment - 1);
    }
  }
#undef KTK_MULTIPLY
#undef KTK_STORE_EXACT
#undef KTK_STORE_SUM
#undef KTK_LOAD_SUM
#undef KTK_ZERO
#undef KTK_FETCH
}

template <class Ops, class Format, int MT>
KTK_INLINE void tile_panel(const Product &p, TileState &state, int tile_count, const TileSteps &k,
                           const TilePanel &panel, const TilesAhead &ahead, float *out) {
  if (panel.last_rows == kBlockRows) {
    tile_panel<Ops, Format, MT, false>(p, state, tile_count, k, panel, ahead, out);
  } else {
    tile_panel<Ops, Format, MT, true>(p, state, tile_count, k, panel, ahead, out);
  }
}

// A single block of rows, which would leave the unit waiting for one sum: NT tiles of columns at a time, over
// all of K. Weights that are tiles as stored, and sums that stay in one accumulator.
template <class Ops, class Format, int NT>
static void tile_block(const Product &p, TileState &state, int tile_count, int tile, const TilePanel &panel,
                       float *out) {
  const Gemm &gemm = *p.gemm;
  [[maybe_unused]] TileFile &file = state.file;
  const RowAddress rows = row_address(p.rows.data, gemm, p.row_count, panel.first_row);
  const uint8_t *weights[NT];
  for (int j = 0; j < NT; j++) weights[j] = p.tiles + p.tile_offset_bytes(tile + j);
  float *target = tile_sums(out, 0, tile_count, tile);
#define KTK_ZERO(j) KTK_TILE_ZERO(file, j)
#define KTK_LOAD_SUM(j) KTK_TILE_LOAD(file, j, target + (j) * kSumTileFloats, 64)
#define KTK_STORE_SUM(j) KTK_TILE_STORE(file, j, target + (j) * kSumTileFloats, 64)
#define KTK_MULTIPLY(j)                                                  \
  do {                                                                   \
    prefetch_near(weights[j] + step * p.step_stride_bytes + kReadAhead); \
    KTK_TILE_LOAD(file, 5, weights[j] + step * p.step_stride_bytes, 64); \
    KTK_TILE_DOT(file, j, 4, 5);                                         \
  } while (0)
  constexpr int64_t kReadAhead = 4096;
  if (p.accumulate) {
    KTK_TILE_EACH(NT, KTK_LOAD_SUM);
  } else {
    KTK_TILE_EACH(NT, KTK_ZERO);
  }
  for (int64_t step = 0; step < gemm.steps; step++) {
    KTK_TILE_LOAD(file, 4, rows.data + step * rows.step_stride_bytes, kStepBytes);
    KTK_TILE_EACH(NT, KTK_MULTIPLY);
  }
  KTK_TILE_EACH(NT, KTK_STORE_SUM);
#undef KTK_MULTIPLY
#undef KTK_STORE_SUM
#undef KTK_LOAD_SUM
#undef KTK_ZERO
}

// Sums of `blocks` tiles, all of the same few rows, side by side.
KTK_INLINE void shape_block(TileState &state, int rows) {
  [[maybe_unused]] TileFile &file = state.file;
  TileConfig config;
  for (int i = 0; i < 4; i++) {
    config.rows[i] = (uint8_t)rows;
    config.row_bytes[i] = kPanelColumns * 4;
  }
  config.rows[4] = (uint8_t)rows;
  config.row_bytes[4] = kStepBytes;
  config.rows[5] = kStepBytes / 4;
  config.row_bytes[5] = kPanelColumns * 4;
  KTK_TILE_CONFIGURE(file, config);
  state.blocks = 0;
}

// Finishes what tile_product left in `out` for the rows from `row` on, `rows` of them and at most 16: exact
// sums, if they are of one segment, and sums that lack the scale of their weights, if those have one a row.
template <class Ops, class Format>
KTK_INLINE void scale_sums(const Product &p, int tile_count, int row, int rows, float *out) {
  const Gemm &gemm = *p.gemm;
  if (!Format::kInteger || (gemm.segments > 1 && gemm.scale_is_bf16)) return;
  for (int tile = 0; tile < tile_count; tile++, out += kSumTileFloats) {
    const typename Ops::F scale = weight_scale<Ops>(p, 0, tile);
    for (int r = 0; r < rows; r++) {
      float *target = out + r * kPanelColumns;
      if (gemm.segments == 1) {
        const int32_t start = segment_start<Format>(p.rows.sum[(int64_t)(row + r) * gemm.sums]);
        const typename Ops::I sum = Ops::add_i(Ops::load_i(target), Ops::set1_i(start));
        const float row_scale = p.rows.scale[row + r];
        Ops::store_f(target, Ops::zero_f());
        if (gemm.scale_is_bf16) {
          add_scaled<Ops, true>(scale, sum, row_scale, target);
          continue;
        }
        add_scaled<Ops, false>(scale, sum, row_scale, target);
      }
      Ops::store_f(target, Ops::mul(Ops::load_f(target), scale));
    }
  }
}

// Tiles [0, tile_count) for rows [first, last), which begin a block of rows. out: see tile_sums; sums of one
// segment are left to scale_sums.
template <class Ops, class Format>
static void tile_product(const Product &p, int tile_count, int first, int last, float *out) {
  const Gemm &gemm = *p.gemm;
  TileState state;
  KTK_TILE_FENCE();
  const int row_blocks = (last - first + kBlockRows - 1) / kBlockRows;
  const auto panel_at = [&](int block) {
    const int blocks = least(row_blocks - block, kTileBlocks);
    const int first_row = first + block * kBlockRows;
    return TilePanel{first_row, blocks, least(last - first_row - (blocks - 1) * kBlockRows, kBlockRows)};
  };
  if (row_blocks == 1 && gemm.segments == 1 && !Format::kExpands) {
    const TilePanel panel = panel_at(0);
    shape_block(state, panel.last_rows);
    int tile = 0;
    for (; tile + 4 <= tile_count; tile += 4)
      tile_block<Ops, Format, 4>(p, state, tile_count, tile, panel, out);
    for (; tile + 2 <= tile_count; tile += 2)
      tile_block<Ops, Format, 2>(p, state, tile_count, tile, panel, out);
    if (tile < tile_count) tile_block<Ops, Format, 1>(p, state, tile_count, tile, panel, out);
  } else {
    // Blocks of K of about one size, each of whole segments.
    const int blocks_of_k = (gemm.steps + kTileBlockSteps - 1) / kTileBlockSteps;
    int block_steps = (gemm.steps + blocks_of_k - 1) / blocks_of_k;
    if (gemm.segments > 1)
      block_steps = (block_steps + gemm.segment_steps - 1) / gemm.segment_steps * gemm.segment_steps;
    for (int step0 = 0; step0 < gemm.steps; step0 += block_steps) {
      const TileSteps k = {step0, least(gemm.steps - step0, block_steps)};
      const bool last_of_k = step0 + block_steps >= gemm.steps;
      if constexpr (Format::kExpands) {
        for (int tile = 0; tile < tile_count; tile++) {
          for (int s = 0; s < k.count; s++)
            expand_tile<Ops, Format>(p, step0 + s, tile, state.expanded[tile * kTileBlockSteps + s]);
        }
        KTK_TILE_FENCE();
      }
      for (int block = 0; block < row_blocks; block += kTileBlocks) {
        const TilePanel panel = panel_at(block);
        TilesAhead ahead = {nullptr, (int64_t)gemm.steps * kBlockRows * kStepBytes, 0, false};
        // The first rows to meet this block of weights fetch the next one.
        ahead.weights = block == 0 && !Format::kExpands && !last_of_k;
        const bool more_rows = block + kTileBlocks < row_blocks;
        if (more_rows || !last_of_k) {
          const TilePanel following = panel_at(more_rows ? block + kTileBlocks : 0);
          ahead.rows = p.rows.data + following.first_row / kBlockRows * ahead.row_block_bytes +
                       (int64_t)(more_rows ? step0 : step0 + block_steps) * kBlockRows * kStepBytes;
          ahead.row_blocks = following.blocks;
        }
        float *target = tile_sums(out, block, tile_count, 0);
        switch (panel.blocks) {
          case 1:
            tile_panel<Ops, Format, 1>(p, state, tile_count, k, panel, ahead, target);
            break;
          case 2:
            tile_panel<Ops, Format, 2>(p, state, tile_count, k, panel, ahead, target);
            break;
          case 3:
            tile_panel<Ops, Format, 3>(p, state, tile_count, k, panel, ahead, target);
            break;
          default:
            tile_panel<Ops, Format, 4>(p, state, tile_count, k, panel, ahead, target);
        }
      }
    }
  }
  KTK_TILE_RELEASE(state.file);
}
#undef KTK_TILE_EACH
#undef KTK_TILE_DOT
