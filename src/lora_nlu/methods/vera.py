"""VeRA (Kopiczko et al. 2023, arXiv 2310.11454, eq. 2): h = W x + bias + b * (B (d * (A x))), W, bias, A, B frozen.

A [R, I] and B [O, R] are random and the same in every layer; the vectors d [R] and b [O] of each layer train.

Dim letters: N rows (tokens), I in_features, O out_features, R rank.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_nlu.errors import UserError
from lora_nlu.files import check_json
from lora_nlu.methods import lora
from lora_nlu.methods.description import Description
from lora_nlu.methods.linear import UpdatedLinear
from lora_nlu.methods.targets import is_number
from lora_nlu.ops import kernels
from lora_nlu.ops.frozen import FrozenWeight

_PAIR = ("base_model.vera_A", "base_model.vera_B")  # PEFT's keys
_FIRST_DRAWS = [0.49625658988952637, 0.7682217955589294]  # of torch.rand after manual_seed(0), on a CPU


class Projections:
    """The pair A [R, I] and B [O, R] of all layers of one model, with their largest I and O; each layer reads a slice.

    It is drawn from `seed` when it is first needed, as PEFT draws it: uniformly with bound sqrt(6 / fan_in), A first.
    The layers share this object, which is no module: state dicts contain no pair, and copies of a model share it too.
    """

    def __init__(self, rank: int, seed: int = 0) -> None:
        self.rank, self.seed = rank, seed
        self.inputs = self.outputs = 0
        self.pair: tuple[Tensor, Tensor] | None = None  # in fp32, on the CPU
        self._kept: dict[Any, Any] = {}  # slices by shape, device and dtype

    def widen(self, inputs: int, outputs: int) -> None:
        """Let the pair be at least as large as a layer of these sizes; a pair that is too small is drawn again."""
        if inputs > self.inputs or outputs > self.outputs:
            self.inputs, self.outputs = max(inputs, self.inputs), max(outputs, self.outputs)
            self.pair, self._kept = None, {}

    def tensors(self) -> tuple[Tensor, Tensor]:
        """A and B in fp32, on the CPU."""
        if self.pair is None:
            self.pair = self.drawn()
        return self.pair

    @torch.inference_mode(False)
    def drawn(self) -> tuple[Tensor, Tensor]:
        """The pair of the seed. Raises UserError if this torch draws other numbers than earlier versions did."""
        if torch.rand(2, generator=torch.Generator("cpu").manual_seed(0), dtype=torch.float32).tolist() != _FIRST_DRAWS:
            raise UserError(
                f"VeRA: PyTorch {torch.__version__} draws other random numbers from a seed than earlier versions, so "
                "the frozen matrices would be others.\nUse an earlier version."
            )
        generator = torch.Generator("cpu").manual_seed(self.seed)
        A = torch.empty(self.rank, self.inputs, dtype=torch.float32, device="cpu")
        B = torch.empty(self.outputs, self.rank, dtype=torch.float32, device="cpu")
        for matrix in (A, B):
            bound = math.sqrt(3) * (math.sqrt(2) / math.sqrt(matrix.shape[1]))
            matrix.uniform_(-bound, bound, generator=generator)
        return A, B

    def set_(self, A: Tensor, B: Tensor) -> None:
        """Take this pair in place of the one of the seed."""
        self.pair, self._kept = (A.float(), B.float()), {}

    def sliced(self, layer: nn.Linear, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A [R, I] and B [O, R] of the sizes of a layer, kept for each device and dtype."""
        key = layer.in_features, layer.out_features, device, dtype
        if key not in self._kept:
            A, B = self.tensors()
            with torch.inference_mode(False):
                A, B = A[:, : layer.in_features].contiguous(), B[: layer.out_features]
                self._kept[key] = A.to(device, dtype), B.to(device, dtype)
        return self._kept[key]

    def weights(self, layer: nn.Linear, device: torch.device, in_bf16: bool) -> tuple[Any, Any]:
        """The same as objects that multiply: `FrozenWeight`s in bf16, or `_Weight`s in fp32."""
        key = layer.in_features, layer.out_features, device, in_bf16
        if key not in self._kept:
            kind = FrozenWeight if in_bf16 else _Weight
            with torch.inference_mode(False):
                self._kept[key] = tuple(kind(matrix) for matrix in self.sliced(layer, device, torch.float32))
        return self._kept[key]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": {}}


class _Weight:
    """`FrozenWeight` in fp32: a weight [O, I] and its transpose, each contiguous, which multiplies faster."""

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.transposed = weight, weight.t().contiguous()

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return kernels.product(x, self.weight, bias)

    def backward(self, grad: Tensor) -> Tensor:
        return kernels.product(grad, self.transposed)


class _AddUpdate(torch.autograd.Function):
    """y [N, O] + b * (d * x A^T) B^T, in place, of x [N, I]; A and B are weights of `Projections`.

    The backward keeps x A^T and (d * x A^T) B^T, which saves computing these two products again; x is kept only for
    gradients of gradients.
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, d: Tensor, b: Tensor, pair: tuple[Any, Any], matrices: tuple[Tensor, Tensor]
    ) -> Tensor:
        down, up = pair
        u = down.forward(x, None)  # [N, R]
        v = up.forward(_scaled(u, d), None)  # [N, O]
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, d, b, u, v)
        ctx.pair, ctx.matrices = pair, matrices
        return y.addcmul_(v, b) if v.dtype is b.dtype else y.add_(_scaled(v, b))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, d, b, u, v = ctx.saved_tensors
        _, need_x, need_d, need_b, _, _ = ctx.needs_input_grad
        down, up = ctx.pair
        g: Any = None
        grad_x: Any = None
        if torch.is_grad_enabled():  # for gradients of gradients: u and v have no history
            A, B = ctx.matrices
            u = kernels.linear(x.to(A.dtype), A)
            v = kernels.linear(d * u, B)
            g = kernels.linear(b * grad, B.t())  # [N, R]
            grad_x = kernels.linear(d * g, A.t()) if need_x else None
        else:
            if need_x or need_d:
                g = up.backward(_scaled(grad, b))
            if need_x:
                grad_x = down.backward(_scaled(g, d))
        grad_d = _sums(g, u) if need_d else None
        return grad, grad_x, grad_d, _sums(grad, v) if need_b else None, None, None


# These two cast to fp32 first: torch is slow where bf16 is multiplied by fp32 (in place, 30 times), and casts are fast.


def _scaled(x: Tensor, factors: Tensor) -> Tensor:
    """x [N, K] times fp32 factors [K], computed in fp32, in the dtype of x."""
    return x * factors if x.dtype is factors.dtype else x.float().mul_(factors).to(x.dtype)


def _sums(x: Tensor, y: Tensor) -> Tensor:
    """The sums over rows of x y [N, K], in fp32."""
    return (x.float() * y.float()).sum(0)


class VeraLinear(lora.LoRALinear):
    """`nn.Linear` with an update of two frozen products, each followed by a trained vector: b * (B (d * (A x))).

    `vera_lambda_d` [R] starts at 0.1 and `vera_lambda_b` [O] at zero, so a new layer computes what the linear layer it
    replaces did. In training `lora_dropout` drops elements of the x that the update reads.
    """

    method = "vera"
    multiplies_frozen = True
    update_names = ("vera_lambda_d", "vera_lambda_b")
    scaling = 1.0
    lora_alpha: Any  # None

    def __init__(
        self, in_features: int, out_features: int, r: int, lora_alpha: None = None, bias: bool = True,
        lora_dropout: float = 0.0, use_rslora: bool = False, projections: Projections | None = None,
    ) -> None:  # fmt: skip
        UpdatedLinear.__init__(self, in_features, out_features, bias=bias)
        self.r, self.lora_alpha, self.use_rslora = r, None, False
        self.dropout, self.projections = kernels.Dropout(lora_dropout), projections or Projections(r)
        self.projections.widen(in_features, out_features)
        self.vera_lambda_d = nn.Parameter(torch.empty(self.r))
        self.vera_lambda_b = nn.Parameter(torch.empty(out_features))
        self.reset_added_parameters()

    def reset_added_parameters(self, normal_std: float | None = None) -> None:
        nn.init.constant_(self.vera_lambda_d, 0.1)
        nn.init.zeros_(self.vera_lambda_b)

    def forward(self, x: Tensor, apply_update: bool = True) -> Tensor:
        """x [..., I] -> [..., O]; with `apply_update=False` the frozen layer alone, merged or not.

        Raises RuntimeError for a merged layer that is to train or whose vectors changed, ValueError for other shapes.
        """
        weight, bias, frozen, d, b = self.weight, self.bias, self.frozen, self.vera_lambda_d, self.vera_lambda_b
        has_update = apply_update and not self.merged
        if frozen is None:
            x = kernels.widened(x, weight)
        if not apply_update:
            weight = self.frozen_weight()
        elif self.merged:
            self._check_merged()
        else:
            self.check_shapes()
        rows = kernels.as_rows(x)
        y = kernels.linear(rows, weight, bias) if frozen is None else frozen.product(rows, bias)  # [N, O]
        if has_update:
            dropped, in_bf16 = self.dropout(rows), frozen is not None
            fuses = in_bf16 or self._dtype_to_fuse(rows, weight, bias, d, b) is torch.float32
            if fuses and x.numel() and not torch.compiler.is_compiling():
                matrices = self.projections.sliced(self, x.device, torch.float32)
                weights = self.projections.weights(self, x.device, in_bf16)
                y = _AddUpdate.apply(y, dropped, d, b, weights, matrices)
            else:
                A, B = self.projections.sliced(self, x.device, self._dtype_of_products(x))
                y = (y + b * F.linear(d * F.linear(kernels.widened(dropped, d), A), B)).to(y.dtype)
        return kernels.as_grid(y, x)

    @staticmethod
    def _dtype_of_products(x: Tensor) -> torch.dtype:
        """The dtype in which torch multiplies x: under autocast it would cast the frozen matrices in each step."""
        device = x.device.type
        is_cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        return torch.get_autocast_dtype(device) if is_cast else x.dtype

    def _check_merged(self) -> None:
        """Raise RuntimeError if a merged layer is to train, or if its vectors changed."""
        if not torch.compiler.is_compiling() and not self._contains_its_update():
            raise RuntimeError("vera_lambda_d or vera_lambda_b of a merged VeraLinear changed. Call unmerge() first.")
        if self.training and torch.is_grad_enabled():
            raise RuntimeError("A merged VeraLinear can't train: its vectors are unused. Call unmerge().")

    def check_shapes(self) -> None:
        """Raise ValueError unless the vectors are d [R] and b [O], on the weight's device."""
        device = self.weight.device
        kernels.check_tensor("vera_lambda_d", self.vera_lambda_d, device, self.r)
        kernels.check_tensor("vera_lambda_b", self.vera_lambda_b, device, self.weight.shape[0])

    def with_update(self, weight: Tensor, parameters: list[Tensor], scaling: float) -> Tensor:
        dtype = torch.promote_types(weight.dtype, torch.float32)
        d, b = (vector.to(dtype) for vector in parameters)
        A, B = self.projections.sliced(self, weight.device, dtype)
        return (weight.to(dtype) + scaling * ((b[:, None] * B) @ (d[:, None] * A))).to(weight.dtype)


# ------------------------------------------------------------------------------------------------- the row in table.py


def read_settings(config: Any) -> dict[str, Any] | None:
    """The fields of `Description` that VeRA sets; None for rank 0. Raises ValueError, naming the setting."""
    seed = getattr(config, "vera_seed", None)
    if seed is not None and not _is_seed(seed):
        raise ValueError(f"config.vera_seed {seed!r}: give a number from 0 to 2**63 - 1.")
    return lora.read_settings(config, needs_alpha=False)


def _is_seed(value: Any) -> bool:
    return is_number(value, int) and 0 <= value < 2**63


def new_layer(trained: Description, target: str, number: int, inputs: int, outputs: int) -> VeraLinear | None:
    """A linear layer with VeRA if the description updates this one of `TARGETS` in this encoder layer, else None."""
    if not trained.updates(target, number):
        return None
    shared, seed = trained.shared, trained.settings.get("vera_seed") or 0
    projections = shared.setdefault("projections", Projections(trained.rank, seed))
    return VeraLinear(inputs, outputs, trained.rank, lora_dropout=trained.dropout, projections=projections)


def vera_layers(model: nn.Module) -> list[VeraLinear]:
    """The layers with VeRA in a model."""
    return [module for module in model.modules() if isinstance(module, VeraLinear)]


def rebuild(model: Any, adapter: Any, lora_alpha: float | None) -> None:
    """Give a model the layers of an adapter, which share one pair, drawn from the adapter's seed."""
    lora.rebuild(model, adapter, lora_alpha)
    layers = vera_layers(model)
    projections = Projections(layers[0].r, adapter.settings["vera_seed"])
    for layer in layers:
        projections.widen(layer.in_features, layer.out_features)
        layer.projections = projections


def load_projections(model: Any, adapter: Any) -> None:
    """Give the layers of a model the pair that a folder contains. Raises UserError if its shapes differ."""
    projections = vera_layers(model)[0].projections
    if not adapter.frozen:  # PEFT's save_projection=False
        return
    shapes = [projections.rank, projections.inputs], [projections.outputs, projections.rank]
    for name, shape in zip(_PAIR, shapes, strict=True):
        found = list(adapter.frozen[name].shape) if name in adapter.frozen else "missing"
        if found != shape:
            raise UserError(f"{adapter.source}: {name} is {found} in the file, {shape} in the model.")
    projections.set_(*(adapter.frozen[name] for name in _PAIR))


def to_adapter(model: Any) -> dict[str, Any]:
    """The fields of `Adapter` from a model's layers: the seed, and the pair itself, which PEFT saves by default too."""
    projections = vera_layers(model)[0].projections
    pair = dict(zip(_PAIR, projections.tensors(), strict=True))
    return {"frozen": pair, "settings": {"vera_seed": projections.seed}}


def to_peft(adapter: Any) -> dict[str, Any]:
    """Keys of adapter_config.json."""
    seed, has_pair = adapter.settings["vera_seed"], bool(adapter.frozen)
    return {"projection_prng_key": seed, "save_projection": has_pair, "vera_dropout": adapter.lora_dropout}


def read_config(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """An adapter_config.json as it is. Raises UserError for values that PEFT does not write."""
    p = config.get("vera_dropout", 0.0)
    check_json(path, config, [
        ("projection_prng_key", _is_seed(config.get("projection_prng_key")), "an integer from 0 to 2**63 - 1"),
        ("vera_dropout", is_number(p) and 0 <= p <= 1, "a number from 0 to 1"),
        ("rank_pattern", not config.get("rank_pattern"), "none: the layers of VeRA have one rank"),
    ])  # fmt: skip
    return config


def from_peft(config: dict[str, Any]) -> dict[str, Any]:
    """Fields of `Adapter` from a config of `read_config`."""
    settings = {"vera_seed": config["projection_prng_key"]}
    return {"lora_dropout": 1.0 * config.get("vera_dropout", 0.0), "settings": settings}


def from_file(adapter: Any) -> Any:
    """The adapter as it is. Raises UserError unless its pair is missing, or of the sizes of its vectors."""
    found = {name: list(adapter.frozen[name].shape) for name in _PAIR if name in adapter.frozen}
    if not found:  # PEFT's save_projection=False
        return adapter
    rank = next(iter(adapter.ranks.values()))
    outputs = max(x.numel() for name, x in adapter.state.items() if name.endswith(".vera_lambda_b"))
    A, B = (found.get(name, "missing") for name in _PAIR)
    if A == "missing" or len(A) != 2 or A[0] != rank or B != [outputs, rank]:
        raise UserError(
            f"{adapter.source}: {_PAIR[0]} is {A} and {_PAIR[1]} is {B}; expected [{rank}, in] and [{outputs}, {rank}]."
        )
    return adapter


def write_seed(model: Any) -> None:
    """Set `vera_seed` of `model.config` to the pair's seed. Raises UserError if that seed draws another pair."""
    layers = vera_layers(model)
    vars(model.config).pop("vera_seed", None)
    if not layers or layers[0].merged:
        return
    projections = layers[0].projections
    if not all(map(torch.equal, projections.tensors(), projections.drawn())):
        raise UserError(
            "config.json can describe VeRA's frozen matrices by their seed; this model's are from a file and differ, "
            "and would be lost.\nSave it with adapters.save_adapter, or merge it first (merge_lora_)."
        )
    if projections.seed:
        model.config.vera_seed = projections.seed


def describe(model: Any) -> dict[str, Any]:
    """As LoRA's, with the seed of the frozen matrices."""
    return lora.describe(model) | {"vera_seed": vera_layers(model)[0].projections.seed}


def facts(adapter: Any) -> dict[str, Any]:
    """Lines of `inspect` and of a model card."""
    pair = "in the file" if adapter.frozen else f"drawn from seed {adapter.settings['vera_seed']}"
    return {"frozen matrices": pair}
