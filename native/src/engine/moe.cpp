#include "engine/moe.h"

#include <algorithm>
#include <cstring>

#include "core/dispatch.h"
#include "core/status.h"
#include "engine/batch.h"
#include "engine/sections.h"
#include "engine/turns.h"

namespace ktk {
namespace {

constexpr int32_t kMostColumns = 65536;  // an int32 holds that many products of a u8 and an int8
constexpr int64_t kTokensOfUnit = 8;     // quantised by one unit of work
constexpr int64_t kUnitsOfThread = 8;    // wanted of gate and up
constexpr int32_t kLeastUnitColumns = 32;
constexpr int64_t kRowsOfWideUnits = 256;  // of an expert, at most; each is loaded for 512 columns at once
// Below this much copying, waking the workers costs more than it saves.
constexpr int64_t kInlineUnits = 1;
constexpr int64_t kInlineBlocks = 4;

ktk_moe_config checked(const ktk_moe_config &config) {
  const auto positive = [&](int32_t value, const char *name) {
    require(value > 0, "layer ", config.layer_index, ": ", name, " must be positive, got ", value);
  };
  positive(config.num_experts, "num_experts");
  positive(config.top_k, "top_k");
  positive(config.hidden_size, "hidden_size");
  positive(config.intermediate_size, "intermediate_size");
  positive(config.max_tokens, "max_tokens");
  require(config.top_k <= config.num_experts, "layer ", config.layer_index, ": top_k ", config.top_k,
          " is larger than num_experts ", config.num_experts);
  require(config.hidden_size <= kMostColumns, "layer ", config.layer_index, ": hidden_size ",
          config.hidden_size, " is beyond the limit of ", kMostColumns);
  require(config.intermediate_size <= kMostColumns, "layer ", config.layer_index, ": intermediate_size ",
          config.intermediate_size, " is beyond the limit of ", kMostColumns);
  require(int64_t{config.max_tokens} * config.top_k <= INT32_MAX, "layer ", config.layer_index,
          ": max_tokens ", config.max_tokens, " times top_k ", config.top_k, " is beyond the limit of ",
          INT32_MAX);
  require(is_format(config.format), "layer ", config.layer_index, ": format ", config.format,
          " is unknown; use ", kFormatsText);
  const bool integer = config.format == KTK_FORMAT_INT8 || config.format == KTK_FORMAT_INT4;
  const int32_t group = config.group_size;
  const int32_t most = config.format == KTK_FORMAT_INT8 ? kMostGroupColumns : 128;
  require(
      integer ? group == 0 || (group >= 32 && group <= most && (group & (group - 1)) == 0)
              : group == (config.format == KTK_FORMAT_FP8 ? kScaleBlock : 0),
      "layer ", config.layer_index, ": group_size ", group,
      " is not supported; int8 takes 32, 64, 128, 256, 512 or 0 (one scale a row), int4 32, 64, 128 or 0, "
      "fp8 takes 128, bf16 takes 0");
  require(integer || config.rotated == 0, "layer ", config.layer_index,
          ": only int8 and int4 layers can be rotated; format ", config.format, " keeps its columns");
  require(config.swiglu_limit >= 0 && config.swiglu_alpha >= 0, "layer ", config.layer_index,
          ": swiglu_limit and swiglu_alpha must not be negative or NaN, got ", config.swiglu_limit, " and ",
          config.swiglu_alpha);
  return config;
}

}  // namespace

Moe::Moe(const ktk_moe_config &config, std::shared_ptr<PoolContext> context)
    : config_(checked(config)),
      isa_name_(config.isa != nullptr ? config.isa : ""),
      backend_(runnable_backend(isa_name_.c_str())),
      kernels_(backend_.formats[config.format]),
      context_(std::move(context)),
      store_(config_, kernels_, context_->pool) {
  config_.isa = backend_.name;
}

void Moe::check(const ktk_forward_args &args) const {
  const int32_t layer = config_.layer_index;
  const auto pointer = [layer](const void *address, int64_t alignment, const char *name) {
    require(address != nullptr, "layer ", layer, ": ", name, " is null");
    require(reinterpret_cast<uintptr_t>(address) % static_cast<uintptr_t>(alignment) == 0, "layer ", layer,
            ": ", name, " is not aligned to its ", alignment, "-byte values");
  };
  require(args.top_k > 0 && args.top_k <= config_.top_k, "layer ", layer, ": top_k ", args.top_k,
          " is not in 1 to the layer's ", config_.top_k);
  for (const int32_t dtype : {args.input_dtype, args.output_dtype}) {
    require(dtype >= KTK_DTYPE_F32 && dtype <= KTK_DTYPE_F16, "layer ", layer, ": dtype ", dtype,
            " is unknown; use 0 (fp32), 1 (bf16) or 2 (fp16)");
  }
  pointer(args.num_tokens, 4, "num_tokens");
  pointer(args.expert_ids, 8, "expert_ids");
  pointer(args.expert_weights, 4, "expert_weights");
  pointer(args.input, dtype_bytes(args.input_dtype), "input");
  pointer(args.output, dtype_bytes(args.output_dtype), "output");
}

void Moe::poison(const ktk_forward_args &args) const noexcept {
  if (args.num_tokens == nullptr || args.output == nullptr) return;
  const int64_t tokens = *args.num_tokens;
  if (tokens < 0 || tokens > config_.max_tokens) return;
  // All bits set are a NaN in each of the three types.
  std::memset(args.output, 0xff,
              static_cast<size_t>(tokens * config_.hidden_size * dtype_bytes(args.output_dtype)));
}

void Moe::forward(const ktk_forward_args &args) {
  check(args);
  const int64_t tokens = *args.num_tokens;
  require(tokens >= 0 && tokens <= config_.max_tokens, "layer ", config_.layer_index, ": ", tokens,
          " tokens are not in 0 to the layer's max_tokens ", config_.max_tokens);
  if (tokens == 0) return;

  const std::lock_guard<std::mutex> lock(context_->pool.forward_mutex());
  const SpanScope span(context_->pool.own_lane(), {Stage::forward, config_.layer_index}, tokens);
  Scratch &scratch = context_->scratch;
  {
    const SpanScope routing(context_->pool.submitter_lane(), {Stage::route, config_.layer_index}, tokens);
    scratch.route.build(args.expert_ids, args.expert_weights, tokens, args.top_k, config_.num_experts,
                        config_.gpu_experts_mask);
  }
  require_loaded(scratch.route);
  Batch batch{args, tokens, scratch.route, scratch, {}, {}, {}, 0, false};
  prepare(batch);
  quantise(batch);
  if (batch.shared_sums) {
    overlapped(batch);
  } else {
    gather(batch);
    gate_up(batch);
    down(batch);
  }
  merge(batch);
}

void Moe::require_loaded(const Route &route) const {
  for (const Route::Expert &expert : route.experts) {
    if (!store_.loaded(expert.id)) {
      fail(KTK_ERR_STATE, "layer ", config_.layer_index, ": a token is routed to expert ", expert.id,
           ", which is not loaded; load it, or set it in gpu_experts_mask");
    }
  }
}

void Moe::prepare(Batch &batch) const {
  batch.shards.resize(static_cast<size_t>(store_.shard_count()));
  const int64_t panels = divide_up(config_.hidden_size, kPanelColumns);
  batch.shared_sums = many_rows(batch.route);
  if (batch.shared_sums) {
    // Rows come from a shared cache, or from memory, for every unit of work that they meet: wide units then,
    // of experts by turns.
    batch.down_panels = std::min<int64_t>(panels, wide_units(batch.route) ? kMostPanels : kMostPanels / 2);
  } else {
    // Decode wants a unit for every worker, prefill wants rows of activations to meet several panels.
    batch.down_panels = std::clamp<int64_t>(panels / (int64_t{context_->pool.thread_count()} * 4), 2, 4);
  }
  place(batch, true);
  place(batch, false);
}

// Enough rows to fill tiles, and to be worth wide units.
bool Moe::many_rows(const Route &route) {
  return route.tokens.size() >= static_cast<size_t>(kBlockRows) * route.experts.size();
}

// Whether experts have so few rows that their sums leave room for more columns.
bool Moe::wide_units(const Route &route) const {
  return kernels_.tile_rows > 0 && many_rows(route) &&
         route.tokens.size() <= static_cast<size_t>(kRowsOfWideUnits) * route.experts.size();
}

// Few rows leave little to do: smaller units then, so that workers of unequal speed end together.
int32_t Moe::unit_columns(const Route &route, int shard) const {
  const auto experts = static_cast<int64_t>(route.experts.size());
  int32_t columns = store_.group_columns();
  if (many_rows(route)) return wide_units(route) ? kMostUnitColumns : columns;
  const int64_t enough = kUnitsOfThread * context_->pool.threads(shard);
  while (columns > kLeastUnitColumns &&
         divide_up(store_.shard(shard).columns(), columns) * experts < enough) {
    columns /= 2;
  }
  return columns;
}

void Moe::place(Batch &batch, bool measuring) const {
  const WorkerPool &pool = context_->pool;
  const auto rows = [](Arena &arena, int64_t count, const Gemm &gemm) {
    Rows placed{};
    placed.data = arena.place<uint8_t>(count * gemm.row_bytes);
    placed.scale = arena.place<float>(count * gemm.row_groups);
    placed.sum = arena.place<int32_t>(count * gemm.sums);
    return placed;
  };
  const auto row_count = static_cast<int64_t>(batch.route.tokens.size());
  Arena &shared = batch.scratch.shared;
  shared.begin(measuring);
  batch.by_token = rows(shared, batch.tokens, store_.gate_up());
  batch.by_row = rows(shared, row_count, store_.gate_up());
  if (measuring) shared.reserve(pool.node(0));
  for (int s = 0; s < store_.shard_count(); s++) {
    const ExpertStore::Shard &shard = store_.shard(s);
    Batch::Shard &placed = batch.shards[static_cast<size_t>(s)];
    Arena &arena = batch.scratch.shards[static_cast<size_t>(s)];
    arena.begin(measuring);
    if (shard.empty()) continue;
    placed.intermediate = rows(arena, row_count, shard.down);
    placed.unit_columns = unit_columns(batch.route, s);
    const int32_t group = store_.group_columns();
    if (kernels_.integer && placed.unit_columns < group) {
      const int64_t groups = divide_up(shard.columns(), group);
      placed.group_values = arena.place<float>(row_count * groups * group);
      placed.parts_left = arena.place<int32_t>(static_cast<int64_t>(batch.route.experts.size()) * groups);
    }
    placed.scratch_floats =
        kScratchFloats + (batch.shared_sums ? 0 : batch.tokens * batch.down_panels * kPanelColumns);
    placed.scratch = arena.place<float>(placed.scratch_floats * pool.threads(s));
    if (batch.shared_sums || store_.shard_count() > 1) {
      placed.partial = arena.place<float>(batch.tokens * align_up(config_.hidden_size, kPanelColumns));
    }
    if (measuring) arena.reserve(pool.node(s));
  }
}

void Moe::quantise(Batch &batch) const {
  const int64_t units = divide_up(batch.tokens, kTokensOfUnit);
  run_spread(context_->pool, {Stage::quantise, config_.layer_index}, units, kInlineUnits, [&](int64_t unit) {
    const int64_t first = unit * kTokensOfUnit;
    const QuantiseArgs args = {&store_.gate_up(),
                               batch.args.input,
                               batch.args.input_dtype,
                               static_cast<int32_t>(first),
                               static_cast<int32_t>(std::min(first + kTokensOfUnit, batch.tokens)),
                               batch.by_token};
    kernels_.quantise(&args);
  });
}

// A single row needs no gathering: it lies where the token was quantised.
void Moe::gather(Batch &batch) const {
  struct Block {
    const Route::Expert *expert;
    int32_t row;
  };
  std::vector<Block> blocks;
  for (const Route::Expert &expert : batch.route.experts) {
    if (expert.rows == 1) continue;
    for (int32_t row = 0; row < expert.rows; row += kBlockRows) blocks.push_back({&expert, row});
  }
  run_spread(context_->pool, {Stage::gather, config_.layer_index}, static_cast<int64_t>(blocks.size()),
             kInlineBlocks, [&](int64_t unit) {
               const Block &block = blocks[static_cast<size_t>(unit)];
               gather_block(batch, *block.expert, block.row);
             });
}

void Moe::gather_block(const Batch &batch, const Route::Expert &expert, int32_t row) const {
  const Gemm &gemm = store_.gate_up();
  const int32_t first = expert.first + row;
  const GatherArgs args = {&gemm, batch.by_token, batch.route.tokens.data() + first,
                           std::min(kBlockRows, expert.rows - row), rows_from(batch.by_row, gemm, first)};
  kernels_.gather(&args);
}

Rows rows_from(const Rows &rows, const Gemm &gemm, int64_t row) {
  return {rows.data + row * gemm.row_bytes, rows.scale + row * gemm.row_groups, rows.sum + row * gemm.sums};
}

Weights weights_of(const ExpertStore &store, int shard, int32_t expert, ktk_part weight) {
  return {store.part(shard, expert, weight), store.part(shard, expert, static_cast<ktk_part>(weight + 1)),
          store.part(shard, expert, static_cast<ktk_part>(weight + 2))};
}

void Moe::gate_up(Batch &batch) const {
  std::vector<int64_t> units;
  const auto experts = static_cast<int64_t>(batch.route.experts.size());
  const int64_t group_columns = store_.group_columns();
  for (int s = 0; s < store_.shard_count(); s++) {
    const int64_t columns = store_.shard(s).columns();
    const Batch::Shard &placed = batch.shards[static_cast<size_t>(s)];
    units.push_back(columns == 0 ? 0 : divide_up(columns, placed.unit_columns) * experts);
    if (columns == 0 || placed.parts_left == nullptr) continue;
    const int64_t groups = divide_up(columns, group_columns);
    for (int64_t i = 0; i < experts * groups; i++) {
      const int64_t left = columns - i % groups * group_columns;
      placed.parts_left[i] =
          static_cast<int32_t>(divide_up(std::min(left, group_columns), placed.unit_columns));
    }
  }
  const auto unit = [&](int s, int worker, int64_t index) { gate_up_unit(batch, s, worker, index); };
  // With many rows an expert the workers share them while they are in a cache; with few, all read weights.
  const SpanLabel label{Stage::gate_up, config_.layer_index};
  if (many_rows(batch.route)) {
    run_in_order(context_->pool, label, units.data(), unit);
  } else {
    run_section(context_->pool, label, units.data(), unit);
  }
}

// Unit `index` of a shard: some columns of the intermediate of one expert, all of its rows.
void Moe::gate_up_unit(const Batch &batch, int s, int worker, int64_t index) const {
  const int64_t group_columns = store_.group_columns();
  const ExpertStore::Shard &shard = store_.shard(s);
  const Batch::Shard &placed = batch.shards[static_cast<size_t>(s)];
  const int64_t parts = divide_up(shard.columns(), placed.unit_columns);
  const int64_t which = index / parts;
  const Route::Expert &expert = batch.route.experts[static_cast<size_t>(which)];
  const auto column = static_cast<int32_t>(index % parts * placed.unit_columns);
  float *group_values = nullptr;
  int32_t *parts_left = nullptr;
  if (placed.parts_left != nullptr) {
    const int64_t groups = divide_up(shard.columns(), group_columns);
    const int64_t group = column / group_columns;
    parts_left = placed.parts_left + which * groups + group;
    group_values = placed.group_values + (groups * expert.first + group * expert.rows) * group_columns;
  }
  const Rows input = expert.rows == 1 ? rows_from(batch.by_token, shard.gate_up,
                                                  batch.route.tokens[static_cast<size_t>(expert.first)])
                                      : rows_from(batch.by_row, shard.gate_up, expert.first);
  LoraProduct lora{};
  GateUpTraining training{};
  if (batch.training != nullptr) {
    const TrainingBatch &extra = *batch.training;
    const TrainingBatch::Shard &part = extra.shards[static_cast<size_t>(s)];
    if (extra.lora) {
      lora = {&extra.gate_up_rank, extra.gate_up_input + expert.first * extra.gate_up_rank.row_bytes,
              part.gate_up_tiles + which * part.gate_up_tile_bytes};
      training.lora = &lora;
    }
    training.saved_columns = shard.columns();
    training.saved_stride = int64_t{2} * shard.columns();
    if (part.saved != nullptr) training.saved = part.saved + expert.first * training.saved_stride;
    if (part.z != nullptr) {
      training.z_gemm = &part.z_gemm;
      training.z = part.z + expert.first * part.z_gemm.row_bytes;
    }
  }
  const GateUpArgs args = {&shard.gate_up,
                           &shard.down,
                           weights_of(store_, s, expert.id, KTK_PART_GATE_UP_WEIGHT),
                           store_.bias(s, expert.id, KTK_PART_GATE_BIAS),
                           store_.bias(s, expert.id, KTK_PART_UP_BIAS),
                           input,
                           rows_from(placed.intermediate, shard.down, expert.first),
                           expert.rows,
                           column,
                           std::min(column + placed.unit_columns, shard.columns()),
                           group_values,
                           parts_left,
                           config_.swiglu_limit,
                           config_.swiglu_alpha,
                           config_.strict,
                           placed.scratch + worker * placed.scratch_floats,
                           batch.training != nullptr ? &training : nullptr};
  kernels_.gate_up(&args);
}

// An expert's part in one run of columns, all of its rows; scratch and sums are left to the caller.
DownArgs Moe::down_args(const Batch &batch, int s, const Route::Expert &expert, int64_t first_panel,
                        int64_t last_panel, LoraProduct &lora) const {
  const ExpertStore::Shard &shard = store_.shard(s);
  const bool adapted = batch.training != nullptr && batch.training->lora && s == 0;
  if (adapted) {
    const TrainingBatch &extra = *batch.training;
    lora = {&extra.down_rank, extra.down_input + expert.first * extra.down_rank.row_bytes,
            extra.down_tiles + (&expert - batch.route.experts.data()) * extra.down_tile_bytes};
  }
  DownArgs args = {};
  args.gemm = &shard.down;
  args.weights = weights_of(store_, s, expert.id, KTK_PART_DOWN_WEIGHT);
  args.bias = s == 0 ? store_.bias(s, expert.id, KTK_PART_DOWN_BIAS) : nullptr;
  args.input = rows_from(batch.shards[static_cast<size_t>(s)].intermediate, shard.down, expert.first);
  args.tokens = batch.route.tokens.data() + expert.first;
  args.expert_weights = batch.route.weights.data() + expert.first;
  args.rows = expert.rows;
  args.last_row = expert.rows;
  args.hidden_size = config_.hidden_size;
  args.first_panel = static_cast<int32_t>(first_panel);
  args.last_panel = static_cast<int32_t>(last_panel);
  args.strict = config_.strict;
  args.lora = adapted ? &lora : nullptr;
  return args;
}

void Moe::down(Batch &batch) const {
  if (batch.shared_sums) return down_by_turns(batch);
  const int64_t panels = divide_up(config_.hidden_size, kPanelColumns);
  const int64_t padded = panels * kPanelColumns;
  std::vector<int64_t> units;
  for (int s = 0; s < store_.shard_count(); s++) {
    units.push_back(store_.shard(s).empty() ? 0 : divide_up(panels, batch.down_panels));
  }
  const auto unit = [&](int s, int worker, int64_t index) {
    const Batch::Shard &placed = batch.shards[static_cast<size_t>(s)];
    const int64_t first = index * batch.down_panels, last = std::min(first + batch.down_panels, panels);
    const int64_t width = (last - first) * kPanelColumns;
    float *scratch = placed.scratch + worker * placed.scratch_floats;
    float *sum = scratch + kScratchFloats;
    std::memset(sum, 0, static_cast<size_t>(batch.tokens * width) * sizeof(float));
    for (const Route::Expert &expert : batch.route.experts) {
      LoraProduct lora{};
      DownArgs args = down_args(batch, s, expert, first, last, lora);
      args.scratch = scratch;
      args.sum = sum;
      args.sum_stride = width;
      kernels_.down(&args);
    }
    if (placed.partial != nullptr) {
      for (int64_t t = 0; t < batch.tokens; t++) {
        std::memcpy(placed.partial + t * padded + first * kPanelColumns, sum + t * width,
                    static_cast<size_t>(width) * sizeof(float));
      }
      return;
    }
    const float *parts[] = {sum};
    const FinishArgs args = {parts,
                             1,
                             width,
                             0,
                             static_cast<int32_t>(batch.tokens),
                             static_cast<int32_t>(first * kPanelColumns),
                             std::min(static_cast<int32_t>(last * kPanelColumns), config_.hidden_size),
                             config_.hidden_size,
                             batch.args.output,
                             batch.args.output_dtype,
                             batch.args.incremental,
                             0};
    backend_.finish(&args);
  };
  run_section(context_->pool, {Stage::down, config_.layer_index}, units.data(), unit);
}

Moe::DownTurns::DownTurns(const Moe &moe, const Batch &batch)
    : panels(divide_up(moe.config_.hidden_size, kPanelColumns)), runs(divide_up(panels, batch.down_panels)) {
  const auto most_rows =
      static_cast<int32_t>(std::min<int64_t>(kPassRows, kSumFloats / (batch.down_panels * kPanelColumns)));
  for (const Route::Expert &expert : batch.route.experts) {
    first_piece.push_back(static_cast<int64_t>(pieces.size()));
    const int32_t passes = divide_up(expert.rows, most_rows);
    const auto rows = static_cast<int32_t>(align_up(divide_up(expert.rows, passes), kBlockRows));
    for (int32_t row = 0; row < expert.rows; row += rows)
      pieces.push_back({&expert, row, std::min(row + rows, expert.rows)});
  }
  first_piece.push_back(static_cast<int64_t>(pieces.size()));
  for (int s = 0; s < moe.store_.shard_count(); s++) turns.emplace_back(runs);
}

// A unit is a run of columns for some rows of one expert. Its product needs nothing of other units; then it
// waits for its turn among those of the same columns, so that a token's sums are made in the order of the
// experts.
void Moe::down_unit(const Batch &batch, DownTurns &by, int s, int worker, int64_t index) const {
  const Batch::Shard &placed = batch.shards[static_cast<size_t>(s)];
  const DownTurns::Piece &piece = by.pieces[static_cast<size_t>(index / by.runs)];
  const int64_t first = index % by.runs * batch.down_panels;
  const Turns::Turn turn = {&by.turns[static_cast<size_t>(s)], index % by.runs,
                            static_cast<uint32_t>(index / by.runs)};
  LoraProduct lora{};
  DownArgs args =
      down_args(batch, s, *piece.expert, first, std::min(first + batch.down_panels, by.panels), lora);
  args.first_row = piece.first_row;
  args.last_row = piece.last_row;
  args.scratch = placed.scratch + worker * placed.scratch_floats;
  args.sum = placed.partial + first * kPanelColumns;
  args.sum_stride = by.panels * kPanelColumns;
  args.await_turn = Turns::await;
  args.turn = &turn;
  kernels_.down(&args);
  Turns::done(turn);
}

void Moe::down_by_turns(Batch &batch) const {
  DownTurns by(*this, batch);
  const SpanLabel label{Stage::down, config_.layer_index};
  std::vector<int64_t> units;
  std::vector<float *> sums;
  for (int s = 0; s < store_.shard_count(); s++) {
    units.push_back(store_.shard(s).empty() ? 0 : static_cast<int64_t>(by.pieces.size()) * by.runs);
    sums.push_back(batch.shards[static_cast<size_t>(s)].partial);
  }
  run_zeroing(context_->pool, label, sums, batch.tokens, by.panels * kPanelColumns);
  const auto unit = [&](int s, int worker, int64_t index) { down_unit(batch, by, s, worker, index); };
  run_in_order(context_->pool, label, units.data(), unit);
}

// Sums of the shards, or those that the workers share, into the output.
void Moe::merge(Batch &batch) const {
  std::vector<const float *> parts;
  for (const Batch::Shard &shard : batch.shards) {
    if (shard.partial != nullptr) parts.push_back(shard.partial);
  }
  if (parts.empty()) return;
  run_spread(context_->pool, {Stage::merge, config_.layer_index}, divide_up(batch.tokens, kTokensOfUnit), 0,
             [&](int64_t unit) {
               const int64_t first = unit * kTokensOfUnit;
               const FinishArgs args = {parts.data(),
                                        static_cast<int32_t>(parts.size()),
                                        align_up(config_.hidden_size, kPanelColumns),
                                        static_cast<int32_t>(first),
                                        static_cast<int32_t>(std::min(first + kTokensOfUnit, batch.tokens)),
                                        0,
                                        config_.hidden_size,
                                        config_.hidden_size,
                                        batch.args.output,
                                        batch.args.output_dtype,
                                        batch.args.incremental,
                                        0};
               backend_.finish(&args);
             });
}

}  // namespace ktk
