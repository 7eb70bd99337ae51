"""A config.json that does not fit its weights: refused before memory and time are spent on it."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_config, tiny_deberta_config

from lora_nlu.errors import UserError
from lora_nlu.labels import check_label_config, recorded_labels
from lora_nlu.models.loading import load_config, load_model
from lora_nlu.models.modeling_deberta_v2 import DebertaV2ForSequenceClassification
from lora_nlu.models.modeling_roberta import RobertaForSequenceClassification


def changed(folder: Path, kind: str = "roberta", **settings: Any) -> str:
    """The folder of a tiny model with these values in its config.json."""
    if kind == "roberta":
        RobertaForSequenceClassification(tiny_config()).save_pretrained(folder)
    else:
        DebertaV2ForSequenceClassification(tiny_deberta_config()).save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return str(folder)


@pytest.mark.parametrize("settings", [
    {"num_labels": 10**9, "id2label": None, "label2id": None},
    {"num_hidden_layers": 10**6},
    {"num_hidden_layers": -1},
    {"id2label": {"0": ["a"], "1": ["b"]}},
    {"id2label": {"0": None, "1": None}},
    {"id2label": ["a", "b"]},
    {"id2label": {"0": "a", "1": "b"}, "label2id": ["a", "b"]},
    {"architectures": [1]},
    {"architectures": 1},
    {"pad_token_id": None},
], ids=str)  # fmt: skip
def test_a_value_that_no_model_can_have_is_refused_at_once(tmp_path, settings):
    folder, start = changed(tmp_path, **settings), time.monotonic()
    with pytest.raises(UserError, match=r"its config\.json can't be used"):
        load_config(folder)
    assert time.monotonic() - start < 5


def test_a_config_of_another_model_is_refused_before_its_values_are_used(tmp_path):
    folder, start = changed(tmp_path, model_type="clip", text_config={"num_labels": 10**7}), time.monotonic()
    with pytest.raises(UserError, match="a 'clip' model; supported: roberta, xlm-roberta, camembert, deberta-v2"):
        load_config(folder)
    assert time.monotonic() - start < 2


def test_labels_that_are_numbers_are_their_text(tmp_path):
    config = load_config(changed(tmp_path, id2label={"0": 0, "1": 10, "2": 0.5}, label2id={"0": 0, "10": 1, "0.5": 2}))
    assert recorded_labels(config) == ("0", "10", "0.5")
    assert check_label_config("name", config) == []


@pytest.mark.parametrize(("kind", "settings"), [
    ("roberta", {"vocab_size": 10**9}),
    ("roberta", {"intermediate_size": 10**9}),
    ("roberta", {"max_position_embeddings": 10**9}),
    ("roberta", {"type_vocab_size": 10**9}),
    ("roberta", {"hidden_size": 4 * 10**4}),
    ("roberta", {"num_hidden_layers": 1000, "intermediate_size": 10**4}),
    ("deberta-v2", {"embedding_size": 10**9}),
    ("deberta-v2", {"conv_kernel_size": 10**6 + 1}),
    ("deberta-v2", {"max_relative_positions": 10**9, "position_buckets": -1}),
], ids=str)  # fmt: skip
def test_a_model_far_larger_than_its_file_is_refused_before_it_is_allocated(tmp_path, monkeypatch, kind, settings):
    folder = changed(tmp_path, kind, **settings)
    for model_class in (RobertaForSequenceClassification, DebertaV2ForSequenceClassification):
        monkeypatch.setattr(model_class, "from_pretrained", lambda *_, **__: pytest.fail("the model was built"))
    with pytest.raises(UserError, match="config.json describes a model of .* numbers, and the files .* bytes"):
        load_model(folder, load_config(folder), needs_head=False)


def test_the_size_of_a_sharded_model_is_that_of_its_files(tmp_path):
    model = RobertaForSequenceClassification(tiny_config())
    model.save_pretrained(tmp_path, max_shard_size=20_000)
    assert len([*tmp_path.glob("*.safetensors")]) > 1
    loaded, _ = load_model(str(tmp_path), load_config(str(tmp_path)), needs_head=True)
    assert all(torch.equal(x, y) for x, y in zip(loaded.parameters(), model.parameters(), strict=True))


def test_the_check_of_the_size_draws_no_random_number(tmp_path):
    RobertaForSequenceClassification(tiny_config()).roberta.save_pretrained(tmp_path)
    config = load_config(str(tmp_path))
    torch.manual_seed(0)
    expected = RobertaForSequenceClassification.from_pretrained(tmp_path, config=config)
    torch.manual_seed(0)
    loaded, _ = load_model(str(tmp_path), config, needs_head=False)
    assert torch.equal(loaded.classifier.out_proj.weight, expected.classifier.out_proj.weight)
