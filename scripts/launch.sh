# shellcheck shell=bash
# Sourced by the launch scripts: finds Python and hands their flags over to lora_nlu.training.launch.
#
# A script sets tuned_for_gpus, sources this file, fills the array `args` and calls `launch "${args[@]}" "$@"`.
# What a user may set, each as NAME=value before `bash scripts/...`:
#   tuned_for_gpus=8  GPUs the hyperparameters are for; with the batch per GPU it fixes the examples a step
#   recipe=paper      train by the paper's tables (paper_recipes.tsv) where they differ; output/<script's name>_paper
#   devices=1         accelerators to use on each machine, 0 is the CPU; by default all that are there. More than
#                     tuned_for_gpus take smaller batches, fewer accumulate gradients: the examples a step stay the same
#   output_dir=...    results and adapter; by default output/<script's name> in the repository
#   GLUE_DIR=...      the GLUE download; without it the data come from the Hugging Face Hub
#   MNLI_LORA=...     the MNLI adapter that MRPC, RTE and STS-B start from (file or folder), or `none`
#   PYTHON=...        the Python to run
#   DRY_RUN=1         print the command and run nothing
# CUDA_VISIBLE_DEVICES and OMP_NUM_THREADS mean what they always do. On several machines with as many devices each: start
# the script on all, output_dir on a disk they share, and set
#   nnodes=2          how many machines
#   node_rank=0       which one this is: 0 on the first, 1 on the next
#   master_addr=...   name or address of the first, the same on all
#   master_port=...   a free port of the first, 29500 by default; two runs that share a machine need two
# Under SLURM's srun (see slurm.sbatch) these four are found by themselves.
#   torchrun_options="--max_restarts=3 --log_dir=logs"   more flags for torch.distributed.run, split at spaces; with a
#                     --rdzv_backend or --rdzv_endpoint among them, node_rank and master_addr are not needed
set -euo pipefail
root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/scripts/help.sh"
name="$(basename -- "$0" .sh)" # also the output folder, so that no two scripts share one
if [[ -n "${PYTHON:-}" ]]; then python="$PYTHON"
elif [[ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]]; then python=python
elif [[ -x "$root/.venv/bin/python" ]]; then python="$root/.venv/bin/python"
else python=python3; fi
# not -m, which would import what lies in the current folder
module="import os, sys; sys.path = [p for p in sys.path if p]; from lora_nlu.training import launch"

# Stop with status 2 and a message, one argument a line.
refuse() { printf '%s\n' "$name: $1" "${@:2}" >&2; exit 2; }
# needs_mnli SCRIPT: start from the MNLI adapter that SCRIPT trained, or from MNLI_LORA.
needs_mnli() { args+=(--needs_mnli "$1"); }
launch() {
  exec "$python" -c "$module; launch.main(sys.argv[1:], os.environ)" "$root" "$python" "$name" "${tuned_for_gpus:-}" "$@"
}

"$python" -c "$module" 2>/dev/null || refuse "'$python' does not run, or has no lora_nlu (Python 3.10 or newer)." \
  "Install it: pip install -c '$root/constraints.txt' -e '$root'   (scripts/demo.sh does this, in .venv)" \
  "or set PYTHON=<the Python of an environment that has it>."
if [[ -n "${num_gpus:-}" ]] && ! printenv tuned_for_gpus >/dev/null; then
  echo "$name: num_gpus is now called tuned_for_gpus; tuned_for_gpus=$num_gpus is used" >&2
  export tuned_for_gpus="$num_gpus"
fi
