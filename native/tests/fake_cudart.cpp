// A CUDA run time without a device: streams run their host functions on one thread, as the real one
// does, or record them into a graph that the test replays.
#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>
#include <vector>

namespace {

struct Call {
  void (*function)(void *);
  void *context;
};

std::mutex mutex;
std::condition_variable changed;
std::deque<Call> stream_calls;
std::vector<Call> graph;
int capture_state = 0;
int next_error = 0;
int query_error = 0;
int devices = 1;
bool held = false;
int running = 0;
bool stopping = false;
std::thread *stream_thread = nullptr;

void run_stream() {
  std::unique_lock<std::mutex> lock(mutex);
  for (;;) {
    changed.wait(lock, [] { return stopping || (!held && !stream_calls.empty()); });
    if (stream_calls.empty() || held) return;
    const Call call = stream_calls.front();
    stream_calls.pop_front();
    ++running;
    lock.unlock();
    call.function(call.context);
    lock.lock();
    --running;
    changed.notify_all();
  }
}

}  // namespace

extern "C" {

int cudaLaunchHostFunc(void *, void (*function)(void *), void *context) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (next_error != 0) {
    const int error = next_error;
    next_error = 0;
    return error;
  }
  if (capture_state != 0) {
    graph.push_back({function, context});
    return 0;
  }
  if (stream_thread == nullptr) stream_thread = new std::thread(&run_stream);
  stream_calls.push_back({function, context});
  changed.notify_all();
  return 0;
}

int cudaStreamIsCapturing(void *, int *state) {
  const std::lock_guard<std::mutex> lock(mutex);
  *state = capture_state;
  return query_error;
}

const char *cudaGetErrorString(int error) { return error == 46 ? "all devices are busy" : "fake error"; }

int cudaGetDeviceCount(int *count) {
  const std::lock_guard<std::mutex> lock(mutex);
  *count = devices;
  return devices == 0 ? 100 : 0;
}

int cudaRuntimeGetVersion(int *version) {
  *version = 12040;
  return 0;
}

void fake_set_capture(int state) {
  const std::lock_guard<std::mutex> lock(mutex);
  capture_state = state;
}

void fake_set_errors(int launch, int query) {
  const std::lock_guard<std::mutex> lock(mutex);
  next_error = launch;
  query_error = query;
}

void fake_set_devices(int count) {
  const std::lock_guard<std::mutex> lock(mutex);
  devices = count;
}

void fake_hold(int hold) {
  const std::lock_guard<std::mutex> lock(mutex);
  held = hold != 0;
  changed.notify_all();
}

// Puts the nodes of the graph on the stream.
void fake_replay() {
  const std::lock_guard<std::mutex> lock(mutex);
  if (stream_thread == nullptr) stream_thread = new std::thread(&run_stream);
  stream_calls.insert(stream_calls.end(), graph.begin(), graph.end());
  changed.notify_all();
}

void fake_forget_graph() {
  const std::lock_guard<std::mutex> lock(mutex);
  graph.clear();
}

// Waits until the stream is empty.
void fake_synchronize() {
  std::unique_lock<std::mutex> lock(mutex);
  changed.wait(lock, [] { return stream_calls.empty() && running == 0; });
}

void fake_stop() {
  std::thread *thread = nullptr;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    stopping = true;
    changed.notify_all();
    thread = stream_thread;
    stream_thread = nullptr;
  }
  if (thread != nullptr) thread->join();
  delete thread;
  stopping = false;
}

}  // extern "C"
