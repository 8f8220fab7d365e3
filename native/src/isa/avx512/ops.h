// Primitives for AVX-512 F, BW, VL and DQ. A vector of 16 lanes is one register.
#pragma once

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include "isa/avx2/add_lanes.h"
#include "isa/avx2/transpose.h"
#include "kernels/inline.h"

struct Avx512Ops {
  typedef __m512i Register;
  typedef __m512 F;
  // A struct, so that an integer vector and a bf16 one are different types.
  struct I {
    __m512i v;
  };
  struct W8 {
    __m512i even, odd;
  };
  struct A8 {
    __m512i even, odd;
  };
  struct WB {
    __m512 even, odd;
  };
  struct AB {
    __m512 even, odd;
  };

  static constexpr uint32_t kNeeds = kNeedsAvx2 | kNeedsFma | kNeedsF16c | kNeedsAvx512F | kNeedsAvx512Bw |
                                     kNeedsAvx512Vl | kNeedsAvx512Dq | kNeedsOsYmm | kNeedsOsZmm;
  static constexpr int32_t kAutomatic = 1;
  // 8 rows x 2 tiles of sums leave half of the 32 registers for weights and activations.
  static constexpr int kBlockMaxRows = 8;
  // What EPYC processors fetch by themselves: docs/benchmarks/log.md.
  template <class Format>
  static constexpr TilesApart kTilesApart = TilesApart::first_rows;
  template <class Format>
  static constexpr int64_t kReadAheadBytes = Format::kExpands ? 2048 : 0;
  // Rows from which an expert goes to matrix units; 0: there are none.
  template <class Format>
  static constexpr int32_t kTileRows = 0;
  static constexpr int kExpandedRows = 0;  // bf16 products use their operands as they are
  static constexpr bool kWordSums = true;
  static constexpr bool kUnrollsNibbles = false;
  static constexpr bool kFetchesNextPair = true;

  KTK_INLINE F zero_f() { return _mm512_setzero_ps(); }
  KTK_INLINE F set1_f(float value) { return _mm512_set1_ps(value); }
  KTK_INLINE F load_f(const float *p) { return _mm512_loadu_ps(p); }
  KTK_INLINE void store_f(float *p, F v) { _mm512_storeu_ps(p, v); }
  KTK_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
  KTK_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  KTK_INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
  KTK_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  KTK_INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }
  KTK_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
  KTK_INLINE F where_less(F a, F b, F yes, F no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
  }
  // `other` plus v, or minus v in the lanes of `minus`.
  KTK_INLINE F butterfly(F v, F other, __mmask16 minus) {
    return _mm512_mask_sub_ps(_mm512_add_ps(other, v), minus, other, v);
  }
  KTK_INLINE F hadamard(F v) {
    v = butterfly(v, _mm512_permute_ps(v, 0xb1), 0xaaaa);
    v = butterfly(v, _mm512_permute_ps(v, 0x4e), 0xcccc);
    v = butterfly(v, _mm512_shuffle_f32x4(v, v, 0xb1), 0xf0f0);
    return butterfly(v, _mm512_shuffle_f32x4(v, v, 0x4e), 0xff00);
  }

  KTK_INLINE I zero_i() { return {_mm512_setzero_si512()}; }
  KTK_INLINE I set1_i(int32_t value) { return {_mm512_set1_epi32(value)}; }
  KTK_INLINE I load_i(const void *p) { return {_mm512_loadu_si512(p)}; }
  KTK_INLINE void store_i(void *p, I v) { _mm512_storeu_si512(p, v.v); }
  KTK_INLINE void stream_i(void *p, I v) { _mm512_stream_si512((__m512i *)p, v.v); }
  KTK_INLINE I add_i(I a, I b) { return {_mm512_add_epi32(a.v, b.v)}; }
  KTK_INLINE I sub_i(I a, I b) { return {_mm512_sub_epi32(a.v, b.v)}; }
  // Each lane: the sum of the products of its two signed 16-bit words.
  KTK_INLINE I dot_words(I a, I b) { return {_mm512_madd_epi16(a.v, b.v)}; }
  KTK_INLINE I mul_words(I a, I b) { return {_mm512_mullo_epi16(a.v, b.v)}; }
  KTK_INLINE I sub_words(I a, I b) { return {_mm512_sub_epi16(a.v, b.v)}; }
  KTK_INLINE I add_bytes(I a, I b) { return {_mm512_add_epi8(a.v, b.v)}; }
  KTK_INLINE I and_i(I a, I b) { return {_mm512_and_si512(a.v, b.v)}; }
  KTK_INLINE I max_i(I a, I b) { return {_mm512_max_epi32(a.v, b.v)}; }
  KTK_INLINE I mul_i(I a, I b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
  KTK_INLINE I xor_i(I a, I b) { return {_mm512_xor_si512(a.v, b.v)}; }
  KTK_INLINE I shift_left_i(I a, int count) { return {_mm512_slli_epi32(a.v, (unsigned)count)}; }
  KTK_INLINE I shift_right_i(I a, int count) { return {_mm512_srli_epi32(a.v, (unsigned)count)}; }
  KTK_INLINE I shift_right_signed(I a, int count) { return {_mm512_srai_epi32(a.v, (unsigned)count)}; }
  KTK_INLINE void transpose_pairs(const uint8_t *rows, uint8_t *to) {
    const __m512i regroup =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15));
    __m512i r[8], pairs[8], fours[8];
    for (int i = 0; i < 8; i++) r[i] = _mm512_shuffle_epi8(_mm512_loadu_si512(rows + i * 64), regroup);
    // Of rows i and i + 1: the even groups of both, then the odd ones.
    for (int i = 0; i < 8; i += 2) {
      pairs[i] = _mm512_unpacklo_epi64(r[i], r[i + 1]);
      pairs[i + 1] = _mm512_unpackhi_epi64(r[i], r[i + 1]);
    }
    // Lane l of pairs[i] holds group 2l (or 2l + 1) of two rows; four lanes of one group make a row.
    for (int parity = 0; parity < 2; parity++) {
      const __m512i a = pairs[parity], b = pairs[parity + 2], c = pairs[parity + 4], d = pairs[parity + 6];
      fours[0] = _mm512_shuffle_i64x2(a, b, 0x88);  // groups 0 and 2 of a, then of b
      fours[1] = _mm512_shuffle_i64x2(a, b, 0xdd);
      fours[2] = _mm512_shuffle_i64x2(c, d, 0x88);
      fours[3] = _mm512_shuffle_i64x2(c, d, 0xdd);
      _mm512_storeu_si512(to + parity * 64, _mm512_shuffle_i64x2(fours[0], fours[2], 0x88));
      _mm512_storeu_si512(to + (parity + 2) * 64, _mm512_shuffle_i64x2(fours[1], fours[3], 0x88));
      _mm512_storeu_si512(to + (parity + 4) * 64, _mm512_shuffle_i64x2(fours[0], fours[2], 0xdd));
      _mm512_storeu_si512(to + (parity + 6) * 64, _mm512_shuffle_i64x2(fours[1], fours[3], 0xdd));
    }
  }
  // GCC's own reduction adds ints, which must not overflow.
  KTK_INLINE int32_t reduce_add_i(I a) {
    return add_lanes(_mm256_add_epi32(_mm512_castsi512_si256(a.v), _mm512_extracti64x4_epi64(a.v, 1)));
  }
  KTK_INLINE int32_t reduce_max_i(I a) { return _mm512_reduce_max_epi32(a.v); }
  KTK_INLINE F from_i(I a) { return _mm512_cvtepi32_ps(a.v); }
  KTK_INLINE I round_i(F a) { return {_mm512_cvtps_epi32(a)}; }
  KTK_INLINE F round_f(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  KTK_INLINE F as_f(I a) { return _mm512_castsi512_ps(a.v); }
  KTK_INLINE I as_i(F a) { return {_mm512_castps_si512(a)}; }

  KTK_INLINE F load_bf16(const uint16_t *p) {
    const __m256i halves = _mm256_loadu_si256((const __m256i *)p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  }
  // Each lane's bf16 in its high half, rounded to nearest even; a NaN stays one and becomes quiet.
  KTK_INLINE __m512i round_to_bf16(F v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    return _mm512_mask_or_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), bits,
                                _mm512_set1_epi32(0x400000));
  }
  KTK_INLINE I join_bf16(F even, F odd) {
    const __m512i low = _mm512_srli_epi32(round_to_bf16(even), 16);
    return {_mm512_mask_blend_epi16(0xaaaaaaaau, low, round_to_bf16(odd))};
  }
  KTK_INLINE void store_bf16(uint16_t *p, F v) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_to_bf16(v), 16)));
  }
  KTK_INLINE F load_f16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
  KTK_INLINE void store_f16(uint16_t *p, F v) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  KTK_INLINE void store_low_bytes(uint8_t *p, I v) {
    _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(v.v));
  }
  KTK_INLINE void transpose(const void *rows, void *columns) {
    transpose_16x16((const float *)rows, (float *)columns);
  }
  KTK_INLINE I load_u8(const uint8_t *p) {
    return {_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p))};
  }

  KTK_INLINE int32_t load_quad(const uint8_t *p) {
    int32_t quad;
    __builtin_memcpy(&quad, p, 4);
    return quad;
  }
  KTK_INLINE W8 split_u8(const uint8_t *tile_row) {
    const __m512i bytes = _mm512_loadu_si512(tile_row);
    return {_mm512_and_si512(bytes, _mm512_set1_epi16(255)), _mm512_srli_epi16(bytes, 8)};
  }
  KTK_INLINE A8 quad_s8(const uint8_t *activations) {
    const __m512i quad = _mm512_set1_epi32(load_quad(activations));
    return {_mm512_srai_epi16(_mm512_slli_epi16(quad, 8), 8), _mm512_srai_epi16(quad, 8)};
  }
  KTK_INLINE I dot_u8s8(I sum, W8 weights, A8 quad) {
    const __m512i even = _mm512_madd_epi16(weights.even, quad.even);
    return {_mm512_add_epi32(sum.v, _mm512_add_epi32(even, _mm512_madd_epi16(weights.odd, quad.odd)))};
  }
  KTK_INLINE I low_nibbles(I bytes) { return and_i(bytes, set1_i(0x0f0f0f0f)); }
  KTK_INLINE I high_nibbles(I bytes) { return low_nibbles({_mm512_srli_epi32(bytes.v, 4)}); }
  KTK_INLINE I quad_u4(const uint8_t *activations) { return set1_i(load_quad(activations)); }
  // Partial sums of 16 bits: 8 pairs of products, each at most 2 * 15 * 127, stay below 2^15.
  struct Q {
    __m512i v;
  };
  KTK_INLINE Q zero_quads() { return {_mm512_setzero_si512()}; }
  KTK_INLINE Q add_quad(Q part, I nibbles, I quad) {
    return {_mm512_add_epi16(part.v, _mm512_maddubs_epi16(nibbles.v, quad.v))};
  }
  KTK_INLINE I add_quads(I sum, Q part, I words) {
    return {_mm512_add_epi32(sum.v, _mm512_madd_epi16(part.v, words.v))};
  }
  KTK_INLINE I bytes_of(const uint8_t *p) {
    const __m512i lanes = _mm512_set_epi8(15, 15, 15, 15, 14, 14, 14, 14, 13, 13, 13, 13, 12, 12, 12, 12,  //
                                          11, 11, 11, 11, 10, 10, 10, 10, 9, 9, 9, 9, 8, 8, 8, 8,          //
                                          7, 7, 7, 7, 6, 6, 6, 6, 5, 5, 5, 5, 4, 4, 4, 4,                  //
                                          3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    return {_mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)p)), lanes)};
  }
  KTK_INLINE I words_of(const uint8_t *p) {
    return {_mm512_and_si512(bytes_of(p).v, _mm512_set1_epi16(255))};
  }

  KTK_INLINE WB split_bf16(const uint8_t *tile_row) {
    const __m512i pairs = _mm512_loadu_si512(tile_row);
    return {_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xffff0000)))};
  }
  KTK_INLINE AB pair_bf16(const uint8_t *activations) {
    const __m512i pair = _mm512_set1_epi32(load_quad(activations));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(pair, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(pair, _mm512_set1_epi32((int)0xffff0000)))};
  }
  KTK_INLINE F dot_bf16(F sum, WB weights, AB pair) {
    return _mm512_fmadd_ps(weights.odd, pair.odd, _mm512_fmadd_ps(weights.even, pair.even, sum));
  }
};
