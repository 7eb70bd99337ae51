#!/usr/bin/env bash
# What this repository does on a GPU, beside transformers + PEFT: random weights, no Hub, nothing installed. It needs a
# Python with torch, transformers, peft and scikit-learn; PYTHON=... names another one than python3.
#   bash benchmarks/gpu.sh numerics speed --output DIR     again: measures only what is missing in DIR
#   bash benchmarks/gpu.sh numerics speed --smoke          the same code on a CPU, on tiny models (seconds)
# A stage ends after 200 (numerics) or 400 (speed) seconds, or --seconds N; the rows left are listed.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PYTHONPATH="$root/src${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec "${PYTHON:-python3}" -u "$root/benchmarks/gpu.py" "$@"
