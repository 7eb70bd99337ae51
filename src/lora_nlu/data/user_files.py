"""Examples from a user's own CSV, TSV and JSON lines files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_nlu.data.examples import LABEL, Examples, table_with_fingerprint
from lora_nlu.data.user_labels import check_leak, class_names, label_id, label_values, notes_on_spelling
from lora_nlu.data.user_rows import Row, read_rows
from lora_nlu.errors import UserError

_PAIRS = [("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence")]
_PAIRS += [("text", "text_pair")]
_ROW_NUMBERS = {"idx", "id", "index", ""}


def load_files(
    files: dict[str, str],
    expected_labels: Sequence[str] | None,
    text_columns: Sequence[str] | None = None,
    label_column: str = LABEL,
    expected_by: str = "",
) -> Examples:
    """Read a user's own train, validation and test files (CSV, TSV, JSON lines).

    files:           by split.
    expected_labels: class names in id order, of a trained head or of --labels; () for a regression. None: the sorted
                     labels of the training file, or of the validation file without one.
    text_columns:    one or two; without them a pair of usual names, or the one column beside the label and row numbers.
    label_column:    class names or integers (classification) or other numbers (regression).
    expected_by:     what gives `expected_labels`, for messages: --labels, or the file of the head.

    Raises UserError naming file and line.
    """
    rows: dict[str, list[Row]] = {}
    digests, texts = {}, tuple(text_columns or ())
    for split, file in files.items():
        rows[split], digests[split] = read_rows(Path(file))
        if not texts:  # the first file decides which columns, and in which order
            if split != "test":
                _check_columns(rows[split][:1], (), label_column)
            texts = _find_text_columns(file, rows[split][0], label_column)
        _check_columns(rows[split], texts, None if split == "test" else label_column)
    labels = {split: label_values(rows[split], label_column) for split in rows if split != "test"}
    names = class_names(files, labels, label_column, expected_labels, expected_by)
    if expected_labels is None:
        expected_by = files.get("train") or files["validation"]
    ids, notes = {name: i for i, name in enumerate(names)}, []
    tables, columns, unread = {}, {}, {}
    for split, file in files.items():
        columns[split] = texts
        table: dict[str, list[Any]] = {}
        for name, column in zip(("text", "text_pair"), texts, strict=False):
            table[name] = [row.fields[column] for row in rows[split]]
        if split in labels:
            columns[split] = (*texts, label_column)
            if ids:
                check_leak(file, rows[split], texts, labels[split])
                notes += notes_on_spelling(file, list(map(str, labels[split])), ids)
            table[LABEL] = [
                label_id(value, ids, row.place, expected_by or "the expected labels")
                for value, row in zip(labels[split], rows[split], strict=True)
            ]
            if not ids and len(rows[split]) > 1 and len({*table[LABEL]}) == 1:
                raise UserError(
                    f"{file}: every label in column {label_column!r} is {table[LABEL][0]:g}; there is nothing to "
                    "learn, and no correlation to measure.\nName the column of the labels: --label_column."
                )
        elif label_column in rows[split][0].fields and label_column not in texts:
            unread[split] = label_column
        suffix = Path(file).suffix  # the same bytes are different examples in CSV and in TSV
        tables[split] = table_with_fingerprint(table, f"{split} {names} {columns[split]} {suffix} {digests[split]}")
    return Examples(tables, names, columns, unread=unread, notes=tuple(notes))


def _find_text_columns(file: str, row: Row, label_column: str) -> tuple[str, ...]:
    """The one or two columns to read: the one pair of usual names, or the one column beside label and row numbers."""
    candidates = tuple(c for c in row.fields if c != label_column and c.lower() not in _ROW_NUMBERS)
    pairs = [pair for pair in _PAIRS if {*pair} <= {*candidates}]
    if len(pairs) == 1:
        return pairs[0]
    if not pairs and len(candidates) == 1:
        return candidates
    raise UserError(
        f"{file}: found columns {', '.join(row.fields)}; which hold the text?\n"
        "Name one, or two for pairs: --text_columns a or --text_columns a,b. "
        f"The labels are read from {label_column!r} (--label_column)."
    )


def _check_columns(rows: Sequence[Row], texts: Sequence[str], label_column: str | None) -> None:
    """Every row must have the columns that are read, and strings for texts. Raises UserError naming file and line."""
    for row in rows:
        if label_column is not None and label_column not in row.fields:
            raise UserError(
                f"{row.place}: no column {label_column!r} among {', '.join(row.fields)}.\n"
                "Name the column of the labels: --label_column."
            )
        if missing := [column for column in texts if column not in row.fields]:
            raise UserError(
                f"{row.place}: no column {', '.join(map(repr, missing))} among {', '.join(row.fields)}.\n"
                f"In all files the text is read from {', '.join(texts)} (--text_columns)."
            )
        if wrong := [column for column in texts if not isinstance(row.fields[column], str)]:
            raise UserError(f"{row.place}: {wrong[0]!r} is {row.fields[wrong[0]]!r}; it must be a string.")
