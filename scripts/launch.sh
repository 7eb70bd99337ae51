# Sourced by every <model>_<task>.sh: where things are and how processes start. Holds no hyperparameter.
#
# A script sets num_gpus, sources this file, fills the array `args` and calls `launch "${args[@]}" "$@"`.
# What a user may set, each as NAME=value before `bash scripts/...`:
#   num_gpus=8        GPUs the hyperparameters are for; with the batch per GPU it fixes the examples a step
#   devices=1         accelerators to use on each machine, 0 is the CPU; by default all that are there. More than
#                     num_gpus take smaller batches, fewer accumulate gradients: the examples a step stay the same
#   output_dir=...    results and adapter; by default output/<script's name> in the repository
#   GLUE_DIR=...      the GLUE download; without it the data come from the Hugging Face Hub
#   MNLI_LORA=...     the MNLI adapter that MRPC, RTE and STS-B start from (file or folder), or `none`
#   PYTHON=...        the Python to run
#   DRY_RUN=1         print the command and run nothing
# CUDA_VISIBLE_DEVICES and OMP_NUM_THREADS mean what they always do.
# On several machines with as many devices each: start the script on all, output_dir on a disk they share, and set
#   nnodes=2          how many machines
#   node_rank=0       which one this is: 0 on the first, 1 on the next
#   master_addr=...   name or address of the first, the same on all
#   master_port=...   a free port of the first, 29500 by default; two runs that share a machine need two
# Started by SLURM's srun (see slurm.sbatch) these four are known, and need not be set.
#   torchrun_options="--max_restarts=3 --log_dir=logs"   more flags for torch.distributed.run, split at spaces; with a
#                     --rdzv_backend or --rdzv_endpoint among them, node_rank and master_addr are not needed
set -euo pipefail
root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
name="$(basename -- "$0" .sh)" # also the output folder, so that no two scripts share one
export PYTHONHASHSEED=0 CUBLAS_WORKSPACE_CONFIG=:16:8 TOKENIZERS_PARALLELISM=false

if [[ -n "${PYTHON:-}" ]]; then python="$PYTHON"
elif [[ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]]; then python=python
elif [[ -x "$root/.venv/bin/python" ]]; then python="$root/.venv/bin/python"
else python=python3; fi

# Stop with status 2 and a message, one argument a line.
refuse() { printf '%s\n' "$name: $1" "${@:2}" >&2; exit 2; }

# whole NAME VALUE LEAST: stop unless the value is a whole number, LEAST or more.
whole() {
  local digits='^(0|[1-9][0-9]{0,5})$' # nothing that overflows, and no 08, which bash takes for octal
  [[ "$2" =~ $digits && "$2" -ge "$3" ]] || refuse "$1='$2' is not a whole number, $3 or more."
}

# is_flag FLAG WORD: whether run_glue.py and torchrun read WORD as FLAG, also as --a-flag or --a_flag=value.
is_flag() {
  local word="${2%%=*}"
  [[ "$word" == --* && "${word//-/_}" == "${1//-/_}" ]]
}

# last_value FLAG DEFAULT ARGS...: the value argparse will see, `--flag value` or `--flag=value`, the last one winning.
last_value() {
  local flag="$1" value="$2"
  shift 2
  while (($#)); do
    if is_flag "$flag" "$1"; then
      if [[ "$1" == *=* ]]; then value="${1#*=}"; else value="${2:-}"; fi
    fi
    shift
  done
  printf '%s' "$value"
}

# needs_mnli SCRIPT EXTRA_FLAGS...: add to `args` the MNLI adapter to start from, by default what SCRIPT trained.
needs_mnli() {
  local lora="${MNLI_LORA:-$root/output/$1}" file
  [[ "$lora" != none && -z "$(last_value --lora_path '' "${@:2}")" ]] || return 0
  file="$lora"
  [[ ! -d "$lora" ]] || file="$lora/adapter_model.safetensors"
  [[ -f "$file" ]] || refuse "starts from an MNLI adapter, and there is none at $lora." \
    "Train it with 'bash scripts/$1.sh', or point to one with MNLI_LORA=<published .bin file or adapter folder>." \
    "MNLI_LORA=none starts from the plain pretrained model instead."
  args+=(--lora_path "$lora")
}

# Run run_glue.py with these flags on the devices of all machines, with the script's number of examples a step.
launch() {
  # what the functions below fill
  local -a environment=(PYTHONHASHSEED=0 CUBLAS_WORKSPACE_CONFIG=:16:8 TOKENIZERS_PARALLELISM=false)
  local -a program=("$python") options=() flags=(--output_dir "${output_dir:-$root/output/$name}") given=("$@")
  local own_rendezvous='' here processes where

  whole num_gpus "${num_gpus:-}" 1
  read_torchrun_options
  find_machines
  count_devices
  [[ -z "${GLUE_DIR:-}" ]] || flags+=(--glue_dir "$GLUE_DIR")
  share_step
  if ((devices == 0)) && drop --fp16; then # a CPU only emulates it, slowly
    echo "$name: no GPU: --fp16 is dropped, computing in fp32" >&2
  fi
  flags+=(${given[@]+"${given[@]}"})
  choose_launcher
  program+=("$root/examples/text-classification/run_glue.py")
  print_command
  [[ "${DRY_RUN:-0}" == 0 ]] || return 0
  export "${environment[@]}"
  exec "${program[@]}" "${flags[@]}"
}

# Split torchrun_options, and see whether they bring a rendezvous of their own.
read_torchrun_options() {
  local word
  read -r -d '' -a options <<<"${torchrun_options:-}" || true # it reports the end of the text as a failure
  for word in ${options[@]+"${options[@]}"}; do
    if is_flag --rdzv_backend "$word" || is_flag --rdzv_endpoint "$word"; then own_rendezvous=1
    elif is_flag --nnodes "$word" || is_flag --nproc_per_node "$word"; then
      refuse "torchrun_options: with ${word%%=*} there the examples a step would change unseen." \
        "Set nnodes=<machines> and devices=<accelerators of each> instead."
    fi
  done
}

# Set nnodes and, where they must find each other, node_rank, master_addr and master_port: the user's, else srun's.
find_machines() {
  local machines="${SLURM_STEP_NUM_NODES:-}" tasks="${SLURM_STEP_NUM_TASKS:-1}" # which srun sets, and sbatch does not
  if [[ "${nnodes:-}" != 1 ]] && ((tasks > ${machines:-1})); then
    refuse "srun starts $tasks tasks on ${machines:-1} machine(s), and each would start a process for every GPU." \
      "Start one task a machine: --ntasks-per-node=1, as scripts/slurm.sbatch does." \
      "If each task is a run of its own, say so with nnodes=1."
  fi
  if [[ -z "${nnodes:-}" && -z "$machines" ]]; then
    [[ -z "${node_rank:-}${master_addr:-}" ]] || refuse "node_rank or master_addr is set, and nnodes is not." \
      "Set nnodes=<number of machines> too, the same on all."
    ((${SLURM_JOB_NUM_NODES:-1} == 1)) || echo "$name: SLURM gave $SLURM_JOB_NUM_NODES machines, this uses one:" \
      "start it with srun (scripts/slurm.sbatch)" >&2
  fi
  nnodes="${nnodes:-${machines:-1}}"
  whole nnodes "$nnodes" 1
  ((nnodes > 1)) && [[ -z "$own_rendezvous" ]] || return 0

  if [[ "$nnodes" == "$machines" ]]; then
    node_rank="${node_rank:-${SLURM_NODEID:-}}"
    master_addr="${master_addr:-$(first_host "${SLURM_STEP_NODELIST:-}")}"
    [[ -n "$master_addr" ]] || refuse "cannot tell the first of SLURM's machines '${SLURM_STEP_NODELIST:-}'." \
      "Set master_addr=<its name or address>, the same on all."
    # of the job's own, so that two jobs that share a machine do not collide
    master_port="${master_port:-$((20000 + ${SLURM_JOB_ID:-0} % 20000))}"
  fi
  [[ -n "${node_rank:-}" && -n "${master_addr:-}" ]] || refuse \
    "nnodes=$nnodes machines find each other with node_rank and master_addr." \
    "Set node_rank=<0 on the first machine, 1 on the next, ...>" \
    "and master_addr=<name or address of the first>, the same on all."
  whole node_rank "$node_rank" 0
  ((node_rank < nnodes)) || refuse "node_rank=$node_rank: with nnodes=$nnodes it goes from 0 to $((nnodes - 1))."
  master_port="${master_port:-29500}" # torch's default
  whole master_port "$master_port" 1
}

# The first machine of a SLURM list, node01 of node[01-03,07] and a of a,b; nothing if it is written otherwise.
first_host() {
  local plain='^([A-Za-z0-9._-]+)(,.*)?$' range='^([A-Za-z0-9._-]+)\[([0-9]+)[-,0-9]*](,.*)?$'
  if [[ "$1" =~ $plain ]]; then printf '%s' "${BASH_REMATCH[1]}"
  elif [[ "$1" =~ $range ]]; then printf '%s' "${BASH_REMATCH[1]}${BASH_REMATCH[2]}"
  fi
}

# Set devices, the processes here and on all machines, and the words for where they are.
count_devices() {
  devices="${devices:-$("$python" -c 'import torch
print(torch.accelerator.device_count() if torch.accelerator.is_available() else 0)')}" || refuse \
    "cannot count the accelerators: '$python' does not run, or has no torch 2.6 or newer (see above)." \
    "Activate the project's environment or set PYTHON=<its python>; devices=<number> skips the count."
  whole devices "$devices" 0
  here=$((devices ? devices : 1)) # the CPU is one process
  processes=$((nnodes * here))
  case "$nnodes,$devices" in
    1,0) where="the CPU" ;;
    1,1) where="1 device" ;;
    1,*) where="$devices devices" ;;
    *,0) where="the CPUs of $nnodes machines" ;;
    *) where="$processes devices of $nnodes machines" ;;
  esac
}

# Share the examples of a step: as many at once as the batch per GPU allows, the rest by accumulation. A line says so.
share_step() {
  local batch accumulation note each
  local -a made=()
  batch="$(last_value --per_device_train_batch_size 8 "${given[@]}")" # 8 is transformers' default
  whole --per_device_train_batch_size "$batch" 1
  accumulation="$(last_value --gradient_accumulation_steps none "${given[@]}")"
  if [[ "$accumulation" != none ]]; then # the user's own: it wins, whatever becomes of the batch
    whole --gradient_accumulation_steps "$accumulation" 1
    note="$processes x $batch x $accumulation = $((processes * batch * accumulation)) examples a step"
    ((accumulation == 1)) || note+=", made up on $where with --gradient_accumulation_steps $accumulation"
  else
    ((num_gpus * batch % processes == 0)) || refuse_devices "$batch"
    each=$((num_gpus * batch / processes)) note="$num_gpus x $batch = $((num_gpus * batch)) examples a step"
    accumulation=$(((each + batch - 1) / batch))
    while ((each % accumulation)); do accumulation=$((accumulation + 1)); done
    if ((each / accumulation != batch)); then
      drop --per_device_train_batch_size || true
      made+=(--per_device_train_batch_size $((each / accumulation)))
    fi
    ((accumulation == 1)) || made+=(--gradient_accumulation_steps "$accumulation")
    if ((${#made[@]})); then flags+=("${made[@]}") note+=", made up on $where with ${made[*]}"; fi
  fi
  echo "$name: $note" >&2
}

# refuse_devices BATCH: a step of num_gpus x BATCH examples is not shared equally; name a number that does it.
refuse_devices() {
  local fit=$devices remedy
  while ((fit && num_gpus * $1 % (nnodes * fit))); do fit=$((fit - 1)); done
  remedy="Use $fit of them$( ((nnodes == 1)) || echo " on each"): devices=$fit, or name $fit in CUDA_VISIBLE_DEVICES."
  if ((fit == 0)); then # so many machines don't, whatever they have
    fit=$nnodes
    while ((num_gpus * $1 % fit)); do fit=$((fit - 1)); done
    remedy="Use $fit of the machines: nnodes=$fit."
  fi
  refuse "$where cannot share the $num_gpus x $1 examples a step of num_gpus=$num_gpus equally." "$remedy" \
    "Or train another recipe, with $processes x $1 examples a step: num_gpus=$processes."
}

# drop FLAG: take it and its value out of what was given; fails if it is not there.
drop() {
  local word found='' skip=''
  local -a kept=()
  for word in ${given[@]+"${given[@]}"}; do
    if is_flag "$1" "$word"; then found=1 skip=1
    elif [[ -z "$skip" || "$word" == --* ]]; then kept+=("$word") skip=''
    fi # else it is the value
  done
  given=(${kept[@]+"${kept[@]}"})
  [[ -n "$found" ]]
}

# Start with plain python where that will do, else with torch.distributed.run.
choose_launcher() {
  local visible="${CUDA_VISIBLE_DEVICES-0}"
  ((devices)) || visible=''
  # a lone process that saw several GPUs would spread over them (DataParallel) and multiply the batch
  ((devices && processes > 1)) || environment+=("CUDA_VISIBLE_DEVICES=${visible%%,*}")
  # DeepSpeed wants a launcher even for one process
  ((processes > 1 || ${#options[@]})) || [[ -n "$(last_value --deepspeed '' ${given[@]+"${given[@]}"})" ]] || return 0

  program+=(-m torch.distributed.run)
  if [[ -n "$own_rendezvous" ]]; then program+=("--nnodes=$nnodes")
  elif ((nnodes == 1)); then program+=(--standalone) # a free port, so that two runs do not collide
  else
    program+=("--nnodes=$nnodes" "--node_rank=$node_rank" "--master_addr=$master_addr" "--master_port=$master_port")
  fi
  program+=("--nproc_per_node=$here" ${options[@]+"${options[@]}"})
  # torchrun would set the same, under a banner
  ((here == 1)) || [[ -n "${OMP_NUM_THREADS:-}" ]] || environment+=(OMP_NUM_THREADS=1)
}

# Print launch's command, one flag a line, quoted and continued so that it can be pasted into a shell.
print_command() {
  local word
  printf '%q ' "${environment[@]}"
  printf '\\\n '
  printf ' %q' "${program[@]}"
  for word in "${flags[@]}"; do
    [[ "$word" != --* ]] || printf ' \\\n '
    printf ' %q' "$word"
  done
  printf '\n'
}
