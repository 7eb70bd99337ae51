"""The model card that a conversion writes."""

import json

import huggingface_hub
from conversions import anonymous, run_program


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


def test_a_cards_command_names_a_base_that_others_have_or_leaves_its_place_open(case, tmp_path, capsys):
    _, base, adapter = case
    assert run_program(capsys, "convert", adapter, tmp_path / "local", "--to", "peft")[0] == 0
    text = (tmp_path / "local" / "README.md").read_text()
    assert str(base.parent) not in text and "--model_name_or_path BASE_MODEL " in text and "base_model:" not in text
    assert run_program(capsys, "convert", anonymous(adapter, tmp_path / "a"), tmp_path / "none", "--to", "peft")[0] == 0
    text = (tmp_path / "none" / "README.md").read_text()
    assert "for an unnamed base model on an unnamed task" in text and "| labels | unknown |" in text
    assert "--model_name_or_path BASE_MODEL " in text
