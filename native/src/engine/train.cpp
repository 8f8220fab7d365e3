#include "engine/finite.h"
#include "engine/train_run.h"

namespace ktk {
namespace {

constexpr int32_t kMostRank = 256;

}  // namespace

void TrainingState::release() {
  phase = Phase::used;
  kept_input = NodeBuffer();
  gate_up.clear();
  route = Route();
  input = nullptr;
}

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
  WorkerPool &pool = moe_.context_->pool;
  const std::lock_guard<std::mutex> lock(pool.forward_mutex());
  const int64_t rank = config_.lora_rank, hidden = moe_.config().hidden_size,
                intermediate = moe_.config().intermediate_size;
  const int64_t sizes[] = {rank * hidden,       intermediate * rank, rank * hidden,
                           intermediate * rank, rank * intermediate, hidden * rank};
  for (int i = 0; i < 6; i++) {
    const BrokenRows broken = broken_rows(pool, {Stage::lora_pack, layer}, pointers[i],
                                          moe_.config().num_experts, sizes[i], tensors.dtype);
    require(broken.count == 0, "layer ", layer, ": ", kTensorNames[i],
            " holds NaN or infinity, first in expert ", broken.first, "; the training has diverged");
  }
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
  moe_.merge(run.batch);
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
  const BrokenRows broken = broken_rows(context.pool, {Stage::grad_input, layer}, args.grad_output,
                                        state.tokens, config.hidden_size, args.grad_output_dtype);
  require(broken.count == 0, "the gradient that reaches the experts of layer ", layer,
          " holds NaN or infinity in ", broken.count, " of ", state.tokens,
          " tokens, the first of which is token ", broken.first,
          ": the loss, or a layer after this one, overflowed. Lower the learning rate, or clip gradients");
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

}  // namespace ktk
