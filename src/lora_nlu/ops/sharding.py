"""Tensors that an engine keeps in pieces: FSDP2's on every process, DeepSpeed ZeRO's too. Small ones, made whole.

Every function here is to be called in all processes at once, for they exchange their pieces.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import get_total_norm
from torch.utils._pytree import tree_map


def whole(tensor: Any) -> Any:
    """A tensor with all its pieces, on the CPU of the first process and empty elsewhere; other things as they are."""
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    if not isinstance(tensor, Tensor):
        return tensor
    return tensor.detach().cpu() if torch.distributed.get_rank() == 0 else tensor.new_empty(0)


def shared_as(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor in pieces as `other` is, on its device; whole if that one is, or has another shape."""
    if not isinstance(other, DTensor) or tensor.shape != other.shape:
        return tensor
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements)


def reshard(model: Any) -> None:
    """Let FSDP2's modules hold their pieces again: after an evaluation the outermost has its gathered, half-precise
    parameters in their place, and what is read is rounded, what is written lost."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def parameters(model: Any, trained_only: bool) -> dict[str, Tensor]:
    """The parameters of a model under FSDP2 or ZeRO as `whole` gives them; of ZeRO's two copies the one in fp32."""
    reshard(model)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad or not trained_only}
    if any(hasattr(p, "_hp_mapping") or hasattr(p, "ds_id") for p in named.values()):
        from deepspeed.utils import safe_get_full_fp32_param

        named = {name: safe_get_full_fp32_param(p) for name, p in named.items()}
    return {name: whole(p) for name, p in named.items()}


@contextmanager
def made_whole(model: Any) -> Iterator[None]:
    """Let trained parameters in pieces be written within; of ZeRO-3's what the first process has written is kept."""
    reshard(model)
    parameters = [p for p in model.parameters() if p.requires_grad and hasattr(p, "ds_id")]
    if not parameters:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0):
        yield


def optimizer_state(optimizer: Any) -> dict[str, Any]:
    """The state dict of an optimizer as one process without shards would have it."""
    return tree_map(whole, optimizer.state_dict())


def load_optimizer_state(optimizer: Any, state: dict[str, Any]) -> None:
    """Load what `optimizer_state` or a single process's optimizer gave, into pieces as the parameters are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    moments = state["state"]
    for number, parameter in zip(numbers, parameters, strict=True):
        if number in moments:
            moments[number] = {
                name: shared_as(value, parameter) if isinstance(value, Tensor) else value
                for name, value in moments[number].items()
            }
    optimizer.load_state_dict(state)


@torch.no_grad()
def copy_into(model: Any, state: dict[str, Tensor]) -> None:
    """Write whole tensors into a model's parameters, in pieces or not. Raises RuntimeError if shapes differ."""
    for name, tensor in state.items():
        parameter = model.get_parameter(name)
        parameter.copy_(shared_as(tensor, parameter))


def is_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether every number in these tensors is finite (of FSDP2's, in this process's part). Waits for the GPU once."""
    parts = [x.to_local() if isinstance(x, DTensor) else x for x in tensors]
    parts = [x.detach() for x in parts if x.numel()]
    return not parts or bool(get_total_norm(parts, math.inf).isfinite())
