"""What flags require of each other: errors that name the flag, the reason and the remedy."""

import math
import shutil
from typing import Any

import torch
from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks

from lora_nlu.data.metrics import greater_is_better
from lora_nlu.data.tasks import TASKS
from lora_nlu.errors import UsageError
from lora_nlu.methods.description import check_flags, method_flags
from lora_nlu.training.arguments import parse_names, parse_weights
from lora_nlu.training.processes import say

# What pip calls a library of --report_to, where that is another name
_PACKAGES = {"azure_ml": "azureml-core", "comet_ml": "comet-ml", "flyte": "flytekit"}


def check_arguments(model_args: Any, data_args: Any, args: Any) -> None:
    """Check the three groups of flags of run_glue.py against each other. Raises UsageError."""
    check_flags(model_args)
    if not (args.do_train or args.do_eval or args.do_predict):
        raise UsageError("nothing to do: give --do_train, --do_eval or --do_predict.")
    _check_data(data_args, args)
    _check_examples_of_a_step(args)
    _check_effects(model_args, args)
    _check_libraries(args)
    _check_ranges(model_args, data_args, args)


def _check_data(data_args: Any, args: Any) -> None:
    """A GLUE task or the user's own files, with their columns and labels."""
    task, text_columns, label_column = data_args.task_name, data_args.text_columns, data_args.label_column
    if bool(task) == bool(data_args.train_file or data_args.validation_file or data_args.test_file):
        raise UsageError("give --task_name or files of your own (--train_file, ...), one of the two.")
    for action, flag in (("train", "train_file"), ("eval", "validation_file"), ("predict", "test_file")):
        is_from_train = action == "eval" and data_args.validation_from_train is not None
        if not task and getattr(args, f"do_{action}") and not (getattr(data_args, flag) or is_from_train):
            raise UsageError(f"--do_{action} needs --{flag}.")
    if data_args.validation_from_train is not None:
        if not args.do_eval:
            raise UsageError("--validation_from_train has no effect without --do_eval. Add it.")
        if not (task or data_args.train_file):
            raise UsageError("--validation_from_train keeps rows of --train_file: give that file.")
        if data_args.validation_file:
            raise UsageError("--validation_from_train takes the place of --validation_file: give one of them.")
    names = parse_names("text_columns", text_columns) or ()
    for flag, value in (("text_columns", text_columns), ("label_column", label_column)):
        if value is not None and task:
            raise UsageError(f"--{flag} is only for your own files: the columns of {task} are fixed. Leave it out.")
    if len(names) > 2:
        raise UsageError(f"--text_columns {text_columns}: give one column, or two for pairs.")
    if (label_column or "label") in names:
        raise UsageError(f"--text_columns {text_columns}: {label_column or 'label'} is the column of labels.")
    if data_args.labels is not None and len(parse_names("labels", data_args.labels) or ()) < 2:
        raise UsageError(f"--labels {data_args.labels}: give two names or more; a regression has none.")


def _check_examples_of_a_step(args: Any) -> None:
    """A step's examples must stay the same in any number of processes, and on resuming."""
    if args.auto_find_batch_size:
        raise UsageError(
            "--auto_find_batch_size would change the examples a step has, without a message.\n"
            "Lower --per_device_train_batch_size and raise --gradient_accumulation_steps by the same factor."
        )
    config = args.accelerator_config
    expected = {"split_batches": False, "dispatch_batches": False, "even_batches": True, "use_seedable_sampler": True}
    changed = ", ".join(name for name, value in expected.items() if bool(getattr(config, name)) is not value)
    if args.do_train and changed:
        raise UsageError(f"--accelerator_config: {changed} would change which examples a step has. Leave it out.")
    if "num_steps" in (config.gradient_accumulation_kwargs or {}):
        raise UsageError("--accelerator_config: num_steps is --gradient_accumulation_steps. Give that flag instead.")


def _check_effects(model_args: Any, args: Any) -> None:
    """Flags that have no effect without another, or replace what another does."""
    if model_args.masking_prob and not model_args.reg_loss_wgt:
        raise UsageError("--masking_prob needs --reg_loss_wgt: cutoff compares passes with and without hidden tokens.")
    if model_args.reg_loss_wgt and args.label_smoothing_factor:
        raise UsageError("--label_smoothing_factor replaces the loss that --reg_loss_wgt adds to: give one of them.")
    for name in ("dataloader_persistent_workers", "dataloader_multiprocessing_context"):
        if getattr(args, name) and not args.dataloader_num_workers:
            raise UsageError(f"--{name} has no effect without --dataloader_num_workers of 1 or more. Add it.")
    if args.early_stopping_patience is None and args.early_stopping_threshold:
        raise UsageError("--early_stopping_threshold has no effect without --early_stopping_patience. Add it.")
    if args.early_stopping_patience is not None and args.eval_strategy == "no":
        raise UsageError("--early_stopping_patience counts evaluations: add --eval_strategy epoch or steps.")
    if model_args.class_weights is not None:
        parse_weights(model_args.class_weights)
        if args.label_smoothing_factor:
            raise UsageError("--label_smoothing_factor replaces the loss that --class_weights weighs: give one only.")
    of_training = ((model_args, "class_weights"), (args, "loraplus_lr_ratio"), (args, "head_learning_rate"))
    for group, name in of_training:
        if getattr(group, name) is not None and not args.do_train:
            raise UsageError(f"--{name} has no effect without --do_train. Add --do_train, or remove --{name}.")
    if (ratio := args.loraplus_lr_ratio) is not None and not 0 < ratio < math.inf:
        raise UsageError(f"--loraplus_lr_ratio {ratio}: must be above 0.")
    if args.write_eval_predictions and not args.do_eval:
        raise UsageError("--write_eval_predictions has no effect without --do_eval. Add it.")
    if args.save_on_each_node:
        raise UsageError("--save_on_each_node: the output folder is on a disk that all machines share; one writes.")


def _check_libraries(args: Any) -> None:
    """Flags that need an installed library or compiler."""
    installed = get_available_reporting_integrations()
    for name in (name for name in args.report_to if name not in installed):
        try:
            get_reporting_integration_callbacks([name])
        except ValueError as e:  # the message lists the names that there are
            raise UsageError(f"--report_to {name}: {e} Give one of these, or none.") from e
        raise UsageError(f"--report_to {name}: not installed. Install it: pip install {_PACKAGES.get(name, name)}")
    if args.use_liger_kernel:
        raise UsageError("--use_liger_kernel: Liger has no kernels for these models. Leave it out.")
    backend = args.torch_compile_backend
    if backend and backend not in torch._dynamo.list_backends(exclude_tags=()):
        choices = ", ".join(torch._dynamo.list_backends())
        raise UsageError(f"--torch_compile_backend {backend}: unknown. Choose from: {choices}.")
    if backend == "inductor" and args.use_cpu and not shutil.which("g++"):
        raise UsageError("--torch_compile: needs a C++ compiler on a CPU, and there is no g++. Leave the flag out.")


def _check_ranges(model_args: Any, data_args: Any, args: Any) -> None:
    """Numbers must be at least one value and below another, or above one."""
    counts = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
    of_methods = [f for f in method_flags() if getattr(model_args, f.name) is not None]
    for group, least, below, names in (
        *((model_args, f.at_least, f.below or math.inf, (f.name,)) for f in of_methods if f.at_least is not None),
        (model_args, 0, math.inf, ("reg_loss_wgt",)),
        (model_args, 0, 1, ("cls_dropout", "masking_prob")),
        (args, 0, 1, ("label_smoothing_factor",)),
        (data_args, 1, math.inf, ("max_train_samples", "max_eval_samples", "max_predict_samples")),
        (data_args, 1, math.inf, ("validation_from_train",)),
        (data_args, 4, math.inf, ("max_seq_length",)),
        (data_args, 0, math.inf, ("sample_seed",)),
        (args, 1, math.inf, (*counts, "early_stopping_patience")),
        (args, 0, math.inf, ("early_stopping_threshold",)),
        (args, 0, math.inf, ("head_learning_rate",)),
        (args, 0, math.inf, ("learning_rate", "weight_decay", "max_grad_norm", "num_train_epochs", "warmup_steps")),
        (args, 0, 2**32, ("seed", "data_seed")),  # NumPy's largest
        (args, 0, math.inf, ("dataloader_num_workers", "logging_steps", "eval_steps", "save_steps")),
    ):
        for name in names:
            if (value := getattr(group, name)) is not None and not least <= value < below:
                expected = f"{least} or more" if below == math.inf else f"from {least} to below {below}"
                raise UsageError(f"--{name} {value}: must be {expected}.")
    for f in of_methods:
        if f.above is not None and not f.above < getattr(model_args, f.name) < math.inf:
            raise UsageError(f"--{f.name} {getattr(model_args, f.name)}: must be above {f.above:g}.")


def choose_metrics(args: Any, task: str, is_regression: bool) -> tuple[str, ...]:
    """The names of the task's metrics; the flags about metrics and labels are checked and completed by them."""
    names = TASKS[task].metrics if task in TASKS else ("pearson", "mse") if is_regression else ("accuracy",)
    if args.label_smoothing_factor and is_regression:
        raise UsageError("--label_smoothing_factor is for classes, and these labels are numbers. Leave it out.")
    set_best_metric(args, names)
    return names


def set_best_metric(args: Any, names: tuple[str, ...]) -> None:
    """Set the metric, and its direction, by which the best checkpoint is chosen; by default the task's first."""
    names = () if args.prediction_loss_only else names  # then nothing else is computed
    evaluated = ["loss", *names, *(["combined_score"] if len(names) > 1 and "mse" not in names else [])]
    metric, direction = args.best_metric_flags
    schedule = args.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")
    stops_early = args.early_stopping_patience is not None
    if metric is None and (schedule or stops_early or args.load_best_model_at_end or args.save_strategy == "best"):
        metric = names[0] if names else "loss"
    if metric is None:
        args.metric_for_best_model = args.greater_is_better = None
        return
    if metric.removeprefix("eval_") not in evaluated:
        raise UsageError(f"--metric_for_best_model {metric}: not evaluated. Choose from: {', '.join(evaluated)}.")
    args.metric_for_best_model = metric.removeprefix("eval_")  # one setting under both names
    args.greater_is_better = greater_is_better(metric)
    better, mode = ("greater", "max") if args.greater_is_better else ("smaller", "min")
    if direction not in (None, args.greater_is_better):
        raise UsageError(
            f"--greater_is_better {str(direction).lower()}: {better} is better for --metric_for_best_model {metric}.\n"
            "Leave --greater_is_better out: it follows from the metric."
        )
    if schedule:  # transformers' would take the smaller for the better, whatever the metric
        settings = args.lr_scheduler_kwargs or {}
        if settings.get("mode", mode) != mode:
            raise UsageError(f"--lr_scheduler_kwargs: mode {settings['mode']!r}, but {better} is better for {metric}.")
        args.lr_scheduler_kwargs = settings | {"mode": mode}
    if args.do_train:
        say(args, f"Best checkpoint{' and learning rate' * schedule} by {metric} ({better} is better).")
