// Which rows each expert computes.
#pragma once

#include <cstdint>
#include <vector>

namespace ktk {

// The batch sorted by expert. Within an expert, rows keep the order of tokens and then of slots.
struct Route {
  struct Expert {
    int32_t id;
    int32_t first;  // row
    int32_t rows;
  };
  std::vector<Expert> experts;  // those with rows, ascending
  std::vector<int32_t> tokens;  // [rows]
  std::vector<float> weights;   // [rows]
  std::vector<int32_t> slots;   // [rows], index of the row in the caller's [tokens, top_k]

  // Experts outside 0 .. num_experts - 1 or with a non-zero mask are left out. `mask` may be null.
  void build(const int64_t *ids, const float *expert_weights, int64_t tokens_count, int32_t top_k,
             int32_t num_experts, const uint8_t *mask);

 private:
  std::vector<int32_t> next_;  // [num_experts]
};

}  // namespace ktk
