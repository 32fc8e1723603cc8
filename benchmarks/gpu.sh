#!/usr/bin/env bash
# What the product reaches on a machine with GPUs, in under ten minutes: correctness first, then each
# stage alone and the whole command, RGB, flow and both, on one GPU and on all.
#     OUT=results bash benchmarks/gpu.sh            one text file a step in $OUT (default: runs/gpu)
#     OUT=results bash benchmarks/gpu.sh train      training instead, some eight minutes
#     DEVICE=cpu bash benchmarks/gpu.sh [train]     the same scripts, tiny, where there is no GPU
# Needs torch with Triton, safetensors, click, rich, pytest, decord and PyAV. On a machine without a
# registry, WHEELS names a folder with wheels of what is missing.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD" PYTHONUNBUFFERED=1
PYTHON="${PYTHON:-python3}" DEVICE="${DEVICE:-cuda}" OUT="${OUT:-runs/gpu}"
mkdir -p "$OUT"
if [ -n "${WHEELS:-}" ]; then
  "$PYTHON" -m pip install --quiet --no-index --no-deps --target "$OUT/.packages" "$WHEELS"/*.whl
  export PYTHONPATH="$PYTHONPATH:$PWD/$OUT/.packages"
fi
failed=()

# step NAME SECONDS COMMAND…: what it prints goes to the terminal and to $OUT/NAME.txt.
step() {
  local name="$1" limit="$2" begin="$SECONDS"
  shift 2
  echo "== $name"
  timeout "$limit" "$@" 2>&1 | tee "$OUT/$name.txt" || failed+=("$name")
  echo "-- $name: $((SECONDS - begin)) s of at most $limit"
}

bench() { step "$1" "$2" "$PYTHON" "benchmarks/${@:3}"; }

if [ "${1:-}" = train ]; then
  bench train 500 gpu_train.py --device "$DEVICE"
elif [ "$DEVICE" = cpu ]; then
  bench limits 60 gpu_limits.py --device cpu
  bench i3d 300 bench_i3d.py --device cpu --windows 1
  bench extract 300 bench_extract.py world2-both --devices cpu --clips 2 --seconds 1
else
  step tests 120 "$PYTHON" -m pytest -q -m cuda tests
  if [ "${#failed[@]}" -gt 0 ]; then
    echo "The results on this GPU are wrong; no speed is reported."
    exit 1
  fi
  devices=(--devices 0)
  if [ "$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')" -gt 1 ]; then
    devices+=(--devices all)
  fi
  bench limits 30 gpu_limits.py
  bench flow 100 gpu_flow.py
  bench i3d 60 bench_i3d.py --device cuda
  for case in charades-both imagenet-both charades-rgb imagenet-rgb imagenet-flow; do
    bench "$case" 100 bench_extract.py "$case" "${devices[@]}" --clips 32 --seconds 20
  done
fi
if [ "${#failed[@]}" -gt 0 ]; then
  echo "Failed or too slow: ${failed[*]}"
  exit 1
fi
