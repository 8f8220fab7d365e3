#include "engine/train_run.h"

namespace ktk {
template <typename Pack>
void Training::Run::sum_gradient(const Backend &backend, const Worker &worker, int64_t index,
                                 const uint8_t *factor, int32_t factor_rows, int32_t first_row,
                                 int32_t last_row, int32_t columns, const Pack &pack) const {
  const int32_t expert_rows = expert(static_cast<int32_t>(index)).rows;
  const auto panels = static_cast<int32_t>(divide_up(columns, kPanelColumns));
  for (int32_t first = 0; first < expert_rows; first += kBlockTokens) {
    const int32_t rows = rows_of_chunk(expert_rows, first, kBlockTokens);
    const Gemm gemm = make_gemm(backend.formats[KTK_FORMAT_BF16], rows, 0, 0);
    if (rows % 32 != 0) {
      for (int64_t panel = 1; panel <= panels; panel++)
        std::memset(worker.tiles + (panel * gemm.steps - 1) * kTileBytes, 0, kTileBytes);
    }
    pack(first, rows, gemm.steps);
    const int64_t offset = block_offset({static_cast<int32_t>(index), first, rows});
    const MultiplyArgs multiply = {
        &gemm,          const_cast<uint8_t *>(factor) + offset * factor_rows * kStepBytes,
        factor_rows,    first_row,
        last_row,       worker.tiles,
        panels,         nullptr,
        first > 0,      1,
        worker.out,     kGradColumns,
        worker.product, 0};
    backend.train.multiply(&multiply);
  }
}

namespace {

// Columns of gate or up out of an operand that holds 32 of each by turns.
void pack_by_turns(const TrainKernels &kernels, const Source &source, int32_t first, int32_t rows,
                   int64_t column, int32_t columns, bool up, int32_t steps, uint8_t *to) {
  for (int32_t c = 0; c < columns; c += 32) {
    const PackPairsArgs pairs = {source,
                                 first,
                                 rows,
                                 c,
                                 0,
                                 static_cast<int32_t>((column + c) * 2 + (up ? 32 : 0)),
                                 std::min(32, columns - c),
                                 steps,
                                 to};
    kernels.pack_pairs(&pairs);
  }
}

}  // namespace

// The small factor of each gradient of an adapter, transposed: ranks by rows of the expert.
void Training::transpose_factors(Run &run) const {
  const ktk_backward_args &args = *run.args;
  if (!run.adapted) return;
  const bool wanted[Run::kFactors] = {args.gate_b != nullptr, args.up_b != nullptr, args.down_b != nullptr,
                                      args.gate_a != nullptr || args.up_a != nullptr, args.down_a != nullptr};
  const FormatKernels &bf16 = moe_.backend().formats[KTK_FORMAT_BF16];
  const TrainKernels &kernels = moe_.backend().train;
  const auto blocks = static_cast<int64_t>(run.blocks.size());
  const auto unit = [&](int64_t which) {
    const Run::Factor &factor = run.factors[which / blocks];
    if (!wanted[which / blocks]) return;
    const Run::Chunk block = run.blocks[static_cast<size_t>(which % blocks)];
    const Route::Expert &expert = run.expert(block.expert);
    const Gemm gemm = make_gemm(bf16, block.rows, 0, 0);
    const TransposeRowsArgs transpose = {
        matrix(factor.values + int64_t{expert.first} * factor.stride, KTK_DTYPE_F32,
               factor.first + factor.columns, factor.stride),
        &gemm,
        block.first,
        factor.first,
        factor.columns,
        config_.lora_scale,
        factor.weighted ? run.route.weights.data() + expert.first : nullptr,
        factor.operand + run.block_offset(block) * factor.columns * kStepBytes};
    kernels.transpose_rows(&transpose);
  };
  run_spread(moe_.context_->pool, {Stage::grad_lora, moe_.config().layer_index}, blocks * Run::kFactors, 1,
             unit);
}

void Training::grad_adapters(Run &run) const {
  const double share = config_.lora_dropout;
  if (!run.adapted) return;
  const ktk_moe_config &config = moe_.config();
  const ktk_backward_args &args = *run.args;
  const TrainKernels &kernels = moe_.backend().train;
  const int64_t hidden = config.hidden_size, intermediate = config.intermediate_size, rank = run.rank;
  const int64_t width = dtype_bytes(args.lora_dtype);
  const auto store = [&](const float *values, int64_t rows, int64_t columns, void *base, int64_t offset,
                         int64_t stride, bool transposed) {
    const StoreMatrixArgs matrix = {values,
                                    kGradColumns,
                                    static_cast<int32_t>(rows),
                                    static_cast<int32_t>(columns),
                                    static_cast<uint8_t *>(base) + offset * width,
                                    args.lora_dtype,
                                    stride,
                                    transposed,
                                    args.accumulate};
    kernels.store_matrix(&matrix);
  };
  const auto pack = [&](const Source &source, int32_t first, int32_t rows, int64_t column, int64_t columns,
                        int32_t steps, uint8_t *to) {
    const PackPairsArgs pairs = {
        source, first, rows, 0, 0, static_cast<int32_t>(column), static_cast<int32_t>(columns), steps, to};
    kernels.pack_pairs(&pairs);
  };

  // A of gate and up, and B of down: all of H, whatever the shards.
  const int64_t runs = divide_up(hidden, kGradColumns);
  const auto shared = [&](int s, int index, int64_t which) {
    const Run::Worker worker = run.worker(s, index);
    const int64_t e = which / (2 * runs);
    const bool input_side = which / runs % 2 == 0;
    const int64_t column = which % runs * kGradColumns;
    const auto columns = static_cast<int32_t>(std::min<int64_t>(kGradColumns, hidden - column));
    const Route::Expert &expert = run.expert(static_cast<int32_t>(e));
    const int32_t *tokens = run.route.tokens.data() + expert.first;
    if (input_side) {
      for (const Projection projection : {kGate, kUp}) {
        void *targets[] = {args.gate_a, args.up_a};
        if (run.dropout ? targets[projection] == nullptr : projection == kUp) continue;
        if (targets[kGate] == nullptr && targets[kUp] == nullptr) continue;
        Source source = matrix(run.state.input, run.state.input_dtype, hidden, hidden);
        source.rows = source.dropout_rows = tokens;
        source.dropout = run.dropped(share, expert.id, projection);
        run.sum_gradient(moe_.backend(), worker, e, run.factors[Run::kGradGateUp].operand, 2 * run.even_rank,
                         0, 2 * run.even_rank, columns, [&](int32_t first, int32_t rows, int32_t steps) {
                           pack(source, first, rows, column, columns, steps, worker.tiles);
                         });
        for (const Projection target : {kGate, kUp}) {
          if (targets[target] == nullptr || (run.dropout && target != projection)) continue;
          store(worker.out + (target == kUp ? run.even_rank : 0) * kGradColumns, rank, columns,
                targets[target], int64_t{expert.id} * rank * hidden + column, hidden, false);
        }
      }
      return;
    }
    if (args.down_b == nullptr) return;
    Source source = matrix(args.grad_output, args.grad_output_dtype, hidden, hidden);
    source.rows = tokens;
    run.sum_gradient(moe_.backend(), worker, e, run.factors[Run::kDownMiddle].operand, run.even_rank, 0,
                     run.even_rank, columns, [&](int32_t first, int32_t rows, int32_t steps) {
                       pack(source, first, rows, column, columns, steps, worker.tiles);
                     });
    store(worker.out, rank, columns, args.down_b, (int64_t{expert.id} * hidden + column) * rank, rank, true);
  };
  run_dealt(moe_.context_->pool, {Stage::grad_lora, config.layer_index}, 2 * runs * run.experts(), shared);

  // B of gate and up, and A of down: each shard its columns.
  std::vector<int64_t> units;
  for (int s = 0; s < moe_.store().shard_count(); s++)
    units.push_back(divide_up(moe_.store().shard(s).columns(), kGradColumns) * 3 * run.experts());
  const auto sliced = [&](int s, int index, int64_t which) {
    const ExpertStore::Shard &shard = moe_.store().shard(s);
    const Run::Shard &part = run.shards[static_cast<size_t>(s)];
    const Run::Worker worker = run.worker(s, index);
    const int64_t pieces = divide_up(shard.columns(), kGradColumns);
    const int64_t e = which / (3 * pieces);
    const auto projection = static_cast<Projection>(which / pieces % 3);
    const int64_t column = which % pieces * kGradColumns;
    const auto columns = static_cast<int32_t>(std::min<int64_t>(kGradColumns, shard.columns() - column));
    const Route::Expert &expert = run.expert(static_cast<int32_t>(e));
    if (projection == kDown) {
      if (args.down_a == nullptr) return;
      Source source = operand(part.z + expert.first * part.z_gemm.row_bytes, part.z_gemm, expert.rows);
      source.dropout_rows = run.route.tokens.data() + expert.first;
      source.dropout = run.dropped(share, expert.id, kDown);
      source.dropout_column = shard.range.first;
      run.sum_gradient(moe_.backend(), worker, e, run.factors[Run::kGradDown].operand, run.even_rank, 0,
                       run.even_rank, columns, [&](int32_t first, int32_t rows, int32_t steps) {
                         pack(source, first, rows, column, columns, steps, worker.tiles);
                       });
      store(worker.out, rank, columns, args.down_a,
            int64_t{expert.id} * rank * intermediate + shard.range.first + column, intermediate, false);
      return;
    }
    void *target = projection == kGate ? args.gate_b : args.up_b;
    if (target == nullptr) return;
    const uint8_t *grads = part.plain != nullptr ? part.plain : part.gate_up;
    const Source source =
        operand(grads + expert.first * part.gate_up_gemm.row_bytes, part.gate_up_gemm, expert.rows);
    const Run::Factor &factor = run.factors[projection == kGate ? Run::kGateMiddle : Run::kUpMiddle];
    run.sum_gradient(moe_.backend(), worker, e, factor.operand, run.even_rank, 0, run.even_rank, columns,
                     [&](int32_t first, int32_t rows, int32_t steps) {
                       pack_by_turns(kernels, source, first, rows, column, columns, projection == kUp, steps,
                                     worker.tiles);
                     });
    store(worker.out, rank, columns, target,
          (int64_t{expert.id} * intermediate + shard.range.first + column) * rank, rank, true);
  };
  run_section(moe_.context_->pool, {Stage::grad_lora, config.layer_index}, units.data(), sliced);
}

// Gradients of the base weights: [dG | dU | w Z]' transposed once, times the tokens and the gradient of the
// output.
void Training::grad_base(Run &run) const {
  const ktk_backward_args &args = *run.args;
  if (args.gate == nullptr && args.up == nullptr && args.down == nullptr) return;
  const ktk_moe_config &config = moe_.config();
  const FormatKernels &bf16 = moe_.backend().formats[KTK_FORMAT_BF16];
  const TrainKernels &kernels = moe_.backend().train;
  const int64_t hidden = config.hidden_size, intermediate = config.intermediate_size;
  const int64_t width = dtype_bytes(args.base_dtype);
  const auto blocks = static_cast<int64_t>(run.blocks.size());
  // Where the factor of a block lies, of which: dG, dU or w Z.
  const auto factor_of = [&](const Run::Shard &part, const ExpertStore::Shard &shard, int which) {
    return part.base_factor + which * run.k_steps.back() * shard.columns() * kStepBytes;
  };

  std::vector<int64_t> units;
  for (int s = 0; s < moe_.store().shard_count(); s++) {
    const int64_t pieces = divide_up(moe_.store().shard(s).columns(), kActivationGroup);
    units.push_back(pieces * 3 * blocks);
  }
  const auto transpose = [&](int s, int, int64_t index) {
    const ExpertStore::Shard &shard = moe_.store().shard(s);
    const Run::Shard &part = run.shards[static_cast<size_t>(s)];
    const int64_t pieces = divide_up(shard.columns(), kActivationGroup);
    const Run::Chunk block = run.blocks[static_cast<size_t>(index / (3 * pieces))];
    const auto which = static_cast<int>(index / pieces % 3);
    const int64_t column = index % pieces * kActivationGroup;
    const auto last = static_cast<int32_t>(std::min<int64_t>(column + kActivationGroup, shard.columns()));
    const Route::Expert &expert = run.expert(block.expert);
    const Gemm gemm = make_gemm(bf16, block.rows, 0, 0);
    uint8_t *to = factor_of(part, shard, which) + run.block_offset(block) * shard.columns() * kStepBytes;
    const Gemm &source_gemm = which == 2 ? part.z_gemm : part.gate_up_gemm;
    const uint8_t *values = which == 2 ? part.z : part.gate_up;
    const Source source = operand(values + expert.first * source_gemm.row_bytes, source_gemm, expert.rows);
    // Pieces of 32 columns lie together in the operands; each is a whole number of blocks of 16 rows here.
    for (auto c = static_cast<int32_t>(column); c < last; c += 32) {
      const TransposeRowsArgs rows = {source,
                                      &gemm,
                                      block.first,
                                      which == 2 ? c : c * 2 + which * 32,
                                      std::min(32, last - c),
                                      1.0f,
                                      which == 2 ? run.route.weights.data() + expert.first : nullptr,
                                      to + int64_t{c} * gemm.steps * kStepBytes};
      kernels.transpose_rows(&rows);
    }
  };
  run_section(moe_.context_->pool, {Stage::grad_base, config.layer_index}, units.data(), transpose);

  const int64_t runs = divide_up(hidden, kGradColumns);
  units = units_of_shards(3 * runs * run.experts());
  const auto unit = [&](int s, int index, int64_t which) {
    const ExpertStore::Shard &shard = moe_.store().shard(s);
    const Run::Shard &part = run.shards[static_cast<size_t>(s)];
    const Run::Worker worker = run.worker(s, index);
    const int64_t e = which / (3 * runs);
    const auto kind = static_cast<int>(which / runs % 3);
    void *targets[] = {args.gate, args.up, args.down};
    if (targets[kind] == nullptr) return;
    const int64_t column = which % runs * kGradColumns;
    const auto columns = static_cast<int32_t>(std::min<int64_t>(kGradColumns, hidden - column));
    const Route::Expert &expert = run.expert(static_cast<int32_t>(e));
    Source source = kind == 2 ? matrix(args.grad_output, args.grad_output_dtype, hidden, hidden)
                              : matrix(run.state.input, run.state.input_dtype, hidden, hidden);
    source.rows = run.route.tokens.data() + expert.first;
    for (int32_t first = 0; first < shard.columns(); first += kPassRows) {
      const int32_t last = std::min(first + kPassRows, shard.columns());
      run.sum_gradient(moe_.backend(), worker, e, factor_of(part, shard, kind), shard.columns(), first, last,
                       columns, [&](int32_t first_row, int32_t rows, int32_t steps) {
                         const PackPairsArgs pairs = {source,  first_row, rows,
                                                      0,       0,         static_cast<int32_t>(column),
                                                      columns, steps,     worker.tiles};
                         kernels.pack_pairs(&pairs);
                       });
      const int64_t neuron = shard.range.first + first;
      const int64_t offset = kind == 2 ? (int64_t{expert.id} * hidden + column) * intermediate + neuron
                                       : (int64_t{expert.id} * intermediate + neuron) * hidden + column;
      const StoreMatrixArgs store = {worker.out,
                                     kGradColumns,
                                     last - first,
                                     columns,
                                     static_cast<uint8_t *>(targets[kind]) + offset * width,
                                     args.base_dtype,
                                     kind == 2 ? intermediate : hidden,
                                     kind == 2,
                                     args.accumulate};
      kernels.store_matrix(&store);
    }
  };
  run_section(moe_.context_->pool, {Stage::grad_base, config.layer_index}, units.data(), unit);
}

// Experts without rows have a gradient of zero, unless gradients are added to.
void Training::clear_idle(Run &run) const {
  const ktk_backward_args &args = *run.args;
  if (args.accumulate != 0) return;
  const ktk_moe_config &config = moe_.config();
  const int64_t hidden = config.hidden_size, intermediate = config.intermediate_size, rank = run.rank;
  std::vector<bool> active(static_cast<size_t>(config.num_experts));
  for (const Route::Expert &expert : run.route.experts) active[static_cast<size_t>(expert.id)] = true;
  const int64_t lora = dtype_bytes(args.lora_dtype), base = dtype_bytes(args.base_dtype);
  const struct {
    void *values;
    int64_t bytes;  // of an expert
  } gradients[] = {
      {args.gate_a, rank * hidden * lora},       {args.gate_b, intermediate * rank * lora},
      {args.up_a, rank * hidden * lora},         {args.up_b, intermediate * rank * lora},
      {args.down_a, rank * intermediate * lora}, {args.down_b, hidden * rank * lora},
      {args.gate, intermediate * hidden * base}, {args.up, intermediate * hidden * base},
      {args.down, hidden * intermediate * base},
  };
  run_spread(moe_.context_->pool, {Stage::grad_merge, config.layer_index}, config.num_experts, 1,
             [&](int64_t expert) {
               if (active[static_cast<size_t>(expert)]) return;
               for (const auto &gradient : gradients) {
                 if (gradient.values == nullptr) continue;
                 std::memset(static_cast<uint8_t *>(gradient.values) + expert * gradient.bytes, 0,
                             static_cast<size_t>(gradient.bytes));
               }
             });
}

}  // namespace ktk
