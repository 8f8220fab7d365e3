// Adapters, row-major as they are trained, as bf16 tiles of products: 16 columns by 32 of K, [16 pairs of
// K][16 columns][2]. Nothing is computed but the rounding of fp32 to bf16, and a tile is written whole.
#pragma once

#include <cstdint>

namespace ktk {

// A matrix of an adapter, or a part of one.
struct AdapterMatrix {
  const void *values;
  int32_t dtype;  // KTK_DTYPE_F32 or KTK_DTYPE_BF16
  int64_t rows, columns;
  int64_t stride;  // values from one row to the next
};

// Where in the tiles a matrix goes.
struct TileSpan {
  uint8_t *tiles;
  int64_t panel_stride_bytes, step_stride_bytes;
  int32_t panels, steps;  // of the tiles, in all of which zeros surround the matrices
};

// Two matrices share tiles: the second begins `second_column` columns and `second_depth` of K, both even,
// after the first. With `values` null there is no second.
struct AdapterPair {
  AdapterMatrix first, second;
  int64_t second_column, second_depth;
};

// Bits 0 and 1: the first, the second matrix holds NaN, infinity or what rounds to infinity.
using NotFinite = uint32_t;

// Rows become columns of tiles, and columns K.
NotFinite tiles_of_rows(const AdapterPair &matrices, const TileSpan &to) noexcept;
// Rows become K, and columns columns of tiles.
NotFinite tiles_of_columns(const AdapterPair &matrices, const TileSpan &to) noexcept;

}  // namespace ktk
