"""The examples that the flags name: read, their labels compared with the head's, tokenised."""

from dataclasses import replace
from typing import Any

from lora_nlu.adapters.adapter import Adapter
from lora_nlu.data.examples import LABEL, Examples, choose_rows, describe_examples
from lora_nlu.data.glue import load_glue, with_diagnostics
from lora_nlu.data.tokenization import tokenize
from lora_nlu.data.user_files import load_files
from lora_nlu.labels import check_labels
from lora_nlu.models.loading import longest_input
from lora_nlu.training.arguments import DataArguments, ModelArguments, parse_names
from lora_nlu.training.head import Head
from lora_nlu.training.processes import say
from lora_nlu.training.run_arguments import RunArguments


def read_examples(
    model_args: ModelArguments, data_args: DataArguments, args: RunArguments, adapter: Adapter | None, head: Head
) -> tuple[Examples, Head]:
    """The examples that the flags ask for, and the head with the label names that follow from them.

    Raises UserError for what can't be read, and for labels that a head which is not trained here does not predict.
    """
    task = data_args.task_name
    is_read = {"train": args.do_train, "validation": args.do_eval, "test": args.do_predict}
    splits = [split for split in is_read if is_read[split]]
    flag_labels = parse_names("labels", data_args.labels)
    labels = flag_labels if args.do_train else head.labels
    named_by = head.source if flag_labels is None else "--labels"
    if labels is None and not task and splits == ["test"]:
        head.check_ids(None)
    glue_source = data_args.glue_dir, model_args.cache_dir, model_args.token
    text_columns = parse_names("text_columns", data_args.text_columns)
    with args.main_process_first(desc="loading the examples"):
        if task:
            examples = load_glue(task, splits, *glue_source)
        else:
            files = {split: getattr(data_args, f"{split}_file") for split in splits}
            examples = load_files(files, labels, text_columns, data_args.label_column or LABEL, named_by)
        reason = ""
        if task == "mnli" and args.do_predict:
            examples, reason = with_diagnostics(examples, *glue_source)
    if labels is None and not task and not args.do_train:
        say(args, head.check_ids(examples.labels))
        head = replace(head, labels=examples.labels)
    if not args.do_train:
        check_labels(head.source, head.labels, examples.labels)
    say(args, *([f"No predictions for the diagnostic set (AX): {reason}"] if reason else []))
    limits = {"train": data_args.max_train_samples, "validation": data_args.max_eval_samples}
    limits["test"] = data_args.max_predict_samples
    examples = choose_rows(examples, limits, data_args.sample_seed)
    say(args, *describe_examples(examples, data_args.sample_seed))
    if adapter and not task:
        say(args, *_other_columns(adapter, examples))
    return examples, head


def _other_columns(adapter: Adapter, examples: Examples) -> list[str]:
    """A line where the user's text columns have other names than those that the adapter was trained on."""
    trained = adapter.metadata.get("text_columns")
    if not isinstance(trained, list) or trained == [*examples.texts]:  # older versions recorded none
        return []
    before, now = (" and ".join(repr(str(name)[:40]) for name in names) for names in (trained, examples.texts))
    return [f"{adapter.source}: was trained on text in {before}; here it is in {now}."]


def tokenize_examples(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: RunArguments,
    examples: Examples,
    config: Any,
    tokenizer: Any,
) -> tuple[dict[str, Any], int]:
    """The tokenised tables by split, and the number of tokens at which they are truncated."""
    max_length, limit = data_args.max_seq_length, longest_input(config)
    if max_length > limit:
        say(args, f"--max_seq_length {max_length} is more than the model's {limit} positions; using {limit}.")
        max_length = int(limit)
    with args.main_process_first(desc="tokenising"):
        cache = (model_args.cache_dir, data_args.overwrite_cache)
        tables, notes = tokenize(examples, tokenizer, max_length, *cache)
    say(args, *notes)
    return tables, max_length
