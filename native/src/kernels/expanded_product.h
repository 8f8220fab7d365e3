// The product of bf16 operands on vectors without a bf16 dot product, for many rows: a few steps of weights
// at a time are split into fp32 once, in the first-level cache, and every row of the pass streams past them.
// Each output is the same chain of operations as in float_rows.
#pragma once

#include "kernels/product.h"

constexpr int kExpandedSteps = 4;  // of 2 tiles: 16 KiB

// Adds `steps` steps to out: MR rows, each with its own address, [MR][NT][16].
template <class Ops, int NT, int MR>
static void expanded_rows(const float *weights, int steps, const RowAddress *rows, int64_t offset_steps,
                          float *out) {
  typename Ops::F sum[MR][NT];
  const uint8_t *data[MR];
  for (int r = 0; r < MR; r++) {
    data[r] = rows[r].data + offset_steps * rows[r].step_stride_bytes;
    for (int j = 0; j < NT; j++) sum[r][j] = Ops::load_f(out + (r * NT + j) * kPanelColumns);
  }
  for (int step = 0; step < steps; step++) {
    // The next rows lie behind these, beyond what the hardware foresees.
    for (int r = 0; r < MR; r++) __builtin_prefetch(data[r] + MR * kStepBytes, 0, 3);
    for (int pair = 0; pair < 16; pair++) {
      typename Ops::F activations[MR];
      for (int r = 0; r < MR; r++) activations[r] = Ops::even_bf16(data[r] + pair * 4);
      for (int j = 0; j < NT; j++) {
        const typename Ops::F even = Ops::load_f(weights + j * kPanelColumns);
        for (int r = 0; r < MR; r++) sum[r][j] = Ops::fma(even, activations[r], sum[r][j]);
      }
      weights += NT * kPanelColumns;
      for (int r = 0; r < MR; r++) activations[r] = Ops::odd_bf16(data[r] + pair * 4);
      for (int j = 0; j < NT; j++) {
        const typename Ops::F odd = Ops::load_f(weights + j * kPanelColumns);
        for (int r = 0; r < MR; r++) sum[r][j] = Ops::fma(odd, activations[r], sum[r][j]);
      }
      weights += NT * kPanelColumns;
    }
    for (int r = 0; r < MR; r++) data[r] += rows[r].step_stride_bytes;
  }
  for (int r = 0; r < MR; r++) {
    for (int j = 0; j < NT; j++) Ops::store_f(out + (r * NT + j) * kPanelColumns, sum[r][j]);
  }
}

// NT tiles side by side for rows [first, last), out [last - first][NT][16].
template <class Ops, int NT>
static void expanded_product(const Product &p, int first, int last, float *out) {
  constexpr int MR = Ops::kExpandedRows;
  const Gemm &gemm = *p.gemm;
  alignas(64) float weights[kExpandedSteps * 16 * 2 * NT * kPanelColumns];
  if (!p.accumulate) __builtin_memset(out, 0, (uint64_t)(last - first) * NT * kPanelColumns * sizeof(float));
  for (int step0 = p.first_step; step0 < p.last_step(); step0 += kExpandedSteps) {
    const int steps = least(p.last_step() - step0, kExpandedSteps);
    float *to = weights;
    for (int s = 0; s < steps; s++) {
      for (int j = 0; j < NT; j++) {
        const uint8_t *tile =
            p.tiles + j * p.tile_stride_bytes + (step0 - p.first_step + s) * p.step_stride_bytes;
        if (!p.in_cache) fetch_tile_ahead<Bf16, Ops::template kReadAheadBytes<Bf16>>(tile);
        for (int pair = 0; pair < 16; pair++) {
          const typename Ops::WB split = Ops::split_bf16(tile + pair * 64);
          Ops::store_f(to + (2 * NT * pair + j) * kPanelColumns, split.even);
          Ops::store_f(to + (2 * NT * pair + NT + j) * kPanelColumns, split.odd);
        }
      }
      to += 16 * 2 * NT * kPanelColumns;
    }
    int row = first;
    for (; row + MR <= last; row += MR) {
      RowAddress rows[MR];
      for (int r = 0; r < MR; r++) rows[r] = row_address(p.rows.data, gemm, p.row_count, row + r);
      expanded_rows<Ops, NT, MR>(weights, steps, rows, step0, out + (row - first) * NT * kPanelColumns);
    }
    for (; row < last; row++) {
      const RowAddress rows = row_address(p.rows.data, gemm, p.row_count, row);
      expanded_rows<Ops, NT, 1>(weights, steps, &rows, step0, out + (row - first) * NT * kPanelColumns);
    }
  }
}
