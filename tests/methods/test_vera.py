"""VeRA: layers and models against the formula in float64 and PEFT's, the pair that layers share, files."""

import copy
import pickle
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CLASSIFIERS, assert_close, ragged_batch, randomise_, tiny_config, tiny_deberta_config
from peft import PeftModel, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, RobertaConfig

from lora_nlu.adapters.attaching import attach_adapter
from lora_nlu.adapters.converting import merged_state, write_published
from lora_nlu.adapters.model_card import inspect
from lora_nlu.adapters.reading import read_adapter
from lora_nlu.adapters.writing import save_adapter
from lora_nlu.errors import UserError
from lora_nlu.files import ADAPTER_WEIGHTS, RUN_METADATA
from lora_nlu.methods import vera
from lora_nlu.methods.description import set_method
from lora_nlu.methods.marking import count_parameters, mark_trainable
from lora_nlu.methods.targets import TARGETS
from lora_nlu.methods.vera import Projections, VeraLinear
from lora_nlu.models.loading import check_method, load_model
from lora_nlu.ops.frozen import FrozenWeight

I, O, R = 12, 10, 16  # noqa: E741 (the letters of vera.py); the rank may exceed both


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_layer(out: int = O, projections: Projections | None = None, **settings: Any) -> VeraLinear:
    layer = VeraLinear(I, out, R, projections=projections, **settings)
    with torch.no_grad():
        for number, parameter in enumerate(layer.parameters()):
            parameter.copy_(noise(*parameter.shape, seed=number))
    layer.vera_lambda_d.requires_grad_()
    layer.vera_lambda_b.requires_grad_()
    return layer


def formula(layer: VeraLinear, x: Tensor, d: Tensor, b: Tensor) -> Tensor:
    """h = W x + bias + b * (B (d * (A x))), one token a row, in float64."""
    A, B = layer.projections.tensors()
    W, bias, A, B = (t.detach().double() for t in (layer.weight, layer.bias, A[:, :I], B[: layer.out_features]))
    return x @ W.T + bias + b * ((d * (x @ A.T)) @ B.T)


def differentiated(layer: VeraLinear, x: Tensor, g: Tensor) -> list[Tensor]:
    """The result and the gradients of x, d and b."""
    inputs = [x.detach().clone().requires_grad_(), layer.vera_lambda_d, layer.vera_lambda_b]
    y = layer(inputs[0])
    return [y, *torch.autograd.grad(y, inputs, g.to(y.dtype))]


def expected(layer: VeraLinear, x: Tensor, g: Tensor) -> list[Tensor]:
    inputs = [t.detach().double().requires_grad_() for t in (x, layer.vera_lambda_d, layer.vera_lambda_b)]
    y = formula(layer, *inputs)
    return [y, *torch.autograd.grad(y, inputs, g.double())]


@pytest.mark.parametrize("shape", [(7, I), (2, 5, I), (I,)], ids=str)
@pytest.mark.parametrize("out", [O, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_layer_and_its_gradients_are_the_formulas(dtype, out, shape):
    layer = random_layer(out, random_layer().projections).to(dtype)
    x, g = noise(*shape, seed=8).to(dtype), noise(*shape[:-1], out, seed=9).to(dtype)
    for got, exact in zip(differentiated(layer, x, g), expected(layer, x, g), strict=True):
        assert got.dtype is dtype
        assert_close(got.double(), exact, 1e-6 if dtype is torch.float32 else 1e-14)


def test_gradients_of_gradients_are_the_formulas():
    layer, x = random_layer(), noise(5, I, seed=8)
    inputs = [x.requires_grad_(), layer.vera_lambda_d, layer.vera_lambda_b]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    results = []
    for y, parameters in ((layer(x), inputs), (formula(layer, *exact), exact)):
        first = torch.autograd.grad((y**3).sum(), parameters, create_graph=True)
        results.append(torch.autograd.grad(sum((t**2).sum() for t in first), parameters))
    for got, want in zip(*results, strict=True):
        assert_close(got.double(), want, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_held_in_bf16_is_the_formula_to_a_few_roundings(dtype):
    layer, x, g = random_layer(), noise(9, I, seed=8).to(dtype), noise(9, O, seed=9).bfloat16()
    exact = expected(layer, x, g)
    layer.frozen = FrozenWeight(layer.weight.detach())
    got = differentiated(layer, x, g)
    assert [t.dtype for t in got] == [torch.bfloat16, dtype, torch.float32, torch.float32]
    for ours, theirs in zip(got, exact, strict=True):
        assert_close(ours.double(), theirs, 0.02)  # of bf16's 2**-8, in two products one after the other
    frozen = layer(x, apply_update=False).double()
    assert_close(frozen, x.double() @ layer.weight.double().T + layer.bias.double(), 0.02)


def test_under_autocast_compiled_and_in_bf16_a_layer_is_the_formula_to_their_rounding():
    layer, x = random_layer(), noise(9, I, seed=8)
    exact = formula(layer, x.double(), layer.vera_lambda_d.double(), layer.vera_lambda_b.double())
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype is torch.bfloat16
    assert_close(y.double(), exact, 0.02)
    assert_close(torch.compile(layer, backend="eager")(x).double(), exact, 1e-6)
    assert_close(copy.deepcopy(layer).bfloat16()(x.bfloat16()).double(), exact, 0.03)


class EveryThird(nn.Module):
    """A dropout that is known: every third element is 0, the others are 1.5 times what they were."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.arange(x.numel()).view_as(x) % 3 > 0) * 1.5


@pytest.mark.parametrize("held", [False, True])
def test_dropout_drops_of_what_the_update_reads_alone(held):
    layer, x, g = random_layer(lora_dropout=0.5), noise(9, I, seed=8), noise(9, O, seed=9).bfloat16().float()
    assert layer.lora_dropout == 0.5 and not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))
    layer.train().dropout = EveryThird()
    d, b = layer.vera_lambda_d.detach().double(), layer.vera_lambda_b.detach().double()
    inputs = [t.requires_grad_() for t in (x.double(), d, b)]
    dropped, frozen = EveryThird()(inputs[0]), torch.zeros_like(b)  # b 0: the frozen layer alone
    exact = formula(layer, inputs[0], d, frozen) + formula(layer, dropped, d, b) - formula(layer, dropped, d, frozen)
    want = [exact, *torch.autograd.grad(exact, inputs, g.double())]
    if held:
        layer.frozen = FrozenWeight(layer.weight.detach())
    for ours, theirs in zip(differentiated(layer, x, g), want, strict=True):
        assert_close(ours.double(), theirs, 0.02 if held else 1e-6)


def test_merging_adds_the_update_to_the_weight_and_is_undone_exactly():
    layer, x = random_layer().eval(), noise(7, I, seed=8)
    before, weight = layer(x), layer.weight.detach().clone()
    layer.merge()
    A, B = layer.projections.tensors()
    assert_close(layer.weight, weight + layer.vera_lambda_b[:, None] * B @ (layer.vera_lambda_d[:, None] * A))
    assert_close(layer(x), before)
    assert_close(layer(x, apply_update=False), nn.functional.linear(x, weight, layer.bias))
    with torch.no_grad():
        layer.vera_lambda_d.add_(1)
    with pytest.raises(RuntimeError, match="vera_lambda_d or vera_lambda_b of a merged VeraLinear changed"):
        layer(x)
    layer.unmerge()
    assert torch.equal(layer.weight, weight)


def test_the_pair_is_as_wide_as_the_widest_layers_and_each_layer_reads_its_part():
    projections = Projections(R, seed=3)
    layers = [VeraLinear(i, o, R, projections=projections) for i, o in ((4, 9), (8, 5), (6, 7))]
    A, B = projections.tensors()
    assert A.shape == (R, 8) and B.shape == (9, R)
    for layer in layers:
        a, b = projections.sliced(layer, torch.device("cpu"), torch.float32)
        assert torch.equal(a, A[:, : layer.in_features]) and torch.equal(b, B[: layer.out_features])
    assert A.abs().max() <= (6 / 8) ** 0.5 and B.abs().max() <= (6 / R) ** 0.5
    assert A.std() == pytest.approx((2 / 8) ** 0.5, rel=0.1) and B.std() == pytest.approx((2 / R) ** 0.5, rel=0.1)
    again = Projections(R, seed=3)
    again.widen(8, 9)
    torch.rand(5)  # the global generator has no part in it
    assert all(map(torch.equal, again.tensors(), (A, B)))
    again = Projections(R, seed=4)
    again.widen(8, 9)
    assert not torch.equal(again.tensors()[0], A)


def test_a_pair_drawn_while_nothing_is_recorded_serves_training():
    layer = random_layer()
    with torch.inference_mode():
        layer(noise(3, I, seed=8))
    layer(noise(3, I, seed=8)).sum().backward()
    assert layer.vera_lambda_d.grad.abs().max() > 0


def test_vectors_of_other_sizes_are_refused():
    layer = random_layer()
    layer.vera_lambda_d = nn.Parameter(torch.zeros(R + 1))
    with pytest.raises(ValueError, match=rf"vera_lambda_d: expected \[{R}\] on cpu, got \[{R + 1}\]"):
        layer(noise(7, I, seed=8))


# --------------------------------------------------------------------------------------------------------------- models

CONFIGS: dict[str, Any] = {"roberta": tiny_config, "deberta-v2": tiny_deberta_config}
KINDS = pytest.mark.parametrize("kind", CONFIGS)
LENGTHS = [9, 4, 6, 4, 1]
LABELS = torch.arange(len(LENGTHS)) % 3
VERA = {"apply_lora": True, "lora_variant": "vera", "lora_r": R}


def vera_model(kind: str, **settings: Any) -> Any:
    """A random classifier with VeRA, of which vectors and head train."""
    settings = VERA | ({"lora_relative_query": True} if kind == "deberta-v2" else {}) | settings
    model = randomise_(CLASSIFIERS[kind][0](CONFIGS[kind](**settings)))
    mark_trainable(model)
    return model


def in_our_names(theirs: nn.Module) -> dict[str, nn.Parameter]:
    """PEFT's parameters by the names that ours have."""
    named = ((name.replace(".base_layer.", "."), parameter) for name, parameter in theirs.named_parameters())
    return {name.removesuffix(".default"): parameter for name, parameter in named}


def pefts(kind: str, ours: Any, seed: int, rank: int) -> Any:
    """transformers' classifier under PEFT's VeRA on the same layers, with the weights of ours; its pair is its own."""
    layers = [name for name, module in ours.named_modules() if isinstance(module, VeraLinear)]
    config = VeraConfig(r=rank, target_modules=layers, projection_prng_key=seed)
    theirs = get_peft_model(CLASSIFIERS[kind][1](CONFIGS[kind]()), config).base_model.model
    with torch.no_grad():
        for name, parameter in in_our_names(theirs).items():
            parameter.copy_(ours.get_parameter(name))
            parameter.requires_grad_(ours.get_parameter(name).requires_grad)
    return theirs.train()


@KINDS
@pytest.mark.parametrize("targets", [["query", "value"], [*TARGETS], ["output"]], ids=str)
@pytest.mark.parametrize("rank", [4, 64])
def test_a_model_has_pefts_logits_loss_and_gradients(kind, rank, targets):
    ours = vera_model(kind, lora_r=rank, lora_target_modules=targets, vera_seed=5).train()
    theirs = pefts(kind, ours, 5, rank)
    inputs, outputs = ragged_batch(LENGTHS, pad=ours.config.pad_token_id), []
    for model in (ours, theirs):
        outputs.append(model(**inputs, labels=LABELS))
        outputs[-1].loss.backward()
    assert_close(outputs[0].logits, outputs[1].logits)
    assert_close(outputs[0].loss, outputs[1].loss)
    parameters = in_our_names(theirs)
    assert parameters.keys() == dict(ours.named_parameters()).keys()
    assert sum("vera_lambda" in name for name in parameters) == 2 * len(targets) * 2
    for name, parameter in parameters.items():
        if parameter.requires_grad:
            assert_close(ours.get_parameter(name).grad, parameter.grad, what=name)
        else:
            assert ours.get_parameter(name).grad is None and parameter.grad is None, name


@KINDS
def test_copies_pickles_and_moved_models_share_one_pair(kind):
    model = vera_model(kind).eval()
    inputs = ragged_batch(LENGTHS, pad=model.config.pad_token_id)
    before = model(**inputs).logits
    assert not any("vera_A" in name or "projections" in name for name in model.state_dict())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).double().float()):
        (projections,) = {layer.projections for layer in vera_layers(other)}
        assert projections is not vera_layers(model)[0].projections
        assert torch.equal(other(**inputs).logits, before)
    meta = copy.deepcopy(model).to("meta")
    assert len({layer.projections for layer in vera_layers(meta)}) == 1


def vera_layers(model: nn.Module) -> list[VeraLinear]:
    return [module for module in model.modules() if isinstance(module, VeraLinear)]


# ---------------------------------------------------------------------------------------------------------------- files


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    """A classifier of each model, as transformers saves it."""
    folder = tmp_path_factory.mktemp("bases")
    for kind in CONFIGS:
        randomise_(CLASSIFIERS[kind][1](CONFIGS[kind]())).save_pretrained(folder / kind)
    return {kind: folder / kind for kind in CONFIGS}


def trained(base: Path, **settings: Any) -> Any:
    """A loaded classifier with VeRA whose vectors and head are random."""
    config = AutoConfig.from_pretrained(base)
    both = {"lora_relative_query": True} if config.model_type == "deberta-v2" else {}
    set_method(config, VERA | both | settings)
    model, _ = load_model(str(base), config, needs_head=False)
    with torch.no_grad():
        for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter.copy_(noise(*parameter.shape, seed=number))
    return model.eval()


def attached(base: Path, folder: Path) -> Any:
    config = AutoConfig.from_pretrained(base)
    set_method(config, {})
    model, _ = load_model(str(base), config, needs_head=False)
    attach_adapter(model, read_adapter(str(folder)), None, allow_new_head=False)
    return model.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**ragged_batch(LENGTHS, pad=model.config.pad_token_id)).logits


def pair_of(model: Any) -> tuple[Tensor, Tensor]:
    (projections,) = {layer.projections for layer in vera_layers(model)}
    return projections.tensors()


def theirs_of(base: Path) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(base).eval()


@KINDS
@pytest.mark.parametrize("targets", [["query", "value"], ["key", "intermediate", "output"]], ids=str)
def test_peft_reads_a_folder_and_computes_the_same(kind, targets, bases, tmp_path):
    model = trained(bases[kind], lora_target_modules=targets, vera_seed=7, lora_dropout=0.25)
    save_adapter(model, tmp_path, {})
    theirs = PeftModel.from_pretrained(theirs_of(bases[kind]), str(tmp_path)).eval()
    assert_close(logits(theirs), logits(model))
    config = theirs.peft_config["default"]
    assert (config.r, config.projection_prng_key, config.save_projection, config.vera_dropout) == (R, 7, True, 0.25)
    again = attached(bases[kind], tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert {layer.projections.seed for layer in vera_layers(again)} == {7}


@KINDS
@pytest.mark.parametrize("saves_pair", [True, False])
@pytest.mark.filterwarnings("ignore:Specified to not")
def test_pefts_folder_with_or_without_its_pair_is_read_and_computes_the_same(kind, saves_pair, bases, tmp_path):
    targets = ["query" if kind == "roberta" else "query_proj", "intermediate.dense"]
    config = VeraConfig(
        r=R, target_modules=targets, projection_prng_key=11, save_projection=saves_pair, task_type="SEQ_CLS"
    )
    theirs = get_peft_model(theirs_of(bases[kind]), config)
    with torch.no_grad():
        for number, parameter in enumerate(p for p in theirs.parameters() if p.requires_grad):
            parameter.copy_(noise(*parameter.shape, seed=number))
    if saves_pair:  # as one that was drawn elsewhere
        theirs.base_model.vera_A["default"].add_(0.25)
    theirs.eval().save_pretrained(tmp_path)
    ours = attached(bases[kind], tmp_path)
    assert_close(logits(ours), logits(theirs))
    assert_close(pair_of(ours)[0], theirs.base_model.vera_A["default"], 0)
    save_adapter(ours, tmp_path / "again", {})
    assert torch.equal(logits(attached(bases[kind], tmp_path / "again")), logits(ours))


@KINDS
def test_merged_into_transformers_own_class_the_logits_are_the_same(kind, bases):
    model = trained(bases[kind], lora_target_modules=[*TARGETS])
    state, settings = merged_state(model)
    theirs = theirs_of(bases[kind])
    theirs.load_state_dict(state)
    assert not settings
    assert_close(logits(theirs), logits(model))


@KINDS
def test_a_complete_model_is_saved_with_its_seed_and_loaded_with_the_same_pair(kind, bases, tmp_path):
    model = trained(bases[kind], vera_seed=9)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), logits(model))
    pair_of(model)[1].add_(1)
    with pytest.raises(UserError, match="VeRA's frozen matrices by their seed; this model's are from a file"):
        model.save_pretrained(tmp_path)


def test_a_file_whose_pair_has_another_shape_is_refused(bases, tmp_path):
    save_adapter(trained(bases["roberta"]), tmp_path, {})
    tensors = load_file(tmp_path / ADAPTER_WEIGHTS)
    tensors["base_model.vera_A"] = tensors["base_model.vera_A"][:, :-1].contiguous()
    save_file(tensors, tmp_path / ADAPTER_WEIGHTS)
    (tmp_path / RUN_METADATA).unlink()
    with pytest.raises(UserError, match=rf"vera_A is \[{R}, 31\] in the file, \[{R}, 32\] in the model"):
        attached(bases["roberta"], tmp_path)


def test_a_pytorch_that_draws_other_numbers_is_refused(monkeypatch):
    monkeypatch.setattr(vera, "_FIRST_DRAWS", [0.5, 0.5])
    with pytest.raises(UserError, match="draws other random numbers from a seed than earlier versions"):
        random_layer()(noise(3, I, seed=8))


@pytest.mark.parametrize(("shape", "rank", "count"), [("base", 1024, 43_008), ("large", 256, 61_440)])
def test_as_many_parameters_train_in_the_encoder_as_the_paper_says(shape, rank, count):
    sizes = {
        "base": {"num_hidden_layers": 12, "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
        "large": {"num_hidden_layers": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16},
    }
    with torch.device("meta"):
        model = CLASSIFIERS["roberta"][0](RobertaConfig(**sizes[shape], **VERA | {"lora_r": rank}))
    mark_trainable(model)
    assert count_parameters(model).encoder == count


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"lora_alpha": 8}, "config.lora_alpha has no effect with VeRA"),
        ({"vera_seed": -1}, "config.vera_seed -1: give a number from 0"),
        ({"lora_variant": None, "lora_alpha": 8, "vera_seed": 1}, "config.vera_seed has no effect with LoRA"),
    ],
)
def test_a_setting_without_effect_or_out_of_range_is_refused(settings, text):
    with pytest.raises(ValueError, match=text):
        vera_model("roberta", **settings)


def test_a_base_that_contains_vera_is_not_given_another_pair(bases, tmp_path):
    trained(bases["roberta"], vera_seed=1).save_pretrained(tmp_path)
    for flags, problem in ((VERA | {"vera_seed": 1}, None), (VERA, "trained with vera_seed 1; the flags give 0")):
        config = AutoConfig.from_pretrained(tmp_path)
        saved = set_method(config, flags)
        model, _ = load_model(str(tmp_path), config, needs_head=False)
        with pytest.raises(UserError, match=rf"{problem}.\nGive --vera_seed 1\.") if problem else nullcontext():
            check_method(model, str(tmp_path), saved)


def test_inspect_names_the_variant_its_rank_and_its_matrices_and_no_alpha(bases, tmp_path):
    save_adapter(trained(bases["roberta"]), tmp_path, {})
    facts = dict(line.strip().split("  ", 1) for line in inspect(read_adapter(str(tmp_path))).splitlines())
    facts = {name: value.strip() for name, value in facts.items()}
    assert (facts["method"], facts["rank"], facts["frozen matrices"]) == ("vera", str(R), "in the file")
    assert "alpha" not in facts
    with pytest.raises(UserError, match="contains vera; the published layout is LoRA's"):
        write_published(read_adapter(str(tmp_path)), tmp_path / "vera.bin")
