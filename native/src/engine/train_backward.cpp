#include "engine/train_run.h"

namespace ktk {
namespace {

// In 8 sums, whatever the compiler makes of them.
float dot_bf16(const uint8_t *row, const float *other, int64_t count) {
  float sums[8] = {};
  for (int64_t i = 0; i < count; i++) {
    uint16_t half;
    std::memcpy(&half, row + 2 * i, 2);
    const uint32_t bits = uint32_t{half} << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    sums[i % 8] += value * other[i];
  }
  float sum = 0.0f;
  for (const float each : sums) sum += each;
  return sum;
}

// Where the scales of an expert's down rows are, if they go with the gradient; they are the same in every
// shard.
const float *row_scales(const ExpertStore &store, const FormatKernels &kernels, int shard, int32_t expert,
                        ktk_part scale, const Gemm &gemm) {
  if (!kernels.integer || gemm.scale_is_bf16) return nullptr;
  return reinterpret_cast<const float *>(store.part(shard, expert, scale));
}

}  // namespace

// dO, a row for each row of an expert, times the scales of down's output rows where a row has one.
void Training::gather_grad(Run &run) const {
  const ktk_moe_config &config = moe_.config();
  const TrainKernels &kernels = moe_.backend().train;
  const int64_t hidden = config.hidden_size;
  std::fill_n(run.ones, run.rows, 1.0f);
  const auto unit = [&](int s, int index, int64_t which) {
    const Run::Chunk chunk = run.chunks[static_cast<size_t>(which)];
    const Route::Expert &expert = run.expert(chunk.expert);
    Source source = matrix(run.args->grad_output, run.args->grad_output_dtype, hidden, hidden);
    source.rows = run.route.tokens.data() + expert.first + chunk.first;
    const LoadRowsArgs load = {source,
                               &run.hidden,
                               expert.rows,
                               chunk.first,
                               chunk.first + chunk.rows,
                               1.0f,
                               nullptr,
                               row_scales(moe_.store(), moe_.kernels_, 0, expert.id, KTK_PART_DOWN_SCALE,
                                          moe_.store().shard(0).down),
                               run.grad_rows + expert.first * run.hidden.row_bytes};
    kernels.load_rows(&load);
    const float *bias = moe_.store().bias(0, expert.id, KTK_PART_DOWN_BIAS);
    for (int32_t row = chunk.first; row < chunk.first + chunk.rows; row++) {
      float &product = run.bias_products[expert.first + row];
      product = 0.0f;
      if (bias == nullptr) continue;
      uint8_t *values = run.worker(s, index).operand;  // a single row lies in one piece
      source.rows = run.route.tokens.data() + expert.first + row;
      const LoadRowsArgs single = {source, &run.hidden, 1, 0, 1, 1.0f, nullptr, nullptr, values};
      kernels.load_rows(&single);
      product = dot_bf16(values, bias, hidden);
    }
  };
  run_dealt(moe_.context_->pool, {Stage::grad_input, config.layer_index},
            static_cast<int64_t>(run.chunks.size()), unit);
}

// Gradient of the intermediate, not yet weighted; its product with the intermediate; gradients of gate and
// up.
void Training::grad_down(Run &run) const {
  const double share = config_.lora_dropout;
  const ktk_moe_config &config = moe_.config();
  const TrainKernels &kernels = moe_.backend().train;
  std::vector<int64_t> units;
  for (const Run::Shard &part : run.shards) units.push_back(part.units * run.experts());
  const auto unit = [&](int s, int index, int64_t which) {
    const ExpertStore::Shard &shard = moe_.store().shard(s);
    const Run::Shard &part = run.shards[static_cast<size_t>(s)];
    const Run::Worker worker = run.worker(s, index);
    const auto e = static_cast<int32_t>(which / part.units);
    const Route::Expert &expert = run.expert(e);
    const auto column = static_cast<int32_t>(which % part.units * run.unit_columns);
    const int32_t columns = std::min(run.unit_columns, shard.columns() - column);
    const auto panels = static_cast<int32_t>(divide_up(columns, kPanelColumns));
    const Weights weights = weights_of(moe_.store(), s, expert.id, KTK_PART_DOWN_WEIGHT);
    const ExpandArgs expand = {&shard.down,
                               weights.tiles,
                               weights.scale,
                               weights.factors,
                               static_cast<int32_t>(divide_up(config.hidden_size, kPanelColumns)),
                               1,
                               column,
                               columns,
                               worker.tiles};
    moe_.kernels_.expand(&expand);
    const float *scale =
        row_scales(moe_.store(), moe_.kernels_, s, expert.id, KTK_PART_GATE_UP_SCALE, shard.gate_up);
    const int64_t stride = run.unit_columns;
    const int64_t gate_up_row = part.gate_up_gemm.row_bytes;
    // Products with stored weights are of rotated columns, those with adapters are not.
    const bool apart = run.dropout || config.rotated != 0;
    LoraProduct lora{};
    const uint8_t *lora_tiles = nullptr;
    if (run.adapted) {
      const Gemm &rank = run.extra.down_rank;
      tiles_of_columns({down_a(expert.id, shard.range.first + column, columns), {}, 0, 0},
                       {worker.lora_tiles, rank.steps * kTileBytes, kTileBytes, panels, rank.steps});
      lora_tiles = worker.lora_tiles;
      lora = {&rank, run.grad_down_input + expert.first * rank.row_bytes, lora_tiles};
    }
    for (int32_t first = 0; first < expert.rows; first += kPassRows) {
      const int32_t last = std::min(first + kPassRows, expert.rows);
      const MultiplyArgs multiply = {&run.hidden,
                                     run.grad_rows + expert.first * run.hidden.row_bytes,
                                     expert.rows,
                                     first,
                                     last,
                                     worker.tiles,
                                     panels,
                                     run.adapted && !apart ? &lora : nullptr,
                                     0,
                                     config.strict,
                                     worker.out,
                                     stride,
                                     worker.product,
                                     config.rotated != 0 ? columns : 0};
      kernels.multiply(&multiply);
      if (run.adapted && apart) {
        float *to = run.dropout ? worker.out2 : worker.out;
        const MultiplyArgs adapters = {
            lora.gemm, lora.rows,    expert.rows,   first, last,   lora_tiles,     panels,
            nullptr,   !run.dropout, config.strict, to,    stride, worker.product, 0};
        kernels.multiply(&adapters);
      }
      if (run.dropout) {
        const AddDroppedArgs add = {worker.out2,
                                    stride,
                                    first,
                                    last,
                                    shard.range.first + column,
                                    panels * kPanelColumns,
                                    run.route.tokens.data() + expert.first,
                                    run.dropped(share, expert.id, kDown),
                                    nullptr,
                                    worker.out,
                                    stride,
                                    0};
        kernels.add_dropped(&add);
      }
      const int64_t z_row = part.z_gemm.row_bytes;
      const ActivationBackwardArgs activation = {
          expert.rows,
          first,
          last,
          column,
          columns,
          worker.out,
          stride,
          part.saved + int64_t{expert.first} * 2 * shard.columns(),
          int64_t{2} * shard.columns(),
          shard.columns(),
          run.route.weights.data() + expert.first,
          config.swiglu_limit,
          config.swiglu_alpha,
          &part.gate_up_gemm,
          part.gate_up + expert.first * gate_up_row,
          scale,
          scale != nullptr ? scale + kPanelColumns : nullptr,
          part.plain != nullptr ? part.plain + expert.first * gate_up_row : nullptr,
          &part.z_gemm,
          part.z != nullptr ? part.z + expert.first * z_row : nullptr,
          part.products + which % part.units * run.rows + expert.first};
      kernels.activation_backward(&activation);
    }
  };
  run_in_order(moe_.context_->pool, {Stage::grad_down, config.layer_index}, units.data(), unit);
}

// The product with down's bias, and sums over the units of each row, in the order of the shards and of their
// columns.
void Training::grad_expert_weights(Run &run) const {
  if (run.args->grad_expert_weights == nullptr) return;
  for (int64_t row = 0; row < run.rows; row++) {
    float sum = run.bias_products[row];
    for (const Run::Shard &part : run.shards) {
      for (int64_t unit = 0; unit < part.units; unit++) sum += part.products[unit * run.rows + row];
    }
    run.args->grad_expert_weights[run.route.slots[static_cast<size_t>(row)]] = sum;
  }
}

// An expert's share of the gradient of the input in some columns, on to the sums of its tokens.
void Training::add_grad_gate_up(Run &run, int s, int index, int32_t e, int32_t column, int32_t columns,
                                float *sum, int64_t sum_stride, const Turns::Turn *turn) const {
  const double share = config_.lora_dropout;
  const ktk_moe_config &config = moe_.config();
  const TrainKernels &kernels = moe_.backend().train;
  const ExpertStore::Shard &shard = moe_.store().shard(s);
  const Run::Shard &part = run.shards[static_cast<size_t>(s)];
  const Run::Worker worker = run.worker(s, index);
  const auto panels = static_cast<int32_t>(divide_up(columns, kPanelColumns));
  const int64_t width = int64_t{panels} * kPanelColumns;
  const Route::Expert &expert = run.expert(e);
  const Weights weights = weights_of(moe_.store(), s, expert.id, KTK_PART_GATE_UP_WEIGHT);
  const ExpandArgs expand = {
      &shard.gate_up, weights.tiles, weights.scale, weights.factors, static_cast<int32_t>(shard.panels), 2,
      column,         columns,       worker.tiles};
  moe_.kernels_.expand(&expand);
  const Gemm &rank = run.extra.gate_up_rank;
  // Products with stored weights are of rotated columns, those with adapters are not.
  const bool apart = run.dropout || config.rotated != 0;
  LoraProduct lora{};
  const bool adapted = run.adapted && s == 0;
  if (adapted) {
    AdapterPair a = gate_up_a(expert.id, column, columns);
    a.second_depth = run.even_rank;
    tiles_of_columns(a, {worker.lora_tiles, rank.steps * kTileBytes, kTileBytes, panels, rank.steps});
    lora = {&rank, run.grad_gate_up_input[0] + expert.first * rank.row_bytes, worker.lora_tiles};
  }
  DownArgs down = {};
  down.gemm = &part.gate_up_gemm;
  down.weights = {worker.tiles, nullptr, nullptr};
  down.input = {part.gate_up + expert.first * part.gate_up_gemm.row_bytes, nullptr, nullptr};
  down.tokens = run.route.tokens.data() + expert.first;
  down.expert_weights = run.ones + expert.first;
  down.rows = expert.rows;
  down.last_row = expert.rows;
  down.hidden_size = config.hidden_size;
  down.last_panel = panels;
  down.strict = config.strict;
  down.scratch = worker.product;
  down.sum = sum;
  down.sum_stride = sum_stride;
  down.lora = adapted && !apart ? &lora : nullptr;
  down.await_turn = turn != nullptr ? Turns::await : nullptr;
  down.turn = turn;
  moe_.backend().formats[KTK_FORMAT_BF16].down(&down);
  if (!adapted || !apart) return;
  for (const Projection projection : {kGate, kUp}) {
    if (projection == kUp && !run.dropout) break;  // the input of gate holds both
    uint8_t *rows = run.grad_gate_up_input[projection] + expert.first * rank.row_bytes;
    for (int32_t first = 0; first < expert.rows; first += kPassRows) {
      const int32_t last = std::min(first + kPassRows, expert.rows);
      const MultiplyArgs multiply = {&rank,   rows, expert.rows,   first,      last,  lora.tiles,     panels,
                                     nullptr, 0,    config.strict, worker.out, width, worker.product, 0};
      kernels.multiply(&multiply);
      const AddDroppedArgs add = {worker.out,
                                  width,
                                  first,
                                  last,
                                  column,
                                  static_cast<int32_t>(width),
                                  run.route.tokens.data() + expert.first,
                                  run.dropout ? run.dropped(share, expert.id, projection) : Dropout{},
                                  run.route.tokens.data() + expert.first,
                                  sum,
                                  sum_stride,
                                  config.rotated != 0 ? columns : 0};
      kernels.add_dropped(&add);
    }
  }
}

// Gradient of the input, summed by token in fp32: for each run of columns all experts in their order, by one
// worker or, where sums are shared, by turns.
void Training::grad_gate_up(Run &run) const {
  const ktk_moe_config &config = moe_.config();
  const int64_t hidden = config.hidden_size, padded = align_up(hidden, kPanelColumns);
  const int64_t runs = divide_up(hidden, run.token_columns);
  const std::vector<int64_t> units = units_of_shards(run.shared_sums ? runs * run.experts() : runs);
  const SpanLabel label{Stage::grad_gate_up, config.layer_index};
  if (run.shared_sums) {
    std::vector<Turns> turns;
    std::vector<float *> sums;
    for (const Run::Shard &part : run.shards) {
      turns.emplace_back(runs);
      sums.push_back(part.partial);
    }
    run_zeroing(moe_.context_->pool, label, sums, run.tokens, padded);
    const auto unit = [&](int s, int index, int64_t which) {
      const auto column = static_cast<int32_t>(which % runs * run.token_columns);
      const auto columns = static_cast<int32_t>(std::min<int64_t>(run.token_columns, hidden - column));
      const Turns::Turn turn = {&turns[static_cast<size_t>(s)], which % runs,
                                static_cast<uint32_t>(which / runs)};
      add_grad_gate_up(run, s, index, static_cast<int32_t>(which / runs), column, columns,
                       run.shards[static_cast<size_t>(s)].partial + column, padded, &turn);
      Turns::done(turn);
    };
    run_in_order(moe_.context_->pool, label, units.data(), unit);
  } else {
    const auto unit = [&](int s, int index, int64_t which) {
      const Run::Shard &part = run.shards[static_cast<size_t>(s)];
      const Run::Worker worker = run.worker(s, index);
      const auto column = static_cast<int32_t>(which * run.token_columns);
      const auto columns = static_cast<int32_t>(std::min<int64_t>(run.token_columns, hidden - column));
      const int64_t width = align_up(columns, kPanelColumns);
      std::memset(worker.sum, 0, static_cast<size_t>(run.tokens * width) * sizeof(float));
      for (int64_t e = 0; e < run.experts(); e++)
        add_grad_gate_up(run, s, index, static_cast<int32_t>(e), column, columns, worker.sum, width, nullptr);
      if (part.partial != nullptr) {
        for (int64_t t = 0; t < run.tokens; t++) {
          std::memcpy(part.partial + t * padded + column, worker.sum + t * width,
                      static_cast<size_t>(width) * sizeof(float));
        }
        return;
      }
      const float *parts[] = {worker.sum};
      const FinishArgs finish = {parts,
                                 1,
                                 width,
                                 0,
                                 static_cast<int32_t>(run.tokens),
                                 column,
                                 column + columns,
                                 hidden,
                                 run.args->grad_input,
                                 run.args->grad_input_dtype,
                                 0,
                                 config.rotated};
      moe_.backend().finish(&finish);
    };
    run_section(moe_.context_->pool, label, units.data(), unit);
  }
  std::vector<const float *> parts;
  for (const Run::Shard &part : run.shards) {
    if (part.partial != nullptr) parts.push_back(part.partial);
  }
  if (parts.empty()) return;
  run_spread(moe_.context_->pool, {Stage::grad_merge, config.layer_index},
             divide_up(run.tokens, kTokensOfUnit), 0, [&](int64_t which) {
               const int64_t first = which * kTokensOfUnit;
               const FinishArgs finish = {parts.data(),
                                          static_cast<int32_t>(parts.size()),
                                          padded,
                                          static_cast<int32_t>(first),
                                          static_cast<int32_t>(std::min(first + kTokensOfUnit, run.tokens)),
                                          0,
                                          config.hidden_size,
                                          hidden,
                                          run.args->grad_input,
                                          run.args->grad_input_dtype,
                                          0,
                                          config.rotated};
               moe_.backend().finish(&finish);
             });
}

}  // namespace ktk
