#!/usr/bin/env bash
# RoBERTa-large + VeRA (arXiv 2310.11454) on a GLUE task: LoRA with one frozen pair of random matrices for all layers.
#   bash scripts/follow_ups/vera_roberta_large.sh cola   the recipe, tuned for 1 GPU
#   bash scripts/follow_ups/vera_roberta_large.sh cola --max_steps 20 --output_dir output/try   a quick try
# Settings: the paper's rank, its six tasks, and its layers, query and value. The paper reports the median, over 5 seeds
# (run_seeds.sh), of each one's best epoch. Its learning rates (the head has its own), epochs, batch and length were not
# at hand: give --learning_rate, --head_learning_rate, --num_train_epochs, --per_device_train_batch_size and
# --max_seq_length. Without them run_glue.py's defaults are used, which are not the paper's.
tuned_for_gpus=${tuned_for_gpus:-1}
source "$(dirname -- "${BASH_SOURCE[0]}")/../launch.sh"
task="${1:-}"
case "$task" in
  cola) ;; #   8,551 sentences
  mrpc) ;; #   3,668 pairs
  qnli) ;; # 104,743 pairs
  rte)  ;; #   2,490 pairs
  sst2) ;; #  67,349 sentences
  stsb) ;; #   5,749 pairs
  *) refuse "needs a task as its first argument, not '$task': cola, mrpc, qnli, rte, sst2 or stsb." ;;
esac
name="${name}_$task"
args=(
  --model_name_or_path roberta-large --task_name "$task" --do_train --do_eval
  --apply_lora --lora_variant vera --lora_r 256 # 61,440 parameters, on query and value of each layer
  --eval_strategy epoch --save_strategy epoch   # the best epoch is one of the checkpoints
  --logging_steps 10 --seed 0
)
launch "${args[@]}" "${@:2}"
