#!/usr/bin/env bash
# Benchmarks on a machine without network: builds the tree, then measures, in commands of less than ten minutes.
#
#   tests/bench/device.sh list                     the commands of a whole run, one a line
#   tests/bench/device.sh build                    a wheel of this tree, installed in build/device/site
#   tests/bench/device.sh shape NAME [OPTIONS]     every format and batch size on the best instruction set
#   tests/bench/device.sh isa ISA NAME [OPTIONS]   the same on another instruction set
#   tests/bench/device.sh scaling NAME [OPTIONS]   1, 2, 4 ... all threads, three formats
#   tests/bench/device.sh peers NAME [OPTIONS]     ktk beside other libraries
#   tests/bench/device.sh sft NAME [OPTIONS]       fine-tuning: forward and backward, 512 to 8192 tokens
#   tests/bench/device.sh draw                     pictures of what is in $OUT
#
# NAME is a shape of `ktk bench`, OPTIONS are passed on. Results go to $OUT (build/device/out). Every command builds
# first if nothing is built. From the environment:
#
#   WHEELS        folder of wheels for what the machine lacks to build or to run (meson-python, typer, rich ...)
#   MEMORY_GB     for packed weights (32): some machines show little free memory until it is used
#   PEERS_SITE    folder with kt_kernel and vllm (tests/bench/peers.py)
#   PEERS_PYTHON  Python for the peers, where they need another PyTorch; ktk then goes through ctypes
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
OUT=${OUT:-$PWD/build/device/out}
SITE=$PWD/build/device/site
MEMORY_GB=${MEMORY_GB:-32}
PEERS_PYTHON=${PEERS_PYTHON:-python3}
SHAPES=(qwen3 dsv3 mixtral awkward)
mkdir -p "$OUT"

build() {
  [[ -d $SITE/ktk ]] && return
  local tools=$PWD/build/device/tools
  if [[ -n ${WHEELS:-} ]]; then
    python3 -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$tools" "$WHEELS"/*.whl
  fi
  export PYTHONPATH=$tools${PYTHONPATH:+:$PYTHONPATH}
  export PATH=$tools/bin:$PATH
  python3 -m pip wheel -q --no-build-isolation --no-deps --no-index -w build/device/wheel \
    -Cbuild-dir=build/device/native .
  python3 -m pip install -q --no-index --no-deps --target "$SITE" build/device/wheel/*.whl
}

# Everything that is not the wheel under test comes from the machine, or from WHEELS. Started elsewhere: in the
# tree, Python would find the package without its library.
run_ktk() {
  (cd / && PYTHONPATH=$SITE:$OLDPWD/build/device/tools OMP_WAIT_POLICY=PASSIVE python3 -m ktk "$@")
}

bench() {
  local name=$1
  shift
  run_ktk bench --memory-gb "$MEMORY_GB" --save "$OUT/$name.json" "$@" | tee "$OUT/$name.txt"
}

doubling_threads() {
  local cpus list=1 count=2
  cpus=$(nproc)
  while ((count < cpus)); do
    list+=,$count
    ((count *= 2))
  done
  echo "$list,$cpus"
}

command=${1:-}
shift || true
case $command in
  list)
    echo "tests/bench/device.sh build"
    for shape in "${SHAPES[@]}"; do echo "tests/bench/device.sh shape $shape"; done
    echo "tests/bench/device.sh scaling qwen3"
    echo "tests/bench/device.sh scaling dsv3"
    for isa in avx512_bf16 avx512 avx2; do echo "tests/bench/device.sh isa $isa qwen3"; done
    for shape in "${SHAPES[@]}"; do echo "tests/bench/device.sh peers $shape"; done
    echo "tests/bench/device.sh sft qwen3"
    echo "tests/bench/device.sh sft dsv3"
    echo "tests/bench/device.sh draw"
    ;;
  build) build ;;
  shape)
    build
    shape=$1
    shift
    bench "$shape" --shapes "$shape" --max-cell-s 4 "$@"
    ;;
  isa)
    build
    isa=$1 shape=$2
    shift 2
    bench "$shape-$isa" --isa "$isa" --shapes "$shape" --max-cell-s 4 --max-call-s 8 --no-errors --no-packing "$@"
    ;;
  scaling)
    build
    shape=$1
    shift
    bench "$shape-scaling" --shapes "$shape" --formats bf16,int8,int4 --batches 1,64,1024 --experts 64 \
      --threads "$(doubling_threads)" --max-cell-s 4 --max-call-s 20 --no-skewed --no-errors --no-packing "$@"
    ;;
  peers)
    build
    shape=$1
    shift
    if [[ $PEERS_PYTHON != python3 ]]; then
      export KTK_BINDING=ctypes
    fi
    PYTHONPATH=$SITE:$PWD/build/device/tools "$PEERS_PYTHON" tests/bench/peers.py --shapes "$shape" \
      ${PEERS_SITE:+--site "$PEERS_SITE"} --rounds 3 --cell-s 0.3 --max-call-s 4 \
      --output "$OUT/$shape-peers.json" "$@" | tee "$OUT/$shape-peers.txt"
    ;;
  sft)
    build
    shape=$1
    shift
    PYTHONPATH=$SITE python3 tests/bench/sft.py --shapes "$shape" --tokens 512,1024,2048,4096,8192 --ranks 8,16 \
      --formats bf16,int8,int4,fp8 --output "$OUT/$shape-sft.json" "$@" | tee "$OUT/$shape-sft.txt"
    ;;
  draw)
    build
    for report in "$OUT"/*.json; do
      name=$(basename "$report" .json)
      [[ $name == *-peers || $name == *-sft ]] && continue
      peers=$OUT/$name-peers.json
      others=()
      [[ -f $peers ]] && others=(--peers "$peers")
      run_ktk bench --load "$report" --roofline "$OUT/$name.png" "${others[@]}" >/dev/null
    done
    ;;
  *)
    sed -n '2,/^set -/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
    exit 2
    ;;
esac
