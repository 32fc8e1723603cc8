#!/usr/bin/env bash
# All that a GPU must show, in under twenty minutes: correctness first, then speed, each beside what
# the machine reaches at best. Needs torch with Triton and numpy; no decord, OpenCV or Numba.
#     bash benchmarks/gpu.sh | tee gpu.txt
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=. PYTHONUNBUFFERED=1
PYTHON="${PYTHON:-python3}"
"$PYTHON" benchmarks/gpu_limits.py
timeout 300 "$PYTHON" benchmarks/gpu_flow.py
timeout 200 "$PYTHON" benchmarks/gpu_i3d.py
timeout 500 "$PYTHON" benchmarks/gpu_train.py
