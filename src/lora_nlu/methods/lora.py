"""LoRA (Hu et al. 2021, arXiv 2106.09685, eq. 3): h = W x + b + (alpha / r) B A x with W and b frozen.

Dim letters: N rows (tokens), I in_features, O out_features, R rank.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_nlu.methods.description import (
    DEFAULT_TARGETS,
    TARGETS,
    as_list,
    check_lora,
    lora_rank,
    target_names,
    target_of,
)
from lora_nlu.ops.kernels import (
    PLAIN_TENSORS,
    Dropout,
    Linear,
    by_rows,
    check,
    is_traced,
    linear,
    product,
    product_with_update,
)
from lora_nlu.ops.tensors import is_same


class _LoRALinear(torch.autograd.Function):
    """y = x W^T + b + s (x A^T) B^T of x [N, I], the update inside the product (`product_with_update`).

    The backward keeps x, x A^T and references to parameters only, and reaches A and B through the rank: no [O, I]
    gradient is formed unless W itself trains.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, s: float) -> Tensor:
        y, down = product_with_update(x, weight, bias, A.t(), B.t(), s)  # [N, O], [N, R]
        ctx.save_for_backward(x, weight, A, B, down)
        ctx.scaling = s
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, B, down = ctx.saved_tensors
        s, (need_x, need_weight, need_bias, need_A, need_B, _) = ctx.scaling, ctx.needs_input_grad
        differentiable = torch.is_grad_enabled() and not torch.compiler.is_compiling()  # for gradients of gradients
        multiply: Any = linear if differentiable else product
        grad_x = up = None
        if differentiable:
            up, down = linear(grad, B.t()), None  # the x A^T of the forward has no autograd history
            grad_x = linear(grad, weight.t()) + s * linear(up, A.t()) if need_x else None
        elif need_x:
            grad_x, up = product_with_update(grad, weight.t(), None, B, A, s)  # [N, I], [N, R]
        up = multiply(grad, B.t()) if up is None else up
        down = multiply(x, A) if down is None else down
        grad_weight = multiply(grad.t(), x.t()) if need_weight else None
        grad_bias = grad.sum(0) if need_bias else None
        grad_A = s * multiply(up.t(), x.t()) if need_A else None  # [R, N] [N, I]
        grad_B = s * multiply(grad.t(), down.t()) if need_B else None  # [O, N] [N, R]
        return grad_x, grad_weight, grad_bias, grad_A, grad_B, None


def with_update(weight: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    """weight [O, I] + s B A in the weight's dtype: the product in fp32 whatever that is, one rounding at the end."""
    return (weight.float() + s * (B.float() @ A.float())).to(weight.dtype)


def _version(x: Tensor) -> int:
    """How often a tensor was written to in place; -1 where torch doesn't count."""
    return -1 if x.is_inference() else x._version


class LoRALinear(Linear):
    """`nn.Linear` with a trainable low-rank update: y = x W^T + b + (lora_alpha / r) x A^T B^T.

    `weight` [O, I] and `bias` [O] are frozen; `lora_A` [R, I] starts Kaiming-uniform (a = sqrt 5) and `lora_B` [O, R]
    at zero, so a new layer computes what the linear layer it replaces did. In training `lora_dropout` drops elements of
    the x that the update reads; the reference has none.

    In fp32 the update is part of the product. In half precision and under autocast the low-rank path
    runs beside the frozen one, because a small B A would be rounded away in the sum.

    A merged layer's state dict holds `weight` with the update in it and no `lora_*`, so a file never counts the update
    twice. While merged, a layer also keeps the weight [O, I] as it was and copies of the matrices that were merged, so
    `unmerge` is exact even if `lora_A` or `lora_B` changed. Loading other matrices or another weight unmerges first.
    """

    weight_before: Any  # a Tensor while merged, else None
    merged_A: Any
    merged_B: Any

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        lora_alpha: float,
        bias: bool = True,
        lora_dropout: float = 0.0,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias)
        if r < 1:
            raise ValueError(f"LoRALinear needs a rank of at least 1, got r={r}; rank 0 is nn.Linear.")
        self.r = r
        self.scaling = lora_alpha / r
        self.dropout = Dropout(lora_dropout)
        for name in ("weight_before", "merged_A", "merged_B"):  # buffers: they follow when the layer moves
            self.register_buffer(name, None, persistent=False)
        self.merged_scaling = 0.0
        self._left: dict[str, tuple[Tensor, int]] = {}  # parameters and their versions when they were merged
        self.lora_A = nn.Parameter(torch.empty(r, in_features))
        self.lora_B = nn.Parameter(torch.empty(out_features, r))
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.reset_lora_parameters()

    def reset_lora_parameters(self) -> None:
        # torch.nn.init, not .data: transformers guards these functions so that loaded tensors are left alone.
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    @property
    def lora_alpha(self) -> float:
        """The alpha that divided by the rank is the layer's scaling to the last bit."""
        alpha = self.scaling * self.r
        near = (alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, 0))
        return next((value for value in near if value / self.r == self.scaling), alpha)

    @property
    def lora_dropout(self) -> float:
        """The p of `dropout`, a module: whoever turns off a model's dropouts by their class turns off this one too."""
        return self.dropout.p

    @lora_dropout.setter
    def lora_dropout(self, p: float) -> None:
        self.dropout.p = p

    @property
    def merged(self) -> bool:
        """Whether `weight` holds the update."""
        return self.weight_before is not None

    def forward(self, x: Tensor, apply_update: bool = True) -> Tensor:
        """x [..., I] -> [..., O]; with `apply_update=False` the frozen layer alone, merged or not.

        Raises RuntimeError for a merged layer that is to train or whose matrices changed since the merge, ValueError
        for matrices of other shapes.
        """
        if not apply_update:
            return linear(x, self.frozen_weight(), self.bias)
        if self.merged:
            if not torch.compiler.is_compiling() and not self._holds_its_update():
                raise RuntimeError("lora_A, lora_B or scaling of a merged LoRALinear changed. Call unmerge() first.")
            if self.training and torch.is_grad_enabled():
                raise RuntimeError("A merged LoRALinear can't train: its lora_A and lora_B are unused. Call unmerge().")
            return linear(x, self.weight, self.bias)
        self.check_shapes()
        dropped = self.dropout(x)
        tensors = (x, self.weight, self.bias, self.lora_A, self.lora_B)
        if dropped is x and x.numel() and self._can_fuse(*tensors):
            return by_rows(_LoRALinear.apply, *tensors, self.scaling)
        update = F.linear(F.linear(dropped, self.lora_A), self.lora_B)
        return linear(x, self.weight, self.bias) + self.scaling * update

    @staticmethod
    def _can_fuse(x: Tensor, weight: Tensor, *others: Tensor | None) -> bool:
        """Whether `_LoRALinear` can compute product and update together: plain fp32 tensors, no autocast, no trace."""
        if x.dtype is not torch.float32 or weight.dtype is not torch.float32:
            return False
        device = x.device.type
        if is_traced() or (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
            return False
        return all(other is None or type(other) in PLAIN_TENSORS for other in (x, weight, *others))

    def check_shapes(self) -> None:
        """Raise ValueError unless lora_A [R, I] and lora_B [O, R] are of the weight's sizes, on its device."""
        (out, size), rank, device = self.weight.shape, self.lora_A.shape[0], self.weight.device
        check("lora_A", self.lora_A, device, rank, size)
        check("lora_B", self.lora_B, device, out, rank)

    @torch.no_grad()
    def merge(self) -> None:
        """Put (alpha / r) B A, as they are now, into `weight` in place, once; a second call does nothing.

        Raises ValueError for a weight that can't be written to: computed from others, or not in memory.
        """
        if self.merged and self._holds_its_update():
            return
        self._check_writable()
        self.unmerge()
        merged = self.merged_weight()
        self.weight_before, self.merged_scaling = self.weight.detach().clone(), self.scaling
        self.merged_A, self.merged_B = self.lora_A.detach().clone(), self.lora_B.detach().clone()
        self.weight.copy_(merged)
        self._left = {name: (x, _version(x)) for name, x in self.named_parameters()}

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take out of `weight` what `merge` put in; without a merge, do nothing. Raises as `merge`."""
        if self.merged:
            self._check_writable()
            self.weight.copy_(self.frozen_weight())
            self.weight_before = self.merged_A = self.merged_B = None
            self._left = {}

    def _check_writable(self) -> None:
        """Raise ValueError if what is written to `weight` would be lost."""
        if not isinstance(self.weight, nn.Parameter):
            raise ValueError(
                "The weight of a LoRALinear is made of other parameters (torch.nn.utils.parametrize, weight_norm, "
                "prune): what merge() or unmerge() write to it would be lost. Remove that first, or merge before it."
            )
        if self.weight.is_meta:
            raise ValueError(
                "The weight of a LoRALinear is on the meta device, where nothing is kept: merge or unmerge before the "
                "model is offloaded (accelerate), or after it is loaded."
            )

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """The weight [O, I] with the update, merged or not."""
        if self.merged:
            return self.weight
        self.check_shapes()
        return with_update(self.weight, self.lora_A, self.lora_B, self.scaling)

    def frozen_weight(self) -> Tensor:
        """The weight [O, I] without the update, merged or not; to a rounding if `weight` was written to in between."""
        if not self.merged:
            return self.weight
        if self._untouched("weight"):
            return self.weight_before
        return with_update(self.weight, self.merged_A, self.merged_B, -self.merged_scaling)

    def _untouched(self, *names: str) -> bool:
        """Whether these parameters are the tensors that were merged, and nobody has written to them since."""
        left = ((getattr(self, name), *self._left.get(name, (None, -1))) for name in names)
        return all(now is then and _version(now) == version >= 0 for now, then, version in left)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_left": {name: left for name, left in self._left.items() if self._untouched(name)}}

    def __setstate__(self, state: dict[str, Any]) -> None:  # a copy's parameters count their versions anew
        super().__setstate__(state)
        self._left = {name: (getattr(self, name), _version(getattr(self, name))) for name in self._left}

    def _holds_its_update(self) -> bool:
        """Whether the matrices and scaling of a merged layer are those in its weight."""
        if self.scaling != self.merged_scaling:
            return False
        if not self._untouched("lora_A", "lora_B"):
            if not (is_same(self.lora_A, self.merged_A) and is_same(self.lora_B, self.merged_B)):
                return False
            self._left |= {name: (x, _version(x)) for name, x in self.named_parameters() if name != "weight"}
        return True

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:
            del destination[prefix + "lora_A"], destination[prefix + "lora_B"]

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing_keys: Any, *lists: Any
    ) -> None:
        arguments = (state_dict, prefix, local_metadata, strict, missing_keys, *lists)
        names = [f"{prefix}{name}" for name in ("lora_A", "lora_B")]
        weight = state_dict.get(f"{prefix}weight")
        is_alone = weight is not None and not any(name in state_dict for name in names)
        if is_alone and self.merged and is_same(weight, self.weight):  # what this layer saved
            super()._load_from_state_dict(*arguments)
            self._left["weight"] = (self.weight, _version(self.weight))
            missing_keys[:] = [name for name in missing_keys if name not in names]
            return
        if weight is not None or any(name in state_dict for name in names):
            self.unmerge()
        if is_alone and self._is_merged(weight):
            lists[-1].append(
                f"{prefix}weight already contains the update of {names[0]} and lora_B: it is from a merged model, and "
                "the update would count twice. Load it into a model without LoRA, or load the adapter alone."
            )
            return
        super()._load_from_state_dict(*arguments)

    @torch.no_grad()
    def _is_merged(self, weight: Tensor) -> bool:
        """Whether a weight is nearer to what this unmerged layer's would be merged than to what it is."""
        if weight.shape != self.weight.shape or weight.is_meta or self.weight.is_meta:
            return False
        weight = weight.to(self.weight).float()
        apart = ((weight - other.float()).norm() for other in (self.merged_weight(), self.weight))
        return bool(next(apart) < 0.5 * next(apart))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r={self.r}, scaling={self.scaling:g}, merged={self.merged}"


def lora_linear(config: Any, target: str, layer: int, in_features: int, out_features: int) -> nn.Linear:
    """One of the `TARGETS` of an encoder layer: with LoRA where the config asks for it there, else a plain layer.

    `lora_r` and `lora_alpha` set rank and scaling, `lora_target_modules` (default: query and value) and `lora_layers`
    (numbers from 0; default: all) which layers have an update, `lora_dropout` (default: 0) the dropout. Raises
    ValueError as `check_lora`.
    """
    check_lora(config)
    r, names, numbers = lora_rank(config), *(getattr(config, n, None) for n in ("lora_target_modules", "lora_layers"))
    targets = DEFAULT_TARGETS if names is None else target_names(names)
    if not r or target not in targets or (numbers is not None and layer not in as_list(numbers)):
        return Linear(in_features, out_features)
    p = getattr(config, "lora_dropout", None) or 0.0
    return LoRALinear(in_features, out_features, r, config.lora_alpha, lora_dropout=p)


def set_lora_(model: nn.Module, layers: dict[str, tuple[int, float]]) -> None:
    """Give exactly these linear layers of `model`, by name, an update of (rank, scaling); the others get or keep none.

    What was merged is unmerged. Weights and biases stay the parameters they were; the matrices start anew. Raises
    KeyError for a name that is no linear layer of the model, ValueError for a layer that is quantised or otherwise
    replaced.
    """
    check_not_quantised(model, layers)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if unknown := sorted(set(layers) - set(linear)):
        raise KeyError(unknown[0])
    for name, old in linear.items():
        if name not in layers and not isinstance(old, LoRALinear):
            continue
        if isinstance(old, LoRALinear):
            old.unmerge()
        sizes, has_bias = (old.in_features, old.out_features), old.bias is not None
        with torch.device("meta"):  # its parameters are those of the old one; only the matrices are new
            rank, scaling = layers.get(name, (0, 0.0))
            new = LoRALinear(*sizes, rank, rank * scaling, has_bias) if rank else Linear(*sizes, has_bias)
        new.weight, new.bias = old.weight, old.bias
        if isinstance(new, LoRALinear):
            new.scaling = scaling  # not by way of alpha, which would round it
            new.lora_A, new.lora_B = (
                nn.Parameter(torch.empty_like(matrix, device=old.weight.device, dtype=old.weight.dtype))
                for matrix in (new.lora_A, new.lora_B)
            )
            new.reset_lora_parameters()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new.train(old.training))


def check_not_quantised(model: nn.Module, names: Iterable[str] | None = None) -> None:
    """Raise ValueError if one of these layers (without names: of all `TARGETS`) is quantised or otherwise replaced.

    bitsandbytes, torchao and others replace `nn.Linear`, or its weight, by a class of their own, or store integers.
    """
    modules = dict(model.named_modules())
    for name in [name for name in modules if target_of(name) in TARGETS] if names is None else names:
        layer: Any = modules.get(name)
        if not hasattr(layer, "in_features"):
            continue
        found, is_plain = layer, type(layer) in (nn.Linear, Linear, LoRALinear)
        if is_plain:
            found = layer.weight
            is_plain = type(found).__module__.partition(".")[0] == "torch" and found.is_floating_point()
        if not is_plain:
            kind = f"{type(found).__module__}.{type(found).__qualname__}"
            what = f"{name} is a {kind}" if found is layer else f"{name}.weight is a {kind} of {found.dtype}"
            raise ValueError(
                f"{what}: quantised or replaced linear layers are not supported.\nUse the model in fp32, fp16 or bf16. "
                "To quantise what was trained, merge it (python -m lora_nlu.adapters convert ... --to merged) and load "
                "that in transformers' own class."
            )


def merge_lora_(model: nn.Module) -> None:
    """Merge every `LoRALinear` of `model` in place; idempotent."""
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.merge()


def unmerge_lora_(model: nn.Module) -> None:
    """Undo `merge_lora_`; idempotent."""
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.unmerge()


def unmerged_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of `model` by name, detached; weights without their updates, merged or not."""
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear) and module.merged:
            state[f"{name}.weight"] = module.frozen_weight().detach()
    return state
