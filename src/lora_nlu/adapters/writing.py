"""A trained model saved as an adapter folder."""

from dataclasses import replace
from pathlib import Path
from statistics import mode
from typing import Any

from safetensors.torch import save
from torch import Tensor, nn

from lora_nlu.adapters.adapter import Adapter
from lora_nlu.adapters.peft_format import peft_config, to_peft_key
from lora_nlu.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, RUN_METADATA, atomic_write, write_json
from lora_nlu.methods.linear import unmerged_parameters
from lora_nlu.methods.lora import lora_layers
from lora_nlu.methods.marking import describe_method
from lora_nlu.ops.tensors import fingerprint


def adapter_of(model: Any, metadata: dict[str, Any], state_dict: dict[str, Tensor] | None = None) -> Adapter:
    """The parameters that train in a model whose encoder is otherwise frozen, as an adapter.

    state_dict: the model's, where a distributed backend has gathered it. A merged model gives what it is unmerged.
    """
    state = unmerged_parameters(model) if state_dict is None else state_dict
    state = {name: state[name] for name, parameter in model.named_parameters() if parameter.requires_grad}
    metadata = metadata | {"model_type": model.config.model_type}
    adapter = Adapter(Path(), state, metadata=metadata, method=describe_method(model)["name"])
    if not (layers := lora_layers(model)):
        return adapter
    row, alphas = adapter.row, {name: layer.lora_alpha for name, layer in layers.items()}
    alpha = mode(alphas.values())
    # A short name stands for every module whose name ends in it, so it is used only if all of those have an update.
    short = sorted({name.rpartition(".")[2] for name in layers})
    matches = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.rpartition(".")[2] in short]
    adapter = replace(
        adapter,
        lora_alpha=alpha,
        alpha_pattern={name: value for name, value in alphas.items() if value != alpha},
        use_rslora=any(layer.use_rslora for layer in layers.values()),
        relative_query=getattr(model, "relative_query", None) or "both",
        lora_dropout=max(layer.lora_dropout for layer in layers.values()),
        targets=short if len(matches) == len(layers) else sorted(layers),
    )
    return replace(adapter, **row.to_adapter(model)) if row.to_adapter else adapter


def save_adapter(
    model: Any, folder: Path | str, metadata: dict[str, Any], state_dict: dict[str, Tensor] | None = None
) -> None:
    """Write the parameters that train in a model as an adapter folder; `state_dict` as in `adapter_of`."""
    write_adapter(adapter_of(model, metadata, state_dict), Path(folder))


def write_adapter(adapter: Adapter, folder: Path) -> None:
    """Write an adapter as a folder, for LoRA with its alpha; each file appears complete or not at all."""
    weights_fingerprint = fingerprint(adapter.state | adapter.frozen)
    if adapter.row.to_file:
        adapter = adapter.row.to_file(adapter)
    tensors = {to_peft_key(adapter, name): t.detach().cpu().contiguous() for name, t in adapter.state.items()}
    tensors |= {name: tensor.cpu().contiguous() for name, tensor in adapter.frozen.items()}
    config = peft_config(adapter)
    with atomic_write(folder / ADAPTER_WEIGHTS) as partial:
        partial.write_bytes(save(tensors, metadata={"format": "pt"}))  # save_file would hide it from other users
    # These two tell files of different runs in one folder apart.
    written = {"peft_type": config["peft_type"], "weights_fingerprint": weights_fingerprint}
    write_json(folder / RUN_METADATA, adapter.metadata | written)
    write_json(folder / ADAPTER_CONFIG, config)
