"""AdaLoRA: the layer, the loss term and the choice of directions against formulas and PEFT; then its files."""

import copy
import math
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from helpers import CLASSIFIERS, assert_close, ragged_batch, randomise_, tiny_config, tiny_deberta_config
from peft import AdaLoraConfig, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn

from lora_nlu.errors import UserError
from lora_nlu.methods.adalora import AdaLoRALinear, RankAllocator, loss_term, sum_of_distances
from lora_nlu.methods.marking import count_parameters, mark_trainable
from lora_nlu.methods.targets import TARGETS
from lora_nlu.ops.frozen import FrozenWeight

I, O, ALPHA = 12, 10, 6.0  # noqa: E741 (the paper's and adalora.py's letters)
BF16 = 2.0**-8  # half the distance between neighbours of 1: the error of one rounding, relative
SCHEDULE = {
    "target_rank": 2,
    "reg_orth_coef": 0.3,
    "init_warmup": 8,
    "final_warmup": 13,
    "mask_interval": 3,
    "beta1": 0.85,
    "beta2": 0.9,
}
STEPS = 60


def random_layer(rank: int = 4, bias: bool = True, sizes: tuple[int, int] = (I, O), p: float = 0.0) -> AdaLoRALinear:
    layer = AdaLoRALinear(*sizes, r=rank, lora_alpha=ALPHA, bias=bias, lora_dropout=p)
    generator = torch.Generator().manual_seed(rank)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layer


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def textbook(x: Tensor, w: dict[str, Tensor]) -> Tensor:
    """W x + b + alpha / (r + 1e-5) B (E * A) x, one token a row."""
    update = ((x @ w["lora_A"].T) * w["lora_E"].T) @ w["lora_B"].T
    return x @ w["weight"].T + w.get("bias", 0) + ALPHA / (len(w["lora_A"]) + 1e-5) * update


def peft_config(**settings: Any) -> AdaLoraConfig:
    return AdaLoraConfig(**{"lora_alpha": ALPHA, "total_step": STEPS, "lora_dropout": 0.0} | settings)


# One layer.


@pytest.mark.parametrize("trains", ["adalora", "all"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", [1, 4, 8, 16])
@pytest.mark.parametrize("shape", [(7, I), (2, 5, I)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_output_and_gradients_are_those_of_the_formula_in_float64(dtype, shape, rank, bias, trains):
    layer = random_layer(rank, bias).to(dtype)
    if trains == "all":
        layer.requires_grad_(True)
    x = tokens(*shape).to(dtype).requires_grad_()
    y = layer(x)
    grad_y = tokens(*shape[:-1], O, seed=2).to(dtype)
    y.backward(grad_y)

    exact_x = x.detach().double().requires_grad_()
    exact = {name: p.detach().double().requires_grad_(p.requires_grad) for name, p in layer.named_parameters()}
    expected = textbook(exact_x, exact)
    expected.backward(grad_y.double())

    tolerance = 5e-6 if dtype == torch.float32 else 1e-13
    assert_close(y.double(), expected, tolerance)
    assert_close(x.grad.double(), exact_x.grad, tolerance)
    for name, parameter in layer.named_parameters():
        if exact[name].grad is None:
            assert parameter.grad is None and name in ("weight", "bias")
        else:
            # E's is a sum over the inputs of terms of both signs, larger than itself
            bound = 2 * tolerance if name == "lora_E" else tolerance
            assert_close(parameter.grad.double(), exact[name].grad, bound, what=name)


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("rank", [1, 4, 8, 16])
def test_output_and_gradients_are_those_of_pefts_layer_with_the_same_weights_and_draws(rank, p, request):
    if p:
        request.getfixturevalue("torch_draws")
    ours = random_layer(rank, p=p)
    theirs = inject_adapter_in_model(
        peft_config(init_r=rank, lora_dropout=p, target_modules=["0"]), nn.Sequential(nn.Linear(I, O))
    )[0]
    assert type(theirs) is peft.tuners.adalora.SVDLinear
    pairs = {name: getattr(theirs, name)["default"] for name in ("lora_A", "lora_E", "lora_B")}
    pairs |= {"weight": theirs.base_layer.weight, "bias": theirs.base_layer.bias}
    with torch.no_grad():
        for name, parameter in pairs.items():
            parameter.copy_(getattr(ours, name))
    outputs, inputs = [], [tokens(2, 5, I).requires_grad_(), tokens(2, 5, I).requires_grad_()]
    for layer, x in zip((ours, theirs), inputs, strict=True):
        torch.manual_seed(0)
        outputs.append(layer.train()(x))
        outputs[-1].pow(2).sum().backward()
    assert_close(*outputs)
    assert_close(inputs[0].grad, inputs[1].grad)
    for name in ("lora_A", "lora_E", "lora_B"):
        assert_close(getattr(ours, name).grad, pairs[name].grad, what=name)
    assert ours.weight.grad is None


@pytest.mark.parametrize(
    ("rank", "targets"), [(1, ["query", "value"]), (4, [*TARGETS]), (8, ["query", "value"]), (16, [*TARGETS])]
)
@pytest.mark.parametrize("kind", ["roberta", "deberta-v2"])
def test_logits_and_gradients_of_a_model_are_those_of_pefts_with_the_same_weights(kind, rank, targets):
    config = {"roberta": tiny_config, "deberta-v2": tiny_deberta_config}[kind]
    settings = {"apply_lora": True, "lora_variant": "adalora", "lora_r": rank, "lora_alpha": ALPHA}
    settings |= {"lora_target_modules": targets} | ({"lora_relative_query": True} if kind == "deberta-v2" else {})
    ours = randomise_(CLASSIFIERS[kind][0](config(**settings)))
    mark_trainable(ours)
    adapted = [name for name, module in ours.named_modules() if isinstance(module, AdaLoRALinear)]
    assert len(adapted) == 2 * len(targets)
    theirs = inject_adapter_in_model(peft_config(init_r=rank, target_modules=adapted), CLASSIFIERS[kind][1](config()))
    pairs = {}
    for name, parameter in theirs.named_parameters():
        if not name.endswith("ranknum.default"):
            pairs[name.replace(".base_layer.", ".").removesuffix(".default")] = parameter
    mine = dict(ours.named_parameters())
    assert pairs.keys() == mine.keys()
    with torch.no_grad():
        for name, parameter in pairs.items():
            parameter.copy_(mine[name])
            parameter.requires_grad_(mine[name].requires_grad)
    inputs = ragged_batch([9, 17, 5, 12]) | {"labels": torch.tensor([0, 1, 2, 0])}
    outputs = [model.train()(**inputs) for model in (ours, theirs)]
    for output in outputs:
        output.loss.backward()
    assert_close(outputs[0].logits, outputs[1].logits)
    gradients = {name: parameter.grad for name, parameter in pairs.items() if parameter.requires_grad}
    assert sum(".lora_E" in name for name in gradients) == len(adapted)
    largest = max(gradient.abs().max().item() for gradient in gradients.values())
    for name, gradient in gradients.items():  # those of queries and keys are small sums of large terms
        scale = max(gradient.abs().max().item(), 0.01 * largest)
        if name.endswith("lora_E"):  # the sum, over a row, of A times the gradient of E * A
            A = name.replace("lora_E", "lora_A")
            scale = (pairs[A] * gradients[A] / pairs[name]).abs().sum(1).max().item()
        assert_close(mine[name].grad, gradient, scale=scale, what=name)


def test_a_new_layer_computes_what_the_linear_layer_did_and_draws_A_and_B_with_a_std_of_002():
    torch.manual_seed(0)
    layer = AdaLoRALinear(256, 200, r=64, lora_alpha=1.0)
    x = tokens(3, 256)
    assert torch.equal(layer(x), layer(x, apply_update=False)) and layer.lora_E.count_nonzero() == 0
    for matrix in (layer.lora_A, layer.lora_B):
        assert matrix.std().item() == pytest.approx(0.02, rel=0.03) and abs(matrix.mean().item()) < 1e-3


def test_a_gradient_of_a_gradient_is_the_formulas():
    layer, x = random_layer(), tokens(3, I).requires_grad_()
    exact_x = x.detach().double().requires_grad_()
    exact = {name: p.detach().double().requires_grad_(p.requires_grad) for name, p in layer.named_parameters()}
    gradients = []
    for y, seen, E in ((layer(x), x, layer.lora_E), (textbook(exact_x, exact), exact_x, exact["lora_E"])):
        (first,) = torch.autograd.grad(y.pow(3).sum(), seen, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), E)
        gradients.append(second.double())
    assert_close(*gradients, tolerance=1e-5)


@pytest.mark.parametrize("how", ["bf16 layer", "autocast", "weight held in bf16", "compiled"])
def test_in_half_precision_and_compiled_it_agrees_with_fp32_to_rounding(how):
    layer = random_layer(sizes=(32, 32))
    exact, x, run = copy.deepcopy(layer), tokens(64, 32), layer
    if how == "bf16 layer":
        layer.bfloat16()
    if how == "weight held in bf16":
        layer.frozen = FrozenWeight(layer.weight)
    if how == "compiled":
        run = torch.compile(layer, backend="eager")
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        y = run(x.bfloat16() if how == "bf16 layer" else x)
    expected = exact(x)
    tolerance = 1e-6 if how == "compiled" else 8 * BF16
    assert_close(y.float(), expected, tolerance)
    y.float().sum().backward()
    expected.sum().backward()
    for name in ("lora_A", "lora_E", "lora_B"):
        assert_close(getattr(layer, name).grad.float(), getattr(exact, name).grad, tolerance, what=name)


def test_a_merged_layer_computes_the_same_and_unmerging_gives_the_weight_back():
    layer, x = random_layer().double(), tokens(4, I).double()
    before, y = layer.weight.detach().clone(), layer(x)
    layer.merge()
    layer.merge()
    assert_close(layer.eval()(x), y, 1e-14)
    assert_close(layer(x, apply_update=False), x @ before.T + layer.bias, 1e-14)
    update = ALPHA / (4 + 1e-5) * layer.lora_B @ torch.diag(layer.lora_E[:, 0]) @ layer.lora_A
    assert_close(layer.weight, before + update, 1e-15)
    assert "lora_E" not in layer.state_dict()
    layer.unmerge()
    assert torch.equal(layer.weight, before) and "lora_E" in layer.state_dict()


def test_a_direction_with_E_0_adds_nothing_whatever_its_A_and_B():
    layer, x = random_layer(), tokens(4, I)
    with torch.no_grad():
        layer.lora_E[1:3] = 0
        expected = layer(x)
        layer.lora_A[1:3], layer.lora_B[:, 1:3] = 0, 0
    assert torch.equal(layer(x), expected)


def test_a_layer_of_deberta_v3_base_counts_target_rank_directions_in_each_of_its_six_linear_layers():
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 1}
    settings = {"apply_lora": True, "lora_variant": "adalora", "lora_r": 3, "lora_alpha": ALPHA}
    settings |= SCHEDULE | {"target_rank": 1, "lora_target_modules": [*TARGETS]}
    model = CLASSIFIERS["deberta-v2"][0](tiny_deberta_config(**sizes, **settings))
    mark_trainable(model)
    assert 12 * count_parameters(model).encoder == 12 * (4 * (768 + 768 + 1) + 2 * (768 + 3072 + 1)) == 165_960


# The loss term.


class Layers(nn.Module):
    """AdaLoRA's layers of several shapes with a schedule, as a model has them."""

    def __init__(self, ranks: tuple[int, ...] = (4, 4, 4, 4), **settings: Any) -> None:
        super().__init__()
        self.config = SimpleNamespace(**SCHEDULE | settings)
        sizes = [(12, 10), (10, 12), (12, 12), (12, 10)]
        for i, rank in enumerate(ranks):
            setattr(self, f"layer{i}", random_layer(rank, sizes=sizes[i]))
            nn.init.constant_(getattr(self, f"layer{i}").lora_E, 0.1 * (i + 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer1(torch.tanh(self.layer0(x)))
        return self.layer3(torch.tanh(self.layer2(y)))


def names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters() if ".lora_" in name]


def of_peft(model: Layers) -> tuple[Any, dict[str, Tensor]]:
    """PEFT's AdaLoRA on the same layers with the same weights, and its parameters by our names."""
    base = nn.Module()
    for name, layer in model.named_children():
        setattr(base, name, nn.Linear(layer.in_features, layer.out_features))
    base.forward = Layers.forward.__get__(base)
    c = model.config
    settings = {"init_r": model.layer0.r, "target_r": c.target_rank, "tinit": c.init_warmup, "tfinal": c.final_warmup}
    settings |= {"deltaT": c.mask_interval, "beta1": c.beta1, "beta2": c.beta2, "orth_reg_weight": c.reg_orth_coef}
    targets = [name for name, _ in model.named_children()]
    theirs = get_peft_model(base, peft_config(target_modules=targets, **settings))
    theirs_by_name = dict(theirs.named_parameters())
    pairs = {name: theirs_by_name[f"base_model.model.{name}.default"] for name in names(model)}
    with torch.no_grad():
        for name, parameter in pairs.items():
            parameter.copy_(model.get_parameter(name))
    return theirs, pairs


def test_the_loss_term_and_its_gradient_are_the_formulas_in_float64():
    model = Layers((3, 5, 4, 3))
    term = loss_term(model)
    term.backward()
    exact = {name: model.get_parameter(name).detach().double().requires_grad_() for name in names(model)}
    norms = []
    for name, p in exact.items():
        if "lora_E" not in name:
            M = p if "lora_A" in name else p.T
            norms.append((M @ M.T - torch.eye(len(M))).pow(2).sum().sqrt())
    expected = 0.3 * sum(norms) / 8
    expected.backward()
    assert len(norms) == 8
    assert_close(term.double(), expected, 1e-6)
    for name, p in exact.items():
        if "lora_E" in name:
            assert model.get_parameter(name).grad is None
        else:
            assert_close(model.get_parameter(name).grad.double(), p.grad, 2e-6, what=name)


def test_the_loss_term_is_pefts():
    model = Layers()
    theirs, pairs = of_peft(model)
    holder = SimpleNamespace(loss=torch.zeros(()))
    theirs.base_model.model.forward = lambda: holder
    theirs.base_model.forward()  # adds the term
    holder.loss.backward()
    term = loss_term(model)
    term.backward()
    assert_close(term, holder.loss)
    for name, p in pairs.items():
        if "lora_E" not in name:
            assert_close(model.get_parameter(name).grad, p.grad, what=name)


def test_the_gradient_of_orthonormal_matrices_is_0_and_finite_and_autocast_does_not_round_the_term():
    matrix = torch.eye(3, 7).requires_grad_()
    sum_of_distances([matrix]).backward()
    assert matrix.grad.count_nonzero() == 0
    model = Layers()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert loss_term(model) == loss_term(Layers())
    assert loss_term(Layers(reg_orth_coef=0.0)) == 0


# The choice of directions.


class Formula:
    """Eq. 8 to 12 and the schedule, a direction at a time, in float64: E that shall be 0 after each step."""

    def __init__(self, model: Layers) -> None:
        self.model, self.c = model, model.config
        self.ipt, self.unc, self.pruned = {}, {}, None

    def scores(self) -> dict[tuple[str, int], float]:
        scores = {}
        for layer in [name for name, _ in self.model.named_children()]:
            s = {part: self.ipt[f"{layer}.lora_{part}"] * self.unc[f"{layer}.lora_{part}"] for part in "AEB"}
            for i in range(len(s["A"])):
                scores[layer, i] = (s["E"][i, 0] + s["A"][i].mean() + s["B"][:, i].mean()).item()
        return scores

    def after(self, t: int, T: int) -> tuple[int, set[tuple[str, int]]]:
        """The budget and the directions whose E is to be 0 after step t of T."""
        c, b0 = self.c, sum(layer.r for layer in self.model.children())
        bT = c.target_rank * len([*self.model.children()])
        if t < T - c.final_warmup:
            for name in names(self.model):
                p = self.model.get_parameter(name)
                sensitivity = (p.detach().double() * p.grad.double()).abs()
                zero = torch.zeros_like(sensitivity)
                self.ipt[name] = c.beta1 * self.ipt.get(name, zero) + (1 - c.beta1) * sensitivity
                u = (sensitivity - self.ipt[name]).abs()
                self.unc[name] = c.beta2 * self.unc.get(name, zero) + (1 - c.beta2) * u
        if t <= c.init_warmup:
            return b0, set()
        if t > T - c.final_warmup:
            return bT, self.pruned
        budget = int(bT + (b0 - bT) * (1 - (t - c.init_warmup) / (T - c.init_warmup - c.final_warmup)) ** 3)
        if t == T - c.final_warmup or t % c.mask_interval == 0:
            scores = self.scores()
            lowest = sorted(scores, key=scores.get)[: b0 - budget]
            self.pruned = set(lowest)
            return budget, self.pruned
        return budget, set()


def train(
    model: Layers, allocator: RankAllocator, steps: range, optimizer: Any, before: Any = None, after: Any = None
) -> None:
    """Train for these steps (counted from 1) of STEPS; `before` and `after` are called around the allocator's step."""
    for number in steps:
        x = tokens(6, 12, seed=number)
        (model(x).pow(2).mean() + loss_term(model)).backward()
        optimizer.step()
        if before:
            before(number)
        allocator.step(number, STEPS)
        if after:
            after(number)
        optimizer.zero_grad()


def started(model: Layers) -> RankAllocator:
    allocator = RankAllocator(model)
    allocator.begin(STEPS)
    return allocator


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)


def trainable(model: Layers) -> Layers:
    for name in names(model):
        model.get_parameter(name).requires_grad_(True)
    return model


@pytest.mark.parametrize("interval", [1, 3, 10])
def test_importance_budget_and_masks_are_the_formulas_step_by_step(interval):
    """The formula takes the parameters and gradients that the allocator sees; which E become 0 must agree exactly."""
    model = trainable(Layers((4, 6, 5, 4), mask_interval=interval))
    allocator, formula = started(model), Formula(model)
    expected, pruned_counts = {}, []

    def before(number: int) -> None:
        budget, pruned = formula.after(number, STEPS)
        assert allocator.budget(number) == budget
        for name, layer in model.named_children():
            values = [0.0 if (name, i) in pruned else layer.lora_E[i].item() for i in range(layer.r)]
            expected[name] = torch.tensor(values)[:, None]
        pruned_counts.append(len(pruned))

    def after(number: int) -> None:
        for name, layer in model.named_children():
            assert torch.equal(layer.lora_E, expected[name]), (number, name)
        scores = torch.tensor([*formula.scores().values()], dtype=torch.float64)
        assert_close(allocator.importance().double(), scores, 1e-5)

    train(model, allocator, range(1, STEPS + 1), adam(model), before, after)
    assert pruned_counts[:8] == [0] * 8 and pruned_counts[-14:] == [19 - 8] * 14 and len({*pruned_counts}) > 3
    assert sum(int(layer.lora_E.count_nonzero()) for layer in model.children()) == 8


def test_importance_and_masks_are_those_of_pefts_allocator_step_by_step():
    """PEFT's names: tinit, tfinal, deltaT are init_warmup, final_warmup, mask_interval; its `ipt` is the sensitivity.

    Definitions differ where directions have equal scores: PEFT sets all of them to 0 and may go below the budget. It
    forgets the importance when the pattern is final.
    """
    model = trainable(Layers())
    allocator, (theirs, pairs) = started(model), of_peft(model)

    def before(number: int) -> None:
        with torch.no_grad():
            for name, parameter in pairs.items():
                parameter.copy_(model.get_parameter(name))
                parameter.grad = model.get_parameter(name).grad.clone()
        theirs.base_model.update_and_allocate(number)

    def after(number: int) -> None:
        ranks = theirs.base_model.rankallocator
        ours = {"exp_avg_ipt": allocator.sensitivity, "exp_avg_unc": allocator.uncertainty}
        assert bool(ranks.exp_avg_ipt) == (number < STEPS - 13)
        for part, values in ours.items():
            for name, value in zip(ordered(model), values, strict=True):
                if number < STEPS - 13:
                    assert_close(value, getattr(ranks, part)[f"{name}.default"], 1e-5, what=name)
        for name in ordered(model):
            assert torch.equal(model.get_parameter(name), pairs[name]), (number, name)

    train(model, allocator, range(1, STEPS + 1), adam(model), before, after)
    pattern = theirs.peft_config["default"].rank_pattern
    for name, mask in pattern.items():
        assert [bool(e) for e in model.get_parameter(name.removesuffix(".default"))[:, 0]] == mask
    assert sum(map(sum, pattern.values())) == 8


def ordered(model: Layers) -> list[str]:
    """The names of the parameters in the allocator's order."""
    return [f"{name}.{part}" for name, _ in model.named_children() for part in ("lora_A", "lora_E", "lora_B")]


def test_a_resumed_allocator_goes_on_bit_for_bit_before_and_after_the_final_choice(tmp_path):
    model = trainable(Layers())
    allocator, optimizer = started(model), adam(model)
    for stop in (10, 20, 50):
        train(model, allocator, range({10: 1, 20: 11, 50: 21}[stop], stop + 1), optimizer)
        torch.save(allocator.state_dict(), tmp_path / f"{stop}.pt")
        torch.save(optimizer.state_dict(), tmp_path / f"{stop}.optimizer.pt")
    train(model, allocator, range(51, STEPS + 1), optimizer)
    for stop in (10, 20, 50):
        again = trainable(Layers())
        other, its_optimizer = started(again), adam(again)
        other.load_state_dict(torch.load(tmp_path / f"{stop}.pt", weights_only=True))
        its_optimizer.load_state_dict(torch.load(tmp_path / f"{stop}.optimizer.pt", weights_only=True))
        train(again, other, range(stop + 1, STEPS + 1), its_optimizer)
        for name in names(model):
            assert torch.equal(again.get_parameter(name), model.get_parameter(name)), (stop, name)


def test_a_step_that_a_loss_scaler_skipped_leaves_the_importance_as_it_was():
    model = trainable(Layers())
    allocator, optimizer = started(model), adam(model)
    train(model, allocator, range(1, 6), optimizer)
    before = allocator.importance()
    for value in (math.inf, math.nan):
        for name in names(model):
            model.get_parameter(name).grad = torch.full_like(model.get_parameter(name), value)
        allocator.step(6, STEPS)
        assert torch.equal(allocator.importance(), before)


def test_of_directions_with_equal_scores_the_first_stay_and_the_budget_is_met():
    model = Layers()
    allocator = started(model)
    allocator.step(STEPS - 13, STEPS)  # nothing has an importance yet
    assert [int(layer.lora_E.count_nonzero()) for layer in model.children()] == [4, 4, 0, 0]


@pytest.mark.parametrize(
    ("settings", "total", "words"),
    [
        ({"target_rank": None, "init_warmup": None}, 60, "--target_rank, --init_warmup"),
        ({"target_rank": 4}, 60, "--target_rank 4: must be below the rank that AdaLoRA starts from, 4"),
        ({}, 21, "--init_warmup and --final_warmup are 21 steps together, and the training has 21"),
    ],
)
def test_settings_that_leave_nothing_to_choose_are_refused_before_training(settings, total, words):
    with pytest.raises(UserError) as error:
        RankAllocator(Layers(**settings)).begin(total)
    assert words in str(error.value) and str(error.value).count("\n") < 3
    RankAllocator(Layers()).begin(22)
