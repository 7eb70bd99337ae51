#!/usr/bin/env bash
# RoBERTa-base + BitFit (arXiv 2106.10199) on a GLUE task. Starts from the pretrained model, never from an MNLI adapter.
#   bash scripts/baselines/bitfit_roberta_base.sh cola   the recipe, tuned for 1 GPU
#   bash scripts/baselines/bitfit_roberta_base.sh cola --max_steps 20 --output_dir output/try   a quick try
# Settings: the defaults of its authors' program (github.com/benzakenelad/BitFit), but twice its batch of 8. Their
# learning rates, all for BERT, go by task from 1e-4 (MNLI) to 1e-3 (RTE, and the default); picked here: 1e-4.
# A row ends with the training set and the LoRA paper's dev figure, which is from earlier work.
tuned_for_gpus=${tuned_for_gpus:-1}
source "$(dirname -- "${BASH_SOURCE[0]}")/../launch.sh"
task="${1:-}"
case "$task" in
  cola) batch=16 learning_rate=1e-4 epochs=16 ;; #   8,551 sentences: Matthews 62.0
  mnli) batch=16 learning_rate=1e-4 epochs=16 ;; # 392,702 pairs:     accuracy 84.7, matched and mismatched
  mrpc) batch=16 learning_rate=1e-4 epochs=16 ;; #   3,668 pairs:     accuracy 92.7, by the table's caption
  qnli) batch=16 learning_rate=1e-4 epochs=16 ;; # 104,743 pairs:     accuracy 91.8
  qqp)  batch=16 learning_rate=1e-4 epochs=16 ;; # 363,846 pairs:     accuracy 84.0, by the table's caption
  rte)  batch=16 learning_rate=1e-4 epochs=16 ;; #   2,490 pairs:     accuracy 81.5
  sst2) batch=16 learning_rate=1e-4 epochs=16 ;; #  67,349 sentences: accuracy 93.7
  stsb) batch=16 learning_rate=1e-4 epochs=16 ;; #   5,749 pairs:     Pearson 90.8
  *) refuse "needs a task as its first argument, not '$task': cola, mnli, mrpc, qnli, qqp, rte, sst2 or stsb." ;;
esac
name="${name}_$task"
args=(
  --model_name_or_path roberta-base --task_name "$task" --do_train --do_eval
  --max_seq_length 128                         # tokens; longer texts are truncated
  --per_device_train_batch_size "$batch"       # x tuned_for_gpus=1: the examples a step
  --num_train_epochs "$epochs"
  --learning_rate "$learning_rate"
  --lr_scheduler_type constant                 # no warm-up, and no decay
  --weight_decay 0
  --adam_epsilon 1e-6
  --apply_bitfit                               # the encoder's 102,144 biases, and the head
  --eval_strategy epoch --save_strategy epoch  # the best epoch is one of the checkpoints
  --logging_steps 10 --seed 0
)
launch "${args[@]}" "${@:2}"
