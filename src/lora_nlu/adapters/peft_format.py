"""PEFT's adapter_config.json: written, checked, read."""

import re
from pathlib import Path
from statistics import mode
from typing import Any

from lora_nlu.adapters.adapter import DEFAULT_MODULES, Adapter, encoder_prefix, is_positive_number
from lora_nlu.adapters.patterns import check_pattern
from lora_nlu.errors import UserError, printable
from lora_nlu.files import check_json
from lora_nlu.methods.description import method_of_config
from lora_nlu.methods.method import Method
from lora_nlu.methods.table import METHODS

LORA_KEY = re.compile(r"\.lora_[AB]$")
PEFT_PREFIX = "base_model.model."
# The modules that PEFT adapts with target_modules "all-linear"
_ALL_LINEAR = [*DEFAULT_MODULES, "key", "key_proj", "pos_key_proj", "pos_query_proj", "embed_proj", "dense"]
# Settings of an adapter_config.json that are read, or that don't change what a trained adapter computes
SUPPORTED_SETTINGS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying", "eva_config",
    "exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha",
    "lora_dropout", "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r",
    "rank_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_rslora",
}  # fmt: skip
_RELATIVE_QUERY = "lora_relative_query"  # ours, beside the type that PEFT refuses: "key", or not there for none
_MODULE_PATTERNS = ("target_modules", "exclude_modules", "layers_pattern")  # a list of names, or a regular expression
_SUPPORTED_INITS = ("gaussian", "orthogonal", "eva", "mica")  # init_lora_weights that leave the base weights unchanged


def peft_config(adapter: Adapter) -> dict[str, Any]:
    """The `adapter_config.json` with which PEFT builds the layers of an adapter and expects its tensors."""
    if not adapter.row.peft_types:
        raise ValueError(f"{adapter.row.label} trains the complete model, which is no adapter: use save_pretrained.")
    config = {
        "peft_type": adapter.row.peft_types[adapter.frozen_relative_query],
        "task_type": "FEATURE_EXTRACTION" if adapter.is_bare else "SEQ_CLS",
        "base_model_name_or_path": adapter.metadata.get("base_model"),
    }
    config |= _update_settings(adapter) if adapter.row.has_ranks else {}
    config |= {_RELATIVE_QUERY: "key"} if adapter.relative_query == "key" else {}
    return config | (adapter.row.to_peft(adapter) if adapter.row.to_peft else {})


def _update_settings(adapter: Adapter) -> dict[str, Any]:
    """PEFT's settings of an adapter with updates of linear layers: where, how scaled, and what trains beside them."""
    ranks, prefix = adapter.ranks, "" if adapter.is_bare else f"{encoder_prefix(adapter)}."
    r, targets = mode(ranks.values()), adapter.targets
    if not isinstance(targets, str):
        targets = [target for target in targets if any(f".{name}".endswith(f".{target}") for name in ranks)]
    others = [name for name in adapter.state if not re.search(str(adapter.row.added), name)]
    head = {name.split(".")[0] for name in others if not name.startswith(prefix)}
    modules = {name.rpartition(".")[0] for name in others if name.startswith(prefix) and not name.endswith(".bias")}
    biases = any(name.startswith(prefix) and name.endswith(".bias") for name in others)
    has_alpha = adapter.row.has_alpha
    of_pairs = {
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != r},
        "alpha_pattern": adapter.alpha_pattern,
        "use_rslora": adapter.use_rslora,
    }
    return {
        "r": r,
        **({"lora_alpha": adapter.lora_alpha, "lora_dropout": adapter.lora_dropout} if has_alpha else {}),
        "bias": "all" if biases else "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": targets,
        "modules_to_save": sorted(head | modules),
        **(of_pairs if has_alpha else {}),
    }


def to_peft_key(adapter: Adapter, name: str) -> str:
    """PEFT's key in `adapter_model.safetensors` of a parameter of ours."""
    layer = name.removesuffix(".bias")
    if adapter.row.peft_weights and re.search(adapter.row.peft_weights, name):
        name = f"{name}.weight"
    elif layer != name and layer in adapter.ranks:
        name = f"{layer}.base_layer.bias"
    return f"{PEFT_PREFIX}{name}"


def from_peft_key(key: str) -> str:
    """The name of the parameter that a key in a folder's file of weights stands for."""
    name = re.sub(r"\.(base_layer|modules_to_save(\.default)?)\.", ".", key.removeprefix(PEFT_PREFIX))
    return re.sub(r"(\.lora_[AB])\.weight$", r"\1", name)


def peft_fields(config: dict[str, Any], recorded_method: str | None = None) -> dict[str, Any]:
    """The fields of `Adapter` that a checked `adapter_config.json` sets; recorded_method: in the run's metadata."""
    row = method_of_config(config, recorded_method) or METHODS["lora"]
    fields: dict[str, Any] = {"method": row.name}
    is_refused = config["peft_type"] in row.peft_types[1:]  # by PEFT, which would apply an update there
    if row.has_ranks:
        fields |= {
            "relative_query": config.get(_RELATIVE_QUERY, "none") if is_refused else "both",
            "targets": adapted_modules(config),
        }
    if row.has_alpha:
        fields |= {
            "lora_alpha": config["lora_alpha"],
            "alpha_pattern": config.get("alpha_pattern") or {},
            "use_rslora": bool(config.get("use_rslora")),
            "lora_dropout": config.get("lora_dropout") or 0.0,
        }
    return fields | (row.from_peft(config) if row.from_peft else {})


def adapted_modules(config: dict[str, Any]) -> list[str] | str:
    """The layers that an `adapter_config.json` adapts, as names or, where it excludes some, as one pattern."""
    targets, layers, excluded = (config.get(k) for k in ("target_modules", "layers_to_transform", "exclude_modules"))
    targets = DEFAULT_MODULES if targets is None else _ALL_LINEAR if targets == "all-linear" else targets
    if layers in (None, []) and not excluded:
        return targets
    pattern = f"(?:{_module_pattern(targets)})"
    if layers not in (None, []):
        names = config.get("layers_pattern") or "[^.]*"
        stacks = names if isinstance(names, str) else "|".join(names)
        numbers = "|".join(map(str, layers if isinstance(layers, list) else [layers]))
        pattern = rf"(?=(?:|.*?\.)(?:{stacks})\.(?:{numbers})\.){pattern}"
    return f"(?!(?:{_module_pattern(excluded)})$){pattern}" if excluded else pattern


def _module_pattern(names: list[str] | str) -> str:
    """A pattern of the modules whose names, or the ends of whose names, are these; a pattern is returned as it is."""
    return names if isinstance(names, str) else rf"(?:.*\.)?(?:{'|'.join(map(re.escape, names))})"


def check_peft_config(path: Path, config: dict[str, Any], recorded_method: str | None = None) -> None:
    """Refuse, by name, each setting of PEFT with which this model would compute something else. Raises UserError.

    recorded_method: as in `peft_fields`.
    """
    kind, row = config.get("peft_type"), method_of_config(config, recorded_method)
    if row is None:
        types = ", ".join(dict.fromkeys(other.peft_types[0] for other in METHODS.values() if other.in_peft))
        raise UserError(f"{path}: peft_type is {printable(kind)}; of PEFT's types these are supported: {types}.")
    if not row.has_ranks:
        return
    _check_settings(path, config, row)
    _check_patterns(path, config)
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init not in (*_SUPPORTED_INITS, *row.peft_inits):  # OLoRA and others
        raise UserError(f"{path}: init_lora_weights={printable(init)} is not supported: it changes the base weights.")
    for key, value in config.items():
        is_ours = key == _RELATIVE_QUERY and value == "key" and kind in row.peft_types[1:]
        if value and key not in (*SUPPORTED_SETTINGS, *row.peft_keys, *row.peft_settings) and not is_ours:
            raise UserError(f"{path}: {printable(key)}={printable(value)} is not supported.")


def _check_settings(path: Path, config: dict[str, Any], row: Method) -> None:
    """Every setting that is read must have a type and a value that PEFT writes."""
    p, layers = config.get("lora_dropout") or 0.0, config.get("layers_to_transform")
    numbers = layers if isinstance(layers, list) else [layers or 0]
    check_json(path, config, [
        ("lora_dropout", isinstance(p, (int, float)) and 0 <= p <= 1, "a number from 0 to 1"),
        # without one of these two PEFT would take its default of 8
        ("r", is_positive_number(config.get("r"), int), "a positive integer"),
        ("lora_alpha", not row.has_alpha or is_positive_number(config.get("lora_alpha"), (int, float)),
         "a positive number"),
        ("layers_to_transform", all(type(number) is int and number >= 0 for number in numbers), "layer numbers"),
        *((key, isinstance(config.get(key) or "", str), "a string") for key in ("base_model_name_or_path", "revision")),
        *((key, isinstance(config.get(key), bool), "False, True") for key in row.peft_keys),
        ("use_rslora", isinstance(config.get("use_rslora"), bool | None), "False, True"),
        ("bias", config.get("bias") in (None, "none", "all", "lora_only"), "none, all, lora_only"),
    ])  # fmt: skip
    for key in _MODULE_PATTERNS:
        names = config.get(key)
        is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
        if names is not None and not isinstance(names, str) and not is_list:
            raise UserError(f"{path}: {key} is neither a list of names nor a pattern.")


def _check_patterns(path: Path, config: dict[str, Any]) -> None:
    """Every regular expression in a config must be one that can be matched here."""
    patterns = [(key, config[key]) for key in _MODULE_PATTERNS if isinstance(config.get(key), str)]
    if isinstance(names := config.get("layers_pattern"), list):
        patterns += [("layers_pattern", name) for name in names]
    for key in ("rank_pattern", "alpha_pattern"):
        numbers = config.get(key) or {}
        if not isinstance(numbers, dict) or not all(is_positive_number(n, (int, float)) for n in numbers.values()):
            raise UserError(f"{path}: {key} is no map from names to positive numbers.")
        patterns += [(key, pattern) for pattern in numbers]
    if sum(100 + len(pattern) for _, pattern in patterns) > 500_000:  # of 2,000 layers by name: half of that
        raise UserError(f"{path}: contains {len(patterns)} patterns of names, too many or too long to read.")
    for key, pattern in patterns:
        try:
            check_pattern(pattern, ends_name=key not in _MODULE_PATTERNS)
        except ValueError as e:
            raise UserError(f"{path}: {key}: {printable(pattern)} is not a valid pattern ({printable(e)}).") from e
