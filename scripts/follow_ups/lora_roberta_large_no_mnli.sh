#!/usr/bin/env bash
# RoBERTa-large + LoRA on a GLUE task from the pretrained model: MRPC, RTE and STS-B too, without an MNLI adapter.
#   bash scripts/follow_ups/lora_roberta_large_no_mnli.sh cola   the recipe, tuned for 8 GPUs
#   bash scripts/follow_ups/lora_roberta_large_no_mnli.sh cola --max_steps 20 --output_dir output/try   a quick try
# Settings: table 9 of LoRA's paper (arXiv 2106.09685), the rows with a dagger, all with 128 tokens. A row's comment has
# the size of the training set and the paper's dev figure. That table has no weight decay: 0.1 is the other scripts'.
tuned_for_gpus=${tuned_for_gpus:-8}
source "$(dirname -- "${BASH_SOURCE[0]}")/../launch.sh"
task="${1:-}"
case "$task" in
  cola) learning_rate=2e-4 epochs=20 ;; #   8,551 sentences: Matthews 68.2
  mnli) learning_rate=3e-4 epochs=10 ;; # 392,702 pairs:     accuracy 90.6, matched and mismatched
  mrpc) learning_rate=3e-4 epochs=20 ;; #   3,668 pairs:     accuracy 90.2
  qnli) learning_rate=2e-4 epochs=10 ;; # 104,743 pairs:     accuracy 94.8
  qqp)  learning_rate=3e-4 epochs=20 ;; # 363,846 pairs:     accuracy 91.6
  rte)  learning_rate=4e-4 epochs=20 ;; #   2,490 pairs:     accuracy 85.2
  sst2) learning_rate=4e-4 epochs=10 ;; #  67,349 sentences: accuracy 96.2
  stsb) learning_rate=2e-4 epochs=10 ;; #   5,749 pairs:     Pearson 92.3
  *) refuse "needs a task as its first argument, not '$task': cola, mnli, mrpc, qnli, qqp, rte, sst2 or stsb." ;;
esac
name="${name}_$task"
args=(
  --model_name_or_path roberta-large --task_name "$task" --do_train --do_eval
  --max_seq_length 128                        # tokens; longer texts are truncated
  --per_device_train_batch_size 4             # x tuned_for_gpus=8: 32 examples a step
  --num_train_epochs "$epochs" --weight_decay 0.1
  --learning_rate "$learning_rate" --warmup_ratio 0.06 # linear up over 6% of the steps, then linear down to 0
  --apply_lora --lora_r 8 --lora_alpha 16     # W + (16 / 8) B A on query and value of each layer
  --eval_strategy epoch --save_strategy epoch # the best epoch is one of the checkpoints
  --logging_steps 10 --seed 0
)
launch "${args[@]}" "${@:2}"
