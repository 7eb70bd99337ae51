"""What trains in a model, read from its config in one place; the methods' flags, checked and put into a config."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lora_nlu.errors import UsageError
from lora_nlu.methods.method import Flag, Method
from lora_nlu.methods.table import METHODS
from lora_nlu.methods.targets import DEFAULT_TARGETS


@dataclass(frozen=True)
class Description:
    """What trains in a model beside its head.

    methods:   names of those that the config chooses, the one that names the model first: ("lora", "bitfit").
    rank, alpha, use_rslora, targets, layers, dropout: of updates of linear layers. The scaling is alpha / rank, with
               use_rslora alpha / sqrt(rank); layers None are all. A rank of 0 is no update.
    adapter_size: width of bottlenecks; 0 without any.
    relative_query: whether a DeBERTa's relative positions go through the update of a projection shared with tokens.
    settings:  the methods' settings by name, as the config has them.
    """

    methods: tuple[str, ...] = ("full",)
    rank: int = 0
    alpha: float = 0.0
    use_rslora: bool = False
    targets: tuple[str, ...] = DEFAULT_TARGETS
    layers: tuple[int, ...] | None = None
    dropout: float = 0.0
    adapter_size: int = 0
    relative_query: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def method(self) -> str:
        """The name of the model's method."""
        return self.methods[0]

    @property
    def rows(self) -> list[Method]:
        return [METHODS[name] for name in self.methods]

    def updates(self, target: str, layer: int) -> bool:
        """Whether this one of the `TARGETS` of this encoder layer has an update."""
        return bool(self.rank) and target in self.targets and (self.layers is None or layer in self.layers)


def description_of(config: Any) -> Description:
    """What the attributes of a config say of what trains; a plain checkpoint's config has none of them.

    Raises ValueError, naming the attribute, for a setting that is invalid, missing or without effect.
    """
    values, fields = vars(config), {}
    for row in METHODS.values():
        names = [flag.name for flag in row.flags if flag.in_config and not flag.always]
        stray = next((name for name in names if values.get(name) is not None), None)
        if stray and row.switch not in values:
            raise ValueError(
                f"config.{stray} has no effect without {row.switch}. Set {row.switch}=True, or remove {stray}."
            )
        if _is_on(row, values) and (read := row.read(config) if row.read else {}) is not None:
            fields[row.name] = read
    names = _most_specific([*fields])
    read = {key: value for name in names for key, value in fields[name].items()}
    settings = {name: values[name] for name in setting_names(names) if name in values}
    return Description(tuple(names) or ("full",), **read, relative_query=relative_query(config), settings=settings)


def relative_query(config: Any) -> bool:
    """Whether the relative positions' query (and key) go through the update of a projection they share with tokens."""
    return bool(getattr(config, "lora_relative_query", False))


def _is_on(row: Method, values: Mapping[str, Any]) -> bool:
    """Whether a config's attributes choose a method. Raises ValueError if its switch is on and no method is chosen."""
    if not row.switch or not values.get(row.switch):
        return False
    rows = [other for other in METHODS.values() if other.switch == row.switch]
    on = [other for other in rows if all(values.get(name) == x for name, x in [*other.chosen_by.items()][1:])]
    if not on:
        name = [*row.chosen_by][1]
        choices = " or ".join(str(other.chosen_by[name]) for other in rows if name in other.chosen_by)
        raise ValueError(f"config.{name} {values.get(name)!r}: choose {choices}.")
    return row in on


def _most_specific(names: Iterable[str]) -> list[str]:
    """Those of some methods whose settings are not all among another's of them."""
    items = {name: METHODS[name].chosen_by.items() for name in names}
    return [name for name, mine in items.items() if not any(mine < other for other in items.values())]


def methods_in(model: Any) -> list[Method]:
    """The methods that a model has: by its modules, and those without modules of their own by its config."""
    names = {getattr(module, "method", None) for module in model.modules()}
    names |= {row.name for row in description_of(model.config).rows if row.freezes and not row.added}
    return [METHODS[name] for name in _most_specific(n for n in METHODS if n in names)] or [METHODS["full"]]


def method_of(model: Any) -> Method:
    """The method that names a model: the first of those that it has."""
    return methods_in(model)[0]


def setting_names(methods: Iterable[str] | None = None) -> list[str]:
    """The config's attributes that these methods read, or all of them do."""
    rows = METHODS.values() if methods is None else [METHODS[name] for name in methods]
    flags = dict.fromkeys(flag.name for row in rows for flag in row.flags if flag.in_config)
    return [*dict.fromkeys([*flags, *(name for row in rows for name in row.settings)])]


def added_patterns() -> list[str]:
    """Patterns of the names of parameters that methods add to an encoder."""
    return [row.added for row in METHODS.values() if row.added]


def flags_that_add(tensors: Mapping[str, bool]) -> str:
    """The flags of a method that adds just those of some tensors that are True; "" if there is none."""
    for row in METHODS.values():
        if row.added and all(bool(re.search(row.added, name)) == there for name, there in tensors.items()):
            return " ".join(f"--{name} {value}" for name, value in [*row.chosen_by.items()][1:])
    return ""


def deciding_flags(name: str) -> list[Flag]:
    """The flags that decide what a tensor of this name, which a method added, computes."""
    row = next(row for row in METHODS.values() if row.added and re.search(row.added, name))
    return [flag for flag in row.flags if flag.decides]


def method_of_config(config: Mapping[str, Any]) -> Method | None:
    """The method of a folder by its adapter_config.json; None if it is none of the table's."""
    rows = [row for row in METHODS.values() if config.get("peft_type") in row.peft_types]
    return next(
        (row for row in sorted(rows, key=lambda row: not row.peft_keys) if all(map(config.get, row.peft_keys))), None
    )


def is_added(name: str) -> bool:
    """Whether a parameter of this name is what a method adds to an encoder."""
    return any(re.search(pattern, name) for pattern in added_patterns())


def set_method(config: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Give a config these settings, and no other that its checkpoint was saved with; those are returned.

    Settings of a method that is off, or with which it would train nothing (rank 0), are left out.
    """
    saved = {name: vars(config).pop(name) for name in setting_names() if name in vars(config)}
    flags = {flag.name: flag for flag in method_flags() if flag.in_config}
    for name, flag in flags.items():
        value = settings.get(name)
        switches = [row.switch for row in METHODS.values() if flag in row.flags]
        is_set = value or (value == 0 and flag.kind in (int, str))  # a rank, or the number of the first layer
        if is_set and (flag.always or any(settings.get(switch) for switch in switches)):
            setattr(config, name, value)
    for row in METHODS.values():
        if row.read and _is_on(row, vars(config)) and row.read(config) is None:
            for flag in row.flags:
                if not flag.always:
                    vars(config).pop(flag.name, None)
    return saved


# ------------------------------------------------------------------------------------------------------------- flags


def method_flags() -> list[Flag]:
    """The flags of all methods, each once."""
    return [*{flag.name: flag for row in METHODS.values() for flag in row.flags}.values()]


def settings_of_flags(flags: Any, config: Any) -> dict[str, Any]:
    """The values of the methods' flags as a config gets them, by name. Raises UsageError."""
    values = {flag: getattr(flags, flag.name) for flag in method_flags() if flag.in_config}
    return {f.name: f.parse(f.name, x, config) if f.parse and x is not None else x for f, x in values.items()}


def methods_of_flags(flags: Any) -> list[Method]:
    """The methods whose switch is on."""
    return [row for row in METHODS.values() if row.switch and getattr(flags, row.switch)]


def contradicts(flags: Any, method: str) -> bool:
    """Whether the flags name other methods than that of an adapter."""
    row, on = METHODS[method], methods_of_flags(flags)
    alone = all(other is row or other.path_flag != row.path_flag for other in METHODS.values())
    if on and row not in on and not alone:
        return True
    for flag in method_flags():
        owners = [other for other in METHODS.values() if flag in other.flags]
        value = getattr(flags, flag.name)
        if not flag.in_config or flag.always or value == flag.default:
            continue
        if row in owners and value != row.chosen_by.get(flag.name, value):
            return True
        if row not in owners and not any(owner in on for owner in owners):
            return True
    return False


def check_flags(flags: Any) -> None:
    """One method at a time, with the flags it needs and no other's. Raises UsageError."""
    on = methods_of_flags(flags)
    for row in on:
        if row.missing and not getattr(flags, row.path_flag) and (text := row.missing(flags)):
            raise UsageError(text)
    owners: dict[str, list[Method]] = {}
    for row in METHODS.values():
        for name in (row.switch, row.path_flag):
            if getattr(flags, name, None) and name in {flag.name for flag in row.flags}:
                owners.setdefault(name, []).append(row)
    for name, rows in owners.items():
        for other, others in owners.items():
            pairs = [(a, b) for a in rows for b in others]
            together = any(
                a is b or (a.switch == name and b.name in a.beside) or (b.switch == other and a.name in b.beside)
                for a, b in pairs
            )
            if not together:
                raise UsageError(f"--{name} and --{other}: choose one of them.")
    for flag in method_flags():
        rows = [row for row in METHODS.values() if flag in row.flags]
        is_set = flag.in_config and not flag.always and getattr(flags, flag.name) != flag.default
        if is_set and not any(getattr(flags, row.switch) or getattr(flags, row.path_flag) for row in rows):
            switch = rows[0].switch
            raise UsageError(
                f"--{flag.name} has no effect without --{switch}. Add --{switch}, or remove --{flag.name}."
            )
