"""An adapter put into a model: what belongs together, a head without its pooler, other ranks and shapes."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from helpers import (
    CLASSIFIERS,
    assert_close,
    ragged_batch,
    randomise_,
    tiny_config,
    tiny_deberta_config,
)
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from small_models import (
    ALPHA,
    HEAD,
    METADATA_OF_RUN,
    R,
    copied,
    logits,
    lora_deberta,
    lora_model,
    on,
    peft_deberta,
    published,
    refused,
    train_at_random_,
    trained,
    variant,
)

from lora_nlu.adapters import writing
from lora_nlu.adapters.adapter import check_settings
from lora_nlu.adapters.attaching import attach_adapter, load_adapter
from lora_nlu.adapters.reading import read_adapter
from lora_nlu.adapters.writing import save_adapter
from lora_nlu.errors import UserError
from lora_nlu.files import ADAPTER_WEIGHTS, RUN_METADATA
from lora_nlu.methods.lora import LoRALinear
from lora_nlu.models.modeling_deberta_v2 import DebertaV2ForSequenceClassification
from lora_nlu.models.modeling_roberta import RobertaForSequenceClassification

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


@pytest.mark.parametrize("variant", ["dora", "pissa"])
def test_plain_lora_is_not_loaded_into_a_model_of_a_variant_with_more_tensors(variant, tmp_path):
    save_adapter(lora_model(), tmp_path, {})
    tensor = {"dora": "lora_magnitude_vector", "pissa": "lora_A_start"}[variant]
    assert tensor in refused(tmp_path, lora_model(seed=1, lora_variant=variant))


def test_a_flag_with_another_seed_than_the_files_is_refused(tmp_path):
    model = lora_model(lora_variant="vera", lora_alpha=None, vera_seed=5)
    save_adapter(model, tmp_path, {})
    check_settings(read_adapter(str(tmp_path)), {"vera_seed": 5})
    with pytest.raises(UserError, match="was trained with vera_seed 5, but --vera_seed is 6"):
        check_settings(read_adapter(str(tmp_path)), {"vera_seed": 6})
