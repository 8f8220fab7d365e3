// Primitives for AVX-512 with VNNI and BF16: the dot products become one instruction each.
#pragma once

#include "isa/avx512/ops.h"

struct Avx512Bf16Ops : Avx512Ops {
  typedef I W8;
  typedef I A8;
  typedef I WB;
  typedef I AB;

  static constexpr uint32_t kNeeds = Avx512Ops::kNeeds | kNeedsAvx512Vnni | kNeedsAvx512Bf16;
  static constexpr bool kWordSums = false;

  KTK_INLINE W8 split_u8(const uint8_t *tile_row) { return load_i(tile_row); }
  KTK_INLINE A8 quad_s8(const uint8_t *activations) { return set1_i(load_quad(activations)); }
  KTK_INLINE I dot_u8s8(I sum, W8 weights, A8 quad) {
    return {_mm512_dpbusd_epi32(sum.v, weights.v, quad.v)};
  }

  // Subnormal results become zero, as which the dot products take them anyway.
  KTK_INLINE I join_bf16(F even, F odd) {
    const __m512i lanes = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                           23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return {_mm512_permutexvar_epi16(lanes, (__m512i)_mm512_cvtne2ps_pbh(odd, even))};
  }

  KTK_INLINE WB split_bf16(const uint8_t *tile_row) { return load_i(tile_row); }
  KTK_INLINE AB pair_bf16(const uint8_t *activations) { return set1_i(load_quad(activations)); }
  KTK_INLINE F dot_bf16(F sum, WB weights, AB pair) {
    return _mm512_dpbf16_ps(sum, (__m512bh)weights.v, (__m512bh)pair.v);
  }
};
