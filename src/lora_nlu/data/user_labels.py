"""The labels of a user's own files: their values, the classes that they are, their ids."""

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset

from lora_nlu.errors import UserError, printable
from lora_nlu.labels import check_label, label_list, label_number, normalised_label

LABEL_JSON, LINE = "label_json", "line"  # columns of the table of a parsed file
# What other programs write where there is no label
_MISSING = ("nan", "none", "null", "na", "n/a")


@dataclass(frozen=True)
class Labels:
    """The labels of a file: its different `values`, and the index among them of each row's label.

    values: in the order of the rows in which they first occur; class names, or floats if every one is a number and not
    every one an integer.
    """

    path: str
    values: list[str] | list[float]
    codes: np.ndarray  # [rows]
    lines: Any  # [rows], of the file; an Arrow array

    def place(self, i: int) -> str:
        """File and line of the first row whose label is `values[i]`."""
        return f"{self.path}:{self.lines[int(np.argmax(self.codes == i))]}"

    @property
    def names(self) -> list[str]:
        return [str(value) for value in self.values]

    @property
    def are_numbers(self) -> bool:
        return isinstance(self.values[0], float)


def label_json(value: Any, place: str) -> str:
    """The label of one row as JSON. Raises UserError for one that is missing, or neither a string nor a number."""
    if isinstance(value, bool):
        value = str(value).lower()
    if value is None or (isinstance(value, float) and not math.isfinite(value)) or not str(value).strip():
        raise UserError(f"{place}: the label is {value!r:.40}. Give every example one.")
    if not isinstance(value, (str, int, float)):
        raise UserError(f"{place}: the label is a {type(value).__name__}; it must be a string or a number.")
    check_label(place, str(value))
    return json.dumps(value)


def read_labels(path: str, table: Dataset) -> Labels:
    """The labels of a parsed file. Raises UserError for numbers that are not finite."""
    encoded = table.data.column(LABEL_JSON).dictionary_encode().combine_chunks()
    values = [json.loads(text) for text in encoded.dictionary.to_pylist()]
    codes, lines = encoded.indices.to_numpy(), table.data.column(LINE)
    names = [*dict.fromkeys(map(str, values))]
    if len(names) < len(values):  # 1 and "1"
        codes = np.array([names.index(str(value)) for value in values])[codes]
    if all(_is_integer(value) for value in values) or {*map(type, values)} == {int, str}:
        return Labels(path, names, codes, lines)
    try:
        numbers = [label_number(name) for name in names]
    except ValueError:
        return Labels(path, names, codes, lines)
    labels = Labels(path, numbers, codes, lines)
    for i, number in enumerate(numbers):
        if not math.isfinite(number):
            raise UserError(f"{labels.place(i)}: the label is {names[i][:40]!r}, which is not finite.")
    return labels


def _is_integer(value: Any) -> bool:
    try:
        label_number(str(value))
        int(value)
    except ValueError:
        return False
    return not isinstance(value, float)


def class_names(
    labels: Mapping[str, Labels], column: str, expected: Sequence[str] | None, expected_by: str
) -> tuple[str, ...]:
    """The names of the classes in id order; () for a regression.

    Those expected; without them the sorted labels of the training file, or of the validation file if there is no other.
    labels: of the splits that have some, in `column`; expected, expected_by: as in `load_files`.
    Raises UserError for labels that are no classes to learn.
    """
    if expected is None and not labels:
        raise UserError("The labels are unknown: give --train_file, or --lora_path with an adapter that records them.")
    first = labels.get("train") or labels.get("validation")
    if expected and expected_by == "--labels" and first and first.are_numbers:
        raise UserError(
            f"{first.path}: the labels in column {column!r} are numbers, and a regression has no label names. "
            "Leave --labels out."
        )
    accepted: Collection[str] = expected or ()
    for of_file in labels.values():
        if expected != () and not of_file.are_numbers:
            _check_repeated(of_file, column, accepted)
        if expected is None:  # the training file's labels, which were checked first
            accepted = accepted or {*of_file.names}
    classes = tuple(expected or ())
    if expected is None and first and not first.are_numbers:
        classes = tuple(sorted(first.names, key=_label_order))
    if classes and first and len(first.values) == 1 and ("train" in labels or expected is None):
        raise UserError(f"{first.path}: every label is {first.names[0][:80]!r}; nothing to learn.")
    return classes


def _check_repeated(labels: Labels, column: str, accepted: Collection[str]) -> None:
    """A column with about as many labels as rows holds no labels, unless all are accepted names. Raises UserError."""
    names, rows = labels.names, len(labels.codes)
    are_accepted = bool(accepted) and all(_matching_name(name, accepted) is not None for name in names)
    if rows >= 10 and 2 * len(names) > rows and not are_accepted:
        raise UserError(
            f"{labels.path}: column {column!r} has {len(names)} different labels in {rows} rows "
            f"({label_list(names[:2])}, ...): nearly every row would be its own class.\n"
            "Name the column of the labels with --label_column, those of the text with --text_columns.\n"
            "Numbers of a regression need a decimal point (3.0); so many classes are named with --labels."
        )


def _matching_name(label: str, names: Collection[str]) -> str | None:
    """The class that a label of a file means: the same name, or the only one that differs just in blanks or case."""
    if label in names:
        return label
    near = [name for name in names if normalised_label(name) == normalised_label(label)]
    return near[0] if len(near) == 1 else None


def _label_order(name: str) -> tuple[int, int, str]:
    """Numbers by value, transformers' LABEL_0, LABEL_1, ... by number, other names by letters."""
    if _is_integer(name):
        return 0, int(name), name
    number = name.removeprefix("LABEL_")
    return (1, int(number), name) if number != name and _is_integer(number) else (2, 0, name)


def check_leak(labels: Labels, texts: Mapping[str, Iterable[str]]) -> None:
    """A text column with one value for each label is the label in other words. Raises UserError naming it.

    texts: the values of each column of text, by its name in the file.
    """
    if len(labels.values) < 2 or len(labels.codes) < 3 * len(labels.values):
        return
    for column, values in texts.items():
        text_of: dict[int, str] = {}
        repeats = all(text_of.setdefault(code, text) == text for code, text in zip(labels.codes, values, strict=False))
        if repeats and len({*text_of.values()}) == len(text_of):
            pairs = sorted((labels.values[code], text) for code, text in text_of.items())
            shown = "; ".join(f"{text[:40]!r} for {printable(label, 40)}" for label, text in pairs[:3])
            raise UserError(
                f"{labels.path}: column {column!r} has one value for each label ({shown}): it repeats the label.\n"
                "Name the columns of the text: --text_columns."
            )


def label_ids(labels: Labels, ids: Mapping[str, int], expected_by: str) -> np.ndarray:
    """The class ids of the rows, or their numbers in a regression (no ids). Raises UserError for other labels."""
    numbers: list[float] = []
    for i, name in enumerate(labels.names):
        if ids:
            if (known := _matching_name(name, ids)) is None:
                raise UserError(
                    f"{labels.place(i)}: label {name[:80]!r} is not among those of {expected_by}: {label_list([*ids])}."
                )
            numbers.append(ids[known])
            continue
        try:
            numbers.append(label_number(name))
        except ValueError as e:
            raise UserError(
                f"{labels.place(i)}: label {name[:80]!r} is not a number; those of {expected_by} are, and this is a "
                "regression."
            ) from e
        if not math.isfinite(numbers[-1]):
            raise UserError(f"{labels.place(i)}: the label is {name[:40]!r}, which is not finite.")
    return np.array(numbers, dtype=np.int64 if ids else np.float64)[labels.codes]


def notes_on_labels(labels: Labels, ids: Mapping[str, int], names_are_new: bool) -> list[str]:
    """Lines on labels that are read as a class of slightly different name, and on classes that are probably none.

    names_are_new: the class names are those of the files, not of --labels or of a trained head.
    """
    counts, lines = np.bincount(labels.codes), []
    classes_by_meaning: dict[object, list[int]] = {}
    for i, label in enumerate(labels.names):
        if label in ids:
            classes_by_meaning.setdefault(_meaning(label), []).append(i)
            if names_are_new and normalised_label(label) in _MISSING:
                remedy = "If it means that the label is missing, remove these rows."
                lines.append(f"{labels.path}: {label!r} is a class ({counts[i]} rows). {remedy}")
        elif (name := _matching_name(label, ids)) is not None:
            lines.append(f"{labels.path}: label {label!r} ({counts[i]} rows) is read as {name!r}.")
    for meaning, classes in classes_by_meaning.items():
        if len(classes) > 1:
            is_name = isinstance(meaning, str)
            difference = "differ only in blanks or case" if is_name else "are the same number in different notations"
            shown = ", ".join(f"{labels.names[i]!r} ({counts[i]} rows)" for i in classes)
            lines.append(f"{labels.path}: these labels {difference} and count as different classes: {shown}.")
    return lines


def _meaning(label: str) -> object:
    """What is equal for labels that mean the same: 01, +1 and 1; Yes and yes."""
    try:
        return int(label) if _is_integer(label) else label_number(label)
    except ValueError:
        return normalised_label(label)
