#include "engine/route.h"

#include <cstddef>

namespace ktk {

void Route::build(const int64_t *ids, const float *expert_weights, int64_t tokens_count, int32_t top_k,
                  int32_t num_experts, const uint8_t *mask) {
  const int64_t entries = tokens_count * top_k;
  next_.assign(static_cast<size_t>(num_experts), 0);
  for (int64_t i = 0; i < entries; i++) {
    if (ids[i] >= 0 && ids[i] < num_experts) next_[static_cast<size_t>(ids[i])]++;
  }
  experts.clear();
  int32_t row = 0;
  for (int32_t id = 0; id < num_experts; id++) {
    int32_t &count = next_[static_cast<size_t>(id)];
    if (mask != nullptr && mask[id]) count = 0;
    if (count > 0) experts.push_back({id, row, count});
    const int32_t first = row;
    row += count;
    count = count > 0 ? first : -1;
  }
  tokens.resize(static_cast<size_t>(row));
  weights.resize(static_cast<size_t>(row));
  slots.resize(static_cast<size_t>(row));
  for (int64_t i = 0; i < entries; i++) {
    if (ids[i] < 0 || ids[i] >= num_experts || next_[static_cast<size_t>(ids[i])] < 0) continue;
    const auto at = static_cast<size_t>(next_[static_cast<size_t>(ids[i])]++);
    tokens[at] = static_cast<int32_t>(i / top_k);
    weights[at] = expert_weights[i];
    slots[at] = static_cast<int32_t>(i);
  }
}

}  // namespace ktk
