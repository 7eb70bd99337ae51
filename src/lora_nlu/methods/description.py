"""The settings of a config that say what trains, and the names of the layers they are about."""

import math
import re
from collections.abc import Iterable
from typing import Any, TypeGuard

# The dense layers of an encoder layer as --lora_target_modules names them: the paper's W_q, W_k, W_v, W_o, and the two
# of the feed-forward.
TARGETS = ("query", "key", "value", "dense", "intermediate", "output")
DEFAULT_TARGETS = ("query", "value")
# The settings of a config that have no effect without `apply_lora`.
LORA_SETTINGS = ("lora_r", "lora_alpha", "lora_target_modules", "lora_layers", "lora_dropout")
ADAPTER_TYPES = ("houlsby", "pfeiffer")
SETTINGS = (
    "apply_lora", *LORA_SETTINGS, "lora_relative_query",
    "apply_bitfit", "apply_adapter", "adapter_type", "adapter_size", "head_only",
)  # fmt: skip
LORA_KEY = re.compile(r"\.lora_[AB]$")
BOTTLENECK_KEY = re.compile(r"\.adapter_[AB]\.(weight|bias)$")
_ADDED = re.compile(f"{LORA_KEY.pattern}|{BOTTLENECK_KEY.pattern}")
# What each method trains in the encoder
TRAINED_NAMES = {"lora": LORA_KEY, "houlsby": BOTTLENECK_KEY, "pfeiffer": BOTTLENECK_KEY, "bitfit": re.compile("bias$")}


def check_lora(config: Any) -> None:
    """Raise ValueError, naming the setting, if the LoRA settings of a config are incomplete or invalid.

    A config without `apply_lora` must have no `LORA_SETTINGS`; with `apply_lora=False` they are ignored (a merged
    model's config keeps them).
    """
    settings = {name: value for name in LORA_SETTINGS if (value := getattr(config, name, None)) is not None}
    if not getattr(config, "apply_lora", False):
        if settings and not hasattr(config, "apply_lora"):
            first = next(iter(settings))
            raise ValueError(
                f"config.{first} has no effect without apply_lora. Set apply_lora=True, or remove {first}."
            )
        return
    r, alpha, p = (settings.get(name) for name in ("lora_r", "lora_alpha", "lora_dropout"))
    if not is_number(r, int) or r < 0:
        raise ValueError(f"config.lora_r {r!r}: apply_lora=True needs a rank of 1 or more (0 is no LoRA).")
    if r and not (is_number(alpha) and math.isfinite(alpha)):
        raise ValueError(
            f"config.lora_alpha {alpha!r}: apply_lora=True needs a number: the scaling is lora_alpha / lora_r."
        )
    if p is not None and not (is_number(p) and 0 <= p < 1):
        raise ValueError(f"config.lora_dropout {p!r}: give a number from 0 to below 1.")
    if (names := settings.get("lora_target_modules")) is not None:
        try:
            target_names(names)
        except ValueError as e:
            raise ValueError(f"config.lora_target_modules {names!r}: {e}") from e
    if (numbers := settings.get("lora_layers")) is not None:
        count, numbers_list = config.num_hidden_layers, as_list(numbers)
        if not numbers_list or not all(is_number(n, int) and 0 <= n < count for n in numbers_list):
            raise ValueError(
                f"config.lora_layers {numbers!r}: the model has {count} layers, 0 to {count - 1}; "
                "give one or more of these numbers."
            )


def is_number(value: Any, kind: Any = int | float) -> TypeGuard[float]:
    """Whether a value is of this kind of number; True and False are none."""
    return isinstance(value, kind) and not isinstance(value, bool)


def as_list(value: Any) -> list[Any]:
    """The elements of a list, range or other iterable; of a string or a single value, a list of it alone."""
    return [*value] if isinstance(value, Iterable) and not isinstance(value, str) else [value]


def target_names(names: Any) -> list[str]:
    """The `TARGETS` named by an iterable or a comma-separated string, in their order; `query_proj` means `query`.

    Raises ValueError for the first name that is none of them, and for no name.
    """
    parts = names.split(",") if isinstance(names, str) else as_list(names)
    targets = [str(part).strip().removesuffix("_proj") for part in parts] or [""]
    if unknown := [target for target in targets if target not in TARGETS]:
        raise ValueError(f"{unknown[0]!r} is none of {', '.join(TARGETS)}.")
    return [target for target in TARGETS if target in targets]


def target_of(name: str) -> str:
    """Which of the `TARGETS` a layer is, by its name in a model; its own name for one outside the encoder's layers."""
    module = name.partition(".layer.")[2].partition(".")[2].removesuffix("_proj")
    return {
        "attention.self.query": "query",
        "attention.self.key": "key",
        "attention.self.value": "value",
        "attention.output.dense": "dense",
        "intermediate.dense": "intermediate",
        "output.dense": "output",
    }.get(module, name)


def targets_and_layers(names: Iterable[str]) -> tuple[list[str], list[int]]:
    """The targets, in the order of `TARGETS`, and the numbers of the encoder layers that these module names are in."""
    names = list(names)
    found = {target_of(name) for name in names}
    numbers = {name.partition(".layer.")[2].partition(".")[0] for name in names} - {""}
    return sorted(found, key=lambda t: (TARGETS.index(t) if t in TARGETS else 9, t)), sorted(map(int, numbers))


def lora_rank(config: Any) -> int:
    """`config.lora_r` where `config.apply_lora` is set, else 0: a plain checkpoint's config has neither."""
    return (getattr(config, "lora_r", 0) or 0) if getattr(config, "apply_lora", False) else 0


def set_method(config: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Give a config these `SETTINGS`, and no other that its checkpoint was saved with; those are returned."""
    saved = {name: config.__dict__.pop(name) for name in SETTINGS if name in config.__dict__}
    applies = settings.get("apply_lora") and settings.get("lora_r") != 0  # rank 0 is plain fine-tuning
    for name in SETTINGS:
        is_set = settings.get(name) or (name == "lora_layers" and settings.get(name) == 0)  # 0: the first layer
        if is_set and (applies or name not in ("apply_lora", *LORA_SETTINGS)):
            setattr(config, name, settings[name])
    return saved


def is_added(name: str) -> bool:
    """Whether a parameter of this name is what LoRA or a bottleneck adds to an encoder."""
    return _ADDED.search(name) is not None
