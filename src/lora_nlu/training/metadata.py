"""What a run records of itself: where it starts, and every setting that decides what the trained model is."""

from dataclasses import MISSING, fields
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.trainer_pt_utils import AcceleratorConfig

import lora_nlu
from lora_nlu.data.examples import Examples
from lora_nlu.data.glue import HUB_DATASET
from lora_nlu.data.tokenization import digest
from lora_nlu.methods.description import recorded_relative_query, relative_query
from lora_nlu.methods.lora import lora_layers
from lora_nlu.methods.marking import count_parameters, describe_method
from lora_nlu.training.parsing import Flags

# Settings that do not change the trained model: what a run prints, saves and uploads, where it runs, how it evaluates
# (the number of processes does change the draws of dropout). Every other field of RunArguments counts as one that
# changes it, also one that a newer transformers adds. The batch of a device counts as `examples_a_step`.
WITHOUT_EFFECT = frozenset(
    """
    output_dir overwrite_output_dir logging_dir do_train do_eval do_predict resume_from_checkpoint local_rank
    per_device_train_batch_size gradient_accumulation_steps per_device_eval_batch_size average_tokens_across_devices
    activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs
    cuda_graphs torch_compile torch_compile_backend torch_compile_mode use_cache torch_empty_cache_steps
    full_determinism use_cpu
    logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter log_level
    log_level_replica disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id
    trackio_static_space_id include_num_input_tokens_seen skip_memory_metrics debug
    eval_strategy eval_steps eval_delay eval_on_start prediction_loss_only eval_do_concat_batches
    eval_use_gather_object eval_accumulation_steps include_for_metrics batch_eval_metrics write_eval_predictions
    save_strategy save_steps save_only_model save_on_each_node save_total_limit enable_jit_checkpoint
    push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision
    restore_callback_states_from_checkpoint remove_unused_columns dataloader_num_workers dataloader_pin_memory
    dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout
    fsdp fsdp_config deepspeed
    """.split()
)
# These change it as well if evaluations choose the checkpoint or the learning rate
SCHEDULE = ("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "save_strategy", "save_steps")
# Recorded only where they are set
IF_SET = ("loraplus_lr_ratio", "head_learning_rate", "class_weights")
# Recorded in run.json since its first version, at their defaults or not
_ALWAYS_RECORDED = frozenset(
    """
    seed data_seed learning_rate lr_scheduler_type warmup_steps weight_decay num_train_epochs max_steps optim adam_beta1
    adam_beta2 adam_epsilon max_grad_norm label_smoothing_factor fp16 bf16 train_sampling_strategy
    """.split()
)

# Of the base model's config, where it has them: the same weights train otherwise with other values
_OF_CONFIG = """
    hidden_act hidden_dropout_prob attention_probs_dropout_prob classifier_dropout pooler_dropout pooler_hidden_act
    layer_norm_eps initializer_range num_attention_heads pad_token_id relative_attention max_relative_positions
    position_buckets pos_att_type share_att_key norm_rel_ebd position_biased_input conv_act conv_groups
    """.split()


def run_metadata(
    flags: Flags,
    model: Any,
    examples: Examples,
    tables: dict[str, Any],
    max_length: int,
    fingerprints: dict[str, str | None],
    class_weights: list[float] | None,
) -> dict[str, Any]:
    """What later readers of the adapter, and a later start of the same run, need; fingerprints: `prepare_model`'s."""
    model_args, data_args, args = flags
    layers = lora_layers(model).values()
    settings = deciding_settings(args)
    settings |= {} if class_weights is None else {"class_weights": class_weights}
    file = data_args.train_file or data_args.validation_file or data_args.test_file
    of_files: dict[str, Any] = {}
    if data_args.train_file and args.do_train:
        of_files = {"train_file": Path(data_args.train_file).name, "text_columns": [*examples.texts]}
        of_files |= {"label_column": data_args.label_column} if data_args.label_column else {}
    return {
        "task": data_args.task,
        "dataset": HUB_DATASET if file is None else Path(file).name,
        "labels": list(examples.labels),
        "base_model": model_args.model_name_or_path,
        "started_from": model_args.adapter_source,
        **fingerprints,
        **of_files,
        "base_revision": getattr(model.config, "_commit_hash", None),
        "lora": {
            "ranks": sorted({layer.r for layer in layers}),
            "scalings": sorted({layer.scaling for layer in layers}),
            "lora_relative_query": recorded_relative_query(relative_query(model.config)),
        },
        "method": describe_method(model),
        "model_config": {n: _plain(getattr(model.config, n)) for n in _OF_CONFIG if hasattr(model.config, n)},
        "parameters": count_parameters(model)._asdict(),
        "hyperparameters": settings | _settings_of_data(flags, examples, tables, max_length),
        "left_at_default": left_at_default(args, settings),
        "versions": {module.__name__: module.__version__ for module in (lora_nlu, torch, transformers)},
    }


def _settings_of_data(flags: Flags, examples: Examples, tables: dict[str, Any], max_length: int) -> dict[str, Any]:
    """The deciding settings that are no `RunArguments`: the rows and tokens, and the dropout and loss of the model."""
    settings: dict[str, Any] = {"max_seq_length": max_length, "train_samples": len(tables.get("train", ()))}
    if "train" in tables:
        settings["train_data"] = digest(tables["train"])
        evaluated = [table for split, table in tables.items() if split.startswith("validation")]
        if evaluated and depends_on_evaluations(flags.run):
            settings["eval_data"] = digest(evaluated[0])  # the set that is evaluated while training
    settings |= {name: getattr(flags.model, name) for name in ("cls_dropout", "reg_loss_wgt", "masking_prob")}
    if flags.data.sample_seed is not None and settings["train_samples"] < examples.rows.get("train", 0):
        settings["sample_seed"] = flags.data.sample_seed
    if flags.data.validation_from_train is not None:
        settings["validation_from_train"] = flags.data.validation_from_train
    return settings


def deciding_settings(args: Any) -> dict[str, Any]:
    """The settings that decide what the trained model is, by name, as values of JSON; args: TrainingArguments."""
    names = [field.name for field in fields(args) if field.name not in WITHOUT_EFFECT]
    names = [name for name in names if name not in IF_SET or getattr(args, name) is not None]
    names += SCHEDULE if depends_on_evaluations(args) else ()
    settings = {name: _plain(getattr(args, name)) for name in names}
    batch = args.per_device_train_batch_size
    settings["examples_a_step"] = batch * args.gradient_accumulation_steps * args.world_size
    if args.dataloader_drop_last:
        settings["examples_a_batch"] = batch * args.world_size
    if args.neftune_noise_alpha is not None:  # its noise depends on a batch's longest sequence
        settings["examples_a_device"] = batch
    return settings


def left_at_default(args: Any, settings: dict[str, Any]) -> list[str]:
    """Names of those settings that have their default and that older versions did not record."""
    defaults = {field.name: _plain(field.default) for field in fields(args) if field.default is not MISSING}
    return [n for n, x in settings.items() if n not in _ALWAYS_RECORDED and n in defaults and defaults[n] == x]


def depends_on_evaluations(args: Any) -> bool:
    """Whether evaluations while training choose the checkpoint, the number of steps or the learning rate."""
    stops_early = getattr(args, "early_stopping_patience", None) is not None
    return args.load_best_model_at_end or stops_early or args.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")


def _plain(value: Any) -> Any:
    """A setting as a value of JSON, equal in every run with that setting."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, AcceleratorConfig):  # without those at their default
        defaults = AcceleratorConfig().to_dict()
        return {name: x for name, x in value.to_dict().items() if x != defaults[name]} or None
    if isinstance(value, dict):
        return {str(name): _plain(x) for name, x in sorted(value.items())}
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    return value if isinstance(value, str | int | float | None) else str(value)
