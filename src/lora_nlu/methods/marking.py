"""What of a model trains: built as its config says, marked, counted and described, for every method of the table."""

import re
from typing import Any, NamedTuple

from torch import nn

from lora_nlu.methods.description import Description, is_added, methods_in
from lora_nlu.methods.linear import check_not_quantised
from lora_nlu.methods.method import Method
from lora_nlu.methods.table import METHODS
from lora_nlu.ops.kernels import Linear


def new_linear(trained: Description, target: str, layer: int, in_features: int, out_features: int) -> nn.Linear:
    """One of the `TARGETS` of an encoder layer: the method's own where it has one there, else a plain one."""
    for row in trained.rows:
        if row.layer and (new := row.layer(trained, target, layer, in_features, out_features)) is not None:
            return new
    return Linear(in_features, out_features)


def new_block(trained: Description, hidden_size: int, after_attention: bool) -> Any:
    """The module that a method adds at the end of one half of an encoder layer; None if it adds none there."""
    for row in trained.rows:
        if row.block and (new := row.block(trained, hidden_size, after_attention)) is not None:
            return new
    return None


def reset_added_parameters(module: Any, normal_std: float | None = None) -> None:
    """Draw what a method's module adds, if it is one: in a model whose reference draws normally, with this std."""
    if getattr(module, "method", None) in METHODS and hasattr(module, "reset_added_parameters"):
        module.reset_added_parameters(normal_std)


def mark_trainable(model: Any, methods: list[Method] | None = None) -> None:
    """Freeze what these methods (default: the model's own) leave alone; for fine-tuning of everything, nothing.

    Call it after `from_pretrained`, which forgets `requires_grad`. Raises ValueError for a model with quantised layers.
    """
    check_not_quantised(model)
    rows = methods or methods_in(model)
    if not all(row.freezes for row in rows):
        model.requires_grad_(True)
        return
    for name, parameter in model.base_model.named_parameters():
        parameter.requires_grad_(any(row.state is not None and re.search(row.state, name) for row in rows))


def mark_only_lora_as_trainable(model: Any) -> None:
    """Train what the model's variant of LoRA trains, and every parameter outside the encoder; freeze the rest."""
    mark_trainable(model, [row for row in methods_in(model) if row.has_ranks] or [METHODS["lora"]])


def describe_method(model: Any) -> dict[str, Any]:
    """The method that trains a model, with its settings and its look in reports, in plain values for a file."""
    base, rows, bitfit = model.base_model, methods_in(model), METHODS["bitfit"]
    # An adapter's file may bring trained biases that no flag names; the embeddings tell whether anything is frozen.
    is_frozen = not base.get_input_embeddings().weight.requires_grad
    biases = (p for name, p in base.named_parameters() if name.endswith("bias") and not is_added(name))
    has_biases = bitfit in rows or (is_frozen and any(bias.requires_grad for bias in biases))
    row = bitfit if has_biases and not rows[0].added else rows[0]
    method = {"name": row.name, "label": row.label, "color": row.color, "marker": row.marker}
    method |= row.describe(model) if row.describe else {}
    return method | ({"biases": True} if has_biases and row is not bitfit else {})


class ParameterCounts(NamedTuple):
    """Numbers of scalars: that train in the encoder (the papers' column), that train (the head too), in the model."""

    encoder: int
    trainable: int
    total: int


def count_parameters(model: Any) -> ParameterCounts:
    """Count the parameters of `model`; RoBERTa-base with r=8 on query and value trains 294,912 in its encoder."""
    encoder = sum(p.numel() for p in model.base_model.parameters() if p.requires_grad)
    counts = [row.count(model) for row in methods_in(model) if row.count] or [encoder]
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return ParameterCounts(counts[0], trainable, total=sum(p.numel() for p in model.parameters()))
