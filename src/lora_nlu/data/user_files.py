"""Examples from the Hub, from the standard GLUE folders, or from a person's own CSV, TSV and JSON lines, tokenised.

Every source becomes the same table: `text`, `text_pair` for pairs, `label` (a class id, or a float for regression).
"""

import csv
import hashlib
import io
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_nlu.data.examples import LABEL, Examples, decode, read_file, table_from_columns
from lora_nlu.errors import UserError
from lora_nlu.labels import label_list, normalised_label

_PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text", "text_pair"),
)
_ROW_NUMBERS = {"idx", "id", "index", ""}


@dataclass(frozen=True)
class _Row:
    """One line of a file of one's own: fields by column, and where it stands, for errors."""

    fields: dict[str, Any]
    where: str


# ----------------------------------------------------------------------------------------------- files of one's own


def _own_rows(path: Path, content: bytes) -> list[_Row]:
    text = decode(path, content)
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
        f"{path}: column {column!r} has {len(names)} different labels in {len(labels)} rows ({label_list(names[:2])}, "
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
        content = read_file(path)
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
        tables[split] = table_from_columns(table, f"{split} {names} {columns[split]} {suffix} {digests[split]}")
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
        return normalised_label(label)


def _known_as(label: str, ids: dict[str, int]) -> str | None:
    """The known name that a label of a file means: itself, or the only one that differs in blanks or case alone."""
    if label in ids:
        return label
    near = [name for name in ids if normalised_label(name) == normalised_label(label)]
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
            raise UserError(f"{where}: label {str(value)[:80]!r} is not among those of {origin}: {label_list([*ids])}.")
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
