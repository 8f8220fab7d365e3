#include "runtime/cuda_shim.h"

#include <dlfcn.h>

#include <cstdlib>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <utility>

#include "core/status.h"

namespace ktk {
namespace {

// From the CUDA run time's documented ABI; streams are pointers, errors and states are ints.
using HostFn = void (*)(void *context);

struct CudaApi {
  int (*launch_host_function)(void *stream, HostFn function, void *context);
  int (*stream_is_capturing)(void *stream, int *state);
  const char *(*error_string)(int error);
  int (*device_count)(int *count);
  int (*runtime_version)(int *version);
  std::string library;
};

constexpr const char *kLibraryNames[] = {"libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0",
                                         "libcudart.so"};

template <typename Function>
bool resolve(void *library, const char *name, Function *function) {
  *function = reinterpret_cast<Function>(dlsym(library, name));
  return *function != nullptr;
}

// nullptr when a function is missing.
std::unique_ptr<CudaApi> resolve_api(void *library) {
  auto api = std::make_unique<CudaApi>();
  if (!resolve(library, "cudaLaunchHostFunc", &api->launch_host_function) ||
      !resolve(library, "cudaStreamIsCapturing", &api->stream_is_capturing) ||
      !resolve(library, "cudaGetErrorString", &api->error_string) ||
      !resolve(library, "cudaGetDeviceCount", &api->device_count) ||
      !resolve(library, "cudaRuntimeGetVersion", &api->runtime_version))
    return nullptr;
  Dl_info info = {};
  if (dladdr(reinterpret_cast<void *>(api->launch_host_function), &info) != 0 && info.dli_fname != nullptr)
    api->library = info.dli_fname;
  return api;
}

std::unique_ptr<CudaApi> open_api(const char *name, int flags, std::string *reason) {
  void *library = dlopen(name, RTLD_NOW | RTLD_LOCAL | flags);
  if (library == nullptr) {
    const char *message = dlerror();
    *reason = message != nullptr ? message : "";
    return nullptr;
  }
  std::unique_ptr<CudaApi> api = resolve_api(library);
  if (api == nullptr) {
    *reason = text(name, " lacks functions of the CUDA run time");
    dlclose(library);
  }
  return api;
}

std::unique_ptr<CudaApi> find_api(std::string *reason) {
  if (const char *named = std::getenv("KTK_CUDART"); named != nullptr && *named != '\0') {
    std::unique_ptr<CudaApi> api = open_api(named, 0, reason);
    if (api == nullptr) *reason = text("KTK_CUDART: ", *reason);
    return api;
  }
  if (std::unique_ptr<CudaApi> api = resolve_api(RTLD_DEFAULT)) return api;
  for (const int flags : {RTLD_NOLOAD, 0}) {
    for (const char *name : kLibraryNames) {
      if (std::unique_ptr<CudaApi> api = open_api(name, flags, reason)) return api;
    }
  }
  *reason = "no CUDA run time library (libcudart.so) is loaded or installed";
  return nullptr;
}

std::mutex api_mutex;
const CudaApi *found_api = nullptr;

// Found once and kept: the library stays loaded. A failure is not kept, because the process may load
// the library later.
const CudaApi *cuda_api(std::string *reason) {
  const std::lock_guard<std::mutex> lock(api_mutex);
  if (found_api == nullptr) found_api = find_api(reason).release();
  return found_api;
}

void check(const CudaApi &api, int error, const char *function) {
  if (error == 0) return;
  const char *message = api.error_string(error);
  fail(KTK_ERR_SYSTEM, function, " failed: ", message != nullptr ? message : "unknown error", " (", error,
       ")");
}

// nullptr: the stream is the host's own order.
const CudaApi *api_for_stream(uintptr_t stream) {
  std::string reason;
  const CudaApi *api = cuda_api(&reason);
  if (stream == 0) {
    int devices = 0;
    if (api == nullptr || api->device_count(&devices) != 0 || devices == 0) return nullptr;
  } else if (api == nullptr) {
    fail(KTK_ERR_SYSTEM, "a CUDA stream was given, but there is no CUDA run time: ", reason,
         "; pass stream 0 to work without CUDA");
  }
  return api;
}

bool is_capturing(const CudaApi &api, void *stream) {
  int state = 0;
  check(api, api.stream_is_capturing(stream, &state), "cudaStreamIsCapturing");
  return state != 0;
}

// What a stream calls when it gets there. Exceptions must not enter the CUDA run time.
class StreamNode : public TaskQueue::Kept {
 public:
  StreamNode(TaskQueue &queue, bool captured) : link_(queue.link()), captured_(captured) {}

  static void reached(void *context) {
    auto *node = static_cast<StreamNode *>(context);
    {
      const std::shared_lock<std::shared_mutex> lock(node->link_->mutex);
      if (node->link_->queue != nullptr) {
        try {
          node->act(*node->link_->queue);
        } catch (...) {
          node->link_->queue->record_current_exception();
        }
      }
    }
    if (!node->captured_) delete node;
  }

  bool captured() const noexcept { return captured_; }

 private:
  virtual void act(TaskQueue &queue) = 0;

  std::shared_ptr<TaskQueue::Link> link_;
  bool captured_;
};

class SubmitNode : public StreamNode {
 public:
  SubmitNode(TaskQueue &queue, bool captured, const Task &task) : StreamNode(queue, captured), task_(task) {}
  // The task of a stream that never got here, or of a graph.
  ~SubmitNode() override {
    if (task_.done != nullptr) task_.done(task_.context);
  }
  // Leaves the task to whoever submitted it.
  void disown() noexcept { task_.done = nullptr; }

 private:
  void act(TaskQueue &queue) override {
    Task task = task_;
    if (captured()) task.done = nullptr;
    queue.submit(task);
    if (!captured()) disown();
  }

  Task task_;
};

class WaitNode : public StreamNode {
 public:
  WaitNode(TaskQueue &queue, bool captured, int64_t allow_n_pending)
      : StreamNode(queue, captured), allow_n_pending_(allow_n_pending) {}

 private:
  void act(TaskQueue &queue) override { queue.wait(allow_n_pending_); }

  int64_t allow_n_pending_;
};

int launch(const CudaApi &api, uintptr_t stream, StreamNode *node) {
  return api.launch_host_function(reinterpret_cast<void *>(stream), &StreamNode::reached, node);
}

// Decides who frees a node that was given to the run time; one that is not captured may be gone already.
void hand_over(TaskQueue &queue, std::unique_ptr<StreamNode> node, bool captured, int error) {
  if (error != 0) return;
  if (captured)
    queue.keep(std::move(node));
  else
    static_cast<void>(node.release());
}

}  // namespace

CudaInfo cuda_info() {
  CudaInfo info = {};
  const CudaApi *api = cuda_api(&info.reason);
  info.available = api != nullptr;
  if (api == nullptr) return info;
  info.reason.clear();
  info.library = api->library;
  int version = 0;
  if (api->runtime_version(&version) == 0)
    info.runtime_version = text(version / 1000, '.', version % 1000 / 10);
  return info;
}

bool cuda_available() {
  std::string reason;
  return cuda_api(&reason) != nullptr;
}

bool stream_is_capturing(uintptr_t stream) {
  const CudaApi *api = api_for_stream(stream);
  return api != nullptr && is_capturing(*api, reinterpret_cast<void *>(stream));
}

void submit_on_stream(TaskQueue &queue, uintptr_t stream, const Task &task) {
  const CudaApi *api = api_for_stream(stream);
  if (api == nullptr) {
    queue.submit(task);
    return;
  }
  const bool captured = is_capturing(*api, reinterpret_cast<void *>(stream));
  auto node = std::make_unique<SubmitNode>(queue, captured, task);
  const int error = launch(*api, stream, node.get());
  if (error != 0) node->disown();
  hand_over(queue, std::move(node), captured, error);
  check(*api, error, "cudaLaunchHostFunc");
}

void sync_on_stream(TaskQueue &queue, uintptr_t stream, int64_t allow_n_pending) {
  require(allow_n_pending >= 0, "allow_n_pending: got ", allow_n_pending, ", expected at least 0");
  const CudaApi *api = api_for_stream(stream);
  if (api == nullptr) {
    queue.sync(allow_n_pending);
    return;
  }
  const bool captured = is_capturing(*api, reinterpret_cast<void *>(stream));
  auto node = std::make_unique<WaitNode>(queue, captured, allow_n_pending);
  const int error = launch(*api, stream, node.get());
  hand_over(queue, std::move(node), captured, error);
  check(*api, error, "cudaLaunchHostFunc");
  queue.raise_failure();
}

}  // namespace ktk
