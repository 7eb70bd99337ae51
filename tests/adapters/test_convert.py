"""Adapters in other forms: they compute the same, what a form can't say is refused, nothing is written over."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from helpers import CLASSIFIERS, assert_close, ragged_batch, randomise_, tiny_config, tiny_deberta_config
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from lora_nlu.adapters.__main__ import main
from lora_nlu.adapters.adapter import LAYERS
from lora_nlu.adapters.attaching import attach_adapter
from lora_nlu.adapters.reading import read_adapter
from lora_nlu.adapters.writing import save_adapter
from lora_nlu.errors import UserError
from lora_nlu.methods.linear import merge_lora_
from lora_nlu.methods.lora import LoRALinear
from lora_nlu.methods.marking import mark_only_lora_as_trainable, mark_trainable
from lora_nlu.models.loading import base_fingerprint

ROOT = Path(__file__).parents[2]
R, ALPHA = 4, 6
LABELS = ["yes", "no", "perhaps"]
CONFIGS = {"roberta": tiny_config, "deberta": tiny_deberta_config}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(**ragged_batch([17, 3, 30, 9], pad=model.config.pad_token_id)).logits


@pytest.fixture(params=["roberta", "deberta", "deberta as PEFT reads it"])
def case(request, tmp_path) -> tuple[nn.Module, Path, Path]:
    """A trained model, the folder of its base model with a tokenizer, and its adapter folder."""
    kind, _, reading = request.param.partition(" ")
    return written(kind, tmp_path, bool(reading))


def written(kind: str, tmp_path: Path, reading: bool, **settings: int) -> tuple[nn.Module, Path, Path]:
    lora = {"apply_lora": True, "lora_r": R, "lora_alpha": ALPHA, "lora_relative_query": reading}
    config = CONFIGS[kind](**lora, **settings)
    model = randomise_(CLASSIFIERS[config.model_type][0](config))
    mark_only_lora_as_trainable(model)
    base = CLASSIFIERS[config.model_type][1](CONFIGS[kind](**settings))
    base.load_state_dict({n: t for n, t in model.state_dict().items() if "lora_" not in n})
    base.save_pretrained(tmp_path / "base")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["[UNK]", "[PAD]", "a", "b"])}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(
        tmp_path / "base"
    )
    metadata = {
        "task": "mnli", "labels": LABELS, "base_model": str(tmp_path / "base"),
        "base_fingerprint": base_fingerprint(model), "metrics": {"eval_accuracy": 0.875},
    }  # fmt: skip
    save_adapter(model, tmp_path / "adapter", metadata)
    return model, tmp_path / "base", tmp_path / "adapter"


def fresh(base: Path, theirs: bool = False) -> nn.Module:
    """The base model as it lies on disk, ours or transformers' own."""
    config = transformers.AutoConfig.from_pretrained(base)
    return CLASSIFIERS[config.model_type][theirs].from_pretrained(base, config=config)


def fresh_theirs(base: Path, labels: int) -> nn.Module:
    """transformers' RoBERTa of a folder with a head for as many labels."""
    return transformers.RobertaForSequenceClassification.from_pretrained(
        base, num_labels=labels, ignore_mismatched_sizes=True
    )


def run_program(capsys, *argv: object) -> tuple[int, str, str]:
    code = main([*map(str, argv)])
    return code, *capsys.readouterr()


def test_a_merged_model_loads_into_transformers_own_class_with_the_same_logits(case, tmp_path, capsys):
    model, base, adapter = case
    code, out, _ = run_program(capsys, "convert", adapter, tmp_path / "merged", "--to", "merged")
    assert code == 0 and "transformers" in out
    config = transformers.AutoConfig.from_pretrained(tmp_path / "merged")
    assert list(config.id2label.values()) == LABELS and not hasattr(config, "lora_r")
    theirs, report = CLASSIFIERS[config.model_type][1].from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert_close(logits(theirs), logits(model))
    assert (logits(fresh(base)) - logits(model)).abs().max() > 0.1, "the adapter changes nothing"
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")("a b")["input_ids"] == [2, 3]
    if getattr(model, "frozen_relative_query", None):
        assert config.share_att_key is False
    else:
        assert getattr(config, "share_att_key", None) in (None, True)


class GatherElements(OpRun):
    """In place of the evaluator's own, which is wrong for an axis from the end and for more than 32 columns."""

    op_domain = ""

    def _run(self, data: np.ndarray, indices: np.ndarray, axis: int) -> tuple[np.ndarray]:
        return (np.take_along_axis(data, indices, axis),)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_merged_model_in_transformers_own_class_is_exported_with_its_mask_by_torch_and_to_onnx(
    kind, tmp_path, monkeypatch
):
    """By the lines of docs/drop_in.md."""
    model, _, adapter = written(kind, tmp_path, False, num_hidden_layers=1, max_position_embeddings=514)
    monkeypatch.chdir(tmp_path)
    assert main(["convert", str(adapter), "rte-model", "--to", "merged"]) == 0
    page = (Path(__file__).parents[2] / "docs" / "drop_in.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "onnx" in block]
    variables: dict[str, Any] = {}
    exec(code, variables)

    other = ragged_batch([5, 2, 11, 6, 8], pad=model.config.pad_token_id)
    other = {name: other.get(name, torch.zeros_like(other["input_ids"])) for name in variables["batch"]}
    with torch.no_grad():
        want = model.eval()(**other).logits
        assert_close(variables["program"].module()(**other).logits, want)
    evaluator = ReferenceEvaluator("rte.onnx", new_ops=[GatherElements])
    (got,) = evaluator.run(["logits"], {name: tensor.numpy() for name, tensor in other.items()})
    assert_close(torch.from_numpy(got), want)


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_a_merged_model_has_the_loss_of_its_own_labels_whatever_the_base_was_trained_for(
    case, tmp_path, capsys, problem
):
    _, base, adapter = case
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"problem_type": problem}))
    assert run_program(capsys, "convert", adapter, tmp_path / "merged", "--to", "merged")[0] == 0
    assert (
        json.loads((tmp_path / "merged" / "config.json").read_text())["problem_type"] == "single_label_classification"
    )


def test_the_published_form_has_the_references_keys_order_and_dtype_and_gives_the_same_logits(case, tmp_path, capsys):
    model, base, adapter = case
    file = tmp_path / "lora.bin"
    code, out, err = run_program(capsys, "convert", adapter, file, "--to", "bin")
    if getattr(model, "frozen_relative_query", None) is False:  # a .bin is read the other way
        assert code == 1 and "use peft" in err and not file.exists()
        return
    assert code == 0 and "--lora_alpha 6" in out
    state = torch.load(file, weights_only=True)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert list(state) == trainable, "the order of the model's own state dict"
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    again = fresh(base)
    attach_adapter(again, read_adapter(str(file)), ALPHA, allow_new_head=False)
    assert torch.equal(logits(again), logits(model))


def test_layers_above_nine_are_in_the_order_of_their_numbers(tmp_path, capsys):
    config = tiny_config(apply_lora=True, lora_r=2, lora_alpha=4, num_hidden_layers=12)
    model = randomise_(CLASSIFIERS["roberta"][0](config))
    mark_only_lora_as_trainable(model)
    save_adapter(model, tmp_path / "adapter", {})
    assert run_program(capsys, "convert", tmp_path / "adapter", tmp_path / "lora.bin", "--to", "bin")[0] == 0
    state = torch.load(tmp_path / "lora.bin", weights_only=True)
    assert list(state) == [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(state) == 52


def test_a_published_file_becomes_a_folder_with_the_same_logits_which_peft_loads_or_refuses(case, tmp_path, capsys):
    model, base, adapter = case
    file = tmp_path / "lora.bin"
    if run_program(capsys, "convert", adapter, file, "--to", "bin")[0]:
        file = adapter
    alpha = ["--lora_alpha", ALPHA] if file.suffix == ".bin" else []
    code, out, err = run_program(capsys, "convert", file, tmp_path / "peft", "--to", "peft", *alpha)
    assert code == 0, err
    again = fresh(base)
    attach_adapter(again, read_adapter(str(tmp_path / "peft")), None, allow_new_head=False)
    assert torch.equal(logits(again), logits(model))
    if getattr(model, "frozen_relative_query", None):
        with pytest.raises((KeyError, ValueError)):
            PeftModel.from_pretrained(fresh(base, theirs=True), str(tmp_path / "peft"))
    else:
        assert_close(logits(PeftModel.from_pretrained(fresh(base, theirs=True), str(tmp_path / "peft"))), logits(model))


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


def test_inspect_prints_layers_rank_alpha_labels_base_metric_size_and_values_that_are_not_finite(
    case, tmp_path, capsys
):
    model, base, adapter = case
    code, out, _ = run_program(capsys, "inspect", adapter)
    table = dict(line.strip().split("  ", 1) for line in out.splitlines())
    table = {name: value.strip() for name, value in table.items()}
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    lora = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    assert code == 0 and table["layers with LoRA"] == "2" and table["modules with LoRA"] == "4: query, value"
    assert table["rank"] == "4" and table["alpha"] == "6"
    assert table["parameters"] == f"{count:,}, {lora:,} of them in the encoder" and table["not finite"] == "none"
    assert table["labels"] == "yes, no, perhaps" and table["base model"] == str(base) and table["accuracy"] == "0.8750"
    assert int(table["bytes"].replace(",", "")) == sum(path.stat().st_size for path in adapter.iterdir())
    state = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    name = next(iter(state))
    torch.save(state | {name: state[name] * float("nan")}, tmp_path / "broken.bin")
    code, out, _ = run_program(capsys, "inspect", tmp_path / "broken.bin")
    assert code == 0 and f"1 tensors, {name} first" in out and "the file doesn't record it" in out


@pytest.mark.parametrize("to", ["peft", "bin", "merged"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_converted(to, value, case, tmp_path, capsys):
    _, base, adapter = case
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in tensors if name.endswith("lora_B.weight"))
    tensors[name][0, 1] = value
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    metadata = json.loads((adapter / "run_metadata.json").read_text())
    del metadata["weights_fingerprint"]  # an older folder has none
    (adapter / "run_metadata.json").write_text(json.dumps(metadata))
    code, _, err = run_program(capsys, "convert", adapter, tmp_path / "new", "--to", to)
    assert code == 1 and "not finite" in err and f"{name[17:-7]} first" in err and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["convert", "{adapter}", "{adapter}", "--to", "peft"], "is there already"),
        (["convert", "{adapter}", "{file}", "--to", "bin"], "is there already"),
        (["convert", "{file}", "{new}", "--to", "peft"], "Give --lora_alpha"),
        (["convert", "{file}", "{new}", "--to", "merged", "--lora_alpha", "6"], "give --base"),
        (["convert", "{adapter}", "{new}", "--to", "bin", "--lora_alpha", "7"], "lora_alpha 6, not 7"),
        (["convert", "{adapter}", "{new}", "--to", "merged", "--lora_alpha", "7"], "lora_alpha 6, not 7"),
        (["convert", "{adapter}", "{new}", "--to", "merged", "--base", "{adapter}"], "is an adapter"),
        (["inspect", "{new}"], "no such file or folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_converted_is_refused_in_a_line_or_three_and_nothing_is_written(
    argv, words, case, tmp_path, capsys
):
    model, _, adapter = case
    torch.save({n: p.detach() for n, p in model.named_parameters() if p.requires_grad}, tmp_path / "file.bin")
    places = {"adapter": adapter, "file": tmp_path / "file.bin", "new": tmp_path / "new"}
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    code, _, err = run_program(capsys, *(word.format(**places) for word in argv))
    assert code == 1 and words in err and err.strip().count("\n") < 3, err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda state: {n: t for n, t in state.items() if "lora_" not in n}, "no LoRA matrices"),
        (
            lambda state: {n: t for n, t in state.items() if not n.endswith("1.attention.self.value.lora_B")},
            "lacks rob",
        ),
        (lambda state: {n: t[0] if n.endswith("lora_A") else t for n, t in state.items()}, "expected [r, in]"),
        (lambda state: {n: t.sum() if n.endswith("lora_A") else t for n, t in state.items()}, "expected [r, in]"),
        (lambda state: {n: t.t() if n.endswith("lora_B") else t for n, t in state.items()}, "expected [r, in]"),
    ],
    ids=["head alone", "half a pair", "one dimension", "no dimension", "transposed"],
)
def test_a_file_that_is_no_complete_adapter_is_refused_where_it_is_read(spoil, words, tmp_path, capsys):
    model = randomise_(CLASSIFIERS["roberta"][0](tiny_config(apply_lora=True, lora_r=R, lora_alpha=ALPHA)))
    mark_only_lora_as_trainable(model)
    state = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    torch.save(spoil(state), tmp_path / "spoilt.bin")
    for argv in (["inspect"], ["convert", "--to", "bin", "--lora_alpha", "6", tmp_path / "new.bin"]):
        code, _, err = run_program(capsys, argv[0], tmp_path / "spoilt.bin", *argv[1:])
        assert code == 1 and words in err and err.strip().count("\n") < 3, err
    assert not (tmp_path / "new.bin").exists()


@pytest.mark.parametrize(
    "content", [{"metrics": [1]}, {"metrics": {"a": "b"}}, {"task": ["rte"]}, {"base_model": 3}], ids=str
)
def test_metadata_of_another_kind_than_runs_write_is_refused(content, tmp_path, capsys):
    model = randomise_(CLASSIFIERS["roberta"][0](tiny_config(apply_lora=True, lora_r=R, lora_alpha=ALPHA)))
    mark_only_lora_as_trainable(model)
    save_adapter(model, tmp_path, content)
    code, _, err = run_program(capsys, "inspect", tmp_path)
    assert code == 1 and next(iter(content)) in err and err.strip().count("\n") < 3, err


def table(out: str) -> dict[str, str]:
    """What inspect printed, by the first column."""
    return {name: value.strip() for name, value in (line.strip().split("  ", 1) for line in out.splitlines())}


def inspected(capsys, source: Path) -> dict[str, str]:
    code, out, err = run_program(capsys, "inspect", source)
    assert code == 0, err
    return table(out)


# ------------------------------------------------------------------------------------------- other models' adapters

SMALL = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
OTHERS = {
    "bert": (transformers.BertForSequenceClassification, transformers.BertConfig, ["query", "value"]),
    "deberta": (transformers.DebertaForSequenceClassification, transformers.DebertaConfig, ["in_proj"]),
    "model": (transformers.LlamaForSequenceClassification, transformers.LlamaConfig, ["q_proj", "v_proj"]),
    "encoder": (transformers.DebertaModel, transformers.DebertaConfig, ["in_proj"]),
}


@pytest.fixture(params=OTHERS)
def other(request, tmp_path) -> tuple[str, Path]:
    """The first part of the names in a PEFT folder of a model that isn't here, and the folder."""
    model_class, config_class, targets = OTHERS[request.param]
    model = get_peft_model(
        model_class(config_class(**SMALL)), LoraConfig(r=R, lora_alpha=ALPHA, target_modules=targets)
    )
    model.save_pretrained(tmp_path / "peft")
    return request.param, tmp_path / "peft"


def test_inspect_says_that_no_model_here_reads_another_models_adapter(other, capsys):
    name, folder = other
    said_of_it = inspected(capsys, folder)["model"]
    assert said_of_it.startswith(f"none here: no RoBERTa or DeBERTa-V2 has the layer {name}."), said_of_it


@pytest.mark.parametrize("to", ["peft", "bin", "merged"])
def test_another_models_adapter_is_not_converted(to, other, tmp_path, capsys):
    name, folder = other
    code, _, err = run_program(capsys, "convert", folder, tmp_path / "new", "--to", to)
    assert code == 1 and f"no RoBERTa or DeBERTa-V2 has the layer {name}." in err and not (tmp_path / "new").exists()


def test_a_published_file_of_a_bert_or_of_two_models_at_once_fits_no_model_here(tmp_path, capsys):
    place = "{}.encoder.layer.0.attention.self.{}.lora_{}"

    def file(path: Path, *layers: tuple[str, str]) -> Path:
        shapes = {"A": (R, 32), "B": (32, R)}
        torch.save({place.format(*layer, m): torch.ones(shapes[m]) for layer in layers for m in shapes}, path)
        return path

    bert = file(tmp_path / "bert.bin", ("bert", "query"), ("bert", "value"))
    both = file(tmp_path / "both.bin", ("roberta", "query"), ("bert", "value"))
    mixed = file(tmp_path / "mixed.bin", ("roberta", "query_proj"), ("roberta", "value_proj"))
    for path, layer in ((bert, "bert."), (both, "bert."), (mixed, "roberta.encoder.layer.0.attention.self.query_proj")):
        assert f"none here: no RoBERTa or DeBERTa-V2 has the layer {layer}" in inspected(capsys, path)["model"]
        for to in ("peft", "bin", "merged"):
            code, _, err = run_program(capsys, "convert", path, tmp_path / "new", "--to", to, "--lora_alpha", ALPHA)
            assert code == 1 and f"has the layer {layer}" in err and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "config",
    [tiny_config(), tiny_deberta_config(), tiny_deberta_config(share_att_key=False, embedding_size=16)],
    ids=["roberta", "deberta", "deberta with more layers"],
)
def test_the_supported_layers_are_the_linear_layers_of_the_models_encoder(config):
    model = CLASSIFIERS[config.model_type][0](config)
    prefix = model.base_model_prefix
    linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith(f"{prefix}.")}
    assert len(linear) >= 12 and all(LAYERS[prefix].fullmatch(name) for name in linear)


def test_the_model_type_of_an_adapter_is_that_of_its_model(case, capsys):
    model, _, adapter = case
    names = {"roberta": "RoBERTa", "deberta-v2": "DeBERTa-V2"}
    assert inspected(capsys, adapter)["model"] == names[model.config.model_type]


# ------------------------------------------------------------------------------------------------------ --base MODEL


def anonymous(adapter: Path, to: Path) -> Path:
    """A copy of an adapter folder as PEFT writes it: with no word of a run."""
    shutil.copytree(adapter, to)
    (to / "run_metadata.json").unlink()
    config = json.loads((to / "adapter_config.json").read_text())
    (to / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    return to


def test_a_base_named_on_the_command_line_is_recorded_with_its_fingerprint(case, tmp_path, capsys):
    model, base, adapter = case
    source = anonymous(adapter, tmp_path / "source")
    assert inspected(capsys, source)["base model"] == "unknown"
    code, _, err = run_program(capsys, "convert", source, tmp_path / "new", "--to", "peft", "--base", base)
    assert code == 0, err
    rows = inspected(capsys, tmp_path / "new")
    assert rows["base model"] == str(base) and rows["base fingerprint"] == base_fingerprint(model)
    assert json.loads((tmp_path / "new" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    assert "for base (a local model)" in (tmp_path / "new" / "README.md").read_text()
    other = randomise_(fresh(base), seed=8)
    with pytest.raises(UserError, match="was trained on another base model"):
        attach_adapter(other, read_adapter(str(tmp_path / "new")), None, allow_new_head=False)


@pytest.mark.parametrize("to", ["peft", "merged"])
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"hidden_size": 64}, "another base model's adapter"),
        ({"num_hidden_layers": 1}, "2 in the file, 1 in the"),
        ({"num_hidden_layers": 3}, "2 in the file, 3 in the"),
    ],
    ids=str,
)
def test_a_base_that_the_adapter_does_not_fit_is_refused(settings, words, to, case, tmp_path, capsys):
    model, _, adapter = case
    source = anonymous(adapter, tmp_path / "source")
    kind = "roberta" if model.config.model_type == "roberta" else "deberta"
    config = CONFIGS[kind](**settings)
    CLASSIFIERS[config.model_type][1](config).save_pretrained(tmp_path / "other")
    code, _, err = run_program(capsys, "convert", source, tmp_path / "new", "--to", to, "--base", tmp_path / "other")
    assert code == 1 and words in err and not (tmp_path / "new").exists(), err


def test_a_base_with_another_fingerprint_or_of_another_kind_is_refused(case, tmp_path, capsys):
    _, base, adapter = case
    theirs = randomise_(fresh(base, theirs=True), seed=9)
    theirs.save_pretrained(tmp_path / "other")
    transformers.BertModel(transformers.BertConfig(**SMALL)).save_pretrained(tmp_path / "bert")
    for other, words in (("other", "was trained on another base model"), ("bert", "a 'bert' model")):
        code, _, err = run_program(
            capsys, "convert", adapter, tmp_path / "new", "--to", "peft", "--base", tmp_path / other
        )
        assert code == 1 and words in err and "--model_name_or_path" not in err.split("\n")[0], err
        assert not (tmp_path / "new").exists()


def test_a_base_on_an_unreachable_hub_is_recorded_and_a_line_says_that_it_is_not_checked(
    case, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    _, _, adapter = case
    code, out, err = run_program(
        capsys, "convert", adapter, tmp_path / "new", "--to", "peft", "--base", "someone/a-base"
    )
    assert code == 0 and "--base someone/a-base: recorded, but not available here" in out, err
    assert inspected(capsys, tmp_path / "new")["base model"] == "someone/a-base"
    assert "base_model: someone/a-base" in (tmp_path / "new" / "README.md").read_text()
    for base in (tmp_path / "nowhere", "./nowhere", "a/b/c"):
        code, _, err = run_program(capsys, "convert", adapter, tmp_path / "no", "--to", "peft", "--base", base)
        assert code == 1 and f"--base {base}: neither a folder" in err and not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["{adapter}", "--to", "bin", "--base", "{base}"], "--base: a .bin records no base model"),
        (["{bitfit}", "--to", "peft", "--lora_alpha", "6"], "--lora_alpha: {bitfit} contains bitfit, which has none"),
        (["{bitfit}", "--to", "merged", "--lora_alpha", "6"], "--lora_alpha: {bitfit} contains bitfit, which has none"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_flag_that_means_nothing_for_a_form_ends_with_code_2(argv, words, case, tmp_path, capsys):
    _, base, adapter = case
    places = {"adapter": adapter, "base": base, "bitfit": trained_by(tmp_path / "bitfit", apply_bitfit=True)[1]}
    source, *flags = (word.format(**places) for word in argv)
    code, _, err = run_program(capsys, "convert", source, tmp_path / "new", *flags)
    assert code == 2 and words.format(**places) in err and not (tmp_path / "new").exists()


def test_the_base_that_only_a_peft_config_names_is_read(case, tmp_path, capsys):
    model, base, adapter = case
    source = anonymous(adapter, tmp_path / "source")
    config = json.loads((source / "adapter_config.json").read_text())
    (source / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    assert inspected(capsys, source)["base model"] == str(base)
    assert run_program(capsys, "convert", source, tmp_path / "peft", "--to", "peft")[0] == 0
    assert "unnamed base model" not in (tmp_path / "peft" / "README.md").read_text()
    assert run_program(capsys, "convert", source, tmp_path / "merged", "--to", "merged")[0] == 0  # no --base
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert_close(logits(theirs), logits(model))


# ----------------------------------------------------------------------------------------- what inspect and cards say


def trained_by(folder: Path, kind: str = "roberta", **settings: object) -> tuple[nn.Module, Path]:
    """A model with a method's part at random, and the folder it was saved in."""
    config = CONFIGS[kind](**settings)
    model = randomise_(CLASSIFIERS[config.model_type][0](config))
    mark_trainable(model)
    save_adapter(model, folder, {"base_model": "someone/a-base"})
    return model, folder


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        ({"head_only": True}, {"method": "head"}),
        ({"apply_bitfit": True}, {"method": "bitfit", "biases": None}),
        (
            {"apply_adapter": True, "adapter_type": "houlsby", "adapter_size": 5},
            {"method": "houlsby", "adapter size": "5", "layers with adapters": "2", "adapters": "4"},
        ),
        (
            {"apply_adapter": True, "adapter_type": "pfeiffer", "adapter_size": 3},
            {"method": "pfeiffer", "adapter size": "3", "layers with adapters": "2", "adapters": "2"},
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) and "method" not in value else "",
)
def test_inspect_of_the_other_methods_counts_what_they_train(settings, rows, kind, tmp_path, capsys):
    model, folder = trained_by(tmp_path / "adapter", kind, **settings)
    got = inspected(capsys, folder)
    encoder = {n: p for n, p in model.base_model.named_parameters() if p.requires_grad}
    total, within = (sum(p.numel() for p in ps if p.requires_grad) for ps in (model.parameters(), encoder.values()))
    assert got["parameters"] == f"{total:,}, {within:,} of them in the encoder"
    assert "layers with LoRA" not in got and "alpha" not in got
    for name, value in rows.items():
        assert got[name] == (value or f"{within:,} in {len(encoder)} tensors")
    if rows["method"] != "bitfit":
        assert "biases" not in got


def test_conversion_of_a_deberta_without_lora_assumes_nothing_about_lora(tmp_path, capsys):
    _, folder = trained_by(tmp_path / "adapter", "deberta", apply_bitfit=True)
    code, out, err = run_program(capsys, "convert", folder, tmp_path / "peft", "--to", "peft")
    assert code == 0 and "relative query" not in out + err, out + err


def test_several_alphas_and_ranks_and_rslora_are_all_printed(tmp_path, capsys):
    settings = {
        "rank_pattern": {"value": 2},
        "alpha_pattern": {r"layer\.1\..*": 4.5},
        "use_rslora": True,
        "bias": "all",
    }
    lora = LoraConfig(task_type="SEQ_CLS", r=R, lora_alpha=ALPHA, target_modules=["query", "value"], **settings)
    get_peft_model(transformers.RobertaForSequenceClassification(tiny_config()), lora).save_pretrained(tmp_path)
    rows = inspected(capsys, tmp_path)
    assert (
        rows["alpha"] == "4.5, 6"
        and rows["rank"] == "2, 4"
        and rows["scaling"].endswith("(alpha / sqrt(rank), rslora)")
    )
    assert rows["layers with LoRA"] == "2" and rows["modules with LoRA"] == "4: query, value"
    assert rows["biases"].endswith("tensors")
    code, _, err = run_program(capsys, "convert", tmp_path, tmp_path / "lora.bin", "--to", "bin")
    assert code == 1 and "has several (or rslora)" in err


def test_layers_are_counted_apart_from_the_modules_in_them(tmp_path, capsys):
    """RoBERTa-base's published file: 12 layers, 24 modules, 48 matrices."""
    trained_by(tmp_path, apply_lora=True, lora_r=2, lora_alpha=4, num_hidden_layers=12)
    rows = inspected(capsys, tmp_path)
    assert rows["layers with LoRA"] == "12" and rows["modules with LoRA"] == "24: query, value"


def test_the_alpha_that_a_bin_is_to_be_read_with_is_that_of_the_layers(case, tmp_path, capsys):
    """A pattern may give every layer another alpha than lora_alpha."""
    model, base, adapter = case
    config = json.loads((adapter / "adapter_config.json").read_text())
    pattern = {"(query|value)(_proj)?": ALPHA}
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 50, "alpha_pattern": pattern}))
    code, out, err = run_program(capsys, "convert", adapter, tmp_path / "lora.bin", "--to", "bin")
    if getattr(model, "frozen_relative_query", None) is False:
        assert code == 1
        return
    assert code == 0 and f"load it with --lora_alpha {ALPHA}." in out, err
    again = fresh(base)
    attach_adapter(again, read_adapter(str(tmp_path / "lora.bin")), ALPHA, allow_new_head=False)
    assert torch.equal(logits(again), logits(model))


def test_converting_to_a_bin_what_it_cannot_contain_is_refused_or_reported(tmp_path, capsys):
    model = randomise_(CLASSIFIERS["roberta"][0](tiny_config(apply_lora=True, lora_r=R, lora_alpha=ALPHA)))
    mark_only_lora_as_trainable(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or name.endswith("bias"))
    save_adapter(model, tmp_path / "adapter", {})
    code, _, err = run_program(capsys, "convert", tmp_path / "adapter", tmp_path / "lora.bin", "--to", "bin")
    assert code == 1 and "can't store roberta." in err and "bias, which was trained too" in err
    assert not (tmp_path / "lora.bin").exists()


@pytest.mark.parametrize("case", ["roberta", "deberta"], indirect=True)
@pytest.mark.parametrize("alpha", [[], ["--lora_alpha", ALPHA]], ids=["no alpha", "alpha"])
def test_a_bin_is_rewritten_in_order_and_in_fp32_without_its_alpha(alpha, case, tmp_path, capsys):
    model, _, _ = case
    want = {n: p.detach().bfloat16() for n, p in model.named_parameters() if p.requires_grad}
    torch.save({f"module.{n}": want[n] for n in reversed(want)}, tmp_path / "old.bin")
    code, out, err = run_program(capsys, "convert", tmp_path / "old.bin", tmp_path / "new.bin", "--to", "bin", *alpha)
    assert code == 0, err
    assert ("load it with --lora_alpha 6" if alpha else "load it with --lora_alpha ALPHA") in out
    state = torch.load(tmp_path / "new.bin", weights_only=True)
    assert [*state] == [*want] and all(torch.equal(state[n], want[n].float()) for n in want)


def test_a_bin_still_needs_its_alpha_where_that_is_stored_or_used(case, tmp_path, capsys):
    model, base, _ = case
    torch.save({n: p.detach() for n, p in model.named_parameters() if p.requires_grad}, tmp_path / "old.bin")
    for to in (["peft"], ["merged", "--base", base]):
        code, _, err = run_program(capsys, "convert", tmp_path / "old.bin", tmp_path / "new", "--to", *to)
        assert code == 1 and "Give --lora_alpha" in err and not (tmp_path / "new").exists()


def test_the_bytes_are_those_of_the_file_that_is_read_whatever_its_name(case, tmp_path, capsys):
    model, _, adapter = case
    weights = adapter / "adapter_model.safetensors"
    torch.save(load_file(weights), adapter / "adapter_model.bin")
    weights.unlink()
    assert int(inspected(capsys, adapter)["bytes"].replace(",", "")) == sum(p.stat().st_size for p in adapter.iterdir())
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    size = (tmp_path / "pytorch_model.bin").stat().st_size
    assert inspected(capsys, tmp_path)["bytes"] == f"{size:,}"


def test_a_line_says_that_the_base_weights_of_a_complete_checkpoint_were_not_compared(case, tmp_path, capsys):
    model, base, _ = case
    torch.save(model.state_dict(), tmp_path / "complete.bin")
    flags = ["--to", "peft", "--lora_alpha", ALPHA]
    code, out, err = run_program(capsys, "convert", tmp_path / "complete.bin", tmp_path / "one", *flags)
    assert code == 0 and "base weights are not checked" in out, err
    if getattr(model, "frozen_relative_query", True):  # a .bin is read as the reference trained it
        code, out, err = run_program(
            capsys, "convert", tmp_path / "complete.bin", tmp_path / "two", *flags, "--base", base
        )
        assert code == 0 and "base weights are not checked" not in out, err
    theirs = randomise_(fresh(base, theirs=True), seed=9)
    theirs.save_pretrained(tmp_path / "other")
    code, _, err = run_program(
        capsys, "convert", tmp_path / "complete.bin", tmp_path / "no", *flags, "--base", tmp_path / "other"
    )
    assert code == 1 and "base weights are not this model's" in err


HOSTILE = "\x1b[31mred\x07\n| a | b |\n---\n\u202e" + "x" * 1_000_000


@pytest.mark.parametrize("case", ["roberta"], indirect=True)
@pytest.mark.parametrize("where", ["labels", "task", "base_model", "base_fingerprint", "metrics", "base_model_name"])
def test_text_from_a_foreign_file_is_escaped_and_cut_before_it_is_printed(where, case, tmp_path, capsys):
    _, _, adapter = case
    if where == "base_model_name":
        (adapter / "run_metadata.json").unlink()
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": HOSTILE}))
    else:
        value = {"labels": [HOSTILE, "no", "perhaps"], "metrics": {HOSTILE: 10**400}}.get(where, HOSTILE)
        metadata = json.loads((adapter / "run_metadata.json").read_text())
        (adapter / "run_metadata.json").write_text(json.dumps(metadata | {where: value}))
    code, out, err = run_program(capsys, "inspect", adapter)
    printed = out + err
    assert code == 0 and len(printed) < 10_000 and all(c.isprintable() or c == "\n" for c in printed)
    assert run_program(capsys, "convert", adapter, tmp_path / "new", "--to", "peft")[0] == 0
    text = (tmp_path / "new" / "README.md").read_text()
    assert len(text) < 10_000 and all(c.isprintable() or c == "\n" for c in text)
    assert text.split("---\n")[1].count("\n") < 12, "it got into the card's header"
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.replace("\\|", "").count("|") == 3 for line in rows), "it broke the card's table"


@pytest.mark.parametrize("case", ["roberta"], indirect=True)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", HOSTILE),
        ("init_lora_weights", HOSTILE),
        (HOSTILE, HOSTILE),
        ("bias", HOSTILE),
        ("lora_alpha", HOSTILE),
        ("target_modules", HOSTILE + "("),
        ("rank_pattern", {HOSTILE + "(": 2}),
        ("use_rslora", HOSTILE),
        ("layers_to_transform", HOSTILE),
        ("base_model_name_or_path", [HOSTILE]),
        ("task_type", "TOKEN_CLS" + HOSTILE),
    ],
    ids=lambda value: str(value)[:20].encode("unicode_escape").decode(),
)
def test_text_from_a_foreign_config_is_escaped_and_cut_in_the_error_message(key, value, case, capsys):
    _, _, adapter = case
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {key: value}))
    code, _, err = run_program(capsys, "inspect", adapter)
    assert code == 1 and len(err) < 1000 and all(c.isprintable() or c == "\n" for c in err), err[:2000]
    assert err.strip().count("\n") < 3


def test_a_cards_command_names_a_base_that_others_have_or_leaves_its_place_open(case, tmp_path, capsys):
    _, base, adapter = case
    assert run_program(capsys, "convert", adapter, tmp_path / "local", "--to", "peft")[0] == 0
    text = (tmp_path / "local" / "README.md").read_text()
    assert str(base.parent) not in text and "--model_name_or_path BASE_MODEL " in text and "base_model:" not in text
    assert run_program(capsys, "convert", anonymous(adapter, tmp_path / "a"), tmp_path / "none", "--to", "peft")[0] == 0
    text = (tmp_path / "none" / "README.md").read_text()
    assert "for an unnamed base model on an unnamed task" in text and "| labels | unknown |" in text
    assert "--model_name_or_path BASE_MODEL " in text


SNIPPET = next(block for block in (ROOT / "README.md").read_text().split("```python\n") if "read_adapter" in block)


@pytest.mark.parametrize("case", ["roberta"], indirect=True)
@pytest.mark.parametrize("kind", ["folder", "bin", "regression"])
def test_the_readmes_python_runs_on_a_folder_and_on_a_published_file_and_is_right(kind, case, tmp_path, capsys):
    model, base, adapter = case
    code, path = SNIPPET.split("```")[0], adapter
    if kind == "bin":
        path = tmp_path / "mnli.bin"
        assert run_program(capsys, "convert", adapter, path, "--to", "bin")[0] == 0
        line = next(line for line in code.splitlines() if line.startswith("# a published .bin records neither: "))
        said_there = line.partition(": ")[2].replace("), 16", f"), {ALPHA}").replace("mnli.bin", str(path))
        code = code.replace(line, said_there)
    elif kind == "regression":
        model = randomise_(
            CLASSIFIERS["roberta"][0](tiny_config(apply_lora=True, lora_r=R, lora_alpha=5, num_labels=1))
        )
        mark_only_lora_as_trainable(model)
        path = tmp_path / "scores"
        save_adapter(model, path, {"labels": []})
        encoder = {n: t for n, t in model.state_dict().items() if n.startswith("roberta.") and "lora_" not in n}
        theirs = transformers.RobertaForSequenceClassification(tiny_config())
        theirs.load_state_dict(encoder, strict=False)
        theirs.roberta.save_pretrained(base)
    assert '"roberta-base"' in code and '"output/roberta_base_rte"' in code
    names: dict = {}
    exec(code.replace('"output/roberta_base_rte"', f'"{path}"').replace('"roberta-base"', f'"{base}"'), names)
    with torch.no_grad():
        want = model.eval()(**names["batch"]).logits
        theirs = PeftModel.from_pretrained(fresh_theirs(base, want.shape[1]), str(path if kind != "bin" else adapter))
        assert_close(theirs.eval()(**names["batch"]).logits, want)
    assert torch.equal(names["logits"], want)
    labels = {"folder": LABELS, "bin": ["entailment", "neutral", "contradiction"]}.get(kind)
    assert capsys.readouterr().out.splitlines()[-1] == (labels[want.argmax()] if labels else str(names["logits"]))


def test_the_readmes_command_starts_the_program(case):
    command = [sys.executable, "-m", "lora_nlu.adapters", "inspect", str(case[2])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "layers with LoRA" in done.stdout, done.stderr


# ------------------------------------------------------------------ the reference implementation's complete checkpoints


@pytest.mark.parametrize("case", ["roberta", "deberta"], indirect=True)
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("as_folder", [False, True])
def test_the_update_in_a_complete_checkpoint_counts_once_whether_it_was_saved_merged_or_not(
    merged, as_folder, case, tmp_path
):
    model, base, _ = case
    want = logits(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if merged:
        merge_lora_(model)
        for name, module in model.named_modules():
            if isinstance(module, LoRALinear):
                state[f"{name}.weight"] = module.weight.detach().clone()
    path = tmp_path / "pytorch_model.bin"
    torch.save(state, path)
    again = fresh(base)
    notes = attach_adapter(again, read_adapter(str(tmp_path if as_folder else path)), ALPHA, allow_new_head=False)
    assert torch.equal(logits(again), want)
    assert ["contain the update (merged" in note for note in notes] == ([True] if merged else [])


def test_a_complete_checkpoint_of_another_base_model_is_refused(case, tmp_path):
    model, base, _ = case
    torch.save(randomise_(model, seed=9).state_dict(), tmp_path / "complete.bin")
    with pytest.raises(UserError, match="base weights are not this model's"):
        attach_adapter(fresh(base), read_adapter(str(tmp_path / "complete.bin")), ALPHA, allow_new_head=False)


# ----------------------------------------------------------------------------------------------------- fingerprints


def test_a_fingerprint_is_the_bases_own_whatever_lora_head_and_dtype(case):
    model, base, _ = case
    assert base_fingerprint(fresh(base)) == base_fingerprint(model) == base_fingerprint(fresh(base).bfloat16())
    other = fresh(base)
    with torch.no_grad():
        other.classifier.register_parameter("unused", nn.Parameter(torch.zeros(1)))
        next(p for n, p in other.base_model.named_parameters() if n.endswith("layer.1.output.dense.bias")).add_(0.1)
    assert base_fingerprint(other) != base_fingerprint(model)


def test_a_bin_that_does_not_record_its_relative_query_is_read_by_the_flag_and_a_line_says_so(case, tmp_path, capsys):
    model, base, adapter = case
    torch.save(read_adapter(str(adapter)).state, tmp_path / "lora.bin")
    frozen = getattr(model, "frozen_relative_query", None)
    flag = [] if frozen in (True, None) else ["--lora_relative_query"]
    flags = ["--lora_alpha", ALPHA, "--base", base, *flag]
    for to in ("peft", "merged"):
        code, out, err = run_program(capsys, "convert", tmp_path / "lora.bin", tmp_path / to, "--to", to, *flags)
        assert code == 0, err
        assert ("can't confirm" in out) == (frozen is not None)
    if frozen is not None:
        kind = "LORA_FROZEN_RELATIVE_QUERY" if frozen else "LORA"
        assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["peft_type"] == kind
        assert inspected(capsys, tmp_path / "lora.bin")["relative query"] == "unknown: the file doesn't record it"
    again = fresh(base)
    attach_adapter(again, read_adapter(str(tmp_path / "peft")), None, allow_new_head=False)
    assert torch.equal(logits(again), logits(model))
    assert_close(logits(fresh(tmp_path / "merged", theirs=True)), logits(model))
    command = ["convert", adapter, tmp_path / "no", "--to", "peft", "--lora_relative_query"]
    assert run_program(capsys, *command)[0] == 2
