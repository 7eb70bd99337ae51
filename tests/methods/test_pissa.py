"""PiSSA: a layer against its formula in float64 and PEFT's, its start, and W, which stays what it was."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CLASSIFIERS, assert_close, ragged_batch, randomise_, tiny_config, tiny_deberta_config
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from lora_nlu.adapters.__main__ import main
from lora_nlu.adapters.attaching import attach_adapter, load_adapter
from lora_nlu.adapters.converting import merged_state
from lora_nlu.adapters.reading import read_adapter
from lora_nlu.adapters.writing import adapter_of, save_adapter
from lora_nlu.errors import UserError
from lora_nlu.methods.description import set_method
from lora_nlu.methods.lora import set_lora_
from lora_nlu.methods.marking import count_parameters, mark_trainable
from lora_nlu.methods.pissa import PissaLinear, before_steps, pissa_layers, principal_part, start
from lora_nlu.methods.targets import TARGETS
from lora_nlu.models.loading import base_fingerprint, load_config, load_model

I, O, ALPHA = 24, 20, 6.0  # noqa: E741 (the paper's letters)
PARTS = ("lora_A", "lora_B")


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def layer_of(R: int, lora_dropout: float = 0.0, seed: int = 0, **settings) -> PissaLinear:
    """A layer that has started and has trained a little."""
    layer = PissaLinear(I, O, R, ALPHA, lora_dropout=lora_dropout, **settings)
    layer.weight.copy_(0.2 * random(O, I, seed=seed))
    layer.bias.copy_(random(O, seed=seed + 1))
    layer.start()
    for number, name in enumerate(PARTS):
        parameter = getattr(layer, name)
        parameter.add_(0.1 * random(*parameter.shape, seed=seed + 2 + number)).requires_grad_(True)
    return layer


def formula(x: Tensor, W: Tensor, b: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    """(W - U_R S_R V_R^T) x + b + s B A x, one token a row, by a full SVD."""
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    R = A.shape[0]
    return x @ (W - (U[:, :R] * S[:R]) @ Vt[:R] + s * B @ A).T + b


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("subtracted", [False, True])
@pytest.mark.parametrize("R", [1, 4, 8, 16])
def test_a_layer_has_the_values_and_gradients_of_its_formula_in_float64(R, subtracted, use_rslora):
    layer = layer_of(R, use_rslora=use_rslora)
    W = layer.weight.double()
    if subtracted:
        layer.subtract()
    x = random(7, I).requires_grad_(True)
    exact = [t.detach().double().requires_grad_(True) for t in (x, layer.lora_A, layer.lora_B)]
    want = formula(exact[0], W, layer.bias.double(), *exact[1:], layer.scaling)
    got = layer(x)
    assert_close(got, want.float())
    grad = random(7, O, seed=9)
    want.backward(grad.double())
    got.backward(grad)
    for parameter, other in zip((x, layer.lora_A, layer.lora_B), exact, strict=True):
        assert_close(parameter.grad, other.grad.float())
    assert layer.weight.grad is layer.lora_A_start.grad is layer.lora_B_start.grad is None


@pytest.mark.parametrize("shape", [(20, 24), (24, 20), (24, 24), (1, 5)])
def test_the_start_is_the_best_approximation_of_its_rank_and_the_same_from_call_to_call(shape):
    W, rank = random(*shape), min(4, *shape)
    A, B = principal_part(W, rank, 2.0)
    U, S, Vt = torch.linalg.svd(W.double(), full_matrices=False)
    assert_close(2.0 * B @ A, ((U[:, :rank] * S[:rank]) @ Vt[:rank]).float())
    assert_close((A @ A.T).diag(), (S[:rank] / 2.0).float())
    assert_close((B.T @ B).diag(), (S[:rank] / 2.0).float())
    assert all(torch.equal(*pair) for pair in zip((A, B), principal_part(W.clone(), rank, 2.0), strict=True))


def test_a_weight_of_lower_rank_starts_with_finite_numbers():
    W = random(O, 1) @ random(1, I)
    A, B = principal_part(W, 3, 1.0)
    assert A.isfinite().all() and B.isfinite().all()
    assert_close(B @ A, W)
    assert not any(x.any() for x in principal_part(torch.zeros(O, I), 3, 1.0))


def test_a_rank_that_the_weight_does_not_have_and_an_offloaded_weight_are_refused():
    with pytest.raises(UserError, match=r"rank 21.*\[20, 24\] has 20 singular vectors. Lower --lora_r"):
        principal_part(random(O, I), 21, 1.0)
    with pytest.raises(UserError, match="on the meta device"):
        start(PissaLinear(I, O, 2, ALPHA).to("meta"))


@pytest.mark.parametrize("subtracted", [False, True])
def test_without_the_update_the_layer_multiplies_by_W(subtracted):
    layer, x = layer_of(4), random(2, 3, I)
    W, want = layer.weight.clone(), F.linear(x, layer.weight, layer.bias)
    if subtracted:
        layer.subtract()
    assert_close(layer(x, apply_update=False), want)
    assert_close(layer.frozen_weight(), W)


@pytest.mark.parametrize("subtracted", [False, True])
def test_dropout_is_of_what_a_and_b_read_alone_as_in_peft(subtracted):
    layer, x = layer_of(4, lora_dropout=0.5), random(5, I)
    A, B = layer.lora_A, layer.lora_B
    W_res = layer.weight - layer.scaling * layer.lora_B_start @ layer.lora_A_start
    if subtracted:
        layer.subtract()
    torch.manual_seed(3)
    dropped = layer.dropout(x)
    torch.manual_seed(3)
    assert_close(layer(x), F.linear(x, W_res, layer.bias) + layer.scaling * dropped @ A.T @ B.T)


def test_merged_and_unmerged_the_layer_computes_the_same_and_has_its_weight_again():
    layer, x = layer_of(4).eval(), random(5, I)
    want, W = layer(x), layer.weight.clone()
    layer.merge()
    assert_close(layer(x), want)
    assert torch.equal(layer.frozen_weight(), W)
    assert {*layer.state_dict()} == {"weight", "bias"}
    layer.unmerge()
    assert torch.equal(layer.weight, W)


def test_a_layer_whose_weight_is_the_residual_is_neither_merged_saved_nor_loaded():
    layer = layer_of(4)
    state = layer.state_dict()
    layer.subtract()
    with pytest.raises(ValueError, match="W_res of PiSSA.*restore_weights"):
        layer.merge()
    with pytest.raises(RuntimeError, match="can't be saved.*restore_weights"):
        layer.state_dict()
    with pytest.raises(RuntimeError, match="weight: the weight of this layer is W_res of PiSSA"):
        layer.load_state_dict(state)
    assert_close(copy.deepcopy(layer)(random(5, I)), layer(random(5, I)))


@pytest.mark.parametrize("subtracted", [False, True])
def test_gradients_of_gradients_half_precision_and_autocast_are_computed_too(subtracted):
    layer, x = layer_of(2), random(3, I).requires_grad_(True)
    want = layer(x.detach())
    if subtracted:
        layer.subtract()
    (grad,) = torch.autograd.grad(layer(x).pow(2).sum(), x, create_graph=True)
    grad.sum().backward()
    assert layer.lora_A.grad.abs().sum() > 0
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(layer(x.detach()).float(), want, 0.03)
    assert_close(layer.bfloat16()(x.detach().bfloat16()).float(), want, 0.03)


# ------------------------------------------------------------------------------------------------ models, and PEFT's

KINDS = pytest.mark.parametrize("kind", ["roberta", "deberta-v2"])
BATCH = ragged_batch([9, 5, 12], pad=0)
LABELS = torch.tensor([0, 2, 1])
DENSE = ["query", "key", "value", "query_proj", "key_proj", "value_proj", "dense"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    """A classifier of each kind, written by transformers: random weights, a tokenizer of a word."""
    folders = {}
    for kind, config in (("roberta", tiny_config()), ("deberta-v2", tiny_deberta_config())):
        folders[kind] = tmp_path_factory.mktemp("base") / "base"
        randomise_(CLASSIFIERS[kind][1](config), seed=5).save_pretrained(folders[kind])
        words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "[PAD]": 2}, "[UNK]"))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]")
        tokenizer.save_pretrained(folders[kind])
    return folders


def loaded(base: Path, **settings: Any) -> Any:
    """Our model of a base, with PiSSA unless `apply_lora` is False, as run_glue.py loads it."""
    config = load_config(str(base))
    relative = {"lora_relative_query": True} if config.model_type == "deberta-v2" else {}
    pissa = {"apply_lora": True, "lora_variant": "pissa", "lora_r": 4, "lora_alpha": 6.0}
    set_method(config, pissa | relative | settings)
    return load_model(str(base), config, needs_head=False)[0]


def train_(model: torch.nn.Module, seed: int = 3) -> None:
    """Move what trains a little, as a step does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(**BATCH).logits


def peft_of(base: Path, kind: str, targets: list[str] = DENSE, **settings: Any) -> Any:
    """transformers' model of a base under PEFT's PiSSA, the head training."""
    config = {"r": 4, "lora_alpha": 6, "lora_dropout": 0.0, "init_lora_weights": "pissa"} | settings
    theirs = CLASSIFIERS[kind][1].from_pretrained(base)
    pattern = rf".*\.layer\.\d+\..*({'|'.join(targets)})"
    return get_peft_model(theirs, LoraConfig(task_type="SEQ_CLS", target_modules=pattern, **config))


def theirs_in(base: Path, kind: str, folder: Path) -> Any:
    """The base in transformers' class with a folder that PEFT loads."""
    return PeftModel.from_pretrained(CLASSIFIERS[kind][1].from_pretrained(base), str(folder))


@torch.no_grad()
def copy_from_peft_(ours: Any, theirs: Any, starts: bool) -> None:
    """PEFT's A and B, in its signs, into our layers; as their starts too."""
    for name, layer in pissa_layers(ours).items():
        other = theirs.get_submodule(f"base_model.model.{name}")
        for part in PARTS:
            matrix = getattr(other, part)["default"].weight
            for parameter in (part, f"{part}_start") if starts else (part,):
                getattr(layer, parameter).copy_(matrix)


@KINDS
@pytest.mark.parametrize("R", [1, 8])
@pytest.mark.parametrize("targets", [["query", "value"], [*TARGETS]], ids=["query,value", "all six"])
def test_a_model_starts_and_trains_as_pefts(kind, targets, R, bases):
    ours = loaded(bases[kind], lora_target_modules=targets, lora_r=R)
    modules = DENSE if len(targets) > 2 else ["query", "value", "query_proj", "value_proj"]
    theirs = peft_of(bases[kind], kind, modules, r=R)
    assert len(pissa_layers(ours)) == 2 * len(targets)
    for name, layer in pissa_layers(ours).items():
        other = theirs.get_submodule(f"base_model.model.{name}")
        A, B = (getattr(other, part)["default"].weight for part in PARTS)
        # PEFT's SVD is in fp32: its error is that of the weight's largest numbers
        assert_close(layer.lora_B @ layer.lora_A, B @ A, 1e-5, layer.weight.abs().max().item(), name)
    base = CLASSIFIERS[kind][1].from_pretrained(bases[kind])
    assert_close(logits(ours), logits(base))
    copy_from_peft_(ours, theirs, starts=True)
    train_(theirs)
    copy_from_peft_(ours, theirs, starts=False)
    parameters = dict(theirs.named_parameters())
    head = {name: f"base_model.model.{name}".replace("classifier.", "classifier.modules_to_save.default.", 1)
            for name, p in ours.named_parameters() if p.requires_grad and "lora_" not in name}  # fmt: skip
    head = {name: other for name, other in head.items() if other in parameters}
    with torch.no_grad():
        for name, other in head.items():
            ours.get_parameter(name).copy_(parameters[other])
    want = theirs.train()(**BATCH, labels=LABELS)
    want.loss.backward()
    for _ in ("W", "W_res"):
        ours.zero_grad()
        got = ours.train()(**BATCH, labels=LABELS)
        assert_close(got.logits, want.logits)
        assert_close(got.loss, want.loss)
        got.loss.backward()
        for name, layer in pissa_layers(ours).items():
            for part in PARTS:
                gradient = parameters[f"base_model.model.{name}.{part}.default.weight"].grad
                scale = gradient.abs().max().item()
                if ".query" in name or ".key" in name:  # helpers.assert_same_gradients says why, and why 2e-5
                    scale = max(scale, 0.05)
                assert_close(getattr(layer, part).grad, gradient, 2e-5, scale, f"{name}.{part}")
        for name, other in head.items():
            if parameters[other].requires_grad:  # PEFT leaves a DeBERTa's pooler
                assert_close(ours.get_parameter(name).grad, parameters[other].grad, 2e-5, what=name)
        before_steps(ours)
        assert all(layer.subtracted for layer in pissa_layers(ours).values())
        for name, layer in pissa_layers(ours).items():
            assert_close(layer.weight, theirs.get_submodule(f"base_model.model.{name}").base_layer.weight, what=name)


@KINDS
def test_only_a_b_and_the_head_train_and_the_papers_column_counts_a_and_b(kind, bases):
    model = loaded(bases[kind])
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "layer." in name}
    assert trained == {f"{name}.{part}" for name in pissa_layers(model) for part in PARTS}
    assert count_parameters(model).encoder == 4 * 4 * (32 + 32)


@pytest.mark.parametrize(("kind", "relative_query"), [("roberta", True), ("deberta-v2", True), ("deberta-v2", False)])
def test_the_base_is_known_again_and_its_weights_are_read_again_bit_by_bit(kind, relative_query, bases):
    model = loaded(bases[kind], **({} if relative_query else {"lora_relative_query": None}))
    plain = loaded(bases[kind], apply_lora=False)
    assert base_fingerprint(model) == base_fingerprint(plain)
    train_(model)
    want, file = logits(model), load_file(bases[kind] / "model.safetensors")
    before_steps(model)
    weights = [(f"{name}.weight", layer) for name, layer in pissa_layers(model).items()]
    assert not any(torch.equal(layer.weight, file[name]) for name, layer in weights)
    assert_close(logits(model), want)
    assert model.hold_in_bf16(trains=True) > 0
    assert_close(logits(model), want, 0.05)
    model.restore_weights()
    assert all(torch.equal(layer.weight, file[name]) for name, layer in weights)
    assert torch.equal(logits(model), want) and base_fingerprint(model) == base_fingerprint(plain)


@KINDS
def test_from_pretrained_with_the_settings_starts_as_load_model_does(kind, bases):
    model = loaded(bases[kind])
    again = CLASSIFIERS[kind][0].from_pretrained(bases[kind], config=model.config)
    starts = {name: p for name, p in model.named_parameters() if ".lora_" in name}
    parameters = dict(again.named_parameters())
    assert starts and all(p.any() and torch.equal(p, parameters[name]) for name, p in starts.items())


@KINDS
def test_a_saved_model_has_the_bases_weights_and_continues(kind, bases, tmp_path):
    model = loaded(bases[kind])
    train_(model)
    want = logits(model)
    before_steps(model)
    model.save_pretrained(tmp_path)
    again = CLASSIFIERS[kind][0].from_pretrained(tmp_path)
    assert torch.equal(logits(again), want)
    start(again)  # leaves what the checkpoint had
    assert torch.equal(logits(again), want)
    saved, file = load_file(tmp_path / "model.safetensors"), load_file(bases[kind] / "model.safetensors")
    assert all(torch.equal(saved[f"{name}.weight"], file[f"{name}.weight"]) for name in pissa_layers(model))


def test_a_changed_file_is_noticed_when_the_weights_are_read_again(bases, tmp_path):
    loaded(bases["roberta"], apply_lora=False).save_pretrained(tmp_path)
    model = loaded(tmp_path)
    before_steps(model)
    randomise_(CLASSIFIERS["roberta"][1](tiny_config()), seed=6).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="the files have changed"):
        model.restore_weights()


def test_a_model_without_a_file_keeps_its_weights(bases):
    model = CLASSIFIERS["roberta"][0](tiny_config(apply_lora=True, lora_variant="pissa", lora_r=4, lora_alpha=6.0))
    mark_trainable(model)
    start(model)
    before_steps(model)
    assert not any(layer.subtracted for layer in pissa_layers(model).values())


# ---------------------------------------------------------------------------------------------------------- folders


def mixed(base: Path, use_rslora: bool) -> Any:
    """A model whose layers have several ranks and alphas, trained a little."""
    model = loaded(base, apply_lora=False)
    names = [name for name, m in model.named_modules() if hasattr(m, "in_features") and ".layer." in name]
    layers = {name: ((2, 6.0), (3, 5.0), (2, 7.0))[i % 3] for i, name in enumerate(names)}
    set_lora_(model, layers, use_rslora, "pissa")
    if model.config.model_type == "deberta-v2":
        model.config.lora_relative_query = True
    start(model)
    mark_trainable(model)
    train_(model)
    return model


@KINDS
@pytest.mark.parametrize("use_rslora", [False, True])
def test_peft_loads_a_folder_as_a_lora_of_twice_the_rank_over_the_base(kind, use_rslora, bases, tmp_path):
    model = mixed(bases[kind], use_rslora)
    save_adapter(model, tmp_path, {})
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    factor = 2**0.5 if use_rslora else 2
    assert settings["r"] == 4 and {*settings["rank_pattern"].values()} == {6}
    alphas = {settings["lora_alpha"], *settings["alpha_pattern"].values()}
    assert sorted(alphas) == pytest.approx([5 * factor, 6 * factor, 7 * factor])
    assert_close(logits(theirs_in(bases[kind], kind, tmp_path)), logits(model))
    again = loaded(bases[kind], apply_lora=False)
    attach_adapter(again, read_adapter(str(tmp_path)), None, allow_new_head=False)
    assert torch.equal(logits(again), logits(model))
    state, want = adapter_of(again, {}).state, adapter_of(model, {}).state
    assert state.keys() == want.keys() and all(torch.equal(state[name], tensor) for name, tensor in want.items())
    layers = [(m.r, m.lora_alpha, m.scaling) for model_ in (model, again) for m in pissa_layers(model_).values()]
    assert layers[: len(layers) // 2] == layers[len(layers) // 2 :]
    trains = [{name for name, p in m.named_parameters() if p.requires_grad} for m in (model, again)]
    assert trains[0] == trains[1]


@KINDS
@pytest.mark.parametrize("in_bf16", [False, True])
def test_a_checkpoint_of_another_start_is_resumed_with_its_own(kind, in_bf16, bases, tmp_path):
    model = loaded(bases[kind])
    with torch.no_grad():
        for layer in pissa_layers(model).values():  # another machine's differs less
            layer.lora_A_start.mul_(-2)
    train_(model)
    save_adapter(model, tmp_path, {})
    want = logits(model)
    resumed = loaded(bases[kind])
    before_steps(resumed)
    if in_bf16:
        assert resumed.hold_in_bf16(trains=True)
    load_adapter(resumed, read_adapter(str(tmp_path)), allow_new_head=False)
    stale = logits(resumed)
    before_steps(resumed)
    assert resumed.is_held_in_bf16 == in_bf16
    got, tolerance = logits(resumed), 0.05 if in_bf16 else 1e-5
    assert_close(got, want, tolerance)
    assert (stale - want).abs().max() > 4 * tolerance * want.abs().max()


@KINDS
@pytest.mark.parametrize("use_rslora", [False, True])
def test_pefts_folders_are_read_converted_or_not(kind, use_rslora, bases, tmp_path):
    theirs = peft_of(bases[kind], kind, use_rslora=use_rslora)
    theirs.peft_config["default"].init_lora_weights = True  # as PEFT's example saves the start
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = "pissa"
    train_(theirs)
    want = logits(theirs)
    theirs.save_pretrained(tmp_path / "own")
    theirs.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    for folder, method in (("own", "pissa"), ("converted", "rslora" if use_rslora else "lora")):
        ours = loaded(bases[kind], apply_lora=False)
        adapter = read_adapter(str(tmp_path / folder))
        assert adapter.method == method
        attach_adapter(ours, adapter, None, allow_new_head=True)
        if folder == "converted":  # without the head: PEFT's conversion leaves out all but A and B
            head = theirs.get_submodule("base_model.model.classifier.modules_to_save.default")
            ours.classifier.load_state_dict(head.state_dict())
        assert_close(logits(ours), want, 3e-5, what=folder)
        if method == "pissa":  # goes on, and is saved as ours are
            save_adapter(ours, tmp_path / "ours", {})
            assert_close(logits(theirs_in(bases[kind], kind, tmp_path / "ours")), want, 3e-5)


def test_a_random_start_and_pefts_own_folder_in_another_form_are_refused_by_name(bases, tmp_path, capsys):
    theirs = peft_of(bases["roberta"], "roberta")
    theirs.save_pretrained(tmp_path / "own")
    assert main(["convert", str(tmp_path / "own"), str(tmp_path / "copy"), "--to", "peft"]) == 1
    assert "PEFT saved it without its start" in capsys.readouterr().err
    path = tmp_path / "own" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": "pissa_niter_4"}))
    with pytest.raises(UserError, match="init_lora_weights=pissa_niter_4 is not supported"):
        read_adapter(str(tmp_path / "own"))


@KINDS
@pytest.mark.parametrize("relative_query", [True, False])
def test_a_folder_is_inspected_merged_and_no_published_file(kind, relative_query, bases, tmp_path, capsys):
    model = loaded(bases[kind], lora_relative_query=relative_query or None)
    train_(model)
    metadata = {"base_model": str(bases[kind]), "base_fingerprint": base_fingerprint(model)}
    save_adapter(model, tmp_path / "a", metadata)
    assert main(["inspect", str(tmp_path / "a")]) == 0
    table = dict(line.strip().split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert {name: table[name].strip() for name in ("method", "rank", "alpha")} == {
        "method": "pissa", "rank": "4", "alpha": "6",
    }  # fmt: skip
    assert f"{4 * 4 * (32 + 32):,} of them in the encoder" in table["parameters"]
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "a.bin"), "--to", "bin"]) == 1
    assert "contains pissa; the published layout is LoRA's: use peft" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "merged"), "--to", "merged"]) == 0
    theirs, report = CLASSIFIERS[kind][1].from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert_close(logits(theirs), logits(model))


def test_another_alpha_of_a_layer_whose_weight_is_the_residual_is_refused():
    layer = layer_of(4)
    layer.start()
    layer.subtract()
    W = layer.frozen_weight()
    layer.lora_alpha *= 2
    assert torch.equal(layer.frozen_weight(), W) and not layer.is_current()
    with pytest.raises(RuntimeError, match="lora_alpha changed"):
        layer(random(3, layer.in_features))


@pytest.mark.parametrize("relative_query", ["none", "key"])
def test_the_merged_state_of_a_trained_deberta_has_the_bases_relative_projections(relative_query, bases):
    model = loaded(bases["deberta-v2"], lora_relative_query=relative_query, lora_target_modules=["query", "key"])
    train_(model)
    before_steps(model)
    want = logits(model)
    state, settings = merged_state(model)
    config = load_config(str(bases["deberta-v2"]))
    config.update(settings)
    plain = CLASSIFIERS["deberta-v2"][1](config)
    plain.load_state_dict(state)
    assert_close(logits(plain.eval()), want)
