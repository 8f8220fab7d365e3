// Activations: reading the caller's rows, quantising them, and the layout that the products read (see
// core/backend.h).
#pragma once

#include "core/backend.h"
#include "kernels/inline.h"
#include "ktk.h"

KTK_INLINE int least(int a, int b) { return a < b ? a : b; }

// The 16 values from `index` of a row with `count` values of `dtype`; zero past the end.
template <class Ops>
KTK_INLINE typename Ops::F load_values(const void *values, int32_t dtype, int64_t index, int64_t count) {
  const int64_t left = count - index;
  if (dtype == KTK_DTYPE_F32) {
    const float *p = (const float *)values + index;
    if (left >= 16) return Ops::load_f(p);
    float tail[16] = {};
    __builtin_memcpy(tail, p, (uint64_t)left * 4);
    return Ops::load_f(tail);
  }
  const uint16_t *p = (const uint16_t *)values + index;
  uint16_t tail[16] = {};
  if (left < 16) {
    __builtin_memcpy(tail, p, (uint64_t)left * 2);
    p = tail;
  }
  return dtype == KTK_DTYPE_BF16 ? Ops::load_bf16(p) : Ops::load_f16(p);
}

// Writes 16 values at `index` of a row with `count` values of `dtype`, as many as there are.
template <class Ops>
KTK_INLINE void store_values(void *values, int32_t dtype, int64_t index, int64_t count, typename Ops::F v) {
  const int64_t left = count - index;
  if (dtype == KTK_DTYPE_F32) {
    float *p = (float *)values + index;
    if (left >= 16) return Ops::store_f(p, v);
    float tail[16];
    Ops::store_f(tail, v);
    __builtin_memcpy(p, tail, (uint64_t)left * 4);
    return;
  }
  uint16_t *p = (uint16_t *)values + index;
  uint16_t tail[16];
  uint16_t *target = left >= 16 ? p : tail;
  if (dtype == KTK_DTYPE_BF16) {
    Ops::store_bf16(target, v);
  } else {
    Ops::store_f16(target, v);
  }
  if (left < 16) __builtin_memcpy(p, tail, (uint64_t)left * 2);
}

// A running maximum of magnitudes, as the bits of fp32 values: as integers, magnitudes order like numbers,
// infinity above them and NaN above infinity.
template <class Ops>
KTK_INLINE typename Ops::I larger_magnitude(typename Ops::I largest, typename Ops::I bits) {
  return Ops::max_i(largest, Ops::and_i(bits, Ops::set1_i(0x7fffffff)));
}

constexpr int32_t kInfinityBits = 0x7f800000;
constexpr int32_t kNegligibleBits = (127 - 100) << 23;  // 2^-100: below it 127 / amax nears overflow

KTK_INLINE float float_of_bits(int32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

KTK_INLINE int32_t magnitude_bits(float value) {
  int32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits & 0x7fffffff;
}

// The scale of a group with the given largest magnitude, and what its values are multiplied with.
struct Int8Scale {
  float scale, inverse;
};
KTK_INLINE Int8Scale int8_scale(int32_t amax_bits) {
  if (amax_bits >= kInfinityBits) return {float_of_bits(0x7fc00000), 0.0f};
  if (amax_bits < kNegligibleBits) return {0.0f, 0.0f};
  const float amax = float_of_bits(amax_bits);
  return {amax / 127.0f, 127.0f / amax};
}

// kRotation columns times the rotation: the Hadamard matrix over the root of its size, which undoes itself.
constexpr int kRotationVectors = kRotation / 16;
template <class Ops>
KTK_INLINE void rotate(typename Ops::F (&v)[kRotationVectors]) {
  typedef typename Ops::F F;
  static_assert(kRotation == 64, "one over its root is 1/8");
  const F minus = Ops::set1_f(-1.0f);
  for (F &part : v) part = Ops::hadamard(Ops::mul(part, Ops::set1_f(0.125f)));
  const F sum[2] = {Ops::add(v[0], v[1]), Ops::add(v[2], v[3])};
  const F difference[2] = {Ops::fma(v[1], minus, v[0]), Ops::fma(v[3], minus, v[2])};
  v[0] = Ops::add(sum[0], sum[1]);
  v[1] = Ops::add(difference[0], difference[1]);
  v[2] = Ops::fma(sum[1], minus, sum[0]);
  v[3] = Ops::fma(difference[1], minus, difference[0]);
}

// Rotates `count` values; those after the last whole block stay.
template <class Ops>
KTK_INLINE void rotate_values(float *values, int64_t count) {
  for (int64_t c = 0; c + kRotation <= count; c += kRotation) {
    typename Ops::F v[kRotationVectors];
    for (int i = 0; i < kRotationVectors; i++) v[i] = Ops::load_f(values + c + i * 16);
    rotate<Ops>(v);
    for (int i = 0; i < kRotationVectors; i++) Ops::store_f(values + c + i * 16, v[i]);
  }
}

// The 64 columns of a step of bytes from `index` of a row with `count` values on, rotated if there are that
// many and `rotated` says so; zero past the end.
constexpr int kByteStepVectors = kStepBytes / 16;
static_assert(kRotation == kStepBytes, "a step of bytes is one block of a rotation");
template <class Ops>
KTK_INLINE void load_step(const void *values, int32_t dtype, int64_t index, int64_t count, bool rotated,
                          typename Ops::F (&v)[kByteStepVectors]) {
  for (int i = 0; i < kByteStepVectors; i++) {
    const int64_t at = index + i * 16;
    v[i] = at < count ? load_values<Ops>(values, dtype, at, count) : Ops::zero_f();
  }
  if (rotated && index + kRotation <= count) rotate<Ops>(v);
}

// Quantises values [first, last) of a row to int8 with one scale, into the steps of `row`, and zeroes the
// rest of the last step. `first` is on a step; sums are of `sum_columns` columns each, counted from it.
// Pairs: a sum of all columns comes first, and each other is two, of the first half of its columns in its low
// 16 bits and of the second in its high ones.
template <class Ops, bool Pairs>
KTK_INLINE void quantise_group(const void *values, int32_t dtype, int64_t first, int64_t last, bool rotated,
                               int64_t sum_columns, uint8_t *row, int64_t step_stride_bytes, float *scale,
                               int32_t *sums) {
  typedef typename Ops::F F;
  typedef typename Ops::I I;
  I largest = Ops::zero_i();
  for (int64_t i = first; i < last; i += kStepBytes) {
    F v[kByteStepVectors];
    load_step<Ops>(values, dtype, i, last, rotated, v);
    for (const F part : v) largest = larger_magnitude<Ops>(largest, Ops::as_i(part));
  }
  const int32_t amax_bits = Ops::reduce_max_i(largest);
  const Int8Scale s = int8_scale(amax_bits);
  *scale = s.scale;
  const F inverse = Ops::set1_f(s.inverse);
  // A non-finite row multiplies 0 by its NaN scale, never a rounded NaN.
  const bool finite = amax_bits < kInfinityBits;
  uint8_t *step = row + first / kStepBytes * step_stride_bytes;
  int32_t *next_sum = Pairs ? sums + 1 : sums;
  I sum = Ops::zero_i(), low = Ops::zero_i(), all = Ops::zero_i();
  int64_t summed = 0;
  const auto finish_sum = [&] {
    int32_t total = Ops::reduce_add_i(sum);
    if (Pairs) {
      all = Ops::add_i(all, Ops::add_i(sum, low));
      total = (int32_t)((uint32_t)total << 16 | ((uint32_t)Ops::reduce_add_i(low) & 0xffff));
    }
    *next_sum++ = total;
  };
  for (int64_t i = first; i < last; i += kStepBytes, step += step_stride_bytes) {
    F v[kByteStepVectors];
    load_step<Ops>(values, dtype, i, last, rotated, v);
    for (int part = 0; part < kByteStepVectors; part++) {
      if (Pairs && part == kByteStepVectors / 2) {
        low = sum;
        sum = Ops::zero_i();
      }
      const I q = finite ? Ops::round_i(Ops::mul(v[part], inverse)) : Ops::zero_i();
      Ops::store_low_bytes(step + part * 16, q);
      sum = Ops::add_i(sum, q);
      summed += 16;
      if (summed < sum_columns) continue;
      // The last step may hold a part that is all padding, which has no sum.
      if (i + (part + 1) * 16 - sum_columns < last) finish_sum();
      sum = Ops::zero_i();
      summed = 0;
    }
  }
  if (summed > 0) finish_sum();
  if (Pairs) *sums = Ops::reduce_add_i(all);
}

// Rounds values [first, last) of a row to bf16 into the steps of `row`, zeroing the rest of the last step.
template <class Ops>
KTK_INLINE void round_group(const void *values, int32_t dtype, int64_t first, int64_t last, uint8_t *row,
                            int64_t step_stride_bytes) {
  constexpr int64_t kColumns = kStepBytes / 2;
  const int64_t end = (last + kColumns - 1) / kColumns * kColumns;
  for (int64_t i = first; i < end; i += 16) {
    const typename Ops::F v = i < last ? load_values<Ops>(values, dtype, i, last) : Ops::zero_f();
    Ops::store_bf16((uint16_t *)(row + i / kColumns * step_stride_bytes + i % kColumns * 2), v);
  }
}

// Columns of one sum of activations, or of one pair of them.
template <class Format>
KTK_INLINE int64_t sum_columns(const Gemm &gemm) {
  if (Format::kFactors) return Format::kStepColumns;
  return gemm.halves == 2 ? Format::kStepColumns / 2 : (int64_t)gemm.segment_steps * Format::kStepColumns;
}

// Where row `index` of `rows` rows lies: its first step, and the distance between its steps.
struct RowAddress {
  uint8_t *data;
  int64_t step_stride_bytes;
};
KTK_INLINE RowAddress row_address(uint8_t *data, const Gemm &gemm, int rows, int index) {
  const int block = index / kBlockRows;
  const int left = rows - block * kBlockRows;
  const int block_rows = left < kBlockRows ? left : kBlockRows;
  uint8_t *start = data + (int64_t)block * kBlockRows * gemm.row_bytes;
  return {start + (index % kBlockRows) * kStepBytes, (int64_t)block_rows * kStepBytes};
}

template <class Ops, class Format>
static void quantise_rows(const QuantiseArgs *args) {
  const Gemm &gemm = *args->gemm;
  const int64_t value_bytes = args->dtype == KTK_DTYPE_F32 ? 4 : 2;
  for (int64_t t = args->first; t < args->last; t++) {
    const void *values = (const uint8_t *)args->input + t * gemm.depth * value_bytes;
    uint8_t *row = args->rows.data + t * gemm.row_bytes;
    if constexpr (Format::kInteger) {
      const int64_t columns = sum_columns<Format>(gemm);
      const int64_t group_columns =
          gemm.row_groups == 1 ? gemm.depth : columns * (gemm.sums_per_row_group - Format::kFactors);
      for (int64_t group = 0; group < gemm.row_groups; group++) {
        const int64_t first = group * group_columns, last = first + group_columns;
        quantise_group<Ops, Format::kFactors>(
            values, args->dtype, first, last < gemm.depth ? last : gemm.depth, gemm.rotated != 0, columns,
            row, kStepBytes, args->rows.scale + t * gemm.row_groups + group,
            args->rows.sum + t * gemm.sums + group * gemm.sums_per_row_group);
      }
    } else {
      round_group<Ops>(values, args->dtype, 0, gemm.depth, row, kStepBytes);
    }
  }
}

template <class Ops, class Format>
static void gather_block(const GatherArgs *args) {
  const Gemm &gemm = *args->gemm;
  for (int r = 0; r < args->count; r++) {
    const int64_t token = args->tokens[r];
    const uint8_t *from = args->from.data + token * gemm.row_bytes;
    uint8_t *to = args->to.data + r * kStepBytes;
    for (int s = 0; s < gemm.steps; s++) {
      Ops::store_i(to + (int64_t)s * args->count * kStepBytes, Ops::load_i(from + (int64_t)s * kStepBytes));
    }
    if constexpr (Format::kInteger) {
      __builtin_memcpy(args->to.scale + (int64_t)r * gemm.row_groups,
                       args->from.scale + token * gemm.row_groups, (uint64_t)gemm.row_groups * 4);
      __builtin_memcpy(args->to.sum + (int64_t)r * gemm.sums, args->from.sum + token * gemm.sums,
                       (uint64_t)gemm.sums * 4);
    }
  }
}
