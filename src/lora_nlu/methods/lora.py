"""LoRA (Hu et al. 2021, arXiv 2106.09685, eq. 3): h = W x + b + (alpha / r) B A x with W and b frozen.

Dim letters: N rows (tokens), I in_features, O out_features, R rank.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_nlu.errors import UserError
from lora_nlu.methods.description import Description, recorded_relative_query
from lora_nlu.methods.linear import UpdatedLinear, check_not_quantised
from lora_nlu.methods.table import METHODS
from lora_nlu.methods.targets import DEFAULT_TARGETS, TARGETS, as_list, is_number, target_names, targets_and_layers
from lora_nlu.ops import kernels


class _LoRALinear(torch.autograd.Function):
    """y = x W^T + b + s (x A^T) B^T of x [N, I], the update inside the product (`product_with_update`).

    The backward keeps x, x A^T and references to parameters only, and reaches A and B through the rank: no [O, I]
    gradient is formed unless W itself trains.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, s: float) -> Tensor:
        down, adds = None, kernels.can_add_update(x, weight, A.t(), B.t())
        W = weight if adds else torch.addmm(weight, B, A, alpha=s)  # without the kernel, the sum of both
        if kernels.can_use_onednn(x, W, bias):
            y = kernels.ONEDNN_LINEAR(x, W, bias, *kernels.NO_ACTIVATION)  # [N, O]
        else:
            y = F.linear(x, W, bias)
        if adds:
            y, down = kernels.add_update_(y, x, A.t(), B.t(), s)  # [N, O], [N, R]
        ctx.save_for_backward(x, weight, A, B, down)
        ctx.scaling = s
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, B, down = ctx.saved_tensors
        s, (need_x, need_weight, need_bias, need_A, need_B, _) = ctx.scaling, ctx.needs_input_grad
        differentiable = torch.is_grad_enabled() and not torch.compiler.is_compiling()  # for gradients of gradients
        multiply: Any = kernels.linear if differentiable else kernels.product
        grad_x = up = None
        if differentiable:
            up, down = kernels.linear(grad, B.t()), None  # the x A^T of the forward has no autograd history
            grad_x = kernels.linear(grad, weight.t()) + s * kernels.linear(up, A.t()) if need_x else None
        elif need_x:
            grad_x, up = kernels.product_with_update(grad, weight.t(), None, B, A, s)  # [N, I], [N, R]
        up = multiply(grad, B.t()) if up is None else up
        down = multiply(x, A) if down is None else down
        grad_weight = multiply(grad.t(), x.t()) if need_weight else None
        grad_bias = grad.sum(0) if need_bias else None
        grad_A = s * multiply(up.t(), x.t()) if need_A else None  # [R, N] [N, I]
        grad_B = s * multiply(grad.t(), down.t()) if need_B else None  # [O, N] [N, R]
        return grad_x, grad_weight, grad_bias, grad_A, grad_B, None


class _HalfLoRALinear(torch.autograd.Function):
    """y = x W^T + b + s (x A^T) B^T of x [N, I], A and B in half precision, to which W and b are converted.

    The update is added to the product's result, because in the weight it would be rounded away. The backward keeps x,
    x A^T and references to what it was given, and converts W again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, s: float) -> Tensor:
        down = F.linear(x, A)  # [N, R]
        ctx.save_for_backward(x, weight, A, B, down)
        ctx.scaling = s
        y = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        return y.addmm_(down, B.t(), alpha=s)  # [N, O]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, B, down = ctx.saved_tensors
        s, (need_x, need_weight, need_bias, need_A, need_B, _) = ctx.scaling, ctx.needs_input_grad
        up = grad @ B  # [N, R]
        if torch.is_grad_enabled():  # for gradients of gradients: the x A^T of the forward has no autograd history
            down = F.linear(x, A)
        grad_x = torch.addmm(grad @ weight.to(x.dtype), up, A, alpha=s) if need_x else None  # [N, I]
        grad_weight = grad.t() @ x if need_weight else None
        grad_bias = grad.sum(0) if need_bias else None
        # with beta=0 the first matrix gives its shape alone
        grad_A = torch.addmm(A, up.t(), x, beta=0, alpha=s) if need_A else None  # [R, N] [N, I]
        grad_B = torch.addmm(B, grad.t(), down, beta=0, alpha=s) if need_B else None  # [O, N] [N, R]
        return grad_x, grad_weight, grad_bias, grad_A, grad_B, None


class LoRALinear(UpdatedLinear):
    """`nn.Linear` with a trainable low-rank update: y = x W^T + b + scaling x A^T B^T, scaling = lora_alpha / r.

    `weight` [O, I] and `bias` [O] are frozen; `lora_A` [R, I] starts Kaiming-uniform (a = sqrt 5) and `lora_B` [O, R]
    at zero, so a new layer computes what the linear layer it replaces did. In training `lora_dropout` drops elements of
    the x that the update reads; the reference has none. With `use_rslora` the scaling is lora_alpha / sqrt(r).

    In fp32 the update is part of the product. In half precision and under autocast the low-rank path runs beside the
    frozen one, because a small B A would be rounded away in the sum. In fp32 and under autocast both are one function,
    which keeps x and x A^T for the backward.
    """

    multiplies_frozen = True
    update_names: tuple[str, ...] = ("lora_A", "lora_B")

    def __init__(
        self, in_features: int, out_features: int, r: int, lora_alpha: float, bias: bool = True,
        lora_dropout: float = 0.0, use_rslora: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(in_features, out_features, bias=bias)
        if r < 1:
            raise ValueError(f"LoRALinear needs a rank of at least 1, got r={r}; rank 0 is nn.Linear.")
        self.r, self.lora_alpha, self.use_rslora = r, 1.0 * lora_alpha, use_rslora  # text is a TypeError
        self.dropout = kernels.Dropout(lora_dropout)
        self.lora_A = nn.Parameter(torch.empty(r, in_features))
        self.lora_B = nn.Parameter(torch.empty(out_features, r))
        self.reset_added_parameters()

    def reset_added_parameters(self, normal_std: float | None = None) -> None:
        """Draw new matrices; `normal_std`: A from a normal distribution instead, as the reference does in DeBERTa."""
        # torch.nn.init, not .data: transformers guards these functions so that loaded tensors are left alone.
        if normal_std is None:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        else:
            nn.init.normal_(self.lora_A, std=normal_std)
        nn.init.zeros_(self.lora_B)

    @property
    def method(self) -> str:  # type: ignore[override]
        """The row in table.py: rsLoRA is LoRA with another scaling. A subclass has its name as a class attribute."""
        return "rslora" if self.use_rslora else "lora"

    @property
    def scaling(self) -> float:
        """The factor of B A."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @property
    def lora_dropout(self) -> float:
        """The p of `dropout`, a module: whoever turns off a model's dropouts by their class turns off this one too."""
        return self.dropout.p

    @lora_dropout.setter
    def lora_dropout(self, p: float) -> None:
        self.dropout.p = p

    def forward(self, x: Tensor, apply_update: bool = True) -> Tensor:
        """x [..., I] -> [..., O]; with `apply_update=False` the frozen layer alone, merged or not.

        Raises RuntimeError for a merged layer that is to train or whose matrices changed, ValueError for other shapes.
        """
        weight, bias, frozen, update = self.weight, self.bias, self.frozen, None
        if frozen is None:
            x = kernels.widened(x, weight)
        if not apply_update:
            weight = self.frozen_weight()
        elif self.merged:
            if not torch.compiler.is_compiling() and not self._contains_its_update():
                raise RuntimeError("lora_A, lora_B or lora_alpha of a merged LoRALinear changed. Call unmerge() first.")
            if self.training and torch.is_grad_enabled():
                raise RuntimeError("A merged LoRALinear can't train: its lora_A and lora_B are unused. Call unmerge().")
        else:
            self.check_shapes()
            dropped, (A, B) = self.dropout(x), self.factors()
            if dropped is x and frozen is not None:
                return frozen.product_with_update(x, bias, A, B, self.scaling)
            if dropped is x and x.numel() and (dtype := self._dtype_to_fuse(x, weight, bias, A, B)):
                function = _LoRALinear if dtype is torch.float32 else _HalfLoRALinear
                rows, A, B = (each.to(dtype) for each in (kernels.as_rows(x), A, B))
                return kernels.as_grid(function.apply(rows, weight, bias, A, B, self.scaling), x)
            update = F.linear(F.linear(kernels.widened(dropped, A), A), B)
        if frozen is not None:
            y = frozen.product(x, bias)
            return y if update is None else (y + self.scaling * update).to(y.dtype)
        if kernels.can_use_onednn(x, weight, bias):
            y = kernels.as_grid(kernels.OneDNNLinear.apply(kernels.as_rows(x), weight, bias), x)
        else:
            y = F.linear(x, weight, bias)
        return y if update is None else y + self.scaling * update

    def factors(self) -> tuple[Tensor, Tensor]:
        """A [R, I] and B [O, R] of the update scaling x A^T B^T."""
        return self.lora_A, self.lora_B

    @staticmethod
    def _dtype_to_fuse(x: Tensor, *parameters: Tensor | None) -> torch.dtype | None:
        """In which dtype one function can compute product and update together: fp32, or autocast's half precision.

        None under a trace, for tensors of other libraries, and where dtypes are mixed and autocast does not decide.
        """
        tensors, device = [p for p in (x, *parameters) if p is not None], x.device.type
        if kernels.is_traced() or not all(type(p) in kernels.PLAIN_TENSORS for p in tensors):
            return None
        dtype = torch.float32
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            if torch.compiler.is_compiling() or dtype not in (torch.float16, torch.bfloat16):
                return None
        return dtype if all(p.dtype in (torch.float32, dtype) for p in tensors) else None

    def check_shapes(self) -> None:
        """Raise ValueError unless lora_A [R, I] and lora_B [O, R] are of the weight's sizes, on its device."""
        (out, size), rank, device = self.weight.shape, self.lora_A.shape[0], self.weight.device
        kernels.check_tensor("lora_A", self.lora_A, device, rank, size)
        kernels.check_tensor("lora_B", self.lora_B, device, out, rank)

    def with_update(self, weight: Tensor, parameters: list[Tensor], scaling: float) -> Tensor:
        A, B = parameters
        dtype = torch.promote_types(weight.dtype, torch.float32)  # of the product in bf16 too: one rounding at the end
        return (weight.to(dtype) + scaling * (B.to(dtype) @ A.to(dtype))).to(weight.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r={self.r}, scaling={self.scaling:g}, merged={self.merged}"


# ------------------------------------------------------------------------------------------------- the row in table.py


def read_settings(config: Any, needs_alpha: bool = True) -> dict[str, Any] | None:
    """The fields of `Description` that LoRA sets; None for rank 0, no LoRA. Raises ValueError, naming the setting."""
    r, alpha, p, names, numbers = (
        getattr(config, f"lora_{name}", None) for name in ("r", "alpha", "dropout", "target_modules", "layers")
    )
    p, names = 0.0 if p is None else p, DEFAULT_TARGETS if names is None else names
    if not is_number(r, int) or r < 0:
        raise ValueError(f"config.lora_r {r!r}: apply_lora=True needs a rank of 1 or more (0 is no LoRA).")
    if r and needs_alpha and not (is_number(alpha) and math.isfinite(alpha)):
        raise ValueError(f"config.lora_alpha {alpha!r}: apply_lora=True needs a number (scaling: lora_alpha / lora_r).")
    if not (is_number(p) and 0 <= p < 1):
        raise ValueError(f"config.lora_dropout {p!r}: give a number from 0 to below 1.")
    try:
        targets = tuple(target_names(names))
    except ValueError as e:
        raise ValueError(f"config.lora_target_modules {names!r}: {e}") from e
    if numbers is not None:
        count, layers = config.num_hidden_layers, as_list(numbers)
        if not layers or not all(is_number(n, int) and 0 <= n < count for n in layers):
            raise ValueError(
                f"config.lora_layers {numbers!r}: the model has {count} layers, 0 to {count - 1}; give numbers of them."
            )
        numbers = tuple(layers)
    if not r:
        return None
    scaling = {"rank": r, "alpha": alpha, "use_rslora": bool(getattr(config, "use_rslora", False))}
    return scaling | {"targets": targets, "layers": numbers, "dropout": p}


def read_rslora_settings(config: Any) -> dict[str, Any] | None:
    """As `read_settings`, with rsLoRA's scaling."""
    settings = read_settings(config)
    return None if settings is None else settings | {"use_rslora": True}


def new_layer(trained: Description, target: str, layer: int, in_features: int, out_features: int) -> Any:
    """A linear layer with the described variant of LoRA if `trained` updates this one of `TARGETS`, else None."""
    if not trained.updates(target, layer):
        return None
    linear: Any = next(row.linear for row in trained.rows if row.linear)
    options = {"lora_dropout": trained.dropout, "use_rslora": trained.use_rslora}
    return linear(in_features, out_features, trained.rank, trained.alpha, **options)


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """The layers with LoRA or a variant of it by their names in a model."""
    methods = [row.name for row in METHODS.values() if row.has_ranks]
    return {name: module for name, module in model.named_modules() if getattr(module, "method", None) in methods}


def set_lora_(
    model: nn.Module, layers: dict[str, tuple[int, float]], use_rslora: bool = False, method: str = "lora"
) -> None:
    """Give exactly these linear layers of `model`, by name, an update of (rank, alpha); the others get or keep none.

    method: the variant of LoRA. What was merged is unmerged. Weights and biases stay the parameters they were; the
    update starts anew. Raises KeyError for a name that is no linear layer of the model, ValueError for a quantised or
    replaced layer.
    """
    linear_class: Any = METHODS[method].linear
    check_not_quantised(model, layers)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if unknown := sorted(set(layers) - set(linear)):
        raise KeyError(unknown[0])
    for name, old in linear.items():
        if isinstance(old, UpdatedLinear):
            old.unmerge()
        elif name not in layers:
            continue
        in_features, out_features, has_bias, W = old.in_features, old.out_features, old.bias is not None, old.weight
        rank, alpha = layers.get(name, (0, 0.0))
        with torch.device("meta"):  # its parameters are those of the old one; only the matrices are new
            if rank:
                new: Any = linear_class(in_features, out_features, rank, alpha, bias=has_bias, use_rslora=use_rslora)
            else:
                new = kernels.Linear(in_features, out_features, bias=has_bias)
        new.weight, new.bias = W, old.bias
        if rank:
            dtype = old.bias.dtype if has_bias else W.dtype  # W may still be in a file's fp16
            for added in new.update_names:
                setattr(new, added, nn.Parameter(torch.empty_like(getattr(new, added), device=W.device, dtype=dtype)))
            new.reset_added_parameters()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new.train(old.training))


def rebuild(model: Any, adapter: Any, lora_alpha: float | None) -> None:
    """Give a model the layers of an adapter; `lora_alpha` is for a file that does not record its own."""
    set_lora_(model, adapter.layers(lora_alpha), adapter.use_rslora, adapter.method)
    if getattr(model, "relative_query", None) is not None:
        model.config.lora_relative_query = recorded_relative_query(adapter.relative_query)


def merged_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weight of each layer with LoRA, with the update in it, by its name in the model."""
    return {f"{name}.weight": layer.merged_weight().detach() for name, layer in lora_layers(model).items()}


def describe(model: Any) -> dict[str, Any]:
    """Where a model's LoRA is and its dropout, as run.json records them; layers None are all."""
    layers = lora_layers(model)
    targets, numbers = targets_and_layers(layers)
    everywhere = len(numbers) == model.config.num_hidden_layers
    dropout = max(layer.lora_dropout for layer in layers.values())
    return {"targets": targets, "layers": None if everywhere else numbers, "lora_dropout": dropout}


def write_settings(model: Any) -> None:
    """Set the LoRA settings of `model.config` to those of its layers, so that a model of this config has the same.

    A merged model needs none: its weights contain the update. Raises UserError for LoRA that a config can't describe,
    and for a model of which only some layers are merged.
    """
    config, layers = model.config, lora_layers(model)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not layers and getattr(config, "apply_lora", False) and getattr(config, "lora_r", 0):
        config.apply_lora = False
    if all(module.merged for module in layers.values()):
        return
    if merged := [name for name, module in layers.items() if module.merged]:
        raise UserError(
            f"{merged[0]} is merged and other layers are not: the saved model would look like a damaged one.\n"
            "Merge all of them (merge_lora_) or none (unmerge_lora_), then save."
        )
    targets, numbers = targets_and_layers(layers)
    described = {n for n in linear for t, i in [targets_and_layers([n])] if {*t} & {*targets} and {*i} & {*numbers}}
    kinds = {(x.method, x.r, x.lora_alpha, x.lora_dropout, x.use_rslora) for x in layers.values()}
    if len(kinds) > 1 or described != {*layers} or not {*targets} <= {*TARGETS}:
        raise UserError(
            "config.json can describe LoRA with one rank, alpha and dropout, on the same modules of each layer; "
            "this model's LoRA is different and would be lost.\n"
            "Save it with adapters.save_adapter, or merge it first (merge_lora_)."
        )
    method, r, alpha, p, use_rslora = kinds.pop()
    config.apply_lora, config.lora_r = True, r
    vars(config).pop("use_rslora", None)
    for name, value, default in (
        ("lora_variant", method, "lora"),
        ("lora_alpha", alpha, None),
        ("lora_target_modules", targets, [*DEFAULT_TARGETS]),
        ("lora_layers", numbers, [*range(config.num_hidden_layers)]),
        ("lora_dropout", p, 0.0),
        ("use_rslora", use_rslora and "use_rslora" in METHODS[method].settings, False),
    ):
        if value != default or getattr(config, name, None) is not None:
            setattr(config, name, value)
