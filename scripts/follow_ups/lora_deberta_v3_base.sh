#!/usr/bin/env bash
# DeBERTa-v3-base + LoRA on a GLUE task, with AdaLoRA's budget: for comparison with adalora_deberta_v3_base.sh.
#   bash scripts/follow_ups/lora_deberta_v3_base.sh cola   the recipe, tuned for 1 GPU
#   bash scripts/follow_ups/lora_deberta_v3_base.sh cola --max_steps 20 --output_dir output/try   a quick try
# Settings: those of AdaLoRA's authors' published scripts (arXiv 2303.10512), tuned for AdaLoRA. Picked here: rank 1,
# which is AdaLoRA's mean rank at the end, on the same six kinds of layers, and an alpha that gives AdaLoRA's alpha / r.
# A comparison at one learning rate says little: run both scripts over several (run_seeds.sh --grid learning_rate).
tuned_for_gpus=${tuned_for_gpus:-1}
source "$(dirname -- "${BASH_SOURCE[0]}")/../launch.sh"
task="${1:-}"
# warm-up: steps of the learning rate's; 0.1 is a share of all steps
case "$task" in
  #               rate epochs tokens alpha  warm-up dropout decay eval
  cola) settings="8e-4   25     64  10.6667   100    0.1    0     100" ;; #   8,551 sentences
  mnli) settings="5e-4    7    256   5.33333 1000    0.15   0    3000" ;; # 392,702 pairs
  mrpc) settings="1e-3   30    320  16        0.1    0.0    0.01  300" ;; #   3,668 pairs
  qnli) settings="5e-4    5    512  16        500    0.1    0.01 1000" ;; # 104,743 pairs
  qqp)  settings="8e-4    5    320   8       2000    0.15   0.01 3000" ;; # 363,846 pairs
  rte)  settings="1.2e-3 50    320  16        200    0.2    0.01  100" ;; #   2,490 pairs
  sst2) settings="8e-4   24    128   8       1000    0.0    0.01 3000" ;; #  67,349 sentences
  stsb) settings="2.2e-3 25    128  16        100    0.2    0.1   100" ;; #   5,749 pairs
  *) refuse "needs a task as its first argument, not '$task': cola, mnli, mrpc, qnli, qqp, rte, sst2 or stsb." ;;
esac
read -r rate epochs tokens alpha warmup dropout decay eval_steps <<<"$settings"
name="${name}_$task"
args=(
  --model_name_or_path microsoft/deberta-v3-base --task_name "$task" --do_train --do_eval
  --max_seq_length "$tokens"                       # longer texts are truncated
  --per_device_train_batch_size 32                 # x tuned_for_gpus=1: the examples a step
  --num_train_epochs "$epochs" --weight_decay "$decay"
  --learning_rate "$rate" --warmup_steps "$warmup" # then linear down to 0
  --cls_dropout "$dropout"                         # before the classifier
  --apply_lora --lora_r 1 --lora_alpha "$alpha"
  --lora_target_modules query,key,value,dense,intermediate,output
  --lora_relative_query key                        # relative positions: their key has the update, their query not
  --eval_strategy steps --eval_steps "$eval_steps" --save_strategy steps --save_steps "$eval_steps"
  --logging_steps 10 --seed 6
)
launch "${args[@]}" "${@:2}"
