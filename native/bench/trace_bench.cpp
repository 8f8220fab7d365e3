// What a running trace costs a decode step: the forward of one token through one layer, in turns with and
// without a trace, through the C ABI.
//
//   trace_bench [--threads N] [--pairs N] [--json FILE]
//
// The layer is that of Qwen3-30B-A3B. Each step draws other experts, so that weights come from memory. A
// second, tiny layer shows the cost itself: it does not depend on the size of a layer.
#include <time.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <fstream>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "ktk.h"
#include "report.h"

using namespace ktk_bench;

namespace {

struct Shape {
  const char *name;
  int32_t experts, top_k, hidden, intermediate;
};
constexpr Shape kReal = {"Qwen3-30B-A3B", 128, 8, 2048, 768};
constexpr Shape kTiny = {"tiny", 16, 8, 64, 128};

struct Form {
  const char *name;
  int32_t format, group_size;
};
constexpr Form kForms[] = {
    {"bf16", KTK_FORMAT_BF16, 0}, {"int8", KTK_FORMAT_INT8, 0}, {"int4", KTK_FORMAT_INT4, 32}};

void ok(ktk_status status) {
  if (status != KTK_OK) throw std::runtime_error(ktk_last_error());
}

double now_us() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<double>(now.tv_sec) * 1e6 + static_cast<double>(now.tv_nsec) * 1e-3;
}

struct Pool {
  explicit Pool(int32_t threads) {
    ktk_pool_config config = {};
    config.struct_size = sizeof(config);
    config.subpool_count = 1;
    config.subpool_thread_count = &threads;
    config.bind_threads = 1;
    config.spin_ns = -1;
    ok(ktk_pool_create(&config, &handle));
  }
  ~Pool() { ktk_pool_destroy(handle); }
  ktk_pool *handle = nullptr;
};

class Layer {
 public:
  Layer(const Pool &pool, const Shape &shape, const Form &form)
      : shape_(shape),
        ids_(static_cast<size_t>(shape.top_k)),
        weights_(ids_.size(), 0.125f),
        input_(static_cast<size_t>(shape.hidden), 0.5f),
        output_(input_.size()) {
    ktk_moe_config config = {};
    config.struct_size = sizeof(config);
    config.num_experts = shape.experts;
    config.top_k = shape.top_k;
    config.hidden_size = shape.hidden;
    config.intermediate_size = shape.intermediate;
    config.max_tokens = 1;
    config.format = form.format;
    config.group_size = form.group_size;
    ok(ktk_moe_create(&config, pool.handle, &handle_));
    std::vector<float> values(static_cast<size_t>(shape.hidden) * static_cast<size_t>(shape.intermediate));
    for (float &value : values) value = static_cast<float>(random_() % 2001) * 1e-5f - 0.01f;
    for (int32_t expert = 0; expert < shape.experts; ++expert) {
      ktk_expert_weights weights = {};
      weights.struct_size = sizeof(weights);
      weights.dtype = KTK_DTYPE_F32;
      weights.gate = weights.up = weights.down = values.data();
      ok(ktk_moe_pack_expert(handle_, expert, &weights));
    }
  }
  ~Layer() { ktk_moe_destroy(handle_); }

  void step() {
    // Distinct experts: a random run of them.
    const auto first = static_cast<int64_t>(random_() % static_cast<unsigned>(shape_.experts));
    for (size_t i = 0; i < ids_.size(); ++i) ids_[i] = (first + static_cast<int64_t>(i)) % shape_.experts;
    ktk_forward_args args = {};
    args.struct_size = sizeof(args);
    args.top_k = shape_.top_k;
    args.num_tokens = &tokens_;
    args.expert_ids = ids_.data();
    args.expert_weights = weights_.data();
    args.input = input_.data();
    args.output = output_.data();
    args.input_dtype = args.output_dtype = KTK_DTYPE_F32;
    ok(ktk_moe_forward(handle_, &args));
  }
  double steps_us(int count) {
    const double begin = now_us();
    for (int i = 0; i < count; ++i) step();
    return (now_us() - begin) / count;
  }

 private:
  Shape shape_;
  int32_t tokens_ = 1;
  std::vector<int64_t> ids_;
  std::vector<float> weights_, input_, output_;
  std::minstd_rand random_{1};
  ktk_moe *handle_ = nullptr;
};

// Spans that one step leaves, counted in the trace's own output.
double traced_steps_us(Layer &layer, int count, double *spans_of_step) {
  ktk_trace *trace = nullptr;
  ok(ktk_trace_start(0, &trace));
  layer.step();  // makes the threads' rings
  const double us = layer.steps_us(count);
  ok(ktk_trace_stop(trace));
  if (*spans_of_step == 0) {
    size_t needed = 0;
    ktk_trace_json(trace, nullptr, 0, &needed);
    std::string json(needed, '\0');
    ok(ktk_trace_json(trace, json.data(), json.size(), &needed));
    for (size_t at = json.find("\"ph\":\"X\""); at != std::string::npos;
         at = json.find("\"ph\":\"X\"", at + 1))
      *spans_of_step += 1.0 / (count + 1);
  }
  ok(ktk_trace_destroy(trace));
  return us;
}

std::string compare(Layer &layer, const Shape &shape, const Form &form, int pairs, int steps) {
  std::vector<double> off, on, more;
  double spans = 0;
  layer.steps_us(steps);
  for (int pair = 0; pair < pairs; ++pair) {
    // The order changes, so that a drift does not count for one side.
    double without = 0, with = 0;
    if (pair % 2 == 0) without = layer.steps_us(steps);
    with = traced_steps_us(layer, steps, &spans);
    if (pair % 2 != 0) without = layer.steps_us(steps);
    off.push_back(without);
    on.push_back(with);
    more.push_back(100 * (with / without - 1));
  }
  std::printf("%s %s: %.2f us a step, traced %.2f us; median of pairs %+.2f %%; %.1f spans a step\n",
              shape.name, form.name, median(off), median(on), median(more), spans);
  return Json()
      .string("layer", shape.name)
      .string("format", form.name)
      .number("steps", steps)
      .raw("off_us", spread(off))
      .raw("on_us", spread(on))
      .raw("more_percent", spread(more))
      .number("spans", spans)
      .text();
}

int run(int count, char **arguments) {
  int threads = static_cast<int>(std::thread::hardware_concurrency()), pairs = 200;
  std::string path;
  for (int i = 1; i + 1 < count; i += 2) {
    const std::string name = arguments[i];
    if (name == "--threads")
      threads = std::atoi(arguments[i + 1]);
    else if (name == "--pairs")
      pairs = std::max(1, std::atoi(arguments[i + 1]));
    else if (name == "--json")
      path = arguments[i + 1];
    else
      throw std::runtime_error(name + " is no option; use --threads N, --pairs N and --json FILE");
  }
  if (count % 2 == 0) throw std::runtime_error("each option takes a value");
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  const std::string load = load_average();
  const Pool pool(threads);
  std::string rows;
  for (const Form &form : kForms) {
    Layer real(pool, kReal, form), tiny(pool, kTiny, form);
    for (const std::string &row :
         {compare(real, kReal, form, pairs, 10), compare(tiny, kTiny, form, pairs, 500)})
      rows += (rows.empty() ? "\n  " : ",\n  ") + row;
  }
  const std::string text =
      "{\"machine\": " + Json().string("cpu", cpu_model()).number("threads", threads).text() +
      ",\n \"pairs\": " + std::to_string(pairs) + ",\n \"steps\": [" + rows + "],\n \"load_average\": [" +
      load + ", " + load_average() + "]}\n";
  if (!path.empty() && !(std::ofstream(path) << text)) throw std::runtime_error("cannot write " + path);
  return 0;
}

}  // namespace

int main(int count, char **arguments) {
  try {
    return run(count, arguments);
  } catch (const std::exception &error) {
    std::fprintf(stderr, "trace_bench: %s\n", error.what());
    return 1;
  }
}
