"""Labels with characters that end a line, control a terminal or reverse text: refused where they are read."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from adapters.small_models import lora_model
from datasets import Dataset
from helpers import tiny_config

from lora_nlu.adapters.reading import read_adapter
from lora_nlu.adapters.writing import save_adapter
from lora_nlu.data.examples import Examples
from lora_nlu.data.user_files import load_files
from lora_nlu.errors import UsageError, UserError
from lora_nlu.escaping import json_line
from lora_nlu.files import RUN_METADATA
from lora_nlu.models.loading import load_config
from lora_nlu.training.arguments import parse_names
from lora_nlu.training.runs import predict

REFUSED = [*"\x00\t\n\r\x1b\x7f\x85\x9b\u2028\u2029\u202a\u202e\u2066\u2069"]
ALLOWED = ["a b", "a\u200db", "a\u200cb", "\u200eא", "\u200fא", "é\u0301", "👍🏽", "a, b", 'a "b"', "=1+1", "a\\nb"]


def read_csv(folder, label):
    text = "".join(f'text {i},"{name}"\n' for i, name in enumerate([label.replace('"', '""'), "no"] * 3))
    (folder / "a.csv").write_bytes(f"text,label\n{text}".encode())
    return load_files({"train": str(folder / "a.csv")}, None, cache_dir=str(folder / "cache")).labels


def read_jsonl(folder, label):
    lines = [json.dumps({"text": str(i), "label": name}) for i, name in enumerate([label, "no"] * 3)]
    (folder / "a.jsonl").write_text("\n".join(lines))
    return load_files({"train": str(folder / "a.jsonl")}, None, cache_dir=str(folder / "cache")).labels


def read_metadata(folder, label):
    save_adapter(lora_model(), folder / "adapter", {"labels": [label, "no", "c"]})
    return read_adapter(str(folder / "adapter")).labels


def read_config(folder, label):
    config = tiny_config().to_dict() | {"id2label": {0: label, 1: "no"}, "label2id": {label: 0, "no": 1}}
    (folder / "config.json").write_text(json.dumps(config))
    return tuple(load_config(str(folder)).id2label.values())


def read_flag(_, label):
    return parse_names("labels", f'"{label.replace(chr(34), 2 * chr(34))}",no')


# How labels are read from each place, and what the message names
PLACES = {
    "csv": (read_csv, r"a\.csv:\d+: "),
    "json lines": (read_jsonl, r"a\.jsonl:1: "),
    RUN_METADATA: (read_metadata, RUN_METADATA),
    "config.json": (read_config, r"config\.json: "),
    "--labels": (read_flag, "--labels: "),
}


@pytest.mark.parametrize("place", PLACES)
def test_labels_with_characters_that_cannot_be_told_are_refused_where_they_are_read(place, tmp_path):
    read, where = PLACES[place]
    for character in REFUSED:
        with pytest.raises(UserError, match=where) as error:
            read(tmp_path, f"a{character}b")
        message = str(error.value)
        assert "label" in message and message.isprintable()
        assert isinstance(error.value, UsageError) == (place == "--labels")


@pytest.mark.parametrize("place", PLACES)
def test_other_labels_are_read_as_they_are(place, tmp_path):
    for label in ALLOWED:
        assert label in PLACES[place][0](tmp_path, label)


def test_half_a_character_is_no_label(tmp_path):
    for place in ("json lines", RUN_METADATA, "config.json"):
        with pytest.raises(UserError):
            PLACES[place][0](tmp_path, "a\ud800b")


def test_an_older_runs_label_with_a_line_break_makes_one_line_of_predictions(tmp_path):
    predictions = SimpleNamespace(predictions=np.array([[1.0, 0.0], [0.0, 1.0]]))
    args = SimpleNamespace(output_dir=str(tmp_path), process_index=0)
    metadata = {"task": "custom", "labels": ["a\nb\tc", "no"]}
    trainer = SimpleNamespace(metadata=metadata, args=args, precision="fp32", predict=lambda _: predictions)
    texts = ["tab\there, line\nbreak, \u2028 and \x85", 'quote " \\ é 日本 😀 \x1b[2J']
    examples = Examples({"test": Dataset.from_dict({"text": texts})}, ("a\nb\tc", "no"), rows={"test": 2})
    answers, details = predict(trainer, {"test": Dataset.from_dict({"input_ids": [[1], [2]]})}, examples, None)
    assert answers.read_text() == "index\tprediction\n0\ta\\nb\\tc\n1\tno\n"
    lines = details.read_text().splitlines()  # which also ends lines at \x85 and \u2028
    assert "é 日本 😀" in lines[1] and "\x1b" not in lines[1]
    assert [json.loads(line) for line in lines] == [
        {"index": 0, "text": texts[0], "label": "a\nb\tc", "probabilities": {"a\nb\tc": 0.731059, "no": 0.268941}},
        {"index": 1, "text": texts[1], "label": "no", "probabilities": {"a\nb\tc": 0.268941, "no": 0.731059}},
    ]
    assert json.loads(json_line("half \ud800")) == "half \ud800" and json_line("\ud800") == r'"\ud800"'
