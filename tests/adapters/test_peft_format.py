"""PEFT's folders both ways: every setting of its config is honoured, or refused by its name."""

import copy
import dataclasses
import json
import re
import warnings
from pathlib import Path

import hypothesis
import pytest
import torch
import transformers
from helpers import (
    CLASSIFIERS,
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
from small_models import (
    ALPHA,
    METADATA_OF_RUN,
    R,
    copied,
    logits,
    lora_deberta,
    lora_model,
    named,
    peft_deberta,
    published,
    refused,
    train_at_random_,
    trained,
    variant,
)
from torch import Tensor, nn

from lora_nlu.adapters.__main__ import main
from lora_nlu.adapters.adapter import Adapter, target_layers, with_relative_query
from lora_nlu.adapters.attaching import attach_adapter, load_adapter
from lora_nlu.adapters.converting import merged_state
from lora_nlu.adapters.peft_format import SUPPORTED_SETTINGS, adapted_modules
from lora_nlu.adapters.reading import read_adapter
from lora_nlu.adapters.writing import save_adapter
from lora_nlu.errors import UserError
from lora_nlu.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, RUN_METADATA
from lora_nlu.methods.marking import mark_trainable
from lora_nlu.methods.table import METHODS
from lora_nlu.methods.targets import TARGETS
from lora_nlu.models.modeling_deberta_v2 import DebertaV2ForSequenceClassification, DebertaV2Model
from lora_nlu.models.modeling_roberta import RobertaForSequenceClassification, RobertaModel

# ------------------------------------------------------------------------- DeBERTa: LoRA on the relative query or not


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


def test_a_deberta_adapter_with_lora_on_the_relative_key_alone_is_recorded_refused_by_peft_and_merged(tmp_path):
    settings = {"lora_target_modules": ["query", "key"]}
    model = lora_deberta(lora_relative_query="key", **settings)
    save_adapter(model, tmp_path, METADATA_OF_RUN)
    config = json.loads((tmp_path / ADAPTER_CONFIG).read_text())
    assert (config["peft_type"], config["lora_relative_query"]) == ("LORA_FROZEN_RELATIVE_QUERY", "key")
    with pytest.raises((KeyError, ValueError), match="LORA_FROZEN_RELATIVE_QUERY"):
        PeftModel.from_pretrained(transformers.DebertaV2ForSequenceClassification(tiny_deberta_config()), str(tmp_path))
    adapter = read_adapter(str(tmp_path))
    assert adapter.relative_query == "key" and adapter.frozen_relative_query
    for other in ("none", "both"):
        message = refused(tmp_path, lora_deberta(seed=1, lora_relative_query=other, **settings))
        assert "LoRA on the relative positions' key alone" in message and "Give --lora_relative_query key." in message
    state, plain = merged_state(model)
    theirs = transformers.DebertaV2ForSequenceClassification(tiny_deberta_config(**plain))
    theirs.load_state_dict(state)
    assert plain == {"share_att_key": False}
    assert_close(logits(theirs), logits(model))
    base = transformers.DebertaV2ForSequenceClassification(tiny_deberta_config())
    base.load_state_dict({name: t for name, t in model.state_dict().items() if "lora_" not in name})
    fresh = DebertaV2ForSequenceClassification(tiny_deberta_config())
    fresh.load_state_dict(base.state_dict())
    attach_adapter(fresh, adapter, None, allow_new_head=False)
    assert fresh.relative_query == "key" and torch.equal(logits(fresh), logits(model))


@pytest.mark.parametrize("way, targets, recorded", [("key", ["query"], "none"), ("key", ["key"], "both")])
def test_a_way_that_is_another_by_its_updates_is_recorded_under_the_simpler_name(way, targets, recorded, tmp_path):
    save_adapter(lora_deberta(lora_relative_query=way, lora_target_modules=targets), tmp_path, METADATA_OF_RUN)
    assert read_adapter(str(tmp_path)).relative_query == recorded


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


VARIANTS = {
    "lora_bias": variant(lora_bias=True),
    "init_lora_weights": variant(init_lora_weights="pissa_niter_4"),
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
    of_a_method = any(field in row.peft_keys for row in METHODS.values())
    expected = (
        f"{field} is {{'on': True}}; expected False, True"
        if of_a_method
        else f"{field}={{'on': True}} is not supported"
    )
    assert expected in refused(tmp_path)


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


# --------------------------------------------------------------------------------------- the layers that a config means


NAMES = ["query", "value", "dense", "output.dense", "attention.self.query", "0.attention.output.dense", "layer", "1"]
chosen = st.lists(st.sampled_from(NAMES), min_size=1, max_size=3)
patterns = st.sampled_from([r".*layer\.1\..*", ".*(query|value)", r"roberta\.encoder\.layer\.0\..*dense", "query"])


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
            assert [*target_layers(adapter, [name])] == [name] * (
                bool(theirs) and type(theirs).__name__ != "_ExcludedModule"
            ), name
