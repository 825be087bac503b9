#!/usr/bin/env bash
# Builds the ops, runs the GPU tests and both benchmarks on a machine with a GPU, from a bare checkout:
#     bash tools/analysis_tools/gpu_check.sh [DIR]        DIR is the folder of log and figures; default: docs/gpu
# It needs torch, triton, numpy, pytest and nvcc, for the peers torchvision, and takes less than 8 minutes: each part has
# a limit.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 2
PYTHON=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

device=$("$PYTHON" -c 'import re, torch; print(re.sub("[^A-Za-z0-9]+", "-", torch.cuda.get_device_name(0)))' 2> /dev/null) || {
  echo "gpu_check.sh: $PYTHON has no PyTorch that finds a GPU; set PYTHON to one that has" >&2
  exit 2
}
out=${1:-docs/gpu}
mkdir -p "$out"
log=$out/check_$device.log
: > "$log"
failed=()

part() {
  local name=$1 limit=$2 start=$SECONDS code
  shift 2
  echo "== $name: $*" | tee -a "$log"
  timeout --kill-after=5 "$limit" "$@" 2>&1 | tee -a "$log"
  code=${PIPESTATUS[0]}
  [ "$code" -eq 0 ] || failed+=("$name")
  echo "== $name: exit code $code, $((SECONDS - start)) s of at most $limit s" | tee -a "$log"
}

part build 150 env FORCE_CUDA=1 MMSPATIALMAMBA_WITH_OPS=1 "$PYTHON" setup.py build_ext --inplace
part tests 120 "$PYTHON" -m pytest -m gpu tests/test_ops/cuda/test_gpu.py tests/test_ops/triton/test_gpu.py -q -ra
part ops 90 "$PYTHON" tools/analysis_tools/benchmark_ops.py --device cuda --out "$out" --ops structure_aware_scan
part backbone 110 "$PYTHON" tools/analysis_tools/benchmark_backbone.py --device cuda --out "$out" --seconds 0.7

if [ ${#failed[@]} -gt 0 ]; then
  echo "gpu_check.sh: failed: ${failed[*]}; see $log" | tee -a "$log" >&2
  exit 1
fi
echo "gpu_check.sh: all parts passed; results in $out" | tee -a "$log"
