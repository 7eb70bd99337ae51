"""A saved adapter in memory, and its settings compared with those of a run."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_nlu.adapters.patterns import matching
from lora_nlu.errors import UserError
from lora_nlu.labels import last_head_layer
from lora_nlu.methods.description import as_relative_query, is_added, same_relative_query
from lora_nlu.methods.method import Method
from lora_nlu.methods.table import METHODS
from lora_nlu.methods.targets import targets_and_layers
from lora_nlu.ops.tensors import not_finite

_BARE = ("encoder.", "embeddings.")  # first parts of names in an encoder without classifier (FEATURE_EXTRACTION)
ENCODER_PREFIXES = ("roberta.", "deberta.", *_BARE)  # of an encoder's names, with a classifier or without
_DENSE = r"(attention\.output|intermediate|output)\.dense"
# The layers that can have an update, by the first part of their names
LAYERS = {
    "roberta": re.compile(rf"roberta\.encoder\.layer\.\d+\.(attention\.self\.(query|key|value)|{_DENSE})"),
    "deberta": re.compile(
        rf"deberta\.encoder\.layer\.\d+\.(attention\.self\.(query|key|value|pos_key|pos_query)_proj|{_DENSE})"
        r"|deberta\.embeddings\.embed_proj"
    ),
}
DEFAULT_MODULES = ["query", "value", "query_proj", "value_proj"]  # those that PEFT adapts without target_modules


@dataclass(frozen=True)
class Adapter:
    """A saved adapter in memory: tensors by the model's own parameter names, and how the update is scaled.

    lora_alpha:             None if the file doesn't record it (a published `.bin`).
    alpha_pattern:          alpha of layers whose names match, as PEFT reads patterns; the others have lora_alpha.
    use_rslora:             the scaling is alpha / sqrt(r), not alpha / r.
    relative_query:         how a DeBERTa was trained (modeling_deberta_v2.py): none, key or both; a `.bin` is taken for
                            the reference's, none.
    lora_dropout:           the dropout it was trained with; it changes nothing in what the adapter computes.
    targets:                names, or a pattern, of the layers that must have an update.
    base_weights:           weights of those layers in a complete model's checkpoint; they may contain the update.
    method:                 a name in methods/table.py; all of the above but base_weights is for methods with updates.
    frozen:                 tensors that its layers read and that don't train, by their keys in a folder (VeRA's pair).
    settings:               what a variant of LoRA records beside these, by the names of its flags.
    """

    source: Path
    state: dict[str, Tensor]
    lora_alpha: float | None = None
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    relative_query: str = "both"
    lora_dropout: float = 0.0
    targets: Sequence[str] | str = tuple(DEFAULT_MODULES)
    metadata: dict[str, Any] = field(default_factory=dict)
    base_weights: dict[str, Tensor] = field(default_factory=dict)
    method: str = "lora"
    frozen: dict[str, Tensor] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def row(self) -> Method:
        """The method's row in the table."""
        return METHODS[self.method]

    @property
    def labels(self) -> tuple[str, ...] | None:
        """Label names in id order, () for regression, None where the file doesn't record them."""
        names = self.metadata.get("labels")
        return None if names is None else tuple(names)

    @property
    def label_count(self) -> int | None:
        """Rows of the head's last layer; None where there is no head."""
        last = last_head_layer(self.state)
        return None if last is None else len(torch.atleast_1d(self.state[f"{last}.weight"]))

    def trains(self, name: str) -> bool:
        """Whether a tensor of this adapter trains: PiSSA's start, which its method adds, doesn't."""
        return not is_added(name) or re.search(str(self.row.state), name) is not None

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each layer with an update, by the layer's name."""
        suffix = f".{self.row.rank_of}"
        return {name.removesuffix(suffix): t.shape[0] for name, t in self.state.items() if name.endswith(suffix)}

    @property
    def is_bare(self) -> bool:
        """Whether it was trained on an encoder without classifier, `RobertaModel` or `DebertaV2Model`."""
        return any(name.startswith(_BARE) for name in self.state)

    @property
    def frozen_relative_query(self) -> bool:
        """Whether a DeBERTa's relative positions bypassed an update, which PEFT would apply."""
        return self.relative_query != "both"

    @property
    def records_relative_query(self) -> bool:
        """Whether the file records how a DeBERTa's relative query was trained, which a `.bin` doesn't."""
        return self.lora_alpha is not None or not self.row.has_alpha or not is_deberta(self.state)

    @property
    def adapter_size(self) -> int | None:
        """Width of the bottleneck, where there is one."""
        return next((t.shape[0] for name, t in self.state.items() if name.endswith(".adapter_A.weight")), None)

    def layers(self, lora_alpha: float | None = None) -> dict[str, tuple[int, float]]:
        """(rank, alpha) of each layer with an update; `lora_alpha`: of a file that records none. Raises UserError.

        The alpha is 1 for a method without one.
        """
        if not self.row.has_alpha:
            return {name: (rank, 1.0) for name, rank in self.ranks.items()}
        if self.lora_alpha is None and lora_alpha is None:
            raise UserError(
                f"{self.source} doesn't record the lora_alpha it was trained with; another one gives wrong answers.\n"
                "Give --lora_alpha: 16 for the published RoBERTa files, 32 for the published DeBERTa ones."
            )
        if None not in (self.lora_alpha, lora_alpha) and self.lora_alpha != lora_alpha:
            raise UserError(f"{self.source}: was trained with lora_alpha {self.lora_alpha:g}, not {lora_alpha:g}.")
        alpha = lora_alpha if self.lora_alpha is None else self.lora_alpha
        if not is_positive_number(alpha, (int, float)):
            raise UserError(f"{self.source}: --lora_alpha {alpha}: expected a positive number.")
        alphas = by_pattern(self.source, self.alpha_pattern, self.ranks, alpha)
        return {name: (rank, alphas[name]) for name, rank in self.ranks.items()}

    def scaling(self, rank: int, alpha: float) -> float:
        """The factor that scales an update of this rank and alpha."""
        if self.row.scaling:
            return self.row.scaling(self, rank, alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def scalings(self) -> list[float]:
        """The factors that scale updates, each once. Raises UserError if the file doesn't record an alpha."""
        return sorted({self.scaling(rank, alpha) for rank, alpha in self.layers().values()})

    def check_values(self) -> None:
        """Raise UserError, naming a tensor, unless all values of an adapter are finite floating-point numbers."""
        state = self.state | self.frozen | {f"{name}.weight": x for name, x in self.base_weights.items()}
        for name, tensor in state.items():
            if not tensor.is_floating_point():
                raise UserError(f"{self.source}: {name} contains {tensor.dtype}; expected floating-point numbers.")
        if broken := not_finite(state):
            raise UserError(
                f"{self.source}: {len(broken)} of its {len(state)} tensors are not finite (NaN or infinity), "
                f"{broken[0]} first: its training diverged, or the file is damaged.\n"
                "Take an earlier checkpoint, or train again with a lower --learning_rate."
            )


def by_pattern(source: Path, patterns: dict[str, Any], names: Iterable[str], default: Any) -> dict[str, Any]:
    """For each module's name the value of the first pattern that ends it, as PEFT matches `rank_pattern`.

    Raises UserError for patterns that take too long to match.
    """
    names = [*names]
    try:
        found = matching(patterns, names, ends_name=True)
    except ValueError as e:
        raise UserError(f"{source}: rank_pattern or alpha_pattern: {e}.") from e
    return {name: patterns[found[name]] if name in found else default for name in names}


def encoder_prefix(adapter: Adapter) -> str:
    """`roberta` or `deberta`: the first part of its layers' names; "" for a head alone and for a bare encoder."""
    first_parts = [name.partition(".")[0] for name in adapter.state]
    return next((part for part in first_parts if part in LAYERS), "")


def is_deberta(names: Iterable[str]) -> bool:
    """Whether tensors of these names are a DeBERTa's; a bare encoder has no prefix, but names like `query_proj`."""
    return any(name.startswith("deberta.") or (name.startswith(_BARE) and "_proj." in name) for name in names)


def foreign_layer(adapter: Adapter) -> str | None:
    """The first layer with an update that the adapter's model, RoBERTa or DeBERTa-V2, lacks; None if it has all."""
    prefix, start = encoder_prefix(adapter), ""
    if adapter.is_bare:
        prefix = "deberta" if is_deberta(adapter.state) else "roberta"
        start = f"{prefix}."
    names = [name for name in adapter.ranks if not (adapter.is_bare and name == "pooler.dense")]
    return next((name for name in names if prefix not in LAYERS or not LAYERS[prefix].fullmatch(start + name)), None)


def is_positive_number(value: Any, types: Any) -> bool:
    """A positive number that stays one in any arithmetic with ranks."""
    return isinstance(value, types) and not isinstance(value, bool) and 1e-12 <= value <= 1e12


def target_layers(adapter: Adapter, names: Iterable[str]) -> list[str]:
    """The layers that PEFT's `target_modules` mean: a list names them or their ends, a string is a pattern of them.

    Raises UserError for a pattern that takes too long to match.
    """
    if isinstance(adapter.targets, str):
        try:
            return [*matching([adapter.targets], names)]
        except ValueError as e:
            raise UserError(f"{adapter.source}: target_modules: {e}.") from e
    ends = tuple(f".{target}" for target in adapter.targets)
    return [name for name in names if f".{name}".endswith(ends)]


def layer_count(names: Iterable[str]) -> int:
    """In how many encoder layers tensors or modules of these names are."""
    return len({match.group(1) for name in names if (match := re.search(r"\.(\d+)\.", name))})


def check_settings(adapter: Adapter, settings: Mapping[str, Any]) -> None:
    """Raise UserError if a LoRA setting, by its flag's name, is not None and differs from what the file records."""
    source, recorded_alpha = adapter.source, adapter.lora_alpha
    r, alpha, flag_value = (settings.get(name) for name in ("lora_r", "lora_alpha", "lora_relative_query"))
    for name, rank in adapter.ranks.items():
        if r is not None and rank != r:
            tensor = f"{name}.{adapter.row.rank_of}"
            shape = list(adapter.state[tensor].shape)
            raise UserError(
                f"{source}: {tensor} is {shape} in the file, {[r, *shape[1:]]} by --lora_r {r}.\n"
                f"Give --lora_r {rank}, or leave it out: the file records its rank."
            )
    if recorded_alpha is not None and alpha is not None and recorded_alpha != alpha:
        raise UserError(
            f"{source}: was trained with lora_alpha {recorded_alpha:g}, but --lora_alpha is {alpha:g}.\n"
            f"Give --lora_alpha {recorded_alpha:g}, or leave it out: the file records its alpha."
        )
    for name in (own.name for own in adapter.row.flags if own.decides):
        recorded_value, value = adapter.settings.get(name), settings.get(name)
        if None not in (recorded_value, value) and recorded_value != value:
            raise UserError(
                f"{source}: was trained with {name} {recorded_value}, but --{name} is {value}.\n"
                f"Leave --{name} out: the file records it."
            )
    if is_deberta(adapter.state) and adapter.records_relative_query and flag_value is not None:
        values = as_relative_query(flag_value), adapter.relative_query
        if len({same_relative_query(value, adapter.ranks) for value in values}) > 1:
            raise relative_query_error(adapter)
    places: tuple[list[Any], list[Any]] = targets_and_layers(adapter.ranks)
    for flag, recorded in zip(("lora_target_modules", "lora_layers"), places, strict=True):
        value = settings.get(flag)
        if value is not None and set(value) != set(recorded):
            in_file, by_flag = (",".join(map(str, names)) for names in (recorded, value))
            raise UserError(
                f"{source}: has its updates in {in_file}, by --{flag} they would be in {by_flag}.\n"
                f"Leave --{flag} out: the file records its layers."
            )


def with_relative_query(adapter: Adapter, lora_relative_query: str | bool | None) -> Adapter:
    """A DeBERTa `.bin`, which doesn't record it, as trained with LoRA on the relative query or without.

    lora_relative_query: one of `RELATIVE_QUERY`; True is both, False none. None is as the reference trained, "none". An
    adapter that records it is returned as it is.
    """
    if adapter.records_relative_query or lora_relative_query is None:
        return adapter
    value = same_relative_query(as_relative_query(lora_relative_query), adapter.ranks)
    return replace(adapter, relative_query=value)


def relative_query_error(adapter: Adapter) -> UserError:
    """The error for a model that treats the relative positions' query otherwise than the adapter's training did."""
    if not adapter.records_relative_query:
        adapter_way, model_way = ("without", "with") if adapter.frozen_relative_query else ("with", "without")
        return UserError(
            f"{adapter.source}: doesn't record whether LoRA was on the relative positions' query. It is read as "
            f"{adapter_way}, the model is {model_way}.\nLeave out --lora_relative_query, or use with_relative_query."
        )
    trained, remedy = {
        "none": ("without LoRA on the relative positions' query", "Leave out --lora_relative_query"),
        "key": ("with LoRA on the relative positions' key alone", "Give --lora_relative_query key"),
        "both": ("with LoRA on the relative positions' query", "Give --lora_relative_query"),
    }[adapter.relative_query]
    return UserError(f"{adapter.source}: was trained {trained}; read otherwise it gives other answers.\n{remedy}.")
