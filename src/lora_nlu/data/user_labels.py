"""The labels of a user's own files: their values, the classes that they are, their ids."""

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lora_nlu.data.user_rows import Row
from lora_nlu.errors import UserError
from lora_nlu.labels import label_list, normalised_label


def label_values(rows: Sequence[Row], column: str) -> list[str] | list[float]:
    """Labels as class names (strings), or as floats if every one is a number and not every one an integer."""
    values = []
    for row in rows:
        value = row.fields[column]
        if isinstance(value, bool):
            value = str(value).lower()
        is_empty = value is None or (isinstance(value, float) and not math.isfinite(value))
        if is_empty or str(value).strip().lower() in ("", "nan"):
            raise UserError(f"{row.place}: the label is {value!r}. Give every example one.")
        if not isinstance(value, (str, int, float)):
            raise UserError(f"{row.place}: the label is a {type(value).__name__}; it must be a string or a number.")
        values.append(value)
    names = [str(value) for value in values]
    if all(_is_integer(value) for value in values) or {*map(type, values)} == {int, str}:
        return names
    try:
        numbers = [float(name) for name in names]
    except ValueError:
        return names
    if wrong := [row for row, number in zip(rows, numbers, strict=True) if not math.isfinite(number)]:
        raise UserError(f"{wrong[0].place}: the label is {wrong[0].fields[column]!r}, which is not finite.")
    return numbers


def _is_integer(value: Any) -> bool:
    try:
        int(value)
    except ValueError:
        return False
    return not isinstance(value, float)


def class_names(
    files: Mapping[str, str],
    labels: Mapping[str, list[str] | list[float]],
    column: str,
    expected: Sequence[str] | None,
    expected_by: str,
) -> tuple[str, ...]:
    """The names of the classes in id order; () for a regression.

    Those expected; without them the sorted labels of the training file, or of the validation file if there is no other.
    files: by split; labels: of the splits that have some, the values in `column`; expected, expected_by: as in
    `load_files`. Raises UserError for labels that are no classes to learn.
    """
    if expected is None and not labels:
        raise UserError("The labels are unknown: give --train_file, or --lora_path with an adapter that records them.")
    first = "train" if "train" in labels else "validation"
    values = labels.get(first, [])
    if expected and expected_by == "--labels" and values and isinstance(values[0], float):
        raise UserError(
            f"{files[first]}: the labels in column {column!r} are numbers, and a regression has no label names. "
            "Leave --labels out."
        )
    accepted: Collection[str] = expected or ()
    for split, names in labels.items():
        if expected != () and not isinstance(names[0], float):
            _check_repeated(files[split], list(map(str, names)), column, accepted)
        if expected is None:  # the training file's labels, which were checked first
            accepted = accepted or {*map(str, names)}
    classes = tuple(expected or ())
    if expected is None and not isinstance(values[0], float):
        classes = tuple(sorted({*map(str, values)}, key=_label_order))
    if classes and len({*values}) == 1 and ("train" in labels or expected is None):
        raise UserError(f"{files[first]}: every label is {str(values[0])!r}; nothing to learn.")
    return classes


def _check_repeated(path: str, labels: Sequence[str], column: str, accepted: Collection[str]) -> None:
    """A column with about as many labels as rows holds no labels, unless all are accepted names. Raises UserError."""
    names = [*dict.fromkeys(labels)]
    are_accepted = bool(accepted) and all(_matching_name(name, accepted) is not None for name in names)
    if len(labels) >= 10 and 2 * len(names) > len(labels) and not are_accepted:
        raise UserError(
            f"{path}: column {column!r} has {len(names)} different labels in {len(labels)} rows "
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


def check_leak(path: str, rows: Sequence[Row], texts: Sequence[str], labels: Sequence[Any]) -> None:
    """A text column with one value for each label is the label in other words. Raises UserError naming it."""
    names = {*labels}
    if len(names) < 2 or len(rows) < 3 * len(names):
        return
    for column in texts:
        pairs = {(label, row.fields[column]) for label, row in zip(labels, rows, strict=True)}
        if len(pairs) == len(names) == len({text for _, text in pairs}):
            shown = "; ".join(f"{text[:40]!r} for {label}" for label, text in sorted(pairs)[:3])
            raise UserError(
                f"{path}: column {column!r} has one value for each label ({shown}): it repeats the label.\n"
                "Name the columns of the text: --text_columns."
            )


def label_id(value: object, ids: dict[str, int], place: str, expected_by: str) -> int | float:
    """The id of a class, or the number of a regression (no ids). Raises UserError for a label that is neither."""
    label = f"{place}: label {str(value)[:80]!r}"
    if ids:
        if (name := _matching_name(str(value), ids)) is None:
            raise UserError(f"{label} is not among those of {expected_by}: {label_list([*ids])}.")
        return ids[name]
    try:
        number = float(str(value))
    except ValueError as e:
        raise UserError(f"{label} is not a number; those of {expected_by} are, and this is a regression.") from e
    if not math.isfinite(number):
        raise UserError(f"{place}: the label is {str(value)[:40]!r}, which is not finite.")
    return number


def notes_on_spelling(path: str, labels: Sequence[str], ids: dict[str, int]) -> list[str]:
    """Lines on labels that are read as a class of slightly different name, and on classes whose names are alike."""
    counts, lines = Counter(labels), []
    classes_by_meaning: dict[object, list[str]] = {}
    for label, count in counts.items():
        if label in ids:
            classes_by_meaning.setdefault(_meaning(label), []).append(label)
        elif (name := _matching_name(label, ids)) is not None:
            lines.append(f"{path}: label {label!r} ({count} rows) is read as {name!r}.")
    for meaning, classes in classes_by_meaning.items():
        if len(classes) > 1:
            is_name = isinstance(meaning, str)
            difference = "differ only in blanks or case" if is_name else "are the same number in different notations"
            shown = ", ".join(f"{label!r} ({counts[label]} rows)" for label in classes)
            lines.append(f"{path}: these labels {difference} and count as different classes: {shown}.")
    return lines


def _meaning(label: str) -> object:
    """What is equal for labels that mean the same: 01, +1 and 1; Yes and yes."""
    try:
        return int(label) if _is_integer(label) else float(label)
    except ValueError:
        return normalised_label(label)
