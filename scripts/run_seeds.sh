#!/usr/bin/env bash
# Run scripts over several seeds: finished runs are skipped, interrupted ones resume, and the report comes last.
#   bash scripts/run_seeds.sh scripts/roberta_base_cola.sh 5                 seeds 0 to 4
#   bash scripts/run_seeds.sh scripts/roberta_base_*.sh --seeds 0,1,2        several scripts
#   bash scripts/run_seeds.sh scripts/baselines/full_roberta_base.sh:rte 5   a script that takes a task
#   bash scripts/run_seeds.sh scripts/roberta_base_cola.sh 3 -- --lora_r 4   flags after -- go to every run
#   bash scripts/run_seeds.sh scripts/roberta_base_cola.sh 3 --grid lora_r 1 2 4 --grid learning_rate 2e-4 4e-4
#   --seeds 0,1,2          which seeds, instead of how many; without either, five
#   --grid FLAG VALUE ...  a run with each value of a flag; several grids are combined
#   --jobs N               runs at a time; without it one on each GPU, or one
#   --output_dir FOLDER    of all runs and the report, by default output/seeds
# A run goes to <output_dir>/<script>/seed_<n> (<script>_<task>), its log is beside it. A script that starts from an MNLI
# adapter takes that of the same seed, if it exists or its script is on the command line. The settings of launch.sh
# (GLUE_DIR, MNLI_LORA, PYTHON, DRY_RUN, ...) apply. After Ctrl-C the same command continues.
source "$(dirname -- "${BASH_SOURCE[0]}")/launch.sh"
[[ "${nnodes:-${SLURM_STEP_NUM_NODES:-1}}" == 1 ]] || refuse "takes one machine, and this is a start on several." \
  "Start it on each by itself, without nnodes, with seeds of its own: --seeds."
export nnodes=1 # also in a SLURM job that has more
exec "$python" "$root/scripts/run_seeds.py" "$@"
