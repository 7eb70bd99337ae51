"""Examples from a user's own CSV, TSV and JSON lines files."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import pyarrow as pa
from datasets import Dataset

from lora_nlu.data.cache import cached_file, cached_table, key_digest, record_batches
from lora_nlu.data.examples import LABEL, Examples
from lora_nlu.data.user_labels import (
    LABEL_JSON,
    LINE,
    Labels,
    check_leak,
    class_names,
    label_ids,
    label_json,
    notes_on_labels,
    read_labels,
)
from lora_nlu.data.user_rows import check_row, find_text_columns, read_rows
from lora_nlu.errors import UserError

_TEXTS = ("text", "text_pair")
_VERSION = 2  # of the tables of parsed files


def load_files(
    files: Mapping[str, str],
    expected_labels: Sequence[str] | None,
    text_columns: Sequence[str] | None = None,
    label_column: str = LABEL,
    expected_by: str = "",
    limits: Mapping[str, int | None] | None = None,
    cache_dir: str | None = None,
    overwrite_cache: bool = False,
) -> Examples:
    """Read a user's own train, validation and test files (CSV, TSV, JSON lines).

    files:           by split.
    expected_labels: class names in id order, of a trained head or of --labels; () for a regression. None: the sorted
                     labels of the training file, or of the validation file without one.
    text_columns:    one or two; without them a pair of usual names, or the one column beside the label and row numbers.
    label_column:    class names or integers (classification) or other numbers (regression).
    expected_by:     what gives `expected_labels`, for messages: --labels, or the file of the head.
    limits:          by split, the number of rows that are read of its file; the file that names the classes, and one
                     whose first rows all have one label, is read to its end all the same.
    cache_dir, overwrite_cache: as in `cached_table`, for the parsed files.

    Raises UserError naming file and line.
    """
    texts, digests = tuple(text_columns or ()), {}
    tables: dict[str, Dataset] = {}
    labels: dict[str, Labels] = {}
    rows: dict[str, int | None] = {}
    columns, unread = {}, {}
    for split, file in files.items():
        path, label = Path(file), None if split == "test" else label_column
        first = next(read_rows(path))
        if not texts:  # the first file decides which columns, and in which order
            check_row(path, first, (), label)
            texts = find_text_columns(file, first, label_column, is_labelled=True)
        columns[split] = (*texts, label) if label else texts
        if not label and label_column in first.fields and label_column not in texts:
            unread[split] = label_column
        names_classes = label and expected_labels is None and not labels
        limit = None if names_classes else (limits or {}).get(split)
        cached = partial(cached_table, f"{split}_rows", cache_dir=cache_dir, overwrite=overwrite_cache)
        tables[split], digests[split], is_complete = _parse(path, texts, label, limit, cached)
        if not is_complete:
            rows[split] = None
        if label:
            labels[split] = read_labels(file, tables[split])
    names = class_names(labels, label_column, expected_labels, expected_by)
    if expected_labels is None:
        expected_by = files.get("train") or files["validation"]
    ids, notes, ids_of_rows = {name: i for i, name in enumerate(names)}, [], {}
    for split, of_file in labels.items():
        if ids:
            check_leak(of_file, {text: _values(tables[split], name) for text, name in zip(texts, _TEXTS, strict=False)})
            notes += notes_on_labels(of_file, ids, names_are_new=expected_labels is None)
        ids_of_rows[split] = label_ids(of_file, ids, expected_by or "the expected labels")
        if not ids and len({*of_file.values}) == 1 < len(of_file.codes):
            raise UserError(
                f"{of_file.path}: every label in column {label_column!r} is {ids_of_rows[split][0]:g}; there is "
                "nothing to learn, and no correlation to measure.\nName the column of the labels: --label_column."
            )
    for split, file in files.items():
        suffix = Path(file).suffix.lower()  # the same bytes are different examples in CSV and in TSV
        fingerprint = key_digest(f"{split} {names} {columns[split]} {suffix} {digests[split]}")
        table = tables[split].select_columns([*_TEXTS[: len(texts)]])
        if split in labels:
            table = table.add_column(LABEL, ids_of_rows[split], new_fingerprint=fingerprint)
        table._fingerprint = fingerprint
        tables[split] = table
    return Examples(tables, names, columns, rows, unread, tuple(notes))


def _parse(
    path: Path, texts: Sequence[str], label_column: str | None, limit: int | None, cached: Callable[..., Dataset]
) -> tuple[Dataset, str, bool]:
    """The columns that are read of a file, a digest of what was read of it, and whether that is all of it.

    limit: as in `load_files`; cached: `cached_table` without key and batches.
    """
    settings = f"{_VERSION} {path.suffix.lower()} {[*texts]} {label_column}"
    if limit:
        first, count = hashlib.sha256(), 0
        for batch in _batches(path, texts, label_column, limit + 1):
            first.update(batch.serialize())
            count += len(batch)
        if count > limit:
            key = f"{settings} {limit} {first.hexdigest()}"
            table = cached(key, partial(_batches, path, texts, label_column, limit))
            if label_column is None or len(table.unique(LABEL_JSON)) > 1:
                return table, first.hexdigest(), False
    return *cached_file(path, settings, partial(_batches, path, texts, label_column), cached), True


def _batches(
    path: Path, texts: Sequence[str], label_column: str | None, limit: int | None = None
) -> Iterator[pa.RecordBatch]:
    """The texts, label and line of each row of a file, or of the first `limit`. Raises UserError for a wrong row."""
    types = dict.fromkeys(_TEXTS[: len(texts)], pa.string())
    types |= ({LABEL_JSON: pa.string()} if label_column else {}) | {LINE: pa.int64()}
    return record_batches(islice(_fields(path, texts, label_column), limit), types)


def _fields(path: Path, texts: Sequence[str], label_column: str | None) -> Iterator[tuple]:
    """Of each row the texts, the label as JSON if it is read, and the line."""
    for row in read_rows(path):
        check_row(path, row, texts, label_column)
        label = [label_json(row.fields[label_column], f"{path}:{row.line}")] if label_column else []
        yield *(row.fields[text] for text in texts), *label, row.line


def _values(table: Dataset, column: str) -> Iterator[str]:
    for chunk in table.data.column(column).chunks:
        yield from chunk.to_pylist()
