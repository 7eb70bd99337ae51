"""An adapter in another form: a PEFT folder, one file in the published layout, or merged into its base model."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lora_nlu.adapters.adapter import Adapter, encoder_prefix, foreign_layer
from lora_nlu.adapters.attaching import attach_adapter
from lora_nlu.adapters.loading import load_base, recorded_revision
from lora_nlu.adapters.model_card import write_card
from lora_nlu.adapters.writing import write_adapter
from lora_nlu.errors import UsageError, UserError
from lora_nlu.files import ADAPTER_WEIGHTS, atomic_write, sha256_of
from lora_nlu.hub import looks_like_hub_id
from lora_nlu.labels import label_list
from lora_nlu.methods.description import is_added, methods_in, set_method
from lora_nlu.methods.linear import unmerged_parameters
from lora_nlu.methods.table import METHODS
from lora_nlu.models.loading import base_fingerprint
from lora_nlu.models.tokenizer import check_tokenizer, load_tokenizer, tokenizer_fingerprint

MODEL_WEIGHTS = "model.safetensors"  # of a plain model


def convert(adapter: Adapter, destination: Path, to: str, lora_alpha: float | None, base: str | None) -> str:
    """Write `adapter` in another form, "peft", "bin" or "merged"; returns lines to print: what was written or assumed.

    Raises UserError for a conversion that isn't possible, UsageError for a flag that has no effect.
    """
    _check_request(adapter, destination, to, lora_alpha, base)
    notes = _assumptions(adapter, to, base)
    if _is_there(destination):
        notes.append(f"{destination}: was there already, with the same content.")
    if adapter.lora_alpha is None:
        adapter = replace(adapter, lora_alpha=lora_alpha)
    if to == "bin":
        alpha = write_published(adapter, destination)
        line = f"{destination}: published layout. It records no alpha: load it with --lora_alpha {alpha}."
        if adapter.labels and adapter.metadata.get("task", "custom") == "custom":
            line += f" Nor does it record labels, class 0 first: {label_list(adapter.labels)} (--labels)."
    elif to == "merged":
        notes += write_merged(adapter, base, destination)
        line = f"{destination}: a plain model; load it with transformers' from_pretrained."
    else:
        if base:
            adapter, base_notes = with_base(adapter, base)
            notes += base_notes
        with _written_once(destination) as partial:
            write_adapter(adapter, partial)
            write_card(partial)
        line = f"{destination}: {'PEFT' if adapter.row.has_ranks else adapter.method} folder with a model card."
    return "\n".join([line, *notes])


def _check_request(adapter: Adapter, destination: Path, to: str, lora_alpha: float | None, base: str | None) -> None:
    """Raise UserError or UsageError as `convert`."""
    source = adapter.source
    weights = {"bin": "", "peft": ADAPTER_WEIGHTS, "merged": MODEL_WEIGHTS}[to]
    if _is_there(destination) and not (destination / weights).is_file():
        raise _other_content(destination)
    if base and to == "bin":
        raise UsageError("--base: a .bin records no base model; leave it out, or write --to peft.")
    if lora_alpha is not None and not adapter.row.has_alpha:
        raise UsageError(f"--lora_alpha: {source} contains {adapter.method}, which has none; leave it out.")
    if foreign := foreign_layer(adapter):
        raise UserError(f"{source}: it can't be used here: no RoBERTa or DeBERTa-V2 has the layer {foreign}.")
    if adapter.is_bare:
        raise UserError(
            f"{source}: was trained on an encoder alone, without a classifier, and can't be converted; attach it to "
            "the bare model (lora_nlu.attach_adapter)."
        )
    adapter.check_values()
    if adapter.row.has_alpha and (to != "bin" or lora_alpha is not None):
        adapter.layers(lora_alpha)  # raises if neither records the alpha, or if they differ


def _is_there(destination: Path) -> bool:
    return destination.is_file() or (destination.is_dir() and any(destination.iterdir()))


def _other_content(destination: Path) -> UserError:
    return UserError(f"{destination}: is there already. Give another destination; nothing is written over.")


@contextmanager
def _written_once(destination: Path) -> Iterator[Path]:
    """As `atomic_write`, but what is there already stays. Raises UserError if it differs from what was to be written.

    It is the same after a command that was killed when it had finished.
    """
    with atomic_write(destination) as partial:
        yield partial
        if _is_there(destination):
            if _digests(partial) != _digests(destination):
                raise _other_content(destination)
            partial.unlink() if partial.is_file() else shutil.rmtree(partial)


def _digests(path: Path) -> dict[str, str]:
    """The SHA-256 of a file, or of each file under a folder, by its path there."""
    return {str(file.relative_to(path)): sha256_of(file) for file in [path, *path.rglob("*")] if file.is_file()}


def _assumptions(adapter: Adapter, to: str, base: str | None) -> list[str]:
    """Lines to print on what the file doesn't record and was assumed, or was not checked."""
    source, notes = adapter.source, []
    if adapter.row.has_ranks and not adapter.records_relative_query and to != "bin":
        way = "the reference's way; --lora_relative_query is PEFT's" if adapter.frozen_relative_query else "PEFT's way"
        trained = "without" if adapter.frozen_relative_query else "with"
        notes.append(f"{source}: read as trained {trained} LoRA on the relative query ({way}), which it can't confirm.")
    if adapter.base_weights and not base and to != "merged":
        notes.append(f"{source}: a complete model; only its adapter is written, its base weights are not checked.")
    return notes


def write_published(adapter: Adapter, path: Path) -> str:
    """Write an fp32 state dict in the published layout; returns the alpha to load it with ("ALPHA": unknown)."""
    source, prefix = adapter.source, encoder_prefix(adapter)
    if adapter.row is not METHODS["lora"]:
        raise UserError(f"{source}: contains {adapter.method}; the published layout is LoRA's: use peft.")
    alphas = {alpha for _, alpha in adapter.layers().values()} if adapter.lora_alpha is not None else set()
    if len(alphas) > 1:
        raise UserError(f"{source}: a .bin records no alpha, and this adapter has several: use peft.")
    if prefix == "deberta" and not adapter.frozen_relative_query:
        raise UserError(
            f"{source}: a DeBERTa .bin is read with the relative positions' query frozen, and this adapter has LoRA "
            "there: use peft."
        )
    names = {name.rpartition(".")[2] for name in adapter.ranks}
    if names != ({"query_proj", "value_proj"} if prefix == "deberta" else {"query", "value"}):
        raise UserError(f"{source}: a .bin has LoRA on query and value, this adapter on {', '.join(names)}.")
    if others := [name for name in adapter.state if name.startswith(f"{prefix}.") and ".lora_" not in name]:
        raise UserError(f"{source}: a .bin can't store {others[0]}, which was trained too: use --to peft.")
    with _written_once(path) as partial:
        torch.save({name: adapter.state[name].float() for name in sorted(adapter.state, key=_published_place)}, partial)
    return f"{alphas.pop():g}" if alphas else "ALPHA"


def _published_place(name: str) -> tuple:
    """Sorts names as the published files do: layers by number, query before value, A before B, then the head."""
    parts = [(int(part), "") if part.isascii() and part.isdigit() else (0, part) for part in name.split(".")]
    in_encoder = name.startswith(("roberta.", "deberta."))
    return (not in_encoder, name.startswith("classifier."), parts[:-1], parts[-1] == (0, "bias"), parts[-1])


def with_base(adapter: Adapter, base: str) -> tuple[Adapter, list[str]]:
    """The adapter with this base model recorded, and lines to print. Raises UserError if it is another model's."""
    try:
        return on_base(adapter, base)[1:]
    except UserError as e:
        if not isinstance(e.__cause__, OSError) or not looks_like_hub_id(base):
            raise
    unchecked = f"--base {base}: recorded, but not available here: not checked that the adapter was trained on it."
    return replace(adapter, metadata=adapter.metadata | {"base_model": base, "base_revision": None}), [unchecked]


def on_base(adapter: Adapter, base: str) -> tuple[Any, Adapter, list[str]]:
    """The model of a folder or Hub id with an adapter in it, the adapter with that base recorded, lines to print.

    Raises UserError if there is no such model, with an OSError as its cause if the Hub doesn't provide it, or if names,
    shapes, fingerprint or weights show that the adapter is another model's.
    """
    model = load_base(base, adapter)
    metadata = adapter.metadata | {"base_model": base, "base_fingerprint": base_fingerprint(model)}
    if not recorded_revision(adapter, base):
        metadata["base_revision"] = getattr(model.config, "_commit_hash", None)
    notes = attach_adapter(model, adapter, None, allow_new_head=adapter.label_count is None)
    return model, replace(adapter, metadata=metadata), notes


def write_merged(adapter: Adapter, base: str | None, folder: Path) -> list[str]:
    """Write a plain Hub model: config, weights with the update in them, tokenizer. transformers loads it as it is.

    base: None for the one that the adapter records. Returns lines to print. Errors as `on_base`.
    """
    if not (base := base or adapter.metadata.get("base_model")):
        raise UserError(f"{adapter.source} doesn't record its base model: give --base MODEL.")
    if not adapter.row.merge:
        raise UserError(f"{adapter.source}: {adapter.row.title} are layers of their own; no plain model has them.")
    if adapter.label_count is None:
        raise UserError(f"{adapter.source}: has no classification head to put into a merged model.")
    model, _, notes = on_base(adapter, base)
    state, settings = merged_state(model)
    config = model.config
    set_method(config, {})
    config.update(settings | {"architectures": [type(model).__name__]})
    tokenizer, _ = load_tokenizer(base, config)
    remedy = "Give --base a copy of the base model with the tokenizer that it was trained with."
    check_tokenizer(str(adapter.source), adapter.metadata, tokenizer_fingerprint(tokenizer), remedy)
    with _written_once(folder) as partial:
        config.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        weights = partial / MODEL_WEIGHTS
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, weights, {"format": "pt"})
        weights.chmod(0o644)  # save_file makes it unreadable for other users
    return notes


def merged_state(model: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State dict without LoRA that gives the same logits in transformers' own class, and the settings it needs there.

    The model may be merged or not, and stays as it is, but for weights that steps replaced: they are read from the
    checkpoint again. A DeBERTa whose relative query is frozen gets projections of its own for the relative embeddings,
    copied from the base: with `share_att_key` false, `pos_query_proj` and `pos_key_proj` are what `query_proj` and
    `key_proj` were, or with the update where the relative key has it.
    """
    model.restore_weights()
    state = {name: tensor for name, tensor in unmerged_parameters(model).items() if not is_added(name)}
    merged = state | {name: x for row in methods_in(model) if row.merge for name, x in row.merge(model).items()}
    settings: dict[str, Any] = {}
    if getattr(model, "frozen_relative_query", False):
        settings["share_att_key"] = False
        copies = {"p2c": ("query_proj", "pos_query_proj"), "c2p": ("key_proj", "pos_key_proj")}
        pairs = [copies[kind] for kind in copies if kind in model.config.pos_att_type]
        attentions = [name for name, _ in model.named_modules() if name.endswith(".attention.self")]
        for name, (source, target), part in product(attentions, pairs, ("weight", "bias")):
            of = merged if target == "pos_key_proj" and model.relative_query == "key" else state
            merged[f"{name}.{target}.{part}"] = of[f"{name}.{source}.{part}"].clone()
    return merged, settings
