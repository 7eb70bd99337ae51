"""The labels of a classification head: recorded and compared by name; its rows are put in order by name.

Names are compared without regard to case and blanks around them. () stands for a regression, None for a head without
recorded names.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from lora_nlu.errors import UserError, printable

# Controls, ends of lines, halves of characters, and what reverses the text after it; other invisible characters, such
# as joiners and the marks U+200E and U+200F, belong to the writing of some languages.
_NO_LABEL = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def check_label(place: object, label: str) -> None:
    """Raise UserError, naming the place, for a label with a character that could not be told or written as it is."""
    if found := _NO_LABEL.search(label):
        raise UserError(
            f"{place}: the label {printable(label, 40)} contains {printable(found[0])}. Remove it: control characters, "
            "ends of lines and marks that change the direction of text are not allowed in labels."
        )


def placeholder_labels(count: int) -> tuple[str, ...]:
    """The label names in a transformers config that records none."""
    return tuple(f"LABEL_{i}" for i in range(count))


def config_labels(config: Any) -> tuple[str, ...]:
    """The label names of a config, class 0 first, placeholders too; () for regression."""
    names = tuple(label for _, label in sorted(config.id2label.items()))
    return () if len(names) == 1 else names


def recorded_labels(config: Any) -> tuple[str, ...] | None:
    """The label names that a model's config records, class 0 first; () for regression, None for placeholders."""
    names = config_labels(config)
    return None if names and names == placeholder_labels(len(names)) else names


def check_label_config(name: str, config: Any) -> list[str]:
    """Lines to print on the labels in a checkpoint's config. Raises UserError if label2id contradicts id2label."""
    names = recorded_labels(config) or ()
    for i, label in enumerate(names):
        if (other := (config.label2id or {}).get(label, i)) != i:
            raise UserError(
                f"{name}: its config.json contradicts itself: id2label says that {i} is {printable(label, 40)}, "
                f"label2id that {printable(label, 40)} is {printable(other)}.\nCorrect the one that is wrong."
            )
    if config.problem_type == "multi_label_classification":
        return [f"{name}: its config says multi-label classification; scored here as single-label: one class a row."]
    return []


def set_labels(config: Any, labels: tuple[str, ...]) -> None:
    """Write label names (() for regression), and the loss that goes with them, into a config."""
    names = labels or placeholder_labels(1)
    config.id2label, config.label2id = dict(enumerate(names)), {label: i for i, label in enumerate(names)}
    config.problem_type = "single_label_classification" if labels else "regression"


def shortened_list(items: Sequence[str], limit: int = 10) -> str:
    """Items separated by commas; after the first `limit`, their number instead."""
    return ", ".join(items[:limit]) + (f" and {len(items) - limit} more" if len(items) > limit else "")


def label_list(labels: Sequence[str] | None) -> str:
    """Label names for a message."""
    if labels is None:
        return "labels without names"
    return shortened_list([printable(label, 40) for label in labels]) or "a number (regression)"


def normalised_label(label: str) -> str:
    """A label's name without blanks around it, in lower case."""
    return label.strip().casefold()


def label_number(text: str) -> float:
    """The number that a text is; Python also reads 1_0 as 10, and other digits. Raises ValueError for those."""
    if "_" in text or not text.strip().isascii():
        raise ValueError(f"{text} is no number")
    return float(text)


def rows_by_label(trained: Sequence[str], labels: Sequence[str]) -> list[int] | None:
    """For each of `labels` its place among those that a head was `trained` to predict; None if the sets differ."""
    for key in (str, normalised_label):  # exact names first, for labels that differ only in case
        places = {key(label): i for i, label in enumerate(trained)}
        rows = [places.get(key(label)) for label in labels]
        if len(places) == len(trained) == len(labels) and {*rows} == {*range(len(trained))}:
            return [row for row in rows if row is not None] or [0]  # a regression has one row
    return None


def check_labels(source: object, trained: Sequence[str] | None, labels: Sequence[str]) -> None:
    """Raise UserError if `source` records labels that it was trained to predict, and they are not the examples'."""
    if trained is not None and rows_by_label(trained, labels) is None:
        raise UserError(
            f"{source}: was trained to predict {label_list(trained)}; the examples have {label_list(labels)}."
        )


def match_head_rows(
    source: object, count: int, trained: Sequence[str] | None, labels: Sequence[str]
) -> tuple[list[int] | None, str]:
    """For each of `labels` the row of a head of `count` rows that predicts it; None if the head is for other labels.

    A head without recorded names is taken in the order of `labels`. The second value is a line to print, or "".
    """
    n, names = len(labels) or 1, label_list(labels)
    rows = list(range(n)) if trained is None else rows_by_label(trained, labels)
    if count != n or rows is None:
        is_named = trained is not None and count == (len(trained) or 1)
        predicts = f"It predicts {label_list(trained)}" if is_named else f"It has {count} outputs"
        return None, (
            f"{source}: its classifier is for other labels and is not loaded; a new one is initialised. "
            f"{predicts}; the examples have {names}."
        )
    if trained is None:
        assumed = f"{source}: records no label names; its head is assumed to predict {names}, in this order."
        return rows, f"{assumed} If that is wrong, name its classes, class 0 first: --labels." if labels else ""
    if rows != list(range(n)):
        return rows, f"{source}: its head predicts {label_list(trained)}; its rows are put in the order {names}."
    return rows, ""


def last_head_layer(names: Iterable[str]) -> str | None:
    """The name of the head's last layer, whose rows are the labels, among names of parameters; None without a head."""
    layers = ("classifier.out_proj", "classifier")  # RoBERTa's, DeBERTa's
    return next((layer for layer in layers if f"{layer}.weight" in {*names}), None)
