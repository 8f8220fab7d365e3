// The product by matrix units.
//
// K is cut into blocks. Within one, a panel of two tiles of rows stays in the first-level cache while the
// weights stream past it, one tile at a time, each used for all rows of the panel; what has been summed so
// far waits in `out`. Tiles are loaded 1.5 times for every product, and each comes from the second-level
// cache or nearer.
//
// Registers 0 and 1 hold sums, 4 the rows, 5 the weights; 2 and 3 are used only for a second tile of weights,
// and so is 7, and 6 for a block of fewer than 16 rows. Where two hyper-threads share a core, registers that
// hold nothing are what the processor renames the others into, and a loop that loads tiles runs up to twice
// as fast with 4 registers as with 8 (docs/benchmarks/log.md).
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
static_assert(kTileBlocks == 2, "a panel is one block or two");

KTK_INLINE void prefetch_near(const uint8_t *tile) {
  for (int line = 0; line < 16; line++) __builtin_prefetch(tile + line * 64, 0, 3);
}
// A tile of weights as it is stored.
template <class Format>
KTK_INLINE void prefetch_weights(const Product &p, int tile, int step) {
  const uint8_t *data = p.tiles + p.tile_offset_bytes(tile) + step * p.step_stride_bytes;
  for (int line = 0; line < Format::kTileBytes; line += 64) __builtin_prefetch(data + line, 0, 2);
}

// The scales of a panel's rows in one segment, and what their sums start from.
struct SegmentRows {
  alignas(64) float scale[kTileBlocks * kBlockRows];
  alignas(64) int32_t start[kTileBlocks * kBlockRows];
};

// Exact sums that have left the tiles and wait to be scaled: one or two segments of up to two blocks of rows
// by up to two tiles of columns.
struct WaitingSums {
  int segments = 0;  // 0: none wait
  int segment, lot;  // the first of them, and where their sums are
  int tile, tiles;
  int rows;    // of the panel
  float *out;  // of the first tile
};

struct TileState {
  [[maybe_unused]] TileFile file;
  uint64_t shape = 0;  // what the registers are configured for
  // Operands of one block of K, where weights are not stored as such: [tile][step].
  uint8_t (*expanded)[1024] = nullptr;
  alignas(64) int32_t sums[2][2][4][kSumTileFloats];  // [lot][segment][block and tile]
  SegmentRows segment_rows[2 * kTileBlockSteps];
  int first_segment;  // of segment_rows
  WaitingSums waiting = {};
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
  // Of the next block of K, whose weights the panels of this one fetch by turns: which of them this one is. 0
  // panels: there is no next block.
  int panel, panels;
};

// What one call of tile_segments fetches ahead.
struct SegmentsAhead {
  const TilesAhead &panel;
  bool far;           // its own tiles in the next block of K
  int next_tile;      // of columns, whose first steps follow its last ones
  int share, shares;  // of the next panel's rows
};

// Registers 0-3 for sums of so many rows (0: not used), 4 for whole blocks of rows and 6 for the last, 5 and
// 7 for weights; operands of `depth_bytes` along K.
struct TileShape {
  int sum_rows[4];
  int last_rows, depth_bytes;
};
KTK_INLINE void shape_tiles(TileState &state, const TileShape &to) {
  uint64_t key = (uint64_t)to.last_rows << 32 | (uint64_t)to.depth_bytes << 40;
  for (int i = 0; i < 4; i++) key |= (uint64_t)to.sum_rows[i] << 8 * i;
  if (state.shape == key) return;
  state.shape = key;
  [[maybe_unused]] TileFile &file = state.file;
  TileConfig config;
  const auto shape = [&](int number, int rows, int row_bytes) {
    config.rows[number] = (uint8_t)rows;
    config.row_bytes[number] = (uint16_t)(rows == 0 ? 0 : row_bytes);
  };
  for (int i = 0; i < 4; i++) shape(i, to.sum_rows[i], kPanelColumns * 4);
  shape(4, kBlockRows, to.depth_bytes);
  shape(5, to.depth_bytes / 4, kPanelColumns * 4);
  shape(6, to.last_rows, to.depth_bytes);
  shape(7, to.depth_bytes / 4, kPanelColumns * 4);
  KTK_TILE_CONFIGURE(file, config);
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
  const int32_t *sum = p.rows.sum + (int64_t)first_row * gemm.sums + sum_index<Format>(gemm, segment);
  for (int r = 0; r < rows; r++) {
    to.scale[r] = scale[(int64_t)r * gemm.row_groups];
    to.start[r] = segment_start<Format>(sum[(int64_t)r * gemm.sums]);
  }
}

// Scales sums that wait, of the first of their blocks of rows or of the second: both segments at once, so
// that the outputs are read and written once.
template <class Ops, bool Grouped, int NT, int Segments>
static void add_waiting(const Product &p, const TileState &state, int block, int64_t out_stride) {
  typedef typename Ops::F F;
  const WaitingSums &waiting = state.waiting;
  F scale[Segments][NT];
  for (int s = 0; s < Segments; s++) {
    for (int j = 0; j < NT; j++)
      scale[s][j] = Grouped ? weight_scale<Ops>(p, waiting.segment + s, waiting.tile + j) : Ops::zero_f();
  }
  const int row = block * kBlockRows;
  const int rows = least(waiting.rows - row, kBlockRows);
  const SegmentRows *of = state.segment_rows + (waiting.segment - state.first_segment);
  const int32_t *sums = state.sums[waiting.lot][0][block * NT];
  float *out = waiting.out + block * out_stride;
  for (int r = 0; r < rows; r++, out += kPanelColumns, sums += kPanelColumns) {
    F target[NT];
    for (int j = 0; j < NT; j++) target[j] = Ops::load_f(out + j * kSumTileFloats);
    for (int s = 0; s < Segments; s++) {
      const typename Ops::I start = Ops::set1_i(of[s].start[row + r]);
      const F row_scale = Ops::set1_f(of[s].scale[row + r]);
      for (int j = 0; j < NT; j++) {
        const typename Ops::I exact = Ops::load_i(sums + (s * 4 + j) * kSumTileFloats);
        const F sum = Ops::from_i(Ops::add_i(exact, start));
        target[j] = Ops::fma(sum, Grouped ? Ops::mul(scale[s][j], row_scale) : row_scale, target[j]);
      }
    }
    for (int j = 0; j < NT; j++) Ops::store_f(out + j * kSumTileFloats, target[j]);
  }
}

template <class Ops, bool Grouped>
KTK_INLINE void add_waiting_of(const Product &p, const TileState &state, int block, int64_t out_stride) {
  const bool both = state.waiting.segments == 2;
  if (state.waiting.tiles == 2) {
    if (both) return add_waiting<Ops, Grouped, 2, 2>(p, state, block, out_stride);
    return add_waiting<Ops, Grouped, 2, 1>(p, state, block, out_stride);
  }
  if (both) return add_waiting<Ops, Grouped, 1, 2>(p, state, block, out_stride);
  add_waiting<Ops, Grouped, 1, 1>(p, state, block, out_stride);
}

template <class Ops>
KTK_INLINE void add_waiting(const Product &p, const TileState &state, int block, int64_t out_stride) {
  if (state.waiting.segments == 0 || block * kBlockRows >= state.waiting.rows) return;
  if (p.gemm->scale_is_bf16) {
    add_waiting_of<Ops, true>(p, state, block, out_stride);
  } else {
    add_waiting_of<Ops, false>(p, state, block, out_stride);
  }
}

// The rows of a block within a panel.
struct TileRows {
  const uint8_t *data;
  int64_t stride_bytes;  // from one step to the next
};
KTK_INLINE TileRows tile_rows(const Product &p, const TilePanel &panel, int block, int first_step) {
  const RowAddress address =
      row_address(p.rows.data, *p.gemm, p.row_count, panel.first_row + block * kBlockRows);
  return {address.data + first_step * address.step_stride_bytes, address.step_stride_bytes};
}

// Whether a panel fetches the weights of a tile in the next block of K.
KTK_INLINE bool fetches_weights(const TilesAhead &ahead, int tile) {
  return ahead.panels > 0 && tile / 2 % ahead.panels == ahead.panel;
}

// The lines of the next panel's rows that belong to share `index` of `shares` in each step.
KTK_INLINE void fetch_rows(const TilesAhead &ahead, int step, int index, int shares) {
  if (ahead.rows == nullptr) return;
  const int lines = (ahead.row_blocks * 16 + shares - 1) / shares;
  for (int line = index * lines; line < (index + 1) * lines; line++)
    __builtin_prefetch(ahead.rows + line / 16 * ahead.row_block_bytes + step * 1024 + line % 16 * 64, 0, 2);
}

// One block of K, MT blocks of rows, every tile of columns, in sums that stay in the tiles for the whole of
// K. Partial: the last block has fewer than 16 rows.
template <class Ops, class Format, int MT, bool Partial>
static void tile_panel(const Product &p, TileState &state, int tile_count, const TileSteps &k,
                       const TilePanel &panel, const TilesAhead &ahead, float *out) {
  [[maybe_unused]] TileFile &file = state.file;
  const int step0 = k.first, steps = k.count;
  const int64_t out_stride = (int64_t)tile_count * kSumTileFloats;
  TileShape shape = {{}, panel.last_rows, kStepBytes};
  TileRows rows[MT];
  for (int i = 0; i < MT; i++) {
    shape.sum_rows[i] = i == MT - 1 ? panel.last_rows : kBlockRows;
    rows[i] = tile_rows(p, panel, i, step0);
  }
  shape_tiles(state, shape);
#define KTK_ZERO(i) KTK_TILE_ZERO(file, i)
#define KTK_LOAD_SUM(i) KTK_TILE_LOAD(file, i, target + (i) * out_stride, 64)
#define KTK_STORE_SUM(i) KTK_TILE_STORE(file, i, target + (i) * out_stride, 64)
#define KTK_MULTIPLY(i)                                                               \
  do {                                                                                \
    if constexpr (Partial && (i) == MT - 1) {                                         \
      KTK_TILE_LOAD(file, 6, rows[i].data + step * rows[i].stride_bytes, kStepBytes); \
      KTK_TILE_DOT(file, i, 6, 5);                                                    \
    } else {                                                                          \
      KTK_TILE_LOAD(file, 4, rows[i].data + step * rows[i].stride_bytes, kStepBytes); \
      KTK_TILE_DOT(file, i, 4, 5);                                                    \
    }                                                                                 \
  } while (0)
  for (int tile = 0; tile < tile_count; tile++) {
    const TileColumn column = tile_column<Format>(p, state, tile, step0);
    const TileColumn next = tile_column<Format>(p, state, tile + 1 < tile_count ? tile + 1 : tile, step0);
    float *target = out + (int64_t)tile * kSumTileFloats;
    const bool far = fetches_weights(ahead, tile);
    if (step0 == 0 && !p.accumulate) {
      KTK_TILE_EACH(MT, KTK_ZERO);
    } else {
      KTK_TILE_EACH(MT, KTK_LOAD_SUM);
    }
    for (int step = 0; step < steps; step++) {
      const int soon = step + 2;
      prefetch_near(soon < steps ? column.data + soon * column.step_stride_bytes
                                 : next.data + (soon - steps) * next.step_stride_bytes);
      if (far) prefetch_weights<Format>(p, tile, step0 + steps + step);
      fetch_rows(ahead, step, tile, tile_count);
      KTK_TILE_LOAD(file, 5, column.data + step * column.step_stride_bytes, 64);
      KTK_TILE_EACH(MT, KTK_MULTIPLY);
    }
    KTK_TILE_EACH(MT, KTK_STORE_SUM);
  }
#undef KTK_MULTIPLY
#undef KTK_STORE_SUM
#undef KTK_LOAD_SUM
#undef KTK_ZERO
}

// Up to two blocks of rows by up to two tiles of columns in one block of K, in sums that leave the tiles
// after each segment. While the unit works on segments, sums that left before are scaled.
template <class Ops, class Format, int MT, int NT, bool Partial>
static void tile_segments(const Product &p, TileState &state, const TileSteps &k, const WaitingSums &place,
                          const TilePanel &panel, const SegmentsAhead &ahead, int64_t out_stride) {
  const Gemm &gemm = *p.gemm;
  [[maybe_unused]] TileFile &file = state.file;
  const int depth_bytes = kStepBytes / gemm.halves;
  TileShape shape = {{}, panel.last_rows, depth_bytes};
  TileRows rows[MT];
  for (int i = 0; i < MT; i++) {
    for (int j = 0; j < NT; j++)
      shape.sum_rows[i * NT + j] = Partial && i == MT - 1 ? panel.last_rows : kBlockRows;
    rows[i] = tile_rows(p, panel, i, k.first);
  }
  shape_tiles(state, shape);
  TileColumn columns[NT], next[NT];
  for (int j = 0; j < NT; j++) {
    columns[j] = tile_column<Format>(p, state, place.tile + j, k.first);
    next[j] = tile_column<Format>(p, state, ahead.next_tile + j, k.first);
  }
#define KTK_ZERO(i) KTK_TILE_ZERO(file, i)
#define KTK_STORE_SUM(i) KTK_TILE_STORE(file, i, to[i], 64)
#define KTK_LOAD_ROWS(number, i) \
  KTK_TILE_LOAD(file, number, rows[i].data + step * rows[i].stride_bytes + offset, kStepBytes)
#define KTK_LOAD_WEIGHTS(number, j) \
  KTK_TILE_LOAD(file, number,       \
                columns[j].data + step * columns[j].step_stride_bytes + offset * kPanelColumns, 64)
#define KTK_MULTIPLY(operand, single, first, second) \
  do {                                               \
    if constexpr (NT == 2) {                         \
      KTK_TILE_DOT(file, first, operand, 5);         \
      KTK_TILE_DOT(file, second, operand, 7);        \
    } else {                                         \
      KTK_TILE_DOT(file, single, operand, 5);        \
    }                                                \
  } while (0)
#define KTK_MULTIPLY_ROWS(i, first, second)   \
  do {                                        \
    if constexpr (Partial && (i) == MT - 1) { \
      KTK_LOAD_ROWS(6, i);                    \
      KTK_MULTIPLY(6, i, first, second);      \
    } else {                                  \
      KTK_LOAD_ROWS(4, i);                    \
      KTK_MULTIPLY(4, i, first, second);      \
    }                                         \
  } while (0)
  int segment = state.first_segment;
  for (int first = 0; first < k.count && segment < gemm.segments;) {
    const int lot = 1 - state.waiting.lot;
    int count = 0;
    for (; count < 2 && first < k.count && segment + count < gemm.segments; count++) {
      const int half = (segment + count - state.first_segment) % gemm.halves;
      const int64_t offset = (int64_t)half * depth_bytes;
      const int stop = least(first + gemm.segment_steps, k.count);
      KTK_TILE_EACH(MT * NT, KTK_ZERO);
      for (int step = first; step < stop; step++) {
        const int soon = step + 2;
        for (int j = 0; j < NT; j++) {
          const TileColumn &column = columns[j];
          if (!Format::kExpands)
            prefetch_near(soon < k.count ? column.data + soon * column.step_stride_bytes
                                         : next[j].data + (soon - k.count) * next[j].step_stride_bytes);
          if (ahead.far) prefetch_weights<Format>(p, place.tile + j, k.first + k.count + step);
        }
        fetch_rows(ahead.panel, step, ahead.share, ahead.shares);
        KTK_LOAD_WEIGHTS(5, 0);
        if constexpr (NT == 2) KTK_LOAD_WEIGHTS(7, NT - 1);
        KTK_MULTIPLY_ROWS(0, 0, 1);
        if constexpr (MT == 2) KTK_MULTIPLY_ROWS(1, 2, 3);
      }
      add_waiting<Ops>(p, state, count, out_stride);
      auto &to = state.sums[lot][count];
      KTK_TILE_EACH(MT * NT, KTK_STORE_SUM);
      // A step of two halves is done after its second.
      if (half == gemm.halves - 1) first = stop;
    }
    if (count == 1) add_waiting<Ops>(p, state, 1, out_stride);
    state.waiting = place;
    state.waiting.segments = count;
    state.waiting.segment = segment;
    state.waiting.lot = lot;
    segment += count;
  }
#undef KTK_MULTIPLY_ROWS
#undef KTK_MULTIPLY
#undef KTK_LOAD_WEIGHTS
#undef KTK_LOAD_ROWS
#undef KTK_STORE_SUM
#undef KTK_ZERO
}

template <class Ops>
KTK_INLINE void add_all_waiting(const Product &p, TileState &state, int64_t out_stride) {
  add_waiting<Ops>(p, state, 0, out_stride);
  add_waiting<Ops>(p, state, 1, out_stride);
  state.waiting.segments = 0;
}

template <class Ops, class Format, bool Partial>
KTK_INLINE auto segments_kernel(int blocks, int tiles) {
  if (tiles == 2) {
    return blocks == 2 ? tile_segments<Ops, Format, 2, 2, Partial>
                       : tile_segments<Ops, Format, 1, 2, Partial>;
  }
  return blocks == 2 ? tile_segments<Ops, Format, 2, 1, Partial> : tile_segments<Ops, Format, 1, 1, Partial>;
}

// Segments of so many steps are summed as tile_panel does, a tile of columns at a time; shorter ones two at a
// time, where the scales of rows meet more sums each.
constexpr int kLongSegmentSteps = 4;

// One block of K, all blocks of rows of a panel, every tile of columns, where K has several segments.
template <class Ops, class Format>
static void segments_panel(const Product &p, TileState &state, int tile_count, const TileSteps &k,
                           const TilePanel &panel, const TilesAhead &ahead, float *out) {
  const Gemm &gemm = *p.gemm;
  const int64_t out_stride = (int64_t)tile_count * kSumTileFloats;
  const int count = (panel.blocks - 1) * kBlockRows + panel.last_rows;
  add_all_waiting<Ops>(p, state, out_stride);
  state.first_segment = k.first / gemm.segment_steps * gemm.halves;
  const int last_segment =
      least(gemm.segments, (k.first + k.count + gemm.segment_steps - 1) / gemm.segment_steps * gemm.halves);
  for (int i = state.first_segment; i < last_segment; i++)
    load_segment_rows<Format>(p, i, panel.first_row, count, state.segment_rows[i - state.first_segment]);
  const int most_tiles = gemm.segment_steps >= kLongSegmentSteps ? 1 : 2;
  const int shares = (tile_count + most_tiles - 1) / most_tiles;
  for (int tile = 0, share = 0; tile < tile_count; tile += most_tiles, share++) {
    WaitingSums place = {};
    place.tile = tile;
    place.tiles = least(tile_count - tile, most_tiles);
    place.rows = count;
    place.out = out + (int64_t)tile * kSumTileFloats;
    if (k.first == 0) {
      for (int i = 0; i < panel.blocks; i++)
        __builtin_memset(place.out + i * out_stride, 0, (uint64_t)place.tiles * kSumTileFloats * 4);
    }
    const bool more_tiles = tile + 2 * most_tiles <= tile_count;
    const SegmentsAhead fetched = {ahead, fetches_weights(ahead, tile), more_tiles ? tile + most_tiles : tile,
                                   share, shares};
    const auto kernel = panel.last_rows < kBlockRows
                            ? segments_kernel<Ops, Format, true>(panel.blocks, place.tiles)
                            : segments_kernel<Ops, Format, false>(panel.blocks, place.tiles);
    kernel(p, state, k, place, panel, fetched, out_stride);
  }
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
    prefetch_near(weights[j] + step * p.step_stride_bytes + kAhead);     \
    KTK_TILE_LOAD(file, 5, weights[j] + step * p.step_stride_bytes, 64); \
    KTK_TILE_DOT(file, j, 6, 5);                                         \
  } while (0)
  constexpr int64_t kAhead = Ops::template kReadAheadBytes<Format>;
  if (p.accumulate) {
    KTK_TILE_EACH(NT, KTK_LOAD_SUM);
  } else {
    KTK_TILE_EACH(NT, KTK_ZERO);
  }
  for (int64_t step = 0; step < gemm.steps; step++) {
    KTK_TILE_LOAD(file, 6, rows.data + step * rows.step_stride_bytes, kStepBytes);
    KTK_TILE_EACH(NT, KTK_MULTIPLY);
  }
  KTK_TILE_EACH(NT, KTK_STORE_SUM);
#undef KTK_MULTIPLY
#undef KTK_STORE_SUM
#undef KTK_LOAD_SUM
#undef KTK_ZERO
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
  constexpr int kExpandedTiles = Format::kExpands ? kMostPanels * kTileBlockSteps : 1;
  alignas(64) uint8_t expanded[kExpandedTiles][1024];
  TileState state;
  state.expanded = expanded;
  KTK_TILE_FENCE();
  const int row_blocks = (last - first + kBlockRows - 1) / kBlockRows;
  const auto panel_at = [&](int block) {
    const int blocks = least(row_blocks - block, kTileBlocks);
    const int first_row = first + block * kBlockRows;
    return TilePanel{first_row, blocks, least(last - first_row - (blocks - 1) * kBlockRows, kBlockRows)};
  };
  if (row_blocks == 1 && gemm.segments == 1 && !Format::kExpands) {
    const TilePanel panel = panel_at(0);
    const int rows = panel.last_rows;
    shape_tiles(state, {{rows, rows, rows, rows}, rows, kStepBytes});
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
        TilesAhead ahead = {nullptr, (int64_t)gemm.steps * kBlockRows * kStepBytes, 0, 0, 0};
        if (!last_of_k) {
          ahead.panel = block / kTileBlocks;
          ahead.panels = (row_blocks + kTileBlocks - 1) / kTileBlocks;
        }
        const bool more_rows = block + kTileBlocks < row_blocks;
        if (more_rows || !last_of_k) {
          const TilePanel following = panel_at(more_rows ? block + kTileBlocks : 0);
          ahead.rows = p.rows.data + following.first_row / kBlockRows * ahead.row_block_bytes +
                       (int64_t)(more_rows ? step0 : step0 + block_steps) * kBlockRows * kStepBytes;
          ahead.row_blocks = following.blocks;
        }
        float *target = tile_sums(out, block, tile_count, 0);
        if constexpr (Format::kInteger) {
          if (gemm.segments > 1) {
            segments_panel<Ops, Format>(p, state, tile_count, k, panel, ahead, target);
            continue;
          }
        }
        if (panel.blocks == 2) {
          tile_panel<Ops, Format, 2>(p, state, tile_count, k, panel, ahead, target);
        } else {
          tile_panel<Ops, Format, 1>(p, state, tile_count, k, panel, ahead, target);
        }
      }
    }
    if constexpr (Format::kInteger) add_all_waiting<Ops>(p, state, (int64_t)tile_count * kSumTileFloats);
  }
  KTK_TILE_RELEASE(state.file);
}
#undef KTK_TILE_EACH
#undef KTK_TILE_DOT
