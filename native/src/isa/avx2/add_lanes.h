// The sum of 8 lanes modulo 2^32, for every set that has AVX2.
#pragma once

#include <immintrin.h>

#include "kernels/inline.h"

KTK_INLINE int32_t add_lanes(__m256i eight) {
  const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}
