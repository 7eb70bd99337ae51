"""An adapter into a model: layers, tensors, the order of the head."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_nlu.adapters.adapter import Adapter, encoder_prefix, is_deberta, is_target, layer_count
from lora_nlu.adapters.reading import check_values
from lora_nlu.errors import UserError, printable
from lora_nlu.files import RUN_METADATA
from lora_nlu.labels import (
    check_labels,
    label_list,
    last_head_layer,
    match_head_rows,
    placeholder_labels,
    recorded_labels,
)
from lora_nlu.methods.bottleneck import set_bottlenecks_
from lora_nlu.methods.description import TRAINED_NAMES, targets_and_layers
from lora_nlu.methods.lora import check_not_quantised, set_lora_, unmerge_lora_
from lora_nlu.methods.table import mark_trainable
from lora_nlu.models.loading import base_fingerprint, encoder_prefix_in, head_names
from lora_nlu.ops.sharding import copy_into


def head_rows(adapter: Adapter, labels: Sequence[str]) -> list[int] | None:
    """For each of `labels` the row of an adapter's head that tells it; None if it has no head for them."""
    if adapter.label_count is None:
        return None
    return match_head_rows(adapter.source, adapter.label_count, adapter.labels, labels)[0]


def with_labels(adapter: Adapter, labels: Sequence[str] | None) -> Adapter:
    """The adapter with these label names recorded, if any."""
    return adapter if labels is None else replace(adapter, metadata=adapter.metadata | {"labels": [*labels]})


def check_settings(
    adapter: Adapter,
    lora_r: int | None,
    lora_alpha: float | None,
    lora_relative_query: bool | None,
    targets: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
) -> None:
    """Raise UserError, naming the flag to give, if a setting that is not None differs from that of a LoRA adapter.

    targets and layers: as `lora.targets_and_layers` gives them.
    """
    source, known = adapter.source, adapter.lora_alpha
    for name, rank in adapter.ranks.items():
        if lora_r is not None and rank != lora_r:
            shape = list(adapter.state[f"{name}.lora_A"].shape)
            raise UserError(
                f"{source}: {name}.lora_A is {shape} in the file, [{lora_r}, {shape[-1]}] by --lora_r {lora_r}.\n"
                f"Give --lora_r {rank}, or leave it out: the file records its rank."
            )
    if known is not None and lora_alpha is not None and known != lora_alpha:
        raise UserError(
            f"{source}: was trained with lora_alpha {known:g}, but --lora_alpha is {lora_alpha:g}.\n"
            f"Give --lora_alpha {known:g}, or leave it out: the file records its alpha."
        )
    reading = lora_relative_query if is_deberta(adapter.state) and adapter.records_relative_query else None
    if reading is not None and reading == adapter.frozen_relative_query:
        raise _other_reading(adapter)
    has_targets, has_layers = targets_and_layers(adapter.ranks)
    asked: tuple[tuple[str, Any, Any], ...] = (
        ("lora_target_modules", targets, has_targets),
        ("lora_layers", layers, has_layers),
    )
    for flag, said, has in asked:
        if said is not None and set(said) != set(has):
            file, flags = (",".join(map(str, places)) for places in (has, said))
            raise UserError(
                f"{source}: has its updates in {file}, by --{flag} they would be in {flags}.\n"
                f"Leave --{flag} out: the file records its layers."
            )


def with_relative_query(adapter: Adapter, lora_relative_query: bool | None) -> Adapter:
    """A DeBERTa `.bin`, which doesn't tell, as trained with LoRA on the relative query or without.

    None is without, as the reference trained. An adapter that tells stays as it is.
    """
    if adapter.records_relative_query or lora_relative_query is None:
        return adapter
    return replace(adapter, frozen_relative_query=not lora_relative_query)


def _other_reading(adapter: Adapter) -> UserError:
    if not adapter.records_relative_query:
        trained, others = ("without", "with") if adapter.frozen_relative_query else ("with", "without")
        return UserError(
            f"{adapter.source}: doesn't tell whether LoRA was on the relative positions' query. It is read as "
            f"{trained}, the model is {others}.\nLeave out --lora_relative_query, or use with_relative_query."
        )
    trained, remedy = ("without", "Leave out") if adapter.frozen_relative_query else ("with", "Give")
    return UserError(
        f"{adapter.source}: was trained {trained} LoRA on the relative positions' query; read otherwise it gives "
        f"other answers.\n{remedy} --lora_relative_query."
    )


def attach_adapter(
    model: Any,
    adapter: Adapter,
    lora_alpha: float | None,
    allow_new_head: bool,
    labels: Sequence[str] | None = None,
) -> list[str]:
    """Give a model the layers of an adapter, whatever its method, and its tensors; for LoRA in DeBERTa its reading too.

    `lora_alpha` is for a LoRA file that doesn't know its own; `labels` (in id order) for a model whose config doesn't
    record what it is to tell. What the file holds trains, with the method's part and the head. Returns lines worth
    saying. Otherwise as `load_adapter`; on an error in the tensors the layers stay. Raises ValueError for a model with
    quantised layers.
    """
    check_not_quantised(model)
    unmerge_lora_(model)
    layers: dict[str, tuple[int, float]] = {}
    if adapter.method == "lora":
        layers = _attach_lora(model, adapter, lora_alpha)
    elif adapter.adapter_size is not None:
        set_bottlenecks_(model, adapter.method, adapter.adapter_size)
    else:
        setattr(model.config, {"bitfit": "apply_bitfit", "head": "head_only"}[adapter.method], True)
    state, _, said_of_head = _matched(model, adapter, allow_new_head, labels)
    named, made_for = (adapter.metadata.get(key) for key in ("base_model", "base_fingerprint"))
    base = base_fingerprint(model)
    if made_for is not None and made_for != base:
        raise UserError(
            f"{adapter.source}: was trained on another base model: {printable(named)}, fingerprint "
            f"{printable(made_for)}; this one has {base}.\nGive that model as --model_name_or_path."
        )
    notes, given = [], model.config.name_or_path
    if made_for is None and named and given and not _same_name(named, given):
        notes.append(
            f"{adapter.source}: names {printable(named)} as its base model, but no fingerprint; "
            f"it is loaded into {given}."
        )
    if adapter.base_weights and base_holds_update(model, adapter, layers):
        notes.append(
            f"{adapter.source}: its base weights hold the update already (merged, then saved); it counts once."
        )
    notes += said_of_head
    copy_into(model, state)
    mark_trainable(model)
    for name in adapter.state:
        model.get_parameter(name).requires_grad_(True)
    return notes


def _same_name(one: str, other: str) -> bool:
    """Whether two folders or Hub ids are the same path, or alike in its last part."""
    return Path(one).resolve() == Path(other).resolve() or Path(one).name == Path(other).name


def _attach_lora(model: Any, adapter: Adapter, lora_alpha: float | None) -> dict[str, tuple[int, float]]:
    """Make the LoRA layers of an adapter; returns (rank, alpha) of each. Raises UserError."""
    layers = adapter.layers(lora_alpha)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    targets = [name for name in linear if name.startswith(encoder_prefix_in(model)) and is_target(adapter, name)]
    missing, unexpected = ([f"{n}.lora_A" for n in a if n not in b] for a, b in ((targets, layers), (layers, linear)))
    if missing or unexpected:
        raise _other_model(adapter, model, missing, unexpected)
    set_lora_(model, layers, adapter.use_rslora)
    if getattr(model, "frozen_relative_query", None) is not None:
        model.config.lora_relative_query = not adapter.frozen_relative_query
    return layers


def base_holds_update(model: Any, adapter: Adapter, layers: dict[str, tuple[int, float]]) -> bool:
    """Whether a whole checkpoint's base weights hold the update already: the reference merged RoBERTa, then saved it.

    Loading its LoRA over the weights of `model` counts it once either way. Raises UserError if they are neither.
    """
    apart = {False: 0.0, True: 0.0}  # the farthest from the model's weights without the update, and with it
    for name, weight in adapter.base_weights.items():
        base: Tensor = model.get_parameter(f"{name}.weight").detach().float().cpu()
        matrices = adapter.state[f"{name}.lora_B"].float(), adapter.state[f"{name}.lora_A"].float()
        update = adapter.scaling(*layers[name]) * torch.matmul(*matrices)
        for merged, expected in ((False, base), (True, base + update)):
            distance = (weight.float() - expected).abs().max() / base.abs().max().clamp(min=1e-12)
            apart[merged] = max(apart[merged], distance.item())
    if min(apart.values()) > 1e-3:
        raise UserError(
            f"{adapter.source}: a checkpoint of a whole model, and its base weights are not this model's, with or "
            "without the update.\nGive the base model it was trained from, and the --lora_alpha it had."
        )
    return apart[True] < apart[False]


def load_adapter(model: Any, adapter: Adapter, allow_new_head: bool) -> list[str]:
    """Copy an adapter into a model that has its layers; every tensor must have its place and every place its tensor.

    Rows of the head go by label name where the adapter and the model's config record names. The one exception, with
    `allow_new_head` (training starts from another task's adapter): a `classifier` for other labels, or another number
    of them, is left behind, and the model's own stays, as the reference implementation does for another number. That
    is RoBERTa's whole head; DeBERTa keeps the `pooler` trained with it. A merged model is unmerged first.
    Returns the names left behind. Raises UserError naming key and shapes; the model is unchanged then.
    """
    state, dropped, _ = _matched(model, adapter, allow_new_head)
    unmerge_lora_(model)
    copy_into(model, state)
    return dropped


def _without_pooler(model: Any, adapter: Adapter, allow_new_head: bool) -> tuple[list[str], str]:
    """What of the head an adapter leaves to the model, and a line on it: PEFT saves no pooler of a DeBERTa by default.

    Its classifier is right on the pooler that PEFT had: the base checkpoint's, or one drawn at random that is lost.
    Raises UserError where it is lost, and training does not start here.
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


def _ordered_head(
    model: Any, adapter: Adapter, labels: Sequence[str] | None, allow_new_head: bool
) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """An adapter's tensors, its head's rows in the order of `labels`; names left behind and lines worth saying.

    labels: None for those that the model's config records. A classifier for others is left behind, or refused
    (UserError) without `allow_new_head`.
    """
    source, state, count, n = adapter.source, dict(adapter.state), adapter.label_count, model.config.num_labels
    if count is None:
        return state, [], []
    trained, wanted = adapter.labels, recorded_labels(model.config) if labels is None else tuple(labels)
    if trained is not None and count != (len(trained) or 1):
        raise UserError(
            f"{source}: its head has {count} outputs, but {RUN_METADATA} names {label_list(trained)}: not the same run."
        )
    if not allow_new_head and count != n:
        raise UserError(f"{source}: its head has {count} labels, this task {n}: another task's adapter.")
    if not allow_new_head and wanted is not None:
        check_labels(source, trained, wanted)
    by_name = wanted is not None
    rows, note = match_head_rows(
        source, count, trained if by_name else None, placeholder_labels(n) if wanted is None else wanted
    )
    if rows is None:
        dropped = [name for name in head_names(model) if name in state and name.startswith("classifier.")]
        return {name: tensor for name, tensor in state.items() if name not in dropped}, dropped, [note]
    for name, tensor in adapter.state.items():
        if name.rpartition(".")[0] == last_head_layer(state) and len(torch.atleast_1d(tensor)) == count:
            state[name] = tensor[rows]
    return state, [], [note] if note and by_name else []


def _matched(
    model: Any, adapter: Adapter, allow_new_head: bool, labels: Sequence[str] | None = None
) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """The tensors to copy into a model, the names left behind and lines worth saying. Raises UserError."""
    source, head, parameters = adapter.source, head_names(model), dict(model.named_parameters())
    state, dropped, notes = _ordered_head(model, adapter, labels, allow_new_head)
    trained = TRAINED_NAMES.get(adapter.method)
    wanted = [name for name in parameters if trained and trained.search(name) and name not in head]
    left, note = _without_pooler(model, adapter, allow_new_head)
    for name in left:
        state.pop(name, None)
    if note:
        notes = [note] if any(name.startswith("classifier.") for name in left) else [*notes, note]
    headless = allow_new_head and not any(name in state for name in head)
    required = wanted + ([] if headless else [name for name in head if name not in (*dropped, *left)])
    missing = [name for name in required if name not in state]
    # A folder may hold trained biases and whole modules beside LoRA and head; a published file never does.
    more = source.is_dir() and adapter.method not in ("bitfit", "head")
    places = {*parameters} - {*wanted} if more else set()
    unexpected = [name for name in state if name not in required and name not in places]
    if missing or unexpected:
        raise _other_model(adapter, model, missing, unexpected)
    if adapter.method == "lora" and adapter.lora_alpha is not None:
        for name, rank_and_alpha in adapter.layers().items():
            layer: Any = model.get_submodule(name)
            scaling = adapter.scaling(*rank_and_alpha)
            if not math.isclose(scaling, layer.scaling, rel_tol=1e-9):
                raise UserError(
                    f"{source}: was trained with another lora_alpha: {name} has scaling {scaling:g} in the file, "
                    f"{layer.scaling:g} in the model.\nGive --lora_alpha {adapter.lora_alpha:g}."
                )
    frozen = getattr(model, "frozen_relative_query", None)
    if adapter.method == "lora" and frozen is not None and frozen != adapter.frozen_relative_query:
        raise _other_reading(adapter)
    for name, tensor in state.items():
        if tensor.shape != parameters[name].shape:
            key = f"{name} is {list(tensor.shape)} in the file, {list(parameters[name].shape)} in the model"
            rank = tensor.shape[0] if name.endswith("lora_A") else None
            same = rank is None or rank == parameters[name].shape[0]
            hint = "It is another base model's adapter." if same else f"Give --lora_r {rank}."
            raise UserError(f"{source}: {key}.\n{hint}")
    check_values(adapter)
    return state, dropped, notes


def _other_model(adapter: Adapter, model: Any, missing: list[str], unexpected: list[str]) -> UserError:
    if not unexpected and missing and {*missing} == {*head_names(model)}:
        kind = "LoRA" if adapter.method == "lora" else adapter.method
        return UserError(
            f"{adapter.source}: holds {kind} and no classifier: train one from it (--do_train).\n"
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
    lists = (("lacks", missing), ("has but the model lacks", unexpected))
    found = "; ".join(f"{verb} {', '.join(names[:3])}{' ...' if names[3:] else ''}" for verb, names in lists if names)
    return UserError(
        f"{adapter.source}: not an adapter of this model: the file {found}.\n"
        f"Layers with {adapter.method}: {layer_count(adapter.state)} in the file, {model.config.num_hidden_layers} in "
        f"the {model.config.model_type} model."
    )
