#!/usr/bin/env bash
# DeBERTa-v2-xxlarge + LoRA on CoLA (8,551 training sentences). Reports Matthews correlation.
# The paper's dev figure: Matthews 72.4 (median of 5 seeds, best epoch of each).
# The paper's table, which recipe=paper runs, has learning rate 1e-4, r 8, alpha 8, warm-up over 10% of the steps.
#   bash scripts/deberta_v2_xxlarge_cola.sh   the published recipe, tuned for 8 GPUs
#   bash scripts/deberta_v2_xxlarge_cola.sh --max_steps 20 --output_dir output/try   a quick try
tuned_for_gpus=${tuned_for_gpus:-8}
source "$(dirname -- "${BASH_SOURCE[0]}")/launch.sh"
args=(
  --model_name_or_path microsoft/deberta-v2-xxlarge --task_name cola --do_train --do_eval
  --max_seq_length 64                        # tokens; longer sentences are truncated
  --per_device_train_batch_size 4            # x tuned_for_gpus=8: 32 sentences a step
  --num_train_epochs 10 --weight_decay 0
  --learning_rate 1.3e-4 --warmup_steps 100  # linear up over these steps, then linear down to 0
  --cls_dropout 0.1                          # before the classifier
  --apply_lora --lora_r 16 --lora_alpha 32   # W + (32 / 16) B A on query and value of each layer
  --eval_strategy steps --eval_steps 20 --save_strategy steps --save_steps 20 # the best step is a checkpoint
  --fp16 --full_determinism                  # mixed precision; on a CPU launch.sh makes it --bf16, or drops it
  --logging_steps 10 --seed 0
)
launch "${args[@]}" "$@"
