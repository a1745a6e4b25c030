#!/usr/bin/env bash
# What needs a GPU, in one call, on a machine without a network: builds the extension from source with the torch that is
# there, tests it, measures it, trains with it, and looks for memory errors and races.
#
#   bench/gpu.sh short             what matters most, within 480 s
#   bench/gpu.sh rest              what is left, within 240 s: profile, scaling, ResNet-50, the other routes
#   bench/gpu.sh                   both
#   bench/gpu.sh build update      these stages
#
# The most valuable comes first. A stage that fails or outlasts its limit does not keep the others from running; one
# that no time is left for is told as skipped (status 125), and $WITHIN sets the seconds for all of them. Writes a log
# and what it measured for each stage to $OUT (bench/results/gpu), packs all of it into $OUT/all.tar.gz after each stage,
# and ends with a table. The exit status says whether a stage failed.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-bench/results/gpu}
PYTHON=${PYTHON:-python3}
SHORT=(build tests update step sanitizer rates training)
REST=(step_rest profile scaling quality)
ALL=("${SHORT[@]}" "${REST[@]}")
declare -A LIMITS=([build]=150 [tests]=100 [sanitizer]=90 [training]=90 [step]=150 [scaling]=90 [quality]=240)

chosen=("$@")
case "${chosen[*]:-all}" in
  short) chosen=("${SHORT[@]}") WITHIN=${WITHIN:-480} ;;
  rest) chosen=("${REST[@]}") WITHIN=${WITHIN:-240} ;;
  all) chosen=("${ALL[@]}") ;;
esac
WITHIN=${WITHIN:-3600}
for name in "${chosen[@]}"; do
  case " ${ALL[*]} " in *" $name "*) ;; *) echo "no stage '$name'; there are: ${ALL[*]}" >&2; exit 2 ;; esac
done
mkdir -p "$OUT/stages"
STAGES=$(cd "$OUT/stages" && pwd)
rm -f "$STAGES/stages.jsonl"
failed=0

run_stage() { # run_stage NAME: runs the function stage_NAME within its limit and what is left; notes status and seconds
  local name=$1 start=$SECONDS status=0 limit=${LIMIT:-${LIMITS[$1]:-60}}
  local left=$((WITHIN - SECONDS - 5))
  [ $limit -le $left ] || limit=$left
  printf '==> %s\n' "$name"
  export -f "stage_$name"
  if [ $limit -lt 2 ]; then
    status=125
  else
    timeout -k 5 "$limit" bash -c "set -euo pipefail; stage_$name" >"$STAGES/$name.log" 2>&1 || status=$?
    tail -n "${LINES_SHOWN:-12}" "$STAGES/$name.log"
  fi
  [ $status -eq 0 ] || failed=1
  printf '==> %s: status %d, %d s\n' "$name" $status $((SECONDS - start))
  printf '{"stage": "%s", "status": %d, "seconds": %d}\n' "$name" $status $((SECONDS - start)) >>"$STAGES/stages.jsonl"
  tar -czf "$OUT/all.tar.gz" -C "$OUT" stages
}
measure() { # measure NAME FILE [OPTION...]: runs bench/test_FILE.py with pytest's options and prints its table
  local name=$1 file=$2
  shift 2
  $PYTHON -m pytest "bench/test_$file.py" -q --benchmark-quiet --benchmark-json="$STAGES/$name.json" "$@"
  $PYTHON bench/report.py "$STAGES/$name.json"
}
export STAGES PYTHON
export -f measure

stage_build() {
  LWAS_FAST_BUILD=cuda $PYTHON -m pip install -v -e . --no-build-isolation --no-deps
  $PYTHON -m lwas_fast
}

# Marked tests, and the comparisons of the rates, which take whatever device is there.
stage_tests() {
  $PYTHON -m pytest -n 4 -p no:benchmark -q tests/rates/test_rates.py --junitxml="$STAGES/tests_rates.xml" \
    >"$STAGES/tests_rates.log" 2>&1 &
  local status=0
  $PYTHON -m pytest -n 6 --dist loadfile -p no:benchmark -q -m "gpu and not slow" tests/update tests/rates \
    tests/test_gpu.py tests/follow tests/parallel tests/examples --continue-on-collection-errors --junitxml="$STAGES/tests.xml" --durations=8 ||
    status=$?
  wait $! || status=$?
  tail -n 3 "$STAGES/tests_rates.log"
  return $status
}

stage_update() { measure update update; }
stage_rates() { measure rates rates -k foreach; } # "a launch a layer" lays out a thousand of them
stage_step() { measure step step -k "(VGG16 or GPT) and autograd"; }
stage_step_rest() { measure step_rest step -k "not ((VGG16 or GPT) and autograd)"; }
stage_scaling() { measure scaling scaling; }

stage_profile() {
  OUT="$STAGES/profile" PYTHON=$PYTHON bench/profile_nsys.sh VGG16-BN
}

# A first look at training: a minute, whose loss must fall. Data in the folder LWAS_FAST_DATA.
stage_training() {
  if [ -z "${LWAS_FAST_DATA:-}" ]; then
    echo "no data given: LWAS_FAST_DATA is not set"
    return
  fi
  $PYTHON -m bench.quality.run --full --steps 400 --tasks vgg11 --seeds 0 --out "$STAGES/training" \
    --optimizers muonlw,adamwlw,adamw:lr=1e-3
  cat "$STAGES"/training/*.csv
}

stage_quality() { # data in the folder LWAS_FAST_DATA
  if [ -z "${LWAS_FAST_DATA:-}" ]; then
    echo "no data given: LWAS_FAST_DATA is not set"
    return
  fi
  $PYTHON -m bench.quality.run --full --steps 1500 --tasks vgg11,resnet --seeds 0 --out "$STAGES/quality" \
    --optimizers muonlw,adamwlw,sgdlw,adamw:lr=1e-3,sgd:lr=1e-1
  cat "$STAGES"/quality/*.csv
}

# Only our kernels are instrumented: with torch's own it takes minutes. Memory errors show only where each tensor is
# an allocation of its own.
stage_sanitizer() {
  local tool sanitizer
  sanitizer=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
  for tool in memcheck racecheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool $tool --error-exitcode 9 --kernel-name kns=first_pass \
      --kernel-name kns=second_pass --kernel-name kns=layer_rates $PYTHON bench/sanitize_kernels.py
  done
}

for name in "${chosen[@]}"; do run_stage "$name"; done
$PYTHON - "$STAGES" <<'EOF'
import json, pathlib, sys

out = pathlib.Path(sys.argv[1])
stages = [json.loads(line) for line in (out / "stages.jsonl").read_text().splitlines()]
summary = {"stages": stages}
try:
    from lwas_fast.installed import describe

    summary["environment"] = dict(describe())
except Exception as error:  # the build may be what failed
    summary["environment"] = repr(error)
(out.parent / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
print(json.dumps(summary["environment"], indent=1))
for stage in stages:
    print(f"{stage['stage']:12} {'ok' if stage['status'] == 0 else 'status %d' % stage['status']:10} {stage['seconds']:4d} s")
EOF
exit $failed
