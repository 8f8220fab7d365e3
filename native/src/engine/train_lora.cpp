#include <atomic>

#include "engine/train_run.h"

namespace ktk {
namespace {

constexpr int32_t kPanelsOfCall = 16;  // of one call of the product kernel

// A product with any number of panels.
void multiply_panels(const TrainKernels &kernels, const MultiplyArgs &args) {
  for (int32_t first = 0; first < args.panels; first += kPanelsOfCall) {
    MultiplyArgs part = args;
    part.tiles = args.tiles + int64_t{first} * args.gemm->steps * kTileBytes;
    part.panels = std::min(kPanelsOfCall, args.panels - first);
    part.out = args.out + int64_t{first} * kPanelColumns;
    kernels.multiply(&part);
  }
}

// Values [first, first + count) of all parts, in their order, into `sum`.
void add_parts(const std::vector<float *> &parts, int64_t first, int64_t count, float *sum) {
  if (parts.empty()) return;
  std::memcpy(sum + first, parts[0] + first, static_cast<size_t>(count) * sizeof(float));
  for (size_t p = 1; p < parts.size(); p++) {
    for (int64_t i = first; i < first + count; i++) sum[i] += parts[p][i];
  }
}

}  // namespace

AdapterMatrix Training::adapter(const void *values, int64_t expert_id, int64_t rows, int64_t columns,
                                int64_t first_row, int64_t count, int64_t first_column,
                                int64_t column_count) const {
  const int64_t at = (expert_id * rows + first_row) * columns + first_column;
  return {static_cast<const uint8_t *>(values) + at * dtype_bytes(lora_.dtype), lora_.dtype, count,
          column_count, columns};
}

// A of down, its columns [first, first + count) of the intermediate.
AdapterMatrix Training::down_a(int64_t expert_id, int64_t first, int64_t count) const {
  const int64_t rank = config_.lora_rank;
  return adapter(lora_.down_a, expert_id, rank, moe_.config().intermediate_size, 0, rank, first, count);
}

// A of gate and of up, columns [first, first + count) of the input, one below the other.
AdapterPair Training::gate_up_a(int64_t expert_id, int64_t first, int64_t count) const {
  const int64_t rank = config_.lora_rank, hidden = moe_.config().hidden_size;
  return {adapter(lora_.gate_a, expert_id, rank, hidden, 0, rank, first, count),
          adapter(lora_.up_a, expert_id, rank, hidden, 0, rank, first, count), 0, 0};
}

// The adapters as tiles, of the forward's products and, with `backward`, of the way back too. What the way
// back uses once for each run of columns, A transposed, its units make for themselves.
void Training::pack_adapters(Run &run, bool backward) const {
  if (!run.adapted) return;
  const ktk_moe_config &config = moe_.config();
  const int64_t rank = run.rank, hidden = config.hidden_size, intermediate = config.intermediate_size;
  const auto hidden_panels = static_cast<int32_t>(divide_up(hidden, kPanelColumns));

  // The first tensor found not finite: its index among the names, times experts, plus the expert, plus 1.
  std::atomic<int64_t> broken{0};
  const auto report = [&](int first, int second, int32_t expert_id, NotFinite failed) {
    if (failed == 0) return;
    const int tensor = (failed & 1) != 0 ? first : second;
    broken.store(int64_t{tensor} * config.num_experts + expert_id + 1, std::memory_order_relaxed);
  };

  enum Kind { kGateUpA, kDownB, kDownBBack, kGateUpB, kDownA, kGateUpBBack };
  struct Job {
    Kind kind;
    int32_t expert;
  };
  const int shards = moe_.store().shard_count();
  std::vector<std::vector<Job>> jobs(static_cast<size_t>(shards));
  for (int32_t e = 0; e < static_cast<int32_t>(run.experts()); e++) {
    std::vector<Job> &own = jobs[static_cast<size_t>(e % shards)];
    own.push_back({kGateUpA, e});
    if (run.packs_forward) own.push_back({kDownB, e});
    if (backward) own.push_back({kDownBBack, e});
    for (int s = 0; s < shards; s++) {
      if (moe_.store().shard(s).empty()) continue;
      std::vector<Job> &list = jobs[static_cast<size_t>(s)];
      list.push_back({kDownA, e});
      if (run.packs_forward) list.push_back({kGateUpB, e});
      if (backward) list.push_back({kGateUpBBack, e});
    }
  }
  std::vector<int64_t> units;
  for (const auto &list : jobs) units.push_back(static_cast<int64_t>(list.size()));
  const auto unit = [&](int s, int, int64_t index) {
    const Job job = jobs[static_cast<size_t>(s)][static_cast<size_t>(index)];
    const int32_t id = run.expert(job.expert).id;
    const ExpertStore::Shard &shard = moe_.store().shard(s);
    const Run::Shard &part = run.shards[static_cast<size_t>(s)];
    const TrainingBatch::Shard &extra = run.extra.shards[static_cast<size_t>(s)];
    const int64_t first = shard.range.first, columns = shard.columns();
    // Of a job's tiles, panel after panel.
    const auto span = [&](uint8_t *base, int32_t panels, int32_t steps) {
      const int64_t panel_bytes = steps * kTileBytes;
      return TileSpan{base + job.expert * panels * panel_bytes, panel_bytes, kTileBytes, panels, steps};
    };
    const auto rows_of_b = [&](const void *b) {
      return adapter(b, id, intermediate, rank, first, columns, 0, rank);
    };
    const AdapterMatrix nothing = {lora_.gate_b, lora_.dtype, 0, 0, 0};
    switch (job.kind) {
      case kGateUpA: {
        AdapterPair pair = gate_up_a(id, 0, hidden);
        pair.second_column = run.even_rank;
        report(0, 2, id, tiles_of_rows(pair, span(run.gate_up_a, run.stacked_panels, run.hidden.steps)));
        return;
      }
      case kDownB: {
        const AdapterMatrix b = adapter(lora_.down_b, id, hidden, rank, 0, hidden, 0, rank);
        report(5, 5, id,
               tiles_of_rows({b, {}, 0, 0},
                             span(run.extra.down_tiles, hidden_panels, run.extra.down_rank.steps)));
        return;
      }
      case kDownBBack: {
        const AdapterMatrix b = adapter(lora_.down_b, id, hidden, rank, 0, hidden, 0, rank);
        report(5, 5, id,
               tiles_of_columns({b, {}, 0, 0}, span(run.down_b_back, run.rank_panels, run.hidden.steps)));
        return;
      }
      case kGateUpB: {
        // Tiles of gate and up by turns; the ranks of up come after those of gate.
        TileSpan to =
            span(extra.gate_up_tiles, static_cast<int32_t>(shard.panels), 2 * run.extra.gate_up_rank.steps);
        to.step_stride_bytes = 2 * kTileBytes;
        to.steps = run.extra.gate_up_rank.steps;
        report(1, 1, id, tiles_of_rows({rows_of_b(lora_.gate_b), {}, 0, 0}, to));
        to.tiles += kTileBytes;
        report(3, 3, id, tiles_of_rows({nothing, rows_of_b(lora_.up_b), 0, run.even_rank}, to));
        return;
      }
      case kDownA:
        report(4, 4, id,
               tiles_of_rows({down_a(id, first, columns), {}, 0, 0},
                             span(part.down_a, run.rank_panels, part.z_gemm.steps)));
        return;
      case kGateUpBBack: {
        // Rows 32 i .. of gate lie in step 2 i, those of up in step 2 i + 1.
        TileSpan to = span(part.gate_up_b_back, run.stacked_panels, part.gate_up_gemm.steps);
        to.step_stride_bytes = 2 * kTileBytes;
        to.steps = part.gate_up_gemm.steps / 2;
        report(1, 1, id, tiles_of_columns({rows_of_b(lora_.gate_b), {}, 0, 0}, to));
        to.tiles += kTileBytes;
        report(3, 3, id, tiles_of_columns({nothing, rows_of_b(lora_.up_b), run.even_rank, 0}, to));
        return;
      }
    }
  };
  run_section(moe_.context_->pool, {Stage::lora_pack, config.layer_index}, units.data(), unit);
  const int64_t found = broken.load();
  require(found == 0, "layer ", config.layer_index, ": ", kTensorNames[(found - 1) / config.num_experts],
          " of expert ", (found - 1) % config.num_experts,
          " holds NaN, infinity or a value past the range of bf16; the training has diverged");
}

// Tokens through the A of gate and up, and that as the operand of the second product.
void Training::adapter_input(Run &run) const {
  const double share = config_.lora_dropout;
  if (!run.adapted) return;
  const ktk_moe_config &config = moe_.config();
  const TrainKernels &kernels = moe_.backend().train;
  const int64_t stride = run.stacked_stride();
  const auto unit = [&](int s, int index, int64_t which) {
    const Run::Chunk chunk = run.chunks[static_cast<size_t>(which)];
    const Route::Expert &expert = run.expert(chunk.expert);
    const Run::Worker worker = run.worker(s, index);
    float *middle = run.gate_up_middle + (expert.first + chunk.first) * stride;
    for (const Projection projection : {kGate, kUp}) {
      if (projection == kUp && !run.dropout) break;
      Source source = matrix(run.state.input, run.state.input_dtype, config.hidden_size, config.hidden_size);
      source.rows = run.route.tokens.data() + expert.first + chunk.first;
      source.dropout_rows = source.rows;
      source.dropout = run.dropped(share, expert.id, projection);
      const LoadRowsArgs load = {source,  &run.hidden, chunk.rows,    0, chunk.rows, 1.0f,
                                 nullptr, nullptr,     worker.operand};
      kernels.load_rows(&load);
      float *out = projection == kGate ? middle : worker.out;
      const uint8_t *tiles =
          run.gate_up_a + chunk.expert * run.stacked_panels * int64_t{run.hidden.steps} * kTileBytes;
      const MultiplyArgs multiply = {
          &run.hidden, worker.operand, chunk.rows, 0,      chunk.rows,     tiles, run.stacked_panels, nullptr,
          0,           config.strict,  out,        stride, worker.product, 0};
      multiply_panels(kernels, multiply);
      if (projection == kUp) {
        for (int32_t row = 0; row < chunk.rows; row++) {
          std::memcpy(middle + row * stride + run.even_rank, worker.out + row * stride + run.even_rank,
                      static_cast<size_t>(stride - run.even_rank) * sizeof(float));
        }
      }
    }
    if (!run.packs_forward) return;
    const Gemm &gemm = run.extra.gate_up_rank;
    run.load_middle(kernels, chunk, middle, gemm, config_.lora_scale, nullptr, run.extra.gate_up_input);
  };
  run_dealt(moe_.context_->pool, {Stage::lora_input, config.layer_index},
            static_cast<int64_t>(run.chunks.size()), unit);
}

// The intermediate through the A of down, a part a shard; with `z` null of the forward's batch.
void Training::adapter_middle(Run &run) const {
  const double share = config_.lora_dropout;
  if (!run.adapted) return;
  const ktk_moe_config &config = moe_.config();
  const TrainKernels &kernels = moe_.backend().train;
  const bool backward = run.shards[0].z != nullptr;
  const auto chunks = static_cast<int64_t>(run.chunks.size());
  const std::vector<int64_t> units = units_of_shards(chunks);
  const auto unit = [&](int s, int index, int64_t which) {
    const Run::Chunk chunk = run.chunks[static_cast<size_t>(which)];
    const Route::Expert &expert = run.expert(chunk.expert);
    const Run::Shard &part = run.shards[static_cast<size_t>(s)];
    const Run::Worker worker = run.worker(s, index);
    const int64_t z_bytes = part.z_gemm.row_bytes;
    uint8_t *z = backward ? part.z : run.extra.shards[static_cast<size_t>(s)].z;
    if (z == nullptr) z = run.batch.shards[static_cast<size_t>(s)].intermediate.data;
    z += expert.first * z_bytes;
    int32_t rows = expert.rows, first = chunk.first;
    if (run.dropout) {
      const LoadRowsArgs load = {
          run.dropped_intermediate(share, s, moe_.store().shard(s).range.first, chunk, z),
          &part.z_gemm,
          chunk.rows,
          0,
          chunk.rows,
          1.0f,
          nullptr,
          nullptr,
          worker.operand};
      kernels.load_rows(&load);
      z = worker.operand;
      rows = chunk.rows;
      first = 0;
    }
    const MultiplyArgs multiply = {
        &part.z_gemm,
        z,
        rows,
        first,
        first + chunk.rows,
        part.down_a + chunk.expert * run.rank_panels * int64_t{part.z_gemm.steps} * kTileBytes,
        run.rank_panels,
        nullptr,
        0,
        config.strict,
        part.down_middle + (expert.first + chunk.first) * run.rank_stride(),
        run.rank_stride(),
        worker.product,
        0};
    multiply_panels(kernels, multiply);
  };
  run_section(moe_.context_->pool, {Stage::lora_middle, config.layer_index}, units.data(), unit);
  std::vector<float *> parts;
  for (const Run::Shard &part : run.shards) {
    if (part.down_middle != nullptr && part.down_middle != run.down_middle) parts.push_back(part.down_middle);
  }
  const bool wanted = run.packs_forward && !backward;
  if (parts.empty() && !wanted) return;
  const auto finish = [&](int64_t which) {
    const Run::Chunk chunk = run.chunks[static_cast<size_t>(which)];
    const Route::Expert &expert = run.expert(chunk.expert);
    const int64_t at = (expert.first + chunk.first) * run.rank_stride();
    add_parts(parts, at, chunk.rows * run.rank_stride(), run.down_middle);
    if (!wanted) return;
    const Gemm &gemm = run.extra.down_rank;
    run.load_middle(kernels, chunk, run.down_middle + at, gemm, config_.lora_scale, nullptr,
                    run.extra.down_input);
  };
  run_spread(moe_.context_->pool, {Stage::lora_middle, config.layer_index}, chunks, 1, finish);
}

// dO through the B of down, and that as an operand.
void Training::grad_adapter_input(Run &run) const {
  if (!run.adapted) return;
  const ktk_moe_config &config = moe_.config();
  const TrainKernels &kernels = moe_.backend().train;
  const int64_t hidden = config.hidden_size, stride = run.rank_stride();
  const bool scaled = moe_.kernels_.integer && !moe_.store().shard(0).down.scale_is_bf16;
  const auto unit = [&](int s, int index, int64_t which) {
    const Run::Chunk chunk = run.chunks[static_cast<size_t>(which)];
    const Route::Expert &expert = run.expert(chunk.expert);
    const Run::Worker worker = run.worker(s, index);
    uint8_t *rows = run.grad_rows + expert.first * run.hidden.row_bytes;
    int32_t count = expert.rows, first = chunk.first;
    if (scaled) {
      Source source = matrix(run.args->grad_output, run.args->grad_output_dtype, hidden, hidden);
      source.rows = run.route.tokens.data() + expert.first + chunk.first;
      const LoadRowsArgs load = {source,  &run.hidden, chunk.rows,    0, chunk.rows, 1.0f,
                                 nullptr, nullptr,     worker.operand};
      kernels.load_rows(&load);
      rows = worker.operand;
      count = chunk.rows;
      first = 0;
    }
    float *middle = run.grad_down_middle + (expert.first + chunk.first) * stride;
    const MultiplyArgs multiply = {
        &run.hidden,
        rows,
        count,
        first,
        first + chunk.rows,
        run.down_b_back + chunk.expert * run.rank_panels * int64_t{run.hidden.steps} * kTileBytes,
        run.rank_panels,
        nullptr,
        0,
        config.strict,
        middle,
        stride,
        worker.product,
        0};
    multiply_panels(kernels, multiply);
    const Gemm &gemm = run.extra.down_rank;
    run.load_middle(kernels, chunk, middle, gemm, config_.lora_scale, nullptr, run.grad_down_input);
  };
  run_dealt(moe_.context_->pool, {Stage::grad_lora_input, config.layer_index},
            static_cast<int64_t>(run.chunks.size()), unit);
}

// Gradients of gate and up through their B, and that as operands.
void Training::grad_adapter_middle(Run &run) const {
  if (!run.adapted) return;
  const ktk_moe_config &config = moe_.config();
  const TrainKernels &kernels = moe_.backend().train;
  const int64_t stride = run.stacked_stride();
  const auto chunks = static_cast<int64_t>(run.chunks.size());
  const std::vector<int64_t> units = units_of_shards(chunks);
  const auto unit = [&](int s, int index, int64_t which) {
    const Run::Chunk chunk = run.chunks[static_cast<size_t>(which)];
    const Route::Expert &expert = run.expert(chunk.expert);
    const Run::Shard &part = run.shards[static_cast<size_t>(s)];
    const int64_t row_bytes = part.gate_up_gemm.row_bytes;
    uint8_t *rows = part.plain != nullptr ? part.plain : part.gate_up;
    const MultiplyArgs multiply = {&part.gate_up_gemm,
                                   rows + expert.first * row_bytes,
                                   expert.rows,
                                   chunk.first,
                                   chunk.first + chunk.rows,
                                   part.gate_up_b_back + chunk.expert * run.stacked_panels *
                                                             int64_t{part.gate_up_gemm.steps} * kTileBytes,
                                   run.stacked_panels,
                                   nullptr,
                                   0,
                                   config.strict,
                                   part.grad_gate_up_middle + (expert.first + chunk.first) * stride,
                                   stride,
                                   run.worker(s, index).product,
                                   0};
    multiply_panels(kernels, multiply);
  };
  run_section(moe_.context_->pool, {Stage::grad_lora_middle, config.layer_index}, units.data(), unit);
  std::vector<float *> parts;
  for (const Run::Shard &part : run.shards) {
    if (part.grad_gate_up_middle != nullptr && part.grad_gate_up_middle != run.grad_gate_up_middle)
      parts.push_back(part.grad_gate_up_middle);
  }
  if (run.dropout) {
    for (int which = 0; which < 2; which++) {
      for (int32_t rank = 0; rank < align_up(2 * run.even_rank, 16); rank++)
        run.select[which][rank] = rank / run.even_rank == which ? 1.0f : 0.0f;
    }
  }
  const auto finish = [&](int64_t which) {
    const Run::Chunk chunk = run.chunks[static_cast<size_t>(which)];
    const Route::Expert &expert = run.expert(chunk.expert);
    const int64_t at = (expert.first + chunk.first) * stride;
    add_parts(parts, at, chunk.rows * stride, run.grad_gate_up_middle);
    const Gemm &gemm = run.extra.gate_up_rank;
    for (int projection = 0; projection < (run.dropout ? 2 : 1); projection++) {
      run.load_middle(kernels, chunk, run.grad_gate_up_middle + at, gemm, config_.lora_scale,
                      run.dropout ? run.select[projection] : nullptr, run.grad_gate_up_input[projection]);
    }
  };
  run_spread(moe_.context_->pool, {Stage::grad_lora_middle, config.layer_index}, chunks, 1, finish);
}

}  // namespace ktk
