#!/usr/bin/env bash
# The operator grid on a GPU under NVIDIA's compute-sanitizer: accesses out of bounds, races in shared memory,
# barriers, reads of memory that nobody wrote.
#
#     benchmarks/gpu_sanitizer.sh [arguments of pytest]        e.g. -k "triton and attention"
#
# Kernels run many times slower under it: without arguments, the samples of every operator that are always tried.
set -euo pipefail
cd "$(dirname "$0")/.."
command -v compute-sanitizer > /dev/null || { echo "gpu_sanitizer: compute-sanitizer (of the CUDA toolkit) is not in PATH" >&2; exit 2; }
python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "gpu_sanitizer: PyTorch sees no GPU" >&2; exit 2; }
# Names in parts of ids, that no case on a CPU has; attention, decode_attention and products of 16 bits have files apart.
[ $# -gt 0 ] || set -- -k "[triton- or [cuda- or cuda-sm80 or cuda-sm90a or cuda-blas or cuda-torch." -m "not heavy"
files=(tests/test_ops.py tests/sim/test_attention{,_sm90a,_sm90a_backward,_one_pass}.py tests/sim/test_{decode,fp8}_attention.py
  tests/sim/test_{ffn,linear,linear_cross_entropy,linear_cross_entropy_shard,main_grad}.py)
export PYTORCH_NO_CUDA_MEMORY_CACHING=1  # each tensor an allocation of its own, whose bounds are known
for tool in memcheck racecheck synccheck initcheck; do
  echo "== $tool"
  compute-sanitizer --tool "$tool" --target-processes all --error-exitcode 1 python -m pytest -q -x "${files[@]}" "$@"
done
