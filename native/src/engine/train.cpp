#include "engine/train.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "core/status.h"
#include "engine/sections.h"

namespace ktk {
namespace {

constexpr int32_t kMostRank = 256;
constexpr int32_t kChunkRows = 32;      // rows of one unit of the adapters' small products
constexpr int32_t kBlockTokens = 1024;  // rows along K of one operand of a gradient
constexpr int32_t kGradColumns = 64;    // columns of one unit of a gradient
constexpr int64_t kTokensOfUnit = 8;
constexpr int64_t kTileBytes = 1024;
constexpr int32_t kPanelsOfCall = 16;  // of one call of the product kernel

constexpr const char *kTensorNames[] = {"gate_lora_a", "gate_lora_b", "up_lora_a",
                                        "up_lora_b",   "down_lora_a", "down_lora_b"};

int64_t dtype_bytes(int32_t dtype) { return dtype == KTK_DTYPE_F32 ? 4 : 2; }

// The same as in kernels/train.h, which mixes in the row.
uint64_t mix64(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

int32_t rows_of_chunk(int32_t rows, int32_t first, int32_t size) { return std::min(rows - first, size); }

Source matrix(const void *values, int32_t dtype, int64_t columns, int64_t stride) {
  Source source{};
  source.values = values;
  source.dtype = dtype;
  source.columns = static_cast<int32_t>(columns);
  source.stride = stride;
  return source;
}

Source operand(const uint8_t *values, const Gemm &gemm, int32_t rows) {
  Source source{};
  source.values = values;
  source.dtype = KTK_DTYPE_BF16;
  source.columns = gemm.depth;
  source.operand = &gemm;
  source.operand_rows = rows;
  return source;
}

enum Projection : int { kGate, kUp, kDown };

}  // namespace

void TrainingState::release() {
  phase = Phase::used;
  kept_input = NodeBuffer();
  gate_up.clear();
  route = Route();
  input = nullptr;
}

struct Training::Run {
  TrainingState &state;
  const Route &route;
  Moe::Batch batch;
  const ktk_backward_args *args = nullptr;  // null: a forward
  TrainingBatch extra{};

  int64_t tokens = 0, rows = 0;
  bool adapted = false, dropout = false;
  bool packs_forward = false;  // the adapters' operands of the forward are needed

  int32_t rank = 0, even_rank = 0;
  int32_t stacked_panels = 0, rank_panels = 0;  // of gate's and up's ranks side by side, and of one rank
  Gemm hidden{};
  struct Chunk {
    int32_t expert, first, rows;  // expert: index in the route
  };
  std::vector<Chunk> chunks{};     // of kChunkRows
  std::vector<Chunk> blocks{};     // of kBlockTokens
  std::vector<int64_t> k_steps{};  // steps of 32 rows before each expert's, and in all
  int32_t unit_columns = 0;        // of grad_down
  int32_t token_columns = 0;       // of grad_gate_up

  // All on the first node.
  uint8_t *gate_up_a = nullptr;     // tiles, by expert
  float *gate_up_middle = nullptr;  // [rows][stacked_panels * 16]: tokens through A
  float *down_middle = nullptr;     // [rows][rank_panels * 16]
  uint8_t *grad_rows = nullptr;     // operand: dO by expert, times the scales of down's rows
  uint8_t *down_b_back = nullptr;
  float *grad_down_middle = nullptr;
  uint8_t *grad_down_input = nullptr;
  float *grad_gate_up_middle = nullptr;
  uint8_t *grad_gate_up_input[2] = {};  // with dropout gate and up apart
  uint8_t *gate_up_a_back = nullptr;
  struct Factor {  // transposed: [rank][rows of the expert], by blocks of kBlockTokens
    const float *values;
    int32_t stride, first, columns;
    bool weighted;
    uint8_t *operand;
  };
  enum FactorIndex { kGateMiddle, kUpMiddle, kDownMiddle, kGradGateUp, kGradDown, kFactors };
  Factor factors[kFactors] = {};
  float *ones = nullptr;
  float *bias_products = nullptr;  // [rows]: dO times the bias of down
  float *select[2] = {};           // [2 * even_rank]: 1 for the ranks of gate, of up

  struct Shard {
    uint8_t *down_a = nullptr;
    uint8_t *down_a_back = nullptr;
    uint8_t *gate_up_b_back = nullptr;
    Gemm gate_up_gemm{};  // K: 32 columns of gate and 32 of up by turns
    Gemm z_gemm{};
    uint16_t *saved = nullptr;
    uint8_t *gate_up = nullptr, *plain = nullptr, *z = nullptr;  // operands
    float *products = nullptr;                                   // [units][rows]
    float *down_middle = nullptr, *grad_gate_up_middle = nullptr;
    float *partial = nullptr;  // [tokens][H]
    uint8_t *scratch = nullptr;
    int64_t units = 0;               // of grad_down, an expert
    uint8_t *base_factor = nullptr;  // transposed gradients of gate and up, then weighted intermediate
  };
  std::vector<Shard> shards{};

  // A worker's scratch.
  int64_t tile_bytes = 0, operand_bytes = 0, out_floats = 0, sum_floats = 0, scratch_bytes = 0;
  struct Worker {
    float *product;
    uint8_t *tiles;
    uint8_t *operand;
    float *out, *out2;
    float *sum;
  };
  Worker worker(int shard, int index) const {
    uint8_t *at = shards[static_cast<size_t>(shard)].scratch + index * scratch_bytes;
    Worker w{};
    const auto take = [&](int64_t bytes) {
      uint8_t *piece = at;
      at += align_up(bytes, 64);
      return piece;
    };
    w.product = reinterpret_cast<float *>(take(int64_t{kScratchFloats} * 4));
    w.tiles = take(tile_bytes);
    w.operand = take(operand_bytes);
    w.out = reinterpret_cast<float *>(take(out_floats * 4));
    w.out2 = reinterpret_cast<float *>(take(out_floats * 4));
    w.sum = reinterpret_cast<float *>(take(sum_floats * 4));
    return w;
  }

  const Route::Expert &expert(int32_t index) const { return route.experts[static_cast<size_t>(index)]; }
  int64_t stacked_stride() const { return int64_t{stacked_panels} * kPanelColumns; }
  int64_t rank_stride() const { return int64_t{rank_panels} * kPanelColumns; }
  int64_t experts() const { return static_cast<int64_t>(route.experts.size()); }
  Dropout dropped(double share, int32_t expert_id, Projection projection) const {
    if (!dropout) return {0, 0, 1.0f};
    const auto seed = static_cast<uint64_t>(state.config.seed);
    const uint64_t key = mix64(
        seed ^ mix64(uint64_t{static_cast<uint32_t>(expert_id)} * 3 + static_cast<uint64_t>(projection)));
    return {key, static_cast<int32_t>(std::lround(share * (1 << 24))),
            static_cast<float>(1.0 / (1.0 - share))};
  }
  // The intermediate of a chunk with what the adapter's input drops; `first_column` is the shard's.
  Source dropped_intermediate(double share, int shard, int32_t first_column, const Chunk &chunk,
                              const uint8_t *z) const {
    const Route::Expert &owner = expert(chunk.expert);
    Source source = operand(z, shards[static_cast<size_t>(shard)].z_gemm, owner.rows);
    source.first_row = chunk.first;
    source.dropout_rows = route.tokens.data() + owner.first + chunk.first;
    source.dropout = dropped(share, owner.id, kDown);
    source.dropout_column = first_column;
    return source;
  }
  // Where a block's operand begins, in steps of 32 rows.
  int64_t block_offset(const Chunk &block) const {
    return k_steps[static_cast<size_t>(block.expert)] + block.first / 32;
  }
  template <typename Pack>
  void sum_gradient(const Backend &backend, const Worker &worker, int64_t index, const uint8_t *factor,
                    int32_t factor_rows, int32_t first_row, int32_t last_row, int32_t columns,
                    const Pack &pack) const;
};

// One run of columns of a gradient into worker.out: rows [first_row, last_row) of a transposed factor times
// what pack(first, rows, steps) makes tiles of, summed over the rows of the expert.
template <typename Pack>
void Training::Run::sum_gradient(const Backend &backend, const Worker &worker, int64_t index,
                                 const uint8_t *factor, int32_t factor_rows, int32_t first_row,
                                 int32_t last_row, int32_t columns, const Pack &pack) const {
  const int32_t expert_rows = expert(static_cast<int32_t>(index)).rows;
  const auto panels = static_cast<int32_t>(divide_up(columns, kPanelColumns));
  for (int32_t first = 0; first < expert_rows; first += kBlockTokens) {
    const int32_t rows = rows_of_chunk(expert_rows, first, kBlockTokens);
    const Gemm gemm = make_gemm(backend.formats[KTK_FORMAT_BF16], rows, 0, false, 0);
    if (rows % 32 != 0) {
      for (int64_t panel = 1; panel <= panels; panel++)
        std::memset(worker.tiles + (panel * gemm.steps - 1) * kTileBytes, 0, kTileBytes);
    }
    pack(first, rows, gemm.steps);
    const int64_t offset = block_offset({static_cast<int32_t>(index), first, rows});
    const MultiplyArgs multiply = {
        &gemm,         const_cast<uint8_t *>(factor) + offset * factor_rows * kStepBytes,
        factor_rows,   first_row,
        last_row,      worker.tiles,
        panels,        nullptr,
        first > 0,     1,
        worker.out,    kGradColumns,
        worker.product};
    backend.train.multiply(&multiply);
  }
}

namespace {

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

// Values [first, first + count) of all parts, in their order, into `sum`.
void add_parts(const std::vector<float *> &parts, int64_t first, int64_t count, float *sum) {
  if (parts.empty()) return;
  std::memcpy(sum + first, parts[0] + first, static_cast<size_t>(count) * sizeof(float));
  for (size_t p = 1; p < parts.size(); p++) {
    for (int64_t i = first; i < first + count; i++) sum[i] += parts[p][i];
  }
}

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

// Runs unit(subpool, worker, index) for index in 0 .. units - 1, dealt over the subpools by their threads.
template <typename Unit>
void spread(WorkerPool &pool, const SpanLabel &label, int64_t units, const Unit &unit) {
  if (units == 0) return;
  std::vector<int64_t> counts, first;
  int64_t done = 0, threads = 0;
  for (int subpool = 0; subpool < pool.subpools(); subpool++) {
    threads += pool.threads(subpool);
    const int64_t next = units * threads / pool.thread_count();
    first.push_back(done);
    counts.push_back(next - done);
    done = next;
  }
  const auto shifted = [&](int subpool, int worker, int64_t index) {
    unit(subpool, worker, first[static_cast<size_t>(subpool)] + index);
  };
  run_section(pool, label, counts.data(), shifted);
}

}  // namespace

Training::Training(const ktk_sft_config &config, const Moe &moe) : config_(config), moe_(moe) {
  const int32_t layer = moe.config().layer_index;
  require(config.lora_rank >= 0 && config.lora_rank <= kMostRank, "layer ", layer, ": lora_rank ",
          config.lora_rank, " is not in 0 to ", kMostRank);
  require(std::isfinite(config.lora_scale), "layer ", layer, ": lora_scale must be finite, got ",
          config.lora_scale);
  require(config.lora_dropout >= 0.0f && config.lora_dropout < 1.0f, "layer ", layer,
          ": lora_dropout must be at least 0 and below 1, got ", config.lora_dropout);
}

void Training::set_lora(const ktk_lora_tensors &tensors) {
  const int32_t layer = moe_.config().layer_index;
  require(config_.lora_rank > 0, "layer ", layer, ": adapters were given, but lora_rank is 0");
  require(tensors.dtype == KTK_DTYPE_F32 || tensors.dtype == KTK_DTYPE_BF16, "layer ", layer,
          ": adapters of dtype ", tensors.dtype, " are not supported; use 0 (fp32) or 1 (bf16)");
  const void *pointers[] = {tensors.gate_a, tensors.gate_b, tensors.up_a,
                            tensors.up_b,   tensors.down_a, tensors.down_b};
  for (int i = 0; i < 6; i++) {
    require(pointers[i] != nullptr, "layer ", layer, ": ", kTensorNames[i], " is null");
    require(
        reinterpret_cast<uintptr_t>(pointers[i]) % static_cast<uintptr_t>(dtype_bytes(tensors.dtype)) == 0,
        "layer ", layer, ": ", kTensorNames[i], " is not aligned to its ", dtype_bytes(tensors.dtype),
        "-byte values");
  }
  const std::lock_guard<std::mutex> lock(moe_.context_->pool.forward_mutex());
  lora_ = tensors;
}

void Training::check(const ktk_forward_args &args) const {
  moe_.check(args);
  require(args.input_dtype != KTK_DTYPE_F16, "layer ", moe_.config().layer_index,
          ": inputs of dtype fp16 cannot be trained on; use fp32 or bf16");
}

void Training::check(const ktk_backward_args &args) const {
  const int32_t layer = moe_.config().layer_index;
  const auto pointer = [layer](const void *address, int64_t alignment, const char *name) {
    require(reinterpret_cast<uintptr_t>(address) % static_cast<uintptr_t>(alignment) == 0, "layer ", layer,
            ": ", name, " is not aligned to its ", alignment, "-byte values");
  };
  for (const int32_t dtype : {args.grad_output_dtype, args.grad_input_dtype}) {
    require(dtype >= KTK_DTYPE_F32 && dtype <= KTK_DTYPE_F16, "layer ", layer, ": dtype ", dtype,
            " is unknown; use 0 (fp32), 1 (bf16) or 2 (fp16)");
  }
  require(args.grad_output != nullptr, "layer ", layer, ": grad_output is null");
  pointer(args.grad_output, dtype_bytes(args.grad_output_dtype), "grad_output");
  pointer(args.grad_input, dtype_bytes(args.grad_input_dtype), "grad_input");
  pointer(args.grad_expert_weights, 4, "grad_expert_weights");
  const void *lora[] = {args.gate_a, args.gate_b, args.up_a, args.up_b, args.down_a, args.down_b};
  for (int i = 0; i < 6; i++) {
    if (lora[i] == nullptr) continue;
    require(adapted(), "layer ", layer, ": a gradient of ", kTensorNames[i],
            " was asked for, but the layer trains no adapters (lora_rank ", config_.lora_rank, ", skip_lora ",
            config_.skip_lora, ")");
    require(args.lora_dtype == KTK_DTYPE_F32 || args.lora_dtype == KTK_DTYPE_BF16, "layer ", layer,
            ": adapter gradients of dtype ", args.lora_dtype, " are not supported; use 0 (fp32) or 1 (bf16)");
    pointer(lora[i], dtype_bytes(args.lora_dtype), kTensorNames[i]);
  }
  for (const void *base : {args.gate, args.up, args.down}) {
    if (base == nullptr) continue;
    require(moe_.config().format == KTK_FORMAT_BF16, "layer ", layer,
            ": gradients of the base weights need format bf16; quantised weights cannot be trained");
    require(args.base_dtype == KTK_DTYPE_F32 || args.base_dtype == KTK_DTYPE_BF16, "layer ", layer,
            ": gradients of the base weights of dtype ", args.base_dtype,
            " are not supported; use 0 (fp32) or 1 (bf16)");
    pointer(base, dtype_bytes(args.base_dtype), "a gradient of the base weights");
  }
}

void Training::require_adapters() const {
  if (adapted() && lora_.gate_a == nullptr) {
    fail(KTK_ERR_STATE, "layer ", moe_.config().layer_index,
         ": the adapters are not set; call set_lora before the first forward");
  }
}

// The sizes of everything in a run.
void Training::start(Run &run) const {
  const ExpertStore &store = moe_.store();
  const ktk_moe_config &config = moe_.config();
  const FormatKernels &bf16 = moe_.backend().formats[KTK_FORMAT_BF16];
  const auto gemm = [&](int64_t depth) { return make_gemm(bf16, static_cast<int32_t>(depth), 0, false, 0); };
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
  const bool tiles = moe_.kernels_.tile_rows > 0;
  run.unit_columns = tiles ? 256 : 64;
  run.token_columns = tiles ? 128 : 64;

  const auto count = static_cast<size_t>(store.shard_count());
  run.shards.resize(count);
  run.extra.shards.resize(count);
  const int64_t hidden_steps = run.hidden.steps;
  int64_t z_steps = 0, gate_up_steps = 0;
  for (size_t s = 0; s < count; s++) {
    const ExpertStore::Shard &shard = store.shard(static_cast<int>(s));
    if (shard.empty()) continue;
    Run::Shard &part = run.shards[s];
    part.z_gemm = gemm(shard.columns());
    part.gate_up_gemm = gemm(int64_t{part.z_gemm.steps} * 64);
    part.units = divide_up(shard.columns(), run.unit_columns);
    run.extra.shards[s].z_gemm = part.z_gemm;
    z_steps = std::max<int64_t>(z_steps, part.z_gemm.steps);
    gate_up_steps = std::max<int64_t>(gate_up_steps, part.gate_up_gemm.steps);
  }
  run.operand_bytes = kChunkRows * std::max(hidden_steps, z_steps) * kStepBytes;
  const int64_t middle = kChunkRows * run.stacked_stride();
  if (run.args == nullptr) {
    run.out_floats = run.dropout ? middle : 0;
  } else {
    run.tile_bytes = std::max({run.unit_columns / kPanelColumns * hidden_steps,
                               run.token_columns / kPanelColumns * gate_up_steps,
                               int64_t{kGradColumns / kPanelColumns} * (kBlockTokens / 32)}) *
                     kTileBytes;
    run.out_floats =
        std::max<int64_t>(int64_t{kPassRows} * std::max(run.unit_columns, run.token_columns), middle);
    run.sum_floats = run.tokens * run.token_columns;
  }
  run.scratch_bytes = align_up(int64_t{kScratchFloats} * 4, 64) + align_up(run.tile_bytes, 64) +
                      align_up(run.operand_bytes, 64) + 2 * align_up(run.out_floats * 4, 64) +
                      align_up(run.sum_floats * 4, 64);
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
    return arena.place<uint8_t>(rows * gemm.steps * kStepBytes);
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
    run.gate_up_a_back = tiles_of(shared, hidden_panels * run.extra.gate_up_rank.steps * kTileBytes);
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
        if (store.shard_count() > 1) {
          part.partial = arena.place<float>(run.tokens * hidden_panels * kPanelColumns);
        }
        if (run.adapted) {
          part.down_a_back = tiles_of(arena, shard.panels * run.extra.down_rank.steps * kTileBytes);
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

// The adapters as tiles, of the forward's products and, with `backward`, of the way back too.
void Training::pack_adapters(Run &run, bool backward) const {
  if (!run.adapted) return;
  const ktk_moe_config &config = moe_.config();
  const TrainKernels &kernels = moe_.backend().train;
  const int64_t width = dtype_bytes(lora_.dtype), rank = run.rank;
  const int64_t hidden = config.hidden_size, intermediate = config.intermediate_size;
  const int64_t hidden_steps = run.hidden.steps, hidden_panels = divide_up(hidden, kPanelColumns);
  const int64_t stacked_steps = run.extra.gate_up_rank.steps, rank_steps = run.extra.down_rank.steps;

  // The first tensor found not finite: its index among the names, times experts, plus the expert, plus 1.
  std::atomic<int64_t> broken{0};
  const auto report = [&](int tensor, int32_t expert_id, int32_t failed) {
    if (failed != 0)
      broken.store(int64_t{tensor} * config.num_experts + expert_id + 1, std::memory_order_relaxed);
  };
  const auto tensor = [&](const void *base, int64_t expert_id, int64_t rows, int64_t columns,
                          int64_t first_row, int64_t first_column, int64_t count) {
    const auto *values = static_cast<const uint8_t *>(base) +
                         ((expert_id * rows + first_row) * columns + first_column) * width;
    return matrix(values, lora_.dtype, count, columns);
  };
  const auto as_tiles = [&](const Source &source, int64_t rows, int64_t to_column, int64_t to_depth,
                            int64_t steps, int64_t panel_stride, int64_t step_stride, uint8_t *to) {
    const PackTilesArgs args = {source,
                                static_cast<int32_t>(rows),
                                static_cast<int32_t>(to_column),
                                static_cast<int32_t>(to_depth),
                                static_cast<int32_t>(steps),
                                panel_stride,
                                step_stride,
                                to};
    return kernels.pack_tiles(&args);
  };
  const auto as_pairs = [&](const Source &source, int64_t rows, int64_t to_column, int64_t to_depth,
                            int64_t first_column, int64_t columns, int64_t steps, uint8_t *to) {
    const PackPairsArgs args = {source,
                                0,
                                static_cast<int32_t>(rows),
                                static_cast<int32_t>(to_column),
                                static_cast<int32_t>(to_depth),
                                static_cast<int32_t>(first_column),
                                static_cast<int32_t>(columns),
                                static_cast<int32_t>(steps),
                                to};
    return kernels.pack_pairs(&args);
  };

  enum Kind { kGateUpA, kDownB, kDownBBack, kGateUpABack, kGateUpB, kDownA, kDownABack, kGateUpBBack };
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
    if (backward) {
      own.push_back({kDownBBack, e});
      own.push_back({kGateUpABack, e});
    }
    for (int s = 0; s < shards; s++) {
      if (moe_.store().shard(s).empty()) continue;
      std::vector<Job> &list = jobs[static_cast<size_t>(s)];
      list.push_back({kDownA, e});
      if (run.packs_forward) list.push_back({kGateUpB, e});
      if (backward) {
        list.push_back({kDownABack, e});
        list.push_back({kGateUpBBack, e});
      }
    }
  }
  std::vector<int64_t> units;
  for (const auto &list : jobs) units.push_back(static_cast<int64_t>(list.size()));
  const auto unit = [&](int s, int, int64_t index) {
    const Job job = jobs[static_cast<size_t>(s)][static_cast<size_t>(index)];
    const int32_t id = run.expert(job.expert).id;
    const ExpertStore::Shard &shard = moe_.store().shard(s);
    Run::Shard &part = run.shards[static_cast<size_t>(s)];
    TrainingBatch::Shard &extra = run.extra.shards[static_cast<size_t>(s)];
    const int64_t first = shard.range.first, columns = shard.columns();
    const auto cleared = [&](uint8_t *base, int64_t bytes) {
      uint8_t *to = base + job.expert * bytes;
      std::memset(to, 0, static_cast<size_t>(bytes));
      return to;
    };
    switch (job.kind) {
      case kGateUpA: {
        uint8_t *to = cleared(run.gate_up_a, run.stacked_panels * hidden_steps * kTileBytes);
        const int64_t panel = hidden_steps * kTileBytes;
        report(0, id,
               as_tiles(tensor(lora_.gate_a, id, rank, hidden, 0, 0, hidden), rank, 0, 0, hidden_steps, panel,
                        kTileBytes, to));
        report(2, id,
               as_tiles(tensor(lora_.up_a, id, rank, hidden, 0, 0, hidden), rank, run.even_rank, 0,
                        hidden_steps, panel, kTileBytes, to));
        return;
      }
      case kDownB: {
        uint8_t *to = cleared(run.extra.down_tiles, run.extra.down_tile_bytes);
        report(5, id,
               as_tiles(tensor(lora_.down_b, id, hidden, rank, 0, 0, rank), hidden, 0, 0, rank_steps,
                        rank_steps * kTileBytes, kTileBytes, to));
        return;
      }
      case kDownBBack: {
        uint8_t *to = cleared(run.down_b_back, run.rank_panels * hidden_steps * kTileBytes);
        report(5, id,
               as_pairs(tensor(lora_.down_b, id, hidden, rank, 0, 0, rank), hidden, 0, 0, 0, rank,
                        hidden_steps, to));
        return;
      }
      case kGateUpABack: {
        uint8_t *to = cleared(run.gate_up_a_back, hidden_panels * stacked_steps * kTileBytes);
        report(0, id,
               as_pairs(tensor(lora_.gate_a, id, rank, hidden, 0, 0, hidden), rank, 0, 0, 0, hidden,
                        stacked_steps, to));
        report(2, id,
               as_pairs(tensor(lora_.up_a, id, rank, hidden, 0, 0, hidden), rank, 0, run.even_rank, 0, hidden,
                        stacked_steps, to));
        return;
      }
      case kGateUpB: {
        uint8_t *to = cleared(extra.gate_up_tiles, extra.gate_up_tile_bytes);
        const int64_t panel = 2 * stacked_steps * kTileBytes;
        report(1, id,
               as_tiles(tensor(lora_.gate_b, id, intermediate, rank, first, 0, rank), columns, 0, 0,
                        stacked_steps, panel, 2 * kTileBytes, to));
        report(3, id,
               as_tiles(tensor(lora_.up_b, id, intermediate, rank, first, 0, rank), columns, 0, run.even_rank,
                        stacked_steps, panel, 2 * kTileBytes, to + kTileBytes));
        return;
      }
      case kDownA: {
        const int64_t steps = part.z_gemm.steps;
        uint8_t *to = cleared(part.down_a, run.rank_panels * steps * kTileBytes);
        report(4, id,
               as_tiles(tensor(lora_.down_a, id, rank, intermediate, 0, first, columns), rank, 0, 0, steps,
                        steps * kTileBytes, kTileBytes, to));
        return;
      }
      case kDownABack: {
        uint8_t *to = cleared(part.down_a_back, shard.panels * rank_steps * kTileBytes);
        report(4, id,
               as_pairs(tensor(lora_.down_a, id, rank, intermediate, 0, first, columns), rank, 0, 0, 0,
                        columns, rank_steps, to));
        return;
      }
      case kGateUpBBack: {
        const int64_t steps = part.gate_up_gemm.steps;
        uint8_t *to = cleared(part.gate_up_b_back, run.stacked_panels * steps * kTileBytes);
        for (int which = 0; which < 2; which++) {
          const void *b = which == 0 ? lora_.gate_b : lora_.up_b;
          for (int64_t row = 0; row < columns; row += 32) {
            // Rows 32 i .. of gate lie in step 2 i, those of up in step 2 i + 1.
            const int64_t count = std::min<int64_t>(32, columns - row);
            const Source source = tensor(b, id, intermediate, rank, first + row, 0, rank);
            report(1 + 2 * which, id,
                   as_pairs(source, count, which * run.even_rank, row * 2 + which * 32, 0, rank, steps, to));
          }
        }
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
          &run.hidden, worker.operand, chunk.rows, 0,      chunk.rows,    tiles, run.stacked_panels, nullptr,
          0,           config.strict,  out,        stride, worker.product};
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
    const LoadRowsArgs load = {matrix(middle, KTK_DTYPE_F32, gemm.depth, stride),
                               &gemm,
                               expert.rows,
                               chunk.first,
                               chunk.first + chunk.rows,
                               config_.lora_scale,
                               nullptr,
                               nullptr,
                               run.extra.gate_up_input + int64_t{expert.first} * gemm.steps * kStepBytes};
    kernels.load_rows(&load);
  };
  spread(moe_.context_->pool, {Stage::lora_input, config.layer_index},
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
  std::vector<int64_t> units;
  for (int s = 0; s < moe_.store().shard_count(); s++)
    units.push_back(moe_.store().shard(s).empty() ? 0 : chunks);
  const auto unit = [&](int s, int index, int64_t which) {
    const Run::Chunk chunk = run.chunks[static_cast<size_t>(which)];
    const Route::Expert &expert = run.expert(chunk.expert);
    const Run::Shard &part = run.shards[static_cast<size_t>(s)];
    const Run::Worker worker = run.worker(s, index);
    const int64_t z_bytes = int64_t{part.z_gemm.steps} * kStepBytes;
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
        worker.product};
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
    const LoadRowsArgs load = {matrix(run.down_middle + at, KTK_DTYPE_F32, gemm.depth, run.rank_stride()),
                               &gemm,
                               expert.rows,
                               chunk.first,
                               chunk.first + chunk.rows,
                               config_.lora_scale,
                               nullptr,
                               nullptr,
                               run.extra.down_input + int64_t{expert.first} * gemm.steps * kStepBytes};
    kernels.load_rows(&load);
  };
  run_spread(moe_.context_->pool, {Stage::lora_middle, config.layer_index}, chunks, 1, finish);
}

void Training::forward(TrainingState &state, const ktk_forward_args &args) const {
  check(args);
  const ktk_moe_config &config = moe_.config();
  if (state.phase != TrainingState::Phase::fresh) {
    fail(KTK_ERR_STATE, "layer ", config.layer_index, ": this context has had its forward; make a new one");
  }
  const int64_t tokens = *args.num_tokens;
  require(tokens >= 0 && tokens <= config.max_tokens, "layer ", config.layer_index, ": ", tokens,
          " tokens are not in 0 to the layer's max_tokens ", config.max_tokens);
  PoolContext &context = *moe_.context_;
  const std::lock_guard<std::mutex> lock(context.pool.forward_mutex());
  require_adapters();
  const SpanScope span(context.pool.own_lane(), {Stage::forward, config.layer_index}, tokens);
  state.tokens = static_cast<int32_t>(tokens);
  state.top_k = args.top_k;
  state.input = args.input;
  state.input_dtype = args.input_dtype;
  {
    const SpanScope routing(context.pool.submitter_lane(), {Stage::route, config.layer_index}, tokens);
    state.route.build(args.expert_ids, args.expert_weights, tokens, args.top_k, config.num_experts,
                      config.gpu_experts_mask);
  }
  moe_.require_loaded(state.route);
  const bool keeps = state.config.policy != KTK_POLICY_NONE;
  const auto done = [&] {
    state.phase = keeps ? TrainingState::Phase::ready : TrainingState::Phase::used;
    if (keeps) {
      const Route &route = state.route;
      state.table_bytes = route.experts.capacity() * sizeof(Route::Expert) +
                          (route.tokens.capacity() + route.slots.capacity()) * sizeof(int32_t) +
                          route.weights.capacity() * sizeof(float);
    } else {
      state.release();
    }
  };
  if (tokens == 0) return done();

  Run run{state, state.route, {args, tokens, state.route, context.scratch, {}, {}, {}, 0}};
  run.packs_forward = adapted();
  start(run);
  const bool saves = state.config.policy == KTK_POLICY_SAVE;
  if (saves) {
    for (int s = 0; s < moe_.store().shard_count(); s++) {
      const ExpertStore::Shard &shard = moe_.store().shard(s);
      const int64_t bytes = shard.empty() ? 0 : run.rows * 4 * shard.columns();
      state.gate_up.emplace_back(static_cast<size_t>(bytes), context.pool.node(s), true);
      state.activation_bytes += static_cast<size_t>(bytes);
      if (bytes > 0) {
        run.extra.shards[static_cast<size_t>(s)].saved =
            reinterpret_cast<uint16_t *>(state.gate_up.back().data());
      }
    }
    if (run.adapted || config.format == KTK_FORMAT_BF16) keep_input(run);
  }
  place(run, true);
  place(run, false);
  pack_adapters(run, false);
  moe_.prepare(run.batch);
  run.batch.training = &run.extra;
  moe_.quantise(run.batch);
  moe_.gather(run.batch);
  adapter_input(run);
  moe_.gate_up(run.batch);
  adapter_middle(run);
  moe_.down(run.batch);
  if (moe_.store().shard_count() > 1) moe_.merge(run.batch);
  done();
}

// The input in bf16, for the gradients of A and of the weights.
void Training::keep_input(Run &run) const {
  TrainingState &state = run.state;
  const int64_t hidden = moe_.config().hidden_size;
  const size_t bytes = static_cast<size_t>(run.tokens * hidden) * 2;
  state.kept_input = NodeBuffer(bytes, moe_.context_->pool.node(0), true);
  auto *kept = reinterpret_cast<uint16_t *>(state.kept_input.data());
  const TrainKernels &kernels = moe_.backend().train;
  const auto unit = [&](int64_t index) {
    const int64_t first = index * kTokensOfUnit;
    const auto rows = static_cast<int32_t>(std::min(kTokensOfUnit, run.tokens - first));
    if (state.input_dtype == KTK_DTYPE_BF16) {
      std::memcpy(kept + first * hidden, static_cast<const uint16_t *>(state.input) + first * hidden,
                  static_cast<size_t>(rows * hidden) * 2);
      return;
    }
    const StoreMatrixArgs store = {static_cast<const float *>(state.input) + first * hidden,
                                   hidden,
                                   rows,
                                   static_cast<int32_t>(hidden),
                                   kept + first * hidden,
                                   KTK_DTYPE_BF16,
                                   hidden,
                                   0,
                                   0};
    kernels.store_matrix(&store);
  };
  run_spread(moe_.context_->pool, {Stage::quantise, moe_.config().layer_index},
             divide_up(run.tokens, kTokensOfUnit), 1, unit);
  state.input = kept;
  state.input_dtype = KTK_DTYPE_BF16;
  state.activation_bytes += bytes;
}

// ---- backward -------------------------------------------------------------------------------------

void Training::poison(const TrainingState &state, const ktk_backward_args &args) const noexcept {
  if (args.grad_input != nullptr) {
    std::memset(args.grad_input, 0xff,
                static_cast<size_t>(int64_t{state.tokens} * moe_.config().hidden_size *
                                    dtype_bytes(args.grad_input_dtype)));
  }
  if (args.grad_expert_weights != nullptr) {
    std::memset(args.grad_expert_weights, 0xff,
                static_cast<size_t>(int64_t{state.tokens} * state.top_k) * sizeof(float));
  }
}

void Training::backward(TrainingState &state, const ktk_backward_args &args) const {
  check(args);
  const ktk_moe_config &config = moe_.config();
  const int32_t layer = config.layer_index;
  if (state.config.policy == KTK_POLICY_NONE) {
    fail(KTK_ERR_STATE, "layer ", layer,
         ": the context's policy is none, which keeps nothing for a backward");
  }
  if (state.phase == TrainingState::Phase::fresh)
    fail(KTK_ERR_STATE, "layer ", layer, ": the context has had no forward yet");
  if (state.phase == TrainingState::Phase::used) {
    fail(KTK_ERR_STATE, "layer ", layer, ": the context has had its backward; run the forward again");
  }
  PoolContext &context = *moe_.context_;
  const std::lock_guard<std::mutex> lock(context.pool.forward_mutex());
  require_adapters();
  const SpanScope span(context.pool.own_lane(), {Stage::backward, layer}, state.tokens);
  moe_.require_loaded(state.route);
  // From here on the context is spent, whatever happens.
  struct Release {
    TrainingState &state;
    ~Release() { state.release(); }
  } release_at_end{state};

  const bool again = state.config.policy == KTK_POLICY_RECOMPUTE;
  ktk_forward_args forward{};
  forward.top_k = state.top_k;
  forward.input = state.input;
  forward.input_dtype = state.input_dtype;
  Run run{state, state.route, {forward, state.tokens, state.route, context.scratch, {}, {}, {}, 0}, &args};
  run.packs_forward = adapted() && again;
  start(run);
  place(run, true);
  place(run, false);
  if (args.grad_expert_weights != nullptr) {
    std::memset(args.grad_expert_weights, 0,
                static_cast<size_t>(int64_t{state.tokens} * state.top_k) * sizeof(float));
  }
  pack_adapters(run, true);
  if (state.tokens > 0) {
    adapter_input(run);
    if (again) {
      moe_.prepare(run.batch);
      run.batch.training = &run.extra;
      moe_.quantise(run.batch);
      moe_.gather(run.batch);
      moe_.gate_up(run.batch);
    } else {
      for (size_t s = 0; s < run.shards.size(); s++) {
        if (state.gate_up[s].size() > 0)
          run.shards[s].saved = reinterpret_cast<uint16_t *>(state.gate_up[s].data());
      }
    }
    gather_grad(run);
    grad_adapter_input(run);
    grad_down(run);
    grad_expert_weights(run);
    adapter_middle(run);
    grad_adapter_middle(run);
    if (args.grad_input != nullptr) grad_gate_up(run);
    transpose_factors(run);
    grad_adapters(run);
    grad_base(run);
  }
  clear_idle(run);
}

namespace {

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
                               run.grad_rows + int64_t{expert.first} * run.hidden.steps * kStepBytes};
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
  spread(moe_.context_->pool, {Stage::grad_input, config.layer_index},
         static_cast<int64_t>(run.chunks.size()), unit);
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
    uint8_t *rows = run.grad_rows + int64_t{expert.first} * run.hidden.steps * kStepBytes;
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
        worker.product};
    multiply_panels(kernels, multiply);
    const Gemm &gemm = run.extra.down_rank;
    const LoadRowsArgs load = {matrix(middle, KTK_DTYPE_F32, gemm.depth, stride),
                               &gemm,
                               expert.rows,
                               chunk.first,
                               chunk.first + chunk.rows,
                               config_.lora_scale,
                               nullptr,
                               nullptr,
                               run.grad_down_input + int64_t{expert.first} * gemm.steps * kStepBytes};
    kernels.load_rows(&load);
  };
  spread(moe_.context_->pool, {Stage::grad_lora_input, config.layer_index},
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
                               weights.zero,
                               static_cast<int32_t>(divide_up(config.hidden_size, kPanelColumns)),
                               1,
                               column,
                               columns,
                               worker.tiles};
    moe_.kernels_.expand(&expand);
    const float *scale =
        row_scales(moe_.store(), moe_.kernels_, s, expert.id, KTK_PART_GATE_UP_SCALE, shard.gate_up);
    const int64_t stride = run.unit_columns;
    const int64_t gate_up_row = int64_t{part.gate_up_gemm.steps} * kStepBytes;
    LoraProduct lora{};
    const uint8_t *lora_tiles = nullptr;
    if (run.adapted) {
      const Gemm &rank = run.extra.down_rank;
      lora_tiles =
          part.down_a_back + (e * shard.panels + column / kPanelColumns) * int64_t{rank.steps} * kTileBytes;
      lora = {&rank, run.grad_down_input + int64_t{expert.first} * rank.steps * kStepBytes, lora_tiles};
    }
    for (int32_t first = 0; first < expert.rows; first += kPassRows) {
      const int32_t last = std::min(first + kPassRows, expert.rows);
      const MultiplyArgs multiply = {&run.hidden,
                                     run.grad_rows + int64_t{expert.first} * run.hidden.steps * kStepBytes,
                                     expert.rows,
                                     first,
                                     last,
                                     worker.tiles,
                                     panels,
                                     run.adapted && !run.dropout ? &lora : nullptr,
                                     0,
                                     config.strict,
                                     worker.out,
                                     stride,
                                     worker.product};
      kernels.multiply(&multiply);
      if (run.dropout) {
        const MultiplyArgs apart = {lora.gemm,   lora.rows, expert.rows,   first, last,
                                    lora_tiles,  panels,    nullptr,       0,     config.strict,
                                    worker.out2, stride,    worker.product};
        kernels.multiply(&apart);
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
                                    stride};
        kernels.add_dropped(&add);
      }
      const int64_t z_row = int64_t{part.z_gemm.steps} * kStepBytes;
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
  run_section(moe_.context_->pool, {Stage::grad_down, config.layer_index}, units.data(), unit);
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

// Gradients of gate and up through their B, and that as operands.
void Training::grad_adapter_middle(Run &run) const {
  if (!run.adapted) return;
  const ktk_moe_config &config = moe_.config();
  const TrainKernels &kernels = moe_.backend().train;
  const int64_t stride = run.stacked_stride();
  const auto chunks = static_cast<int64_t>(run.chunks.size());
  std::vector<int64_t> units;
  for (int s = 0; s < moe_.store().shard_count(); s++)
    units.push_back(moe_.store().shard(s).empty() ? 0 : chunks);
  const auto unit = [&](int s, int index, int64_t which) {
    const Run::Chunk chunk = run.chunks[static_cast<size_t>(which)];
    const Route::Expert &expert = run.expert(chunk.expert);
    const Run::Shard &part = run.shards[static_cast<size_t>(s)];
    const int64_t row_bytes = int64_t{part.gate_up_gemm.steps} * kStepBytes;
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
                                   run.worker(s, index).product};
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
      const LoadRowsArgs load = {
          matrix(run.grad_gate_up_middle + at, KTK_DTYPE_F32, gemm.depth, stride),
          &gemm,
          expert.rows,
          chunk.first,
          chunk.first + chunk.rows,
          config_.lora_scale,
          nullptr,
          run.dropout ? run.select[projection] : nullptr,
          run.grad_gate_up_input[projection] + int64_t{expert.first} * gemm.steps * kStepBytes};
      kernels.load_rows(&load);
    }
  };
  run_spread(moe_.context_->pool, {Stage::grad_lora_middle, config.layer_index}, chunks, 1, finish);
}

// Gradient of the input: for each run of columns all experts, summed by token in fp32.
void Training::grad_gate_up(Run &run) const {
  const double share = config_.lora_dropout;
  const ktk_moe_config &config = moe_.config();
  const TrainKernels &kernels = moe_.backend().train;
  const FormatKernels &bf16 = moe_.backend().formats[KTK_FORMAT_BF16];
  const int64_t hidden = config.hidden_size, padded = align_up(hidden, kPanelColumns);
  const int64_t hidden_panels = padded / kPanelColumns;
  const int64_t runs = divide_up(hidden, run.token_columns);
  std::vector<int64_t> units;
  for (int s = 0; s < moe_.store().shard_count(); s++)
    units.push_back(moe_.store().shard(s).empty() ? 0 : runs);
  const auto unit = [&](int s, int index, int64_t which) {
    const ExpertStore::Shard &shard = moe_.store().shard(s);
    const Run::Shard &part = run.shards[static_cast<size_t>(s)];
    const Run::Worker worker = run.worker(s, index);
    const auto column = static_cast<int32_t>(which * run.token_columns);
    const auto columns = static_cast<int32_t>(std::min<int64_t>(run.token_columns, hidden - column));
    const auto panels = static_cast<int32_t>(divide_up(columns, kPanelColumns));
    const int64_t width = int64_t{panels} * kPanelColumns;
    std::memset(worker.sum, 0, static_cast<size_t>(run.tokens * width) * sizeof(float));
    for (int64_t e = 0; e < run.experts(); e++) {
      const Route::Expert &expert = run.expert(static_cast<int32_t>(e));
      const Weights weights = weights_of(moe_.store(), s, expert.id, KTK_PART_GATE_UP_WEIGHT);
      const ExpandArgs expand = {
          &shard.gate_up, weights.tiles, weights.scale, weights.zero, static_cast<int32_t>(shard.panels), 2,
          column,         columns,       worker.tiles};
      moe_.kernels_.expand(&expand);
      const Gemm &rank = run.extra.gate_up_rank;
      LoraProduct lora{};
      const bool adapted = run.adapted && s == 0;
      if (adapted) {
        lora = {&rank, run.grad_gate_up_input[0] + int64_t{expert.first} * rank.steps * kStepBytes,
                run.gate_up_a_back + (e * hidden_panels + column / kPanelColumns) * rank.steps * kTileBytes};
      }
      const DownArgs down = {
          &part.gate_up_gemm,
          {worker.tiles, nullptr, nullptr},
          nullptr,
          {part.gate_up + int64_t{expert.first} * part.gate_up_gemm.steps * kStepBytes, nullptr, nullptr},
          run.route.tokens.data() + expert.first,
          run.ones + expert.first,
          expert.rows,
          config.hidden_size,
          0,
          panels,
          config.strict,
          worker.product,
          worker.sum,
          adapted && !run.dropout ? &lora : nullptr};
      bf16.down(&down);
      if (!adapted || !run.dropout) continue;
      for (const Projection projection : {kGate, kUp}) {
        uint8_t *rows = run.grad_gate_up_input[projection] + int64_t{expert.first} * rank.steps * kStepBytes;
        for (int32_t first = 0; first < expert.rows; first += kPassRows) {
          const int32_t last = std::min(first + kPassRows, expert.rows);
          const MultiplyArgs multiply = {&rank,      rows,   expert.rows,   first, last,
                                         lora.tiles, panels, nullptr,       0,     config.strict,
                                         worker.out, width,  worker.product};
          kernels.multiply(&multiply);
          const AddDroppedArgs add = {worker.out,
                                      width,
                                      first,
                                      last,
                                      column,
                                      static_cast<int32_t>(width),
                                      run.route.tokens.data() + expert.first,
                                      run.dropped(share, expert.id, projection),
                                      run.route.tokens.data() + expert.first,
                                      worker.sum,
                                      width};
          kernels.add_dropped(&add);
        }
      }
    }
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
                               0};
    moe_.backend().finish(&finish);
  };
  run_section(moe_.context_->pool, {Stage::grad_gate_up, config.layer_index}, units.data(), unit);
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
                                          0};
               moe_.backend().finish(&finish);
             });
}

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
    const Gemm gemm = make_gemm(bf16, block.rows, 0, false, 0);
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
  spread(moe_.context_->pool, {Stage::grad_lora, config.layer_index}, 2 * runs * run.experts(), shared);

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
      Source source =
          operand(part.z + int64_t{expert.first} * part.z_gemm.steps * kStepBytes, part.z_gemm, expert.rows);
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
    const Source source = operand(grads + int64_t{expert.first} * part.gate_up_gemm.steps * kStepBytes,
                                  part.gate_up_gemm, expert.rows);
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
    const int64_t pieces = divide_up(moe_.store().shard(s).columns(), kIntermediateGroup);
    units.push_back(pieces * 3 * blocks);
  }
  const auto transpose = [&](int s, int, int64_t index) {
    const ExpertStore::Shard &shard = moe_.store().shard(s);
    const Run::Shard &part = run.shards[static_cast<size_t>(s)];
    const int64_t pieces = divide_up(shard.columns(), kIntermediateGroup);
    const Run::Chunk block = run.blocks[static_cast<size_t>(index / (3 * pieces))];
    const auto which = static_cast<int>(index / pieces % 3);
    const int64_t column = index % pieces * kIntermediateGroup;
    const auto last = static_cast<int32_t>(std::min<int64_t>(column + kIntermediateGroup, shard.columns()));
    const Route::Expert &expert = run.expert(block.expert);
    const Gemm gemm = make_gemm(bf16, block.rows, 0, false, 0);
    uint8_t *to = factor_of(part, shard, which) + run.block_offset(block) * shard.columns() * kStepBytes;
    const Gemm &source_gemm = which == 2 ? part.z_gemm : part.gate_up_gemm;
    const uint8_t *values = which == 2 ? part.z : part.gate_up;
    const Source source =
        operand(values + int64_t{expert.first} * source_gemm.steps * kStepBytes, source_gemm, expert.rows);
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
  for (int64_t &count : units) count = 0;
  for (int s = 0; s < moe_.store().shard_count(); s++)
    units[static_cast<size_t>(s)] = moe_.store().shard(s).empty() ? 0 : 3 * runs * run.experts();
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
