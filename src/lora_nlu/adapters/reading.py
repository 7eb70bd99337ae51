"""What was trained, on disk: PEFT folders, the same for methods other than LoRA, and the published one-file layout.

A folder holds `adapter_config.json` and `adapter_model.safetensors`, which `peft.PeftModel.from_pretrained` loads as
they are, and `run_metadata.json` (task, label names, base model, seed) beside them. A published file is a flat state
dict saved by `torch.save`: `<module>.lora_A`, `<module>.lora_B` and the head, with no word of rank or alpha.

A DeBERTa trained as the reference does, with the relative positions' query frozen, is no LoRA model in PEFT's sense:
PEFT would apply the update there too. Its folder says so in `peft_type`, which PEFT then refuses to load. So do the
folders of BitFit, of bottleneck adapters and of a head alone (methods.py), which PEFT doesn't have.
"""

import pickle
import re
import zipfile
from collections.abc import Iterable
from errno import EINVAL
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from safetensors.torch import load_file
from torch import Tensor

from lora_nlu.adapters.adapter import ENCODER_PREFIXES, Adapter, by_pattern, is_deberta, is_positive_number, is_target
from lora_nlu.adapters.peft_format import (
    LORA_FROZEN_RELATIVE_QUERY,
    METHODS_BY_TYPE,
    OTHER_HEADS,
    PEFT_PREFIX,
    adapted_modules,
    check_peft_config,
)
from lora_nlu.errors import UserError, is_out_of_memory, printable
from lora_nlu.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, RUN_METADATA, read_json, weights_file_problem
from lora_nlu.methods.description import BOTTLENECK_KEY, LORA_KEY, TRAINED_NAMES
from lora_nlu.ops.tensors import fingerprint, not_finite

_FILES = [ADAPTER_CONFIG, RUN_METADATA, "adapter_model.*"]
_OLD_WEIGHTS = "adapter_model.bin"  # as PEFT wrote it before safetensors
_WHOLE = "pytorch_model.bin"  # the reference implementation's checkpoints
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def read_adapter(path: str, flag: str = "", **hub: Any) -> Adapter:
    """Read an adapter folder of ours or of PEFT, a checkpoint or output folder of a run, a published file, or a Hub id.

    flag: what gave the path, for messages; `hub`: cache_dir, token, revision. Raises UserError if it is missing, cut,
    no state dict, a pickle of anything but tensors (which is never run), or of a kind that this model would compute
    differently.
    """
    source, said = Path(path), f"{flag} {path}".lstrip()
    if source.is_dir():
        return _read_folder(source)
    if source.exists():
        return _complete(_read_file(source))
    if not _HUB_ID.fullmatch(path):
        raise UserError(f"{said}: no such file or folder.")
    try:
        folder = huggingface_hub.snapshot_download(path, allow_patterns=_FILES, **hub)
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as e:
        reason = str(e).splitlines()[0][:150] if str(e) else type(e).__name__
        raise UserError(f"{said}: no such file or folder, nor an adapter the Hub gives ({reason}).") from e
    return _read_folder(Path(folder))


def _complete(adapter: Adapter) -> Adapter:
    """The adapter, if it is one: matrices in pairs, A [R, in] and B [out, R]. Raises UserError."""
    if adapter.method != "lora":
        pattern = TRAINED_NAMES.get(adapter.method)
        trained = [n for n in adapter.state if pattern and pattern.search(n) and n.startswith(ENCODER_PREFIXES)]
        if pattern and not trained:
            raise UserError(
                f"{adapter.source}: {ADAPTER_CONFIG} says {adapter.method}, but the file contains no tensor "
                "that it trains."
            )
        if pattern == BOTTLENECK_KEY and adapter.adapter_size is None:
            lacks = trained[0].replace("adapter_B", "adapter_A")
            raise UserError(f"{adapter.source}: not a complete adapter: the file lacks {lacks}.")
        return adapter
    layers = {name.rpartition(".")[0]: None for name in adapter.state if LORA_KEY.search(name)}
    if not layers:
        raise UserError(f"{adapter.source}: {_instead_of_lora(adapter.state)}")
    for layer in layers:
        pair = [f"{layer}.lora_A", f"{layer}.lora_B"]
        for name in pair:
            if name not in adapter.state:
                raise UserError(f"{adapter.source}: not a complete adapter: the file lacks {name}.")
        A, B = (list(adapter.state[name].shape) for name in pair)
        if len(A) != 2 or len(B) != 2 or A[0] != B[1] or not A[0]:
            raise UserError(f"{adapter.source}: {pair[0]} is {A} and {pair[1]} is {B}; expected [r, in] and [out, r].")
    return adapter


def _instead_of_lora(names: Iterable[str]) -> str:
    """What a file holds that has no LoRA matrices by our names, and what to do with it."""
    if any(name.startswith(PEFT_PREFIX) for name in names):
        return f"holds PEFT's keys, which say nothing of rank and alpha. Give the folder with its {ADAPTER_CONFIG}."
    if any(name.endswith(".word_embeddings.weight") for name in names):
        return "is a whole model, without LoRA. Give it as --model_name_or_path."
    return "no LoRA matrices (keys ending in lora_A, lora_B) in it."


def load_file_safely(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file or of a `torch.save`d state dict, on the CPU; runs no code from the file."""
    try:
        if text := weights_file_problem(path):
            raise UserError(f"{path}: {text}")
        if path.suffix == ".safetensors":
            return _plain(path, load_file(path))
        check_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        raise UserError(
            f"{path}: refused: it is no PyTorch file, or holds more than tensors and could run code.\n"
            "Save the state dict alone: torch.save(model.state_dict(), path), or use safetensors."
        ) from e
    except UserError:
        raise
    except Exception as e:  # what torch meets in a damaged file has many names
        wrong = "damaged or cut short"
        if is_out_of_memory(e):
            wrong = "there is not enough memory to read it"
        elif isinstance(e, OSError) and e.errno not in (None, EINVAL):  # how torch calls a file that is cut
            wrong = "can't be read"
        reason = printable(str(e).splitlines()[0] if str(e) else type(e).__name__, 150)
        raise UserError(f"{path}: {wrong} ({reason}).") from e
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) and isinstance(k, str) for k, t in state.items()):
        raise UserError(f"{path}: holds a {type(state).__name__} that is no state dict (names to tensors).")
    return _plain(path, state)


def _plain(path: Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state, if names can stand in a message and tensors are ordinary ones. Raises UserError."""
    for name, tensor in state.items():
        if not name.isprintable() or len(name) > 500:
            raise UserError(f"{path}: {printable(name)} is not a valid tensor name.")
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_nested or tensor.is_quantized:
            raise UserError(f"{path}: {name} is not an ordinary tensor (sparse, quantised, nested or without values).")
        if tensor.nbytes > max(tensor.untyped_storage().nbytes(), 2**28):  # a view that repeats a few numbers
            raise UserError(f"{path}: {name} has shape {list(tensor.shape)}, but the file contains fewer numbers.")
    return state


def check_archive(path: Path) -> None:
    """Compare a zip archive, such as `torch.save` writes, with its checksums, which `torch.load` doesn't.

    Raises UserError if a byte differs. Files of the older format, and archives written without checksums, pass.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            # torch stores plain files; where the directory speaks of compression or of folders (attribute 0x10), its
            # reader takes other bytes than the ones that the checksum is of
            odd = [e.filename for e in entries if e.compress_size != e.file_size or e.external_attr & 0x10]
            broken = odd[0] if odd else None
            if broken is None and any(entry.CRC for entry in entries):
                broken = archive.testzip()
            if broken is not None:
                raise UserError(
                    f"{path}: damaged: {printable(broken)} in it is not what was saved, by its checksum or length."
                )


def _read_file(path: Path) -> Adapter:
    """A published file, or the reference implementation's checkpoint of a whole model: LoRA and head of it."""
    tensors = load_file_safely(path)
    state = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    if len(state) < len(tensors):
        raise UserError(f"{path}: contains some tensors twice, with and without the prefix 'module.'.")
    layers = [name.removesuffix(".lora_A") for name in state if name.endswith(".lora_A")]
    encoder = f"{layers[0].split('.')[0]}." if layers else ""
    base = {name for name in state if layers and name.startswith(encoder) and not LORA_KEY.search(name)}
    frozen = is_deberta(state)
    if not layers or not base >= {f"{layer}.weight" for layer in layers}:
        return Adapter(path, state, frozen_relative_query=frozen)
    kept = {name: tensor for name, tensor in state.items() if name not in base}
    weights = {layer: state[f"{layer}.weight"] for layer in layers}
    return Adapter(path, kept, frozen_relative_query=frozen, base_weights=weights)


def weights_in(source: Path) -> Path:
    """The file with an adapter's tensors: itself, or in its folder. Raises UserError if there is none."""
    is_adapter = (source / ADAPTER_CONFIG).is_file()
    names = (ADAPTER_WEIGHTS, _OLD_WEIGHTS) if is_adapter else (_WHOLE,)
    for path in [source] if source.is_file() else [source / name for name in names]:
        if path.is_file():
            return path
    if (source / "config.json").is_file() and [*source.glob("model*.safetensors")]:
        raise UserError(f"{source}: is a whole model, no adapter. Give it as --model_name_or_path.")
    raise UserError(f"{source}: holds no {ADAPTER_CONFIG} with {ADAPTER_WEIGHTS} (or {_OLD_WEIGHTS}).")


def _read_folder(folder: Path) -> Adapter:
    weights = weights_in(folder)
    if weights.name == _WHOLE:
        return _complete(_read_file(weights))
    config = read_json(folder / ADAPTER_CONFIG)
    check_peft_config(folder / ADAPTER_CONFIG, config)
    metadata = read_json(folder / RUN_METADATA) if (folder / RUN_METADATA).is_file() else {}
    _check_metadata(folder / RUN_METADATA, metadata)
    state: dict[str, Tensor] = {}
    for key, tensor in load_file_safely(weights).items():
        if ".original_module." in key:
            continue  # PEFT's copy of a head that it replaced
        name = re.sub(r"\.(base_layer|modules_to_save(\.default)?)\.", ".", key.removeprefix(PEFT_PREFIX))
        name = re.sub(r"(\.lora_[AB])\.weight$", r"\1", name)
        if ".lora_" in name and not LORA_KEY.search(name):
            raise UserError(f"{weights}: {key}: a kind of LoRA tensor that is not supported.")
        if name in state and not torch.equal(state[name], tensor):  # PEFT writes a head's biases twice with bias="all"
            raise UserError(f"{weights}: contains two different tensors for {name}; the second is {key}.")
        state[name] = tensor
    if named := config.get("base_model_name_or_path"):
        metadata = {"base_model": named, "base_revision": config.get("revision")} | metadata
    adapter = _adapter_of_folder(folder, config, state, metadata)
    _check_written(adapter, config["peft_type"])
    return adapter


def _adapter_of_folder(
    folder: Path, config: dict[str, Any], state: dict[str, Tensor], metadata: dict[str, Any]
) -> Adapter:
    """The adapter of a folder, if its tensors are what its `adapter_config.json` says. Raises UserError."""
    if config["peft_type"] in METHODS_BY_TYPE:
        return _complete(Adapter(folder, state, metadata=metadata, method=METHODS_BY_TYPE[config["peft_type"]]))
    _check_contents(folder, config, state)
    adapter = Adapter(
        folder,
        state,
        config["lora_alpha"],
        config.get("alpha_pattern") or {},
        bool(config.get("use_rslora")),
        config["peft_type"] == LORA_FROZEN_RELATIVE_QUERY,
        config.get("lora_dropout") or 0.0,
        adapted_modules(config),
        metadata,
    )
    for name, rank in _complete(adapter).ranks.items():
        if not is_target(adapter, name):
            raise UserError(
                f"{folder}: contains {name}.lora_A, but {ADAPTER_CONFIG} has no LoRA on that layer: "
                "the files don't match."
            )
        said = by_pattern(config.get("rank_pattern") or {}, name, config["r"])
        if rank != said:
            raise UserError(
                f"{folder}: {name}.lora_A has rank {rank}, {ADAPTER_CONFIG} says {said}: they don't belong together."
            )
    return adapter


def _check_written(adapter: Adapter, kind: str) -> None:
    """A folder's files must be those that were written together. Raises UserError; older metadata doesn't tell."""
    known, apart, remedy = adapter.metadata, "they don't belong together", "One of them was changed since: put"
    if known.get("peft_type", kind) != kind:
        raise UserError(
            f"{adapter.source}: {ADAPTER_CONFIG} says {kind}, {RUN_METADATA} {printable(known['peft_type'])}: "
            f"{apart}.\n{remedy} peft_type back."
        )
    trained = known.get("lora", {}).get("scalings")
    if adapter.method == "lora" and trained is not None:
        has, had = (", ".join(f"{x:.6g}" for x in sorted(numbers)) for numbers in (adapter.scalings(), trained))
        if has != had:
            raise UserError(
                f"{adapter.source}: {ADAPTER_CONFIG} scales the update by {has}, {RUN_METADATA} says it was trained "
                f"with {had}: {apart}.\n{remedy} lora_alpha, alpha_pattern and use_rslora back."
            )
    if known.get("weights_fingerprint", wanted := fingerprint(adapter.state)) != wanted:
        raise UserError(
            f"{adapter.source}: the weights are not those that {RUN_METADATA} was written with: {apart}, "
            "or are damaged.\nTake all files of the folder from one place, or a checkpoint of the run. After an "
            "interrupted save, save it again: the same command does."
        )


def _check_contents(folder: Path, config: dict[str, Any], state: dict[str, Tensor]) -> None:
    """Head and biases must be what the config says they are. Raises UserError."""
    mapping = config.get("auto_mapping")
    model_class = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    for kind in (config.get("task_type"), model_class):
        if OTHER_HEADS.search(str(kind)) and not all(name.startswith(ENCODER_PREFIXES) for name in state):
            raise UserError(
                f"{folder}: was trained for {printable(kind)}; its head is not one of a sequence classifier."
            )
    biases = any(name.startswith(ENCODER_PREFIXES) and name.endswith(".bias") for name in state)
    if config.get("bias") not in (None, "none") and not biases:
        raise UserError(
            f"{folder}: {ADAPTER_CONFIG} has bias={config['bias']}, but the file contains no encoder biases."
        )


_FINGERPRINTS = ("weights_fingerprint", "tokenizer_fingerprint")


def _check_metadata(path: Path, metadata: dict[str, Any]) -> None:
    """What is read of a run's metadata must be of the kind that runs write. Raises UserError."""
    labels, metrics = metadata.get("labels", []), metadata.get("metrics", {})
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise UserError(f"{path}: labels is {printable(labels)}; expected a list of names.")
    if not isinstance(metrics, dict) or not all(isinstance(value, (int, float)) for value in metrics.values()):
        raise UserError(f"{path}: metrics is {printable(metrics)}; expected names with numbers.")
    lora = metadata.get("lora", {})
    scalings = lora.get("scalings", []) if isinstance(lora, dict) else None
    if not isinstance(scalings, list) or not all(is_positive_number(x, (int, float)) for x in scalings):
        raise UserError(f"{path}: lora is {printable(lora)}; expected scalings, a list of positive numbers, in it.")
    for key in ("task", "base_model", "base_fingerprint", "base_revision", "peft_type", *_FINGERPRINTS):
        if not isinstance(metadata.get(key, ""), str) and not (key == "base_revision" and metadata[key] is None):
            raise UserError(f"{path}: {key} is {printable(metadata[key])}; expected a string.")


def check_values(adapter: Adapter) -> None:
    """Raise UserError, naming a tensor, if not all that an adapter holds are finite floating-point numbers."""
    state = adapter.state | {f"{name}.weight": tensor for name, tensor in adapter.base_weights.items()}
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            raise UserError(f"{adapter.source}: {name} holds {tensor.dtype}; expected floating-point numbers.")
    if broken := not_finite(state):
        raise UserError(
            f"{adapter.source}: {len(broken)} of its {len(state)} tensors are not finite (NaN or infinity), "
            f"{broken[0]} first: its training diverged, or the file is damaged.\n"
            "Take an earlier checkpoint, or train again with a lower --learning_rate."
        )
