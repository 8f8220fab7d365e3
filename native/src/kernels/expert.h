// One expert's share of a layer: gate, up and activation into the rows of the down projection; the down
// projection, weighted, into the tokens' sums; and those sums into the output.
//
// A pass takes as many rows as the second-level cache holds over a run of weight panels, so that weights
// come from memory once a pass and rows from cache for every panel but the first.
#pragma once

#include "kernels/activation.h"
#include "kernels/product.h"
#include "kernels/rows.h"

// Integer products are exact, so only bf16 must keep to one kernel family for a strict layer.
template <class Ops, class Format>
KTK_INLINE bool uses_tiles(int32_t rows, int32_t strict) {
  return Ops::kTileRows > 0 && (rows >= Ops::kTileRows || (strict && !Format::kInteger));
}

KTK_INLINE int least(int a, int b) { return a < b ? a : b; }

// A third of the 1 to 2 MiB of a core's second-level cache, which hyper-threads share.
KTK_INLINE int pass_rows(const Gemm &gemm) {
  const int rows = (640 << 10) / (gemm.steps * kStepBytes) / kGroupRows * kGroupRows;
  return rows < 2 * kGroupRows ? 2 * kGroupRows : least(rows, kPassRows);
}

// Rows [first, last), beginning a block. out: [last - first][NT][16].
template <class Ops, class Format, int NT>
KTK_INLINE void product(const Product &p, bool tiles, int first, int last, float *out) {
#ifdef KTK_ISA_HAS_TILES
  if (tiles) return tile_product<Ops, Format, NT>(p, first, last, out);
#else
  (void)tiles;
#endif
  for (int row = first; row < last; row += kBlockRows) {
    vector_product<Ops, Format, NT, Ops::kBlockMaxRows>(p, row, least(row + kBlockRows, last),
                                                        out + (row - first) * NT * kPanelColumns);
  }
}

// NT tiles, gate and up by turns, from intermediate column `column` of the group at `group`: the activation
// of rows [pass, pass_stop) into args->scratch, [pass_stop - pass][kIntermediateGroup].
template <class Ops, class Format, int NT>
KTK_INLINE void gate_up_panels(const GateUpArgs *args, bool tiles, int group, int column, int pass,
                               int pass_stop) {
  const Gemm &gemm = *args->gemm;
  const int64_t panel = column / kPanelColumns;
  const int64_t panel_bytes = (int64_t)gemm.steps * 2 * Format::kTileBytes;
  const int64_t panel_scales = (int64_t)gemm.weight_groups * 2 * kPanelColumns;
  const Product p = {args->gemm,
                     args->weights.tiles + panel * panel_bytes,
                     Format::kTileBytes,
                     panel_bytes,
                     2 * Format::kTileBytes,
                     args->weights.scale + panel * panel_scales * (gemm.scale_is_bf16 ? 2 : 4),
                     args->weights.zero + panel * panel_scales,
                     kPanelColumns,
                     panel_scales,
                     2 * kPanelColumns,
                     args->input,
                     args->rows};
  float *sums = args->scratch + kPassRows * kIntermediateGroup;
  const int group_rows = tiles ? kPassRows : kGroupRows;
  for (int row = pass; row < pass_stop; row += group_rows) {
    const int row_stop = least(row + group_rows, pass_stop);
    product<Ops, Format, NT>(p, tiles, row, row_stop, sums);
    for (int r = row; r < row_stop; r++) {
      for (int pair = 0; pair < NT / 2; pair++) {
        const int c = column + pair * kPanelColumns;
        const float *sum = sums + ((r - row) * NT + 2 * pair) * kPanelColumns;
        typename Ops::F gate = Ops::load_f(sum);
        typename Ops::F up = Ops::load_f(sum + kPanelColumns);
        if (args->gate_bias != nullptr) gate = Ops::add(gate, Ops::load_f(args->gate_bias + c));
        if (args->up_bias != nullptr) up = Ops::add(up, Ops::load_f(args->up_bias + c));
        Ops::store_f(args->scratch + (r - pass) * kIntermediateGroup + (c - group),
                     gated_activation<Ops>(gate, up, args->limit, args->alpha));
      }
    }
  }
}

template <class Ops, class Format>
static void gate_up(const GateUpArgs *args) {
  const Gemm &next = *args->next;
  const bool tiles = uses_tiles<Ops, Format>(args->rows, args->strict);
  const int rows_of_pass = pass_rows(*args->gemm);
  for (int pass = 0; pass < args->rows; pass += rows_of_pass) {
    const int pass_stop = least(pass + rows_of_pass, args->rows);
    for (int group = args->first_column; group < args->last_column; group += kIntermediateGroup) {
      const int stop = least(group + kIntermediateGroup, args->last_column);
      int column = group;
      for (; tiles && column + kPanelColumns < stop; column += 2 * kPanelColumns) {
        gate_up_panels<Ops, Format, 4>(args, tiles, group, column, pass, pass_stop);
      }
      for (; column < stop; column += kPanelColumns) {
        gate_up_panels<Ops, Format, 2>(args, tiles, group, column, pass, pass_stop);
      }
      for (int row = pass; row < pass_stop; row++) {
        const float *values = args->scratch + (row - pass) * kIntermediateGroup;
        const RowAddress to = row_address(args->output.data, next, args->rows, row);
        uint8_t *first_step = to.data + group / Format::kStepColumns * to.step_stride_bytes;
        if constexpr (Format::kInteger) {
          const int64_t index = group / kIntermediateGroup;
          quantise_group<Ops>(
              values, KTK_DTYPE_F32, 0, stop - group, segment_columns(next, Format::kStepColumns), first_step,
              to.step_stride_bytes, args->output.scale + (int64_t)row * next.row_groups + index,
              args->output.sum + (int64_t)row * next.segments + index * next.segments_per_row_group);
        } else {
          round_group<Ops>(values, KTK_DTYPE_F32, 0, stop - group, first_step, to.step_stride_bytes);
        }
      }
    }
  }
}

// NT output panels from `panel`, rows [pass, pass_stop).
template <class Ops, class Format, int NT>
KTK_INLINE void down_panels(const DownArgs *args, bool tiles, int panel, int pass, int pass_stop) {
  const Gemm &gemm = *args->gemm;
  const int64_t panel_bytes = (int64_t)gemm.steps * Format::kTileBytes;
  const int64_t panel_scales = (int64_t)gemm.weight_groups * kPanelColumns;
  const int64_t width = (int64_t)(args->last_panel - args->first_panel) * kPanelColumns;
  const Product p = {args->gemm,
                     args->weights.tiles + panel * panel_bytes,
                     panel_bytes,
                     2 * panel_bytes,
                     Format::kTileBytes,
                     args->weights.scale + panel * panel_scales * (gemm.scale_is_bf16 ? 2 : 4),
                     args->weights.zero + panel * panel_scales,
                     panel_scales,
                     2 * panel_scales,
                     kPanelColumns,
                     args->input,
                     args->rows};
  const int group_rows = tiles ? kPassRows : kGroupRows;
  for (int row = pass; row < pass_stop; row += group_rows) {
    const int row_stop = least(row + group_rows, pass_stop);
    product<Ops, Format, NT>(p, tiles, row, row_stop, args->scratch);
    for (int r = row; r < row_stop; r++) {
      const typename Ops::F weight = Ops::set1_f(args->expert_weights[r]);
      float *target = args->sum + args->tokens[r] * width + (panel - args->first_panel) * kPanelColumns;
      for (int j = 0; j < NT; j++) {
        typename Ops::F y = Ops::load_f(args->scratch + ((r - row) * NT + j) * kPanelColumns);
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
  const int rows_of_pass = pass_rows(*args->gemm);
  for (int pass = 0; pass < args->rows; pass += rows_of_pass) {
    const int pass_stop = least(pass + rows_of_pass, args->rows);
    int panel = args->first_panel;
    for (; tiles && panel + 4 <= args->last_panel; panel += 4) {
      down_panels<Ops, Format, 4>(args, tiles, panel, pass, pass_stop);
    }
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
