#!/usr/bin/env bash
# The operator grid on a GPU under NVIDIA's compute-sanitizer: accesses out of bounds, races in shared memory, barriers.
#
#     benchmarks/gpu_sanitizer.sh [arguments of pytest]        e.g. -k "triton and attention"
#
# Kernels run many times slower under it: without arguments, the samples of every operator that are always tried.
set -euo pipefail
cd "$(dirname "$0")/.."
command -v compute-sanitizer > /dev/null || { echo "gpu_sanitizer: compute-sanitizer (of the CUDA toolkit) is not in PATH" >&2; exit 2; }
python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "gpu_sanitizer: PyTorch sees no GPU" >&2; exit 2; }
[ $# -gt 0 ] || set -- -k "[triton- or [cuda-" -m "not heavy"
export PYTORCH_NO_CUDA_MEMORY_CACHING=1  # each tensor an allocation of its own, whose bounds are known
for tool in memcheck racecheck synccheck; do
  echo "== $tool"
  compute-sanitizer --tool "$tool" --target-processes all --error-exitcode 1 python -m pytest -q -x tests/test_ops.py "$@"
done
