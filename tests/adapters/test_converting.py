"""Forms of an adapter: merged, published, folder; the same logits in each, or a refusal and nothing written."""

import json
import os
import re
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from conversions import ALPHA, CONFIGS, LABELS, SMALL, R, anonymous, inspected, logits, run_program, trained_by, written
from helpers import CLASSIFIERS, assert_close, ragged_batch, randomise_, tiny_config
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from lora_nlu.adapters.__main__ import main
from lora_nlu.adapters.attaching import attach_adapter
from lora_nlu.adapters.reading import read_adapter
from lora_nlu.adapters.writing import save_adapter
from lora_nlu.errors import UserError
from lora_nlu.methods.linear import merge_lora_
from lora_nlu.methods.lora import LoRALinear
from lora_nlu.methods.marking import mark_only_lora_as_trainable
from lora_nlu.models.loading import base_fingerprint


def fresh(base: Path, theirs: bool = False) -> nn.Module:
    """The base model as it lies on disk, ours or transformers' own."""
    config = transformers.AutoConfig.from_pretrained(base)
    return CLASSIFIERS[config.model_type][theirs].from_pretrained(base, config=config)


@pytest.mark.parametrize("to", ["peft", "bin", "merged"])
def test_a_conversion_that_fails_leaves_nothing_and_the_same_command_works_then(to, tmp_path, capsys, monkeypatch):
    *_, adapter = written("roberta", tmp_path, False)
    command = ("convert", adapter, tmp_path / "deep" / "converted", "--to", to)

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace" if to == "bin" else "fsync", no_space)
        code, _, err = run_program(capsys, *command)
    assert code == 1 and "No space left on device" in err and "deep" in err and not os.listdir(tmp_path / "deep")
    assert run_program(capsys, *command)[0] == 0 and os.listdir(tmp_path / "deep") == ["converted"]


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


@pytest.mark.parametrize("form", ["peft", "bin", "merged"])
def test_a_conversion_repeated_leaves_what_is_there_and_succeeds_only_if_it_is_the_same(form, tmp_path, capsys):
    *_, adapter = written("roberta", tmp_path, False)
    command = ["convert", adapter, tmp_path / "new", "--to", form]
    code, out, err = run_program(capsys, *command)
    assert code == 0, err
    others = {*tmp_path.iterdir()}
    files = [path for path in [tmp_path / "new", *(tmp_path / "new").rglob("*")] if path.is_file()]
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}
    code, again, err = run_program(capsys, *command)
    assert code == 0 and again.splitlines()[0] == out.splitlines()[0], err
    assert "new: was there already, with the same content." in again
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files} == before
    with max(files, key=lambda path: path.stat().st_size).open("ab") as file:
        file.write(b" ")
    code, _, err = run_program(capsys, *command)
    assert code == 1 and "new: is there already. Give another destination" in err
    assert {*tmp_path.iterdir()} == others


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["convert", "{adapter}", "{adapter}", "--to", "peft"], "is there already"),
        (["convert", "{adapter}", "{adapter}", "--to", "bin"], "is there already"),
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
        (lambda state: {n: t for n, t in state.items() if "lora_" not in n}, "no tensor of LoRA"),
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


# ------------------------------------------------------------------------------------------------------ --base MODEL


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
    assert 'base_model: "someone/a-base"' in (tmp_path / "new" / "README.md").read_text()
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


# ------------------------------------------------------------------------------------------------------------ to a .bin


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
