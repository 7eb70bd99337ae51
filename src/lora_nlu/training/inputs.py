"""What the flags name: the head that a run starts from or evaluates, and the examples, whose labels must fit it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lora_nlu import labels
from lora_nlu.adapters.adapter import Adapter
from lora_nlu.data.examples import LABEL, Examples, choose_rows, column, describe_examples, split_validation
from lora_nlu.data.glue import load_glue, with_diagnostics
from lora_nlu.data.tasks import TASKS
from lora_nlu.data.tokenization import tokenize
from lora_nlu.data.user_files import load_files
from lora_nlu.errors import UsageError, UserError, printable
from lora_nlu.models.loading import longest_input
from lora_nlu.training.arguments import parse_names, parse_weights
from lora_nlu.training.parsing import Flags
from lora_nlu.training.processes import say


@dataclass(frozen=True)
class Head:
    """The head that a run starts from or evaluates."""

    source: str  # the file, folder or Hub id that it is read from
    labels: tuple[str, ...] | None  # class 0 first; () for a regression, None where the source records none
    count: int  # its number of outputs
    saved_as: str = ""  # the model class in the source's config, where that class has no classification head

    def named(self, names: Sequence[str], names_new_labels: bool) -> "Head":
        """The head with the names of --labels, where its source records none.

        names_new_labels: --labels is for the labels of the user's own training files, which may be other labels than
        the head's; where they are the same, their order must be the head's. Raises UserError if it does not fit.
        """
        if self.labels is None:
            if len(names) == self.count:
                return replace(self, labels=tuple(names))
            if names_new_labels:
                return self
            raise UserError(f"{self.source}: its head has {self.count} classes, but --labels names {len(names)}.")
        if [*map(labels.normalised_label, names)] == [*map(labels.normalised_label, self.labels)]:
            return self
        if names_new_labels and labels.rows_by_label(self.labels, names) is None:
            return self
        if not self.labels:
            raise UserError(f"{self.source}: predicts a number; a regression has no label names. Leave --labels out.")
        raise UserError(
            f"{self.source}: was trained to predict {labels.label_list(self.labels)}, but --labels names "
            f"{labels.label_list(names)}.\nLeave --labels out: the label names are recorded."
        )

    def check_ids(self, example_labels: Sequence[str] | None) -> str:
        """Check that the examples' labels are class ids, because the head's classes have no names; a line that says so.

        example_labels: class 0 first, None where the examples have none. Raises UserError for other labels.
        """
        ids = (tuple(map(str, range(self.count))), labels.placeholder_labels(self.count))
        if example_labels is not None and tuple(example_labels) in ids:
            return (
                f"{self.source}: records no label names; the labels {labels.label_list(example_labels)} are used as "
                "its class ids. If that is wrong, name its classes, class 0 first: --labels."
            )
        orders = [f"{task.name} {','.join(task.labels)}" for task in TASKS.values() if len(task.labels) == self.count]
        glue = f"; GLUE's: {'; '.join(orders)}" if orders else ""
        if self.saved_as:
            raise UserError(
                f"{self.source}: has no trained head, by its config.json (a {printable(self.saved_as)}).\n"
                "Train first (--do_train), or give an adapter of it with --lora_path.\n"
                f"If it has one, name its classes, class 0 first, with --labels{glue}."
            )
        raise UserError(
            f"{self.source}: records no names for the {self.count} classes of its head; a guess could be "
            f"wrong.\nName them, class 0 first, with --labels{glue}.\n"
            "If it has no trained head yet, train first (--do_train)."
        )


def starting_head(flags: Flags, config: Any, adapter: Adapter | None) -> Head:
    """The head of the adapter, or else of the base model, with the names of its classes: recorded, or from --labels."""
    model_args, data_args, args = flags
    if adapter and adapter.label_count:
        head = Head(str(adapter.source), adapter.labels, adapter.label_count)
    else:
        name, model_class = model_args.model_name_or_path, next(iter(config.architectures or ()), "")
        say(args, *labels.check_label_config(name, config))
        saved_as = "" if model_class.endswith("ForSequenceClassification") else model_class
        head = Head(name, labels.recorded_labels(config), config.num_labels, saved_as)
    if head.labels is None and head.count == 1:
        head = replace(head, labels=())  # one output is a regression
    names, task = parse_names("labels", data_args.labels), data_args.task_name
    if names is None:
        return head
    if task and not TASKS[task].labels:
        raise UsageError(f"--labels: {task} is a regression, which has no label names. Remove it.")
    if task and labels.rows_by_label(names, TASKS[task].labels) is None:
        raise UsageError(f"--labels: class 0 first, the labels of {task} are {labels.label_list(TASKS[task].labels)}.")
    return head.named(names, names_new_labels=args.do_train and not task)


def read_examples(flags: Flags, adapter: Adapter | None, head: Head) -> tuple[Examples, Head]:
    """The examples that the flags ask for, and the head with the label names that follow from them."""
    model_args, data_args, args = flags
    task = data_args.task_name
    kept_out = data_args.validation_from_train
    reads = {"train": args.do_train or kept_out, "validation": args.do_eval and not kept_out, "test": args.do_predict}
    splits = [split for split, is_read in reads.items() if is_read]
    flag_labels = parse_names("labels", data_args.labels)
    names = flag_labels if args.do_train else head.labels
    named_by = head.source if flag_labels is None else "--labels"
    if names is None and not task and splits == ["test"]:
        head.check_ids(None)
    glue_source = data_args.glue_dir, model_args.cache_dir, model_args.token, data_args.overwrite_cache
    text_columns = parse_names("text_columns", data_args.text_columns)
    limits = {"train": data_args.max_train_samples, "validation": data_args.max_eval_samples}
    limits["test"] = data_args.max_predict_samples
    with args.main_process_first(desc="loading the examples"):
        if task:
            examples = load_glue(task, splits, *glue_source)
        else:
            files = {split: getattr(data_args, f"{split}_file") for split in splits}
            examples = load_files(
                files, names, text_columns, data_args.label_column or LABEL, named_by,
                limits if data_args.sample_seed is None and not kept_out else None,
                model_args.cache_dir, data_args.overwrite_cache,
            )  # fmt: skip
        reason = ""
        if task == "mnli" and args.do_predict:
            examples, reason = with_diagnostics(examples, *glue_source)
    if names is None and not task and not args.do_train:
        say(args, head.check_ids(examples.labels))
        head = replace(head, labels=examples.labels)
    if not args.do_train:
        labels.check_labels(head.source, head.labels, examples.labels)
    if reason:
        say(args, f"No predictions for the diagnostic set (AX): {reason}")
    if kept_out:
        examples = split_validation(examples, kept_out)
        if not args.do_train:
            del examples.splits["train"]
    examples = choose_rows(examples, limits, data_args.sample_seed)
    say(args, *describe_examples(examples, data_args.sample_seed))
    trained = adapter.metadata.get("text_columns") if adapter and not task else None  # older versions recorded none
    if adapter and isinstance(trained, list) and trained != [*examples.texts]:
        before, now = (" and ".join(repr(str(name)[:40]) for name in names) for names in (trained, examples.texts))
        say(args, f"{adapter.source}: was trained on text in {before}; here it is in {now}.")
    return examples, head


def weights_of_classes(flags: Flags, examples: Examples) -> list[float] | None:
    """The weight of each class in training by --class_weights, with a mean of 1 over the training rows; None without.

    Raises UsageError where they are not one for each class, or can't be scaled.
    """
    text, names = flags.model.class_weights, examples.labels
    if text is None:
        return None
    if examples.is_regression:
        raise UsageError("--class_weights is for classes, and these labels are numbers. Remove it.")
    rows = np.bincount(column(examples.splits["train"], LABEL).to_numpy(), minlength=len(names))
    weights = parse_weights(text)
    if weights is None:
        if absent := [name for name, count in zip(names, rows, strict=True) if not count]:
            raise UsageError(
                f"--class_weights balanced: no training row has the label {labels.label_list(absent)}.\n"
                f"Give a number for each class instead, in this order: {labels.label_list(names)}."
            )
        weights = (1 / rows).tolist()
    if len(weights) != len(names):
        raise UsageError(
            f"--class_weights {text}: has {len(weights)} numbers for {len(names)} classes.\n"
            f"Give one for each, in this order: {labels.label_list(names)}."
        )
    relative = np.array(weights) / max(weights)
    mean = rows @ relative / rows.sum()
    if not mean:
        raise UsageError(f"--class_weights {text}: every training row has a class of weight 0: nothing would train.")
    weights = (relative / mean).tolist()
    texts = [f"{printable(name, 40)} {weight:.4g}" for name, weight in zip(names, weights, strict=True)]
    say(flags.run, f"class weights: {labels.shortened_list(texts)}")
    return weights


def tokenize_examples(flags: Flags, examples: Examples, config: Any, tokenizer: Any) -> tuple[dict[str, Any], int]:
    """The tokenised tables by split, and the number of tokens at which they are truncated."""
    model_args, data_args, args = flags
    max_length, limit = data_args.max_seq_length, longest_input(config)
    if max_length > limit:
        say(args, f"--max_seq_length {max_length} is more than the model's {limit} positions; using {limit}.")
        max_length = int(limit)
    with args.main_process_first(desc="tokenising"):
        tables, notes = tokenize(examples, tokenizer, max_length, model_args.cache_dir, data_args.overwrite_cache)
    say(args, *notes)
    return tables, max_length
