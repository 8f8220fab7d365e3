// Compiled once for each instruction set with that set's flags (native/meson.build). Everything lies in a
// namespace of the set's own, in an unnamed one within it: had two sets a function in common, the linker
// would keep one copy, and an older CPU would meet the newer one's instructions. For the same reason no
// standard library code and no static initialiser may appear here; tools/check_objects.py verifies it.
#include <stdint.h>

#ifdef __AVX2__
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include "core/backend.h"
#include "core/cpu_requirements.h"
#include "kernels/inline.h"
#include "ktk.h"
#include "registry.h"

#define KTK_TEXT(x) KTK_TEXT_OF(x)
#define KTK_TEXT_OF(x) #x

namespace ktk {
namespace KTK_ISA {
namespace {

#include KTK_ISA_HEADER
typedef KTK_ISA_OPS Ops;

#include "formats/bf16.h"
#include "formats/fp8.h"
#include "formats/int4.h"
#include "formats/int8.h"
#include "kernels/rows.h"

#ifdef KTK_ISA_HAS_TILES
#include "kernels/tile_product.h"
#else
#include "kernels/product.h"
#endif
#include "kernels/expert.h"
#include "kernels/probe.h"
#include "kernels/train.h"

template <class Format>
constexpr FormatKernels kernels_of() {
  FormatKernels kernels{};
  kernels.name = Format::kName;
  kernels.tile_bytes = Format::kTileBytes;
  kernels.step_columns = Format::kStepColumns;
  kernels.integer = Format::kInteger;
  kernels.factors = Format::kFactors;
  kernels.tile_rows = Ops::template kTileRows<Format>;
  kernels.quantise = quantise_rows<Ops, Format>;
  kernels.gather = gather_block<Ops, Format>;
  kernels.gate_up = gate_up<Ops, Format>;
  kernels.down = down<Ops, Format>;
  kernels.pack = Format::template pack<Ops>;
  kernels.products = product_loops<Ops, Format>();
  kernels.expand = expand<Ops, Format>;
  kernels.unpack = unpack<Ops, Format>;
  return kernels;
}

}  // namespace

extern const Backend backend;
constexpr Backend backend = {
    KTK_TEXT(KTK_ISA),
    Ops::kNeeds,
    Ops::kAutomatic,
    finish<Ops>,
    read_bytes<Ops>,
    copy_bytes<Ops>,
    {
#define KTK_KERNELS(format) kernels_of<format>(),
        KTK_FOR_EACH_FORMAT(KTK_KERNELS)
#undef KTK_KERNELS
    },
    {
        load_rows<Ops>,
        transpose_rows<Ops>,
        pack_tiles<Ops>,
        pack_pairs<Ops>,
        multiply<Ops>,
        activation_backward<Ops>,
        add_dropped<Ops>,
        store_matrix<Ops>,
    },
};

}  // namespace KTK_ISA
}  // namespace ktk
