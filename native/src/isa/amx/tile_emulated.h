// The tile instructions in plain C++, after the operation sections of Intel's SDM volume 2 (LDTILECFG,
// TILELOADD, TDPBSUD, TDPBF16PS). Same macros as tile.h.
//
// TDPBF16PS sums even and odd products of a row apart, adds the two sums and then the accumulator; inputs
// that are subnormal count as zero and so do subnormal results. A product of two bf16 values is exact in
// fp32 (unless it is subnormal), so a plain multiplication and addition stand for the fused operation.
#pragma once

#include "kernels/inline.h"

#define KTK_ISA_HAS_TILES

// Called, not inlined: hundreds of copies would only make the kernels slow to compile.
#define KTK_APART __attribute__((noinline))

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

struct TileFile {
  TileConfig config;
  uint8_t tiles[8][16][64];

  KTK_APART void configure(const TileConfig &wanted) {
    config = wanted;
    __builtin_memset(tiles, 0, sizeof tiles);
  }
  KTK_APART void zero(int number) { __builtin_memset(tiles[number], 0, sizeof tiles[number]); }
  KTK_APART void load(int number, const void *address, int64_t stride_bytes) {
    zero(number);
    for (int r = 0; r < config.rows[number]; r++) {
      __builtin_memcpy(tiles[number][r], (const uint8_t *)address + r * stride_bytes,
                       config.row_bytes[number]);
    }
  }
  KTK_APART void store(int number, void *address, int64_t stride_bytes) const {
    for (int r = 0; r < config.rows[number]; r++) {
      __builtin_memcpy((uint8_t *)address + r * stride_bytes, tiles[number][r], config.row_bytes[number]);
    }
  }
  KTK_APART void dot_s8u8(int sum, int a, int b) {
    for (int m = 0; m < config.rows[sum]; m++) {
      uint32_t row[16];
      __builtin_memcpy(row, tiles[sum][m], 64);
      for (int k = 0; k < config.row_bytes[a] / 4; k++) {
        for (int n = 0; n < config.row_bytes[sum] / 4; n++) {
          for (int i = 0; i < 4; i++) {
            row[n] += (uint32_t)((int8_t)tiles[a][m][4 * k + i] * tiles[b][k][4 * n + i]);
          }
        }
      }
      __builtin_memcpy(tiles[sum][m], row, 64);
    }
  }
  KTK_INLINE float flush(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    if (!(bits & 0x7f800000u)) bits &= 0x80000000u;
    __builtin_memcpy(&value, &bits, 4);
    return value;
  }
  KTK_INLINE float bf16(const uint8_t *p) {
    uint16_t half;
    __builtin_memcpy(&half, p, 2);
    const uint32_t bits = (uint32_t)half << 16;
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return flush(value);
  }
  KTK_APART void dot_bf16(int sum, int a, int b) {
    for (int m = 0; m < config.rows[sum]; m++) {
      float row[16], even[16] = {}, odd[16] = {};
      __builtin_memcpy(row, tiles[sum][m], 64);
      for (int k = 0; k < config.row_bytes[a] / 4; k++) {
        const float a_even = bf16(&tiles[a][m][4 * k]), a_odd = bf16(&tiles[a][m][4 * k + 2]);
        for (int n = 0; n < 16; n++) {
          even[n] = flush(even[n] + a_even * bf16(&tiles[b][k][4 * n]));
          odd[n] = flush(odd[n] + a_odd * bf16(&tiles[b][k][4 * n + 2]));
        }
      }
      for (int n = 0; n < 16; n++) row[n] = flush(flush(row[n]) + flush(even[n] + odd[n]));
      __builtin_memcpy(tiles[sum][m], row, 64);
    }
  }
};

#define KTK_TILE_FENCE() ((void)0)
#define KTK_TILE_CONFIGURE(file, config) (file).configure(config)
#define KTK_TILE_RELEASE(file) ((void)(file))
#define KTK_TILE_ZERO(file, number) (file).zero(number)
#define KTK_TILE_LOAD(file, number, address, stride_bytes) (file).load(number, address, stride_bytes)
#define KTK_TILE_LOAD_ONCE KTK_TILE_LOAD
#define KTK_TILE_STORE(file, number, address, stride_bytes) (file).store(number, address, stride_bytes)
#define KTK_TILE_DOT_S8U8(file, sum, a, b) (file).dot_s8u8(sum, a, b)
#define KTK_TILE_DOT_BF16(file, sum, a, b) (file).dot_bf16(sum, a, b)
