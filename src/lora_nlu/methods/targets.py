"""The names of the layers that methods change, and the settings that say which: as text, in a list, in module names."""

from collections.abc import Iterable
from typing import Any, TypeGuard

from lora_nlu.errors import UsageError

# The dense layers of an encoder layer as --lora_target_modules names them: the paper's W_q, W_k, W_v, W_o, and the two
# of the feed-forward.
TARGETS = ("query", "key", "value", "dense", "intermediate", "output")
DEFAULT_TARGETS = ("query", "value")
# Which of the relative positions' projections of a DeBERTa have an update that they share with tokens
RELATIVE_QUERY = ("none", "key", "both")


def is_number(value: Any, kind: Any = int | float) -> TypeGuard[float]:
    """Whether a value is of this kind of number; True and False are none."""
    return isinstance(value, kind) and not isinstance(value, bool)


def as_list(value: Any) -> list[Any]:
    """The elements of a list, range or other iterable; of a string or a single value, a list of it alone."""
    return [*value] if isinstance(value, Iterable) and not isinstance(value, str) else [value]


def target_names(names: Any) -> list[str]:
    """The `TARGETS` that a list or text with commas names, in order; `query_proj` is `query`. Raises ValueError."""
    parts = names.split(",") if isinstance(names, str) else as_list(names)
    targets = [str(part).strip().removesuffix("_proj") for part in parts] or [""]
    if unknown := [target for target in targets if target not in TARGETS]:
        raise ValueError(f"{unknown[0]!r} is none of {', '.join(TARGETS)}.")
    return [target for target in TARGETS if target in targets]


def parse_targets(flag: str, text: str, config: Any) -> list[str]:
    """`query,value` to names of `TARGETS`, in their order; `query_proj` means `query`. Raises UsageError."""
    try:
        return target_names(text)
    except ValueError as e:
        raise UsageError(f"--{flag} {text}: {e}") from e


def parse_relative_query(flag: str, text: str, config: Any) -> str | bool:
    """One of `RELATIVE_QUERY`, or true or false as before there were three; "both" is True. Raises UsageError."""
    value = {"true": "both", "false": "none"}.get(text.lower(), text.lower())
    if value not in RELATIVE_QUERY:
        raise UsageError(f"--{flag} {text}: choose from none, key and both.")
    return True if value == "both" else value


def parse_layers(flag: str, text: str, config: Any) -> list[int]:
    """`0-3,11` to the numbers of those of the config's encoder layers, from 0. Raises UsageError."""
    numbers: set[int] = set()
    count = config.num_hidden_layers
    for part in text.split(","):
        first, dash, last = (word.strip() for word in part.partition("-"))
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
            raise UsageError(f"--{flag} {text}: give numbers and ranges from 0, such as 0-3,{count - 1}.")
        if int(last) >= count:
            raise UsageError(f"--{flag} {text}: the model has {count} layers, 0 to {count - 1}.")
        numbers |= set(range(int(first), int(last) + 1))
    return sorted(numbers)


def target_of(name: str) -> str:
    """Which of the `TARGETS` a layer is, by its name in a model; its own name for one outside the encoder's layers."""
    module = name.partition(".layer.")[2].partition(".")[2].removesuffix("_proj")
    return {
        "attention.self.query": "query", "attention.self.key": "key", "attention.self.value": "value",
        "attention.output.dense": "dense", "intermediate.dense": "intermediate", "output.dense": "output",
    }.get(module, name)  # fmt: skip


def targets_and_layers(names: Iterable[str]) -> tuple[list[str], list[int]]:
    """The targets, in the order of `TARGETS`, and the numbers of the encoder layers that these module names are in."""
    names = list(names)
    found = {target_of(name) for name in names}
    numbers = {name.partition(".layer.")[2].partition(".")[0] for name in names} - {""}
    return sorted(found, key=lambda t: (TARGETS.index(t) if t in TARGETS else 9, t)), sorted(map(int, numbers))
