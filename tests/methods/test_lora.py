"""The low-rank update: a layer against the textbook and PEFT, then merging, freezing, counting and loading."""

import copy
import math

import pytest
import torch
import transformers
from helpers import (
    CLASSIFIERS,
    assert_close,
    golden,
    golden_inputs,
    golden_model,
    ragged_batch,
    randomise_,
    tiny_config,
    tiny_deberta_config,
)
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import RobertaConfig

from lora_nlu.methods.description import description_of
from lora_nlu.methods.linear import merge_lora_, unmerge_lora_
from lora_nlu.methods.lora import LoRALinear, set_lora_
from lora_nlu.methods.marking import count_parameters, mark_only_lora_as_trainable, new_linear
from lora_nlu.methods.targets import TARGETS, target_of, targets_and_layers
from lora_nlu.models.modeling_roberta import RobertaForSequenceClassification
from lora_nlu.ops.kernels import Linear

I, O, R, ALPHA = 12, 10, 4, 6.0  # noqa: E741 (the paper's and lora.py's letters)
BF16 = 2.0**-8  # half the distance between neighbours of 1: the error of one rounding, relative


def random_layer(bias: bool = True, seed: int = 0, lora_dropout: float = 0.0) -> LoRALinear:
    layer = LoRALinear(I, O, r=R, lora_alpha=ALPHA, bias=bias, lora_dropout=lora_dropout)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layer


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def textbook(x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    """h = W x + b + (alpha / r) B A x, one token a row."""
    y = x @ parameters["weight"].T + (ALPHA / R) * (x @ parameters["lora_A"].T) @ parameters["lora_B"].T
    return y + parameters["bias"] if "bias" in parameters else y


def lora_config(**settings) -> RobertaConfig:
    return tiny_config(**{"apply_lora": True, "lora_r": R, "lora_alpha": ALPHA, **settings})


@pytest.fixture
def base_checkpoint(tmp_path):
    """A classifier written by transformers, without LoRA."""
    torch.manual_seed(0)
    transformers.RobertaForSequenceClassification(tiny_config()).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load_with_lora(path, seed: int, **settings) -> RobertaForSequenceClassification:
    torch.manual_seed(seed)
    return RobertaForSequenceClassification.from_pretrained(path, config=lora_config(**settings))


# One layer.


@pytest.mark.parametrize("trains", ["lora", "all"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, I), (2, 5, I), (I,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_output_and_gradients_are_those_of_the_textbook_formula(dtype, shape, bias, trains):
    layer = random_layer(bias).to(dtype)
    if trains == "all":
        layer.requires_grad_(True)
    x = tokens(*shape).to(dtype).requires_grad_()
    y = layer(x)
    grad_y = tokens(*shape[:-1], O, seed=2).to(dtype)
    y.backward(grad_y)

    exact_x = x.detach().double().requires_grad_()
    exact = {name: p.detach().double().requires_grad_(p.requires_grad) for name, p in layer.named_parameters()}
    want = textbook(exact_x, exact)
    want.backward(grad_y.double())

    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    assert y.shape == (*shape[:-1], O) and y.dtype == dtype
    assert_close(y.double(), want, tolerance)
    assert_close(x.grad.double(), exact_x.grad, tolerance)
    for name, parameter in layer.named_parameters():
        if exact[name].grad is None:
            assert parameter.grad is None, name
        else:
            assert_close(parameter.grad.double(), exact[name].grad, tolerance, what=name)


def peft_layer(ours: LoRALinear) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """PEFT's layer with the weights of ours, and its parameters by our names."""
    config = LoraConfig(r=R, lora_alpha=ALPHA, lora_dropout=ours.lora_dropout, target_modules=["0"])
    theirs = inject_adapter_in_model(config, nn.Sequential(nn.Linear(I, O)))[0]
    pairs = {
        "weight": theirs.base_layer.weight,
        "bias": theirs.base_layer.bias,
        "lora_A": theirs.lora_A["default"].weight,
        "lora_B": theirs.lora_B["default"].weight,
    }
    with torch.no_grad():
        for name, parameter in pairs.items():
            parameter.copy_(getattr(ours, name))
    return theirs, pairs


@pytest.mark.parametrize(("p", "shape"), [(0.0, (2, 5, I)), (0.4, (9, I)), (0.4, (2, 5, I))])
def test_output_and_gradients_are_those_of_a_peft_layer_with_the_same_weights_and_draws(p, shape, request):
    if p:
        request.getfixturevalue("torch_draws")
    ours = random_layer(lora_dropout=p)
    theirs, pairs = peft_layer(ours)
    x = tokens(*shape).requires_grad_()
    x_theirs = x.detach().clone().requires_grad_()
    outputs = []
    for layer, seen in ((ours, x), (theirs, x_theirs)):
        torch.manual_seed(0)
        outputs.append(layer.train()(seen))
        outputs[-1].pow(2).sum().backward()
    got, want = outputs
    assert_close(got, want)
    assert torch.equal(got, ours.eval()(x)) == (p == 0)
    assert_close(x.grad, x_theirs.grad)
    assert_close(ours.lora_A.grad, pairs["lora_A"].grad)
    assert_close(ours.lora_B.grad, pairs["lora_B"].grad)
    assert ours.weight.grad is None and pairs["weight"].grad is None


def test_a_bf16_layer_agrees_with_fp32_to_bf16_rounding():
    layer = random_layer().bfloat16()
    exact = copy.deepcopy(layer).float()
    x = tokens(64, I).bfloat16()
    y, want = layer(x), exact(x.float())
    assert y.dtype == torch.bfloat16
    # one rounding each of: the frozen product, x A, its product with B, the scaled update, the sum
    assert_close(y.float(), want, 5 * BF16)
    y.sum().backward()
    want.sum().backward()
    for name in ("lora_A", "lora_B"):
        assert_close(getattr(layer, name).grad.float(), getattr(exact, name).grad, 5 * BF16, what=name)


def test_under_autocast_an_fp32_layer_agrees_with_fp32_to_bf16_rounding():
    layer, exact = random_layer(), random_layer()
    x = tokens(64, I)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    want = exact(x)
    assert_close(y.float(), want, 7 * BF16)  # x and the weights are rounded too
    y.float().sum().backward()
    want.sum().backward()
    for name in ("lora_A", "lora_B"):
        assert getattr(layer, name).grad.dtype == torch.float32
        assert_close(getattr(layer, name).grad, getattr(exact, name).grad, 7 * BF16, what=name)


def by_autograd(layer: LoRALinear, x: Tensor) -> Tensor:
    """The layer as plain operations of torch."""
    return F.linear(x, layer.weight, layer.bias) + layer.scaling * F.linear(F.linear(x, layer.lora_A), layer.lora_B)


HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


@HALVES
@pytest.mark.parametrize("trained", ["update", "all"])
@pytest.mark.parametrize("bias", [True, False])
def test_under_autocast_a_layer_is_as_near_to_float64_as_autograds_operations(dtype, trained, bias):
    """Rounding is random: over 400 rows the errors of both differ by less than their bounds here."""
    layer, x, gradient = random_layer(bias), tokens(2, 200, I), tokens(2, 200, O, seed=2)
    layer.requires_grad_(trained == "all")
    layer.lora_A.requires_grad_(), layer.lora_B.requires_grad_()
    names = [name for name, p in layer.named_parameters() if p.requires_grad]

    def results(layer, forward, dtype):
        given = x.clone().to(layer.weight.dtype).requires_grad_()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not torch.float64):
            y = forward(layer, given + 0)  # no leaf: autocast would keep its cast
        parameters = [getattr(layer, name) for name in names]
        found = torch.autograd.grad(y, [given, *parameters], gradient.to(y.dtype))
        return dict(zip(["y", "x", *names], [y.detach(), *found], strict=True))

    exact = results(copy.deepcopy(layer).double(), by_autograd, torch.float64)
    plain, ours = results(layer, by_autograd, dtype), results(layer, lambda layer, x: layer(x), dtype)
    assert ours.keys() == exact.keys() and ours["y"].dtype is dtype
    for name, want in exact.items():
        assert ours[name].dtype is plain[name].dtype
        errors = [float((got[name].double() - want).norm() / want.norm()) for got in (ours, plain)]
        # x: the gradients through weight and update are summed in half precision, by autograd in fp32
        assert errors[0] <= (1.4 if name == "x" else 1.1) * errors[1], (name, errors)


class Saved:
    """Bytes that autograd keeps for a backward, without parameters and what has these addresses."""

    def __init__(self, layer: nn.Module) -> None:
        self.known = {p.data_ptr() for p in layer.parameters()}
        self.kept: dict[int, Tensor] = {}

    def pack(self, x: Tensor) -> Tensor:
        if x.data_ptr() not in self.known:
            self.kept[x.data_ptr()] = x
        return x

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self.kept.values())


@HALVES
def test_under_autocast_the_backward_keeps_x_and_x_times_A_and_no_copy_of_the_weight(dtype):
    layer, x = random_layer(), tokens(64, I)
    kept = []
    for forward in (layer, lambda x: by_autograd(layer, x)):
        saved = Saved(layer)
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda x: x), torch.autocast("cpu", dtype):
            forward((x + 0).requires_grad_() + 0).sum()
        kept.append(saved.bytes)
    assert kept[0] == 2 * (64 * I + 64 * R + R * I + O * R)  # and the small matrices in half precision
    assert kept[1] == kept[0] + 2 * O * I


def test_under_autocast_gradients_of_gradients_are_those_of_autograds_operations():
    found = []
    for forward in (lambda layer, x: layer(x), by_autograd):
        layer, x = random_layer(), tokens(6, I).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = forward(layer, x)
        gradients = torch.autograd.grad(y.float().pow(2).sum(), [x, layer.lora_A, layer.lora_B], create_graph=True)
        sum(g.float().pow(2).sum() for g in gradients).backward()
        found.append([x.grad, layer.lora_A.grad, layer.lora_B.grad])
    for got, want in zip(*found, strict=True):
        assert_close(got, want, 12 * BF16)


def test_in_bf16_an_update_too_small_for_the_weight_still_counts():
    layer = LoRALinear(1, 1, r=1, lora_alpha=1.0, bias=False).bfloat16()
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.lora_A.fill_(1.0)
        layer.lora_B.fill_(2.0**-10)  # bf16's 1 + 2^-10 is 1
    assert torch.equal(layer.weight + layer.lora_B, layer.weight)
    layer(torch.ones(1, 1, dtype=torch.bfloat16)).backward()
    assert layer.lora_A.grad.item() == 2.0**-10


@pytest.mark.parametrize("bias", [True, False])
def test_a_new_layer_computes_what_the_linear_layer_did(bias):
    torch.manual_seed(0)
    layer = LoRALinear(I, O, r=R, lora_alpha=ALPHA, bias=bias)
    x = tokens(3, I)
    assert_close(layer(x), F.linear(x, layer.weight, layer.bias), 1e-6)


def test_a_new_layer_has_kaiming_uniform_A_and_zero_B():
    torch.manual_seed(0)
    layer = LoRALinear(256, 8, r=64, lora_alpha=1.0)
    bound = 1 / math.sqrt(256)  # Kaiming-uniform with a = sqrt 5
    assert layer.lora_A.abs().max().item() <= bound
    assert layer.lora_A.abs().max().item() > 0.99 * bound
    assert layer.lora_A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)  # 16,384 draws: 4 sd = 1.4%
    assert abs(layer.lora_A.mean().item()) < 4 * bound / math.sqrt(3 * 64 * 256)
    assert torch.count_nonzero(layer.lora_B) == 0


def test_a_new_layer_trains_A_and_B_and_neither_weight_nor_bias():
    layer = LoRALinear(I, O, r=R, lora_alpha=ALPHA)
    trains = {name for name, parameter in layer.named_parameters() if parameter.requires_grad}
    assert trains == {"lora_A", "lora_B"}
    assert layer.lora_A.shape == (R, I) and layer.lora_B.shape == (O, R)
    assert layer.scaling == ALPHA / R


class ProductShapes(TorchDispatchMode):
    """Records the shape of every matrix product."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.mkldnn._linear_pointwise.default):
            self.shapes.append(tuple(result.shape))
        return result


@pytest.mark.parametrize("weight_trains", [False, True])
def test_a_gradient_as_large_as_the_weight_is_formed_only_if_the_weight_trains(weight_trains):
    layer = random_layer()
    layer.weight.requires_grad_(weight_trains)
    loss = layer(tokens(7, I)).sum()
    with ProductShapes() as products:
        loss.backward()
    assert ((O, I) in products.shapes) == weight_trains
    assert (layer.weight.grad is not None) == weight_trains
    assert layer.bias.grad is None


@pytest.mark.parametrize("r", [0, -1])
def test_a_rank_below_1_is_refused(r):
    with pytest.raises(ValueError, match=f"rank of at least 1, got r={r}"):
        LoRALinear(I, O, r=r, lora_alpha=ALPHA)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"apply_lora": False, "lora_r": R, "lora_alpha": ALPHA},
        {"apply_lora": True, "lora_r": 0, "lora_alpha": ALPHA},
        {"apply_lora": True, "lora_r": 0},
    ],
)
def test_a_config_without_lora_gives_a_plain_linear_layer(settings):
    assert type(new_linear(description_of(RobertaConfig(**settings)), "query", 0, I, O)) is Linear


def test_a_config_with_lora_gives_a_lora_layer_of_its_rank_and_scaling():
    layer = new_linear(description_of(RobertaConfig(apply_lora=True, lora_r=8, lora_alpha=16)), "query", 0, I, O)
    assert type(layer) is LoRALinear
    assert (layer.r, layer.scaling, layer.in_features, layer.out_features) == (8, 2.0, I, O)
    assert layer.lora_dropout == 0


# Where the updates are.


@pytest.mark.parametrize(
    ("settings", "targets", "layers"),
    [
        ({}, ["query", "value"], [0, 1, 2]),
        ({"lora_target_modules": None, "lora_layers": None, "lora_dropout": None}, ["query", "value"], [0, 1, 2]),
        ({"lora_target_modules": ["dense"]}, ["dense"], [0, 1, 2]),
        ({"lora_target_modules": [*TARGETS], "lora_layers": [1]}, [*TARGETS], [1]),
        ({"lora_layers": [0, 2]}, ["query", "value"], [0, 2]),
        ({"lora_target_modules": ["output", "key"], "lora_layers": [2, 0]}, ["key", "output"], [0, 2]),
    ],
    ids=str,
)
def test_lora_is_in_the_targets_and_layers_the_config_names_by_default_query_and_value_everywhere(
    settings, targets, layers
):
    config = lora_config(num_hidden_layers=3, **settings)
    found = {
        (target, layer)
        for target in TARGETS
        for layer in range(3)
        if isinstance(new_linear(description_of(config), target, layer, I, O), LoRALinear)
    }
    assert found == {(target, layer) for target in targets for layer in layers}


def test_the_dropout_of_a_layer_is_the_configs():
    assert new_linear(description_of(lora_config(lora_dropout=0.3)), "query", 0, I, O).lora_dropout == 0.3


NAMES = {
    "roberta.encoder.layer.0.attention.self.query": "query",
    "roberta.encoder.layer.11.attention.self.key": "key",
    "roberta.encoder.layer.3.attention.self.value": "value",
    "roberta.encoder.layer.3.attention.output.dense": "dense",
    "roberta.encoder.layer.3.intermediate.dense": "intermediate",
    "roberta.encoder.layer.3.output.dense": "output",
    "deberta.encoder.layer.47.attention.self.query_proj": "query",
    "deberta.encoder.layer.47.attention.self.key_proj": "key",
    "deberta.encoder.layer.47.attention.self.value_proj": "value",
    "deberta.encoder.layer.47.attention.output.dense": "dense",
    "deberta.encoder.layer.47.intermediate.dense": "intermediate",
    "deberta.encoder.layer.47.output.dense": "output",
}
OTHER_NAMES = [
    "classifier.dense",
    "pooler.dense",
    "roberta.pooler.dense",
    "deberta.embeddings.embed_proj",
    "deberta.encoder.layer.1.attention.self.pos_query_proj",
    "roberta.encoder.layer.1.output.adapter.adapter_A",
]


def test_a_layer_is_the_target_that_its_place_in_the_model_makes_it_any_other_its_own_name():
    assert {name: target_of(name) for name in NAMES} == NAMES
    assert [target_of(name) for name in OTHER_NAMES] == OTHER_NAMES


def test_every_target_is_one_layer_of_each_encoder_layer_of_both_models():
    both = {"roberta": tiny_config(), "deberta-v2": tiny_deberta_config(share_att_key=False)}
    for kind, config in both.items():
        linear = [n for n, m in CLASSIFIERS[kind][0](config).named_modules() if isinstance(m, nn.Linear)]
        for i in range(2):
            targets = [target_of(name) for name in linear if f".layer.{i}." in name]
            assert sorted(set(targets) & {*TARGETS}) == sorted(TARGETS)
            assert all(targets.count(target) == 1 for target in TARGETS)


@pytest.mark.parametrize(
    ("names", "targets", "layers"),
    [
        ([], [], []),
        (["roberta.encoder.layer.10.output.dense", "roberta.encoder.layer.9.attention.self.query"],
         ["query", "output"], [9, 10]),
        ([*NAMES], [*TARGETS], [0, 3, 11, 47]),
        (["pooler.dense", "classifier", "deberta.encoder.layer.2.attention.self.value_proj"],
         ["value", "classifier", "pooler.dense"], [2]),
    ],
    ids=["none", "numbers, not words", "all", "beside the encoder"],
)  # fmt: skip
def test_places_are_the_targets_in_the_models_order_and_the_layers_numbers(names, targets, layers):
    assert targets_and_layers(names) == (targets, layers)
    assert targets_and_layers(iter(reversed(names))) == (targets, layers)


# Dropout of what the update reads.


def test_in_evaluation_dropout_changes_nothing():
    plain, dropped = random_layer().eval(), random_layer(lora_dropout=0.5).eval()
    x = tokens(7, I)
    assert torch.equal(dropped(x), plain(x))


def test_in_training_dropout_leaves_the_frozen_path_alone():
    layer = random_layer(lora_dropout=0.5).train()
    x = tokens(7, I)
    assert not torch.equal(layer(x), layer(x))
    with torch.no_grad():
        layer.lora_B.zero_()
    assert_close(layer(x), F.linear(x, layer.weight, layer.bias), 1e-6)


@pytest.mark.parametrize("draws", ["torch", "compiled"])
def test_under_dropout_the_mean_of_many_draws_is_the_undropped_output(draws, request):
    if draws == "torch":
        request.getfixturevalue("torch_draws")
    layer, x, n = random_layer(lora_dropout=0.3).train(), tokens(1, I), 20_000
    torch.manual_seed(0)
    with torch.no_grad():
        y = layer(x.expand(n, I)).double()
    want = textbook(x.double(), {name: p.detach().double() for name, p in layer.named_parameters()})
    standard_error = y.std(0) / math.sqrt(n)
    assert (standard_error > 0).all() and ((y.mean(0) - want) / standard_error).abs().max() < 4  # of 10 outputs
    # and their variance is that of independent draws of each x_i: s^2 x_i^2 p / (1 - p) (B A)_oi^2, summed over i
    update = ALPHA / R * layer.lora_B.detach().double() @ layer.lora_A.detach().double()
    variance = 0.3 / 0.7 * (update * x.double()).pow(2).sum(1)
    assert_close(y.var(0) / variance, torch.ones_like(variance), 0.06)  # 4 sd of a variance of 20,000 draws: 4-6%


def test_the_gradients_under_dropout_are_those_of_the_draw_that_the_output_had():
    # Row n saw D_n x_n, with D unknown: y - x W^T - b = s D x A^T B^T must be what B's gradient is made of.
    layer = random_layer(lora_dropout=0.4).train()
    x = tokens(9, I)
    y = layer(x)
    update = (y - F.linear(x, layer.weight, layer.bias)).detach()  # s (D x) A^T B^T
    grad_y = tokens(9, O, seed=2)
    y.backward(grad_y)
    # sum over o, r of B dL/dB is sum over n, o of grad_y times the update, for the update is linear in B; so in A
    want = (grad_y * update).sum()
    for name in ("lora_A", "lora_B"):
        parameter = getattr(layer, name)
        assert_close((parameter.grad * parameter.detach()).sum(), want, what=name)


@pytest.mark.parametrize("training", [True, False])
def test_dropout_has_no_effect_on_a_merged_layer(training):
    plain, dropped = random_layer(), random_layer(lora_dropout=0.5)
    x = tokens(7, I)
    for layer in (plain, dropped):
        layer.train(training).merge()
    with torch.no_grad():
        assert torch.equal(dropped(x), plain(x))


@pytest.mark.parametrize(("p", "training", "folded"), [(0.0, True, True), (0.5, False, True), (0.5, True, False)])
def test_without_dropout_to_draw_the_update_is_part_of_the_product(p, training, folded):
    y = random_layer(lora_dropout=p).train(training)(tokens(7, I))
    assert ("_LoRALinear" in y.grad_fn.name()) == folded


# Merging.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_rounds_the_exact_sum_once(dtype):
    layer = random_layer().to(dtype)
    exact = layer.weight.double() + (ALPHA / R) * layer.lora_B.double() @ layer.lora_A.double()
    layer.merge()
    rounding = {torch.float32: 1e-7, torch.bfloat16: BF16}[dtype]
    assert layer.weight.dtype == dtype
    # |exact| element by element, plus the fp32 product's own 1e-6: no update is lost, none is rounded twice
    assert ((layer.weight.double() - exact).abs() <= rounding * exact.abs() + 1e-6).all()


def test_merging_twice_is_merging_once_and_unmerging_gives_the_weight_back():
    layer = random_layer()
    before = layer.weight.clone()
    layer.unmerge()
    assert torch.equal(layer.weight, before)  # nothing to take out
    layer.merge()
    once = layer.weight.clone()
    layer.merge()
    assert torch.equal(layer.weight, once) and not torch.equal(once, before)
    layer.unmerge()
    layer.unmerge()
    assert_close(layer.weight, before, 1e-6)


def test_a_merged_layer_computes_what_the_unmerged_one_does():
    layer = random_layer()
    x = tokens(2, 5, I)
    want = layer(x).detach()
    layer.eval().merge()
    assert_close(layer(x), want, 1e-6)


def test_train_and_eval_leave_the_weight_alone():
    layer = random_layer()
    before = layer.weight.clone()
    layer.eval()
    layer.train()
    assert torch.equal(layer.weight, before) and not layer.merged


def test_a_merged_layer_refuses_to_train_but_evaluates():
    layer = random_layer()
    layer.merge()
    x = tokens(3, I)
    with pytest.raises(RuntimeError, match=r"can't train.*unmerge"):
        layer.train()(x)
    with torch.no_grad():
        layer(x)
    layer.eval()(x)
    layer.unmerge()
    layer.train()(x).sum().backward()
    assert layer.lora_A.grad is not None


def test_set_lora_gives_exactly_the_named_layers_an_update_and_keeps_every_weight():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Sequential(nn.Linear(5, 4, bias=False), nn.Linear(4, 3)))
    before = {name: parameter for name, parameter in model.named_parameters()}
    x = torch.randn(7, 6)
    want = model(x)
    set_lora_(model, {"0": (2, 0.6), "2.0": (3, 4.5)})
    assert [type(m) for m in (model[0], model[2][0], model[2][1])] == [LoRALinear, LoRALinear, nn.Linear]
    assert (model[0].r, model[0].scaling, model[2][0].r, model[2][0].scaling) == (2, 0.3, 3, 1.5)
    assert_close(model(x), want, 1e-6, what="B starts at zero")
    nn.init.normal_(model[0].lora_B)
    assert (model(x) - want).abs().max() > 0.01
    set_lora_(model, {"2.1": (1, 1.0)})
    assert [type(m) for m in (model[0], model[2][0], model[2][1])] == [Linear, Linear, LoRALinear]
    assert_close(model(x), want, 1e-6)
    assert all(model.get_parameter(name) is parameter for name, parameter in before.items())
    with pytest.raises(KeyError, match="1"):
        set_lora_(model, {"1": (2, 1.0)})


def test_the_state_dict_of_a_merged_layer_has_no_lora_matrices():
    layer = random_layer()
    assert set(layer.state_dict()) == {"weight", "bias", "lora_A", "lora_B"}
    layer.merge()
    assert set(layer.state_dict()) == {"weight", "bias"}
    layer.unmerge()
    assert set(layer.state_dict()) == {"weight", "bias", "lora_A", "lora_B"}


def test_a_merged_layer_loaded_with_unmerged_weights_computes_what_their_layer_did():
    source, layer = random_layer(seed=0), random_layer(seed=5)
    layer.eval().merge()
    layer.load_state_dict(source.state_dict())
    x = tokens(3, I)
    assert_close(layer(x), source(x), 1e-6)


def test_a_merged_file_loads_into_transformers_plain_class_with_the_same_logits(tmp_path):
    model = randomise_(RobertaForSequenceClassification(lora_config())).eval()
    batch = ragged_batch([9, 4, 6])
    want = model(**batch).logits
    merge_lora_(model)
    merge_lora_(model)
    model.save_pretrained(tmp_path)
    plain, report = transformers.RobertaForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert_close(plain.eval()(**batch).logits, want)
    # and into our class, where its config asks for LoRA: the new B is zero, so the update counts once
    again = RobertaForSequenceClassification.from_pretrained(tmp_path).eval()
    assert_close(again(**batch).logits, want)
    unmerge_lora_(model)
    unmerge_lora_(model)
    assert_close(model(**batch).logits, want)


def test_merged_weights_and_logits_are_those_of_the_reference():
    tensors, _ = golden("roberta_merged")
    inputs = golden_inputs(golden("roberta_cls3")[0])
    model = golden_model("roberta_cls3").eval()
    assert_close(model(**inputs).logits, tensors["out.logits_unmerged"], 2e-5, scale=1)
    merge_lora_(model)
    weights = model.state_dict()
    merged = {key[len("merged.") :]: want for key, want in tensors.items() if key.startswith("merged.")}
    assert len(merged) == 6  # query and value of 3 layers
    for name, want in merged.items():
        assert_close(weights[name], want, 1e-6, what=name)
    logits = model(**inputs).logits
    assert_close(logits, tensors["out.logits_merged"], 2e-5, scale=1)
    assert (logits - tensors["alt.logits_double_counted"]).abs().max() > 0.1


# In a model: what trains, how many, what a file gives.


@pytest.mark.parametrize("case", ["roberta_cls3", "roberta_reg"])
def test_the_parameters_that_train_are_the_ones_the_reference_trains(case):
    _, description = golden(case)
    model = golden_model(case).requires_grad_(True)
    mark_only_lora_as_trainable(model)
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trains == set(description["trainable"])
    assert {name for name, _ in model.named_parameters()} - trains == set(description["frozen"])


def test_without_lora_the_head_alone_trains():
    model = RobertaForSequenceClassification(tiny_config())
    mark_only_lora_as_trainable(model)
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    head = {f"classifier.{layer}.{kind}" for layer in ("dense", "out_proj") for kind in ("weight", "bias")}
    assert trains == head


def test_frozen_parameters_get_no_gradient_and_trainable_ones_do():
    model = randomise_(RobertaForSequenceClassification(lora_config()))
    mark_only_lora_as_trainable(model)
    model(**ragged_batch([9, 4, 6]), labels=torch.tensor([0, 1, 2])).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ("hidden", "layers", "lora", "head"),
    [
        (768, 12, 294_912, 768 * 768 + 768 + 768 * 3 + 3),  # base: 12 layers x 2 projections x 8 x (768 + 768)
        (1024, 24, 786_432, 1024 * 1024 + 1024 + 1024 * 3 + 3),  # large: 24 x 2 x 8 x (1024 + 1024)
    ],
)
def test_rank_8_has_the_published_number_of_parameters(hidden, layers, lora, head):
    config = RobertaConfig(
        vocab_size=50265,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        intermediate_size=4 * hidden,
        max_position_embeddings=514,
        type_vocab_size=1,
        num_labels=3,
        apply_lora=True,
        lora_r=8,
        lora_alpha=16,
    )
    with torch.device("meta"):
        model = RobertaForSequenceClassification(config)
        plain = transformers.RobertaForSequenceClassification(config)
    mark_only_lora_as_trainable(model)
    counts = count_parameters(model)
    assert counts.encoder == lora
    assert counts.trainable == lora + head
    assert counts.total == sum(p.numel() for p in plain.parameters()) + lora


@pytest.mark.parametrize("writer", ["RobertaForSequenceClassification", "RobertaForMaskedLM", "RobertaModel"])
def test_loading_a_base_checkpoint_keeps_its_weights_and_starts_A_at_random_and_B_at_zero(tmp_path, writer):
    torch.manual_seed(0)
    saved = randomise_(getattr(transformers, writer)(tiny_config()))
    saved.save_pretrained(tmp_path)
    weights = {("roberta." if writer == "RobertaModel" else "") + key: t for key, t in saved.state_dict().items()}
    model = load_with_lora(tmp_path, seed=1)
    compared = 0
    for name, tensor in model.state_dict().items():
        if name.endswith("lora_A"):
            bound = 1 / math.sqrt(tensor.shape[1])
            assert 0.9 * bound < tensor.abs().max().item() <= bound, name
            assert tensor.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.2), name  # 128 draws
        elif name.endswith("lora_B"):
            assert torch.count_nonzero(tensor) == 0, name
        elif name in weights:
            assert torch.equal(tensor, weights[name]), name
            compared += 1
        else:
            assert name.startswith("classifier.") and torch.isfinite(tensor).all(), name
    # embeddings 5 and 16 a layer, and the head's 4 where the file has one
    assert compared == 5 + 2 * 16 + (4 if writer == "RobertaForSequenceClassification" else 0)


def test_the_start_of_A_follows_the_seed(base_checkpoint):
    def start(seed: int) -> list[Tensor]:
        state = load_with_lora(base_checkpoint, seed).state_dict()
        return [tensor for name, tensor in state.items() if name.endswith("lora_A")]

    first, second, other = start(1), start(1), start(2)
    assert len(first) == 4
    assert all(map(torch.equal, first, second))
    assert not any(map(torch.equal, first, other))
    assert not torch.equal(first[0], first[1])


def test_a_freshly_loaded_lora_model_computes_what_its_checkpoint_does(base_checkpoint):
    batch = ragged_batch([9, 4, 6])
    plain = transformers.RobertaForSequenceClassification.from_pretrained(base_checkpoint).eval()
    assert_close(load_with_lora(base_checkpoint, seed=1).eval()(**batch).logits, plain(**batch).logits)


def test_saving_and_loading_a_lora_model_gives_every_tensor_back_bit_for_bit(tmp_path):
    model = randomise_(RobertaForSequenceClassification(lora_config()))
    model.save_pretrained(tmp_path)
    torch.manual_seed(1)
    again, report = RobertaForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    want = model.state_dict()
    assert sum("lora_" in name for name in want) == 8
    assert again.state_dict().keys() == want.keys()
    assert all(torch.equal(tensor, want[name]) for name, tensor in again.state_dict().items())
    assert again.roberta.encoder.layer[0].attention.self.query.scaling == ALPHA / R


# Settings in a config that would make no LoRA, or less LoRA than they describe.


@pytest.mark.parametrize("kind", ["roberta", "deberta-v2"])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"lora_target_modules": ["q"]},
            r"config.lora_target_modules \['q'\]: 'q' is none of query, key, value, dense",
        ),
        ({"lora_target_modules": ["query", "all-linear"]}, "'all-linear' is none of query"),
        ({"lora_target_modules": "attention.self.query"}, "'attention.self.query' is none of query"),
        ({"lora_target_modules": []}, "'' is none of query"),
        ({"lora_layers": [2]}, r"config.lora_layers \[2\]: the model has 2 layers, 0 to 1"),
        ({"lora_layers": [0, -1]}, "the model has 2 layers, 0 to 1"),
        ({"lora_layers": []}, "the model has 2 layers, 0 to 1"),
        ({"lora_layers": "0-1"}, "config.lora_layers '0-1': the model has 2 layers"),
        ({"lora_layers": [True]}, "the model has 2 layers"),
        ({"lora_r": None}, "config.lora_r None: apply_lora=True needs a rank of 1 or more"),
        ({"lora_r": -1}, "config.lora_r -1"),
        ({"lora_r": 4.0}, "config.lora_r 4.0"),
        ({"lora_alpha": None}, "config.lora_alpha None: apply_lora=True needs a number"),
        ({"lora_alpha": "8"}, "config.lora_alpha '8'"),
        ({"lora_dropout": 1.0}, "config.lora_dropout 1.0: give a number from 0 to below 1"),
        ({"lora_dropout": -0.1}, "config.lora_dropout -0.1"),
    ],
)
def test_a_lora_setting_that_would_be_ignored_is_refused_by_name(kind, settings, message):
    config = (tiny_config if kind == "roberta" else tiny_deberta_config)(
        **{"apply_lora": True, "lora_r": 4, "lora_alpha": 8} | settings
    )
    with pytest.raises(ValueError, match=message):
        CLASSIFIERS[kind][0](config)


@pytest.mark.parametrize("name", ["lora_r", "lora_alpha", "lora_target_modules", "lora_layers", "lora_dropout"])
def test_a_lora_setting_without_apply_lora_is_refused_and_with_it_false_has_no_effect(name):
    value = {"lora_target_modules": ["key"], "lora_layers": [1]}.get(name, 0.5)
    with pytest.raises(
        ValueError, match=f"config.{name} has no effect without apply_lora. Set apply_lora=True, or remove {name}."
    ):
        RobertaForSequenceClassification(tiny_config(**{name: value}))
    model = RobertaForSequenceClassification(tiny_config(**{name: value}, apply_lora=False))
    assert not any(isinstance(module, LoRALinear) for module in model.modules())


@pytest.mark.parametrize("kind", ["roberta", "deberta-v2"])
@pytest.mark.parametrize(
    ("settings", "targets", "layers"),
    [
        ({"lora_target_modules": ["query_proj", "value_proj"]}, ["query", "value"], [0, 1]),
        ({"lora_target_modules": ("key_proj",)}, ["key"], [0, 1]),
        ({"lora_target_modules": {"key", "output"}}, ["key", "output"], [0, 1]),
        ({"lora_target_modules": "value_proj, dense"}, ["value", "dense"], [0, 1]),
        ({"lora_layers": 0}, ["query", "value"], [0]),
        ({"lora_layers": 1}, ["query", "value"], [1]),
        ({"lora_layers": range(1, 2)}, ["query", "value"], [1]),
        ({"lora_r": 0}, [], []),
    ],
)
def test_pefts_spellings_of_modules_and_layers_are_accepted(kind, settings, targets, layers, tmp_path):
    config = (tiny_config if kind == "roberta" else tiny_deberta_config)(
        **{"apply_lora": True, "lora_r": 4, "lora_alpha": 8} | settings
    )
    model = CLASSIFIERS[kind][0](config)
    made = [name for name, module in model.named_modules() if isinstance(module, LoRALinear)]
    assert targets_and_layers(made) == (targets, layers) and len(made) == len(targets) * len(layers)
    if made:
        model.save_pretrained(tmp_path)
        loaded = CLASSIFIERS[kind][0].from_pretrained(tmp_path)
        assert {*loaded.state_dict()} == {*model.state_dict()}


def test_an_alpha_that_is_text_is_not_converted():
    with pytest.raises(TypeError):
        LoRALinear(6, 5, 2, "3")
