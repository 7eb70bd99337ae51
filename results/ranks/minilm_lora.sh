#!/usr/bin/env bash
# The demo's encoder, which scripts/demo.sh makes: LoRA, r = 8 on query and value.
# The task comes from the command line; results/README.md has the command for all of them.
#   GLUE_DIR=~/glue bash results/ranks/minilm_lora.sh --task_name cola
tuned_for_gpus=1
source "$(dirname -- "${BASH_SOURCE[0]}")/../../scripts/launch.sh"
args=(
  --model_name_or_path "$root/.demo/encoder" --do_train --do_eval
  --max_seq_length 128 --max_train_samples 10000 # only SST-2 has more
  --per_device_train_batch_size 32 --per_device_eval_batch_size 64
  --num_train_epochs 3 --learning_rate 1e-3 --warmup_ratio 0.06 --weight_decay 0.1
  --apply_lora --lora_r 8 --lora_alpha 16
  --eval_strategy epoch --save_strategy epoch --save_total_limit 1 --logging_steps 25
  --seed 0
)
launch "${args[@]}" "$@"
