#include "engine/adapter_tiles.h"

#include <algorithm>
#include <cstring>

#include "ktk.h"

namespace ktk {
namespace {

constexpr int64_t kColumns = 16, kDepth = 32, kPairs = 16;

// What values are read through, one in the low half of a word or two in both. `check` collects whether one
// was not finite in bf16.
struct Bf16Values {
  using Value = uint16_t;
  static uint32_t one(const uint16_t *value, uint32_t *check) {
    *check |= (*value & 0x7f80u) + 0x80u;
    return *value;
  }
  static uint32_t two(const uint16_t *values, uint32_t *check) {
    uint32_t both;
    std::memcpy(&both, values, sizeof(both));
    *check |= (both & 0x7f807f80u) + 0x00800080u;
    return both;
  }
  static bool failed(uint32_t check) { return (check & 0x80008000u) != 0; }
};

struct F32Values {
  using Value = uint32_t;
  // To the nearest, ties to even.
  static uint32_t one(const uint32_t *value, uint32_t *check) {
    constexpr uint32_t kRoundsToInfinity = 0x7f7f8000;
    const uint32_t bits = *value;
    *check |= (bits & 0x7fffffffu) + (0x80000000u - kRoundsToInfinity);
    return (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
  }
  static uint32_t two(const uint32_t *values, uint32_t *check) {
    const uint32_t even = one(values, check);
    return even | one(values + 1, check) << 16;
  }
  static bool failed(uint32_t check) { return (check & 0x80000000u) != 0; }
};

template <typename Values>
const typename Values::Value *row_of(const AdapterMatrix &matrix, int64_t row) {
  return static_cast<const typename Values::Value *>(matrix.values) + row * matrix.stride;
}

// The part of the matrix that lies in one tile, whose first column and K are `column` and `depth` after those
// of the matrix.
template <typename Values>
bool rows_into_tile(const AdapterMatrix &matrix, int64_t column, int64_t depth, uint32_t *tile) {
  const int64_t first = std::max<int64_t>(0, -column), last = std::min(kColumns, matrix.rows - column);
  const int64_t begin = std::max<int64_t>(0, -depth), end = std::min(kDepth, matrix.columns - depth);
  if (first >= last || begin >= end) return false;
  uint32_t check = 0;
  // A row at a time: rows of A lie whole pages apart, which for a first-level cache is one place.
  for (int64_t n = first; n < last; n++) {
    const auto *values = row_of<Values>(matrix, column + n) + (depth + begin);
    uint32_t *to = tile + begin / 2 * kColumns + n;
    int64_t k = begin;
    // Four at a time by hand: compilers make vectors of the loop, and take them apart again to store them.
    for (; k + 7 < end; k += 8, values += 8, to += 4 * kColumns) {
      to[0] = Values::two(values, &check);
      to[kColumns] = Values::two(values + 2, &check);
      to[2 * kColumns] = Values::two(values + 4, &check);
      to[3 * kColumns] = Values::two(values + 6, &check);
    }
    for (; k + 1 < end; k += 2, values += 2, to += kColumns) *to = Values::two(values, &check);
    if (k < end) *to = Values::one(values, &check);
  }
  return Values::failed(check);
}

template <typename Values>
bool columns_into_tile(const AdapterMatrix &matrix, int64_t column, int64_t depth, uint32_t *tile) {
  const int64_t first = std::max<int64_t>(0, -column), last = std::min(kColumns, matrix.columns - column);
  const int64_t begin = std::max<int64_t>(0, -depth), end = std::min(kDepth, matrix.rows - depth);
  if (first >= last || begin >= end) return false;
  uint32_t check = 0;
  for (int64_t k = begin; k < end; k += 2) {
    const auto *even = row_of<Values>(matrix, depth + k) + (column + first);
    uint32_t *to = tile + k / 2 * kColumns + first;
    if (k + 1 == end) {
      for (int64_t n = 0; n < last - first; n++) to[n] = Values::one(even + n, &check);
      continue;
    }
    const auto *odd = even + matrix.stride;
    for (int64_t n = 0; n < last - first; n++)
      to[n] = Values::one(even + n, &check) | Values::one(odd + n, &check) << 16;
  }
  return Values::failed(check);
}

// Whether a matrix of `columns` and `depth`, beginning at these of a tile, fills it.
bool fills(int64_t columns, int64_t depth, int64_t column, int64_t at_depth) {
  return column >= 0 && column + kColumns <= columns && at_depth >= 0 && at_depth + kDepth <= depth;
}

template <typename Values, bool kRows>
NotFinite write_tiles(const AdapterPair &matrices, const TileSpan &to) {
  const AdapterMatrix *parts[] = {&matrices.first, &matrices.second};
  const int count = matrices.second.values != nullptr ? 2 : 1;
  NotFinite failed = 0;
  for (int64_t panel = 0; panel < to.panels; panel++) {
    for (int64_t step = 0; step < to.steps; step++) {
      auto *tile = reinterpret_cast<uint32_t *>(to.tiles + panel * to.panel_stride_bytes +
                                                step * to.step_stride_bytes);
      const int64_t column = panel * kColumns, depth = step * kDepth;
      const AdapterMatrix &whole = matrices.first;
      if (!fills(kRows ? whole.rows : whole.columns, kRows ? whole.columns : whole.rows, column, depth))
        std::memset(tile, 0, static_cast<size_t>(kPairs * kColumns) * sizeof(uint32_t));
      for (int p = 0; p < count; p++) {
        const int64_t part_column = column - p * matrices.second_column;
        const int64_t part_depth = depth - p * matrices.second_depth;
        const bool bad = kRows ? rows_into_tile<Values>(*parts[p], part_column, part_depth, tile)
                               : columns_into_tile<Values>(*parts[p], part_column, part_depth, tile);
        failed |= static_cast<NotFinite>(bad) << p;
      }
    }
  }
  return failed;
}

template <bool kRows>
NotFinite dispatch(const AdapterPair &matrices, const TileSpan &to) {
  return matrices.first.dtype == KTK_DTYPE_F32 ? write_tiles<F32Values, kRows>(matrices, to)
                                               : write_tiles<Bf16Values, kRows>(matrices, to);
}

}  // namespace

NotFinite tiles_of_rows(const AdapterPair &matrices, const TileSpan &to) noexcept {
  return dispatch<true>(matrices, to);
}

NotFinite tiles_of_columns(const AdapterPair &matrices, const TileSpan &to) noexcept {
  return dispatch<false>(matrices, to);
}

}  // namespace ktk
