#!/usr/bin/env bash
# All that needs a GPU, in one go, on a machine without a network: builds the extension from source with the torch that
# is there, tests it, measures it, and looks for memory errors and races.
#
#   bench/gpu.sh                   every stage
#   bench/gpu.sh build update      these stages
#
# Writes to $OUT (bench/results/gpu): a log and a JSON for each stage, and summary.json. A stage that fails or takes
# longer than $LIMIT seconds does not keep the others from running; the exit status says whether one did.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-bench/results/gpu}
PYTHON=${PYTHON:-python3}
LIMIT=${LIMIT:-460}
STAGES=(build tests update rates step scaling profile sanitizer quality)
chosen=("$@")
[ ${#chosen[@]} -gt 0 ] || chosen=("${STAGES[@]}")
for name in "${chosen[@]}"; do
  case " ${STAGES[*]} " in *" $name "*) ;; *) echo "no stage '$name'; there are: ${STAGES[*]}" >&2; exit 2 ;; esac
done
mkdir -p "$OUT"
rm -f "$OUT/stages.jsonl"
failed=0

run_stage() { # run_stage NAME: runs the function stage_NAME within the limit, notes status and seconds
  local name=$1 start=$SECONDS status=0
  printf '==> %s\n' "$name"
  export -f "stage_$name"
  timeout -k 10 "$LIMIT" bash -c "set -euo pipefail; stage_$name" >"$OUT/$name.log" 2>&1 || status=$?
  tail -n 12 "$OUT/$name.log"
  [ $status -eq 0 ] || failed=1
  printf '==> %s: status %d, %d s\n' "$name" $status $((SECONDS - start))
  printf '{"stage": "%s", "status": %d, "seconds": %d}\n' "$name" $status $((SECONDS - start)) >>"$OUT/stages.jsonl"
}
measure() { # measure NAME: runs bench/test_NAME.py and prints its table
  $PYTHON -m pytest "bench/test_$1.py" -q --benchmark-quiet --benchmark-json="$OUT/$1.json"
  $PYTHON bench/report.py "$OUT/$1.json"
}
export OUT PYTHON
export -f measure

stage_build() {
  LWAS_FAST_BUILD=cuda $PYTHON -m pip install -v -e . --no-build-isolation --no-deps
  $PYTHON -m lwas_fast
}

stage_tests() {
  $PYTHON -m pytest tests -m gpu -q --continue-on-collection-errors --junitxml="$OUT/tests.xml"
}

stage_update() { measure update; }
stage_rates() { measure rates; }
stage_step() { measure step; }
stage_scaling() { measure scaling; }

stage_profile() {
  OUT="$OUT/profile" PYTHON=$PYTHON bench/profile_nsys.sh VGG16-BN
}

stage_quality() { # data in the folder LWAS_FAST_DATA
  if [ -z "${LWAS_FAST_DATA:-}" ]; then
    echo "no data given: LWAS_FAST_DATA is not set"
    return
  fi
  $PYTHON -m bench.quality.run --full --steps 1500 --tasks vgg11,resnet --seeds 0 --out "$OUT/quality" \
    --optimizers adamwlw,sgdlw,adamw:lr=1e-3,sgd:lr=1e-1
  $PYTHON -m bench.quality.report "$OUT/quality" --out "$OUT/quality"
}

stage_sanitizer() {
  local tool sanitizer
  sanitizer=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
  for tool in memcheck racecheck; do
    "$sanitizer" --tool $tool --error-exitcode 9 $PYTHON bench/sanitize_kernels.py
  done
}

for name in "${chosen[@]}"; do run_stage "$name"; done
$PYTHON - "$OUT" <<'END'
import json, pathlib, sys

out = pathlib.Path(sys.argv[1])
stages = [json.loads(line) for line in (out / "stages.jsonl").read_text().splitlines()]
summary = {"stages": stages}
try:
    from lwas_fast.installed import describe

    summary["environment"] = dict(describe())
except Exception as error:  # the build may be what failed
    summary["environment"] = repr(error)
(out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
print(json.dumps(summary, indent=1))
END
exit $failed
