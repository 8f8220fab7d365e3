// One expert's share of a layer: gate, up and activation into the rows of the down projection; the down
// projection, weighted, into the tokens' sums; and those sums into the output.
//
// A pass takes up to kPassRows rows over a run of weight panels, so that weights come from memory once and
// from cache for every further group of rows.
#pragma once

#include "kernels/activation.h"
#include "kernels/product.h"
#include "kernels/rows.h"

// Rows [first, last), at most kGroupRows, beginning a block.
template <class Ops, class Format, int NT>
KTK_INLINE void product(const Product &p, bool tiles, int first, int last, float *out) {
#ifdef KTK_ISA_HAS_TILES
  if (tiles) return tile_product<Ops, Format, NT>(p, first, last, out);
#else
  (void)tiles;
#endif
  for (int row = first; row < last; row += kBlockRows) {
    const int stop = row + kBlockRows < last ? row + kBlockRows : last;
    vector_product<Ops, Format, NT, Ops::kBlockMaxRows>(p, row, stop,
                                                        out + (row - first) * NT * kPanelColumns);
  }
}

// Integer products are exact, so only bf16 must keep to one kernel family for a strict layer.
template <class Ops, class Format>
KTK_INLINE bool uses_tiles(int32_t rows, int32_t strict) {
  return Ops::kTileRows > 0 && (rows >= Ops::kTileRows || (strict && !Format::kInteger));
}

template <class Ops, class Format>
static void gate_up(const GateUpArgs *args) {
  const Gemm &gemm = *args->gemm;
  const Gemm &next = *args->next;
  const bool tiles = uses_tiles<Ops, Format>(args->rows, args->strict);
  const int64_t panel_bytes = (int64_t)gemm.steps * 2 * Format::kTileBytes;
  const int64_t scale_bytes = gemm.scale_is_bf16 ? 2 : 4;
  const int64_t panel_scales = (int64_t)gemm.weight_groups * 2 * kPanelColumns;
  alignas(64) float sums[kGroupRows * 2 * kPanelColumns];

  for (int column = args->first_column; column < args->last_column; column += kIntermediateGroup) {
    const int stop =
        column + kIntermediateGroup < args->last_column ? column + kIntermediateGroup : args->last_column;
    for (int pass = 0; pass < args->rows; pass += kPassRows) {
      const int pass_stop = pass + kPassRows < args->rows ? pass + kPassRows : args->rows;
      for (int c = column; c < stop; c += kPanelColumns) {
        const int64_t panel = c / kPanelColumns;
        const Product p = {args->gemm,
                           args->weights.tiles + panel * panel_bytes,
                           Format::kTileBytes,
                           2 * Format::kTileBytes,
                           args->weights.scale + panel * panel_scales * scale_bytes,
                           args->weights.zero + panel * panel_scales,
                           kPanelColumns,
                           2 * kPanelColumns,
                           args->input,
                           args->rows};
        for (int row = pass; row < pass_stop; row += kGroupRows) {
          const int row_stop = row + kGroupRows < pass_stop ? row + kGroupRows : pass_stop;
          product<Ops, Format, 2>(p, tiles, row, row_stop, sums);
          for (int r = 0; r < row_stop - row; r++) {
            typename Ops::F gate = Ops::load_f(sums + r * 2 * kPanelColumns);
            typename Ops::F up = Ops::load_f(sums + (r * 2 + 1) * kPanelColumns);
            if (args->gate_bias != nullptr) gate = Ops::add(gate, Ops::load_f(args->gate_bias + c));
            if (args->up_bias != nullptr) up = Ops::add(up, Ops::load_f(args->up_bias + c));
            Ops::store_f(args->scratch + (row + r - pass) * kIntermediateGroup + (c - column),
                         gated_activation<Ops>(gate, up, args->limit, args->alpha));
          }
        }
      }
      for (int row = pass; row < pass_stop; row++) {
        const float *values = args->scratch + (row - pass) * kIntermediateGroup;
        const RowAddress to = row_address(args->output.data, next, args->rows, row);
        uint8_t *first_step = to.data + column / Format::kStepColumns * to.step_stride_bytes;
        if constexpr (Format::kInteger) {
          const int64_t group = column / kIntermediateGroup;
          quantise_group<Ops>(
              values, KTK_DTYPE_F32, 0, stop - column, segment_columns(next, Format::kStepColumns),
              first_step, to.step_stride_bytes, args->output.scale + (int64_t)row * next.row_groups + group,
              args->output.sum + (int64_t)row * next.segments + group * next.segments_per_row_group);
        } else {
          round_group<Ops>(values, KTK_DTYPE_F32, 0, stop - column, first_step, to.step_stride_bytes);
        }
      }
    }
  }
}

// NT panels from `panel`, rows [pass, pass_stop).
template <class Ops, class Format, int NT>
KTK_INLINE void down_panels(const DownArgs *args, bool tiles, int panel, int pass, int pass_stop) {
  const Gemm &gemm = *args->gemm;
  const int64_t panel_bytes = (int64_t)gemm.steps * Format::kTileBytes;
  const int64_t scale_bytes = gemm.scale_is_bf16 ? 2 : 4;
  const int64_t panel_scales = (int64_t)gemm.weight_groups * kPanelColumns;
  const int64_t width = (int64_t)(args->last_panel - args->first_panel) * kPanelColumns;
  const Product p = {args->gemm,
                     args->weights.tiles + panel * panel_bytes,
                     panel_bytes,
                     Format::kTileBytes,
                     args->weights.scale + panel * panel_scales * scale_bytes,
                     args->weights.zero + panel * panel_scales,
                     panel_scales,
                     kPanelColumns,
                     args->input,
                     args->rows};
  alignas(64) float sums[kGroupRows * NT * kPanelColumns];
  for (int row = pass; row < pass_stop; row += kGroupRows) {
    const int row_stop = row + kGroupRows < pass_stop ? row + kGroupRows : pass_stop;
    product<Ops, Format, NT>(p, tiles, row, row_stop, sums);
    for (int r = 0; r < row_stop - row; r++) {
      const typename Ops::F weight = Ops::set1_f(args->expert_weights[row + r]);
      float *target = args->sum + args->tokens[row + r] * width + (panel - args->first_panel) * kPanelColumns;
      for (int j = 0; j < NT; j++) {
        typename Ops::F y = Ops::load_f(sums + (r * NT + j) * kPanelColumns);
        if (args->bias != nullptr) {
          y = Ops::add(
              y, load_values<Ops>(args->bias, KTK_DTYPE_F32, (panel + j) * kPanelColumns, args->hidden_size));
        }
        Ops::store_f(target + j * kPanelColumns,
                     Ops::fma(weight, y, Ops::load_f(target + j * kPanelColumns)));
      }
    }
  }
}

template <class Ops, class Format>
static void down(const DownArgs *args) {
  const bool tiles = uses_tiles<Ops, Format>(args->rows, args->strict);
  for (int pass = 0; pass < args->rows; pass += kPassRows) {
    const int pass_stop = pass + kPassRows < args->rows ? pass + kPassRows : args->rows;
    int panel = args->first_panel;
    for (; panel + 2 <= args->last_panel; panel += 2) {
      down_panels<Ops, Format, 2>(args, tiles, panel, pass, pass_stop);
    }
    if (panel < args->last_panel) down_panels<Ops, Format, 1>(args, tiles, panel, pass, pass_stop);
  }
}

template <class Ops>
static void finish(const FinishArgs *args) {
  const int64_t value_bytes = args->dtype == KTK_DTYPE_F32 ? 4 : 2;
  for (int64_t t = args->first_token; t < args->last_token; t++) {
    void *output = (uint8_t *)args->output + t * args->hidden_size * value_bytes;
    for (int64_t c = args->first_column; c < args->last_column; c += kPanelColumns) {
      const int64_t at = t * args->part_stride + c - args->first_column;
      typename Ops::F sum = Ops::load_f(args->parts[0] + at);
      for (int part = 1; part < args->part_count; part++)
        sum = Ops::add(sum, Ops::load_f(args->parts[part] + at));
      if (args->incremental) sum = Ops::add(sum, load_values<Ops>(output, args->dtype, c, args->last_column));
      store_values<Ops>(output, args->dtype, c, args->last_column, sum);
    }
  }
}
