"""Adapters loaded with their base: each method gives its trained model's logits; several share one base's weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conversions import CONFIGS, LABELS, write_tokenizer
from helpers import CLASSIFIERS, assert_close, randomise_, settings_of
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_nlu
from lora_nlu.adapters.loading import load_sources, read_source
from lora_nlu.adapters.writing import save_adapter
from lora_nlu.errors import UserError
from lora_nlu.methods.marking import mark_trainable
from lora_nlu.methods.table import METHODS
from lora_nlu.models.loading import base_fingerprint

ADAPTED = [row for row in METHODS.values() if row.peft_types]  # all but full fine-tuning


@pytest.fixture(scope="module", params=["roberta", "deberta"])
def base(request, tmp_path_factory) -> Path:
    """A base model of each kind as transformers saves it, with a tokenizer."""
    folder = tmp_path_factory.mktemp(request.param)
    config = CONFIGS[request.param](num_labels=2)
    randomise_(CLASSIFIERS[config.model_type][1](config)).save_pretrained(folder)
    return write_tokenizer(folder)


def trained(base: Path, folder: Path, labels: list[str], **settings: Any) -> nn.Module:
    """A model over `base` with random trained parameters, which are saved in `folder`."""
    config = transformers.AutoConfig.from_pretrained(base, num_labels=len(labels) or 1)
    config.update(settings)
    model = CLASSIFIERS[config.model_type][0].from_pretrained(base, config=config, ignore_mismatched_sizes=True)
    mark_trainable(model)
    metadata = {"base_model": str(base), "base_fingerprint": base_fingerprint(model), "labels": labels}
    generator = torch.Generator().manual_seed(len(str(settings)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = 0.2 * torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise) if "lora_" in name else parameter.copy_(noise)
    save_adapter(model, folder, metadata)
    return model.eval()


def logits(model: Any, tokenizer: Any) -> Tensor:
    with torch.no_grad():
        return model(**tokenizer(["a b a", "b", "b a a b a"], padding=True, return_tensors="pt")).logits


@pytest.mark.parametrize("row", ADAPTED, ids=lambda row: row.name)
def test_an_adapter_of_every_method_gives_the_logits_of_its_trained_model(row, base, tmp_path):
    model = trained(base, tmp_path / "a", LABELS, **settings_of(row))
    loaded, tokenizer, labels = lora_nlu.load(tmp_path / "a")
    assert_close(logits(loaded, tokenizer), logits(model, tokenizer))
    assert labels == tuple(LABELS) and loaded.config.id2label == dict(enumerate(LABELS)) and not loaded.training


@pytest.mark.parametrize("row", ADAPTED, ids=lambda row: row.name)
@pytest.mark.filterwarnings("ignore:bf16")
def test_in_bf16_an_adapter_of_every_method_has_the_bits_of_its_trained_model_in_bf16(row, base, tmp_path):
    model = trained(base, tmp_path / "a", LABELS, **settings_of(row))
    loaded, tokenizer, _ = lora_nlu.load(tmp_path / "a", bf16=True)
    in_fp32, in_bf16 = logits(model, tokenizer), logits(loaded, tokenizer)
    assert 0 < (in_bf16 - in_fp32).abs().max() < 0.02 * in_fp32.abs().max()
    assert model.hold_in_bf16(trains=False) and torch.equal(logits(model, tokenizer), in_bf16)


def test_several_adapters_share_the_weights_of_one_base_and_answer_as_each_alone(base, tmp_path):
    names = {"three": LABELS, "two": ["yes", "no"], "score": []}
    for name, labels in names.items():
        trained(base, tmp_path / name, labels, apply_lora=True, lora_r=4, lora_alpha=8)
    for row in ("bitfit", "houlsby", "dora"):
        trained(base, tmp_path / row, LABELS, **settings_of(METHODS[row]))
    folders = [tmp_path / name for name in (*names, "bitfit", "houlsby", "dora")]
    predictors, _ = load_sources([read_source(str(folder)) for folder in folders])
    for folder, predictor in zip(folders, predictors, strict=True):
        alone, tokenizer, labels = lora_nlu.load(folder)
        assert torch.equal(logits(predictor.model, tokenizer), logits(alone, tokenizer))
        assert predictor.labels == labels
    first, *others = [dict(predictor.model.named_parameters()) for predictor in predictors]
    for name, parameters in zip([folder.name for folder in folders[1:]], others, strict=True):
        own = [n for n, p in parameters.items() if n in first and p is not first[n]]
        trains = [n for n in own if n.endswith("bias")] if name == "bitfit" else []
        assert all("lora_" in n or n.startswith(("classifier.", "pooler.")) or n in trains for n in own), own


def test_a_complete_model_is_loaded_from_its_folder(base, tmp_path):
    config = transformers.AutoConfig.from_pretrained(base)
    config.id2label, config.label2id = {0: "yes", 1: "no"}, {"yes": 0, "no": 1}
    theirs = randomise_(CLASSIFIERS[config.model_type][1](config), seed=1).eval()
    theirs.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    model, tokenizer, labels = lora_nlu.load(tmp_path)
    assert_close(logits(model, tokenizer), logits(theirs, tokenizer))
    assert labels == ("yes", "no")
    with pytest.warns(UserWarning, match="are held in bf16"):
        in_bf16 = logits(lora_nlu.load(tmp_path, bf16=True)[0], tokenizer)
    assert model.hold_in_bf16(trains=False) and torch.equal(in_bf16, logits(model, tokenizer))
    with pytest.raises(UserError, match="is a complete model, no adapter. Predict with it alone"):
        load_sources([read_source(str(tmp_path))] * 2)


def test_several_adapters_in_bf16_hold_the_weights_of_one_base_and_answer_as_each_alone(base, tmp_path):
    names = ["lora", "dora", "pissa", "bitfit"]
    for name in names:
        trained(base, tmp_path / name, LABELS, **settings_of(METHODS[name]))
    predictors, notes = load_sources([read_source(str(tmp_path / name)) for name in names], bf16=True)
    held = [{n: m.frozen for n, m in p.model.named_modules() if getattr(m, "frozen", None)} for p in predictors]
    assert all(len(of_one) >= 12 and of_one == held[0] for of_one in held)  # the same objects
    assert f"bf16: the weights of {len(held[0])} linear layers are held in bf16" in notes[0]
    for name, predictor in zip(names, predictors, strict=True):
        with pytest.warns(UserWarning, match="are held in bf16"):
            alone, tokenizer, _ = lora_nlu.load(tmp_path / name, bf16=True)
        assert torch.equal(logits(predictor.model, tokenizer), logits(alone, tokenizer))


@pytest.mark.parametrize("base", ["roberta"], indirect=True)
def test_the_pipeline_of_transformers_answers_with_a_loaded_adapter(base, tmp_path):
    model = trained(base, tmp_path / "a", LABELS, apply_lora=True, lora_r=4, lora_alpha=8)
    loaded, tokenizer, labels = lora_nlu.load(tmp_path / "a")
    classify = transformers.pipeline("text-classification", model=loaded, tokenizer=tokenizer, top_k=None)
    (answer,) = classify(["b a a b a"])
    expected = dict(zip(labels, logits(model, tokenizer)[2].softmax(0).tolist(), strict=True))
    assert {x["label"]: x["score"] for x in answer} == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("base", ["roberta"], indirect=True)
def test_the_readmes_python_answers_a_pair(base, tmp_path, capsys):
    model = trained(base, tmp_path / "a", LABELS, apply_lora=True, lora_r=4, lora_alpha=8)
    blocks = Path(__file__).parents[2].joinpath("README.md").read_text().split("```python\n")[1:]
    (code,) = [block.split("```")[0] for block in blocks if "lora_nlu.load(" in block]
    names: dict[str, Any] = {}
    exec(code.replace('"output/roberta_base_rte"', repr(str(tmp_path / "a"))), names)
    pair = names["tokenizer"]("A man sleeps.", "Nobody is awake.", return_tensors="pt")
    with torch.no_grad():
        probabilities = model(**pair).logits[0].softmax(0)
    expected = {"label": LABELS[probabilities.argmax()], "score": pytest.approx(probabilities.max().item(), abs=1e-5)}
    assert eval(capsys.readouterr().out.splitlines()[-1]) == expected


@pytest.mark.parametrize("base", ["roberta"], indirect=True)
def test_what_an_adapter_does_not_record_is_given_or_asked_for(base, tmp_path):
    folder = tmp_path / "a"
    model = trained(base, folder, LABELS, apply_lora=True, lora_r=4, lora_alpha=8)
    (folder / "run_metadata.json").unlink()  # as PEFT writes a folder
    with pytest.raises(UserError, match="records no names for the 3 classes") as error:
        lora_nlu.load(folder)
    assert " as labels (a,b,c)" in str(error.value) and " as task_name (mnli)" in str(error.value)
    with pytest.raises(UserError, match="3 outputs, but labels gives yes, no"):
        lora_nlu.load(folder, labels=["yes", "no"])
    loaded, tokenizer, labels = lora_nlu.load(folder, labels=LABELS)
    assert labels == tuple(LABELS) and torch.equal(logits(loaded, tokenizer), logits(model, tokenizer))
    config = json.loads((folder / "adapter_config.json").read_text())
    for recorded, message in (
        (None, "doesn't record its base model: give base MODEL"),
        ("gone/elsewhere", "names this base model. If it is elsewhere now, give base FOLDER"),
    ):
        (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": recorded}))
        with pytest.raises(UserError, match=message):
            lora_nlu.load(folder, labels=LABELS)
    assert torch.equal(logits(lora_nlu.load(folder, str(base), labels=LABELS)[0], tokenizer), logits(model, tokenizer))


@pytest.mark.parametrize("base", ["deberta"], indirect=True)
def test_the_relative_query_of_a_bin_is_given_and_that_of_a_folder_is_recorded(base, tmp_path):
    settings = {"apply_lora": True, "lora_r": 4, "lora_alpha": 8, "lora_relative_query": True}
    model = trained(base, tmp_path / "a", LABELS, **settings)
    own = {name: p for name, p in model.named_parameters() if "lora_" in name or name.startswith(("pooler", "class"))}
    torch.save(own, tmp_path / "lora.bin")
    given: dict[str, Any] = {"base": str(base), "lora_alpha": 8, "labels": LABELS}
    loaded, tokenizer, _ = lora_nlu.load(tmp_path / "lora.bin", **given, lora_relative_query="both")
    expected = logits(model, tokenizer)
    assert_close(logits(loaded, tokenizer), expected)
    assert (logits(lora_nlu.load(tmp_path / "lora.bin", **given)[0], tokenizer) - expected).abs().max() > 1e-3
    with pytest.raises(UserError, match=r"^lora_relative_query: .* is no DeBERTa .bin. Leave lora_relative_query out"):
        lora_nlu.load(tmp_path / "a", lora_relative_query="both")


@pytest.mark.parametrize("base", ["roberta"], indirect=True)
def test_the_hub_is_looked_for_before_an_adapter_its_base_and_its_tokenizer_are_read(base, tmp_path, monkeypatch):
    trained(base, tmp_path / "a", LABELS, apply_lora=True, lora_r=4, lora_alpha=8)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("lora_nlu.hub.use_cache_if_unreachable", lambda: "no answer")
    for given in (("someone/adapter",), (tmp_path / "a", "someone/base")):
        with pytest.warns(UserWarning, match="^no answer$"), pytest.raises(UserError, match="someone/"):
            lora_nlu.load(*given)
    with pytest.warns(UserWarning, match="^no answer$"), pytest.raises(UserError, match="No tokenizer in someone/it"):
        lora_nlu.load(tmp_path / "a", tokenizer_name="someone/it")


@pytest.mark.parametrize("base", ["roberta"], indirect=True)
def test_a_tokenizer_that_the_base_lacks_is_given_by_name(base, tmp_path):
    model = trained(base, tmp_path / "a", LABELS, apply_lora=True, lora_r=4, lora_alpha=8)
    weights = shutil.copytree(base, tmp_path / "base", ignore=lambda _, names: {n for n in names if "token" in n})
    with pytest.raises(UserError, match=r"No tokenizer in .* Give tokenizer_name\."):
        lora_nlu.load(tmp_path / "a", str(weights))
    loaded, tokenizer, _ = lora_nlu.load(tmp_path / "a", str(weights), tokenizer_name=str(base))
    assert torch.equal(logits(loaded, tokenizer), logits(model, tokenizer))


@pytest.mark.parametrize("base", ["roberta"], indirect=True)
def test_labels_that_a_complete_model_does_not_record_are_given_or_those_of_a_task(base):
    with pytest.raises(UserError, match="records no names for the 2 classes"):
        lora_nlu.load(base)
    named, tokenizer, labels = lora_nlu.load(base, labels=["negative", "positive"])
    with pytest.warns(UserWarning, match="assumed to predict negative, positive, in this order.*: labels\\."):
        of_task, _, task_labels = lora_nlu.load(base, task_name="sst2")
    assert labels == task_labels == ("negative", "positive")
    assert named.config.id2label == of_task.config.id2label == {0: "negative", 1: "positive"}
    assert torch.equal(logits(named, tokenizer), logits(of_task, tokenizer))


@pytest.mark.parametrize("base", ["roberta"], indirect=True)
def test_what_contradicts_a_complete_model_or_has_no_effect_on_it_is_refused(base, tmp_path):
    wrong: dict[str, dict[str, Any]] = {
        "2 outputs, but task_name gives entailment, neutral, contradiction": {"task_name": "mnli"},
        "task_name sst: no GLUE task": {"task_name": "sst"},
        "labels and task_name both name its classes": {"task_name": "sst2", "labels": ["negative", "positive"]},
        "is a complete model: lora_alpha has no effect on it": {"task_name": "sst2", "lora_alpha": 16},
    }
    for message, given in wrong.items():
        with pytest.raises(UserError, match=message):
            lora_nlu.load(base, **given)
    with pytest.raises(UserError, match="is a complete model: --lora_relative_query has no effect on it"):
        read_source(str(base), lora_relative_query="both")
    folder = shutil.copytree(base, tmp_path / "a")
    config = json.loads((base / "config.json").read_text())
    names = {"id2label": {0: "not_entailment", 1: "entailment"}, "label2id": {"not_entailment": 0, "entailment": 1}}
    (folder / "config.json").write_text(json.dumps(config | names))
    assert lora_nlu.load(folder, task_name="rte")[2] == ("not_entailment", "entailment")  # the model's order
    with pytest.raises(UserError, match="predict not_entailment, entailment, but task_name gives negative, positive"):
        lora_nlu.load(folder, task_name="sst2")


@pytest.mark.parametrize("base", ["roberta"], indirect=True)
def test_a_complete_model_whose_weights_have_no_head_or_another_is_refused(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "a")
    config = json.loads((base / "config.json").read_text())
    ids = {f"LABEL_{i}": i for i in range(3)}
    others = {"id2label": {i: label for label, i in ids.items()}, "label2id": ids}
    (folder / "config.json").write_text(json.dumps(config | others))
    with pytest.raises(UserError, match="in its weights has 2 rows; they can't be the labels entailment, neutral"):
        lora_nlu.load(folder, task_name="mnli")
    state = {name: x for name, x in load_file(base / "model.safetensors").items() if "classifier" not in name}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="a has no trained head.\nTrain one .* or give an adapter"):
        lora_nlu.load(folder, labels=["a", "b", "c"])


@pytest.mark.parametrize("base", ["roberta"], indirect=True)
def test_adapters_of_two_bases_and_a_base_alone_are_refused(base, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(base, other)
    config = transformers.AutoConfig.from_pretrained(base)
    randomise_(transformers.RobertaForMaskedLM(config), seed=1).save_pretrained(other)
    for name, of in (("a", base), ("b", other)):
        trained(of, tmp_path / name, LABELS, apply_lora=True, lora_r=4, lora_alpha=8)
    sources = [read_source(str(tmp_path / name)) for name in "ab"]
    with pytest.raises(UserError, match="were trained on different base models"):
        load_sources(sources)
    with pytest.raises(UserError, match="was trained on another base model") as error:
        load_sources(sources[:1], str(other))
    assert "Give that model as --base" in str(error.value)
    with pytest.raises(UserError, match="has no trained head, by its config.json .a RobertaForMaskedLM"):
        lora_nlu.load(other)
