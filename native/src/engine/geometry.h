// The shape of one layer's products: how K is cut into segments, and how the intermediate dimension is
// split over shards.
#pragma once

#include <cstdint>
#include <vector>

#include "core/backend.h"
#include "ktk.h"

namespace ktk {

constexpr const char *kFormatsText = "0 (bf16), 1 (int8), 2 (int4) or 3 (fp8)";
inline bool is_format(int32_t format) { return format >= 0 && format < kFormats; }

// `row_group_columns`: columns that share an activation scale; 0: one for the whole row.
Gemm make_gemm(const FormatKernels &kernels, int32_t depth, int32_t group_size, int32_t row_group_columns);

// With rows so far apart that one block of K of several blocks of rows does not meet in a few sets of a
// cache: 16 rows of a power of two steps are as many KiB.
Gemm with_rows_apart(Gemm gemm);

// The projections of a layer: of the input, and of `depth` columns of the intermediate.
Gemm gate_up_gemm(const FormatKernels &kernels, const ktk_moe_config &config);
Gemm down_gemm(const FormatKernels &kernels, const ktk_moe_config &config, int32_t depth);

// Columns [first, last) of the intermediate that a shard holds; both on `group_columns`, except the end.
struct ShardRange {
  int32_t first, last;
};
// Whole groups, as even as possible, the first shards taking what is left over. No scale group crosses a
// boundary, so that scales do not depend on the number of shards.
std::vector<ShardRange> split_intermediate(int32_t intermediate_size, int32_t group_columns, int shards);

// Of a KTK_DTYPE.
constexpr int64_t dtype_bytes(int32_t dtype) { return dtype == KTK_DTYPE_F32 ? 4 : 2; }

constexpr int64_t divide_up(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }
constexpr int64_t align_up(int64_t value, int64_t alignment) {
  return divide_up(value, alignment) * alignment;
}

}  // namespace ktk
