"""Adapters in other forms: they compute the same, what a form can't say is refused, nothing is written over."""

import json
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from helpers import CLASSIFIERS, assert_close, ragged_batch, randomise_, tiny_config, tiny_deberta_config
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from lora_nlu.adapters import attach_adapter, base_fingerprint, read_adapter, save_adapter
from lora_nlu.convert import main
from lora_nlu.errors import UserError
from lora_nlu.lora import LoRALinear, mark_only_lora_as_trainable, merge_lora_

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
    lora = {"apply_lora": True, "lora_r": R, "lora_alpha": ALPHA, "lora_relative_query": bool(reading)}
    config = CONFIGS[kind](**lora)
    model = randomise_(CLASSIFIERS[config.model_type][0](config))
    mark_only_lora_as_trainable(model)
    base = CLASSIFIERS[config.model_type][1](CONFIGS[kind]())
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


def said(capsys, *argv: object) -> tuple[int, str, str]:
    code = main([*map(str, argv)])
    return code, *capsys.readouterr()


def test_a_merged_model_loads_into_transformers_own_class_with_the_same_logits(case, tmp_path, capsys):
    model, base, adapter = case
    code, out, _ = said(capsys, "convert", adapter, tmp_path / "merged", "--to", "merged")
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


def test_the_published_form_has_the_references_keys_order_and_dtype_and_gives_the_same_logits(case, tmp_path, capsys):
    model, base, adapter = case
    file = tmp_path / "lora.bin"
    code, out, err = said(capsys, "convert", adapter, file, "--to", "bin")
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
    assert said(capsys, "convert", tmp_path / "adapter", tmp_path / "lora.bin", "--to", "bin")[0] == 0
    state = torch.load(tmp_path / "lora.bin", weights_only=True)
    assert list(state) == [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(state) == 52


def test_a_published_file_becomes_a_folder_with_the_same_logits_which_peft_loads_or_refuses(case, tmp_path, capsys):
    model, base, adapter = case
    file = tmp_path / "lora.bin"
    if said(capsys, "convert", adapter, file, "--to", "bin")[0]:
        file = adapter
    alpha = ["--lora_alpha", ALPHA] if file.suffix == ".bin" else []
    code, out, err = said(capsys, "convert", file, tmp_path / "peft", "--to", "peft", *alpha)
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
    assert said(capsys, "convert", adapter, tmp_path / "peft", "--to", "peft")[0] == 0
    card = huggingface_hub.ModelCard.load(tmp_path / "peft" / "README.md")
    frozen = getattr(model, "frozen_relative_query", None)
    assert card.data.library_name == ("lora-nlu" if frozen else "peft")
    assert card.data.base_model == "someone/a-base" and card.data.datasets == ["nyu-mll/glue"]
    assert "accuracy: 0.8750" in card.text and "yes, no, perhaps" in card.text
    assert ("refuses to load" in card.text) == bool(frozen)


def test_inspect_tells_layers_rank_alpha_labels_base_metric_size_and_what_is_not_finite(case, tmp_path, capsys):
    model, base, adapter = case
    code, out, _ = said(capsys, "inspect", adapter)
    table = dict(line.strip().split("  ", 1) for line in out.splitlines())
    table = {name: value.strip() for name, value in table.items()}
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    lora = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    assert code == 0 and table["layers with LoRA"] == "4" and table["rank"] == "4" and table["alpha"] == "6"
    assert table["parameters"] == f"{count:,}, {lora:,} of them in the encoder" and table["not finite"] == "none"
    assert table["labels"] == "yes, no, perhaps" and table["base model"] == str(base) and table["accuracy"] == "0.8750"
    assert int(table["bytes"].replace(",", "")) == sum(path.stat().st_size for path in adapter.iterdir())
    state = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    name = next(iter(state))
    torch.save(state | {name: state[name] * float("nan")}, tmp_path / "broken.bin")
    code, out, _ = said(capsys, "inspect", tmp_path / "broken.bin")
    assert code == 0 and f"1 tensors, {name} first" in out and "the file doesn't say" in out


@pytest.mark.parametrize("to", ["peft", "bin", "merged"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_converted(to, value, case, tmp_path, capsys):
    _, base, adapter = case
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in tensors if name.endswith("lora_B.weight"))
    tensors[name][0, 1] = value
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    code, _, err = said(capsys, "convert", adapter, tmp_path / "new", "--to", to)
    assert code == 1 and "not finite" in err and f"{name[17:-7]} first" in err and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["convert", "{adapter}", "{adapter}", "--to", "peft"], "is there already"),
        (["convert", "{adapter}", "{file}", "--to", "bin"], "is there already"),
        (["convert", "{file}", "{new}", "--to", "peft"], "Give --lora_alpha"),
        (["convert", "{file}", "{new}", "--to", "merged", "--lora_alpha", "6"], "give --base"),
        (["convert", "{adapter}", "{new}", "--to", "bin", "--lora_alpha", "7"], "lora_alpha 6, not 7"),
        (["convert", "{adapter}", "{new}", "--to", "merged", "--base", "{adapter}"], "neither a folder with a config"),
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
    code, _, err = said(capsys, *(word.format(**places) for word in argv))
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
def test_a_file_that_is_no_whole_adapter_is_refused_where_it_is_read(spoil, words, tmp_path, capsys):
    model = randomise_(CLASSIFIERS["roberta"][0](tiny_config(apply_lora=True, lora_r=R, lora_alpha=ALPHA)))
    mark_only_lora_as_trainable(model)
    state = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    torch.save(spoil(state), tmp_path / "spoilt.bin")
    for argv in (["inspect"], ["convert", "--to", "bin", "--lora_alpha", "6", tmp_path / "new.bin"]):
        code, _, err = said(capsys, argv[0], tmp_path / "spoilt.bin", *argv[1:])
        assert code == 1 and words in err and err.strip().count("\n") < 3, err
    assert not (tmp_path / "new.bin").exists()


@pytest.mark.parametrize(
    "content", [{"metrics": [1]}, {"metrics": {"a": "b"}}, {"task": ["rte"]}, {"base_model": 3}], ids=str
)
def test_metadata_of_another_kind_than_runs_write_is_refused(content, tmp_path, capsys):
    model = randomise_(CLASSIFIERS["roberta"][0](tiny_config(apply_lora=True, lora_r=R, lora_alpha=ALPHA)))
    mark_only_lora_as_trainable(model)
    save_adapter(model, tmp_path, content)
    code, _, err = said(capsys, "inspect", tmp_path)
    assert code == 1 and next(iter(content)) in err and err.strip().count("\n") < 3, err


def test_the_program_is_started_as_the_readme_says(case):
    command = [sys.executable, "-m", "lora_nlu.adapters", "inspect", str(case[2])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "layers with LoRA" in done.stdout, done.stderr


# ------------------------------------------------------------------ the reference implementation's whole checkpoints


@pytest.mark.parametrize("case", ["roberta", "deberta"], indirect=True)
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("as_folder", [False, True])
def test_a_whole_checkpoint_counts_its_update_once_whether_it_was_merged_before_it_was_saved_or_not(
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
    assert ["hold the update already" in note for note in notes] == ([True] if merged else [])


def test_a_whole_checkpoint_of_another_base_model_is_refused(case, tmp_path):
    model, base, _ = case
    torch.save(randomise_(model, seed=9).state_dict(), tmp_path / "whole.bin")
    with pytest.raises(UserError, match="base weights are not this model's"):
        attach_adapter(fresh(base), read_adapter(str(tmp_path / "whole.bin")), ALPHA, allow_new_head=False)


# ----------------------------------------------------------------------------------------------------- fingerprints


def test_a_fingerprint_is_the_bases_own_whatever_lora_head_and_dtype(case):
    model, base, _ = case
    assert base_fingerprint(fresh(base)) == base_fingerprint(model) == base_fingerprint(fresh(base).bfloat16())
    other = fresh(base)
    with torch.no_grad():
        other.classifier.register_parameter("unused", nn.Parameter(torch.zeros(1)))
        next(p for n, p in other.base_model.named_parameters() if n.endswith("layer.1.output.dense.bias")).add_(0.1)
    assert base_fingerprint(other) != base_fingerprint(model)
