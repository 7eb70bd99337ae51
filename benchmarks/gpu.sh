#!/usr/bin/env bash
# What this repository does on a GPU, beside transformers + PEFT: random weights, no Hub, nothing installed. It needs a
# Python with torch, transformers, peft and scikit-learn; PYTHON=... names another one than python3.
#   bash benchmarks/gpu.sh numerics attention speed graphs --output DIR   again: measures only what is missing in DIR
#   bash benchmarks/gpu.sh numerics attention speed graphs --smoke        the same code on a CPU, on tiny models (seconds)
#   bash benchmarks/gpu.sh finetune --data .demo   run_glue.py on the sentences of scripts/demo.sh
# A stage ends after 200 (numerics) or 400 seconds, or --seconds N; the rows left are listed.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PYTHONPATH="$root/src${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec "${PYTHON:-python3}" -u "$root/benchmarks/gpu.py" "$@"
