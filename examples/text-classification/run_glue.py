"""Fine-tune, evaluate or predict with LoRA on a GLUE task or on files of your own: flags in, results out.

    python run_glue.py --model_name_or_path roberta-base --task_name mnli --do_eval --output_dir output/eval \
        --apply_lora --lora_r 8 --lora_alpha 16 --lora_path roberta_base_lora_mnli.bin
"""

import os
import sys
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import DataCollatorWithPadding, TrainingArguments, set_seed
from transformers.integrations import deepspeed, is_tensorboard_available

from lora_nlu.adapters.adapter import Adapter
from lora_nlu.adapters.attaching import attach_adapter, check_settings, head_rows, with_labels, with_relative_query
from lora_nlu.adapters.reading import read_adapter
from lora_nlu.data.examples import Examples, choose_rows, describe_examples
from lora_nlu.data.glue import use_cache_if_hub_unreachable
from lora_nlu.data.loading import load_examples, with_diagnostics
from lora_nlu.data.metrics import compute_metrics
from lora_nlu.data.tasks import TASKS
from lora_nlu.data.tokenization import digest, tokenize
from lora_nlu.errors import UsageError, UserError, printable
from lora_nlu.files import ADAPTER_CONFIG
from lora_nlu.labels import check_label_config, check_labels, config_labels, label_list, recorded_labels, rows_by_label
from lora_nlu.methods.description import ADAPTER_TYPES, SETTINGS, set_method
from lora_nlu.methods.lora import LoRALinear
from lora_nlu.models.loading import (
    base_fingerprint,
    check_method,
    load_config,
    load_model,
    longest_input,
    own_adapter,
    set_task,
    set_two_views,
)
from lora_nlu.models.tokenizer import check_tokenizer, load_tokenizer, tokenizer_fingerprint
from lora_nlu.training import processes
from lora_nlu.training.arguments import parse, parse_layers, parse_names, parse_targets
from lora_nlu.training.checks import check_args, check_smoothing, set_best_metric
from lora_nlu.training.preparation import Head
from lora_nlu.training.processes import say
from lora_nlu.training.runs import (
    check_all_alike,
    depends_on_evaluations,
    evaluate,
    predict,
    prepare_output_dir,
    record_evaluation,
    recorded,
    run_metadata,
    train,
)
from lora_nlu.training.summary import closing_table, describe_run
from lora_nlu.training.trainer import AdapterTrainer


def flag(help: str, default: Any = None, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class ModelArguments:
    """The model and what is trained in it."""

    model_name_or_path: str = field(metadata={"help": "Folder or Hub id of a RoBERTa or DeBERTa-V2 checkpoint"})
    config_name: str | None = flag("Folder or Hub id of the configuration, if another")
    tokenizer_name: str | None = flag("Folder or Hub id of the tokenizer, if another")
    cache_dir: str | None = flag("Where downloads and tokenised data are kept")
    use_fast_tokenizer: bool = flag("Ignored: the fast tokenizer is used wherever there is one", True)
    model_revision: str = flag("Branch, tag or commit of the Hub model", "main")
    token: str | None = flag("Access token for private Hub models")
    apply_lora: bool = flag("Train LoRA in the query and value projections, and the head; freeze the rest", False)
    lora_r: int | None = flag("Rank of the update; 0 is plain fine-tuning")
    lora_alpha: float | None = flag("The update is scaled by lora_alpha / lora_r")
    lora_path: str | None = flag("Adapter to start from or evaluate: a published .bin, an adapter or output folder")
    lora_relative_query: bool | None = flag(
        "DeBERTa: LoRA also on the relative positions' query, as in PEFT; an adapter knows", nargs="?", const=True
    )
    lora_target_modules: str | None = flag(
        "Layers with LoRA, of query,key,value,dense (attention) and intermediate,output (feed-forward); "
        "default: query,value"
    )
    lora_layers: str | None = flag("Encoder layers with LoRA, from 0, such as 0-3,11; default: all")
    lora_dropout: float | None = flag("Dropout of what the update reads; the reference has none")
    apply_bitfit: bool = flag("Train the encoder's biases, and the head (BitFit)", False)
    apply_adapter: bool = flag("Train bottleneck adapters, and the head", False)
    adapter_type: str | None = flag("Where adapters go and what they read", choices=[*ADAPTER_TYPES])
    adapter_size: int | None = flag("Width of the adapters' bottleneck")
    adapter_path: str | None = flag("The same as --lora_path for what the other methods trained")
    head_only: bool = flag("Train the head alone, on the frozen encoder", False)
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
    sample_seed: int | None = flag("Seed: --max_train_samples and --max_eval_samples take a random sample")
    train_file: str | None = flag("CSV, TSV or JSON lines with a text column (or two) and 'label'")
    validation_file: str | None = flag("The same, to evaluate on")
    test_file: str | None = flag("The same, to predict; 'label' not needed")
    text_columns: str | None = flag("Columns of your files that hold the text, one or two: --text_columns a,b")
    label_column: str | None = flag("Column of your files that holds the labels; default: label")
    labels: str | None = flag(
        "Class names, class 0 first, such as negative,positive: for a trained head that records none, or for training "
        "on your own files (default: sorted)"
    )


@dataclass
class RunArguments(TrainingArguments):
    """transformers' TrainingArguments, and what it dropped that scripts still say."""

    overwrite_output_dir: bool = flag("Start afresh: remove the output folder's checkpoints and results first", False)
    logging_dir: str | None = flag("Where TensorBoard logs go")
    log_on_each_node: bool = flag("Print losses and scores once a machine, not once", False)
    early_stopping_patience: int | None = flag(
        "Stop training after this many evaluations in a row without an improvement of --metric_for_best_model"
    )
    early_stopping_threshold: float = flag("Smallest change of the metric that counts as an improvement", 0.0)
    logging_nan_inf_filter: bool = flag("Ignored: training stops at a loss that is not finite, and logs it", False)

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
        for name in ("fsdp_config", "deepspeed"):
            given = getattr(self, name)
            if isinstance(given, str) and not given.lstrip().startswith("{") and not Path(given).is_file():
                raise ValueError(f"--{name} {given}: no such file. Those that come with this are in configs/.")
        if self.deepspeed and not find_spec("deepspeed"):
            raise ValueError("--deepspeed: the package is not installed. Install it: pip install deepspeed")
        if self.deepspeed and "RANK" not in os.environ:
            raise ValueError("--deepspeed: a launcher must start its processes, even one: torchrun --nproc_per_node=1.")
        restarts = [os.environ.get(name, "0") for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")]
        if self.overwrite_output_dir and restarts != ["0", "0"]:
            print("run_glue.py: restarted by the launcher: what is there is kept, and gone on from.", flush=True)
            self.overwrite_output_dir = False
        if str(self.fsdp).lower() in ("true", "false"):  # transformers takes the bare flag or its older words
            self.fsdp = True if str(self.fsdp).lower() == "true" else None  # type: ignore[assignment]
        if self.fsdp and os.environ.get("WORLD_SIZE", "1") == "1":  # the same command works on one device
            print("run_glue.py: --fsdp: there is one process, and nothing to share with others.", flush=True)
            self.fsdp = self.fsdp_config = None
        self.best_metric_flags = self.metric_for_best_model, self.greater_is_better  # transformers fills in its own
        super().__post_init__()
        if self.fsdp and self.fsdp_plugin_args["fsdp_version"] != 2:
            raise ValueError("--fsdp_config: version 1 is not supported, and torch drops it. Say version 2.")
        self._n_gpu = min(self.n_gpu, 1)  # a lone process would spread over all GPUs it sees and multiply the batch


def parse_args(argv: list[str]) -> tuple[ModelArguments, DataArguments, RunArguments]:
    """Flags, or one JSON file of them, to the three groups. Raises UsageError."""
    (model_args, data_args, args), notes = parse(argv, (ModelArguments, DataArguments, RunArguments))
    if not model_args.use_fast_tokenizer:
        notes.append("--use_fast_tokenizer false is ignored: the fast tokenizer is used wherever there is one.")
    if args.logging_nan_inf_filter:
        notes.append("--logging_nan_inf_filter: nothing is filtered; training stops at a loss that is not finite.")
        args.logging_nan_inf_filter = False
    if args.batch_eval_metrics:
        notes.append("--batch_eval_metrics is ignored: metrics are always computed over all examples at once.")
        args.batch_eval_metrics = False
    if args.logging_dir and not is_tensorboard_available():
        notes.append(f"--logging_dir {args.logging_dir}: nothing is written there, tensorboard is not installed.")
    say(args, *(f"run_glue.py: {note}" for note in notes))
    check_args(model_args, data_args, args)
    return model_args, data_args, args


def hub_settings(model_args: ModelArguments) -> dict[str, Any]:
    return {"cache_dir": model_args.cache_dir, "token": model_args.token, "revision": model_args.model_revision}


def prepare_model(
    model_args: ModelArguments,
    args: RunArguments,
    config: Any,
    adapter: Adapter | None,
    base_labels: tuple[str, ...] | None,
) -> tuple[Any, Any, str]:
    """The model with its LoRA settings, weights and adapter, its tokenizer and base fingerprint. Raises UserError.

    config says what the model is to tell, base_labels what a head of the base model tells, if known.
    """
    name, hub = model_args.model_name_or_path, hub_settings(model_args)
    method = {setting: getattr(model_args, setting) for setting in SETTINGS}
    method["lora_target_modules"] = parse_targets(model_args.lora_target_modules)
    method["lora_layers"] = parse_layers(model_args.lora_layers, config.num_hidden_layers)
    if adapter:  # it brings its own layers
        method |= {"apply_lora": False, "apply_adapter": False}
    saved = set_method(config, method)
    if model_args.lora_relative_query and config.model_type != "deberta-v2":
        raise UsageError(f"--lora_relative_query: a {config.model_type} model has no relative positions.")
    wanted = config_labels(config)
    replaces_head = adapter and (not args.do_train or head_rows(adapter, wanted) is not None)
    set_seed(args.seed)  # A and the head are drawn while loading
    deepspeed.unset_hf_deepspeed_config()  # ZeRO-3 would read weights in pieces; it cuts a whole model up as well
    needs_head = not args.do_train and adapter is None
    model, notes = load_model(name, config, needs_head, base_labels, not replaces_head, **hub)
    check_method(model, name, saved)
    if needs_head:
        check_is_trained(model_args, args, saved, bool(own_adapter(model)))
    if args.deepspeed:
        deepspeed.set_hf_deepspeed_config(args.hf_deepspeed_config)
    say(args, *notes)
    base = base_fingerprint(model)
    tokenizer, notes = load_tokenizer(model_args.tokenizer_name or name, config, **hub)
    say(args, *notes)
    set_two_views(model, tokenizer, model_args.reg_loss_wgt, model_args.masking_prob)
    if adapter:
        say(args, *attach_adapter(model, adapter, model_args.lora_alpha, args.do_train, wanted))
        guess = ""
        if not adapter.records_relative_query and model.frozen_relative_query is not None:
            way = "without LoRA, the reference's way" if adapter.frozen_relative_query else "with LoRA, PEFT's way"
            guess = f"; the relative query {way}, which the file can't confirm"
        say(args, f"Loaded {adapter.source}: {contents(adapter, model_args)}{guess}.")
        for module in model.modules():
            if isinstance(module, LoRALinear):
                module.lora_dropout = model_args.lora_dropout or 0.0
    return model, tokenizer, base


def check_is_trained(model_args: ModelArguments, args: RunArguments, saved: dict[str, Any], has_own: bool) -> None:
    """Raise UsageError for a method's flag where nothing trains and nothing that it trained is given.

    saved: the method's settings in the base's config; has_own: whether the base holds LoRA or adapters of its own.
    """
    m = model_args
    asked = {"apply_lora": m.apply_lora and m.lora_r, "apply_adapter": m.apply_adapter}
    asked |= {"apply_bitfit": m.apply_bitfit and not saved.get("apply_bitfit")}
    asked |= {"head_only": m.head_only and not saved.get("head_only")}
    flag = next((flag for flag, is_asked in asked.items() if is_asked), None)
    if flag is None or (flag in ("apply_lora", "apply_adapter") and has_own):
        return
    door = "lora_path" if flag == "apply_lora" else "adapter_path"
    folder = args.output_dir if Path(args.output_dir, ADAPTER_CONFIG).is_file() else "FOLDER"
    raise UsageError(
        f"--{flag} says what trains, and nothing trains here (--do_train) or is given that was trained.\n"
        f"Give it: --{door} {folder}. Or leave --{flag} out: {m.model_name_or_path} is evaluated as it is."
    )


def contents(adapter: Adapter, model_args: ModelArguments) -> str:
    """What an adapter is, in a few words."""
    if adapter.method != "lora":
        return adapter.method + (f", size {adapter.adapter_size}" if adapter.adapter_size else "")
    ranks, alpha = sorted(set(adapter.ranks.values())), adapter.lora_alpha
    said = f"{alpha:g}" if alpha is not None else f"{model_args.lora_alpha:g}, which the file can't confirm"
    if adapter.use_rslora or adapter.alpha_pattern:
        scalings = ", ".join(f"{x:g}" for x in adapter.scalings())
        said += f", scaled by {scalings}" + " (rslora)" * adapter.use_rslora
    return f"rank {', '.join(map(str, ranks))}, alpha {said}"


def load_adapter(model_args: ModelArguments, config: Any) -> Adapter | None:
    """The adapter of --lora_path or --adapter_path, if its file holds what the flags say. Raises UserError."""
    path = model_args.lora_path or model_args.adapter_path
    if not path:
        return None
    door = "--lora_path" if model_args.lora_path else "--adapter_path"
    adapter = read_adapter(path, door, cache_dir=model_args.cache_dir, token=model_args.token)
    adapter = with_relative_query(adapter, model_args.lora_relative_query)
    m, has = model_args, adapter.method
    if (has == "lora") != bool(m.lora_path):
        right = "lora_path" if has == "lora" else "adapter_path"
        raise UserError(f"{adapter.source}: holds {has}. Give it as --{right}.")
    wanted = m.adapter_type or has, m.adapter_size or adapter.adapter_size
    if m.head_only or (m.apply_bitfit and not m.apply_adapter and not m.lora_path):
        wanted = "head" if m.head_only else "bitfit", None
    if wanted != (has, adapter.adapter_size) or (m.apply_adapter and not adapter.adapter_size):
        raise UserError(f"{adapter.source}: holds {contents(adapter, m)}, and the flags say otherwise.")
    targets, layers = parse_targets(m.lora_target_modules), parse_layers(m.lora_layers, config.num_hidden_layers)
    check_settings(adapter, m.lora_r, m.lora_alpha, m.lora_relative_query, targets, layers)
    return adapter


def trained_head(
    model_args: ModelArguments, data_args: DataArguments, args: RunArguments, config: Any, adapter: Any
) -> Head:
    """The head that the run starts from or evaluates, with the names of its labels where they are recorded or given.

    Raises UsageError or UserError if --labels fits neither it nor the task.
    """
    if adapter and adapter.label_count:
        head = Head(str(adapter.source), adapter.labels, adapter.label_count)
    else:
        name, made = model_args.model_name_or_path, next(iter(config.architectures or ()), "")
        say(args, *check_label_config(name, config))
        saved_as = "" if made.endswith("ForSequenceClassification") else made
        head = Head(name, recorded_labels(config), config.num_labels, saved_as)
    if head.labels is None and head.count == 1:
        head = replace(head, labels=())  # one output is a number
    names = parse_names("labels", data_args.labels)
    if names is None:
        return head
    if data_args.task_name and not (told := TASKS[data_args.task_name].labels):
        raise UsageError(f"--labels: {data_args.task_name} is a regression, which has no label names. Leave it out.")
    if data_args.task_name and rows_by_label(names, told) is None:
        raise UsageError(f"--labels: {data_args.task_name} has {label_list(told)}; give these, class 0 first.")
    return head.named(names, names_new_labels=args.do_train and not data_args.task_name)


def read_examples(
    model_args: ModelArguments, data_args: DataArguments, args: RunArguments, head: Head
) -> tuple[Examples, Head]:
    """The examples that the flags ask for, and the head with the names of what it is taken to tell.

    Raises UserError for what can't be read, and for examples whose labels a head that isn't trained here doesn't tell.
    """
    splits = {"train": args.do_train, "validation": args.do_eval, "test": args.do_predict}
    wanted, task = [split for split, is_wanted in splits.items() if is_wanted], data_args.task_name
    files = {split: getattr(data_args, f"{split}_file") for split in splits}
    given = parse_names("labels", data_args.labels)
    known = given if args.do_train else head.labels
    named_by = head.source if given is None else "--labels"
    if known is None and not task and wanted == ["test"]:
        head.check_ids(None)
    place, texts = (data_args.glue_dir, model_args.cache_dir, model_args.token), data_args.text_columns
    columns, absent = (parse_names("text_columns", texts), data_args.label_column), ""
    with args.main_process_first(desc="loading the examples"):
        examples = load_examples(task, place[0], files, wanted, known, *place[1:], *columns, named_by)
        if task == "mnli" and args.do_predict:
            examples, absent = with_diagnostics(examples, *place)
    if known is None and not task and not args.do_train:
        say(args, head.check_ids(examples.labels))
        head = replace(head, labels=examples.labels)
    if not args.do_train:
        check_labels(head.source, head.labels, examples.labels)
    say(args, *([f"No predictions for the diagnostic set (AX): {absent}"] if absent else []))
    limits = {"train": data_args.max_train_samples, "validation": data_args.max_eval_samples}
    limits["test"] = data_args.max_predict_samples
    examples = choose_rows(examples, limits, data_args.sample_seed)
    say(args, *describe_examples(examples, data_args.sample_seed))
    return examples, head


def other_columns(adapter: Adapter, examples: Examples) -> list[str]:
    """A line on the text columns of one's own files, if they are not those that the adapter was trained on."""
    trained = adapter.metadata.get("text_columns")
    if not isinstance(trained, list) or trained == [*examples.texts]:  # an older version recorded none
        return []
    one, other = (" and ".join(repr(str(name)[:40]) for name in names) for names in (trained, examples.texts))
    return [f"{adapter.source}: was trained on text in {one}; here it is in {other}."]


def main(argv: list[str]) -> None:
    model_args, data_args, args = parse_args(argv)
    if args.process_index == 0:
        prepare_output_dir(args.output_dir, args.overwrite_output_dir)
    name, task = model_args.model_name_or_path, data_args.task_name or "custom"
    adapter_path = model_args.lora_path or model_args.adapter_path
    on_disk = [name, *([adapter_path] if adapter_path else [])]
    if data_args.task_name and not data_args.glue_dir or not all(Path(path).exists() for path in on_disk):
        use_cache_if_hub_unreachable()

    config = load_config(model_args.config_name or name, **hub_settings(model_args))
    adapter = load_adapter(model_args, config)
    if adapter and (trained_on := adapter.metadata.get("task", task)) != task:
        say(args, f"{adapter.source}: was trained on {printable(trained_on)}; this is {task}.")
    base_labels, head = recorded_labels(config), trained_head(model_args, data_args, args, config, adapter)
    examples, head = read_examples(model_args, data_args, args, head)
    if adapter and not data_args.task_name:
        say(args, *other_columns(adapter, examples))
    if adapter and adapter.label_count:
        adapter = with_labels(adapter, head.labels)
    else:
        base_labels = head.labels
    set_task(config, task, examples.labels, model_args.cls_dropout)

    model, tokenizer, base = prepare_model(model_args, args, config, adapter, base_labels)
    reads, started_from = tokenizer_fingerprint(tokenizer), adapter_path or name
    trained_with = adapter.metadata if adapter else recorded(Path(name))
    check_tokenizer(started_from, trained_with, reads, "Give the one it was trained with as --tokenizer_name.")
    max_length, limit = data_args.max_seq_length, longest_input(config)
    if max_length > limit:
        say(args, f"--max_seq_length {max_length} is more than the model's {limit} positions; using {limit}.")
        max_length = int(limit)
    with args.main_process_first(desc="tokenising"):
        cache = (model_args.cache_dir, data_args.overwrite_cache)
        tables, cut = tokenize(examples, tokenizer, max_length, *cache)
    say(args, *cut)

    names = TASKS[task].metrics if task in TASKS else ("pearson", "mse") if examples.is_regression else ("accuracy",)
    check_smoothing(args, examples.is_regression)
    best = set_best_metric(args, names)
    say(args, *(best if args.do_train else []))
    known = {"base_model": name, "base_fingerprint": base, "started_from": adapter_path}
    known |= {"tokenizer_fingerprint": reads}
    decided = {"max_seq_length": max_length, "train_samples": len(tables.get("train", ()))}
    if "train" in tables:
        decided["train_data"] = digest(tables["train"])
        scored = [table for split, table in tables.items() if split.startswith("validation")]
        if scored and depends_on_evaluations(args):
            decided["eval_data"] = digest(scored[0])  # the set that is evaluated while training
    if data_args.train_file and args.do_train:
        known |= {"train_file": Path(data_args.train_file).name, "text_columns": [*examples.texts]}
    decided |= {key: getattr(model_args, key) for key in ("cls_dropout", "reg_loss_wgt", "masking_prob")}
    if data_args.sample_seed is not None and decided["train_samples"] < examples.rows.get("train", 0):
        decided["sample_seed"] = data_args.sample_seed
    padding = "max_length" if data_args.pad_to_max_length else "longest"
    trainer = AdapterTrainer(
        model=model,
        args=args,
        train_dataset=tables.get("train"),
        eval_dataset=next((table for split, table in tables.items() if split.startswith("validation")), None),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer, padding=padding, max_length=max_length),
        compute_metrics=lambda p: compute_metrics(names, p.predictions, p.label_ids),
        metadata=run_metadata(args, model, task, examples.labels, known, decided),
    )
    check_all_alike(trainer)
    if args.do_train:
        train(trainer, args.overwrite_output_dir)
    else:
        record_evaluation(trainer, adapter_path or name)
    metrics = evaluate(trainer, tables, names[0]) if args.do_eval else {}
    if args.do_train:
        describe_run(trainer, metrics, names[0])
    written = predict(trainer, tables) if args.do_predict else []
    say(args, closing_table(trainer, metrics, names[0], tables), *(f"  predictions: {path}" for path in written))


if __name__ == "__main__":
    processes.run(main, sys.argv, os.environ)
