"""AdaLoRA (Zhang et al. 2023, arXiv 2303.10512): y = W x + b + s B (E * A) x; E of unimportant directions becomes 0.

Eq. 3: the update is kept as a singular value decomposition, with E [R, 1] the singular values and s = alpha / R of the
rank that training began with. Eq. 4: the loss has reg_orth_coef times the mean distance of A A^T and B^T B from the
identity. Eq. 8 to 12: each parameter p has the smoothed sensitivity |p dL/dp| and its smoothed uncertainty; their
product, summed over a direction (E_i, and the means over row A_i and column B_i), is the direction's importance.
Between the first `init_warmup` and the last `final_warmup` steps a falling number of directions, of all layers
together, stays; E of the others is set to 0. It may grow again until the next choice; in the last steps it stays 0.

Dim letters: I in_features, O out_features, R rank, L layers, P directions of all layers.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_nlu.errors import UserError
from lora_nlu.files import check_json
from lora_nlu.methods import lora
from lora_nlu.methods.linear import unmerged_parameters
from lora_nlu.methods.lora import LoRALinear
from lora_nlu.methods.targets import is_number, target_of, targets_and_layers
from lora_nlu.ops import kernels
from lora_nlu.ops.sharding import is_finite

# The settings of a run: the names of our flags, and PEFT's keys of adapter_config.json
SETTINGS = {
    "target_rank": "target_r", "reg_orth_coef": "orth_reg_weight", "init_warmup": "tinit", "final_warmup": "tfinal",
    "mask_interval": "deltaT", "beta1": "beta1", "beta2": "beta2", "total_step": "total_step", "init_r": "init_r",
}  # fmt: skip
# Integers are at least, other numbers from 0 to below:
_LEAST = {"target_rank": 0, "init_warmup": 0, "final_warmup": 0, "mask_interval": 1, "total_step": 1, "init_r": 1}
_BELOW = {"reg_orth_coef": float("inf"), "beta1": 1, "beta2": 1}
DIRECTIONS = {"lora_A": 0, "lora_E": 0, "lora_B": 1}  # the dimension of each parameter that numbers the directions
_MOST_NUMBERS = 2**28  # in all layers with all directions, 1 GiB: a damaged folder must not fill the memory
DEFAULTS = {"reg_orth_coef": 0.0, "beta1": 0.85, "beta2": 0.85}  # both betas as the authors and PEFT have them


class AdaLoRALinear(LoRALinear):
    """`LoRALinear` whose update has a singular value E_i for each direction: scaling x (E * A)^T B^T.

    `lora_A` [R, I] and `lora_B` [O, R] start normal with a std of 0.02, `lora_E` [R, 1] at zero. The scaling is
    lora_alpha / (r + 1e-5), as the authors and PEFT compute it, with the r that training began with.
    """

    method = "adalora"
    multiplies_frozen = True
    update_names = ("lora_A", "lora_E", "lora_B")

    def __init__(
        self, in_features: int, out_features: int, r: int, lora_alpha: float, bias: bool = True,
        lora_dropout: float = 0.0, use_rslora: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(in_features, out_features, r, lora_alpha, bias, lora_dropout)
        self.lora_E = nn.Parameter(torch.empty(r, 1))
        self.reset_added_parameters()

    def reset_added_parameters(self, normal_std: float | None = None) -> None:
        if hasattr(self, "lora_E"):  # LoRALinear's constructor calls this too
            nn.init.normal_(self.lora_A, std=0.02)
            nn.init.zeros_(self.lora_E)
            nn.init.normal_(self.lora_B, std=0.02)

    @property
    def scaling(self) -> float:
        return self.lora_alpha / (self.r + 1e-5)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_A * self.lora_E, self.lora_B

    def check_shapes(self) -> None:
        super().check_shapes()
        kernels.check_tensor("lora_E", self.lora_E, self.weight.device, self.lora_A.shape[0], 1)

    def with_update(self, weight: Tensor, parameters: list[Tensor], scaling: float) -> Tensor:
        A, E, B = parameters
        return super().with_update(weight, [A.to(torch.promote_types(A.dtype, torch.float32)) * E, B], scaling)


def adalora_layers(model: nn.Module) -> dict[str, AdaLoRALinear]:
    """The layers with AdaLoRA by their names in a model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdaLoRALinear)}


def settings_of(model: Any) -> dict[str, Any]:
    """The values of `SETTINGS` for a model: `DEFAULTS`, its config, then its adapter or run, of which the last wins."""
    values = {name: getattr(model.config, name, None) for name in SETTINGS}
    return DEFAULTS | {name: x for name, x in values.items() if x is not None} | getattr(model, "adalora_settings", {})


# ------------------------------------------------------------------------------------------------------ the loss term


def loss_term(model: Any) -> Tensor | float:
    """reg_orth_coef x the mean, over every A and B of a model, of the Frobenius norm of A A^T - I or B^T B - I."""
    coefficient, layers = settings_of(model)["reg_orth_coef"], adalora_layers(model).values()
    if not coefficient:
        return 0.0
    matrices = [layer.lora_A for layer in layers] + [layer.lora_B.t() for layer in layers]
    with torch.autocast(matrices[0].device.type, enabled=False):
        return coefficient * sum_of_distances(matrices) / len(matrices)


def sum_of_distances(matrices: Iterable[Tensor]) -> Tensor:
    """The sum of the Frobenius norms of M M^T - I of matrices M [R, K]; its gradient at a norm of 0 is 0."""
    by_shape: dict[Any, list[Tensor]] = {}
    for matrix in matrices:
        by_shape.setdefault(matrix.shape, []).append(matrix)
    norms = []
    for (rank, _), group in by_shape.items():
        stacked = torch.stack(group)  # [L, R, K]
        gram = stacked @ stacked.mT - torch.eye(rank, dtype=stacked.dtype, device=stacked.device)  # [L, R, R]
        norms.append(gram.flatten(1).norm(dim=1).sum())
    return torch.stack(norms).sum()


# ------------------------------------------------------------------------------------------------------ the allocator


class RankAllocator:
    """Chooses which directions of a model's layers stay, after each optimizer step of one run."""

    def __init__(self, model: Any) -> None:
        self.model, self.layers = model, adalora_layers(model)
        self.parameters = [p for layer in self.layers.values() for p in layer.update_parameters()]  # A, E, B of each
        self.sensitivity = [torch.zeros_like(p) for p in self.parameters]  # smoothed
        self.uncertainty = [torch.zeros_like(p) for p in self.parameters]
        self.kept: Tensor | None = None  # [P] bool, as they were last chosen
        self.settings: dict[str, Any] = {}

    def begin(self, total: int) -> None:
        """Read the settings of a run of `total` steps. Raises UserError if they are incomplete or lower no ranks."""
        settings = settings_of(self.model)
        required = ("target_rank", "init_warmup", "final_warmup", "mask_interval")
        if missing := [f"--{name}" for name in required if name not in settings]:
            raise UserError(f"AdaLoRA can't train without {', '.join(missing)}: set them.")
        rank, target = max(layer.r for layer in self.layers.values()), settings["target_rank"]
        if target >= rank:
            raise UserError(f"--target_rank {target}: must be below the rank that AdaLoRA starts from, {rank}.")
        if total <= (warm_up := settings["init_warmup"] + settings["final_warmup"]):
            raise UserError(
                f"--init_warmup and --final_warmup are {warm_up} steps together, and the training has {total}: AdaLoRA "
                "lowers the ranks in the steps between them.\nLower these two flags, or train longer."
            )
        self.model.adalora_settings = self.settings = settings | {"total_step": total}

    def budget(self, number: int) -> int:
        """How many directions may stay after step `number`: all of them, then falling to the target by a cubic."""
        first, last = self.settings["init_warmup"], self.settings["total_step"] - self.settings["final_warmup"]
        everything, target = sum(layer.r for layer in self.layers.values()), self.settings["target_rank"]
        if number <= first:
            return everything
        remaining = max(0.0, 1 - (number - first) / (last - first))
        return int((everything - target * len(self.layers)) * remaining**3 + target * len(self.layers))

    @torch.no_grad()
    def step(self, number: int, total: int) -> None:
        """Update the importance; every `mask_interval` steps set E of the directions beyond the budget to 0.

        From step total - final_warmup on the choice stays the same, and E of the others is set to 0 in each step.
        """
        first, last = self.settings["init_warmup"], total - self.settings["final_warmup"]
        if number < last:
            self._update_importance()
        is_due = number == last or (first < number < last and number % self.settings["mask_interval"] == 0)
        if is_due:
            best = torch.argsort(self.importance(), descending=True, stable=True)  # of equal ones the first stays
            self.kept = torch.zeros_like(best, dtype=torch.bool)
            self.kept[best[: self.budget(number)]] = True
        if self.kept is not None and (is_due or number > last):
            ranks = [layer.r for layer in self.layers.values()]
            for layer, kept in zip(self.layers.values(), self.kept.split(ranks), strict=True):
                layer.lora_E.masked_fill_(~kept[:, None], 0.0)

    def _update_importance(self) -> None:
        """Update the smoothed sensitivity and uncertainty. Raises UserError if the step's gradients are not kept."""
        if all(p.grad is None for p in self.parameters):
            raise UserError("AdaLoRA reads the gradients after each step, and DeepSpeed does not keep them: use DDP.")
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        if not is_finite(gradients):  # of a step that the loss scaler of fp16 has skipped
            return
        products = torch._foreach_mul(self.parameters, gradients)
        torch._foreach_abs_(products)
        torch._foreach_lerp_(self.sensitivity, products, 1 - self.settings["beta1"])
        torch._foreach_sub_(products, self.sensitivity)
        torch._foreach_abs_(products)
        torch._foreach_lerp_(self.uncertainty, products, 1 - self.settings["beta2"])

    def importance(self) -> Tensor:
        """The importance of every direction [P], layer after layer."""
        scores = iter(torch._foreach_mul(self.sensitivity, self.uncertainty))
        return torch.cat([A.mean(1) + E[:, 0] + B.mean(0) for A, E, B in zip(scores, scores, scores, strict=True)])

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs; also the parameters: a checkpoint's adapter contains only the kept directions."""
        lists = {"parameters": self.parameters, "sensitivity": self.sensitivity, "uncertainty": self.uncertainty}
        kept = None if self.kept is None else self.kept.cpu()
        return {name: [t.detach().cpu() for t in tensors] for name, tensors in lists.items()} | {"kept": kept}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("parameters", "sensitivity", "uncertainty"):
            for tensor, saved in zip(getattr(self, name), state[name], strict=True):
                tensor.copy_(saved)
        self.kept = None if state["kept"] is None else state["kept"].to(self.parameters[0].device)


# ------------------------------------------------------------------------------------------------- the row in table.py


def read_settings(config: Any) -> dict[str, Any] | None:
    """As LoRA's; AdaLoRA's own settings are checked too. Raises ValueError, naming the setting."""
    fields = lora.read_settings(config)
    for name in SETTINGS:
        if (value := getattr(config, name, None)) is not None and (expected := _expected_instead(name, value)):
            raise ValueError(f"config.{name} {value!r}: expected {expected}.")
    target = getattr(config, "target_rank", None)
    if fields and target is not None and not 1 <= target < fields["rank"]:
        raise ValueError(f"config.target_rank {target}: expected 1 or more, below config.lora_r, {fields['rank']}.")
    return fields and fields | {"use_rslora": False}


def _expected_instead(name: str, value: Any) -> str:
    """What a setting should be, in words; "" if the value is valid."""
    if name in _LEAST:
        is_valid, expected = is_number(value, int) and value >= _LEAST[name], f"an integer from {_LEAST[name]}"
    else:
        is_valid, expected = is_number(value) and 0 <= value < _BELOW[name], "a number from 0"
        expected += " to below 1" if _BELOW[name] == 1 else ""
    return "" if is_valid else expected


def rebuild(model: Any, adapter: Any, lora_alpha: float | None) -> None:
    """As LoRA's; the model gets the adapter's settings too."""
    lora.rebuild(model, adapter, lora_alpha)
    model.adalora_settings = {name: adapter.settings[name] for name in SETTINGS if name in adapter.settings}


def describe(model: Any) -> dict[str, Any]:
    """As LoRA's, with the settings of the run."""
    return lora.describe(model) | {
        name: x for name, x in settings_of(model).items() if name not in ("total_step", "init_r")
    }


def count(model: Any) -> int:
    """The number of trained parameters of the encoder, without those of directions whose E is 0.

    A direction of a layer has I + O + 1 parameters. Before training, when all E are 0, each layer counts target_rank.
    """
    layers = [*adalora_layers(model).values()]
    left = [int(layer.lora_E.count_nonzero()) for layer in layers]
    if not any(left):
        left = [settings_of(model).get("target_rank", layer.r) for layer in layers]
    sizes = [layer.in_features + layer.out_features + 1 for layer in layers]
    removed = sum((layer.r - kept) * size for layer, kept, size in zip(layers, left, sizes, strict=True))
    return sum(p.numel() for p in model.base_model.parameters() if p.requires_grad) - removed


# -------------------------------------------------------------------------------------------------------------- files
# In a folder, as in PEFT's, the tensors contain only the kept directions, and `rank_pattern` says which these are. In
# memory a layer has all directions that it began with, and 0 in those that were not kept, so that its shapes, and the
# rounding of its products, are those of training.


def to_adapter(model: Any) -> dict[str, Any]:
    """The fields of `Adapter`: what trains, 0 in directions that are not kept, and the settings."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    state = {name: tensor for name, tensor in unmerged_parameters(model).items() if name in trained}
    layers = adalora_layers(model)
    if any(layer.lora_E.count_nonzero() for layer in layers.values()):
        for name in layers:
            removed = state[f"{name}.lora_E"].eq(0)  # [R, 1]
            for part, mask in (("lora_A", removed), ("lora_E", removed), ("lora_B", removed.t())):
                state[f"{name}.{part}"] = state[f"{name}.{part}"].masked_fill(mask, 0.0)
    return {"state": state, "settings": settings_of(model) | {"init_r": max(layer.r for layer in layers.values())}}


def scaling(adapter: Any, rank: int, alpha: float) -> float:
    """The factor of a layer's update, alpha / (r + 1e-5) with the rank r that training began with."""
    return alpha / (adapter.settings.get("init_r", rank) + 1e-5)


def kept_directions(adapter: Any) -> dict[str, list[bool]]:
    """For each layer, whether each direction's E differs from 0; all True if every E is 0 (an untrained adapter)."""
    kept = {name: adapter.state[f"{name}.lora_E"][:, 0].ne(0).tolist() for name in adapter.ranks}
    return kept if any(map(any, kept.values())) else {name: [True] * len(mask) for name, mask in kept.items()}


def to_file(adapter: Any) -> Any:
    """The adapter with the kept directions alone. Raises UserError for layers that PEFT's format can't describe."""
    if len({*adapter.ranks.values()}) > 1 or adapter.alpha_pattern:
        raise UserError("AdaLoRA's folder records one rank and one alpha for all layers; these have several.")
    state, kept = dict(adapter.state), kept_directions(adapter)
    for name, mask in kept.items():
        for part, dim in DIRECTIONS.items():
            tensor = state[f"{name}.{part}"]
            index = torch.tensor(mask, device=tensor.device).nonzero()[:, 0]
            state[f"{name}.{part}"] = tensor.index_select(dim, index)
    return replace(adapter, state=state, settings=adapter.settings | {"kept": kept})


def from_file(adapter: Any) -> Any:
    """The adapter with all directions, 0 where not kept. Raises UserError if tensors and settings disagree."""
    state, settings, source = dict(adapter.state), dict(adapter.settings), adapter.source
    rank, masks = settings["init_r"], settings.pop("kept", {})
    if missing := [f"{name}.lora_E" for name in {**masks, **adapter.ranks} if f"{name}.lora_E" not in state]:
        raise UserError(f"{source}: not a complete adapter: the file lacks {missing[0]}.")
    widths = [state[f"{name}.lora_A"].shape[1] + state[f"{name}.lora_B"].shape[0] for name in adapter.ranks]
    if rank * (1 + sum(widths)) > _MOST_NUMBERS:
        raise UserError(f"{source}: init_r {rank} is too high for layers of these sizes; the folder is damaged.")
    for name, left in adapter.ranks.items():
        kept = torch.tensor(masks.get(name, [True] * rank), dtype=torch.bool)
        shape = [*state[f"{name}.lora_E"].shape]
        if len(kept) != rank or int(kept.sum()) != left or shape != [left, 1]:
            raise UserError(
                f"{source}: {name}.lora_A has {left} directions and lora_E the shape {shape}, but adapter_config.json "
                f"has init_r {rank} and a rank_pattern that keeps {int(kept.sum())} of {len(kept)} directions.\n"
                "The two files don't belong together."
            )
        for part, dim in DIRECTIONS.items():
            tensor = state[f"{name}.{part}"]
            shape = [rank if i == dim else size for i, size in enumerate(tensor.shape)]
            state[f"{name}.{part}"] = tensor.new_zeros(shape).index_copy(dim, kept.nonzero()[:, 0], tensor)
    return replace(adapter, state=state, settings=settings)


def to_peft(adapter: Any) -> dict[str, Any]:
    """AdaLoRA's keys of adapter_config.json, of an adapter from `to_file`; unset ones get values that PEFT accepts."""
    settings = {"init_warmup": 0, "final_warmup": 0, "mask_interval": 1, "target_rank": 1} | DEFAULTS | adapter.settings
    settings.setdefault("total_step", settings["init_warmup"] + settings["final_warmup"] + 1)
    masks = {f"{name}.lora_E": mask for name, mask in sorted(settings["kept"].items())}
    # PEFT does not read `r`, and warns of one other than its default
    return {key: settings[name] for name, key in SETTINGS.items()} | {"rank_pattern": masks, "r": 8}


def read_config(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """PEFT's adapter_config.json with `init_r` as `r`, and `rank_pattern` as `kept`. Raises UserError."""
    pattern = config.get("rank_pattern") or {}
    is_pattern = isinstance(pattern, dict) and all(
        isinstance(mask, list) and all(type(kept) is bool for kept in mask) for mask in pattern.values()
    )
    expected = {key: _expected_instead(name, config.get(key)) for name, key in SETTINGS.items()}
    checks = [(key, not text, text) for key, text in expected.items()]
    check_json(path, config, [*checks, ("rank_pattern", is_pattern, "lists of true and false by names of lora_E")])
    kept = {name.removesuffix(".default").removesuffix(".lora_E"): mask for name, mask in pattern.items()}
    return config | {"r": config["init_r"], "rank_pattern": {}, "kept": kept}


def from_peft(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of `Adapter` from a config of `read_config`. As in PEFT, alpha_pattern and use_rslora are ignored."""
    settings = {name: config[key] for name, key in SETTINGS.items()} | {"kept": config["kept"]}
    return {"settings": settings, "alpha_pattern": {}, "use_rslora": False}


def facts(adapter: Any) -> dict[str, Any]:
    """What `inspect` shows beside LoRA's facts: the directions left, in all and by target, layer after layer."""
    kept = {name: sum(mask) for name, mask in kept_directions(adapter).items()}
    names = sorted(kept, key=lambda name: [int(part) for part in name.split(".") if part.isdigit()])
    by_target = {t: [str(kept[name]) for name in names if target_of(name) == t] for t in targets_and_layers(names)[0]}
    sizes = {name: adapter.state[f"{name}.lora_A"].shape[1] + len(adapter.state[f"{name}.lora_B"]) + 1 for name in kept}
    parameters = sum(kept[name] * sizes[name] for name in kept)
    counts = f"{sum(kept.values())} of {sum(adapter.ranks.values())}"
    left = {"directions left": f"{counts}, with {parameters:,} of the parameters"}
    return left | {f"ranks left, {target}": " ".join(ranks) for target, ranks in by_target.items()}
