#!/usr/bin/env bash
# DeBERTa-v2-xxlarge + LoRA on MNLI (392,702 training pairs). Reports accuracy, matched and mismatched.
# The paper's dev figure: accuracy 91.9 (matched and mismatched together; median of 5 seeds, best epoch of each).
# The paper's table, which recipe=paper runs, has r 8, alpha 8, warm-up over 10% of the steps.
#   bash scripts/deberta_v2_xxlarge_mnli.sh   the published recipe, tuned for 8 GPUs
#   bash scripts/deberta_v2_xxlarge_mnli.sh --max_steps 20 --output_dir output/try   a quick try
tuned_for_gpus=${tuned_for_gpus:-8}
source "$(dirname -- "${BASH_SOURCE[0]}")/launch.sh"
args=(
  --model_name_or_path microsoft/deberta-v2-xxlarge --task_name mnli --do_train --do_eval
  --max_seq_length 256                      # tokens; longer pairs are truncated
  --per_device_train_batch_size 8           # x tuned_for_gpus=8: 64 pairs a step
  --num_train_epochs 5 --weight_decay 0
  --learning_rate 1e-4 --warmup_steps 1000  # linear up over these steps, then linear down to 0
  --cls_dropout 0.15                        # before the classifier
  --apply_lora --lora_r 16 --lora_alpha 32  # W + (32 / 16) B A on query and value of each layer
  --eval_strategy steps --eval_steps 500 --save_strategy steps --save_steps 500 # the best step is a checkpoint
  --fp16 --full_determinism                 # mixed precision; on a CPU launch.sh makes it --bf16, or drops it
  --logging_steps 10 --seed 0
)
launch "${args[@]}" "$@"
