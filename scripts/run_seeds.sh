#!/usr/bin/env bash
# Run scripts over several seeds: what is finished is left alone, what was interrupted goes on, and the report comes last.
#   bash scripts/run_seeds.sh scripts/roberta_base_rte.sh 5                  seeds 0 to 4
#   bash scripts/run_seeds.sh scripts/roberta_base_*.sh --seeds 0,1,2        several scripts
#   bash scripts/run_seeds.sh scripts/roberta_base_rte.sh 3 -- --lora_r 4    what follows -- goes to every run
#   bash scripts/run_seeds.sh scripts/roberta_base_rte.sh 3 --grid lora_r 1 2 4 --grid learning_rate 2e-4 4e-4
# Runs go to output/seeds/<script>/seed_<n>, or --output_dir; one log each beside it. Several GPUs run side by side, one
# run each; --jobs says otherwise. Where a script starts from an MNLI adapter, it takes that of the same seed, if it is
# there or among the scripts. The settings of launch.sh (GLUE_DIR, MNLI_LORA, PYTHON, DRY_RUN, ...) hold.
# Ctrl-C: the same command goes on.
source "$(dirname -- "${BASH_SOURCE[0]}")/launch.sh"
[[ "${nnodes:-${SLURM_STEP_NUM_NODES:-1}}" == 1 ]] || refuse "takes one machine, and this is a start on several." \
  "Start it on each by itself, without nnodes, with seeds of its own: --seeds."
export nnodes=1 # also in a SLURM job that has more
exec "$python" "$root/scripts/run_seeds.py" "$@"
