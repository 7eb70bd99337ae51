#!/usr/bin/env bash
# All comparisons with transformers + PEFT and with the machine's limits, on random weights; no Hub, no GPU. Leave the
# machine alone meanwhile (about an hour on two cores).
#   bash benchmarks/run.sh     prints Markdown tables, also to benchmarks/results/last_run.md; figures in JSON beside it
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/scripts/install.sh"
install dev
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
mkdir -p "$root/benchmarks/results"
for run in train_step "train_step --bf16" eval "eval --bf16" memory variants predict startup scaling levers processes; do
  read -r name flags <<< "$run"
  printf '\n## %s.py %s\n\n' "$name" "$flags"
  "$venv/bin/python" "$root/benchmarks/$name.py" $flags
done | tee "$root/benchmarks/results/last_run.md"
