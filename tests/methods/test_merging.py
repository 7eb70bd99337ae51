"""A merged model, and whatever is done to its weights and matrices: no update counts twice or is forgotten."""

import copy
import io
from typing import Any

import pytest
import torch
from accelerate import disk_offload
from helpers import CLASSIFIERS, assert_close, ragged_batch, randomise_, tiny_config, tiny_deberta_config
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import prune

from lora_nlu.adapters.attaching import attach_adapter, load_adapter
from lora_nlu.adapters.converting import merged_state
from lora_nlu.adapters.reading import read_adapter
from lora_nlu.adapters.writing import save_adapter
from lora_nlu.errors import UserError
from lora_nlu.methods.linear import merge_lora_, unmerge_lora_
from lora_nlu.methods.lora import LoRALinear, set_lora_
from lora_nlu.methods.marking import mark_only_lora_as_trainable
from lora_nlu.models.loading import base_fingerprint

KINDS = ["roberta", "deberta", "deberta with LoRA on the relative query"]
LORA = {"apply_lora": True, "lora_r": 4, "lora_alpha": 6}


def model_of(kind: str, seed: int = 0, **settings: Any) -> Any:
    """Our classifier with LoRA, every parameter random."""
    settings = {**LORA, **settings}
    if kind.startswith("deberta"):
        settings["lora_relative_query"] = "relative query" in kind
    config = tiny_config(**settings) if kind == "roberta" else tiny_deberta_config(**settings)
    model = randomise_(CLASSIFIERS[config.model_type][0](config), seed)
    mark_only_lora_as_trainable(model)
    return model.eval()


def with_matrices(model: Any, seed: int) -> Any:
    """The same model with other LoRA matrices and another head."""
    other = copy.deepcopy(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    source = dict(randomise_(copy.deepcopy(model), seed).named_parameters())
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if name in trained:
                parameter.copy_(source[name])
    return other


def merged(model: Any) -> Any:
    model = copy.deepcopy(model)
    merge_lora_(model)
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(**ragged_batch([17, 3, 30, 9], pad=model.config.pad_token_id)).logits


def layers(model: nn.Module) -> list[LoRALinear]:
    return [module for module in model.modules() if isinstance(module, LoRALinear)]


def weights(model: nn.Module) -> list[Tensor]:
    return [layer.weight.detach().clone() for layer in layers(model)]


def assert_same_base(model: Any, want: Any) -> None:
    """Unmerged, the layers' weights are those of `want`."""
    unmerge_lora_(model)
    assert len(layers(model)) == len(layers(want)) >= 2
    for got, weight in zip(weights(model), weights(want), strict=True):
        assert_close(got, weight, 1e-6)


def assert_is(model: Any, want: Any) -> None:
    """The logits of `want`, as it is, merged and unmerged again; and the weights."""
    assert_close(logits(model), logits(want))
    merge_lora_(model)
    assert_close(logits(model), logits(want))
    assert_same_base(model, want)
    assert_close(logits(model), logits(want))


@pytest.fixture(params=KINDS)
def model(request) -> Any:
    return model_of(request.param)


@pytest.fixture
def other(model) -> Any:
    """Another adapter of the same base."""
    other = with_matrices(model, seed=7)
    assert (logits(other) - logits(model)).abs().max() > 0.05
    return other


# Swapping what a merged model was merged with.


@pytest.mark.parametrize("what", ["everything", "all but the weights", "matrices alone", "lora_A alone"])
def test_a_state_dict_loaded_into_a_merged_model_replaces_what_was_merged(model, other, what):
    state = other.state_dict()
    if what == "lora_A alone":
        state = {name: tensor for name, tensor in state.items() if name.endswith("lora_A")}
        other = with_matrices(model, seed=0)
        other.load_state_dict(state, strict=False)
    elif what != "everything":
        weight_names = {f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, LoRALinear)}
        state = {name: x for name, x in state.items() if name not in weight_names}
        if what == "matrices alone":
            other = copy.deepcopy(model)
            state = {name: x for name, x in state.items() if "lora_" in name}
            other.load_state_dict(state, strict=False)
    swapped = merged(model)
    swapped.load_state_dict(state, strict=what == "everything")
    assert_is(swapped, other)


@pytest.mark.parametrize("with_head", [True, False])
def test_an_adapter_loaded_into_a_merged_model_replaces_what_was_merged(model, other, with_head, tmp_path):
    save_adapter(other, tmp_path, {"task": "custom", "base_fingerprint": base_fingerprint(model)})
    swapped = merged(model)
    if with_head:
        load_adapter(swapped, read_adapter(str(tmp_path)), allow_new_head=False)
    else:
        attach_adapter(swapped, read_adapter(str(tmp_path)), None, allow_new_head=False)
    assert_is(swapped, other)


def test_an_adapter_refused_by_a_merged_model_leaves_its_logits(model, tmp_path):
    save_adapter(model_of("roberta", lora_r=2), tmp_path, {"task": "custom"})
    loaded, want = merged(model), logits(model)
    with pytest.raises(UserError, match=str(tmp_path)):
        load_adapter(loaded, read_adapter(str(tmp_path)), allow_new_head=False)
    assert all(layer.merged for layer in layers(loaded))
    assert_close(logits(loaded), want)


@pytest.mark.parametrize("rank", [4, 2])
def test_layers_made_anew_in_a_merged_model_have_the_base_weights(model, rank):
    want = copy.deepcopy(model)
    names = {name: (rank, 0.5) for name, layer in model.named_modules() if isinstance(layer, LoRALinear)}
    merge_lora_(model)
    set_lora_(model, names)
    assert_same_base(model, want)
    merge_lora_(model)
    set_lora_(model, {})
    assert not layers(model)
    for name, layer in want.named_modules():
        if isinstance(layer, LoRALinear):
            assert_close(model.get_submodule(name).weight, layer.weight, 1e-6)


def test_another_methods_adapter_attached_to_a_merged_model_finds_the_base_weights(tmp_path):
    plain = model_of("roberta")
    base = base_fingerprint(plain)
    config = tiny_config(apply_adapter=True, adapter_type="pfeiffer", adapter_size=3)
    houlsby = randomise_(CLASSIFIERS["roberta"][0](config), 3)
    mark_only_lora_as_trainable(houlsby)
    for name, parameter in houlsby.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or ".adapter_" in name)
    save_adapter(houlsby, tmp_path, {"task": "custom", "base_fingerprint": base})
    attach_adapter(merged(plain), read_adapter(str(tmp_path)), None, allow_new_head=False)


# Saving a merged model.


def test_an_adapter_saved_from_a_merged_model_is_the_unmerged_models(model, tmp_path):
    want = logits(model)
    save_adapter(model, tmp_path / "before", {"task": "custom"})
    merge_lora_(model)
    save_adapter(model, tmp_path / "merged", {"task": "custom"})
    assert_close(logits(model), want)
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("before", "merged"))
    assert before.keys() == after.keys() and sum("lora_" in name for name in before) == 8
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    other = with_matrices(model_of("roberta") if model.config.model_type == "roberta" else model, seed=7)
    attach_adapter(other, read_adapter(str(tmp_path / "merged")), None, allow_new_head=False)
    assert_close(logits(other), want)


def test_weights_that_train_are_saved_from_a_merged_model_without_the_update(model, tmp_path):
    for layer in layers(model):
        layer.weight.requires_grad_(True)
    before = copy.deepcopy(model)
    merge_lora_(model)
    save_adapter(model, tmp_path, {"task": "custom"})
    saved = read_adapter(str(tmp_path)).state
    for name, layer in before.named_modules():
        if isinstance(layer, LoRALinear):
            assert torch.equal(saved[f"{name}.weight"], layer.weight)


def test_the_merged_state_of_a_merged_model_counts_the_update_once(model):
    want, settings = merged_state(model)
    merge_lora_(model)
    got, again = merged_state(model)
    assert all(layer.merged for layer in layers(model)), "it stays as it was"
    assert again == settings and got.keys() == want.keys()
    for name, tensor in want.items():
        assert_close(got[name], tensor, 1e-6, what=name)


def test_a_merged_models_base_is_the_unmerged_ones(model):
    want = base_fingerprint(model)
    merge_lora_(model)
    assert base_fingerprint(model) == want
    unmerge_lora_(model)
    assert base_fingerprint(model) == want


# A state dict of a merged model.


def test_a_merged_models_own_state_dict_changes_nothing(model):
    want, base = logits(model), copy.deepcopy(model)
    merge_lora_(model)
    if getattr(model, "frozen_relative_query", False):
        with pytest.raises(RuntimeError, match="can't be saved"):
            model.state_dict()
        return
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for strict in (True, False):
        model.load_state_dict(state, strict=strict)
        assert all(layer.merged for layer in layers(model))
        assert_close(logits(model), want)
    assert_same_base(model, base)


@pytest.mark.parametrize("through", ["memory", "a file of tensors alone"])
def test_a_merged_state_dict_counts_once_in_a_fresh_model_and_is_refused_where_it_would_count_twice(through):
    model = model_of("roberta")
    want, state = logits(model), merged(model).state_dict()
    if through != "memory":
        file = io.BytesIO()
        torch.save({name: tensor.bfloat16() for name, tensor in state.items()}, file)
        file.seek(0)
        state = torch.load(file)
    fresh = model_of("roberta", seed=1)
    for layer in layers(fresh):
        nn.init.zeros_(layer.lora_B)
    fresh.load_state_dict(state, strict=False)
    assert_close(logits(fresh), want, 1e-5 if through == "memory" else 0.05)
    with pytest.raises(RuntimeError, match="count twice"):
        model.load_state_dict(state, strict=False)
    assert_close(logits(model), want, 1e-5 if through == "memory" else 0.05)


def test_base_weights_loaded_into_a_merged_model_are_the_base(model, other):
    base = randomise_(copy.deepcopy(other), seed=11)
    state = {name: tensor for name, tensor in base.state_dict().items() if "lora_" not in name}
    want = copy.deepcopy(model)
    want.load_state_dict(state, strict=False)
    merge_lora_(model)
    model.load_state_dict(state, strict=False)
    assert_is(model, want)


# Matrices and weights changed under a merged layer's feet.


@pytest.mark.parametrize("how", ["in place", "another tensor", "alpha", "functional call"])
@pytest.mark.parametrize("name", ["lora_A", "lora_B"])
def test_matrices_changed_in_a_merged_layer_are_noticed_and_unmerging_takes_out_the_old_ones(name, how):
    layer = layers(model_of("roberta"))[0]
    x, before = torch.randn(3, 32), layer.weight.detach().clone()
    layer.merge()
    new = torch.randn_like(getattr(layer, name))
    if how == "functional call":
        with pytest.raises(RuntimeError, match="unmerge"):
            functional_call(layer, {name: new}, (x,))
        return
    with torch.no_grad():
        if how == "in place":
            getattr(layer, name).copy_(new)
        elif how == "another tensor":
            setattr(layer, name, nn.Parameter(new))
        else:
            layer.lora_alpha = 5.0 * layer.r
    for _ in range(2):
        with torch.no_grad(), pytest.raises(RuntimeError, match="unmerge"):
            layer(x)
    again = copy.deepcopy(layer)
    layer.unmerge()
    assert torch.equal(layer.weight, before)
    with torch.no_grad():
        want = x @ (before + layer.scaling * layer.lora_B @ layer.lora_A).T + layer.bias
        assert_close(layer(x), want)
        again.merge()
        assert_close(again(x), want)
        again.unmerge()
    assert_close(again.weight, before, 1e-6)


def test_a_weight_written_to_while_merged_keeps_what_was_written():
    layer = layers(model_of("roberta"))[0]
    before = layer.weight.detach().clone()
    layer.merge()
    with torch.no_grad():
        layer.weight.add_(1.0)
    assert_close(layer.frozen_weight(), before + 1, 1e-6)
    layer.unmerge()
    assert_close(layer.weight, before + 1, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_merged_model_that_changes_its_dtype_unmerges_to_its_weights_in_that_dtype(model, dtype):
    want = weights(copy.deepcopy(model).to(dtype))
    merge_lora_(model)
    model.to(dtype)
    logits(model)
    unmerge_lora_(model)
    assert all(map(torch.equal, weights(model), want))
    merge_lora_(model)
    merge_lora_(model)
    unmerge_lora_(model)
    assert all(map(torch.equal, weights(model), want))


def test_a_copied_or_pickled_merged_model_is_merged_and_unmerges(model):
    want, file = copy.deepcopy(model), io.BytesIO()
    merge_lora_(model)
    torch.save(model, file)
    file.seek(0)
    for copied in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert all(layer.merged for layer in layers(copied))
        assert base_fingerprint(copied) == base_fingerprint(want)
        assert all(torch.equal(a.frozen_weight(), b.weight) for a, b in zip(layers(copied), layers(want), strict=True))
        assert_is(copied, want)
    assert_is(model, want)


def test_a_thousand_merges_and_unmerges_leave_every_bit():
    layer = layers(model_of("roberta").bfloat16())[0]
    before = layer.weight.detach().clone()
    for _ in range(1000):
        layer.merge()
        layer.unmerge()
    assert torch.equal(layer.weight, before)


def test_without_gradients_or_compiled_a_merged_layer_computes_the_same():
    layer = layers(model_of("roberta"))[0].eval()
    x = torch.randn(3, 32)
    want = layer(x).detach()
    with torch.inference_mode():
        copied = copy.deepcopy(layer)
        copied.merge()
        assert_close(copied(x).clone(), want)
        copied.unmerge()
        assert_close(copied(x).clone(), want)
    layer.merge()
    assert_close(torch.compile(layer, backend="eager", fullgraph=True)(x), want)


# Weights that what is written to doesn't stay in.

REMADE = {
    "weight_norm": nn.utils.weight_norm,
    "parametrized": nn.utils.parametrizations.weight_norm,
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
    "pruned": lambda layer: prune.random_unstructured(layer, "weight", 0.5),
}


@pytest.mark.parametrize("kind", REMADE)
def test_a_weight_made_of_others_or_not_in_memory_is_neither_merged_nor_unmerged(kind):
    for first in ("merge", "unmerge"):
        layer = layers(model_of("roberta"))[0].eval()
        if first == "unmerge":
            layer.merge()
        REMADE[kind](layer)
        x = torch.randn(3, 32)
        before = layer(x)
        with pytest.raises(ValueError, match="made of other parameters"):
            getattr(layer, first)()
        assert_close(layer(x), before)


@pytest.mark.parametrize("merge", [merge_lora_, LoRALinear.merge])
def test_a_weight_that_is_offloaded_is_not_merged(merge, tmp_path):
    model = model_of("roberta").eval()
    want = logits(model)
    disk_offload(model, tmp_path, execution_device="cpu")
    with pytest.raises(ValueError, match="meta device"):
        merge(layers(model)[0])
    assert_close(logits(model), want)


def test_a_merge_in_float64_does_not_round_through_fp32():
    layer = LoRALinear(16, 8, r=2, lora_alpha=4).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64))
    expected = layer.weight + layer.scaling * layer.lora_B @ layer.lora_A
    layer.merge()
    assert (layer.weight - expected).abs().max() < 1e-14
