// Primitives in plain C++ for any x86-64: the definition of what every other instruction set computes.
//
// A vector is 16 lanes, one for each output neuron of a panel, whatever the machine's registers are.
// Integer primitives are exact; fp32 ones round as IEEE 754 says, so all sets agree bit for bit. Only
// dot_bf16 may differ: sets with a bf16 dot product round and pair in their own way.
//
// The types are GCC vector extensions, which GCC and Clang lower to what the target has.
#pragma once

#include "kernels/inline.h"

struct PortableOps {
  typedef float F __attribute__((vector_size(64)));
  typedef int32_t I __attribute__((vector_size(64)));
  // What one instruction of the target holds at most; a vector above is several of them.
  typedef int32_t Register __attribute__((vector_size(16)));
  // A row of a u8 tile prepared for products with several rows of activations, and such a row's 4 values.
  typedef I W8;
  typedef I A8;
  // The same for a bf16 tile row and 2 activations.
  struct WB {
    F even, odd;
  };
  struct AB {
    float even, odd;
  };

  static constexpr uint32_t kNeeds = 0;
  static constexpr int32_t kAutomatic = 1;
  static constexpr int kBlockMaxRows = 4;  // rows of a register block
  template <class Format>
  static constexpr TilesApart kTilesApart = TilesApart::never;
  // How far ahead weights are fetched for the first rows that meet them; 0: not by instructions.
  template <class Format>
  static constexpr int64_t kReadAheadBytes = 2048;
  // Rows from which an expert goes to matrix units; 0: there are none.
  template <class Format>
  static constexpr int32_t kTileRows = 0;
  static constexpr int kExpandedRows = 0;  // bf16 products use their operands as they are
  // Whether products of nibbles are summed in 16 bits first, for want of a dot product of bytes.
  static constexpr bool kWordSums = false;
  // Whether the 8 quads of such a sum are written out, the first without a sum to add to.
  static constexpr bool kUnrollsNibbles = false;
  // Whether the last rows that meet a pair of tiles fetch the next one meanwhile.
  static constexpr bool kFetchesNextPair = false;

  KTK_INLINE F zero_f() { return F{}; }
  KTK_INLINE F set1_f(float value) { return F{} + value; }
  KTK_INLINE F load_f(const float *p) {
    F v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  KTK_INLINE void store_f(float *p, F v) { __builtin_memcpy(p, &v, sizeof v); }
  KTK_INLINE F add(F a, F b) { return a + b; }
  KTK_INLINE F mul(F a, F b) { return a * b; }
  KTK_INLINE F div(F a, F b) { return a / b; }
  KTK_INLINE F fma(F a, F b, F c) {
    for (int n = 0; n < 16; n++) c[n] = __builtin_fmaf(a[n], b[n], c[n]);
    return c;
  }
  // a < b ? a : b, so that a NaN in b passes through; max likewise.
  KTK_INLINE F min(F a, F b) { return a < b ? a : b; }
  KTK_INLINE F max(F a, F b) { return a > b ? a : b; }
  // `yes` in the lanes where a < b, else `no`.
  KTK_INLINE F where_less(F a, F b, F yes, F no) { return a < b ? yes : no; }
  // Lanes times the Hadamard matrix of 16: lanes at distance 1, 2, 4, 8 become their sum and difference.
  KTK_INLINE F hadamard(F v) {
    for (int distance = 1; distance < 16; distance *= 2) {
      F next;
      for (int n = 0; n < 16; n++) {
        const float other = v[n ^ distance];
        next[n] = (n & distance) == 0 ? v[n] + other : other - v[n];
      }
      v = next;
    }
    return v;
  }

  KTK_INLINE I zero_i() { return I{}; }
  KTK_INLINE I set1_i(int32_t value) { return I{} + value; }
  KTK_INLINE I load_i(const void *p) {
    I v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  KTK_INLINE void store_i(void *p, I v) { __builtin_memcpy(p, &v, sizeof v); }
  // A store that may pass by the caches. `p` is aligned to 64 bytes.
  KTK_INLINE void stream_i(void *p, I v) { store_i(p, v); }
  // Modulo 2^32, as mul_i and the sum of all lanes.
  typedef uint32_t U __attribute__((vector_size(64)));
  KTK_INLINE I add_i(I a, I b) { return (I)((U)a + (U)b); }
  KTK_INLINE I sub_i(I a, I b) { return (I)((U)a - (U)b); }
  KTK_INLINE I and_i(I a, I b) { return a & b; }
  KTK_INLINE I max_i(I a, I b) { return a > b ? a : b; }
  KTK_INLINE I mul_i(I a, I b) { return (I)((U)a * (U)b); }
  KTK_INLINE I xor_i(I a, I b) { return a ^ b; }
  // Shifts are of 0 < count < 32; this one and the next are logical.
  KTK_INLINE I shift_left_i(I a, int count) { return a << count; }
  KTK_INLINE I shift_right_i(I a, int count) { return (I)((U)a >> (uint32_t)count); }
  KTK_INLINE I shift_right_signed(I a, int count) { return a >> count; }
  KTK_INLINE int32_t reduce_add_i(I a) {
    uint32_t sum = 0;
    for (int n = 0; n < 16; n++) sum += (uint32_t)a[n];
    return (int32_t)sum;
  }
  KTK_INLINE int32_t reduce_max_i(I a) {
    int32_t largest = a[0];
    for (int n = 1; n < 16; n++) largest = a[n] > largest ? a[n] : largest;
    return largest;
  }
  KTK_INLINE F from_i(I a) { return __builtin_convertvector(a, F); }
  // Rounds to nearest, ties to even. |a| < 2^22, or the lane's result is unspecified.
  KTK_INLINE I round_i(F a) {
    const F magic = set1_f(12582912.0f);  // 1.5 * 2^23: its unit in the last place is 1
    return sub_i(as_i(a + magic), as_i(magic));
  }
  // The same; the sign of a zero is unspecified.
  KTK_INLINE F round_f(F a) { return from_i(round_i(a)); }
  KTK_INLINE F as_f(I a) { return (F)a; }
  KTK_INLINE I as_i(F a) { return (I)a; }

  KTK_INLINE F load_bf16(const uint16_t *p) {
    I v;
    for (int n = 0; n < 16; n++) v[n] = (int32_t)((uint32_t)p[n] << 16);
    return (F)v;
  }
  KTK_INLINE void store_bf16(uint16_t *p, F v) {
    for (int n = 0; n < 16; n++) {
      const float lane = v[n];
      uint32_t bits;
      __builtin_memcpy(&bits, &lane, 4);
      const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
      p[n] = (uint16_t)((is_nan ? bits | 0x400000u : bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
    }
  }
  KTK_INLINE F load_f16(const uint16_t *p) {
    I halves;
    for (int n = 0; n < 16; n++) halves[n] = p[n];
    const I magnitude = halves & 0x7fff, sign = (halves & 0x8000) << 16;
    // Exponents of binary16 sit 112 lower; the product is exact, subnormals included.
    const I finite = as_i(as_f(magnitude << 13) * 0x1p112f);
    const I quiet = magnitude > 0x7c00 ? set1_i(0x400000) : zero_i();
    const I special = 0x7f800000 | (magnitude & 0x3ff) << 13 | quiet;
    return as_f(sign | (magnitude >= 0x7c00 ? special : finite));
  }
  KTK_INLINE void store_f16(uint16_t *p, F v) {
    for (int n = 0; n < 16; n++) {
      const float lane = v[n];
      uint32_t bits;
      __builtin_memcpy(&bits, &lane, 4);
      const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
      uint32_t half;
      if (magnitude > 0x7f800000u) {
        half = 0x7e00u | (magnitude >> 13 & 0x3ffu);
      } else if (magnitude >= 0x477ff000u) {  // rounds to 2^16 or beyond
        half = 0x7c00u;
      } else if (magnitude < 0x38800000u) {  // below 2^-14: align to 2^-24 by an addition that rounds
        float value;
        __builtin_memcpy(&value, &magnitude, 4);
        value += 0.5f;
        __builtin_memcpy(&half, &value, 4);
        half -= 0x3f000000u;
      } else {
        half = (magnitude + 0xfffu + (magnitude >> 13 & 1) - 0x38000000u) >> 13;
      }
      p[n] = (uint16_t)(sign | half);
    }
  }
  // [16 rows][16 columns] to [16 columns][16 rows], of words of 4 bytes.
  KTK_INLINE void transpose(const void *rows, void *columns) {
    for (int column = 0; column < 16; column++) {
      for (int row = 0; row < 16; row++) {
        __builtin_memcpy((uint8_t *)columns + (column * 16 + row) * 4,
                         (const uint8_t *)rows + (row * 16 + column) * 4, 4);
      }
    }
  }
  // 8 rows of 8 groups of 4 bf16 [a0 a1 b0 b1]: regroups each as [a0 b0 a1 b1] and transposes the groups.
  KTK_INLINE void transpose_pairs(const uint8_t *rows, uint8_t *to) {
    for (int p = 0; p < 8; p++) {
      for (int m = 0; m < 8; m++) {
        uint16_t group[4], regrouped[4];
        __builtin_memcpy(group, rows + p * 64 + m * 8, 8);
        regrouped[0] = group[0];
        regrouped[1] = group[2];
        regrouped[2] = group[1];
        regrouped[3] = group[3];
        __builtin_memcpy(to + m * 64 + p * 8, regrouped, 8);
      }
    }
  }
  // Words of two bf16, `even` in the low half, rounded as store_bf16 does.
  KTK_INLINE I join_bf16(F even, F odd) {
    uint16_t low[16], high[16];
    store_bf16(low, even);
    store_bf16(high, odd);
    I words;
    for (int n = 0; n < 16; n++) words[n] = (int32_t)((uint32_t)high[n] << 16 | low[n]);
    return words;
  }
  // The low byte of each lane.
  KTK_INLINE void store_low_bytes(uint8_t *p, I v) {
    for (int n = 0; n < 16; n++) p[n] = (uint8_t)v[n];
  }
  KTK_INLINE I load_u8(const uint8_t *p) {
    I v;
    for (int n = 0; n < 16; n++) v[n] = p[n];
    return v;
  }

  // u8 weights times s8 activations: 4 products a lane.
  KTK_INLINE W8 split_u8(const uint8_t *tile_row) { return load_i(tile_row); }
  KTK_INLINE A8 quad_s8(const uint8_t *activations) {
    int32_t quad;
    __builtin_memcpy(&quad, activations, 4);
    return set1_i(quad);
  }
  KTK_INLINE I dot_u8s8(I sum, W8 weights, A8 quad) {
    for (int i = 0; i < 4; i++) {
      sum += (I)(((weights >> (8 * i)) & 255) * ((quad << (24 - 8 * i)) >> 24));
    }
    return sum;
  }
  // 4-bit weights, one in each byte.
  KTK_INLINE I low_nibbles(I bytes) { return bytes & 0x0f0f0f0f; }
  KTK_INLINE I high_nibbles(I bytes) { return (bytes >> 4) & 0x0f0f0f0f; }
  // 16 bytes, each in all bytes of its lane, and in the low bytes of its lane's two 16-bit words.
  KTK_INLINE I bytes_of(const uint8_t *p) { return mul_i(load_u8(p), set1_i(0x01010101)); }
  KTK_INLINE I words_of(const uint8_t *p) { return mul_i(load_u8(p), set1_i(0x00010001)); }
  // Products of 16-bit words, and sums of bytes, modulo their widths.
  KTK_INLINE I mul_words(I a, I b) {
    const I low = mul_i(a & 0xffff, b & 0xffff) & 0xffff;
    return low | (mul_i(shift_right_i(a, 16), shift_right_i(b, 16)) << 16);
  }
  KTK_INLINE I add_bytes(I a, I b) {
    const I even = add_i(a & 0x00ff00ff, b & 0x00ff00ff) & 0x00ff00ff;
    return even | (add_i(a & (int32_t)0xff00ff00, b & (int32_t)0xff00ff00) & (int32_t)0xff00ff00);
  }
  KTK_INLINE I sub_words(I a, I b) {
    return (sub_i(a & 0xffff, b & 0xffff) & 0xffff) |
           (sub_i(shift_right_i(a, 16), shift_right_i(b, 16)) << 16);
  }
  // Each lane: the sum of the products of its two signed 16-bit words.
  KTK_INLINE I dot_words(I a, I b) {
    return add_i(((a << 16) >> 16) * ((b << 16) >> 16), (a >> 16) * (b >> 16));
  }

  // bf16 weights times bf16 activations: 2 products a lane.
  KTK_INLINE WB split_bf16(const uint8_t *tile_row) {
    const I pairs = load_i(tile_row);
    return {(F)(pairs << 16), (F)(pairs & (int32_t)0xffff0000)};
  }
  KTK_INLINE AB pair_bf16(const uint8_t *activations) {
    uint32_t pair;
    __builtin_memcpy(&pair, activations, 4);
    const uint32_t even = pair << 16, odd = pair & 0xffff0000u;
    AB values;
    __builtin_memcpy(&values.even, &even, 4);
    __builtin_memcpy(&values.odd, &odd, 4);
    return values;
  }
  // A product of two bf16 values is exact in fp32, so that no fused operation is needed.
  KTK_INLINE F dot_bf16(F sum, WB weights, AB pair) {
    sum = sum + weights.even * pair.even;
    return sum + weights.odd * pair.odd;
  }
};
