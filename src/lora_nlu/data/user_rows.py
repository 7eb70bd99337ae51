"""The rows of a user's own CSV, TSV or JSON lines file, read one after another, each with its line for errors."""

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lora_nlu.data.lines import read_lines
from lora_nlu.errors import UserError, printable
from lora_nlu.labels import shortened_list

_PAIRS = [("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence")]
_PAIRS += [("text", "text_pair")]
_ROW_NUMBERS = {"idx", "id", "index", ""}


class Row(NamedTuple):
    """One row: its fields by column, and its last line for error messages."""

    fields: dict[str, Any]
    line: int


def read_rows(path: Path, progress: bool = True) -> Iterator[Row]:
    """The rows of a file, read as the end of its name says. Raises UserError naming file and line.

    progress: as in `read_lines`.
    """
    row, is_json = None, path.suffix.lower() in (".json", ".jsonl")
    lines = read_lines(path, "\n" if is_json else "", progress)
    for row in _json_rows(path, lines) if is_json else _csv_rows(path, lines):
        yield row
    if row is None:
        raise UserError(f"{path}: no examples, only a header.")


def column_list(names: Iterable[str]) -> str:
    """The names of columns for a message."""
    return shortened_list([printable(name) for name in names])


def find_text_columns(file: object, row: Row, label_column: str, is_labelled: bool) -> tuple[str, ...]:
    """The one or two columns to read: the one pair of usual names, or the one column beside label and row numbers.

    is_labelled: whether labels are read too, for the message. Raises UserError if several choices are possible.
    """
    candidates = tuple(c for c in row.fields if c != label_column and c.lower() not in _ROW_NUMBERS)
    pairs = [pair for pair in _PAIRS if {*pair} <= {*candidates}]
    if len(pairs) == 1:
        return pairs[0]
    if not pairs and len(candidates) == 1:
        return candidates
    raise UserError(
        f"{file}: found columns {column_list(row.fields)}; which hold the text?\n"
        "Name one, or two for pairs: --text_columns a or --text_columns a,b."
        + (f" The labels are read from {label_column!r} (--label_column)." if is_labelled else "")
    )


def check_row(path: Path, row: Row, texts: Sequence[str], label_column: str | None) -> None:
    """A row must have the columns that are read, and strings for texts. Raises UserError naming file and line."""
    if label_column is not None and label_column not in row.fields:
        raise UserError(
            f"{path}:{row.line}: no column {label_column!r} among {column_list(row.fields)}.\n"
            "Name the column of the labels: --label_column."
        )
    for column in texts:
        if column not in row.fields:
            missing = ", ".join(repr(name) for name in texts if name not in row.fields)
            raise UserError(
                f"{path}:{row.line}: no column {missing} among {column_list(row.fields)}.\n"
                f"In all files the text is read from {', '.join(texts)} (--text_columns)."
            )
        if not isinstance(row.fields[column], str):
            value = printable(repr(row.fields[column]))
            raise UserError(f"{path}:{row.line}: {column!r} is {value}; it must be a string.")


def _csv_rows(path: Path, lines: Iterable[str]) -> Iterator[Row]:
    """CSV as spreadsheets write it; TSV unquoted, as GLUE's files are. The first line names the columns."""
    csv.field_size_limit(2**31 - 1)  # the reader's own limit is 131,072 characters a cell
    tabs = path.suffix.lower() == ".tsv"
    options: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"strict": True}
    reader = csv.reader(lines, **options)
    try:
        header = next(reader)
        if len(set(header)) != len(header):
            raise UserError(f"{path}:1: two columns have the same name: {column_list(header)}.")
        remedy = _other_separator(path, header)
        if remedy and len(header) == 1:
            raise UserError(f"{path}:1: the header is one column, {header[0][:80]!r}.{remedy}")
        for fields in reader:
            if not fields:
                continue
            if len(fields) != len(header):
                found = f"{len(fields)} columns, the header has {len(header)}"
                raise UserError(f"{path}:{reader.line_num}: {found}.{remedy}")
            yield Row(dict(zip(header, fields, strict=True)), reader.line_num)
    except csv.Error as e:
        raise UserError(f"{path}:{reader.line_num}: {e}: a broken or cut line.") from e


def _other_separator(path: Path, header: Sequence[str]) -> str:
    """What to do about a header that seems to use another separator than the file's kind; "" if it doesn't."""
    names = {"\t": "tabs", ";": "semicolons", ",": "commas", "|": "bars"}
    right = "\t" if path.suffix.lower() == ".tsv" else ","
    found = next((mark for mark in names if mark != right and any(mark in column for column in header)), None)
    if found is None:
        return ""
    rename = {"\t": ", or name it .tsv", ",": ", or name it .csv"}.get(found, "")
    return (
        f"\nA {path.suffix} file separates columns by {names[right]}, this one by {names[found]}. "
        f"Save it with {names[right]}{rename}."
    )


def _json_rows(path: Path, lines: Iterable[str]) -> Iterator[Row]:
    """JSON lines: one object a line."""
    for number, line in enumerate(lines, start=1):
        line = line.removesuffix("\n")
        if not line.strip():
            continue
        try:
            fields = json.loads(line, object_pairs_hook=_without_duplicates)
            if "\\u" in line:  # half a surrogate pair, which no table can hold, fails here
                json.dumps(fields, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as e:
            raise UserError(f"{path}:{number}: not a JSON object ({e}). The file needs one object a line.") from e
        except KeyError as e:
            raise UserError(f"{path}:{number}: the key {e} occurs twice in one object.") from e
        if not isinstance(fields, dict):
            raise UserError(f"{path}:{number}: a JSON {type(fields).__name__}; the file needs one object a line.")
        yield Row(fields, number)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises KeyError for a key that occurs twice, of which json would keep the last."""
    fields: dict[str, Any] = {}
    for key, value in pairs:
        if key in fields:
            raise KeyError(key[:80])
        fields[key] = value
    return fields
