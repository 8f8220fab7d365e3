// What an instruction set may ask of the CPU and the system. Read by code built for any set: plain data only.
#pragma once

#include <cstdint>

namespace ktk {

// One bit a requirement that an instruction set may have; a backend lists the ones it needs.
enum CpuRequirement : uint32_t {
  kNeedsAvx2 = 1u << 0,
  kNeedsFma = 1u << 1,
  kNeedsF16c = 1u << 2,
  kNeedsAvx512F = 1u << 3,
  kNeedsAvx512Bw = 1u << 4,
  kNeedsAvx512Vl = 1u << 5,
  kNeedsAvx512Dq = 1u << 6,
  kNeedsAvx512Vnni = 1u << 7,
  kNeedsAvx512Bf16 = 1u << 8,
  kNeedsAmxTile = 1u << 9,
  kNeedsAmxInt8 = 1u << 10,
  kNeedsAmxBf16 = 1u << 11,
  kNeedsOsYmm = 1u << 12,           // XCR0: the system saves ymm registers
  kNeedsOsZmm = 1u << 13,           // XCR0: and zmm and mask registers
  kNeedsOsTiles = 1u << 14,         // XCR0: and tile configuration and data
  kNeedsTilePalette = 1u << 15,     // CPUID 1D: a virtual machine may show AMX and no palette
  kNeedsTilePermission = 1u << 16,  // arch_prctl(ARCH_REQ_XCOMP_PERM): Linux grants tile data on request
};

}  // namespace ktk
