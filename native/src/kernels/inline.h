// Included by every header of kernels/, formats/ and isa/: they are compiled once for each instruction
// set, inside that set's anonymous namespace, so that no symbol is shared at link time.
#pragma once

#include <cstdint>

#define KTK_INLINE static inline __attribute__((always_inline))
#define KTK_MEMBER inline __attribute__((always_inline))
