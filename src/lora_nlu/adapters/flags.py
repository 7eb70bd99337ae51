"""Command-line settings against what an adapter file records."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lora_nlu.adapters.adapter import Adapter, is_deberta
from lora_nlu.errors import UserError
from lora_nlu.methods.targets import targets_and_layers


def check_settings(
    adapter: Adapter,
    lora_r: int | None,
    lora_alpha: float | None,
    lora_relative_query: bool | None,
    targets: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
) -> None:
    """Raise UserError, naming the flag, if a setting that is not None differs from that of a LoRA adapter.

    targets and layers: as `targets_and_layers` returns them.
    """
    source, recorded_alpha = adapter.source, adapter.lora_alpha
    for name, rank in adapter.ranks.items():
        if lora_r is not None and rank != lora_r:
            shape = list(adapter.state[f"{name}.lora_A"].shape)
            raise UserError(
                f"{source}: {name}.lora_A is {shape} in the file, [{lora_r}, {shape[-1]}] by --lora_r {lora_r}.\n"
                f"Give --lora_r {rank}, or leave it out: the file records its rank."
            )
    if recorded_alpha is not None and lora_alpha is not None and recorded_alpha != lora_alpha:
        raise UserError(
            f"{source}: was trained with lora_alpha {recorded_alpha:g}, but --lora_alpha is {lora_alpha:g}.\n"
            f"Give --lora_alpha {recorded_alpha:g}, or leave it out: the file records its alpha."
        )
    if is_deberta(adapter.state) and adapter.records_relative_query and lora_relative_query is not None:
        if lora_relative_query == adapter.frozen_relative_query:
            raise relative_query_error(adapter)
    recorded_targets, recorded_layers = targets_and_layers(adapter.ranks)
    comparisons: tuple[tuple[str, Any, Any], ...] = (
        ("lora_target_modules", targets, recorded_targets),
        ("lora_layers", layers, recorded_layers),
    )
    for flag, value, recorded in comparisons:
        if value is not None and set(value) != set(recorded):
            file, flags = (",".join(map(str, places)) for places in (recorded, value))
            raise UserError(
                f"{source}: has its updates in {file}, by --{flag} they would be in {flags}.\n"
                f"Leave --{flag} out: the file records its layers."
            )


def with_relative_query(adapter: Adapter, lora_relative_query: bool | None) -> Adapter:
    """A DeBERTa `.bin`, which doesn't record it, as trained with LoRA on the relative query or without.

    None is without, as the reference trained. An adapter that records it is returned as it is.
    """
    if adapter.records_relative_query or lora_relative_query is None:
        return adapter
    return replace(adapter, frozen_relative_query=not lora_relative_query)


def relative_query_error(adapter: Adapter) -> UserError:
    """The error for a model that treats the relative positions' query otherwise than the adapter's training did."""
    if not adapter.records_relative_query:
        adapter_way, model_way = ("without", "with") if adapter.frozen_relative_query else ("with", "without")
        return UserError(
            f"{adapter.source}: doesn't record whether LoRA was on the relative positions' query. It is read as "
            f"{adapter_way}, the model is {model_way}.\nLeave out --lora_relative_query, or use with_relative_query."
        )
    trained, remedy = ("without", "Leave out") if adapter.frozen_relative_query else ("with", "Give")
    return UserError(
        f"{adapter.source}: was trained {trained} LoRA on the relative positions' query; read otherwise it gives "
        f"other answers.\n{remedy} --lora_relative_query."
    )
