"""What was trained, on disk: PEFT folders and the published one-file layout.

A folder holds `adapter_config.json` and `adapter_model.safetensors`, which `peft.PeftModel.from_pretrained` loads as
they are, and `run_metadata.json` (task, label names, base model, seed) beside them. A published file is a flat state
dict saved by `torch.save`: `<module>.lora_A`, `<module>.lora_B` and the head, with no word of rank or alpha.

A DeBERTa trained as the reference does, with the relative positions' query frozen, is no LoRA model in PEFT's sense:
PEFT would apply the update there too. Its folder says so in `peft_type`, which PEFT then refuses to load.
"""

import json
import os
import pickle
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from lora_nlu.errors import UserError
from lora_nlu.lora import LoRALinear

CONFIG, WEIGHTS, METADATA = "adapter_config.json", "adapter_model.safetensors", "run_metadata.json"
_LORA, _LORA_FROZEN_RELATIVE_QUERY = "LORA", "LORA_FROZEN_RELATIVE_QUERY"  # peft_type; PEFT knows the first
_PEFT_PREFIX = "base_model.model."
_LORA_KEY = re.compile(r"\.lora_[AB]$")


@dataclass(frozen=True)
class Adapter:
    """A saved adapter in memory: tensors by the model's own parameter names; alpha None where the file doesn't know.

    `frozen_relative_query` is how a DeBERTa was trained (modeling_deberta_v2.py); published files are the reference's.
    """

    source: Path
    state: dict[str, Tensor]
    lora_alpha: float | None = None
    frozen_relative_query: bool = True
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def labels(self) -> tuple[str, ...] | None:
        """Label names in id order, () for regression, None where the file doesn't record them."""
        names = self.metadata.get("labels")
        return None if names is None else tuple(names)


def trained_state(model: Any, state_dict: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The parameters of `model` that train, from `state_dict` where a distributed engine has gathered one."""
    state = model.state_dict() if state_dict is None else state_dict
    return {name: state[name] for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_adapter(
    model: Any, folder: Path, metadata: dict[str, Any], state_dict: dict[str, Tensor] | None = None
) -> None:
    """Write the trained parameters of a LoRA model as a PEFT folder; each file appears whole or not at all."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    first = next(iter(layers.values()))
    tensors = {}
    heads = set()
    for name, tensor in trained_state(model, state_dict).items():
        tensor = tensor.detach().cpu().contiguous()
        if _LORA_KEY.search(name):
            tensors[f"{_PEFT_PREFIX}{name}.weight"] = tensor
        else:
            tensors[f"{_PEFT_PREFIX}{name}"] = tensor
            heads.add(name.split(".")[0])
    config = {
        "peft_type": _LORA_FROZEN_RELATIVE_QUERY if getattr(model, "frozen_relative_query", False) else _LORA,
        "task_type": "SEQ_CLS",
        "base_model_name_or_path": metadata.get("base_model"),
        "r": first.r,
        "lora_alpha": first.scaling * first.r,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted({name.rsplit(".", 1)[-1] for name in layers}),
        "modules_to_save": sorted(heads),
    }
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{WEIGHTS}.partial"
    try:
        partial.write_bytes(save(tensors, metadata={"format": "pt"}))  # save_file would hide it from other users
        publish(partial, folder / WEIGHTS)
        write_json(folder / METADATA, metadata)
        write_json(folder / CONFIG, config)
    finally:
        partial.unlink(missing_ok=True)


def publish(partial: Path, final: Path) -> None:
    """Give a completely written file or folder its name: on the disk first, then renamed."""
    for path in [partial, *partial.rglob("*")] if partial.is_dir() else [partial]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    os.replace(partial, final)


def write_json(path: Path, content: Any) -> None:
    """Write `content` as JSON under a temporary name, then rename."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        publish(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises UserError if it is missing, cut or no object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: can't be read ({e}).") from e
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a JSON {type(content).__name__}; expected an object.")
    return content


def read_adapter(path: str) -> Adapter:
    """Read an adapter folder, a checkpoint or output folder of a run, or a published file.

    Raises UserError if it is missing, cut, no state dict, or a pickle of anything but tensors (which is never run).
    """
    source = Path(path)
    if not source.exists():
        raise UserError(f"--lora_path {path}: no such file or folder.")
    if source.is_dir():
        return _read_folder(source)
    state = load_file_safely(source)
    return Adapter(source, {name.removeprefix("module."): tensor for name, tensor in state.items()})


def load_file_safely(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file or of a `torch.save`d state dict, on the CPU; runs no code from the file."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        raise UserError(
            f"{path}: refused: it is no PyTorch file, or holds more than tensors and could run code.\n"
            "Save the state dict alone: torch.save(model.state_dict(), path), or use safetensors."
        ) from e
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, KeyError) as e:
        raise UserError(
            f"{path}: damaged or cut short ({str(e).splitlines()[0][:150] if str(e) else type(e).__name__})."
        ) from e
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) and isinstance(k, str) for k, t in state.items()):
        raise UserError(f"{path}: holds a {type(state).__name__} that is no state dict (names to tensors).")
    return state


def _read_folder(folder: Path) -> Adapter:
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise UserError(f"--lora_path {folder}: holds no {CONFIG} with {WEIGHTS}.")
    config = read_json(folder / CONFIG)
    kind = config.get("peft_type")
    if kind not in (_LORA, _LORA_FROZEN_RELATIVE_QUERY):
        raise UserError(f"{folder / CONFIG}: peft_type is {kind!r}; only LORA can be read.")
    plain = {"use_dora": False, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}, "bias": "none"}
    for key, value in plain.items():
        if config.get(key, value) not in (value, None):
            raise UserError(f"{folder / CONFIG}: {key}={config[key]!r} is not supported.")
    metadata = read_json(folder / METADATA) if (folder / METADATA).is_file() else {}
    state = {}
    for name, tensor in load_file_safely(folder / WEIGHTS).items():
        name = name.removeprefix(_PEFT_PREFIX)
        state[re.sub(r"(\.lora_[AB])\.weight$", r"\1", name)] = tensor
    return Adapter(folder, state, config.get("lora_alpha"), kind == _LORA_FROZEN_RELATIVE_QUERY, metadata)


def head_label_count(state: dict[str, Tensor], model: Any) -> int | None:
    """Rows of the saved head's last layer: its number of labels; None if the file has no head."""
    last = [name for name in head_names(model) if name in state and name.endswith("weight")]
    return state[last[-1]].shape[0] if last else None


def head_names(model: Any) -> list[str]:
    """Names of the parameters outside the encoder."""
    return [name for name, _ in model.named_parameters() if not name.startswith(f"{model.base_model_prefix}.")]


def load_adapter(model: Any, adapter: Adapter, allow_new_head: bool) -> list[str]:
    """Copy an adapter into a LoRA model; every tensor of the file must have its place and every place its tensor.

    The one exception, with `allow_new_head` (training starts from another task's adapter): a `classifier` for another
    number of labels is left behind, and the model's fresh one stays, as the reference implementation does. That is
    RoBERTa's whole head; DeBERTa keeps the `pooler` trained with it.
    Returns the names left behind. Raises UserError naming key and shapes; the model is unchanged then.
    """
    source, state = adapter.source, dict(adapter.state)
    parameters = dict(model.named_parameters())
    layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
    wanted = [name for name in parameters if _LORA_KEY.search(name)]
    found = [name for name in state if _LORA_KEY.search(name)]
    if not found:
        raise UserError(f"{source}: no LoRA matrices (keys ending in lora_A, lora_B) among its {len(state)} tensors.")
    if adapter.lora_alpha is not None and adapter.lora_alpha != layers[0].scaling * layers[0].r:
        raise UserError(
            f"{source}: was trained with lora_alpha {adapter.lora_alpha:g}, but --lora_alpha is "
            f"{layers[0].scaling * layers[0].r:g}. Give --lora_alpha {adapter.lora_alpha:g}."
        )
    head, dropped = head_names(model), []
    labels = head_label_count(state, model)
    if labels is not None and labels != model.config.num_labels:
        if not allow_new_head:
            raise UserError(
                f"{source}: its head has {labels} labels, this task {model.config.num_labels}: another task's adapter."
            )
        dropped = [name for name in head if name in state and name.startswith("classifier.")]
        for name in dropped:
            del state[name]
    headless = allow_new_head and not any(name in state for name in head)
    required = wanted + ([] if headless else [name for name in head if name not in dropped])
    missing = [name for name in required if name not in state]
    unexpected = [name for name in state if name not in required]
    if missing or unexpected:
        lists = (("lacks", missing), ("has but the model lacks", unexpected))
        said = "; ".join(
            f"{verb} {', '.join(names[:3])}{' ...' if names[3:] else ''}" for verb, names in lists if names
        )
        depth = {kind: _layer_count(names) for kind, names in (("file", found), ("model", wanted))}
        raise UserError(
            f"{source}: not an adapter of this model: the file {said}.\n"
            f"Layers with LoRA: {depth['file']} in the file, {depth['model']} in the {model.config.model_type} model."
        )
    frozen = getattr(model, "frozen_relative_query", None)
    if frozen is not None and frozen != adapter.frozen_relative_query:
        trained, remedy = ("without", "Leave out") if adapter.frozen_relative_query else ("with", "Give")
        raise UserError(
            f"{source}: was trained {trained} LoRA on the relative positions' query; read otherwise it gives other "
            f"answers.\n{remedy} --lora_relative_query."
        )
    for name, tensor in state.items():
        if tensor.shape != parameters[name].shape:
            key = f"{name} is {list(tensor.shape)} in the file, {list(parameters[name].shape)} in the model"
            rank = tensor.shape[0] if name.endswith("lora_A") else None
            hint = f"Give --lora_r {rank}." if rank and rank != layers[0].r else "It is another base model's adapter."
            raise UserError(f"{source}: {key}.\n{hint}")
    with torch.no_grad():
        for name, tensor in state.items():
            parameters[name].copy_(tensor)
    return dropped


def _layer_count(names: list[str]) -> int:
    return len({match.group(1) for name in names if (match := re.search(r"\.layer\.(\d+)\.", name))})
