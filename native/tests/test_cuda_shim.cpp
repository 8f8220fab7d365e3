#include <dlfcn.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "check.h"
#include "runtime/cuda_shim.h"

using ktk::Task;
using ktk::TaskQueue;
using ktk::WorkerPool;

// Controls of the fake run time, which the environment variable KTK_CUDART names.
struct FakeCuda {
  FakeCuda() : library(dlopen(std::getenv("KTK_CUDART"), RTLD_NOW)) {
    load("fake_set_capture", &set_capture);
    load("fake_set_errors", &set_errors);
    load("fake_set_devices", &set_devices);
    load("fake_hold", &hold);
    load("fake_replay", &replay);
    load("fake_forget_graph", &forget_graph);
    load("fake_synchronize", &synchronize);
    load("fake_stop", &stop);
  }
  ~FakeCuda() {
    stop();
    dlclose(library);
  }

  template <typename Function>
  void load(const char *name, Function *function) {
    *function = reinterpret_cast<Function>(dlsym(library, name));
  }

  void *library;
  void (*set_capture)(int);
  void (*set_errors)(int, int);
  void (*set_devices)(int);
  void (*hold)(int);
  void (*replay)();
  void (*forget_graph)();
  void (*synchronize)();
  void (*stop)();
};

constexpr uintptr_t kStream = 0x1000;

struct Work {
  std::atomic<int> runs{0};
  std::atomic<int> freed{0};

  static void run(void *context) { static_cast<Work *>(context)->runs.fetch_add(1); }
  static void fail(void *context) {
    run(context);
    ktk::fail(KTK_ERR_STATE, "task failed");
  }
  static void done(void *context) { static_cast<Work *>(context)->freed.fetch_add(1); }
  Task task() { return Task{&Work::run, &Work::done, this}; }
  Task failing_task() { return Task{&Work::fail, &Work::done, this}; }
};

TEST(without_cuda) {
  const std::string named = std::getenv("KTK_CUDART");
  setenv("KTK_CUDART", "/nowhere/libcudart.so", 1);
  CHECK(!ktk::cuda_available());
  CHECK(ktk::cuda_info().reason.find("KTK_CUDART: /nowhere/libcudart.so") != std::string::npos);
  setenv("KTK_CUDART", "libpthread.so.0", 1);
  CHECK(ktk::cuda_info().reason.find("lacks functions") != std::string::npos);
  {
    WorkerPool pool({{0, 1}}, true, -1);
    TaskQueue queue(pool);
    Work work;
    CHECK_THROWS(KTK_ERR_SYSTEM, "no CUDA run time", submit_on_stream(queue, kStream, work.task()));
    CHECK_THROWS(KTK_ERR_SYSTEM, "no CUDA run time", sync_on_stream(queue, kStream, 0));
    CHECK_THROWS(KTK_ERR_SYSTEM, "no CUDA run time", ktk::stream_is_capturing(kStream));
    CHECK(!ktk::stream_is_capturing(0));
    CHECK_EQUAL(work.freed.load(), 0);
    submit_on_stream(queue, 0, work.task());
    sync_on_stream(queue, 0, 0);
    CHECK_EQUAL(work.runs.load(), 1);
    CHECK_EQUAL(work.freed.load(), 1);
    submit_on_stream(queue, 0, work.failing_task());
    CHECK_THROWS(KTK_ERR_STATE, "task failed", sync_on_stream(queue, 0, 0));
  }
  setenv("KTK_CUDART", named.c_str(), 1);
}

TEST(found) {
  CHECK(ktk::cuda_available());
  const ktk::CudaInfo info = ktk::cuda_info();
  CHECK_EQUAL(info.runtime_version, "12.4");
  CHECK(info.library.find("fake_cudart") != std::string::npos);
  CHECK_EQUAL(info.reason, "");
}

TEST(stream_order) {
  FakeCuda cuda;
  WorkerPool pool({{0, 2}}, true, -1);
  TaskQueue queue(pool);
  Work work;
  cuda.hold(1);
  submit_on_stream(queue, kStream, work.task());
  sync_on_stream(queue, kStream, 0);
  usleep(2000);
  CHECK_EQUAL(work.runs.load(), 0);
  CHECK_EQUAL(queue.pending(), int64_t{0});
  cuda.hold(0);
  cuda.synchronize();
  CHECK_EQUAL(work.runs.load(), 1);
  queue.sync();
  CHECK_EQUAL(work.freed.load(), 1);
  for (int i = 0; i < 1000; ++i) submit_on_stream(queue, kStream, work.task());
  sync_on_stream(queue, kStream, 0);
  cuda.synchronize();
  CHECK_EQUAL(work.freed.load(), 1001);
  CHECK_THROWS(KTK_ERR_ARGUMENT, "allow_n_pending", sync_on_stream(queue, kStream, -1));
}

TEST(null_stream) {
  FakeCuda cuda;
  WorkerPool pool({{0, 1}}, true, -1);
  TaskQueue queue(pool);
  Work work;
  cuda.hold(1);
  submit_on_stream(queue, 0, work.task());
  usleep(1000);
  CHECK_EQUAL(work.runs.load(), 0);
  cuda.hold(0);
  cuda.synchronize();
  queue.sync();
  CHECK_EQUAL(work.runs.load(), 1);
  cuda.set_devices(0);
  submit_on_stream(queue, 0, work.task());
  sync_on_stream(queue, 0, 0);
  CHECK_EQUAL(work.runs.load(), 2);
  cuda.set_devices(1);
}

TEST(graph_replays) {
  FakeCuda cuda;
  Work work;
  WorkerPool pool({{0, 2}}, true, -1);
  {
    TaskQueue queue(pool);
    CHECK(!ktk::stream_is_capturing(kStream));
    cuda.set_capture(1);
    CHECK(ktk::stream_is_capturing(kStream));
    submit_on_stream(queue, kStream, work.task());
    sync_on_stream(queue, kStream, 0);
    cuda.set_capture(0);
    CHECK_EQUAL(work.runs.load(), 0);
    for (int i = 1; i <= 1000; ++i) {
      cuda.replay();
      if (i % 10 != 0) continue;
      cuda.synchronize();
      CHECK_EQUAL(work.runs.load(), i);
    }
    queue.sync();
    CHECK_EQUAL(work.freed.load(), 0);
  }
  CHECK_EQUAL(work.freed.load(), 1);
  cuda.forget_graph();
}

TEST(failures_in_a_stream) {
  FakeCuda cuda;
  WorkerPool pool({{0, 1}}, true, -1);
  TaskQueue queue(pool);
  Work work;
  submit_on_stream(queue, kStream, work.failing_task());
  cuda.synchronize();
  queue.wait(0);
  // The wait is on the stream all the same.
  CHECK_THROWS(KTK_ERR_STATE, "task failed", sync_on_stream(queue, kStream, 0));
  submit_on_stream(queue, kStream, work.failing_task());
  cuda.synchronize();
  CHECK_THROWS(KTK_ERR_STATE, "task failed", queue.sync());
  queue.sync();
  CHECK_EQUAL(work.freed.load(), 2);
}

TEST(refused_calls) {
  FakeCuda cuda;
  WorkerPool pool({{0, 1}}, true, -1);
  TaskQueue queue(pool);
  Work work;
  cuda.set_errors(46, 0);
  CHECK_THROWS(KTK_ERR_SYSTEM, "cudaLaunchHostFunc failed: all devices are busy (46)",
               submit_on_stream(queue, kStream, work.task()));
  cuda.set_errors(46, 0);
  CHECK_THROWS(KTK_ERR_SYSTEM, "cudaLaunchHostFunc failed", sync_on_stream(queue, kStream, 0));
  cuda.set_errors(0, 900);
  CHECK_THROWS(KTK_ERR_SYSTEM, "cudaStreamIsCapturing failed: fake error (900)",
               submit_on_stream(queue, kStream, work.task()));
  cuda.set_errors(46, 0);
  cuda.set_capture(1);
  CHECK_THROWS(KTK_ERR_SYSTEM, "cudaLaunchHostFunc failed", submit_on_stream(queue, kStream, work.task()));
  cuda.set_capture(0);
  cuda.set_errors(0, 0);
  CHECK_EQUAL(work.freed.load(), 0);
  CHECK_EQUAL(work.runs.load(), 0);
}

TEST(queue_gone_before_the_stream_gets_there) {
  FakeCuda cuda;
  WorkerPool pool({{0, 1}}, true, -1);
  Work work;
  auto queue = std::make_unique<TaskQueue>(pool);
  cuda.hold(1);
  submit_on_stream(*queue, kStream, work.task());
  sync_on_stream(*queue, kStream, 0);
  queue.reset();
  CHECK_EQUAL(work.freed.load(), 0);
  cuda.hold(0);
  cuda.synchronize();
  CHECK_EQUAL(work.runs.load(), 0);
  CHECK_EQUAL(work.freed.load(), 1);
}
