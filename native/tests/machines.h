// Small sysfs trees with the shape that the kernel gives them on machines of different kinds.
#pragma once

#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "runtime/topology.h"

namespace ktk_test {

class Machine {
 public:
  Machine() {
    char name[] = "/tmp/ktk-machine-XXXXXX";
    if (mkdtemp(name) == nullptr) std::abort();
    root_ = name;
  }
  ~Machine() {
    std::error_code ignored;
    std::filesystem::remove_all(root_, ignored);
  }
  Machine(const Machine &) = delete;
  Machine &operator=(const Machine &) = delete;

  const std::string &root() const { return root_; }

  void write(const std::string &path, const std::string &contents) {
    const std::filesystem::path file = std::filesystem::path(root_) / path;
    std::filesystem::create_directories(file.parent_path());
    std::ofstream(file) << contents;
  }

  void online_cpus(const std::string &list) { write("sys/devices/system/cpu/online", list + "\n"); }

  void cpu(int id, int package, const std::string &siblings) {
    const std::string directory = "sys/devices/system/cpu/cpu" + std::to_string(id) + "/topology/";
    write(directory + "physical_package_id", std::to_string(package) + "\n");
    write(directory + "core_cpus_list", siblings + "\n");
  }

  void online_nodes(const std::string &list) { write("sys/devices/system/node/online", list + "\n"); }

  void node(int id, const std::string &cpus, long long memory_kib) {
    const std::string number = std::to_string(id);
    const std::string directory = "sys/devices/system/node/node" + number + "/";
    write(directory + "cpulist", cpus + "\n");
    write(directory + "meminfo", "Node " + number + " MemTotal:       " + std::to_string(memory_kib) +
                                     " kB\nNode " + number + " MemFree:        1024 kB\n");
  }

  // Cores first .. first + count - 1 with siblings `distance` higher (0: no SMT).
  void cores(int first, int count, int package, int distance) {
    for (int i = first; i < first + count; ++i) {
      if (distance == 0) {
        cpu(i, package, std::to_string(i));
        continue;
      }
      const std::string siblings = std::to_string(i) + "," + std::to_string(i + distance);
      cpu(i, package, siblings);
      cpu(i + distance, package, siblings);
    }
  }

 private:
  std::string root_;
};

// Two packages of four cores with SMT; siblings in the upper half of the numbers.
inline void make_dual_socket(Machine &machine) {
  machine.online_cpus("0-15");
  machine.cores(0, 4, 0, 8);
  machine.cores(4, 4, 1, 8);
  machine.online_nodes("0-1");
  machine.node(0, "0-3,8-11", 1000);
  machine.node(1, "4-7,12-15", 2000);
}

// Two packages with sub-NUMA clustering: two nodes each, CPUs of a package dealt in turn.
inline void make_sub_numa(Machine &machine) {
  machine.online_cpus("0-15");
  machine.cores(0, 4, 0, 8);
  machine.cores(4, 4, 1, 8);
  machine.online_nodes("0-3");
  machine.node(0, "0,2,8,10", 1000);
  machine.node(1, "1,3,9,11", 1000);
  machine.node(2, "4,6,12,14", 1000);
  machine.node(3, "5,7,13,15", 1000);
}

// One package in four nodes.
inline void make_four_nodes(Machine &machine) {
  machine.online_cpus("0-15");
  machine.cores(0, 8, 0, 8);
  machine.online_nodes("0-3");
  machine.node(0, "0-1,8-9", 1000);
  machine.node(1, "2-3,10-11", 1000);
  machine.node(2, "4-5,12-13", 1000);
  machine.node(3, "6-7,14-15", 1000);
}

// One node; neighbouring CPUs are siblings.
inline void make_laptop(Machine &machine) {
  machine.online_cpus("0-7");
  for (int i = 0; i < 8; ++i)
    machine.cpu(i, 0, std::to_string(i / 2 * 2) + "-" + std::to_string(i / 2 * 2 + 1));
  machine.online_nodes("0");
  machine.node(0, "0-7", 16000);
}

inline std::vector<int> list(std::initializer_list<int> values) { return values; }

inline std::string show(const std::vector<int> &values) {
  std::string out;
  for (const int value : values) out += (out.empty() ? "" : " ") + std::to_string(value);
  return out;
}

}  // namespace ktk_test
