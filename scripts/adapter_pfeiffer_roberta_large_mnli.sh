#!/usr/bin/env bash
# RoBERTa-large + Pfeiffer adapters (arXiv 2005.00247) on MNLI (392,702 training pairs). Reports accuracy,
# matched and mismatched. Trains the head and the adapters' 811,392 parameters.
# The paper's dev figure: accuracy 90.5 (matched and mismatched together; median of 5 seeds, best epoch of each).
#   bash scripts/adapter_pfeiffer_roberta_large_mnli.sh   the published recipe, tuned for 8 GPUs
#   bash scripts/adapter_pfeiffer_roberta_large_mnli.sh --max_steps 20 --output_dir output/try   a quick try
tuned_for_gpus=${tuned_for_gpus:-8}
source "$(dirname -- "${BASH_SOURCE[0]}")/launch.sh"
args=(
  --model_name_or_path roberta-large --task_name mnli --do_train --do_eval
  --max_seq_length 128                        # tokens; longer pairs are truncated
  --per_device_train_batch_size 32            # x tuned_for_gpus=8: 256 pairs a step
  --per_device_eval_batch_size 32
  --num_train_epochs 5
  --learning_rate 3e-4 --warmup_ratio 0.1     # linear up over 10% of the steps, then linear down to 0
  --apply_adapter --adapter_type pfeiffer     # after the feed-forward of each layer
  --adapter_size 16                           # projects the 1,024 units of a token to 16 and back
  --eval_strategy epoch --save_strategy epoch # the best epoch is one of the checkpoints
  --logging_steps 10 --seed 0
)
launch "${args[@]}" "$@"
