// Tile instructions. Register numbers must be literals (GCC pastes them into the assembler text), hence
// macros. `file` stands for the tile registers: nothing here, a variable in tile_emulated.h.
//
// GCC's tile intrinsics do not tell the compiler which memory they touch; KTK_TILE_FENCE keeps ordinary
// loads and stores of tile buffers on their side of them.
#pragma once

#include "kernels/inline.h"

#define KTK_ISA_HAS_TILES

struct TileFile {};

// The 64-byte operand of LDTILECFG: Intel SDM volume 1, section 18.2.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

#define KTK_TILE_FENCE() __asm__ volatile("" ::: "memory")
#define KTK_TILE_CONFIGURE(file, config) \
  do {                                   \
    KTK_TILE_FENCE();                    \
    _tile_loadconfig(&(config));         \
  } while (0)
#define KTK_TILE_RELEASE(file) _tile_release()
#define KTK_TILE_ZERO(file, number) _tile_zero(number)
#define KTK_TILE_LOAD(file, number, address, stride_bytes) _tile_loadd(number, address, stride_bytes)
// Of a tile that is not needed again soon: the first-level cache keeps what it has.
#define KTK_TILE_LOAD_ONCE(file, number, address, stride_bytes) \
  _tile_stream_loadd(number, address, stride_bytes)
#define KTK_TILE_STORE(file, number, address, stride_bytes) \
  do {                                                      \
    KTK_TILE_FENCE();                                       \
    _tile_stored(number, address, stride_bytes);            \
    KTK_TILE_FENCE();                                       \
  } while (0)
// sum += s8 rows of `a` times u8 columns of `b`.
#define KTK_TILE_DOT_S8U8(file, sum, a, b) _tile_dpbsud(sum, a, b)
#define KTK_TILE_DOT_BF16(file, sum, a, b) _tile_dpbf16ps(sum, a, b)
