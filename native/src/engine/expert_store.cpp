#include "engine/expert_store.h"

#include <atomic>
#include <cmath>
#include <cstring>

#include "core/status.h"
#include "engine/finite.h"
#include "engine/sections.h"

namespace ktk {
namespace {

constexpr int kPartCount = 9;
constexpr int64_t kLine = 64;
constexpr int64_t kPage = 4096;
constexpr int64_t kFactorBytes = 2 * kPanelColumns;  // multipliers and offsets of a group in a panel
constexpr int kMostByte = 255;                       // multiplier times a code of 15, and the offset

constexpr const char *kPartNames[kPartCount] = {"gate/up weight", "gate/up scale", "gate/up factors",
                                                "down weight",    "down scale",    "down factors",
                                                "gate bias",      "up bias",       "down bias"};

int64_t scale_bytes(const Gemm &gemm) { return gemm.scale_is_bf16 ? 2 : 4; }

// Bytes of each part for a layer or shard with these projections.
int64_t bytes_of(ktk_part part, const FormatKernels &kernels, const Gemm &gate_up, const Gemm &down,
                 int64_t intermediate, int64_t hidden) {
  const int64_t gate_panels = divide_up(intermediate, kPanelColumns);
  const int64_t down_panels = divide_up(hidden, kPanelColumns);
  const int64_t gate_scales = gate_panels * gate_up.weight_groups * 2 * kPanelColumns;
  const int64_t down_scales = down_panels * down.weight_groups * kPanelColumns;
  switch (part) {
    case KTK_PART_GATE_UP_WEIGHT:
      return gate_panels * gate_up.steps * 2 * kernels.tile_bytes;
    case KTK_PART_GATE_UP_SCALE:
      return gate_scales * scale_bytes(gate_up);
    case KTK_PART_GATE_UP_FACTORS:
      return gate_panels * gate_up.factor_groups * 2 * kFactorBytes;
    case KTK_PART_DOWN_WEIGHT:
      return down_panels * down.steps * kernels.tile_bytes;
    case KTK_PART_DOWN_SCALE:
      return down_scales * scale_bytes(down);
    case KTK_PART_DOWN_FACTORS:
      return down_panels * down.factor_groups * kFactorBytes;
    case KTK_PART_GATE_BIAS:
    case KTK_PART_UP_BIAS:
      return intermediate * 4;
    case KTK_PART_DOWN_BIAS:
      return hidden * 4;
  }
  return 0;
}

}  // namespace

ExpertStore::ExpertStore(const ktk_moe_config &config, const FormatKernels &kernels, WorkerPool &pool)
    : kernels_(kernels),
      pool_(pool),
      layer_index_(config.layer_index),
      format_(config.format),
      num_experts_(config.num_experts),
      hidden_size_(config.hidden_size),
      intermediate_size_(config.intermediate_size),
      present_(static_cast<size_t>(config.num_experts)) {
  gate_up_ = gate_up_gemm(kernels, config);
  down_ = down_gemm(kernels, config, intermediate_size_);
  const std::vector<ShardRange> ranges =
      split_intermediate(intermediate_size_, down_.row_group_columns, pool.subpools());
  for (size_t i = 0; i < ranges.size(); i++) {
    Shard shard{};
    shard.range = ranges[i];
    shard.gate_up = gate_up_;
    shard.down = down_gemm(kernels, config, shard.columns());
    shard.panels = divide_up(shard.columns(), kPanelColumns);
    if (!shard.empty()) {
      int64_t offset = 0;
      for (int p = 0; p < kPartCount; p++) {
        const auto part = static_cast<ktk_part>(p);
        shard.part_offset[p] = offset;
        const int64_t columns = part >= KTK_PART_GATE_BIAS ? shard.panels * kPanelColumns : shard.columns();
        const int64_t hidden = align_up(hidden_size_, kPanelColumns);
        offset += align_up(bytes_of(part, kernels, shard.gate_up, shard.down, columns, hidden), kLine);
      }
      shard.slot_bytes = align_up(offset, kPage);
      shard.memory = NodeBuffer(static_cast<size_t>(shard.slot_bytes * num_experts_),
                                pool.node(static_cast<int>(i)), true);
    }
    shards_.push_back(std::move(shard));
  }
}

uint32_t ExpertStore::needed_parts() const {
  uint32_t needed = 0;
  for (int p = 0; p < KTK_PART_GATE_BIAS; p++) {
    if (part_bytes(static_cast<ktk_part>(p)) > 0) needed |= 1u << p;
  }
  return needed;
}

bool ExpertStore::loaded(int32_t expert) const {
  const uint32_t needed = needed_parts();
  return (present_[static_cast<size_t>(expert)] & needed) == needed;
}

int64_t ExpertStore::bytes() const {
  int64_t slot = 0, count = 0;
  for (const Shard &shard : shards_) slot += shard.slot_bytes;
  for (int32_t expert = 0; expert < num_experts_; expert++) count += loaded(expert);
  return slot * count;
}

uint8_t *ExpertStore::slot(const Shard &shard, int32_t expert, ktk_part part) const {
  const char *memory = shard.memory.data() + expert * shard.slot_bytes + shard.part_offset[part];
  return reinterpret_cast<uint8_t *>(const_cast<char *>(memory));
}

const uint8_t *ExpertStore::part(int shard, int32_t expert, ktk_part part) const {
  return slot(shards_[static_cast<size_t>(shard)], expert, part);
}

const float *ExpertStore::bias(int shard, int32_t expert, ktk_part part) const {
  if (!(present_[static_cast<size_t>(expert)] >> part & 1)) return nullptr;
  return reinterpret_cast<const float *>(slot(shards_[static_cast<size_t>(shard)], expert, part));
}

size_t ExpertStore::part_bytes(ktk_part part) const {
  return static_cast<size_t>(bytes_of(part, kernels_, gate_up_, down_, intermediate_size_, hidden_size_));
}

template <typename Move>
void ExpertStore::for_each_piece(int32_t expert, ktk_part part, Move move) const {
  const int64_t down_panels = divide_up(hidden_size_, kPanelColumns);
  for (const Shard &shard : shards_) {
    if (shard.empty()) continue;
    uint8_t *address = slot(shard, expert, part);
    const int64_t bytes = bytes_of(part, kernels_, shard.gate_up, shard.down, shard.columns(), hidden_size_);
    if (part == KTK_PART_DOWN_BIAS) {
      move(address, int64_t{0}, bytes);
    } else if (part == KTK_PART_GATE_BIAS || part == KTK_PART_UP_BIAS) {
      move(address, int64_t{shard.range.first} * 4, bytes);
    } else if (part <= KTK_PART_GATE_UP_FACTORS) {
      move(address, shard.range.first / kPanelColumns * (bytes / shard.panels), bytes);
    } else {
      // A panel's pieces follow each other along the intermediate dimension; a scale for the whole row is
      // in every shard.
      const int64_t panel = bytes / down_panels;
      const int64_t whole_panel = static_cast<int64_t>(part_bytes(part)) / down_panels;
      int64_t first = 0;
      if (part == KTK_PART_DOWN_WEIGHT) {
        first = shard.range.first / kernels_.step_columns * kernels_.tile_bytes;
      } else if (part == KTK_PART_DOWN_FACTORS) {
        first = shard.range.first / down_.group_columns * kFactorBytes;
      } else if (down_.weight_groups > 1) {
        first = shard.range.first / down_.group_columns * kPanelColumns * scale_bytes(down_);
      }
      for (int64_t q = 0; q < down_panels; q++) move(address + q * panel, q * whole_panel + first, panel);
    }
  }
}

void ExpertStore::check(int32_t expert, ktk_part part, size_t bytes) const {
  require(expert >= 0 && expert < num_experts_, "layer ", layer_index_, ": expert ", expert,
          " is out of range; the layer has ", num_experts_);
  require(part >= 0 && part < kPartCount, "layer ", layer_index_, ": part ", static_cast<int>(part),
          " does not exist; parts are 0 to ", kPartCount - 1);
  require(bytes == part_bytes(part), "layer ", layer_index_, ": the ", kPartNames[part],
          " of an expert takes ", part_bytes(part), " bytes, got ", bytes);
}

void ExpertStore::check_values(int32_t expert, ktk_part part, const void *buffer, size_t bytes) const {
  if (part == KTK_PART_GATE_UP_WEIGHT || part == KTK_PART_DOWN_WEIGHT) return;
  if (part == KTK_PART_GATE_UP_FACTORS || part == KTK_PART_DOWN_FACTORS) {
    const auto *factors = static_cast<const uint8_t *>(buffer);
    for (size_t i = 0; i < bytes; i++) {
      if (i / kPanelColumns % 2 != 0) continue;
      const int multiplier = factors[i], offset = factors[i + kPanelColumns];
      require(multiplier > 0 && multiplier * 15 + offset <= kMostByte, "layer ", layer_index_, ", expert ",
              expert, ": in the ", kPartNames[part], ", multiplier ", multiplier, " with offset ", offset,
              " does not keep weights within a byte; the packed weights are damaged");
    }
    return;
  }
  const bool is_scale = part == KTK_PART_GATE_UP_SCALE || part == KTK_PART_DOWN_SCALE;
  const int32_t dtype = is_scale && gate_up_.scale_is_bf16 ? KTK_DTYPE_BF16 : KTK_DTYPE_F32;
  require(all_finite(buffer, static_cast<int64_t>(bytes) / dtype_bytes(dtype), dtype), "layer ", layer_index_,
          ", expert ", expert, ": the ", kPartNames[part],
          " holds NaN or infinity; check where it comes from");
}

void ExpertStore::export_part(int32_t expert, ktk_part part, void *buffer, size_t bytes) const {
  check(expert, part, bytes);
  if (bytes == 0) return;
  require(buffer != nullptr, "layer ", layer_index_, ": the buffer for the ", kPartNames[part], " is null");
  const bool is_bias = part >= KTK_PART_GATE_BIAS;
  if (is_bias && bias(0, expert, part) == nullptr) {
    std::memset(buffer, 0, bytes);
    return;
  }
  if (!is_bias && !loaded(expert)) {
    fail(KTK_ERR_STATE, "layer ", layer_index_, ": expert ", expert, " is not loaded, so its ",
         kPartNames[part], " cannot be exported");
  }
  for_each_piece(expert, part, [buffer](const uint8_t *address, int64_t offset, int64_t count) {
    std::memcpy(static_cast<uint8_t *>(buffer) + offset, address, static_cast<size_t>(count));
  });
}

void ExpertStore::import_part(int32_t expert, ktk_part part, const void *buffer, size_t bytes) {
  check(expert, part, bytes);
  if (bytes == 0) return;
  require(buffer != nullptr, "layer ", layer_index_, ": the buffer of the ", kPartNames[part], " is null");
  uint32_t &present = present_[static_cast<size_t>(expert)];
  present &= ~(1u << part);
  check_values(expert, part, buffer, bytes);
  for_each_piece(expert, part, [buffer](uint8_t *address, int64_t offset, int64_t count) {
    std::memcpy(address, static_cast<const uint8_t *>(buffer) + offset, static_cast<size_t>(count));
  });
  present |= 1u << part;
}

void ExpertStore::pack(int32_t expert, const ktk_expert_weights &weights) {
  check(expert, KTK_PART_GATE_UP_WEIGHT, part_bytes(KTK_PART_GATE_UP_WEIGHT));
  const void *matrices[] = {weights.gate, weights.up, weights.down};
  const float *biases[] = {weights.gate_bias, weights.up_bias, weights.down_bias};
  constexpr const char *kNames[] = {"gate", "up", "down"};
  require(weights.dtype >= KTK_DTYPE_F32 && weights.dtype <= KTK_DTYPE_F8_E4M3, "layer ", layer_index_,
          ": weight dtype ", weights.dtype,
          " is unknown; use 0 (fp32), 1 (bf16), 2 (fp16) or, in format fp8, 3 (e4m3)");
  const bool codes = weights.dtype == KTK_DTYPE_F8_E4M3;
  const float *block_scales[] = {weights.gate_scale, weights.up_scale, weights.down_scale};
  require(!codes || format_ == KTK_FORMAT_FP8, "layer ", layer_index_, ", expert ", expert,
          ": only a layer of format fp8 takes weights of dtype e4m3; give this one bf16 or fp32");
  const uintptr_t width = codes ? 1 : weights.dtype == KTK_DTYPE_F32 ? 4 : 2;
  for (int i = 0; i < 3; i++) {
    require(matrices[i] != nullptr, "layer ", layer_index_, ", expert ", expert, ": the ", kNames[i],
            " weights are null");
    require(reinterpret_cast<uintptr_t>(matrices[i]) % width == 0, "layer ", layer_index_, ", expert ",
            expert, ": the ", kNames[i], " weights are not aligned to their ", width, "-byte values");
    require((block_scales[i] != nullptr) == codes && reinterpret_cast<uintptr_t>(block_scales[i]) % 4 == 0,
            "layer ", layer_index_, ", expert ", expert, ": the scales of the ", kNames[i],
            codes ? " weights are null or not aligned to their 4-byte values"
                  : " weights must be null, since only e4m3 weights have scales");
    require(reinterpret_cast<uintptr_t>(biases[i]) % 4 == 0, "layer ", layer_index_, ", expert ", expert,
            ": the ", kNames[i], " bias is not aligned to its 4-byte values");
  }
  uint32_t &present = present_[static_cast<size_t>(expert)];
  present = 0;

  std::atomic<bool> finite{true};
  const auto pack_panel = [&](int which, int64_t rows, int64_t row, int64_t columns, const Gemm &gemm,
                              int64_t first_column, uint8_t *tiles, int64_t step_stride, uint8_t *scale,
                              uint8_t *factors, int64_t group_stride) {
    const void *pointers[kPanelColumns];
    const void *matrix = matrices[which];
    const float *scales = block_scales[which];
    if (codes) scales += row / kScaleBlock * divide_up(columns, kScaleBlock);
    for (int n = 0; n < kPanelColumns; n++) {
      const int64_t index = row + n;
      pointers[n] = index < rows
                        ? static_cast<const uint8_t *>(matrix) + index * columns * static_cast<int64_t>(width)
                        : nullptr;
    }
    const PackArgs args = {&gemm,
                           pointers,
                           weights.dtype,
                           static_cast<int32_t>(columns),
                           static_cast<int32_t>(first_column),
                           tiles,
                           step_stride,
                           scale,
                           factors,
                           group_stride,
                           scales};
    if (kernels_.pack(&args) != 0) finite.store(false, std::memory_order_relaxed);
  };

  const int64_t down_panels = divide_up(hidden_size_, kPanelColumns);
  std::vector<int64_t> units;
  for (const Shard &shard : shards_) units.push_back(shard.empty() ? 0 : shard.panels + down_panels);
  const auto unit = [&](int index, int, int64_t panel) {
    const Shard &shard = shards_[static_cast<size_t>(index)];
    const int64_t tile = kernels_.tile_bytes;
    if (panel < shard.panels) {
      const Gemm &gemm = shard.gate_up;
      const int64_t scales = gemm.weight_groups * 2 * kPanelColumns;
      for (int which = 0; which < 2; which++) {
        uint8_t *tiles =
            slot(shard, expert, KTK_PART_GATE_UP_WEIGHT) + panel * gemm.steps * 2 * tile + which * tile;
        uint8_t *scale = slot(shard, expert, KTK_PART_GATE_UP_SCALE) +
                         (panel * scales + which * kPanelColumns) * scale_bytes(gemm);
        uint8_t *factors = slot(shard, expert, KTK_PART_GATE_UP_FACTORS) +
                           (panel * gemm.factor_groups * 2 + which) * kFactorBytes;
        pack_panel(which, intermediate_size_, shard.range.first + panel * kPanelColumns, hidden_size_, gemm,
                   0, tiles, 2 * tile, scale, factors, 2 * kPanelColumns);
      }
    } else {
      const Gemm &gemm = shard.down;
      const int64_t q = panel - shard.panels;
      const int64_t scales = gemm.weight_groups * kPanelColumns;
      pack_panel(2, hidden_size_, q * kPanelColumns, intermediate_size_, gemm, shard.range.first,
                 slot(shard, expert, KTK_PART_DOWN_WEIGHT) + q * gemm.steps * tile, tile,
                 slot(shard, expert, KTK_PART_DOWN_SCALE) + q * scales * scale_bytes(gemm),
                 slot(shard, expert, KTK_PART_DOWN_FACTORS) + q * gemm.factor_groups * kFactorBytes,
                 kPanelColumns);
    }
  };
  run_section(pool_, {Stage::pack, layer_index_}, units.data(), unit);
  require(finite.load(), "layer ", layer_index_, ", expert ", expert,
          ": the weights or their scales hold NaN or infinity, or values that bf16 cannot hold; check the "
          "checkpoint");
  for (int i = 0; i < 3; i++) {
    const auto part = static_cast<ktk_part>(KTK_PART_GATE_BIAS + i);
    if (biases[i] != nullptr) import_part(expert, part, biases[i], part_bytes(part));
  }
  present |= needed_parts();
}

void ExpertStore::unpack(int32_t expert, float *gate, float *up, float *down) const {
  check(expert, KTK_PART_GATE_UP_WEIGHT, part_bytes(KTK_PART_GATE_UP_WEIGHT));
  if (!loaded(expert)) {
    fail(KTK_ERR_STATE, "layer ", layer_index_, ": expert ", expert,
         " is not loaded, so its weights cannot be read");
  }
  const int64_t down_panels = divide_up(hidden_size_, kPanelColumns);
  std::vector<int64_t> units;
  for (const Shard &shard : shards_) units.push_back(shard.empty() ? 0 : shard.panels * 2 + down_panels);
  const auto unit = [&](int index, int, int64_t which) {
    const Shard &shard = shards_[static_cast<size_t>(index)];
    const bool is_down = which >= shard.panels * 2;
    const Gemm &gemm = is_down ? shard.down : shard.gate_up;
    const int projections = is_down ? 1 : 2;
    const int64_t panel = is_down ? which - shard.panels * 2 : which / 2;
    const auto projection = static_cast<int32_t>(is_down ? 0 : which % 2);
    float *target = is_down ? down : projection == 0 ? gate : up;
    if (target == nullptr) return;
    const auto weight = is_down ? KTK_PART_DOWN_WEIGHT : KTK_PART_GATE_UP_WEIGHT;
    const int64_t scales = int64_t{gemm.weight_groups} * projections * kPanelColumns;
    float *rows[kPanelColumns];
    for (int n = 0; n < kPanelColumns; n++) {
      const int64_t row = panel * kPanelColumns + n;
      if (is_down) {
        rows[n] = row < hidden_size_ ? target + row * intermediate_size_ + shard.range.first : nullptr;
      } else {
        const int64_t neuron = shard.range.first + row;
        rows[n] = row < shard.columns() ? target + neuron * hidden_size_ : nullptr;
      }
    }
    const UnpackArgs args = {
        &gemm,
        part(index, expert, weight) + panel * gemm.steps * projections * kernels_.tile_bytes,
        part(index, expert, static_cast<ktk_part>(weight + 1)) + panel * scales * scale_bytes(gemm),
        part(index, expert, static_cast<ktk_part>(weight + 2)) +
            panel * gemm.factor_groups * projections * kFactorBytes,
        projections,
        projection,
        rows};
    kernels_.unpack(&args);
  };
  run_section(pool_, {Stage::pack, layer_index_}, units.data(), unit);
}

}  // namespace ktk
