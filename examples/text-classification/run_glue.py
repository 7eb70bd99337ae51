"""Fine-tune, evaluate or predict with LoRA on a GLUE task or on files of your own: flags in, results out.

    python run_glue.py --model_name_or_path roberta-base --task_name mnli --do_eval --output_dir output/eval \
        --apply_lora --lora_r 8 --lora_alpha 16 --lora_path roberta_base_lora_mnli.bin
"""

import logging
import math
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import DataCollatorWithPadding, TrainingArguments, set_seed
from transformers.integrations import get_available_reporting_integrations, is_tensorboard_available

from lora_nlu import adapters, data, loading, runs
from lora_nlu.errors import UsageError, UserError
from lora_nlu.flags import check_compiler, parse
from lora_nlu.metrics import compute_metrics
from lora_nlu.runs import say
from lora_nlu.tasks import TASKS
from lora_nlu.trainer import AdapterTrainer


def flag(help: str, default: Any = None, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class ModelArguments:
    """The model and what is trained in it."""

    model_name_or_path: str = field(metadata={"help": "Folder or Hub id of a RoBERTa or DeBERTa-V2 checkpoint"})
    config_name: str | None = flag("Folder or Hub id of the configuration, if another")
    tokenizer_name: str | None = flag("Folder or Hub id of the tokenizer, if another")
    cache_dir: str | None = flag("Where downloads and tokenised data are kept")
    use_fast_tokenizer: bool = flag("Accepted; tokenizers are always fast ones", True)
    model_revision: str = flag("Branch, tag or commit of the Hub model", "main")
    token: str | None = flag("Access token for private Hub models")
    apply_lora: bool = flag("Train LoRA in the query and value projections, and the head; freeze the rest", False)
    lora_r: int | None = flag("Rank of the update; 0 is plain fine-tuning")
    lora_alpha: float | None = flag("The update is scaled by lora_alpha / lora_r")
    lora_path: str | None = flag("Adapter to start from or evaluate: a published .bin, an adapter or output folder")
    lora_relative_query: bool | None = flag(
        "DeBERTa: LoRA also on the relative positions' query, as in PEFT; an adapter knows", nargs="?", const=True
    )
    reg_loss_wgt: float = flag("R-Drop: weight of the distance between two passes with their own dropout", 0.0)
    masking_prob: float = flag("Cutoff: share of tokens hidden from the second of the two passes", 0.0)
    cls_dropout: float | None = flag("Dropout of the classification head; default: the model's hidden_dropout_prob")


@dataclass
class DataArguments:
    """The examples: a GLUE task, from the Hub or --glue_dir, or files of your own."""

    task_name: str | None = flag("GLUE task", choices=[*TASKS])
    glue_dir: str | None = flag("Folder with the standard GLUE download (CoLA/train.tsv, ...) instead of the Hub")
    max_seq_length: int = flag("Longer inputs are truncated to this many tokens", 128)
    overwrite_cache: bool = flag("Tokenise again", False)
    pad_to_max_length: bool = flag("Pad every batch to max_seq_length; results are the same", False)
    max_train_samples: int | None = flag("Train on the first so many examples")
    max_eval_samples: int | None = flag("Evaluate on the first so many examples (of each set)")
    max_predict_samples: int | None = flag("Predict the first so many examples (of each set)")
    train_file: str | None = flag("CSV, TSV or JSON lines with a text column (or two) and 'label'")
    validation_file: str | None = flag("The same, to evaluate on")
    test_file: str | None = flag("The same, to predict; 'label' not needed")


@dataclass
class RunArguments(TrainingArguments):
    """transformers' TrainingArguments, and what it dropped that scripts still say."""

    overwrite_output_dir: bool = flag("Start afresh: remove the output folder's checkpoints and results first", False)
    logging_dir: str | None = flag("Where TensorBoard logs go")

    def __post_init__(self) -> None:
        if not torch.accelerator.is_available():
            # Under a launcher, transformers would otherwise train one separate model in each process.
            self.use_cpu, self.dataloader_pin_memory = True, False
        if self.bf16 and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
            raise ValueError(
                f"--bf16: {torch.cuda.get_device_name()} can't compute in it. Drop the flag, or say --fp16."
            )
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # every trained parameter gets a gradient in every step
        if self.include_num_input_tokens_seen in ("no", False):
            self.include_num_input_tokens_seen = "non_padding"
        if self.logging_dir:
            os.environ["TENSORBOARD_LOGGING_DIR"] = self.logging_dir
            if self.report_to == "none" and is_tensorboard_available():
                self.report_to = "tensorboard"
        super().__post_init__()


def parse_args(argv: list[str]) -> tuple[ModelArguments, DataArguments, RunArguments]:
    """Flags, or one JSON file of them, to the three groups. Raises UsageError."""
    (model_args, data_args, args), notes = parse(argv, (ModelArguments, DataArguments, RunArguments))
    if not model_args.use_fast_tokenizer:
        notes.append("--use_fast_tokenizer false: tokenizers are always fast ones now.")
    if args.logging_dir and not is_tensorboard_available():
        notes.append(f"--logging_dir {args.logging_dir}: nothing is written there, tensorboard is not installed.")
    say(args, *(f"run_glue.py: {note}" for note in notes))
    check_args(model_args, data_args, args)
    return model_args, data_args, args


def check_args(model_args: ModelArguments, data_args: DataArguments, args: RunArguments) -> None:
    """What one flag says about another. Raises UsageError."""
    r, alpha = model_args.lora_r, model_args.lora_alpha
    if model_args.apply_lora and not model_args.lora_path and (r is None or (r and alpha is None)):
        raise UsageError(
            "--apply_lora needs --lora_r and --lora_alpha (the paper's RoBERTa: --lora_r 8 --lora_alpha 16)."
        )
    if not (args.do_train or args.do_eval or args.do_predict):
        raise UsageError("nothing to do: give --do_train, --do_eval or --do_predict.")
    files = data_args.train_file or data_args.validation_file or data_args.test_file
    if bool(data_args.task_name) == bool(files):
        raise UsageError("give --task_name or files of your own (--train_file, ...), one of the two.")
    if not data_args.task_name:
        for wanted, file in (("train", "train_file"), ("eval", "validation_file"), ("predict", "test_file")):
            if getattr(args, f"do_{wanted}") and not getattr(data_args, file):
                raise UsageError(f"--do_{wanted} needs --{file}.")
    if absent := [name for name in args.report_to if name not in (there := get_available_reporting_integrations())]:
        raise UsageError(f"--report_to {absent[0]}: not installed here. Choose from: {', '.join(['none', *there])}.")
    check_compiler(args.torch_compile_backend, args.use_cpu)
    counts = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
    for group, least, below, names in (
        (model_args, 0, math.inf, ("lora_r",)),  # rank 0 is plain fine-tuning
        (model_args, 0, math.inf, ("reg_loss_wgt",)),
        (model_args, 0, 1, ("cls_dropout", "masking_prob")),
        (data_args, 1, math.inf, ("max_train_samples", "max_eval_samples", "max_predict_samples")),
        (data_args, 4, math.inf, ("max_seq_length",)),
        (args, 1, math.inf, counts),
        (args, 0, math.inf, ("learning_rate", "weight_decay", "max_grad_norm", "num_train_epochs", "warmup_steps")),
        (args, 0, math.inf, ("seed", "dataloader_num_workers", "logging_steps", "eval_steps", "save_steps")),
    ):
        for name in names:
            if (value := getattr(group, name)) is not None and not least <= value < below:
                wanted = f"{least} or more" if below == math.inf else f"from {least} to below {below}"
                raise UsageError(f"--{name} {value}: must be {wanted}.")
    if model_args.masking_prob and not model_args.reg_loss_wgt:
        raise UsageError(
            "--masking_prob needs --reg_loss_wgt: cutoff compares the pass with hidden tokens to a whole one."
        )
    if model_args.reg_loss_wgt and args.label_smoothing_factor:
        raise UsageError("--label_smoothing_factor replaces the loss that --reg_loss_wgt adds to: give one of them.")
    if model_args.lora_alpha is not None and not 0 < model_args.lora_alpha < math.inf:
        raise UsageError(f"--lora_alpha {model_args.lora_alpha}: must be above 0.")


def check_best_metric(args: RunArguments, names: tuple[str, ...]) -> None:
    """The best checkpoint must be chosen by a metric that there is. Raises UsageError."""
    known = ["loss", *names, *(["combined_score"] if len(names) > 1 and "mse" not in names else [])]
    wanted = args.metric_for_best_model
    if wanted is not None and wanted.removeprefix("eval_") not in known:
        raise UsageError(f"--metric_for_best_model {wanted}: not evaluated here. Choose from: {', '.join(known)}.")


def hub_settings(model_args: ModelArguments) -> dict[str, Any]:
    return {"cache_dir": model_args.cache_dir, "token": model_args.token, "revision": model_args.model_revision}


def prepare_model(
    model_args: ModelArguments, args: RunArguments, config: Any, adapter: adapters.Adapter | None, task: str
) -> tuple[Any, Any, str]:
    """The model with its LoRA settings, weights and adapter, its tokenizer and base fingerprint. Raises UserError."""
    name, hub = model_args.model_name_or_path, hub_settings(model_args)
    config.apply_lora = model_args.apply_lora and adapter is None  # an adapter brings its own layers
    config.lora_r, config.lora_alpha = model_args.lora_r, model_args.lora_alpha
    config.finetuning_task, config.cls_dropout = task, model_args.cls_dropout
    config.lora_relative_query = bool(model_args.lora_relative_query)
    if model_args.lora_relative_query and config.model_type != "deberta-v2":
        raise UsageError(f"--lora_relative_query: a {config.model_type} model has no relative positions.")
    set_seed(args.seed)  # A and the head are drawn while loading
    model, notes = loading.load_model(name, config, needs_head=not args.do_train and adapter is None, **hub)
    say(args, *notes)
    base = adapters.base_fingerprint(model)
    tokenizer = loading.load_tokenizer(model_args.tokenizer_name or name, config.vocab_size, **hub)
    loading.set_two_views(model, tokenizer, model_args.reg_loss_wgt, model_args.masking_prob)
    if adapter:
        alpha, ranks = adapter.lora_alpha, sorted(set(adapter.ranks.values()))
        say(args, *adapters.attach_adapter(model, adapter, model_args.lora_alpha, allow_new_head=args.do_train))
        said = f"{alpha:g}" if alpha is not None else f"{model_args.lora_alpha:g}, which the file can't confirm"
        say(args, f"Loaded {adapter.source}: rank {', '.join(map(str, ranks))}, alpha {said}.")
    return model, tokenizer, base


def main(argv: list[str]) -> None:
    model_args, data_args, args = parse_args(argv)
    runs.prepare_output_dir(args.output_dir, args.overwrite_output_dir)
    name, task = model_args.model_name_or_path, data_args.task_name or "custom"
    on_disk = [name, *([model_args.lora_path] if model_args.lora_path else [])]
    if data_args.task_name and not data_args.glue_dir or not all(Path(path).exists() for path in on_disk):
        data.use_cache_if_hub_unreachable()

    adapter = None
    if model_args.lora_path:
        hub = {"cache_dir": model_args.cache_dir, "token": model_args.token}
        adapter = adapters.read_adapter(model_args.lora_path, **hub)
        given = (model_args.lora_r, model_args.lora_alpha, model_args.lora_relative_query)
        adapters.check_settings(adapter, *given)
        if (trained_on := adapter.metadata.get("task", task)) != task:
            say(args, f"{adapter.source}: was trained on {trained_on}; this is {task}.")
    config = loading.load_config(model_args.config_name or name, **hub_settings(model_args))
    trained = adapter.labels if adapter else loading.recorded_labels(config)  # what a model not trained here tells
    known = None if args.do_train else trained

    wanted = [s for s, do in (("train", args.do_train), ("validation", args.do_eval), ("test", args.do_predict)) if do]
    files = {s: getattr(data_args, f"{s}_file") for s in ("train", "validation", "test")}
    with args.main_process_first(desc="loading the examples"):
        examples = data.load_examples(
            data_args.task_name, data_args.glue_dir, files, wanted, known, model_args.cache_dir, model_args.token
        )
    limits = {"train": data_args.max_train_samples, "valid": data_args.max_eval_samples}
    limits["test"] = data_args.max_predict_samples
    examples = data.first_rows(examples, {s: limits.get(s[:5], limits.get(s[:4])) for s in examples.splits})
    loading.check_labels(adapter.source if adapter else name, known, examples.labels)
    loading.set_labels(config, examples.labels)

    model, tokenizer, base = prepare_model(model_args, args, config, adapter, task)
    max_length, limit = data_args.max_seq_length, loading.longest_input(config)
    if max_length > limit:
        say(args, f"--max_seq_length {max_length} is more than the model's {limit} positions; using {limit}.")
        max_length = int(limit)
    with args.main_process_first(desc="tokenising"):
        tables = data.tokenize(examples, tokenizer, max_length, model_args.cache_dir, data_args.overwrite_cache)

    names = TASKS[task].metrics if task in TASKS else ("pearson", "mse") if examples.is_regression else ("accuracy",)
    check_best_metric(args, names)
    known_of_base = {"base_model": name, "base_fingerprint": base, "started_from": model_args.lora_path}
    decided = {"max_seq_length": max_length, "train_samples": len(tables.get("train", ()))}
    decided |= {key: getattr(model_args, key) for key in ("cls_dropout", "reg_loss_wgt", "masking_prob")}
    padding = "max_length" if data_args.pad_to_max_length else "longest"
    trainer = AdapterTrainer(
        model=model,
        args=args,
        train_dataset=tables.get("train"),
        eval_dataset=next((table for split, table in tables.items() if split.startswith("validation")), None),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer, padding=padding, max_length=max_length),
        compute_metrics=lambda p: compute_metrics(names, p.predictions, p.label_ids),
        metadata=runs.run_metadata(args, model, task, examples.labels, known_of_base, decided),
    )
    if args.do_train:
        runs.train(trainer, args.overwrite_output_dir)
    else:
        runs.record_if_new(trainer)
    metrics = runs.evaluate(trainer, tables, names[0]) if args.do_eval else {}
    if args.do_train:
        runs.describe(trainer, metrics, names[0])
    written = runs.predict(trainer, tables) if args.do_predict else []
    say(args, runs.closing_table(trainer, metrics, names[0], tables), *(f"  predictions: {path}" for path in written))


def fail(message: object, code: int) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"run_glue.py: error: {message}", file=sys.stderr, flush=True)
    sys.exit(code)


if __name__ == "__main__":
    logging.captureWarnings(True)
    try:
        main(sys.argv[1:])
    except UsageError as e:
        fail(e, 2)
    except UserError as e:
        fail(e, 1)
    except OSError as e:
        fail(f"{e.strerror or e}: {e.filename or 'while writing results'}. What was saved before is untouched.", 1)
    except KeyboardInterrupt:
        fail("interrupted. Checkpoints that were there are whole; the same command takes up from the last.", 1)
