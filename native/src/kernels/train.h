// Operands of the products that training adds to a forward, and what happens to their results.
#pragma once

#include "kernels/activation.h"
#include "kernels/expert.h"
#include "kernels/product.h"
#include "kernels/rows.h"

// ---- reading ------------------------------------------------------------------------------------------

// 16 random bits and more for each feature of a row: `row_key` mixes key and row, and the 32-bit finaliser
// "lowbias32" (Wellons, hash prospector) mixes in the feature. docs/numerics.md spells it out.
KTK_INLINE uint64_t mix64(uint64_t x) {
  // splitmix64 (Steele, Lea, Flood 2014).
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

template <class Ops>
KTK_INLINE typename Ops::F dropout_factors(const Dropout &dropout, int32_t row, int64_t feature) {
  typedef typename Ops::I I;
  alignas(64) static const int32_t kLanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const uint64_t row_key = mix64(dropout.key ^ mix64((uint64_t)(uint32_t)row));
  I x = Ops::add_i(Ops::load_i(kLanes), Ops::set1_i((int32_t)feature));
  x = Ops::add_i(x, Ops::set1_i((int32_t)(uint32_t)row_key));
  x = Ops::xor_i(x, Ops::shift_right_i(x, 16));
  x = Ops::mul_i(x, Ops::set1_i(0x21f0aaad));
  x = Ops::xor_i(x, Ops::set1_i((int32_t)(uint32_t)(row_key >> 32)));
  x = Ops::xor_i(x, Ops::shift_right_i(x, 15));
  x = Ops::mul_i(x, Ops::set1_i(0x735a2d97));
  x = Ops::xor_i(x, Ops::shift_right_i(x, 15));
  // 24 bits are exact in fp32; at or above the threshold the difference plus 1 is at least 1.
  const typename Ops::F above =
      Ops::from_i(Ops::sub_i(Ops::shift_right_i(x, 8), Ops::set1_i(dropout.threshold - 1)));
  const typename Ops::F kept = Ops::min(Ops::set1_f(1.0f), Ops::max(Ops::zero_f(), above));
  return Ops::mul(kept, Ops::set1_f(dropout.scale));
}

// 16 values of row `index` of a source from `column` on, which is on 16; zeros past the end.
template <class Ops>
KTK_INLINE typename Ops::F load_source(const Source &source, int index, int64_t column) {
  const int64_t row = source.rows != nullptr ? source.rows[index] : source.first_row + index;
  typename Ops::F v;
  if (source.operand != nullptr) {
    const RowAddress address =
        row_address((uint8_t *)source.values, *source.operand, source.operand_rows, (int)row);
    v = Ops::load_bf16(
        (const uint16_t *)(address.data + column / Bf16::kStepColumns * address.step_stride_bytes) +
        column % Bf16::kStepColumns);
  } else {
    const int64_t width = source.dtype == KTK_DTYPE_F32 ? 4 : 2;
    v = load_values<Ops>((const uint8_t *)source.values + row * source.stride * width, source.dtype, column,
                         source.columns);
    if (source.dropout.threshold > 0 && source.dtype == KTK_DTYPE_F32) {
      // It is the rounded input that is dropped and scaled, as where a context has kept that one.
      uint16_t rounded[16];
      Ops::store_bf16(rounded, v);
      v = Ops::load_bf16(rounded);
    }
  }
  if (source.dropout.threshold > 0) {
    const int32_t key_row = source.dropout_rows != nullptr ? source.dropout_rows[index] : (int32_t)row;
    v = Ops::mul(v, dropout_factors<Ops>(source.dropout, key_row, source.dropout_column + column));
  }
  return v;
}

// ---- operands -----------------------------------------------------------------------------------------

template <class Ops>
static void load_rows(const LoadRowsArgs *args) {
  const Gemm &gemm = *args->gemm;
  const int64_t end = (int64_t)gemm.steps * Bf16::kStepColumns;
  for (int row = args->first; row < args->last; row++) {
    const int index = row - args->first;
    const RowAddress to = row_address(args->to, gemm, args->rows, row);
    const typename Ops::F factor =
        Ops::set1_f(args->row_scale != nullptr ? args->scale * args->row_scale[index] : args->scale);
    const bool scaled = args->row_scale != nullptr || args->scale != 1.0f;
    for (int64_t c = 0; c < end; c += 16) {
      typename Ops::F v = c < gemm.depth ? load_source<Ops>(args->source, index, c) : Ops::zero_f();
      if (scaled) v = Ops::mul(v, factor);
      if (args->column_scale != nullptr && c < gemm.depth)
        v = Ops::mul(v, Ops::load_f(args->column_scale + c));
      Ops::store_bf16(
          (uint16_t *)(to.data + c / Bf16::kStepColumns * to.step_stride_bytes) + c % Bf16::kStepColumns, v);
    }
  }
}

template <class Ops>
static void transpose_rows(const TransposeRowsArgs *args) {
  const Gemm &gemm = *args->gemm;
  for (int column = 0; column < args->columns; column += 16) {
    const int count = least(args->columns - column, 16);
    for (int k = 0; k < gemm.steps * Bf16::kStepColumns; k += 16) {
      alignas(64) float block[16][16], turned[16 * 16];
      for (int i = 0; i < 16; i++) {
        const int index = args->first + k + i;
        typename Ops::F v = Ops::zero_f();
        if (k + i < gemm.depth) {
          const float factor =
              args->row_scale != nullptr ? args->scale * args->row_scale[index] : args->scale;
          v = Ops::mul(load_source<Ops>(args->source, index, args->first_column + column),
                       Ops::set1_f(factor));
        }
        Ops::store_f(block[i], v);
      }
      Ops::transpose(block, turned);
      for (int c = 0; c < count; c++) {
        const RowAddress to = row_address(args->to, gemm, args->columns, column + c);
        Ops::store_bf16(
            (uint16_t *)(to.data + k / Bf16::kStepColumns * to.step_stride_bytes) + k % Bf16::kStepColumns,
            Ops::load_f(turned + c * 16));
      }
    }
  }
}

template <class Ops>
static int32_t pack_tiles(const PackTilesArgs *args) {
  typename Ops::I largest = Ops::zero_i();
  for (int row = 0; row < args->rows; row++) {
    const int n = args->to_column + row;
    uint8_t *panel = args->tiles + n / kPanelColumns * args->panel_stride_bytes + n % kPanelColumns * 4;
    for (int c = 0; c < args->source.columns; c += 16) {
      const typename Ops::F v = load_source<Ops>(args->source, row, c);
      largest = larger_magnitude<Ops>(largest, Ops::as_i(v));
      uint16_t values[16];
      Ops::store_bf16(values, v);
      const int pairs = least(args->source.columns - c + 1, 16) / 2;
      for (int pair = 0; pair < pairs; pair++) {
        const int k = (args->to_depth + c) / 2 + pair;
        __builtin_memcpy(panel + k / 16 * args->step_stride_bytes + k % 16 * 64, values + 2 * pair, 4);
      }
    }
  }
  return Ops::reduce_max_i(largest) >= Bf16::kRoundsToInfinity;
}

template <class Ops>
static int32_t pack_pairs(const PackPairsArgs *args) {
  typename Ops::I largest = Ops::zero_i();
  const int64_t panel_bytes = (int64_t)args->steps * Bf16::kTileBytes;
  for (int column = 0; column < args->columns; column += kPanelColumns) {
    const int to_column = args->to_column + column;
    uint8_t *panel = args->tiles + to_column / kPanelColumns * panel_bytes;
    for (int row = 0; row < args->rows; row += 2) {
      const int index = args->first + row;
      const int64_t at = args->first_column + column;
      const typename Ops::F even = load_source<Ops>(args->source, index, at);
      const typename Ops::F odd =
          row + 1 < args->rows ? load_source<Ops>(args->source, index + 1, at) : Ops::zero_f();
      largest = larger_magnitude<Ops>(larger_magnitude<Ops>(largest, Ops::as_i(even)), Ops::as_i(odd));
      const int pair = (args->to_depth + row) / 2;
      const typename Ops::I words = Ops::join_bf16(even, odd);
      if (to_column % kPanelColumns == 0) {
        Ops::store_i(panel + (int64_t)pair * 64, words);
        continue;
      }
      uint8_t bytes[64];
      Ops::store_i(bytes, words);
      for (int n = 0; n < least(kPanelColumns, args->columns - column); n++) {
        const int to = to_column % kPanelColumns + n;
        __builtin_memcpy(
            panel + to / kPanelColumns * panel_bytes + (int64_t)pair * 64 + to % kPanelColumns * 4,
            bytes + n * 4, 4);
      }
    }
  }
  return Ops::reduce_max_i(largest) >= Bf16::kRoundsToInfinity;
}

// ---- the transposed product of a packed projection ----------------------------------------------------

// Where projection `which` of a panel has the tile of an input column.
template <class Format>
KTK_INLINE const uint8_t *tile_of_column(const ExpandArgs &args, int panel, int which, int column) {
  const int64_t tile =
      ((int64_t)panel * args.gemm->steps + column / Format::kStepColumns) * args.projections + which;
  return args.tiles + tile * Format::kTileBytes;
}

// Fetches what `expand` reads, in its order and ahead of it: what it reads of one panel lies apart from what
// it reads of the next.
template <class Format>
struct ExpandAhead {
  static constexpr int kPieces = Format::kStepColumns / 32;  // of a tile
  static constexpr int kPiecesAhead = 4;                     // measured: docs/benchmarks/log.md
  const ExpandArgs &args;
  int panel = 0, which = 0, column = 0;
  KTK_MEMBER explicit ExpandAhead(const ExpandArgs &all) : args(all) {
    for (int i = 0; i < kPiecesAhead; i++) fetch();
  }
  KTK_MEMBER void fetch() {
    if (panel >= args.panels) return;
    constexpr int kBytes = Format::kTileBytes / kPieces;
    const int at = args.first_column + column;
    const uint8_t *lines = tile_of_column<Format>(args, panel, which, at) + at / 32 % kPieces * kBytes;
    fetch_lines<kBytes>(lines);
    column += 32;
    if (column < args.columns) return;
    column = 0;
    which++;
    if (which < args.projections) return;
    which = 0;
    panel++;
  }
};

// A tile of 16 outputs and 32 inputs, [16 pairs of inputs][16 outputs][2], becomes the halves of two tiles of
// 16 inputs and 32 outputs each: 8 pairs of outputs.
template <class Ops, class Format>
static void expand(const ExpandArgs *args) {
  const Gemm &gemm = *args->gemm;
  const int projections = args->projections;
  const int64_t group_scales = projections * kPanelColumns;
  const int steps = (args->panels + 1) / 2 * projections;
  const int64_t out_panel_bytes = (int64_t)steps * Bf16::kTileBytes;
  const bool grouped = gemm.scale_is_bf16 != 0;
  ExpandAhead<Format> ahead(*args);
  for (int panel = 0; panel < (args->panels + 1) / 2 * 2; panel++) {
    for (int which = 0; which < projections; which++) {
      const int out_step = panel / 2 * projections + which;
      for (int c = 0; c < args->columns; c += 32) {
        const int column = args->first_column + c;
        uint8_t *to =
            args->to + c / 16 * out_panel_bytes + (int64_t)out_step * Bf16::kTileBytes + panel % 2 * 512;
        const bool second = c + 16 < args->columns;
        if (panel >= args->panels) {
          __builtin_memset(to, 0, 512);
          if (second) __builtin_memset(to + out_panel_bytes, 0, 512);
          continue;
        }
        ahead.fetch();
        const uint8_t *tile = tile_of_column<Format>(*args, panel, which, column);
        const int piece = column / 32 % ExpandAhead<Format>::kPieces;
        alignas(64) uint8_t words[1024];
        const uint8_t *pairs = tile;
        if constexpr (Format::kScaledToBf16) {
          const int64_t group = (int64_t)panel * gemm.weight_groups + column / kScaleBlock;
          const int64_t at = group * group_scales + which * kPanelColumns;
          Format::template expand_tile<Ops>(tile, Ops::load_f((const float *)args->scale + at), words);
          pairs = words;
        }
        if constexpr (Format::kInteger) {
          typename Ops::F scale = Ops::set1_f(1.0f);
          const uint8_t *factors = kNoFactors;
          const int64_t group = column / gemm.group_columns;
          if (grouped) {
            const int64_t at = (panel * gemm.weight_groups + group) * group_scales + which * kPanelColumns;
            scale = Ops::load_bf16((const uint16_t *)args->scale + at);
          } else if (gemm.factor_groups > 0) {
            factors =
                args->factors + ((panel * gemm.factor_groups + group) * projections + which) * kFactorBytes;
          }
          for (int pair = 0; pair < 16; pair++) {
            typename Ops::F even, odd;
            Format::template columns<Ops>(tile, piece * 16 + pair, factors, &even, &odd);
            if (grouped) {
              even = Ops::mul(even, scale);
              odd = Ops::mul(odd, scale);
            }
            Ops::store_i(words + pair * 64, Ops::join_bf16(even, odd));
          }
          pairs = words;
        }
        Ops::transpose_pairs(pairs, to);
        if (second) Ops::transpose_pairs(pairs + 512, to + out_panel_bytes);
      }
    }
  }
}

template <class Ops, class Format>
static void unpack(const UnpackArgs *args) {
  const Gemm &gemm = *args->gemm;
  const int projections = args->projections;
  for (int step = 0; step < gemm.steps; step++) {
    const uint8_t *tile = args->tiles + ((int64_t)step * projections + args->which) * Format::kTileBytes;
    for (int pair = 0; pair < Format::kStepColumns / 2; pair++) {
      const int column = step * Format::kStepColumns + pair * 2;
      if (column >= gemm.depth) break;
      typename Ops::F scale = Ops::set1_f(1.0f);
      const uint8_t *factors = kNoFactors;
      if (Format::kInteger || Format::kScaledToBf16) {
        const int64_t group = gemm.weight_groups > 1 ? column / gemm.group_columns : 0;
        const int64_t at = (group * projections + args->which) * kPanelColumns;
        scale = gemm.scale_is_bf16 ? Ops::load_bf16((const uint16_t *)args->scale + at)
                                   : Ops::load_f((const float *)args->scale + at);
      }
      if (gemm.factor_groups > 0)
        factors =
            args->factors + ((int64_t)column / gemm.group_columns * projections + args->which) * kFactorBytes;
      typename Ops::F values[2];
      Format::template columns<Ops>(tile, pair, factors, &values[0], &values[1]);
      for (int i = 0; i < 2 && column + i < gemm.depth; i++) {
        float lanes[16];
        typename Ops::F value = values[i];
        if (Format::kInteger || Format::kScaledToBf16) value = Ops::mul(value, scale);
        Ops::store_f(lanes, Format::kScaledToBf16 ? rounded_to_bf16<Ops>(value) : value);
        for (int n = 0; n < kPanelColumns; n++) {
          if (args->rows[n] != nullptr) args->rows[n][column + i] = lanes[n];
        }
      }
    }
  }
  if (gemm.rotated) {
    for (int n = 0; n < kPanelColumns; n++) {
      if (args->rows[n] != nullptr) rotate_values<Ops>(args->rows[n], gemm.depth);
    }
  }
}

// ---- products -----------------------------------------------------------------------------------------

template <class Ops>
static void multiply(const MultiplyArgs *args) {
  const bool tiles = uses_tiles<Ops, Bf16>(args->row_count, args->strict);
  const int rows_of_pass = pass_rows<Ops, Bf16>(*args->gemm, tiles, args->panels, args->last - args->first);
  const Product p = bf16_product(*args->gemm, args->tiles, false, args->rows, args->row_count, false);
  Product added = {};
  if (args->lora != nullptr) {
    added =
        bf16_product(*args->lora->gemm, args->lora->tiles, false, args->lora->rows, args->row_count, true);
  }
  for (int pass = args->first; pass < args->last; pass += rows_of_pass) {
    product<Ops, Bf16>(
        p, tiles, args->panels, pass, least(pass + rows_of_pass, args->last), args->scratch,
        [&](int tile, int count, int row, const float *sums, int64_t stride) {
          float *to = args->out + (row - args->first) * args->stride + tile * kPanelColumns;
          for (int j = 0; j < count; j++) {
            typename Ops::F v = Ops::load_f(sums + j * stride);
            if (args->accumulate) v = Ops::add(v, Ops::load_f(to + j * kPanelColumns));
            Ops::store_f(to + j * kPanelColumns, v);
          }
        },
        args->lora != nullptr ? &added : nullptr);
  }
  for (int row = 0; args->rotated_columns > 0 && row < args->last - args->first; row++)
    rotate_values<Ops>(args->out + row * args->stride, args->rotated_columns);
}

// ---- elementwise --------------------------------------------------------------------------------------

// 1 where x is at most `most`, 0 where it is more, NaN for NaN.
template <class Ops>
KTK_INLINE typename Ops::F not_above(typename Ops::F x, float most) {
  const typename Ops::F excess = Ops::add(x, Ops::mul(Ops::set1_f(-1.0f), Ops::min(Ops::set1_f(most), x)));
  const typename Ops::F cut = Ops::min(Ops::set1_f(1.0f), Ops::mul(excess, Ops::set1_f(3e38f)));
  return Ops::add(Ops::set1_f(1.0f), Ops::mul(Ops::set1_f(-1.0f), cut));
}

template <class Ops>
struct ActivationGradient {
  typename Ops::F z, gate, up;  // the intermediate, and its derivatives
};

// z and its derivatives, with the clamps and the slope of gated_activation.
template <class Ops>
KTK_INLINE ActivationGradient<Ops> activation_gradient(typename Ops::F gate, typename Ops::F up, float limit,
                                                       float alpha) {
  typedef typename Ops::F F;
  const F one = Ops::set1_f(1.0f), minus = Ops::set1_f(-1.0f);
  F gate_passes = one, up_passes = one;
  if (limit > 0.0f) {
    gate_passes = not_above<Ops>(gate, limit);
    up_passes = Ops::mul(not_above<Ops>(up, limit), not_above<Ops>(Ops::mul(up, minus), limit));
    gate = Ops::min(Ops::set1_f(limit), gate);
    up = Ops::min(Ops::set1_f(limit), Ops::max(Ops::set1_f(-limit), up));
  }
  const float slope = alpha > 0.0f ? alpha : 1.0f;
  if (alpha > 0.0f) up = Ops::add(up, one);
  const F decay = exponential<Ops>(Ops::mul(gate, Ops::set1_f(-slope)));
  const F sigmoid = Ops::div(one, Ops::add(one, decay));
  const F swish = Ops::mul(gate, sigmoid);
  // 1 - sigmoid without cancellation.
  const F rest = Ops::mul(decay, sigmoid);
  const F derivative = Ops::mul(sigmoid, Ops::fma(Ops::mul(gate, Ops::set1_f(slope)), rest, one));
  return {Ops::mul(swish, up), Ops::mul(Ops::mul(up, derivative), gate_passes), Ops::mul(swish, up_passes)};
}

template <class Ops>
static void activation_backward(const ActivationBackwardArgs *args) {
  typedef typename Ops::F F;
  const int end = (args->columns + 31) / 32 * 32;
  const int valid = args->first_column + args->columns;
  for (int row = args->first; row < args->last; row++) {
    const uint16_t *saved = args->saved + row * args->saved_stride;
    const float *grad = args->grad + (row - args->first) * args->stride;
    const F weight = Ops::set1_f(args->expert_weights[row]);
    const RowAddress to = row_address(args->gate_up, *args->gate_up_gemm, args->row_count, row);
    F products = Ops::zero_f();
    for (int c = 0; c < end; c += 16) {
      const int column = args->first_column + c;
      ActivationGradient<Ops> a = {Ops::zero_f(), Ops::zero_f(), Ops::zero_f()};
      F gate_grad = Ops::zero_f(), up_grad = Ops::zero_f();
      if (column < valid) {
        const F gate = load_values<Ops>(saved, KTK_DTYPE_BF16, column, args->saved_columns);
        const F up =
            load_values<Ops>(saved + args->saved_columns, KTK_DTYPE_BF16, column, args->saved_columns);
        a = activation_gradient<Ops>(gate, up, args->limit, args->alpha);
        const F dz = Ops::load_f(grad + c);
        products = Ops::fma(dz, a.z, products);
        const F weighted = Ops::mul(weight, dz);
        gate_grad = Ops::mul(weighted, a.gate);
        up_grad = Ops::mul(weighted, a.up);
      }
      const int64_t step = column / 32 * 2;
      uint8_t *target = to.data + step * to.step_stride_bytes + column % 32 * 2;
      if (args->plain != nullptr) {
        const int64_t offset = target - args->gate_up;
        Ops::store_bf16((uint16_t *)(args->plain + offset), gate_grad);
        Ops::store_bf16((uint16_t *)(args->plain + offset + to.step_stride_bytes), up_grad);
      }
      if (args->gate_scale != nullptr && column < valid) {
        gate_grad = Ops::mul(gate_grad, Ops::load_f(args->gate_scale + column * 2));
        up_grad = Ops::mul(up_grad, Ops::load_f(args->up_scale + column * 2));
      }
      Ops::store_bf16((uint16_t *)target, gate_grad);
      Ops::store_bf16((uint16_t *)(target + to.step_stride_bytes), up_grad);
      if (args->z != nullptr) {
        const RowAddress z = row_address(args->z, *args->z_gemm, args->row_count, row);
        Ops::store_bf16((uint16_t *)(z.data + column / 32 * z.step_stride_bytes + column % 32 * 2), a.z);
      }
    }
    float lanes[16], sum = 0.0f;
    Ops::store_f(lanes, products);
    for (int n = 0; n < 16; n++) sum += lanes[n];
    args->products[row] = sum;
  }
}

template <class Ops>
static void add_dropped(const AddDroppedArgs *args) {
  for (int row = args->first; row < args->last; row++) {
    float *values = args->values + (row - args->first) * args->stride;
    const int64_t index = args->target_rows != nullptr ? args->target_rows[row] : row - args->first;
    float *target = args->target + index * args->target_stride;
    for (int c = 0; args->dropout.threshold > 0 && c < args->columns; c += 16) {
      const typename Ops::F factors =
          dropout_factors<Ops>(args->dropout, args->dropout_rows[row], args->first_column + c);
      Ops::store_f(values + c, Ops::mul(factors, Ops::load_f(values + c)));
    }
    rotate_values<Ops>(values, args->rotated_columns);
    for (int c = 0; c < args->columns; c += 16)
      Ops::store_f(target + c, Ops::add(Ops::load_f(values + c), Ops::load_f(target + c)));
  }
}

template <class Ops>
static void store_matrix(const StoreMatrixArgs *args) {
  const int64_t width = args->dtype == KTK_DTYPE_F32 ? 4 : 2;
  const auto store = [&](int64_t row, int64_t column, int count, const float *values) {
    void *target = (uint8_t *)args->target + row * args->target_stride * width;
    typename Ops::F v = load_values<Ops>(values, KTK_DTYPE_F32, 0, count);
    if (args->accumulate) v = Ops::add(v, load_values<Ops>(target, args->dtype, column, column + count));
    store_values<Ops>(target, args->dtype, column, column + count, v);
  };
  if (!args->transposed) {
    for (int row = 0; row < args->rows; row++) {
      for (int c = 0; c < args->columns; c += 16)
        store(row, c, least(16, args->columns - c), args->values + row * args->stride + c);
    }
    return;
  }
  for (int row = 0; row < args->rows; row += 16) {
    const int count = least(16, args->rows - row);
    for (int c = 0; c < args->columns; c += 16) {
      alignas(64) float block[16][16], turned[16 * 16];
      for (int i = 0; i < 16; i++) {
        Ops::store_f(block[i],
                     i < count ? Ops::load_f(args->values + (row + i) * args->stride + c) : Ops::zero_f());
      }
      Ops::transpose(block, turned);
      for (int i = 0; i < least(16, args->columns - c); i++) store(c + i, row, count, turned + i * 16);
    }
  }
}
