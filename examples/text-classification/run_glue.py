"""Fine-tune, evaluate or predict with LoRA on a GLUE task or on files of your own: flags in, results out.

    python run_glue.py --model_name_or_path roberta-base --task_name mnli --do_eval --output_dir output/eval \
        --apply_lora --lora_r 8 --lora_alpha 16 --lora_path roberta_base_lora_mnli.bin
"""

import difflib
import json
import logging
import os
import resource
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import get_available_reporting_integrations, is_tensorboard_available

import lora_nlu
from lora_nlu import adapters, data
from lora_nlu.errors import UserError
from lora_nlu.legacy_flags import translate
from lora_nlu.lora import count_parameters, lora_rank, mark_only_lora_as_trainable
from lora_nlu.metrics import compute_metrics, predicted
from lora_nlu.modeling_roberta import RobertaForSequenceClassification
from lora_nlu.tasks import TASKS
from lora_nlu.trainer import AdapterTrainer, whole_checkpoints

MODELS = {"roberta": RobertaForSequenceClassification}
RUN = "run.json"  # marks an output folder as a run of ours


def flag(help: str, default: Any = None, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class ModelArguments:
    """The model and what is trained in it."""

    model_name_or_path: str = field(metadata={"help": "Folder or Hub id of a RoBERTa checkpoint"})
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
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # every trained parameter gets a gradient in every step
        if self.include_num_input_tokens_seen in ("no", False):
            self.include_num_input_tokens_seen = "non_padding"
        if self.logging_dir:
            os.environ["TENSORBOARD_LOGGING_DIR"] = self.logging_dir
            if self.report_to == "none" and is_tensorboard_available():
                self.report_to = "tensorboard"
        super().__post_init__()


class UsageError(UserError):
    """The command line itself is wrong; ends with exit code 2."""


class FlagParser(HfArgumentParser):
    def error(self, message: str) -> None:
        raise UsageError(message)


def parse_args(argv: list[str]) -> tuple[ModelArguments, DataArguments, RunArguments]:
    """Flags, or one JSON file of them, to the three groups. Raises UsageError."""
    if len(argv) == 1 and argv[0].endswith(".json"):
        settings, argv = adapters.read_json(Path(argv[0])), []
        for name, value in settings.items():
            values = (
                value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else str(value)]
            )
            argv += [] if value is None else [f"--{name}", *map(str, values)]
    argv, notes = translate(argv)
    parser = FlagParser((ModelArguments, DataArguments, RunArguments), allow_abbrev=False)
    try:
        model_args, data_args, args, rest = parser.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
    except (ValueError, ImportError) as e:
        raise UsageError("\n".join(str(e).strip().splitlines()[:3])) from e
    if rest:
        near = difflib.get_close_matches(rest[0], parser._option_string_actions, n=3)
        raise UsageError(f"unknown flag {rest[0]}." + (f" Did you mean {' or '.join(near)}?" if near else ""))
    if not model_args.use_fast_tokenizer:
        notes.append("--use_fast_tokenizer false: tokenizers are always fast ones now.")
    if args.logging_dir and not is_tensorboard_available():
        notes.append(f"--logging_dir {args.logging_dir}: nothing is written there, tensorboard is not installed.")
    if args.process_index == 0:
        for note in notes:
            print(f"run_glue.py: {note}", flush=True)
    check_args(model_args, data_args, args)
    return model_args, data_args, args


def check_args(model_args: ModelArguments, data_args: DataArguments, args: RunArguments) -> None:
    """What one flag says about another. Raises UsageError."""
    if model_args.lora_r is not None and model_args.lora_r < 0:
        raise UsageError(f"--lora_r {model_args.lora_r}: a rank is 0 (plain fine-tuning) or more.")
    if model_args.apply_lora and (model_args.lora_r is None or (model_args.lora_r and model_args.lora_alpha is None)):
        raise UsageError(
            "--apply_lora needs --lora_r and --lora_alpha (the paper's RoBERTa: --lora_r 8 --lora_alpha 16)."
        )
    if model_args.lora_path and not (model_args.apply_lora and model_args.lora_r):
        raise UsageError("--lora_path needs --apply_lora with the adapter's --lora_r and --lora_alpha.")
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
    for group, least, names in (
        (data_args, 1, ("max_train_samples", "max_eval_samples", "max_predict_samples")),
        (args, 1, ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")),
        (args, 0, ("learning_rate", "weight_decay", "num_train_epochs", "seed")),
    ):
        for name in names:
            if (value := getattr(group, name)) is not None and not value >= least:
                raise UsageError(f"--{name} {value}: must be {least} or more.")
    if model_args.lora_alpha is not None and not 0 < model_args.lora_alpha < float("inf"):
        raise UsageError(f"--lora_alpha {model_args.lora_alpha}: must be above 0.")
    if data_args.max_seq_length < 4:
        raise UsageError(f"--max_seq_length {data_args.max_seq_length}: too short for any text.")
    if model_args.cls_dropout is not None and not 0 <= model_args.cls_dropout < 1:
        raise UsageError(f"--cls_dropout {model_args.cls_dropout}: must be from 0 to below 1.")


def check_best_metric(args: RunArguments, names: tuple[str, ...]) -> None:
    """The best checkpoint must be chosen by a metric that there is. Raises UsageError."""
    known = ["loss", *names, *(["combined_score"] if len(names) > 1 and "mse" not in names else [])]
    wanted = args.metric_for_best_model
    if wanted is not None and wanted.removeprefix("eval_") not in known:
        raise UsageError(f"--metric_for_best_model {wanted}: not evaluated here. Choose from: {', '.join(known)}.")


def prepare_output_dir(args: RunArguments) -> None:
    """Make sure the output folder can be written and is ours (or new). Raises UserError."""
    folder = Path(args.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        content = [path.name for path in folder.iterdir()]
    except OSError as e:
        raise UserError(f"--output_dir {folder}: can't be written ({e.strerror}).") from e
    if content and RUN not in content and not args.overwrite_output_dir:
        raise UserError(
            f"--output_dir {folder} holds {len(content)} entries ({content[0]}, ...) and is no run of ours.\n"
            "Choose another folder, or --overwrite_output_dir to write into it all the same."
        )


def clear_earlier_run(folder: Path) -> None:
    """Remove what an earlier run left, and nothing else."""
    for path in folder.glob("checkpoint-*"):
        shutil.rmtree(path, ignore_errors=True)
    for name in (
        RUN,
        "trainer_state.json",
        "*_results.json",
        "predict_results_*.tsv",
        adapters.WEIGHTS,
        adapters.CONFIG,
    ):
        for path in folder.glob(name):
            path.unlink()


def build_model(
    model_args: ModelArguments, task: str, labels: tuple[str, ...], needs_head: bool, args: RunArguments
) -> Any:
    """The model with its base weights, LoRA and head, and what trains in it marked. Raises UserError."""
    name, where = model_args.model_name_or_path, {"cache_dir": model_args.cache_dir, "token": model_args.token}
    where["revision"] = model_args.model_revision
    try:
        config = AutoConfig.from_pretrained(model_args.config_name or name, **where)
    except (OSError, ValueError) as e:
        raise UserError(
            f"--model_name_or_path {name}: neither a folder with a config.json nor a model the Hub gives.\n"
            f"({str(e).splitlines()[0][:150]})"
        ) from e
    if config.model_type not in MODELS:
        raise UserError(f"--model_name_or_path {name}: a {config.model_type!r} model; supported: {', '.join(MODELS)}.")
    recorded = [label.lower() for _, label in sorted(config.id2label.items())]
    named = not recorded[0].startswith("label_")  # else they are transformers' placeholders
    if needs_head and named and labels and recorded != [label.lower() for label in labels]:
        raise UserError(f"{name} was trained to tell {', '.join(recorded)}; the examples have {', '.join(labels)}.")
    config.num_labels = len(labels) or 1
    if labels:
        config.id2label, config.label2id = dict(enumerate(labels)), {label: i for i, label in enumerate(labels)}
    config.apply_lora, config.lora_r = model_args.apply_lora, model_args.lora_r
    config.lora_alpha, config.cls_dropout = model_args.lora_alpha, model_args.cls_dropout
    config.finetuning_task = task
    set_seed(args.seed)  # A and the head are drawn while loading
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # what is missing is checked and said below
    try:
        model, report = MODELS[config.model_type].from_pretrained(
            name, config=config, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **where
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as e:
        raise UserError(
            f"--model_name_or_path {name}: its weights can't be loaded ({str(e).splitlines()[0][:200]})."
        ) from e
    finally:
        transformers.logging.set_verbosity(verbosity)
    head = set(adapters.head_names(model))
    new = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    if wrong := sorted(new - head):
        raise UserError(
            f"--model_name_or_path {name}: {len(wrong)} weights are missing or not of config.json's shape, "
            f"{', '.join(wrong[:3])} among them."
        )
    if unexpected := sorted(report["unexpected_keys"]):
        if any(".lora_" in key for key in unexpected):
            raise UserError(
                f"--model_name_or_path {name}: holds LoRA matrices ({unexpected[0]}, ...) and they would be left out.\n"
                "Give the plain base model there, and the adapter with --apply_lora --lora_path."
            )
        say(args, f"{name}: {len(unexpected)} weights have no place in the model: {', '.join(unexpected[:3])} ...")
    if new and needs_head:
        raise UserError(
            f"{name} has no trained head for {task}. Train (--do_train), or give an adapter with --lora_path."
        )
    if report["mismatched_keys"]:
        say(args, f"{name}: its head is for other labels and is left behind; the head starts anew.")
    if lora_rank(config):
        mark_only_lora_as_trainable(model)
    return model


def load_tokenizer(model_args: ModelArguments, config: Any) -> Any:
    """The tokenizer of the model, or the one named apart. Raises UserError if it doesn't fit the model."""
    name = model_args.tokenizer_name or model_args.model_name_or_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, cache_dir=model_args.cache_dir, token=model_args.token, revision=model_args.model_revision
        )
    except (OSError, ValueError, ImportError) as e:
        raise UserError(f"No tokenizer in {name} ({str(e).splitlines()[0][:150]}). Give --tokenizer_name.") from e
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # transformers makes one up where the files are missing
        raise UserError(f"No tokenizer in {name} (it has no vocabulary). Give --tokenizer_name.")
    if len(tokenizer) > config.vocab_size:
        raise UserError(f"The tokenizer of {name} has {len(tokenizer)} tokens, the model only {config.vocab_size}.")
    return tokenizer


def load_adapter(model: Any, adapter: adapters.Adapter, labels: tuple[str, ...], args: RunArguments) -> None:
    """Put a saved adapter into the model. Raises UserError if it is another model's or label set's."""
    if not args.do_train and adapter.labels is not None and adapter.labels != labels:
        trained, asked = (", ".join(names) or "a number (regression)" for names in (adapter.labels, labels))
        raise UserError(f"{adapter.source}: was trained to tell {trained}; the examples have {asked}.")
    dropped = adapters.load_adapter(model, adapter, allow_new_head=args.do_train)
    if dropped:
        say(args, f"{adapter.source}: its head is for other labels and is left behind; the head starts anew.")


def run_metadata(
    model_args: ModelArguments, args: RunArguments, task: str, labels: tuple[str, ...], max_length: int
) -> dict[str, Any]:
    """What a later reader of the adapter must know."""
    return {
        "task": task,
        "labels": list(labels),
        "base_model": model_args.model_name_or_path,
        "lora_r": model_args.lora_r if model_args.apply_lora else 0,
        "lora_alpha": model_args.lora_alpha,
        "max_seq_length": max_length,
        "seed": args.seed,
        "versions": {module.__name__: module.__version__ for module in (lora_nlu, torch, transformers)},
    }


def find_checkpoint(args: RunArguments) -> str | None:
    """Where to resume: --resume_from_checkpoint, or the last whole checkpoint of an unfinished run."""
    given = args.resume_from_checkpoint
    checkpoints = [str(path) for path in whole_checkpoints(args.output_dir)]
    if given and str(given).lower() not in ("true", "false"):
        if str(Path(given)) not in map(str, whole_checkpoints(str(Path(given).parent))):
            raise UserError(f"--resume_from_checkpoint {given}: no whole checkpoint.")
        return given
    return checkpoints[-1] if checkpoints and str(given).lower() != "false" else None


def train(trainer: AdapterTrainer, args: RunArguments) -> None:
    """Train, or take up where an interrupted run stopped, or skip what is already done; save what was trained."""
    folder, length = Path(args.output_dir), [args.num_train_epochs, args.max_steps]
    if args.overwrite_output_dir and args.process_index == 0:
        clear_earlier_run(folder)
    trainer.accelerator.wait_for_everyone()
    earlier = adapters.read_json(folder / RUN) if (folder / RUN).is_file() else trainer.metadata
    if any(earlier.get(key) != trainer.metadata[key] for key in ("task", "labels")):
        raise UserError(
            f"--output_dir {folder} holds a run of {earlier.get('task')} with labels {earlier.get('labels')}.\n"
            "Choose another folder, or --overwrite_output_dir to train afresh."
        )
    if earlier.get("trained") == length:
        say(args, f"{folder}: already trained; --overwrite_output_dir trains afresh.")
        trainer._load_from_checkpoint(str(folder))
        return
    checkpoint = find_checkpoint(args)
    if checkpoint:
        say(args, f"Resuming from {checkpoint}.")
    if args.process_index == 0:
        adapters.write_json(folder / RUN, trainer.metadata)
    try:
        result = trainer.train(resume_from_checkpoint=checkpoint)
    except KeyboardInterrupt as e:
        last = whole_checkpoints(args.output_dir)
        kept = f"{last[-1]} is whole: the same command resumes from it" if last else "No checkpoint was due yet"
        raise UserError(f"interrupted at step {trainer.state.global_step}. {kept}.") from e
    trainer.save_model()
    metrics = result.metrics | {"train_samples": len(trainer.train_dataset)}
    trainer.save_metrics("train", metrics)
    trainer.save_state()
    if args.process_index == 0:
        adapters.write_json(folder / RUN, trainer.metadata | {"trained": length})


def evaluate(trainer: AdapterTrainer, tables: dict[str, Any], metric: str) -> dict[str, float]:
    """Score every validation set; MNLI's second one gets the suffix _mm, and both together _overall."""
    sets = [name for name in tables if name.startswith("validation")]
    combined: dict[str, float] = {}
    for name in sets:
        metrics = trainer.evaluate(tables[name]) | {"eval_samples": len(tables[name])}
        if name.endswith("mismatched"):
            metrics = {f"{key}_mm": value for key, value in metrics.items() if key.startswith("eval_")}
            trainer.save_metrics("eval_mm", metrics, combined=False)
        combined |= metrics
    if len(sets) > 1:
        sizes = [len(tables[name]) for name in sets]
        scores = [combined[f"eval_{metric}"], combined[f"eval_{metric}_mm"]]
        combined[f"eval_{metric}_overall"] = sum(s * n for s, n in zip(scores, sizes, strict=True)) / sum(sizes)
    trainer.save_metrics("eval", combined)
    return combined


def predict(trainer: AdapterTrainer, tables: dict[str, Any], task: str, labels: tuple[str, ...]) -> list[Path]:
    """Write predict_results_<task>.tsv (index, label name or number) for every test set."""
    written = []
    for name in (name for name in tables if name.startswith("test")):
        answers = predicted(trainer.predict(tables[name]).predictions)
        path = Path(
            trainer.args.output_dir, f"predict_results_{task}{'-mm' if name.endswith('mismatched') else ''}.tsv"
        )
        if trainer.args.process_index == 0:
            lines = [f"{i}\t{labels[int(a)] if labels else format(a, '.3f')}" for i, a in enumerate(answers)]
            partial = path.with_suffix(".partial")
            partial.write_text("\n".join(["index\tprediction", *lines]) + "\n", encoding="utf-8")
            adapters.publish(partial, path)
        written.append(path)
    return written


def closing_table(
    trainer: AdapterTrainer, metrics: dict, metric: str, tables: dict[str, Any], start_tokens: int
) -> str:
    """What a person wants to know at the end, two columns."""
    counts, args = count_parameters(trainer.model), trainer.args
    rows = [("task", trainer.metadata["task"])]
    rows += [(key.removeprefix("eval_"), f"{metrics[key]:.4f}") for key in metrics if metric in key]
    epochs = [entry for entry in trainer.state.log_history if f"eval_{metric}" in entry]
    if args.do_train and len(epochs) > 1:
        best = max(epochs, key=lambda entry: entry[f"eval_{metric}"] * (-1 if metric == "mse" else 1))
        rows.append(("best while training", f"{best[f'eval_{metric}']:.4f} at epoch {best['epoch']:.2f}"))
    lora = f", {counts.lora:,} of them LoRA" if counts.lora else ""
    rows.append(("trainable parameters", f"{counts.trainable:,} of {counts.total:,}{lora}"))
    runtime = next((e["train_runtime"] for e in reversed(trainer.state.log_history) if "train_runtime" in e), None)
    if runtime:
        tokens = trainer.state.num_input_tokens_seen - start_tokens
        rows.append(("training", f"{runtime:.1f} s, {tokens / runtime:,.0f} real tokens/s"))
    seconds = sum(value for key, value in metrics.items() if key.startswith("eval_runtime"))
    if seconds:
        tokens = sum(data.token_count(table) for name, table in tables.items() if name.startswith("validation"))
        rows.append(("evaluation", f"{seconds:.1f} s, {tokens / seconds:,.0f} real tokens/s"))
    if torch.cuda.is_available():
        rows.append(("peak GPU memory", f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB"))
    unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, KiB elsewhere
    rows.append(("peak memory", f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit:.2f} GiB"))
    rows.append(("files", str(Path(args.output_dir).resolve())))
    width = max(len(name) for name, _ in rows)
    return "\n".join(["", *(f"  {name:<{width}}  {value}" for name, value in rows), ""])


def say(args: RunArguments, line: str) -> None:
    if args.process_index == 0:
        print(line, flush=True)


def main(argv: list[str]) -> None:
    model_args, data_args, args = parse_args(argv)
    prepare_output_dir(args)
    if data_args.task_name and not data_args.glue_dir or not Path(model_args.model_name_or_path).is_dir():
        data.use_cache_if_hub_unreachable()

    adapter = adapters.read_adapter(model_args.lora_path) if model_args.lora_path else None
    task = data_args.task_name or "custom"
    wanted = [s for s, do in (("train", args.do_train), ("validation", args.do_eval), ("test", args.do_predict)) if do]
    files = {s: getattr(data_args, f"{s}_file") for s in ("train", "validation", "test")}
    known = adapter.labels if adapter and not args.do_train else None
    with args.main_process_first(desc="loading the examples"):
        examples = data.load_examples(
            data_args.task_name, data_args.glue_dir, files, wanted, known, model_args.cache_dir, model_args.token
        )
    limits = {"train": data_args.max_train_samples, "valid": data_args.max_eval_samples}
    limits["test"] = data_args.max_predict_samples
    examples = data.first_rows(examples, {s: limits.get(s[:5], limits.get(s[:4])) for s in examples.splits})

    model = build_model(model_args, task, examples.labels, needs_head=not args.do_train and adapter is None, args=args)
    tokenizer = load_tokenizer(model_args, model.config)
    if adapter:
        load_adapter(model, adapter, examples.labels, args)
        say(args, f"Loaded {adapter.source}: rank {model_args.lora_r}, alpha {model_args.lora_alpha:g}.")
    max_length, limit = data_args.max_seq_length, model.config.max_position_embeddings - model.config.pad_token_id - 1
    if max_length > limit:
        say(args, f"--max_seq_length {max_length} is more than the model's {limit} positions; using {limit}.")
        max_length = limit
    with args.main_process_first(desc="tokenising"):
        tables = data.tokenize(examples, tokenizer, max_length, model_args.cache_dir, data_args.overwrite_cache)

    names = TASKS[task].metrics if task in TASKS else ("pearson", "mse") if examples.is_regression else ("accuracy",)
    check_best_metric(args, names)
    padding = "max_length" if data_args.pad_to_max_length else "longest"
    trainer = AdapterTrainer(
        model=model,
        args=args,
        train_dataset=tables.get("train"),
        eval_dataset=next((table for split, table in tables.items() if split.startswith("validation")), None),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer, padding=padding, max_length=max_length),
        compute_metrics=lambda p: compute_metrics(names, p.predictions, p.label_ids),
        metadata=run_metadata(model_args, args, task, examples.labels, max_length),
    )
    if args.do_train:
        train(trainer, args)
    elif args.process_index == 0 and not Path(args.output_dir, RUN).is_file():
        adapters.write_json(Path(args.output_dir, RUN), trainer.metadata)
    metrics = evaluate(trainer, tables, names[0]) if args.do_eval else {}
    written = predict(trainer, tables, task, examples.labels) if args.do_predict else []
    start = getattr(trainer, "_initial_num_input_tokens_seen", 0)
    say(args, closing_table(trainer, metrics, names[0], tables, start))
    for path in written:
        say(args, f"  predictions: {path}")


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
