// Included by every header of kernels/, formats/ and isa/: they are compiled once for each instruction
// set, inside that set's anonymous namespace, so that no symbol is shared at link time.
#pragma once

#include <cstdint>

#define KTK_INLINE static inline __attribute__((always_inline))
#define KTK_MEMBER inline __attribute__((always_inline))

// `count`, in a way that keeps compilers from unrolling a loop up to it: unrolled products spill their sums.
KTK_INLINE int rolled(int count) {
  __asm__("" : "+r"(count));
  return count;
}

// When a block of rows takes the two tiles of a pair one after the other, step by step, as memory holds them,
// instead of side by side.
enum class TilesApart { never, first_rows, always };
