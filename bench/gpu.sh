#!/usr/bin/env bash
# bench/gpu.sh OUT [portable|hopper]: what only a machine with a GPU can check, in eight minutes, everything it finds
# under OUT: tests, compute-sanitizer, benchmarks; of the Triton kernels, or of the CUDA kernels for Hopper.
# Builds the package unless its library is here, built elsewhere with CUDA.
# A step that overruns its time is stopped; a benchmark then keeps its finished cases.
set -uo pipefail
what=${2:-portable}
if [ $# -lt 1 ] || [ $# -gt 2 ] || [[ $what != portable && $what != hopper ]]; then
  echo "usage: bench/gpu.sh OUT [portable|hopper]" >&2
  exit 2
fi
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 2
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
failed=()
LIMIT=465  # seconds, with what the last step needs to end

# step NAME SECONDS COMMAND...
step() {
  local name=$1 seconds=$2 start=$SECONDS status=0 left=$((LIMIT - SECONDS))
  shift 2
  [ "$left" -gt 0 ] || { echo "$name: no time left" | tee -a "$out/summary.txt"; failed+=("$name"); return; }
  [ "$seconds" -le "$left" ] || seconds=$left
  timeout --kill-after=20 "$seconds" "$@" >"$out/$name.log" 2>&1 || status=$?
  echo "$name: exit $status after $((SECONDS - start)) s of at most $seconds (124: stopped)" | tee -a "$out/summary.txt"
  [ "$status" = 0 ] || failed+=("$name")
}
bench() {
  local name=$1 seconds=$2
  shift 2
  step "bench-$name" "$seconds" "$python" bench/run.py --device cuda --json "$out/$name.json" --plot "$out/$name.png" "$@"
}
# sanitize TOOL SECONDS PYTEST-ARGUMENTS...
sanitize() {
  local tool=$1 seconds=$2
  shift 2
  if command -v compute-sanitizer >/dev/null; then
    step "$tool" "$seconds" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      --target-processes all "$python" -m pytest -m gpu "$@"
  else
    echo "$tool: no compute-sanitizer on PATH" | tee -a "$out/summary.txt"
    failed+=("$tool")
  fi
}
portable() {
  step tests 110 "$python" -m pytest -m gpu --ignore tests/test_gpu_hopper.py
  for tool in memcheck racecheck; do
    sanitize $tool 35 tests/test_triton.py tests/test_triton_training.py tests/test_triton_weights.py -k "large_kernels or same_bits"
  done
  bench networks 130
  bench train 100
  bench blocks 25 --quick
  bench sharing 35 --only 768_32_k3 --peers ""
}
hopper() {
  step tests 120 "$python" -m pytest tests/test_gpu_hopper.py
  export SPIN_RANDOM_SHAPES=20
  for tool in memcheck racecheck synccheck; do
    sanitize $tool 50 tests/test_gpu_hopper.py -k "random_shapes"
  done
  bench triton 60 --only p14 --batch 64,256 --dtype bfloat16 --peers ""
  SPIN_HOPPER=1 bench hopper 60 --only p14 --batch 64,256 --dtype bfloat16 --peers ""
  SPIN_HOPPER=1 step counters 60 ncu --clock-control none --kernel-name regex:mixer_kernel --launch-skip 4 --launch-count 2 \
    --set full "$python" bench/run.py --device cuda --only 768_32 --batch 64 --dtype bfloat16 --peers ""
}

: >"$out/summary.txt"
"$python" -c "import torch; assert torch.cuda.is_available(); print(torch.cuda.get_device_name(), 'torch', torch.__version__)" \
  2>&1 | tail -n 1 | tee -a "$out/summary.txt"
[ -e spin_kernels/libspin.so ] || step build 240 "$python" -m pip install --no-build-isolation --no-deps -e .
"$what"
echo "failed: ${failed[*]:-nothing}" | tee -a "$out/summary.txt"
[ ${#failed[@]} = 0 ]
