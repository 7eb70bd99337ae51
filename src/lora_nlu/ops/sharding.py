"""Tensors that a backend shards over processes (FSDP2, DeepSpeed ZeRO): read and written as complete tensors.

Every function but `is_finite` must be called in all processes at once, because they exchange their shards. Meant for
what trains, which is small: a tensor is complete in one process's memory.
"""

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import get_total_norm
from torch.utils._pytree import tree_map


def gathered(tensor: Any) -> Any:
    """The complete tensor on the CPU of the first process, an empty one elsewhere; what is no tensor, as it is."""
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    if not isinstance(tensor, Tensor):
        return tensor
    return tensor.detach().cpu() if torch.distributed.get_rank() == 0 else tensor.new_empty(0)


def sharded_like(tensor: Any, other: Tensor) -> Any:
    """A complete tensor sharded as `other` is, on its device; unchanged if that is no sharded tensor of this shape."""
    if not isinstance(other, DTensor) or not isinstance(tensor, Tensor) or tensor.shape != other.shape:
        return tensor
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements)


def reshard(model: Any) -> None:
    """Put the shards of FSDP2's modules back in the place of their gathered parameters.

    After an evaluation the outermost module still has gathered parameters in half precision: values read from them
    would be rounded, and values written to them lost.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def parameters(model: Any, trained_only: bool) -> dict[str, Tensor]:
    """The parameters of a model under FSDP2 or ZeRO, each `gathered`; of ZeRO's two copies the one in fp32."""
    reshard(model)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad or not trained_only}
    if any(hasattr(p, "_hp_mapping") or hasattr(p, "ds_id") for p in named.values()):
        from deepspeed.utils import safe_get_full_fp32_param

        named = {name: safe_get_full_fp32_param(p) for name, p in named.items()}
    return {name: gathered(p) for name, p in named.items()}


def writable_parameters(model: Any) -> AbstractContextManager[Any]:
    """A context in which sharded trained parameters can be written; ZeRO-3 keeps what the first process wrote."""
    reshard(model)
    parameters = [p for p in model.parameters() if p.requires_grad and hasattr(p, "ds_id")]
    if not parameters:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)


def optimizer_state(optimizer: Any) -> dict[str, Any]:
    """The state dict of an optimizer as one process without shards would have it."""
    return tree_map(gathered, optimizer.state_dict())


def load_optimizer_state(optimizer: Any, state: dict[str, Any]) -> None:
    """Load the result of `optimizer_state` or of a single process's optimizer, sharded as the parameters are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    moments = state["state"]
    for number, parameter in zip(numbers, parameters, strict=True):
        if number in moments:
            moments[number] = {name: sharded_like(value, parameter) for name, value in moments[number].items()}
    optimizer.load_state_dict(state)


@torch.no_grad()
def copy_into(model: Any, state: dict[str, Tensor]) -> None:
    """Write complete tensors into a model's parameters, sharded or not. Raises RuntimeError if shapes differ."""
    for name, tensor in state.items():
        parameter = model.get_parameter(name)
        parameter.copy_(sharded_like(tensor, parameter))


def is_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether every number in these tensors is finite (FSDP2: in this process's shards). Waits once for the GPU."""
    parts = [x.to_local() if isinstance(x, DTensor) else x for x in tensors]
    parts = [x.detach() for x in parts if x.numel()]
    return not parts or bool(get_total_norm(parts, math.inf).isfinite())
