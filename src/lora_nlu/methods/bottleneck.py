"""Bottleneck adapters (Houlsby et al. 2019, Pfeiffer et al. 2020)."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from lora_nlu.methods.description import ADAPTER_TYPES
from lora_nlu.methods.lora import check_not_quantised
from lora_nlu.ops.kernels import Linear


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
