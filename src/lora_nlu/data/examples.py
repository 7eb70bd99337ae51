"""Examples of every source as one kind of table: `text`, `text_pair` for pairs, `label`."""

import codecs
import hashlib
import random
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from datasets import Dataset

from lora_nlu.errors import UserError, printable
from lora_nlu.labels import label_list, shortened_list

LABEL = "label"


@dataclass(frozen=True)
class Examples:
    """Tables by split name, and what their labels mean: `labels` in id order, () for regression.

    columns: of each split, the names that its file gives the columns read: text, or a pair, then the label if it is.
    rows:    of each split, how many there were before some were chosen (`choose_rows`).
    unread:  of a test split whose file has a column of labels, the name of that column.
    notes:   lines worth saying of what was read.
    """

    splits: dict[str, Dataset]
    labels: tuple[str, ...]
    columns: dict[str, tuple[str, ...]] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
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


def read_file(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as e:
        raise UserError(f"{path}: {e.strerror or e}.") from e
    if not content.removeprefix(codecs.BOM_UTF8).strip():
        raise UserError(f"{path}: the file is empty.")
    return content


def decode(path: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = content[: e.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8 (byte {e.start}). Save the file as UTF-8.") from e


def table_from_columns(columns: dict[str, list], key: str) -> Dataset:
    """A table whose fingerprint, and with it the tokenised cache, is a function of `key`."""
    dataset = Dataset.from_dict(columns)
    dataset._fingerprint = hashlib.sha256(key.encode()).hexdigest()[:32]
    return dataset


# ------------------------------------------------------------------------------------------------------ tokenising


def choose_rows(examples: Examples, limits: dict[str, int | None], seed: int | None = None) -> Examples:
    """The first examples of each split, at most as many as `limits` gives its kind; None or no entry keeps all.

    limits: by kind of split, which is the first word of its name: train, validation, test ("validation_matched").
    With a seed, those of all but the test splits are drawn by it instead; their order stays. Raises UserError if a part
    holds a single class of several, and for a regression if all numbers are the same.
    """
    tables = {}
    for split, table in examples.splits.items():
        limit = limits.get(split.partition("_")[0])
        if limit is not None and limit < len(table):
            is_drawn = seed is not None and not split.startswith("test")
            numbers = sorted(random.Random(seed).sample(range(len(table)), limit)) if is_drawn else range(limit)
            part = table.select(numbers)
            if LABEL in part.column_names:
                _check_part(examples, split, part, "drawn" if is_drawn else "first")
            table = part
        tables[split] = table
    return replace(examples, splits=tables, rows={split: len(table) for split, table in examples.splits.items()})


def _check_part(examples: Examples, split: str, part: Dataset, which: str) -> None:
    """A part with a single label teaches and measures nothing, where the set has more. Raises UserError."""
    there, all_there = (_label_counts(table, examples) for table in (part, examples.splits[split]))
    if len(part) > 1 and len(there) < 2 <= len(all_there):  # one row has one label, as everybody sees
        flag = f"--max_{'train' if split == 'train' else 'eval'}_samples"
        raise UserError(
            f"{split}: the {which} {len(part)} of {len(examples.splits[split])} rows all have the label "
            f"{next(iter(there), '')[:80]!r}; the set has {_counted(all_there)}.\n"
            f"Draw them with {'another' if which == 'drawn' else 'a'} --sample_seed N, or give a larger {flag}."
        )


def _label_counts(table: Dataset, examples: Examples) -> dict[str, int]:
    """How many rows of a table each label has that occurs in it: classes by name in id order, or numbers."""
    counts = Counter(table.with_format("numpy")[LABEL][:].tolist())
    if examples.is_regression:
        return {f"{number:g}": count for number, count in sorted(counts.items())}
    return {name: counts[i] for i, name in enumerate(examples.labels) if counts[i]}


def _counted(counts: dict[str, int]) -> str:
    """Labels with their counts."""
    return shortened_list([f"{printable(name, 40)} {count}" for name, count in counts.items()])


def describe_examples(examples: Examples, seed: int | None = None) -> list[str]:
    """A line on each split: its rows, the columns they were read from, and how many have which label."""
    lines = list(examples.notes)
    drawn = {split: table for split, table in examples.splits.items() if not split.startswith("test")}
    if seed is not None and all(len(table) == examples.rows.get(split, len(table)) for split, table in drawn.items()):
        lines.append("--sample_seed has no effect here: every row is read.")
    for split, table in examples.splits.items():
        rows, columns = examples.rows.get(split, len(table)), examples.columns.get(split, ())
        chosen = f"the first of {rows}" if seed is None or split.startswith("test") else f"drawn of {rows}"
        texts = " and ".join(map(repr, columns[: len(table.column_names) - (LABEL in table.column_names)]))
        line = f"{split}: {len(table)} rows{f' ({chosen})' if len(table) < rows else ''}, text in {texts}"
        if split in examples.unread:
            line += f"; its labels in {examples.unread[split]!r} are not read"
        if LABEL in table.column_names:
            line += f", labels in {columns[-1]!r}"
            if examples.is_regression:
                numbers = table.with_format("numpy")[LABEL][:]
                line += f", a regression: numbers from {numbers.min():g} to {numbers.max():g}"
                if {*numbers.tolist()} <= {0.0, 1.0}:
                    line += " (for two classes write 0 and 1)"
            else:
                counts = _label_counts(table, examples)
                line += f": {_counted(counts)}"
                if absent := [name for name in examples.labels if name not in counts]:
                    line += f"; none of {label_list(absent)}"
        lines.append(f"{line}.")
    return lines


def digest(table: Dataset) -> str:
    """16 hex digits that stand for a tokenised table: its input_ids, token_type_ids where there, and labels, in order.

    The same wherever the table was read from, however it is stored: scores count as the float32 that the loss takes.
    """
    sha = hashlib.sha256()
    for name in (name for name in ("input_ids", "token_type_ids", LABEL) if name in table.column_names):
        chunks = table.select_columns(name).with_format("arrow")[:][name].chunks
        kind = np.float32 if name == LABEL else np.int32
        parts = [chunks if name == LABEL else [chunk.flatten() for chunk in chunks]]
        parts += [] if name == LABEL else [[chunk.value_lengths() for chunk in chunks]]
        sha.update(name.encode())
        for part in (chunk for column in parts for chunk in column):
            sha.update(np.ascontiguousarray(part.to_numpy(zero_copy_only=False), dtype=kind).data)
    return sha.hexdigest()[:16]
