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

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from lora_nlu.kernels import Linear
from lora_nlu.lora import (
    LORA_SETTINGS,
    LoRALinear,
    check_not_quantised,
    mark_only_lora_as_trainable,
    targets_and_layers,
)

ADAPTER_TYPES = ("houlsby", "pfeiffer")
SETTINGS = (
    "apply_lora", *LORA_SETTINGS, "lora_relative_query",
    "apply_bitfit", "apply_adapter", "adapter_type", "adapter_size", "head_only",
)  # fmt: skip


def set_method(config: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Give a config these `SETTINGS`, and no other that its checkpoint was saved with; those are returned."""
    saved = {name: config.__dict__.pop(name) for name in SETTINGS if name in config.__dict__}
    applies = settings.get("apply_lora") and settings.get("lora_r") != 0  # rank 0 is plain fine-tuning
    for name in SETTINGS:
        is_set = settings.get(name) or (name == "lora_layers" and settings.get(name) == 0)  # 0: the first layer
        if is_set and (applies or name not in ("apply_lora", *LORA_SETTINGS)):
            setattr(config, name, settings[name])
    return saved


class Bottleneck(nn.Module):
    """Down to `adapter_size`, through an activation, up again, plus a residual: [N, H] and [N, H] to [N, H]."""

    def __init__(self, hidden_size: int, adapter_type: str, adapter_size: int) -> None:
        super().__init__()
        if adapter_type not in ADAPTER_TYPES or adapter_size < 1:
            raise ValueError(f"adapter_type {adapter_type!r}, size {adapter_size}: houlsby or pfeiffer, 1 or more.")
        self.adapter_type = adapter_type
        self.adapter_A = Linear(hidden_size, adapter_size)
        self.adapter_B = Linear(adapter_size, hidden_size)

    @property
    def reads_norm(self) -> bool:
        """Whether the adapter reads what the LayerNorm after it makes of its input, not the input itself."""
        return self.adapter_type == "pfeiffer"

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        act = F.relu if self.adapter_type == "pfeiffer" else F.silu  # swish
        return self.adapter_B(act(self.adapter_A(x))) + residual


def bottleneck(config: Any, after_attention: bool) -> Bottleneck | None:
    """The adapter that the config asks for at the end of one half of a layer, if any."""
    if not getattr(config, "apply_adapter", False) or (after_attention and config.adapter_type != "houlsby"):
        return None
    return Bottleneck(config.hidden_size, config.adapter_type, config.adapter_size)


def set_bottlenecks_(model: Any, adapter_type: str, adapter_size: int) -> None:
    """Give a model new bottlenecks of this kind in place of any it has, initialised as after `from_pretrained`.

    Raises ValueError for a model with quantised layers.
    """
    check_not_quantised(model)
    config = model.config
    config.apply_adapter, config.adapter_type, config.adapter_size = True, adapter_type, adapter_size
    for name, module in model.base_model.named_modules():
        if hasattr(module, "adapter"):
            weight = module.dense.weight
            new = bottleneck(config, after_attention=name.endswith(".attention.output"))
            if new is not None:
                new.to(weight.device, weight.dtype).train(module.training)
                new.apply(model._init_weights)
            module.adapter = new


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
