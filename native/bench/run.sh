#!/usr/bin/env bash
# Builds the benchmarks of the runtime and runs them: native/bench/run.sh FOLDER [COMMAND...]
#
# Writes FOLDER/pool.json and FOLDER/trace.json. COMMAND goes before each program: on a machine that others use
# too, `chrt --rr 1` (as root) keeps them out of the way. Needs meson, ninja, Cython and a C++ compiler with
# OpenMP; nothing is downloaded.
set -euo pipefail
folder=$(realpath -m "${1:?usage: run.sh FOLDER [COMMAND...]}")
shift
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
build=${KTK_BENCH_BUILD:-build/bench}
mkdir -p "$folder"
if [[ ! -f $build/build.ninja ]]; then
  mkdir -p "$(dirname "$build")"
  meson setup "$build" -Dbenchmarks=true -Damx_emulation=false >/dev/null
fi
ninja -C "$build" --quiet native/bench/pool_bench native/bench/trace_bench
"$@" "$build/native/bench/pool_bench" --json "$folder/pool.json"
"$@" "$build/native/bench/trace_bench" --json "$folder/trace.json"
