#include "engine/probe.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>

#include "core/dispatch.h"
#include "core/status.h"
#include "engine/geometry.h"
#include "engine/sections.h"
#include "runtime/wait.h"

namespace ktk {
namespace {

// A unit of work: a huge page, about what a kernel reads in one unit of a layer.
constexpr int64_t kChunkBytes = int64_t{2} << 20;
constexpr int64_t kUnitsOfThread = 8;  // of multiplications, for threads to even out
constexpr int64_t kMostRepeats = int64_t{1} << 40;

}  // namespace

Probe::Probe(const ktk_probe_config &config, std::shared_ptr<PoolContext> context)
    : backend_(runnable_backend(config.isa)), context_(std::move(context)), kind_(config.kind) {
  require(kind_ >= KTK_PROBE_PRODUCT && kind_ <= KTK_PROBE_COPY, "probe kind ", kind_,
          " is unknown; use 0 (product), 1 (read) or 2 (copy)");
  if (kind_ == KTK_PROBE_PRODUCT) {
    require(is_format(config.format), "format ", config.format, " is unknown; use ", kFormatsText);
    require(config.bytes == 0, "bytes is ", config.bytes, ", but a product probe reads no memory; use 0");
    for (const ProductLoop &loop : backend_.formats[config.format].products.loop) {
      if (loop.name != nullptr) variants_.push_back({loop.name, &loop, 0, 0, false, false});
    }
    return;
  }
  require(config.format == 0, "format is ", config.format, ", but only a product probe has one; use 0");
  require(config.bytes > 0 && config.bytes <= std::numeric_limits<size_t>::max() / 4,
          "bytes must be positive for a read or copy probe, got ", config.bytes,
          "; take several times the last-level cache");
  if (kind_ == KTK_PROBE_READ) {
    for (const bool side_by_side : {false, true}) {
      for (const int32_t streams : {1, 2, 4}) {
        for (const int64_t prefetch : {0, 512, 1024, 2048, 4096, 8192}) {
          std::string name = std::to_string(streams) + (streams == 1 ? " stream" : " streams");
          name += side_by_side ? ", threads side by side" : ", threads apart";
          name += prefetch == 0 ? ", no prefetch" : ", prefetch " + std::to_string(prefetch);
          variants_.push_back({name, nullptr, streams, prefetch, side_by_side, false});
        }
      }
    }
  } else {
    variants_.push_back({"plain stores", nullptr, 1, 0, false, false});
    variants_.push_back({"streaming stores", nullptr, 1, 0, false, true});
  }
  const WorkerPool &pool = context_->pool;
  const auto chunks = divide_up(static_cast<int64_t>(config.bytes), kChunkBytes);
  const int64_t of_thread = std::max<int64_t>(divide_up(chunks, pool.thread_count()), 1);
  for (int s = 0; s < pool.subpools(); s++) {
    const auto bytes = static_cast<size_t>(of_thread * pool.threads(s) * kChunkBytes);
    NodeBuffer to = kind_ == KTK_PROBE_COPY ? NodeBuffer(bytes, pool.node(s), true) : NodeBuffer();
    areas_.push_back({NodeBuffer(bytes, pool.node(s), true), std::move(to), of_thread});
  }
  fill();
}

// Calls use(area, offset in bytes) for each chunk, on the threads of the pool.
template <typename Use>
void Probe::for_each_chunk(bool side_by_side, Use use) {
  WorkerPool &pool = context_->pool;
  std::vector<int64_t> units;
  for (int s = 0; s < pool.subpools(); s++)
    units.push_back(areas_[static_cast<size_t>(s)].chunks_of_thread * pool.threads(s));
  const auto unit = [&](int s, int, int64_t index) {
    const Area &area = areas_[static_cast<size_t>(s)];
    if (side_by_side) index = index % area.chunks_of_thread * pool.threads(s) + index / area.chunks_of_thread;
    use(area, index * kChunkBytes);
  };
  run_section(pool, {}, units.data(), unit);
}

// Written by the threads that will read it; a page that nobody has written is a shared page of zeros.
void Probe::fill() {
  const std::lock_guard<std::mutex> lock(context_->pool.forward_mutex());
  std::atomic<uint32_t> sum{0};
  for_each_chunk(false, [&](const Area &area, int64_t offset) {
    auto *words = reinterpret_cast<uint32_t *>(const_cast<char *>(area.from.data()) + offset);
    uint32_t of_chunk = 0;
    for (int64_t i = 0; i < kChunkBytes / 4; i++) {
      words[i] = static_cast<uint32_t>(offset / 4 + i) * 2654435761u;
      of_chunk += words[i];
    }
    sum += of_chunk;
    if (area.to.size() > 0) std::memset(const_cast<char *>(area.to.data()) + offset, 0, kChunkBytes);
  });
  sum_ = sum;
}

const Probe::Variant &Probe::at(int32_t variant) const {
  require(variant >= 0 && variant < variants(), "variant ", variant, " does not exist; the probe has ",
          variants());
  return variants_[static_cast<size_t>(variant)];
}

const char *Probe::variant_name(int32_t variant) const { return at(variant).name.c_str(); }

Probe::Result Probe::run(int32_t variant, int64_t repeats) {
  const Variant &chosen = at(variant);
  require(repeats > 0 && repeats <= kMostRepeats, "repeats must be between 1 and ", kMostRepeats, ", got ",
          repeats);
  const std::lock_guard<std::mutex> lock(context_->pool.forward_mutex());
  const int64_t begin = now_ns();
  double work = 0;
  if (kind_ == KTK_PROBE_PRODUCT) {
    work = multiply(chosen, repeats);
  } else {
    for (int64_t i = 0; i < repeats; i++) work += kind_ == KTK_PROBE_READ ? read(chosen) : copy(chosen);
  }
  return {work, static_cast<double>(now_ns() - begin) * 1e-9};
}

double Probe::multiply(const Variant &variant, int64_t repeats) {
  WorkerPool &pool = context_->pool;
  std::vector<int64_t> units;
  for (int s = 0; s < pool.subpools(); s++) units.push_back(pool.threads(s) * kUnitsOfThread);
  const int64_t of_unit = divide_up(repeats, kUnitsOfThread);
  // Bits that differ, and bf16 values near 1: multipliers that see zeros draw less power, and may be clocked
  // higher than real work allows.
  alignas(64) uint8_t operands[kProbeOperandBytes];
  for (int i = 0; i < kProbeOperandBytes; i++)
    operands[i] = static_cast<uint8_t>(i % 2 != 0 ? 0x3f : 0x40 + i * 37 % 64);
  const auto unit = [&](int, int, int64_t) {
    alignas(64) int32_t result[16];
    const ProductLoopArgs args = {operands, of_unit, result};
    variant.loop->run(&args);
  };
  run_section(pool, {}, units.data(), unit);
  return static_cast<double>(of_unit * kUnitsOfThread) * pool.thread_count() *
         static_cast<double>(variant.loop->operations);
}

double Probe::read(const Variant &variant) {
  std::atomic<uint32_t> sum{0};
  double bytes = 0;
  for (const Area &area : areas_) bytes += static_cast<double>(area.from.size());
  for_each_chunk(variant.side_by_side, [&](const Area &area, int64_t offset) {
    uint32_t of_chunk = 0;
    const ReadArgs args = {reinterpret_cast<const uint8_t *>(area.from.data()) + offset, kChunkBytes,
                           variant.streams, variant.prefetch_bytes, &of_chunk};
    backend_.read(&args);
    sum.fetch_add(of_chunk, std::memory_order_relaxed);
  });
  if (sum != sum_) fail(KTK_ERR_INTERNAL, "the read probe (", variant.name, ") missed some of its memory");
  return bytes;
}

double Probe::copy(const Variant &variant) {
  double bytes = 0;
  for (const Area &area : areas_) bytes += 2 * static_cast<double>(area.from.size());
  for_each_chunk(false, [&](const Area &area, int64_t offset) {
    const CopyArgs args = {reinterpret_cast<uint8_t *>(const_cast<char *>(area.to.data())) + offset,
                           reinterpret_cast<const uint8_t *>(area.from.data()) + offset, kChunkBytes,
                           variant.streaming};
    backend_.copy(&args);
  });
  return bytes;
}

}  // namespace ktk
