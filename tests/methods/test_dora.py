"""DoRA: a layer against its formula and PEFT's, row lengths from kept sums, models and folders against PEFT's."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import CLASSIFIERS, assert_close, ragged_batch, randomise_, tiny_config, tiny_deberta_config
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lora_nlu.adapters.attaching import attach_adapter
from lora_nlu.adapters.converting import convert, merged_state
from lora_nlu.adapters.reading import read_adapter
from lora_nlu.adapters.writing import save_adapter
from lora_nlu.errors import UserError
from lora_nlu.files import ADAPTER_CONFIG
from lora_nlu.methods.dora import DoRALinear
from lora_nlu.methods.linear import merge_lora_, unmerge_lora_
from lora_nlu.methods.marking import mark_trainable
from lora_nlu.methods.targets import TARGETS
from lora_nlu.models.loading import load_config, load_model
from lora_nlu.ops.frozen import FrozenWeight

I, O, ALPHA = 48, 32, 6.0  # noqa: E741 (the paper's and dora.py's letters)
BF16 = 2.0**-8
DORA = {"apply_lora": True, "lora_variant": "dora", "lora_r": 4, "lora_alpha": 6}
CONFIGS: dict[str, Any] = {"roberta": tiny_config, "deberta-v2": tiny_deberta_config}
KINDS = pytest.mark.parametrize("kind", CONFIGS)
LENGTHS = [9, 4, 6, 4, 1]


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_layer(rank: int = 4, bias: bool = True, lora_dropout: float = 0.0) -> DoRALinear:
    """Its update is as long as its weight, and its magnitudes are 0.5 to 1.5 times the rows' lengths."""
    layer = DoRALinear(I, O, rank, ALPHA, bias=bias, lora_dropout=lora_dropout)
    with torch.no_grad():
        for i, parameter in enumerate(layer.parameters()):
            parameter.copy_(tokens(*parameter.shape, seed=i))
        layer.lora_B.mul_(rank / ALPHA / rank**0.5)
        layer.lora_magnitude_vector.copy_(layer.row_lengths() * (0.5 + torch.rand(O)))
    return layer


def formula(x: Tensor, p: dict[str, Tensor], s: float) -> Tensor:
    """y = m (W + s B A) x / |W + s B A| + b, the length a constant."""
    V = p["weight"] + s * p["lora_B"] @ p["lora_A"]
    y = p["lora_magnitude_vector"] / V.detach().norm(dim=1) * (x @ V.T)
    return y + p["bias"] if "bias" in p else y


def exact_lengths(layer: DoRALinear) -> Tensor:
    W, A, B = (getattr(layer, name).detach().double() for name in ("weight", "lora_A", "lora_B"))
    return (W + layer.scaling * B @ A).norm(dim=1)


@pytest.mark.parametrize("trains", ["lora", "all"])
@pytest.mark.parametrize(("bias", "shape"), [(True, (7, I)), (False, (2, 5, I)), (True, (I,))])
@pytest.mark.parametrize("rank", [1, 4, 8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_output_and_gradients_are_those_of_the_formula(dtype, rank, bias, shape, trains):
    layer = random_layer(rank, bias).to(dtype)
    if trains == "all":
        layer.requires_grad_(True)
    x, grad = tokens(*shape).to(dtype).requires_grad_(), tokens(*shape[:-1], O, seed=2).to(dtype)
    y = layer(x)
    y.backward(grad)
    exact_x = x.detach().double().requires_grad_()
    exact = {name: p.detach().double().requires_grad_(p.requires_grad) for name, p in layer.named_parameters()}
    want = formula(exact_x, exact, layer.scaling)
    want.backward(grad.double())
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13
    assert y.shape == grad.shape and y.dtype == dtype
    assert_close(y.double(), want, tolerance)
    assert_close(x.grad.double(), exact_x.grad, tolerance)
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == {
        name for name in exact if trains == "all" or name in layer.update_names
    }
    for name, parameter in layer.named_parameters():
        if parameter.grad is not None:
            assert_close(parameter.grad.double(), exact[name].grad, tolerance, what=name)


def test_gradients_of_gradients_are_those_of_the_formula():
    layer = random_layer()
    x = tokens(7, I).requires_grad_()
    exact = {name: p.detach().double().requires_grad_(p.requires_grad) for name, p in layer.named_parameters()}
    results = []
    for y, of, p in (
        (layer(x), x, dict(layer.named_parameters())),
        (formula(x64 := x.detach().double().requires_grad_(), exact, layer.scaling), x64, exact),
    ):
        (gradient,) = torch.autograd.grad(y.pow(2).sum(), of, create_graph=True)
        results.append(torch.autograd.grad(gradient.pow(2).sum(), [of, *(p[name] for name in layer.update_names)]))
    for got, want in zip(*results, strict=True):
        assert_close(got.double(), want, 1e-5)


@pytest.mark.parametrize("rank", [1, 8])
@pytest.mark.parametrize(("p", "shape"), [(0.0, (2, 5, I)), (0.4, (9, I)), (0.4, (2, 5, I))])
@pytest.mark.usefixtures("torch_draws")
def test_output_and_gradients_are_those_of_a_peft_layer_with_the_same_weights_and_draws(p, shape, rank):
    ours = random_layer(rank, lora_dropout=p)
    config = LoraConfig(r=rank, lora_alpha=ALPHA, lora_dropout=p, target_modules=["0"], use_dora=True)
    theirs = inject_adapter_in_model(config, nn.Sequential(nn.Linear(I, O)))[0]
    pairs = {name.split(".")[0]: parameter for name, parameter in theirs.named_parameters() if "lora_" in name}
    pairs |= {"weight": theirs.base_layer.weight, "bias": theirs.base_layer.bias}
    with torch.no_grad():
        for name, parameter in pairs.items():
            parameter.copy_(getattr(ours, name))
    outputs, inputs = [], [tokens(*shape).requires_grad_() for _ in range(2)]
    for layer, x in zip((ours, theirs), inputs, strict=True):
        torch.manual_seed(0)
        outputs.append(layer.train()(x))
        outputs[-1].pow(2).sum().backward()
    assert_close(*outputs, 1e-5)
    assert_close(inputs[0].grad, inputs[1].grad, 1e-5)
    for name in ours.update_names:
        assert_close(getattr(ours, name).grad, pairs[name].grad, 1e-5, what=name)
    assert_close(ours.eval()(inputs[0]), theirs.eval()(inputs[0]), 1e-5)
    assert torch.equal(outputs[0], ours(inputs[0])) == (p == 0)


@pytest.mark.parametrize("scale", [0.0, 1e-4, 1.0, 1e4])
def test_row_lengths_have_the_digits_of_fp32_with_small_and_large_updates(scale):
    layer = random_layer(8)
    layer.lora_B.data.mul_(scale)
    assert_close(layer.row_lengths().double() / exact_lengths(layer), torch.ones(O).double(), 2e-7)


@pytest.mark.parametrize("left", [1.0, 1e-1, 1e-3, 1e-5])
def test_rows_that_the_update_nearly_cancels_keep_their_digits(left):
    layer = random_layer(8)
    with torch.no_grad():  # rows 3 to 5 of W are -s B A and a rest
        update = layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
        layer.weight[3:6] = (left * tokens(3, I).double() - update[3:6]).float()
    assert_close(layer.row_lengths().double() / exact_lengths(layer), torch.ones(O).double(), 2e-6)


def test_a_row_of_zeros_gives_its_bias_and_no_nan():
    layer = DoRALinear(I, O, 4, ALPHA)
    layer.weight.data[2] = 0.0
    layer.start_magnitude()
    y = layer(tokens(7, I))
    y.sum().backward()
    assert torch.equal(y[:, 2], layer.bias[2].expand(7))
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.requires_grad)


@pytest.mark.parametrize("bias", [True, False])
def test_a_new_layer_computes_what_the_linear_layer_did(bias):
    layer, x = DoRALinear(I, O, 4, ALPHA, bias=bias), tokens(3, I)
    assert torch.equal(layer.lora_magnitude_vector, layer.row_lengths())
    assert_close(layer(x), F.linear(x, layer.weight, layer.bias), 1e-6)
    assert_close(layer.lora_magnitude_vector, layer.weight.norm(dim=1), 1e-6)


@pytest.mark.parametrize("change", ["in place", "replaced", "loaded", "data"])
def test_lengths_follow_a_weight_that_changes(change):
    layer, x = random_layer(), tokens(7, I)
    layer(x)
    other = tokens(O, I, seed=9)
    with torch.no_grad():
        if change == "in place":
            layer.weight.copy_(other)
        elif change == "replaced":
            layer.weight = nn.Parameter(other.clone(), requires_grad=False)
        elif change == "loaded":
            layer.load_state_dict(layer.state_dict() | {"weight": other})
        else:
            layer.weight.data = other.clone()
    assert_close(layer.row_lengths().double(), exact_lengths(layer), 1e-6)
    assert_close(layer(x), formula(x, dict(layer.named_parameters()), layer.scaling), 1e-5)


class Shapes(TorchDispatchMode):
    """Records the shapes of all results that are new memory."""

    def __init__(self):
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not func.is_view and result._base is None:
            self.shapes.append(tuple(result.shape))
        return result


def test_no_step_after_the_first_makes_a_matrix_of_the_weights_size():
    layer, x = random_layer(), tokens(7, I)
    layer(x)
    with Shapes() as made:
        layer(x).sum().backward()
    assert made.shapes and not {(O, I), (I, O)} & {*made.shapes}


def test_of_a_projection_without_its_update_only_the_frozen_weight_is_read():
    layer, x = random_layer(), tokens(3, I)
    want = F.linear(x, layer.weight, layer.bias)
    assert_close(layer(x, apply_update=False), want, 1e-6)
    layer.merge()
    assert_close(layer(x, apply_update=False), want, 1e-6)


def test_half_precision_and_autocast_agree_with_fp32_to_bf16_rounding():
    x = tokens(64, I)
    for layer, exact, given in (
        (random_layer().bfloat16(), None, x.bfloat16()),
        (random_layer(), None, x),
    ):
        exact = copy.deepcopy(layer).float()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=given.dtype == torch.float32):
            y = layer(given)
        assert y.dtype == torch.bfloat16
        want = exact(given.float())
        assert_close(y.float(), want, 8 * BF16)
        y.float().sum().backward()
        want.sum().backward()
        for name in layer.update_names:
            assert_close(getattr(layer, name).grad.float(), getattr(exact, name).grad, 10 * BF16, what=name)


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_with_a_weight_held_in_bf16_output_and_gradients_are_those_of_the_rounded_weight(p):
    exact = random_layer(lora_dropout=p)
    with torch.no_grad():
        exact.weight.copy_(exact.weight.bfloat16())
    held = copy.deepcopy(exact)
    held.frozen = FrozenWeight(held.weight.detach())
    held.weight = nn.Parameter(held.frozen.weight, requires_grad=False)
    outputs, inputs = [], [tokens(64, I).requires_grad_() for _ in range(2)]
    for layer, x in zip((held, exact), inputs, strict=True):
        torch.manual_seed(0)
        outputs.append(layer(x).float())
        outputs[-1].backward(tokens(64, O, seed=2).bfloat16().float())
    assert held(inputs[0]).dtype == torch.bfloat16
    assert_close(held.row_lengths(), exact.row_lengths(), BF16)
    assert_close(*outputs, 5 * BF16)
    assert_close(inputs[0].grad, inputs[1].grad, 5 * BF16)
    for name in held.update_names:
        assert_close(getattr(held, name).grad, getattr(exact, name).grad, 5 * BF16, what=name)


def test_compiled_a_layer_computes_the_same():
    layer, x = random_layer(), tokens(7, I)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    y = compiled(x)
    y.sum().backward()
    got = [getattr(layer, name).grad.clone() for name in layer.update_names]
    layer.zero_grad()
    want = layer(x)
    want.sum().backward()
    assert_close(y, want, 1e-5)
    for name, gradient in zip(layer.update_names, got, strict=True):
        assert_close(gradient, getattr(layer, name).grad, 1e-5, what=name)


# Merging.


def test_a_merged_layer_computes_the_same_and_unmerges_to_every_bit():
    layer, x = random_layer().eval(), tokens(3, I)
    before, y = layer.weight.clone(), layer(x)
    layer.merge()
    exact = formula(torch.eye(I).double(), {n: p.double() for n, p in layer.state_dict().items()} | {
        "weight": before.double(), "lora_A": layer.lora_A.double(), "lora_B": layer.lora_B.double(),
        "lora_magnitude_vector": layer.lora_magnitude_vector.double(), "bias": torch.zeros(O).double(),
    }, layer.scaling).T  # fmt: skip
    assert_close(layer.weight.double(), exact, 1e-6)
    assert_close(layer(x), y, 1e-5)
    layer.unmerge()
    assert torch.equal(layer.weight, before)


def test_a_merged_weight_that_was_written_to_unmerges_to_what_was_written():
    layer = random_layer()
    before = layer.weight.clone()
    layer.merge()
    with torch.no_grad():
        layer.weight.mul_(2.0)
    merged, lengths = layer.weight.clone(), exact_lengths_of(before, layer)
    layer.unmerge()
    want = merged / (layer.lora_magnitude_vector / lengths)[:, None] - layer.scaling * layer.lora_B @ layer.lora_A
    assert_close(layer.weight, want.detach(), 1e-5)


def exact_lengths_of(weight: Tensor, layer: DoRALinear) -> Tensor:
    return (weight + layer.scaling * layer.lora_B @ layer.lora_A).detach().norm(dim=1)


def test_a_merged_layer_refuses_to_train_and_notices_another_magnitude():
    layer, x = random_layer().eval(), tokens(3, I)
    layer.merge()
    with pytest.raises(RuntimeError, match="can't train"):
        layer.train()(x)
    with torch.no_grad():
        layer.lora_magnitude_vector.add_(1.0)
    with pytest.raises(RuntimeError, match="changed"):
        layer.eval()(x)


# Models.


def twins(kind: str, rank: int, targets: list[str], **settings: Any) -> tuple[Any, Any]:
    """Our classifier with DoRA on these targets and transformers' own under PEFT: the same random weights."""
    settings = DORA | {"lora_r": rank, "lora_target_modules": targets} | settings
    if kind == "deberta-v2":
        settings["lora_relative_query"] = "both"
    ours = randomise_(CLASSIFIERS[kind][0](CONFIGS[kind](**settings)))
    mark_trainable(ours)
    layers = [name for name, module in ours.named_modules() if isinstance(module, DoRALinear)]
    p = settings.get("lora_dropout", 0.0)
    pattern = "|".join(map(re.escape, layers))
    config = LoraConfig(r=rank, lora_alpha=6, lora_dropout=p, target_modules=pattern, use_dora=True)
    theirs = inject_adapter_in_model(config, CLASSIFIERS[kind][1](CONFIGS[kind]()))
    with torch.no_grad():
        for name, parameter in in_our_names(theirs).items():
            parameter.copy_(ours.get_parameter(name))
            parameter.requires_grad_(ours.get_parameter(name).requires_grad)
    return ours.train(), theirs.train()


def in_our_names(theirs: nn.Module) -> dict[str, nn.Parameter]:
    names = ((name.replace(".base_layer.", "."), parameter) for name, parameter in theirs.named_parameters())
    return {name.removesuffix(".default.weight"): parameter for name, parameter in names}


@KINDS
@pytest.mark.parametrize("rank", [1, 8])
@pytest.mark.parametrize("targets", [["query", "value"], [*TARGETS]], ids=["query and value", "all six"])
def test_a_model_has_pefts_logits_and_gradients(kind, targets, rank):
    ours, theirs = twins(kind, rank, targets)
    outputs = []
    for model in (ours, theirs):
        outputs.append(model(**ragged_batch(LENGTHS, pad=ours.config.pad_token_id), labels=torch.arange(5) % 3))
        outputs[-1].loss.backward()
    assert_close(outputs[0].logits, outputs[1].logits, 1e-5)
    parameters = in_our_names(theirs)
    trained = {name for name, parameter in ours.named_parameters() if parameter.requires_grad}
    assert parameters.keys() == dict(ours.named_parameters()).keys()
    assert sum("lora_" in name for name in trained) == 3 * len(targets) * 2
    for name in trained:
        assert_close(ours.get_parameter(name).grad, parameters[name].grad, 2e-5, what=name)


@pytest.mark.usefixtures("torch_draws")
def test_a_models_dropout_is_that_of_pefts_in_every_layer():
    # One sentence without padding: what the updates read has PEFT's size, and its draws come in PEFT's order.
    ours, theirs = twins("roberta", 4, [*TARGETS], lora_dropout=0.3)
    for name, module in theirs.named_modules():
        if name.endswith(".lora_dropout"):
            module["default"] = nn.Dropout(0.3)
    batch, found = ragged_batch([8]), []
    for model in (ours, theirs):
        torch.manual_seed(3)
        output = model(**batch, labels=torch.zeros(1, dtype=torch.long), output_hidden_states=True)  # every token
        output.loss.backward()
        found.append(output.logits)
    assert_close(*found, 1e-5)
    assert (found[0] - ours.eval()(**batch).logits).abs().max() > 1e-3
    for name, parameter in in_our_names(theirs).items():
        if parameter.grad is not None:
            assert_close(ours.get_parameter(name).grad, parameter.grad, 2e-5, what=name)


# Folders.


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints written by transformers, without DoRA."""
    folders = {kind: tmp_path_factory.mktemp(kind) / "base" for kind in CONFIGS}
    for kind, folder in folders.items():
        randomise_(CLASSIFIERS[kind][1](CONFIGS[kind]())).save_pretrained(folder)
    return folders


def loaded(base: Path, **settings: Any) -> Any:
    config = load_config(str(base))
    for name, value in settings.items():
        setattr(config, name, value)
    return load_model(str(base), config, needs_head=False)[0]


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(**ragged_batch(LENGTHS, pad=model.config.pad_token_id)).logits


@torch.no_grad()
def moved_(model: Any) -> Any:
    """The model with other values of what trains, near those that it has."""
    for i, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
        parameter.add_(0.2 * tokens(*parameter.shape, seed=i))
    return model


@KINDS
def test_a_freshly_loaded_model_computes_what_its_checkpoint_does(kind, bases):
    theirs = CLASSIFIERS[kind][1].from_pretrained(bases[kind])
    for model in (loaded(bases[kind], **DORA), CLASSIFIERS[kind][0].from_pretrained(
        bases[kind], config=CONFIGS[kind](**DORA)
    )):  # fmt: skip
        assert_close(logits_of(model), logits_of(theirs), 1e-5)
        layer = next(module for module in model.modules() if isinstance(module, DoRALinear))
        assert_close(layer.lora_magnitude_vector, layer.weight.norm(dim=1), 1e-6)


@KINDS
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_loads_our_folder_and_computes_the_same(kind, rslora, bases, tmp_path):
    model = moved_(loaded(bases[kind], **DORA, lora_relative_query="both", use_rslora=rslora or None))
    save_adapter(model, tmp_path, {"task": "custom"})
    theirs = PeftModel.from_pretrained(CLASSIFIERS[kind][1].from_pretrained(bases[kind]), str(tmp_path))
    assert_close(logits_of(theirs), logits_of(model), 1e-5)
    assert theirs.peft_config["default"].use_dora and theirs.peft_config["default"].use_rslora == rslora
    again = loaded(bases[kind])
    attach_adapter(again, read_adapter(str(tmp_path)), None, allow_new_head=False)
    assert torch.equal(logits_of(again), logits_of(model))


@KINDS
@pytest.mark.parametrize("rslora", [False, True])
def test_pefts_folder_is_read_and_computes_the_same(kind, rslora, bases, tmp_path):
    config = LoraConfig(
        r=4, lora_alpha=6, use_dora=True, use_rslora=rslora, task_type="SEQ_CLS",
        modules_to_save=["classifier", "pooler"],
        target_modules=["query_proj", "intermediate.dense"] if kind == "deberta-v2" else ["query", "value"],
    )  # fmt: skip
    theirs = moved_(get_peft_model(CLASSIFIERS[kind][1].from_pretrained(bases[kind]), config))
    theirs.save_pretrained(tmp_path)
    model, adapter = loaded(bases[kind]), read_adapter(str(tmp_path))
    attach_adapter(model, adapter, None, allow_new_head=False)
    assert adapter.method == "dora" and adapter.use_rslora == rslora
    assert_close(logits_of(model), logits_of(theirs), 1e-5)


@KINDS
def test_a_merged_model_computes_the_same_in_transformers_own_class(kind, bases):
    model = moved_(loaded(bases[kind], **DORA, lora_target_modules=[*TARGETS]))
    want = logits_of(model)
    state, settings = merged_state(model)
    theirs = CLASSIFIERS[kind][1](CONFIGS[kind](**settings))
    theirs.load_state_dict(state)
    assert_close(logits_of(theirs), want, 1e-5)
    before = model.state_dict()
    merge_lora_(model)
    assert_close(logits_of(model), want, 1e-5)
    unmerge_lora_(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_folder_without_a_layers_magnitude_is_refused_by_its_name(bases, tmp_path):
    model = moved_(loaded(bases["roberta"], **DORA))
    name = "roberta.encoder.layer.1.attention.self.value.lora_magnitude_vector"
    model.get_parameter(name).requires_grad_(False)  # what doesn't train is not saved
    save_adapter(model, tmp_path, {"task": "custom"})
    with pytest.raises(UserError, match=re.escape(f"the file lacks {name}")):
        read_adapter(str(tmp_path))


def test_plain_lora_with_pefts_key_of_dora_is_refused(bases, tmp_path):
    model = loaded(bases["roberta"], **{**DORA, "lora_variant": "lora"})
    save_adapter(model, tmp_path, {"task": "custom"})
    path = tmp_path / ADAPTER_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": True}))
    with pytest.raises(UserError, match="the file lacks .*lora_magnitude_vector"):
        read_adapter(str(tmp_path))


def test_the_published_layout_is_plain_loras(bases, tmp_path):
    save_adapter(moved_(loaded(bases["roberta"], **DORA)), tmp_path / "folder", {"task": "custom"})
    with pytest.raises(UserError, match="contains dora; the published layout is LoRA's"):
        convert(read_adapter(str(tmp_path / "folder")), tmp_path / "x.bin", "bin", None, None)


def test_a_saved_model_with_dora_is_loaded_with_every_tensor(bases, tmp_path):
    model = moved_(loaded(bases["roberta"], **DORA))
    model.save_pretrained(tmp_path)
    again = transformers.AutoConfig.from_pretrained(tmp_path)
    assert again.lora_variant == "dora"
    again = CLASSIFIERS["roberta"][0].from_pretrained(tmp_path)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
