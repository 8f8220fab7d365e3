// Numbers of a benchmark and their spread, as JSON.
#pragma once

#include <stdlib.h>

#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <fstream>
#include <string>
#include <vector>

namespace ktk_bench {

inline double quantile(std::vector<double> &values, double at) {
  const auto index = static_cast<size_t>(at * static_cast<double>(values.size() - 1));
  std::nth_element(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(index), values.end());
  return values[index];
}

inline double median(std::vector<double> values) { return quantile(values, 0.5); }

class Json {
 public:
  Json &number(const std::string &key, double value) {
    char text[32];
    std::snprintf(text, sizeof(text), "%.6g", value);
    return raw(key, text);
  }
  Json &string(const std::string &key, const std::string &value) { return raw(key, '"' + value + '"'); }
  Json &raw(const std::string &key, const std::string &value) {
    body_ += (body_.empty() ? "" : ", ") + ('"' + key + "\": ") + value;
    return *this;
  }
  std::string text() const { return '{' + body_ + '}'; }

 private:
  std::string body_;
};

inline std::string spread(std::vector<double> values) {
  return Json()
      .number("samples", static_cast<double>(values.size()))
      .number("min", *std::min_element(values.begin(), values.end()))
      .number("p25", quantile(values, 0.25))
      .number("median", quantile(values, 0.5))
      .number("p75", quantile(values, 0.75))
      .number("p99", quantile(values, 0.99))
      .text();
}

inline std::string cpu_model() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);)
    if (line.compare(0, 10, "model name") == 0) return line.substr(line.find(':') + 2);
  return "";
}

// Processes that ran or wanted to in the last minute, ours included.
inline std::string load_average() {
  double load = 0;
  return getloadavg(&load, 1) == 1 ? std::to_string(load) : "null";
}

}  // namespace ktk_bench
