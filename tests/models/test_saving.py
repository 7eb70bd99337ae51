"""`save_pretrained` and `from_pretrained` of our classes: what a method added is there again, or it is refused."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CLASSIFIERS, assert_close, ragged_batch, randomise_, tiny_config, tiny_deberta_config
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_nlu.adapters.__main__ import main
from lora_nlu.adapters.attaching import attach_adapter
from lora_nlu.adapters.reading import read_adapter
from lora_nlu.adapters.writing import save_adapter
from lora_nlu.errors import UserError
from lora_nlu.methods.bottleneck import Bottleneck, set_bottlenecks_
from lora_nlu.methods.description import set_method
from lora_nlu.methods.linear import merge_lora_
from lora_nlu.methods.lora import LoRALinear, set_lora_
from lora_nlu.methods.marking import mark_only_lora_as_trainable, mark_trainable
from lora_nlu.methods.targets import TARGETS, target_of
from lora_nlu.models.modeling_roberta import RobertaModel

KINDS = ["roberta", "deberta-v2"]
LORA = {"apply_lora": True, "lora_r": 2, "lora_alpha": 7}


def plain(kind: str, **settings: Any) -> Any:
    config = (tiny_config if kind == "roberta" else tiny_deberta_config)(**settings)
    return randomise_(CLASSIFIERS[kind][0](config)).eval()


def layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def named(model: Any, targets: list[str], numbers: list[int]) -> list[str]:
    """Names of the layers that are these targets of these encoder layers."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [n for n in linear if target_of(n) in targets and any(f".layer.{i}." in n for i in numbers)]


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(**ragged_batch([17, 3, 30, 9], pad=model.config.pad_token_id)).logits


def with_lora(kind: str, settings_by_name: dict[str, tuple[int, float]] | None = None, **settings: Any) -> Any:
    """A model whose config knew of no LoRA when it was made, with random matrices."""
    model = plain(kind, **settings)
    set_lora_(model, settings_by_name or dict.fromkeys(named(model, ["query", "value"], [0, 1]), (4, 6.0)))
    without = logits(model)
    for i, layer in enumerate(layers(model).values()):
        randomise_(layer_matrices(layer), i)
    assert (logits(model) - without).abs().max() > 0.005
    return model


def layer_matrices(layer: LoRALinear) -> nn.Module:
    matrices = nn.Module()
    matrices.lora_A, matrices.lora_B = layer.lora_A, layer.lora_B
    return matrices


def again(model: Any, folder: Path) -> Any:
    """The model saved and loaded; its layers and logits are the same."""
    model.save_pretrained(folder)
    loaded, report = type(model).from_pretrained(folder, output_loading_info=True)
    assert not report["unexpected_keys"] and not report["missing_keys"] and not report["mismatched_keys"]
    assert_close(logits(loaded), logits(model), 1e-6)
    for name, layer in layers(model).items():
        other = loaded.get_submodule(name)
        assert (other.r, other.lora_dropout) == (layer.r, layer.lora_dropout)
        assert other.scaling == pytest.approx(layer.scaling, rel=1e-15)
    return loaded


@pytest.mark.parametrize("relative_query", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_saved_after_attach_adapter_is_loaded_with_its_lora(kind, relative_query, tmp_path):
    trained = plain(kind, apply_lora=True, lora_r=4, lora_alpha=6, lora_relative_query=relative_query)
    mark_only_lora_as_trainable(trained)
    save_adapter(trained, tmp_path / "adapter", {"task": "custom"})
    model = plain(kind)
    model.load_state_dict({name: x for name, x in trained.state_dict().items() if "lora_" not in name})
    attach_adapter(model, read_adapter(str(tmp_path / "adapter")), None, allow_new_head=False)
    assert_close(logits(model), logits(trained))
    loaded = again(model, tmp_path / "complete")
    assert loaded.state_dict().keys() == trained.state_dict().keys()
    assert getattr(loaded, "frozen_relative_query", None) == getattr(trained, "frozen_relative_query", None)


@pytest.mark.parametrize(
    ("targets", "numbers", "rank", "scaling"),
    [
        (["query", "value"], [0, 1], 8, 2.0),
        (["query"], [0, 1], 4, 1 / math.sqrt(3)),
        (["key", "dense", "intermediate", "output"], [1], 3, 0.1),
        ([*TARGETS], [0], 1, 16.0),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "before", [{}, {"apply_lora": True, "lora_r": 2, "lora_alpha": 7, "lora_layers": [1]}], ids=str
)
@pytest.mark.parametrize("kind", KINDS)
def test_lora_of_any_places_rank_and_scaling_is_loaded_as_it_was_saved(
    kind, before, targets, numbers, rank, scaling, tmp_path
):
    places = named(plain(kind), targets, numbers)
    model = with_lora(kind, dict.fromkeys(places, (rank, scaling * rank)), **before)
    for layer in layers(model).values():
        layer.lora_dropout = 0.25
    assert len(layers(model)) == len(targets) * len(numbers)
    assert len(layers(again(model, tmp_path))) == len(layers(model))


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_that_describes_the_models_layers_is_saved_unchanged(kind, tmp_path):
    model = plain(kind, apply_lora=True, lora_r=4, lora_alpha=6)
    bare = plain(kind)
    for saved, folder in ((model, "lora"), (bare, "bare")):
        before = vars(saved.config).copy()
        again(saved, tmp_path / folder)
        assert {name for name, value in vars(saved.config).items() if value != before.get(name, "absent")} <= {
            "dtype",
            "architectures",
        }


@pytest.mark.parametrize("numbers", [0, [0]])
@pytest.mark.parametrize("kind", KINDS)
def test_lora_on_layer_0_alone_is_on_layer_0_alone_in_every_saved_form(kind, numbers, tmp_path):
    new_config = tiny_config if kind == "roberta" else tiny_deberta_config
    config = new_config()
    set_method(config, LORA | {"lora_layers": numbers, "lora_relative_query": True})
    model: Any = randomise_(CLASSIFIERS[kind][0](config))
    assert all(".layer.0." in name for name in layers(model)) and len(layers(model)) == 2
    model.save_pretrained(tmp_path / "complete")
    again = type(model).from_pretrained(tmp_path / "complete")
    assert layers(again).keys() == layers(model).keys() and torch.equal(logits(again), logits(model))
    mark_trainable(model)
    save_adapter(model, tmp_path / "adapter", {})
    state = {name: tensor for name, tensor in model.state_dict().items() if "lora_" not in name}
    ours, theirs = (model_class(new_config()) for model_class in CLASSIFIERS[kind])
    for base in (ours, theirs):
        base.load_state_dict(state)
    attach_adapter(ours, read_adapter(str(tmp_path / "adapter")), None, allow_new_head=False)
    assert torch.equal(logits(ours), logits(model))
    assert_close(logits(PeftModel.from_pretrained(theirs, tmp_path / "adapter")), logits(model))


def odd_ranks(model: Any) -> dict[str, tuple[int, float]]:
    return {name: (2 + i, 1.0) for i, name in enumerate(named(model, ["query", "value"], [0, 1]))}


def odd_scalings(model: Any) -> dict[str, tuple[int, float]]:
    return {name: (4, 1.0 + i) for i, name in enumerate(named(model, ["query", "value"], [0, 1]))}


def one_left_out(model: Any) -> dict[str, tuple[int, float]]:
    return dict.fromkeys(named(model, ["query", "value"], [0, 1])[:-1], (4, 1.0))


def beside_the_encoder(model: Any) -> dict[str, tuple[int, float]]:
    head = "classifier.dense" if model.config.model_type == "roberta" else "pooler.dense"
    return dict.fromkeys([*named(model, ["query"], [0, 1]), head], (4, 1.0))


@pytest.mark.parametrize("places", [odd_ranks, odd_scalings, one_left_out, beside_the_encoder])
@pytest.mark.parametrize("kind", KINDS)
def test_saving_lora_that_a_config_cannot_describe_is_refused_until_it_is_merged(kind, places, tmp_path):
    model = with_lora(kind, places(plain(kind)), lora_relative_query=True)
    with pytest.raises(UserError, match="save_adapter"):
        model.save_pretrained(tmp_path)
    assert not [*tmp_path.iterdir()]
    want = logits(model)
    merge_lora_(model)
    model.save_pretrained(tmp_path)
    assert_close(logits(type(model).from_pretrained(tmp_path)), want)


@pytest.mark.parametrize("kind", KINDS)
def test_dropouts_that_differ_are_refused_too(kind, tmp_path):
    model = with_lora(kind)
    next(iter(layers(model).values())).lora_dropout = 0.5
    with pytest.raises(UserError, match="dropout"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_model_and_one_whose_lora_was_taken_out_are_loaded_with_the_same_logits(kind, tmp_path):
    model = with_lora(kind, lora_relative_query=True)
    want = logits(model)
    merge_lora_(model)
    model.save_pretrained(tmp_path / "merged")
    assert_close(logits(type(model).from_pretrained(tmp_path / "merged")), want)
    model = plain(kind, apply_lora=True, lora_r=4, lora_alpha=6)
    set_lora_(model, {})
    assert not layers(again(model, tmp_path / "without"))


@pytest.mark.parametrize("adapter_type", ["houlsby", "pfeiffer"])
@pytest.mark.parametrize("kind", KINDS)
def test_bottlenecks_added_to_a_model_are_loaded_as_they_were_saved(kind, adapter_type, tmp_path):
    model = plain(kind)
    set_bottlenecks_(model, adapter_type, 3)
    randomise_(model)
    loaded = again(model, tmp_path)
    assert sum(isinstance(module, Bottleneck) for module in loaded.modules()) == (4 if adapter_type == "houlsby" else 2)


# What finds no place.


def saved_with(kind: str, method: str, folder: Path) -> Any:
    """A saved model with LoRA or bottlenecks of which its config.json says nothing."""
    model = with_lora(kind) if method == "lora" else plain(kind)
    if method != "lora":
        set_bottlenecks_(model, "houlsby", 3)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    for name in [name for name in config if name.startswith(("apply_", "lora_", "adapter_"))]:
        del config[name]
    (folder / "config.json").write_text(json.dumps(config))
    return model


@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("method", ["lora", "houlsby"])
@pytest.mark.parametrize("kind", KINDS)
def test_matrices_that_find_no_place_in_the_model_are_refused_by_name(kind, method, form, tmp_path):
    model = saved_with(kind, method, tmp_path)
    if form != "model.safetensors":
        torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / form)
        (tmp_path / "model.safetensors").unlink()
    for model_class in (type(model), type(model.base_model)):
        with pytest.raises(UserError, match=f"{tmp_path}: .*{'lora_A' if method == 'lora' else 'adapter_A'}.*left out"):
            model_class.from_pretrained(tmp_path)


GONE = {
    "every B": "_B",
    "every A": "_A",
    "one B": r"layer\.1\.output.*_B|layer\.1.*query.*_B",
    "one A": r"layer\.1\.output.*_A|layer\.1.*query.*_A",
    "all of one layer": r"layer\.1\.",
}


@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("gone", GONE)
@pytest.mark.parametrize(("kind", "method"), [("roberta", "lora"), ("deberta-v2", "lora"), ("roberta", "houlsby")])
def test_half_an_update_is_refused(kind, method, gone, form, tmp_path):
    """The error names the first missing tensor: one kind of matrix, or all matrices of some layers, are gone."""
    model = with_lora(kind) if method == "lora" else plain(kind)
    if method != "lora":
        set_bottlenecks_(model, method, 3)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    lost = [name for name in state if re.search(r"\.(lora|adapter)_", name) and re.search(GONE[gone], name)]
    remaining = {name: tensor for name, tensor in state.items() if name not in lost}
    if form == "pytorch_model.bin":
        torch.save(remaining, tmp_path / form)
    else:
        save_file(remaining, tmp_path / form, {"format": "pt"})
    for model_class in (type(model), type(model.base_model)):
        with pytest.raises(UserError, match=f"{tmp_path}: is damaged.* it lacks {len(lost)}, .*") as raised:
            model_class.from_pretrained(tmp_path)
        first = re.search("lacks .*, (.*) first", str(raised.value))
        assert first and any(name.endswith(first[1]) for name in lost)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_which_some_layers_are_merged_is_not_saved(kind, tmp_path):
    model = with_lora(kind)
    name, layer = next(iter(layers(model).items()))
    layer.merge()
    with pytest.raises(UserError, match=f"^{name} is merged and other layers are not"):
        model.save_pretrained(tmp_path)


def test_a_model_without_its_head_is_loaded_with_its_lora(tmp_path):
    model = with_lora("roberta")
    model.save_pretrained(tmp_path)
    encoder = RobertaModel.from_pretrained(tmp_path).eval()
    batch = ragged_batch([17, 3, 30, 9])
    assert_close(encoder(**batch).last_hidden_state, model.roberta.eval()(**batch).last_hidden_state, 1e-6)


def test_a_base_model_with_an_adapter_of_its_own_is_refused_by_convert(tmp_path, capsys):
    base = with_lora("roberta")
    base.save_pretrained(tmp_path / "base")
    mark_trainable(base)
    save_adapter(base, tmp_path / "adapter", {"task": "custom", "base_model": str(tmp_path / "base")})
    assert main(["convert", str(tmp_path / "adapter"), str(tmp_path / "merged"), "--to", "merged"]) == 1
    assert "left out" in capsys.readouterr().err and not (tmp_path / "merged").exists()
