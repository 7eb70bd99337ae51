#!/usr/bin/env bash
# Compare methods at each one's own best learning rate: what to run comes from a table that you edit.
#   bash scripts/compare_methods.sh                          the table scripts/compare_methods.tsv
#   bash scripts/compare_methods.sh my_table.tsv --jobs 2    another, two runs at a time
#   bash scripts/compare_methods.sh my_table.tsv -- --bf16   flags after -- go to every run
#   --jobs N               runs at a time; without it one on each GPU, or one
#   --output_dir FOLDER    of all runs and the report, by default output/methods
# First every rate of every method trains with one seed, scored on training rows that are kept out of training; then the
# best rate with all seeds, scored on the validation set. The table's first method is the one that the others are
# compared with. Runs go to <output_dir>/choosing and <output_dir>/final, a log beside each, the report to
# <output_dir>/report. Finished runs are kept, interrupted ones resume, a run that diverged is not repeated. The settings
# of launch.sh (GLUE_DIR, PYTHON, DRY_RUN, ...) apply. After Ctrl-C the same command continues.
source "$(dirname -- "${BASH_SOURCE[0]}")/launch.sh"
[[ "${nnodes:-${SLURM_STEP_NUM_NODES:-1}}" == 1 ]] || refuse "takes one machine, and this is a start on several."
export nnodes=1 # also in a SLURM job that has more
exec "$python" "$root/scripts/compare_methods.py" "$@"
