"""What trains in a model, read from its config in one place; the methods' flags, checked and put into a config."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from lora_nlu.errors import UsageError
from lora_nlu.methods.method import Flag, Method
from lora_nlu.methods.table import METHODS
from lora_nlu.methods.targets import DEFAULT_TARGETS, RELATIVE_QUERY

# Which projections of a DeBERTa's relative positions leave out their update: by the setting lora_relative_query
_FROZEN = {"none": {"query", "key"}, "key": {"query"}, "both": set()}


@dataclass(frozen=True)
class Description:
    """What trains in a model beside its head.

    methods:   names of the methods that the config chooses, such as ("lora", "bitfit"); the first is the model's.
    rank, alpha, use_rslora, targets, layers, dropout: of updates of linear layers. The scaling is alpha / rank, with
               use_rslora alpha / sqrt(rank); layers None means all. With a rank of 0 there is no update.
    adapter_size: width of bottleneck adapters; 0 if there are none.
    relative_query: which of a DeBERTa's relative positions' projections, where they are shared with tokens, have their
               update: "none", "key" or "both".
    settings:  the methods' settings by name, as the config has them.
    shared:    what the layers of the model that is built from it share (VeRA's frozen matrices); of one model alone.
    """

    methods: tuple[str, ...] = ("full",)
    rank: int = 0
    alpha: float = 0.0
    use_rslora: bool = False
    targets: tuple[str, ...] = DEFAULT_TARGETS
    layers: tuple[int, ...] | None = None
    dropout: float = 0.0
    adapter_size: int = 0
    relative_query: str = "none"
    settings: Mapping[str, Any] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

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
    """What trains, from a config's attributes. Raises ValueError for an attribute that is invalid or has no effect."""
    names: list[str] = []
    fields: dict[str, Any] = {}
    # hasattr, not vars: a config class may have some of them as class attributes
    values = _renamed({name: getattr(config, name) for name in setting_names() if hasattr(config, name)})
    for row in METHODS.values():
        for flag in row.flags:
            if flag.in_config and not flag.always and values.get(flag.name) is not None and row.switch not in values:
                remedy = f"Set {row.switch}=True, or remove {flag.name}"
                raise ValueError(f"config.{flag.name} has no effect without {row.switch}. {remedy}.")
        if _is_chosen(row, values):
            settings = row.read(config) if row.read else {}
            if settings is not None:
                names.append(row.name)
                fields |= settings
        elif values.get(row.switch):
            _check_choice(row, values)
    settings = {name: values[name] for name in setting_names(names) if name in values}
    return Description(tuple(names) or ("full",), **fields, relative_query=relative_query(config), settings=settings)


def relative_query(config: Any) -> str:
    """The `RELATIVE_QUERY` of a config. Raises ValueError for another value."""
    value = getattr(config, "lora_relative_query", None)
    if value not in (None, False, True, *RELATIVE_QUERY):
        raise ValueError(f"config.lora_relative_query {value!r}: choose none, key or both.")
    return as_relative_query(value)


def as_relative_query(value: str | bool | None) -> str:
    """One of `RELATIVE_QUERY` from a setting or a record, where True is both, and False or None is none."""
    return value if isinstance(value, str) else "both" if value else "none"


def recorded_relative_query(value: str) -> str | bool:
    """One of `RELATIVE_QUERY` as configs and run metadata record it: False for none, True for both, or "key".

    False and True keep the format of files written before there was "key".
    """
    return value if value == "key" else value == "both"


def same_relative_query(value: str, updated: Iterable[str]) -> str:
    """The first of none, both and key that computes the same as `value` in a model with updates in these modules.

    updated: names of modules; only those that end in `query_proj` or `key_proj` count. Adapters record this value, so
    that equal ones have equal records: with an update of the query alone, none and key compute the same.
    """
    kinds = {kind for kind in ("query", "key") for name in updated if name.endswith(f"{kind}_proj")}
    return next(other for other in ("none", "both", "key") if _FROZEN[other] & kinds == _FROZEN[value] & kinds)


def _is_chosen(row: Method, values: Mapping[str, Any]) -> bool:
    """Whether a config's attributes choose a method: its switch is on, and the others have the row's values."""
    unset = {flag.name: flag.unset for flag in row.flags}
    others = [name for name in row.chosen_by if name != row.switch]
    return bool(values.get(row.switch)) and all(
        (unset[name] if values.get(name) is None else values[name]) == row.chosen_by[name] for name in others
    )


def _check_choice(row: Method, values: Mapping[str, Any]) -> None:
    """Check a config that turns on this row's switch but does not choose this row.

    Raises ValueError if it chooses no other row of that switch, or sets a flag of this row that the chosen row lacks.
    """
    rows = [other for other in METHODS.values() if other.switch == row.switch]
    chosen = next((other for other in rows if _is_chosen(other, values)), None)
    if chosen is None:
        name = [*row.chosen_by][1]
        choices = " or ".join(str(other.chosen_by[name]) for other in rows)
        raise ValueError(f"config.{name} {values.get(name)!r}: choose {choices}.")
    for flag in row.flags:
        if flag.in_config and flag not in chosen.flags and values.get(flag.name) is not None:
            raise ValueError(f"config.{flag.name} {_without_effect(flag, chosen)}. Remove {flag.name}.")


def _without_effect(flag: Flag, chosen: Method) -> str:
    """Why a flag has no effect with a method, naming the methods of the same switch with which it has one."""
    rows = [row for row in METHODS.values() if row.switch == chosen.switch and flag in row.flags]
    return f"has no effect with {chosen.label}; it is a setting of {', '.join(row.label for row in rows)}"


def _renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a config; names and values that an earlier version wrote are replaced by today's."""
    for row in METHODS.values():
        is_earlier = bool(row.earlier) and all(values.get(name) == value for name, value in row.earlier.items())
        if is_earlier and all(values.get(name) is None for name in row.chosen_by if name not in row.earlier):
            values = {name: value for name, value in values.items() if name not in row.earlier} | dict(row.chosen_by)
    return dict(values)


def methods_in(model: Any) -> list[Method]:
    """The methods of a model, from its modules and, for those that add no parameters, its config; main one first."""
    names = {getattr(module, "method", None) for module in model.modules()}
    names |= {row.name for row in description_of(model.config).rows if row.freezes and not row.added}
    return [row for row in METHODS.values() if row.name in names] or [METHODS["full"]]


def setting_names(methods: Iterable[str] | None = None) -> list[str]:
    """The config's attributes that these methods read, or all of them do."""
    rows = METHODS.values() if methods is None else [METHODS[name] for name in methods]
    flags = [flag.name for row in rows for flag in row.flags if flag.in_config]
    return [*dict.fromkeys(flags + [name for row in rows for name in row.settings])]


def added_patterns() -> list[str]:
    """Patterns of the names of parameters that methods add to an encoder."""
    return [*dict.fromkeys(row.added for row in METHODS.values() if row.added)]


def flags_that_add(tensors: Mapping[str, bool]) -> str:
    """`Method.choice` of the first method that adds the tensors whose value is True and none of the others; or ""."""
    for row in METHODS.values():
        if row.added and all(bool(re.search(row.added, name)) == there for name, there in tensors.items()):
            return row.choice
    return ""


def method_of_tensor(name: str, settings: Mapping[str, Any]) -> Method:
    """The method that added a tensor of this name to a model whose config has these settings.

    If several methods have such tensors, it is the one that the settings choose, or the first if they choose none.
    """
    rows = [row for row in METHODS.values() if row.added and re.search(row.added, name)]
    return next((row for row in rows if _is_chosen(row, settings)), rows[0])


def method_of_config(config: Mapping[str, Any], recorded: str | None = None) -> Method | None:
    """The method of a folder, from its adapter_config.json; None if no row fits.

    recorded: the method's name in the folder's run metadata, which decides between rows that fit equally well.
    """
    rows = [row for row in METHODS.values() if config.get("peft_type") in row.peft_types]
    rows = [row for row in rows if all(config.get(key) for key in row.peft_keys)]
    init = config.get("init_lora_weights")
    rows = [row for row in rows if not row.peft_inits or init in row.peft_inits or row.name == recorded]
    keys = {row.name: (bool(row.peft_inits), len(row.peft_keys), row.name == recorded) for row in rows}
    return max(rows, key=lambda row: keys[row.name], default=None)


def is_added(name: str) -> bool:
    """Whether a parameter of this name is what a method adds to an encoder."""
    return any(re.search(pattern, name) for pattern in added_patterns())


def set_method(config: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Replace the methods' settings of a config by these. Returns those that its checkpoint was saved with.

    Settings of a method that is off, or that would train nothing (rank 0), are left out.
    """
    saved = _renamed({name: vars(config).pop(name) for name in setting_names() if name in vars(config)})
    for flag in method_flags():
        value = settings.get(flag.name)
        is_set = value or (
            value is not False and value == 0 and flag.kind in (int, str)
        )  # 0 may be a rank, or the number of the first layer
        is_on = flag.always or any(settings.get(row.switch) for row in METHODS.values() if flag in row.flags)
        if is_set and is_on and flag.in_config and value != flag.unset:
            setattr(config, flag.name, value)
    for row in METHODS.values():
        if row.read and _is_chosen(row, vars(config)) and row.read(config) is None:
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
    values = {}
    for flag in method_flags():
        if flag.in_config:
            value = getattr(flags, flag.name)
            values[flag.name] = flag.parse(flag.name, value, config) if flag.parse and value is not None else value
    return values


def choices_of(flag: Flag) -> list[Any]:
    """The values of a flag that chooses between methods of one switch; [] for another flag."""
    return [row.chosen_by[flag.name] for row in METHODS.values() if flag.name in [*row.chosen_by][1:]]


def methods_of_flags(flags: Any) -> list[Method]:
    """The methods whose switch is on; of several with the same switch, those that the other flags do not exclude."""
    rows = [row for row in METHODS.values() if row.switch and getattr(flags, row.switch)]
    values = {flag.name: getattr(flags, flag.name) for flag in method_flags()}
    undecided = {f.name for f in method_flags() if choices_of(f) and values[f.name] is None and f.unset is None}
    return [row for row in rows if undecided & {*row.chosen_by} or _is_chosen(row, values)]


def _method_settings(flags: Any) -> list[tuple[Flag, list[Method]]]:
    """The flags on the command line that are settings of methods, each with the methods that have it."""
    dependent = [flag for flag in method_flags() if flag.in_config and not flag.always]
    changed = [flag for flag in dependent if getattr(flags, flag.name) != flag.default]
    return [(flag, [row for row in METHODS.values() if flag in row.flags]) for flag in changed]


def contradicting_flags(flags: Any, method: str) -> list[str]:
    """The flags, with their values, that choose another method, or a setting of another, than an adapter's `method`."""
    row, chosen = METHODS[method], methods_of_flags(flags)
    others = [other for other in METHODS.values() if other.switch != row.switch]
    is_chosen = any(other.switch == row.switch for other in chosen)
    is_other = bool(chosen) and not is_chosen and any(other.path_flag == row.path_flag for other in others)
    found = []
    for flag, rows in _method_settings(flags):
        value = getattr(flags, flag.name)
        if row in rows:
            contradicts = value != row.chosen_by.get(flag.name, value)
        else:
            contradicts = is_other or not any(other in chosen and other in others for other in rows)
        if contradicts:
            found.append(f"--{flag.name}" if value is True else f"--{flag.name} {value}")
    return found


def check_flags(flags: Any) -> None:
    """Raise UsageError unless the flags choose one method, with all flags that it needs and none of another."""
    chosen = methods_of_flags(flags)
    for row in chosen:
        if row.missing and not getattr(flags, row.path_flag) and (text := row.missing(flags)):
            raise UsageError(text)
    rows_by_flag = {}  # switches and paths on the command line
    for flag in method_flags():
        rows = [row for row in METHODS.values() if flag.name in (row.switch, row.path_flag)]
        if rows and getattr(flags, flag.name):
            rows_by_flag[flag.name] = rows
    for (name, rows), (other, others) in combinations(rows_by_flag.items(), 2):
        is_one_method = any(row in others for row in rows)
        is_combined = any(row.combines and row.switch in (name, other) for row in rows + others)
        if not is_one_method and not (is_combined and any(row.added for row in rows + others)):
            raise UsageError(f"--{name} and --{other}: choose one of them.")
    for flag, rows in _method_settings(flags):
        if not any(getattr(flags, row.switch) or getattr(flags, row.path_flag) for row in rows):
            name, switch = flag.name, rows[0].switch
            raise UsageError(f"--{name} has no effect without --{switch}. Add --{switch}, or remove --{name}.")
        lacks = next((row for row in chosen if row.switch == rows[0].switch and row not in rows), None)
        if lacks and not getattr(flags, lacks.path_flag):  # else the file says which method it is
            raise UsageError(f"--{flag.name} {_without_effect(flag, lacks)}. Remove --{flag.name}.")
