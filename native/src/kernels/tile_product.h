// The product by matrix units.
//
// K is cut into blocks. Within one, a pair of columns of tiles of weights stays in the first-level cache
// while the rows stream past it, one tile at a time, each used for both columns; what has been summed so far
// waits in `out`. Rows come from the second-level cache, by loads that leave the first one alone. Tiles are
// loaded 1.5 times for every product.
//
// Registers 0 and 1 hold sums, 4 the rows and 5 the weights, one tile of the pair after the other; 2, 3 and 6
// are used only for a block of fewer than 16 rows, and freed. Where two hyper-threads share a core, registers
// that hold nothing are what the processor renames the others into, and a loop that loads tiles runs up to
// twice as fast with 4 registers as with 8 (docs/benchmarks/log.md).
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
// Most segments that end within a block of K: halves of steps.
constexpr int kBlockSegments = 2 * kTileBlockSteps;

// What the rows of a pass multiply exact sums with in each segment of a block of K, and what those start
// from.
struct SegmentRows {
  float scale[kBlockSegments][kPassRows];
  int32_t start[kBlockSegments][kPassRows];
};

// Exact sums of a block of rows that have left the tiles and wait to be scaled: one or two segments by up to
// two columns of tiles.
struct WaitingSums {
  int segments = 0;     // 0: none wait
  int segment;          // the first of them in the block of K
  int tile, tiles;      // columns
  int first_row, rows;  // of the pass
  bool first;           // nothing has been added to their outputs
  float *out;
};

struct TileState {
  [[maybe_unused]] TileFile file;
  // Operands of a pair in one block of K, where weights are not stored as such: [tile][step].
  uint8_t (*expanded)[1024] = nullptr;
  alignas(64) int32_t sums[2][2][kSumTileFloats];  // that wait: [segment][tile]
  SegmentRows *rows = nullptr;
  int first_segment = 0;  // of the block of K
  WaitingSums waiting = {};
};

// A block of K.
struct TileSteps {
  int first, count;
};

// The weights of the next pair in a block of K, which the rows of this one fetch by turns, some lines with
// each step.
struct WeightsAhead {
  const uint8_t *run[2] = {nullptr, nullptr};  // as memory holds them; the second may be missing
  int run_lines = 0, lines = 0, next = 0;      // of a run, of both, the next to fetch
  int lines_of_step = 0;

  KTK_MEMBER void fetch() {
    const int stop = least(next + lines_of_step, lines);
    for (; next < stop; next++) {
      const bool second = next >= run_lines;
      __builtin_prefetch(run[second] + (int64_t)(second ? next - run_lines : next) * 64, 0, 2);
    }
  }
};

// `steps`: how often they will fetch.
template <class Format>
KTK_INLINE WeightsAhead weights_ahead(const Product &p, int tile, int tiles, const TileSteps &k, int steps) {
  WeightsAhead ahead;
  const uint8_t *data = p.tiles + p.tile_offset_bytes(tile) + k.first * p.step_stride_bytes;
  const bool side_by_side = p.step_stride_bytes == 2 * Format::kTileBytes;
  ahead.run[0] = data;
  ahead.run[1] = data + p.tile_stride_bytes;
  ahead.run_lines = k.count * (int)(p.step_stride_bytes / 64);
  ahead.lines = side_by_side ? ahead.run_lines : tiles * ahead.run_lines;
  ahead.lines_of_step = (ahead.lines + steps - 1) / steps;
  return ahead;
}

// Registers 4 for whole blocks of rows and 6 for one of `last_rows`; 0 to 3 for the sums of such rows,
// `whole` of them of whole blocks; 5 for weights; operands of `depth_bytes` along K.
KTK_INLINE void shape_tiles([[maybe_unused]] TileFile &file, int whole, int last_rows, int depth_bytes) {
  TileConfig config;
  const auto shape = [&](int number, int rows, int row_bytes) {
    config.rows[number] = (uint8_t)rows;
    config.row_bytes[number] = (uint16_t)row_bytes;
  };
  for (int i = 0; i < 4; i++) shape(i, i < whole ? kBlockRows : last_rows, kPanelColumns * 4);
  shape(4, kBlockRows, depth_bytes);
  shape(5, depth_bytes / 4, kPanelColumns * 4);
  shape(6, last_rows, depth_bytes);
  KTK_TILE_CONFIGURE(file, config);
}

// Weights of one tile in a block of K.
struct TileColumn {
  const uint8_t *data;
  int64_t step_stride_bytes;
};

template <class Format>
KTK_INLINE TileColumn tile_column(const Product &p, const TileState &state, int tile, int step0) {
  if constexpr (Format::kExpands) return {state.expanded[tile % 2 * kTileBlockSteps], 1024};
  return {p.tiles + p.tile_offset_bytes(tile) + step0 * p.step_stride_bytes, p.step_stride_bytes};
}

// Where the sums of a tile of columns for a block of rows lie: [block][tile][16][16].
KTK_INLINE float *tile_sums(float *out, int block, int tile_count, int tile) {
  return out + ((int64_t)block * tile_count + tile) * kSumTileFloats;
}

// Of the rows [first, last) in the segments of a block of K.
template <class Format>
KTK_INLINE void load_segment_rows(const Product &p, int first_segment, int last_segment, int first, int last,
                                  SegmentRows &to) {
  const Gemm &gemm = *p.gemm;
  for (int segment = first_segment; segment < last_segment; segment++) {
    const float *scale = p.rows.scale + (segment >> gemm.row_group_shift);
    const int32_t *sum = p.rows.sum + sum_index<Format>(gemm, segment);
    for (int row = first; row < last; row++) {
      to.scale[segment - first_segment][row - first] = scale[(int64_t)row * gemm.row_groups];
      to.start[segment - first_segment][row - first] = segment_start<Format>(sum[(int64_t)row * gemm.sums]);
    }
  }
}

// Scales sums that wait: both segments at once, so that the outputs are read and written once.
template <class Ops, bool Grouped, int NT, int Segments>
static void add_waiting(const Product &p, const TileState &state) {
  typedef typename Ops::F F;
  const WaitingSums &waiting = state.waiting;
  F scale[Segments][NT];
  for (int s = 0; s < Segments; s++) {
    for (int j = 0; j < NT; j++) {
      scale[s][j] = Grouped
                        ? weight_scale<Ops>(p, state.first_segment + waiting.segment + s, waiting.tile + j)
                        : Ops::zero_f();
    }
  }
  const int32_t *sums = state.sums[0][0];
  float *out = waiting.out;
  for (int r = 0; r < waiting.rows; r++, out += kPanelColumns, sums += kPanelColumns) {
    F target[NT];
    for (int j = 0; j < NT; j++)
      target[j] = waiting.first ? Ops::zero_f() : Ops::load_f(out + j * kSumTileFloats);
    for (int s = 0; s < Segments; s++) {
      const typename Ops::I start =
          Ops::set1_i(state.rows->start[waiting.segment + s][waiting.first_row + r]);
      const F row_scale = Ops::set1_f(state.rows->scale[waiting.segment + s][waiting.first_row + r]);
      for (int j = 0; j < NT; j++) {
        const typename Ops::I exact = Ops::load_i(sums + (s * 2 + j) * kSumTileFloats);
        const F sum = Ops::from_i(Ops::add_i(exact, start));
        target[j] = Ops::fma(sum, Grouped ? Ops::mul(scale[s][j], row_scale) : row_scale, target[j]);
      }
    }
    for (int j = 0; j < NT; j++) Ops::store_f(out + j * kSumTileFloats, target[j]);
  }
}

template <class Ops, bool Grouped>
KTK_INLINE void add_waiting_of(const Product &p, const TileState &state) {
  const bool both = state.waiting.segments == 2;
  if (state.waiting.tiles == 2) {
    if (both) return add_waiting<Ops, Grouped, 2, 2>(p, state);
    return add_waiting<Ops, Grouped, 2, 1>(p, state);
  }
  if (both) return add_waiting<Ops, Grouped, 1, 2>(p, state);
  add_waiting<Ops, Grouped, 1, 1>(p, state);
}

template <class Ops>
KTK_INLINE void add_waiting(const Product &p, TileState &state) {
  if (state.waiting.segments == 0) return;
  if (p.gemm->scale_is_bf16) {
    add_waiting_of<Ops, true>(p, state);
  } else {
    add_waiting_of<Ops, false>(p, state);
  }
  state.waiting.segments = 0;
}

// A block of rows: `count` of them from `first` on, within a pass that begins with row `pass`.
struct TileRows {
  const uint8_t *data;   // in the block of K
  int64_t stride_bytes;  // from one step to the next
  int first, count, pass;
};

// The statements of a block of rows, in the registers for 16 rows or for fewer.
#define KTK_TILE_OF_ROWS(STATEMENT, ...) \
  do {                                   \
    if constexpr (Partial) {             \
      STATEMENT(2, 3, 6, __VA_ARGS__);   \
    } else {                             \
      STATEMENT(0, 1, 4, __VA_ARGS__);   \
    }                                    \
  } while (0)

// Products of a step's tile of rows, `offset` bytes into it, and the two tiles of weights.
#define KTK_TILE_STEP(first, second, rows_register, step, offset)                                            \
  do {                                                                                                       \
    KTK_TILE_LOAD_ONCE(file, rows_register, rows.data + (step) * rows.stride_bytes + (offset), kStepBytes);  \
    KTK_TILE_LOAD(file, 5,                                                                                   \
                  columns[0].data + (step) * columns[0].step_stride_bytes + (offset) * kPanelColumns, 64);   \
    KTK_TILE_DOT(file, first, rows_register, 5);                                                             \
    if constexpr (NT == 2) {                                                                                 \
      KTK_TILE_LOAD(file, 5,                                                                                 \
                    columns[1].data + (step) * columns[1].step_stride_bytes + (offset) * kPanelColumns, 64); \
      KTK_TILE_DOT(file, second, rows_register, 5);                                                          \
    }                                                                                                        \
  } while (0)
#define KTK_TILE_ZERO_SUMS(first, second, rows_register, file) \
  do {                                                         \
    KTK_TILE_ZERO(file, first);                                \
    if constexpr (NT == 2) KTK_TILE_ZERO(file, second);        \
  } while (0)
#define KTK_TILE_LOAD_SUMS(first, second, rows_register, from)                       \
  do {                                                                               \
    KTK_TILE_LOAD(file, first, from, 64);                                            \
    if constexpr (NT == 2) KTK_TILE_LOAD(file, second, (from) + kSumTileFloats, 64); \
  } while (0)
#define KTK_TILE_STORE_SUMS(first, second, rows_register, to)                       \
  do {                                                                              \
    KTK_TILE_STORE(file, first, to, 64);                                            \
    if constexpr (NT == 2) KTK_TILE_STORE(file, second, (to) + kSumTileFloats, 64); \
  } while (0)
// Registers that hold zeros are free for others.
#define KTK_TILE_FREE(first, second, rows_register, file) \
  do {                                                    \
    if constexpr (Partial) {                              \
      KTK_TILE_ZERO(file, first);                         \
      KTK_TILE_ZERO(file, second);                        \
      KTK_TILE_ZERO(file, rows_register);                 \
    }                                                     \
  } while (0)

// A block of rows by NT columns of tiles in one block of K, in sums that stay in the tiles for the whole of
// K.
template <class Ops, class Format, int NT, bool Partial>
KTK_INLINE void whole_sums(TileState &state, const TileRows &rows, const TileColumn (&columns)[2], int steps,
                           bool begin, WeightsAhead &ahead, float *out) {
  [[maybe_unused]] TileFile &file = state.file;
  if (begin) {
    KTK_TILE_OF_ROWS(KTK_TILE_ZERO_SUMS, file);
  } else {
    KTK_TILE_OF_ROWS(KTK_TILE_LOAD_SUMS, out);
  }
  for (int step = 0; step < steps; step++) {
    ahead.fetch();
    KTK_TILE_OF_ROWS(KTK_TILE_STEP, step, 0);
  }
  KTK_TILE_OF_ROWS(KTK_TILE_STORE_SUMS, out);
  KTK_TILE_OF_ROWS(KTK_TILE_FREE, file);
}

// The same in sums that leave the tiles after each segment. While the unit works on segments, sums that left
// before are scaled.
template <class Ops, class Format, int NT, bool Partial>
KTK_INLINE void segment_sums(const Product &p, TileState &state, const TileRows &rows,
                             const TileColumn (&columns)[2], const TileSteps &k, int tile,
                             WeightsAhead &ahead, float *out) {
  const Gemm &gemm = *p.gemm;
  [[maybe_unused]] TileFile &file = state.file;
  const int depth_bytes = kStepBytes / gemm.halves;
  for (int first = 0, segment = 0; first < k.count && state.first_segment + segment < gemm.segments;) {
    int count = 0;
    for (; count < 2 && first < k.count && state.first_segment + segment + count < gemm.segments; count++) {
      const int half = (segment + count) % gemm.halves;
      const int offset = half * depth_bytes;
      const int stop = least(first + gemm.segment_steps, k.count);
      KTK_TILE_OF_ROWS(KTK_TILE_ZERO_SUMS, file);
      for (int step = first; step < stop; step++) {
        ahead.fetch();
        KTK_TILE_OF_ROWS(KTK_TILE_STEP, step, offset);
      }
      // Between products and the sums that they leave, which take the place of these.
      add_waiting<Ops>(p, state);
      int32_t *to = state.sums[count][0];
      KTK_TILE_OF_ROWS(KTK_TILE_STORE_SUMS, to);
      // A step of two halves is done after its second.
      if (half == gemm.halves - 1) first = stop;
    }
    WaitingSums &waiting = state.waiting;
    waiting.segments = count;
    waiting.segment = segment;
    waiting.tile = tile;
    waiting.tiles = NT;
    waiting.first_row = rows.first - rows.pass;
    waiting.rows = rows.count;
    waiting.first = k.first == 0 && segment == 0;
    waiting.out = out;
    segment += count;
  }
  KTK_TILE_OF_ROWS(KTK_TILE_FREE, file);
}
#undef KTK_TILE_FREE
#undef KTK_TILE_STORE_SUMS
#undef KTK_TILE_LOAD_SUMS
#undef KTK_TILE_ZERO_SUMS
#undef KTK_TILE_STEP
#undef KTK_TILE_OF_ROWS

// All rows of a pass by NT columns of tiles in one block of K. `ahead`: what they fetch.
template <class Ops, class Format, int NT>
static void tile_columns(const Product &p, TileState &state, int tile_count, const TileSteps &k, int tile,
                         int first, int last, WeightsAhead ahead, float *out) {
  const Gemm &gemm = *p.gemm;
  const bool segments = Format::kInteger && gemm.segments > 1;
  TileColumn columns[2];
  for (int j = 0; j < NT; j++) columns[j] = tile_column<Format>(p, state, tile + j, k.first);
  const bool begin = k.first == 0 && !p.accumulate;
  for (int row = first; row < last; row += kBlockRows) {
    const RowAddress address = row_address(p.rows.data, gemm, p.row_count, row);
    const TileRows rows = {address.data + k.first * address.step_stride_bytes, address.step_stride_bytes, row,
                           least(last - row, kBlockRows), first};
    float *target = tile_sums(out, (row - first) / kBlockRows, tile_count, tile);
    if constexpr (Format::kInteger) {
      if (segments) {
        if (rows.count == kBlockRows) {
          segment_sums<Ops, Format, NT, false>(p, state, rows, columns, k, tile, ahead, target);
        } else {
          segment_sums<Ops, Format, NT, true>(p, state, rows, columns, k, tile, ahead, target);
        }
        continue;
      }
    }
    if (rows.count == kBlockRows) {
      whole_sums<Ops, Format, NT, false>(state, rows, columns, k.count, begin, ahead, target);
    } else {
      whole_sums<Ops, Format, NT, true>(state, rows, columns, k.count, begin, ahead, target);
    }
  }
}

// A single block of rows, which would leave the unit waiting for one sum: NT tiles of columns at a time, over
// all of K. Weights that are tiles as stored, and sums that stay in one accumulator.
template <class Ops, class Format, int NT>
static void tile_block(const Product &p, TileState &state, int tile_count, int tile, int first, float *out) {
  const Gemm &gemm = *p.gemm;
  [[maybe_unused]] TileFile &file = state.file;
  const RowAddress rows = row_address(p.rows.data, gemm, p.row_count, first);
  const uint8_t *weights[NT];
  for (int j = 0; j < NT; j++) weights[j] = p.tiles + p.tile_offset_bytes(tile + j);
  float *target = tile_sums(out, 0, tile_count, tile);
#define KTK_ZERO(j) KTK_TILE_ZERO(file, j)
#define KTK_LOAD_SUM(j) KTK_TILE_LOAD(file, j, target + (j) * kSumTileFloats, 64)
#define KTK_STORE_SUM(j) KTK_TILE_STORE(file, j, target + (j) * kSumTileFloats, 64)
#define KTK_MULTIPLY(j)                                                  \
  do {                                                                   \
    fetch_lines<1024>(weights[j] + step * p.step_stride_bytes + kAhead); \
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
  alignas(64) uint8_t expanded[Format::kExpands ? 2 * kTileBlockSteps : 1][1024];
  SegmentRows segment_rows;
  TileState state;
  state.expanded = expanded;
  state.rows = &segment_rows;
  KTK_TILE_FENCE();
  const int row_blocks = (last - first + kBlockRows - 1) / kBlockRows;
  const int last_rows = last - first - (row_blocks - 1) * kBlockRows;
  if (row_blocks == 1 && gemm.segments == 1 && !Format::kExpands) {
    shape_tiles(state.file, 0, last_rows, kStepBytes);
    int tile = 0;
    for (; tile + 4 <= tile_count; tile += 4)
      tile_block<Ops, Format, 4>(p, state, tile_count, tile, first, out);
    for (; tile + 2 <= tile_count; tile += 2)
      tile_block<Ops, Format, 2>(p, state, tile_count, tile, first, out);
    if (tile < tile_count) tile_block<Ops, Format, 1>(p, state, tile_count, tile, first, out);
    KTK_TILE_RELEASE(state.file);
    return;
  }
  shape_tiles(state.file, 2, last_rows, kStepBytes / gemm.halves);
  // Blocks of K of about one size, each of whole segments.
  const int blocks_of_k = (gemm.steps + kTileBlockSteps - 1) / kTileBlockSteps;
  int block_steps = (gemm.steps + blocks_of_k - 1) / blocks_of_k;
  if (gemm.segments > 1)
    block_steps = (block_steps + gemm.segment_steps - 1) / gemm.segment_steps * gemm.segment_steps;
  const auto block_of_k = [&](int step0) { return TileSteps{step0, least(gemm.steps - step0, block_steps)}; };
  for (int step0 = 0; step0 < gemm.steps; step0 += block_steps) {
    const TileSteps k = block_of_k(step0);
    if (Format::kInteger && gemm.segments > 1) {
      add_waiting<Ops>(p, state);
      state.first_segment = step0 / gemm.segment_steps * gemm.halves;
      const int stop = (step0 + k.count + gemm.segment_steps - 1) / gemm.segment_steps * gemm.halves;
      load_segment_rows<Format>(p, state.first_segment, least(gemm.segments, stop), first, last,
                                segment_rows);
    }
    for (int tile = 0; tile < tile_count; tile += 2) {
      const int tiles = least(tile_count - tile, 2);
      if constexpr (Format::kExpands) {
        for (int j = 0; j < tiles; j++) {
          for (int s = 0; s < k.count; s++)
            expand_tile<Ops, Format>(p, step0 + s, tile + j, expanded[j * kTileBlockSteps + s]);
        }
        KTK_TILE_FENCE();
      }
      const bool more_tiles = tile + 2 < tile_count;
      const int next = more_tiles ? tile + 2 : 0;
      WeightsAhead ahead;
      if (more_tiles || step0 + block_steps < gemm.steps) {
        ahead = weights_ahead<Format>(p, next, least(tile_count - next, 2),
                                      more_tiles ? k : block_of_k(step0 + block_steps), row_blocks * k.count);
      }
      if (tiles == 2) {
        tile_columns<Ops, Format, 2>(p, state, tile_count, k, tile, first, last, ahead, out);
      } else {
        tile_columns<Ops, Format, 1>(p, state, tile_count, k, tile, first, last, ahead, out);
      }
    }
  }
  if constexpr (Format::kInteger) add_waiting<Ops>(p, state);
  KTK_TILE_RELEASE(state.file);
}
#undef KTK_TILE_EACH
#undef KTK_TILE_DOT
