"""PiSSA (Meng et al. 2024, arXiv 2404.02948): LoRA that starts from the principal singular vectors of the weight.

With W = U S V^T, s the scaling and S_R the R largest singular values, A and B start as

    B_start = U_R sqrt(S_R / s),  A_start = sqrt(S_R / s) V_R^T,      so that s B_start A_start is U_R S_R V_R^T,
    h = W_res x + b + s B A x,    W_res = W - s B_start A_start, frozen.

A layer keeps A_start and B_start beside A and B. Its `weight` is W, and the update s (B A - B_start A_start) of rank
2 R, as in the folders that PEFT converts to LoRA. A run's trainer replaces `weight` by W_res (`subtract`): a step then
costs what LoRA's does, without a second [O, I] matrix. W_res + s B_start A_start differs from W by roundings, and the
base model's fingerprint, a merged model and a saved one need W itself: `Checkpoints.restore_weights` reads it from the
base model's file again. A model that was not loaded from a file keeps W.

Dim letters: I in_features, O out_features, R rank.
"""

import logging
import math
import time
from dataclasses import replace
from typing import Any

import scipy.linalg
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_nlu.errors import UserError
from lora_nlu.methods import lora
from lora_nlu.methods.linear import RESTORE
from lora_nlu.methods.lora import LoRALinear
from lora_nlu.ops import kernels
from lora_nlu.ops.tensors import is_same

logger = logging.getLogger(__name__)


class PissaLinear(LoRALinear):
    """`LoRALinear` with the update scaling (B A - B_start A_start); the starts are 0 until `start`: plain LoRA."""

    method = "pissa"
    multiplies_frozen = True
    update_names = ("lora_A", "lora_B", "lora_A_start", "lora_B_start")
    subtracted: tuple[Tensor, Tensor] | None = None  # A_start and B_start of W_res in `weight`; None if that is W
    subtracted_scaling = 0.0

    def __init__(self, in_features: int, out_features: int, r: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(in_features, out_features, r, *args, **kwargs)
        self.lora_A_start = nn.Parameter(torch.zeros(r, in_features), requires_grad=False)
        self.lora_B_start = nn.Parameter(torch.zeros(out_features, r), requires_grad=False)

    def reset_added_parameters(self, normal_std: float | None = None) -> None:
        super().reset_added_parameters(normal_std)
        if hasattr(self, "lora_B_start"):
            nn.init.zeros_(self.lora_A_start)
            nn.init.zeros_(self.lora_B_start)

    def forward(self, x: Tensor, apply_update: bool = True) -> Tensor:
        """x [..., I] -> [..., O]; with `apply_update=False` the layer with W alone. Raises as `LoRALinear`."""
        if self.subtracted is not None and self.subtracted_scaling != self.scaling:
            raise RuntimeError(f"lora_alpha changed, and the weight of this layer is W_res of the earlier. {RESTORE}")
        if self.merged or apply_update == (self.subtracted is not None):
            return super().forward(x, apply_update)
        A, B, scaling = self.lora_A_start, self.lora_B_start, self.scaling
        if apply_update:  # `weight` is W
            y, scaling = super().forward(x), -scaling
        elif self.frozen is not None:
            y = self.frozen.product(x, self.bias)
        else:
            y = kernels.linear(kernels.widened(x, self.weight), self.weight, self.bias)
        return (y + scaling * F.linear(F.linear(kernels.widened(x, A), A), B)).to(y.dtype)

    def check_shapes(self) -> None:
        super().check_shapes()
        for name in ("lora_A", "lora_B"):
            start = f"{name}_start"
            kernels.check_tensor(start, getattr(self, start), self.weight.device, *getattr(self, name).shape)

    def with_update(self, weight: Tensor, parameters: list[Tensor], scaling: float) -> Tensor:
        A, B, A_start, B_start = parameters
        if self.subtracted is None:
            A, B = torch.cat([A, A_start]), torch.cat([B, -B_start], dim=1)
        return super().with_update(weight, [A, B], scaling)

    @torch.no_grad()
    def start(self) -> None:
        """Set A and B, and their starts, by the singular vectors of W. Raises UserError as `principal_part`."""
        A, B = principal_part(self.weight, self.r, self.scaling)
        for parameters, tensor in (((self.lora_A, self.lora_A_start), A), ((self.lora_B, self.lora_B_start), B)):
            for parameter in parameters:
                parameter.copy_(tensor)

    def started(self) -> bool:
        """Whether A_start and B_start are set: by `start`, an adapter or a checkpoint."""
        return not self.lora_B_start.is_meta and bool(self.lora_B_start.any())

    def is_current(self) -> bool:
        """Whether `weight` is the W_res of the present A_start, B_start and scaling."""
        is_same_scaling = self.subtracted_scaling == self.scaling
        return (
            is_same_scaling
            and self.subtracted is not None
            and all(map(is_same, self.subtracted, (self.lora_A_start, self.lora_B_start)))
        )

    @torch.no_grad()
    def subtract(self) -> None:
        """Make `weight` W_res. Raises ValueError if it can't be written to."""
        self._check_writable()
        self.unmerge()
        self.subtracted = self.lora_A_start.clone(), self.lora_B_start.clone()
        self.subtracted_scaling = self.scaling
        self.weight.copy_(self.of_checkpoint(self.weight))

    @torch.no_grad()
    def of_checkpoint(self, weight: Tensor) -> Tensor:
        """The present value of `weight`, from W [O, I] of a file: W, or W_res, computed in float64 and rounded once."""
        if self.subtracted is None:
            return weight
        A, B = (start.to("cpu", torch.float64) for start in self.subtracted)
        return torch.addmm(weight.to("cpu", torch.float64), B, A, alpha=-self.subtracted_scaling).to(weight)

    @property
    def is_replaced(self) -> bool:
        return super().is_replaced or self.subtracted is not None

    def restore_weight(self, weight: Tensor) -> None:
        super().restore_weight(weight)
        self.subtracted = None

    def frozen_weight(self) -> Tensor:
        """W [O, I], merged or not; after `subtract` it is computed from W_res and differs by roundings."""
        if self.subtracted is None:
            return super().frozen_weight()
        A, B = (start.to(self.weight) for start in self.subtracted)
        return torch.addmm(self.weight, B, A, alpha=self.subtracted_scaling)

    def _check_writable(self) -> None:
        super()._check_writable()
        if self.subtracted is not None:
            raise ValueError(f"The weight of this layer is W_res of PiSSA. {RESTORE}")

    def _save_to_state_dict(self, *args: Any) -> None:
        if self.subtracted is not None:
            raise RuntimeError(f"The weight of a layer is W_res of PiSSA, and can't be saved. {RESTORE}")
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        names = [f"{prefix}{name}" for name in ("weight", "lora_A_start", "lora_B_start")]
        if self.subtracted is not None and (loaded := [name for name in names if name in state_dict]):
            others[-1].append(f"{loaded[0]}: the weight of this layer is W_res of PiSSA. {RESTORE}")
            return
        super()._load_from_state_dict(state_dict, prefix, *others)


@torch.no_grad()
def principal_part(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A [R, I] and B [O, R] of W [O, I], with which s B A is the best approximation of W of this rank.

    Computed in float64 from eigenvectors of the smaller of W W^T and W^T W, which takes less time than an SVD. The
    sign of each eigenvector is chosen so that its number farthest from 0 is positive. Raises UserError if R is above
    min(O, I), or W is not finite or on the meta device.
    """
    if weight.is_meta:
        raise UserError(
            "PiSSA starts from the weights, and some of them are on the meta device (offloaded by accelerate).\n"
            "Load the model on a CPU or GPU."
        )
    if rank > min(weight.shape):
        most = min(weight.shape)
        raise UserError(
            f"PiSSA, rank {rank}: a weight {list(weight.shape)} has {most} singular vectors. Lower --lora_r."
        )
    is_wide = weight.shape[0] <= weight.shape[1]
    W = weight.detach().to("cpu", torch.float64)
    if not W.isfinite().all():
        raise UserError("PiSSA starts from the weights, and some are not finite (NaN or infinity). Use another model.")
    W = W if is_wide else W.t()
    size = W.shape[0]
    values, vectors = scipy.linalg.eigh((W @ W.t()).numpy(), subset_by_index=(size - rank, size - 1))
    S = torch.from_numpy(values).flip(0).clamp(min=0).sqrt()  # [R], the largest first
    U = torch.from_numpy(vectors).flip(1)  # [min(O, I), R]
    U = U * U.gather(0, U.abs().argmax(0, keepdim=True)).sign()
    floor = max(1e-12 * float(S[0]), torch.finfo(torch.float64).tiny)  # a W of lower rank has singular values of 0
    V = (U.t() @ W) / S.clamp(min=floor)[:, None]  # [R, max(O, I)]
    root = (S / scaling).sqrt()[:, None]
    A, B = (root * V, (root * U.t()).t()) if is_wide else (root * U.t(), (root * V).t())
    return A.to(weight).contiguous(), B.to(weight).contiguous()


# ------------------------------------------------------------------------------------------------- the row in table.py


def pissa_layers(model: Any) -> dict[str, PissaLinear]:
    """The layers with PiSSA by their names in a model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PissaLinear)}


def start(model: Any) -> None:
    """Set the layers whose start neither an adapter nor a checkpoint has set. Raises UserError as `principal_part`."""
    began = time.monotonic()
    layers = [layer for layer in pissa_layers(model).values() if not layer.started()]
    for layer in layers:
        layer.start()
    if (seconds := time.monotonic() - began) > 5:
        logger.warning("PiSSA: computing the singular vectors of %d weights took %.0f s.", len(layers), seconds)


@torch.no_grad()
def rebuild(model: Any, adapter: Any, lora_alpha: float | None) -> None:
    """As LoRA's, with the adapter's A_start and B_start; PEFT's folders contain none, and `start` computes them."""
    lora.rebuild(model, adapter, lora_alpha)
    for name, layer in pissa_layers(model).items():
        for part in ("lora_A_start", "lora_B_start"):
            start, tensor = getattr(layer, part), adapter.state.get(f"{name}.{part}")
            if tensor is not None and tensor.shape == start.shape:  # of another shape: `attach_adapter` refuses it
                start.copy_(tensor)


@torch.no_grad()
def before_steps(model: Any) -> None:
    """Make the weight of every layer the W_res of its present starts; several processes all use the first one's."""
    layers = [x for x in pissa_layers(model).values() if type(x.weight) is nn.Parameter and not x.weight.requires_grad]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        from accelerate.utils import broadcast_object_list

        starts = [start for layer in layers for start in (layer.lora_A_start, layer.lora_B_start)]
        values = broadcast_object_list([start.cpu() for start in starts])
        for start_, value in zip(starts, values, strict=True):
            start_.copy_(value)
    if all(layer.is_current() for layer in layers) or not model.has_weight_files():
        return
    was_held_in_bf16 = model.is_held_in_bf16
    model.restore_weights()
    for layer in layers:
        layer.subtract()
    if was_held_in_bf16:
        model.hold_in_bf16(trains=True)


def to_adapter(model: Any) -> dict[str, Any]:
    """What a folder contains: all that trains, and the starts."""
    starts = {f"{name}.{part}" for name in pissa_layers(model) for part in ("lora_A_start", "lora_B_start")}
    named = model.named_parameters()
    return {"state": {name: p.detach() for name, p in named if p.requires_grad or name in starts}}


def to_file(adapter: Any) -> Any:
    """The adapter as PEFT converts it, to LoRA of the base model: [A; A_start] [2 R, I] and [B, -B_start] [O, 2 R].

    Raises UserError for an adapter without starts, which is one that PEFT saved without converting it.
    """
    state = {name: tensor for name, tensor in adapter.state.items() if not name.endswith("_start")}
    for name in adapter.ranks:
        A, B = f"{name}.lora_A", f"{name}.lora_B"
        if f"{A}_start" not in adapter.state:
            raise UserError(
                f'{adapter.source}: PEFT saved it without its start (init_lora_weights is "pissa"). Convert it in PEFT '
                "(save_pretrained with path_initial_model_for_weight_conversion), or write --to merged."
            )
        state[A] = torch.cat([state[A], adapter.state[f"{A}_start"]])
        state[B] = torch.cat([state[B], -adapter.state[f"{B}_start"]], dim=1)
    metadata = adapter.metadata | {"method": {"name": adapter.method} | adapter.metadata.get("method", {})}
    return replace(_with_alphas(adapter, _factor(adapter)), state=state, metadata=metadata)


def from_file(adapter: Any) -> Any:
    """The reverse of `to_file`. Raises UserError for an odd rank, which `to_file` does not return."""
    state = {}
    for name, tensor in adapter.state.items():
        layer, _, part = name.rpartition(".")
        if layer not in adapter.ranks or part not in ("lora_A", "lora_B"):
            state[name] = tensor
            continue
        dim, rank = (0, 1)[part == "lora_B"], adapter.ranks[layer]
        if rank % 2:
            raise UserError(f"{adapter.source}: {layer}.lora_A has rank {rank}; with its start, PiSSA's is even.")
        trained, start = tensor.split(rank // 2, dim)
        state[name] = trained.contiguous()
        state[f"{name}_start"] = -start if dim else start.clone()
    return replace(_with_alphas(adapter, 1 / _factor(adapter)), state=state)


def _factor(adapter: Any) -> float:
    """The factor of alpha that keeps the scaling when the rank doubles: 2, or sqrt(2) for alpha / sqrt(r)."""
    return math.sqrt(2) if adapter.use_rslora else 2.0


def _with_alphas(adapter: Any, factor: float) -> Any:
    """The adapter with its alphas multiplied; 15 digits, so that 16 times sqrt(2), divided by it again, is 16."""
    pattern = {name: float(f"{alpha * factor:.15g}") for name, alpha in adapter.alpha_pattern.items()}
    return replace(adapter, lora_alpha=float(f"{adapter.lora_alpha * factor:.15g}"), alpha_pattern=pattern)
