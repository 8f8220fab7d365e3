// 4-bit weights. Groups of 32, 64 or 128 input columns share a bf16 scale, and a zero point when
// asymmetric; or a whole output row shares an fp32 scale.
//
// Tile, 512 bytes for 16 output rows by 64 columns: [8 r][16 rows][4 i], the low nibble of a byte being
// column 4r + i and the high nibble column 32 + 4r + i. One load, one mask and one shift give two operand
// registers, and each nibble of a tile belongs to one group of 32.
//
// Zero points count sixteenths of a step. A whole one would have to lie on the grid that it places, which
// costs accuracy; with sixteenths, sums stay integers (kernels/product.h).
//
// Scales and zero points of groups are fitted by least squares: alternately codes for the scale, and the
// scale for the codes.
#pragma once

#include "formats/format.h"

struct Int4 {
  static constexpr const char *kName = "int4";
  static constexpr int kStepColumns = 64;
  static constexpr int kTileBytes = 512;
  static constexpr bool kInteger = true;
  static constexpr bool kExpands = true;
  static constexpr bool kScaledToBf16 = false;
  static constexpr int kZeroPoint = 8;
  static constexpr Multiply kMultiply = Multiply::nibble;

  // The columns of one nibble: a segment, or a half of one or of a longer one.
  template <class Ops, int NT, int MR, bool High>
  KTK_INLINE void nibbles(typename Ops::I (&sum)[MR][NT], const uint8_t *rows, const uint8_t *tiles,
                          int64_t tile_stride_bytes) {
    typename Ops::Q part[MR][NT];
    for (int r = 0; r < MR; r++) {
      for (int j = 0; j < NT; j++) part[r][j] = Ops::begin_quads(sum[r][j]);
    }
    const int quads = rolled(8);
    for (int quad = 0; quad < quads; quad++) {
      typename Ops::I weights[NT];
      for (int j = 0; j < NT; j++) {
        const typename Ops::I bytes = Ops::load_i(tiles + j * tile_stride_bytes + quad * 64);
        weights[j] = High ? Ops::high_nibbles(bytes) : Ops::low_nibbles(bytes);
      }
      for (int r = 0; r < MR; r++) {
        const typename Ops::I activations = Ops::quad_u4(rows + r * kStepBytes + quad * 4);
        for (int j = 0; j < NT; j++) part[r][j] = Ops::add_quad(part[r][j], weights[j], activations);
      }
    }
    for (int r = 0; r < MR; r++) {
      for (int j = 0; j < NT; j++) sum[r][j] = Ops::end_quads(sum[r][j], part[r][j]);
    }
  }

  template <class Ops, int NT, int MR, int Halves>
  KTK_INLINE void step(typename Ops::I (&sum)[Halves][MR][NT], const uint8_t *rows, const uint8_t *tiles,
                       int64_t tile_stride_bytes) {
    nibbles<Ops, NT, MR, false>(sum[0], rows, tiles, tile_stride_bytes);
    nibbles<Ops, NT, MR, true>(sum[Halves - 1], rows + 32, tiles, tile_stride_bytes);
  }

  // Expands nibbles to bytes: quads 0-7 from the low ones, 8-15 from the high ones.
  template <class Ops>
  KTK_INLINE void expand_tile(const uint8_t *tile, uint8_t *operand) {
    for (int quad = 0; quad < 8; quad++) {
      const typename Ops::I bytes = Ops::load_i(tile + quad * 64);
      Ops::store_i(operand + quad * 64, Ops::low_nibbles(bytes));
      Ops::store_i(operand + (quad + 8) * 64, Ops::high_nibbles(bytes));
    }
  }

  // Columns 2 `pair` and 2 `pair` + 1 of the 16 rows, less their zero points, in sixteenths, and before the
  // scale: exact in bf16 where there are none, and in fp32.
  template <class Ops>
  KTK_INLINE void columns(const uint8_t *tile, int pair, typename Ops::I zero, typename Ops::F *even,
                          typename Ops::F *odd) {
    const typename Ops::I quads = Ops::load_i(tile + pair % 16 / 2 * 64);
    const typename Ops::I nibbles = pair < 16 ? Ops::low_nibbles(quads) : Ops::high_nibbles(quads);
    const typename Ops::I both = pair % 2 == 0 ? nibbles : Ops::shift_right_i(nibbles, 16);
    const typename Ops::I byte = Ops::set1_i(255);
    const typename Ops::F sixteenth = Ops::set1_f(0.0625f);
    const typename Ops::I first = Ops::and_i(both, byte),
                          second = Ops::and_i(Ops::shift_right_i(both, 8), byte);
    *even = Ops::mul(Ops::from_i(Ops::sub_i(Ops::shift_left_4(first), zero)), sixteenth);
    *odd = Ops::mul(Ops::from_i(Ops::sub_i(Ops::shift_left_4(second), zero)), sixteenth);
  }

  static constexpr int kFitRounds = 3;
  // The whole range of a group, or for large groups a little less: their ends hold few weights.
  KTK_INLINE float first_share(int group_columns) { return group_columns == 32 ? 1.0f : 0.953125f; }

  // The parameters of a group for the 16 rows of a panel.
  struct Fit {
    float scale[kPanelColumns], inverse[kPanelColumns];
    float zero[kPanelColumns];  // in sixteenths

    KTK_MEMBER void set(int n, float value) {
      scale[n] = value;
      inverse[n] = value == 0.0f ? 0.0f : 1.0f / value;
    }
  };

  template <class Ops>
  KTK_INLINE typename Ops::F code(const Fit &fit, typename Ops::F values, float lowest) {
    const typename Ops::F zero = Ops::mul(Ops::load_f(fit.zero), Ops::set1_f(0.0625f));
    const typename Ops::F scaled = Ops::add(Ops::mul(values, Ops::load_f(fit.inverse)), zero);
    const typename Ops::F most = Ops::set1_f(lowest + 15.0f), least = Ops::set1_f(lowest);
    return Ops::from_i(Ops::round_i(Ops::min(most, Ops::max(least, scaled))));
  }

  // The zero point that puts `level`, a code or a mean of codes, at `value`.
  KTK_INLINE float zero_sixteenths(float level, float value, float inverse) {
    const float zero = __builtin_rintf((level - value * inverse) * 16.0f);
    return zero < 0.0f ? 0.0f : zero > 240.0f ? 240.0f : zero;
  }

  // Fits a group of `count` columns. Returns 1 when a scale would not be finite.
  template <class Ops>
  KTK_INLINE int32_t fit_group(const float *columns, int count, int group_columns, bool asymmetric,
                               Fit &fit) {
    typedef typename Ops::F F;
    F low_values = Ops::zero_f(), high_values = Ops::zero_f(), value_sums = Ops::zero_f();
    for (int c = 0; c < count; c++) {
      const F value = Ops::load_f(columns + c * kPanelColumns);
      low_values = Ops::min(low_values, value);
      high_values = Ops::max(high_values, value);
      value_sums = Ops::add(value_sums, value);
    }
    float low[kPanelColumns], high[kPanelColumns], value_sum[kPanelColumns], start[kPanelColumns];
    Ops::store_f(low, low_values);
    Ops::store_f(high, high_values);
    Ops::store_f(value_sum, value_sums);
    const float share = first_share(group_columns);
    for (int n = 0; n < kPanelColumns; n++) {
      // Symmetric: the end of larger magnitude lies at code -8, of which there is no positive counterpart.
      const float extreme = high[n] > -low[n] ? high[n] : low[n];
      start[n] = (asymmetric ? (high[n] - low[n]) / 15.0f : extreme / -8.0f) * share;
      if (__builtin_fabsf(extreme) < float_of_bits(kNegligibleBits)) start[n] = 0.0f;
    }
    Ops::store_f(start, rounded_to_bf16<Ops>(Ops::load_f(start)));
    for (int n = 0; n < kPanelColumns; n++) {
      if (magnitude_bits(start[n]) >= kInfinityBits) return 1;
      fit.set(n, start[n]);
      fit.zero[n] = 0.0f;
      if (asymmetric && start[n] != 0.0f)
        fit.zero[n] = zero_sixteenths(7.5f, (low[n] + high[n]) * 0.5f, fit.inverse[n]);
    }

    for (int round = 0; round < kFitRounds; round++) {
      F codes = Ops::zero_f(), squares = Ops::zero_f(), products = Ops::zero_f();
      for (int c = 0; c < count; c++) {
        const F value = Ops::load_f(columns + c * kPanelColumns);
        const F q = code<Ops>(fit, value, asymmetric ? 0.0f : -8.0f);
        codes = Ops::add(codes, q);
        squares = Ops::add(squares, Ops::mul(q, q));
        products = Ops::add(products, Ops::mul(value, q));
      }
      float code_sum[kPanelColumns], square_sum[kPanelColumns], product_sum[kPanelColumns];
      float fitted[kPanelColumns];
      Ops::store_f(code_sum, codes);
      Ops::store_f(square_sum, squares);
      Ops::store_f(product_sum, products);
      const float n_values = (float)count;
      for (int n = 0; n < kPanelColumns; n++) {
        const float covariance =
            asymmetric ? n_values * product_sum[n] - code_sum[n] * value_sum[n] : product_sum[n];
        const float variance =
            asymmetric ? n_values * square_sum[n] - code_sum[n] * code_sum[n] : square_sum[n];
        fitted[n] = variance > 0.0f ? covariance / variance : 0.0f;
      }
      Ops::store_f(fitted, rounded_to_bf16<Ops>(Ops::load_f(fitted)));
      for (int n = 0; n < kPanelColumns; n++) {
        // Sums that cancel or overflow give no sound fit: the scale stays.
        const float ratio = fitted[n] * fit.inverse[n];
        if (!(ratio > 0.25f && ratio < 4.0f)) continue;
        fit.set(n, fitted[n]);
        if (asymmetric)
          fit.zero[n] = zero_sixteenths(code_sum[n] / n_values, value_sum[n] / n_values, fit.inverse[n]);
      }
    }
    return 0;
  }

  template <class Ops>
  static int32_t pack(const PackArgs *args) {
    const Gemm &gemm = *args->gemm;
    const bool per_row = !gemm.scale_is_bf16, asymmetric = gemm.asymmetric != 0;
    const int group_columns = per_row ? kPackColumns : gemm.group_columns;
    int32_t magnitudes[kPanelColumns];
    if (panel_magnitudes<Ops>(args, magnitudes) >= kInfinityBits) return 1;
    Fit fit = {};
    if (per_row) {
      for (int n = 0; n < kPanelColumns; n++) {
        if (magnitudes[n] >= kNegligibleBits) fit.set(n, row_scale<Ops>(args, n));
      }
      store_row_scales(args, fit.scale);
    }
    const typename Ops::I offset = Ops::set1_i(asymmetric ? 0 : kZeroPoint);
    for (int64_t first = 0; first < (int64_t)gemm.steps * kStepColumns; first += kPackColumns) {
      float columns[kPackColumns * kPanelColumns];
      for (int c = 0; c < kPackColumns; c += 16) load_columns<Ops>(args, first + c, columns + c * 16);
      for (int part = 0; part < kPackColumns; part += group_columns) {
        float *values = columns + part * kPanelColumns;
        if (!per_row && first + part < gemm.depth) {
          const int64_t left = gemm.depth - first - part;
          const int count = left < group_columns ? (int)left : group_columns;
          if (fit_group<Ops>(values, count, group_columns, asymmetric, fit) != 0) return 1;
          const int64_t group = (first + part) / group_columns;
          store_group_scales(args, group, fit.scale);
          if (asymmetric) {
            for (int n = 0; n < kPanelColumns; n++)
              args->zero[group * args->group_stride + n] = (uint8_t)fit.zero[n];
          }
        }
        for (int c = 0; c < group_columns * kPanelColumns; c += kPanelColumns) {
          Ops::store_f(values + c, code<Ops>(fit, Ops::load_f(values + c), asymmetric ? 0.0f : -8.0f));
        }
      }
      const int64_t left = (int64_t)gemm.steps * kStepColumns - first;
      for (int step = 0; step < kPackColumns && step < left; step += kStepColumns) {
        uint8_t *tile = args->tiles + (first + step) / kStepColumns * args->step_stride_bytes;
        for (int c = 0; c < 32; c += 4) {
          typename Ops::I codes[4];
          for (int i = 0; i < 4; i++) {
            const float *low = columns + (step + c + i) * kPanelColumns, *high = low + 32 * kPanelColumns;
            const typename Ops::I above = Ops::add_i(Ops::round_i(Ops::load_f(high)), offset);
            codes[i] =
                Ops::add_i(Ops::shift_left_4(above), Ops::add_i(Ops::round_i(Ops::load_f(low)), offset));
          }
          Ops::store_i(tile + c * 16, tile_line<Ops>(codes));
        }
      }
    }
    return 0;
  }

  // The value of largest magnitude of a row, over -8; of several, the first.
  template <class Ops>
  KTK_INLINE float row_scale(const PackArgs *args, int n) {
    float extreme = 0.0f;
    for (int64_t i = 0; i < args->full_depth; i += 16) {
      float values[16];
      Ops::store_f(values, load_values<Ops>(args->rows[n], args->dtype, i, args->full_depth));
      for (const float value : values) {
        extreme = __builtin_fabsf(value) > __builtin_fabsf(extreme) ? value : extreme;
      }
    }
    return extreme / -8.0f;
  }
};
