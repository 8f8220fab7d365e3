// 4-bit weights, on two levels: an output row has one fp32 scale, and each group of 32, 64 or 128 of its
// columns an integer multiplier and an integer offset. A weight is scale * (multiplier * code + offset -
// 128), so that multiplier * code + offset is what int8 would store: an unsigned byte, and products run over
// the whole row in integers. Or a whole row has nothing but a scale: multiplier 1, offset 120.
//
// Tile, 512 bytes for 16 output rows by 64 columns: [8 r][16 rows][4 i], the low nibble of a byte being
// column 4r + i and the high nibble column 32 + 4r + i. One load, one mask and one shift give two operand
// registers, and each nibble of a tile belongs to one group of 32.
#pragma once

#include "formats/format.h"

// Sums of nibbles times activations over 8 quads, which then meet their group's multipliers. Words: where a
// set has no product of bytes, in 16 bits.
template <class Ops, bool Words = Ops::kWordSums>
struct NibbleSums {
  typedef typename Ops::I Sum;
  typedef typename Ops::A8 Activations;
  KTK_INLINE Sum zero() { return Ops::zero_i(); }
  KTK_INLINE Activations activations(const uint8_t *p) { return Ops::quad_s8(p); }
  KTK_INLINE Sum add(Sum sum, typename Ops::I nibbles, Activations quad) {
    return Ops::dot_u8s8(sum, nibbles, quad);
  }
  KTK_INLINE typename Ops::I multipliers(const uint8_t *p) { return Ops::load_u8(p); }
  KTK_INLINE typename Ops::I add_to(typename Ops::I total, Sum sum, typename Ops::I multipliers) {
    return Ops::add_i(total, Ops::mul_i(sum, multipliers));
  }
};
template <class Ops>
struct NibbleSums<Ops, true> {
  typedef typename Ops::Q Sum;
  typedef typename Ops::I Activations;
  KTK_INLINE Sum zero() { return Ops::zero_quads(); }
  KTK_INLINE Activations activations(const uint8_t *p) { return Ops::quad_u4(p); }
  KTK_INLINE Sum first(typename Ops::I nibbles, Activations quad) { return Ops::mul_quad(nibbles, quad); }
  KTK_INLINE Sum add(Sum sum, typename Ops::I nibbles, Activations quad) {
    return Ops::add_quad(sum, nibbles, quad);
  }
  KTK_INLINE typename Ops::I multipliers(const uint8_t *p) { return Ops::words_of(p); }
  KTK_INLINE typename Ops::I add_to(typename Ops::I total, Sum sum, typename Ops::I multipliers) {
    return Ops::add_quads(total, sum, multipliers);
  }
};

struct Int4 {
  static constexpr const char *kName = "int4";
  static constexpr int kStepColumns = 64;
  static constexpr int kTileBytes = 512;
  static constexpr bool kInteger = true;
  static constexpr bool kFactors = true;
  static constexpr bool kExpands = true;
  static constexpr bool kScaledToBf16 = false;
  static constexpr int kZeroPoint = 128;
  static constexpr Multiply kMultiply = Multiply::nibble;
  static constexpr int kMostMultiplier = 15;

  // The unsigned bytes of one nibble of 4 columns.
  template <class Ops>
  struct Bytes {
    typename Ops::I multiplier, offset;
    KTK_INLINE Bytes of_group(const uint8_t *factors) {
      return {Ops::words_of(factors), Ops::bytes_of(factors + kPanelColumns)};
    }
    // The product of a nibble and a multiplier stays within its byte, so 16-bit products do.
    KTK_MEMBER typename Ops::I of(typename Ops::I nibbles) const {
      return Ops::add_bytes(Ops::mul_words(nibbles, multiplier), offset);
    }
  };

  template <class Ops, bool High>
  KTK_INLINE typename Ops::I nibbles(const uint8_t *line) {
    const typename Ops::I bytes = Ops::load_i(line);
    return High ? Ops::high_nibbles(bytes) : Ops::low_nibbles(bytes);
  }

  // Half a step: sums of nibbles, which meet their group's multiplier afterwards.
  template <class Ops, int NT, int MR, bool High, class Ahead>
  KTK_INLINE void add_nibbles(typename Ops::I (&sum)[MR][NT], const uint8_t *rows, const uint8_t *tiles,
                              int64_t tile_stride_bytes, const Ahead &ahead, const uint8_t *factors,
                              int64_t factor_stride_bytes) {
    typedef NibbleSums<Ops> Sums;
    typename Sums::Sum part[MR][NT];
    for (int r = 0; r < MR; r++) {
      for (int j = 0; j < NT; j++) part[r][j] = Sums::zero();
    }
    constexpr bool kUnrolled = Ops::kWordSums && Ops::kUnrollsNibbles;
    const int quads = kUnrolled ? 8 : rolled(8);
    for (int quad = 0; quad < quads; quad++) {
      typename Ops::I weights[NT];
      for (int j = 0; j < NT; j++) {
        const uint8_t *line = tiles + j * tile_stride_bytes + quad * 64;
        if (!High) ahead.fetch(line);
        weights[j] = nibbles<Ops, High>(line);
      }
      for (int r = 0; r < MR; r++) {
        const auto activations = Sums::activations(rows + r * kStepBytes + quad * 4);
        for (int j = 0; j < NT; j++) {
          if constexpr (kUnrolled) {
            if (quad == 0) {
              part[r][j] = Sums::first(weights[j], activations);
              continue;
            }
          }
          part[r][j] = Sums::add(part[r][j], weights[j], activations);
        }
      }
    }
    for (int j = 0; j < NT; j++) {
      const typename Ops::I multipliers = Sums::multipliers(factors + j * factor_stride_bytes);
      for (int r = 0; r < MR; r++) sum[r][j] = Sums::add_to(sum[r][j], part[r][j], multipliers);
    }
  }

  // A step of nibbles. Offsets, less what stands for 0, meet the sums of the rows' columns.
  template <class Ops, int NT, int MR, class Ahead>
  KTK_INLINE void add_nibbles(typename Ops::I (&sum)[MR][NT], const uint8_t *rows, const uint8_t *tiles,
                              int64_t tile_stride_bytes, const Ahead &ahead, const StepFactors &factors) {
    const int64_t stride = factors.tile_stride_bytes;
    add_nibbles<Ops, NT, MR, false>(sum, rows, tiles, tile_stride_bytes, ahead, factors.low, stride);
    add_nibbles<Ops, NT, MR, true>(sum, rows + 32, tiles, tile_stride_bytes, ahead, factors.high, stride);
    for (int j = 0; j < NT; j++) {
      const typename Ops::I low = Ops::load_u8(factors.low + j * stride + kPanelColumns);
      const typename Ops::I high = Ops::load_u8(factors.high + j * stride + kPanelColumns);
      const typename Ops::I offsets = Ops::sub_words(Ops::add_i(low, Ops::shift_left_i(high, 16)),
                                                     Ops::set1_i(kZeroPoint << 16 | kZeroPoint));
      for (int r = 0; r < MR; r++) {
        const typename Ops::I row_sums = Ops::set1_i(factors.sums[r * factors.row_stride]);
        sum[r][j] = Ops::add_i(sum[r][j], Ops::dot_words(offsets, row_sums));
      }
    }
  }

  // A step of bytes: rows enough share what it takes to make them of nibbles.
  template <class Ops, int NT, int MR, class Ahead>
  KTK_INLINE void add_bytes(typename Ops::I (&sum)[MR][NT], const uint8_t *rows, const uint8_t *tiles,
                            int64_t tile_stride_bytes, const Ahead &ahead, const StepFactors &factors) {
    Bytes<Ops> low[NT], high[NT];
    for (int j = 0; j < NT; j++) {
      low[j] = Bytes<Ops>::of_group(factors.low + j * factors.tile_stride_bytes);
      high[j] = Bytes<Ops>::of_group(factors.high + j * factors.tile_stride_bytes);
    }
    const int quads = rolled(8);
    for (int quad = 0; quad < quads; quad++) {
      typename Ops::W8 low_weights[NT], high_weights[NT];
      for (int j = 0; j < NT; j++) {
        const uint8_t *line = tiles + j * tile_stride_bytes + quad * 64;
        ahead.fetch(line);
        low_weights[j] = low[j].of(nibbles<Ops, false>(line));
        high_weights[j] = high[j].of(nibbles<Ops, true>(line));
      }
      for (int r = 0; r < MR; r++) {
        const uint8_t *activations = rows + r * kStepBytes + quad * 4;
        const typename Ops::A8 first = Ops::quad_s8(activations), second = Ops::quad_s8(activations + 32);
        for (int j = 0; j < NT; j++) {
          sum[r][j] = Ops::dot_u8s8(sum[r][j], low_weights[j], first);
          sum[r][j] = Ops::dot_u8s8(sum[r][j], high_weights[j], second);
        }
      }
    }
  }

  // Whether products of so many rows are sums of nibbles, not of bytes.
  template <class Ops, int MR>
  static constexpr bool kSumsNibbles = Ops::kWordSums || MR <= 4;

  template <class Ops, int NT, int MR, int Halves, class Ahead>
  KTK_INLINE void step(typename Ops::I (&sum)[Halves][MR][NT], const uint8_t *rows, const uint8_t *tiles,
                       int64_t tile_stride_bytes, const Ahead &ahead, const StepFactors &factors) {
    static_assert(Halves == 1, "a scale covers a row, or 128 columns of it");
    if constexpr (kSumsNibbles<Ops, MR>) {
      add_nibbles<Ops, NT, MR>(sum[0], rows, tiles, tile_stride_bytes, ahead, factors);
    } else {
      add_bytes<Ops, NT, MR>(sum[0], rows, tiles, tile_stride_bytes, ahead, factors);
    }
  }

  // Nibbles to the bytes that stand for them: quads 0-7 from the low ones, 8-15 from the high ones.
  template <class Ops>
  KTK_INLINE void expand_tile(const uint8_t *tile, const StepFactors &factors, uint8_t *operand) {
    const Bytes<Ops> low = Bytes<Ops>::of_group(factors.low), high = Bytes<Ops>::of_group(factors.high);
    for (int quad = 0; quad < 8; quad++) {
      Ops::store_i(operand + quad * 64, low.of(nibbles<Ops, false>(tile + quad * 64)));
      Ops::store_i(operand + (quad + 8) * 64, high.of(nibbles<Ops, true>(tile + quad * 64)));
    }
  }

  // Columns 2 `pair` and 2 `pair` + 1 of the 16 rows, before the scale: integers that bf16 holds.
  template <class Ops>
  KTK_INLINE void columns(const uint8_t *tile, int pair, const uint8_t *factors, typename Ops::F *even,
                          typename Ops::F *odd) {
    const int quad = pair % 16 / 2;
    const typename Ops::I codes =
        pair < 16 ? nibbles<Ops, false>(tile + quad * 64) : nibbles<Ops, true>(tile + quad * 64);
    const typename Ops::I quads = Bytes<Ops>::of_group(factors).of(codes);
    pair_of_quads<Ops>(quads, pair % 2 != 0, kZeroPoint, even, odd);
  }

  // A group of the 16 rows of a panel, in units of the rows' scales.
  template <class Ops>
  struct Fit {
    typename Ops::F multiplier, offset, error;
  };

  // Codes of a column, and how far they are off.
  template <class Ops>
  struct Coder {
    typename Ops::F minus_multiplier, inverse, minus_offset;
    KTK_MEMBER explicit Coder(const Fit<Ops> &fit) {
      const typename Ops::F minus = Ops::set1_f(-1.0f);
      minus_multiplier = Ops::mul(fit.multiplier, minus);
      inverse = Ops::div(Ops::set1_f(1.0f), fit.multiplier);
      minus_offset = Ops::mul(fit.offset, minus);
    }
    KTK_MEMBER typename Ops::I code(typename Ops::F value, typename Ops::F *error) const {
      const typename Ops::F above = Ops::add(value, minus_offset);
      const typename Ops::F scaled = Ops::mul(above, inverse);
      const typename Ops::F code =
          Ops::round_f(Ops::min(Ops::set1_f(15.0f), Ops::max(Ops::zero_f(), scaled)));
      *error = Ops::fma(minus_multiplier, code, above);
      return Ops::round_i(code);
    }
  };

  // Takes the multiplier and offset for the rows in which they are closer than the best so far.
  template <class Ops>
  KTK_INLINE void try_fit(const float *columns, int count, typename Ops::F multiplier, typename Ops::F offset,
                          Fit<Ops> &best) {
    typedef typename Ops::F F;
    const F most = Ops::fma(multiplier, Ops::set1_f(-15.0f), Ops::set1_f(127.0f));
    Fit<Ops> tried = {multiplier, Ops::max(Ops::set1_f(-128.0f), Ops::min(most, offset)), Ops::zero_f()};
    const Coder<Ops> coder(tried);
    for (int c = 0; c < count; c++) {
      F error;
      coder.code(Ops::load_f(columns + c * kPanelColumns), &error);
      tried.error = Ops::fma(error, error, tried.error);
    }
    best.multiplier = Ops::where_less(tried.error, best.error, tried.multiplier, best.multiplier);
    best.offset = Ops::where_less(tried.error, best.error, tried.offset, best.offset);
    best.error = Ops::min(tried.error, best.error);
  }

  // Searches the multiplier that spans the group and one less, and offsets around its middle: some apart for
  // both, then the neighbours of the best.
  template <class Ops>
  KTK_INLINE void fit_group(const float *columns, int count, Fit<Ops> &best) {
    typedef typename Ops::F F;
    F low = Ops::zero_f(), high = Ops::zero_f();
    for (int c = 0; c < count; c++) {
      const F value = Ops::load_f(columns + c * kPanelColumns);
      low = Ops::min(low, value);
      high = Ops::max(high, value);
    }
    const F span = Ops::round_f(Ops::mul(Ops::fma(low, Ops::set1_f(-1.0f), high), Ops::set1_f(1.0f / 15.0f)));
    const F middle = Ops::mul(Ops::add(low, high), Ops::set1_f(0.5f));
    best.error = Ops::set1_f(float_of_bits(kInfinityBits));
    for (int less = 0; less < 2; less++) {
      const F multiplier = Ops::max(Ops::set1_f(1.0f), Ops::min(Ops::set1_f((float)kMostMultiplier),
                                                                Ops::add(span, Ops::set1_f(-(float)less))));
      const F offset = Ops::round_f(Ops::fma(multiplier, Ops::set1_f(-7.5f), middle));
      try_fit<Ops>(columns, count, multiplier, offset, best);
      try_fit<Ops>(columns, count, multiplier, Ops::add(offset, Ops::set1_f(-3.0f)), best);
      try_fit<Ops>(columns, count, multiplier, Ops::add(offset, Ops::set1_f(3.0f)), best);
    }
    const Fit<Ops> around = best;
    try_fit<Ops>(columns, count, around.multiplier, Ops::add(around.offset, Ops::set1_f(-1.0f)), best);
    try_fit<Ops>(columns, count, around.multiplier, Ops::add(around.offset, Ops::set1_f(1.0f)), best);
  }

  // The scales of rows with groups: the widest group spans 15 steps of the largest multiplier, and the
  // largest weight lies within the bytes. Returns 1 when one would not be finite.
  template <class Ops>
  KTK_INLINE int32_t row_scales(const PanelSurvey<Ops> &survey, float *scale) {
    float span[kPanelColumns];
    Ops::store_f(span, survey.widest);
    for (int n = 0; n < kPanelColumns; n++) {
      const float largest = int8_scale(survey.magnitudes[n]).scale, steps = span[n] * (1.0f / 225.0f);
      scale[n] = largest == 0.0f ? 0.0f : steps > largest ? steps : largest;
      if (magnitude_bits(scale[n]) >= kInfinityBits) return 1;
    }
    return 0;
  }

  template <class Ops>
  static int32_t pack(const PackArgs *args) {
    const Gemm &gemm = *args->gemm;
    const bool grouped = gemm.factor_groups > 0;
    const int group_columns = grouped ? gemm.group_columns : kPackColumns;
    const PanelSurvey<Ops> survey(args, grouped ? group_columns : kLoadColumns);
    if (survey.largest >= kInfinityBits) return 1;
    float scale[kPanelColumns], inverse[kPanelColumns];
    if (grouped) {
      if (row_scales<Ops>(survey, scale) != 0) return 1;
    } else {
      for (int n = 0; n < kPanelColumns; n++) {
        const int32_t magnitude = survey.magnitudes[n];
        scale[n] = magnitude >= kNegligibleBits ? plain_scale<Ops>(args, n, magnitude) : 0.0f;
      }
    }
    for (int n = 0; n < kPanelColumns; n++) inverse[n] = scale[n] == 0.0f ? 0.0f : 1.0f / scale[n];
    store_row_scales(args, scale);

    Fit<Ops> fit = {Ops::set1_f(1.0f), Ops::set1_f(-8.0f), Ops::zero_f()};
    const typename Ops::F by = Ops::load_f(inverse);
    for (int64_t first = 0; first < (int64_t)gemm.steps * kStepColumns; first += kPackColumns) {
      alignas(64) float columns[kPackColumns * kPanelColumns];
      alignas(64) int32_t codes[kPackColumns * kPanelColumns];
      for (int c = 0; c < kPackColumns; c += kLoadColumns)
        load_columns<Ops>(args, first + c, columns + c * kPanelColumns);
      for (int part = 0; part < kPackColumns; part += group_columns) {
        float *values = columns + part * kPanelColumns;
        for (int c = 0; c < group_columns * kPanelColumns; c += kPanelColumns)
          Ops::store_f(values + c, Ops::mul(Ops::load_f(values + c), by));
        if (grouped && first + part < gemm.depth) {
          const int64_t left = gemm.depth - first - part;
          fit_group<Ops>(values, left < group_columns ? (int)left : group_columns, fit);
          uint8_t *factors = args->factors + (first + part) / group_columns * 2 * args->group_stride;
          Ops::store_low_bytes(factors, Ops::round_i(fit.multiplier));
          Ops::store_low_bytes(factors + kPanelColumns,
                               Ops::add_i(Ops::round_i(fit.offset), Ops::set1_i(kZeroPoint)));
        }
        const Coder<Ops> coder(fit);
        for (int c = 0; c < group_columns * kPanelColumns; c += kPanelColumns) {
          typename Ops::F error;
          Ops::store_i(codes + part * kPanelColumns + c, coder.code(Ops::load_f(values + c), &error));
        }
      }
      const int64_t left = (int64_t)gemm.steps * kStepColumns - first;
      for (int step = 0; step < kPackColumns && step < left; step += kStepColumns) {
        uint8_t *tile = args->tiles + (first + step) / kStepColumns * args->step_stride_bytes;
        for (int c = 0; c < 32; c += 4) {
          typename Ops::I bytes[4];
          for (int i = 0; i < 4; i++) {
            const int32_t *low = codes + (step + c + i) * kPanelColumns, *high = low + 32 * kPanelColumns;
            bytes[i] = Ops::add_i(Ops::shift_left_i(Ops::load_i(high), 4), Ops::load_i(low));
          }
          Ops::store_i(tile + c * 16, tile_line<Ops>(bytes));
        }
      }
    }
    return 0;
  }

  // Of a row without groups: the value of largest magnitude, over -8; of several, the first.
  template <class Ops>
  KTK_INLINE float plain_scale(const PackArgs *args, int n, int32_t largest_bits) {
    const WholeRows whole(*args);
    for (int64_t first = 0; first < args->full_depth; first += kPackColumns) {
      float values[kPackColumns];
      load_row<Ops>(&whole.args, n, first, kPackColumns, values);
      typename Ops::I most = Ops::zero_i();
      for (int c = 0; c < kPackColumns; c += 16)
        most = larger_magnitude<Ops>(most, Ops::as_i(Ops::load_f(values + c)));
      if (Ops::reduce_max_i(most) != largest_bits) continue;
      for (const float value : values) {
        if (magnitude_bits(value) == largest_bits) return value / -8.0f;
      }
    }
    return 0.0f;
  }
};
