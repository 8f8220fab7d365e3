// What this CPU and its operating system can run.
#pragma once

#include <cstdint>
#include <string>

#include "core/cpu_requirements.h"

namespace ktk {

// Bits of `needs` that are not met, 0 when all are. Asks for the tile permission (process-wide, kept)
// only when everything else that `needs` lists is met.
uint32_t missing_requirements(uint32_t needs);

// The requirements as a list in words, e.g. "AVX512_BF16 (CPUID.7.1:EAX[5])".
std::string describe_requirements(uint32_t bits);

}  // namespace ktk
