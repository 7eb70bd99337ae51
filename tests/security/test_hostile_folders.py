"""Folders that somebody else made, given to the programs: nothing waits, nothing outside is written, text stays text.

Other tests of this kind: patterns in test_patterns.py, sizes in test_sizes.py and test_torch_files.py, labels in
test_label_characters.py, the model card in adapters/test_model_card.py, reports in test_reports.py, damaged caches in
data/test_cache.py, links under temporary names in test_files.py and training/test_trainer.py.
"""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from adapters.conversions import written
from adapters.small_models import METADATA_OF_RUN, lora_model
from helpers import tiny_config
from safetensors.torch import save_file

from lora_nlu.adapters.__main__ import main
from lora_nlu.adapters.attaching import attach_adapter
from lora_nlu.adapters.reading import read_adapter
from lora_nlu.adapters.writing import save_adapter
from lora_nlu.data.user_files import load_files
from lora_nlu.errors import UserError
from lora_nlu.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, RUN_METADATA
from lora_nlu.models.loading import load_config, load_model
from lora_nlu.models.modeling_roberta import RobertaForSequenceClassification
from lora_nlu.models.tokenizer import load_tokenizer


@pytest.fixture(autouse=True)
def in_time(monkeypatch):
    """A test that waits, for the other end of a pipe for example, fails."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    previous = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it did not end"))
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


@pytest.fixture
def adapter(tmp_path) -> Path:
    save_adapter(lora_model(), tmp_path / "adapter", METADATA_OF_RUN)
    return tmp_path / "adapter"


@pytest.fixture
def base(tmp_path) -> Path:
    """The folder of a model without LoRA."""
    RobertaForSequenceClassification(tiny_config()).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def is_printable(text: str) -> bool:
    return all(character.isprintable() or character == "\n" for character in text)


# -------------------------------------------------------------------------------------- what is no file under its name


PLANTED = {
    "a pipe": os.mkfifo,
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "a folder": Path.mkdir,
}


@pytest.mark.parametrize("what", PLANTED)
def test_what_is_no_file_is_not_read_as_part_of_an_adapter(what, adapter, capsys):
    for name in (RUN_METADATA, ADAPTER_WEIGHTS, "adapter_model.bin", ADAPTER_CONFIG):
        (adapter / name).unlink(missing_ok=True)
        PLANTED[what](adapter / name)
        code = main(["inspect", str(adapter)])
        out, err = capsys.readouterr()
        if name == RUN_METADATA:  # as a folder of PEFT's, which has none
            assert code == 0 and "unknown" in out and "yes, no, perhaps" not in out
        else:
            assert code == 1 and str(adapter) in err and err.count("\n") <= 3


@pytest.mark.parametrize("what", PLANTED)
def test_what_is_no_file_is_not_read_as_part_of_a_model(what, base):
    config = load_config(str(base))
    for name in ("tokenizer.json", "vocab.json", "tokenizer_config.json"):
        PLANTED[what](base / name)
    with pytest.raises(UserError, match=str(base)):
        load_tokenizer(str(base), config)
    for name in ("model.safetensors", "pytorch_model.bin"):
        (base / name).unlink(missing_ok=True)
        PLANTED[what](base / name)
        with pytest.raises(UserError, match=str(base)):
            load_model(str(base), config, needs_head=False)
    (base / "config.json").unlink()
    PLANTED[what](base / "config.json")
    with pytest.raises(UserError, match=str(base)):
        load_config(str(base))


# -------------------------------------------------------------------------------------------------- links out of it


@pytest.mark.parametrize("form", ["bin", "peft"])
def test_a_conversion_writes_through_no_link(form, adapter, tmp_path, capsys):
    mine, new = tmp_path / "mine", tmp_path / "out"
    mine.write_text("mine")
    for name in (".out.partial", ".adapter_config.json.partial", ".out.lock"):
        (tmp_path / name).symlink_to(mine)
    new.symlink_to(tmp_path / "elsewhere")
    main(["convert", str(adapter), str(new), "--to", form])
    capsys.readouterr()
    assert mine.read_text() == "mine" and not (tmp_path / "elsewhere").exists()
    new.unlink(missing_ok=True)
    new.symlink_to(mine)
    assert main(["convert", str(adapter), str(new), "--to", form]) == 1
    assert "is there already" in capsys.readouterr().err and mine.read_text() == "mine"


# ------------------------------------------------------------------------------------------------------------- text


LOOP = "a link to itself"
TEXTS = ["\x1b[2J\x07", "a\0b", "\ud800", "a\nb\r", "\u202eabc", "y" * 10_000, LOOP, "--to", "%s{0}"]


@pytest.mark.parametrize("keys", ["base_model task dataset base_revision", "base_fingerprint tokenizer_fingerprint"])
def test_whatever_an_adapter_records_is_printed_as_text_and_names_no_place(
    keys, adapter, base, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path(LOOP).symlink_to(LOOP)
    recorded, model = json.loads((adapter / RUN_METADATA).read_text()), lora_model(seed=1)
    for i, text in enumerate(TEXTS):
        (adapter / RUN_METADATA).write_text(json.dumps(recorded | dict.fromkeys(keys.split(), text)))
        assert main(["inspect", str(adapter)]) == 0
        assert main(["convert", str(adapter), f"peft {i}", "--to", "peft"]) == 0
        if i == 0:
            main(["convert", str(adapter), "merged", "--to", "merged", "--base", str(base)])
        try:
            model.config.name_or_path = str(base)
            notes = attach_adapter(model, read_adapter(str(adapter)), None, allow_new_head=False)
            assert len(notes) == 1 and notes[0].isprintable()
        except UserError as e:
            assert "base_fingerprint" in keys and is_printable(str(e))
        out, err = capsys.readouterr()
        screen = (out + err).replace("\r", "")  # of progress bars
        assert is_printable(screen) and len(screen) < 10_000
        assert is_printable(Path(f"peft {i}", "README.md").read_text())


@pytest.mark.parametrize("key", ["base_model_name_or_path", "revision", "task_type", "modules_to_save"])
def test_whatever_a_config_of_peft_contains_is_printed_as_text(key, adapter, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(LOOP).symlink_to(LOOP)
    (adapter / RUN_METADATA).unlink()
    settings, model = json.loads((adapter / ADAPTER_CONFIG).read_text()), lora_model(seed=1)
    for i, text in enumerate(TEXTS):
        (adapter / ADAPTER_CONFIG).write_text(json.dumps(settings | {key: text}))
        assert main(["inspect", str(adapter)]) in (0, 1)
        if key != "revision":
            assert main(["convert", str(adapter), f"peft {i}", "--to", "peft"]) in (0, 1)
        attach_adapter(model, read_adapter(str(adapter)), None, allow_new_head=False)
        out, err = capsys.readouterr()
        assert is_printable(out + err) and len(out + err) < 10_000


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_names_of_a_models_tensors_are_printed_as_text_and_shortened(kind, base):
    state = RobertaForSequenceClassification(tiny_config()).state_dict()
    state |= {f"\x1b[2J{i}\n" + "x" * 10_000: torch.ones(1) for i in range(100)}
    (base / "model.safetensors").unlink()
    if kind == "bin":
        torch.save(state, base / "pytorch_model.bin")
    else:
        save_file(state, base / "model.safetensors", {"format": "pt"})
    note, _ = load_model(str(base), load_config(str(base)), needs_head=True)[1]
    assert "100 weights have no place in the model" in note and note.isprintable() and len(note) < 1000


@pytest.mark.parametrize("key", ["model_type", "hidden_act", "architectures", "quantization_config"])
def test_values_of_a_models_config_are_printed_as_text_and_shortened(key, base):
    config = json.loads((base / "config.json").read_text())
    for text in TEXTS:
        value = [text] if key == "architectures" else {"quant_method": text} if key == "quantization_config" else text
        (base / "config.json").write_text(json.dumps(config | {key: value}))
        try:
            notes = load_model(str(base), load_config(str(base)), needs_head=False)[1]
            assert is_printable("".join(notes)) and len("".join(notes)) < 1500
        except UserError as e:
            assert is_printable(str(e)) and len(str(e)) < 1500


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("token", [{"content": "a", "\x1b[2J": 1}, {"x": "y"}, {"content": None}], ids=ascii)
def test_a_token_of_another_form_is_refused_and_its_names_are_not_printed(token, name, tmp_path, capfd):
    folder = written("roberta", tmp_path, reading=False)[1]
    config = load_config(str(folder))
    load_tokenizer(str(folder), config)
    path = folder / name
    settings = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(settings | {"unk_token": token}))
    with pytest.raises(UserError, match="No tokenizer in .* that can be read") as error:
        load_tokenizer(str(folder), config)
    out, err = capfd.readouterr()
    assert is_printable(str(error.value)) and is_printable((out + err).replace("\r", ""))


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_headers_of_a_data_file_are_printed_as_text_and_shortened(suffix, tmp_path):
    path, names = tmp_path / f"a{suffix}", [f"\x1b[2J{i}{'x' * 1000}" for i in range(1000)]
    separator = "\t" if suffix == ".tsv" else ","
    row = dict.fromkeys(names, "a")
    path.write_text(
        json.dumps(row) if suffix == ".jsonl" else f"{separator.join(names)}\n{separator.join(row.values())}\n"
    )
    for columns in (None, ["a"], [names[0], "b" * 10]):
        with pytest.raises(UserError) as error:
            load_files({"train": str(path)}, None, columns)
        assert is_printable(str(error.value)) and len(str(error.value)) < 3000
