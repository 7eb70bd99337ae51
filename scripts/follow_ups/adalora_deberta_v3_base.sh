#!/usr/bin/env bash
# DeBERTa-v3-base + AdaLoRA (arXiv 2303.10512), LoRA whose ranks are chosen while it trains, on a GLUE task.
#   bash scripts/follow_ups/adalora_deberta_v3_base.sh cola   the recipe, tuned for 1 GPU
#   bash scripts/follow_ups/adalora_deberta_v3_base.sh cola --max_steps 60 --init_warmup 20 --final_warmup 20 \
#     --output_dir output/try   a quick try
# Settings: those of its authors' published scripts. The paper reports the mean over 5 seeds (run_seeds.sh).
# lora_deberta_v3_base.sh is plain LoRA of the same final rank.
# Training must be longer than --init_warmup and --final_warmup together: hence the flags of the try.
tuned_for_gpus=${tuned_for_gpus:-1}
source "$(dirname -- "${BASH_SOURCE[0]}")/../launch.sh"
task="${1:-}"
# r: the rank at the start; at the end a layer has rank 1 on average. orth: reg_orth_coef. first: init_warmup. last:
# final_warmup. every: mask_interval. warm-up: steps of the learning rate's; 0.1 is a share of all steps
case "$task" in
  #               rate epochs tokens r alpha orth first  last every warm-up dropout decay eval
  cola) settings="8e-4   25     64   3  32   0.1   800  3500   10     100    0.1    0     100" ;; #   8,551 sentences
  mnli) settings="5e-4    7    256   3  16   0.1  8000 50000  100    1000    0.15   0    3000" ;; # 392,702 pairs
  mrpc) settings="1e-3   30    320   2  32   0.1   600  1800    1     0.1    0.0    0.01  300" ;; #   3,668 pairs
  qnli) settings="5e-4    5    512   2  32   0.1  2000  8000  100     500    0.1    0.01 1000" ;; # 104,743 pairs
  qqp)  settings="8e-4    5    320   2  16   0.1  8000 25000  100    2000    0.15   0.01 3000" ;; # 363,846 pairs
  rte)  settings="1.2e-3 50    320   2  32   0.3   600  1800    1     200    0.2    0.01  100" ;; #   2,490 pairs
  sst2) settings="8e-4   24    128   2  16   0.1  6000 22000  100    1000    0.0    0.01 3000" ;; #  67,349 sentences
  stsb) settings="2.2e-3 25    128   2  32   0.3   800  2000   10     100    0.2    0.1   100" ;; #   5,749 pairs
  *) refuse "needs a task as its first argument, not '$task': cola, mnli, mrpc, qnli, qqp, rte, sst2 or stsb." ;;
esac
read -r rate epochs tokens r alpha orth first last every warmup dropout decay eval_steps <<<"$settings"
name="${name}_$task"
args=(
  --model_name_or_path microsoft/deberta-v3-base --task_name "$task" --do_train --do_eval
  --max_seq_length "$tokens"                       # longer texts are truncated
  --per_device_train_batch_size 32                 # x tuned_for_gpus=1: the examples a step
  --num_train_epochs "$epochs" --weight_decay "$decay"
  --learning_rate "$rate" --warmup_steps "$warmup" # then linear down to 0
  --cls_dropout "$dropout"                         # before the classifier
  --apply_lora --lora_variant adalora --lora_r "$r" --lora_alpha "$alpha"
  --lora_target_modules query,key,value,dense,intermediate,output
  --lora_relative_query key                        # relative positions: their key has the update, their query not
  --target_rank 1 --reg_orth_coef "$orth" --beta1 0.85 --beta2 0.85
  --init_warmup "$first" --final_warmup "$last" --mask_interval "$every"
  --eval_strategy steps --eval_steps "$eval_steps" --save_strategy steps --save_steps "$eval_steps"
  --logging_steps 10 --seed 6
)
launch "${args[@]}" "${@:2}"
