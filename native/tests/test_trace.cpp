#include <fcntl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <memory>
#include <set>
#include <sstream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "check.h"
#include "faults.h"
#include "runtime/task_queue.h"
#include "runtime/trace.h"

using ktk::SpanLabel;
using ktk::SpanScope;
using ktk::Stage;
using ktk::TaskQueue;
using ktk::Trace;
using ktk::WorkerPool;
using namespace ktk_test;

struct Event {
  std::string name;
  int pid = -1;
  int tid = -1;
  double ts = -1;
  double dur = -1;
  int64_t units = -1;
  int64_t layer = -1;
  int64_t section = -1;
};

static std::string after(const std::string &line, const std::string &key) {
  const size_t at = line.find("\"" + key + "\":");
  return at == std::string::npos ? "" : line.substr(at + key.size() + 3);
}

static double number(const std::string &line, const std::string &key) {
  const std::string rest = after(line, key);
  return rest.empty() ? -1 : std::strtod(rest.c_str(), nullptr);
}

// One event a line is how they are written.
static std::vector<Event> events_of(const std::string &json) {
  std::vector<Event> events;
  std::istringstream stream(json);
  for (std::string line; std::getline(stream, line);) {
    if (line.rfind("{\"ph\":\"X\"", 0) != 0) continue;
    Event event;
    const std::string name = after(line, "name");
    event.name = name.substr(1, name.find('"', 1) - 1);
    event.pid = static_cast<int>(number(line, "pid"));
    event.tid = static_cast<int>(number(line, "tid"));
    event.ts = number(line, "ts");
    event.dur = number(line, "dur");
    event.units = static_cast<int64_t>(number(line, "units"));
    event.layer = static_cast<int64_t>(number(line, "layer"));
    event.section = static_cast<int64_t>(number(line, "section"));
    events.push_back(event);
  }
  return events;
}

static std::vector<Event> stopped(Trace &trace) {
  trace.stop();
  return events_of(trace.json());
}

static int64_t units_of(const std::vector<Event> &events, const std::string &name) {
  int64_t units = 0;
  for (const Event &event : events) units += event.name == name ? event.units : 0;
  return units;
}

static bool contains(const std::string &where, const std::string &what) {
  return where.find(what) != std::string::npos;
}

static void nothing(void *, int, int, int64_t) noexcept {}

static void busy(void *, int, int, int64_t) noexcept {
  const int64_t until = ktk::now_ns() + 20000;
  while (ktk::now_ns() < until) ktk::pause_cpu();
}

static void run(WorkerPool &pool, int64_t units, const SpanLabel &label, WorkerPool::UnitFn fn = &nothing) {
  const std::vector<int64_t> counts(static_cast<size_t>(pool.subpools()), units);
  pool.run(counts.data(), fn, nullptr, label);
}

TEST(off_is_off) {
  WorkerPool pool({{0, 2}}, false, 0);
  CHECK_EQUAL(ktk::tracing(), 0u);
  run(pool, 10, {Stage::down, 3});
  Trace trace(0);
  CHECK(ktk::tracing() != 0);
  trace.stop();
  CHECK_EQUAL(ktk::tracing(), 0u);
  run(pool, 10, {Stage::down, 3});
  const std::string json = trace.json();
  CHECK_EQUAL(events_of(json).size(), size_t{0});
  CHECK(contains(json, "\"traceEvents\":["));
  CHECK(contains(json, "\"dropped_spans\":0"));
}

TEST(each_stage_has_its_own_name) {
  std::set<std::string> names;
  for (int stage = 0; stage < static_cast<int>(Stage::count); ++stage)
    names.insert(ktk::stage_name(static_cast<Stage>(stage)));
  CHECK_EQUAL(names.size(), static_cast<size_t>(Stage::count));
  CHECK_EQUAL(std::string(ktk::stage_name(Stage::gate_up)), std::string("gate_up"));
}

TEST(a_section_is_a_span_of_each_worker) {
  WorkerPool pool({{0, 3}, {0, 2}}, false, 100000);
  Trace trace(0);
  const int64_t counts[] = {40, 20};
  pool.run(counts, &busy, nullptr, {Stage::gate_up, 7});
  trace.stop();
  const std::string json = trace.json();
  std::map<std::pair<int, int>, int> lanes;
  std::map<int, int64_t> units;
  std::set<int64_t> sections;
  double begin = 1e30, end = 0;
  for (const Event &event : events_of(json)) {
    if (event.name == "wait") continue;
    CHECK_EQUAL(event.name, std::string("gate_up"));
    CHECK_EQUAL(event.layer, int64_t{7});
    CHECK(event.pid == 0 || event.pid == 1);
    CHECK(event.tid >= 0 && event.tid < pool.threads(event.pid));
    CHECK(event.ts >= 0 && event.dur >= 0);
    ++lanes[{event.pid, event.tid}];
    units[event.pid] += event.units;
    sections.insert(event.section);
    begin = std::min(begin, event.ts);
    end = std::max(end, event.ts + event.dur);
  }
  for (const auto &[lane, spans] : lanes) CHECK_EQUAL(spans, 1);
  CHECK_EQUAL(units[0], int64_t{40});
  CHECK_EQUAL(units[1], int64_t{20});
  CHECK_EQUAL(sections.size(), size_t{1});
  // 60 units of 20 us on 5 threads, or on as few CPUs as there are.
  CHECK(end - begin > 60 * 20 / 5 * 0.9);
  CHECK(end <= number(json, "duration_us"));
  CHECK(contains(json, "subpool 1 (NUMA node 0)"));
  CHECK(contains(json, "\"pools\":[{\"pids\":[0,1],\"threads\":5}]"));
}

TEST(nothing_of_a_finished_section_is_missing) {
  WorkerPool pool({{0, 3}}, false, 100000);
  for (int round = 0; round < 40; ++round) {
    Trace trace(1024);
    for (int i = 0; i < 5; ++i) run(pool, 17, {Stage::down, i});
    CHECK_EQUAL(units_of(stopped(trace), "down"), int64_t{5 * 17});
  }
}

TEST(one_thread_and_one_unit) {
  WorkerPool pool({{0, 1}}, false, 0);
  Trace trace(0);
  run(pool, 9, {Stage::pack});
  run(pool, 1, {Stage::merge, 2});
  const std::vector<Event> events = stopped(trace);
  CHECK_EQUAL(events.size(), size_t{2});
  CHECK_EQUAL(units_of(events, "pack"), int64_t{9});
  CHECK_EQUAL(units_of(events, "merge"), int64_t{1});
  for (const Event &event : events) CHECK(event.pid == 0 && event.tid == 0);
  CHECK_EQUAL(events[0].layer, int64_t{-1});
}

// On a new thread, since a ring never shrinks.
TEST(the_latest_spans_are_kept_and_others_counted) {
  std::thread([] {
    WorkerPool pool({{0, 1}}, false, 0);
    for (const int wanted : {1, 3, 7, 31}) {
      Trace trace(wanted);
      for (int i = 0; i < 100; ++i) run(pool, 1, {Stage::down, i});
      trace.stop();
      const std::string json = trace.json();
      const std::vector<Event> events = events_of(json);
      const auto kept = static_cast<int64_t>(events.size());
      CHECK_EQUAL(kept, int64_t{wanted});
      CHECK_EQUAL(static_cast<int64_t>(number(json, "dropped_spans")), 100 - kept);
      for (size_t i = 0; i < events.size(); ++i)
        CHECK_EQUAL(events[i].layer, 100 - kept + static_cast<int64_t>(i));
    }
  }).join();
}

TEST(more_spans_when_a_later_trace_asks_for_them) {
  std::thread([] {
    WorkerPool pool({{0, 1}}, false, 0);
    Trace outer(3);
    for (int i = 0; i < 10; ++i) run(pool, 1, {Stage::pack});
    {
      Trace large(1000);
      for (int i = 0; i < 500; ++i) run(pool, 1, {});
      CHECK_EQUAL(stopped(large).size(), size_t{500});
    }
    // What the outer one recorded before is still there.
    const std::vector<Event> events = stopped(outer);
    CHECK_EQUAL(units_of(events, "pack"), int64_t{3});
    CHECK_EQUAL(units_of(events, "section"), int64_t{500});
  }).join();
}

TEST(traces_inside_traces) {
  WorkerPool pool({{0, 1}}, false, 0);
  Trace outer(0);
  run(pool, 1, {Stage::route});
  {
    Trace inner(0);
    run(pool, 1, {Stage::down});
    const std::vector<Event> events = stopped(inner);
    CHECK_EQUAL(events.size(), size_t{1});
    CHECK_EQUAL(events[0].name, std::string("down"));
    inner.stop();
  }
  CHECK(ktk::tracing() != 0);
  run(pool, 1, {Stage::merge});
  CHECK_EQUAL(stopped(outer).size(), size_t{3});
  CHECK_EQUAL(ktk::tracing(), 0u);
}

TEST(wrong_uses) {
  CHECK_THROWS(KTK_ERR_ARGUMENT, "spans_per_thread: got -1", Trace(-1));
  CHECK_THROWS(KTK_ERR_ARGUMENT, "expected 0 to 16777215", Trace(1 << 24));
  CHECK_EQUAL(ktk::tracing(), 0u);
  Trace trace(0);
  CHECK_THROWS(KTK_ERR_STATE, "still running", trace.json());
  CHECK_THROWS(KTK_ERR_STATE, "still running", trace.write("/tmp/never"));
}

TEST(the_queue_has_a_lane_of_its_own) {
  WorkerPool pool({{0, 2}}, false, 0);
  Trace trace(0);
  {
    TaskQueue queue(pool);
    queue.submit({[](void *) { usleep(3000); }, nullptr, nullptr, true});
    queue.submit({[](void *context) {
                    auto &in = *static_cast<WorkerPool *>(context);
                    const SpanScope span(in.own_lane(), {Stage::forward, 4}, 6);
                    run(in, 8, {Stage::down, 4});
                  },
                  nullptr, &pool});
    queue.sync();
  }
  trace.stop();
  const std::string json = trace.json();
  CHECK(contains(json, "\"name\":\"queue\""));
  CHECK(contains(json, "\"name\":\"caller "));
  CHECK(contains(json, "\"name\":\"worker "));
  std::map<std::string, Event> by_name;
  for (const Event &event : events_of(json)) by_name[event.name] = event;
  CHECK_EQUAL(by_name["forward"].units, int64_t{6});
  CHECK_EQUAL(by_name["forward"].tid, by_name["task"].tid);
  CHECK(by_name["forward"].tid != by_name["sync"].tid);
  CHECK(by_name["task"].dur > 2900 && by_name["sync"].dur > 2000);
  CHECK(by_name["down"].ts >= by_name["forward"].ts);
}

TEST(two_pools_and_threads_that_have_ended) {
  Trace trace(0);
  for (int i = 0; i < 2; ++i) {
    WorkerPool pool({{0, 2}}, false, 100000);
    run(pool, 30, {Stage::down, i}, &busy);
  }
  std::thread([] {
    WorkerPool pool({{0, 1}}, false, 0);
    run(pool, 1, {Stage::pack});
  }).join();
  trace.stop();
  const std::string json = trace.json();
  const std::vector<Event> events = events_of(json);
  CHECK_EQUAL(units_of(events, "down"), int64_t{60});
  CHECK_EQUAL(units_of(events, "pack"), int64_t{1});
  std::set<int> pids;
  for (const Event &event : events) pids.insert(event.pid);
  CHECK_EQUAL(pids.size(), size_t{3});
  CHECK_EQUAL(*pids.begin(), 0);
  CHECK_EQUAL(*pids.rbegin(), 2);
  CHECK(contains(json, ", subpool 0 (NUMA node 0)"));
}

TEST(times_are_those_of_the_clock) {
  Trace trace(0);
  WorkerPool pool({{0, 1}}, false, 0);
  const int64_t began = ktk::now_ns();
  {
    const SpanScope span(pool.own_lane(), {Stage::task}, 1);
    usleep(50000);
  }
  const double elapsed_us = static_cast<double>(ktk::now_ns() - began) / 1000;
  const std::vector<Event> events = stopped(trace);
  CHECK_EQUAL(events.size(), size_t{1});
  CHECK(events[0].dur > 49900 && events[0].dur < elapsed_us * 1.001 + 100);
}

TEST(start_and_stop_while_sections_run) {
  WorkerPool pool({{0, 2}}, false, 20000);
  std::atomic<bool> done{false};
  std::thread submitter([&] {
    while (!done.load()) run(pool, 5, {Stage::down, 1});
  });
  int64_t seen = 0;
  for (int round = 0; round < 60; ++round) {
    Trace trace(round % 2 == 0 ? 16 : 256);
    usleep(500);
    for (const Event &event : stopped(trace)) {
      CHECK(event.units >= 0 && event.units <= 5);
      CHECK(event.name == "down" || event.name == "wait");
      CHECK(event.dur >= 0 && event.dur < 1e7);
      seen += event.units;
    }
  }
  done.store(true);
  submitter.join();
  CHECK(seen > 0);
}

// ThreadSanitizer refuses threads in the child of a process with threads.
#if !KTK_TEST_TSAN
TEST(fork) {
  WorkerPool pool({{0, 2}}, false, 0);
  Trace trace(0);
  run(pool, 4, {Stage::down, 1});
  const pid_t child = ::fork();
  if (child == 0) {
    const bool off = ktk::tracing() == 0;
    trace.stop();
    const bool empty = events_of(trace.json()).empty();
    Trace own(0);
    run(pool, 6, {Stage::merge, 2});
    const std::vector<Event> events = stopped(own);
    _exit(off && empty && units_of(events, "merge") == 6 && units_of(events, "down") == 0 ? 0 : 1);
  }
  int status = -1;
  CHECK_EQUAL(waitpid(child, &status, 0), child);
  CHECK_EQUAL(status, 0);
  run(pool, 4, {Stage::down, 1});
  CHECK_EQUAL(units_of(stopped(trace), "down"), int64_t{8});
}
#endif

TEST(files) {
  char folder[] = "/tmp/ktk-trace-XXXXXX";
  CHECK(mkdtemp(folder) != nullptr);
  const std::string path = std::string(folder) + "/a \"trace\".json";
  WorkerPool pool({{0, 1}}, false, 0);
  Trace trace(0);
  // More than one piece of the file.
  for (int i = 0; i < 20000; ++i) run(pool, 1, {Stage::down, i % 50});
  trace.stop();
  const auto read = [&] {
    std::ifstream file(path);
    std::stringstream contents;
    contents << file.rdbuf();
    return contents.str();
  };
  for (int again = 0; again < 2; ++again) {
    trace.write(path);
    CHECK(read() == trace.json());
  }
  CHECK_EQUAL(events_of(read()).size(), size_t{20000});
  CHECK(contains(read(), "\n]}\n") && !contains(read(), ",\n]"));
  CHECK_THROWS(KTK_ERR_SYSTEM, "No such file or directory", trace.write(std::string(folder) + "/no/where"));
  CHECK_THROWS(KTK_ERR_SYSTEM, "cannot write the trace to", trace.write(folder));
  CHECK_EQUAL(unlink(path.c_str()), 0);
  // Nothing else was left behind.
  CHECK_EQUAL(rmdir(folder), 0);
}
