#include "engine/finite.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "engine/geometry.h"
#include "engine/sections.h"
#include "ktk.h"

namespace ktk {
namespace {

// Whether no word has all bits of `exponent`. Without a way out within a block, so that compilers use
// vectors.
template <typename Word>
bool none_has(const uint8_t *values, int64_t count, Word exponent) {
  constexpr int64_t kBlock = 512;
  for (int64_t first = 0; first < count; first += kBlock) {
    const int64_t stop = std::min(first + kBlock, count);
    Word found = 0;
    for (int64_t i = first; i < stop; i++) {
      Word word;
      std::memcpy(&word, values + i * static_cast<int64_t>(sizeof(Word)), sizeof(Word));
      found = static_cast<Word>(found | ((word & exponent) == exponent ? 1 : 0));
    }
    if (found != 0) return false;
  }
  return true;
}

}  // namespace

bool all_finite(const void *values, int64_t count, int32_t dtype) {
  const auto *bytes = static_cast<const uint8_t *>(values);
  switch (dtype) {
    case KTK_DTYPE_BF16:
      return none_has<uint16_t>(bytes, count, 0x7f80);
    case KTK_DTYPE_F16:
      return none_has<uint16_t>(bytes, count, 0x7c00);
    default:
      return none_has<uint32_t>(bytes, count, 0x7f800000);
  }
}

BrokenRows broken_rows(WorkerPool &pool, const SpanLabel &label, const void *values, int64_t rows,
                       int64_t columns, int32_t dtype) {
  constexpr int64_t kUnitValues = 32768;
  const int64_t unit_rows = std::max<int64_t>(1, kUnitValues / std::max<int64_t>(columns, 1));
  const int64_t row_bytes = columns * dtype_bytes(dtype);
  std::atomic<int64_t> count{0}, first{rows};
  run_spread(pool, label, divide_up(rows, unit_rows), 1, [&](int64_t unit) {
    const int64_t stop = std::min((unit + 1) * unit_rows, rows);
    for (int64_t row = unit * unit_rows; row < stop; row++) {
      if (all_finite(static_cast<const uint8_t *>(values) + row * row_bytes, columns, dtype)) continue;
      count.fetch_add(1, std::memory_order_relaxed);
      int64_t least = first.load(std::memory_order_relaxed);
      while (row < least && !first.compare_exchange_weak(least, row, std::memory_order_relaxed)) {
      }
    }
  });
  const int64_t broken = count.load();
  return {broken, broken > 0 ? first.load() : -1};
}

}  // namespace ktk
