"""An adapter's classification head in a model: its rows in the order of the labels, or left out for other labels."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_nlu.adapters.adapter import Adapter
from lora_nlu.errors import UserError
from lora_nlu.files import RUN_METADATA
from lora_nlu.labels import (
    check_labels,
    label_list,
    last_head_layer,
    match_head_rows,
    placeholder_labels,
    recorded_labels,
)
from lora_nlu.models.loading import head_names


def with_labels(adapter: Adapter, labels: Sequence[str] | None) -> Adapter:
    """The adapter with these label names recorded, if any."""
    return adapter if labels is None else replace(adapter, metadata=adapter.metadata | {"labels": [*labels]})


def head_rows(adapter: Adapter, labels: Sequence[str]) -> list[int] | None:
    """For each of `labels` the row of an adapter's head that predicts it; None if it has no head for them."""
    if adapter.label_count is None:
        return None
    return match_head_rows(adapter.source, adapter.label_count, adapter.labels, labels)[0]


class LoadableState(NamedTuple):
    """An adapter's tensors as a model takes them.

    state:          all tensors to copy, rows of the head in the order of the model's labels.
    required_head:  names of the head's parameters that must be among them.
    left_out:       names of the classifier's tensors, if the classifier is for other labels.
    notes:          lines to print.
    """

    state: dict[str, Tensor]
    required_head: list[str]
    left_out: list[str]
    notes: list[str]


def loadable_state(
    model: Any, adapter: Adapter, allow_new_head: bool, labels: Sequence[str] | None = None
) -> LoadableState:
    """An adapter's tensors without those of the head that the model doesn't take.

    labels: those that the model is to predict; None for those that its config records. Raises UserError for a head
    that doesn't fit, without `allow_new_head`.
    """
    head = head_names(model)
    state, left_out, notes = _order_head(model, adapter, labels, allow_new_head)
    from_model, note = _head_without_pooler(model, adapter, allow_new_head)
    for name in from_model:
        state.pop(name, None)
    if note:
        notes = [note] if any(name.startswith("classifier.") for name in from_model) else [*notes, note]
    if allow_new_head and not any(name in state for name in head):
        return LoadableState(state, [], left_out, notes)
    return LoadableState(state, [name for name in head if name not in (*left_out, *from_model)], left_out, notes)


def _order_head(
    model: Any, adapter: Adapter, labels: Sequence[str] | None, allow_new_head: bool
) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """An adapter's tensors, its head's rows in the order of the labels; names left out and lines to print."""
    source, state, count, n = adapter.source, dict(adapter.state), adapter.label_count, model.config.num_labels
    if count is None:
        return state, [], []
    trained, expected = adapter.labels, recorded_labels(model.config) if labels is None else tuple(labels)
    if trained is not None and count != (len(trained) or 1):
        raise UserError(
            f"{source}: its head has {count} outputs, but {RUN_METADATA} names {label_list(trained)}: not the same run."
        )
    if not allow_new_head and count != n:
        raise UserError(f"{source}: its head has {count} labels, this task {n}: another task's adapter.")
    if expected is None:  # rows by position
        rows, note = match_head_rows(source, count, None, placeholder_labels(n))
    else:
        if not allow_new_head:
            check_labels(source, trained, expected)
        rows, note = match_head_rows(source, count, trained, expected)
    if rows is None:
        left_out = [name for name in head_names(model) if name in state and name.startswith("classifier.")]
        return {name: tensor for name, tensor in state.items() if name not in left_out}, left_out, [note]
    for name, tensor in adapter.state.items():
        if name.rpartition(".")[0] == last_head_layer(state) and len(torch.atleast_1d(tensor)) == count:
            state[name] = tensor[rows]
    return state, [], [note] if note and expected is not None else []


def _head_without_pooler(model: Any, adapter: Adapter, allow_new_head: bool) -> tuple[list[str], str]:
    """Names of the head's parameters that stay the model's own, and a line to print: PEFT saves no pooler by default.

    A DeBERTa's classifier needs the pooler that it was trained on: the base checkpoint's, or one that PEFT drew at
    random and did not save. Raises UserError for a lost one, without `allow_new_head`.
    """
    head = head_names(model)
    pooler = [name for name in head if name.startswith("pooler.")]
    has_head = any(name in adapter.state for name in head)
    if not pooler or not has_head or not adapter.source.is_dir() or any(name in adapter.state for name in pooler):
        return [], ""
    if all(getattr(model.get_parameter(name), "_is_hf_initialized", False) for name in pooler):  # it was in a file
        return pooler, f"{adapter.source}: contains no pooler; its classifier uses the base checkpoint's, as in PEFT."
    lost = f"{adapter.source}: its classifier was trained on a pooler that PEFT drew at random and did not save"
    if allow_new_head:
        return head, f"{lost}; a new head is initialised."
    raise UserError(
        f"{lost}, and the base model has none.\nGive the fine-tuned model it was trained from, or train it again in "
        'PEFT with modules_to_save=["classifier", "pooler"].\nTraining (--do_train) can start from it, with a new head.'
    )
