// What a matrix unit leaves of its peak: bare loops of tile products and loads, and bare products of a layer.
//
//   tile_bench [--cpus LIST] [--seconds S] [--only loops|products] [--json FILE]
//
// Needs AMX. Every line runs on all CPUs of the list at once (default: all that the process may use) and
// between two runs of a loop of products without loads, of which it is given as a fraction. Operands are
// arbitrary bytes and results are thrown away: this is about time alone.
#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <fstream>
#include <functional>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "core/cpu.h"
#include "report.h"
#include "runtime/memory.h"
#include "runtime/topology.h"
#include "runtime/wait.h"

using ktk::NodeBuffer;
using namespace ktk_bench;

namespace {

// Only these functions may use the instructions: the rest of the program runs before it is known that the CPU
// has them.
#define TILES __attribute__((target("amx-tile,amx-int8,avx512f,avx512bw")))
// The intrinsics do not tell the compiler which memory they touch.
#define FENCE() __asm__ volatile("" ::: "memory")
#define LOAD(number, address) _tile_loadd(number, address, 64)
#define DOT(sum, a, b) _tile_dpbsud(sum, a, b)

constexpr uint32_t kNeeds = ktk::kNeedsAvx512F | ktk::kNeedsAvx512Bw | ktk::kNeedsAmxTile |
                            ktk::kNeedsAmxInt8 | ktk::kNeedsOsZmm | ktk::kNeedsOsTiles |
                            ktk::kNeedsTilePalette | ktk::kNeedsTilePermission;
constexpr double kOperations = 2.0 * 16 * 16 * 64;  // of one product
constexpr int64_t kTile = 1024;

// ---- threads -------------------------------------------------------------------------------------

// Threads bound to CPUs, the caller the first of them, which spin for the next call.
class Team {
 public:
  explicit Team(const std::vector<int> &cpus) : size_(static_cast<int>(cpus.size())) {
    if (ktk::set_thread_affinity(pthread_self(), {cpus[0]}) != 0)
      throw std::runtime_error("cannot bind a thread");
    for (int t = 1; t < size_; ++t) {
      threads_.emplace_back([this, t, cpu = cpus[static_cast<size_t>(t)]] {
        ktk::set_thread_affinity(pthread_self(), {cpu});
        for (uint32_t seen = 0;; ++seen) {
          while (calls_.load(std::memory_order_acquire) == seen) ktk::pause_cpu();
          if (!work_) return;
          work_(t);
          done_.fetch_add(1, std::memory_order_acq_rel);
        }
      });
    }
  }
  ~Team() {
    work_ = nullptr;
    calls_.fetch_add(1, std::memory_order_release);
    for (std::thread &thread : threads_) thread.join();
  }
  int size() const { return size_; }

  // Seconds that work(0) .. work(size - 1) take together.
  double run(std::function<void(int)> work) {
    work_ = std::move(work);
    done_.store(0, std::memory_order_relaxed);
    const int64_t begin = ktk::now_ns();
    calls_.fetch_add(1, std::memory_order_release);
    work_(0);
    while (done_.load(std::memory_order_acquire) != size_ - 1) ktk::pause_cpu();
    return static_cast<double>(ktk::now_ns() - begin) * 1e-9;
  }

 private:
  const int size_;
  std::vector<std::thread> threads_;
  std::function<void(int)> work_;
  std::atomic<uint32_t> calls_{0};
  std::atomic<int> done_{0};
};

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

TILES void configure() {
  const TileConfig config;
  FENCE();
  _tile_loadconfig(&config);
}

TILES void release() { _tile_release(); }

template <int kCount>
TILES void zero_sums() {
  _tile_zero(0);
  if (kCount > 1) _tile_zero(1);
  if (kCount > 2) _tile_zero(2);
  if (kCount > 3) _tile_zero(3);
}

// Four products on one sum, `rounds` times: of the loops without loads the fastest, since it leaves the
// processor most registers to rename. Operands must have been loaded: products of zeroed registers are faster
// than any others.
TILES void peak_loop(const uint8_t *operands, int rounds) {
  configure();
  _tile_zero(0);
  LOAD(4, operands);
  LOAD(6, operands + kTile);
  for (int i = 0; i < rounds; ++i) {
    DOT(0, 4, 6);
    DOT(0, 4, 6);
    DOT(0, 4, 6);
    DOT(0, 4, 6);
  }
  release();
}

// Four sums of two tiles of rows and two of weights, in eight registers.
TILES void four_sums_loop(const uint8_t *operands, int rounds) {
  configure();
  zero_sums<4>();
  LOAD(4, operands);
  LOAD(5, operands + kTile);
  LOAD(6, operands);
  LOAD(7, operands + kTile);
  for (int i = 0; i < rounds; ++i) {
    DOT(0, 4, 6);
    DOT(1, 4, 7);
    DOT(2, 5, 6);
    DOT(3, 5, 7);
  }
  release();
}

// ---- loops ---------------------------------------------------------------------------------------

// Operands of one thread, each in a ring whose size is a power of two.
struct Rings {
  const uint8_t *a, *b;
  int64_t a_bytes, b_bytes;
};

enum class Loop { two_by_two, four_by_turns, two_by_two_one, four_one_one, three_one_one, two_one_one };

// Registers 0 .. 3 are sums; a product reads one register of `a` (rows) and one of `b` (weights).
template <Loop kLoop>
TILES void load_loop(const Rings &rings, int rounds) {
  configure();
  zero_sums<4>();
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
  int64_t x = 0, y = 0;
  for (int i = 0; i < rounds; ++i) {
    const uint8_t *a = rings.a + (x & (rings.a_bytes - 1)), *b = rings.b + (y & (rings.b_bytes - 1));
    if constexpr (kLoop == Loop::two_by_two) {
      LOAD(4, a);
      LOAD(6, b);
      LOAD(7, b + kTile);
      DOT(0, 4, 6);
      LOAD(5, a + kTile);
      DOT(1, 4, 7);
      DOT(2, 5, 6);
      DOT(3, 5, 7);
      x += 2 * kTile;
      y += 2 * kTile;
    }
    if constexpr (kLoop == Loop::four_by_turns) {
      const uint8_t *next = rings.a + ((x + 4 * kTile) & (rings.a_bytes - 1));
      LOAD(7, b);
      DOT(0, 4, 6);
      LOAD(4, a + 2 * kTile);
      DOT(1, 5, 6);
      LOAD(5, a + 3 * kTile);
      DOT(2, 4, 6);
      LOAD(4, next);
      DOT(3, 5, 6);
      LOAD(5, next + kTile);
      LOAD(6, b + kTile);
      DOT(0, 4, 7);
      LOAD(4, next + 2 * kTile);
      DOT(1, 5, 7);
      LOAD(5, next + 3 * kTile);
      DOT(2, 4, 7);
      LOAD(4, a);
      DOT(3, 5, 7);
      LOAD(5, a + kTile);
      x += 8 * kTile;
      y += 2 * kTile;
    }
    if constexpr (kLoop == Loop::two_by_two_one) {
      LOAD(4, a);
      LOAD(5, b);
      LOAD(6, b + kTile);
      DOT(0, 4, 5);
      DOT(1, 4, 6);
      LOAD(4, a + kTile);
      DOT(2, 4, 5);
      DOT(3, 4, 6);
      x += 2 * kTile;
      y += 2 * kTile;
    }
    if constexpr (kLoop == Loop::four_one_one) {
      LOAD(5, b);
      LOAD(4, a);
      DOT(0, 4, 5);
      LOAD(4, a + kTile);
      DOT(1, 4, 5);
      LOAD(4, a + 2 * kTile);
      DOT(2, 4, 5);
      LOAD(4, a + 3 * kTile);
      DOT(3, 4, 5);
      x += 4 * kTile;
      y += kTile;
    }
    if constexpr (kLoop == Loop::three_one_one) {
      LOAD(4, b);
      LOAD(3, a);
      DOT(0, 3, 4);
      LOAD(3, a + kTile);
      DOT(1, 3, 4);
      LOAD(3, a + 2 * kTile);
      DOT(2, 3, 4);
      x += 3 * kTile;
      y += kTile;
    }
    if constexpr (kLoop == Loop::two_one_one) {
      LOAD(3, b);
      LOAD(2, a);
      DOT(0, 2, 3);
      LOAD(2, a + kTile);
      DOT(1, 2, 3);
      x += 2 * kTile;
      y += kTile;
    }
  }
  release();
}

struct LoopCase {
  const char *name;
  int registers, products;  // of one round
  double loads;             // a product
  void (*run)(const Rings &, int);
};

const LoopCase kLoops[] = {
    {"2 x 2 accumulators, 2 operands each way", 8, 4, 1, load_loop<Loop::two_by_two>},
    {"4 x 1, operands by turns", 8, 8, 1.25, load_loop<Loop::four_by_turns>},
    {"2 x 2, one register for rows", 7, 4, 1, load_loop<Loop::two_by_two_one>},
    {"4 x 1, one register for rows and one for weights", 6, 4, 1.25, load_loop<Loop::four_one_one>},
    {"3 x 1, the same", 5, 3, 4.0 / 3, load_loop<Loop::three_one_one>},
    {"2 x 1, the same", 4, 2, 1.5, load_loop<Loop::two_one_one>},
};

// ---- products of a layer -------------------------------------------------------------------------

// Gate and up of all experts: int8 rows [rows][K], in tiles of 16 rows by 64, times tiles of weights, two
// columns of tiles side by side.
struct Layer {
  const char *name;
  int depth, columns, rows, experts, repeats;
  int steps() const { return depth / 64; }
};

const Layer kLayers[] = {{"DeepSeek-V3, 1024 rows an expert", 7168, 4096, 1024, 16, 1},
                         {"Qwen3-30B-A3B, 256 rows an expert", 2048, 1536, 256, 128, 1},
                         {"a unit within the second level", 512, 256, 256, 64, 16}};

constexpr int kBlockRows = 256;  // whose sums are kept
constexpr int kUnitTiles = 16;   // columns of tiles of one unit of work
constexpr int kBlockSteps = 8;   // of 64 of K
constexpr int kAhead = 2;        // steps that weights are fetched ahead

struct Weights {
  const uint8_t *base;
  int64_t tile_bytes, steps;
  const uint8_t *at(int column, int64_t step) const {
    return base + (column / 2 * 2 * steps + 2 * step + column % 2) * tile_bytes;
  }
};

// Memory of one thread.
struct Scratch {
  float *sums;        // of kBlockRows rows and kUnitTiles columns of tiles
  uint8_t *expanded;  // weights of a unit and block of K
  int32_t *leaving;   // two lots of four tiles
};

TILES void fetch(const uint8_t *tile) {
  for (int i = 0; i < 16; ++i) _mm_prefetch(reinterpret_cast<const char *>(tile + i * 64), _MM_HINT_T0);
}

// Sums of whole numbers, scaled, on to those in fp32.
TILES void add_scaled(const int32_t *from, float *to, int rows) {
  const __m512 scale = _mm512_set1_ps(1e-3f);
  for (int r = 0; r < rows; ++r) {
    const __m512 sums = _mm512_maskz_cvtepi32_ps(0xffff, _mm512_loadu_si512(from + r * 16));
    _mm512_storeu_ps(to + r * 16, _mm512_fmadd_ps(sums, scale, _mm512_loadu_ps(to + r * 16)));
  }
}

// Nibbles times a multiplier, less an offset: int4 with integer scales as int8.
TILES void expand(const uint8_t *nibbles, uint8_t *to, int multiplier) {
  const __m512i mask = _mm512_set1_epi8(15), offset = _mm512_set1_epi8(static_cast<char>(multiplier));
  const __m512i times = _mm512_set1_epi16(static_cast<int16_t>(multiplier));
  for (int i = 0; i < 8; ++i) {
    const __m512i both = _mm512_loadu_si512(nibbles + i * 64);
    const __m512i low = _mm512_and_si512(both, mask);
    const __m512i high = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
    _mm512_storeu_si512(to + i * 64, _mm512_add_epi8(_mm512_mullo_epi16(low, times), offset));
    _mm512_storeu_si512(to + 512 + i * 64, _mm512_add_epi8(_mm512_mullo_epi16(high, times), offset));
  }
}

// Four tiles to memory or from it, of which `count` are in use.
template <int kCount>
TILES void store_sums(void *to) {
  auto *at = static_cast<uint8_t *>(to);
  FENCE();
  _tile_stored(0, at, 64);
  if (kCount > 1) _tile_stored(1, at + kTile, 64);
  if (kCount > 2) _tile_stored(2, at + 2 * kTile, 64);
  if (kCount > 3) _tile_stored(3, at + 3 * kTile, 64);
  FENCE();
}
template <int kCount>
TILES void load_sums(const void *from) {
  const auto *at = static_cast<const uint8_t *>(from);
  FENCE();
  LOAD(0, at);
  if (kCount > 1) LOAD(1, at + kTile);
  if (kCount > 2) LOAD(2, at + 2 * kTile);
  if (kCount > 3) LOAD(3, at + 3 * kTile);
}

// Rows are kept and weights stream past: kRows tiles of rows by one of weights, two registers of operands.
// With kLeave above 0 sums leave the tiles every kLeave steps and are scaled; with kInt4 weights are expanded
// first.
template <int kRows, int kLeave, bool kInt4>
TILES void rows_kept(const Layer &layer, const uint8_t *rows, const Weights &weights, int tiles,
                     const Scratch &scratch) {
  const int steps = layer.steps();
  const int64_t row_tiles = 16 * int64_t{layer.depth};
  for (int first = 0; first < layer.rows; first += kBlockRows) {
    const int last = std::min(first + kBlockRows, layer.rows);
    for (int k = 0; k < steps; k += kBlockSteps) {
      const int count = std::min(kBlockSteps, steps - k);
      if (kInt4) {
        for (int j = 0; j < tiles; ++j) {
          for (int s = 0; s < count; ++s)
            expand(weights.at(j, k + s), scratch.expanded + (j * kBlockSteps + s) * kTile, 1 + (j + s) % 14);
        }
        FENCE();
      }
      const auto weight = [&](int j, int s) {
        return kInt4 ? scratch.expanded + (j * kBlockSteps + s) * kTile : weights.at(j, k + s);
      };
      for (int r = first; r < last; r += 16 * kRows) {
        const uint8_t *a = rows + r / 16 * row_tiles + k * kTile;
        for (int j = 0; j < tiles; ++j) {
          float *sums = scratch.sums + ((r - first) / 16 * tiles + j * kRows) * 256;
          if (k == 0) {
            zero_sums<kRows>();
            if (kLeave > 0) std::memset(sums, 0, kRows * kTile);
          } else if (kLeave == 0) {
            load_sums<kRows>(sums);
          }
          int lot = 0;
          bool waiting = false;
          for (int s = 0; s < count; ++s) {
            if (kLeave > 0 && s % std::max(kLeave, 1) == 0) zero_sums<kRows>();
            if (s + kAhead < count)
              fetch(weight(j, s + kAhead));
            else if (j + 1 < tiles)
              fetch(weight(j + 1, s + kAhead - count));
            LOAD(5, weight(j, s));
            LOAD(4, a + s * kTile);
            DOT(0, 4, 5);
            if (kRows > 1) {
              LOAD(4, a + row_tiles + s * kTile);
              DOT(1, 4, 5);
            }
            if (kRows > 2) {
              LOAD(4, a + 2 * row_tiles + s * kTile);
              DOT(2, 4, 5);
            }
            if (kRows > 3) {
              LOAD(4, a + 3 * row_tiles + s * kTile);
              DOT(3, 4, 5);
            }
            if (kLeave > 0) {
              // What left last is scaled between these products, a part at each step.
              constexpr int kPart = 16 * kRows / std::max(kLeave, 1);
              const int at = s % std::max(kLeave, 1) * kPart * 16;
              if (waiting) add_scaled(scratch.leaving + (lot ^ 1) * 1024 + at, sums + at, kPart);
              if ((s + 1) % std::max(kLeave, 1) == 0) {
                store_sums<kRows>(scratch.leaving + lot * 1024);
                waiting = true;
                lot ^= 1;
              }
            }
          }
          if (kLeave > 0)
            add_scaled(scratch.leaving + (lot ^ 1) * 1024, sums, 16 * kRows);
          else
            store_sums<kRows>(sums);
        }
      }
    }
  }
}

// Four tiles of weights by a block of K are kept and rows stream past: 2 x 2 sums, eight registers.
TILES void weights_kept(const Layer &layer, const uint8_t *rows, const Weights &weights, int tiles,
                        const Scratch &scratch) {
  const int steps = layer.steps();
  const int64_t row_tiles = 16 * int64_t{layer.depth};
  for (int first = 0; first < layer.rows; first += kBlockRows) {
    const int last = std::min(first + kBlockRows, layer.rows);
    for (int k = 0; k < steps; k += kBlockSteps) {
      const int count = std::min(kBlockSteps, steps - k);
      for (int j0 = 0; j0 < tiles; j0 += 4) {
        for (int r = first; r < last; r += 32) {
          const uint8_t *a = rows + r / 16 * row_tiles + k * kTile;
          for (int j = j0; j < std::min(j0 + 4, tiles); j += 2) {
            float *sums = scratch.sums + ((r - first) / 16 * tiles + j * 2) * 256;
            if (k == 0)
              zero_sums<4>();
            else
              load_sums<4>(sums);
            for (int s = 0; s < count; ++s) {
              LOAD(4, a + s * kTile);
              LOAD(6, weights.at(j, k + s));
              LOAD(7, weights.at(j + 1, k + s));
              DOT(0, 4, 6);
              LOAD(5, a + row_tiles + s * kTile);
              DOT(1, 4, 7);
              DOT(2, 5, 6);
              DOT(3, 5, 7);
            }
            store_sums<4>(sums);
          }
        }
      }
    }
  }
}

// Two columns of tiles of weights by a block of K are kept and rows stream past, by loads that leave the
// first level alone: 1 x 2 sums, four registers. Rows must lie block of K by block of K, or their blocks meet
// in few sets of the second level.
TILES void columns_kept(const Layer &layer, const uint8_t *rows, const Weights &weights, int tiles,
                        const Scratch &scratch) {
  const int steps = layer.steps();
  for (int first = 0; first < layer.rows; first += kBlockRows) {
    const int blocks = (std::min(first + kBlockRows, layer.rows) - first) / 16;
    const uint8_t *pass = rows + int64_t{first} * layer.depth;
    for (int k = 0; k < steps; k += kBlockSteps) {
      const int count = std::min(kBlockSteps, steps - k);
      for (int j = 0; j < tiles; j += 2) {
        const bool more = j + 2 < tiles;
        const bool ahead = more || k + count < steps;
        const uint8_t *next = weights.at(more ? j + 2 : 0, more ? k : k + count);
        int line = 0;
        for (int r = 0; r < blocks; ++r) {
          const uint8_t *a = pass + (int64_t{k} * blocks + int64_t{r} * count) * kTile;
          float *sums = scratch.sums + (r * tiles + j) * 256;
          if (k == 0)
            zero_sums<2>();
          else
            load_sums<2>(sums);
          for (int s = 0; s < count; ++s) {
            for (int i = 0; ahead && i < 32 / blocks && line < 32 * count; ++i, ++line)
              _mm_prefetch(reinterpret_cast<const char *>(next + line * 64), _MM_HINT_T1);
            _tile_stream_loadd(4, a + s * kTile, 64);
            LOAD(5, weights.at(j, k + s));
            DOT(0, 4, 5);
            LOAD(5, weights.at(j + 1, k + s));
            DOT(1, 4, 5);
          }
          store_sums<2>(sums);
        }
      }
    }
  }
}

struct ProductCase {
  const char *name;
  int registers;
  bool int4;
  void (*run)(const Layer &, const uint8_t *, const Weights &, int, const Scratch &);
};

const ProductCase kProducts[] = {
    {"two columns of weights kept, rows by TILELOADDT1", 4, false, columns_kept},
    {"four tiles of weights kept, rows stream past", 8, false, weights_kept},
    {"4 x 1, rows kept, weights stream past", 6, false, rows_kept<4, 0, false>},
    {"2 x 1, the same", 4, false, rows_kept<2, 0, false>},
    {"4 x 1, sums leave the tiles every 128 columns", 6, false, rows_kept<4, 2, false>},
    {"4 x 1, every 256 columns", 6, false, rows_kept<4, 4, false>},
    {"4 x 1, int4 expanded to int8 by one multiplication and one addition", 6, true, rows_kept<4, 0, true>},
};

// ---- the program ---------------------------------------------------------------------------------

struct Settings {
  std::vector<int> cpus;
  double seconds = 0.4;  // of each line
  std::string only, json;
};

// A buffer of arbitrary bytes, written by all threads.
NodeBuffer random_bytes(Team &team, size_t bytes, int node) {
  NodeBuffer buffer(bytes, node, true);
  auto *words = reinterpret_cast<uint32_t *>(buffer.data());
  const size_t count = bytes / 4, threads = static_cast<size_t>(team.size());
  team.run([&](int t) {
    for (size_t i = count * static_cast<size_t>(t) / threads;
         i < count * static_cast<size_t>(t + 1) / threads; ++i)
      words[i] = static_cast<uint32_t>(i * 2654435761u >> 7);
  });
  return buffer;
}

struct Measured {
  std::vector<double> fraction, tops, peak_tops;

  std::string json(Json row) const {
    return row.raw("fraction", spread(fraction))
        .raw("tops", spread(tops))
        .raw("peak_tops", spread(peak_tops))
        .text();
  }
};

// `once` returns the seconds that `operations` took on all threads.
Measured measure(Team &team, const Settings &settings, const NodeBuffer &operands, double operations,
                 const std::function<double()> &once) {
  constexpr int kRounds = 25000;
  const double peak_operations = 4.0 * kRounds * kOperations * team.size();
  const auto peak = [&] {
    return team.run([&](int) { peak_loop(reinterpret_cast<const uint8_t *>(operands.data()), kRounds); });
  };
  Measured result;
  double spent = 0;
  once();
  while (spent < settings.seconds || result.fraction.size() < 3) {
    const double before = peak(), seconds = once(), after = peak();
    const double rate = 2 * peak_operations / (before + after);
    result.fraction.push_back(operations / seconds / rate);
    result.tops.push_back(operations / seconds * 1e-12);
    result.peak_tops.push_back(rate * 1e-12);
    spent += before + seconds + after;
  }
  return result;
}

std::string loops(Team &team, const Settings &settings, int node) {
  constexpr int64_t kRing = 512 << 10;
  constexpr int kRounds = 20000;
  const struct {
    const char *name;
    int64_t a_bytes, b_bytes;
  } places[] = {{"first_level", 8 << 10, 8 << 10}, {"second_level", 16 << 10, 256 << 10}};
  // Past the end of a ring its last round reads on.
  const NodeBuffer memory = random_bytes(team, static_cast<size_t>(2 * kRing * team.size()), node);
  std::string rows;
  {
    const Measured result = measure(team, settings, memory, 4.0 * kRounds * kOperations * team.size(), [&] {
      return team.run(
          [&](int) { four_sums_loop(reinterpret_cast<const uint8_t *>(memory.data()), kRounds); });
    });
    Json row;
    row.string("loop", "products only, four sums").number("registers", 8).number("loads_a_product", 0);
    rows += "\n  " + result.json(row);
    std::printf("%-50s 8 registers, no loads: %.0f %%\n", "products only, four sums",
                100 * median(result.fraction));
  }
  for (const LoopCase &each : kLoops) {
    Json row;
    row.string("loop", each.name).number("registers", each.registers).number("loads_a_product", each.loads);
    std::printf("%-50s %d registers, %.2f loads a product:", each.name, each.registers, each.loads);
    for (const auto &place : places) {
      const double operations = double{kRounds} * each.products * kOperations * team.size();
      const Measured result = measure(team, settings, memory, operations, [&] {
        return team.run([&](int t) {
          const auto *own = reinterpret_cast<const uint8_t *>(memory.data()) + 2 * kRing * t;
          each.run({own, own + kRing, place.a_bytes, place.b_bytes}, kRounds);
        });
      });
      std::printf(" %s %.0f %%", place.name, 100 * median(result.fraction));
      row.raw(place.name, result.json(Json()));
    }
    std::printf("\n");
    rows += (rows.empty() ? "\n  " : ",\n  ") + row.text();
  }
  return "[" + rows + "]";
}

std::string products(Team &team, const Settings &settings, int node) {
  size_t weight_bytes = 0, row_bytes = 0;
  for (const Layer &layer : kLayers) {
    const size_t depth = static_cast<size_t>(layer.depth) * static_cast<size_t>(layer.experts);
    weight_bytes = std::max(weight_bytes, depth * static_cast<size_t>(layer.columns));
    row_bytes = std::max(row_bytes, depth * static_cast<size_t>(layer.rows));
  }
  const NodeBuffer weights = random_bytes(team, weight_bytes, node);
  const NodeBuffer rows = random_bytes(team, row_bytes, node);
  constexpr size_t kSums = size_t{kBlockRows / 16} * kUnitTiles * kTile;
  constexpr size_t kExpanded = size_t{kUnitTiles} * kBlockSteps * kTile, kLeaving = 8 * kTile;
  const size_t stride = kSums + kExpanded + kLeaving;
  NodeBuffer scratch(stride * static_cast<size_t>(team.size()), node, true);
  std::string lines;
  for (const Layer &layer : kLayers) {
    std::printf("%s\n", layer.name);
    for (const ProductCase &each : kProducts) {
      const int tiles = layer.columns / 16, groups = (tiles + kUnitTiles - 1) / kUnitTiles;
      const double operations =
          2.0 * layer.depth * layer.columns * layer.rows * layer.experts * layer.repeats;
      const int64_t tile_bytes = each.int4 ? kTile / 2 : kTile;
      const Measured result = measure(team, settings, rows, operations, [&] {
        std::atomic<int> next{0};
        return team.run([&](int t) {
          auto *own = reinterpret_cast<uint8_t *>(scratch.data()) + stride * static_cast<size_t>(t);
          const Scratch mine = {reinterpret_cast<float *>(own), own + kSums,
                                reinterpret_cast<int32_t *>(own + kSums + kExpanded)};
          configure();
          for (int unit; (unit = next.fetch_add(1, std::memory_order_relaxed)) < groups * layer.experts;) {
            const int expert = unit / groups, column = unit % groups * kUnitTiles;
            const auto *base = reinterpret_cast<const uint8_t *>(weights.data());
            const Weights part = {base + (int64_t{expert} * tiles + column) * layer.steps() * tile_bytes,
                                  tile_bytes, layer.steps()};
            const auto *expert_rows =
                reinterpret_cast<const uint8_t *>(rows.data()) + int64_t{expert} * layer.rows * layer.depth;
            for (int repeat = 0; repeat < layer.repeats; ++repeat)
              each.run(layer, expert_rows, part, std::min(kUnitTiles, tiles - column), mine);
          }
          release();
        });
      });
      std::printf("  %-70s %d registers: %5.1f TOPS, %3.0f %% of %.1f\n", each.name, each.registers,
                  median(result.tops), 100 * median(result.fraction), median(result.peak_tops));
      Json row;
      row.string("layer", layer.name).string("scheme", each.name).number("registers", each.registers);
      lines += (lines.empty() ? "\n  " : ",\n  ") + result.json(row);
    }
  }
  return "[" + lines + "]";
}

Settings parse(int count, char **arguments) {
  Settings settings;
  for (int i = 1; i + 1 < count; i += 2) {
    const std::string name = arguments[i], value = arguments[i + 1];
    if (name == "--cpus")
      settings.cpus = ktk::parse_cpu_list(value);
    else if (name == "--seconds")
      settings.seconds = std::atof(value.c_str());
    else if (name == "--only" && (value == "loops" || value == "products"))
      settings.only = value;
    else if (name == "--json")
      settings.json = value;
    else
      throw std::runtime_error(
          name + " " + value +
          " is no option; use --cpus LIST, --seconds S, --only loops, --only products and --json FILE");
  }
  if (count % 2 == 0) throw std::runtime_error("each option takes a value");
  return settings;
}

int run(int count, char **arguments) {
  Settings settings = parse(count, arguments);
  const uint32_t missing = ktk::missing_requirements(kNeeds);
  if (missing != 0)
    throw std::runtime_error("this needs AMX; missing here: " + ktk::describe_requirements(missing));
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  const ktk::Topology topology = ktk::Topology::read();
  const ktk::Topology::Node &node = *topology.find(topology.nodes_with_cpus().front());
  if (settings.cpus.empty()) settings.cpus = node.cpus;
  const std::string load_before = load_average(), cpus = ktk::format_cpu_list(settings.cpus);
  std::printf("%s, CPUs %s\n", cpu_model().c_str(), cpus.c_str());
  Team team(settings.cpus);
  std::string text =
      "{\"machine\": " +
      Json().string("cpu", cpu_model()).string("cpus", cpus).number("cores", node.physical_cores).text();
  if (settings.only != "products") text += ",\n \"loops\": " + loops(team, settings, node.id);
  if (settings.only != "loops") text += ",\n \"products\": " + products(team, settings, node.id);
  text += ",\n \"load_average\": [" + load_before + ", " + load_average() + "]}\n";
  if (!settings.json.empty() && !(std::ofstream(settings.json) << text))
    throw std::runtime_error("cannot write " + settings.json);
  return 0;
}

}  // namespace

int main(int count, char **arguments) {
  try {
    return run(count, arguments);
  } catch (const std::exception &error) {
    std::fprintf(stderr, "tile_bench: %s\n", error.what());
    return 1;
  }
}
