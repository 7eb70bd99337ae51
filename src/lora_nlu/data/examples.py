"""Examples of every source as one kind of table, the choice of some of their rows, and a description for people."""

import random
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
from datasets import Dataset

from lora_nlu.errors import UserError, printable
from lora_nlu.labels import label_list, shortened_list

LABEL = "label"


@dataclass(frozen=True)
class Examples:
    """Tables by split name, with columns `text`, `text_pair` for pairs, and `label`: a class id or a float.

    labels:  class names in id order; () for a regression.
    columns: of each split, its file's names of the columns: the text, or a pair, then the label if it is read.
    rows:    of each split, the number of rows before some were chosen (`choose_rows`); None if the rest was not read.
    unread:  of a test split whose file has a column of labels, the name of that column.
    notes:   lines on what was read, for the user.
    """

    splits: dict[str, Dataset]
    labels: tuple[str, ...]
    columns: dict[str, tuple[str, ...]] = field(default_factory=dict)
    rows: dict[str, int | None] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def is_regression(self) -> bool:
        return not self.labels

    @property
    def texts(self) -> tuple[str, ...]:
        """The column of the text, or the two of a pair, by the names that the first split's file gives them."""
        split, table = next(iter(self.splits.items()))
        return self.columns[split][: 1 + ("text_pair" in table.column_names)]


def column(table: Dataset, name: str) -> pa.ChunkedArray:
    """A column of a table's rows; mapped, not copied, where these are all of a file."""
    return table.select_columns(name).with_format("arrow")[:][name]


def choose_rows(examples: Examples, limits: dict[str, int | None], seed: int | None = None) -> Examples:
    """The first examples of each split, at most as many as `limits` gives its kind; None or no entry keeps all.

    limits: by kind of split, which is the first word of its name: train, validation, test ("validation_matched").
    With a seed, the rows of all but the test splits are drawn at random instead; their order stays.
    Raises UserError if the chosen rows all have one label and the split has several.
    """
    tables = {}
    for split, table in examples.splits.items():
        kind, tables[split] = split.partition("_")[0], table
        limit = limits.get(kind)
        if limit is not None and limit < len(table):
            is_drawn = seed is not None and kind != "test"
            numbers = sorted(random.Random(seed).sample(range(len(table)), limit)) if is_drawn else range(limit)
            tables[split] = table.select(numbers)
            if LABEL in table.column_names:
                _check_labels_vary(examples, split, tables[split], is_drawn)
    rows: dict[str, int | None] = {split: len(table) for split, table in examples.splits.items()}
    return replace(examples, splits=tables, rows=rows | examples.rows)


def split_validation(examples: Examples, count: int) -> Examples:
    """The examples with a validation set of `count` training rows, the same in every run, which no longer train.

    Raises UserError if none would be left to train on, or the drawn rows all have one label and the set has several.
    """
    table = examples.splits["train"]
    if count >= len(table):
        text = f"--validation_from_train {count}: leaves none of the {len(table)} training rows to train on."
        raise UserError(f"{text} Give a smaller number.")
    drawn = {*random.Random(0).sample(range(len(table)), count)}
    kept_out, others = table.select(sorted(drawn)), table.select([i for i in range(len(table)) if i not in drawn])
    _check_labels_vary(examples, "train", kept_out, True, "--validation_from_train")
    note = f"--validation_from_train: {count} of the {len(table)} training rows, drawn at random, do not train."
    return replace(
        examples,
        splits={"train": others, "validation": kept_out, **{k: t for k, t in examples.splits.items() if k != "train"}},
        columns=examples.columns | {"validation": examples.columns["train"]},
        rows=examples.rows | {"train": len(others), "validation": count},
        notes=(*examples.notes, note),
    )


def _check_labels_vary(examples: Examples, split: str, chosen: Dataset, is_drawn: bool, flag: str = "") -> None:
    """Rows that all have one label teach and measure nothing, if the split has more. Raises UserError.

    flag: that chose them; by default --max_train_samples or --max_eval_samples.
    """
    chosen_counts, counts = (_label_counts(table, examples) for table in (chosen, examples.splits[split]))
    if len(chosen) > 1 and len(chosen_counts) < 2 <= len(counts):
        remedy = f"Give a larger {flag}."  # its draw is the same in every run
        if not flag:
            flag = f"--max_{'train' if split == 'train' else 'eval'}_samples"
            remedy = f"Draw them with {'another' if is_drawn else 'a'} --sample_seed N, or give a larger {flag}."
        raise UserError(
            f"{split}: the {'drawn' if is_drawn else 'first'} {len(chosen)} of {len(examples.splits[split])} rows all "
            f"have the label {next(iter(chosen_counts), '')[:80]!r}; the set has {_counts_text(counts)}.\n"
            f"{remedy}"
        )


def _label_counts(table: Dataset, examples: Examples) -> dict[str, int]:
    """The number of rows with each label that occurs in a table: classes by name in id order, or numbers."""
    values, counts = np.unique(column(table, LABEL).to_numpy(), return_counts=True)
    names = map("{:g}".format, values) if examples.is_regression else (examples.labels[i] for i in values)
    return dict(zip(names, counts.tolist(), strict=True))


def _counts_text(counts: dict[str, int]) -> str:
    return shortened_list([f"{printable(name, 40)} {count}" for name, count in counts.items()])


def describe_examples(examples: Examples, seed: int | None = None) -> list[str]:
    """The notes, then a line on each split: its rows, the columns they were read from, and the count of each label."""
    lines = list(examples.notes)
    drawn = {split: table for split, table in examples.splits.items() if not split.startswith("test")}
    if seed is not None and all(len(table) == examples.rows.get(split, len(table)) for split, table in drawn.items()):
        lines.append("--sample_seed has no effect here: every row is read.")
    for split, table in examples.splits.items():
        rows, columns = examples.rows.get(split, len(table)), examples.columns.get(split, ())
        choice = f"drawn of {rows}" if seed is not None and split in drawn else f"the first of {rows}"
        if rows is None:
            choice = "the first, no more of the file is read"
        texts = " and ".join(map(repr, columns[: len(table.column_names) - (LABEL in table.column_names)]))
        line = (
            f"{split}: {len(table)} rows{f' ({choice})' if rows is None or len(table) < rows else ''}, text in {texts}"
        )
        if split in examples.unread:
            line += f"; its labels in {examples.unread[split]!r} are not read"
        if LABEL in table.column_names:
            line += f", labels in {columns[-1]!r}{_describe_labels(table, examples)}"
        lines.append(f"{line}.")
    return lines


def _describe_labels(table: Dataset, examples: Examples) -> str:
    if examples.is_regression:
        numbers = column(table, LABEL).to_numpy()
        hint = " (for two classes write 0 and 1)" if np.isin(numbers, (0, 1)).all() else ""
        return f", a regression: numbers from {numbers.min():g} to {numbers.max():g}{hint}"
    counts = _label_counts(table, examples)
    absent = [name for name in examples.labels if name not in counts]
    return f": {_counts_text(counts)}" + (f"; none of {label_list(absent)}" if absent else "")
