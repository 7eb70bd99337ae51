"""A checkpoint that brings code of its own: it is refused by name, without a question, and never run."""

import json

import pytest
from helpers import tiny_config

from lora_nlu.errors import UserError
from lora_nlu.models.loading import load_config
from lora_nlu.models.tokenizer import load_tokenizer

CODE = "from pathlib import Path\nPath({!r}).touch()\nclass C: pass\n"


@pytest.fixture(autouse=True)
def no_question(monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))


def planted(folder, name: str, content: dict) -> None:
    (folder / name).write_text(json.dumps(content))
    (folder / "code.py").write_text(CODE.format(str(folder / "ran")))


def test_a_config_whose_auto_map_names_code_is_refused_by_name(tmp_path):
    planted(tmp_path, "config.json", {"model_type": "mine", "auto_map": {"AutoConfig": "code.C"}})
    with pytest.raises(UserError, match="auto_map"):
        load_config(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_a_config_of_ours_with_an_auto_map_is_read_without_its_code(tmp_path):
    config = tiny_config().to_dict() | {"auto_map": {"AutoConfig": "code.C", "AutoModel": "code.C"}}
    planted(tmp_path, "config.json", config)
    assert load_config(str(tmp_path)).model_type == "roberta"
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_whose_auto_map_names_code_is_refused_by_name(tmp_path):
    content = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["code.C", "code.C"]}}
    planted(tmp_path, "tokenizer_config.json", content)
    with pytest.raises(UserError, match="auto_map"):
        load_tokenizer(str(tmp_path), tiny_config())
    assert not (tmp_path / "ran").exists()
