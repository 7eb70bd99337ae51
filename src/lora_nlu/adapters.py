"""What was trained, on disk: PEFT folders, the same for methods other than LoRA, and the published one-file layout.

A folder holds `adapter_config.json` and `adapter_model.safetensors`, which `peft.PeftModel.from_pretrained` loads as
they are, and `run_metadata.json` (task, label names, base model, seed) beside them. A published file is a flat state
dict saved by `torch.save`: `<module>.lora_A`, `<module>.lora_B` and the head, with no word of rank or alpha.

A DeBERTa trained as the reference does, with the relative positions' query frozen, is no LoRA model in PEFT's sense:
PEFT would apply the update there too. Its folder says so in `peft_type`, which PEFT then refuses to load. So do the
folders of BitFit, of bottleneck adapters and of a head alone (methods.py), which PEFT doesn't have.
"""

import hashlib
import math
import pickle
import re
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from errno import EINVAL
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from lora_nlu.errors import UserError, no_memory, shown
from lora_nlu.files import appearing, read_json, text_for_weights, write_json
from lora_nlu.labels import check_labels, head_order, last_layer, listed, placeholders, recorded_labels
from lora_nlu.lora import (
    LoRALinear,
    check_not_quantised,
    set_lora_,
    targets_and_layers,
    unmerge_lora_,
    unmerged_parameters,
)
from lora_nlu.methods import describe_method, mark_trainable, set_bottlenecks_
from lora_nlu.sharded import copy_into

CONFIG, WEIGHTS, METADATA = "adapter_config.json", "adapter_model.safetensors", "run_metadata.json"
_FILES = [CONFIG, METADATA, "adapter_model.*"]
_LORA, _LORA_FROZEN_RELATIVE_QUERY = "LORA", "LORA_FROZEN_RELATIVE_QUERY"  # peft_type; PEFT knows the first
_METHODS = {"BITFIT": "bitfit", "HOULSBY": "houlsby", "PFEIFFER": "pfeiffer", "HEAD": "head"}  # and none of these
_PEFT_PREFIX = "base_model.model."
_BARE = ("encoder.", "embeddings.")  # first parts of names in an encoder without classifier (FEATURE_EXTRACTION)
_ENCODERS = ("roberta.", "deberta.", *_BARE)  # of an encoder's names, with a classifier or without
_DENSE = r"(attention\.output|intermediate|output)\.dense"
# The layers that can have an update, by the first part of their names
LAYERS = {
    "roberta": re.compile(rf"roberta\.encoder\.layer\.\d+\.(attention\.self\.(query|key|value)|{_DENSE})"),
    "deberta": re.compile(
        rf"deberta\.encoder\.layer\.\d+\.(attention\.self\.(query|key|value|pos_key|pos_query)_proj|{_DENSE})"
        r"|deberta\.embeddings\.embed_proj"
    ),
}
# The modules that PEFT adapts without target_modules, and with "all-linear"
_DEFAULT_TARGETS = ["query", "value", "query_proj", "value_proj"]
_ALL_LINEAR = [*_DEFAULT_TARGETS, "key", "key_proj", "pos_key_proj", "pos_query_proj", "embed_proj", "dense"]
# Settings of an adapter_config.json that are read, and those that change nothing in what a trained adapter computes.
_HONOURED = {"peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights"}
_NEUTRAL = {
    "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying", "eva_config", "exclude_modules",
    "inference_mode", "layers_pattern", "layers_to_transform", "lora_dropout", "megatron_core", "modules_to_save",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type",
}  # fmt: skip
_STARTS = ("gaussian", "orthogonal", "eva", "mica")  # of init_lora_weights; they leave the base weights alone
_OTHER_HEADS = re.compile("TOKEN_CLS|QUESTION_ANS|ForTokenClassification|ForQuestionAnswering")
_OLD_WEIGHTS = "adapter_model.bin"  # as PEFT wrote it before safetensors
_WHOLE = "pytorch_model.bin"  # the reference implementation's checkpoints
_ENDING = r"(.*\.)?({})$"  # how PEFT matches the names in rank_pattern and alpha_pattern
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_LORA_KEY = re.compile(r"\.lora_[AB]$")
_BOTTLENECK_KEY = re.compile(r"\.adapter_[AB]\.(weight|bias)$")
_ADDED = re.compile(f"{_LORA_KEY.pattern}|{_BOTTLENECK_KEY.pattern}")
# What each method trains in the encoder
_TRAINED = {"lora": _LORA_KEY, "houlsby": _BOTTLENECK_KEY, "pfeiffer": _BOTTLENECK_KEY, "bitfit": re.compile("bias$")}


@dataclass(frozen=True)
class Adapter:
    """A saved adapter in memory: tensors by the model's own parameter names, and how the update is scaled.

    lora_alpha:             None where the file doesn't know it (a published `.bin`).
    alpha_pattern:          alpha of layers whose names match, as PEFT reads patterns; the others have lora_alpha.
    use_rslora:             the scaling is alpha / sqrt(r), not alpha / r.
    frozen_relative_query:  how a DeBERTa was trained (modeling_deberta_v2.py); a `.bin` is taken for the reference's.
    lora_dropout:           the dropout it was trained with; it changes nothing in what the adapter computes.
    targets:                names, or a pattern, of the layers that must have an update.
    base_weights:           weights of those layers in a checkpoint of a whole model, which may hold the update already.
    method:                 lora, or bitfit, houlsby, pfeiffer, head (methods.py): nothing of the above is theirs.
    """

    source: Path
    state: dict[str, Tensor]
    lora_alpha: float | None = None
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    frozen_relative_query: bool = False
    lora_dropout: float = 0.0
    targets: Sequence[str] | str = tuple(_DEFAULT_TARGETS)
    metadata: dict[str, Any] = field(default_factory=dict)
    base_weights: dict[str, Tensor] = field(default_factory=dict)
    method: str = "lora"

    @property
    def labels(self) -> tuple[str, ...] | None:
        """Label names in id order, () for regression, None where the file doesn't record them."""
        names = self.metadata.get("labels")
        return None if names is None else tuple(names)

    @property
    def label_count(self) -> int | None:
        """Rows of the head's last layer; None where there is no head."""
        last = last_layer(self.state)
        return None if last is None else len(torch.atleast_1d(self.state[f"{last}.weight"]))

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each layer with an update, by the layer's name."""
        suffix = ".lora_A"
        return {name.removesuffix(suffix): t.shape[0] for name, t in self.state.items() if name.endswith(suffix)}

    @property
    def is_bare(self) -> bool:
        """Whether it was trained on an encoder without classifier, `RobertaModel` or `DebertaV2Model`."""
        return any(name.startswith(_BARE) for name in self.state)

    @property
    def records_relative_query(self) -> bool:
        """Whether the file records how a DeBERTa's relative query was trained, which a `.bin` doesn't."""
        return self.lora_alpha is not None or not _is_deberta(self.state)

    @property
    def adapter_size(self) -> int | None:
        """Width of the bottleneck, where there is one."""
        return next((t.shape[0] for name, t in self.state.items() if name.endswith(".adapter_A.weight")), None)

    def alphas(self, lora_alpha: float | None = None) -> dict[str, float]:
        """The alpha of each layer with an update; `lora_alpha` is for a file that doesn't know its own.

        Raises UserError without either, or if they contradict each other.
        """
        if self.lora_alpha is None and lora_alpha is None:
            raise UserError(
                f"{self.source} doesn't say which lora_alpha it was trained with; another one gives wrong answers.\n"
                "Give --lora_alpha: 16 for the published RoBERTa files, 32 for the published DeBERTa ones."
            )
        if None not in (self.lora_alpha, lora_alpha) and self.lora_alpha != lora_alpha:
            raise UserError(f"{self.source}: was trained with lora_alpha {self.lora_alpha:g}, not {lora_alpha:g}.")
        known = lora_alpha if self.lora_alpha is None else self.lora_alpha
        if not _is_measure(known, (int, float)):
            raise UserError(f"{self.source}: --lora_alpha {known}: expected a positive number.")
        return {name: _by_pattern(self.alpha_pattern, name, known) for name in self.ranks}

    def scalings(self, lora_alpha: float | None = None) -> list[float]:
        """By what updates are scaled, each number once; `lora_alpha` and errors as `alphas` has them."""
        return sorted({scaling for _, scaling in self.layers(lora_alpha).values()})

    def layers(self, lora_alpha: float | None = None) -> dict[str, tuple[int, float]]:
        """(rank, scaling) of each layer with an update; `lora_alpha` and errors as `alphas` has them."""
        ranks, alphas = self.ranks, self.alphas(lora_alpha)
        roots = {name: math.sqrt(rank) if self.use_rslora else rank for name, rank in ranks.items()}
        return {name: (rank, alphas[name] / roots[name]) for name, rank in ranks.items()}


def _by_pattern(patterns: dict[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern that ends a module's name, as PEFT matches `rank_pattern` and `alpha_pattern`."""
    for pattern, value in patterns.items():
        if re.match(_ENDING.format(pattern), name):
            return value
    return default


def trained_state(model: Any, state_dict: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The parameters of `model` that train, from `state_dict` where a distributed engine has gathered one.

    A merged model's are those of the unmerged one.
    """
    state = unmerged_parameters(model) if state_dict is None else state_dict
    return {name: state[name] for name, parameter in model.named_parameters() if parameter.requires_grad}


def adapter_of(model: Any, metadata: dict[str, Any], state_dict: dict[str, Tensor] | None = None) -> Adapter:
    """What trains in a model whose encoder is frozen, but for its method's part, as the adapter that it is."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    if not layers:
        method = describe_method(model)["name"]
        return Adapter(Path(), trained_state(model, state_dict), metadata=metadata, method=method)
    alphas = {name: layer.lora_alpha for name, layer in layers.items()}
    alpha = _most_common(alphas.values())
    # A short name stands for every module that ends in it: only if all of those have an update.
    short = sorted({name.rpartition(".")[2] for name in layers})
    meant = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.rpartition(".")[2] in short]
    return Adapter(
        Path(),
        trained_state(model, state_dict),
        alpha,
        alpha_pattern={name: value for name, value in alphas.items() if value != alpha},
        frozen_relative_query=bool(getattr(model, "frozen_relative_query", False)),
        lora_dropout=max(layer.lora_dropout for layer in layers.values()),
        targets=short if len(meant) == len(layers) else sorted(layers),
        metadata=metadata,
    )


def save_adapter(
    model: Any, folder: Path | str, metadata: dict[str, Any], state_dict: dict[str, Tensor] | None = None
) -> None:
    """Write the trained parameters of a model as an adapter folder; each file appears whole or not at all."""
    write_adapter(adapter_of(model, metadata, state_dict), Path(folder))


def write_adapter(adapter: Adapter, folder: Path) -> None:
    """Write an adapter, a LoRA one with its alpha, as a folder; each file appears complete or not at all.

    The metadata gets the kind and a hash of the weights, by which files of two runs in one folder are found out.
    """
    tensors = {}
    for name, tensor in adapter.state.items():
        layer = name.removesuffix(".bias")
        if _LORA_KEY.search(name):
            name = f"{name}.weight"
        elif layer != name and layer in adapter.ranks:
            name = f"{layer}.base_layer.bias"
        tensors[f"{_PEFT_PREFIX}{name}"] = tensor.detach().cpu().contiguous()
    config = _peft_config(adapter)
    folder.mkdir(parents=True, exist_ok=True)
    with appearing(folder / WEIGHTS) as partial:
        partial.write_bytes(save(tensors, metadata={"format": "pt"}))  # save_file would hide it from other users
    written = {"peft_type": config["peft_type"], "weights_fingerprint": fingerprint(adapter.state)}
    write_json(folder / METADATA, adapter.metadata | written)
    write_json(folder / CONFIG, config)


def _peft_config(adapter: Adapter) -> dict[str, Any]:
    """The `adapter_config.json` with which PEFT builds the layers of an adapter and expects its tensors."""
    common = {
        "task_type": "FEATURE_EXTRACTION" if adapter.is_bare else "SEQ_CLS",
        "base_model_name_or_path": adapter.metadata.get("base_model"),
    }
    if adapter.method != "lora":
        kind = next(kind for kind, method in _METHODS.items() if method == adapter.method)
        return {"peft_type": kind, **common}
    ranks, prefix = adapter.ranks, "" if adapter.is_bare else f"{encoder_prefix(adapter)}."
    r = _most_common(ranks.values())
    targets, trained_modules, biases = adapter.targets, set(), False
    if not isinstance(targets, str):
        targets = [target for target in targets if any(n == target or n.endswith(f".{target}") for n in ranks)]
    for name in adapter.state:
        if not _LORA_KEY.search(name):
            module, _, kind = name.rpartition(".")
            if not name.startswith(prefix):
                trained_modules.add(name.split(".")[0])
            elif kind == "bias":
                biases = True
            else:
                trained_modules.add(module)
    return {
        "peft_type": _LORA_FROZEN_RELATIVE_QUERY if adapter.frozen_relative_query else _LORA,
        **common,
        "r": r,
        "lora_alpha": adapter.lora_alpha,
        "lora_dropout": adapter.lora_dropout,
        "bias": "all" if biases else "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": targets,
        "modules_to_save": sorted(trained_modules),
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != r},
        "alpha_pattern": adapter.alpha_pattern,
        "use_rslora": adapter.use_rslora,
    }


def encoder_prefix(adapter: Adapter) -> str:
    """`roberta` or `deberta`: the first part of its layers' names; "" for a head alone and for a bare encoder."""
    return next((prefix for name in adapter.state if (prefix := name.split(".")[0]) in ("roberta", "deberta")), "")


def _is_deberta(names: Iterable[str]) -> bool:
    """Whether tensors of these names are of a DeBERTa; in a bare encoder its `query_proj`, ... tell."""
    return any(name.startswith("deberta.") or (name.startswith(_BARE) and "_proj." in name) for name in names)


def foreign_layer(adapter: Adapter) -> str | None:
    """The first layer with an update that the adapter's model, RoBERTa or DeBERTa-V2, lacks; None if it has all."""
    prefix, start, names = encoder_prefix(adapter), "", list(adapter.ranks)
    if adapter.is_bare:
        prefix = "deberta" if _is_deberta(adapter.state) else "roberta"
        start, names = f"{prefix}.", [name for name in names if name != "pooler.dense"]
    known = LAYERS.get(prefix)
    return next((name for name in names if known is None or not known.fullmatch(start + name)), None)


def _most_common(values: Iterable[Any]) -> Any:
    every = list(values)
    return max(every, key=every.count)


def fingerprint(state: dict[str, Tensor]) -> str:
    """A hash of tensors with their names, dtypes and shapes, whatever file they are in."""
    found = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def is_added(name: str) -> bool:
    """Whether a parameter of this name is what LoRA or a bottleneck adds to an encoder."""
    return _ADDED.search(name) is not None


@torch.no_grad()
def base_fingerprint(model: Any) -> str:
    """A hash of the encoder's frozen weights, from up to 64 numbers of each tensor: milliseconds for 1.5B parameters.

    The same in fp32 and bf16, merged or not. It tells one checkpoint from another, not from a copy with a few numbers
    changed.
    """
    samples, names = [], []
    for name, parameter in sorted(unmerged_parameters(model.base_model).items()):
        if not is_added(name):
            numbers = parameter.reshape(-1)
            samples.append(numbers[:: max(1, numbers.numel() // 64)][:64].to(torch.bfloat16))
            names.append(f"{name} {list(parameter.shape)}")
    sampled = torch.cat(samples).view(torch.int16).cpu().numpy().tobytes()
    return hashlib.sha256("\n".join(names).encode() + sampled).hexdigest()[:16]


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
        pattern = _TRAINED.get(adapter.method)
        trained = [n for n in adapter.state if pattern and pattern.search(n) and n.startswith(_ENCODERS)]
        if pattern and not trained:
            raise UserError(
                f"{adapter.source}: {CONFIG} says {adapter.method}, but the file contains no tensor that it trains."
            )
        if pattern == _BOTTLENECK_KEY and adapter.adapter_size is None:
            lacks = trained[0].replace("adapter_B", "adapter_A")
            raise UserError(f"{adapter.source}: not a complete adapter: the file lacks {lacks}.")
        return adapter
    layers = {name.rpartition(".")[0]: None for name in adapter.state if _LORA_KEY.search(name)}
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
    if any(name.startswith(_PEFT_PREFIX) for name in names):
        return f"holds PEFT's keys, which say nothing of rank and alpha. Give the folder with its {CONFIG}."
    if any(name.endswith(".word_embeddings.weight") for name in names):
        return "is a whole model, without LoRA. Give it as --model_name_or_path."
    return "no LoRA matrices (keys ending in lora_A, lora_B) in it."


def load_file_safely(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file or of a `torch.save`d state dict, on the CPU; runs no code from the file."""
    try:
        if text := text_for_weights(path):
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
        if no_memory(e):
            wrong = "there is not enough memory to read it"
        elif isinstance(e, OSError) and e.errno not in (None, EINVAL):  # how torch calls a file that is cut
            wrong = "can't be read"
        reason = shown(str(e).splitlines()[0] if str(e) else type(e).__name__, 150)
        raise UserError(f"{path}: {wrong} ({reason}).") from e
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) and isinstance(k, str) for k, t in state.items()):
        raise UserError(f"{path}: holds a {type(state).__name__} that is no state dict (names to tensors).")
    return _plain(path, state)


def _plain(path: Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state, if names can stand in a message and tensors are ordinary ones. Raises UserError."""
    for name, tensor in state.items():
        if not name.isprintable() or len(name) > 500:
            raise UserError(f"{path}: {shown(name)} is not a valid tensor name.")
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
                    f"{path}: damaged: {shown(broken)} in it is not what was saved, by its checksum or length."
                )


def _read_file(path: Path) -> Adapter:
    """A published file, or the reference implementation's checkpoint of a whole model: LoRA and head of it."""
    tensors = load_file_safely(path)
    state = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    if len(state) < len(tensors):
        raise UserError(f"{path}: contains some tensors twice, with and without the prefix 'module.'.")
    layers = [name.removesuffix(".lora_A") for name in state if name.endswith(".lora_A")]
    encoder = f"{layers[0].split('.')[0]}." if layers else ""
    base = {name for name in state if layers and name.startswith(encoder) and not _LORA_KEY.search(name)}
    frozen = _is_deberta(state)
    if not layers or not base >= {f"{layer}.weight" for layer in layers}:
        return Adapter(path, state, frozen_relative_query=frozen)
    kept = {name: tensor for name, tensor in state.items() if name not in base}
    weights = {layer: state[f"{layer}.weight"] for layer in layers}
    return Adapter(path, kept, frozen_relative_query=frozen, base_weights=weights)


def weights_in(source: Path) -> Path:
    """The file with an adapter's tensors: itself, or in its folder. Raises UserError if there is none."""
    is_adapter = (source / CONFIG).is_file()
    names = (WEIGHTS, _OLD_WEIGHTS) if is_adapter else (_WHOLE,)
    for path in [source] if source.is_file() else [source / name for name in names]:
        if path.is_file():
            return path
    if (source / "config.json").is_file() and [*source.glob("model*.safetensors")]:
        raise UserError(f"{source}: is a whole model, no adapter. Give it as --model_name_or_path.")
    raise UserError(f"{source}: holds no {CONFIG} with {WEIGHTS} (or {_OLD_WEIGHTS}).")


def _read_folder(folder: Path) -> Adapter:
    weights = weights_in(folder)
    if weights.name == _WHOLE:
        return _complete(_read_file(weights))
    config = read_json(folder / CONFIG)
    _check_peft_config(folder / CONFIG, config)
    metadata = read_json(folder / METADATA) if (folder / METADATA).is_file() else {}
    _check_metadata(folder / METADATA, metadata)
    state: dict[str, Tensor] = {}
    for key, tensor in load_file_safely(weights).items():
        if ".original_module." in key:
            continue  # PEFT's copy of a head that it replaced
        name = re.sub(r"\.(base_layer|modules_to_save(\.default)?)\.", ".", key.removeprefix(_PEFT_PREFIX))
        name = re.sub(r"(\.lora_[AB])\.weight$", r"\1", name)
        if ".lora_" in name and not _LORA_KEY.search(name):
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
    if config["peft_type"] in _METHODS:
        return _complete(Adapter(folder, state, metadata=metadata, method=_METHODS[config["peft_type"]]))
    _check_contents(folder, config, state)
    adapter = Adapter(
        folder,
        state,
        config["lora_alpha"],
        config.get("alpha_pattern") or {},
        bool(config.get("use_rslora")),
        config["peft_type"] == _LORA_FROZEN_RELATIVE_QUERY,
        config.get("lora_dropout") or 0.0,
        _targets(config),
        metadata,
    )
    for name, rank in _complete(adapter).ranks.items():
        if not _is_target(adapter, name):
            raise UserError(
                f"{folder}: contains {name}.lora_A, but {CONFIG} has no LoRA on that layer: the files don't match."
            )
        said = _by_pattern(config.get("rank_pattern") or {}, name, config["r"])
        if rank != said:
            raise UserError(
                f"{folder}: {name}.lora_A has rank {rank}, {CONFIG} says {said}: they don't belong together."
            )
    return adapter


def _check_written(adapter: Adapter, kind: str) -> None:
    """A folder's files must be those that were written together. Raises UserError; older metadata doesn't tell."""
    known, apart, remedy = adapter.metadata, "they don't belong together", "One of them was changed since: put"
    if known.get("peft_type", kind) != kind:
        raise UserError(
            f"{adapter.source}: {CONFIG} says {kind}, {METADATA} {shown(known['peft_type'])}: {apart}.\n"
            f"{remedy} peft_type back."
        )
    trained = known.get("lora", {}).get("scalings")
    if adapter.method == "lora" and trained is not None:
        has, had = (", ".join(f"{x:.6g}" for x in sorted(numbers)) for numbers in (adapter.scalings(), trained))
        if has != had:
            raise UserError(
                f"{adapter.source}: {CONFIG} scales the update by {has}, {METADATA} says it was trained with {had}: "
                f"{apart}.\n{remedy} lora_alpha, alpha_pattern and use_rslora back."
            )
    if known.get("weights_fingerprint", wanted := fingerprint(adapter.state)) != wanted:
        raise UserError(
            f"{adapter.source}: the weights are not those that {METADATA} was written with: {apart}, or are damaged.\n"
            "Take the whole folder from one place, or a checkpoint of the run. After an interrupted save, save it"
            " again: the same command does."
        )


def _check_contents(folder: Path, config: dict[str, Any], state: dict[str, Tensor]) -> None:
    """Head and biases must be what the config says they are. Raises UserError."""
    mapping = config.get("auto_mapping")
    model_class = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    for kind in (config.get("task_type"), model_class):
        if _OTHER_HEADS.search(str(kind)) and not all(name.startswith(_ENCODERS) for name in state):
            raise UserError(f"{folder}: was trained for {shown(kind)}; its head is not one of a sequence classifier.")
    biases = any(name.startswith(_ENCODERS) and name.endswith(".bias") for name in state)
    if config.get("bias") not in (None, "none") and not biases:
        raise UserError(f"{folder}: {CONFIG} has bias={config['bias']}, but the file contains no encoder biases.")


def _targets(config: dict[str, Any]) -> list[str] | str:
    """The layers that an `adapter_config.json` adapts, as names or, where it excludes some, as one pattern."""
    targets, layers, excluded = (config.get(k) for k in ("target_modules", "layers_to_transform", "exclude_modules"))
    targets = _DEFAULT_TARGETS if targets is None else _ALL_LINEAR if targets == "all-linear" else targets
    if layers in (None, []) and not excluded:
        return targets
    patterns = [names if isinstance(names, str) else _any_of(names) for names in (targets, excluded or [])]
    where = config.get("layers_pattern") or ["[^.]*"]
    stacks = "|".join([where] if isinstance(where, str) else where)
    numbers = "|".join(map(str, layers if isinstance(layers, list) else [layers]))
    within = rf"(?=(?:|.*?\.)(?:{stacks})\.(?:{numbers})\.)" if layers not in (None, []) else ""
    return f"(?!(?:{patterns[1]})$){within}(?:{patterns[0]})" if excluded else f"{within}(?:{patterns[0]})"


def _any_of(names: list[str]) -> str:
    """A pattern of the modules whose names, or the ends of whose names, are these."""
    return rf"(?:.*\.)?(?:{'|'.join(map(re.escape, names))})"


_FINGERPRINTS = ("weights_fingerprint", "tokenizer_fingerprint")


def _check_metadata(path: Path, metadata: dict[str, Any]) -> None:
    """What is read of a run's metadata must be of the kind that runs write. Raises UserError."""
    labels, metrics = metadata.get("labels", []), metadata.get("metrics", {})
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise UserError(f"{path}: labels is {shown(labels)}; expected a list of names.")
    if not isinstance(metrics, dict) or not all(isinstance(value, (int, float)) for value in metrics.values()):
        raise UserError(f"{path}: metrics is {shown(metrics)}; expected names with numbers.")
    lora = metadata.get("lora", {})
    scalings = lora.get("scalings", []) if isinstance(lora, dict) else None
    if not isinstance(scalings, list) or not all(_is_measure(x, (int, float)) for x in scalings):
        raise UserError(f"{path}: lora is {shown(lora)}; expected scalings, a list of positive numbers, in it.")
    for key in ("task", "base_model", "base_fingerprint", "base_revision", "peft_type", *_FINGERPRINTS):
        if not isinstance(metadata.get(key, ""), str) and not (key == "base_revision" and metadata[key] is None):
            raise UserError(f"{path}: {key} is {shown(metadata[key])}; expected a string.")


def _is_measure(value: Any, types: Any) -> bool:
    """A positive number that stays one in any arithmetic with ranks."""
    return isinstance(value, types) and not isinstance(value, bool) and 1e-12 <= value <= 1e12


def _check_peft_config(path: Path, config: dict[str, Any]) -> None:
    """Refuse, by name, what PEFT can say and this model would compute differently. Raises UserError."""
    kind = config.get("peft_type")
    if isinstance(kind, str) and kind in _METHODS:
        return
    if kind not in (_LORA, _LORA_FROZEN_RELATIVE_QUERY):
        raise UserError(f"{path}: peft_type is {shown(kind)}; LORA is the only PEFT type supported here.")
    p = config.get("lora_dropout") or 0.0
    if not isinstance(p, (int, float)) or not 0 <= p <= 1:
        raise UserError(f"{path}: lora_dropout is {shown(p)}; expected a number from 0 to 1.")
    for key, types in (("r", int), ("lora_alpha", (int, float))):
        if not _is_measure(config.get(key), types):  # without one PEFT would take its default of 8
            raise UserError(f"{path}: {key} is {shown(config.get(key))}; expected a positive number.")
    patterns = []
    for key in ("target_modules", "exclude_modules", "layers_pattern"):
        names = config.get(key)
        if isinstance(names, str):
            patterns.append((key, names))
        elif names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise UserError(f"{path}: {key} is neither a list of names nor a pattern.")
        elif key == "layers_pattern":
            patterns += [(key, name) for name in names or []]
    numbers = config.get("layers_to_transform")
    numbers = numbers if isinstance(numbers, list) else [numbers or 0]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise UserError(
            f"{path}: layers_to_transform is {shown(config['layers_to_transform'])}; expected layer numbers."
        )
    for key in ("base_model_name_or_path", "revision"):
        if not isinstance(config.get(key) or "", str):
            raise UserError(f"{path}: {key} is {shown(config[key])}; expected a string.")
    for key, values in (("use_rslora", (None, False, True)), ("bias", (None, "none", "all", "lora_only"))):
        if config.get(key) not in values or type(config.get(key)) is int:
            raise UserError(f"{path}: {key} is {shown(config[key])}; expected {', '.join(map(str, values[1:]))}.")
    for key in ("rank_pattern", "alpha_pattern"):
        given = config.get(key) or {}
        if not isinstance(given, dict) or not all(_is_measure(value, (int, float)) for value in given.values()):
            raise UserError(f"{path}: {key} is no map from names to positive numbers.")
        patterns += [(key, _ENDING.format(pattern)) for pattern in given]
    for key, pattern in patterns:
        try:
            if len(pattern) > 10_000:
                raise re.error("too long")
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as e:
            raise UserError(f"{path}: {key}: {shown(pattern)} is not a valid pattern ({shown(e)}).") from e
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start not in _STARTS:  # PiSSA, OLoRA and others change the base weights
        raise UserError(f"{path}: init_lora_weights={shown(start)} is not supported: it changes the base weights.")
    for key, value in config.items():
        if value and key not in _HONOURED | _NEUTRAL:
            raise UserError(f"{path}: {shown(key)}={shown(value)} is not supported.")


def head_rows(adapter: Adapter, labels: Sequence[str]) -> list[int] | None:
    """For each of `labels` the row of an adapter's head that tells it; None if it has no head for them."""
    if adapter.label_count is None:
        return None
    return head_order(adapter.source, adapter.label_count, adapter.labels, labels)[0]


def with_labels(adapter: Adapter, labels: Sequence[str] | None) -> Adapter:
    """The adapter with these label names recorded, if any."""
    return adapter if labels is None else replace(adapter, metadata=adapter.metadata | {"labels": [*labels]})


def head_names(model: Any) -> list[str]:
    """Names of the parameters outside the encoder; a bare encoder has none."""
    prefix = _encoder_prefix_in(model)
    return [name for name, _ in model.named_parameters() if not name.startswith(prefix)]


def _encoder_prefix_in(model: Any) -> str:
    """What the names of the encoder's parameters start with in a model: "roberta."; "" in a bare encoder."""
    return "" if model.base_model is model else f"{model.base_model_prefix}."


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
    reading = lora_relative_query if _is_deberta(adapter.state) and adapter.records_relative_query else None
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
            f"{adapter.source}: was trained on another base model: {shown(named)}, fingerprint {shown(made_for)}; "
            f"this one has {base}.\nGive that model as --model_name_or_path."
        )
    notes, given = [], model.config.name_or_path
    if made_for is None and named and given and not _same_name(named, given):
        notes.append(
            f"{adapter.source}: names {shown(named)} as its base model, but no fingerprint; it is loaded into {given}."
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
    """Make the LoRA layers of an adapter; returns (rank, scaling) of each. Raises UserError."""
    layers = adapter.layers(lora_alpha)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    targets = [name for name in linear if name.startswith(_encoder_prefix_in(model)) and _is_target(adapter, name)]
    missing, unexpected = ([f"{n}.lora_A" for n in a if n not in b] for a, b in ((targets, layers), (layers, linear)))
    if missing or unexpected:
        raise _other_model(adapter, model, missing, unexpected)
    set_lora_(model, layers)
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
        update = layers[name][1] * torch.matmul(*matrices)
        for merged, expected in ((False, base), (True, base + update)):
            distance = (weight.float() - expected).abs().max() / base.abs().max().clamp(min=1e-12)
            apart[merged] = max(apart[merged], distance.item())
    if min(apart.values()) > 1e-3:
        raise UserError(
            f"{adapter.source}: a checkpoint of a whole model, and its base weights are not this model's, with or "
            "without the update.\nGive the base model it was trained from, and the --lora_alpha it had."
        )
    return apart[True] < apart[False]


def not_finite(state: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or infinity, or what fp32 has no number for."""
    names = []
    for name, tensor in state.items():
        numbers = tensor.float() if tensor.is_floating_point() else tensor
        if not numbers.sum().isfinite() and not numbers.isfinite().all():  # the sum is the faster to look at
            names.append(name)
    return names


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
            f"{source}: its head has {count} outputs, but {METADATA} names {listed(trained)}: not the same run."
        )
    if not allow_new_head and count != n:
        raise UserError(f"{source}: its head has {count} labels, this task {n}: another task's adapter.")
    if not allow_new_head and wanted is not None:
        check_labels(source, trained, wanted)
    by_name = wanted is not None
    rows, note = head_order(source, count, trained if by_name else None, placeholders(n) if wanted is None else wanted)
    if rows is None:
        dropped = [name for name in head_names(model) if name in state and name.startswith("classifier.")]
        return {name: tensor for name, tensor in state.items() if name not in dropped}, dropped, [note]
    for name, tensor in adapter.state.items():
        if name.rpartition(".")[0] == last_layer(state) and len(torch.atleast_1d(tensor)) == count:
            state[name] = tensor[rows]
    return state, [], [note] if note and by_name else []


def _matched(
    model: Any, adapter: Adapter, allow_new_head: bool, labels: Sequence[str] | None = None
) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """The tensors to copy into a model, the names left behind and lines worth saying. Raises UserError."""
    source, head, parameters = adapter.source, head_names(model), dict(model.named_parameters())
    state, dropped, notes = _ordered_head(model, adapter, labels, allow_new_head)
    trained = _TRAINED.get(adapter.method)
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
        for name, (_, scaling) in adapter.layers().items():
            layer: Any = model.get_submodule(name)
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


def _is_target(adapter: Adapter, name: str) -> bool:
    """Whether PEFT's `target_modules` mean this layer: a list names it or its end, a string is a pattern of it."""
    if isinstance(adapter.targets, str):
        return re.fullmatch(adapter.targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in adapter.targets)


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
        f"Layers with {adapter.method}: {_layer_count(adapter.state)} in the file, {model.config.num_hidden_layers} in "
        f"the {model.config.model_type} model."
    )


def _layer_count(names: Iterable[str]) -> int:
    return len({match.group(1) for name in names if (match := re.search(r"\.layer\.(\d+)\.", name))})


if __name__ == "__main__":
    import sys

    from lora_nlu.convert import main  # it stands on this file

    sys.exit(main())
