// The whole library through its C ABI, on every instruction set that runs here: small layers with tails, so
// that sanitizers see every kernel, and the guarantees that need no reference.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "ktk.h"

namespace {

constexpr int32_t kExperts = 5, kTopK = 3, kHidden = 100, kIntermediate = 200, kMaxTokens = 64;

struct Form {
  int32_t format, group_size;
};
constexpr Form kForms[] = {{KTK_FORMAT_BF16, 0},  {KTK_FORMAT_INT8, 0},  {KTK_FORMAT_INT4, 0},
                           {KTK_FORMAT_INT4, 32}, {KTK_FORMAT_INT4, 64}, {KTK_FORMAT_INT4, 128},
                           {KTK_FORMAT_FP8, 128}};

void ok(ktk_status status) {
  if (status != KTK_OK) ktk_test::record_failure(__FILE__, __LINE__, ktk_last_error());
}

std::vector<float> random_values(size_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(0.0f, 0.1f);
  std::vector<float> values(count);
  for (float &value : values) value = normal(generator);
  return values;
}

struct Pool {
  explicit Pool(std::vector<int32_t> threads) {
    const std::vector<int32_t> nodes(threads.size(), 0);
    ktk_pool_config config = {};
    config.struct_size = sizeof(config);
    config.subpool_count = static_cast<int32_t>(threads.size());
    config.subpool_numa_map = nodes.data();
    config.subpool_thread_count = threads.data();
    config.spin_ns = 0;
    ok(ktk_pool_create(&config, &handle));
  }
  ~Pool() { ok(ktk_pool_destroy(handle)); }
  ktk_pool *handle = nullptr;
};

struct Layer {
  Layer(const Pool &pool, const Form &form, const char *isa) {
    ktk_moe_config config = {};
    config.struct_size = sizeof(config);
    config.num_experts = kExperts;
    config.top_k = kTopK;
    config.hidden_size = kHidden;
    config.intermediate_size = kIntermediate;
    config.max_tokens = kMaxTokens;
    config.format = form.format;
    config.group_size = form.group_size;
    config.strict = 1;
    config.isa = isa;
    ok(ktk_moe_create(&config, pool.handle, &handle));
    const size_t size = size_t{kHidden} * kIntermediate;
    for (int32_t expert = 0; expert < kExperts; expert++) {
      const auto seed = static_cast<unsigned>(expert) * 3;
      const auto gate = random_values(size, seed), up = random_values(size, seed + 1),
                 down = random_values(size, seed + 2), bias = random_values(kIntermediate, seed);
      ktk_expert_weights weights = {};
      weights.struct_size = sizeof(weights);
      weights.dtype = KTK_DTYPE_F32;
      weights.gate = gate.data();
      weights.up = up.data();
      weights.down = down.data();
      weights.gate_bias = bias.data();
      weights.down_bias = bias.data();
      ok(ktk_moe_pack_expert(handle, expert, &weights));
    }
  }
  ~Layer() { ok(ktk_moe_destroy(handle)); }
  ktk_moe *handle = nullptr;
};

struct Batch {
  explicit Batch(int32_t count)
      : tokens(count),
        input(random_values(static_cast<size_t>(count) * kHidden, 99)),
        weights(random_values(static_cast<size_t>(count) * kTopK, 98)),
        output(static_cast<size_t>(count) * kHidden, NAN) {
    // Most tokens share expert 0, so that experts have from one to many rows; one id is out of range.
    for (int32_t i = 0; i < count * kTopK; i++) ids.push_back(i % kTopK == 0 ? 0 : i % (kExperts + 1));
    args.struct_size = sizeof(args);
    args.top_k = kTopK;
    args.num_tokens = &tokens;
    args.expert_ids = ids.data();
    args.expert_weights = weights.data();
    args.input = input.data();
    args.output = output.data();
    args.input_dtype = KTK_DTYPE_F32;
    args.output_dtype = KTK_DTYPE_F32;
  }
  bool operator==(const Batch &other) const {
    return std::memcmp(output.data(), other.output.data(), output.size() * sizeof(float)) == 0;
  }
  int32_t tokens;
  std::vector<float> input, weights;
  std::vector<int64_t> ids;
  std::vector<float> output;
  ktk_forward_args args = {};
};

template <typename Body>
void for_each_isa(Body body) {
  for (int32_t i = 0; i < ktk_isa_count(); i++) {
    if (ktk_isa_check(ktk_isa_name(i)) == KTK_OK) body(ktk_isa_name(i));
  }
}

}  // namespace

TEST(threads_and_batches_change_no_bit) {
  const Pool one({1}), three({3});
  for_each_isa([&](const char *isa) {
    for (const Form &form : kForms) {
      const Layer layer(one, form, isa), again(three, form, isa);
      Batch whole(kMaxTokens), same(kMaxTokens), first(1);
      ok(ktk_moe_forward(layer.handle, &whole.args));
      ok(ktk_moe_forward(again.handle, &same.args));
      CHECK(whole == same);
      for (const float value : whole.output) CHECK(std::isfinite(value));
      // The first token alone draws the same random input and routing.
      first.input.assign(whole.input.begin(), whole.input.begin() + kHidden);
      first.weights.assign(whole.weights.begin(), whole.weights.begin() + kTopK);
      first.args.input = first.input.data();
      first.args.expert_weights = first.weights.data();
      ok(ktk_moe_forward(layer.handle, &first.args));
      CHECK_EQUAL(std::memcmp(first.output.data(), whole.output.data(), kHidden * sizeof(float)), 0);
    }
  });
}

TEST(shards_agree_up_to_rounding) {
  const Pool one({1}), two({1, 1}), three({1, 1, 1});
  for_each_isa([&](const char *isa) {
    for (const Form &form : kForms) {
      const Layer layer(one, form, isa);
      Batch expected(17);
      ok(ktk_moe_forward(layer.handle, &expected.args));
      for (const Pool *pool : {&two, &three}) {
        const Layer sharded(*pool, form, isa);
        Batch batch(17);
        ok(ktk_moe_forward(sharded.handle, &batch.args));
        for (size_t i = 0; i < batch.output.size(); i++) {
          CHECK(std::fabs(batch.output[i] - expected.output[i]) <= 1e-5f);
        }
      }
    }
  });
}

TEST(layers_of_one_pool_run_from_several_threads) {
  const Pool pool({2});
  const Layer layer(pool, kForms[1], nullptr), other(pool, kForms[3], nullptr);
  Batch expected(8), other_expected(8);
  ok(ktk_moe_forward(layer.handle, &expected.args));
  ok(ktk_moe_forward(other.handle, &other_expected.args));
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; t++) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 20; i++) {
        Batch batch(8);
        ok(ktk_moe_forward(t % 2 == 0 ? layer.handle : other.handle, &batch.args));
        CHECK(batch == (t % 2 == 0 ? expected : other_expected));
      }
    });
  }
  for (std::thread &thread : threads) thread.join();
}

TEST(queued_forwards_and_their_failures) {
  const Pool pool({2});
  const Layer layer(pool, kForms[1], nullptr);
  Batch expected(8), queued(8), broken(8);
  ok(ktk_moe_forward(layer.handle, &expected.args));
  ktk_queue *queue = nullptr;
  ok(ktk_queue_create(pool.handle, &queue));
  ok(ktk_queue_submit_forward(queue, layer.handle, &queued.args));
  ok(ktk_queue_sync(queue, 0));
  CHECK(queued == expected);
  broken.tokens = -1;
  ok(ktk_queue_submit_forward(queue, layer.handle, &broken.args));
  CHECK_EQUAL(static_cast<int>(ktk_queue_sync(queue, 0)), static_cast<int>(KTK_ERR_ARGUMENT));
  CHECK(std::string(ktk_last_error()).find("-1 tokens") != std::string::npos);
  ok(ktk_queue_sync(queue, 0));
  ok(ktk_queue_destroy(queue));
}

TEST(parts_travel_between_shardings) {
  const Pool one({1}), two({1, 1});
  for (const Form &form : kForms) {
    const Layer from(one, form, nullptr), to(two, form, nullptr);
    for (int32_t part = KTK_PART_GATE_UP_WEIGHT; part <= KTK_PART_DOWN_BIAS; part++) {
      size_t bytes = 0;
      ok(ktk_moe_part_bytes(from.handle, part, &bytes));
      std::vector<uint8_t> sent(bytes), back(bytes);
      ok(ktk_moe_export_part(from.handle, 2, part, sent.data(), bytes));
      ok(ktk_moe_import_part(to.handle, 2, part, sent.data(), bytes));
      ok(ktk_moe_export_part(to.handle, 2, part, back.data(), bytes));
      CHECK(sent == back);
    }
  }
}

TEST(nodes_that_nobody_names) {
  ktk_pool_config config = {};
  const int32_t threads[] = {1, 1};
  config.struct_size = sizeof(config);
  config.subpool_count = 1;
  config.subpool_thread_count = threads;
  ktk_pool *pool = nullptr;
  ok(ktk_pool_create(&config, &pool));
  ok(ktk_pool_destroy(pool));
}

// ThreadSanitizer refuses threads in the child of a process with threads.
#if !KTK_TEST_TSAN
struct Held {
  std::atomic<bool> running{false};
  std::atomic<bool> open{false};
  static int32_t wait(void *context) {
    auto &held = *static_cast<Held *>(context);
    held.running = true;
    while (!held.open) usleep(100);
    return 0;
  }
};

TEST(layers_with_forwards_pending_at_a_fork) {
  const Pool pool({2});
  auto layer = std::make_unique<Layer>(pool, kForms[1], nullptr);
  Batch expected(8), queued(8), inside(8);
  ok(ktk_moe_forward(layer->handle, &expected.args));
  ktk_queue *queue = nullptr;
  ok(ktk_queue_create(pool.handle, &queue));
  Held held;
  ok(ktk_queue_submit(queue, &Held::wait, &held));
  ok(ktk_queue_submit_forward(queue, layer->handle, &queued.args));
  while (!held.running) usleep(100);
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);
    const int before = ktk_test::failures();
    ok(ktk_queue_submit_forward(queue, layer->handle, &inside.args));
    ok(ktk_queue_sync(queue, 0));
    CHECK(inside == expected);
    // What waits in the parent is no reason to wait here.
    layer.reset();
    ok(ktk_queue_destroy(queue));
    _exit(ktk_test::failures() == before ? 0 : 1);
  }
  int status = -1;
  CHECK_EQUAL(waitpid(child, &status, 0), child);
  CHECK_EQUAL(status, 0);
  held.open = true;
  ok(ktk_queue_sync(queue, 0));
  CHECK(queued == expected);
  ok(ktk_queue_destroy(queue));
}

TEST(fork_inside_a_task_before_a_forward) {
  const Pool pool({1});
  auto layer = std::make_unique<Layer>(pool, kForms[1], nullptr);
  Batch expected(8), queued(8);
  ok(ktk_moe_forward(layer->handle, &expected.args));
  ktk_queue *queue = nullptr;
  ok(ktk_queue_create(pool.handle, &queue));
  // The queue's thread goes on in the child, as its only one, and meets the forward there too.
  struct Fork {
    std::atomic<pid_t> child{-1};
    Held gate;
    static int32_t run(void *context) {
      auto &self = *static_cast<Fork *>(context);
      Held::wait(&self.gate);
      const pid_t child = fork();
      if (child == 0) alarm(20);
      self.child = child;
      return 0;
    }
  } forking;
  ok(ktk_queue_submit(queue, &Fork::run, &forking));
  ok(ktk_queue_submit_forward(queue, layer->handle, &queued.args));
  const auto end = [](void *context) -> int32_t {
    const auto &self = *static_cast<Fork *>(context);
    if (self.child == 0) _exit(7);
    return 0;
  };
  ok(ktk_queue_submit(queue, end, &forking));
  forking.gate.open = true;
  ok(ktk_queue_sync(queue, 0));
  int status = -1;
  CHECK_EQUAL(waitpid(forking.child, &status, 0), forking.child.load());
  CHECK_EQUAL(WEXITSTATUS(status), 7);
  CHECK(queued == expected);
  layer.reset();
  ok(ktk_queue_destroy(queue));
}
#endif

TEST(probes_do_their_work_on_every_subpool) {
  const Pool pool({1, 2});
  for_each_isa([&](const char *isa) {
    for (int32_t kind = KTK_PROBE_PRODUCT; kind <= KTK_PROBE_COPY; kind++) {
      for (int32_t format = KTK_FORMAT_BF16; format <= (kind == KTK_PROBE_PRODUCT ? KTK_FORMAT_FP8 : 0);
           format++) {
        ktk_probe_config config = {};
        config.struct_size = sizeof(config);
        config.kind = kind;
        config.format = format;
        config.isa = isa;
        config.bytes = kind == KTK_PROBE_PRODUCT ? 0 : size_t{1} << 18;
        ktk_probe *probe = nullptr;
        ok(ktk_probe_create(&config, pool.handle, &probe));
        CHECK_EQUAL(static_cast<int>(ktk_pool_destroy(pool.handle)), static_cast<int>(KTK_ERR_STATE));
        const int64_t repeats = kind == KTK_PROBE_PRODUCT ? 8 : 1;
        int32_t count = 0;
        ok(ktk_probe_variants(probe, &count));
        CHECK(count > 0);
        for (int32_t variant = 0; variant < count; variant++) {
          const char *name = nullptr;
          double once = 0, twice = 0, seconds = 0;
          ok(ktk_probe_variant_name(probe, variant, &name));
          ok(ktk_probe_run(probe, variant, repeats, &once, &seconds));
          ok(ktk_probe_run(probe, variant, 2 * repeats, &twice, &seconds));
          CHECK(name != nullptr && once > 0 && seconds > 0);
          CHECK_EQUAL(twice, 2 * once);
        }
        double work = 0;
        CHECK_EQUAL(static_cast<int>(ktk_probe_run(probe, count, 1, &work, &work)),
                    static_cast<int>(KTK_ERR_ARGUMENT));
        CHECK_EQUAL(static_cast<int>(ktk_probe_run(probe, 0, 1, nullptr, &work)),
                    static_cast<int>(KTK_ERR_ARGUMENT));
        ok(ktk_probe_destroy(probe));
      }
    }
  });
}
