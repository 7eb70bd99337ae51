"""Adapters read from disk or from the Hub: PEFT's folders, ours for other methods, and published files.

A folder contains `adapter_config.json` and `adapter_model.safetensors`, which `peft.PeftModel.from_pretrained` loads as
they are, and `run_metadata.json` (task, label names, base model, seed). A published file is a flat state dict saved by
`torch.save`: `<module>.lora_A`, `<module>.lora_B` and the head; it records neither rank nor alpha.

PEFT must not load by mistake what it would compute differently. It would apply LoRA to a DeBERTa's relative query too,
which the reference implementation leaves frozen, and it lacks BitFit, bottleneck adapters and a head alone. The
`peft_type` of such folders is none of PEFT's, so that PEFT refuses them.
"""

import pickle
import re
from collections.abc import Iterable
from dataclasses import replace
from errno import EINVAL
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from safetensors.torch import load_file
from torch import Tensor

from lora_nlu.adapters.adapter import (
    ENCODER_PREFIXES,
    Adapter,
    by_pattern,
    is_deberta,
    is_positive_number,
    target_layers,
)
from lora_nlu.adapters.peft_format import LORA_KEY, PEFT_PREFIX, check_peft_config, from_peft_key, peft_fields
from lora_nlu.errors import UserError, first_line, is_out_of_memory, printable
from lora_nlu.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, RUN_METADATA, check_json, read_json, weights_file_problem
from lora_nlu.labels import check_label
from lora_nlu.methods.description import is_added, method_of_config
from lora_nlu.methods.method import Method
from lora_nlu.methods.table import METHODS
from lora_nlu.ops.tensors import fingerprint, load_torch_file

_PICKLED_WEIGHTS = "adapter_model.bin"  # as PEFT wrote it before safetensors
_MODEL_CHECKPOINT = "pytorch_model.bin"  # the reference implementation's checkpoints
_LARGEST_JSON = 2**24  # bytes: 10,000 labels take 500,000
_HUB_FILES = [ADAPTER_CONFIG, RUN_METADATA, "adapter_model.*"]
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_MISMATCH = "the files don't belong together"
# In a config's task_type or model class: heads other than a sequence classifier's
_OTHER_HEADS = re.compile("TOKEN_CLS|QUESTION_ANS|ForTokenClassification|ForQuestionAnswering")


def read_adapter(path: str, flag: str = "", **hub: Any) -> Adapter:
    """Read an adapter folder of ours or of PEFT, a checkpoint or output folder of a run, a published file, or a Hub id.

    flag: the command-line flag with the path, for messages; `hub`: cache_dir, token, revision. Raises UserError if it
    is missing, incomplete, no state dict, a pickle of anything but tensors (which is never run), or of a kind that this
    model would compute differently.
    """
    source, name = Path(path), f"{flag} {path}".lstrip()
    if source.is_dir():
        return _read_folder(source)
    if source.exists():
        return _read_file(source)
    if not _HUB_ID.fullmatch(path):
        raise UserError(f"{name}: no such file or folder.")
    try:
        folder = huggingface_hub.snapshot_download(path, allow_patterns=_HUB_FILES, **hub)
    except huggingface_hub.errors.LocalEntryNotFoundError as e:
        raise UserError(
            f"{name}: no such file or folder; the Hub ({huggingface_hub.constants.ENDPOINT}) is not reached, and no "
            "adapter of this name was downloaded before."
        ) from e
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as e:
        raise UserError(f"{name}: no such file or folder, and no adapter on the Hub ({first_line(e)}).") from e
    return _read_folder(Path(folder))


def _read_file(path: Path) -> Adapter:
    """A published file, or LoRA layers and head from a complete model that the reference implementation saved."""
    tensors = _load_tensors(path)
    state = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    if len(state) < len(tensors):
        raise UserError(f"{path}: contains some tensors twice, with and without the prefix 'module.'.")
    layers = [name.removesuffix(".lora_A") for name in state if name.endswith(".lora_A")]
    encoder = f"{layers[0].split('.')[0]}." if layers else ""
    frozen_names = {name for name in state if layers and name.startswith(encoder) and not LORA_KEY.search(name)}
    base_weights, deberta = {}, is_deberta(state)
    if layers and frozen_names >= {f"{layer}.weight" for layer in layers}:
        base_weights = {layer: state[f"{layer}.weight"] for layer in layers}
        state = {name: tensor for name, tensor in state.items() if name not in frozen_names}
    adapter = Adapter(path, state, relative_query="none" if deberta else "both", base_weights=base_weights)
    _check_complete(adapter)
    return adapter


def _read_folder(folder: Path) -> Adapter:
    weights = weights_in(folder)
    if weights.name == _MODEL_CHECKPOINT:
        return _read_file(weights)
    config = read_json(folder / ADAPTER_CONFIG, _LARGEST_JSON)
    if (row := method_of_config(config)) and row.read_config:
        config = row.read_config(folder / ADAPTER_CONFIG, config)
    metadata = read_json(folder / RUN_METADATA, _LARGEST_JSON) if (folder / RUN_METADATA).is_file() else {}
    _check_run_metadata(folder / RUN_METADATA, metadata)
    method = metadata.get("method", {}).get("name")
    check_peft_config(folder / ADAPTER_CONFIG, config, method)
    if base := config.get("base_model_name_or_path"):
        metadata = {"base_model": base, "base_revision": config.get("revision")} | metadata
    adapter = Adapter(folder, _read_state(weights), metadata=metadata, **peft_fields(config, method))
    if adapter.row.load_frozen:
        added, trained = str(adapter.row.added), str(adapter.row.state)
        frozen = {n: x for n, x in adapter.state.items() if re.search(added, n) and not re.search(trained, n)}
        state = {name: tensor for name, tensor in adapter.state.items() if name not in frozen}
        adapter = replace(adapter, state=state, frozen=frozen)
    _check_complete(adapter)
    if adapter.row.has_ranks:
        _check_updates(adapter, config)
    if adapter.row.from_file and config.get("init_lora_weights") not in adapter.row.peft_inits:
        adapter = adapter.row.from_file(adapter)
    _check_written_together(adapter, config["peft_type"])
    return adapter


def weights_in(source: Path) -> Path:
    """The file with an adapter's tensors: itself, or in its folder. Raises UserError if there is none."""
    is_adapter = (source / ADAPTER_CONFIG).is_file()
    names = (ADAPTER_WEIGHTS, _PICKLED_WEIGHTS) if is_adapter else (_MODEL_CHECKPOINT,)
    for path in [source] if source.is_file() else [source / name for name in names]:
        if path.is_file():
            return path
    if (source / "config.json").is_file() and [*source.glob("model*.safetensors")]:
        raise UserError(f"{source}: is a complete model, no adapter. Give it as --model_name_or_path.")
    raise UserError(f"{source}: contains no {ADAPTER_CONFIG} with {ADAPTER_WEIGHTS} (or {_PICKLED_WEIGHTS}).")


def _read_state(weights: Path) -> dict[str, Tensor]:
    """A folder's tensors by the model's own parameter names. Raises UserError."""
    state: dict[str, Tensor] = {}
    for key, tensor in _load_tensors(weights).items():
        if ".original_module." in key:
            continue  # PEFT's copy of a head that it replaced
        name = from_peft_key(key)
        if (".lora_" in name or ".vera_" in name) and not is_added(name):
            raise UserError(f"{weights}: {key}: a kind of LoRA tensor that is not supported.")
        if name in state and not torch.equal(state[name], tensor):  # PEFT writes a head's biases twice with bias="all"
            raise UserError(f"{weights}: contains two different tensors for {name}; the second is {key}.")
        state[name] = tensor
    return state


def _load_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file or of a `torch.save`d state dict, on the CPU; runs no code from the file."""
    try:
        if problem := weights_file_problem(path):
            raise UserError(f"{path}: {problem}")
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            state = load_torch_file(path)
    except pickle.UnpicklingError as e:
        raise UserError(
            f"{path}: refused: it is no PyTorch file, or contains more than tensors and could run code.\n"
            "Save the state dict alone: torch.save(model.state_dict(), path), or use safetensors."
        ) from e
    except UserError:
        raise
    except Exception as e:  # a damaged file makes torch raise errors of many types
        problem = "damaged or cut short"
        if is_out_of_memory(e):
            problem = "there is not enough memory to read it"
        elif isinstance(e, OSError) and e.errno not in (None, EINVAL):  # torch raises these two for an incomplete file
            problem = "can't be read"
        raise UserError(f"{path}: {problem} ({first_line(e)}).") from e
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) and isinstance(k, str) for k, t in state.items()):
        raise UserError(f"{path}: contains a {type(state).__name__} that is no state dict (names to tensors).")
    for name, tensor in state.items():
        if not name.isprintable() or len(name) > 500:
            raise UserError(f"{path}: {printable(name)} is not a valid tensor name.")
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_nested or tensor.is_quantized:
            raise UserError(f"{path}: {name} is not an ordinary tensor (sparse, quantised, nested or without values).")
    return state


def _check_run_metadata(path: Path, metadata: dict[str, Any]) -> None:
    """Raise UserError unless the values of a run's metadata that are read have the types that runs write."""
    labels, metrics, lora = metadata.get("labels", []), metadata.get("metrics", {}), metadata.get("lora", {})
    scalings = lora.get("scalings", []) if isinstance(lora, dict) else None
    has_numbers = isinstance(metrics, dict) and all(isinstance(value, (int, float)) for value in metrics.values())
    has_scalings = isinstance(scalings, list) and all(is_positive_number(x, (int, float)) for x in scalings)
    for label in labels if isinstance(labels, list) else ():
        check_label(path, str(label))
    method = metadata.get("method", {})
    strings = ("task", "dataset", "base_model", "model_type", "base_fingerprint", "peft_type", "weights_fingerprint")
    check_json(path, metadata, [
        ("labels", isinstance(labels, list) and all(isinstance(label, str) for label in labels), "a list of names"),
        ("metrics", has_numbers, "names with numbers"),
        ("lora", has_scalings, "scalings, a list of positive numbers, in it"),
        ("method", isinstance(method, dict) and isinstance(method.get("name", ""), str), "an object with a name"),
        *((key, isinstance(metadata.get(key, ""), str), "a string") for key in (*strings, "tokenizer_fingerprint")),
        ("base_revision", isinstance(metadata.get("base_revision"), str | None), "a string"),
    ])  # fmt: skip


def _check_complete(adapter: Adapter) -> None:
    """Raise UserError unless an adapter has all tensors of its method, LoRA's matrices as A [R, in] and B [out, R]."""
    source, row, pattern = adapter.source, adapter.row, adapter.row.state
    if not row.has_ranks:
        trained = [n for n in adapter.state if pattern and re.search(pattern, n) and n.startswith(ENCODER_PREFIXES)]
        if pattern and not trained:
            raise UserError(f"{source}: {ADAPTER_CONFIG} says {adapter.method}, but the file contains no tensor of it.")
        if row.block and adapter.adapter_size is None:
            lacking = trained[0].replace("adapter_B", "adapter_A")
            raise UserError(f"{source}: not a complete adapter: the file lacks {lacking}.")
        return
    if foreign := [name for name in adapter.state if is_added(name) and not re.search(str(row.added), name)]:
        raise UserError(f"{source}: contains {foreign[0]}, which {row.label} does not have: {_MISMATCH}.")
    if not (layers := dict.fromkeys(n.rpartition(".")[0] for n in adapter.state if n.endswith(row.tensors))):
        raise UserError(f"{source}: {_contents_without(row, adapter.state)}")
    for layer in layers:
        if missing := [name for name in row.tensors if f"{layer}.{name}" not in adapter.state]:
            raise UserError(f"{source}: not a complete adapter: the file lacks {layer}.{missing[0]}.")
        if row.rank_of != "lora_A":
            if not adapter.state[f"{layer}.{row.rank_of}"].dim():
                raise UserError(f"{source}: {layer}.{row.rank_of} is []; expected [r].")
            continue
        pair = [f"{layer}.lora_A", f"{layer}.lora_B"]
        A, B = (list(adapter.state[name].shape) for name in pair)
        is_empty = A[:1] == [0] and layer not in adapter.settings.get("kept", {})
        if len(A) != 2 or len(B) != 2 or A[0] != B[1] or is_empty:
            raise UserError(f"{source}: {pair[0]} is {A} and {pair[1]} is {B}; expected [r, in] and [out, r].")


def _contents_without(row: Method, names: Iterable[str]) -> str:
    """What a file without the tensors of LoRA or a variant contains instead, and what to do with it."""
    if any(name.startswith(PEFT_PREFIX) for name in names):
        return f"contains PEFT's keys, which record neither rank nor alpha. Give the folder with its {ADAPTER_CONFIG}."
    if any(name.endswith(".word_embeddings.weight") for name in names):
        return "is a complete model, without LoRA. Give it as --model_name_or_path."
    return f"contains no tensor of {row.label} (keys ending in {', '.join(row.tensors)})."


def _check_updates(adapter: Adapter, config: dict[str, Any]) -> None:
    """Raise UserError unless head, biases and layers with an update are those of a folder's `adapter_config.json`."""
    source, mapping = adapter.source, config.get("auto_mapping")
    model_class = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    for kind in (config.get("task_type"), model_class):
        if _OTHER_HEADS.search(str(kind)) and not all(name.startswith(ENCODER_PREFIXES) for name in adapter.state):
            raise UserError(f"{source}: was trained for {printable(kind)}; its head is not a sequence classifier's.")
    biases = any(name.startswith(ENCODER_PREFIXES) and name.endswith(".bias") for name in adapter.state)
    if config.get("bias") not in (None, "none") and not biases:
        raise UserError(f"{source}: {ADAPTER_CONFIG} has bias={config['bias']}, but the file has no encoder biases.")
    targets = {*target_layers(adapter, adapter.ranks)}
    ranks = by_pattern(source, config.get("rank_pattern") or {}, adapter.ranks, config["r"])
    for name, rank in adapter.ranks.items():
        if name not in targets:
            text = f"contains {name}.{adapter.row.rank_of}, but {ADAPTER_CONFIG} has no LoRA there"
            raise UserError(f"{source}: {text}: {_MISMATCH}.")
        if rank != ranks[name] and name not in adapter.settings.get("kept", {}):
            says = f"{ADAPTER_CONFIG} says {ranks[name]}"
            raise UserError(f"{source}: {name}.{adapter.row.rank_of} has rank {rank}, {says}: {_MISMATCH}.")


def _check_written_together(adapter: Adapter, peft_type: str) -> None:
    """Raise UserError unless a folder's files were written together, as far as its metadata records it."""
    source, metadata = adapter.source, adapter.metadata
    remedy = "One of them was changed since: put"
    recorded_type = metadata.get("peft_type", peft_type)
    if recorded_type != peft_type:
        raise UserError(
            f"{source}: {ADAPTER_CONFIG} says {peft_type}, {RUN_METADATA} {printable(recorded_type)}: {_MISMATCH}.\n"
            f"{remedy} peft_type back."
        )
    recorded_method = metadata.get("method", {})
    recorded_row = METHODS.get(recorded_method.get("name"), adapter.row)
    if recorded_row.linear is not adapter.row.linear:
        raise UserError(
            f"{source}: {ADAPTER_CONFIG} describes {adapter.row.label}, {RUN_METADATA} {recorded_row.label}: "
            f"{_MISMATCH}.\n{remedy} it back."
        )
    for name, value in adapter.settings.items():
        is_decisive = any(flag.name == name and flag.decides for flag in adapter.row.flags)
        if is_decisive and recorded_method.get(name, value) != value:
            recorded_value = printable(recorded_method[name])
            raise UserError(
                f"{source}: {ADAPTER_CONFIG} has {name} {value}, {RUN_METADATA} {recorded_value}: {_MISMATCH}.\n"
                f"{remedy} it back."
            )
    recorded_scalings = metadata.get("lora", {}).get("scalings")
    if adapter.row.has_alpha and recorded_scalings is not None:
        in_config, in_run = (", ".join(f"{x:.6g}" for x in sorted(s)) for s in (adapter.scalings(), recorded_scalings))
        if in_config != in_run:
            raise UserError(
                f"{source}: {ADAPTER_CONFIG} scales the update by {in_config}, {RUN_METADATA} records that it was "
                f"trained with {in_run}: {_MISMATCH}.\n{remedy} lora_alpha, alpha_pattern and use_rslora back."
            )
    weights_fingerprint = fingerprint(adapter.state | adapter.frozen)
    if metadata.get("weights_fingerprint", weights_fingerprint) != weights_fingerprint:
        raise UserError(
            f"{source}: the weights are not those that {RUN_METADATA} was written with: {_MISMATCH}, or are damaged.\n"
            "Take all files of the folder from one place, or a checkpoint of the run. After an interrupted save, save "
            "it again: the same command does."
        )
