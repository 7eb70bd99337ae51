"""A linear layer with a frozen weight and a trainable update: merging and unmerging the update, saving and loading.

Dim letters: I in_features, O out_features.
"""

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_nlu.methods.table import METHODS
from lora_nlu.methods.targets import TARGETS, target_of
from lora_nlu.ops.kernels import Linear
from lora_nlu.ops.tensors import is_same

RESTORE = "Call the model's restore_weights(), which reads it from the checkpoint again."
_HELD_IN_BF16 = f"The weight of this layer is held in bf16, for products alone. {RESTORE}"


def _version(x: Tensor) -> int:
    """How often a tensor was written to in place; -1 where torch doesn't count."""
    return -1 if x.is_inference() else x._version


class UpdatedLinear(Linear):
    """`nn.Linear` with frozen `weight` [O, I] and `bias` [O], and a trainable update that can be merged into `weight`.

    A subclass defines `forward`, `scaling`, the parameters that `update_names` lists, and `with_update`, by which they
    change the weight; it may define `check_shapes`.

    A merged layer's state dict contains `weight` with the update in it and no parameters of the update, so that a file
    never counts it twice. While merged, a layer also keeps the weight as it was and copies of the parameters that were
    merged, so `unmerge` is exact even if they changed. Loading other parameters or another weight unmerges first.
    """

    method: str  # the name of the method in table.py
    update_names: tuple[str, ...]
    scaling: Any
    weight_before: Any  # a Tensor while merged, else None

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias=bias)
        for name in ("weight_before", *(f"merged_{name}" for name in self.update_names)):
            self.register_buffer(name, None, persistent=False)  # buffers: they follow when the layer moves
        self.merged_scaling = 0.0
        self._at_merge: dict[str, tuple[Tensor, int]] = {}  # parameters and their versions when they were merged
        for parameter in self.parameters():
            parameter.requires_grad_(False)

    def with_update(self, weight: Tensor, parameters: list[Tensor], scaling: float) -> Tensor:
        """A weight [O, I] with the update that these parameters, in the order of `update_names`, make of it."""
        raise NotImplementedError(f"{type(self).__name__} must define its update.")

    def check_shapes(self) -> None:
        """Raise ValueError unless the parameters of the update fit the weight."""

    def update_parameters(self) -> list[Tensor]:
        """The parameters of the update, in the order of `update_names`."""
        return [getattr(self, name) for name in self.update_names]

    @property
    def merged(self) -> bool:
        """Whether `weight` contains the update."""
        return self.weight_before is not None

    @torch.no_grad()
    def merge(self) -> None:
        """Put the present update into `weight`; idempotent. Raises ValueError if `weight` can't be written to."""
        if self.merged and self._contains_its_update():
            return
        self._check_writable()
        self.unmerge()
        merged = self.merged_weight()
        self.weight_before, self.merged_scaling = self.weight.detach().clone(), self.scaling
        for name in self.update_names:
            setattr(self, f"merged_{name}", getattr(self, name).detach().clone())
        self.weight.copy_(merged)
        self._at_merge = {name: (x, _version(x)) for name, x in self.named_parameters()}

    @torch.no_grad()
    def unmerge(self) -> None:
        """Undo `merge`; a layer that is not merged is left alone. Raises as `merge`."""
        if self.merged:
            self._check_writable()
            self.weight.copy_(self.frozen_weight())
            self.weight_before = None
            for name in self.update_names:
                setattr(self, f"merged_{name}", None)
            self._at_merge = {}

    def _check_writable(self) -> None:
        """Raise ValueError if what is written to `weight` would be lost."""
        if self.frozen is not None:
            raise ValueError(_HELD_IN_BF16)
        if not isinstance(self.weight, nn.Parameter):
            raise ValueError(
                f"The weight of a {type(self).__name__} is made of other parameters (torch.nn.utils.parametrize, "
                "weight_norm, prune): what merge() or unmerge() write to it would be lost. Merge before, or remove it."
            )
        if self.weight.is_meta:
            raise ValueError(
                f"The weight of a {type(self).__name__} is on the meta device, where nothing is kept: merge or unmerge "
                "before the model is offloaded (accelerate), or after it is loaded."
            )

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """The weight [O, I] with the update, merged or not."""
        if self.merged:
            return self.weight
        self.check_shapes()
        return self.with_update(self.weight, self.update_parameters(), self.scaling)

    def frozen_weight(self) -> Tensor:
        """The weight [O, I] without the update, merged or not; exact unless `weight` was written to since `merge`."""
        if not self.merged:
            return self.weight
        if self._untouched("weight"):
            return self.weight_before
        copies = [getattr(self, f"merged_{name}") for name in self.update_names]
        return self.with_update(self.weight, copies, -self.merged_scaling)

    def _untouched(self, *names: str) -> bool:
        """Whether these parameters are the tensors that were merged, and nobody has written to them since."""
        for name in names:
            parameter, (tensor, version) = getattr(self, name), self._at_merge.get(name, (self.weight, -1))
            if parameter is not tensor or version < 0 or _version(parameter) != version:
                return False
        return True

    def __getstate__(self) -> dict[str, Any]:
        unchanged = {name: self._at_merge[name] for name in self._at_merge if self._untouched(name)}
        return super().__getstate__() | {"_at_merge": unchanged}

    def __setstate__(self, state: dict[str, Any]) -> None:  # a copy's parameters count their versions anew
        super().__setstate__(state)
        self._at_merge = {name: (getattr(self, name), _version(getattr(self, name))) for name in self._at_merge}

    def _contains_its_update(self) -> bool:
        """Whether the update of a merged layer is the one in its weight."""
        if self.scaling != self.merged_scaling:
            return False
        if not self._untouched(*self.update_names):
            if not all(is_same(getattr(self, name), getattr(self, f"merged_{name}")) for name in self.update_names):
                return False
            self._at_merge |= {name: (x, _version(x)) for name, x in self.named_parameters() if name != "weight"}
        return True

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:
            for name in self.update_names:
                del destination[prefix + name]

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing_keys: Any, *lists: Any
    ) -> None:
        arguments = (state_dict, prefix, local_metadata, strict, missing_keys, *lists)
        names = [f"{prefix}{name}" for name in self.update_names]
        weight = state_dict.get(f"{prefix}weight")
        is_alone = weight is not None and not any(name in state_dict for name in names)
        if is_alone and self.merged and is_same(weight, self.weight):  # what this layer saved
            super()._load_from_state_dict(*arguments)
            self._at_merge["weight"] = (self.weight, _version(self.weight))
            missing_keys[:] = [name for name in missing_keys if name not in names]
            return
        if weight is not None or any(name in state_dict for name in names):
            self.unmerge()
        if is_alone and self._is_merged(weight):
            lists[-1].append(
                f"{prefix}weight already contains the update of {' and '.join([names[0], *self.update_names[1:]])}: it "
                "is from a merged model, and the update would count twice. Load it into a model without LoRA, or load "
                "the adapter alone."
            )
            return
        super()._load_from_state_dict(*arguments)

    @torch.no_grad()
    def _is_merged(self, weight: Tensor) -> bool:
        """Whether `weight` [O, I] is less than half as far from this layer's merged weight as from its frozen one."""
        if weight.shape != self.weight.shape or weight.is_meta or self.weight.is_meta:
            return False
        weight = weight.to(self.weight).float()
        distance_to_merged = (weight - self.merged_weight().float()).norm()
        return bool(distance_to_merged < 0.5 * (weight - self.weight.float()).norm())


def check_not_quantised(model: nn.Module, names: Iterable[str] | None = None) -> None:
    """Raise ValueError if one of these layers (without names: of all `TARGETS`) is quantised or otherwise replaced.

    bitsandbytes, torchao and others replace `nn.Linear`, or its weight, by a class of their own, or store integers.
    """
    modules = dict(model.named_modules())
    for name in [name for name in modules if target_of(name) in TARGETS] if names is None else names:
        layer: Any = modules.get(name)
        if not hasattr(layer, "in_features"):
            continue
        if getattr(layer, "frozen", None) is not None:
            raise ValueError(f"{name}: {_HELD_IN_BF16}")
        if getattr(layer, "is_replaced", False):
            raise ValueError(f"{name}: The weight of this layer was replaced for training. {RESTORE}")
        weight, subject = layer.weight, ""
        if type(layer) not in (nn.Linear, Linear) and getattr(layer, "method", None) not in METHODS:
            subject = f"{name} is a {type(layer).__module__}.{type(layer).__qualname__}"
        elif type(weight).__module__.partition(".")[0] != "torch" or not weight.is_floating_point():
            subject = f"{name}.weight is a {type(weight).__module__}.{type(weight).__qualname__} of {weight.dtype}"
        if subject:
            raise ValueError(
                f"{subject}: quantised or replaced linear layers are not supported.\nUse the model in fp32, fp16 or "
                "bf16. To quantise what was trained, merge it (python -m lora_nlu.adapters convert ... --to merged) "
                "and load that in transformers' own class."
            )


def layers_to_hold_in_bf16(model: nn.Module) -> list[Any]:
    """The linear layers whose forward can multiply by `frozen` and whose weights are plain fp32, unmerged, on a CPU.

    Or in fp16 or bf16, as in the file, where the rest of the model is in fp32 (`checkpoints.linear_weights_as_in`).
    None in a model with an `UpdatedLinear` whose class does not set `multiplies_frozen`: its forward reads `weight`.
    """
    layers: list[Any] = [layer for layer in model.modules() if isinstance(layer, Linear)]
    if not all(type(layer) is Linear or vars(type(layer)).get("multiplies_frozen") for layer in layers):
        return []
    layers = [layer for layer in layers if layer.frozen is None and not getattr(layer, "merged", False)]
    weights = [layer.weight for layer in layers]
    is_plain = [type(w) is nn.Parameter and w.is_cpu for w in weights]
    are_fp32 = [layer.weight.dtype is torch.float32 or _is_narrower_than_bias(layer) for layer in layers]
    return [layer for layer, plain, fp32 in zip(layers, is_plain, are_fp32, strict=True) if plain and fp32]


def _is_narrower_than_bias(layer: nn.Linear) -> bool:
    is_half = layer.weight.dtype in (torch.float16, torch.bfloat16) and not layer.weight.is_mkldnn
    return is_half and layer.bias is not None and layer.bias.dtype is torch.float32


def widen_(model: nn.Module) -> None:
    """Convert to fp32 the weights of linear layers that were loaded in the file's dtype while the rest is in fp32."""
    for layer in model.modules():
        if isinstance(layer, Linear) and layer.frozen is None and _is_narrower_than_bias(layer):
            layer.weight = nn.Parameter(layer.weight.detach().float(), layer.weight.requires_grad)


def updated_layers(model: nn.Module) -> list[UpdatedLinear]:
    """The layers with an update in a model, or in what PEFT or another library put around one."""
    return [module for module in model.modules() if isinstance(module, UpdatedLinear)]


def merge_lora_(model: nn.Module) -> None:
    """Merge every update of a linear layer of `model` in place; idempotent.

    Weights that are in bf16, or that a method replaced, are first read from the checkpoint (`restore_weights`).
    """
    for module in model.modules():
        if hasattr(module, "restore_weights"):
            cast(Any, module).restore_weights()
    for layer in updated_layers(model):
        layer.merge()


def unmerge_lora_(model: nn.Module) -> None:
    """Undo `merge_lora_`; idempotent."""
    for layer in updated_layers(model):
        layer.unmerge()


def unmerged_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of `model` by name, detached; weights without their updates, merged or not."""
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, UpdatedLinear) and module.merged:
            state[f"{name}.weight"] = module.frozen_weight().detach()
    return state
