#!/usr/bin/env bash
# Profiles training steps of a benchmark model: with nsys where it is installed, else with torch's profiler.
#
#   bench/profile_nsys.sh [MODEL [OPTION...]]     VGG16-BN without one; options are those of bench/profile_step.py
#
# Writes to $OUT (bench/results/profile): report.nsys-rep and tables of ranges and kernels, or trace.json (Chrome's format)
# and table.txt. docs/costs.md tells how to read them.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-bench/results/profile}
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
mkdir -p "$OUT"
if command -v nsys >/dev/null; then
  LWAS_FAST_RANGES=1 nsys profile --force-overwrite true --trace cuda,nvtx,osrt --output "$OUT/report" \
    "$PYTHON" bench/profile_step.py "$@"
  nsys stats --force-export true --report nvtx_sum,cuda_gpu_kern_sum,cuda_api_sum "$OUT/report.nsys-rep" | tee "$OUT/table.txt"
else
  echo "nsys is not installed: torch's profiler instead" >&2
  "$PYTHON" bench/profile_step.py "$@" --trace "$OUT"
fi
