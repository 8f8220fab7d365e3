// One expert's share of a layer: gate, up and activation into the rows of the down projection; the down
// projection, weighted, into the tokens' sums; and those sums into the output.
//
// Rows are taken in passes, so that weights come from memory once a pass, and rows and sums from cache.
#pragma once

#include "kernels/activation.h"
#include "kernels/expanded_product.h"
#include "kernels/product.h"
#include "kernels/rows.h"

// Integer products are exact, so only bf16 must keep to one kernel family for a strict layer.
template <class Ops, class Format>
KTK_INLINE bool uses_tiles(int32_t rows, int32_t strict) {
  constexpr int32_t kLeast = Ops::template kTileRows<Format>;
  return kLeast > 0 && (rows >= kLeast || (strict && !Format::kInteger));
}

// Rows of one pass over `tiles` tiles of weights: on matrix units, passes of equal height in whole blocks of
// rows, whose sums fit the scratch; on vectors, as many rows as take half of a 2 MiB second-level cache, or
// what kExpandedBytes says.
template <class Ops, class Format>
KTK_INLINE int pass_rows(const Gemm &gemm, bool matrix_units, int tiles, int rows) {
  if (matrix_units) {
    const int most = least(kSumFloats / (tiles * kPanelColumns) / kBlockRows * kBlockRows, kPassRows);
    const int passes = (rows + most - 1) / most;
    return (rows + passes * kBlockRows - 1) / (passes * kBlockRows) * kBlockRows;
  }
  int bytes = 1 << 20;
  if constexpr (!Format::kInteger && Ops::kExpandedRows > 0) bytes = Ops::kExpandedBytes;
  const int fitting = bytes / (gemm.steps * kStepBytes) / kGroupRows * kGroupRows;
  return fitting < 2 * kGroupRows ? 2 * kGroupRows : least(fitting, kPassRows);
}

// Whether products of so many rows turn each weight into something else first, for all of them.
template <class Ops, class Format>
KTK_INLINE bool expands_weights(int rows) {
  if constexpr (Format::kScaledToBf16) return true;
  if constexpr (!Format::kInteger && Ops::kExpandedRows > 0) return rows >= Ops::kExpandedLeast;
  return false;
}

template <class Ops, class Format>
static void scaled_pair(const Product &p, int count, int first, int last, float *out);

// Rows [first, last), which begin a block, times the pair of tiles that `p` begins with, or times the first
// alone where `count` is 1; out [last - first][count][16].
template <class Ops, class Format>
KTK_INLINE void pair_product(const Product &p, int count, int first, int last, float *out) {
  if constexpr (Format::kScaledToBf16) {
    scaled_pair<Ops, Format>(p, count, first, last, out);
    return;
  } else {
    if constexpr (!Format::kInteger && Ops::kExpandedRows > 0) {
      if (expands_weights<Ops, Format>(last - first)) {
        if (count == 2) {
          expanded_product<Ops, 2>(p, first, last, out);
        } else {
          expanded_product<Ops, 1>(p, first, last, out);
        }
        return;
      }
    }
    for (int row = first; row < last; row += kBlockRows) {
      const int stop = least(row + kBlockRows, last);
      float *sums = out + (row - first) * count * kPanelColumns;
      if (count == 2) {
        vector_pair<Ops, Format>(p, row, stop, sums);
      } else {
        vector_product<Ops, Format, 1>(p, row, stop, sums, kPanelColumns);
      }
    }
  }
}

// Where the last block of rows ends that is slow enough for memory to keep up with: a whole one, or nearly.
// The first rows of all do not count, which wait for memory themselves.
KTK_INLINE int last_whole_block(int first, int last) {
  constexpr int kNearlyWhole = 13;
  const int whole = (last - first) / kBlockRows * kBlockRows;
  if (whole > 0) return first + whole;
  return last - first >= kNearlyWhole ? last : -1;
}

// A pair of tiles that turn into bf16 ones, a few steps at a time.
template <class Ops, class Format>
static void scaled_pair(const Product &p, int count, int first, int last, float *out) {
  constexpr int kSteps = Format::kStepsOfScale;
  alignas(64) uint8_t expanded[2][kSteps][Bf16::kTileBytes];
  Product part = p;
  part.tiles = expanded[0][0];
  part.tile_stride_bytes = kSteps * Bf16::kTileBytes;
  part.step_stride_bytes = Bf16::kTileBytes;
  part.in_cache = true;
  part.fetch_row = -1;
  for (int step0 = 0; step0 < p.gemm->steps; step0 += kSteps) {
    part.first_step = step0;
    part.step_stop = step0 + kSteps;
    part.accumulate = p.accumulate || step0 > 0;
    for (int j = 0; j < count; j++) {
      for (int step = step0; step < part.last_step(); step++) {
        const uint8_t *tile = p.tiles + step * p.step_stride_bytes + p.tile_offset_bytes(j);
        fetch_tile_ahead<Format, Ops::template kReadAheadBytes<Format>>(tile);
        expand_tile<Ops, Format>(p, step, j, expanded[j][step - step0]);
      }
    }
    pair_product<Ops, Bf16>(part, count, first, last, out);
  }
}

// Tiles [0, tile_count) of a product, and of `lora` on top of it unless that is null, some at a time: calls
// use(first of them, how many, row, sums, stride) for each row of [first, last), which begins a block; 16
// sums of one tile lie together, `stride` floats from those of the next. `scratch`: kSumFloats.
template <class Ops, class Format, class Use>
KTK_INLINE void product(const Product &p, bool tiles, int tile_count, int first, int last, float *scratch,
                        Use use, const Product *lora = nullptr) {
#ifdef KTK_ISA_HAS_TILES
  if (tiles) {
    tile_product<Ops, Format>(p, tile_count, first, last, scratch);
    const auto scale = [&](int block) {
      const int row = first + block * kBlockRows;
      float *sums = tile_sums(scratch, block, tile_count, 0);
      scale_sums<Ops, Format>(p, tile_count, row, least(last - row, kBlockRows), sums);
    };
    const int blocks = (last - first + kBlockRows - 1) / kBlockRows;
    if (lora != nullptr) {
      for (int block = 0; block < blocks; block++) scale(block);
      tile_product<Ops, Bf16>(*lora, tile_count, first, last, scratch);
    }
    for (int block = 0; block < blocks; block++) {
      if (lora == nullptr) scale(block);
      const float *sums = tile_sums(scratch, block, tile_count, 0);
      for (int row = first + block * kBlockRows; row < least(last, first + (block + 1) * kBlockRows); row++) {
        use(0, tile_count, row, sums, kSumTileFloats);
        sums += kPanelColumns;
      }
    }
    return;
  }
#else
  (void)tiles;
#endif
  for (int tile = 0; tile < tile_count; tile += 2) {
    Product pair = p.from_tile(tile);
    const int count = least(tile_count - tile, 2);
    if (tile + 4 <= tile_count) {
      pair.next_bytes = p.pair_stride_bytes;
      pair.fetch_row = last_whole_block(first, last);
    }
    const int rows = expands_weights<Ops, Format>(last - first) ? last - first : kGroupRows;
    for (int group = first; group < last; group += rows) {
      const int stop = least(group + rows, last);
      pair_product<Ops, Format>(pair, count, group, stop, scratch);
      if (lora != nullptr) pair_product<Ops, Bf16>(lora->from_tile(tile), count, group, stop, scratch);
      for (int row = group; row < stop; row++)
        use(tile, count, row, scratch + (row - group) * count * kPanelColumns, kPanelColumns);
    }
  }
}

// A product of bf16 operands: panels one after the other, or in pairs with `paired`.
KTK_INLINE Product bf16_product(const Gemm &gemm, const uint8_t *tiles, bool paired, uint8_t *rows,
                                int row_count, bool accumulate) {
  const int64_t panel_bytes = (int64_t)gemm.steps * Bf16::kTileBytes;
  Product p = {};
  p.gemm = &gemm;
  p.tiles = tiles;
  p.tile_stride_bytes = paired ? Bf16::kTileBytes : panel_bytes;
  p.pair_stride_bytes = 2 * panel_bytes;
  p.step_stride_bytes = paired ? 2 * Bf16::kTileBytes : Bf16::kTileBytes;
  p.rows.data = rows;
  p.row_count = row_count;
  p.accumulate = accumulate;
  return p;
}

// 16 columns of gate and up of one row, before the activation, for the way back.
template <class Ops>
KTK_INLINE void save_gate_up(const GateUpTraining &training, int row, int column, typename Ops::F gate,
                             typename Ops::F up) {
  uint16_t *saved = training.saved + row * training.saved_stride;
  store_values<Ops>(saved, KTK_DTYPE_BF16, column, training.saved_columns, gate);
  store_values<Ops>(saved + training.saved_columns, KTK_DTYPE_BF16, column, training.saved_columns, up);
}

// Columns of whole groups of the intermediate (on vectors, of one), or of a part of one, and then whoever is
// the last to compute a part makes int8 of the group.
template <class Ops, class Format>
static void gate_up_columns(const GateUpArgs *args, int first_column, int last_column, bool tiles) {
  const Gemm &gemm = *args->gemm;
  const Gemm &next = *args->next;
  const int columns = last_column - first_column;
  const int tile_count = (columns + kPanelColumns - 1) / kPanelColumns * 2;
  const int rows_of_pass = pass_rows<Ops, Format>(gemm, tiles, tile_count, args->rows);
  const int64_t panel_bytes = (int64_t)gemm.steps * 2 * Format::kTileBytes;
  const int64_t panel_scales = (int64_t)gemm.weight_groups * 2 * kPanelColumns;
  const int64_t panel_factors = (int64_t)gemm.factor_groups * 2 * kFactorBytes;
  const int64_t panel = first_column / kPanelColumns;
  const Product p = {args->gemm,
                     args->weights.tiles + panel * panel_bytes,
                     Format::kTileBytes,
                     panel_bytes,
                     2 * Format::kTileBytes,
                     args->weights.scale + panel * panel_scales * (gemm.scale_is_bf16 ? 2 : 4),
                     kPanelColumns,
                     panel_scales,
                     2 * kPanelColumns,
                     args->weights.factors + panel * panel_factors,
                     kFactorBytes,
                     panel_factors,
                     2 * kFactorBytes,
                     args->input,
                     args->rows};
  const GateUpTraining *training = args->training;
  const LoraProduct *lora = training != nullptr ? training->lora : nullptr;
  Product added = {};
  if (lora != nullptr) {
    added = bf16_product(*lora->gemm, lora->tiles + panel * 2 * lora->gemm->steps * Bf16::kTileBytes, true,
                         lora->rows, args->rows, true);
  }

  // Activations of a group wait in a row of their own, unless those of a row are not made together.
  const bool shared = Format::kInteger && args->group_values != nullptr;
  const int group_columns = next.row_group_columns;
  float *activated = shared ? args->group_values : args->scratch + kSumFloats;
  const int64_t activated_stride = tiles && !shared ? 0 : group_columns;
  // Stores what there is of a group at once: all of it, where its columns share a scale.
  const auto start_of = [&](int group) {
    return !Format::kInteger && first_column > group ? first_column : group;
  };
  const auto finish_row = [&](int row, int group, float *values) {
    const int from = start_of(group);
    const int stop = Format::kInteger ? next.depth : last_column;
    const int count = least(group + group_columns, stop) - from;
    const RowAddress to = row_address(args->output.data, next, args->rows, row);
    uint8_t *first_step = to.data + from / Format::kStepColumns * to.step_stride_bytes;
    if (training != nullptr && training->z != nullptr) {
      const RowAddress z = row_address(training->z, *training->z_gemm, args->rows, row);
      round_group<Ops>(values, KTK_DTYPE_F32, 0, count,
                       z.data + from / Bf16::kStepColumns * z.step_stride_bytes, z.step_stride_bytes);
    }
    if constexpr (Format::kInteger) {
      const int64_t index = group / group_columns;
      if (next.rotated) rotate_values<Ops>(values, count);
      quantise_group<Ops, Format::kFactors>(
          values, KTK_DTYPE_F32, 0, count, false, sum_columns<Format>(next), first_step, to.step_stride_bytes,
          args->output.scale + (int64_t)row * next.row_groups + index,
          args->output.sum + (int64_t)row * next.sums + index * next.sums_per_row_group);
    } else {
      round_group<Ops>(values, KTK_DTYPE_F32, 0, count, first_step, to.step_stride_bytes);
    }
  };

  for (int pass = 0; pass < args->rows; pass += rows_of_pass) {
    const int pass_stop = least(pass + rows_of_pass, args->rows);
    product<Ops, Format>(
        p, tiles, tile_count, pass, pass_stop, args->scratch,
        [&](int tile, int tiles_here, int row, const float *sums, int64_t stride) {
          float *values = activated + (shared ? row : row - pass) * activated_stride;
          for (int j = 0; j < tiles_here; j += 2) {
            const int column = first_column + (tile + j) / 2 * kPanelColumns;
            const int group = column / group_columns * group_columns;
            typename Ops::F gate = Ops::load_f(sums + j * stride);
            typename Ops::F up = Ops::load_f(sums + (j + 1) * stride);
            if (args->gate_bias != nullptr) gate = Ops::add(gate, Ops::load_f(args->gate_bias + column));
            if (args->up_bias != nullptr) up = Ops::add(up, Ops::load_f(args->up_bias + column));
            if (training != nullptr && training->saved != nullptr)
              save_gate_up<Ops>(*training, row, column, gate, up);
            Ops::store_f(values + column - start_of(group),
                         gated_activation<Ops>(gate, up, args->limit, args->alpha));
            const bool last = column + kPanelColumns >= least(group + group_columns, last_column);
            if (last && !shared) finish_row(row, group, values);
          }
        },
        lora != nullptr ? &added : nullptr);
  }
  if (!shared || __atomic_sub_fetch(args->parts_left, 1, __ATOMIC_ACQ_REL) > 0) return;
  const int group = first_column / group_columns * group_columns;
  for (int row = 0; row < args->rows; row++) finish_row(row, group, activated + (int64_t)row * group_columns);
}

template <class Ops, class Format>
static void gate_up(const GateUpArgs *args) {
  const bool tiles = uses_tiles<Ops, Format>(args->rows, args->strict);
  const int width = tiles ? kMostUnitColumns : args->next->row_group_columns;
  for (int column = args->first_column; column < args->last_column; column += width)
    gate_up_columns<Ops, Format>(args, column, least(column + width, args->last_column), tiles);
}

template <class Ops, class Format>
static void down(const DownArgs *args) {
  const Gemm &gemm = *args->gemm;
  const bool tiles = uses_tiles<Ops, Format>(args->rows, args->strict);
  const int panels = args->last_panel - args->first_panel;
  const int rows_of_pass = pass_rows<Ops, Format>(gemm, tiles, panels, args->last_row - args->first_row);
  const int64_t panel_bytes = (int64_t)gemm.steps * Format::kTileBytes;
  const int64_t panel_scales = (int64_t)gemm.weight_groups * kPanelColumns;
  const int64_t panel_factors = (int64_t)gemm.factor_groups * kFactorBytes;
  const Product p = {args->gemm,
                     args->weights.tiles + args->first_panel * panel_bytes,
                     panel_bytes,
                     2 * panel_bytes,
                     Format::kTileBytes,
                     args->weights.scale + args->first_panel * panel_scales * (gemm.scale_is_bf16 ? 2 : 4),
                     panel_scales,
                     2 * panel_scales,
                     kPanelColumns,
                     args->weights.factors + args->first_panel * panel_factors,
                     panel_factors,
                     2 * panel_factors,
                     kFactorBytes,
                     args->input,
                     args->rows};
  Product added = {};
  if (args->lora != nullptr) {
    const Gemm &rank = *args->lora->gemm;
    added = bf16_product(rank, args->lora->tiles + (int64_t)args->first_panel * rank.steps * Bf16::kTileBytes,
                         false, args->lora->rows, args->rows, true);
  }
  bool waits = args->await_turn != nullptr;
  for (int pass = args->first_row; pass < args->last_row; pass += rows_of_pass) {
    product<Ops, Format>(
        p, tiles, panels, pass, least(pass + rows_of_pass, args->last_row), args->scratch,
        [&](int tile, int count, int row, const float *sums, int64_t stride) {
          if (waits) args->await_turn(args->turn);
          waits = false;
          const typename Ops::F weight = Ops::set1_f(args->expert_weights[row]);
          const auto sum_of = [&](int index) {
            return args->sum + args->tokens[index] * args->sum_stride + tile * kPanelColumns;
          };
          float *target = sum_of(row);
          // Sums of tokens far apart: the hardware does not foresee them.
          const float *soon = sum_of(least(row + kBlockRows, args->last_row - 1));
          for (int j = 0; j < count; j++) __builtin_prefetch(soon + j * kPanelColumns, 0, 2);
          for (int j = 0; j < count; j++) {
            typename Ops::F y = Ops::load_f(sums + j * stride);
            if (args->bias != nullptr) {
              y = Ops::add(
                  y, load_values<Ops>(args->bias, KTK_DTYPE_F32,
                                      (args->first_panel + tile + j) * kPanelColumns, args->hidden_size));
            }
            Ops::store_f(target + j * kPanelColumns,
                         Ops::fma(weight, y, Ops::load_f(target + j * kPanelColumns)));
          }
        },
        args->lora != nullptr ? &added : nullptr);
  }
}

template <class Ops>
static void finish(const FinishArgs *args) {
  const int64_t value_bytes = args->dtype == KTK_DTYPE_F32 ? 4 : 2;
  for (int64_t t = args->first_token; t < args->last_token; t++) {
    void *output = (uint8_t *)args->output + t * args->hidden_size * value_bytes;
    for (int64_t block = args->first_column; block < args->last_column; block += kRotation) {
      typename Ops::F sums[kRotationVectors];
      for (int i = 0; i < kRotationVectors; i++) {
        const int64_t c = block + i * kPanelColumns, at = t * args->part_stride + c - args->first_column;
        sums[i] = Ops::zero_f();
        if (c >= args->last_column) continue;
        sums[i] = Ops::load_f(args->parts[0] + at);
        for (int part = 1; part < args->part_count; part++)
          sums[i] = Ops::add(sums[i], Ops::load_f(args->parts[part] + at));
      }
      if (args->rotated && block + kRotation <= args->hidden_size) rotate<Ops>(sums);
      for (int i = 0; i < kRotationVectors; i++) {
        const int64_t c = block + i * kPanelColumns;
        if (c >= args->last_column) break;
        typename Ops::F sum = sums[i];
        if (args->incremental)
          sum = Ops::add(sum, load_values<Ops>(output, args->dtype, c, args->last_column));
        store_values<Ops>(output, args->dtype, c, args->last_column, sum);
      }
    }
  }
}
