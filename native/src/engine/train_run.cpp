#include "engine/train_run.h"

namespace ktk {
namespace {

// The same as in kernels/train.h, which mixes in the row.
uint64_t mix64(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

}  // namespace

Training::Run::Worker Training::Run::worker(int shard, int index) const {
  uint8_t *at = shards[static_cast<size_t>(shard)].scratch + index * scratch_bytes;
  Worker w{};
  const auto take = [&](int64_t bytes) {
    uint8_t *piece = at;
    at += align_up(bytes, 64);
    return piece;
  };
  w.product = reinterpret_cast<float *>(take(int64_t{kScratchFloats} * 4));
  w.tiles = take(tile_bytes);
  w.lora_tiles = take(lora_tile_bytes);
  w.operand = take(operand_bytes);
  w.out = reinterpret_cast<float *>(take(out_floats * 4));
  w.out2 = reinterpret_cast<float *>(take(out_floats * 4));
  w.sum = reinterpret_cast<float *>(take(sum_floats * 4));
  return w;
}

Dropout Training::Run::dropped(double share, int32_t expert_id, Projection projection) const {
  if (!dropout) return {0, 0, 1.0f};
  const auto seed = static_cast<uint64_t>(state.config.seed);
  const uint64_t key =
      mix64(seed ^ mix64(uint64_t{static_cast<uint32_t>(expert_id)} * 3 + static_cast<uint64_t>(projection)));
  return {key, static_cast<int32_t>(std::lround(share * (1 << 24))), static_cast<float>(1.0 / (1.0 - share))};
}

Source Training::Run::dropped_intermediate(double share, int shard, int32_t first_column, const Chunk &chunk,
                                           const uint8_t *z) const {
  const Route::Expert &owner = expert(chunk.expert);
  Source source = operand(z, shards[static_cast<size_t>(shard)].z_gemm, owner.rows);
  source.first_row = chunk.first;
  source.dropout_rows = route.tokens.data() + owner.first + chunk.first;
  source.dropout = dropped(share, owner.id, kDown);
  source.dropout_column = first_column;
  return source;
}

void Training::Run::load_middle(const TrainKernels &kernels, const Chunk &chunk, const float *values,
                                const Gemm &gemm, float scale, const float *column_scale,
                                uint8_t *operand) const {
  const Route::Expert &owner = expert(chunk.expert);
  const LoadRowsArgs load = {matrix(values, KTK_DTYPE_F32, gemm.depth, align_up(gemm.depth, kPanelColumns)),
                             &gemm,
                             owner.rows,
                             chunk.first,
                             chunk.first + chunk.rows,
                             scale,
                             nullptr,
                             column_scale,
                             operand + owner.first * gemm.row_bytes};
  kernels.load_rows(&load);
}

std::vector<int64_t> Training::units_of_shards(int64_t count) const {
  std::vector<int64_t> units;
  for (int s = 0; s < moe_.store().shard_count(); s++)
    units.push_back(moe_.store().shard(s).empty() ? 0 : count);
  return units;
}

// The sizes of everything in a run.
void Training::start(Run &run) const {
  const ExpertStore &store = moe_.store();
  const ktk_moe_config &config = moe_.config();
  const FormatKernels &bf16 = moe_.backend().formats[KTK_FORMAT_BF16];
  const auto gemm = [&](int64_t depth) {
    return with_rows_apart(make_gemm(bf16, static_cast<int32_t>(depth), 0, 0));
  };
  run.tokens = run.state.tokens;
  run.rows = static_cast<int64_t>(run.route.tokens.size());
  run.adapted = adapted();
  run.dropout = run.adapted && run.state.config.dropout != 0 && config_.lora_dropout > 0.0f;
  run.rank = config_.lora_rank;
  run.even_rank = static_cast<int32_t>(align_up(run.rank, 2));
  run.stacked_panels = static_cast<int32_t>(divide_up(2 * run.even_rank, kPanelColumns));
  run.rank_panels = static_cast<int32_t>(divide_up(run.even_rank, kPanelColumns));
  run.hidden = gemm(config.hidden_size);
  run.k_steps.push_back(0);
  for (size_t e = 0; e < run.route.experts.size(); e++) {
    const int32_t rows = run.route.experts[e].rows;
    for (int32_t first = 0; first < rows; first += kChunkRows)
      run.chunks.push_back({static_cast<int32_t>(e), first, rows_of_chunk(rows, first, kChunkRows)});
    for (int32_t first = 0; first < rows; first += kBlockTokens)
      run.blocks.push_back({static_cast<int32_t>(e), first, rows_of_chunk(rows, first, kBlockTokens)});
    run.k_steps.push_back(run.k_steps.back() + divide_up(rows, 32));
  }
  run.extra.lora = run.adapted;
  if (run.adapted) {
    run.extra.gate_up_rank = gemm(int64_t{2} * run.even_rank);
    run.extra.down_rank = gemm(run.even_rank);
  }
  const bool tiles = moe_.kernels_.tile_rows > 0, many = Moe::many_rows(run.route);
  run.unit_columns = tiles || many ? 256 : 64;
  run.shared_sums = run.args != nullptr && many;
  run.token_columns = run.shared_sums ? 256 : tiles ? 128 : 64;

  const auto count = static_cast<size_t>(store.shard_count());
  run.shards.resize(count);
  run.extra.shards.resize(count);
  const int64_t hidden_steps = run.hidden.steps;
  int64_t z_row_bytes = 0, gate_up_steps = 0;
  for (size_t s = 0; s < count; s++) {
    const ExpertStore::Shard &shard = store.shard(static_cast<int>(s));
    if (shard.empty()) continue;
    Run::Shard &part = run.shards[s];
    part.z_gemm = gemm(shard.columns());
    part.gate_up_gemm = gemm(int64_t{part.z_gemm.steps} * 64);
    part.units = divide_up(shard.columns(), run.unit_columns);
    run.extra.shards[s].z_gemm = part.z_gemm;
    z_row_bytes = std::max(z_row_bytes, part.z_gemm.row_bytes);
    gate_up_steps = std::max<int64_t>(gate_up_steps, part.gate_up_gemm.steps);
  }
  run.operand_bytes = kChunkRows * std::max(run.hidden.row_bytes, z_row_bytes);
  const int64_t middle = kChunkRows * run.stacked_stride();
  if (run.args == nullptr) {
    run.out_floats = run.dropout ? middle : 0;
  } else {
    run.tile_bytes = std::max({run.unit_columns / kPanelColumns * hidden_steps,
                               run.token_columns / kPanelColumns * gate_up_steps,
                               int64_t{kGradColumns / kPanelColumns} * (kBlockTokens / 32)}) *
                     kTileBytes;
    if (run.adapted) {
      run.lora_tile_bytes = std::max(run.unit_columns / kPanelColumns * run.extra.down_rank.steps,
                                     run.token_columns / kPanelColumns * run.extra.gate_up_rank.steps) *
                            kTileBytes;
    }
    run.out_floats =
        std::max<int64_t>(int64_t{kPassRows} * std::max(run.unit_columns, run.token_columns), middle);
    run.sum_floats = run.shared_sums ? 0 : run.tokens * run.token_columns;
  }
  run.scratch_bytes = align_up(int64_t{kScratchFloats} * 4, 64) + align_up(run.tile_bytes, 64) +
                      align_up(run.lora_tile_bytes, 64) + align_up(run.operand_bytes, 64) +
                      2 * align_up(run.out_floats * 4, 64) + align_up(run.sum_floats * 4, 64);
}

void Training::place(Run &run, bool measuring) const {
  const ExpertStore &store = moe_.store();
  const WorkerPool &pool = moe_.context_->pool;
  const ktk_moe_config &config = moe_.config();
  Scratch &scratch = moe_.context_->scratch;
  const int64_t rows = run.rows, experts = run.experts();
  const bool backward = run.args != nullptr;
  const bool base =
      backward && (run.args->gate != nullptr || run.args->up != nullptr || run.args->down != nullptr);
  const int64_t hidden_panels = divide_up(config.hidden_size, kPanelColumns);
  const auto operand_of = [rows](Arena &arena, const Gemm &gemm) {
    return arena.place<uint8_t>(rows * gemm.row_bytes);
  };
  const auto tiles_of = [experts](Arena &arena, int64_t bytes) {
    return arena.place<uint8_t>(experts * bytes);
  };

  Arena &shared = scratch.training;
  shared.begin(measuring);
  if (run.adapted) {
    TrainingBatch &extra = run.extra;
    run.gate_up_a = tiles_of(shared, run.stacked_panels * int64_t{run.hidden.steps} * kTileBytes);
    run.gate_up_middle = shared.place<float>(rows * run.stacked_stride());
    run.down_middle = shared.place<float>(rows * run.rank_stride());
    if (run.packs_forward) {
      extra.gate_up_input = operand_of(shared, extra.gate_up_rank);
      extra.down_input = operand_of(shared, extra.down_rank);
      extra.down_tile_bytes = hidden_panels * extra.down_rank.steps * kTileBytes;
      extra.down_tiles = tiles_of(shared, extra.down_tile_bytes);
    }
  }
  if (backward) {
    run.grad_rows = operand_of(shared, run.hidden);
    run.ones = shared.place<float>(rows);
    run.bias_products = shared.place<float>(rows);
  }
  if (backward && run.adapted) {
    run.down_b_back = tiles_of(shared, run.rank_panels * int64_t{run.hidden.steps} * kTileBytes);
    run.grad_down_middle = shared.place<float>(rows * run.rank_stride());
    run.grad_down_input = operand_of(shared, run.extra.down_rank);
    run.grad_gate_up_middle = shared.place<float>(rows * run.stacked_stride());
    run.grad_gate_up_input[0] = operand_of(shared, run.extra.gate_up_rank);
    if (run.dropout) {
      run.grad_gate_up_input[1] = operand_of(shared, run.extra.gate_up_rank);
      for (float *&select : run.select) select = shared.place<float>(align_up(2 * run.even_rank, 16));
    }
    const auto stacked = static_cast<int32_t>(run.stacked_stride()),
               single = static_cast<int32_t>(run.rank_stride());
    run.factors[Run::kGateMiddle] = {run.gate_up_middle, stacked, 0, run.even_rank, false, nullptr};
    run.factors[Run::kUpMiddle] = {run.gate_up_middle, stacked, run.even_rank, run.even_rank, false, nullptr};
    run.factors[Run::kDownMiddle] = {run.down_middle, single, 0, run.even_rank, true, nullptr};
    run.factors[Run::kGradGateUp] = {run.grad_gate_up_middle, stacked, 0, 2 * run.even_rank, false, nullptr};
    run.factors[Run::kGradDown] = {run.grad_down_middle, single, 0, run.even_rank, true, nullptr};
    for (Run::Factor &factor : run.factors)
      factor.operand = shared.place<uint8_t>(run.k_steps.back() * factor.columns * kStepBytes);
  }
  if (measuring) shared.reserve(pool.node(0));

  for (int s = 0; s < store.shard_count(); s++) {
    const ExpertStore::Shard &shard = store.shard(s);
    Run::Shard &part = run.shards[static_cast<size_t>(s)];
    TrainingBatch::Shard &extra = run.extra.shards[static_cast<size_t>(s)];
    Arena &arena = scratch.training_shards[static_cast<size_t>(s)];
    arena.begin(measuring);
    part.scratch = arena.place<uint8_t>(run.scratch_bytes * pool.threads(s));
    if (!shard.empty()) {
      if (run.adapted) {
        part.down_a = tiles_of(arena, run.rank_panels * int64_t{part.z_gemm.steps} * kTileBytes);
        part.down_middle =
            store.shard_count() > 1 ? arena.place<float>(rows * run.rank_stride()) : run.down_middle;
        if (run.packs_forward) {
          extra.gate_up_tile_bytes = shard.panels * 2 * run.extra.gate_up_rank.steps * kTileBytes;
          extra.gate_up_tiles = tiles_of(arena, extra.gate_up_tile_bytes);
          if (moe_.kernels_.integer) extra.z = operand_of(arena, part.z_gemm);
        }
      }
      if (backward) {
        if (run.state.config.policy == KTK_POLICY_RECOMPUTE) {
          extra.saved = arena.place<uint16_t>(rows * 2 * shard.columns());
          part.saved = extra.saved;
        }
        part.gate_up = operand_of(arena, part.gate_up_gemm);
        const bool scaled = moe_.kernels_.integer && !shard.gate_up.scale_is_bf16;
        part.plain = run.adapted && scaled ? operand_of(arena, part.gate_up_gemm) : nullptr;
        if (run.adapted || base) part.z = operand_of(arena, part.z_gemm);
        part.products = arena.place<float>(rows * part.units);
        if (run.shared_sums || store.shard_count() > 1) {
          part.partial = arena.place<float>(run.tokens * hidden_panels * kPanelColumns);
        }
        if (run.adapted) {
          part.gate_up_b_back =
              tiles_of(arena, run.stacked_panels * int64_t{part.gate_up_gemm.steps} * kTileBytes);
          part.grad_gate_up_middle = store.shard_count() > 1 ? arena.place<float>(rows * run.stacked_stride())
                                                             : run.grad_gate_up_middle;
        }
        if (base)
          part.base_factor = arena.place<uint8_t>(run.k_steps.back() * 3 * shard.columns() * kStepBytes);
      }
    }
    if (measuring) arena.reserve(pool.node(s));
  }
}

}  // namespace ktk
