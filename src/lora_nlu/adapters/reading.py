"""Adapters read from disk or from the Hub: PEFT's folders, ours for other methods, and published files.

A folder contains `adapter_config.json` and `adapter_model.safetensors`, which `peft.PeftModel.from_pretrained` loads as
they are, and `run_metadata.json` (task, label names, base model, seed). A published file is a flat state dict saved by
`torch.save`: `<module>.lora_A`, `<module>.lora_B` and the head; it records neither rank nor alpha.

PEFT must not load by mistake what it would compute differently. It would apply LoRA to a DeBERTa's relative query too,
which the reference implementation leaves frozen, and it lacks BitFit, bottleneck adapters and a head alone. The
`peft_type` of such folders is none of PEFT's, so that PEFT refuses them.
"""

import re
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from torch import Tensor

from lora_nlu.adapters.adapter import Adapter, is_deberta
from lora_nlu.adapters.checks import (
    check_complete,
    check_run_metadata,
    check_updates,
    check_written_together,
)
from lora_nlu.adapters.peft_format import LORA_KEY, check_peft_config, from_peft_key, peft_fields
from lora_nlu.adapters.tensor_files import load_tensors
from lora_nlu.errors import UserError
from lora_nlu.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, RUN_METADATA, read_json

_PICKLED_WEIGHTS = "adapter_model.bin"  # as PEFT wrote it before safetensors
_MODEL_CHECKPOINT = "pytorch_model.bin"  # the reference implementation's checkpoints
_HUB_FILES = [ADAPTER_CONFIG, RUN_METADATA, "adapter_model.*"]
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


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
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as e:
        reason = str(e).splitlines()[0][:150] if str(e) else type(e).__name__
        raise UserError(f"{name}: no such file or folder, nor an adapter the Hub gives ({reason}).") from e
    return _read_folder(Path(folder))


def _read_file(path: Path) -> Adapter:
    """A published file, or LoRA layers and head from a complete model that the reference implementation saved."""
    tensors = load_tensors(path)
    state = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    if len(state) < len(tensors):
        raise UserError(f"{path}: contains some tensors twice, with and without the prefix 'module.'.")
    layers = [name.removesuffix(".lora_A") for name in state if name.endswith(".lora_A")]
    encoder = f"{layers[0].split('.')[0]}." if layers else ""
    base = {name for name in state if layers and name.startswith(encoder) and not LORA_KEY.search(name)}
    frozen, base_weights = is_deberta(state), {}
    if layers and base >= {f"{layer}.weight" for layer in layers}:
        base_weights = {layer: state[f"{layer}.weight"] for layer in layers}
        state = {name: tensor for name, tensor in state.items() if name not in base}
    adapter = Adapter(path, state, frozen_relative_query=frozen, base_weights=base_weights)
    check_complete(adapter)
    return adapter


def _read_folder(folder: Path) -> Adapter:
    weights = weights_in(folder)
    if weights.name == _MODEL_CHECKPOINT:
        return _read_file(weights)
    config = read_json(folder / ADAPTER_CONFIG)
    check_peft_config(folder / ADAPTER_CONFIG, config)
    metadata = read_json(folder / RUN_METADATA) if (folder / RUN_METADATA).is_file() else {}
    check_run_metadata(folder / RUN_METADATA, metadata)
    if base := config.get("base_model_name_or_path"):
        metadata = {"base_model": base, "base_revision": config.get("revision")} | metadata
    adapter = Adapter(folder, _read_state(weights), metadata=metadata, **peft_fields(config))
    check_complete(adapter)
    if adapter.row.has_alpha:
        check_updates(adapter, config)
    check_written_together(adapter, config["peft_type"])
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
    for key, tensor in load_tensors(weights).items():
        if ".original_module." in key:
            continue  # PEFT's copy of a head that it replaced
        name = from_peft_key(key)
        if ".lora_" in name and not LORA_KEY.search(name):
            raise UserError(f"{weights}: {key}: a kind of LoRA tensor that is not supported.")
        if name in state and not torch.equal(state[name], tensor):  # PEFT writes a head's biases twice with bias="all"
            raise UserError(f"{weights}: contains two different tensors for {name}; the second is {key}.")
        state[name] = tensor
    return state
