// Fine-tuning through the C ABI, on every instruction set that runs here: small layers with tails, so that
// sanitizers see every kernel, and the guarantees that need no reference.
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "ktk.h"

namespace {

constexpr int32_t kExperts = 4, kTopK = 2, kHidden = 70, kIntermediate = 200, kTokens = 37, kRank = 5;

using Values = std::vector<float>;

void ok(ktk_status status) {
  if (status != KTK_OK) ktk_test::record_failure(__FILE__, __LINE__, ktk_last_error());
}

Values random_values(size_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(0.0f, 0.2f);
  Values values(count);
  for (float &value : values) value = normal(generator);
  return values;
}

struct Layer {
  Layer(std::vector<int32_t> threads, int32_t format, int32_t group_size, const char *isa) {
    const std::vector<int32_t> nodes(threads.size(), 0);
    ktk_pool_config config = {};
    config.struct_size = sizeof(config);
    config.subpool_count = static_cast<int32_t>(threads.size());
    config.subpool_numa_map = nodes.data();
    config.subpool_thread_count = threads.data();
    ok(ktk_pool_create(&config, &pool));
    ktk_moe_config moe_config = {};
    moe_config.struct_size = sizeof(moe_config);
    moe_config.num_experts = kExperts;
    moe_config.top_k = kTopK;
    moe_config.hidden_size = kHidden;
    moe_config.intermediate_size = kIntermediate;
    moe_config.max_tokens = kTokens;
    moe_config.format = format;
    moe_config.group_size = group_size;
    moe_config.swiglu_limit = 1.0f;
    moe_config.isa = isa;
    ok(ktk_moe_create(&moe_config, pool, &moe));
    const size_t size = size_t{kHidden} * kIntermediate;
    for (int32_t expert = 0; expert < kExperts; expert++) {
      const auto seed = static_cast<unsigned>(expert) * 3;
      const Values gate = random_values(size, seed), up = random_values(size, seed + 1),
                   down = random_values(size, seed + 2);
      ktk_expert_weights weights = {};
      weights.struct_size = sizeof(weights);
      weights.dtype = KTK_DTYPE_F32;
      weights.gate = gate.data();
      weights.up = up.data();
      weights.down = down.data();
      ok(ktk_moe_pack_expert(moe, expert, &weights));
    }
    ktk_sft_config sft_config = {};
    sft_config.struct_size = sizeof(sft_config);
    sft_config.lora_rank = kRank;
    sft_config.lora_scale = 2.0f;
    sft_config.lora_dropout = 0.25f;
    ok(ktk_sft_create(&sft_config, moe, &sft));
    for (size_t i = 0; i < adapters.size(); i++)
      adapters[i] = random_values(adapter_size(i), static_cast<unsigned>(100 + i));
    ktk_lora_tensors tensors = {};
    tensors.struct_size = sizeof(tensors);
    tensors.dtype = KTK_DTYPE_F32;
    tensors.gate_a = adapters[0].data();
    tensors.gate_b = adapters[1].data();
    tensors.up_a = adapters[2].data();
    tensors.up_b = adapters[3].data();
    tensors.down_a = adapters[4].data();
    tensors.down_b = adapters[5].data();
    ok(ktk_sft_set_lora(sft, &tensors));
  }
  ~Layer() {
    ok(ktk_sft_destroy(sft));
    ok(ktk_moe_destroy(moe));
    ok(ktk_pool_destroy(pool));
  }
  static size_t adapter_size(size_t index) {
    const int32_t columns = index == 1 || index == 3 || index == 4 ? kIntermediate : kHidden;
    return size_t{kExperts} * kRank * static_cast<size_t>(columns);
  }
  ktk_pool *pool = nullptr;
  ktk_moe *moe = nullptr;
  ktk_sft *sft = nullptr;
  std::array<Values, 6> adapters;
};

// One forward and its backward, with gradients of everything that the format has.
struct Step {
  Step(const Layer &layer, int32_t policy, bool base) {
    for (int32_t i = 0; i < kTokens * kTopK; i++) ids.push_back(i % kTopK == 0 ? 0 : i % (kExperts + 1));
    ktk_sft_context_config config = {};
    config.struct_size = sizeof(config);
    config.policy = policy;
    config.dropout = 1;
    config.seed = -5;
    ok(ktk_sft_context_create(layer.sft, &config, &context));
    forward.struct_size = sizeof(forward);
    forward.top_k = kTopK;
    forward.num_tokens = &tokens;
    forward.expert_ids = ids.data();
    forward.expert_weights = weights.data();
    forward.input = input.data();
    forward.output = output.data();
    for (size_t i = 0; i < lora.size(); i++) lora[i] = Values(Layer::adapter_size(i), NAN);
    backward.struct_size = sizeof(backward);
    backward.grad_output = grad.data();
    backward.grad_input = grad_input.data();
    backward.grad_expert_weights = grad_weights.data();
    backward.gate_a = lora[0].data();
    backward.gate_b = lora[1].data();
    backward.up_a = lora[2].data();
    backward.up_b = lora[3].data();
    backward.down_a = lora[4].data();
    backward.down_b = lora[5].data();
    if (!base) return;
    for (Values &values : weight_grads) values = Values(size_t{kExperts} * kHidden * kIntermediate, NAN);
    backward.gate = weight_grads[0].data();
    backward.up = weight_grads[1].data();
    backward.down = weight_grads[2].data();
  }
  Step(const Step &) = delete;
  Step &operator=(const Step &) = delete;
  ~Step() { ok(ktk_sft_context_destroy(context)); }

  void run() {
    ok(ktk_sft_forward(context, &forward));
    ok(ktk_sft_backward(context, &backward));
  }
  bool operator==(const Step &other) const {
    const auto same = [](const Values &a, const Values &b) {
      return a.size() == b.size() &&
             (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
    };
    bool all = same(output, other.output) && same(grad_input, other.grad_input) &&
               same(grad_weights, other.grad_weights);
    for (size_t i = 0; i < lora.size(); i++) all = all && same(lora[i], other.lora[i]);
    for (size_t i = 0; i < weight_grads.size(); i++)
      all = all && same(weight_grads[i], other.weight_grads[i]);
    return all;
  }
  bool finite() const {
    const auto all = [](const Values &values) {
      for (const float value : values) {
        if (!std::isfinite(value)) return false;
      }
      return true;
    };
    bool every = all(output) && all(grad_input) && all(grad_weights);
    for (const Values &values : lora) every = every && all(values);
    for (const Values &values : weight_grads) every = every && all(values);
    return every;
  }

  int32_t tokens = kTokens;
  std::vector<int64_t> ids;
  Values input = random_values(size_t{kTokens} * kHidden, 1),
         weights = random_values(size_t{kTokens} * kTopK, 2),
         grad = random_values(size_t{kTokens} * kHidden, 3);
  Values output = Values(size_t{kTokens} * kHidden, NAN), grad_input = output,
         grad_weights = Values(size_t{kTokens} * kTopK, NAN);
  std::array<Values, 6> lora;
  std::array<Values, 3> weight_grads;
  ktk_sft_context *context = nullptr;
  ktk_forward_args forward = {};
  ktk_backward_args backward = {};
};

struct Form {
  int32_t format, group_size;
};
constexpr Form kForms[] = {
    {KTK_FORMAT_BF16, 0}, {KTK_FORMAT_INT8, 0}, {KTK_FORMAT_INT4, 32}, {KTK_FORMAT_FP8, 128}};

TEST(every_kernel) {
  for (int32_t i = 0; i < ktk_isa_count(); i++) {
    const char *isa = ktk_isa_name(i);
    if (ktk_isa_check(isa) != KTK_OK) continue;
    for (const Form &form : kForms) {
      const bool base = form.format == KTK_FORMAT_BF16;
      const Layer layer({2}, form.format, form.group_size, isa);
      Step first(layer, KTK_POLICY_SAVE, base);
      first.run();
      CHECK(first.finite());
      Step again(layer, KTK_POLICY_RECOMPUTE, base);
      again.run();
      CHECK(first == again);
      const Layer split({1, 1}, form.format, form.group_size, isa);
      Step shards(split, KTK_POLICY_SAVE, base);
      shards.run();
      CHECK(shards.finite());
    }
  }
}

// Contexts of one layer on several threads at once.
TEST(contexts_on_several_threads) {
  const Layer layer({2}, KTK_FORMAT_BF16, 0, nullptr);
  Step expected(layer, KTK_POLICY_SAVE, true);
  expected.run();
  std::vector<std::thread> threads;
  std::array<bool, 4> same = {};
  for (size_t t = 0; t < same.size(); t++) {
    threads.emplace_back([&, t] {
      for (int repeat = 0; repeat < 3; repeat++) {
        Step step(layer, t % 2 == 0 ? KTK_POLICY_SAVE : KTK_POLICY_RECOMPUTE, true);
        step.run();
        same[t] = (repeat == 0 || same[t]) && step == expected;
      }
    });
  }
  for (std::thread &thread : threads) thread.join();
  for (const bool each : same) CHECK(each);
}

// A queue runs both halves in order; closing a context that waits there fails its backward and nothing else.
TEST(both_halves_on_a_queue) {
  const Layer layer({2}, KTK_FORMAT_INT8, 0, nullptr);
  Step expected(layer, KTK_POLICY_SAVE, false);
  expected.run();
  ktk_queue *queue = nullptr;
  ok(ktk_queue_create(layer.pool, &queue));
  {
    Step step(layer, KTK_POLICY_SAVE, false);
    ok(ktk_queue_submit_sft_forward(queue, step.context, &step.forward));
    ok(ktk_queue_submit_sft_backward(queue, step.context, &step.backward));
    ok(ktk_queue_sync(queue, 0));
    CHECK(step == expected);
    CHECK(ktk_sft_backward(step.context, &step.backward) == KTK_ERR_STATE);
    ok(ktk_queue_submit_sft_backward(queue, step.context, &step.backward));
    CHECK(ktk_queue_sync(queue, 0) == KTK_ERR_STATE);
    CHECK(std::isnan(step.grad_input[0]));
  }
  ok(ktk_queue_destroy(queue));
}

}  // namespace
