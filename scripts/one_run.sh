#!/usr/bin/env bash
# One run with the flags of the command line and no others; compare_methods.sh makes its runs with it.
#   bash scripts/one_run.sh --model_name_or_path roberta-base --task_name cola --do_train --do_eval --apply_bitfit
tuned_for_gpus=1
source "$(dirname -- "${BASH_SOURCE[0]}")/launch.sh"
launch "$@"
