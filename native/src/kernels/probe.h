// Loops that do one thing as fast as an instruction set can: the peaks that kernels are measured against.
#pragma once

#include "core/backend.h"
#include "kernels/inline.h"

// Keeps the compiler from seeing that a value stays the same, so that it repeats what depends on it.
template <class Ops, class T>
KTK_INLINE void opaque(T &value) {
  typename Ops::Register parts[sizeof(T) / sizeof(typename Ops::Register)];
  __builtin_memcpy(parts, &value, sizeof value);
  for (auto &part : parts) __asm__ volatile("" : "+x"(part));
  __builtin_memcpy(&value, parts, sizeof value);
}

// The products that formats are made of. `dot` adds one vector of products to a sum.
template <class Ops>
struct Bf16Dot {
  static constexpr int kProducts = 2 * kPanelColumns;
  typedef typename Ops::F Sum;
  typedef typename Ops::WB Weights;
  typedef typename Ops::AB Activations;
  KTK_INLINE Weights weights(const uint8_t *p) { return Ops::split_bf16(p); }
  KTK_INLINE Activations activations(const uint8_t *p) { return Ops::pair_bf16(p); }
  KTK_INLINE Sum zero() { return Ops::zero_f(); }
  KTK_INLINE Sum dot(Sum sum, Weights w, Activations a) { return Ops::dot_bf16(sum, w, a); }
  KTK_INLINE Sum total() { return Ops::zero_f(); }
  KTK_INLINE Sum add(Sum total, Sum sum) { return Ops::add(total, sum); }
  KTK_INLINE void store(int32_t *p, Sum total) { Ops::store_f((float *)p, total); }
};

// One fused multiplication and addition a lane: what a dot product is made of where the set has none.
template <class Ops>
struct FusedMultiplyAdd {
  static constexpr int kProducts = kPanelColumns;
  typedef typename Ops::F Sum;
  typedef typename Ops::F Weights;
  typedef typename Ops::F Activations;
  KTK_INLINE Weights weights(const uint8_t *p) { return Ops::load_bf16((const uint16_t *)p); }
  KTK_INLINE Activations activations(const uint8_t *p) { return Ops::load_bf16((const uint16_t *)p); }
  KTK_INLINE Sum zero() { return Ops::zero_f(); }
  KTK_INLINE Sum dot(Sum sum, Weights w, Activations a) { return Ops::fma(w, a, sum); }
  KTK_INLINE Sum total() { return Ops::zero_f(); }
  KTK_INLINE Sum add(Sum total, Sum sum) { return Ops::add(total, sum); }
  KTK_INLINE void store(int32_t *p, Sum total) { Ops::store_f((float *)p, total); }
};

template <class Ops>
struct ByteDot {
  static constexpr int kProducts = 4 * kPanelColumns;
  typedef typename Ops::I Sum;
  typedef typename Ops::W8 Weights;
  typedef typename Ops::A8 Activations;
  KTK_INLINE Weights weights(const uint8_t *p) { return Ops::split_u8(p); }
  KTK_INLINE Activations activations(const uint8_t *p) { return Ops::quad_s8(p); }
  KTK_INLINE Sum zero() { return Ops::zero_i(); }
  KTK_INLINE Sum dot(Sum sum, Weights w, Activations a) { return Ops::dot_u8s8(sum, w, a); }
  KTK_INLINE Sum total() { return Ops::zero_i(); }
  KTK_INLINE Sum add(Sum total, Sum sum) { return Ops::add_i(total, sum); }
  KTK_INLINE void store(int32_t *p, Sum total) { Ops::store_i(p, total); }
};

// Sums as narrow as the set keeps them over 8 quads; widening them is left out.
template <class Ops>
struct NibbleDot {
  static constexpr int kProducts = 4 * kPanelColumns;
  typedef typename Ops::Q Sum;
  typedef typename Ops::I Weights;
  typedef typename Ops::I Activations;
  KTK_INLINE Weights weights(const uint8_t *p) { return Ops::low_nibbles(Ops::load_i(p)); }
  KTK_INLINE Activations activations(const uint8_t *p) { return Ops::quad_u4(p); }
  KTK_INLINE Sum zero() { return Ops::zero_quads(); }
  KTK_INLINE Sum dot(Sum sum, Weights w, Activations a) { return Ops::add_quad(sum, w, a); }
  KTK_INLINE typename Ops::I total() { return Ops::zero_i(); }
  KTK_INLINE typename Ops::I add(typename Ops::I total, Sum sum) {
    return Ops::add_quads(total, sum, Ops::set1_i(0x00010001));
  }
  KTK_INLINE void store(int32_t *p, typename Ops::I total) { Ops::store_i(p, total); }
};

// Independent sums, as members rather than elements: compilers leave elements of an array in memory.
template <class Ops, class Dot, int Count>
struct Sums {
  typename Dot::Sum first = Dot::zero();
  Sums<Ops, Dot, Count - 1> rest;

  KTK_MEMBER void add(const typename Dot::Weights &weights, typename Dot::Activations &activations) {
    // Sums of integers could be made from one product; those of fp32 could not.
    if constexpr (sizeof(activations) % sizeof(typename Ops::Register) == 0) opaque<Ops>(activations);
    first = Dot::dot(first, weights, activations);
    rest.add(weights, activations);
  }
  template <class Total>
  KTK_MEMBER Total total(Total so_far) const {
    return rest.total(Dot::add(so_far, first));
  }
};
template <class Ops, class Dot>
struct Sums<Ops, Dot, 0> {
  KTK_MEMBER void add(const typename Dot::Weights &, typename Dot::Activations &) {}
  template <class Total>
  KTK_MEMBER Total total(Total so_far) const {
    return so_far;
  }
};

// `Count` chains of products, with all operands in registers.
template <class Ops, class Dot, int Count>
static void product_loop(const ProductLoopArgs *args) {
  const typename Dot::Weights weights = Dot::weights(args->operands);
  typename Dot::Activations activations = Dot::activations(args->operands + 64);
  Sums<Ops, Dot, Count> sums;
  for (int64_t i = 0; i < args->repeats; i++) sums.add(weights, activations);
  Dot::store(args->result, sums.total(Dot::total()));
}

#ifdef KTK_ISA_HAS_TILES
// Products of tiles that stay in their registers. Few: one after the other on one sum, in three registers;
// else two tiles of rows by two of weights, in eight. Where two hyper-threads share a core, few registers are
// faster (docs/benchmarks/log.md).
template <class Ops, bool Integer, bool Few>
static void tile_loop(const ProductLoopArgs *args) {
  alignas(64) uint8_t result[1024];
  [[maybe_unused]] TileFile file;
  TileConfig config;
  for (int i = 0; i < 8; i++) {
    const bool used = !Few || i == 0 || i == 4 || i == 6;
    config.rows[i] = used ? 16 : 0;
    config.row_bytes[i] = used ? 64 : 0;
  }
#define KTK_PROBE_DOT(sum, a, b)          \
  do {                                    \
    if constexpr (Integer) {              \
      KTK_TILE_DOT_S8U8(file, sum, a, b); \
    } else {                              \
      KTK_TILE_DOT_BF16(file, sum, a, b); \
    }                                     \
  } while (0)
  KTK_TILE_CONFIGURE(file, config);
  KTK_TILE_ZERO(file, 0);
  KTK_TILE_LOAD(file, 4, args->operands + 0, 64);
  KTK_TILE_LOAD(file, 6, args->operands + 64, 64);
  if constexpr (!Few) {
    KTK_TILE_ZERO(file, 1);
    KTK_TILE_ZERO(file, 2);
    KTK_TILE_ZERO(file, 3);
    KTK_TILE_LOAD(file, 5, args->operands + 64, 64);
    KTK_TILE_LOAD(file, 7, args->operands + 0, 64);
  }
  for (int64_t i = 0; i < args->repeats; i++) {
    KTK_PROBE_DOT(0, 4, 6);
    if constexpr (Few) {
      KTK_PROBE_DOT(0, 4, 6);
      KTK_PROBE_DOT(0, 4, 6);
      KTK_PROBE_DOT(0, 4, 6);
    } else {
      KTK_PROBE_DOT(1, 4, 7);
      KTK_PROBE_DOT(2, 5, 6);
      KTK_PROBE_DOT(3, 5, 7);
    }
  }
#undef KTK_PROBE_DOT
  KTK_TILE_STORE(file, 0, result, 64);
  KTK_TILE_RELEASE(file);
  __builtin_memcpy(args->result, result, 64);
}
#endif

template <class Ops, class Dot, int Count>
constexpr ProductLoop vector_loop(const char *name) {
  return {name, 2 * Count * Dot::kProducts, product_loop<Ops, Dot, Count>};
}

// The loops of a format, in no order: which is fastest depends on the CPU.
template <class Ops, class Format>
constexpr ProductLoops product_loops() {
  ProductLoops loops{};
  int count = 0;
#ifdef KTK_ISA_HAS_TILES
  constexpr int64_t kTileOperations = 2 * 4 * 16 * 16 * (Format::kInteger ? 64 : 32);
  loops.loop[count++] = {"tiles, 4 sums", kTileOperations, tile_loop<Ops, Format::kInteger, false>};
  loops.loop[count++] = {"tiles, 1 sum", kTileOperations, tile_loop<Ops, Format::kInteger, true>};
#endif
  // With few registers few sums, so that none is spilled; with many, enough to hide the latency.
  if constexpr (Format::kMultiply == Multiply::bf16) {
    loops.loop[count++] = vector_loop<Ops, Bf16Dot<Ops>, 4>("dot product, 4 sums");
    loops.loop[count++] = vector_loop<Ops, Bf16Dot<Ops>, 12>("dot product, 12 sums");
    loops.loop[count++] = vector_loop<Ops, FusedMultiplyAdd<Ops>, 5>("multiply and add, 5 sums");
  } else if constexpr (Format::kMultiply == Multiply::byte || !Ops::kWordSums) {
    loops.loop[count++] = vector_loop<Ops, ByteDot<Ops>, 2>("dot product, 2 sums");
    loops.loop[count++] = vector_loop<Ops, ByteDot<Ops>, 12>("dot product, 12 sums");
  } else {
    loops.loop[count++] = vector_loop<Ops, NibbleDot<Ops>, 3>("dot product, 3 sums");
    loops.loop[count++] = vector_loop<Ops, NibbleDot<Ops>, 12>("dot product, 12 sums");
  }
  return loops;
}

// Each byte once, in `Streams` equal parts that advance side by side.
template <class Ops, int Streams, bool Prefetch>
KTK_INLINE uint32_t read_streams(const ReadArgs *args) {
  constexpr int kLines = 4;
  const int64_t part_bytes = args->bytes / Streams;
  typename Ops::I sum[kLines];
  for (auto &each : sum) each = Ops::zero_i();
  for (int64_t offset = 0; offset < part_bytes; offset += kLines * 64) {
    for (int s = 0; s < Streams; s++) {
      const uint8_t *p = args->data + s * part_bytes + offset;
      for (int line = 0; line < kLines; line++) {
        if constexpr (Prefetch) __builtin_prefetch(p + args->prefetch_bytes + line * 64, 0, 3);
        sum[line] = Ops::add_i(sum[line], Ops::load_i(p + line * 64));
      }
    }
  }
  return (uint32_t)Ops::reduce_add_i(Ops::add_i(Ops::add_i(sum[0], sum[1]), Ops::add_i(sum[2], sum[3])));
}

template <class Ops, bool Prefetch>
KTK_INLINE uint32_t read_pattern(const ReadArgs *args) {
  switch (args->streams) {
    case 1:
      return read_streams<Ops, 1, Prefetch>(args);
    case 2:
      return read_streams<Ops, 2, Prefetch>(args);
    default:
      return read_streams<Ops, 4, Prefetch>(args);
  }
}

template <class Ops>
static void read_bytes(const ReadArgs *args) {
  *args->sum = args->prefetch_bytes > 0 ? read_pattern<Ops, true>(args) : read_pattern<Ops, false>(args);
}

template <class Ops>
static void copy_bytes(const CopyArgs *args) {
  if (args->streaming) {
    for (int64_t i = 0; i < args->bytes; i += 64) Ops::stream_i(args->to + i, Ops::load_i(args->from + i));
    __builtin_ia32_sfence();
  } else {
    for (int64_t i = 0; i < args->bytes; i += 64) Ops::store_i(args->to + i, Ops::load_i(args->from + i));
  }
}
