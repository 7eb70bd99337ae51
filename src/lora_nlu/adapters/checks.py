"""Checks of what an adapter's files contain: complete, of the right kinds, written together, finite numbers."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lora_nlu.adapters.adapter import ENCODER_PREFIXES, Adapter, by_pattern, is_positive_number, is_target
from lora_nlu.adapters.peft_format import LORA_KEY, PEFT_PREFIX
from lora_nlu.errors import UserError, printable
from lora_nlu.files import ADAPTER_CONFIG, RUN_METADATA
from lora_nlu.ops.tensors import fingerprint, not_finite

# In a config's task_type or model class: heads other than a sequence classifier's
_OTHER_HEADS = re.compile("TOKEN_CLS|QUESTION_ANS|ForTokenClassification|ForQuestionAnswering")


def check_run_metadata(path: Path, metadata: dict[str, Any]) -> None:
    """Raise UserError unless the values of a run's metadata that are read have the types that runs write."""
    labels, metrics = metadata.get("labels", []), metadata.get("metrics", {})
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise UserError(f"{path}: labels is {printable(labels)}; expected a list of names.")
    if not isinstance(metrics, dict) or not all(isinstance(value, (int, float)) for value in metrics.values()):
        raise UserError(f"{path}: metrics is {printable(metrics)}; expected names with numbers.")
    lora = metadata.get("lora", {})
    scalings = lora.get("scalings", []) if isinstance(lora, dict) else None
    if not isinstance(scalings, list) or not all(is_positive_number(x, (int, float)) for x in scalings):
        raise UserError(f"{path}: lora is {printable(lora)}; expected scalings, a list of positive numbers, in it.")
    strings = ("task", "dataset", "base_model", "base_fingerprint", "base_revision", "peft_type")
    for key in (*strings, "weights_fingerprint", "tokenizer_fingerprint"):
        if not isinstance(metadata.get(key, ""), str) and not (key == "base_revision" and metadata[key] is None):
            raise UserError(f"{path}: {key} is {printable(metadata[key])}; expected a string.")


def check_complete(adapter: Adapter) -> None:
    """Raise UserError unless an adapter has all tensors of its method, LoRA's matrices as A [R, in] and B [out, R]."""
    source = adapter.source
    if not adapter.row.has_alpha:
        _check_trained_names(adapter)
        return
    layers = {name.rpartition(".")[0]: None for name in adapter.state if LORA_KEY.search(name)}
    if not layers:
        raise UserError(f"{source}: {_contents_without_lora(adapter.state)}")
    for layer in layers:
        pair = [f"{layer}.lora_A", f"{layer}.lora_B"]
        for name in pair:
            if name not in adapter.state:
                raise UserError(f"{source}: not a complete adapter: the file lacks {name}.")
        A, B = (list(adapter.state[name].shape) for name in pair)
        if len(A) != 2 or len(B) != 2 or A[0] != B[1] or not A[0]:
            raise UserError(f"{source}: {pair[0]} is {A} and {pair[1]} is {B}; expected [r, in] and [out, r].")


def _check_trained_names(adapter: Adapter) -> None:
    source, pattern = adapter.source, adapter.row.state
    trained = [n for n in adapter.state if pattern and re.search(pattern, n) and n.startswith(ENCODER_PREFIXES)]
    if pattern and not trained:
        raise UserError(
            f"{source}: {ADAPTER_CONFIG} says {adapter.method}, but the file contains no tensor that it trains."
        )
    if adapter.row.block and adapter.adapter_size is None:
        missing = trained[0].replace("adapter_B", "adapter_A")
        raise UserError(f"{source}: not a complete adapter: the file lacks {missing}.")


def _contents_without_lora(names: Iterable[str]) -> str:
    """What a file without LoRA matrices, by our names of them, contains instead, and what to do with it."""
    if any(name.startswith(PEFT_PREFIX) for name in names):
        return f"contains PEFT's keys, which record neither rank nor alpha. Give the folder with its {ADAPTER_CONFIG}."
    if any(name.endswith(".word_embeddings.weight") for name in names):
        return "is a complete model, without LoRA. Give it as --model_name_or_path."
    return "no LoRA matrices (keys ending in lora_A, lora_B) in it."


def check_updates(adapter: Adapter, config: dict[str, Any]) -> None:
    """Raise UserError unless head, biases and layers with an update are those of a folder's `adapter_config.json`."""
    source = adapter.source
    mapping = config.get("auto_mapping")
    model_class = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    for kind in (config.get("task_type"), model_class):
        if _OTHER_HEADS.search(str(kind)) and not all(name.startswith(ENCODER_PREFIXES) for name in adapter.state):
            raise UserError(
                f"{source}: was trained for {printable(kind)}; its head is not one of a sequence classifier."
            )
    biases = any(name.startswith(ENCODER_PREFIXES) and name.endswith(".bias") for name in adapter.state)
    if config.get("bias") not in (None, "none") and not biases:
        raise UserError(
            f"{source}: {ADAPTER_CONFIG} has bias={config['bias']}, but the file contains no encoder biases."
        )
    for name, rank in adapter.ranks.items():
        if not is_target(adapter, name):
            raise UserError(
                f"{source}: contains {name}.lora_A, but {ADAPTER_CONFIG} has no LoRA on that layer: "
                "the files don't match."
            )
        config_rank = by_pattern(config.get("rank_pattern") or {}, name, config["r"])
        if rank != config_rank:
            raise UserError(
                f"{source}: {name}.lora_A has rank {rank}, {ADAPTER_CONFIG} says {config_rank}: "
                "they don't belong together."
            )


def check_written_together(adapter: Adapter, peft_type: str) -> None:
    """Raise UserError unless a folder's files were written together, as far as its metadata records it."""
    source, metadata = adapter.source, adapter.metadata
    mismatch, remedy = "they don't belong together", "One of them was changed since: put"
    recorded_type = metadata.get("peft_type", peft_type)
    if recorded_type != peft_type:
        raise UserError(
            f"{source}: {ADAPTER_CONFIG} says {peft_type}, {RUN_METADATA} {printable(recorded_type)}: {mismatch}.\n"
            f"{remedy} peft_type back."
        )
    recorded_scalings = metadata.get("lora", {}).get("scalings")
    if adapter.row.has_alpha and recorded_scalings is not None:
        now, recorded = (", ".join(f"{x:.6g}" for x in sorted(xs)) for xs in (adapter.scalings(), recorded_scalings))
        if now != recorded:
            raise UserError(
                f"{source}: {ADAPTER_CONFIG} scales the update by {now}, {RUN_METADATA} records that it was trained "
                f"with {recorded}: {mismatch}.\n{remedy} lora_alpha, alpha_pattern and use_rslora back."
            )
    weights_fingerprint = fingerprint(adapter.state)
    if metadata.get("weights_fingerprint", weights_fingerprint) != weights_fingerprint:
        raise UserError(
            f"{source}: the weights are not those that {RUN_METADATA} was written with: {mismatch}, or are damaged.\n"
            "Take all files of the folder from one place, or a checkpoint of the run. After an interrupted save, save "
            "it again: the same command does."
        )


def check_values(adapter: Adapter) -> None:
    """Raise UserError, naming a tensor, unless all values of an adapter are finite floating-point numbers."""
    source = adapter.source
    state = adapter.state | {f"{name}.weight": tensor for name, tensor in adapter.base_weights.items()}
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            raise UserError(f"{source}: {name} contains {tensor.dtype}; expected floating-point numbers.")
    if broken := not_finite(state):
        raise UserError(
            f"{source}: {len(broken)} of its {len(state)} tensors are not finite (NaN or infinity), {broken[0]} first: "
            "its training diverged, or the file is damaged.\n"
            "Take an earlier checkpoint, or train again with a lower --learning_rate."
        )
