#include "engine/geometry.h"

#include <algorithm>

namespace ktk {

Gemm make_gemm(const FormatKernels &kernels, int32_t depth, int32_t group_size, int32_t row_group_columns) {
  Gemm gemm{};
  gemm.depth = depth;
  gemm.steps = static_cast<int32_t>(divide_up(depth, kernels.step_columns));
  gemm.row_bytes = int64_t{gemm.steps} * kStepBytes;
  gemm.segments = 1;
  gemm.segment_steps = gemm.steps;
  gemm.halves = 1;
  gemm.row_group_shift = 31;
  if (!kernels.integer) {
    // Scales are part of the weights that the products see, and cut no sums.
    gemm.group_columns = group_size;
    gemm.weight_groups = group_size > 0 ? static_cast<int32_t>(divide_up(depth, group_size)) : 0;
    return gemm;
  }

  gemm.group_columns = group_size > 0 ? group_size : depth;
  gemm.row_groups = row_group_columns > 0 ? static_cast<int32_t>(divide_up(depth, row_group_columns)) : 1;
  gemm.sums = kernels.factors != 0 ? gemm.row_groups + gemm.steps : 1;
  gemm.sums_per_row_group = gemm.sums;
  // Integer factors leave sums whole; scales of groups cut them.
  const int32_t scale_columns = kernels.factors != 0 ? 0 : group_size;
  if (kernels.factors != 0 && group_size > 0) {
    gemm.factor_groups = static_cast<int32_t>(divide_up(depth, group_size));
    while (1 << gemm.factor_shift < group_size) gemm.factor_shift++;
  }
  gemm.scale_is_bf16 = scale_columns > 0;
  gemm.weight_groups = scale_columns > 0 ? static_cast<int32_t>(divide_up(depth, scale_columns)) : 1;
  if (scale_columns == 0 && row_group_columns == 0) return gemm;

  int32_t segment_columns = scale_columns > 0 ? scale_columns : row_group_columns;
  if (row_group_columns > 0) segment_columns = std::min(segment_columns, row_group_columns);
  gemm.segments = static_cast<int32_t>(divide_up(depth, segment_columns));
  gemm.halves = segment_columns * 2 == kernels.step_columns ? 2 : 1;
  gemm.segment_steps = std::max(1, segment_columns / kernels.step_columns);
  if (row_group_columns > 0) {
    gemm.row_group_shift = 0;
    while (segment_columns << gemm.row_group_shift < row_group_columns) gemm.row_group_shift++;
  }
  if (kernels.factors == 0) {
    gemm.sums = gemm.segments;
    gemm.sums_per_row_group = row_group_columns > 0 ? row_group_columns / segment_columns : gemm.segments;
  } else if (row_group_columns > 0) {
    gemm.sums_per_row_group = 1 + row_group_columns / kernels.step_columns;
  }
  return gemm;
}

Gemm with_rows_apart(Gemm gemm) {
  // Measured on Emerald Rapids: docs/benchmarks/log.md.
  constexpr int32_t kEvenSteps = 16, kApartSteps = 8;
  const bool even = gemm.steps % kEvenSteps == 0 && gemm.steps > kEvenSteps;
  gemm.row_bytes = int64_t{gemm.steps + (even ? kApartSteps : 0)} * kStepBytes;
  return gemm;
}

Gemm gate_up_gemm(const FormatKernels &kernels, const ktk_moe_config &config) {
  // Where weights have a scale a row, so has the input: its products are one segment.
  const bool whole = config.group_size == 0 || kernels.factors != 0;
  Gemm gemm = make_gemm(kernels, config.hidden_size, config.group_size,
                        whole ? 0 : std::max(kActivationGroup, config.group_size));
  gemm.rotated = config.rotated;
  return with_rows_apart(gemm);
}

Gemm down_gemm(const FormatKernels &kernels, const ktk_moe_config &config, int32_t depth) {
  const int32_t group = config.rotated != 0 ? kRotatedGroup : kActivationGroup;
  Gemm gemm = make_gemm(kernels, depth, std::min(config.group_size, group), group);
  gemm.row_group_columns = group;
  gemm.rotated = config.rotated;
  return with_rows_apart(gemm);
}

std::vector<ShardRange> split_intermediate(int32_t intermediate_size, int32_t group_columns, int shards) {
  const int64_t blocks = divide_up(intermediate_size, group_columns);
  std::vector<ShardRange> ranges;
  int64_t block = 0;
  for (int shard = 0; shard < shards; shard++) {
    const int64_t next = block + blocks / shards + (shard < blocks % shards ? 1 : 0);
    const auto column = [&](int64_t b) {
      return static_cast<int32_t>(std::min<int64_t>(b * group_columns, intermediate_size));
    };
    ranges.push_back({column(block), column(next)});
    block = next;
  }
  return ranges;
}

}  // namespace ktk
