"""What of a model trains: LoRA, or what the paper compares it with; all leave the classification head trainable.

- BitFit (Ben Zaken et al. 2021, arXiv 2106.10199): every bias of the encoder.
- Bottleneck adapters, `x -> adapter_B act(adapter_A x + a) + b + residual` in each layer, placed and initialised as the
  reference implementation of LoRA does. Houlsby (Houlsby et al. 2019, arXiv 1902.00751): after the attention's output
  projection and after the feed-forward's, swish, `residual` its own input. Pfeiffer (Pfeiffer et al. 2020, arXiv
  2005.00247): after the feed-forward alone, relu, it reads LayerNorm(feed-forward + what is added to it) and `residual`
  is the feed-forward. Either way the usual sum and LayerNorm follow.
- The head alone, or everything.

The config says which, by plain attributes: `apply_lora`, `apply_bitfit`, `apply_adapter` with `adapter_type` and
`adapter_size`, `head_only`; none of them is fine-tuning of everything.
"""

from typing import Any, NamedTuple

from torch import nn

from lora_nlu.errors import UserError
from lora_nlu.methods.bottleneck import Bottleneck
from lora_nlu.methods.description import DEFAULT_TARGETS, TARGETS, lora_rank, target_of, targets_and_layers
from lora_nlu.methods.lora import LoRALinear, check_not_quantised


def trains_a_part(model: Any) -> bool:
    """Whether the encoder's own weights stay frozen, all or most of them."""
    added = any(isinstance(module, (LoRALinear, Bottleneck)) for module in model.modules())
    return added or any(getattr(model.config, name, False) for name in ("apply_bitfit", "head_only"))


def mark_trainable(model: Any) -> None:
    """Freeze what the model's method leaves alone; for fine-tuning of everything, nothing.

    Call it after `from_pretrained`, which forgets `requires_grad`. Raises ValueError for a model with quantised layers.
    """
    check_not_quantised(model)
    if not trains_a_part(model):
        model.requires_grad_(True)
        return
    mark_only_lora_as_trainable(model)
    for module in model.base_model.modules():
        if isinstance(module, Bottleneck):
            module.requires_grad_(True)
    if getattr(model.config, "apply_bitfit", False):
        for name, parameter in model.base_model.named_parameters():
            if name.endswith("bias"):
                parameter.requires_grad_(True)


def describe_method(model: Any) -> dict[str, Any]:
    """The method that trains a model, with its settings, in plain values that a file can hold."""
    config, modules, base = model.config, dict(model.named_modules()), model.base_model
    lora = {name: module for name, module in modules.items() if isinstance(module, LoRALinear)}
    adapter = next((module for module in modules.values() if isinstance(module, Bottleneck)), None)
    method: dict[str, Any] = {"name": "head" if getattr(config, "head_only", False) else "full"}
    if lora:
        targets, layers = targets_and_layers(lora)
        every = len(layers) == config.num_hidden_layers
        p = max(module.lora_dropout for module in lora.values())
        method = {"name": "lora", "targets": targets, "layers": None if every else layers, "lora_dropout": p}
    elif adapter is not None:
        method = {"name": adapter.adapter_type, "adapter_size": adapter.adapter_A.out_features}
    # An adapter's file may bring trained biases that no flag spoke of; the embeddings tell whether anything is frozen.
    is_frozen = not base.get_input_embeddings().weight.requires_grad
    biases = (p for name, p in base.named_parameters() if name.endswith("bias") and ".adapter." not in name)
    if getattr(config, "apply_bitfit", False) or (is_frozen and any(bias.requires_grad for bias in biases)):
        method = method | {"biases": True} if lora or adapter else {"name": "bitfit"}
    return method


def describe_lora_(model: Any) -> None:
    """Set the LoRA settings of `model.config` to those of its layers, so that `lora_linear` builds the same again.

    A merged model needs none: its weights contain the update. Raises UserError for LoRA that a config can't describe,
    and for a model of which only some layers are merged.
    """
    config = model.config
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    layers = {name: module for name, module in linear.items() if isinstance(module, LoRALinear)}
    if not layers and lora_rank(config):
        config.apply_lora = False
    if all(module.merged for module in layers.values()):
        return
    if merged := [name for name, module in layers.items() if module.merged]:
        raise UserError(
            f"{merged[0]} is merged and other layers are not: the saved model would look like a damaged one.\n"
            "Merge all of them (lora.merge_lora_) or none (lora.unmerge_lora_), then save."
        )
    targets, numbers = targets_and_layers(layers)
    described = {n for n in linear if target_of(n) in targets and {*targets_and_layers([n])[1]} & {*numbers}}
    kinds = {(module.r, module.lora_alpha, module.lora_dropout) for module in layers.values()}
    if len(kinds) > 1 or described != {*layers} or not {*targets} <= {*TARGETS}:
        raise UserError(
            "config.json can describe LoRA with one rank, alpha and dropout, on the same modules of each layer; "
            "this model's LoRA is different and would be lost.\n"
            "Save it with adapters.save_adapter, or merge it first (lora.merge_lora_)."
        )
    r, alpha, p = kinds.pop()
    config.apply_lora, config.lora_r, config.lora_alpha = True, r, alpha
    for name, value, default in (
        ("lora_target_modules", targets, [*DEFAULT_TARGETS]),
        ("lora_layers", numbers, [*range(config.num_hidden_layers)]),
        ("lora_dropout", p, 0.0),
    ):
        if value != default or getattr(config, name, None) is not None:
            setattr(config, name, value)


def mark_only_lora_as_trainable(model: Any) -> None:
    """Train the LoRA matrices and every parameter outside the encoder (`model.base_model`); freeze the rest.

    Call it after `from_pretrained`, which forgets `requires_grad`. With no LoRA in the model the head alone trains.
    Raises ValueError for a model with quantised layers, whose updates are lost.
    """
    check_not_quantised(model)
    for parameter in model.base_model.parameters():
        parameter.requires_grad_(False)
    for module in model.base_model.modules():
        if isinstance(module, LoRALinear):
            module.lora_A.requires_grad_(True)
            module.lora_B.requires_grad_(True)


class ParameterCounts(NamedTuple):
    """Numbers of scalars: that train in the encoder (the papers' column), that train (the head too), in the model."""

    encoder: int
    trainable: int
    total: int


def count_parameters(model: Any) -> ParameterCounts:
    """Count the parameters of `model`; RoBERTa-base with r=8 on query and value trains 294,912 in its encoder."""
    return ParameterCounts(
        encoder=sum(p.numel() for p in model.base_model.parameters() if p.requires_grad),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        total=sum(p.numel() for p in model.parameters()),
    )
