"""An adapter put into a model: its layers are made, its tensors checked and copied, its head matched by labels."""

import math
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_nlu.adapters.adapter import Adapter, encoder_prefix, layer_count, relative_query_error, target_layers
from lora_nlu.errors import UserError, printable
from lora_nlu.files import RUN_METADATA
from lora_nlu.labels import check_labels, config_labels, label_list, last_head_layer, match_head_rows, recorded_labels
from lora_nlu.methods.description import methods_in, same_relative_query
from lora_nlu.methods.linear import check_not_quantised, unmerge_lora_
from lora_nlu.methods.marking import mark_trainable
from lora_nlu.models.loading import base_fingerprint, encoder_prefix_in, head_names
from lora_nlu.ops.sharding import copy_into
from lora_nlu.ops.tensors import is_loaded


def attach_adapter(
    model: Any, adapter: Adapter, lora_alpha: float | None, allow_new_head: bool, labels: Sequence[str] | None = None
) -> list[str]:
    """Add the layers of an adapter of any method to a model, load its tensors and mark what trains.

    lora_alpha:      for a LoRA file that doesn't record it.
    allow_new_head:  as in `load_adapter`.
    labels:          in id order, for a model whose config doesn't record what it is to predict.

    The tensors of the file train, with the parameters of the method and the head. In a DeBERTa, LoRA is on the relative
    query as the adapter was trained. Returns lines to print. Errors as in `load_adapter`, but layers that were added
    stay; ValueError for a model with quantised layers.
    """
    check_not_quantised(model)
    _check_model_type(model, adapter)
    unmerge_lora_(model)
    layers = adapter.layers(lora_alpha) if adapter.row.has_ranks else {}
    if layers:
        _check_layers(model, adapter)
    if adapter.row.rebuild:
        adapter.row.rebuild(model, adapter, lora_alpha)
    else:
        for name, value in adapter.row.chosen_by.items():
            setattr(model.config, name, value)
    if adapter.row.start:
        adapter.row.start(model)
    state, head_notes = _check_fit(model, adapter, allow_new_head, labels)
    notes = _check_base_model(model, adapter)
    if adapter.base_weights and base_holds_update(model, adapter, layers):
        notes.append(f"{adapter.source}: its base weights contain the update (merged, then saved); it counts once.")
    _copy_into(model, adapter, state)
    mark_trainable(model)
    for name in adapter.state:
        if adapter.trains(name):
            model.get_parameter(name).requires_grad_(True)
    return notes + head_notes


def _check_model_type(model: Any, adapter: Adapter) -> None:
    """Raise UserError for an adapter of another type of model, by its record or the names of its tensors."""
    prefix, model_type = encoder_prefix(adapter), model.config.model_type
    trained = adapter.metadata.get("model_type") or model_type
    if prefix and prefix != model.base_model_prefix:
        trained = {"deberta": "deberta-v2"}.get(prefix, prefix)
    if trained != model_type:
        base = adapter.metadata.get("base_model")
        named = f" ({printable(base, 300)})" if base else ""
        raise UserError(
            f"{adapter.source}: was trained on a {printable(trained)} model{named}; the given one is a {model_type} "
            "model.\nGive the adapter's own base model."
        )


def load_adapter(model: Any, adapter: Adapter, allow_new_head: bool) -> list[str]:
    """Copy an adapter into a model that has its layers; the model must have every tensor, and the file every parameter.

    Rows of the head are matched by label name where the adapter and the model's config record names. The one exception,
    with `allow_new_head` (training starts from another task's adapter): a `classifier` for other labels, or another
    number of them, is left out, and the model's own stays, as in the reference implementation for another number. That
    is RoBERTa's complete head; DeBERTa gets the `pooler` that was trained with it. A merged model is unmerged first.
    Returns lines to print. Raises UserError naming key and shapes; the model is then unchanged.
    """
    state, notes = _check_fit(model, adapter, allow_new_head)
    unmerge_lora_(model)
    _copy_into(model, adapter, state)
    return notes


def _copy_into(model: Any, adapter: Adapter, state: dict[str, Tensor]) -> None:
    """Copy parameters by name, and what the adapter's layers read beside them. Raises UserError as `load_frozen`."""
    if adapter.row.load_frozen:
        adapter.row.load_frozen(model, adapter)
    copy_into(model, state)


def _check_layers(model: Any, adapter: Adapter) -> None:
    """Raise UserError unless the layers with an update are the linear layers of the model that its targets mean."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    targets = target_layers(adapter, [name for name in linear if name.startswith(encoder_prefix_in(model))])
    missing = [f"{name}.{adapter.row.rank_of}" for name in targets if name not in adapter.ranks]
    unexpected = [f"{name}.{adapter.row.rank_of}" for name in adapter.ranks if name not in linear]
    if missing or unexpected:
        raise _other_model(adapter, model, missing, unexpected)


def _check_fit(
    model: Any, adapter: Adapter, allow_new_head: bool, labels: Sequence[str] | None = None
) -> tuple[dict[str, Tensor], list[str]]:
    """What to copy into a model that has the adapter's layers, rows of the head in the order of its labels, without
    those of the head that the model doesn't take; lines to print.

    labels: those that the model is to predict; None for those that its config records. Raises UserError if the adapter
    doesn't fit.
    """
    state, left_out, notes = _order_head(model, adapter, labels, allow_new_head)
    of_model, note = _head_without_pooler(model, adapter, allow_new_head)
    state = {name: tensor for name, tensor in state.items() if name not in of_model}
    if note:
        notes = [note] if any(name.startswith("classifier.") for name in of_model) else [*notes, note]
    parameters, head, pattern = dict(model.named_parameters()), head_names(model), adapter.row.state
    required = [name for name in parameters if pattern and re.search(pattern, name) and name not in head]
    # A folder may contain trained biases and complete modules too; a published file never does.
    allows_more = adapter.source.is_dir() and adapter.row.added is not None
    optional = {*parameters} - {*required} if allows_more else set()
    if not allow_new_head or any(name in state for name in head):
        required += [name for name in head if name not in (*left_out, *of_model)]
    if adapter.row.has_ranks:  # of another variant in the model, such as DoRA's lengths, which a LoRA lacks
        added = [row.added for row in methods_in(model) if row.has_ranks]
        of_variant = [name for name in parameters if any(re.search(str(pattern), name) for pattern in added)]
        required += [name for name in of_variant if not re.search(str(adapter.row.added), name)]
    missing = [name for name in required if name not in state]
    unexpected = [name for name in state if name not in required and name not in optional]
    if missing or unexpected:
        raise _other_model(adapter, model, missing, unexpected)
    if adapter.row.has_ranks:
        _check_updates(model, adapter)
    for name, tensor in state.items():
        in_file, in_model = list(tensor.shape), list(parameters[name].shape)
        if in_file != in_model:
            is_other_rank = name.endswith(f".{adapter.row.rank_of}") and in_file[0] != in_model[0]
            hint = f"Give --lora_r {in_file[0]}." if is_other_rank else "It is another base model's adapter."
            raise UserError(f"{adapter.source}: {name} is {in_file} in the file, {in_model} in the model.\n{hint}")
    adapter.check_values()
    return state, notes


def _check_updates(model: Any, adapter: Adapter) -> None:
    """Raise UserError unless the model scales its updates, and treats a relative query, as the adapter does."""
    if adapter.lora_alpha is not None:
        for name, rank_and_alpha in adapter.layers().items():
            layer: Any = model.get_submodule(name)
            scaling = adapter.scaling(*rank_and_alpha)
            if not math.isclose(scaling, layer.scaling, rel_tol=1e-9):
                raise UserError(
                    f"{adapter.source}: was trained with another lora_alpha: {name} has scaling {scaling:g} in the "
                    f"file, {layer.scaling:g} in the model.\nGive --lora_alpha {adapter.lora_alpha:g}."
                )
    relative_query = getattr(model, "relative_query", None)
    if relative_query is not None and relative_query != same_relative_query(adapter.relative_query, adapter.ranks):
        raise relative_query_error(adapter)


def _other_model(adapter: Adapter, model: Any, missing: list[str], unexpected: list[str]) -> UserError:
    """The error for an adapter whose tensors are not those that the model's method needs."""
    if not unexpected and missing and {*missing} == {*head_names(model)}:
        return UserError(
            f"{adapter.source}: contains {adapter.row.label} and no classifier: train one from it (--do_train).\n"
            f"(It lacks {missing[0]} and {len(missing) - 1} others.)"
        )
    has_classifier = model.base_model is not model
    if adapter.is_bare and has_classifier:
        return UserError(
            f"{adapter.source}: was trained on an encoder alone (its keys lack '{model.base_model_prefix}.').\n"
            f"Attach it to {type(model.base_model).__name__}, or train it in PEFT on {type(model).__name__}."
        )
    if not has_classifier and encoder_prefix(adapter):
        return UserError(
            f"{adapter.source}: was trained on a model with a classifier (its keys start with "
            f"'{encoder_prefix(adapter)}.').\nAttach it to such a model; its `base_model` is then the adapted encoder."
        )
    lists = (("lacks", missing), ("contains but the model lacks", unexpected))
    found = "; ".join(f"{verb} {', '.join(names[:3])}{' ...' if names[3:] else ''}" for verb, names in lists if names)
    return UserError(
        f"{adapter.source}: not an adapter of this model: the file {found}.\n"
        f"Layers with {adapter.row.label}: {layer_count(adapter.state)} in the file, "
        f"{model.config.num_hidden_layers} in the {model.config.model_type} model."
    )


def _check_base_model(model: Any, adapter: Adapter) -> list[str]:
    """Lines to print if an adapter only names its base model. Raises UserError if it records another fingerprint."""
    source, name, model_name = adapter.source, adapter.metadata.get("base_model"), model.config.name_or_path
    recorded, fingerprint = adapter.metadata.get("base_fingerprint"), base_fingerprint(model)
    if recorded is not None and recorded != fingerprint:
        raise UserError(
            f"{source}: was trained on another base model: {printable(name, 300)}, fingerprint {printable(recorded)}; "
            f"this one has {fingerprint}.\nGive that model as --model_name_or_path."
        )
    if recorded is not None or not name or not model_name or Path(name).name == Path(model_name).name:
        return []
    with suppress(OSError, ValueError):  # of a name that no file can have, or that has none
        if os.path.samefile(name, model_name):
            return []
    return [
        f"{source}: names the base model {printable(name, 300)}, but no fingerprint; it is loaded into {model_name}."
    ]


def base_holds_update(model: Any, adapter: Adapter, layers: dict[str, tuple[int, float]]) -> bool:
    """Whether a complete checkpoint's base weights contain the update: the reference merged RoBERTa, then saved it.

    Loading its LoRA over the weights of `model` counts it once either way. Raises UserError if they are neither.
    """
    distances = {False: 0.0, True: 0.0}  # the farthest from the model's weights without the update, and with it
    for name, weight in adapter.base_weights.items():
        base: Tensor = model.get_parameter(f"{name}.weight").detach().float().cpu()
        if weight.shape != base.shape:
            shapes = f"{list(weight.shape)} in the file, {list(base.shape)} in the model"
            raise UserError(f"{adapter.source}: {name}.weight is {shapes}. It is another base model's adapter.")
        matrices = adapter.state[f"{name}.lora_B"].float(), adapter.state[f"{name}.lora_A"].float()
        update = adapter.scaling(*layers[name]) * torch.matmul(*matrices)
        for merged, expected in ((False, base), (True, base + update)):
            distance = (weight.float() - expected).abs().max() / base.abs().max().clamp(min=1e-12)
            distances[merged] = max(distances[merged], distance.item())
    if min(distances.values()) > 1e-3:
        raise UserError(
            f"{adapter.source}: a checkpoint of a complete model, and its base weights are not this model's, with or "
            "without the update.\nGive the base model it was trained from, and the --lora_alpha it had."
        )
    return distances[True] < distances[False]


def head_rows(adapter: Adapter, labels: Sequence[str]) -> list[int] | None:
    """For each of `labels` the row of an adapter's head that predicts it; None if it has no head for them."""
    if adapter.label_count is None:
        return None
    return match_head_rows(adapter.source, adapter.label_count, adapter.labels, labels)[0]


def _order_head(
    model: Any, adapter: Adapter, labels: Sequence[str] | None, allow_new_head: bool
) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """An adapter's tensors, its head's rows in the order of the labels; names left out; lines to print."""
    source, state, count, n = adapter.source, dict(adapter.state), adapter.label_count, model.config.num_labels
    if count is None:
        return state, [], []
    trained, expected = adapter.labels, recorded_labels(model.config) if labels is None else tuple(labels)
    if trained is not None and count != (len(trained) or 1):
        names = label_list(trained)
        raise UserError(f"{source}: its head has {count} outputs, but {RUN_METADATA} names {names}: not the same run.")
    if not allow_new_head and count != n:
        raise UserError(f"{source}: its head has {count} labels, this task {n}: another task's adapter.")
    if expected is None:  # rows by position
        trained = None
    elif not allow_new_head:
        check_labels(source, trained, expected)
    rows, note = match_head_rows(source, count, trained, config_labels(model.config) if expected is None else expected)
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
    if all(is_loaded(model.get_parameter(name)) for name in pooler):
        return pooler, f"{adapter.source}: contains no pooler; its classifier uses the base checkpoint's, as in PEFT."
    lost = f"{adapter.source}: its classifier was trained on a pooler that PEFT drew at random and did not save"
    if allow_new_head:
        return head, f"{lost}; a new head is initialised."
    raise UserError(
        f"{lost}, and the base model has none.\nGive the fine-tuned model it was trained from, or train it again in "
        'PEFT with modules_to_save=["classifier", "pooler"].\nTraining (--do_train) can start from it, with a new head.'
    )
