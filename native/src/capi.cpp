// The C ABI: check the arguments' form, call the engine or the runtime, translate failures. No logic.
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "core/cpu.h"
#include "core/dispatch.h"
#include "core/status.h"
#include "engine/moe.h"
#include "engine/probe.h"
#include "engine/scratch.h"
#include "engine/train.h"
#include "ktk.h"
#include "runtime/cuda_shim.h"
#include "runtime/fork.h"
#include "runtime/task_queue.h"
#include "runtime/topology.h"
#include "runtime/trace.h"

struct ktk_pool {
  std::shared_ptr<ktk::PoolContext> context;
};

// Outlives ktk_moe_destroy where a captured CUDA graph may still name it, then without the layer.
struct MoeShell : private ktk::ForkListener {
  std::mutex mutex;
  std::condition_variable idle;
  int64_t pending = 0;
  std::unique_ptr<ktk::Moe> moe;

 private:
  // What was pending stays with the parent.
  void after_fork_in_child() noexcept override {
    new (&mutex) std::mutex();
    new (&idle) std::condition_variable();
    pending = 0;
  }
};

struct ktk_moe {
  std::shared_ptr<MoeShell> shell;
  ktk::Moe &operator*() const { return *shell->moe; }
  ktk::Moe *operator->() const { return shell->moe.get(); }
};

struct ktk_queue {
  std::shared_ptr<ktk::PoolContext> context;
  ktk::TaskQueue queue;
  explicit ktk_queue(std::shared_ptr<ktk::PoolContext> owner)
      : context(std::move(owner)), queue(context->pool) {}
};

// Adapters and a way back for a layer; contexts keep it beyond ktk_sft_destroy.
struct SftShell {
  std::shared_ptr<MoeShell> layer;
  ktk::Training training;
  std::atomic<bool> closed{false};
};

struct ktk_sft {
  std::shared_ptr<SftShell> shell;
};

// Kept by tasks that are pending.
struct SftContextShell {
  std::shared_ptr<SftShell> sft;
  ktk::TrainingState state;
  std::mutex mutex;  // held while its forward or backward runs
  std::atomic<bool> closed{false};
};

struct ktk_sft_context {
  std::shared_ptr<SftContextShell> shell;
};

struct ktk_trace {
  ktk::Trace trace;
  explicit ktk_trace(int64_t spans_per_thread) : trace(spans_per_thread) {}
};

struct ktk_probe {
  ktk::Probe probe;
};

namespace {

using ktk::fail;
using ktk::require;

template <typename Call>
ktk_status guard(Call call) noexcept {
  try {
    ktk::set_last_error("");
    call();
    return KTK_OK;
  } catch (...) {
    std::string message;
    const ktk_status status = ktk::current_exception_status(&message);
    ktk::set_last_error(message.c_str());
    return status;
  }
}

template <typename T>
T &at(T *pointer, const char *name) {
  require(pointer != nullptr, name, " is null");
  return *pointer;
}

// A copy of a struct that may come from a caller built against a newer header, as long as what this
// library does not know is zero.
template <typename T>
T read_struct(const T *caller, const char *name) {
  const uint32_t size = at(caller, name).struct_size;
  require(size >= sizeof(T), name, ".struct_size is ", size, ", expected at least ", sizeof(T),
          "; set it to sizeof(struct)");
  const auto *bytes = reinterpret_cast<const unsigned char *>(caller);
  require(std::all_of(bytes + sizeof(T), bytes + size, [](unsigned char byte) { return byte == 0; }), name,
          " sets fields that this library (ABI ", KTK_ABI_VERSION, ") does not know; update libktk");
  return *caller;
}

struct ForwardTask {
  std::shared_ptr<MoeShell> shell;
  ktk_forward_args args;
  bool captured;     // by a CUDA graph, which may replay it: pending only while it runs
  uint32_t process;  // in which it was submitted

  // Among the layer's pending tasks from submission on. After a fork inside a task, the queue's thread runs
  // tasks in the child that the child has not counted.
  bool counted() const { return !captured && process == ktk::process_number(); }
  static void enter(MoeShell &shell) {
    const std::lock_guard<std::mutex> lock(shell.mutex);
    if (shell.moe == nullptr)
      fail(KTK_ERR_STATE, "the layer is closed; a CUDA graph that captured it was replayed");
    shell.pending++;
  }
  static void leave(MoeShell &shell) {
    const std::lock_guard<std::mutex> lock(shell.mutex);
    if (--shell.pending == 0) shell.idle.notify_all();
  }

  static void run(void *context) {
    const auto &task = *static_cast<ForwardTask *>(context);
    const bool entering = !task.counted();
    if (entering) enter(*task.shell);
    struct Leave {
      MoeShell *shell;
      ~Leave() {
        if (shell != nullptr) leave(*shell);
      }
    } leave_at_end{entering ? task.shell.get() : nullptr};
    try {
      task.shell->moe->forward(task.args);
    } catch (...) {
      task.shell->moe->poison(task.args);
      throw;
    }
  }
  static void done(void *context) {
    const std::unique_ptr<ForwardTask> task(static_cast<ForwardTask *>(context));
    if (task->counted()) leave(*task->shell);
  }
};

template <typename Submit>
void submit_forward(ktk_moe *moe, const ktk_forward_args *args, bool captured, Submit submit) {
  const ktk_forward_args copy = read_struct(args, "args");
  at(moe, "moe")->check(copy);
  auto task = std::make_unique<ForwardTask>(ForwardTask{moe->shell, copy, captured, ktk::process_number()});
  if (!captured) ForwardTask::enter(*moe->shell);
  try {
    submit(ktk::Task{ForwardTask::run, ForwardTask::done, task.get()});
  } catch (...) {
    if (!captured) ForwardTask::leave(*moe->shell);
    throw;
  }
  task.release();
}

// The time in which a layer is used on behalf of a context: it cannot be destroyed meanwhile.
class LayerUse {
 public:
  explicit LayerUse(const SftContextShell &context) : layer_(*context.sft->layer) {
    if (context.sft->closed.load())
      fail(KTK_ERR_STATE, "the adapters of this context are closed; keep them open until its backward");
    const std::lock_guard<std::mutex> lock(layer_.mutex);
    if (layer_.moe == nullptr) fail(KTK_ERR_STATE, "the layer is closed; keep it open until its backward");
    layer_.pending++;
  }
  ~LayerUse() { ForwardTask::leave(layer_); }
  LayerUse(const LayerUse &) = delete;
  LayerUse &operator=(const LayerUse &) = delete;

 private:
  MoeShell &layer_;
};

void check_open(const SftContextShell &context) {
  if (context.closed.load()) fail(KTK_ERR_STATE, "the context is closed; make a new one");
}

// A forward or backward of a context, on a queue. What it names stays alive until it has run.
template <typename Args>
struct SftTask {
  std::shared_ptr<SftContextShell> context;
  Args args;
  LayerUse use;  // from submission on

  static void step(ktk::Training &training, ktk::TrainingState &state, const ktk_forward_args &args) {
    training.forward(state, args);
  }
  static void step(ktk::Training &training, ktk::TrainingState &state, const ktk_backward_args &args) {
    training.backward(state, args);
  }
  static void poison(const SftContextShell &context, const ktk_forward_args &args) {
    context.sft->layer->moe->poison(args);
  }
  static void poison(const SftContextShell &context, const ktk_backward_args &args) {
    context.sft->training.poison(context.state, args);
  }
  static void run(void *pointer) {
    const auto &task = *static_cast<SftTask *>(pointer);
    SftContextShell &context = *task.context;
    const std::lock_guard<std::mutex> lock(context.mutex);
    try {
      step(context.sft->training, context.state, task.args);
    } catch (...) {
      poison(context, task.args);
      throw;
    }
  }
  static void done(void *pointer) { delete static_cast<SftTask *>(pointer); }
};

template <typename Args>
void run_sft(ktk_sft_context *context, const Args *args) {
  const Args copy = read_struct(args, "args");
  SftContextShell &shell = *at(context, "context").shell;
  check_open(shell);
  const LayerUse use(shell);
  const std::lock_guard<std::mutex> lock(shell.mutex);
  SftTask<Args>::step(shell.sft->training, shell.state, copy);
}

template <typename Args>
void submit_sft(ktk_queue *queue, ktk_sft_context *context, const Args *args) {
  const Args copy = read_struct(args, "args");
  const std::shared_ptr<SftContextShell> &shell = at(context, "context").shell;
  check_open(*shell);
  std::unique_ptr<SftTask<Args>> task(new SftTask<Args>{shell, copy, LayerUse(*shell)});
  shell->sft->training.check(copy);
  at(queue, "queue").queue.submit({SftTask<Args>::run, SftTask<Args>::done, task.get()});
  task.release();
}

struct CallerTask {
  ktk_task_fn function;
  void *context;

  static void run(void *context) {
    const auto &task = *static_cast<CallerTask *>(context);
    const int32_t result = task.function(task.context);
    if (result != 0) fail(KTK_ERR_INTERNAL, "a submitted task returned ", result);
  }
  static void done(void *context) { delete static_cast<CallerTask *>(context); }
};

template <typename Submit>
void submit_function(ktk_task_fn function, void *context, Submit submit) {
  require(function != nullptr, "function is null");
  auto task = std::make_unique<CallerTask>(CallerTask{function, context});
  submit(ktk::Task{CallerTask::run, CallerTask::done, task.get(), true});
  task.release();
}

void copy_text(const std::string &text, char *buffer, size_t capacity, size_t *needed) {
  at(needed, "needed") = text.size() + 1;
  require(capacity > text.size(), "capacity is ", capacity, ", the text needs ", text.size() + 1);
  std::memcpy(&at(buffer, "buffer"), text.c_str(), text.size() + 1);
}

const ktk::FormatKernels &format_of(const ktk::Backend &backend, int32_t format) {
  require(ktk::is_format(format), "format ", format, " is unknown; use ", ktk::kFormatsText);
  return backend.formats[format];
}

// "vector_int8_avx2", "tile_bf16_amx": built once, since callers keep the pointer.
const char *kernel_name(const ktk::Backend &backend, int32_t format, bool tile) {
  static const std::vector<std::string> names = [] {
    std::vector<std::string> all;
    for (const ktk::Backend *each : ktk::backends()) {
      for (const ktk::FormatKernels &kernels : each->formats) {
        for (const char *kind : {"vector_", "tile_"})
          all.push_back(kind + std::string(kernels.name) + "_" + each->name);
      }
    }
    return all;
  }();
  const auto &backends = ktk::backends();
  const auto index =
      static_cast<size_t>(std::find(backends.begin(), backends.end(), &backend) - backends.begin());
  return names[(index * ktk::kFormats + static_cast<size_t>(format)) * 2 + (tile ? 1 : 0)].c_str();
}

}  // namespace

extern "C" {

const char *ktk_last_error(void) { return ktk::last_error(); }
const char *ktk_version(void) { return KTK_VERSION; }
int32_t ktk_abi_version(void) { return KTK_ABI_VERSION; }

int32_t ktk_isa_count(void) { return static_cast<int32_t>(ktk::backends().size()); }

const char *ktk_isa_name(int32_t index) {
  return index >= 0 && index < ktk_isa_count() ? ktk::backends()[static_cast<size_t>(index)]->name : nullptr;
}

ktk_status ktk_isa_check(const char *name) {
  return guard([&] { ktk::runnable_backend(&at(name, "name")); });
}

ktk_status ktk_isa_default(const char **name) {
  return guard([&] { at(name, "name") = ktk::default_backend().name; });
}

ktk_status ktk_isa_kernel(const char *isa, int32_t format, int32_t rows, const char **kernel) {
  return guard([&] {
    const ktk::Backend &backend = ktk::runnable_backend(isa);
    const int32_t tile_rows = format_of(backend, format).tile_rows;
    require(rows > 0, "rows must be positive, got ", rows);
    at(kernel, "kernel") = kernel_name(backend, format, tile_rows > 0 && rows >= tile_rows);
  });
}

ktk_status ktk_machine_json(char *buffer, size_t capacity, size_t *needed) {
  return guard([&] { copy_text(ktk::machine_json(), buffer, capacity, needed); });
}

ktk_status ktk_pool_create(const ktk_pool_config *config, ktk_pool **pool) {
  return guard([&] {
    const ktk_pool_config copy = read_struct(config, "config");
    require(copy.subpool_count > 0, "subpool_count must be positive, got ", copy.subpool_count);
    require(copy.subpool_thread_count != nullptr, "subpool_thread_count is null");
    const std::vector<int> nodes =
        copy.subpool_numa_map != nullptr
            ? std::vector<int>(copy.subpool_numa_map, copy.subpool_numa_map + copy.subpool_count)
            : ktk::Topology::read().first_nodes(copy.subpool_count);
    std::vector<ktk::SubpoolConfig> subpools;
    for (size_t i = 0; i < nodes.size(); i++) subpools.push_back({nodes[i], copy.subpool_thread_count[i]});
    auto context =
        std::make_shared<ktk::PoolContext>(std::move(subpools), copy.bind_threads != 0, copy.spin_ns);
    at(pool, "pool") = new ktk_pool{std::move(context)};
  });
}

ktk_status ktk_pool_destroy(ktk_pool *pool) {
  return guard([&] {
    if (at(pool, "pool").context.use_count() > 1) {
      fail(KTK_ERR_STATE, "layers, queues or probes still use the pool; destroy them first");
    }
    delete pool;
  });
}

ktk_status ktk_pool_threads(const ktk_pool *pool, int32_t *subpool_count, int32_t *thread_count) {
  return guard([&] {
    at(subpool_count, "subpool_count") = at(pool, "pool").context->pool.subpools();
    at(thread_count, "thread_count") = pool->context->pool.thread_count();
  });
}

const char *ktk_pool_warnings(const ktk_pool *pool) {
  return pool != nullptr ? pool->context->pool.warnings().c_str() : "";
}

ktk_status ktk_set_num_threads(int32_t num_threads) {
  return guard([&] { ktk::WorkerPool::limit_threads(num_threads); });
}

ktk_status ktk_get_num_threads(int32_t *num_threads) {
  return guard([&] { at(num_threads, "num_threads") = ktk::WorkerPool::most_threads(); });
}

ktk_status ktk_moe_create(const ktk_moe_config *config, ktk_pool *pool, ktk_moe **moe) {
  return guard([&] {
    const ktk_moe_config copy = read_struct(config, "config");
    auto shell = std::make_shared<MoeShell>();
    shell->moe = std::make_unique<ktk::Moe>(copy, at(pool, "pool").context);
    at(moe, "moe") = new ktk_moe{std::move(shell)};
  });
}

ktk_status ktk_moe_destroy(ktk_moe *moe) {
  return guard([&] {
    MoeShell &shell = *at(moe, "moe").shell;
    std::unique_ptr<ktk::Moe> layer;
    {
      std::unique_lock<std::mutex> lock(shell.mutex);
      shell.idle.wait(lock, [&] { return shell.pending == 0; });
      layer = std::move(shell.moe);
    }
    delete moe;
  });
}

ktk_status ktk_moe_pack_expert(ktk_moe *moe, int32_t expert, const ktk_expert_weights *weights) {
  return guard([&] { at(moe, "moe")->store().pack(expert, read_struct(weights, "weights")); });
}

ktk_status ktk_moe_part_bytes(const ktk_moe *moe, int32_t part, size_t *bytes) {
  return guard([&] {
    require(part >= KTK_PART_GATE_UP_WEIGHT && part <= KTK_PART_DOWN_BIAS, "part ", part,
            " does not exist; parts are 0 to ", int{KTK_PART_DOWN_BIAS});
    at(bytes, "bytes") = at(moe, "moe")->store().part_bytes(static_cast<ktk_part>(part));
  });
}

ktk_status ktk_moe_export_part(const ktk_moe *moe, int32_t expert, int32_t part, void *buffer, size_t bytes) {
  return guard(
      [&] { at(moe, "moe")->store().export_part(expert, static_cast<ktk_part>(part), buffer, bytes); });
}

ktk_status ktk_moe_import_part(ktk_moe *moe, int32_t expert, int32_t part, const void *buffer, size_t bytes) {
  return guard(
      [&] { at(moe, "moe")->store().import_part(expert, static_cast<ktk_part>(part), buffer, bytes); });
}

ktk_status ktk_moe_weight_bytes(const ktk_moe *moe, size_t *bytes) {
  return guard([&] { at(bytes, "bytes") = static_cast<size_t>(at(moe, "moe")->store().bytes()); });
}

ktk_status ktk_moe_isa(const ktk_moe *moe, const char **name) {
  return guard([&] { at(name, "name") = at(moe, "moe")->backend().name; });
}

ktk_status ktk_moe_forward(ktk_moe *moe, const ktk_forward_args *args) {
  return guard([&] { at(moe, "moe")->forward(read_struct(args, "args")); });
}

ktk_status ktk_moe_unpack_expert(const ktk_moe *moe, int32_t expert, float *gate, float *up, float *down) {
  return guard([&] { at(moe, "moe")->store().unpack(expert, gate, up, down); });
}

ktk_status ktk_sft_create(const ktk_sft_config *config, ktk_moe *moe, ktk_sft **sft) {
  return guard([&] {
    const ktk_sft_config copy = read_struct(config, "config");
    const std::shared_ptr<MoeShell> &layer = at(moe, "moe").shell;
    std::shared_ptr<SftShell> shell(new SftShell{layer, ktk::Training(copy, *layer->moe)});
    at(sft, "sft") = new ktk_sft{std::move(shell)};
  });
}

ktk_status ktk_sft_destroy(ktk_sft *sft) {
  return guard([&] {
    at(sft, "sft").shell->closed.store(true);
    delete sft;
  });
}

ktk_status ktk_sft_set_lora(ktk_sft *sft, const ktk_lora_tensors *tensors) {
  return guard([&] {
    SftShell &shell = *at(sft, "sft").shell;
    const std::lock_guard<std::mutex> lock(shell.layer->mutex);
    if (shell.layer->moe == nullptr) fail(KTK_ERR_STATE, "the layer is closed");
    shell.training.set_lora(read_struct(tensors, "tensors"));
  });
}

ktk_status ktk_sft_context_create(ktk_sft *sft, const ktk_sft_context_config *config,
                                  ktk_sft_context **context) {
  return guard([&] {
    const ktk_sft_context_config copy = read_struct(config, "config");
    require(copy.policy >= KTK_POLICY_NONE && copy.policy <= KTK_POLICY_RECOMPUTE, "policy ", copy.policy,
            " is unknown; use 0 (none), 1 (save) or 2 (recompute)");
    std::shared_ptr<SftContextShell> shell(
        new SftContextShell{at(sft, "sft").shell, ktk::TrainingState(copy), {}, {}});
    at(context, "context") = new ktk_sft_context{std::move(shell)};
  });
}

ktk_status ktk_sft_context_destroy(ktk_sft_context *context) {
  return guard([&] {
    SftContextShell &shell = *at(context, "context").shell;
    shell.closed.store(true);
    {
      const std::lock_guard<std::mutex> lock(shell.mutex);
      if (shell.state.phase == ktk::TrainingState::Phase::ready) shell.state.release();
    }
    delete context;
  });
}

ktk_status ktk_sft_context_size(const ktk_sft_context *context, int32_t *num_tokens, size_t *activation_bytes,
                                size_t *table_bytes) {
  return guard([&] {
    SftContextShell &shell = *at(context, "context").shell;
    const std::lock_guard<std::mutex> lock(shell.mutex);
    if (shell.state.phase == ktk::TrainingState::Phase::fresh)
      fail(KTK_ERR_STATE, "the context has had no forward yet");
    const bool holds = shell.state.phase == ktk::TrainingState::Phase::ready;
    at(num_tokens, "num_tokens") = shell.state.tokens;
    at(activation_bytes, "activation_bytes") = holds ? shell.state.activation_bytes : 0;
    at(table_bytes, "table_bytes") = holds ? shell.state.table_bytes : 0;
  });
}

ktk_status ktk_sft_forward(ktk_sft_context *context, const ktk_forward_args *args) {
  return guard([&] { run_sft(context, args); });
}

ktk_status ktk_sft_backward(ktk_sft_context *context, const ktk_backward_args *args) {
  return guard([&] { run_sft(context, args); });
}

ktk_status ktk_queue_create(ktk_pool *pool, ktk_queue **queue) {
  return guard([&] { at(queue, "queue") = new ktk_queue(at(pool, "pool").context); });
}

ktk_status ktk_queue_destroy(ktk_queue *queue) {
  return guard([&] { delete &at(queue, "queue"); });
}

ktk_status ktk_queue_submit(ktk_queue *queue, ktk_task_fn function, void *context) {
  return guard([&] {
    ktk::TaskQueue &tasks = at(queue, "queue").queue;
    submit_function(function, context, [&](const ktk::Task &task) { tasks.submit(task); });
  });
}

ktk_status ktk_queue_submit_forward(ktk_queue *queue, ktk_moe *moe, const ktk_forward_args *args) {
  return guard([&] {
    ktk::TaskQueue &tasks = at(queue, "queue").queue;
    submit_forward(moe, args, false, [&](const ktk::Task &task) { tasks.submit(task); });
  });
}

ktk_status ktk_queue_submit_sft_forward(ktk_queue *queue, ktk_sft_context *context,
                                        const ktk_forward_args *args) {
  return guard([&] { submit_sft(queue, context, args); });
}

ktk_status ktk_queue_submit_sft_backward(ktk_queue *queue, ktk_sft_context *context,
                                         const ktk_backward_args *args) {
  return guard([&] { submit_sft(queue, context, args); });
}

ktk_status ktk_queue_sync(ktk_queue *queue, int32_t allow_n_pending) {
  return guard([&] { at(queue, "queue").queue.sync(allow_n_pending); });
}

ktk_status ktk_queue_submit_forward_with_cuda_stream(ktk_queue *queue, uintptr_t stream, ktk_moe *moe,
                                                     const ktk_forward_args *args) {
  return guard([&] {
    ktk::TaskQueue &tasks = at(queue, "queue").queue;
    submit_forward(moe, args, ktk::stream_is_capturing(stream),
                   [&](const ktk::Task &task) { ktk::submit_on_stream(tasks, stream, task); });
  });
}

ktk_status ktk_queue_submit_with_cuda_stream(ktk_queue *queue, uintptr_t stream, ktk_task_fn function,
                                             void *context) {
  return guard([&] {
    ktk::TaskQueue &tasks = at(queue, "queue").queue;
    submit_function(function, context,
                    [&](const ktk::Task &task) { ktk::submit_on_stream(tasks, stream, task); });
  });
}

ktk_status ktk_queue_sync_with_cuda_stream(ktk_queue *queue, uintptr_t stream, int32_t allow_n_pending) {
  return guard([&] { ktk::sync_on_stream(at(queue, "queue").queue, stream, allow_n_pending); });
}

ktk_status ktk_queue_pending(const ktk_queue *queue, int64_t *pending) {
  return guard([&] { at(pending, "pending") = at(queue, "queue").queue.pending(); });
}

ktk_status ktk_trace_start(int64_t spans_per_thread, ktk_trace **trace) {
  return guard([&] {
    at(trace, "trace") = nullptr;
    *trace = new ktk_trace(spans_per_thread);
  });
}

ktk_status ktk_trace_stop(ktk_trace *trace) {
  return guard([&] { at(trace, "trace").trace.stop(); });
}

ktk_status ktk_trace_json(const ktk_trace *trace, char *buffer, size_t capacity, size_t *needed) {
  return guard([&] { copy_text(at(trace, "trace").trace.json(), buffer, capacity, needed); });
}

ktk_status ktk_trace_write(const ktk_trace *trace, const char *path) {
  return guard([&] { at(trace, "trace").trace.write(&at(path, "path")); });
}

ktk_status ktk_trace_destroy(ktk_trace *trace) {
  return guard([&] { delete &at(trace, "trace"); });
}

ktk_status ktk_probe_create(const ktk_probe_config *config, ktk_pool *pool, ktk_probe **probe) {
  return guard([&] {
    at(probe, "probe") = nullptr;
    *probe = new ktk_probe{ktk::Probe(read_struct(config, "config"), at(pool, "pool").context)};
  });
}

ktk_status ktk_probe_destroy(ktk_probe *probe) {
  return guard([&] { delete &at(probe, "probe"); });
}

ktk_status ktk_probe_variants(const ktk_probe *probe, int32_t *count) {
  return guard([&] { at(count, "count") = at(probe, "probe").probe.variants(); });
}

ktk_status ktk_probe_variant_name(const ktk_probe *probe, int32_t variant, const char **name) {
  return guard([&] { at(name, "name") = at(probe, "probe").probe.variant_name(variant); });
}

ktk_status ktk_probe_run(ktk_probe *probe, int32_t variant, int64_t repeats, double *work, double *seconds) {
  return guard([&] {
    double &work_done = at(work, "work"), &time = at(seconds, "seconds");
    const ktk::Probe::Result result = at(probe, "probe").probe.run(variant, repeats);
    work_done = result.work;
    time = result.seconds;
  });
}

}  // extern "C"
