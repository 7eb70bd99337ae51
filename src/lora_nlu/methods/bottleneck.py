"""Bottleneck adapters (Houlsby et al. 2019, Pfeiffer et al. 2020): adapter_B act(adapter_A x + a) + b + residual.

Houlsby's are after the attention's output projection and after the feed-forward's, with swish, and `residual` is their
own input. Pfeiffer's are after the feed-forward alone, with relu; they read LayerNorm(feed-forward + what is added to
it), and `residual` is the feed-forward. Either way the usual sum and LayerNorm follow.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from lora_nlu.methods.description import Description, description_of
from lora_nlu.methods.linear import check_not_quantised
from lora_nlu.methods.targets import is_number
from lora_nlu.ops.kernels import Linear


class Bottleneck(nn.Module):
    """Down to `adapter_size`, through an activation, up again, plus a residual: [N, H] and [N, H] to [N, H]."""

    def __init__(self, hidden_size: int, adapter_type: str, adapter_size: int) -> None:
        super().__init__()
        if adapter_type not in ("houlsby", "pfeiffer") or adapter_size < 1:
            raise ValueError(f"adapter_type {adapter_type!r}, size {adapter_size}: houlsby or pfeiffer, 1 or more.")
        self.method = adapter_type  # the name of the method in table.py
        self.adapter_A = Linear(hidden_size, adapter_size)
        self.adapter_B = Linear(adapter_size, hidden_size)

    @property
    def reads_norm(self) -> bool:
        """Whether the adapter reads what the LayerNorm after it makes of its input, not the input itself."""
        return self.method == "pfeiffer"

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        act = F.relu if self.reads_norm else F.silu  # swish
        return self.adapter_B(act(self.adapter_A(x))) + residual


def read_settings(config: Any) -> dict[str, Any]:
    """The fields of a config's `Description` that bottlenecks set. Raises ValueError for an invalid or missing size."""
    size = getattr(config, "adapter_size", None)
    if not is_number(size, int) or size < 1:
        raise ValueError(f"config.adapter_size {size!r}: apply_adapter=True needs a width of 1 or more.")
    return {"adapter_size": size}


def new_block(trained: Description, hidden_size: int, after_attention: bool) -> Bottleneck | None:
    """The bottleneck at the end of one half of a layer, if the described method has one there."""
    adapter_type = trained.settings["adapter_type"]
    if after_attention and adapter_type == "pfeiffer":
        return None
    return Bottleneck(hidden_size, adapter_type, trained.adapter_size)


def set_bottlenecks_(model: Any, adapter_type: str, adapter_size: int) -> None:
    """Put new bottlenecks, drawn as by `from_pretrained`, in place of any. Raises ValueError for quantised layers."""
    check_not_quantised(model)
    config = model.config
    config.apply_adapter, config.adapter_type, config.adapter_size = True, adapter_type, adapter_size
    trained = description_of(config)
    for name, module in model.base_model.named_modules():
        if hasattr(module, "adapter"):
            bias = module.dense.bias  # of the model's dtype; the weight may still be in a file's
            new = new_block(trained, config.hidden_size, after_attention=name.endswith(".attention.output"))
            if new is not None:
                new.to(bias.device, bias.dtype).train(module.training)
                new.apply(model._init_weights)
            module.adapter = new


def rebuild(model: Any, adapter: Any, lora_alpha: float | None) -> None:
    """Give a model the bottlenecks of an adapter."""
    set_bottlenecks_(model, adapter.method, adapter.adapter_size)


def describe(model: Any) -> dict[str, Any]:
    """The width of a model's bottlenecks, as run.json records it."""
    first = next(module for module in model.modules() if isinstance(module, Bottleneck))
    return {"adapter_size": first.adapter_A.out_features}
