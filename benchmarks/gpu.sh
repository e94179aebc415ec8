#!/usr/bin/env bash
# Learner benchmarks on a machine with an NVIDIA GPU; needs Python with torch (CUDA), transformers, accelerate and DeepSpeed. Figures go to benchmarks/results/gpu.jsonl.
#   bash benchmarks/gpu.sh [PYTHON]
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${1:-python}
OUT=benchmarks/results/gpu.jsonl
"$PYTHON" -c 'import torch; assert torch.cuda.is_available(), "torch finds no GPU"'
"$PYTHON" benchmarks/gpu.py --models 0.5b --out "$OUT"
"$PYTHON" benchmarks/gpu.py --models 1.5b --out "$OUT"
"$PYTHON" benchmarks/gpu.py --models 1.5b --checkpointing --out "$OUT"
