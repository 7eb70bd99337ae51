"""Base models and checkpoints from elsewhere: their files ask for more than they contain, or lead out of the folder."""

import json
import os
import zipfile
from pathlib import Path

import pytest
import torch
from helpers import randomise_, tiny_config
from training.test_trainer import new_trainer

from lora_nlu.errors import UserError
from lora_nlu.models.loading import load_config, load_model
from lora_nlu.models.modeling_roberta import RobertaForSequenceClassification
from lora_nlu.ops.tensors import load_torch_file

LARGE = torch.ones(1).half().expand(2**36, 8)


@pytest.fixture
def base(tmp_path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A model's folder without its weights, and those."""
    model = randomise_(RobertaForSequenceClassification(tiny_config()))
    model.config.save_pretrained(tmp_path)
    return tmp_path, model.state_dict()


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        load_model(str(folder), load_config(str(folder)), needs_head=False)
    return str(error.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_tensor_of_a_base_that_is_larger_than_its_file_is_refused_before_it_is_copied(zipped, base, monkeypatch):
    folder, state = base
    monkeypatch.setattr(
        RobertaForSequenceClassification, "from_pretrained", lambda *_, **__: pytest.fail("the model was built")
    )
    state["roberta.embeddings.word_embeddings.weight"] = LARGE
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    message = refused(folder)
    assert "pytorch_model.bin: roberta.embeddings.word_embeddings.weight has shape" in message


def test_a_base_whose_bytes_are_not_those_of_its_checksum_is_refused(base):
    folder, state = base
    path = folder / "pytorch_model.bin"
    torch.save(state, path)
    loaded, _ = load_model(str(folder), load_config(str(folder)), needs_head=True)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in state.items())
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    content = bytearray(path.read_bytes())
    content[largest.header_offset + 200] ^= 1
    path.write_bytes(content)
    assert "pytorch_model.bin: damaged" in refused(folder)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt", "method_state.pt"])
def test_a_checkpoints_file_that_is_larger_than_its_bytes_is_refused_before_it_is_read(name, tmp_path):
    trainer = new_trainer(tmp_path / "run")
    torch.save({"state": {0: [{"exp_avg": LARGE}]}}, tmp_path / name)
    with pytest.raises(UserError, match=rf"{name}: exp_avg has shape \[68719476736, 8\]"):
        trainer._load_optimizer_and_scheduler(str(tmp_path))


def test_a_value_that_contains_itself_or_another_many_times_is_read_in_time(tmp_path):
    nested: list = []
    nested.append(nested)
    for _ in range(60):
        nested = [nested, nested]
    torch.save({"a": nested, "b": torch.ones(2)}, tmp_path / "a.pt")
    assert torch.equal(load_torch_file(tmp_path / "a.pt")["b"], torch.ones(2))


@pytest.mark.parametrize("shard", ["../outside.bin", "{}/outside.bin", "a/../../outside.bin", "/dev/zero"])
@pytest.mark.parametrize("index", ["pytorch_model.bin.index.json", "model.safetensors.index.json"])
def test_an_index_of_weights_that_names_a_file_elsewhere_is_refused(index, shard, base, monkeypatch):
    folder, state = base
    inside = folder / "base"
    inside.mkdir()
    (folder / "config.json").rename(inside / "config.json")
    torch.save(state, folder / "outside.bin")
    content = {"metadata": {}, "weight_map": dict.fromkeys(state, shard.format(folder))}
    (inside / index).write_text(json.dumps(content))
    opened = []
    monkeypatch.setattr(torch, "load", lambda path, *_, **__: opened.append(os.fspath(path)))
    message = refused(inside)
    assert "refused: it names" in message and index in message and not opened


def test_a_config_that_names_a_file_of_weights_elsewhere_is_refused(base):
    folder, state = base
    torch.save(state, folder / "outside.bin")
    (folder / "base").mkdir()
    config = json.loads((folder / "config.json").read_text()) | {"transformers_weights": "../outside.bin"}
    (folder / "base" / "config.json").write_text(json.dumps(config))
    assert "config.json: refused: it names ../outside.bin" in refused(folder / "base")
