// Primitives for AVX2 with FMA and F16C. A vector of 16 lanes is two registers.
#pragma once

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include "isa/avx2/add_lanes.h"
#include "isa/avx2/transpose.h"
#include "kernels/inline.h"

struct Avx2Ops {
  typedef __m256i Register;
  struct F {
    __m256 low, high;
  };
  struct I {
    __m256i low, high;
  };
  // Bytes 0 and 2 of each lane as 16-bit values, and bytes 1 and 3: vpmaddubsw would saturate on u8 x s8.
  struct W8 {
    I even, odd;
  };
  struct A8 {
    __m256i even, odd;
  };
  struct WB {
    F even, odd;
  };
  struct AB {
    __m256 even, odd;
  };

  static constexpr uint32_t kNeeds = kNeedsAvx2 | kNeedsFma | kNeedsF16c | kNeedsOsYmm;
  static constexpr int32_t kAutomatic = 1;
  // 2 registers of sums a row and tile, 4 of weights a tile and 2 of activations: 4 rows by 1 tile fit, 2
  // rows by 2 tiles do not.
  static constexpr int kBlockMaxRows = 4;
  template <class Format>
  static constexpr TilesApart kTilesApart = TilesApart::always;
  template <class Format>
  static constexpr int64_t kReadAheadBytes = 2048;
  // Rows from which an expert goes to matrix units; 0: there are none.
  template <class Format>
  static constexpr int32_t kTileRows = 0;

  static constexpr bool kWordSums = true;
  // 4 rows leave the sums their registers, and then an eighth of the additions goes.
  static constexpr bool kUnrollsNibbles = true;
  static constexpr bool kFetchesNextPair = false;

  // Rows side by side of bf16 products whose weights are split into fp32 first, and how many rows that takes
  // to pay: 2 rows by 2 tiles take 8 registers of sums, 4 of weights and 2 of activations. 3 rows would fill
  // the 16, and compilers then keep a third of the sums in memory.
  static constexpr int kExpandedRows = 2;
  static constexpr int kExpandedLeast = 12;
  static constexpr int kExpandedBytes =
      3 << 17;  // of rows in one pass, where the second-level cache has 512 KiB

  KTK_INLINE F zero_f() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  KTK_INLINE F set1_f(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
  KTK_INLINE F load_f(const float *p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  KTK_INLINE void store_f(float *p, F v) {
    _mm256_storeu_ps(p, v.low);
    _mm256_storeu_ps(p + 8, v.high);
  }
  KTK_INLINE F add(F a, F b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
  KTK_INLINE F mul(F a, F b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
  KTK_INLINE F div(F a, F b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
  KTK_INLINE F fma(F a, F b, F c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
  }
  KTK_INLINE F min(F a, F b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
  KTK_INLINE F max(F a, F b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
  KTK_INLINE F where_less(F a, F b, F yes, F no) {
    return {_mm256_blendv_ps(no.low, yes.low, _mm256_cmp_ps(a.low, b.low, _CMP_LT_OQ)),
            _mm256_blendv_ps(no.high, yes.high, _mm256_cmp_ps(a.high, b.high, _CMP_LT_OQ))};
  }
  KTK_INLINE __m256 hadamard(__m256 v) {
    const __m256 first = _mm256_blend_ps(_mm256_add_ps(_mm256_permute_ps(v, 0xb1), v),
                                         _mm256_sub_ps(_mm256_permute_ps(v, 0xb1), v), 0xaa);
    const __m256 second = _mm256_blend_ps(_mm256_add_ps(_mm256_permute_ps(first, 0x4e), first),
                                          _mm256_sub_ps(_mm256_permute_ps(first, 0x4e), first), 0xcc);
    const __m256 turned = _mm256_permute2f128_ps(second, second, 1);
    return _mm256_blend_ps(_mm256_add_ps(turned, second), _mm256_sub_ps(turned, second), 0xf0);
  }
  KTK_INLINE F hadamard(F v) {
    const __m256 low = hadamard(v.low), high = hadamard(v.high);
    return {_mm256_add_ps(low, high), _mm256_sub_ps(low, high)};
  }

  KTK_INLINE I zero_i() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  KTK_INLINE I set1_i(int32_t value) { return {_mm256_set1_epi32(value), _mm256_set1_epi32(value)}; }
  KTK_INLINE I load_i(const void *p) {
    const __m256i *halves = (const __m256i *)p;
    return {_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)};
  }
  KTK_INLINE void store_i(void *p, I v) {
    __m256i *halves = (__m256i *)p;
    _mm256_storeu_si256(halves, v.low);
    _mm256_storeu_si256(halves + 1, v.high);
  }
  KTK_INLINE void stream_i(void *p, I v) {
    _mm256_stream_si256((__m256i *)p, v.low);
    _mm256_stream_si256((__m256i *)p + 1, v.high);
  }
  KTK_INLINE I add_i(I a, I b) { return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)}; }
  KTK_INLINE I sub_i(I a, I b) { return {_mm256_sub_epi32(a.low, b.low), _mm256_sub_epi32(a.high, b.high)}; }
  // Each lane: the sum of the products of its two signed 16-bit words.
  KTK_INLINE I dot_words(I a, I b) {
    return {_mm256_madd_epi16(a.low, b.low), _mm256_madd_epi16(a.high, b.high)};
  }
  KTK_INLINE I mul_words(I a, I b) {
    return {_mm256_mullo_epi16(a.low, b.low), _mm256_mullo_epi16(a.high, b.high)};
  }
  KTK_INLINE I sub_words(I a, I b) {
    return {_mm256_sub_epi16(a.low, b.low), _mm256_sub_epi16(a.high, b.high)};
  }
  KTK_INLINE I add_bytes(I a, I b) {
    return {_mm256_add_epi8(a.low, b.low), _mm256_add_epi8(a.high, b.high)};
  }
  KTK_INLINE I and_i(I a, I b) { return {_mm256_and_si256(a.low, b.low), _mm256_and_si256(a.high, b.high)}; }
  KTK_INLINE I max_i(I a, I b) { return {_mm256_max_epi32(a.low, b.low), _mm256_max_epi32(a.high, b.high)}; }
  KTK_INLINE I mul_i(I a, I b) {
    return {_mm256_mullo_epi32(a.low, b.low), _mm256_mullo_epi32(a.high, b.high)};
  }
  KTK_INLINE I xor_i(I a, I b) { return {_mm256_xor_si256(a.low, b.low), _mm256_xor_si256(a.high, b.high)}; }
  KTK_INLINE I shift_left_i(I a, int count) {
    return {_mm256_slli_epi32(a.low, count), _mm256_slli_epi32(a.high, count)};
  }
  KTK_INLINE I shift_right_signed(I a, int count) {
    return {_mm256_srai_epi32(a.low, count), _mm256_srai_epi32(a.high, count)};
  }
  KTK_INLINE I shift_right_i(I a, int count) {
    return {_mm256_srli_epi32(a.low, count), _mm256_srli_epi32(a.high, count)};
  }
  KTK_INLINE void transpose_pairs(const uint8_t *rows, uint8_t *to) {
    const __m256i regroup = _mm256_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15, 0, 1, 4, 5,
                                             2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
    for (int p = 0; p < 8; p += 4) {
      for (int m = 0; m < 8; m += 4) {
        __m256i r[4];
        for (int i = 0; i < 4; i++) {
          const __m256i row = _mm256_loadu_si256((const __m256i *)(rows + (p + i) * 64 + m * 8));
          r[i] = _mm256_shuffle_epi8(row, regroup);
        }
        const __m256i even01 = _mm256_unpacklo_epi64(r[0], r[1]), odd01 = _mm256_unpackhi_epi64(r[0], r[1]);
        const __m256i even23 = _mm256_unpacklo_epi64(r[2], r[3]), odd23 = _mm256_unpackhi_epi64(r[2], r[3]);
        uint8_t *target = to + m * 64 + p * 8;
        _mm256_storeu_si256((__m256i *)target, _mm256_permute2x128_si256(even01, even23, 0x20));
        _mm256_storeu_si256((__m256i *)(target + 64), _mm256_permute2x128_si256(odd01, odd23, 0x20));
        _mm256_storeu_si256((__m256i *)(target + 128), _mm256_permute2x128_si256(even01, even23, 0x31));
        _mm256_storeu_si256((__m256i *)(target + 192), _mm256_permute2x128_si256(odd01, odd23, 0x31));
      }
    }
  }
  KTK_INLINE int32_t reduce_add_i(I a) { return add_lanes(_mm256_add_epi32(a.low, a.high)); }
  KTK_INLINE int32_t reduce_max_i(I a) {
    const __m256i eight = _mm256_max_epi32(a.low, a.high);
    __m128i four = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1));
    return _mm_cvtsi128_si32(four);
  }
  KTK_INLINE F from_i(I a) { return {_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)}; }
  KTK_INLINE I round_i(F a) { return {_mm256_cvtps_epi32(a.low), _mm256_cvtps_epi32(a.high)}; }
  KTK_INLINE F round_f(F a) {
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(a.low, kNearest), _mm256_round_ps(a.high, kNearest)};
  }
  KTK_INLINE F as_f(I a) { return {_mm256_castsi256_ps(a.low), _mm256_castsi256_ps(a.high)}; }
  KTK_INLINE I as_i(F a) { return {_mm256_castps_si256(a.low), _mm256_castps_si256(a.high)}; }

  KTK_INLINE __m256 bf16_to_f32(__m128i halves) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
  }
  KTK_INLINE F load_bf16(const uint16_t *p) {
    const __m128i *halves = (const __m128i *)p;
    return {bf16_to_f32(_mm_loadu_si128(halves)), bf16_to_f32(_mm_loadu_si128(halves + 1))};
  }
  // Each lane's bf16 in its low half, rounded to nearest even; a NaN stays one and becomes quiet.
  KTK_INLINE __m256i round_to_bf16(__m256 v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
  }
  KTK_INLINE I join_bf16(F even, F odd) {
    return {_mm256_or_si256(round_to_bf16(even.low), _mm256_slli_epi32(round_to_bf16(odd.low), 16)),
            _mm256_or_si256(round_to_bf16(even.high), _mm256_slli_epi32(round_to_bf16(odd.high), 16))};
  }
  KTK_INLINE void store_bf16(uint16_t *p, F v) {
    const __m256i packed = _mm256_packus_epi32(round_to_bf16(v.low), round_to_bf16(v.high));
    _mm256_storeu_si256((__m256i *)p, _mm256_permute4x64_epi64(packed, 0xd8));
  }
  KTK_INLINE F load_f16(const uint16_t *p) {
    const __m128i *halves = (const __m128i *)p;
    return {_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
  }
  KTK_INLINE void store_f16(uint16_t *p, F v) {
    __m128i *halves = (__m128i *)p;
    _mm_storeu_si128(halves, _mm256_cvtps_ph(v.low, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    _mm_storeu_si128(halves + 1, _mm256_cvtps_ph(v.high, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  KTK_INLINE void store_low_bytes(uint8_t *p, I v) {
    const __m256i byte = _mm256_set1_epi32(255);
    __m256i packed = _mm256_packus_epi32(_mm256_and_si256(v.low, byte), _mm256_and_si256(v.high, byte));
    packed = _mm256_permute4x64_epi64(packed, 0xd8);
    _mm_storeu_si128((__m128i *)p,
                     _mm_packus_epi16(_mm256_castsi256_si128(packed), _mm256_extracti128_si256(packed, 1)));
  }
  KTK_INLINE void transpose(const void *rows, void *columns) {
    transpose_16x16((const float *)rows, (float *)columns);
  }
  KTK_INLINE I load_u8(const uint8_t *p) {
    const __m128i bytes = _mm_loadu_si128((const __m128i *)p);
    return {_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))};
  }

  KTK_INLINE int32_t load_quad(const uint8_t *p) {
    int32_t quad;
    __builtin_memcpy(&quad, p, 4);
    return quad;
  }
  KTK_INLINE W8 split_u8(const uint8_t *tile_row) {
    const I bytes = load_i(tile_row);
    const __m256i low = _mm256_set1_epi16(255);
    return {{_mm256_and_si256(bytes.low, low), _mm256_and_si256(bytes.high, low)},
            {_mm256_srli_epi16(bytes.low, 8), _mm256_srli_epi16(bytes.high, 8)}};
  }
  KTK_INLINE A8 quad_s8(const uint8_t *activations) {
    const __m256i quad = _mm256_set1_epi32(load_quad(activations));
    return {_mm256_srai_epi16(_mm256_slli_epi16(quad, 8), 8), _mm256_srai_epi16(quad, 8)};
  }
  KTK_INLINE I dot_u8s8(I sum, W8 weights, A8 quad) {
    sum = add_i(sum, {_mm256_madd_epi16(weights.even.low, quad.even),
                      _mm256_madd_epi16(weights.even.high, quad.even)});
    return add_i(
        sum, {_mm256_madd_epi16(weights.odd.low, quad.odd), _mm256_madd_epi16(weights.odd.high, quad.odd)});
  }
  KTK_INLINE I low_nibbles(I bytes) { return and_i(bytes, set1_i(0x0f0f0f0f)); }
  KTK_INLINE I high_nibbles(I bytes) {
    return low_nibbles({_mm256_srli_epi32(bytes.low, 4), _mm256_srli_epi32(bytes.high, 4)});
  }
  KTK_INLINE I quad_u4(const uint8_t *activations) { return set1_i(load_quad(activations)); }
  // Partial sums of 16 bits: 8 pairs of products, each at most 2 * 15 * 127, stay below 2^15.
  struct Q {
    __m256i low, high;
  };
  KTK_INLINE Q zero_quads() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  // Written out: of intrinsics compilers make more products at once than there are registers, and copies.
  KTK_INLINE Q mul_quad(I nibbles, I quad) {
    Q part;
    __asm__(
        "vpmaddubsw %2, %3, %0\n\t"
        "vpmaddubsw %2, %4, %1"
        : "=&x"(part.low), "=x"(part.high)
        : "x"(quad.low), "x"(nibbles.low), "x"(nibbles.high));
    return part;
  }
  KTK_INLINE Q add_quad(Q part, I nibbles, I quad) {
    __m256i low, high = quad.low;
    __asm__(
        "vpmaddubsw %3, %4, %2\n\t"
        "vpmaddubsw %3, %5, %3\n\t"
        "vpaddw %2, %0, %0\n\t"
        "vpaddw %3, %1, %1"
        : "+x"(part.low), "+x"(part.high), "=&x"(low), "+x"(high)
        : "x"(nibbles.low), "x"(nibbles.high));
    return part;
  }
  KTK_INLINE I add_quads(I sum, Q part, I words) {
    return add_i(sum, {_mm256_madd_epi16(part.low, words.low), _mm256_madd_epi16(part.high, words.high)});
  }
  // 16 bytes, each in the four bytes of its lane but those whose bits are set in `zeros`.
  KTK_INLINE I spread(const uint8_t *p, __m256i zeros) {
    const __m256i bytes = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)p));
    const __m256i low = _mm256_setr_epi8(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5,
                                         5, 6, 6, 6, 6, 7, 7, 7, 7);
    const __m256i high = _mm256_add_epi8(low, _mm256_set1_epi8(8));
    return {_mm256_shuffle_epi8(bytes, _mm256_or_si256(low, zeros)),
            _mm256_shuffle_epi8(bytes, _mm256_or_si256(high, zeros))};
  }
  KTK_INLINE I bytes_of(const uint8_t *p) { return spread(p, _mm256_setzero_si256()); }
  KTK_INLINE I words_of(const uint8_t *p) { return spread(p, _mm256_set1_epi16((int16_t)0xff00)); }

  KTK_INLINE WB split_bf16(const uint8_t *tile_row) {
    const I pairs = load_i(tile_row);
    const __m256i odd = _mm256_set1_epi32((int)0xffff0000);
    return {as_f({_mm256_slli_epi32(pairs.low, 16), _mm256_slli_epi32(pairs.high, 16)}),
            as_f({_mm256_and_si256(pairs.low, odd), _mm256_and_si256(pairs.high, odd)})};
  }
  KTK_INLINE AB pair_bf16(const uint8_t *activations) {
    const __m256i pair = _mm256_set1_epi32(load_quad(activations));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(pair, 16)),
            _mm256_castsi256_ps(_mm256_and_si256(pair, _mm256_set1_epi32((int)0xffff0000)))};
  }
  // One of the two, in all lanes.
  KTK_INLINE F even_bf16(const uint8_t *activations) {
    const __m256 even = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_set1_epi32(load_quad(activations)), 16));
    return {even, even};
  }
  KTK_INLINE F odd_bf16(const uint8_t *activations) {
    const __m256 odd = _mm256_castsi256_ps(
        _mm256_and_si256(_mm256_set1_epi32(load_quad(activations)), _mm256_set1_epi32((int)0xffff0000)));
    return {odd, odd};
  }
  KTK_INLINE F dot_bf16(F sum, WB weights, AB pair) {
    return fma(weights.odd, {pair.odd, pair.odd}, fma(weights.even, {pair.even, pair.even}, sum));
  }
};
