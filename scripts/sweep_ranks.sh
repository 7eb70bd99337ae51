#!/usr/bin/env bash
# The paper's table of ranks (section 7.1, table 6) from runs of your own: one script over ranks and sets of layers.
#   bash scripts/sweep_ranks.sh scripts/roberta_base_rte.sh 3               seeds 0 to 2
#   bash scripts/sweep_ranks.sh scripts/roberta_base_cola.sh 1 --jobs 2 -- --num_train_epochs 10
# lora_alpha stays the script's at every rank, as in the paper. An MNLI adapter has its own rank and layers, so that no run
# of a sweep starts from one (MNLI_LORA=none). Runs go to output/ranks, or to --output_dir; the table and its picture come
# last. Everything else is run_seeds.sh's: bash scripts/run_seeds.sh --help.
root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/scripts/help.sh"
export MNLI_LORA=none
own=() extra=()
while (($#)) && [[ "$1" != -- ]]; do own+=("$1") && shift; done
(($#)) && extra=("$@")
exec bash "$root/scripts/run_seeds.sh" ${own[@]+"${own[@]}"} --output_dir "${output_dir:-$root/output/ranks}" \
  --grid lora_r 1 2 4 8 64 --grid lora_target_modules query query,value query,key,value,dense ${extra[@]+"${extra[@]}"}
