"""GLUE from the Hub and from the folders of the standard download."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import datasets
import huggingface_hub
from datasets import Dataset

from lora_nlu.data.examples import LABEL, Examples, table_with_fingerprint
from lora_nlu.data.tasks import TASKS, Task
from lora_nlu.data.text_files import decode_utf8, read_nonempty
from lora_nlu.errors import UserError

HUB_DATASET = "nyu-mll/glue"
HUB_TIMEOUT_S = 5


def load_glue(
    name: str, kinds: Sequence[str], glue_dir: str | None = None, cache_dir: str | None = None, token: str | None = None
) -> Examples:
    """Load a GLUE task's splits of these kinds (train, validation, test) from `glue_dir`, or else from the Hub.

    Raises UserError for a split that the task lacks or that can't be read.
    """
    task = TASKS[name]
    for kind in kinds:
        if not task.splits[kind]:
            raise UserError(f"{name} has no {kind} set. It is for --do_predict with an adapter trained on mnli.")
    splits = [split for kind in kinds for split in task.splits[kind]]
    if glue_dir is not None:
        return load_glue_folder(glue_dir, task, splits)
    return load_glue_hub(task, splits, cache_dir, token)


def with_diagnostics(examples: Examples, *source: str | None) -> tuple[Examples, str]:
    """MNLI's examples with GLUE's diagnostic set (AX), which an MNLI model predicts, as split `test_ax`.

    source: glue_dir, cache_dir and token as in `load_glue`. If the set can't be loaded, the examples are returned
    unchanged, with the reason; otherwise the reason is "".
    """
    try:
        ax = load_glue("ax", ["test"], *source)
    except UserError as e:
        return examples, str(e).splitlines()[0]
    splits = examples.splits | {"test_ax": ax.splits["test"]}
    return replace(examples, splits=splits, columns=examples.columns | {"test_ax": ax.columns["test"]}), ""


def load_glue_folder(glue_dir: str, task: Task, splits: Sequence[str]) -> Examples:
    """Read the splits (Hub names) of a task from the standard GLUE folders under `glue_dir`."""
    if not Path(glue_dir).is_dir():
        raise UserError(f"--glue_dir {glue_dir}: no such folder. It must hold {next(iter(task.files.values()))[0]}.")
    tables = {}
    for split in splits:
        candidates = [Path(glue_dir, file) for file in task.files[split]]
        path = next((file for file in candidates if file.is_file()), candidates[0])
        if not path.is_file():
            raise UserError(
                f"{path}: missing, and {task.name} needs it.\n"
                f"--glue_dir must be the folder that holds {path.parent.name}/ of the standard GLUE download."
            )
        tables[split] = read_glue_file(path, task, with_labels=not split.startswith("test"))
        if len(tables[split]) != task.rows[split]:
            text = f"{path} has {len(tables[split])} examples; the published file has {task.rows[split]}."
            datasets.logging.get_logger(__name__).warning(text)
    return Examples(tables, task.labels, {s: _columns(task, not s.startswith("test")) for s in splits})


def _columns(task: Task, with_labels: bool) -> tuple[str, ...]:
    """The columns of a task's file that are read: text, or a pair, then the label."""
    return (*(task.text_columns or task.text), *([task.label_column] if with_labels else []))


def read_glue_file(path: Path, task: Task, with_labels: bool) -> Dataset:
    """Read one file of the standard GLUE download.

    Raises UserError, with file and line, for a missing or empty file, a header without the task's columns, a line of
    another width or without a newline, and a label outside the task's set.
    """
    content = read_nonempty(path)
    lines = _lines(path, task, decode_utf8(path, content))
    columns_read = _columns(task, with_labels)
    if with_labels and task.headerless:
        header = list(task.headerless)
        width = content.split(b"\n", 1)[0].count(b"\t") + 1
        if width != len(header):
            raise UserError(f"{path}:1: {width} columns, {task.name} files have {len(header)}: {', '.join(header)}.")
    else:
        _, header = next(lines)
        if missing := [column for column in columns_read if column not in header]:
            raise UserError(
                f"{path}:1: the header lacks {', '.join(map(repr, missing))}; it has {', '.join(header)}.\n"
                f"Is this the standard GLUE file of {task.name}?"
            )
    indices = [header.index(column) for column in columns_read]
    ids = {name: i for i, name in enumerate(task.written or task.labels)}
    names = ["text", "text_pair"][: len(task.text)]
    columns: dict[str, list] = {name: [] for name in [*names, LABEL][: len(indices)]}
    for number, fields in lines:
        for name, i in zip(names, indices, strict=False):
            columns[name].append(fields[i])
        if with_labels:
            columns[LABEL].append(_label(fields[indices[-1]], ids, task, f"{path}:{number}"))
    if not columns["text"]:
        raise UserError(f"{path}: no examples, only a header.")
    return table_with_fingerprint(columns, f"{task.name} {with_labels} {hashlib.sha256(content).hexdigest()}")


def _lines(path: Path, task: Task, text: str) -> Iterator[tuple[int, list[str]]]:
    """(line number, fields) of a GLUE file: tab-separated, unquoted, with a newline at its very end."""
    lines = text.split("\n")
    if lines.pop():
        raise UserError(
            f"{path}:{len(lines) + 1}: the last line has no newline: the file may be cut short.\n"
            "Download it again, or add the newline if the file is complete."
        )
    width = len(lines[0].rstrip("\r").split("\t"))
    for number, line in enumerate(lines, start=1):
        fields = line.rstrip("\r").split("\t")
        if len(fields) != width:
            if task.skips_broken_lines and number < len(lines):
                continue  # as the Hub's own conversion of this task does
            raise UserError(f"{path}:{number}: {len(fields)} columns, the file has {width}: a broken or cut line.")
        yield number, fields


def _label(written: str, ids: dict[str, int], task: Task, place: str) -> int | float:
    if not task.is_regression:
        if written not in ids:
            raise UserError(f"{place}: label {written!r} is not one of {task.name}'s: {', '.join(ids)}.")
        return ids[written]
    try:
        score = float(written)
    except ValueError:
        score = math.nan
    if not 0 <= score <= 5:  # true for NaN as well
        raise UserError(f"{place}: label {written!r} is not a number from 0 to 5, as {task.name}'s scores are.")
    return score


def load_glue_hub(task: Task, splits: Sequence[str], cache_dir: str | None, token: str | None) -> Examples:
    """Load the splits of a task from the Hub's `nyu-mll/glue`, or from the local cache of an earlier download."""
    tables, columns = {}, {}
    for split in splits:
        try:
            table = datasets.load_dataset(HUB_DATASET, task.name, split=split, cache_dir=cache_dir, token=token)
        except (OSError, ValueError) as e:  # the Hub's errors are OSErrors, an uncached split offline a ValueError
            raise UserError(
                f"{task.name}: {HUB_DATASET} could not be downloaded from the Hub ({str(e).splitlines()[0][:140]}).\n"
                f"Use a local copy: --glue_dir FOLDER with {task.files[split][0]} in it."
            ) from e
        keep = [*task.text, LABEL] if not split.startswith("test") else list(task.text)
        table, columns[split] = table.select_columns(keep), tuple(keep)
        tables[split] = table.rename_columns(dict(zip(task.text, ("text", "text_pair"), strict=False)))
    return Examples(tables, task.labels, columns)


def use_cache_if_hub_unreachable() -> None:
    """If the Hub does not answer, read only the local cache, instead of retrying for minutes."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=HUB_TIMEOUT_S)
    except Exception:  # every HTTP library has its own exceptions for no answer
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        datasets.config.HF_HUB_OFFLINE = datasets.config.HF_DATASETS_OFFLINE = True
