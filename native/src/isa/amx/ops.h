// AMX: tiles for experts with enough rows, the primitives of another set for the rest. The emulated build
// replaces both, so that it runs on any CPU; everything above them is the same source.
#pragma once

#ifdef KTK_AMX_EMULATED
#include "isa/amx/tile_emulated.h"
#include "isa/portable/ops.h"
typedef PortableOps AmxVectorOps;
#else
#include "isa/amx/tile.h"
#include "isa/avx512_bf16/ops.h"
typedef Avx512Bf16Ops AmxVectorOps;
#endif

struct AmxOps : AmxVectorOps {
#ifdef KTK_AMX_EMULATED
  static constexpr uint32_t kNeeds = 0;
  static constexpr int32_t kAutomatic = 0;
  // Those of the set that the real one takes its vectors from.
  static constexpr int kBlockMaxRows = 8;
#else
  static constexpr uint32_t kNeeds = AmxVectorOps::kNeeds | kNeedsAmxTile | kNeedsAmxInt8 | kNeedsAmxBf16 |
                                     kNeedsOsTiles | kNeedsTilePalette | kNeedsTilePermission;
#endif
  // Measured on Emerald Rapids: docs/benchmarks/log.md.
  template <class Format>
  static constexpr TilesApart kTilesApart = Format::kExpands ? TilesApart::first_rows : TilesApart::never;
  template <class Format>
  static constexpr int64_t kReadAheadBytes = Format::kExpands ? 2048 : 4096;
  // Weights stream through tiles faster than through vectors as soon as a few rows share them; int4, which
  // must be expanded, needs more. fp8 goes with bf16, whose bits it has. docs/benchmarks/log.md.
  template <class Format>
  static constexpr int32_t kTileRows = !Format::kInteger  ? 2
                                       : Format::kExpands ? 8
                                                          : 3;
};
