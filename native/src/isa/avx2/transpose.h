// A 16 x 16 transposition in four 8 x 8 ones, for every set that has AVX2.
#pragma once

#include <immintrin.h>

#include "kernels/inline.h"

// Rows and columns are 16 floats apart.
KTK_INLINE void transpose_8x8(const float *rows, float *columns) {
  __m256 pairs[8], quads[8];
  for (int i = 0; i < 8; i += 2) {
    const __m256 a = _mm256_loadu_ps(rows + i * 16), b = _mm256_loadu_ps(rows + (i + 1) * 16);
    pairs[i] = _mm256_unpacklo_ps(a, b);
    pairs[i + 1] = _mm256_unpackhi_ps(a, b);
  }
  for (int i = 0; i < 8; i += 4) {
    quads[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    quads[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
    quads[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    quads[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
  }
  for (int i = 0; i < 4; i++) {
    _mm256_storeu_ps(columns + i * 16, _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20));
    _mm256_storeu_ps(columns + (i + 4) * 16, _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31));
  }
}

KTK_INLINE void transpose_16x16(const float *rows, float *columns) {
  transpose_8x8(rows, columns);
  transpose_8x8(rows + 8, columns + 8 * 16);
  transpose_8x8(rows + 8 * 16, columns + 8);
  transpose_8x8(rows + 8 * 16 + 8, columns + 8 * 16 + 8);
}
