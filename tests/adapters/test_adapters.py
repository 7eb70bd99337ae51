"""Adapters on disk: PEFT folders and published files, what is refused and what stays as it was."""

import copy
import dataclasses
import json
import os
import re
import warnings
from pathlib import Path

import huggingface_hub
import hypothesis
import pytest
import torch
import transformers
from helpers import (
    CLASSIFIERS,
    GOLDENS,
    assert_close,
    ragged_batch,
    randomise_,
    settings_of,
    tiny_config,
    tiny_deberta_config,
)
from hypothesis import given
from hypothesis import strategies as st
from peft import EvaConfig, LoraConfig, PeftModel, TaskType, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora import config as lora_config
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_nlu.adapters import writing
from lora_nlu.adapters.__main__ import main
from lora_nlu.adapters.adapter import Adapter, check_settings, is_target, with_relative_query
from lora_nlu.adapters.attaching import attach_adapter, load_adapter
from lora_nlu.adapters.peft_format import SUPPORTED_SETTINGS, adapted_modules
from lora_nlu.adapters.reading import read_adapter
from lora_nlu.adapters.writing import save_adapter
from lora_nlu.errors import UserError
from lora_nlu.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, RUN_METADATA
from lora_nlu.methods.lora import LoRALinear
from lora_nlu.methods.marking import mark_only_lora_as_trainable, mark_trainable
from lora_nlu.methods.table import METHODS
from lora_nlu.methods.targets import TARGETS
from lora_nlu.models.modeling_deberta_v2 import DebertaV2ForSequenceClassification, DebertaV2Model
from lora_nlu.models.modeling_roberta import RobertaForSequenceClassification, RobertaModel

R, ALPHA = 4, 6
LABELS = ["yes", "no", "perhaps"]
METADATA_OF_RUN = {"task": "custom", "labels": LABELS, "base_model": "tiny", "seed": 3}
HEAD = ["classifier.dense.weight", "classifier.dense.bias", "classifier.out_proj.weight", "classifier.out_proj.bias"]


def lora_model(seed: int = 0, **settings) -> RobertaForSequenceClassification:
    """Our classifier with LoRA, every parameter random, adapters and head ready to train."""
    config = tiny_config(**{"apply_lora": True, "lora_r": R, "lora_alpha": ALPHA, **settings})
    model = randomise_(RobertaForSequenceClassification(config), seed)
    mark_only_lora_as_trainable(model)
    return model.eval()


def lora_deberta(seed: int = 0, **settings) -> DebertaV2ForSequenceClassification:
    """The same for DeBERTa."""
    config = tiny_deberta_config(**{"apply_lora": True, "lora_r": R, "lora_alpha": ALPHA, **settings})
    model = randomise_(DebertaV2ForSequenceClassification(config), seed)
    mark_only_lora_as_trainable(model)
    return model.eval()


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(**ragged_batch([17, 3, 30, 9])).logits


def published(path: Path, state: dict[str, Tensor], prefix: str = "") -> Path:
    """One flat state dict by torch.save, as the reference implementation's adapters come."""
    torch.save({prefix + name: tensor for name, tensor in state.items()}, path)
    return path


def copied(folder: Path, to: Path, **settings) -> None:
    """Copy an adapter folder, with other settings in its config."""
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    (to / ADAPTER_CONFIG).write_text(json.dumps(json.loads((folder / ADAPTER_CONFIG).read_text()) | settings))


def refused(path: object, model: nn.Module | None = None, training: bool = False) -> str:
    """The message with which a file is refused; fails unless the model is left alone and the message is short."""
    model = lora_model(seed=1) if model is None else model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError) as error:
        load_adapter(model, read_adapter(str(path)), allow_new_head=training)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items()), "a refusal changed the model"
    message = str(error.value)
    assert message.count("\n") < 3 and str(path) in message
    return message


# -------------------------------------------------------------------------------------------------------- written


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[RobertaForSequenceClassification, Path]:
    """A trained model and the folder it was saved in."""
    model, folder = lora_model(), tmp_path_factory.mktemp("saved") / "adapter"
    save_adapter(model, folder, METADATA_OF_RUN)
    return model, folder


def test_peft_loads_a_written_folder_as_it_is_and_gives_the_same_logits(saved):
    model, folder = saved
    base = transformers.RobertaForSequenceClassification(tiny_config())
    encoder = {k: t for k, t in model.state_dict().items() if "lora_" not in k and not k.startswith("classifier")}
    assert set(base.load_state_dict(encoder, strict=False).missing_keys) == set(HEAD)
    without = logits(base)
    loaded = logits(PeftModel.from_pretrained(base, str(folder)))
    assert_close(loaded, logits(model))
    assert (loaded - without).abs().max() > 0.1, "the adapter changes nothing: the comparison proves nothing"


def test_a_written_folder_has_the_keys_shapes_and_settings_peft_itself_writes(saved, tmp_path):
    _, folder = saved
    settings = LoraConfig(task_type=TaskType.SEQ_CLS, r=R, lora_alpha=ALPHA, target_modules=["query", "value"])
    get_peft_model(transformers.RobertaForSequenceClassification(tiny_config()), settings).save_pretrained(tmp_path)
    ours, theirs = load_file(folder / ADAPTER_WEIGHTS), load_file(tmp_path / ADAPTER_WEIGHTS)
    assert {k: (t.shape, t.dtype) for k, t in ours.items()} == {k: (t.shape, t.dtype) for k, t in theirs.items()}
    ours_config, theirs_config = (json.loads((f / ADAPTER_CONFIG).read_text()) for f in (folder, tmp_path))
    assert ours_config.keys() <= theirs_config.keys()
    for key in ("peft_type", "task_type", "r", "lora_alpha", "bias", "fan_in_fan_out", "lora_dropout"):
        assert ours_config[key] == theirs_config[key], key
    assert sorted(ours_config["target_modules"]) == sorted(theirs_config["target_modules"])
    metadata = json.loads((folder / RUN_METADATA).read_text())
    assert metadata.items() >= METADATA_OF_RUN.items() and metadata["peft_type"] == "LORA"
    assert metadata.keys() - METADATA_OF_RUN.keys() == {"peft_type", "weights_fingerprint"}
    assert sorted(path.name for path in folder.iterdir()) == sorted([ADAPTER_CONFIG, RUN_METADATA, ADAPTER_WEIGHTS])


def test_a_folder_written_by_peft_loads_with_the_same_logits(tmp_path):
    settings = LoraConfig(task_type=TaskType.SEQ_CLS, r=R, lora_alpha=ALPHA, target_modules=["query", "value"])
    theirs = randomise_(get_peft_model(transformers.RobertaForSequenceClassification(tiny_config()), settings))
    theirs.save_pretrained(tmp_path)
    model = lora_model(seed=1)
    base = {
        name.replace(".base_layer", ""): t
        for name, t in theirs.get_base_model().state_dict().items()
        if "lora" not in name
    }
    model.load_state_dict({k: t for k, t in base.items() if k.startswith("roberta.")}, strict=False)
    assert load_adapter(model, read_adapter(str(tmp_path)), allow_new_head=False) == []
    assert_close(logits(model), logits(theirs))


def test_what_was_written_is_read_back_bit_for_bit(saved):
    model, folder = saved
    other = lora_model(seed=7)
    adapter = read_adapter(str(folder))
    assert adapter.labels == tuple(LABELS) and adapter.lora_alpha == ALPHA
    assert load_adapter(other, adapter, allow_new_head=False) == []
    want, got = trained(model), trained(other)
    assert want.keys() == got.keys() and all(torch.equal(want[name], got[name]) for name in want)
    frozen = [name for name in dict(other.named_parameters()) if name not in got]
    untouched = dict(lora_model(seed=7).named_parameters())
    assert all(torch.equal(dict(other.named_parameters())[name], untouched[name]) for name in frozen)


def test_a_save_that_fails_at_any_step_leaves_every_file_of_the_earlier_one_unchanged(tmp_path, monkeypatch):
    folder, first, second = tmp_path / "adapter", lora_model(), lora_model(seed=5)
    save_adapter(first, folder, METADATA_OF_RUN)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    def half_write(path, data):
        with open(path, "wb") as file:
            file.write(data[: len(data) // 2])
        fail()

    for where, what, stand_in in (
        (os, "replace", fail),
        (os, "fsync", fail),
        (Path, "write_bytes", half_write),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(where, what, stand_in)
            with pytest.raises(OSError, match="No space left"):
                save_adapter(second, folder, METADATA_OF_RUN | {"seed": 4})
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before, what
    save_adapter(second, folder, METADATA_OF_RUN)
    assert (folder / ADAPTER_WEIGHTS).read_bytes() != before[ADAPTER_WEIGHTS]


# --------------------------------------------------------------------------------------------------- published files


def test_the_published_layout_of_roberta_base_loads_by_exactly_its_52_keys(tmp_path):
    """The keys and shapes of the published RoBERTa-base MNLI file, with a hidden size of 32 for 768."""
    d, r, state = 32, 8, {}
    for i in range(12):
        for projection in ("query", "value"):
            name = f"roberta.encoder.layer.{i}.attention.self.{projection}"
            state[f"{name}.lora_A"], state[f"{name}.lora_B"] = torch.randn(r, d), torch.randn(d, r)
    state["classifier.dense.weight"], state["classifier.dense.bias"] = torch.randn(d, d), torch.randn(d)
    state["classifier.out_proj.weight"], state["classifier.out_proj.bias"] = torch.randn(3, d), torch.randn(3)
    assert len(state) == 52
    for prefix in ("", "module."):
        model = lora_model(num_hidden_layers=12, lora_r=8, lora_alpha=16)
        adapter = read_adapter(str(published(tmp_path / f"{prefix}mnli.bin", state, prefix)))
        assert adapter.labels is None and adapter.lora_alpha is None
        assert load_adapter(model, adapter, allow_new_head=False) == []
        got = trained(model)
        assert got.keys() == state.keys() and all(torch.equal(got[name], state[name]) for name in state), prefix


@pytest.mark.parametrize("kind, new_model", [("roberta", lora_model), ("deberta", lora_deberta)])
@pytest.mark.parametrize("labels", [3, 2, 1])
def test_training_from_another_tasks_file_keeps_or_drops_the_head_as_the_reference_does(
    labels, kind, new_model, tmp_path
):
    case = json.loads((GOLDENS / "head_loading.json").read_text())["loading"][f"{kind}_3_to_{labels}"]
    state = trained(new_model())
    head = sorted(name for name in state if "lora_" not in name)
    assert head == sorted(case["checkpoint_keys_not_lora"])
    model = new_model(seed=1, num_labels=labels)
    fresh = trained(model)
    path = published(tmp_path / "mnli.bin", state)
    notes = load_adapter(model, read_adapter(str(path)), allow_new_head=True)
    assert ["its classifier is for other labels" in note for note in notes] == [True] * bool(case["head_dropped"])
    got = trained(model)
    for name in got:
        kept = fresh[name] if name in case["head_dropped"] else state[name]
        assert torch.equal(got[name], kept), name
    assert sorted([*case["head_loaded"], *case["head_dropped"]]) == head


def test_the_published_layout_of_deberta_xxlarge_loads_by_exactly_its_196_keys(tmp_path):
    """The keys and shapes of the published files, with a hidden size of 32 for 1536."""
    d, r, state = 32, 16, {}
    for i in range(48):
        for projection in ("query_proj", "value_proj"):
            name = f"deberta.encoder.layer.{i}.attention.self.{projection}"
            state[f"{name}.lora_A"], state[f"{name}.lora_B"] = torch.randn(r, d), torch.randn(d, r)
    state["pooler.dense.weight"], state["pooler.dense.bias"] = torch.randn(d, d), torch.randn(d)
    state["classifier.weight"], state["classifier.bias"] = torch.randn(3, d), torch.randn(3)
    assert len(state) == 196
    model = lora_deberta(num_hidden_layers=48, lora_r=r, lora_alpha=32)
    load_adapter(model, read_adapter(str(published(tmp_path / "mnli.bin", state))), allow_new_head=False)
    got = trained(model)
    assert got.keys() == state.keys() and all(torch.equal(got[name], state[name]) for name in state)


# ------------------------------------------------------------------------- DeBERTa: LoRA on the relative query or not


def peft_deberta(seed: int = 0) -> PeftModel:
    """transformers' DeBERTa under PEFT, every parameter random; PEFT leaves the pooler out unless it is named."""
    targets, heads = ["query_proj", "value_proj"], ["classifier", "pooler"]
    settings = LoraConfig(
        task_type=TaskType.SEQ_CLS, r=R, lora_alpha=ALPHA, target_modules=targets, modules_to_save=heads
    )
    base = transformers.DebertaV2ForSequenceClassification(tiny_deberta_config())
    return randomise_(get_peft_model(base, settings), seed).eval()


def test_a_deberta_adapter_trained_as_the_reference_does_is_one_that_peft_refuses_and_we_read_back(tmp_path):
    model = lora_deberta()
    save_adapter(model, tmp_path, METADATA_OF_RUN)
    base = transformers.DebertaV2ForSequenceClassification(tiny_deberta_config())
    with pytest.raises((KeyError, ValueError), match="LORA_FROZEN_RELATIVE_QUERY"):
        PeftModel.from_pretrained(base, str(tmp_path))
    other = lora_deberta(seed=7)
    load_adapter(other, read_adapter(str(tmp_path)), allow_new_head=False)
    want, got = trained(model), trained(other)
    assert want.keys() == got.keys() and all(torch.equal(want[name], got[name]) for name in want)


def test_a_deberta_adapter_with_lora_on_the_relative_query_loads_in_peft_with_the_same_logits(tmp_path):
    model = lora_deberta(lora_relative_query=True)
    save_adapter(model, tmp_path, METADATA_OF_RUN)
    base = transformers.DebertaV2ForSequenceClassification(tiny_deberta_config())
    encoder = {name: t for name, t in model.state_dict().items() if name.startswith("deberta.") and "lora_" not in name}
    base.load_state_dict(encoder, strict=False)
    assert_close(logits(PeftModel.from_pretrained(base, str(tmp_path))), logits(model))


def test_a_deberta_adapter_written_by_peft_loads_with_the_same_logits_and_only_in_its_own_reading(tmp_path):
    theirs = peft_deberta()
    theirs.save_pretrained(tmp_path)
    base = {name.replace(".base_layer", ""): t for name, t in theirs.get_base_model().state_dict().items()}
    encoder = {name: t for name, t in base.items() if name.startswith("deberta.") and "lora_" not in name}
    model = lora_deberta(seed=1, lora_relative_query=True)
    model.load_state_dict(encoder, strict=False)
    load_adapter(model, read_adapter(str(tmp_path)), allow_new_head=False)
    assert_close(logits(model), logits(theirs))
    message = refused(tmp_path, lora_deberta(seed=1))
    assert "was trained with LoRA on the relative" in message and "Give --lora_relative_query" in message


def test_a_published_deberta_file_is_not_read_with_lora_on_the_relative_query(tmp_path):
    file = published(tmp_path / "mnli.bin", trained(lora_deberta()))
    folder = tmp_path / "folder"
    save_adapter(lora_deberta(), folder, METADATA_OF_RUN)
    for path in (file, folder):
        assert "Leave out --lora_relative_query" in refused(path, lora_deberta(seed=1, lora_relative_query=True))
        assert "Leave out" in refused(path, lora_deberta(seed=1, lora_relative_query=True), training=True)
    assert "doesn't record whether LoRA was on the relative" in refused(file, lora_deberta(lora_relative_query=True))
    taken = with_relative_query(read_adapter(str(file)), True)
    load_adapter(lora_deberta(seed=1, lora_relative_query=True), taken, allow_new_head=False)
    assert not taken.frozen_relative_query
    for same in (read_adapter(str(folder)), read_adapter(str(published(tmp_path / "r.bin", trained(lora_model()))))):
        assert with_relative_query(same, True) is same  # it records its own, or has none


@pytest.mark.parametrize(
    "settings", [{"share_att_key": False}, {"pos_att_type": ["c2p"]}, {"relative_attention": False}]
)
def test_where_no_relative_query_goes_through_lora_the_two_readings_are_one(settings, tmp_path):
    save_adapter(lora_deberta(**settings), tmp_path, METADATA_OF_RUN)
    assert json.loads((tmp_path / ADAPTER_CONFIG).read_text())["peft_type"] == "LORA"
    want = None
    for reading in (False, True):
        model = lora_deberta(seed=1, lora_relative_query=reading, **settings)
        load_adapter(model, read_adapter(str(tmp_path)), allow_new_head=False)
        want = logits(model) if want is None else want
        assert torch.equal(logits(model), want)


# ------------------------------------------------------------------------------------------ everything PEFT can say

PEFT_SETTINGS = {
    "one layer in each": {"target_modules": ["{value}"]},
    "keys too": {"target_modules": ["{query}", "{key}", "{value}"]},
    "dense": {"target_modules": ["dense"]},
    "all-linear": {"target_modules": "all-linear"},
    "a pattern": {"target_modules": r".*layer\.0\.attention\.self\.({query}|{key})"},
    "one layer of the model": {"target_modules": ["{query}"], "layers_to_transform": [1], "layers_pattern": "layer"},
    "the first layer": {"target_modules": ["{query}", "{value}"], "layers_to_transform": 0},
    "layers and all but one": {
        "target_modules": ["{query}", "output.dense"],
        "layers_to_transform": [0, 1],
        "exclude_modules": ["0.attention.output.dense", "1.attention.self.{query}"],
    },
    "all but one": {"target_modules": ["{query}", "{value}"], "exclude_modules": r".*layer\.1.*{value}"},
    "rslora": {"target_modules": ["{query}", "{value}"], "use_rslora": True, "r": 3},
    "ranks and alphas by pattern": {
        "target_modules": ["{query}", "{value}", "dense"],
        "rank_pattern": {"layer.0.attention.self.{query}": 2, "{value}": 6},
        "alpha_pattern": {r"layer\.1.*{value}": 5, "output.dense": 1},
        "use_rslora": True,
    },
    "biases": {"target_modules": ["{query}", "{value}"], "bias": "all"},
    "biases of its layers": {"target_modules": ["{query}", "{key}"], "bias": "lora_only"},
    "embeddings saved completely": {"target_modules": ["{query}"], "modules_to_save": ["word_embeddings"]},
    "orthogonal start": {"target_modules": ["{query}"], "init_lora_weights": "orthogonal"},
    "start at the minor components": {"target_modules": ["{query}", "{key}"], "init_lora_weights": "mica"},
    "gaussian start, dropout": {"target_modules": ["{query}"], "init_lora_weights": "gaussian", "lora_dropout": 0.1},
}
KINDS = {
    "roberta": (tiny_config, {"query": "query", "key": "key", "value": "value"}, ["classifier"]),
    "deberta": (tiny_deberta_config, {p: f"{p}_proj" for p in ("query", "key", "value")}, ["classifier", "pooler"]),
}


BARE = {
    "roberta": (RobertaModel, transformers.RobertaModel),
    "deberta": (DebertaV2Model, transformers.DebertaV2Model),
}
BATCH = ragged_batch([17, 3, 30, 9])


def named(value, names: dict[str, str]):
    """`value` with {query}, {key}, {value} in its strings replaced by the model's names."""
    if isinstance(value, str):
        for name, theirs in names.items():
            value = value.replace("{" + name + "}", theirs)
        return value
    if isinstance(value, dict):
        return {named(key, names): named(v, names) for key, v in value.items()}
    return [named(v, names) for v in value] if isinstance(value, list) else value


@torch.no_grad()
def train_at_random_(model: nn.Module) -> None:
    """Give every parameter that trains other values; the rest stays."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("settings", PEFT_SETTINGS.values(), ids=PEFT_SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_whatever_peft_trained_gives_the_same_logits_here_and_saved_again_in_peft(kind, settings, tmp_path):
    new_config, names, heads = KINDS[kind]
    ours_class, theirs_class = CLASSIFIERS[new_config().model_type]
    settings = {"r": R, "lora_alpha": ALPHA} | named(settings, names)
    settings["modules_to_save"] = heads + settings.get("modules_to_save", [])
    base = randomise_(theirs_class(new_config()), seed=2)
    torch.save(base.state_dict(), tmp_path / "base.bin")
    theirs = get_peft_model(base, LoraConfig(task_type=TaskType.SEQ_CLS, **settings))
    train_at_random_(theirs)
    theirs.eval().save_pretrained(tmp_path / "peft")

    def fresh(model_class) -> nn.Module:
        model = model_class(new_config())
        model.load_state_dict(torch.load(tmp_path / "base.bin", weights_only=True))
        return model

    model = fresh(ours_class)
    attach_adapter(model, read_adapter(str(tmp_path / "peft")), None, allow_new_head=False)
    want = logits(theirs)
    assert_close(logits(model), want)
    assert (logits(fresh(ours_class)) - want).abs().max() > 0.1, "the adapter changes nothing"

    save_adapter(model, tmp_path / "ours", METADATA_OF_RUN)
    again = fresh(ours_class)
    attach_adapter(again, read_adapter(str(tmp_path / "ours")), None, allow_new_head=False)
    assert torch.equal(logits(again), logits(model))
    assert_close(logits(PeftModel.from_pretrained(fresh(theirs_class), str(tmp_path / "ours"))), want)


@pytest.mark.parametrize("settings", ["all-linear", "ranks and alphas by pattern", "biases"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_trained_on_a_bare_encoder_gives_the_same_features_here_and_saved_again_in_peft(
    kind, settings, tmp_path
):
    new_config, names, _ = KINDS[kind]
    ours_class, theirs_class = BARE[kind]
    settings = {"r": R, "lora_alpha": ALPHA} | named(PEFT_SETTINGS[settings], names)
    base = randomise_(theirs_class(new_config()), seed=2)
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    theirs = get_peft_model(base, LoraConfig(task_type=TaskType.FEATURE_EXTRACTION, **settings))
    train_at_random_(theirs)
    theirs.save_pretrained(tmp_path / "theirs")

    def features(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model.eval()(**BATCH).last_hidden_state[BATCH["attention_mask"] == 1]

    ours = ours_class(new_config())
    ours.load_state_dict(weights)
    without = features(ours)
    loaded = PeftModel.from_pretrained(copy.deepcopy(ours), tmp_path / "theirs")
    attach_adapter(ours, read_adapter(str(tmp_path / "theirs")), None, allow_new_head=False)
    want = features(theirs)
    assert (want - without).abs().max() > 0.01
    assert_close(features(ours), want)
    assert_close(features(loaded), want)
    assert {n for n, p in ours.named_parameters() if p.requires_grad and ".lora_" not in n} == {
        n.replace("base_model.model.", "").replace(".base_layer", "").replace(".modules_to_save.default", "")
        for n, p in theirs.named_parameters()
        if p.requires_grad and ".lora_" not in n
    }
    save_adapter(ours, str(tmp_path / "ours"), {})
    again = theirs_class(new_config())
    again.load_state_dict(weights)
    assert json.loads((tmp_path / "ours" / ADAPTER_CONFIG).read_text())["task_type"] == "FEATURE_EXTRACTION"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT only warns of keys that it doesn't find
        again = PeftModel.from_pretrained(again, tmp_path / "ours")
    assert_close(features(again), want)
    fresh = ours_class(new_config())
    fresh.load_state_dict(weights)
    attach_adapter(fresh, read_adapter(str(tmp_path / "ours")), None, allow_new_head=False)
    assert torch.equal(features(fresh), features(ours))


@pytest.mark.parametrize(
    "method", [row for row in METHODS.values() if row.state and row.freezes], ids=lambda row: row.name
)
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_a_bare_encoder_and_one_of_a_classifier_are_distinguished_by_their_keys(
    kind, method, tmp_path, capsys
):
    new_config, bare_class = KINDS[kind][0], BARE[kind][0]
    classifier_class = CLASSIFIERS[new_config().model_type][0]
    folders = {}
    for model_class in (bare_class, classifier_class):
        model = randomise_(model_class(new_config(**settings_of(method))))
        mark_trainable(model)
        folders[model_class] = tmp_path / model_class.__name__
        save_adapter(model, folders[model_class], {})
    of_bare, of_classifier = (read_adapter(str(folder)) for folder in folders.values())
    encoder = bare_class(new_config())
    attach_adapter(encoder, of_bare, None, allow_new_head=False)
    assert of_bare.is_bare and not of_classifier.is_bare and not any("classifier" in name for name in of_bare.state)
    assert all(torch.equal(encoder.get_parameter(name), tensor) for name, tensor in of_bare.state.items())
    prefix = f"{kind}."
    with pytest.raises(
        UserError, match=rf"keys lack '{prefix}'.*\n.*{bare_class.__name__}.*{classifier_class.__name__}"
    ):
        attach_adapter(classifier_class(new_config()), of_bare, None, allow_new_head=True)
    with pytest.raises(UserError, match=rf"trained on a model with a classifier \(its keys start with '{prefix}'"):
        attach_adapter(bare_class(new_config()), of_classifier, None, allow_new_head=False)
    assert main(["inspect", str(folders[bare_class])]) == 0
    assert "an encoder alone" in capsys.readouterr().out
    assert main(["convert", str(folders[bare_class]), str(tmp_path / "out"), "--to", "peft"]) == 1
    assert "trained on an encoder alone" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_bin_of_a_bare_deberta_is_read_as_one_of_a_classifier_is(tmp_path):
    model = randomise_(DebertaV2Model(tiny_deberta_config(apply_lora=True, lora_r=R, lora_alpha=ALPHA)))
    mark_trainable(model)
    adapter = read_adapter(str(published(tmp_path / "encoder.bin", trained(model))))
    assert adapter.frozen_relative_query and not adapter.records_relative_query
    encoder = DebertaV2Model(tiny_deberta_config())
    encoder.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if "lora_" not in name})
    attach_adapter(encoder, adapter, ALPHA, allow_new_head=False)
    with torch.no_grad():
        got, want = (m.eval()(**BATCH).last_hidden_state for m in (encoder, model))
    assert torch.equal(got, want)


@pytest.mark.parametrize(("kind", "adjusted"), [("roberta", False), ("deberta", True)])
def test_an_eva_folder_of_pefts_own_gives_the_same_logits(kind, adjusted, tmp_path):
    new_config, names, heads = KINDS[kind]
    ours, theirs = (model_class(new_config()) for model_class in CLASSIFIERS[new_config().model_type])
    ours.load_state_dict(randomise_(theirs, seed=2).state_dict())
    settings = {
        "target_modules": [names["query"], names["value"], "output.dense"],
        "modules_to_save": heads,
        "init_lora_weights": "eva",
        "eva_config": EvaConfig(rho=2.0, tau=0.5, adjust_scaling_factors=adjusted),
    }
    model = get_peft_model(theirs, LoraConfig(task_type=TaskType.SEQ_CLS, r=R, lora_alpha=ALPHA, **settings))
    rows = None if kind == "roberta" else lambda read, batch, name: read[0].flatten(0, -2)  # the relative query too
    more = {"prepare_layer_inputs_fn": rows} if rows else {}
    batches = [ragged_batch([17, 3, 30, 9], seed=seed) for seed in range(5)]
    initialize_lora_eva_weights(model, batches, show_progress_bar=False, **more)
    train_at_random_(model)
    model.eval().save_pretrained(tmp_path)
    config = json.loads((tmp_path / ADAPTER_CONFIG).read_text())
    assert config["eva_config"]["rho"] == 2.0 and config["rank_pattern"], "no EVA that moved ranks"
    attach_adapter(ours, read_adapter(str(tmp_path)), None, allow_new_head=False)
    assert_close(logits(ours), logits(model))


def variant(**settings) -> dict:
    """Settings of a PEFT adapter of a tiny RoBERTa."""
    return {"r": R, "lora_alpha": ALPHA, "target_modules": ["query", "value"]} | settings


VARIANTS = {
    "use_dora": variant(use_dora=True),
    "lora_bias": variant(lora_bias=True),
    "init_lora_weights": variant(init_lora_weights="pissa"),
    "init_lora_weights=olora": variant(init_lora_weights="olora"),
    "kasa_config": variant(kasa_config=lora_config.KasaConfig()),
    "use_bdlora": variant(
        use_bdlora=lora_config.BdLoraConfig(target_modules_bd_a=["query"], target_modules_bd_b=["value"], nblocks=2)
    ),
    "monteclora_config": variant(monteclora_config=lora_config.MontecloraConfig()),
    "trainable_token_indices": variant(trainable_token_indices=[1, 2]),
    "target_parameters": variant(target_parameters=["attention.self.key.weight"]),
    "lora_embedding_A": variant(target_modules=["word_embeddings", "query"]),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_what_peft_trained_otherwise_than_these_models_can_compute_is_refused_by_its_name(name, tmp_path):
    model = transformers.RobertaForSequenceClassification(tiny_config())
    get_peft_model(model, LoraConfig(task_type=TaskType.SEQ_CLS, **VARIANTS[name])).save_pretrained(tmp_path)
    assert name in refused(tmp_path)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(LoraConfig)])
def test_every_field_of_pefts_config_is_honoured_or_changes_nothing_or_is_refused(field, saved, tmp_path):
    """A field that a later PEFT adds stands on no side, and is refused until somebody has looked at it."""
    if field in SUPPORTED_SETTINGS:
        return
    copied(saved[1], tmp_path, **{field: {"on": True}})
    assert f"{field}={{'on': True}} is not supported" in refused(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["query"]},
        {"target_modules": ["query", "value"], "layers_to_transform": [1]},
        {"target_modules": ["query", "value"], "layers_to_transform": [0, 1], "layers_pattern": ["block"]},
        {"target_modules": ["query", "value"], "exclude_modules": r".*\.1\..*\.value"},
        {"target_modules": r".*layer\.1.*(query|value)"},
    ],
    ids=str,
)
def test_matrices_where_the_config_has_no_lora_are_refused_for_peft_would_leave_them_out(settings, saved, tmp_path):
    copied(saved[1], tmp_path, **settings)
    message = refused(tmp_path)
    assert "has no LoRA there" in message and "roberta.encoder.layer." in message


@pytest.mark.parametrize("settings", [{"layers_to_transform": [0, 1]}, {"exclude_modules": ["key"]}], ids=str)
def test_missing_matrices_are_named_however_the_config_names_its_layers(settings, saved, tmp_path):
    copied(saved[1], tmp_path, **settings)
    (tmp_path / RUN_METADATA).unlink()
    tensors = load_file(tmp_path / ADAPTER_WEIGHTS)
    gone = [name for name in tensors if "layer.1.attention.self.query" in name]
    save_file(
        {name: t for name, t in tensors.items() if name not in gone}, tmp_path / ADAPTER_WEIGHTS, {"format": "pt"}
    )
    with pytest.raises(UserError, match="lacks roberta.encoder.layer.1.attention.self.query.lora_A"):
        attach_adapter(RobertaForSequenceClassification(tiny_config()), read_adapter(str(tmp_path)), None, False)


@pytest.mark.parametrize(
    "gone", ["_B", "_A", r"layer\.1.*(value|output).*_B", r"layer\.1.*(value|output).*_A", r"layer\.1\."]
)
@pytest.mark.parametrize("form", ["PEFT's folder", "all-linear", "our folder", "a .bin", "houlsby", "pfeiffer"])
def test_an_adapter_that_lacks_some_of_its_matrices_is_refused_by_the_name_of_what_is_gone(form, gone, tmp_path):
    method: dict = {"apply_lora": True, "lora_r": R, "lora_alpha": ALPHA}
    if form == "all-linear":
        method["lora_target_modules"] = TARGETS
    if form in ("houlsby", "pfeiffer"):
        method = {"apply_adapter": True, "adapter_type": form, "adapter_size": 3}
    model = randomise_(RobertaForSequenceClassification(tiny_config(**method)))
    mark_trainable(model)
    save_adapter(model, tmp_path, METADATA_OF_RUN)
    tensors = load_file(tmp_path / ADAPTER_WEIGHTS)
    lost = [name for name in tensors if re.search(r"\.(lora|adapter)_", name) and re.search(gone, name)]
    kept = {name: tensor for name, tensor in tensors.items() if name not in lost}
    assert lost and len(kept) > 4
    save_file(kept, tmp_path / ADAPTER_WEIGHTS, {"format": "pt"})
    path, alpha = tmp_path, None
    if form != "our folder":
        (tmp_path / RUN_METADATA).unlink()
    if form == "all-linear":
        copied(tmp_path, tmp_path, target_modules="all-linear")
    if form == "a .bin":
        state = {
            re.sub(r"(lora_[AB])\.weight", r"\1", name.removeprefix("base_model.model.")): kept[name] for name in kept
        }
        path, alpha = published(tmp_path / "adapter.bin", state), ALPHA
    with pytest.raises(UserError, match=f"{path}: .*lacks .*|{path}: the weights are not those") as error:
        attach_adapter(RobertaForSequenceClassification(tiny_config()), read_adapter(str(path)), alpha, True)
    first_missing = re.search(r"lacks ([\w.]+)", str(error.value))
    assert form == "our folder" or (first_missing and any(first_missing[1].rstrip(".") in name for name in lost))


# ------------------------------------------------------------------------------- files that don't belong together


@pytest.fixture
def recorded(tmp_path) -> Path:
    """A folder whose metadata says by what the update was scaled, as that of a run does."""
    save_adapter(lora_model(), tmp_path / "run", METADATA_OF_RUN | {"lora": {"scalings": [ALPHA / R]}})
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("settings", "scaled"),
    [
        ({"lora_alpha": 24}, "by 6,"),
        ({"use_rslora": True}, "by 3,"),
        ({"alpha_pattern": {"value": 12}}, "by 1.5, 3,"),
        ({"alpha_pattern": {r".*layer\.1\..*": 2}}, "by 0.5, 1.5,"),
    ],
    ids=str,
)
def test_a_scaling_edited_after_the_training_is_refused_with_both_numbers(settings, scaled, recorded):
    assert read_adapter(str(recorded)).scalings() == [1.5]
    copied(recorded, recorded, **settings)
    message = refused(recorded)
    assert f"scales the update {scaled}" in message and "trained with 1.5:" in message and "lora_alpha" in message
    (recorded / RUN_METADATA).write_text(json.dumps(METADATA_OF_RUN))  # an older run does not record it
    read_adapter(str(recorded))


@pytest.mark.parametrize("kind", ["LORA", "LORA_FROZEN_RELATIVE_QUERY"])
def test_a_deberta_folder_made_to_be_read_the_other_way_is_refused(kind, tmp_path):
    model = lora_deberta(lora_relative_query=kind == "LORA")
    save_adapter(model, tmp_path, METADATA_OF_RUN)
    assert json.loads((tmp_path / RUN_METADATA).read_text())["peft_type"] == kind
    other = {"LORA": "LORA_FROZEN_RELATIVE_QUERY"}.get(kind, "LORA")
    copied(tmp_path, tmp_path, peft_type=other)
    assert f"says {other}, {RUN_METADATA} {kind}: the files don't belong together" in refused(tmp_path, model)


@pytest.mark.parametrize("name", [ADAPTER_WEIGHTS, RUN_METADATA])
def test_weights_of_another_run_beside_a_runs_metadata_are_refused(name, recorded, tmp_path):
    save_adapter(lora_model(seed=1), tmp_path / "other", METADATA_OF_RUN)
    (recorded / name).write_bytes((tmp_path / "other" / name).read_bytes())
    message = refused(recorded)
    assert "the weights are not those" in message and "belong together" in message


def test_one_bit_of_a_weight_that_changed_on_the_disk_is_found(recorded):
    content = bytearray((recorded / ADAPTER_WEIGHTS).read_bytes())
    content[-9] ^= 1
    (recorded / ADAPTER_WEIGHTS).write_bytes(content)
    assert "damaged" in refused(recorded)


def test_a_save_that_was_killed_between_two_files_is_mended_by_saving_again(recorded, monkeypatch):
    real = writing.write_json

    def killed(path, content):
        raise KeyboardInterrupt

    monkeypatch.setattr(writing, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        save_adapter(lora_model(seed=1), recorded, METADATA_OF_RUN)
    assert "save it again" in refused(recorded)
    monkeypatch.setattr(writing, "write_json", real)
    save_adapter(lora_model(seed=1), recorded, METADATA_OF_RUN)
    read_adapter(str(recorded))


def test_the_same_weights_in_another_file_belong_to_their_metadata_and_older_metadata_to_any(recorded):
    tensors = load_file(recorded / ADAPTER_WEIGHTS)
    save_file(dict(reversed(tensors.items())), recorded / ADAPTER_WEIGHTS, {"format": "pt", "by": "another"})
    assert read_adapter(str(recorded)).ranks
    (recorded / ADAPTER_WEIGHTS).unlink()
    torch.save(tensors, recorded / "adapter_model.bin")
    assert read_adapter(str(recorded)).ranks
    (recorded / RUN_METADATA).write_text(json.dumps(METADATA_OF_RUN))
    torch.save({name: 2 * tensor for name, tensor in tensors.items()}, recorded / "adapter_model.bin")
    assert read_adapter(str(recorded)).ranks


NAMES = ["query", "value", "dense", "output.dense", "attention.self.query", "0.attention.output.dense", "layer", "1"]
chosen = st.lists(st.sampled_from(NAMES), min_size=1, max_size=3)
patterns = st.sampled_from([r".*layer\.1\..*", ".*(query|value)", r"roberta\.encoder\.layer\.0\..*dense", "query"])


ENCODER_LINEAR = [
    name
    for name, module in RobertaForSequenceClassification(tiny_config()).named_modules()
    if isinstance(module, nn.Linear) and name.startswith("roberta.")
]


@hypothesis.settings(max_examples=300, deadline=None)
@given(
    targets=chosen | patterns,
    excluded=st.none() | st.just([]) | chosen | patterns,
    layers=st.none() | st.just([]) | st.integers(0, 2) | st.lists(st.integers(0, 2), max_size=2),
    stack=st.none() | st.sampled_from(["layer", "block", ["layer"], ["block", "layer"], [], "encoder.layer", "lay.*"]),
)
def test_the_layers_that_a_config_means_are_those_that_peft_would_change(targets, excluded, layers, stack):
    if isinstance(targets, str):  # PEFT refuses a pattern with these
        layers = stack = None
    stack = None if layers is None else stack
    settings = {"target_modules": targets, "exclude_modules": excluded, "layers_to_transform": layers}
    config = LoraConfig(**settings, layers_pattern=stack)
    adapter = Adapter(Path(), {}, targets=adapted_modules(settings | {"layers_pattern": stack}))
    for name, module in RobertaForSequenceClassification(tiny_config()).named_modules():
        if isinstance(module, nn.Linear) and name.startswith("roberta."):
            theirs = check_target_module_exists(config, name)
            assert is_target(adapter, name) == (bool(theirs) and type(theirs).__name__ != "_ExcludedModule"), name


@pytest.mark.parametrize("alpha", [0, -6, float("nan"), float("inf"), 1e300])
def test_an_alpha_that_is_no_scaling_is_refused(alpha, tmp_path):
    adapter = read_adapter(str(published(tmp_path / "mnli.bin", trained(lora_model()))))
    with pytest.raises(UserError, match="expected a positive number"):
        attach_adapter(RobertaForSequenceClassification(tiny_config()), adapter, alpha, allow_new_head=False)


def test_an_alpha_that_contradicts_the_folders_is_refused_from_python_too(saved):
    with pytest.raises(UserError, match="was trained with lora_alpha 6, not 7"):
        attach_adapter(RobertaForSequenceClassification(tiny_config()), read_adapter(str(saved[1])), 7, False)


def test_two_tensors_for_one_place_are_refused(saved, tmp_path):
    state = trained(lora_model())
    twice = published(tmp_path / "twice.bin", state | {f"module.{HEAD[0]}": state[HEAD[0]] + 1})
    assert "tensors twice" in refused(twice)
    copied(saved[1], tmp_path)
    tensors = load_file(tmp_path / ADAPTER_WEIGHTS)
    key = "base_model.model.classifier.modules_to_save.out_proj.bias"
    again = tensors["base_model.model.classifier.out_proj.bias"]
    save_file(tensors | {key: again.clone()}, tmp_path / ADAPTER_WEIGHTS, {"format": "pt"})
    assert read_adapter(str(tmp_path)).state.keys() == state.keys()  # PEFT does so with bias="all"
    save_file(tensors | {key: again + 1}, tmp_path / ADAPTER_WEIGHTS, {"format": "pt"})
    assert "two different tensors for classifier.out_proj.bias" in refused(tmp_path)


def test_a_base_that_is_only_named_is_compared_by_its_name_and_a_difference_is_reported(saved, tmp_path):
    def notes(named: str | None, given: str) -> list[str]:
        copied(saved[1], tmp_path, base_model_name_or_path=named)
        (tmp_path / RUN_METADATA).unlink()
        model = RobertaForSequenceClassification(tiny_config())
        model.config.name_or_path = given
        return attach_adapter(model, read_adapter(str(tmp_path)), None, allow_new_head=False)

    (note,) = notes("roberta-base", "someone/roberta-for-tweets")
    assert "names the base model roberta-base, but" in note and "someone/roberta-for-tweets" in note
    assert notes("roberta-base", "roberta-base") == notes(None, "roberta-base") == notes("roberta-base", "") == []
    assert notes("a/b", "./a/b") == notes(f"{tmp_path}/x/../base", str(tmp_path / "base")) == []
    assert notes("someone/roberta-base", "/models/roberta-base/") == [] != notes("a/base-v1", "a/base-v2")


@pytest.mark.parametrize("kind", ["TOKEN_CLS", "QUESTION_ANS", None])
def test_a_head_of_another_kind_of_model_is_refused(kind, tmp_path):
    """A token classifier's head has the names and shapes of a DeBERTa's sequence classifier."""
    model = transformers.DebertaV2ForTokenClassification(tiny_deberta_config())
    settings = variant(target_modules=["query_proj"], modules_to_save=["classifier"])
    get_peft_model(model, LoraConfig(task_type=kind, **settings)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"was trained for .*{kind or 'ForTokenClassification'}"):
        read_adapter(str(tmp_path))


# ------------------------------------------------------------- DeBERTa's head as PEFT saves it by default: no pooler


@pytest.fixture
def without_pooler(tmp_path) -> tuple[PeftModel, Path, Path]:
    """PEFT's model with its default modules to save, the folder of the classifier it started from, and its own."""
    base = randomise_(transformers.DebertaV2ForSequenceClassification(tiny_deberta_config()), seed=2)
    base.save_pretrained(tmp_path / "base")
    base.deberta.save_pretrained(tmp_path / "encoder")
    settings = variant(target_modules=["query_proj", "value_proj"])
    theirs = get_peft_model(base, LoraConfig(task_type=TaskType.SEQ_CLS, **settings))
    train_at_random_(theirs)
    theirs.eval().save_pretrained(tmp_path / "peft")
    names = {name.removeprefix("base_model.model.") for name in load_file(tmp_path / "peft" / ADAPTER_WEIGHTS)}
    assert {name for name in names if "deberta" not in name} == {"classifier.weight", "classifier.bias"}
    return theirs, tmp_path / "base", tmp_path / "peft"


def on(folder: Path, **settings) -> DebertaV2ForSequenceClassification:
    """Our classifier with the weights of a checkpoint folder."""
    config = transformers.AutoConfig.from_pretrained(folder, **{"num_labels": 3, **settings})
    return DebertaV2ForSequenceClassification.from_pretrained(folder, config=config, ignore_mismatched_sizes=True)


@pytest.mark.parametrize("training", [False, True])
def test_a_classifier_without_its_pooler_reads_the_base_checkpoints(training, without_pooler, tmp_path):
    theirs, base, folder = without_pooler
    model = on(base)
    notes = attach_adapter(model, read_adapter(str(folder)), None, allow_new_head=training)
    assert_close(logits(model), logits(theirs))
    assert [note for note in notes if "contains no pooler; its classifier uses the base checkpoint's" in note] == notes
    save_adapter(model, tmp_path / "again", METADATA_OF_RUN)
    other = on(tmp_path / "encoder")  # saved again it has its pooler
    attach_adapter(other, read_adapter(str(tmp_path / "again")), None, allow_new_head=False)
    assert torch.equal(logits(other), logits(model))


def test_a_classifier_whose_pooler_is_lost_is_refused_with_the_reason_and_the_remedy(without_pooler, tmp_path):
    _, _, folder = without_pooler
    for base in (on(tmp_path / "encoder"), DebertaV2ForSequenceClassification(tiny_deberta_config())):
        with pytest.raises(UserError) as error:
            attach_adapter(base, read_adapter(str(folder)), None, allow_new_head=False)
        message = str(error.value)
        assert str(folder) in message and "drew at random and did not save" in message
        assert 'modules_to_save=["classifier", "pooler"]' in message and message.count("\n") < 3


def test_training_starts_from_a_classifier_whose_pooler_is_lost_with_a_new_head(without_pooler, tmp_path):
    _, _, folder = without_pooler
    model = on(tmp_path / "encoder")
    fresh = {name: p.detach().clone() for name, p in model.named_parameters()}
    adapter = read_adapter(str(folder))
    (note,) = attach_adapter(model, adapter, None, allow_new_head=True)
    assert "a new head is initialised" in note
    now = dict(model.named_parameters())
    heads = [name for name in fresh if not name.startswith("deberta.")]
    assert len(heads) == 4 and all(torch.equal(now[name], fresh[name]) and now[name].requires_grad for name in heads)
    matrices = [name for name in adapter.state if "lora_" in name]
    assert len(matrices) == 8 and all(torch.equal(now[name], adapter.state[name]) for name in matrices)


def test_training_for_other_labels_keeps_the_base_checkpoints_pooler(without_pooler):
    _, base, folder = without_pooler
    model = on(base, num_labels=2)
    pooler = model.pooler.dense.weight.detach().clone()
    notes = attach_adapter(model, read_adapter(str(folder)), None, allow_new_head=True)
    assert torch.equal(model.pooler.dense.weight, pooler) and model.classifier.weight.shape[0] == 2
    assert any("classifier is for other labels" in note for note in notes)


def test_half_a_pooler_and_a_published_file_without_one_are_refused_as_ever(without_pooler, tmp_path):
    _, base, folder = without_pooler
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    half = {"base_model.model.pooler.dense.weight": torch.zeros(32, 32)}
    save_file(tensors | half, folder / ADAPTER_WEIGHTS, {"format": "pt"})
    with pytest.raises(UserError, match="lacks pooler.dense.bias"):
        attach_adapter(on(base), read_adapter(str(folder)), None, allow_new_head=False)
    state = {name: t for name, t in trained(lora_deberta()).items() if "pooler" not in name}
    with pytest.raises(UserError, match="lacks pooler.dense.weight"):
        adapter = read_adapter(str(published(tmp_path / "mnli.bin", state)))
        attach_adapter(on(base), adapter, ALPHA, allow_new_head=False)


def test_a_peft_folder_with_the_old_bin_file_loads_like_the_safetensors_one(tmp_path):
    theirs = peft_deberta()
    theirs.save_pretrained(tmp_path)
    safe = read_adapter(str(tmp_path))
    torch.save(load_file(tmp_path / ADAPTER_WEIGHTS), tmp_path / "adapter_model.bin")
    (tmp_path / ADAPTER_WEIGHTS).unlink()
    old = read_adapter(str(tmp_path))
    assert old.state.keys() == safe.state.keys()
    assert all(torch.equal(old.state[name], safe.state[name]) for name in safe.state)


def test_an_adapter_on_the_hub_is_read_by_its_id(tmp_path, monkeypatch):
    """The Hub's own cache layout, as an earlier download leaves it."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--an-adapter"
    save_adapter(lora_model(), repository / "snapshots" / commit, METADATA_OF_RUN)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    adapter = read_adapter("someone/an-adapter", cache_dir=str(tmp_path))
    model = lora_model(seed=1)
    assert load_adapter(model, adapter, allow_new_head=False) == []
    assert torch.equal(logits(model)[0], logits(lora_model())[0]) is False  # other base weights, same adapter
    assert all(torch.equal(adapter.state[name], tensor) for name, tensor in trained(lora_model()).items())
    with pytest.raises(UserError, match="someone/else"):
        read_adapter("someone/else", cache_dir=str(tmp_path))


def test_an_adapter_that_lacks_layers_its_config_names_is_refused(tmp_path):
    peft_deberta().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / ADAPTER_WEIGHTS)
    gone = [name for name in tensors if "layer.1" in name and "value_proj" in name]
    save_file(
        {name: t for name, t in tensors.items() if name not in gone}, tmp_path / ADAPTER_WEIGHTS, {"format": "pt"}
    )
    model = DebertaV2ForSequenceClassification(tiny_deberta_config())
    with pytest.raises(UserError, match=r"lacks deberta.encoder.layer.1.attention.self.value_proj.lora_A"):
        attach_adapter(model, read_adapter(str(tmp_path)), None, allow_new_head=False)


def test_a_file_that_does_not_record_its_alpha_needs_one_and_one_that_does_refuses_another(tmp_path):
    path = published(tmp_path / "mnli.bin", trained(lora_model()))
    adapter = read_adapter(str(path))
    model = RobertaForSequenceClassification(tiny_config())
    with pytest.raises(
        UserError, match=r"doesn't record the lora_alpha[^\n]*\nGive --lora_alpha: 16 for the published"
    ):
        attach_adapter(model, adapter, None, allow_new_head=False)
    attach_adapter(model, adapter, ALPHA, allow_new_head=False)
    assert {layer.scaling for layer in model.modules() if isinstance(layer, LoRALinear)} == {ALPHA / R}
    save_adapter(lora_model(), tmp_path / "folder", METADATA_OF_RUN)
    check_settings(read_adapter(str(tmp_path / "folder")), {"lora_r": R, "lora_alpha": ALPHA})
    for settings, remedy in (({"lora_alpha": 12}, "--lora_alpha 6"), ({"lora_r": 2}, "--lora_r 4")):
        with pytest.raises(UserError, match=remedy):
            check_settings(read_adapter(str(tmp_path / "folder")), settings)


# ----------------------------------------------------------------------------------------------------------- refused


def test_a_missing_path_or_a_folder_without_an_adapter_is_refused(tmp_path):
    assert "no such file or folder" in refused(tmp_path / "nowhere.bin")
    assert ADAPTER_CONFIG in refused(tmp_path)


class Payload:
    """Runs a shell command when unpickled."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_a_pickle_that_would_run_code_is_refused_and_never_runs(tmp_path):
    marker, command = tmp_path / "marker", f"touch {tmp_path / 'marker'}"
    torch.save({"roberta.x.lora_A": Payload(command)}, tmp_path / "bad.bin")
    torch.save({"roberta.x.lora_A": Payload(command)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    for name in ("bad.bin", "old.bin"):
        assert "refused" in refused(tmp_path / name)
        assert not marker.exists()
    torch.load(tmp_path / "bad.bin", weights_only=False)
    assert marker.exists(), "the payload is no payload: the test proves nothing"


def test_a_file_that_contains_no_state_dict_is_refused(tmp_path):
    torch.save([torch.zeros(2)], tmp_path / "list.bin")
    torch.save({"epoch": 3, "model": {"a.lora_A": torch.zeros(2)}}, tmp_path / "nested.bin")
    torch.save({1: torch.zeros(2)}, tmp_path / "numbers.bin")
    for name in ("list.bin", "nested.bin", "numbers.bin"):
        assert "no state dict" in refused(tmp_path / name)
    published(tmp_path / "head.bin", {"classifier.dense.weight": torch.zeros(2, 2)})
    assert "no LoRA matrices" in refused(tmp_path / "head.bin")


TEXTS = {
    "a Git LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3550413\n",
        "git lfs pull",
    ),
    "a web page": (b"\n<!DOCTYPE html>\n<html><head><title>Hub \xe2\x80\x93 a page", "Download the file itself"),
    "JSON": (b'{"error":"Access to model x/y is restricted"}', "Access to model x/y is restricted"),
    "text": (b"404: Not Found", "404: Not Found"),
    "it is empty": (b"", "Download it again"),
}


@pytest.mark.parametrize("name", [ADAPTER_WEIGHTS, "adapter_model.bin", "published.bin"])
@pytest.mark.parametrize("kind", TEXTS)
def test_text_in_the_place_of_weights_is_refused_by_what_it_is_with_the_remedy(kind, name, saved, tmp_path):
    _, folder = saved
    for path in (folder / ADAPTER_CONFIG, folder / RUN_METADATA):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    content, remedy = TEXTS[kind]
    (tmp_path / name).write_bytes(content)
    message = refused(tmp_path / name if name == "published.bin" else tmp_path)
    assert f"{tmp_path / name}: " in message and kind in message and remedy in message, message


def test_control_characters_in_what_stands_for_weights_never_reach_the_terminal(tmp_path):
    (tmp_path / "page.bin").write_bytes(b"<html>\r\n\t" + "\N{ZERO WIDTH SPACE}x".encode() * 1000)
    (tmp_path / "long.bin").write_bytes(b"a line\n" * 100_000)
    for name in ("page.bin", "long.bin"):
        message = refused(tmp_path / name)
        assert len(message) < 400 and all(character.isprintable() or character == "\n" for character in message)


SPOILT = {
    "NaN": lambda tensor: tensor * float("nan"),
    "infinity": lambda tensor: tensor.masked_fill(torch.arange(tensor.numel()).view_as(tensor) == 1, float("-inf")),
    "more than fp32 holds": lambda tensor: tensor.double() * 1e300,
    "int8": lambda tensor: tensor.to(torch.int8),
    "complex": lambda tensor: tensor.to(torch.complex64),
    "not an ordinary tensor": lambda tensor: tensor.to_sparse(),
    "not an ordinary tensor, without values": lambda tensor: tensor.to("meta"),
    "contains fewer numbers": lambda tensor: tensor[:1, :1].expand(4, 2**44),
}


@pytest.mark.parametrize("what", SPOILT)
@pytest.mark.parametrize("where", ["lora_A", "out_proj.weight"])
@pytest.mark.parametrize("training", [False, True])
def test_an_adapter_whose_numbers_are_not_finite_is_never_put_into_a_model(what, where, training, tmp_path):
    state = trained(lora_model())
    name = [name for name in state if name.endswith(where)][-1]
    path = published(tmp_path / "spoilt.bin", state | {name: SPOILT[what](state[name])})
    message = refused(path, training=training)
    assert name in message, message
    messages = {
        "NaN": "1 of its 12 tensors are not finite",
        "int8": "contains torch.int8",
        "complex": "contains torch.complex64",
    }
    assert (messages.get(what) or ("not finite" if "fin" in what or "fp32" in what else what.split(",")[0])) in message
    model = RobertaForSequenceClassification(tiny_config())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(UserError, match=name):
        attach_adapter(model, read_adapter(str(path)), ALPHA, allow_new_head=training)
    after = dict(model.named_parameters())
    assert all(torch.equal(tensor, after[n]) for n, tensor in before.items())


def test_a_complete_checkpoint_whose_base_weights_are_not_finite_is_refused(tmp_path):
    model = lora_model()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    name = "roberta.encoder.layer.1.attention.self.query.weight"
    state[name][3, 3] = float("nan")
    path = published(tmp_path / "complete.bin", state)
    base = RobertaForSequenceClassification(tiny_config())
    base.load_state_dict({n: t for n, t in model.state_dict().items() if "lora_" not in n})
    with pytest.raises(UserError, match=f"{name} first"):
        attach_adapter(base, read_adapter(str(path)), ALPHA, allow_new_head=False)


def test_a_file_cut_short_anywhere_is_refused(saved, tmp_path):
    model, folder = saved
    content = published(tmp_path / "complete.bin", trained(model)).read_bytes()
    for part in (0.0, 0.01, 0.5, 0.95, 0.999):
        cut = tmp_path / "cut.bin"
        cut.write_bytes(content[: int(part * len(content))])
        assert refused(cut), part
    weights = (folder / ADAPTER_WEIGHTS).read_bytes()
    for name in (ADAPTER_CONFIG, RUN_METADATA):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    for part in (0.0, 0.01, 0.5, 0.999):
        (tmp_path / ADAPTER_WEIGHTS).write_bytes(weights[: int(part * len(weights))])
        with pytest.raises(UserError, match="damaged or cut short"):
            read_adapter(str(tmp_path))
    (tmp_path / ADAPTER_WEIGHTS).write_bytes(weights)
    assert read_adapter(str(tmp_path)).state.keys() == trained(model).keys()


@pytest.mark.parametrize("name", [ADAPTER_CONFIG, RUN_METADATA])
def test_a_folder_whose_json_is_cut_is_refused_by_the_files_name(name, saved, tmp_path):
    _, folder = saved
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).write_text((folder / name).read_text()[:20])
    with pytest.raises(UserError, match=name):
        read_adapter(str(tmp_path))


@pytest.mark.parametrize(
    "setting",
    [
        {"peft_type": "IA3"},
        {"use_dora": True},
        {"fan_in_fan_out": True},
        {"lora_bias": True},
        {"init_lora_weights": "pissa_niter_4"},
        {"layer_replication": [[0, 2]]},
        {"trainable_token_indices": [1]},
        {"some_new_method": {"on": True}},
        {"r": None},
        {"r": 0},
        {"lora_alpha": None},
        {"lora_alpha": "6"},
        {"rank_pattern": ["query"]},
        {"alpha_pattern": {"que(ry": 2}},
    ],
    ids=str,
)
def test_a_peft_adapter_of_a_kind_we_would_compute_wrongly_is_refused(setting, saved, tmp_path):
    _, folder = saved
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(json.loads((folder / ADAPTER_CONFIG).read_text()) | setting))
    assert next(iter(setting)) in refused(tmp_path)


def test_a_folder_whose_ranks_are_not_those_of_its_tensors_is_refused(saved, tmp_path):
    _, folder = saved
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / ADAPTER_CONFIG).write_text(
        json.dumps(json.loads((folder / ADAPTER_CONFIG).read_text()) | {"rank_pattern": {"query": 2}})
    )
    message = refused(tmp_path)
    assert "self.query.lora_A has rank 4" in message and "says 2" in message


def test_another_rank_is_refused_with_key_shapes_and_the_flag_that_puts_it_right(tmp_path):
    path = published(tmp_path / "rank.bin", trained(lora_model(lora_r=2)))
    message = refused(path)
    assert "roberta.encoder.layer.0.attention.self.query.lora_A" in message
    assert "[2, 32]" in message and "[4, 32]" in message and "--lora_r 2" in message
    assert "--lora_r 2" in refused(path, training=True)


def test_another_alpha_than_the_folder_records_is_refused_with_the_flag_that_puts_it_right(saved):
    _, folder = saved
    assert f"--lora_alpha {ALPHA}" in refused(folder, lora_model(lora_alpha=12))


def test_another_hidden_size_layer_count_or_architecture_is_refused(tmp_path):
    state = trained(lora_model())
    wide = published(tmp_path / "wide.bin", trained(lora_model(hidden_size=64)))
    for training in (False, True):
        message = refused(wide, training=training)
        assert "[4, 64]" in message and "[4, 32]" in message and "another base model" in message
    for depth in (1, 3):
        path = published(tmp_path / f"{depth}.bin", trained(lora_model(num_hidden_layers=depth)))
        assert f"{depth} in the file, 2 in the roberta model" in refused(path)
        assert f"{depth} in the file" in refused(path, training=True)
    renamed = {
        name.replace("roberta.", "deberta.").replace("query", "query_proj").replace("value", "value_proj"): t
        for name, t in state.items()
        if "lora_" in name
    } | {"pooler.dense.weight": torch.zeros(32, 32), "classifier.weight": torch.zeros(3, 32)}
    message = refused(published(tmp_path / "deberta.bin", renamed))
    assert "deberta.encoder.layer.0.attention.self.query_proj.lora_A" in message and "roberta model" in message
    refused(tmp_path / "deberta.bin", training=True)


def test_a_file_with_one_matrix_too_few_or_one_tensor_too_many_is_refused(tmp_path):
    state = trained(lora_model())
    gone = "roberta.encoder.layer.1.attention.self.value.lora_B"
    less = published(tmp_path / "less.bin", {name: t for name, t in state.items() if name != gone})
    more = published(tmp_path / "more.bin", state | {"roberta.encoder.layer.0.output.adapter_A": torch.zeros(2)})
    for training in (False, True):
        assert gone in refused(less, training=training)
        assert "adapter_A" in refused(more, training=training)


def test_evaluation_refuses_a_missing_head_and_a_head_for_another_number_of_labels(tmp_path):
    state = trained(lora_model())
    headless = published(tmp_path / "headless.bin", {name: t for name, t in state.items() if "lora_" in name})
    message = refused(headless)
    assert "lacks" in message and "classifier.dense.weight" in message and "--do_train" in message
    assert load_adapter(lora_model(), read_adapter(str(headless)), allow_new_head=True) == []
    three = published(tmp_path / "three.bin", state)
    for labels in (2, 1):
        message = refused(three, lora_model(num_labels=labels))
        assert f"3 labels, this task {labels}" in message
    half = {name: t for name, t in state.items() if name != "classifier.dense.bias"}
    assert "classifier.dense.bias" in refused(published(tmp_path / "half.bin", half))
    assert "classifier.dense.bias" in refused(tmp_path / "half.bin", training=True)


@pytest.mark.parametrize("layers", [[1], None])
@pytest.mark.parametrize("kind", ["roberta", "deberta-v2"])
def test_an_adapter_for_each_example_of_a_batch_is_refused(kind, layers):  # PEFT's adapter_names
    config = tiny_config() if kind == "roberta" else tiny_deberta_config()
    settings = {"target_modules": ["query" if kind == "roberta" else "query_proj"], "layers_to_transform": layers}
    model = get_peft_model(CLASSIFIERS[kind][0](config), LoraConfig(init_lora_weights=False, **settings))
    model.add_adapter("other", LoraConfig(init_lora_weights=False, **settings))
    batch = ragged_batch([9, 7, 3], pad=config.pad_token_id)
    with pytest.raises(ValueError, match="adapter_names"):
        model.eval()(**batch, adapter_names=["default", "other", "__base__"])
