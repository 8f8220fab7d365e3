// Whether values from outside are finite.
#pragma once

#include <cstdint>

#include "runtime/worker_pool.h"

namespace ktk {

// Whether `count` values of a KTK_DTYPE are neither NaN nor infinity.
bool all_finite(const void *values, int64_t count, int32_t dtype);

// The rows of a matrix that are not finite: how many, and the first of them, -1 for none.
struct BrokenRows {
  int64_t count = 0, first = -1;
};

// Of `rows` rows that follow each other, looked at by the whole pool, in traces under `label`.
BrokenRows broken_rows(WorkerPool &pool, const SpanLabel &label, const void *values, int64_t rows,
                       int64_t columns, int32_t dtype);

}  // namespace ktk
