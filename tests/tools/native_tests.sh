#!/usr/bin/env bash
# Builds and runs the C++ tests: native_tests.sh BUILD_DIR [SANITIZERS], e.g. `thread` or `address,undefined`.
# Wants meson, ninja and Cython on the path. Uses the compiler of $CXX, else the default one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
build=$1
sanitizers=${2:-none}
options=(-Dnative_tests=true "-Db_sanitize=$sanitizers")

# Not compiled again for the sanitizers. ThreadSanitizer: a kernel runs within one thread, and races are outside
# of it. AddressSanitizer: what cannot run here. Emulated tiles stay for both: with a matrix unit workers wait for
# one another within a section.
left_out=()
for isa_and_flag in amx:amx_int8 avx512_bf16:avx512_bf16 avx512:avx512dq avx2:avx2; do
  if [[ $sanitizers == thread ]] || ! grep -qw "${isa_and_flag#*:}" /proc/cpuinfo; then
    left_out+=("${isa_and_flag%:*}")
  fi
done
[[ $sanitizers == none ]] || options+=("-Dwithout_isas=$(IFS=,; echo "${left_out[*]}")")
[[ $sanitizers != none ]] || options+=(-Damx_emulation=false)

if [[ $sanitizers == none ]]; then
  echo "== C++ tests"
else
  echo "== C++ tests under $sanitizers"
  options+=(-Ddebug=true -Doptimization=0 -Db_lundef=false)
  probe=$(mktemp)
  trap 'rm -f "$probe"' EXIT
  # Some compilers come without the sanitizers' run time, and some kernels leave it no room in memory.
  if ! { echo 'int main() {}' | "${CXX:-c++}" "-fsanitize=$sanitizers" -x c++ - -o "$probe" && "$probe"; } 2>/dev/null; then
    echo "skipped: programs built by ${CXX:-c++} with -fsanitize=$sanitizers do not run here"
    exit 0
  fi
fi

if [[ ! -f $build/build.ninja ]]; then
  mkdir -p "$(dirname "$build")"
  meson setup "$build" "${options[@]}" >"$build.log" 2>&1 || { cat "$build.log"; exit 1; }
fi
TSAN_OPTIONS=${TSAN_OPTIONS:-halt_on_error=1} \
UBSAN_OPTIONS=${UBSAN_OPTIONS:-print_stacktrace=1:halt_on_error=1} \
  meson test -C "$build" --print-errorlogs
