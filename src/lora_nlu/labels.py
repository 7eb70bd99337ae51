"""The labels that a classification head tells: recorded by name, compared by name, its rows put in order by name.

Names are compared stripped and case-blind; () stands for a regression, None for a head that records no names.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from lora_nlu.errors import UserError, printable


def placeholder_labels(count: int) -> tuple[str, ...]:
    """The names that transformers' configs have where nobody gave any."""
    return tuple(f"LABEL_{i}" for i in range(count))


def config_labels(config: Any) -> tuple[str, ...]:
    """Label names of a config, class 0 first, placeholders or not; () for regression."""
    names = tuple(label for _, label in sorted(config.id2label.items()))
    return () if len(names) == 1 else names


def recorded_labels(config: Any) -> tuple[str, ...] | None:
    """The label names that a model's config records, class 0 first; () for regression, None for placeholders."""
    names = config_labels(config)
    return None if names and names == placeholder_labels(len(names)) else names


def check_label_config(name: str, config: Any) -> list[str]:
    """Lines worth saying of what a checkpoint's config says of its own labels. Raises UserError if it contradicts
    itself: id2label, by which a head's rows are named, and label2id."""
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


def shortened_list(said: Sequence[str], most: int = 10) -> str:
    """With commas between them, and the first of them only where they are many."""
    return ", ".join(said[:most]) + (f" and {len(said) - most} more" if len(said) > most else "")


def label_list(labels: Sequence[str] | None) -> str:
    """Label names for a message."""
    if labels is None:
        return "labels without names"
    return shortened_list([printable(label, 40) for label in labels]) or "a number (regression)"


def normalised_label(label: str) -> str:
    """What is equal for names that differ only in case or in blanks around them."""
    return label.strip().casefold()


def rows_by_label(trained: Sequence[str], wanted: Sequence[str]) -> list[int] | None:
    """For each of the `wanted` labels its place among those a head was `trained` to tell; None if they are others."""
    for key in (str, normalised_label):  # names that only case tells apart are still told apart
        places = {key(label): i for i, label in enumerate(trained)}
        rows = [places.get(key(label)) for label in wanted]
        if len(places) == len(trained) == len(wanted) and {*rows} == {*range(len(trained))}:
            return [row for row in rows if row is not None] or [0]  # a regression has one row
    return None


def check_labels(source: object, trained: Sequence[str] | None, wanted: Sequence[str]) -> None:
    """The examples' labels must be those that `source` was trained to tell, where it says. Raises UserError."""
    if trained is not None and rows_by_label(trained, wanted) is None:
        raise UserError(
            f"{source}: was trained to predict {label_list(trained)}; the examples have {label_list(wanted)}."
        )


def match_head_rows(
    source: object, count: int, trained: Sequence[str] | None, wanted: Sequence[str]
) -> tuple[list[int] | None, str]:
    """For each of the `wanted` labels the row of a head of `count` rows that tells it, None if it is for other labels.

    Where nothing is recorded rows are taken as they stand. The second value is a line worth saying, or "".
    """
    n = len(wanted) or 1
    rows = list(range(n)) if trained is None else rows_by_label(trained, wanted)
    if count != n or rows is None:
        is_named = trained is not None and count == (len(trained) or 1)
        said = f"It predicts {label_list(trained)}" if is_named else f"It has {count} outputs"
        left = f"{source}: its classifier is for other labels and is not loaded; a new one is initialised."
        return None, f"{left} {said}; the examples have {label_list(wanted)}."
    if trained is None:
        guess = f"{source}: records no label names; its head is assumed to predict {label_list(wanted)}, in this order."
        return rows, f"{guess} If that is wrong, name its classes, class 0 first: --labels." if wanted else ""
    if rows != list(range(n)):
        return (
            rows,
            f"{source}: its head predicts {label_list(trained)}; its rows are put in the order {label_list(wanted)}.",
        )
    return rows, ""


def last_head_layer(names: Iterable[str]) -> str | None:
    """The head's last layer, whose rows are the labels, by the names of its parameters; None if it is not there."""
    layers = ("classifier.out_proj", "classifier")  # RoBERTa's, DeBERTa's
    return next((layer for layer in layers if f"{layer}.weight" in {*names}), None)
