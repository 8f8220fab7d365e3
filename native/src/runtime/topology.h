// CPUs, cores and NUMA nodes of the machine, as far as this process may use them.
#pragma once

#include <pthread.h>

#include <cstdint>
#include <string>
#include <vector>

namespace ktk {

struct Topology {
  struct Cpu {
    int id;
    int core;     // lowest CPU id of the same physical core
    int package;  // -1 where the kernel does not say
    int node;
    bool allowed;  // by the affinity mask and the cgroup
  };

  struct Node {
    int id;
    std::vector<int> cpus;  // allowed ones: one of each physical core first, then the SMT siblings
    int physical_cores;     // with at least one allowed CPU
    int64_t memory_bytes;   // 0 for a node without memory
  };

  std::vector<Cpu> cpus;    // online, ascending
  std::vector<Node> nodes;  // online, ascending; a node may have no CPUs
  double cpu_quota = 0;     // CPUs' worth of time that the cgroup grants; 0: no limit

  // Reads sysfs, procfs and cgroupfs below `root`. `allowed` replaces the calling thread's affinity
  // mask, which counts only for the root "/". Missing files mean one node 0 with every CPU.
  static Topology read(const std::string &root = "/", const std::vector<int> *allowed = nullptr);

  const Node *find(int node) const noexcept;  // nullptr: no such node
  std::vector<int> nodes_with_cpus() const;   // ids of nodes with allowed CPUs, ascending
  // The first `count` of them. Throws KTK_ERR_ARGUMENT when there are fewer.
  std::vector<int> first_nodes(int count) const;
  int allowed_cpus() const noexcept;
  // CPUs that can run at the same time: allowed ones, within the quota; at least 1.
  int usable_cpus() const noexcept;
  // One line for messages: "node 0: 8 CPUs on 4 cores, node 1: no CPUs".
  std::string describe() const;
};

// Parses a kernel CPU list such as "0-3,8"; anything malformed ends the list.
std::vector<int> parse_cpu_list(const std::string &list);
std::string format_cpu_list(std::vector<int> cpus);

// CPUs that the calling thread may run on; empty when the kernel does not say.
std::vector<int> thread_affinity();
// Restricts a thread to `cpus`; returns 0 or an errno value.
int set_thread_affinity(pthread_t thread, const std::vector<int> &cpus) noexcept;

// JSON object: cpu_model, architecture, cpus_online, cpus_allowed, physical_cores, cpu_quota (null: no
// limit), nodes, huge_pages and cuda.
std::string machine_json(const std::string &root = "/");

}  // namespace ktk
