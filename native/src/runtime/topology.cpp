#include "runtime/topology.h"

#include <dirent.h>
#include <sched.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <locale>
#include <map>
#include <set>
#include <sstream>
#include <utility>

#include "core/status.h"
#include "runtime/cuda_shim.h"

namespace ktk {
namespace {

// Far above any machine; keeps a damaged list such as "0-999999999" from taking all memory.
constexpr int kMaxCpus = 1 << 16;

bool read_file(const std::string &path, std::string *contents) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return false;
  contents->assign(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
  return !file.bad();
}

// First line without surrounding blanks; "" when the file is missing.
std::string read_line(const std::string &path) {
  std::string contents;
  if (!read_file(path, &contents)) return "";
  contents.resize(std::min(contents.find('\n'), contents.size()));
  const size_t first = contents.find_first_not_of(" \t\r");
  if (first == std::string::npos) return "";
  return contents.substr(first, contents.find_last_not_of(" \t\r") - first + 1);
}

int64_t read_integer(const std::string &path, int64_t otherwise) {
  const std::string line = read_line(path);
  char *end = nullptr;
  errno = 0;
  const long long value = std::strtoll(line.c_str(), &end, 10);
  return end == line.c_str() || errno != 0 ? otherwise : value;
}

// Ids N of the entries "prefixN" of a directory.
std::vector<int> numbered_entries(const std::string &path, const std::string &prefix) {
  std::vector<int> ids;
  DIR *directory = opendir(path.c_str());
  if (directory == nullptr) return ids;
  while (const dirent *entry = readdir(directory)) {
    const std::string name = entry->d_name;
    if (name.size() <= prefix.size() || name.compare(0, prefix.size(), prefix) != 0) continue;
    const std::string digits = name.substr(prefix.size());
    if (digits.find_first_not_of("0123456789") != std::string::npos || digits.size() > 6) continue;
    ids.push_back(std::atoi(digits.c_str()));
  }
  closedir(directory);
  std::sort(ids.begin(), ids.end());
  return ids;
}

// Value in bytes of a "Name:  123 kB" line of a meminfo file; 0 when it is missing.
int64_t meminfo_bytes(const std::string &contents, const std::string &name) {
  size_t at = contents.find(name + ":");
  if (at == std::string::npos) return 0;
  return std::strtoll(contents.c_str() + at + name.size() + 1, nullptr, 10) * 1024;
}

struct CgroupPaths {
  std::string unified;     // path in the v2 hierarchy, "" when the process is in none
  std::string controller;  // path of the v1 cpu controller
};

CgroupPaths read_cgroup_paths(const std::string &root) {
  CgroupPaths paths;
  std::string contents;
  if (!read_file(root + "proc/self/cgroup", &contents)) return paths;
  std::istringstream lines(contents);
  for (std::string line; std::getline(lines, line);) {
    const size_t first = line.find(':');
    const size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const std::string path = line.substr(second + 1);
    if (controllers.empty()) paths.unified = path;
    if (("," + controllers + ",").find(",cpu,") != std::string::npos) paths.controller = path;
  }
  return paths;
}

// Calls visit(directory) for a cgroup and its parents, whose limits apply too. Inside a container the
// path may be the host's; then only the mounted root exists, and it is the container's own group.
template <typename Visit>
void for_each_cgroup(const std::string &mount, std::string path, Visit visit) {
  if (path.empty()) return;
  for (;;) {
    while (!path.empty() && path.back() == '/') path.pop_back();
    visit(mount + path);
    if (path.empty()) return;
    path.resize(path.find_last_of('/') == std::string::npos ? 0 : path.find_last_of('/'));
  }
}

void lower_quota(double *quota, double limit) {
  if (limit > 0 && (*quota == 0 || limit < *quota)) *quota = limit;
}

double read_cpu_quota(const std::string &root) {
  double quota = 0;
  const CgroupPaths paths = read_cgroup_paths(root);
  for (const char *mount : {"sys/fs/cgroup", "sys/fs/cgroup/unified"}) {
    for_each_cgroup(root + mount, paths.unified, [&quota](const std::string &directory) {
      std::istringstream line(read_line(directory + "/cpu.max"));
      double limit = 0;
      double period = 0;
      if (line >> limit >> period && period > 0) lower_quota(&quota, limit / period);
    });
  }
  for (const char *mount : {"sys/fs/cgroup/cpu", "sys/fs/cgroup/cpu,cpuacct"}) {
    for_each_cgroup(root + mount, paths.controller, [&quota](const std::string &directory) {
      const int64_t limit = read_integer(directory + "/cpu.cfs_quota_us", -1);
      const int64_t period = read_integer(directory + "/cpu.cfs_period_us", 0);
      if (limit > 0 && period > 0)
        lower_quota(&quota, static_cast<double>(limit) / static_cast<double>(period));
    });
  }
  return quota;
}

// CPUs of the innermost cgroup that names some; empty: no restriction found.
std::vector<int> read_cgroup_cpus(const std::string &root) {
  std::vector<int> cpus;
  const CgroupPaths paths = read_cgroup_paths(root);
  for_each_cgroup(root + "sys/fs/cgroup", paths.unified, [&cpus](const std::string &directory) {
    if (cpus.empty()) cpus = parse_cpu_list(read_line(directory + "/cpuset.cpus.effective"));
  });
  return cpus;
}

std::vector<int> read_online_cpus(const std::string &cpu_root) {
  std::vector<int> online = parse_cpu_list(read_line(cpu_root + "online"));
  if (online.empty()) online = parse_cpu_list(read_line(cpu_root + "present"));
  if (online.empty()) online = numbered_entries(cpu_root, "cpu");
  return online;
}

std::string with_slash(std::string root) {
  if (root.empty() || root.back() != '/') root += '/';
  return root;
}

// Allowed CPUs of a node: the first of each core, then the second of each, and so on.
void order_cpus(const std::vector<Topology::Cpu> &cpus, Topology::Node *node) {
  std::map<int, std::vector<int>> cores;
  size_t most = 0;
  for (const Topology::Cpu &cpu : cpus) {
    if (cpu.node != node->id || !cpu.allowed) continue;
    std::vector<int> &core = cores[cpu.core];
    core.push_back(cpu.id);
    most = std::max(most, core.size());
  }
  for (size_t sibling = 0; sibling < most; ++sibling) {
    for (const auto &core : cores) {
      if (sibling < core.second.size()) node->cpus.push_back(core.second[sibling]);
    }
  }
  node->physical_cores = static_cast<int>(cores.size());
}

std::string json_string(const std::string &value) {
  static const char digits[] = "0123456789abcdef";
  std::string out = "\"";
  for (const char c : value) {
    const unsigned char byte = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (byte < 0x20 || byte >= 0x7f) {
      // Bytes outside ASCII become U+0080..U+00FF, so the text is valid whatever its encoding was.
      out += "\\u00";
      out += digits[byte >> 4];
      out += digits[byte & 15];
    } else {
      out += c;
    }
  }
  return out + "\"";
}

template <typename Values>
std::string json_integers(const Values &values) {
  std::string out = "[";
  for (const auto value : values) {
    if (out.size() > 1) out += ", ";
    out += std::to_string(value);
  }
  return out + "]";
}

std::string json_string_or_null(const std::string &value) {
  return value.empty() ? "null" : json_string(value);
}

std::string read_cpu_model(const std::string &root) {
  std::ifstream file(root + "proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (line.compare(0, 10, "model name") != 0) continue;
    const size_t colon = line.find(':');
    if (colon == std::string::npos) break;
    const size_t first = line.find_first_not_of(" \t", colon + 1);
    return first == std::string::npos ? "" : line.substr(first);
  }
  return "";
}

// The mode in brackets of a line such as "always [madvise] never".
std::string read_selected(const std::string &path) {
  const std::string line = read_line(path);
  const size_t open = line.find('[');
  const size_t close = line.find(']');
  if (open == std::string::npos || close == std::string::npos || close < open) return "";
  return line.substr(open + 1, close - open - 1);
}

std::string json_number(double value) {
  std::ostringstream stream;
  stream.imbue(std::locale::classic());
  stream << value;
  return stream.str();
}

}  // namespace

std::vector<int> parse_cpu_list(const std::string &list) {
  std::set<int> cpus;
  const char *at = list.c_str();
  for (;;) {
    char *end = nullptr;
    const long first = std::strtol(at, &end, 10);
    if (end == at || first < 0) break;
    long last = first;
    if (*end == '-') {
      at = end + 1;
      last = std::strtol(at, &end, 10);
      if (end == at) break;
    }
    for (long cpu = first; cpu <= last && cpu < kMaxCpus; ++cpu) cpus.insert(static_cast<int>(cpu));
    if (*end != ',') break;
    at = end + 1;
  }
  return std::vector<int>(cpus.begin(), cpus.end());
}

std::string format_cpu_list(std::vector<int> cpus) {
  std::sort(cpus.begin(), cpus.end());
  std::string out;
  for (size_t i = 0; i < cpus.size();) {
    size_t last = i;
    while (last + 1 < cpus.size() && cpus[last + 1] == cpus[last] + 1) ++last;
    if (!out.empty()) out += ',';
    out += std::to_string(cpus[i]);
    if (last > i) out += "-" + std::to_string(cpus[last]);
    i = last + 1;
  }
  return out;
}

std::vector<int> thread_affinity() {
  // The kernel rejects masks smaller than its own, whose size is not published.
  for (int size = 1024; size <= kMaxCpus; size *= 2) {
    cpu_set_t *set = CPU_ALLOC(static_cast<size_t>(size));
    if (set == nullptr) return {};
    const size_t bytes = CPU_ALLOC_SIZE(static_cast<size_t>(size));
    CPU_ZERO_S(bytes, set);
    std::vector<int> cpus;
    const int failure = pthread_getaffinity_np(pthread_self(), bytes, set);
    for (int cpu = 0; failure == 0 && cpu < size; ++cpu) {
      if (CPU_ISSET_S(static_cast<size_t>(cpu), bytes, set)) cpus.push_back(cpu);
    }
    CPU_FREE(set);
    if (failure == 0) return cpus;
    if (failure != EINVAL) break;
  }
  return {};
}

int set_thread_affinity(pthread_t thread, const std::vector<int> &cpus) noexcept {
  if (cpus.empty()) return EINVAL;
  const int size = *std::max_element(cpus.begin(), cpus.end()) + 1;
  cpu_set_t *set = CPU_ALLOC(static_cast<size_t>(size));
  if (set == nullptr) return ENOMEM;
  const size_t bytes = CPU_ALLOC_SIZE(static_cast<size_t>(size));
  CPU_ZERO_S(bytes, set);
  for (const int cpu : cpus) CPU_SET_S(static_cast<size_t>(cpu), bytes, set);
  const int failure = pthread_setaffinity_np(thread, bytes, set);
  CPU_FREE(set);
  return failure;
}

Topology Topology::read(const std::string &root_path, const std::vector<int> *allowed) {
  const std::string root = with_slash(root_path);
  const std::string cpu_root = root + "sys/devices/system/cpu/";
  const std::string node_root = root + "sys/devices/system/node/";
  Topology topology;

  std::vector<int> online = read_online_cpus(cpu_root);
  std::vector<int> mask;
  bool masked = false;
  if (allowed != nullptr) {
    mask = *allowed;
    masked = true;
  } else if (root == "/") {
    mask = thread_affinity();
    masked = !mask.empty();
  }
  if (online.empty()) online = masked ? mask : std::vector<int>{0};
  std::set<int> usable(online.begin(), online.end());
  if (masked) usable = std::set<int>(mask.begin(), mask.end());
  const std::vector<int> group = read_cgroup_cpus(root);
  if (!group.empty()) {
    const std::set<int> inside(group.begin(), group.end());
    std::set<int> both;
    std::set_intersection(usable.begin(), usable.end(), inside.begin(), inside.end(),
                          std::inserter(both, both.end()));
    if (!both.empty()) usable = std::move(both);
  }

  std::map<int, int> node_of;
  std::vector<int> node_ids = parse_cpu_list(read_line(node_root + "online"));
  if (node_ids.empty()) node_ids = numbered_entries(node_root, "node");
  std::sort(online.begin(), online.end());
  for (const int id : node_ids) {
    const std::string directory = node_root + "node" + std::to_string(id);
    for (const int cpu : parse_cpu_list(read_line(directory + "/cpulist"))) node_of[cpu] = id;
    std::string meminfo;
    read_file(directory + "/meminfo", &meminfo);
    topology.nodes.push_back(Node{id, {}, 0, meminfo_bytes(meminfo, "MemTotal")});
  }
  if (topology.nodes.empty()) {
    std::string meminfo;
    read_file(root + "proc/meminfo", &meminfo);
    topology.nodes.push_back(Node{0, {}, 0, meminfo_bytes(meminfo, "MemTotal")});
  }

  for (const int id : online) {
    const std::string directory = cpu_root + "cpu" + std::to_string(id) + "/topology/";
    std::vector<int> siblings = parse_cpu_list(read_line(directory + "core_cpus_list"));
    if (siblings.empty()) siblings = parse_cpu_list(read_line(directory + "thread_siblings_list"));
    const auto node = node_of.find(id);
    topology.cpus.push_back(Cpu{id, siblings.empty() ? id : siblings.front(),
                                static_cast<int>(read_integer(directory + "physical_package_id", -1)),
                                node == node_of.end() ? topology.nodes.front().id : node->second,
                                usable.count(id) != 0});
  }
  for (Node &node : topology.nodes) order_cpus(topology.cpus, &node);
  topology.cpu_quota = read_cpu_quota(root);
  return topology;
}

const Topology::Node *Topology::find(int node) const noexcept {
  for (const Node &candidate : nodes) {
    if (candidate.id == node) return &candidate;
  }
  return nullptr;
}

std::vector<int> Topology::nodes_with_cpus() const {
  std::vector<int> ids;
  for (const Node &node : nodes) {
    if (!node.cpus.empty()) ids.push_back(node.id);
  }
  return ids;
}

std::vector<int> Topology::first_nodes(int count) const {
  std::vector<int> ids = nodes_with_cpus();
  require(static_cast<size_t>(count) <= ids.size(), count, " subpools, but this machine has ", describe(),
          "; name the node of each subpool");
  ids.resize(static_cast<size_t>(count));
  return ids;
}

int Topology::allowed_cpus() const noexcept {
  return static_cast<int>(
      std::count_if(cpus.begin(), cpus.end(), [](const Cpu &cpu) { return cpu.allowed; }));
}

int Topology::usable_cpus() const noexcept {
  int usable = allowed_cpus();
  if (cpu_quota > 0 && cpu_quota < usable) usable = static_cast<int>(std::ceil(cpu_quota));
  return std::max(usable, 1);
}

std::string Topology::describe() const {
  std::ostringstream stream;
  for (const Node &node : nodes) {
    stream << (&node == &nodes.front() ? "" : ", ") << "node " << node.id << ": ";
    if (node.cpus.empty())
      stream << "no CPUs";
    else
      stream << node.cpus.size() << " CPUs on " << node.physical_cores << " cores";
  }
  return stream.str();
}

std::string machine_json(const std::string &root_path) {
  const std::string root = with_slash(root_path);
  const Topology topology = Topology::read(root);
  std::vector<int> allowed;
  std::set<int> packages;
  int physical_cores = 0;
  for (const Topology::Cpu &cpu : topology.cpus) {
    if (cpu.allowed) allowed.push_back(cpu.id);
    packages.insert(cpu.package);
  }
  std::string nodes;
  for (const Topology::Node &node : topology.nodes) {
    physical_cores += node.physical_cores;
    std::vector<int> online;
    for (const Topology::Cpu &cpu : topology.cpus) {
      if (cpu.node == node.id) online.push_back(cpu.id);
    }
    nodes += nodes.empty() ? "" : ", ";
    nodes += "{\"id\": " + std::to_string(node.id) + ", \"cpus_online\": " + json_integers(online) +
             ", \"cpus_allowed\": " + json_integers(node.cpus) +
             ", \"physical_cores\": " + std::to_string(node.physical_cores) +
             ", \"memory_bytes\": " + std::to_string(node.memory_bytes) + "}";
  }
  std::string meminfo;
  read_file(root + "proc/meminfo", &meminfo);
  utsname system = {};
  uname(&system);
  const CudaInfo cuda = cuda_info();
  return "{\"cpu_model\": " + json_string_or_null(read_cpu_model(root)) +
         ", \"architecture\": " + json_string(system.machine) +
         ", \"kernel\": " + json_string(system.release) +
         ", \"packages\": " + std::to_string(packages.size()) +
         ", \"cpus_online\": " + std::to_string(topology.cpus.size()) +
         ", \"cpus_allowed\": " + json_integers(allowed) +
         ", \"physical_cores\": " + std::to_string(physical_cores) +
         ", \"cpu_quota\": " + (topology.cpu_quota > 0 ? json_number(topology.cpu_quota) : "null") +
         ", \"nodes\": [" + nodes + "]" + ", \"huge_pages\": {\"transparent\": " +
         json_string_or_null(read_selected(root + "sys/kernel/mm/transparent_hugepage/enabled")) +
         ", \"page_bytes\": " + std::to_string(meminfo_bytes(meminfo, "Hugepagesize")) +
         ", \"reserved\": " + std::to_string(meminfo_bytes(meminfo, "HugePages_Total") / 1024) +
         "}, \"cuda\": {\"available\": " + (cuda.available ? "true" : "false") +
         ", \"library\": " + json_string_or_null(cuda.library) +
         ", \"runtime_version\": " + json_string_or_null(cuda.runtime_version) +
         ", \"reason\": " + json_string_or_null(cuda.reason) + "}}";
}

}  // namespace ktk
