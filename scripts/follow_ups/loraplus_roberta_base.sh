#!/usr/bin/env bash
# RoBERTa-base + LoRA on MNLI or QQP, trained as LoRA+ (arXiv 2402.12354): B learns at 80 times the rate of A.
#   bash scripts/follow_ups/loraplus_roberta_base.sh mnli   the recipe, tuned for 1 GPU
#   bash scripts/follow_ups/loraplus_roberta_base.sh mnli --max_steps 20 --output_dir output/try   a quick try
# Settings: the RoBERTa-base run of its authors' program (github.com/nikhil-ghosh-berkeley/loraplus, commit a38d3e0).
# Length, weight decay and warm-up are not among those settings and stay at run_glue.py's defaults. Picked here: an
# evaluation each epoch, seed 0. For plain LoRA to compare with, add --loraplus_lr_ratio 1 and another --output_dir.
tuned_for_gpus=${tuned_for_gpus:-1}
source "$(dirname -- "${BASH_SOURCE[0]}")/../launch.sh"
task="${1:-}"
case "$task" in
  mnli) ;; # 392,702 pairs
  qqp)  ;; # 363,846 pairs
  *) refuse "needs a task as its first argument, not '$task': mnli or qqp." ;;
esac
name="${name}_$task"
args=(
  --model_name_or_path roberta-base --task_name "$task" --do_train --do_eval
  --per_device_train_batch_size 32            # x tuned_for_gpus=1: the examples a step
  --num_train_epochs 3 --learning_rate 5e-5   # of A and the head
  --loraplus_lr_ratio 80                      # B learns at 4e-3
  --adam_beta2 0.99
  --apply_lora --lora_r 8 --lora_alpha 8      # W + (8 / 8) B A on query and value of each layer
  --fp16                                      # mixed precision; on a CPU launch.sh makes it --bf16, or drops it
  --eval_strategy epoch --save_strategy epoch # the best epoch is one of the checkpoints
  --logging_steps 10 --seed 0
)
launch "${args[@]}" "${@:2}"
