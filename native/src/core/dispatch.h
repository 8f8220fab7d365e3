// Which backend serves a layer.
#pragma once

#include <vector>

#include "core/backend.h"

namespace ktk {

// All that were built, in order of preference.
const std::vector<const Backend *> &backends();

// The backend called `name`; throws when it was not built (KTK_ERR_ARGUMENT) or this CPU lacks one of
// its requirements (KTK_ERR_UNSUPPORTED, naming it). A null name means default_backend().
const Backend &runnable_backend(const char *name);

// KTK_ISA from the environment, else the first runnable automatic one.
const Backend &default_backend();

}  // namespace ktk
