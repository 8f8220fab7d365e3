// The product of up to kGroupRows activation rows with NT panels of packed weights, in fp32; an output row is
// `out_stride` floats from the next.
//
// Every output is one chain of operations along K in ascending order, whatever rows are computed beside it:
// that is what makes results independent of batch position and thread count. Integer formats are exact
// within a segment, so that all instruction sets and both kernels below give the same bits.
#pragma once

#include "core/backend.h"
#include "kernels/inline.h"
#include "kernels/rows.h"

constexpr int kGroupRows = 2 * kBlockRows;  // rows that one call of the vector kernels is given

// Matrix units: two columns of tiles of weights in one block of K are up to 8 steps, 16 KiB, and a pass takes
// as many rows as keep their sums in half a MiB of the second-level cache. Measured on Emerald Rapids:
// docs/benchmarks/log.md.
constexpr int kTileBlockSteps = 8;

// Panels side by side, and the rows they meet. Tiles come in pairs: gate and up of the same neurons, or
// two panels of the down projection.
struct Product {
  const Gemm *gemm;
  const uint8_t *tiles;
  int64_t tile_stride_bytes;  // within a pair
  int64_t pair_stride_bytes;
  int64_t step_stride_bytes;
  const uint8_t *scale;
  int64_t scale_tile_stride, scale_pair_stride, scale_group_stride;  // in scales
  const uint8_t *factors;
  int64_t factor_tile_stride, factor_pair_stride, factor_group_stride;  // in bytes
  Rows rows;
  int32_t row_count;
  bool accumulate = false;  // adds to what the output holds
  bool in_cache = false;    // the tiles are
  // The block of rows that ends before `fetch_row` fetches the next pair, `next_bytes` behind this one.
  int32_t fetch_row = -1;
  int64_t next_bytes = 0;
  // Steps of K, to which `tiles` belongs; by default all.
  int32_t first_step = 0, step_stop = INT32_MAX;

  KTK_MEMBER int32_t last_step() const { return least(step_stop, gemm->steps); }

  KTK_MEMBER int64_t tile_offset_bytes(int j) const {
    return j / 2 * pair_stride_bytes + j % 2 * tile_stride_bytes;
  }
  // The same from tile `first` on, which is even.
  KTK_MEMBER Product from_tile(int first) const {
    Product rest = *this;
    rest.tiles += first / 2 * pair_stride_bytes;
    rest.scale += first / 2 * scale_pair_stride * (gemm->scale_is_bf16 ? 2 : 4);
    rest.factors += first / 2 * factor_pair_stride;
    return rest;
  }
  // The other tile of a pair.
  KTK_MEMBER Product second_tile() const {
    Product other = *this;
    other.tiles += tile_stride_bytes;
    other.scale += scale_tile_stride * (gemm->scale_is_bf16 ? 2 : 4);
    other.factors += factor_tile_stride;
    return other;
  }
  KTK_MEMBER int64_t scale_offset(int j, int group) const {
    return j / 2 * scale_pair_stride + j % 2 * scale_tile_stride + group * scale_group_stride;
  }
};

// Of rows without groups of factors: multipliers of 1, and offsets that take 8 off.
alignas(64) constexpr uint8_t kNoFactors[kFactorBytes] = {
    1,   1,   1,   1,   1,   1,   1,   1,   1,   1,   1,   1,   1,   1,   1,   1,
    120, 120, 120, 120, 120, 120, 120, 120, 120, 120, 120, 120, 120, 120, 120, 120};

// The factors of tile j's two halves of a step. A last half that is all padding has none, and takes those
// before it: its activations are zero.
KTK_INLINE StepFactors step_factors(const Product &p, int step, int j) {
  const Gemm &gemm = *p.gemm;
  if (gemm.factor_groups == 0) return {kNoFactors, kNoFactors, 0, nullptr, 0};
  const uint8_t *factors = p.factors + j / 2 * p.factor_pair_stride + j % 2 * p.factor_tile_stride;
  const int low = step * 64 >> gemm.factor_shift, high = (step * 64 + 32) >> gemm.factor_shift;
  return {factors + low * p.factor_group_stride,
          factors + least(high, gemm.factor_groups - 1) * p.factor_group_stride, p.factor_tile_stride,
          nullptr, 0};
}

// Weight scales of 16 columns in one segment, or of the whole row.
template <class Ops>
KTK_INLINE typename Ops::F weight_scale(const Product &p, int segment, int j) {
  const int64_t at = p.scale_offset(j, p.gemm->weight_groups == 1 ? 0 : segment);
  return p.gemm->scale_is_bf16 ? Ops::load_bf16((const uint16_t *)p.scale + at)
                               : Ops::load_f((const float *)p.scale + at);
}

// What a sum of bytes starts from, so that what stands for 0 is taken off.
template <class Format>
KTK_INLINE int32_t segment_start(int32_t row_sum) {
  return -Format::kZeroPoint * row_sum;
}

// Adds the exact sums of one segment and row to the row's 16 outputs. Grouped: times the weights' scale,
// which else is one for the row and waits until all segments are there.
template <class Ops, bool Grouped>
KTK_INLINE void add_scaled(typename Ops::F weight_scale, typename Ops::I sum, float row_scale, float *out) {
  typename Ops::F by = Ops::set1_f(row_scale);
  if constexpr (Grouped) by = Ops::mul(weight_scale, by);
  Ops::store_f(out, Ops::fma(Ops::from_i(sum), by, Ops::load_f(out)));
}

// Adds a segment of MR rows and NT tiles, the first of which is `tile`, to their outputs.
template <class Ops, int NT, int MR, bool Grouped>
KTK_INLINE void add_segment(const Product &p, int segment, int row, int tile,
                            const typename Ops::I (&sum)[MR][NT], float *out, int out_stride) {
  const Gemm &gemm = *p.gemm;
  typename Ops::F scale[NT];
  for (int j = 0; j < NT; j++) scale[j] = Grouped ? weight_scale<Ops>(p, segment, tile + j) : Ops::zero_f();
  const float *row_scale = p.rows.scale + (int64_t)row * gemm.row_groups + (segment >> gemm.row_group_shift);
  for (int r = 0; r < MR; r++) {
    for (int j = 0; j < NT; j++) {
      add_scaled<Ops, Grouped>(scale[j], sum[r][j], row_scale[r * gemm.row_groups],
                               out + r * out_stride + (tile + j) * kPanelColumns);
    }
  }
}

// Tiles that a step multiplies side by side, which loads activations once for them; or one, since a core
// whose prefetcher follows lines reads two tiles line by line in turns half as fast as one after the other.
template <class Ops, class Format, int NT, bool First>
constexpr int kTilesOfRun = Ops::template kTilesApart<Format> == TilesApart::always ||
                                    (First && Ops::template kTilesApart<Format> == TilesApart::first_rows)
                                ? 1
                                : NT;

// Calls use(first tile) for each run of tiles that are multiplied side by side.
template <int NT, int Run, class Use>
KTK_INLINE void each_run(Use use) {
  static_assert(NT <= 2, "tiles come in pairs");
  use(0);
  if constexpr (NT > Run) use(Run);
}

// What the rows that end before `stop` fetch with the weights that they meet.
template <class Ops, class Format, bool First>
KTK_INLINE auto ahead_of(const Product &p, int stop) {
  if constexpr (First) {
    return ReadAhead<Ops::template kReadAheadBytes<Format>>();
  } else if constexpr (Ops::kFetchesNextPair) {
    return NextPair{stop == p.fetch_row ? p.next_bytes : 0};
  } else {
    return ReadAhead<0>();
  }
}

// Whether a format takes off what stands for 0 by itself.
template <class Ops, class Format, int MR>
constexpr bool sums_nibbles() {
  if constexpr (Format::kFactors) return Format::template kSumsNibbles<Ops, MR>;
  return false;
}

// Where a row's sum of a segment is, of all its sums.
template <class Format>
KTK_INLINE int sum_index(const Gemm &gemm, int segment) {
  return Format::kFactors ? segment * gemm.sums_per_row_group : segment;
}

template <class Ops, class Format, int NT, int MR, int Halves, bool First>
static void integer_rows(const Product &p, const RowAddress address, int row, float *out, int out_stride) {
  constexpr int kRun = kTilesOfRun<Ops, Format, NT, First>;
  const Gemm &gemm = *p.gemm;
  const auto target = [&](int r, int j) { return out + r * out_stride + j * kPanelColumns; };
  for (int r = 0; r < MR; r++) {
    for (int j = 0; j < NT; j++) Ops::store_f(target(r, j), Ops::zero_f());
  }
  const uint8_t *rows = address.data;
  const uint8_t *tiles = p.tiles;
  const auto ahead = ahead_of<Ops, Format, First>(p, row + MR);
  const int32_t *row_sums = p.rows.sum + (int64_t)row * gemm.sums;
  for (int step = 0, segment = 0; step < gemm.steps; segment += Halves) {
    typename Ops::I sum[NT / kRun][Halves][MR][kRun];
    for (int h = 0; h < Halves; h++) {
      for (int r = 0; r < MR; r++) {
        // A step of two halves may end in one that is all padding, which has no sum.
        const bool none = sums_nibbles<Ops, Format, MR>() || segment + h >= gemm.segments;
        const int32_t row_sum =
            none ? 0 : row_sums[(int64_t)r * gemm.sums + sum_index<Format>(gemm, segment + h)];
        for (int j = 0; j < NT; j++)
          sum[j / kRun][h][r][j % kRun] = Ops::set1_i(segment_start<Format>(row_sum));
      }
    }
    const int stop = least(step + gemm.segment_steps, gemm.steps);
    for (; step < stop; step++) {
      StepFactors factors = {};
      if constexpr (Format::kFactors) {
        factors = step_factors(p, step, 0);
        // Behind the sum of each segment so far.
        factors.sums = row_sums + segment + 1 + step;
        factors.row_stride = gemm.sums;
      }
      each_run<NT, kRun>([&](int tile) __attribute__((always_inline)) {
        Format::template step<Ops, kRun, MR, Halves>(sum[tile / kRun], rows,
                                                     tiles + tile * p.tile_stride_bytes, p.tile_stride_bytes,
                                                     ahead, factors.from_tile(tile));
      });
      rows += address.step_stride_bytes;
      tiles += p.step_stride_bytes;
    }
    for (int h = 0; h < Halves && segment + h < gemm.segments; h++) {
      each_run<NT, kRun>([&](int tile) __attribute__((always_inline)) {
        const auto &of = sum[tile / kRun][h];
        if (gemm.scale_is_bf16) {
          add_segment<Ops, kRun, MR, true>(p, segment + h, row, tile, of, out, out_stride);
        } else {
          add_segment<Ops, kRun, MR, false>(p, segment + h, row, tile, of, out, out_stride);
        }
      });
    }
  }
  if (gemm.scale_is_bf16) return;
  for (int j = 0; j < NT; j++) {
    const typename Ops::F scale = weight_scale<Ops>(p, 0, j);
    for (int r = 0; r < MR; r++) Ops::store_f(target(r, j), Ops::mul(Ops::load_f(target(r, j)), scale));
  }
}

template <class Ops, class Format, int NT, int MR, bool First>
static void float_rows(const Product &p, const RowAddress address, int row, float *out, int out_stride) {
  constexpr int kRun = kTilesOfRun<Ops, Format, NT, First>;
  typename Ops::F sum[NT / kRun][MR][kRun];
  for (int r = 0; r < MR; r++) {
    for (int j = 0; j < NT; j++) {
      sum[j / kRun][r][j % kRun] =
          p.accumulate ? Ops::load_f(out + r * out_stride + j * kPanelColumns) : Ops::zero_f();
    }
  }
  const uint8_t *rows = address.data + p.first_step * address.step_stride_bytes;
  const uint8_t *tiles = p.tiles;
  const auto ahead = ahead_of<Ops, Format, First>(p, row + MR);
  for (int step = p.first_step; step < p.last_step(); step++) {
    each_run<NT, kRun>([&](int tile) __attribute__((always_inline)) {
      Format::template step<Ops, kRun, MR>(sum[tile / kRun], rows, tiles + tile * p.tile_stride_bytes,
                                           p.tile_stride_bytes, ahead);
    });
    rows += address.step_stride_bytes;
    tiles += p.step_stride_bytes;
  }
  for (int r = 0; r < MR; r++) {
    for (int j = 0; j < NT; j++)
      Ops::store_f(out + r * out_stride + j * kPanelColumns, sum[j / kRun][r][j % kRun]);
  }
}

// Expands tile j of a step to the operand of integer or bf16 products, 1024 bytes.
template <class Ops, class Format>
KTK_INLINE void expand_tile(const Product &p, int step, int j, uint8_t *operand) {
  const uint8_t *tile = p.tiles + (int64_t)step * p.step_stride_bytes + p.tile_offset_bytes(j);
  if constexpr (Format::kScaledToBf16) {
    const int group = step / Format::kStepsOfScale;
    Format::template expand_tile<Ops>(tile, weight_scale<Ops>(p, group, j), operand);
  } else {
    Format::template expand_tile<Ops>(tile, step_factors(p, step, j), operand);
  }
}

// MR consecutive rows of one block, by vector instructions. First: they are the first to meet the weights.
template <class Ops, class Format, int NT, int MR, bool First>
KTK_INLINE void vector_rows(const Product &p, int row, float *out, int out_stride) {
  const RowAddress address = row_address(p.rows.data, *p.gemm, p.row_count, row);
  if constexpr (!Format::kInteger) {
    float_rows<Ops, Format, NT, MR, First>(p, address, row, out, out_stride);
  } else if constexpr (Format::kFactors) {
    integer_rows<Ops, Format, NT, MR, 1, First>(p, address, row, out, out_stride);
  } else if (p.gemm->halves == 2) {
    integer_rows<Ops, Format, NT, MR, 2, First>(p, address, row, out, out_stride);
  } else {
    integer_rows<Ops, Format, NT, MR, 1, First>(p, address, row, out, out_stride);
  }
}

// `count` rows, at most MR, in one register block.
template <class Ops, class Format, int NT, int MR>
KTK_INLINE void vector_block(const Product &p, int first, int count, float *out, int out_stride) {
  if (count == MR) {
    if (first == 0 && !p.in_cache) {
      vector_rows<Ops, Format, NT, MR, true>(p, first, out, out_stride);
    } else {
      vector_rows<Ops, Format, NT, MR, false>(p, first, out, out_stride);
    }
  } else if constexpr (MR > 1) {
    vector_block<Ops, Format, NT, MR - 1>(p, first, count, out, out_stride);
  }
}

// Rows [first, last) of a block, in register blocks of about one height: each reads all weights.
template <class Ops, class Format, int NT>
KTK_INLINE void vector_product(const Product &p, int first, int last, float *out, int out_stride) {
  constexpr int kMost = Ops::kBlockMaxRows;
  int blocks = (last - first + kMost - 1) / kMost;
  for (; blocks > 0; blocks--) {
    const int count = (last - first + blocks - 1) / blocks;
    vector_block<Ops, Format, NT, kMost>(p, first, count, out, out_stride);
    first += count;
    out += count * out_stride;
  }
}

// The same for the pair of tiles that `p` begins with. Tiles apart whose steps do not lie side by side in
// memory are read one after the other for all of K, if that reads no activations more often than they are
// read anyway.
template <class Ops, class Format>
KTK_INLINE void vector_pair(const Product &p, int first, int last, float *out) {
  constexpr int kStride = 2 * kPanelColumns;
  constexpr TilesApart kApart = Ops::template kTilesApart<Format>;
  const bool side_by_side = p.tile_stride_bytes == Format::kTileBytes;
  const bool apart =
      kApart == TilesApart::always || (kApart == TilesApart::first_rows && first == 0 && !p.in_cache);
  if (apart && !side_by_side && last - first <= Ops::kBlockMaxRows) {
    const Product second = p.second_tile();
    vector_product<Ops, Format, 1>(p, first, last, out, kStride);
    vector_product<Ops, Format, 1>(second, first, last, out + kPanelColumns, kStride);
    return;
  }
  vector_product<Ops, Format, 2>(p, first, last, out, kStride);
}
