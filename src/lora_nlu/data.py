"""Examples from the Hub, from the standard GLUE folders, or from a person's own CSV, TSV and JSON lines, tokenised.

Every source becomes the same table: `text`, `text_pair` for pairs, `label` (a class id, or a float for regression).
"""

import codecs
import csv
import hashlib
import io
import json
import math
import random
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
from datasets import Dataset

from lora_nlu.errors import UserError, shown
from lora_nlu.labels import first_of, listed, same_name
from lora_nlu.tasks import TASKS, Task

HUB_DATASET = "nyu-mll/glue"
HUB_TIMEOUT_S = 5
LABEL = "label"
_LENGTH = "tokens_uncut"  # of the tokenised tables on disk: an example's tokens before truncation
_PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text", "text_pair"),
)
_ROW_NUMBERS = {"idx", "id", "index", ""}


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


@dataclass(frozen=True)
class _Row:
    """One line of a file of one's own: fields by column, and where it stands, for errors."""

    fields: dict[str, Any]
    where: str


def _read(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as e:
        raise UserError(f"{path}: {e.strerror or e}.") from e
    if not content.removeprefix(codecs.BOM_UTF8).strip():
        raise UserError(f"{path}: the file is empty.")
    return content


def _decode(path: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = content[: e.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8 (byte {e.start}). Save the file as UTF-8.") from e


def _from_columns(columns: dict[str, list], key: str) -> Dataset:
    """A table whose fingerprint, and with it the tokenised cache, is a function of `key`."""
    dataset = Dataset.from_dict(columns)
    dataset._fingerprint = hashlib.sha256(key.encode()).hexdigest()[:32]
    return dataset


def use_cache_if_hub_unreachable() -> None:
    """Ask the Hub for a sign of life; without one, read only the local cache instead of retrying for minutes."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=HUB_TIMEOUT_S)
    except Exception:  # whatever the HTTP library in use calls it: no answer
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        datasets.config.HF_HUB_OFFLINE = datasets.config.HF_DATASETS_OFFLINE = True


# ---------------------------------------------------------------------------------------------------- GLUE folders


def _glue_lines(path: Path, task: Task, text: str) -> Iterator[tuple[int, list[str]]]:
    """(line number, fields) of a GLUE file: tab-separated, unquoted; complete to the last line."""
    lines = text.split("\n")
    if lines.pop():
        raise UserError(
            f"{path}:{len(lines) + 1}: the last line has no end: the file was cut short.\n"
            "Download it again, or add the missing newline if it is complete."
        )
    width = len(lines[0].rstrip("\r").split("\t"))
    for number, line in enumerate(lines, start=1):
        fields = line.rstrip("\r").split("\t")
        if len(fields) != width:
            if task.skips_broken_lines and number < len(lines):
                continue  # as the Hub's own conversion of this task does
            raise UserError(f"{path}:{number}: {len(fields)} columns, the file has {width}: a broken or cut line.")
        yield number, fields


def _glue_columns(task: Task, with_labels: bool) -> tuple[str, ...]:
    """The columns of a task's file that are read: text, or a pair, then the label."""
    return (*(task.text_columns or task.text), *([task.label_column] if with_labels else []))


def read_glue_file(path: Path, task: Task, with_labels: bool) -> Dataset:
    """Read one file of the standard GLUE download.

    Raises UserError, with file and line, for a missing or empty file, a header without the task's columns, a line of
    another width or without an end, and a label outside the task's set.
    """
    content = _read(path)
    lines = _glue_lines(path, task, _decode(path, content))
    wanted = _glue_columns(task, with_labels)
    if with_labels and task.headerless:
        header = list(task.headerless)
        first = content.split(b"\n", 1)[0].count(b"\t") + 1
        if first != len(header):
            raise UserError(f"{path}:1: {first} columns, {task.name} has {len(header)}: {', '.join(header)}.")
    else:
        _, header = next(lines)
        if missing := [column for column in wanted if column not in header]:
            raise UserError(
                f"{path}:1: the header lacks {', '.join(map(repr, missing))}; it has {', '.join(header)}.\n"
                f"Is this the standard GLUE file of {task.name}?"
            )
    places = [header.index(column) for column in wanted]
    ids = {name: i for i, name in enumerate(task.written or task.labels)}
    names = ["text", "text_pair"][: len(task.text)]
    columns: dict[str, list] = {name: [] for name in names + ([LABEL] if with_labels else [])}
    for number, fields in lines:
        for name, place in zip(names, places, strict=False):
            columns[name].append(fields[place])
        if with_labels:
            columns[LABEL].append(_glue_label(fields[places[-1]], ids, task, f"{path}:{number}"))
    if not columns["text"]:
        raise UserError(f"{path}: no examples, only a header.")
    return _from_columns(columns, f"{task.name} {with_labels} {hashlib.sha256(content).hexdigest()}")


def _glue_label(written: str, ids: dict[str, int], task: Task, where: str) -> int | float:
    if not task.is_regression:
        if written not in ids:
            raise UserError(f"{where}: label {written!r} is none of {task.name}'s: {', '.join(ids)}.")
        return ids[written]
    try:
        score = float(written)
    except ValueError:
        score = math.nan
    if not 0 <= score <= 5:  # catches NaN as well
        raise UserError(f"{where}: label {written!r} is no number from 0 to 5, as {task.name}'s scores are.")
    return score


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
            datasets.logging.get_logger(__name__).warning(
                f"{path} has {len(tables[split])} examples; the published file has {task.rows[split]}."
            )
    return Examples(tables, task.labels, {s: _glue_columns(task, not s.startswith("test")) for s in splits})


def load_glue_hub(task: Task, splits: Sequence[str], cache_dir: str | None, token: str | None) -> Examples:
    """Load the splits of a task from the Hub's `nyu-mll/glue`, or from the local cache of an earlier download."""
    tables, columns = {}, {}
    for split in splits:
        try:
            table = datasets.load_dataset(HUB_DATASET, task.name, split=split, cache_dir=cache_dir, token=token)
        except (OSError, ValueError) as e:  # the Hub's errors are OSErrors, an uncached split offline a ValueError
            raise UserError(
                f"{task.name}: {HUB_DATASET} can't be had from the Hub ({str(e).splitlines()[0][:140]}).\n"
                f"Give a local copy: --glue_dir FOLDER with {task.files[split][0]} in it."
            ) from e
        keep = [*task.text, LABEL] if not split.startswith("test") else list(task.text)
        table, columns[split] = table.select_columns(keep), tuple(keep)
        tables[split] = table.rename_columns(dict(zip(task.text, ("text", "text_pair"), strict=False)))
    return Examples(tables, task.labels, columns)


# ----------------------------------------------------------------------------------------------- files of one's own


def _own_rows(path: Path, content: bytes) -> list[_Row]:
    text = _decode(path, content)
    if path.suffix in (".json", ".jsonl"):
        return list(_json_rows(path, text))
    if path.suffix in (".csv", ".tsv"):
        return list(_csv_rows(path, text))
    raise UserError(f"{path}: the name must end in .csv, .tsv, .json or .jsonl.")


def _csv_rows(path: Path, text: str) -> Iterator[_Row]:
    """CSV as spreadsheets write it; TSV unquoted, as GLUE's files are. The first line names the columns."""
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # the reader's own limit is 131,072 characters a cell
    tabs = path.suffix == ".tsv"
    options: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"strict": True}
    reader = csv.reader(io.StringIO(text, newline=""), **options)
    try:
        header = next(reader)
        if len(set(header)) != len(header):
            raise UserError(f"{path}:1: two columns have the same name: {', '.join(header)}.")
        remedy = _other_separator(path, header)
        if remedy and len(header) == 1:
            raise UserError(f"{path}:1: the header is one column, {header[0][:80]!r}.{remedy}")
        for fields in reader:
            if not fields:
                continue
            if len(fields) != len(header):
                found = f"{len(fields)} columns, the header has {len(header)}"
                raise UserError(f"{path}:{reader.line_num}: {found}.{remedy}")
            yield _Row(dict(zip(header, fields, strict=True)), f"{path}:{reader.line_num}")
    except csv.Error as e:
        raise UserError(f"{path}:{reader.line_num}: {e}: a broken or cut line.") from e


def _other_separator(path: Path, header: Sequence[str]) -> str:
    """What to do about a header in which columns seem to be separated by what their file's kind doesn't; or ""."""
    marks = {"\t": "tabs", ";": "semicolons", ",": "commas", "|": "bars"}
    own = "\t" if path.suffix == ".tsv" else ","
    there = next((mark for mark in marks if mark != own and any(mark in name for name in header)), None)
    if there is None:
        return ""
    rename = ", or name it .tsv" if there == "\t" else ", or name it .csv" if there == "," else ""
    return f"\nA {path.suffix} file has {marks[own]} between columns, this one {marks[there]}: save it so{rename}."


def _json_rows(path: Path, text: str) -> Iterator[_Row]:
    """JSON lines: one object a line."""
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line, object_pairs_hook=_object)
            if "\\u" in line:  # half a surrogate pair, which no table can hold, fails here
                json.dumps(fields, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as e:
            raise UserError(f"{path}:{number}: not a JSON object ({e}). The file needs one object a line.") from e
        except KeyError as e:
            raise UserError(f"{path}:{number}: the key {e} stands twice in one object.") from e
        if not isinstance(fields, dict):
            raise UserError(f"{path}:{number}: a JSON {type(fields).__name__}; the file needs one object a line.")
        yield _Row(fields, f"{path}:{number}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; KeyError for a key that it has twice, of which json would keep the last."""
    fields: dict[str, Any] = {}
    for key, value in pairs:
        if key in fields:
            raise KeyError(key[:80])
        fields[key] = value
    return fields


def _text_columns(path: Path, columns: Sequence[str], label_column: str) -> tuple[str, ...]:
    """The one or two columns to read: the one known pair, or the one column beside the label and row numbers."""
    candidates = tuple(c for c in columns if c != label_column and c.lower() not in _ROW_NUMBERS)
    pairs = [pair for pair in _PAIRS if {*pair} <= {*candidates}]
    if len(pairs) == 1:
        return pairs[0]
    if not pairs and len(candidates) == 1:
        return candidates
    raise UserError(
        f"{path}: found columns {', '.join(columns)}; which hold the text?\n"
        "Name one, or two for pairs: --text_columns a or --text_columns a,b. "
        f"The labels are read from {label_column!r} (--label_column)."
    )


def _check_columns(path: Path, rows: Sequence[_Row], texts: Sequence[str], label_column: str | None) -> None:
    """Every row must have the columns that are read, and strings for texts. Raises UserError naming file and line."""
    for row in rows:
        if label_column is not None and label_column not in row.fields:
            raise UserError(
                f"{row.where}: no column {label_column!r}; has {', '.join(row.fields)}.\n"
                "Name the column of the labels: --label_column."
            )
        if missing := [column for column in texts if column not in row.fields]:
            raise UserError(
                f"{row.where}: no column {', '.join(map(repr, missing))}; has {', '.join(row.fields)}.\n"
                f"In all files the text is read from {', '.join(texts)} (--text_columns)."
            )
        if bad := [column for column in texts if not isinstance(row.fields[column], str)]:
            raise UserError(f"{row.where}: {bad[0]!r} is {row.fields[bad[0]]!r}; it must be a string.")


def _check_leak(path: Path, rows: Sequence[_Row], texts: Sequence[str], labels: Sequence[Any]) -> None:
    """A text column that has one value for each label is the label in other words. Raises UserError naming it."""
    names = {*labels}
    if len(names) < 2 or len(rows) < 3 * len(names):
        return
    for column in texts:
        values = {(label, row.fields[column]) for label, row in zip(labels, rows, strict=True)}
        if len(values) == len(names) == len({text for _, text in values}):
            told = "; ".join(f"{text[:40]!r} for {label}" for label, text in sorted(values)[:3])
            raise UserError(
                f"{path}: column {column!r} has one value for each label ({told}): it repeats the label.\n"
                "Name the columns of the text: --text_columns."
            )


def _check_repeated(path: Path, labels: Sequence[str], column: str, known: dict[str, int]) -> None:
    """Labels of which nearly every row has its own are none, unless all are known. Raises UserError."""
    names = [*dict.fromkeys(labels)]
    if len(labels) < 10 or 2 * len(names) <= len(labels):
        return
    if known and all(_known_as(name, known) is not None for name in names):
        return
    raise UserError(
        f"{path}: column {column!r} has {len(names)} different labels in {len(labels)} rows ({listed(names[:2])}, "
        "...): nearly every row would be its own class.\n"
        "Name the column of the labels with --label_column, those of the text with --text_columns.\n"
        "Numbers of a regression need a decimal point (3.0); so many classes are named with --labels."
    )


def _check_varied(path: Path, numbers: Sequence[float], column: str) -> None:
    """With numbers that are all the same nothing correlates. Raises UserError."""
    if len(numbers) > 1 and len({*numbers}) == 1:
        raise UserError(
            f"{path}: every label in column {column!r} is {numbers[0]:g}; there is nothing to learn, and no "
            "correlation to measure.\nName the column of the labels: --label_column."
        )


def _label_values(rows: Sequence[_Row], column: str) -> list[str] | list[float]:
    """Labels as class names (strings), or as floats if every one is a number and not every one an integer."""
    written = []
    for row in rows:
        value = row.fields[column]
        if isinstance(value, bool):
            value = str(value).lower()
        empty = value is None or (isinstance(value, float) and not math.isfinite(value))
        if empty or str(value).strip().lower() in ("", "nan"):
            raise UserError(f"{row.where}: the label is {value!r}. Give every example one.")
        if not isinstance(value, (str, int, float)):
            raise UserError(f"{row.where}: the label is a {type(value).__name__}; it must be a string or a number.")
        written.append(value)
    if any(isinstance(value, float) for value in written) or all(isinstance(value, str) for value in written):
        try:
            numbers = [_number(value) for value in written]
        except ValueError:
            return [str(value) for value in written]
        if not all(_is_integer(value) for value in written):
            for row, number in zip(rows, numbers, strict=True):
                if not math.isfinite(number):
                    raise UserError(f"{row.where}: the label is {row.fields[column]!r}, which is not finite.")
            return numbers
    return [str(value) for value in written]


def _number(value: Any) -> float:
    try:
        return float(str(value))
    except OverflowError:
        return math.inf


def _is_integer(value: Any) -> bool:
    try:
        return not isinstance(value, float) and int(value) is not None
    except ValueError:
        return False


def load_files(
    files: dict[str, str],
    known_labels: Sequence[str] | None,
    text_columns: Sequence[str] | None = None,
    label_column: str = LABEL,
    named_by: str = "",
) -> Examples:
    """Read train, validation and test files of one's own (CSV, TSV, JSON lines).

    Text is in the one or two `text_columns`; without them, in a pair of known names or in the one column beside the
    label and row numbers. `label_column` holds class names or integers (classification) or other numbers (regression).
    Class ids follow `known_labels` (those of a trained head or of --labels; () means regression) or the sorted labels
    of the training file; without either, of the validation file. `named_by` is what gave `known_labels`: --labels, or
    whose head it is. Raises UserError naming file and line.
    """
    rows: dict[str, list[_Row]] = {}
    digests: dict[str, str] = {}
    texts = tuple(text_columns or ())
    for split, name in files.items():
        path = Path(name)
        content = _read(path)
        digests[split] = hashlib.sha256(content).hexdigest()
        rows[split] = _own_rows(path, content)
        if not rows[split]:
            raise UserError(f"{path}: no examples, only a header.")
        has_labels = split != "test"
        if not texts:  # the first file says which columns, and in which order
            if has_labels:
                _check_columns(path, rows[split][:1], (), label_column)
            texts = _text_columns(path, list(rows[split][0].fields), label_column)
        _check_columns(path, rows[split], texts, label_column if has_labels else None)
    labels = {split: _label_values(rows[split], label_column) for split in rows if split != "test"}
    if known_labels is None and not labels:
        raise UserError("The labels are unknown: give --train_file, or --lora_path with an adapter that records them.")
    reference = labels.get("train") or labels.get("validation") or []
    origin = named_by or "the known labels"
    if known_labels is None:
        origin = files.get("train") or files["validation"]
    elif known_labels and named_by == "--labels" and reference and isinstance(reference[0], float):
        raise UserError(
            f"{files.get('train') or files['validation']}: the labels in column {label_column!r} are numbers, and a "
            "regression has no label names. Leave --labels out."
        )
    known = {name: i for i, name in enumerate(known_labels or ())}
    for split, values in labels.items():
        if known_labels != () and not isinstance(values[0], float):
            _check_repeated(Path(files[split]), [str(value) for value in values], label_column, known)
        if known_labels is None:  # training's were looked at before
            known = known or dict.fromkeys(map(str, values), 0)
    if known_labels is not None:
        names = tuple(known_labels)
    else:
        names = () if isinstance(reference[0], float) else tuple(sorted({*map(str, reference)}, key=_label_order))
    if names and len({*reference}) == 1 and ("train" in labels or known_labels is None):
        raise UserError(
            f"{files.get('train') or files['validation']}: every label is {str(reference[0])!r}; nothing to learn."
        )
    ids, notes = {name: i for i, name in enumerate(names)}, []
    tables, columns, unread = {}, {}, {}
    for split, file in files.items():
        columns[split] = texts
        table: dict[str, list] = {
            name: [row.fields[column] for row in rows[split]]
            for name, column in zip(("text", "text_pair"), texts, strict=False)
        }
        if split in labels:
            columns[split] = (*texts, label_column)
            if ids:
                _check_leak(Path(file), rows[split], texts, labels[split])
                notes += _odd_spellings(file, list(map(str, labels[split])), ids)
            table[LABEL] = [
                _own_label(value, ids, row.where, origin) for value, row in zip(labels[split], rows[split], strict=True)
            ]
            if not ids:
                _check_varied(Path(file), table[LABEL], label_column)
        elif label_column in rows[split][0].fields and label_column not in texts:
            unread[split] = label_column
        suffix = Path(file).suffix  # the same bytes are other examples in CSV and TSV
        tables[split] = _from_columns(table, f"{split} {names} {columns[split]} {suffix} {digests[split]}")
    return Examples(tables, names, columns, unread=unread, notes=tuple(notes))


def _odd_spellings(file: str, labels: Sequence[str], ids: dict[str, int]) -> list[str]:
    """Lines on labels of a file that differ from others in blanks, case or the writing of a number alone, or from the
    known ones in blanks or case."""
    counts, lines = Counter(labels), []
    groups: dict[object, list[str]] = {}
    for label in counts:
        groups.setdefault(_meaning(label), []).append(label)
    for label, count in counts.items():
        if label not in ids and (name := _known_as(label, ids)) is not None:
            lines.append(f"{file}: label {label!r} ({count} rows) is read as {name!r}.")
    for alike in groups.values():
        if len(apart := [label for label in alike if label in ids]) > 1:
            said = ", ".join(f"{label!r} ({counts[label]} rows)" for label in apart)
            is_name = isinstance(_meaning(alike[0]), str)
            which = "that differ in blanks or case alone" if is_name else "that are one number, written otherwise,"
            lines.append(f"{file}: labels {which} are taken for different ones: {said}.")
    return lines


def _meaning(label: str) -> object:
    """What is equal for labels that mean the same: 01, +1 and 1; Yes and yes."""
    try:
        return int(label) if _is_integer(label) else float(label)
    except ValueError:
        return same_name(label)


def _known_as(label: str, ids: dict[str, int]) -> str | None:
    """The known name that a label of a file means: itself, or the only one that differs in blanks or case alone."""
    if label in ids:
        return label
    near = [name for name in ids if same_name(name) == same_name(label)]
    return near[0] if len(near) == 1 else None


def _label_order(name: str) -> tuple[int, int, str]:
    """Numbers by value, transformers' LABEL_0, LABEL_1, ... by number, other names by letters."""
    if _is_integer(name):
        return 0, int(name), name
    number = name.removeprefix("LABEL_")
    return (1, int(number), name) if number != name and _is_integer(number) else (2, 0, name)


def _own_label(value: object, ids: dict[str, int], where: str, origin: str) -> int | float:
    if ids:
        if (name := _known_as(str(value), ids)) is None:
            raise UserError(f"{where}: label {str(value)[:80]!r} is not among those of {origin}: {listed([*ids])}.")
        return ids[name]
    try:
        number = _number(value)
    except ValueError as e:
        raise UserError(
            f"{where}: label {str(value)[:80]!r} is no number; those of {origin} are, and this is a regression."
        ) from e
    if not math.isfinite(number):
        raise UserError(f"{where}: the label is {str(value)[:40]!r}, which is not finite.")
    return number


# ------------------------------------------------------------------------------------------------------ tokenising


def choose_rows(examples: Examples, limits: dict[str, int | None], seed: int | None = None) -> Examples:
    """The first `limits[split]` examples of each split; None or no entry keeps all.

    With a seed, those of all but the test splits are drawn by it instead; their order stays. Raises UserError if a part
    holds a single class of several, and for a regression if all numbers are the same.
    """
    tables = {}
    for split, table in examples.splits.items():
        limit = limits.get(split)
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
    return first_of([f"{shown(name, 40)} {count}" for name, count in counts.items()])


def describe(examples: Examples, seed: int | None = None) -> list[str]:
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
                    line += f"; none of {listed(absent)}"
        lines.append(f"{line}.")
    return lines


def tokenize(
    examples: Examples, tokenizer: Any, max_length: int, cache_dir: str | None = None, overwrite_cache: bool = False
) -> tuple[dict[str, Dataset], list[str]]:
    """Encode text to input_ids (and token_type_ids, attention_mask, label), truncated to `max_length`, unpadded.

    Returns the tables and a line for each split of which texts were cut. Cached in `cache_dir` (or the datasets
    library's) under a name made of text, tokenizer and length; written to a temporary name first, so several processes
    may share it. Raises UserError if the tokenizer doesn't know the text.
    """
    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE, "lora_nlu")
    folder.mkdir(parents=True, exist_ok=True)
    settings = f"{tokenizer.__class__.__name__} {tokenizer.truncation_side} {tokenizer.model_input_names}"
    identity = f"{settings} {_tokenizer_identity(tokenizer)} {max_length} {_LENGTH}"

    def encode(batch: dict[str, list]) -> dict[str, list]:
        pairs = batch.get("text_pair")
        encoded = tokenizer(batch["text"], pairs, truncation=True, max_length=max_length)
        lengths = [len(ids) for ids in encoded["input_ids"]]
        if full := [i for i, length in enumerate(lengths) if length >= max_length]:  # these may have been longer
            columns = [[column[i] for i in full] for column in (batch["text"], pairs) if column]
            for i, ids in zip(full, tokenizer(*columns, verbose=False)["input_ids"], strict=True):
                lengths[i] = len(ids)
        return {**encoded, _LENGTH: lengths}

    encoded, notes = {}, []
    for split, table in examples.splits.items():
        _check_vocabulary(table, tokenizer, split)
        key = hashlib.sha256(f"{table._fingerprint} {len(table)} {identity}".encode()).hexdigest()[:32]
        texts = [name for name in table.column_names if name != LABEL]
        tokens = table.map(
            encode,
            batched=True,
            remove_columns=texts,
            cache_file_name=str(folder / f"{split}-{key}.arrow"),
            load_from_cache_file=not overwrite_cache,
            new_fingerprint=key,
            desc=f"Tokenising {split}",
        )
        lengths = tokens.with_format("numpy")[_LENGTH][:]
        if cut := int((lengths > max_length).sum()):
            said = f"{split}: {cut} of {len(lengths)} examples are cut at --max_seq_length {max_length}"
            notes.append(f"{said}; the longest has {lengths.max()} tokens.")
        encoded[split] = tokens.remove_columns(_LENGTH)
    return encoded, notes


def _tokenizer_identity(tokenizer: Any) -> str:
    """What decides the tokens: a fast tokenizer's own description, or the files that one in Python saves."""
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()  # what it did before must not show
        tokenizer.backend_tokenizer.no_padding()
        return tokenizer.backend_tokenizer.to_str()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(Path(folder).iterdir())]
    return f"{digests} emojis in words {getattr(tokenizer, 'demojizer', None) is not None}"


def _check_vocabulary(table: Dataset, tokenizer: Any, split: str) -> None:
    """A vocabulary read by the wrong tokenizer class makes words unknown, drops them or joins them up, silently."""
    texts = [text[:200] for text in table[:100]["text"]]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    kept = sum(len(tokenizer.decode(row, skip_special_tokens=True).split()) for row in ids)
    lost = sum(len(text.split()) for text in texts) - kept
    if lost > max(10, kept):
        raise UserError(
            f"The tokenizer ({type(tokenizer).__name__}) knows almost none of the words of the {split} examples.\n"
            "Its files don't fit its class: set tokenizer_class in tokenizer_config.json, or give --tokenizer_name."
        )


def token_count(table: Dataset) -> int:
    """Real tokens of a tokenised table."""
    return sum(len(row) for row in table["input_ids"])


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


def load_examples(
    task_name: str | None,
    glue_dir: str | None,
    files: dict[str, str],
    wanted: Sequence[str],
    known_labels: Sequence[str] | None = None,
    cache_dir: str | None = None,
    token: str | None = None,
    text_columns: Sequence[str] | None = None,
    label_column: str | None = None,
    named_by: str = "",
) -> Examples:
    """Load what a run needs: `wanted` of train, validation, test, of a GLUE task or from `files` and their columns.

    known_labels, named_by: as in `load_files`. Raises UserError if a wanted split is not to be had.
    """
    if task_name is None:
        own = {split: files[split] for split in wanted}
        return load_files(own, known_labels, text_columns, label_column or LABEL, named_by)
    task = TASKS[task_name]
    for split in wanted:
        if not task.splits[split]:
            raise UserError(f"{task_name} has no {split} set. It is for --do_predict with an adapter trained on mnli.")
    splits = [name for split in wanted for name in task.splits[split]]
    if glue_dir is not None:
        return load_glue_folder(glue_dir, task, splits)
    return load_glue_hub(task, splits, cache_dir, token)


def with_diagnostics(
    examples: Examples, glue_dir: str | None, cache_dir: str | None = None, token: str | None = None
) -> tuple[Examples, str]:
    """MNLI's examples with GLUE's diagnostic set (AX), which an MNLI model answers, as split `test_ax`.

    Without the set the examples are as they were, and the second value says why; otherwise that is "".
    """
    try:
        diagnostics = load_examples("ax", glue_dir, {}, ["test"], cache_dir=cache_dir, token=token)
    except UserError as e:
        return examples, str(e).splitlines()[0]
    splits = examples.splits | {"test_ax": diagnostics.splits["test"]}
    return replace(examples, splits=splits, columns=examples.columns | {"test_ax": diagnostics.columns["test"]}), ""
