// What the worker pool and the task queue cost, each as a ratio to a bound that is measured in the same run.
//
//   pool_bench [--rounds N] [--idle-seconds S] [--only PART] [--json FILE]
//
// Everything is measured in turns (ours, the bound, ours, the bound ...), so that a neighbour on the
// machine disturbs both. libgomp is told to spin for ever, which is when its hand-over is fastest.
#include <cpuid.h>
#include <omp.h>
#include <sched.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>
#include <x86intrin.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <fstream>
#include <memory>
#include <numeric>
#include <sstream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "report.h"
#include "runtime/memory.h"
#include "runtime/task_queue.h"
#include "runtime/topology.h"
#include "runtime/trace.h"
#include "runtime/wait.h"
#include "runtime/worker_pool.h"

using ktk::kLineBytes;
using ktk::now_ns;
using ktk::TaskQueue;
using ktk::Topology;
using ktk::WorkerPool;
using namespace ktk_bench;

namespace {

// ---- set-up --------------------------------------------------------------------------------------

// A clock that costs a few nanoseconds; calibrated against the system's.
class Ticks {
 public:
  Ticks() {
    const int64_t begin_ns = now_ns();
    const uint64_t begin = __rdtsc();
    usleep(200000);
    const uint64_t end = __rdtsc();
    per_ns_ = static_cast<double>(end - begin) / static_cast<double>(now_ns() - begin_ns);
  }
  double ns(uint64_t ticks) const { return static_cast<double>(ticks) / per_ns_; }
  uint64_t of_ns(double ns) const { return static_cast<uint64_t>(ns * per_ns_); }

 private:
  double per_ns_;
};

void spin_ticks(uint64_t ticks) {
  const uint64_t begin = __rdtsc();
  while (__rdtsc() - begin < ticks) ktk::pause_cpu();
}

void bind(int cpu) {
  if (ktk::set_thread_affinity(pthread_self(), {cpu}) != 0) throw std::runtime_error("cannot bind a thread");
}

struct Machine {
  Ticks ticks;
  int node = 0;
  std::vector<int> cpus;  // those that a pool of as many threads is bound to, in its order
};

// Pools see the CPUs of the thread that makes them.
void unbind(const Machine &machine) { ktk::set_thread_affinity(pthread_self(), machine.cpus); }

struct Settings {
  int rounds = 15;
  double idle_seconds = 10;
  std::string only;
  std::string json;
};

// ---- one cache line, there and back --------------------------------------------------------------

struct alignas(kLineBytes) Line {
  std::atomic<uint32_t> turn{0};
};

double round_trip_ns(const Machine &machine, int cpu, int other) {
  constexpr uint32_t kTrips = 500, kBatches = 60;
  Line line;
  std::atomic<bool> ready{false};
  unbind(machine);
  std::thread partner([&] {
    bind(other);
    ready.store(true);
    for (uint32_t turn = 1; turn < 2 * kTrips * kBatches; turn += 2) {
      while (line.turn.load(std::memory_order_acquire) != turn) {
      }
      line.turn.store(turn + 1, std::memory_order_release);
    }
  });
  while (!ready.load()) sched_yield();
  bind(cpu);
  std::vector<double> batches;
  uint32_t turn = 0;
  for (uint32_t batch = 0; batch < kBatches; ++batch) {
    const uint64_t begin = __rdtsc();
    for (uint32_t trip = 0; trip < kTrips; ++trip) {
      line.turn.store(++turn, std::memory_order_release);
      ++turn;
      while (line.turn.load(std::memory_order_acquire) != turn) {
      }
    }
    batches.push_back(machine.ticks.ns(__rdtsc() - begin) / kTrips);
  }
  partner.join();
  return median(batches);
}

struct Trips {
  double min, median;
};

// Over all pairs of the first `count` CPUs.
Trips round_trips(const Machine &machine, size_t count) {
  std::vector<double> pairs;
  for (size_t a = 0; a < count; ++a)
    for (size_t b = a + 1; b < count; ++b)
      pairs.push_back(round_trip_ns(machine, machine.cpus[a], machine.cpus[b]));
  return {*std::min_element(pairs.begin(), pairs.end()), median(pairs)};
}

// ---- parallel sections ---------------------------------------------------------------------------

// Ticks between which something went on.
struct Interval {
  uint64_t began, ended;
};

// What one thread did, in the order of time, in memory that is its own: to note it takes no line from others.
struct alignas(kLineBytes) Notes {
  std::vector<Interval> intervals;

  void reserve(size_t most) {
    intervals.resize(most);  // touches the memory
    intervals.clear();
  }
};

// From the call until the last unit begins, and from the end of the last unit until the call returns.
struct Halves {
  std::vector<double> start_ns, join_ns;

  void add(const Machine &machine, const std::vector<Interval> &calls, const std::vector<Notes> &threads) {
    std::vector<size_t> next(threads.size());
    for (const Interval &call : calls) {
      uint64_t began = call.began, ended = call.began;
      for (size_t t = 0; t < threads.size(); ++t) {
        const std::vector<Interval> &units = threads[t].intervals;
        for (size_t &at = next[t]; at < units.size() && units[at].ended <= call.ended; ++at) {
          if (units[at].began < call.began) continue;
          began = std::max(began, units[at].began);
          ended = std::max(ended, units[at].ended);
        }
      }
      start_ns.push_back(machine.ticks.ns(began - call.began));
      join_ns.push_back(machine.ticks.ns(call.ended - ended));
    }
  }
  std::string json() const {
    return Json().raw("start_ns", spread(start_ns)).raw("join_ns", spread(join_ns)).text();
  }
};

struct Body {
  uint64_t ticks;  // of work in each unit; 0: empty
  std::atomic<int64_t> away{0};
  std::vector<Notes> *notes = nullptr;

  static void unit(void *context, int, int worker, int64_t unit) noexcept {
    Body &body = *static_cast<Body *>(context);
    if (body.notes != nullptr) {
      const uint64_t began = __rdtsc();
      if (body.ticks != 0) spin_ticks(body.ticks);
      (*body.notes)[static_cast<size_t>(worker)].intervals.push_back({began, __rdtsc()});
      return;
    }
    if (body.ticks == 0) return;
    if (worker != unit) body.away.fetch_add(1, std::memory_order_relaxed);
    spin_ticks(body.ticks);
  }
};

// Sections of a unit for each thread, without the first tenth.
std::vector<Interval> run_pool(const Machine &machine, int threads, int sections, Body &body) {
  unbind(machine);
  WorkerPool pool({{machine.node, threads}}, true, 1000000000);
  if (!pool.bind_submitter()) throw std::runtime_error("threads cannot be bound");
  const int64_t units = threads;
  std::vector<Interval> calls;
  calls.reserve(static_cast<size_t>(sections));
  for (int i = -sections / 10; i < sections; ++i) {
    const uint64_t begin = __rdtsc();
    pool.run(&units, &Body::unit, &body);
    const uint64_t end = __rdtsc();
    if (i >= 0) calls.push_back({begin, end});
    if (i < 0) body.away.store(0);
  }
  return calls;
}

void time_pool(const Machine &machine, int threads, int sections, Body &body, std::vector<double> *into) {
  for (const Interval &call : run_pool(machine, threads, sections, body))
    into->push_back(machine.ticks.ns(call.ended - call.began));
}

// The units note when they begin and end, which takes some time itself.
void halve_pool(const Machine &machine, int threads, int sections, Body &body, Halves *into) {
  const size_t most = 2 * static_cast<size_t>(sections) * static_cast<size_t>(threads);
  std::vector<Notes> notes(static_cast<size_t>(threads));
  for (Notes &own : notes) own.reserve(most);
  body.notes = &notes;
  into->add(machine, run_pool(machine, threads, sections, body), notes);
  body.notes = nullptr;
}

void time_openmp(const Machine &machine, int threads, int sections, uint64_t work,
                 std::vector<double> *into) {
#pragma omp parallel num_threads(threads)
  bind(machine.cpus[static_cast<size_t>(omp_get_thread_num())]);
  for (int i = -sections / 10; i < sections; ++i) {
    const uint64_t begin = __rdtsc();
#pragma omp parallel num_threads(threads)
    {
      if (work != 0) spin_ticks(work);
      __asm__ volatile("" ::: "memory");
    }
    const uint64_t end = __rdtsc();
    if (i >= 0) into->push_back(machine.ticks.ns(end - begin));
  }
  // Its threads would spin beside what is measured next.
  omp_pause_resource_all(omp_pause_hard);
}

std::string sections(const Machine &machine, const Settings &settings) {
  constexpr int kSections = 2000;
  constexpr double kWorkNs = 2000;
  std::string rows;
  for (size_t threads = 1; threads <= machine.cpus.size(); ++threads) {
    const int count = static_cast<int>(threads);
    std::vector<double> empty, empty_openmp, worked, worked_openmp, fastest_trips, trips;
    Halves empty_halves, worked_halves;
    Body nothing{0}, work{machine.ticks.of_ns(kWorkNs)};
    int64_t away = 0;
    for (int round = 0; round < settings.rounds; ++round) {
      if (threads > 1) {
        const Trips pairs = round_trips(machine, threads);
        fastest_trips.push_back(pairs.min);
        trips.push_back(pairs.median);
      }
      time_pool(machine, count, kSections, nothing, &empty);
      time_openmp(machine, count, kSections, 0, &empty_openmp);
      time_pool(machine, count, kSections, work, &worked);
      away += work.away.load();
      time_openmp(machine, count, kSections, work.ticks, &worked_openmp);
      halve_pool(machine, count, kSections, nothing, &empty_halves);
      halve_pool(machine, count, kSections, work, &worked_halves);
    }
    for (double &ns : worked) ns -= kWorkNs;
    for (double &ns : worked_openmp) ns -= kWorkNs;
    Json row;
    row.number("threads", count)
        .raw("empty_ns", spread(empty))
        .raw("openmp_empty_ns", spread(empty_openmp))
        .raw("hand_over_ns", spread(worked))
        .raw("openmp_hand_over_ns", spread(worked_openmp))
        .raw("empty_halves", empty_halves.json())
        .raw("hand_over_halves", worked_halves.json())
        .number("units_taken_over",
                static_cast<double>(away) / (static_cast<double>(settings.rounds) * kSections * count));
    std::printf("%2d threads: empty %7.0f ns, with work %7.0f ns; libgomp %7.0f and %7.0f ns", count,
                median(empty), median(worked), median(empty_openmp), median(worked_openmp));
    if (threads > 1) {
      const double bound = median(trips) * std::log2(count);
      row.number("round_trip_min_ns", *std::min_element(fastest_trips.begin(), fastest_trips.end()))
          .number("round_trip_median_ns", median(trips))
          .number("empty_to_round_trips", median(empty) / bound)
          .number("hand_over_to_round_trips", median(worked) / bound)
          .number("empty_to_openmp", median(empty) / median(empty_openmp))
          .number("hand_over_to_openmp", median(worked) / median(worked_openmp));
      std::printf("; round trip %.0f ns, ratios %.2f and %.2f", median(trips), median(empty) / bound,
                  median(worked) / bound);
    }
    std::printf("; start and join %.0f + %.0f ns, with work %.0f + %.0f ns\n", median(empty_halves.start_ns),
                median(empty_halves.join_ns), median(worked_halves.start_ns), median(worked_halves.join_ns));
    rows += (rows.empty() ? "\n  " : ",\n  ") + row.text();
  }
  return "[" + rows + "]";
}

// ---- the lines of a hand-over --------------------------------------------------------------------

// Starts threads and waits for them, and nothing else: no shares, no stealing, nobody parks. What a pool can
// come to, by the lines that carry its start and its join.
enum class Lines {
  one,      // all poll one line and count down one counter
  own,      // each polls and reports on a line of its own, and the submitter walks over all
  fetched,  // the same, and the submitter asks for all lines before it writes the first
  tree,     // each wakes four and collects from four
};

bool has_prefetchw() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(0x80000001, &a, &b, &c, &d) != 0 && (c & 1u << 8) != 0;
}

class HandOver {
 public:
  HandOver(const Machine &machine, Lines lines, size_t threads, size_t rounds)
      : machine_(machine), lines_(lines), count_(threads), rounds_(rounds), of_(threads), notes_(threads) {
    for (Notes &own : notes_) own.reserve(rounds);
  }

  void run(Halves *halves, std::vector<double> *total_ns) {
    unbind(machine_);
    std::vector<std::thread> threads;
    std::atomic<size_t> ready{0};
    for (size_t t = 1; t < count_; ++t) {
      threads.emplace_back([this, t, &ready] {
        bind(machine_.cpus[t]);
        ready.fetch_add(1);
        for (uint32_t round = 1; round <= rounds_; ++round) {
          await(lines_ == Lines::one ? shared_.go : of_[t].go, round);
          const uint64_t began = __rdtsc();
          start(t, round);
          const uint64_t ended = __rdtsc();
          notes_[t].intervals.push_back({began, ended});
          join(t, round);
        }
      });
    }
    while (ready.load() != count_ - 1) sched_yield();
    bind(machine_.cpus[0]);
    std::vector<Interval> calls;
    calls.reserve(rounds_);
    for (uint32_t round = 1; round <= rounds_; ++round) {
      const uint64_t began = __rdtsc();
      start(0, round);
      join(0, round);
      calls.push_back({began, __rdtsc()});
    }
    for (std::thread &thread : threads) thread.join();
    calls.erase(calls.begin(), calls.begin() + static_cast<std::ptrdiff_t>(rounds_ / 10));
    for (const Interval &call : calls) total_ns->push_back(machine_.ticks.ns(call.ended - call.began));
    halves->add(machine_, calls, notes_);
  }

 private:
  static constexpr size_t kFanOut = 4;

  struct alignas(kLineBytes) Own {
    std::atomic<uint32_t> go{0};
    std::atomic<uint32_t> done{0};
    alignas(kLineBytes) std::atomic<uint32_t> arrived{0};  // of this thread and those it wakes, of all rounds
  };
  struct Shared {
    alignas(kLineBytes) std::atomic<uint32_t> go{0};
    alignas(kLineBytes) std::atomic<uint32_t> arrived{0};
    alignas(kLineBytes) std::atomic<uint32_t> done{0};
  };

  static void await(const std::atomic<uint32_t> &word, uint32_t round) {
    while (word.load(std::memory_order_acquire) != round) ktk::pause_cpu();
  }
  size_t first_child(size_t t) const { return std::min(count_, t * kFanOut + 1); }

  void start(size_t t, uint32_t round) {
    if (lines_ == Lines::one && t == 0) shared_.go.store(round, std::memory_order_release);
    const bool own = (lines_ == Lines::own || lines_ == Lines::fetched) && t == 0;
    if (!own && lines_ != Lines::tree) return;
    const size_t end = own ? count_ : first_child(t + 1);
    for (size_t child = first_child(t); lines_ == Lines::fetched && child < end; ++child)
      __asm__ volatile("prefetchw %0" : : "m"(of_[child].go));
    for (size_t child = first_child(t); child < end; ++child)
      of_[child].go.store(round, std::memory_order_release);
  }

  void join(size_t t, uint32_t round) {
    const auto all = static_cast<uint32_t>(count_);
    switch (lines_) {
      case Lines::one:
        if (shared_.arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == round * all)
          shared_.done.store(round, std::memory_order_release);
        if (t == 0) await(shared_.done, round);
        return;
      case Lines::own:
      case Lines::fetched:
        if (t != 0) of_[t].done.store(round, std::memory_order_release);
        // The one that was started last is the last to finish, most of the time.
        for (size_t other = count_ - 1; t == 0 && other > 0; --other) await(of_[other].done, round);
        return;
      case Lines::tree:
        for (size_t at = t;; at = (at - 1) / kFanOut) {
          const auto below = static_cast<uint32_t>(first_child(at + 1) - first_child(at) + 1);
          const bool last = of_[at].arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == round * below;
          if (at == 0 && last) of_[0].done.store(round, std::memory_order_release);
          if (at == 0 || !last) break;
        }
        if (t == 0) await(of_[0].done, round);
        return;
    }
  }

  const Machine &machine_;
  const Lines lines_;
  const size_t count_;
  const size_t rounds_;
  std::vector<Own> of_;
  std::vector<Notes> notes_;
  Shared shared_;
};

std::string hand_overs(const Machine &machine, const Settings &settings) {
  constexpr size_t kRounds = 2000;
  struct Scheme {
    const char *name;
    Lines lines;
    Halves halves = {};
    std::vector<double> total_ns = {};
  };
  std::string rows;
  const size_t cpus = machine.cpus.size();
  for (size_t threads = 2; threads <= cpus;
       threads = threads < cpus ? std::min(2 * threads, cpus) : cpus + 1) {
    std::vector<Scheme> schemes = {{"one_line", Lines::one},
                                   {"own_lines", Lines::own},
                                   {"own_lines_fetched", Lines::fetched},
                                   {"tree", Lines::tree}};
    if (!has_prefetchw()) schemes.erase(schemes.begin() + 2);
    for (int round = 0; round < settings.rounds; ++round) {
      for (Scheme &scheme : schemes)
        HandOver(machine, scheme.lines, threads, kRounds).run(&scheme.halves, &scheme.total_ns);
    }
    Json row;
    row.number("threads", static_cast<double>(threads));
    std::printf("hand-over of %zu threads, start + join:", threads);
    for (const Scheme &scheme : schemes) {
      row.raw(scheme.name,
              Json().raw("total_ns", spread(scheme.total_ns)).raw("halves", scheme.halves.json()).text());
      std::printf("%s %s %.0f + %.0f ns, in all %.0f ns", &scheme == schemes.data() ? "" : ";", scheme.name,
                  median(scheme.halves.start_ns), median(scheme.halves.join_ns), median(scheme.total_ns));
    }
    std::printf("\n");
    rows += (rows.empty() ? "\n  " : ",\n  ") + row.text();
  }
  return "[" + rows + "]";
}

// ---- from submission to the first instruction of a task ------------------------------------------

struct Start {
  std::atomic<int64_t> at_ns{0};
  static void run(void *context) {
    static_cast<Start *>(context)->at_ns.store(now_ns(), std::memory_order_release);
  }
  int64_t wait() {
    for (;;) {
      const int64_t at = at_ns.exchange(0, std::memory_order_acq_rel);
      if (at != 0) return at;
      ktk::pause_cpu();
    }
  }
};

void stay_busy(int64_t ns) {
  for (const int64_t begin = now_ns(); now_ns() - begin < ns;) ktk::pause_cpu();
}

// A thread that sleeps on a futex and nothing else.
class Sleeper {
 public:
  explicit Sleeper(int cpu) : thread_([this, cpu] { sleep(cpu); }) {}
  ~Sleeper() {
    stop_.store(true);
    wake();
    thread_.join();
  }
  double latency_ns() {
    const int64_t begin = now_ns();
    wake();
    return static_cast<double>(start_.wait() - begin);
  }

 private:
  void wake() {
    word_.fetch_add(1, std::memory_order_seq_cst);
    ktk::futex_wake(word_, 1);
  }
  void sleep(int cpu) {
    bind(cpu);
    for (uint32_t seen = 0; !stop_.load(); ++seen) {
      while (word_.load(std::memory_order_acquire) == seen) ktk::futex_wait(word_, seen);
      Start::run(&start_);
    }
  }

  std::atomic<uint32_t> word_{0};
  std::atomic<bool> stop_{false};
  Start start_;
  std::thread thread_;
};

std::string submissions(const Machine &machine, const Settings &settings) {
  const int samples = settings.rounds * 100;
  unbind(machine);
  WorkerPool pool({{machine.node, static_cast<int>(machine.cpus.size())}}, true, -1);
  TaskQueue queue(pool);
  Sleeper sleeper(machine.cpus.front());
  bind(machine.cpus.back());
  Start start;
  const auto latency_ns = [&] {
    const int64_t begin = now_ns();
    queue.submit({&Start::run, nullptr, &start});
    return static_cast<double>(start.wait() - begin);
  };
  std::vector<double> hot, parked, futex;
  for (int i = 0; i < samples; ++i) {
    latency_ns();
    stay_busy(20000);
    hot.push_back(latency_ns());
    // Longer than any spinning.
    stay_busy(2000000);
    parked.push_back(latency_ns());
    stay_busy(2000000);
    futex.push_back(sleeper.latency_ns());
  }
  std::printf("submit to start: hot %.0f ns; parked %.0f ns, futex wake %.0f ns, ratio %.2f\n", median(hot),
              median(parked), median(futex), median(parked) / median(futex));
  return Json()
      .raw("hot_ns", spread(hot))
      .raw("parked_ns", spread(parked))
      .raw("futex_wake_ns", spread(futex))
      .number("parked_to_futex_wake", median(parked) / median(futex))
      .text();
}

// ---- idle ----------------------------------------------------------------------------------------

double cpu_seconds() {
  rusage usage;
  getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval &time) {
    return static_cast<double>(time.tv_sec) + 1e-6 * static_cast<double>(time.tv_usec);
  };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

void empty_unit(void *, int, int, int64_t) noexcept {}

std::string idle(const Machine &machine, const Settings &settings) {
  unbind(machine);
  WorkerPool pool({{machine.node, static_cast<int>(machine.cpus.size())}}, true, -1);
  TaskQueue queue(pool);
  queue.submit({[](void *context) {
                  const int64_t units = 100;
                  static_cast<WorkerPool *>(context)->run(&units, &empty_unit, nullptr);
                },
                nullptr, &pool});
  queue.sync();
  usleep(50000);
  const double before = cpu_seconds();
  const int64_t begin = now_ns();
  usleep(static_cast<useconds_t>(settings.idle_seconds * 1e6));
  const double seconds = static_cast<double>(now_ns() - begin) * 1e-9;
  const double percent = 100 * (cpu_seconds() - before) / seconds;
  std::printf("idle: %.4f %% of one CPU over %.1f s\n", percent, seconds);
  return Json().number("seconds", seconds).number("cpu_percent", percent).text();
}

// ---- reading memory ------------------------------------------------------------------------------

constexpr size_t kBufferBytes = size_t{1} << 30;
constexpr size_t kSectionBytes = size_t{64} << 20;  // what the experts of one layer may have for one token
constexpr size_t kUnitBytes = size_t{128} << 10;

std::atomic<uint64_t> checksum{0};

__attribute__((noinline)) void read_bytes(const char *data, size_t bytes) {
  __m128i sums[4] = {};
  for (size_t i = 0; i < bytes; i += 64) {
    for (size_t j = 0; j < 4; ++j)
      sums[j] = _mm_xor_si128(sums[j], _mm_load_si128(reinterpret_cast<const __m128i *>(data + i + 16 * j)));
  }
  const __m128i sum = _mm_xor_si128(_mm_xor_si128(sums[0], sums[1]), _mm_xor_si128(sums[2], sums[3]));
  if (_mm_cvtsi128_si64(sum) == 1) checksum.fetch_add(1, std::memory_order_relaxed);
}

// Threads that read their shares without a word to each other, the best that a pool can come to.
double probe_bytes_per_ns(const Machine &machine, const char *data) {
  const size_t count = machine.cpus.size(), share = kBufferBytes / count / 64 * 64;
  std::atomic<size_t> ready{0};
  std::atomic<bool> go{false};
  std::vector<int64_t> ends(count);
  std::vector<std::thread> threads;
  for (size_t t = 0; t < count; ++t) {
    threads.emplace_back([&, t] {
      bind(machine.cpus[t]);
      ready.fetch_add(1);
      while (!go.load(std::memory_order_acquire)) ktk::pause_cpu();
      read_bytes(data + t * share, share);
      ends[t] = now_ns();
    });
  }
  while (ready.load() != count) sched_yield();
  const int64_t begin = now_ns();
  go.store(true, std::memory_order_release);
  for (std::thread &thread : threads) thread.join();
  return static_cast<double>(share * count) /
         static_cast<double>(*std::max_element(ends.begin(), ends.end()) - begin);
}

double pool_bytes_per_ns(WorkerPool &pool, const char *data) {
  const int64_t units = kSectionBytes / kUnitBytes;
  const int64_t begin = now_ns();
  for (size_t at = 0; at < kBufferBytes; at += kSectionBytes) {
    const char *part = data + at;
    pool.run(
        &units,
        [](void *context, int, int, int64_t unit) noexcept {
          read_bytes(*static_cast<const char **>(context) + static_cast<size_t>(unit) * kUnitBytes,
                     kUnitBytes);
        },
        &part);
  }
  return static_cast<double>(kBufferBytes) / static_cast<double>(now_ns() - begin);
}

std::string reading(const Machine &machine, const Settings &settings) {
  unbind(machine);
  ktk::NodeBuffer buffer(kBufferBytes, machine.node, true);
  std::memset(buffer.data(), 2, buffer.size());
  WorkerPool pool({{machine.node, static_cast<int>(machine.cpus.size())}}, true, -1);
  pool.bind_submitter();
  std::vector<double> probe, pooled, ratios;
  for (int round = 0; round < settings.rounds; ++round) {
    probe.push_back(probe_bytes_per_ns(machine, buffer.data()));
    pooled.push_back(pool_bytes_per_ns(pool, buffer.data()));
    ratios.push_back(pooled.back() / probe.back());
  }
  std::printf("reading: probe %.2f GB/s, pool %.2f GB/s, median ratio %.3f\n", median(probe), median(pooled),
              median(ratios));
  return Json()
      .number("buffer_bytes", kBufferBytes)
      .number("section_bytes", kSectionBytes)
      .number("probe_gb_per_s", median(probe))
      .number("pool_gb_per_s", median(pooled))
      .number("best_probe_gb_per_s", *std::max_element(probe.begin(), probe.end()))
      .number("best_pool_gb_per_s", *std::max_element(pooled.begin(), pooled.end()))
      .number("pool_to_probe", median(ratios))
      .text();
}

// ---- more threads than CPUs ----------------------------------------------------------------------

constexpr int kLayers = 48, kUnitsPerCpu = 16, kLoops = 2500;

// Work that takes CPU time, not time by the clock.
void compute_unit(void *, int, int, int64_t) noexcept {
  uint64_t value = 1;
  for (int i = 0; i < kLoops; ++i) {
    value = value * 6364136223846793005u + 1442695040888963407u;
    __asm__ volatile("" : "+r"(value));
  }
}

struct Step {
  WorkerPool *pool;
  int64_t units;
  static void run(void *context) {
    const Step &step = *static_cast<Step *>(context);
    // Two sections a layer: gate and up, and down.
    for (int section = 0; section < 2 * kLayers; ++section)
      step.pool->run(&step.units, &compute_unit, nullptr);
  }
};

// One decode step as an engine takes it: a task for the queue, for which the host waits.
void time_steps(const Machine &machine, int threads, int steps, std::vector<double> *into) {
  unbind(machine);
  WorkerPool pool({{machine.node, threads}}, true, -1);
  TaskQueue queue(pool);
  Step step{&pool, static_cast<int64_t>(machine.cpus.size()) * kUnitsPerCpu};
  for (int i = -1; i < steps; ++i) {
    const int64_t begin = now_ns();
    queue.submit({&Step::run, nullptr, &step});
    queue.sync();
    if (i >= 0) into->push_back(static_cast<double>(now_ns() - begin));
  }
}

// Processes that compute on every CPU, as long as this object lives.
class Burners {
 public:
  explicit Burners(const Machine &machine) {
    for (const int cpu : machine.cpus) {
      const pid_t child = fork();
      if (child == 0) {
        ktk::set_thread_affinity(pthread_self(), {cpu});
        for (;;) compute_unit(nullptr, 0, 0, 0);
      }
      if (child > 0) children_.push_back(child);
    }
  }
  ~Burners() {
    for (const pid_t child : children_) {
      kill(child, SIGKILL);
      waitpid(child, nullptr, 0);
    }
  }

 private:
  std::vector<pid_t> children_;
};

std::string crowds(const Machine &machine, const Settings &settings) {
  const int cpus = static_cast<int>(machine.cpus.size());
  // A real-time thread takes turns with its like after long times only.
  const bool with_others = sched_getscheduler(0) == SCHED_OTHER;
  std::vector<double> normal, twice, beside;
  for (int round = 0; round < settings.rounds; ++round) {
    time_steps(machine, cpus, 10, &normal);
    time_steps(machine, 2 * cpus, 10, &twice);
    if (!with_others) continue;
    const Burners burners(machine);
    time_steps(machine, cpus, 5, &beside);
  }
  Json row;
  row.number("sections", 2 * kLayers)
      .raw("as_many_threads_as_cpus_ns", spread(normal))
      .raw("twice_as_many_ns", spread(twice))
      .number("twice_to_normal", median(twice) / median(normal));
  std::printf("steps: %d threads %.2f ms; %d threads %.2f ms, ratio %.2f", cpus, median(normal) * 1e-6,
              2 * cpus, median(twice) * 1e-6, median(twice) / median(normal));
  if (with_others) {
    row.raw("beside_busy_processes_ns", spread(beside))
        .number("busy_to_normal", median(beside) / median(normal));
    std::printf("; beside %d busy processes %.2f ms, ratio %.2f", cpus, median(beside) * 1e-6,
                median(beside) / median(normal));
  }
  std::printf("\n");
  return row.text();
}

// ---- spans of a trace ----------------------------------------------------------------------------

// What one place costs that a trace could record, while nothing is traced and while something is.
double span_ns(const Machine &machine) {
  constexpr int kSpans = 20000;
  const uint64_t begin = __rdtsc();
  for (int i = 0; i < kSpans; ++i) {
    const ktk::SpanScope span({}, {}, 1);
    __asm__ volatile("" ::: "memory");
  }
  return machine.ticks.ns(__rdtsc() - begin) / kSpans;
}

std::string spans(const Machine &machine, const Settings &settings) {
  std::vector<double> off, on;
  for (int round = 0; round < 20 * settings.rounds; ++round) {
    off.push_back(span_ns(machine));
    const ktk::Trace trace(0);
    span_ns(machine);  // touches the ring's memory
    on.push_back(span_ns(machine));
  }
  std::printf("a span: not traced %.2f ns, traced %.1f ns\n", median(off), median(on));
  return Json().raw("off_ns", spread(off)).raw("on_ns", spread(on)).text();
}

// ---- the program ---------------------------------------------------------------------------------

Settings parse(int count, char **arguments) {
  Settings settings;
  for (int i = 1; i + 1 < count; i += 2) {
    const std::string name = arguments[i];
    if (name == "--rounds")
      settings.rounds = std::max(1, std::atoi(arguments[i + 1]));
    else if (name == "--idle-seconds")
      settings.idle_seconds = std::atof(arguments[i + 1]);
    else if (name == "--only")
      settings.only = arguments[i + 1];
    else if (name == "--json")
      settings.json = arguments[i + 1];
    else
      throw std::runtime_error(
          name + " is no option; use --rounds N, --idle-seconds S, --only PART and --json FILE");
  }
  if (count % 2 == 0) throw std::runtime_error("each option takes a value");
  return settings;
}

int run(int count, char **arguments) {
  const Settings settings = parse(count, arguments);
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  Machine machine;
  const Topology topology = Topology::read();
  const Topology::Node &node = *topology.find(topology.nodes_with_cpus().front());
  machine.node = node.id;
  machine.cpus = node.cpus;
  std::printf("%s, CPUs of node %d:", cpu_model().c_str(), node.id);
  for (const int cpu : node.cpus) std::printf(" %d", cpu);
  std::printf("\n");

  const std::string load_before = load_average();
  Json report;
  report.string("cpu", cpu_model())
      .number("cpus", static_cast<double>(node.cpus.size()))
      .number("cores", node.physical_cores)
      .number("rounds", settings.rounds)
      .number("scheduling_policy", sched_getscheduler(0))
      .number("nice", getpriority(PRIO_PROCESS, 0));
  std::string text = "{\"machine\": " + report.text();
  const std::pair<const char *, std::string (*)(const Machine &, const Settings &)> parts[] = {
      {"sections", &sections}, {"hand_over", &hand_overs},    {"submit_to_start", &submissions},
      {"reading", &reading},   {"oversubscription", &crowds}, {"spans", &spans},
      {"idle", &idle}};
  for (const auto &[name, measure] : parts) {
    if (settings.only.empty() || settings.only == name)
      text += ",\n \"" + std::string(name) + "\": " + measure(machine, settings);
  }
  text += ",\n \"load_average\": [" + load_before + ", " + load_average() + "]";
  text += "}\n";
  if (!settings.json.empty() && !(std::ofstream(settings.json) << text))
    throw std::runtime_error("cannot write " + settings.json);
  return 0;
}

}  // namespace

int main(int count, char **arguments) {
  // libgomp reads its environment before main.
  if (std::getenv("GOMP_SPINCOUNT") == nullptr) {
    setenv("GOMP_SPINCOUNT", "infinite", 1);
    unsetenv("OMP_WAIT_POLICY");
    execv("/proc/self/exe", arguments);
  }
  try {
    return run(count, arguments);
  } catch (const std::exception &error) {
    std::fprintf(stderr, "pool_bench: %s\n", error.what());
    return 1;
  }
}
