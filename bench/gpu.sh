#!/usr/bin/env bash
# Everything that needs a GPU, in one command of under 9 minutes: build, test, sanitize, measure.
#
#   bench/gpu.sh [--dry-run] [--out runs/gpu]
#
# Writes OUT/gpu.json (all figures), OUT/gpu.txt (the tables) and OUT/*.log. --dry-run needs no GPU: it builds with nvcc,
# runs the kernels' source and Triton's interpreter on the CPU, and makes all inputs up to the first launch. PYTHON names
# the interpreter (default python3), which needs torch, triton, numpy, pytest, pybind11, cmake and ninja. LOWBIT_CUDA_ARCHS
# is 90a-real by default. Nothing is installed: modules are built in place.
# Exit code: 0 all steps succeeded, 1 one failed (its log is named), 2 bad arguments or no GPU without --dry-run.
set -u -o pipefail
cd "$(dirname "$0")/.."
root=$PWD dry="" out=runs/gpu python=${PYTHON:-python3} started=$SECONDS failed=""
while [ $# -gt 0 ]; do
  case $1 in
    --dry-run) dry=--dry-run ;;
    --out) out=${2:?--out needs a folder}; shift ;;
    *) sed -n '4,10p' "$0" >&2; exit 2 ;;
  esac
  shift
done
# Seconds that each step may take; the kernels have what is left, at least their share here.
total=540
declare -A limits=([build]=150 [tests]=130 [memcheck]=50 [racecheck]=50 [engine]=60 [kernels]=95)

if ! "$python" -c 'import torch' 2> /dev/null; then
  echo "gpu.sh: $python has no PyTorch: name another interpreter by PYTHON=" >&2
  exit 2
fi
if [ -z "$dry" ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu.sh: PyTorch finds no CUDA GPU here; --dry-run does everything up to the first launch without one" >&2
  exit 2
fi
mkdir -p "$out" || exit 2
export LOWBIT_CUDA=on LOWBIT_CUDA_ARCHS=${LOWBIT_CUDA_ARCHS:-90a-real} PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
# The packages by their installed names, without installing: lowbit.kernels is kernels/, lowbit.tools is tools/.
site=$PWD/build/gpu-site
rm -rf "$site" && mkdir -p "$site/lowbit"
# PYTHONSAFEPATH leaves out the folder of a script: bench/ is named for what the scripts there share.
export PYTHONPATH=$site:$root/bench${PYTHONPATH:+:$PYTHONPATH}

left() { echo $((total - (SECONDS - started))); }
# step NAME LIMIT COMMAND...: the end of its log, and what came of it in OUT/steps. LIMIT is a name in limits, or seconds.
: > "$out/steps"
step() {
  local name=$1 limit=${limits[$2]:-$2} begun=$SECONDS code
  shift 2
  # A dry run is not paid by the minute, and machines without a GPU are often slow ones.
  if [ -n "$dry" ]; then limit=$((limit * 10)); elif [ "$(left)" -lt "$limit" ]; then limit=$(left); fi
  if [ "$limit" -lt 5 ]; then
    echo "$name skipped 0" >> "$out/steps"
    echo "== $name: no time left"
    failed+=" $name"
    return 1
  fi
  timeout "$limit" "$@" > "$out/$name.log" 2>&1
  code=$?
  tail -n "${LINES_SHOWN:-3}" "$out/$name.log"
  echo "$name $code $((SECONDS - begun))" >> "$out/steps"
  echo "== $name: exit $code after $((SECONDS - begun)) s$([ $code -eq 124 ] && echo " (its limit)")"
  [ $code -eq 0 ] || failed+=" $name"
  return $code
}

report() {
  "$python" - "$out" "${dry:+dry}" << 'END'
import json, sys
from pathlib import Path

out = Path(sys.argv[1])
steps = [line.split() for line in (out / "steps").read_text().splitlines()]
result = {"dry_run": sys.argv[2] == "dry", "steps": [{"name": n, "exit": e, "seconds": int(s)} for n, e, s in steps]}
for name in ("engine", "kernels"):
    path = out / f"{name}.json"
    result[name] = json.loads(path.read_text()) if path.exists() else None
(out / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
END
  cat "$out"/engine.log "$out"/kernels.log > "$out/gpu.txt" 2> /dev/null
  if [ -n "$failed" ]; then
    echo "gpu: FAILED:$failed (logs in $out), $((SECONDS - started)) s; $out/gpu.json" >&2
    exit 1
  fi
  [ -z "$dry" ] || echo "gpu: dry run: all is in order up to the first launch; nothing was launched or measured"
  echo "gpu: $((SECONDS - started)) s; $out/gpu.json"
}

rm -f "$out/engine.json" "$out/kernels.json"
step build build "$python" setup.py build_ext --inplace || { report; exit 1; }
for f in "$root"/lowbit/*; do ln -sfn "$f" "$site/lowbit/"; done
ln -sfn "$root/kernels" "$site/lowbit/kernels"
ln -sfn "$root/tools" "$site/lowbit/tools"

workers=()
"$python" -c 'import xdist' 2> /dev/null && [ -z "$dry" ] && workers=(-n 8)
tests=()
for name in cuda_host cuda_launch cuda_gpu cuda_engine triton_linear; do tests+=("tests/test_$name.py"); done
LINES_SHOWN=4 step tests tests "$python" -m pytest -q -p no:cacheprovider "${workers[@]}" "${tests[@]}"

if [ -n "$dry" ]; then
  step engine engine "$python" bench/gpu_engine.py --dry-run
  LINES_SHOWN=8 step kernels kernels "$python" bench/gpu_kernels.py --dry-run
  report
  exit
fi
for tool in memcheck racecheck; do
  if command -v compute-sanitizer > /dev/null; then
    step "$tool" "$tool" compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" bench/gpu_smoke.py
  else
    echo "== $tool: compute-sanitizer is not installed"
    step "smoke-instead-of-$tool" 30 "$python" bench/gpu_smoke.py
  fi
done
LINES_SHOWN=12 step engine engine "$python" bench/gpu_engine.py --out "$out/engine.json"
seconds=$(($(left) - 30))
LINES_SHOWN=200 step kernels "$((seconds + 25))" "$python" bench/gpu_kernels.py --out "$out/kernels.json" --seconds "$seconds"
report
