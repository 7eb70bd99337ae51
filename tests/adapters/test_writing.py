"""What a save writes: PEFT's own layout, bit for bit, and the earlier files if it fails."""

import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from helpers import (
    assert_close,
    randomise_,
    tiny_config,
)
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file
from small_models import ALPHA, HEAD, LABELS, METADATA_OF_RUN, R, logits, lora_model, trained

from lora_nlu.adapters.attaching import load_adapter
from lora_nlu.adapters.reading import read_adapter
from lora_nlu.adapters.writing import save_adapter
from lora_nlu.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, RUN_METADATA


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
    assert metadata.keys() - METADATA_OF_RUN.keys() == {"peft_type", "model_type", "weights_fingerprint"}
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
