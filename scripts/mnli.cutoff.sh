#!/usr/bin/env bash
# DeBERTa-v2-xxlarge + LoRA + cutoff on MNLI (392,702 training pairs). Reports accuracy, matched and mismatched.
# Cutoff (arXiv 2009.13818): each example passes twice, the second time with a tenth of its tokens masked, and the
# two answers must agree.
#   bash scripts/mnli.cutoff.sh   the published recipe, tuned for 8 GPUs
#   bash scripts/mnli.cutoff.sh --max_steps 20 --output_dir output/try   a quick try
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
  --reg_loss_wgt 1.0                        # weight of the distance between the two passes
  --masking_prob 0.1                        # share of the tokens masked in the second pass
  --eval_strategy steps --eval_steps 500 --save_strategy steps --save_steps 500 # the best step is a checkpoint
  --fp16 --full_determinism                 # mixed precision; on a CPU launch.sh makes it --bf16, or drops it
  --logging_steps 10 --seed 42
)
launch "${args[@]}" "$@"
