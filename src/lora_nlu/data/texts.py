"""Texts to predict, from a file or a stream, in windows: rows that are read, and then answered, together.

This module needs neither torch nor datasets, which take memory.
"""

import codecs
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from lora_nlu.data import user_rows
from lora_nlu.data.lines import read_lines
from lora_nlu.data.user_rows import check_row, find_text_columns, read_rows
from lora_nlu.errors import UserError, printable_lines

TABLES = (".csv", ".tsv", ".json", ".jsonl")  # files with columns, also in capitals; any other is lines of text
WINDOW_ROWS, WINDOW_CHARACTERS = 256, 2**20
_CHUNK_BYTES = 2**16  # of a stream; a pipe holds as much

Row = tuple[str, ...]  # a text, or the two of a pair


class Texts:
    """The texts of a file, or of standard input.

    columns:     the names of the one or two columns with text; of lines of text only their number counts, one or two.
    empty_lines: how many were left out so far.
    """

    def __init__(
        self,
        file: Path | None,
        columns: Sequence[str] | None = None,
        trained_on: Sequence[tuple[str, ...]] = (),
        progress: bool = False,
    ) -> None:
        """Open a file; None is standard input.

        columns: those of --text_columns. trained_on: those that the adapters were trained on, by each of the names that
        they may have; the first of them that a table has are read, and without any, those that `find_text_columns`
        finds. progress: as in `read_lines`. Raises UserError.
        """
        self.file, self.empty_lines, self._progress = file, 0, progress
        self.name = "standard input" if file is None else str(file)
        if file is not None and not file.exists():
            raise UserError(f"{file}: no such file or folder.")
        self.is_table = file is not None and file.suffix.lower() in TABLES
        if file is not None and self.is_table:
            rows = read_rows(file, progress)
            first = next(rows)
            found = next((names for names in trained_on if {*names} <= {*first.fields}), None)
            self.columns = tuple(columns or found or find_text_columns(file, first, "label", is_labelled=False))
            self._rows: Iterator[Row | None] = self._of_table(file, chain([first], rows))
            return
        self.columns = tuple(columns or next(iter(trained_on), ("text",)))
        self._rows = self._of_lines(file) if file is not None and file.is_file() else self._of_stream()

    @property
    def is_terminal(self) -> bool:
        """Whether a person types them."""
        return self.file is None and sys.stdin.isatty()

    def windows(self) -> Iterator[list[Row]]:
        """Rows in their order. What was read before an error is returned first, then it is raised."""
        window: list[Row] = []
        characters = 0
        try:
            for row in self._rows:
                if row is not None:
                    window.append(row)
                    characters += sum(map(len, row))
                if window and (row is None or len(window) == WINDOW_ROWS or characters > WINDOW_CHARACTERS):
                    yield window
                    window, characters = [], 0
        except UserError:
            if window:
                yield window
            raise
        if window:
            yield window

    def _of_table(self, path: Path, rows: Iterable[user_rows.Row]) -> Iterator[Row]:
        for row in rows:
            check_row(path, row, self.columns, None)
            yield tuple(row.fields[column] for column in self.columns)

    def _of_lines(self, path: Path) -> Iterator[Row | None]:
        for number, line in enumerate(read_lines(path, "\n", self._progress), start=1):
            yield from self._of_line(line, number)

    def _of_stream(self) -> Iterator[Row | None]:
        """The rows of lines as they arrive; a None follows those that were read at once."""
        descriptor = 0 if self.file is None else os.open(self.file, os.O_RDONLY)
        number, parts = 0, []
        while chunk := os.read(descriptor, _CHUNK_BYTES):
            parts.append(chunk)
            if b"\n" not in chunk:
                continue
            *lines, last = b"".join(parts).split(b"\n")
            parts = [last]
            for line in lines:
                number += 1
                yield from self._of_typed_line(line, number)
            yield None
        if rest := b"".join(parts):
            yield from self._of_typed_line(rest, number + 1)

    def _of_typed_line(self, line: bytes, number: int) -> Iterator[Row]:
        """As `_of_line`, from bytes. On a terminal an error is printed: the next line may be right."""
        try:
            text = line.removeprefix(codecs.BOM_UTF8 if number == 1 else b"").decode()
        except UnicodeDecodeError as e:
            raise UserError(f"{self.name}:{number}: not UTF-8 (byte {e.start} of the line).") from e
        try:
            yield from self._of_line(text, number)
        except UserError as e:
            if not self.is_terminal:
                raise
            print(printable_lines(e), file=sys.stderr)

    def _of_line(self, line: str, number: int) -> Iterator[Row]:
        """The row of a line of text; none of an empty one. Raises UserError for a pair without its tab."""
        line = line.rstrip("\r\n")
        if not line.strip():
            self.empty_lines += 1
            return
        row = tuple(line.split("\t")) if len(self.columns) == 2 else (line,)
        if len(row) != len(self.columns):
            raise UserError(
                f"{self.name}:{number}: {len(row)} texts, expected two with a tab between them, as in "
                f"{' and '.join(map(repr, self.columns))}."
            )
        yield row


def encode(
    texts: list[str], pairs: list[str] | None, tokenizer: Any, max_length: int
) -> tuple[dict[str, list[list[int]]], list[int]]:
    """input_ids and the like of texts, or of pairs, truncated to `max_length`; and their lengths before truncation."""
    ids = tokenizer(texts, pairs, truncation=True, max_length=max_length)
    lengths = [len(row) for row in ids["input_ids"]]
    if longest := [i for i, length in enumerate(lengths) if length >= max_length]:  # these may be truncated
        columns = [[column[i] for i in longest] for column in (texts, pairs) if column]
        for i, row in zip(longest, tokenizer(*columns, verbose=False)["input_ids"], strict=True):
            lengths[i] = len(row)
    return dict(ids), lengths
