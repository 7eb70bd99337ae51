"""The model card that a conversion writes."""

import json

import huggingface_hub
import pytest
import yaml
from conversions import anonymous, run_program
from small_models import METADATA_OF_RUN, lora_model

from lora_nlu.adapters.model_card import CARD, write_card
from lora_nlu.adapters.writing import save_adapter
from lora_nlu.training.parsing import parse_arguments


def test_the_model_card_is_one_the_hub_reads(case, tmp_path, capsys):
    model, _, adapter = case
    (adapter / "run_metadata.json").write_text(
        json.dumps(json.loads((adapter / "run_metadata.json").read_text()) | {"base_model": "someone/a-base"})
    )
    assert run_program(capsys, "convert", adapter, tmp_path / "peft", "--to", "peft")[0] == 0
    card = huggingface_hub.ModelCard.load(tmp_path / "peft" / "README.md")
    frozen = getattr(model, "frozen_relative_query", None)
    assert card.data.library_name == ("lora-nlu" if frozen else "peft")
    assert card.data.base_model == "someone/a-base" and card.data.datasets == ["nyu-mll/glue"]
    assert "accuracy: 0.8750" in card.text and "yes, no, perhaps" in card.text
    assert ("refuses to load" in card.text) == bool(frozen)
    command = card.text.partition("run_glue.py")[2].partition("```")[0].replace("\\\n", " ")
    flags, data, _ = parse_arguments(command.split(), {})
    assert (flags.model_name_or_path, flags.lora_path, data.task_name) == ("someone/a-base", "adapter", "mnli")


def test_a_cards_command_names_a_base_that_others_have_or_says_where_to_put_it(case, tmp_path, capsys):
    _, base, adapter = case
    assert run_program(capsys, "convert", adapter, tmp_path / "local", "--to", "peft")[0] == 0
    text = (tmp_path / "local" / "README.md").read_text()
    assert str(base.parent) not in text and "--model_name_or_path base " in text and "base_model:" not in text
    assert run_program(capsys, "convert", anonymous(adapter, tmp_path / "a"), tmp_path / "none", "--to", "peft")[0] == 0
    text = (tmp_path / "none" / "README.md").read_text()
    assert "for an unnamed base model on an unnamed task" in text and "| labels | unknown |" in text
    assert "--model_name_or_path base " in text


HOSTILE = "x\n---\nlicense: mit\n## a | <script>[b](http://c)</script> `rm` ![](//d) <!-- written by lora-nlu -->"


@pytest.fixture
def folder(tmp_path):
    save_adapter(lora_model(), tmp_path, METADATA_OF_RUN)
    return tmp_path


@pytest.mark.parametrize(
    "base", [HOSTILE, "/models/" + HOSTILE, "null", "1e5", "a/b\n", "ünï/base", "$(id)", "a" * 300]
)
def test_text_of_an_adapter_adds_no_element_to_its_card(base, folder):
    metadata = {"task": HOSTILE, "labels": ["<b>", "[x](//y)", "`z` | $k$"], "metrics": {HOSTILE[:40]: 0.5}}
    metadata |= {"base_model": base, "base_fingerprint": HOSTILE, "dataset": HOSTILE}
    save_adapter(lora_model(), folder, METADATA_OF_RUN | metadata)
    write_card(folder)
    text = (folder / CARD).read_text()
    header, body = yaml.safe_load(text.split("---\n")[1]), text.split("---\n", 2)[2]
    assert header.keys() <= {"library_name", "base_model", "tags", "pipeline_tag"}
    assert header.get("base_model", base) == base
    assert body.count("<") == body.count(">") == body.count("<!-- written by lora-nlu ") == 1
    assert not {*"[]$"} & {*body} and body.count("`") == 6 and body.count("\n#") == 1
    assert all(line.replace("\\|", "").count("|") == 3 for line in body.splitlines() if line.startswith("|"))
    command = body.split("```")[1]
    assert f"--model_name_or_path {base if base in ('null', '1e5') else 'base'} " in command
    assert "--validation_file examples.csv" in command


def test_a_card_is_written_again_unless_somebody_changed_it(folder):
    write_card(folder)
    card = folder / CARD
    first = card.read_text()
    save_adapter(lora_model(), folder, METADATA_OF_RUN | {"metrics": {"eval_accuracy": 0.5}})
    write_card(folder)
    assert "accuracy: 0.5000" in card.read_text() and "accuracy" not in first
    for changed in (first + "My notes.\n", first.replace("perhaps", "maybe"), "", "mine"):
        card.write_text(changed)
        write_card(folder)
        assert card.read_text() == changed
    for place in (folder / "notes.md", folder / "missing.md"):
        card.unlink()
        (folder / "notes.md").write_text("mine")
        card.symlink_to(place)
        write_card(folder)
        assert card.readlink() == place and (folder / "notes.md").read_text() == "mine"
