#include <pthread.h>

#include <algorithm>
#include <string>
#include <thread>

#include "check.h"
#include "machines.h"
#include "runtime/topology.h"

using ktk::Topology;
using namespace ktk_test;

TEST(cpu_lists) {
  CHECK_EQUAL(show(ktk::parse_cpu_list("0-3,8,10-11")), "0 1 2 3 8 10 11");
  CHECK_EQUAL(show(ktk::parse_cpu_list("")), "");
  CHECK_EQUAL(show(ktk::parse_cpu_list("5\n")), "5");
  CHECK_EQUAL(show(ktk::parse_cpu_list("3-1,4")), "4");
  CHECK_EQUAL(show(ktk::parse_cpu_list("1,x,2")), "1");
  CHECK_EQUAL(show(ktk::parse_cpu_list("1-")), "");
  CHECK_EQUAL(show(ktk::parse_cpu_list("-4")), "");
  CHECK(ktk::parse_cpu_list("0-999999999999").size() <= size_t{1} << 16);
  CHECK_EQUAL(ktk::format_cpu_list({11, 0, 1, 2, 8, 10}), "0-2,8,10-11");
  CHECK_EQUAL(ktk::format_cpu_list({}), "");
}

TEST(dual_socket_with_smt) {
  Machine machine;
  make_dual_socket(machine);
  const Topology topology = Topology::read(machine.root());
  CHECK_EQUAL(topology.cpus.size(), size_t{16});
  CHECK_EQUAL(topology.nodes.size(), size_t{2});
  CHECK_EQUAL(show(topology.nodes[0].cpus), "0 1 2 3 8 9 10 11");
  CHECK_EQUAL(show(topology.nodes[1].cpus), "4 5 6 7 12 13 14 15");
  CHECK_EQUAL(topology.nodes[1].physical_cores, 4);
  CHECK_EQUAL(topology.nodes[1].memory_bytes, int64_t{2000} * 1024);
  CHECK_EQUAL(topology.cpus[12].package, 1);
  CHECK_EQUAL(topology.cpus[12].core, 4);
  CHECK_EQUAL(topology.cpus[12].node, 1);
  CHECK_EQUAL(topology.allowed_cpus(), 16);
  CHECK_EQUAL(topology.usable_cpus(), 16);
  CHECK_EQUAL(show(topology.nodes_with_cpus()), "0 1");
  CHECK(topology.find(1) == &topology.nodes[1]);
  CHECK(topology.find(2) == nullptr);
  CHECK_EQUAL(topology.describe(), "node 0: 8 CPUs on 4 cores, node 1: 8 CPUs on 4 cores");
}

TEST(sub_numa_clusters) {
  Machine machine;
  make_sub_numa(machine);
  const Topology topology = Topology::read(machine.root());
  CHECK_EQUAL(topology.nodes.size(), size_t{4});
  CHECK_EQUAL(show(topology.nodes[0].cpus), "0 2 8 10");
  CHECK_EQUAL(show(topology.nodes[3].cpus), "5 7 13 15");
  CHECK_EQUAL(topology.cpus[13].package, 1);
}

TEST(four_nodes_in_one_package) {
  Machine machine;
  make_four_nodes(machine);
  const Topology topology = Topology::read(machine.root());
  CHECK_EQUAL(show(topology.nodes_with_cpus()), "0 1 2 3");
  CHECK_EQUAL(show(topology.nodes[2].cpus), "4 5 12 13");
  CHECK_EQUAL(topology.nodes[2].physical_cores, 2);
}

TEST(laptop) {
  Machine machine;
  make_laptop(machine);
  const Topology topology = Topology::read(machine.root());
  CHECK_EQUAL(topology.nodes.size(), size_t{1});
  CHECK_EQUAL(show(topology.nodes[0].cpus), "0 2 4 6 1 3 5 7");
  CHECK_EQUAL(topology.nodes[0].physical_cores, 4);
}

TEST(affinity_mask_of_a_container) {
  Machine machine;
  make_laptop(machine);
  const std::vector<int> mask = {1, 4, 5};
  const Topology topology = Topology::read(machine.root(), &mask);
  CHECK_EQUAL(show(topology.nodes[0].cpus), "1 4 5");
  CHECK_EQUAL(topology.nodes[0].physical_cores, 2);
  CHECK_EQUAL(topology.allowed_cpus(), 3);
  CHECK_EQUAL(topology.cpus.size(), size_t{8});
}

TEST(cgroup_cpuset_and_quota) {
  Machine machine;
  make_laptop(machine);
  machine.write("proc/self/cgroup", "0::/pod/box\n");
  machine.write("sys/fs/cgroup/pod/box/cpuset.cpus.effective", "2-3,6\n");
  machine.write("sys/fs/cgroup/pod/cpuset.cpus.effective", "0-7\n");
  machine.write("sys/fs/cgroup/pod/box/cpu.max", "max 100000\n");
  machine.write("sys/fs/cgroup/pod/cpu.max", "150000 100000\n");
  const Topology topology = Topology::read(machine.root());
  CHECK_EQUAL(show(topology.nodes[0].cpus), "2 6 3");
  CHECK_EQUAL(topology.cpu_quota, 1.5);
  CHECK_EQUAL(topology.usable_cpus(), 2);
}

TEST(cgroup_path_of_the_host) {
  Machine machine;
  make_laptop(machine);
  machine.write("proc/self/cgroup", "0::/../../elsewhere/x\n");
  machine.write("sys/fs/cgroup/cpu.max", "400000 100000\n");
  CHECK_EQUAL(Topology::read(machine.root()).cpu_quota, 4.0);
}

TEST(version_1_quota) {
  Machine machine;
  make_laptop(machine);
  machine.write("proc/self/cgroup", "4:memory:/a\n3:cpu,cpuacct:/a\n0::/\n");
  machine.write("sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us", "50000\n");
  machine.write("sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us", "100000\n");
  machine.write("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "-1\n");
  machine.write("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000\n");
  const Topology topology = Topology::read(machine.root());
  CHECK_EQUAL(topology.cpu_quota, 0.5);
  CHECK_EQUAL(topology.usable_cpus(), 1);
}

TEST(node_without_cpus_and_node_without_memory) {
  Machine machine;
  make_laptop(machine);
  machine.online_nodes("0,2,5");
  machine.node(2, "", 64000);
  machine.node(5, "", 0);
  const Topology topology = Topology::read(machine.root());
  CHECK_EQUAL(topology.nodes.size(), size_t{3});
  CHECK_EQUAL(topology.nodes[1].id, 2);
  CHECK(topology.nodes[1].cpus.empty());
  CHECK_EQUAL(topology.nodes[1].memory_bytes, int64_t{64000} * 1024);
  CHECK_EQUAL(topology.nodes[2].memory_bytes, int64_t{0});
  CHECK_EQUAL(show(topology.nodes_with_cpus()), "0");
  CHECK_EQUAL(topology.describe(), "node 0: 8 CPUs on 4 cores, node 2: no CPUs, node 5: no CPUs");
}

TEST(nodes_that_nobody_names) {
  Machine machine;
  make_laptop(machine);
  machine.online_nodes("0-3");
  machine.node(0, "", 1000);
  machine.node(1, "0-3", 1000);
  machine.node(2, "", 1000);
  machine.node(3, "4-7", 1000);
  const Topology topology = Topology::read(machine.root());
  CHECK_EQUAL(show(topology.first_nodes(1)), "1");
  CHECK_EQUAL(show(topology.first_nodes(2)), "1 3");
  CHECK_THROWS(KTK_ERR_ARGUMENT, "3 subpools, but this machine has node 0: no CPUs, node 1: 4 CPUs",
               topology.first_nodes(3));
}

TEST(offline_cpu) {
  Machine machine;
  make_dual_socket(machine);
  machine.online_cpus("0-1,3-15");
  machine.cpu(10, 0, "10");
  const Topology topology = Topology::read(machine.root());
  CHECK_EQUAL(topology.cpus.size(), size_t{15});
  CHECK_EQUAL(show(topology.nodes[0].cpus), "0 1 3 10 8 9 11");
  CHECK_EQUAL(topology.nodes[0].physical_cores, 4);
}

TEST(no_node_directory) {
  Machine machine;
  machine.online_cpus("0-3");
  machine.write("proc/meminfo", "MemTotal:       8000 kB\n");
  const Topology topology = Topology::read(machine.root());
  CHECK_EQUAL(topology.nodes.size(), size_t{1});
  CHECK_EQUAL(topology.nodes[0].id, 0);
  CHECK_EQUAL(show(topology.nodes[0].cpus), "0 1 2 3");
  CHECK_EQUAL(topology.nodes[0].memory_bytes, int64_t{8000} * 1024);
}

TEST(empty_root) {
  Machine machine;
  const Topology topology = Topology::read(machine.root());
  CHECK_EQUAL(topology.allowed_cpus(), 1);
  const std::vector<int> mask = {2, 3};
  CHECK_EQUAL(show(Topology::read(machine.root(), &mask).nodes[0].cpus), "2 3");
}

TEST(node_list_missing_but_directories_there) {
  Machine machine;
  machine.online_cpus("0-3");
  machine.node(0, "0-1", 10);
  machine.node(3, "2-3", 10);
  const Topology topology = Topology::read(machine.root());
  CHECK_EQUAL(show(topology.nodes_with_cpus()), "0 3");
}

TEST(this_machine) {
  const Topology topology = Topology::read();
  CHECK(topology.allowed_cpus() >= 1);
  CHECK_EQUAL(static_cast<size_t>(topology.allowed_cpus()), ktk::thread_affinity().size());
  CHECK(!topology.nodes_with_cpus().empty());
}

TEST(affinity_of_this_thread_counts) {
  const std::vector<int> all = ktk::thread_affinity();
  std::thread narrow([&all] {
    CHECK_EQUAL(ktk::set_thread_affinity(pthread_self(), {all.back()}), 0);
    CHECK_EQUAL(show(ktk::thread_affinity()), std::to_string(all.back()));
    CHECK_EQUAL(ktk::Topology::read().allowed_cpus(), 1);
  });
  narrow.join();
  CHECK(ktk::set_thread_affinity(pthread_self(), {}) != 0);
}

// Balanced brackets outside strings and no control characters: enough to catch a broken writer.
static bool looks_like_json(const std::string &json) {
  int depth = 0;
  bool in_string = false;
  for (size_t i = 0; i < json.size(); ++i) {
    const char c = json[i];
    if (static_cast<unsigned char>(c) < 0x20 || static_cast<unsigned char>(c) >= 0x7f) return false;
    if (in_string) {
      if (c == '\\') ++i;
      if (c == '"') in_string = false;
      continue;
    }
    if (c == '"') in_string = true;
    if (c == '{' || c == '[') ++depth;
    if (c == '}' || c == ']') --depth;
    if (depth < 0) return false;
  }
  return depth == 0 && !in_string && json.front() == '{' && json.back() == '}';
}

TEST(machine_description) {
  Machine machine;
  make_dual_socket(machine);
  machine.write("proc/cpuinfo",
                "processor\t: 0\nmodel name\t: A \"quoted\" \\ CPU \x01 \xc3\xa9\nflags\t: x\n");
  machine.write("proc/meminfo", "MemTotal: 99 kB\nHugePages_Total:      7\nHugepagesize:       2048 kB\n");
  machine.write("sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never\n");
  const std::string json = ktk::machine_json(machine.root());
  CHECK(looks_like_json(json));
  for (const char *part : {"\"cpu_model\": \"A \\\"quoted\\\" \\\\ CPU \\u0001 \\u00c3\\u00a9\"",
                           "\"cpus_online\": 16", "\"physical_cores\": 8", "\"packages\": 2",
                           "\"cpu_quota\": null", "{\"id\": 1, \"cpus_online\": [4, 5, 6, 7, 12, 13, 14, 15]",
                           "\"memory_bytes\": 2048000", "\"transparent\": \"madvise\"",
                           "\"page_bytes\": 2097152", "\"reserved\": 7", "\"cuda\": {\"available\": "}) {
    if (json.find(part) == std::string::npos)
      record_failure(__FILE__, __LINE__, std::string(part) + " not in " + json);
  }
  CHECK(looks_like_json(ktk::machine_json()));
}
