#!/usr/bin/env bash
# RoBERTa-base + full fine-tuning on a GLUE task. Starts from the pretrained model, never from an MNLI adapter.
#   bash scripts/baselines/full_roberta_base.sh cola   the recipe, tuned for 1 GPU
#   bash scripts/baselines/full_roberta_base.sh cola --max_steps 20 --output_dir output/try   a quick try
# Settings: what RoBERTa's authors list for each task, with the large model (fairseq, examples/roberta/README.glue.md).
# They chose them in their paper's search (arXiv 1907.11692, table 10) over learning rates 1e-5, 2e-5, 3e-5 and 16 or 32
# examples a step; QQP's warm-up is from the list too (28,318 of 113,272 steps), where the paper has 6%. A row ends with
# the training set and the LoRA paper's dev figure, taken from RoBERTa's authors.
tuned_for_gpus=${tuned_for_gpus:-1}
source "$(dirname -- "${BASH_SOURCE[0]}")/../launch.sh"
task="${1:-}"
case "$task" in
  cola) batch=16 learning_rate=1e-5 warmup_ratio=0.06 ;; #   8,551 sentences: Matthews 63.6
  mnli) batch=32 learning_rate=1e-5 warmup_ratio=0.06 ;; # 392,702 pairs:     accuracy 87.6, matched and mismatched
  mrpc) batch=16 learning_rate=1e-5 warmup_ratio=0.06 ;; #   3,668 pairs:     accuracy 90.2
  qnli) batch=32 learning_rate=1e-5 warmup_ratio=0.06 ;; # 104,743 pairs:     accuracy 92.8
  qqp)  batch=32 learning_rate=1e-5 warmup_ratio=0.25 ;; # 363,846 pairs:     accuracy 91.9
  rte)  batch=16 learning_rate=2e-5 warmup_ratio=0.06 ;; #   2,490 pairs:     accuracy 78.7
  sst2) batch=32 learning_rate=1e-5 warmup_ratio=0.06 ;; #  67,349 sentences: accuracy 94.8
  stsb) batch=16 learning_rate=2e-5 warmup_ratio=0.06 ;; #   5,749 pairs:     Pearson 91.2
  *) refuse "needs a task as its first argument, not '$task': cola, mnli, mrpc, qnli, qqp, rte, sst2 or stsb." ;;
esac
name="${name}_$task"
args=(
  --model_name_or_path roberta-base --task_name "$task" --do_train --do_eval
  --max_seq_length 512                         # tokens; longer texts are truncated
  --per_device_train_batch_size "$batch"       # x tuned_for_gpus=1: the examples a step
  --num_train_epochs 10
  --learning_rate "$learning_rate"
  --warmup_ratio "$warmup_ratio"               # linear up over this share of the steps, then linear down to 0
  --weight_decay 0.1                           # not on biases and LayerNorm
  --adam_beta2 0.98 --adam_epsilon 1e-6
  --max_grad_norm 0                            # gradients are not clipped
  --eval_strategy epoch --save_strategy epoch
  --save_total_limit 1                         # complete models: 0.5 GB each, and 1 GB of optimizer state
  --logging_steps 10 --seed 0
)
launch "${args[@]}" "${@:2}"
