#include "runtime/trace.h"

#include <cpuid.h>
#include <fcntl.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <limits>
#include <map>
#include <mutex>
#include <new>
#include <tuple>
#include <utility>
#include <vector>

#include "core/status.h"
#include "runtime/fork.h"
#include "runtime/memory.h"

namespace ktk {

std::atomic<TraceState> trace_state{0};

namespace {

struct StageInfo {
  const char *name;
  const char *category;  // compute: on a worker's lane; host: beside them
};

// In the order of Stage.
constexpr StageInfo kStages[] = {
    {"section", "compute"},           // work without a name of its own
    {"route", "compute"},             // which rows each expert computes
    {"quantise", "compute"},          // the tokens
    {"gather", "compute"},            // rows of experts with several tokens
    {"gate_up", "compute"},           // both projections and the activation
    {"down", "compute"},              // projection and weighted sum
    {"merge", "compute"},             // sum over the shards
    {"pack", "compute"},              // weights of one expert
    {"lora_pack", "compute"},         // adapters as operands of the products
    {"lora_input", "compute"},        // tokens through the A of gate and up
    {"lora_middle", "compute"},       // the intermediate through the A of down
    {"grad_input", "compute"},        // gradient of the output, by expert
    {"grad_lora_input", "compute"},   // the same through the B of down
    {"grad_down", "compute"},         // back through the down projection and the activation
    {"grad_lora_middle", "compute"},  // gradient of gate and up through their B
    {"grad_gate_up", "compute"},      // back through gate and up, summed by token
    {"grad_merge", "compute"},        // sums over the shards
    {"grad_lora", "compute"},         // gradients of the adapters
    {"grad_base", "compute"},         // gradients of the weights
    {"forward", "host"},              // one batch through one layer
    {"backward", "host"},             // the way back of one batch through one layer
    {"task", "host"},                 // of the caller, on the queue's thread
    {"wait", "host"},                 // whoever opened a section waits for its last unit
    {"sync", "host"},                 // waits for the queue
};
static_assert(sizeof(kStages) / sizeof(kStages[0]) == static_cast<size_t>(Stage::count),
              "each stage has an entry");

const StageInfo &info_of(uint64_t stage) noexcept {
  return kStages[stage < static_cast<uint64_t>(Stage::count) ? stage : 0];
}

// Host threads come after the workers of their subpool.
constexpr int kFirstHostThread = 10000;

// Words of one span in a ring.
enum Word { kBegin, kEnd, kUnits, kLabel, kLane, kWords };

uint64_t label_word(const SpanLabel &label, uint16_t worker) noexcept {
  return uint64_t{static_cast<uint32_t>(label.layer)} << 32 |
         uint64_t{static_cast<uint16_t>(label.stage)} << 16 | worker;
}
uint64_t lane_word(const Lane &lane) noexcept {
  return uint64_t{lane.pool} << 48 | uint64_t{lane.subpool} << 32 |
         uint64_t{static_cast<uint16_t>(lane.node)} << 16 | lane.threads;
}

struct Span {
  uint64_t begin;
  uint64_t end;
  uint32_t units;
  uint32_t section;
  int32_t layer;
  uint16_t stage;
  Lane lane;
  int host_thread;  // index, for spans of a thread's own lane
};

// Written by its thread alone, read by any. A word is stored and loaded with release and acquire, which
// cost nothing on this architecture: a reader that sees a word of span i sees `head` at i or later.
struct Ring {
  Ring(int64_t spans, pid_t owner)
      : memory(static_cast<size_t>(spans) * kWords * sizeof(uint64_t), -1, false),
        words(reinterpret_cast<std::atomic<uint64_t> *>(memory.data())),
        capacity(static_cast<uint64_t>(spans)),
        thread(owner) {
    if (pthread_getname_np(pthread_self(), name, sizeof(name)) != 0) name[0] = '\0';
  }

  std::atomic<uint64_t> *span(uint64_t index) const noexcept {
    return words + (index & (capacity - 1)) * kWords;
  }

  NodeBuffer memory;
  std::atomic<uint64_t> *words;
  uint64_t capacity;  // a power of two
  std::atomic<uint64_t> head{0};

  // Of the owner: what the last span was about.
  uint64_t last_section = 0;
  uint64_t last_label = 0;
  uint64_t last_lane = 0;
  TraceState state = 0;

  pid_t thread;
  char name[16] = {};
  // Guarded by the registry.
  Ring *next = nullptr;
  bool retired = false;
};

struct ClockReading {
  uint64_t ticks;
  int64_t ns;
};

bool invariant_tsc() noexcept {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(0x80000007, &eax, &ebx, &ecx, &edx) != 0 && (edx >> 8 & 1) != 0;
}

// Both clocks at one moment, as nearly as can be had.
ClockReading read_clocks(TraceState state) noexcept {
  ClockReading best{};
  uint64_t narrowest = std::numeric_limits<uint64_t>::max();
  for (int attempt = 0; attempt < 5; ++attempt) {
    const uint64_t before = trace_ticks(state);
    const int64_t ns = now_ns();
    const uint64_t width = trace_ticks(state) - before;
    if (width < narrowest) {
      narrowest = width;
      best = {before + width / 2, ns};
    }
  }
  return best;
}

thread_local Ring *own_ring = nullptr;

class Registry : private ForkListener {
 public:
  // Never destroyed: threads may outlive the library's static objects.
  static Registry &get() {
    static Registry &registry = *new Registry;
    return registry;
  }

  struct Opened {
    uint32_t process;
    TraceState state;
    ClockReading began;
    std::map<const Ring *, uint64_t> heads;
  };

  Opened open(int64_t spans) {
    const std::lock_guard<std::mutex> lock(mutex_);
    Opened opened{process_, 0, {}, {}};
    if (open_ == 0) {
      free_retired();
      capacity_ = 0;
    }
    for (const Ring *ring = rings_; ring != nullptr; ring = ring->next)
      opened.heads[ring] = ring->head.load(std::memory_order_acquire);
    capacity_ = std::max(capacity_, spans);
    ++open_;
    // In steps of two, past the 0 that means off.
    state_ = (state_ | 1) + 2;
    opened.state = use_tsc_ ? state_ : state_ - 1;
    opened.began = read_clocks(opened.state);
    if (first_.ns == 0) first_ = opened.began;
    trace_state.store(opened.state, std::memory_order_relaxed);
    return opened;
  }

  // Calls keep(ring, first, head) for each ring that a trace may have spans in, unless the trace belongs
  // to the parent of this process. Then `end` is the last moment that counts.
  template <typename Keep>
  bool close(const Opened &opened, ClockReading *end, double *ticks_per_ns, Keep keep) {
    // A shorter distance would show the time that reading the clocks takes.
    constexpr int64_t kLeastNs = 10000000;
    const int64_t elapsed = now_ns() - first_.ns;
    const uint64_t last = trace_ticks(opened.state);
    if ((opened.state & 1) != 0 && elapsed < kLeastNs)
      usleep(static_cast<useconds_t>((kLeastNs - elapsed) / 1000));

    const std::lock_guard<std::mutex> lock(mutex_);
    if (opened.process != process_) return false;
    const ClockReading now = read_clocks(opened.state);
    const bool measurable = now.ns > first_.ns && now.ticks > first_.ticks;
    *ticks_per_ns = (opened.state & 1) != 0 && measurable ? static_cast<double>(now.ticks - first_.ticks) /
                                                                static_cast<double>(now.ns - first_.ns)
                                                          : 1.0;
    *end = {last, now.ns};
    struct Closing {
      Registry *registry;
      ~Closing() {
        if (--registry->open_ > 0) return;
        trace_state.store(0, std::memory_order_relaxed);
        registry->free_retired();
      }
    } closing{this};
    for (const Ring *ring = rings_; ring != nullptr; ring = ring->next) {
      const auto known = opened.heads.find(ring);
      keep(*ring, known != opened.heads.end() ? known->second : 0);
    }
    return true;
  }

  // The calling thread's ring, fit for the open traces; nullptr when there is no memory.
  Ring *ring_for_thread(TraceState state) noexcept {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (own_ring == nullptr || own_ring->capacity < static_cast<uint64_t>(capacity_)) {
      try {
        auto ring = std::make_unique<Ring>(capacity_ > 0 ? capacity_ : Trace::kDefaultSpans + 1,
                                           static_cast<pid_t>(syscall(SYS_gettid)));
        if (own_ring != nullptr) own_ring->retired = true;
        ring->next = rings_;
        rings_ = own_ring = ring.release();
      } catch (...) {
        return own_ring;
      }
    }
    own_ring->state = state;
    own_ring->last_section = 0;
    return own_ring;
  }

  void retire(Ring *ring) noexcept {
    const std::lock_guard<std::mutex> lock(mutex_);
    ring->retired = true;
    if (open_ == 0) free_retired();
  }

 private:
  Registry() = default;

  // Threads other than this one are gone, and what they recorded is the parent's.
  void after_fork_in_child() noexcept override {
    new (&mutex_) std::mutex();
    ++process_;
    open_ = 0;
    trace_state.store(0, std::memory_order_relaxed);
    for (Ring *ring = rings_; ring != nullptr; ring = ring->next) ring->retired = ring != own_ring;
    if (own_ring != nullptr) own_ring->state = 0;
  }

  void free_retired() noexcept {
    for (Ring **link = &rings_; *link != nullptr;) {
      Ring *const ring = *link;
      if (!ring->retired) {
        link = &ring->next;
        continue;
      }
      *link = ring->next;
      delete ring;
    }
  }

  const bool use_tsc_ = invariant_tsc();
  std::mutex mutex_;
  Ring *rings_ = nullptr;
  int open_ = 0;
  int64_t capacity_ = 0;
  uint32_t process_ = 0;  // how many forks lie behind
  TraceState state_ = 1;
  ClockReading first_{};
};

// Gives the ring back when its thread ends.
struct RingOfThread {
  ~RingOfThread() {
    if (own_ring != nullptr) Registry::get().retire(own_ring);
    own_ring = nullptr;
  }
};

[[gnu::noinline]] Ring *renew_ring(TraceState state) noexcept {
  static thread_local RingOfThread at_exit;
  static_cast<void>(&at_exit);
  return Registry::get().ring_for_thread(state);
}

}  // namespace

const char *stage_name(Stage stage) noexcept { return info_of(static_cast<uint64_t>(stage)).name; }

void record_span(TraceState state, const Lane &lane, const SpanLabel &label, uint32_t section, uint64_t begin,
                 int64_t units) noexcept {
  Ring *ring = own_ring;
  if (ring == nullptr || ring->state != state) {
    ring = renew_ring(state);
    if (ring == nullptr) return;
  }
  const uint64_t end = trace_ticks(state);
  const uint64_t counted = static_cast<uint64_t>(std::clamp<int64_t>(units, 0, 0xffffffff));
  const uint64_t what = label_word(label, lane.worker), where = lane_word(lane);
  uint64_t head = ring->head.load(std::memory_order_relaxed);
  if (section != 0 && ring->last_section == section && ring->last_label == what && ring->last_lane == where) {
    std::atomic<uint64_t> *const span = ring->span(head - 1);
    span[kEnd].store(end, std::memory_order_release);
    span[kUnits].store(span[kUnits].load(std::memory_order_relaxed) + counted, std::memory_order_release);
    return;
  }
  ring->last_section = section;
  ring->last_label = what;
  ring->last_lane = where;
  std::atomic<uint64_t> *const span = ring->span(head);
  span[kBegin].store(begin, std::memory_order_release);
  span[kEnd].store(end, std::memory_order_release);
  span[kUnits].store(uint64_t{section} << 32 | counted, std::memory_order_release);
  span[kLabel].store(what, std::memory_order_release);
  span[kLane].store(where, std::memory_order_release);
  ring->head.store(++head, std::memory_order_release);
}

struct Trace::Contents {
  Registry::Opened opened;
  bool stopped = false;
  uint64_t end = 0;
  double ticks_per_ns = 1.0;
  uint64_t dropped = 0;
  std::vector<Span> spans;
  std::vector<std::pair<std::string, pid_t>> host_threads;

  int64_t ns(uint64_t ticks) const {
    return static_cast<int64_t>(static_cast<double>(ticks - opened.began.ticks) / ticks_per_ns);
  }
  void copy(const Ring &ring, uint64_t first);
  template <typename Flush>
  void print(std::string *out, Flush flush) const;
};

void Trace::Contents::copy(const Ring &ring, uint64_t first) {
  const uint64_t head = ring.head.load(std::memory_order_acquire);
  const uint64_t before = spans.size();
  int host_thread = -1;
  // The owner may be writing the span after its head, in the place of the oldest.
  uint64_t index = head - first >= ring.capacity ? head + 1 - ring.capacity : first;
  dropped += index - first;
  for (; index < head; ++index) {
    const std::atomic<uint64_t> *const words = ring.span(index);
    uint64_t copied[kWords];
    for (int word = 0; word < kWords; ++word) copied[word] = words[word].load(std::memory_order_acquire);
    if (ring.head.load(std::memory_order_acquire) - index >= ring.capacity) {
      ++dropped;
      continue;
    }
    if (copied[kBegin] < opened.began.ticks || copied[kBegin] > end) continue;
    Span span{};
    span.begin = copied[kBegin];
    span.end = copied[kEnd];
    span.units = static_cast<uint32_t>(copied[kUnits]);
    span.section = static_cast<uint32_t>(copied[kUnits] >> 32);
    span.layer = static_cast<int32_t>(copied[kLabel] >> 32);
    span.stage = static_cast<uint16_t>(copied[kLabel] >> 16);
    span.lane.worker = static_cast<uint16_t>(copied[kLabel]);
    span.lane.pool = static_cast<uint16_t>(copied[kLane] >> 48);
    span.lane.subpool = static_cast<uint16_t>(copied[kLane] >> 32);
    span.lane.node = static_cast<int16_t>(copied[kLane] >> 16);
    span.lane.threads = static_cast<uint16_t>(copied[kLane]);
    if (span.lane.worker == Lane::kOwnLane) {
      if (host_thread < 0) {
        host_thread = static_cast<int>(host_threads.size());
        host_threads.emplace_back(ring.name, ring.thread);
      }
      span.host_thread = host_thread;
    }
    spans.push_back(span);
  }
  std::sort(spans.begin() + static_cast<std::ptrdiff_t>(before), spans.end(),
            [](const Span &left, const Span &right) { return left.begin < right.begin; });
}

namespace {

// Microseconds with three decimals, whatever the locale.
void put_us(std::string *out, int64_t ns) {
  *out += std::to_string(ns / 1000);
  const int64_t rest = ns % 1000;
  *out += '.';
  for (const int64_t unit : {100, 10, 1}) *out += static_cast<char>('0' + rest / unit % 10);
}

void put_text(std::string *out, const std::string &value) {
  *out += '"';
  for (const char c : value) {
    const bool plain = static_cast<unsigned char>(c) >= 0x20 && static_cast<unsigned char>(c) < 0x7f;
    if (c == '"' || c == '\\') *out += '\\';
    *out += plain ? c : '?';
  }
  *out += '"';
}

void put_name(std::string *out, const char *kind, int pid, int tid, const std::string &name) {
  *out += text("{\"ph\":\"M\",\"name\":\"", kind, "_name\",\"pid\":", pid, ",\"tid\":", tid,
               ",\"args\":{\"name\":");
  put_text(out, name);
  *out += text("}},\n{\"ph\":\"M\",\"name\":\"", kind, "_sort_index\",\"pid\":", pid, ",\"tid\":", tid,
               ",\"args\":{\"sort_index\":", kind[0] == 'p' ? pid : tid, "}},\n");
}

}  // namespace

// Appends to *out, and calls flush() whenever that may be emptied.
template <typename Flush>
void Trace::Contents::print(std::string *out, Flush flush) const {
  struct Process {
    int pid = 0;
    int16_t node = 0;
    uint16_t threads = 0;  // of its pool
  };
  std::map<std::pair<uint16_t, uint16_t>, Process> processes;
  std::map<std::tuple<uint16_t, uint16_t, int>, int> lanes;
  const auto tid_of = [](const Span &span) {
    return span.lane.worker == Lane::kOwnLane ? kFirstHostThread + span.host_thread : int{span.lane.worker};
  };
  for (const Span &span : spans) {
    Process &process = processes[{span.lane.pool, span.lane.subpool}];
    process.node = span.lane.node;
    process.threads = std::max(process.threads, span.lane.threads);
    lanes[{span.lane.pool, span.lane.subpool, tid_of(span)}] = span.host_thread;
  }
  // Subpools of the first pool keep their numbers.
  int base = 0, next = 0, pools = 0;
  uint16_t pool = 0;
  for (auto &[key, process] : processes) {
    if (pools == 0 || key.first != pool) {
      base = next;
      pool = key.first;
      ++pools;
    }
    process.pid = base + key.second;
    next = process.pid + 1;
  }

  *out += "{\"displayTimeUnit\":\"ns\",\n\"otherData\":{\"clock\":";
  *out += (opened.state & 1) != 0 ? "\"tsc\"" : "\"CLOCK_MONOTONIC\"";
  *out += ",\"tsc_mhz\":";
  if ((opened.state & 1) != 0)
    put_us(out, static_cast<int64_t>(ticks_per_ns * 1e6));
  else
    *out += "null";
  *out += ",\"duration_us\":";
  put_us(out, std::max<int64_t>(0, ns(end)));
  *out += text(",\"dropped_spans\":", dropped, ",\"pools\":[");
  const char *separator = "";
  for (auto entry = processes.begin(); entry != processes.end();) {
    const uint16_t id = entry->first.first;
    uint16_t threads = 0;
    std::string pids;
    for (; entry != processes.end() && entry->first.first == id; ++entry) {
      pids += (pids.empty() ? "" : ",") + std::to_string(entry->second.pid);
      threads = std::max(threads, entry->second.threads);
    }
    *out += text(separator, "{\"pids\":[", pids, "],\"threads\":", threads, "}");
    separator = ",";
  }
  *out += "]},\n\"traceEvents\":[\n";

  for (const auto &[key, process] : processes) {
    const std::string owner = pools > 1 ? text("pool ", key.first, ", ") : "";
    put_name(out, "process", process.pid, 0,
             text(owner, "subpool ", key.second, " (NUMA node ", process.node, ")"));
  }
  for (const auto &[key, host_thread] : lanes) {
    const auto &[in_pool, subpool, tid] = key;
    std::string name = text("worker ", tid);
    if (tid >= kFirstHostThread) {
      const auto &[own_name, thread] = host_threads[static_cast<size_t>(host_thread)];
      name = own_name == "ktk-queue" ? "queue" : text("caller ", own_name, " (", thread, ")");
    }
    put_name(out, "thread", processes.at({in_pool, subpool}).pid, tid, name);
  }
  for (const Span &span : spans) {
    const StageInfo &stage = info_of(span.stage);
    *out += "{\"ph\":\"X\",\"name\":\"";
    *out += stage.name;
    *out += "\",\"cat\":\"";
    *out += stage.category;
    *out += "\",\"pid\":" + std::to_string(processes.at({span.lane.pool, span.lane.subpool}).pid);
    *out += ",\"tid\":" + std::to_string(tid_of(span));
    const int64_t begin = ns(span.begin);
    *out += ",\"ts\":";
    put_us(out, begin);
    *out += ",\"dur\":";
    put_us(out, std::max<int64_t>(0, ns(std::max(span.end, span.begin)) - begin));
    *out += ",\"args\":{\"units\":" + std::to_string(span.units);
    if (span.layer >= 0) *out += ",\"layer\":" + std::to_string(span.layer);
    if (span.section != 0) *out += ",\"section\":" + std::to_string(span.section);
    *out += "}},\n";
    flush();
  }
  if (const size_t size = out->size(); size >= 2 && (*out)[size - 2] == ',') out->replace(size - 2, 2, "\n");
  *out += "]}\n";
}

Trace::Trace(int64_t spans_per_thread) : contents_(std::make_unique<Contents>()) {
  require(spans_per_thread >= 0 && spans_per_thread <= kMostSpans, "spans_per_thread: got ", spans_per_thread,
          ", expected 0 to ", kMostSpans);
  // One place is for the span that is being written.
  int64_t rounded = 2;
  while (rounded <= (spans_per_thread > 0 ? spans_per_thread : kDefaultSpans)) rounded *= 2;
  contents_->opened = Registry::get().open(rounded);
}

Trace::~Trace() {
  try {
    stop();
  } catch (...) {
    // Without memory for its spans the trace is closed all the same.
  }
}

void Trace::stop() {
  Contents &contents = *contents_;
  if (contents.stopped) return;
  contents.stopped = true;
  ClockReading end{};
  Registry::get().close(contents.opened, &end, &contents.ticks_per_ns, [&](const Ring &ring, uint64_t first) {
    contents.end = end.ticks;
    contents.copy(ring, first);
  });
  contents.end = std::max(end.ticks, contents.opened.began.ticks);
}

const Trace::Contents &Trace::contents() const {
  if (!contents_->stopped) fail(KTK_ERR_STATE, "the trace is still running; stop it first");
  return *contents_;
}

std::string Trace::json() const {
  std::string out;
  contents().print(&out, [] {});
  return out;
}

namespace {

// A file that takes the place of another one when it is complete, and leaves no trace when it is not.
class ReplacingFile {
 public:
  explicit ReplacingFile(const std::string &path)
      : path_(path), temporary_(text(path, ".", getpid(), ".tmp")) {
    descriptor_ = open(temporary_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0666);
    if (descriptor_ < 0) fail_with(errno);
  }
  ~ReplacingFile() {
    if (descriptor_ >= 0) close(descriptor_);
    if (!complete_) unlink(temporary_.c_str());
  }
  ReplacingFile(const ReplacingFile &) = delete;
  ReplacingFile &operator=(const ReplacingFile &) = delete;

  void write(const std::string &bytes) {
    for (size_t done = 0; done < bytes.size();) {
      const ssize_t count = ::write(descriptor_, bytes.data() + done, bytes.size() - done);
      if (count >= 0)
        done += static_cast<size_t>(count);
      else if (errno != EINTR)
        fail_with(errno);
    }
  }
  void finish() {
    if (fsync(descriptor_) != 0) fail_with(errno);
    if (close(std::exchange(descriptor_, -1)) != 0) fail_with(errno);
    if (rename(temporary_.c_str(), path_.c_str()) != 0) fail_with(errno);
    complete_ = true;
  }

 private:
  [[noreturn]] void fail_with(int error) const {
    fail(KTK_ERR_SYSTEM, "cannot write the trace to ", path_, ": ", std::strerror(error));
  }

  const std::string path_;
  const std::string temporary_;
  int descriptor_ = -1;
  bool complete_ = false;
};

}  // namespace

void Trace::write(const std::string &path) const {
  constexpr size_t kChunk = size_t{1} << 20;
  const Contents &all = contents();
  ReplacingFile file(path);
  std::string out;
  all.print(&out, [&] {
    if (out.size() < kChunk) return;
    // The end of the list takes the comma of the last event away.
    const std::string kept = out.substr(out.size() - 2);
    out.resize(out.size() - 2);
    file.write(out);
    out = kept;
  });
  file.write(out);
  file.finish();
}

}  // namespace ktk
