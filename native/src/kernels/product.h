// The product of up to kGroupRows activation rows with NT panels of packed weights, in fp32.
//
// Every output is one chain of operations along K in ascending order, whatever rows are computed beside it:
// that is what makes results independent of batch position and thread count. Integer formats are exact
// within a segment, so that all instruction sets and both kernels below give the same bits.
#pragma once

#include "core/backend.h"
#include "kernels/inline.h"
#include "kernels/rows.h"

constexpr int kGroupRows = 2 * kBlockRows;  // rows of one call: two tiles high on matrix units

// NT panels side by side, and the rows they meet.
struct Product {
  const Gemm *gemm;
  const uint8_t *tiles;
  int64_t tile_stride_bytes;  // between the tiles of one step
  int64_t step_stride_bytes;
  const uint8_t *scale, *zero;
  int64_t scale_tile_stride, scale_group_stride;  // in scales
  Rows rows;
  int32_t row_count;
};

// Adds the exact sums of one segment, for row `row`, to its outputs.
template <class Ops, class Format, int NT>
KTK_INLINE void add_segment(const Product &p, int segment, int row, const typename Ops::I (&sum)[NT],
                            float *out) {
  const Gemm &gemm = *p.gemm;
  const int64_t group = segment / gemm.segments_per_weight_group * p.scale_group_stride;
  const int64_t row_group = segment / gemm.segments_per_row_group;
  const typename Ops::F row_scale = Ops::set1_f(p.rows.scale[(int64_t)row * gemm.row_groups + row_group]);
  const int32_t row_sum = p.rows.sum[(int64_t)row * gemm.segments + segment];
  for (int j = 0; j < NT; j++) {
    const int64_t at = j * p.scale_tile_stride + group;
    const typename Ops::F scale = gemm.scale_is_bf16 ? Ops::load_bf16((const uint16_t *)p.scale + at)
                                                     : Ops::load_f((const float *)p.scale + at);
    const typename Ops::I offset = gemm.asymmetric
                                       ? Ops::mul_i(Ops::load_u8(p.zero + at), Ops::set1_i(row_sum))
                                       : Ops::set1_i(Format::kZeroPoint * row_sum);
    const typename Ops::F exact = Ops::from_i(Ops::sub_i(sum[j], offset));
    float *target = out + j * kPanelColumns;
    Ops::store_f(target, Ops::fma(exact, Ops::mul(scale, row_scale), Ops::load_f(target)));
  }
}

template <class Ops, class Format, int NT, int MR, int Halves>
static void integer_rows(const Product &p, const RowAddress address, int row, float *out) {
  const Gemm &gemm = *p.gemm;
  for (int r = 0; r < MR; r++) {
    for (int j = 0; j < NT; j++) Ops::store_f(out + (r * NT + j) * kPanelColumns, Ops::zero_f());
  }
  const uint8_t *rows = address.data;
  const uint8_t *tiles = p.tiles;
  for (int step = 0, segment = 0; step < gemm.steps; segment += Halves) {
    typename Ops::I sum[Halves][MR][NT];
    for (int h = 0; h < Halves; h++) {
      for (int r = 0; r < MR; r++) {
        for (int j = 0; j < NT; j++) sum[h][r][j] = Ops::zero_i();
      }
    }
    const int stop = step + gemm.segment_steps < gemm.steps ? step + gemm.segment_steps : gemm.steps;
    for (; step < stop; step++) {
      Format::template step<Ops, NT, MR, Halves>(sum, rows, tiles, p.tile_stride_bytes);
      rows += address.step_stride_bytes;
      tiles += p.step_stride_bytes;
    }
    for (int h = 0; h < Halves && segment + h < gemm.segments; h++) {
      for (int r = 0; r < MR; r++) {
        add_segment<Ops, Format, NT>(p, segment + h, row + r, sum[h][r], out + r * NT * kPanelColumns);
      }
    }
  }
}

template <class Ops, class Format, int NT, int MR>
static void float_rows(const Product &p, const RowAddress address, float *out) {
  typename Ops::F sum[MR][NT];
  for (int r = 0; r < MR; r++) {
    for (int j = 0; j < NT; j++) sum[r][j] = Ops::zero_f();
  }
  const uint8_t *rows = address.data;
  const uint8_t *tiles = p.tiles;
  for (int step = 0; step < p.gemm->steps; step++) {
    Format::template step<Ops, NT, MR>(sum, rows, tiles, p.tile_stride_bytes);
    rows += address.step_stride_bytes;
    tiles += p.step_stride_bytes;
  }
  for (int r = 0; r < MR; r++) {
    for (int j = 0; j < NT; j++) Ops::store_f(out + (r * NT + j) * kPanelColumns, sum[r][j]);
  }
}

// MR consecutive rows of one block, by vector instructions.
template <class Ops, class Format, int NT, int MR>
KTK_INLINE void vector_rows(const Product &p, int row, float *out) {
  const RowAddress address = row_address(p.rows.data, *p.gemm, p.row_count, row);
  if constexpr (!Format::kInteger) {
    float_rows<Ops, Format, NT, MR>(p, address, out);
  } else if (p.gemm->halves == 2) {
    integer_rows<Ops, Format, NT, MR, 2>(p, address, row, out);
  } else {
    integer_rows<Ops, Format, NT, MR, 1>(p, address, row, out);
  }
}

// Rows [first, last) in register blocks of MR rows, then of half as many for what is left.
template <class Ops, class Format, int NT, int MR>
KTK_INLINE void vector_product(const Product &p, int first, int last, float *out) {
  while (first + MR <= last) {
    vector_rows<Ops, Format, NT, MR>(p, first, out);
    first += MR;
    out += MR * NT * kPanelColumns;
  }
  if constexpr (MR > 1) {
    if (first < last) vector_product<Ops, Format, NT, MR / 2>(p, first, last, out);
  }
}
