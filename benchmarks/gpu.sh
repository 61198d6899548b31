#!/usr/bin/env bash
# Everything that only a GPU can prove, in one command and without a network: tests/gpu, then
# `score bench` of the demo job. What is missing there is said, and the rest is run all the same.
#   benchmarks/gpu.sh [OUT_DIR [BENCH_OPTION]...]     PYTHON=... for another interpreter
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-gpu-proof} python=${PYTHON:-python3} failed=0
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

{
    date -u +%Y-%m-%dT%H:%M:%SZ
    git describe --always --dirty 2>/dev/null
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit --format=csv ||
        echo "no NVIDIA driver"
    "$python" --version
    for module in torch tensorrt cuda.bindings nvidia.dali onnx onnxruntime openvino pynvml pytest \
        skimage efficientnet_lite_pytorch; do
        "$python" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$module') is None)" \
            2>/dev/null || echo "missing: $module (what needs it is skipped)"
    done
} | tee "$out/setup.txt"

"$python" -m pytest tests/gpu -q -rs -p no:cacheprovider 2>&1 | tee "$out/tests.txt" || failed=1

"$python" - "$out/pictures" <<'PY' &&
import sys
from pathlib import Path
from flows.demo_data import write_pictures
write_pictures(Path(sys.argv[1]), "2026-11-20", num_rows=1000)
PY
    "$python" -m flows.cli bench configs/demo.yaml --date 2026-11-20 --out "$out/bench" \
        --set "input.uri=$out/pictures" --set "engine.store=$out/engines" "${@:2}" 2>&1 |
    tee "$out/bench.txt" || failed=1
exit "$failed"
