# Sourced by every <model>_<task>.sh: where things are and how processes start. Holds no hyperparameter.
#
# A script sets num_gpus, sources this file, fills the array `args` and calls `launch "${args[@]}" "$@"`.
# What a user may set, each as NAME=value before `bash scripts/...`:
#   num_gpus=8        GPUs the hyperparameters are for; with the batch per GPU it fixes the examples a step
#   devices=1         accelerators to use, 0 is the CPU; by default all that are there, up to num_gpus. Fewer accumulate
#                     gradients, so that the examples a step stay the same
#   output_dir=...    results and adapter; by default output/<script's name> in the repository
#   GLUE_DIR=...      the GLUE download; without it the data come from the Hugging Face Hub
#   MNLI_LORA=...     the MNLI adapter that MRPC, RTE and STS-B start from (file or folder), or `none`
#   PYTHON=...        the Python to run
#   DRY_RUN=1         print the command and run nothing
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

# last_value FLAG DEFAULT ARGS...: the value argparse will see, `--flag value` or `--flag=value`, the last one winning.
last_value() {
  local flag="$1" value="$2"
  shift 2
  while (($#)); do
    case "$1" in
      "$flag") value="${2:-}" ;;
      "$flag="*) value="${1#*=}" ;;
    esac
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

# Run run_glue.py with these flags on the accelerators that are there, with the script's number of examples a step.
launch() {
  local whole='^[1-9][0-9]*$' processes batch accumulation note
  [[ "$num_gpus" =~ $whole ]] || refuse "num_gpus='$num_gpus' is not a positive whole number."
  devices="${devices:-$("$python" -c 'import torch
print(torch.accelerator.device_count() if torch.accelerator.is_available() else 0)')}" || refuse \
    "cannot count the accelerators: '$python' does not run, or has no torch 2.6 or newer (see above)." \
    "Activate the project's environment or set PYTHON=<its python>; devices=<number> skips the count."
  [[ "$devices" =~ ^(0|[1-9][0-9]*)$ ]] || refuse "devices='$devices' is not a whole number; 0 means the CPU."

  processes=$((devices > num_gpus ? num_gpus : devices > 0 ? devices : 1))
  batch="$(last_value --per_device_train_batch_size 8 "$@")" # 8 is transformers' default
  if ((num_gpus % processes)); then
    local fit=$processes
    while ((num_gpus % fit)); do fit=$((fit - 1)); done
    refuse "$devices devices cannot share the $num_gpus x $batch examples a step of num_gpus=$num_gpus equally." \
      "Use $fit of them: devices=$fit, or name $fit in CUDA_VISIBLE_DEVICES." \
      "Or train another recipe, with $processes x $batch examples a step: num_gpus=$processes."
  fi

  local -a environment=(PYTHONHASHSEED=0 CUBLAS_WORKSPACE_CONFIG=:16:8 TOKENIZERS_PARALLELISM=false)
  local -a program=("$python") flags=(--output_dir "${output_dir:-$root/output/$name}")
  if ((processes > 1)); then
    program+=(-m torch.distributed.run --standalone "--nproc_per_node=$processes")
  else # a lone process that saw several GPUs would spread over them (DataParallel) and multiply the batch
    export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES-0}"
    CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES%%,*}"
    ((devices)) || CUDA_VISIBLE_DEVICES=
    environment+=("CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES")
  fi
  program+=("$root/examples/text-classification/run_glue.py")
  [[ -z "${GLUE_DIR:-}" ]] || flags+=(--glue_dir "$GLUE_DIR")

  accumulation="$(last_value --gradient_accumulation_steps '' "$@")"
  if [[ -z "$accumulation" ]]; then
    accumulation=$((num_gpus / processes))
    ((accumulation == 1)) || flags+=(--gradient_accumulation_steps "$accumulation")
    note="$num_gpus x $batch = "
  else # the user's own: it wins, whatever becomes of the batch
    note="$processes x $batch x $accumulation = "
  fi
  if [[ "$batch" =~ $whole && "$accumulation" =~ $whole ]]; then # else run_glue.py says what is wrong
    note+="$((processes * batch * accumulation)) examples a step"
    if ((accumulation > 1)); then
      case "$devices" in
        0) note+=", made up on the CPU" ;;
        1) note+=", made up on 1 device" ;;
        *) note+=", made up on $processes device$( ((processes == 1)) || echo s)" ;;
      esac
      note+=" with --gradient_accumulation_steps $accumulation"
    fi
    echo "$name: $note" >&2
  fi

  if ((devices)); then flags+=("$@"); else without_fp16 "$@"; fi
  print_command
  [[ "${DRY_RUN:-0}" != 0 ]] || exec "${program[@]}" "${flags[@]}"
}

# Add flags to launch's but --fp16, which a CPU only emulates, slowly: the run then computes in fp32.
without_fp16() {
  local word dropped='' skip=
  for word in "$@"; do
    if [[ "$word" == --fp16 || "$word" == --fp16=* ]]; then dropped=1 skip=1
    elif [[ -z "$skip" || "$word" == --* ]]; then flags+=("$word") skip=
    fi # else it is the value of --fp16
  done
  [[ -z "$dropped" ]] || echo "$name: no GPU: --fp16 is dropped, computing in fp32" >&2
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
