#include "core/cpu.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace ktk {
namespace {

struct Registers {
  uint32_t eax, ebx, ecx, edx;
};

Registers cpuid(uint32_t leaf, uint32_t subleaf) {
  Registers r{0, 0, 0, 0};
  if (__get_cpuid_max(leaf & 0x80000000u, nullptr) >= leaf) {
    __cpuid_count(leaf, subleaf, r.eax, r.ebx, r.ecx, r.edx);
  }
  return r;
}

uint64_t enabled_state() {
  constexpr uint32_t kOsxsave = 1u << 27;
  if (!(cpuid(1, 0).ecx & kOsxsave)) return 0;
  uint32_t low, high;
  // The mnemonic needs -mxsave, which this baseline unit is not built with; these are its bytes.
  __asm__ volatile(".byte 0x0f, 0x01, 0xd0" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t{high} << 32) | low;
}

bool request_tile_permission() {
  constexpr long kArchReqXcompPerm = 0x1023;
  constexpr long kTileData = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kTileData) == 0;
}

uint32_t static_requirements_met() {
  const Registers one = cpuid(1, 0), seven = cpuid(7, 0), seven_one = cpuid(7, 1), palette = cpuid(0x1d, 0);
  const uint64_t state = enabled_state();
  uint32_t met = 0;
  const auto set = [&met](uint32_t bit, bool condition) { met |= condition ? bit : 0; };
  set(kNeedsFma, one.ecx >> 12 & 1);
  set(kNeedsF16c, one.ecx >> 29 & 1);
  set(kNeedsAvx2, seven.ebx >> 5 & 1);
  set(kNeedsAvx512F, seven.ebx >> 16 & 1);
  set(kNeedsAvx512Dq, seven.ebx >> 17 & 1);
  set(kNeedsAvx512Bw, seven.ebx >> 30 & 1);
  set(kNeedsAvx512Vl, seven.ebx >> 31 & 1);
  set(kNeedsAvx512Vnni, seven.ecx >> 11 & 1);
  set(kNeedsAmxBf16, seven.edx >> 22 & 1);
  set(kNeedsAmxTile, seven.edx >> 24 & 1);
  set(kNeedsAmxInt8, seven.edx >> 25 & 1);
  set(kNeedsAvx512Bf16, seven_one.eax >> 5 & 1);
  set(kNeedsOsYmm, (state & 0x6) == 0x6);
  set(kNeedsOsZmm, (state & 0xe6) == 0xe6);
  set(kNeedsOsTiles, (state & 0x60000) == 0x60000);
  set(kNeedsTilePalette, palette.eax >= 1);
  return met;
}

struct Description {
  uint32_t bit;
  const char *words;
};

constexpr Description kDescriptions[] = {
    {kNeedsAvx2, "AVX2 (CPUID.7.0:EBX[5])"},
    {kNeedsFma, "FMA (CPUID.1:ECX[12])"},
    {kNeedsF16c, "F16C (CPUID.1:ECX[29])"},
    {kNeedsAvx512F, "AVX512F (CPUID.7.0:EBX[16])"},
    {kNeedsAvx512Bw, "AVX512BW (CPUID.7.0:EBX[30])"},
    {kNeedsAvx512Vl, "AVX512VL (CPUID.7.0:EBX[31])"},
    {kNeedsAvx512Dq, "AVX512DQ (CPUID.7.0:EBX[17])"},
    {kNeedsAvx512Vnni, "AVX512_VNNI (CPUID.7.0:ECX[11])"},
    {kNeedsAvx512Bf16, "AVX512_BF16 (CPUID.7.1:EAX[5])"},
    {kNeedsAmxTile, "AMX-TILE (CPUID.7.0:EDX[24])"},
    {kNeedsAmxInt8, "AMX-INT8 (CPUID.7.0:EDX[25])"},
    {kNeedsAmxBf16, "AMX-BF16 (CPUID.7.0:EDX[22])"},
    {kNeedsOsYmm, "ymm state enabled by the system (XCR0[2:1])"},
    {kNeedsOsZmm, "zmm state enabled by the system (XCR0[7:5])"},
    {kNeedsOsTiles, "tile state enabled by the system (XCR0[18:17])"},
    {kNeedsTilePalette, "a tile palette (CPUID.1D:EAX >= 1)"},
    {kNeedsTilePermission, "permission for tile data (arch_prctl ARCH_REQ_XCOMP_PERM, Linux 5.16 or newer)"},
};

}  // namespace

uint32_t missing_requirements(uint32_t needs) {
  static const uint32_t met = static_requirements_met();
  const uint32_t missing = needs & ~met & ~uint32_t{kNeedsTilePermission};
  if (missing || !(needs & kNeedsTilePermission)) return missing;
  static const bool granted = request_tile_permission();
  return granted ? 0u : uint32_t{kNeedsTilePermission};
}

std::string describe_requirements(uint32_t bits) {
  std::string words;
  for (const Description &description : kDescriptions) {
    if (!(bits & description.bit)) continue;
    if (!words.empty()) words += ", ";
    words += description.words;
  }
  return words;
}

}  // namespace ktk
