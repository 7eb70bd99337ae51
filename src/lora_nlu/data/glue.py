"""GLUE from the Hub and from the folders of the standard download."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import Dataset

from lora_nlu.data.cache import cached_file, cached_table, record_batches
from lora_nlu.data.examples import LABEL, Examples
from lora_nlu.data.lines import read_lines
from lora_nlu.data.tasks import TASKS, Task
from lora_nlu.data.user_rows import column_list
from lora_nlu.errors import UserError, printable_lines
from lora_nlu.labels import label_list, label_number

HUB_DATASET = "nyu-mll/glue"


def load_glue(
    name: str,
    kinds: Sequence[str],
    glue_dir: str | None = None,
    cache_dir: str | None = None,
    token: str | None = None,
    overwrite_cache: bool = False,
) -> Examples:
    """A GLUE task's splits of these kinds (train, validation, test) from `glue_dir` or the Hub. Raises UserError."""
    task = TASKS[name]
    for kind in kinds:
        if not task.splits[kind]:
            raise UserError(f"{name} has no {kind} set. It is for --do_predict with an adapter trained on mnli.")
    splits = [split for kind in kinds for split in task.splits[kind]]
    if glue_dir is not None:
        return load_glue_folder(glue_dir, task, splits, cache_dir, overwrite_cache)
    return load_glue_hub(task, splits, cache_dir, token)


def with_diagnostics(examples: Examples, *source: Any) -> tuple[Examples, str]:
    """MNLI's examples with GLUE's diagnostic set (AX), which an MNLI model predicts, as split `test_ax`.

    source: as in `load_glue`, from glue_dir on. If the set can't be loaded, the examples are returned unchanged, with
    the reason; otherwise the reason is "".
    """
    try:
        ax = load_glue("ax", ["test"], *source)
    except UserError as e:
        return examples, str(e).splitlines()[0]
    splits = examples.splits | {"test_ax": ax.splits["test"]}
    return replace(examples, splits=splits, columns=examples.columns | {"test_ax": ax.columns["test"]}), ""


def load_glue_folder(
    glue_dir: str, task: Task, splits: Sequence[str], cache_dir: str | None = None, overwrite_cache: bool = False
) -> Examples:
    """Read the splits (Hub names) of a task from the standard GLUE folders under `glue_dir`."""
    if not Path(glue_dir).is_dir():
        raise UserError(f"--glue_dir {glue_dir}: no such folder. It must hold {next(iter(task.files.values()))[0]}.")
    tables, columns = {}, {}
    for split in splits:
        candidates = [Path(glue_dir, file) for file in task.files[split]]
        path = next((file for file in candidates if file.is_file()), candidates[0])
        if not path.is_file():
            raise UserError(
                f"{path}: missing, and {task.name} needs it.\n"
                f"--glue_dir must be the folder that holds {path.parent.name}/ of the standard GLUE download."
            )
        with_labels = not split.startswith("test")
        columns[split] = (*(task.text_columns or task.text), *([task.label_column] if with_labels else []))
        tables[split] = read_glue_file(path, task, columns[split], with_labels, cache_dir, overwrite_cache)
        _compare_rows(str(path), tables[split], task, split)
    return Examples(tables, task.labels, columns)


def _compare_rows(source: str, table: Dataset, task: Task, split: str) -> None:
    """Log a warning unless a split has as many examples as the published file."""
    if len(table) != task.rows[split]:
        text = f"{source} has {len(table)} examples; the published file has {task.rows[split]}."
        datasets.logging.get_logger(__name__).warning(printable_lines(text))


def read_glue_file(
    path: Path,
    task: Task,
    columns_read: Sequence[str],
    with_labels: bool,
    cache_dir: str | None = None,
    overwrite_cache: bool = False,
) -> Dataset:
    """Read the columns of the text, or of a pair, and then of the label, of one file of the standard GLUE download.

    Raises UserError, with file and line, for a missing or empty file, a header without the task's columns, a line of
    another width or without a newline, and a label outside the task's set.
    """
    next(read_lines(path, newline="\n"))  # raises UserError for a file that can't be read
    cached = partial(cached_table, f"{task.name}_rows", cache_dir=cache_dir, overwrite=overwrite_cache)
    batches = partial(_batches, path, task, columns_read, with_labels)
    return cached_file(path, f"{task.name} {with_labels}", batches, cached)[0]


def _batches(path: Path, task: Task, columns_read: Sequence[str], with_labels: bool) -> Iterator[pa.RecordBatch]:
    """The columns that are read of a file, in batches. Raises UserError as `read_glue_file` does."""
    types = dict.fromkeys(("text", "text_pair")[: len(task.text)], pa.string())
    if with_labels:
        types[LABEL] = pa.float64() if task.is_regression else pa.int64()
    return record_batches(_rows(path, task, columns_read, with_labels), types)


def _rows(path: Path, task: Task, columns_read: Sequence[str], with_labels: bool) -> Iterator[list[Any]]:
    """The columns that are read of each row, a label as its id or number."""
    lines = _lines(path, task)
    first = number, header = next(lines)
    if with_labels and task.headerless:
        if len(header) != len(task.headerless):
            names = ", ".join(task.headerless)
            raise UserError(f"{path}:1: {len(header)} columns, {task.name} files have {len(task.headerless)}: {names}.")
        lines, header = chain([first], lines), [*task.headerless]
    elif missing := [column for column in columns_read if column not in header]:
        raise UserError(
            f"{path}:1: the header lacks {', '.join(map(repr, missing))}; it has {column_list(header)}.\n"
            f"Is this the standard GLUE file of {task.name}?"
        )
    indices = [header.index(column) for column in columns_read]
    ids = {name: i for i, name in enumerate(task.written or task.labels)}
    number = 0
    for number, fields in lines:
        row: list[Any] = [fields[i] for i in indices]
        if with_labels:
            row[-1] = _label(row[-1], ids, task, f"{path}:{number}")
        yield row
    if not number:
        raise UserError(f"{path}: no examples, only a header.")


def _lines(path: Path, task: Task) -> Iterator[tuple[int, list[str]]]:
    """(line number, fields) of a GLUE file: tab-separated, unquoted, with a newline at its very end."""
    width, broken = 0, ""
    for number, line in enumerate(read_lines(path, newline="\n"), start=1):
        if not line.endswith("\n"):
            raise UserError(
                f"{path}:{number}: the last line has no newline: the file may be cut short.\n"
                "Download it again, or add the newline if the file is complete."
            )
        fields, broken = line[:-1].rstrip("\r").split("\t"), ""
        width = width or len(fields)
        if len(fields) == width:
            yield number, fields
            continue
        broken = f"{path}:{number}: {len(fields)} columns, the file has {width}: a broken or cut line."
        if not task.skips_broken_lines:  # as the Hub's own conversion of such a task does, but for the last line
            break
    if broken:
        raise UserError(broken)


def _label(written: str, ids: dict[str, int], task: Task, place: str) -> int | float:
    if not task.is_regression:
        if written not in ids:
            raise UserError(f"{place}: label {written[:80]!r} is not one of {task.name}'s: {', '.join(ids)}.")
        return ids[written]
    try:
        score = label_number(written)
    except ValueError:
        score = math.nan
    if not 0 <= score <= 5:  # true for NaN as well
        raise UserError(f"{place}: label {written[:80]!r} is not a number from 0 to 5, as {task.name}'s scores are.")
    return score


def load_glue_hub(task: Task, splits: Sequence[str], cache_dir: str | None, token: str | None) -> Examples:
    """Load the splits of a task from the Hub's `nyu-mll/glue`, or from the local cache of an earlier download.

    Raises UserError if they can't be loaded, or if their class names are not the task's in this order.
    """
    tables, columns = {}, {}
    for split in splits:
        try:
            table = datasets.load_dataset(HUB_DATASET, task.name, split=split, cache_dir=cache_dir, token=token)
        except (OSError, ValueError) as e:  # the Hub's errors are OSErrors, an uncached split offline a ValueError
            raise UserError(
                f"{task.name}: {HUB_DATASET} could not be downloaded from the Hub ({str(e).splitlines()[0][:140]}).\n"
                f"Use a local copy: --glue_dir FOLDER with {task.files[split][0]} in it."
            ) from e
        names = getattr(table.features.get(LABEL), "names", None)
        if names != ([*task.labels] or None):
            found, expected = label_list(names), label_list(task.labels)
            raise UserError(f"{HUB_DATASET}: {task.name}'s {split} set has {found}; expected {expected}.")
        _compare_rows(f"{HUB_DATASET}: {task.name} {split}", table, task, split)
        columns[split] = (*task.text, *([LABEL] if not split.startswith("test") else []))
        table = table.select_columns([*columns[split]])
        tables[split] = table.rename_columns(dict(zip(task.text, ("text", "text_pair"), strict=False)))
    return Examples(tables, task.labels, columns)
