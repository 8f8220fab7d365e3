// Tasks in the order of a CUDA stream. The CUDA run time is looked up when it is first needed; nothing
// of it is needed to build, and its absence is no error until a stream is named.
#pragma once

#include <cstdint>
#include <string>

#include "runtime/task_queue.h"

namespace ktk {

struct CudaInfo {
  bool available;               // a CUDA run time library was found; says nothing about devices
  std::string library;          // path of the library in use
  std::string runtime_version;  // "12.4"
  std::string reason;           // why it is not available
};

// Looks, in this order, at the library that the environment variable KTK_CUDART names (and then at no
// other), one that the process has loaded, and one the dynamic loader finds. Initialises no device.
CudaInfo cuda_info();
bool cuda_available();

// Whether the stream is being captured into a graph; never for stream 0 without CUDA. Throws as
// submit_on_stream does.
bool stream_is_capturing(uintptr_t stream);

// Submits `task` to the queue when `stream` (a cudaStream_t) has reached this point. While the stream
// is being captured into a graph, the task belongs to the graph: it is submitted by each replay, and
// its `done` is called when the queue goes; the graph must not be replayed after that. Stream 0 on a
// machine without CUDA or without a device: submits at once. Throws KTK_ERR_SYSTEM (no CUDA run time,
// or a call of it failed); then the caller still owns the task.
void submit_on_stream(TaskQueue &queue, uintptr_t stream, const Task &task);

// Makes the stream wait, from this point on, until at most `allow_n_pending` of the tasks submitted by
// then are left. A failure of those tasks stays kept. Returns at once; throws a failure that was kept
// before the call. Stream 0 without CUDA: TaskQueue::sync.
void sync_on_stream(TaskQueue &queue, uintptr_t stream, int64_t allow_n_pending);

}  // namespace ktk
