"""Answers of a trained adapter to sentences, or pairs of sentences, of your own.

  python -m lora_nlu.predict output/mine sentences.txt                    a sentence a line; prints a table (TSV)
  python -m lora_nlu.predict output/mine reviews.csv --output answers.jsonl
  echo "A man sleeps." | python -m lora_nlu.predict output/mine           standard input; on a terminal, type sentences
  python -m lora_nlu.predict output/seed_0 output/seed_1 reviews.csv      several adapters of one base model

ADAPTER is a folder (of an adapter, or a complete model), a .bin, or the Hub id of a PEFT adapter. FILE is any other
file: .csv, .tsv, .json and .jsonl (or in capitals) have columns, one or two of them with text; every other ending is
lines of text. Of an adapter that was trained on pairs a line has two texts with a tab between them. Without FILE, or
with -, standard input is read as lines. What exists on the disk is never taken for a Hub id. Empty lines are left out.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from lora_nlu.data.tasks import TASKS
from lora_nlu.errors import UsageError, UserError, printable, printable_lines
from lora_nlu.escaping import json_line, tsv_cell
from lora_nlu.files import atomic_write
from lora_nlu.methods.targets import RELATIVE_QUERY
from lora_nlu.training.arguments import parse_names

if TYPE_CHECKING:
    import numpy as np

    from lora_nlu.adapters.loading import Predictor, Source
    from lora_nlu.data.texts import Row, Texts

_WEIGHTS = (".bin", ".pt", ".pth", ".safetensors")
_TEXTS = (".txt", ".csv", ".tsv", ".json", ".jsonl")
_FORMATS = {".tsv": "tsv", ".jsonl": "jsonl", ".json": "jsonl"}
_LONGEST = 512  # tokens of an input, if the run records no length; the model may have fewer positions
_BATCH_TOKENS = {"cpu": 1024, "cuda": 16_384}  # of a batch; on a CPU both 512 and 2048 are slower


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_intermixed_args(argv)
    try:
        adapters, file = split_operands(args.operands)
        _check(args, adapters, file)
        _predict(adapters, file, args)
    except KeyboardInterrupt:
        return 130
    except (UserError, OSError) as e:
        print(f"lora_nlu.predict: error: {printable_lines(e)}", file=sys.stderr)
        return 2 if isinstance(e, UsageError) else 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lora_nlu.predict",
        usage="python -m lora_nlu.predict ADAPTER [ADAPTER ...] [FILE] [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("operands", nargs="+", metavar="ADAPTER, FILE", help="see above")
    add("--output", type=Path, metavar="FILE", help="write the answers there: .tsv or .jsonl")
    add("--format", choices=["tsv", "jsonl"], help="default: by the ending of --output, otherwise tsv")
    add("--text_columns", metavar="A,B", help="columns with the text, one or two; default: those of the training")
    add("--max_seq_length", type=int, metavar="N", help="longer inputs are cut; default: as in the training, or the "
        "model's limit")  # fmt: skip
    add("--base", metavar="MODEL", help="folder or Hub id of the base model; default: the one that the adapter records")
    add("--tokenizer_name", metavar="NAME", help="folder or Hub id of the tokenizer, if it is not the base model's")
    add("--lora_alpha", type=float, metavar="ALPHA", help="of a .bin, which doesn't record it (published RoBERTa: 16)")
    query = "of a DeBERTa .bin: it was trained with LoRA on the relative positions' query too, as in PEFT (both)"
    add("--lora_relative_query", nargs="?", const="both", choices=RELATIVE_QUERY, help=query)
    add("--bf16", action="store_true", help="compute in bf16 (on a CPU: weights held in it; on a GPU: autocast)")
    names = parser.add_mutually_exclusive_group()
    names.add_argument("--labels", metavar="A,B,...", help="names of the classes, class 0 first, if none are recorded")
    names.add_argument("--task_name", choices=[name for name in TASKS if name != "ax"], metavar="TASK",
                       help="GLUE task whose names the classes have, if none are recorded")  # fmt: skip
    return parser


def split_operands(words: Sequence[str]) -> tuple[list[str], Path | None]:
    """The adapters and the file of texts on a command line; None for standard input. Raises UsageError."""
    files = [word for word in words if word == "-" or _is_text_file(Path(word))]
    adapters = [word for word in words if word not in files]
    if len(files) > 1:
        raise UsageError(f"{files[0]} and {files[1]} are both files of text: give one.")
    if not adapters:
        raise UsageError(f"{files[0]} is a file of text: give an adapter before it.")
    if repeated := [word for i, word in enumerate(adapters) if word in adapters[:i]]:
        raise UsageError(f"{repeated[0]} is given twice: give it once.")
    return adapters, Path(files[0]) if files and files[0] != "-" else None


def _is_text_file(path: Path) -> bool:
    ending = path.suffix.lower()
    return not path.is_dir() and ending not in _WEIGHTS and (path.exists() or ending in _TEXTS)


def _check(args: argparse.Namespace, adapters: list[str], file: Path | None) -> None:
    """Check flags and complete them: names become tuples, the format is set. Raises UsageError."""
    args.labels, args.text_columns = parse_names("labels", args.labels), parse_names("text_columns", args.text_columns)
    if args.labels and len(args.labels) < 2:
        raise UsageError(f"--labels {args.labels[0]}: give two names or more; a regression has none.")
    if args.text_columns and len(args.text_columns) > 2:
        raise UsageError(f"--text_columns {','.join(args.text_columns)}: give one column, or two for pairs.")
    if args.max_seq_length is not None and args.max_seq_length < 4:
        raise UsageError(f"--max_seq_length {args.max_seq_length}: must be 4 or more.")
    args.format = args.format or _FORMATS.get(args.output.suffix.lower() if args.output else ".tsv")
    if not args.format:
        raise UsageError(f"--output {args.output}: end it in .tsv or .jsonl, or give --format.")
    if file and args.output and args.output.exists() and file.samefile(args.output):
        raise UsageError(f"--output {args.output}: is the file of the texts. Choose another.")


def _predict(adapters: list[str], file: Path | None, args: argparse.Namespace) -> None:
    """Read, answer and write, window by window. Raises UserError."""
    import torch

    from lora_nlu.adapters.loading import load_sources, read_source
    from lora_nlu.data.texts import Texts
    from lora_nlu.hub import look_for_hub

    _disable_loading_bar()
    _say(*look_for_hub(*adapters))
    given = args.lora_alpha, args.labels, args.task_name, args.lora_relative_query
    sources = [read_source(path, *given) for path in adapters]
    columns = {source.path: _trained_columns(source, args.task_name) for source in sources}
    if not args.text_columns:
        _check_columns(columns)
    trained_on = [names for of_source in columns.values() for names in of_source]
    texts = Texts(file, args.text_columns, trained_on, progress=bool(args.output) or not sys.stdout.isatty())
    _say(*look_for_hub(args.base or sources[0].recorded_base, args.tokenizer_name))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    holds_bf16, autocasts = args.bf16 and device == "cpu", args.bf16 and device == "cuda"
    predictors, notes = load_sources(sources, args.base, args.lora_alpha, args.tokenizer_name, holds_bf16)
    if autocasts:
        notes.append("bf16: products are computed in bf16 on the GPU (torch's autocast).")
    _say(*notes, *(_notes_on_columns(columns, texts) if texts.is_table else ()))
    for predictor in predictors:
        predictor.model.to(device)
    lengths, notes = _max_lengths(predictors, args.max_seq_length)
    _say(*notes)
    with _output(args.output) as sink, torch.autocast(device, torch.bfloat16, enabled=autocasts):
        write_answers(sink, texts, predictors, lengths, args.format)
    if args.output:
        _say(f"Written to {args.output}.")


def _disable_loading_bar() -> None:
    """Turn off transformers' progress bar of weight loading, which is also written to files and pipes."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    others_are_disabled = are_progress_bars_disabled()
    disable_progress_bar()  # turns off the Hub's bars too, which the reading of files uses
    if not others_are_disabled:
        enable_progress_bars()


def _say(*lines: str) -> None:
    for line in lines:
        print(printable_lines(line), file=sys.stderr)


@contextmanager
def _output(path: Path | None) -> Iterator[TextIO]:
    """The file to write to, which appears when it is complete, or standard output until nobody reads it any more."""
    if path is None:
        with open(1, "w", encoding="utf-8", closefd=False) as sink:
            try:
                yield sink
            except BrokenPipeError:  # `head` has enough
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return
    with atomic_write(path) as partial, partial.open("w", encoding="utf-8") as sink:
        yield sink


def _trained_columns(source: "Source", task_name: str | None) -> list[tuple[str, ...]]:
    """The text columns that an adapter or model was trained on; [] if unknown.

    A GLUE task may have two sets of them: the Hub's names and those of the files.
    """
    recorded = source.metadata.get("text_columns")
    if isinstance(recorded, list) and 1 <= len(recorded) <= 2 and all(isinstance(name, str) for name in recorded):
        return [tuple(recorded)]
    if task := TASKS.get(str(task_name or source.metadata.get("task"))):
        return [task.text, *([task.text_columns] if task.text_columns else [])]
    return []


def _check_columns(columns: dict[str, list[tuple[str, ...]]]) -> None:
    """Raise UserError if some adapters were trained on single texts and some on pairs."""
    counts = {path: len(names[0]) for path, names in columns.items() if names}
    if len({*counts.values()}) > 1:
        single, pair = (next(path for path in counts if counts[path] == count) for count in (1, 2))
        raise UserError(
            f"{single} was trained on single texts, {pair} on pairs: predict with each alone, or name the columns that "
            "all read: --text_columns."
        )


def _notes_on_columns(columns: dict[str, list[tuple[str, ...]]], texts: "Texts") -> list[str]:
    """Lines on adapters that were trained on the text of other columns."""
    here = " and ".join(map(repr, texts.columns))
    trained = {path: " and ".join(map(repr, names[0])) for path, names in columns.items() if names}
    others = [path for path in trained if texts.columns not in columns[path]]
    return [f"{path}: was trained on text in {printable(trained[path], 200)}; here it is in {here}." for path in others]


def _max_lengths(predictors: "list[Predictor]", flag: int | None) -> tuple[list[int], list[str]]:
    """The number of tokens at which the inputs of each predictor are cut, and lines to print.

    flag: --max_seq_length; without it the length that the run records, or else the model's limit.
    """
    from lora_nlu.models.loading import longest_input

    limit, notes = longest_input(predictors[0].model.config), []
    if flag and flag > limit:
        notes.append(f"--max_seq_length {flag} is more than the model's {limit} positions; using {limit}.")
    lengths = []
    for predictor in predictors:
        settings = predictor.source.metadata.get("hyperparameters")
        recorded = settings.get("max_seq_length") if isinstance(settings, dict) else None
        longest = recorded if isinstance(recorded, int) and recorded >= 4 else _LONGEST
        lengths.append(int(min(flag or longest, limit)))
    return lengths, notes


def write_answers(
    sink: TextIO, texts: "Texts", predictors: "list[Predictor]", max_lengths: list[int], format: str
) -> None:
    """Write a row for each text, in order, as soon as its window is answered; say which texts were cut."""
    from lora_nlu.data.metrics import answers_of
    from lora_nlu.data.texts import encode

    names = _names([predictor.source.path for predictor in predictors])
    windows = texts.windows()
    if not texts.is_terminal:  # what is wrong with the first texts is said before a header is written
        windows = chain([*islice(windows, 1)], windows)
    if format == "tsv":
        sink.write("\t".join(_header(texts, names, predictors)) + "\n")
    if texts.is_terminal:
        sink.flush()
        _say("Type a text a line; Ctrl-D ends." if len(texts.columns) == 1 else
             f"Type {texts.columns[0]}, a tab, {texts.columns[1]}; Ctrl-D ends.")  # fmt: skip
    cut = _Cut({*max_lengths})
    for window in windows:
        columns = [[*column] for column in zip(*window, strict=True)]
        pairs = columns[1] if len(columns) == 2 else None
        encoded = {n: encode(columns[0], pairs, predictors[0].tokenizer, n) for n in cut.counts}
        answers = [
            answers_of(_logits(predictor, encoded[n][0]), predictor.labels)
            for predictor, n in zip(predictors, max_lengths, strict=True)
        ]
        for row, *of_row in zip(window, *answers, strict=True):
            sink.write((_tsv_line(row, of_row) if format == "tsv" else _json_line(row, names, of_row)) + "\n")
        sink.flush()
        cut.add(encoded[max_lengths[0]][1])
        if texts.is_terminal:
            cut.say()
    cut.say()
    if texts.empty_lines and not texts.is_terminal:
        lines = "1 empty line is" if texts.empty_lines == 1 else f"{texts.empty_lines} empty lines are"
        _say(f"{texts.name}: {lines} left out.")


class _Cut:
    """Counts the texts that are cut: how many are longer than each of the predictors' maximum lengths."""

    def __init__(self, max_lengths: set[int]) -> None:
        self.counts, self.texts, self.longest = dict.fromkeys(max_lengths, 0), 0, 0

    def add(self, lengths: list[int]) -> None:
        """Count texts of so many tokens."""
        self.texts += len(lengths)
        self.longest = max(self.longest, *lengths)
        for n in self.counts:
            self.counts[n] += sum(length > n for length in lengths)

    def say(self) -> None:
        """Print the counts, and start anew."""
        for n, count in self.counts.items():
            if count:
                of = f"{count} of {self.texts} texts are" if self.texts > 1 else "The text is"
                _say(f"{of} cut at {n} tokens (--max_seq_length); the longest has {self.longest}.")
        self.counts, self.texts, self.longest = dict.fromkeys(self.counts, 0), 0, 0


def _logits(predictor: "Predictor", encoded: dict[str, list[list[int]]]) -> "np.ndarray":
    """The logits [N, C] of encoded texts, in their order; computed in batches of about equally many tokens."""
    import torch
    from transformers import DataCollatorWithPadding

    model, device = predictor.model, predictor.model.device
    collate = DataCollatorWithPadding(predictor.tokenizer)
    lengths = [*map(len, encoded["input_ids"])]
    logits = torch.empty(len(lengths), model.config.num_labels)
    for batch in _batches(lengths, _BATCH_TOKENS[device.type]):
        inputs: Any = collate([{name: values[i] for name, values in encoded.items()} for i in batch])
        with torch.no_grad():
            logits[batch] = model(**inputs.to(device)).logits.float().cpu()
    if wrong := int((~logits.isfinite().all(1)).sum()):
        raise UserError(f"{predictor.source.path}: its logits are not finite for {wrong} of {len(lengths)} texts.")
    return logits.numpy()


def _batches(lengths: list[int], most: int) -> Iterator[list[int]]:
    """The indices of texts with these lengths, short texts first, in batches of at most `most` tokens.

    A longer text is a batch of its own.
    """
    batch: list[int] = []
    tokens = 0
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and tokens + lengths[i] > most:
            yield batch
            batch, tokens = [], 0
        batch.append(i)
        tokens += lengths[i]
    yield batch


def _names(paths: list[str]) -> list[str]:
    """Names of adapters for columns: of their folders or files, or their complete paths where two would be equal."""
    names = [Path(path).name or path for path in paths]
    return paths if len({*names}) < len(names) else names


def _header(texts: "Texts", names: list[str], predictors: "list[Predictor]") -> list[str]:
    header = ["text", "text_pair"][: len(texts.columns)]
    for name, predictor in zip(names, predictors, strict=True):
        columns = ["label", *(f"p({label})" for label in predictor.labels)] if predictor.labels else ["score"]
        header += [f"{name}:{column}" for column in columns] if len(names) > 1 else columns
    return [*map(tsv_cell, header)]


def _tsv_line(row: "Row", answers: Sequence[dict[str, Any]]) -> str:
    cells = [*row]
    for answer in answers:
        numbers = answer["probabilities"].values() if "label" in answer else [answer["score"]]
        cells += [*([answer["label"]] if "label" in answer else []), *(f"{x:g}" for x in numbers)]
    return "\t".join(map(tsv_cell, cells))


def _json_line(row: "Row", names: list[str], answers: Sequence[dict[str, Any]]) -> str:
    fields: dict[str, Any] = dict(zip(("text", "text_pair"), row, strict=False))
    return json_line(fields | (answers[0] if len(names) == 1 else {"answers": dict(zip(names, answers, strict=True))}))


if __name__ == "__main__":
    sys.exit(main())
