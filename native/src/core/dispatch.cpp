#include "core/dispatch.h"

#include <cstdlib>
#include <cstring>

#include "core/cpu.h"
#include "core/status.h"
#include "registry.h"

namespace ktk {

#define KTK_DECLARE(isa)        \
  namespace isa {               \
  extern const Backend backend; \
  }
KTK_FOR_EACH_ISA(KTK_DECLARE)
#undef KTK_DECLARE

const std::vector<const Backend *> &backends() {
#define KTK_ENTRY(isa) &isa::backend,
  static const std::vector<const Backend *> all = {KTK_FOR_EACH_ISA(KTK_ENTRY)};
#undef KTK_ENTRY
  return all;
}

const Backend &runnable_backend(const char *name) {
  if (name == nullptr || *name == '\0') return default_backend();
  std::string known;
  for (const Backend *backend : backends()) {
    if (std::strcmp(backend->name, name) == 0) {
      const uint32_t missing = missing_requirements(backend->needs);
      if (missing) {
        fail(KTK_ERR_UNSUPPORTED, "instruction set '", name, "' cannot run on this CPU: it lacks ",
             describe_requirements(missing),
             "; unset KTK_ISA or name another (`python -m ktk doctor` lists them)");
      }
      return *backend;
    }
    known += (known.empty() ? "" : ", ") + std::string(backend->name);
  }
  fail(KTK_ERR_ARGUMENT, "unknown instruction set '", name, "'; this build has ", known);
}

const Backend &default_backend() {
  const char *wanted = std::getenv("KTK_ISA");
  if (wanted != nullptr && *wanted != '\0') return runnable_backend(wanted);
  for (const Backend *backend : backends()) {
    if (backend->automatic && missing_requirements(backend->needs) == 0) return *backend;
  }
  fail(KTK_ERR_INTERNAL, "no instruction set is runnable, not even the portable one");
}

}  // namespace ktk
