#!/usr/bin/env bash
# RoBERTa-base, all of it fine-tuned, on MRPC (3,668 training pairs). Reports accuracy and F1.
# The paper's dev figure: accuracy 90.2 (taken over from RoBERTa's authors).
# Starts from the plain pretrained model, not from an MNLI adapter.
# Settings that RoBERTa's authors give for this task (fairseq, examples/roberta/README.glue.md, with the large model),
# out of their paper's search (arXiv 1907.11692, table 10): learning rate 1e-5, 2e-5 or 3e-5, 16 or 32 examples a step.
#   bash scripts/full_roberta_base_mrpc.sh                  the published recipe, made for 1 GPU
#   bash scripts/full_roberta_base_mrpc.sh --max_steps 20   a quick try: extra flags override those below
num_gpus=${num_gpus:-1}
source "$(dirname -- "${BASH_SOURCE[0]}")/launch.sh"
args=(
  --model_name_or_path roberta-base --task_name mrpc
  --do_train --do_eval
  --max_seq_length 512                        # tokens; a longer pair is cut
  --per_device_train_batch_size 16            # x num_gpus=1: 16 pairs a step
  --num_train_epochs 10
  --learning_rate 1e-5 --warmup_ratio 0.06    # linear up over 6% of the steps, then linear down to 0
  --weight_decay 0.1                          # of all weights, save biases and LayerNorm
  --adam_beta2 0.98 --adam_epsilon 1e-6
  --max_grad_norm 0                           # gradients are not clipped
  --eval_strategy epoch --save_strategy epoch # the report names the best epoch
  --save_total_limit 1                        # only the last: whole models, 0.5 GB each, and 1 GB of optimizer state
  --logging_steps 10
  --seed 0
)
launch "${args[@]}" "$@"
