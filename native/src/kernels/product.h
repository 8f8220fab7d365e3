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

// Matrix units: a panel of rows in one block of K is up to 4 tiles by 8 steps, 32 KiB, and a pass takes as
// many rows as keep their sums in the second-level cache. Measured on Emerald Rapids: docs/benchmarks/log.md.
constexpr int kTileBlocks = 4;
constexpr int kTileBlockSteps = 8;
constexpr int kTilePassRows = 256;
constexpr int kMostTiles = 2 * kIntermediateGroup / kPanelColumns;  // side by side in one call

KTK_INLINE int least(int a, int b) { return a < b ? a : b; }

// Panels side by side, and the rows they meet. Tiles come in pairs: gate and up of the same neurons, or
// two panels of the down projection.
struct Product {
  const Gemm *gemm;
  const uint8_t *tiles;
  int64_t tile_stride_bytes;  // within a pair
  int64_t pair_stride_bytes;
  int64_t step_stride_bytes;
  const uint8_t *scale, *zero;
  int64_t scale_tile_stride, scale_pair_stride, scale_group_stride;  // in scales
  Rows rows;
  int32_t row_count;
  bool accumulate = false;  // adds to what the output holds
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
    rest.zero += first / 2 * scale_pair_stride;
    return rest;
  }
  // The other tile of a pair.
  KTK_MEMBER Product second_tile() const {
    Product other = *this;
    other.tiles += tile_stride_bytes;
    other.scale += scale_tile_stride * (gemm->scale_is_bf16 ? 2 : 4);
    other.zero += scale_tile_stride;
    return other;
  }
  KTK_MEMBER int64_t scale_offset(int j, int group) const {
    return j / 2 * scale_pair_stride + j % 2 * scale_tile_stride + group * scale_group_stride;
  }
};

// Weight scales and zero points of 16 columns in one segment.
template <class Ops>
struct SegmentScale {
  typename Ops::F scale;
  typename Ops::I zero;  // asymmetric weights only
};

// A weight group is a segment, or the whole row.
template <class Ops>
KTK_INLINE SegmentScale<Ops> segment_scale(const Product &p, int segment, int j) {
  const int64_t at = p.scale_offset(j, p.gemm->weight_groups == 1 ? 0 : segment);
  return {p.gemm->scale_is_bf16 ? Ops::load_bf16((const uint16_t *)p.scale + at)
                                : Ops::load_f((const float *)p.scale + at),
          p.gemm->asymmetric ? Ops::load_u8(p.zero + at) : Ops::zero_i()};
}

// What a sum of stored values starts from, so that the zero point of symmetric weights is taken off.
template <class Ops, class Format>
KTK_INLINE typename Ops::I segment_start(const Gemm &gemm, int32_t row_sum) {
  return gemm.asymmetric ? Ops::zero_i() : Ops::set1_i(-Format::kZeroPoint * row_sum);
}

// Adds the sums of one segment and row, begun with segment_start, to the row's 16 outputs. Zero points of
// asymmetric weights count sixteenths: so does the sum, and the scale makes up for it, exactly.
template <class Ops, bool Asymmetric>
KTK_INLINE void add_scaled(const SegmentScale<Ops> &scale, typename Ops::I sum, float row_scale,
                           int32_t row_sum, float *out) {
  if constexpr (Asymmetric) {
    sum = Ops::sub_i(Ops::shift_left_4(sum), Ops::mul_short(scale.zero, Ops::set1_i(row_sum)));
    row_scale *= 0.0625f;
  }
  Ops::store_f(out,
               Ops::fma(Ops::from_i(sum), Ops::mul(scale.scale, Ops::set1_f(row_scale)), Ops::load_f(out)));
}

// Adds a segment of MR rows and NT tiles to their outputs.
template <class Ops, int NT, int MR, bool Asymmetric>
KTK_INLINE void add_segment(const Product &p, int segment, int row, const typename Ops::I (&sum)[MR][NT],
                            float *out, int out_stride) {
  const Gemm &gemm = *p.gemm;
  SegmentScale<Ops> scale[NT];
  for (int j = 0; j < NT; j++) scale[j] = segment_scale<Ops>(p, segment, j);
  const float *row_scale = p.rows.scale + (int64_t)row * gemm.row_groups + (segment >> gemm.row_group_shift);
  const int32_t *row_sum = p.rows.sum + (int64_t)row * gemm.segments + segment;
  for (int r = 0; r < MR; r++) {
    for (int j = 0; j < NT; j++) {
      add_scaled<Ops, Asymmetric>(scale[j], sum[r][j], *row_scale, *row_sum,
                                  out + r * out_stride + j * kPanelColumns);
    }
    row_scale += gemm.row_groups;
    row_sum += gemm.segments;
  }
}

template <class Ops, class Format, int NT, int MR, int Halves>
static void integer_rows(const Product &p, const RowAddress address, int row, float *out, int out_stride) {
  const Gemm &gemm = *p.gemm;
  for (int r = 0; r < MR; r++) {
    for (int j = 0; j < NT; j++) Ops::store_f(out + r * out_stride + j * kPanelColumns, Ops::zero_f());
  }
  const uint8_t *rows = address.data;
  const uint8_t *tiles = p.tiles;
  for (int step = 0, segment = 0; step < gemm.steps; segment += Halves) {
    typename Ops::I sum[Halves][MR][NT];
    for (int h = 0; h < Halves; h++) {
      for (int r = 0; r < MR; r++) {
        // A step of two halves may end in one that is all padding, which has no sum.
        const bool padding = segment + h >= gemm.segments;
        const int32_t row_sum = padding ? 0 : p.rows.sum[(int64_t)(row + r) * gemm.segments + segment + h];
        for (int j = 0; j < NT; j++) sum[h][r][j] = segment_start<Ops, Format>(gemm, row_sum);
      }
    }
    const int stop = step + gemm.segment_steps < gemm.steps ? step + gemm.segment_steps : gemm.steps;
    for (; step < stop; step++) {
      Format::template step<Ops, NT, MR, Halves>(sum, rows, tiles, p.tile_stride_bytes);
      rows += address.step_stride_bytes;
      tiles += p.step_stride_bytes;
    }
    for (int h = 0; h < Halves && segment + h < gemm.segments; h++) {
      if (gemm.asymmetric) {
        add_segment<Ops, NT, MR, true>(p, segment + h, row, sum[h], out, out_stride);
      } else {
        add_segment<Ops, NT, MR, false>(p, segment + h, row, sum[h], out, out_stride);
      }
    }
  }
}

template <class Ops, class Format, int NT, int MR>
static void float_rows(const Product &p, const RowAddress address, float *out, int out_stride) {
  typename Ops::F sum[MR][NT];
  for (int r = 0; r < MR; r++) {
    for (int j = 0; j < NT; j++)
      sum[r][j] = p.accumulate ? Ops::load_f(out + r * out_stride + j * kPanelColumns) : Ops::zero_f();
  }
  const uint8_t *rows = address.data + p.first_step * address.step_stride_bytes;
  const uint8_t *tiles = p.tiles;
  for (int step = p.first_step; step < p.last_step(); step++) {
    Format::template step<Ops, NT, MR>(sum, rows, tiles, p.tile_stride_bytes);
    rows += address.step_stride_bytes;
    tiles += p.step_stride_bytes;
  }
  for (int r = 0; r < MR; r++) {
    for (int j = 0; j < NT; j++) Ops::store_f(out + r * out_stride + j * kPanelColumns, sum[r][j]);
  }
}

// Expands tile j of a step to the operand of integer or bf16 products, 1024 bytes.
template <class Ops, class Format>
KTK_INLINE void expand_tile(const Product &p, int step, int j, uint8_t *operand) {
  const uint8_t *tile = p.tiles + (int64_t)step * p.step_stride_bytes + p.tile_offset_bytes(j);
  if constexpr (Format::kScaledToBf16) {
    const int group = step / Format::kStepsOfScale;
    Format::template expand_tile<Ops>(tile, segment_scale<Ops>(p, group, j).scale, operand);
  } else {
    Format::template expand_tile<Ops>(tile, operand);
  }
}

// MR consecutive rows of one block, by vector instructions.
template <class Ops, class Format, int NT, int MR>
KTK_INLINE void vector_rows(const Product &p, int row, float *out, int out_stride) {
  const RowAddress address = row_address(p.rows.data, *p.gemm, p.row_count, row);
  if constexpr (!Format::kInteger) {
    float_rows<Ops, Format, NT, MR>(p, address, out, out_stride);
  } else if (p.gemm->halves == 2) {
    integer_rows<Ops, Format, NT, MR, 2>(p, address, row, out, out_stride);
  } else {
    integer_rows<Ops, Format, NT, MR, 1>(p, address, row, out, out_stride);
  }
}

// Rows [first, last) in register blocks of MR rows, then of half as many for what is left.
template <class Ops, class Format, int NT, int MR>
KTK_INLINE void vector_product(const Product &p, int first, int last, float *out, int out_stride) {
  while (first + MR <= last) {
    vector_rows<Ops, Format, NT, MR>(p, first, out, out_stride);
    first += MR;
    out += MR * out_stride;
  }
  if constexpr (MR > 1) {
    if (first < last) vector_product<Ops, Format, NT, MR / 2>(p, first, last, out, out_stride);
  }
}

// The same for the pair of tiles that `p` begins with: tile by tile where that makes taller register blocks.
template <class Ops, class Format>
KTK_INLINE void vector_pair(const Product &p, int first, int last, float *out) {
  constexpr int kStride = 2 * kPanelColumns;
  if constexpr (Ops::kTallMaxRows > Ops::kBlockMaxRows) {
    const int tall = (last - first) / Ops::kTallMaxRows * Ops::kTallMaxRows;
    vector_product<Ops, Format, 1, Ops::kTallMaxRows>(p, first, first + tall, out, kStride);
    vector_product<Ops, Format, 1, Ops::kTallMaxRows>(p.second_tile(), first, first + tall,
                                                      out + kPanelColumns, kStride);
    first += tall;
    out += tall * kStride;
  }
  vector_product<Ops, Format, 2, Ops::kBlockMaxRows>(p, first, last, out, kStride);
}
